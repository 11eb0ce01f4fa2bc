"""What an experiment is: plain frozen data, named by the hash of its content.

A `Trial` is one point of an experiment: a `Pruning` (which model, which method, how sparse, learned on what) and the
`Evaluation` of the model that comes out. Both hash independently: trials that share a pruning share its checkpoint, and
a pruning that starts from another one's mask (its ``prior``) names that pruning in full, so a SparseGPT prior is
computed once, however many masks are learned from it.
"""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from analysis.rows.format import name_of
from analysis.rows.variants import RECIPE, differences, settings
from experiments.data.registry import REGISTRY
from patch.errors import UserError, check_name
from patch.learn.recipe import EARLIER, HOW_IT_RUNS, Recipe, TileRanking
from patch.methods import METHODS, members, published_recipe
from patch.quantise.precisions import PRECISIONS
from patch.recover.recipe import RecoveryRecipe
from patch.structures import STRUCTURES, TILED
from patch.tiles import TileShape, check_sparsity, check_tile


def needs_calibration(method: str, tile_ranking: str = "weight") -> bool:
    """Whether a method looks at activations, or ranks its tiles by text."""
    family = METHODS[method].family
    if family != "one-shot":
        return family == "smaller"
    return tile_ranking == "model" or METHODS[method].calibrated


DrawnFrom = Literal["documents", "stream"]


@dataclass(frozen=True)
class Calibration:
    """Text that one-shot methods see: ``windows`` windows of ``length`` tokens.

    Attributes:
        drawn_from: ``documents``: one window per random document that is long enough, as one-shot methods were
            published; ``stream``: windows of the text that learning sees, all documents one after the other, so that
            short ones have their share.
    """

    source: str = "c4"
    windows: int = 128
    length: int = 2048
    seed: int = 0
    # Younger than published rows.
    drawn_from: DrawnFrom = field(default="documents", metadata={"added": True})

    def __post_init__(self) -> None:
        check_name("calibration windows drawn from", self.drawn_from, get_args(DrawnFrom))


@dataclass(frozen=True)
class Learning:
    """Text and hyperparameters of a learned mask."""

    source: str
    recipe: Recipe


@dataclass(frozen=True)
class Quantisation:
    """How a model's weights are quantised.

    Attributes:
        precision: one of `patch.quantise.precisions.PRECISIONS`.
        calibration: text on which errors are passed on; None for 8 bits that are rounded to nearest.
        joint: prune and round in one sweep, as SparseGPT does; otherwise what the mask keeps is quantised once the
            mask is found.
        sink_aware: pass errors on in every precision, with the first token of a window counting as all others together,
            from the largest inputs to the smallest (`patch.oneshot.gptq`); otherwise INT4 passes them on from left to
            right, all tokens alike, and 8 bits are rounded to nearest.
    """

    precision: str
    calibration: Calibration | None = None
    joint: bool = False
    # Younger than published rows.
    sink_aware: bool = field(default=False, metadata={"added": True})

    def __post_init__(self) -> None:
        precision = PRECISIONS[check_name("precision", self.precision, PRECISIONS)]
        looks = precision.grouped or self.sink_aware
        if looks != (self.calibration is not None):
            needs = "needs calibration text" if looks else "is rounded to nearest, without calibration text"
            raise UserError(f"{precision.label} {needs}")
        if self.joint and not precision.grouped:
            raise UserError(f"{precision.label} passes no errors on: pruning and rounding in one sweep is for INT4")
        if self.joint and self.sink_aware:
            raise UserError("pruning and rounding in one sweep goes from left to right: leave sink_aware out")


@dataclass(frozen=True)
class Recovery:
    """Text and hyperparameters of training what a mask keeps, and the seed of their order."""

    source: str
    recipe: RecoveryRecipe
    seed: int = 0


