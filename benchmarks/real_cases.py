"""The runs of `real.py`: what is trained on, and how."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

from plain_loop import STEPS

FITTED = "4-fitted"
SEEDS = (1, 2, 3)
NEURONS = {0.5: "neurons=0.611", 0.75: "kv_groups=0.34,neurons=0.861"}
"""In SmolLM2-135M the parameters that the key leaves, with 3 and 2 of the 3 KV groups."""
BOUNDARIES = {18: "kv_groups=0.34,neurons=0.704", 22: "kv_groups=0.67,neurons=0.837"}
"""Layers pruned, and how far, so that as much is left as by 0.5 and by 0.75."""


@dataclass(frozen=True)
class Case:
    """A training run.

    Attributes:
        seed: Of the LoRA weights and the order of the rows.
        ratio: Pruned share of the inner layers, as `--pruning-ratio` or `--sparsity` takes it; 0
            is the base itself.
        method: How units are chosen ("activation-n": by n calibration tokens); or a rival at the
            bytes of `activation` (`rivals.py`): "layers", whole ones, "lowrank", the weights' best
            approximation of low rank, and "top", the base's upper layers, which read what its
            lower ones give ("top-n": at rank n).
        refit: Whether the rest is refitted.
        loss: "plain" or "anchored" ("anchored-fitted" is recovered by `--fill fitted`); "ceiling"
            is LoRA on the base, confined to the rows of B and the columns of A that the pruned
            model's adapter has: all that recovery could give.
            "hidden-n" is anchored, and after every n-th layer the hidden states get the constant
            offset between the base's and the pruned model's, too. "boundary-n" has that once: n
            layers are pruned, the others are whole, so that there it is the base that learns.
        top_k: Tokens whose offsets are named; 0 is all of them.
        rate: Learning rate.
        aligned: What the pruned model was trained with before: "task", all its weights distilled
            towards the base on the training rows; "other", on source of the standard library;
            "next", by next-token loss on the training rows; "layers", layer by layer on as many
            tokens (a way that is gone); "repair", LoRA alone, distilled on the training rows and
            then frozen.
        steps: Of 4 samples.
        bits: Of the frozen linear weights: 4 is NF4, "4-fitted" as the package rounds to it on
            text (8,192 tokens of the task), 3 and 2 are rounded by GPTQ (`rivals.py`); of
            "top", those of the upper layers.
        arithmetic: What is computed in; the weights are stored in bfloat16.
    """

    seed: int
    ratio: float | str = 0.0
    method: str = "activation"
    refit: bool = True
    loss: str = "plain"
    top_k: int = 0
    rate: float = 1e-3
    aligned: str = ""
    steps: int = STEPS
    bits: int | str = 16
    arithmetic: str = "float32"

    @property
    def is_lora(self) -> bool:
        """Whether it is LoRA on the base as it is: a yardstick."""
        return not self.ratio and self.bits == 16 and self.loss == "plain"


def cases() -> Iterator[Case]:
    """The conclusions' first."""
    old = partial(Case, arithmetic="bfloat16")
    for seed in SEEDS:
        yield old(seed)
        for ratio in (0.5, 0.75):
            yield old(seed, ratio)
            yield old(seed, ratio, loss="anchored")
    for top_k in (32, 8, 128):
        yield old(1, 0.5, loss="anchored", top_k=top_k)
    for ratio in (0.5, 0.75):
        yield old(1, ratio, loss="ceiling")
        for every in (1, 5, 15):
            yield old(1, ratio, loss=f"hidden-{every}", top_k=32)
    yield old(1, 0.5, loss="anchored", top_k=32, aligned="task")
    yield old(1, rate=2e-3)
    for ratio in (0.5, 0.75):
        yield old(1, ratio, loss="anchored", top_k=32, rate=2e-3)
    yield from new_cases()


