"""The scripts from end to end, on small real videos: training, resuming, several processes, wrong use."""

import csv
import errno
import itertools
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import av
import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed
from safetensors.torch import load_file
from transformers import AutoModelForVideoClassification, CLIPVisionConfig, CLIPVisionModel, Trainer
from transformers import TrainingArguments as HFTrainingArguments
from transformers.models.auto.video_processing_auto import AutoVideoProcessor

from forks import ALL, run_in_a_fork
from hf_inti import InTIClipForVideoClassification, InTIClipVideoProcessor
from hf_inti.training import setup
from hf_inti.training.arguments import ModelArguments
from hf_inti.training.setup import build_model
from hf_inti.training.state import TrainingState


pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).parents[1] / "scripts"
CLASSES = ["blue", "green", "red"]
VARIABLES = {"PYTHONPATH": str(SCRIPTS.parent), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def write_clip(path, colour, frames=8, seed=0):
    """32 x 32 pixels of one colour that darkens, brighter to the left, with noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for t in range(frames):
            image = rng.integers(0, 30, (32, 32, 3))
            image[..., colour] += 150 - 10 * t + np.arange(32, 0, -1)[None]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image.astype(np.uint8), format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """train/ with 4 videos of each of 3 classes, test/ with 3."""
    root = tmp_path_factory.mktemp("videos")
    for split, count in (("train", 4), ("test", 3)):
        for k, name in enumerate(CLASSES):
            for i in range(count):
                write_clip(root / split / name / f"{i}.mp4", 2 - k, frames=8 + i, seed=10 * k + i)
    return root


@pytest.fixture(scope="session")
def tower(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    path = tmp_path_factory.mktemp("tower")
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=16)).save_pretrained(path)
    return path


class Ended(NamedTuple):
    code: int
    out: str
    error: str  # what sys.exit was given to print


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """A function that runs a script in this process, as `python scripts/name.py arguments` would."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(sys, "path", sys.path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums depend on it in their last bits

    def run_script(name, *arguments):
        forget_accelerator()
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
        code = end.value.code
        error = code if isinstance(code, str) else ""
        return Ended(1 if error else code or 0, capsys.readouterr().out, error)

    yield run_script
    forget_accelerator()
    torch.set_num_threads(threads)


def forget_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def train(run, data, tower):
    """A function that trains for a few steps: (output_dir, extra flags) -> Ended."""

    def train_script(output_dir, *extra):
        base = f"--model {tower} --num_frames 4 --compression_layers 1 --train_dir {data} --batch_size 4 --resize 32"
        rates = "--learning_rate 2e-3 --min_lr_ratio 1 --weight_decay 0 --crop center --log_every_steps 1"
        return run("train", *f"{base} {rates} --output_dir {output_dir}".split(), *extra)

    return train_script


@pytest.fixture(scope="session")
def trained(tmp_path_factory, data, tower):
    """A trained model's folder; also what training printed."""
    folder = tmp_path_factory.mktemp("trained")
    flags = f"--model {tower} --num_frames 4 --compression_layers 1 --train_dir {data} --eval_dir {data}".split()
    flags += f"--output_dir {folder} --epochs 4 --batch_size 4 --learning_rate 2e-3 --log_every_steps 2".split()
    status, out, error = run_in_a_fork(SCRIPTS / "train.py", *flags, imported=ALL, **VARIABLES)
    assert status == 0, error
    return folder, out


def python(*command, cwd=None, **variables):
    command = [sys.executable, *map(str, command)]
    environment = {**os.environ, **VARIABLES, **variables}
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=900)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_weights(a, b, **tolerance):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys() and len(a) > 40
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], **(tolerance or {"rtol": 0, "atol": 0}), msg=name)


def distance(a, b):
    a, b = weights(a), weights(b)
    return max((a[name] - b[name]).abs().max().item() for name in a)


# Training -----------------------------------------------------------------------------------------


def test_training_learns_and_leaves_all_files(trained, data, tower):
    folder, printed = trained
    assert sorted(p.name for p in folder.iterdir()) == [
        "bad_videos.json", "best", "checkpoints", "last", "metrics.jsonl", "run.json",
    ]  # fmt: skip
    lines = lines_of(folder / "metrics.jsonl")
    losses = [line for line in lines if "loss" in line]
    scores = [line for line in lines if "eval_top1" in line]
    assert [line["step"] for line in losses] == [2, 4, 6, 8, 10, 12]
    assert [(line["step"], line["epoch"]) for line in scores] == [(3, 1), (6, 2), (9, 3), (12, 4)]
    assert losses[-1]["loss"] < 0.9 < losses[0]["loss"] < 1.3  # ln 3 = 1.1
    assert scores[-1]["eval_top1"] == 1.0 and scores[-1]["eval_num_unreadable"] == 0
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step_12"]

    for name in ("best", "last"):
        model = AutoModelForVideoClassification.from_pretrained(folder / name)
        assert isinstance(model, InTIClipForVideoClassification)
        assert model.config.id2label == dict(enumerate(CLASSES)) and model.config.label2id["red"] == 2
        assert model.config.compression_layers == [1] and model.config.num_frames == 4
        processor = AutoVideoProcessor.from_pretrained(folder / name)
        assert isinstance(processor, InTIClipVideoProcessor)
        assert (processor.num_frames, dict(processor.crop_size)["height"]) == (4, 32)
        assert (folder / name / "run.json").read_text() == (folder / "run.json").read_text()
    logits = model(**processor(str(data / "test" / "green" / "0.mp4"))).logits
    assert model.config.id2label[logits.argmax().item()] == "green"

    run = json.loads((folder / "run.json").read_text())
    assert run["command"][0].endswith("train.py") and f"{folder}" in run["command"]
    assert run["versions"]["torch"] == torch.__version__ and run["versions"]["python"].startswith("3.")
    assert run["arguments"]["TrainingArguments"]["seed"] == 0
    assert run["arguments"]["TrainingArguments"]["learning_rate"] == 2e-3
    assert run["arguments"]["DataArguments"]["train_dir"] == str(data)
    assert run["arguments"]["ModelArguments"]["model"] == str(tower)
    assert run["config"]["compression"] == "inti" and run["num_processes"] == 1 and run["train_fingerprint"]
    assert json.loads((folder / "bad_videos.json").read_text()) == {"count": 0, "videos": {}}

    shown = printed.splitlines()
    assert len(shown) == 5 and [line[:8] for line in shown[:4]] == [f"epoch {i}:" for i in (1, 2, 3, 4)]
    assert shown[-1].startswith(f"Trained 12 steps; the model is in {folder / 'last'}, the best (top-1 100.0%) in")


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    return tmp_path_factory.mktemp("two_steps")


