"""Drafting the declaration of a family that has none."""
