import json
import logging
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.config import AxolotlInputConfig
from conftest import run_command
from safetensors.torch import load_file, save_file
from test_recover import train_on

from axolotl_loram.architecture.plan import PruningPlan
from axolotl_loram.config import PruningArgs
from axolotl_loram.config_loram import LoRAMArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.plugin import LoRAMPlugin
from axolotl_loram.pruning.cache import calibrate, prune_into_cache
from axolotl_loram.pruning.prune import prune
from axolotl_loram.training.run import begin_training, use_recovered_adapter
from axolotl_loram.training.support import check_supported

GOOD = {"adapter": "lora", "loram": {"pruned_model_path": "somewhere"}}


def test_what_works_is_not_refused():
    check_supported(DictDefault(GOOD))
    check_supported(DictDefault({**GOOD, "adapter": "qlora", "peft_use_rslora": True}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loram": None}, "`loram:` section"),
        ({"adapter": None}, "adapter: loram, qloram, lora, qlora.*found None"),
        ({"adapter": "llama-adapter"}, "found 'llama-adapter'"),
        ({"relora": True}, "`relora`.*merges"),
        ({"peft_use_dora": True}, "DoRA"),
        ({"peft_init_lora_weights": "pissa"}, "pissa"),
        ({"peft": {"loftq_config": {"loftq_bits": 4}}}, "loftq"),
        ({"gptq": True}, "`gptq`"),
        ({"reinit_weights": True}, "`reinit_weights`"),
        ({"peft_layer_replication": [[0, 4]]}, "`peft_layer_replication`"),
        ({"qat": {"weight_dtype": "int4"}}, "`qat`.*rounds the pruned weights"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size"),
        (
            {"expert_parallel_size": 2, "plugins": ["axolotl.integrations.x.ExpertParallelPlugin"]},
            "expert_parallel_size 1 with loram:, found 2",
        ),
    ],
)
def test_what_cannot_be_recovered_is_refused_by_name(changes, message):
    with pytest.raises(LoRAMError, match=message):
        check_supported(DictDefault({**GOOD, **changes}))


@pytest.mark.parametrize(("named", "meant"), [("loram", "lora"), ("qloram", "qlora")])
def test_adapters_that_axolotl_refuses_without_the_plugin(named, meant):
    """Where the plugin is not installed, `adapter: loram` stops Axolotl before it loads a model."""
    cfg = DictDefault({**GOOD, "adapter": named})
    LoRAMPlugin().register(cfg)
    assert cfg.adapter == meant
    settings = {"base_model": "x", "micro_batch_size": 1, "learning_rate": 1e-4, "max_steps": 1}
    datasets = [{"path": "x", "type": "completion"}]
    with pytest.raises(ValueError, match=f"'?{named}'?"):
        AxolotlInputConfig(**settings, datasets=datasets, adapter=named)
    AxolotlInputConfig(**settings, datasets=datasets, adapter="lora")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"prunning": {"ratio": 0.5}},
            "unknown key 'prunning' in loram: expected pruned_model_path",
        ),
        ({"pruning": {"ratio": 0.5, "metod": "random"}}, "unknown key 'metod'.*method"),
        ({"pruning": {"ratio": 2}}, "between 0 and 1"),
        ({"pruning": {}}, "expected a pruning ratio"),
        ({}, "found neither"),
        ({"pruned_model_path": "a", "pruning": {"ratio": 0.5}}, "found both"),
    ],
)
def test_the_section_is_checked(section, message):
    with pytest.raises(ValueError, match=message):
        LoRAMArgs(loram=section)


@pytest.fixture
def run(make_model, tmp_path):
    """Settings of a run on a pruned model, as they are when training begins."""
    prune(str(make_model()), tmp_path / "pruned", PruningArgs(ratio=0.5))
    settings = {
        "base_model": str(make_model()),
        "base_model_config": str(make_model()),
        "output_dir": str(tmp_path / "out"),
        "hub_model_id": "me/adapter",
        "loram": {"pruned_model_path": str(tmp_path / "pruned")},
    }
    return DictDefault(settings)


def test_training_begins_on_the_pruned_model(run, make_model, tmp_path):
    begun = begin_training(run)
    assert run.base_model == run.base_model_config == str(tmp_path / "pruned")
    assert run.output_dir == str(tmp_path / "out/pruned")
    assert run.hub_model_id is None and begun.hub_model_id == "me/adapter"
    assert begun.base.id == str(make_model())


