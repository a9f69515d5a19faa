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
from axolotl_loram.args import PruningArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.layerwise_args import LayerwiseArgs
from axolotl_loram.tables import lines
from axolotl_loram.training import TrainingArgs

EVALUATED = ("base", "pruned", "pruned+adapter", "base+recovered")


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
    from axolotl_loram import cluster
    from axolotl_loram.request import request

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
@overwrite_option
@json_option
def recover(
    adapter: Path,
    pruned_model: str | None,
    output: Path | None,
    masked: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Turn ADAPTER, trained on a pruned model, into an adapter for the original model."""
    if masked:
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
@click.argument("model")
@click.option(
    "--verify",
    "verifying",
    is_flag=True,
    help="Check every file against its recorded SHA-256, the plan, config, weights and base "
    "against one another; of a hub id, download all of it.",
)
@click.option(
    "--base",
    metavar="MODEL",
    help="Folder or hub id of the base model for --verify; by default the recorded one, where it "
    "is on this machine.",
)
@click.option(
    "--propose",
    "proposing",
    is_flag=True,
    help="Draft the declaration of a model family that has none, and try it out. MODEL may be a "
    "config.json too.",
)
@revision_option
@json_option
def inspect(
    model: str,
    verifying: bool,
    base: str | None,
    proposing: bool,
    revision: str | None,
    as_json: bool,
) -> None:
    """Tell what MODEL is: a pruned model, or an adapter trained on one or recovered from one.

    MODEL is a folder or a hub id. With --verify, exit status 1 says that a check failed.
    """
    if proposing:
        with redirect_stdout(sys.stderr):  # DeepSpeed, which transformers imports, prints there
            from axolotl_loram.propose import propose
            from axolotl_loram.sources import stored_config

            proposal = propose(stored_config(model, revision))
        click.echo(json.dumps(proposal.summary()) if as_json else proposal.text())
        return
    from axolotl_loram import inspection
    from axolotl_loram.progress import progress_bar
    from axolotl_loram.verify import Check, require_whole

    with progress_bar("verifying") as progress:
        found = inspection.inspect(model, revision, verifying, base, progress)
    click.echo(json.dumps(found) if as_json else inspection.report(found))
    require_whole((Check(**check) for check in found.get("checks", ())), model)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repository")
@click.option("--dry-run", is_flag=True, help="Write card, plot and list of files to a folder.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Folder that --dry-run writes, by default …-card beside FOLDER.",
)
@click.option("--public", is_flag=True, help="Make the repository public; it is private if not.")
@click.option(
    "--base",
    metavar="MODEL",
    help="Hub id of the base model for the card, where it was pruned from a folder.",
)
@click.option(
    "--card",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Your own README.md, instead of the model card that is written.",
)
@click.option("--revision", help="Branch to publish on; made if there is none.")
@click.option(
    "--overwrite", is_flag=True, help="Replace another model that is in the repository (or OUTPUT)."
)
@json_option
def publish(folder: Path, repository: str, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Check FOLDER, write its model card and put both on the hub as REPOSITORY (org/name).

    FOLDER is a pruned model or a recovered adapter. Cut off or interrupted, the same command goes
    on; nothing is visible on the hub before all of it is there.
    """
    from axolotl_loram import publish as publishing

    job = publishing.Publication(folder, repository, **options)
    done = job.rehearse() if dry_run else job.publish()
    for notice in done["notices"]:
        click.echo(f"note: {notice}", err=True)
    click.echo(json.dumps(done) if as_json else publishing.report(done))


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "--models",
    default="base,pruned,pruned+adapter,base+recovered",
    show_default=True,
    help="What to evaluate, separated by commas.",
)
@click.option(
    "--also",
    multiple=True,
    metavar="NAME=FOLDER",
    help="A further adapter for the base, or a whole model. With one called lora, the share of its "
    "gain that the recovered adapter keeps is shown.",
)
@click.option(
    "--in-domain",
    multiple=True,
    metavar="TEXT",
    help="Text like the training data: a .txt, .jsonl or Axolotl .yml file, or a data set on the "
    "hub (name, name:subset, name:subset:split). By default what CONFIG holds out "
    "(test_datasets, val_set_size).",
)
@click.option("--out-of-domain", multiple=True, metavar="TEXT", help="Other text, named alike.")
@click.option(
    "--tasks",
    multiple=True,
    metavar="TASK[:SHOTS]",
    help="Tasks or groups of lm-eval, or YAML files that declare one; commas or several times.",
)
@click.option("--suite", type=click.Choice(["paper"]), help="The tasks of the LoRAM paper.")
@click.option(
    "--limit", type=click.IntRange(min=1), help="Most documents of a set, and questions of a task."
)
@click.option("--length", type=click.IntRange(min=2), help="Most tokens that are read at once.")
@click.option(
    "--batch-size",
    default="auto",
    show_default=True,
    help="To start with; halved where memory does not suffice.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="The JSON to write; by default evaluation.json in output_dir.",
)
@click.option("--device", help="cpu, cuda, cuda:1 …, or auto (all GPUs, then CPU memory).")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]))
@click.option("--load-in-4bit", is_flag=True, help="Hold the linear layers in 4 bits (NF4).")
@click.option(
    "--backend",
    type=click.Choice(["peft", "vllm"]),
    default="peft",
    show_default=True,
    help="What runs the tasks on the base and its adapters.",
)
@click.option(
    "--allow-code-execution", "allow_code", is_flag=True, help="Run programs the model writes."
)
@click.option("--seed", default=1234, show_default=True, help="Of whatever is drawn.")
@json_option
def evaluate(config: Path, as_json: bool, **options: Any) -> None:
    """Measure what the run of the Axolotl YAML CONFIG gained: perplexities and task scores.

    Run again, it goes on where it was, and adds what is newly asked for.
    """
    options = parse_evaluation(**options)
    from axolotl_loram.evaluate import Request
    from axolotl_loram.evaluate import evaluate as run_evaluation
    from axolotl_loram.progress import progress_bar
    from axolotl_loram.tables import evaluation_table

    with redirect_stdout(sys.stderr), progress_bar("evaluating") as progress:
        result = run_evaluation(Request(config, **options), progress)
    click.echo(json.dumps(result) if as_json else evaluation_table(result))


