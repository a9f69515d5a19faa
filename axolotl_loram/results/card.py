"""The model card of a pruned model: what was pruned, how aligned, its size, memory and quality."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from axolotl_loram.architecture.counts import summary
from axolotl_loram.architecture.model import embedding_module
from axolotl_loram.architecture.plan import PruningPlan
from axolotl_loram.architecture.record import refit_summary
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.find import find_folder, find_local_file, is_hub_id
from axolotl_loram.files.untrusted import MOST_YAML_BYTES, parse_yaml, read_json, read_text
from axolotl_loram.memory.predict import METHODS, compare
from axolotl_loram.memory.settings import TrainingArgs
from axolotl_loram.results.artefacts import EVALUATION_FILE, Units, kept_units
from axolotl_loram.results.inspect import alignment_line, calibration_line

PLOT_FILE = "kept_width.png"
LICENCE_KEYS = ("license", "license_name", "license_link")
GIB = 2**30
PROJECT = "https://github.com/axolotl-ai-cloud/axolotl"
PAPER = "https://arxiv.org/abs/2502.13533"


@dataclass(frozen=True)
class Card:
    """A model card to be written.

    Attributes:
        folder: Of the pruned model.
        record: Its `loram.json`.
        plan: Its plan.
        repository: Where it will be, ``org/name``.
        revision: Branch there, None for the main one.
        base: Hub id of the base; None where only a folder is known.
        licence: What the base's card says of its licence, as in `LICENCE_KEYS`.
        plotted: Whether there is a plot.
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
        front = yaml.safe_dump(self.metadata(), sort_keys=False, allow_unicode=True)
        sections = {
            "Use it": self.usage(),
            "What was pruned": self.pruned(),
            "Alignment": self.aligned(),
            "Parameters": self.parameters(),
            "Memory": self.memory(),
            "Quality": self.quality(),
            "Check it": self.checking(),
        }
        body = "\n\n".join(f"## {title}\n\n{text.strip()}" for title, text in sections.items())
        return f"---\n{front}---\n\n{self.introduction()}\n\n{body}\n"

    def metadata(self) -> dict[str, Any]:
        """What the hub reads."""
        named = {"base_model": self.base} if self.base else {}
        tags = ["axolotl", "loram", "lora", "pruned"]
        return {**named, **self.licence, "library_name": "transformers", "tags": tags}

    @property
    def base_name(self) -> str:
        """What to call the base: of a folder, only its name."""
        return self.base or Path(self.plan.base.id).name

    def introduction(self) -> str:
        """What it is, and what it is not."""
        counted = self.counted
        return (
            f"# {self.repository.partition('/')[2]}\n\n"
            f"`{self.base_name}`, pruned from {counted['base_parameters']:,} to "
            f"{counted['pruned_parameters']:,} parameters "
            f"(×{counted['parameter_reduction']:.2f} smaller) to train LoRA on with\n"
            f"axolotl-loram, the [Axolotl]({PROJECT}) plugin for LoRAM "
            f"([Train Small, Infer Large]({PAPER})). What training\nleaves is an ordinary adapter "
            f"for `{self.base_name}` itself: this model is for training, not for inference."
        )

    def usage(self) -> str:
        """The YAML to train on it, and how to load it without Axolotl."""
        loader = "\n".join(
            [
                "import axolotl_loram.heterogeneous  # layers that differ in width",
                "from transformers import AutoModelForCausalLM",
                "",
                f'model = AutoModelForCausalLM.from_pretrained("{self.repository}")',
            ]
        )
        return (
            f"With axolotl-loram installed, and your own data set:\n\n"
            f"```yaml\n{self.training_yaml()}```\n\n"
            "`axolotl train` on this leaves the adapter for the original in `output_dir`. "
            "transformers by itself cannot\nbuild layers that differ in width yet; "
            "`import axolotl_loram.heterogeneous` teaches it to:\n\n"
            f"```python\n{loader}\n```"
        )

    def training_yaml(self) -> str:
        """An Axolotl config, but for the data."""
        four_bit = bool((self.record.get("pruning") or {}).get("quantize"))
        revision = self.plan.base.revision
        pruned = {"pruned_model_path": self.repository}
        if self.revision:
            pruned["pruned_model_revision"] = self.revision
        settings = {
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
        return yaml.safe_dump(settings, sort_keys=False)

    def pruned(self) -> str:
        """How units were chosen, and how many are left in each layer."""
        pruning = self.record.get("pruning") or {}
        how = {
            "base": f"`{self.base_name}`" + self._at_revision(),
            "fingerprint of the base": f"`{self.plan.base.fingerprint}`",
            **{name: pruning.get(name) for name in ("method", "ratio", "sparsity", "allocation")},
            "index files of the reference code": "yes" if pruning.get("indices_path") else None,
            "stored in": pruning.get("quantize"),
            "layers pruned": f"{self.counted['pruned_layers']} of {self.counted['layers']}",
            "seed": pruning.get("seed"),
            "plan": f"`{self.plan.digest}`",
        }
        if self.record.get("calibration"):
            how["calibration text"] = calibration_line(self.record["calibration"])
        rows = [[name, str(value)] for name, value in how.items() if value is not None]
        parts = [table(["", ""], rows)]
        if self.plan.kept:
            plot = f"![Share of each layer that is kept]({PLOT_FILE})\n\n" if self.plotted else ""
            parts.append(plot + table(*self._kept_rows()))
        return "\n\n".join(parts)

    def _at_revision(self) -> str:
        revision = self.plan.base.revision
        return f" at revision `{revision}`" if revision else ""

    def _kept_rows(self) -> tuple[list[str], list[list[str]]]:
        kept = kept_units(self.plan)
        spans: list[list[Any]] = []  # [first layer, last layer, cells]
        for layer in range(max(map(len, kept.values()))):
            cells = [_fraction(units[layer]) for units in kept.values()]
            if spans and spans[-1][2] == cells:
                spans[-1][1] = layer
            else:
                spans.append([layer, layer, cells])
        rows = [[str(a) if a == b else f"{a}–{b}", *cells] for a, b, cells in spans]
        return ["layers", *(f"{kind} kept" for kind in kept)], rows

    def aligned(self) -> str:
        """How the pruned model was trained further, if it was."""
        alignments = self.record.get("alignments") or []
        refit = refit_summary(self.record.get("refit") or {})
        told = [f"{i}. {alignment_line(one)}" for i, one in enumerate(alignments, start=1)]
        if not told:
            told = ["Not aligned: no training followed the pruning."]
        if refit:
            told.append(
                f"\nRefit in closed form (ridge regression): {refit['refits_accepted']} of "
                f"{refit['refits_tried']} projections accepted."
            )
        return "\n".join(told)

    @property
    def counted(self) -> dict[str, Any]:
        """Parameter counts."""
        return summary(self.plan.config, self.plan.counts)

    def parameters(self) -> str:
        """Parameters of base and pruned model, counted from the shapes."""
        counted, stored = self.counted, self.record.get("weight_bytes")
        rows = [
            ["base", f"{counted['base_parameters']:,}"],
            ["pruned", f"{counted['pruned_parameters']:,}"],
            ["reduction", f"×{counted['parameter_reduction']:.2f}"],
        ]
        if "zeros" in (self.record.get("parameters") or {}):
            rows.append(["of these zero", f"{self.record['parameters']['zeros']:,}"])
        if stored:
            rows.append(["bytes of weights in this repository", f"{stored:,}"])
        return table(["", "parameters"], rows)

    def memory(self) -> str:
        """What training takes, by the planner's calculation."""
        if embedding_module(self.plan.config) is None:
            return "Not predicted: the planner knows language models only."
        pruning = self.record.get("pruning") or {}
        run = TrainingArgs(
            prequantized=bool(pruning.get("quantize")),
            block_size=pruning.get("quantize_block_size") or 64,
        )
        methods = compare(self.plan.config, self.plan.pruned_config, run)
        names = {
            "lora": "LoRA (base)",
            "qlora": "QLoRA (base)",
            "loram": "LoRAM (this model)",
            "qloram": "QLoRAM (this model)",
        }
        rows = [
            [what, *(f"{getattr(methods[name], field) / GIB:.3g}" for name in METHODS)]
            for what, field in (
                ("weights on the device", "weights_device_bytes"),
                ("peak of training", "peak_bytes"),
            )
        ]
        return (
            f"*Predicted* from the shapes by `axolotl-loram plan`, not measured; GiB on one GPU, "
            f"rank {run.lora_r}, all linear\nlayers, one sequence of {run.sequence_len} tokens, "
            "gradient checkpointing, bf16.\n\n"
            + table(["GiB, predicted", *(names[name] for name in METHODS)], rows)
        )

    def quality(self) -> str:
        """What was measured, and nothing else."""
        parts = list(self._evaluated())
        for index, one in enumerate(self.record.get("alignments") or [], start=1):
            loss = one.get("heldout_loss")
            if loss:
                counted = f", over {loss['tokens']:,} tokens" if loss.get("tokens") else ""
                parts.append(
                    f"Held-out loss of the pruned model, nats per token, alignment {index}: "
                    f"{loss['before']:.4f} before, {loss['after']:.4f} after{counted}."
                )
        refit = refit_summary(self.record.get("refit") or {})
        if refit:
            parts.append(
                "Held-out error of the refitted projections' outputs, relative, mean: "
                f"{refit['heldout_error_before']:.4f} before the refit, "
                f"{refit['heldout_error_after']:.4f} after."
            )
        return "\n\n".join(parts) or "Not measured."

    def _evaluated(self) -> Iterator[str]:
        evaluation = read_evaluation(self.folder, self.plan)
        if evaluation is None:
            return
        yield f"Measured by `axolotl-loram evaluate` ({EVALUATION_FILE}); ± is the standard error."
        for title, measured in (("perplexity", "perplexity"), ("task", "tasks")):
            found = evaluation.get(measured) or {}
            names = list(dict.fromkeys(name for one in found.values() for name in one["models"]))
            if found:
                rows = [
                    [_set_name(name, one), *(_measured(one["models"].get(m)) for m in names)]
                    for name, one in found.items()
                ]
                yield table([title, *names], rows)

    def checking(self) -> str:
        """How users verify it."""
        revision = f" --revision {self.revision}" if self.revision else ""
        return (
            f"```sh\naxolotl-loram inspect {self.repository}{revision} --verify\n```\n\n"
            "holds every file against its SHA-256 in `loram.json`, the plan against config and "
            "weights, and the base\nagainst its fingerprint, where its weights are on the machine."
        )


def _fraction(units: Units) -> str:
    return "–" if units is None else f"{units[0]:,} of {units[1]:,}"


def _set_name(name: str, measured: Mapping[str, Any]) -> str:
    about = measured.get("kind") or measured.get("metric")
    return f"{name} ({about.replace('_', ' ')})" if about else name


def _measured(one: Mapping[str, Any] | None) -> str:
    if one is None:
        return "–"
    if "perplexity" in one:  # its standard error is the loss's: δ exp(loss) = exp(loss) δ loss
        value = one["perplexity"]
        error = value * one["standard_error"] if one.get("standard_error") is not None else None
    else:
        value, error = one["value"], one.get("standard_error")
    return f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}")


