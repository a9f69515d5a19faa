"""Programs that need transformers as it comes, as forks of one process that has imported it.

Those of `warm` have imported this package, which teaches transformers.
"""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path


class Bare:
    """The process; it ends with the block."""

    def __enter__(self):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, __file__], **pipes)
        return self

    def __exit__(self, *error):
        self.process.stdin.close()
        self.process.wait(timeout=30)

    def run(self, program: str, *arguments: object, scratch: Path) -> subprocess.CompletedProcess:
        """What `subprocess.run` of `python -c PROGRAM ARGUMENTS` would give."""
        argv, files = ["-c", *map(str, arguments)], [scratch / "output", scratch / "errors"]
        asked = json.dumps([program, argv, list(map(str, files))])
        self.process.stdin.write(asked + "\n")
        self.process.stdin.flush()
        status = int(self.process.stdout.readline())
        said = [file.read_text(encoding="utf-8") for file in files]
        return subprocess.CompletedProcess(argv, status, *said)


def become(program: str, argv: list[str], files: list[str]) -> None:
    """In the fork: run the program, and end as Python would."""
    status, sys.argv = 0, argv
    for number, name in enumerate(files, start=1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    try:
        exec(compile(program, "-c", "exec"), {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM, LlamaForCausalLM, Qwen3ForCausalLM  # noqa: F401

    assert "axolotl_loram" not in sys.modules
    for line in sys.stdin:
        child = os.fork()
        if not child:
            become(*json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
