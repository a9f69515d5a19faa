"""Drafting the row of a model family that is not declared: `axolotl-loram inspect MODEL --propose`.

`survey` says which config fields make which parameters, `tracing` which features hang together.
Here both become the row's source; `trial` tries out what that source evaluates to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby, product, takewhile
from typing import Any

from torch import nn

from axolotl_loram.architecture.blocks import ALIASES, HIDDEN, KV_GROUPS, MLP_NEURONS
from axolotl_loram.architecture.spaces import (
    EMBEDDING,
    EXPERTS,
    HEAD,
    LINEAR,
    OTHER,
    Dim,
    Family,
    Group,
    Space,
    Weight,
)
from axolotl_loram.errors import LoRAMError
from axolotl_loram.propose.source import row_source
from axolotl_loram.propose.survey import NUMBERS, Survey, layers_path, survey
from axolotl_loram.propose.tracing import HIDDEN_STREAM, Labels, Unit, build_random, trace
from axolotl_loram.propose.trial import Tried, quiet, read_row, stored_names, try_out


@dataclass
class Proposal:
    """A row drafted: its source, what that evaluates to, what was tried and not derived."""

    source: str
    family: Family
    checks: list[Tried] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def works(self) -> bool:
        """Whether there is something to prune, and no check failed."""
        return bool(self.family.groups) and all(check.outcome != "failed" for check in self.checks)

    def summary(self) -> dict[str, Any]:
        """For JSON."""
        groups: list[dict[str, Any]] = [
            {"kind": group.kind, "module": group.module, "fields": sorted(group.fields)}
            for group in self.family.groups
        ]
        checks = [vars(check) for check in self.checks]
        known = {"row": self.source, "groups": groups, "checks": checks, "works": self.works}
        return {**known, "not_derived": self.notes}

    def text(self) -> str:
        """For people."""
        lines = [self.source, ""]
        lines += [f"{check.outcome:<8}  {check.what}: {check.found}" for check in self.checks]
        lines += [f"not derived: {note}" for note in self.notes]
        if self.works:
            verdict = "the row works: add it to ROWS of families.py"
        elif self.family.groups:
            verdict = "the row is wrong: complete it by hand before you use it"
        else:
            verdict = "the row has nothing to prune"
        return "\n".join([*lines, verdict])


def propose(raw: Mapping[str, Any]) -> Proposal:
    """Draft and try out the row of the model that a config.json, as stored, is of.

    Raises:
        LoRAMError: It is no causal language model that transformers can build and run small.
    """
    try:
        with quiet():
            found = survey(raw)
            draft = Draft(found)
            family = draft.family()
            source = row_source(family, draft.used_sizes(family))
            row = read_row(source)
            return Proposal(source, row, try_out(row, found), [*found.notes, *draft.notes])
    except LoRAMError:
        raise
    except Exception as error:  # whatever a model's own code raises at sizes it was not made for
        raise LoRAMError(
            f"expected a {raw.get('model_type')} model that can be built small, found that it "
            f"cannot ({error!r}): declare it by hand, as CONTRIBUTING.md says"
        ) from error


@dataclass
class UnitKind:
    """Units that tracing found, and the linear layers that have them; unnamed, they stay."""

    units: int
    modules: list[str]
    name: str | None = None


class Draft:
    """A row in the making, from a survey and a trace of the model at its first set of sizes."""

    def __init__(self, found: Survey):
        self.found, self.notes = found, list[str]()
        model = build_random(found.model_type, found.fields(0))
        self.linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        self.stored = stored_names(model)
        self.shapes = [found.shapes(at) for at in range(3)]
        self.layers = layers_path(self.shapes[0])
        self.first = f"{self.layers}.0"
        self.labels = self._trace(model)
        self.kinds = self._kinds()
        self._name_kinds()

    def _trace(self, model: Any) -> Labels:
        try:
            return trace(model, self.first)
        except Exception as error:  # whatever a model's own code raises
            self.notes.append(f"any units: the model cannot be traced ({error})")
            return {}

    def _kinds(self) -> dict[int, UnitKind]:
        """Kinds with both rows that make their features and columns that read them."""
        kinds: dict[int, UnitKind] = {}
        sides: dict[int, set[int]] = {}
        for (name, dim), labels in self.labels.items():
            module = name.rpartition(".")[0].removeprefix(f"{self.first}.")
            for unit in {label for label in labels if label and label.kind != HIDDEN_STREAM}:
                kind = kinds.setdefault(unit.kind, UnitKind(0, []))
                kind.units = max(kind.units, unit.number + 1)
                if f"{self.first}.{module}" in self.linears:
                    sides.setdefault(unit.kind, set()).add(dim)
                    kind.modules += [module] * (module not in kind.modules)
        return {number: kind for number, kind in kinds.items() if sides.get(number) == {0, 1}}

    def _name_kinds(self) -> None:
        sizes = self.found.named_sizes[0]
        countable = ("neurons", "kv_groups", *self.found.extra(0))
        for number, kind in self.kinds.items():
            where = ", ".join(kind.modules)
            named = [name for name in countable if sizes[name] == kind.units]
            taken = {other.name for other in self.kinds.values()}
            if not self._adjacent(number):
                self.notes.append(f"the units of {where}: their features are interleaved")
            elif kind.units == 1:
                self.notes.append(f"units of {where}: all of it hangs together")
            elif not named or named[0] in taken:
                self.notes.append(f"what counts the {kind.units} units of {where}")
            elif named[0] == "kv_groups" and not self.found.head_dim:
                self.notes.append(
                    f"attention heads ({where}): each is hidden_size / num_attention_heads wide "
                    "whatever the config says, so they cannot be removed through it"
                )
            else:
                kind.name = named[0]

    def _adjacent(self, kind: int) -> bool:
        """Whether the features of each unit lie together wherever the kind is."""
        having = [
            labels for labels in self.labels.values() if any(u and u.kind == kind for u in labels)
        ]
        return all(self._segments(labels) is not None for labels in having)

    def _segments(self, labels: list[Unit | None]) -> list[tuple[int | None, int]] | None:
        """Runs of features: (kind, features of one unit), or (None, features of no unit's)."""
        units = [
            u if u and (u.kind in self.kinds or u.kind == HIDDEN_STREAM) else None for u in labels
        ]
        found, start = list[tuple[int | None, int]](), 0
        while start < len(units):
            unit = units[start]
            if unit is None or unit.kind == HIDDEN_STREAM:
                kind = None if unit is None else HIDDEN_STREAM
                rest = units[start:]
                size = next(
                    (i for i, u in enumerate(rest) if (None if u is None else u.kind) != kind),
                    len(rest),
                )
            else:
                kind, count = unit.kind, self.kinds[unit.kind].units
                block = len(list(next(groupby(units[start:]))[1]))
                size = count * block
                if units[start : start + size] != [Unit(kind, j // block) for j in range(size)]:
                    return None
            found.append((kind, size))
            start += size
        return found

    def dim(self, name: str, dim: int) -> Dim:
        """What one dimension of a parameter is made of."""
        sizes = tuple(shapes[name][dim] for shapes in self.shapes)
        segments = self._segments(self.labels.get((name, dim), [])) or [(None, sizes[0])]
        owned = [self.kinds[kind].name for kind, _ in segments if kind in self.kinds]
        hidden = tuple(named["hidden"] for named in self.found.named_sizes)
        if segments[0][0] == HIDDEN_STREAM and sizes == hidden:
            return HIDDEN
        if not any(owned):
            segments = [(None, sizes[0])]
        choices = [list(self._spaces(kind, size)) for kind, size in segments]
        named = self.found.named_sizes
        for spaces in product(*choices):
            if all(
                sum(space.size({**NUMBERS, **env}) for space in spaces) == size
                for env, size in zip(named, sizes, strict=True)
            ):
                return spaces
        self.notes.append(f"the size of dimension {dim} of {name}: {sizes[0]} features")
        return (Space(block=("unknown",)),)

    def _spaces(self, kind: int | None, size: int) -> Any:
        """What a run of features may be, judging by the first set of sizes."""
        name = self.kinds[kind].name if kind in self.kinds else None
        if name is not None:
            size //= self.kinds[kind].units  # type: ignore[index]
        for block in self.found.products((size,)):
            yield Space(name, block)

    def family(self) -> Family:
        """The row."""
        layer, model = list[Weight](), list[Weight]()
        for name in self.shapes[0]:
            inside = name.startswith(f"{self.layers}.")
            if name.startswith(f"{self.first}.") or not inside:
                weight = self._weight(name)
                if weight:
                    (layer if inside else model).append(weight)
        return Family(
            self.found.model_type,
            tuple(layer),
            tuple(model),
            tuple(self._groups()),
            sizes=lambda fields, layer: {},
            defaults=self._defaults((*layer, *model)),
            layers=self.layers,
            stored=self.stored,
            refused=self.found.refused,
        )

    def _weight(self, name: str) -> Weight | None:
        module, _, parameter = name.rpartition(".")
        beside = f"{module}.weight"
        if parameter == "bias" and beside in self.shapes[0]:
            return None
        condition, bias = self.found.conditions.get(name), f"{module}.bias"
        has_bias: bool | str = bias in self.shapes[0] and parameter == "weight"
        bias_condition = self.found.conditions.get(bias)
        if has_bias and bias_condition != condition:
            if bias_condition and bias_condition.startswith("!"):
                self.notes.append(f"{bias}, which is there without {bias_condition[1:]}")
            has_bias = bias_condition or True
        if condition == "!tie_word_embeddings" and has_bias is True and not bias_condition:
            self.found.refused["tie_word_embeddings"] = "its output bias is not tied"
        dims = tuple(self.dim(name, dim) for dim in range(len(self.shapes[0][name])))
        tied = condition == "!tie_word_embeddings"
        if len(dims) > 2:
            self.notes.append(f"units in {name}, which stacks {self.shapes[0][name][0]} matrices")
        return Weight(
            module.removeprefix(f"{self.first}."),
            dims,
            has_bias,
            "tie_word_embeddings" if tied else None,
            self._role(module, dims),
            parameter,
            None if tied else condition,
        )

    def _role(self, module: str, dims: tuple[Dim, ...]) -> str:
        if module in self.linears:
            return LINEAR if module.startswith(f"{self.first}.") else HEAD
        if module.startswith(f"{self.layers}."):
            return EXPERTS if len(dims) == 3 else OTHER
        return EMBEDDING if len(dims) == 2 else OTHER

    def _groups(self) -> list[Group]:
        grouped = "num_key_value_heads" in self.found.sizes[0]
        groups = []
        for kind in self.kinds.values():
            module = _above(kind.modules)
            if kind.name == "neurons":
                groups.append(replace(MLP_NEURONS, module=module))
            elif kind.name == "kv_groups":
                fields = KV_GROUPS.fields if grouped else {"num_attention_heads": ()}
                groups.append(replace(KV_GROUPS, module=module, fields=fields))
            elif kind.name:
                groups.append(Group(kind.name, module, {kind.name: ()}, f"unit of {kind.name}"))
        return sorted(groups, key=lambda group: group.kind != "neurons")

    def used_sizes(self, family: Family) -> dict[str, int | str]:
        """Names of sizes that decoders do not usually have → the number, or the field."""
        spaces = {s for w in (*family.layer, *family.model) for dim in w.dims for s in dim}
        names = {name for s in spaces for name in (*s.block, s.units or "")}
        sizes: dict[str, int | str] = dict(NUMBERS)
        sizes |= {name: ALIASES.get(name, name) for name in self.found.extra(0)}
        return {name: by for name, by in sizes.items() if name in names}

    def _defaults(self, weights: tuple[Weight, ...]) -> dict[str, Any]:
        """Optional fields that the row goes by, where the config class has another default."""
        flags = {f for w in weights for f in (w.bias, w.tied, w.when) if isinstance(f, str)}
        known = self.found.known
        own = {name.lstrip("!") for name in flags if known.get(name.lstrip("!"))}
        sizes = {"num_key_value_heads", "head_dim", *self.found.extra(0)}
        own |= {name for name in sizes & self.found.sizes[0].keys() if known.get(name) is not None}
        own -= self.found.following
        return {ALIASES.get(name, name): known[name] for name in sorted(own)}


def _above(modules: list[str]) -> str:
    """The path that modules have in common."""
    paths = [module.split(".") for module in modules]
    levels = zip(*paths, strict=False)
    common = [level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels)]
    return ".".join(common if len(paths) > 1 else common[:-1]) or modules[0]
