"""Which elements a pruned model may keep."""

# In reading order; masks of the latter two are made of tiles.
STRUCTURES = ("dense", "unstructured", "2:4", "hybrid")
TILED = ("2:4", "hybrid")