def read_evaluation(folder: Path, plan: PruningPlan) -> dict[str, Any] | None:
    """What `axolotl-loram evaluate` left in the folder, if anything.

    Raises:
        LoRAMError: It is of another plan.
    """
    file = folder / EVALUATION_FILE
    if not file.exists():
        return None
    evaluation = read_json(file)
    if evaluation.get("plan") != plan.digest:
        raise LoRAMError(
            f"expected {file} to be of plan {plan.digest[:23]}…, found "
            f"{str(evaluation.get('plan'))[:23]}…: evaluate this model, or remove the file"
        )
    return evaluation


def licence_of(base: str, revision: str | None, online: bool) -> dict[str, Any]:
    """What a base's own card or config says of its licence; empty where nothing is known.

    Args:
        base: Folder or hub id.
        revision: Revision on the hub.
        online: Whether its card may be downloaded.
    """
    file = find_local_file(base, "README.md", revision)
    if file is None and online and is_hub_id(base):
        try:
            file = find_folder(base, revision, ["README.md"]) / "README.md"
        except LoRAMError:
            file = None
    settings = find_local_file(base, "config.json", revision)
    found: Mapping[str, Any] = read_json(settings) if settings else {}
    with suppress(LoRAMError):  # then the card says nothing
        text = read_text(file, MOST_YAML_BYTES, "a model card") if file else ""
        front = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
        found = {**found, **(parse_yaml(front[1], file) if front else {})}
    return {name: found[name] for name in LICENCE_KEYS if isinstance(found.get(name), str)}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    cells = [list(header), ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in cells)


def _cell(text: str) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")
