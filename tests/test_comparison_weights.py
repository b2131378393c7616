"""`compare.py weights`: what alpha and beta follow."""

import json

import pytest
import torch

from conftest import TINY, write_video
from hf_inti import InTIClipForVideoClassification, InTIClipVideoProcessor, InTIClipVisionConfig
from hf_inti.comparison.weights import main, patches_of, stages, summary


def save_model(folder, **options):
    torch.manual_seed(0)
    config = InTIClipVisionConfig(**TINY, num_frames=8, num_labels=2, **options)
    model = InTIClipForVideoClassification(config)
    with torch.no_grad():  # so that weights differ
        for name, parameter in model.named_parameters():
            if ".logits." in name:
                parameter.normal_(std=3)
    model.save_pretrained(folder)
    size = {"height": TINY["image_size"], "width": TINY["image_size"]}
    InTIClipVideoProcessor(num_frames=8, size={"shortest_edge": TINY["image_size"]}, crop_size=size).save_pretrained(
        folder
    )
    return model.eval()


def test_patches_are_the_models():
    """As the patch embedding cuts them: row by row, each with all its pixels."""
    clip = torch.arange(2 * 3 * 3 * 4 * 6).reshape(2, 3, 3, 4, 6).float()
    patches = patches_of(clip, 2)
    assert patches.shape == (2, 3, 6, 12)
    for n, (row, column) in enumerate([(0, 0), (0, 2), (0, 4), (2, 0), (2, 2), (2, 4)]):
        pixels = clip[1, 2, :, row : row + 2, column : column + 2].flatten()
        assert torch.equal(patches[1, 2, n].sort().values, pixels.sort().values)


def test_later_stages_see_what_the_weights_left():
    patches = torch.tensor([[[[0.0, 0.0]], [[1.0, 3.0]], [[4.0, 4.0]], [[4.0, 8.0]]]])  # (1, 4, 1, 2)
    weight = torch.tensor([[[[9.0, 9.0], [0.25, 0.75]], [[9.0, 9.0], [1.0, 0.0]]]])  # class tokens have nonsense
    last = torch.tensor([[[[9.0, 9.0], [0.5, 0.5]]]])
    (change1, pair1), (change2, pair2) = stages(patches, (weight, last))
    assert change1.tolist() == [[[2.0], [2.0]]] and torch.equal(pair1, weight[:, :, 1:])
    # The first pair became (0.75, 2.25), the second is its first frame, (4, 4).
    assert change2.tolist() == [[[(3.25 + 1.75) / 2]]] and torch.equal(pair2, last[:, :, 1:])


def test_summary():
    change = torch.arange(20.0).flip(0)
    alpha = torch.linspace(1, 0.5, 20)  # one-sided where it changes most
    found = summary(change, torch.stack([alpha, 1 - alpha], dim=-1))
    assert found["rank_correlation"] == pytest.approx(1)
    assert found["mean_alpha"] == pytest.approx(0.75) and found["one_sidedness"] == pytest.approx(0.5)
    assert found["share_above_half"] == 0.5
    assert len(found["by_change"]) == 10 and found["by_change"] == sorted(found["by_change"])
    assert found["changes"][0] == 0.5 and found["changes"][-1] == 18.5
    turned = summary(change, torch.stack([1 - alpha, alpha], dim=-1))
    assert turned["rank_correlation"] == pytest.approx(1) and turned["mean_alpha"] == pytest.approx(0.25)
    even = summary(change, torch.full((20, 2), 0.5))
    assert even["rank_correlation"] is None and even["one_sidedness"] == 0


def test_command(tmp_path, capsys):
    model = save_model(tmp_path / "model", compression_layers=[1, 2])
    for n in range(3):
        path = tmp_path / "videos" / "ab"[n % 2] / f"{n}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no video") if n == 2 else write_video(path, seed=n)
    flags = ["--data_dir", str(tmp_path / "videos"), "--output_dir", str(tmp_path / "out"), "--batch_size", "2"]
    assert main([str(tmp_path / "model"), *flags]) == 0
    rows = json.loads((tmp_path / "out" / "weights.json").read_text())["rows"]
    assert [row["stage"] for row in rows] == [1, 2] and {row["num_videos"] for row in rows} == {2}
    processor = InTIClipVideoProcessor.from_pretrained(tmp_path / "model")
    clips = [processor(str(path), return_tensors="pt")["pixel_values"] for path in sorted(tmp_path.rglob("[01].mp4"))]
    with torch.no_grad():
        weights = model(torch.cat(clips), output_interpolation_weights=True).interpolation_weights
    for row, pair in zip(rows, weights, strict=True):
        assert row["mean_alpha"] == pytest.approx(pair[:, :, 1:, 0].mean().item(), abs=1e-5)
    std, size = torch.tensor(processor.image_std)[:, None, None], TINY["patch_size"]
    largest = max(
        (clip[0, 0::2] - clip[0, 1::2]).mul(std).abs().unfold(2, size, size).unfold(3, size, size).mean((1, 4, 5)).max()
        for clip in clips
    )
    assert rows[0]["changes"][-1] <= largest + 1e-6 and rows[0]["changes"][-1] > 0.5 * largest
    assert "| model" in capsys.readouterr().out and (tmp_path / "out" / "weights.png").stat().st_size > 1000


def test_what_cannot_be_looked_at(tmp_path):
    save_model(tmp_path / "naive", compression="none")
    save_model(tmp_path / "inti", compression_layers=[1])
    bad = tmp_path / "videos" / "a" / "0.mp4"
    bad.parent.mkdir(parents=True)
    bad.write_bytes(b"no video")
    flags = ["--data_dir", str(tmp_path / "videos"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="naive has no InTI"):
        main([str(tmp_path / "naive"), *flags])
    with pytest.raises(ValueError, match="no video of .* can be read"):
        main([str(tmp_path / "inti"), *flags])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        main([str(tmp_path / "inti"), *flags, "--batch_size", "0"])
