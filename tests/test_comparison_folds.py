"""Cross-validation over groups: what its folds hold, and how their accuracies are put together."""

import csv
import shutil
from itertools import product
from pathlib import Path
from statistics import stdev

import pytest
import torch
import yaml
from accelerate import Accelerator
from transformers import CLIPVisionConfig, CLIPVisionModel

from conftest import write_video
from hf_inti.comparison import run as comparison
from hf_inti.comparison.folds import check_folds, split_by_group
from hf_inti.comparison.report import paired_difference, pooled
from hf_inti.comparison.run import main
from hf_inti.data.datasets import label_names_of
from hf_inti.measure.jobs import read_json, write_json
from hf_inti.training.arguments import DataArguments
from hf_inti.training.cli import parse_recipe
from hf_inti.training.setup import load_datasets


SPEAKERS = {"F01": 1, "F02": 2, "M01": 1, "M02": 3}  # videos of each class
GROUP = "^([FM]\\d+)_"
FOLDS = {"F01": 2, "F02": 4, "M01": 2, "M02": 6}  # videos that are tested


def lay_out(folder: Path, write=lambda path: path.write_bytes(path.parent.name.encode())) -> Path:
    for label in ("a", "b"):
        for speaker, count in SPEAKERS.items():
            for i in range(count):
                path = folder / label / f"{speaker}_{i}.mp4"
                path.parent.mkdir(parents=True, exist_ok=True)
                write(path)
    return folder


@pytest.fixture
def videos(tmp_path):
    """Class folders of files that nothing decodes."""
    return lay_out(tmp_path / "videos")


def speakers(rows) -> set[str]:
    return {Path(row["video"]["path"]).name.split("_")[0] for row in rows}


@pytest.mark.parametrize("named", [None, [["M02", "F01"], ["F02"]]])
def test_no_group_trains_and_is_tested(videos, tmp_path, named):
    """As train.py reads the lists; each video is in one of them."""
    folds = split_by_group(DataArguments(str(videos)), GROUP, named, tmp_path / "lists")
    assert [fold.groups for fold in folds] == (named or [[name] for name in SPEAKERS])
    assert not (tmp_path / "lists").exists()
    for fold in folds:
        fold.write()
        train, test = load_datasets(DataArguments(**fold.settings), Accelerator(cpu=True))
        assert speakers(test) == set(fold.groups) and speakers(train) == SPEAKERS.keys() - set(fold.groups)
        paths = [row["video"]["path"] for part in (train, test) for row in part]
        assert sorted(paths) == sorted(map(str, videos.rglob("*.mp4")))
        for part in (train, test):
            assert label_names_of(part) == ["a", "b"]
            assert all("ab"[row["label"]] == Path(row["video"]["path"]).parent.name for row in part)


@pytest.mark.parametrize("place", ["beside", "elsewhere"])
def test_videos_of_a_list(videos, tmp_path, place):
    """It stays with the folder of its videos, in its own classes."""
    lists = videos if place == "beside" else tmp_path / "lists"
    lists.mkdir(exist_ok=True)
    rows = [(path.relative_to(videos), "second" if i % 2 else "first") for i, path in enumerate(videos.rglob("*.mp4"))]
    (lists / "all.csv").write_text("".join(f"{path},{label}\n" for path, label in rows))
    root = None if place == "beside" else str(videos)
    folds = split_by_group(DataArguments(str(lists / "all.csv"), video_root=root), GROUP, None, tmp_path / "folds")
    folds[3].write()
    train, test = load_datasets(DataArguments(**folds[3].settings), Accelerator(cpu=True))
    found = {(row["video"]["path"], label_names_of(part)[row["label"]]) for part in (train, test) for row in part}
    assert found == {(str(videos / path), label) for path, label in rows} and speakers(test) == {"M02"}


