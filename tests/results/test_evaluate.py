"""Evaluation, against dense references and through the command."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from axolotl.utils.dict import DictDefault
from click.testing import CliRunner
from conftest import ATTENTION_KERNELS, write_yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_recover import train_on
from test_training import adapter_weights, train
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_loram.architecture.plan import Base
from axolotl_loram.cli import main
from axolotl_loram.config import PruningArgs
from axolotl_loram.config_evaluate import EvaluationRequest
from axolotl_loram.errors import LoRAMError
from axolotl_loram.pruning.prune import prune
from axolotl_loram.recovery.recover import recover
from axolotl_loram.results import evaluate as evaluation
from axolotl_loram.results.candidates import load_model, put_on, with_adapter
from axolotl_loram.results.evaluate import evaluate
from axolotl_loram.results.perplexity import document_losses, fitting
from axolotl_loram.results.statistics import mean_loss, paired_difference, share_of_gain
from axolotl_loram.text.heldout import IGNORED, from_rows, held_out
from axolotl_loram.training import monitor

UP = "base_model.model.model.layers.1.mlp.up_proj"
TOKENS = torch.arange(3, 60)[None]


def rows(count=7, seed=0):
    """Random rows of different lengths, a prompt of each masked."""
    drawn = np.random.default_rng(seed)
    made = []
    for length in drawn.integers(4, 40, count):
        ids = drawn.integers(3, 200, length)
        labels = np.where(np.arange(length) < length // 3, IGNORED, ids)
        made.append((ids, labels))
    return made


def dense_loss(model, ids, labels):
    """Cross entropy summed over the labelled tokens of one row by itself, and their number."""
    ids, labels = (torch.as_tensor(part)[None] for part in (ids, labels))
    with torch.no_grad():
        logits = model(ids).logits[0, :-1]
    kept = labels[0, 1:] != IGNORED
    return float(cross_entropy(logits[kept], labels[0, 1:][kept], reduction="sum")), int(kept.sum())


@pytest.fixture(scope="module")
def run(make_model, tmp_path_factory):
    """What a training run leaves: base, pruned model, adapter trained and recovered; its YAML."""
    folder = tmp_path_factory.mktemp("run")
    base, pruned, output = make_model(), folder / "pruned-model", folder / "out"
    record = prune(str(base), pruned, PruningArgs(ratio=0.5))
    torch.manual_seed(1)
    train_on(pruned, output / "pruned")
    trained = {"schema_version": 1, "kind": "trained-adapter", "plan": record["plan"]}
    trained["training"] = {"pruned_model": str(pruned)}
    (output / "pruned/loram.json").write_text(json.dumps(trained))
    recover(output / "pruned", str(pruned), output, base=Base(str(base), None), update=True)
    text = folder / "heldout.jsonl"
    source = Path(json.__file__).read_text(encoding="utf-8").split("\n\n")
    text.write_text("\n".join(json.dumps({"text": part[:90]}) for part in source[:6]))
    settings = {"base_model": str(base), "output_dir": str(output)}
    write_yaml(folder / "loram.yml", settings | {"loram": {"pruned_model_path": str(pruned)}})
    return folder


def test_losses_are_those_of_each_row_by_itself(make_model):
    model = AutoModelForCausalLM.from_pretrained(make_model()).train()
    held = from_rows(rows(), "r", "in_domain", "rows", 64, 260)
    model.eval()
    expected = np.array([dense_loss(model, *row) for row in rows()])
    model.train()
    for batch_size in (1, 3, 16):
        found = document_losses(model, held, batch_size)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert model.training
    result = mean_loss(expected)
    assert result["loss"] == pytest.approx(expected[:, 0].sum() / expected[:, 1].sum())
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))


def test_long_documents_are_cut_and_count_as_one():
    ids = np.arange(3, 28)
    held = from_rows([(ids, ids), (ids[:3], ids[:3])], "r", "in_domain", "rows", 10, 260)
    assert [len(w.ids) for w in held.windows] == [10, 10, 5, 3]
    assert [w.document for w in held.windows] == [0, 0, 0, 1] and held.documents == 2
    # what predicts nothing is left out
    one = from_rows([(ids[:1], ids[:1]), (ids[:3], ids[:3])], "r", "in_domain", "rows", 10, 260)
    assert one.documents == 1
    assert one.digest != held.digest


def test_standard_errors_are_those_of_repeated_draws():
    """Of a ratio over documents of different lengths, single and paired; simulated."""
    drawn = np.random.default_rng(0)

    def documents():
        tokens = drawn.integers(5, 60, 200)
        level = drawn.normal(3, 0.5, 200)
        base, other = ((level + drawn.normal(d, 0.2, 200)) * tokens for d in (0, -0.3))
        return np.stack([base, tokens], 1), np.stack([other, tokens], 1)

    draws = [documents() for _ in range(400)]
    for estimate, key in (
        (lambda a, b: mean_loss(a), "loss"),
        (lambda a, b: paired_difference(b, a), "difference"),
    ):
        found = [estimate(*draw) for draw in draws]
        spread = np.std([f[key] for f in found])
        assert np.mean([f["standard_error"] for f in found]) == pytest.approx(spread, rel=0.1)
    assert np.mean([paired_difference(b, a)["difference"] for a, b in draws]) < -0.28


def test_the_share_of_gain_is_a_ratio_of_log_perplexities():
    losses = {"base": 3.0, "base+recovered": 2.5}
    others = {"also:lora": 2.0, "also:worse": 3.1}
    assert share_of_gain(losses | others, list(others)) == {"also:lora": 0.5}


def test_the_batch_size_is_halved_until_it_fits():
    tried = []

    def run(size):
        tried.append(size)
        if size > 3:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return "done"

    assert fitting(16, run) == ("done", 2) and tried == [16, 8, 4, 2]
    with pytest.raises(RuntimeError, match="shape"):
        fitting(16, lambda size: (_ for _ in ()).throw(RuntimeError("wrong shape")))


def test_label_masks_of_segments_and_texts(make_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(make_model())
    file = tmp_path / "rows.jsonl"
    segments = [{"label": False, "text": "ab"}, {"label": True, "text": "cd"}]
    file.write_text(json.dumps({"segments": segments}) + "\n" + json.dumps({"text": "<bos>xyz"}))
    held = held_out(str(file), "out_of_domain", tokenizer, 260, 64)
    by_length = sorted(held.windows, key=lambda w: (w.labels == IGNORED).sum())
    assert tokenizer.decode(by_length[0].ids) == "<bos>xyz" and len(by_length[0].ids) == 4
    assert (by_length[1].labels != IGNORED).tolist() == [False, False, True, True]
    assert held_out(str(file), "in_domain", tokenizer, 260, 64, limit=1).documents == 1


def test_adapters_come_off_as_they_went_on(make_model, tmp_path):
    """Also with modules saved whole, which PEFT's own unload leaves changed."""
    model = load_model(str(make_model()))
    before = model(TOKENS).logits
    for name, saved in (("first", ["lm_head"]), ("second", None)):
        torch.manual_seed(2)
        config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved)
        config.init_lora_weights = False
        other = AutoModelForCausalLM.from_pretrained(make_model())
        adapted = get_peft_model(other, config)
        if saved:
            adapted.base_model.model.lm_head.modules_to_save.default.weight.data += 1
        adapted.eval().save_pretrained(tmp_path / name)
        with with_adapter(model, tmp_path / name) as found:
            torch.testing.assert_close(found(TOKENS).logits, adapted(TOKENS).logits)
        assert torch.equal(model(TOKENS).logits, before)


