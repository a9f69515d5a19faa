"""`axolotl-loram plan` as a command: YAML, table, bad input; and the plugin's record."""

import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.config import AxolotlInputConfig
from conftest import write_yaml
from families import pico_config
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_cli import loram
from test_model import LLAMA_31_70B
from transformers import AutoModelForCausalLM

from axolotl_loram.api import plan_memory
from axolotl_loram.architecture.config_json import with_defaults
from axolotl_loram.architecture.plan import Base, PruningPlan
from axolotl_loram.errors import LoRAMError
from axolotl_loram.memory.planner import plan, report
from axolotl_loram.memory.request import parse_size, request
from axolotl_loram.memory.settings import TrainingArgs, settings_of
from axolotl_loram.models.formats import Formats
from axolotl_loram.training.memory_log import (
    correct_prediction,
    measure_run,
    predict_run,
    start_measuring,
)

ROOT = Path(__file__).resolve().parents[2]
BYTES = "weights_device_bytes", "weights_host_bytes", "gradient_bytes", "optimizer_bytes"
BYTES += "activation_bytes", "logits_bytes", "context_bytes", "slack_bytes", "peak_bytes"


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """LLaMA-3.1-70B's config.json."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "config.json").write_text(json.dumps(LLAMA_31_70B))
    return folder


@pytest.mark.parametrize("whole", [True, False])
def test_embeddings_are_counted_as_the_weights_tie_them(whole, make_model, tmp_path):
    """As transformers (5.16) has it: a head of its own is used, whatever the config says."""
    shutil.copytree(make_model(tie_word_embeddings=True), tmp_path / "base")
    file = tmp_path / "base/model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] = torch.randn_like(weights["model.embed_tokens.weight"])
    save_file(weights, file, metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tied = 264 * 32
    if not whole:  # a shard is still to come: the config is all there is
        shards = dict.fromkeys(weights, "model-1.safetensors") | {"lm_head.weight": "model-2.st"}
        file.rename(file.with_name("model-1.safetensors"))
        index = file.with_name("model.safetensors.index.json")
        index.write_text(json.dumps({"weight_map": shards}))
    for asked in ({"options": {"ratio": 0.5}}, {"fit": "20GiB"}):
        counted = plan(request(str(tmp_path / "base"), **asked))
        assert counted["base_parameters"] == model.num_parameters() - (not whole) * tied
        assert bool(counted["methods"]["lora"]["weights"]["lm_head"]) == whole
        compared = plan_memory(tmp_path / "base", compare=True, ratio=0.5)
        disk = compared.ways[0]["disk_bytes"]
        assert disk == 2 * counted["base_parameters"]


def test_the_command_prints_methods_and_draws_them(large, tmp_path):
    small = ("--lm-head-format", "nf4", "--embedding-format", "cpu", "--plot", tmp_path / "a.png")
    arguments = ("plan", large, "--pruning-ratio", "0.85", *small, "--json")
    result = json.loads(loram(*arguments).stdout)
    assert result["pruned_parameters"] == 17_849_982_976
    assert set(result["methods"]) == {"lora", "qlora", "loram", "qloram"}
    for method in result["methods"].values():
        assert all(isinstance(method[name], int) for name in BYTES)
        assert set(method["weights"]) >= {"embedding", "lm_head", "linears"}
    assert result["methods"]["qloram"]["weights_device_bytes"] < 8.31 * 2**30
    assert "A10, L4 24 GB" in result["gpus"]["qloram"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_planning_imports_no_torch(large):
    command = [sys.executable, "-X", "importtime", "-m", "axolotl_loram.cli", "plan", str(large)]
    result = subprocess.run(
        [*command, "--fit", "20GiB"], capture_output=True, text=True, check=True
    )
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "axolotl_loram.memory.predict" in imported
    assert not {"torch", "transformers", "axolotl", "matplotlib"} & imported
    assert "fits" in result.stdout and "linear weights" in result.stdout


def test_fit_plans_at_the_ratio_it_finds(large):
    result = plan(request(str(large), fit="20GiB", options={"protect_first": 2}))
    found = result["fit"]
    assert found["peak_bytes"] == result["methods"]["qloram"]["peak_bytes"] <= 20 * 2**30
    assert 0 < found["pruning_ratio"] < 0.85 and result["pruned_layers"] == 76
    assert "fit pruning ratio" in report(result)
    whole = plan(request(str(large), fit="200GiB", adapter="loram"))
    assert whole["fit"]["pruning_ratio"] == 0 and whole["parameter_reduction"] == 1


YAML = {
    "base_model": "base",
    "plugins": [
        "axolotl_loram.LoRAMPlugin",
        "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin",
    ],
    "loram": {"pruning": {"ratio": 0.5, "protect_first": 1, "protect_last": 1}},
    "adapter": "qloram",
    "load_in_4bit": True,
    "lora_r": 16,
    "lora_target_modules": ["q_proj", "lm_head"],
    "lora_dropout": 0.05,
    "sequence_len": 2048,
    "micro_batch_size": 4,
    "optimizer": "paged_adamw_8bit",
    "gradient_checkpointing": True,
    "attn_implementation": "eager",
    "bf16": "auto",
}


def test_a_yaml_says_everything(large, tmp_path):
    file = write_yaml(tmp_path / "a.yml", {**YAML, "base_model": str(large)})
    asked = request(str(file))
    assert (asked.model, asked.adapter, asked.pruning.ratio) == (str(large), "qloram", 0.5)
    run = asked.run
    assert (run.lora_r, run.lora_target_modules) == (16, "q_proj,lm_head")
    assert (run.sequence_len, run.micro_batch_size, run.lora_dropout) == (2048, 4, 0.05)
    assert (run.optimizer, run.gradient_checkpointing) == ("paged_adamw_8bit", True)
    assert (run.attention, run.cross_entropy, run.precision) == ("eager", "cut", "bf16")
    assert run.fused_kernels  # Axolotl turns them on itself
    over = request(str(file), options={"ratio": 0.85, "sequence_len": 512, "seed": None})
    assert (over.pruning.ratio, over.pruning.protect_first) == (0.85, 1)
    assert (over.run.sequence_len, over.run.lora_r) == (512, 16)


@pytest.mark.parametrize(
    ("changes", "name", "value"),
    [
        ({"plugins": []}, "cross_entropy", "plain"),
        ({"cut_cross_entropy": False}, "cross_entropy", "plain"),
        ({"plugins": [], "liger_fused_linear_cross_entropy": True}, "cross_entropy", "liger"),
        (
            {"lora_target_modules": None, "lora_target_linear": True},
            "lora_target_modules",
            "linear",
        ),
        ({"bf16": False, "fp16": False}, "precision", "fp32"),
        ({"lora_qkv_kernel": False}, "fused_kernels", False),
        ({"gradient_checkpointing": None}, "gradient_checkpointing", False),
        ({"lora_modules_to_save": ["embed_tokens"]}, "modules_to_save", ("embed_tokens",)),
        ({"loram": {"lm_head_format": "native"}}, "lm_head_format", "native"),
        ({"peft_autocast_adapter_dtype": False}, "lora_float32", False),
    ],
)
def test_settings_of_a_yaml(changes, name, value):
    assert getattr(TrainingArgs(**settings_of({**YAML, **changes})), name) == value


def test_what_a_yaml_leaves_out_is_what_axolotl_takes():
    """The README's has neither bf16 nor kernels, and was planned in float32."""
    cfg = {"base_model": "x", "datasets": [{"path": "x", "type": "alpaca"}], "adapter": "qlora"}
    cfg |= {"load_in_4bit": True, "lora_target_linear": True, "lora_r": 8, "lora_alpha": 16}
    cfg |= {"micro_batch_size": 1, "gradient_accumulation_steps": 1, "learning_rate": 1e-4}
    full = AxolotlInputConfig(**cfg).model_dump(exclude_none=True)
    assert full.keys() > cfg.keys() and settings_of(cfg)["precision"] == "bf16"
    ours, theirs = (TrainingArgs(**settings_of(each)) for each in (cfg, full))
    assert ours == theirs


