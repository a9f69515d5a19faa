"""Anchored training: the loss against a dense reference, batches against the base, the command."""

import json
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from axolotl.utils.dict import DictDefault
from batches import BATCHES, ROWS, mean_loss, packed, padded, trainer_of, with_lora
from calibrated import load
from conftest import ATTENTION_KERNELS, run_command, write_yaml
from elsewhere import same_from_elsewhere
from torch.nn.functional import cross_entropy
from transformers import BitsAndBytesConfig

from axolotl_loram.config import PruningArgs
from axolotl_loram.config_loram import LoRAMConfig
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.tensors import ADAPTER_FILE, Checkpoint
from axolotl_loram.pruning.prune import prune
from axolotl_loram.training.anchor import Anchor, check_anchor, prepare_anchor, rows_of, segments
from axolotl_loram.training.anchored import anchored_loss, offsets
from axolotl_loram.training.distil import IGNORED, Targets
from axolotl_loram.training.labels import check_learnt
from axolotl_loram.training.support import check_supported
from axolotl_loram.training.teacher import Teacher, make_teacher, most_likely

VOCABULARY, PLACES = 50, 9


def of_three(top_k, seed=0):
    """Logits of the base, the pruned model and the trained one, labels, and the offsets."""
    torch.manual_seed(seed)
    base, pruned, trained = (2 * torch.randn(PLACES, VOCABULARY) for _ in range(3))
    labels = torch.randint(VOCABULARY, (PLACES,))
    ids, logprobs, rest = most_likely(base, top_k, labels)
    return base, pruned, trained, labels, offsets(Targets(ids.long(), logprobs, rest), pruned)


def dense(base, pruned, trained, labels):
    """The loss as it is written, in float64."""
    base, pruned, trained = (logits.double() for logits in (base, pruned, trained))
    moved = trained + base.log_softmax(-1) - pruned.log_softmax(-1)
    return cross_entropy(moved, labels, reduction="sum")


