"""Models that are more, or other, than a language model: towers that stay, and a ViT."""

import numpy as np
import pytest
import torch
from families import pico_config
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageClassification, AutoModelForImageTextToText

import axolotl_loram.heterogeneous  # noqa: F401
from axolotl_loram.architecture.plan import PruningPlan
from axolotl_loram.config import PruningArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.tensors import Checkpoint
from axolotl_loram.pruning.prune import prune
from axolotl_loram.recovery.recover import recover

HALF = PruningArgs(ratio=0.5)
TOKENS = torch.tensor([[5, 260, 260, 260, 260, 7, 8, 9]])  # four places for an image
IMAGE = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)


@pytest.fixture
def gemma(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(pico_config("gemma3"))
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def see(folder, adapter=None):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        types = (TOKENS == 260).long()
        return model.eval()(input_ids=TOKENS, pixel_values=IMAGE, token_type_ids=types).logits


def test_the_language_tower_is_pruned_and_the_vision_tower_untouched(gemma, tmp_path):
    prune(str(gemma), tmp_path / "pruned", HALF)
    base, pruned = Checkpoint(gemma).tensors, Checkpoint(tmp_path / "pruned").tensors
    assert base.keys() == pruned.keys()
    for name, tensor in base.items():
        untouched = name.startswith(("vision_tower.", "multi_modal_projector."))
        same = np.array_equal(tensor.read(), pruned[name].read())
        assert same or not untouched, name
    assert pruned["language_model.model.layers.1.mlp.up_proj.weight"].shape == (24, 32)
    assert torch.isfinite(see(tmp_path / "pruned")).all()
    no_image = torch.zeros_like(see(tmp_path / "pruned"))
    assert not torch.allclose(see(tmp_path / "pruned"), no_image)


def test_an_adapter_of_both_towers_is_recovered(gemma, tmp_path):
    """LoRA on the vision tower goes through as it is: that is the same in both models."""
    prune(str(gemma), tmp_path / "pruned", HALF)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "pruned", dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for name, values in adapted.named_parameters():
            if "lora_B" in name:
                values.normal_(0, 0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    recover(tmp_path / "adapter", str(tmp_path / "pruned"), tmp_path / "recovered")
    files = [
        Checkpoint(tmp_path / x, "adapter_model.safetensors").tensors
        for x in ("adapter", "recovered")
    ]
    vision = [name for name in files[0] if "vision_tower" in name]
    assert vision and all(np.array_equal(files[0][n].read(), files[1][n].read()) for n in vision)
    assert not torch.allclose(see(gemma, tmp_path / "recovered"), see(gemma), atol=1e-3)


def test_a_vision_transformer_is_pruned_trained_and_recovered(tmp_path):
    """The same calls as for a language model, in Python; the labels are of plain shapes."""
    torch.manual_seed(0)
    images = torch.rand(40, 3, 16, 16) * 0.1
    labels = torch.arange(40) % 5
    for image, label in zip(images, labels, strict=True):
        image[:, 3 * label : 3 * label + 3] += 0.8  # a bar, whose height is the label
    AutoModelForImageClassification.from_config(pico_config("vit")).save_pretrained(
        tmp_path / "base"
    )
    prune(str(tmp_path / "base"), tmp_path / "pruned", PruningArgs(method="magnitude", ratio=0.5))
    assert PruningPlan.load(tmp_path / "pruned").counts[1] == {"neurons": 24, "kv_groups": 2}
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "pruned")
    settings = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "fc1", "fc2"], modules_to_save=["classifier"]
    )
    adapted = get_peft_model(model, settings).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(60):
        loss = adapted(pixel_values=images, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.save_pretrained(tmp_path / "adapter")
    recover(tmp_path / "adapter", str(tmp_path / "pruned"), tmp_path / "recovered")
    original = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    served = PeftModel.from_pretrained(original, tmp_path / "recovered").eval()
    with torch.no_grad():
        right = (served(pixel_values=images).logits.argmax(1) == labels).float().mean()
    assert right > 0.8


def test_calibrating_a_vision_transformer_on_text_is_refused(tmp_path, text_file):
    AutoModelForImageClassification.from_config(pico_config("vit")).save_pretrained(
        tmp_path / "base"
    )
    settings = PruningArgs(method="taylor", ratio=0.5, calibration_path=str(text_file))
    with pytest.raises(LoRAMError, match="without refit or nf4-gptq for vit"):
        prune(str(tmp_path / "base"), tmp_path / "pruned", settings)


def test_a_vision_language_model_is_calibrated_on_text(gemma, tmp_path, text_file):
    from conftest import byte_tokenizer

    byte_tokenizer().save_pretrained(gemma)
    settings = PruningArgs(
        method="taylor",
        ratio=0.5,
        calibration_path=str(text_file),
        calibration_samples=8,
        calibration_length=32,
    )
    record = prune(str(gemma), tmp_path / "pruned", settings)
    assert all(fact["heldout_error_before"] > 0 for fact in record["refit"].values())
    assert {name.split(".layers.")[0] for name in record["refit"]} == {"language_model.model"}
