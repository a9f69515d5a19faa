"""Rows as Axolotl prepares them, in its batches, and what of a trainer the anchor looks at."""

from types import SimpleNamespace

import numpy as np
import torch
from axolotl.utils.collators import V2BatchSamplerDataCollatorForSeq2Seq
from calibrated import load
from conftest import byte_tokenizer
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq

from axolotl_loram.training.distil import IGNORED


def labelled(*lengths, seed=0):
    """Rows as Axolotl prepares them: of each, what comes after the first third is trained."""
    draw = np.random.default_rng(seed)
    rows = []
    for length in lengths:
        ids = draw.integers(3, 250, length).tolist()
        labels = [IGNORED] * (length // 3) + ids[length // 3 :]
        positions = list(range(length))
        row = {"input_ids": ids, "labels": labels, "attention_mask": [1] * length}
        rows.append({**row, "position_ids": positions})
    return rows


ROWS = labelled(9, 30, 17, 6)


def padded(rows, side="right"):
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = side
    rows = [{name: row[name] for name in row if name != "position_ids"} for row in rows]
    return dict(DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=16)(rows))


def packed(rows):
    """As Axolotl packs them: two to a row, with the attention that keeps them apart."""
    collate = V2BatchSamplerDataCollatorForSeq2Seq(byte_tokenizer(), pad_to_multiple_of=64)
    batch = dict(collate([[dict(row) for row in rows[:2]], [dict(row) for row in rows[2:]]]))
    del batch["attention_mask"]  # transformers tells the rows apart by their positions
    return batch


BATCHES = {
    "padded": lambda: padded(ROWS),
    "padded on the left": lambda: padded(ROWS, "left"),
    "in another order": lambda: padded(ROWS[::-1]),
    "packed": lambda: packed(ROWS),
}


def trainer_of(model):
    """What of a trainer the anchor looks at."""

    def compute_loss(model, inputs):
        labels = inputs.pop("labels")
        return trainer.compute_loss_func(model(**inputs), labels)

    accelerator = SimpleNamespace(unwrap_model=lambda model: model)
    trainer = SimpleNamespace(accelerator=accelerator, compute_loss=compute_loss)
    return trainer


def with_lora(pruned, **settings):
    model = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float, **settings)
    model.config.use_cache = False  # as in training; with a cache, packed rows would not be told
    return get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))


def mean_loss(base, rows):
    """The base's loss over all trained tokens of the rows, each row alone."""
    model, total, tokens = load(base), 0.0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        total += cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED).item()
        tokens += int((labels != IGNORED).sum())
    return total / tokens
