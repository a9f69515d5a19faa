"""The Python API: what the command line says and does, and models for PEFT and TRL."""

import json
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import run_command, write_yaml
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from test_recover import TOKENS, train_on
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import axolotl_loram as al
from axolotl_loram.architecture.model import tensors
from axolotl_loram.cli import main

ROOT = Path(__file__).resolve().parent.parent
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def command(*arguments) -> dict:
    """What a command prints with --json."""
    result = CliRunner().invoke(main, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def pruned(make_model, text_file, tmp_path):
    settings = {"ratio": 0.5, "calibration": str(text_file), "calibration_samples": 4}
    return al.prune(make_model(), tmp_path / "pruned", calibration_length=16, **settings)


def test_importing_is_fast_and_imports_nothing_heavy():
    script = (
        "import sys, time; before = set(sys.modules); started = time.process_time()\n"
        "import axolotl_loram as al; took = time.process_time() - started; dir(al)\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "al.LoRAMError\n"
        "assert al.prune.__module__ == 'axolotl_loram.api'\n"
        "print(took, *sorted(new)); print(*{n.partition('.')[0] for n in sys.modules})"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    imported, with_functions = (line.split() for line in shown.stdout.splitlines())
    heavy = {"torch", "numpy", "transformers", "axolotl", "click", "pydantic"}
    assert float(imported[0]) < 0.2 and not heavy & set(imported)
    assert not heavy - {"pydantic"} & set(with_functions)


def test_all_public_names_are_there_and_no_module_shadows_one():
    import axolotl_loram.plugin

    modules = {module.name for module in pkgutil.iter_modules(al.__path__)}
    assert not modules & set(al.__all__) and set(al.__all__) <= set(dir(al))
    for name in set(al.__all__) - {"__version__"}:
        assert callable(getattr(al, name)) and name not in vars(al)
    assert al.LoRAMPlugin is axolotl_loram.plugin.LoRAMPlugin
    with pytest.raises(AttributeError, match="LoRAMArgs"):
        al.LoRAMArgs  # noqa: B018


def test_plan_memory_is_the_commands(make_model):
    base = make_model()
    found = al.plan_memory(base, ratio=0.5, lora_r=4, sequence_len=128)
    options = ("--pruning-ratio", 0.5, "--lora-r", 4, "--sequence-len", 128)
    assert found.as_dict() == command("plan", base, *options)
    assert list(found.methods) == ["lora", "qlora", "loram", "qloram"] == list(found.gpus)
    human = CliRunner().invoke(main, ["plan", str(base), *map(str, options)]).stdout
    assert human == f"{found}\n" and "qloram" in found._repr_html_()
    found.as_dict()["methods"].clear()
    assert found.methods  # what is given out are copies
    fitted = al.plan_memory(base, fit="1.2GiB", adapter="loram")
    assert fitted.as_dict() == command("plan", base, "--fit", "1.2GiB", "--adapter", "loram")


def test_plan_memory_of_an_alignment_is_the_commands(make_model):
    zero = ROOT / "deepspeed_configs/zero3.json"
    found = al.plan_memory(make_model(), ratio=0.5, stage="align", deepspeed=zero, nodes=2)
    options = ("--pruning-ratio", 0.5, "--stage", "align", "--deepspeed", zero, "--nodes", 2)
    assert found.as_dict() == command("plan", make_model(), *options)
    assert not found.methods and "host memory of each node" in str(found)


def test_prune_and_inspect_are_the_commands(pruned, make_model, text_file, tmp_path):
    options = ("--pruning-ratio", 0.5, "--calibration", text_file, "--calibration-samples", 4)
    options += ("--calibration-length", 16)
    theirs = command("prune", make_model(), tmp_path / "other", *options)
    assert theirs == {**pruned.as_dict(), "output": str(tmp_path / "other")}
    assert pruned.record == json.loads((pruned.path / "loram.json").read_text())
    assert pruned.parameters["pruned_layers"] == 2 and pruned.plan.digest == theirs["plan"]
    for verify in (False, True):
        found = al.inspect(pruned.path, verify=verify)
        assert found.as_dict() == command("inspect", pruned.path, *["--verify"] * verify)
        assert found.kind == "pruned-model" and bool(found.checks) == verify and not found.failed
    found.require_whole()
    (pruned.path / "generation_config.json").write_text("{}")
    found = al.inspect(pruned.path, verify=True)
    assert [check.name for check in found.failed] == ["files"]
    with pytest.raises(al.LoRAMError, match=r"generation_config.json"):
        found.require_whole()


def test_recover_is_the_commands(pruned, make_model, tmp_path):
    train_on(pruned.path, tmp_path / "adapter")
    adapter = al.recover(tmp_path / "adapter", pruned_model=pruned.path)
    assert (adapter.path, adapter.base) == (tmp_path / "recovered-adapter", str(make_model()))
    assert adapter.record == json.loads((adapter.path / "loram.json").read_text())
    before = (adapter.path / "adapter_model.safetensors").read_bytes()
    assert adapter.as_dict() == command("recover", tmp_path / "adapter", "--overwrite")
    assert (adapter.path / "adapter_model.safetensors").read_bytes() == before


def test_masked_recovery_writes_the_model(make_model, tmp_path):
    sparse = al.prune(make_model(), tmp_path / "sparse", sparsity=0.5)
    train_on(sparse.path, tmp_path / "adapter")
    merged = al.recover(tmp_path / "adapter", masked=True, output=tmp_path / "merged")
    assert (merged.path / "model.safetensors").exists() and merged.base == str(make_model())


def test_evaluate_is_the_commands(pruned, make_model, text_file, tmp_path):
    run = {"base_model": str(make_model()), "output_dir": str(tmp_path / "out")}
    run["loram"] = {"pruned_model_path": str(pruned.path)}
    file = write_yaml(tmp_path / "loram.yml", run)
    (tmp_path / "out").mkdir()
    settings = {"models": ["base", "pruned"], "in_domain": [str(text_file)], "limit": 2}
    found = al.evaluate(file, length=32, **settings)
    options = ("--models", "base,pruned", "--in-domain", text_file, "--limit", 2, "--length", 32)
    assert found.as_dict() == command("evaluate", file, *options)
    assert found.path == tmp_path / "out/evaluation.json" and not found.scores
    assert json.loads(found.path.read_text()) == found.as_dict()
    (perplexities,) = found.perplexity.values()
    assert perplexities["pruned"] > 1 and f"{perplexities['base']:.2f}" in str(found)


def test_publish_is_the_commands(pruned, tmp_path):
    done = al.publish(pruned.path, "some-org/name", dry_run=True, output=tmp_path / "card")
    options = ("--dry-run", "--overwrite", "--output", tmp_path / "card")
    assert done.as_dict() == command("publish", pruned.path, "some-org/name", *options)
    assert done.url is None and done.notices and "model.safetensors" in str(done)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda at: al.prune(at, "out", ration=0.5), "unknown setting 'ration': expected method, "),
        (lambda at: al.prune(at, "out", calibration_path="a"), "expected .*calibration, "),
        (lambda at: al.prune(at, "out", ratio=1.5), "between 0 and 1"),
        (lambda at: al.prune(at, "out", ratio="half"), "a pruning ratio .*found half"),
        (lambda at: al.prune(at, "out"), "expected a pruning ratio, found none"),
        (lambda at: al.prune("./nowhere", "out", ratio=0.5), "no such model"),
        (lambda at: al.plan_memory(at, ratio=0.5, lora_rank=4), "'lora_rank': .*lora_r, "),
        (lambda at: al.plan_memory(at, ratio=0.5, adapter="dora"), "adapter out of loram, qloram"),
        (lambda at: al.plan_memory(at, ratio=0.5, stage="aligned"), "stage out of train, align"),
        (lambda at: al.plan_memory(at, ratio=0.5, fit="20GiB"), "found both"),
        (lambda at: al.recover(at), "expected a PEFT adapter"),
        (lambda at: al.recover(at, fil="zeros"), "'fil': expected fill, calibration, "),
        (lambda at: al.recover(at, fill="normal"), "zeros and fitted, found normal, which is gone"),
        (lambda at: al.inspect(at, verify=True), "loram.json"),
        (lambda at: al.evaluate("no.yml", model="base"), "'model': expected config, models, "),
        (lambda at: al.evaluate("no.yml", models=["bass"]), "models.0: .*found 'bass'"),
        (lambda at: al.evaluate("no.yml", limit="few"), "limit: .*found 'few'"),
        (lambda at: al.publish(at, "some-org/name", private=True), "'private': .*public, "),
        (lambda at: al.publish(at, "some-org/name"), "loram.json"),
        (lambda at: al.load_pruned(at), "loram_plan.safetensors"),
        (lambda at: al.load_pruned(at, lm_head_format="cpu"), "native, nf4, found 'cpu'"),
    ],
)
def test_what_is_wrong_is_one_sentence(call, message, make_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(al.LoRAMError, match=message) as caught:
        call(make_model())
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_load_pruned_checks_plan_and_weights(pruned, make_model, tmp_path):
    other = al.prune(make_model(), tmp_path / "other", ratio=0.5, seed=1)
    (other.path / "loram_plan.safetensors").rename(pruned.path / "loram_plan.safetensors")
    with pytest.raises(al.LoRAMError, match="plan and checkpoint are from two prunings"):
        al.load_pruned(pruned.path)
    with pytest.raises(al.LoRAMError, match=r"transformers loads, found .* refused"):
        al.load_pruned(make_pruned_again(make_model, tmp_path), no_such_option=1)
    with pytest.raises(al.LoRAMError, match="dtype such as bfloat16, found 'bfloat61'"):
        al.load_pruned(tmp_path / "again", load_in_4bit=True, dtype="bfloat61")


def make_pruned_again(make_model, tmp_path):
    return al.prune(make_model(), tmp_path / "again", ratio=0.5).path


def sectioned(make_model, folder, **fields):
    """A Gemma 3 whose config says these things of the language tower alone."""
    shutil.copytree(make_model("gemma3"), folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype")
    config["text_config"] |= fields
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_what_is_said_of_the_language_tower_counts(make_model, tmp_path):
    base = sectioned(make_model, tmp_path / "base", dtype="float32")
    pruned = al.prune(base, tmp_path / "pruned", ratio=0.5)
    model = al.load_pruned(pruned.path, load_in_4bit=True)
    assert model.model.language_model.layers[1].mlp.up_proj.compute_dtype == torch.float32
    packed = sectioned(make_model, tmp_path / "packed", quantization_config={"bits": 8})
    with pytest.raises(al.LoRAMError, match="found quantization_config"):
        al.prune(packed, tmp_path / "again", ratio=0.5)
    assert "quantized" in al.inspect(packed).as_dict()["cannot_be_pruned"]


def test_four_bits_are_qlorams(pruned, make_model, tmp_path):
    model = al.load_pruned(pruned.path, load_in_4bit=True)
    layer = model.model.layers[1].mlp.up_proj
    assert type(layer).__name__ == "Linear4bit" and layer.out_features == 24
    state = layer.weight.quant_state
    assert (state.quant_type, state.blocksize, state.nested) == ("nf4", 64, True)
    assert layer.compute_dtype == torch.float32  # as it is stored
    assert type(model.get_input_embeddings()).__name__ == "OffloadedEmbedding"
    assert type(model.lm_head) is torch.nn.Linear
    small = al.load_pruned(pruned.path, load_in_4bit=True, lm_head_format="nf4", dtype="bfloat16")
    assert type(small.lm_head).__name__ == "Linear4bit"
    assert small.model.layers[1].mlp.up_proj.compute_dtype == torch.bfloat16
    packed = al.prune(make_model(), tmp_path / "packed", ratio=0.5, quantize="nf4")
    stored = al.load_pruned(packed.path)
    assert type(stored.model.layers[1].mlp.up_proj).__name__ == "Linear4bit"
    assert torch.isfinite(stored(TOKENS).logits).all()


def by_peft(model, texts, tokenizer, output, **_):
    """A plain loop; returns the model with its LoRA."""
    trained = get_peft_model(model, LoraConfig(**LORA)).train()
    optimizer = torch.optim.AdamW((p for p in trained.parameters() if p.requires_grad), lr=0.01)
    for text in texts[:4]:
        batch = tokenizer(text, return_tensors="pt").input_ids
        trained(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained.save_pretrained(output)
    return trained


def by_trl(model, texts, tokenizer, output, **options):
    """TRL's own trainer; returns the model with its LoRA."""
    fixed = {"bf16": False, "use_cpu": True, "save_strategy": "no", "report_to": "none"}
    args = SFTConfig(
        str(output), max_steps=4, per_device_train_batch_size=1, learning_rate=0.01, **fixed,
        **options,
    )  # fmt: skip
    rows = Dataset.from_list([{"text": text} for text in texts])
    trainer = SFTTrainer(
        model, args, train_dataset=rows, processing_class=tokenizer, peft_config=LoraConfig(**LORA)
    )
    trainer.train()
    trainer.save_model()
    return trainer.model


def updates(model) -> dict[str, torch.Tensor]:
    """Module → B A in double precision, each number by itself, so that equal ones are equal."""
    return {
        name.removeprefix("base_model.model."): (
            layer.lora_B["default"].weight.double()[:, :, None]
            * layer.lora_A["default"].weight.double()[None]
        )
        .sum(1)
        .detach()
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A")
    }


@pytest.mark.parametrize("train", [by_peft, by_trl])
@pytest.mark.parametrize(
    ("loading", "options"),
    [
        ({}, {}),
        ({"dtype": torch.bfloat16}, {}),
        ({"load_in_4bit": True}, {}),
        ({"load_in_4bit": True, "lm_head_format": "nf4"}, {"loss_type": "nll"}),
    ],
    ids=["32", "16", "4", "4-head"],
)
def test_what_peft_and_trl_train_is_the_update_of_the_base(
    train, loading, options, pruned, make_model, text_file, tmp_path
):
    texts = [json.loads(line)["text"] for line in text_file.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(make_model())
    model = al.load_pruned(pruned.path, **loading)
    narrow = updates(train(model, texts, tokenizer, tmp_path / "adapter", **options))
    adapter = al.recover(tmp_path / "adapter")
    original = AutoModelForCausalLM.from_pretrained(adapter.base)
    whole = updates(PeftModel.from_pretrained(original, adapter.path))
    plan, shapes = pruned.plan, {tensor.module: tensor for tensor in tensors(pruned.plan.config)}
    assert len(whole) == 28 and whole.keys() == narrow.keys()
    for module, update in whole.items():
        tensor = shapes[module]
        features = plan.features(tensor.dims, tensor.layer)
        rows, columns = (
            np.arange(size) if kept is None else kept
            for size, kept in zip(tensor.shape, features, strict=True)
        )
        assert narrow[module].any() and torch.equal(update[rows][:, columns], narrow[module])
        update[np.ix_(rows, columns)] = 0
        assert update.shape == tensor.shape and not update.any()


@pytest.mark.parametrize("four_bit", ["0", "1"])
def test_the_notebook_runs(four_bit, make_model, tmp_path):
    program = ROOT / "examples/notebook/loram.py"
    chosen = {"BASE": str(make_model()), "WORK": str(tmp_path), "FOUR_BIT": four_bit}
    done = run_command(program, variables=chosen)
    assert "qloram" in done.stdout and str(tmp_path / "recovered-trl") in done.stdout
    assert (tmp_path / "recovered-peft/adapter_config.json").exists()
