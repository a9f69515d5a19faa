"""Artefacts from strangers: small folders of every kind, mutated, and the doors they enter by.

A door reads one kind of folder. Whatever is in it, the door opens, or says in one sentence
(LoRAMError) why it does not; within bounded time and memory, and without writing outside.
`benchmarks/fuzz.py` tries as many mutations as one likes, test_hostile.py some thousands.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from families import MOE, PICO
from mutations import mutate_file

from axolotl_loram.architecture.config_json import load_config, with_defaults
from axolotl_loram.architecture.counts import keep_counts, summary
from axolotl_loram.architecture.lora_names import ADAPTER_CONFIG
from axolotl_loram.architecture.model import parameters, tensors
from axolotl_loram.architecture.pairing import (
    check_adapter_tokenizer,
    check_base,
    check_pruned,
)
from axolotl_loram.architecture.plan import PLAN_FILE, PruningPlan
from axolotl_loram.architecture.record import RECORD_FILE, Record
from axolotl_loram.architecture.reference import read_indices
from axolotl_loram.config import PruningArgs
from axolotl_loram.files.tensors import ADAPTER_FILE, MODEL_FILE, Checkpoint, write_safetensors
from axolotl_loram.memory import cluster
from axolotl_loram.memory.request import request
from axolotl_loram.memory.zero import read_deepspeed, read_zero
from axolotl_loram.pruning.prune import prune
from axolotl_loram.recovery.adapter import Adapter
from axolotl_loram.recovery.recover import recover
from axolotl_loram.recovery.scatter import match
from axolotl_loram.recovery.servable import subject_of, verdicts
from axolotl_loram.results.artefacts import EVALUATION_FILE, TRAINER_STATE
from axolotl_loram.results.inspect import inspect
from axolotl_loram.results.report import build
from axolotl_loram.training.sharding import check_deepspeed

SMALL = {
    **{k: v for k, v in PICO.items() if not k.endswith("_id")},
    "hidden_size": 16,
    "intermediate_size": 24,
    "vocab_size": 32,
    "head_dim": 4,
    "tie_word_embeddings": False,
}
CONFIGS = {"llama": SMALL, "qwen3_moe": {**SMALL, **MOE, "moe_intermediate_size": 16}}


def write_model(folder: Path, config: Mapping[str, Any], shards: int = 2, seed: int = 0) -> Path:
    """A model of random bits, in shards with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    numbers = np.random.default_rng(seed)
    listed = [(t.name, "F16", t.shape) for t in tensors(with_defaults(config))]
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        mine = listed[shard::shards]
        data = (numbers.normal(size=shape).astype("<f2").view("<u2") for _, _, shape in mine)
        write_safetensors(folder / name, mine, data)
        weight_map |= {tensor: name for tensor, _, _ in mine}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{MODEL_FILE}.index.json").write_text(json.dumps(index))
    return folder


def write_adapter(folder: Path, plan: PruningPlan, pruned: Path, rank: int = 2) -> Path:
    """LoRA on all linear layers of the pruned model, as PEFT writes it."""
    folder.mkdir(parents=True)
    adapted = [t for t in parameters(plan.pruned_config) if t.linear]
    shapes = {
        f"base_model.model.{t.module}.lora_{side}.weight": shape
        for t in adapted
        for side, shape in (("A", (rank, t.shape[1])), ("B", (t.shape[0], rank)))
    }
    described = [(name, "F32", shape) for name, shape in shapes.items()]
    numbers = np.random.default_rng(1)
    data = (numbers.normal(size=shape).astype("<f4").view("<u4") for shape in shapes.values())
    write_safetensors(folder / ADAPTER_FILE, described, data)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "bias": "none"}
    config |= {
        "target_modules": sorted({t.module.split(".")[-1] for t in adapted}),
        "base_model_name_or_path": str(pruned),
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config))
    trained = {"pruned_model": str(pruned)}
    record = {"schema_version": 1, "kind": "trained-adapter", "base": vars(plan.base)}
    (folder / RECORD_FILE).write_text(
        json.dumps({**record, "plan": plan.digest, "training": trained})
    )
    return folder


