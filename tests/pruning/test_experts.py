"""Mixtures of experts: whole experts and neurons within them as units."""

import json

import numpy as np
import pytest
import torch
from calibrated import evidence_for, load, text_tokens
from conftest import build_model
from families import pico_config
from test_cli import loram

import axolotl_loram.heterogeneous  # noqa: F401
from axolotl_loram.architecture.config_json import load_config, sizes_of
from axolotl_loram.architecture.counts import keep_counts
from axolotl_loram.architecture.model import changed, config_changes, layer_groups, tensors
from axolotl_loram.architecture.plan import PruningPlan
from axolotl_loram.config import PruningArgs
from axolotl_loram.criteria import CRITERIA
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.tensors import Checkpoint
from axolotl_loram.pruning.cache import prune_into_cache
from axolotl_loram.pruning.prune import prune
from axolotl_loram.training.support import check_router_losses

MIXTRAL_8X7B = {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe") / "base"
    model = build_model("mixtral", **{"num_experts": 4, "num_experts_per_tok": 2})
    model.save_pretrained(folder)
    return folder


def scored(folder, work, method, layers=(1, 2), units=("experts",)):
    evidence = evidence_for(folder, work, layers, kinds=frozenset(units))
    CRITERIA[method].score(evidence)
    return {layer: evidence.load(layer) for layer in layers}


def contributions(model, layer, tokens):
    """What each expert adds to each token's hidden state, (experts, tokens, hidden), spelt out."""
    seen = {}
    experts = model.model.layers[layer].mlp.experts
    handle = experts.register_forward_pre_hook(lambda _, args: seen.update(args=args))
    with torch.no_grad():
        model(input_ids=torch.from_numpy(tokens))
    handle.remove()
    hidden, indices, weights = seen["args"]
    added = torch.zeros(experts.num_experts, *hidden.shape)
    for expert in range(experts.num_experts):
        gate, up = (hidden @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
        output = (torch.nn.functional.silu(gate) * up) @ experts.down_proj[expert].T
        added[expert] = output * (weights * (indices == expert)).sum(1, keepdim=True)
    return added.double().detach()


@pytest.mark.parametrize("method", ["activation", "fluctuation", "reap"])
def test_experts_are_scored_by_what_they_add(method, moe, tmp_path):
    scores, model = scored(moe, tmp_path / "work", method), load(moe)
    for layer in (1, 2):
        added = contributions(model, layer, text_tokens())
        if method == "fluctuation":
            expected = added.var(dim=1, correction=0).sum(1).sqrt()
        elif method == "reap":
            lengths = added.norm(dim=2)
            expected = lengths.sum(1) / (lengths > 0).sum(1).clamp(min=1)
        else:
            expected = added.square().sum((1, 2)).sqrt()
        np.testing.assert_allclose(scores[layer]["experts"], expected.numpy(), rtol=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("method", ["activation", "fluctuation", "reap"])
def test_neurons_of_experts_are_scored_by_what_down_proj_reads(
    method, family, make_model, tmp_path
):
    """What a neuron adds to each token's hidden state: found by leaving the others out."""
    folder, kinds = make_model(family), ("experts", "expert_neurons")
    scores = scored(folder, tmp_path / "work", method, units=kinds)[1]["expert_neurons"]
    model, seen = load(folder), {}
    model.set_experts_implementation("eager")
    experts = model.model.layers[1].mlp.experts
    experts.register_forward_pre_hook(lambda _, args: seen.update(args=args))
    with torch.no_grad():
        model(input_ids=torch.from_numpy(text_tokens()))
    experts._forward_pre_hooks.clear()
    bias, down = getattr(experts, "down_proj_bias", None), experts.down_proj.data.clone()
    if bias is not None:
        bias.data.zero_()
    assert scores.shape == (4, 48)
    for expert, neuron in ((0, 0), (1, 17), (3, 47)):
        experts.down_proj.data.zero_()
        place = (expert, neuron) if family == "gpt_oss" else (expert, slice(None), neuron)
        experts.down_proj.data[place] = down[place]
        with torch.no_grad():
            added = experts(*seen["args"]).double()
        if method == "fluctuation":
            expected = added.var(dim=0, correction=0).sum().sqrt()
        else:
            expected = added.square().sum().sqrt()
        np.testing.assert_allclose(scores[expert, neuron], float(expected), rtol=2e-4)


@pytest.mark.parametrize("method", ["reap", "activation"])
def test_experts_of_all_layers_compete_but_each_token_finds_enough(method, moe, tmp_path):
    """One layer's experts score far above the others', which keep what a token goes through."""
    from axolotl_loram.pruning.importance import choose

    scores = {1: np.array([5.0, 6, 7, 8]), 2: np.array([1.0, 2, 3, 4]), 3: np.array([0.1] * 4)}
    counts = dict.fromkeys(scores, 3)
    kept = choose(scores, counts, True, True, dict.fromkeys(scores, 2))
    assert [kept[layer].tolist() for layer in scores] == [[0, 1, 2, 3], [1, 2, 3], [0, 1]]
    settings = PruningArgs(
        method=method,
        ratio=0.25,
        units="experts",
        allocation="global",
        refit=False,
        protect_first=0,
        protect_last=0,
        calibration_path=str(text_of(tmp_path)),
        calibration_samples=4,
        calibration_length=32,
    )
    with_tokenizer(moe)
    prune(str(moe), tmp_path / "pruned", settings)
    kept = PruningPlan.load(tmp_path / "pruned").counts
    fields = load_config(str(tmp_path / "pruned"))
    left = [sizes_of(fields, layer)["experts"] for layer in range(4)]
    assert sum(left) == 12 and min(left) >= 2
    with torch.no_grad():
        logits = load(tmp_path / "pruned")(input_ids=torch.arange(40)[None]).logits
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("method", ["reap", "activation"])
def test_experts_and_their_neurons_go_at_once_by_text(method, moe, tmp_path):
    settings = PruningArgs(
        method=method,
        ratio=0.5,
        units="experts,expert_neurons",
        refit=False,
        calibration_path=str(text_of(tmp_path)),
        calibration_samples=4,
        calibration_length=32,
    )
    with_tokenizer(moe)
    record = prune(str(moe), tmp_path / "pruned", settings)
    kept = record["parameters"]["kept_per_pruned_layer"]
    assert kept == {"experts": 2, "expert_neurons": 24}


def with_tokenizer(folder):
    from conftest import byte_tokenizer

    byte_tokenizer().save_pretrained(folder)


def text_of(folder):
    file = folder / "text.txt"
    file.write_text(json.__doc__ * 4)
    return file


def test_taylor_of_experts_is_the_gradient_of_a_mask_on_their_outputs(moe, tmp_path):
    scores, model = scored(moe, tmp_path / "work", "taylor"), load(moe).requires_grad_(False)
    expected = np.zeros(4)
    for sample in torch.from_numpy(text_tokens()):
        mask = torch.ones(4, requires_grad=True)
        experts = model.model.layers[1].mlp.experts
        handle = experts.register_forward_pre_hook(
            lambda _, args, mask=mask: (args[0], args[1], args[2] * mask[args[1]])
        )
        model(input_ids=sample[None], labels=sample[None]).loss.backward()
        handle.remove()
        expected += mask.grad.abs().double().numpy()
    np.testing.assert_allclose(scores[1]["experts"], expected, rtol=1e-3)


def test_magnitude_counts_all_that_goes_with_the_unit(moe, tmp_path):
    scores, model = (
        scored(moe, tmp_path / "work", "magnitude", units=("experts", "expert_neurons")),
        load(moe),
    )
    mlp = model.model.layers[2].mlp
    up, down, router = (
        values.detach().double().square()
        for values in (mlp.experts.gate_up_proj, mlp.experts.down_proj, mlp.gate.weight)
    )
    whole = up.sum((1, 2)) + down.sum((1, 2)) + router.sum(1)
    np.testing.assert_allclose(scores[2]["experts"], whole.numpy(), rtol=1e-5)
    gate, value = up.chunk(2, dim=1)
    neurons = gate.sum(2) + value.sum(2) + down.sum(1)
    np.testing.assert_allclose(scores[2]["expert_neurons"], neurons.numpy(), rtol=1e-5)


def test_experts_and_their_neurons_are_chosen_by_score(moe, tmp_path):
    settings = PruningArgs(method="magnitude", ratio=0.5, units="experts,expert_neurons")
    prune(str(moe), tmp_path / "pruned", settings)
    plan = PruningPlan.load(tmp_path / "pruned")
    scores = scored(moe, tmp_path / "work", "magnitude", units=("experts", "expert_neurons"))
    kept = plan.kept_in(1)
    assert kept["experts"].tolist() == sorted(np.argsort(-scores[1]["experts"])[:2].tolist())
    for slot, expert in enumerate(kept["experts"]):
        best = np.argsort(-scores[1]["expert_neurons"][expert])[:24]
        assert kept["expert_neurons"][slot].tolist() == sorted(best.tolist())
    names = Checkpoint(tmp_path / "pruned").tensors
    ours = {name for name in names if ".layers.1.block_sparse_moe.experts." in name}
    assert {name.split(".experts.")[1] for name in ours} == {
        f"{expert}.w{part}.weight" for expert in (0, 1) for part in (1, 2, 3)
    }


def test_calibrated_pruning_of_a_mixture_refits_its_attention(moe, tmp_path, text_file):
    from conftest import byte_tokenizer

    byte_tokenizer().save_pretrained(moe)
    settings = PruningArgs(
        method="activation",
        ratio=0.5,
        calibration_path=str(text_file),
        calibration_samples=8,
        calibration_length=32,
    )
    record = prune(str(moe), tmp_path / "pruned", settings)
    assert record["parameters"]["kept_per_pruned_layer"] == {"kv_groups": 1, "experts": 2}
    assert all("o_proj" in name for name in record["refit"]) and len(record["refit"]) == 2


def test_counts_of_mixtral_8x7b():
    """By hand: 32 layers of attention and 8 experts, embeddings, norms, routers."""
    attention, expert = 2 * 4096**2 + 2 * 4096 * 1024, 3 * 4096 * 14336
    outside = 2 * 32000 * 4096 + 4096
    layer = attention + 8 * expert + 8 * 4096 + 2 * 4096
    from axolotl_loram.architecture.counts import summary

    counted = summary(MIXTRAL_8X7B, keep_counts(MIXTRAL_8X7B, 0.5, 4, 2, ["experts"]))
    assert counted["base_parameters"] == outside + 32 * layer == 46_702_792_704
    assert counted["pruned_parameters"] == outside + 32 * layer - 26 * 4 * (expert + 4096)

    shares = {"experts": 0.5, "expert_neurons": 0.25}
    counted = summary(MIXTRAL_8X7B, keep_counts(MIXTRAL_8X7B, shares, 4, 2))
    narrow = 4 * 3 * 4096 * 10752 + 4 * 4096
    gone = 8 * expert + 8 * 4096 - narrow
    assert counted["pruned_parameters"] == outside + 32 * layer - 26 * gone == 23_801_466_880


def test_experts_and_their_neurons_go_by_shares_of_their_own(moe, tmp_path):
    """`prune`, the tensors it writes, `inspect` and `plan` agree, to the parameter."""
    pruned, shares = tmp_path / "pruned", {"expert_neurons": 0.25, "experts": 0.5}
    option = ("--pruning-ratio", "experts=0.5, expert_neurons=0.25", "--json")
    made = json.loads(loram("prune", moe, pruned, *option).stdout)
    assert made["kept_per_pruned_layer"] == {"experts": 2, "expert_neurons": 32}
    whole, left = (3 * 48 * 32 * 4 + 32 * 4, 3 * 32 * 32 * 2 + 32 * 2)
    assert made["base_parameters"] - made["pruned_parameters"] == 2 * (whole - left)
    model = load(pruned)
    assert sum(p.numel() for p in model.parameters()) == made["pruned_parameters"]
    assert torch.isfinite(model(input_ids=torch.arange(40)[None]).logits).all()
    assert PruningPlan.load(pruned).kept_in(1)["expert_neurons"].shape == (2, 32)

    assert json.loads((pruned / "loram.json").read_text())["pruning"]["ratio"] == shares
    assert "expert_neurons=0.25,experts=0.5" in loram("inspect", pruned).stdout
    planned = json.loads(loram("plan", moe, *option).stdout)
    assert planned["pruned_parameters"] == made["pruned_parameters"]
    ways = loram("plan", moe, *option[:2], "--compare").stdout
    assert "QLoRAM at expert_neurons=0.25,experts=0.5" in ways


def test_fit_finds_one_ratio_for_the_kinds_that_a_yaml_gives_shares_of(tmp_path):
    config, file = tmp_path / "config.json", tmp_path / "run.yml"
    config.write_text(json.dumps(MIXTRAL_8X7B))
    shares = {"experts": 0.5, "expert_neurons": 0.25}
    section = {"pruning": {"ratio": shares, "quantize": "nf4"}}
    run = {"base_model": str(config), "adapter": "qlora", "lora_target_linear": True}
    file.write_text(json.dumps(run | {"loram": section}))
    fitted = json.loads(loram("plan", file, "--fit", "60GiB", "--json").stdout)
    assert 0 < fitted["fit"]["pruning_ratio"] < 1
    assert fitted["kept_per_pruned_layer"].keys() == shares.keys()


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts"])
def test_either_name_of_the_number_of_experts_is_read_and_kept(name, tmp_path):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(pico_config("qwen3_moe")).save_pretrained(tmp_path / "base")
    file = tmp_path / "base/config.json"
    config = json.loads(file.read_text())
    config[name] = config.pop("num_local_experts")
    file.write_text(json.dumps(config))
    prune(
        str(tmp_path / "base"),
        tmp_path / "pruned",
        PruningArgs(ratio=0.5, protect_first=0, protect_last=0),
    )
    model = load(tmp_path / "pruned")
    assert [
        layer.mlp.experts.num_experts for i, layer in enumerate(model.model.layers) if i != 1
    ] == [2] * 3
    assert sizes_of(load_config(str(tmp_path / "pruned")), 2)["experts"] == 2


def test_a_plain_config_keeps_its_own_name_of_the_number_of_experts():
    config = {**MIXTRAL_8X7B, "num_experts": MIXTRAL_8X7B["num_local_experts"]}
    del config["num_local_experts"]
    pruned = changed(config, config_changes(config, keep_counts(config, 0.5, 0, 0)))
    assert pruned["num_experts"] == 4 and "num_local_experts" not in pruned


def test_dense_layers_among_sparse_ones_have_their_own_kinds():
    config = pico_config("qwen3_moe").to_dict()
    kinds = [{group.kind for group in layer_groups(config, layer)} for layer in (0, 1)]
    assert kinds == [{"kv_groups", "experts", "expert_neurons"}, {"kv_groups", "neurons"}]
    assert not any("experts" in t.name for t in tensors(config) if t.layer == 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.75}, r"keep 2 experts, found 1 of 4 .* at most 0\.5, or `units:` without exp"),
        (
            {"ratio": 0.5, "units": "heads"},
            "expected units among kv_groups, experts, expert_neurons",
        ),
        ({"ratio": {"experts": 0.75, "kv_groups": 0.5}}, "keep 2 experts, found 1 of 4 "),
        ({"ratio": {"heads": 0.5}}, "units among kv_groups, experts, expert_neurons .* heads"),
        ({"sparsity": 0.5}, "a dense language model for sparsity, found mixtral"),
    ],
)
def test_what_cannot_be_pruned_is_refused(settings, message, moe, tmp_path):
    with pytest.raises(LoRAMError, match=message):
        prune(str(moe), tmp_path / "pruned", PruningArgs(**settings))
    assert not (tmp_path / "pruned").exists()


