"""The commands about the package itself: `examples` and `schema`. Neither imports torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import click

from axolotl_loram.cli_options import PATH, json_option
from axolotl_loram.config_loram import LoRAMArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.atomic import new_folder

SHIPPED = Path(__file__).resolve().parent / "shipped"
"""In a checkout, links to examples/ and deepspeed_configs/; in a wheel, their files."""


@click.command()
@click.argument("folder", type=PATH, default="loram-examples")
@json_option
def examples(folder: Path, as_json: bool) -> None:
    """Write the example YAMLs and DeepSpeed configurations to the new FOLDER (loram-examples).

    Run them in it: a YAML names its DeepSpeed file from there.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise LoRAMError(
            f"expected {folder} to be new or empty, found files in it: choose another folder"
        )
    with new_folder(folder) as scratch:
        for part in sorted(SHIPPED.iterdir()):
            without = shutil.ignore_patterns("__pycache__")
            shutil.copytree(part, scratch / part.name, ignore=without)
        files = sorted(str(f.relative_to(scratch)) for f in scratch.rglob("*") if f.is_file())
    shown = [str(folder / name) for name in files]
    click.echo(json.dumps({"output": str(folder), "files": files}) if as_json else "\n".join(shown))


@click.command()
def schema() -> None:
    """Print the JSON schema of the `loram:` section, for editors.

    In an Axolotl YAML, yaml-language-server takes it by the first line
    `# yaml-language-server: $schema=loram.schema.json`; every other key is left to Axolotl.
    """
    text = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    click.echo(json.dumps(text | LoRAMArgs.model_json_schema(), indent=2, ensure_ascii=False))
