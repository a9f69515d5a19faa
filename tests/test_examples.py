"""The shipped examples: their figures are the planner's, and they run."""

import json
import re
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import yaml
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.config import AxolotlInputConfig
from conftest import run_command, write_yaml

from axolotl_loram.config_loram import LoRAMArgs
from axolotl_loram.memory.planner import plan
from axolotl_loram.memory.request import request
from axolotl_loram.training.support import check_supported

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples/paper"))
import tables  # noqa: E402  (examples/paper/tables.py)

SMALL = sorted((ROOT / "examples/24gb").glob("*.yml"))
FIGURES = re.compile(r"^# +(\d+) +(\d+) +([\d.]+) +([\d.]+) +([\d.]+)$", re.MULTILINE)
CARD = re.compile(r"one GPU of (\d+) GB")
WHOLE = re.compile(r"QLoRA on the whole model at ([\d,]+) tokens, ([\d.]+) GiB, (.+)")
LLAMA_2 = {
    "2-7b": (4096, 11008, 32, 32, 32),
    "2-13b": (5120, 13824, 40, 40, 40),
    "2-70b": (8192, 28672, 80, 64, 8),
}
PAPER = {  # parameters after pruning, as in the paper's tables
    ("2-70b", 0.65): 28_099_436_544,
    ("2-70b", 0.75): 21_488_738_304,
    ("2-70b", 0.85): 16_272_924_672,
    ("2-70b", 0.95): 9_662_226_432,
    ("3.1-70b", 0.85): 17_849_982_976,
}


def accepted_by_axolotl(cfg):
    """Validate a copy, without the plugin's part; Axolotl changes what it validates."""
    kept = {key: value for key, value in cfg.items() if key not in ("plugins", "loram")}
    adapter = cfg["adapter"].replace("loram", "lora")
    AxolotlInputConfig(**deepcopy({**kept, "adapter": adapter}))


@pytest.mark.parametrize("file", SMALL, ids=lambda file: file.stem)
def test_figures_of_small_cards_are_the_planners(file, tmp_path):
    text = file.read_text(encoding="utf-8")
    cfg = yaml.safe_load(text)
    config = ROOT / f"docs/configs/{file.stem}.json"
    copy = write_yaml(tmp_path / file.name, {**cfg, "base_model": str(config)})
    used = (cfg["micro_batch_size"], cfg["sequence_len"])
    card, peaks = int(CARD.search(text)[1]) * 2**30, {}
    for batch, length, *figures in FIGURES.findall(text):
        sizes = {"micro_batch_size": int(batch), "sequence_len": int(length)}
        methods = plan(request(str(copy), options=sizes))["methods"]
        names = ("weights_device_bytes", "allocated_bytes", "peak_bytes")
        assert figures == [f"{methods['qloram'][name] / 2**30:.2f}" for name in names]
        peaks[int(batch), int(length)] = methods["qloram"]["peak_bytes"]
        if (int(batch), int(length)) == used:
            at, whole, said = WHOLE.search(text).groups()
            assert (int(at.replace(",", "")), whole) == (
                used[1],
                f"{methods['qlora']['peak_bytes'] / 2**30:.1f}",
            )
            assert "fit" in said and methods["qlora"]["peak_bytes"] > card * 0.9
    assert len(peaks) == 3 and peaks[used] < card * 0.9
    pruning = dict(cfg["loram"]["pruning"])
    smaller = pruning | {"ratio": round(pruning.pop("ratio") - 0.05, 2)}
    assert cfg["loram"] == {"pruning": cfg["loram"]["pruning"], "anchor": "base"}
    assert pruning == {"units": "layers", "quantize": "nf4-gptq"}
    write_yaml(copy, {**cfg, "base_model": str(config), "loram": {"pruning": smaller}})
    if smaller["ratio"]:
        assert plan(request(str(copy)))["methods"]["qloram"]["peak_bytes"] > card * 0.9
    accepted_by_axolotl(cfg)


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """Base of a row → its config.json."""
    folder, found = tmp_path_factory.mktemp("configs"), {}
    for name, (hidden, neurons, layers, heads, groups) in LLAMA_2.items():
        found[name] = folder / f"{name}.json"
        sizes = {"hidden_size": hidden, "intermediate_size": neurons, "num_hidden_layers": layers}
        sizes |= {"num_attention_heads": heads, "num_key_value_heads": groups, "vocab_size": 32000}
        found[name].write_text(json.dumps({"model_type": "llama", **sizes}))
    for size in ("8b", "70b"):
        found[f"3.1-{size}"] = ROOT / f"docs/configs/llama-3.1-{size}.json"
    return {tables.HUB[name]: file for name, file in found.items()}


@pytest.mark.parametrize("table", sorted({row.table for row in tables.ROWS}))
def test_the_papers_runs_are_planned(table, configs, tmp_path):
    """Each is accepted by Axolotl and here; pruned models have the paper's numbers of weights."""
    found = dict(tables.runs([table], [3e-4]))
    assert len(found) >= 3
    rows = [row for row in tables.ROWS if row.table == table]
    for row, (name, cfg) in zip(rows, found.items(), strict=True):
        if row.pruning:
            check_supported(DictDefault(cfg))
            LoRAMArgs(loram=cfg["loram"])
        accepted_by_axolotl(cfg)
        copy = {**cfg, "base_model": str(configs[cfg["base_model"]])}
        result = plan(request(str(write_yaml(tmp_path / f"{name}.yml", copy))))
        expected = PAPER.get((row.base, row.pruning.get("ratio")))
        assert expected in (None, result["pruned_parameters"]), name
        assert not result["not_counted"]
        used = cfg["micro_batch_size"] * cfg["gradient_accumulation_steps"]
        assert (used, cfg["sequence_len"]) == (128, 512)


def test_the_papers_alignments_go_with_its_runs(configs):
    recipe = yaml.safe_load((ROOT / "examples/publish/align.yml").read_text(encoding="utf-8"))
    aligned = dict(tables.alignments(["1", "7"], recipe))
    assert {cfg["max_steps"] for cfg in aligned.values()} == set(tables.ALIGNED)
    outputs = {cfg["output_dir"] for cfg in aligned.values()}
    wanted = [cfg["loram"] for _, cfg in tables.runs(["1", "7"], [3e-4], 1600) if "loram" in cfg]
    named = {section["pruned_model_path"] for section in wanted if "pruned_model_path" in section}
    assert len(named) == 5 and named <= outputs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stru", pytest.param("semi", marks=pytest.mark.matrix)])
def test_a_run_of_the_paper_on_a_pico_model(name, make_model, settings, tmp_path):
    """The row's own settings, but for the model, the data and what a CPU has not."""
    (row,) = (row for row in tables.ROWS if (row.table, row.name) == ("1", name))
    cfg = tables.settings(row, 1e-2, None)
    here = ("base_model", "datasets", "dataset_prepared_path", "output_dir", "sequence_len")
    here += ("bf16", "tf32", "attn_implementation", "max_steps", "save_strategy", "optimizer")
    here += ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "gradient_accumulation_steps")
    on_a_cpu = settings(make_model())
    cfg |= {key: on_a_cpu[key] for key in here} | {"special_tokens": {}, "chat_template": None}
    cfg["loram"]["cache_dir"] = str(tmp_path / "cache")
    cfg["loram"]["pruning"] |= {"calibration_samples": 8, "calibration_length": 32}
    run_command("axolotl", "train", write_yaml(tmp_path / "run.yml", cfg), "--launcher", "python")
    record = json.loads((tmp_path / "out/loram.json").read_text())
    assert record["trained"]["steps"] == {"done": 4, "planned": 4}
