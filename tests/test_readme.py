"""The pages are true: their Python runs, their commands and flags exist, their paths and links lead somewhere."""

import contextlib
import inspect
import io
import json
import re
import runpy
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, VideoMAEConfig, VideoMAEForVideoClassification

from conftest import TINY, write_video
from hf_inti import InTIClipForVideoClassification, InTIClipVideoProcessor, InTIClipVisionConfig
from hf_inti.bulk.model import Result
from hf_inti.bulk.shards import Shards
from hf_inti.measure.costs import count_costs
from hf_inti.model.adaptation import ADAPTATIONS
from hf_inti.model.compression import COMPRESSIONS
from hf_inti.papers.published import TABLES, TOWERS
from torchvision_models import load


ROOT = Path(__file__).parent.parent
PAGES = {
    path.name: path.read_text() for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"))
}
README = PAGES["README.md"]
CLIP = "openai/clip-vit-base-patch16"
WITH_COMMANDS = [
    "README.md",
    "benchmarks.md",
    "bulk.md",
    "hub.md",
    "inference.md",
    "methods.md",
    "results.md",
    "training.md",
]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """Words of every command in sh blocks, and of those that begin `python ...` or `train.py ...` in the text."""
    shell = "\n".join(blocks(page, "sh")).replace("\\\n", " ")
    lines = shell.splitlines() + re.findall(r"`(python [^`]+|\w+\.py [^`]+)`", PAGES[page])
    return [line.partition(" #")[0].split() for line in lines]


def script_of(words: list[str]) -> tuple[str, ...] | None:
    """The script that a command runs, with its subcommand, or None."""
    for i, word in enumerate(words):
        name = word.removeprefix("scripts/")
        if (ROOT / "scripts" / name).is_file() and name.endswith(".py"):
            return (name, words[i + 1]) if name in ("benchmark.py", "compare.py") else (name,)
    return None


def flags_of(script: tuple[str, ...], cache: dict = {}) -> set[str]:  # noqa: B006
    """The flags that a script's --help lists."""
    if script not in cache:
        printed, argv, path = io.StringIO(), sys.argv, list(sys.path)
        sys.argv = [*script, "--help"]
        sys.path.append(str(ROOT / "scripts"))  # last: scripts/evaluate.py must not hide the library of that name
        try:
            with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
                runpy.run_path(str(ROOT / "scripts" / script[0]), run_name="__main__")
        finally:
            sys.argv, sys.path = argv, path
        cache[script] = set(re.findall(r"--[\w-]+", printed.getvalue()))
        if script == ("compare.py", "methods"):  # hands what it does not know to train.py
            cache[script] |= flags_of(("train.py",))
    return cache[script]


@pytest.fixture
def places(tmp_path, monkeypatch) -> Path:
    """A working directory where the pages' names stand for small models and videos."""
    monkeypatch.chdir(tmp_path)
    precision = torch.get_float32_matmul_precision()
    tower = {**TINY, "num_hidden_layers": 7, "image_size": 224, "patch_size": 56}
    CLIPVisionModel(CLIPVisionConfig(**tower)).save_pretrained(CLIP)
    VideoMAEForVideoClassification(
        VideoMAEConfig(
            hidden_size=12,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=12,
            image_size=112,
            patch_size=8,
        )
    ).save_pretrained("MCG-NJU/videomae-base-finetuned-kinetics")
    config = InTIClipVisionConfig(**tower, num_frames=16, num_labels=4)
    for folder in ("outputs/mine/best", "me/inti-clip-mine"):
        InTIClipForVideoClassification(config).save_pretrained(folder)
        InTIClipVideoProcessor(num_frames=16).save_pretrained(folder)
    write_video(tmp_path / "clip.mp4")
    for i in range(8):
        write_video(tmp_path / "my_videos" / f"class_{i % 2}" / f"{i}.mp4", seed=i)
    yield tmp_path
    torch.set_float32_matmul_precision(precision)


