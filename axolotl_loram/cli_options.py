"""Options that commands share, and how they show results."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click

from axolotl_loram.api import option_of
from axolotl_loram.api_results import Result
from axolotl_loram.config import GONE_FILLS, PruningArgs
from axolotl_loram.memory.settings import TrainingArgs
from axolotl_loram.tables import lines


class _Choice(click.Choice):
    """A choice that leaves to the schema what that has a sentence of its own about."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        return value if value in GONE_FILLS else super().convert(value, param, ctx)


def schema_options(schema: Any, names: Mapping[str, str]) -> Callable:
    """A decorator that adds one option for each described field, with the description as help.

    Args:
        schema: The settings, a model or a dataclass of pydantic; of a field that holds several
            values the option may be given several times.
        names: Field → flag, where that is not the field's own name (without `_path`).
    """

    def add(command: Callable) -> Callable:
        for name, field in reversed(schema.__pydantic_fields__.items()):
            if field.description is None:
                continue
            keyword = option_of(name)
            flag = names.get(name, f"--{keyword.replace('_', '-')}")
            several = get_origin(field.annotation) in (tuple, dict)
            given = [kind for kind in get_args(field.annotation) if kind is not type(None)]
            kind: Any = field.annotation if isinstance(field.annotation, type) else given[-1]
            kind = str if several or get_origin(kind) is dict else kind
            shown: Any = field.get_default(call_default_factory=True)
            shown = ",".join(shown) if several else None if field.is_required() else shown
            if get_origin(field.annotation) is Literal or get_origin(kind) is Literal:
                kind = _Choice(get_args(kind) or given)
            command = click.option(
                f"{flag}/--no-{flag[2:]}" if kind is bool and field.default is not False else flag,
                keyword,
                is_flag=kind is bool,
                type=kind,
                default=None,  # the schema's own defaults hold, which depend on one another
                multiple=several,
                required=field.is_required(),
                metavar="NAME=FOLDER" if get_origin(field.annotation) is dict else None,
                show_default=False if shown in (None, False, "") else str(shown),
                help=field.description,
            )(command)
        return command

    return add


pruning_options = schema_options(PruningArgs, {"ratio": "--pruning-ratio"})
training_options = schema_options(TrainingArgs, {})


PATH = click.Path(path_type=Path)
FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on standard output, only that."
)
revision_option = click.option("--revision", help="Branch, tag or commit on the hub.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace an existing output.")


def show(result: dict[str, Any], as_json: bool) -> None:
    """Print a result as one JSON object, or as lines of name and value for people."""
    _print(json.dumps(result) if as_json else lines(result))


def print_result(result: Result, as_json: bool) -> None:
    """Print what a function of `api` returned, as one JSON object or for people."""
    _print(json.dumps(result.as_dict()) if as_json else str(result))


def _print(text: str) -> None:
    click.echo(os.fsencode(text))  # paths as they are, also of bytes that are no UTF-8
