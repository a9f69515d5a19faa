"""What PEFT writes is taken as PEFT takes it, or refused in one sentence."""

import json
from dataclasses import fields
from types import SimpleNamespace
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from conftest import build_model
from families import pico_config
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_masked import make_sparse
from test_recover import randomize, train_on
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from axolotl_loram.architecture.plan import Base, PruningPlan
from axolotl_loram.config import PruningArgs
from axolotl_loram.config_loram import LoRAMConfig
from axolotl_loram.errors import LoRAMError
from axolotl_loram.models.masked import confine
from axolotl_loram.pruning.prune import prune
from axolotl_loram.recovery.adapter import unrecoverable
from axolotl_loram.recovery.merge import merge_masked
from axolotl_loram.recovery.recover import gather_adapter, recover
from axolotl_loram.results.candidates import load_model
from axolotl_loram.results.inspect import failures, verify
from axolotl_loram.training.monitor import RecoveredEvaluation

FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
UP_B = f"{PREFIX}model.layers.1.mlp.up_proj.lora_B.weight"


@pytest.fixture
def pruned(make_model, tmp_path):
    prune(str(make_model()), tmp_path / "pruned", PruningArgs(ratio=0.5))
    return tmp_path / "pruned"


def rewrite(folder, change):
    """Save a folder's weights again, changed."""
    for file in folder.glob("*.safetensors"):
        if "plan" not in file.name:
            save_file(change(load_file(file)), file, metadata={"format": "pt"})


def loaded(model, adapter):
    """The model with an adapter on it, in which every tensor of the file has arrived."""
    found = PeftModel.from_pretrained(model, adapter)
    assert all(weight.any() for name, weight in found.named_parameters() if "lora_B" in name)
    return found.eval()


# --- names ---


def with_the_adapters_name(weights):
    return {name.replace(".weight", ".default.weight"): value for name, value in weights.items()}


def without_prefix(weights):
    return {name.removeprefix(PREFIX): value for name, value in weights.items()}


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (without_prefix, "begin with base_model.model., .* found model.layers.0"),
        (with_the_adapters_name, r"found \S+default.weight in .* as in model.state_dict\(\)"),
    ],
)
def test_names_that_peft_passes_over_are_refused(rename, message, pruned, make_model, tmp_path):
    train_on(pruned, tmp_path / "adapter")
    recover(tmp_path / "adapter")
    for name in ("adapter", "recovered-adapter"):
        rewrite(tmp_path / name, rename)
    original = AutoModelForCausalLM.from_pretrained(make_model())
    with pytest.warns(UserWarning, match="missing adapter keys"):
        ignored = PeftModel.from_pretrained(original, tmp_path / "recovered-adapter")
    assert not any(w.any() for name, w in ignored.named_parameters() if "lora_B" in name)
    with pytest.raises(LoRAMError, match=message):
        recover(tmp_path / "adapter", output=tmp_path / "out")
    plan = PruningPlan.load(pruned)
    with pytest.raises(LoRAMError, match=message):
        gather_adapter(tmp_path / "recovered-adapter", plan, str(pruned), tmp_path / "cut")
    assert not (tmp_path / "out").exists() and not (tmp_path / "cut").exists()
    failed = failures(verify(tmp_path / "recovered-adapter"))
    assert {"tensors", "shapes"} <= {c.name for c in failed if "PEFT would not load" in c.detail}


