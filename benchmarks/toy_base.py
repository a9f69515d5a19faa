"""Train the toy base model: a tokenizer and a small Llama that has read Python source.

It stands in for the large model one would download: good enough at Python that pruning costs
something and a LoRA gains something, small enough to train in minutes on two CPU cores.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from tqdm import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

KEY_FILE = "toy.json"
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"


@dataclass(frozen=True)
class Settings:
    """All that decides the weights, apart from the text."""

    vocabulary: int = 2048
    hidden: int = 128
    intermediate: int = 344
    layers: int = 12
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 16
    steps: int = 1000
    batch: int = 4
    length: int = 128
    warmup: int = 60
    learning_rate: float = 4e-3
    weight_decay: float = 0.1
    seed: int = 0


def build(pretrain: Path, folder: Path, settings: Settings = Settings()) -> bool:
    """Train on the `text` rows of `pretrain` and save to `folder`; return whether it trained.

    Nothing is done if the folder already holds a model of the same settings and text. The model
    is saved under another name and renamed, so that a folder that exists is complete.
    """
    key = {"settings": asdict(settings), "text": hashlib.sha256(pretrain.read_bytes()).hexdigest()}
    if _stored_key(folder) == key:
        return False
    texts = [json.loads(line)["text"] for line in pretrain.read_text("utf-8").splitlines()]
    tokenizer = _train_tokenizer(texts, settings)
    torch.manual_seed(settings.seed)
    model = _new_model(tokenizer, settings)
    train_model(model, _token_stream(texts, tokenizer), settings)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / KEY_FILE).write_text(json.dumps(key, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return True


def _stored_key(folder: Path) -> dict | None:
    """Return the key of the model in `folder`, None if there is none."""
    path = folder / KEY_FILE
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def _train_tokenizer(texts: list[str], settings: Settings) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which can spell any text."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        texts, settings.vocabulary, special_tokens=[BOS, EOS, PAD], show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def _token_stream(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Return the token ids of all texts in one row, each text between bos and eos."""
    tokens = [tokenizer(BOS + text + EOS, add_special_tokens=False)["input_ids"] for text in texts]
    return torch.tensor([token for text in tokens for token in text])


def train_model(model: PreTrainedModel, stream: torch.Tensor, settings: Settings) -> None:
    """Train a new model in float32 on random windows of the stream."""
    model.train()
    optimizer, schedule = _optimizer(model, settings)
    with tqdm(total=settings.steps, desc="base model", unit="step") as progress:
        for tokens in _batches(stream, settings):
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            progress.update()
    model.eval()


def _optimizer(
    model: PreTrainedModel, settings: Settings
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return AdamW with a short warm-up and a cosine decay over all steps."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=settings.weight_decay,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        settings.learning_rate,
        total_steps=settings.steps,
        pct_start=settings.warmup / settings.steps,
        cycle_momentum=False,
    )
    return optimizer, schedule


def _new_model(tokenizer: PreTrainedTokenizerFast, settings: Settings) -> LlamaForCausalLM:
    """Return a Llama with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden,
            intermediate_size=settings.intermediate,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.kv_heads,
            head_dim=settings.head_dim,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _batches(stream: torch.Tensor, settings: Settings) -> Iterator[torch.Tensor]:
    """Yield `steps` batches of random windows, int64 [batch, length]."""
    offsets = torch.arange(settings.length)
    for _ in range(settings.steps):
        starts = torch.randint(len(stream) - settings.length, (settings.batch, 1))
        yield stream[starts + offsets]


if __name__ == "__main__":
    build(Path("build/toy/data/pretrain.jsonl"), Path("build/toy/base"))