def write_tokenizer(folder: Path) -> None:
    """A vocabulary of bytes."""
    model = {"type": "BPE", "vocab": {f"t{i}": i for i in range(32)}, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": [], "model": model}))


def write_settings(folder: Path, base: Path) -> Path:
    """An Axolotl YAML and a DeepSpeed config."""
    folder.mkdir()
    settings = {
        "base_model": str(base),
        "plugins": ["axolotl_loram.LoRAMPlugin"],
        "loram": {"pruning": {"ratio": 0.5, "protect_first": 1, "protect_last": 1}},
        "adapter": "qloram",
        "load_in_4bit": True,
        "lora_r": 4,
        "lora_target_modules": ["q_proj", "up_proj"],
        "sequence_len": 64,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "batch_size": 2,
        "deepspeed": str(folder / "zero.json"),
        "datasets": [{"path": "text.jsonl", "type": "completion"}],
    }
    (folder / "run.yml").write_text(yaml.safe_dump(settings))
    offload = {"device": "cpu", "pin_memory": True}
    zero = {"stage": 3, "offload_optimizer": offload, "sub_group_size": 10**6}
    zero |= {"stage3_gather_16bit_weights_on_model_save": True, "overlap_comm": True}
    deepspeed = {"zero_optimization": zero, "bf16": {"enabled": "auto"}, "gradient_clipping": 1.0}
    (folder / "zero.json").write_text(json.dumps(deepspeed))
    return folder


def write_run(folder: Path, adapter: Path) -> Path:
    """What `report` reads of a run."""
    recover(adapter, output=folder)
    log = [{"step": step, "loss": 2.0 - step / 8, "learning_rate": 0.1} for step in range(1, 5)]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": [*log, LAST_LOG]}))
    losses = {name: {"loss": 2.0, "standard_error": 0.1} for name in ("base", "base+recovered")}
    paired = {"base+recovered": {"against": "base", "difference": -0.5, "standard_error": 0.1}}
    held = {"kind": "in_domain", "source": "a.txt", "tokens": 640, "documents": 10}
    scores = {name: {"value": 0.5, "standard_error": 0.1} for name in losses}
    evaluation = {
        "kind": "evaluation",
        "schema_version": 1,
        "base": {"id": "base"},
        "models": {name: {"label": name} for name in losses},
        "perplexity": {"held-out": {**held, "models": losses, "paired": paired}},
        "tasks": {"task": {"metric": "acc", "samples": 10, "models": scores}},
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


LAST_LOG = {"step": 4, "eval_loss": 1.25, "train_runtime": 1.0, "epoch": 1.0}


def write_indices(folder: Path, config: Mapping[str, Any]) -> Path:
    """Index files as the reference code of LoRAM writes them."""
    import torch

    folder.mkdir()
    for layer in (1, 2):
        torch.save({"pruned_idx": torch.arange(8)}, folder / f"model.layers.{layer}.mlp.{GATE}")
        torch.save({"pruned_idx": torch.arange(4, 8)}, folder / f"model.layers.{layer}.{KEY}")
    return folder


GATE, KEY = "gate_proj.pt", "self_attn.k_proj.pt"


@dataclass
class Artefacts:
    """A base, its pruned version, an adapter trained on that, and all that goes with them; whole.

    Attributes:
        base: A model.
        pruned: What is pruned of it.
        adapter: Trained on that.
        run: The adapter recovered, with what training and evaluation leave beside.
        settings: The YAML of the run, and its DeepSpeed config.
        indices: Index files of the reference code.
    """

    base: Path
    pruned: Path
    adapter: Path
    run: Path
    settings: Path
    indices: Path

    @classmethod
    def make(cls, folder: Path, model_type: str) -> Artefacts:
        """Make them below a new folder."""
        base = write_model(folder / "base", {**CONFIGS[model_type], "model_type": model_type})
        write_tokenizer(base)
        prune(str(base), folder / "pruned", PruningArgs(ratio=0.5, protect_first=1, protect_last=1))
        plan = PruningPlan.load(folder / "pruned")
        adapter = write_adapter(folder / "adapter", plan, folder / "pruned")
        return cls(
            base,
            folder / "pruned",
            adapter,
            write_run(folder / "run", adapter),
            write_settings(folder / "settings", base),
            write_indices(folder / "indices", plan.config),
        )


def _read_base(whole: Artefacts, suspect: Path) -> None:
    config = load_config(str(suspect))
    summary(config, keep_counts(config, 0.5, 1, 1))
    Checkpoint(suspect).fingerprint()


def _pair(whole: Artefacts, suspect: Path) -> None:
    check_base(PruningPlan.load(whole.pruned), str(suspect))


def _read_pruned(whole: Artefacts, suspect: Path) -> None:
    plan = PruningPlan.load(suspect)
    check_pruned(suspect, plan)
    summary(plan.config, plan.counts)


def _recover(whole: Artefacts, suspect: Path) -> None:
    Record.load(suspect)
    recover(suspect, str(whole.pruned), suspect.parent / "recovered", overwrite=True)


def _recover_under(whole: Artefacts, suspect: Path) -> None:
    recover(whole.adapter, str(suspect), suspect.parent / "recovered", overwrite=True)


def _match(whole: Artefacts, suspect: Path) -> None:
    match(Adapter.open(suspect), PruningPlan.load(whole.pruned), full_size=False)


def _inspect(whole: Artefacts, suspect: Path) -> None:
    inspect(str(suspect), verifying=True)


def _servable(whole: Artefacts, suspect: Path) -> None:
    (suspect / RECORD_FILE).unlink(missing_ok=True)  # it says that the adapter is not recovered
    assert all(map(str, verdicts(subject_of(suspect))))


def _tokenizer(whole: Artefacts, suspect: Path) -> None:
    check_adapter_tokenizer(suspect, whole.pruned)


def _plan_yaml(whole: Artefacts, suspect: Path) -> None:
    file = str(suspect / "run.yml")
    if cluster.is_alignment(file, None):
        cluster.align_request(file, None, {}, str(whole.settings / "zero.json"))
    else:
        request(file)


def _deepspeed(whole: Artefacts, suspect: Path) -> None:
    run = {"gradient_accumulation_steps": 1, "batch_size": 2, "micro_batch_size": 2, "bf16": True}
    read_zero(suspect / "zero.json")
    check_deepspeed(run, read_deepspeed(str(suspect / "zero.json")))


def _report(whole: Artefacts, suspect: Path) -> None:
    build([suspect])


def _indices(whole: Artefacts, suspect: Path) -> None:
    config = load_config(str(whole.base))
    PruningPlan(config, read_indices(suspect, config))


@dataclass(frozen=True)
class Door:
    """A way in: what reads a folder of which kind, and the files there that a stranger wrote."""

    enter: Callable[[Artefacts, Path], None]
    kind: str
    files: tuple[str, ...]


SHARD, INDEX = "model-00001-of-00002.safetensors", f"{MODEL_FILE}.index.json"
DOORS = {
    "base config": Door(_read_base, "base", ("config.json",)),
    "base index": Door(_read_base, "base", (INDEX,)),
    "base shard": Door(_read_base, "base", (SHARD,)),
    "base pairing": Door(_pair, "base", ("config.json", INDEX, SHARD)),
    "pruned config": Door(_read_pruned, "pruned", ("config.json",)),
    "pruned weights": Door(_read_pruned, "pruned", ("model*.safetensors*",)),
    "plan": Door(_read_pruned, "pruned", (PLAN_FILE,)),
    "record": Door(_read_pruned, "pruned", (RECORD_FILE,)),
    "plan for recovery": Door(_recover_under, "pruned", (PLAN_FILE, RECORD_FILE)),
    "adapter config": Door(_recover, "adapter", (ADAPTER_CONFIG,)),
    "adapter weights": Door(_recover, "adapter", (ADAPTER_FILE,)),
    "adapter names": Door(_match, "adapter", (ADAPTER_FILE,)),
    "pruned, verified": Door(_inspect, "pruned", (RECORD_FILE, PLAN_FILE, "config.json", INDEX)),
    "adapter, verified": Door(_inspect, "adapter", (RECORD_FILE, ADAPTER_CONFIG, ADAPTER_FILE)),
    "adapter to serve": Door(_servable, "adapter", (ADAPTER_CONFIG, ADAPTER_FILE)),
    "adapter record": Door(_recover, "adapter", (RECORD_FILE,)),
    "tokenizer": Door(_tokenizer, "pruned", ("tokenizer.json",)),
    "plan of a YAML": Door(_plan_yaml, "settings", ("run.yml",)),
    "DeepSpeed config": Door(_deepspeed, "settings", ("zero.json",)),
    "report": Door(_report, "run", (EVALUATION_FILE, TRAINER_STATE, RECORD_FILE, ADAPTER_CONFIG)),
    "reference indices": Door(_indices, "indices", ("*.pt",)),
}


class Suspect:
    """A copy of whole artefacts of one kind, in which one file at a time is mutated."""

    def __init__(self, door: Door, whole: Artefacts, folder: Path) -> None:
        self.door, self.whole, self.folder = door, whole, folder
        shutil.copytree(getattr(whole, door.kind), folder)
        self.files = sorted(file for pattern in door.files for file in folder.glob(pattern))

    def attempt(self, seed: int) -> None:
        """Mutate a file, go in, and put the file back.

        Raises:
            LoRAMError: The door said why it does not open. Anything else is a fault of ours.
        """
        chance = random.Random(seed)
        file = chance.choice(self.files)
        before = file.read_bytes()
        try:
            mutate_file(file, chance)
            self.door.enter(self.whole, self.folder)
        finally:
            file.unlink(missing_ok=True)
            file.write_bytes(before)
