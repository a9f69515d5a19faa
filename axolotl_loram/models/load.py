"""Loading a pruned model outside Axolotl: checked, and in 4 bits where that is asked for."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from axolotl_loram.architecture.config_json import family_of, layer_fields
from axolotl_loram.architecture.pairing import check_pruned
from axolotl_loram.architecture.plan import PruningPlan
from axolotl_loram.config import NATIVE, QLORAM
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.find import find_folder, reason
from axolotl_loram.files.nf4 import packed_weights
from axolotl_loram.files.tensors import Checkpoint
from axolotl_loram.models.formats import Formats, module_names
from axolotl_loram.models.four_bit import qlora_config
from axolotl_loram.models.per_layer import check_widths
from axolotl_loram.models.small_head import prepare_packed, store_small


def load_pruned(
    model: str,
    revision: str | None = None,
    load_in_4bit: bool = False,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    lm_head_format: str | None = None,
    embedding_format: str | None = None,
    **options: Any,
) -> transformers.PreTrainedModel:
    """A pruned model, after a check that plan, record, config and weights belong together.

    See `api.load_pruned`, which says what the arguments mean.
    """
    wishes = {"lm_head": lm_head_format, "embedding": embedding_format}
    for part, wish in wishes.items():
        known = (NATIVE, QLORAM[part])
        if wish is not None and wish not in known:
            raise LoRAMError(f"expected {part}_format out of {', '.join(known)}, found {wish!r}")
    folder = find_folder(model, revision)
    plan = PruningPlan.load(folder)
    plan.check_runs_alone(model, "train it by `axolotl train`, with `anchor: base`")
    check_pruned(folder, plan)
    packed = bool(packed_weights(Checkpoint(folder).tensors))
    if load_in_4bit and not packed:
        options.setdefault("quantization_config", qlora_config(_compute_dtype(dtype, plan)))
    auto = getattr(transformers, family_of(plan.config).auto_class)
    try:
        # What was checked is what is loaded, and what an adapter's config will name.
        loaded = auto.from_pretrained(
            folder,
            dtype=dtype or "auto",
            device_map=device_map,
            **{"use_safetensors": True, **options},
        )
    except (OSError, ValueError, ImportError, TypeError) as error:
        raise LoRAMError(
            f"expected a pruned model that transformers loads, found {model} refused "
            f"({reason(error)}): check the folder, the device and the options"
        ) from error
    check_widths(loaded)
    prepare_packed(loaded, folder, loaded.dtype)
    # Native, and not as `axolotl train` has it: TRL's usual loss multiplies by lm_head.weight.
    four_bit = (load_in_4bit or packed) and bool(module_names(plan.config))
    defaults = {"lm_head": NATIVE, "embedding": QLORAM["embedding"] if four_bit else NATIVE}
    chosen = {part: wish or defaults[part] for part, wish in wishes.items()}
    asked = frozenset(part for part, wish in wishes.items() if wish)
    vocabulary = getattr(loaded.get_input_embeddings(), "num_embeddings", 0)
    store_small(loaded, Formats(**chosen, asked=asked), vocabulary)
    return loaded


def _compute_dtype(dtype: torch.dtype | str | None, plan: PruningPlan) -> torch.dtype:
    """What 4-bit layers compute in: what is asked for, else what the model is stored in."""
    fields = layer_fields(plan.config, None)
    stored = fields.get("dtype") or fields.get("torch_dtype") or "bfloat16"
    named = stored if dtype in (None, "auto") else dtype
    found = getattr(torch, named, None) if isinstance(named, str) else named
    if not isinstance(found, torch.dtype):
        raise LoRAMError(f"expected a dtype such as bfloat16, found {named!r:.80}")
    return found