def run(page: str, wanted=lambda block: True) -> dict:
    """The page's Python blocks in their order, in one namespace."""
    names: dict = {}
    for block in filter(wanted, blocks(page, "python")):
        exec(block, names)
    return names


def test_every_page_with_python_is_run():
    with_python = {page for page in PAGES if blocks(page, "python")}
    assert with_python == {"README.md", "methods.md", "inference.md", "training.md", "hub.md", "bulk.md"}


def test_readme_python(places, capsys):
    names = run("README.md")
    printed = capsys.readouterr().out.splitlines()
    expected = re.findall(r"print\(.*\)  # (?:frames: )?(.*)", blocks("README.md", "python")[0])
    assert printed == expected and len(expected) == 2
    assert names["model"].config.hidden_size == TINY["hidden_size"]  # the second block's: CLIP's


def test_methods_python(places):
    names = run("methods.md", lambda block: "torchvision" not in block)
    assert (places / "adapters").is_dir()
    assert names["model"].config.adaptation_options["merged"]
    assert not names["videomae"].videomae.encoder.layer[0]._forward_hooks


def test_methods_python_on_torchvision():
    load()
    names = run("methods.md", lambda block: "torchvision" in block)
    sigmas = [selection.topk.sigma.item() for selection in names["mvit"].compression.temporal]
    assert sigmas == pytest.approx([0.05])


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own
def test_inference_python(places, capsys):
    names = run("inference.md")
    assert names["pixel_values"].shape == (12, 16, 3, 224, 224) and names["scores"].shape == (4,)
    label, best = capsys.readouterr().out.splitlines()
    assert label in names["model"].config.label2id and best.count("'label'") == 3


def test_bulk_python(places, capsys):
    """The nearest of five videos, one of them broken, are those at the smallest angles."""
    features = torch.nn.functional.one_hot(torch.arange(4), 4).float()
    features[:, 0] += torch.tensor([0, 1, 3, 2])
    rows = [{"video": str(i), "error": None, "features": (row * (1 + i)).tolist()} for i, row in enumerate(features)]
    schema = Result("features", 4).schema()
    with Shards("features", schema, {}, 2) as shards:
        for row in [*rows, {"video": "broken", "error": "bad", "features": None}]:
            shards.add(pa.Table.from_pylist([row], schema=schema))
    run("bulk.md")
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert printed == [["0.949", "2"], ["0.894", "3"], ["0.707", "1"]]


@pytest.mark.slow
def test_trainer_script(places):
    (script,) = blocks("training.md", "python")
    names: dict = {}
    exec(script.replace("learning_rate=2e-5", "learning_rate=2e-5, max_steps=2, use_cpu=True"), names)
    assert names["trainer"].state.global_step == 2
    assert (places / "outputs" / "trainer" / "model.safetensors").exists()
    assert torch.isfinite(torch.tensor(names["trainer"].state.log_history[-1]["train_loss"]))


@pytest.mark.slow
def test_hub_python(places, capsys):
    names = run("hub.md")
    assert names["model"].config.num_labels == 4
    assert names["tower"].config.hidden_size == TINY["hidden_size"]
    assert capsys.readouterr().out.count("'label'") == 3


@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_flags_of_commands_exist(page):
    checked = 0
    for words in commands(page):
        script = script_of(words)
        for flag in (word.partition("=")[0] for word in words if script and word.startswith("--")):
            if flag not in ("--num_processes", "--nnodes", "--nproc_per_node", "--config_file"):  # of the launchers
                assert flag in flags_of(script), f"{page}: {' '.join(script)} has no {flag}"
            checked += 1
    assert checked


