"""Python processes that start fast: forks of one that has imported what takes time."""

import multiprocessing
import os
import runpy
import sys
import tempfile
import threading
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from unittest.mock import patch

from tqdm import tqdm


# Without the libraries that read variables as they are imported, as the Hub's do.
HEAVY = ("torch._dynamo", "torch.distributed.tensor", "torch.export", "scipy.optimize", "scipy.stats", "pyarrow")
ALL = (*HEAVY, "transformers.models.clip.modeling_clip", "datasets", "evaluate", "hf_inti.comparison.run")
PATIENCE = 900  # seconds; what takes longer is killed
Process = multiprocessing.get_context("forkserver").Process


@cache
def _server(imported: tuple[str, ...]) -> forkserver.ForkServer:
    server = forkserver.ForkServer()
    server.set_forkserver_preload(list(imported))
    return server


def _start(imported: tuple[str, ...], target, *arguments) -> Process:
    process = Process(target=target, args=arguments)
    with patch.object(forkserver, "connect_to_new_process", _server(imported).connect_to_new_process):
        process.start()
    return process


class Fork:
    """Does what `python -c what` and `python what` would do with these arguments.

    `environment` stands for this process's; `variables` come on top.
    """

    def __init__(
        self, what: str | Path, *arguments, imported=HEAVY, cwd: Path | None = None, environment=None, **variables
    ):
        self.folder = tempfile.TemporaryDirectory()
        self.files = [Path(self.folder.name, name) for name in ("stdout", "stderr")]
        place = (self.files, {**(os.environ if environment is None else environment), **variables}, cwd or Path.cwd())
        self.process = _start(imported, _run, what, [*map(str, arguments)], *place)

    def poll(self) -> int | None:
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def end(self) -> tuple[int, str, str]:
        """The exit status, stdout and stderr."""
        self.process.join(PATIENCE)
        self.kill()
        with self.folder:
            return self.process.exitcode, *(file.read_text() if file.exists() else "" for file in self.files)


def run_in_a_fork(what: str | Path, *arguments, **place) -> tuple[int, str, str]:
    """`Fork(...).end()`."""
    return Fork(what, *arguments, **place).end()


def _run(what: str | Path, arguments: list[str], *place) -> None:
    _take(*place)
    if isinstance(what, Path):
        sys.argv = [str(what), *arguments]
        sys.path.insert(0, str(what.parent))
        runpy.run_path(str(what), run_name="__main__")
    else:
        sys.argv = ["-c", *arguments]
        sys.path.insert(0, "")
        exec(what, {"__name__": "__main__"})


def own_progress() -> None:
    """Take a lock of this process's for tqdm: forks share one, and if that which has it is killed, all others wait."""
    kinds, lock = [tqdm], threading.RLock()
    for kind in kinds:
        kind.set_lock(lock)
        kinds += kind.__subclasses__()


def _take(files: list[Path], environment: dict[str, str], cwd: Path) -> None:
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)  # not the server's
    own_progress()
    for descriptor, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    if "OMP_NUM_THREADS" in environment:
        sys.modules["torch"].set_num_threads(int(environment["OMP_NUM_THREADS"]))


class ForkedJob:
    """A job of `hf_inti.measure.jobs`, with what that uses of subprocess.Popen."""

    def __init__(self, job, threads: int):
        job.log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TQDM_MININTERVAL": "30"}
        self.process = _start(ALL, _run_job, job.arguments, [job.log, job.log], environment, Path.cwd())
        self.stdin = open(os.devnull)

    def poll(self) -> int | None:
        return self.process.exitcode

    returncode = property(poll)

    def kill(self) -> None:
        self.process.kill()

    def wait(self) -> None:
        self.process.join()


def _run_job(arguments: list[str], *place) -> None:
    _take(*place)
    sys.argv = arguments
    run = runpy.run_path if arguments[0].endswith(".py") else runpy.run_module
    run(arguments[0], run_name="__main__")
