"""Gathers the files of a model's repository in a folder, and checks that the folder works without hf_inti.

The files are model and processor with the code that loads them, the card with its figure, an example clip, the handler
for Inference Endpoints, the training log and results. `hf_inti.hub.push` pushes the folder.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

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
# Pickles that transformers' Trainer writes next to a model; they hold no weights.
TRAINER_PICKLES = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth")
# Loads and runs the repository like a user without hf_inti. `check_reload` gives it neither network nor token.
RELOAD_SCRIPT = """
import sys
sys.modules["hf_inti"] = None
import importlib.util, torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForVideoClassification, AutoProcessor
folder, tmp_dir, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
AutoConfig.from_pretrained(folder, trust_remote_code=True)
AutoModel.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForVideoClassification.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
pixel_values = processor(load_file(tmp_dir + "/clip.safetensors")["clip"], return_tensors="pt")["pixel_values"]
with torch.no_grad():
    logits = model(pixel_values=pixel_values.to(model.dtype)).logits.float()
save_file({"logits": logits}, tmp_dir + "/logits.safetensors")
spec = importlib.util.spec_from_file_location("handler", folder + "/handler.py")
handler = importlib.util.module_from_spec(spec)
spec.loader.exec_module(handler)
with open(folder + "/example.mp4", "rb") as file:
    handler.EndpointHandler(folder)({"inputs": file.read()})
