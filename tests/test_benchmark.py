"""benchmark.py: what it times, what it refuses to time, and targets that are missed."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import PartialState

from forks import ALL, run_in_a_fork
from hf_inti.benchmarks import growth as benchmark_growth
from hf_inti.benchmarks import models as benchmark_models
from hf_inti.measure.timing import Requirement, TimingArguments, cell, interleave, report, summary
from hf_inti.model.compression_inti import InTI


SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark.py"
TINY = {
    "size": "B/16",
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 32,
    "num_frames": 8,
    "num_labels": 5,
}
MODELS = {"naive": {**TINY, "compression": "none"}, "inti": {**TINY, "compression_layers": [1, 2]}}
ROWS = {"a": {"seconds": 2.0, "gmacs": 10.0, "none": 0.0}, "b": {"seconds": 4.0, "gmacs": 16.0, "none": 0.0}}


@pytest.mark.parametrize(
    ("text", "value", "bound", "met"),
    [
        ("seconds a / b <= 0.5", 0.5, 0.5, True),
        ("seconds a/b <= 0.49", 0.5, 0.49, False),
        ("seconds b / a >= 3", 2.0, 3.0, False),
        ("gmacs a >= 10", 10.0, 10.0, True),
        ("none a <= 1e-4", 0.0, 0.0001, True),
        ("seconds a / b <= gmacs", 0.5, 0.625, True),
        ("seconds b / a <= gmacs + 0.3", 2.0, 1.9, False),
        ("seconds b / a <= gmacs + 0.4", 2.0, 2.0, True),
    ],
)
def test_requirements(text, value, bound, met):
    verdict = Requirement.parse(text).check(ROWS)
    assert (verdict.value, verdict.bound, verdict.met) == (pytest.approx(value), pytest.approx(bound), met)


@pytest.mark.parametrize("text", ["", "a / b < 1", "seconds a / b", "seconds a / b <= -", "seconds a b <= 1", "faster"])
def test_what_is_no_requirement(text):
    with pytest.raises(ValueError, match="a requirement reads"):
        Requirement.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seconds c <= 1", "there is no 'c'.*a, b"),
        ("memory a <= 1", "a has no 'memory'.*seconds, gmacs"),
        ("none a / b <= 1", "none of b is 0"),
    ],
)
def test_requirements_of_what_was_not_measured(text, message):
    with pytest.raises(ValueError, match=message):
        Requirement.parse(text).check(ROWS)


def test_contestants_take_turns_after_warming_up():
    order = []
    times = interleave({name: lambda name=name: order.append(name) for name in "abc"}, repetitions=4, warm_up=2)
    assert {name: len(values) for name, values in times.items()} == {"a": 4, "b": 4, "c": 4}
    rounds = ["".join(order[i : i + 3]) for i in range(0, 18, 3)]
    assert rounds == ["abc", "bca", "cab", "abc", "bca", "cab"]


def test_median_and_spread():
    assert summary([3.0, 1.0, 2.0, 4.0, 100.0]) == {"seconds": 3.0, "low": 2.0, "high": 4.0, "repetitions": 5}
    assert summary([3.0]) == {"seconds": 3.0, "low": 3.0, "high": 3.0, "repetitions": 1}
    assert cell("seconds", summary([0.25])) == "250 (250 to 250)"
    assert cell("seconds", summary([0.00125])) == "1.25 (1.25 to 1.25)"


def test_a_missed_target_is_an_error(tmp_path, capsys):
    rows = {name: {**row, "low": row["seconds"], "high": row["seconds"]} for name, row in ROWS.items()}
    args = TimingArguments(output_dir=str(tmp_path), require=["seconds a / b <= 0.6"])
    assert report("T", rows, args, "About.") == 0
    args = TimingArguments(output_dir=str(tmp_path), require=["seconds a / b <= 0.6", "seconds a / b <= 0.4"])
    assert report("T", rows, args, "About.") == 1
    text = (tmp_path / "benchmark.md").read_text()
    assert text in capsys.readouterr().out
    assert [("met" in line, "MISSED" in line) for line in text.splitlines() if "<=" in line] == [(1, 0), (0, 1)]
    found = json.loads((tmp_path / "benchmark.json").read_text())
    assert [verdict["met"] for verdict in found["required"]] == [True, False]
    assert found["rows"]["b"]["gmacs"] == 16
    assert (tmp_path / "benchmark.png").stat().st_size > 5000


def test_operations_and_frames_of_every_peer():
    # The published shapes, in giga multiply-adds of one clip as FlopCounterMode counts them.
    published = {"clip_per_frame": 281, "xclip_b16": 282, "timesformer_b": 392, "vivit_b": 451, "videomae_b": 180}
    # V-JEPA 2 in this size: a VideoMAE with a pooler of three blocks and one that asks with one token.
    published["vjepa2_b"] = 180 * 15 / 12 + 2
    assert published.keys() | {"mvit_v1_b", "swin3d_t"} == benchmark_models.PEERS.keys()
    for name, gmacs in published.items():
        assert benchmark_models.count_macs({"peer": name}) / 1e9 == pytest.approx(gmacs, rel=0.01), name


def test_a_compressed_peer_has_fewer_operations():
    options = {"compression": "sta", "compression_options": {"r": 64}}
    macs = benchmark_models.count_macs({"peer": "videomae_b", **options})
    assert macs / 1e9 == pytest.approx(96, rel=0.01)  # STA, Table 2
    assert benchmark_models.frames_and_size({"peer": "videomae_b", **options}) == (16, 224)


def test_naive_is_clip_on_every_frame():
    spec = {"size": "B/16", "compression": "none"}
    assert benchmark_models.count_macs(spec) == benchmark_models.count_macs({"peer": "clip_per_frame"})


def test_a_requirement_of_nothing_loses_no_measurement(tmp_path):
    rows = {name: {**row, "low": row["seconds"], "high": row["seconds"]} for name, row in ROWS.items()}
    with pytest.raises(ValueError, match="a has no 'speed'"):
        report("T", rows, TimingArguments(output_dir=str(tmp_path), require=["speed a <= 1"]), "About.")
    assert json.loads((tmp_path / "benchmark.json").read_text())["rows"]["a"]["gmacs"] == 10


def test_what_inti_computes_is_seen_by_the_check(monkeypatch):
    how = benchmark_models.RunOptions(optimize=True)
    run = benchmark_models.runnable(MODELS["inti"], how)
    benchmark_models.check_outputs("inti", MODELS["inti"], how, run)
    hidden = InTI._hidden_by_parts
    monkeypatch.setattr(InTI, "_hidden_by_parts", lambda self, x, grid: hidden(self, x, grid).flip(-1))
    with pytest.raises(ValueError, match="inti differs by"):
        benchmark_models.check_outputs("inti", MODELS["inti"], how, run)


@pytest.mark.parametrize("how", [{}, {"optimize": True}, {"precision": "bf16"}])
def test_outputs_are_checked_before_timing(how):
    how = benchmark_models.RunOptions(**how, batch_size=2)
    for name, spec in MODELS.items():
        run = benchmark_models.runnable(spec, how)
        assert run().shape == (2, 5)
        benchmark_models.check_outputs(name, spec, how, run)
        with pytest.raises(ValueError, match=f"{name} differs by .* not timed"):
            benchmark_models.check_outputs(name, spec, how, lambda run=run: run() + 0.5)
        with pytest.raises(ValueError, match=f"{name} returns"):
            benchmark_models.check_outputs(name, spec, how, lambda run=run: run() * float("nan"))


def test_training_steps_train():
    how = benchmark_models.RunOptions(mode="training", batch_size=2)
    torch.manual_seed(0)
    run = benchmark_models.runnable(MODELS["inti"], how)
    model = run.__closure__[[*run.__code__.co_freevars].index("model")].cell_contents
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run()
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert "classifier.weight" in changed
    assert len(changed) > 50


@pytest.fixture
def settings_of_torch():
    """What a benchmark sets in its process."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    PartialState._reset_state()


