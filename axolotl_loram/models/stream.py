"""Running a checkpoint one decoder layer at a time: a model of any size on a small machine.

The model is built on the meta device, which holds no weights; a layer's weights are read when it is
its turn. What surrounds the layers (embedding, masks, rotary positions, final norm, logits) is the
model's own forward with stand-ins for the layers, so that scaled embeddings, sliding windows or
capped logits need no code here.

Hidden states lie on disk, (samples, tokens, hidden), and pass through memory batch by batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.utils import send_to_device
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel

from axolotl_loram.architecture.config_json import Config, family_of, sizes_of
from axolotl_loram.architecture.model import HEAD_WEIGHT, Tensor, layer_pieces
from axolotl_loram.errors import not_finite
from axolotl_loram.files.targets import put_whole
from axolotl_loram.files.tensors import Checkpoint, StoredTensor, finite
from axolotl_loram.models.bits import from_bits, to_torch
from axolotl_loram.models.patches import not_partitioned, take_any_width

TOKENS_PER_BATCH = 2048


class LayerStream:
    """The layers of a causal language model, loaded one at a time.

    Attributes:
        dtype: What they run in: by default float32 on a CPU, bfloat16 on a GPU.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: Config,
        device: str,
        four_bit: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.checkpoint, self.device, self.four_bit = checkpoint, torch.device(device), four_bit
        self.dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
        self.config, self.family = config, family_of(config)
        self.model = _empty_model(config, self.dtype)
        self.layers: Any = self.model.get_submodule(self.family.layers)
        self.hidden_size = sizes_of(config)["hidden"]
        self._arguments: dict[torch.Size, list[tuple[tuple, dict]]] = {}

    def layer(self, index: int) -> nn.Module:
        """Decoder layer `index` with its weights, on the device, in evaluation mode."""
        layer = copy.deepcopy(self.layers[index]).eval().requires_grad_(False)
        prefix = f"{self.family.layers}.{index}."
        for name, pieces in layer_pieces(self.config, index).items():
            self._place(layer, name.removeprefix(prefix), self._assembled(pieces))
        return layer.to(self.device)

    def _assembled(self, pieces: list[list[Tensor]]) -> torch.Tensor:
        """A parameter from what is stored of it; experts that are stored one by one are stacked."""
        joined = [
            torch.cat([to_torch(self.checkpoint[piece.name], self.dtype) for piece in of_expert])
            if len(of_expert) > 1
            else to_torch(self.checkpoint[of_expert[0].name], self.dtype)
            for of_expert in pieces
        ]
        return joined[0] if pieces[0][0].expert is None else torch.stack(joined)

    def run(self, index: int, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """What the layer makes of hidden states (batch, tokens, hidden)."""
        args, kwargs = self._called_with(hidden.shape[:2])[index]
        output = layer(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden states (batch, tokens, hidden) before the first layer, of tokens on the CPU."""
        return self._record(tokens)[0][0]

    def loss(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Next-token loss of each sequence, (batch,), given the last layer's output."""
        logits = self.logits(hidden)[:, :-1].float()
        targets = tokens[:, 1:].to(logits.device)
        losses = nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="none"
        )
        return losses.view(targets.shape).mean(1)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (batch, tokens, vocabulary), given the last layer's output.

        The final norm and the output embedding are loaded on the first call, and stay until
        `drop_head`.
        """
        self._load_head()
        stand_ins = [_Replay(layer, hidden) for layer in self.layers]
        with self._standing_in(stand_ins):
            return self.model(inputs_embeds=hidden, use_cache=False).logits

    def _place(self, layer: nn.Module, name: str, values: torch.Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        module = layer.get_submodule(path)
        if self.four_bit and isinstance(module, nn.Linear) and leaf == "weight":
            replace_linear(layer, path, values, self.device)
        else:
            values = values.to(self.device)
            buffer = leaf in module._buffers
            setattr(module, leaf, values if buffer else nn.Parameter(values, requires_grad=False))

    def _called_with(self, shape: torch.Size) -> list[tuple[tuple, dict]]:
        """What the model passes to each of its layers beside hidden states of this shape."""
        if shape not in self._arguments:
            self._arguments[shape] = self._record(torch.zeros(shape, dtype=torch.int64))[1]
        return self._arguments[shape]

    def _record(self, tokens: torch.Tensor) -> tuple[list[torch.Tensor], list[tuple[tuple, dict]]]:
        """Run the model with layers that note what they are called with."""
        places = self._load_embedding(tokens)
        stand_ins = [_Recorder(layer) for layer in self.layers]
        stand_ins[-1].stop = True
        with self._standing_in(stand_ins), torch.no_grad(), suppress(_Stop):
            self.model(input_ids=places, use_cache=False)
        called_with = [send_to_device(stand_in.called_with, self.device) for stand_in in stand_ins]
        return [stand_in.hidden for stand_in in stand_ins], called_with

    @property
    def _stored_embedding(self) -> StoredTensor:
        embedding = self.model.get_input_embeddings()
        name = next(n for n, module in self.model.named_modules() if module is embedding)
        either = (f"{name}.weight", HEAD_WEIGHT)  # of tied ones one may be stored
        names = [*map(self.family.stored_name, either), HEAD_WEIGHT]
        return self.checkpoint[next(n for n in names if n in self.checkpoint.tensors)]

    def _load_embedding(self, tokens: torch.Tensor) -> torch.Tensor:
        """Load the rows that are looked up, and no others; returns where each token's row is."""
        embedding: Any = self.model.get_input_embeddings()
        stored, (used, places) = self._stored_embedding, tokens.unique(return_inverse=True)
        row_bytes = stored.shape[1] * stored.bits.itemsize
        rows = [stored.read_bytes(row * row_bytes, row_bytes) for row in used.tolist()]
        bits = np.concatenate(rows).view(stored.bits)
        if not finite(bits, stored.dtype):
            raise not_finite(stored.name)
        values = from_bits(bits, stored.dtype).view(len(used), -1).to(self.dtype)
        embedding.padding_idx = None  # it is a row of the whole
        embedding.weight = nn.Parameter(values, requires_grad=False)
        return places

    def drop_head(self) -> None:
        """Free what `loss` loaded."""
        for module in self.model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))

    def _load_head(self) -> None:
        head = self.model.get_output_embeddings()
        for name, parameter in list(self.model.named_parameters(remove_duplicate=False)):
            module = self.model.get_submodule(name.rpartition(".")[0])
            inside = name.startswith(f"{self.family.layers}.")
            aside = inside or name.startswith(self.family.whole)
            if aside or module is self.model.get_input_embeddings() or not parameter.is_meta:
                continue
            stored = self.checkpoint.tensors.get(self.family.stored_name(name))
            if stored is None and module is head:  # tied: the input embedding is the output's too
                stored = self.checkpoint.tensors.get(HEAD_WEIGHT) or self._stored_embedding
            assert stored is not None  # pruning checked the tensors
            values = to_torch(stored, self.dtype).to(self.device)
            setattr(module, name.rpartition(".")[2], nn.Parameter(values, requires_grad=False))

    @contextmanager
    def _standing_in(self, stand_ins: Sequence[nn.Module]) -> Iterator[None]:
        path, _, name = self.family.layers.rpartition(".")
        owner = self.model.get_submodule(path)
        setattr(owner, name, nn.ModuleList(stand_ins))
        try:
            yield
        finally:
            setattr(owner, name, self.layers)


