"""torchvision's video models, or a skip with the reason.

PyPI's torchvision for Linux is built against CUDA. Beside a torch for CPUs alone its compiled operators do not load,
nor then torchvision: the Makefile installs it into a folder of its own, where nobody else finds it. The models here use
none of those operators, so what registers them is left out.
"""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch


FOLDER = Path(sys.prefix) / "torchvision"
REGISTRATIONS = ("torchvision._meta_registrations", "torchvision._autograd_registrations")


def load() -> ModuleType:
    """`torchvision.models.video`."""
    if FOLDER.exists() and "torchvision" not in sys.modules:
        sys.path.append(str(FOLDER))
        for name in REGISTRATIONS if torch.version.cuda is None else ():
            sys.modules[name] = ModuleType(name)
    return pytest.importorskip("torchvision.models.video", reason="torchvision is not installed", exc_type=ImportError)
