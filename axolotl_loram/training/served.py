"""What a served base says of a run's rows, asked of a server that knows `prompt_logprobs`.

vLLM's OpenAI-compatible server does: to a prompt of token ids it answers with the most likely
tokens of each place and the prompt's own (`--max-logprobs 32`, since it gives 20 by itself).
llama.cpp's gives log-probabilities of generated tokens only, and cannot be asked.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import torch

from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.atomic import write_json
from axolotl_loram.files.progress import Progress, no_progress
from axolotl_loram.files.resumable import check_free, resumable
from axolotl_loram.memory.data import place_bytes
from axolotl_loram.training.teacher import (
    TEACHER_FILE,
    Row,
    described,
    distinct,
    write_outputs,
)

AT_ONCE = 16
"""Requests under way: the server batches them."""
ROWS_PER_FILE = 256
PATIENCE = (1, 5, 25)
"""Seconds to wait before a request is made again."""
SECONDS = 600
"""In which a server answers."""
ALIKE = 0.95
"""Share of some rows' tokens that both tokenizers decode to the same text."""
CLOSE = 0.1
"""Mean nats by which rows that are computed here may differ: kernels and 16 bits, not a model."""


@dataclass(frozen=True)
class Server:
    """A server.

    Attributes:
        url: Up to and with `/v1`.
        model: What it calls the base.
    """

    url: str
    model: str

    def said(self, row: Row, top_k: int) -> list[dict[int, float]]:
        """Of each of the row's places: the likeliest tokens and its own, nats by token.

        Raises:
            LoRAMError: The server refuses, or answers otherwise.
            ConnectionError: It does not answer, also after some patience.
        """
        told = self._told(row, top_k)
        found = [{token: nats for token, (nats, _) in told[i + 1].items()} for i in row.places]
        for place, nats in zip(row.places, found, strict=True):
            if int(row.tokens[place + 1]) not in nats or len(nats) < top_k:
                raise LoRAMError(
                    f"expected {top_k} tokens and the prompt's own at each place from {self.url}, "
                    f"found {len(nats)}: serve it by vLLM with --max-logprobs {top_k}"
                )
        return found

    def texts(self, row: Row) -> list[str | None]:
        """The row's tokens as the server decodes them, from the second on."""
        told = self._told(row, 1)[1:]
        return [each[int(own)][1] for own, each in zip(row.tokens[1:], told, strict=True)]

    def _told(self, row: Row, top_k: int) -> list[dict[int, tuple[float, str | None]]]:
        """Of each of the prompt's tokens: nats and text by token; of the first, nothing."""
        question = {"model": self.model, "prompt": row.tokens.tolist(), "prompt_logprobs": top_k}
        answer = self._ask({**question, "max_tokens": 1, "temperature": 0})
        try:
            places = answer["choices"][0]["prompt_logprobs"]
            told = [_numbers(place or {}) for place in places]
            if len(told) != len(row):
                raise IndexError
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise LoRAMError(
                f"expected prompt_logprobs of {len(row)} tokens from {self.url}, found "
                f"{str(answer)[:200]}: serve {self.model} by vLLM with --max-logprobs {top_k}"
            ) from error
        return told

    def _ask(self, question: Mapping[str, Any]) -> Any:
        address, reason = f"{self.url.rstrip('/')}/completions", ""
        for seconds in (*PATIENCE, None):
            try:
                reply = requests.post(address, json=question, timeout=SECONDS)
                if reply.ok:
                    return reply.json()
                reason = reply.text[:300]
                if reply.status_code < 500:
                    raise LoRAMError(
                        f"expected an answer from {address}, found {reply.status_code} {reason}: "
                        "change how the server is started, or ask another"
                    )
            except (requests.ConnectionError, requests.Timeout) as error:
                reason = str(error)
            except requests.RequestException as error:  # no address, or no JSON
                raise LoRAMError(
                    f"expected an OpenAI-compatible server at {address}, found {error}: give its "
                    "address, as http://localhost:8000/v1"
                ) from error
            if seconds is not None:
                time.sleep(seconds)
        raise ConnectionError(None, f"{address} does not answer: {reason[:300]}")


def _numbers(place: Mapping[str, Mapping[str, Any]]) -> dict[int, tuple[float, str | None]]:
    return {int(id): (float(t["logprob"]), t.get("decoded_token")) for id, t in place.items()}


