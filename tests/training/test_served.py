"""What a served base says: as what is computed here; servers that are something else."""

import json

import numpy as np
import pytest
import torch
from calibrated import load
from conftest import byte_tokenizer, run_command, write_yaml
from logprob_server import LogprobServer

from axolotl_loram.errors import LoRAMError
from axolotl_loram.training import served
from axolotl_loram.training.anchor import said_by
from axolotl_loram.training.rows import Row
from axolotl_loram.training.served import Server, check_server, make_served
from axolotl_loram.training.teacher import Teacher, make_teacher


@pytest.fixture(scope="module")
def rows():
    draw = np.random.default_rng(0)
    return [Row(draw.integers(3, 250, n), np.arange(n) >= n // 3) for n in (9, 30, 17, 6, 23)]


@pytest.fixture
def server(make_model):
    return LogprobServer(load(make_model()), byte_tokenizer())


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(served, "PATIENCE", 0.01)
    monkeypatch.setattr(served, "ROWS_PER_FILE", 2)


def test_it_is_what_is_computed_here(server, rows, make_model, tmp_path):
    known = said_by(make_model(), rows[:2])
    record = make_served(Server(server.url, "base"), rows, tmp_path / "asked", 8, known=known)
    own = make_teacher(make_model(), rows, tmp_path / "computed", 8)
    same = ("kind", "trained_only", "sequences", "tokens", "places", "sha256", "top_k")
    assert {name: record[name] for name in same} == {name: own[name] for name in same}
    asked, computed = (Teacher(tmp_path / name) for name in ("asked", "computed"))
    for row in rows:
        found, wanted = asked.of(row), computed.of(row)
        assert (found.ids[:, 0].numpy() == row.tokens[row.places + 1]).all()
        for name in ("logprobs", "rest"):
            torch.testing.assert_close(
                getattr(found, name), getattr(wanted, name), atol=1e-5, rtol=0
            )


def test_cut_off_it_goes_on(server, rows, tmp_path):
    asking = Server(server.url, "base")
    whole = make_served(asking, rows, tmp_path / "whole", 8)
    once, said = server.asked, server.said
    server.said = lambda prompt, count: said(prompt, count) if len(prompt) < 20 else 1 / 0
    with pytest.raises(LoRAMError, match=r"does not answer.*run the same command again"):
        make_served(asking, rows, tmp_path / "cut", 8)
    server.said, before = said, server.asked
    assert make_served(asking, rows, tmp_path / "cut", 8) == whole
    assert server.asked - before < once
    assert {f.name: f.read_bytes() for f in (tmp_path / "whole").iterdir()} == {
        f.name: f.read_bytes() for f in (tmp_path / "cut").iterdir()
    }


def test_a_busy_server_is_asked_again(server, rows, tmp_path):
    server.failures = 2
    assert make_served(Server(server.url, "base"), rows, tmp_path / "asked", 8)["places"] == 58


def other_tokenizer():
    """The same ids, with other texts."""
    tokenizer = byte_tokenizer()
    decode = tokenizer.decode
    tokenizer.decode = lambda ids: decode([(i + 1) % 250 for i in ids])
    return tokenizer


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("too few", "found 400 .*at most 4 logprobs"),
        ("tokenizer", "reads [0-9]+ of [0-9]+ tokens otherwise"),
        ("gone", "expected a server, found: .* does not answer"),
        ("no address", "expected an OpenAI-compatible server at"),
        ("no logprobs", "expected prompt_logprobs of .* serve base by vLLM with --max-logprobs 8"),
    ],
)
def test_another_kind_of_server_is_refused_before_the_work(change, sentence, server, rows):
    url = server.url
    if change == "too few":
        server.most = 4
    if change == "gone":
        server.shutdown()
        server.server_close()
    if change == "no address":
        url = "localhost-8000"
    if change == "no logprobs":  # as llama.cpp's
        server.said = lambda prompt, count: None
    tokenizer = other_tokenizer() if change == "tokenizer" else byte_tokenizer()
    with pytest.raises(LoRAMError, match=sentence):
        check_server(Server(url, "base"), rows[:2], 8, tokenizer)


def test_another_model_is_refused_where_the_base_is_at_hand(server, rows, make_model, tmp_path):
    known = said_by(make_model(num_hidden_layers=3), rows[:2])
    with pytest.raises(LoRAMError, match=r"differ by .* nats a token"):
        make_served(Server(server.url, "base"), rows, tmp_path / "asked", 8, known=known)
    assert not (tmp_path / "asked").exists()


@pytest.mark.slow
def test_a_run_takes_what_a_server_said(server, settings, make_model, tmp_path):
    loram = {"pruning": {"ratio": 0.5, "method": "random"}, "anchor": "base"}
    loram |= {"cache_dir": str(tmp_path / "cache"), "anchor_path": str(tmp_path / "anchor")}
    file = write_yaml(tmp_path / "loram.yml", {**settings(make_model()), "loram": loram})
    run_command("axolotl-loram", "anchor", file, tmp_path / "anchor", "--server", server.url)
    run_command("axolotl", "train", file, "--launcher", "python")
    record = json.loads((tmp_path / "out/loram.json").read_text())
    assert record["trained"]["anchor"]["places"] > 0