@pytest.fixture
def plain(two_steps, train):
    """Two plain steps: what options are compared with."""
    if not (two_steps / "last").exists():
        assert train(two_steps, "--max_steps", "2").code == 0
    return two_steps


@pytest.mark.parametrize(
    "flags",
    [
        "--mixup_alpha 1", "--cutmix_alpha 1", "--label_smoothing 0.5", "--flip", "--grayscale_prob 1",
        "--color_jitter_prob 1", "--random_erasing_prob 1", "--rand_augment rand-m9-n2-mstd0.5-inc1", "--repeats 2",
        "--crop random_resized", "--sampling dense --frame_stride 1", "--classifier_dropout 0.5", "--seed 1",
        "--drop_path_rate 0.9", "--mixed_precision bf16", "--max_grad_norm 0.1", "--image_mean 0.4 0.4 0.4",
        "--new_module_lr_multiplier 2", "--head_lr_multiplier 2",
        "--compression_options {\"cube\":\"dwconv\"}", "--decay_norms_and_biases",
        "--ema_decay 0.9", "--compression none", "--warmup_epochs 1", "--weight_decay 0.5",
    ],
)  # fmt: skip
def test_options_reach_the_training(flags, plain, train, tmp_path):
    if flags == "--decay_norms_and_biases":
        flags += " --weight_decay 0.5"
    assert train(tmp_path / "out", "--max_steps", "2", *flags.split()).code == 0
    changed, before = weights(tmp_path / "out" / "last"), weights(plain / "last")
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in changed.values())
    assert any(not torch.equal(changed[name], before[name]) for name in changed.keys() & before.keys())


@pytest.mark.parametrize(
    ("flags", "tolerance"),
    [
        ("--num_workers 1", {}),
        ("--cache_frames", {}),
        ("--activation_checkpointing", {"rtol": 0, "atol": 1e-5}),
    ],
)
def test_how_it_is_computed_changes_nothing(flags, tolerance, plain, train, tmp_path):
    assert train(tmp_path / "out", "--max_steps", "2", *flags.split()).code == 0
    assert_same_weights(tmp_path / "out" / "last", plain / "last", **tolerance)


def test_average_of_weights_is_what_is_saved(plain, train, data, tmp_path):
    train(tmp_path / "one", "--max_steps", "1")
    train(tmp_path / "average", "--max_steps", "2", "--ema_decay", "0.75", "--eval_dir", str(data))
    first, second = weights(tmp_path / "one" / "last"), weights(plain / "last")
    for name, value in weights(tmp_path / "average" / "last").items():
        torch.testing.assert_close(value, 0.75 * first[name] + 0.25 * second[name], rtol=0, atol=1e-6)
    assert_same_weights(tmp_path / "average" / "best", tmp_path / "average" / "last")


def test_clipping_holds_the_weights(plain, train, tmp_path, tower):
    """AdamW divides by the gradient's size, except where epsilon is larger than a clipped gradient."""
    flags = ("--max_steps", "2", "--adam_epsilon", "1")
    train(tmp_path / "free", *flags)
    train(tmp_path / "held", *flags, "--max_grad_norm", "1e-6")
    set_seed(0)
    start = build_model(ModelArguments(model=str(tower), num_frames=4, compression_layers=[1]), CLASSES)
    start.save_pretrained(tmp_path / "start")
    assert distance(tmp_path / "held" / "last", tmp_path / "start") < 1e-8
    assert distance(tmp_path / "free" / "last", tmp_path / "start") > 1e-4


@pytest.fixture
def gradients(monkeypatch):
    """A function that makes train.py's gradients infinite in these backward passes, counted from 1."""

    def make_infinite(*passes):
        calls = itertools.count(1)

        def build(*arguments):
            model = build_model(*arguments)
            model.classifier.bias.register_hook(lambda g: torch.full_like(g, torch.inf) if next(calls) in passes else g)
            return model

        monkeypatch.setattr(setup, "build_model", build)

    return make_infinite


