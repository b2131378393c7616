"""A function in another process, which its arguments may crash, hang or fill. Nothing that takes time is imported."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any


SECONDS = 600  # for a call
MEMORY = 4 * 2**30  # bytes for a call


class Died(Exception):
    """What became of the process, for the user; the next call starts another."""


class Isolated:
    """Call `make(*arguments)` there. Whatever is sent either way is pickled: both sides trust each other."""

    def __init__(self, make: Callable[..., Callable], *arguments: Any):
        self.process = None
        self.made = pickle.dumps((make, arguments))

    def __call__(self, value: Any) -> Any:
        """The function's answer. Raises Died if there is none, or after SECONDS; RuntimeError if it cannot be made."""
        if self.process is None:
            self._start()
        try:
            self.pipe.send(value)
            if self.pipe.poll(SECONDS):
                return self.pipe.recv()
            reason = f"took more than {SECONDS} s"
        except (EOFError, OSError):
            reason = "died"
        self.close()
        raise Died(reason)

    def _start(self) -> None:
        self.pipe, theirs = Pipe()
        fd = theirs.fileno()
        self.process = subprocess.Popen([sys.executable, "-m", __name__, str(fd)], pass_fds=[fd])
        theirs.close()
        try:
            self.pipe.send_bytes(self.made)
            failure = self.pipe.recv()  # it is ready, or never will be: importing is not the call's time
        except (EOFError, OSError):
            failure = "its end"
        if failure:
            self.close()
            raise RuntimeError(f"the process that decodes must start, got {failure}")

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
            self.pipe.close()

    def __del__(self):
        self.close()


def serve(pipe: Connection) -> None:
    """What the other process does, until nobody is there."""
    try:
        make, arguments = pickle.loads(pipe.recv_bytes())
        function = make(*arguments)
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
        return
    limit_memory(MEMORY)
    with suppress(EOFError, OSError):
        pipe.send(None)
        while True:
            pipe.send(function(pipe.recv()))


def limit_memory(more: int) -> None:
    """Let this process take `more` bytes than it has, where the system has such a limit."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + more, resource.getrlimit(resource.RLIMIT_AS)[1]))


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
