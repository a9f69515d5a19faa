"""The Axolotl plugin: substitutes the pruned model for training, and recovers the adapter after.

The order of Axolotl's hooks decides where things happen (axolotl 0.19):

* `register` sees every command's YAML, but cannot tell `train` from `evaluate`: it refuses what
  cannot work, and prepares `merge-lora`, which leaves a mark.
* `load_datasets(preprocess=False)` is called by `train` alone, on each rank, before the model:
  there the pruned model takes the base's place. The tokenizer stays the base's, so that
  `preprocess` and `train` agree on the prepared data set.
* `pre_lora_load` sees the model after Axolotl resized its vocabulary and cast its embeddings: there
  these are put into fewer bits.
* `post_trainer_create` sees the model with its LoRA, which preference trainers add themselves,
  before the first step: there a sparse model's update is confined.
* `post_train_unload` comes after the trainer has saved everything, with the process group gone:
  there global rank 0 recovers the adapter from the files.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin
from transformers import TrainerCallback

import axolotl_loram.heterogeneous  # noqa: F401  (teaches transformers the pruned model's layers)
from axolotl_loram.architecture import parameters
from axolotl_loram.args import LoRAMConfig
from axolotl_loram.axolotl_data import token_rows
from axolotl_loram.cache import prune_into_cache
from axolotl_loram.checkpoint import ADAPTER_FILE, Checkpoint, made_once, write_json
from axolotl_loram.errors import LoRAMError
from axolotl_loram.formats import Formats
from axolotl_loram.heterogeneous import check_widths
from axolotl_loram.masked import confine
from axolotl_loram.matching import ADAPTER_CONFIG
from axolotl_loram.merge import merge_masked
from axolotl_loram.pairing import check_base, check_pruned, read_record
from axolotl_loram.plan import RECORD_FILE, SCHEMA_VERSION, Base, PruningPlan, summary
from axolotl_loram.progress import progress_bar
from axolotl_loram.quantized import decide_formats, prepare_packed, store_small
from axolotl_loram.recover import (
    gather_adapter,
    read_adapter_config,
    recover,
)
from axolotl_loram.sources import TOKENIZER_PATTERNS, find_folder
from axolotl_loram.support import ADAPTERS, check_supported, switch_off_kernels, trains_masked

LOG = logging.getLogger(__name__)
PRUNED_FOLDER = "pruned"
MERGED_FOLDER = "merged"
DEFAULT_OUTPUT = "./model-out"  # Axolotl's, which it fills in only after `register`


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        base: What the user's YAML names as base_model.
        pruned: Folder of the pruned model.
        plan: Its plan.
        output: The user's output_dir, which will hold the recovered adapter.
        warm_start: The full-size adapter that training starts from, if any.
        hub_model_id: Where the user wants the adapter uploaded, if anywhere.
        formats: What the lm_head and the embedding are kept in.
        masked: Whether the update is confined to the weights that sparse pruning left.
        merges: Whether the result is wanted as a model too, with the masked update added.
    """

    base: Base
    pruned: Path
    plan: PruningPlan
    output: Path
    warm_start: str | None
    hub_model_id: str | None
    formats: Formats
    masked: bool = False
    merges: bool = False

    @property
    def trained(self) -> Path:
        """Folder of the adapter as trained, and of the checkpoints."""
        return self.output / PRUNED_FOLDER

    def write_record(self, folder: Path) -> None:
        """Write down in a folder under which plan its adapter is trained."""
        training = {"pruned_model": str(self.pruned), "warm_start": self.warm_start}
        record = {
            "schema_version": SCHEMA_VERSION,
            "kind": "trained-adapter",
            "base": asdict(self.base),
            "plan": self.plan.digest,
            "masked": self.masked,
            "training": training,
        }
        write_json(folder / RECORD_FILE, record)


