"""Model cards: all of them render, claim nothing that was not measured, and refuse what does not fit together."""

import json
import re
import runpy
import sys
from pathlib import Path

import datasets
import huggingface_hub
import jinja2.meta
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from huggingface_hub import ModelCard, ModelCardData, parse_eval_result_entries
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel

from conftest import TINY, write_video
from hf_inti import InTIClipForVideoClassification, InTIClipVideoProcessor, InTIClipVisionConfig
from hf_inti.hub.card import draw_figure, load_metadata, metadata_of_run, render_card, write_eval_results
from hf_inti.hub.metadata import CARDS, check_recipe, fingerprint
from hf_inti.measure.costs import count_costs
from hf_inti.papers.published import TOWERS
from hf_inti.training.arguments import DataArguments, ModelArguments, TrainingArguments
from hf_inti.training.cli import parse_recipe


ROOT = Path(__file__).parents[1]
# name: recipe, classes, our count (GMACs, M), the count of CLIP on every frame, the paper's line
EXPECTED = {
    "inti-clip-vitb-k400": ("k400_inti_b16", 400, "182.2 | 95.3", "281.0 | 86.1", "84.1 top-1 at 182 GFLOPs,"),
    "inti-clip-vitl-k400": ("k400_inti_l14", 400, "811.2 | 319.8", "1296.2 | 303.6", "87.1 top-1 at 811 GFLOPs,"),
    "inti-clip-vitb-ssv2": ("ssv2_inti_b16", 174, "182.2 | 95.1", "281.0 | 85.9", None),
    "inti-temp-clip-vitb-k400": (
        *("k400_inti_temp_b16", 400, "186.1 | 123.7", "281.0 | 86.1"),
        "84.9 top-1 at 184 GFLOPs, 126 M parameters",
    ),
    "inti-temp-clip-vitl-k400": (
        *("k400_inti_temp_l14", 400, "820.0 | 370.3", "1296.2 | 303.6"),
        "87.6 top-1 at 817 GFLOPs, 378 M parameters",
    ),
    "inti-temp-clip-vitb-ssv2": (
        *("ssv2_inti_temp_b16", 174, "227.6 | 171.0", "281.0 | 85.9"),
        "69.3 top-1 at 234 GFLOPs, 174 M parameters",
    ),
}
VITB = "inti-clip-vitb-k400"


def claims(text: str) -> list[str]:
    """Lines that tell an accuracy: percentages, top-1, top-5, metrics of the metadata."""
    return [line for line in text.splitlines() if re.search(r"\d\s?%|top-?[15]\b|model-index|^ *value:", line)]


def recipe_of(name: str) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    path = ROOT / "scripts" / "recipes" / f"{EXPECTED[name][0]}.yaml"
    return parse_recipe([ModelArguments, DataArguments, TrainingArguments], [str(path), "--train_dir", "videos"])


def save_parts(name: str, folder: Path, **changes) -> Path:
    """Configuration and processor as the recipe makes them, without weights."""
    model, data, _ = recipe_of(name)
    tower = TOWERS["L/14" if "large" in model.model else "B/16"]
    options = {**tower, **model.config_options(), "num_labels": EXPECTED[name][1], **changes}
    InTIClipVisionConfig(**options).save_pretrained(folder)
    InTIClipVideoProcessor(image_mean=data.image_mean, image_std=data.image_std).save_pretrained(folder)
    return folder


def write_run(name: str, folder: Path, **changes) -> None:
    groups = {type(group).__name__: {**vars(group)} for group in recipe_of(name)}
    for group in groups.values():
        group.update({key: value for key, value in changes.items() if key in group})
    command = ["/home/ann/scripts/train.py", "k400.yaml", "--train_dir=/data/ann/k400", "--video_root", "../ann/clips"]
    versions = {"torch": "2.13.0", "transformers": "5.23.0"}
    run = {"command": command, "arguments": groups, "versions": versions, "commit": None, "num_processes": 8}
    (folder / "run.json").write_text(json.dumps(run))


# Cards of the listed checkpoints ------------------------------------------------------------------