SHIPPED = sorted((ROOT / "examples/llama-3.1-70b").glob("*.yml"))
FIGURES = re.compile(r"^# +(\d+) +(\d+) +([\d.]+) +([\d.]+) +([\d.]+)$", re.MULTILINE)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_figures_in_shipped_yaml_are_the_planners(file, large, tmp_path):
    """Comments say what `plan` predicts; the settings themselves fit 20 GB, or 48."""
    text = file.read_text(encoding="utf-8")
    cfg = yaml.safe_load(text)
    copy = write_yaml(tmp_path / file.name, {**cfg, "base_model": str(large)})
    peaks = {}
    for batch, length, *figures in FIGURES.findall(text):
        sizes = {"micro_batch_size": int(batch), "sequence_len": int(length)}
        asked = request(str(copy), options=sizes)
        found = plan(asked)["methods"][asked.adapter]
        names = ("weights_device_bytes", "allocated_bytes", "peak_bytes")
        assert figures == [f"{found[name] / 2**30:.2f}" for name in names]
        peaks[int(batch), int(length)] = found["peak_bytes"]
    assert len(peaks) == 3 and "predicted" in text.lower()
    largest = {"qloram": 20e9, "loram": 48e9}[asked.adapter]
    assert peaks[cfg["micro_batch_size"], cfg["sequence_len"]] < largest
    assert cfg["sample_packing"] and cfg["attn_implementation"] == "flash_attention_2"


