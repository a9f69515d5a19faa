"""What two ranks save under each kind of sharding, also after a run was cut off and went on."""

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import RANKS, start_command, write_yaml, zero_on_cpus
from safetensors.torch import load_file

from axolotl_loram.config import PruningArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.pruning.prune import prune
from axolotl_loram.recovery.recover import recover

STEPS, HELD = 6, 3
WHOLE = ["embed_tokens", "lm_head"]
SAVED = {f"base_model.model.{name}.weight" for name in ("model.embed_tokens", "lm_head")}
FSDP2 = {
    "fsdp_version": 2,
    "fsdp_config": {
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        "state_dict_type": "SHARDED_STATE_DICT",
        "reshard_after_forward": True,
    },
}


def sharding(kind, folder):
    """Axolotl's settings of one kind of sharding."""
    if kind.startswith("zero"):
        return {"deepspeed": str(zero_on_cpus(folder, int(kind[4])))}
    return FSDP2 if kind == "fsdp2" else {}


class Runs:
    """Runs of one kind, in a folder of their own."""

    def __init__(self, folder, settings):
        self.folder, self.settings = folder, settings
        (folder / "witness").mkdir(parents=True)

    def start(self, *launcher, hold=None, disks=False, **changes):
        """Start `axolotl train`; what it says goes to a log."""
        yaml_file = write_yaml(self.folder / "loram.yml", {**self.settings, **changes})
        variables = {
            **RANKS,
            "WITNESS": str(self.folder / "witness"),
            **({"HOLD_STEP": str(hold)} if hold else {}),
            **({"DISKS": str(self.folder)} if disks else {}),
        }
        command = ("axolotl", "train", yaml_file, "--launcher", *(launcher or ("python",)))
        return start_command(*command, log=self.folder / "log", variables=variables)

    @property
    def log(self):
        return (self.folder / "log").read_text(errors="replace")

    def finish(self, *launcher, **options):
        code = self.start(*launcher, **options).wait(timeout=400)
        assert code == 0, self.log[-6000:]

    def cut_off(self, ranks, number, *launcher, **options):
        """Send a signal in the step HELD, as a terminal or an init does, and SIGKILL after."""
        process = self.start(*launcher, hold=HELD, **options)
        held = [self.folder / f"witness/held-{rank}" for rank in range(ranks)]
        deadline = time.monotonic() + 300
        while not all(file.exists() for file in held):
            assert process.poll() is None and time.monotonic() < deadline, self.log[-6000:]
            time.sleep(0.1)
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(True)]
        os.killpg(process.pid, number)
        _, alive = psutil.wait_procs(family, timeout=10)
        for one in alive:
            one.kill()
        return process.wait(timeout=60)


