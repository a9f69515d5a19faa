"""Publishing a pruned model or a recovered adapter: checked, described, uploaded in one commit.

The hub keeps large files by their SHA-256, so that what has arrived once is not sent again; nothing
is visible before the commit. (`upload_large_folder` of huggingface_hub resumes too, but commits in
parts: a cut would leave part of a model visible.)
"""

from __future__ import annotations

import fnmatch
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axolotl_loram import __version__
from axolotl_loram.architecture.lora_names import ADAPTER_CONFIG
from axolotl_loram.architecture.plan import PruningPlan
from axolotl_loram.architecture.record import RECORD_FILE, Kind, Record
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.atomic import check_vacant, new_folder, write_json
from axolotl_loram.files.find import (
    MODEL_PATTERNS,
    TOKENIZER_PATTERNS,
    hub_errors,
    is_hub_id,
    reason,
)
from axolotl_loram.files.progress import progress_bar
from axolotl_loram.files.tensors import ADAPTER_FILE
from axolotl_loram.recovery.recover import model_card
from axolotl_loram.results.artefacts import EVALUATION_FILE, kept_units
from axolotl_loram.results.card import PLOT_FILE, Card, licence_of
from axolotl_loram.results.checks import is_inside, sha256_of
from axolotl_loram.results.figures import Strips, save
from axolotl_loram.results.inspect import require_whole, verify
from axolotl_loram.results.secrets import refuse_tokens
from axolotl_loram.tables import lines

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

CARD_FILE = "README.md"
LIST_FILE = "upload.json"
ALLOWED = {
    Kind.PRUNED_MODEL: MODEL_PATTERNS,
    Kind.RECOVERED_ADAPTER: (ADAPTER_CONFIG, ADAPTER_FILE, *TOKENIZER_PATTERNS),
}
"""Kind → what may be uploaded of its folder, beside record, card, plot and evaluation."""
NOT_OURS = (".gitattributes", "README.md", "LICENSE*", "NOTICE*", "USE_POLICY*", "*.png", "*.svg")
"""Files that may differ or be there without making it another model."""
WAITS = (1.0, 2.0, 4.0, None)  # seconds before an upload is tried again