@pytest.mark.parametrize("flags", ["", "--max_grad_norm 1", "--gradient_accumulation_steps 2 --batch_size 2"])
def test_a_step_with_infinite_gradients_is_skipped(flags, gradients, train, tmp_path):
    flags = f"--max_steps 4 {flags}".split()
    gradients(3)
    done = train(tmp_path / "out", *flags)
    assert done.code == 0 and "1 steps were skipped, because their loss or gradients were not finite." in done.out
    assert all(value.isfinite().all() for value in weights(tmp_path / "out" / "last").values())
    gradients(*range(3, 99))
    stopped = train(tmp_path / "stopped", *flags, "--max_skipped_steps", "1")
    assert stopped.code == 1 and stopped.error.startswith("error: the norm of the gradients must be finite, got inf at")
    assert ".mp4; lower learning_rate" in stopped.error and not (tmp_path / "stopped" / "last").exists()


@pytest.mark.parametrize("flags", ["--checkpoint_every_steps 1", "--ema_decay 0.5", ""])
def test_ruined_weights_are_not_saved(flags, train, data, tmp_path, monkeypatch):
    """The last update overflows: in the middle of an epoch, or as training ends."""
    finish, last = TrainingState.finish_step, 5 if "steps" in flags else 6

    def overflow(state):
        if state.step == last - 1:
            torch.nn.init.constant_(state.model.classifier.weight, torch.inf)
        finish(state)

    monkeypatch.setattr(TrainingState, "finish_step", overflow)
    out = tmp_path / "out"
    stopped = train(out, "--epochs", "2", "--eval_dir", str(data), *flags.split())
    assert stopped.code == 1 and stopped.error.startswith(
        f"error: the weights must be finite to be saved, got NaN or infinity after step {last}; lower learning_rate"
    )
    (left,) = (out / "checkpoints").iterdir()
    assert left.name == f"step_{4 if 'steps' in flags else 3}" and str(left) in stopped.error
    assert not (out / "last").exists()
    for folder in (left, out / "best"):
        assert all(value.isfinite().all() for value in weights(folder).values())


def test_flip_that_swaps_classes(train, tmp_path):
    train(tmp_path / "flip", "--max_steps", "2", "--flip")
    train(tmp_path / "swap", "--max_steps", "2", "--flip", "--flip_label_map", '{"red": "green"}')
    assert distance(tmp_path / "flip" / "last", tmp_path / "swap" / "last") > 1e-5
    wrong = train(tmp_path / "wrong", "--max_steps", "2", "--flip", "--flip_label_map", '{"red": "white"}')
    assert wrong.code == 1 and "names or numbers of the 3 classes, got 'white'" in wrong.error


def test_all_at_once(train, data, tmp_path):
    flags = "--cache_frames --num_workers 1 --gradient_accumulation_steps 2 --mixup_alpha 0.8 --cutmix_alpha 1 "
    flags += "--label_smoothing 0.1 --ema_decay 0.5 --activation_checkpointing --mixed_precision bf16 --flip "
    flags += (
        "--max_grad_norm 1 --repeats 2 --flip_label_map {} --drop_path_rate 0.1 --classifier_dropout 0.1 --epochs 2"
    )
    done = train(tmp_path / "out", "--eval_dir", str(data), *flags.split())
    assert done.code == 0 and "Trained 4 steps" in done.out  # 3 batches in each epoch: 2 steps
    assert [line["step"] for line in lines_of(tmp_path / "out" / "metrics.jsonl")] == [1, 2, 2, 3, 4, 4]


def test_streaming(train, data, tmp_path):
    flags = ("--streaming", "--max_steps", "5", "--batch_size", "5", "--epochs", "5", "--warmup_epochs", "2")
    done = train(tmp_path / "out", *flags, "--eval_dir", str(data))
    assert done.code == 0 and "Trained 5 steps" in done.out
    lines = lines_of(tmp_path / "out" / "metrics.jsonl")
    losses = [line for line in lines if "loss" in line]
    assert [line["epoch"] for line in losses] == [0, 0, 0, 1, 1]  # 12 videos are batches of 5, 5 and 2
    # Warm-up is a share of the steps: 2 of 5.
    rates = [line["learning_rate"] for line in losses]
    assert rates == pytest.approx([1e-3, 2e-3, 2e-3, 2e-3, 2e-3])
    assert [line["step"] for line in lines if "eval_top1" in line] == [3, 5]


def test_goes_on_from_our_own_checkpoint(run, trained, data, tmp_path):
    """What is not given stays as the checkpoint has it."""
    flags = f"--model {trained[0] / 'best'} --train_dir {data} --output_dir {tmp_path / 'out'} --max_steps 1".split()
    assert run("train", *flags, "--learning_rate", "0").code == 0
    config = json.loads((tmp_path / "out" / "last" / "config.json").read_text())
    assert (config["num_frames"], config["compression_layers"]) == (4, [1])
    assert_same_weights(tmp_path / "out" / "last", trained[0] / "best")


def test_a_checkpoint_s_processor_is_kept(run, trained, data, tmp_path):
    """A checkpoint trained as a K400 recipe says, with ImageNet's mean, or with dense sampling; flags still win."""
    start = tmp_path / "start"
    shutil.copytree(trained[0] / "best", start)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    own = InTIClipVideoProcessor.from_pretrained(
        start, image_mean=mean, image_std=std, sampling="dense", frame_stride=2, resample=2
    )
    own.save_pretrained(start)
    flags = f"--model {start} --train_dir {data} --eval_dir {data} --max_steps 1".split()
    assert run("train", *flags, "--output_dir", tmp_path / "kept").code == 0
    changes = "--sampling uniform --image_mean 0.4 0.5 0.6 --num_frames 2 --squash".split()
    assert run("train", *flags, *changes, "--output_dir", tmp_path / "changed").code == 0
    wanted = json.loads(own.to_json_string())
    for name in ("best", "last"):
        kept, changed = (InTIClipVideoProcessor.from_pretrained(tmp_path / f / name) for f in ("kept", "changed"))
        assert json.loads(kept.to_json_string()) == wanted
        size = {"height": 32, "width": 32}
        different = {"sampling": "uniform", "image_mean": [0.4, 0.5, 0.6], "num_frames": 2, "size": size}
        assert json.loads(changed.to_json_string()) == {**wanted, **different}


