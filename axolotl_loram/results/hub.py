"""Putting files into a repository on the Hugging Face hub: in one commit, and resumably.

Large files go first, one by one: the hub keeps them by their SHA-256, so that what has arrived once
is not sent again. The commit that makes all of them visible comes last. (`upload_large_folder` of
huggingface_hub resumes too, but in several commits: a cut would leave part of a model visible.)
"""

from __future__ import annotations

import fnmatch
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axolotl_loram import __version__
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.find import hub_errors, reason
from axolotl_loram.results.checks import sha256_of

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

TRIES = 4
NOT_OURS = (".gitattributes", "README.md", "LICENSE*", "NOTICE*", "USE_POLICY*", "*.png", "*.svg")
"""Files that may differ or be there without making it another model."""


@dataclass(frozen=True)
class Repository:
    """A model repository, which need not exist yet.

    Attributes:
        name: ``org/name``.
        revision: Branch, None for the main one.
        public: Whether it is to be public; None: as it is, private if it is new.
    """

    name: str
    revision: str | None = None
    public: bool | None = False

    @cached_property
    def api(self) -> HfApi:
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

    def found(self, revision: str | None) -> ModelInfo | None:
        """What the hub has under this name at a revision, None if nothing."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        with telling(f"look up {self.name} on the hub"):
            try:
                return self.api.model_info(self.name, revision=revision, files_metadata=True)
            except (RepositoryNotFoundError, RevisionNotFoundError):
                return None

    def check_vacant(
        self, files: Mapping[str, Path], digests: Mapping[str, str], overwrite: bool
    ) -> list[str]:
        """Refuse a repository with another model, or one that is more public than asked for.

        Args:
            files: What will be uploaded.
            digests: SHA-256 of those that are known.
            overwrite: Whether another model may be replaced.

        Returns:
            Files of the other model that have to go.

        Raises:
            LoRAMError: It is not vacant.
        """
        there = self.found(None)
        if there is not None and there.private is False and self.public is False:
            raise LoRAMError(
                f"expected {self.name} to be private, found it public: pass --public to publish "
                "there, or choose another name"
            )
        branch = self.found(self.revision) if self.revision else there
        others = [
            sibling.rfilename
            for sibling in (branch.siblings or [] if branch else [])
            if not any(fnmatch.fnmatch(sibling.rfilename, pattern) for pattern in NOT_OURS)
            and not _same(sibling, files, digests)
        ]
        if others and not overwrite:
            raise LoRAMError(
                f"expected {self.name} to be new, empty or to hold this same model, found "
                f"{len(others)} other files in it ({', '.join(others[:3])}): choose another name, "
                "or pass --overwrite to replace them"
            )
        return [name for name in others if name not in files]

    def send(
        self,
        files: Mapping[str, Path],
        digests: Mapping[str, str],
        removed: list[str],
        message: str,
    ) -> dict[str, Any]:
        """Upload files, then make them visible in one commit.

        Args:
            files: Name in the repository → file.
            digests: SHA-256 that some must still have.
            removed: Names to take away in the same commit.
            message: Of the commit.

        Returns:
            "commit", "url" and "private".

        Raises:
            LoRAMError: A file changed meanwhile, or the hub or the connection failed.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        adding = [CommitOperationAdd(name, path) for name, path in files.items()]
        for operation in adding:
            expected = digests.get(operation.path_in_repo)
            if expected not in (None, operation.upload_info.sha256.hex()):
                raise LoRAMError(
                    f"expected {operation.path_in_repo} to stay as it was checked, found it "
                    "changed: let what writes to the folder end, and publish again"
                )
        with telling(f"upload to {self.name}"):
            self.api.create_repo(self.name, private=not self.public, exist_ok=True)
            if self.revision:
                self.api.create_branch(self.name, branch=self.revision, exist_ok=True)
            parent = self.api.model_info(self.name, revision=self.revision)
            for operation in adding:
                self._upload(operation)
            commit = self.api.create_commit(
                self.name,
                [*adding, *(CommitOperationDelete(name) for name in removed)],
                commit_message=message,
                revision=self.revision,
                parent_commit=parent.sha,
            )
        url = f"{self.api.endpoint}/{self.name}"
        return {"commit": commit.oid, "url": url, "private": bool(parent.private)}

    def _upload(self, operation: CommitOperationAdd) -> None:
        """Upload a file, if it is a large one that the hub has not; small ones go in the commit.

        huggingface_hub tries again itself, but not where the server hangs up without an answer.
        """
        from httpx import RemoteProtocolError

        for tried in range(TRIES):
            try:
                self.api.preupload_lfs_files(self.name, [operation], revision=self.revision)
                return
            except RuntimeError as error:
                sys.stderr.write("\n")  # huggingface_hub leaves the line with its bar open
                if tried + 1 == TRIES or not isinstance(error.__cause__, RemoteProtocolError):
                    raise
                time.sleep(2**tried)


def full_name(repository: str) -> str:
    """``name`` → ``user/name``, as Axolotl's hub_model_id may leave the user out."""
    if "/" in repository:
        return repository
    with telling("ask the hub who you are"):
        return f"{Repository(repository).api.whoami()['name']}/{repository}"


@contextmanager
def telling(what: str) -> Iterator[None]:
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


def _same(sibling: RepoSibling, files: Mapping[str, Path], digests: Mapping[str, str]) -> bool:
    """Whether a file of the repository is what will be uploaded under its name."""
    from huggingface_hub.utils.sha import git_hash

    name = sibling.rfilename
    if name not in files:
        return False
    if sibling.lfs is not None:
        return sibling.lfs.sha256 == (digests.get(name) or sha256_of(files[name]))
    return sibling.blob_id == git_hash(files[name].read_bytes())
