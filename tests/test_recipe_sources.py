"""Every value of every recipe against a table of its source.

The tables are typed from the sources: ViFi-CLIP's released K400 configuration ("both", fully supervised, 16 frames),
UniFormerV2's SSv2 configurations (B/16, 16 frames), ZeroI2V's, AIM's and ST-Adapter's released configurations, STTS's
Sec. 4.1, Table 2 and released configurations, and InTI's Tables 2, 3 and 7 for frames and test views. A value that is
not its source's has its reason beside it.
"""

import re
from dataclasses import asdict, fields

import pytest
from test_recipes import ALL, FOLDER, PUBLISHED, parse, split


IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
SLOWFAST = {"image_mean": [0.45, 0.45, 0.45], "image_std": [0.225, 0.225, 0.225]}
CLIP = {"image_mean": None, "image_std": None}  # the processor's own
RANDOM_RESIZED = {"crop": "random_resized", "crop_area": [0.08, 1.0]}
RAND_AUGMENT = "rand-m7-n4-mstd0.5-inc1"
LEFT_AND_RIGHT = {"86": 87, "93": 94, "166": 167}  # SSv2's classes that mirroring swaps, as ZeroI2V maps them

VIFI_CLIP = {
    "epochs": 30,
    "warmup_epochs": 5,
    "learning_rate": 2.2e-5,
    "min_lr_ratio": 0.01,
    "weight_decay": 0.001,
    "decay_norms_and_biases": True,  # on all parameters
    "adam_beta1": 0.9,
    "adam_beta2": 0.98,
    "adam_epsilon": 1e-8,
    "mixup_alpha": 0.8,
    "cutmix_alpha": 1.0,
    "label_smoothing": 0.1,
    "resize": 256,
    "crop": "multi_scale",
    "flip": True,
    "color_jitter_prob": 0.8,
    "grayscale_prob": 0.2,
    "sampling": "uniform",
    "batch": 512,
    **IMAGENET,
}
UNIFORMERV2_SSV2 = {
    "epochs": 22,
    "warmup_epochs": 5,
    "learning_rate": 4e-5,
    "min_lr_ratio": 0.025,  # 1e-6 of 4e-5
    "weight_decay": 0.05,
    "decay_norms_and_biases": False,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 20,
    "repeats": 2,
    "drop_path_rate": 0.2,
    "classifier_dropout": 0.5,
    "rand_augment": RAND_AUGMENT,
    "flip": False,
    "resize": 256,  # released: frames as they lie on disk, then random_resized
    "sampling": "uniform",
    "batch": 64,  # InTI's; UniFormerV2 has 128
    **RANDOM_RESIZED,
    **SLOWFAST,
}
ZEROI2V = {
    "epochs": 40,
    "warmup_epochs": 2.5,
    "learning_rate": 3e-4,
    "min_lr_ratio": 0,
    "weight_decay": 0.05,
    "decay_norms_and_biases": False,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "classifier_dropout": 0.5,
    "resize": 256,
    "rand_augment": RAND_AUGMENT,
    "flip": True,
    "batch": 64,
    **RANDOM_RESIZED,
    **CLIP,
}
ZEROI2V_K400 = {**ZEROI2V, "sampling": "dense", "frame_stride": 8}
ZEROI2V_SSV2 = {
    **ZEROI2V,
    "epochs": 50,
    "sampling": "uniform",
    "label_smoothing": 0.1,
    "random_erasing_prob": 0.25,
    "flip_label_map": LEFT_AND_RIGHT,
}
ZEROI2V_SMALL = {**ZEROI2V, "sampling": "uniform"}
# InTI gives no recipe for UCF101 and HMDB51: ZeroI2V's, at the learning rate at which whole towers train on K400.
WHOLE_TOWER_SMALL = {**ZEROI2V_SMALL, "learning_rate": 2.2e-5}
AIM_K400 = {
    **ZEROI2V_K400,
    "epochs": 30,
    "drop_path_rate": 0.2,
    "rand_augment": None,
}
AIM_SSV2 = {**ZEROI2V_SSV2, "drop_path_rate": 0.2}  # its SSv2 augmentation was not seen: ZeroI2V's
ST_ADAPTER_K400 = {
    "epochs": 12,
    "warmup_epochs": 2,
    "learning_rate": 1e-3,  # per 256 clips, and the batch is 256
    "min_lr_ratio": 0,
    "weight_decay": 0.01,
    "decay_norms_and_biases": False,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "classifier_dropout": 0.5,
    "resize": 256,  # short side 1.0 to 1.15 times 224
    "crop": "random",
    "flip": True,
    "sampling": "dense",
    "frame_stride": 8,
    "batch": 256,
    **CLIP,
}
ST_ADAPTER_SSV2 = {
    **ST_ADAPTER_K400,
    "epochs": 50,
    "rand_augment": RAND_AUGMENT,
    "flip": False,
    "sampling": "uniform",
    "frame_stride": None,
    **RANDOM_RESIZED,
}
STTS_MVIT = {  # MViT/configs/Kinetics/t0_0.9_s4_0.9.yaml, unless another place is named
    "num_frames": 16,  # DATA.NUM_FRAMES
    "epochs": 20,
    "warmup_epochs": 3,
    "learning_rate": 1e-6,  # Sec. 4.1: of the backbone; BACKBONE_LR 0.1 makes it 1e-5
    "new_module_lr_multiplier": 100,  # 1e-4 for the scorers: Sec. 4.1 and BASE_LR
    "head_lr_multiplier": 1,  # optimizer.py: all but the scorers is backbone
    "min_lr_ratio": 0.01,  # COSINE_END_LR 1e-6 of 1e-4
    "weight_decay": 0.05,
    "decay_norms_and_biases": False,  # ZERO_WD_1D_PARAM
    "adam_beta1": 0.9,  # optimizer.py, and the two below
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,  # CLIP_GRAD_L2NORM
    "mixed_precision": "no",  # TRAIN.MIXED_PRECISION, at its default
    "batch": 16,  # BATCH_SIZE, of all GPUs
    "repeats": 2,  # AUG.NUM_SAMPLE
    "sampling": "dense",
    "frame_stride": 4,  # DATA.SAMPLING_RATE
    "resize": 256,  # released: frames as they lie on disk, then random_resized
    "rand_augment": RAND_AUGMENT,
    "random_erasing_prob": 0.25,
    "flip": True,  # DATA.RANDOM_FLIP, at its default
    "mixup_alpha": 0.8,
    "cutmix_alpha": 1.0,
    "label_smoothing": 0.1,
    **RANDOM_RESIZED,  # TRAIN_JITTER_SCALES_RELATIVE
    **CLIP,
}
STTS_VIDEOSWIN = {  # VideoSwin/configs/Kinetics/t0_0.625.py, unless another place is named
    "num_frames": 32,  # clip_len
    "epochs": 10,
    "warmup_epochs": 0.8,
    "learning_rate": 3e-6,  # Sec. 4.1; the configuration has 3e-4
    "new_module_lr_multiplier": 100,  # 3e-4 for the scorers: Sec. 4.1; the configuration has 3e-7
    "head_lr_multiplier": 1,
    "min_lr_ratio": 0,  # min_lr
    "weight_decay": 0.05,
    "decay_norms_and_biases": False,  # decay_mult of norms
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,  # PyTorch's, which the configuration leaves as it is
    "max_grad_norm": None,  # grad_clip
    "mixed_precision": "fp16",  # use_fp16
    "batch": 64,  # Sec. 4.1; videos_per_gpu 8 on 8 GPUs
    "sampling": "dense",
    "frame_stride": 2,  # frame_interval
    "resize": 256,
    "flip": True,
    **RANDOM_RESIZED,
    **CLIP,
}
TEMP_SSV2 = {"preset": "ssv2", "global_drop_path_rate": 0.4}
K400_HEADS, SSV2_HEADS = {"-1": 1, "1": 1}, {"-1": 1, "1": 1, "-2": 1, "2": 1}
ADAPTERS = {"ratio": 0.25}

