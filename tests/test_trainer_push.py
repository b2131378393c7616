"""Fine-tuning with transformers' Trainer, which pushes to a Hub of our own in the end; our card on top."""

from pathlib import Path

import pytest
from hub_server import hub_fixture  # noqa: F401 (it is called hub)

from forks import run_in_a_fork


ROOT = Path(__file__).parent.parent
TRAIN = """
import sys
import torch
from transformers import Trainer, TrainingArguments
from conftest import TINY
from hf_inti import InTIClipForVideoClassification, InTIClipVideoProcessor, InTIClipVisionConfig
from hf_inti.training.callbacks import TrainingProgressCallback

names = dict(enumerate(["left", "right"]))
config = InTIClipVisionConfig(
    **TINY, num_frames=8, id2label=names, label2id={n: i for i, n in names.items()}, compression_layers=[1, 3]
)
clips = [{"pixel_values": torch.randn(8, 3, 32, 32), "labels": i % 2} for i in range(4)]
arguments = TrainingArguments(
    sys.argv[1], max_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True, save_strategy="no",
    push_to_hub=True, hub_model_id="me/inti-clip-trained",
)
side = {"height": 32, "width": 32}
processor = InTIClipVideoProcessor(num_frames=8, size={"shortest_edge": 32}, crop_size=side)
trainer = Trainer(
    InTIClipForVideoClassification(config), arguments, train_dataset=clips, processing_class=processor,
    callbacks=[TrainingProgressCallback()],
)
trainer.train()
trainer.push_to_hub()
"""
LOAD = """
import sys
sys.modules["hf_inti"] = None
import torch
from transformers import AutoModelForVideoClassification
model = AutoModelForVideoClassification.from_pretrained("me/inti-clip-trained", trust_remote_code=True)
assert model(torch.zeros(1, 8, 3, 32, 32)).logits.shape == (1, 2)
"""
# Without the check in a clean process, which LOAD repeats.
PUSH = """
import runpy, sys
sys.argv = sys.argv[1:]
import hf_inti.hub.folder
hf_inti.hub.folder.check_reload = lambda *arguments: None
runpy.run_path(sys.argv[0], run_name="__main__")
"""
METADATA = """
title: InTI-CLIP on two directions
recipe:
base_model:
tower:
license: unknown
dataset: {name: two directions, id: , split: test, num_labels: 2, terms: , limits: []}
method: {num_frames: 8, compression: inti, compression_layers: [1, 3], compression_options: {}, adaptation: none,
  adaptation_options: {}}
published:
protocol:
"""


@pytest.mark.slow
def test_trainer_pushes_and_our_card_comes_last(hub, tmp_path):  # noqa: F811
    def run(code, *arguments) -> None:
        environment = hub.environment(tmp_path / "home")
        status, _, error = run_in_a_fork(code, *arguments, cwd=tmp_path, environment=environment)
        assert status == 0, error

    run(TRAIN, tmp_path / "trained")
    files = hub.files("me/inti-clip-trained")
    assert {"model.safetensors", "config.json", "modeling_inti_clip.py", "training_args.bin"} <= set(files)
    run(LOAD)
    (tmp_path / "metadata.yaml").write_text(METADATA)
    script = ROOT / "scripts" / "push_to_hub.py"
    run(PUSH, script, tmp_path / "trained", "me/inti-clip-trained", "--metadata", tmp_path / "metadata.yaml")
    files = hub.files("me/inti-clip-trained")
    assert not [name for name in files if name.endswith(".bin")]  # Trainer's training_args.bin is a pickle
    card = files["README.md"].decode()
    assert "pipeline_tag: video-classification" in card and "InTI" in card
    run(LOAD)
