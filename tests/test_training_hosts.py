"""Other libraries' video models by the scripts: training, resuming, evaluation in views, pipelines, wrong use."""

import json
import logging
import pickle
import runpy
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from transformers import (
    AutoModelForVideoClassification,
    TimesformerConfig,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    VivitConfig,
    VJEPA2Config,
    pipeline,
)

from conftest import pickle_weights, write_video
from hf_inti import hosts
from hf_inti.hosts import compress
from hf_inti.hosts.torchvision_classifier import TorchvisionForVideoClassification, TorchvisionVideoConfig
from hf_inti.training.arguments import DataArguments, ModelArguments, TrainingArguments
from hf_inti.training.checkpoints import CompressionOverride, load_classifier, load_processor
from hf_inti.training.hosts import build_host, host_processor, load_host, set_progress, with_frames
from hf_inti.training.setup import build_processor, parameter_groups
from hf_inti.training.state import TrainingState
from host_models import disturb
from torchvision_models import load


SCRIPTS = Path(__file__).parents[1] / "scripts"
NAMES = ["closes", "opens"]
SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "initializer_range": 0.3}
CONFIGS = {
    "videomae": VideoMAEConfig(image_size=32, patch_size=8, num_frames=8, intermediate_size=36, **SIZES),
    "vivit": VivitConfig(image_size=32, tubelet_size=[2, 8, 8], num_frames=8, intermediate_size=36, **SIZES),
    "vjepa2": VJEPA2Config(
        crop_size=32, patch_size=8, frames_per_clip=8, pred_hidden_size=12, pred_num_attention_heads=2, **SIZES
    ),
    "timesformer": TimesformerConfig(image_size=32, patch_size=8, num_frames=8, intermediate_size=36, **SIZES),
}
MVIT = {
    "block_setting": [
        [1, 8, 16, [], [3, 3, 3], [], [1, 2, 2]],
        [2, 16, 16, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 1, 1]],
    ],
    "residual_pool": False,
    "residual_with_cls_embed": False,
    "rel_pos_embed": False,
    "proj_after_attn": False,
    "dropout": 0.0,
}
SWIN = {"patch_size": [2, 2, 2], "embed_dim": 12, "depths": [1, 1], "num_heads": [1, 2], "window_size": [4, 4, 4]}
STTS = {"temporal": [[0, 0.5]], "num_samples": 20}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for i, name in enumerate(NAMES * 2):
        write_video(folder / name / f"{i}.mp4", seed=i)
    return folder


@pytest.fixture
def host(tmp_path):
    """A function that writes a host's configuration, without weights, and gives what --host takes."""

    def write(name: str) -> str:
        if name in CONFIGS:
            CONFIGS[name].save_pretrained(tmp_path / name)
            return f"transformers/{tmp_path / name}"
        options = MVIT if name == "MViT" else SWIN
        config = TorchvisionVideoConfig(architecture=name, options=options, image_size=32, num_frames=8)
        config.save_pretrained(tmp_path / name)
        return f"torchvision/{tmp_path / name}"

    return write


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A function that runs a script: its error, or an empty string."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def run_script(name, *arguments):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
        return end.value.code or ""

    yield run_script
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def flags_for(host: str, videos: Path, out: Path, *more) -> list:
    base = f"--train_dir {videos} --eval_dir {videos} --batch_size 2 --crop center --log_every_steps 1"
    return ["--host", host, *base.split(), "--learning_rate", "1e-3", "--output_dir", out, *more]


