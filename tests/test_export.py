"""Exported files compute what the model computes, at any number of clips and, where it is free, of frames."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch.testing import assert_close
from transformers.modeling_outputs import ImageClassifierOutput

from conftest import TINY, write_video
from hf_inti import InTIClipForVideoClassification, InTIClipVideoProcessor, InTIClipVisionConfig, export
from hf_inti.model.adaptation import ADAPTATIONS
from hf_inti.model.compression import COMPRESSIONS


SCRIPT = Path(__file__).parents[1] / "scripts" / "export.py"
TOME, STA = {"r": 1}, {"r": 2}
STTS = {"temporal": [[0, 0.5]], "spatial": [[1, 0.6]]}
# (compression, its options, adaptation, its options, least number of dynamic frames); every method is there.
METHODS = [
    ("none", {}, "uniformerv2", {"global_layers": 1, "local": "single", "temporal_downsample": True}, 6),
    ("inti", {}, "none", {}, 6),
    ("linear_pooling", {}, "aim", {}, 6),
    ("conv_pooling", {}, "zeroi2v", {}, 6),
    ("tome", TOME, "st_adapter", {}, 3),
    ("sta", STA, "none", {}, None),
    ("stts", STTS, "none", {}, None),
]


def build(compression="inti", options=None, adaptation="none", adaptation_options=None, num_frames=6, layers=(1,)):
    """A model of few blocks on 16 x 16 pixels, with random values for all parameters."""
    blocks = 3 if compression == "sta" else 1 if layers == (0,) else 2  # STA needs three
    config = InTIClipVisionConfig(
        **{**TINY, "image_size": 16, "num_hidden_layers": blocks, "num_labels": 5},
        num_frames=num_frames,
        compression=compression,
        compression_layers=layers,
        compression_options=options,
        adaptation=adaptation,
        adaptation_options=adaptation_options,
    )
    torch.manual_seed(0)
    model = InTIClipForVideoClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def clips(B: int, T: int = 6) -> torch.Tensor:
    return torch.randn(B, T, 3, 16, 16)


def assert_same(model, path: Path, shapes: list[tuple[int, int]], atol: float = 1e-4) -> None:
    exported = export.ExportedModel(path, threads=1)
    for shape in shapes:
        pixel_values = clips(*shape)
        with torch.no_grad():
            assert_close(exported(pixel_values).logits, model(pixel_values).logits, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def model():
    return build("linear_pooling")


@pytest.fixture(scope="module")
def processor():
    return InTIClipVideoProcessor(
        num_frames=6, size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_mean=[0.5, 0.4, 0.3]
    )


@pytest.fixture(scope="module")
def onnx_file(model, processor, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export.export_onnx(model, path, processor=processor)
    return path


@pytest.fixture(scope="module")
def int8_file(onnx_file) -> Path:
    path = onnx_file.with_name("model_int8.onnx")
    export.quantize_onnx(onnx_file, path)
    return path


def test_every_method_is_tried():
    assert {row[0] for row in METHODS} == set(COMPRESSIONS) and {row[2] for row in METHODS} == set(ADAPTATIONS)


@pytest.mark.parametrize("compression, options, adaptation, adaptation_options, least", METHODS)
def test_onnx(compression, options, adaptation, adaptation_options, least, tmp_path):
    one_block = adaptation in ("aim", "st_adapter", "zeroi2v")  # which are the same in every block
    T = 6 if least else 3  # STA goes through them one by one
    layers = (0,) if one_block else (1,)
    model = build(compression, options, adaptation, adaptation_options, num_frames=T, layers=layers)
    path = tmp_path / "model.onnx"
    export.export_onnx(model, path, dynamic_frames=least is not None)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert_same(model, path, [(1, T), (5, T)])
    if least is not None:
        step = model.config.frame_multiple
        assert export.frame_counts(model) == (least, step)
        assert export.onnx_session(path).get_inputs()[0].shape[:2] == ["batch", "frames"]
        assert_same(model, path, [(3, least), (1, 6 + step), (2, 24)])


def test_pt2_with_fixed_frames(tmp_path):
    model = build("stts", STTS).optimize_for_inference()
    export.export_program(model, tmp_path / "model.pt2")
    assert_same(model, tmp_path / "model.pt2", [(1, 6), (5, 6)])


@pytest.mark.parametrize(
    "compression, options, num_frames, message",
    [
        ("sta", STA, 6, "fixes the number of frames that compression 'sta' goes through.*with fixed frames"),
        ("stts", STTS, 6, "fixes the number of frames that compression 'stts' goes through.*with fixed frames"),
        ("inti", {}, 4, "for 6 frames and more, and it was trained on 4.*with fixed frames"),
    ],
)
@pytest.mark.parametrize("export_to", [export.export_onnx, export.export_program])
def test_dynamic_frames_are_refused_at_once(
    compression, options, num_frames, message, export_to, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.export, "export", None)
    with pytest.raises(ValueError, match=message) as caught:
        export_to(build(compression, options, num_frames=num_frames), tmp_path / "model", dynamic_frames=True)
    assert "\n" not in str(caught.value)


def test_what_takes_dynamic_frames_all_the_same(tmp_path):
    model = build("stts", {"spatial": STTS["spatial"]})  # of every frame its own squares
    export.export_program(model, tmp_path / "model.pt2", dynamic_frames=True)
    assert_same(model, tmp_path / "model.pt2", [(1, 3), (2, 7)])
    model = build("none", {}, "st_adapter", {"kernel_size": [7, 3, 3]})  # which must not reach past both ends
    export.export_program(model, tmp_path / "model.pt2", dynamic_frames=True)
    assert export.frame_counts(model) == (5, 1)
    assert_same(model, tmp_path / "model.pt2", [(1, 5), (2, 7)])


def test_fixed_frames_are_fixed(onnx_file):
    session = export.onnx_session(onnx_file)
    assert session.get_inputs()[0].name == "pixel_values" and session.get_outputs()[0].name == "logits"
    assert session.get_inputs()[0].shape == ["batch", 6, 3, 16, 16]
    with pytest.raises(Exception, match="Got: 8 Expected: 6"):
        session.run(None, {"pixel_values": clips(1, 8).numpy()})


def test_threads(onnx_file):
    assert export.onnx_session(onnx_file, threads=3).get_session_options().intra_op_num_threads == 3


# What a user has to know


def check_facts(facts: dict, num_frames: int = 6) -> None:
    assert facts["labels"] == [f"LABEL_{i}" for i in range(5)] and facts["num_frames"] == num_frames
    assert facts["processor"]["image_mean"] == [0.5, 0.4, 0.3]
    assert facts["processor"]["crop_size"] == {"height": 16, "width": 16}
    assert facts["processor"]["num_frames"] == 6 and facts["processor"]["sampling"] == "uniform"


def test_onnx_metadata(onnx_file, int8_file):
    for path in (onnx_file, int8_file):
        metadata = export.onnx_session(path).get_modelmeta().custom_metadata_map
        check_facts({name: json.loads(metadata[name]) for name in ("labels", "num_frames", "processor")})


def test_pt2_with_dynamic_frames(processor, tmp_path):
    model = build("inti", {"cube": "dwconv"}, num_frames=12, layers=(0, 1))  # the other cube is in test_onnx
    path = tmp_path / "model.pt2"
    export.export_program(model, path, dynamic_frames=True, processor=processor)
    assert_same(model, path, [(1, 12), (5, 12), (2, 16), (1, 24)])
    with pytest.raises(AssertionError, match="Guard failed"):  # torch's own
        export.ExportedModel(path)(clips(1, 14))
    files = {"hf_inti.json": ""}
    torch.export.load(path, extra_files=files)
    facts = json.loads(files["hf_inti.json"])
    check_facts(facts, num_frames=12)
    assert (facts["least_frames"], facts["frame_step"]) == (12, 4)


# Int8


def test_int8_is_smaller_and_nearly_as_exact(model, onnx_file, int8_file):
    assert export.file_size(int8_file) < 0.6 * export.file_size(onnx_file)
    pixel_values = clips(40)
    with torch.no_grad():
        plain = model(pixel_values).logits
    quantised = export.ExportedModel(int8_file)(pixel_values).logits
    error = (quantised - plain).std() / (plain - plain.mean(dim=0)).std()
    assert 1e-4 < error < 0.2  # it is not the same file
    assert (quantised.argmax(dim=-1) == plain.argmax(dim=-1)).float().mean() >= 0.9


def test_weights_too_large_for_one_file(tmp_path, monkeypatch):
    model = build("none")
    monkeypatch.setattr(export, "ONE_FILE", 0)
    path = tmp_path / "model.onnx"
    export.export_onnx(model, path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert export.file_size(path) == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert_same(model, path, [(2, 6)])
    export.quantize_onnx(path, tmp_path / "int8.onnx")
    assert_same(model, tmp_path / "int8.onnx", [(2, 6)], atol=0.2)


# The check of what was written


def test_check_passes(model, onnx_file):
    assert 0 <= export.check_exported(model, onnx_file) <= 1e-4


def test_check_refuses_another_models_file(model, onnx_file):
    other = build("linear_pooling")
    other.classifier.weight.data += 1e-3
    with pytest.raises(
        ValueError, match=r"model.onnx does not compute what.* more than 0.0001; do not use it"
    ) as caught:
        export.check_exported(other, onnx_file)
    assert "\n" not in str(caught.value)


def answers(model, *wrong, by=1.0):
    """What stands for an exported file: it answers as the model does, but for its calls of these numbers."""
    calls = []

    def exported(pixel_values):
        calls.append(pixel_values.shape[:2])
        logits = model(pixel_values).logits
        return ImageClassifierOutput(logits=logits + by if len(calls) in wrong else logits)

    return exported, calls


def test_any_wrong_clip_counts(model):
    for call in (1, 3, 5):
        exported, calls = answers(model, call)
        assert export.largest_difference(model, exported, dynamic_frames=True) == pytest.approx(1, abs=1e-5)
        assert calls == [(1, 6), (2, 6), (3, 6), (2, 6), (1, 8)]
    exported, _ = answers(model, 2, by=float("nan"))
    assert not export.largest_difference(model, exported) <= 1


def test_where_tokens_are_chosen_a_tie_may_fall_otherwise(monkeypatch):
    model = build("tome", TOME)
    exported, calls = answers(model, 1, 2)
    monkeypatch.setattr(export, "ExportedModel", lambda path: exported)
    assert export.check_exported(model, "model.onnx") == 0
    assert calls == [(1, 6)] * 3 + [(2, 6), (3, 6)]
    exported, _ = answers(model, *range(3, 20))
    with pytest.raises(ValueError, match="differ by up to 1, more than 0.0001"):
        export.check_exported(model, "model.onnx")


# Without the extra


@pytest.mark.parametrize("name", ["onnx", "onnxscript"])
def test_onnx_needs_the_extra(name, model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"exporting needs {name} .*pip install -e '.\[export\]'"):
        export.export_onnx(model, tmp_path / "model.onnx")


def test_sessions_need_the_extra(onnx_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"exporting needs onnxruntime .*\[export\]"):
        export.onnx_session(onnx_file)


# The script


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs the script: arguments -> (what it printed, its error or None)."""

    def run_script(*arguments):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        monkeypatch.setattr(sys, "path", sys.path)
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return capsys.readouterr().out, end.value.code

    yield run_script
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def folder(processor, tmp_path) -> Path:
    """A trained model: Naive, which is exported soonest."""
    build("none").save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_script(run, folder, tmp_path):
    for label in range(5):
        write_video(tmp_path / "data" / "test" / f"LABEL_{label}" / "0.mp4", seed=label)
    out = tmp_path / "out"
    formats = ("--formats", "onnx", "pt2", "--int8", "true")
    printed, error = run(folder, out, *formats, "--evaluate_dir", tmp_path / "data", "--batch_size", 2)
    assert error is None
    assert {"model.onnx", "model.pt2", "model_int8.onnx"} < {file.name for file in out.iterdir()}
    processor = InTIClipVideoProcessor.from_pretrained(out)
    pixel_values = processor(str(tmp_path / "data" / "test" / "LABEL_0" / "0.mp4"))["pixel_values"]
    model = InTIClipForVideoClassification.from_pretrained(folder)
    for name, atol in (("model.onnx", 1e-4), ("model.pt2", 1e-4), ("model_int8.onnx", 0.5)):
        logits = export.ExportedModel(out / name)(pixel_values).logits
        assert_close(logits, model(pixel_values).logits.detach(), rtol=0, atol=atol)
    lines = [line for line in printed.splitlines() if "top-1" in line]
    assert [line.split(":")[0] for line in lines] == ["the model", "model.onnx", "model.pt2", "model_int8.onnx"]
    assert len({line.split(":")[1] for line in lines[:3]}) == 1 and lines[0].endswith("% of 5 videos")


