"""Did LoRAM work? Perplexities and task scores of what a run made, as one JSON file.

Each result is kept as soon as it is there, under what it is a result of, in a hidden folder beside
the JSON: the same command, or one that asks for more, goes on from there.
"""

from __future__ import annotations

import gc
import hashlib
import json
import time
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np

from axolotl_loram.architecture.config_json import layer_fields, load_config
from axolotl_loram.architecture.record import versions
from axolotl_loram.config_evaluate import EvaluationRequest
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.atomic import new_file, write_json
from axolotl_loram.files.find import find_folder
from axolotl_loram.files.progress import Progress, no_progress
from axolotl_loram.files.resumable import Work
from axolotl_loram.files.targets import locked
from axolotl_loram.files.untrusted import read_yaml
from axolotl_loram.memory.request import check_settings
from axolotl_loram.models.device import choose_device
from axolotl_loram.results.artefacts import EVALUATION_FILE, EVALUATION_VERSION
from axolotl_loram.results.candidates import (
    BASE,
    RECOVERED,
    Candidate,
    Trial,
    load_model,
    trial_of,
    with_adapter,
)
from axolotl_loram.results.perplexity import document_losses, fitting
from axolotl_loram.results.statistics import perplexity_section, task_sections
from axolotl_loram.results.tasks import Task, check_backend, resolve_tasks, score
from axolotl_loram.text.calibration import load_tokenizer
from axolotl_loram.text.heldout import HeldOut, held_out

LONGEST = 2048
"""Tokens that a model reads at once, unless it reads fewer or was trained on more."""
BATCH_SIZE = {"cpu": 8}
GPU_BATCH_SIZE = 64


@dataclass
class Step:
    """One result: of a candidate, on a set or a task."""

    candidate: Candidate
    what: HeldOut | Task
    key: str


