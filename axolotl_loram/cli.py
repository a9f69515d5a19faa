"""The command line: `axolotl-loram …`, and the same commands as `axolotl loram …`.

Heavy imports are inside the commands, so that `--help` and a bad option answer at once.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
from pydantic import BaseModel

from axolotl_loram import __version__
from axolotl_loram.args import FillArgs, PruningArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.tables import lines
from axolotl_loram.training import TrainingArgs


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


def schema_options(schema: type[BaseModel], names: Mapping[str, str]) -> Callable:
    """A decorator that adds one option for each described field, with the description as help.

    Args:
        schema: The settings.
        names: Field → flag, where that is not the field's own name.
    """

    def add(command: Callable) -> Callable:
        for name, field in reversed(schema.model_fields.items()):
            if field.description is None:
                continue
            flag = names.get(name, f"--{name.replace('_', '-')}")
            given = [kind for kind in get_args(field.annotation) if kind is not type(None)]
            kind: Any = field.annotation if isinstance(field.annotation, type) else given[-1]
            if get_origin(field.annotation) is Literal or get_origin(kind) is Literal:
                kind = click.Choice(get_args(kind) or given)
            command = click.option(
                f"{flag}/--no-{flag[2:]}" if kind is bool and field.default is not False else flag,
                name,
                is_flag=kind is bool,
                type=kind,
                default=None,  # the schema's own defaults hold, which depend on one another
                show_default=str(field.default) if field.default not in (None, False) else False,
                help=field.description,
            )(command)
        return command

    return add


pruning_options = schema_options(PruningArgs, {"ratio": "--pruning-ratio"})
training_options = schema_options(TrainingArgs, {})
fill_options = schema_options(FillArgs, {})


def parse_pruning(options: dict[str, Any]) -> PruningArgs:
    """Options as settings; a value that is not allowed is wrong use."""
    try:
        return PruningArgs.parse(**{k: v for k, v in options.items() if v is not None})
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
@training_options
@click.option(
    "--adapter",
    type=click.Choice(["loram", "qloram"]),
    help="What --fit is for; by default what a YAML says, else qloram.",
)
@click.option("--fit", metavar="SIZE", help="Find the smallest pruning ratio that fits, in 20GiB.")
@click.option(
    "--plot", type=click.Path(path_type=Path), help="Draw the memory of the methods to this file."
)
@revision_option
@json_option
def plan(
    model: str,
    revision: str | None,
    adapter: str | None,
    fit: str | None,
    plot: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Count what pruning MODEL would leave, and predict the memory of training.

    MODEL is a folder, a config.json, a hub id, or an Axolotl YAML, which says everything else too.
    The memory is that of one GPU for LoRA, QLoRA, LoRAM and QLoRAM.
    """
    from axolotl_loram.request import request

    try:
        asked = request(model, revision, options, adapter, fit)
    except LoRAMError as error:
        raise click.UsageError(str(error)) from None
    from axolotl_loram import planning

    result = planning.plan(asked)
    if plot is not None:
        from axolotl_loram.plotting import plot_memory

        plot_memory(result["methods"], plot, Path(model).name)
    click.echo(json.dumps(result) if as_json else planning.report(result))


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
    from axolotl_loram.records import refit_summary

    with progress_bar("pruning") as progress:
        record = prune_model(model, output, settings, revision, overwrite, progress)
    shown = {"output": str(output), **record["parameters"], **refit_summary(record["refit"] or {})}
    show({**shown, "weight_bytes": record["weight_bytes"], "plan": record["plan"]}, as_json)


@main.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--pruned-model", help="Folder or hub id; by default what the adapter names.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Folder to write, by default recovered-… (with --masked merged-…) beside ADAPTER.",
)
@click.option(
    "--masked",
    is_flag=True,
    help="Write the original model itself, with the masked update that was trained on a sparse one "
    "added to its weights.",
)
@fill_options
@overwrite_option
@json_option
def recover(
    adapter: Path,
    pruned_model: str | None,
    output: Path | None,
    masked: bool,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Turn ADAPTER, trained on a pruned model, into an adapter for the original model."""
    try:
        settings = FillArgs.parse(**{k: v for k, v in options.items() if v is not None})
    except LoRAMError as error:
        raise click.UsageError(str(error)) from None
    if masked and settings.fill != "zeros":
        raise click.UsageError(f"expected --fill zeros with --masked, found {settings.fill}")
    if settings.fill != "zeros":
        from axolotl_loram.fill import recover_filled
        from axolotl_loram.progress import progress_bar

        with progress_bar("recovering") as progress:
            record = recover_filled(adapter, settings, pruned_model, output, overwrite, progress)
    elif masked:
        from axolotl_loram.merge import merge_masked
        from axolotl_loram.progress import progress_bar

        with progress_bar("merging") as progress:
            record = merge_masked(adapter, pruned_model, output, None, overwrite, progress)
    else:
        from axolotl_loram.recover import recover as recover_adapter

        record = recover_adapter(adapter, pruned_model, output, overwrite=overwrite)
    shown = {"output": record["output"], "base": record["base"]["id"], "plan": record["plan"]}
    show(shown, as_json)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--propose",
    "proposing",
    is_flag=True,
    help="Draft the declaration of a model family that has none, and try it out. FOLDER may be a "
    "config.json or a hub id too.",
)
@json_option
def inspect(folder: Path, proposing: bool, as_json: bool) -> None:
    """Tell what FOLDER is: a pruned model, or an adapter trained on one or recovered from one."""
    if proposing:
        with redirect_stdout(sys.stderr):  # DeepSpeed, which transformers imports, prints there
            from axolotl_loram.propose import propose
            from axolotl_loram.sources import stored_config

            proposal = propose(stored_config(str(folder)))
        click.echo(json.dumps(proposal.summary()) if as_json else proposal.text())
        return
    from axolotl_loram.pairing import check_pruned, read_record
    from axolotl_loram.plan import PLAN_FILE, PruningPlan, summary
    from axolotl_loram.records import refit_summary

    record = read_record(folder)
    if not record:
        raise LoRAMError(f"expected a folder with loram.json, found none in {folder}")
    shown = {"kind": record["kind"], "base": record["base"]["id"], "plan": record["plan"]}
    if (folder / PLAN_FILE).exists():
        found = PruningPlan.load(folder)
        check_pruned(folder, found)
        shown |= {**record.get("parameters", {}), **summary(found.config, found.counts)}
        shown |= refit_summary(record.get("refit") or {})
        kept = {"quantize": record.get("pruning", {}).get("quantize")}
        kept["weight_bytes"] = record.get("weight_bytes")
        shown |= {name: value for name, value in kept.items() if value is not None}
    show(shown, as_json)


def show(result: dict[str, Any], as_json: bool) -> None:
    """Print a result as one JSON object, or as lines of name and value for people."""
    click.echo(json.dumps(result) if as_json else lines(result))


if __name__ == "__main__":
    run()
