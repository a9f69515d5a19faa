"""Small artefacts of every kind, as this version writes them; kept in tests/support/golden.

    python tests/support/golden.py NAME    # makes golden/NAME, once for each schema version

What is there is never made again: later versions must open it as it is (test_golden.py).
The base's folder that they name, in a temporary one, is on no machine.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).with_name("golden")
SIZES = {"hidden_size": 16, "intermediate_size": 24, "head_dim": 8}


def make(folder: Path) -> None:
    """A base, a pruned model with its refit, an adapter as trained, and two recoveries."""
    import torch
    from calibrated import load, text_tokens
    from conftest import build_model, byte_tokenizer
    from peft import LoraConfig, get_peft_model
    from test_recover import randomize

    from axolotl_loram.config import FillArgs, PruningArgs
    from axolotl_loram.pruning.prune import prune
    from axolotl_loram.recovery.fitted import recover_fitted
    from axolotl_loram.recovery.recover import recover
    from axolotl_loram.text.calibration import Calibration

    folder.mkdir(parents=True)
    os.chdir(folder)
    build_model(**SIZES).half().save_pretrained("base")
    byte_tokenizer().save_pretrained("base")
    text = Calibration(text_tokens(samples=16, length=32), "a test", 0)
    settings = PruningArgs(ratio=0.5, method="activation", device="cpu", calibration_path="text")
    prune("base", Path("pruned"), settings, calibration=text)
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(load(Path("pruned")), config)
    randomize(model)
    model.save_pretrained("adapter")
    recover(Path("adapter"), output=Path("recovered"))
    fitted = FillArgs(fill="fitted", calibration_path="a test", device="cpu")
    recover_fitted(Path("adapter"), fitted, output=Path("fitted"), calibration=text)


if __name__ == "__main__":
    made, kept = Path(tempfile.gettempdir(), "golden"), HERE.resolve() / sys.argv[1]
    make(made)
    kept.parent.mkdir(exist_ok=True)
    shutil.move(made, kept)
