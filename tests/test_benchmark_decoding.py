"""The benchmark of decoders: its clips, that wrong frames are noticed, and the report."""

import json
import re
import sys
from contextlib import nullcontext

import pytest
import torch

from hf_inti import InTIClipForVideoClassification, InTIClipVideoProcessor
from hf_inti.benchmarks import decoding as benchmark_decoding
from hf_inti.benchmarks import prediction
from hf_inti.benchmarks.decoding import (
    agreement,
    decoding_contestants,
    main,
    make_clip,
    measure_clips,
    measure_memory,
)
from hf_inti.measure.timing import read_report
from hf_inti.model.video_decoding import decode_frames, probe_video


av = pytest.importorskip("av")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", 2, 96, 64, 12)


def test_clips_are_what_is_asked_for(clip):
    info = probe_video(clip)
    assert (info.num_frames, info.fps, info.width, info.height) == (60, 30, 96, 64)
    with av.open(str(clip)) as container:
        keys = [i for i, packet in enumerate(container.demux(video=0)) if packet.size and packet.is_keyframe]
    assert keys == [0, 12, 24, 36, 48]
    frames = decode_frames(clip, range(60)).float()
    assert (frames[1:] - frames[:-1]).abs().mean((1, 2, 3)).min() > 2  # all differ
    assert not list(clip.parent.glob("*.part*"))


def test_long_clips_repeat_what_is_encoded(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_decoding, "ENCODED_SECONDS", 1)
    path = make_clip(tmp_path / "long.mp4", 3, 64, 48, 250)
    info = probe_video(path)
    assert info.num_frames == 90 and info.timestamps == pytest.approx([i / 30 for i in range(90)])
    first, again, last = decode_frames(path, [7, 37, 67])
    assert torch.equal(first, again) and torch.equal(first, last)
    with av.open(str(path)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 90


def test_contestants_agree(clip):
    contestants = decoding_contestants(clip)
    assert {"hf_inti", "pyav", "pyav_threads", "pyav_resize", "load_video"} <= contestants.keys()
    pixels = contestants["pyav"]()
    assert pixels.shape == (16, 3, 224, 224) and pixels.dtype == torch.float32
    found = agreement(contestants)
    assert found["pyav"] == {"same_frames": 16, "difference": 0}
    assert all(row["same_frames"] == 16 and row["difference"] < 0.1 for row in found.values())


def test_other_frames_are_noticed(clip, monkeypatch):
    contestants = decoding_contestants(clip)
    shifted = contestants["pyav"]().roll(1, 0)
    shifted[5] = contestants["pyav"]()[5]
    found = agreement({**contestants, "decord": lambda: shifted})
    assert found["decord"] == {"same_frames": 1, "difference": 0}
    with pytest.raises(ValueError, match="hf_inti gives 1 of 16 frames"):
        agreement({**contestants, "hf_inti": lambda: shifted})
    few = {"hf_inti": contestants["hf_inti"], "pyav": contestants["pyav"], "decord": lambda: shifted}
    monkeypatch.setattr(benchmark_decoding, "decoding_contestants", lambda path: few)
    rows, notes = measure_clips({"short": clip}, repetitions=1)
    assert "decord gives other frames of short: 1 are the same." in notes
    assert rows.keys() == {"hf_inti@short", "pyav@short", "decord@short"}
    assert all(row["seconds"] > 0 for row in rows.values())


def test_what_is_not_installed_is_left_out(clip, monkeypatch):
    for name in ("torchcodec", "torchcodec.decoders", "decord"):
        monkeypatch.setitem(sys.modules, name, None)
    contestants = decoding_contestants(clip)
    assert contestants.keys() == {"hf_inti", "pyav", "pyav_threads", "pyav_resize", "load_video"}
    _, notes = measure_clips({"short": clip}, repetitions=1)
    assert [note.partition(":")[0] for note in notes] == ["torchcodec is left out", "decord is left out"]


def test_memory_is_that_of_the_clip(clip, tmp_path):
    warm_up = make_clip(tmp_path / "warm_up.mp4", 1, 64, 48, 250)
    found = measure_memory(clip, warm_up)
    assert found["seconds_once"] > 0
    if found["peak_memory_bytes"] is not None:
        assert 0 <= found["peak_memory_bytes"] < 500e6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--clips", "340x256"], "WIDTHxHEIGHT,DISTANCE"),
        (["--clips", "gone.mp4"], "got 'gone.mp4'"),
        (["--lengths", "15"], "multiples of it, got 15"),
        (["--lengths", "0"], "got 0"),
    ],
)
def test_wrong_settings(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        main([*arguments, "--output_dir", str(tmp_path)])


@pytest.mark.slow
@pytest.mark.usefixtures("forked_jobs")
def test_report(tmp_path):
    bound = "seconds hf_inti@64x48_12 / pyav@64x48_12 <= 1000"
    flags = ["--clips", "64x48,12", "--lengths", "1", "2", "--repetitions", "1", "--require", bound]
    assert main([*flags, "--output_dir", str(tmp_path)]) == 0
    rows = read_report(tmp_path)["rows"]
    assert {"hf_inti@64x48_12", "load_video@64x48_12", "1s", "2s"} <= rows.keys()
    assert rows["1s"].keys() == {"seconds_once", "peak_memory_bytes"}
    written = (tmp_path / "benchmark.md").read_text()
    assert "hf_inti@64x48_12" in written
    milliseconds = f"{1e3 * rows['pyav@64x48_12']['seconds']:.0f}"
    assert re.search(rf"^\| ms +\| 64x48_12 \|\n.*\n(\|.*\n)*\| pyav +\| +{milliseconds} \|$", written, re.M)


@pytest.mark.slow
@pytest.mark.usefixtures("forked_jobs")
def test_prediction_and_its_halves(tmp_path, tiny_config, monkeypatch, capsys):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(prediction.tempfile, "TemporaryDirectory", lambda: nullcontext(scratch))
    model = tmp_path / "model"
    InTIClipForVideoClassification(tiny_config()).save_pretrained(model)
    InTIClipVideoProcessor(num_frames=8, size=32, crop_size=32).save_pretrained(model)
    flags = ["--model", str(model), "--num_videos", "3", "--repetitions", "1", "--output_dir", str(tmp_path / "out")]
    assert prediction.main(flags) == 0
    rows = read_report(tmp_path / "out")["rows"]
    assert rows.keys() == {"predict", "decoding", "model", "start"}
    assert all(row["seconds"] > 0 for row in rows.values())
    assert rows["predict"]["of_slower"] > 0
    assert "on 3 videos" in capsys.readouterr().out
    lines = (scratch / "predict_log.txt").read_text().splitlines()
    assert sum(line.startswith(str(scratch / "videos")) for line in lines) == 4 * 3  # each run does them all
    assert json.loads((tmp_path / "out" / "benchmark.json").read_text())["title"] == "Prediction"
