"""Whether servers take an adapter for the original model as it is.

What is judged is a PEFT config and the names and shapes of tensors: of a folder, or of what a run
is about to train.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from axolotl_loram.architecture.config_json import Config, load_config
from axolotl_loram.architecture.lora_names import ADAPTER_CONFIG
from axolotl_loram.architecture.record import Record
from axolotl_loram.config_loram import Server
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.find import find_local_file
from axolotl_loram.files.tensors import ADAPTER_FILE, Checkpoint
from axolotl_loram.files.untrusted import read_json
from axolotl_loram.recovery.adapter import check_names
from axolotl_loram.recovery.servers import RULES, SERVERS, SETTINGS, Subject

MERGE = ", or merge it (`axolotl merge-lora`) and serve that"


@dataclass(frozen=True)
class Verdict:
    """Whether a server takes an adapter.

    Attributes:
        mergeable: Whether merging the adapter into the base is a way out.
    """

    server: Server
    version: str
    serves: bool
    settings: str = ""
    because: tuple[str, ...] = ()
    mergeable: bool = True

    def __str__(self) -> str:
        """In one line."""
        if self.serves:
            return f"yes, with {self.settings}" if self.settings else "yes"
        return f"no: {'; '.join(self.because)}{MERGE if self.mergeable else ''}"


def verdicts(subject: Subject, servers: Iterable[Server] = tuple(SERVERS)) -> list[Verdict]:
    """What each server makes of an adapter."""
    broken = [(rule, found) for rule in RULES if (found := rule.found(subject))]
    mergeable = not any("merge-lora" in rule.read_in for rule, _ in broken)
    made = []
    for server in servers:
        mine = tuple(f"{found}: {rule.instead}" for rule, found in broken if server in rule.read_in)
        needed = [said for of, needs in SETTINGS if of == server and (said := needs(subject))]
        settings = "" if mine else ", ".join(needed)
        made.append(Verdict(server, SERVERS[server], not mine, settings, mine, mergeable))
    return made


def subject_of(folder: Path) -> Subject:
    """What is known of the adapter in a folder, and of its base; downloads nothing.

    Raises:
        LoRAMError: There is none, PEFT would not load it, or it is for a pruned model.
    """
    Record.load(folder).refuse_unrecovered(folder)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise LoRAMError(
            f"expected an adapter with {ADAPTER_CONFIG} to serve, found none in {folder}: give the "
            "output_dir of a run, or another PEFT adapter"
        )
    settings = read_json(folder / ADAPTER_CONFIG)
    weights = Checkpoint(folder, ADAPTER_FILE)
    check_names(weights)
    shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
    return Subject(settings, shapes, _config_of_base(settings))


def _config_of_base(settings: Mapping[str, Any]) -> Config | None:
    base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(base, str) or not isinstance(revision, str | None):
        return None
    with suppress(LoRAMError):  # of a family that is not declared, less is known
        file = find_local_file(base, "config.json", revision)
        return load_config(str(file)) if file else None
    return None


def as_json(made: Iterable[Verdict]) -> list[dict[str, Any]]:
    """Verdicts as JSON has them."""
    return [asdict(verdict) | {"because": list(verdict.because)} for verdict in made]


def one_line(made: Iterable[Verdict]) -> str:
    """The servers that take it, for a card."""
    told = [f"{v.server} ({v.settings})" if v.settings else v.server for v in made if v.serves]
    return f"Taken as it is by {', '.join(told)}."
