"""The cases of `ablation.py`, and the table and plot of their rows."""

from __future__ import annotations

import csv
import math
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ROWS = Path(__file__).with_name("ablation.csv")
SEEDS = (0, 1, 2)
SCALES = (1.15, 1.3)


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        model: base, small (trained from scratch) or pruned.
        align: none, distillation or next-token.
        align_on: The text of alignment.
        calibration: The text that units are chosen and refitted on.
        four_bit: Whether it is trained in NF4, as QLoRAM.
    """

    model: str = "pruned"
    ratio: float = 0.75
    method: str = "activation"
    refit: bool = True
    calibration: str = "fine-tuning"
    align: str = "distillation"
    align_on: str = "pre-training"
    align_steps: int = 100
    four_bit: bool = False
    seed: int = 0

    @property
    def name(self) -> str:
        """Of its folder."""
        return "-".join(str(value) for value in asdict(self).values()).replace(" ", "-")


def cases() -> list[Case]:
    """The ones that matter most first."""
    recipe = Case()
    unaligned = replace(recipe, align="none", align_on="", align_steps=0)
    plain = Case("base", 0, "", False, "", "none", "", 0)
    small = replace(plain, model="small", ratio=recipe.ratio)
    main = [[replace(case, seed=seed) for case in (plain, recipe, unaligned)] for seed in SEEDS]
    factors = [
        replace(recipe, align="next-token"),
        replace(unaligned, calibration="pre-training"),
        replace(recipe, ratio=0.95),
        replace(unaligned, refit=False),
        replace(recipe, ratio=0.5),
        replace(recipe, four_bit=True),
        replace(unaligned, method="random"),
        replace(recipe, ratio=0.85),
        replace(recipe, align_on="fine-tuning"),
        replace(unaligned, method="random", refit=False, calibration=""),
        *(replace(unaligned, ratio=ratio) for ratio in (0.95, 0.5, 0.85)),
        replace(unaligned, method="taylor"),
        replace(recipe, refit=False),
    ]
    again = [replace(case, seed=seed) for case in (small, factors[2]) for seed in SEEDS[1:]]
    return [*main[0], *main[1], small, *factors[:3], *main[2], *factors[3:], *again]


def recoveries(case: Case) -> list[str]:
    """How the adapter of a case is recovered ("none": it is not)."""
    if case.model != "pruned":
        return ["none"]
    more = [f"zeros × {scale}" for scale in SCALES]
    return ["none", "zeros", "fitted", *(more if case == Case() else [])]


def rows() -> list[dict]:
    return list(csv.DictReader(ROWS.open(encoding="utf-8"))) if ROWS.exists() else []


def key(row: dict) -> tuple:
    return tuple(str(row[name]) for name in (*Case.__dataclass_fields__, "recovery"))


def summarize() -> list[dict]:
    """Per case and recovery over the seeds: perplexities, and the share of plain LoRA's gain."""
    plain = {row["seed"]: row for row in rows() if row["model"] == "base"}
    groups: dict[tuple, list[dict]] = {}
    for row in rows():
        if row["seed"] in plain:
            own = plain[row["seed"]]
            start, best = float(own["before_task"]), float(own["after_task"])
            row["share"] = math.log(start / float(row["after_task"])) / math.log(start / best)
            row["text_against_lora"] = float(row["after_text"]) / float(own["after_text"])
            groups.setdefault(key({**row, "seed": ""}), []).append(row)
    table = []
    for members in groups.values():
        line = {name: members[0][name] for name in (*Case.__dataclass_fields__, "recovery")}
        for name in ("before_task", "after_task", "after_text", "choice", "share"):
            values = [float(member[name]) for member in members if member[name] != ""]
            line[name] = statistics.mean(values) if values else math.nan
            line[f"{name}_sd"] = statistics.stdev(values) if len(values) > 1 else math.nan
        ratios = [float(member["text_against_lora"]) for member in members]
        table.append({**line, "text_against_lora": statistics.mean(ratios), "seeds": len(members)})
    return table


def show(table: list[dict]) -> None:
    """The table, as Markdown."""
    print(
        "| model | ratio | units by | refit | on | aligned by | on | 4 bits | recovery "
        "| untuned task | task | text | text / LoRA's | choice | share | seeds |"
    )
    print("|" + "---|" * 16)
    for line in table:
        cells = [line[n] for n in ("model", "ratio", "method", "refit", "calibration")]
        cells += [line["align"], line["align_on"], line["four_bit"], line["recovery"]]
        cells += [f"{line[n]:.1f}" for n in ("before_task", "after_task", "after_text")]
        cells += [f"{line['text_against_lora']:.3f}", _number(line, "choice")]
        print(f"| {' | '.join(cells)} | {_number(line, 'share')} | {line['seeds']} |")


def _number(line: dict, name: str) -> str:
    spread = line[f"{name}_sd"]
    found = "" if math.isnan(line[name]) else f"{line[name]:.3f}"
    return found if math.isnan(spread) else f"{found} ± {spread:.3f}"


def plot(table: list[dict], file: Path) -> None:
    """The recovered share over the pruning ratio, one line for each way to align and recover."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(6, 4), layout="constrained")
    usual = asdict(Case())
    same = ("model", "method", "refit", "calibration", "four_bit")
    lines = [line for line in table if all(line[name] == str(usual[name]) for name in same)]
    styles = {"zeros": "--", "fitted": "-", "none": ":"}
    for color, align_ in (("C0", "none"), ("C1", "distillation")):
        for recovery, style in styles.items():
            own = sorted(
                (float(line["ratio"]), line["share"])
                for line in lines
                if (line["align"], line["recovery"]) == (align_, recovery)
                and line["align_on"] in ("", usual["align_on"])
            )
            if own:
                where = "on the pruned model" if recovery == "none" else f"recovered, {recovery}"
                label = f"{'distilled' if align_ != 'none' else 'unaligned'}: {where}"
                panel.plot(*zip(*own, strict=True), style, color=color, marker="o", label=label)
    panel.axhline(1, color="0.5", linewidth=0.8)
    panel.set(xlabel="pruning ratio", ylabel="share of plain LoRA's gain (log perplexity)")
    panel.legend(fontsize=7)
    figure.savefig(file, dpi=110)
