"""A run that has nothing to learn is told so before its first step."""

from types import SimpleNamespace

import pytest
from conftest import byte_tokenizer
from transformers import DataCollatorForSeq2Seq

from axolotl_loram.training import labels
from axolotl_loram.training.labels import warn_of_masked_labels

NONE, FIRST, LAST = [-100] * 4, [7, -100, -100, -100], [-100, -100, -100, 7]


@pytest.mark.parametrize(
    ("rows", "warns"),
    [([NONE], True), ([FIRST, NONE], True), ([NONE, LAST], False), ([], False)],
    ids=["none", "the first, before which nothing is", "one", "no rows"],
)
def test_masked_labels_are_said(rows, warns, monkeypatch):
    said = []
    monkeypatch.setattr(labels.LOG, "warning", lambda text, *values: said.append(text % values))
    data = [{"input_ids": [3, 4, 5, 7], "labels": row} for row in rows]
    collator = DataCollatorForSeq2Seq(byte_tokenizer())
    warn_of_masked_labels(SimpleNamespace(train_dataset=data, data_collator=collator))
    assert len(said) == warns and all(f"all {len(rows)} rows are masked" in text for text in said)