@pytest.mark.parametrize(
    ("family", "today", "before"),
    [
        ("gemma3", "model.language_model.", "language_model.model."),
        ("qwen2_5_vl", "model.language_model.", "model."),
    ],
)
def test_names_of_before_transformers_4_52_are_those_of_today(family, today, before, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(pico_config(family))
    model.save_pretrained(tmp_path / "base")
    prune(str(tmp_path / "base"), tmp_path / "pruned", PruningArgs(ratio=0.5))
    plan, targets = PruningPlan.load(tmp_path / "pruned"), r".*\.layers.*\.(up_proj|down_proj)"
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
    randomize(adapted)
    for name in ("new", "old"):
        adapted.save_pretrained(tmp_path / name)
    rewrite(tmp_path / "old", lambda w: {n.replace(today, before): v for n, v in w.items()})
    assert all(name.startswith(PREFIX + before) for name in load_file(tmp_path / "old" / FILE))
    for name in ("new", "old"):
        gather_adapter(tmp_path / name, plan, str(tmp_path / "pruned"), tmp_path / f"cut-{name}")
        recover(tmp_path / f"cut-{name}", output=tmp_path / f"recovered-{name}")
    rewrite(tmp_path / "cut-old", lambda w: {n.replace(today, before): v for n, v in w.items()})
    recover(tmp_path / "cut-old", output=tmp_path / "recovered-cut-old")
    first, *others = (
        load_file(tmp_path / f"recovered-{name}" / FILE) for name in ("new", "old", "cut-old")
    )
    for other in others:
        assert other.keys() == first.keys()
        assert all(torch.equal(other[name], first[name]) for name in first)
    rewrite(tmp_path / "old", lambda w: {**w, **load_file(tmp_path / "new" / FILE)})
    with pytest.raises(LoRAMError, match="under one name, found"):
        gather_adapter(tmp_path / "old", plan, str(tmp_path / "pruned"), tmp_path / "both")
    served = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    loaded(served, tmp_path / "recovered-old")


# --- initializations and variants ---


def initializations():
    """Those that PEFT's own annotation names."""
    annotation = get_type_hints(LoraConfig)["init_lora_weights"]
    named = [each for part in get_args(annotation) for each in get_args(part)]
    assert len(named) > 6
    return [True, False, *named, "lora_ga", "kasa"]


WITHOUT_DATA = (True, False, "gaussian", "olora", "pissa", "pissa_niter_2", "orthogonal", "mica")


@pytest.mark.parametrize("init", initializations())
def test_an_initialization_is_refused_unless_the_base_stays_as_it_was(init):
    """By what it does to a model; of those that need data, the default's kin alone are taken."""
    taken = unrecoverable({"init_lora_weights": init}) is None
    init = str(init).replace("[number of iters]", "2") if isinstance(init, str) else init
    if init in WITHOUT_DATA:
        model = build_model()
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        get_peft_model(model, LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=init))
        after = {n.replace(".base_layer", ""): w for n, w in model.state_dict().items()}
        stays = all(torch.equal(after[name], weight) for name, weight in before.items())
        assert stays or not taken
    else:
        assert taken == (init == "eva")  # which sets A, and leaves the weights as they are


VARIANTS = [f.name for f in fields(LoraConfig) if f.metadata.get("is_lora_variant")]


@pytest.mark.parametrize("name", [*VARIANTS, "use_qalora", "use_kasa", "kasa_config"])
def test_variants_of_lora_are_refused_by_name(name):
    assert len(VARIANTS) > 4 and unrecoverable(LoraConfig().to_dict()) is None
    assert unrecoverable({name: None}) is unrecoverable({name: False}) is None
    for said in (True, [1], {"some": "setting"}):
        told = unrecoverable({name: said})
        assert told and (name in told or "DoRA" in told)


@pytest.mark.parametrize(
    ("family", "case", "beside"),
    [
        ("llama", {"target_parameters": ["q_proj.weight", "mlp.up_proj.weight"]}, "up_proj"),
        ("mixtral", {"target_modules": "all-linear"}, "mlp.gate"),  # the router: a parameter
        ("tied", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, "lm_head"),
    ],
)
def test_modules_that_peft_adapts_beside_target_modules(family, case, beside, make_model, tmp_path):
    """They are named elsewhere in the config; PEFT loads what is recovered."""
    sizes = {"tie_word_embeddings": True} if family == "tied" else {}
    base = make_model(family.replace("tied", "llama"), **sizes)
    prune(str(base), tmp_path / "pruned", PruningArgs(ratio=0.5))
    train_on(tmp_path / "pruned", tmp_path / "adapter", **{"target_modules": [], **case})
    assert any(f"{beside}.lora_A" in name for name in load_file(tmp_path / "adapter" / FILE))
    recover(tmp_path / "adapter")
    loaded(AutoModelForCausalLM.from_pretrained(base), tmp_path / "recovered-adapter")
    assert not failures(verify(tmp_path / "recovered-adapter"))

    def without(weights):
        return {name: weight for name, weight in weights.items() if f"1.mlp.{beside}" not in name}

    if family == "llama":
        rewrite(tmp_path / "adapter", without)
        with pytest.raises(LoRAMError, match=r"found none on model.layers.1.mlp.up_proj \(1 such"):
            recover(tmp_path / "adapter", output=tmp_path / "again")


