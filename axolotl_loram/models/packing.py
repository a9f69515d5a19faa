"""Which weights of a checkpoint go into 4 bits, written a piece at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from axolotl_loram.architecture.config_json import Config, family_of
from axolotl_loram.architecture.model import has_experts, tensors
from axolotl_loram.errors import LoRAMError, not_finite
from axolotl_loram.files.nf4 import NESTED_BLOCK, PIECE, STATE, STATE_BYTES, packed_sizes
from axolotl_loram.files.tensors import (
    Checkpoint,
    StoredTensor,
    TensorShape,
    open_safetensors,
    write_safetensors,
)

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Packing:
    """Which weights of a model go into 4 bits, and how.

    Attributes:
        weights: Names of the tensors.
        settings: ``quantization_config`` for config.json.
        block: Weights that share a scale.
        device: Where bitsandbytes computes it.
    """

    weights: frozenset[str]
    settings: Mapping[str, Any]
    block: int
    device: str

    def pack(self, file: Path) -> str:
        """Put the weights of a safetensors file into 4 bits, in place; returns its SHA-256.

        Some `PIECE` numbers are in memory at a time. An interruption leaves the file as it was.
        """
        stored = list(open_safetensors(file)[0].values())
        packed = file.with_name(f"{file.name}.packed")
        described = [part for tensor in stored for part in self._described(tensor)]
        data = (part for tensor in stored for part in self._data(tensor))
        digest = write_safetensors(packed, described, data)
        packed.replace(file)
        return digest

    def _described(self, tensor: StoredTensor) -> Iterator[TensorShape]:
        if tensor.name not in self.weights:
            yield tensor.name, tensor.dtype, tensor.shape
            return
        for suffix, size in packed_sizes(tensor.shape, self.block):
            name = tensor.name + suffix
            if suffix in (".quant_map", ".nested_absmax", ".nested_quant_map"):
                yield name, "F32", (size // 4,)
            else:
                yield name, "U8", (size, 1) if suffix == "" else (size,)

    def _data(self, tensor: StoredTensor) -> Iterator[np.ndarray | Iterable[np.ndarray]]:
        if tensor.name not in self.weights:
            yield tensor.blocks()
            return
        scales: list[torch.Tensor] = []
        yield self._numbers(tensor, scales)
        parts = self._state(tensor, scales)  # once all numbers were written
        for suffix, _ in packed_sizes(tensor.shape, self.block):
            if suffix:
                yield parts[suffix]

    def _numbers(self, tensor: StoredTensor, scales: list[torch.Tensor]) -> Iterator[np.ndarray]:
        """The packed numbers of a weight, a piece at a time; fills `scales` on the way."""
        import torch
        from bitsandbytes.functional import quantize_4bit

        from axolotl_loram.models.stream import TORCH_DTYPES

        total = math.prod(tensor.shape)
        width = tensor.bits.itemsize
        for start in range(0, total, PIECE):
            read = tensor.read_bytes(start * width, min(PIECE, total - start) * width)
            numbers = torch.from_numpy(read).view(TORCH_DTYPES[tensor.dtype]).to(self.device)
            packed, state = quantize_4bit(
                numbers, blocksize=self.block, compress_statistics=False, quant_type="nf4"
            )
            if not state.absmax.isfinite().all():
                raise not_finite(tensor.name)
            scales.append(state.absmax)
            yield packed.cpu().numpy()

    def _state(self, tensor: StoredTensor, scales: Sequence[torch.Tensor]) -> dict[str, np.ndarray]:
        """What goes with the packed numbers, made from all scales as `quantize_4bit` makes it."""
        import torch
        from bitsandbytes.functional import QuantState, get_4bit_type, quantize_blockwise

        from axolotl_loram.models.stream import TORCH_DTYPES

        absmax = torch.cat(list(scales))
        offset = absmax.mean()
        quantized, nested = quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
        state = QuantState(
            absmax=quantized,
            shape=torch.Size(tensor.shape),
            dtype=TORCH_DTYPES[tensor.dtype],
            blocksize=self.block,
            code=get_4bit_type("nf4", device=absmax.device),
            quant_type="nf4",
            offset=offset,
            state2=nested,
        )
        parts = {f".{n}": part.cpu().numpy() for n, part in state.as_dict(packed=True).items()}
        text = parts[STATE].tobytes().ljust(STATE_BYTES)
        return {**parts, STATE: np.frombuffer(text, np.uint8)}

    def needed_bytes(self, config: Config, checkpoint: Checkpoint) -> int:
        """Most bytes on the disk while a pruned checkpoint is written: packed, and one file plain.

        Args:
            config: The pruned model's.
            checkpoint: The base's weights, whose files and dtypes are kept.
        """
        shapes = {tensor.name: tensor.shape for tensor in tensors(config)}
        total, largest = 0, 0
        for names in checkpoint.shards.values():
            plain = {
                name: math.prod(shapes[name]) * checkpoint[name].bits.itemsize
                for name in names
                if name in shapes
            }
            largest = max(largest, sum(plain.values()))
            for name, size in plain.items():
                sizes = dict(packed_sizes(shapes[name], self.block))
                total += sum(sizes.values()) if name in self.weights else size
        return total + largest


def plan_packing(
    config: Config, stored: Mapping[str, StoredTensor], block: int, device: str
) -> Packing:
    """Ask transformers which weights of a model it holds in 4 bits.

    They are those that load_in_4bit takes, and the lm_head, unless it is the embedding too.

    Args:
        config: The pruned model's config, as config.json will have it.
        stored: The base's weights.
        block: Weights that share a scale.
        device: Where to quantize.

    Raises:
        LoRAMError: The device cannot do it, weights are no 16- or 32-bit numbers, or the model has
            parts beside a decoder's linear layers that transformers would not find packed.
    """
    family = family_of(config)
    if has_experts(config) or family.section or family.auto_class != "AutoModelForCausalLM":
        raise LoRAMError(
            f"expected a language model without experts and towers to write it in 4 bits, found "
            f"{config['model_type']}: prune without quantize, and train with load_in_4bit"
        )
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    import axolotl_loram.models.per_layer  # noqa: F401  (layers of different widths)
    from axolotl_loram.models.small_head import check_device

    check_device("nf4", device)
    settings = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings, dtype=settings.dtype or torch.bfloat16)
    weights, quantization_config = _converted(model)
    for name in sorted(weights):
        dtype = stored[name].dtype if name in stored else None
        if dtype not in ("BF16", "F16", "F32"):
            raise LoRAMError(
                f"expected {name} as BF16, F16 or F32 to write it in 4 bits, found {dtype}: prune "
                "without quantize, and train with load_in_4bit"
            )
    return Packing(weights, quantization_config, block, device)


def _converted(model: Any) -> tuple[frozenset[str], dict[str, Any]]:
    """The weights that transformers makes 4-bit in an empty model, and its settings for that."""
    from bitsandbytes.nn import Linear4bit
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import AutoHfQuantizer
    from transformers.quantizers.base import get_keys_to_not_convert

    head = model.get_output_embeddings()
    tied = head.weight is model.get_input_embeddings().weight
    kept = get_keys_to_not_convert(model) if tied else []
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=model.dtype,
        llm_int8_skip_modules=sorted(kept),
    )
    quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=True)
    quantizer.preprocess_model(model, device_map=None)
    modules = [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    known = settings.to_dict()
    known = {name: value for name, value in known.items() if not name.startswith("_")}
    return frozenset(f"{name}.weight" for name in modules), known