def requests(run, **changes):
    text = str(run / "heldout.jsonl")
    return EvaluationRequest(run / "loram.yml", **{"in_domain": [text], "device": "cpu", **changes})


def test_all_four_models_are_what_they_are_called(run, make_model, tmp_path):
    output = tmp_path / "evaluation.json"
    also = {"again": run / "out", "whole": make_model(seed=3)}
    found = evaluate(requests(run, also=also, output=output))
    assert json.loads(output.read_text()) == found
    held = found["perplexity"]["heldout"]
    tokenizer = AutoTokenizer.from_pretrained(make_model())
    texts = [json.loads(line)["text"] for line in (run / "heldout.jsonl").open()]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    for name, model, adapter in (
        ("base", make_model(), None),
        ("pruned", run / "pruned-model", None),
        ("pruned+adapter", run / "pruned-model", run / "out/pruned"),
        ("base+recovered", make_model(), run / "out"),
        ("also:again", make_model(), run / "out"),
        ("also:whole", make_model(seed=3), None),
    ):
        loaded = AutoModelForCausalLM.from_pretrained(model)
        loaded = PeftModel.from_pretrained(loaded, adapter) if adapter else loaded
        sums = [dense_loss(loaded.eval(), row, row) for row in ids]
        expected = sum(nats for nats, _ in sums) / sum(count for _, count in sums)
        assert held["models"][name]["loss"] == pytest.approx(expected, rel=1e-5)
    assert held["tokens"] == sum(map(len, ids)) - len(ids) and held["documents"] == len(ids)
    assert held["paired"]["base+recovered"]["against"] == "base"
    again = held["recovered_against"]["also:again"]
    assert again["difference"] == pytest.approx(0, abs=1e-9)
    assert found["plan"] == json.loads((run / "out/loram.json").read_text())["plan"]