def test_tracker(train, tmp_path):
    pytest.importorskip("tensorboard")
    assert train(tmp_path / "out", "--max_steps", "1", "--report_to", "tensorboard").code == 0
    assert list((tmp_path / "out").rglob("*tfevents*"))


def test_equals_the_trainer_of_transformers(train, tower, tmp_path):
    """One step of two accumulated batches: cross-entropy is the mean over both."""
    videos = []
    for k, name in enumerate(("a", "b", "c", "d")):  # as many frames as are sampled: no choice
        write_clip(tmp_path / "data" / name / "0.mp4", k % 3, frames=4, seed=k)
        videos.append(str(tmp_path / "data" / name / "0.mp4"))
    flags = "--gradient_accumulation_steps 2 --batch_size 2 --max_steps 1 --adam_epsilon 1e-3"
    assert train(tmp_path / "ours", "--train_dir", str(tmp_path / "data"), *flags.split()).code == 0
    loss = lines_of(tmp_path / "ours" / "metrics.jsonl")[0]["loss"]

    forget_accelerator()
    set_seed(0)
    model = build_model(ModelArguments(model=str(tower), num_frames=4, compression_layers=[1]), ["a", "b", "c", "d"])
    processor = InTIClipVideoProcessor.from_pretrained(tmp_path / "ours" / "last")
    items = [{"pixel_values": processor(v)["pixel_values"][0], "labels": k} for k, v in enumerate(videos)]
    arguments = HFTrainingArguments(
        output_dir=str(tmp_path / "theirs"), use_cpu=True, remove_unused_columns=False, label_names=["labels"],
        per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=1, learning_rate=2e-3,
        lr_scheduler_type="constant", weight_decay=0.0, adam_epsilon=1e-3, max_grad_norm=0.0, report_to=[],
        save_strategy="no", logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=items)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, abs=1e-6)
    model.save_pretrained(tmp_path / "theirs" / "last")
    assert_same_weights(tmp_path / "ours" / "last", tmp_path / "theirs" / "last", rtol=0, atol=1e-6)


# Resuming -----------------------------------------------------------------------------------------

# Runs train.py in forked children, each killed where it says, then to its end. A fork spares the imports.
KILLER = """
import json, os, runpy, signal, sys
from pathlib import Path
import accelerate, torch
from hf_inti.training import state as training

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def die_when_logged(count):  # the lines of this process, counted from 1
    write, calls = training.MetricsLog.write, []
    def replacement(self, **values):
        write(self, **values)
        calls.append(values)
        if len(calls) == count:
            die()
    training.MetricsLog.write = replacement

def die_in_checkpoint(count):  # with half of a checkpoint on disk
    save, calls = accelerate.Accelerator.save_state, []
    def replacement(self, folder, **options):
        calls.append(folder)
        save(self, folder, **options)
        if len(calls) == count:
            (Path(folder) / "optimizer.bin").write_bytes(b"half")
            die()
    accelerate.Accelerator.save_state = replacement

def die_before_rename(count):  # with all of a checkpoint on disk, under the name of an unfinished one
    replace, calls = training.replace_folder, []
    def replacement(finished, target):
        if target.name.startswith("step_"):
            calls.append(target)
            if len(calls) == count:
                die()
        replace(finished, target)
    training.replace_folder = replacement

deaths, flags = json.loads(sys.argv[1]), sys.argv[2:]
for name, count in deaths:
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        globals()[name](count)
        sys.argv = ["train.py", *flags]
        runpy.run_path(os.environ["TRAIN"], run_name="__main__")
    _, status = os.waitpid(child, 0)
    found = sorted(p.name for p in Path(flags[flags.index("--output_dir") + 1]).glob("checkpoints/*"))
    print(os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, *found, flush=True)
"""


def kill(folder, tower, deaths, flags):
    """Train in folder/killed, killed by each of `deaths`; returns the names of the checkpoints left by each."""
    settings = f"--model {tower} --num_frames 4 --compression_layers 1 --resize 32 --learning_rate 2e-3 "
    settings += f"--min_lr_ratio 1 --weight_decay 0 --output_dir {folder / 'killed'} --resume"
    (folder / "killer.py").write_text(KILLER)
    flags = [*settings.split(), *flags]
    variables = {**VARIABLES, "TRAIN": str(SCRIPTS / "train.py")}
    _, out, error = run_in_a_fork(folder / "killer.py", json.dumps(deaths), *flags, imported=ALL, **variables)
    reports = [line for line in out.splitlines() if line.startswith(("True", "False"))]
    assert len(reports) == len(deaths) and all(line.startswith("True") for line in reports), (reports, error)
    return reports


RANDOM = "--gradient_accumulation_steps 2 --batch_size 2 --epochs 3 --classifier_dropout 0.5 --drop_path_rate 0.5 "
RANDOM += "--mixup_alpha 1 --cutmix_alpha 1 --ema_decay 0.7 --crop random_resized --flip --color_jitter_prob 0.5 "
RANDOM += "--rand_augment rand-m7-n2-mstd0.5-inc1 --random_erasing_prob 0.3 --log_every_steps 2"


