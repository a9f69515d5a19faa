import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from conftest import build_model, byte_tokenizer
from hub_server import TOKEN, Hub
from huggingface_hub import constants
from test_recover import linear_shapes, write_adapter

from axolotl_loram.architecture.pairing import check_pruned
from axolotl_loram.architecture.plan import PruningPlan
from axolotl_loram.cli import main
from axolotl_loram.config import PruningArgs
from axolotl_loram.config_loram import LoRAMArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.find import find_folder
from axolotl_loram.pruning.prune import prune
from axolotl_loram.recovery.recover import recover
from axolotl_loram.results.publish import Publication, publish_adapter

REPO = "some-org/pico-loram-0.5"
BASE = "some-org/pico"


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A pruned model in four shards, of a base with a card that names a licence."""
    folder = tmp_path_factory.mktemp("publish")
    build_model().save_pretrained(folder / "base", max_shard_size="60KB")
    byte_tokenizer().save_pretrained(folder / "base")
    (folder / "base/README.md").write_text("---\nlicense: apache-2.0\n---\n# Pico\n")
    prune(str(folder / "base"), folder / "pruned", PruningArgs(ratio=0.5))
    return folder / "pruned"


@pytest.fixture(scope="module")
def adapter(pruned):
    plan = PruningPlan.load(pruned)
    folder = pruned.parent / "adapter"
    write_adapter(folder, linear_shapes(plan.pruned_config), 2, torch.bfloat16, str(pruned))
    return Path(recover(folder, output=pruned.parent / "recovered")["output"])


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No token, and no hub within reach."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.fixture
def hub(offline, monkeypatch):
    """A hub of our own, that this process talks to with its token."""
    server = Hub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()


@pytest.fixture
def no_waiting(monkeypatch):
    """huggingface_hub tries again after 1, 2, 4, 8 and 8 seconds."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def command(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def test_what_is_published_is_the_folder_its_card_and_plot(pruned, hub):
    before = contents(pruned)
    result = command("publish", pruned, REPO, "--base", BASE, "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert (told["private"], hub.repos[REPO].private) == (True, True)
    there = hub.files(REPO)
    assert told["commit"] == hub.repos[REPO].branches["main"]
    assert told["files"] == {name: len(there[name]) for name in told["files"]}
    added = {name: there.pop(name) for name in ("README.md", "kept_width.png", ".gitattributes")}
    assert there == before == contents(pruned)  # byte by byte, and the folder as it was
    assert added["kept_width.png"].startswith(b"\x89PNG")
    assert any(name.startswith("model-0000") and b"lora" not in there[name] for name in there)
    commits, sent = len(hub.repos[REPO].commits), len(hub.sent)
    assert command("publish", pruned, REPO, "--base", BASE).exit_code == 0
    assert (len(hub.repos[REPO].commits), len(hub.sent)) == (commits, sent)


def test_users_inspect_verify_and_train_on_it(pruned, hub, monkeypatch):
    Publication(pruned, REPO, base=BASE, revision="v1").publish()
    assert hub.files(REPO).keys() == {".gitattributes"}  # the branch alone has it
    assert command("inspect", REPO).exit_code == 1
    shown = json.loads(command("inspect", REPO, "--revision", "v1", "--json").stdout)
    assert shown["pruned_layers"] == 2
    assert set(hub.got) == {"config.json", "loram.json", "loram_plan.safetensors"}
    result = command("inspect", REPO, "--revision", "v1", "--verify", "--json")
    checks = {check["name"]: check["outcome"] for check in json.loads(result.stdout)["checks"]}
    assert result.exit_code == 0 and set(checks.values()) == {"ok"} and "base" in checks
    folder = find_folder(REPO, "v1")  # as training does
    check_pruned(folder, PruningPlan.load(folder))
    downloaded = contents(folder)
    assert downloaded == {name: hub.files(REPO, "v1")[name] for name in downloaded}
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "empty"))
    monkeypatch.delenv("HF_TOKEN")  # a stranger sees nothing of a private repository
    with pytest.raises(LoRAMError, match="Repository Not Found"):
        find_folder(REPO, "v1", ["README.md"])


def test_an_upload_that_is_cut_once_goes_on_by_itself(pruned, hub, no_waiting):
    hub.cut = lambda number: number == 3
    Publication(pruned, REPO, base=BASE).publish()
    assert contents(pruned).items() <= hub.files(REPO).items()
    assert len({blob for blob, _ in hub.sent}) == 6  # four shards, the plan, the plot


