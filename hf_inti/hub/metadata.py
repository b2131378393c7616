"""Metadata of model cards, and checks that model, recipe, training run and measurements agree with it."""

import getpass
import hashlib
import json
import os
import re
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path, PurePosixPath

import torch
import yaml
from transformers import CLIPVisionConfig

from ..measure.costs import Cost
from ..model.configuration_inti_clip import InTIClipVisionConfig
from ..model.modeling_inti_clip import InTIClipForVideoClassification
from ..model.video_processing_inti_clip import InTIClipVideoProcessor
from ..papers.published import TOWERS
from ..training.arguments import DataArguments, ModelArguments, TrainingArguments
from ..training.cli import parse_recipe
from ..training.run_info import FREE_SETTINGS, settings_of
from ..training.weights import load_weights


ROOT = Path(__file__).parents[2]
CARDS = ROOT / "model_cards"
TOKEN = r"\bhf_[A-Za-z0-9]{20,}"  # matches access tokens of the Hub
# Fields of the configuration: this package's, and those of CLIP's tower.
METHOD = "num_frames compression compression_layers compression_options adaptation adaptation_options".split()
TOWER = "hidden_size intermediate_size num_hidden_layers num_attention_heads image_size patch_size".split()
METADATA_KEYS = {
    "title": None,
    "recipe": None,  # a file in scripts/recipes
    "base_model": None,
    "tower": None,  # a key of `published.TOWERS`
    "license": None,
    "dataset": ("name", "id", "split", "num_labels", "terms", "limits"),
    "method": METHOD,
    "published": ("table", "model"),  # identify a row of `published.TABLES`
    "protocol": ("frames", "crops", "clips"),
}
# Settings in which a run may differ from its recipe: those that do not affect the result, where its data are, the seed,
# and how the clips of a step are spread over devices. `model` is compared with the metadata instead.
RUN_SPECIFIC_SETTINGS = FREE_SETTINGS | {
    *("model", "train_dir", "eval_dir", "layout", "train_split", "eval_split", "video_root", "streaming"),
    *("cache_frames", "seed", "batch_size", "gradient_accumulation_steps", "mixed_precision", "eval_every_epochs"),
}
RESULTS = {  # keys of results.json, which scripts/evaluate.py writes, that cards need
    *("top1", "top5", "mean_class_accuracy", "per_class", "confusion_matrix", "num_videos", "num_unreadable"),
    *("arguments", "command", "commit", "fingerprint", "protocol", "versions"),
}
# Keys that cards need from what `python -m hf_inti.comparison.measure` writes.
BENCHMARK = {"conditions", "gmacs", "parameters", "forward_clips_per_second"}


def load_metadata(path_or_name: str | Path) -> dict:
    """Load the metadata of a checkpoint from a YAML file, given its path or its name in model_cards/.

    `dataset` may be the name of a file in model_cards/datasets. Every key must be present; null means that it does not
    apply. Raises ValueError if the file is missing or not a mapping, or if keys are missing or unknown.
    """
    path = Path(path_or_name)
    path = path if path.suffix == ".yaml" else CARDS / f"{path_or_name}.yaml"
    metadata = read_yaml(path)
    if isinstance(metadata.get("dataset"), str):
        metadata["dataset"] = read_yaml(CARDS / "datasets" / f"{metadata['dataset']}.yaml")
    check_keys(metadata, str(path))
    return metadata


def metadata_of_run(model_dir: str | Path) -> dict:
    """Metadata of any model, from its config.json and, if it was trained with scripts/train.py, its run.json.

    The licence of the weights is "unknown": their owner chooses it, in a metadata file. Local paths are left out: the
    dataset is named after its folder, and the base model is null unless it is on the Hub. Raises ValueError if
    config.json is missing or not an InTI-CLIP's, or if run.json is incomplete.
    """
    config, run = load_config(model_dir), read_run(model_dir)
    dataset = {"name": "data that this card does not name", "id": None, "split": "test"}
    if run is not None:
        data = run["arguments"]["DataArguments"]
        dataset = {"name": _name_of(Path(data["train_dir"])), "id": None, "split": data["eval_split"]}
        if data["layout"] == "hub":
            dataset |= {"name": data["train_dir"], "id": data["train_dir"]}
    dataset |= {"num_labels": config.num_labels, "terms": None, "limits": []}
    known = {
        "base_model": run and run.get("base_model"),
        "license": "unknown",
        "dataset": dataset,
        "method": {name: getattr(config, name) for name in METHOD},
    }
    return {**dict.fromkeys(METADATA_KEYS), **known}


def _name_of(path: Path) -> str:
    """The name of the dataset at `path`: its folder, ignoring a list file and a train/ folder at the end."""
    folder = path.parent if path.suffix else path
    return folder.parent.name if folder.name in ("train", "training") and folder.parent.name else folder.name


