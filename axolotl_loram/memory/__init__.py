"""Memory, before anything runs: weights, optimizers, activations, ZeRO, and which GPU holds it."""
