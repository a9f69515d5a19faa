"""What confining LoRA's update to a sparse layer's weights costs, against plain LoRA.

One linear layer under PEFT, float32, on one thread of a CPU: seconds of processor time, forward and
backward, minimum over runs; arithmetic as PyTorch counts it.

    python benchmarks/masked.py [--csv]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from measure import append_row, surroundings
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from axolotl_loram.models.masked import MaskedLora, pack

TOKENS, RANK, RUNS = 2048, 16, 7
SHAPES = ((1024, 4096), (4096, 1024))


def fastest(action) -> float:
    """Least processor seconds of one call."""
    seconds = []
    for _ in range(RUNS):
        start = time.process_time()
        action()
        seconds.append(time.process_time() - start)
    return min(seconds)


def measure(outputs: int, inputs: int) -> dict[str, object]:
    """One row: plain LoRA, masked by the layer's own zeros, masked by packed bits."""
    net, mask = nn.Sequential(nn.Linear(inputs, outputs, bias=False)), torch.rand(outputs, inputs)
    net[0].weight.data *= mask < 0.5
    settings = LoraConfig(r=RANK, target_modules=["0"])
    layer = get_peft_model(net, settings).base_model.model[0]
    layer.lora_B["default"].weight.data.normal_()
    x, gradient = torch.randn(TOKENS, inputs, requires_grad=True), torch.randn(TOKENS, outputs)
    row: dict[str, object] = {"outputs": outputs, "inputs": inputs, "tokens": TOKENS, "rank": RANK}
    masks = {"own_zeros": MaskedLora(None), "packed_bits": MaskedLora(pack((mask < 0.5).numpy()))}
    for name, variant in {"plain": None, **masks}.items():
        layer.lora_variant.clear()
        if variant is not None:
            layer.lora_variant["default"] = variant

        def step() -> None:
            layer(x).backward(gradient)

        with FlopCounterMode(display=False) as counter:
            step()
        row[f"{name}_gflop"] = round(counter.get_total_flops() / 1e9, 2)
        row[f"{name}_seconds"] = round(fastest(step), 3)
    row["ratio"] = round(row["own_zeros_seconds"] / row["plain_seconds"], 2)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", action="store_true", help="add rows to masked.csv")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for shape in SHAPES:
        row = measure(*shape)
        print("\n".join(f"{name:20} {value}" for name, value in row.items()), end="\n\n")
        if options.csv:
            append_row(Path(__file__).with_suffix(".csv"), {**row, **surroundings()})


if __name__ == "__main__":
    main()
