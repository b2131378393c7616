"""Memory in bytes: of CUDA's allocator, or on a CPU of this process; None where the system does not tell."""

from pathlib import Path

import torch


def held(device: torch.device) -> int | None:
    """What is held now."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")


def peak(device: torch.device) -> int | None:
    """The most that was held since `reset_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def reset_peak(device: torch.device) -> bool:
    """Forget the peak so far; False where the system does not allow it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(name: str) -> int | None:
    # getrusage will not do: its peak is inherited from the process that started this one.
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = [line for line in lines if line.startswith(name + ":")]
    return 1024 * int(found[0].split()[1]) if found else None
