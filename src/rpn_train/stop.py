"""SIGTERM and Ctrl-C as a request: the step is finished, the run is saved, then it ends."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """`signal` is the number of the signal that came, None so far."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """A request that SIGTERM and SIGINT set; a second Ctrl-C interrupts at once."""
    request = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        if request and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal = number

    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def signals_for_parent() -> Iterator[None]:
    """Processes forked in here never get SIGTERM or SIGINT: their parent alone ends them.

    Whoever else such a signal reached, the parent decides when to stop, and needs them until then.
    """
    # They inherit it from their first instruction on; a handler of their own would come too late.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
