"""What the backward pass needs of the forward pass, layer by layer, from the declared shapes.

Counted per token, for a decoder as transformers 5.16 builds it and PEFT 0.20 adapts it. c is the
bytes of a value in the computation (2 in bf16, 4 in float32), a those of a LoRA weight (4 unless
PEFT is told not to upcast it). Frozen weights keep nothing of their inputs; what is kept is:

* RMSNorm: its input in float32 and one float32 scale;
* LoRA: the input of A (one copy for all modules that read the same tensor, unless PEFT casts it to
  the dtype of A first, which makes one each) and the input of B, r values; with dropout its output
  and a mask of a byte for each value;
* attention: queries, keys, values, output, and a float32 per head (flash), or the matrices of
  scores (eager);
* experts in fewer bits: the weights that they are unpacked to, of which autograd wants the
  gradient of the inputs;
* a gated MLP: outputs of gate and up, and the activation; fused kernels recompute the last;
* under autocast, the copies of A and B in the compute dtype.

With gradient checkpointing a layer keeps its input alone; the rest comes back for one layer at a
time in the backward pass. `tests/memory/test_predict.py` holds the sums, to the byte, against what
PyTorch saves. What backward passes allocate besides, `workspace`, is bounded here, not derived to
the byte.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from axolotl_loram.architecture.blocks import ONE_HEAD
from axolotl_loram.architecture.model import Tensor
from axolotl_loram.architecture.spaces import Dim
from axolotl_loram.memory.layout import Layer, Layout, part_of
from axolotl_loram.memory.settings import TrainingArgs
from axolotl_loram.memory.weights import Storage

FLOAT32 = 4


@dataclass(frozen=True)
class Activations:
    """Counts activations of runs with these settings.

    Attributes:
        run: The settings.
        storage: How the weights are stored: 4-bit LoRA modules cast less than 16-bit ones.
        rank: Of the LoRA on a tensor; 0 where there is none.
    """

    run: TrainingArgs
    storage: Storage
    rank: Callable[[Tensor], int] = lambda tensor: 0

    def layer_bytes(self, layer: Layer) -> int:
        """Bytes that the forward pass of one layer keeps."""
        per_token = (
            sum(self._norm(tensor, layer) for tensor in layer.tensors)
            + self._lora(layer)
            + self._attention(layer)
            + self._mlp(layer)
        )
        return self.run.tokens * per_token + self.unpacked_experts(layer)

    def unpacked_experts(self, layer: Layer) -> int:
        """Bytes of experts in 4 or 8 bits as they are multiplied: kept until they go backward."""
        form, c = self.storage.experts, self.run.compute_bytes
        stacks = [math.prod(t.shape) for t in layer.tensors if part_of(t) == "experts"]
        return sum(stacks) * c if form in ("nf4", "int8") else 0

    def moments(self, layout: Layout, lora_parameters: int) -> dict[str, tuple[int, int]]:
        """Bytes of activations, and of logits, at the moments when most is allocated.

        Returns:
            "loss": when lm_head and the loss go backward. "layer": when the layer that takes most
            goes backward; with gradient checkpointing it was just recomputed.
        """
        run, depth, hidden = self.run, layout.depth, layout.hidden
        logits, outside = loss_bytes(layout, run, self.storage), self.outside_bytes(layout)
        copies = self.copies_bytes(lora_parameters)
        space = max(self.workspace_bytes(layer) for layer in layout.layers)
        if run.gradient_checkpointing:
            inputs = depth * run.tokens * hidden * run.compute_bytes
            widest = max(self.layer_bytes(layer) for layer in layout.layers)
            return {
                "loss": (inputs + outside, logits),
                "layer": (inputs + widest + space + copies // depth, 0),
            }
        kept = sum(layer.count * self.layer_bytes(layer) for layer in layout.layers)
        unneeded = run.tokens * (hidden + 1) * FLOAT32  # nothing before the first norm is trained
        every = kept - unneeded + copies
        return {"loss": (every + outside, logits), "layer": (every + space, 0)}

    def outside_bytes(self, layout: Layout) -> int:
        """Bytes kept outside the layers: the last norm, LoRA on lm_head, rotary tables."""
        c, tokens, head = self.run.compute_bytes, self.run.tokens, layout.head
        first = layout.layers[0]
        head_dim = first.sizes.get("head_dim", layout.hidden // first.heads)
        kept = tokens * (layout.hidden + 1) * FLOAT32 + 2 * self.run.sequence_len * head_dim * c
        if self.rank(head):
            kept += tokens * self._lora_inputs([head], self.storage.lm_head)
        return kept

    def copies_bytes(self, lora_parameters: int) -> int:
        """Bytes of the copies of A and B that autocast makes in the compute dtype."""
        autocast = self.run.precision == "bf16" and self.run.lora_bytes != self.run.compute_bytes
        return lora_parameters * self.run.compute_bytes if autocast else 0

    def workspace_bytes(self, layer: Layer) -> int:
        """Bytes that the backward pass of one layer allocates besides what was kept, at most.

        At down_proj: its output and the gradient of it, and the gradients of its input by way of
        the base (with the weight that 4 and 8 bits are unpacked to) and by way of LoRA, which PEFT
        takes through float32 and back where it cast the input. At the scores of eager attention:
        their gradients before and after the softmax, in float32. In experts, for each token and
        expert: its gradient spread out, multiplied (by the router's float32) and put in order, or
        those of gate, up and both.
        """
        run, c = self.run, self.run.compute_bytes
        form = self.storage.linears
        unpacked = max(self.storage.unpacked_bytes(form, t.shape) for t in layer.linears)
        widest = run.tokens * max(tensor.shape[1] for tensor in layer.linears) * c
        by_lora = 4 * widest if self._casts(form) else widest
        gradients = 2 * run.tokens * layer.sizes["hidden"] * c + widest + max(by_lora, unpacked)
        gradients += widest if form == "int8" else 0  # what Linear8bitLt casts
        hidden, inner = layer.sizes["hidden"], layer.sizes.get("expert_neurons", 0)
        inner = inner or layer.sizes.get("expert_width", 0)
        if any(part_of(tensor) == "experts" for tensor in layer.tensors):
            spread, gated = (3 * layer.routed + 1) * hidden * FLOAT32, 5 * layer.routed * inner * c
            gradients = max(gradients, run.tokens * max(spread, gated))
        scores = 3 * run.tokens * layer.heads * run.sequence_len * (c if _sinks(layer) else FLOAT32)
        return max(gradients, scores if run.attention == "eager" else 0)

    def _casts(self, form: str) -> bool:
        """Whether PEFT casts the input of a module to the dtype of A, and autocast casts it back.

        It does for 16-bit modules, not for 4- and 8-bit ones under autocast. Fused kernels do not.
        """
        run = self.run
        quantized = form in ("nf4", "int8")
        return run.lora_bytes != run.compute_bytes and not quantized and not run.fused_kernels

    def _norm(self, tensor: Tensor, layer: Layer) -> int:
        """Bytes per token: the input in float32 and the inverse root of its mean square."""
        if part_of(tensor) != "norms":
            return 0
        width, times = math.prod(tensor.shape), 1
        if tensor.dims == (ONE_HEAD,):
            of_queries = "q_norm" in tensor.module
            times = layer.heads if of_queries else layer.sizes["kv_groups"]
        return times * (width + 1) * FLOAT32

    def _lora(self, layer: Layer) -> int:
        """Bytes per token that LoRA keeps, summed over groups of modules with the same input."""
        groups: dict[tuple[Dim, str], list[Tensor]] = {}
        for tensor in layer.linears:
            if self.rank(tensor) or self.storage.linears == "int8":
                place = tensor.module.split(".")[-2]  # q, k and v read the same; so do gate and up
                groups.setdefault((tensor.dims[1], place), []).append(tensor)
        return sum(
            self._lora_inputs(group, self.storage.linears, self._is_kept(layer, group[0]))
            for group in groups.values()
        )

    def _is_kept(self, layer: Layer, tensor: Tensor) -> bool:
        """Whether a linear module's input is kept or recomputed by what makes it."""
        if tensor == layer.attention[-1]:
            return self.run.attention == "flash"
        return self.run.fused_kernels and any(tensor == mlp[-1] for mlp in layer.mlps)

    def _lora_inputs(self, group: list[Tensor], form: str, is_kept: bool = False) -> int:
        """Bytes per token that A and B of modules that read the same tensor keep.

        Fused kernels keep the input once and recompute A's output. Linear8bitLt keeps its input,
        with LoRA or without.
        """
        run, width, c = self.run, group[0].shape[1], self.run.compute_bytes
        casts = self._casts(form)
        adapted = sum(self.rank(tensor) > 0 for tensor in group)
        copies = adapted if casts or (run.lora_dropout and not run.fused_kernels) else 1
        original = int(form == "int8" and copies != 1 and not is_kept)
        if is_kept and not casts and not run.lora_dropout:
            copies = 0
        masks = copies * width if run.lora_dropout and adapted else 0
        inner = 0 if run.fused_kernels else sum(map(self.rank, group)) * c
        return (copies + original) * width * c + masks + inner

    def _attention(self, layer: Layer) -> int:
        """Bytes per token: what flash attention, or the matrices of scores, keep.

        Queries, keys and values are what the projections before the last put out, or slices of it,
        which keep it whole beside the rotated queries and keys.
        """
        c, inputs, last = self.run.compute_bytes, layer.attention[:-1], layer.attention[-1]
        kept, output = sum(tensor.shape[0] for tensor in inputs), last.shape[1]
        if len(inputs) == 1:
            kept += output + (kept - output) // 2
        if self.run.attention == "flash":
            return (kept + output) * c + layer.heads * FLOAT32
        each = c if _sinks(layer) else FLOAT32 + (c if c != FLOAT32 else 0)
        scores = layer.heads * self.run.sequence_len * each
        return 3 * output * c + scores

    def _mlp(self, layer: Layer) -> int:
        """Bytes per token: outputs of gate and up, and of the activation unless that is fused.

        Of experts also what they put out, which their weight in the sum multiplies, and the
        router's probabilities in float32; of a shared one with a gate, too. gpt-oss, which takes
        gate and up in turns, keeps both once more: clamped, and shifted by one; and the sigmoid.
        """
        fused = self.run.fused_kernels or self.run.fused_glu
        values = 0
        for *inputs, last in layer.mlps:
            outputs, inner = sum(tensor.shape[0] for tensor in inputs), last.shape[1]
            values += outputs + (inner if outputs >= 2 * inner and not fused else 0)
        hidden, routers = layer.sizes["hidden"], 0
        values += sum(hidden + 1 for tensor in layer.linears if min(tensor.shape) == 1)
        for tensor in layer.tensors:
            if part_of(tensor) == "experts" and tensor.name.endswith("down_proj"):
                experts, *shape = tensor.shape
                inner = shape[0] if tensor.transposed else shape[1]
                values += layer.routed * ((6 if tensor.transposed else 3) * inner + hidden)
                routers += experts * FLOAT32
        return values * self.run.compute_bytes + routers


def _sinks(layer: Layer) -> bool:
    """Whether attention has gpt-oss's sinks, whose softmax is in the compute dtype."""
    return any(tensor.name.endswith(".sinks") for tensor in layer.tensors)


def loss_bytes(layout: Layout, run: TrainingArgs, storage: Storage) -> int:
    """Bytes that lm_head and the loss take at once, at most.

    * plain: float32 log-probabilities, their gradient and that of the logits, 12 bytes a logit
      (transformers computes the loss in float32);
    * liger: logits of one chunk, so large that they take as much as the hidden states (Liger's
      `fused_linear_cross_entropy`), and the gradient of the hidden states;
    * cut: two float32 numbers per token and the gradient of the hidden states in float32.

    A quantized lm_head is unpacked whole, beside the logits in the compute dtype.
    """
    tokens, c, logits = run.tokens, run.compute_bytes, layout.vocabulary
    unpacked = storage.unpacked_bytes(storage.lm_head, layout.head.shape)
    hidden = tokens * layout.hidden * c
    if run.cross_entropy == "plain":
        return max(12 * tokens * logits, unpacked + tokens * logits * c + hidden)
    if run.cross_entropy == "cut":
        return unpacked + tokens * (layout.hidden + 2) * FLOAT32
    chunk = math.ceil(tokens / math.ceil(logits / layout.hidden))
    chunk = min(2 ** math.ceil(math.log2(chunk)), tokens)
    return unpacked + chunk * logits * c + hidden
