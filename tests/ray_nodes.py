"""A Ray cluster of several nodes on this machine, as `ray start` makes one of several machines."""

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil


ROOT = Path(__file__).parents[1]
PATIENCE = 900  # seconds, beside other tests; what is waited for takes a few
START = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", "--disable-usage-stats"]


def wait_for(happened: Callable, processes: Sequence, seconds: int = PATIENCE) -> None:
    """Until it has happened, as long as the processes live."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "nothing happens"
        assert all(process.poll() is None for process in processes), "a process has ended"
        time.sleep(0.05)


def environment() -> dict[str, str]:
    """Of Ray's processes, and of scripts that start some."""
    # They are nice by default: beside other tests they would wait. A node that stops would, for others.
    ray = {"RAY_worker_niceness": "0", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **ray}


class Nodes:
    """One core each, the first is the head. Those who use it need `variables`: it has a token of its own."""

    def __init__(self, folder: Path, count: int):
        self.processes, self.log = [], open(folder / "ray.txt", "a+")  # appending, for reading moves where others write
        (folder / "token").write_text(secrets.token_hex(16))
        self.variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address, self.started = f"127.0.0.1:{self.port}", 0
        try:
            for _ in range(count):
                self.add()
        except BaseException:
            self.stop()
            raise

    def add(self) -> None:
        head = ["--head", f"--port={self.port}", "--include-dashboard=false"]
        place = [f"--address={self.address}"] if self.processes else head
        options = {"stdout": self.log, "stderr": self.log, "env": environment() | self.variables}
        self.processes.append(subprocess.Popen([*START, *place], **options))
        self.started += 1
        wait_for(self._has_started, self.processes)

    def _has_started(self) -> bool:
        self.log.seek(0)
        return self.log.read().count("Ray runtime started") == self.started

    def stages_of_last(self) -> list[str]:
        """Ray's names of the last node's processes that decode or compute."""
        names = []
        for process in self._processes_of_last():
            with suppress(psutil.Error):  # it has ended
                names.append(" ".join(process.cmdline()).strip())
        return sorted(name for name in names if name.startswith("ray::"))

    def _processes_of_last(self) -> list[psutil.Process]:
        node = psutil.Process(self.processes[-1].pid)
        return [node, *node.children(recursive=True)]

    def kill_last(self) -> None:
        """As when a machine loses its power: none of its processes sees another die."""
        processes = self._processes_of_last()
        for act in (psutil.Process.suspend, psutil.Process.kill):
            for process in processes:
                with suppress(psutil.Error):
                    act(process)
        self.processes.pop().wait(PATIENCE)
        psutil.wait_procs(processes, PATIENCE)

    def stop(self) -> None:
        for node in reversed(self.processes):
            node.terminate()
        for node in reversed(self.processes):
            node.wait(PATIENCE)
        self.log.close()
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", self.port)), "the cluster has not stopped"
