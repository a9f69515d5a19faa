"""Distillation: the loss against torch's own, the teacher's outputs against the whole model."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from axolotl.utils.dict import DictDefault
from calibrated import load
from conftest import byte_tokenizer, run_command, write_yaml
from datasets import Dataset
from test_resume import Interruption
from torch.nn.functional import cross_entropy, kl_div
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from axolotl_loram.config import PruningArgs
from axolotl_loram.config_loram import LoRAMConfig
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.tensors import Checkpoint
from axolotl_loram.pruning.prune import prune
from axolotl_loram.training import teacher as teachers
from axolotl_loram.training.align import begin_alignment
from axolotl_loram.training.align_trainer import prepare_objective, seen
from axolotl_loram.training.distil import IGNORED, Targets, distillation_loss
from axolotl_loram.training.support import check_supported
from axolotl_loram.training.teacher import Teacher, make_teacher, most_likely

VOCABULARY = 50
ROWS = [list(range(3, 3 + length)) for length in (5, 9, 40, 17, 17, 3)]


def logits_and_targets(k, shape=(3, 7), seed=0):
    torch.manual_seed(seed)
    student = torch.randn(*shape, VOCABULARY) * 2
    teacher = torch.randn(*shape, VOCABULARY) * 2
    ids, logprobs, rest = most_likely(teacher.flatten(0, 1), k)
    targets = Targets(ids.long().view(*shape, k), logprobs.view(*shape, k), rest.view(shape))
    labels = torch.randint(VOCABULARY, shape)
    labels[0, 3:] = IGNORED
    return student.requires_grad_(), teacher, targets, labels


@pytest.mark.parametrize("chunk", [1024, 4])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_with_the_whole_vocabulary_it_is_torchs_divergence(chunk, share, monkeypatch):
    monkeypatch.setattr("axolotl_loram.training.distil.TOKENS_PER_CHUNK", chunk)
    student, teacher, targets, labels = logits_and_targets(VOCABULARY)
    counts = labels != IGNORED
    logprobs = student.log_softmax(-1)[counts]
    wanted = kl_div(logprobs, teacher.log_softmax(-1)[counts], log_target=True, reduction="sum")
    token = cross_entropy(student.flatten(0, 1), labels.flatten(), reduction="sum")
    wanted = (1 - share) * wanted + share * token
    found = distillation_loss(student, targets, labels, share)
    torch.testing.assert_close(found, wanted)
    expected, slope = (torch.autograd.grad(3 * loss, student)[0] for loss in (wanted, found))
    torch.testing.assert_close(slope, expected, atol=1e-5, rtol=1e-5)


def test_what_is_not_listed_counts_as_one_event():
    student, teacher, targets, labels = logits_and_targets(5)
    counts = labels != IGNORED
    p, q = teacher.softmax(-1), student.softmax(-1)
    listed = torch.zeros_like(p).scatter(-1, targets.ids, 1.0).bool()
    events = [
        torch.cat([x[listed].view(3, 7, 5), (x * ~listed).sum(-1, keepdim=True)], -1)[counts]
        for x in (p, q)
    ]
    wanted = (events[0] * (events[0] / events[1]).log()).sum()
    found = distillation_loss(student, targets, labels)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-5)
    expected, slope = (torch.autograd.grad(loss, student)[0] for loss in (wanted, found))
    torch.testing.assert_close(slope, expected, atol=1e-5, rtol=1e-4)
    assert not slope[labels == IGNORED].any() and slope[counts].any(-1).all()


def test_a_model_in_16_bits_holds_its_derivative_in_16_bits():
    student, _, targets, labels = logits_and_targets(5)
    half = student.detach().bfloat16().requires_grad_()
    loss = distillation_loss(half, targets, labels)
    assert [held.dtype for held in loss.grad_fn.saved_tensors] == [torch.bfloat16]
    (slope,) = torch.autograd.grad(loss, half)
    (exact,) = torch.autograd.grad(distillation_loss(student, targets, labels), student)
    assert loss.dtype == torch.float32 and slope.dtype == torch.bfloat16
    torch.testing.assert_close(slope.float(), exact, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_streamed_outputs_are_those_of_the_whole_model(family, make_model, tmp_path, monkeypatch):
    monkeypatch.setattr("axolotl_loram.training.rows.TOKENS_PER_PART", 40)  # several parts
    base = make_model(family)
    record = make_teacher(base, ROWS, tmp_path / "out", 8)
    assert len(record["files"]) > 1 and record["sequences"] == len(ROWS) - 1
    teacher, model = Teacher(tmp_path / "out"), load(base)
    for row in ROWS:
        said = teacher.targets(torch.tensor([row]))
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([row])).logits.log_softmax(-1)
        assert (logprobs.gather(-1, said.ids) - said.logprobs).abs().max() < 0.01  # 16 bits
        assert (logprobs.topk(8).values - said.logprobs).abs().max() < 0.01
        others = 1 - logprobs.topk(8).values.exp().sum(-1)
        torch.testing.assert_close(said.rest, others, atol=1e-5, rtol=1e-4)


def test_a_sequence_is_found_in_any_batch_and_padding(make_model, tmp_path):
    make_teacher(make_model(), ROWS, tmp_path / "out", 4)
    teacher = Teacher(tmp_path / "out")
    left = [0, 0, *ROWS[0], 0]
    batch = torch.tensor([ROWS[1], [*left, 2]])
    mask = torch.tensor([[1] * 9, [0, 0, 1, 1, 1, 1, 1, 0, 0]])
    said, alone = teacher.targets(batch, mask), teacher.targets(torch.tensor([ROWS[0]]))
    assert torch.equal(said.ids[1, 2:7], alone.ids[0])
    assert torch.equal(said.logprobs[1, 2:7], alone.logprobs[0])
    assert said.rest[1, [0, 1, 7, 8]].tolist() == [1] * 4
    with pytest.raises(LoRAMError, match=r"found one of 8 tokens, \[3, 4, 5, 6\] …, that is none"):
        teacher.targets(batch[:1, :8])
    labels = torch.full((2, 9), IGNORED)
    assert distillation_loss(torch.randn(2, 9, 264), said, labels) == 0


def test_interrupted_the_teacher_goes_on(make_model, tmp_path, monkeypatch):
    monkeypatch.setattr("axolotl_loram.training.rows.TOKENS_PER_PART", 40)
    whole = Interruption()
    make_teacher(make_model(), ROWS, tmp_path / "a", 4, progress=whole)
    loads = []
    original = teachers.LayerStream.layer
    monkeypatch.setattr(
        teachers.LayerStream, "layer", lambda s, i: (loads.append(i), original(s, i))[1]
    )
    with pytest.raises(KeyboardInterrupt):
        progress = Interruption(whole.reports * 2 // 3)
        make_teacher(make_model(), ROWS, tmp_path / "b", 4, progress=progress)
    before = len(loads)
    assert not (tmp_path / "b").exists()
    make_teacher(make_model(), ROWS, tmp_path / "b", 4)
    parts = len(json.loads((tmp_path / "a/teacher.json").read_text())["files"])
    assert before > 4 and len(loads) <= 4 * parts + 1
    files = [
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in "ab"
    ]
    assert files[0] == files[1] and len(files[0]) == parts + 1


def test_in_a_run_under_zero3_the_teacher_is_not_dealt_out_to_the_ranks(make_model, tmp_path):
    from transformers.integrations import deepspeed

    class Zero3:
        config: dict = {}

        def is_zero3(self):
            raise AssertionError("a model is built under ZeRO-3")

    running = Zero3()
    deepspeed.set_hf_deepspeed_config(running)
    try:
        make_teacher(make_model(), ROWS, tmp_path / "out", 4)
        assert deepspeed._hf_deepspeed_config_weak_ref() is running
    finally:
        deepspeed.unset_hf_deepspeed_config()


def test_tokens_that_the_teacher_lacks_are_said(make_model, tmp_path):
    with pytest.raises(LoRAMError, match="vocabulary of 264, found 264: use the teacher's own"):
        make_teacher(make_model(), [[1, 264]], tmp_path / "out")
    with pytest.raises(LoRAMError, match="found none: give some data"):
        make_teacher(make_model(), [], tmp_path / "out")


def test_a_full_disk_is_said_before_the_work(make_model, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(teachers.LayerStream, "layer", None)
    with pytest.raises(
        LoRAMError,
        match=r"GiB free for .*/out and the work on it, found 9.31e-07 GiB .*: give fewer tok",
    ):
        make_teacher(make_model(), ROWS, tmp_path / "out")


@pytest.fixture
def alignment(make_model, tmp_path):
    """An alignment by distillation that has begun, and a trainer for it."""
    prune(str(make_model()), tmp_path / "pruned", PruningArgs(ratio=0.5))
    section = {
        "stage": "align",
        "objective": "distillation",
        "cache_dir": str(tmp_path / "cache"),
        "teacher_top_k": 264,
    }
    settings = {
        "loram": section,
        "base_model": str(tmp_path / "pruned"),
        "output_dir": str(tmp_path / "out"),
        "datasets": [{"path": "text"}],
        "learning_rate": 0.01,
    }
    run = begin_alignment(DictDefault(settings))
    rows = [{"input_ids": row, "labels": row, "attention_mask": [1] * len(row)} for row in ROWS]
    arguments = TrainingArguments(
        run.trained,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        max_steps=15,
        learning_rate=0.01,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    tokenizer = byte_tokenizer()
    trainer = Trainer(
        load(run.pruned),
        arguments,
        DataCollatorForSeq2Seq(tokenizer),
        Dataset.from_list(rows),
        Dataset.from_list(rows[:2]),
        processing_class=tokenizer,
    )
    return run, trainer


def test_the_trainer_minimizes_the_divergence(alignment, make_model, monkeypatch):
    run, trainer = alignment
    base, start = load(make_model()), divergence(trainer.model, load(make_model()), ROWS)
    losses = trainer.evaluate()["eval_loss"]
    prepare_objective(run, trainer)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses, rel=1e-5)  # as it was
    trainer.train()
    assert divergence(trainer.model, base, ROWS) < 0.5 * start
    assert run.outcome["objective"] == "distillation"
    found = {"id": str(make_model()), "revision": None, "top_k": 264, "next_token_share": 0.0}
    assert run.outcome["teacher"] == found
    monkeypatch.setattr("axolotl_loram.training.teacher.make_teacher", None)  # it is there already
    prepare_objective(run, trainer)


def test_the_trainers_loss_is_the_mean_divergence(alignment, make_model):
    """Of the base itself 0; of others the mean over the tokens, however they are batched."""
    run, trainer = alignment
    prepare_objective(run, trainer)
    collate = trainer.data_collator
    batch = collate([trainer.train_dataset[index] for index in (1, 2)])

    def loss(model, **given):
        return trainer.compute_loss(model.train(), dict(batch), **given)

    base, model = load(make_model()), trainer.model
    assert loss(base).abs() < 1e-4
    tokens = len(ROWS[1]) + len(ROWS[2]) - 2
    torch.testing.assert_close(loss(model), loss(model, num_items_in_batch=2 * tokens) * 2)
    with torch.no_grad():
        total = torch.zeros(())
        for row in ROWS[1:3]:
            logprobs = [
                m(input_ids=torch.tensor([row])).logits.log_softmax(-1) for m in (model, base)
            ]
            total += kl_div(
                logprobs[0][:, :-1], logprobs[1][:, :-1], log_target=True, reduction="sum"
            )
    torch.testing.assert_close(loss(model), total / tokens, atol=1e-3, rtol=1e-3)


def test_another_teacher_than_the_base_is_refused(alignment, make_model):
    run, trainer = alignment
    section = run.section.model_copy(update={"teacher_path": str(make_model(seed=1))})
    with pytest.raises(LoRAMError, match="it is another model, such as a fine-tuned one"):
        prepare_objective(replace(run, section=section), trainer)


def test_of_a_stream_only_what_the_run_will_see_is_read():
    read = []

    class Stream:
        def __iter__(self):
            for number in itertools.count():
                read.append(number)
                yield {"input_ids": [5, 6, number, 0], "attention_mask": [1, 1, 1, 0]}

    settings = {"max_steps": 3, "train_batch_size": 2, "gradient_accumulation_steps": 2}
    arguments = SimpleNamespace(**settings, world_size=1)
    rows = list(seen(SimpleNamespace(args=arguments, train_dataset=Stream())))
    assert [row.tolist() for row in rows] == [[5, 6, number] for number in range(12)]
    assert read == list(range(12))


def test_what_does_not_go_with_distillation_is_said(monkeypatch):
    def check(**changes):
        section = {"stage": "align", "objective": "distillation"}
        check_supported(DictDefault({"loram": section, **changes}))

    check()
    with pytest.raises(LoRAMError, match="no `sample_packing` with `objective: distillation`"):
        check(sample_packing=True)
    with pytest.raises(LoRAMError, match="context_parallel_size 1"):
        check(context_parallel_size=2)
    check(streaming=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    check()
    with pytest.raises(LoRAMError, match="found 2 processes, each with its own part"):
        check(streaming=True)
    with pytest.raises(ValueError, match="no teacher_path with `objective: next-token`"):
        LoRAMConfig(stage="align", teacher_path="base")
    with pytest.raises(ValueError, match="no objective with `stage: train`"):
        LoRAMConfig(pruned_model_path="pruned", objective="distillation")


@pytest.mark.slow
def test_axolotl_train_distils(make_model, settings, tmp_path):
    """The real command: the pruned model comes nearer to what the base says."""
    base = make_model()
    prune(str(base), tmp_path / "pruned", PruningArgs(ratio=0.5))
    section = {"stage": "align", "objective": "distillation", "cache_dir": str(tmp_path / "cache")}
    changes = {"adapter": None, "lora_target_linear": None, "max_steps": 12}
    config = {k: v for k, v in settings(tmp_path / "pruned", **changes).items() if v is not None}
    file = write_yaml(tmp_path / "align.yml", {**config, "loram": section})
    run_command("axolotl", "train", file, "--launcher", "python")
    record = json.loads((tmp_path / "out/loram.json").read_text())["alignments"][0]
    assert record["objective"] == "distillation" and record["teacher"]["id"] == str(base)
    assert record["teacher"]["top_k"] == 32 and record["steps"] == 12
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert Checkpoint(tmp_path / "out").fingerprint() != Checkpoint(base).fingerprint()
    lines = Path(config["datasets"][0]["path"]).read_text(encoding="utf-8").splitlines()
    tokenizer = byte_tokenizer()
    rows = [tokenizer(json.loads(line)["text"])["input_ids"][:60] for line in lines[:8]]
    nearness = [divergence(load(tmp_path / name), load(base), rows) for name in ("pruned", "out")]
    assert nearness[1] < 0.9 * nearness[0] and Teacher(folder).record["top_k"] == 32


@torch.no_grad()
def divergence(model, base, rows):
    total = 0.0
    for row in rows:
        tokens = torch.tensor([row])
        own, wanted = (m(input_ids=tokens).logits.log_softmax(-1) for m in (model, base))
        total += kl_div(own, wanted, log_target=True, reduction="batchmean").item()
    return total
