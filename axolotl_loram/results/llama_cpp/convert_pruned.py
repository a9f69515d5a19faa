"""llama.cpp's convert_hf_to_gguf.py for a Llama whose layers differ in width: run as a script.

(In a folder of its own: Python looks for modules beside a script first.)

llama.cpp keeps widths per layer in the header of every architecture, but builds most as if all were
as wide as the first. Of those that do not, `deci` (Nemotron 51B) is Llama otherwise.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def main(script: str, widths: str, *arguments: str) -> None:
    """Convert.

    Args:
        script: Path of convert_hf_to_gguf.py.
        widths: JSON: config field → its value in each layer.
        arguments: That script's.
    """
    checkout, per_layer = Path(script).parent, json.loads(widths)
    sys.path[:0] = [str(checkout), str(checkout / "gguf-py")]
    import conversion  # of the checkout
    import gguf
    from conversion.llama import LlamaModel

    import axolotl_loram.models.per_layer  # noqa: F401  (else not even the tokenizer loads)

    class Pruned(LlamaModel):
        model_arch = gguf.MODEL_ARCH.DECI

        def set_gguf_parameters(self) -> None:
            self.hparams |= per_layer
            super().set_gguf_parameters()

        def modify_tensors(self, tensor: Any, name: str, layer: int | None) -> Iterator[Any]:
            if layer is not None:
                self.hparams |= {field: values[layer] for field, values in per_layer.items()}
            yield from super().modify_tensors(tensor, name, layer)

    conversion.get_model_class = lambda *_, **__: Pruned
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
