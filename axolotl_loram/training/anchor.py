"""The anchor of a run: what the base says of the places that are trained, and the loss made of it.

The base's half is computed once, over the run's training and held-out rows, and kept on disk; the
pruned model's half is a second forward pass without the adapter. Rows are found in a batch again
whether they are padded or packed, in whatever order, on whatever rank. The trainer computes the
loss by its own hook for that (`compute_loss_func`), so that whatever shards or wraps the model
stays as it is. Held-out losses are anchored too: what counts is the base with the adapter.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from axolotl_loram.architecture.config_json import load_config
from axolotl_loram.architecture.counts import plan_of_size
from axolotl_loram.architecture.plan import PLAN_FILE, Base, PruningPlan
from axolotl_loram.config_loram import LoRAMConfig
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.find import find_folder
from axolotl_loram.files.progress import progress_bar
from axolotl_loram.files.untrusted import read_yaml
from axolotl_loram.memory.data import TOP_K
from axolotl_loram.models.device import choose_device
from axolotl_loram.models.patches import see_batches
from axolotl_loram.text.axolotl_text import load_yaml, prepared_rows, rl_of, tokenizer_of
from axolotl_loram.training.anchored import Offsets, anchored_loss, offsets
from axolotl_loram.training.distil import IGNORED, Targets
from axolotl_loram.training.rows import Row, distinct, spans, unpadded
from axolotl_loram.training.run import Run
from axolotl_loram.training.served import Server, check_server, make_served
from axolotl_loram.training.states import HiddenStates, StoredStates, make_states, whole_rows
from axolotl_loram.training.teacher import Teacher, kept_outputs, make_teacher

LOG = logging.getLogger(__name__)
CHECKED_ROWS = 4
"""Rows that a server is tried with."""


def prepare_anchor(
    run: Run, path: str | None, cache_dir: str | None, trainer: Any
) -> dict[str, Any]:
    """Have the trainer minimize the anchored loss; returns what to record.

    What the base says is in `path`, as `axolotl-loram anchor` wrote it, or else computed here.

    Raises:
        LoRAMError: The base's outputs cannot be computed or read, or are another model's; or the
            loss has a term that the anchored one has not.
    """
    if getattr(trainer.model.config, "output_router_logits", False):
        raise LoRAMError(
            "expected output_router_logits false with `anchor` in loram:, found true: the anchored "
            "loss has no load-balancing term; add `overrides_of_model_config: "
            "{output_router_logits: false}`"
        )
    base, removed = run.plan.base.id, len(run.plan.removed)
    if path:
        folder = find_folder(path)
    else:
        warn_of_unseen(trainer)
        here = find_folder(run.base.id, run.base.revision)
        if removed:
            rows = whole_rows(data_of(trainer), trainer.data_collator)
            folder = kept_outputs("states", here, rows, removed, cache_dir, make_states)
        else:
            folder = kept_outputs("anchor", here, rows_of(data_of(trainer)), TOP_K, cache_dir)
    teacher = StoredStates(folder, removed) if removed else Teacher(folder)
    check_anchor(teacher, folder, run)
    if isinstance(teacher, StoredStates):
        HiddenStates(teacher).attach(trainer.model)
        LOG.info("hidden states of %s after %d layers take their place", base, removed)
        return {"base": base, **{name: teacher.record[name] for name in ("layers", "sequences")}}
    Anchor(trainer, teacher).attach()
    found = {name: teacher.record[name] for name in ("top_k", "sequences", "places")}
    LOG.info("anchored at what %s says of %d tokens", base, found["places"])
    return {"base": base, **found}


def warn_of_unseen(trainer: Any) -> None:
    """Say that the base is run over more rows than the run's steps will see."""
    args, data = trainer.args, trainer.train_dataset
    if args.max_steps > 0 and not getattr(args, "sample_packing", False):
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if args.max_steps * batch < len(data):
            LOG.warning(
                "the original is run over all %d rows, of which max_steps sees at most %d: name "
                "fewer, as by `shards` of a data set, to save the time",
                len(data),
                args.max_steps * batch,
            )


