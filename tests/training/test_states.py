"""Hidden states in the place of removed layers: the base's own loss and gradient, the command."""

import json
import math
from pathlib import Path

import pytest
import torch
from batches import BATCHES, ROWS, mean_loss, padded, with_lora
from calibrated import load
from conftest import ATTENTION_KERNELS, run_command, write_yaml
from elsewhere import same_from_elsewhere
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BitsAndBytesConfig

from axolotl_loram.architecture.plan import PruningPlan
from axolotl_loram.architecture.record import Record
from axolotl_loram.config import PruningArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.pruning.prune import prune
from axolotl_loram.recovery.recover import gather_adapter
from axolotl_loram.training.anchor import make_anchor, rows_of
from axolotl_loram.training.states import HiddenStates, StoredStates, make_states, whole_rows
from axolotl_loram.training.teacher import make_teacher


@pytest.fixture(scope="module")
def stored(make_model, tmp_path_factory):
    """Base of 4 layers, the model without 2 of them, and hidden states of ROWS."""
    folder, base = tmp_path_factory.mktemp("states"), make_model(num_hidden_layers=4)
    prune(str(base), folder / "pruned", PruningArgs(ratio=0.5, units="layers"))
    make_states(base, whole_rows(ROWS), folder / "states", 2)
    return base, folder / "pruned", folder / "states"


def filled(pruned, folder, layers=2, **settings):
    """The model with new LoRA, given the base's hidden states."""
    model = with_lora(pruned, **settings)
    HiddenStates(StoredStates(folder, layers)).attach(model)
    return model


@pytest.mark.parametrize("bits", ["16 bits", "nf4"])
@pytest.mark.parametrize("batch", BATCHES)
def test_the_loss_starts_as_the_bases(batch, bits, stored):
    """Up to the 8 bits of hidden states that are kept, and in NF4 those of the upper layers."""
    base, pruned, folder = stored
    form = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = filled(pruned, folder, **({"quantization_config": form} if bits == "nf4" else {}))
    loss = model(**BATCHES[batch]()).loss
    allowed = 2e-3 if bits == "16 bits" else 5e-2
    assert loss.item() == pytest.approx(mean_loss(base, ROWS), rel=allowed)
    loss.backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all()
        for p in model.parameters()
        if p.requires_grad
    )


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_the_gradient_is_that_of_lora_on_the_base(reentrant, stored):
    """What no pruned model's is; with any kind of gradient checkpointing."""
    base, pruned, folder = stored
    model = filled(pruned, folder)
    if reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
    whole = get_peft_model(
        load(base), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    )
    start = dict(whole.named_parameters())
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
        start[name].data.copy_(weight)
    for name, weight in whole.named_parameters():
        if name not in dict(model.named_parameters()) and "lora_B" in name:
            torch.nn.init.zeros_(weight)
    model(**padded(ROWS)).loss.backward()
    whole(**padded(ROWS)).loss.backward()
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            wanted = start[name].grad
            assert (weight.grad - wanted).norm() < 0.02 * wanted.norm(), name


def test_rows_that_are_not_known_are_refused(stored):
    model = filled(*stored[1:])
    changed = {name: list(value) for name, value in ROWS[1].items()}
    changed["input_ids"][2] += 1
    with pytest.raises(LoRAMError, match="sequences that the anchor's outputs were computed for"):
        model(**padded([changed]))


def test_an_anchor_of_another_kind_is_refused(stored, tmp_path):
    base, _, folder = stored
    with pytest.raises(LoRAMError, match=r"after 1 layers in .* found those after 2 layers"):
        StoredStates(folder, 1)
    make_teacher(base, rows_of(ROWS), tmp_path / "anchor", 8)
    with pytest.raises(LoRAMError, match="found a model's outputs"):
        StoredStates(tmp_path / "anchor", 2)


def test_an_adapter_of_removed_layers_is_no_warm_start(stored, tmp_path):
    base, pruned, _ = stored
    whole = get_peft_model(load(base), LoraConfig(target_modules=["q_proj"]))
    for name, weight in whole.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(weight)
    whole.save_pretrained(tmp_path / "adapter")
    with pytest.raises(LoRAMError, match="an adapter of the layers that pruning left"):
        gather_adapter(
            tmp_path / "adapter", PruningPlan.load(pruned), str(pruned), tmp_path / "start"
        )


def test_a_server_has_no_hidden_states(run_yaml, tmp_path):
    with pytest.raises(LoRAMError, match="servers tell no hidden states"):
        make_anchor(run_yaml(), tmp_path / "states", server="http://localhost:1/v1")


