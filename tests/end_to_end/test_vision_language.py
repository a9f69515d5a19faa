"""`axolotl train` on models with a vision tower, by the default recipe, to the merged original."""

import json

import pytest
import torch
import transformers
from conftest import build_model, byte_tokenizer, run_command, write_yaml
from families import TOWERS
from peft import PeftModel
from safetensors.torch import load_file

from axolotl_loram.architecture.plan import PruningPlan

pytestmark = pytest.mark.slow
TOKENS = torch.arange(3, 60)[None]
LANGUAGE = r"model.language_model.layers.[\d]+.(mlp|self_attn).(up|down|gate|q|k|v|o)_proj"
TARGETS = {"lora_target_linear": False, "lora_target_modules": LANGUAGE}
"""As in Axolotl's examples: by `lora_target_linear`, PEFT takes Qwen's vision blocks for layers."""


@pytest.fixture
def make_tower(tmp_path):
    """Saves a pico model with a vision tower, and what reads its text, or images too."""
    from towers import make_processor

    def make(family, reader=make_processor):
        build_model(family).save_pretrained(tmp_path / "base")
        reader(family).save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return make


def logits_of(base, adapter=None):
    model = transformers.AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter) if adapter else model
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def weights_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def tell_story(base, settings, tmp_path, **changes):
    """Calibrated on its own data, refitted, trained, recovered, merged; the prune's record."""
    output, cache = tmp_path / "out", tmp_path / "cache"
    section = {"pruning": {"ratio": 0.5}, "cache_dir": str(cache)}
    if "qwen" in str(tmp_path):
        changes |= TARGETS
    file = write_yaml(tmp_path / "loram.yml", settings(base, loram=section, **changes))
    run_command("axolotl", "train", file, "--launcher", "python")
    [pruned] = [found.parent for found in cache.glob("*/loram.json")]
    counts = PruningPlan.load(pruned).counts
    assert counts.keys() == {1, 2} and counts[1]["neurons"] == 24
    record = json.loads((pruned / "loram.json").read_text())
    assert record["pruning"]["method"] == "activation" and record["refit"]
    assert record["calibration"]["source"] == "the run's datasets"

    config = json.loads((output / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    trained, recovered = weights_of(output / "pruned"), weights_of(output)
    assert trained.keys() == recovered.keys()
    language = [name for name in trained if ".layers.1.mlp.up_proj.lora_B" in name]
    assert {(len(trained[name]), len(recovered[name])) for name in language} == {(24, 48)}
    assert not torch.allclose(logits_of(base), logits_of(base, output), atol=0.01)
    run_command("axolotl", "merge-lora", file)
    torch.testing.assert_close(
        logits_of(output / "merged"), logits_of(base, output), rtol=1e-4, atol=1e-4
    )
    return record


@pytest.mark.parametrize("family", TOWERS)
def test_text_alone(family, make_tower, settings, tmp_path):
    """With no more of a processor than text needs: Qwen's whole ones want torchvision."""
    base = make_tower(family, lambda _: byte_tokenizer())
    (base / "processor_config.json").write_text('{"processor_class": "PreTrainedTokenizerFast"}')
    tell_story(base, settings, tmp_path)


ROLES = ("user", "assistant")


@pytest.mark.parametrize("family", TOWERS)
def test_images(family, make_tower, settings, text_file, tmp_path):
    """Rows of messages with images, which the collator tokenizes: calibrated on their text."""
    from PIL import Image

    if family != "gemma3":
        pytest.importorskip("torchvision", reason="Qwen's processors want it")
    texts = [json.loads(line)["text"] for line in text_file.read_text().splitlines()]
    rows = []
    for number, (asked, told) in enumerate(zip(texts[::2], texts[1::2], strict=False)):
        picture = tmp_path / f"{number}.png"
        Image.new("RGB", (16, 16), (number, 2 * number, 3 * number)).save(picture)
        shown = [{"type": "image", "path": str(picture)}, {"type": "text", "text": asked}]
        said = [{"type": "text", "text": told}]
        pairs = zip(ROLES, (shown, said), strict=True)
        rows.append({"messages": [{"role": role, "content": content} for role, content in pairs]})
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    named = {"path": str(data), "ds_type": "json", "type": "chat_template"}
    changes = {
        "datasets": [named],
        "processor_type": "AutoProcessor",
        "chat_template": "gemma3" if family == "gemma3" else "qwen2_vl",
        "skip_prepare_dataset": True,
        "remove_unused_columns": False,
        "sample_packing": False,
    }
    base = make_tower(family)
    record = tell_story(base, settings, tmp_path, **changes)
    reader = transformers.AutoProcessor.from_pretrained(base).to_dict()
    [pruned] = (found.parent for found in (tmp_path / "cache").glob("*/loram.json"))
    for folder in (pruned, tmp_path / "out"):
        found = transformers.AutoProcessor.from_pretrained(folder).to_dict()
        assert found["image_processor"] == reader["image_processor"], folder
    assert record["calibration"]["tokens"] > 1000