@pytest.mark.parametrize("workers", [0, 1])
def test_killed_and_resumed_is_as_if_never_stopped(workers, train, data, tower, tmp_path):
    """Bit for bit: weights of best and last, and metrics. 3 steps in each epoch, 9 in all."""
    broken = tmp_path / "data" / "train" / "red" / "broken.mp4"
    shutil.copytree(data, tmp_path / "data")
    broken.write_bytes(b"no video")  # 13 videos: 6 batches of 2, one video is left over
    flags = [*RANDOM.split(), "--eval_dir", str(data), "--train_dir", str(tmp_path / "data")]
    flags += ["--num_workers", str(workers)]
    never_stopped = [*flags, "--checkpoint_every_steps", "2" if workers else "3"]
    assert train(tmp_path / "whole", *never_stopped).code == 0

    if workers:  # checkpoints after steps 2, 4, 6, 8 and after the epochs, at 3, 6 and 9
        deaths = [("die_when_logged", 3), ("die_in_checkpoint", 1), ("die_before_rename", 2), ("die_when_logged", 4)]
    else:  # at 3 and 6: twice, before the evaluation and after it
        deaths = [("die_when_logged", 1), ("die_when_logged", 2), ("die_in_checkpoint", 2), ("die_before_rename", 1)]
    left = kill(tmp_path, tower, deaths, never_stopped)
    assert sum(".part" in names for names in left) == 2
    (tmp_path / "killed" / "best.old").mkdir(exist_ok=True)
    assert train(tmp_path / "killed", *never_stopped, "--resume").code == 0
    for name in ("best", "last"):
        assert_same_weights(tmp_path / "whole" / name, tmp_path / "killed" / name)
    whole, again = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "killed"))
    assert whole == again and len(whole.splitlines()) == 5 + 3
    whole, again = ((tmp_path / name / "bad_videos.json").read_text() for name in ("whole", "killed"))
    assert whole == again and json.loads(whole)["count"] == 1


def test_stream_resumes(train, data, tower, tmp_path):
    flags = "--streaming --max_steps 6 --batch_size 5 --flip --checkpoint_every_steps 2".split()
    assert train(tmp_path / "whole", *flags).code == 0
    same = f"--train_dir {data} --crop center --log_every_steps 1".split()
    kill(tmp_path, tower, [("die_when_logged", 5)], same + flags)
    assert [p.name for p in (tmp_path / "killed" / "checkpoints").iterdir()] == ["step_4"]
    assert train(tmp_path / "killed", *flags, "--resume").code == 0
    assert_same_weights(tmp_path / "whole" / "last", tmp_path / "killed" / "last")
    assert lines_of(tmp_path / "whole" / "metrics.jsonl") == lines_of(tmp_path / "killed" / "metrics.jsonl")


class Killed(BaseException):
    """Nothing catches it."""


STREAM = "--streaming --max_steps 4 --batch_size 5 --gradient_accumulation_steps 2"


