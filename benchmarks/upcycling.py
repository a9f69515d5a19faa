"""A mixture made of a dense model of llama's kind: upcycled, trained a little, and how it routes.

Every layer gets copies of its MLP as experts, CHOSEN of which a token goes through. As copies they
compute the dense model exactly, whatever random routers choose; each is then perturbed.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

EXPERTS, CHOSEN = 8, 2
NOISE = 0.1
"""Of the experts, as a share of the weights' standard deviation."""
TEXTS = ("math", "source")
RATES = {"experts": 3e-4, "routers": 5e-3}
"""Of the experts: a step's length as a share of the weight's (LARS); of the routers: AdamW's."""
BALANCE = 0.02


def upcycled(folder: Path) -> MixtralForCausalLM:
    """A mixture of copies, with random routers: normalized shares of equals are the dense model."""
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = dense.config.to_dict()
    shared = {name: theirs[name] for name in MixtralConfig().to_dict() if name in theirs}
    shared = {n: v for n, v in shared.items() if n not in ("model_type", "architectures")}
    config = MixtralConfig(**shared, num_local_experts=EXPERTS, num_experts_per_tok=CHOSEN)
    torch.manual_seed(0)
    model = MixtralForCausalLM(config).float()
    weights = dense.state_dict()
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            layer = name.rpartition("mlp.")[0] + "mlp."
            if name.endswith("experts.gate_up_proj"):
                both = [weights[f"{layer}{part}_proj.weight"] for part in ("gate", "up")]
                weight.copy_(torch.cat(both).expand_as(weight))
            elif name.endswith("experts.down_proj"):
                weight.copy_(weights[f"{layer}down_proj.weight"].expand_as(weight))
            elif not name.endswith("mlp.gate.weight"):
                weight.copy_(weights[name])
    return model.eval()


@torch.no_grad()
def scale_routers(model: MixtralForCausalLM, ids: torch.Tensor) -> None:
    """Random routers that tell tokens apart: logits of mean 0 and standard deviation 1 on a text.

    Hidden states have much in common, which would send nearly all of them to the same experts.
    """

    def scale(router: Any, inputs: Any, output: Any) -> None:
        states = inputs[0].flatten(0, -2)
        common = torch.nn.functional.normalize(states.mean(0), dim=0)
        router.weight.sub_(torch.outer(router.weight @ common, common))
        router.weight.div_((states @ router.weight.T).std(0)[:, None])

    handles = [layer.mlp.gate.register_forward_hook(scale) for layer in model.model.layers]
    model.model(input_ids=ids)
    for handle in handles:
        handle.remove()


@torch.no_grad()
def perturb(model: MixtralForCausalLM) -> None:
    """Make the experts differ."""
    for name, weight in model.named_parameters():
        if ".experts." in name:
            for expert in weight:
                expert.add_(torch.randn_like(expert), alpha=NOISE * float(expert.std()))


@torch.no_grad()
def losses(model: Any, held_out: dict[str, torch.Tensor]) -> dict[str, float]:
    """Nats a token of each text."""
    found = {}
    for text, windows in held_out.items():
        nats = [model(input_ids=ids[None], labels=ids[None]).loss.item() for ids in windows]
        found[text] = round(sum(nats) / len(nats), 4)
    return found


def train(model: MixtralForCausalLM, texts: list[torch.Tensor]) -> None:
    """Experts by LARS, as gradients come (they are never all there); routers by AdamW."""
    model.requires_grad_(False).train()
    routers, rate = [], RATES["experts"]

    @torch.no_grad()
    def step_experts(weight: torch.Tensor) -> None:
        assert weight.grad is not None
        for expert, gradient in zip(weight, weight.grad, strict=True):
            if (length := float(gradient.norm())) > 0:  # it was chosen by some token
                expert.sub_(gradient, alpha=rate * float(expert.norm()) / length)
        weight.grad = None

    for name, weight in model.named_parameters():
        if ".experts." in name:
            weight.requires_grad_().register_post_accumulate_grad_hook(step_experts)
        elif name.endswith("mlp.gate.weight"):
            routers.append(weight.requires_grad_())
    optimizer = torch.optim.AdamW(routers, RATES["routers"], weight_decay=0.0)
    begun, steps = time.perf_counter(), len(texts[0])
    for step, windows in enumerate(zip(*texts, strict=True)):
        rate = RATES["experts"] * (1 - step / steps)
        ids = torch.stack(windows)
        found = model(input_ids=ids, labels=ids, output_router_logits=True)
        # The model's own balancing loss is of all layers together; this one is of each.
        balance = torch.stack([uneven(router) for router in found.router_logits]).mean()
        loss = model.loss_function(found.logits, ids, model.config.vocab_size)
        (loss + BALANCE * balance).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            spent = time.perf_counter() - begun
            print(f"step {step}: {loss:.3f}, {balance:.3f}, {spent:.0f} s", flush=True)
    model.requires_grad_(False).eval()


def uneven(router: torch.Tensor) -> torch.Tensor:
    """Switch Transformer's balancing loss of router logits (tokens, experts): 1 is even."""
    shares = router.float().softmax(-1)
    chosen = torch.zeros_like(shares).scatter(-1, shares.topk(CHOSEN).indices, 1.0)
    return EXPERTS * (chosen.mean(0) / CHOSEN * shares.mean(0)).sum()


@torch.no_grad()
def routing(model: Any, held_out: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """A row for each layer.

    load_n: share of all choices. entropy: of the loads, 1 is even. dependence: what the token says
    of the choice, as a share of ln(EXPERTS): entropy of the mean router less its mean entropy.
    pairs: share of the tokens that the commonest two experts take (of 28 pairs, even is 0.036).
    texts: how differently the two texts are loaded, 0 (alike) to 1 (no expert in common).
    """
    body = model.model  # without the lm_head, whose logits are many
    found = [body(input_ids=held_out[t], output_router_logits=True).router_logits for t in TEXTS]
    rows = []
    for layer, routers in enumerate(zip(*found, strict=True)):
        shares = torch.cat(routers).float().softmax(-1)
        loads = [load(router) for router in routers]
        load_of_both = torch.stack(loads).mean(0)
        common = torch.cat(routers).topk(CHOSEN).indices.sort(-1).values
        most = common.unique(dim=0, return_counts=True)[1].max().item()
        apart = entropy(shares.mean(0)) - torch.stack([entropy(row) for row in shares]).mean()
        rows.append(
            {
                "layer": layer,
                **{f"load_{n}": round(x, 3) for n, x in enumerate(load_of_both.tolist())},
                "entropy": round(entropy(load_of_both).item() / math.log(EXPERTS), 4),
                "dependence": round(apart.item() / math.log(EXPERTS), 4),
                "pairs": round(most / len(shares), 3),
                "texts": round(0.5 * (loads[0] - loads[1]).abs().sum().item(), 3),
            }
        )
    return rows


def load(router: torch.Tensor) -> torch.Tensor:
    """Each expert's share of the choices, (experts,)."""
    chosen = router.topk(CHOSEN).indices.flatten()
    return torch.bincount(chosen, minlength=EXPERTS) / chosen.numel()


def entropy(shares: torch.Tensor) -> torch.Tensor:
    """Nats."""
    return -(shares * shares.clamp_min(1e-30).log()).sum()
