"""The facts of a model card, and what has to agree with them: model, recipe, training run, what scripts measured."""

import getpass
import hashlib
import json
import os
import re
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
from ..training.run_info import FREE_SETTINGS


ROOT = Path(__file__).parents[2]
CARDS = ROOT / "model_cards"
TOKEN = r"\bhf_[A-Za-z0-9]{20,}"  # what a token of the Hub looks like
# Fields of the configuration: ours, and those of CLIP's tower.
METHOD = "num_frames compression compression_layers compression_options adaptation adaptation_options".split()
TOWER = "hidden_size intermediate_size num_hidden_layers num_attention_heads image_size patch_size".split()
FACTS = {
    "title": None,
    "recipe": None,  # a file of scripts/recipes
    "base_model": None,
    "tower": None,  # of `published.TOWERS`
    "license": None,
    "dataset": ("name", "id", "split", "num_labels", "terms", "limits"),
    "method": METHOD,
    "published": ("table", "model"),  # of a row of `published.TABLES`
    "protocol": ("frames", "crops", "clips"),
}
# Settings in which a run may differ from its recipe: with those that decide nothing, where its data lie, the seed,
# how a step's clips are spread over devices, and where it is pushed.
OWN_SETTINGS = FREE_SETTINGS | {
    *("model", "train_dir", "eval_dir", "layout", "train_split", "eval_split", "video_root", "streaming"),
    *("cache_frames", "seed", "batch_size", "gradient_accumulation_steps", "mixed_precision", "eval_every_epochs"),
}
RESULTS = {  # what scripts/evaluate.py writes and cards need
    *("top1", "top5", "mean_class_accuracy", "per_class", "confusion_matrix", "num_videos", "num_unreadable"),
    *("arguments", "command", "commit", "fingerprint", "protocol", "versions"),
}
BENCHMARK = {"conditions", "gmacs", "parameters", "forward_clips_per_second"}  # what comparison_measure.py writes


def load_metadata(path_or_name: str | Path) -> dict:
    """The facts of a checkpoint, by name (model_cards/NAME.yaml) or from a YAML file of one's own.

    `dataset` may name a file of model_cards/datasets. Raises ValueError for a file that is missing or no mapping, and
    for keys that are unknown or missing; what does not exist is null.
    """
    path = Path(path_or_name)
    path = path if path.suffix == ".yaml" else CARDS / f"{path_or_name}.yaml"
    facts = read_yaml(path)
    if isinstance(facts.get("dataset"), str):
        facts["dataset"] = read_yaml(CARDS / "datasets" / f"{facts['dataset']}.yaml")
    check_keys(facts, str(path))
    return facts


def metadata_of_run(model_dir: str | Path) -> dict:
    """The facts of any model, from its config.json and, where scripts/train.py left it, run.json.

    The licence of the weights is "unknown": it is their owner's to choose, in a facts file. No path gets in: the
    dataset has its folder's name, the base model none unless it is on the Hub. Raises ValueError if a file is missing.
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
    return {**dict.fromkeys(FACTS), **known}


def _name_of(place: Path) -> str:
    """What a dataset is called: its folder, not that of its training part nor a list in it."""
    place = place.parent if place.suffix else place
    return place.parent.name if place.name in ("train", "training") and place.parent.name else place.name


def fingerprint(model: InTIClipForVideoClassification) -> str:
    """SHA-256 of a model's method, labels and weights: by it a results file is known to be of a model."""
    config = model.config
    labels = [config.id2label[i] for i in range(config.num_labels)]
    what = [*(getattr(config, name, None) for name in METHOD + TOWER), labels]
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def public_text(text: str) -> str:
    """What may be public of a setting or a word of a command line.

    Of local paths only the last part stays, of URLs no credentials and no query, and the user's name becomes "user".
    """
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container may run as nobody that it knows
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


def check_keys(facts: dict, where: str) -> None:
    """Raise a ValueError that names the first key of `FACTS` that is missing, or one that is not of them."""
    _compare_keys(facts, FACTS, where)
    for name, wanted in FACTS.items():
        if wanted is not None and facts[name] is not None:
            _compare_keys(facts[name], wanted, f"{where}: {name}")
    for name in ("dataset", "method"):
        if facts[name] is None:
            raise ValueError(f"{where}: {name} is null; give {', '.join(FACTS[name])}.")


def _compare_keys(given, wanted, where: str) -> None:
    if not isinstance(given, dict):
        raise ValueError(f"{where} must hold {', '.join(wanted)}, got {given!r}.")
    for name in given:
        if name not in wanted:
            raise ValueError(f"{where} has an unknown key {name!r}; the keys are {', '.join(wanted)}.")
    for name in wanted:
        if name not in given:
            raise ValueError(f"{where} lacks {name!r}; add it, as null where there is none.")


def _agree(name: str, there, here, where: str, whose: str) -> None:
    there, here = json.loads(json.dumps([there, here]))  # tuples and lists are alike
    if there != here:
        raise ValueError(f"{where} has {name} = {there!r}, {whose} {here!r}; correct the one that is wrong.")


