"""The command line: `axolotl-loram …`, and the same commands as `axolotl loram …`.

Heavy imports are inside the commands, so that `--help` and a bad option answer at once.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click

from axolotl_loram import __version__
from axolotl_loram.args import PruningArgs
from axolotl_loram.errors import LoRAMError


class OneLineErrors(click.Group):
    """Ends in one line and exit status 1 where the input is wrong, unless --debug."""

    def invoke(self, context: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(context)
        except LoRAMError as error:
            if context.params.get("debug"):
                raise
            raise click.ClickException(str(error)) from None


@click.group(cls=OneLineErrors)
@click.version_option(__version__, prog_name="axolotl-loram")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def main(debug: bool) -> None:
    """LoRAM: prune a model, train LoRA on it with Axolotl, recover the adapter for the original."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.DEBUG if debug else logging.WARNING,
        format="%(levelname)s: %(message)s",
    )


def run() -> None:
    """Entry point of `axolotl-loram`."""
    main(prog_name="axolotl-loram")


def pruning_options(command: Callable) -> Callable:
    """One option for each field of `PruningArgs`, with the field's description as help."""
    names = {"ratio": "--pruning-ratio"}
    for name, field in reversed(PruningArgs.model_fields.items()):
        choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        kinds: dict[Any, Any] = {float | None: float, str | None: str, int: int}
        command = click.option(
            names.get(name, f"--{name.replace('_', '-')}"),
            name,
            type=click.Choice(choices) if choices else kinds[field.annotation],
            default=field.default,
            show_default=field.default is not None,
            help=field.description,
        )(command)
    return command


def parse_pruning(options: dict[str, Any]) -> PruningArgs:
    """Options as settings; a value that is not allowed is wrong use."""
    try:
        return PruningArgs.parse(**options)
    except LoRAMError as error:
        raise click.UsageError(str(error)) from None


json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on standard output, only that."
)
revision_option = click.option("--revision", help="Branch, tag or commit on the hub.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace an existing output.")


@main.command()
@click.argument("model")
@pruning_options
@revision_option
@json_option
def plan(model: str, revision: str | None, as_json: bool, **pruning: Any) -> None:
    """Count what pruning MODEL would leave (a folder, a config.json or a hub id)."""
    settings = parse_pruning(pruning)
    from axolotl_loram.plan import PruningPlan, keep_counts, summary
    from axolotl_loram.reference import read_indices
    from axolotl_loram.sources import load_config

    config = load_config(model, revision)
    if settings.indices:
        counts = PruningPlan(config, read_indices(Path(settings.indices), config)).counts
    else:
        assert settings.ratio is not None
        counts = keep_counts(config, settings.ratio, settings.protect_first, settings.protect_last)
    show(summary(config, counts), as_json)


@main.command()
@click.argument("model")
@click.argument("output", type=click.Path(path_type=Path))
@pruning_options
@revision_option
@overwrite_option
@json_option
def prune(
    model: str,
    output: Path,
    revision: str | None,
    overwrite: bool,
    as_json: bool,
    **pruning: Any,
) -> None:
    """Write the pruned version of MODEL (a folder or a hub id) to the folder OUTPUT."""
    settings = parse_pruning(pruning)
    from axolotl_loram.progress import progress_bar
    from axolotl_loram.prune import prune as prune_model

    with progress_bar("pruning") as progress:
        record = prune_model(model, output, settings, revision, overwrite, progress)
    show({"output": str(output), **record["parameters"], "plan": record["plan"]}, as_json)


@main.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--pruned-model", help="Folder or hub id; by default what the adapter names.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Folder to write, by default recovered-… beside ADAPTER.",
)
@overwrite_option
@json_option
def recover(
    adapter: Path, pruned_model: str | None, output: Path | None, overwrite: bool, as_json: bool
) -> None:
    """Turn ADAPTER, trained on a pruned model, into an adapter for the original model."""
    from axolotl_loram.recover import recover as recover_adapter

    record = recover_adapter(adapter, pruned_model, output, overwrite=overwrite)
    shown = {"output": record["output"], "base": record["base"]["id"], "plan": record["plan"]}
    show(shown, as_json)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@json_option
def inspect(folder: Path, as_json: bool) -> None:
    """Tell what FOLDER is: a pruned model, or an adapter trained on one or recovered from one."""
    from axolotl_loram.pairing import check_pruned, read_record
    from axolotl_loram.plan import PLAN_FILE, PruningPlan, summary

    record = read_record(folder)
    if not record:
        raise LoRAMError(f"expected a folder with loram.json, found none in {folder}")
    shown = {"kind": record["kind"], "base": record["base"]["id"], "plan": record["plan"]}
    if (folder / PLAN_FILE).exists():
        found = PruningPlan.load(folder)
        check_pruned(folder, found)
        shown |= summary(found.config, found.counts)
    show(shown, as_json)


def show(result: dict[str, Any], as_json: bool) -> None:
    """Print a result as one JSON object, or as lines of name and value for people."""
    if as_json:
        click.echo(json.dumps(result))
        return
    width = max(len(name) for name in result)
    for name, value in result.items():
        text = f"{value:,}" if isinstance(value, int) else value
        click.echo(f"{name.replace('_', ' '):<{width}}  {text}")


if __name__ == "__main__":
    run()
