"""torchvision's video models, or a skip with the reason.

PyPI's torchvision for Linux is built against CUDA. Beside a torch for CPUs alone its compiled operators do not load,
nor then torchvision: the Makefile installs it into a folder of its own, where nobody else finds it, and runs these
tests in processes of their own, with HF_INTI_TORCHVISION naming that folder. The models here use none of those
operators, so what registers them is left out.
"""

import os
import sys
from types import ModuleType

import pytest
import torch


FOLDER = os.environ.get("HF_INTI_TORCHVISION")
REGISTRATIONS = ("torchvision._meta_registrations", "torchvision._autograd_registrations")


def load() -> ModuleType:
    """`torchvision.models.video`."""
    if FOLDER and "torchvision" not in sys.modules:
        sys.path.append(FOLDER)
        for name in REGISTRATIONS if torch.version.cuda is None else ():
            sys.modules[name] = ModuleType(name)
    reason = "torchvision is not installed, or not for this process"
    return pytest.importorskip("torchvision.models.video", reason=reason, exc_type=ImportError)
