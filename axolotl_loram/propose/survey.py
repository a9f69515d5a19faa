"""What the config of an unknown model says about it: which fields and flags make which parameters.

Models without weights are built in milliseconds, so each field is changed by itself, and what
changes with it in the shapes of the parameters is seen.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from axolotl_loram.architecture.blocks import decoder_sizes
from axolotl_loram.errors import LoRAMError
from axolotl_loram.propose.tracing import build_from, parameter_shapes

SMALL = (
    {"vocab_size": 101, "hidden_size": 48, "intermediate_size": 44, "num_attention_heads": 6}
    | {"num_key_value_heads": 2, "head_dim": 16},
    {"vocab_size": 103, "hidden_size": 160, "intermediate_size": 52, "num_attention_heads": 10}
    | {"num_key_value_heads": 5, "head_dim": 8},
    {"vocab_size": 107, "hidden_size": 144, "intermediate_size": 76, "num_attention_heads": 12}
    | {"num_key_value_heads": 3, "head_dim": 32},
)
"""Three sets of sizes: what is the product of some fields in all of them is that always."""
ALWAYS = {"num_hidden_layers": 2, "max_position_embeddings": 64}
ALWAYS |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
ABOUT = {"model_type", "dtype", "torch_dtype", "transformers_version", "_name_or_path"}
ABOUT |= {"use_cache", "return_dict", "output_attentions", "output_hidden_states"}
"""Fields that say nothing of the structure."""
MOST = 10**7
"""Parameters of a small model; more would take minutes to run."""
PRIMES = (11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61)
CONSTANTS = {1: (), 2: ("two",), 3: ("three",), 4: ("four",), 8: ("eight",)}
NUMBERS = {names[0]: number for number, names in CONSTANTS.items() if names}

Shapes = dict[str, tuple[int, ...]]


@dataclass
class Survey:
    """An unknown model's config, explored.

    Attributes:
        known: What its config class takes fields for that are left out.
        head_dim: Whether the head width can be given apart from hidden_size and the heads.
        conditions: Parameter → the flag (or "!flag") without which it is not there.
        refused: Flags that change the structure otherwise.
        following: Fields whose defaults follow from hidden_size and the heads.
        depth: The fields that give the model its real number of layers.
    """

    model_type: str
    known: dict[str, Any]
    base: dict[str, Any]
    sizes: list[dict[str, int]]
    head_dim: bool = True
    conditions: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    following: set[str] = field(default_factory=set)
    depth: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seen: dict[str, Shapes] = field(default_factory=dict)

    def fields(self, at: int, **more: Any) -> dict[str, Any]:
        """All fields, with the sizes of one of the three sets."""
        return {**self.base, **self.sizes[at], **more}

    def shapes(self, at: int, **more: Any) -> Shapes:
        """Parameter → shape, with the sizes of one of the three sets."""
        fields = self.fields(at, **more)
        key = repr(sorted(fields.items()))
        if key not in self.seen:
            self.seen[key] = parameter_shapes(build_from(self.model_type, fields))
        return self.seen[key]

    @property
    def named_sizes(self) -> list[dict[str, int]]:
        """What the names of sizes mean in each of the three sets."""
        return [
            {**decoder_sizes(self.fields(at), None), **self.extra(at)}
            for at in range(len(self.sizes))
        ]

    def extra(self, at: int) -> dict[str, int]:
        """Size fields that decoders do not usually have."""
        return {name: size for name, size in self.sizes[at].items() if name not in SMALL[0]}

    def products(self, values: tuple[int, ...]) -> Iterator[tuple[str, ...]]:
        """Products of sizes that have these values in the three sets, the shortest first."""
        named = self.named_sizes[: len(values)]
        for factors in range(4):
            for names in itertools.combinations(named[0], factors):
                made = [math.prod(sizes[name] for name in names) for sizes in named]
                for number, constant in CONSTANTS.items():
                    if tuple(number * product for product in made) == values:
                        yield (*constant, *names)


def survey(raw: Mapping[str, Any]) -> Survey:
    """Explore the model that a config.json is of.

    Raises:
        LoRAMError: transformers has no causal language model of this type, or the sizes of its
            config go by other names than a decoder's usually do.
    """
    model_type = str(raw.get("model_type"))
    if "text_config" in raw or model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        parts = " (its text_config is one: propose that)" if "text_config" in raw else ""
        raise LoRAMError(
            f"expected a causal language model that transformers has, found model_type "
            f"{model_type!r}{parts}: declare it by hand, as CONTRIBUTING.md says"
        )
    config = AutoConfig.for_model(model_type)
    known = config.to_dict()
    missing = [name for name in ("hidden_size", "intermediate_size", "num_attention_heads")
               if name not in known]  # fmt: skip
    if missing:
        raise LoRAMError(
            f"expected a config with {', '.join(missing)}, found a {model_type} config, which "
            "calls or does it otherwise: declare it by hand, as CONTRIBUTING.md says"
        )
    sizes = [{name: size for name, size in small.items() if name in known} for small in SMALL]
    found = Survey(model_type, known, _plain_fields(raw, known), sizes)
    _head_width(found)
    for name in ("hidden_size", "num_attention_heads"):
        follows = AutoConfig.for_model(model_type, **{name: 2 * known[name]}).to_dict()
        found.following |= {name for name in SMALL[0] if follows.get(name) != known.get(name)}
    _other_sizes(found)
    parameters = sum(math.prod(shape) for shape in found.shapes(0).values())
    if parameters > MOST:
        raise LoRAMError(
            f"expected a {model_type} model that its config's fields make small, found one of "
            f"{parameters:,} parameters: declare it by hand, as CONTRIBUTING.md says"
        )
    _flags(found)
    _layers_alike(found, raw)
    return found


def _plain_fields(raw: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Fields to build small models with: the given ones, without what depends on sizes."""
    layers = raw.get("num_hidden_layers", known.get("num_hidden_layers"))
    fields: dict[str, Any] = {}
    for name, value in raw.items():
        if isinstance(value, list) and len(value) == layers and name != "architectures":
            fields[name] = value[: ALWAYS["num_hidden_layers"]]
        elif isinstance(value, bool | int | float | str) and name not in ABOUT:
            fields[name] = value
    return {name: value for name, value in fields.items() if name not in SMALL[0]} | ALWAYS