def test_a_yaml_with_a_pruned_model(make_model, tmp_path):
    loram("prune", make_model(), tmp_path / "pruned", "--pruning-ratio", "0.5")
    section = {"loram": {"pruned_model_path": str(tmp_path / "pruned")}, "layer_offloading": True}
    file = write_yaml(tmp_path / "a.yml", {**YAML, **section})
    result = plan(request(str(file)))
    assert result["pruned_layers"] == 2 and result["not_counted"] == ["layer_offloading"]
    methods = result["methods"]
    assert methods["loram"]["weights_device_bytes"] == 2 * result["pruned_parameters"]
    assert methods["lora"]["weights_device_bytes"] == 2 * result["base_parameters"]


def test_sparse_models_take_what_the_base_takes(make_model):
    result = plan(request(str(make_model()), options={"sparsity": "2:4"}))
    methods = result["methods"]
    assert methods["loram"]["weights"] == methods["lora"]["weights"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("20GiB", 20 * 2**30), ("24 GB", 24 * 10**9), ("8.5g", 8.5e9), ("512mib", 2**29)],
)
def test_sizes(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["20", "GiB", "-3GiB", "0GB", "20 gigs", "1e3GiB", ""])
def test_sizes_that_are_none(text):
    with pytest.raises(LoRAMError, match=f"20GiB or 24GB, found '{text}'"):
        parse_size(text)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("{large}", "--fit", "6GiB"), 1, "fits 6 GiB, found none"),
        (("{large}", "--fit", "much"), 2, "expected a size such as 20GiB"),
        (("{large}", "--fit", "20GiB", "--pruning-ratio", "0.5"), 2, "found both"),
        (("{large}", "--pruning-ratio", "0.5", "--optimizer", "sophia"), 2, "found 'sophia'"),
        (("{broken}",), 2, "found that it is not"),
        (("{nameless}",), 2, "to name a base_model"),
        (("./nowhere.yml",), 2, "expected the file nowhere.yml, found none"),
        (("{large}", "--pruning-ratio", "0.5", "--plot", "/proc/a.png"), 1, "able to write"),
        (("{large}", "--pruning-ratio", "0.5", "--plot", "{large}/a.foo"), 1, "able to write"),
    ],
)
def test_bad_input_is_one_line(arguments, status, message, large, tmp_path):
    (tmp_path / "broken.yml").write_text("a: [1,\nb: {")
    (tmp_path / "nameless.yml").write_text(yaml.safe_dump({"adapter": "qloram"}))
    places = {name: tmp_path / f"{name}.yml" for name in ("broken", "nameless")} | {"large": large}
    result = loram("plan", *(text.format(**places) for text in arguments), check=False)
    assert (result.returncode, result.stdout) == (status, "")
    assert message in result.stderr and "Traceback" not in result.stderr


