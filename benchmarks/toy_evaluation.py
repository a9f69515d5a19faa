"""Measure the toy models on held-out functions."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORED = -100  # the label of a token that does not count
BATCH = 32


def heldout_perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, jsonl: Path
) -> float:
    """Return exp of the mean loss over the labelled tokens of all rows, the prompts left out."""
    rows = sorted((_encode(tokenizer, row) for row in _rows(jsonl)), key=lambda row: len(row[0]))
    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for tokens, mask, labels in _batches(rows, tokenizer.pad_token_id):
            logits = model(input_ids=tokens, attention_mask=mask).logits[:, :-1].float()
            total += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
            ).item()
            count += int((labels[:, 1:] != IGNORED).sum())
    return math.exp(total / count)


def _rows(jsonl: Path) -> list[dict]:
    """Read the rows of a file."""
    return [json.loads(line) for line in jsonl.read_text("utf-8").splitlines()]


def _encode(tokenizer: PreTrainedTokenizerBase, row: dict) -> tuple[list[int], list[int]]:
    """Return the token ids and labels of a row, as Axolotl's `input_output` makes them."""
    tokens, labels = [], []
    for segment in row["segments"]:
        ids = tokenizer(segment["text"], add_special_tokens=False)["input_ids"]
        tokens += ids
        labels += ids if segment["label"] else [IGNORED] * len(ids)
    return tokens, labels


def _batches(
    rows: list[tuple[list[int], list[int]]], padding: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield token ids, attention mask and labels, each int64 [rows, longest], padded right."""
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        longest = max(len(tokens) for tokens, _ in batch)
        shape = (len(batch), longest)
        tokens, labels = torch.full(shape, padding), torch.full(shape, IGNORED)
        mask = torch.zeros(shape, dtype=torch.int64)
        for index, (ids, targets) in enumerate(batch):
            tokens[index, : len(ids)] = torch.tensor(ids)
            labels[index, : len(ids)] = torch.tensor(targets)
            mask[index, : len(ids)] = 1
        yield tokens, mask, labels