def options_of(method: str, options: dict) -> list[str]:
    return ["--compression", method, "--compression_options", json.dumps(options)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def arguments_for(host: str, **settings) -> ModelArguments:
    return ModelArguments(host=host, **settings)


def classify(model, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(x).logits


def clips() -> torch.Tensor:
    return torch.randn(2, 8, 3, 32, 32)


# Scripts ------------------------------------------------------------------------------------------


SCRIPTED = [
    ("videomae", "sta", {"r": 3}),
    ("vjepa2", "tome", {"r": 2}),
    ("SwinTransformer3d", "sta", {"r": [20, 0, 0]}),
    ("MViT", "stts", STTS),
]


@pytest.mark.slow
@pytest.mark.parametrize("name, method, options", SCRIPTED)
def test_train_resume_and_evaluate(name, method, options, host, videos, run, tmp_path, monkeypatch):
    started = host(name)
    if started.startswith("torchvision/"):
        load()
    flags = [*options_of(method, options), "--checkpoint_every_steps", "1", "--max_steps", "3", "--epochs", "2"]
    assert run("train", *flags_for(started, videos, tmp_path / "whole", *flags)) == ""
    record = TrainingState.record_losses

    def fail(state):
        if state.step == 2:
            raise OSError("the machine is gone")
        record(state)

    with monkeypatch.context() as broken:
        broken.setattr(TrainingState, "record_losses", fail)
        assert "the machine is gone" in run("train", *flags_for(started, videos, tmp_path / "out", *flags))
    assert run("train", *flags_for(started, videos, tmp_path / "out", *flags), "--resume") == ""
    whole, resumed = (weights(tmp_path / folder / "last") for folder in ("whole", "out"))
    assert whole.keys() == resumed.keys() and all(torch.equal(value, resumed[n]) for n, value in whole.items())
    assert json.loads((tmp_path / "out" / "run.json").read_text())["resumed_at_step"] == 1

    last = tmp_path / "out" / "last"
    views = ["--num_clips", "2", "--num_crops", "3"]
    assert run("evaluate", last, "--data_dir", videos, *views) == ""
    results = json.loads((last / "evaluation" / "results.json").read_text())
    assert results["num_videos"] == 4 and results["protocol"] == {"frames": 8, "crops": 3, "clips": 2}

    assert run("predict", last, next(videos.rglob("*.mp4"))) == ""

    saved = json.loads((last / "config.json").read_text())
    assert (saved["compression"], saved["compression_options"]) == (method, options)
    assert saved["id2label"] == {"0": "closes", "1": "opens"}
    model, processor = load_classifier(last)
    plain, x = load_classifier(last, CompressionOverride("none"))[0], clips()
    assert (classify(model, x) - classify(plain, x)).abs().max() > 1e-6
    if method != "stts":  # whose scorers are gone with it
        compress(getattr(plain, "host", plain), method, **options)
        assert torch.equal(classify(model, x), classify(plain, x))
    if name != "vjepa2":  # whose pipeline needs a processor of its own
        answers = pipeline("video-classification", model, video_processor=processor)(
            str(next(videos.rglob("*.mp4"))), num_frames=8
        )
        assert {answer["label"] for answer in answers} == set(NAMES)


@pytest.mark.slow
def test_a_host_of_transformers_is_its_librarys_checkpoint(host, videos, run, tmp_path):
    out = tmp_path / "out"
    assert run("train", *flags_for(host("vivit"), videos, out, "--max_steps", "2")) == ""
    theirs = AutoModelForVideoClassification.from_pretrained(out / "last").eval()
    x = clips()
    assert torch.equal(classify(load_host(out / "last"), x), classify(theirs, x))


@pytest.mark.slow
def test_published_weights_of_torchvision(videos, run, tmp_path, monkeypatch):
    """From torch's cache, where a download would put them."""
    load()
    from torchvision.models import get_model
    from torchvision.models.video import Swin3D_T_Weights

    torch.manual_seed(1)
    published = get_model("swin3d_t")
    file = tmp_path / "hub" / "checkpoints" / Path(Swin3D_T_Weights.DEFAULT.url).name
    file.parent.mkdir(parents=True)
    torch.save(published.state_dict(), file)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    model, processor = load_classifier("torchvision/swin3d_t", CompressionOverride("sta"), num_frames=4)
    x = torch.randn(1, 4, 3, 224, 224)
    with torch.no_grad():
        wanted = compress(published.eval(), "sta")(x.transpose(1, 2))
    assert torch.equal(classify(model, x), wanted)
    assert load_processor("torchvision/swin3d_t").num_frames == 32
    assert (processor.num_frames, processor.size["shortest_edge"], processor.crop_size["height"]) == (4, 256, 224)
    assert list(processor.image_mean) == [0.485, 0.456, 0.406] and model.config.id2label[0] == "abseiling"

    arguments = arguments_for("torchvision/swin3d_t", host_weights="KINETICS400_V1")
    model = build_host(arguments, NAMES)
    assert model.host.head.weight.shape[0] == 2
    assert torch.equal(model.host.patch_embed.proj.weight, published.patch_embed.proj.weight)
    with pytest.raises(ValueError, match="host_weights of swin3d_t must be KINETICS400_V1, DEFAULT, got 'IMAGENET'"):
        build_host(arguments_for("torchvision/swin3d_t", host_weights="IMAGENET"), NAMES)
    with pytest.raises(ValueError, match="must hold conv_proj.weight in the shape of MViT for 8"):
        TorchvisionForVideoClassification(
            TorchvisionVideoConfig(architecture="MViT", options=MVIT, image_size=32, num_frames=8)
        ).load_host_weights({}, "a file")
    torch.save(Path("no weights"), file)
    for load_published in (lambda: build_host(arguments, NAMES), lambda: load_classifier("torchvision/swin3d_t")):
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            load_published()


# What a run is built from -------------------------------------------------------------------------


def test_a_host_without_weights_starts_at_random_and_says_so(host, caplog):
    with caplog.at_level(logging.WARNING):
        model = build_host(arguments_for(host("videomae")), NAMES)
    assert "holds no weights: the host starts from random ones" in caplog.text
    assert model.config.num_labels == 2 and model.config.compression == "none"


@pytest.mark.parametrize("name", ["videomae", "MViT"])
def test_weights_and_labels_of_a_checkpoint(name, host, tmp_path):
    started = host(name)
    if name == "MViT":
        load()
    options = {"r": 3} if name == "videomae" else STTS
    method = "sta" if name == "videomae" else "stts"
    first = build_host(arguments_for(started, compression=method, compression_options=options), ["a", "b", "c"])
    first.save_pretrained(tmp_path / "first")
    started = f"{started.partition('/')[0]}/{tmp_path / 'first'}"
    same = build_host(arguments_for(started), ["c", "d", "e"])
    assert same.config.id2label[0] == "c" and same.config.compression == method
    x = clips()
    assert torch.equal(classify(same, x), classify(first, x))
    other = build_host(arguments_for(started), NAMES)  # a new head
    head = other.classifier if name == "videomae" else other.host.head[1]
    assert head.weight.shape[0] == 2
    own = first.state_dict()
    assert all(
        torch.equal(v, own[n])
        for n, v in other.state_dict().items()
        if v.shape == own[n].shape and "head" not in n and "classifier" not in n
    )
    plain = build_host(arguments_for(started, compression="none"), ["c", "d", "e"])
    assert plain.config.compression == "none" and (classify(plain, x) - classify(first, x)).abs().max() > 1e-6


def test_rates_of_scorers_and_backbone_and_the_end_of_the_noise(host):
    load()
    model = build_host(arguments_for(host("MViT"), compression="stts", compression_options=STTS), NAMES)
    training = TrainingArguments(
        output_dir="out", learning_rate=1e-6, new_module_lr_multiplier=100, head_lr_multiplier=10
    )
    rates = {id(p): group["lr"] for group in parameter_groups(model, training) for p in group["params"]}
    found = {n: rates[id(p)] for n, p in model.named_parameters()}
    wanted = hosts.parameter_groups(model.host, lr=1e-4, backbone_factor=0.01)
    for group in wanted:
        for p in group["params"]:
            if p not in set(model.host.head.parameters()):
                assert rates[id(p)] == pytest.approx(group["lr"])
    assert found["host.head.1.weight"] == pytest.approx(1e-5)

    x = clips()
    model.train()
    set_progress(model, 0)
    assert not torch.equal(model(x).logits, model(x).logits)
    set_progress(model, 1)
    assert torch.equal(model(x).logits, model(x).logits)
    set_progress(build_host(arguments_for(host("videomae")), NAMES), 0.5)  # nothing is scheduled


def test_processors(host, tmp_path):
    data = DataArguments(train_dir="videos", sampling="dense", frame_stride=2, image_mean=[0.1, 0.2, 0.3])
    started = host("vivit")
    settings = {"image_std": [0.2, 0.2, 0.4], "image_mean": [0.5, 0.5, 0.5], "size": {"shortest_edge": 36}}
    (tmp_path / "vivit" / "preprocessor_config.json").write_text(json.dumps(settings))
    config = build_host(arguments_for(started), NAMES).config
    processor = build_processor(str(tmp_path / "vivit"), config, data)
    assert (processor.sampling, processor.frame_stride, processor.num_frames) == ("dense", 2, 8)
    assert list(processor.image_std) == [0.2, 0.2, 0.4] and list(processor.image_mean) == [0.1, 0.2, 0.3]
    assert processor.size["shortest_edge"] == 36 and dict(processor.crop_size) == {"height": 32, "width": 32}
    plain = host_processor(str(tmp_path / "vivit"), config)
    assert list(plain.image_mean) == [1.5, 1.5, 1.5]  # what its own processor subtracts after rescaling
    plain.save_pretrained(tmp_path / "trained")  # as training leaves it
    again = host_processor(str(tmp_path / "trained"), config)
    assert list(again.image_mean) == [1.5, 1.5, 1.5] and again.size["shortest_edge"] == 36
    shorter = build_host(arguments_for(started, num_frames=4), NAMES).config
    changed = build_processor(str(tmp_path / "trained"), shorter, data)
    assert (changed.sampling, changed.num_frames, list(changed.image_mean)) == ("dense", 4, [0.1, 0.2, 0.3])
    squashed = build_processor(str(tmp_path / "vivit"), config, DataArguments(train_dir="videos", squash=True))
    assert dict(squashed.size) == {"height": 32, "width": 32}


@pytest.mark.parametrize("name", [*CONFIGS, "MViT", "SwinTransformer3d"])
def test_other_numbers_of_frames(name, host):
    started = host(name)
    if name not in CONFIGS:
        load()
    model = disturb(build_host(arguments_for(started), NAMES))  # some positions start at zero
    assert with_frames(model, 8) is model and with_frames(model, None) is model
    fewer = with_frames(model, 4)
    x = torch.randn(1, 4, 3, 32, 32)
    assert classify(fewer, x).shape == (1, 2)
    own = model.state_dict()
    changed = [n for n, v in fewer.state_dict().items() if v.shape != own[n].shape]
    assert len(changed) == {"vivit": 1, "timesformer": 1, "MViT": 1}.get(name, 0)
    assert all(torch.equal(v, own[n]) for n, v in fewer.state_dict().items() if n not in changed)
    if changed:  # two frames' positions become their mean
        old, new = own[changed[0]], fewer.state_dict()[changed[0]]
        if name == "vivit":
            assert torch.equal(new[:, :1], old[:, :1])
            old, new = old[0, 1:].unflatten(0, (4, 16)), new[0, 1:].unflatten(0, (2, 16))
        elif name == "timesformer":
            old, new = old[0], new[0]
        torch.testing.assert_close(new, old.unflatten(0, (-1, 2)).mean(1))
    if name != "timesformer":
        with pytest.raises(ValueError, match="num_frames must be a multiple of 2 for .*, got 3"):
            with_frames(model, 3)


# Wrong use ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"host": "timm/vit"}, "host must be transformers/ and a checkpoint .* got 'timm/vit'"),
        ({"host": "torchvision/r3d_18"}, "host must be torchvision/ and one of mvit_v1_b, .* got 'torchvision/r3d_18'"),
        ({"host": "transformers/"}, "host must be transformers/ and a checkpoint"),
        ({"adaptation": "aim"}, "adaptation must be left out with a host, got 'aim'"),
        ({"compression_layers": [1]}, "compression_layers must be left out with a host"),
        ({"drop_path_rate": 0.1}, "drop_path_rate must be left out with a host"),
        ({"compression": "inti"}, "method must be one of sta, tome, stts or None, got 'inti'"),
        ({"compression": "stts"}, "method must be sta, tome on VideoMAE, got 'stts'"),
        ({"compression": "sta", "compression_options": {"R": 3}}, "options of sta on VideoMAE must be among r, .*'R'"),
        ({"host_weights": "DEFAULT"}, "host_weights must be left out unless host is torchvision/"),
        ({"num_frames": 5}, "num_frames must be a multiple of 2 for videomae"),
    ],
)
def test_what_does_not_fit(settings, words, host):
    with pytest.raises(ValueError, match=words):
        build_host(arguments_for(**{"host": host("videomae"), **settings}), NAMES)