"""


def prepare_folder(
    model_dir: str | os.PathLike,
    folder: str | os.PathLike,
    repo_id: str,
    *,
    metadata: str | None = None,
    results: str | os.PathLike | None = None,
    benchmark: str | os.PathLike | None = None,
    example: str | os.PathLike | None = None,
) -> list[str]:
    """Write all files of the repository into `folder`, which must not exist.

    Args:
        model_dir: a folder with model and processor, as train.py writes it (best/ or last/). run.json and
            metrics.jsonl are copied from there or from its parent folder, if they exist.
        repo_id: "namespace/name", for the card.
        metadata: a metadata file for the card, or its name in model_cards/; default: derived from run.json and
            config.json.
        results: a results.json of scripts/evaluate.py; without it the card claims no accuracy.
        benchmark: a file written by `python -m hf_inti.comparison.measure`; without it the card claims no speed.
        example: an H.264 .mp4 of at most 10 MiB; default: a generated clip.

    Returns one line for each thing that was left out or changed. Raises ValueError if the model is incomplete or
    stored in pickles, or if example, metadata or results are not of this model or not usable.
    """
    model_dir, folder = Path(model_dir), Path(folder)
    for name in ("config.json", "video_preprocessor_config.json"):
        if not (model_dir / name).is_file():
            raise ValueError(f"{model_dir} must hold {name}, got none; give a folder with a trained model, like best/.")
    pickles = [path.name for path in sorted(model_dir.iterdir()) if path.suffix in PICKLES]
    notes = [f"{name}: left out, it is a pickle." for name in pickles if name in TRAINER_PICKLES]
    if others := [name for name in pickles if name not in TRAINER_PICKLES]:
        raise ValueError(
            f"weights must be in safetensors, got {others[0]}, a pickle, in {model_dir}; convert or remove it."
        )
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
    notes += _copy_run(model_dir, folder)
    draw_figure(folder, folder / EXAMPLE, folder / FIGURE)
    card_metadata = metadata_of_run(folder) if metadata is None else load_metadata(metadata)
    render_card(card_metadata, folder, repo_id, results=results, benchmark=benchmark).save(folder / "README.md")
    if results is not None:
        write_eval_results(folder, card_metadata, results)
    return notes


def _copy_run(model_dir: Path, folder: Path) -> list[str]:
    """Copy run.json, without private information, and metrics.jsonl; return a note if run.json was changed."""
    # train.py writes run.json into the model's folder too, but metrics.jsonl only into its parent folder.
    paths = {
        name: next((path / name for path in (model_dir, model_dir.parent) if (path / name).is_file()), None)
        for name in ("run.json", "metrics.jsonl")
    }
    if paths["run.json"] is None:
        return []
    run, changed = public_run(read_run(paths["run.json"].parent))
    (folder / "run.json").write_text(json.dumps(run, indent=2) + "\n")
    if paths["metrics.jsonl"] is not None:
        shutil.copyfile(paths["metrics.jsonl"], folder / "metrics.jsonl")
    if not changed:
        return []
    return [f"run.json: local paths, user name and credentials removed from {', '.join(changed)}."]


def validate_folder(folder: str | os.PathLike, model_dir: str | os.PathLike | None = None) -> None:
    """Raise a one-line ValueError unless `folder` is a repository that works without hf_inti.

    Checks that weights are in safetensors and no file is a pickle or holds a token, and that configuration, processor,
    model, code and card match. Then a new process, which cannot import hf_inti, loads the folder; it must give the
    logits of the model in `model_dir` (default: `folder`) on a random clip within 1e-6, and its handler must accept
    the example clip.
    """
    folder = Path(folder)
    files = files_of(folder)
    check_contents(files)
    required = ("config.json", "video_preprocessor_config.json", "README.md", "handler.py", "requirements.txt", EXAMPLE)
    for name in required:
        if name not in files:
            raise ValueError(f"{folder} must hold {name}, got none; prepare_folder writes it.")
    check_card(folder / "README.md")
    model, processor = load_model(folder), InTIClipVideoProcessor.from_pretrained(folder)
    config = model.config
    for reference in config.auto_map.values():
        code = f"{reference.partition('.')[0]}.py"
        if code not in files:
            raise ValueError(
                f"{folder} must hold {code}, the code that config.json names, got none; prepare_folder writes it."
            )
    side = config.image_size
    if (processor.num_frames, dict(processor.crop_size)) != (config.num_frames, {"height": side, "width": side}):
        raise ValueError(
            f"the processor must make {config.num_frames} frames of {side} x {side}, as the model takes them, got "
            f"{processor.num_frames} of {dict(processor.crop_size)}; save a processor that matches the model."
        )
    num_names = len(set(config.id2label.values()))
    if num_names != config.num_labels:
        raise ValueError(
            f"id2label in config.json must hold {config.num_labels} different names, got {num_names}; name all classes."
        )
    check_reload(folder, model if model_dir is None else load_model(Path(model_dir)), processor)


def check_contents(files: dict[str, Path]) -> None:
    """Raise ValueError if there are no safetensors weights, or a file is a pickle or holds a token.

    Pickles are recognised by their names and by their first bytes. `files` maps paths in the repository to local paths.
    """
    if not any(name.endswith(".safetensors") for name in files):
        raise ValueError("the folder must hold weights in safetensors, got none; save the model with save_pretrained.")
    token = get_token()
    for name, path in files.items():
        with path.open("rb") as file:
            head = file.read(9)
            is_pickle = head[:4] == b"PK\x03\x04" or (head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5")
            if path.suffix == ".safetensors":  # may start like one: with the length of its header
                is_pickle = head[8:] != b"{"
            if path.suffix in PICKLES or is_pickle:
                raise ValueError(f"files must not be pickles, got {name}; remove it, only safetensors are pushed.")
            if path.suffix in (".safetensors", ".mp4", ".png"):
                continue
            text = (head + file.read()).decode(errors="replace")
        # A short word set as the token, which no real token is, may occur in any text.
        if re.search(TOKEN, text) or (token and len(token) >= 16 and token in text):
            raise ValueError(
                f"files must hold no token of the Hub, got one in {name}; remove it, and revoke it if others saw it."
            )


def check_card(path: Path) -> None:
    """Raise ValueError if huggingface_hub cannot read the card's header, or the header lacks what the Hub needs."""
    try:
        data = ModelCard.load(path).data
    except Exception as error:  # YAML's errors and several of huggingface_hub's
        raise ValueError(f"the card's header must be readable, got: {' '.join(str(error).split())}") from None
    for name, wanted in (("pipeline_tag", "video-classification"), ("library_name", "transformers")):
        if data.get(name) != wanted:
            raise ValueError(f"the card must have {name}: {wanted}, got {data.get(name)!r}; correct its header.")
    if not data.get("license"):
        raise ValueError("the card must have a license, got none; add it to the metadata.")


def load_model(folder: Path) -> InTIClipForVideoClassification:
    """Load the classifier in a folder. Raises ValueError if weights are missing, of the wrong shape or not finite."""
    try:
        model, report = InTIClipForVideoClassification.from_pretrained(
            folder, output_loading_info=True, use_safetensors=True, ignore_mismatched_sizes=True
        )
    except Exception as error:  # SafetensorError, for a truncated file, derives directly from Exception
        raise ValueError(f"the model in {folder} must load, got: {' '.join(str(error).split())}") from None
    missing = sorted(report["missing_keys"] | {name for name, *_ in report["mismatched_keys"]})
    if missing:
        raise ValueError(
            f"{folder} must hold all weights in the right shapes, got {len(missing)} missing, such as {missing[0]}; "
            "train and save the whole model."
        )
    for name, weight in model.state_dict().items():
        if not weight.isfinite().all():
            raise ValueError(f"{name} in {folder} must be finite, got inf or NaN; training diverged, repeat it.")
    return model.eval()


