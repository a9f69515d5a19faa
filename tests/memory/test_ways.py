"""`axolotl-loram plan --compare`, and what an anchor costs."""

import json
import math
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from axolotl.core.trainers.mixins.layer_offloading import LayerOffloadManager
from conftest import build_model, write_yaml
from peft import LoraConfig, get_peft_model
from test_cli import loram
from test_model import LLAMA_31_70B
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from axolotl_loram.api import plan_memory
from axolotl_loram.architecture.config_json import load_config
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.tensors import open_safetensors
from axolotl_loram.memory.compute import forward_flops
from axolotl_loram.memory.data import TOP_K, data_of, place_bytes, stored_bytes
from axolotl_loram.memory.gpus import CARDS, GPUS, card_of
from axolotl_loram.memory.layout import Layout
from axolotl_loram.memory.predict import predict, storage_of
from axolotl_loram.memory.request import request
from axolotl_loram.memory.settings import TrainingArgs
from axolotl_loram.memory.ways import ON_DEVICE, Way, _packed
from axolotl_loram.memory.weights import weight_bytes
from axolotl_loram.results.footprint import save_ways
from axolotl_loram.training.rows import Row
from axolotl_loram.training.teacher import make_teacher

GIB = 2**30
ROOT = Path(__file__).resolve().parents[2]
LARGE = 70_553_706_496
"""Parameters of Llama 3.1 70B."""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """LLaMA-3.1-70B's config.json."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "config.json").write_text(json.dumps(LLAMA_31_70B))
    return folder


@pytest.fixture(scope="module")
def compared(large):
    """The ways for it on an RTX 4090, by name."""
    settings = {"sequence_len": 2048, "gradient_accumulation_steps": 16}
    found = plan_memory(large, compare=True, **settings)
    return found, {way["name"]: way for way in found.ways}


def test_the_command_answers_at_once_without_torch(large, tmp_path):
    """Processor seconds, which a busy machine stretches less; 0.8 are usual."""
    command = [sys.executable, "-X", "importtime", "-m", "axolotl_loram.cli", "plan", str(large)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*command, "--compare"], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "axolotl_loram.memory.ways" in imported
    assert not {"torch", "transformers", "axolotl", "matplotlib"} & imported
    assert "Speed and hours are bounds" in done.stdout and "tokens/s ≤" in done.stdout


def test_the_ways_of_70b_on_one_card(compared):
    found, ways = compared
    assert len(ways) == 8
    fits = {name for name, way in ways.items() if way["fits"]}
    assert "LoRA" not in fits and "QLoRA" not in fits and "ZeRO-3, all offloaded" in fits
    assert "QLoRA with layer_offloading" not in fits  # all of it is on the device first
    small = next(way for name, way in ways.items() if name.startswith("QLoRAM"))
    whole, streamed = ways["QLoRA"], ways["streaming trainer (RoundPipe-like)"]
    assert small["fits"] and small["device_bytes"] > 23 * GIB
    assert {way["name"] for way in ways.values() if way["exact"]} == {
        "LoRA",
        "ZeRO-3, all offloaded",
        "streaming trainer (RoundPipe-like)",
    }
    assert 5.9 < whole["flops_per_token"] / LARGE < 6.3
    assert small["bound_tokens_per_second"] > 2 * streamed["bound_tokens_per_second"]
    assert streamed["host_bytes"] > 2 * LARGE > 30 * small["host_bytes"]
    assert "no run is faster" in str(found)


def test_the_ratio_is_the_one_that_fits(large, compared):
    small = next(way for way in compared[0].ways if way["name"].startswith("QLoRAM"))
    size = f"{CARDS['RTX 4090'].memory_bytes / GIB}GiB"
    fitted = plan_memory(large, fit=size, sequence_len=2048).as_dict()["fit"]
    assert small["pruning_ratio"] == fitted["pruning_ratio"]
    assert small["device_bytes"] == fitted["peak_bytes"]
    named = plan_memory(large, compare=True, ratio=0.85, gpu="A100 80 GB").ways
    assert [way["pruning_ratio"] for way in named] == [None, None, 0.85, 0.85] + [None] * 4
    roomy = plan_memory(large, compare=True, gpu="B200").ways
    assert [way["name"] for way in roomy[2:4]] == [
        "LoRAM, nothing to prune",
        "QLoRAM, nothing to prune",
    ]


def test_the_bound_is_the_longest_of_three(compared):
    found, ways = compared
    tokens, card = found.as_dict()["step_tokens"], CARDS["RTX 4090"]
    assert tokens == 2048 * 16
    way = ways["ZeRO-3, all offloaded"]
    assert way["bound_by"] == "pcie" and way["up_bytes"] > way["down_bytes"]
    embedding = 2 * LLAMA_31_70B["vocab_size"] * LLAMA_31_70B["hidden_size"]
    assert way["up_bytes"] == 16 * 2 * (2 * LARGE - embedding)
    assert way["bound_tokens_per_second"] == pytest.approx(tokens * 31.5e9 / way["up_bytes"])
    way = ways["LoRA"]
    assert way["bound_by"] == "compute"
    assert way["bound_tokens_per_second"] == pytest.approx(165.2e12 / way["flops_per_token"])
    assert way["bound_hours"] == pytest.approx(1e6 / way["bound_tokens_per_second"] / 3600)
    slow = Way("", 1, 0, 0, 0, int(1e15), compared_flops())
    assert slow.bound(card, 1)["memory"] == pytest.approx(1e15 / 1008e9)


def compared_flops():
    from axolotl_loram.memory.compute import Flops

    return Flops(1, 1, 1, 1)


def test_weights_come_less_often_the_larger_the_step_of_a_streaming_trainer(large):
    def pcie(way, steps):
        found = plan_memory(large, compare=True, ratio=0.5, gradient_accumulation_steps=steps)
        return found.ways[way]["up_bytes"]

    assert pcie(5, 16) == 16 * pcie(5, 1)  # ZeRO-3
    assert pcie(7, 16) < 1.1 * pcie(7, 1)


class Counting(LayerOffloadManager):
    """Axolotl's own order of things, without a GPU: says what is moved instead of moving it."""

    def __init__(self, model):
        super().__init__(model)
        self.enabled, self._on_gpu = True, set(range(self.n_layers))
        self.moved, self.most = {"up": 0, "down": 0}, 0

    def _load_layer(self, idx, stream=None):
        if idx not in self._on_gpu and 0 <= idx < self.n_layers:
            self._on_gpu.add(idx)
            self.moved["up"] += 1
            self.most = max(self.most, len(self._on_gpu))

    def _prefetch_layer(self, idx):
        self._load_layer(idx)

    def _offload_layer(self, idx):
        if idx in self._on_gpu:
            self._on_gpu.discard(idx)
            self.moved["down"] += 1

    def _wait_transfer(self):
        pass


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layer_offloading_moves_each_layer_twice_and_one_once_more(checkpointing):
    model = get_peft_model(build_model("llama"), LoraConfig(target_modules=["q_proj"])).train()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    manager, ids = Counting(model), torch.randint(3, 200, (2, 16))
    manager.setup_hooks()
    for _ in range(2):
        manager.moved, manager.most = {"up": 0, "down": 0}, 0
        manager.pre_step()
        model(input_ids=ids, labels=ids).loss.backward()
        manager.post_step()
    layers = manager.n_layers
    assert manager.moved == {"up": 2 * layers + 1, "down": 2 * layers + 1}
    assert manager.most == ON_DEVICE


