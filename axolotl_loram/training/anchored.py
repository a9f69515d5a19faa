"""Anchored loss: the base's own errors decide what an adapter on the pruned model learns.

Trained alone, an adapter on a pruned model spends itself on repairing that model, which the
original does not need. So the constant offset between the two frozen models is added to the logits:

    loss = CE( z_pruned+adapter + (log p_base − log p_pruned), label )

At step 0 the distribution is the base's, and so is the gradient: nothing is left to repair. That is
the arithmetic of proxy-tuning (arXiv 2401.08565) and emulated fine-tuning (2310.12962), moved from
decoding into training, with the pruned model as its own anti-expert.

The offset is known for some tokens, the label among them; all the others are one event, "rest",
whose probability under both models is known too. With every token named it is the full sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from axolotl_loram.training.distil import TOKENS_PER_CHUNK, Targets, in_chunks

TINY = 1e-38
"""The least probability of all that is not named; 0 has no logarithm."""


@dataclass(frozen=True)
class Offsets:
    """log p_base − log p_pruned of the token after each place.

    Attributes:
        ids: Tokens it is known for, the label first, all different, int64 (places, k).
        named: Their offsets, float32 (places, k).
        rest: The offset of the probability of all other tokens, float32 (places,).
    """

    ids: torch.Tensor
    named: torch.Tensor
    rest: torch.Tensor


def offsets(said: Targets, pruned: torch.Tensor) -> Offsets:
    """What lies between the base and the pruned model.

    Args:
        said: What the base says of each place, the label first among the k tokens.
        pruned: The pruned model's logits there, (places, vocabulary), in any float dtype.
    """
    named, rest = [], []
    for start in range(0, len(pruned), TOKENS_PER_CHUNK):
        part = slice(start, start + TOKENS_PER_CHUNK)
        logits, ids = pruned[part].float(), said.ids[part]
        whole = logits.logsumexp(-1)
        named.append(said.logprobs[part] - (logits.gather(-1, ids) - whole[:, None]))
        rest.append(said.rest[part].clamp_min(TINY).log() - (others(logits, ids) - whole))
    return Offsets(said.ids, torch.cat(named), torch.cat(rest))


def others(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The logarithm of Σ exp over the tokens that are not in `ids`; of none, 0, and never used."""
    if ids.shape[-1] == logits.shape[-1]:
        return logits.new_zeros(len(logits))
    return logits.scatter(-1, ids, -torch.inf).logsumexp(-1)


def anchored_loss(logits: torch.Tensor, anchor: Offsets) -> torch.Tensor:
    """Σ over places of −log of the label's probability, in nats.

    Args:
        logits: Of the pruned model with its adapter, (places, vocabulary), in any float dtype;
            computed with in float32.
        anchor: Of the same places.

    Returns:
        A scalar in float32; its derivative by the logits is in their dtype.
    """
    return in_chunks(
        logits,
        lambda logits, part: _of_places(
            logits, anchor.ids[part], anchor.named[part], anchor.rest[part]
        ),
    )


def _of_places(
    logits: torch.Tensor, ids: torch.Tensor, named: torch.Tensor, rest: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each place (places,) and its derivative by the logits (places, vocabulary)."""
    moved = logits + rest[:, None]  # all by the rest's offset, the named ones by their own
    moved = moved.scatter(-1, ids, logits.gather(-1, ids) + named)
    whole = moved.logsumexp(-1, keepdim=True)
    label = ids[:, :1]
    losses = (whole - moved.gather(-1, label))[:, 0]
    slope = (moved - whole).exp_()
    return losses, slope.scatter_add_(-1, label, -torch.ones_like(whole))