def test_a_parameter_is_not_confined(make_model, tmp_path):
    sparse = make_sparse(make_model(), tmp_path / "sparse")
    config = LoraConfig(target_modules=[], target_parameters=["up_proj.weight"])
    model = get_peft_model(load_model(str(sparse)), config)
    with pytest.raises(LoRAMError, match="without the mask: name the layer"):
        confine(model, PruningPlan.load(sparse), sparse)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_alpha": "16"}, "expected lora_alpha in .* found '16'"),
        ({"lora_alpha": None}, "expected lora_alpha in"),
        ({"lora_alpha": float("nan")}, "expected finite numbers in lora_alpha"),
        ({"r": "4"}, "expected r in"),
        ({"alpha_pattern": ["q_proj"]}, "expected alpha_pattern in"),
        ({"alpha_pattern": {"q_proj": "x"}}, "expected finite numbers in alpha_pattern"),
        ({"rank_pattern": {"(": 3}}, "expected regular expressions in rank_pattern"),
        ({"target_modules": [1, 2]}, "expected names in target_modules"),
        ({"target_modules": {"q_proj": 1}}, "expected target_modules in"),
        ({"exclude_modules": 5}, "expected exclude_modules in"),
        ({"target_parameters": 5}, "expected target_parameters in"),
        ({"modules_to_save": "lm_head"}, "expected modules_to_save in"),
        ({"layers_to_transform": "1"}, "expected layers_to_transform in"),
        ({"use_rslora": "false"}, "expected use_rslora in"),
    ],
    ids=str,
)
def test_settings_of_another_type_are_named(change, message, masked, tmp_path):
    (tmp_path / "adapter").mkdir()
    settings = {**LoraConfig(r=4).to_dict(), **change}
    text = json.dumps(settings, default=list)
    (tmp_path / "adapter/adapter_config.json").write_text(text)
    with pytest.raises(LoRAMError, match=message):
        (merge_masked if masked else recover)(tmp_path / "adapter")


# --- what is not a number ---


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_adapters_that_are_not_finite_are_refused_by_name(value, pruned, tmp_path):
    def poison(weights):
        weights[UP_B][0, 0] = value
        return weights

    train_on(pruned, tmp_path / "adapter")
    recover(tmp_path / "adapter", output=tmp_path / "full")
    for name in ("adapter", "full"):
        rewrite(tmp_path / name, poison)
    message = f"found NaN or infinity in {UP_B}"
    with pytest.raises(LoRAMError, match=message):
        recover(tmp_path / "adapter")
    with pytest.raises(LoRAMError, match=message):
        gather_adapter(tmp_path / "full", PruningPlan.load(pruned), "pruned", tmp_path / "cut")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "full", "pruned"}


@pytest.mark.parametrize("poisoned", ["adapter", "base", "sum"])
def test_merging_what_is_not_finite_is_refused_by_name(poisoned, make_model, tmp_path):
    base, name = tmp_path / "base", "model.layers.1.mlp.up_proj.weight"
    AutoModelForCausalLM.from_pretrained(make_model()).save_pretrained(base)
    if poisoned == "base":
        rewrite(base, lambda w: {**w, name: w[name].fill_(np.inf)})
    train_on(make_sparse(base, tmp_path / "sparse"), tmp_path / "adapter")
    if poisoned == "adapter":
        name = UP_B
        rewrite(tmp_path / "adapter", lambda w: {**w, name: w[name].fill_(np.nan)})
    message = f"found NaN or infinity in {name}"
    if poisoned == "sum":
        for part in (UP_B, UP_B.replace("lora_B", "lora_A")):
            rewrite(tmp_path / "adapter", lambda w, part=part: {**w, part: w[part].fill_(1e30)})
        message = f"found that {name} with its update is more than F32 holds"
    with pytest.raises(LoRAMError, match=message):
        merge_masked(tmp_path / "adapter")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "base", "sparse"}
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())


def test_a_run_that_diverged_is_told_of_and_not_stopped(pruned, tmp_path):
    model = train_on(pruned, tmp_path / "adapter")
    trainer = SimpleNamespace(model=model, accelerator=SimpleNamespace(unwrap_model=lambda m: m))
    run = SimpleNamespace(pruned=pruned, base=Base("base"), masked=False, merges=False)
    section = LoRAMConfig(pruned_model_path=str(pruned), evaluate_recovered_every=1)
    watching = RecoveredEvaluation(trainer, run, section)
    watching.held = []
    with torch.no_grad():
        next(w for name, w in model.named_parameters() if "lora_B" in name).fill_(np.nan)
    assert np.isnan(watching.loss())
