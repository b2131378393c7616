"""On PYTHONPATH, lets every process import torchvision from the folder that HF_INTI_TORCHVISION names.

PyPI's torchvision for Linux is built against CUDA. Beside a torch for CPUs alone its compiled operators do not load,
nor then torchvision. The models here use none of those operators, so what registers them is left out.
"""

import os
import sys
from importlib.metadata import version
from types import ModuleType


FOLDER = os.environ.get("HF_INTI_TORCHVISION")
REGISTRATIONS = ("torchvision._meta_registrations", "torchvision._autograd_registrations")

if FOLDER and "torchvision" not in sys.modules:
    sys.path.append(FOLDER)
    for name in REGISTRATIONS if version("torch").endswith("+cpu") else ():
        sys.modules[name] = ModuleType(name)
