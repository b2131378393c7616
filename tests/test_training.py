"""What the scripts are made of: recipes, processors, optimizer groups, files that survive a kill, costs, pictures."""

import errno
import json
import os
import sys
import threading
from dataclasses import dataclass, field, fields
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState, GradientState
from torch.distributed.checkpoint import filesystem
from transformers import CLIPVisionConfig, CLIPVisionModel

from conftest import TINY, pickle_weights
from hf_inti import InTIClipForVideoClassification, InTIClipVideoProcessor, InTIClipVisionConfig
from hf_inti.data.augmentation import ClipAugmentation
from hf_inti.measure.costs import PARTS, count_costs
from hf_inti.model.video_decoding import VideoDecodingError
from hf_inti.training import files
from hf_inti.training.arguments import DataArguments, ModelArguments, TrainingArguments
from hf_inti.training.cli import parse_arguments, parse_recipe, run_script
from hf_inti.training.files import replace_folder
from hf_inti.training.run_info import check_same_run, describe_run, same_videos
from hf_inti.training.setup import (
    TrainTransform,
    build_model,
    build_optimizer,
    build_processor,
    module_kind,
    parameter_groups,
)
from hf_inti.training.state import MetricsLog, TrainingState, find_checkpoint, newest_checkpoint
from hf_inti.visualization import aggregated_frames, cascaded_weights, confusion_matrix, figure4, training_curves


ROOT = Path(__file__).parents[1]
ALL = [ModelArguments, DataArguments, TrainingArguments]
REQUIRED = ["--model", "tower", "--train_dir", "videos", "--output_dir", "out"]
L14 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
}


# Recipes ------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path):
    """A function that writes a YAML file and gives its path."""

    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_recipe_gives_values_of_the_right_kind(recipe):
    path = recipe(
        "learning_rate: 1e-3\nadam_epsilon: 1E-9\nepochs: 7\ncompression_layers: [1, 2]\nimage_mean: [5e-1, 0.5, 1]\n"
        "compression_options: {cube: dwconv, context: [cube, frame]}\nflip_label_map: {86: 87}\nflip: true\n"
        "checkpoint_every_epochs: null\nmax_grad_norm: 20\nmodel: tower of mine\n"
    )
    model, data, training = parse_recipe(ALL, [path, "--train_dir", "videos", "--output_dir", "out"])
    assert (training.learning_rate, training.adam_epsilon, training.epochs) == (1e-3, 1e-9, 7)
    assert (training.checkpoint_every_epochs, training.max_grad_norm) == (None, 20.0)
    assert model.compression_layers == [1, 2] and data.image_mean == [0.5, 0.5, 1.0]
    assert all(isinstance(value, float) for value in data.image_mean)
    assert model.compression_options == {"cube": "dwconv", "context": ["cube", "frame"]}
    assert data.flip is True and data.flip_label_map == {"86": 87} and model.model == "tower of mine"
    assert data.crop_area == [0.08, 1.0]  # a default


def test_command_line_wins(recipe):
    path = recipe("epochs: 7\nflip: true\ncompression_layers: [1, 2]\nmodel: a\ncompression_options: {cube: dwconv}\n")
    flags = ["--epochs", "3", "--flip", "false", "--compression_layers", "3"]
    flags += ["--compression_options", '{"head": "sigmoid"}']
    model, data, training = parse_recipe(ALL, [path, *REQUIRED, *flags])
    assert (training.epochs, data.flip, model.model) == (3, False, "tower")
    assert model.compression_layers == [3] and model.compression_options == {"head": "sigmoid"}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("epoch: 3", "recipe.yaml: a setting must be one that --help lists, got 'epoch'; did you mean 'epochs'?"),
        ("qqqq: 3", "recipe.yaml: a setting must be one that --help lists, got 'qqqq'; see --help."),
        ("epochs: three", "argument --epochs: invalid int value: 'three'"),
        ("epochs: 2.5", "argument --epochs: invalid int value: '2.5'"),
        ("epochs:", "recipe.yaml: epochs must have a value, got none; give one"),
        ("epochs: [1, 2]", "a setting must be given as --name value, got a stray '2'; see --help."),
        ("compression_options: [cube]", "must be a JSON mapping such as"),
        ("epochs: 0", "epochs must be at least 1, got 0"),
        ("mixed_precision: fp8", "mixed_precision must be no, bf16 or fp16, got 'fp8'"),
        ("on_bad_video: keep", "on_bad_video must be skip or error, got 'keep'"),
        ("a: [", "recipe.yaml must be valid YAML, got: "),
        ("epochs: !!python/object/apply:os.getpid []", "recipe.yaml must be valid YAML, got: could not determine"),
        ("- a", "recipe.yaml must be a mapping of settings to values, got a list"),
    ],
)
def test_wrong_recipes(text, wanted, recipe):
    with pytest.raises(ValueError) as error:
        parse_recipe(ALL, [recipe(text), *REQUIRED])
    assert wanted in str(error.value) and "\n" not in str(error.value)


