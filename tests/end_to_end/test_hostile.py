"""No artefact from a stranger does anything but open, or be refused in one sentence."""

import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import hostile
import mutations
import numpy as np
import pytest
import torch

from axolotl_loram.architecture.config_json import load_config
from axolotl_loram.architecture.plan import PLAN_FILE, PruningPlan
from axolotl_loram.architecture.reference import read_indices
from axolotl_loram.config import PruningArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files import untrusted
from axolotl_loram.files.tensors import ADAPTER_FILE, Checkpoint
from axolotl_loram.files.untrusted import copy_files, read_json, read_yaml
from axolotl_loram.pruning.prune import prune

MOST_BYTES = 100 * 2**20
"""Beyond what the imports take: the artefacts are a few kB, whatever sizes they claim."""


@pytest.fixture(scope="module", params=hostile.CONFIGS)
def whole(request, tmp_path_factory):
    return hostile.Artefacts.make(tmp_path_factory.mktemp("whole"), request.param)


def test_doors_open_or_say_why_not():
    script = Path(__file__).parents[2] / "benchmarks/fuzz.py"
    found = subprocess.run(
        [sys.executable, script, "--cases", "40", "--seed", "7", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(found.stdout)
    assert result["failures"] == []
    assert result["cases"] == 40 * len(hostile.DOORS) * len(hostile.CONFIGS)
    assert min(result["opened"], result["refused"]) > result["cases"] / 10
    assert result["peak_bytes"] - result["idle_bytes"] < MOST_BYTES


@pytest.mark.parametrize("name", hostile.DOORS)
def test_doors_open_for_whole_artefacts(whole, name, tmp_path):
    door = hostile.DOORS[name]
    suspect = tmp_path / "suspect"
    suspect.symlink_to(getattr(whole, door.kind))  # a folder of one's own may be a link
    door.enter(whole, suspect)


@pytest.fixture
def model(tmp_path):
    return hostile.write_model(tmp_path / "model", {**hostile.SMALL, "model_type": "llama"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 10**30}, "at most 1000 layers"),
        ({"hidden_size": 2**40}, "sizes of at most"),
        ({"per_layer_config": {"9": {}}}, "per_layer_config"),
        ({"per_layer_config": ["9"]}, "per_layer_config"),
        ({"per_layer_config": 9}, "per_layer_config"),
        ({"per_layer_config": {"1": 9}}, "per_layer_config"),
        ({"per_layer_config": {"1": {}, "01": {}}}, "each once"),
        ({"per_layer_config": {"-1": {}}}, "of layers 0…"),
        ({"per_layer_config": {"\u0661": {}}}, "of layers 0…"),
        ({"per_layer_config": {" 1": {}}}, "of layers 0…"),
        ({"per_layer_config": {"1.0": {}}}, "of layers 0…"),
        ({"per_layer_config": {"0" * 10_000 + "1": {}}}, "of layers 0…"),
        ({"per_layer_config": {"9" * 10_000: {}}}, "of layers 0…"),
        ({"per_layer_config": {str(n): {} for n in range(10**5)}}, "of layers 0…"),
        ({"model_type": ["llama"]}, "unknown architecture"),
    ],
)
def test_configs_beyond_any_model_are_refused(model, change, message):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(LoRAMError, match=message):
        load_config(str(model))


def test_nested_json_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(LoRAMError, match="expected a JSON object in"):
        read_json(tmp_path / "a.json")


def test_halves_of_characters_are_refused(tmp_path):
    """JSON can say them, but no card or record can be written with them."""
    file = tmp_path / "a.json"
    file.write_text('{"base": "\\ud83d\\ude00"}')
    assert read_json(file) == {"base": "😀"}
    file.write_text('{"base": "\\ud800"}')
    with pytest.raises(LoRAMError, match="surrogates not allowed"):
        read_json(file)


