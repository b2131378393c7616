"""The files of a model's repository: gather them in a folder, and try that as a stranger would.

Written: model, processor and the code that loads them, card, figure, example clip, handler of Inference Endpoints,
training log, results. `hf_inti.hub.push` pushes the folder.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import ModelCard, get_token
from safetensors.torch import load_file, save_file

from ..model.modeling_inti_clip import InTIClipForVideoClassification
from ..model.video_processing_inti_clip import InTIClipVideoProcessor
from . import handler
from .card import EXAMPLE, FIGURE, draw_figure, load_metadata, metadata_of_run, render_card, write_eval_results
from .metadata import TOKEN, public_text, read_run


MAX_EXAMPLE_BYTES = 10 * 2**20
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
OF_TRAINER = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth")  # pickles, but no weights
# What a stranger does with the repository: no hf_inti, no network, no token.
STRANGER = """
import sys
sys.modules["hf_inti"] = None
import importlib.util, torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForVideoClassification, AutoProcessor
folder, place, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
AutoConfig.from_pretrained(folder, trust_remote_code=True)
AutoModel.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForVideoClassification.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
pixel_values = processor(load_file(place + "/clip.safetensors")["clip"], return_tensors="pt")["pixel_values"]
with torch.no_grad():
    logits = model(pixel_values=pixel_values.to(model.dtype)).logits.float()
save_file({"logits": logits}, place + "/logits.safetensors")
found = importlib.util.spec_from_file_location("handler", folder + "/handler.py")
handler = importlib.util.module_from_spec(found)
found.loader.exec_module(handler)
with open(folder + "/example.mp4", "rb") as file:
    handler.EndpointHandler(folder)({"inputs": file.read()})
