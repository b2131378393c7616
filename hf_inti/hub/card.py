"""Model cards, rendered from one template and one metadata file per checkpoint.

The template is template.md in this folder; the metadata files are model_cards/NAME.yaml (keys:
`metadata.METADATA_KEYS`). A card claims only what was measured: accuracies come from a results.json of
scripts/evaluate.py, speed from hf_inti.comparison.measure. Costs are counted; the papers' figures are those of
`published.TABLES`.
"""

import re
import shlex
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.utils import validate_repo_id
from transformers import CLIPVisionConfig

from ..measure.costs import Cost, count_costs
from ..model.compression import COMPRESSIONS
from ..model.configuration_inti_clip import InTIClipVisionConfig
from ..model.modeling_inti_clip import InTIClipForVideoClassification
from ..model.video_processing_inti_clip import InTIClipVideoProcessor
from ..papers.published import TABLES, TOWERS
from ..training.weights import load_weights
from ..visualization import draw_compression
from .metadata import (
    ROOT,
    TOWER,
    check_keys,
    check_model,
    check_recipe,
    load_config,
    load_metadata,
    metadata_of_run,
    public_text,
    read_benchmark,
    read_results,
    read_run,
    read_text,
)


__all__ = ["EXAMPLE", "FIGURE", "draw_figure", "metadata_of_run", "load_metadata", "render_card", "write_eval_results"]

TEMPLATE = Path(__file__).with_name("template.md")
EXAMPLE, FIGURE = "example.mp4", "figure.png"  # file names in a model's repository
DRAWABLE = ("inti", "linear_pooling", "tome", "sta")  # compressions that `draw_figure` can draw
LABELS = ("Reproduces", "Source", "Command", "Hardware")  # of the sections in a recipe's header


def render_card(
    metadata: dict,
    model_dir: str | Path,
    repo_id: str,
    results: str | Path | None = None,
    benchmark: str | Path | None = None,
) -> ModelCard:
    """Render the card of the model in `model_dir` for the repository `repo_id`.

    The card refers to the files `EXAMPLE` and `FIGURE` in the repository.

    Args:
        metadata: from `load_metadata` or `metadata_of_run`.
        results: a results.json of this model, written by scripts/evaluate.py; without it the card claims no accuracy.
        benchmark: a file on this model, written by `python -m hf_inti.comparison.measure`; without it the card claims
            no speed.

    Raises ValueError if metadata, recipe, model, processor, run.json, results and benchmark do not match.
    """
    validate_repo_id(repo_id)
    check_keys(metadata, "the metadata")
    config, run, recipe = load_config(model_dir), read_run(model_dir), None
    check_model(metadata, config, model_dir)
    if metadata["recipe"] is not None:
        recipe = ROOT / "scripts" / "recipes" / metadata["recipe"]
        check_recipe(recipe, metadata, config, model_dir, run)
    measured = None if results is None else read_results(results, metadata, model_dir)
    cost = count_costs(config)["total"]
    clip = CLIPVisionConfig(**{name: getattr(config, name) for name in TOWER})
    naive = InTIClipVisionConfig.from_clip(clip, compression="none", num_labels=config.num_labels)
    return ModelCard.from_template(
        _card_data(metadata, config, repo_id, measured),
        template_str=read_text(TEMPLATE),
        title=metadata["title"] or repo_id.split("/")[-1],
        repo_id=repo_id,
        metadata=metadata,
        config=config,
        layers=config.compression_layers if COMPRESSIONS[config.compression].uses_layers else [],
        figure=FIGURE if config.compression in DRAWABLE else None,
        example=EXAMPLE,
        cost=cost,
        naive=count_costs(naive, config.num_frames)["total"],
        published=_published(metadata, config, cost),
        header=recipe and _header(recipe),
        run=run,
        command=run and _public_command(run["command"]),
        results=measured,
        evaluation=measured and _public_command(measured["command"]),
        speed=None if benchmark is None else read_benchmark(benchmark, cost),
    )


def _card_data(metadata: dict, config: InTIClipVisionConfig, repo_id: str, measured: dict | None) -> ModelCardData:
    """The card's YAML header, which the Hub reads."""
    dataset = metadata["dataset"]
    return ModelCardData(
        license=metadata["license"],
        library_name="transformers",
        pipeline_tag="video-classification",
        base_model=metadata["base_model"],
        base_model_relation=metadata["base_model"] and "finetune",
        datasets=dataset["id"] and [dataset["id"]],
        metrics=["accuracy"],
        tags=["clip", config.compression, "action-recognition", "arxiv:2408.06840"],
        widget=[{"src": f"https://huggingface.co/{repo_id}/resolve/main/{EXAMPLE}", "example_title": "Example clip"}],
        model_name=measured and repo_id.split("/")[-1],
        eval_results=measured and _legacy_results(measured, dataset),
    )


