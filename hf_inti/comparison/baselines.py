"""What no video model is needed for: ridge regression on pixels, and on the frame features of the tower.

A comparison that does not beat them has not learned what the videos hold. Both see what the models see in evaluation:
frames resized and normalised, in their order. They are fitted on one view of each video, and tested as the models are,
on the sum of the scores of its views.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import Dataset
from sklearn.linear_model import RidgeClassifierCV
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn.functional import avg_pool2d
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import CLIPVisionModel

from ..data.clips import VideoClips, collate
from ..data.datasets import label_names_of
from ..measure.jobs import read_json, write_json
from ..measure.records import provenance
from ..training.arguments import DataArguments, ModelArguments
from ..training.evaluation import EvalTransform
from ..training.setup import build_model, build_processor, load_datasets
from ..training.weights import load_weights


STRENGTHS = [10.0**n for n in range(-1, 7)]  # of the penalty, for features of variance 1
FOLDS = 5  # of the cross-validation that chooses the penalty
SIDE = 16  # pixels of the grey frames
BASELINES = {"Ridge, pixels": "pixels", "Ridge, frame features": "features"}


def grey_pixels(pixel_values: torch.Tensor) -> torch.Tensor:
    """Clips (B, T, 3, H, W) -> small grey frames side by side, (B, T * h * w)."""
    grey = pixel_values.mean(dim=2)
    return avg_pool2d(grey, max(1, min(grey.shape[-2:]) // SIDE)).flatten(1)


@torch.no_grad()
def frame_features(pixel_values: torch.Tensor, tower: CLIPVisionModel) -> torch.Tensor:
    """Clips (B, T, 3, H, W) -> the tower's features of their frames side by side, (B, T * D)."""
    return tower(pixel_values.flatten(0, 1)).pooler_output.unflatten(0, pixel_values.shape[:2]).flatten(1)


def fit_baselines(
    model: ModelArguments,
    data: DataArguments,
    folder: Path,
    views: dict,
    orders: Sequence[str] = (),
    videos: dict | None = None,
) -> dict[str, dict]:
    """The last evaluation of each baseline, by its name; kept in `folder`/baselines.json, and read from there.

    `model` names the tower and the number of frames; `views` are num_clips and num_crops, `orders` other orders of
    the test's frames; `videos` describes those of a fold, without which what is kept does not count. Broken videos are
    left out of the training and wrong in the evaluation.
    """
    path = folder / "baselines.json"
    kept = read_json(path) or {}
    other = kept.get("views", {"num_clips": 1, "num_crops": 1}) != views or kept.get("videos") != videos
    if other or "top1" not in kept or not set(orders) <= kept.get("orders", {}).keys():
        train_set, eval_set = load_datasets(data, Accelerator())
        config = build_model(model, label_names_of(train_set)).config
        processor = build_processor(model.checkpoint, config, data)
        tower = load_weights(CLIPVisionModel, model.model).eval()
        train, top1 = read_views(train_set, EvalTransform(processor), tower), {}
        for order in ("original", *orders):
            test = read_views(eval_set, EvalTransform(processor, **views, frame_order=order), tower)
            top1[order] = {name: ridge_accuracy(name, train, test) for name in BASELINES}
        kept = {"top1": top1.pop("original"), "num_videos": len(eval_set), "views": views}
        kept |= ({"orders": top1} if top1 else {}) | ({} if videos is None else {"videos": videos})
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {**kept, **provenance()})
    return {
        name: {
            "eval_top1": kept["top1"][name],
            "eval_num_videos": kept["num_videos"],
            **{order: kept["orders"][order][name] for order in orders},
        }
        for name in BASELINES
    }


def read_views(dataset: Dataset, transform: EvalTransform, tower: CLIPVisionModel) -> dict[str, torch.Tensor]:
    """`pixels` (N, V, T * h * w), `features` (N, V, T * D), `labels` and `ok` (N,) of all videos in V views each."""
    clips = VideoClips(dataset, transform, on_bad_video="keep")
    parts = []
    for batch in tqdm(
        DataLoader(clips, batch_size=16, collate_fn=collate), desc="Baselines", unit="batch", leave=False
    ):
        pixel_values = batch["pixel_values"]
        views = pixel_values.flatten(0, 1)
        found = {"pixels": grey_pixels(views), "features": frame_features(views, tower)}
        found = {name: value.unflatten(0, pixel_values.shape[:2]) for name, value in found.items()}
        parts.append({**found, "labels": batch["labels"], "ok": batch["ok"]})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def ridge_accuracy(name: str, train: dict[str, torch.Tensor], test: dict[str, torch.Tensor]) -> float:
    """The share of test videos that ridge regression classifies rightly, by the sum of the scores of their views.

    It is fitted on the first view of each training video. The penalty is chosen by cross-validation over parts of each
    class in their order: neighbours, which often show the same person, stay together. Leaving out one at a time would
    choose a far weaker penalty.
    """
    columns, ok = BASELINES[name], train["ok"]
    labels = train["labels"][ok]
    fewest = int(labels.unique(return_counts=True)[1].min())
    folds = StratifiedKFold(min(FOLDS, fewest)) if fewest > 1 else None
    ridge = make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=STRENGTHS, cv=folds))
    ridge.fit(train[columns][ok, 0].double().numpy(), labels.numpy())
    views = test[columns].double()
    scores = torch.from_numpy(ridge.decision_function(views.flatten(0, 1).numpy())).unflatten(0, views.shape[:2]).sum(1)
    # Of two classes there is one score, which is positive for the second.
    best = scores.argmax(dim=1) if scores.ndim == 2 else (scores > 0).long()
    right = torch.from_numpy(ridge.classes_)[best] == test["labels"]
    return (right & test["ok"]).double().mean().item()
