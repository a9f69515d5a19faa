"""Pico models, a tokenizer and a data set of real text, all made offline in seconds."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from families import pico_config
from warm import COMMANDS, Started, run_warm

from axolotl_loram.architecture.families import FAMILIES

ROOT = Path(__file__).resolve().parent
RANKS = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT / "support/cpu_ranks", ROOT.parent)))}
"""Variables of commands that start ranks on CPUs."""

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ |= {"HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "WANDB_MODE": "disabled"}
os.environ["DS_ACCELERATOR"] = "cpu"  # asked for when deepspeed is imported


@pytest.hookimpl(trylast=True)  # of what markers left
def pytest_collection_modifyitems(config, items):
    """Whole commands first in each worker's share: what is left to steal at the end is short.

    xdist deals out equal shares of the list. The tests of a file stay in one, with their fixtures.
    """
    workers, rest, files = getattr(config, "workerinput", {}).get("workercount", 1), [], {}
    if workers == 1:
        return
    for item in items:
        long = item.get_closest_marker("slow") or item.path.parent.name == "end_to_end"
        (files.setdefault(item.path, []) if long else rest).append(item)
    shares = [[] for _ in range(workers)]
    for file in sorted(files.values(), key=len, reverse=True):
        min(shares, key=len).extend(file)
    for number, mine in enumerate(shares):
        share = len(items) * (number + 1) // workers - len(items) * number // workers
        mine += [rest.pop(0) for _ in range(min(len(rest), share - len(mine)))]
    items[:] = [item for mine in shares for item in mine] + rest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """What a test printed or logged of paths that are no UTF-8 can be sent to another process.

    xdist's end with an internal error otherwise, in whichever worker has a logger switched on.
    """
    report = yield
    for number, (name, text) in enumerate(report.sections):
        report.sections[number] = name, text.encode("utf-8", "backslashreplace").decode()
    return report


def build_model(family: str = "llama", seed: int = 0, **sizes):
    """A pico model with random weights, large enough for its outputs to tell layers apart."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = pico_config(family, **{"initializer_range": 0.2, **sizes})
    auto_class = getattr(transformers, FAMILIES[family].auto_class)
    return auto_class.from_config(config).float().eval()


def byte_tokenizer():
    """One token per byte, and three special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<bos>", "<eos>", "<pad>"]
    vocabulary = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[])
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


@pytest.fixture(scope="session")
def make_model(tmp_path_factory):
    """Saves pico models with their tokenizer, each once per session; returns the folder."""
    made = {}

    def make(family: str = "llama", seed: int = 0, **sizes) -> Path:
        key = json.dumps([family, seed, sizes], sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{family}-") / "model"
            build_model(family, seed, **sizes).save_pretrained(folder)
            byte_tokenizer().save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """Real text as a data set: paragraphs of the standard library's own source."""
    source = Path(json.__file__).read_text(encoding="utf-8")
    rows = [{"text": part[:120]} for part in source.split("\n\n") if len(part) > 40]
    file = tmp_path_factory.mktemp("data") / "text.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows * 2), encoding="utf-8")
    return file


@pytest.fixture
def settings(text_file, tmp_path):
    """Axolotl settings for a short training run on a CPU."""

    def make(base: Path, **changes) -> dict:
        return {
            "base_model": str(base),
            "plugins": ["axolotl_loram.LoRAMPlugin"],
            "datasets": [{"path": str(text_file), "ds_type": "json", "type": "completion"}],
            "dataset_prepared_path": str(tmp_path / "prepared"),
            "output_dir": str(tmp_path / "out"),
            "sequence_len": 64,
            "val_set_size": 0.1,
            "adapter": "lora",
            "lora_r": 4,
            "lora_alpha": 8,
            "lora_target_linear": True,
            **{f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o")},
            "micro_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "max_steps": 4,
            "learning_rate": 0.01,
            "optimizer": "adamw_torch",
            "lr_scheduler": "constant",
            "seed": 1,
            "bf16": False,
            "fp16": False,
            "tf32": False,
            "attn_implementation": "sdpa",
            "save_strategy": "no",
            "eval_strategy": "no",
            **changes,
        }

    return make


ATTENTION_KERNELS = {"lora_qkv_kernel": True, "lora_o_kernel": True}
"""On by default on a GPU; unlike the one of the MLP, which is Triton, they run on a CPU."""


def write_yaml(file: Path, settings: dict) -> Path:
    file.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return file


def start_command(*command: object, log: Path, variables: dict | None = None, cwd: object = "."):
    """Start one of Axolotl's commands or ours, which are forks of a process that has imported them.

    Returns an object like subprocess.Popen's.

    Args:
        command: The program's name, and its arguments.
        log: What the program says is added to this file.
        variables: Added to the environment.
        cwd: Its working directory.
    """
    streams = [os.devnull, *(str(log.resolve()),) * 2]
    return Started(*_called(command, variables), str(Path(cwd).resolve()), streams)


def _called(command: Sequence[object], variables: dict | None) -> tuple[list[str], dict[str, str]]:
    programs = Path(sys.executable).parent
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    argv = [str(programs / str(command[0])), *map(str, command[1:])]
    return argv, {**os.environ, "PATH": path, **(variables or {})}


LAUNCHING = [("axolotl", name) for name in ("train", "evaluate", "inference")]


def run_command(
    *command: object,
    check: bool = True,
    input: str = "",
    cwd: Path | None = None,
    variables: dict | None = None,
) -> subprocess.CompletedProcess:
    """Run an installed command of this environment, or a script; show its output if it fails.

    Scripts and commands that import torch are forks of a process that has (`warm`), but for those
    of Axolotl that start `accelerate`.
    """
    argv, environment = _called(command, variables)
    program, name = Path(argv[0]).name, (*argv, "")[1]
    warm = program.endswith(".py") or name in COMMANDS.get(program, ())
    warm |= bool({"--masked", "--fill", "--propose"} & {*argv})
    starts_others = (program, name) in LAUNCHING and "--launcher" not in argv
    folder = str(cwd or Path.cwd())
    if warm and not starts_others:
        result = run_warm(argv, environment, folder, input)
    else:
        options = {"env": environment, "cwd": folder, "input": input}
        result = subprocess.run(argv, capture_output=True, text=True, **options)
    if check and result.returncode:
        raise AssertionError(f"{command} failed:\n{result.stdout[-4000:]}\n{result.stderr[-6000:]}")
    return result


def zero_on_cpus(folder: Path, stage: int = 3) -> Path:
    """A shipped DeepSpeed configuration at any stage, as ranks on CPUs need it.

    DeepSpeed 0.18.9 waits for the last only of the weights that it gathers together. Gloo, on CPUs,
    may still be at another then: without this setting, one load in four had a wrong weight.
    """
    shipped = Path(__file__).resolve().parent.parent / "deepspeed_configs/zero3.json"
    config = json.loads(shipped.read_text())
    config["zero_optimization"] |= {"stage": stage, "stage3_allgather_sequential": True}
    file = folder / f"zero{stage}.json"
    file.write_text(json.dumps(config))
    return file