def test_what_layer_offloading_moves_of_a_layer_in_4_bits(make_model):
    folder = make_model("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    four = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=four, dtype=torch.bfloat16
    )
    real = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())
    layout, run = Layout.of(model.config.to_dict()), TrainingArgs()
    storage = storage_of("qlora", run, tied=False)
    assert sum(_packed(storage, tensor) for tensor in layout.layers[0].tensors) == real


def test_fsdp_shards_where_that_fits_and_offloads_where_not(large):
    run = TrainingArgs()
    layout = Layout.of(LLAMA_31_70B)
    weights = weight_bytes(layout, storage_of("qlora", run, tied=False)).on_device
    two, four = (plan_memory(large, compare=True, gpus=gpus).ways[4] for gpus in (2, 4))
    assert two["name"].endswith("offloaded") and not four["name"].endswith("offloaded")
    assert two["fits"] and four["fits"] and four["device_bytes"] > two["device_bytes"]
    assert weights < two["host_bytes"] < weights + 6 * GIB
    whole = predict(layout, run, "qlora")
    assert weights / 4 < four["device_bytes"] < whole.peak_bytes / 2
    assert four["up_bytes"] == four["down_bytes"] < 2 * weights


# --- the data, and an anchor of them ---

YAML = {"adapter": "qloram", "load_in_4bit": True, "bf16": True, "sequence_len": 128}
YAML["lora_target_linear"] = True


