"""The align stage: what it refuses, what it measures, and the checkpoint that it leaves."""

import json
import shutil
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.config import AxolotlInputConfig
from conftest import write_yaml

import axolotl_loram.heterogeneous  # noqa: F401
from axolotl_loram.config import PruningArgs
from axolotl_loram.config_loram import LoRAMConfig
from axolotl_loram.errors import LoRAMError
from axolotl_loram.pruning.prune import prune
from axolotl_loram.text.axolotl_text import load_yaml, training_data
from axolotl_loram.training.align import (
    Alignment,
    begin_alignment,
    check_one_step,
    finish_alignment,
    heldout_losses,
    label_tokens,
)
from axolotl_loram.training.sharding import check_deepspeed, check_sharding
from axolotl_loram.training.support import check_supported

ROOT = Path(__file__).resolve().parents[2]
ALIGN = {"loram": {"stage": "align"}}


@pytest.fixture(scope="module")
def pruned(make_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("align") / "pruned"
    prune(str(make_model()), folder, PruningArgs(ratio=0.5))
    return folder


@pytest.fixture
def run(pruned, tmp_path):
    """Settings as they are when training begins."""
    settings = {
        **ALIGN,
        "base_model": str(pruned),
        "output_dir": str(tmp_path / "out"),
        "datasets": [{"path": "some-org/text", "name": "small", "type": "completion"}],
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "batch_size": 4,
        "sequence_len": 8,
        "learning_rate": 5e-5,
        "lr_scheduler": "cosine",
        "bf16": True,
    }
    return DictDefault(settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": "lora"}, "no `adapter` with `stage: align`, found 'lora'"),
        ({"load_in_4bit": True}, "4 bits"),
        ({"rl": "dpo"}, "`rl`"),
        ({"hub_model_id": "me/model"}, "axolotl-loram publish"),
        ({"load_best_model_at_end": True}, "last step"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size 1 with `stage: align`, found 2"),
        ({"loram": {"stage": "train"}}, "adapter: loram"),
    ],
)
def test_what_does_not_go_with_the_stage_is_refused(changes, message):
    check_supported(DictDefault(ALIGN))
    with pytest.raises(LoRAMError, match=message):
        check_supported(DictDefault({**ALIGN, **changes}))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"stage": "align", "pruned_model_path": "x"}, "no pruned_model_path with `stage: align`"),
        ({"stage": "align", "recovery": "masked"}, "no recovery with `stage: align`"),
        ({"pruned_model_path": "x", "train_lm_head": True}, "no train_lm_head with `stage: train`"),
        ({"stage": "finish"}, "'train' or 'align'"),
    ],
)
def test_each_stage_has_its_keys(section, message):
    again = LoRAMConfig(**LoRAMConfig(stage="align").model_dump())  # as Axolotl hands it on
    assert again.stage == "align"
    with pytest.raises(LoRAMError, match=message):
        LoRAMConfig.parse(**section)


def test_an_alignment_begins_on_the_pruned_model(run, pruned, tmp_path):
    left = tmp_path / "out/training/model.safetensors"
    left.parent.mkdir(parents=True)
    left.touch()
    begun = begin_alignment(run)
    assert run.base_model == str(pruned) and run.output_dir == str(tmp_path / "out/training")
    assert begun.outcome["data"] == [
        {"path": "some-org/text", "name": "small", "type": "completion"}
    ]
    assert not left.exists()  # Axolotl would take an earlier end's weights for its own


def not_pruned(run, make_model, folder):
    run.base_model = str(make_model())


def of_two_prunings(run, make_model, folder):
    shutil.copytree(run.base_model, folder)
    prune(str(make_model()), folder.parent / "other", PruningArgs(ratio=0.5, seed=1))
    shutil.copy(folder.parent / "other/loram_plan.safetensors", folder)
    run.base_model = str(folder)


def in_4_bits(run, make_model, folder):
    prune(str(make_model()), folder, PruningArgs(ratio=0.5, quantize="nf4"))
    run.base_model = str(folder)


def sparse(run, make_model, folder):
    prune(str(make_model()), folder, PruningArgs(sparsity=0.5))
    run.base_model = str(folder)