@pytest.fixture
def run_yaml(make_model, settings, tmp_path):
    """A run's YAML: changes → file."""

    def write(**changes):
        loram = {"pruning": {"units": "layers", "ratio": 0.5}, "anchor": "base"}
        loram |= {"cache_dir": str(tmp_path / "cache"), **changes.pop("loram", {})}
        base = make_model(num_hidden_layers=4)
        own = settings(base, val_set_size=0.2, eval_strategy="steps", eval_steps=4)
        return write_yaml(tmp_path / "loram.yml", {**own, "loram": loram, **changes})

    return write


def held_out_losses(file, folder):
    """The base's without and with the recovered adapter."""
    run_command("axolotl-loram", "evaluate", file, "--output", folder / "evaluation.json")
    models = json.loads((folder / "evaluation.json").read_text())["perplexity"]["validation"]
    return {name: math.log(found["perplexity"]) for name, found in models["models"].items()}


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_axolotl_trains_upper_layers(packing, run_yaml, make_model, tmp_path):
    """Its held-out loss is, to the end, that of the base with the adapter as PEFT loads it."""
    changes = {"sample_packing": packing, "eval_sample_packing": False, "eval_on_start": True}
    changes |= {"gradient_accumulation_steps": 2, "max_steps": 8, "num_epochs": 3}
    changes |= ATTENTION_KERNELS if packing else {}
    changes |= {"gradient_checkpointing": packing}
    file = run_yaml(**changes)
    said = run_command("axolotl", "train", file, "--launcher", "python")
    assert ("max_steps sees at most 64" in said.stdout + said.stderr) == (not packing)
    record = json.loads((tmp_path / "out/pruned/loram.json").read_text())["training"]
    losses = {each["step"]: each["eval_loss"] for each in record["history"] if "eval_loss" in each}
    base, recovered = held_out_losses(file, tmp_path).values()
    assert losses[0] == pytest.approx(base, rel=2e-3)
    assert losses[8] == pytest.approx(recovered, rel=2e-3) and losses[8] < losses[0]
    assert record["anchor"]["layers"] == 2
    with pytest.raises(AssertionError, match="evaluate --models base,base"):
        run_command("axolotl-loram", "evaluate", file, "--models", "base,pruned")
    adapted = PeftModel.from_pretrained(load(make_model(num_hidden_layers=4)), tmp_path / "out")
    assert {n.split(".")[4] for n, _ in adapted.named_parameters() if "lora_" in n} == {"2", "3"}


@pytest.mark.slow
def test_states_from_elsewhere_and_a_resumed_run_give_the_same_adapter(
    run_yaml, make_model, tmp_path
):
    same_from_elsewhere(run_yaml, make_model(num_hidden_layers=4), tmp_path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"loram": {"anchor": "none"}}, "original's hidden states take the removed layers' place"),
        ({"loram": {"fill": "fitted"}}, "the original's hidden states take their place"),
        ({"lora_modules_to_save": ["embed_tokens"]}, "nothing trained below the removed layers"),
        ({"lora_target_modules": ["q_proj", "embed_tokens"]}, "nothing trained below the removed"),
        ({"peft_trainable_token_indices": [3, 4]}, "nothing trained below the removed layers"),
        ({"peft_layers_to_transform": [1, 2]}, "to name layers from 2 on, found [1], which"),
        (
            {"do_causal_lm_eval": True, "eval_steps": 2},
            "expected no `do_causal_lm_eval` with a model",
        ),
    ],
)
def test_what_cannot_train_so_ends_before_it_starts(changes, sentence, run_yaml):
    with pytest.raises(AssertionError) as error:
        run_command("axolotl", "train", run_yaml(**changes), "--launcher", "python")
    assert sentence in str(error.value).replace("\\'", "'")


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["nf4", "nf4-gptq"])
def test_axolotl_trains_upper_layers_in_4_bits(quantize, run_yaml, make_model, tmp_path):
    """As the shipped examples say: the checkpoint is packed, the base's hidden states are not."""
    pruning = {"units": "layers", "ratio": 0.5, "quantize": quantize}
    changes = {"adapter": "qloram", "load_in_4bit": True, "eval_on_start": True, "max_steps": 8}
    changes |= {"bnb_config_kwargs": {"bnb_4bit_quant_storage": "uint8"}}
    file = run_yaml(loram={"pruning": pruning}, **changes)
    run_command("axolotl", "train", file, "--launcher", "python")
    record = json.loads((tmp_path / "out/pruned/loram.json").read_text())["training"]
    losses = {each["step"]: each["eval_loss"] for each in record["history"] if "eval_loss" in each}
    found = held_out_losses(file, tmp_path)
    assert losses[0] == pytest.approx(found["base"], rel=0.05)
    assert found["base+recovered"] < found["base"] and losses[8] < losses[0]
    made = Record.load(Path(record["pruned_model"]))
    assert (made.rounding is not None) == (quantize == "nf4-gptq")
    if made.rounding:
        assert made.calibration["source"] == "the run's datasets"
        assert sum(about["accepted"] for about in made.rounding.values()) >= 10  # of 14
