"""What breaks with the newest transformers, PEFT and DeepSpeed that install: `make test-newest`.

A second environment in `.venv-newest` sees all packages of `.venv` and has newer ones on top of
them, whatever Axolotl pins. The tests run in it, and newest.md beside this script says what breaks.
It fails nothing: what breaks there is work for later, not a fault of today.

    python benchmarks/newest.py [-- PYTEST'S ARGUMENTS]      # by default all that `make test` runs
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import sysconfig
import time
import venv
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from measure import ROOT

PACKAGES = ("transformers", "peft", "deepspeed")
SUITE = ("-n", "2", "--dist", "worksteal", "-m", "not multinode and not matrix and not real")
"""What `make test` runs."""
FOLDER, PAGE = ROOT / ".venv-newest", Path(__file__).with_suffix(".md")
VERSIONS = "import importlib.metadata as m, sys; print(*(m.version(n) for n in sys.argv[1:]))"


def environment() -> Path:
    """Python of the second environment, with the newest packages."""
    python = FOLDER / "bin/python"
    if not python.exists():
        venv.create(FOLDER, with_pip=True)
        (site,) = FOLDER.glob("lib/python*/site-packages")
        (site / "below.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    subprocess.run([python, "-m", "pip", "install", "-q", "--upgrade", *PACKAGES], check=True)
    for script in Path(sys.executable).parent.iterdir():
        first, _, rest = (script.read_bytes() if script.is_file() else b"").partition(b"\n")
        here = FOLDER / "bin" / script.name
        if first.startswith(b"#!") and b"python" in first and not here.exists():
            here.write_bytes(b"#!" + bytes(python) + b"\n" + rest)  # axolotl, torchrun, ours
            here.chmod(0o755)
    return python


def versions(python: Path | str) -> list[str]:
    """Of the packages, in an environment."""
    command = [python, "-c", VERSIONS, *PACKAGES]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def outcomes(report: Path) -> list[tuple[str, str, str]]:
    """(its file, passed or failed or skipped, first line of why) of each test."""
    found = []
    for case in ElementTree.parse(report).iter("testcase"):
        broken = next(
            (case.find(n) for n in ("failure", "error") if case.find(n) is not None), None
        )
        kind = "failed" if broken is not None else "passed"
        kind = "skipped" if case.find("skipped") is not None else kind
        why = (broken.get("message") or "").splitlines()[:1] if broken is not None else []
        found.append((case.get("classname", "").removeprefix("tests."), kind, "".join(why)))
    return found


def page(said: str, now: list[str], newest: list[str], found: list[tuple[str, str, str]]) -> str:
    """The table of what a command gave, in Markdown."""
    pairs = zip(PACKAGES, now, newest, strict=True)
    lines = ["# With the newest transformers, PEFT and DeepSpeed", ""]
    lines += [f"`{said}`, {time.strftime('%Y-%m-%d')}: {len(found)} tests.", ""]
    lines += ["| package | this project's | newest |", "|---|---|---|"]
    lines += [f"| {name} | {old} | {new} |" for name, old, new in pairs]
    lines += ["", "| tests | passed | failed | skipped |", "|---|---|---|---|"]
    folders = [(file.partition(".")[0], kind) for file, kind, _ in found]
    for folder in sorted({folder for folder, _ in folders}):
        counts = Counter(kind for name, kind in folders if name == folder)
        numbers = (counts[kind] for kind in ("passed", "failed", "skipped"))
        lines.append(f"| {folder} | {' | '.join(map(str, numbers))} |")
    reasons = Counter((file, why[:160].replace("|", "\\|")) for file, kind, why in found if why)
    lines += ["", "| what breaks | in | times |", "|---|---|---|"]
    lines += [f"| `{why}` | {file} | {count} |" for (file, why), count in reasons.most_common()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tests", nargs="*", default=SUITE)
    options = parser.parse_args()
    python, report = environment(), FOLDER / "report.xml"
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    variables["TORCH_EXTENSIONS_DIR"] = str(FOLDER / "extensions")  # DeepSpeed's are of a version
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}"]
    report.unlink(missing_ok=True)
    subprocess.run([*command, *options.tests], cwd=ROOT, env=variables, check=False)
    said = "make test-newest"
    if options.tests != SUITE:
        said = f"python benchmarks/newest.py -- {shlex.join(options.tests)}"
    text = page(said, versions(sys.executable), versions(python), outcomes(report))
    PAGE.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
