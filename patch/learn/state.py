"""What changes while masks are learned, and its checkpoint, from which a run that was killed goes on.

A checkpoint holds the whole of what ranks divide, so one that any number of processes wrote serves any other number.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patch.learn import saved
from patch.learn.distributed import Ranks
from patch.learn.masked_model import MaskedLinear
from patch.learn.recipe import ADDED_DEFAULTS, Recipe

FORMAT = 2

# Of AdamW, a tensor like the logits each.
_MOMENTS = ("exp_avg", "exp_avg_sq")


class State:
    """Logits, what the optimizer knows of them, and what was logged.

    Attributes:
        step: completed steps.
        history: the entries of `patch.learn.learner.Learned`.
        unlogged: loss, cross entropy, density and gradient norm of each step since the last entry.
        logged: per weight its tile map and the patterns of the rows here, at the last entry.
        started: per weight its tile map at the start; none if the checkpoint that was taken up is older than this.
        linears: the masked weights by name.
        logits: those of patterns and tiles, under ``<weight>/patterns`` and ``<weight>/tiles``.
        optimizer: of the logits.
        path: of the checkpoint.
    """

    def __init__(
        self, linears: dict[str, MaskedLinear], recipe: Recipe, fingerprint: dict[str, Any], path: Path, ranks: Ranks
    ) -> None:
        self.step = 0
        self.history: list[dict[str, float]] = []
        self.unlogged: list[list[float]] = []
        self.logged: dict[str, tuple[Tensor, Tensor]] = {}
        self.started: dict[str, Tensor] = {}
        self.linears = linears
        self.path = path
        self.logits = {f"{name}/patterns": m.patterns for name, m in linears.items() if m.patterns is not None}
        self.logits |= {f"{name}/tiles": m.tiles for name, m in linears.items() if m.tiles is not None}
        # The last of many ranks may hold no rows of any weight.
        held = [logits for logits in self.logits.values() if logits.numel()]
        self.optimizer = torch.optim.AdamW(
            held or [torch.zeros((), device=self.device)],
            lr=recipe.lr,
            betas=recipe.betas,
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self._fingerprint = fingerprint
        self._ranks = ranks

    @property
    def device(self) -> torch.device:
        """Where the logits are."""
        return next(iter(self.logits.values())).device

    def save(self) -> None:
        """Write the checkpoint, with the whole of what is divided; it is there in full or not at all.

        Raises:
            OSError: if it cannot be written.
        """
        learned: dict[str, dict[str, Tensor]] = {}
        for name, logits in self.logits.items():
            moments = self.optimizer.state.get(logits, {})
            parts = {"logits": logits.detach()}
            # A rank without rows of this weight has no moments of them.
            parts |= {moment: moments.get(moment, torch.zeros_like(logits)) for moment in _MOMENTS if self.step}
            learned[name] = {kind: self._whole(name, part) for kind, part in parts.items()}
        logged = {
            name: (dense, self.linears[name].whole_patterns(patterns))
            for name, (dense, patterns) in self.logged.items()
        }
        if self._ranks.rank:
            return
        state = {
            "format": FORMAT,
            "fingerprint": self._fingerprint,
            "step": self.step,
            "history": self.history,
            "unlogged": self.unlogged,
            "learned": learned,
            "logged": logged,
            "started": self.started,
        }
        saved.write(self.path, state)

    def resume(self) -> None:
        """Take up the checkpoint, if there is one.

        Raises:
            UserError: if it is damaged, or belongs to another run.
        """
        if not self.path.exists():
            return
        # A field that is younger than the checkpoint was at its default.
        state = saved.read(self.path, FORMAT, self._fingerprint, ADDED_DEFAULTS)
        with saved.undamaged(self.path), torch.no_grad():
            self.step, self.history, self.unlogged = state["step"], state["history"], state["unlogged"]
            for name, logits in self.logits.items():
                learned = state["learned"][name]
                logits.copy_(self._part(name, learned["logits"]))
                if self.step and logits.numel():
                    # Laid out as the logits are, whatever the number of ranks that wrote them.
                    moments = {
                        kind: torch.empty_like(logits).copy_(self._part(name, learned[kind])) for kind in _MOMENTS
                    }
                    count = torch.tensor(float(self.step), device=logits.device)
                    self.optimizer.state[logits] = {"step": count} | moments
            self.started = {name: dense.clone() for name, dense in state.get("started", {}).items()}
            for name, (dense, patterns) in state["logged"].items():
                here = patterns[self.linears[name].here]
                self.logged[name] = dense.clone(), here.to(self.logged[name][1].device, copy=True)

    def _whole(self, name: str, part: Tensor) -> Tensor:
        """What all ranks hold of a tensor that is divided as the logits ``name`` are."""
        linear, what = name.rsplit("/", 1)
        m = self.linears[linear]
        if what == "tiles":
            whole = self._ranks.collect(part, m.sizes.shape[0], 1)
        else:
            whole = self._ranks.collect(part, m.shape[0], m.tile[0], dim=1)
        # Not kept on the device: it would hold the whole of what is divided for want of room.
        return whole if self._ranks.size == 1 else whole.cpu()

    def _part(self, name: str, whole: Tensor) -> Tensor:
        """The inverse of `_whole`."""
        linear, what = name.rsplit("/", 1)
        m = self.linears[linear]
        return whole[m.tiles_here] if what == "tiles" else whole[:, m.here]
