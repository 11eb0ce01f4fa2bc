"""Being told to stop while learning: the step under way is finished and the checkpoint written first.

Slurm asks with ``SIGUSR2`` or ``SIGTERM`` before it preempts a job or ends its time, people with Ctrl-C.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


@contextmanager
def deferred_signals() -> Iterator[Callable[[], bool]]:
    """Within, a signal to stop only makes the function that is yielded true; afterwards it acts as it else would have.

    So it ends the process, or requeues a job, or raises KeyboardInterrupt, but with everything saved. The second time
    the same signal comes, it acts at once. Outside a process's main thread, where Python handles no signals, the
    function that is yielded is never true.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {int(number): signal.getsignal(number) for number in SIGNALS}
    # What a shell had its background processes ignore stays ignored.
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}

    def note(number: int, frame: FrameType | None) -> None:
        if number in received:
            received.clear()
            signal.signal(number, before[number])
            os.kill(os.getpid(), number)
            return
        received.append(number)
        print(f"{signal.Signals(number).name}: stopping once this step is saved", file=sys.stderr, flush=True)

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in received:
            os.kill(os.getpid(), number)
