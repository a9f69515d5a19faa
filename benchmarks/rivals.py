"""What else makes a frozen model small: fewer bits, lower rank, fewer layers. Simulated by weights.

Low rank is the best approximation of each weight on what the layer reads (SVD after whitening, as
EMLoC and SVD-LLM have it), bits are groups of 64 inputs rounded by GPTQ. Both write a checkpoint of
the base's shapes, so an adapter that was trained on it is one for the base as it is. The fewer
layers are those that change their hidden states most (ShortGPT's block influence).
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import load_file, save_file
from torch import nn

from axolotl_loram.pruning.rounding import round_to_nf4

GROUP = 64
DAMPING = 0.01
CLIPPED = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Shares of a group's range that the grid may span; the one of least error is taken."""
WINDOWS, LENGTH = 32, 256
Change = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(weight (out, in), Σ x xᵀ of its inputs (in, in)) → another weight (out, in)."""


def rounded(bits: int | str) -> Change:
    """Rounding to so many bits.

    4 is NF4 of blocks of 64, as bitsandbytes has it, "4-fitted" as the package rounds to it where
    text is at hand; the rest is GPTQ.
    """
    if bits == 4:
        return nf4
    if bits == "4-fitted":
        return lambda weight, gram: nf4(round_to_nf4(weight.float(), gram), gram)
    return lambda weight, gram: gptq(weight, gram, int(bits))


def nf4(weight: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """What QLoRA multiplies by."""
    packed, state = quantize_4bit(
        weight.bfloat16().contiguous(), quant_type="nf4", blocksize=64, compress_statistics=True
    )
    return dequantize_4bit(packed, state).to(weight.dtype)


def gptq(weight: torch.Tensor, gram: torch.Tensor, bits: int) -> torch.Tensor:
    """GPTQ (arXiv 2210.17323), column by column, with a scale and a zero for each group."""
    weight, size = weight.float().clone(), weight.shape[1]
    unseen = gram.diagonal() == 0
    gram = gram.float() + torch.diag(unseen + DAMPING * gram.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True)
    result = torch.empty_like(weight)
    for j in range(size):
        if j % GROUP == 0:
            scale, zero = grid(weight[:, j : j + GROUP], bits)
        column = weight[:, j]
        result[:, j] = ((column / scale).round() + zero).clamp(0, 2**bits - 1).sub(zero) * scale
        error = (column - result[:, j]) / upper[j, j]
        weight[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
    return result


def grid(group: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero of each row."""
    best, found = torch.full((len(group),), torch.inf), None
    for share in CLIPPED:
        low, high = (group.aminmax(dim=1).__getitem__(i) * share for i in (0, 1))
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = ((high - low) / (2**bits - 1)).clamp_min(1e-8)
        zero = (-low / scale).round()
        steps = ((group / scale[:, None]).round() + zero[:, None]).clamp(0, 2**bits - 1)
        error = ((steps - zero[:, None]) * scale[:, None] - group).square().sum(1)
        better = error < best
        found = (
            (scale, zero)
            if found is None
            else (torch.where(better, scale, found[0]), torch.where(better, zero, found[1]))
        )
        best = torch.minimum(best, error)
    return found


