"""What the fork server of `warm` imports, once."""

from importlib import import_module

import numpy as np

for name in (
    *(f"axolotl.cli.{name}" for name in ("main", "train", "preprocess", "merge_lora", "evaluate")),
    *("axolotl.cli.inference", "axolotl.train", "axolotl.core.builders"),
    *("bitsandbytes", "deepspeed", "peft", "torch.distributed.run", "trl"),
    *("axolotl_loram.plugin", "axolotl_loram.results.evaluate"),
):
    import_module(name)

from axolotl.utils.samplers.multipack import pack_parallel  # noqa: E402

pack_parallel(np.ones(2, np.int64), 8, 2, 8, num_processes=1)  # numba compiles it
