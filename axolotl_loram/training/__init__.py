"""Runs through Axolotl: LoRA on the pruned model, and aligning it before."""