def check_model(facts: dict, config: InTIClipVisionConfig, model_dir: Path) -> None:
    """Raise a ValueError where the facts do not describe the model."""
    for name, value in facts["method"].items():
        _agree(name, getattr(config, name), value, f"the model in {model_dir}", "the facts")
    _agree("num_labels", config.num_labels, facts["dataset"]["num_labels"], f"the model in {model_dir}", "the facts")
    if facts["tower"] is not None:
        if facts["tower"] not in TOWERS:
            raise ValueError(f"the facts name tower {facts['tower']!r}; it must be {', '.join(TOWERS)} or null.")
        tower = InTIClipVisionConfig(**TOWERS[facts["tower"]])
        for name in TOWER:
            _agree(name, getattr(config, name), getattr(tower, name), f"the model in {model_dir}", facts["tower"])


def check_recipe(recipe: Path, facts: dict, config: InTIClipVisionConfig, model_dir: Path, run: dict | None) -> None:
    """Raise a ValueError where facts, model, processor or training run (run.json) do not come from the recipe."""
    groups = [ModelArguments, DataArguments, TrainingArguments]
    model, data, training = parse_recipe(groups, [str(recipe), "--train_dir", "videos"])
    _agree("model", model.model, facts["base_model"], recipe.name, "the facts have base_model")
    clip = CLIPVisionConfig(**{name: getattr(config, name) for name in TOWER})
    wanted = InTIClipVisionConfig.from_clip(clip, **model.config_options())
    for name in (*METHOD, "drop_path_rate", "classifier_dropout"):
        _agree(name, getattr(config, name), getattr(wanted, name), f"the model in {model_dir}", recipe.name)
    if (Path(model_dir) / "video_preprocessor_config.json").exists():
        processor = InTIClipVideoProcessor.from_pretrained(model_dir)
        _agree("num_frames", processor.num_frames, config.num_frames, f"the processor in {model_dir}", "the model")
        for name in ("sampling", "frame_stride", "image_mean", "image_std"):
            value = getattr(data, name)
            value = getattr(InTIClipVideoProcessor, name) if value is None else value
            _agree(name, getattr(processor, name), value, f"the processor in {model_dir}", recipe.name)
    if run is not None:
        settings = {name: value for group in run["arguments"].values() for name, value in group.items()}
        for group in (model, data, training):
            for name, value in json.loads(json.dumps(asdict(group))).items():
                if name not in OWN_SETTINGS:
                    _agree(name, settings.get(name), value, f"run.json in {model_dir}", recipe.name)


def read_results(path: Path, facts: dict, model_dir: Path) -> dict:
    """A results.json of scripts/evaluate.py, with `views` ("16x3x4"), once it is known to be of this model.

    Raises ValueError for another file, other weights, labels or views, and figures that contradict each other.
    """
    results = _read_json(path, RESULTS, "scripts/evaluate.py")
    model = InTIClipForVideoClassification.from_pretrained(model_dir)
    if results["fingerprint"] != fingerprint(model):
        raise ValueError(f"{path} is not of the model in {model_dir}; evaluate that one with scripts/evaluate.py.")
    if facts["protocol"] is not None:
        _agree("protocol", results["protocol"], facts["protocol"], str(path), "the facts")
    counts, num_videos = torch.tensor(results["confusion_matrix"]), results["num_videos"]
    top1, mean = results["top1"], sum(results["per_class"].values()) / len(results["per_class"])
    whole = (
        tuple(counts.shape) == (model.config.num_labels,) * 2
        and set(results["per_class"]) <= set(model.config.id2label.values())
        and counts.sum().item() + results["num_unreadable"] == num_videos
        and abs(counts.trace().item() / num_videos - top1) < 1e-9
        and abs(mean - results["mean_class_accuracy"]) < 1e-9
        and top1 <= results["top5"] <= 1
    )
    if not whole:
        raise ValueError(f"the figures in {path} contradict each other; evaluate again with scripts/evaluate.py.")
    return {**results, "views": "x".join(str(results["protocol"][name]) for name in FACTS["protocol"])}


def read_benchmark(path: Path, cost: Cost) -> dict:
    """What hf_inti.comparison.measure wrote; a ValueError if it is of a model with other costs."""
    benchmark = _read_json(path, BENCHMARK, "python -m hf_inti.comparison.measure")
    for name, counted in (("gmacs", cost.gmacs), ("parameters", cost.parameters)):
        _agree(name, benchmark[name], counted, str(path), "this model")
    return benchmark


def _read_json(path: Path, wanted: set[str], writer: str) -> dict:
    try:
        values = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}; give a file that {writer} wrote.") from None
    lacking = wanted - set(values) if isinstance(values, dict) else wanted
    if lacking:
        raise ValueError(f"{path} holds no {', '.join(sorted(lacking))}; give a file that {writer} of today wrote.")
    return values


def load_config(model_dir: str | Path) -> InTIClipVisionConfig:
    path = Path(model_dir) / "config.json"
    if not path.is_file() or json.loads(path.read_text()).get("model_type") != InTIClipVisionConfig.model_type:
        raise ValueError(f"{model_dir} holds no InTI-CLIP; give a folder that train.py or save_pretrained wrote.")
    return InTIClipVisionConfig.from_pretrained(model_dir)


def read_run(model_dir: str | Path) -> dict | None:
    path = Path(model_dir) / "run.json"
    return _read_json(path, {"command", "arguments", "versions"}, "train.py") if path.is_file() else None


def read_text(path: Path) -> str:
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in CARDS.glob("*.yaml"))) or "none: cards need a clone of the repository"
        raise ValueError(f"there is no {path}; facts are there of {names}.")
    return path.read_text()


def read_yaml(path: Path) -> dict:
    try:
        values = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold names with values, got {type(values).__name__}.")
    return values