@pytest.mark.parametrize("chunk", [1024, 4])
def test_with_every_token_named_it_is_the_dense_loss(chunk, monkeypatch):
    for module in ("anchored", "distil"):
        monkeypatch.setattr(f"axolotl_loram.training.{module}.TOKENS_PER_CHUNK", chunk)
    base, pruned, trained, labels, anchor = of_three(VOCABULARY)
    trained.requires_grad_()
    found, wanted = anchored_loss(trained, anchor), dense(base, pruned, trained, labels)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    slope, expected = (torch.autograd.grad(3 * loss, trained)[0] for loss in (found, wanted))
    torch.testing.assert_close(slope, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("top_k", [1, 8])
def test_what_is_not_named_is_one_event(top_k):
    """The base's probability of the rest, dealt out as the trained model deals it."""
    base, pruned, trained, labels, anchor = of_three(top_k)
    named = torch.zeros(PLACES, VOCABULARY).bool().scatter(-1, anchor.ids, True)
    p, q = base.double().softmax(-1), pruned.double().softmax(-1)
    rest = ((p * ~named).sum(-1) / (q * ~named).sum(-1)).log()[:, None]
    moved = trained.double() + torch.where(named, p.log() - q.log(), rest)
    wanted = cross_entropy(moved, labels, reduction="sum").item()
    assert anchored_loss(trained, anchor).item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("top_k", [1, 8, VOCABULARY])
def test_before_the_first_step_it_is_the_bases_loss(top_k):
    base, pruned, _, labels, anchor = of_three(top_k)
    wanted = cross_entropy(base, labels, reduction="sum").item()
    assert anchored_loss(pruned, anchor).item() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("top_k", [3, VOCABULARY])
def test_its_derivative_is_that_of_finite_differences(top_k):
    _, _, trained, _, anchor = of_three(top_k)
    trained.requires_grad_()
    (slope,) = torch.autograd.grad(anchored_loss(trained, anchor), trained)
    step = torch.zeros_like(trained)
    for place, token in [(0, 0), (3, int(anchor.ids[3, 0])), (8, 49)]:
        step.zero_()[place, token] = 0.01
        ends = (anchored_loss(trained.detach() + side * step, anchor).item() for side in (1, -1))
        assert (next(ends) - next(ends)) / 0.02 == pytest.approx(
            slope[place, token].item(), abs=2e-3
        )


def test_in_16_bits_its_derivative_has_16_bits():
    _, _, trained, _, anchor = of_three(8)
    half = trained.bfloat16().requires_grad_()
    loss = anchored_loss(half, anchor)
    assert [held.dtype for held in loss.grad_fn.saved_tensors] == [torch.bfloat16]
    assert loss.dtype == torch.float32


@pytest.fixture(scope="module")
def anchored(make_model, tmp_path_factory):
    """Base, pruned folder and what the base says of ROWS."""
    folder = tmp_path_factory.mktemp("anchored")
    base = make_model()
    prune(str(base), folder / "pruned", PruningArgs(ratio=0.5))
    make_teacher(base, rows_of(ROWS), folder / "anchor", 8)
    return base, folder / "pruned", folder / "anchor"


@pytest.mark.parametrize("bits", ["16 bits", "nf4"])
@pytest.mark.parametrize("batch", BATCHES)
def test_a_new_adapter_starts_at_the_bases_loss(batch, bits, anchored):
    base, pruned, folder = anchored
    form = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = with_lora(pruned, **({"quantization_config": form} if bits == "nf4" else {}))
    trainer = trainer_of(model)
    Anchor(trainer, Teacher(folder)).attach()
    loss = trainer.compute_loss(model, BATCHES[batch]())
    assert loss.item() == pytest.approx(mean_loss(base, ROWS), rel=2e-5)
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("batch", BATCHES)
def test_a_trained_adapter_is_held_against_the_pruned_model_without_it(batch, anchored, tmp_path):
    """The loss as it is written, of each row alone, with three whole models."""
    base, pruned, _ = anchored
    make_teacher(base, rows_of(ROWS), tmp_path / "all", 264)
    model = with_lora(pruned)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    trainer = trainer_of(model)
    Anchor(trainer, Teacher(tmp_path / "all")).attach()
    found = trainer.compute_loss(model, BATCHES[batch]()).item()
    total, tokens = 0.0, 0
    for row in ROWS:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
        counts = labels != IGNORED
        with torch.no_grad():
            logits = [
                one(input_ids=ids).logits[0, :-1][counts]
                for one in (load(base), load(pruned), model)
            ]
        total += dense(*logits, labels[counts]).item()
        tokens += int(counts.sum())
    assert found == pytest.approx(total / tokens, rel=1e-5)


def test_rows_are_found_in_a_packed_batch():
    found = list(segments(packed(ROWS)))
    assert [each.row.tokens.tolist() for each in found] == [row["input_ids"] for row in ROWS]
    assert [each.number for each in found] == [0, 0, 1, 1]
    apart = padded(ROWS)
    apart["labels"][2] = IGNORED
    assert len(list(segments(apart))) == 3  # one that trains nothing costs nothing


@pytest.mark.parametrize("change", ["a token", "what is trained", "cut"])
def test_a_row_that_the_base_never_saw_is_refused(change, anchored):
    _, pruned, folder = anchored
    row = {name: list(value) for name, value in ROWS[1].items()}
    if change == "a token":
        row["input_ids"][2] += 1
    elif change == "what is trained":
        row["labels"][-1] = IGNORED
    else:
        row = {name: value[:-1] for name, value in row.items()}
    model = with_lora(pruned)
    trainer = trainer_of(model)
    Anchor(trainer, Teacher(folder)).attach()
    with pytest.raises(LoRAMError, match="sequences that the anchor's outputs were computed for"):
        trainer.compute_loss(model, padded([row]))


def test_labels_that_are_other_tokens_are_refused():
    row = {"input_ids": [3, 4, 5], "labels": [IGNORED, 4, 6]}
    with pytest.raises(LoRAMError, match="labels that are the tokens themselves"):
        list(rows_of([row]))
    with pytest.raises(LoRAMError, match="token ids and labels to anchor, found chosen, rejected"):
        list(rows_of([{"chosen": "a", "rejected": "b"}]))


def test_an_anchor_of_another_model_is_refused(anchored, make_model, tmp_path):
    base, _, folder = anchored
    name = str(base)
    other = SimpleNamespace(id=name, fingerprint="other")
    run = SimpleNamespace(plan=SimpleNamespace(base=other, removed=[]))
    with pytest.raises(LoRAMError, match="made of another model"):
        check_anchor(Teacher(folder), folder, run)
    make_teacher(base, [[3, 4, 5]], tmp_path / "teacher", 4)
    with pytest.raises(LoRAMError, match="found the outputs of a teacher"):
        check_anchor(Teacher(tmp_path / "teacher"), tmp_path / "teacher", run)


def test_a_loss_with_a_term_more_is_refused():
    """It would be left out without a word."""
    model = SimpleNamespace(config=SimpleNamespace(output_router_logits=True))
    with pytest.raises(LoRAMError, match="output_router_logits false with `anchor`"):
        prepare_anchor(None, None, None, SimpleNamespace(model=model))


@pytest.mark.parametrize("trained", [False, True])
def test_losses_of_0_are_refused_only_where_nothing_was_learnt(trained, anchored, tmp_path):
    """GRPO logs 0 where it learns."""
    model = with_lora(anchored[1])
    for name, weight in model.named_parameters():
        if trained and "lora_B" in name:
            torch.nn.init.ones_(weight)
    model.save_pretrained(tmp_path)
    tensors = Checkpoint(tmp_path, ADAPTER_FILE).tensors
    with nullcontext() if trained else pytest.raises(LoRAMError, match="found 0 at all 2 logged"):
        check_learnt([{"loss": 0.0}, {"eval_loss": 1.0}, {"loss": 0.0}], tensors)


@pytest.mark.parametrize("key", ["streaming", "neftune_noise_alpha", "reward_model"])
def test_what_does_not_go_with_it_is_said(key):
    section = {"pruned_model_path": "pruned", "anchor": "base"}
    cfg = DictDefault({"adapter": "lora", "loram": section, key: 5})
    with pytest.raises(LoRAMError, match=f"expected no `{key}` with `anchor` in loram:"):
        check_supported(cfg)
    with pytest.raises(ValueError, match="no anchor with `stage: align`"):
        LoRAMConfig(stage="align", anchor="base")
    with pytest.raises(ValueError, match="no anchor_path with `anchor: none`"):
        LoRAMConfig(pruned_model_path="pruned", anchor_path="anchor")


@pytest.fixture
def run_yaml(make_model, settings, tmp_path):
    """An anchored run's YAML: changes → file."""

    def write(**changes):
        loram = {"pruning": {"ratio": 0.5, "method": "random"}, "anchor": "base"}
        loram |= {"cache_dir": str(tmp_path / "cache"), **changes.pop("loram", {})}
        own = settings(make_model(), val_set_size=0.2, eval_strategy="steps", eval_steps=4)
        return write_yaml(tmp_path / "loram.yml", {**own, "loram": loram, **changes})

    return write


def evaluations(output):
    """Held-out losses by step."""
    history = json.loads((output / "pruned/loram.json").read_text())["training"]["history"]
    return {each["step"]: each["eval_loss"] for each in history if "eval_loss" in each}


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_axolotl_trains_anchored(packing, run_yaml, make_model, tmp_path):
    """Its held-out loss starts as the base's, falls, and is that of the base once recovered."""
    changes = {"sample_packing": packing, "eval_sample_packing": False, "eval_on_start": True}
    changes |= {"gradient_accumulation_steps": 2, "max_steps": 8, "num_epochs": 3}
    changes |= ATTENTION_KERNELS if packing else {}
    file = run_yaml(**changes)
    run_command("axolotl", "train", file, "--launcher", "python")
    losses = evaluations(tmp_path / "out")
    run_command(
        *("axolotl-loram", "evaluate", file, "--models", "base,base+recovered"),
        *("--output", tmp_path / "evaluation.json"),
    )
    measured = json.loads((tmp_path / "evaluation.json").read_text())
    models = measured["perplexity"]["validation"]["models"]
    base, recovered = (math.log(models[name]["perplexity"]) for name in ("base", "base+recovered"))
    assert losses[0] == pytest.approx(base, rel=0.02)
    assert recovered < base and losses[8] < losses[0]
    record = json.loads((tmp_path / "out/loram.json").read_text())
    assert record["trained"]["anchor"]["top_k"] == 32


@pytest.mark.slow
def test_an_anchor_from_elsewhere_and_a_resumed_run_give_the_same_adapter(
    run_yaml, make_model, tmp_path
):
    same_from_elsewhere(run_yaml, make_model(), tmp_path)