# (dataset, method or "", for all others): the source's settings, the adaptation's options, test clips and crops.
SOURCES = {
    ("k400", ""): (VIFI_CLIP, {"preset": "k400"}, (4, 3)),
    ("ssv2", ""): (UNIFORMERV2_SSV2, TEMP_SSV2, (4, 3)),
    ("ucf101", ""): (WHOLE_TOWER_SMALL, {"preset": "k400"}, (1, 3)),
    ("hmdb51", ""): (WHOLE_TOWER_SMALL, {"preset": "k400"}, (2, 3)),
    ("k400", "zeroi2v"): (ZEROI2V_K400, {"heads": K400_HEADS, "scale": 0.5, "dropout": 0.1, **ADAPTERS}, (3, 1)),
    ("ssv2", "zeroi2v"): (ZEROI2V_SSV2, {"heads": SSV2_HEADS, "scale": 1.0, "dropout": 0.0, **ADAPTERS}, (1, 3)),
    ("ucf101", "zeroi2v"): (ZEROI2V_SMALL, {"heads": K400_HEADS, "scale": 0.5, "dropout": 0.1, **ADAPTERS}, (1, 3)),
    ("hmdb51", "zeroi2v"): (ZEROI2V_SMALL, {"heads": K400_HEADS, "scale": 0.5, "dropout": 0.1, **ADAPTERS}, (2, 3)),
    ("k400", "aim"): (AIM_K400, {"num_tadapter": 1, "scale": 0.5}, (3, 1)),
    ("ssv2", "aim"): (AIM_SSV2, {"num_tadapter": 2, "scale": 1.0}, (1, 3)),
    ("k400", "st_adapter"): (ST_ADAPTER_K400, {"width": 384, "pre_attention": False, "pre_mlp": True}, (3, 1)),
    ("k400", "stts_mvit"): (STTS_MVIT, {}, (5, 1)),  # Table 2: 0.28 TFLOPs are five times 56.4; NUM_SPATIAL_CROPS 1
    ("k400", "stts_videoswin"): (STTS_VIDEOSWIN, {}, (4, 3)),  # test_pipeline: num_clips 4, ThreeCrop
    ("ssv2", "st_adapter"): (ST_ADAPTER_SSV2, {"width": 384, "pre_attention": True, "pre_mlp": True}, (1, 3)),
}
# What a recipe decides by itself: which network (test_recipes.py, test_recipes_hosts.py), where things lie, and how the
# batch is divided.
OWN = {
    "activation_checkpointing",
    "model",
    "host",
    "host_weights",
    "num_frames",
    "compression",
    "compression_layers",
    "compression_options",
    "adaptation",
    "train_dir",
    "output_dir",
    "num_workers",
    "batch_size",
    "gradient_accumulation_steps",
    "mixed_precision",
}