@pytest.mark.parametrize(
    ("cfg", "tokens", "once", "trained"),
    [
        ({}, None, 10**6, 10**6),
        ({}, 5000, 5000, 5000),
        ({"num_epochs": 3}, 5000, 5000, 15000),
        ({"max_steps": 2}, None, 2 * 512, 2 * 512),
        ({"max_steps": 2, "num_epochs": 2}, 5000, 5000, 2 * 512),
        ({"max_steps": -1}, 5000, 5000, 5000),
        ({"datasets": [{"path": "TEXT"}], "num_epochs": 2}, None, 250, 500),
        ({"datasets": [{"path": "json", "data_files": ["TEXT", "TEXT"]}]}, None, 500, 500),
        ({"datasets": [{"path": "FOLDER"}]}, None, 250, 250),
        ({"datasets": [{"path": "TEXT"}, {"path": "org/name"}]}, None, 10**6, 10**6),
        ({"datasets": [{"path": 5}, 7]}, None, 10**6, 10**6),
    ],
)
def test_tokens_of_the_data(cfg, tokens, once, trained, tmp_path):
    (tmp_path / "text.jsonl").write_text("x" * 1000)
    (tmp_path / "other.parquet").write_text("x" * 1000)
    text = json.dumps(cfg).replace("TEXT", str(tmp_path / "text.jsonl"))
    cfg = json.loads(text.replace("FOLDER", str(tmp_path)))
    data = data_of(cfg, TrainingArgs(), tokens)
    assert (data.once, data.trained) == (once, trained)


def test_an_anchor_is_counted(make_model, large, tmp_path):
    loram_section = {"pruning": {"ratio": 0.5}, "anchor": "base"}
    settings = {**YAML, "base_model": str(large), "loram": loram_section}
    file = write_yaml(tmp_path / "a.yml", settings)
    found = json.loads(loram("plan", file, "--tokens", 3 * 2**20, "--json").stdout)["anchor"]
    assert found["disk_bytes"] == 3 * 2**20 * 260
    assert (found["parts"], found["read_bytes"]) == (3, 3 * 2 * LARGE)
    assert found["flops"] / (3 * 2**20) == pytest.approx(2 * LARGE, rel=0.02)
    assert "anchor: base, before the first step" in str(plan_memory(file, tokens=1000))
    ways = plan_memory(file, compare=True, tokens=3 * 2**20).ways
    settings["loram"] = {**loram_section, "anchor": "none"}
    plain = plan_memory(write_yaml(tmp_path / "b.yml", settings), compare=True, tokens=3 * 2**20)
    assert "anchor" not in plain.as_dict()
    for way, other in zip(ways, plain.ways, strict=True):
        prunes = way["name"].startswith(("LoRAM", "QLoRAM"))
        assert (way["flops_per_token"] > other["flops_per_token"]) == prunes
        assert (way["weight_bytes"] > 1.2 * other["weight_bytes"]) == prunes
        assert (way["bound_hours"] > 1.2 * other["bound_hours"]) == prunes
        assert way["disk_bytes"] - other["disk_bytes"] == (6 * LARGE if prunes else 0)
    brought = {**loram_section, "anchor_path": str(tmp_path)}
    settings["loram"] = brought
    away = plan_memory(write_yaml(tmp_path / "c.yml", settings), compare=True)
    assert "anchor" not in away.as_dict() and away.ways[3]["flops"]["anchor"] > 0


def test_hidden_states_in_the_place_of_layers_are_counted(large, tmp_path):
    """What is run beforehand, and what in a step, is one forward pass of the base between them."""
    config = json.loads((large / "config.json").read_text())
    settings = {**YAML, "base_model": str(large), "gradient_checkpointing": False}
    settings["loram"] = {"pruning": {"units": "layers", "ratio": 0.5}, "anchor": "base"}
    file = write_yaml(tmp_path / "a.yml", settings)
    tokens = 3 * 2**20
    found = plan_memory(file, compare=True, tokens=tokens)
    anchor = found.as_dict()["anchor"]
    ways = {way["name"].split(" at ")[0]: way for way in found.ways}
    assert anchor["disk_bytes"] == tokens * 2 * config["hidden_size"]
    upper, whole = ways["LoRAM"]["flops"], ways["LoRA"]["flops"]
    without_lora = forward_flops(TrainingArgs(sequence_len=128), Layout.of(load_config(str(large))))
    assert upper["anchor"] == 0 and anchor["flops"] < tokens * without_lora
    beside = (whole["layers"] - upper["layers"]) * tokens  # that has LoRA
    assert anchor["flops"] == pytest.approx(beside, rel=0.05)
    assert 0 < anchor["read_bytes"] < 3 * 2 * LARGE
    more = ways["LoRAM"]["disk_bytes"] - ways["LoRA"]["disk_bytes"]
    assert more > anchor["read_bytes"]  # pruning reads the base, too
    fitted = json.loads(
        loram("plan", file, "--fit", "40GiB", "--adapter", "loram", "--json").stdout
    )
    assert 0 < fitted["fit"]["pruning_ratio"] < 1


