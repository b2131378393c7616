"""A few of what `make survive` and `make fuzz` do at length: kills, faults, several processes, broken videos."""

import json
import random
import signal
import time
from pathlib import Path

import pytest
from fuzz import run as fuzz
from fuzz.mutations import ANY, STRUCTURED, avi_chunks, ebml_elements, mp4_boxes, mutate, parts_of

from conftest import write_video
from forks import ALL, run_in_a_fork
from hf_inti.training.interruption import Interruption


TESTS = Path(__file__).parent


def run(script: str, *arguments: object) -> dict:
    """What a script of tests/reliability or tests/fuzz prints; it fails by itself when something is lost or differs."""
    status, printed, errors = run_in_a_fork(TESTS / script, *arguments, imported=ALL, OMP_NUM_THREADS="1")
    assert status == 0, errors + printed
    return json.loads(printed)


@pytest.mark.slow
def test_killed_runs_end_like_one_that_never_stopped():
    counts = run("reliability/kills.py", "--kills", 4)
    assert counts["kills"] == 4 and counts["at_file_calls"] == 2 and counts["runs"] >= 1


@pytest.mark.slow
def test_each_fault_gives_one_clear_message_and_loses_nothing():
    faults = {fault["fault"]: fault for fault in run("reliability/faults.py")["faults"]}
    assert len(faults) == 9 + ("full disk" in faults)  # left out where nothing can be mounted
    for name, status in {"SIGTERM": 143, "Ctrl-C": 130, "limit on files": 1, "video vanishes": 0}.items():
        assert faults[name]["status"] == status, name


@pytest.mark.slow
def test_several_processes_train_and_evaluate_as_one():
    """Also others that resume, a job of which a process dies, and one that a scheduler ends."""
    found = run("reliability/processes.py", "--steps", 10)
    assert found["steps"] == 10
    differences = [name for name in found if "difference" in name]
    assert len(differences) == 6  # the script compares each with its limit


@pytest.mark.slow
def test_processes_that_split_the_weights_train_as_one():
    found = run("reliability/fsdp.py", "--steps", 8)
    differences = {"loss_difference", "loss_difference_resumed", "logit_difference"}
    assert found["steps"] == 8 and differences <= found.keys()  # compared there


@pytest.mark.slow
def test_broken_videos_are_decoded_or_refused():
    found = run("fuzz/run.py", "--cases", 200)
    assert found["decoded"] > 20 and found["refused"] > 20 and len(found["by_mutation"]) == len(ANY + STRUCTURED)


def test_broken_videos_are_read_as_the_endpoint_and_the_page_read_them(tmp_path, monkeypatch):
    data = fuzz.write_seed(tmp_path / "seed.mkv", "mpeg4")
    assert [fuzz.decode(data, way, tmp_path / "case.txt") for way in fuzz.WAYS] == ["decoded"] * 3
    monkeypatch.setattr(fuzz, "MAX_SECONDS", 0)
    assert [fuzz.decode(data, way, tmp_path / "case.txt") for way in fuzz.WAYS] == ["decoded", "refused", "decoded"]
    monkeypatch.setattr(fuzz, "PAGE", {"max_seconds": 0, "max_pixels": 0})
    assert [fuzz.decode(data, way, tmp_path / "case.txt") for way in fuzz.WAYS] == ["decoded", "refused", "refused"]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_what_hangs_is_tried_once_more(tmp_path, monkeypatch):
    def decode(data: bytes, way: str, path: Path) -> str:
        """Case 1 hangs the first time, case 3 always."""
        case = int(data)
        if case == 3 or (case == 1 and not (tmp_path / "once").exists()):
            (tmp_path / "once").touch()
            while True:
                pass
        return "decoded"

    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    monkeypatch.setattr(fuzz, "decode", decode)
    cases = {random.Random(f"0 {case}").random(): case for case in range(5)}  # known by its first draw
    monkeypatch.setattr(fuzz, "mutate", lambda files, draw: (b"%d" % cases[draw.random()], "none"))
    found = fuzz.outcomes([], 0, 5, 0, tmp_path)
    assert [row["case"] for row in found] == [0, 1, 2, 3, 4]
    assert [fuzz.kind(row) for row in found] == ["decoded", "decoded", "decoded", "hung", "decoded"]


@pytest.mark.parametrize(("extension", "parse"), [("mp4", mp4_boxes), ("mkv", ebml_elements), ("avi", avi_chunks)])
def test_parts_of_containers_are_found(extension, parse, tmp_path):
    """Those at the top fill the file, and others lie in them."""
    write_video(tmp_path / f"clip.{extension}")
    data = (tmp_path / f"clip.{extension}").read_bytes()
    parts = parse(data)
    assert parts == parts_of(data)
    end, top = 0, 0
    for part in parts:
        assert part.start <= part.size_at < part.body <= part.end <= len(data)
        if part.start >= end:
            assert part.start - end <= 1  # AVI fills up to even places
            end, top = part.end, top + 1
    assert len(data) - end <= 1 and len(parts) > top + 5
    broken = {mutate([data], random.Random(case))[0] for case in range(50)} - {data}  # zeroed zeros break nothing
    assert len(broken) > 40


def test_an_echo_of_sigterm_is_no_second_one(monkeypatch):
    """A scheduler signals every process, and torchrun then signals its own."""
    ended = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: ended.append(number))
    interrupts = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with Interruption() as interruption:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            assert interruption.signal == signal.SIGTERM and not ended
            later = time.monotonic() + 11
            monkeypatch.setattr(time, "monotonic", lambda: later)
            signal.raise_signal(signal.SIGTERM)
            assert ended == [signal.SIGTERM]
        with Interruption() as interruption:
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, interrupts)
