"""Layer-wise alignment: nearer to the base, the same plan, resumable to the same bits."""

import json
from types import SimpleNamespace

import pytest
import torch
from calibrated import load, text_tokens
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from test_resume import Interruption, weights

from axolotl_loram.architecture.pairing import check_pruned
from axolotl_loram.architecture.plan import PruningPlan
from axolotl_loram.cli import main
from axolotl_loram.config import LayerwiseArgs, PruningArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.tensors import read_json
from axolotl_loram.models.stream import LayerStream
from axolotl_loram.pruning.prune import prune
from axolotl_loram.text.calibration import Calibration
from axolotl_loram.training.layerwise import align_layers

TOKENS = text_tokens(samples=16, length=48)
TEXT = Calibration(TOKENS, "a test", 0)
ARGS = LayerwiseArgs(calibration_path="a test", steps=12, batch_size=4, learning_rate=1e-2)


@pytest.fixture(scope="module")
def pruned(make_model, tmp_path_factory):
    """Families to (base, pruned, aligned), each made once."""
    made = {}

    def make(family="llama", **options):
        key = json.dumps([family, options], sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            base = make_model(family)
            prune(str(base), folder / "pruned", PruningArgs(ratio=0.5, **options))
            align_layers(str(folder / "pruned"), folder / "aligned", ARGS, calibration=TEXT)
            made[key] = base, folder / "pruned", folder / "aligned"
        return made[key]

    return make


def relative_errors(base, model, layer):
    """Of each held-out token, ‖y − y*‖² / ‖y*‖² after a layer, by the whole models."""
    held_out = torch.from_numpy(TOKENS[7::8])
    with torch.no_grad():
        own, wanted = (
            m(input_ids=held_out, output_hidden_states=True).hidden_states[layer + 1]
            for m in (model, base)
        )
    return (own - wanted).square().sum(-1) / wanted.square().sum(-1)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_layers_come_nearer_to_the_bases(family, pruned):
    base, before, after = pruned(family)
    plan = PruningPlan.load(after)
    assert plan.digest == PruningPlan.load(before).digest
    check_pruned(after, plan)
    assert read_json(after / "config.json") == read_json(before / "config.json")
    record = read_json(after / "loram.json")
    (alignment,) = record["alignments"]
    assert alignment["objective"] == "layerwise" and alignment["tokens"] == 12 * 4 * 48
    original, model, start = load(base), load(after), load(before)
    for index in plan.counts:
        facts = alignment["layers"][f"model.layers.{index}"]
        found = relative_errors(original, model, index).mean().item()
        assert facts["accepted"] and facts["heldout_error_after"] == pytest.approx(found, rel=1e-3)
        assert found < facts["heldout_error_before"]
        assert found < 0.9 * relative_errors(original, start, index).mean().item()
    first = min(plan.counts)
    assert alignment["layers"][f"model.layers.{first}"]["heldout_error_before"] == pytest.approx(
        relative_errors(original, start, first).mean().item(), rel=1e-3
    )
    old, new = (load_file(folder / "model.safetensors") for folder in (before, after))
    trained = tuple(f"model.layers.{index}." for index in plan.counts)
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {name for name in old if name.startswith(trained)}


def test_aligned_again_it_starts_from_there(pruned, tmp_path):
    _, _, after = pruned()
    align_layers(str(after), tmp_path / "again", ARGS, calibration=TEXT)
    first, second = read_json(tmp_path / "again/loram.json")["alignments"]
    name = min(first["layers"])
    start, end = second["layers"][name], first["layers"][name]
    assert start["heldout_error_before"] == pytest.approx(end["heldout_error_after"], rel=1e-5)


@pytest.mark.parametrize("share", [0.05, 0.4, 0.7, 1])
def test_interrupted_it_goes_on_to_the_same_weights(share, pruned, tmp_path):
    _, before, after = pruned()
    reports = ARGS.steps * 2  # one for each step of two layers, and those of writing
    at = max(1, int(reports * share)) + (share == 1)
    with pytest.raises(KeyboardInterrupt):
        progress = Interruption(at + 1)
        align_layers(str(before), tmp_path / "out", ARGS, progress=progress, calibration=TEXT)
    assert not (tmp_path / "out").exists()
    align_layers(str(before), tmp_path / "out", ARGS, calibration=TEXT)
    assert weights(tmp_path / "out") == weights(after)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_layers_that_come_no_nearer_stay(pruned, tmp_path):
    _, before, _ = pruned()
    settings = ARGS.model_copy(update={"learning_rate": 1e6})
    record = align_layers(str(before), tmp_path / "out", settings, calibration=TEXT)
    layers = record["alignments"][0]["layers"].values()
    assert not any(facts["accepted"] for facts in layers)
    assert weights(tmp_path / "out") == weights(before)


def test_models_that_do_not_belong_together_are_refused(make_model, pruned, tmp_path):
    _, before, _ = pruned()
    with pytest.raises(LoRAMError, match="it is another model, such as a fine-tuned one"):
        align_layers(str(before), tmp_path / "out", ARGS, str(make_model(seed=1)), calibration=TEXT)
    with pytest.raises(LoRAMError, match=r"expected loram_plan.safetensors in .*, found none"):
        align_layers(str(make_model()), tmp_path / "out", ARGS, calibration=TEXT)
    sparse = tmp_path / "sparse"
    prune(str(make_model()), sparse, PruningArgs(sparsity=0.5))
    with pytest.raises(LoRAMError, match="that lost whole units to align, found"):
        align_layers(str(sparse), tmp_path / "out", ARGS, calibration=TEXT)
    assert not (tmp_path / "out").exists()


def test_too_little_disk_is_said_before_the_work(pruned, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(LayerStream, "__init__", None)
    with pytest.raises(LoRAMError, match=r"GiB free for .*/out .* fewer --calibration-samples"):
        align_layers(str(pruned()[1]), tmp_path / "out", ARGS, calibration=TEXT)


def test_the_dtype_of_the_checkpoint_is_kept(make_model, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for file in make_model().iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    stored = load_file(base / "model.safetensors")
    halves = {name: values.bfloat16() for name, values in stored.items()}
    save_file(halves, base / "model.safetensors", {"format": "pt"})
    prune(str(base), tmp_path / "pruned", PruningArgs(ratio=0.5))
    record = align_layers(str(tmp_path / "pruned"), tmp_path / "out", ARGS, calibration=TEXT)
    found = load_file(tmp_path / "out/model.safetensors").values()
    assert {values.dtype for values in found} == {torch.bfloat16}
    plan = PruningPlan.load(tmp_path / "out")
    last = max(plan.counts)
    error = relative_errors(load(base), load(tmp_path / "out"), last).mean().item()
    facts = record["alignments"][0]["layers"][f"model.layers.{last}"]
    assert facts["heldout_error_after"] == pytest.approx(error, rel=1e-4)


def test_the_command(pruned, text_file, tmp_path):
    _, before, _ = pruned()
    options = ["--steps", "3", "--calibration-samples", "8", "--calibration-length", "32", "--json"]
    command = ["align", str(before), str(tmp_path / "out"), *options]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2 and "expected text to align on, found none" in result.stderr
    result = CliRunner().invoke(main, [*command, "--calibration", str(text_file)])
    shown = json.loads(result.stdout)
    assert shown["layers_tried"] == 2 and shown["tokens"] == 3 * 7 * 32
    assert shown["plan"] == PruningPlan.load(before).digest
    record = read_json(tmp_path / "out/loram.json")
    assert record["alignments"][0]["data"]["source"] == str(text_file)