@dataclass(frozen=True)
class Pruning:
    """How a model is pruned; its hash names the checkpoint.

    Attributes:
        model: a name of the registry, a path, or a hub id.
        revision: digest of the model's files where they are local, so that a changed model is another trial.
        method: one of `patch.methods.METHODS`.
        structure: one of `patch.structures.STRUCTURES`.
        sparsity: target share of zeros over all prunable weights; of a smaller model, of the blocks that are gone.
        tile: ``(rows, cols)``; also for 2:4, whose checkpoint scores tiles for the methods that start from it.
        seed: of the learned methods' initial logits, noise and data order.
        calibration: text for one-shot methods that need activations.
        learning: text and recipe for learned methods.
        prior: the pruning whose mask a learned method starts from (patterns and tile scores) or, in tile mode, keeps.
        tile_prior: of a learned mask, the unstructured pruning whose kept share ranks each weight's tiles at the start;
            None ranks them by the tile scores of ``prior``, where it has some.
        weight_update: whether a one-shot method that changes the weights it keeps does so.
        partial: prune a model of which some matrices cannot be pruned, and leave those dense (`patch.layers.coverage`).
        tile_ranking: which tiles of a one-shot hybrid mask stay dense: ``weight``, of every weight one share, by the
            method's own scores; ``model``, those that cost the whole model most, as the calibration text shows, if they
            drop what the method's 2:4 mask drops (`patch.learn.sensitivity`).
        refit: text on which the weights that the mask keeps are fitted to the dense outputs (`patch.oneshot.refit`),
            once the mask is found without it; None leaves them as they are.
        recovery: text and recipe by which the weights that the mask keeps are trained, once it is there
            (`patch.recover`); None leaves them as they are.
        quantisation: in how few bits the weights are, after all of the above; None leaves them as they are.
    """

    model: str
    method: str
    structure: str
    sparsity: float
    tile: TileShape | None = None
    seed: int = 0
    calibration: Calibration | None = None
    learning: Learning | None = None
    prior: "Pruning | None" = None
    revision: str | None = None
    # Younger than published rows: their prunings keep their names.
    refit: Calibration | None = field(default=None, metadata={"added": True})
    tile_ranking: str = field(default="weight", metadata={"added": True})
    weight_update: bool = field(default=True, metadata={"added": True})
    tile_prior: "Pruning | None" = field(default=None, metadata={"added": True})
    partial: bool = field(default=False, metadata={"added": True})
    quantisation: Quantisation | None = field(default=None, metadata={"added": True})
    recovery: Recovery | None = field(default=None, metadata={"added": True})

    def __post_init__(self) -> None:
        check_name("method", self.method, METHODS)
        check_name("structure", self.structure, STRUCTURES)
        about, one_shot = METHODS[self.method], ", ".join(members("one-shot"))
        if (self.method == "dense") != (self.structure == "dense"):
            raise UserError(f"method {self.method} cannot have structure {self.structure}")
        if (about.family == "smaller") != (self.structure == "shallow"):
            raise UserError(f"method {self.method} cannot have structure {self.structure}")
        if self.structure == "shallow":
            if not 0 < self.sparsity < 1:
                raise UserError(f"target sparsity {self.sparsity}: of {self.method} it is above 0 and below 1")
        elif self.structure == "unstructured":
            if about.family != "one-shot":
                raise UserError(f"{self.method} learns hybrid masks: structure 'unstructured' is for {one_shot}")
            if not 0 <= self.sparsity < 1:
                raise UserError(
                    f"target sparsity {self.sparsity}: unstructured pruning takes 0 up to, not including, 1"
                )
        else:
            check_sparsity(self.sparsity)
        if self.structure == "2:4" and self.sparsity != 0.5:
            tiled = ", ".join(name for name in members("learned") if METHODS[name].structure == "hybrid")
            less = f"{tiled} reach less" if about.recipe else "use structure 'hybrid' for less"
            raise UserError(f"structure 2:4 has sparsity 0.5, not {self.sparsity}: {less}")
        if self.structure in TILED:
            if self.tile is None:
                raise UserError(f"structure {self.structure} needs a tile shape, such as 64x64")
            object.__setattr__(self, "tile", check_tile(self.tile))
        check_name("tile ranking", self.tile_ranking, get_args(TileRanking))
        if self.tile_ranking == "model" and (about.family != "one-shot" or self.structure != "hybrid"):
            raise UserError(
                f"tile ranking 'model' is for hybrid masks of {one_shot}, not {self.method} {self.structure}"
                + (": a recipe has its own" if about.recipe else "")
            )
        if needs_calibration(self.method, self.tile_ranking) and self.calibration is None:
            ranked = " with tiles ranked over the model" if self.tile_ranking == "model" else ""
            raise UserError(f"{self.method}{ranked} needs calibration text")
        if about.recipe:
            if self.learning is None:
                raise UserError(f"{self.method} needs text and a recipe to learn with")
            if self.learning.recipe.mode != about.recipe.mode:
                mode = self.learning.recipe.mode
                theirs = next(known.name for known in METHODS.values() if known.recipe and known.recipe.mode == mode)
                raise UserError(
                    f"{self.method} needs a recipe of mode {about.recipe.mode}, got {mode}, which is {theirs}'s: "
                    f"take that method, or another recipe"
                )
            if self.prior is not None and (self.prior.tile != self.tile or self.prior.model != self.model):
                raise UserError(f"the prior of {self.method} must be on the same model and tile shape")
        if self.refit is not None and self.structure not in TILED:
            raise UserError(f"refit fits what a mask of tiles keeps: structure {self.structure} has none")
        if self.recovery is not None and self.structure in ("dense", "shallow"):
            raise UserError(f"recovery trains what a mask keeps: structure {self.structure} has none")
        if self.recovery is not None and self.quantisation is not None and self.quantisation.joint:
            raise UserError(
                "recovery trains what is not quantised yet: pruning and rounding in one sweep leaves nothing"
            )
        if not self.weight_update and not about.changes_weights:
            raise UserError(f"{self.method} changes no weight that it keeps: leave weight_update as it is")
        if self.tile_prior is not None:
            if not about.recipe or about.structure != "hybrid":
                raise UserError(f"{self.method} learns no tiles: leave out the tile prior")
            if self.tile_prior.structure != "unstructured" or self.tile_prior.model != self.model:
                raise UserError(f"the tile prior of {self.method} must be an unstructured pruning of the same model")
        joint = self.quantisation is not None and self.quantisation.joint
        if joint and (not about.rounds or self.structure not in TILED or self.refit or not self.weight_update):
            raise UserError(
                f"{self.method} {self.structure} does not prune and round in one sweep as defined: leave joint out"
            )

    @property
    def as_it_is(self) -> bool:
        """Whether nothing is done to the model, so that it has no checkpoint."""
        return self.method == "dense" and self.quantisation is None

    @property
    def keeps_all(self) -> bool:
        """Whether every weight of every block that is there is kept, so that there is nothing to pack."""
        return self.structure in ("dense", "shallow")

    @property
    def masked_as(self) -> "Pruning | None":
        """The pruning whose checkpoint's mask it has: the same in more bits, without recovery, or without refit."""
        if self.quantisation is not None and not self.quantisation.joint:
            unrounded = dataclasses.replace(self, quantisation=None)
            return None if unrounded.as_it_is else unrounded
        if self.recovery is not None:
            return dataclasses.replace(self, recovery=None)
        if self.refit is not None:
            return dataclasses.replace(self, refit=None)
        return None

    @property
    def base(self) -> "Pruning | None":
        """The pruning that must be there before: `masked_as`; the 2:4 mask that ranks tiles; the prior."""
        if masked_as := self.masked_as:
            return masked_as
        if self.tile_ranking == "model":
            seen = self.calibration if needs_calibration(self.method) else None
            return dataclasses.replace(
                self, structure="2:4", sparsity=0.5, calibration=seen, tile_ranking="weight", quantisation=None
            )
        return self.prior

    @property
    def bases(self) -> "tuple[Pruning, ...]":
        """All prunings that must be there before."""
        ranks_tiles = self.tile_prior if self.learns and self.recovery is None else None
        return tuple(filter(None, (self.base, ranks_tiles)))

    @property
    def texts(self) -> "tuple[Calibration | None, ...]":
        """What is looked at besides the text that is learned on."""
        return self.calibration, self.refit, self.quantisation.calibration if self.quantisation else None

    @property
    def learns(self) -> bool:
        """Whether making the checkpoint is learning, of a mask or of what one keeps, which several GPUs may share."""
        learns_mask = METHODS[self.method].family == "learned" and self.refit is None
        return self.quantisation is None and (self.recovery is not None or learns_mask)

    @property
    def passes(self) -> Recipe | RecoveryRecipe | None:
        """The recipe by which the checkpoint is learned, where it is."""
        if not self.learns:
            return None
        if self.recovery is not None:
            return self.recovery.recipe
        return self.learning.recipe if self.learning else None