def test_what_has_arrived_is_not_sent_again(pruned, hub, no_waiting):
    hub.cut = lambda number: number >= 4  # in the second shard, and from then on
    result = command("publish", pruned, REPO, "--base", BASE)
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error")]
    assert "model-00002" in line and "run the same command again" in line
    assert hub.files(REPO).keys() == {".gitattributes"}  # nothing of it is visible
    assert "config.json, adapter_config.json or loram.json" in command("inspect", REPO).stderr
    arrived = {blob for blob, _ in hub.sent if blob in hub.blobs}
    assert len(arrived) == 2  # the plan and the first shard
    hub.cut = lambda number: False
    first = len(hub.sent)
    assert command("publish", pruned, REPO, "--base", BASE).exit_code == 0
    assert not arrived & {blob for blob, _ in hub.sent[first:]}
    once = {blob: len(hub.blobs[blob]) for blob in arrived}
    sent = sum(size for blob, size in hub.sent if blob in arrived)
    assert sent == sum(once.values())
    assert contents(pruned).items() <= hub.files(REPO).items()


def test_a_download_that_is_cut_is_one_sentence_and_goes_on(pruned, hub, no_waiting):
    Publication(pruned, REPO, base=BASE).publish()
    hub.cut_download = lambda path: path.startswith("model-00003")
    with pytest.raises(LoRAMError, match="no such model: expected a folder"):
        find_folder(REPO)
    hub.cut_download = lambda path: False
    before = len(hub.got)
    folder = find_folder(REPO)
    assert "model-00001-of-00004.safetensors" not in hub.got[before:]
    check_pruned(folder, PruningPlan.load(folder))


def test_a_rehearsal_needs_no_hub(pruned, offline, tmp_path):
    output = tmp_path / "card"
    result = command("publish", pruned, REPO, "--base", BASE, "--dry-run", "--output", output)
    assert result.exit_code == 0, result.stderr
    assert {file.name for file in output.iterdir()} == {
        "README.md",
        "kept_width.png",
        "upload.json",
    }
    listed = json.loads((output / "upload.json").read_text())
    assert listed["files"].keys() == contents(pruned).keys() | {"README.md", "kept_width.png"}
    assert listed["bytes"] == sum(listed["files"].values())
    assert listed["private"] is True
    _, front, card = (output / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": BASE,
        "license": "apache-2.0",
        "library_name": "transformers",
        "tags": ["axolotl", "loram", "lora", "pruned"],
    }
    settings = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert settings["base_model"] == BASE
    assert LoRAMArgs(loram=settings["loram"]).loram.pruned_model_path == REPO
    for part in (
        "47,904 to 40,224 parameters",
        "| 1–2 | 24 of 48 | 1 of 2 |",
        "import axolotl_loram.heterogeneous",
        "Not aligned",
        "Not measured.",
        "![Share of each layer that is kept](kept_width.png)",
        f"axolotl-loram inspect {REPO} --verify",
    ):
        assert part in card