class _Stop(Exception):
    """Ends a forward pass that has shown what it was run for."""


class _StandIn(nn.Module):
    """Takes a layer's place; looks like it to whoever reads its attributes."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["layer"] = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)


class _Recorder(_StandIn):
    stop = False

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.__dict__["hidden"], self.__dict__["called_with"] = hidden, (args, kwargs)
        if self.stop:
            raise _Stop
        return hidden


class _Replay(_StandIn):
    def __init__(self, layer: nn.Module, hidden: torch.Tensor) -> None:
        super().__init__(layer)
        self.__dict__["hidden"] = hidden

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.__dict__["hidden"]


def _empty_model(config: Config, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the meta device, its computed buffers (rotary frequencies) on the CPU."""
    settings = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    with torch.device("meta"), not_partitioned():
        auto_class = getattr(transformers, family_of(config).auto_class)
        model = auto_class.from_config(settings, dtype=dtype, trust_remote_code=False)
    for module in model.modules():
        names = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in names:
            empty = torch.empty_like(getattr(module, name), device="cpu")
            persistent = name not in module._non_persistent_buffers_set
            module.register_buffer(name, empty, persistent=persistent)
        if names:
            model._init_weights(module)
    return model.eval().requires_grad_(False)


def replace_linear(layer: nn.Module, path: str, weight: torch.Tensor, device: torch.device) -> None:
    """Put an NF4 linear layer, as QLoRA's, in the place of one of the same weight."""
    import bitsandbytes

    take_any_width()
    old: Any = layer.get_submodule(path)
    new: Any = bitsandbytes.nn.Linear4bit(
        old.in_features,
        old.out_features,
        bias=old.bias is not None,
        compute_dtype=weight.dtype,
        quant_type="nf4",
        device="meta",
    )
    new.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    new.bias = old.bias
    layer.set_submodule(path, new)
    new.weight = new.weight.to(device)


