"""Every declared family, as a pico model of its real class, through everything that LoRAM does."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from calibrated import text_tokens
from families import pico_config
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig

import axolotl_loram.heterogeneous  # noqa: F401
from axolotl_loram.architecture.config_json import layer_count, load_config
from axolotl_loram.architecture.families import FAMILIES
from axolotl_loram.architecture.model import parameter_count, parameters, tensors
from axolotl_loram.architecture.plan import PruningPlan, gather, scatter
from axolotl_loram.architecture.spaces import EXPERTS, LINEAR
from axolotl_loram.config import PruningArgs
from axolotl_loram.files.tensors import Checkpoint
from axolotl_loram.models.stream import LayerStream
from axolotl_loram.pruning.prune import prune
from axolotl_loram.recovery.recover import gather_adapter, recover

LANGUAGE = [
    name for name, row in FAMILIES.items() if row.auto_class != "AutoModelForImageClassification"
]
WITH_EXPERTS = [n for n, row in FAMILIES.items() if any(w.role == EXPERTS for w in row.layer)]
TOKENS = torch.from_numpy(text_tokens(2, 24))
IMAGES = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)


def loaded(folder, family, **options):
    auto = getattr(transformers, FAMILIES[family].auto_class)
    return auto.from_pretrained(folder, dtype=torch.float32, **options).eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Saves each family's pico model once, with weights that tell features apart."""
    made = {}

    def make(family: str) -> Path:
        if family not in made:
            torch.manual_seed(0)
            auto = getattr(transformers, FAMILIES[family].auto_class)
            model = auto.from_config(pico_config(family))
            for name, values in model.state_dict().items():
                if values.is_floating_point():
                    center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                    values.normal_(center, 0.15)
            made[family] = tmp_path_factory.mktemp(family) / "base"
            model.save_pretrained(made[family])
        return made[family]

    return make


@pytest.fixture(scope="module")
def pruned(base, tmp_path_factory):
    """Prunes each family's model once, at random, all kinds of unit."""
    made = {}

    def make(family: str, ratio: float = 0.5) -> Path:
        if (family, ratio) not in made:
            folder = tmp_path_factory.mktemp(family) / "pruned"
            settings = PruningArgs(ratio=ratio, units=",".join(FAMILIES[family].kinds))
            prune(str(base(family)), folder, settings)
            made[family, ratio] = folder
        return made[family, ratio]

    return make


@torch.no_grad()
def outputs(model, family):
    if family in LANGUAGE:
        return model(input_ids=TOKENS).logits
    return model(pixel_values=IMAGES).logits


@torch.no_grad()
def without_removed_units(folder, plan, family):
    """The base model with everything that belongs to a removed unit set to zero.

    Routers choose among, and normalize over, the experts that are kept. A norm over all heads is
    scaled for its mean to be that of the heads which are kept.
    """
    model = loaded(folder, family)
    for tensor in parameters(plan.config):
        if not tensor.kinds:
            continue
        values = model.state_dict()[tensor.name]
        if (
            tensor.dims[0][0].units == "experts"
            and tensor.role != EXPERTS
            and ".experts" not in tensor.module
        ):
            restrict_router(model, tensor, plan)
            continue
        if plan.inside_experts(tensor):
            values_kept = np.zeros(tensor.shape, np.float32)
            for slot, expert in enumerate(plan.kept_experts(tensor.layer)):
                own = plan.features(tensor.dims[1:], tensor.layer, slot)
                values_kept[expert] = zeroed(values[expert].numpy(), own)
        else:
            features = plan.features(tensor.dims, tensor.layer)
            values_kept = zeroed(values.numpy(), features)
            if (
                tensor.module.endswith("_norm")
                and len(tensor.dims) == 1
                and features[0] is not None
            ):
                values_kept = values_kept * np.sqrt(len(features[0]) / tensor.shape[0])
        values.copy_(torch.from_numpy(values_kept))
    return model


def zeroed(values, features):
    return scatter(gather(values, features), features, values.shape)


def restrict_router(model, tensor, plan):
    module, name = model.get_submodule(tensor.module), tensor.name.rpartition(".")[2]
    kept = torch.from_numpy(plan.kept_experts(tensor.layer)).long()
    values = getattr(module, name)[kept]
    setattr(module, name, torch.nn.Parameter(values) if name in module._parameters else values)
    if not hasattr(module, "renumbered"):
        module.renumbered, module.num_experts = True, len(kept)
        module.register_forward_hook(lambda _, __, out: (*out[:2], kept[out[2]]))


