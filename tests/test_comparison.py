"""The comparison of methods from end to end, killed and gone on with, and what it refuses."""

import contextlib
import csv
import io
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from matplotlib.transforms import Bbox
from transformers import CLIPVisionConfig, CLIPVisionModel

from conftest import write_video
from forks import ForkedJob
from hf_inti import InTIClipForVideoClassification, InTIClipVideoProcessor, InTIClipVisionConfig
from hf_inti.comparison import run as comparison
from hf_inti.comparison.baselines import frame_features, grey_pixels, ridge_accuracy
from hf_inti.comparison.report import paired_difference, percent, write_report
from hf_inti.comparison.run import main
from hf_inti.comparison.views import places_of
from hf_inti.measure import jobs as comparison_processes
from hf_inti.measure.costs import count_costs
from hf_inti.measure.jobs import Job, read_json, run_jobs
from hf_inti.training.arguments import DataArguments
from hf_inti.training.cli import parse_arguments, parse_recipe


ROOT = Path(__file__).parents[1]
COMPARISONS = [ROOT / "scripts/recipes/compare_demo.yaml", *sorted(ROOT.glob("scripts/recipes/study_*.yaml"))]
SCRIPT = "import sys; from hf_inti.training.cli import run_script; from hf_inti.comparison.run import main; "
SCRIPT += "run_script(lambda: main(sys.argv[1:]))"
DONE = ("records/*/seed_*.json", "records/*/measurement_*.json")
HEADS = ["method", "top-1 %", "over the first", "GMACs", "M params", "M trained", "forward clips/s"]
HEADS += ["training clips/s", "peak memory MB"]
RUNS = [(method, seed) for seed in (0, 1) for method in ("Naive", "InTI")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tower, videos of two classes, a recipe and the configuration of a comparison."""
    folder = tmp_path_factory.mktemp("comparison")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=16)).save_pretrained(folder / "tower")
    for split, count in (("train", 4), ("test", 3)):
        for k, label in enumerate(("a", "b")):
            for i in range(count):
                write_video(folder / "videos" / split / label / f"{i}.mp4", frames=6, seed=10 * k + i)
    recipe = {"model": str(folder / "tower"), "num_frames": 4, "compression_layers": [1], "train_dir": "absent"}
    recipe |= {"epochs": 2, "batch_size": 4, "learning_rate": 0.001, "output_dir": "unused", "log_every_steps": 1}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    config = {
        "recipe": str(folder / "recipe.yaml"),
        "output_dir": str(folder / "out"),
        "overrides": {"train_dir": str(folder / "videos"), "epochs": 1},
        "methods": {"Naive": {"compression": "none"}, "InTI": {"compression_options": {"context": ["cube"]}}},
        "seeds": [0, 1],
        "jobs": 2,
        "measure_rounds": 2,
    }
    (folder / "compare.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return folder


def arguments(folder, *flags):
    return ["--config", str(folder / "compare.yaml"), "--eval_dir", str(folder / "videos"), *flags]


def children(process) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def running(pid) -> bool:
    """A process that has ended but that nobody waits for may stay as a zombie."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def wait_for(condition, seconds=200):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module")