@dataclass(frozen=True)
class Publication:
    """One folder to be published.

    Attributes:
        folder: A pruned model or a recovered adapter.
        repository: ``org/name``; need not exist yet.
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
        folder = self.folder.resolve()
        output = self.output or folder.with_name(f"{folder.name}-card")
        check_vacant(output, self.overwrite)
        with new_folder(output, self.overwrite) as scratch:
            _, told = self._package(scratch, online=False)
            told |= {"dry_run": True, "output": str(output)}
            write_json(scratch / LIST_FILE, told)
        return told

    def publish(self) -> dict[str, Any]:
        """Check, describe and upload; returns what was uploaded and where.

        Raises:
            LoRAMError: The folder cannot be published, the repository holds another model, or the
                hub or the connection failed: the same call goes on then.
        """
        self._check_input()
        removed = self._others(self._own_files())
        with tempfile.TemporaryDirectory() as scratch:
            files, told = self._package(Path(scratch), online=True)
            sent = self._send(files, removed)
        if self.public and sent["private"]:
            told["notices"].append(f"{self.repository} was private before and still is")
        return told | sent

    @cached_property
    def record(self) -> Record:
        """What `loram.json` says."""
        return Record.load(self.folder)

    @property
    def digests(self) -> Mapping[str, str]:
        """SHA-256 of the recorded files."""
        return self.record.files or {}

    def _check_input(self) -> None:
        name = self.repository
        if name.count("/") != 1 or not is_hub_id(name):
            raise LoRAMError(f"expected REPOSITORY as org/name, found {name!r}: name both")
        if not self.record:
            raise LoRAMError(
                f"expected a folder with {RECORD_FILE}, found none in {self.folder}: give what "
                "`axolotl-loram prune` or training wrote"
            )
        if self.record.kind not in ALLOWED:
            raise LoRAMError(
                f"expected a pruned model or a recovered adapter, found a {self.record.kind} in "
                f"{self.folder}: recover an adapter first"
            )
        if self.base is not None and not is_hub_id(self.base):
            raise LoRAMError(f"expected --base as a hub id, found {self.base!r}")

    def _own_files(self) -> dict[str, Path]:
        """Files of the folder itself that are uploaded: recorded ones that are allowed.

        Raises:
            LoRAMError: The record lists a file that no checkpoint needs.
        """
        kind, _ = self.record.require(self.folder)
        names, allowed = set(self.digests), ALLOWED[kind]
        if kind == Kind.RECOVERED_ADAPTER:
            there = (file for pattern in allowed for file in self.folder.glob(pattern))
            names |= {file.relative_to(self.folder).as_posix() for file in there}
        for name in sorted(names):
            if not is_inside(name) or not _matches(name, allowed):
                raise LoRAMError(
                    f"expected only files of a checkpoint in {RECORD_FILE}, found {name!r}: make "
                    "the folder again"
                )
        found = {n: self.folder / n for n in sorted({*names, RECORD_FILE, EVALUATION_FILE})}
        for name, path in found.items():
            if path.is_symlink() and name not in self.digests:
                raise LoRAMError(f"expected {path} to be a file of its own, found a link: copy it")
        return {name: path for name, path in found.items() if path.is_file()}

    def _package(self, scratch: Path, online: bool) -> tuple[dict[str, Path], dict[str, Any]]:
        """Check everything, and write card and plot into `scratch`.

        Returns:
            Name in the repository → file; and what is said of them.
        """
        with progress_bar("verifying") as progress:
            made = verify(self.folder, progress=progress)
        require_whole(made, self.folder)
        notices = [f"not checked: {c.name}: {c.detail}" for c in made if c.outcome != "ok"]
        pruned, files = self.record.kind == Kind.PRUNED_MODEL, self._own_files()
        files |= self._described(scratch, notices, online) if pruned else self._carded(scratch)
        if self.card is not None:
            files[CARD_FILE] = Path(shutil.copyfile(self.card, scratch / CARD_FILE))
        refuse_tokens(files)
        sizes = {name: path.stat().st_size for name, path in files.items()}
        return files, {
            "repository": self.repository,
            "revision": self.revision,
            "kind": self.record.kind,
            "plan": self.record.plan,
            "private": not self.public,
            "checks_passed": sum(check.outcome == "ok" for check in made),
            "files": sizes,
            "bytes": sum(sizes.values()),
            "notices": notices,
        }

    def _described(self, scratch: Path, notices: list[str], online: bool) -> dict[str, Path]:
        """Card and plot of a pruned model."""
        plan = PruningPlan.load(self.folder)
        base = self.base or (plan.base.id if is_hub_id(plan.base.id) else None)
        if base is None:
            notices.append(
                f"the card names no base_model: it was pruned from the folder {plan.base.id}, "
                f"which {RECORD_FILE} names; pass --base org/name"
            )
        licence = licence_of(plan.base.id, plan.base.revision, online) or licence_of(
            base or plan.base.id, None, online
        )
        if "license" not in licence:
            notices.append(f"the card names no licence: none is known of {base or plan.base.id}")
        made = {CARD_FILE: scratch / CARD_FILE}
        if plan.kept:
            title = f"{self.repository}: share of each layer that is kept"
            try:
                save(Strips("kept", title, kept_units(plan)), scratch / PLOT_FILE)
                made[PLOT_FILE] = scratch / PLOT_FILE
            except LoRAMError as error:
                notices.append(f"the card has no plot: {error}")
        hub, record = (self.repository, self.revision), self.record.as_json()
        card = Card(self.folder, record, plan, *hub, base, licence, plotted=PLOT_FILE in made)
        made[CARD_FILE].write_text(card.text(), encoding="utf-8")
        return made

    def _carded(self, scratch: Path) -> dict[str, Path]:
        """The card that recovery wrote, which has the YAML of the run."""
        card = self.folder / CARD_FILE
        if not card.is_file():
            card = scratch / CARD_FILE
            card.write_text(model_card(self.record.require(self.folder)[1]), encoding="utf-8")
        return {CARD_FILE: card}

    def _others(self, files: Mapping[str, Path]) -> list[str]:
        """Files of another model in the repository that have to go.

        Raises:
            LoRAMError: There are some and they may not, or the repository is more public than
                asked for.
        """
        there = self._found(None)
        if there is not None and there.private is False and self.public is False:
            raise LoRAMError(
                f"expected {self.repository} to be private, found it public: pass --public to "
                "publish there, or choose another name"
            )
        branch = self._found(self.revision) if self.revision else there
        others = [
            sibling.rfilename
            for sibling in (branch.siblings or [] if branch else [])
            if not _matches(sibling.rfilename, NOT_OURS) and not self._same(sibling, files)
        ]
        if others and not self.overwrite:
            raise LoRAMError(
                f"expected {self.repository} to be new, empty or to hold this same model, found "
                f"{len(others)} other files in it ({', '.join(others[:3])}): choose another name, "
                "or pass --overwrite to replace them"
            )
        return [name for name in others if name not in files]

    def _found(self, revision: str | None) -> ModelInfo | None:
        """What the hub has under this name at a revision, None if nothing."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        with _telling(f"look up {self.repository} on the hub"):
            try:
                return _api().model_info(self.repository, revision=revision, files_metadata=True)
            except (RepositoryNotFoundError, RevisionNotFoundError):
                return None

    def _same(self, sibling: RepoSibling, files: Mapping[str, Path]) -> bool:
        """Whether a file of the repository is what will be uploaded under its name."""
        from huggingface_hub.utils.sha import git_hash

        name = sibling.rfilename
        if name not in files:
            return False
        if sibling.lfs is not None:
            return sibling.lfs.sha256 == (self.digests.get(name) or sha256_of(files[name]))
        return sibling.blob_id == git_hash(files[name].read_bytes())

    def _send(self, files: Mapping[str, Path], removed: Sequence[str]) -> dict[str, Any]:
        """Upload files, and take others away, in one commit; returns commit, url and private.

        Raises:
            LoRAMError: A file changed meanwhile, or the hub or the connection failed.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        adding = [CommitOperationAdd(name, path) for name, path in files.items()]
        for operation in adding:
            expected = self.digests.get(operation.path_in_repo)
            if expected not in (None, operation.upload_info.sha256.hex()):
                raise LoRAMError(
                    f"expected {operation.path_in_repo} to stay as it was checked, found it "
                    "changed: let what writes to the folder end, and publish again"
                )
        operations = [*adding, *(CommitOperationDelete(name) for name in removed)]
        with _telling(f"upload to {self.repository}"):
            _api().create_repo(self.repository, private=not self.public, exist_ok=True)
            if self.revision:
                _api().create_branch(self.repository, branch=self.revision, exist_ok=True)
            parent = _api().model_info(self.repository, revision=self.revision)
            commit = self._commit(operations, str(parent.sha))
        url = f"{_api().endpoint}/{self.repository}"
        return {"commit": commit, "url": url, "private": bool(parent.private)}

    def _commit(self, operations: list[Any], parent: str) -> str:
        """Commit, uploading file by file: a cut then costs at most one; returns the commit's hash.

        huggingface_hub tries again itself, but not where the server hangs up without an answer.
        """
        from httpx import RemoteProtocolError

        for wait in WAITS:
            try:
                done = _api().create_commit(
                    self.repository,
                    operations,
                    commit_message=f"{self.record.kind} made with axolotl-loram {__version__}",
                    revision=self.revision,
                    num_threads=1,
                    parent_commit=parent,
                )
                break
            except RuntimeError as error:
                sys.stderr.write("\n")  # huggingface_hub leaves the line with its bar open
                if wait is None or not isinstance(error.__cause__, RemoteProtocolError):
                    raise
                time.sleep(wait)
        return done.oid


def publish_adapter(folder: Path, repository: str) -> dict[str, Any]:
    """Upload a recovered adapter when its training ends, over that of an earlier run.

    Args:
        folder: Of the adapter.
        repository: ``org/name``, or a name of the user's own, as Axolotl's hub_model_id may be;
            private if it is new.

    Raises:
        LoRAMError: As `Publication.publish`.
    """
    if "/" not in repository:
        with _telling("ask the hub who you are"):
            repository = f"{_api().whoami()['name']}/{repository}"
    return Publication(folder, repository, public=None, overwrite=True).publish()


def report(done: Mapping[str, Any]) -> str:
    """What `Publication` returns, for people."""
    shown = {n: v for n, v in done.items() if n not in ("files", "notices") and v is not None}
    listed = "\n".join(f"{size:>16,}  {name}" for name, size in done["files"].items())
    return f"{lines(shown)}\n\n{listed}"


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _api() -> HfApi:
    """The hub's client, with the user's token.

    Raises:
        LoRAMError: There is no token.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise LoRAMError(
            "expected a token for the hub, found none: run `hf auth login`, or set HF_TOKEN to "
            "one that may write"
        )
    return HfApi(library_name="axolotl-loram", library_version=__version__)


@contextmanager
def _telling(what: str) -> Iterator[None]:
    """Say in one sentence what failed, of whatever huggingface_hub raises.

    Raises:
        LoRAMError: It failed.
    """
    failed: tuple[type[Exception], ...] = (*hub_errors(), RuntimeError, ValueError)
    try:
        yield
    except LoRAMError:
        raise
    except failed as error:
        told = reason(error)
        if isinstance(error, RuntimeError) and error.__cause__:  # it names the file, this the cause
            told += f" ({reason(error.__cause__)})"
        raise LoRAMError(
            f"expected to {what}, found: {told}: check the connection and `hf auth whoami`, then "
            "run the same command again; files that have arrived are not sent again"
        ) from error
