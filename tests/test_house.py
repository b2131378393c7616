"""The rooms: what is uploaded, which way imports point, and that a wheel holds all that it needs."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_inti import InTIClipForVideoClassification, InTIClipVideoProcessor


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_inti"
MODEL = {path.name for path in (PACKAGE / "model").glob("*.py")} - {"__init__.py"}
UPLOADED_IMPORTS = {"torch", "transformers", "huggingface_hub", "safetensors", *sys.stdlib_module_names}
# Each room may import from those before it.
ROOMS = ["model", "papers", "hosts", "data", "measure", "training", "comparison", "hub", "bulk", "benchmarks"]


def imports(path: Path) -> list[tuple[str, ast.stmt]]:
    """The modules that a file imports, absolute, with the statements."""
    found = []
    package = path.relative_to(ROOT).with_suffix("").parts
    package = package[:-1]  # of a module, and of a package's __init__
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join([*start, *filter(None, [node.module])])
            found.append((name, node))
            found += [(f"{name}.{alias.name}", node) for alias in node.names]
    return found


def graph() -> dict[str, set[str]]:
    """Which modules of the package each of them imports, wherever in the file."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    found = {}
    for name, path in modules.items():
        others = {other for other, _ in imports(path)}
        found[name] = (others | {f"{other}.__init__" for other in others}) & modules.keys()
    return found


def test_model_is_what_is_uploaded(tiny_config, tmp_path):
    InTIClipForVideoClassification(tiny_config()).save_pretrained(tmp_path)
    InTIClipVideoProcessor().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == MODEL


@pytest.mark.parametrize("name", sorted(MODEL))
def test_model_imports_nothing_from_outside(name):
    path = PACKAGE / "model" / name
    guarded = {
        inner
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Try)
        for inner in ast.walk(node)
        if isinstance(inner, (ast.Import, ast.ImportFrom))
    }
    guarded = {(node.lineno, node.col_offset) for node in guarded}
    for module, node in imports(path):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module and "." not in node.module, ast.unparse(node)
            assert f"{node.module}.py" in MODEL
        else:
            allowed = module.partition(".")[0] in UPLOADED_IMPORTS or (node.lineno, node.col_offset) in guarded
            assert allowed, ast.unparse(node)


def test_imports_have_no_cycle():
    edges = graph()
    while edges:
        leaves = {name for name, others in edges.items() if not others & (edges.keys() - {name})}
        assert leaves, f"a cycle among {sorted(edges)}"
        edges = {name: others for name, others in edges.items() if name not in leaves}


def test_arrows_between_rooms_point_one_way():
    for name, others in graph().items():
        room = name.split(".")[1] if name.count(".") > 1 else None
        for other in others:
            below = other.split(".")[1] if other.count(".") > 1 else None
            if room is not None and below is not None:
                assert ROOMS.index(below) <= ROOMS.index(room), f"{name} imports {other}"


def test_the_drawing_is_true():
    """CONTRIBUTING.md draws the imports between rooms, less those that follow from others."""
    edges = set()
    for name, others in graph().items():
        rooms = {other.split(".")[1] for other in others if other.count(".") > 1}
        if name.count(".") > 1:
            edges |= {(name.split(".")[1], room) for room in rooms - {name.split(".")[1]}}
    below = {room: {b for a, b in edges if a == room} for room in ROOMS}
    for room in ROOMS:  # from the bottom up, so that those below are complete
        below[room] |= {far for near in below[room] for far in below[near]}
    direct = {(a, b) for a, b in edges if not any(b in below[c] for c in below[a])}
    drawn = set(re.findall(r"(\w+) --> (\w+)", (ROOT / "CONTRIBUTING.md").read_text()))
    assert drawn == direct


def test_every_room_is_in_the_list():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(ROOMS)


FROM_WHEEL = """
import sys
from pathlib import Path
import torch
import hf_inti
assert Path(hf_inti.__file__).is_relative_to(sys.argv[1]), hf_inti.__file__
from accelerate import Accelerator
from transformers import pipeline
from hf_inti import InTIClipForVideoClassification, InTIClipVideoProcessor, InTIClipVisionConfig
from hf_inti.hub.card import metadata_of_run, render_card
from hf_inti.hub.push import push_model

torch.manual_seed(0)
config = InTIClipVisionConfig(hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
                              image_size=32, patch_size=8, num_frames=8, num_labels=3)
accelerator = Accelerator(cpu=True)
model = InTIClipForVideoClassification(config)
model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
before = model.classifier.weight.clone()
loss = model(torch.randn(2, 8, 3, 32, 32), labels=torch.tensor([0, 1])).loss
accelerator.backward(loss)
optimizer.step()
assert not torch.equal(model.classifier.weight, before)
model.save_pretrained("trained")
size = {"height": 32, "width": 32}
InTIClipVideoProcessor(num_frames=8, size={"shortest_edge": 32}, crop_size=size).save_pretrained("trained")
card = render_card(metadata_of_run("trained"), "trained", "me/inti-mine")
assert "InTI" in card.text and "@article{zhang2024inti" in card.text
push_model(Path("trained"), "me/inti-mine")
answers = pipeline("video-classification", model="me/inti-mine")(sys.argv[2])
assert len(answers) == 3
"""


@pytest.mark.slow
def test_a_wheel_stands_alone(tmp_path):
    """Built, installed elsewhere and used where the repository cannot be seen."""
    from hub_server import HubServer

    from conftest import write_video

    source = tmp_path / "source"  # a copy: setuptools leaves build/ behind and would pack old files from it
    shutil.copytree(PACKAGE, source / "hf_inti", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*install, "--target", site, source], check=True, cwd=tmp_path)  # which builds a wheel first
    assert (site / "hf_inti" / "hub" / "template.md").exists()
    write_video(tmp_path / "clip.mp4")
    server = HubServer()
    try:
        environment = server.environment(tmp_path / "home", PYTHONPATH=str(site))
        command = [sys.executable, "-c", FROM_WHEEL, str(site), str(tmp_path / "clip.mp4")]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    finally:
        server.close()
    assert done.returncode == 0, done.stderr
