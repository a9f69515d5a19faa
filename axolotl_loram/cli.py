"""The command line: `axolotl-loram …`, and the same commands as `axolotl loram …`.

Heavy imports are inside the commands, so that `--help` and a bad option answer at once.
"""

from __future__ import annotations

import logging
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click

from axolotl_loram import __version__, api
from axolotl_loram.cli_options import (
    PATH,
    json_option,
    overwrite_option,
    print_result,
    pruning_options,
    revision_option,
    schema_options,
    show,
    training_options,
)
from axolotl_loram.cli_outcomes import evaluate, export, inspect, publish, report
from axolotl_loram.cli_package import examples, schema
from axolotl_loram.config import FillArgs
from axolotl_loram.errors import LoRAMError, WrongUse

fill_options = schema_options(FillArgs, {})


class OneLineErrors(click.Group):
    """Ends in one line where input (exit status 1) or options (2) are wrong, unless --debug."""

    def invoke(self, context: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(context)
        except LoRAMError as error:
            if context.params.get("debug"):
                raise
            kind = click.UsageError if isinstance(error, WrongUse) else click.ClickException
            raise kind(str(error)) from None


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
@click.option("--plot", type=PATH, help="Draw the memory of the methods to this file.")
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
@click.option(
    "--compare",
    is_flag=True,
    help="Eight ways to train, offloading trainers among them, with bounds on their speed.",
)
@click.option("--gpu", default="RTX 4090", show_default=True, help="compare: the card.")
@click.option("--gpus", type=int, default=2, show_default=True, help="compare: FSDP2's cards.")
@click.option("--tokens", type=int, help="Of the data set; else from the YAML's local files.")
@revision_option
@json_option
def plan(model: str, plot: Path | None, as_json: bool, **options: Any) -> None:
    """Count what pruning MODEL would leave, and predict the memory of training.

    MODEL is a folder, a config.json, a hub id, or an Axolotl YAML, which says everything else too.
    The memory is that of one GPU for LoRA, QLoRA, LoRAM and QLoRAM. With --stage align it is that
    of each GPU and each node, for training all of the pruned model under DeepSpeed. With --compare
    it is that of the ways to train the model on one card, and how fast each can be at most.
    """
    found = api.plan_memory(model, **options)
    if plot is not None:
        from axolotl_loram.results.footprint import save_memory, save_ways

        if found.ways:
            save_ways(found.as_dict(), plot, Path(model).name)
        else:
            save_memory(found.methods, plot, Path(model).name)
    print_result(found, as_json)


@main.command()
@click.argument("model")
@click.argument("output", type=PATH)
@pruning_options
@revision_option
@overwrite_option
@json_option
def prune(model: str, output: Path, as_json: bool, **options: Any) -> None:
    """Write the pruned version of MODEL (a folder or a hub id) to the folder OUTPUT."""
    print_result(api.prune(model, output, **options), as_json)


@main.command()
@click.argument("adapter", type=PATH)
@click.option("--pruned-model", help="Folder or hub id; by default what the adapter names.")
@click.option(
    "--output",
    type=PATH,
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
def recover(adapter: Path, as_json: bool, **options: Any) -> None:
    """Turn ADAPTER, trained on a pruned model, into an adapter for the original model."""
    print_result(api.recover(adapter, **options), as_json)


@main.command()
@click.argument("yaml", type=PATH)
@click.argument("output", type=PATH)
@click.option("--model", help="Folder or hub id of the original; by default the YAML's base_model.")
@click.option("--server", help="Ask a server instead, such as vLLM's at http://localhost:8000/v1.")
@click.option(
    "--served-model", help="What --server calls the original; by default the YAML's base_model."
)
@json_option
def anchor(yaml: Path, output: Path, as_json: bool, **options: Any) -> None:
    """Write to the folder OUTPUT what the original model says of the training data of YAML.

    Where the original's weights are not, training takes it by `anchor: base` with
    `anchor_path: OUTPUT` in `loram:`. With --server, --model is where some rows are computed to
    hold the answers against; without it they are not.
    """
    with redirect_stdout(sys.stderr):  # DeepSpeed, which transformers imports, prints there
        from axolotl_loram.training.anchor import make_anchor

        record = make_anchor(yaml, output, **options)
    show({"output": str(output), **record}, as_json)


for other in (inspect, evaluate, report, publish, export, examples, schema):
    main.add_command(other)


if __name__ == "__main__":
    run()