def compared(folder):
    """The finished comparison: killed in the second runs, stopped while measuring, and gone on with.

    Returns its folder, the times of the files that were there before the last start, and what that printed.
    """
    out = folder / "out"
    variables = {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "2"}
    with subprocess.Popen([sys.executable, "-c", SCRIPT, *arguments(folder)], env={**os.environ, **variables}) as first:
        wait_for(lambda: first.poll() is not None or list(out.glob("records/*/seed_0.json")))
        wait_for(lambda: first.poll() is not None or len(children(first)) == 2)
        left = children(first)
        first.kill()
    wait_for(lambda: not any(map(running, left)), 20)
    assert len(left) == 2 and not (out / "records" / "InTI" / "seed_1.json").exists()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(torch, "get_num_threads", lambda: 1)
        sleep = time.sleep

        def stop(seconds):
            if (out / "records" / "Naive" / "measurement_0.json").exists():
                signal.raise_signal(signal.SIGINT)
            sleep(seconds)

        begun = []
        patch.setattr(comparison_processes, "start", lambda *job: begun.append(ForkedJob(*job)) or begun[-1])
        # A process that was started in the background ignores what Ctrl-C sends.
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        with pytest.MonkeyPatch.context() as interruption, contextlib.redirect_stderr(io.StringIO()) as error:
            interruption.setattr(comparison_processes.time, "sleep", stop)
            assert main(arguments(folder)) == 130
        signal.signal(signal.SIGINT, handler)
        assert error.getvalue().splitlines()[-1] == "Stopped; run the same command to continue."
        assert len(begun) >= 3 and all(process.returncode is not None for process in begun)
        assert not (out / "comparison.md").exists()

        times = {path: path.stat().st_mtime_ns for pattern in DONE for path in out.glob(pattern)}
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert main(arguments(folder)) == 0
    return out, times, printed.getvalue()


