"""Crashes: operations killed, failing and out of disk at every call that changes a file.

Prune, recover, publish --dry-run and the ends of training and of alignment run on small artefacts.
Each call in turn kills the process, or fails; the disk is full after any number of pages; real
kills come at random moments; two processes write one target. Afterwards the target is the old one
or the complete new one, the message says which, and the same command succeeds and leaves nothing
beside (tests/support/crash.py).

    python benchmarks/crash.py                        # all of it, and a row in crash.csv
    python benchmarks/crash.py --json --faults kill   # a part, as the tests run it
"""

from __future__ import annotations

import argparse
import errno
import functools
import json
import logging
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from measure import ROOT, append_row, surroundings

sys.path.insert(0, str(ROOT / "tests/recovery"))
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT / "tests/support"))
import crash
from crash_scene import Scene

ROWS = Path(__file__).with_suffix(".csv")
FAULTS = ("kill", "ENOSPC", "EIO", "full", "read-only", "random", "pairs")
SLOW = ("prune --sparsity", "publish --dry-run of a model")
MOUNTED = ("full", "read-only")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--faults", nargs="+", choices=FAULTS, default=FAULTS)
    options.add_argument("--quick", action="store_true", help="leave out two slow operations")
    options.add_argument("--step", type=int, default=1, help="every which call, or page, fails")
    options.add_argument("--count", type=int, default=200, help="random kills, and pairs, of each")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--plugin", action="store_true", help="end runs in the plugin's hook")
    options.add_argument("--json", action="store_true", help="print, and add no row")
    given = options.parse_args()
    logging.disable(logging.INFO)
    mounts = not set(MOUNTED) & set(given.faults) or crash.own_mounts()
    ram = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=ram if ram.is_dir() else None) as scratch:
        started = time.perf_counter()
        scene = Scene.make(Path(scratch) / "scene")
        operations = {
            name: operation
            for name, operation in scene.operations(given.plugin).items()
            if not (given.quick and name in SLOW)
        }
        faults = [fault for fault in given.faults if mounts or fault not in MOUNTED]
        counts, failures = campaign(operations, Path(scratch), faults, given)
    seconds = round(time.perf_counter() - started, 1)
    if given.json:
        print(json.dumps({"counts": counts, "failures": failures, "seconds": seconds}))
        return
    print(json.dumps(counts, indent=2), *failures, sep="\n", file=sys.stderr)
    totals = {fault: sum(each.get(fault, 0) for each in counts.values()) for fault in FAULTS}
    row = {"operations": len(counts), **totals, "failures": len(failures), "seconds": seconds}
    append_row(ROWS, {**row, "seed": given.seed, **surroundings()})


def campaign(
    operations: dict[str, crash.Operation],
    scratch: Path,
    faults: list[str],
    given: argparse.Namespace,
) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Operation → fault → how often it struck; and all that was not as it should be."""
    counts: dict[str, dict[str, int]] = {}
    failures: list[str] = []
    for name, operation in operations.items():
        for fault in faults:
            struck, wrong = way(fault, given)(operation, scratch / "place")
            counts.setdefault(name, {})[fault] = struck
            failures += [f"{name}, {fault}: {each}" for each in wrong]
            if not given.json:
                print(f"{name}, {fault}: {struck}, {len(wrong)} wrong", file=sys.stderr)
    return counts, failures


def way(fault: str, given: argparse.Namespace) -> Callable:
    """What lets a fault strike an operation, in a place."""
    chance = random.Random(given.seed)
    return {
        "kill": functools.partial(crash.sweep, step=given.step),
        "ENOSPC": functools.partial(crash.sweep, error=errno.ENOSPC, step=given.step),
        "EIO": functools.partial(crash.sweep, error=errno.EIO, step=given.step),
        "full": functools.partial(crash.full_disk, step=given.step),
        "read-only": crash.read_only,
        "random": functools.partial(crash.at_random, count=given.count, chance=chance),
        "pairs": functools.partial(crash.at_once, count=given.count, chance=chance),
    }[fault]


if __name__ == "__main__":
    main()