def test_required_settings_may_come_from_either_place(recipe):
    with pytest.raises(ValueError, match=r"model must be set with --model or in the recipe, got neither it nor a host"):
        parse_recipe(ALL, REQUIRED[2:])
    assert parse_recipe(ALL, [recipe("model: b"), *REQUIRED[2:]])[0].model == "b"


def test_leading_values():
    @dataclass
    class Some:
        model: str = field(metadata={"help": "."})
        videos: list[str] = field(metadata={"help": "."})
        size: int = 1

    for line in ("m a b --size 2", "--model m --videos a b --size 2", "m --videos a b --size 2"):
        assert parse_arguments(Some, ["model", "videos"], "", line.split()) == Some("m", ["a", "b"], 2), line
    with pytest.raises(ValueError, match="arguments are required: --videos"):
        parse_arguments(Some, ["model", "videos"], "", ["m"])
    with pytest.raises(ValueError, match="got 'sise'; did you mean 'size'"):
        parse_arguments(Some, ["model", "videos"], "", ["m", "a", "--sise", "2"])


def test_only_what_was_given_goes_into_the_configuration():
    """So that all else stays as a checkpoint has it."""
    assert parse_recipe(ALL, REQUIRED)[0].config_options() == {}
    model = parse_recipe(ALL, [*REQUIRED, "--num_frames", "8", "--drop_path_rate", "0"])[0]
    assert model.config_options() == {"num_frames": 8, "drop_path_rate": 0.0}


@pytest.mark.parametrize(
    ("line", "wanted"),
    [("", None), ("--squash", True), ("--squash true", True), ("--squash false", False), ("--squash --flip", True)],
)
def test_squash_may_be_left_to_the_checkpoint(line, wanted):
    assert parse_recipe(ALL, [*REQUIRED, *line.split()])[1].squash is wanted


def test_help_of_every_setting():
    for c in ALL:
        for f in fields(c):
            assert f.metadata["help"].endswith(".") and f.metadata["help"][0].isupper(), f.name


def fail(error):
    raise error


def test_errors_of_scripts_are_one_line():
    for error, line in [
        (ValueError("a\nb"), "error: a b"),
        (OSError("no file"), "error: no file"),
        (
            VideoDecodingError(
                "Caught VideoDecodingError in DataLoader worker process 0.\nOriginal Traceback (most recent ...\n"
                "  File x\nhf_inti.video_decoding.VideoDecodingError: clip.mp4: is no video: truncated\n"
            ),
            "error: clip.mp4: is no video: truncated",
        ),
    ]:
        with pytest.raises(SystemExit) as end:
            run_script(lambda error=error: fail(error))
        assert end.value.code == line
    with pytest.raises(SystemExit) as end:
        run_script(lambda: 1)
    assert end.value.code == 1
    with pytest.raises(RuntimeError, match="our bug"):  # with its traceback
        run_script(lambda: fail(RuntimeError("our bug")))


@pytest.mark.parametrize("name", ["fsdp2", "deepspeed_zero2"])
def test_configurations_of_accelerate_load(name):
    config = load_config_from_file(str(ROOT / "scripts" / "accelerate" / f"{name}.yaml"))
    assert config.num_processes == 8 and config.distributed_type in ("FSDP", "DEEPSPEED")
    assert (config.fsdp_config or config.deepspeed_config)[{"fsdp2": "fsdp_version"}.get(name, "zero_stage")] == 2


def test_settings_that_split_the_weights_are_those_of_the_configuration():
    """What tests/reliability/fsdp.py sets, by the names that `accelerate launch` gives the variables."""
    config = load_config_from_file(str(ROOT / "scripts" / "accelerate" / "fsdp2.yaml")).fsdp_config
    text = (ROOT / "tests" / "reliability" / "fsdp.py").read_text()
    for name, value in config.items():
        name = name.replace("transformer_layer_cls", "transformer_cls")
        assert f'"{name.upper()}": "{str(value).lower() if isinstance(value, bool) else value}"' in text, name


# Processor and clips ------------------------------------------------------------------------------

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def options_of(processor: InTIClipVideoProcessor) -> dict:
    """All options, as they are saved."""
    return json.loads(processor.to_json_string())


@pytest.fixture
def checkpoint(tmp_path, tiny_config):
    """An InTI-CLIP checkpoint whose processor has nothing from the defaults."""
    tiny_config().save_pretrained(tmp_path)
    side = {"height": 32, "width": 32}
    InTIClipVideoProcessor(
        **IMAGENET, sampling="dense", frame_stride=3, num_frames=8, size=side, crop_size=side, resample=2
    ).save_pretrained(tmp_path)
    return str(tmp_path)


