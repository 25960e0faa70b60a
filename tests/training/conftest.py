"""Tiny image folders and recipes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from hf_rsheat.instance_scenes import write_instance_scenes
from hf_rsheat.training.recipe import Recipe

TINY_MODEL = {
    "hidden_sizes": [8, 16, 32, 64],
    "depths": [1, 1, 1, 1],
    "drop_path_rate": 0.3,
    "layer_scale_init_value": None,
}


@pytest.fixture(autouse=True)
def _one_thread_fresh_accelerator():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)  # runs of one process may differ in precision
    yield
    torch.set_num_threads(threads)


def write_image(path: Path, seed: int, mode: str = "RGB", size: tuple[int, int] = (48, 40)) -> None:
    """A smooth random image, so that a tiny model has something to learn."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    if mode == "I;16":
        pixels = rng.integers(0, 10_000, size[::-1], dtype=np.uint16)
        Image.fromarray(pixels).save(path)
        return
    coarse = rng.integers(0, 256, (4, 4, 3) if mode == "RGB" else (4, 4), dtype=np.uint8)
    Image.fromarray(coarse, mode).resize(size, Image.Resampling.BICUBIC).save(path)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5 optical images, 4 pairs, 1 SAR image, and one file that is no image."""
    folder = tmp_path_factory.mktemp("scenes")
    for index in range(9):
        write_image(folder / "optical" / f"scene{index}.png", index)
    for index in range(4):
        write_image(folder / "sar" / f"scene{index}.png", 100 + index, "L", (24, 20))
    write_image(folder / "sar" / "alone.png", 200, "L")
    (folder / "optical" / "broken.png").write_bytes(b"not an image")
    return folder


@pytest.fixture(scope="session")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes that differ in brightness, 8 images each."""
    folder = tmp_path_factory.mktemp("classes")
    for index in range(16):
        name = ("dark", "bright")[index % 2]
        level = np.random.default_rng(index).integers(0, 60, (40, 40, 3), dtype=np.uint8) + 180 * (index % 2)
        (folder / name).mkdir(exist_ok=True)
        Image.fromarray(level.astype(np.uint8)).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture
def make_recipe(tmp_path: Path, scenes: Path) -> Callable[..., Recipe]:
    """Build a tiny recipe; keyword arguments replace its entries."""

    def build(**changes: Any) -> Recipe:
        values: dict[str, Any] = {
            "objective": "rs_vheat",
            "image_folder": str(scenes),
            "output_dir": str(tmp_path / "run"),
            "image_size": 32,
            "model": dict(TINY_MODEL),
            "batch_size": 4,
            "max_steps": 6,
            "save_steps": 3,
            "warmup_steps": 2,
            "learning_rate": 1e-3,
            "num_workers": 0,
        }
        return Recipe(**{**values, **changes})

    return build


def read_log(output_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (Path(output_dir) / "log.jsonl").read_text().splitlines()]


BACKBONE = {"hidden_size": 16, "inner_size": 20, "num_hidden_layers": 2, "state_size": 4}
DETECTOR = {
    "feature_size": 16,
    "aggregator_size": 8,
    "fc_size": 16,
    "mask_num_convs": 1,
    "rpn_nms_pre": 30,
    "rpn_max_per_img": 20,
    "rpn_nms_pre_train": 30,
    "rpn_max_per_img_train": 20,
    "rcnn_num_samples": 16,
}


@pytest.fixture(scope="session")
def coco(tmp_path_factory) -> Path:
    """6 images of 128 px to learn from and 2 to evaluate on."""
    return write_instance_scenes(tmp_path_factory.mktemp("coco"), train=6, test=2, size=128)


@pytest.fixture
def make_instances(make_recipe, coco):
    def build(**changes):
        options = {"dataset": "generated", **changes.pop("options", {})}
        values = {
            "objective": "instances",
            "image_folder": str(coco),
            "image_size": 96,
            "model": {"backbone_config": BACKBONE, **DETECTOR},
            "batch_size": 2,
            "objective_options": options,
        }
        return make_recipe(**{**values, **changes})

    return build
