"""The data of an Axolotl config as calibration text."""

import copy
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, run_command, write_yaml
from families import pico_config
from test_calibration import EOS, choose, write_rows

from axolotl_loram.config import PruningArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.pruning.cache import own_text
from axolotl_loram.text.axolotl_text import heldout_rows, load_yaml, token_rows
from axolotl_loram.text.calibration import load_calibration, pack_checked, pack_rows


def make_yaml(file: Path, settings: dict, **changes) -> Path:
    section = {"loram": {"pruning": {"ratio": 0.5}}, "adapter": "loram"}
    settings = {**settings, **section, **changes}
    return write_yaml(file, {name: value for name, value in settings.items() if value is not None})


def expected_rows(text_file: Path, length: int) -> Counter:
    """What Axolotl's `completion` type makes of the file, written down independently."""
    tokenizer, rows = byte_tokenizer(), Counter()
    for line in text_file.read_text(encoding="utf-8").splitlines():
        ids = [*tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"], EOS]
        rows.update(tuple(ids[i : i + length]) for i in range(0, len(ids), length))
    return rows


def test_a_yaml_gives_the_ids_that_it_trains_on(make_model, settings, text_file, tmp_path):
    file = make_yaml(tmp_path / "run.yml", settings(make_model()), tf32=True)
    before, precision = dict(os.environ), torch.get_float32_matmul_precision()
    cfg = load_yaml(file)
    untouched = copy.deepcopy(cfg)
    rows = [tuple(row) for row in token_rows(cfg)]
    assert cfg == untouched
    added = {name for name, value in os.environ.items() if before.get(name) != value}
    # What importing Axolotl sets; nothing of this run's settings.
    assert added <= {
        "TOKENIZERS_PARALLELISM",
        "HF_XET_HIGH_PERFORMANCE",
        "TRL_EXPERIMENTAL_SILENCE",
        "ACCELERATE_LOG_LEVEL",
    }
    assert "AXOLOTL_IS_PREPROCESS" not in os.environ
    assert torch.get_float32_matmul_precision() == precision
    assert not (tmp_path / "out").exists()
    expected = expected_rows(text_file, 64)
    assert Counter(rows) <= expected
    assert len(rows) == expected.total() - -(
        -expected.total() // 10
    )  # val_set_size 0.1, rounded up

    prepared = sorted((tmp_path / "prepared").rglob("*"))
    assert any(path.suffix == ".arrow" for path in prepared)
    found = load_calibration(choose(file, 8, 32), make_model())
    packed = pack_checked(token_rows(cfg), choose(file, 8, 32), make_model(), str(file))
    assert np.array_equal(found.tokens, packed.tokens)
    assert np.array_equal(packed.tokens, pack_rows(rows, 8, 32, 0, "x", None).tokens)
    assert found.source == str(file)
    shuffled = [tuple(row) for row in token_rows(cfg, seed=1)]
    assert shuffled != rows and Counter(shuffled) == Counter(rows)
    assert sorted((tmp_path / "prepared").rglob("*")) == prepared


def test_a_running_plugin_stays_as_it_is(make_model, settings, tmp_path):
    """Axolotl's own `load_cfg` would put a new one in its place."""
    from axolotl.integrations.base import PluginManager

    class Prunes:
        def load_datasets(self, cfg, preprocess=False):
            raise AssertionError("the plugin would prune, which asks for calibration text")

    manager, name = PluginManager.get_instance(), "axolotl_loram.LoRAMPlugin"
    plugins, cfg, mine = manager.plugins.copy(), manager.cfg, Prunes()
    manager.plugins[name] = mine
    try:
        file = make_yaml(tmp_path / "run.yml", settings(make_model()))
        assert next(token_rows(load_yaml(file)))
        assert manager.plugins[name] is mine
        assert manager.cfg is cfg
    finally:
        manager.plugins.clear()
        manager.plugins.update(plugins)


@pytest.mark.parametrize(
    "changes",
    [
        {"sample_packing": True},
        {"streaming": True, "val_set_size": 0},
        {"datasets": None, "pretraining_dataset": [{"path": "json", "type": "pretrain"}]},
    ],
    ids=["packed", "streamed", "pretraining"],
)
def test_ways_to_load_data(make_model, settings, text_file, tmp_path, monkeypatch, changes):
    if "pretraining_dataset" in changes:
        changes["pretraining_dataset"][0]["data_files"] = str(text_file)
        changes |= {"val_set_size": 0, "accelerator_config": {"dispatch_batches": True}}
        monkeypatch.setenv("LOCAL_RANK", "1")  # to which Axolotl gives a placeholder, then
    cfg = load_yaml(make_yaml(tmp_path / "run.yml", settings(make_model()), **changes))
    # For which each rank waits for all others, where one is alone here.
    monkeypatch.setattr("axolotl.utils.data.sft.calculate_total_num_steps", None)
    untouched = copy.deepcopy(cfg)
    rows = [tuple(row) for row in token_rows(cfg)]
    assert cfg == untouched
    if "pretraining_dataset" in changes:  # one row per text, cut at 62, with no eos and no padding
        texts = [json.loads(line)["text"] for line in text_file.read_text().splitlines()]
        ids = byte_tokenizer()(texts, add_special_tokens=False)["input_ids"]
        assert Counter(rows) == Counter(tuple(row[:62]) for row in ids)
    else:
        assert Counter(rows) <= expected_rows(text_file, 64)
        assert len(rows) > 100


def test_padding_of_streamed_rows_is_left_out(monkeypatch):
    from axolotl.utils.dict import DictDefault

    import axolotl_loram.text.axolotl_text as module

    rows = [
        {"input_ids": np.array([5, 6, 2]), "attention_mask": np.array([1, 1, 0])},
        {"chosen_ids": [7, 8], "attention_mask": [0, 1], "rejected_ids": [9]},
    ]
    monkeypatch.setattr(module, "_rows", lambda cfg, seed: iter(rows))
    assert list(token_rows(DictDefault())) == [[5, 6], [7, 8]]


def test_preference_data_hold_nothing_out_that_has_tokens():
    from axolotl.utils.dict import DictDefault

    with pytest.raises(LoRAMError, match="tokenizes, found rl: dpo, where the trainer does it"):
        heldout_rows(DictDefault({"rl": "dpo"}))


def test_what_is_wrong_with_the_data_of_a_yaml_is_told(make_model, settings, text_file, tmp_path):
    base = make_model()
    for changes, message in (
        (
            {"datasets": [{"path": "nowhere/x.jsonl", "type": "completion"}]},
            "load, found it failing",
        ),
        ({"skip_prepare_dataset": True}, "tokenizes, found rows of text: name a text file"),
        ({"adapter": "gloved"}, "refused .*gloved"),
    ):
        file = make_yaml(tmp_path / "run.yml", settings(base), **changes)
        with pytest.raises(LoRAMError, match=message):
            load_calibration(choose(file), base)

    other = tmp_path / "other"
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    (other / "config.json").write_bytes((base / "config.json").read_bytes())
    file = make_yaml(tmp_path / "run.yml", settings(base))
    with pytest.raises(LoRAMError, match=f"the tokenizer of {other}, found .* of {base}"):
        load_calibration(choose(file), other)

    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((base / "config.json").read_bytes())
    file = make_yaml(tmp_path / "run.yml", settings(bare))
    with pytest.raises(
        LoRAMError, match=f"a tokenizer that Axolotl can load, found {bare} refused"
    ):
        load_calibration(choose(file), base)


@pytest.mark.slow
def test_axolotl_trains_on_what_was_prepared_here(make_model, settings, text_file, tmp_path):
    """In a process of its own, with nothing on standard output: that is for `--json`."""
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    chats = write_rows(tmp_path / "chats.jsonl", [{"messages": turns}] * 20)
    data = settings(make_model())
    data["datasets"] += [{"path": str(chats), "ds_type": "json", "type": "chat_template"}]
    file = make_yaml(tmp_path / "run.yml", data, chat_template="chatml", sequence_len=128)
    program = (
        "import sys; from pathlib import Path; from axolotl_loram.text.axolotl_text import *\n"
        "rows = list(token_rows(load_yaml(Path(sys.argv[1]))))\n"
        "import json; print(json.dumps(rows))"
    )
    ours = subprocess.run(
        [sys.executable, "-c", program, str(file)], capture_output=True, text=True, check=True
    )
    rows = json.loads(ours.stdout)
    prepared = sorted((tmp_path / "prepared").rglob("*.arrow"))
    (folder,) = {path.parent for path in prepared}
    run_command("axolotl", "preprocess", file)
    assert sorted((tmp_path / "prepared").rglob("*.arrow")) == prepared
    saved = datasets.load_from_disk(str(folder))["input_ids"]
    training = saved[: len(saved) - -(-len(saved) // 10)]
    assert sorted(rows) == sorted(training)
    assert any("<|im_start|>assistant" in byte_tokenizer().decode(row) for row in rows)


def test_a_vision_language_model_is_calibrated_on_the_runs_own_text(tmp_path):
    """Its vocabulary's size is in the section of its language tower."""
    pico_config("gemma3").save_pretrained(tmp_path)
    settings = PruningArgs(ratio=0.5, method="taylor", calibration_samples=2, calibration_length=8)
    rows = lambda: iter([[5, 6, 263, 264, 7] * 20])  # noqa: E731
    assert set(own_text(settings, tmp_path, rows).tokens.flat) == {5, 6, 7, 263}