@pytest.mark.slow
@pytest.mark.usefixtures("settings_of_torch", "forked_jobs")
@pytest.mark.parametrize(("mode", "bound", "outcome"), [("forward", 0.9, "met"), ("training", 0.1, "MISSED")])
def test_models_from_a_file_with_memory(tmp_path, capsys, mode, bound, outcome):
    file = tmp_path / "models.yaml"
    file.write_text(json.dumps({"models": MODELS, "output_dir": str(tmp_path), "repetitions": 2}))
    arguments = [str(file), "--mode", mode, "--memory", "true", "--batch_size", "2"]
    ended = benchmark_models.main([*arguments, "--require", f"gmacs inti / naive <= {bound}"])
    assert ended == int(outcome == "MISSED") and f" {outcome} |" in capsys.readouterr().out
    rows = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    for row in rows.values():
        assert row["low"] <= row["seconds"] <= row["high"]
        assert row["clips_per_second"] == pytest.approx(2 / row["seconds"])
        assert 1e6 < row["peak_memory_bytes"] < 1e9
        assert ("matrix_fraction" in row) == (mode == "forward")
        assert ("activation_memory_bytes" in row) == (mode == "training")
    assert list(tmp_path.glob("memory_*.json")) == []


@pytest.mark.slow
def test_exported_models(tmp_path):
    pytest.importorskip("onnxruntime", reason="the extra export is not installed")
    model = json.dumps({**TINY, "num_hidden_layers": 1, "compression": "none", "num_frames": 4})
    flags = ("--model", model, "--output_dir", tmp_path, "--repetitions", "1")
    status, _, error = run_in_a_fork(SCRIPT, "export", *flags, imported=ALL)
    assert status == 0, error
    rows = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert list(rows) == ["torch", "torch_optimized", "torch_program", "onnx", "onnx_int8"]
    assert all(row["difference"] < 1e-4 for name, row in rows.items() if name != "onnx_int8")
    assert rows["onnx_int8"]["file_bytes"] < 0.6 * rows["onnx"]["file_bytes"]


