"""What InTI's weights follow: alpha and beta of trained models on many videos, beside what changes between frames.

    python scripts/compare.py weights outputs/inti/seed_0/last outputs/inti/seed_1/last --data_dir videos/test

Writes weights.md, weights.json and weights.png into output_dir. Every patch of every pair of frames counts, at every
stage. The frames of later stages are the input's pixels, summed with the weights as the tokens were.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import torch
from scipy.stats import spearmanr
from torch.nn.functional import unfold
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data.clips import VideoClips, collate
from ..data.datasets import load_video_dataset
from ..data.layouts import LAYOUTS
from ..measure.jobs import write_json
from ..measure.records import provenance, source_line
from ..measure.tables import markdown_table
from ..model.modeling_inti_clip import InTIClipForVideoClassification
from ..model.video_processing_inti_clip import InTIClipVideoProcessor
from ..training.checkpoints import load_classifier
from ..training.cli import parse_arguments
from ..training.evaluation import EvalTransform


AXES = ("changes", "by_change")
PARTS = 10  # of equally many patches, by how much they change
HEADS = [
    "model",
    "stage",
    "mean alpha",
    "one-sidedness",
    "above 1/2, %",
    "of the stillest",
    "of the liveliest",
    "rank r",
]


@dataclass
class WeightsArguments:
    models: list[str] = field(metadata={"help": "Trained models with InTI: folders or names on the Hub."})
    data_dir: str = field(metadata={"help": "Videos, in any layout of the loaders."})
    output_dir: str = field(default="outputs/weights", metadata={"help": "Gets the table, the numbers, the picture."})
    layout: str = field(default="auto", metadata={"help": f"Layout: auto, or one of {', '.join(LAYOUTS)}."})
    split: str = field(default="test", metadata={"help": "Which split, where the dataset has splits."})
    video_root: str | None = field(default=None, metadata={"help": "Where the paths of a list begin."})
    batch_size: int = field(default=16, metadata={"help": "Videos at a time."})

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}.")


def main(arguments: list[str]) -> int:
    """`compare.py weights`. Raises ValueError for a model without InTI, or where no video can be read."""
    args = parse_arguments(WeightsArguments, ["models"], __doc__, arguments)
    rows = []
    for name in args.models:
        model, processor = load_classifier(name)
        if getattr(model.config, "compression", None) != "inti":
            raise ValueError(f"{name} has no InTI, whose weights are looked at; give a model with compression inti.")
        changes, weights, videos = observe(model, processor, args)
        for stage, (change, pair) in enumerate(zip(changes, weights, strict=True), start=1):
            rows.append({"model": name, "stage": stage, "num_videos": videos, **summary(change, pair)})
    write_report(rows, Path(args.output_dir))
    return 0


@torch.inference_mode()
def observe(
    model: InTIClipForVideoClassification, processor: InTIClipVideoProcessor, args: WeightsArguments
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...], int]:
    """`change` (M,) and the weights (M, 2) of the M pairs of patches of each stage, and how many videos had them."""
    place = {"layout": args.layout, "split": args.split, "video_root": args.video_root}
    clips = VideoClips(load_video_dataset(args.data_dir, **place), EvalTransform(processor), on_bad_video="keep")
    std = torch.tensor(processor.image_std)[:, None, None]  # changes are in shares of the range of pixels
    found = [([], []) for _ in model.config.compression_layers]
    videos = 0
    for batch in tqdm(DataLoader(clips, batch_size=args.batch_size, collate_fn=collate), desc="Looking", unit="batch"):
        pixel_values = batch["pixel_values"][batch["ok"], 0]
        if len(pixel_values) == 0:
            continue
        videos += len(pixel_values)
        weights = model(pixel_values, output_interpolation_weights=True).interpolation_weights
        patches = patches_of(pixel_values * std, model.config.patch_size)
        for (changes, pairs), (change, pair) in zip(found, stages(patches, weights), strict=True):
            changes.append(change.flatten())
            pairs.append(pair.flatten(0, 2))
    if videos == 0:
        raise ValueError(f"no video of {args.data_dir} can be read; give videos that can.")
    changes, weights = zip(*[(torch.cat(changes), torch.cat(pairs)) for changes, pairs in found], strict=True)
    return changes, weights, videos


def patches_of(pixel_values: torch.Tensor, size: int) -> torch.Tensor:
    """Clips (B, T, 3, H, W) -> the pixels of their patches (B, T, N, 3 * size * size), row by row."""
    return unfold(pixel_values.flatten(0, 1), size, stride=size).mT.unflatten(0, pixel_values.shape[:2])


def stages(patches: torch.Tensor, weights: tuple[torch.Tensor, ...]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For each stage the mean absolute change within each pair of patches (B, T/2, N), and its weights (B, T/2, N, 2).

    `patches` (B, T, N, P) are the input's; `weights` are the model's, class token included.
    """
    for pair in weights:
        pair = pair[:, :, 1:]
        first, second = patches[:, 0::2], patches[:, 1::2]
        yield (first - second).abs().mean(dim=-1), pair
        patches = pair[..., :1] * first + pair[..., 1:] * second