def test_experts_in_router_groups_stay(make_model, tmp_path):
    """Whatever is removed evenly, the groups would lose other experts each."""
    grouped, pruned = make_model("deepseek_v3", n_group=2, topk_group=1), tmp_path / "pruned"
    refused = loram("prune", grouped, pruned, "--pruning-ratio", "0.5", check=False)
    assert refused.returncode == 1 and not pruned.exists()
    assert "expected all 4 experts of each layer to stay, found 2 left" in refused.stderr
    assert "among 2 equal groups of them (n_group), which would be split" in refused.stderr
    loram("prune", grouped, pruned, "--pruning-ratio", "0.5", "--units", "heads,neurons")
    assert load(pruned).config.n_routed_experts == 4


def test_a_plan_that_keeps_fewer_experts_than_a_token_uses_is_refused(moe, tmp_path):
    config = load_config(str(moe))
    with pytest.raises(LoRAMError, match=r"mlp.experts to keep 2 to 4 units, .* found .3."):
        PruningPlan(config, {"model.layers.1.mlp.experts": np.array([3], np.int32)})


@pytest.mark.parametrize(
    ("format", "message"),
    [
        (None, "keep 2 experts, found 1 of 4"),
        ("awq", "MXFP4 or FP8, found quantization_config 'awq"),
    ],
)
def test_what_cannot_be_pruned_is_said_before_a_run_reads_its_text(format, message, moe, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    config = json.loads((moe / "config.json").read_text())
    named = {"quantization_config": {"quant_method": format}} if format else {}
    (base / "config.json").write_text(json.dumps(config | named))
    with pytest.raises(LoRAMError, match=message):
        prune_into_cache(str(base), None, PruningArgs(ratio=0.75), str(tmp_path), pytest.fail)


def test_a_load_balancing_loss_over_unequal_layers_is_refused(moe, tmp_path):
    prune(str(moe), tmp_path / "pruned", PruningArgs(ratio=0.5))
    plan, config = PruningPlan.load(tmp_path / "pruned"), load(tmp_path / "pruned").config
    check_router_losses(config, plan)
    config.output_router_logits = True
    with pytest.raises(LoRAMError, match="overrides_of_model_config"):
        check_router_losses(config, plan)


def test_scoring_expert_neurons_by_text_is_refused(moe, tmp_path, text_file):
    settings = PruningArgs(
        method="taylor", ratio=0.5, units="expert_neurons", calibration_path=str(text_file)
    )
    with pytest.raises(
        LoRAMError, match=r"random or magnitude or .* for expert_neurons, found taylor"
    ):
        prune(str(moe), tmp_path / "pruned", settings)
