"""Pico models of every family, pruned, with a recovered adapter, as llama.cpp takes them."""

import json

import hostile
import llamacpp
import numpy as np
import pytest
import torch
import transformers
from conftest import build_model
from families import OWN_SIZES
from peft import PeftModel

from axolotl_loram.architecture.families import FAMILIES
from axolotl_loram.architecture.plan import PruningPlan
from axolotl_loram.config import PruningArgs
from axolotl_loram.pruning.prune import prune
from axolotl_loram.recovery.recover import recover

HALF = {"ratio": 0.5, "method": "random", "protect_first": 1, "protect_last": 1}
IDS = [5, 77, 34, 200, 9, 11, 150, 42, 99, 23]
GEMMA_3 = {"vocab_size": 263, "query_pre_attn_scalar": 8}  # the converter counts tokens so
OWN = {
    # Command R has no norms of heads, which llama.cpp knows of R+ alone.
    "cohere": {"use_qk_norm": False, "logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0},
    "gemma2": {"query_pre_attn_scalar": 8},  # llama.cpp takes head_dim
    "gemma3": {"text_config": OWN_SIZES["gemma3"]["text_config"] | GEMMA_3},
    "gemma3_text": GEMMA_3,
    "olmoe": {"num_key_value_heads": 4},
    "phi": {"num_key_value_heads": 4, "intermediate_size": 128},
    "qwen3_moe": {"mlp_only_layers": [], "norm_topk_prob": True},
}
"""What the configs of published models say, without which llama.cpp does not take the model."""


def write_base(family, folder):
    """A pico model whose vocabulary llama.cpp takes."""
    build_model(family, **OWN.get(family, {})).save_pretrained(folder)
    llamacpp.tokenizer().save_pretrained(folder)


class Story:
    """A pico base, also as GGUF, and an adapter for it that was recovered."""

    def __init__(self, folder, family="llama", **settings):
        self.base, self.recovered = folder / "base", folder / "recovered"
        self.family, self.gguf, pruned = family, folder / "base.gguf", folder / "pruned"
        write_base(family, self.base)
        prune(str(self.base), pruned, PruningArgs.parse(**HALF))
        self.trained = hostile.write_adapter(folder / "trained", PruningPlan.load(pruned), pruned)
        self.set(self.trained, **{"lora_alpha": 0.25, **settings})
        recover(self.trained, str(pruned), self.recovered)

    @staticmethod
    def set(adapter, **settings):
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))

    def with_peft(self):
        """Log probabilities by transformers and PEFT, without and with the adapter."""
        model = load(self.base, self.family)
        before = logprobs(model)
        return before, logprobs(PeftModel.from_pretrained(model, self.recovered))


def load(folder, family):
    """A model of its family's class, in float32."""
    auto_class = getattr(transformers, FAMILIES[family].auto_class)
    return auto_class.from_pretrained(folder, dtype=torch.float32)


def logprobs(model):
    """Of what follows IDS, (vocabulary,), in nats."""
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([IDS])).logits[0, -1].log_softmax(-1).numpy()


def difference(one, other):
    """The largest of two distributions' differences."""
    return np.abs(np.exp(one) - np.exp(other)).max()


FEW = ("llama", "gpt_neox", "gemma3_text", "phi3")
"""Families of every kind of row order, with joint projections, and with other norms."""


def every(families):
    """All of them as parameters, a few in the suite."""
    return [
        family if family in FEW else pytest.param(family, marks=pytest.mark.matrix)
        for family in families
    ]
