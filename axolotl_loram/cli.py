"""The command line: `axolotl-loram …`, and the same commands as `axolotl loram …`.

Heavy imports are inside the commands, so that `--help` and a bad option answer at once.
"""

from __future__ import annotations

import json
import logging
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click

from axolotl_loram import __version__
from axolotl_loram.cli_options import (
    json_option,
    overwrite_option,
    parse_pruning,
    pruning_options,
    revision_option,
    schema_options,
    show,
    training_options,
)
from axolotl_loram.cli_outcomes import evaluate, inspect, publish, report
from axolotl_loram.config import FillArgs
from axolotl_loram.config_layerwise import LayerwiseArgs
from axolotl_loram.errors import LoRAMError

fill_options = schema_options(FillArgs, {})


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
@click.option(
    "--stage",
    type=click.Choice(["train", "align"]),
    help="What is planned: LoRA, or aligning the pruned model; by default what a YAML says.",
)
@click.option(
    "--deepspeed", metavar="FILE", help="align: DeepSpeed config; by default what a YAML names."
)
@click.option("--nodes", type=int, default=1, show_default=True, help="align: machines.")
@click.option("--gpus-per-node", type=int, default=1, show_default=True, help="align: of each.")
@revision_option
@json_option
def plan(
    model: str,
    revision: str | None,
    adapter: str | None,
    fit: str | None,
    plot: Path | None,
    stage: str | None,
    deepspeed: str | None,
    nodes: int,
    gpus_per_node: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Count what pruning MODEL would leave, and predict the memory of training.

    MODEL is a folder, a config.json, a hub id, or an Axolotl YAML, which says everything else too.
    The memory is that of one GPU for LoRA, QLoRA, LoRAM and QLoRAM. With --stage align it is that
    of each GPU and each node, for training all of the pruned model under DeepSpeed.
    """
    from axolotl_loram.memory import cluster
    from axolotl_loram.memory.request import request

    try:
        if cluster.is_alignment(model, stage):
            where = (deepspeed, nodes, gpus_per_node)
            wanted = cluster.align_request(model, revision, options, *where)
        else:
            wanted = None
            asked = request(model, revision, options, adapter, fit)
    except LoRAMError as error:
        raise click.UsageError(str(error)) from None
    if wanted is not None:
        found = cluster.align_plan(wanted)
        click.echo(json.dumps(found) if as_json else cluster.align_report(found))
        return
    from axolotl_loram.memory import planner as planning

    result = planning.plan(asked)
    if plot is not None:
        from axolotl_loram.results.figures import save_memory

        save_memory(result["methods"], plot, Path(model).name)
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
    from axolotl_loram.architecture.record import refit_summary
    from axolotl_loram.files.progress import progress_bar
    from axolotl_loram.pruning.prune import prune as prune_model

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
        from axolotl_loram.files.progress import progress_bar
        from axolotl_loram.recovery.fill import recover_filled

        with progress_bar("recovering") as progress:
            record = recover_filled(adapter, settings, pruned_model, output, overwrite, progress)
    elif masked:
        from axolotl_loram.files.progress import progress_bar
        from axolotl_loram.recovery.merge import merge_masked

        with progress_bar("merging") as progress:
            record = merge_masked(adapter, pruned_model, output, None, overwrite, progress)
    else:
        from axolotl_loram.recovery.recover import recover as recover_adapter

        record = recover_adapter(adapter, pruned_model, output, overwrite=overwrite)
    shown = {"output": record["output"], "base": record["base"]["id"], "plan": record["plan"]}
    show(shown, as_json)


@main.command()
@click.argument("pruned")
@click.argument("output", type=click.Path(path_type=Path))
@schema_options(LayerwiseArgs, {})
@click.option("--base", help="Folder or hub id of the original; by default what the plan names.")
@overwrite_option
@json_option
def align(
    pruned: str, output: Path, base: str | None, overwrite: bool, as_json: bool, **options: Any
) -> None:
    """Align the pruned model PRUNED (a folder or a hub id), layer by layer, into the folder OUTPUT.

    Each layer learns to give what the original's layer gives: one layer of each is in memory. By
    next-token loss or distillation, `axolotl train` aligns the whole, with `stage: align`.
    """
    if options["calibration_path"] is None:
        raise click.UsageError("expected text to align on, found none: name it with --calibration")
    try:
        given = {name: value for name, value in options.items() if value is not None}
        settings = LayerwiseArgs.parse(**given)
    except LoRAMError as error:
        raise click.UsageError(str(error)) from None
    with redirect_stdout(sys.stderr):  # DeepSpeed, which transformers imports, prints there
        from axolotl_loram.files.progress import progress_bar
        from axolotl_loram.training.layerwise import align_layers, layer_summary

        with progress_bar("aligning") as progress:
            record = align_layers(pruned, output, settings, base, overwrite, progress)
    alignment = record["alignments"][-1]
    show({"output": str(output), **layer_summary(alignment), "plan": record["plan"]}, as_json)


for outcome in (inspect, evaluate, report, publish):
    main.add_command(outcome)


if __name__ == "__main__":
    run()
