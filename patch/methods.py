"""What is known of each method: one entry of `METHODS`, plain data that every part of the house reads.

Lists, help texts, checks, tables and figures derive from the entries, in their order, which is the reading order of
tables. A learned method is one entry and its recipe; a one-shot method also is a module of `patch.oneshot`.
"""

from dataclasses import dataclass
from typing import Literal

from patch.errors import check_name
from patch.learn.recipe import MASKLLM, PATCH_JOINT, PATCH_JOINT_SPARSER, PATCH_TILE, Recipe

Family = Literal["dense", "smaller", "one-shot", "learned"]


# Below this sparsity a method's recipe for denser masks holds: published are 45%, and 35% and 25%.
_DENSER = 0.4


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: on the command line, in definitions and in rows.
        label: in tables and figures.
        color: of its curves and markers, such as ``#0173b2``; these are told apart by the colour-blind too.
        marker: matplotlib's sign for it; none for a line.
        recipe: the published one, of a method that learns.
        prior: the method whose 2:4 mask learning starts from, if nothing else is said.
        emphasis: drawn larger where positive, and in front of what has less.
        published: what the tables of the PATCH paper call it, where that is not its name.
        denser: the published recipe for 35% sparsity and less, where that is another.
        unlearned: the family, of a method without a recipe.
        calibrated: of a one-shot method, whether it looks at activations.
        changes_weights: whether weights that are kept may differ from the given ones, of a one-shot method.
        rounds: whether it can round what it keeps to INT4 as it prunes, likewise.
    """

    name: str
    label: str
    color: str
    marker: str
    recipe: Recipe | None = None
    prior: str | None = None
    emphasis: int = 0
    published: str | None = None
    denser: Recipe | None = None
    unlearned: Family = "one-shot"
    calibrated: bool = False
    changes_weights: bool = False
    rounds: bool = False

    @property
    def family(self) -> Family:
        """How it finds a mask, if it has any."""
        return "learned" if self.recipe is not None else self.unlearned

    @property
    def structure(self) -> str:
        """Of the masks that it learns: 2:4 where the recipe learns patterns alone. Of a smaller model its own."""
        if self.family == "smaller":
            return "shallow"
        return "2:4" if self.recipe and self.recipe.mode == "maskllm" else "hybrid"


METHODS = {
    method.name: method
    for method in (
        Method("dense", "Dense", "#404040", "", unlearned="dense"),
        Method("drop-blocks", "Fewer blocks", "#cc78bc", "X", unlearned="smaller"),
        Method("magnitude", "Magnitude", "#949494", "p"),
        Method("wanda", "Wanda", "#56b4e9", "^", calibrated=True),
        Method("sparsegpt", "SparseGPT", "#0173b2", "s", calibrated=True, changes_weights=True, rounds=True),
        Method("maskllm", "MaskLLM", "#029e73", "D", MASKLLM, "sparsegpt"),
        Method("patch-tile", "PATCH tile", "#de8f05", "v", PATCH_TILE, "maskllm", emphasis=1, published="patch"),
        Method(
            "patch-joint",
            "PATCH joint",
            "#d55e00",
            "o",
            PATCH_JOINT,
            "sparsegpt",
            emphasis=2,
            published="patch",
            denser=PATCH_JOINT_SPARSER,
        ),
    )
}


def members(family: Family) -> tuple[str, ...]:
    """The methods of a family."""
    return tuple(method.name for method in METHODS.values() if method.family == family)


def published_recipe(name: str, sparsity: float = 0.5) -> Recipe:
    """The published recipe of a method that learns, at a sparsity."""
    recipe = METHODS[check_name("learned method", name, members("learned"))].recipe
    assert recipe is not None
    return METHODS[name].denser or recipe if sparsity < _DENSER else recipe


def label_of(name: str) -> str:
    """What a method is called in tables and figures; rows may have methods that are not known any more."""
    return METHODS[name].label if name in METHODS else name
