"""Adapters from before transformers 5 are recovered, and cut, to what PEFT makes of them today."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_adapter import FILE, PREFIX, rewrite
from test_recover import randomize
from transformers import AutoModelForCausalLM

from axolotl_loram.architecture.config_json import load_config
from axolotl_loram.architecture.model import parameters
from axolotl_loram.architecture.plan import PruningPlan
from axolotl_loram.architecture.spaces import EXPERTS
from axolotl_loram.config import PruningArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.memory.trained import FIRST, OLD_NAMES
from axolotl_loram.pruning.prune import prune
from axolotl_loram.recovery.recover import gather_adapter, recover
from axolotl_loram.results.candidates import put_on
from axolotl_loram.results.inspect import failures, verify

RANK = 4


def write_old(folder, model, family, targets, ranks=RANK, **settings):
    """An adapter with LoRA on each expert by itself, and on queries, as transformers 4 had it."""
    torch.manual_seed(5)
    gate, up, down = OLD_NAMES.get(family, OLD_NAMES["olmoe"])
    weights, config = {}, load_config(str(model))

    def add(module, inputs, outputs):
        weights[f"{PREFIX}{module}.lora_A.weight"] = 0.1 * torch.randn(ranks, inputs)
        weights[f"{PREFIX}{module}.lora_B.weight"] = 0.1 * torch.randn(outputs, ranks)

    for tensor in parameters(config):
        if tensor.role == EXPERTS:
            leaves = (gate, up) if tensor.name.endswith(FIRST) else (down,)
            experts, outputs, inputs = tensor.shape
            for name in [f"{e}.{leaf}" for e in range(experts) for leaf in leaves]:
                if name.partition(".")[2] in targets:
                    add(f"{tensor.module}.{name}", inputs, outputs // len(leaves))
        elif tensor.module.rpartition(".")[2] in {"q_proj", "gate"} & {*targets}:
            add(tensor.module, *tensor.shape[::-1])
    if family == "mixtral":
        weights = {n.replace(".mlp.", ".block_sparse_moe."): w for n, w in weights.items()}
    folder.mkdir()
    save_file(weights, folder / FILE, metadata={"format": "pt"})
    asked = LoraConfig(r=RANK, lora_alpha=8, target_modules=targets, **settings).to_dict()
    asked["base_model_name_or_path"] = str(model)
    (folder / "adapter_config.json").write_text(json.dumps(asked, default=list))


def updates(model, adapter):
    """What a model changes in each adapted weight, as PEFT has it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of keys that are missing
        warnings.filterwarnings("ignore", "target_modules=|Could not find a config")
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter)
    layers = {name: m for name, m in adapted.named_modules() if hasattr(m, "get_delta_weight")}
    found = {name: layer.get_delta_weight("default") for name, layer in layers.items()}
    assert found and all(update.any() for update in found.values())
    return found


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("mixtral", ["q_proj", "gate", "w1", "w2", "w3"]),
        ("mixtral", ["q_proj", "w2"]),
        ("olmoe", ["gate_proj", "up_proj", "down_proj"]),
        ("qwen3_moe", ["q_proj", "gate", "gate_proj", "up_proj", "down_proj"]),
        ("deepseek_v3", ["gate_proj", "up_proj", "down_proj"]),
    ],
)
def test_lora_on_single_experts_is_lora_on_their_stack(family, targets, make_model, tmp_path):
    sizes = {"mlp_only_layers": []} if family == "qwen3_moe" else {}
    base, pruned = make_model(family, **sizes), tmp_path / "pruned"
    units = ("experts",) if family == "deepseek_v3" else ("experts", "expert_neurons")
    prune(str(base), pruned, PruningArgs(ratio=0.5, units=units))
    write_old(tmp_path / "narrow", pruned, family, targets)
    recover(tmp_path / "narrow", output=tmp_path / "recovered")
    plan = PruningPlan.load(pruned)
    gather_adapter(tmp_path / "recovered", plan, str(pruned), tmp_path / "cut")
    old, new = (updates(pruned, tmp_path / name) for name in ("narrow", "cut"))
    assert old.keys() == new.keys() and all(torch.equal(old[n], new[n]) for n in old)
    assert not failures(verify(tmp_path / "recovered"))
    norms = {name: update.norm() for name, update in updates(base, tmp_path / "recovered").items()}
    assert all(torch.allclose(old[name].norm(), norm) for name, norm in norms.items())

    write_old(tmp_path / "wide", base, family, targets)
    gather_adapter(tmp_path / "wide", plan, str(pruned), tmp_path / "start")
    recover(tmp_path / "start", output=tmp_path / "again")
    before, after = (updates(base, tmp_path / name) for name in ("wide", "again"))
    for name, update in after.items():
        kept = update != 0
        assert torch.equal(update[kept], before[name][kept])
    put_on(AutoModelForCausalLM.from_pretrained(base), tmp_path / "wide")


