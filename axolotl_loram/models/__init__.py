"""Models in memory: layers of unequal width, layers one at a time, masks, 4 bits."""