def test_endless_json_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(untrusted, "MOST_JSON_BYTES", 1_000)
    (tmp_path / "a.json").write_text('{"a": "' + "x" * 1_000 + '"}')
    with pytest.raises(LoRAMError, match="at most 1000 bytes"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("target", ["/etc/hostname", "../secret.json", "/dev/zero", "a.json"])
def test_links_out_of_a_folder_are_not_followed(tmp_path, target):
    (tmp_path / "secret.json").write_text('{"a": 1}')
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.json").symlink_to(target)
    with pytest.raises(LoRAMError, match="expected an ordinary file"):
        read_json(folder / "a.json")


def test_tokenizers_that_are_links_are_not_copied(model, tmp_path):
    (tmp_path / "secret").write_text("hunter2")
    (model / "tokenizer_config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(LoRAMError, match="expected an ordinary file"):
        prune(str(model), tmp_path / "pruned", PruningArgs(ratio=0.5))
    assert not (tmp_path / "pruned").exists()
    assert "hunter2" not in "".join(
        file.read_text(errors="replace")
        for file in tmp_path.rglob("*")
        if file.name != "secret" and file.is_file() and not file.is_symlink()
    )


def test_the_hub_s_cache_may_link_to_its_blobs(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots/abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "1").write_text('{"a": 1}')
    (snapshot / "a.json").symlink_to("../../blobs/1")
    assert read_json(snapshot / "a.json") == {"a": 1}
    copy_files(snapshot, tmp_path, ["a.json"])
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a/b.safetensors", "..", 3])
def test_an_index_cannot_point_out_of_its_folder(model, name):
    index = model / hostile.INDEX
    listed = json.loads(index.read_text())
    listed["weight_map"]["lm_head.weight"] = name
    index.write_text(json.dumps(listed))
    with pytest.raises(LoRAMError, match="plain file names"):
        Checkpoint(model)


@pytest.mark.parametrize(
    ("shape", "offsets"),
    [
        ([2**63], [0, 2**63]),
        ([2**32, 2**32], [0, 0]),
        ([2**63], [0, 8]),
        ([-1], [0, 8]),
        ([2, 2], [8, 0]),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", PLAN_FILE, ADAPTER_FILE])
def test_headers_cannot_claim_more_than_the_file_has(shape, offsets, name, tmp_path):
    header = {"a": {"dtype": "I32", "shape": shape, "data_offsets": offsets}}
    header["__metadata__"] = {"loram": json.dumps({"schema_version": 1})}
    text = json.dumps(header).encode()
    (tmp_path / name).write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(LoRAMError, match="expected a whole safetensors file"):
        if name == PLAN_FILE:
            PruningPlan.load(tmp_path)
        else:
            Checkpoint(tmp_path, name)


@pytest.mark.parametrize("length", [0, 2**27, 2**63, 2**64 - 1])
def test_headers_of_any_length_are_not_read(length, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}" + bytes(8))
    with pytest.raises(LoRAMError, match="expected a whole safetensors file"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("units", [[3, 2], [2, 2], [-1, 2], [2, 24], [2**31 - 1, 2], [-(2**31)]])
def test_stored_plans_with_impossible_units_are_refused(whole, units, tmp_path):
    plan = PruningPlan.load(whole.pruned)
    entry = next(iter(plan.kept))
    shape = plan.kept[entry].shape
    wrong = np.resize(np.array(units, np.int32), shape if len(shape) == 2 else len(units))
    object.__setattr__(plan, "kept", {**plan.kept, entry: wrong})
    plan.save(tmp_path)
    with pytest.raises(LoRAMError, match="ascending, each in"):
        PruningPlan.load(tmp_path)


@pytest.mark.parametrize("name", [hostile.SHARD, hostile.INDEX, "config.json"])
def test_models_that_link_out_of_their_folder_are_refused(model, name, tmp_path):
    (model / name).rename(tmp_path / "elsewhere")
    (model / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LoRAMError, match="expected an ordinary file"):
        load_config(str(model))
        Checkpoint(model)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (mutations.BOMB, "made to fill the memory"),
        (mutations.MERGES, "made to fill the memory"),
        ("a: &a\n  b: *a", "made to fill the memory"),
        ("a: " + "[" * 200_000, "brackets in one another"),
        ("- " * 100_000, "recursion depth"),
        ("a: !!python/object/apply:os.getcwd []", "constructor for the tag"),
        (f"a: {'1:' * 100_000}1", "at most 1000 characters"),
        ("a: [", "to be YAML"),
        ("a: " + "x" * 2**18, "at most 262144 bytes"),
    ],
)
def test_yaml_takes_bounded_time_and_memory(text, message, tmp_path):
    (tmp_path / "a.yml").write_text(text)
    start = time.process_time()
    with pytest.raises(LoRAMError, match=message):
        read_yaml(tmp_path / "a.yml")
    assert time.process_time() - start < 5


def test_yaml_of_users_may_be_linked_and_repeat_itself(tmp_path):
    (tmp_path / "a.yml").write_text("a: &a {b: 1}\nc: {<<: *a, d: [*a, *a]}")
    (tmp_path / "links").mkdir()
    (tmp_path / "links/b.yml").symlink_to(tmp_path / "a.yml")
    expected = {"a": {"b": 1}, "c": {"b": 1, "d": [{"b": 1}, {"b": 1}]}}
    assert read_yaml(tmp_path / "links/b.yml") == expected
    with pytest.raises(LoRAMError, match="expected an ordinary file"):
        read_yaml(Path("/dev/zero"))


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (torch.tensor([-1]), "positions in 0"),
        (torch.tensor([24]), "positions in 0"),
        (torch.tensor([2**62]), "positions in 0"),
        (torch.zeros(1, dtype=torch.long).expand(2**40), "at most 24 positions"),
        ([torch.arange(2), torch.arange(3)], "tensor of integers"),
        (torch.eye(3).long().to_sparse(), "tensor of integers"),
        (torch.empty(3, dtype=torch.long, device="meta"), "tensor of integers"),
        (torch.arange(2**22), "at most 16777216 bytes"),
        (torch.arange(24), "keep 1 to 24 units"),
    ],
)
def test_reference_indices_are_bounded(model, positions, message, tmp_path):
    torch.save({"pruned_idx": positions}, tmp_path / "model.layers.1.mlp.gate_proj.pt")
    config = load_config(str(model))
    with pytest.raises(LoRAMError, match=message):
        PruningPlan(config, read_indices(tmp_path, config))


def test_reference_indices_may_be_in_any_order_but_remove_whole_units(model, tmp_path):
    config = load_config(str(model))
    file = tmp_path / "model.layers.1.self_attn.k_proj.pt"
    torch.save({"pruned_idx": torch.tensor([7, 4, 6, 5, 5])}, file)
    assert read_indices(tmp_path, config)["model.layers.1.self_attn"].tolist() == [0]
    torch.save({"pruned_idx": torch.tensor([4, 5, 6])}, file)
    with pytest.raises(LoRAMError, match="units of 4 rows whole, found 3 rows of unit 1"):
        read_indices(tmp_path, config)


def test_index_files_that_unpack_to_more_are_refused(model, tmp_path):
    file = tmp_path / "model.layers.1.mlp.gate_proj.pt"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(2**25))
    assert file.stat().st_size < 2**16
    with pytest.raises(LoRAMError, match="at most 16777216 bytes"):
        read_indices(tmp_path, load_config(str(model)))
