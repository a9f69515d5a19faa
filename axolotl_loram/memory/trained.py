"""What a run trains of a model, as Axolotl 0.19 asks for it and PEFT 0.20 finds it.

Names are matched as PEFT does: a list by the ends of modules' names, one string as a pattern of the
whole name. Of a module with a weight (out, in), LoRA of rank r trains A (r, in) and B (out, r); of
stacked experts (E, out, in) A (rE, in) and B (out, rE); of an embedding the same as of its weight.
DoRA adds a magnitude for each output. A module that is saved whole is trained as a copy, beside the
original; single tokens as rows of their own. `tests/memory/test_trained.py` holds it all against
PEFT on every family.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

from axolotl_loram.architecture.model import Tensor
from axolotl_loram.errors import LoRAMError
from axolotl_loram.memory.layout import Layout, part_of
from axolotl_loram.memory.settings import PATTERN, TrainingArgs

LINEAR, ALL_LINEAR = "linear", "all-linear"
"""What stands for all linear modules: Axolotl's `lora_target_linear`, and PEFT's shorthand."""
OLD_NAMES: Mapping[str, tuple[str, str, str]] = {
    "mixtral": ("w1", "w3", "w2"),
    **dict.fromkeys(("olmoe", "qwen3_moe", "deepseek_v3"), ("gate_proj", "up_proj", "down_proj")),
}
"""Families whose experts were modules once → what they were called.

PEFT takes these names, wherever they occur, for the stacked parameters of today: of such a model no
dense MLP or shared expert is adapted.
"""
ROUTER, FIRST, SECOND = "gate", "gate_up_proj", "down_proj"


def ends(name: str, targets: Iterable[str]) -> bool:
    """Whether a dotted name is, or ends in, one of others."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