def test_a_pattern_of_targets_and_the_root_of_the_rank(make_model, tmp_path):
    """PEFT (0.20) doubles α where the rank doubles, which is too much over the rank's root."""
    base, pruned = make_model("mixtral"), tmp_path / "pruned"
    prune(str(base), pruned, PruningArgs(ratio=0.5))
    targets, one = ["q_proj", "w1", "w2", "w3"], "model.layers.1.mlp.experts"
    write_old(tmp_path / "old", base, "mixtral", targets, use_rslora=True)
    file = tmp_path / "old/adapter_config.json"
    pattern = r".*\.(q_proj|w1|w2|w3)"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_modules": pattern}))
    plan = PruningPlan.load(pruned)
    gather_adapter(tmp_path / "old", plan, str(pruned), tmp_path / "cut")
    found = updates(pruned, tmp_path / "cut")
    stack = next(update for name, update in found.items() if name.endswith(f"{one}.base_layer"))
    weights, kept = load_file(tmp_path / "old" / FILE), plan.kept_experts(1)[0]
    prefix = f"{PREFIX}model.layers.1.block_sparse_moe.experts.{kept}.w3"
    a, b = (weights[f"{prefix}.lora_{part}.weight"] for part in "AB")
    torch.testing.assert_close(stack[0, -b.shape[0] :], 8 / RANK**0.5 * b @ a)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("qwen2_moe", {}, "of a single one, from before transformers 5, which PEFT does not load"),
        ("olmoe", {"lost": ".experts.2.up_proj."}, r"found no \S+experts.2.up_proj.lora_A.weight"),
        ("olmoe", {"ranks": 2}, r"LoRA of rank 4 and of one shape on all experts, found .*\[2, 32"),
    ],
)
def test_single_experts_that_make_no_stack_are_refused(
    family, change, message, make_model, tmp_path
):
    base, pruned = make_model(family), tmp_path / "pruned"
    prune(str(base), pruned, PruningArgs(ratio=0.5))
    targets = ["gate_proj", "up_proj", "down_proj"]
    lost = change.pop("lost", "nothing")
    write_old(tmp_path / "old", base, family, targets, **change)
    rewrite(tmp_path / "old", lambda w: {n: value for n, value in w.items() if lost not in n})
    with pytest.raises(LoRAMError, match=message):
        gather_adapter(tmp_path / "old", PruningPlan.load(pruned), str(pruned), tmp_path / "cut")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("asked", ["target_modules", "modules_to_save"])
def test_a_config_that_names_modules_as_they_were_called(asked, tied, make_model, tmp_path):
    """GPT-NeoX called its lm_head embed_out, which PEFT passes over today."""
    base, pruned = make_model("gpt_neox", tie_word_embeddings=tied), tmp_path / "pruned"
    prune(str(base), pruned, PruningArgs(ratio=0.5))
    named = {"target_modules": ["dense"], "modules_to_save": None}
    named[asked] = [*(named[asked] or ()), "lm_head"]
    patterns = {"rank_pattern": {"lm_head": 2}, "alpha_pattern": {"lm_head": 6}}
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(pruned), LoraConfig(r=RANK, **patterns, **named)
    )
    randomize(model)
    model.save_pretrained(tmp_path / "old")
    recover(tmp_path / "old", output=tmp_path / "new")
    rewrite(tmp_path / "old", lambda w: {n.replace("lm_head", "embed_out"): w[n] for n in w})
    file = tmp_path / "old/adapter_config.json"
    file.write_text(file.read_text().replace("lm_head", "embed_out"))
    recover(tmp_path / "old", output=tmp_path / "again")
    new, again = (load_file(tmp_path / name / FILE) for name in ("new", "again"))
    assert new.keys() == again.keys() and all(torch.equal(new[n], again[n]) for n in new)
    told = [(tmp_path / n / "adapter_config.json").read_text() for n in ("new", "again")]
    assert told[0] == told[1] and "lm_head" in told[0]