@pytest.fixture(scope="module", params=EXPECTED)
def listed(request, tmp_path_factory) -> tuple[str, ModelCard]:
    """Name and card of each listed checkpoint."""
    folder = save_parts(request.param, tmp_path_factory.mktemp("model"))
    return request.param, render_card(load_metadata(request.param), folder, f"me/{request.param}")


def test_the_listed_checkpoints_have_metadata():
    assert {path.stem for path in CARDS.glob("*.yaml")} == set(EXPECTED)


def test_card_without_results_claims_nothing(listed):
    name, card = listed
    recipe, num_labels, counted, naive, paper = EXPECTED[name]
    told = claims(str(card))
    assert len(told) == (paper is not None)
    for line in told:
        assert "the figures of the paper (Zhang et al., 2024, Table" in line and "not of this one" in line
        assert paper in line
    assert "**Not yet trained.**" in card.text and "Results of this checkpoint: none yet." in card.text
    assert "Speed: not measured." in card.text and "clips per second" not in card.text
    assert f"| this model | {counted} |" in card.text
    assert f"| CLIP on every frame, mean of the class tokens | {naive} |" in card.text
    assert f"scripts/train.py scripts/recipes/{recipe}.yaml" in card.text and "16x3x4 views of each video" in card.text
    assert f"with {num_labels} classes" in card.text and "## Limits and biases" in card.text
    assert "(figure.png)" in card.text and "Copyright (c) 2021 OpenAI" in card.text
    assert ("UniFormerV2's local and global modules" in card.text) == ("temp" in name)
    assert not re.search(r"{{|{%|None|\bnull\b|Undefined|\n\n\n", card.text)


def test_metadata_is_what_the_hub_reads(listed, tmp_path):
    name, card = listed
    card.save(tmp_path / "README.md")
    read = ModelCard.load(tmp_path / "README.md")
    assert read.data.to_dict() == card.data.to_dict() == ModelCardData(**yaml.safe_load(read.data.to_yaml())).to_dict()
    assert read.text == card.text and read.data.eval_results is None
    dataset = "AlexFierro9/Kinetics400" if "k400" in name else "HuggingFaceM4/something_something_v2"
    assert read.data.to_dict() == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "video-classification",
        "base_model": f"openai/clip-vit-{'large-patch14' if 'vitl' in name else 'base-patch16'}",
        "base_model_relation": "finetune",
        "datasets": [dataset],
        "metrics": ["accuracy"],
        "tags": ["clip", "inti", "action-recognition", "arxiv:2408.06840"],
        "widget": [
            {"src": f"https://huggingface.co/me/{name}/resolve/main/example.mp4", "example_title": "Example clip"}
        ],
    }


def test_template_names_nothing_that_it_is_not_given(tmp_path, monkeypatch):
    given = []

    def from_template(data, template_str, **values):
        given.extend([*data.to_dict(), *values, "card_data"])
        return template_str

    monkeypatch.setattr(ModelCard, "from_template", from_template)
    template = render_card(load_metadata(VITB), save_parts(VITB, tmp_path), f"me/{VITB}")
    named = jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(template))
    assert {"config", "results", "speed"} < named <= set(given)


def test_citation_is_the_papers(listed):
    bibtex = listed[1].text.split("```bibtex\n")[1].split("```")[0]
    assert bibtex.startswith("@article{") and bibtex.endswith("}\n") and bibtex.count("{") == bibtex.count("}") == 6
    assert "author = {Zhang, Guozhen and Liu, Jingyu and" in bibtex and "journal = {arXiv:2408.06840}" in bibtex
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    for author in paper["authors"]:
        assert f"{author['family-names']}, {author['given-names']}" in bibtex
    for name in ("title", "journal", "year", "url"):
        assert f"  {name} = {{{paper[name]}}},\n" in bibtex


