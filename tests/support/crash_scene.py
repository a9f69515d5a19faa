"""What is killed, and what it starts from."""

from __future__ import annotations

import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import hostile
from crash import Operation

from axolotl_loram.architecture.plan import Base, PruningPlan
from axolotl_loram.config import PruningArgs
from axolotl_loram.files import targets
from axolotl_loram.files.tensors import MODEL_FILE, Checkpoint, write_safetensors
from axolotl_loram.pruning.prune import prune
from axolotl_loram.recovery.recover import default_output, recover
from axolotl_loram.results.publish import Publication


@dataclass
class Scene:
    """What operations start from: artefacts that they only read, and what each changes."""

    whole: hostile.Artefacts
    other: Path
    recovered: Path

    @classmethod
    def make(cls, folder: Path) -> Scene:
        """Make them below a new folder."""
        with ProcessPoolExecutor(1) as other:  # it imports torch
            whole = other.submit(hostile.Artefacts.make, folder / "whole", "llama").result()
        for place in (whole.base, whole.adapter):
            hostile.write_tokenizer(place)
            (place / "tokenizer_config.json").write_text('{"a": 1}')
        other = folder / "other"
        prune(str(whole.base), other, PruningArgs(ratio=0.25, protect_first=1, protect_last=1))
        (other / "notes.txt").write_text("what somebody put there")
        recover(whole.adapter, str(whole.pruned), folder / "recovered")
        return cls(whole, other, folder / "recovered")

    def operations(self, plugin: bool = False) -> dict[str, Operation]:
        """All of them by name; with the plugin, runs end in its hook (half a minute to import)."""
        end_training = self._end_by_plugin if plugin else self._end_training
        end_alignment = self._end_alignment_by_plugin if plugin else self._end_alignment
        base, pruned, adapter = self.whole.base, self.whole.pruned, self.whole.adapter
        half = PruningArgs(ratio=0.5, protect_first=1, protect_last=1)
        sparse = PruningArgs(sparsity=0.5, method="magnitude")

        def old(place: Path) -> None:
            shutil.copytree(self.other, place / "out")

        def own_adapter(place: Path) -> None:
            shutil.copytree(adapter, place / "adapter")

        def old_recovered(place: Path) -> None:
            own_adapter(place)
            shutil.copytree(self.other, default_output(place / "adapter"))

        def old_behind_link(place: Path) -> None:
            shutil.copytree(self.other, place / "elsewhere")
            (place / "out").symlink_to("elsewhere")

        def recover_without_exchange(place: Path) -> None:
            with patch.object(targets, "_exchange", return_value=False):
                recover(place / "adapter", overwrite=True)

        def run_folder(place: Path) -> None:
            shutil.copytree(adapter, place / "out/pruned")

        def run_folder_again(place: Path) -> None:
            run_folder(place)
            recover(place / "out/pruned", str(pruned), place / "out", update=True, card="before")
            (place / "out/tokenizer.model").write_text("an earlier run's")

        return {
            "prune": Operation(
                lambda place: prune(str(base), place / "out", half), "out", replaces=False
            ),
            "prune --overwrite": Operation(
                lambda place: prune(str(base), place / "out", half, overwrite=True), "out", old
            ),
            "recover": Operation(
                lambda place: recover(adapter, output=place / "out"), "out", replaces=False
            ),
            "recover --overwrite": Operation(
                lambda place: recover(place / "adapter", overwrite=True),
                "recovered-adapter",
                old_recovered,
            ),
            "recover --overwrite through a link": Operation(
                lambda place: recover(adapter, output=place / "out", overwrite=True),
                "out",
                old_behind_link,
            ),
            "recover --overwrite without exchange": Operation(
                recover_without_exchange, "recovered-adapter", old_recovered, gap=True
            ),
            "publish --dry-run": Operation(
                lambda place: self._rehearse(self.recovered, place), "out", replaces=False
            ),
            "publish --dry-run --overwrite": Operation(
                lambda place: self._rehearse(self.recovered, place, overwrite=True), "out", old
            ),
            "publish --dry-run of a model": Operation(
                lambda place: self._rehearse(pruned, place), "out", replaces=False
            ),
            **{
                f"end of training{which}": Operation(
                    lambda place: end_training(place / "out"),
                    "out",
                    prepare,
                    last="adapter_config.json",
                    others=("pruned",),
                )
                for which, prepare in (("", run_folder), (", again", run_folder_again))
            },
            **{
                f"end of alignment{which}": Operation(
                    lambda place: end_alignment(place / "out"),
                    "out",
                    prepare,
                    again=self._save_trained,
                    last="config.json",
                    others=("training",),
                )
                for which, prepare in (
                    ("", self._save_trained),
                    (", again", self._save_trained_over_old),
                )
            },
            "prune --sparsity": Operation(
                lambda place: prune(str(base), place / "out", sparse), "out", replaces=False
            ),
        }

    def _rehearse(self, folder: Path, place: Path, **options: bool) -> None:
        Publication(folder, "me/it", output=place / "out", **options).rehearse()

    def _end_training(self, output: Path) -> None:
        base, pruned = Base(str(self.whole.base)), str(self.whole.pruned)
        recover(output / "pruned", pruned, output=output, base=base, update=True, card="a card")

    def _end_alignment(self, output: Path) -> None:
        from axolotl_loram.training.aligned import assemble

        assemble(output / "training", self.whole.pruned, output, {"objective": "a test"})

    def _end_by_plugin(self, output: Path) -> None:
        from axolotl_loram.models.formats import Formats
        from axolotl_loram.plugin import LoRAMPlugin
        from axolotl_loram.training.run import Run

        plan, plugin = PruningPlan.load(self.whole.pruned), LoRAMPlugin()
        base = Base(str(self.whole.base))
        plugin.run = Run(base, self.whole.pruned, plan, output, None, None, Formats())
        plugin.post_train_unload(SimpleNamespace(axolotl_config_path=None))

    def _end_alignment_by_plugin(self, output: Path) -> None:
        from axolotl_loram.config_loram import LoRAMConfig
        from axolotl_loram.plugin import LoRAMPlugin
        from axolotl_loram.training.align import Alignment

        plan, plugin = PruningPlan.load(self.whole.pruned), LoRAMPlugin()
        told = {"steps": 1, "tokens": 1, "data": [], "heldout_loss": None}
        section = LoRAMConfig(stage="align")
        plugin.alignment = Alignment("it", self.whole.pruned, plan, output, section, "", told)
        plugin.post_train_unload(SimpleNamespace())

    def _save_trained(self, place: Path) -> None:
        """What a run that is resumed leaves: the weights that it found are gone, and saved anew."""
        from axolotl_loram.training.aligned import remove_weights

        folder = place / "out/training"
        folder.mkdir(parents=True, exist_ok=True)
        remove_weights(folder)
        tensors = Checkpoint(self.whole.pruned).tensors.values()
        described = [(t.name, t.dtype, t.shape) for t in tensors]
        write_safetensors(folder / MODEL_FILE, described, (t.read() ^ 1 for t in tensors))

    def _save_trained_over_old(self, place: Path) -> None:
        shutil.copytree(self.whole.pruned, place / "out")  # in two shards
        self._save_trained(place)
