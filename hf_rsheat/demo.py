"""The main job end to end: images, pretraining, Hub folder, loading without this package, a picture."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from PIL import Image, ImageStat
from tqdm.auto import tqdm

from . import __version__
from .errors import ConfigurationError, DataError, HFRSHeatError, MissingExtraError
from .scenes import make_scene, write_labelled_scenes, write_scenes

SENSORS = {"optical": 3, "sar": 1}
_TILE = 256  # larger images are cut into tiles of this side in pixels: loading them at every step would take too long
_MAX_TILES = 1200
_EXAMPLES = 48  # of the user's images, compared to find one with something to see
_MARKER = ".hf_rsheat_demo"

# Runs in a process that cannot import this package: what a stranger who found the folder on the Hub would do.
_STRANGER = """
import runpy, sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_rsheat":
            raise ModuleNotFoundError("hf_rsheat is kept out of this process", name=name)

sys.meta_path.insert(0, NotInstalled())
hub, image_file, modality, drawing, picture = sys.argv[1:]

import torch
from PIL import Image, ImageStat
from transformers import AutoImageProcessor, AutoModel, AutoModelForPreTraining
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
processor = AutoImageProcessor.from_pretrained(hub, trust_remote_code=True)
model = AutoModelForPreTraining.from_pretrained(hub, trust_remote_code=True)
backbone = AutoModel.from_pretrained(hub, trust_remote_code=True).eval()
image = Image.open(image_file)
inputs = processor(image, modality=modality, return_tensors="pt")
with torch.inference_mode():
    features = backbone(**inputs, modality=modality).pooler_output
    restored = model.eval()(**inputs, modality=modality)
runpy.run_path(drawing)["pretraining_figure"](model, processor, image, picture, modality=modality)
print(f"      features {tuple(features.shape)}, reconstruction {tuple(restored.reconstruction.shape)}, "
      f"loss {float(restored.loss):.3f}, loaded as {type(model).__module__.split('.')[0]}")
"""


class DemoError(HFRSHeatError, RuntimeError):
    """A step of the demo failed; its own messages stand above."""


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the demo; the defaults train for about two minutes on two CPU cores.

    Attributes:
        image_size: side of the training images in pixels.
        scene_size: side of the generated scenes in pixels; smaller than `image_size`, so that two minutes are enough to
            learn what a patch can hold.
        pairs: generated scenes with an optical and a SAR image.
        singles: generated scenes with an optical image only: radar partners are rarer in practice, too.
        steps: optimiser steps.
        batch_size: images (a pair counts once) a step.
        hidden_sizes: width of each stage.
        depths: layers of each stage.
    """

    image_size: int = 96
    scene_size: int = 64
    pairs: int = 60
    singles: int = 420
    steps: int = 900
    batch_size: int = 12
    hidden_sizes: tuple[int, int, int, int] = (32, 64, 160, 192)
    depths: tuple[int, int, int, int] = (1, 1, 1, 1)


def run(images: Path | None = None, output_dir: Path = Path(".demo"), settings: DemoSettings | None = None) -> Path:
    """Pretrain a small RS-vHeat, export it, load it in a process without this package, and draw what it does.

    A second run with the same images and settings continues an interrupted training or reuses a finished one; with
    others it starts over.

    Args:
        images: folder of images of any size, in sub-folders `optical` and `sar` if there are two sensors; unreadable
            ones are left out. Generated scenes if None.
        output_dir: folder for everything the demo writes.
        settings: sizes of the model and the training.

    Returns:
        The picture.

    Raises:
        DataError: no image can be used.
        ConfigurationError: `output_dir` holds something else.
        MissingExtraError: matplotlib is not installed.
        DemoError: training or loading failed.
    """
    if find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "demo", "The demo")
    settings, output, started = settings or DemoSettings(), _claim(Path(output_dir)), time.monotonic()
    _say(1, "images")
    sensors, example = (
        _make_scenes(output, settings) if images is None else _take_images(Path(images), output, settings)
    )
    _say(2, "pretraining")
    hub = _pretrain(output, settings, sensors)
    _say(3, "loading the Hub folder in a fresh process in which this package cannot be imported")
    picture = output / "picture.png"
    _load_as_a_stranger(hub, example, sensors[0], picture)
    print(_summary(hub, picture, time.monotonic() - started), flush=True)
    return picture