def test_flags_in_text_exist():
    known = set().union(
        *(flags_of((script.name,)) for script in ROOT.glob("scripts/*.py") if "arguments" in script.read_text()),
        *(
            flags_of(("benchmark.py", name))
            for name in ("models", "decoding", "prediction", "bulk", "export", "growth")
        ),
        flags_of(("compare.py", "methods")),
        ("--help", "--num_processes", "--nnodes", "--cpu", "--config_file"),  # all but the first of the launchers
    )
    for page, text in PAGES.items():
        for code in re.findall(r"`([^`\n]+)`", text):
            assert set(re.findall(r"(?<!\S)--[\w-]+", code)) <= known, f"{page}: `{code}`"


def test_targets_of_make_exist():
    known = set(re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split())
    for page, text in PAGES.items():
        assert set(re.findall(r"(?:^|`)make (\w+)", text, re.MULTILINE)) <= known, page


@pytest.mark.parametrize("page", sorted(PAGES))
def test_links_and_paths_lead_somewhere(page):
    folder = ROOT if (ROOT / page).exists() else ROOT / "docs"
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        if not target.startswith("http"):
            file, _, anchor = target.partition("#")
            path = folder / file if file else folder / page
            assert path.exists(), f"{page}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)", path.read_text(), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, target
    for words in commands(page):
        for word in words:
            if word.startswith(("scripts/", "tests/")):
                assert (ROOT / word).exists(), f"{page}: {word}"
    # `results/` is written by benchmarks; the test of its tables looks there.
    for path in re.findall(r"`((?:hf_inti|scripts|tests|docs|model_cards)/[\w./-]*)`", PAGES[page]):
        assert (ROOT / path).exists(), f"{page}: {path}"


@pytest.mark.parametrize("word, methods", [("compression", COMPRESSIONS), ("adaptation", ADAPTATIONS)])
def test_tables_of_methods_name_all_options(word, methods):
    (table,) = re.findall(rf"^\| `{word}` \|.*\n(?:\|.*\n)+", PAGES["methods.md"], re.MULTILINE)
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    column = header.index(f"`{word}_options`")
    named = {row[0].strip('`"'): set(re.findall(r"`(\w+)`", row[column])) for row in rows}
    for name, method in methods.items():
        parameters = inspect.signature(method).parameters.values()
        assert named.pop(name) == {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}, name
    assert not named


def test_map_names_every_room():
    rooms = {path.parent.name for path in ROOT.glob("hf_inti/*/__init__.py")}
    (tree,) = re.findall(r"```\n(hf_inti/.*?)```", README, re.DOTALL)
    named = set(re.findall(r"^  (\w+)/", tree, re.MULTILINE))
    assert named == rooms
    for pattern in re.findall(r"^    ((?:[\w{},*.]+\.py(?:, )?)+)", tree, re.MULTILINE):
        for name in re.split(r", (?![^{]*})", pattern):
            for choice in re.search(r"{(.*)}", name)[1].split(",") if "{" in name else [""]:
                assert list((ROOT / "hf_inti/model").glob(re.sub("{.*}", choice, name))), name


def test_idea_is_what_its_script_draws():
    drawn = runpy.run_path(str(ROOT / "docs" / "draw_idea.py"))["draw"]()
    assert (ROOT / "docs" / "idea.svg").read_text() == drawn


def test_table_of_costs():
    """The paper's figures are those of its Table 1, and ours are counted."""
    published = {(row.tower[0], row.gflops): row for row in TABLES[0].rows if "temp" not in row.model}
    form = r"^\| +(?:CLIP ViT|InTI)-([BL])[^|]*\|([^|]*)\| +(\d+) \| +([\d.]+) \| +([\d.]*) *\| +([\d.]+) \|$"
    rows = re.findall(form, README, re.MULTILINE)
    assert len(rows) == len(published) == 8
    for size, layers, gflops, ours, dwconv, top1 in rows:
        row = published.pop((size, int(gflops)))
        assert row.top1 == (float(top1),) and (row.model == "Naive") == (not layers.strip())
        options = {"compression": "none"}
        for cube, figure in (("local_mhra", ours), ("dwconv", dwconv)):
            if layers.strip():
                positions = [int(i) for i in layers.split(",")]
                options = {"compression_layers": positions, "compression_options": {"cube": cube}}
            if figure:
                config = InTIClipVisionConfig(**TOWERS[row.tower], **options, num_labels=400)
                assert f"{count_costs(config)['total'].gmacs:.1f}" == figure, (size, layers, cube)


