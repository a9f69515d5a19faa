"""Files: tensors, 4 bits, strangers' JSON, whole-or-absent writing, resumable work, the hub."""