def _head_width(found: Survey) -> None:
    """Whether a `head_dim` changes anything; if not, it goes from the sizes."""
    for sizes, small in zip(found.sizes, SMALL, strict=True):
        sizes["head_dim"] = small["head_dim"]
    without = [{k: v for k, v in sizes.items() if k != "head_dim"} for sizes in found.sizes]
    try:
        found.head_dim = found.shapes(0) != found.shapes(0, head_dim=8)
    except (ValueError, TypeError, AttributeError):  # the config class forbids it
        found.head_dim = False
    if not found.head_dim:
        found.sizes = without


def _other_sizes(found: Survey) -> None:
    """Fields that are sizes too: get small values, each its own, where doubling them is seen."""
    here, number = found.shapes(0), 0
    for name, value in {**found.known, **found.base}.items():
        counts = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if not counts or name in SMALL[0] or name in ALWAYS:
            continue
        there = _try_shapes(found, **{name: 2 * value})
        if there is None or there == here or there.keys() != here.keys():
            continue
        found.base.pop(name, None)
        for at, sizes in enumerate(found.sizes):
            sizes[name] = 2 * PRIMES[(number, 13 - number, 5 * number + 3)[at] % len(PRIMES)]
        number, here = number + 1, found.shapes(0)


def _flags(found: Survey) -> None:
    """Which parameters are there only where a flag is set (or is not)."""
    fields = {**found.known, **found.base}
    for flag in [
        name for name, value in fields.items() if isinstance(value, bool) and name not in ABOUT
    ]:
        now, here = bool(fields[flag]), found.shapes(0)
        there = _try_shapes(found, **{flag: not now})
        if there is None or there == here:
            continue
        more, less = (there, here) if len(there) > len(here) else (here, there)
        new = more.keys() - less.keys()
        there_when = now if more is here else not now
        if less.items() <= more.items() and _declarable(found, {flag: there_when}, new):
            found.base[flag] = there_when
            found.conditions |= dict.fromkeys(new, flag if there_when else f"!{flag}")
        elif now:
            found.notes.append(f"what changes without {flag}")
        else:
            found.refused[flag] = "it changes the structure in ways not declared"


def _declarable(found: Survey, flag: dict[str, bool], new: set[str]) -> bool:
    """Whether the parameters that a flag brings have the same names and known sizes anywhere."""
    brought = [found.shapes(at, **flag) for at in range(3)]
    more = brought[0]
    if any(shapes.keys() != more.keys() for shapes in brought):
        return False
    return all(
        any(found.products(tuple(shapes[name][dim] for shapes in brought)))
        or (
            len(more[name]) == 1  # one dimension of several segments, perhaps
            and name.endswith(".bias")
        )
        for name in new
        for dim in range(len(more[name]))
    )


def _layers_alike(found: Survey, raw: Mapping[str, Any]) -> None:
    """Note it where the layers of the whole model, at small sizes, are not all of one make."""
    layers = raw.get("num_hidden_layers", found.known["num_hidden_layers"])
    lists = {k: v for k, v in raw.items() if isinstance(v, list) and k != "architectures"}
    found.depth = {"num_hidden_layers": layers, **lists}
    shapes = _try_shapes(found, **found.depth)
    if shapes is None:
        found.notes.append(f"whether all {layers} layers are alike: they cannot be built")
        return
    makes: dict[str, set[tuple[str, tuple[int, ...]]]] = {}
    path = layers_path(shapes)
    for name, shape in shapes.items():
        if name.startswith(f"{path}."):
            layer, _, below = name.removeprefix(f"{path}.").partition(".")
            makes.setdefault(layer, set()).add((below, shape))
    differing = [layer for layer, make in makes.items() if make != makes["0"]]
    if differing:
        some = f"{', '.join(differing[:3])}{' …' if len(differing) > 3 else ''}"
        found.notes.append(f"layers that differ from the first: {len(differing)} ({some})")


def layers_path(shapes: Shapes) -> str:
    """Path of the list of decoder layers."""
    first = next(name for name in shapes if ".0." in name)
    return first.partition(".0.")[0]


def _try_shapes(found: Survey, **more: Any) -> Shapes | None:
    """None where the model cannot be built so; config classes raise all kinds of errors."""
    try:
        return found.shapes(0, **more)
    except Exception:
        return None
