"""Folders that are replaced as a whole, and the messages of a disk that cannot be written."""

import ctypes
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException


AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux's renameat2


def replace_folder(finished: Path, target: Path) -> None:
    """Move the folder `finished` to `target`, whose old content is deleted.

    On Linux `target` is at every moment the whole old folder or the whole new one. Where folders cannot be exchanged
    (other systems, NFS) it is absent for a moment; `recover_folder` then brings the old one back.
    """
    recover_folder(target)
    flush(finished)
    if not target.exists():
        os.replace(finished, target)
    elif exchange(finished, target):
        shutil.rmtree(finished)
    else:
        old = target.with_name(f"{target.name}.old")
        os.replace(target, old)
        os.replace(finished, target)
        shutil.rmtree(old)


def recover_folder(target: Path) -> None:
    """Undo a `replace_folder` that was killed: bring the old folder back if the new one is not in its place."""
    old = target.with_name(f"{target.name}.old")
    if old.exists() and not target.exists():
        os.replace(old, target)
    shutil.rmtree(old, ignore_errors=True)


def exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step; False, with nothing changed, where the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # C libraries before glibc 2.28 and musl 1.2.6
        return False
    return rename(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0


def flush(folder: Path) -> None:
    """Have the system write a folder's files to the disk, so that a rename does not outlive them in a power cut."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def writing(path: Path, advice: str) -> Iterator[None]:
    """Raise a ValueError with `advice` if `path` cannot be written; what was written of a folder is deleted."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
        cause = cause_of(error)
        known = isinstance(cause, (OSError, SafetensorError))
        if not known and "Writer" not in str(cause) and "iostream" not in str(cause):
            raise  # not of torch.save, which reports a full disk so
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        reason = getattr(cause, "strerror", None) or " ".join(str(cause).split())
        raise ValueError(f"{path} must be writable, got: {reason}; {advice}") from error


def cause_of(error: BaseException) -> BaseException:
    """The error, or the first of those that torch gathers from all processes that share a checkpoint of split weights.

    That is no Exception, and its message is their tracebacks.
    """
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


def check_writable(folder: Path) -> None:
    """Raise a ValueError, before hours of training, if files cannot be made in `folder`."""
    with writing(folder / "*", "give another output_dir, or its owner's rights."):
        tempfile.TemporaryFile(dir=folder).close()
