"""The README's Python runs, and its figures are what the commands print."""

import re
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, VideoMAEConfig, VideoMAEForVideoClassification

from conftest import TINY, write_video
from hf_inti import InTIClipForVideoClassification, InTIClipVisionConfig
from hf_inti.measure.costs import count_costs


README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_first_screen(capsys):
    exec(BLOCKS[0], {})
    printed = capsys.readouterr().out.splitlines()
    expected = re.findall(r"print\(.*\)  # (?:frames: )?(.*)", BLOCKS[0])
    assert printed == expected and len(expected) == 2


def test_choosing_a_method(tmp_path, monkeypatch):
    choose, use, videomae = [block for block in BLOCKS if "heads" in block or "merge_" in block or "apply_sta" in block]
    monkeypatch.chdir(tmp_path)
    tower = {**TINY, "num_hidden_layers": 7, "image_size": 16}
    CLIPVisionModel(CLIPVisionConfig(**tower)).save_pretrained("clip")
    names = {"InTIClipVisionConfig": InTIClipVisionConfig}
    exec(choose.replace("openai/clip-vit-base-patch16", "clip"), names)
    names["model"] = InTIClipForVideoClassification.from_pretrained("clip", config=names["config"])
    exec(use, names)
    config = VideoMAEConfig(
        hidden_size=12, num_hidden_layers=3, num_attention_heads=2, intermediate_size=12, image_size=112, patch_size=8
    )
    VideoMAEForVideoClassification(config).save_pretrained("MCG-NJU/videomae-base-finetuned-kinetics")
    exec(videomae, names)


@pytest.mark.slow
def test_trainer_script(tmp_path, monkeypatch):
    (script,) = [block for block in BLOCKS if "Trainer(" in block]
    monkeypatch.chdir(tmp_path)
    CLIPVisionModel(CLIPVisionConfig(**{**TINY, "image_size": 224, "patch_size": 56})).save_pretrained("clip")
    for i in range(8):
        write_video(tmp_path / "my_videos" / f"class_{i % 2}" / f"{i}.mp4", seed=i)
    script = script.replace("openai/clip-vit-base-patch16", "clip")
    script = script.replace("learning_rate=2e-5", "learning_rate=2e-5, max_steps=2, report_to='none', use_cpu=True")
    names = {}
    exec(script, names)
    assert names["trainer"].state.global_step == 2
    assert (tmp_path / "outputs" / "trainer" / "model.safetensors").exists()
    assert torch.isfinite(torch.tensor(names["trainer"].state.log_history[-1]["train_loss"]))


def test_table_of_costs():
    rows = re.findall(r"\| (CLIP|InTI)[- ](?:ViT-)?([BL]).*?\| ([\d, ]*)\| \d+ \| ([\d.]+) \| ([\d.]*) ?\|", README)
    assert len(rows) == 8
    large = {"patch_size": 14, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    for _, size, layers, *figures in rows:
        tower = {"patch_size": 16} if size == "B" else {**large, "num_attention_heads": 16}
        for cube, figure in zip(("local_mhra", "dwconv"), figures, strict=True):
            if figure:
                options = {"compression": "none"}
                if layers.strip():
                    layers_ = [int(i) for i in layers.split(",")]
                    options = {"compression_layers": layers_, "compression_options": {"cube": cube}}
                counted = count_costs(InTIClipVisionConfig(**tower, **options, num_labels=400))["total"].gmacs
                assert f"{counted:.1f}" == figure, (size, layers, cube)
