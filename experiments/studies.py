"""The studies: one function per published table or figure, each returning its trials."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from experiments import models
from experiments.definitions import (
    ONE_SHOT,
    Calibration,
    Evaluation,
    Learning,
    Perplexity,
    Pruning,
    Trial,
    check_name,
)
from patch.mask import TileShape
from patch.recipe import RECIPES, Recipe
