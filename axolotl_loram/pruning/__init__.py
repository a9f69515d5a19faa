"""Choosing what goes, refitting what stays, writing the pruned checkpoint."""