def test_an_inti_clip_checkpoint_keeps_its_processor(checkpoint, tiny_config):
    before = InTIClipVideoProcessor.from_pretrained(checkpoint)
    assert options_of(build_processor(checkpoint, tiny_config(), DataArguments())) == options_of(before)


@pytest.mark.parametrize(
    ("given", "changed"),
    [
        ({"sampling": "uniform"}, {}),
        ({"frame_stride": 2}, {}),
        ({"image_mean": [0.1, 0.2, 0.3]}, {}),
        ({"image_std": [0.5, 0.6, 0.7]}, {}),
        ({"squash": False}, {"size": {"shortest_edge": 32}}),
        ({"squash": True}, {"size": {"height": 32, "width": 32}}),
        ({"num_frames": 4}, {}),
    ],
)
def test_settings_override_the_checkpoint_s_processor(given, changed, checkpoint, tiny_config):
    config = tiny_config(num_frames=given.get("num_frames", 8))
    data = DataArguments(**{name: value for name, value in given.items() if name != "num_frames"})
    wanted = options_of(InTIClipVideoProcessor.from_pretrained(checkpoint))
    wanted |= changed or given
    assert options_of(build_processor(checkpoint, config, data)) == wanted


@pytest.mark.parametrize("squash", [None, True])
def test_processor_for_clip(squash, tmp_path, tiny_config):
    (tmp_path / "config.json").write_text('{"model_type": "clip_vision_model"}')
    data = DataArguments(squash=squash, sampling="dense", frame_stride=2)
    size = {"height": 32, "width": 32} if squash else {"shortest_edge": 32}
    wanted = InTIClipVideoProcessor(
        sampling="dense", frame_stride=2, num_frames=8, size=size, crop_size={"height": 32, "width": 32}
    )
    assert options_of(build_processor(str(tmp_path), tiny_config(), data)) == options_of(wanted)


def test_a_checkpoint_without_a_processor_is_refused(tmp_path, tiny_config):
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must hold a video processor"):
        build_processor(str(tmp_path), tiny_config(), DataArguments())


def test_a_pickle_of_weights_is_refused(tmp_path, tiny_config):
    CLIPVisionModel(CLIPVisionConfig(**TINY)).save_pretrained(tmp_path)
    pickle_weights(tmp_path)
    with pytest.raises(ValueError, match="must hold its weights as safetensors, got none; if you trust its pytorch_m"):
        build_model(ModelArguments(model=str(tmp_path), num_frames=8), ["a", "b"])


def test_training_clips_are_frames_not_pixel_values():
    """uint8 until the model: the name pixel_values is for normalised floats."""
    processor = InTIClipVideoProcessor(num_frames=4)
    transform = TrainTransform(processor, ClipAugmentation(crop_size=24), size={"shortest_edge": 32})
    video = torch.randint(256, (6, 3, 40, 60), dtype=torch.uint8)
    clip = transform(video, torch.Generator().manual_seed(0), 2)
    assert clip.keys() == {"frames", "labels"} and clip["labels"] == 2
    assert clip["frames"].dtype == torch.uint8 and clip["frames"].shape == (4, 3, 24, 24)


# Optimizer ----------------------------------------------------------------------------------------


def settings(**values):
    return TrainingArguments(output_dir="out", **values)


@pytest.mark.parametrize("decay_all", [False, True])
def test_parameter_groups(decay_all, tiny_config):
    model = InTIClipForVideoClassification(tiny_config(adaptation="uniformerv2"))
    model.vision_model.embeddings.requires_grad_(False)
    names = {parameter: name for name, parameter in model.named_parameters()}
    multipliers = {"new_module_lr_multiplier": 3.0, "head_lr_multiplier": 5.0}
    training = settings(learning_rate=1e-3, **multipliers, weight_decay=0.2, decay_norms_and_biases=decay_all)
    found = {}
    for group in parameter_groups(model, training):
        for parameter in group["params"]:
            assert names[parameter] not in found  # once
            found[names[parameter]] = (pytest.approx(group["lr"]), group["weight_decay"])
    assert set(found) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any("embeddings" in name for name in found if not name.startswith("vision_model.adaptation."))
    stage, block = "vision_model.compression.stages.0.", "vision_model.encoder.layers.1."
    some = 0.2 if decay_all else 0.0
    for name, rate, decay in [
        (block + "mlp.fc1.weight", 1e-3, 0.2),
        (block + "mlp.fc1.bias", 1e-3, some),
        (block + "layer_norm1.weight", 1e-3, some),
        ("vision_model.pre_layrnorm.weight", 1e-3, some),
        (stage + "hidden.weight", 3e-3, 0.2),
        (stage + "hidden.bias", 3e-3, some),
        (stage + "global_context.conv1.weight", 3e-3, 0.2),
        ("classifier.weight", 5e-3, 0.2),
        ("classifier.bias", 5e-3, some),
    ]:
        assert found[name] == (rate, decay), name
    for name, (rate, _) in found.items():  # every parameter of a kind alike
        kind = 3 if name.startswith(("vision_model.compression.", "vision_model.adaptation.")) else 1
        assert rate == pytest.approx(1e-3 * (5 if name.startswith("classifier.") else kind)), name
    assert any(name.startswith("vision_model.adaptation.") for name in found)
    sigmas = [name for name in found if name.endswith("sigma")]
    assert len(sigmas) == 2 and all(found[name] == (3e-3, some) for name in sigmas)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, (1.0, 1.0, 1.0)),
        ({"new_module_lr_multiplier": 3.0}, (1.0, 3.0, 1.0)),
        ({"head_lr_multiplier": 5.0}, (1.0, 1.0, 5.0)),
    ],
)
def test_multipliers_do_not_depend_on_each_other(given, wanted, tiny_config):
    model = InTIClipForVideoClassification(tiny_config())
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, settings(learning_rate=1.0, **given))
    rates = {module_kind(names[parameter]): group["lr"] for group in groups for parameter in group["params"]}
    assert (rates["tower"], rates["new"], rates["head"]) == wanted