@pytest.mark.slow
@pytest.mark.usefixtures("forked_jobs")
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="watches processes through /proc")
class TestCompared:
    def test_nothing_is_done_twice(self, compared):
        out, times, _ = compared
        assert len(times) >= 4 + 1
        assert all(path.stat().st_mtime_ns == before for path, before in times.items())
        for method, seed in RUNS:
            lines = map(json.loads, (out / method / f"seed_{seed}" / "metrics.jsonl").read_text().splitlines())
            assert [line["step"] for line in lines] == [1, 2, 2] and not list((out / method).rglob("*.part"))

    def test_table_agrees_with_the_runs(self, compared):
        out, _, printed = compared
        with (out / "comparison.csv").open(newline="") as file:
            rows = {row["method"]: row for row in csv.DictReader(file)}
        text = (out / "comparison.md").read_text()
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
        assert printed.strip() == text.strip()
        assert lines[0] == HEADS and [line[0] for line in lines[2:]] == list(rows) == ["Naive", "InTI"]
        for line in lines[2:]:
            method, row = line[0], rows[line[0]]
            scores = []
            for seed in (0, 1):
                run = out / method / f"seed_{seed}"
                settings = json.loads((run / "run.json").read_text())["arguments"]
                assert settings["TrainingArguments"]["seed"] == seed and settings["TrainingArguments"]["epochs"] == 1
                assert settings["DataArguments"]["train_dir"] == str(out.parent / "videos")
                last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
                scores.append(last["eval_top1"])
            assert [float(score) for score in row["top1_of_seeds"].split()] == scores
            assert float(row["top1"]) == pytest.approx(mean(scores))
            assert float(row["top1_std"]) == pytest.approx(stdev(scores))
            assert line[1] == f"{100 * mean(scores):.1f} ± {100 * stdev(scores):.1f}"
            config = InTIClipVisionConfig.from_pretrained(out / method / "seed_0" / "last")
            assert (config.compression, config.compression_options) == (
                ("none", {}) if method == "Naive" else ("inti", {"context": ["cube"]})
            )
            total = count_costs(config)["total"]
            assert float(row["gmacs"]) == pytest.approx(total.gmacs)
            assert float(row["parameters"]) == float(row["trained_parameters"]) == total.parameters
            measured = [read_json(out / "records" / method / f"measurement_{i}.json") for i in range(2)]
            for name in ("forward_clips_per_second", "training_clips_per_second", "peak_memory_bytes"):
                assert float(row[name]) == mean(m[name] for m in measured) > 0
            assert float(row["forward_clips_per_second"]) > float(row["training_clips_per_second"])
            assert float(row["peak_memory_bytes"]) < 1e9  # the process as a whole takes less
        assert "batches of 4, on cpu: " in text and f"1 threads, torch {torch.__version__}" in text
        assert "recipe.yaml, 1 epochs" in text and "seeds 0 1." in text

    def test_picture(self, compared):
        picture = (compared[0] / "comparison.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 10000

    @pytest.mark.parametrize(
        ("flags", "wanted"),
        [
            (["--learning_rate", "1e-2"], "Naive: learning_rate must be 0.001 as seed 0 was trained with, got 0.01; "),
            (["--methods", '{"InTI": {}}'], "InTI: compression_options must be "),
        ],
    )
    def test_other_settings_are_refused(self, compared, folder, flags, wanted):
        with pytest.raises(ValueError) as error:
            main(arguments(folder, *flags))
        assert str(error.value).startswith(wanted) and "another output_dir" in str(error.value)

    def test_records_stand_for_the_runs(self, compared, folder, tmp_path, monkeypatch):
        """Elsewhere, with only the records: nothing is trained, speeds are measured again, the table is the same."""
        out = compared[0]
        for method, seed in RUNS:
            record = read_json(out / "records" / method / f"seed_{seed}.json")
            assert (record["method"], record["seed"], record["num_labels"]) == (method, seed, 2)
            assert record["evaluations"][-1]["epoch"] == 1 and record["losses"] and record["seconds"] > 0
            assert (
                record["commit"]
                and record["command"].startswith("python ")
                and str(folder) not in str(record["settings"])
            )
            (tmp_path / "records" / method).mkdir(parents=True, exist_ok=True)
            shutil.copy(out / "records" / method / f"seed_{seed}.json", tmp_path / "records" / method)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        places = ("--output_dir", str(tmp_path / "runs"), "--records_dir", str(tmp_path / "records"))
        assert main(arguments(folder, *places, "--baselines", "true", "--measure_rounds", "1")) == 0
        assert not list(tmp_path.rglob("seed_*/log.txt")) and list(tmp_path.glob("records/*/measurement_0.json"))
        tables = [read_json(path / "comparison.json")["rows"] for path in (out, tmp_path / "runs")]
        assert [row["method"] for row in tables[1][2:]] == ["Ridge, pixels", "Ridge, frame features"]
        kept = read_json(tmp_path / "records" / "baselines.json")
        assert [row["top1"] for row in tables[1][2:]] == list(kept["top1"].values()) and kept["num_videos"] == 6
        assert "\n| Ridge, pixels " in (tmp_path / "runs" / "comparison.md").read_text()
        for before, after in zip(tables[0], tables[1][:2], strict=True):
            assert [before[name] == after[name] for name in ("method", "top1_of_seeds", "gmacs", "parameters")] == [
                True
            ] * 4

    def test_several_views_count_in_the_table(self, compared, folder, tmp_path, monkeypatch):
        out, runs = compared[0], tmp_path / "runs"
        shutil.copytree(out, runs)
        again = arguments(folder, "--output_dir", str(runs), "--num_clips", "2", "--num_crops", "3")
        assert main([*again, "--measure_rounds", "0"]) == 0
        text, row = (runs / "comparison.md").read_text(), read_json(runs / "comparison.json")["rows"][1]
        assert "clips/s" not in text and "Speed:" not in text and "| M trained |" in text
        measured = read_json(out / "comparison.json")["rows"][1]
        counted = ("gmacs", "parameters", "trained_parameters")
        assert "forward_clips_per_second" in measured.keys() - row.keys()
        assert [row[name] for name in counted] == [measured[name] for name in counted]
        for method, seed in RUNS:
            model = InTIClipForVideoClassification.from_pretrained(runs / method / f"seed_{seed}" / "last").eval()
            processor = InTIClipVideoProcessor.from_pretrained(runs / method / f"seed_{seed}" / "last")
            right = 0
            for video in sorted((folder / "videos" / "test").rglob("*.mp4")):
                views = processor(str(video), num_clips=2, num_crops=3, return_tensors="pt")["pixel_values"][0]
                assert len(views) == 6
                with torch.no_grad():
                    best = model(pixel_values=views).logits.softmax(dim=-1).mean(dim=0).argmax().item()
                right += model.config.id2label[best] == video.parent.name
            views = read_json(runs / "records" / method / f"seed_{seed}.json")["views"]
            assert views == {"num_clips": 2, "num_crops": 3, "eval_top1": right / 6, "eval_num_videos": 6}
        table = read_json(runs / "comparison.json")
        assert table["about"].endswith(" in 2 clips x 3 crops")
        assert [row["top1_of_seeds"] for row in table["rows"]] == [
            [read_json(runs / "records" / m / f"seed_{seed}.json")["views"]["eval_top1"] for seed in (0, 1)]
            for m in ("Naive", "InTI")
        ]
        shutil.rmtree(runs / "InTI" / "seed_1" / "last")
        assert main(again) == 0  # its record tells all
        with pytest.raises(ValueError, match=r"InTI, seed 1: its record has no evaluation of 3 clips and 3 crops"):
            main([*again, "--num_clips", "3"])
        assert main([*again, "--num_clips", "1", "--num_crops", "1"]) == 0
        one_view = read_json(out / "records" / "InTI" / "seed_1.json")["evaluations"][-1]["eval_top1"]
        assert read_json(runs / "comparison.json")["rows"][1]["top1_of_seeds"][1] == one_view

    def test_records_of_other_videos_are_refused(self, compared, folder, tmp_path):
        shutil.copytree(folder / "videos", tmp_path / "videos")
        (tmp_path / "videos" / "test" / "a" / "0.mp4").unlink()
        flags = ("--output_dir", str(tmp_path / "runs"), "--records_dir", str(compared[0] / "records"))
        with pytest.raises(ValueError, match="Naive: eval_dir must be '14 files, .*, got '13 files, .* records_dir"):
            main([*arguments(folder, *flags), "--eval_dir", str(tmp_path / "videos")])


@pytest.mark.slow
@pytest.mark.usefixtures("forked_jobs")
def test_failing_run_shows_its_log(folder, tmp_path, capsys):
    flags = ("--output_dir", str(tmp_path), "--train_dir", str(tmp_path / "no"), "--jobs", "1")
    with pytest.raises(ValueError) as error:
        main(arguments(folder, *flags))
    log = tmp_path / "Naive" / "seed_0" / "log.txt"
    assert f"The end of {log}:\n" in capsys.readouterr().err
    message = str(error.value)
    assert message.startswith("Naive, seed 0 failed: ") and message.endswith(f"(all of it in {log})")
    assert "no such file or folder" in message and "no such file or folder" in log.read_text()
    assert not (tmp_path / "InTI").exists()


# Without training ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--methods", "{}"], "methods must map names to settings"),
        (["--methods", '{"a/b": {}}'], "the method 'a/b' names a folder"),
        (["--methods", '{"A": {"seed": 1}}'], "A: seed is not for a method to set"),
        (["--methods", '{"A": {"num_frames": null}}'], "A: num_frames has no value"),
        (
            ["--methods", '{"A": {"lerning_rate": 1}}'],
            "A: a setting must be one that --help lists, got 'lerning",
        ),
        (["--methods", '{"A": {"compression": "tom"}}'], "A: compression must be one of none, inti"),
        (["--methods", '{"A": {"compression_options": {"cub": 1}}}'], "A: InTICompression has no option 'cub'"),
        (["--num_frames", "5"], "InTI: the number of frames must be a multiple of 2"),
        (["--epochs", "many"], "Naive: argument --epochs: invalid int value: 'many'"),
        (["--seed", "1"], "got 'seed'; did you mean 'seeds'?"),
        (["--seeds", "1", "1"], "seeds must be different"),
        (["--jobs", "0"], "jobs must be at least 1, got 0"),
        (["--num_clips", "0"], "num_clips must be at least 1, got 0"),
        (["--measure_rounds", "-1"], "measure_rounds must be at least 0, got -1"),
        (["--num_crops", "2"], "num_crops must be 1 or 3, got 2"),
        (["--train_script", "absent.py"], "there is no absent.py; give scripts/train.py"),
        (["--recipe", "absent.yaml"], "must be a recipe (a YAML file), got absent.yaml"),
    ],
)
def test_wrong_settings_read_well(folder, tmp_path, flags, wanted):
    with pytest.raises(ValueError) as error:
        main(arguments(folder, "--output_dir", str(tmp_path / "out"), *flags))
    assert wanted in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_views_find_the_videos_that_training_evaluates_on(tmp_path):
    data = DataArguments(
        train_dir="t", eval_dir="e.csv", layout="csv", eval_split="val", video_root="v", allow_outside_root=True
    )
    found = places_of(data)
    assert found == {
        "data_dir": "e.csv", "split": "val", "layout": "csv", "video_root": "v", "allow_outside_root": True
    }  # fmt: skip
    flags = [f"--{name}={value}" for name, value in found.items()]
    script = runpy.run_path(ROOT / "scripts" / "evaluate.py")
    read = parse_arguments(script["EvaluationArguments"], ["model"], "", ["m", *flags])
    assert {name: getattr(read, name) for name in found} == found


