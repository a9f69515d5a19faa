"""Tasks through lm-eval: which there are, what the paper runs, and their scores on one model."""

from __future__ import annotations

import difflib
import functools
import hashlib
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from axolotl_loram.architecture.lora_names import ADAPTER_CONFIG
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.find import user_path
from axolotl_loram.files.untrusted import read_json
from axolotl_loram.results.candidates import Candidate
from axolotl_loram.results.perplexity import fitting
from axolotl_loram.text.axolotl_text import one_line

FOLDER = Path(__file__).parent / "lm_eval"
OWN = {file.stem: file for file in sorted(FOLDER.glob("*.yaml"))}
"""Tasks that lm-eval 0.4.11 lacks, or cannot load with datasets 4."""
COMMON_SENSE = ("arc_challenge", "arc_easy", "hellaswag", "openbookqa", "piqa", "winogrande")
SUITES: Mapping[str, Mapping[str, int]] = {
    "paper": {
        "mathqa": 1,
        "gsm8k_cot": 8,
        **dict.fromkeys(COMMON_SENSE, 1),
        "humaneval": 0,
        "humaneval_pass10": 0,
    }
}
"""Task → examples shown before each question , as in arXiv 2502.13533."""
METRICS = {"gsm8k_cot": "exact_match,strict-match"}
"""The metric that counts, where it is not the task's first."""


@dataclass(frozen=True)
class Task:
    """One task to run.

    Attributes:
        shots: Examples shown before each question; None for the task's own number.
        file: The YAML that declares it; None for lm-eval's groups and classes.
    """

    name: str
    shots: int | None = None
    file: Path | None = None

    def identity(self) -> dict[str, Any]:
        """What decides its scores, beside the model; of a file, also the data files it names."""
        found: dict[str, Any] = {
            "task": self.name,
            "shots": self.shots,
            "lm_eval": version("lm_eval"),
        }
        if self.file is not None:
            files = [self.file, *_data_files(self.file)]
            found["files"] = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
        return found


def _data_files(file: Path) -> list[Path]:
    named = (_declaration(file).get("dataset_kwargs") or {}).get("data_files") or {}
    listed = list(named.values()) if isinstance(named, Mapping) else [named]
    flat = [part for parts in listed for part in ([parts] if isinstance(parts, str) else parts)]
    return sorted(path for path in map(Path, flat) if path.is_file())


def _declaration(file: Path) -> dict[str, Any]:
    from lm_eval.utils import load_yaml_config

    try:
        found = load_yaml_config(str(file), mode="simple")
    except Exception as error:  # OSError, YAML's own, and what `include` leads to
        raise LoRAMError(
            f"expected a task YAML of lm-eval, found {file} unreadable ({one_line(error)}): check "
            "the file"
        ) from error
    return found if isinstance(found, dict) else {}


def resolve_tasks(
    names: Sequence[str], suite: str | None = None, allow_code: bool = False
) -> list[Task]:
    """The tasks that a user names.

    Args:
        names: lm-eval's tasks, groups and tags, or YAML files; ":5" after one shows 5 examples.
        suite: One of SUITES, in front of them.
        allow_code: Whether tasks may run the programs that the model writes.

    Raises:
        LoRAMError: No such task or file, or it would run programs and may not.
    """
    asked = [Task(name, shots) for name, shots in SUITES.get(suite or "", {}).items()]
    asked += [_parse(name) for name in names]
    with _quiet():
        known = _known([task.name for task in asked if task.file is None])
        asked = [replace(task, file=task.file or known[task.name]) for task in asked]
        files = {task.name: task.file for task in asked if task.file}
        unsafe = [name for name, file in files.items() if _declaration(file).get("unsafe_code")]
    if unsafe and not allow_code:
        raise LoRAMError(
            f"expected --allow-code-execution for {', '.join(unsafe)}, found none: these tasks run "
            "the programs that the model writes, so allow it in a sandbox, or leave them out"
        )
    return asked


def _parse(name: str) -> Task:
    named, _, shots = name.rpartition(":")
    if not named or not shots.isdecimal():
        named, shots = name, ""
    count = int(shots) if shots else None
    if not named.endswith((".yaml", ".yml")):
        return Task(named, count)
    file = user_path(named)
    task = _declaration(file).get("task")
    if not isinstance(task, str):
        raise LoRAMError(
            f"expected a task YAML of lm-eval with `task: NAME` in {file}, found none: name a file "
            "that declares one task"
        )
    return Task(task, count, file)


def _known(names: Sequence[str]) -> dict[str, Path | None]:
    """Task → the file of ours or of lm-eval that declares it; None for groups and classes.

    Looks for the line that names the task: lm-eval's own index parses ten thousand files, so it is
    made only where that finds nothing.
    """
    found: dict[str, Path | None] = {name: OWN[name] for name in names if name in OWN}
    theirs = "|".join(re.escape(name) for name in names if name not in OWN)
    if not theirs:
        return found
    import lm_eval.tasks

    wanted = re.compile(rf"^task: *['\"]?({theirs})['\"]? *$", re.MULTILINE)
    for file in sorted(Path(lm_eval.tasks.__file__).parent.rglob("*.yaml")):
        named = wanted.search(file.read_text(encoding="utf-8"))
        if named and "class" not in _declaration(file):
            found.setdefault(named[1], file)
    for name in set(names) - found.keys():
        index = _manager().task_index
        if name not in index:
            near = difflib.get_close_matches(name, [*index, *OWN], n=3)
            meant = f"did you mean {', '.join(near)}?" if near else "see `lm-eval ls tasks`"
            raise LoRAMError(f"expected a task of lm-eval, found {name!r}: {meant}")
        found[name] = None
    return found


