"""What ZeRO holds where: the arithmetic against DeepSpeed itself, and `plan --stage align`."""

import json
from pathlib import Path

import pytest
import torch
from axolotl.utils.dict import DictDefault
from conftest import build_model, run_command, write_yaml
from test_activations import kept_for_backward, settings_for
from test_cli import loram
from test_model import LLAMA_2_13B

from axolotl_loram.errors import LoRAMError
from axolotl_loram.memory.cluster import FullActivations, align_plan, align_request, without_lora
from axolotl_loram.memory.layout import Layout
from axolotl_loram.memory.weights import Storage
from axolotl_loram.memory.zero import Weight, Zero, held, read_zero, zero_stage

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "deepspeed_configs"
RUN = ("zero2", "zero3", "zero3_offload_optimizer", "zero3_offload_all")
WEIGHTS = [
    Weight(131 * 517),
    Weight(517, decays=False, count=2),
    Weight(517 * 129),
    Weight(129, decays=False),
    Weight(129 * 33, trained=False),
]
"""Of the model in zero_ranks.py."""


RANKS_SCRIPT = ROOT / "tests/support/zero_ranks.py"


@pytest.fixture(scope="module")
def deepspeed(tmp_path_factory):
    """What two ranks of DeepSpeed on a CPU hold under each config: rank → name → bytes."""
    folder = tmp_path_factory.mktemp("ranks")
    files = [CONFIGS / f"{name}.json" for name in RUN]
    run_command("torchrun", "--nproc_per_node", "2", RANKS_SCRIPT, *files, folder)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_deepspeed_holds_what_is_predicted(name, deepspeed):
    zero = read_zero(CONFIGS / f"{name}.json")
    found = held(WEIGHTS, zero, 2, 100, 2, "adamw_torch")
    everywhere = {**found.device, **found.host}
    for rank in deepspeed:
        real = rank[name]
        for part in ("weights", "master weights", "optimizer"):
            assert everywhere[part] == real[part], part
        if zero.stage == 3:
            offloaded = zero.optimizer != "none"
            part = "accumulated gradients" if offloaded else "gradients"
            assert everywhere[part] == real["accumulated gradients"]
            assert (found.host["gradients"] if offloaded else 0) == real["gradients"]
        assert real["losses"][-1] != real["losses"][0]  # it stepped
    ours = 2 * found.checkpoint + (found.checkpoint_first // 2 if zero.stage < 3 else 0)
    assert 0 < deepspeed[0][name]["checkpoint"] - ours < 40_000  # names, and what pickles need


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.json")), ids=lambda file: file.stem)
def test_shipped_configs_are_deepspeeds(file):
    """As DeepSpeed itself parses them once transformers filled in "auto"."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = json.loads(file.read_text())
    section = {k: 1000 if v == "auto" else v for k, v in config["zero_optimization"].items()}
    parsed, ours = DeepSpeedZeroConfig(**section), read_zero(file)
    assert set(section) <= {
        field.alias or name for name, field in type(parsed).model_fields.items()
    }
    assert (int(parsed.stage), parsed.sub_group_size) == (ours.stage, ours.sub_group)
    for what, place in (("optimizer", ours.optimizer), ("param", ours.parameters)):
        offload = getattr(parsed, f"offload_{what}")
        assert place == (getattr(offload.device, "value", offload.device) if offload else "none")
    if ours.parameters == "nvme":
        assert parsed.offload_param.buffer_count == ours.parameter_buffers
        assert parsed.offload_param.max_in_cpu == ours.parameters_in_host
    assert parsed.max_live_parameters == ours.live
    assert parsed.gather_16bit_weights_on_model_save == (ours.stage == 3)
    assert file.stem in (CONFIGS / "README.md").read_text()


@pytest.mark.slow
def test_nvme_offload_steps(tmp_path):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        pytest.skip("DeepSpeed's NVMe offload needs libaio and its headers (apt: libaio-dev)")
    config = json.loads((CONFIGS / "zero3_nvme.json").read_text())
    for what in ("optimizer", "param"):
        config["zero_optimization"][f"offload_{what}"]["nvme_path"] = str(tmp_path / "nvme")
    (tmp_path / "nvme.json").write_text(json.dumps(config))
    one = ("torchrun", "--nproc_per_node", "1")
    run_command(*one, RANKS_SCRIPT, tmp_path / "nvme.json", tmp_path)


@pytest.mark.parametrize(("precision", "attention"), [("fp32", "sdpa"), ("bf16", "eager")])
def test_activations_of_full_training_to_the_byte(precision, attention):
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = build_model().to(dtype).train()
    model.set_attn_implementation(attention)
    run = settings_for(precision, attention="eager" if attention == "eager" else "flash")
    run = without_lora(run)
    count = FullActivations(run, Storage(native=run.compute_bytes))
    layout = Layout.of(model.config.to_dict())
    kept = count.moments(layout)["loss"][0]
    assert kept == kept_for_backward(Wrapped(model), False)


class Wrapped(torch.nn.Module):
    """A model where PEFT would have it."""

    def __init__(self, model):
        super().__init__()
        self.base_model = torch.nn.Module()
        self.base_model.model = model


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    (folder / "config.json").write_text(json.dumps(LLAMA_2_13B))
    return folder


def planned(model, name="zero3_offload_optimizer", nodes=1, gpus=1, **options):
    file = str(CONFIGS / f"{name}.json")
    return align_plan(align_request(str(model), None, options, file, nodes, gpus))


def test_more_ranks_hold_less_each_and_nodes_share(large):
    one, eight = (planned(large, ratio=0.65, gpus=gpus) for gpus in (1, 8))
    spread = planned(large, ratio=0.65, gpus=4, nodes=2)
    parameters, trained = one["pruned_parameters"], one["trained_parameters"]
    assert parameters - trained == 32000 * 5120  # the lm_head stays
    assert one["gpu"]["parts"]["weights"] == 2 * parameters
    assert eight["gpu"]["peak_bytes"] < one["gpu"]["peak_bytes"]
    assert spread["gpu"] == eight["gpu"]
    host = {name: eight["node"]["host"][name] for name in ("master weights", "optimizer")}
    assert host["optimizer"] == 2 * host["master weights"] == pytest.approx(8 * trained, rel=1e-6)
    assert spread["node"]["host"]["optimizer"] * 2 == eight["node"]["host"]["optimizer"]
    ends = spread["node"]["checkpoint_bytes"]
    assert ends["first_node"] - ends["other_nodes"] == 2 * parameters
    loading = one["node"]["loading"]
    assert loading == {"page_cache_bytes": 2 * parameters, "stacked_experts_bytes": 0}


def test_what_is_offloaded_moves(large):
    plans = {name: planned(large, name, gpus=8, ratio=0.65) for name in (*RUN, "zero3_nvme")}
    peaks = [plans[name]["gpu"]["peak_bytes"] for name in RUN]
    assert peaks == sorted(peaks, reverse=True)
    assert plans["zero3"]["node"]["host"].keys() == {"processes (assumed)"}
    nvme, cpu = plans["zero3_nvme"]["node"], plans["zero3_offload_all"]["node"]
    assert nvme["disk"]["weights"] == cpu["host"]["weights"] and not cpu["disk"]
    assert nvme["disk"]["optimizer"] == cpu["host"]["optimizer"]
    assert nvme["host_bytes"] < cpu["host_bytes"]


def test_a_yaml_and_a_pruned_folder(make_model, tmp_path):
    loram("prune", make_model(), tmp_path / "pruned", "--pruning-ratio", "0.5")
    settings = {
        "base_model": str(tmp_path / "pruned"),
        "loram": {"stage": "align", "train_lm_head": True},
        "deepspeed": str(CONFIGS / "zero2.json"),
        "sequence_len": 128,
        "bf16": True,
    }
    file = write_yaml(tmp_path / "align.yml", settings)
    result = json.loads(loram("plan", file, "--nodes", "2", "--json").stdout)
    assert result["training"]["sequence_len"] == 128
    assert result["trained_parameters"] == result["pruned_parameters"] < result["base_parameters"]
    assert result["gpu"]["parts"]["weights"] >= 2 * result["pruned_parameters"]
    shown = loram("plan", file, "--stage", "align").stdout
    assert "host memory of each node, GiB" in shown and "a checkpoint: first node" in shown


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ('{"stage": 3}', (), "with zero_optimization, found none"),
        ("[", (), "expected a JSON object in"),
        ('{"zero_optimization": {"stage": 0}}', (), "stage 1, 2 or 3 in"),
        (
            '{"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}',
            (),
            "found cpu under stage 2",
        ),
        ('{"zero_optimization": {"stage": 3}}', ("--nodes", "0"), "--nodes of at least 1, found 0"),
        (None, (), "found no"),
    ],
)
def test_bad_input_is_one_line(content, arguments, message, large, tmp_path):
    file = tmp_path / "zero.json"
    if content is not None:
        file.write_text(content)
    options = ("--pruning-ratio", "0.65", "--stage", "align", "--deepspeed", file)
    result = loram("plan", large, *options, *arguments, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr and "Traceback" not in result.stderr


def test_without_a_deepspeed_config(large):
    result = loram("plan", large, "--pruning-ratio", "0.65", "--stage", "align", check=False)
    assert result.returncode == 2 and "give --deepspeed FILE" in result.stderr


def test_buffers_that_the_largest_share_does_not_fit_into(large, tmp_path):
    config = json.loads((CONFIGS / "zero3_nvme.json").read_text())
    config["zero_optimization"]["offload_param"]["buffer_size"] = 1000
    (tmp_path / "zero.json").write_text(json.dumps(config))
    asked = align_request(str(large), None, {"ratio": 0.65}, str(tmp_path / "zero.json"))
    with pytest.raises(LoRAMError, match="buffer_size of at least 163,840,000"):
        align_plan(asked)


def test_weights_on_nvme_are_on_disk_wherever_the_optimizer_is():
    for optimizer in ("none", "cpu", "nvme"):
        zero = Zero(3, optimizer=optimizer, parameters="nvme")
        found = held([Weight(4096)], zero, 2, 64, 2, "adamw_torch")
        assert found.disk["weights"] == 2 * 2048


def test_the_stage_is_read_wherever_axolotl_has_it(tmp_path):
    """Of a file, a link out of its folder, a path, a dict or none; nothing said is no ZeRO."""
    file, link = tmp_path / "zero.json", tmp_path / "another" / "link.json"
    link.parent.mkdir()
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    link.symlink_to(file)
    settings = [str(file), file, str(link), {"zero_optimization": {"stage": 3}}]
    assert [zero_stage(each) for each in settings] == [3] * 4
    assert [zero_stage(each) for each in (None, {}, {"zero_optimization": {}})] == [0] * 3
    assert zero_stage(DictDefault(zero_optimization={"stage": 2})) == 2
    with pytest.raises(LoRAMError, match=r"absent\.json"):
        zero_stage(tmp_path / "absent.json")
