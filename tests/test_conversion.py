"""Released weights as files: scripts/convert_checkpoint.py, run on the vectors' small models."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from hf_inti import InTIClipForVideoClassification, InTIClipVideoProcessor
from hf_inti.papers.conversion import convert_state_dict, detect_adaptation, infer_config, strip_prefix


SCRIPT = Path(__file__).parent.parent / "scripts" / "convert_checkpoint.py"


@pytest.fixture
def convert(monkeypatch):
    """A function that runs the script with arguments, in this process."""

    def run(*arguments) -> None:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise

    return run


@pytest.fixture
def released(test_data):
    """A function from a vector's name to its weights, inputs and outputs."""

    def load(name: str):
        tensors = load_file(test_data / "vectors" / f"{name}.safetensors")
        return {n.removeprefix("param."): t for n, t in tensors.items() if n.startswith("param.")}, tensors

    return load


@pytest.mark.parametrize(
    "name, method, container, prefix, suffix, options",
    [
        ("uniformerv2_model_k400", "uniformerv2", "model_state", "backbone.", ".pyth", "{}"),
        ("uniformerv2_model_ssv2_td", "uniformerv2", None, "", ".safetensors", "{}"),
        ("stadapter_model_pre_mlp", "st_adapter", "model", "module.", ".pth", "{}"),
        ("zeroi2v_model", "zeroi2v", "state_dict", "backbone.", ".pth", '{"heads": {"-1": 1, "1": 1}, "scale": 0.5}'),
        ("aim_model_2t", "aim", "state_dict", "backbone.", ".pth", '{"scale": 1.0}'),
    ],
)
def test_a_released_file_becomes_a_model(name, method, container, prefix, suffix, options, released, convert, tmp_path):
    weights, tensors = released(name)
    assert detect_adaptation(weights) == method
    width = weights["class_embedding"].shape[0]
    weights = {prefix + n: t for n, t in weights.items()}
    if method in ("aim", "zeroi2v"):  # their heads lie beside the backbone
        weights |= {"cls_head.fc_cls.weight": torch.randn(3, width), "cls_head.fc_cls.bias": torch.randn(3)}
    path = tmp_path / f"released{suffix}"
    if suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save({container: weights, "epoch": 7} if container else weights, path)
    labels = tmp_path / "labels.txt"
    number = {"uniformerv2": 6, "st_adapter": 5}.get(method, 3)
    labels.write_text("\n".join(f"class {i}" for i in range(number)))
    arguments = ["--labels", labels, "--num_frames", 8, "--num_attention_heads", 4, "--adaptation_options", options]
    convert(path, tmp_path / "out", *arguments)
    model = InTIClipForVideoClassification.from_pretrained(tmp_path / "out").double().eval()
    assert model.config.adaptation == method and model.config.id2label[number - 1] == f"class {number - 1}"
    out = model(tensors["in.pixels"].double().transpose(1, 2))
    if "out64.logits" in tensors:
        assert_close(out.logits, tensors["out64.logits"].double(), rtol=0, atol=1e-9)
    else:
        feature = model.vision_model(tensors["in.pixels"].double().transpose(1, 2)).pooler_output
        assert_close(feature, tensors["out64.video_feature"].double(), rtol=0, atol=1e-9)
        assert_close(
            out.logits.float(), feature.float() @ weights["cls_head.fc_cls.weight"].T + weights["cls_head.fc_cls.bias"]
        )
    processor = InTIClipVideoProcessor.from_pretrained(tmp_path / "out")
    assert processor.num_frames == 8
    assert (list(processor.image_mean) == [0.45] * 3) == (method == "uniformerv2")


def test_half_precision_becomes_full(released):
    weights, _ = released("stadapter_model_pre_mlp")
    converted = convert_state_dict({n: t.half() for n, t in weights.items()}, "st_adapter")
    assert {t.dtype for t in converted.values()} == {torch.float32}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop("class_embedding"), "must have one class_embedding, as CLIP has, got 0"),
        (lambda w: w.pop("conv1.weight"), "must be of st_adapter on CLIP, got none with conv1.weight"),
        (lambda w: w.pop("ln_post.bias"), "do not make a whole st_adapter model"),
        (
            lambda w: w.update({"transformer.resblocks.0.novel.weight": torch.ones(1)}),
            "must be those of st_adapter .*, got transformer.resblocks.0.novel.weight",
        ),
        (lambda w: w.pop("transformer.resblocks.1.ln_2.bias"), "do not make a whole st_adapter model"),
        (lambda w: [w.pop(n) for n in list(w) if "adapter" in n], "got 33 parameters without any of their modules"),
    ],
)
def test_what_is_no_released_file_is_said(change, message, released, convert, tmp_path):
    weights, _ = released("stadapter_model_pre_mlp")
    change(weights)
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(SystemExit, match=message):
        convert(tmp_path / "w.safetensors", tmp_path / "out", "--num_frames", "8")


def test_weights_without_a_head_get_a_new_one(released, convert, tmp_path):
    weights, tensors = released("aim_model_2t")
    save_file(weights, tmp_path / "w.safetensors")
    (tmp_path / "labels.txt").write_text("left\nright\n")
    flags = ["--num_attention_heads", 4, "--adaptation_options", '{"scale": 1.0}', "--labels", tmp_path / "labels.txt"]
    convert(tmp_path / "w.safetensors", tmp_path / "out", *flags)
    model = InTIClipForVideoClassification.from_pretrained(tmp_path / "out").double().eval()
    assert model.config.id2label == {0: "left", 1: "right"}
    feature = model.vision_model(tensors["in.pixels"].double().transpose(1, 2)).pooler_output
    assert_close(feature, tensors["out64.video_feature"].double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ["uniformerv2", "zeroi2v", "aim"])
def test_weights_of_another_method_are_said(method, released, convert, tmp_path):
    save_file(released("stadapter_model_pre_mlp")[0], tmp_path / "w.safetensors")
    with pytest.raises(SystemExit, match=f"must be of {method} on CLIP|must be those of {method} on CLIP"):
        flags = ["--num_frames", 8, "--num_attention_heads", 4, "--adaptation", method]
        convert(tmp_path / "w.safetensors", tmp_path / "out", *flags)


def test_missing_frames_and_files_are_said(released, convert, tmp_path):
    weights, _ = released("stadapter_model_pre_mlp")
    with pytest.raises(ValueError, match="num_frames must be given"):
        infer_config(weights, "st_adapter")
    with pytest.raises(ValueError, match="must be CLIP's, under 'backbone.', .* got optimizer.step"):
        strip_prefix({"backbone.class_embedding": torch.ones(1), "optimizer.step": torch.ones(1)})
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(SystemExit, match="holds no plain weights"):
        convert(tmp_path / "text.pth", tmp_path / "out")
    with pytest.raises(SystemExit, match="there is no file"):
        convert(tmp_path / "none.pth", tmp_path / "out")
