"""`hf-rsheat space`: a folder that is a Hugging Face Space for one model."""

import json
import re
import shutil
from pathlib import Path

from PIL import Image

from hf_rsheat.errors import ConfigurationError
from hf_rsheat.hub.export import load_folder
from hf_rsheat.hub.inference import NEEDED, requirements_of, write_handler
from hf_rsheat.scenes import KINDS, make_scene

SDK_VERSION = "6.31.0"  # of gradio; the one the app is tested with
EXAMPLE_SIZE = 256
CARD = """---
title: {title}
emoji: 🔥
colorFrom: indigo
colorTo: red
sdk: gradio
sdk_version: {sdk_version}
python_version: "3.11"
app_file: app.py
pinned: false
{models}---

# {title}

Pick or upload an image and see what the model makes of it: {answer}.
A model that conducts heat also shows where its features change when one patch of the image is heated, and how fast each
spatial frequency decays.

Written by `hf-rsheat space`. Locally: `pip install -r requirements.txt 'gradio=={sdk_version}'`, then `python app.py`.
The example images are generated.
"""


def write_space(
    folder: str | Path,
    output: str | Path,
    *,
    model_id: str | None = None,
    revision: str | None = None,
    title: str | None = None,
) -> Path:
    """Write a Space: `app.py`, `requirements.txt`, `README.md`, example images, and the model.

    Args:
        folder: An exported model folder.
        output: Folder to write; files of an earlier call are overwritten.
        model_id: Repository on the Hub that holds this model, handler included: the Space then downloads it instead of
            carrying a copy.
        revision: Branch, tag or commit of that repository.
        title: Shown on the page.

    Returns:
        The output folder.

    Raises:
        ConfigurationError: The folder holds no exported model, a page cannot show its images, or the output folder is
            inside the model's or the other way round.
    """
    folder, output = Path(folder), Path(output)
    inner, outer = folder.resolve(), output.resolve()
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise ConfigurationError(f"{output} and {folder} lie in each other; give another folder for the Space.")
    if output.is_file():
        raise ConfigurationError(f"{output} is a file; give a folder for the Space.")
    model, _ = load_folder(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "auto_map" not in config:
        raise ConfigurationError(f"{folder} is not exported yet: run `hf-rsheat export {folder} OUT` and give OUT.")
    sensors = _sensors(model.config)
    title = title or f"{type(model).__name__} {(model_id or folder.resolve().name).split('/')[-1]}"
    (output / "examples").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(__file__).parent / "space_app.py", output / "app.py")
    settings = {"title": title, "model": model_id, "revision": revision}
    (output / "space.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    requirements = requirements_of(*NEEDED, "huggingface_hub")
    (output / "requirements.txt").write_text("\n".join(requirements) + "\n", encoding="utf-8")
    card = CARD.format(
        title=re.sub(r"[^\w .()/-]", " ", title),  # it stands in YAML
        sdk_version=SDK_VERSION,
        models=f"models:\n- {model_id}\n" if model_id else "",
        answer=_answer(type(model).__name__, model.config),
    )
    (output / "README.md").write_text(card, encoding="utf-8")
    _write_examples(output / "examples", sensors)
    if model_id is None:
        _copy_model(folder, output / "model")
    return output


def _answer(class_name: str, config) -> str:
    if class_name.endswith("ForImageClassification"):
        return "its classes with their scores"
    if class_name.endswith("ForSemanticSegmentation"):
        return "its segmentation"
    if class_name.endswith("ForInstanceSegmentation"):
        return "the objects it finds"
    if class_name.endswith("ForPreTraining") and hasattr(config, "mask_radius_range"):
        return "what it restores of an image whose low or high frequencies were removed"
    return "its features"


def _sensors(config) -> dict[str, int]:
    """Sensors whose images a page can show, with their channels."""
    backbone = getattr(config, "backbone_config", None) or config
    channels = getattr(backbone, "modalities", None) or {"optical": getattr(backbone, "num_channels", 3)}
    shown = {name: count for name, count in channels.items() if count in (1, 3)}
    if not shown:
        raise ConfigurationError(
            f"A page takes grey or RGB pictures, but this model takes {max(channels.values())} bands: use "
            "`hf-rsheat serve` or your own code."
        )
    return shown


def _write_examples(folder: Path, sensors: dict[str, int]) -> None:
    for seed, kind in enumerate(KINDS):
        scene = make_scene(EXAMPLE_SIZE, seed, kind)
        if 3 in sensors.values():
            Image.fromarray(scene.optical).save(folder / f"optical_{kind}.png")
        if 1 in sensors.values():
            Image.fromarray(scene.sar).save(folder / f"sar_{kind}.png")


def _copy_model(folder: Path, output: Path) -> None:
    output.mkdir(exist_ok=True)
    for file in sorted(folder.iterdir()):
        if file.is_file() and not file.name.startswith("."):
            shutil.copyfile(file, output / file.name)
    write_handler(output)
