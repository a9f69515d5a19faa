"""What cannot be written is said in one sentence."""

import pytest

from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.atomic import made_once


def test_a_cache_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    for parent in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(LoRAMError, match=r"a folder to write in, found .*cache_dir"):
            made_once(parent / "model", [], lambda folder: folder.mkdir())
    folder = made_once(tmp_path / "new/model", [], lambda folder: folder.mkdir())
    assert made_once(tmp_path / "new/model", [], lambda folder: pytest.fail()) == folder
