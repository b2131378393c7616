"""VideoAccuracy against plain Python loops and hand-made cases."""

import math
import random

import evaluate
import numpy as np
import pytest
import torch

from hf_inti.training import metrics
from hf_inti.training.metrics import VideoAccuracy, video_scores


@pytest.fixture
def metric(tmp_path):
    return VideoAccuracy(cache_dir=str(tmp_path))


def by_hand(logits, references, video_ids):
    """(top1, top5, mean class accuracy, confusion) with dictionaries and loops; no ties, nothing broken."""
    views, labels = {}, {}
    for row, label, video in zip(logits, references, video_ids, strict=True):
        total = sum(math.exp(x) for x in row)
        views.setdefault(video, []).append([math.exp(x) / total for x in row])
        labels[video] = label
    classes = len(logits[0])
    confusion = [[0] * classes for _ in range(classes)]
    top5 = 0
    for video, rows in views.items():
        score = [sum(row[c] for row in rows) / len(rows) for c in range(classes)]
        ranked = sorted(range(classes), key=lambda c: -score[c])  # noqa: B023
        confusion[labels[video]][ranked[0]] += 1
        top5 += labels[video] in ranked[:5]
    top1 = sum(confusion[c][c] for c in range(classes)) / len(views)
    shares = [confusion[c][c] / sum(confusion[c]) for c in range(classes) if sum(confusion[c])]
    return top1, top5 / len(views), sum(shares) / len(shares), confusion


def random_run(seed=0, videos=60, classes=8):
    """Uneven numbers of views, in shuffled order, with ids that are no row numbers."""
    rng = random.Random(seed)
    rows = []
    for video in range(videos):
        label = rng.randrange(classes - 1)  # the last class never occurs
        for _ in range(rng.choice([1, 2, 3, 12])):
            rows.append(([rng.gauss(2 * (c == label), 1.5) for c in range(classes)], label, 7 * video + 3))
    rng.shuffle(rows)
    return [list(column) for column in zip(*rows, strict=True)]


def test_equals_plain_python(metric):
    logits, references, ids = random_run()
    result = metric.compute(predictions=logits, references=references, video_ids=ids)
    top1, top5, mean_class, confusion = by_hand(logits, references, ids)
    assert 0.2 < top1 < top5 < 1  # a run that could tell a wrong answer
    assert result["top1"] == pytest.approx(top1, abs=1e-9)
    assert result["top5"] == pytest.approx(top5, abs=1e-9)
    assert result["mean_class_accuracy"] == pytest.approx(mean_class, abs=1e-9)
    assert result["confusion_matrix"] == confusion
    assert result["num_videos"] == 60 and result["num_unreadable"] == 0
    assert set(result["per_class"]) == {str(c) for c in range(7)}


def test_softmax_is_averaged_not_logits(metric):
    # Mean logits favour class 0 (10 against 4), mean probabilities class 1 (two sure views against one).
    logits = [[30.0, 0.0], [0.0, 6.0], [0.0, 6.0]]
    result = metric.compute(predictions=logits, references=[1, 1, 1], video_ids=[0, 0, 0])
    assert result["top1"] == 1.0 and result["num_videos"] == 1


def test_batches_in_any_order_give_the_same(metric, tmp_path):
    logits, references, ids = random_run(1)
    whole = metric.compute(predictions=logits, references=references, video_ids=ids)
    for start in range(0, len(ids), 7):
        part = slice(len(ids) - start - 7 if start + 7 <= len(ids) else 0, len(ids) - start)
        metric.add_batch(
            predictions=torch.tensor(logits[part]),
            references=torch.tensor(references[part]),
            video_ids=torch.tensor(ids[part]),
        )
    assert metric.compute() == whole


def test_padding_with_whole_videos_changes_nothing(metric):
    logits, references, ids = random_run(2)
    whole = metric.compute(predictions=logits, references=references, video_ids=ids)
    again = [i for i, video in enumerate(ids) if video in set(ids[:5])]
    padded = [column + [column[i] for i in again] for column in (logits, references, ids)]
    assert metric.compute(predictions=padded[0], references=padded[1], video_ids=padded[2]) == whole