def new_cases() -> Iterator[Case]:
    """In float32, which is the faster where a CPU's bfloat16 is not; LoRA at three rates first."""
    anchored = partial(Case, loss="anchored", top_k=32, rate=2e-3)
    yield Case(1, rate=2e-3)
    for ratio in (0.5, 0.75, NEURONS[0.5], NEURONS[0.75]):
        yield anchored(1, ratio)
    for rate in (1e-3, 4e-3, 5e-4):
        yield Case(1, rate=rate)
    for ratio in (0.5, 0.75, 0.85):
        yield Case(1, ratio, "top", rate=2e-3)
    for rate in (1e-3, 5e-4):
        for ratio in (0.75, 0.5):
            yield Case(1, ratio, "top", rate=rate)
    yield Case(1, 0.75, "top-32", rate=2e-3)
    yield Case(1, 0.75, "top", rate=4e-3)
    for places in BOUNDARIES:
        yield Case(1, BOUNDARIES[places], loss=f"boundary-{places}", top_k=32, rate=2e-3)
    for bits in (2, 3):
        yield anchored(1, bits=bits)
    for ratio in (0.5, 0.75):
        for method in ("layers", "lowrank"):
            yield anchored(1, ratio, method)
        yield anchored(1, ratio, rate=4e-3)
        yield Case(1, ratio, rate=2e-3)
    for ratio in (0.25, 0.85):
        yield anchored(1, ratio)
        yield Case(1, ratio, rate=2e-3)
    for bits in (4, 3):
        yield anchored(1, 0.5, bits=bits)
    for ratio in (0.5, 0.75):
        for loss in ("anchored", "plain"):
            yield Case(1, ratio, loss=loss, top_k=32, rate=2e-3, aligned="repair")
    for kind in ("task", "next", "other"):
        yield Case(1, 0.75, rate=2e-3, aligned=kind)
    for tokens in (2048, 32768):
        for ratio in (0.5, 0.75):
            yield anchored(1, ratio, f"activation-{tokens}")
    for sparsity in (0.5, "2:4"):
        for loss in ("anchored", "plain"):
            yield Case(1, sparsity, "sparsegpt", loss=loss, top_k=32, rate=2e-3)
    for seed in SEEDS[1:]:
        yield Case(seed, rate=2e-3)
        for ratio in (0.5, 0.75, 0.85):
            yield Case(seed, ratio, "top", rate=2e-3)
        for ratio in (0.5, 0.75):
            yield anchored(seed, ratio)
            yield Case(seed, ratio, rate=2e-3)
    for ratio in (0.5, 0.75):
        yield anchored(1, ratio, "top", bits=4)
    for bits, seed in product((4, FITTED), SEEDS):
        yield Case(seed, rate=2e-3, bits=bits)  # QLoRA, measured on the original in 16 bits
        for ratio in (0.5, 0.75):
            yield Case(seed, ratio, "top", rate=2e-3, bits=bits)
    yield Case(1, bits=FITTED)  # for Gemma 3
    for ratio in (0.5, 0.75):
        yield Case(1, ratio, "top", bits=FITTED)
    yield anchored(1, 0.5, bits=FITTED)
    yield anchored(1, bits=4)
    for seed in SEEDS[1:]:  # the best rate of Gemma 3
        yield Case(seed)
        for ratio in (0.5, 0.75):
            yield Case(seed, ratio, "top")
    yield Case(1, 0.25, "top", rate=2e-3)
    yield Case(1, steps=120)  # three times as long
    for ratio in (0.5, 0.75):
        yield Case(1, ratio, "top", steps=120)
    for ratio in (0.5, 0.75):
        yield replace(anchored(1, ratio), loss="anchored-fitted")
    yield anchored(1, 0.5, rate=1e-3)
    yield Case(1, 0.5)
    for steps in (20, 27):  # the operations of LoRAM on upper layers: `equal_compute.py`
        yield Case(1, rate=2e-3, steps=steps)
    for ratio in (0.5, 0.75):
        for method in ("random", "magnitude", "activation", "taylor"):
            for refit in (True, False):
                yield anchored(1, ratio, method, refit)
                yield Case(1, ratio, method, refit, rate=2e-3)
