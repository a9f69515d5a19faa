"""Run by torchrun with forked ranks: what DeepSpeed really holds of a small model, as JSON."""

import json
import os
import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam

SIZES = {"micro": 2, "accumulation": 2}


class Small(torch.nn.Module):
    """Odd sizes, so that shares need padding; a frozen head; a norm without weight decay."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(131, 517, bias=False)
        self.norm = torch.nn.LayerNorm(517)
        self.second = torch.nn.Linear(517, 129, bias=True)
        self.head = torch.nn.Linear(129, 33, bias=False)
        self.head.weight.requires_grad_(False)

    def forward(self, inputs):
        hidden = self.norm(torch.nn.functional.silu(self.first(inputs)))
        return self.head(self.second(hidden)).float().square().mean()


def settle(config: dict) -> dict:
    """Fill in what transformers would."""
    filled = {
        "train_micro_batch_size_per_gpu": SIZES["micro"],
        "gradient_accumulation_steps": SIZES["accumulation"],
        "train_batch_size": SIZES["micro"] * SIZES["accumulation"] * int(os.environ["WORLD_SIZE"]),
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
    }
    zero = config["zero_optimization"]
    auto = {"reduce_bucket_size": 10_000, "stage3_prefetch_bucket_size": 9_000}
    auto["stage3_param_persistence_threshold"] = 1_000
    zero |= {name: auto[name] for name in auto if zero.get(name) == "auto"}
    return config | filled


def size(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measured(engine) -> dict:
    """Bytes of the tensors that DeepSpeed's optimizer keeps."""
    zero, weights = engine.optimizer, list(engine.module.parameters())
    states = [
        tensor
        for state in zero.optimizer.state.values()
        for name, tensor in state.items()
        if name in ("exp_avg", "exp_avg_sq")
    ]
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        master, held = zero.fp32_partitioned_groups_flat, [weight.ds_tensor for weight in weights]
        accumulated = [zero.grad_partitions_flat_buffer]
    else:
        master = zero.single_partition_of_fp32_groups
        frozen = [weight for weight in weights if not weight.requires_grad]
        held = [*zero.bit16_groups_flat, *frozen]
        accumulated = []
    return {
        "weights": size(held),
        "master weights": size(master),
        "optimizer": size(states),
        "accumulated gradients": size(accumulated),
        "gradients": size(tensor.grad for tensor in master if tensor.grad is not None),
    }


def run(file: Path, folder: Path) -> dict:
    torch.manual_seed(0)
    config = settle(json.loads(file.read_text()))
    model = Small()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [w for w in trained if w.ndim > 1], "weight_decay": 0.1},
        {"params": [w for w in trained if w.ndim == 1], "weight_decay": 0.0},
    ]
    offloads = config["zero_optimization"].get("offload_optimizer")
    optimizer = (DeepSpeedCPUAdam if offloads else torch.optim.AdamW)(groups, lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    losses = []
    for _ in range(2 * SIZES["accumulation"]):
        inputs = torch.ones(SIZES["micro"], 131, dtype=torch.bfloat16)
        loss = engine(inputs)
        engine.backward(loss)
        with torch.no_grad():  # gloo gathers into views, which autograd refuses
            engine.step()
        losses.append(float(loss))
    found = measured(engine)
    engine.save_checkpoint(str(folder))
    written = sum(file.stat().st_size for file in folder.rglob("*.pt"))
    return found | {"losses": losses, "checkpoint": written}


if __name__ == "__main__":
    deepspeed.init_distributed("gloo")
    *files, folder = map(Path, sys.argv[1:])
    found = {file.stem: run(file, folder / file.stem) for file in files}
    rank = torch.distributed.get_rank()
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()  # gloo's threads abort a process that ends before the other
    torch.distributed.destroy_process_group()