def test_unreadable_videos_are_wrong(metric):
    nan = [math.nan] * 3
    result = metric.compute(
        predictions=[[2.0, 0, 0], nan, [0, 2.0, 0], nan], references=[0, 0, 1, 2], video_ids=[0, 1, 2, 3]
    )
    assert result["top1"] == 0.5 and result["top5"] == 0.5
    assert result["per_class"] == {"0": 0.5, "1": 1.0, "2": 0.0}
    assert result["mean_class_accuracy"] == 0.5
    assert result["confusion_matrix"] == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert result["num_videos"] == 4 and result["num_unreadable"] == 2


def test_top5_is_capped_and_ties_go_to_the_lower_class(metric):
    result = metric.compute(predictions=[[0.0, 0.0], [0.0, 0.0]], references=[0, 1], video_ids=[0, 1])
    assert result["top1"] == 0.5 and result["top5"] == 1.0
    many = metric.compute(predictions=[[0.0] * 40] * 40, references=list(range(40)), video_ids=list(range(40)))
    assert many["top1"] == pytest.approx(1 / 40) and many["top5"] == pytest.approx(5 / 40)
    assert many["per_class"]["0"] == 1.0


def test_class_names_and_plain_types(metric):
    result = metric.compute(
        predictions=[[1.0, 0.0], [0.0, 1.0]], references=[0, 0], video_ids=[4, 9], label_names=["x", "y"]
    )
    assert result["per_class"] == {"x": 0.5}
    assert all(type(result[key]) is float for key in ("top1", "top5", "mean_class_accuracy"))
    assert type(result["confusion_matrix"][0][0]) is int and type(result["num_videos"]) is int


def test_scores_are_means_of_probabilities():
    ids, scores = video_scores([[0.0, math.log(3)], [0.0, 0.0], [math.log(4), 0.0]], [8, 6, 8])
    assert ids.tolist() == [6, 8]
    np.testing.assert_allclose(scores, [[0.5, 0.5], [(0.25 + 0.8) / 2, (0.75 + 0.2) / 2]], rtol=1e-12)


def test_large_logits_do_not_overflow():
    ids, scores = video_scores([[1e30, 0.0], [-math.inf, 3.0]], [5, 2])
    assert ids.tolist() == [2, 5] and scores.tolist() == [[0.0, 1.0], [1.0, 0.0]]


@pytest.mark.parametrize(
    ("logits", "references", "ids", "message"),
    [
        ([[1.0, 0.0], [1.0, 0.0]], [0, 1], [3, 3], "video 3 has"),
        ([[1.0, 0.0]], [2], [0], "references must be 0 to 1"),
        ([[1.0, 0.0]], [-1], [0], "references must be 0 to 1"),
        ([[1.0, math.nan]], [0], [8], "video 8 are partly NaN"),
        ([[1.0, math.inf]], [0], [8], "video 8 are partly NaN or infinite"),
        ([[-math.inf, -math.inf]], [0], [8], "video 8 are partly NaN or infinite"),
        ([[1.0, 0.0], [1.0, 0.0, 0.0]], [0, 0], [0, 1], "one K for all views"),
    ],
)
def test_wrong_inputs(metric, logits, references, ids, message):
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=logits, references=references, video_ids=ids)


def test_wrong_shapes_and_names(metric):
    with pytest.raises(ValueError, match="wanted logits"):
        video_scores(np.zeros((2, 3)), [0])
    with pytest.raises(ValueError, match="label_names must hold 2"):
        metric.compute(predictions=[[1.0, 0.0]], references=[0], video_ids=[0], label_names=["x"])


def test_evaluate_loads_the_file_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(
        evaluate.loading, "init_dynamic_modules", lambda *a, **k: _dynamic_modules(tmp_path, monkeypatch)
    )
    loaded = evaluate.load(metrics.__file__, cache_dir=str(tmp_path / "cache"))
    assert type(loaded).__module__ != metrics.__name__
    logits, references, ids = random_run(3)
    result = loaded.compute(predictions=logits, references=references, video_ids=ids)
    assert result["top1"] == pytest.approx(by_hand(logits, references, ids)[0], abs=1e-9)


def _dynamic_modules(tmp_path, monkeypatch):
    """As evaluate's own init_dynamic_modules, but not in the user's cache."""
    folder = tmp_path / "evaluate_modules_of_this_test"
    folder.mkdir(exist_ok=True)
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    return str(folder)
