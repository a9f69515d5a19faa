"""Let the original, without and with the recovered adapter, sum up functions it has not seen."""

import json
from pathlib import Path

BASE = Path("build/models/SmolLM2-135M-Instruct")
ADAPTER = Path("build/quickstart/loram")
HELD_OUT = Path("build/quickstart/data/heldout.jsonl")
FILE = Path("build/quickstart/samples.json")
COUNT, LONGEST = 3, 48


def write() -> None:
    """Write `samples.json`: the functions, what people wrote, and greedy answers."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    original = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    model = PeftModel.from_pretrained(original, ADAPTER).eval()
    rows = [json.loads(line)["messages"] for line in HELD_OUT.read_text("utf-8").splitlines()]
    samples = []
    for asked, written in rows[:: len(rows) // COUNT][:COUNT]:
        with model.disable_adapter():
            before = _answer(model, tokenizer, asked)
        samples.append(
            {
                "prompt": asked["content"],
                "written_by_people": written["content"],
                "before": before,
                "after": _answer(model, tokenizer, asked),
            }
        )
    FILE.write_text(json.dumps(samples, indent=2) + "\n", encoding="utf-8")


def _answer(model, tokenizer, message: dict) -> str:
    """Return what the model answers to a message, greedily; "…" where it is cut off."""
    asked = tokenizer.apply_chat_template(
        [message], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**asked, max_new_tokens=LONGEST, do_sample=False)[0]
    answer = tokens[asked["input_ids"].shape[1] :]
    cut = "" if tokenizer.eos_token_id in answer else " …"
    return tokenizer.decode(answer, skip_special_tokens=True).strip() + cut
