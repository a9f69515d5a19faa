"""What does not belong together, at every door: each has its own sentence."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from axolotl.utils.dict import DictDefault
from click.testing import CliRunner
from hostile import INDEX, SHARD, SMALL, write_adapter, write_model
from huggingface_hub import constants
from safetensors.numpy import load_file, save_file

from axolotl_loram.architecture.plan import Base, PruningPlan
from axolotl_loram.cli import main
from axolotl_loram.config import PruningArgs
from axolotl_loram.errors import LONGEST, LoRAMError
from axolotl_loram.pruning.prune import prune
from axolotl_loram.recovery.merge import merge_masked
from axolotl_loram.recovery.recover import recover
from axolotl_loram.results.candidates import MODELS, trial_of
from axolotl_loram.training.align import begin_alignment
from axolotl_loram.training.aligned import assemble
from axolotl_loram.training.run import begin_training, use_recovered_adapter

LLAMA = {**SMALL, "model_type": "llama"}
HALF = {"ratio": 0.5, "protect_first": 1, "protect_last": 1}
ADAPTER = "adapter_model.safetensors"
MODULE = "base_model.model.model.layers.2.mlp.up_proj"
SECOND = SHARD.replace("00001", "00002")


def write_tokenizer(folder, seed=0):
    order = np.random.default_rng(seed).permutation(32)
    vocabulary = {f"t{token}": int(number) for token, number in enumerate(order)}
    tokenizer = {"added_tokens": [], "model": {"type": "BPE", "vocab": vocabulary, "merges": []}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base and all that comes of it, and what is like them; folders name one another plainly."""
    folder = tmp_path_factory.mktemp("pairings")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_tokenizer(write_model(Path("base"), LLAMA))
        write_tokenizer(write_model(Path("tuned"), LLAMA, seed=1))
        write_tokenizer(write_model(Path("larger"), LLAMA | {"intermediate_size": 32}))
        for name, base, settings in (
            ("pruned", "base", HALF),
            ("other", "base", HALF | {"seed": 1}),
            ("quarter", "base", HALF | {"ratio": 0.25}),
            ("pruned-tuned", "tuned", HALF),
            ("sparse", "base", {"method": "magnitude", "sparsity": 0.5}),
        ):
            prune(base, Path(name), PruningArgs(**settings))
        for name, pruned in (("adapter", "pruned"), ("masked", "sparse")):
            write_adapter(Path(name), PruningPlan.load(Path(pruned)), Path(pruned))
            write_tokenizer(Path(name))
        recover(Path("adapter"), output=Path("run"))
        shutil.copytree("adapter", "run/pruned")
        trained = [SHARD, SECOND, INDEX]
        Path("run/trained").mkdir()
        for name in trained:
            shutil.copy(f"pruned/{name}", "run/trained")
    return folder


