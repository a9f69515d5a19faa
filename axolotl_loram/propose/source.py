"""The Python source of a row, in the words of `blocks` where the weights match them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from axolotl_loram.architecture import blocks
from axolotl_loram.architecture.blocks import HIDDEN, KV_GROUPS, MLP_NEURONS, VOCABULARY, decoder
from axolotl_loram.architecture.spaces import EMBEDDING, LINEAR, Dim, Family, Group, Space, Weight

Pieces = dict[str, tuple[Weight, ...]]
"""Source of a helper of `blocks` → the weights that it stands for."""


def row_source(family: Family, sizes: Mapping[str, int | str]) -> str:
    """A call of `decoder`, one argument on each line.

    `sizes` are names that `decoder_sizes` does not give → the number, or the field.
    """
    usual = decoder(family.model_type)
    parts = {"attention": [], "mlp": [], "norms": []}  # type: dict[str, list[Weight]]
    for weight in family.layer:
        parts[_part(weight, family)].append(weight)
    arguments = [repr(family.model_type)]
    defaults = {
        "attention": blocks.attention(),
        "mlp": blocks.gated_mlp(),
        "norms": blocks.PRE_NORMS,
    }
    for name, weights in parts.items():
        if set(weights) != set(defaults[name]):
            arguments.append(f"{name}={_weights(weights)}")
    if set(family.model) != set(usual.model):
        arguments.append(f"model={_weights(family.model)}")
    if family.groups != usual.groups:
        arguments.append(f"groups={_tuple(map(_group, family.groups))}")
    if sizes:
        added = ", ".join(
            f'"{name}": {by if isinstance(by, int) else f"positive(fields, {by!r})"}'
            for name, by in sizes.items()
        ).replace("'", '"')
        arguments.append(f"sizes=lambda fields, layer: decoder_sizes(fields, layer) | {{{added}}}")
    for name in ("layers", "stored", "refused"):
        if getattr(family, name) != getattr(usual, name):
            arguments.append(f"{name}={getattr(family, name)!r}")
    arguments += [f"{name}={value!r}" for name, value in family.defaults.items()]
    lines = "".join(f"    {argument},\n" for argument in arguments)
    return f"decoder(\n{lines})".replace("'", '"')


def _part(weight: Weight, family: Family) -> str:
    first, below, _ = weight.module.partition(".")
    usual = weight.parameter == "weight"
    attention = [g.module for g in family.groups if g.kind == "kv_groups"]
    if first in attention or ("att" in first and (below or weight.role == LINEAR or not usual)):
        return "attention"
    return "mlp" if below or weight.role == LINEAR else "norms"


def _weights(weights: Sequence[Weight]) -> str:
    """Helpers that cover as many of the weights as they can; the others one by one."""
    left, pieces = list(dict.fromkeys(weights)), []
    helpers = sorted(_helpers(weights).items(), key=lambda piece: -len(piece[1]))
    for source, covered in helpers:
        if covered and set(covered) <= set(left):
            left = [weight for weight in left if weight not in covered]
            pieces.append(f"*{source}")
    pieces += map(_weight, left)
    if len(pieces) == 1 and not left:
        return pieces[0].removeprefix("*")
    return _tuple(pieces)


def _tuple(items: Any) -> str:
    listed = list(items)
    return f"({', '.join(listed)}{',' if len(listed) == 1 else ''})"


def _helpers(weights: Sequence[Weight]) -> Pieces:
    flags = list(dict.fromkeys([False, True, *(w.bias for w in weights)]))
    found: Pieces = {}
    for one in flags:
        for other in flags:
            found[f"attention({_biases(one, other)})"] = blocks.attention(one, other)
        found[f"gated_mlp({_biases(one)})"] = blocks.gated_mlp(one)
    found["fused_attention()"] = blocks.fused_attention()
    named = ("FUSED_MLP", "HEAD_NORMS", "JOINT_NORMS", "OWN_NORMS", "FOUR_NORMS", "PRE_NORMS")
    found |= {name: getattr(blocks, name) for name in (*named, "POST_NORMS")}
    return found | dict(_plain_mlps(weights)) | dict(_norms(weights)) | dict(_outside(weights))


def _biases(bias: bool | str, output_bias: bool | str = False) -> str:
    return f"{bias!r}, {output_bias!r}" if output_bias else f"{bias!r}" if bias else ""


def _plain_mlps(weights: Sequence[Weight]) -> Iterator[tuple[str, tuple[Weight, ...]]]:
    names = [w.module.removeprefix("mlp.") for w in weights if w.module.startswith("mlp.")]
    if len(names) == 2:
        for bias in dict.fromkeys(w.bias for w in weights):
            given = "" if bias is True else f", {bias!r}"
            yield (
                f"plain_mlp({names[0]!r}, {names[1]!r}{given})",
                blocks.plain_mlp(names[0], names[1], bias),
            )


def _norms(weights: Sequence[Weight]) -> Iterator[tuple[str, tuple[Weight, ...]]]:
    for bias in (False, True):
        modules = [w.module for w in weights if blocks.norms(w.module, bias=bias) == (w,)]
        if modules:
            given = ", ".join(map(repr, modules)) + (", bias=True" if bias else "")
            yield f"norms({given})", blocks.norms(*modules, bias=bias)


def _outside(weights: Sequence[Weight]) -> Iterator[tuple[str, tuple[Weight, ...]]]:
    embeddings = [w for w in weights if w.role == EMBEDDING and w.dims == (VOCABULARY, HIDDEN)]
    norms = [w for w in weights if w.dims == (HIDDEN,)]
    heads = [w for w in weights if w.module == "lm_head"]
    if len(embeddings) == len(norms) == len(heads) == 1:
        prefix, dot, embedding = embeddings[0].module.rpartition(".")
        arguments: dict[str, Any] = {
            "prefix": prefix + dot,
            "embedding": embedding,
            "norm": norms[0].module.removeprefix(prefix + dot),
            "norm_bias": norms[0].bias,
            "head_bias": heads[0].bias,
        }
        usual = {"prefix": "model.", "embedding": "embed_tokens", "norm": "norm"}
        usual |= {"norm_bias": False, "head_bias": False}  # type: ignore[dict-item]
        given = [f"{k}={v!r}" for k, v in arguments.items() if v != usual[k]]
        yield f"outside({', '.join(given)})", blocks.outside(**arguments)


def _weight(weight: Weight) -> str:
    head = [repr(weight.module)]
    dims = [_dim(dim) for dim in weight.dims]
    bias = [] if weight.bias is False else [f"bias={weight.bias!r}"]
    rest = {"tied": None, "role": "other", "parameter": "weight", "when": None}
    if weight.role == LINEAR:
        rest.pop("role")
    more = [f"{k}={getattr(weight, k)!r}" for k, v in rest.items() if getattr(weight, k) != v]
    if weight.role == LINEAR:
        return f"linear({', '.join([*head, *dims, *bias, *more])})"
    return f"Weight({', '.join([*head, _tuple(dims), *bias, *more])})"


def _dim(dim: Dim) -> str:
    named = {
        value: name
        for name in ("HIDDEN", "VOCABULARY", "ONE_HEAD", "QUERY", "QUERY_HEADS", "KEY_VALUE")
        for value in [getattr(blocks, name)]
    }
    named |= {blocks.KV_HEADS: "KV_HEADS", blocks.NEURONS: "NEURONS"}
    return named.get(dim) or " + ".join(named.get((space,)) or _space(space) for space in dim)


def _space(space: Space) -> str:
    if space.units is None:
        return f"fixed({', '.join(map(repr, space.block))})"
    block = f", {space.block!r}" if space.block else ""
    return f"(Space({space.units!r}{block}),)"


def _group(group: Group) -> str:
    for name, usual in (("MLP_NEURONS", MLP_NEURONS), ("KV_GROUPS", KV_GROUPS)):
        if group.kind == usual.kind:
            changed = [k for k in ("module", "fields") if getattr(group, k) != getattr(usual, k)]
            given = "".join(f", {k}={getattr(group, k)!r}" for k in changed)
            return f"replace({name}{given})" if given else name
    return f"Group({group.kind!r}, {group.module!r}, {dict(group.fields)!r}, {group.noun!r})"