@functools.cache
def _manager() -> Any:
    """lm-eval's index of its tasks."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _manager_for(task: Task) -> Any:
    """An index that has the task."""
    if task.file is None:
        return _manager()
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False)
    manager.task_index[task.name] = {"type": "task", "yaml_path": str(task.file)}
    return manager


def check_backend(backend: str) -> None:
    """Refuse vLLM where it is not installed."""
    if backend == "vllm" and find_spec("vllm") is None:
        raise LoRAMError(
            "expected vLLM for --backend vllm, found it not installed: install it beside, or leave "
            "the backend out"
        )


def score(
    task: Task,
    candidate: Candidate,
    model: Any,
    tokenizer: Any,
    batch_size: int,
    limit: int | None,
    seed: int,
    allow_code: bool = False,
) -> tuple[dict[str, Any], int]:
    """Run a task.

    Args:
        task: The task, or a group of them.
        candidate: What is evaluated.
        model: It, in memory; None to have vLLM load it.
        tokenizer: Its tokenizer.
        batch_size: To start with; halved where memory does not suffice.
        limit: Only the task's first so many questions.
        seed: Of the examples shown and of sampling.
        allow_code: Whether programs that the model writes may be run.

    Returns:
        Name of each task in it → metric, value, standard_error, num_fewshot, samples, metrics
        (all), per_sample (of the metric, in the data's order); and the batch size used.

    Raises:
        LoRAMError: lm-eval cannot run it, such as for want of its data.
    """
    with _quiet():
        if allow_code:
            os.environ["HF_ALLOW_CODE_EVAL"] = "1"
        from lm_eval import simple_evaluate

        def run(size: int) -> Any:
            return simple_evaluate(
                **_language_model(candidate, model, tokenizer, size, seed),
                tasks=[_loaded(task)],
                task_manager=_manager_for(task),
                num_fewshot=task.shots,
                limit=limit,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
                confirm_run_unsafe_code=allow_code,
            )

        try:
            results, size = fitting(batch_size, run)
        except Exception as error:  # of datasets, of the hub, of the task's own code
            raise LoRAMError(
                f"expected lm-eval to run {task.name}, found it failing "
                f"({type(error).__name__}: {one_line(error)}): check the task and its data"
            ) from error
    return {name: _summary(name, results) for name in results["results"]}, size


def _loaded(task: Task) -> Any:
    """What `simple_evaluate` takes for a task: its name, or the task itself from its file."""
    if task.file is None:
        return task.name
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.utils import load_yaml_config

    config = load_yaml_config(str(task.file), mode="full")
    return ConfigurableTask(config={"metadata": {}, **config})


def _language_model(
    candidate: Candidate, model: Any, tokenizer: Any, batch_size: int, seed: int
) -> dict[str, Any]:
    if model is not None:
        return {"model": wrap(model, tokenizer, batch_size)}
    arguments = {"pretrained": candidate.model, "revision": candidate.revision, "seed": seed}
    if candidate.adapter is not None:
        arguments["lora_local_path"] = str(candidate.adapter)
        rank = int(read_json(candidate.adapter / ADAPTER_CONFIG)["r"])
        arguments["max_lora_rank"] = max(16, 1 << (rank - 1).bit_length())
    return {"model": "vllm", "model_args": arguments, "batch_size": "auto"}


def wrap(model: Any, tokenizer: Any, batch_size: int) -> Any:
    """A model in memory as lm-eval takes it."""
    from lm_eval.models.huggingface import HFLM

    from axolotl_loram.models.patches import tied_as_it_is

    with tied_as_it_is(model):
        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def _summary(name: str, results: Mapping[str, Any]) -> dict[str, Any]:
    found = results["results"][name]
    metrics = {
        key: value
        for key, value in found.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    }
    metric = METRICS.get(name, next(iter(metrics), ""))
    bare, _, filtered = metric.partition(",")
    error = found.get(f"{bare}_stderr,{filtered}")
    samples = [s for s in results.get("samples", {}).get(name, []) if s["filter"] == filtered]
    scores = [s[bare] for s in sorted(samples, key=lambda s: s["doc_id"]) if bare in s]
    return {
        "metric": metric,
        "value": metrics.get(metric),
        "standard_error": error if isinstance(error, int | float) else None,
        "num_fewshot": results["n-shot"].get(name),
        "samples": len(samples),
        "metrics": metrics,
        "per_sample": [float(s) for s in scores if isinstance(s, int | float)],
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval off standard output, and its notes of every step out of the log."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        log.setLevel(level)