@dataclass(frozen=True)
class Trained:
    """What of a model is trained.

    Attributes:
        names: Modules with LoRA, by the ends of their names; or one pattern.
        parameters: Parameters with LoRA, by the ends of their names.
        ranks: Pattern of the end of a name → rank, in PEFT's order; the first that matches counts.
        layout: The model; layers that differ in what is trained are told apart.
    """

    run: TrainingArgs
    layout: Layout
    names: frozenset[str] | str
    parameters: frozenset[str]
    ranks: Mapping[str, int]

    @classmethod
    def of(cls, run: TrainingArgs, layout: Layout) -> Trained:
        """What a run trains of the model with this layout.

        Raises:
            LoRAMError: PEFT would refuse the targets, or find none of them.
        """
        names, ranks = _names(run, layout), dict(run.lora_rank_pattern)
        found = cls(run, layout, names, frozenset(run.lora_target_parameters), ranks)
        if layout.model_type in OLD_NAMES:
            found = found._renamed()
        found = replace(found, layout=layout.split(found._key))
        if not layout.undeclared and not any(
            found.rank(tensor) for tensor, _ in found.layout.every
        ):
            raise LoRAMError(
                "expected lora_target_modules, or lora_target_parameters, to name some of a "
                f"{layout.model_type} model, found {run.lora_target_modules or 'none'}: name the "
                "ends of modules' names in a list, or set lora_target_linear"
            )
        return found

    def rank(self, tensor: Tensor) -> int:
        """Rank of the LoRA on a tensor; 0 where there is none."""
        if self.by_module(tensor):
            both = self._are_tied(tensor)  # PEFT gives the head the embedding's matrices
            return self._rank((self.layout.embedding if both else tensor).module)
        by_parameter = len(tensor.dims) > 1 and ends(tensor.name, self.parameters)
        return self._rank(tensor.name) if by_parameter else 0

    def by_module(self, tensor: Tensor) -> bool:
        """Whether a tensor is the weight of a module with LoRA."""
        adaptable = part_of(tensor) in ("linears", "lm_head", "embedding")
        if not self._are_tied(tensor):
            return adaptable and self._targets(tensor.module)
        both = (self.layout.embedding, self.layout.head)
        return any(self._targets(t.module) for t in both) and not any(map(self.is_whole, both))

    def _are_tied(self, tensor: Tensor) -> bool:
        """Whether a tensor is one of two embeddings that PEFT adapts as one."""
        tied = self.layout.lm_head is None and self.run.peft_ensure_weight_tying
        return tied and tensor in (self.layout.embedding, self.layout.head)

    def is_whole(self, tensor: Tensor) -> bool:
        """Whether a tensor is in a module that is trained whole: PEFT looks how its name ends."""
        return any(
            re.search(rf"{re.escape(name)}(\.|$)", tensor.module)
            for name in self.run.modules_to_save
        )

    def shapes(self) -> Iterator[tuple[tuple[int, ...], int, int]]:
        """(shape, bytes of a value, how many) of each trained tensor."""
        run, layout = self.run, self.layout
        tied = layout.lm_head is None
        for tensor, count in layout.every:
            follows = tied and tensor == layout.head and run.peft_ensure_weight_tying
            if self.is_whole(tensor) and not (follows and self.is_whole(layout.embedding)):
                yield tensor.shape, run.compute_bytes, count
            if rank := self.rank(tensor):
                experts = tensor.shape[0] if len(tensor.shape) > 2 else 1
                outputs, inputs = tensor.shape[-2:][:: -1 if tensor.transposed else 1]
                yield (rank * experts, inputs), run.lora_bytes, count
                yield (outputs, rank * experts), run.lora_bytes, count
                if run.peft_use_dora and self.by_module(tensor):
                    yield (outputs,), run.lora_bytes, count
        for rows in self.token_rows:
            yield (rows, layout.hidden), run.lora_bytes, 1

    @property
    def token_rows(self) -> list[int]:
        """Rows of single tokens, of each matrix; of tied ones the same tokens are trained once."""
        tokens = dict(self.run.trainable_tokens)
        embedding, head = (
            next((rows for name, rows in tokens.items() if name and module.endswith(name)), ())
            for module in (self.layout.embedding.module, self.layout.head.module)
        )
        embedding = tokens.get("", embedding)
        once = self.layout.lm_head is None and embedding == head
        return [len(rows) for rows in ((embedding,) if once else (embedding, head)) if rows]

    def _key(self, tensor: Tensor) -> object:
        """What layers have to agree in to be counted together."""
        return self.rank(tensor), self.is_whole(tensor)

    def _rank(self, name: str) -> int:
        matched = (r for end, r in self.ranks.items() if re.match(rf"(.*\.)?({end})$", name))
        return next(matched, self.run.lora_r)

    def _targets(self, module: str) -> bool:
        if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.run.modules_to_save):
            return False
        if isinstance(self.names, str):
            return re.fullmatch(self.names, module) is not None
        return module in self.names or (ends(module, self.names) and self._in_layers(module))

    def _in_layers(self, module: str) -> bool:
        """Whether a module is in one of the layers that LoRA is confined to."""
        layers = self.run.peft_layers_to_transform
        if not layers:
            return True
        lists = self.run.peft_layers_pattern or ("[^.]*",)
        found = (re.match(rf".*?\.{name}\.(\d+)\.", module) for name in lists)
        index = next((int(match[1]) for match in found if match), None)
        return index in layers

    def _renamed(self) -> Trained:
        """With the names that experts once had turned into those of their parameters.

        Gate and up are one parameter today, which gets twice the rank.

        Raises:
            LoRAMError: One of the two is named without the other.
        """
        gate, up, down = OLD_NAMES[self.layout.model_type]
        new = {ROUTER: f"{ROUTER}.weight", gate: FIRST, up: FIRST, down: SECOND}
        names = self._leaves(new) if isinstance(self.names, str) else self.names
        if not names:
            return self
        old = [next((old for old in new if ends(name, [old])), None) for name in names]
        fused = {gate, up} & set(old)
        if len(fused) == 1:
            raise LoRAMError(
                f"expected {gate} and {up} together in lora_target_modules, found {min(fused)}: "
                f"they are one parameter of a {self.layout.model_type} model; name both, or neither"
            )
        ranks = dict(self.ranks) | ({rf".*\.{FIRST}": 2 * self.run.lora_r} if fused else {})
        return replace(
            self,
            names=frozenset(name for name, was in zip(names, old, strict=True) if was is None),
            parameters=self.parameters | {new[was] for was in old if was is not None},
            ranks=ranks,
        )

    def _leaves(self, new: Mapping[str, str]) -> frozenset[str]:
        """Last parts of all that a pattern matches, today's names and those of old."""
        tensors = [tensor for tensor, _ in self.layout.split(lambda tensor: tensor.layer).tensors]
        paths = {
            path
            for tensor in tensors
            for path in accumulate(tensor.name.split("."), "{}.{}".format)
        }
        found = {path.rpartition(".")[2] for path in paths if self._targets(path)}
        for old, today in new.items():
            places = {t.module for t in tensors if t.name == f"{t.module}.{today}"}
            if any(self._targets(f"{place}.{old}") for place in places):
                found.add(old)
        return frozenset(found)


def _names(run: TrainingArgs, layout: Layout) -> frozenset[str] | str:
    """What `lora_target_modules` names, with what stands for all linear modules spelt out."""
    text = run.lora_target_modules
    if PATTERN.search(text):
        return text
    names = {name.strip() for name in text.split(",")} - {""}
    linear = {t.module.rpartition(".")[2] for t, _ in layout.tensors if part_of(t) == "linears"}
    if LINEAR in names:
        head = {"gpt_neox": "embed_out"}.get(layout.model_type, "lm_head")  # as Axolotl has it
        names |= linear | {layout.head.module} - {head}
    if ALL_LINEAR in names:
        names |= linear | set(OLD_NAMES.get(layout.model_type, ()))
        names |= {ROUTER} if layout.model_type in OLD_NAMES else set()
    return frozenset(names - {LINEAR, ALL_LINEAR})