@pytest.fixture(scope="session")
def lora_settings(make_model, tmp_path_factory):
    """LoRA on a pruned model, saved at every other step, going on by itself."""
    folder = tmp_path_factory.mktemp("saves")
    prune(str(make_model()), folder / "pruned", PruningArgs(ratio=0.5))
    source = Path(json.__file__).read_text(encoding="utf-8").replace("\n", " ")
    rows = [json.dumps({"text": source[at : at + 60]}) for at in range(0, 60 * 64, 60)]
    (folder / "text.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return {
        "base_model": str(make_model()),
        "plugins": ["axolotl_loram.LoRAMPlugin", "witness.WitnessPlugin"],
        "loram": {"pruned_model_path": str(folder / "pruned")},
        "datasets": [{"path": str(folder / "text.jsonl"), "ds_type": "json", "type": "completion"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "sequence_len": 64,
        "val_set_size": 0,
        "adapter": "loram",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_linear": True,
        **{f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o")},
        "gradient_accumulation_steps": 1,
        "max_steps": STEPS,
        "save_steps": 2,
        "auto_resume_from_checkpoints": True,
        "learning_rate": 0.01,
        "optimizer": "adamw_torch",
        "lr_scheduler": "cosine",
        "logging_steps": 1,
        "seed": 1,
        **dict.fromkeys(("bf16", "fp16", "tf32"), False),
        "attn_implementation": "sdpa",
    }


@pytest.fixture(scope="session")
def undisturbed(lora_settings, tmp_path_factory):
    """output_dir of a single process; with the modules that are trained whole, if any."""
    made = {}

    def make(whole):
        if whole not in made:
            folder = tmp_path_factory.mktemp("undisturbed")
            changes = {"micro_batch_size": 4, "output_dir": str(folder / "out")}
            changes |= {"lora_modules_to_save": WHOLE} if whole else {}
            Runs(folder / "run", {**lora_settings, **changes}).finish()
            made[whole] = folder / "out"
        return made[whole]

    return make


def tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


def check_adapter(output, expected, whole, scratch):
    """The adapter is complete, trained, what recovery makes of the one beside, and as expected."""
    found, narrow = tensors(output), tensors(output / "pruned")
    assert found.keys() == narrow.keys() == tensors(expected).keys()
    assert all(weight.numel() for weight in found.values())
    assert len([name for name in found if "lora_B" in name and found[name].any()]) == 28
    assert not whole or found.keys() >= SAVED
    record = json.loads((output / "loram.json").read_text())
    assert record["trained"]["steps"] == {"done": STEPS, "planned": STEPS}
    assert "of its training" not in (output / "README.md").read_text()
    again = tensors(Path(recover(output / "pruned", output=scratch)["output"]))
    for name, weight in tensors(expected).items():
        assert torch.equal(again[name], found[name])
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5)


def check_interrupted(folder, saved):
    """On SIGINT Axolotl saves an adapter, whole and with its steps, or there is none to recover.

    Args:
        folder: The trainer's.
        saved: Whether there has to be one; ZeRO-3 has small weights whole on each rank.
    """
    try:
        record = recover(folder, output=folder.parent / "interrupted")
    except LoRAMError as error:
        assert not saved and ("found neither" in str(error) or "not gathered" in str(error))
        return
    assert record["trained"]["steps"] == {"done": HELD, "planned": STEPS}
    saved, before = tensors(folder), tensors(folder / f"checkpoint-{HELD - 1}")
    assert all(weight.any() for weight in saved.values())
    assert not any(torch.equal(weight, before[name]) for name, weight in saved.items())


def half_a_checkpoint(folder):
    """What a kill leaves while the trainer saves: a later one, without its state."""
    half = folder / "checkpoint-1000"
    half.mkdir(parents=True)
    (half / "adapter_model.safetensors").write_bytes(b"\x08")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "number", "disks"),
    [
        ("ddp", signal.SIGTERM, True),
        *(
            pytest.param(*case, marks=pytest.mark.matrix)
            for case in [
                ("ddp", signal.SIGINT, False),
                ("zero1", signal.SIGTERM, False),
                ("zero2", signal.SIGTERM, False),
                ("zero3", signal.SIGINT, False),
                ("zero3", signal.SIGTERM, True),
                ("fsdp2", signal.SIGINT, False),
                ("fsdp2", signal.SIGTERM, False),
            ]
        ),
    ],
)
def test_two_ranks_are_cut_off_and_go_on(kind, number, disks, lora_settings, undisturbed, tmp_path):
    whole = kind in ("ddp", "zero1", "zero2")  # the others refuse lora_modules_to_save
    expected = undisturbed(whole)
    changes = {"micro_batch_size": 2, "output_dir": "out" if disks else str(tmp_path / "out")}
    changes |= {"lora_modules_to_save": WHOLE} if whole else {}
    runs = Runs(tmp_path / "run", {**lora_settings, **changes, **sharding(kind, tmp_path)})
    for rank in ("0", "1"):
        (runs.folder / rank).mkdir()
    output = runs.folder / "0/out" if disks else tmp_path / "out"
    two = ("torchrun", "--", "--nproc_per_node", "2")

    runs.cut_off(2, number, *two, disks=disks)
    assert not (output / "adapter_config.json").exists()
    check_interrupted(output / "pruned", saved=number == signal.SIGINT and kind == "ddp")
    assert (output / f"pruned/checkpoint-{HELD - 1}/trainer_state.json").exists()
    half_a_checkpoint(output / "pruned")
    runs.finish(*two, disks=disks)
    assert f"resuming from {output / 'pruned' if not disks else 'out/pruned'}/checkpoint-2" in (
        runs.log
    )
    check_adapter(output, expected, whole, tmp_path / "again")
    if disks:
        assert not (runs.folder / "1/out/adapter_model.safetensors").exists()
