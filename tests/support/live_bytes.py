"""What a step allocates, on any device: for the planner's tests and benchmarks."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """The peak of bytes in storages that operators made and that are still there."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {s._cdata for s in self.storages((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for storage in self.storages(result):
            if storage._cdata not in given and storage._cdata not in self.seen:
                self.add(storage._cdata, storage)
        self.peak = max(self.peak, self.now)
        return result

    def storages(self, tree):
        return [t.untyped_storage() for t in tree_leaves(tree) if torch.is_tensor(t)]

    def add(self, key, storage):
        size = storage.nbytes()
        self.now += size
        self.seen[key] = weakref.ref(storage, lambda _: self.drop(key, size))

    def drop(self, key, size):
        self.now -= size
        del self.seen[key]
