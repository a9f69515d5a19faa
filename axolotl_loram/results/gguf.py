"""LoRA as llama.cpp keeps it in a GGUF file: what must stand there, and whether it does.

llama.cpp calls a pair ``blk.7.attn_q.weight.lora_a``, (r, inputs), and ``….lora_b``, (outputs, r),
after the base's tensor, and computes W x + alpha / r · B A x. It keeps the rows of some projections
in another order than transformers: `ARCHITECTURES` says where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from axolotl_loram.architecture.config_json import Config, layer_count, layer_fields
from axolotl_loram.errors import LoRAMError

if TYPE_CHECKING:
    from axolotl_loram.recovery.lora import LoRA

PROBES = 8
"""Random vectors that ΔW is applied to: two ΔW that differ agree on none of them."""
TOLERANCE = 1e-5
"""Of ΔW x, relative to its largest value: float32 rounds B when its scale is moved into it."""
Order = Callable[[np.ndarray, str, Mapping[str, Any]], np.ndarray]
"""Rows of B, (outputs, r), module and config → the rows as llama.cpp orders them."""


def as_they_are(rows: np.ndarray, module: str, fields: Mapping[str, Any]) -> np.ndarray:
    """The order of transformers."""
    return rows


def rotary_pairs(rows: np.ndarray, module: str, fields: Mapping[str, Any]) -> np.ndarray:
    """Of q and k, both halves of each head interleaved: llama.cpp rotates neighbours."""
    counts = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    counted = counts.get(module.rpartition(".")[2])
    if counted is None:
        return rows
    halves = rows.reshape(fields[counted], 2, -1, rows.shape[1])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def joint_thirds(rows: np.ndarray, module: str, fields: Mapping[str, Any]) -> np.ndarray:
    """Of a joint projection, (head, q | k | v, feature) as (q | k | v, head, feature)."""
    if not module.endswith("query_key_value"):
        return rows
    heads = rows.reshape(fields["num_attention_heads"], 3, -1, rows.shape[1])
    return heads.swapaxes(0, 1).reshape(rows.shape)


ARCHITECTURES: Mapping[str, tuple[str, Order]] = {
    "llama": ("llama", rotary_pairs),
    "mistral": ("llama", rotary_pairs),
    "mixtral": ("llama", rotary_pairs),
    "granite": ("granite", rotary_pairs),
    "smollm3": ("smollm3", rotary_pairs),
    "qwen2": ("qwen2", as_they_are),
    "qwen3": ("qwen3", as_they_are),
    "gemma": ("gemma", as_they_are),
    "gemma2": ("gemma2", as_they_are),
    "gemma3_text": ("gemma3", as_they_are),
    "phi3": ("phi3", as_they_are),
    "olmo2": ("olmo2", as_they_are),
    "olmo3": ("olmo2", as_they_are),
    "seed_oss": ("seed_oss", as_they_are),
    "cohere": ("command-r", as_they_are),
    "cohere2": ("cohere2", as_they_are),
    "glm": ("chatglm", as_they_are),
    "glm4": ("glm4", as_they_are),
    "starcoder2": ("starcoder2", as_they_are),
    "phi": ("phi2", as_they_are),
    "gpt_neox": ("gptneox", joint_thirds),
    "olmoe": ("olmoe", as_they_are),
    "qwen2_moe": ("qwen2moe", as_they_are),
    "qwen3_moe": ("qwen3moe", as_they_are),
    "gpt_oss": ("gpt-oss", as_they_are),
    "gemma3": ("gemma3", as_they_are),
    "qwen3_vl": ("qwen3vl", as_they_are),
    "qwen2_5_vl": ("qwen2vl", as_they_are),
}
"""Model type → llama.cpp's architecture, and how that orders the rows of projections."""


@dataclass(frozen=True)
class Pair:
    """The LoRA of one module as it must stand in the file.

    Attributes:
        name: What llama.cpp calls the base's tensor.
        scale: s.
        a: A, (r, inputs).
        b: B, (outputs, r), its rows in llama.cpp's order.
    """

    name: str
    scale: float
    a: np.ndarray
    b: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """Of the base's tensor, (outputs, inputs)."""
        return len(self.b), self.a.shape[1]

    def applied(self, x: np.ndarray) -> np.ndarray:
        """ΔW x = s B A x, (outputs, probes)."""
        return self.scale * (self.b.astype(np.float64) @ (self.a.astype(np.float64) @ x))


def architecture_of(config: Config) -> tuple[str, Order]:
    """llama.cpp's name of a model's architecture, and its order of rows.

    Raises:
        LoRAMError: There is none that was tried.
    """
    found = ARCHITECTURES.get(config["model_type"])
    if found is None:
        raise LoRAMError(
            f"expected a model type out of {', '.join(ARCHITECTURES)} to export for llama.cpp, "
            f"found {config['model_type']}: serve this adapter with PEFT or vLLM, or merge it"
        )
    return found


def text_module(module: str) -> str:
    """A module's name in the language model alone, without its place beside a vision tower."""
    return module.replace("language_model.", "")


