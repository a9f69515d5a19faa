"""Keep the figures of the last `make quickstart` as a row of quickstart.csv.

python benchmarks/quickstart.py
"""

from __future__ import annotations

import json
from pathlib import Path

from measure import ROOT, append_row, surroundings


def main() -> None:
    results = json.loads((ROOT / "build/quickstart/results.json").read_text(encoding="utf-8"))
    names = ("base", "lora", "pruned_lora", "recovered", "share")  # the third: of rows before
    row: dict[str, object] = {n: round(results[n], 4) if n in results else "" for n in names}
    row |= {f"{name}_parameters": count for name, count in results["parameters"].items()}
    row |= {f"{name}_seconds": took for name, took in results["adapter_seconds"].items()}
    append_row(Path(__file__).with_suffix(".csv"), {**row, **surroundings()})


if __name__ == "__main__":
    main()
