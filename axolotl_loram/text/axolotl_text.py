"""The training data of an Axolotl config, tokenized by Axolotl itself (axolotl 0.19).

A cfg is one that Axolotl validated, as from `load_yaml` or inside `axolotl train`; but for
`training_data`, it is left as it is.
"""

from __future__ import annotations

import copy
import os
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from axolotl_loram.config import ADAPTERS
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.untrusted import read_yaml

IDS = ("input_ids", "chosen_input_ids", "chosen_ids")
"""What Axolotl calls a row's token ids; the last two in preference data."""
PREFERRED = ("chosen", "completion")
"""What it calls the answer of preference data that the trainer tokenizes."""
MESSAGES = ("messages", "conversations")
TURN = {"role": "from", "content": "value"}
SPEAKERS = {"human": "user", "gpt": "assistant"}
"""Rows with images are of messages, or older ones of turns (axolotl.processing_strategies)."""
SHUFFLE_BUFFER = 1000
"""Rows of streamed data that the next one is drawn from."""


def load_yaml(path: Path) -> Any:
    """An Axolotl config as `axolotl train` would see it, as far as its data goes.

    Not by `load_cfg`, which sets its process up for a run: inside `axolotl train` it would register
    a new plugin in place of the running one, change the environment, and empty debug.log.

    Raises:
        LoRAMError: No such file, not YAML, no datasets in it, or Axolotl refuses it.
    """
    settings = read_yaml(path)
    if not (settings.get("datasets") or settings.get("pretraining_dataset")):
        raise LoRAMError(
            f"expected an Axolotl YAML with `datasets:` for calibration, found none in {path}: add "
            "them, or name a text file"
        )
    # Plugins shape training, not tokens; only ours knows these adapters.
    settings = {k: v for k, v in settings.items() if k not in ("plugins", "loram")}
    named = settings.get("adapter")
    settings["adapter"] = ADAPTERS.get(str(named), named)
    settings["tf32"] = False  # Axolotl would switch it on for this whole process
    with _as_a_library():
        from axolotl.utils.config import normalize_cfg_datasets, normalize_config, validate_config
        from axolotl.utils.dict import DictDefault

        try:
            cfg = validate_config(DictDefault(settings))
            normalize_config(cfg)
        except Exception as error:  # its validators raise what they like
            raise LoRAMError(
                f"expected a YAML that Axolotl accepts, found {path} refused ({one_line(error)}): "
                "try `axolotl preprocess` on it"
            ) from error
        normalize_cfg_datasets(cfg)
    return cfg


def vocabulary(cfg: Any) -> dict[str, int]:
    """Token → id, of the tokenizer that Axolotl gives this config.

    Raises:
        LoRAMError: It gives none.
    """
    return tokenizer_of(cfg).get_vocab()


def tokenizer_of(cfg: Any) -> Any:
    """The tokenizer that Axolotl gives a config.

    Raises:
        LoRAMError: It gives none.
    """
    with _as_a_library():
        from axolotl.loaders import load_tokenizer

        try:
            return load_tokenizer(copy.deepcopy(cfg))
        except Exception as error:  # transformers', or Axolotl's about its own settings
            raise LoRAMError(
                f"expected a tokenizer that Axolotl can load, found {cfg.tokenizer_config} refused "
                f"({one_line(error)}): try `axolotl preprocess`"
            ) from error


