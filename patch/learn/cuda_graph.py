"""A function of tensors in fixed places, replayed as a CUDA graph: the host launches at once what it launched singly.

A step of learning on a small model is a few thousand short kernels, which Python cannot launch as fast as a GPU runs
them.
"""

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Runs before the capture, which must find everything compiled and every library set up.
_PLAIN_RUNS = 3


class Replayed:
    """Calls ``function`` the first times, then replays its capture.

    Whatever differs from call to call must be read from tensors that the caller overwrites; what it returns or leaves
    behind, such as gradients, is written where the capture wrote it.

    Attributes:
        captured: whether calls are replays from now on.
    """

    def __init__(self, function: Callable[[], Tensor], after_failure: Callable[[], None]) -> None:
        """``after_failure`` is called if the function cannot be captured, to remove what the attempt left behind."""
        self.captured = False
        self._function = function
        self._after_failure = after_failure
        self._can_capture = True
        self._runs = 0
        self._graph = torch.cuda.CUDAGraph()
        self._stream = torch.cuda.Stream()
        self._result: Tensor | None = None

    def __call__(self) -> Tensor:
        """The function's result, a copy."""
        if self._runs < _PLAIN_RUNS or not self._can_capture:
            self._runs += 1
            # A capture may not wait for what the default stream has begun, which the first runs would leave behind.
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                result = self._function()
            torch.cuda.current_stream().wait_stream(self._stream)
            return result
        if self._result is None:
            self._capture()
            return self()
        self._graph.replay()
        return self._result.clone()

    def close(self) -> None:
        """Let go of the capture, and of the memory that it holds; calls are plain ones from then on."""
        if self.captured:
            self._graph.reset()
        self._result, self.captured, self._can_capture = None, False, False

    def _capture(self) -> None:
        torch.cuda.synchronize()
        try:
            with _uncollected(), torch.cuda.graph(self._graph, stream=self._stream):
                result = self._function()
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            warnings.warn(f"forward and backward pass run without a CUDA graph: {reason}", stacklevel=2)
            self._can_capture = False
            self._after_failure()
        else:
            self._result = result
            self.captured = True


class Passes:
    """Forward and backward passes of micro-batches, each adding to the gradients; a CUDA graph if ``captured``.

    Args:
        backward: a pass, of what lies in fixed places; returns what it measured.
        drop_gradients: makes gradients nothing: zero where their memory is kept (true), or gone.
        accumulates: whether a step has several micro-batches. A graph writes gradients where it wrote them when it was
            captured: with several it must add to what is there, with one it had better not read it.
    """

    def __init__(
        self,
        backward: Callable[[], Tensor],
        drop_gradients: Callable[[bool], None],
        captured: bool,
        accumulates: bool,
    ) -> None:
        self._drop_gradients = drop_gradients
        self._accumulates = accumulates
        self._backward = Replayed(backward, self._after_failed_capture) if captured else backward

    def __call__(self) -> Tensor:
        """One pass."""
        return self._backward()

    def close(self) -> None:
        """Let go of the graph: processes that exchange something in theirs can part only when those are gone."""
        if isinstance(self._backward, Replayed):
            self._backward.close()

    def _after_failed_capture(self) -> None:
        if not self._accumulates:
            self._drop_gradients(False)

    def forget_gradients(self) -> None:
        """Make ready for the next step."""
        replayed = isinstance(self._backward, Replayed) and self._backward.captured
        if self._accumulates or not replayed:
            self._drop_gradients(self._accumulates and isinstance(self._backward, Replayed))


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without garbage collection, after a last one: it may free an earlier graph, which ends a capture under way."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
