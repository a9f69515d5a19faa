# %% [markdown]
# # LoRAM without Axolotl: plain PEFT, or TRL
#
# Prune a model, train LoRA on the pruned one, run the adapter on the original. The cells open as a
# notebook in VS Code or by jupytext; the file runs as a script too, on a CPU in minutes.
# `python examples/quickstart/pretrained.py` makes the model that it takes by default.

# %%
import ast
import json
import os
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import axolotl_loram as al

BASE = os.environ.get("BASE", "build/models/SmolLM2-135M-Instruct")
WORK = Path(os.environ.get("WORK", "build/notebook"))
FOUR_BIT = bool(int(os.environ.get("FOUR_BIT", "0")))  # QLoRAM
STEPS, TOKENS = 8, 64

# %% [markdown]
# Text to calibrate and train on: the functions of a module of Python itself.

# %%
source = Path(ast.__file__).read_text(encoding="utf-8")
rows = [{"text": part} for part in source.split("\n\n") if len(part) > 100]
WORK.mkdir(parents=True, exist_ok=True)
text = WORK / "text.jsonl"
text.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

# %% What would it take? (In a notebook, the last line of a cell is shown as a table.)
plan = al.plan_memory(BASE, ratio=0.5, sequence_len=TOKENS)
print(plan)

# %% Prune half of each layer between the first and the last few.
pruned = al.prune(
    BASE,
    WORK / "pruned",
    ratio=0.5,
    calibration=str(text),
    calibration_samples=16,
    calibration_length=TOKENS,
    overwrite=True,
)
print(pruned)

# %% Train LoRA on it by plain PEFT.
lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
tokenizer = AutoTokenizer.from_pretrained(BASE)  # pruning leaves it as it is
trained = get_peft_model(al.load_pruned(pruned.path, load_in_4bit=FOUR_BIT), lora).train()
optimizer = torch.optim.AdamW((p for p in trained.parameters() if p.requires_grad), lr=1e-3)
for row in rows[:STEPS]:
    encoded = tokenizer(row["text"], return_tensors="pt", truncation=True, max_length=TOKENS)
    batch = encoded.input_ids.to(trained.device)
    loss = trained(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"loss {loss.item():.3f}")
trained.save_pretrained(WORK / "peft")

# %% Recover the adapter: an ordinary one, for the original.
adapter = al.recover(WORK / "peft", overwrite=True)
original = AutoModelForCausalLM.from_pretrained(adapter.base, dtype="auto")
tuned = PeftModel.from_pretrained(original, adapter.path)
prompt = tokenizer("def parse(", return_tensors="pt")
print(tokenizer.decode(tuned.generate(**prompt, max_new_tokens=16)[0]))

# %% The same by TRL.
trainer = SFTTrainer(
    model=al.load_pruned(pruned.path, load_in_4bit=FOUR_BIT),
    args=SFTConfig(
        output_dir=str(WORK / "trl"),
        max_length=TOKENS,
        max_steps=STEPS,
        per_device_train_batch_size=1,
        learning_rate=1e-3,
        bf16=torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
    peft_config=lora,
)
trainer.train()
trainer.save_model()
adapter = al.recover(WORK / "trl", overwrite=True)
original = AutoModelForCausalLM.from_pretrained(adapter.base, dtype="auto")
tuned = PeftModel.from_pretrained(original, adapter.path)
print(adapter)