def parse_evaluation(
    models: str, also: tuple[str, ...], tasks: tuple[str, ...], batch_size: str, **options: Any
) -> dict[str, Any]:
    """Options of `evaluate` as fields of `Request`; what is not allowed is wrong use."""
    names = [name.strip() for name in models.split(",") if name.strip()]
    for name in names:
        if name not in EVALUATED:
            raise click.UsageError(f"expected --models out of {', '.join(EVALUATED)}, found {name}")
    folders = [each.rpartition("=")[::2] for each in also]
    if len({name or Path(folder).name for name, folder in folders}) < len(folders):
        raise click.UsageError(f"expected different names in --also, found {', '.join(also)}")
    if batch_size != "auto" and not (batch_size.isdecimal() and int(batch_size)):
        raise click.UsageError(f"expected --batch-size auto or a number, found {batch_size}")
    return {
        **options,
        "models": names,
        "also": {name or Path(folder).name: Path(folder) for name, folder in folders},
        "tasks": [task for each in tasks for task in each.split(",")],
        "batch_size": None if batch_size == "auto" else int(batch_size),
    }


@main.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN…")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("report.html"),
    show_default=True,
    help="The page to write.",
)
@click.option(
    "--png-dir",
    type=click.Path(path_type=Path),
    help="Write the charts as PNGs to this folder too.",
)
@json_option
def report(runs: tuple[Path, ...], output: Path, png_dir: Path | None, as_json: bool) -> None:
    """Show in one HTML page what RUNs came to, from the JSON that they left.

    A RUN is an output_dir of `axolotl train` (LoRAM or plain LoRA), a pruned model, an
    evaluation.json, or a file with what `plan --json` printed. The page needs nothing else, no
    network and no script.
    """
    from axolotl_loram import page
    from axolotl_loram.report import build

    built = build(runs)
    page.write(built, output)
    shown: dict[str, Any] = {"report": str(output), "headline": built.headline}
    if png_dir is not None:
        from axolotl_loram.pictures import draw_pictures

        shown["pictures"] = [str(file) for file in draw_pictures(built.charts, png_dir)]
    show({**shown, "missing": built.missing}, as_json)


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
    if options["calibration"] is None:
        raise click.UsageError("expected text to align on, found none: name it with --calibration")
    try:
        given = {name: value for name, value in options.items() if value is not None}
        settings = LayerwiseArgs.parse(**given)
    except LoRAMError as error:
        raise click.UsageError(str(error)) from None
    with redirect_stdout(sys.stderr):  # DeepSpeed, which transformers imports, prints there
        from axolotl_loram.layerwise import align_layers, layer_summary
        from axolotl_loram.progress import progress_bar

        with progress_bar("aligning") as progress:
            record = align_layers(pruned, output, settings, base, overwrite, progress)
    alignment = record["alignments"][-1]
    show({"output": str(output), **layer_summary(alignment), "plan": record["plan"]}, as_json)


def show(result: dict[str, Any], as_json: bool) -> None:
    """Print a result as one JSON object, or as lines of name and value for people."""
    click.echo(json.dumps(result) if as_json else lines(result))


if __name__ == "__main__":
    run()