def ratio(folder: str, field: str, contestant: str = "inti") -> float:
    rows = json.loads((ROOT / "results" / "benchmarks" / folder / "benchmark.json").read_text())["rows"]
    return rows[contestant][field] / rows["naive"][field]


RATIOS = re.findall(r"^\| ([\w ,-]+?) +\| ([\d.]+) \| ([\d.]+) \| `(\w+)/` \|$", PAGES["benchmarks.md"], re.MULTILINE)


def test_ratios_are_found():
    assert len(RATIOS) == 10


@pytest.mark.parametrize("what, inti, dwconv, folder", RATIOS, ids=[f"{row[3]}: {row[0]}" for row in RATIOS])
def test_ratios_are_those_of_their_results(what, inti, dwconv, folder):
    fields = {"multiply-adds": "gmacs", "activation memory of that step": "activation_memory_bytes"}
    field = fields.get(what, "seconds")
    assert [f"{ratio(folder, field, name):.3f}" for name in ("inti", "inti_dwconv")] == [inti, dwconv]


def test_speed_in_the_readme_is_measured():
    words = " ".join(README.split())
    (found,) = re.findall(
        r"takes ([\d.]+) of Naive's time \((\d+) against (\d+) ms.*? for ([\d.]+) .*? in ([\d.]+)\.", words
    )
    rows = json.loads((ROOT / "results" / "benchmarks" / "limit" / "benchmark.json").read_text())["rows"]
    assert found == (
        f"{ratio('limit', 'seconds'):.2f}",
        *(f"{1e3 * rows[name]['seconds']:.0f}" for name in ("inti", "naive")),
        f"{ratio('limit', 'gmacs'):.2f}",
        f"{ratio('training_b16', 'seconds'):.2f}",
    )


ACCURACIES = re.findall(r"^\| (spoken phrases|the same|rendered clips|five clips)[^|]*\|(.*)\|$", README, re.MULTILINE)
STUDIES = {"spoken phrases": "real", "the same": "speakers_60", "rendered clips": "order", "five clips": "stills_5"}


def test_accuracies_are_found():
    assert [name for name, _ in ACCURACIES] == list(STUDIES)


@pytest.mark.parametrize(("name", "cells"), ACCURACIES)
def test_accuracies_and_costs_are_those_of_the_study(name, cells):
    rows = json.loads((ROOT / "results" / "study" / STUDIES[name] / "comparison.json").read_text())["rows"]
    rows = {row["method"]: row for row in rows}
    methods = ["Naive", "ConvPooling", "InTI", "InTI+UniFormerV2"]
    (head,) = re.findall(r"^\| top-1 % +\|(.*)\|$", README, re.MULTILINE)
    assert [cell.strip() for cell in head.split("|")] == methods
    assert [cell.strip() for cell in cells.split("|")] == [f"{100 * rows[method]['top1']:.1f}" for method in methods]
    (shares,) = re.findall(r"^\| share of Naive's multiply-adds +\|(.*)\|$", README, re.MULTILINE)
    naive = rows["Naive"]["gmacs"]
    wanted = [f"{rows[method]['gmacs'] / naive:.0%}" for method in methods]
    assert [cell.replace(" ", "") for cell in shares.split("|")] == wanted
    ridge = "Ridge, frame features" if name == "five clips" else "Ridge, pixels"
    assert f"{100 * rows[ridge]['top1']:.1f} from the" in " ".join(README.split())
