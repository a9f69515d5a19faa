"""Publishing a pruned model or a recovered adapter: checked, described, uploaded."""

from __future__ import annotations

import fnmatch
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from axolotl_loram import __version__
from axolotl_loram.architecture.lora_names import ADAPTER_CONFIG
from axolotl_loram.architecture.pairing import read_record
from axolotl_loram.architecture.plan import RECORD_FILE, Base, PruningPlan
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.atomic import check_vacant, new_folder, write_json
from axolotl_loram.files.find import MODEL_PATTERNS, TOKENIZER_PATTERNS, is_hub_id
from axolotl_loram.files.progress import progress_bar
from axolotl_loram.files.tensors import ADAPTER_FILE
from axolotl_loram.recovery.recover import model_card
from axolotl_loram.results.artefacts import EVALUATION_FILE, kept_units
from axolotl_loram.results.card import PLOT_FILE, Card, licence_of
from axolotl_loram.results.figures import Strips, save
from axolotl_loram.results.hub import Repository, full_name
from axolotl_loram.results.verify import require_whole, verify
from axolotl_loram.tables import lines

CARD_FILE = "README.md"
LIST_FILE = "upload.json"
ALLOWED = {
    "pruned-model": MODEL_PATTERNS,
    "recovered-adapter": (ADAPTER_CONFIG, ADAPTER_FILE, *TOKENIZER_PATTERNS),
}
"""Kind → what may be uploaded of its folder, beside record, card, plot and evaluation."""
TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")
SECRET = re.compile(
    r"(?mi)^(\s*(?:- )?(?!(?:bos|eos|pad|unk|mask|cls|sep)_token\b)"
    r"(?:\w+_)?(?:token|key|secret|password)\s*:[ \t]*)[^\s#].*$"
)
"""A line of YAML that holds one."""
SMALL = 2**20
"""Bytes below which a file is searched for tokens."""


@dataclass(frozen=True)
class Package:
    """What is to be uploaded.

    Attributes:
        files: Name in the repository → file.
        digests: SHA-256 of those that were checked against it.
        notices: What the publisher should know.
        checks: How many checks passed.
    """

    files: Mapping[str, Path]
    digests: Mapping[str, str]
    notices: list[str]
    checks: int

    def sizes(self) -> dict[str, int]:
        """Name → bytes."""
        return {name: path.stat().st_size for name, path in self.files.items()}


