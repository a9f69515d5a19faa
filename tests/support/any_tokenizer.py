"""Runs llama.cpp's convert_hf_to_gguf.py (or a script about it) on models with any tokenizer.

The converter knows published tokenizers alone, by a digest, and wants each its own kind. Of two
families it reads a field that transformers 5 does not keep: without it, it cannot convert them.
"""

import runpy
import sys
from pathlib import Path

from axolotl_loram.results.converter import find_script

checkout = find_script("convert_hf_to_gguf.py").parent
sys.path[:0] = [str(checkout), str(checkout / "gguf-py")]
for name in [name for name in sys.modules if name.partition(".")[0] == "gguf"]:
    del sys.modules[name]  # the checkout brings its own

from conversion.base import ModelBase, TextModel  # noqa: E402

get_vocab, register = TextModel._set_vocab_gpt2, ModelBase.register.__func__
load = ModelBase.load_hparams
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"


def registering(cls, *names):
    """As `ModelBase.register`, of classes that take any vocabulary for one of bytes."""

    def add(kind):
        kind.set_vocab = get_vocab
        return register(cls, *names)(kind)

    return add


def load_hparams(*given, **named):
    """As `ModelBase.load_hparams`, with `rotary_pct`."""
    fields = load(*given, **named)
    rotary = (fields.get("rope_parameters") or {}).get("partial_rotary_factor", 1.0)
    return {"rotary_pct": rotary, **fields}


ModelBase.register, ModelBase.load_hparams = classmethod(registering), staticmethod(load_hparams)
sys.argv = sys.argv[1:]
sys.path[0:0] = [str(Path(sys.argv[0]).parent)]
runpy.run_path(sys.argv[0], run_name="__main__")
