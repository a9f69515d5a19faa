"""Axolotl's command line, imported once: each command is a fork of a process that has it.

Most of the seconds of a short `axolotl train` go into importing torch, transformers and Axolotl.
Here a server imports them, and forks for each command; the child runs the real entry point, with
its own arguments, folder, environment and streams, and ends as the program would. What is read from
the environment on import is as it was when the server began: a command that wants another
environment is run as a whole process (see `conftest.run_command`).
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

MODULES = ("train", "preprocess", "merge_lora", "evaluate", "inference")
COMMANDS = ("train", "preprocess", "merge-lora", "evaluate", "inference")


class Warm:
    """A server, started when the first command asks for it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None

    def run(self, argv: list[str], env: dict, cwd: str, text_input: str | None):
        """Run one command; returns what `subprocess.run` would."""
        if self.process is None or self.process.poll() is not None:
            command = [sys.executable, __file__]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self.process = subprocess.Popen(command, text=True, env=env, **pipes)
            atexit.register(self.process.kill)
        with tempfile.TemporaryDirectory() as folder:
            files = {name: str(Path(folder, name)) for name in ("stdin", "stdout", "stderr")}
            Path(files["stdin"]).write_text(text_input or "", encoding="utf-8")
            asked = {"argv": argv, "env": env, "cwd": cwd, **files}
            self.process.stdin.write(json.dumps(asked) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
            if not answer:
                raise AssertionError(f"the warm process died of {argv}")
            read = {
                name: Path(files[name]).read_text(encoding="utf-8", errors="replace")
                for name in ("stdout", "stderr")
            }
        return subprocess.CompletedProcess(argv, int(answer), **read)


def child(asked: dict) -> int:
    """In the fork: be the program."""
    for number, (name, flags) in enumerate(
        (("stdin", os.O_RDONLY), ("stdout", os.O_WRONLY), ("stderr", os.O_WRONLY))
    ):
        file = os.open(asked[name], flags | os.O_CREAT, 0o600)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    sys.argv = asked["argv"]
    from axolotl.cli.main import main

    try:
        main()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def serve() -> None:
    """Import, then fork for each line of standard input; answer with its exit status."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what imports print is no answer
    from importlib import import_module

    for name in ("axolotl.cli.main", *(f"axolotl.cli.{module}" for module in MODULES)):
        import_module(name)
    libraries = ("peft", "bitsandbytes", "trl", "deepspeed")
    for name in ("axolotl.train", "axolotl.core.builders", *libraries):
        import_module(name)
    for line in sys.stdin:
        asked = json.loads(line)
        number = os.fork()
        if number == 0:
            status = 1
            try:
                status = child(asked)
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(status)
        _, status = os.waitpid(number, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


if __name__ == "__main__":
    serve()
