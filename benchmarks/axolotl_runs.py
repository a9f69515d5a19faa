"""Trains every LoRA and QLoRA example of a checkout of Axolotl as a pico run, without and with us.

    python benchmarks/axolotl_runs.py PATH/TO/axolotl [PART_OF_A_NAME]

Of each example the model becomes a pico model of its family, the data a few rows of its format,
and what one CPU cannot run (`removed` in the row) goes; the rest of the YAML stays. It is trained
for two steps by `axolotl train`, as it is and with `loram: {pruning: {ratio: 0.5}}`. What trains
without the plugin must train with it, or be refused in one sentence before the first step, and
the recovered update must be the trained one, scattered by hand: where the pruned model's rows and
columns lie in the original is looked up in the weights themselves (hence no refit).

Adds a row an example to benchmarks/axolotl_runs.csv; examples that are there are passed over.
"""

from __future__ import annotations

import csv
import json
import logging
import re
import sys
import tempfile
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from axolotl_examples import examples, family_of_name
from measure import ROOT, append_row, surroundings

sys.path.insert(0, str(ROOT / "tests/support"))
sys.path.insert(0, str(ROOT / "tests"))
from conftest import build_model, byte_tokenizer, run_command, write_yaml
from families import OWN_SIZES
from safetensors.torch import load_file
from towers import make_processor

import axolotl_loram.heterogeneous  # noqa: F401
from axolotl_loram.architecture.families import FAMILIES

