"""Two nodes as two network namespaces, each with its own disk: one fails and comes back."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import run_command, write_yaml, zero_on_cpus

from axolotl_loram.training.align import TRAINING_FOLDER
from axolotl_loram.training.checkpoints import STATE_FILE, surplus

ROOT = Path(__file__).resolve().parents[2]
STEPS, EVERY = 24, 4


@dataclass
class Node:
    """A network namespace and a folder that stands for its disk, seen at the same path by both."""

    rank: int
    name: str
    disk: Path
    seen: Path
    process: subprocess.Popen | None = None

    def start(self, command, environment):
        inside = f"mount --bind {self.disk} {self.seen} && cd {self.seen} && exec {command}"
        log = (self.disk / "log").open("ab")
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", self.name, "unshare", "--mount", "bash", "-c", inside],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )

    def kill(self):
        """All processes of the node at once: torchrun's ranks are in sessions of their own."""
        pids = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True)
        for pid in pids.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        self.process.wait()

    def wait(self, seconds):
        return self.process.wait(timeout=seconds)

    @property
    def log(self):
        return (self.disk / "log").read_text(errors="replace")


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def why_not():
    """Why there can be no namespaces here, or None."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        return "network namespaces need root, and iproute2"
    name = f"loram-try-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if tried.returncode:
        return f"network namespaces are not to be had: {tried.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return None


@pytest.fixture
def nodes(tmp_path):
    """Two, with addresses 10.77.0.1 and 10.77.0.2 on a cable between them."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    (tmp_path / "work").mkdir()
    names = [f"loram{os.getpid()}n{rank}" for rank in (0, 1)]
    made = []
    try:
        for rank, name in enumerate(names):
            ip("netns", "add", name)
            made.append(Node(rank, name, tmp_path / f"disk{rank}", tmp_path / "work"))
            made[rank].disk.mkdir()
        cable = ["type", "veth", "peer", "name", "eth0", "netns", names[1]]
        ip("link", "add", "eth0", "netns", names[0], *cable)
        for rank, name in enumerate(names):
            ip("-n", name, "address", "add", f"10.77.0.{rank + 1}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
        yield made
    finally:
        for node in made:
            if node.process is not None:
                node.kill()
            subprocess.run(["ip", "netns", "delete", node.name], check=False)


def wait_for(condition, seconds, *nodes):
    deadline = time.monotonic() + seconds
    while not condition():
        ended = [node.rank for node in nodes if node.process.poll() is not None]
        assert not ended, f"node {ended[0]} ended:\n{nodes[ended[0]].log[-6000:]}"
        assert time.monotonic() < deadline, "\n".join(node.log[-3000:] for node in nodes)
        time.sleep(0.05)


@pytest.fixture
def align_yaml(tmp_path):
    """An alignment whose sequences all have the same number of tokens; relative paths only."""
    source = Path(json.__file__).read_text(encoding="utf-8").replace("\n", " ")
    rows = [{"text": source[at : at + 60]} for at in range(0, 60 * 64, 60)]
    settings = {
        "base_model": "pruned",
        "plugins": ["axolotl_loram.LoRAMPlugin"],
        "loram": {"stage": "align"},
        "datasets": [{"path": "text.jsonl", "ds_type": "json", "type": "completion"}],
        "dataset_prepared_path": "prepared",
        "output_dir": "out",
        "deepspeed": "zero3.json",
        "sequence_len": 64,
        "val_set_size": 0,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": STEPS,
        "save_steps": EVERY,
        "save_total_limit": 2,
        "auto_resume_from_checkpoints": True,
        "learning_rate": 0.0001,
        "optimizer": "adamw_torch",
        "lr_scheduler": "cosine",
        "logging_steps": 1,
        "seed": 1,
        **dict.fromkeys(("bf16", "fp16", "tf32"), False),
        "attn_implementation": "sdpa",
    }

    def write(disk):
        write_yaml(disk / "align.yml", settings)
        (disk / "text.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        zero_on_cpus(disk)

    return write


@pytest.fixture
def pruned(make_model, tmp_path):
    run_command(
        "axolotl-loram", "prune", make_model(), tmp_path / "pruned", "--pruning-ratio", "0.5"
    )
    return tmp_path / "pruned"


@pytest.mark.multinode
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_node_fails_and_comes_back(nodes, pruned, align_yaml):
    for node in nodes:
        shutil.copytree(pruned, node.disk / "pruned")
        align_yaml(node.disk)
    programs = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests/support/cpu_ranks"), str(ROOT)]),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "eth0",
        "TP_SOCKET_IFNAME": "eth0",
    }
    first, second = nodes
    command = (
        f"{programs}/axolotl train align.yml --launcher torchrun -- --nnodes 2 --node_rank {{}} "
        "--nproc_per_node 1 --master_addr 10.77.0.1 --master_port 29511"
    )

    def start():
        for node in nodes:
            node.start(command.format(node.rank), environment)

    training = Path("out", TRAINING_FOLDER)
    start()
    wait_for(
        (first.disk / training / f"checkpoint-{EVERY}" / STATE_FILE).exists, 600, first, second
    )
    second.kill()
    assert first.wait(120) != 0  # it does not go on alone, nor hang
    whole = sorted(int(p.parent.name[11:]) for p in first.disk.glob(f"{training}/*/{STATE_FILE}"))
    assert whole[0] >= EVERY and whole[-1] < STEPS
    seen = state_of(first, whole[-1])["num_input_tokens_seen"]
    assert not list(second.disk.glob(f"{training}/*/{STATE_FILE}"))

    start()
    assert [node.wait(600) for node in nodes] == [0, 0], "\n".join(n.log[-4000:] for n in nodes)
    assert f"resuming from {training}/checkpoint-{whole[-1]}" in first.log
    record = json.loads((first.disk / "out/loram.json").read_text())
    alignment = record["alignments"][-1]
    assert (alignment["steps"], alignment["world_size"]) == (STEPS, 2)
    assert alignment["tokens"] * whole[-1] == seen * STEPS  # none counted twice, none left out
    logged = [row["step"] for row in state_of(first, STEPS)["log_history"] if "loss" in row]
    assert logged == list(range(1, STEPS + 1))
    check_aligned(first.disk / "out", pruned)
    assert not list(second.disk.glob("out/*.safetensors"))
    shares = {path.name for path in second.disk.glob(f"{training}/checkpoint-*")}
    assert shares <= {f"checkpoint-{n}" for n in (whole[-1], STEPS - EVERY, STEPS)}


def state_of(node, step):
    folder = node.disk / "out" / TRAINING_FOLDER / f"checkpoint-{step}"
    return json.loads((folder / STATE_FILE).read_text())


def check_aligned(folder, pruned):
    """It is a whole model, of the pruned one's shapes, with other weights and the same lm_head."""
    from safetensors.torch import load_file

    before, after = (load_file(place / "model.safetensors") for place in (pruned, folder))
    assert {name: w.shape for name, w in before.items()} == {n: w.shape for n, w in after.items()}
    assert after["lm_head.weight"].equal(before["lm_head.weight"])
    changed = [name for name, weight in before.items() if not after[name].equal(weight)]
    assert len(changed) == len(before) - 1


def test_disks_of_other_nodes_keep_no_more_than_the_limit(tmp_path):
    for step in (4, 8, 12, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-4" / STATE_FILE).write_text("{}")
    assert [path.name for path in surplus(tmp_path, 100, 2)] == ["checkpoint-8"]
    assert surplus(tmp_path, 100, 3) == []
