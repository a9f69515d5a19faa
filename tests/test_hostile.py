"""No artefact from a stranger does anything but open, or be refused in one sentence."""

import json
import subprocess
import sys
from pathlib import Path

import hostile
import pytest

from axolotl_loram import untrusted
from axolotl_loram.args import PruningArgs
from axolotl_loram.checkpoint import Checkpoint
from axolotl_loram.errors import LoRAMError
from axolotl_loram.prune import prune
from axolotl_loram.sources import load_config
from axolotl_loram.untrusted import copy_files, read_json

MOST_BYTES = 100 * 2**20
"""Beyond what the imports take: the artefacts are a few kB, whatever sizes they claim."""


@pytest.fixture(scope="module", params=hostile.CONFIGS)
def whole(request, tmp_path_factory):
    return hostile.Artefacts.make(tmp_path_factory.mktemp("whole"), request.param)


def test_doors_open_or_say_why_not():
    script = Path(__file__).parent.parent / "benchmarks/fuzz.py"
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
