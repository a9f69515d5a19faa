"""Defaults that depend on others, as settings arrive through Axolotl, which writes them all out."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import byte_tokenizer, run_command, write_yaml

from axolotl_loram.config import Pruning, PruningArgs
from axolotl_loram.pruning.cache import prune_into_cache

EXPERTS = "expert_neurons,kv_groups"


@pytest.mark.parametrize(
    ("named", "own_text", "method", "refit"),
    [
        ({"ratio": 0.5}, False, "random", False),
        ({"ratio": 0.5}, True, "activation", True),
        ({"ratio": 0.5, "calibration_path": "a.txt"}, False, "activation", True),
        ({"ratio": 0.5, "method": "random"}, True, "random", False),
        ({"ratio": 0.5, "method": "random", "refit": True}, True, "random", True),
        ({"ratio": 0.5, "method": "random", "calibration_path": "a.txt"}, False, "random", True),
        ({"ratio": 0.5, "method": "taylor"}, True, "taylor", True),
        ({"ratio": 0.5, "refit": False}, True, "activation", False),
        ({"ratio": 0.5, "units": EXPERTS}, True, "activation", True),
        ({"ratio": {"experts": 0.5, "expert_neurons": 0.3}}, True, "activation", True),
        ({"sparsity": 0.5}, True, "magnitude", False),
        ({"sparsity": "2:4", "method": "sparsegpt"}, True, "sparsegpt", False),
        ({"indices_path": "indices"}, True, "random", False),
    ],
)
def test_what_is_not_named_follows_from_what_is(named, own_text, method, refit):
    args = PruningArgs(**named)
    found = args.resolve(own_text)
    assert (found.method, found.refit) == (method, refit)
    assert found.protected == ((0, 0) if "sparsity" in named else (4, 2))
    assert found.resolve() == found.resolve(own_text=True) == found
    # As Axolotl hands it over: every default written out, None left away.
    handed_over = PruningArgs(**args.model_dump(exclude_none=True))
    assert handed_over.resolve(own_text) == found


def test_nothing_is_left_open():
    open_ones = {n for n, f in PruningArgs.model_fields.items() if f.default is None}
    settled = {n for n, f in Pruning.model_fields.items() if f.is_required()}
    given = {"ratio", "sparsity", "units", "calibration_path", "device", "indices_path", "quantize"}
    assert open_ones == settled | given  # what is given, or not; where it computes is the machine's
    assert PruningArgs(ratio=0.5).resolve(longest=64).calibration_length == 64
    assert PruningArgs(ratio=0.5).resolve(longest=4096).calibration_length == 512


@pytest.mark.parametrize(("rows", "samples", "length"), [(40, 3, 256), (5, 2, 50)])
def test_a_little_text_is_enough_where_nobody_asked_for_a_length(
    make_model, tmp_path, rows, samples, length
):
    """The pico model reads 256 tokens at most."""
    texts = [[token] * 20 for token in range(3, 3 + rows)]
    settings = PruningArgs(ratio=0.5)
    folder = prune_into_cache(str(make_model()), None, settings, str(tmp_path), lambda: iter(texts))
    record = json.loads((folder / "loram.json").read_text())
    assert record["pruning"]["method"] == "activation" and record["refit"]
    found = record["calibration"]
    assert (found["samples"], found["length"]) == (samples, length)


def records(cache: Path) -> list[dict]:
    return [json.loads(file.read_text()) for file in cache.glob("*/loram.json")]


@pytest.mark.slow
def test_the_readme_section_prunes_by_what_readme_says(make_model, settings, tmp_path, monkeypatch):
    """`loram: {pruning: {ratio: 0.5}}` through preprocess, train, merge-lora and evaluate."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("AXOLOTL_LORAM_CACHE", str(cache))
    file = write_yaml(
        tmp_path / "loram.yml", settings(make_model(), loram={"pruning": {"ratio": 0.5}})
    )
    run_command("axolotl", "preprocess", file)
    assert not cache.exists()
    log = run_command("axolotl", "train", file, "--launcher", "python")
    assert "taken as it is" not in log.stdout + log.stderr  # every server takes it
    (record,) = records(cache)
    assert record["pruning"]["method"] == "activation" and record["pruning"]["refit"] is True
    assert (record["pruning"]["protect_first"], record["pruning"]["protect_last"]) == (4, 2)
    assert len(record["refit"]) == 4 and any(fit["accepted"] for fit in record["refit"].values())
    calibration = record["calibration"]
    assert calibration["source"] == "the run's datasets" and len(calibration["sha256"]) == 64

    run_command("axolotl", "merge-lora", file)
    run_command("axolotl", "evaluate", file, "--launcher", "python")
    assert records(cache) == [record]  # no other command prunes, or prunes otherwise


@pytest.mark.slow
def test_the_run_is_calibrated_on_its_own_data(make_model, settings, text_file, tmp_path):
    """The tokens whose hash is in `loram.json` are those of the run's rows."""
    from axolotl_loram.text.axolotl_text import load_yaml, token_rows
    from axolotl_loram.text.calibration import pack_checked

    base, cache = make_model(), tmp_path / "cache"
    section = {"pruning": {"ratio": 0.5, "calibration_length": 64}, "cache_dir": str(cache)}
    file = write_yaml(tmp_path / "loram.yml", settings(base, loram=section))
    run_command("axolotl", "train", file, "--launcher", "python")
    (record,) = records(cache)
    rows = list(token_rows(load_yaml(file)))
    text = "".join(json.loads(line)["text"] for line in text_file.read_text().splitlines())
    assert all(byte_tokenizer().decode(row, skip_special_tokens=True) in text for row in rows)
    wanted = pack_checked(rows, PruningArgs(**section["pruning"]).resolve(), base, "").tokens
    digest = hashlib.sha256(np.ascontiguousarray(wanted, "<i8").tobytes()).hexdigest()
    assert record["calibration"]["sha256"] == digest


PAIRS = [
    {"prompt": f"{i} and {i} make ", "chosen": f"{2 * i}.", "rejected": f"{2 * i + 1}."}
    for i in range(60)
]
JUDGED = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in PAIRS]


@pytest.mark.slow
@pytest.mark.parametrize(("rl", "rows"), [("dpo", PAIRS), ("kto", JUDGED)])
def test_preference_data_are_calibrated_on_what_is_preferred(
    make_model, settings, tmp_path, rl, rows
):
    base, cache, data = make_model(), tmp_path / "cache", tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    named = {"path": str(data), "ds_type": "json", "split": "train", "type": None}
    changes = {"rl": rl, "datasets": [named], "remove_unused_columns": False, "sequence_len": 128}
    pruning = {"ratio": 0.5, "calibration_length": 8}
    section = {"loram": {"pruning": pruning, "cache_dir": str(cache)}}
    file = write_yaml(tmp_path / "run.yml", settings(base, **changes, **section))
    run_command("axolotl", "train", file, "--launcher", "python")
    (record,) = records(cache)
    assert record["pruning"]["method"] == "activation"
    written = sum(len(row["prompt"] + row.get("chosen", row.get("completion", ""))) for row in rows)
    assert 0.8 * written < record["calibration"]["tokens"] <= written  # 0.1 are held out
    assert json.loads((tmp_path / "out/loram.json").read_text())["kind"] == "recovered-adapter"