# What does not fit together -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("method", "compression", "tome", "compression of .* must be 'tome'.* as in the metadata, got 'inti'"),
        (
            "method",
            "compression_layers",
            [7, 9],
            r"compression_layers of .* must be \[7, 9\].* as in the metadata, got \[5, 7\]",
        ),
        (
            "method",
            "compression_options",
            {"cube": "dwconv"},
            "compression_options of .* must be {'cube'.* as in the metadata, got {}",
        ),
        ("method", "adaptation", "aim", "adaptation of .* must be 'aim'.* as in the metadata, got 'none'"),
        ("method", "num_frames", 8, "num_frames of .* must be 8.* as in the metadata, got 16"),
        ("dataset", "num_labels", 600, "num_labels of .* must be 600.* as in the metadata, got 400"),
        (None, "tower", "L/14", "hidden_size of .* must be 1024, as in tower L/14, got 768"),
        (None, "tower", "H/14", "tower in the metadata must be B/16, L/14 or null, got 'H/14'"),
        (None, "recipe", "k400_inti_temp_b16.yaml", "must be 'uniformerv2', as in k400_inti_temp_b16.yaml, got 'none'"),
        (None, "recipe", "ssv2_inti_b16.yaml", "drop_path_rate .* must be 0.2, as in ssv2_inti_b16.yaml, got 0.0"),
        (None, "recipe", "k400.yaml", "must be a recipe .*got .*k400.yaml"),
        (
            None,
            "base_model",
            "openai/clip-vit-large-patch14",
            "as in base_model of the metadata, got 'openai/clip-vit-base-patch16'",
        ),
        ("published", "model", "InTI 7,9", "must name a row .* with this model's costs, got 'InTI 7,9', B/16"),
        ("published", "table", "Table 9", "got 'InTI 5,7', B/16 in 'Table 9' on k400"),
        (
            "published",
            "table",
            "Table 3, Something-Something v2",
            "must name a row .* in 'Table 3, Something-Something v2' on k400",
        ),
        (None, "licence", "mit", "the keys of the metadata must be title, .*, got 'licence'"),
        ("dataset", "sise", 3, "the keys of dataset in the metadata must be name, .*, got 'sise'"),
        (None, "method", None, "method in the metadata must hold num_frames, .* got null"),
        (None, "protocol", "16x3x4", "protocol in the metadata must hold frames, crops, clips, got '16x3x4'"),
    ],
)
def test_metadata_that_is_not_of_the_model(part, key, value, message, tmp_path):
    metadata = load_metadata(VITB)
    (metadata[part] if part else metadata)[key] = value
    with pytest.raises(ValueError, match=message):
        render_card(metadata, save_parts(VITB, tmp_path), f"me/{VITB}")


@pytest.mark.parametrize("part", [None, "dataset", "method", "published", "protocol"])
def test_every_key_must_be_there(part, tmp_path):
    folder = save_parts(VITB, tmp_path)
    for key in load_metadata(VITB)[part] if part else load_metadata(VITB):
        metadata = load_metadata(VITB)
        del (metadata[part] if part else metadata)[key]
        with pytest.raises(ValueError, match=f"must have the key '{key}', got none"):
            render_card(metadata, folder, f"me/{VITB}")


def test_model_and_processor_that_are_not_of_the_recipe(tmp_path):
    metadata = load_metadata(VITB)
    with pytest.raises(ValueError, match="classifier_dropout of .* must be 0.0, as in k400_inti_b16.yaml, got 0.5"):
        render_card(metadata, save_parts(VITB, tmp_path, classifier_dropout=0.5), f"me/{VITB}")
    with pytest.raises(ValueError, match="hidden_size of .* must be 768, as in tower B/16, got 384"):
        render_card(metadata, save_parts(VITB, tmp_path, hidden_size=384), f"me/{VITB}")
    save_parts(VITB, tmp_path)
    InTIClipVideoProcessor().save_pretrained(tmp_path)  # with CLIP's mean, not the recipe's
    with pytest.raises(ValueError, match="image_mean of the processor in .* must be "):
        render_card(metadata, tmp_path, f"me/{VITB}")
    InTIClipVideoProcessor(num_frames=8).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_frames of the processor in .* must be 16, as in the model, got 8"):
        render_card(metadata, tmp_path, f"me/{VITB}")


def save_model(folder: Path, options: dict, **processor) -> InTIClipVisionConfig:
    """Save a tiny configuration and its processor; returns the former."""
    config = InTIClipVisionConfig(**TINY, **options)
    config.save_pretrained(folder)
    InTIClipVideoProcessor(num_frames=config.num_frames, **processor).save_pretrained(folder)
    return config


