"""Importing the package is cheap, and its classes are known to the Auto classes whichever is imported first."""

import subprocess
import sys

import pytest

import hf_inti
from forks import run_in_a_fork
from hf_inti import InTIClipForVideoClassification, InTIClipVideoProcessor


HEAVY = ["transformers.modeling_utils", "datasets", "av", "matplotlib", "kornia", "gradio", "evaluate", "accelerate"]
LOAD = """
model = AutoModelForVideoClassification.from_pretrained(folder)
assert type(model).__module__ == "hf_inti.model.modeling_inti_clip"
"""


def run(code: str, *arguments) -> None:
    status, _, error = run_in_a_fork(code, *map(str, arguments))
    assert status == 0, error


def run_in_a_process(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_heavy_is_imported_before_it_is_used():
    code = f"import sys, hf_inti, hf_inti.hosts\nfound = [name for name in {HEAVY} if name in sys.modules]\n"
    run_in_a_process(code + "assert not found, found")


def test_only_what_decodes_imports_pyav():
    code = "import sys; from hf_inti import InTIClipForVideoClassification, InTIClipVideoProcessor\n"
    rest = [name for name in HEAVY if name not in ("transformers.modeling_utils", "accelerate")]
    run_in_a_process(code + f"found = [name for name in {rest} if name in sys.modules]\nassert not found, found")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    from conftest import TINY
    from hf_inti import InTIClipVisionConfig

    folder = tmp_path_factory.mktemp("saved")
    InTIClipForVideoClassification(InTIClipVisionConfig(**TINY, num_frames=8)).save_pretrained(folder)
    InTIClipVideoProcessor(num_frames=8).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import hf_inti; from transformers import AutoModelForVideoClassification",
        "from transformers import AutoModelForVideoClassification; import hf_inti",
        "from transformers import AutoConfig, CLIPVisionModel; import hf_inti; "
        "from transformers import AutoModelForVideoClassification",
        "import hf_inti; from transformers import CLIPVisionModel, pipeline, AutoModelForVideoClassification",
        "from hf_inti.model import modeling_inti_clip; from transformers import AutoModelForVideoClassification",
    ],
)
def test_loads_without_a_trust_flag_in_any_order_of_imports(imports, saved):
    run(f"import sys; folder = sys.argv[1]; {imports}{LOAD}", saved)


@pytest.mark.slow
@pytest.mark.parametrize(
    "auto, wanted",
    [
        ("transformers.AutoConfig", "InTIClipVisionConfig"),
        ("transformers.AutoModel", "InTIClipVisionModel"),
        ("transformers.AutoProcessor", "InTIClipVideoProcessor"),
        ("transformers.models.auto.video_processing_auto.AutoVideoProcessor", "InTIClipVideoProcessor"),
    ],
)
def test_every_auto_class(auto, wanted, saved):
    module, name = auto.rsplit(".", 1)
    code = f"import sys, hf_inti; from {module} import {name}; x = {name}.from_pretrained(sys.argv[1])"
    run(f"{code}; assert type(x).__module__.startswith('hf_inti.') and type(x).__name__ == '{wanted}', type(x)", saved)


@pytest.mark.slow
def test_several_threads_may_be_the_first(saved):
    code = """
import sys, hf_inti
from concurrent.futures import ThreadPoolExecutor
from transformers import AutoConfig
with ThreadPoolExecutor(4) as pool:
    found = list(pool.map(AutoConfig.from_pretrained, [sys.argv[1]] * 8))
assert {type(config).__name__ for config in found} == {"InTIClipVisionConfig"}
"""
    run(code, saved)


@pytest.mark.slow
def test_a_configuration_alone_makes_a_model(saved):
    code = "import sys; from hf_inti.model.configuration_inti_clip import InTIClipVisionConfig"
    code += "; from transformers import AutoModel; config = InTIClipVisionConfig.from_pretrained(sys.argv[1])"
    run(f"{code}; AutoModel.from_config(config)", saved)


def test_public_names():
    assert set(hf_inti.__all__) <= set(dir(hf_inti))
    for name in hf_inti.__all__:
        assert getattr(hf_inti, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'InTI'"):
        hf_inti.InTI  # noqa: B018