def sources_of(name: str) -> tuple[dict, dict, tuple[int, int]]:
    dataset, method, _ = split(name)
    settings, options, views = SOURCES.get((dataset, method), SOURCES[dataset, ""])
    settings = dict(settings)
    if (dataset, method) not in SOURCES:
        temporal = method == "uniformerv2" or method.endswith("_temp")
        options = options if temporal else {}
        if dataset == "k400" and temporal:
            settings["classifier_dropout"] = 0.5  # UniFormerV2's head
    return settings, options, views


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_value_is_its_sources(name):
    wanted, options, _ = sources_of(name)
    parsed = parse(name)
    values = {setting: value for arguments in parsed for setting, value in asdict(arguments).items()}
    processes = int(re.search(r"--num_processes (\d+)", (FOLDER / f"{name}.yaml").read_text())[1])
    values["batch"] = processes * values["batch_size"] * values["gradient_accumulation_steps"]
    assert {setting: values[setting] for setting in wanted} == wanted
    assert (values["adaptation_options"] or {}) == options
    # What the source does not name is off: at the default.
    defaults = {f.name: getattr(a, f.name) for a in default_arguments() for f in fields(a)}
    checked = wanted.keys() | OWN | {"batch", "adaptation_options"}
    assert {s: v for s, v in values.items() if s not in checked and v != defaults[s]} == {}


def default_arguments() -> list:
    required = {"ModelArguments": {"model": "m"}, "DataArguments": {"train_dir": "d"}}
    return [cls(**required.get(cls.__name__, {"output_dir": "o"})) for cls in ALL]


@pytest.mark.parametrize("name", PUBLISHED)
def test_views_are_the_sources(name):
    text = (FOLDER / f"{name}.yaml").read_text()
    clips = re.search(r"--num_clips (\d+)", text)
    crops = re.search(r"--num_crops (\d+)", text)
    assert (int(clips[1]) if clips else 1, int(crops[1]) if crops else 1) == sources_of(name)[2]
    assert parse(name)[0].num_frames == sources_of(name)[0].get("num_frames", 16)