def token_rows(cfg: Any, seed: int = 0) -> Iterator[list[int]]:
    """Token ids of the training rows, without the validation split, in an order drawn by seed.

    Of preference data they are the prompt's with the answer that is preferred; of messages with
    images, which the trainer's collator tokenizes, those of the text alone.

    What Axolotl prepares for it stays in `dataset_prepared_path`, where training finds it. Plugins'
    `load_datasets` is called by Axolotl's commands, not by its function of that name that is used
    here, so the LoRAM plugin may be the caller. Nothing is loaded, and no error raised, before the
    first row is asked for.

    Raises:
        LoRAMError: Axolotl cannot load the data, or makes no token ids of it.
    """
    tokenizer = tokenizer_of(cfg) if _trainer_tokenizes(cfg) else None
    for row in _rows(cfg, seed):
        found = next((name for name in IDS if name in row), None)
        text = None if found or not tokenizer else _text_of(row, tokenizer, cfg)
        if tokenizer and text is not None:
            yield tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            continue
        if found is None:
            raise LoRAMError(
                "expected training data that Axolotl tokenizes, found rows of "
                f"{', '.join(map(str, row))}: name a text file as calibration"
            )
        ids = np.asarray(row[found])
        # Streamed rows come padded. In preference data the mask may be the other answer's.
        mask = row.get("attention_mask") if found == "input_ids" else None
        yield (ids if mask is None else ids[np.asarray(mask) != 0]).tolist()


def _trainer_tokenizes(cfg: Any) -> str | None:
    """The setting by which it is not Axolotl's preparation that does it, if there is one."""
    if cfg.rl:
        return f"rl: {rl_of(cfg)}"
    return f"processor_type: {cfg.processor_type}" if cfg.processor_type else None


def rl_of(cfg: Any) -> str:
    """The preference loss as a YAML calls it: Axolotl makes an enumeration of it."""
    return str(getattr(cfg.rl, "value", cfg.rl))


def _text_of(row: dict[str, Any], tokenizer: Any, cfg: Any) -> str | None:
    """Text of a row that the trainer tokenizes: messages, or a prompt with its preferred answer."""
    fields = [data.get("field_messages") for data in cfg.datasets or () if cfg.processor_type]
    messages = next((row[name] for name in (*fields, *MESSAGES) if name and row.get(name)), None)
    if cfg.processor_type and messages:
        return tokenizer.apply_chat_template(list(map(_without_images, messages)), tokenize=False)
    answer = next((row[name] for name in PREFERRED if row.get(name)), None)
    parts = [part for part in (row.get("prompt"), answer) if part]
    if parts and all(isinstance(part, list) for part in parts):
        messages = [message for part in parts for message in part]
        return tokenizer.apply_chat_template(messages, tokenize=False)
    return "".join(parts) if parts and all(isinstance(part, str) for part in parts) else None


def _without_images(message: dict[str, Any]) -> dict[str, Any]:
    """A message, or a turn of ShareGPT's, as templates of models with several parts want it."""
    role, content = (message.get(name) or message.get(old) for name, old in TURN.items())
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [{"type": "text", "text": part["text"]} for part in parts if part.get("text")]
    return {"role": SPEAKERS.get(str(role), role), "content": texts}


def heldout_rows(cfg: Any) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of the rows that training does not see, in Axolotl's order.

    They are the run's `test_datasets`, or else its share `val_set_size` of the data, split off with
    its seed as in training. A label of -100 does not count.

    Raises:
        LoRAMError: The run holds no data out, or Axolotl cannot load it.
    """
    if named := _trainer_tokenizes(cfg):
        raise LoRAMError(
            f"expected held-out data that Axolotl tokenizes, found {named}, where the trainer does "
            "it: name a text file as held-out text"
        )
    with _loading():
        data = _load(cfg).eval_dataset
    if not data:
        raise LoRAMError(
            "expected held-out data in the YAML, found neither test_datasets nor val_set_size: add "
            "one of them, or name a file with --in-domain"
        )
    return [(row["input_ids"], row["labels"]) for row in data]


def prepared_rows(cfg: Any) -> Iterator[dict[str, Any]]:
    """All rows of a run as Axolotl prepares them, those that it holds out at the end.

    Raises:
        LoRAMError: Axolotl cannot load the data.
    """
    with _loading():
        data = _load(cfg)
        yield from data.train_dataset
        yield from data.eval_dataset or ()


def _rows(cfg: Any, seed: int) -> Iterator[dict[str, Any]]:
    """The rows of the training split as Axolotl prepares them."""
    from datasets import IterableDataset

    with _loading():
        data = _load(cfg).train_dataset
        if isinstance(data, IterableDataset):
            yield from data.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        else:  # not data.shuffle, which would leave a file among the prepared data
            for index in np.random.default_rng(seed).permutation(len(data)):
                yield data[int(index)]


def _load(cfg: Any) -> Any:
    """The training and the held-out rows as Axolotl prepares them."""
    cfg = copy.deepcopy(cfg)  # Axolotl notes totals in it, and streaming changes the batch size
    cfg.accelerator_config = None  # with dispatch_batches, other ranks get a placeholder text
    with _as_a_library():
        from axolotl.common.datasets import load_datasets, load_preference_datasets

        return load_preference_datasets(cfg=cfg) if cfg.rl else load_datasets(cfg=cfg)


@contextmanager
def _loading() -> Iterator[None]:
    """Turn whatever the user's data makes a prompt strategy raise into one sentence."""
    try:
        yield
    except LoRAMError:
        raise
    except Exception as error:
        raise LoRAMError(
            "expected datasets that Axolotl can load, found it failing "
            f"({type(error).__name__}: {one_line(error)}): try `axolotl preprocess`"
        ) from error