def _claim(folder: Path) -> Path:
    """Make the output folder, or make sure that it is ours: parts of it will be deleted and written anew."""
    folder = folder.resolve()
    marker = folder / _MARKER
    if not marker.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigurationError(f"{folder} holds something else than a demo: choose another output folder.")
        folder.mkdir(parents=True, exist_ok=True)
        marker.touch()
    return folder


def _say(step: int, what: str) -> None:
    print(f"[{step}/3] {what}", flush=True)


def _make_scenes(output: Path, settings: DemoSettings) -> tuple[list[str], Path]:
    """Generated scenes, and one more that training does not see."""
    folder = _empty(output / "images")
    write_scenes(folder / "pairs", settings.pairs, settings.scene_size, seed=0)
    write_labelled_scenes(folder / "singles", settings.singles, settings.scene_size, seed=1)
    example = output / "example.png"
    Image.fromarray(make_scene(settings.scene_size, (2, 7), "harbor").optical).save(example)
    print(
        f"      {settings.pairs} optical and SAR pairs, {settings.singles} optical scenes, made from a seed", flush=True
    )
    return list(SENSORS), example


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _take_images(source: Path, output: Path, settings: DemoSettings) -> tuple[list[str], Path]:
    """Copies of the user's images as tiles of at most 256 pixels, and one of them with much contrast."""
    from .training.image_folder import image_paths

    paths, folder = image_paths(source), _empty(output / "images")
    share = max(1, _MAX_TILES // len(paths))
    chosen = paths[:: -(-len(paths) // _MAX_TILES)]
    written: list[Path] = []
    unusable = 0
    for path in tqdm(chosen, desc="images", unit="image", dynamic_ncols=True):
        try:
            tiles = list(_tiles(source / path, share))
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            unusable += 1
            reason = str(error).replace(str(source / path), "the file")
            tqdm.write(f"      left out: {path}: {reason}")
            continue
        for number, tile in enumerate(tiles):
            target = folder / f"{PurePosixPath(path).with_suffix('')}-{number:03d}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            tile.save(target)
            written.append(target)
    if not written:
        raise DataError(f"None of the {len(paths)} images below {source} can be used: 8-bit PNG, JPEG or TIFF will do.")
    print(
        f"      {len(written)} tiles from {len(chosen) - unusable} of {len(paths)} images, {unusable} left out",
        flush=True,
    )
    of_sensor = {name: [path for path in written if _sensor(path.relative_to(folder)) == name] for name in SENSORS}
    sensors = [name for name, found in of_sensor.items() if found]
    fitting = of_sensor[sensors[0]]
    example = output / "example.png"
    shutil.copyfile(max(fitting[:: -(-len(fitting) // _EXAMPLES)], key=_contrast), example)
    return sensors, example


def _sensor(path: Path) -> str:
    """The first folder named like a sensor says which one an image comes from; others are optical, as in training."""
    return next((part for part in path.parts[:-1] if part in SENSORS), "optical")


def _contrast(path: Path) -> float:
    """Standard deviation of the grey values: a picture of a dark forest would show nothing."""
    with Image.open(path) as image:
        return ImageStat.Stat(image.convert("L")).stddev[0]


def _tiles(path: Path, limit: int) -> Iterator[Image.Image]:
    """An 8-bit image as it is, or if it is large, evenly chosen tiles of it.

    Raises:
        ValueError: the image has more than 8 bit per pixel.
        OSError: it cannot be read.
    """
    with Image.open(path) as opened:
        if opened.mode.startswith(("I", "F")):
            raise ValueError("more than 8 bit per pixel; convert it first")
        image = opened.convert("L" if opened.mode in ("1", "L", "LA") else "RGB")
    if min(image.size) < 2 * _TILE:
        image.thumbnail((2 * _TILE, 2 * _TILE))
        yield image
        return
    corners = [
        (x, y) for y in range(0, image.height - _TILE + 1, _TILE) for x in range(0, image.width - _TILE + 1, _TILE)
    ]
    for x, y in corners[:: -(-len(corners) // limit)]:
        yield image.crop((x, y, x + _TILE, y + _TILE))


def _recipe(output: Path, settings: DemoSettings, sensors: list[str]) -> dict[str, Any]:
    return {
        "objective": "rs_vheat",
        "image_folder": str(output / "images"),
        "output_dir": str(output / "run"),
        "seed": 0,
        "image_size": settings.image_size,
        "model": {
            "modalities": {name: SENSORS[name] for name in sensors},
            "hidden_sizes": list(settings.hidden_sizes),
            "depths": list(settings.depths),
            "drop_path_rate": 0.0,
            # A small, briefly trained network: wider starting weights and no vanishing branches, to learn at once.
            "layer_scale_init_value": 0.1,
            "initializer_range": 0.08,
            # With weight 1 and no negatives, both sensors' features soon collapse to one vector.
            "contrastive_loss_weight": 0.1,
        },
        "batch_size": settings.batch_size,
        "max_steps": settings.steps,
        "save_steps": max(1, settings.steps // 2),
        "keep_checkpoints": 1,
        "warmup_steps": settings.steps // 10,
        "learning_rate": 1.0e-3,
        "weight_decay": 0.02,
        "num_workers": 1,
    }


def _pretrain(output: Path, settings: DemoSettings, sensors: list[str]) -> Path:
    """Write the recipe and launch the training, continuing where an earlier run with the same recipe stopped."""
    recipe_file, run_folder = output / "recipe.yaml", output / "run"
    # The version is part of the comparison: another one may not be able to continue this one's training.
    text = f"# Written by the demo of hf_rsheat {__version__}.\n"
    text += yaml.safe_dump(_recipe(output, settings, sensors), sort_keys=False)
    if not recipe_file.exists() or recipe_file.read_text(encoding="utf-8") != text:
        shutil.rmtree(run_folder, ignore_errors=True)
        recipe_file.write_text(text, encoding="utf-8")
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    options = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    options += ["--num_cpu_threads_per_process", str(threads)]
    print("      accelerate launch -m hf_rsheat.train --config recipe.yaml", flush=True)
    command = [sys.executable, "-m", "accelerate.commands.launch", *options]
    command += ["-m", "hf_rsheat.train", "--config", str(recipe_file), "--resume"]
    # Threads that wait asleep: spinning ones slow everything down where other programs use the cores, too.
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    if (status := subprocess.run(command, cwd=output, env=environment).returncode) != 0:
        raise DemoError(f"Training stopped with status {status}: its own message stands above.")
    return run_folder / "hub"


def _load_as_a_stranger(hub: Path, example: Path, modality: str, picture: Path) -> None:
    """Predict and draw from the Hub folder alone: isolated interpreter, elsewhere, offline, no cached remote code."""
    drawing = Path(__file__).with_name("figures.py")
    with tempfile.TemporaryDirectory() as elsewhere:
        environment = {
            **os.environ,
            "HF_MODULES_CACHE": elsewhere,
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
        }
        arguments = [str(hub), str(example), modality, str(drawing), str(picture)]
        child = subprocess.run([sys.executable, "-I", "-c", _STRANGER, *arguments], cwd=elsewhere, env=environment)
    if child.returncode != 0:
        raise DemoError(f"Loading the Hub folder {hub} failed with status {child.returncode}: see the message above.")


def _summary(hub: Path, picture: Path, seconds: float) -> str:
    return f"""
Done in {seconds:.0f} s.

Hub folder: {hub}

    from transformers import AutoImageProcessor, AutoModel
    processor = AutoImageProcessor.from_pretrained("{hub}", trust_remote_code=True)
    model = AutoModel.from_pretrained("{hub}", trust_remote_code=True)

Picture: {picture}"""
