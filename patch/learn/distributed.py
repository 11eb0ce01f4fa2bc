"""Several processes that learn one mask: who holds which rows, and what they tell each other.

Every process (rank) has the whole frozen model and learns on its share of each micro-batch's sequences. Of what is
learned it holds some whole rows of tiles of every weight: their logits, gradients, and optimizer state. A weight's
ranks each mask their own rows and gather the product; in the backward pass the gradient of the masked weight is
summed into its rows' holder. So what crosses between GPUs is two bytes a weight each way, in bfloat16, where
exchanging the gradients of the logits would take six, and the masks, the optimizer, and their memory are divided.

All ranks see the same noise, because it is named by where in the weight it falls. One process is `ALONE`, for which
nothing here does anything.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from patch.errors import UserError

T = TypeVar("T")

# A rank may wait this long for another that reads a model or makes the mask that learning starts from.
_PATIENCE = timedelta(hours=12)


@dataclass(frozen=True)
class Ranks:
    """This process among those that learn together.

    Attributes:
        rank: 0 to ``size - 1``; rank 0 writes checkpoints.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    def rows(self, rows: int, tile_rows: int) -> slice:
        """This rank's rows of a weight, whole rows of tiles; none, for the last ranks of a small weight."""
        share = self.share(rows, tile_rows)
        return slice(min(self.rank * share, rows), min((self.rank + 1) * share, rows))

    def share(self, rows: int, tile_rows: int) -> int:
        """Rows that a rank holds at most."""
        return -(-rows // (tile_rows * self.size)) * tile_rows

    def sequences(self, batch: Tensor) -> Tensor:
        """This rank's sequences of a micro-batch ``[sequences, length]``.

        Raises:
            UserError: if they cannot be shared equally.
        """
        if len(batch) % self.size:
            raise UserError(f"microbatch {len(batch)} cannot be divided among {self.size} processes: choose a multiple")
        return batch.tensor_split(self.size)[self.rank]

    def gather(self, parts: Sequence[Tensor], rows: Sequence[int], tile_rows: int) -> list[Tensor]:
        """Whole weights from every rank's rows; backward, each rank gets the sum over ranks of its rows' gradients.

        Several at a time cross as one, which takes a fraction of the time of one after the other.

        Args:
            parts: this rank's ``[rows here, K]`` of each weight.
            rows: of the whole, of each weight.
        """
        if self.size == 1:
            return list(parts)
        shares = [self.share(count, tile_rows) for count in rows]
        gathered: tuple[Tensor, ...] = _Gather.apply(rows, shares, self.size, *parts)
        return list(gathered)

    def total(self, part: Tensor) -> Tensor:
        """Sum over ranks of ``part``, of one shape on all; backward, each rank gets the gradient of its own part."""
        if self.size == 1:
            return part
        summed: Tensor = _Total.apply(part)
        return summed

    def mean(self, values: Tensor) -> Tensor:
        """Mean over ranks of ``values``, of one shape on all; no gradient."""
        if self.size == 1:
            return values
        values = values.detach().clone()
        dist.all_reduce(values)
        return values / self.size

    def collect(self, part: Tensor, rows: int, tile_rows: int, dim: int = 0) -> Tensor:
        """The whole of a tensor that is divided along ``dim`` as weights are along their rows; no gradient."""
        if self.size == 1:
            return part
        padded = _padded(part.detach().movedim(dim, 0), self.share(rows, tile_rows))
        return _all_gathered([padded], self.size)[0][:rows].movedim(0, dim)

    def told(self, make: Callable[[], T]) -> T:
        """What ``make`` returns on rank 0, on all of them.

        Raises:
            UserError: on all of them, if it does there.
        """
        if self.size == 1:
            return make()
        said: list[Any] = [None, None]
        if self.rank == 0:
            try:
                said[0] = make()
            except UserError as error:
                said[1] = str(error)
        dist.broadcast_object_list(said)
        if said[1] is not None:
            raise UserError(said[1])
        return cast(T, said[0])

    def agree(self, flag: bool, device: torch.device | str) -> bool:
        """Whether any rank says so."""
        if self.size == 1:
            return flag
        votes = torch.tensor(float(flag), device=device)
        dist.all_reduce(votes)
        return bool(votes.item())


ALONE = Ranks()


@contextmanager
def joined(device: torch.device | str) -> Iterator[Ranks]:
    """The ranks that ``torchrun`` started this process among, or `ALONE`; a GPU each, by ``LOCAL_RANK``.

    Raises:
        UserError: if there are fewer GPUs than processes on this machine.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    device = torch.device(device)
    options: dict[str, Any] = {}
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise UserError(f"process {local} of this machine has no GPU: torch sees {torch.cuda.device_count()}")
        torch.cuda.set_device(local)
        options["device_id"] = torch.device("cuda", local)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE, **options)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Sequence[int], shares: Sequence[int], size: int, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.held, ctx.shares, ctx.size = [len(part) for part in parts], shares, size
        padded = [_padded(part, share) for part, share in zip(parts, shares, strict=True)]
        return tuple(whole[:count] for whole, count in zip(_all_gathered(padded, size), rows, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        padded = [_padded(grad, share * ctx.size) for grad, share in zip(grads, ctx.shares, strict=True)]
        mine = _reduce_scattered(padded, ctx.size)
        return None, None, None, *(part[:held] for part, held in zip(mine, ctx.held, strict=True))


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        summed = part.detach().clone()
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _padded(part: Tensor, rows: int) -> Tensor:
    """Contiguous, with ``rows`` rows, the last of them anything; a copy only where it must be."""
    if len(part) == rows:
        return part.contiguous()
    padded = part.new_zeros((rows, *part.shape[1:]))
    padded[: len(part)] = part
    return padded


def _all_gathered(parts: Sequence[Tensor], size: int) -> list[Tensor]:
    wholes = [part.new_empty((size * len(part), *part.shape[1:])) for part in parts]
    _group().allgather_into_tensor_coalesced(wholes, list(parts)).wait()
    return wholes


def _reduce_scattered(wholes: Sequence[Tensor], size: int) -> list[Tensor]:
    """This rank's rows of the sums over ranks."""
    parts = [whole.new_empty((len(whole) // size, *whole.shape[1:])) for whole in wholes]
    _group().reduce_scatter_tensor_coalesced(parts, list(wholes)).wait()
    return parts


def _group() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None, "several processes learn together within `joined`"
    return group
