"""The pruned model as GGUF, where llama.cpp can build its layers as narrow as they are.

Where all layers are equally wide, it is an ordinary model to llama.cpp. Where they differ, one of
llama.cpp's architectures that reads widths per layer must compute the same: there is one for Llama.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from axolotl_loram.architecture.config_json import Config, layer_count, layer_fields
from axolotl_loram.architecture.model import tensors
from axolotl_loram.architecture.pairing import check_pruned
from axolotl_loram.architecture.plan import PruningPlan
from axolotl_loram.architecture.spaces import LINEAR
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.atomic import check_vacant, new_folder
from axolotl_loram.files.tensors import Checkpoint, as_floats
from axolotl_loram.results import gguf
from axolotl_loram.results.converter import find_script, run_script
from axolotl_loram.results.llama_cpp import convert_pruned

MODEL_SCRIPT, GGUF_FILE = "convert_hf_to_gguf.py", "model.gguf"
DIFFERING = {"llama": "deci", "mistral": "deci"}
"""Model type → llama.cpp's architecture for it where layers differ."""
EQUAL = (
    *("llama", "mistral", "mixtral", "smollm3", "qwen3", "gemma", "gemma2", "gemma3_text"),
    *("seed_oss", "glm4", "olmoe", "qwen3_moe", "gpt_oss", "gemma3", "qwen3_vl"),
    "qwen2_5_vl",
)
"""Model types that run pruned where all layers are equally wide. The others that are in
`gguf.ARCHITECTURES` were tried too: llama.cpp takes widths for granted that they then have not."""
WIDTHS = {
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "intermediate_size": "feed_forward_length",
}
"""Config field → what llama.cpp calls it."""
OUTTYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


def export_pruned(
    model: Path, output: Path, llama_cpp: Path | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Write a pruned model as GGUF, in its own dtype; arguments as `export`'s.

    Returns:
        "output", "file", "architecture" and "tensors": how many were compared.

    Raises:
        LoRAMError: There is no converter, llama.cpp cannot build the model, or what was written
            is not it.
    """
    plan = PruningPlan.load(model)
    plan.check_runs_alone(model, "export a model that units of every layer were left of")
    script = find_script(MODEL_SCRIPT, llama_cpp)
    check_vacant(output, overwrite)
    check_pruned(model, plan)
    config, stored = plan.pruned_config, Checkpoint(model)
    architecture, _ = gguf.architecture_of(config)
    dtypes = {tensor.dtype for tensor in stored.tensors.values()}
    if len(dtypes) > 1 or not dtypes <= OUTTYPES.keys():
        raise LoRAMError(
            f"expected weights of one of {', '.join(OUTTYPES)} to export, found "
            f"{', '.join(sorted(dtypes))} in {model}: prune without quantize"
        )
    widths = widths_of(config)
    arguments: list[object] = ["--outtype", OUTTYPES[dtypes.pop()], "--outfile"]
    whole = layer_fields(config, None)
    differing = any({whole.get(name)} != set(values) for name, values in widths.items())
    kind = config["model_type"]
    if kind not in (DIFFERING if differing else EQUAL):
        raise LoRAMError(
            f"expected a pruned model that llama.cpp can build, {' or '.join(DIFFERING)}, or "
            f"{', '.join(EQUAL)} with equal layers (--protect-first 0 --protect-last 0), found "
            f"{kind} with {'widths per layer' if differing else 'equal layers'} in {model}: serve "
            "it with transformers"
        )
    with new_folder(output, overwrite) as scratch:
        file = scratch / GGUF_FILE
        if differing:
            architecture = DIFFERING[kind]
            told = json.dumps(widths)
            run_script(Path(convert_pruned.__file__), script, told, *arguments, file, model)
        else:
            run_script(script, *arguments, file, model)
        count = check_model_file(file, stored, config, architecture)
    return {
        "output": str(output),
        "file": str(output / GGUF_FILE),
        "architecture": architecture,
        "tensors": count,
    }


def widths_of(config: Config) -> dict[str, list[int]]:
    """Config field → its value in each layer."""
    layers = [layer_fields(config, layer) for layer in range(layer_count(config))]
    return {name: [fields[name] for fields in layers] for name in WIDTHS if name in layers[0]}


def check_model_file(file: Path, stored: Checkpoint, config: Config, architecture: str) -> int:
    """Hold a GGUF model against the checkpoint: architecture, widths, each linear weight.

    Returns:
        How many weights were compared.

    Raises:
        LoRAMError: The first that differs.
    """
    reader, layers = gguf.read_gguf(file), layer_count(config)
    header = {"general.architecture": architecture, f"{architecture}.block_count": layers}
    for name, wanted in header.items():
        if gguf.field_of(reader, name) != wanted:
            raise gguf.wrong(file, name, wanted, gguf.field_of(reader, name))
    for name, values in widths_of(config).items():
        said = gguf.field_of(reader, f"{architecture}.{WIDTHS[name]}")
        if said is not None and (said if isinstance(said, list) else [said] * layers) != values:
            raise gguf.wrong(file, WIDTHS[name], values, said)
    written = {tensor.name: tensor for tensor in reader.tensors}
    called, order = gguf.names_of(architecture, layers), gguf.architecture_of(config)[1]
    linear = [t for t in tensors(config) if t.role == LINEAR and not t.bias]
    for tensor in linear:
        bits = stored[tensor.name]
        there = called(tensor.module)
        if there is None or there not in written:
            raise gguf.wrong(file, tensor.name, "there", "none")
        right = order(
            as_floats(bits.read(), bits.dtype), tensor.module, layer_fields(config, tensor.layer)
        )
        if not np.array_equal(gguf.values_of(written[there]), right):
            raise gguf.wrong(file, there, f"{tensor.name} of {stored.folder}", "other weights")
    return len(linear)