class Evaluator:
    """All that a request asks for, checked before any model is loaded.

    Args:
        request: The request.

    Raises:
        LoRAMError: Something that is asked for does not exist or does not belong together.
    """

    def __init__(self, request: EvaluationRequest) -> None:
        self.request = request
        self.settings = read_yaml(request.config)
        check_settings(self.settings, request.config)
        self.trial: Trial = trial_of(self.settings, request.models, request.also)
        check_backend(request.backend)
        self._check_backend_suits()
        self.tasks = resolve_tasks(request.tasks, request.suite, request.allow_code)
        self.tokenizer = load_tokenizer(find_folder(self.trial.base.id, self.trial.base.revision))
        self.sets = self._sets()
        self.device = choose_device(request.device)
        self.batch_size = request.batch_size or BATCH_SIZE.get(self.device, GPU_BATCH_SIZE)
        self.output = request.output or self.trial.output / EVALUATION_FILE
        self.work = Work(self.output.with_name(f".{self.output.name}.results"))

    def _check_backend_suits(self) -> None:
        narrow = [c.name for c in self.trial.candidates if c.name.startswith("pruned")]
        if self.request.backend == "vllm" and narrow:
            raise LoRAMError(
                f"expected models that vLLM loads, found {', '.join(narrow)}, whose layers differ "
                f"in width: take --models {BASE},{RECOVERED}"
            )

    def _sets(self) -> list[HeldOut]:
        asked: list[dict[str, Any]] = [
            {"source": source, "kind": "in_domain"} for source in self.request.in_domain
        ]
        others = bool(self.request.out_of_domain or self.tasks)
        holds_out = self.settings.get("test_datasets") or self.settings.get("val_set_size")
        if not asked and (holds_out or not others):
            source = str(self.request.config)
            asked.append({"source": source, "kind": "in_domain", "name": "validation"})
        asked += [
            {"source": source, "kind": "out_of_domain"} for source in self.request.out_of_domain
        ]
        config = layer_fields(load_config(self.trial.base.id, self.trial.base.revision), None)
        length = self.request.length or min(
            max(LONGEST, self.settings.get("sequence_len") or 0),
            config.get("max_position_embeddings") or LONGEST,
        )
        fewest = min(candidate.vocabulary for candidate in self.trial.candidates)
        common: dict[str, Any] = {"length": length, "vocabulary_size": fewest}
        common |= {"limit": self.request.limit, "seed": self.request.seed}
        sets = [held_out(**each, tokenizer=self.tokenizer, **common) for each in asked]
        names = [found.name for found in sets]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise LoRAMError(
                f"expected sets of different names, found two called {twice!r}: rename a file"
            )
        return sets

    @cached_property
    def described(self) -> dict[str, dict[str, Any]]:
        """What each candidate is."""
        return {candidate.name: candidate.describe() for candidate in self.trial.candidates}

    @cached_property
    def steps(self) -> list[Step]:
        """All results that are asked for, model by model."""
        both: list[HeldOut | Task] = [*self.sets, *self.tasks]
        return [
            Step(candidate, what, self._key(candidate, what))
            for candidate in self.trial.candidates
            for what in both
        ]

    def _key(self, candidate: Candidate, what: HeldOut | Task) -> str:
        """A name for a result that says what decides it: content, not places."""
        described = self.described[candidate.name]
        model = {k: described.get(k) for k in ("fingerprint", "adapter_fingerprint", "masked")}
        how = [self.request.dtype or self.device[:3], self.request.load_in_4bit, versions()]
        if isinstance(what, HeldOut):
            about: Any = what.digest
        else:
            about = [what.identity(), self.request.limit, self.request.seed, self.request.backend]
        text = json.dumps([model, how, about], sort_keys=True)
        kind = "perplexity" if isinstance(what, HeldOut) else "task"
        return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"

    def run(self, progress: Progress = no_progress) -> dict[str, Any]:
        """Do what is not done yet, one model in memory at a time; write the JSON, and return it."""
        with locked(self.work.folder):
            self._run_missing(progress)
            return self._write()

    def _run_missing(self, progress: Progress) -> None:
        missing = [step for step in self.steps if not self.work.has(step.key)]
        by_vllm = self.request.backend == "vllm"
        alone = [step for step in missing if by_vllm and isinstance(step.what, Task)]
        for model, steps in _by_model([s for s in missing if s not in alone]).items():
            self._run_on(model, steps, progress)
        for step in alone:
            self._run_step(step, None, progress)

    def _run_on(self, model: tuple[str, str | None], steps: list[Step], progress: Progress) -> None:
        loaded = load_model(*model, self.device, self.request.dtype, self.request.load_in_4bit)
        for candidate, own in groupby(steps, lambda step: step.candidate):
            with with_adapter(loaded, candidate.adapter, candidate.confined_to) as adapted:
                for step in own:
                    self._run_step(step, adapted, progress)
        del loaded, adapted
        gc.collect()

    def _run_step(self, step: Step, model: Any, progress: Progress) -> None:
        """Make one result, keep it, and write what there is by now."""
        started, what = time.monotonic(), step.what
        arrays: dict[str, np.ndarray]
        about: dict[str, Any]
        if isinstance(what, HeldOut):
            label = step.candidate.name
            losses, self.batch_size = fitting(
                self.batch_size,
                lambda size: document_losses(
                    *(model, what, size),
                    lambda total, said="", unit="": progress(total, f"{label}: {said}", unit),
                ),
            )
            arrays, about = {"losses": losses}, {}
        else:
            request = self.request
            found, self.batch_size = score(
                *(what, step.candidate, model, self.tokenizer, self.batch_size),
                *(request.limit, request.seed, request.allow_code),
            )
            arrays = {name: np.array(each.pop("per_sample")) for name, each in found.items()}
            about = {"tasks": found}
        about |= {"seconds": time.monotonic() - started, "batch_size": self.batch_size}
        bits = {k: ("F64", v.astype(np.float64).view("u8")) for k, v in arrays.items()}
        with new_file(self.output) as file:
            self.work.folder.mkdir(exist_ok=True)
            self.work.save(step.key, bits, about)
            write_json(file, self.result())

    def _write(self) -> dict[str, Any]:
        result = self.result()
        with new_file(self.output) as file:
            write_json(file, result)
        return result

    def result(self) -> dict[str, Any]:
        """What is known by now, as the JSON says it."""
        done = [(step, *self._load(step)) for step in self.steps if self.work.has(step.key)]
        sizes = [about["batch_size"] for _, _, about in done]
        seconds: dict[str, dict[str, float]] = {}
        for step, _, about in done:
            seconds.setdefault(step.what.name, {})[step.candidate.name] = round(about["seconds"], 3)
        return {
            "schema_version": EVALUATION_VERSION,
            "kind": "evaluation",
            "base": {"id": self.trial.base.id, "revision": self.trial.base.revision},
            "plan": self.trial.plan,
            "models": self.described,
            "perplexity": {
                held.name: perplexity_section(
                    held,
                    {s.candidate.name: found["losses"] for s, found, _ in done if s.what is held},
                )
                for held in self.sets
            },
            "tasks": task_sections(
                [(s.candidate.name, about.get("tasks", {}), arrays) for s, arrays, about in done]
            ),
            "seed": self.request.seed,
            "limit": self.request.limit,
            "batch_size": min(sizes, default=self.batch_size),
            "device": self.device,
            "dtype": self.request.dtype or ("float32" if self.device == "cpu" else "as stored"),
            "load_in_4bit": self.request.load_in_4bit,
            "backend": self.request.backend,
            "versions": versions(),
            "seconds": seconds,
        }

    def _load(self, step: Step) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        stored, about = self.work.load(step.key)
        return {name: tensor.read().view(np.float64) for name, tensor in stored.items()}, about


def evaluate(request: EvaluationRequest, progress: Progress = no_progress) -> dict[str, Any]:
    """Evaluate; see `Evaluator`."""
    return Evaluator(request).run(progress)


def _by_model(steps: list[Step]) -> dict[tuple[str, str | None], list[Step]]:
    """Model → its steps: each model once, whatever is on it."""
    grouped: dict[tuple[str, str | None], list[Step]] = {}
    for step in steps:
        grouped.setdefault((step.candidate.model, step.candidate.revision), []).append(step)
    return grouped
