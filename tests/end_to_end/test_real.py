"""Stories on real pretrained models, through real commands: what pico models cannot show.

SmolLM2-135M-Instruct is 30 layers deep, with tied embeddings, 3 KV groups and a chat template;
Gemma 3 270M has sliding windows, 262,144 tokens, and an embedding that is scaled and tied.
"""

import json
from contextlib import nullcontext

import data
import llamacpp
import numpy as np
import pretrained
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from conftest import run_command, write_yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import axolotl_loram.heterogeneous  # noqa: F401  (to load pruned models)
from axolotl_loram.errors import LoRAMError

TEXT = "The capital of France is Paris. Water boils at 100 degrees Celsius."
CALIBRATION = ("--calibration-samples", 8, "--calibration-length", 128)
TIER = pytest.mark.real
STRUCTURED = ("random", "magnitude", "activation", "fluctuation", "taylor")
SPARSE = (("magnitude", "0.5"), ("wanda", "2:4"), ("sparsegpt", "2:4"))


def folder_of(model):
    try:
        return pretrained.folder_of(model)
    except LoRAMError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2():
    return folder_of(pretrained.SMOLLM2)


@pytest.fixture(scope="session")
def gemma3():
    return folder_of(pretrained.GEMMA3)


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """The quickstart's chats, those of held-out modules, and plain source."""
    folder = tmp_path_factory.mktemp("texts")
    data.build(folder)
    return folder


