"""What changes while kept weights are trained, and its checkpoint, from which a run that was killed goes on.

As that of learning (`patch.learn.state`): a checkpoint holds the whole of what ranks divide, and is sealed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patch.learn import saved
from patch.learn.distributed import Ranks
from patch.recover.kept import Kept, KeptWeight
from patch.recover.recipe import RecoveryRecipe

FORMAT = 1
_MOMENTS = ("exp_avg", "exp_avg_sq")


class Training:
    """Kept weights on the device, and their optimizer, for as long as a block or the whole model is trained."""

    def __init__(self, weights: Mapping[str, KeptWeight], recipe: RecoveryRecipe) -> None:
        self.weights = weights
        self.device = next(iter(weights.values())).values.device
        # The last of many ranks may hold no rows of any weight.
        held = [weight.values for weight in weights.values() if weight.values.numel()]
        self.optimizer = torch.optim.AdamW(
            held or [torch.zeros((), device=self.device)],
            betas=recipe.betas,
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
            fused=True,
        )

    def moments(self, name: str) -> dict[str, Tensor]:
        """Of the values of one weight; zeros before the first step, and of none on a rank without rows of it."""
        values = self.weights[name].values
        found = self.optimizer.state.get(values, {})
        return {moment: found.get(moment, torch.zeros_like(values)) for moment in _MOMENTS}


class State:
    """The kept values of all weights, what the optimizer knows of those under training, and what was logged.

    Attributes:
        step: completed steps, of both phases.
        history: entries of `patch.recover.recovery.Recovered`.
        unlogged: what each step since the last entry measured.
        values: by weight what this rank holds, float32 on the CPU; of those under training, as they were before.
        path: of the checkpoint.
    """

    def __init__(
        self,
        kept: Mapping[str, Kept],
        values: dict[str, Tensor],
        fingerprint: dict[str, Any],
        path: Path,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        self.step = 0
        self.history: list[dict[str, float]] = []
        self.unlogged: list[list[float]] = []
        self.values = values
        self.path = path
        self._kept = kept
        self._training: Training | None = None
        self._moments: dict[str, dict[str, Tensor]] = {}
        self._steps_before = 0
        self._fingerprint = fingerprint
        self._ranks = ranks
        self._device = device

    def begin(self, training: Training, steps: int) -> None:
        """Train these weights from now on, of which ``steps`` are done: where the checkpoint has them, go on there."""
        self._training = training
        self._steps_before = self.step - steps
        for name, weight in training.weights.items():
            if steps and weight.values.numel():
                moments = {
                    kind: torch.empty_like(weight.values).copy_(whole) for kind, whole in self._moments[name].items()
                }
                count = torch.tensor(float(steps), device=training.device)
                training.optimizer.state[weight.values] = {"step": count} | moments
        self._moments = {}

    def end(self) -> None:
        """What was trained is done: its values are kept, its moments are not."""
        assert self._training is not None
        for name, weight in self._training.weights.items():
            self.values[name] = weight.values.detach().cpu()
        self._training = None

    def whole(self, name: str) -> Tensor:
        """The kept values of a weight, of all ranks, float32 on the CPU."""
        training = self._training
        under_training = training is not None and name in training.weights
        values = training.weights[name].values if training and under_training else self.values[name]
        return self._kept[name].whole(values, self._device)

    def save(self) -> None:
        """Write the checkpoint, with the whole of what is divided; it is there in full or not at all.

        Raises:
            OSError: if it cannot be written.
        """
        values = {name: self.whole(name) for name in self.values}
        training = self._training
        moments: dict[str, dict[str, Tensor]] = {}
        if training is not None and self.step > self._steps_before:
            for name in training.weights:
                parts = training.moments(name)
                moments[name] = {kind: self._kept[name].whole(part, self._device) for kind, part in parts.items()}
        if self._ranks.rank:
            return
        state = {
            "format": FORMAT,
            "fingerprint": self._fingerprint,
            "step": self.step,
            "history": self.history,
            "unlogged": self.unlogged,
            "values": values,
            "moments": moments,
        }
        saved.write(self.path, state)

    def resume(self) -> None:
        """Take up the checkpoint, if there is one.

        Raises:
            UserError: if it is damaged, or belongs to another run.
        """
        if not self.path.exists():
            return
        state = saved.read(self.path, FORMAT, self._fingerprint, {})
        with saved.undamaged(self.path):
            self.step, self.history, self.unlogged = state["step"], state["history"], state["unlogged"]
            for name, kept in self._kept.items():
                self.values[name] = kept.part(state["values"][name]).clone()
            self._moments = {
                name: {kind: self._kept[name].part(parts[kind]).clone() for kind in _MOMENTS}
                for name, parts in state["moments"].items()
            }