def test_checkpoints_that_are_no_hosts(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(
        ValueError, match="model_type of .* must be one of videomae, timesformer, vivit, vjepa2, got 'clip'"
    ):
        build_host(arguments_for(f"transformers/{tmp_path}"), NAMES)
    VideoMAEForVideoClassification(CONFIGS["videomae"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(ValueError, match="must hold videomae.encoder.layer.0"):
        build_host(arguments_for(f"transformers/{tmp_path}"), NAMES)
    pickle_weights(tmp_path)
    with pytest.raises(ValueError, match="must hold its weights as safetensors, got none"):
        build_host(arguments_for(f"transformers/{tmp_path}"), NAMES)
    with pytest.raises(ValueError, match="architecture must be one of mvit_v1_b, .*, got 'resnet'"):
        TorchvisionVideoConfig(architecture="resnet")


def test_mvit_by_its_name():
    load()
    with torch.device("meta"):
        model = build_host(arguments_for("torchvision/mvit_v1_b", compression="stts"), NAMES)
        assert model(torch.empty(1, 16, 3, 224, 224)).logits.shape == (1, 2)
        assert model.config.num_frames == 16 and len(model.host.compression.temporal) == 1
        with pytest.raises(ValueError, match="must be 16 and 224 for mvit_v1_b, got 8 and 224"):
            with_frames(model, 8)


def test_a_compression_whose_weights_are_missing(host, tmp_path):
    load()
    build_host(arguments_for(host("MViT")), NAMES).save_pretrained(tmp_path / "plain")
    with pytest.raises(
        ValueError, match="compression must be one whose weights .* holds, or that has none, got 'stts'"
    ):
        load_host(tmp_path / "plain", "stts", STTS)
    random = load_host(tmp_path / "plain", "stts", {**STTS, "choice": "random"})
    assert (classify(random, clips()) - classify(load_host(tmp_path / "plain"), clips())).abs().max() > 1e-6


def test_either_a_model_or_a_host():
    with pytest.raises(ValueError, match="model must be left out with a host"):
        ModelArguments(model="a", host="transformers/b")
    with pytest.raises(ValueError, match="host_weights must be left out without a host"):
        ModelArguments(model="a", host_weights="DEFAULT")
    assert arguments_for("transformers/MCG-NJU/videomae-base").base_model == "MCG-NJU/videomae-base"
    assert arguments_for("torchvision/mvit_v1_b").base_model is None


def test_the_scripts_refuse(host, videos, run, tmp_path):
    push = ["--push_to_hub", "me/it"]
    assert "push_to_hub must be left out with a host" in run(
        "train", *flags_for(host("videomae"), videos, tmp_path, *push)
    )
    assert "either a model or a host must be given" in run("evaluate", "--data_dir", videos)
