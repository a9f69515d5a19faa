"""What each way to train costs in floating-point operations, all told, against LoRA on the base.

Counted from the declared shapes, not measured: `axolotl-loram plan --compare` has the training and
what `anchor: base` computes of the original first; scoring and refitting by `activation` are the
128 x 512 tokens of the default, once through the original and once through the refitted model, and
a brief alignment as much again as its tokens take through both models and backward.

    python benchmarks/equal_compute.py [CONFIG…]
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from measure import ROOT

ROWS = Path(__file__).with_suffix(".csv")
CONFIGS = [ROOT / f"docs/configs/llama-3.1-{size}.json" for size in ("8b", "70b")]
TOKENS = 10_000_000
CALIBRATED = 2 * 128 * 512
ALIGNED = 80 * 4 * 512
EPOCHS = (1, 3)


def plan(config: Path, ratio: float, loram: dict[str, Any], epochs: int) -> dict[str, Any]:
    """The way of LoRAM, and LoRA's, as the planner has them."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.yml"
        settings = {
            "base_model": str(config),
            "plugins": ["axolotl_loram.LoRAMPlugin"],
            "adapter": "lora",
            "lora_r": 8,
            "lora_alpha": 16,
            "lora_target_linear": True,
            "sequence_len": 2048,
            "micro_batch_size": 1,
            "gradient_checkpointing": True,
            "num_epochs": epochs,
            "bf16": True,
            "loram": {"pruning": {"ratio": ratio, **loram.pop("pruning", {})}, **loram},
        }
        file.write_text(yaml.safe_dump(settings), encoding="utf-8")
        command = [str(Path(sys.executable).with_name("axolotl-loram")), "plan", str(file)]
        command += ["--compare", "--json", "--tokens", str(TOKENS)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def rows_of(config: Path) -> list[dict[str, Any]]:
    """For each way, ratio and number of epochs: operations over LoRA's."""
    found = []
    for ratio in (0.5, 0.75, 0.85):
        for epochs in EPOCHS:
            for name, loram in (
                ("pruned", {}),
                ("pruned, anchored", {"anchor": "base"}),
                ("upper layers", {"anchor": "base", "pruning": {"units": "layers"}}),
            ):
                planned = plan(config, ratio, dict(loram), epochs)
                lora, way = (
                    next(w for w in planned["ways"] if w["name"].startswith(start))
                    for start in ("LoRA", "LoRAM")
                )
                trained = planned["data"]["trained"]
                whole = lora["flops"]["layers"] + lora["flops"]["head"]
                part = way["flops"]["layers"] + way["flops"]["head"]
                before = planned.get("anchor", {}).get("flops", 0)
                if "units" not in loram.get("pruning", {}):
                    before += CALIBRATED * whole
                aligned = ALIGNED * (whole + 3 * part)
                yardstick = lora["flops_per_token"] * trained
                total = way["flops_per_token"] * trained + before
                found.append(
                    {
                        "model": config.parent.name
                        if config.name == "config.json"
                        else config.stem,
                        "ratio": ratio,
                        "way": name,
                        "epochs": epochs,
                        "tokens": planned["data"]["once"],
                        "lora_flops": f"{yardstick:.4g}",
                        "training": round(way["flops_per_token"] * trained / yardstick, 4),
                        "before": round(before / yardstick, 4),
                        "total": round(total / yardstick, 4),
                        "brief_alignment": ""
                        if name == "upper layers"
                        else round(aligned / yardstick, 4),
                    }
                )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", type=Path, nargs="*", default=CONFIGS)
    rows = [row for config in parser.parse_args().configs for row in rows_of(config)]
    with ROWS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
