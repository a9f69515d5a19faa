"""Ollama's Modelfile for an adapter, with the chat template of the adapter's tokenizer.

Ollama's templates are Go's, the tokenizers' are Jinja, and no program turns one into the other. But
most chats are turns between fixed words. Those are read off chats that the tokenizer writes, and
kept if they write another, longer one as it does.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

LOG = logging.getLogger(__name__)
SYSTEM, ASKED, ANSWERED, AGAIN = "@system@", "@asked@", "@answered@", "@asked again@"
ROLES = {SYSTEM: "system", ASKED: "user", ANSWERED: "assistant", AGAIN: "user"}


class Turns(NamedTuple):
    """The fixed words of a chat.

    Attributes:
        system: What stands before and behind a system's message; None where chats have none.
        inside: Whether that message is part of the first question.
        default: What the system says where nobody gives it words.
    """

    system: tuple[str, str] | None
    inside: bool
    default: str
    ask: str
    answer: str
    end: str

    def template(self) -> str:
        """In Ollama's words."""
        before, behind = self.system or ("", "")
        system = "{{ if .System }}" + before + "{{ .System }}" + behind + "{{ end }}"
        return self._turn(system if self.system else "", "{{ .Prompt }}", "{{ .Response }}")

    def chat(self) -> str:
        """A question, its answer and another question, after a system's message if there may be."""
        before, behind = self.system or ("", "")
        system = before + SYSTEM + behind if self.system else ""
        return self._turn(system, ASKED, ANSWERED) + self.ask + AGAIN + self.answer

    def _turn(self, system: str, asked: str, answered: str) -> str:
        first = self.ask + system if self.inside else system + self.ask
        return first + asked + self.answer + answered + self.end


def modelfile(adapter: Path, base: Path, file: str, base_gguf: Path | None, named: str) -> str:
    """FROM, ADAPTER, and TEMPLATE where the tokenizer's can be said in Ollama's words.

    The adapter's own tokenizer comes before the one in the base's folder. The GGUF adapter is
    `file`, beside the Modelfile; the original is `named` so by the adapter.
    """
    if base_gguf is None:
        name = " ".join(named.split())  # of a file that a stranger may have written
        lines = [f"# put {name} beside this, as base.gguf", "FROM ./base.gguf"]
    else:
        lines = [f"FROM {base_gguf.resolve()}"]
    lines.append(f"ADAPTER ./{file}")
    turns = turns_of(adapter) or turns_of(base)
    if turns is None:
        lines.append("# no TEMPLATE: the tokenizer has none that Ollama's language can say")
    else:
        lines.append(f'TEMPLATE """{turns.template()}"""')
        lines += [f'SYSTEM """{turns.default}"""'] if turns.default else []
    return "\n".join(lines) + "\n"


def turns_of(folder: Path) -> Turns | None:
    """The turns of a tokenizer's chats; None where it has no chats, or others."""
    if not any(folder.glob("tokenizer*")):
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # whatever is wrong with a tokenizer, the adapter is not
        LOG.warning("no TEMPLATE in the Modelfile: %s has no readable tokenizer: %s", folder, error)
        return None
    return _read(tokenizer) if tokenizer.chat_template else None


def _read(tokenizer: Any) -> Turns | None:
    first, *_ = tokenizer("a")["input_ids"]
    begins = tokenizer.bos_token if first == tokenizer.bos_token_id else ""  # llama.cpp's to write

    def chat(*said: str, asking: bool = True) -> str:
        messages = [{"role": ROLES[text], "content": text} for text in said]
        try:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=asking
            )
        except Exception:  # a template's own refusal, such as of a system's message
            return ""
        return text.removeprefix(begins)

    opening, _, answer = chat(ASKED).partition(ASKED)
    _, _, end = chat(ASKED, ANSWERED, asking=False).partition(ANSWERED)
    _, _, rest = chat(ASKED, ANSWERED, AGAIN).partition(ANSWERED)
    ask = rest.partition(AGAIN)[0].removeprefix(end)
    before, _, rest = chat(SYSTEM, ASKED).partition(SYSTEM)
    behind = rest.partition(ASKED)[0]
    inside = bool(rest) and before == ask and not behind.endswith(ask)
    own = ("", behind) if inside else (before, behind.removesuffix(ask))
    system, said = (
        (own, (SYSTEM, ASKED, ANSWERED, AGAIN)) if rest else (None, (ASKED, ANSWERED, AGAIN))
    )
    given = opening.removesuffix(ask)  # the system's own words, where it has some
    default = given.removeprefix(own[0]).removesuffix(own[1])
    turns = Turns(system, inside, default if rest else "", ask, answer, end)
    is_whole = turns.chat() == chat(*said) and (rest or not given)
    words = "".join((*own, default, ask, answer, end))
    is_said = answer and not any(mark in words for mark in ("{{", '"""'))
    return turns if is_whole and is_said else None