@pytest.mark.parametrize("path", COMPARISONS, ids=[path.stem for path in COMPARISONS])
def test_recipes_of_comparisons_fit(path):
    """Each method's settings, on the tower that these recipes train."""
    args = parse_recipe([comparison.ComparisonArguments], [str(path)])[0]
    depth = 12 if path.stem == "study_large" else 4
    sizes = {"hidden_size": 96, "num_attention_heads": 4, "image_size": 24, "patch_size": 12}
    tower = CLIPVisionConfig(**sizes, num_hidden_layers=depth)
    for settings in args.methods.values():
        command = [*comparison.command_of(args, [], settings), "--output_dir=out"]
        model = parse_recipe(comparison.TRAINING_CLASSES, command)[0]
        InTIClipVisionConfig.from_clip(tower, **model.config_options())


def test_hosts_are_refused_before_anything_is_trained(folder):
    methods = '{"VideoMAE": {"host": "transformers/videomae"}}'
    with pytest.raises(ValueError, match="VideoMAE: .*host"):
        main(arguments(folder, "--methods", methods))


def test_evaluation_is_needed(folder):
    with pytest.raises(ValueError, match="Naive: there is nothing to compare by: give eval_dir"):
        main(["--config", str(folder / "compare.yaml"), "--output_dir", "absent"])