"""


def prepare_folder(
    model_dir: str | os.PathLike,
    folder: str | os.PathLike,
    repo_id: str,
    *,
    facts: str | None = None,
    results: str | os.PathLike | None = None,
    benchmark: str | os.PathLike | None = None,
    example: str | os.PathLike | None = None,
) -> list[str]:
    """Write all files of the repository into `folder`, which is made.

    Args:
        model_dir: a folder with model and processor, as train.py leaves it (best/ or last/); run.json and
            metrics.jsonl are taken from there or from the folder above.
        repo_id: "namespace/name", for the card.
        facts: a facts file, or its name in model_cards/; default: what run.json and config.json say.
        results: results.json of scripts/evaluate.py; without it the card claims no accuracy.
        benchmark: what `python -m hf_inti.comparison.measure` wrote; without it the card claims no speed.
        example: an H.264 .mp4 of at most 10 MiB; default: one that is drawn here.

    Returns what a user should know of what was left out or changed, one line each. Raises ValueError for a model
    that is incomplete or in pickles, and for an example, facts or results that do not fit.
    """
    model_dir, folder = Path(model_dir), Path(folder)
    for name in ("config.json", "video_preprocessor_config.json"):
        if not (model_dir / name).is_file():
            raise ValueError(f"{model_dir} holds no {name}; give a folder with a trained model, such as best/.")
    pickles = [path.name for path in sorted(model_dir.iterdir()) if path.suffix in PICKLES]
    notes = [f"{name}: left out, it is a pickle." for name in pickles if name in OF_TRAINER]
    if other := [name for name in pickles if name not in OF_TRAINER]:
        raise ValueError(f"{model_dir} holds {other[0]}, a pickle; only safetensors are pushed: convert or remove it.")
    model = load_model(model_dir)
    processor = InTIClipVideoProcessor.from_pretrained(model_dir)
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "handler.py").write_text(Path(handler.__file__).read_text())
    (folder / "requirements.txt").write_text(handler.REQUIREMENTS)
    if example is None:
        draw_example(folder / EXAMPLE)
    else:
        copy_example(Path(example), folder / EXAMPLE)
    # train.py leaves run.json beside the model too, metrics.jsonl in the folder above alone.
    found = {
        name: next((place / name for place in (model_dir, model_dir.parent) if (place / name).is_file()), None)
        for name in ("run.json", "metrics.jsonl")
    }
    if found["run.json"] is not None:
        run, changed = public_run(read_run(found["run.json"].parent))
        (folder / "run.json").write_text(json.dumps(run, indent=2) + "\n")
        if changed:
            notes.append(f"run.json: local paths, user name and credentials taken out of {', '.join(changed)}.")
        if found["metrics.jsonl"] is not None:
            shutil.copyfile(found["metrics.jsonl"], folder / "metrics.jsonl")
    draw_figure(folder, folder / EXAMPLE, folder / FIGURE)
    facts = metadata_of_run(folder) if facts is None else load_metadata(facts)
    render_card(facts, folder, repo_id, results=results, benchmark=benchmark).save(folder / "README.md")
    if results is not None:
        write_eval_results(folder, facts, results)
    return notes


def validate_folder(folder: str | os.PathLike, model_dir: str | os.PathLike | None = None) -> None:
    """Raise a ValueError, of one line, unless `folder` is a repository that works for a stranger.

    Only safetensors and no pickles; no token in any file; configuration, processor, model, code and card fit together;
    a clean process in which hf_inti cannot be imported loads it, gives the logits of the model in `model_dir`
    (default: `folder`) on a random clip to 1e-6, and its handler takes the example clip.
    """
    folder = Path(folder)
    files = files_of(folder)
    check_contents(files)
    wanted = ("config.json", "video_preprocessor_config.json", "README.md", "handler.py", "requirements.txt", EXAMPLE)
    for name in wanted:
        if name not in files:
            raise ValueError(f"{folder} lacks {name}; prepare_folder writes it.")
    check_card(folder / "README.md")
    model, processor = load_model(folder), InTIClipVideoProcessor.from_pretrained(folder)
    config = model.config
    for place in config.auto_map.values():
        if f"{place.partition('.')[0]}.py" not in files:
            raise ValueError(f"{folder} lacks the code {place.partition('.')[0]}.py that config.json names.")
    side = config.image_size
    if (processor.num_frames, dict(processor.crop_size)) != (config.num_frames, {"height": side, "width": side}):
        raise ValueError(
            f"the processor makes {processor.num_frames} frames of {dict(processor.crop_size)}, the model was trained "
            f"on {config.num_frames} of {side} x {side}; save a processor that fits."
        )
    if len(set(config.id2label.values())) != config.num_labels:
        raise ValueError(f"config.json names {len(set(config.id2label.values()))} of {config.num_labels} classes.")
    check_reload(folder, model if model_dir is None else load_model(Path(model_dir)), processor)


def check_contents(files: dict[str, Path]) -> None:
    """Raise a ValueError for a pickle, by name or by its first bytes, for a token, and where there are no weights."""
    if not any(name.endswith(".safetensors") for name in files):
        raise ValueError("there are no weights in safetensors; save the model with save_pretrained.")
    token = get_token()
    for name, path in files.items():
        with path.open("rb") as file:
            head = file.read(9)
            is_pickle = head[:4] == b"PK\x03\x04" or (head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5")
            if path.suffix == ".safetensors":  # may begin like one: with the length of its header, then the header
                is_pickle = head[8:] != b"{"
            if path.suffix in PICKLES or is_pickle:
                raise ValueError(f"{name} is a pickle or an archive of one; only safetensors are pushed: remove it.")
            if path.suffix in (".safetensors", ".mp4", ".png"):
                continue
            text = (head + file.read()).decode(errors="replace")
        # A short one, which no real token is, may stand in any text by chance.
        if re.search(TOKEN, text) or (token and len(token) >= 16 and token in text):
            raise ValueError(f"{name} holds a token of the Hub: take it out, and revoke the token if others saw it.")


def check_card(path: Path) -> None:
    """Raise a ValueError for a card whose metadata huggingface_hub cannot read, or without what the Hub needs."""
    try:
        data = ModelCard.load(path).data
    except Exception as error:  # YAML's own errors, and huggingface_hub's of several kinds
        raise ValueError(f"the card's metadata cannot be read: {' '.join(str(error).split())}") from None
    for name, wanted in (("pipeline_tag", "video-classification"), ("library_name", "transformers")):
        if data.get(name) != wanted:
            raise ValueError(f"the card must have {name}: {wanted}, got {data.get(name)!r}.")
    if not data.get("license"):
        raise ValueError("the card names no license; add one to the facts.")


def load_model(folder: Path) -> InTIClipForVideoClassification:
    """The classifier in a folder, all of whose weights must be there, in the right shapes, and finite."""
    try:
        model, report = InTIClipForVideoClassification.from_pretrained(
            folder, output_loading_info=True, use_safetensors=True, ignore_mismatched_sizes=True
        )
    except Exception as error:  # SafetensorError, for a file that ends early, is an Exception and nothing more
        raise ValueError(f"{folder} does not load: {' '.join(str(error).split())}") from None
    absent = sorted(report["missing_keys"] | {name for name, *_ in report["mismatched_keys"]})
    if absent:
        raise ValueError(f"{folder} has no {absent[0]} of the right shape ({len(absent)} missing); train it first.")
    for name, weight in model.state_dict().items():
        if not weight.isfinite().all():
            raise ValueError(f"{folder}: {name} holds numbers that are not finite; the training diverged.")
    return model.eval()


def check_reload(folder: Path, model: InTIClipForVideoClassification, processor: InTIClipVideoProcessor) -> None:
    """Raise a ValueError unless a clean process without hf_inti gives `model`'s logits; see `validate_folder`."""
    generator = torch.Generator().manual_seed(0)
    clip = torch.randint(0, 256, (model.config.num_frames, 64, 80, 3), dtype=torch.uint8, generator=generator)
    pixel_values = processor(clip, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model(pixel_values=pixel_values.to(model.dtype)).logits.float()
    with tempfile.TemporaryDirectory() as place:
        save_file({"clip": clip}, f"{place}/clip.safetensors")
        secret = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HOME", "HF_HUB_CACHE", "HF_MODULES_CACHE")
        environment = {name: value for name, value in os.environ.items() if name not in secret}
        environment |= {"HF_HOME": f"{place}/cache", "HF_HUB_OFFLINE": "1"}
        threads = str(torch.get_num_threads())  # sums depend on it in their last bits
        done = subprocess.run(
            [sys.executable, "-c", STRANGER, str(folder.resolve()), place, threads],
            env=environment,
            cwd=place,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            raise ValueError(f"the repository does not load or run without hf_inti: {without_token(last)}")
        logits = load_file(f"{place}/logits.safetensors")["logits"]
    difference = (logits - expected).abs().max().item()
    if not difference <= 1e-6:  # also true for NaN
        raise ValueError(f"without hf_inti the logits differ by {difference:.2g}, at most 1e-6 is right: report this.")


def public_run(run: dict) -> tuple[dict, list[str]]:
    """What may be public of run.json, and the dotted names of what had to be changed.

    Of local paths only the last part stays, of URLs no credentials and no query, and the user's name becomes "user".
    Class names in the configuration stay as they are.
    """
    changed = []

    def clean(value, *place):
        if isinstance(value, dict):
            return {name: clean(item, *place, name) for name, item in value.items()}
        if isinstance(value, list):
            return [clean(item, *place) for item in value]
        if not isinstance(value, str) or (place[0] == "config" and place[-1] != "_name_or_path"):
            return value
        public = public_text(value)
        if public != value and ".".join(place) not in changed:
            changed.append(".".join(place))
        return public

    return clean(run), changed


def draw_example(path: Path, num_frames: int = 32, size: int = 160) -> None:
    """Write a short H.264 clip, always the same: a disc that crosses a still scene from left to right."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size] / size
    scene = np.stack([60 + 50 * y, 70 + 40 * x, 90 + 30 * y], axis=-1) + rng.normal(0, 2, (size, size, 1))
    frames = []
    for t in range(num_frames):
        distance = np.hypot(x - (0.1 + 0.8 * t / (num_frames - 1)), y - 0.5)
        mask = np.clip((0.16 - distance) * size + 0.5, 0, 1)[..., None]  # its edge is one pixel wide
        frames.append((scene + mask * (np.array([235, 180, 60]) - scene)).clip(0, 255).astype(np.uint8))
    import av  # where it is used: importing it takes time

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=12, options={"crf": "23", "threads": "1"})
        stream.height = stream.width = size
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def copy_example(source: Path, target: Path) -> None:
    """Raise a ValueError for what browsers do not play, or is too large."""
    if source.suffix.lower() != ".mp4" or not source.is_file():
        raise ValueError(f"the example must be an .mp4 file, got {source}.")
    if source.stat().st_size > MAX_EXAMPLE_BYTES:
        raise ValueError(f"{source} has {source.stat().st_size} bytes, an example at most {MAX_EXAMPLE_BYTES}; cut it.")
    shutil.copyfile(source, target)


def files_of(folder: Path) -> dict[str, Path]:
    """All files below a folder, by their path in it."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def without_token(text: str) -> str:
    """In one line, without what looks like a token or is one: a server may send back what it was sent."""
    text = re.sub(TOKEN, "***", " ".join(text.split()))
    return text.replace(token, "***") if (token := get_token()) else text
