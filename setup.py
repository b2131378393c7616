import re
from pathlib import Path

from setuptools import find_packages, setup


HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "hf_inti" / "__init__.py").read_text())[1]
TRAIN = ["kornia>=0.9", "matplotlib>=3.9", "pyyaml>=6", "scikit-learn>=1.6"]
DEMO = ["gradio>=6.31,<7", "matplotlib>=3.9", "pillow>=12", "pyyaml>=6"]
BULK = ["filelock>=3.20.3", "ray[data]>=2.60"]
EXPORT = ["onnx>=1.23", "onnxruntime>=1.31", "onnxscript>=0.7"]

setup(
    name="hf_inti",
    version=VERSION,
    description="InTI, inter-frame token interpolation: CLIP on video at two thirds of the cost, for transformers",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["hf_inti", "hf_inti.*"]),
    package_data={"hf_inti.hub": ["template.md"]},
    python_requires=">=3.11",
    # Lower bounds: what the package is known to need, without the holes in SECURITY.md's table; constraints.txt has
    # what it was last tested with.
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17",
        "huggingface_hub>=1.29",
        "safetensors>=0.6",
        "accelerate>=1.10",
        "datasets>=5.2",
        "evaluate>=0.4.6",
        "av>=18.1",
    ],
    extras_require={
        "train": TRAIN,
        "demo": DEMO,
        "bulk": BULK,
        "export": EXPORT,
        "hosts": ["torchvision>=0.26"],
        "mutants": ["cosmic-ray>=8.7", "pytest-cov>=7"],
        "test": [
            *TRAIN,
            *BULK,
            *DEMO,
            *EXPORT,
            "peft>=0.21",
            "pytest>=9.0.3",
            "pytest-xdist>=3.8",
            "ruff>=0.15",
            "selenium>=4.40",
        ],
    },
)
