"""Python processes that start fast: forks of one that has imported what is heavy and not ours."""

import multiprocessing
import os
import runpy
import sys
import tempfile
from functools import cache
from pathlib import Path


HEAVY = ("torch._dynamo", "torch.distributed.tensor", "torch.export", "scipy.optimize", "scipy.stats", "pyarrow")


@cache
def _server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(HEAVY))
    return context


def run_in_a_fork(what: str | Path, *arguments: str) -> tuple[int, str, str]:
    """What `python -c what` and `python what` would do with these arguments: the exit status, stdout and stderr."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        process = _server().Process(target=_run, args=(what, arguments, files))
        process.start()
        process.join()
        return process.exitcode, *(file.read_text() for file in files)


def _run(what: str | Path, arguments: tuple[str, ...], files: list[Path]) -> None:
    for descriptor, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    if isinstance(what, Path):
        sys.argv = [str(what), *arguments]
        sys.path.insert(0, str(what.parent))
        runpy.run_path(str(what), run_name="__main__")
    else:
        sys.argv = ["-c", *arguments]
        sys.path.insert(0, "")
        exec(what, {"__name__": "__main__"})