def low_rank(share: float) -> Change:
    """So much of the parameters, as two factors."""

    def change(weight: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
        out, size = weight.shape
        rank = round(share * out * size / (out + size))
        gram = gram.double() + torch.diag(1e-6 * gram.diagonal().mean() + 0 * gram.diagonal())
        root = torch.linalg.cholesky(gram)
        left, values, right = torch.linalg.svd(weight.double() @ root, full_matrices=False)
        best = left[:, :rank] * values[:rank] @ right[:rank]
        return torch.linalg.solve_triangular(root, best, upper=False, left=False).to(weight.dtype)

    return change


def shares(base: Path, pruned: Path) -> dict[int, float]:
    """Of each layer's linear parameters, what a pruned checkpoint has left."""
    sizes: list[dict[int, int]] = [{}, {}]
    for folder, found in zip((base, pruned), sizes, strict=True):
        for name, weight in load_file(folder / "model.safetensors").items():
            layer = re.search(r"layers\.(\d+)\..*_proj\.weight", name)
            if layer:
                found[int(layer[1])] = found.get(int(layer[1]), 0) + weight.numel()
    return {layer: sizes[1][layer] / whole for layer, whole in sorted(sizes[0].items())}


@torch.no_grad()
def changed(
    start: Path, target: Path, model: Any, ids: torch.Tensor, changes: dict[int, Change]
) -> None:
    """Write a checkpoint with changed linear weights; each layer sees what those before it give.

    Args:
        start: The checkpoint's folder.
        target: Of the new one.
        model: Its model, in float32; changed too.
        ids: Calibration tokens (windows, length).
        changes: Of each layer that changes.
    """
    for index, (layer, inputs) in enumerate(walk(model, ids)):
        if index in changes:
            grams = gathered(linears(layer), inputs)
            for name, linear in linears(layer).items():
                linear.weight.copy_(changes[index](linear.weight, grams[name]).bfloat16())
            print(f"{target.name}: layer {index}", flush=True)
    rewritten(start, target, model.state_dict())


def linears(layer: nn.Module) -> dict[str, nn.Linear]:
    """The linear modules of a layer, by name."""
    return {name: m for name, m in layer.named_modules() if isinstance(m, nn.Linear)}


def walk(model: Any, ids: torch.Tensor) -> Iterator[tuple[nn.Module, Callable[[], None]]]:
    """Each decoder layer, and what runs it on the calibration text.

    After a layer is dealt with, its own outputs are what the next is run on.
    """
    layers, seen = model.base_model.layers, []

    class Stop(Exception):
        pass

    def keep(layer: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append((args[0], kwargs))
        raise Stop

    handle = layers[0].register_forward_pre_hook(keep, with_kwargs=True)
    for row in ids:
        with contextlib.suppress(Stop):
            model(input_ids=row[None], use_cache=False)
    handle.remove()
    states = [state for state, _ in seen]
    for layer in layers:
        run = partial(ran, layer, states, [rest for _, rest in seen])
        yield layer, run
        states = run()


def ran(layer: nn.Module, states: list[torch.Tensor], settings: list[dict]) -> list[torch.Tensor]:
    """What a layer gives for each window's hidden states."""
    found = [layer(x, **rest) for x, rest in zip(states, settings, strict=True)]
    return [x[0] if isinstance(x, tuple) else x for x in found]


def gathered(modules: dict[str, nn.Linear], run: Callable[[], Any]) -> dict[str, torch.Tensor]:
    """Σ x xᵀ of what each reads."""
    grams = {name: torch.zeros(m.in_features, m.in_features) for name, m in modules.items()}

    def add(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            x = args[0].flatten(0, -2).float()
            grams[name] += x.T @ x

        return hook

    handles = [m.register_forward_pre_hook(add(name)) for name, m in modules.items()]
    run()
    for handle in handles:
        handle.remove()
    return grams


@torch.no_grad()
def fewer_layers(base: Path, target: Path, model: Any, ids: torch.Tensor, parts: dict) -> None:
    """Write a checkpoint without the layers of least influence among those with a share below 1.

    As many go as make up for the shares. `layers.json` says which stay.
    """
    scores, free = {}, [layer for layer, share in parts.items() if share < 1]
    before: list[torch.Tensor] = []
    for index, (_, run) in enumerate(walk(model, ids)):
        after = run()
        if before:
            pairs = zip(before, after, strict=True)
            alike = [nn.functional.cosine_similarity(x, y, dim=-1).mean() for x, y in pairs]
            scores[index] = 1 - torch.stack(alike).mean().item()
        before = after
    count = round(sum(1 - parts[layer] for layer in free))
    gone = set(sorted(free, key=lambda layer: scores[layer])[:count])
    stay = [layer for layer in sorted(parts) if layer not in gone]
    partial = target.with_name(f"{target.name}-partial")
    shutil.copytree(base, partial, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] = len(stay)
    if "layer_types" in config:
        config["layer_types"] = [config["layer_types"][layer] for layer in stay]
    (partial / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (partial / "layers.json").write_text(json.dumps(stay), encoding="utf-8")
    weights = load_file(base / "model.safetensors")
    save_file(
        renumbered(weights, {old: new for new, old in enumerate(stay)}),
        partial / "model.safetensors",
        {"format": "pt"},
    )
    partial.rename(target)


def renumbered(tensors: dict[str, torch.Tensor], numbers: dict[int, int]) -> dict:
    """Tensors under other layer numbers; those of other layers are left out."""
    found = {}
    for name, tensor in tensors.items():
        layer = re.search(r"(?<=layers\.)\d+", name)
        if layer is None:
            found[name] = tensor
        elif int(layer[0]) in numbers:
            found[name[: layer.start()] + str(numbers[int(layer[0])]) + name[layer.end() :]] = (
                tensor
            )
    return found


def restored(adapter: Path, model: Path) -> Path:
    """The adapter for the base: as it is, or its layers under their old numbers."""
    file = model / "layers.json"
    if not file.exists():
        return adapter
    target = adapter.with_name(f"{adapter.name}-recovered")
    shutil.copytree(adapter, target, dirs_exist_ok=True)
    stay = json.loads(file.read_text(encoding="utf-8"))
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(renumbered(weights, dict(enumerate(stay))), target / "adapter_model.safetensors")
    return target


def rewritten(start: Path, target: Path, found: dict[str, torch.Tensor]) -> None:
    """Write a checkpoint like another one, with other weights, in bfloat16."""
    partial = target.with_name(f"{target.name}-partial")
    shutil.copytree(start, partial)
    stored = load_file(start / "model.safetensors")
    weights = {name: found[name].bfloat16().contiguous() for name in stored}
    save_file(weights, partial / "model.safetensors", {"format": "pt"})
    partial.rename(target)