@dataclass(frozen=True)
class Perplexity:
    """Perplexity over all full windows of ``length`` tokens of ``source``."""

    source: str = "wikitext2/test"
    length: int = 2048

    def __str__(self) -> str:
        return f"{self.source}@{self.length}"


@dataclass(frozen=True)
class Workload:
    """One pass of a whole model that is timed.

    Attributes:
        kind: ``decode``, one step after a context, or ``prefill``, whole prompts.
        batch: sequences.
        length: tokens of a prompt; 1 for decoding.
    """

    kind: str
    batch: int
    length: int

    def __str__(self) -> str:
        return f"{self.kind}@{self.batch}x{self.length}"

    @classmethod
    def named(cls, text: str) -> "Workload":
        """The workload that reads so.

        Raises:
            UserError: if it is none.
        """
        found = re.fullmatch(r"(decode|prefill)@([1-9]\d*)x([1-9]\d*)", text)
        if not found or (found[1] == "decode" and found[3] != "1"):
            raise UserError(f"workload '{text}': give KIND@BATCHxLENGTH, such as decode@16x1 or prefill@8x2048")
        return cls(found[1], int(found[2]), int(found[3]))


WORKLOADS = (
    Workload("decode", 1, 1),
    Workload("decode", 16, 1),
    Workload("prefill", 1, 2048),
    Workload("prefill", 8, 2048),
)