def test_what_is_done_is_not_done_again(run, tmp_path, monkeypatch):
    """A failure in the middle leaves valid JSON; the same command does what is missing, no more."""
    output = tmp_path / "evaluation.json"
    made = []
    measure = evaluation.document_losses

    def then_fail(model, held, *rest):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(held.name)
        return measure(model, held, *rest)

    monkeypatch.setattr(evaluation, "document_losses", then_fail)
    with pytest.raises(KeyboardInterrupt):
        evaluate(requests(run, output=output))
    assert len(json.loads(output.read_text())["perplexity"]["heldout"]["models"]) == 2
    monkeypatch.setattr(evaluation, "document_losses", measure)
    loaded = []
    monkeypatch.setattr(
        evaluation, "load_model", lambda *args: loaded.append(args[0]) or load_model(*args)
    )
    found = evaluate(requests(run, output=output))
    assert len(found["perplexity"]["heldout"]["models"]) == 4
    loaded.clear()
    assert evaluate(requests(run, output=output)) == found and loaded == []
    assert len(evaluate(requests(run, output=output, models=["base"]))["models"]) == 1
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": "other text"}))
    evaluate(requests(run, output=output, models=["base"], out_of_domain=[str(other)]))
    assert len(loaded) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_domain": ["nowhere.jsonl"]}, "no such file"),
        ({"in_domain": []}, "expected an Axolotl YAML with `datasets:`"),
        ({"tasks": ["no_such_task.yaml"]}, "found no_such_task.yaml unreadable"),
        ({"backend": "vllm"}, "found it not installed"),
        ({"suite": "paper"}, "--allow-code-execution for humaneval"),
        ({"also": {"lora": Path("/nowhere")}}, "expected an adapter or a model in /nowhere"),
    ],
)
def test_bad_requests_are_refused_before_any_model_is_loaded(run, changes, message, monkeypatch):
    monkeypatch.setattr(evaluation, "load_model", None)
    with pytest.raises(LoRAMError, match=message):
        evaluate(requests(run, **changes))