def make_served(
    server: Server,
    rows: Iterable[Row],
    output: Path,
    top_k: int,
    progress: Progress = no_progress,
    known: Mapping[bytes, torch.Tensor] | None = None,
) -> dict[str, Any]:
    """Store what a served base says, as `make_teacher` does what it computes.

    Interrupted, it goes on when it is called again with the same arguments.

    Args:
        server: To ask.
        rows: The sequences, with what is trained.
        output: Folder to write.
        top_k: How many of the most likely tokens to keep, the trained one among them.
        progress: Shows how far it is.
        known: Log-probabilities of the trained tokens of some rows, by the rows' digest, as the
            base itself has them: the server's are held against these.

    Returns:
        What `teacher.json` says.

    Raises:
        LoRAMError: The server answers otherwise than expected, or as another model would.
    """
    sequences = distinct(rows)
    parts = [sequences[i : i + ROWS_PER_FILE] for i in range(0, len(sequences), ROWS_PER_FILE)]
    record = {
        **described(sequences, [f"teacher-{i:05}.safetensors" for i in range(len(parts))]),
        "fingerprint": None,
        "top_k": top_k,
        "computed_in": f"{server.model}, served",
    }
    check_free(output, record, record["places"] * place_bytes(top_k), "choose another disk")
    with resumable(output, record) as work, ThreadPoolExecutor(AT_ONCE) as pool:
        done = progress(len(sequences), "asking", "row")
        for part, name in zip(parts, record["files"], strict=True):
            if not (work.result / name).exists():
                said = list(pool.map(lambda row: server.said(row, top_k), part))
                outputs = [_outputs(row, nats, top_k) for row, nats in zip(part, said, strict=True)]
                _compare(server, part, outputs, known or {})
                columns = zip(*outputs, strict=True)
                write_outputs(work.result / name, part, [torch.cat(column) for column in columns])
            done(len(part))
        write_json(work.result / TEACHER_FILE, record)
    return record


def check_server(server: Server, rows: Sequence[Row], top_k: int, tokenizer: Any) -> None:
    """Refuse a server that gives too little or has another tokenizer, before the long work.

    Args:
        server: To ask.
        rows: Some rows.
        top_k: How many tokens each place needs.
        tokenizer: The run's.

    Raises:
        LoRAMError: It does not answer, or not as needed.
    """
    same = total = 0
    try:
        for row in rows:
            server.said(row, top_k)
            texts = server.texts(row)
            own = [tokenizer.decode([int(token)]) for token in row.tokens[1:]]
            pairs = [
                (a, b) for a, b in zip(own, texts, strict=True) if a and b and "\ufffd" not in a
            ]
            total += len(pairs)
            same += sum(a.strip() == b.strip() for a, b in pairs)
    except ConnectionError as error:
        raise LoRAMError(
            f"expected a server, found: {error.strerror}: start it, or give another address"
        ) from error
    if same < ALIKE * total:
        raise LoRAMError(
            f"expected the run's tokenizer behind {server.url}, found that {server.model} reads "
            f"{total - same} of {total} tokens otherwise: serve the base that was pruned"
        )


def _outputs(row: Row, said: Sequence[dict[int, float]], top_k: int) -> tuple[torch.Tensor, ...]:
    """As `most_likely`: the trained token first, then the likeliest; the others' probability."""
    ids, logprobs = [], []
    for place, nats in zip(row.places, said, strict=True):
        own = int(row.tokens[place + 1])
        others = sorted(nats.keys() - {own}, key=lambda token: (-nats[token], token))
        ids.append([own, *others[: top_k - 1]])
        logprobs.append([nats[token] for token in ids[-1]])
    kept = torch.tensor(logprobs)
    rest = (1 - kept.double().exp().sum(-1)).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.tensor(ids, dtype=torch.int32), kept, rest.float()


def _compare(
    server: Server,
    part: Sequence[Row],
    outputs: Sequence[tuple[torch.Tensor, ...]],
    known: Mapping[bytes, torch.Tensor],
) -> None:
    for row, (_, logprobs, _) in zip(part, outputs, strict=True):
        wanted = known.get(row.digest)
        if wanted is not None and (logprobs[:, 0] - wanted).abs().mean() > CLOSE:
            gap = (logprobs[:, 0] - wanted).abs().mean().item()
            raise LoRAMError(
                f"expected the base at {server.url}, found a model ({server.model}) whose "
                f"log-probabilities differ by {gap:.2f} nats a token from those computed here: "
                "serve the base that was pruned, in 16 bits"
            )
