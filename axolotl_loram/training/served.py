"""What a served base says of a run's rows, asked of a server that knows `prompt_logprobs`.

vLLM's OpenAI-compatible server does: to a prompt of token ids it answers with the most likely
tokens of each place and the prompt's own (`--max-logprobs 32`, since it gives 20 by itself).
llama.cpp's gives log-probabilities of generated tokens only, and cannot be asked.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import requests
import torch
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.atomic import write_json
from axolotl_loram.files.progress import Progress, no_progress
from axolotl_loram.files.resumable import check_free, resumable
from axolotl_loram.memory.data import place_bytes
from axolotl_loram.training.rows import TEACHER_FILE, Row, described, distinct
from axolotl_loram.training.teacher import write_outputs

AT_ONCE = 16
"""Requests under way: the server batches them."""
ROWS_PER_FILE = 256
TRIES, PATIENCE = 4, 2.0
"""How often a request is made again, and seconds to wait before: twice as many each time."""
SECONDS = 600
"""In which a server answers."""
ALIKE = 0.95
"""Share of some rows' tokens that both tokenizers decode to the same text."""
CLOSE = 0.1
"""Mean nats by which rows that are computed here may differ: kernels and 16 bits, not a model."""


class Said(NamedTuple):
    """What a server says of a token at a place: its log-probability, and its text if told."""

    logprob: float
    text: str | None


@dataclass(frozen=True)
class Server:
    """A server: its URL up to and with `/v1`, and what it calls the base."""

    url: str
    model: str

    def said(self, row: Row, top_k: int) -> list[dict[int, Said]]:
        """Of each token from the second on: what the server says of it and the likeliest others.

        Args:
            row: The prompt, as token ids.
            top_k: How many of the likeliest.

        Returns:
            For each of (tokens - 1) places, by token.

        Raises:
            LoRAMError: The server refuses, or answers otherwise.
            ConnectionError: It does not answer, also after some patience.
        """
        question = {"model": self.model, "prompt": row.tokens.tolist(), "prompt_logprobs": top_k}
        answer = self._ask({**question, "max_tokens": 1, "temperature": 0})
        try:
            _, *places = answer["choices"][0]["prompt_logprobs"]
            found = [_read(place) for place in places]
            pairs = list(zip(row.tokens[1:].tolist(), found, strict=True))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise LoRAMError(
                f"expected prompt_logprobs of {len(row)} tokens from {self.url}, found "
                f"{str(answer)[:200]}: serve {self.model} by vLLM with --max-logprobs {top_k}"
            ) from error
        for own, place in pairs:
            if own not in place or len(place) < top_k:
                raise LoRAMError(
                    f"expected {top_k} tokens and the prompt's own at each place from {self.url}, "
                    f"found {len(place)}: serve it by vLLM with --max-logprobs {top_k}"
                )
        return found

    def _ask(self, question: Mapping[str, Any]) -> Any:
        address = f"{self.url.rstrip('/')}/completions"
        try:
            reply = _session(PATIENCE).post(address, json=question, timeout=SECONDS)
            if reply.status_code >= 500:
                raise ConnectionError(None, f"{address} does not answer: {reply.text[:300]}")
            if reply.ok:
                return reply.json()
        except (requests.ConnectionError, requests.Timeout) as error:
            raise ConnectionError(None, f"{address} does not answer: {error!s:.300}") from error
        except requests.RequestException as error:  # no address, or no JSON
            raise LoRAMError(
                f"expected an OpenAI-compatible server at {address}, found {error}: give its "
                "address, as http://localhost:8000/v1"
            ) from error
        raise LoRAMError(
            f"expected an answer from {address}, found {reply.status_code} {reply.text[:300]}: "
            "change how the server is started, or ask another"
        )


@functools.cache
def _session(patience: float) -> requests.Session:
    """Asks again where a server is busy or away, after ever longer times."""
    again = Retry(
        TRIES,
        backoff_factor=patience,
        status_forcelist=range(500, 600),
        allowed_methods=None,
        raise_on_status=False,
    )
    session = requests.Session()
    for kind in ("http://", "https://"):
        session.mount(kind, HTTPAdapter(max_retries=again, pool_maxsize=AT_ONCE))
    return session


def _read(place: Mapping[str, Mapping[str, Any]]) -> dict[int, Said]:
    return {int(id): Said(float(t["logprob"]), t.get("decoded_token")) for id, t in place.items()}


def make_served(
    server: Server,
    rows: Iterable[Row],
    output: Path,
    top_k: int,
    progress: Progress = no_progress,
    known: Mapping[bytes, torch.Tensor] | None = None,
) -> dict[str, Any]:
    """Store what a served base says, as `make_teacher` stores what it computes.

    Interrupted, it goes on when it is called again with the same arguments. The server's answers
    are held against `known`, by the rows' digest: log-probabilities of the trained tokens of some
    rows, as the base itself has them.

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
    """Refuse a server that gives too little, or has another tokenizer, before the work."""
    same = total = 0
    try:
        for row in rows:
            for token, place in zip(row.tokens[1:].tolist(), server.said(row, top_k), strict=True):
                own, theirs = tokenizer.decode([token]), place[token].text
                if own and theirs and "\ufffd" not in own:  # else a part of a character
                    total += 1
                    same += own.strip() == theirs.strip()
    except ConnectionError as error:
        raise LoRAMError(
            f"expected a server, found: {error.strerror}: start it, or give another address"
        ) from error
    if same < ALIKE * total:
        raise LoRAMError(
            f"expected the run's tokenizer behind {server.url}, found that {server.model} reads "
            f"{total - same} of {total} tokens otherwise: serve the base that was pruned"
        )


def _outputs(row: Row, said: Sequence[dict[int, Said]], top_k: int) -> tuple[torch.Tensor, ...]:
    """As `most_likely`: the trained token first, then the likeliest; the others' probability."""
    ids, logprobs = [], []
    for place in row.places:
        own = int(row.tokens[place + 1])
        nats = {token: one.logprob for token, one in said[place].items()}
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
