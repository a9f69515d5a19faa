"""An anchored run whose anchor another command made, and one that was resumed."""

from conftest import run_command


def same_from_elsewhere(run_yaml, base, folder):
    """Both give the adapter of a run that does all itself; `run_yaml` writes a YAML of 4 steps."""

    def train(output, **changes):
        file = run_yaml(output_dir=str(folder / output), max_steps=4, **changes)
        run_command("axolotl", "train", file, "--launcher", "python")
        return (folder / output / "pruned/adapter_model.safetensors").read_bytes()

    whole = train("out", save_strategy="steps", save_steps=2)
    file = folder / "loram.yml"
    run_command("axolotl-loram", "anchor", file, folder / "anchor", "--model", base)
    loram = {"anchor_path": str(folder / "anchor")}
    assert train("again", loram=loram) == whole
    (checkpoint,) = (folder / "out").rglob("checkpoint-2")
    assert train("resumed", loram=loram, resume_from_checkpoint=str(checkpoint)) == whole
