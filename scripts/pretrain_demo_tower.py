"""Pretrain a tiny CLIP image tower on single images of the demo's scenes and save it as a CLIPVisionModel.

    python scripts/pretrain_demo_tower.py --output_dir demo_tower

It stands for the CLIP weights that real training starts from. As CLIP, it learns to tell what one image shows
and nothing about time: which pair of classes the image could come from and in which eighth of its range the
moving attribute is, 32 image classes. The scenes are drawn for this and are in no clip of the dataset.
"""

import math
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from make_demo_data import PAIRS, render_images
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel, HfArgumentParser
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD


BINS = 8  # of the moving attribute
IMAGES_PER_SCENE = 16


@dataclass
class Arguments:
    output_dir: str = field(metadata={"help": "Where the tower goes, for from_pretrained."})
    seed: int = field(default=0, metadata={"help": "Of the images and of the weights."})
    num_scenes: int = field(default=1000, metadata={"help": f"Each gives {IMAGES_PER_SCENE} images."})
    num_epochs: int = field(default=4)
    batch_size: int = field(default=128, metadata={"help": "Images per step and process."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Reached after a tenth of the steps."})
    image_size: int = field(default=32, metadata={"help": "Pixels of a side."})
    patch_size: int = field(default=8, metadata={"help": "Pixels of a side; divides image_size."})
    hidden_size: int = field(default=96, metadata={"help": "Width; the MLP is four times as wide."})
    num_layers: int = field(default=4, metadata={"help": "Blocks."})
    num_heads: int = field(default=4, metadata={"help": "Heads of the attention; divides hidden_size."})


def render_dataset(seed, split, num_scenes, size):
    """Normalised images, float (N, 3, size, size), and their classes, (N,)."""
    images, classes = [], []
    for scene in tqdm(range(num_scenes), desc="rendering", unit="scene"):
        pixels, pair, moving = render_images([seed, split, scene], IMAGES_PER_SCENE, size)
        images.append(torch.from_numpy(pixels))
        classes.append(pair * BINS + torch.from_numpy(moving * BINS).long())
    images = torch.cat(images).float() / 255
    images = (images - torch.tensor(OPENAI_CLIP_MEAN)) / torch.tensor(OPENAI_CLIP_STD)
    return TensorDataset(images.permute(0, 3, 1, 2).contiguous(), torch.cat(classes))


def main(arguments):
    for part, whole in (("patch_size", "image_size"), ("num_heads", "hidden_size")):
        if getattr(arguments, whole) % getattr(arguments, part):
            raise SystemExit(
                f"{part} must divide {whole} ({getattr(arguments, whole)}), got {getattr(arguments, part)}."
            )
    accelerator = Accelerator()
    set_seed(arguments.seed)
    config = CLIPVisionConfig(
        hidden_size=arguments.hidden_size,
        intermediate_size=4 * arguments.hidden_size,
        num_hidden_layers=arguments.num_layers,
        num_attention_heads=arguments.num_heads,
        image_size=arguments.image_size,
        patch_size=arguments.patch_size,
        hidden_act="quick_gelu",
    )
    tower = CLIPVisionModel(config)
    classifier = nn.Linear(config.hidden_size, len(PAIRS) * BINS)  # for pretraining alone, not saved
    # Splits 0 and 1 of make_demo_data.py are its training and test clips.
    train = render_dataset(arguments.seed, 2, arguments.num_scenes, config.image_size)
    held_out = render_dataset(arguments.seed, 3, 50, config.image_size)
    loader = DataLoader(train, arguments.batch_size, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(
        [*tower.parameters(), *classifier.parameters()], arguments.learning_rate, weight_decay=0.05
    )
    tower, classifier, optimizer, loader = accelerator.prepare(tower, classifier, optimizer, loader)

    num_steps = arguments.num_epochs * len(loader)
    progress = tqdm(total=num_steps, desc="pretraining", disable=not accelerator.is_main_process)
    step = 0
    for _ in range(arguments.num_epochs):
        for images, classes in loader:
            warmup, cosine = 10 * (step + 1) / num_steps, 0.5 + 0.5 * math.cos(math.pi * step / num_steps)
            for group in optimizer.param_groups:
                group["lr"] = arguments.learning_rate * min(warmup, cosine)
            loss = nn.functional.cross_entropy(classifier(tower(images).pooler_output), classes)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            step += 1
            progress.update()
            if step % 25 == 0:
                progress.set_postfix(loss=f"{loss.item():.2f}")
    progress.close()

    if accelerator.is_main_process:
        tower, classifier = accelerator.unwrap_model(tower).eval(), accelerator.unwrap_model(classifier)
        images, classes = (column.to(accelerator.device) for column in held_out.tensors)
        with torch.no_grad():
            guesses = classifier(tower(images).pooler_output).argmax(1)
        right, right_pair = guesses == classes, guesses // BINS == classes // BINS
        print(
            f"{len(classes)} images of new scenes: {right.float().mean():.1%} of the classes, "
            f"{right_pair.float().mean():.1%} of the pairs."
        )
        tower.save_pretrained(arguments.output_dir)


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
