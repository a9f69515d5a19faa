"""Pruned models made on the way to training, each once per base, settings and calibration text."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from axolotl_loram.architecture.config_json import load_config, sizes_of
from axolotl_loram.architecture.pairing import fingerprint_of
from axolotl_loram.architecture.plan import SCHEMA_VERSION
from axolotl_loram.config import FillArgs, Pruning, PruningArgs
from axolotl_loram.files.atomic import made_once
from axolotl_loram.files.find import find_folder, user_path
from axolotl_loram.files.progress import progress_bar
from axolotl_loram.pruning.prune import check_prunable, prune, resolve
from axolotl_loram.text.calibration import Calibration, load_calibration, pack_checked

LOG = logging.getLogger(__name__)
Rows = Callable[[], Iterator[list[int]]]
"""Gives the token ids of the run's own training data."""
OWN_TEXT = "the run's datasets"
"""What records call them."""


def prune_into_cache(
    model: str,
    revision: str | None,
    settings: PruningArgs,
    cache_dir: str | None = None,
    rows: Rows | None = None,
) -> Path:
    """The folder of the pruned model for these settings, made by whichever process comes first.

    What the settings leave open is settled here; `rows` are what to calibrate on where they name no
    text. The cache is `cache_folder(cache_dir)`.
    """
    cache, base = cache_folder(cache_dir), find_folder(model, revision)
    config = load_config(str(base))
    settled = resolve(settings, config, own_text=rows is not None)
    check_prunable(model, config, settled)
    calibration = None
    if settled.needs_calibration:
        calibration = calibrate(settled, base, rows, settings.calibration_length is None)
    stem = re.sub(r"[^\w.-]+", "-", model.rstrip("/").split("/")[-1])

    def make(folder: Path) -> None:
        LOG.info("pruning %s into %s", model, folder)
        with progress_bar("pruning") as progress:
            prune(model, folder, settled, revision, False, progress, calibration)

    how = settled.model_dump(exclude={"device"})
    read = calibration and calibration.record()
    identity = [SCHEMA_VERSION, fingerprint_of(base), how, read]
    what = "layers" if settled.whole_layers else settled.method
    return made_once(cache / f"{stem}-{what}", identity, make)


def cache_folder(named: str | None) -> Path:
    """The folder that is named, or $AXOLOTL_LORAM_CACHE, or ~/.cache/axolotl-loram."""
    default = os.environ.get("AXOLOTL_LORAM_CACHE", "~/.cache/axolotl-loram")
    return user_path(named or default)


def calibrate(
    settings: Pruning, base: Path, rows: Rows | None, shrink: bool = False
) -> Calibration:
    """The text to prune by: what the settings name, or the run's own training data."""
    if settings.calibration_path is not None or rows is None:
        return load_calibration(settings, base)
    return own_text(settings, base, rows, shrink)


def own_text(
    settings: Pruning | FillArgs, base: Path, rows: Rows, shrink: bool = False
) -> Calibration:
    """The run's own training data as calibration text; `shrink` as in `pack_rows`."""
    size = sizes_of(load_config(str(base)))["vocabulary"]
    known = ([token for token in row if token < size] for row in rows())  # none that the run adds
    return pack_checked(known, settings, base, OWN_TEXT, shrink=shrink)