def test_the_card_tells_what_was_measured(pruned, offline, tmp_path):
    folder = Path(shutil.copytree(pruned, tmp_path / "aligned"))
    record = json.loads((folder / "loram.json").read_text())
    alignment = {
        "objective": "next-token",
        "data": [{"path": "HuggingFaceFW/fineweb"}],
        "steps": 20,
        "tokens": 4_000,
        "heldout_loss": {"before": 3.5, "after": 3.25, "tokens": 512},
    }
    errors = {"heldout_error_before": 0.008, "heldout_error_after": 0.002, "accepted": True}
    added = {"alignments": [alignment], "rounding": {"model.layers.0.mlp.up_proj.weight": errors}}
    (folder / "loram.json").write_text(json.dumps(record | added))
    loss = {"loss": 2.0, "standard_error": 0.01, "perplexity": 7.389}
    evaluation = {
        "plan": record["plan"],
        "perplexity": {"alpaca": {"kind": "out_of_domain", "models": {"base+recovered": loss}}},
        "tasks": {
            "piqa": {
                "metric": "acc,none",
                "models": {"base": {"value": 0.75, "standard_error": 0.02}},
            }
        },
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    told = Publication(folder, REPO).rehearse()
    assert "evaluation.json" in told["files"]
    card = (tmp_path / "aligned-card/README.md").read_text()
    for part in (
        "next-token, 20 steps, 4,000 tokens, of HuggingFaceFW/fineweb",
        "3.5000 before, 3.2500 after, over 512 tokens",
        "1 of 1 weights, held-out error of their outputs 0.008 → 0.002 (squared, relative)",
        "| alpaca (out of domain) | 7.389 ± 0.074 |",
        "| piqa (acc,none) | 0.75 ± 0.02 |",
    ):
        assert part in card
    assert "base_model" not in card.split("---\n")[1]  # the hub refuses a folder there
    evaluation["plan"] = "sha256:other"
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    with pytest.raises(LoRAMError, match=r"to be of plan sha256"):
        Publication(folder, REPO, overwrite=True).rehearse()


def test_only_the_files_of_an_adapter_are_uploaded(adapter, hub):
    for name in ("optimizer.pt", "training_args.json", "notes.txt"):
        (adapter / name).write_bytes(b"private")
    try:
        sent = publish_adapter(adapter, "adapter")  # a name of the user's own
    finally:
        for name in ("optimizer.pt", "training_args.json", "notes.txt"):
            (adapter / name).unlink()
    assert sent["repository"] == "me/adapter" and hub.repos["me/adapter"].private
    names = {"adapter_config.json", "adapter_model.safetensors", "loram.json", "README.md"}
    assert set(hub.files("me/adapter")) == names | {".gitattributes"}
    result = command("inspect", "me/adapter", "--verify", "--json")
    checks = {check["name"]: check["outcome"] for check in json.loads(result.stdout)["checks"]}
    assert result.exit_code == 0 and checks["shapes"] == checks["files"] == "ok"


def test_another_model_is_not_replaced_unasked(pruned, adapter, hub):
    Publication(pruned, REPO, base=BASE).publish()
    before = hub.repos[REPO].branches["main"]
    result = command("publish", adapter, REPO)
    assert result.exit_code == 1 and "--overwrite" in result.stderr
    assert hub.repos[REPO].branches["main"] == before
    assert command("publish", adapter, REPO, "--overwrite").exit_code == 0
    there = hub.files(REPO)
    assert there["adapter_model.safetensors"] and "loram_plan.safetensors" not in there
    assert not any(name.startswith("model-") for name in there)


def test_a_public_repository_is_not_taken_for_a_private_one(pruned, hub):
    Publication(pruned, REPO, base=BASE, public=True).publish()
    assert hub.repos[REPO].private is False
    with pytest.raises(LoRAMError, match="found it public"):
        Publication(pruned, REPO, base=BASE).publish()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{pruned}", "pico"), "org/name"),
        (("{pruned}", "a/b/c"), "org/name"),
        (("{pruned}", "./a"), "org/name"),
        (("{pruned}", REPO, "--base", "./base"), "--base as a hub id"),
        (("{base}", REPO), "loram.json"),
        (("{pruned}", REPO), "expected a token for the hub"),
    ],
)
def test_wrong_use_is_one_line(arguments, message, pruned, offline):
    places = {"pruned": pruned, "base": pruned.parent / "base"}
    result = command("publish", *(argument.format(**places) for argument in arguments))
    assert result.exit_code == 1 and message in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("Error")]) == 1


def test_damaged_and_telltale_folders_stay_here(pruned, hub, tmp_path):
    folder = Path(shutil.copytree(pruned, tmp_path / "copy"))
    shard = folder / "model-00002-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    with pytest.raises(LoRAMError, match=r"model-00002\S+ has SHA-256"):
        Publication(folder, REPO).publish()
    shard.write_bytes((pruned / shard.name).read_bytes())
    card = tmp_path / "mine.md"
    card.write_text(f"# Mine\n\nuse hf_{'A1' * 17}\n")
    with pytest.raises(LoRAMError, match="found one in README"):
        Publication(folder, REPO, card=card).publish()
    record = json.loads((folder / "loram.json").read_text())
    (folder / "id_rsa").write_text("secret")
    record["files"]["id_rsa"] = "0" * 64
    (folder / "loram.json").write_text(json.dumps(record))
    with pytest.raises(LoRAMError, match="only files of a checkpoint"):
        Publication(folder, REPO).publish()
    assert not hub.repos and not hub.sent
