"""The model card of a pruned model: what was pruned, how aligned, its size, memory and quality."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from axolotl_loram.architecture.counts import summary
from axolotl_loram.architecture.model import embedding_module
from axolotl_loram.architecture.plan import PruningPlan
from axolotl_loram.architecture.record import refit_summary, rounding_summary
from axolotl_loram.config_shares import spelled
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.find import find_folder, find_local_file, is_hub_id
from axolotl_loram.files.untrusted import MOST_YAML_BYTES, parse_yaml, read_json, read_text
from axolotl_loram.memory.predict import compare
from axolotl_loram.memory.settings import TrainingArgs
from axolotl_loram.results.artefacts import EVALUATION_FILE, kept_units
from axolotl_loram.results.inspect import alignment_line, calibration_line
from axolotl_loram.results.render import render

PLOT_FILE = "kept_width.png"
LICENCE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Card:
    """A model card to be written; its text is in `templates/model_card.md.jinja`.

    Attributes:
        base: Hub id of the base; None where only a folder is known.
        licence: What the base's card says of its licence, as in `LICENCE_KEYS`.
    """

    folder: Path
    record: Mapping[str, Any]
    plan: PruningPlan
    repository: str
    revision: str | None
    base: str | None
    licence: Mapping[str, Any]
    plotted: bool

    def text(self) -> str:
        """The card in Markdown, with the hub's metadata as YAML in front."""
        pruning, config = self.record.get("pruning") or {}, self.plan.config
        run = TrainingArgs(
            prequantized=bool(pruning.get("quantize")),
            block_size=pruning.get("quantize_block_size") or 64,
        )
        language = embedding_module(config) is not None
        return render(
            "model_card.md.jinja",
            card=self,
            record=self.record,
            plan=self.plan,
            counted=summary(config, self.plan.counts),
            refit=refit_summary(self.record.get("refit") or {}),
            rounding=rounding_summary(self.record.get("rounding") or {}),
            run=run,
            methods=compare(config, self.plan.pruned_config, run) if language else {},
            alignment_line=alignment_line,
            calibration_line=calibration_line,
            spelled=spelled,
        )

    def front(self) -> str:
        """What the hub reads, in YAML."""
        named = {"base_model": self.base} if self.base else {}
        tags = ["axolotl", "loram", "lora", "pruned"]
        return _yaml({**named, **self.licence, "library_name": "transformers", "tags": tags})

    @property
    def base_name(self) -> str:
        """What to call the base: of a folder, only its name."""
        return self.base or Path(self.plan.base.id).name

    def training_yaml(self) -> str:
        """An Axolotl config, but for the data."""
        four_bit = bool((self.record.get("pruning") or {}).get("quantize"))
        revision = self.plan.base.revision
        pruned = {"pruned_model_path": self.repository}
        if self.revision:
            pruned["pruned_model_revision"] = self.revision
        if self.plan.removed:
            pruned["anchor"] = "base"
        return _yaml(
            {
                "base_model": self.base_name,
                **({"revision_of_model": revision} if self.base and revision else {}),
                "plugins": ["axolotl_loram.LoRAMPlugin"],
                "loram": pruned,
                "adapter": "qloram" if four_bit else "loram",
                **({"load_in_4bit": True} if four_bit else {}),
                "lora_r": 8,
                "lora_alpha": 16,
                "lora_target_linear": True,
                "datasets": [{"path": "tatsu-lab/alpaca", "type": "alpaca"}],
                "sequence_len": 512,
                "output_dir": "out",
            }
        )

    def kept(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows: what each layer keeps, layers that keep the same in one row."""
        kept = kept_units(self.plan)
        cells = [
            ["–" if units is None else "{:,} of {:,}".format(*units) for units in layer]
            for layer in zip(*kept.values(), strict=True)
        ]
        rows = []
        for same, group in groupby(range(len(cells)), key=cells.__getitem__):
            span = list(group)
            rows.append(["–".join(map(str, dict.fromkeys((span[0], span[-1])))), *same])
        return ["layers", *(f"{kind} kept" for kind in kept)], rows

    def measured(self) -> list[tuple[list[str], list[list[str]]]]:
        """What was evaluated: header and rows for sets of text, and for tasks."""
        evaluation, tables = read_evaluation(self.folder, self.plan), []
        for title, measured in (("perplexity", "perplexity"), ("task", "tasks")):
            found = evaluation.get(measured) or {}
            names = list(dict.fromkeys(name for one in found.values() for name in one["models"]))
            rows = [
                [_set_name(name, one), *(_measured(one["models"].get(m)) for m in names)]
                for name, one in found.items()
            ]
            tables += [([title, *names], rows)] if found else []
        return tables


def _yaml(content: Mapping[str, Any]) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _set_name(name: str, measured: Mapping[str, Any]) -> str:
    about = measured.get("kind") or measured.get("metric")
    return f"{name} ({about.replace('_', ' ')})" if about else name


def _measured(one: Mapping[str, Any] | None) -> str:
    one = one or {}
    value, error = one.get("perplexity", one.get("value")), one.get("standard_error")
    if value is None:
        return "–"
    if "perplexity" in one and error is not None:
        error *= value  # it is the loss's: δ exp(loss) = exp(loss) δ loss
    return f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}")


def read_evaluation(folder: Path, plan: PruningPlan) -> dict[str, Any]:
    """What `axolotl-loram evaluate` left in the folder, if anything.

    Raises:
        LoRAMError: It is of another plan.
    """
    file = folder / EVALUATION_FILE
    if not file.exists():
        return {}
    evaluation = read_json(file)
    if evaluation.get("plan") != plan.digest:
        raise LoRAMError(
            f"expected {file} to be of plan {plan.digest[:23]}…, found "
            f"{str(evaluation.get('plan'))[:23]}…: evaluate this model, or remove the file"
        )
    return evaluation


def licence_of(base: str, revision: str | None, online: bool) -> dict[str, Any]:
    """What a base's card (downloaded if `online`) or config says of its licence, if at all."""
    file = find_local_file(base, "README.md", revision)
    if file is None and online and is_hub_id(base):
        with suppress(LoRAMError):
            file = find_folder(base, revision, ["README.md"]) / "README.md"
    settings = find_local_file(base, "config.json", revision)
    found: Mapping[str, Any] = read_json(settings) if settings else {}
    with suppress(LoRAMError):  # then the card says nothing
        text = read_text(file, MOST_YAML_BYTES, "a model card") if file else ""
        front = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
        found = {**found, **(parse_yaml(front[1], file) if front else {})}
    return {name: found[name] for name in LICENCE_KEYS if isinstance(found.get(name), str)}
