"""What a run trains, against PEFT: the LoraConfig that Axolotl builds, on the meta device."""

import pytest
import torch
import transformers
from axolotl.loaders.adapter import _build_peft_lora_config
from axolotl.utils.dict import DictDefault
from conftest import write_yaml
from families import pico_config
from peft import get_peft_model
from transformers import BitsAndBytesConfig, Trainer, TrainingArguments

import axolotl_loram.heterogeneous  # noqa: F401
from axolotl_loram.architecture.config_json import with_defaults
from axolotl_loram.architecture.families import FAMILIES
from axolotl_loram.config import PruningArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.memory.layout import Layout
from axolotl_loram.memory.optimizers import STATES, optimizer_bytes
from axolotl_loram.memory.planner import plan, report
from axolotl_loram.memory.predict import compare, predict, pruned_config
from axolotl_loram.memory.request import request
from axolotl_loram.memory.settings import TrainingArgs, settings_of
from axolotl_loram.memory.trained import OLD_NAMES
from axolotl_loram.memory.weights import Storage, int8_bytes, weight_bytes
from axolotl_loram.pruning.prune import prune

LINEAR = {"lora_target_linear": True}
QUERIES = {"lora_target_modules": ["q_proj"]}
ENDS = {"lora_target_modules": ["self_attn.q_proj", "mlp.up_proj"]}
STACKED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LAYERS = r".*\.layers\.(1|3)\.self_attn\.(q|k)_proj|.*\.mlp\.(gate|up|down)_proj"
MLPS = r"model\.layers\.[\d]+\.(mlp|self_attn)\.(.*\.)?(up|down|gate|q|k|v|o)_proj"
BOTH = ["lm_head", "embed_tokens"]
CASES = {
    "linear": LINEAR,
    "all-linear": {"lora_target_modules": "all-linear"},
    "ends": ENDS,
    "layers by a pattern": {"lora_target_modules": LAYERS},
    "a pattern": {"lora_target_modules": MLPS},
    "experts by name": {"lora_target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "experts' first names": {"lora_target_modules": ["w1", "w2", "w3"]},
    "a router": {"lora_target_modules": ["q_proj", "gate"]},
    "half a gate": {"lora_target_modules": ["gate_proj", "q_proj"]},
    "parameters": {**QUERIES, "lora_target_parameters": STACKED},
    "a router's parameter": {**LINEAR, "lora_target_parameters": ["mlp.gate.weight"]},
    "ranks": {**LINEAR, "lora_rank_pattern": {"down_proj": 2, ".*q_proj": 3}},
    "layers": {**LINEAR, "peft_layers_to_transform": [1, 2]},
    "layers of a list": {
        **LINEAR,
        "peft_layers_to_transform": [1],
        "peft_layers_pattern": ["layers"],
    },
    "norms whole": {**LINEAR, "lora_modules_to_save": ["norm"]},
    "an MLP whole": {**LINEAR, "lora_modules_to_save": ["layers.1.mlp"]},
    "both whole": {**QUERIES, "lora_modules_to_save": BOTH},
    "both whole and tied": {
        **QUERIES,
        "lora_modules_to_save": BOTH,
        "peft_ensure_weight_tying": True,
    },
    "embeddings": {"lora_target_modules": ["q_proj", *BOTH]},
    "one of two tied": {
        "lora_target_modules": ["q_proj", "lm_head"],
        "lora_rank_pattern": {"embed_tokens": 2},
        "peft_ensure_weight_tying": True,
    },
    "one of two tied, the other whole": {
        "lora_target_modules": ["q_proj", "embed_tokens"],
        "lora_modules_to_save": ["lm_head"],
        "peft_ensure_weight_tying": True,
    },
    "tokens": {**QUERIES, "peft_trainable_token_indices": [5, 6]},
    "tokens of both": {
        **QUERIES,
        "peft_trainable_token_indices": {"embed_tokens": [5, 6], "lm_head": [5, 6]},
    },
    "tokens of each": {
        **QUERIES,
        "peft_trainable_token_indices": {"embed_tokens": [5, 6], "lm_head": [7]},
    },
    "DoRA": {"lora_target_modules": ["q_proj", "o_proj"], "peft_use_dora": True},
}
REFUSED_BY_PEFT_ALONE = {("qwen2_moe", "a router")}
"""A module that is no linear one: PEFT says so when it comes to it."""


def trained_by_peft(config, asked):
    """(parameters, bytes) that PEFT trains of a bf16 model; None where it refuses."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    cfg = DictDefault({"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0} | asked)
    try:
        model = get_peft_model(model, _build_peft_lora_config(model, cfg))
    except ValueError:
        return None
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return sum(w.numel() for w in weights), sum(w.nbytes for w in weights)


def planned(config, asked):
    """The same, by the planner."""
    cfg = {"adapter": "lora", "lora_r": 4, "bf16": True} | asked
    try:
        found = predict(Layout.of(with_defaults(config)), TrainingArgs(**settings_of(cfg)), "lora")
    except LoRAMError:
        return None
    return found.lora_parameters, found.lora_bytes


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "family", ["llama", "gemma", "phi3", "gpt_neox", "qwen2_moe", "gpt_oss", *OLD_NAMES]
)
def test_what_is_trained_is_what_peft_trains(family, case):
    config, asked = pico_config(family), CASES[case]
    expected = trained_by_peft(config, asked)
    if (family, case) in REFUSED_BY_PEFT_ALONE:
        assert expected is None
        return
    assert planned(config.to_dict(), asked) == expected


@pytest.mark.parametrize("family", [name for name in FAMILIES if not FAMILIES[name].whole])
def test_all_linear_modules_of_every_family(family):
    config = pico_config(family)
    assert planned(config.to_dict(), LINEAR) == trained_by_peft(config, LINEAR)


def test_experts_are_called_what_peft_takes_them_for():
    from peft.utils import transformers_weight_conversion as conversion

    for family in FAMILIES:
        kind = conversion._MODEL_TO_CONVERSION_PATTERN.get(family)
        old = conversion._MOE_TARGET_MODULE_MAPPING.get(kind)
        assert (family in OLD_NAMES) == bool(old)
        assert not old or set(old) == {"gate", *OLD_NAMES[family]}


@pytest.mark.parametrize(
    ("family", "asked", "parameters"),
    [
        ("llama", ENDS, 1_984),
        ("llama", {**LINEAR, "peft_layers_to_transform": [1, 2]}, 2_752),
        ("llama", {**LINEAR, "lora_rank_pattern": {".*q_proj": 2}}, 6_016),
        ("mixtral", {**LINEAR, "lora_target_parameters": STACKED}, 13_184),
        ("qwen3_moe", LINEAR, 11_840),
        ("deepseek_v3", LINEAR, 9_536),
    ],
)
def test_runs_that_were_counted_wrong(family, asked, parameters):
    """On models pruned by half, as PEFT trained them."""
    config = pruned_config(with_defaults(pico_config(family).to_dict()), 0.5, (4, 2))
    assert planned(config, asked)[0] == parameters


def test_8_bit_weights_and_single_quantization(tmp_path):
    config = pico_config("llama")
    layout, run = Layout.of(config.to_dict()), TrainingArgs(load_in_8bit=True, double_quant=False)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(
        tmp_path
    )
    for method, options in {
        "lora": {"load_in_8bit": True},
        "qlora": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    }.items():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path,
            quantization_config=BitsAndBytesConfig(**options),
            dtype=torch.bfloat16,
            device_map="cpu",
        )
        kept = 0
        for weight in model.parameters():
            kept += weight.nbytes
            kept += weight.SCB.nbytes if getattr(weight, "SCB", None) is not None else 0
            state = getattr(weight, "quant_state", None)
            kept += state.absmax.nbytes + state.code.nbytes if state is not None else 0
        assert predict(layout, run, method).weights_device_bytes == kept
    sixteen = predict(layout, run, "loram").weights_device_bytes
    assert sixteen == weight_bytes(layout, Storage()).on_device  # LoRAM has no 8 bits
    assert int8_bytes((4, 6, 8)) == 4 * 6 * (8 + 4)  # experts: a scale for each row of each


@pytest.mark.parametrize("optimizer", sorted(STATES))
def test_optimizer_states_are_those_of_the_real_ones(optimizer, tmp_path):
    weights = [torch.nn.Parameter(torch.ones(shape)) for shape in ((8, 32), (16, 512), (8191,))]
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[])
    own = {"adopt_adamw": "adopt.ADOPT", "adamc": "adamc.AdamC"}
    if optimizer in own:
        from importlib import import_module

        module, name = own[optimizer].split(".")
        made = getattr(import_module(f"axolotl.utils.optimizers.{module}"), name)(weights, lr=1e-3)
    elif optimizer == "ao_adamw_fp8":
        from torchao.optim import AdamWFp8

        made = AdamWFp8(weights, lr=1e-3)
    else:
        on_cpu = {"paged_adamw_32bit": "adamw_torch", "paged_ademamix_32bit": "ademamix"}
        arguments.optim = on_cpu.get(optimizer, optimizer.removeprefix("paged_"))
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        made = kind(weights, **options)
    if hasattr(made, "train"):
        made.train()
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    with torch.compiler.set_stance("force_eager"):  # torchao compiles for long
        made.step()
    found = [sum(map(bytes_of, made.state[weight].items())) for weight in weights]
    assert [optimizer_bytes(optimizer, tuple(weight.shape)) for weight in weights] == found


def bytes_of(state):
    """Bytes of a state; bitsandbytes' tables are everybody's, and counters are numbers."""
    name, value = state
    if not torch.is_tensor(value) or name == "step" or name.startswith("qmap") or value.dim() == 0:
        return 0
    if hasattr(value, "tensor_attrs"):  # torchao's, each with a table of its own
        return sum(getattr(value, part).nbytes for part in value.tensor_attrs)
    return value.nbytes


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("optimizer", "galore_adamw", "optimizer (galore_adamw: counted as adamw_torch)"),
        ("load_in_8bit", True, "load_in_8bit"),
        ("peft_use_dora", True, "peft_use_dora"),
        ("bnb_config_kwargs", {"llm_int8_skip_modules": ["a"]}, "(llm_int8_skip_modules)"),
        ("gradient_checkpointing", "offload", "gradient_checkpointing (offload)"),
        ("peft_layer_replication", [[0, 1]], "peft_layer_replication"),
        ("peft_trainable_token_indices", [5], "peft_trainable_token_indices"),
    ],
)
def test_what_is_not_counted_is_named(key, value, said, tmp_path):
    pico_config("llama").save_pretrained(tmp_path)
    cfg = {"base_model": str(tmp_path), "adapter": "lora", **LINEAR, key: value}
    found = plan(request(str(write_yaml(tmp_path / "a.yml", cfg))))
    assert [what for what in found["not_counted"] if said in what]
    assert f"not counted: {found['not_counted'][0]}" in report(found)


@pytest.mark.parametrize("units", ["neurons", "layers"])
def test_logits_that_an_anchor_makes_are_named(units, tmp_path):
    """A fused loss is not called then, unless whole layers go: the trainer's own is, there."""
    base = tmp_path / "base"
    transformers.AutoModelForCausalLM.from_config(pico_config("llama")).save_pretrained(base)
    cfg = {"base_model": str(base), "adapter": "lora", **LINEAR}
    cfg |= {"loram": {"pruning": {"units": units, "ratio": 0.5}, "anchor": "base"}}
    cfg |= {"liger_fused_linear_cross_entropy": True}
    found = plan(request(str(write_yaml(tmp_path / "a.yml", cfg))))
    said = [] if units == "layers" else ["anchor (the logits that liger would not make)"]
    assert found["not_counted"] == said
    prune(str(base), tmp_path / "pruned", PruningArgs(units=units, ratio=0.5))
    cfg["loram"] = {"pruned_model_path": str(tmp_path / "pruned"), "anchor": "base"}
    assert plan(request(str(write_yaml(tmp_path / "b.yml", cfg))))["not_counted"] == said


def test_a_yaml_without_pruning_is_planned_as_it_is(tmp_path):
    pico_config("llama").save_pretrained(tmp_path)
    cfg = {"base_model": str(tmp_path), "adapter": "lora", **LINEAR}
    found = plan(request(str(write_yaml(tmp_path / "a.yml", cfg))))
    assert list(found["methods"]) == ["lora", "qlora"] and found["not_counted"] == []


@pytest.mark.parametrize(
    "asked",
    [
        {"lora_target_modules": "("},
        {"lora_modules_to_save": ["("]},
        {**LINEAR, "lora_rank_pattern": {"[": 2}},
        {**LINEAR, "lora_rank_pattern": {"q": 0}},
        {**LINEAR, "peft_layers_pattern": ["("]},
        {**QUERIES, "peft_trainable_token_indices": {"embed_tokens": "all"}},
        {**LINEAR, "peft_trainable_token_indices": {5: [5]}},
    ],
)
def test_targets_that_cannot_be_read_are_refused(asked):
    with pytest.raises(LoRAMError, match=r"expected|valid|greater"):
        TrainingArgs.parse(**settings_of({"adapter": "lora", **asked}))


def test_targets_that_name_nothing_are_refused():
    config = pico_config("llama").to_dict()
    for targets in ("q_proj", ["proj"], ["(q|v)_proj"], []):
        run = TrainingArgs(**settings_of({"adapter": "lora", "lora_target_modules": targets}))
        with pytest.raises(LoRAMError, match=r"expected lora_target_modules.* of a llama model"):
            compare(config, config, run)
