"""Evaluating a trained model under another compression, and a VideoMAE."""

import csv
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForVideoClassification,
    TimesformerConfig,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    VivitConfig,
    VivitForVideoClassification,
    VivitImageProcessor,
    VJEPA2Config,
)

from conftest import TINY, pickle_weights, write_video
from forks import ALL, HEAVY, run_in_a_fork
from hf_inti import InTIClipForVideoClassification, InTIClipVideoProcessor, InTIClipVisionConfig
from hf_inti.data.clips import VideoClips
from hf_inti.data.datasets import load_video_dataset
from hf_inti.hosts import compress
from hf_inti.training.checkpoints import CompressionOverride, load_classifier
from hf_inti.training.evaluation import EvalTransform


SCRIPTS = Path(__file__).parents[1] / "scripts"
NAMES = ["closes", "opens"]


def labels() -> dict:
    return {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Naive, an InTI and a VideoMAE, each with its processor, and videos of two classes."""
    folder = tmp_path_factory.mktemp("evaluate")
    torch.manual_seed(0)
    for compression in ("none", "inti"):
        config = InTIClipVisionConfig(**TINY, num_frames=8, compression=compression, **labels())
        model = InTIClipForVideoClassification(config)
        with torch.no_grad():
            model.classifier.weight.normal_()
        model.save_pretrained(folder / compression)
        side = {"height": 32, "width": 32}
        processor = InTIClipVideoProcessor(num_frames=8, size={"shortest_edge": 32}, crop_size=side)
        processor.save_pretrained(folder / compression)
    config = VideoMAEConfig(
        image_size=32, patch_size=8, num_frames=8, hidden_size=24, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=36, initializer_range=0.3, **labels(),
    )  # fmt: skip
    VideoMAEForVideoClassification(config).save_pretrained(folder / "videomae")
    settings = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.2, 0.3], "resample": 2}
    (folder / "videomae" / "preprocessor_config.json").write_text(json.dumps(settings))
    for i, name in enumerate(NAMES * 2):
        write_video(folder / "videos" / name / f"{i}.mp4", seed=i)
    return folder


@pytest.fixture
def pixel_values() -> torch.Tensor:
    return torch.randn(2, 8, 3, 32, 32)


def logits(model, pixel_values) -> torch.Tensor:
    with torch.no_grad():
        return model(pixel_values).logits


@pytest.mark.parametrize(
    "compression, options", [("tome", {"r": 2}), ("sta", {"r": 6}), ("linear_pooling", None), ("none", None)]
)
def test_a_trained_naive_under_another_compression(compression, options, folder, pixel_values):
    model, _ = load_classifier(folder / "none", CompressionOverride(compression, compression_options=options))
    trained = InTIClipForVideoClassification.from_pretrained(folder / "none")
    config = InTIClipVisionConfig.from_dict(
        {**trained.config.to_dict(), "compression": compression, "compression_options": options or {}}
    )
    by_hand = InTIClipForVideoClassification(config).eval()
    by_hand.load_state_dict(trained.state_dict(), strict=False)
    torch.testing.assert_close(logits(model, pixel_values), logits(by_hand, pixel_values))
    assert torch.equal(logits(model, pixel_values), logits(trained.eval(), pixel_values)) is False or (
        compression == "none"
    )
    assert model.config.compression == compression and not model.training


def test_r_zero_is_the_trained_model(folder, pixel_values):
    plain = load_classifier(folder / "none")[0]
    model = load_classifier(folder / "none", CompressionOverride("sta", compression_options={"r": 0}))[0]
    torch.testing.assert_close(logits(model, pixel_values), logits(plain, pixel_values))


def test_positions_may_be_given(folder, pixel_values):
    model, _ = load_classifier(folder / "none", CompressionOverride("linear_pooling", [1, 3]))
    assert model.config.compression_layers == [1, 3]
    with torch.no_grad():
        assert model(pixel_values, output_hidden_states=True).hidden_states[-1].shape[1] == 2


@pytest.mark.parametrize("compression", ["inti", "conv_pooling", "stts"])
def test_compressions_that_need_training_are_refused(compression, folder):
    with pytest.raises(ValueError, match="choose tome, sta, linear_pooling or none"):
        load_classifier(folder / "none", CompressionOverride(compression))


def test_the_checkpoints_own_compression_keeps_its_weights(folder, pixel_values):
    plain = load_classifier(folder / "inti")[0]
    same = load_classifier(folder / "inti", CompressionOverride("inti"))[0]
    assert same.config.compression_layers == plain.config.compression_layers
    torch.testing.assert_close(logits(same, pixel_values), logits(plain, pixel_values))


@pytest.mark.parametrize(("name", "override"), [("none", None), ("none", "tome"), ("videomae", None)])
def test_a_pickle_of_weights_is_refused(name, override, folder, tmp_path):
    shutil.copytree(folder / name, tmp_path, dirs_exist_ok=True)
    pickle_weights(tmp_path)
    with pytest.raises(ValueError, match="must hold its weights as safetensors, got none"):
        load_classifier(str(tmp_path), CompressionOverride(override))


def test_overrides_without_a_compression_are_refused():
    for options in ({"compression_options": {"r": 3}}, {"compression_layers": [1]}):
        with pytest.raises(ValueError, match="compression must be given"):
            CompressionOverride(**options)


def test_videomae(folder, pixel_values):
    plain = VideoMAEForVideoClassification.from_pretrained(folder / "videomae").eval()
    model, processor = load_classifier(folder / "videomae")
    assert torch.equal(logits(model, pixel_values), logits(plain, pixel_values))
    assert (processor.num_frames, processor.resample) == (8, 2)
    assert list(processor.image_mean) == [0.4, 0.5, 0.6] and list(processor.image_std) == [0.2, 0.2, 0.3]
    assert processor.crop_size["height"] == 32 and processor.size["shortest_edge"] == 32
    model, _ = load_classifier(
        folder / "videomae", CompressionOverride("sta", compression_options={"r": 6, "order": "B"})
    )
    assert torch.equal(logits(model, pixel_values), logits(compress(plain, "sta", r=6, order="B"), pixel_values))
    with pytest.raises(ValueError, match="method must be one of sta, tome, stts or None, got 'inti'"):
        load_classifier(folder / "videomae", CompressionOverride("inti"))
    with pytest.raises(ValueError, match="compression_layers must be left out"):
        load_classifier(folder / "videomae", CompressionOverride("sta", [1]))
    with pytest.raises(ValueError, match="options of sta on VideoMAE must be among"):
        load_classifier(folder / "videomae", CompressionOverride("sta", compression_options={"R": 6}))


@pytest.mark.parametrize("name, method", [("vivit", "sta"), ("vjepa2", "tome"), ("timesformer", "tome")])
def test_other_hosts(name, method, tmp_path, folder, pixel_values, monkeypatch):
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, **labels()}
    config = {
        "vivit": lambda: VivitConfig(image_size=32, tubelet_size=[2, 8, 8], num_frames=8, **sizes),
        "vjepa2": lambda: VJEPA2Config(
            crop_size=32, patch_size=8, frames_per_clip=8, pred_hidden_size=12, pred_num_attention_heads=2, **sizes
        ),
        "timesformer": lambda: TimesformerConfig(image_size=32, patch_size=8, num_frames=8, **sizes),
    }[name]()
    plain = AutoModelForVideoClassification.from_config(config).eval()
    plain.save_pretrained(tmp_path / "model")
    model, processor = load_classifier(tmp_path / "model", CompressionOverride(method, compression_options={"r": 3}))
    assert torch.equal(logits(model, pixel_values), logits(compress(plain, method, r=3), pixel_values))
    assert processor.num_frames == 8 and dict(processor.crop_size) == {"height": 32, "width": 32}
    flags = ["--compression", method, "--compression_options", '{"r": 3}', "--output_dir", tmp_path / "out"]
    evaluate(monkeypatch, tmp_path / "model", "--data_dir", folder / "videos", *flags)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["num_videos"] == 4


@pytest.mark.parametrize("settings", [{}, {"do_normalize": False}, {"image_mean": [0.1, 0.2, 0.3]}, {"offset": False}])
def test_vivit_is_preprocessed_as_by_its_processor(settings, tmp_path):
    VivitForVideoClassification(
        VivitConfig(image_size=32, num_frames=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    ).save_pretrained(tmp_path)
    side = {"height": 32, "width": 32}
    theirs = VivitImageProcessor(size={"shortest_edge": 32}, crop_size=side, **settings)
    theirs.save_pretrained(tmp_path)
    ours = load_classifier(tmp_path)[1]
    frames = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    wanted = theirs(list(frames.numpy()), return_tensors="pt").pixel_values
    torch.testing.assert_close(ours(frames).pixel_values, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "settings, size, crop",
    [({"size": 40, "crop_size": 32}, 40, 32), ({"size": {"shortest_edge": 36}}, 36, 32), ({"size": None}, 32, 32)],
)
def test_videomae_is_preprocessed_as_its_file_says(settings, size, crop, folder, tmp_path):
    """Sizes may be whole numbers, as in the files of the first checkpoints."""
    shutil.copytree(folder / "videomae", tmp_path / "copy")
    (tmp_path / "copy" / "preprocessor_config.json").write_text(json.dumps({**settings, "do_normalize": False}))
    _, processor = load_classifier(tmp_path / "copy")
    assert processor.size["shortest_edge"] == size and dict(processor.crop_size) == {"height": crop, "width": crop}
    assert not processor.do_normalize and processor.do_rescale and processor.resample == 2
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]
    (tmp_path / "copy" / "preprocessor_config.json").unlink()
    assert load_classifier(tmp_path / "copy")[1].crop_size["height"] == 32


def test_other_checkpoints_are_refused(folder, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(
        ValueError,
        match="must be one of inti_clip.*, videomae, timesformer, vivit, vjepa2, torchvision_video, got 'clip'",
    ):
        load_classifier(tmp_path)


def evaluate(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPTS / "evaluate.py"), run_name="__main__")
    assert not end.value.code, end.value.code


@pytest.mark.parametrize("name", ["none", "videomae"])
def test_the_script_under_sta(name, folder, tmp_path, monkeypatch):
    sta = ["--compression", "sta", "--compression_options", '{"r": 6}']
    evaluate(monkeypatch, folder / name, "--data_dir", folder / "videos", "--output_dir", tmp_path, *sta)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["num_videos"] == 4 and results["num_unreadable"] == 0
    assert results["arguments"]["EvaluationArguments"]["compression"] == "sta"
    assert results["arguments"]["EvaluationArguments"]["compression_options"] == {"r": 6}


def test_results_of_another_compression_do_not_replace_those_of_the_model(folder, tmp_path, monkeypatch):
    shutil.copytree(folder / "none", tmp_path / "model")
    for more in ([], ["--compression", "linear_pooling"], ["--compression", "none"]):
        evaluate(monkeypatch, tmp_path / "model", "--data_dir", folder / "videos", *more)
    found = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("model/*/results.json")}
    assert sorted(found) == ["evaluation", "evaluation_linear_pooling", "evaluation_none"]
    assert found["evaluation"]["fingerprint"] == found["evaluation_none"]["fingerprint"]
    assert found["evaluation"]["fingerprint"] != found["evaluation_linear_pooling"]["fingerprint"]


def test_sampling_may_be_given(folder, tmp_path, monkeypatch):
    dense = ["--sampling", "dense", "--frame_stride", "1", "--num_frames", "4"]
    evaluate(monkeypatch, folder / "none", "--data_dir", folder / "videos", "--output_dir", tmp_path, *dense)
    assert json.loads((tmp_path / "results.json").read_text())["protocol"]["frames"] == 4


def test_frames_may_be_resized(folder, tmp_path, monkeypatch):
    found = {}
    for resize in (None, 32, 44):
        more = [] if resize is None else ["--resize", resize]
        out = tmp_path / str(resize)
        evaluate(monkeypatch, folder / "none", "--data_dir", folder / "videos", "--output_dir", out, *more)
        found[resize] = (out / "predictions.csv").read_text()
    assert found[None] == found[32] != found[44]
    with pytest.raises(AssertionError, match="resize must be at least 32, the side of the model's crop, got 31"):
        evaluate(monkeypatch, folder / "none", "--data_dir", folder / "videos", "--resize", 31)


def test_weights_by_name_are_torchvisions(folder, monkeypatch):
    for name in ("none", "videomae"):
        with pytest.raises(ValueError, match="host_weights must be left out .* got 'DEFAULT'"):
            load_classifier(folder / name, host_weights="DEFAULT")
    with pytest.raises(AssertionError, match="host_weights must be left out without a host, got 'DEFAULT'"):
        evaluate(monkeypatch, folder / "none", "--data_dir", folder / "videos", "--host_weights", "DEFAULT")


def test_orders_of_frames(folder):
    """All views of a video in one order; shuffled, each video in its own, and always in that."""
    processor = InTIClipVideoProcessor.from_pretrained(folder / "none")
    dataset = load_video_dataset(folder / "videos")

    def clips(order, num_clips=2, num_crops=3):
        return VideoClips(dataset, EvalTransform(processor, num_clips, num_crops, order), on_bad_video="keep")

    plain = [item["pixel_values"] for item in clips("original")]
    assert plain[0].shape[:2] == (6, 8) and not torch.equal(plain[0][:, 0], plain[0][:, 1])
    for before, item in zip(plain, clips("reversed"), strict=True):
        assert torch.equal(item["pixel_values"], before.flip(1))
    orders = []
    for before, item in zip(plain, clips("shuffled"), strict=True):
        same = (item["pixel_values"][:, :, None] == before[:, None]).flatten(3).all(3)  # V x T x T
        assert (same == same[0]).all() and (same[0].sum(0) == 1).all() and (same[0].sum(1) == 1).all()
        orders.append(same[0].long().argmax(1).tolist())
    assert len(set(map(tuple, orders))) == 4 and list(range(8)) not in orders
    again = clips("shuffled", 1, 1)
    for i in (3, 0, 3):
        assert torch.equal(again[i]["pixel_values"][0], clips("original", 1, 1)[i]["pixel_values"][0, orders[i]])
    with pytest.raises(ValueError, match="frame_order must be one of original, reversed, shuffled, got 'backwards'"):
        EvalTransform(processor, frame_order="backwards")


def test_the_script_on_reversed_frames(folder, tmp_path, monkeypatch):
    """Not where the results of the frames in their order are."""
    torch.manual_seed(0)
    config = InTIClipVisionConfig(**TINY, num_frames=8, compression="conv_pooling", **labels())
    model = InTIClipForVideoClassification(config).eval()
    with torch.no_grad():  # so that order tells
        for parameter in [*model.vision_model.compression.parameters(), model.classifier.weight]:
            parameter.normal_(std=0.3)
    shutil.copytree(folder / "none", tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    for more in ([], ["--frame_order", "reversed"]):
        evaluate(monkeypatch, tmp_path / "model", "--data_dir", folder / "videos", *more)
    assert {path.parent.name for path in tmp_path.glob("model/*/results.json")} == {"evaluation", "evaluation_reversed"}
    processor = InTIClipVideoProcessor.from_pretrained(folder / "none")
    scores = {}
    for name in ("evaluation", "evaluation_reversed"):
        rows = csv.DictReader((tmp_path / "model" / name / "predictions.csv").read_text().splitlines())
        scores[name] = [float(row["score"]) for row in rows]
    clips = [processor(str(video), return_tensors="pt")["pixel_values"] for video in sorted(folder.rglob("*.mp4"))]
    plain = [logits(model, clip).softmax(-1).max().item() for clip in clips]
    turned = [logits(model, clip.flip(1)).softmax(-1).max().item() for clip in clips]
    assert scores["evaluation"] == pytest.approx(plain, abs=1e-5)
    assert scores["evaluation_reversed"] == pytest.approx(turned, abs=1e-5)
    assert all(abs(a - b) > 1e-4 for a, b in zip(plain, turned, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({path.name for path in SCRIPTS.glob("*.py")} - {"demo_clips.py"}))
def test_scripts_start(name):
    """As processes of their own: scripts/ is then first on the path, where evaluate.py hides the evaluate library.

    The two that use it import it there; the others find the libraries imported, for time. Nobody starts demo_clips.py
    but demo_app.py.
    """
    if name == "demo_app.py":
        pytest.importorskip("gradio")
    imported = HEAVY if name in ("train.py", "evaluate.py") else ALL
    status, out, error = run_in_a_fork(SCRIPTS / name, "--help", imported=imported)
    assert status == 0, error
    assert out.startswith(f"usage: {name} ")


@pytest.mark.slow
def test_metrics_find_the_evaluate_library():
    code = f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); import hf_inti.training.metrics as m; print(m.evaluate)"
    _, out, error = run_in_a_fork(code)
    assert "site-packages" in out, out + error