@pytest.mark.parametrize(
    ("flags", "at", "signalled", "left"),
    [  # 9 batches in an evaluation
        ("--epochs 2", 4, False, "step_3"),
        ("--epochs 2", 13, False, "step_6"),
        ("--epochs 2", 4, True, "step_3"),
        ("--epochs 2 --checkpoint_every_epochs 3", 9, True, "step_3"),
        ("--max_steps 5", 13, True, "step_5"),  # in the middle of an epoch
        (STREAM, 4, True, "step_2"),  # in the middle of a step, which is then finished
    ],
)
def test_an_evaluation_that_was_stopped_is_done_again(flags, at, signalled, left, train, data, tmp_path, monkeypatch):
    """The end is that of a run that was not, bit for bit."""
    flags = [*flags.split(), *f"--eval_dir {data} --eval_batch_size 1 --ema_decay 0.5".split()]
    assert train(tmp_path / "whole", *flags).code == 0
    forward, calls = InTIClipForVideoClassification.forward, []

    def stop(self, *arguments, **options):
        if not torch.is_grad_enabled():
            calls.append(1)
            if len(calls) == at and not signalled:
                raise Killed
            if len(calls) == at:
                signal.raise_signal(signal.SIGTERM)
        return forward(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(InTIClipForVideoClassification, "forward", stop)
        if signalled:
            assert train(tmp_path / "stopped", *flags).code == 143
        else:
            with pytest.raises(Killed):
                train(tmp_path / "stopped", *flags)
    assert len(calls) == (at if "--streaming" not in flags else 9)
    assert [path.name for path in (tmp_path / "stopped" / "checkpoints").iterdir()] == [left]
    assert train(tmp_path / "stopped", *flags, "--resume").code == 0
    for name in ("best/model.safetensors", "last/model.safetensors", "metrics.jsonl", "bad_videos.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes(), name


def test_resuming_refuses_another_run(train, data, tmp_path):
    out = tmp_path / "out"
    assert train(out, "--max_steps", "2", "--checkpoint_every_steps", "1").code == 0
    again = train(out, "--max_steps", "2")
    assert again.code == 1 and again.error == (
        f"error: output_dir must be a folder without a run, got {out}; resume that run with --resume, or choose "
        "another folder."
    )
    for flags, name in (
        ("--seed 1", "seed must be 0 as when the run began, got 1"),
        ("--learning_rate 1e-5", "learning_rate must be 0.002 as when the run began, got 1e-05"),
        ("--crop random", "crop must be 'center' as when the run began, got 'random'"),
        ("--compression none", "compression must be None as when the run began, got 'none'"),
        (f"--train_dir {data / 'test'}", "train_dir must be"),
    ):
        refused = train(out, "--max_steps", "2", "--checkpoint_every_steps", "1", "--resume", *flags.split())
        assert refused.code == 1 and refused.error.startswith(f"error: {name}"), refused
    before = lines_of(out / "metrics.jsonl")
    assert train(out, "--max_steps", "2", "--resume", "--num_workers", "1", "--log_every_steps", "1").code == 0
    assert lines_of(out / "metrics.jsonl") == before


def test_resuming_refuses_other_videos(train, data, tmp_path):
    shutil.copytree(data / "train", tmp_path / "data")
    flags = ("--max_steps", "2", "--checkpoint_every_steps", "1", "--train_dir", str(tmp_path / "data"))
    assert train(tmp_path / "out", *flags).code == 0
    (tmp_path / "data" / "red" / "0.mp4").unlink()
    assert "train_fingerprint must be" in train(tmp_path / "out", *flags, "--resume").error


# Several processes --------------------------------------------------------------------------------


# A second process that is slower than the first in writing its part of a checkpoint.
LATE = """
import os, runpy, sys, time, torch
save = torch.save
torch.save = lambda *arguments: (time.sleep(float(os.environ["RANK"])), save(*arguments))
runpy.run_path(os.environ["TRAIN"], run_name="__main__")
"""


def two_processes(script, *arguments) -> str:
    """What two print that know of each other by the variables that torchrun sets; test_reliability.py has torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = {**VARIABLES, "TRAIN": str(SCRIPTS / "train.py"), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

    def start(rank):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        return run_in_a_fork(script, *arguments, imported=ALL, **job, **ranks)

    with ThreadPoolExecutor() as pool:
        ended = list(pool.map(start, "01"))
    assert [status for status, _, _ in ended] == [0, 0], ended
    return "".join(out for _, out, _ in ended)


@pytest.fixture
def odd_data(data, tmp_path):
    """7 test videos, one of them broken."""
    shutil.copytree(data / "test", tmp_path / "odd")
    for name in ("blue/1.mp4", "blue/2.mp4"):
        (tmp_path / "odd" / name).unlink()
    (tmp_path / "odd" / "green" / "1.mp4").write_bytes(b"no video")
    return tmp_path / "odd"


def test_two_processes_evaluate_as_one(run, trained, odd_data, tmp_path):
    flags = (
        f"{trained[0] / 'best'} --data_dir {odd_data} --batch_size 2 --num_clips 2 --num_crops 3 --output_dir".split()
    )
    assert run("evaluate", *flags, tmp_path / "one").code == 0
    printed = two_processes(SCRIPTS / "evaluate.py", *flags, tmp_path / "two")
    assert "7 videos, views 4x3x2" in printed and printed.count("mean class") == 1
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert one["num_videos"] == two["num_videos"] == 7 and one["num_unreadable"] == 1
    for name in ("top1", "top5", "mean_class_accuracy"):
        assert two[name] == pytest.approx(one[name], abs=1e-6)
    for name in ("per_class", "confusion_matrix", "bad_videos", "protocol"):
        assert two[name] == one[name]
    tables = []
    for name in ("one", "two"):
        with open(tmp_path / name / "predictions.csv", newline="") as file:
            tables.append(list(csv.DictReader(file)))
    one, two = tables
    assert len(one) == 7
    for mine, other in zip(one, two, strict=True):
        assert float(mine.pop("score") or 0) == pytest.approx(float(other.pop("score") or 0), abs=1e-6)
        assert mine == other


@pytest.mark.parametrize("extra", [["--epochs", "2"], ["--streaming", "--max_steps", "6"]])
def test_two_processes_train(extra, data, tower, tmp_path):
    """12 videos for 2 processes in batches of 2: 3 steps in each epoch. The streams' shares differ in length."""
    (tmp_path / "out").mkdir()
    names = [p for p in sorted((data / "train").rglob("*.mp4")) if "--streaming" not in extra or p.name != "3.mp4"]
    (tmp_path / "list.csv").write_text("video,label\n" + "".join(f"{p},{p.parent.name}\n" for p in names))
    flags = (
        f"--model {tower} --num_frames 4 --compression_layers 1 --train_dir {tmp_path / 'list.csv'} --eval_dir {data} "
    )
    flags += "--allow_outside_root "
    flags += f"--learning_rate 2e-3 --batch_size 2 --flip --log_every_steps 1 --output_dir {tmp_path / 'out'}"
    (tmp_path / "late.py").write_text(LATE)
    script = tmp_path / "late.py" if "--epochs" in extra else SCRIPTS / "train.py"
    printed = two_processes(script, *flags.split(), *extra)
    assert printed.count("Trained 6 steps") == 1
    lines = lines_of(tmp_path / "out" / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "eval_top1" in line] == ([3, 6] if "--epochs" in extra else [2, 4, 6])
    assert json.loads((tmp_path / "out" / "run.json").read_text())["num_processes"] == 2
    names = {p.name for p in (tmp_path / "out" / "checkpoints" / "step_6").iterdir()}
    assert {"random_states_0.pkl", "random_states_1.pkl", "progress.json"} <= names


BUG = """
import os, runpy, sys
from hf_inti import InTIClipForVideoClassification

def forward(*arguments, **options):
    raise KeyError("a bug")

InTIClipForVideoClassification.forward = forward
runpy.run_path(os.environ["TRAIN"], run_name="__main__")
"""


def test_a_full_disk_at_the_end(train, tmp_path, monkeypatch):
    write = Path.write_text

    def fail(path, text):
        if path.name == "bad_videos.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fail)
        full = train(tmp_path / "out", "--max_steps", "1")
    assert full.code == 1 and full.error.endswith(
        "bad_videos.json must be writable, got: No space left on device; make room, then go on with --resume."
    )
    assert train(tmp_path / "out", "--max_steps", "1", "--resume").code == 0


def test_a_bug_ends_the_run(data, tower, tmp_path):
    """And its data workers, for which Python waits."""
    flags = f"--model {tower} --num_frames 4 --compression_layers 1 --train_dir {data} --num_workers 2"
    variables = {**VARIABLES, "TRAIN": str(SCRIPTS / "train.py")}
    status, _, error = run_in_a_fork(BUG, *flags.split(), "--output_dir", tmp_path, imported=ALL, **variables)
    assert status == 1 and "a bug" in error


# Broken videos ------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", ["0", "1"])
def test_broken_video_in_training(workers, train, data, tmp_path):
    shutil.copytree(data / "train", tmp_path / "data")
    broken = tmp_path / "data" / "red" / "broken.mp4"
    broken.write_bytes(b"no video")
    flags = ("--train_dir", str(tmp_path / "data"), "--epochs", "2", "--batch_size", "13", "--num_workers", workers)
    done = train(tmp_path / "out", *flags)
    assert done.code == 0 and "1 broken videos" in done.out and str(broken) in done.out
    found = json.loads((tmp_path / "out" / "bad_videos.json").read_text())
    assert found["count"] == 1 and list(found["videos"]) == [str(broken)]  # met in both epochs
    stopped = train(tmp_path / "other", *flags, "--on_bad_video", "error")
    assert stopped.code == 1 and stopped.error.startswith(f"error: {broken}: ") and "\n" not in stopped.error
    assert "Traceback" not in stopped.error


def test_broken_video_in_evaluation(run, trained, odd_data, tmp_path):
    done = run("evaluate", trained[0] / "best", "--data_dir", odd_data, "--output_dir", tmp_path / "out")
    broken = odd_data / "green" / "1.mp4"
    assert done.code == 0 and "1 broken videos" in done.out and f"{broken}: " in done.out
    assert f"top-1 {6 / 7:.2%}, top-5 {6 / 7:.2%}" in done.out  # it counts as wrong, and all others are right
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["top1"] == pytest.approx(6 / 7) and results["per_class"]["green"] == pytest.approx(2 / 3)
    assert list(results["bad_videos"]) == [str(broken)] and results["num_unreadable"] == 1
    assert results["protocol"] == {"frames": 4, "crops": 1, "clips": 1} and results["versions"]["torch"]
    table = datasets.Dataset.from_parquet(str(tmp_path / "out" / "predictions.parquet"), cache_dir=tmp_path / "cache")
    rows = {row["video"]: row for row in table}
    assert len(rows) == 7 and rows[str(broken)]["prediction"] is None and rows[str(broken)]["label"] == "green"
    good = rows[str(odd_data / "red" / "0.mp4")]
    assert good["prediction"] == good["label"] == "red" and good["top5"].split("|")[0] == "red"
    assert 1 / 3 < good["score"] < 1
    assert (tmp_path / "out" / "confusion_matrix.png").stat().st_size > 5000


def test_predict(run, trained, odd_data):
    done = run("predict", trained[0] / "best", odd_data, "--json", "--top_k", "9")
    assert done.code == 1  # for the broken one
    found = {Path(line["video"]): line for line in map(json.loads, done.out.splitlines())}
    assert len(found) == 7
    broken = found.pop(odd_data / "green" / "1.mp4")
    assert set(broken) == {"video", "error"} and broken["error"]
    for path, line in found.items():
        assert line["predictions"][0]["label"] == path.parent.name
        assert {p["label"] for p in line["predictions"]} == set(CLASSES)  # all there are
        assert sum(p["score"] for p in line["predictions"]) == pytest.approx(1)

    table = run("predict", trained[0] / "best", odd_data / "red" / "0.mp4", odd_data / "blue", "--top_k", "2")
    assert table.code == 0
    shown = [line.split() for line in table.out.splitlines()]
    assert [(Path(line[0]).parent.name, line[1]) for line in shown] == [("red", "red"), ("blue", "blue")]
    assert all(len(line) == 5 and line[2].endswith("%") for line in shown)


def test_visualize(run, trained, data, tmp_path):
    video = data / "test" / "red" / "0.mp4"
    done = run("visualize", trained[0] / "best", video, "--output", tmp_path / "figure.png", "--num_frames", "8")
    assert done.code == 0 and (tmp_path / "figure.png").stat().st_size > 10000
    wrong = run("visualize", trained[0] / "best", video, "--num_frames", "5")
    assert wrong.error.startswith("error: the number of frames must be a multiple of 2")
    model = InTIClipForVideoClassification.from_pretrained(trained[0] / "best")
    for compression in ("tome", "none"):
        model.config.compression = compression
        model.config.compression_options = {"r": 1} if compression == "tome" else {}
        InTIClipForVideoClassification(model.config).save_pretrained(tmp_path / compression)
        InTIClipVideoProcessor.from_pretrained(trained[0] / "best").save_pretrained(tmp_path / compression)
    done = run("visualize", tmp_path / "tome", video, "--output", tmp_path / "tokens.png")
    assert done.code == 0 and (tmp_path / "tokens.png").stat().st_size > 10000
    assert "no picture exists of compression 'none'" in run("visualize", tmp_path / "none", video).error


# Wrong use ----------------------------------------------------------------------------------------


def test_wrong_settings_read_well(train, run, tmp_path, data, tower):
    out = tmp_path / "out"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {tower}\nlerning_rate: 1e-3\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    for got, wanted in [
        (run("train", recipe), "got 'lerning_rate'; did you mean 'learning_rate'?"),
        (run("train", tmp_path / "none.yaml"), f"must be a recipe (a YAML file), got {tmp_path / 'none.yaml'}"),
        (
            run("train", "--model", tower, "--output_dir", out),
            "train_dir must be set with --train_dir",
        ),
        (train(out, "--epoch", "3"), "got 'epoch'; did you mean 'epochs'?"),
        (train(out, "--epochs", "three"), "argument --epochs: invalid int value: 'three'"),
        (train(out, "--train_dir", str(empty)), "must hold videos in class folders"),
        (train(out, "--train_dir", str(tmp_path / "absent")), "no such file or folder"),
        (train(out, "--num_frames", "5"), "must be a multiple of 2 for this compression and adaptation, got 5;"),
        (train(out, "--compression_layers", "2", "1"), "[2, 1]"),
        (train(out, "--compression_options", '{"cub": "dwconv"}'), "InTICompression has no option 'cub'"),
        (train(out, "--compression_options", "cube"), "must be a JSON mapping such as"),
        (train(out, "--streaming"), "max_steps must be given with streaming"),
        (train(out, "--streaming", "--max_steps", "1", "--cache_frames"), "cache_frames must be off when streaming"),
        (train(out, "--max_steps", "0"), "max_steps must be at least 1, got 0"),
        (train(out, "--report_to", "clearml"), "report_to must be one of the installed trackers (all"),
        (train(out, "--model", str(tmp_path / "no" / "such" / "tower")), "There is no such folder"),
        (train(out, "--model", str(data)), "must be the folder or name of a CLIP checkpoint"),
        (train(out, "--learning_rate", "1e30", "--epochs", "3"), "the loss must be finite, got nan at step"),
        (run("predict", tmp_path / "no" / "such" / "model", data), "There is no such folder"),
    ]:
        assert got.code == 1 and wanted in got.error, (wanted, got)
        assert got.error.startswith("error: ") and "\n" not in got.error


def test_name_that_the_hub_does_not_have(run, data, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    done = run("predict", "no-such-owner/no-such-model", data)
    assert done.code == 1 and done.error.startswith("error: ") and "\n" not in done.error


def test_tower_of_another_shape(train, tower, tmp_path):
    shutil.copytree(tower, tmp_path / "tower")
    config = json.loads((tower / "config.json").read_text())
    (tmp_path / "tower" / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    done = train(tmp_path / "out", "--model", str(tmp_path / "tower"))
    assert done.code == 1 and "must hold vision_model.encoder.layers.0.mlp.fc1.bias in the shape" in done.error


def test_wrong_use_of_a_trained_model(run, trained, data, tmp_path):
    write_clip(tmp_path / "data" / "white" / "0.mp4", 0)
    (tmp_path / "empty").mkdir()
    model = trained[0] / "best"
    out = ("--output_dir", tmp_path / "out")
    for got, wanted in [
        (run("evaluate", model, "--data_dir", tmp_path / "data", *out), "unknown to the model: ['white']"),
        (run("evaluate", model, *out), "the following arguments are required: --data_dir"),
        (run("evaluate", model, "--data_dir", data, "--num_crops", "2", *out), "num_crops must be 1 or 3, got 2"),
        (run("evaluate", model, "--data_dir", data, "--num_crops", "2", "--num_workers", "1", *out), "must be 1 or 3"),
        (run("evaluate", model, "--data_dir", data, "--num_frames", "7", *out), "got 7; the nearest"),
        (run("predict", model, tmp_path / "empty"), "holds no videos"),
        (run("predict", model), "the following arguments are required: --videos"),
        (run("predict", model, data, "--top_k", "0"), "top_k must be at least 1, got 0"),
        (run("visualize", model, data / "a.mp4", "other.mp4"), "got a stray 'other.mp4'"),
    ]:
        assert got.code == 1 and wanted in got.error, (wanted, got)
        assert got.error.startswith("error: ") and "\n" not in got.error


@pytest.mark.parametrize("name", ["train", "evaluate", "predict", "visualize"])
def test_help(name, run):
    done = run(name, "--help")
    assert done.code == 0 and done.out.startswith(f"usage: {name}.py ")
    explained = (SCRIPTS / f"{name}.py").read_text().split('"""')[1].strip()
    assert explained in done.out and f"    python scripts/{name}.py" in explained
    assert "(default: None)" not in done.out and "--model" in done.out


def test_from_anywhere_and_through_a_link(trained, tmp_path):
    """Even where scripts/evaluate.py could be taken for the package of that name."""
    (tmp_path / "score").symlink_to(SCRIPTS / "evaluate.py")
    wrong = python(tmp_path / "score", trained[0] / "best", cwd=SCRIPTS)
    assert wrong.returncode == 1
    missing = "the following arguments are required: --data_dir/--data-dir"
    assert wrong.stderr == f"error: {missing}; see --help.\n"
