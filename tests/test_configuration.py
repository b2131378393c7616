"""The configuration: what it fills in, keeps and refuses."""

import json

import pytest
from transformers import AutoConfig, CLIPConfig, CLIPTextConfig, CLIPVisionConfig

from hf_inti import InTIClipForVideoClassification, InTIClipVisionConfig


def test_default_positions():
    assert InTIClipVisionConfig().compression_layers == [5, 7]
    assert InTIClipVisionConfig(num_hidden_layers=24).compression_layers == [10, 14]
    assert InTIClipVisionConfig(num_hidden_layers=4).compression_layers == [1, 2]


def test_tuples_become_lists_inside_options_too():
    config = InTIClipVisionConfig(compression_layers=(3, 5), compression_options={"context": ("cube", "frame")})
    assert config.compression_layers == [3, 5]
    assert config.compression_options == {"context": ["cube", "frame"]}


def test_round_trip(tmp_path):
    config = InTIClipVisionConfig(
        num_frames=8,
        compression_layers=[2, 6],
        compression_options={"head": "attention", "context": []},
        drop_path_rate=0.1,
        num_labels=3,
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is InTIClipVisionConfig
    loaded._name_or_path = config._name_or_path
    assert loaded.to_dict() == config.to_dict()
    assert json.loads((tmp_path / "config.json").read_text())["compression_layers"] == [2, 6]


@pytest.mark.parametrize("form", ["config", "vision config", "folder", "vision folder"])
def test_from_clip(form, tmp_path):
    vision = {"hidden_size": 96, "num_attention_heads": 8, "patch_size": 14, "layer_norm_eps": 1e-6}
    clip = CLIPVisionConfig(**vision) if "vision" in form else CLIPConfig(vision_config=vision)
    if "folder" in form:
        clip.save_pretrained(tmp_path)
        clip = str(tmp_path)
    config = InTIClipVisionConfig.from_clip(clip, num_frames=8, compression_layers=[3, 5], num_labels=7)
    assert {name: getattr(config, name) for name in vision} == vision
    assert config.model_type == InTIClipVisionConfig.model_type
    assert (config.num_frames, config.compression_layers, config.num_labels) == (8, [3, 5], 7)


@pytest.mark.parametrize(
    "numbers",
    [
        {"vision_config": {"model_type": "clip_vision_model"}, "vision_config_dict": {"hidden_size": 96}},
        {"vision_config": None, "vision_config_dict": {"hidden_size": 96}},
        {"vision_config_dict": {"hidden_size": 96}},
        {"vision_config": {"hidden_size": 96, "torch_dtype": None, "num_beams": 1, "dropout": 0.0}},
    ],
)
def test_from_clip_of_old_files(numbers, tmp_path):
    """Files of the first releases held the numbers twice, or in another place, beside much that is gone."""
    old = {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": 512, "text_config_dict": None}
    (tmp_path / "config.json").write_text(json.dumps({**old, **numbers}))
    config = InTIClipVisionConfig.from_clip(tmp_path)
    assert (config.hidden_size, config.num_hidden_layers, config.compression_layers) == (96, 12, [5, 7])
    assert InTIClipVisionConfig.from_clip(CLIPConfig.from_pretrained(tmp_path)).hidden_size == 96


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compresion": "none"}, "got 'compresion'; did you mean 'compression'"),
        ({"num_frame": 8}, "did you mean 'num_frames'"),
        ({"compression": "intl"}, "compression must be one of none, inti.*got 'intl'"),
        ({"adaptation": "lora"}, "adaptation must be one of none.*got 'lora'"),
        ({"compression_layers": [7, 5]}, r"ascending order without repeats, got \[7, 5\]; use \[5, 7\]"),
        ({"compression_layers": [5, 5]}, r"ascending order without repeats, got \[5, 5\]; use \[5\]"),
        ({"compression_layers": [5, 13]}, r"from 0 \(before the first\) to 12 .*got \[5, 13\]"),
        ({"compression_layers": [-1]}, "from 0"),
        ({"num_frames": 6}, "multiple of 4 .*got 6; .* 4 and 8"),
        ({"num_frames": 2}, "multiple of 4 .*got 2; .* 4"),
        ({"num_frames": 0}, "num_frames must be a whole number of at least 1"),
        ({"compression_options": {"cubes": "dwconv"}}, "no option 'cubes'.*context, fusion, head, cube"),
        ({"compression_options": {"cube": "conv"}}, "cube must be one of local_mhra, dwconv, got 'conv'"),
        ({"compression_options": {"head": 3}}, "head must be one of softmax, sigmoid, attention, got 3"),
        ({"compression_options": {"context": ["cubes"]}}, "context must be a list of distinct names out of cube"),
        ({"compression_options": {"context": "cube"}}, "context must be a list"),
        ({"compression_options": {"context": [["cube"]]}}, "context must be a list"),
        ({"compression_options": {"context": ["cube", "cube"]}}, "context must be a list of distinct names"),
        ({"compression": "none", "compression_options": {"cube": "dwconv"}}, "takes no options"),
        ({"adaptation_options": {"ratio": 2}}, "takes no options"),
        ({"drop_path_rate": 1.0}, "drop_path_rate must be at least 0 and below 1"),
        ({"image_size": [224, 112]}, "image_size must be one whole number of pixels"),
        ({"patch_size": 0}, "patch_size must be from 1 to image_size 224, got 0"),
        ({"patch_size": 256}, "patch_size must be from 1 to image_size 224, got 256"),
        ({"num_labels": 0}, "num_labels must be at least 1, got 0"),
    ],
)
def test_wrong_use_reads_well(options, message):
    with pytest.raises(ValueError, match=message) as error:
        InTIClipVisionConfig(**options)
    assert "\n" not in str(error.value)


def test_values_set_later_are_checked_when_the_model_is_built():
    config = InTIClipVisionConfig()
    config.compression_layers = [7, 5]
    with pytest.raises(ValueError, match="ascending order"):
        InTIClipForVideoClassification(config)


def test_from_clip_refuses_other_models(tmp_path):
    with pytest.raises(ValueError, match="must be the folder or name of a CLIP checkpoint"):
        InTIClipVisionConfig.from_clip(str(tmp_path))
    with pytest.raises(ValueError, match="clip must be a CLIP or CLIP vision checkpoint"):
        InTIClipVisionConfig.from_clip(CLIPTextConfig())
    with pytest.raises(ValueError, match="load an InTI-CLIP checkpoint with"):
        InTIClipVisionConfig.from_clip(InTIClipVisionConfig())
