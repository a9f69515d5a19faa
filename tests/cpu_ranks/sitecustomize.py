"""On PYTHONPATH of test processes: lets accelerate see several CPU ranks.

Without an accelerator, accelerate 1.13 takes every process under DeepSpeed for the only one.
"""

import os

if int(os.environ.get("WORLD_SIZE", "1")) > 1:
    from accelerate.state import DistributedType, PartialState

    PartialState._prepare_backend = lambda self, *args, **kwargs: (
        "gloo",
        DistributedType.MULTI_CPU,
    )
