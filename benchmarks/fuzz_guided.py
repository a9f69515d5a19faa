"""What strangers write, changed towards code that no change has reached yet (atheris).

The parsers that are Python alone: JSON, YAML, plans, records, configs, indices of shards,
tokenizers. An input passes if it is read or refused in one sentence (LoRAMError).
atheris is no dependency of this package: put it into an environment of its own.

    python benchmarks/fuzz_guided.py -max_total_time=600           # starts from whole artefacts
    python benchmarks/fuzz_guided.py FOLDER -max_total_time=600    # goes on from a corpus
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from pathlib import Path

import atheris

sys.path[:0] = [
    str(Path(__file__).resolve().parent.parent / name)
    for name in (".", "tests/support", "tests", "tests/recovery")
]

with atheris.instrument_imports(include=["axolotl_loram"]):
    import hostile

    from axolotl_loram.errors import LONGEST, LoRAMError

READERS = ("base config", "base index", "plan", "record", "tokenizer", "plan of a YAML")
READERS += ("DeepSpeed config", "report", "adapter config", "adapter names")


def main() -> None:
    logging.disable(logging.WARNING)
    ram = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=ram if ram.is_dir() else None) as scratch:
        folder = Path(scratch)
        whole = hostile.Artefacts.make(folder / "whole", "llama")
        suspects = [
            hostile.Suspect(hostile.DOORS[name], whole, folder / str(number) / "suspect")
            for number, name in enumerate(READERS)
        ]
        corpus = folder / "corpus"
        corpus.mkdir()
        places = [(suspect, file) for suspect in suspects for file in suspect.files]
        for number, (_, file) in enumerate(places):
            (corpus / str(number)).write_bytes(bytes([number]) + file.read_bytes())

        def one_input(data: bytes) -> None:
            if data:
                suspect, file = places[data[0] % len(places)]
                enter(suspect, file, data[1:])

        child = os.fork()  # atheris ends its process without clearing up
        if not child:
            options = [str(corpus), "-max_len=65536", "-rss_limit_mb=2048"]
            atheris.Setup([*sys.argv, *options], one_input)
            atheris.Fuzz()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    sys.exit(code)


def enter(suspect: hostile.Suspect, file: Path, data: bytes) -> None:
    """Put bytes in a file's place, and go in; anything but a LoRAMError is a finding."""
    before = file.read_bytes()
    file.write_bytes(data)
    try:
        suspect.door.enter(suspect.whole, suspect.folder)
    except LoRAMError as error:
        assert len(str(error)) < LONGEST and "\n" not in str(error), str(error)
    finally:
        file.write_bytes(before)


if __name__ == "__main__":
    main()
