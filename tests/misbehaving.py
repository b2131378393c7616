"""What takes a process with it. Nothing that takes time is imported: the process is started again and again."""

import os
import signal
import time


class Misbehaves:
    """Does with a process what it is asked for."""

    def __call__(self, what: str) -> int:
        if what == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif what == "hang":
            time.sleep(1000)
        elif what == "fill":
            bytearray(2**33)  # 8 GiB, which nothing fills if there is no limit
        return os.getpid()
