"""An adapter for llama.cpp and Ollama: converted by llama.cpp's own script, checked, described.

llama.cpp's `convert_lora_to_gguf.py` takes the scale of LoRA for lora_alpha / r, whatever else the
adapter's config says: where PEFT chooses another (rsLoRA, `alpha_pattern`), B is multiplied before.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from axolotl_loram.architecture.config_json import Config, load_config
from axolotl_loram.architecture.lora_names import ADAPTER_CONFIG, PARTNERS, PREFIX, split_name
from axolotl_loram.architecture.plan import PLAN_FILE, PruningPlan
from axolotl_loram.architecture.record import Kind
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.atomic import check_vacant, new_folder, write_json
from axolotl_loram.files.find import TOKENIZER_PATTERNS, find_folder, find_local_file
from axolotl_loram.files.tensors import ADAPTER_FILE
from axolotl_loram.recovery.adapter import Adapter
from axolotl_loram.results import gguf
from axolotl_loram.results.converter import find_script, run_script
from axolotl_loram.results.export_pruned import export_pruned
from axolotl_loram.results.modelfile import modelfile

LORA_SCRIPT = "convert_lora_to_gguf.py"
GGUF_FILE, MODELFILE = "adapter.gguf", "Modelfile"


def export(
    adapter: Path,
    output: Path,
    base: str | None = None,
    base_gguf: Path | None = None,
    llama_cpp: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write an adapter for the original as GGUF, with an Ollama Modelfile beside it.

    See `api.export`, which says what the arguments mean and when LoRAMError is raised; of a pruned
    model's folder, see `export_pruned`.

    Returns:
        "output", "file", "architecture", "tensors", "alpha", "checked_against" (the base GGUF), and
        "template": whether the Modelfile has one.
    """
    if (adapter / PLAN_FILE).is_file() and not (adapter / ADAPTER_CONFIG).is_file():
        return export_pruned(adapter, output, llama_cpp, overwrite)
    script = find_script(LORA_SCRIPT, llama_cpp)
    check_vacant(output, overwrite)
    opened = Adapter.open(adapter)
    folder, config = _base_of(opened, base)
    opened = opened.of_today(config)
    alpha = _alpha_of(opened)
    loras = loras_of(opened, config)
    pairs = gguf.pairs_of(loras.values(), config)
    if base_gguf is not None:
        gguf.check_base(base_gguf, pairs, config)
    with new_folder(output, overwrite) as scratch, tempfile.TemporaryDirectory() as staged:
        _stage(Path(staged), loras, alpha)
        file = scratch / GGUF_FILE
        run_script(script, "--base", folder, "--outfile", file, staged)
        gguf.check_adapter_file(file, pairs, config, alpha)
        text = modelfile(opened.folder, folder, GGUF_FILE, base_gguf, opened.model)
        (scratch / MODELFILE).write_text(text, encoding="utf-8")
    return {
        "output": str(output),
        "file": str(output / GGUF_FILE),
        "architecture": gguf.architecture_of(config)[0],
        "tensors": 2 * len(pairs),
        "alpha": alpha,
        "checked_against": None if base_gguf is None else str(base_gguf),
        "template": "\nTEMPLATE " in text,
    }


def _base_of(adapter: Adapter, base: str | None) -> tuple[Path, Config]:
    """Folder with the original's config, and that config.

    Raises:
        LoRAMError: The adapter is one for a pruned model, or the original is not within reach.
    """
    model = base or adapter.model
    pruned = find_local_file(adapter.model, PLAN_FILE) is not None
    if pruned or adapter.record.kind == Kind.TRAINED_ADAPTER:
        raise LoRAMError(
            f"expected an adapter for the original, found {adapter.folder} trained on a pruned "
            "model and not recovered: run axolotl-loram recover first"
        )
    revision = adapter.settings.get("revision") if base is None else None
    folder = find_folder(model, revision, ["config.json", *TOKENIZER_PATTERNS])
    return folder, load_config(str(folder))


def _alpha_of(adapter: Adapter) -> float:
    """The adapter's lora_alpha.

    Raises:
        LoRAMError: It is no number above 0: for an alpha of 0, llama.cpp takes a scale of 1.
    """
    alpha = adapter.settings.get("lora_alpha")
    if not isinstance(alpha, int | float) or not alpha > 0:
        raise LoRAMError(
            f"expected a lora_alpha above 0 in {adapter.folder / ADAPTER_CONFIG}, found {alpha!r}"
        )
    return alpha


def loras_of(adapter: Adapter, config: Config) -> Mapping[str, Any]:
    """LoRA of each module, of an adapter that is whole and has nothing but LoRA of matrices.

    Raises:
        LoRAMError: It is another adapter, or llama.cpp has no place for a part of it.
    """
    from axolotl_loram.recovery.lora import read_loras
    from axolotl_loram.recovery.whole import check_adapter

    gguf.architecture_of(config)
    moved = check_adapter(adapter, PruningPlan(config, {}))
    for one in moved:
        _, part = split_name(one.stored.name)
        if one.stack or part not in PARTNERS or "embedding" in part:
            kind = (
                "LoRA on stacked experts" if one.stack else "weights that are no LoRA of a matrix"
            )
            raise LoRAMError(
                f"expected LoRA on linear layers alone, which llama.cpp takes, found {kind}, such "
                f"as {one.stored.name}: train without that target, or serve with PEFT"
            )
    return read_loras(moved, adapter.settings, full_size=False)


def _stage(folder: Path, loras: Mapping[str, Any], alpha: float) -> None:
    """Write the adapter as the converter reads it: called as checkpoints call it, scale alpha/r."""
    from safetensors.torch import save_file

    tensors = {}
    for lora in loras.values():
        name, rank = PREFIX + gguf.text_module(lora.module), len(lora.a)
        usual = alpha / rank
        tensors[f"{name}.lora_A.weight"] = lora.a.contiguous()
        b = lora.b if lora.scale == usual else lora.b * (lora.scale / usual)
        tensors[f"{name}.lora_B.weight"] = b.contiguous()
    save_file(tensors, folder / ADAPTER_FILE)
    write_json(folder / ADAPTER_CONFIG, {"lora_alpha": alpha})