def fingerprint(model: InTIClipForVideoClassification) -> str:
    """SHA-256 of a model's method, labels and weights; tells whether a results file belongs to a model."""
    config = model.config
    labels = [config.id2label[i] for i in range(config.num_labels)]
    described = [*(getattr(config, name, None) for name in METHOD + TOWER), labels]
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def public_text(text: str) -> str:
    """Remove private information from a setting or a word of a command line.

    Local paths keep only their last part, URLs lose credentials and query, tokens become "***" and the user's name
    becomes "user".
    """
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # in a container, the user ID may have no name
        user = None
    flag, equals, value = text.rpartition("=") if text.startswith("-") else ("", "", text)
    if re.match(r"(file:)?(~|\.\.([\\/]|$)|[\\/]|[A-Za-z]:[\\/])", value):
        value = PurePosixPath(value.replace("\\", "/")).name
    value = re.sub(r"://[^/\s@]*@", "://", value)
    value = re.sub(r"(://[^\s?]*)\?\S*", r"\1", value)
    home = os.path.expanduser("~")
    value = value.replace(home, "~") if home not in ("/", "~") else value
    value = re.sub(TOKEN, "***", value)
    if user:
        value = re.sub(rf"(?<!\w){re.escape(user)}(?!\w)", "user", value)
    return flag + equals + value


def check_keys(metadata: dict, where: str) -> None:
    """Raise ValueError if a key of `METADATA_KEYS` is missing from `metadata` or it has an unknown one.

    `where` names the metadata in the message.
    """
    _compare_keys(metadata, METADATA_KEYS, where)
    for name, keys in METADATA_KEYS.items():
        if keys is not None and metadata[name] is not None:
            _compare_keys(metadata[name], keys, f"{name} in {where}")
    for name in ("dataset", "method"):
        if metadata[name] is None:
            raise ValueError(f"{name} in {where} must hold {', '.join(METADATA_KEYS[name])}, got null; add them.")


def _compare_keys(values: object, keys: Collection[str], where: str) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{where} must hold {', '.join(keys)}, got {values!r}; write it as a mapping.")
    for name in values:
        if name not in keys:
            raise ValueError(f"the keys of {where} must be {', '.join(keys)}, got {name!r}; correct or remove it.")
    for name in keys:
        if name not in values:
            raise ValueError(f"{where} must have the key {name!r}, got none; add it, as null if it does not apply.")


def _check_equal(name: str, value: object, wanted: object, owner: str, reference: str) -> None:
    """Raise ValueError if `value`, the setting `name` of `owner`, is not the `wanted` one of `reference`."""
    value, wanted = json.loads(json.dumps([value, wanted]))  # makes tuples and lists equal
    if value != wanted:
        raise ValueError(
            f"{name} of {owner} must be {wanted!r}, as in {reference}, got {value!r}; correct whichever is wrong."
        )


def check_model(metadata: dict, config: InTIClipVisionConfig, model_dir: Path) -> None:
    """Raise ValueError if the metadata does not describe the model with this configuration."""
    model = f"the model in {model_dir}"
    for name, value in metadata["method"].items():
        _check_equal(name, getattr(config, name), value, model, "the metadata")
    _check_equal("num_labels", config.num_labels, metadata["dataset"]["num_labels"], model, "the metadata")
    if metadata["tower"] is not None:
        if metadata["tower"] not in TOWERS:
            raise ValueError(
                f"tower in the metadata must be {', '.join(TOWERS)} or null, got {metadata['tower']!r}; correct it."
            )
        tower = InTIClipVisionConfig(**TOWERS[metadata["tower"]])
        for name in TOWER:
            _check_equal(name, getattr(config, name), getattr(tower, name), model, f"tower {metadata['tower']}")


def check_recipe(recipe: Path, metadata: dict, config: InTIClipVisionConfig, model_dir: Path, run: dict | None) -> None:
    """Raise ValueError if metadata, model, processor or training run (run.json) do not match the recipe.

    Settings that the recipe leaves unset are this package's defaults if it starts from CLIP. If it starts from an
    InTI-CLIP checkpoint, they are the checkpoint's and are not compared.
    """
    groups = [ModelArguments, DataArguments, TrainingArguments]
    model, data, training = parse_recipe(groups, [str(recipe), "--train_dir", "videos"])
    _check_equal("model", model.model, metadata["base_model"], recipe.name, "base_model of the metadata")
    from_inti_clip = _is_local_inti_clip(model.model)
    settings = model.config_options()
    if not from_inti_clip:
        clip = CLIPVisionConfig(**{name: getattr(config, name) for name in TOWER})
        expected = InTIClipVisionConfig.from_clip(clip, **settings)
        settings = {name: getattr(expected, name) for name in (*METHOD, "drop_path_rate", "classifier_dropout")}
    for name, value in settings.items():
        _check_equal(name, getattr(config, name), value, f"the model in {model_dir}", recipe.name)
    if (Path(model_dir) / "video_preprocessor_config.json").exists():
        processor = InTIClipVideoProcessor.from_pretrained(model_dir)
        where = f"the processor in {model_dir}"
        _check_equal("num_frames", processor.num_frames, config.num_frames, where, "the model")
        for name in ("sampling", "frame_stride", "image_mean", "image_std"):
            value = getattr(data, name)
            if value is None:
                if from_inti_clip:
                    continue
                value = getattr(InTIClipVideoProcessor, name)
            _check_equal(name, getattr(processor, name), value, where, recipe.name)
    if run is not None:
        settings = settings_of(run["arguments"])
        for group in (model, data, training):
            for name, value in asdict(group).items():
                if name not in RUN_SPECIFIC_SETTINGS:
                    _check_equal(name, settings.get(name), value, f"run.json in {model_dir}", recipe.name)


