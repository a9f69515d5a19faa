"""What the adapters of `real.py` write on the base, by llama.cpp: GSM8K's test.

The GGUF is the one that the base's checkpoint was unpacked from, so its weights are the same.
Form is the share that ends as the training rows do, in a line "#### N"; exact is the share whose N
is right. The error is that of a share of so many problems. Small models that answer greedily often
go round in circles; drawn at a temperature (llama.cpp's other settings at their defaults, a seed
for each problem) they seldom do.

    python benchmarks/generated.py MODEL GSM8K   # rows that generated.csv has are not run again
"""

from __future__ import annotations

import argparse
import csv
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path

import torch
import xllamacpp
from measure import ROOT, append_row, surroundings
from real import adapter_for_base, trained
from real_cases import SEEDS, Case
from real_models import RealBench

from axolotl_loram.results.converter import find_script, run_script
from axolotl_loram.results.export import LORA_SCRIPT

ROWS = Path(__file__).with_suffix(".csv")
PROBLEMS, NEW, AT_ONCE = 200, 200, 8
SAID = re.compile(r"#### *(-?[\d,.]*\d)\s*$")


def cases() -> Iterator[Case | None]:
    """The base as it is, LoRA, and the ways of LoRAM, at two rates; the first seed's first."""
    yield None
    for seed, rate in product(SEEDS, (2e-3, 1e-3)):
        new = partial(Case, seed, rate=rate)
        yield new()
        for ratio in (0.5, 0.75, 0.85):
            yield new(ratio, "top")
        for ratio in (0.5, 0.75):
            yield new(ratio, loss="anchored", top_k=32)
            yield new(ratio)
    yield Case(1, steps=120)
    yield Case(1, 0.5, "top", steps=120)


def written(bench: RealBench, adapter: Path | None, temperature: float) -> list[str]:
    """An answer to each problem, as far as NEW tokens go, by llama.cpp."""
    settings = xllamacpp.CommonParams()
    settings.model.path = str(bench.base.with_name(f"{bench.base.name}.gguf"))
    settings.n_parallel, settings.n_ctx = AT_ONCE, AT_ONCE * 1024
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.warmup, settings.verbosity = False, 1
    if adapter:
        file = adapter / "adapter.gguf"
        if not file.exists():
            script = find_script(LORA_SCRIPT)
            run_script(script, "--base", bench.base, "--outfile", file, adapter)
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(file), 1.0)]
    server = xllamacpp.Server(settings)

    def answer(number: int, row: list[dict[str, str]]) -> str:
        asked = {"messages": row[:-1], "max_tokens": NEW}
        asked |= {"temperature": temperature, "seed": number}
        choice = server.handle_chat_completions(asked)["choices"][0]
        print(end=".", flush=True)
        return choice["message"]["content"].strip()

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(answer, range(PROBLEMS), bench.rows("test", PROBLEMS)))


def scores(bench: RealBench, answers: list[str]) -> dict[str, float]:
    """Shares of the answers in form and right, each with its standard error."""
    wanted = [SAID.search(row[-1]["content"])[1] for row in bench.rows("test", PROBLEMS)]
    said = [match and match[1] for match in map(SAID.search, answers)]
    right = [
        answer is not None and answer.replace(",", "") == number.replace(",", "")
        for answer, number in zip(said, wanted, strict=True)
    ]
    found = {}
    for name, hits in (("form", [answer is not None for answer in said]), ("exact", right)):
        share = sum(hits) / len(hits)
        found[name] = round(share, 4)
        found[f"{name}_error"] = round((share * (1 - share) / len(hits)) ** 0.5, 4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a chat model")
    parser.add_argument("gsm8k", type=Path, help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--scratch", type=Path, default=ROOT / "build", help="real.py's")
    parser.add_argument("--only", default="", help="runs whose description has this regex")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = RealBench(options.model, options.gsm8k, options.scratch / f"real-{options.model.name}")
    for case in cases():
        told = {"model": bench.base.name, "problems": PROBLEMS}
        told |= {"temperature": options.temperature}
        told |= dict.fromkeys(asdict(Case(0)), "") if case is None else asdict(case)
        rows = csv.DictReader(ROWS.open(encoding="utf-8")) if ROWS.exists() else []
        there = any({k: str(v) for k, v in told.items()}.items() <= row.items() for row in rows)
        if there or not re.search(options.only, str(case)):
            continue
        adapter = case and adapter_for_base(bench, case, trained(bench, case))
        begun = time.perf_counter()
        row = told | scores(bench, written(bench, adapter, options.temperature))
        row |= {"seconds": round(time.perf_counter() - begun)}
        append_row(ROWS, row | surroundings("transformers", "peft"))
        print(row, flush=True)


if __name__ == "__main__":
    main()