def test_jobs_end_with_the_first_that_fails(tmp_path):
    """And no more than so many run at a time, each with its share of the threads."""
    (tmp_path / "job.py").write_text(
        "import os, sys, time\nname, output = sys.argv[1:]\nprint(os.environ['OMP_NUM_THREADS'], flush=True)\n"
        "if name == 'bad':\n    time.sleep(0.5)\n    sys.exit('error: it is bad')\n"
        "if name == 'long':\n    time.sleep(60)\nopen(output, 'w').close()\n"
    )
    names = ["done", "good", "long", "bad", "never"]
    jobs = [Job(name, [str(tmp_path / "job.py"), name, str(tmp_path / f"{name}.out")],
                tmp_path / f"{name}.log", tmp_path / f"{name}.out") for name in names]  # fmt: skip
    jobs[0].output.touch()
    told = []
    begun = time.monotonic()
    with pytest.raises(ValueError, match="^bad failed: it is bad"):
        run_jobs(jobs, 2, 6, "Jobs", lambda job, seconds: told.append(job.name) or job.name)
    assert time.monotonic() - begun < 30 and told == ["good"]
    assert (tmp_path / "good.log").read_text() == "3\n"
    assert not any((tmp_path / name).exists() for name in ("done.log", "long.out", "never.log"))