@pytest.mark.parametrize(
    ("group", "folds", "wanted"),
    [
        ("^([FM]0)", None, None),
        ("^F(.*)_", None, "group must be found in every file name, got '^F(.*)_', not in a/M01_0.mp4"),
        ("^(X?)", None, "group must be found in every file name"),
        ("(mp4)$", None, "videos must be of at least two groups, got ['mp4']"),
        (GROUP, ["[F01, F03]"], "folds must name groups of the videos, got 'F03'; there are F01, F02, M01, M02."),
        (GROUP, ["[F01, F02]", "[F01]"], "folds must test no group twice, got 'F01' more than once"),
        (GROUP, ["[F01, F01]"], "folds must test no group twice, got 'F01' more than once"),
        (GROUP, ["F01", "F02"], "folds must be lists of groups, such as [F01, F02], got ['F01', 'F02']"),
        (GROUP, ["[]"], "folds must be lists of groups"),
        (GROUP, ["[F01"], "folds must be lists of groups"),
        (GROUP, ["[F01, F02, M01, M02]"], "every class must have training videos in every fold, got none of 'a' where"),
        ("_(\\d", None, "group must be a regular expression, got '_(\\\\d': "),
        ("_\\d", None, "group must have parentheses around what tells the group, got '_\\\\d'"),
        (None, ["[F01]"], "folds must be left out without group"),
    ],
)
def test_what_does_not_fit_is_refused(videos, tmp_path, group, folds, wanted):
    def split():
        return split_by_group(DataArguments(str(videos)), group, check_folds(group, folds), tmp_path)

    if wanted is None:
        assert [fold.name for fold in split()] == ["F0", "M0"]
        return
    with pytest.raises(ValueError) as error:
        split()
    assert wanted in str(error.value) and "\n" not in str(error.value)


def test_every_class_is_learned_in_every_fold(videos, tmp_path):
    for path in (videos / "b").glob("[F]*"):
        path.unlink()
    data = DataArguments(str(videos))
    with pytest.raises(ValueError, match="got none of 'b' where M01, M02 is tested"):
        split_by_group(data, GROUP, [["M01", "M02"]], tmp_path)
    assert len(split_by_group(data, GROUP, [["M01", "F01"]], tmp_path)) == 1
    (videos / "b").rename(videos / "7")
    with pytest.raises(ValueError, match="classes must be all names or all numbers, got '7'"):
        split_by_group(data, GROUP, None, tmp_path)


def test_a_fold_is_described_by_its_videos_wherever_they_are(videos, tmp_path):
    def described(folder):
        return [fold.described for fold in split_by_group(DataArguments(str(folder)), GROUP, None, tmp_path)]

    here = described(videos)
    assert [fold["eval_dir"].split(",")[0] for fold in here] == [f"{n} videos" for n in FOLDS.values()]
    assert here[0]["train_dir"].startswith("12 videos, ")
    assert len({fold["eval_dir"] for fold in here}) == len({fold["train_dir"] for fold in here}) == 4
    shutil.copytree(videos, tmp_path / "moved")
    assert described(tmp_path / "moved") == here
    (tmp_path / "moved" / "a" / "F01_0.mp4").write_bytes(b"longer")
    there = described(tmp_path / "moved")
    assert there[0]["eval_dir"] != here[0]["eval_dir"] and there[0]["train_dir"] == here[0]["train_dir"]
    assert there[1]["eval_dir"] == here[1]["eval_dir"] and there[1]["train_dir"] != here[1]["train_dir"]
    data = DataArguments(str(tmp_path / "all.csv"), video_root=str(videos))
    (tmp_path / "all.csv").write_text(
        "".join(f"{p.relative_to(videos)},{p.parent.name}\n" for p in videos.rglob("*.mp4"))
    )
    listed = split_by_group(data, GROUP, None, tmp_path)
    (tmp_path / "all.csv").write_text((tmp_path / "all.csv").read_text().replace("F01_0.mp4,a", "F01_0.mp4,b"))
    relabelled = split_by_group(data, GROUP, None, tmp_path)
    assert [a.described == b.described for a, b in zip(listed, relabelled, strict=True)] == [False] * 4
    assert listed[1].described["eval_dir"] == relabelled[1].described["eval_dir"]


def test_accuracies_of_folds_count_by_their_videos():
    of_folds = [{"eval_top1": 0.5, "eval_num_videos": 2}, {"eval_top1": 1.0, "eval_num_videos": 6}]
    assert pooled(of_folds) == 7 / 8
    found = paired_difference([0.5, 1.0], [0.0, 0.9], [2, 6])
    assert found["over_first"] == pytest.approx((1 + 0.6) / 8)
    # Of a ratio: differences 0.5 and 0.1 less 0.2, in shares of 1/4 and 3/4; Student's t with one degree of freedom.
    assert found["over_first_interval"] == pytest.approx(12.706 * (2 * (0.075**2 + 0.075**2)) ** 0.5, rel=1e-4)
    equal = paired_difference([0.6, 0.9, 0.7], [0.5, 0.6, 0.6], [4, 4, 4])
    assert equal == paired_difference([0.6, 0.9, 0.7], [0.5, 0.6, 0.6])


# The command, whose runs are done already ---------------------------------------------------------


