"""The report: numbers as in the JSON, nothing guessed, a page that a real browser shows well."""

import json
import math
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from click.testing import CliRunner

from axolotl_loram.architecture.config_json import with_defaults
from axolotl_loram.architecture.model import tensors
from axolotl_loram.architecture.plan import PruningPlan
from axolotl_loram.architecture.record import losses_of
from axolotl_loram.cli import main
from axolotl_loram.config import PruningArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.tensors import write_safetensors
from axolotl_loram.memory.planner import plan
from axolotl_loram.memory.request import request
from axolotl_loram.pruning.prune import prune
from axolotl_loram.results import statistics
from axolotl_loram.results.figures import (
    Bars,
)
from axolotl_loram.results.page import Table, html
from axolotl_loram.results.report import build
from axolotl_loram.results.statistics import Interval

HOSTILE = "</title><script>alert(1)</script><img src=x onerror=alert(1)> & {{ 7 * 7 }} \" ' \x00 é"
LOSSES = {
    "base": 6.0,
    "pruned": 6.5,
    "pruned+adapter": 5.25,
    "base+recovered": 5.2,
    "also:lora": 5.16,
}


def save(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def evaluation(losses=LOSSES, **changes):
    models = {name: {"loss": loss, "standard_error": 0.02} for name, loss in losses.items()}
    paired = {
        name: {"against": "base", "difference": loss - 6.0, "standard_error": 0.005}
        for name, loss in losses.items()
        if name != "base"
    }
    held = {"kind": "in_domain", "tokens": 31006, "documents": 1200}
    zero, some = {"value": 0.0, "standard_error": 0.0}, {"value": 0.3, "standard_error": 0.03}
    scores = {name: some if name.startswith("also") else zero for name in losses}
    task = {"metric": "exact_match,strict", "num_fewshot": 8, "samples": 200, "models": scores}
    return {
        "schema_version": 1,
        "kind": "evaluation",
        "base": {"id": "some-org/base", "revision": "abc"},
        "models": {name: {} for name in losses},
        "perplexity": {"modules": {**held, "models": models, "paired": paired}},
        "tasks": {"gsm8k": task},
        "seed": 0,
        "device": "cpu",
        **changes,
    }


def write_base(folder):
    """A Llama with random weights, written without torch, which takes long to import."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 99}
    config = with_defaults({"model_type": "llama", **sizes, **heads})
    save(folder / "config.json", config)
    described = [(tensor.name, "F32", tensor.shape) for tensor in tensors(config)]
    random = np.random.default_rng(0)
    weights = (random.random(shape, np.float32).view("<u4") for _, _, shape in described)
    write_safetensors(folder / "model.safetensors", described, weights)
    return str(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders as runs leave them: a real pruned model and plan of memory, histories by hand."""
    folder = tmp_path_factory.mktemp("runs")
    base = write_base(folder / "base")
    record = prune(base, folder / "pruned", PruningArgs(ratio=0.5))
    asked = request(base, None, {"ratio": 0.5, "sequence_len": 128}, None, None)
    planned = save(folder / "plan.json", plan(asked))
    methods = json.loads(planned.read_text())["methods"]
    measured = {"device": "cpu", "max_resident_process_bytes": 2**30}
    memory = {
        "predicted": {"method": "loram", **methods["loram"], "methods": methods},
        "measured": measured,
    }
    history = [{"step": 10 * i, "loss": 6 - 0.1 * i, "eval_loss": 6 - 0.09 * i} for i in range(9)]
    trained = {"pruned_model": str(folder / "pruned"), "history": history, "memory": memory}
    about = {"schema_version": 1, "kind": "recovered-adapter", "base": {"id": "some-org/base"}}
    save(folder / "loram/loram.json", {**about, "plan": record["plan"], "trained": trained})
    save(folder / "loram/adapter_config.json", {"r": 8, "lora_alpha": 16})
    save(folder / "lora/adapter_config.json", {"base_model_name_or_path": "some-org/base"})
    logged = [{**entry, "memory/max_allocated (GiB)": 3.25} for entry in history]
    save(folder / "lora/checkpoint-9/trainer_state.json", {"log_history": history[:3]})
    save(folder / "lora/checkpoint-80/trainer_state.json", {"log_history": logged})
    save(folder / "evaluation.json", evaluation())
    return folder


@pytest.fixture
def all_runs(runs):
    return [runs / name for name in ("loram", "lora", "evaluation.json", "plan.json", "pruned")]


def tables_of(report):
    items = [item for section in report.sections for item in section.items]
    return {item.caption: item for item in items if isinstance(item, Table)}


def row(table, name):
    return next(list(row) for row in table.rows if row[0] == name)


def test_numbers_are_those_of_the_json(all_runs):
    report = build(all_runs)
    assert (
        report.headline == "The recovered adapter keeps 95.2\N{NO-BREAK SPACE}% of what LoRA gains"
    )
    tables = tables_of(report)
    found = row(
        tables["Perplexity, modules (in domain): 31,006 tokens, 1,200 documents"], "base model"
    )
    assert found[1] == f"{math.exp(6):.1f}"
    low, high = math.exp(6 - 1.96 * 0.02), math.exp(6 + 1.96 * 0.02)
    assert found[2] == f"{low:.1f} to {high:.1f}"
    differences = tables["Differences, modules (in domain)"]
    ours = [list(r) for r in differences.rows if r[0] == "base + recovered LoRA"]
    assert [r[1] for r in ours] == ["base model", "base + lora"]
    assert [r[-1] for r in ours] == ["paired", "unpaired"]
    assert ours[0][2] == f"−{1 - math.exp(-0.8):.1%}".replace("%", "\N{NO-BREAK SPACE}%")
    assert ours[0][4] == "−0.8000" and ours[1][4] == "+0.0400"
    curves = next(chart for chart in report.charts if chart.name == "training-loss")
    assert {s.label: s.points[-1] for s in curves.series} == {
        "loram": (80, pytest.approx(5.2)),
        "lora": (80, pytest.approx(5.2)),
    }


def test_memory_parts_add_up_and_measurements_are_apart(runs, all_runs):
    report = build(all_runs)
    methods = json.loads((runs / "plan.json").read_text())["methods"]
    chart = next(chart for chart in report.charts if chart.name == "memory-plan")
    size = 2**30 if chart.unit == "GiB" else 2**20
    for bar, method in zip(chart.bars, methods.values(), strict=True):
        assert sum(bar.parts.values()) * size == pytest.approx(method["allocated_bytes"])
        assert not bar.measured
    measured = next(chart for chart in report.charts if chart.name == "memory-lora")
    assert [(b.label, b.parts, b.measured) for b in measured.bars] == [
        ("LoRA", {}, {"run lora": 3.25})
    ]
    assert "Memory on a GPU was not measured for loram" in report.missing


def test_a_measurement_stands_beside_its_prediction(runs, tmp_path):
    shutil.copytree(runs / "loram", tmp_path / "gpu")
    record = json.loads((tmp_path / "gpu/loram.json").read_text())
    measured = {"max_allocated_bytes": 2**20, "max_allocated_before_training_bytes": 3 * 2**20}
    record["trained"]["memory"]["measured"] = {"device": "some GPU", **measured}
    save(tmp_path / "gpu/loram.json", record)
    report = build([tmp_path / "gpu"])
    [chart] = [chart for chart in report.charts if isinstance(chart, Bars)]
    assert [bar.measured for bar in chart.bars] == [{}, {}, {"run gpu": 3.0}, {}]
    table = tables_of(report)["MiB on one GPU, gpu: predicted"]
    assert row(table, "peak, allocated, measured in gpu")[2:4] == ["not measured", "3.00"]
    assert not any("Memory" in sentence for sentence in report.missing)


def test_a_rate_of_zero_has_an_interval(all_runs):
    tables = tables_of(build(all_runs))
    scores = row(tables["Scores with 95 % intervals"], "gsm8k, 8-shot (exact_match)")
    assert scores[1].replace("\N{NO-BREAK SPACE}", " ") == "0.0 % (0.0–1.9 %)"
    differences = [r for r in tables["Differences of scores"].rows if r[2] == "base model"]
    recovered = next(r for r in differences if r[1] == "base + recovered LoRA")
    assert list(recovered[3:]) == ["+0.0 points", "−1.9 to +1.9", "unpaired"]


@pytest.mark.parametrize(
    ("losses", "headline"),
    [
        ({"base": 6, "base+recovered": 5}, "lowers held-out perplexity from 403.4 to 148.4"),
        ({"base": 5, "base+recovered": 6}, "raises held-out perplexity from 148.4 to 403.4"),
        ({"base": 6, "base+recovered": 6.001}, "No measurable change"),
        ({"base": 5, "base+recovered": 6, "also:lora": 5.5}, "raises held-out perplexity"),
        ({"base": 6, "base+recovered": 5, "also:lora": 5.2}, "keeps 125.0"),
        ({"base": 6, "also:lora": 5}, "An evaluation without LoRAM"),
    ],
)
def test_headlines(losses, headline, tmp_path):
    models = {name: {"loss": loss, "standard_error": 0.01} for name, loss in losses.items()}
    content = evaluation(perplexity={"modules": {"models": models}}, tasks={})
    report = build([save(tmp_path / "evaluation.json", content)])
    assert headline in report.headline
    html(report)


def test_what_was_not_measured_is_said(runs):
    lone = {name: build([runs / name]) for name in ("loram", "lora", "pruned", "plan.json")}
    for report in lone.values():
        assert any("Perplexity was not measured" in sentence for sentence in report.missing)
        assert any("Tasks were not measured" in sentence for sentence in report.missing)
    assert "Tasks were not measured" in html(lone["lora"])
    assert any("kept" in chart.title.lower() for chart in lone["pruned"].charts)
    assert any("No pruned model" in sentence for sentence in lone["lora"].missing)


@pytest.mark.parametrize("name", ["pruned", "plan.json"])
def test_what_was_run_is_written_out(name, runs):
    table = build([runs / name]).sections[-1].items[0]
    said = (
        "base parameters 37,344, pruned parameters 29,664, layers 4, pruned layers 2, "
        "kept per pruned layer (neurons 24, kv groups 1)"
    )
    assert row(table, "parameters") == ["parameters", said]
    assert all(text for _, text in table.rows)
    if name == "pruned":
        assert row(table, "pruning")[1].startswith("method random, ratio 0.5, allocation uniform")
        assert row(table, "alignment")[1] == "none"


def test_widths_are_those_of_the_plan(runs):
    kept = PruningPlan.load(runs / "pruned")
    chart = next(chart for chart in build([runs / "pruned"]).charts if "widths" in chart.name)
    drawn = chart.strips
    for layer, counts in kept.counts.items():
        assert drawn["MLP neurons"][layer][0] == counts["neurons"]
        assert drawn["KV groups"][layer][0] == counts["kv_groups"]
    whole = set(range(len(drawn["KV groups"]))) - kept.counts.keys()
    assert whole and all(len(set(drawn["KV groups"][layer])) == 1 for layer in whole)


class Tags(HTMLParser):
    """Counts a page's elements, and the attributes that would run or load something."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.unsafe, self.texts = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.unsafe += [
            (tag, k) for k, _ in attributes if k.startswith("on") or k in ("src", "style")
        ]

    def handle_data(self, data):
        self.texts.append(data)


def test_hostile_strings_stay_text(tmp_path, runs):
    """A name from the hub, a task or a data set cannot put elements into the page."""
    content = evaluation(
        base={"id": HOSTILE, "revision": HOSTILE},
        models={"also:lora": {"label": HOSTILE}},
        device=HOSTILE,
        versions={HOSTILE: HOSTILE},
    )
    content["perplexity"] = {HOSTILE: {**content["perplexity"]["modules"], "source": HOSTILE}}
    content["tasks"] = {HOSTILE: {**content["tasks"]["gsm8k"], "metric": HOSTILE}}
    folder = tmp_path / "<b>loram & 'x'"
    shutil.copytree(runs / "loram", folder)
    record = json.loads((folder / "loram.json").read_text())
    save(folder / "loram.json", {**record, "base": {"id": HOSTILE}})
    page = html(build([save(tmp_path / "evaluation.json", content), folder]))
    found = Tags(page)
    assert not {"script", "img", "b", "iframe", "link"} & set(found.tags) and not found.unsafe
    assert any("alert(1)" in text for text in found.texts) and "49" not in "".join(found.texts[:9])


def test_a_newer_evaluation_is_refused(tmp_path):
    file = save(tmp_path / "evaluation.json", evaluation(schema_version=2))
    with pytest.raises(LoRAMError, match=r"expected schema version 1 .* found 2: upgrade"):
        build([file])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.json", None, "found nothing there"),
        ("x.json", "{", "expected a JSON object in"),
        ("x.json", "[1]", "found a list"),
        ("x.json", '{"a": 1}', "found other JSON"),
        ("x.json", '{"kind": "evaluation", "perplexity": {"a": {"models": 3}}}', "perplexity.a"),
        ("x.json", '{"base_parameters": 3, "methods": {"lora": {}}}', "cannot be shown (KeyError"),
        ("loram.json", '{"schema_version": 9}', "expected schema version 1"),
        ("other.txt", "", "found no JSON of one"),
    ],
)
def test_other_input_gets_one_sentence(name, text, message, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    path = tmp_path if name in ("other.txt", "loram.json") else tmp_path / name
    result = CliRunner().invoke(main, ["report", str(path), "--output", str(tmp_path / "r.html")])
    assert result.exit_code == 1 and message in result.output
    assert result.output.startswith("Error: expected") and result.output.count("\n") == 1
    assert not (tmp_path / "r.html").exists()


def test_the_command_writes_page_and_pictures(all_runs, tmp_path):
    all_runs = all_runs[:3]
    arguments = ["report", *map(str, all_runs), "--output", str(tmp_path / "a/report.html")]
    arguments += ["--png-dir", str(tmp_path / "png"), "--json"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    answer = json.loads(result.output)
    assert (
        answer["report"] == str(tmp_path / "a/report.html") and "keeps 95.2" in answer["headline"]
    )
    assert len(answer["pictures"]) == len(build(all_runs).charts) > 5
    for file in (tmp_path / "png").iterdir():
        assert file.read_bytes().startswith(b"\x89PNG")


def test_losses_of_a_log():
    log = [
        {"step": 1, "loss": 2.5, "tokens/total": 7, "epoch": 0.1},
        {"step": 2, "loss": math.nan},
        {"step": 2, "eval_loss": 2.25, "eval_runtime": 3.0},
        {"step": 2, "train_runtime": 3.0},
    ]
    kept = [{"step": 1, "loss": 2.5, "epoch": 0.1}, {"step": 2, "eval_loss": 2.25}]
    assert losses_of(log) == kept


def test_intervals_are_the_published_ones():
    """Newcombe's examples: 15 of 148 (Stat. Med. 17:857), and 56/70 − 48/80 (17:873)."""
    one = statistics.score_interval(15 / 148, 0.0, 148)
    assert (one.low, one.high) == (pytest.approx(0.0624, abs=5e-5), pytest.approx(0.1605, abs=5e-5))
    ours = statistics.score_interval(56 / 70, None, 70)
    theirs = statistics.score_interval(48 / 80, None, 80)
    found = statistics.difference(ours, theirs)
    assert (found.low, found.high) == (
        pytest.approx(0.0524, abs=5e-5),
        pytest.approx(0.3339, abs=5e-5),
    )
    normal = statistics.difference(statistics.normal(1, 0.3), statistics.normal(0, 0.4))
    assert normal.high == pytest.approx(1 + 1.959964 * 0.5)
    assert statistics.normal(1, None) == Interval(1)