def test_script_stops_at_a_wrong_file(run, folder, tmp_path, monkeypatch):
    def wrong(model, *arguments):
        other = build("none")
        other.classifier.bias.data += 1
        return right(other, *arguments)

    right = export.export_program
    monkeypatch.setattr(export, "export_program", wrong)
    _, error = run(folder, tmp_path / "out", "--formats", "pt2")
    assert "model.pt2 does not compute what the model computes" in error and "\n" not in error


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--formats", "tflite"), "formats must be out of onnx, pt2, got 'tflite'"),
        (("--formats", "pt2", "--int8", "true"), "int8 is made of the ONNX file"),
        (("--evaluate_dir", "/no/such/data"), "/no/such/data"),
    ],
)
def test_script_refuses_at_once(flags, message, run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.export, "export", None)
    _, error = run(folder, tmp_path / "out", *flags)
    assert error.startswith("error: ") and message in error and not (tmp_path / "out").exists()


def test_script_refuses_dynamic_frames(run, processor, tmp_path):
    build("sta", STA).save_pretrained(tmp_path / "sta")
    processor.save_pretrained(tmp_path / "sta")
    _, error = run(tmp_path / "sta", tmp_path / "out", "--dynamic_frames", "true")
    assert "export it with fixed frames" in error and not (tmp_path / "out").exists()


def test_script_without_a_model(run, tmp_path):
    _, error = run(tmp_path / "nothing", tmp_path / "out")
    assert error.startswith("error: ") and "There is no such folder either." in error


def test_script_without_the_extra(run, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    _, error = run(folder, tmp_path / "out")
    assert error.startswith("error: exporting needs onnxruntime") and not (tmp_path / "out").exists()