def report(tmp_path, scores, **changed):
    numbers = {"gmacs": 2.0, "parameters": 3e6, "trained_parameters": 1e6, "peak_memory_bytes": 4e6}
    numbers |= {"forward_clips_per_second": 20.0, "training_clips_per_second": 5.0, **changed}
    conditions = {"batch_size": 8, "device": "cuda: some GPU", "threads": 1, "torch": "2"}
    results = {"A": [{"eval_top1": score} for score in scores]}
    text = write_report(
        results, {"A": {**numbers, "conditions": conditions}}, list(range(len(scores))), "About", tmp_path
    )
    assert "all that was allocated" in text and (tmp_path / "comparison.png").exists()
    return [cell.strip() for cell in text.splitlines()[2].split("|")[1:-1]]


def test_report_of_seeds(tmp_path):
    assert report(tmp_path, [0.5, 0.7, 0.6]) == ["A", "60.0 ± 10.0", "-", "2", "3", "1", "20", "5", "4"]
    row = list(csv.DictReader((tmp_path / "comparison.csv").read_text().splitlines()))[0]
    assert (row["top1"], row["top1_std"], row["top1_of_seeds"]) == ("0.6", str(stdev([0.5, 0.7, 0.6])), "0.5 0.7 0.6")


def test_difference_to_the_first_method_is_paired():
    assert paired_difference([0.5, 0.6], [0.5, 0.6])["over_first"] == pytest.approx(0)
    found = paired_difference([0.6, 0.8, 0.7, 0.9], [0.5, 0.6, 0.6, 0.7])  # differences 0.1, 0.2, 0.1, 0.2
    # Student's t with 3 degrees of freedom: 3.182; the deviation of the differences is 0.0577.
    assert found["over_first"] == pytest.approx(0.15)
    assert found["over_first_interval"] == pytest.approx(3.182 * 0.057735 / 2, rel=1e-3)
    assert paired_difference([0.6], [0.5, 0.6])["over_first"] is None  # a baseline
    assert percent(0.15, 0.0123, "+") == "+15.0 ± 1.2" and percent(None, None) == "-"


def test_baselines_see_grey_frames_in_their_order():
    clips = torch.zeros(2, 3, 3, 32, 32)
    clips[0, 1, :, :16, :] = torch.tensor([0.3, 0.6, 0.9])[:, None, None]  # grey 0.6 in the upper half of frame 1
    pixels = grey_pixels(clips).unflatten(1, (3, 16, 16))
    assert torch.allclose(pixels[0, 1, :8], torch.tensor(0.6)) and pixels[0].sum() == pixels[0, 1, :8].sum()
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=16)).eval()
    clips = torch.randn(2, 3, 3, 32, 32)
    features = frame_features(clips, tower).unflatten(1, (3, 8))
    assert torch.allclose(frame_features(clips.flip(1), tower).unflatten(1, (3, 8)), features.flip(1), atol=1e-6)
    assert torch.allclose(features[1, 2], tower(clips[1, 2][None]).pooler_output[0], atol=1e-6)


def test_baselines_leave_out_broken_videos():
    torch.manual_seed(0)
    labels = torch.arange(40) % 2
    pixels = torch.randn(40, 3)
    pixels[:, 0] += 6 * labels
    ok = torch.arange(40) < 30
    pixels[30:, 0] = 100 * (1 - labels[30:])  # would teach the opposite
    train = {"pixels": pixels[:, None], "features": torch.randn(40, 1, 3), "labels": labels, "ok": ok}
    test = {name: value[:20] for name, value in train.items()}
    assert ridge_accuracy("Ridge, pixels", train, test) == 1
    assert ridge_accuracy("Ridge, frame features", train, test) < 0.9
    assert ridge_accuracy("Ridge, pixels", train, {**test, "ok": torch.arange(20) < 15}) == 0.75


def test_baselines_choose_the_penalty_on_other_people():
    """Ten people say each word ten times, nearly alike; the penalty that leaving out single clips chooses gets 75%."""
    torch.manual_seed(0)
    word = torch.arange(2).repeat_interleave(100)

    def clips() -> dict[str, torch.Tensor]:
        person = torch.randn(20, 20).repeat_interleave(10, 0)  # in one word
        pixels = person + 0.4 * (2 * word[:, None] - 1) + 0.2 * torch.randn(200, 20)
        return {"pixels": pixels[:, None], "labels": word, "ok": torch.ones(200, dtype=torch.bool)}

    assert ridge_accuracy("Ridge, pixels", clips(), clips()) > 0.9


