"""The adapter for the original: scattered, filled, merged, and whether it is whole."""