def test_without_matplotlib_the_plot_says_what_to_install(large, monkeypatch, tmp_path):
    from axolotl_loram.results.footprint import save_memory

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(LoRAMError, match=r"axolotl-loram\[plot\]"):
        save_memory({}, tmp_path / "a.png", "title")


# --- the plugin's record ---


def test_a_run_is_predicted(caplog):
    caplog.set_level(logging.INFO)
    found = predict_run(
        DictDefault(YAML), PruningPlan(LLAMA_31_70B, {}, Base("base")), Formats("nf4", "cpu")
    )
    assert found["method"] == "qloram" and found["peak_bytes"] > found["allocated_bytes"]
    assert "memory predicted for qloram on a GPU" in caplog.text
    unknown = DictDefault({**YAML, "optimizer": "sophia"})
    assert predict_run(unknown, PruningPlan(LLAMA_31_70B, {}, Base("base")), Formats()) == {}
    assert "is not predicted: expected an optimizer" in caplog.text


def test_a_prediction_is_corrected_by_what_is_really_trained(caplog):
    """As PEFT trains it; the rest of the record follows as if it had been predicted so."""
    config, formats = with_defaults(pico_config("llama").to_dict()), Formats()
    plan_of, cfg = PruningPlan(config, {}, Base("base")), {**YAML, "load_in_4bit": False}
    wrong, right = (
        predict_run(DictDefault({**cfg, "lora_r": rank}), plan_of, formats) for rank in (2, 16)
    )
    model = AutoModelForCausalLM.from_config(pico_config("llama"), dtype=torch.bfloat16)
    lora = LoraConfig(r=16, target_modules=["q_proj", "lm_head"])
    correct_prediction(wrong, get_peft_model(model, lora), DictDefault(cfg))
    same = ("lora_parameters", "lora_bytes", "gradient_bytes", "optimizer_bytes")
    assert {name: wrong[name] for name in same} == {name: right[name] for name in same}
    assert wrong["methods"]["loram"]["lora_bytes"] == right["lora_bytes"]
    assert wrong["allocated_bytes"] == max(wrong["moments"].values())
    assert wrong["peak_bytes"] == pytest.approx(right["peak_bytes"], rel=0.01)
    assert "are trained, not" in caplog.text
    caplog.clear()
    correct_prediction(right, model, DictDefault(cfg))
    assert "are trained, not" not in caplog.text


def test_a_run_is_measured(caplog):
    caplog.set_level(logging.INFO)
    start_measuring()
    found = measure_run()
    assert "memory measured" in caplog.text
    if found["device"] == "cpu":
        assert found["max_resident_process_bytes"] > 100 * 2**20  # torch alone is more
    else:
        assert found["max_reserved_bytes"] >= found["max_allocated_bytes"]


MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


def test_the_ratio_that_fits_is_found_for_the_units_that_go(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    options = {"units": "experts"}
    found = plan(request(str(tmp_path), options=options, adapter="loram", fit="48GiB"))
    assert found["kept_per_pruned_layer"].keys() == {"experts"}
    assert found["fit"]["peak_bytes"] == found["methods"]["loram"]["peak_bytes"] <= 48 * 2**30
    attention = {"units": "kv_groups"}  # hardly anything, beside the experts
    with pytest.raises(LoRAMError, match="fits 48 GiB, found none"):
        plan(request(str(tmp_path), options=attention, adapter="loram", fit="48GiB"))


@pytest.mark.parametrize(
    ("family", "said"),
    [("vit", "language models only"), ("gemma3", "not counted: model.vision_tower.*")],
)
def test_what_of_a_model_is_not_planned_is_said(family, said, tmp_path, caplog):
    (tmp_path / "config.json").write_text(json.dumps(pico_config(family).to_dict()))
    found = plan(request(str(tmp_path), options={"ratio": 0.5}))
    assert said in caplog.text and found["pruned_parameters"] < found["base_parameters"]
    assert ("methods" in found) == (family == "gemma3") and "pruned parameters" in report(found)