def summary(change: torch.Tensor, weights: torch.Tensor) -> dict:
    """Figures of one stage; `one_sidedness` is |alpha - beta|, 0 for the plain average, 1 for one frame alone.

    `by_change` is its mean in each of `PARTS` parts of equally many patches, those that change least first, and
    `changes` their mean change; `rank_correlation` is Spearman's, of both.
    """
    alpha, beta = weights.double().unbind(-1)
    one_sided = (alpha - beta).abs()
    order = change.argsort()
    parts = [part for part in order.tensor_split(PARTS) if len(part)]
    moves = one_sided.std() > 0 and change.std() > 0
    return {
        "mean_alpha": alpha.mean().item(),
        "one_sidedness": one_sided.mean().item(),
        "share_above_half": (one_sided > 0.5).double().mean().item(),
        "by_change": [one_sided[part].mean().item() for part in parts],
        "changes": [change[part].double().mean().item() for part in parts],
        "rank_correlation": float(spearmanr(change, one_sided).statistic) if moves else None,
    }


def write_report(rows: list[dict], folder: Path) -> None:
    """Write weights.md, weights.json and weights.png, and print the first."""
    folder.mkdir(parents=True, exist_ok=True)
    source = provenance()
    lines = []
    for row in rows:
        numbers = [row["mean_alpha"], row["one_sidedness"], 100 * row["share_above_half"]]
        numbers += [row["by_change"][0], row["by_change"][-1], row["rank_correlation"]]
        digits = [2, 2, 0, 2, 2, 2]
        cells = ["-" if x is None else f"{x:.{n}f}" for x, n in zip(numbers, digits, strict=True)]
        lines.append([row["model"], str(row["stage"]), *cells])
    text = markdown_table(HEADS, lines) + (
        f"\nOne-sidedness is |alpha - beta|: 0 for the plain average, 1 for one frame alone; also its mean over the "
        f"tenth of the patches that changes least, and most. Rank r is Spearman's, of one-sidedness and the mean "
        f"absolute change of the pixels. {rows[0]['num_videos']} videos.\n\n{source_line(source)}\n"
    )
    (folder / "weights.md").write_text(text)
    write_json(folder / "weights.json", {**source, "rows": rows})
    draw(rows, folder / "weights.png")
    print(text)


def draw(rows: list[dict], path: Path) -> None:
    """One-sidedness against change, a line for each stage: the mean over the models, each of them a thin line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for stage in sorted({row["stage"] for row in rows}):
        of_stage = [row for row in rows if row["stage"] == stage]
        for row in of_stage:
            axes.plot(row["changes"], row["by_change"], color=f"C{stage - 1}", alpha=0.3, linewidth=1)
        means = [[fmean(column) for column in zip(*(row[name] for row in of_stage), strict=True)] for name in AXES]
        axes.plot(*means, color=f"C{stage - 1}", marker="o", markersize=3, label=f"stage {stage}")
    axes.set(
        xlabel="mean absolute change of a patch's pixels, share of their range", ylabel="|alpha - beta|", ylim=(0, 1)
    )
    axes.legend()
    figure.savefig(path, dpi=120)