@pytest.fixture
def story(texts, tmp_path):
    """The YAML of a short run on chats that prunes by what is given."""

    def write(base, pruning, **changes):
        settings = {
            "base_model": str(base),
            "plugins": ["axolotl_loram.LoRAMPlugin"],
            "loram": {"pruning": pruning, "cache_dir": str(tmp_path / "cache")},
            "datasets": [chats(texts / "train.jsonl")],
            "test_datasets": [chats(texts / "heldout.jsonl")],
            "dataset_prepared_path": str(tmp_path / "prepared"),
            "dataset_num_proc": 1,
            "dataloader_num_workers": 0,
            "output_dir": str(tmp_path / "out"),
            "sequence_len": 256,
            "adapter": "loram",
            "lora_r": 8,
            "lora_alpha": 16,
            "lora_target_linear": True,
            **{f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o")},
            "max_steps": 6,
            "micro_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "learning_rate": 0.002,
            "optimizer": "adamw_torch",
            "lr_scheduler": "constant",
            "seed": 1,
            "logging_steps": 1,
            "bf16": False,
            "fp16": False,
            "tf32": False,
            "attn_implementation": "sdpa",
            "save_strategy": "no",
        }
        return write_yaml(tmp_path / "loram.yml", settings | changes)

    return write


def chats(file):
    return {"path": str(file), "ds_type": "json", "type": "chat_template", "split": "train"}


def loram(*arguments):
    """The object that a command prints with --json."""
    return json.loads(run_command("axolotl-loram", *arguments, "--json").stdout)


def train(yaml_file):
    return run_command("axolotl", "train", yaml_file, "--launcher", "python")


def loss_of(folder, text=TEXT):
    """Mean nats per token of a text, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss.item()


def check_run(output, base, method):
    """output_dir is an adapter for the whole base, from a pruned model chosen as it should be."""
    record = json.loads((output / "loram.json").read_text())
    pruned = record["trained"]["pruned_model"]
    about = loram("inspect", pruned, "--verify", "--base", base)
    assert about["failed"] == 0 and about["method"] == method
    trained, recovered = (
        load_file(folder / "adapter_model.safetensors") for folder in (output / "pruned", output)
    )
    narrower = [name for name in trained if trained[name].shape != recovered[name].shape]
    assert trained.keys() == recovered.keys() and narrower
    for name in narrower:
        assert torch.count_nonzero(recovered[name]) == torch.count_nonzero(trained[name])
    return about


def perplexities(yaml_file, *options):
    found = loram("evaluate", yaml_file, "--limit", 8, *options)
    models = found["perplexity"]["validation"]["models"]
    return {name: model["perplexity"] for name, model in models.items()}, found


def knowledge(folder):
    """A task of lm-eval that a pretrained model is good at, as a local file."""
    right = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Russia": "Moscow"}
    right |= {"Germany": "Berlin", "Spain": "Madrid", "Egypt": "Cairo", "China": "Beijing"}
    cities = list(right.values())
    rows = [
        {"prompt": f"The capital of {country} is", "gold": cities.index(city)}
        for country, city in right.items()
    ]
    file = folder / "capitals.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    task = {"task": "capitals", "output_type": "multiple_choice", "doc_to_text": "{{prompt}}"}
    task |= {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}}
    task |= {"test_split": "test", "doc_to_target": "{{gold}}", "doc_to_choice": cities}
    task |= {"num_fewshot": 0, "metric_list": [{"metric": "acc"}]}
    return write_yaml(folder / "capitals.yaml", task)


@pytest.mark.slow
def test_a_chat_model_learns_on_half_of_itself(smollm2, story, tmp_path):
    """Prune, train, recover, evaluate, with no setting that can be left open."""
    pruning = {"ratio": 0.5, "calibration_samples": 8, "calibration_length": 64}
    yaml_file = story(smollm2, pruning, micro_batch_size=2)
    train(yaml_file)
    about = check_run(tmp_path / "out", smollm2, "activation")
    assert about["pruned_parameters"] == 95_586_624
    assert about["refits_tried"] == 48
    assert about["refits_accepted"] > 40  # of little text, that of the interpreter's own library
    found, _ = perplexities(yaml_file, "--models", "base,base+recovered")
    assert found["base+recovered"] < 0.85 * found["base"]


@TIER
def test_inspect_and_plan_know_smollm2(smollm2):
    assert loss_of(smollm2) < 2.5
    assert loram("inspect", smollm2)["model_type"] == "llama"
    planned = loram("plan", smollm2, "--pruning-ratio", 0.5)
    assert planned["base_parameters"] == 134_515_008 and planned["pruned_layers"] == 24
    assert planned["kept_per_pruned_layer"] == {"neurons": 768, "kv_groups": 2}


@TIER
@pytest.mark.parametrize("method", STRUCTURED)
def test_smollm2_by_every_criterion(smollm2, texts, tmp_path, method):
    out = tmp_path / "pruned"
    how = ["--method", method, "--pruning-ratio", 0.25, "--calibration", texts / "train.jsonl"]
    loram("prune", smollm2, out, *how, *CALIBRATION)
    assert loram("inspect", out, "--verify", "--base", smollm2)["failed"] == 0
    assert loss_of(smollm2) < loss_of(out) < 7  # measured 3.6 to 5.8; a guess is log(49,152) = 10.8


@TIER
@pytest.mark.parametrize(("method", "sparsity"), SPARSE)
def test_smollm2_made_sparse(smollm2, texts, tmp_path, method, sparsity):
    out = tmp_path / "sparse"
    text = [] if method == "magnitude" else ["--calibration", texts / "train.jsonl", *CALIBRATION]
    loram("prune", smollm2, out, "--method", method, "--sparsity", sparsity, *text)
    assert loram("inspect", out, "--verify", "--base", smollm2)["failed"] == 0
    weights = load_file(out / "model.safetensors")
    name = "model.layers.20.mlp.down_proj.weight"
    assert (weights[name] == 0).float().mean().item() == pytest.approx(0.5, abs=0.001)
    assert loss_of(smollm2) < loss_of(out) < 7


@TIER
@pytest.mark.parametrize("adapter", ["loram", "qloram"])
def test_smollm2_from_packed_chats_to_tasks(smollm2, story, tmp_path, adapter):
    pruning = {"ratio": 0.5, "calibration_samples": 8, "calibration_length": 128}
    packed = {"sample_packing": True, "pad_to_sequence_len": True, "micro_batch_size": 2}
    packed |= {"adapter": adapter, "load_in_4bit": adapter == "qloram"}
    yaml_file, output = story(smollm2, pruning, **packed), tmp_path / "out"
    train(yaml_file)
    check_run(output, smollm2, "activation")
    check_story(yaml_file, smollm2, output, tmp_path)


@TIER
def test_gemma3_from_plan_to_tasks(gemma3, story, tmp_path):
    """Its one KV group stays; neurons go."""
    assert loss_of(gemma3) < 4
    assert loram("inspect", gemma3)["model_type"] == "gemma3_text"
    planned = loram("plan", gemma3, "--pruning-ratio", 0.5)
    assert planned["base_parameters"] == 268_098_176
    assert planned["kept_per_pruned_layer"] == {"neurons": 1024, "kv_groups": 1}
    pruning = {"ratio": 0.5, "calibration_samples": 8, "calibration_length": 128}
    yaml_file, output = story(gemma3, pruning, chat_template="gemma3"), tmp_path / "out"
    train(yaml_file)
    check_run(output, gemma3, "activation")
    check_story(yaml_file, gemma3, output, tmp_path)


def check_story(yaml_file, base, output, folder):
    """Merged, the model is the base with the recovered adapter; it has learnt and still knows."""
    run_command("axolotl", "merge-lora", yaml_file)
    also = ("--also", f"merged={output / 'merged'}", "--tasks", knowledge(folder))
    found, rest = perplexities(yaml_file, "--models", "base,base+recovered,pruned+adapter", *also)
    assert found["base+recovered"] < 0.8 * found["base"]
    assert found["also:merged"] == pytest.approx(found["base+recovered"], rel=0.01)
    scores = {n: m["value"] for n, m in rest["tasks"]["capitals"]["models"].items()}
    assert scores["base"] >= 0.75 and scores["base+recovered"] >= 0.625
    assert (output / "merged/config.json").exists() and base.is_dir()


@TIER
def test_on_the_upper_layers_the_adapter_is_better(smollm2, story, texts, tmp_path):
    """Than inside pruned layers, anchored or not, with more parameters: twenty steps on each.

    On this task the anchor alone makes no difference (NOTES). 8 functions would be too few to tell.
    """
    rows = (texts / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = rows[:: len(rows) // 96][:96]  # of all modules: those of a few are soon overfitted
    (tmp_path / "few.jsonl").write_text("\n".join(rows), encoding="utf-8")
    pruning = {"ratio": 0.5, "calibration_samples": 16, "calibration_length": 128}
    found = {}
    for anchor in ("none", "base", "layers"):
        how = {"units": "layers", "ratio": 0.4} if anchor == "layers" else pruning
        loram = {"pruning": how, "anchor": "base" if anchor == "layers" else anchor}
        loram |= {"cache_dir": str(tmp_path / "cache")}
        changes = {"max_steps": 20, "datasets": [chats(tmp_path / "few.jsonl")], "loram": loram}
        changes |= {"output_dir": str(tmp_path / anchor), "test_datasets": None}
        changes |= {"dataset_prepared_path": str(tmp_path / f"prepared-{anchor}")}
        train(story(smollm2, pruning, **changes))
        file = story(
            smollm2, pruning, **changes | {"test_datasets": [chats(texts / "heldout.jsonl")]}
        )
        models = ("--models", "base,base+recovered", "--limit", 64)
        found[anchor], _ = perplexities(file, *models)
        print(anchor, found[anchor])
    perplexity = {anchor: models["base+recovered"] for anchor, models in found.items()}
    assert len({models["base"] for models in found.values()}) == 1
    assert perplexity["layers"] < min(perplexity["none"], perplexity["base"])
    assert max(perplexity.values()) < 0.6 * found["none"]["base"]


@TIER
def test_rounding_on_text_keeps_the_upper_layers_nearer(smollm2, texts, tmp_path):
    """To the original in 16 bits, on held-out text of that kind; of another they may be further."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    rows = (texts / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[:8]
    said = "\n".join(m["content"] for row in rows for m in json.loads(row)["messages"])
    ids = tokenizer(said, return_tensors="pt")["input_ids"][:, :1024]
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    with torch.no_grad():
        wanted, losses = base(ids).logits.log_softmax(-1), {}
    for quantize in ("nf4", "nf4-gptq"):
        how = ("--units", "layers", "--pruning-ratio", 0.5, "--quantize", quantize)
        text = ("--calibration", texts / "train.jsonl", *CALIBRATION)
        loram("prune", smollm2, tmp_path / quantize, *how, *(text if quantize != "nf4" else ()))
        packed = AutoModelForCausalLM.from_pretrained(tmp_path / quantize, dtype=torch.float32)
        for name, module in packed.named_modules():
            if isinstance(module, Linear4bit) and "layers" in name:
                numbers = dequantize_4bit(module.weight.data, module.weight.quant_state)
                base.get_submodule(name).weight.data.copy_(numbers)
        with torch.no_grad():
            found = base(ids).logits.log_softmax(-1)
        losses[quantize] = (wanted.exp() * (wanted - found)).sum(-1).mean().item()
    about = loram("inspect", tmp_path / "nf4-gptq")
    assert about["roundings_tried"] == 15 * 7
    assert about["roundings_accepted"] > 90  # of 1,024 tokens
    assert about["rounding_error_after"] < 0.7 * about["rounding_error_before"]
    assert losses["nf4-gptq"] < 0.7 * losses["nf4"], losses


@TIER
def test_served_by_llama_cpp_as_by_peft(smollm2, story, texts, tmp_path):
    """What follows 100 questions, by llama.cpp on the GGUF that the base was unpacked from.

    llama.cpp rounds the inputs of 4-bit weights to 8 bits: the two differ without an adapter too.
    """
    pruning = {"ratio": 0.5, "calibration_samples": 8, "calibration_length": 128}
    train(story(smollm2, pruning, max_steps=20, test_datasets=None))
    file, out = pretrained.gguf_of(pretrained.SMOLLM2), tmp_path / "gguf"
    told = loram("export", tmp_path / "out", out, "--base-gguf", file)
    assert told["tensors"] == 420 and told["template"]
    assert "<|im_start|>user\n{{ .Prompt }}<|im_end|>" in (out / "Modelfile").read_text()
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    engine = llamacpp.Engine(file, out / "adapter.gguf")
    divergence, agreed, moved = {True: [], False: []}, 0, 0
    for ids in questions(texts, tokenizer)[:100]:
        first = {}
        for adapted in (True, False):
            with nullcontext() if adapted else model.disable_adapter(), torch.no_grad():
                right = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1).numpy()
            found = engine.logprobs(ids, len(right), scale=float(adapted))
            divergence[adapted].append((np.exp(right) * (right - found)).sum())
            first[adapted] = right.argmax()
            agreed += adapted and right.argmax() == found.argmax()
        moved += first[True] != first[False]
    kl = {adapted: float(np.mean(each)) for adapted, each in divergence.items()}
    print(f"first tokens agree {agreed} of 100; KL {kl[True]:.4f}, of the base {kl[False]:.4f}")
    assert moved > 50 and agreed >= 95
    assert kl[True] <= kl[False] + 0.02


def questions(texts, tokenizer):
    """The shortest of the quickstart's, as tokens."""
    rows = [
        json.loads(line)["messages"][:1]
        for file in ("train.jsonl", "heldout.jsonl")
        for line in (texts / file).read_text(encoding="utf-8").splitlines()
    ]
    asked = (
        tokenizer.apply_chat_template(row, add_generation_prompt=True, return_dict=True)
        for row in rows
    )
    return sorted((each["input_ids"] for each in asked), key=len)