@pytest.mark.slow
def test_growth(tmp_path):
    small = ["--frames", "4", "8", "--resolution", "48", "--batch", "3", "--repetitions", "1"]
    small += ["--memory", "false"]
    flags = ("--models", json.dumps(MODELS), "--output_dir", tmp_path, *small)
    status, _, error = run_in_a_fork(SCRIPT, "growth", *flags, imported=ALL)
    assert status == 0, error
    rows = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    axes = ["frames=4", "frames=8", "resolution=48", "batch=3"]
    assert list(rows) == [f"{name}:{axis}" for axis in axes for name in MODELS]
    assert rows["naive:frames=8"]["gmacs"] == pytest.approx(2 * rows["naive:frames=4"]["gmacs"], rel=1e-3)
    assert (tmp_path / "benchmark.png").stat().st_size > 10000


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("models", ["--output_dir", "x"], "models must map names to mappings"),
        ("models", ["--output_dir", "x", "--models", '{"a": {"size": "B/17"}}'], "a: give a size, B/16 or L/14"),
        (
            "models",
            ["--output_dir", "x", "--models", '{"a": {"peer": "resnet"}}'],
            "a: a peer is one of clip_per_frame",
        ),
        (
            "models",
            ["--output_dir", "x", "--models", '{"a": {"peer": "vivit_b", "num_frames": 8}}'],
            "a: a peer is one of .* no other settings than compression",
        ),
        (
            "models",
            ["--output_dir", "x", "--models", '{"a": {"size": "B/16", "compresion": "tome"}}'],
            "a: .*compression",
        ),
        (
            "models",
            ["--output_dir", "x", "--models", '{"a": {"size": "B/16"}}', "--precision", "fp8"],
            "precision must be",
        ),
        (
            "models",
            ["--output_dir", "x", "--models", '{"a": {"size": "B/16"}}', "--mode", "training", "--optimize", "true"],
            "optimize is for inference",
        ),
        (
            "growth",
            ["--output_dir", "x", "--models", '{"a": {"size": "B/16"}}', "--frames", "8", "4"],
            "frames must be",
        ),
        ("growth", ["--output_dir", "x", "--models", '{"a": {"size": "B/16"}}', "--frames", "6"], "a multiple of 4"),
        ("growth", ["--output_dir", "x", "--models", '{"a": {"size": "B/16"}}', "--batch_size", "4"], "--batch 4"),
        ("growth", ["--output_dir", "x", "--models", '{"a": {"peer": "vivit_b"}}'], "size and fields"),
        ("models", ["--output_dir", "x", "--models", '{"a b": {"size": "B/16"}}'], "no spaces"),
        ("models", ["--output_dir", "x", "--models", '{"a": {"size": ["B/16"]}}'], "a: give a size"),
        ("models", ["--output_dir", "x", "--models", '{"a": {"size": "B/16", "num_frames": "8"}}'], "a: .*num_frames"),
        (
            "models",
            ["--output_dir", "x", "--models", '{"a": {"size": "B/16"}}', "--require", "seconds b <= 1"],
            "there is no 'b' among a",
        ),
        (
            "models",
            ["--output_dir", "x", "--models", '{"a": {"size": "B/16"}}', "--require", "fast"],
            "requirement reads",
        ),
        ("models", ["--models", '{"a": {"size": "B/16"}}'], "output_dir must be set with --output_dir"),
    ],
)
def test_errors(command, arguments, message):
    with pytest.raises(ValueError, match=message):
        {"models": benchmark_models, "growth": benchmark_growth}[command].main(arguments)