class LoRAMPlugin(BasePlugin):
    """`plugins: [axolotl_loram.LoRAMPlugin]`: train small, infer large."""

    def __init__(self) -> None:
        super().__init__()
        self.run: Run | None = None
        self.vocabulary = 0

    def get_input_args(self) -> str:
        """The schema of the `loram:` section."""
        return "axolotl_loram.args.LoRAMArgs"

    def register(self, cfg: Any) -> None:
        """Refuse what cannot work, and keep merge-lora from quantizing the original weights."""
        _log_as_axolotl_does()
        check_supported(cfg)
        cfg.adapter = ADAPTERS[cfg.adapter]
        if cfg.merge_lora:
            use_recovered_adapter(cfg)
            _merge_into_unquantized_base(cfg)

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        """Put the pruned model in the base's place: of all commands, only `train` comes here."""
        if not preprocess:
            self.run = begin_training(cfg)

    def pre_model_load(self, cfg: Any) -> None:
        """Outside training, give the original base its recovered adapter."""
        if self.run is None:
            use_recovered_adapter(cfg)

    def post_model_build(self, cfg: Any, model: Any) -> None:
        """Make sure that the model about to be trained is the pruned one."""
        if self.run is not None:
            check_widths(model)
            self.vocabulary = getattr(model.get_input_embeddings(), "num_embeddings", 0)
            prepare_packed(model, self.run.pruned, cfg.torch_dtype)
            counted = summary(self.run.plan.config, self.run.plan.counts)
            LOG.info(
                "training on the pruned model in %s: %s of %s parameters",
                self.run.pruned,
                f"{counted['pruned_parameters']:,}",
                f"{counted['base_parameters']:,}",
            )

    def pre_lora_load(self, cfg: Any, model: Any) -> None:
        """With the vocabulary at its final size, put lm_head and embedding into their formats."""
        if self.run is not None:
            store_small(model, self.run.formats, self.vocabulary)

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Confine the update to the weights that sparse pruning left."""
        if self.run is not None and self.run.masked:
            confine_update(self.run, trainer.model)

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[TrainerCallback]:
        """Record the plan with each checkpoint, and never train the original by accident."""
        return [LoRAMCallback(lambda: self.run)]

    def post_train_unload(self, cfg: Any) -> None:
        """Recover the trained adapter into output_dir, on one rank of all."""
        if self.run is None or int(os.environ.get("RANK", "0")) != 0:
            return
        recover(
            self.run.trained,
            str(self.run.pruned),
            output=self.run.output,
            base=self.run.base,
            update=True,
            card=_yaml_details(cfg),
        )
        LOG.info("%s is the adapter for %s", self.run.output, self.run.base.id)
        if self.run.hub_model_id:
            upload(self.run.output, self.run.hub_model_id)
        if self.run.merges:
            merge_after_training(self.run)


class LoRAMCallback(TrainerCallback):
    """Stops training that did not come through `axolotl train`; records the plan on save."""

    def __init__(self, current_run: Callable[[], Run | None]) -> None:
        self.current_run = current_run

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse to train the original model; record the plan for an adapter saved on interrupt."""
        run = self.current_run()
        if run is None:
            raise LoRAMError(
                "expected training to be started by `axolotl train`, found another caller, for "
                "which base_model was not replaced by the pruned model: use `axolotl train`"
            )
        if state.is_world_process_zero:
            run.write_record(Path(args.output_dir))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the plan in the checkpoint that was just saved."""
        run, folder = self.current_run(), Path(args.output_dir, f"checkpoint-{state.global_step}")
        if run is not None and state.is_world_process_zero and folder.is_dir():
            run.write_record(folder)


def _log_as_axolotl_does() -> None:
    """Let this package's log lines appear where, and as, Axolotl's do."""
    ours, axolotl = logging.getLogger("axolotl_loram"), logging.getLogger("axolotl")
    ours.handlers, ours.level, ours.propagate = axolotl.handlers, axolotl.level, False


def begin_training(cfg: Any) -> Run:
    """Find or make the pruned model, check that it fits, and change cfg to train on it.

    Raises:
        LoRAMError: The pruned model does not belong to base_model, or cannot be trained on.
    """
    section = LoRAMConfig.model_validate(dict(cfg.loram))
    model, revision = str(cfg.base_model), cfg.revision_of_model
    if section.pruned_model_path:
        pruned = find_folder(section.pruned_model_path, section.pruned_model_revision)
        formats = decide_formats(section, cfg, pruned)
    else:
        assert section.pruning is not None  # the schema saw to it
        formats = decide_formats(section, cfg, None)
        rows = functools.partial(token_rows, cfg, section.pruning.seed)
        pruned = prune_into_cache(model, revision, section.pruning, section.cache_dir, rows)
    plan = PruningPlan.load(pruned)
    check_pruned(pruned, plan)
    masked = trains_masked(section, plan)
    check_base(plan, model, revision)
    _check_modules_to_save(cfg, plan)
    run = Run(
        Base(model, revision),
        pruned.resolve(),
        plan,
        Path(cfg.output_dir),
        cfg.lora_model_dir,
        cfg.hub_model_id,
        formats,
        masked,
        merges=section.recovery == "masked",
    )
    _check_same_plan(run)
    if run.masked:
        switch_off_kernels(cfg)
    if formats.small:
        cfg.embeddings_skip_upcast = True  # to 32 bits and back, before they would be made smaller
    if run.warm_start:
        cfg.lora_model_dir = str(gather_warm_start(run, run.warm_start))
    # A folder needs no revision: cfg keeps the base's, which the tokenizer is loaded at.
    cfg.base_model = cfg.base_model_config = str(run.pruned)
    cfg.output_dir = str(run.trained)
    cfg.hub_model_id = None  # the trainer would upload the adapter as trained
    return run


def confine_update(run: Run, model: Any) -> None:
    """Confine every adapter of the model to the weights that pruning left.

    Raises:
        LoRAMError: The model has no LoRA on such weights.
    """
    adapters = getattr(model, "peft_config", {})  # a reference adapter may be beside
    count = sum(confine(model, run.plan, run.pruned, name) for name in adapters)
    if not count:
        raise LoRAMError(
            "expected LoRA on weights that pruning made sparse, found none: adapt linear layers "
            "(lora_target_linear: true), or train with `masked: false`"
        )
    LOG.info("confined the update of %d layers to the weights that pruning left", count)


def merge_after_training(run: Run) -> None:
    """Write the original with the masked update to output_dir/merged."""
    output = run.output / MERGED_FOLDER
    with progress_bar("merging") as progress:
        merge_masked(run.trained, str(run.pruned), output, run.base, True, progress)
    LOG.info("%s is %s with the masked update", output, run.base.id)


def gather_warm_start(run: Run, adapter: str) -> Path:
    """The full-size adapter cut to the pruned model, by whichever rank comes first."""
    folder = find_folder(adapter, patterns=["adapter_*", RECORD_FILE])
    fingerprint = Checkpoint(folder, ADAPTER_FILE).fingerprint()
    settings = read_adapter_config(folder)
    return made_once(
        run.trained / "warm-start",
        [fingerprint, settings, run.plan.digest],
        lambda start: gather_adapter(folder, run.plan, str(run.pruned), start),
    )


def use_recovered_adapter(cfg: Any) -> None:
    """Outside training, let lora_model_dir be the recovered adapter in output_dir.

    A lora_model_dir that the user gives stays, unless it is the one that the run in output_dir
    started from: then the result of the run is meant.

    Raises:
        LoRAMError: output_dir holds no recovered adapter, or lora_model_dir an unrecovered one.
    """
    output = Path(str(cfg.output_dir or DEFAULT_OUTPUT))
    started_from = (read_record(output).get("trained") or {}).get("warm_start")
    if cfg.lora_model_dir and cfg.lora_model_dir != started_from:
        if read_record(Path(cfg.lora_model_dir)).get("kind") == "trained-adapter":
            raise LoRAMError(
                f"expected an adapter for the original model, found {cfg.lora_model_dir} trained "
                f"on the pruned one: run `axolotl-loram recover {cfg.lora_model_dir}` first"
            )
        return
    if read_record(output).get("kind") != "recovered-adapter":
        raise LoRAMError(
            f"expected a recovered adapter in output_dir, found none in {output}: run `axolotl "
            f"train` first, or `axolotl-loram recover {output / PRUNED_FOLDER}/checkpoint-N` and "
            "pass --lora-model-dir"
        )
    LOG.info("using the recovered adapter in %s", output)
    cfg.lora_model_dir = str(output)


def _merge_into_unquantized_base(cfg: Any) -> None:
    """Take the NF4 round trip out of `axolotl merge-lora`.

    For plain QLoRA it makes the merged base equal to the one in training. In LoRAM the original was
    never quantized in training: the round trip would only damage it.
    """
    from axolotl.cli import merge_lora

    original = merge_lora.merge_lora_sharded_efficient

    def merge_without_nf4(**kwargs: Any) -> Any:
        return original(**{**kwargs, "simulate_nf4": False, "simulate_nf4_experts": False})

    merge_lora.merge_lora_sharded_efficient = merge_without_nf4
    cfg.adapter, cfg.load_in_4bit, cfg.load_in_8bit = "lora", False, False


def _check_modules_to_save(cfg: Any, plan: PruningPlan) -> None:
    """Refuse to train in whole a module that has lost features: BA is not all of its update."""
    named = set(cfg.lora_modules_to_save or [])
    touched = {
        part for t in parameters(plan.config) if t.kinds for part in t.module.split(".")[-2:]
    }
    if named & touched:
        raise LoRAMError(
            "expected lora_modules_to_save to name modules that pruning leaves whole, found "
            f"{', '.join(sorted(named & touched))}: adapt them by LoRA instead"
        )


def _check_same_plan(run: Run) -> None:
    """Refuse an output_dir whose checkpoints were trained on another pruned model."""
    recorded = read_record(run.trained).get("plan")
    if recorded not in (None, run.plan.digest):
        raise LoRAMError(
            f"expected output_dir to be new or of a run on this pruned model, found {run.trained} "
            f"trained under plan {recorded[:19]}…, not {run.plan.digest[:19]}…: choose another "
            "output_dir or remove it"
        )


def _yaml_details(cfg: Any) -> str:
    """The YAML of the run, for the model card."""
    file = Path(str(cfg.axolotl_config_path or ""))
    if not file.is_file():
        return ""
    text = file.read_text(encoding="utf-8")
    return f"<details><summary>Axolotl config</summary>\n\n```yaml\n{text}\n```\n\n</details>\n"


def upload(folder: Path, repository: str) -> None:
    """Upload the recovered adapter, private unless the repository says otherwise."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repository, private=True, exist_ok=True)
    api.upload_folder(
        repo_id=repository,
        folder_path=folder,
        allow_patterns=[
            ADAPTER_CONFIG,
            ADAPTER_FILE,
            RECORD_FILE,
            "README.md",
            *TOKENIZER_PATTERNS,
        ],
        ignore_patterns=[f"{PRUNED_FOLDER}/*", f"{MERGED_FOLDER}/*"],
    )
    LOG.info("uploaded the adapter to %s", repository)
