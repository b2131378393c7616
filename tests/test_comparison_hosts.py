"""The comparison of compressed hosts from end to end, gone on with, and what it refuses."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import AutoModelForVideoClassification, VideoMAEConfig

from conftest import write_video
from hf_inti.comparison import hosts as comparison
from hf_inti.comparison.hosts import HOSTS, Setting, SmallHost, main
from hf_inti.hosts import compress
from hf_inti.hosts.torchvision_classifier import TorchvisionForVideoClassification
from hf_inti.measure.costs import count_flops
from hf_inti.training.hosts import compress_host, frames_of, with_frames
from torchvision_models import load


SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 36}


def tiny() -> VideoMAEConfig:
    return VideoMAEConfig(image_size=32, patch_size=8, num_frames=8, **SIZES)


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """Of a comparison of one host in three ways."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for split in ("train", "test"):
        for k, label in enumerate(("a", "b")):
            for i in range(2):
                write_video(tmp_path / "videos" / split / label / f"{i}.mp4", seed=10 * k + i)
    ways = [*comparison._sta([3]), Setting("fewer frames", "4 frames", num_frames=4)]
    monkeypatch.setattr(comparison, "HOSTS", {"VideoMAE": SmallHost("transformers", tiny, ways)})
    monkeypatch.setitem(comparison.RECIPE, "batch_size", 2)
    threads = torch.get_num_threads()
    yield ["--data_dir", tmp_path / "videos", "--output_dir", tmp_path / "out", "--work_dir", tmp_path / "work"]
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.slow
def test_a_host_is_trained_and_evaluated_in_every_way_once(arguments, tmp_path):
    flags = [*map(str, arguments), "--hosts", "VideoMAE", "--epochs", "1"]
    assert main(flags) == 0
    places = sorted((tmp_path / "out" / "VideoMAE").glob("*.json"))
    assert [path.name for path in places] == [
        "STA_r_3.json", "all_kept_as_trained.json", "fewer_frames_4_frames.json", "random_tokens_r_3.json",
    ]  # fmt: skip
    records = {path.stem: json.loads(path.read_text()) for path in places}
    assert all(record["num_videos"] == 4 and 0 <= record["top1"] <= 1 for record in records.values())
    model = comparison.load_classifier(str(tmp_path / "work" / "VideoMAE" / "last"))[0]
    model.set_attn_implementation("eager")
    x = torch.zeros(1, 8, 3, 32, 32)
    whole = count_flops(model, x).get_total_flops() / 2e9
    assert records["all_kept_as_trained"]["gmacs"] == pytest.approx(whole)
    pruned = count_flops(compress(model, "sta", r=3), x).get_total_flops() / 2e9
    assert records["STA_r_3"]["gmacs"] == pytest.approx(pruned)
    assert 0.98 * pruned < records["random_tokens_r_3"]["gmacs"] < pruned  # nothing is compared with anything
    assert records["fewer_frames_4_frames"]["gmacs"] < whole / 2
    table = (tmp_path / "out" / "hosts.md").read_text()
    assert f"(r 3: {pruned / whole:.2f})" in table and table.count("| VideoMAE |") == 3

    changed = {**records["STA_r_3"], "top1": 0.625}  # what there is is not measured again
    (tmp_path / "out" / "VideoMAE" / "STA_r_3.json").write_text(json.dumps(changed))
    assert main(flags) == 0
    assert "62.5 (r 3:" in (tmp_path / "out" / "hosts.md").read_text()
    with pytest.raises(ValueError, match="training must be .*'epochs': 1.* got .*'epochs': 2"):
        main([*flags, "--epochs", "2"])


def test_wrong_settings(tmp_path):
    with pytest.raises(ValueError, match="hosts must be among VideoMAE, ViViT, .*, got 'CLIP'"):
        main(["--data_dir", str(tmp_path), "--hosts", "CLIP"])
    with pytest.raises(ValueError, match="epochs and threads must be at least 1"):
        main(["--data_dir", str(tmp_path), "--epochs", "0"])


@pytest.mark.parametrize("name", HOSTS)
def test_every_way_fits_its_host_and_saves_operations(name):
    if HOSTS[name].package == "torchvision":
        load()
        model = TorchvisionForVideoClassification(HOSTS[name].config())
    else:
        model = AutoModelForVideoClassification.from_config(HOSTS[name].config(), attn_implementation="eager")
    counts = {}
    for setting in (comparison.ALL, *HOSTS[name].settings):
        fitted = compress_host(with_frames(model, setting.num_frames), setting.compression, setting.options)
        if name not in ("VideoSwin", "MViT"):
            fitted.set_attn_implementation("eager")
        frames = frames_of(fitted.config)
        counts.setdefault(setting.method, []).append(
            count_flops(fitted.eval(), torch.zeros(1, frames, 3, 32, 32)).get_total_flops()
        )
        compress_host(model, "none", None)
    (whole,) = counts.pop("all kept")
    for method, found in counts.items():
        assert sorted(found, reverse=True) == found and found[0] < whole, (method, found, whole)
        assert len(set(found)) == len(found), method
