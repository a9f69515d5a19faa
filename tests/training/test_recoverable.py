"""What the end of a run refuses, its start refuses; what it takes, the start takes."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import axolotl_loram.heterogeneous  # noqa: F401
from axolotl_loram.architecture.plan import Base, PruningPlan
from axolotl_loram.architecture.record import Kind, Record
from axolotl_loram.config import PruningArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.pruning.prune import prune
from axolotl_loram.recovery.fitted import check_free_rows
from axolotl_loram.recovery.merge import merge_masked
from axolotl_loram.recovery.recover import recover
from axolotl_loram.recovery.whole import check_complete, trained_shapes
from axolotl_loram.training.recoverable import check_recoverable

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES = [
    {},
    {"target_modules": r".*\.layers\.[12]\..*(up|down)_proj"},
    {"layers_to_transform": [1]},
    {"exclude_modules": ["up_proj"]},
    {"rank_pattern": {"up_proj": 2}, "use_rslora": True},
    {"modules_to_save": ["embed_tokens", "lm_head"]},
    {"modules_to_save": ["model.norm"]},
    {"modules_to_save": ["layers.1.mlp"]},
    {"modules_to_save": ["down_proj"], "target_modules": ["q_proj"]},
    {"target_modules": [*LINEAR, "embed_tokens", "lm_head"]},
    {"target_modules": ["o_proj", "down_proj"]},
    {"trainable_token_indices": [5, 6]},
    {"lora_bias": True},
    {"bias": "all"},
    {"use_dora": True},
    {"init_lora_weights": "pissa"},
]


@pytest.fixture(scope="module", params=[{"ratio": 0.5}, {"sparsity": 0.5}], ids=["ratio", "masks"])
def pruned(request, make_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned") / "model"
    prune(str(make_model()), folder, PruningArgs(**request.param, method=None))
    return folder


def refusal(check):
    try:
        check()
    except LoRAMError as error:
        return str(error)
    return None


def at_the_end(run, model):
    """What follows training: the adapter is saved, held against what was trained, and used."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.normal_()
    model.save_pretrained(run.trained)
    Record(Kind.TRAINED_ADAPTER, run.base, run.plan.digest, masked=True).save(run.trained)
    check_complete(run.trained, trained_shapes(model))
    output = run.trained.parent / "end"

    def fill(moved, config):
        check_free_rows(moved)
        return {}, {}

    common = {"base": run.base, "of_run": True}
    recover(run.trained, str(run.pruned), output, fill=fill if run.fill else None, **common)
    if run.merges:
        merge_masked(run.trained, str(run.pruned), output / "merged", **common)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("fills", [False, True])
def test_start_and_end_refuse_alike(case, fills, pruned, make_model, tmp_path):
    assert_alike(case, fills, make_model(), pruned, tmp_path)


@pytest.mark.parametrize("tying", [False, True])
@pytest.mark.parametrize("whole", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_of_tied_embeddings_too(whole, tying, make_model, tmp_path):
    """By shapes alone, the two look like one."""
    base = make_model(tie_word_embeddings=True)
    prune(str(base), tmp_path / "sparse", PruningArgs(sparsity=0.5))
    case = {"modules_to_save": whole, "ensure_weight_tying": tying}
    assert_alike(case, False, base, tmp_path / "sparse", tmp_path)


def assert_alike(case, fills, base, pruned, tmp_path):
    plan = PruningPlan.load(pruned)
    run = SimpleNamespace(
        base=Base(str(base)),
        pruned=pruned,
        plan=plan,
        trained=tmp_path / "trained",
        fill=object() if fills and not plan.masks else None,
        merges=bool(plan.masks),
        masked=bool(plan.masks),
    )
    model = AutoModelForCausalLM.from_pretrained(pruned)
    config = {"r": 4, "task_type": "CAUSAL_LM", "target_modules": LINEAR, **case}
    model = get_peft_model(model, LoraConfig(**config))
    begun = refusal(lambda: check_recoverable(run, model))
    ended = refusal(lambda: at_the_end(run, model))
    assert (begun is None) == (ended is None), (begun, ended)


def test_what_is_trained_beside_the_adapter_is_refused(make_model, tmp_path):
    prune(str(make_model()), tmp_path / "model", PruningArgs(ratio=0.5))
    plan = PruningPlan.load(tmp_path / "model")
    run = SimpleNamespace(base=Base("x"), pruned=tmp_path / "model", plan=plan, trained=tmp_path)
    run.masked = run.merges = run.fill = None
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model = get_peft_model(model, LoraConfig(target_modules=LINEAR))
    check_recoverable(run, model)
    model.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(LoRAMError, match=r"found base_model.model.model.norm.weight, which PEFT"):
        check_recoverable(run, model)
