"""Artefacts of strangers, mutated at random: whatever is in them, they open or are refused.

Each door (what reads a base, a pruned model, a plan, a record, an adapter) meets mutations of
whole files: JSON with values replaced, removed or swapped, headers that claim other sizes, flipped
and cut bytes, links out of the folder. A case passes if the door opens, or refuses in one sentence
(LoRAMError), in time, and nothing was written beside the result.

    python benchmarks/fuzz.py                     # 30,000 cases for each door and model: a million
    python benchmarks/fuzz.py --cases 100 --json  # what the tests run

Every thousand seeds add a row to fuzz.csv. Interrupted, or run again, it goes on with the seeds
after those that the rows have: what they sum to is what was tried.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import re
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

from measure import ROOT, append_row, surroundings
from tqdm import tqdm

sys.path.insert(0, str(ROOT / "tests/recovery"))
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT / "tests/support"))
import hostile

from axolotl_loram.errors import LONGEST, LoRAMError

ROWS = Path(__file__).with_suffix(".csv")
SLOW = 5.0
"""Seconds that no case may take."""


BLOCK = 1_000
"""Seeds of one row."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--cases", type=int, default=30_000, help="for each door and model")
    options.add_argument("--seed", type=int, help="the first; by default, after all in fuzz.csv")
    options.add_argument("--doors", default="", help="only those with this in their names")
    options.add_argument("--json", action="store_true", help="print, and add no row")
    given = options.parse_args()
    logging.disable(logging.WARNING)
    first = tried(given.doors) if given.seed is None else given.seed
    last = first + given.cases
    for start in range(first, last, BLOCK):
        result = block(range(start, min(start + BLOCK, last)), given.doors)
        if given.json:
            print(json.dumps(result))
        else:
            print(*result["failures"], sep="\n", file=sys.stderr)
            append_row(ROWS, {**result, "failures": len(result["failures"]), **surroundings()})


def tried(doors: str) -> int:
    """The seed after the last one in the rows of these doors."""
    if not ROWS.exists():
        return 0
    with ROWS.open(newline="", encoding="utf-8") as handle:
        mine = [row for row in csv.DictReader(handle) if row["doors"] == (doors or "all")]
    return max((int(row["first_seed"]) + int(row["seeds"]) for row in mine), default=0)


def block(seeds: range, doors: str) -> dict:
    """Some seeds at all doors that have `doors` in their names."""
    ram = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=ram if ram.is_dir() else None) as scratch:
        chosen = {name: door for name, door in hostile.DOORS.items() if doors in name}
        return {
            "first_seed": seeds.start,
            "seeds": len(seeds),
            "doors": doors or "all",
            **campaign(Path(scratch), seeds, chosen),
        }


def campaign(scratch: Path, seeds: range, doors: dict[str, hostile.Door]) -> dict:
    """Counts of outcomes over all doors and models, the slowest case and the peak memory."""
    outcomes: Counter[str] = Counter()
    failures: dict[str, str] = {}
    slowest, start, idle = 0.0, time.perf_counter(), 0
    for model_type in hostile.CONFIGS:
        whole = hostile.Artefacts.make(scratch / model_type, model_type)
        idle = idle or resident("VmRSS")  # now that torch is imported
        for number, (name, door) in enumerate(doors.items()):
            around = scratch / f"{model_type}-{number}"
            suspect = hostile.Suspect(door, whole, around / "suspect")
            where = f"{model_type}, {name}"
            for seed in tqdm(seeds, where, disable=None, leave=False):
                began = time.perf_counter()
                outcome = attempt(suspect, seed)
                took = time.perf_counter() - began
                if took > SLOW:
                    outcome = f"took more than {SLOW} s"
                if {file.name for file in around.iterdir()} - {"suspect", "recovered"}:
                    outcome = "left something beside"
                if outcome not in ("opened", "refused"):
                    failures.setdefault(f"{where}: {outcome}", f"{where}, seed {seed}: {outcome}")
                    outcome = "failed"
                outcomes[outcome] += 1
                slowest = max(slowest, took)
    return {
        "cases": outcomes.total(),
        **{name: outcomes[name] for name in ("opened", "refused", "failed")},
        "slowest_seconds": round(slowest, 3),
        "idle_bytes": idle,
        "peak_bytes": resident("VmHWM"),
        "seconds": round(time.perf_counter() - start, 1),
        "failures": list(failures.values()),
    }


def attempt(suspect: hostile.Suspect, seed: int) -> str:
    """What came of one case."""
    try:
        suspect.attempt(seed)
    except LoRAMError as error:
        return "refused" if len(str(error)) < LONGEST and "\n" not in str(error) else "talked long"
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "axolotl_loram" in frame.filename] or frames
        return f"{type(error).__name__} in {Path(ours[-1].filename).name}:{ours[-1].lineno}"
    return "opened"


def resident(what: str) -> int:
    """Bytes of this process alone: ru_maxrss would count who started it, before the exec."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(rf"{what}:\s*(\d+)", status)[1]) * 1024


if __name__ == "__main__":
    main()
