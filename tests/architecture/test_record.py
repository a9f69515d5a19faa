"""One reader and one writer of `loram.json`."""

import json
from pathlib import Path

import pytest
from conftest import build_model
from golden import HERE

from axolotl_loram.architecture.pairing import fingerprint_of
from axolotl_loram.architecture.plan import Base
from axolotl_loram.architecture.record import KEYS, Kind, Record
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.tensors import Checkpoint


@pytest.mark.parametrize("file", HERE.glob("*/*/loram.json"), ids=lambda file: file.parent.name)
def test_what_earlier_versions_wrote_is_written_again_byte_for_byte(file, tmp_path):
    record = Record.load(file.parent)
    for in_use in (False, True):
        record.save(tmp_path, in_use)
        assert (tmp_path / "loram.json").read_bytes() == file.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["loram.json"]


@pytest.mark.parametrize("kind", Kind)
def test_every_kind_holds_its_keys_and_comes_back(kind, tmp_path):
    record = Record(kind, Base("some-org/base") if "base" in KEYS[kind] else None, "sha256:1")
    record.save(tmp_path)
    found = json.loads((tmp_path / "loram.json").read_text())
    assert list(found) == ["schema_version", "kind", *KEYS[kind]] and found["kind"] == kind.value
    assert Record.load(tmp_path) == record


def test_no_record_is_falsy_and_of_no_kind(tmp_path):
    record = Record.load(tmp_path)
    assert not record and record.kind is None and record.run == {}
    with pytest.raises(LoRAMError, match=r"expected a folder with loram\.json, found none"):
        record.require(tmp_path)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"kind": "pruned"}, "a kind out of pruned-model, .* found pruned"),
        ({"kind": ["pruned-model"]}, "expected kind in"),
        ({"files": {"a": 1}}, "the files of"),
        ({"masked": "yes"}, "expected masked in"),
        ({"alignments": {}}, "expected alignments in"),
        ({"seconds": "long"}, "expected seconds in"),
        ({"base": {"revision": "main"}}, "found no id"),
        ({"schema_version": 7}, "found 7: upgrade"),
    ],
)
def test_damaged_records_are_refused_in_one_sentence(said, message, tmp_path):
    (tmp_path / "loram.json").write_text(json.dumps({"kind": "pruned-model", **said}))
    with pytest.raises(LoRAMError, match=message):
        Record.load(tmp_path)


def test_a_fingerprint_is_computed_once_while_the_files_stay(tmp_path, monkeypatch):
    from axolotl_loram.architecture import pairing

    build_model().save_pretrained(tmp_path)
    first, hits = fingerprint_of(tmp_path), pairing._fingerprint.cache_info().hits
    monkeypatch.chdir(tmp_path)
    assert fingerprint_of(Path()) == first == Checkpoint(tmp_path).fingerprint()
    assert pairing._fingerprint.cache_info().hits == hits + 1
    build_model(seed=1).save_pretrained(tmp_path)
    assert fingerprint_of(tmp_path) == Checkpoint(tmp_path).fingerprint() != first
