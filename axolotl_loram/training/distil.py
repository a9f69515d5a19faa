"""Distillation: the divergence of a model from its teacher's most likely tokens.

The teacher's distribution over k + 1 events, its k most likely tokens and "any other", is compared
with the model's:

    KL = Σ_k p_k log(p_k / q_k) + p_rest log(p_rest / q_rest)

Its derivative by the logits is softmax(z) − t, where the target t is p at the k tokens, and p_rest
spread over the others as the model itself spreads it. So loss and derivative come out together,
some tokens at a time: beside the logits only the derivative is ever held whole, in the same dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

TOKENS_PER_CHUNK = 1024
IGNORED = -100
"""Label of a token that does not count."""


@dataclass(frozen=True)
class Targets:
    """What the teacher says of the token after each place.

    Attributes:
        ids: Its k most likely tokens, int64 (..., k).
        logprobs: Their log-probabilities, float32 (..., k).
        rest: Probability of all other tokens, float32 (...).
    """

    ids: torch.Tensor
    logprobs: torch.Tensor
    rest: torch.Tensor

    def to(self, device: torch.device) -> Targets:
        """The same on a device."""
        return Targets(self.ids.to(device), self.logprobs.to(device), self.rest.to(device))

    def flat(self) -> Targets:
        """(tokens, k) and (tokens,)."""
        return Targets(self.ids.flatten(0, -2), self.logprobs.flatten(0, -2), self.rest.flatten())


def distillation_loss(
    logits: torch.Tensor, targets: Targets, labels: torch.Tensor, next_token: float = 0.0
) -> torch.Tensor:
    """Σ over the tokens that count of (1 − s) KL(teacher ‖ model) + s (next-token loss), in nats.

    Args:
        logits: (batch, tokens, vocabulary), in any float dtype; computed with in float32.
        targets: Of the same places, (batch, tokens, …).
        labels: The next tokens, already shifted, (batch, tokens); places of `IGNORED` do not count.
        next_token: The share s of the next-token loss, from 0 to 1.

    Returns:
        A scalar in float32; its derivative by the logits is in their dtype.
    """
    flat, labels = targets.to(logits.device).flat(), labels.to(logits.device).flatten()

    def of_part(logits: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        said = Targets(flat.ids[part], flat.logprobs[part].float(), flat.rest[part].float())
        losses, slope = _of_tokens(logits, said, labels[part], next_token)
        counts = labels[part] != IGNORED
        return losses[counts], slope.mul_(counts[:, None])

    return in_chunks(logits.flatten(0, -2), of_part)


Part = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]]
"""Some logits in float32, (places, vocabulary), and which they are → losses, and their derivative
by the logits."""


def in_chunks(logits: torch.Tensor, of_part: Part) -> torch.Tensor:
    """The sum of what `of_part` gives of logits (places, vocabulary), some places at a time."""
    return _InChunks.apply(logits, of_part)


class _InChunks(torch.autograd.Function):
    """Loss and derivative come out together: float32 only of a chunk."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, of_part: Part) -> torch.Tensor:
        total = torch.zeros((), device=logits.device)
        slopes = torch.empty_like(logits)
        for start in range(0, len(logits), TOKENS_PER_CHUNK):
            part = slice(start, start + TOKENS_PER_CHUNK)
            losses, slopes[part] = of_part(logits[part].float(), part)
            total += losses.sum()
        ctx.save_for_backward(slopes)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (slopes,) = ctx.saved_tensors
        return slopes * gradients[0].to(slopes.dtype), None


def _of_tokens(
    logits: torch.Tensor, said: Targets, labels: torch.Tensor, share: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each token (tokens,) and its derivative by the logits (tokens, vocabulary)."""
    whole = logits.logsumexp(-1, keepdim=True)
    total = said.logprobs.exp().sum(-1) + said.rest  # 1, but for how they were rounded
    logprobs, rest = said.logprobs - total.log()[:, None], said.rest / total
    found = logits.gather(-1, said.ids) - whole
    losses = (logprobs.exp() * (logprobs - found)).sum(-1)
    target = torch.zeros_like(logits)
    if said.ids.shape[-1] < logits.shape[-1]:
        others = logits.scatter(-1, said.ids, -torch.inf)
        others_whole = others.logsumexp(-1, keepdim=True)
        losses += torch.xlogy(rest, rest) - rest * (others_whole - whole)[:, 0]
        target = others.sub_(others_whole).exp_().mul_(rest[:, None])
    target.scatter_(-1, said.ids, logprobs.exp())
    if share:
        label = labels.clamp_min(0)[:, None]
        losses = (1 - share) * losses + share * (whole - logits.gather(-1, label))[:, 0]
        target.mul_(1 - share).scatter_add_(-1, label, torch.full_like(whole, share))
    return losses, (logits - whole).exp_().sub_(target)
