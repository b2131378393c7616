"""Training runs of seconds, in forks: a fork spares the imports, which take longer than such a run."""

import hashlib
import json
import os
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path


sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch  # noqa: E402
from transformers import CLIPVisionConfig, CLIPVisionModel  # noqa: E402

import hf_inti.hub.push  # noqa: E402, F401
import hf_inti.training.setup  # noqa: E402, F401
import hf_inti.training.state  # noqa: E402, F401
from conftest import write_video  # noqa: E402
from forks import own_progress  # noqa: E402
from hf_inti.measure.jobs import write_json  # noqa: E402
from hf_inti.measure.records import provenance  # noqa: E402


SCRIPTS = Path(__file__).parents[2] / "scripts"
RANDOM = (
    "--gradient_accumulation_steps 2 --classifier_dropout 0.5 --drop_path_rate 0.5 --mixup_alpha 1 --cutmix_alpha 1 "
    "--ema_decay 0.7 --crop random_resized --flip --random_erasing_prob 0.3"
).split()


def make_inputs(folder: Path, videos: int = 4) -> list[str]:
    """Write `videos` of each of 3 classes and a tower; returns the flags of train.py that name them."""
    for k, name in enumerate(("a", "b", "c")):
        for i in range(videos):
            write_video(folder / "videos" / name / f"{i}.mp4", seed=10 * k + i)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=16)).save_pretrained(folder / "tower")
    flags = f"--model {folder / 'tower'} --train_dir {folder / 'videos'} --num_frames 4 --compression_layers 1 "
    flags += "--resize 32 --batch_size 2 --learning_rate 2e-3 --min_lr_ratio 1 --log_every_steps 1"
    return flags.split()


def start(flags: list, log: Path, before: Callable = lambda: None, script: str = "train", **variables: str) -> int:
    """Run a script in a fork, after `before()` there; what it prints goes to `log`. Returns the process's id."""
    child = os.fork()
    if child:
        return child
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.setsid()
    own_progress()
    os.environ.update({"ACCELERATE_USE_CPU": "true", **variables})
    torch.set_num_threads(1)
    before()
    sys.argv = [str(SCRIPTS / f"{script}.py"), *map(str, flags)]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        sys.stdout.flush()
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 70
    os._exit(status)  # not the parent's clean-up


def wait(child: int, seconds: float | None = None) -> int:
    """The exit status, negative for a signal. After `seconds` the process gets SIGKILL."""
    end = time.monotonic() + seconds if seconds is not None else None
    while True:
        pid, status = os.waitpid(child, os.WNOHANG if end else 0)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            end = None
        time.sleep(0.005)


def run(flags: list, log: Path, before: Callable = lambda: None, **options: str) -> int:
    return wait(start(flags, log, before, **options))


def run_processes(count: int, flags: list, log: Path, before: Callable = lambda: None, **options: str) -> list[int]:
    """As torchrun starts them; returns their exit statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in range(count):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **{name: str(n) for name, n in names.items()}}
        children.append(start(flags, log.with_name(f"{log.name}{rank}"), before, **place, **options))
    return [wait(child, seconds=600) for child in children]


def check(condition: object, message: str) -> None:
    """Like assert, also under python -O."""
    if not condition:
        raise SystemExit(f"error: {message}")


def fingerprint(folder: Path) -> str | None:
    """Of a whole model's weights; None if there is no folder. Raises OSError for one that lacks a file."""
    if not folder.exists():
        return None
    for name in ("config.json", "video_preprocessor_config.json", "run.json"):
        json.loads((folder / name).read_text())
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def check_end(whole: Path, stopped: Path) -> None:
    """A run that was stopped and resumed must have the files of one that was not, bit for bit."""
    for name in ("best/model.safetensors", "last/model.safetensors", "metrics.jsonl", "bad_videos.json"):
        check((whole / name).read_bytes() == (stopped / name).read_bytes(), f"{name} must be the unstopped run's")
    left = {path.name for path in stopped.iterdir()}
    check(left == {path.name for path in whole.iterdir()}, f"only a run's files must be left, got {left}")


def main(description: str, measure: Callable[..., dict], **settings: int) -> None:
    """The command line of a script here: `measure(folder, **settings)`, printed, and written to --output."""
    parser = ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, help="a JSON file for the counts, with command, commit and machine")
    for name, default in settings.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = vars(parser.parse_args())
    output = options.pop("output")
    output = output and output.absolute()
    where, work = provenance(), Path(tempfile.mkdtemp())
    try:
        os.environ["HF_DATASETS_CACHE"] = str(work)
        with chdir(work):
            result = measure(work, **options)
    finally:
        shutil.rmtree(work)
    print(json.dumps(result, indent=2))
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, {**result, **where})
