"""What the trainer of an alignment measures, and what it trains."""

from pathlib import Path

import pytest
import torch
from axolotl.utils.dict import DictDefault
from datasets import Dataset
from test_align import pruned, run  # noqa: F401  (fixtures)
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

import axolotl_loram.heterogeneous  # noqa: F401
from axolotl_loram.architecture.record import Record
from axolotl_loram.config import PruningArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.tensors import Checkpoint
from axolotl_loram.pruning.prune import prune
from axolotl_loram.training.align import (
    begin_alignment,
    finish_alignment,
)
from axolotl_loram.training.align_trainer import prepare_trainer


def rows_of(lengths):
    """Rows of tokens; as Axolotl's sample packing has them, the second half of each is a sample."""
    ids = [[(7 * i + j) % 250 + 3 for j in range(n)] for i, n in enumerate(lengths)]
    masks = [[1] * (n // 2) + [2] * (n - n // 2) for n in lengths]
    return Dataset.from_dict({"input_ids": ids, "attention_mask": masks, "labels": ids})


def make_trainer(begun, cfg, lengths=(8, 6, 8, 8, 4, 8, 8, 8), max_steps=3):
    arguments = TrainingArguments(
        begun.trained,
        per_device_train_batch_size=2,
        max_steps=max_steps,
        save_steps=1,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        warmup_steps=2,
        report_to=[],
        use_cpu=True,
        seed=1,
        logging_steps=1,
        disable_tqdm=True,
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(begun.pruned)
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(begun.pruned),
        arguments,
        DataCollatorForSeq2Seq(tokenizer),
        rows_of(lengths),
        rows_of([8, 8, 5]),
        processing_class=tokenizer,
    )
    prepare_trainer(begun, cfg, trainer)
    return trainer


def test_what_the_trainer_measures(run, pruned, tmp_path):
    """Loss before and after, tokens without padding, and the same after a resume, once."""
    begun = begin_alignment(run)
    trainer = make_trainer(begun, run)
    model = AutoModelForCausalLM.from_pretrained(pruned)
    head = model.lm_head.weight.detach().clone()
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    whole = dict(begun.outcome)
    assert whole["heldout_loss"]["before"] == pytest.approx(before, rel=1e-6)
    assert whole["heldout_loss"]["after"] == pytest.approx(trainer.evaluate()["eval_loss"])
    assert whole["heldout_loss"]["tokens"] == 21 and whole["trained"]["lm_head"] is False
    assert whole["steps"] == 3 and 38 <= whole["tokens"] <= 48 and whole["warmup_steps"] == 2
    batches = trainer.callback_handler.train_dataloader
    assert whole["tokens"] == sum(len(ids[ids != 2]) for ids in seen(batches, steps=3))
    assert torch.equal(trainer.model.lm_head.weight, head)

    for checkpoint in (1, 3):  # in the middle, and where nothing is left but to publish
        cfg = DictDefault({**run, "base_model": str(pruned), "output_dir": str(tmp_path / "out")})
        cfg.resume_from_checkpoint = str(tmp_path / f"out/training/checkpoint-{checkpoint}")
        again = begin_alignment(cfg)
        resumed = make_trainer(again, cfg)
        resumed.train(resume_from_checkpoint=cfg.resume_from_checkpoint)
        for key in ("steps", "tokens", "heldout_loss"):
            assert again.outcome[key] == pytest.approx(whole[key]), (checkpoint, key)
        before = Record.load(Path(cfg.resume_from_checkpoint)).seconds
        assert again.outcome["seconds"] >= round(before, 1)
        for name, weight in trainer.model.state_dict().items():
            torch.testing.assert_close(resumed.model.state_dict()[name], weight)

    resumed.save_model(again.trained)
    finish_alignment(again)
    assert Record.load(tmp_path / "out").alignments[-1]["tokens"] == whole["tokens"]
    assert Checkpoint(tmp_path / "out").fingerprint() != begun.fingerprint


def seen(batches, steps):
    batches.set_epoch(0)
    return [
        ids for _, batch in zip(range(steps), batches, strict=False) for ids in batch["input_ids"]
    ]


def test_the_lm_head_and_the_vocabulary(run, make_model, tmp_path):
    """Tied to the embedding, neither is trained unless asked for; a resized one is refused."""
    tied = make_model(tie_word_embeddings=True)
    prune(str(tied), tmp_path / "tied", PruningArgs(ratio=0.5))
    for train_lm_head in (False, True):
        cfg = DictDefault({**run, "base_model": str(tmp_path / "tied")})
        cfg.loram = {"stage": "align", "train_lm_head": train_lm_head}
        begun = begin_alignment(cfg)
        make_trainer(begun, cfg)
        trained = {"lm_head": train_lm_head, "embedding": train_lm_head}
        assert begun.outcome["trained"] == trained
        assert ("model.embed_tokens.weight" in begun.frozen) is not train_lm_head
    trainer = make_trainer(begun, cfg)
    trainer.model.resize_token_embeddings(300)
    with pytest.raises(LoRAMError, match=r"vocabulary of the pruned model .* found 300"):
        prepare_trainer(begun, cfg, trainer)
