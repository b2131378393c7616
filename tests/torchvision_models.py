"""torchvision's video models, or a skip with the reason.

The Makefile installs torchvision into a folder of its own, where nobody else finds it, and runs these tests in
processes of their own, with HF_INTI_TORCHVISION naming that folder; `torchvision_path/sitecustomize.py` says why.
"""

import runpy
from pathlib import Path
from types import ModuleType

import pytest


def load() -> ModuleType:
    """`torchvision.models.video`."""
    runpy.run_path(str(Path(__file__).parent / "torchvision_path" / "sitecustomize.py"))
    reason = "torchvision is not installed, or not for this process"
    return pytest.importorskip("torchvision.models.video", reason=reason, exc_type=ImportError)