def _is_local_inti_clip(model: str) -> bool:
    """Whether a folder, or a name on the Hub whose files are cached, is an InTI-CLIP checkpoint.

    False if it is neither: cards are written without the network.
    """
    try:
        values, _ = InTIClipVisionConfig.get_config_dict(model, local_files_only=True)
    except OSError:
        return False
    return values.get("model_type") == InTIClipVisionConfig.model_type


def read_results(path: str | Path, metadata: dict, model_dir: str | Path) -> dict:
    """Read a results.json of scripts/evaluate.py and check that it belongs to the model; adds `views` ("16x3x4").

    Raises ValueError if it is another file, if weights, labels or views differ, if frames were not in their order, or
    if its figures are inconsistent.
    """
    results = _read_json(path, RESULTS, "scripts/evaluate.py")
    model = load_weights(InTIClipForVideoClassification, model_dir)
    if results["fingerprint"] != fingerprint(model):
        raise ValueError(
            f"{path} must be of the model in {model_dir}, got another model's; evaluate this one with "
            "scripts/evaluate.py."
        )
    if metadata["protocol"] is not None:
        _check_equal("protocol", results["protocol"], metadata["protocol"], str(path), "the metadata")
    order = results["arguments"].get("EvaluationArguments", {}).get("frame_order", "original")
    _check_equal("frame_order", order, "original", str(path), "a card")
    counts, num_videos = torch.tensor(results["confusion_matrix"]), results["num_videos"]
    top1, mean = results["top1"], sum(results["per_class"].values()) / len(results["per_class"])
    consistent = (
        tuple(counts.shape) == (model.config.num_labels,) * 2
        and set(results["per_class"]) <= set(model.config.id2label.values())
        and counts.sum().item() + results["num_unreadable"] == num_videos
        and abs(counts.trace().item() / num_videos - top1) < 1e-9
        and abs(mean - results["mean_class_accuracy"]) < 1e-9
        and top1 <= results["top5"] <= 1
    )
    if not consistent:
        raise ValueError(
            f"the figures in {path} must be consistent, got a contradiction; evaluate again with scripts/evaluate.py."
        )
    return {**results, "views": "x".join(str(results["protocol"][name]) for name in METADATA_KEYS["protocol"])}


def read_benchmark(path: str | Path, cost: Cost) -> dict:
    """Read a file of hf_inti.comparison.measure. Raises ValueError if it is of a model with other costs."""
    benchmark = _read_json(path, BENCHMARK, "python -m hf_inti.comparison.measure")
    for name, counted in (("gmacs", cost.gmacs), ("parameters", cost.parameters)):
        _check_equal(name, benchmark[name], counted, str(path), "this model")
    return benchmark


def _read_json(path: str | Path, keys: set[str], writer: str) -> dict:
    """Read a JSON file that has `keys`; `writer` names the command that writes such files in messages."""
    try:
        values = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must be readable JSON, got: {error}; give a file that {writer} wrote.") from None
    missing = keys - set(values) if isinstance(values, dict) else keys
    if missing:
        raise ValueError(
            f"{path} must have the keys {', '.join(sorted(missing))}, got none of them; give a file that the current "
            f"{writer} wrote."
        )
    return values


def load_config(model_dir: str | Path) -> InTIClipVisionConfig:
    """Load the configuration of an InTI-CLIP model. Raises ValueError if the folder has none."""
    path = Path(model_dir) / "config.json"
    if not path.is_file() or json.loads(path.read_text()).get("model_type") != InTIClipVisionConfig.model_type:
        raise ValueError(
            f"{model_dir} must hold an InTI-CLIP model, got none; give a folder that train.py or save_pretrained wrote."
        )
    return InTIClipVisionConfig.from_pretrained(model_dir)


def read_run(model_dir: str | Path) -> dict | None:
    """Read run.json from a model's folder; None if there is none."""
    path = Path(model_dir) / "run.json"
    return _read_json(path, {"command", "arguments", "versions"}, "train.py") if path.is_file() else None


def read_text(path: Path) -> str:
    """Read a text file. Raises ValueError, with the names in model_cards/, if it does not exist."""
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in CARDS.glob("*.yaml")))
        advice = f"the names in model_cards/ are {names}." if names else "model_cards/ is only in the repository."
        raise ValueError(f"{path} must be a file, got none; {advice}")
    return path.read_text()


def read_yaml(path: Path) -> dict:
    """Read a YAML file that holds a mapping. Raises ValueError if it does not."""
    try:
        values = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} must be valid YAML, got: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must be a mapping, got a {type(values).__name__}; write keys with values.")
    return values