def test_recipe_that_starts_from_an_inti_clip_checkpoint(tmp_path):
    """What the recipe leaves unset stays as in the checkpoint, not as in the classes."""
    kept = {
        "num_frames": 8,
        "compression": "conv_pooling",
        "compression_layers": [1, 2],
        "compression_options": {"kernel_size": [3, 3, 3]},
        "classifier_dropout": 0.5,
    }
    base, recipe = tmp_path / "base", tmp_path / "recipe.yaml"
    save_model(base, kept)
    recipe.write_text(f"model: {base}\noutput_dir: out\ndrop_path_rate: 0.1\nframe_stride: 4\n")

    def check(base_model=base, **changes):
        processor = {"sampling": "dense", "frame_stride": 4, "image_mean": [0.5, 0.5, 0.5]}
        processor |= {name: changes.pop(name) for name in [*changes] if name in processor}
        config = save_model(tmp_path / "model", {**kept, "drop_path_rate": 0.1, **changes}, **processor)
        check_recipe(recipe, {"base_model": str(base_model)}, config, tmp_path / "model", None)

    check()
    check(compression_options={})  # unset in the recipe
    with pytest.raises(ValueError, match="drop_path_rate of .* must be 0.1, as in recipe.yaml, got 0.2"):
        check(drop_path_rate=0.2)
    with pytest.raises(ValueError, match="frame_stride of the processor .* must be 4, as in recipe.yaml, got 2"):
        check(frame_stride=2)
    recipe.write_text(f"model: {base}\noutput_dir: out\ncompression_options: {{}}\n")
    with pytest.raises(ValueError, match="compression_options of .* must be {}, as in recipe.yaml, got {'kernel_size'"):
        check()

    clip = tmp_path / "clip"
    CLIPVisionConfig(**TINY).save_pretrained(clip)
    for model in (clip, "me/unknown"):  # from CLIP, unset settings are the classes'
        recipe.write_text(f"model: {model}\noutput_dir: out\n")
        with pytest.raises(ValueError, match="num_frames of the model in .* must be 16, as in recipe.yaml, got 8"):
            check(base_model=model)


def test_run_that_is_not_of_the_recipe(tmp_path):
    metadata = load_metadata(VITB)
    save_parts(VITB, tmp_path)
    write_run(VITB, tmp_path, seed=3, batch_size=16, train_dir="/data/ann/k400", output_dir="/home/ann/out")
    card = render_card(metadata, tmp_path, f"me/{VITB}")
    assert "**Not yet evaluated.**" in card.text and "Not yet trained" not in card.text and len(claims(str(card))) == 1
    assert "python scripts/train.py k400.yaml --train_dir=k400 --video_root clips" in card.text
    assert "ann" not in re.findall(r"\w+", card.text) and "8 processes" in card.text
    for name, value in (("max_steps", 2), ("learning_rate", 1e-4), ("flip", False), ("compression", "none")):
        write_run(VITB, tmp_path, **{name: value})
        with pytest.raises(ValueError, match=f"{name} of run.json in .*, got '?{value}'?;"):
            render_card(metadata, tmp_path, f"me/{VITB}")


def test_wrong_use(tmp_path):
    with pytest.raises(
        ValueError, match="nothing.yaml must be a file, got none; the names in model_cards/ are inti-clip-vitb-k400, "
    ):
        load_metadata("nothing")
    with pytest.raises(ValueError, match="bad.yaml must be a mapping, got a list"):
        (tmp_path / "bad.yaml").write_text("- a")
        load_metadata(tmp_path / "bad.yaml")
    with pytest.raises(ValueError, match="bad.yaml must be valid YAML, got: "):
        (tmp_path / "bad.yaml").write_text("a: [")
        load_metadata(tmp_path / "bad.yaml")
    with pytest.raises(ValueError, match="must hold an InTI-CLIP model"):
        render_card(load_metadata(VITB), tmp_path, f"me/{VITB}")
    CLIPVisionConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must hold an InTI-CLIP model"):
        render_card(load_metadata(VITB), tmp_path, f"me/{VITB}")
    save_parts(VITB, tmp_path)
    card = render_card(metadata_of_run(tmp_path), tmp_path, "me/mine")  # without a run.json
    assert "on data that this card does not name." in card.text and card.data.license == "unknown"
    with pytest.raises(ValueError, match="Repo id"):
        render_card(load_metadata(VITB), tmp_path, "a/b/c")