def write_eval_results(folder: str | Path, metadata: dict, results: str | Path) -> Path | None:
    """Write the accuracy from a results file to .eval_results in the model's folder, the Hub's current format.

    Returns the path of the file. Writes nothing and returns None if the dataset has no id on the Hub, which the format
    requires. Raises ValueError if the results are not of this model, as `render_card` does.
    """
    measured, dataset = read_results(results, metadata, folder), metadata["dataset"]
    if dataset["id"] is None:
        return None
    notes = f"top-1 accuracy on {measured['num_videos']} videos as a share, views {measured['views']}"
    entry = EvalResultEntry(dataset_id=dataset["id"], task_id="default", value=measured["top1"], notes=notes)
    path = Path(folder) / ".eval_results" / f"{dataset['id'].split('/')[-1].lower()}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False))
    return path


def draw_figure(model_dir: str | Path, clip: Any, path: str | Path) -> bool:
    """Draw what the model's compression does to a clip, as a PNG file; see `draw_compression`.

    `clip` is a path, a URL or anything else that the processor takes. Returns False, and draws nothing, if the
    compression has no figure.
    """
    model = load_weights(InTIClipForVideoClassification, model_dir, dtype=torch.float32).eval()  # numpy has no bf16
    processor = InTIClipVideoProcessor.from_pretrained(model_dir)
    frames = processor(clip, do_rescale=False, do_normalize=False)["pixel_values"]
    with torch.inference_mode():
        out = model(
            processor.rescale_and_normalize(frames), output_interpolation_weights=True, output_token_source=True
        )
    return draw_compression(out, frames[0] / 255, model.config.patch_size, path) is not None


def _legacy_results(measured: dict, dataset: dict) -> list[EvalResult]:
    """The accuracies in the format of a card's model-index, which preceded .eval_results."""
    shared = {
        "task_type": "video-classification",
        "dataset_type": dataset["id"] or dataset["name"],
        "dataset_name": dataset["name"],
        "dataset_split": dataset["split"],
        "dataset_args": {"views": measured["views"], "num_videos": measured["num_videos"]},
        "metric_type": "accuracy",
    }
    names = {"top1": "top-1", "top5": "top-5", "mean_class_accuracy": "mean class accuracy"}
    return [EvalResult(**shared, metric_name=name, metric_value=measured[key]) for key, name in names.items()]


def _published(metadata: dict, config: InTIClipVisionConfig, cost: Cost) -> dict | None:
    """The paper's figures for this setting. Raises ValueError if the row in the metadata is of another model."""
    if metadata["published"] is None:
        return None
    title, model, tower = metadata["published"]["table"], metadata["published"]["model"], metadata["tower"]
    dataset = str(metadata["recipe"]).split("_")[0]
    for table in TABLES:
        if table.title != title or dataset not in table.datasets:
            continue
        for row in table.rows:
            if (row.model, row.tower) == (model, tower) and row.interpretations:
                options = {**TOWERS[row.tower], **row.interpretations[0].options}
                row_config = InTIClipVisionConfig(**options, num_frames=config.num_frames, num_labels=config.num_labels)
                if count_costs(row_config)["total"] == cost:
                    return {**row._asdict(), "table": title, "top1": row.top1[table.datasets.index(dataset)]}
    raise ValueError(
        f"published in the metadata must name a row of the paper with this model's costs, got {model!r}, {tower} in "
        f"{title!r} on {dataset}; correct published, tower or recipe."
    )


def _header(recipe: Path) -> dict[str, str]:
    """The sections of the comment at the top of a recipe, by label; only the command keeps its line breaks."""
    text = read_text(recipe).split("\n\n", 1)[0]
    parts = re.split(rf"^# ({'|'.join(LABELS)}): *", text, flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    lines = {label: [line.removeprefix("#").strip() for line in sections[label].splitlines()] for label in LABELS}
    return {label: ("\n" if label == "Command" else " ").join(lines[label]).strip() for label in LABELS}


def _public_command(command: list[str]) -> str:
    """A recorded command line of a script, without private paths and names."""
    words = [public_text(word) for word in command[1:]]
    return shlex.join(["python", f"scripts/{Path(command[0]).name}", *words])
