"""Signals that end a run: it saves before it leaves."""

import os
import signal
import threading
import time
from types import FrameType


SIGNALS = (signal.SIGTERM, signal.SIGINT)  # a scheduler's, and Ctrl-C
ECHO = 10  # seconds in which a scheduler's signal comes again: it tells all processes, and torchrun tells them too


class Interruption:
    """While entered, `signal` is the signal that came, 0 before.

    A second one of its kind acts as usual, at once; SIGTERM only when it is no echo of the first.
    """

    def __init__(self):
        self.signal, self._came, self._before = 0, 0.0, {}

    def __enter__(self) -> "Interruption":
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exc_info) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal != number:
            self.signal, self._came = number, time.monotonic()
        elif number == signal.SIGINT or time.monotonic() - self._came > ECHO:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)


def ignore_signals(worker: int) -> None:
    """`worker_init_fn` of a DataLoader: signals reach the whole process group, and the run needs its workers to save.

    A worker ends when its DataLoader does, or the process of that. Its SIGTERM is obeyed: what Python sends to the
    workers that a failed run leaves, and waits for.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # which tells the sender
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(1)