# A model of one's own, trained and evaluated by the scripts ----------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """last/ of a run of two steps, with the evaluation of three views beside it; the clips lie in ann/."""
    root = tmp_path_factory.mktemp("ann")
    CLIPVisionModel(CLIPVisionConfig(**TINY)).save_pretrained(root / "tower")
    for i in range(6):
        write_video(root / "clips" / "test" / ("left", "right", "up")[i % 3] / f"{i}.mp4", seed=i)
        write_video(root / "clips" / "train" / ("left", "right", "up")[i % 3] / f"{i}.mp4", seed=9 + i)
    folder, clips = root / "out" / "last", root / "clips"
    flags = ["--model", root / "tower", "--num_frames", "4", "--compression_layers", "1", "3", "--max_steps", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        patch.setattr(sys, "path", sys.path)
        train = ["train", *flags, "--batch_size", "3", "--train_dir", clips, "--output_dir", root / "out"]
        evaluate = ["evaluate", folder, "--data_dir", clips, "--num_crops", "3", "--output_dir", root / "evaluation"]
        for name, *arguments in (train, evaluate):
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            script = ROOT / "scripts" / f"{name}.py"
            patch.setattr(sys, "argv", [str(script), *map(str, arguments)])
            with pytest.raises(SystemExit) as end:
                runpy.run_path(str(script), run_name="__main__")
            assert not end.value.code
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    return folder


@pytest.fixture
def results(trained, tmp_path):
    """A function that copies the results file with changes."""
    original = json.loads((trained.parents[1] / "evaluation" / "results.json").read_text())

    def change(**changes) -> Path:
        path = tmp_path / "results.json"
        path.write_text(json.dumps({**original, **changes}))
        return path

    change.original = original
    return change


@pytest.mark.slow
def test_metadata_of_a_run_hold_no_path(trained):
    metadata = metadata_of_run(trained)
    assert metadata["dataset"]["name"] == "clips" and metadata["dataset"]["num_labels"] == 3
    assert metadata["base_model"] is None and metadata["method"]["compression_layers"] == [1, 3]
    card = render_card(metadata, trained, "me/left-or-right")
    assert "# left-or-right\n" in card.text and "**Not yet evaluated.**" in card.text and not claims(str(card))
    assert "python scripts/train.py --model tower --num_frames 4" in card.text and "--train_dir clips" in card.text
    assert re.search(r"\| this model \| 0\.0\d+ \| 0\.\d+ \|", card.text)  # not rounded to nothing
    assert "/" not in re.sub(r"https?://\S+|scripts/\w+.py|me/left-or-right", "", card.text).split("## Evaluation")[0]
    assert "ann" not in re.findall(r"[a-z]+", str(card)) and "OpenAI" not in card.text
    assert card.data.license == "unknown" and "has not stated a licence for the weights" in card.text
    assert not {"base_model", "base_model_relation", "datasets", "model-index"} & set(card.data.to_dict())


@pytest.mark.slow
def test_metadata_of_a_run_from_the_hub(trained, tmp_path):
    run = json.loads((trained / "run.json").read_text())
    run["base_model"] = "openai/clip-vit-base-patch16"
    run["arguments"]["DataArguments"] |= {"layout": "hub", "train_dir": "me/clips"}
    (tmp_path / "run.json").write_text(json.dumps(run))
    (tmp_path / "config.json").write_text((trained / "config.json").read_text())
    metadata = metadata_of_run(tmp_path)
    card = render_card(metadata, tmp_path, "me/left-or-right")
    assert card.data.base_model == "openai/clip-vit-base-patch16" and card.data.base_model_relation == "finetune"
    assert card.data.datasets == ["me/clips"] and "Copyright (c) 2021 OpenAI" in card.text


@pytest.mark.slow
def test_results_of_the_model_are_told_in_all_forms(trained, results, tmp_path):
    path, values = results(), results.original
    card = render_card(metadata_of_run(trained), trained, "me/mine", results=path)
    share = {name: f"{100 * values[name]:.2f}%" for name in ("top1", "top5", "mean_class_accuracy")}
    row = f"| clips (test) | 6 | 0 | 4x3x1 | {share['top1']} | {share['top5']} | {share['mean_class_accuracy']} |"
    assert row in card.text and len(claims(str(card))) == 8  # with the table's head and model-index
    assert "Not yet" not in card.text and "none yet" not in card.text and "ann" not in re.findall(r"[a-z]+", str(card))
    assert "python scripts/evaluate.py last --data_dir clips --num_crops 3" in card.text
    read = ModelCard(str(card)).data
    assert read.model_name == "mine" and [result.metric_name for result in read.eval_results] == [
        *("top-1", "top-5", "mean class accuracy"),
    ]
    assert [result.metric_value for result in read.eval_results] == [
        values[name] for name in ("top1", "top5", "mean_class_accuracy")
    ]
    assert {result.metric_type for result in read.eval_results} == {"accuracy"}
    assert read.eval_results[0].dataset_args == {"views": "4x3x1", "num_videos": 6}

    model = InTIClipForVideoClassification.from_pretrained(trained)
    model.save_pretrained(tmp_path / "copy")
    metadata = metadata_of_run(trained)
    assert write_eval_results(tmp_path / "copy", metadata, path) is None
    assert not (tmp_path / "copy" / ".eval_results").exists()
    metadata["dataset"]["id"] = "me/Clips"
    written = write_eval_results(tmp_path / "copy", metadata, path)
    assert written == tmp_path / "copy" / ".eval_results" / "clips.yaml"
    (entry,) = parse_eval_result_entries(yaml.safe_load(written.read_text()))
    assert (entry.dataset_id, entry.value) == ("me/Clips", values["top1"])
    assert entry.notes == "top-1 accuracy on 6 videos as a share, views 4x3x1"


@pytest.mark.slow
def test_results_of_something_else(trained, results, tmp_path):
    metadata = metadata_of_run(trained)

    def refused(path, message, metadata=metadata, folder=trained):
        for use in (
            lambda: render_card(metadata, folder, "me/mine", results=path),
            lambda: write_eval_results(folder, metadata, path),
        ):
            with pytest.raises(ValueError, match=message):
                use()

    model = InTIClipForVideoClassification.from_pretrained(trained)
    with torch.no_grad():
        model.classifier.bias[0] += 1e-6
    model.save_pretrained(tmp_path / "other")
    refused(results(), "results.json must be of the model in", folder=tmp_path / "other")
    refused(results(protocol={"frames": 4, "crops": 3, "clips": 4}), "'clips': 4", {**metadata, "protocol": {
        "frames": 4, "crops": 3, "clips": 1}})  # fmt: skip
    refused(
        results(),
        "protocol of .*results.json must be ",
        {**metadata, "protocol": {"frames": 4, "crops": 3, "clips": 4}},
    )
    shuffled = {
        "EvaluationArguments": {**results.original["arguments"]["EvaluationArguments"], "frame_order": "shuffled"}
    }
    refused(results(arguments=shuffled), "frame_order of .* must be 'original'")
    refused(results(top1=0.999), "the figures in .* must be consistent")
    refused(results(top5=1.5), "must be consistent")
    refused(results(num_videos=7), "must be consistent")
    refused(results(mean_class_accuracy=0.999), "must be consistent")
    refused(results(per_class={"down": results.original["mean_class_accuracy"]}), "must be consistent")
    for name in ("fingerprint", "confusion_matrix"):
        path = results()
        values = json.loads(path.read_text())
        del values[name]
        path.write_text(json.dumps(values))
        refused(
            path, f"must have the keys {name}, got none of them; give a file that the current scripts/evaluate.py wrote"
        )
    refused(trained / "nothing.json", "nothing.json must be readable JSON, got: ")
    refused(trained / "model.safetensors", "model.safetensors must be readable JSON, got: ")
    refused(trained / "config.json", "must have the keys .*; give a file that the current scripts/evaluate.py wrote")


@pytest.mark.slow
def test_speed_comes_from_a_benchmark_of_this_model(trained, tmp_path):
    model = InTIClipForVideoClassification.from_pretrained(trained)
    measured = {
        "conditions": {"batch_size": 4, "device": "cpu: Tortoise 3000", "threads": 2, "torch": "2.13.0"},
        "gmacs": count_costs(model.config)["total"].gmacs,
        "parameters": sum(p.numel() for p in model.parameters()),
        "forward_clips_per_second": 12.345,
    }
    path = tmp_path / "benchmark.json"
    path.write_text(json.dumps(measured))
    card = render_card(metadata_of_run(trained), trained, "me/mine", benchmark=path)
    assert "12.3 clips per second (median, batches of 4, cpu: Tortoise 3000, 2 CPU threads, torch 2.13.0" in card.text
    assert "not measured" not in card.text
    path.write_text(json.dumps({**measured, "parameters": measured["parameters"] - 1}))
    with pytest.raises(ValueError, match="parameters of .*benchmark.json must be "):
        render_card(metadata_of_run(trained), trained, "me/mine", benchmark=path)


@pytest.mark.slow
def test_the_lines_of_a_card_run(trained, monkeypatch, capsys):
    write_video(trained / "example.mp4")
    card = render_card(metadata_of_run(trained), trained, "me/mine")
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) == 8
    asked = []

    def download(repo_id, name):
        asked.append((repo_id, name))
        return str(trained / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    exec(code.replace('model="me/mine"', f"model={str(trained)!r}"), {})
    lines = capsys.readouterr().out.splitlines()
    assert asked == [("me/mine", "example.mp4")]
    assert {line.split()[1] for line in lines} == {"left", "right", "up"}
    assert sum(float(line.split()[0]) for line in lines) == pytest.approx(1, abs=0.002)


# Fingerprint and figure ---------------------------------------------------------------------------


def test_fingerprint_knows_a_model(tiny_config, tmp_path):
    model = InTIClipForVideoClassification(tiny_config())
    known = fingerprint(model)
    model.save_pretrained(tmp_path)
    again = InTIClipForVideoClassification.from_pretrained(tmp_path)
    assert fingerprint(again) == known == fingerprint(model.train())
    again.config.id2label[3] = "jumps"
    assert fingerprint(again) != known
    again.config.id2label[3] = model.config.id2label[3]
    again.config.compression_layers = [2, 3]
    assert fingerprint(again) != known
    with torch.no_grad():
        next(p for p in model.parameters() if p.numel() == 1).add_(1e-3)
    assert fingerprint(model) != known


@pytest.mark.parametrize("compression", ["inti", "linear_pooling", "tome", "sta", "none", "conv_pooling"])
def test_figure(compression, tiny_config, tmp_path):
    config = tiny_config(compression=compression)
    InTIClipForVideoClassification(config).save_pretrained(tmp_path)
    size = {"height": 32, "width": 32}
    InTIClipVideoProcessor(num_frames=8, size=size, crop_size=size).save_pretrained(tmp_path)
    write_video(tmp_path / "clip.mp4")
    drawn = draw_figure(tmp_path, tmp_path / "clip.mp4", tmp_path / "figure.png")
    assert drawn == (tmp_path / "figure.png").exists() == (compression in ("inti", "linear_pooling", "tome", "sta"))
    if drawn:
        with Image.open(tmp_path / "figure.png") as picture:
            assert picture.width > 1000 and len(set(picture.convert("L").resize((50, 20)).tobytes())) > 30
    metadata = dict.fromkeys(load_metadata(VITB)) | {
        "license": "unknown",
        "dataset": {"name": "clips", "id": None, "split": "test", "num_labels": 5, "terms": None, "limits": []},
        "method": {name: getattr(config, name) for name in load_metadata(VITB)["method"]},
    }
    assert ("(figure.png)" in render_card(metadata, tmp_path, "me/mine").text) == drawn