def check_reload(folder: Path, model: InTIClipForVideoClassification, processor: InTIClipVideoProcessor) -> None:
    """Raise ValueError unless a new process without hf_inti gives the logits of `model`; see `validate_folder`."""
    generator = torch.Generator().manual_seed(0)
    clip = torch.randint(0, 256, (model.config.num_frames, 64, 80, 3), dtype=torch.uint8, generator=generator)
    pixel_values = processor(clip, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model(pixel_values=pixel_values.to(model.dtype)).logits.float()
    with tempfile.TemporaryDirectory() as tmp_dir:
        save_file({"clip": clip}, f"{tmp_dir}/clip.safetensors")
        removed = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HOME", "HF_HUB_CACHE", "HF_MODULES_CACHE")
        environment = {name: value for name, value in os.environ.items() if name not in removed}
        environment |= {"HF_HOME": f"{tmp_dir}/cache", "HF_HUB_OFFLINE": "1"}
        threads = str(torch.get_num_threads())  # the last bits of sums depend on it
        process = subprocess.run(
            [sys.executable, "-c", RELOAD_SCRIPT, str(folder.resolve()), tmp_dir, threads],
            env=environment,
            cwd=tmp_dir,
            capture_output=True,
            text=True,
        )
        if process.returncode:
            last_line = (process.stderr.strip() or "no message").splitlines()[-1]
            raise ValueError(f"the repository must load and run without hf_inti, got: {without_token(last_line)}")
        logits = load_file(f"{tmp_dir}/logits.safetensors")["logits"]
    difference = (logits - expected).abs().max().item()
    if not difference <= 1e-6:  # also true for NaN
        raise ValueError(
            f"logits without hf_inti must differ by at most 1e-6, got {difference:.2g}; please report this as a bug."
        )


def public_run(run: dict) -> tuple[dict, list[str]]:
    """Remove private information from the contents of run.json, as `public_text` does.

    Returns the new contents and the dotted names of what was changed. The model's configuration is kept as it is,
    except for its path: class names may look like paths.
    """
    changed = []

    def clean(value: Any, *keys: str) -> Any:
        if isinstance(value, dict):
            return {name: clean(item, *keys, name) for name, item in value.items()}
        if isinstance(value, list):
            return [clean(item, *keys) for item in value]
        if not isinstance(value, str) or (keys[0] == "config" and keys[-1] != "_name_or_path"):
            return value
        public = public_text(value)
        if public != value and ".".join(keys) not in changed:
            changed.append(".".join(keys))
        return public

    return clean(run), changed


def draw_example(path: Path, num_frames: int = 32, size: int = 160) -> None:
    """Write a short H.264 clip, to the eye the same on every call: a disc crosses a still scene from left to right."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size] / size
    scene = np.stack([60 + 50 * y, 70 + 40 * x, 90 + 30 * y], axis=-1) + rng.normal(0, 2, (size, size, 1))
    frames = []
    for t in range(num_frames):
        distance = np.hypot(x - (0.1 + 0.8 * t / (num_frames - 1)), y - 0.5)
        mask = np.clip((0.16 - distance) * size + 0.5, 0, 1)[..., None]  # the edge is one pixel wide
        frames.append((scene + mask * (np.array([235, 180, 60]) - scene)).clip(0, 255).astype(np.uint8))
    import av  # imported late: it takes time

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=12, options={"crf": "23", "threads": "1"})
        stream.height = stream.width = size
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def copy_example(source: Path, target: Path) -> None:
    """Copy an example clip. Raises ValueError unless it is an .mp4 file of at most `MAX_EXAMPLE_BYTES`."""
    if source.suffix.lower() != ".mp4" or not source.is_file():
        raise ValueError(f"the example must be an .mp4 file, got {source}; give one that exists.")
    if source.stat().st_size > MAX_EXAMPLE_BYTES:
        raise ValueError(
            f"the example must have at most {MAX_EXAMPLE_BYTES} bytes, got {source.stat().st_size} in {source}; "
            "cut or compress it."
        )
    shutil.copyfile(source, target)


def files_of(folder: Path) -> dict[str, Path]:
    """All files in a folder and its subfolders, by their paths relative to it."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def without_token(text: str) -> str:
    """Join the text into one line and mask tokens in it, which a server's message may quote."""
    text = re.sub(TOKEN, "***", " ".join(text.split()))
    return text.replace(token, "***") if (token := get_token()) else text
