"""Where a result comes from: command, commit, machine, date and versions, kept with every measurement."""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from accelerate import PartialState


ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "huggingface_hub", "av", "kornia")


def provenance(arguments: Sequence[str] | None = None) -> dict:
    """`command` as it was typed (default: this process's), `commit`, `machine`, `date` (UTC) and `versions`."""
    return {
        "command": command(sys.argv if arguments is None else arguments),
        "commit": commit(),
        "machine": machine(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
    }


def command(arguments: Sequence[str]) -> str:
    """A script of the repository with its arguments, its path relative to the repository."""
    script = Path(arguments[0]).resolve()
    name = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    return f"python {shlex.join([str(name), *arguments[1:]])}"


def commit() -> str | None:
    """The commit of the repository, "-dirty" where files differ from it; None outside a repository."""
    if not (ROOT / ".git").exists():  # installed from a wheel, perhaps inside some other repository
        return None
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def versions() -> dict[str, str | None]:
    return {"python": sys.version.split()[0], **{name: _version(name) for name in PACKAGES}}


def machine() -> dict:
    """Processor, cores, memory in bytes and, where there is one, GPU."""
    pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_bytes": pages and pages * os.sysconf("SC_PAGE_SIZE"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def conditions(batch_size: int, threads: int) -> dict:
    """What speeds must share to be compared."""
    device = PartialState().device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "batch_size": batch_size,
        "device": f"{device.type}: {name}",
        "threads": threads,
        "torch": torch.__version__,
    }


def source_line(record: dict) -> str:
    """One line for documents: the command, the commit, the machine and the day."""
    where = record["machine"]
    name = where["gpu"] or f"{where['cores']} cores of {where['processor']}"
    return f"`{record['command']}`, commit {(record['commit'] or 'unknown')[:7]}, {name}, {record['date'][:10]}."


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
