"""The name under which published checkpoints and notebooks import `models.per_layer`."""

from axolotl_loram.models.per_layer import *  # noqa: F403