@pytest.mark.parametrize("classes", [2, 3])
def test_baselines_sum_the_scores_of_all_views(classes):
    """A clear view outvotes two faint ones of another class, whichever comes first."""
    labels = torch.arange(classes).repeat(20)
    ok = torch.ones(20 * classes, dtype=torch.bool)
    train = {"pixels": torch.eye(classes)[labels][:, None], "labels": labels, "ok": ok}
    clear, faint = 5 * torch.eye(classes), 0.1 * torch.eye(classes).roll(1, 0) + 0.5
    test = {"labels": torch.arange(classes), "ok": ok[:classes]}
    for views in ([clear, faint, faint], [faint, clear, faint], [faint, faint, clear]):
        assert ridge_accuracy("Ridge, pixels", train, {**test, "pixels": torch.stack(views, dim=1)}) == 1
    assert ridge_accuracy("Ridge, pixels", train, {**test, "pixels": torch.stack([faint] * 3, dim=1)}) == 0


def test_baselines_need_no_second_video_of_a_class():
    pixels = torch.eye(3)[:, None]
    videos = {"pixels": pixels, "labels": torch.tensor([0, 0, 1]), "ok": torch.ones(3, dtype=torch.bool)}
    assert ridge_accuracy("Ridge, pixels", videos, videos) == 1


def test_report_of_one_seed_and_unknown_memory(tmp_path):
    assert report(tmp_path, [0.5], peak_memory_bytes=None) == ["A", "50.0", "-", "2", "3", "1", "20", "5"]


def test_report_goes_into_a_new_folder(tmp_path):
    """No run makes the folder if the records of all of them came from elsewhere."""
    assert report(tmp_path / "new", [0.5])[:2] == ["A", "50.0"]


def test_names_in_the_picture_do_not_overlap(tmp_path, monkeypatch):
    """Twelve methods, most of them close together."""
    from hf_inti.comparison import report as comparison_report

    boxes, place = [], comparison_report.place
    monkeypatch.setattr(comparison_report, "place", lambda *args: boxes.append(place(*args)) or boxes[-1])
    rows = [
        {"method": f"Method number {i}", "gmacs": 100 + i % 4, "top1": 0.5 + 0.01 * (i // 4), "top1_std": 0.01}
        for i in range(11)
    ]
    rows.append({"method": "Far away", "gmacs": 200, "top1": 0.1, "top1_std": 0.05})
    comparison_report.accuracy_picture(rows, tmp_path / "picture.png")
    assert len(boxes) == 12 and all(isinstance(box, Bbox) for box in boxes)
    pairs = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i]]
    assert sum(a.overlaps(b) for a, b in pairs) == 0


@pytest.fixture(autouse=True)
def forget_accelerator(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("adaptation", ["zeroi2v", "aim"])
def test_trained_parameters_of_adapters(adaptation, folder, tmp_path):
    """Of a model as training leaves it, they are those that training changed."""
    from hf_inti.comparison.measure import measure

    options = {"num_frames": 4, "compression": "none", "adaptation": adaptation}
    config = InTIClipVisionConfig.from_clip(str(folder / "tower"), **options)
    model = InTIClipForVideoClassification(config)
    model.save_pretrained(tmp_path)
    arguments = {"TrainingArguments": {"output_dir": "unused"}, "ModelArguments": {"activation_checkpointing": False}}
    (tmp_path / "run.json").write_text(json.dumps({"arguments": arguments}))
    found = measure(tmp_path, batch_size=2)
    adapters = sum(p.numel() for p in model.vision_model.adaptation.parameters())
    assert adapters < found["trained_parameters"] < 0.5 * found["parameters"]