OUTPUT = Path(__file__).with_suffix(".csv")
COLUMNS = ("without", "with", "difference", "removed", "reason")
Known = dict[str, dict[str, str]]
"""A pico run, without what is named after its folder → what came of it."""
SECTION = {"pruning": {"ratio": 0.5, "refit": False}}
CANNOT = (
    *("attn_implementation", "flash_attention", "flash_optimum", "fused_attn_kernel", "xformers"),
    *("bf16", "bfloat16", "fp16", "float16", "torch_dtype", "tf32", "torch_compile"),
    *("deepspeed", "fsdp", "fsdp_config", "ddp", "ddp_find_unused_parameters", "device_map"),
    *("use_ray", "ray_num_workers", "expert_parallel_size", "experts_implementation"),
    *("use_kernels", "use_sonicmoe", "torch_compile_mode", "activation_offloading"),
    *("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "nvfp4_merge_aware"),
    *("model_quantization_config", "model_quantization_config_kwargs", "plugins"),
    "experimental_skip_move_to_device",
)
"""What wants a GPU, several processes, or a package for them."""
ELSEWHERE = (
    *("use_otel_metrics", "use_wandb", "use_tensorboard", "trust_remote_code", "revision_of_model"),
    *("hf_use_auth_token", "tokenizer_type", "tokenizer_use_mistral_common", "tokenizer_use_fast"),
    *("tokenizer_legacy", "num_epochs", "saves_per_epoch", "save_steps", "save_total_limit"),
    *("evals_per_epoch", "eval_steps", "eval_batch_size", "eval_table_size", "eval_sample_packing"),
    *("eval_max_new_tokens", "eval_causal_lm_metrics", "do_causal_lm_eval"),
    *("early_stopping_patience", "auto_resume_from_checkpoints"),
)
"""What is about services, tokenizers of the real model, and how long to train."""
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<eos>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def rows_of(data: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Rows of the format that an entry of `datasets` names."""
    return [
        _row(data, f"def f{number}(x):", f"return x + {number}", folder) for number in range(24)
    ]


def _row(data: dict[str, Any], asked: str, told: str, folder: Path) -> dict[str, Any]:
    kind, names = str(data["type"]), data.get("message_property_mappings") or {}
    role, content = names.get("role", "role"), names.get("content", "content")
    ask, tell = {role: "user", content: asked}, {role: "assistant", content: told}
    messages = [ask, tell]
    if "llava" in data["path"]:
        from PIL import Image

        picture = folder / "picture.png"
        Image.new("RGB", (16, 16), (90, 60, 30)).save(picture)
        shown = [{"type": "image", "path": str(picture)}, {"type": "text", "text": asked}]
        messages = [{"role": "user", "content": shown}]
        messages += [{"role": "assistant", "content": [{"type": "text", "text": told}]}]
    if kind == "chat_template.argilla":
        return {"chosen": messages, "rejected": [ask, {**tell, content: "pass"}]}
    if kind.startswith("chat_template.default"):
        return {"conversation": [ask], "chosen": tell, "rejected": {**tell, content: "pass"}}
    if kind.startswith("chat_template"):
        return {data.get("field_messages", "messages"): messages}
    if kind == "llama3.ultra":
        return {"prompt": asked, "completion": [ask, tell], "label": len(told) % 2 == 0}
    if kind.startswith(("alpaca", "ebft_opencode", "ebft_strided")):
        return {"instruction": f"Go on. {asked}", "input": asked, "output": told}
    return {"text": f"{asked} {told}"} if "ebft" not in kind else {"question": asked * 9}


def swap(cfg: dict[str, Any], base: Path, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The example for a CPU and a pico model; and which of its keys went."""
    telling = ("wandb", "swanlab", "use_swanlab", "trackio", "otel", "push_", "hub_", "torchdistx")
    gone = [key for key in cfg if key in CANNOT or key in ELSEWHERE or key.startswith(telling)]
    kept = {key: value for key, value in cfg.items() if key not in gone}
    removed = [key for key in CANNOT if cfg.get(key)]
    datasets = []
    for number, data in enumerate(cfg["datasets"]):
        file = folder / f"data{number}.jsonl"
        file.write_text("\n".join(map(json.dumps, rows_of(data, folder))))
        entry = {k: v for k, v in data.items() if k not in ("split", "data_files", "name")}
        datasets.append({**entry, "path": str(file), "ds_type": "json"})
    if "8bit" in cfg.get("optimizer", "") or "paged" in cfg.get("optimizer", ""):
        kept["optimizer"] = "adamw_torch"
        removed.append(cfg["optimizer"])
    if (cfg.get("trl") or {}).get("use_vllm"):
        kept["trl"] = {**cfg["trl"], "use_vllm": False}
        removed.append("use_vllm")
    if cfg.get("gradient_checkpointing") == "offload":
        kept["gradient_checkpointing"] = True
        removed.append("offload")
    kept |= {
        "base_model": str(base),
        "datasets": datasets,
        "dataset_prepared_path": str(folder / "prepared"),
        "sequence_len": min(512, cfg["sequence_len"]),
        "val_set_size": 0.0,
        "micro_batch_size": (cfg.get("trl") or {}).get("num_generations")
        or min(2, cfg["micro_batch_size"]),
        "gradient_accumulation_steps": 1,
        "max_steps": 2,
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "save_strategy": "no",
        "attn_implementation": "eager" if "gpt-oss" in cfg["base_model"] else "sdpa",
        **dict.fromkeys(
            ("bf16", "fp16", "tf32", *CANNOT[CANNOT.index("lora_mlp_kernel") :][:3]), False
        ),
    }
    given = {key: value for key, value in kept.items() if value is not None}
    return given | {"output_dir": "replaced"}, removed


def make_base(cfg: dict[str, Any], family: str, folder: Path) -> Path:
    """A pico model of the family, whose tokenizer has the tokens that the example names."""
    sizes = {"vocab_size": 320, "max_position_embeddings": 1024}
    if FAMILIES[family].section:
        sizes = {"text_config": {**OWN_SIZES[family]["text_config"], **sizes}}
    build_model(family, **sizes).save_pretrained(folder)
    reader = make_processor(family) if family in ("gemma3", "qwen2_5_vl") else byte_tokenizer()
    tokenizer = getattr(reader, "tokenizer", reader)
    tokenizer.add_tokens(tokens_of(cfg), special_tokens=True)
    tokenizer.chat_template = reader.chat_template = TEMPLATE
    reader.save_pretrained(folder)
    return folder


def tokens_of(cfg: dict[str, Any]) -> list[str]:
    """Tokens that the example takes for granted: none where it trains the embeddings for them."""
    named = [*(cfg.get("special_tokens") or {}).values(), *(cfg.get("eot_tokens") or ())]
    return [] if "lora_modules_to_save" in cfg else list(dict.fromkeys(named))


def train(cfg: dict[str, Any], folder: Path) -> str:
    """Whether it "trains", or the last error of the command."""
    file = write_yaml(folder / f"{Path(cfg['output_dir']).name}.yml", cfg)
    done = run_command("axolotl", "train", file, "--launcher", "python", check=False, cwd=folder)
    if not done.returncode:
        saved = Path(cfg["output_dir"], "adapter_model.safetensors")
        weights = load_file(saved).values() if saved.exists() else ()
        return "trains" if all(bool(w.isfinite().all()) for w in weights) else "trains to NaN"
    lines = r"^(?:[\w.]*\.)?(ValidationError.*\n.*\n.*|\w*(?:Error|Exception|Exit)\b.*)$"
    said = [" ".join(found.split()) for found in re.findall(lines, done.stderr, re.M)]
    begun = "after the first step: " if "'loss'" in done.stdout else ""
    return textwrap.shorten(begun + (said or done.stderr.splitlines() or ["no word"])[-1], 400)


def difference(family: str, base: Path, pruned: Path, output: Path) -> float:
    """The largest difference between the recovered update and the trained one put in by hand."""
    whole, narrow = _weights(family, base), _weights(family, pruned)
    trained, recovered = _adapter(output / "pruned"), _adapter(output)
    if trained.keys() != recovered.keys():
        raise AssertionError(f"other tensors: {sorted(trained.keys() ^ recovered.keys())}")
    found = []
    for name, ours in recovered.items():
        partner = name.replace("lora_A.weight", "lora_B.weight")
        if "lora_A.weight" in name:
            module = re.sub(r"\.base_layer|\.lora_A\.weight", "", name)
            places = _places(module, whole, narrow)
            by_hand = np.zeros((places[3], len(recovered[partner]), ours.shape[1]))
            spread = _update(trained[name], trained[partner], len(places[0]))
            rows, columns = (
                kept if size == spread.shape[axis] else range(by_hand.shape[axis])
                for axis, kept, size in (
                    (1, places[1], len(places[1])),
                    (2, places[2], len(places[2])),
                )
            )
            by_hand[np.ix_(places[0], rows, columns)] = spread
            found.append(np.abs(by_hand - _update(ours, recovered[partner], places[3])).max())
        elif "lora_B.weight" not in name:
            found.append(np.abs(ours - trained[name]).max())
    return float(max(found))


def _weights(family: str, folder: Path) -> dict[str, np.ndarray]:
    """By the names of the running model, which are the adapter's."""
    import transformers

    auto_class = getattr(transformers, FAMILIES[family].auto_class)
    state = auto_class.from_pretrained(folder, dtype="float32").state_dict()
    return {name: weight.numpy() for name, weight in state.items()}


def _adapter(folder: Path) -> dict[str, np.ndarray]:
    stored = load_file(folder / "adapter_model.safetensors")
    return {k.removeprefix("base_model.model."): v.double().numpy() for k, v in stored.items()}


def _update(a: np.ndarray, b: np.ndarray, experts: int) -> np.ndarray:
    """B A, (experts, outputs, inputs), of A (experts · r, inputs) and B (outputs, r · experts)."""
    stacked = a.reshape(experts, -1, a.shape[1]), b.reshape(len(b), -1, experts)
    return np.einsum("eri,ore->eoi", *stacked)


def _places(module: str, whole: dict, narrow: dict) -> tuple[list[int], list[int], list[int], int]:
    """Where the pruned weight's experts, rows and columns lie in the original; how many experts."""
    if f"{module}.weight" in whole:
        ours, theirs = narrow[f"{module}.weight"], whole[f"{module}.weight"]
        return [0], _found(ours, theirs), _found(ours.T, theirs.T), 1
    ours, theirs = narrow[f"{module}.gate_up_proj"], whole[f"{module}.gate_up_proj"]
    return _found(ours, theirs), [], [], len(theirs)


def _found(narrow: np.ndarray, whole: np.ndarray) -> list[int]:
    """Of each slice its number in the original; all where the other dimension was pruned."""
    if narrow.shape[1:] != whole.shape[1:]:
        return list(range(len(whole)))
    numbers = {part.tobytes(): number for number, part in enumerate(whole)}
    return [numbers[part.tobytes()] for part in narrow]


def trained(cfg: dict[str, Any], family: str, folder: Path, known: Known) -> dict[str, str]:
    """Train one example without and with the plugin, or name one that became the same run."""
    said = dict.fromkeys(("without", "with", "difference"), "")
    base = folder / "base"
    plain, removed = swap(cfg, base, folder)
    told = json.dumps([family, tokens_of(cfg), plain], sort_keys=True).replace(str(folder), "")
    if told in known:
        return {**known[told], "removed": " ".join(removed)}
    try:
        make_base(cfg, family, base)
    except ImportError as error:  # a processor of images that wants torchvision
        return said | {"reason": "not run: " + " ".join(str(error).split())[:80]}
    ours = plain | {"plugins": ["axolotl_loram.LoRAMPlugin"]}
    ours["loram"] = {**SECTION, "cache_dir": str(folder / "cache")}
    said["without"] = train(plain | {"output_dir": str(folder / "plain")}, folder)
    said["with"] = train(ours | {"output_dir": str(folder / "loram")}, folder)
    if said["with"] == "trains":
        [pruned] = {found.parent for found in (folder / "cache").glob("*/loram.json")}
        try:
            said["difference"] = f"{difference(family, base, pruned, folder / 'loram'):.1e}"
        except (AssertionError, LookupError, ValueError) as error:
            said["difference"] = repr(error)
    known[told] = said | {"reason": "the same run as an earlier one"}
    return said | {"removed": " ".join(removed)}


def tally() -> None:
    """Print what the table comes to."""
    with OUTPUT.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    print(f"{len(rows)} examples")
    kinds = Counter(
        ", ".join(f"{way}: {_kind(row[way])}" for way in ("without", "with"))
        if row["without"]
        else row["reason"]
        for row in rows
    )
    for kind, count in kinds.most_common():
        print(f"{count:4} {kind}")
    print("differences:", dict(Counter(row["difference"] for row in rows if row["difference"])))
    for row in rows:
        if row["without"] != row["with"]:
            print(row["example"], row["family"], row["without"], row["with"], sep=" | ")


def _kind(said: str) -> str:
    return (
        said
        if said.startswith("trains")
        else "refused"
        if said.startswith("LoRAMError")
        else "fails"
    )


def main(checkout: Path, part: str = "") -> None:
    """Add what is missing to the table."""
    logging.disable(logging.WARNING)
    done = set()
    if OUTPUT.exists():
        with OUTPUT.open(newline="", encoding="utf-8") as file:
            done = {row["example"] for row in csv.DictReader(file)}
    known: Known = {}
    about = surroundings("axolotl", "transformers", "peft")
    for file, cfg in examples(checkout):
        name = str(file.relative_to(checkout))
        if name in done or part not in name:
            continue
        family, found = family_of_name(str(cfg["base_model"])), dict.fromkeys(COLUMNS, "")
        if family in FAMILIES:
            with tempfile.TemporaryDirectory() as folder:
                found |= trained(cfg, family, Path(folder), known)
        else:
            found["reason"] = "family not declared"
        row = {"example": name, "family": family, "adapter": cfg["adapter"], **found}
        append_row(OUTPUT, {**row, **about})
        print(*row.values(), sep=" | ", flush=True)
    tally()


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), *sys.argv[2:])
