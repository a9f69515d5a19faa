"""On PYTHONPATH of test processes: lets accelerate see several CPU ranks, and FSDP shard over them.

Without an accelerator, accelerate 1.13 takes every process under DeepSpeed for the only one, and
knows FSDP on accelerators only; Axolotl 0.19 asks for meshes of CUDA devices.

Environment: DISKS, a folder that holds a folder for each rank, which then is a node of its own, in
its own working directory.
"""

import os
from pathlib import Path

if int(os.environ.get("WORLD_SIZE", "1")) > 1:
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"  # not cpu:0, where torch.load can bring nothing
    import torch
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    PartialState._prepare_backend = lambda self, *args, **kwargs: (
        "gloo",
        DistributedType.MULTI_CPU,
    )
    build_mesh, start_state = ParallelismConfig.build_device_mesh, AcceleratorState.__init__
    ParallelismConfig.build_device_mesh = lambda self, device: build_mesh(self, "cpu")

    def start_with_fsdp(self, *args, fsdp_plugin=None, **named):
        first = not self.initialized
        start_state(self, *args, fsdp_plugin=fsdp_plugin, **named)
        if first and fsdp_plugin is not None:
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = start_with_fsdp
    # ZeRO-1 and 2 gather into views of a weight, which autograd refuses of gloo.
    gather = torch.distributed.all_gather_into_tensor
    torch.distributed.all_gather_into_tensor = torch.no_grad()(gather)
    if "DISKS" in os.environ:
        os.chdir(Path(os.environ["DISKS"], os.environ["RANK"]))
        os.environ["LOCAL_RANK"] = "0"