def test_bytes_of_an_anchor_are_those_that_are_written(make_model, tmp_path):
    base = make_model("llama")
    rows = [Row(np.arange(3, 43), np.ones(40, bool)), Row(np.arange(9, 29), np.ones(20, bool))]
    record = make_teacher(base, rows, tmp_path / "anchor", TOP_K)
    kept = 0
    for name in record["files"]:
        tensors, _ = open_safetensors(tmp_path / "anchor" / name)
        kept += sum(tensors[part].read().nbytes for part in ("ids", "logprobs", "rest"))
    assert kept == record["places"] * place_bytes(TOP_K) == 58 * 260
    config = json.loads((base / "config.json").read_text())
    tensors, _ = open_safetensors(base / "model.safetensors")
    stored = sum(math.prod(tensor.shape) * 4 for tensor in tensors.values())
    assert stored_bytes(Layout.of(config), width=4) == stored


# --- what is wrong, and the picture ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu": "RTX 9999"}, "expected a GPU whose speed is known, found 'RTX 9999'"),
        ({"gpus": 1}, "at least 2 GPUs"),
        ({"tokens": 0}, "at least one token"),
        ({"stage": "align"}, "found one that aligns"),
        ({"fit": "30GiB", "ratio": 0.5}, "found both"),
    ],
)
def test_what_cannot_be_compared_is_refused(options, message, large):
    with pytest.raises(LoRAMError, match=message):
        plan_memory(large, compare=True, **options)


def test_what_is_not_counted_is_said(large, make_model, tmp_path):
    named = {"fsdp_config": {"a": 1}, "layer_offloading": True, "torch_compile": True}
    file = write_yaml(tmp_path / "a.yml", {**YAML, **named, "base_model": str(large)})
    found = plan_memory(file, compare=True)
    assert found.as_dict()["not_counted"] == ["torch_compile"]
    assert "not counted: torch_compile" in str(found)
    tower = plan_memory(make_model("gemma3"), compare=True, fit="4GiB")
    assert "not declared" in tower.as_dict()["not_counted"][0]


def test_an_unknown_card_is_one_line(large):
    result = loram("plan", large, "--compare", "--gpu", "RTX 9999", check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert "Error: expected a GPU" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("num_epochs", math.inf),
        ("num_epochs", math.nan),
        ("num_epochs", -1),
        ("max_steps", 10**400),
    ],
)
def test_endless_runs_are_refused(name, number, large, tmp_path):
    file = write_yaml(tmp_path / "a.yml", {**YAML, "base_model": str(large), name: number})
    with pytest.raises(LoRAMError, match=f"expected {name} to be above 0"):
        request(str(file), tokens=5)


def test_the_picture(compared, tmp_path):
    save_ways(compared[0].as_dict(), tmp_path / "ways.png", "70B")
    assert (tmp_path / "ways.png").read_bytes().startswith(b"\x89PNG")


def test_figures_of_the_page_are_the_planners(large, tmp_path):
    """Those of its prose; its table is made by `make docs`."""
    page = (ROOT / "docs/which-way.md").read_text(encoding="utf-8")
    settings = {"sequence_len": 2048, "gradient_accumulation_steps": 16}
    for file, way in (("llama-3.1-8b", 7), ("qwen2.5-32b", 7)):
        found = plan_memory(ROOT / f"docs/configs/{file}.json", compare=True, **settings).ways[way]
        assert f"{found['bound_tokens_per_second']:,.0f}" in page

    def hours(section, epochs):
        named = {**YAML, "base_model": str(large), "loram": section, "num_epochs": epochs}
        file = write_yaml(tmp_path / "a.yml", {**named, "gradient_checkpointing": True})
        found = plan_memory(file, compare=True, tokens=10**7, **settings).ways
        return [f"{found[way]['bound_hours']:.1f}" for way in (3, 7)]

    anchored, alone = {"anchor": "base"}, {"fill": "zeros"}
    upper = {"pruning": {"units": "layers"}, **anchored}
    assert (
        "bounds are {} hours for the upper layers, {} by streaming".format(*hours(upper, 1)) in page
    )
    assert "epochs {} and {};".format(*hours(upper, 3)) in page
    (inside, _), (plain, _) = hours(anchored, 1), hours(alone, 1)
    assert f"inside layers {inside} with the anchor, {plain} without" in page


def test_cards_are_found_however_they_are_written():
    assert card_of("nvidia geforce rtx4090") is CARDS["RTX 4090"]
    assert {card.memory for card in CARDS.values()} == set(GPUS)
    assert all(card.tflops > 20 and card.bandwidth >= 300 for card in CARDS.values())