def names_of(architecture: str, layers: int) -> Callable[[str], str | None]:
    """What llama.cpp calls the weight of a module, None where it has none."""
    import gguf

    (number,) = (n for n, called in gguf.MODEL_ARCH_NAMES.items() if called == architecture)
    names = gguf.get_tensor_name_map(number, layers)
    return lambda module: names.get_name(f"{text_module(module)}.weight", try_suffixes=(".weight",))


def pairs_of(loras: Iterable[LoRA], config: Config) -> dict[str, Pair]:
    """What the file must hold, by llama.cpp's names, for the LoRA of modules in the base's shapes.

    Raises:
        LoRAMError: llama.cpp has no tensor for a module.
    """
    name, order = architecture_of(config)
    called_there = names_of(name, layer_count(config))
    fields, pairs = layer_fields(config, None), {}
    for lora in loras:
        called = called_there(lora.module)
        if called is None:
            raise LoRAMError(
                f"expected LoRA on modules that llama.cpp has in {name}, found it on "
                f"{lora.module}: train without that target, or serve with PEFT"
            )
        rows = order(lora.b.numpy(), lora.module, fields)
        pairs[called] = Pair(called, lora.scale, lora.a.numpy(), rows)
    return pairs


def read_gguf(file: Path) -> Any:
    """A GGUF file, its tensors in place.

    Raises:
        LoRAMError: It is none.
    """
    import gguf

    try:
        return gguf.GGUFReader(file)
    except (OSError, ValueError, KeyError, IndexError, TypeError, UnicodeDecodeError) as error:
        raise LoRAMError(f"expected a GGUF file, found {file} unreadable: {error}") from None


def field_of(reader: Any, name: str) -> Any:
    """A value of the header, None where it is not there."""
    field = reader.fields.get(name)
    return None if field is None else field.contents()


def check_base(file: Path, pairs: Mapping[str, Pair], config: Config) -> None:
    """Refuse a base GGUF of another architecture or size, or that is an adapter."""
    reader, (name, _) = read_gguf(file), architecture_of(config)
    found = field_of(reader, "general.architecture")
    if found != name or field_of(reader, "general.type") == "adapter":
        raise LoRAMError(
            f"expected a base GGUF of architecture {name}, found {file} to be one of type "
            f"{field_of(reader, 'general.type')} and architecture {found}: give the GGUF of the "
            "adapter's own base"
        )
    layers, wanted = field_of(reader, f"{name}.block_count"), layer_count(config)
    if layers != wanted:
        raise LoRAMError(
            f"expected a base GGUF of {wanted} layers, found {layers} in {file}: give the GGUF of "
            "the adapter's own base"
        )
    shapes = {tensor.name: tuple(map(int, reversed(tensor.shape))) for tensor in reader.tensors}
    for pair in pairs.values():
        if shapes.get(pair.name) != pair.shape:
            there = list(shapes[pair.name]) if pair.name in shapes else "none"
            raise LoRAMError(
                f"expected {pair.name} of shape {list(pair.shape)} in {file}, found {there}: give "
                "the GGUF of the adapter's own base"
            )


def check_adapter_file(file: Path, pairs: Mapping[str, Pair], config: Config, alpha: float) -> None:
    """Refuse a GGUF that is not the adapter `pairs`: its header, names, shapes and ΔW."""
    reader = read_gguf(file)
    header = {
        "general.architecture": architecture_of(config)[0],
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": float(np.float32(alpha)),
    }
    for name, wanted in header.items():
        if field_of(reader, name) != wanted:
            raise wrong(file, name, wanted, field_of(reader, name))
    stored = {tensor.name: tensor for tensor in reader.tensors}
    wanted = {f"{name}.lora_{side}" for name in pairs for side in "ab"}
    for lost in sorted(wanted ^ stored.keys()):
        is_there = lost in stored
        raise wrong(file, lost, *(("no such tensor", "one") if is_there else ("it", "none")))
    numbers = np.random.default_rng(0)
    for name, pair in pairs.items():
        a, b = (values_of(stored[f"{name}.lora_{side}"]) for side in "ab")
        for side, found, right in (("a", a, pair.a), ("b", b, pair.b)):
            if found.shape != right.shape:
                raise wrong(
                    file, f"{name}.lora_{side}", list(right.shape), f"shape {list(found.shape)}"
                )
        x = numbers.normal(size=(pair.shape[1], PROBES))
        right, found = pair.applied(x), Pair(name, alpha / len(a), a, b).applied(x)
        if not np.abs(found - right).max() <= TOLERANCE * np.abs(right).max():
            raise wrong(file, f"alpha / r · B A of {name}", "the adapter's", "another update")


def values_of(tensor: Any) -> np.ndarray:
    """A tensor of a GGUF file in float32."""
    import gguf

    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def wrong(file: Path, what: str, wanted: object, found: object) -> LoRAMError:
    """The error for a file that the converter wrote otherwise than it should."""
    return LoRAMError(
        f"expected {what} to be {wanted} in {file.name}, found {found}: llama.cpp's converter did "
        "not write it as it is, so try another version"
    )
