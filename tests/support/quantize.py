"""Pico checkpoints as large models are published: gpt-oss in MXFP4, others in FP8 with scales."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

OUTSIDE = ("embed_tokens", "lm_head", "norm", "mlp.gate.", "router", "shared_expert_gate")


def _write(folder: Path, tensors: dict, config: dict, parts: int = 2) -> Path:
    """Save tensors in shards, weights and their scales in different ones where it so happens."""
    names = sorted(tensors)
    step, weight_map = -(-len(names) // parts), {}
    for first in range(0, len(names), step):
        file = f"model-{first // step + 1:05}-of-{parts:05}.safetensors"
        held = {name: tensors[name].contiguous() for name in names[first : first + step]}
        save_file(held, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def to_mxfp4(folder: Path) -> Path:
    """Make the experts of a saved gpt-oss MXFP4: other numbers, of about the same size."""
    torch.manual_seed(0)
    tensors = load_file(folder / "model.safetensors")
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inputs, outputs = tensor.shape
            shape = (experts, outputs, inputs // 32)
            found[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
            found[f"{name}_scales"] = torch.randint(122, 126, shape, dtype=torch.uint8)
        else:
            found[name] = tensor.bfloat16()
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens"]
    format = {"quant_method": "mxfp4", "modules_to_not_convert": [*skipped, "lm_head"]}
    config = json.loads((folder / "config.json").read_text())
    return _write(folder, found, {**config, "dtype": "bfloat16", "quantization_config": format})


def to_fp8(folder: Path, block: tuple[int, int] | None = (8, 8)) -> Path:
    """Make the linear weights of a saved model FP8, with a scale for each block, or one for all."""
    tensors = load_file(folder / "model.safetensors")
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 1 or any(part in name for part in OUTSIDE):
            found[name] = tensor.bfloat16() if tensor.is_floating_point() else tensor
            continue
        high, wide = block or tensor.shape
        blocks = tensor.float().unflatten(1, (-1, wide)).unflatten(0, (-1, high))
        scale = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
        packed = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn).view(tensor.shape)
        found[name], found[f"{name}_scale_inv"] = packed, scale if block else scale[0, 0]
        if not block:
            found[name.replace("weight", "activation_scale")] = torch.tensor(1.0)
    format = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
    format |= {"weight_block_size": block and list(block), "modules_to_not_convert": ["lm_head"]}
    config = json.loads((folder / "config.json").read_text())
    return _write(folder, found, {**config, "dtype": "bfloat16", "quantization_config": format})