def into_itself(run, make_model, folder):
    shutil.copytree(run.base_model, folder)
    run.base_model = run.output_dir = str(folder)


def over_an_adapter(run, make_model, folder):
    folder.mkdir()
    (folder / "loram.json").write_text('{"kind": "recovered-adapter"}')
    run.output_dir = str(folder)


def with_two_optimizers(run, make_model, folder):
    run.deepspeed = {"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}


def from_half_a_checkpoint(run, make_model, folder):
    (folder / "checkpoint-2").mkdir(parents=True)
    run.resume_from_checkpoint = str(folder / "checkpoint-2")


def from_anothers_checkpoint(run, make_model, folder):
    from_half_a_checkpoint(run, make_model, folder)
    (folder / "checkpoint-2/trainer_state.json").write_text('{"global_step": 2}')
    (folder / "checkpoint-2/loram.json").write_text('{"fingerprint": "sha256:0"}')


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (not_pruned, "base_model to be a pruned checkpoint .* without loram_plan.safetensors"),
        (of_two_prunings, "plan and checkpoint are from two prunings"),
        (in_4_bits, "in 16 or 32 bits .* in 4 bits"),
        (sparse, "would fill its zeros"),
        (into_itself, "output_dir to be another folder than base_model"),
        (over_an_adapter, "with a recovered-adapter"),
        (with_two_optimizers, "no `optimizer` in the DeepSpeed file, found AdamW"),
        (from_half_a_checkpoint, "without trainer_state.json"),
        (from_anothers_checkpoint, "checkpoint-2 of another"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(change, message, run, make_model, tmp_path):
    change(run, make_model, tmp_path / "folder")
    with pytest.raises(LoRAMError, match=message):
        begin_alignment(run)


DEEPSPEED = {
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
    "bf16": {"enabled": True},
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": 2,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {"type": "AdamW"}}, "no `optimizer`.*the YAML's `optimizer`"),
        ({"scheduler": {"type": "WarmupLR"}}, "no `scheduler`.*found WarmupLR.*`lr_scheduler`"),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu 2 or auto"),
        ({"train_batch_size": 5}, "train_batch_size 4 or auto.*found 5"),
        ({"gradient_accumulation_steps": None}, "gradient_accumulation_steps 2 .*found 1"),
        ({"gradient_clipping": None}, "gradient_clipping 1.0 or auto.*found 0"),
        ({"bf16": {"enabled": False}}, "bf16.enabled True or auto.*found False"),
        ({"fp16": {"enabled": True}}, "fp16.enabled False or auto"),
        ({"zero_optimization": {"stage": 3}}, "model_save true.*no rank would have"),
    ],
)
def test_a_deepspeed_file_that_would_not_hold_is_refused(changes, message, run):
    check_deepspeed(run, DEEPSPEED)
    check_deepspeed(run, {**DEEPSPEED, "zero_optimization": {"stage": 2}})
    with pytest.raises(LoRAMError, match=message):
        check_deepspeed(run, {**DEEPSPEED, **changes})


@pytest.mark.parametrize(
    "file", sorted(ROOT.glob("deepspeed_configs/*.json")), ids=lambda f: f.stem
)
def test_the_projects_own_deepspeed_files_hold(file, run):
    run.deepspeed = str(file)
    check_sharding(run)


def test_sharded_fsdp_weights_are_refused(run):
    run.fsdp_version, run.fsdp_config = 2, {"state_dict_type": "SHARDED_STATE_DICT"}
    with pytest.raises(LoRAMError, match=r"final_state_dict_type: FULL.* found SHARDED"):
        check_sharding(run)
    run.fsdp_config["final_state_dict_type"] = "FULL_STATE_DICT"
    check_sharding(run)
    run.fsdp_version = None
    with pytest.raises(LoRAMError, match="fsdp_version: 2"):
        check_sharding(run)


def test_data_must_fill_a_step(run):
    rows = [{"input_ids": list(range(6))}] * 5
    check_one_step(run, rows[:4])
    with pytest.raises(LoRAMError, match="step of 4 × 8 tokens, found 18 tokens in 3 sequences"):
        check_one_step(run, rows[:3])
    run.world_size = 2
    with pytest.raises(LoRAMError, match="step of 8 × 8 tokens, found 30 tokens in 5 sequences"):
        check_one_step(run, rows)
    run.world_size, run.sample_packing = 1, True
    with pytest.raises(LoRAMError, match="found 30 tokens in 5"):
        check_one_step(run, rows)
    check_one_step(run, rows + rows[:1])


def test_a_checkpoint_that_was_being_written_is_not_resumed_from(run, tmp_path):
    run.auto_resume_from_checkpoints = True
    folder = tmp_path / "out/training"
    for step in (2, 10, 12):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
    (folder / "checkpoint-12/model.safetensors").touch()
    with_record = SimpleNamespace(**vars(begin_alignment(run)))
    assert run.resume_from_checkpoint is None and not run.auto_resume_from_checkpoints
    run.output_dir, run.auto_resume_from_checkpoints = str(tmp_path / "out"), True
    for step in (2, 10):
        state = folder / f"checkpoint-{step}/trainer_state.json"
        state.write_text(json.dumps({"global_step": step}))
        Alignment(**vars(with_record)).write_record(folder / f"checkpoint-{step}", 1.5)
    begin_alignment(run)
    assert run.resume_from_checkpoint == str(folder / "checkpoint-10")


def test_losses_are_of_the_first_and_the_last_step():
    log = [{"step": step, "eval_loss": 5 - step} for step in (0, 2, 4)]
    assert heldout_losses(log, 4) == {"before": 5, "after": 1}
    assert heldout_losses(log, 3) is None and heldout_losses(log[1:], 4) is None
    assert heldout_losses([], 4) is None


def test_a_run_without_a_step_publishes_nothing(run):
    begun = begin_alignment(run)
    with pytest.raises(LoRAMError, match="at least one step of training, found none"):
        finish_alignment(begun)
    assert not begun.output.exists()


def test_the_published_recipe_is_accepted_by_axolotl():
    """And is the paper's: 128 sequences of 512 tokens in a step, on 8 GPUs."""
    settings = yaml.safe_load((ROOT / "examples/publish/align.yml").read_text(encoding="utf-8"))
    cfg = DictDefault(settings)
    check_supported(cfg)
    assert LoRAMConfig(**settings.pop("loram")).stage == "align"
    settings.pop("plugins")
    checked = AxolotlInputConfig(**settings)
    assert checked.micro_batch_size * checked.gradient_accumulation_steps * 8 == 128
    assert (checked.sequence_len, checked.learning_rate, checked.warmup_steps) == (512, 5e-5, 100)
    cfg.deepspeed = str(ROOT / cfg.deepspeed)
    check_sharding(DictDefault({**cfg, "batch_size": 128}))


def test_streams_are_mixed_in_equal_shares(text_file, make_model, tmp_path):
    """By Axolotl alone they would come one after the other, and without the held-out data."""
    streams = []
    for letter in "ab":
        file = tmp_path / f"{letter}.jsonl"
        file.write_text("\n".join(json.dumps({"text": letter * 60}) for _ in range(3000)))
        streams.append({"path": str(file), "ds_type": "json", "split": "train"})
    settings = {
        "base_model": str(make_model()),
        "streaming": True,
        "datasets": [{**stream, "type": "completion"} for stream in streams],
        "test_datasets": [
            {"path": str(text_file), "ds_type": "json", "split": "train", "type": "completion"}
        ],
        "dataset_prepared_path": str(tmp_path / "prepared"),
        "sequence_len": 64,
        "max_steps": 2,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "seed": 1,
        "bf16": False,
    }
    cfg = load_yaml(write_yaml(tmp_path / "align.yml", settings))
    data = training_data(cfg)
    first = [tuple(row["input_ids"][:-1]) for row in islice(data.train_dataset, 400)]
    assert len(set(first)) == 2
    assert all(150 < first.count(text) < 250 for text in set(first))
    assert first == [tuple(row["input_ids"][:-1]) for row in islice(data.train_dataset, 400)]
    assert label_tokens(data.eval_dataset) > 1000
    assert (
        cfg.accelerator_config.dispatch_batches is False
    )  # ranks read rows of any length themselves
    assert cfg.streaming and len(cfg.datasets) == 2
