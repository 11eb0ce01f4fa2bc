"""Which elements a pruned model may keep."""

# In reading order: all; all of some decoder blocks; by masks, which in the latter two are made of tiles.
STRUCTURES = ("dense", "shallow", "unstructured", "2:4", "hybrid")
TILED = ("2:4", "hybrid")
