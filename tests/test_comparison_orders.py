"""The comparison's accuracies on frames in other orders: asked for once, kept in the records, shown in the table."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from conftest import write_video
from hf_inti.comparison import baselines, views
from hf_inti.comparison.report import write_report
from hf_inti.comparison.run import main
from hf_inti.measure.jobs import read_json, write_json
from hf_inti.training.arguments import DataArguments, ModelArguments
from hf_inti.training.cli import parse_arguments


ROOT = Path(__file__).parents[1]
ONE, FOUR = {"num_clips": 1, "num_crops": 1}, {"num_clips": 4, "num_crops": 1}


@pytest.fixture
def evaluated(monkeypatch) -> list[tuple[str, int]]:
    """Orders and clips that evaluate.py is asked for, in place of which accuracies are made up."""
    arguments = runpy.run_path(str(ROOT / "scripts" / "evaluate.py"))["EvaluationArguments"]
    asked = []

    def run_jobs(jobs, at_a_time, threads, description, done):
        for job in jobs:
            read = parse_arguments(arguments, ["model"], "", job.arguments[1:])
            asked.append((read.frame_order, read.num_clips))
            assert read.data_dir == "test.csv" and job.output.parent == Path(read.output_dir)
            top1 = {"original": 0.5, "reversed": 0.25, "shuffled": 0.125}[read.frame_order] + 0.01 * read.num_clips
            job.output.parent.mkdir(exist_ok=True)
            write_json(job.output, {"top1": top1, "num_videos": 8})
            done(job, 1.0)

    monkeypatch.setattr(views, "run_jobs", run_jobs)
    return asked


@pytest.fixture
def run(tmp_path) -> SimpleNamespace:
    (tmp_path / "run" / "last").mkdir(parents=True)
    write_json(tmp_path / "seed_0.json", {"evaluations": [{"eval_top1": 0.5}]})
    data = DataArguments("train.csv", "test.csv")
    return SimpleNamespace(folder=tmp_path / "run", record=tmp_path / "seed_0.json", parsed=(None, data, None))


def test_records_keep_each_order_in_its_views(run, evaluated):
    def ask(seen, *orders) -> dict:
        evaluated.clear()
        views.evaluate_views([run], Path("evaluate.py"), seen, list(orders), 1, 1)
        return read_json(run.record)

    assert ask(ONE, "reversed")["orders"] == {**ONE, "reversed": 0.26} and evaluated == [("reversed", 1)]
    found = ask(ONE, "reversed", "shuffled")
    assert found["orders"] == {**ONE, "reversed": 0.26, "shuffled": 0.135} and evaluated == [("shuffled", 1)]
    assert "views" not in found and found["evaluations"] == [{"eval_top1": 0.5}]
    found = ask(FOUR, "original", "shuffled")
    assert found["orders"] == {**FOUR, "shuffled": 0.165} and found["views"]["eval_top1"] == 0.54
    assert evaluated == [("original", 4), ("shuffled", 4)]
    (run.folder / "last").rmdir()
    assert ask(FOUR, "original", "shuffled") == found and not evaluated
    with pytest.raises(ValueError, match="no evaluation of 4 clips and 1 crops of reversed frames, and its model is"):
        ask(FOUR, "reversed")


def test_table_has_a_column_for_each_order(tmp_path):
    numbers = {"gmacs": 2.0, "conditions": {"batch_size": 8, "device": "cpu", "threads": 1, "torch": "2"}}
    of_seeds = [
        {"eval_top1": 0.9, "reversed": 0.3, "shuffled": 0.5},
        {"eval_top1": 0.7, "reversed": 0.1, "shuffled": 0.5},
    ]
    results = {"A": of_seeds, "Ridge": [{"eval_top1": 0.6, "reversed": 0.2, "shuffled": 0.4}]}
    text = write_report(results, {"A": numbers}, [0, 1], "About", tmp_path, orders=["shuffled", "reversed"])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    assert lines[0] == ["method", "top-1 %", "over the first", "shuffled %", "reversed %", "GMACs"]
    assert lines[2][:5] == ["A", "80.0 ± 14.1", "-", "50.0 ± 0.0", "20.0 ± 14.1"]
    assert lines[3][:5] == ["Ridge", "60.0", "-", "40.0", "20.0"]
    assert "\nShuffled %, reversed %: top-1 of the same models, the frames of each test clip in that order.\n" in text
    assert "that order" not in write_report(results, {"A": numbers}, [0, 1], "About", tmp_path)


def test_baselines_are_tested_in_each_order(tmp_path, monkeypatch):
    """And fitted on frames in their own."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=16)).save_pretrained(tmp_path / "tower")
    for i, label in enumerate("aabb"):
        write_video(tmp_path / "videos" / label / f"{i}.mp4", frames=4, seed=i)
    seen = []

    def ridge_accuracy(name, train, test):
        seen.append([part["pixels"].unflatten(2, (4, -1)) for part in (train, test)])
        return len(seen) / 10

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(baselines, "ridge_accuracy", ridge_accuracy)
    model = ModelArguments(str(tmp_path / "tower"), num_frames=4, compression="none")
    data = DataArguments(str(tmp_path / "videos"), str(tmp_path / "videos"))

    def fit(*orders):
        return baselines.fit_baselines(model, data, tmp_path, ONE, orders)

    assert list(fit()["Ridge, pixels"]) == ["eval_top1", "eval_num_videos"]
    assert "orders" not in read_json(tmp_path / "baselines.json")
    found = fit("reversed")  # both of each order after the first two
    assert found["Ridge, pixels"] == {"eval_top1": 0.3, "eval_num_videos": 4, "reversed": 0.5}
    assert fit("reversed") == found and fit()["Ridge, frame features"]["eval_top1"] == 0.4 and len(seen) == 6
    (plain, original), (train, turned) = seen[2], seen[4]
    assert torch.equal(plain, train) and torch.equal(original, plain)
    assert torch.equal(turned, original.flip(2)) and not torch.equal(turned, original)


def test_other_orders_are_refused(tmp_path):
    flags = ["--recipe", "r.yaml", "--output_dir", str(tmp_path), "--methods", '{"A": {}}']
    with pytest.raises(ValueError, match="frame_orders must be among reversed, shuffled, got \\['original'\\]"):
        main([*flags, "--frame_orders", "original"])