def test_what_does_not_belong_together_is_refused(run, make_model, tmp_path):
    train_on(make_model(intermediate_size=64), tmp_path / "wider")
    with pytest.raises(LoRAMError, match=r"expected an adapter for .*, found .*wider"):
        put_on(load_model(str(make_model())), tmp_path / "wider")
    train_on(make_model(), tmp_path / "half")
    weights = load_file(tmp_path / "half/adapter_model.safetensors")
    weights.pop(f"{UP}.lora_B.weight")
    save_file(weights, tmp_path / "half/adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoRAMError, match=rf"it has no {UP}.lora_B.weight"):
        put_on(load_model(str(make_model())), tmp_path / "half")
    with pytest.raises(LoRAMError, match="axolotl-loram recover"):
        evaluate(requests(run, also={"narrow": run / "out/pruned"}))
    (tmp_path / "empty.jsonl").write_text(json.dumps({"text": ""}))
    with pytest.raises(LoRAMError, match="with tokens to predict, found none"):
        evaluate(requests(run, in_domain=[str(tmp_path / "empty.jsonl")]))
    settings = {"base_model": str(make_model(seed=1)), "output_dir": str(run / "out")}
    section = {"loram": {"pruned_model_path": str(run / "pruned-model")}}
    file = write_yaml(tmp_path / "other.yml", settings | section)
    with pytest.raises(LoRAMError, match="fine-tuned"):
        evaluate(EvaluationRequest(file))
    settings["output_dir"] = str(tmp_path / "untrained")
    file = write_yaml(tmp_path / "other.yml", settings | section)
    with pytest.raises(LoRAMError, match="run `axolotl train` first"):
        evaluate(EvaluationRequest(file))


def test_the_command_prints_a_table_or_json(run):
    text = str(run / "heldout.jsonl")
    command = ["evaluate", str(run / "loram.yml"), "--in-domain", text, "--models", "base,pruned"]
    shown = CliRunner().invoke(main, command, catch_exceptions=False)
    assert shown.exit_code == 0 and "heldout" in shown.stdout and " ±" in shown.stdout
    shown = CliRunner().invoke(main, [*command, "--json"], catch_exceptions=False)
    assert set(json.loads(shown.stdout)["perplexity"]["heldout"]["models"]) == {"base", "pruned"}
    wrong = CliRunner().invoke(main, [*command, "--models", "bass"])
    assert wrong.exit_code == 2 and "base+recovered', found 'bass'" in wrong.output
    wrong = CliRunner().invoke(main, [*command, "--batch-size", "0"])
    assert wrong.exit_code == 2 and "batch_size" in wrong.output
    only = ["evaluate", str(run / "loram.yml"), "--in-domain", text, "--json"]
    only += ["--models", "", "--also", f"mine={run / 'out'}", "--output", str(run / "only.json")]
    shown = CliRunner().invoke(main, only, catch_exceptions=False)
    assert list(json.loads(shown.stdout)["models"]) == ["also:mine"]


@pytest.mark.slow
def test_training_evaluates_the_recovered_adapter_and_is_not_disturbed(
    make_model, settings, tmp_path
):
    """The same bits with and without; what is logged last is what `evaluate` finds afterwards."""
    base = make_model()
    prune(str(base), tmp_path / "pruned-model", PruningArgs(ratio=0.5))
    torch.manual_seed(0)
    train_on(base, tmp_path / "start")  # Axolotl does not seed LoRA's own start
    weights, logged = [], []
    for name, options in (("without", {}), ("with", {"evaluate_recovered_every": 3})):
        section = {"pruned_model_path": str(tmp_path / "pruned-model"), **options}
        changes = {"lora_model_dir": str(tmp_path / "start"), "lora_dropout": 0.2}
        changes |= {"output_dir": str(tmp_path / name), "loram": section, "logging_steps": 1}
        changes |= ATTENTION_KERNELS
        file = write_yaml(tmp_path / f"{name}.yml", settings(base, **changes))
        said = train(file)
        lines = (said.stdout + said.stderr).splitlines()
        logged.append([line for line in lines if "'loss'" in line or "eval_loram" in line])
        weights.append(adapter_weights(tmp_path / name))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    found = [line for line in logged[1] if "eval_loram_recovered_loss" in line]
    assert len(found) == 3  # before the first step, after the third, after the last
    assert len(logged[1]) - len(found) == len(logged[0]) > 0
    last = float(found[-1].split("eval_loram_recovered_loss")[1].split(",")[0].strip("': "))
    result = evaluate(EvaluationRequest(file, models=["base+recovered"], device="cpu"))
    assert result["perplexity"]["validation"]["models"]["base+recovered"]["loss"] == pytest.approx(
        last, rel=1e-4
    )


def test_a_base_beside_patched_attention_computes_as_before(make_model, monkeypatch):
    """`lora_qkv_kernel` patches the class: the base, which is not trained, must still run."""
    from axolotl.monkeypatch import lora_kernels
    from transformers.models.llama.modeling_llama import LlamaAttention

    from axolotl_loram.models.patches import plain_projections

    model = load_model(str(make_model()))
    expected = model(TOKENS).logits
    monkeypatch.setattr(LlamaAttention, "forward", LlamaAttention.forward)  # put back afterwards
    lora_kernels.patch_self_attn_lora(DictDefault({"base_model": str(make_model())}))
    try:
        with pytest.raises(AttributeError, match="apply_qkv"):
            model(TOKENS)
        plain_projections(model, lora_kernels)
        assert torch.equal(model(TOKENS).logits, expected)
    finally:
        del LlamaAttention._original_forward


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fsdp_config": {"fsdp_version": 2}}, "found FSDP or ZeRO-3"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "found FSDP or ZeRO-3"),
        ({"liger_rms_norm": True}, "no `liger_rms_norm` with the base on a CPU"),
        ({"val_set_size": 0}, "expected held-out text"),
        ({"base_model": "some-org/not-here"}, "expected the weights of some-org/not-here"),
        ({}, "expected room for the base's .* found 0.00 GiB free"),
    ],
)
def test_evaluation_in_training_is_refused_before_it_begins(
    changes, message, make_model, monkeypatch
):
    class Full:
        available = 1000

    monkeypatch.setattr(monitor.psutil, "virtual_memory", Full)
    section = {"evaluate_recovered_every": 10}
    common = {"base_model": str(make_model()), "val_set_size": 0.1, "loram": section}
    with pytest.raises(LoRAMError, match=message):
        monitor.check_can_evaluate(DictDefault({**common, **changes}))
    zero2 = {"deepspeed": {"zero_optimization": {"stage": 2}}}
    monkeypatch.setattr(Full, "available", 10**9)
    monitor.check_can_evaluate(DictDefault({**common, **zero2}))


def test_random_numbers_go_on_as_if_nothing_had_been_drawn():
    def draw():
        return random.random(), np.random.random(), torch.rand(1).item()

    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = draw()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    with monitor.random_state_kept():
        draw()
    assert draw() == expected
