"""Compile what DeepSpeed needs on CPUs, which the first test to need it would wait for.

Run by `make` once it has installed. PyTorch keeps what it compiles, outside of the environment, and
compiles again for another one. Where nothing can be compiled a line says so, and nothing fails.
"""

import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"  # as in conftest.py: what is compiled depends on it
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja

try:
    from deepspeed.ops.op_builder.cpu import CPUAdamBuilder, ShareMemCommBuilder

    for builder in (CPUAdamBuilder(), ShareMemCommBuilder()):
        builder.load(verbose=False)
except Exception as error:  # of the import, of ninja, of a compiler: each has its own class
    why = f"{error}".partition("\n")[0][:100]
    print(f"DeepSpeed's CPU extensions were not compiled, tests that need them will fail: {why}")
