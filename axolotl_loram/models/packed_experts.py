"""Stacked experts in 4 bits, as `Packing` writes them: they stay packed in memory.

transformers (5.16) loads linear layers in 4 bits, and knows no stacked experts in them. Here it
learns to: a stack becomes a parameter that bitsandbytes expands while its layer runs, as Axolotl's
`quantize_moe_experts` makes it (on a GPU, of a model in 16 bits). PEFT takes it for what it stands
for, and makes no copy in float32.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from axolotl_loram.architecture.families import FAMILIES
from axolotl_loram.architecture.spaces import EXPERTS
from axolotl_loram.files.nf4 import DTYPES, STATE
from axolotl_loram.models.patches import take_any_width

PARTS = (".absmax", *DTYPES, STATE)
STACKS = tuple(
    dict.fromkeys(
        f"{weight.module.rpartition('.')[2]}.{weight.parameter}"
        for family in FAMILIES.values()
        for weight in family.layer
        if weight.role == EXPERTS
    )
)
"""What the names of stacks end in, in the order in which models define them."""


class StackedNf4(Bnb4BitHfQuantizer):
    """bitsandbytes' 4 bits for linear layers, and for the stacked experts of packed checkpoints."""

    def get_weight_conversions(self) -> list[Any]:
        """How what is stored becomes parameters."""
        stacks = [
            WeightConverter(
                source_patterns=[*(f"{stack}{part}" for part in PARTS), f"{stack}$"],
                target_patterns=f"{stack}$",
                operations=[_Unpack()],
            )
            for stack in STACKS
        ]
        return [*(stacks if self.pre_quantized else ()), *super().get_weight_conversions()]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """PEFT nests LoRA on several parameters of a module in the order that it finds them in."""
        take_any_width()
        if stacks := packed_stacks(model):
            from axolotl_loram.models.patches_peft import adapt_packed_stacks

            adapt_packed_stacks()
        order = [stack.rpartition(".")[2] for stack in STACKS]
        for module in stacks:
            parts = module.parametrizations._modules
            for name in sorted(parts, key=order.index):
                parts[name] = parts.pop(name)
        return super()._process_model_after_weight_loading(model, **kwargs)


class _Unpack(ConversionOps):
    """Puts a stack into its module at once: its parameter has another shape than what is stored."""

    def convert(self, input_dict: dict[str, Any], *_: Any, **kwargs: Any) -> dict[str, Any]:
        """As `Mxfp4Deserialize` of transformers does it."""
        from bitsandbytes.nn.parametrize import replace_parameter_4bit_prequantized

        found = {
            key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()
        }
        if len(found) == 1:
            return input_dict
        parameter = kwargs["full_layer_name"]
        path, _, name = parameter.rpartition(".")
        module = kwargs["model"].get_submodule(path)
        stack = next(stack for stack in STACKS if parameter.endswith(stack))
        state = {key.partition(stack)[2].strip("$."): value for key, value in found.items()}
        packed = state.pop("")
        setattr(module, name, nn.Parameter(packed, requires_grad=False))
        replace_parameter_4bit_prequantized(module, name, state, device=packed.device)
        module._is_hf_initialized = True
        kwargs["missing_keys"].discard(parameter)
        return {}


def packed_stacks(model: nn.Module) -> list[Any]:
    """The modules of a model whose stacked experts are in 4 bits."""
    return [
        module
        for module in model.modules()
        if hasattr(module, "parametrizations") and any(states_of(module))
    ]


def states_of(module: Any) -> list[Any]:
    """Bitsandbytes' quantization state of each packed stack of a module."""
    from bitsandbytes.nn.parametrize import Bnb4bitParametrization

    return [
        part.quant_state
        for parts in module.parametrizations.values()
        for part in parts
        if isinstance(part, Bnb4bitParametrization)
    ]