@pytest.fixture
def folder(tmp_path, videos):
    """A tower, a recipe and the configuration of a comparison of those videos."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=16)).save_pretrained(tmp_path / "tower")
    recipe = {"model": str(tmp_path / "tower"), "num_frames": 4, "compression_layers": [1], "train_dir": "absent"}
    recipe |= {"eval_dir": "absent", "epochs": 1, "batch_size": 4, "output_dir": "unused"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    config = {
        "recipe": str(tmp_path / "recipe.yaml"),
        "output_dir": str(tmp_path / "out"),
        "overrides": {"train_dir": str(videos)},
        "methods": {"Naive": {"compression": "none"}, "InTI": {}},
        "seeds": [0],
        "group": GROUP,
    }
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return tmp_path


def arguments(folder, *flags) -> list[str]:
    return ["--config", str(folder / "compare.yaml"), *flags]


RIGHT = {  # how many videos each run gets right, by method, seed and fold
    ("Naive", 0): [1, 1, 2, 3], ("Naive", 1): [2, 1, 0, 3],
    ("InTI", 0): [2, 3, 1, 6], ("InTI", 1): [1, 3, 2, 2],
}  # fmt: skip


def finish(folder, *flags) -> list:
    """Write the records of runs that got RIGHT, and let nothing be measured; returns the runs."""
    own, passed = comparison.split_flags(arguments(folder, *flags)[2:])
    args = parse_recipe([comparison.ComparisonArguments], [str(folder / "compare.yaml"), *own])[0]
    runs = comparison.plan_runs(args, passed)
    for run in runs:
        run.record.parent.mkdir(parents=True, exist_ok=True)
        i = list(FOLDS).index(run.fold.name)
        top1 = RIGHT[run.method, run.seed][i] / FOLDS[run.fold.name]
        write_json(run.record, {"settings": comparison.settings_for_record(run), "evaluations": [{"eval_top1": top1}]})
    return runs


@pytest.fixture
def unmeasured(monkeypatch):
    numbers = {"gmacs": 1.0, "parameters": 1e6, "trained_parameters": 1e6, "forward_clips_per_second": 1.0}
    numbers |= {"training_clips_per_second": 1.0, "peak_memory_bytes": None}
    numbers["conditions"] = {"batch_size": 4, "device": "cpu", "threads": 1, "torch": "2"}
    monkeypatch.setattr(comparison, "measure_all", lambda runs, args: dict.fromkeys(args.methods, numbers))


def test_table_of_one_seed(folder, unmeasured):
    runs = finish(folder)
    assert [(run.fold.name, run.method) for run in runs] == list(product(FOLDS, ("Naive", "InTI")))
    assert runs[3].record == folder / "out" / "records" / "InTI" / "fold_F02" / "seed_0.json"
    assert str(runs[3]) == "InTI, fold F02, seed 0"
    assert runs[3].parsed[1].eval_dir == str(folder / "out" / "folds" / "F02" / "test.csv")
    assert main(arguments(folder)) == 0
    table = read_json(folder / "out" / "comparison.json")
    naive, inti = table["rows"]
    assert naive["top1"] == pytest.approx(7 / 14) and inti["top1"] == pytest.approx(12 / 14)
    assert inti["top1_of_folds"] == [1, 3 / 4, 1 / 2, 1] and inti["top1_of_seeds"] == [inti["top1"]]
    assert inti["top1_std"] == stdev([1, 3 / 4, 1 / 2, 1]) and table["folds"] == list(FOLDS)
    assert inti["over_first"] == pytest.approx(5 / 14) and inti["over_first_interval"] > 0
    text = (folder / "out" / "comparison.md").read_text()
    assert "epoch: the videos of all 4 folds together, ± standard deviation of the folds, seed 0.\n" in text
    assert "the mean difference, fold by fold, ±" in text
    assert f"trained and evaluated on {folder / 'videos'}, 4 folds by `{GROUP}`, in one view.\n" in text
    row = list(csv.DictReader((folder / "out" / "comparison.csv").read_text().splitlines()))[1]
    assert row["top1_of_folds"] == "1.0 0.75 0.5 1.0"
    assert len((folder / "out" / "folds" / "M02" / "train.csv").read_text().splitlines()) == 9
    assert not list((folder / "out").rglob("log.txt"))


def test_table_of_two_seeds(folder, unmeasured):
    finish(folder, "--seeds", "0", "1")
    assert main(arguments(folder, "--seeds", "0", "1")) == 0
    naive, inti = read_json(folder / "out" / "comparison.json")["rows"]
    assert naive["top1_of_seeds"] == pytest.approx([7 / 14, 6 / 14])
    assert inti["top1_of_seeds"] == pytest.approx([12 / 14, 8 / 14])
    assert inti["top1"] == pytest.approx(20 / 28) and inti["top1_std"] == pytest.approx(stdev([12 / 14, 8 / 14]))
    assert len(inti["top1_of_folds"]) == 8
    wanted = paired_difference(inti["top1_of_folds"], naive["top1_of_folds"], [*FOLDS.values()] * 2)
    assert inti["over_first"] == wanted["over_first"] == pytest.approx(7 / 28)
    assert inti["over_first_interval"] == wanted["over_first_interval"]
    text = (folder / "out" / "comparison.md").read_text()
    assert "the videos of all 4 folds together, mean ± standard deviation of seeds 0 1.\n" in text
    assert "the mean difference, seed by seed and fold by fold, ±" in text


def test_records_of_other_folds_are_refused(folder, unmeasured):
    """A video that changed is one of a training or of the test of each fold; other folds have other records."""
    finish(folder)
    (folder / "videos" / "a" / "F01_0.mp4").write_bytes(b"longer")
    with pytest.raises(ValueError, match="Naive: eval_dir must be '2 videos, .* as fold F01, seed 0 was"):
        main(arguments(folder))
    record = read_json(folder / "out" / "records" / "Naive" / "fold_M02" / "seed_0.json")
    assert str(folder) not in str(record["settings"]) and record["settings"]["video_root"] is None


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--eval_dir", "videos"], "eval_dir must be left out with group"),
        (["--overrides", '{"eval_dir": "videos"}'], "eval_dir must be left out with group"),
        (["--methods", '{"A": {"train_dir": "x"}}'], "A: train_dir must be the same for all methods with group"),
        (["--group", "^(F.)"], "group must be found in every file name"),
        (["--folds", "[F01]", "[F09]"], "folds must name groups of the videos, got 'F09'"),
        (["--train_dir", "absent"], "source must be a file, a folder or a Hub dataset id"),
    ],
)
def test_wrong_settings_read_well(folder, flags, wanted):
    with pytest.raises(ValueError) as error:
        main(arguments(folder, *flags))
    assert wanted in str(error.value) and "\n" not in str(error.value)
    assert not (folder / "out").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("forked_jobs")
def test_folds_are_trained_scored_and_gone_on_with(folder, monkeypatch):
    """By train.py and evaluate.py; baselines too. Two folds of unequal size, one method."""
    lay_out(folder / "videos", lambda path: write_video(path, frames=6, seed=sum(map(ord, str(path)))))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    flags = ["--methods", '{"Naive": {"compression": "none"}}', "--folds", "[F01, M01]", "[M02]", "--num_clips", "2"]
    flags += ["--frame_orders", "reversed", "--measure_rounds", "0"]
    assert main(arguments(folder, *flags, "--baselines", "true")) == 0
    records = folder / "out" / "records"
    found = [read_json(records / "Naive" / f"fold_{name}" / "seed_0.json") for name in ("F01+M01", "M02")]
    assert [record["fold"] for record in found] == [["F01", "M01"], ["M02"]]
    assert [record["views"]["eval_num_videos"] for record in found] == [4, 6]
    assert all({"num_clips": 2, "num_crops": 1}.items() <= record["orders"].items() for record in found)
    right = [round(record["views"]["eval_top1"] * n) for record, n in zip(found, (4, 6), strict=True)]
    rows = read_json(folder / "out" / "comparison.json")["rows"]
    assert [row["method"] for row in rows] == ["Naive", "Ridge, pixels", "Ridge, frame features"]
    assert rows[0]["top1"] == pytest.approx(sum(right) / 10)
    turned = sum(record["orders"]["reversed"] * n for record, n in zip(found, (4, 6), strict=True)) / 10
    assert rows[0]["reversed"] == pytest.approx(turned)
    kept = [read_json(records / f"fold_{name}" / "baselines.json") for name in ("F01+M01", "M02")]
    assert [each["num_videos"] for each in kept] == [4, 6]
    for row in rows[1:]:
        first, second = (each["top1"][row["method"]] for each in kept)
        assert row["top1"] == pytest.approx((4 * first + 6 * second) / 10)
        first, second = (each["orders"]["reversed"][row["method"]] for each in kept)
        assert row["reversed"] == pytest.approx((4 * first + 6 * second) / 10)
    log = folder / "out" / "Naive" / "fold_M02" / "seed_0" / "log.txt"
    times = [path.stat().st_mtime_ns for path in (log, *records.rglob("*.json"))]
    assert main(arguments(folder, *flags, "--baselines", "true")) == 0
    assert [path.stat().st_mtime_ns for path in (log, *records.rglob("*.json"))] == times
    (folder / "videos" / "a" / "F02_0.mp4").unlink()  # trains in both folds
    with pytest.raises(ValueError, match="Naive: train_dir must be '10 videos, .* as fold F01\\+M01, seed 0"):
        main(arguments(folder, *flags))
