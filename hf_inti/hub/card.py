"""Model cards: one template, one metadata file per checkpoint, and of our figures only what a script measured.

The template is template.md in this folder; metadata are model_cards/NAME.yaml (keys: `metadata.FACTS`); accuracies come
from a results.json of scripts/evaluate.py. Costs are counted; the papers' figures are `published.TABLES`.
"""

import re
import shlex
from pathlib import Path

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
EXAMPLE, FIGURE = "example.mp4", "figure.png"  # what they are called in a model's repository
PICTURED = ("inti", "linear_pooling", "tome", "sta")  # the compressions that `draw_figure` can draw
LABELS = ("Reproduces", "Source", "Command", "Hardware")  # in a recipe's header


def render_card(facts: dict, model_dir: str | Path, repo_id: str, results=None, benchmark=None) -> ModelCard:
    """The card of the model in `model_dir`, for the repository `repo_id`, into which `EXAMPLE` and `FIGURE` belong too.

    Args:
        facts: of `load_metadata` or `metadata_of_run`.
        results: a results.json that scripts/evaluate.py wrote of this model; without it the card claims no accuracy.
        benchmark: a file that `python -m hf_inti.comparison.measure` wrote of this model; without it no speed.

    Raises ValueError where facts, recipe, model, processor, run.json, results and benchmark do not fit together.
    """
    validate_repo_id(repo_id)
    check_keys(facts, "the facts")
    config, run, recipe = load_config(model_dir), read_run(model_dir), None
    check_model(facts, config, model_dir)
    if facts["recipe"] is not None:
        recipe = ROOT / "scripts" / "recipes" / facts["recipe"]
        check_recipe(recipe, facts, config, model_dir, run)
    measured = None if results is None else read_results(results, facts, model_dir)
    cost = count_costs(config)["total"]
    clip = CLIPVisionConfig(**{name: getattr(config, name) for name in TOWER})
    naive = InTIClipVisionConfig.from_clip(clip, compression="none", num_labels=config.num_labels)
    name, dataset = repo_id.split("/")[-1], facts["dataset"]
    data = ModelCardData(
        license=facts["license"],
        library_name="transformers",
        pipeline_tag="video-classification",
        base_model=facts["base_model"],
        base_model_relation=facts["base_model"] and "finetune",
        datasets=dataset["id"] and [dataset["id"]],
        metrics=["accuracy"],
        tags=["clip", config.compression, "action-recognition", "arxiv:2408.06840"],
        widget=[{"src": f"https://huggingface.co/{repo_id}/resolve/main/{EXAMPLE}", "example_title": "Example clip"}],
        model_name=measured and name,
        eval_results=measured and _legacy_results(measured, dataset),
    )
    return ModelCard.from_template(
        data,
        template_str=read_text(TEMPLATE),
        title=facts["title"] or name,
        repo_id=repo_id,
        facts=facts,
        config=config,
        layers=config.compression_layers if COMPRESSIONS[config.compression].uses_layers else [],
        figure=FIGURE if config.compression in PICTURED else None,
        example=EXAMPLE,
        cost=cost,
        naive=count_costs(naive, config.num_frames)["total"],
        published=_published(facts, config, cost),
        header=recipe and _header(recipe),
        run=run,
        command=run and _public(run["command"]),
        results=measured,
        evaluation=measured and _public(measured["command"]),
        speed=None if benchmark is None else read_benchmark(benchmark, cost),
    )


def write_eval_results(folder: str | Path, facts: dict, results) -> Path | None:
    """Write the accuracy in a results file to `folder`/.eval_results, the Hub's current form; `folder` has the model.

    Returns the file, or None (and writes nothing) for a dataset that is not on the Hub, since that form needs its id.
    Raises ValueError as `render_card` does for results that are not of this model.
    """
    measured, dataset = read_results(results, facts, folder), facts["dataset"]
    if dataset["id"] is None:
        return None
    notes = f"top-1 accuracy on {measured['num_videos']} videos as a share, views {measured['views']}"
    entry = EvalResultEntry(dataset_id=dataset["id"], task_id="default", value=measured["top1"], notes=notes)
    path = Path(folder) / ".eval_results" / f"{dataset['id'].split('/')[-1].lower()}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False))
    return path


def draw_figure(model_dir: str | Path, clip, path: str | Path) -> bool:
    """Draw to `path` (PNG) what the model's compression does to a clip: a file, a URL, or what else a processor takes.

    Returns False, and draws nothing, for a compression of which there is no picture. (See `draw_compression`.)
    """
    model = InTIClipForVideoClassification.from_pretrained(model_dir, dtype=torch.float32).eval()  # numpy has no bf16
    processor = InTIClipVideoProcessor.from_pretrained(model_dir)
    frames = processor(clip, do_rescale=False, do_normalize=False)["pixel_values"]
    with torch.inference_mode():
        out = model(
            processor.rescale_and_normalize(frames), output_interpolation_weights=True, output_token_source=True
        )
    return draw_compression(out, frames[0] / 255, model.config.patch_size, path) is not None


def _legacy_results(measured: dict, dataset: dict) -> list[EvalResult]:
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


def _published(facts: dict, config: InTIClipVisionConfig, cost: Cost) -> dict | None:
    """The paper's figures for this setting; a ValueError where the row that the facts name is of something else."""
    if facts["published"] is None:
        return None
    title, model = facts["published"]["table"], facts["published"]["model"]
    dataset = str(facts["recipe"]).split("_")[0]
    for table in TABLES:
        for row in table.rows if table.title == title and dataset in table.datasets else ():
            if (row.model, row.tower) == (model, facts["tower"]) and row.interpretations:
                options = {**TOWERS[row.tower], **row.interpretations[0].options}
                read = InTIClipVisionConfig(**options, num_frames=config.num_frames, num_labels=config.num_labels)
                if count_costs(read)["total"] == cost:
                    return {**row._asdict(), "table": title, "top1": row.top1[table.datasets.index(dataset)]}
    raise ValueError(
        f"the facts name {model!r}, {facts['tower']} in {title!r} of the paper, on {dataset}, which has no such row, "
        "or of a model with other costs; correct published, tower or recipe."
    )


def _header(recipe: Path) -> dict[str, str]:
    """What the comment at the head of a recipe says, by `LABELS`; commands keep their lines."""
    text = read_text(recipe).split("\n\n", 1)[0]
    parts = re.split(rf"^# ({'|'.join(LABELS)}): *", text, flags=re.MULTILINE)
    said = dict(zip(parts[1::2], parts[2::2], strict=True))
    lines = {label: [line.removeprefix("#").strip() for line in said[label].splitlines()] for label in LABELS}
    return {label: ("\n" if label == "Command" else " ").join(lines[label]).strip() for label in LABELS}


def _public(command: list[str]) -> str:
    words = [public_text(word) for word in command[1:]]
    return shlex.join(["python", f"scripts/{Path(command[0]).name}", *words])
