"""Whole layers removed: every family's model without them is the base's upper part."""

import pytest
import torch
import transformers
from calibrated import text_tokens
from families import pico_config
from peft import LoraConfig, get_peft_model

import axolotl_loram.heterogeneous  # noqa: F401
from axolotl_loram.architecture.config_json import is_removed, layer_count, load_config
from axolotl_loram.architecture.counts import summary
from axolotl_loram.architecture.families import FAMILIES
from axolotl_loram.architecture.plan import PruningPlan
from axolotl_loram.architecture.spaces import EXPERTS, LINEAR
from axolotl_loram.config import PruningArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.tensors import Checkpoint
from axolotl_loram.models.load import load_pruned
from axolotl_loram.models.removed import removed_layers
from axolotl_loram.pruning.prune import prune
from axolotl_loram.results.export_pruned import export_pruned
from axolotl_loram.training.align import load_plan
from axolotl_loram.training.states import HiddenStates, StoredStates, make_states, whole_rows

LANGUAGE = [
    name for name, row in FAMILIES.items() if row.auto_class != "AutoModelForImageClassification"
]
SHARING = {
    name
    for name, row in FAMILIES.items()
    if any(w.role in (LINEAR, EXPERTS) and not w.kinds & set(row.kinds) for w in row.layer)
}
"""Families that keep weights which no unit owns."""
TOKENS = torch.from_numpy(text_tokens(2, 24))


@pytest.fixture
def base(tmp_path):
    def make(family):
        torch.manual_seed(0)
        auto = getattr(transformers, FAMILIES[family].auto_class)
        auto.from_config(pico_config(family)).save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return make


def without_layers(base, folder, ratio=0.5, **settings):
    return prune(str(base), folder, PruningArgs(ratio=ratio, units="layers", **settings))


@pytest.mark.parametrize("family", LANGUAGE)
@torch.no_grad()
def test_with_the_bases_hidden_states_it_is_the_base(family, base, tmp_path):
    folder = base(family)
    if family in SHARING:
        with pytest.raises(LoRAMError, match="layers whose weights are all units'"):
            without_layers(folder, tmp_path / "pruned")
        return
    record = without_layers(folder, tmp_path / "pruned")
    plan = PruningPlan.load(tmp_path / "pruned")
    count = layer_count(plan.config) // 2
    assert plan.removed == list(range(count))
    assert record["parameters"] == summary(plan.config, plan.counts)
    stored = Checkpoint(tmp_path / "pruned")
    assert record["weight_bytes"] == stored.nbytes < Checkpoint(folder).nbytes
    auto = getattr(transformers, FAMILIES[family].auto_class)
    whole, upper = (
        auto.from_pretrained(path, dtype=torch.float32).eval()
        for path in (folder, tmp_path / "pruned")
    )
    last, seen = removed_layers(upper)[-1], []
    layers = whole.get_submodule(FAMILIES[family].layers)
    hook = layers[count - 1].register_forward_hook(lambda *given: seen.append(given[-1]))
    wanted = whole(input_ids=TOKENS).logits
    hook.remove()
    assert not torch.allclose(upper(input_ids=TOKENS).logits, wanted, atol=1e-3)
    last.given = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    torch.testing.assert_close(upper(input_ids=TOKENS).logits, wanted)
    last.given = last.given[:1]
    with pytest.raises(LoRAMError, match="another batch's"):
        upper(input_ids=TOKENS)
    make_states(folder, whole_rows({"input_ids": row} for row in TOKENS), tmp_path / "s", count)
    adapted = get_peft_model(upper, LoraConfig(target_modules=r".*_proj|.*dense|.*query_key_value"))
    HiddenStates(StoredStates(tmp_path / "s", count)).attach(adapted)
    found = adapted(input_ids=TOKENS).logits
    assert (found - wanted).norm() < 0.02 * wanted.norm()  # they are kept in 8 bits of mantissa


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"units": "layers,neurons"}, "layers alone as the unit to remove"),
        ({"ratio": {"layers": 0.5, "neurons": 0.5}}, "layers alone as the unit to remove"),
        ({"method": "activation"}, "neither method, refit nor calibration text"),
        ({"refit": True}, "neither method, refit nor calibration text"),
        ({"ratio": 0.1}, "a ratio that removes one of the"),
    ],
)
def test_what_does_not_go_with_it_is_said(changes, sentence, base, tmp_path):
    given = {"units": None if isinstance(changes.get("ratio"), dict) else "layers", "ratio": 0.5}
    with pytest.raises((LoRAMError, ValueError), match=sentence):
        prune(str(base("llama")), tmp_path / "pruned", PruningArgs(**{**given, **changes}))


def test_a_ratio_may_name_the_layers(base, tmp_path):
    folder = base("llama")
    one = without_layers(folder, tmp_path / "one")
    settings = PruningArgs(ratio="layers=0.5")
    assert prune(str(folder), tmp_path / "other", settings)["plan"] == one["plan"]


def test_a_plan_without_layers_amid_others_is_damaged(base, tmp_path):
    """The hidden states that are kept are those after the first so many."""
    without_layers(base("llama"), tmp_path / "pruned")
    plan = PruningPlan.load(tmp_path / "pruned")
    first = {name: kept for name, kept in plan.kept.items() if ".layers.0." in name}
    last, every = layer_count(plan.config) - 1, range(layer_count(plan.config))
    for layers in ([last], every):
        names = [(name, name.replace(".0.", f".{layer}.")) for name in first for layer in layers]
        kept = {other: first[name] for name, other in names}
        with pytest.raises(LoRAMError, match="from the first on, and not all"):
            PruningPlan(plan.config, kept)


@pytest.mark.parametrize("own", [{"intermediate_size": 0}, {"sliding_window": 0}, {}])
def test_a_layer_with_another_field_of_0_is_none_removed(own, base):
    config = load_config(str(base("llama")))
    assert not is_removed({**config, "per_layer_config": {"0": own}}, 0)


def test_it_is_used_for_nothing_that_needs_a_whole_model(base, tmp_path):
    folder, pruned = base("llama"), tmp_path / "pruned"
    without_layers(folder, pruned)
    for use in (
        lambda: load_pruned(str(pruned)),
        lambda: export_pruned(pruned, tmp_path / "gguf", llama_cpp=None),
        lambda: load_plan(str(pruned), None),
    ):
        with pytest.raises(LoRAMError, match=r"that runs by itself, found .* layers are removed"):
            use()
