import os
import shutil

import pytest
from hub_server import Hub, Repo
from huggingface_hub import constants

from axolotl_loram.config import PruningArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.find import find_folder, user_path
from axolotl_loram.pruning.prune import prune

TAKEN = ("config.json", "model.safetensors", "additional_chat_templates/tool_use.jinja")
LEFT = ("consolidated.safetensors", "consolidated.00.pth", "original/model.safetensors", "x.gguf")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = Hub()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield server
    server.shutdown()


def test_weights_are_downloaded_once_and_not_in_other_formats_again(hub):
    repo = hub.repos["org/model"] = Repo(private=False)
    files = {path: (hub.keep(path.encode()), False) for path in (*TAKEN, *LEFT)}
    repo.commit("main", files)
    folder = find_folder("org/model")
    found = {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}
    assert found == set(TAKEN) == set(hub.got)


def test_a_home_that_is_not_known_is_said(monkeypatch):
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as where HOME is unset
    with pytest.raises(LoRAMError, match="expected a home folder for '~/text'"):
        user_path("~/text")


def test_names_that_no_record_holds_are_refused(make_model, tmp_path):
    folder = tmp_path / os.fsdecode(b"model-\xff")
    shutil.copytree(make_model(), folder)
    with pytest.raises(LoRAMError, match=r"in UTF-8, found b'.*model-\\xff': rename the folder"):
        prune(str(folder), tmp_path / "out", PruningArgs(ratio=0.5))
    assert not (tmp_path / "out").exists()
