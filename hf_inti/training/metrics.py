"""Accuracy of videos from the logits of their views; `evaluate.load` takes this file alone, too."""

import os
import sys

import datasets
import numpy as np


# `python scripts/x.py` puts scripts/ first on the path, where evaluate.py hides the library of that name.
_path = list(sys.path)
sys.path = [folder for folder in sys.path if not os.path.isfile(os.path.join(folder, "evaluate.py"))]
import evaluate  # noqa: E402


sys.path = _path


DESCRIPTION = """Video classification accuracy: softmax averaged over the views of each video."""

INPUTS = """
Args:
    predictions: logits, one row of K floats per view; all NaN marks a video that could not be read.
    references: class index of the view's video.
    video_ids: integer that tells videos apart (the row in the dataset); a video's views share it.
    label_names: K class names, the keys of per_class; class indices as strings if left out.
Returns:
    top1, top5 (top K if there are fewer than 5 classes), mean_class_accuracy: shares in [0, 1];
    per_class: {class: top-1 share} of the classes that occur;
    confusion_matrix: K x K counts, rows are the references, columns the predictions;
    num_videos; num_unreadable: videos that count as wrong everywhere and are in no confusion column.
"""


def video_scores(logits, video_ids):
    """Mean of the views' softmax, per video.

    `logits` (N, K), `video_ids` (N,) integers. Returns `ids` (M,), ascending, and `scores` (M, K) in
    float64; a video with an unreadable view (a row of NaN only) has scores NaN. A video whose views all
    come twice has the same scores. Raises ValueError for other shapes and for logits that are NaN or +inf
    in part.
    """
    try:
        logits = np.asarray(logits, dtype=np.float64)
    except (TypeError, ValueError):
        logits = np.empty(0)  # ragged
    video_ids = np.asarray(video_ids)
    if logits.ndim != 2 or video_ids.shape != logits.shape[:1]:
        raise ValueError(
            f"wanted logits (N, K) with one K for all views and video_ids (N,), got {logits.shape} and "
            f"{video_ids.shape}; give one row of class logits per view"
        )
    ids, video = np.unique(video_ids, return_inverse=True)
    unreadable = np.isnan(logits).all(axis=1)
    strange = ~np.isfinite(logits.max(axis=1, initial=-np.inf)) & ~unreadable  # -inf alone is a class ruled out
    if strange.any():
        raise ValueError(
            f"logits of video {video_ids[strange][0]} are partly NaN or infinite: the model overflows; "
            "only rows of NaN alone mark unreadable videos"
        )
    scores = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores /= scores.sum(axis=1, keepdims=True)
    sums = np.zeros((len(ids), logits.shape[1]))
    np.add.at(sums, video, scores)
    return ids, sums / np.bincount(video)[:, None]


class VideoAccuracy(evaluate.Metric):
    """Top-1, top-5 and per-class accuracy of videos, each scored by the mean softmax of its views.

    Takes whole runs or `add_batch(predictions=logits, references=labels, video_ids=index)`; see INPUTS.
    Ties go to the lower class index. Raises ValueError if a video has two references or a reference is no
    class.
    """

    def _info(self):
        info = evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float32")),
                    "references": datasets.Value("int64"),
                    "video_ids": datasets.Value("int64"),
                }
            ),
        )
        # As Python lists, the logits of a large test set take gigabytes. The constructor refuses this format
        # for features that are lists, but they do come out as arrays.
        info.format = "numpy"
        return info

    def _compute(self, predictions, references, video_ids, label_names=None):
        ids, scores = video_scores(predictions, video_ids)
        references, video_ids = np.asarray(references), np.asarray(video_ids)
        _, first, video = np.unique(video_ids, return_index=True, return_inverse=True)
        labels, num_classes = references[first], scores.shape[1]
        if (labels[video] != references).any():
            wrong = video_ids[labels[video] != references][0]
            raise ValueError(f"video {wrong} has different references; give each video one id and one class")
        if labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(
                f"references must be 0 to {num_classes - 1}, as the logits are, got {labels.min()} to "
                f"{labels.max()}; number them as the model's classes are"
            )
        names = list(label_names or map(str, range(num_classes)))
        if len(names) != num_classes:
            raise ValueError(f"label_names must hold {num_classes} names, one per logit, got {len(names)}")

        readable = ~np.isnan(scores).any(axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")
        hits = (order == labels[:, None]) & readable[:, None]  # one column per rank
        total = np.bincount(labels, minlength=num_classes)
        correct = np.bincount(labels[hits[:, 0]], minlength=num_classes)
        confusion = np.zeros((num_classes, num_classes), dtype=np.int64)
        np.add.at(confusion, (labels[readable], order[readable, 0]), 1)
        per_class = {names[i]: float(correct[i] / total[i]) for i in range(num_classes) if total[i]}
        return {
            "top1": float(hits[:, 0].mean()),
            "top5": float(hits[:, :5].any(axis=1).mean()),
            "mean_class_accuracy": float(np.mean(list(per_class.values()))),
            "per_class": per_class,
            "confusion_matrix": confusion.tolist(),
            "num_videos": len(ids),
            "num_unreadable": int((~readable).sum()),
        }