def test_kinds_of_modules():
    for name, kind in [
        ("classifier.weight", "head"),
        ("vision_model.compression.stages.0.hidden.bias", "new"),
        ("vision_model.adaptation.local.0.weight", "new"),
        ("vision_model.encoder.layers.0.mlp.fc1.weight", "tower"),
        ("vision_model.post_layernorm.bias", "tower"),
    ]:
        assert module_kind(name) == kind, name


def test_schedule():
    """Linear from 0 over the warm-up, then a cosine to min_lr_ratio, with each group's own peak."""
    model = torch.nn.ModuleDict({"classifier": torch.nn.Linear(2, 2), "tower": torch.nn.Linear(2, 2)})
    training = settings(learning_rate=1.0, head_lr_multiplier=2.0, warmup_epochs=1.5, min_lr_ratio=0.1)
    optimizer, scheduler = build_optimizer(model, training, steps_per_epoch=4, total_steps=16)
    rates = []
    for _ in range(17):
        rates.append(sorted({group["lr"] for group in optimizer.param_groups}))
        optimizer.step()
        scheduler.step()
    cosine = [0.1 + 0.9 * (1 + np.cos(np.pi * k / 10)) / 2 for k in range(11)]
    wanted = [k / 6 for k in range(6)] + cosine
    assert rates == [pytest.approx(sorted({rate, 2 * rate})) for rate in wanted]


# Files --------------------------------------------------------------------------------------------


def write_folders(folder, **texts):
    for name, text in texts.items():
        path = folder / name.replace("_", ".")
        path.mkdir()
        (path / "file").write_text(text)


def folders(folder):
    return {path.parent.name: path.read_text() for path in folder.glob("*/file")}


@pytest.mark.skipif(sys.platform != "linux", reason="folders are exchanged on Linux only")
def test_a_replaced_folder_is_never_absent(tmp_path, monkeypatch):
    """Looked at before every call to the system, and while another thread looks all the time."""
    write_folders(tmp_path, best="0")
    seen, done = set(), threading.Event()

    def look():
        while not done.is_set():
            seen.add((tmp_path / "best" / "file").read_text())

    def check(event, *arguments):
        if not done.is_set() and event.startswith(("os.", "shutil.", "open")):
            assert os.path.exists(tmp_path / "best" / "file"), event

    sys.addaudithook(check)
    thread = threading.Thread(target=look)
    thread.start()
    try:
        for i in range(1, 50):
            write_folders(tmp_path, best_part=str(i))
            replace_folder(tmp_path / "best.part", tmp_path / "best")
            assert folders(tmp_path) == {"best": str(i)}
    finally:
        done.set()
        thread.join()
    assert seen <= set(map(str, range(50))) and len(seen) > 1


@pytest.mark.parametrize("killed_before", [1, 2])
def test_where_folders_cannot_be_exchanged_the_old_one_comes_back(killed_before, tmp_path, monkeypatch):
    write_folders(tmp_path, best="old", best_part="new")
    replace, calls = os.replace, []

    def die(*paths):
        calls.append(paths)
        if len(calls) == killed_before:
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr(files, "exchange", lambda a, b: False)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", die)
        replace_folder(tmp_path / "best.part", tmp_path / "best")
    assert folders(tmp_path)["best.part"] == "new"
    assert find_checkpoint(tmp_path, resume=True) is None  # and tidies up
    assert folders(tmp_path) == {"best": "old"}
    write_folders(tmp_path, best_part="new")
    replace_folder(tmp_path / "best.part", tmp_path / "best")
    assert folders(tmp_path) == {"best": "new"}