@pytest.mark.parametrize("family", FAMILIES)
def test_declaration_lists_exactly_what_runs_and_what_is_stored(family, base):
    row, config = FAMILIES[family], load_config(str(base(family)))
    model = loaded(base(family), family)
    left_out = (*row.whole, *(["lm_head."] if config.get("tie_word_embeddings") else []), "\0")
    running = {
        n: tuple(v.shape)
        for n, v in model.state_dict().items()
        if not n.startswith(tuple(left_out))
    }
    assert {t.name: t.shape for t in parameters(config)} == running
    stored = Checkpoint(base(family)).tensors
    aside = tuple(row.stored_name(prefix) for prefix in row.whole) or ("\0",)
    assert {t.name: t.shape for t in tensors(config)} == {
        name: tensor.shape for name, tensor in stored.items() if not name.startswith(aside)
    }


@pytest.mark.parametrize("ratio", [0.25, 0.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_model_computes_what_the_base_does_without_the_removed_units(
    family, ratio, base, pruned
):
    plan = PruningPlan.load(pruned(family, ratio))
    model = loaded(pruned(family, ratio), family)
    expected = outputs(without_removed_units(base(family), plan, family), family)
    found = outputs(model, family)
    assert found.std() > 1e-3 and not torch.allclose(
        found, outputs(loaded(base(family), family), family)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert parameter_count(plan.pruned_config) == sum(
        values.numel()
        for name, values in model.state_dict().items()
        if not name.startswith(FAMILIES[family].whole or ("\0",))
        and not (name == "lm_head.weight" and plan.config.get("tie_word_embeddings"))
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_every_target_are_recovered_exactly(family, base, pruned, tmp_path):
    """On the base without the removed units, the recovered adapter does what it did in training."""
    plan, model = PruningPlan.load(pruned(family)), loaded(pruned(family), family)
    before = outputs(model, family)
    train_everything(model, plan).save_pretrained(tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(loaded(pruned(family), family), tmp_path / "adapter")
    recover(tmp_path / "adapter", str(pruned(family)), tmp_path / "recovered")
    masked = without_removed_units(base(family), plan, family)
    on_base = PeftModel.from_pretrained(masked, tmp_path / "recovered").eval()
    assert not torch.allclose(outputs(adapted, family), before, atol=1e-3)
    torch.testing.assert_close(
        outputs(on_base, family), outputs(adapted.eval(), family), rtol=1e-4, atol=1e-4
    )
    gather_adapter(tmp_path / "recovered", plan, str(pruned(family)), tmp_path / "again")
    first, again = (
        load_file(tmp_path / x / "adapter_model.safetensors") for x in ("adapter", "again")
    )
    assert first.keys() == again.keys() and all(torch.equal(first[k], again[k]) for k in first)


def train_everything(model, plan):
    """LoRA on all that is declared linear, and on stacked experts, with a B that is not zero."""
    names = [t for t in parameters(plan.pruned_config) if t.layer is not None and not t.bias]
    config = LoraConfig(
        r=2,
        target_modules=[t.module for t in names if t.role == LINEAR],
        target_parameters=[t.name for t in names if t.role == EXPERTS] or None,
    )
    adapted = get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, values in adapted.named_parameters():
            if "lora_B" in name:
                values.normal_(0, 0.1)
    return adapted


@pytest.mark.parametrize("family", list(LANGUAGE))
def test_generation_with_a_cache_gives_what_it_gives_without(family, pruned):
    model = loaded(pruned(family), family)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
    cached, plain = (model.generate(TOKENS, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain) and cached.shape[1] == TOKENS.shape[1] + 5


@pytest.mark.parametrize("family", LANGUAGE)
def test_qlora_on_the_pruned_model(family, pruned):
    """Linear layers go to 4 bits at their narrow widths; a step changes the loss."""
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    plan = PruningPlan.load(pruned(family))
    model = loaded(pruned(family), family, quantization_config=quantized)
    for tensor in parameters(plan.pruned_config):
        if tensor.linear:
            module = model.get_submodule(tensor.module)
            assert type(module).__name__ == "Linear4bit", tensor.name
            assert (module.out_features, module.in_features) == tensor.shape
    modules = [t.module for t in parameters(plan.pruned_config) if t.linear]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=modules)).train()
    loss = adapted(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    gradients = [p.grad for n, p in adapted.named_parameters() if "lora_B" in n]
    assert torch.isfinite(loss) and any(g is not None and g.abs().max() > 0 for g in gradients)


@pytest.mark.parametrize("family", LANGUAGE)
def test_streamed_layers_compute_what_the_whole_model_does(family, base):
    config = load_config(str(base(family)))
    stream = LayerStream(Checkpoint(base(family)), config, "cpu")
    with torch.no_grad():
        hidden = stream.embed(TOKENS)
        for index in range(layer_count(config)):
            hidden = stream.run(index, stream.layer(index), hidden)
        found = stream.loss(hidden, TOKENS).mean()
        logits = outputs(loaded(base(family), family), family)
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