@pytest.fixture
def world(made, tmp_path, monkeypatch):
    """A copy of it to spoil, and to work in."""
    shutil.copytree(made, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    return tmp_path / "world"


def settings(**changes):
    return DictDefault(
        {
            "base_model": "base",
            "output_dir": "run",
            "loram": {"pruned_model_path": "pruned"},
            **changes,
        }
    )


def command(*arguments):
    result = CliRunner().invoke(main, list(arguments))
    if result.exit_code:
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error")]
        raise LoRAMError(line)


ALIGNED = {"stage": "align", "objective": "next-token"}
DOORS = {
    "train": lambda: begin_training(settings()),
    "recover": lambda: command("recover", "adapter", "--output", "fresh"),
    "merge": lambda: merge_masked(Path("masked"), output=Path("fresh"), base=Base("base")),
    "evaluate": lambda: trial_of(settings(), MODELS, {}),
    "axolotl merge-lora": lambda: use_recovered_adapter(settings()),
    "assemble": lambda: assemble(Path("run/trained"), Path("pruned"), Path("fresh"), {}),
    "publish model": lambda: command("publish", "pruned", "some-org/x", "--dry-run"),
    "publish adapter": lambda: command("publish", "run", "some-org/x", "--dry-run"),
    "inspect model": lambda: command("inspect", "pruned", "--verify", "--base", "base"),
    "inspect trained": lambda: command("inspect", "adapter", "--verify"),
    "inspect adapter": lambda: command("inspect", "run", "--verify", "--base", "base"),
}


@pytest.mark.parametrize("door", DOORS)
def test_what_belongs_together_goes_in(door, world):
    DOORS[door]()


def replaced(name, by):
    shutil.rmtree(name)
    shutil.copytree(by, name)


def each_adapter(harm):
    for folder in ("adapter", "masked", "run", "run/pruned"):
        weights = load_file(f"{folder}/{ADAPTER}")
        harm(weights)
        save_file(weights, f"{folder}/{ADAPTER}", metadata={"format": "pt"})


def without_module(weights):
    for side in "AB":
        del weights[f"{MODULE}.lora_{side}.weight"]


def with_unknown_module(weights):
    for side in "AB":
        name = f"{MODULE}.lora_{side}.weight"
        weights[name.replace("up_proj", "side_proj")] = weights[name]


def with_zero_b(weights):
    for name, weight in weights.items():
        weight *= "lora_A" in name


def of_rank_one(weights):
    weights[f"{MODULE}.lora_A.weight"] = weights[f"{MODULE}.lora_A.weight"][:1].copy()


def names_fewer_modules():
    for folder in ("adapter", "masked", "run", "run/pruned"):
        file = Path(folder, "adapter_config.json")
        named = json.loads(file.read_text())
        named["target_modules"].remove("up_proj")
        file.write_text(json.dumps(named))


def dealt_otherwise(folder, source):
    """A shard of a run that dealt the tensors to three."""
    write_model(Path("three"), json.loads(Path(source, "config.json").read_text()), shards=3)
    shutil.copy("three/model-00002-of-00003.safetensors", f"{folder}/{SECOND}")


def plan_of(folder):
    shutil.copy(f"{folder}/loram_plan.safetensors", "pruned")


READS_MODEL = ("train", "evaluate", "inspect model", "publish model")
READS_BASE = ("train", "evaluate", "merge", "inspect model", "inspect adapter")
READS_ADAPTER = ("recover", "merge", "inspect trained", "inspect adapter", "publish adapter")
PAIRINGS = {
    "a base of another size": (
        lambda: replaced("base", "larger"),
        dict.fromkeys(("train", "evaluate", "merge", "inspect model"), "of another size")
        | {"inspect adapter": "made for another base"},
    ),
    "a fine-tuned base of the same size": (
        lambda: replaced("base", "tuned"),
        dict.fromkeys((*READS_BASE, "axolotl merge-lora"), "such as a fine-tuned one"),
    ),
    "a base with shards of two runs": (
        lambda: shutil.copy(f"tuned/{SECOND}", "base"),
        dict.fromkeys((*READS_BASE, "axolotl merge-lora"), "or a mixture of two"),
    ),
    "a base with shards dealt in two ways": (
        lambda: dealt_otherwise("base", "base"),
        dict.fromkeys((*READS_BASE, "axolotl merge-lora"), "expected every tensor in one file"),
    ),
    "a base with another tokenizer": (
        lambda: write_tokenizer(Path("base"), 1),
        dict.fromkeys(("train", "evaluate", "inspect model"), "to be the pruned model's"),
    ),
    "a pruned model with another tokenizer": (
        lambda: write_tokenizer(Path("pruned"), 1),
        dict.fromkeys(("train", "evaluate"), "was pruned with")
        | dict.fromkeys(("inspect model", "publish model"), "vocabulary is another than the one"),
    ),
    "an adapter with another tokenizer": (
        lambda: [write_tokenizer(Path(name), 1) for name in ("adapter", "masked", "run")],
        dict.fromkeys(READS_ADAPTER, "expected an adapter trained with the tokenizer"),
    ),
    "an adapter of another plan": (
        lambda: replaced("pruned", "other"),
        dict.fromkeys(
            ("recover", "inspect trained", "inspect adapter", "publish adapter"),
            "expected an adapter trained under plan",
        )
        | {"evaluate": "under another plan", "train": "choose another output_dir"},
    ),
    "a plan of another ratio": (
        lambda: plan_of("quarter"),
        dict.fromkeys((*READS_MODEL, "recover", "assemble"), "with another pruning ratio"),
    ),
    "a plan of another pruning": (
        lambda: plan_of("other"),
        dict.fromkeys((*READS_MODEL, "recover", "assemble"), "are from two prunings"),
    ),
    "a pruned model with shards of two runs": (
        lambda: shutil.copy(f"pruned-tuned/{SECOND}", "pruned"),
        dict.fromkeys(READS_MODEL, "a shard is from another run"),
    ),
    "a pruned model with shards dealt in two ways": (
        lambda: dealt_otherwise("pruned", "pruned"),
        dict.fromkeys((*READS_MODEL, "assemble"), "expected every tensor in one file"),
    ),
    "a trained model with shards dealt in two ways": (
        lambda: dealt_otherwise("run/trained", "pruned"),
        {"assemble": "expected every tensor in one file"},
    ),
    "an adapter with a module too few": (
        lambda: each_adapter(without_module),
        dict.fromkeys(READS_ADAPTER, "expected LoRA on all target_modules"),
    ),
    "an adapter with a module that is not named": (
        names_fewer_modules,
        dict.fromkeys(READS_ADAPTER, "config and tensors are of two adapters"),
    ),
    "an adapter with a module that the base has not": (
        lambda: each_adapter(with_unknown_module),
        dict.fromkeys(READS_ADAPTER, "expected tensors of modules that the base has"),
    ),
    "an adapter with A or B alone": (
        lambda: each_adapter(lambda weights: weights.pop(f"{MODULE}.lora_B.weight")),
        dict.fromkeys(READS_ADAPTER, "without its partner"),
    ),
    "an adapter with A and B of two ranks": (
        lambda: each_adapter(of_rank_one),
        dict.fromkeys(READS_ADAPTER, "expected A and B of one rank"),
    ),
    "an adapter that was not trained": (
        lambda: each_adapter(with_zero_b),
        dict.fromkeys(("recover", "merge"), "as before the first step")
        | dict.fromkeys(READS_ADAPTER[2:], "all zero, so that BA is no update"),
    ),
}


@pytest.mark.parametrize(
    ("pairing", "door"), [(name, door) for name, (_, doors) in PAIRINGS.items() for door in doors]
)
def test_each_wrong_pairing_is_refused_in_its_own_words(pairing, door, world):
    harm, doors = PAIRINGS[pairing]
    harm()
    with pytest.raises(LoRAMError) as refused:
        DOORS[door]()
    assert doors[door] in str(refused.value)
    assert len(str(refused.value)) < 2 * LONGEST  # `inspect` names everything that is wrong
    assert not list(Path().glob("fresh/*config.json"))


def test_every_wrong_pairing_is_found_by_inspect():
    assert all(
        any(door.startswith("inspect") for door in doors)
        for name, (_, doors) in PAIRINGS.items()
        if not name.startswith("a trained model")  # which has no record
    )


def test_another_revision_is_named_with_the_right_one(world, monkeypatch):
    """Of a model on the hub: its cache has two commits, with other weights."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(world / "hub"))
    snapshots = world / "hub/models--some-org--base/snapshots"
    first, second = snapshots / ("1" * 40), snapshots / ("2" * 40)
    shutil.copytree("base", first)
    shutil.copytree("tuned", second)
    shutil.rmtree("pruned")
    prune("some-org/base", Path("pruned"), PruningArgs(**HALF), first.name)
    named = {"base_model": "some-org/base", "output_dir": "new"}
    begin_training(settings(**named, revision_of_model=first.name))
    wrong = f"at revision {first.name}, which was pruned, found other weights at {second.name}"
    with pytest.raises(LoRAMError, match=wrong):
        begin_training(settings(**named, revision_of_model=second.name))
    with pytest.raises(LoRAMError, match=wrong):
        command("inspect", "pruned", "--verify", "--base", str(second))
    command("inspect", "pruned", "--verify")


def test_a_warm_start_of_another_base_of_the_same_size_is_refused(world):
    begin_training(settings(output_dir="new", lora_model_dir="run"))
    record = json.loads(Path("run/loram.json").read_text())
    record["base"]["fingerprint"] = PruningPlan.load(Path("pruned-tuned")).base.fingerprint
    Path("run/loram.json").write_text(json.dumps(record))
    with pytest.raises(LoRAMError, match="expected a warm start for"):
        begin_training(settings(output_dir="new", lora_model_dir="run"))


def test_alignment_begins_on_a_whole_pruned_model_alone(world):
    cfg = settings(
        base_model="pruned", output_dir="aligned", loram=ALIGNED, learning_rate=0.1, datasets=[]
    )
    begin_alignment(DictDefault(cfg))
    shutil.copy(f"pruned-tuned/{SECOND}", "pruned")
    with pytest.raises(LoRAMError, match="a shard is from another run"):
        begin_alignment(DictDefault(cfg))


def test_records_without_fingerprint_and_vocabulary_are_valid(world):
    """Older versions wrote neither."""
    record = json.loads(Path("pruned/loram.json").read_text())
    assert record.pop("fingerprint") and record.pop("vocabulary")
    Path("pruned/loram.json").write_text(json.dumps(record))
    for door in ("train", "recover", "evaluate", "inspect model"):
        DOORS[door]()


def test_a_tokenizer_with_added_tokens_is_the_same(world):
    tokenizer = json.loads(Path("adapter/tokenizer.json").read_text())
    tokenizer |= {"added_tokens": [{"id": 32, "content": "<pad>"}], "padding": {"length": 8}}
    Path("adapter/tokenizer.json").write_text(json.dumps(tokenizer))
    DOORS["recover"]()


def test_layers_and_modules_that_the_config_leaves_out_are_not_missing(world):
    file = Path("adapter/adapter_config.json")
    config = json.loads(file.read_text())
    chosen = {"exclude_modules": "model.layers.2.mlp.up_proj", "layers_to_transform": [0, 1, 2]}
    file.write_text(json.dumps(config | chosen))
    weights = load_file(f"adapter/{ADAPTER}")
    without_module(weights)
    kept = {name: weight for name, weight in weights.items() if ".layers.3." not in name}
    save_file(kept, f"adapter/{ADAPTER}", metadata={"format": "pt"})
    DOORS["recover"]()


@pytest.mark.parametrize("expression", ["(a|a)*b", "(.*)" * 30 + "x"])
def test_expressions_that_take_years_are_not_tried(world, expression):
    file = Path("adapter/adapter_config.json")
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"target_modules": expression}))
    DOORS["recover"]()