@contextmanager
def seen_routing(layer: nn.Module, module: str, see: Callable[..., Any]) -> Iterator[None]:
    """Call `see(experts, hidden, indices, weights)` before a layer's stacked experts run.

    That is how transformers calls them: hidden states (tokens, hidden), and for each token the
    experts it goes to and the weights of their outputs, both (tokens, k). Weights that are returned
    take the place of the ones given.
    """

    def before(experts: nn.Module, args: tuple) -> tuple | None:
        changed = see(experts, *args[:3])
        return None if changed is None else (*args[:2], changed, *args[3:])

    with layer.get_submodule(module).register_forward_pre_hook(before):
        yield


@contextmanager
def seen_inputs(
    layer: nn.Module, modules: Sequence[str], see: Callable[[str, torch.Tensor], Any]
) -> Iterator[None]:
    """Call `see(module, input)` before each of the modules runs; a tensor it returns goes in."""

    def hook(name: str) -> Callable:
        def before(module: nn.Module, args: tuple) -> tuple | None:
            changed = see(name, args[0])
            return None if changed is None else (changed, *args[1:])

        return before

    with ExitStack() as stack:
        for name in modules:
            module = layer.get_submodule(name)
            stack.enter_context(module.register_forward_pre_hook(hook(name)))
        yield


class States:
    """Tensors (samples, tokens, hidden) in one file, written and read a batch at a time.

    A file that exists under its name is complete.
    """

    def __init__(self, file: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.file, self.shape, self.dtype = file, shape, dtype
        self.row_bytes = shape[1] * shape[2] * dtype.itemsize

    @property
    def exists(self) -> bool:
        """Whether it was written to the end."""
        return self.file.exists()

    def read(self, samples: Sequence[int]) -> torch.Tensor:
        """The given samples, (len(samples), tokens, hidden), on the CPU."""
        rows = [
            np.fromfile(self.file, np.uint8, self.row_bytes, offset=sample * self.row_bytes)
            for sample in samples
        ]
        flat = torch.from_numpy(np.concatenate(rows)).view(self.dtype)
        return flat.view(len(samples), *self.shape[1:])

    @contextmanager
    def written(self) -> Iterator[Callable[[torch.Tensor], object]]:
        """Gives a function that appends a batch; the file takes its name when the block ends."""
        with put_whole(self.file) as partial, partial.open("wb") as handle:

            def append(batch: torch.Tensor) -> None:
                bits = batch.detach().to("cpu", self.dtype).contiguous().view(torch.uint8)
                handle.write(bits.numpy().data)

            yield append