def check_anchor(teacher: Teacher, folder: Path, run: Run) -> None:
    """Refuse outputs that are another model's, or a teacher's, of all places."""
    if not (run.plan.removed or teacher.record.get("trained_only")):
        raise LoRAMError(
            f"expected what `axolotl-loram anchor` wrote in {folder}, found the outputs of a "
            "teacher: give the anchor's folder as anchor_path, or leave that out"
        )
    if None in (run.plan.base.fingerprint, teacher.record["fingerprint"]):
        LOG.warning(
            "the anchor in %s is %s's: not held against the plan",
            folder,
            teacher.record["computed_in"],
        )
    elif run.plan.base.fingerprint != teacher.record["fingerprint"]:
        raise LoRAMError(
            f"expected an anchor of {run.plan.base.id}, found {folder} made of another model: make "
            "it of the base that was pruned"
        )


def make_anchor(
    yaml: Path,
    output: Path,
    model: str | None = None,
    server: str | None = None,
    served_model: str | None = None,
) -> dict[str, Any]:
    """Write what the base says of a run's rows, for a machine without it; returns its record.

    Interrupted, it goes on when it is called again.

    Args:
        yaml: The run's Axolotl YAML.
        output: Folder to write.
        model: Folder or hub id of the base; by default what the YAML names.
        server: Address of a server of the base, up to and with `/v1`; then `model`, where it is
            given, computes only a few rows, to hold the server's answers against.
        served_model: What the server calls the base; by default the YAML's base_model.

    Raises:
        LoRAMError: The data or the base cannot be read, nothing is trained, or the server does
            not answer as the base would.
    """
    cfg = load_yaml(yaml)
    place, revision = model or str(cfg.base_model), None if model else cfg.revision_of_model
    removed = removed_by(yaml, place, revision)
    if removed and server is not None:
        raise LoRAMError(
            "expected the base's weights where pruning removes whole layers, found --server: "
            "servers tell no hidden states; give --model alone"
        )
    if cfg.rl:
        raise LoRAMError(
            f"expected rows that Axolotl tokenizes, found rl: {rl_of(cfg)}, where the trainer does "
            "it: leave anchor_path out, and the run computes what it needs"
        )
    with progress_bar("anchor") as progress:
        if removed:
            base, whole = find_folder(place, revision), whole_rows(prepared_rows(cfg))
            return make_states(base, whole, output, removed, choose_device(), progress)
        rows = distinct(rows_of(prepared_rows(cfg)))
        if server is None:
            base = find_folder(place, revision)
            return make_teacher(base, rows, output, TOP_K, choose_device(), progress)
        some = rows[:: max(len(rows) // CHECKED_ROWS, 1)][:CHECKED_ROWS]
        served = Server(server, served_model or str(cfg.base_model))
        check_server(served, some, TOP_K, tokenizer_of(cfg))
        known = said_by(find_folder(model), some) if model else None
        return make_served(served, rows, output, TOP_K, progress, known)


def removed_by(yaml: Path, base: str, revision: str | None) -> int:
    """How many layers of the base are removed whole before the run of this YAML.

    Raises:
        LoRAMError: Its `loram:` section is refused, or what it names is not to be had.
    """
    section = LoRAMConfig.model_validate(read_yaml(yaml).get("loram") or {"stage": "align"})
    if section.pruned_model_path:
        found = section.pruned_model_path, section.pruned_model_revision
        return len(PruningPlan.load(find_folder(*found, [PLAN_FILE])).removed)
    if section.pruning is None or not section.pruning.whole_layers:
        return 0
    config = load_config(base, revision)
    return len(plan_of_size(config, Base(base), section.pruning.resolve()).removed)


def said_by(base: Path, rows: list[Row]) -> dict[bytes, torch.Tensor]:
    """Log-probabilities of the rows' trained tokens, by the rows' digest."""
    with tempfile.TemporaryDirectory() as folder:
        make_teacher(base, rows, Path(folder) / "some", TOP_K, choose_device())
        some = Teacher(Path(folder) / "some")
        return {row.digest: some.of(row).logprobs[:, 0] for row in rows}


def data_of(trainer: Any) -> Iterator[Mapping[str, Any]]:
    """All rows that the run trains on, and those that it holds out."""
    held_out = trainer.eval_dataset
    splits = held_out.values() if isinstance(held_out, dict) else (held_out,)
    for data in (trainer.train_dataset, *splits):
        if data is not None:
            yield from data


def rows_of(data: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    """Rows as Axolotl prepares them: token ids, labels, and perhaps a mask.

    Raises:
        LoRAMError: They have no labels, or labels that are not the tokens.
    """
    for row in data:
        if "input_ids" not in row or "labels" not in row:
            raise LoRAMError(
                f"expected rows of token ids and labels to anchor, found {', '.join(row)}: take "
                "`anchor` out, or name data that Axolotl tokenizes"
            )
        ids, labels = (np.asarray(row[name]) for name in ("input_ids", "labels"))
        real = unpadded(ids, row.get("attention_mask"))
        yield row_of(ids[real], labels[real])


def row_of(tokens: np.ndarray, labels: np.ndarray) -> Row:
    """A sequence, with what its labels train; its first token cannot be.

    Raises:
        LoRAMError: A label is not the token at its place.
    """
    trained = labels != IGNORED
    trained[:1] = False
    if (tokens[trained] != labels[trained]).any():
        raise LoRAMError(
            "expected labels that are the tokens themselves to anchor, found others: take `anchor` "
            "out"
        )
    return Row(tokens.astype(np.int32), trained)


@dataclass(frozen=True)
class Segment:
    """A row in a batch: where it is, and what it is.

    Attributes:
        number: Of the batch's row that it is in.
        positions: Of its tokens there, (tokens,).
        row: Itself.
    """

    number: int
    positions: np.ndarray
    row: Row


def segments(inputs: Mapping[str, torch.Tensor]) -> Iterator[Segment]:
    """The rows that a batch holds, padded or packed, as far as they have trained tokens."""
    labels = inputs["labels"].cpu().numpy()
    for number, positions, tokens in spans(inputs):
        row = row_of(tokens, labels[number][positions])
        if len(row.places):
            yield Segment(number, positions, row)


class Anchor:
    """Computes a trainer's loss from the base's outputs and the model without its adapter."""

    def __init__(self, trainer: Any, teacher: Teacher) -> None:
        self.trainer, self.teacher = trainer, teacher
        self.places: tuple[torch.Tensor, torch.Tensor] | None = None
        self.offsets: Offsets | None = None

    def attach(self) -> None:
        """Take the place of the trainer's loss."""
        see_batches(self.trainer, self.look_up)
        self.trainer.compute_loss_func = self.loss

    @torch.no_grad()
    def look_up(self, model: Any, inputs: Mapping[str, Any]) -> None:
        """Find the offsets of a batch's trained places."""
        found = list(segments(inputs))
        said = [self.teacher.of(segment.row) for segment in found]
        self.places = self.offsets = None
        if not found:
            return
        device = inputs["input_ids"].device
        rows = [np.full(len(each.row.places), each.number) for each in found]
        columns = [each.positions[each.row.places] for each in found]
        row, column = (
            torch.from_numpy(np.concatenate(each)).to(device) for each in (rows, columns)
        )
        self.places = row, column
        targets = Targets(
            *(torch.cat([getattr(one, name) for one in said]) for name in Targets.__annotations__)
        ).to(device)
        plain = self.trainer.accelerator.unwrap_model(model)
        given = {name: value for name, value in inputs.items() if name != "labels"}
        with plain.disable_adapter():
            logits = plain(**given, use_cache=False).logits
        self.offsets = offsets(targets, logits[self.places])

    def loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The loss of a batch: the mean over the tokens of the whole batch, as the trainer's."""
        logits = outputs["logits"]
        if self.places is None or self.offsets is None:
            return logits.sum() * 0.0  # nothing in it is trained
        total = anchored_loss(logits[self.places], self.offsets)
        return total / (len(self.places[0]) if num_items_in_batch is None else num_items_in_batch)
