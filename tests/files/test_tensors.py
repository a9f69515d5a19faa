"""Pruned weights are written block by block, and go on where they were interrupted."""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_model
from hypothesis import given, settings
from hypothesis import strategies as st

from axolotl_loram.architecture.counts import keep_counts
from axolotl_loram.architecture.model import tensors
from axolotl_loram.architecture.plan import PruningPlan, entries_of, gather
from axolotl_loram.config import PruningArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files import stored as stored_module
from axolotl_loram.files.atomic import updated_folder
from axolotl_loram.files.tensors import (
    ELEMENT_BYTES,
    INFINITY,
    Checkpoint,
    ahead,
    open_safetensors,
    write_safetensors,
)
from axolotl_loram.models.bits import to_torch
from axolotl_loram.pruning.gather import FINISHED, Part, needed_bytes, write_weights
from axolotl_loram.pruning.importance import magnitude_scores, random_scores, select
from axolotl_loram.pruning.prune import prune

NUMPY_FLOATS = {"F16": np.float16, "F32": np.float32, "F64": np.float64}


def stored_as(file: Path, name: str, dtype: str, bits: np.ndarray):
    write_safetensors(file, [(name, dtype, bits.shape)], [bits])
    return open_safetensors(file)[0][name]


def to_bits(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    floats = values.astype(NUMPY_FLOATS[dtype])
    return floats.view(f"u{floats.itemsize}")


@st.composite
def cases(draw):
    """A dtype, a shape, and the kept positions of each dimension."""
    shape = draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    features = [
        draw(
            st.none() | st.lists(st.sampled_from(range(size)), min_size=1, unique=True).map(sorted)
        )
        for size in shape
    ]
    kept = [None if keep is None else np.array(keep) for keep in features]
    return draw(st.sampled_from(sorted(ELEMENT_BYTES))), tuple(shape), kept


@settings(max_examples=200, deadline=None)
@given(cases(), st.integers(1, 200))
def test_gathering_in_blocks_is_gathering(case, block_bytes):
    dtype, shape, features = case
    width = ELEMENT_BYTES[dtype]
    bits = np.random.default_rng(0).bytes(int(np.prod(shape)) * width)
    lowest = INFINITY.get(dtype, 0) & -INFINITY.get(dtype, 0)  # without it, all are finite
    whole = np.frombuffer(bits, f"u{width}").reshape(shape) & ~np.array(lowest, f"u{width}")
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored_module, "BLOCK_BYTES", block_bytes)
        stored = stored_as(Path(folder) / "t.safetensors", "t", dtype, whole)
        expected = gather(whole, features)
        blocks = list(ahead(Part("t", [(stored, features)], expected.shape).blocks()))
    row = int(np.prod(shape[1:])) * width
    read = len(features[0]) if features[0] is not None else shape[0]
    assert len(blocks) == -(-read // max(1, block_bytes // row))
    np.testing.assert_array_equal(np.concatenate(blocks), expected)


def test_only_kept_rows_are_read(tmp_path, monkeypatch):
    """The others may lie beyond the end of the file."""
    bits = np.arange(40, dtype=np.uint16).reshape(10, 4)
    stored = stored_as(tmp_path / "t.safetensors", "t", "BF16", bits)
    with (tmp_path / "t.safetensors").open("r+b") as handle:
        handle.truncate(stored.start + 5 * 8)
    assert np.concatenate(list(stored.blocks(np.array([1, 2, 4])))).tolist() == [
        *bits[1:3].tolist(),
        bits[4].tolist(),
    ]
    with pytest.raises(LoRAMError, match=r"expected t in .* found that the file ends"):
        list(ahead(stored.blocks()))


def test_a_folder_in_an_updated_folder_joins_the_one_that_is_there(tmp_path):
    """As chat templates do beside those that a trainer saved; a second time too."""
    (tmp_path / "out/templates").mkdir(parents=True)
    (tmp_path / "out/templates/other").write_text("kept")
    for text in ("one", "two"):
        with updated_folder(tmp_path / "out", "last") as scratch:
            (scratch / "templates").mkdir()
            (scratch / "templates/tool").write_text(text)
            (scratch / "last").write_text("")
    held = {file.name: file.read_text() for file in (tmp_path / "out/templates").iterdir()}
    assert held == {"other": "kept", "tool": "two"}


def test_arrays_and_blocks_write_the_same_file(tmp_path):
    bits = np.arange(48, dtype=np.uint32).reshape(12, 4)
    described = [("a", "F32", (12, 4)), ("b", "F32", (12, 4))]
    digests = {
        write_safetensors(tmp_path / "arrays", described, [bits, bits]),
        write_safetensors(tmp_path / "blocks", described, [iter(np.split(bits, 3)), bits]),
        hashlib.sha256((tmp_path / "blocks").read_bytes()).hexdigest(),
    }
    assert len(digests) == 1
    with pytest.raises(AssertionError, match="a: wrote 128 bytes, announced 192"):
        write_safetensors(tmp_path / "short", described, [iter(np.split(bits, 3)[1:]), bits])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A pico model in several shards, and its config."""
    folder = tmp_path_factory.mktemp("base")
    build_model().save_pretrained(folder, max_shard_size="30KB")
    return Checkpoint(folder), json.loads((folder / "config.json").read_text())


def random_plan(config, seed=0) -> PruningPlan:
    counts = keep_counts(config, 0.5, 1, 1)
    units = {"neurons": config["intermediate_size"], "kv_groups": config["num_key_value_heads"]}
    kept = {
        name: select(random_scores(units[group.kind], seed, layer, group.kind), count)
        for name, layer, group in entries_of(config)
        if (count := counts.get(layer, {}).get(group.kind))
    }
    return PruningPlan(config, kept)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def identities(folder: Path) -> dict[str, tuple[int, int]]:
    files = folder.glob("model-*.safetensors")
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


class Interrupted(Exception):
    pass


def interrupt_after(share: float):
    """A progress that raises when this share of the bytes is written."""

    def start(total: float, what: str = "", unit: str = "B"):
        counted = 0

        def done(count: int) -> None:
            nonlocal counted
            counted += count
            if counted > share * total:
                raise Interrupted

        return done

    return start


def interrupted(base, plan: PruningPlan, folder: Path, share: float = 0.6, **options):
    folder.mkdir()
    with pytest.raises(Interrupted):
        write_weights(base[0], plan, folder, interrupt_after(share), **options)
    finished = identities(folder)
    assert 1 < len(finished) < len(base[0].shards) and (folder / FINISHED).exists()
    return finished


def test_the_weights_are_hashed_as_they_are_written(make_model, tmp_path, monkeypatch):
    """Reading a finished shard whole would take its size in memory."""
    original, read = Path.read_bytes, []
    monkeypatch.setattr(
        Path, "read_bytes", lambda file: (read.append(file.name), original(file))[1]
    )
    record = prune(str(make_model()), tmp_path / "out", PruningArgs(ratio=0.5))
    assert "model.safetensors" not in read and "config.json" in read
    written = original(tmp_path / "out/model.safetensors")
    assert record["files"]["model.safetensors"] == hashlib.sha256(written).hexdigest()


def test_an_interrupted_writing_goes_on(base, tmp_path):
    plan = random_plan(base[1])
    (tmp_path / "at once").mkdir()
    files = write_weights(base[0], plan, tmp_path / "at once")
    finished = interrupted(base, plan, tmp_path / "resumed")
    sizes, counts = [], []
    resumed = write_weights(
        base[0], plan, tmp_path / "resumed", lambda size, *_: sizes.append(size) or counts.append
    )
    assert resumed == files
    assert contents(tmp_path / "resumed") == contents(tmp_path / "at once")
    assert {**identities(tmp_path / "resumed"), **finished} == identities(tmp_path / "resumed")
    assert sizes == [sum(counts)] == [needed_bytes(base[0], plan)]
    for name, digest in files.items():
        assert hashlib.sha256((tmp_path / "at once" / name).read_bytes()).hexdigest() == digest


def test_needed_bytes_are_those_written(base, tmp_path):
    plan = random_plan(base[1])
    write_weights(base[0], plan, tmp_path)
    written = Checkpoint(tmp_path).tensors
    assert needed_bytes(base[0], plan) == sum(tensor.nbytes for tensor in written.values())
    for tensor in tensors(plan.config):
        whole = base[0][tensor.name].read()
        expected = gather(whole, plan.features(tensor.dims, tensor.layer))
        np.testing.assert_array_equal(written[tensor.name].read(), expected)


def shorten(folder: Path) -> None:
    file = min(folder.glob("model-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])


def lose(folder: Path) -> None:
    min(folder.glob("model-*.safetensors")).unlink()


@pytest.mark.parametrize("damage", [shorten, lose])
def test_a_damaged_file_is_written_again(damage, base, tmp_path):
    plan = random_plan(base[1])
    (tmp_path / "at once").mkdir()
    write_weights(base[0], plan, tmp_path / "at once")
    interrupted(base, plan, tmp_path / "resumed")
    damage(tmp_path / "resumed")
    write_weights(base[0], plan, tmp_path / "resumed")
    assert contents(tmp_path / "resumed") == contents(tmp_path / "at once")


def test_files_of_another_plan_are_not_kept(base, tmp_path):
    (tmp_path / "at once").mkdir()
    write_weights(base[0], random_plan(base[1], seed=1), tmp_path / "at once")
    interrupted(base, random_plan(base[1], seed=0), tmp_path / "resumed")
    write_weights(base[0], random_plan(base[1], seed=1), tmp_path / "resumed")
    assert contents(tmp_path / "resumed") == contents(tmp_path / "at once")


def test_replaced_tensors_are_copied(base, tmp_path):
    plan, name = random_plan(base[1]), "model.layers.1.mlp.down_proj.weight"
    bits = np.arange(32 * 24, dtype=np.uint32).reshape(32, 24)
    replaced = {name: stored_as(tmp_path / "fitted.safetensors", name, "F32", bits)}
    for folder in ("plain", "fitted"):
        (tmp_path / folder).mkdir()
    write_weights(base[0], plan, tmp_path / "plain")
    finished = interrupted(base, plan, tmp_path / "resumed", replaced=replaced)
    write_weights(base[0], plan, tmp_path / "resumed", replaced=replaced)
    assert finished.items() <= identities(tmp_path / "resumed").items()
    plain, fitted = Checkpoint(tmp_path / "plain"), Checkpoint(tmp_path / "resumed")
    np.testing.assert_array_equal(fitted[name].read(), bits)
    for other in plain.tensors.keys() - {name}:
        np.testing.assert_array_equal(fitted[other].read(), plain[other].read())
    interrupted(base, plan, tmp_path / "other")
    write_weights(base[0], plan, tmp_path / "other", replaced=replaced)
    assert contents(tmp_path / "other") == contents(tmp_path / "resumed")
    replaced[name] = stored_as(tmp_path / "wide.safetensors", name, "F32", bits.reshape(24, 32))
    with pytest.raises(AssertionError, match=r"expected F32 \(32, 24\)"):
        write_weights(base[0], plan, tmp_path / "fitted", replaced=replaced)


def layer_tensors(folder: Path, config, dtype: str, values):
    """Layer 1's tensors and their values: `values(shape)` as they are stored."""
    found = []
    for tensor in tensors(config):
        if tensor.layer == 1 and tensor.kinds:
            bits = to_bits(values(tensor.shape), dtype)
            found.append((tensor, stored_as(folder / tensor.name, tensor.name, dtype, bits)))
    return found


def dense_scores(members, kind: str) -> np.ndarray:
    """Σ w² per unit, in float64 and unit by unit."""
    total = np.zeros(members[0][0].sizes[kind])
    for tensor, stored in members:
        values = to_torch(stored, torch.float64).numpy()
        for axis, dim in enumerate(tensor.dims):
            if kind in {space.units for space in dim}:
                for unit, part in enumerate(np.split(values, len(total), axis)):
                    total[unit] += (part**2).sum()
    return total


@pytest.mark.parametrize("kind", ["neurons", "kv_groups"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_scores_in_blocks_are_dense_scores(dtype, kind, base, tmp_path, monkeypatch):
    rng, counts = np.random.default_rng(0), []
    members = layer_tensors(tmp_path, base[1], dtype, rng.standard_normal)
    members = [(tensor, stored) for tensor, stored in members if kind in tensor.kinds]
    monkeypatch.setattr(stored_module, "BLOCK_BYTES", 500)
    scores = magnitude_scores(members, kind, counts.append)
    np.testing.assert_allclose(scores, dense_scores(members, kind), rtol=1e-6)
    assert sum(counts) == sum(stored.nbytes for _, stored in members) and max(counts) <= 500


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F64"])
def test_squares_beyond_float32_are_no_error(dtype, base, tmp_path):
    members = layer_tensors(tmp_path, base[1], dtype, lambda shape: np.full(shape, 2.0**100))
    members = [(tensor, stored) for tensor, stored in members if "neurons" in tensor.kinds]
    scores = magnitude_scores(members, "neurons")
    np.testing.assert_allclose(scores, 3 * 32 * 2.0**200, rtol=1e-6)


def test_squares_beyond_float64_are_the_highest_scores(base, tmp_path):
    members = layer_tensors(tmp_path, base[1], "F64", lambda shape: np.full(shape, 1e200))
    members = [(tensor, stored) for tensor, stored in members if "neurons" in tensor.kinds]
    assert np.isposinf(magnitude_scores(members, "neurons")).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_weights_that_are_not_finite_are_named(dtype, value, base, tmp_path, monkeypatch):
    def values(shape):
        return np.where(np.arange(np.prod(shape)) == np.prod(shape) // 2, value, 1.0).reshape(shape)

    monkeypatch.setattr(stored_module, "BLOCK_BYTES", 500)
    members = layer_tensors(tmp_path, base[1], dtype, values)
    for tensor, stored in members:
        with pytest.raises(LoRAMError, match=f"NaN or infinity in {tensor.name}"):
            magnitude_scores([(tensor, stored)], max(tensor.kinds))


def test_weights_that_are_no_floats_are_named(base, tmp_path):
    tensor = next(tensor for tensor in tensors(base[1]) if tensor.kinds)
    bits = np.zeros(tensor.shape, np.uint8)
    stored = stored_as(tmp_path / "t", tensor.name, "F8_E4M3", bits)
    with pytest.raises(LoRAMError, match=f"{tensor.name} of F8_E4M3.* --method random"):
        magnitude_scores([(tensor, stored)], "kv_groups")


LARGE = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2**17,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 8,
}
PRUNE_LARGE = """
import json, re, sys
from pathlib import Path
from axolotl_loram.architecture.model import tensors
from axolotl_loram.files.tensors import Checkpoint
from axolotl_loram.pruning.gather import write_weights
from axolotl_loram.pruning.importance import magnitude_scores, select
from axolotl_loram.architecture.plan import PruningPlan

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

base, output, config = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
before, checkpoint = peak(), Checkpoint(base)
members = [(t, checkpoint[t.name]) for t in tensors(config) if "neurons" in t.kinds]
kept = select(magnitude_scores(members, "neurons"), 2**14)
write_weights(checkpoint, PruningPlan(config, {"model.layers.0.mlp": kept}), output)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the kernel's accounts")
def test_memory_is_a_few_blocks(tmp_path):
    """Of tensors of 256 MiB, a few blocks are in memory at a time."""
    described = [(tensor.name, "BF16", tensor.shape) for tensor in tensors(LARGE)]
    block = np.zeros(2**20, np.uint16)

    def blocks(size: int):
        for start in range(0, size, len(block)):
            yield block[: size - start]

    (tmp_path / "out").mkdir()
    file = tmp_path / "model.safetensors"
    write_safetensors(file, described, (blocks(int(np.prod(shape))) for *_, shape in described))
    arguments = [str(tmp_path), str(tmp_path / "out"), json.dumps(LARGE)]
    run = subprocess.run(
        [sys.executable, "-c", PRUNE_LARGE, *arguments], capture_output=True, text=True
    )
    shutil.rmtree(tmp_path)
    assert not run.returncode, run.stderr
    assert int(run.stdout) < 128 * 2**20