@dataclass(frozen=True)
class Publication:
    """One folder to be published.

    Attributes:
        folder: A pruned model or a recovered adapter.
        repository: ``org/name``.
        revision: Branch there, None for the main one.
        public: Whether the repository is to be public; None: as it is, private if it is new.
        base: Hub id of the base, where the record names a folder.
        card: A README.md to use as it is.
        output: Folder for a rehearsal, by default ``…-card`` beside `folder`.
        overwrite: Replace another model in the repository, or what `output` holds.
    """

    folder: Path
    repository: str
    revision: str | None = None
    public: bool | None = False
    base: str | None = None
    card: Path | None = None
    output: Path | None = None
    overwrite: bool = False

    def rehearse(self) -> dict[str, Any]:
        """Write card, plot and list of files to a folder; no network, no token.

        Raises:
            LoRAMError: The folder cannot be published, or `output` holds something.
        """
        self._check_input()
        output = self.output or self.folder.resolve().with_name(
            f"{self.folder.resolve().name}-card"
        )
        check_vacant(output, self.overwrite)
        with new_folder(output, self.overwrite) as scratch:
            package = self._package(scratch, online=False)
            told = self._told(package) | {"dry_run": True, "output": str(output)}
            write_json(scratch / LIST_FILE, told)
        return told

    def publish(self) -> dict[str, Any]:
        """Check, describe and upload; returns what was uploaded and where.

        Raises:
            LoRAMError: The folder cannot be published, the repository holds another model, or the
                hub or the connection failed: the same call goes on then.
        """
        self._check_input()
        repository = Repository(self.repository, self.revision, self.public)
        files, digests = self._own_files(), self.record.get("files") or {}
        removed = repository.check_vacant(files, digests, self.overwrite)
        with tempfile.TemporaryDirectory() as scratch:
            package = self._package(Path(scratch), online=True)
            message = f"{self.kind} made with axolotl-loram {__version__}"
            sent = repository.send(package.files, package.digests, removed, message)
            if self.public and sent["private"]:
                package.notices.append(f"{self.repository} was private before and still is")
            return self._told(package) | sent

    @cached_property
    def record(self) -> dict[str, Any]:
        """What `loram.json` says."""
        return read_record(self.folder)

    @property
    def kind(self) -> str:
        """What the folder is."""
        return str(self.record.get("kind"))

    def _check_input(self) -> None:
        name = self.repository
        if name.count("/") != 1 or not is_hub_id(name):
            raise LoRAMError(f"expected REPOSITORY as org/name, found {name!r}: name both")
        if not self.record:
            raise LoRAMError(
                f"expected a folder with {RECORD_FILE}, found none in {self.folder}: give what "
                "`axolotl-loram prune` or training wrote"
            )
        if self.kind not in ALLOWED:
            raise LoRAMError(
                f"expected a pruned model or a recovered adapter, found a {self.kind} in "
                f"{self.folder}: recover an adapter first"
            )
        if self.base is not None and not is_hub_id(self.base):
            raise LoRAMError(f"expected --base as a hub id, found {self.base!r}")

    def _own_files(self) -> dict[str, Path]:
        """Files of the folder itself that are uploaded: recorded ones that are allowed.

        Raises:
            LoRAMError: The record lists a file that no checkpoint needs.
        """
        names = set(self.record.get("files") or {})
        allowed = ALLOWED[self.kind]
        if self.kind == "recovered-adapter":
            names |= {file.name for pattern in allowed for file in self.folder.glob(pattern)}
        for name in sorted(names):
            if name != Path(name).name or not _matches(name, allowed):
                raise LoRAMError(
                    f"expected only files of a checkpoint in {RECORD_FILE}, found {name!r}: make "
                    "the folder again"
                )
        names |= {RECORD_FILE, *({EVALUATION_FILE} if self._has(EVALUATION_FILE) else ())}
        found = {name: self.folder / name for name in sorted(names)}
        for name, path in found.items():
            if path.is_symlink() and name not in (self.record.get("files") or {}):
                raise LoRAMError(f"expected {path} to be a file of its own, found a link: copy it")
        return {name: path for name, path in found.items() if path.is_file()}

    def _has(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def _package(self, scratch: Path, online: bool) -> Package:
        """Check everything, and write card and plot into `scratch`."""
        with progress_bar("verifying") as progress:
            made = verify(self.folder, progress=progress)
        require_whole(made, self.folder)
        notices = [f"not checked: {c.name}: {c.detail}" for c in made if c.outcome != "ok"]
        files = self._own_files()
        pruned = self.kind == "pruned-model"
        files |= (
            self._described(scratch, notices, online) if pruned else self._adapter_card(scratch)
        )
        if self.card is not None:
            files[CARD_FILE] = Path(shutil.copyfile(self.card, scratch / CARD_FILE))
        _refuse_tokens(files)
        passed = sum(check.outcome == "ok" for check in made)
        return Package(files, self.record.get("files") or {}, notices, passed)

    def _described(self, scratch: Path, notices: list[str], online: bool) -> dict[str, Path]:
        """Card and plot of a pruned model."""
        plan = PruningPlan.load(self.folder)
        base = self.base or (plan.base.id if is_hub_id(plan.base.id) else None)
        if base is None:
            notices.append(
                f"the card names no base_model: it was pruned from the folder {plan.base.id}, "
                f"which {RECORD_FILE} names; pass --base org/name"
            )
        licence = licence_of(plan.base.id, plan.base.revision, online)
        licence = licence or licence_of(base or plan.base.id, None, online)
        if "license" not in licence:
            notices.append(f"the card names no licence: none is known of {base or plan.base.id}")
        plotted = bool(plan.kept) and self._plot(plan, scratch / PLOT_FILE, notices)
        card = Card(
            self.folder, self.record, plan, self.repository, self.revision, base, licence, plotted
        )
        (scratch / CARD_FILE).write_text(card.text(), encoding="utf-8")
        names = (CARD_FILE, PLOT_FILE) if plotted else (CARD_FILE,)
        return {name: scratch / name for name in names}

    def _plot(self, plan: PruningPlan, file: Path, notices: list[str]) -> bool:
        title = f"{self.repository}: share of each layer that is kept"
        try:
            save(Strips("kept", title, kept_units(plan)), file)
        except LoRAMError as error:
            notices.append(f"the card has no plot: {error}")
            return False
        return True

    def _adapter_card(self, scratch: Path) -> dict[str, Path]:
        """The card that recovery wrote, which has the YAML of the run."""
        if self._has(CARD_FILE):
            return {CARD_FILE: self.folder / CARD_FILE}
        base = self.record["base"]
        (scratch / CARD_FILE).write_text(model_card(Base(**base)), encoding="utf-8")
        return {CARD_FILE: scratch / CARD_FILE}

    def _told(self, package: Package) -> dict[str, Any]:
        sizes = package.sizes()
        return {
            "repository": self.repository,
            "revision": self.revision,
            "kind": self.kind,
            "plan": self.record["plan"],
            "private": not self.public,
            "checks_passed": package.checks,
            "files": sizes,
            "bytes": sum(sizes.values()),
            "notices": package.notices,
        }


def publish_adapter(folder: Path, repository: str) -> dict[str, Any]:
    """Upload a recovered adapter when its training ends, over that of an earlier run.

    Args:
        folder: Of the adapter.
        repository: ``org/name``, or a name of the user's own; private if it is new.

    Raises:
        LoRAMError: As `Publication.publish`.
    """
    return Publication(folder, full_name(repository), public=None, overwrite=True).publish()


def report(done: Mapping[str, Any]) -> str:
    """What `Publication` returns, for people."""
    shown = {
        name: ("yes" if value else "no") if isinstance(value, bool) else value
        for name, value in done.items()
        if name not in ("files", "notices") and value is not None
    }
    listed = "\n".join(f"{size:>16,}  {name}" for name, size in done["files"].items())
    return f"{lines(shown)}\n\n{listed}"


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def without_secrets(text: str) -> str:
    """A YAML with the values of keys such as hub_token or wandb_api_key, and hub tokens, hidden."""
    hidden = SECRET.sub(lambda found: f"{found[1]}[hidden]", text)
    return TOKEN.sub(b"[hidden]", hidden.encode()).decode()


def _refuse_tokens(files: Mapping[str, Path]) -> None:
    """Refuse a small file, such as a YAML in a card, that has a token of the hub in it."""
    from huggingface_hub import get_token

    own = (get_token() or "").encode()
    for name, path in files.items():
        text = path.read_bytes() if path.stat().st_size <= SMALL else b""
        if TOKEN.search(text) or (own and own in text):
            raise LoRAMError(f"expected no token in what is published, found one in {name}")