@pytest.mark.parametrize("output", ["pruned", "."])
def test_an_output_dir_that_is_the_pruned_models_is_refused(run, output, tmp_path):
    run.output_dir = str(tmp_path / output)
    with pytest.raises(LoRAMError, match="another folder than the pruned model's"):
        begin_training(run)


def test_a_base_that_was_not_pruned_into_it_is_refused(run, make_model):
    run.base_model = str(make_model(seed=1))
    with pytest.raises(LoRAMError, match="fine-tuned"):
        begin_training(run)


def test_weights_that_a_fit_needs_are_missed_before_training(run, make_model, tmp_path):
    base = tmp_path / "without weights"
    shutil.copytree(make_model(), base, ignore=shutil.ignore_patterns("*.safetensors"))
    run.base_model, run.loram.fill = str(base), "fitted"
    with pytest.raises(LoRAMError, match="found neither"):
        begin_training(run)


def test_a_warm_start_is_gathered_once_per_adapter(run, make_model, tmp_path):
    torch.manual_seed(0)
    train_on(make_model(), tmp_path / "full")
    starts, made = [], set()
    for _ in range(2):
        cfg = DictDefault({**run, "lora_model_dir": str(tmp_path / "full")})
        begin_training(cfg)
        starts.append(cfg.lora_model_dir)
        made.add(Path(cfg.lora_model_dir, "adapter_config.json").stat().st_mtime_ns)
    assert starts[0] == starts[1] and len(made) == 1
    weights = load_file(Path(starts[0]) / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    assert weights[name].shape == (24, 4)
    torch.manual_seed(0)  # the same weights, so only the config tells the two apart
    train_on(make_model(), tmp_path / "full", lora_alpha=16)
    cfg = DictDefault({**run, "lora_model_dir": str(tmp_path / "full")})
    begin_training(cfg)
    assert cfg.lora_model_dir != starts[0]


def test_an_adapter_for_another_base_is_no_warm_start(run, make_model, tmp_path):
    train_on(make_model(intermediate_size=64), tmp_path / "full")
    run.lora_model_dir = str(tmp_path / "full")
    with pytest.raises(LoRAMError, match="made for another base"):
        begin_training(run)


def test_pruned_modules_are_not_saved_whole(run):
    run.lora_modules_to_save = ["lm_head", "down_proj"]
    with pytest.raises(LoRAMError, match="found down_proj"):
        begin_training(run)
    run.lora_modules_to_save = ["lm_head", "embed_tokens"]
    begin_training(run)


def test_an_output_of_another_pruned_model_is_refused(run, make_model, tmp_path):
    (tmp_path / "out/pruned").mkdir(parents=True)
    begin_training(run).write_record(tmp_path / "out/pruned")
    prune(str(make_model()), tmp_path / "other", PruningArgs(ratio=0.5, seed=1))
    run.base_model, run.output_dir = str(make_model()), str(tmp_path / "out")
    run.loram = {"pruned_model_path": str(tmp_path / "other")}
    with pytest.raises(LoRAMError, match="another output_dir"):
        begin_training(run)


def test_an_adapter_that_was_not_trained_is_recovered_with_a_warning(
    run, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("axolotl_loram"), "propagate", True)
    plugin = LoRAMPlugin()
    plugin.run = begin_training(run)
    file = plugin.run.trained / "adapter_model.safetensors"
    train_on(plugin.run.pruned, plugin.run.trained)
    plugin.run = replace(plugin.run, hub_model_id=None)
    plugin.post_train_unload(run)
    assert "changes nothing" not in caplog.text
    weights = load_file(file)
    save_file({n: w * ("lora_A" in n) for n, w in weights.items()}, file, {"format": "pt"})
    plugin.post_train_unload(run)
    assert "it changes nothing" in caplog.text and (tmp_path / "out/adapter_config.json").exists()


def test_tokens_that_the_run_adds_are_not_calibrated_on(make_model):
    settings = PruningArgs(ratio=0.5, method="taylor", calibration_samples=4, calibration_length=8)
    rows = [[token, 264, token + 1] for token in range(3, 200)]  # 264 is past the vocabulary
    found = calibrate(settings, make_model(), lambda: iter(rows))
    assert found.tokens.shape == (4, 8) and found.tokens.max() < 264
    assert found.record()["source"] == "the run's datasets"


def test_pruning_happens_once_per_base_and_settings(make_model, tmp_path):
    folders = [
        prune_into_cache(str(make_model(seed=seed)), None, PruningArgs(ratio=ratio), str(tmp_path))
        for seed, ratio in ((0, 0.5), (0, 0.5), (0, 0.25), (1, 0.5))
    ]
    assert folders[0] == folders[1] and len(set(folders)) == 3
    made = (folders[0] / "loram.json").stat().st_mtime_ns
    prune_into_cache(str(make_model()), None, PruningArgs(ratio=0.5), str(tmp_path))
    assert (folders[0] / "loram.json").stat().st_mtime_ns == made


def test_ranks_that_arrive_together_prune_once(make_model, tmp_path):
    script = (
        "import sys, time; from pathlib import Path\n"
        "from axolotl_loram.pruning.cache import prune_into_cache\n"
        "from axolotl_loram.config import PruningArgs\n"
        "Path(sys.argv[3]).touch()\n"
        "while not Path(sys.argv[4]).exists(): time.sleep(0.001)\n"
        "print(prune_into_cache(sys.argv[1], None, PruningArgs(ratio=0.5), sys.argv[2]))"
    )
    command = [sys.executable, "-c", script, str(make_model()), str(tmp_path / "cache")]
    ready, go = [tmp_path / "ready-0", tmp_path / "ready-1"], tmp_path / "go"
    ranks = [
        subprocess.Popen(
            [*command, str(flag), str(go)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for flag in ready
    ]
    while not all(flag.exists() for flag in ready):
        assert all(rank.poll() is None for rank in ranks)
        time.sleep(0.01)
    go.touch()
    results = [rank.communicate() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert results[0][0].splitlines()[-1] == results[1][0].splitlines()[-1]
    assert sum("pruning: 100%" in stderr for _, stderr in results) == 1
    folder = results[0][0].splitlines()[-1]
    assert PruningPlan.load(Path(folder)).kept


def write_record(folder, **record):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "loram.json").write_text(json.dumps({"schema_version": 1, **record}))


def test_other_commands_use_the_recovered_adapter(tmp_path):
    cfg = DictDefault({"output_dir": str(tmp_path / "out")})
    with pytest.raises(LoRAMError, match="run `axolotl train` first"):
        use_recovered_adapter(cfg)
    write_record(tmp_path / "out", kind="recovered-adapter", trained={"warm_start": "start"})
    use_recovered_adapter(cfg)
    assert cfg.lora_model_dir == str(tmp_path / "out")
    cfg.lora_model_dir = "start"  # what training started from is not what it ended with
    use_recovered_adapter(cfg)
    assert cfg.lora_model_dir == str(tmp_path / "out")
    cfg.lora_model_dir = str(tmp_path / "mine")
    use_recovered_adapter(cfg)
    assert cfg.lora_model_dir == str(tmp_path / "mine")
    write_record(tmp_path / "mine", kind="trained-adapter")
    with pytest.raises(LoRAMError, match="axolotl-loram recover"):
        use_recovered_adapter(cfg)


def test_training_that_bypasses_the_substitution_is_stopped():
    plugin = LoRAMPlugin()
    callback, _ = plugin.add_callbacks_pre_trainer(DictDefault({}), None)
    with pytest.raises(LoRAMError, match="use `axolotl train`"):
        callback.on_train_begin(None, None, None)


def test_a_plugin_that_cannot_be_imported_stops_axolotl(tmp_path):
    """Axolotl swallows ImportError and goes on without the plugin; ours raises something else."""
    script = (
        "import sys; from axolotl.integrations.base import PluginManager\n"
        "for name in [name for name in sys.modules if name.startswith('axolotl_loram')]:\n"
        "    del sys.modules[name]\n"
        "sys.modules['filelock'] = None  # what a broken installation looks like\n"
        "PluginManager.get_instance().register('axolotl_loram.LoRAMPlugin')\n"
        "print('went on without the plugin')"
    )
    (tmp_path / "broken.py").write_text(script)
    result = run_command(tmp_path / "broken.py", check=False)
    assert result.returncode and "LoRAMPlugin could not be imported" in result.stderr
    assert "went on" not in result.stdout
