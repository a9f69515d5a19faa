"""Programs whose imports are there already: each command is a fork of a process that has them.

Most of the seconds of a short `axolotl train` go into importing torch, transformers and Axolotl.
Here multiprocessing's fork server imports them once and forks for each command; the child runs the
real entry point, with its own arguments, folder, environment and streams, and ends as the program
would. Ranks are started by torchrun's own agent, which forks them instead of executing Python.

What libraries read from the environment on import is as it was when the server began: of the
variables of a command, only those that are read later have their effect.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

COMMANDS = {
    "axolotl": ("train", "preprocess", "merge-lora", "evaluate", "inference"),
    "axolotl-loram": ("prune", "anchor", "evaluate"),
    "torchrun": ("--nproc_per_node",),
}
"""Those that import torch whatever they are asked; others are quicker as they are."""

HERE = str(Path(__file__).parent)
FORKS = multiprocessing.get_context("forkserver")


class Started:
    """A command that runs; as much of `subprocess.Popen` as tests need."""

    def __init__(self, argv: list[str], environment: dict, folder: str, streams: list[str]) -> None:
        FORKS.set_forkserver_preload(["imported"])
        self.process = FORKS.Process(target=become, args=(argv, environment, folder, streams))
        paths = os.pathsep.join([HERE, os.environ.get("PYTHONPATH", "")])
        with patch.dict(os.environ, PYTHONPATH=paths):  # for the server, which the first starts
            self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        """Its exit status, if it has ended."""
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise TimeoutError(f"process {self.pid} still runs after {timeout} s")
        return self.process.exitcode


def run_warm(argv: list[str], environment: dict, folder: str, text_input: str | None = None):
    """Run one command; returns what `subprocess.run` would."""
    with tempfile.TemporaryDirectory() as scratch:
        streams = [Path(scratch, name) for name in ("input", "output", "errors")]
        streams[0].write_text(text_input or "", encoding="utf-8")
        started = Started(argv, environment, folder, list(map(str, streams)))
        try:
            status = started.wait()
        finally:
            started.process.kill()  # where the tests are interrupted
        said = [file.read_text(encoding="utf-8", errors="replace") for file in streams[1:]]
    return subprocess.CompletedProcess(argv, status, *said)


def become(argv: list[str], environment: dict, folder: str, streams: list[str]) -> None:
    """In the fork: be the program."""
    os.setsid()
    gc.freeze()  # what was imported need not be looked through (nor its memory copied) again
    multiprocessing.set_start_method("fork", force=True)  # for its own children, as by default
    for number, (name, flags) in enumerate(
        zip(streams, (os.O_RDONLY, *(os.O_WRONLY | os.O_APPEND,) * 2), strict=True)
    ):
        file = os.open(name, flags | os.O_CREAT, 0o600)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    assert "imported" in sys.modules, "the fork server could not import what it should"
    sys.path = [path for path in sys.path if not path.startswith(str(Path(HERE).parent))]
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    add_paths()
    sys.argv, os.execvpe = argv, instead_of(os.execvpe)
    if argv[0].endswith(".py"):
        runpy.run_path(argv[0], run_name="__main__")
        return
    name = Path(argv[0]).name
    if name == "torchrun":
        os.execvpe(name, [name, *argv[1:]], environment)
    elif name == "axolotl":
        from axolotl.cli.main import main
    else:
        from axolotl_loram.cli import run as main

        forget_handlers()
    main()


def forget_handlers() -> None:
    """Axolotl, once imported, logs to standard output: a command of its own has not imported it."""
    for logger in (logging.root, *map(logging.getLogger, logging.root.manager.loggerDict)):
        logger.handlers.clear()
        logger.propagate = True


def add_paths() -> None:
    """What a new Python does with PYTHONPATH."""
    for folder in filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        if folder not in sys.path:
            sys.path.insert(0, folder)
        if Path(folder, "sitecustomize.py").exists():
            runpy.run_path(str(Path(folder, "sitecustomize.py")))


def instead_of(execute: Callable) -> Callable:
    """Axolotl ends by executing torchrun: here its main function, and ranks that are forks."""

    def be(program: str, argv: list[str], environment: dict) -> None:
        if program != "torchrun":
            execute(program, argv, environment)
        from torch.distributed import run

        launch = run.elastic_launch

        def forking(config, entrypoint):
            config.start_method = "fork"
            return launch(config, be_a_rank)

        run.elastic_launch = forking
        run.main(argv[1:])
        sys.exit()

    return be


def be_a_rank(*command: str) -> None:
    """In the fork of an agent: what `python COMMAND` would do, in its own session."""
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    add_paths()
    program, *arguments = [word for word in command if word not in ("-u", "-m")]
    sys.argv = [program, *arguments]
    if "-m" in command:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(program, run_name="__main__")