def training_data(cfg: Any) -> Any:
    """The data of a run, inside `axolotl train`: what Axolotl prepares, and two things more.

    Of several streamed `datasets`, axolotl 0.19 reads one after the other, so that a short run
    would see the first alone: here they are mixed, row by row, in equal shares. And it leaves
    `test_datasets` out beside streamed `datasets`.
    """
    from axolotl.common.datasets import load_datasets

    streamed = bool(cfg.streaming or cfg.pretraining_dataset)
    if streamed and cfg.accelerator_config is None:  # rows of any length: each rank reads its own
        cfg.accelerator_config = type(cfg)(split_batches=False, dispatch_batches=False)
    if not streamed or cfg.pretraining_dataset or cfg.sample_packing:
        return load_datasets(cfg=cfg)
    meta = load_datasets(cfg=_with(cfg, datasets=cfg.datasets[:1]))
    if len(cfg.datasets) > 1:
        from datasets import interleave_datasets

        rest = [load_datasets(cfg=_with(cfg, datasets=[named])) for named in cfg.datasets[1:]]
        streams = [meta.train_dataset, *(each.train_dataset for each in rest)]
        meta.train_dataset = interleave_datasets(
            streams, [1 / len(streams)] * len(streams), cfg.seed
        )
    if cfg.test_datasets:
        held_out = _with(cfg, streaming=False, datasets=cfg.test_datasets, test_datasets=None)
        meta.eval_dataset = load_datasets(cfg=held_out).train_dataset
    return meta


def _with(cfg: Any, **changes: Any) -> Any:
    changed = copy.deepcopy(cfg)
    for name, value in changes.items():
        changed[name] = value
    return changed


@contextmanager
def _as_a_library() -> Iterator[None]:
    """Keep Axolotl's log off standard output, and have it prepare data as its `preprocess` does.

    When first imported, Axolotl sets logging up on what is standard output then, which belongs to
    our caller. Preparing only, it does not go on to count steps, for which each rank waits for all
    others: here one may be alone, the others waiting for what it makes.
    """
    before = os.environ.get("AXOLOTL_IS_PREPROCESS")
    os.environ["AXOLOTL_IS_PREPROCESS"] = "1"
    try:
        with redirect_stdout(sys.stderr):
            import axolotl.cli  # noqa: F401  (sets logging up)

            yield
    finally:
        del os.environ["AXOLOTL_IS_PREPROCESS"]
        if before is not None:
            os.environ["AXOLOTL_IS_PREPROCESS"] = before


def one_line(error: BaseException) -> str:
    """What an error says, on one line and not endless."""
    return textwrap.shorten(str(error), 300, placeholder=" …") or repr(error)
