"""What leaves this machine, and what comes with the package."""

import importlib.metadata
import json
import re
import socket
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import write_yaml
from packaging.requirements import Requirement

from axolotl_loram.cli import main
from axolotl_loram.config import FillArgs, PruningArgs, Section
from axolotl_loram.config_loram import LoRAMConfig
from axolotl_loram.results.secrets import without_secrets

ROOT = Path(__file__).resolve().parents[2]
PRIVATE = "/home/somebody/private"
SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")
SECRET = "hf_" + "s3cret" * 6


def assert_no_secret(folder: Path) -> None:
    """No file below a folder has the secret in it."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert files and not [file for file in files if SECRET.encode() in file.read_bytes()]


@pytest.fixture
def telemetry(monkeypatch):
    """What Axolotl's telemetry, switched on, gives to its client to send."""
    import posthog
    from axolotl.cli.config import TELEMETRY_MANAGER
    from axolotl.telemetry import errors, manager

    sent = []
    monkeypatch.setattr(posthog, "capture", lambda **event: sent.append(event))
    manager.FIELDS_TO_REDACT.difference_update(("exception", "stack_trace"))  # by earlier tests
    monkeypatch.setattr(errors, "ERROR_HANDLED", False)
    for name, value in {
        "enabled": True,
        "run_id": "a test",
        "whitelist": TELEMETRY_MANAGER._load_whitelist(),
        "system_info": {},
    }.items():
        monkeypatch.setattr(TELEMETRY_MANAGER, name, value, raising=False)
    return sent


def paths_of(section: type[Section]) -> list[str]:
    """Keys of a section that take any text: what may be a path."""
    return [
        name
        for name, field in section.model_fields.items()
        if field.annotation in (str, str | None) and not name.endswith("_revision")
    ]


@pytest.mark.parametrize("section", [LoRAMConfig, PruningArgs, FillArgs])
def test_keys_that_hold_paths_are_named_so(section):
    keys = paths_of(section)
    assert keys and all(key.endswith(("_path", "_dir")) for key in keys)


def test_telemetry_gets_no_path(telemetry, settings, make_model, tmp_path):
    """The YAML as read and as processed, and an error about a file that it names."""
    from axolotl.cli.config import load_cfg

    pruning = {"ratio": 0.5, "method": "taylor", "calibration_path": f"{PRIVATE}/text.jsonl"}
    watched = {"evaluate_recovered_every": 5, "evaluate_recovered_path": f"{PRIVATE}/held.jsonl"}
    loram = {"pruning": pruning, "cache_dir": f"{PRIVATE}/cache", **watched}
    file = write_yaml(tmp_path / "a.yml", settings(make_model(), loram=loram))
    load_cfg(str(file))
    section = {"pruned_model_path": f"{PRIVATE}/pruned", "recovery": f"{PRIVATE}/oops"}
    with pytest.raises(Exception, match=f"{PRIVATE}/oops"):
        load_cfg(str(write_yaml(file, settings(make_model(), loram=section))))
    names = [event["event"] for event in telemetry]
    assert names.count("config-loaded") == 2 and "config-processed" in names
    assert any(name.endswith("-error") for name in names)
    first, *others = telemetry
    assert first["properties"]["loram"]["pruning"]["method"] == "taylor"  # it sends what it may
    others = [event for event in others if event["event"] != "config-loaded"]
    assert PRIVATE not in json.dumps([first, *others], default=str)


def test_folders_need_no_network_and_keep_no_secret(make_model, tmp_path, monkeypatch):
    """With the hub allowed, commands that are given folders connect to nothing."""

    def refused(self, address):
        raise AssertionError(f"connected to {address}")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in SECRETS:
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    base, pruned = str(make_model()), str(tmp_path / "pruned")
    for command in (
        ["plan", base, "--pruning-ratio", "0.5"],
        ["prune", base, pruned, "--pruning-ratio", "0.5"],
        ["inspect", pruned, "--verify"],
        ["publish", pruned, "org/name", "--dry-run"],
        ["report", pruned, "--output", str(tmp_path / "report.html")],
    ):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, (command, result.output)
        assert SECRET not in result.output
    assert_no_secret(tmp_path)


def test_offline_is_respected(tmp_path, monkeypatch):
    """A hub id that is not in the cache is refused, and nothing connects."""

    def refused(self, address):
        raise AssertionError(f"connected to {address}")

    monkeypatch.setattr(socket.socket, "connect", refused)
    for command in (
        ["plan", "org/name", "--pruning-ratio", "0.5"],
        ["prune", "org/name", str(tmp_path / "out"), "--pruning-ratio", "0.5"],
        ["inspect", "org/name", "--verify"],
    ):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 1 and "offline" in result.output.lower(), result.output


def test_secrets_of_a_yaml_are_hidden_in_the_card():
    shown = ["base_model: a/b", "special_tokens:", "  pad_token: <pad>", "max_tokens: 5", "key:"]
    secret = [f"hub_token: {SECRET}", "  comet_api_key: abc  # mine", "- password: 'x y'", "key: v"]
    text = without_secrets("\n".join([*shown, *secret, f"note: see {SECRET}"]))
    assert text.split("\n") == [
        *shown,
        *("hub_token: [hidden]", "  comet_api_key: [hidden]", "- password: [hidden]"),
        *("key: [hidden]", "note: see [hidden]"),
    ]


def requirements() -> set[str]:
    """Names of all direct dependencies, extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    listed = [*project["dependencies"], *(name for extra in extras for name in extra)]
    return {Requirement(line).name for line in listed} - {"axolotl-loram"}


def test_licences_are_listed():
    """Every direct dependency, with the licence that the installed package declares."""
    text = (ROOT / "LICENSES.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([^`]+)` \| ([^|]+?) \|", text, re.MULTILINE))
    assert set(rows) == requirements()
    for name, licence in rows.items():
        try:
            metadata = importlib.metadata.metadata(name)
        except importlib.metadata.PackageNotFoundError:
            assert name == "flash-attn"  # it needs CUDA to be built
            continue
        classified = [
            line.rpartition(" :: ")[2]
            for line in metadata.get_all("Classifier", [])
            if line.startswith("License ::")
        ]
        files = [
            file.read_text()
            for file in importlib.metadata.files(name) or []
            if "dist-info" in str(file) and file.name.startswith("LICENSE")
        ]
        declared = [metadata.get("License-Expression") or "", metadata.get("License") or ""]
        declared = " ".join([*declared, *classified, *files]).lower()
        first = re.split(r"[ -]", licence)[0].lower()
        assert first in declared, (name, licence, declared[:200])