@dataclass(frozen=True)
class Packed:
    """What is measured of a checkpoint once it is packed: its size, perplexity again, and speed.

    Attributes:
        workloads: what is timed, end to end.
        rounds: timed runs of each implementation.
        carried: models of the registry on whose shapes a hybrid checkpoint's share of dense tiles, per kind of layer
            and depth, is timed with random weights.
        carried_tile: tile shape there; None takes the checkpoint's own where it divides all weights, else 128x128.
    """

    workloads: tuple[Workload, ...] = WORKLOADS
    rounds: int = 10
    carried: tuple[str, ...] = ()
    carried_tile: TileShape | None = None


# Linears of a decoder block, siblings fused: query, key and value, and gate and up.
LINEARS = ("qkv", "o", "gate_up", "down")
DENSE_PART = "model:dense"


@dataclass(frozen=True)
class KernelGrid:
    """Every linear of a model of the registry, timed with random weights against dense and 2:4 libraries.

    Attributes:
        tokens: how many, one product each.
        tiles: tile shapes.
        sparsities: shares of zeros; 0 and 0.5 have one map, others an even and an uneven one.
        rounds: timed runs of each implementation.
        compiled: also time ``torch.compile`` in max-autotune mode, which takes seconds to compile for each product.
    """

    tokens: tuple[int, ...] = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    tiles: tuple[TileShape, ...] = ((128, 128),)
    sparsities: tuple[float, ...] = (0.0, 0.25, 0.35, 0.45, 0.5)
    rounds: int = 15
    compiled: bool = False

    def __post_init__(self) -> None:
        for sparsity in self.sparsities:
            check_sparsity(sparsity)
        if few := [count for count in self.tokens if count < 1]:
            raise UserError(f"{few[0]} tokens: a product takes one or more")

    @property
    def parts(self) -> list[str]:
        """What is measured one after the other, each a stage: the linears of a block."""
        return [f"kernels:{name}" for name in LINEARS]


@dataclass(frozen=True)
class ModelGrid:
    """A model of the registry with random weights, timed end to end against the same model dense.

    Attributes:
        sparsities: shares of zeros, one random uneven map each.
        tile: shape of tiles.
        workloads: what is timed.
        rounds: timed runs of each implementation.
        blocks: fewer decoder blocks than the model has, to try out something; None for all.
    """

    sparsities: tuple[float, ...] = (0.0, 0.25, 0.35, 0.45, 0.5)
    tile: TileShape = (128, 128)
    workloads: tuple[Workload, ...] = WORKLOADS
    rounds: int = 10
    blocks: int | None = field(default=None, metadata={"added": True})

    def __post_init__(self) -> None:
        for sparsity in self.sparsities:
            check_sparsity(sparsity)

    @property
    def parts(self) -> list[str]:
        """What is measured one after the other, each a stage: the dense models, then each sparsity."""
        return [DENSE_PART, *(self.part(sparsity) for sparsity in self.sparsities)]

    def part(self, sparsity: float) -> str:
        return f"model:{100 * sparsity:g}%"


@dataclass(frozen=True)
class Evaluation:
    """What is measured on the pruned model.

    Attributes:
        perplexity: texts and window lengths.
        tasks: names of `experiments.eval.tasks`.
        limit: only the first so many items of each task (for trials that are quick, never for reported numbers).
        batch: windows of text per forward pass; tasks fill the device by themselves.
        packed: what is measured of the packed model; None leaves it out.
        grid: what is timed of the model's shapes instead of all the above; no weight of the model is loaded.
    """

    perplexity: tuple[Perplexity, ...] = (Perplexity(),)
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    batch: int = 16
    # Younger than published rows: their trials keep their names.
    packed: Packed | None = field(default=None, metadata={"added": True})
    grid: KernelGrid | ModelGrid | None = field(default=None, metadata={"added": True})


