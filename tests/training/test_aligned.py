"""The checkpoint that an alignment leaves."""

import json
import shutil

import pytest
import torch
from axolotl.utils.dict import DictDefault
from safetensors.torch import load_file, save_file
from test_align import pruned  # noqa: F401  (a fixture)
from test_recover import train_on
from transformers import (
    AutoModelForCausalLM,
)

import axolotl_loram.heterogeneous  # noqa: F401
from axolotl_loram.architecture.pairing import check_pruned
from axolotl_loram.architecture.plan import PruningPlan
from axolotl_loram.architecture.record import Record
from axolotl_loram.errors import LoRAMError
from axolotl_loram.recovery.recover import recover
from axolotl_loram.training.aligned import assemble
from axolotl_loram.training.run import begin_training


def trained_folder(pruned, folder, change=lambda name, weight: weight + 0.125, shards=1):
    """What a trainer saves: the pruned model, its weights changed."""
    shutil.copytree(pruned, folder)
    (folder / "loram_plan.safetensors").unlink()
    weights = {n: change(n, w) for n, w in load_file(pruned / "model.safetensors").items()}
    weights = {name: weight for name, weight in weights.items() if weight is not None}
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return weights
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {n: weights[n] for n in sorted(weights)[shard::shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return weights


def test_the_aligned_checkpoint_is_a_pruned_one(pruned, tmp_path):
    """Shards move over without a copy; an earlier result goes; the record grows by an entry."""
    trained, output = tmp_path / "out/training", tmp_path / "out"
    output.mkdir()
    trained_folder(pruned, trained)
    assemble(trained, pruned, output, {"steps": 1})
    weights = trained_folder(pruned, tmp_path / "again", lambda n, w: w * 2, shards=3)
    shutil.rmtree(trained)
    shutil.move(tmp_path / "again", trained)
    inode = (trained / "model-00001-of-00003.safetensors").stat().st_ino
    record = assemble(trained, output, output, {"steps": 2})

    assert (output / "model-00001-of-00003.safetensors").stat().st_ino == inode
    assert not list(trained.glob("*.safetensors*")) and not (output / "model.safetensors").exists()
    assert record == Record.load(output).as_json() and [
        a["steps"] for a in record["alignments"]
    ] == [1, 2]
    plan = PruningPlan.load(output)
    check_pruned(output, plan)
    assert plan.digest == PruningPlan.load(pruned).digest == record["plan"]
    assert (output / "config.json").read_bytes() == (pruned / "config.json").read_bytes()
    hashes = {file.name for file in output.iterdir() if file.is_file()} - {"loram.json"}
    assert record["files"].keys() == hashes >= {"tokenizer.json", "loram_plan.safetensors"}
    model = AutoModelForCausalLM.from_pretrained(output)
    for name, weight in weights.items():
        assert torch.equal(model.state_dict()[name], weight)


def test_weights_keep_the_dtype_of_the_pruned_checkpoint(pruned, tmp_path):
    """Those that were frozen keep their bits too."""
    stored = {n: w.bfloat16() for n, w in load_file(pruned / "model.safetensors").items()}
    half = tmp_path / "half"
    shutil.copytree(pruned, half)
    save_file(stored, half / "model.safetensors", metadata={"format": "pt"})
    weights = trained_folder(pruned, tmp_path / "trained")
    assemble(tmp_path / "trained", half, tmp_path / "out", {}, ["lm_head.weight"])
    made = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(made.pop("lm_head.weight"), stored["lm_head.weight"])
    for name, weight in made.items():
        assert torch.equal(weight, weights[name].bfloat16()) and weight.dtype == torch.bfloat16


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda weight: None, f"found no {NORM}"),
        (lambda weight: weight[:0], rf"expected {NORM} of shape \[32\] .*, found \[0\]"),
        (lambda weight: weight * torch.nan, f"NaN or infinity in {NORM}: the alignment diverged"),
        (lambda weight: (weight * torch.inf).bfloat16(), f"NaN or infinity in {NORM}"),
    ],
)
def test_no_incomplete_checkpoint_is_published(value, message, pruned, tmp_path):
    trained_folder(pruned, tmp_path / "good")
    assemble(tmp_path / "good", pruned, tmp_path / "out", {})
    before = {file: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    trained_folder(pruned, tmp_path / "bad", lambda n, w: value(w) if n == NORM else w)
    with pytest.raises(LoRAMError, match=message):
        assemble(tmp_path / "bad", pruned, tmp_path / "out", {})
    assert before == {file: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert (tmp_path / "bad/model.safetensors").exists()


def test_an_aligned_checkpoint_is_trained_on_and_recovered(pruned, make_model, tmp_path):
    trained_folder(pruned, tmp_path / "trained")
    assemble(tmp_path / "trained", pruned, tmp_path / "aligned", {})
    settings = {
        "base_model": str(make_model()),
        "output_dir": str(tmp_path / "out"),
        "loram": {"pruned_model_path": str(tmp_path / "aligned")},
    }
    begun = begin_training(DictDefault(settings))
    assert begun.pruned == tmp_path / "aligned"
    train_on(begun.pruned, begun.trained)
    record = recover(begun.trained, str(begun.pruned), begun.output, begun.base, update=True)
    assert record["plan"] == begun.plan.digest and (tmp_path / "out/adapter_config.json").exists()