def test_a_checkpoint_comes_back_too(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    write_folders(tmp_path / "checkpoints", step_4_old="whole", step_4_part="half")
    for name in ("old", "part"):
        os.rename(tmp_path / "checkpoints" / f"step.4.{name}", tmp_path / "checkpoints" / f"step_4.{name}")
    assert find_checkpoint(tmp_path, resume=True).name == "step_4"
    assert folders(tmp_path / "checkpoints") == {"step_4": "whole"}


def test_newest_checkpoint_is_a_finished_one(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    for name in ("step_9", "step_10", "step_11.part", "step_12.old"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_checkpoint(tmp_path).name == "step_10"


def test_metrics_go_on_from_the_checkpoint(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(step=1, loss=0.5)
    size = log.size
    log.write(step=1, top1=0.1)
    with log.path.open("a") as file:
        file.write('{"step": 2, "lo')  # killed in the middle of a line
    MetricsLog(log.path, size).write(step=1, top1=0.1)
    assert log.path.read_text() == '{"step": 1, "loss": 0.5}\n{"step": 1, "top1": 0.1}\n'
    assert MetricsLog(log.path).size == 0  # a new run


@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield Accelerator()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_state_is_restored_in_full(tmp_path, accelerator):
    """Everything that `save` is to keep differs from a new run's, and is the same after `start`."""
    info = describe_run(settings(), num_processes=1, train_fingerprint="a", eval_fingerprint=None)

    def new_state() -> tuple[TrainingState, torch.optim.Optimizer]:
        model = torch.nn.ModuleDict({"tower": torch.nn.Linear(2, 2), "classifier": torch.nn.Linear(2, 2)})
        optimizer, scheduler = build_optimizer(model, settings(warmup_epochs=1), steps_per_epoch=4, total_steps=16)
        model, optimizer = accelerator.prepare(model, optimizer)
        return TrainingState(tmp_path, accelerator, model, scheduler, total_steps=16, ema_decay=0.5), optimizer

    state, optimizer = new_state()
    state.start(info, None)
    for _ in range(3):
        torch.nn.init.normal_(state.model["tower"].weight)
        optimizer.step()
        state.finish_step()
    state.epoch, state.batches, state.best, state.skipped = 1, 2, 0.25, 4
    state.losses = [torch.tensor(0.5), torch.tensor(0.7)]
    state.bad.add({"a.mp4": "truncated\tin the middle"})
    state.record(loss=1.5)
    state.save()
    state.record(loss=9.0)  # to be dropped: a resumed run writes it again

    accelerator.free_memory()
    again, _ = new_state()
    again.start(info, newest_checkpoint(tmp_path))
    assert (again.epoch, again.batches, again.step, again.best, again.done) == (1, 2, 3, 0.25, False)
    assert again.skipped == 4
    assert torch.equal(torch.stack(again.losses), torch.tensor([0.5, 0.7]))
    assert again.bad.reasons == {"a.mp4": "truncated\tin the middle"}
    assert again.scheduler.last_epoch == 3 and again.scheduler.get_last_lr() == state.scheduler.get_last_lr()
    for saved, restored in ((state.model, again.model), (state.ema, again.ema)):
        for name, value in saved.state_dict().items():
            assert torch.equal(value, restored.state_dict()[name]), name
    assert not torch.equal(again.ema.module["tower"].weight, again.model["tower"].weight)
    assert [json.loads(line)["loss"] for line in again.log.path.read_text().splitlines()] == [1.5]
    assert json.loads(again.run_file.read_text())["resumed_at_step"] == 3


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_faults_of_split_checkpoints_are_errors_for_people(tmp_path, accelerator, monkeypatch):
    """A full disk and a lost shard; but a bug keeps its traceback."""
    state = TrainingState(tmp_path, accelerator, torch.nn.Linear(2, 2), None, total_steps=1)
    state.log = MetricsLog(tmp_path / "metrics.jsonl")
    part = tmp_path / "checkpoints" / "step_0.part"

    def fail(stream, *arguments, **options):
        raise error

    def save(folder):
        dcp.save({"a": torch.ones(3)}, checkpoint_id=folder)

    monkeypatch.setattr(accelerator, "save_state", save)
    with monkeypatch.context() as patch:
        patch.setattr(filesystem.FileSystemWriter, "write_data", fail)
        error = OSError(errno.ENOSPC, "No space left on device")
        with pytest.raises(ValueError, match=r"step_0\.part must be writable, got: No space left on device; make room"):
            state.save()
        assert not part.exists()
        error = TypeError("a bug")
        with pytest.raises(dcp.CheckpointException, match="a bug"):
            state.save()
    save(part)
    next(part.glob("*.distcp")).unlink()
    monkeypatch.setattr(accelerator, "load_state", lambda folder: dcp.load({"a": torch.ones(3)}, checkpoint_id=folder))
    with pytest.raises(ValueError, match=r"must be a whole checkpoint, got \[Errno 2\] No such file .*; restore"):
        state._load(part)


def test_a_stray_file_among_checkpoints_stays(tmp_path, accelerator):
    model = torch.nn.Linear(2, 2)
    _, scheduler = build_optimizer(model, settings(), steps_per_epoch=4, total_steps=16)
    state = TrainingState(tmp_path, accelerator, model, scheduler, total_steps=16)
    state.log = MetricsLog(tmp_path / "metrics.jsonl")
    strays = [tmp_path / "checkpoints" / name for name in (".DS_Store", "step_x")]
    strays[0].parent.mkdir()
    for file in strays:  # the second is no folder, and cannot be removed like one
        file.touch()
    for state.step in (1, 2):
        state.save()
    assert sorted((tmp_path / "checkpoints").iterdir()) == [strays[0], tmp_path / "checkpoints" / "step_2", strays[1]]


def test_a_full_disk_as_the_run_starts(tmp_path, accelerator, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    state = TrainingState(tmp_path, accelerator, torch.nn.Linear(2, 2), None, total_steps=1)
    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(ValueError, match=r"run\.json\.part must be writable, got: No space left on device; make room"):
        state.start({}, None)


def test_steps_that_are_not_finite_are_skipped_up_to_a_limit(tmp_path, accelerator):
    model = torch.nn.Linear(2, 2)
    _, scheduler = build_optimizer(model, settings(), steps_per_epoch=4, total_steps=16)
    state = TrainingState(tmp_path, accelerator, model, scheduler, total_steps=16)
    good, nan, inf = (torch.tensor(float(value)) for value in ("1", "nan", "inf"))
    assert state.end_step([good, good], ["a.mp4", "b.mp4"], limit=2)
    assert not state.end_step([good, nan], ["a.mp4", "c.mp4"], limit=2)
    assert not state.end_step([inf], ["d.mp4"], limit=2)
    assert state.losses == [good, good] and state.skipped == 2 and state.stopped_by == 0
    with pytest.raises(ValueError) as error:
        state.end_step([nan], ["e.mp4", "c.mp4"], limit=2)
    assert str(error.value).startswith(
        "the loss must be finite, got nan at step 0 (3 such steps, max_skipped_steps is 2) on c.mp4, e.mp4; lower"
    )
    state.interruption.signal = 15
    assert state.end_step([good], [], limit=2) and state.stopped_by == 15


def test_gradients_that_are_not_finite_count_too_but_not_while_a_scale_settles(tmp_path, accelerator):
    model = torch.nn.Linear(2, 2)
    _, scheduler = build_optimizer(model, settings(), steps_per_epoch=4, total_steps=16)
    state = TrainingState(tmp_path, accelerator, model, scheduler, total_steps=16)
    inf = torch.tensor(float("inf"))
    assert state.check_gradients(torch.tensor(1.0), ["a.mp4"], limit=1) and state.skipped == 0
    assert not state.end_step([inf], ["b.mp4"], limit=1)
    with pytest.raises(ValueError) as error:
        state.check_gradients(inf, ["c.mp4"], limit=1)
    assert str(error.value).startswith(
        "the norm of the gradients must be finite, got inf at step 0 (2 such steps, max_skipped_steps is 1) on c.mp4;"
    )
    accelerator.scaler = object()  # of fp16
    assert state.check_gradients(inf, ["c.mp4"], limit=1) and state.skipped == 2


def test_losses_must_be_finite(tmp_path, accelerator):
    model = torch.nn.Linear(2, 2)
    _, scheduler = build_optimizer(model, settings(), steps_per_epoch=4, total_steps=16)
    state = TrainingState(tmp_path, accelerator, model, scheduler, total_steps=16)
    state.losses = [torch.tensor(1.0), torch.tensor(float("inf"))]
    with pytest.raises(ValueError, match="the loss must be finite, got inf at step 0; lower learning_rate"):
        state.record_losses()


def test_same_run():
    def described(model="tower", **changes):
        training = settings(**{"seed": 3, "learning_rate": 1e-3, **changes})
        shared = {"num_processes": 1, "train_fingerprint": "a", "eval_fingerprint": None}
        return describe_run(ModelArguments(model=model, compression_layers=[1, 2]), training, **shared)

    before = described()
    check_same_run(before, described(resume=True, log_every_steps=1, report_to="all", checkpoint_every_steps=3))
    for changes, wanted in [
        ({"seed": 4}, "seed must be 3 as when the run began, got 4; give that"),
        ({"learning_rate": 1e-4}, "learning_rate must be 0.001 as when the run began, got 0.0001"),
        ({"model": "other"}, "model must be 'tower' .*, got 'other'"),
    ]:
        with pytest.raises(ValueError, match=wanted):
            check_same_run(before, described(**changes))
    for name, value in [("num_processes", 2), ("train_fingerprint", "b")]:
        with pytest.raises(ValueError, match=f"{name} must be .* as when the run began, got {value!r}"):
            check_same_run(before, {**described(), name: value})


def test_other_processes_may_go_on_with_the_same_global_batch():
    def described(processes, batch_size, accumulation=1, **more):
        training = settings(batch_size=batch_size, gradient_accumulation_steps=accumulation)
        shared = {"train_fingerprint": "a", "eval_fingerprint": None}
        return describe_run(training, DataArguments(**more), num_processes=processes, **shared)

    before = described(2, 4, 3)
    for now, batches in [((2, 4, 3), 6), ((4, 2, 3), 6), ((1, 8, 3), 6), ((1, 4, 6), 12), ((3, 8, 1), 2)]:
        check_same_run(before, described(*now))
        assert same_videos(6, before, described(*now)) == batches, now
    with pytest.raises(ValueError, match="num_processes must be 2 as when the run began, got 4"):
        check_same_run(before, described(4, 4, 3))
    with pytest.raises(ValueError, match="batch_size must be 4 as when the run began, got 3"):
        check_same_run(before, described(2, 3, 3))
    with pytest.raises(ValueError, match="must be 2 and 4 until this epoch ends, got 3 and 8"):
        same_videos(2, before, described(3, 8, 1))
    stream = described(2, 4, 3, streaming=True)
    assert same_videos(0, stream, described(1, 8, 3, streaming=True)) == 0
    with pytest.raises(ValueError, match="must be 2 and 4 until this epoch ends, got 1 and 8"):
        same_videos(6, stream, described(1, 8, 3, streaming=True))


# Costs --------------------------------------------------------------------------------------------

B16 = {"patch_size": 16}
# GMACs that this reading of the paper counts, and the paper's own, which local_mhra meets to the digit.
COSTS = [
    (B16, None, None, 281.0, 281),
    (B16, [3, 5], "local_mhra", 147.3, 147), (B16, [3, 5], "dwconv", 139.9, None),
    (B16, [5, 7], "local_mhra", 182.2, 182), (B16, [5, 7], "dwconv", 174.8, None),
    (B16, [7, 9], "local_mhra", 217.1, 217), (B16, [7, 9], "dwconv", 209.7, None),
    (L14, None, None, 1296.2, None),
    (L14, [6, 10], "local_mhra", 649.5, 650), (L14, [6, 10], "dwconv", 632.2, None),
    (L14, [10, 14], "local_mhra", 811.2, 811), (L14, [10, 14], "dwconv", 793.9, None),
    (L14, [14, 18], "local_mhra", 972.9, 973), (L14, [14, 18], "dwconv", 955.6, None),
]  # fmt: skip


@pytest.mark.parametrize(("tower", "layers", "cube", "gmacs", "published"), COSTS)
def test_costs(tower, layers, cube, gmacs, published):
    options = {"compression": "none"}
    if layers is not None:
        options = {"compression_layers": layers, "compression_options": {"cube": cube}}
    costs = count_costs(InTIClipVisionConfig(**tower, **options, num_labels=400))
    assert costs["total"].gmacs == pytest.approx(gmacs, abs=0.05)
    assert published is None or costs["total"].gmacs == pytest.approx(published, abs=0.51)
    assert sum(costs[part].macs for part in PARTS) == costs["total"].macs
    # The rest are the two norms around the blocks.
    width = tower.get("hidden_size", 768)
    assert costs["total"].parameters - sum(costs[part].parameters for part in PARTS) == 4 * width
    assert (costs["compression"].macs > 0) == (layers is not None)


def test_costs_by_hand():
    """One block's matrices and attention products, and the embedding, at 3 frames of 2 x 2 patches."""
    D, M, N, T = 16, 40, 4, 3
    sizes = {"hidden_size": D, "intermediate_size": M, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = InTIClipVisionConfig(**sizes, image_size=16, patch_size=8, num_frames=6, compression="none", num_labels=5)
    costs = count_costs(config, num_frames=T)
    L = N + 1
    assert costs["patch embedding"].macs == T * N * D * 3 * 8 * 8
    assert costs["blocks"].macs == T * (L * (4 * D * D + 2 * D * M) + 2 * L * L * D)
    assert costs["head"] == (5 * D, 5 * D + 5)
    assert costs["compression"] == costs["adaptation"] == (0, 0)
    assert count_costs(config)["blocks"].macs == 2 * costs["blocks"].macs  # the 6 of the configuration


def test_costs_refuse_frames_that_cannot_be_halved(tiny_config):
    with pytest.raises(ValueError, match="must be a multiple of 4 .* got 6; the nearest that work: 4 and 8"):
        count_costs(tiny_config(), num_frames=6)


# Pictures -----------------------------------------------------------------------------------------


def stage_weights(B, T, L, stages):
    """Of each stage, random alpha and beta that sum to 1."""
    return tuple(torch.rand(B, T // 2 ** (s + 1), L, 2).softmax(-1) for s in range(stages))


def test_cascaded_weights_against_a_loop():
    B, T, L = 2, 8, 5
    stages = stage_weights(B, T, L, 3)
    weights = cascaded_weights(stages)
    assert weights.shape == (B, T, L)
    for b in range(B):
        for t in range(T):
            for token in range(L):
                product, frame = 1.0, t
                for stage in stages:
                    product *= stage[b, frame // 2, token, frame % 2].item()
                    frame //= 2
                assert weights[b, t, token].item() == pytest.approx(product, rel=1e-5)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_weights_of_a_merged_frame_sum_to_1(stages):
    weights = cascaded_weights(stage_weights(2, 8, 5, stages))
    sums = weights.unflatten(1, (-1, 2**stages)).sum(2)
    torch.testing.assert_close(sums, torch.ones_like(sums))


def test_weights_of_a_model_rebuild_its_tokens(tiny_config):
    """Before the first block and with sigma at 0, as it starts, merged tokens are the sums that the weights say."""
    model = InTIClipForVideoClassification(tiny_config(compression_layers=[0])).eval()
    torch.nn.init.normal_(model.vision_model.compression.stages[0].logits.weight)
    merged = []
    model.vision_model.encoder.layers[0].register_forward_pre_hook(lambda _, inputs: merged.append(inputs[0]))
    with torch.no_grad():
        out = model(torch.randn(1, 8, 3, 32, 32), output_hidden_states=True, output_interpolation_weights=True)
    weights = cascaded_weights(out.interpolation_weights)
    assert weights.shape == (1, 8, 17) and weights.std() > 0.01
    sums = (weights[..., None] * out.hidden_states[0]).unflatten(1, (4, 2)).sum(2)
    torch.testing.assert_close(merged[0], sums)


def test_no_weights_no_figure():
    with pytest.raises(ValueError, match="Figure 4 needs a model whose compression is inti"):
        cascaded_weights(())


def test_aggregated_frames_against_a_loop():
    T, merged, H, W, rows, columns = 6, 2, 8, 12, 2, 3
    frames, weights = torch.rand(T, 3, H, W), torch.rand(T, rows, columns)
    wanted = torch.zeros(merged, 3, H, W)
    for t in range(T):
        for y in range(H):
            for x in range(W):
                weight = weights[t, y * rows // H, x * columns // W]
                wanted[t * merged // T, :, y, x] += weight * frames[t, :, y, x]
    torch.testing.assert_close(aggregated_frames(frames, weights, merged), wanted)


def dark_columns(picture):
    """The x of all columns that hold nearly black pixels."""
    return np.flatnonzero((picture[..., :3].max(-1) < 0.1).any(0))


def test_figure4_is_drawn_and_centred(tmp_path):
    """Black frames of weight 0: the aggregated frames stand below the middle of their groups of 4."""
    figure4(torch.zeros(8, 3, 16, 16), torch.zeros(8, 4, 4), merged=2, path=tmp_path / "figure.png")
    picture = matplotlib.image.imread(tmp_path / "figure.png")[:, :-150]  # without the colour bar
    third = len(picture) // 3
    frames, below = dark_columns(picture[third // 2 : third // 2 + 10]), dark_columns(picture[-third // 2 :][:10])
    assert len(below) == pytest.approx(len(frames) / 4, rel=0.1)  # 2 of them, as large as the 8 frames
    first, last = frames[frames < np.median(frames)], frames[frames > np.median(frames)]
    middle = (below.min() + below.max()) / 2
    for group, shown in ((first, below[below < middle]), (last, below[below > middle])):
        assert np.mean(shown) == pytest.approx(np.mean(group), abs=3)


def test_confusion_matrix_is_drawn(tmp_path):
    confusion_matrix([[3, 1], [0, 0]], ["walks", "runs"], tmp_path / "a.png")  # no video of the second class
    confusion_matrix([[0, 4], [0, 0]], ["walks", "runs"], tmp_path / "b.png")
    a, b = (matplotlib.image.imread(tmp_path / name) for name in ("a.png", "b.png"))
    assert a.shape == b.shape and a.std() > 0.05 and np.abs(a - b).max() > 0.5


def test_training_curves_are_drawn(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(1, 5):
        log.write(step=step, epoch=0, loss=1 / step)
    training_curves({"a": log.path}, tmp_path / "before.png")
    log.write(step=4, epoch=1, eval_top1=0.5)
    log.write(step=8, epoch=2, eval_top1=0.9)
    training_curves({"a": log.path}, tmp_path / "after.png")
    before, after = (matplotlib.image.imread(tmp_path / name) for name in ("before.png", "after.png"))
    assert before.std() > 0.05 and np.abs(before - after).max() > 0.5