@dataclass(frozen=True)
class Trial:
    """One point of an experiment."""

    pruning: Pruning
    evaluation: Evaluation

    def __post_init__(self) -> None:
        quantisation = self.pruning.quantisation
        if quantisation is None or self.evaluation.packed is None or self.pruning.keeps_all:
            return
        precision = PRECISIONS[quantisation.precision]
        if self.pruning.structure == "unstructured":
            raise UserError(
                f"{describe(self.pruning)}: no kernel takes packed weights of {precision.label} in this structure yet: "
                "evaluate it unpacked"
            )

    @property
    def label(self) -> str:
        """A short human name, such as ``embedded patch-joint hybrid 45% 64x64``."""
        if isinstance(self.evaluation.grid, KernelGrid):
            return f"{self.pruning.model} kernel speed"
        if isinstance(self.evaluation.grid, ModelGrid):
            return f"{self.pruning.model} end-to-end speed"
        return describe(self.pruning)


def lineage(pruning: Pruning) -> list[Pruning]:
    """A pruning and all that it stands on, itself last."""
    before = (step for base in pruning.bases for step in lineage(base))
    return [*dict.fromkeys(before), pruning]


def describe(pruning: Pruning) -> str:
    """A short human name of a pruning, such as ``embedded patch-joint hybrid 45% 64x64``."""
    parts = [pruning.model]
    # The files of a path may be those of a checkpoint.
    if pruning.method != "dense" or pruning.revision is None or pruning.model in REGISTRY:
        parts.append(pruning.method)
    if pruning.method != "dense":
        parts += [pruning.structure, f"{100 * pruning.sparsity:g}%"]
    if pruning.tile and pruning.structure == "hybrid":
        parts.append("{}x{}".format(*pruning.tile))
    return " ".join(parts + _unusual(pruning))


# Not said in a label: what a study chooses for all of its masks, by how long and on how much it learns.
_SIZE = {"steps", "batch", "microbatch", "length", "warmup"}
_LABELLED = {"recipe", "prior.method", "refit.source", "recovery.source", "seed", "tile_ranking", "weight_update"}
_LABELLED |= {"quantisation.precision", "quantisation.joint", "quantisation.sink_aware"}
_LABELLED |= {RECIPE + each.name for each in dataclasses.fields(Recipe) if each.name not in _SIZE | HOW_IT_RUNS}
_USUAL_RECOVERY = settings({"recovery": {"recipe": RecoveryRecipe().substance()}})
_LABELLED |= {name for name in _USUAL_RECOVERY if name.rpartition(".")[2] not in _SIZE}
# Said where there are none: then blocks alone are trained.
_RECOVERY_STEPS = "recovery.recipe.steps"
_LABELLED |= {_RECOVERY_STEPS, "recovery.recipe.precision"}


def _unusual(pruning: Pruning) -> list[str]:
    """How a pruning is not as published, or, if that is nearer, how not as the first studies' were (`EARLIER`)."""
    about, given = METHODS[pruning.method], settings(definition(pruning))
    usual: dict[str, Any] = dict.fromkeys(_LABELLED) | {"seed": 0, "prior.method": about.prior}
    usual["quantisation.joint"] = False if "quantisation.joint" in given else None
    if pruning.recovery:
        steps = pruning.recovery.recipe.steps
        usual |= _USUAL_RECOVERY | ({_RECOVERY_STEPS: steps} if steps else {})
    if pruning.learning is None:
        return differences(given, usual, _LABELLED, " ")
    fields = given | settings({"learning": {"recipe": pruning.learning.recipe.substance()}})

    def against(recipe: Recipe) -> list[str]:
        known = usual | settings({"learning": {"recipe": recipe.substance()}})
        return differences(fields, known, _LABELLED, " ")

    said = against(published_recipe(pruning.method, pruning.sparsity))
    if pruning.method in EARLIER and len(earlier := against(EARLIER[pruning.method])) < len(said):
        return ["earlier", *earlier]
    return said


def definition(value: Any) -> Any:
    """A dataclass of this module as plain JSON data.

    A field that is marked as added later (``metadata={"added": True}``) is left out where it holds its default, so that
    what was defined before it came keeps its hash.
    """
    if dataclasses.is_dataclass(value):
        parts = [(field, getattr(value, field.name)) for field in dataclasses.fields(value)]
        return {
            field.name: definition(part)
            for field, part in parts
            if not (field.metadata.get("added") and part == field.default)
        }
    if isinstance(value, list | tuple):
        return [definition(part) for part in value]
    return value


def key(value: Any) -> str:
    """The 12 hex digits that name a definition: its digest, but for how a recipe runs."""
    if not isinstance(value, Trial | Pruning):
        return name_of(definition(value))
    # Kept beside the fields of what is frozen: submitting a sweep asks dozens of times for each. Not by equality, since
    # equal values (0 and 0.0) have different names.
    kept = value.__dict__
    if "_key" not in kept:
        kept["_key"] = name_of(definition(value))
    return str(kept["_key"])
