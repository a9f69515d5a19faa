"""Which weights of a checkpoint go into 4 bits, written a piece at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from axolotl_loram.architecture.config_json import Config, family_of, layer_count
from axolotl_loram.architecture.model import has_experts, layer_pieces
from axolotl_loram.architecture.spaces import EXPERTS
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.nf4 import NESTED_BLOCK, STATE, STATE_BYTES, packed_parts
from axolotl_loram.files.tensors import StoredTensor, TensorShape

if TYPE_CHECKING:
    import torch

PIECE = 2**22
"""Numbers that are quantized at once; a multiple of every block size."""


@dataclass(frozen=True)
class Packing:
    """Which weights of a model go into 4 bits, `block` of them to a scale, and how."""

    weights: frozenset[str]
    settings: Mapping[str, Any]
    block: int
    device: str

    def data(
        self, weight: TensorShape, blocks: Iterable[np.ndarray]
    ) -> Iterator[np.ndarray | Iterable[np.ndarray]]:
        """The bits of what a weight is stored as, of each of `packed_parts` in its turn.

        Args:
            weight: Name, dtype and shape before.
            blocks: Its bits, finite, in any number of arrays; some `PIECE` are in memory at a time.
        """
        name, dtype, shape = weight
        scales: list[torch.Tensor] = []
        yield self._numbers(dtype, blocks, scales)
        parts = self._state(dtype, shape, scales)  # once all numbers were written
        for part, *_ in packed_parts(name, shape, self.block)[1:]:
            yield parts[part.removeprefix(name)]

    def _numbers(
        self, dtype: str, blocks: Iterable[np.ndarray], scales: list[torch.Tensor]
    ) -> Iterator[np.ndarray]:
        """The packed numbers of a weight, a piece at a time; fills `scales` on the way."""
        from bitsandbytes.functional import quantize_4bit

        from axolotl_loram.models.bits import from_bits

        for piece in _pieces(blocks):
            packed, state = quantize_4bit(
                from_bits(piece, dtype).to(self.device),
                blocksize=self.block,
                compress_statistics=False,
                quant_type="nf4",
            )
            scales.append(state.absmax)
            yield packed.cpu().numpy()

    def _state(
        self, dtype: str, shape: tuple[int, ...], scales: list[torch.Tensor]
    ) -> dict[str, np.ndarray]:
        """What goes with the packed numbers, made from all scales as `quantize_4bit` makes it."""
        import torch
        from bitsandbytes.functional import QuantState, get_4bit_type, quantize_blockwise

        from axolotl_loram.models.bits import TORCH_DTYPES

        absmax = torch.cat(scales)
        offset = absmax.mean()
        quantized, nested = quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
        state = QuantState(
            absmax=quantized,
            shape=torch.Size(shape),
            dtype=TORCH_DTYPES[dtype],
            blocksize=self.block,
            code=get_4bit_type("nf4", device=absmax.device),
            quant_type="nf4",
            offset=offset,
            state2=nested,
        )
        parts = {f".{n}": part.cpu().numpy() for n, part in state.as_dict(packed=True).items()}
        text = parts[STATE].tobytes().ljust(STATE_BYTES)
        return {**parts, STATE: np.frombuffer(text, np.uint8)}


def _pieces(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The same numbers in arrays of `PIECE`, the last one shorter."""
    held: list[np.ndarray] = []
    for block in blocks:
        held.append(block.reshape(-1))
        if sum(map(len, held)) >= PIECE:
            joined = np.concatenate(held)
            whole = len(joined) // PIECE * PIECE
            yield from np.split(joined[:whole], whole // PIECE)
            held = [joined[whole:].copy()]
    rest = np.concatenate(held)
    if len(rest):
        yield rest


def plan_packing(
    config: Config, stored: Mapping[str, StoredTensor], block: int, device: str
) -> Packing:
    """Ask transformers which weights of a model it holds in 4 bits.

    They are those that load_in_4bit takes, the lm_head, unless it is the embedding too, and stacked
    experts, under the names that the running model has for them (`packed_experts` loads them).

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
    if family.section or family.auto_class != "AutoModelForCausalLM":
        raise LoRAMError(
            f"expected a language model without a tower to write it in 4 bits, found "
            f"{config['model_type']}: prune without quantize, and train with load_in_4bit"
        )
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    import axolotl_loram.models.per_layer  # noqa: F401  (layers of different widths)
    from axolotl_loram.models.small_head import check_device

    check_device(device)
    settings = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings, dtype=settings.dtype or torch.bfloat16)
    linears, quantization_config = _converted(model)
    pieces = {family.stored_name(name): [family.stored_name(name)] for name in sorted(linears)}
    for layer in range(layer_count(config)) if has_experts(config) else ():
        for name, own in layer_pieces(config, layer).items():
            if own[0][0].role == EXPERTS:
                pieces[name] = [piece.name for of_expert in own for piece in of_expert]
    for name, parts in pieces.items():
        dtypes = {stored[part].dtype if part in stored else None for part in parts}
        if len(dtypes) > 1 or not dtypes <= {"BF16", "F16", "F32"}:
            raise LoRAMError(
                f"expected {name} as BF16, F16 or F32 to write it in 4 bits, found "
                f"{', '.join(sorted(map(str, dtypes)))}: prune without quantize, and train with "
                "load_in_4bit"
            )
    return Packing(frozenset(pieces), quantization_config, block, device)


def _converted(model: Any) -> tuple[frozenset[str], dict[str, Any]]:
    """The weights that transformers makes 4-bit in an empty model, and its settings for that."""
    from bitsandbytes.nn import Linear4bit
    from transformers.quantizers.auto import AutoHfQuantizer
    from transformers.quantizers.base import get_keys_to_not_convert

    from axolotl_loram.models.four_bit import qlora_config

    head = model.get_output_embeddings()
    tied = head.weight is model.get_input_embeddings().weight
    kept = get_keys_to_not_convert(model) if tied else []
    settings = qlora_config(model.dtype, llm_int8_skip_modules=sorted(kept))
    quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=True)
    quantizer.preprocess_model(model, device_map=None)
    modules = [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    known = settings.to_dict()
    known = {name: value for name, value in known.items() if not name.startswith("_")}
    return frozenset(f"{name}.weight" for name in modules), known
