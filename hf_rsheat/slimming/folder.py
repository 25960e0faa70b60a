"""Slim a model folder into another that loads the same way: stock transformers, or with the code beside the weights."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoImageProcessor, PreTrainedModel

from ..auto import register
from ..errors import ConfigurationError
from ..hub.export import AUTO_CLASSES, MODELS_FOLDER, export, our_class
from ..training.image_folder import image_paths
from .calibration import ImageBatches
from .slim import Correction, Keep, slim

SLIM_DINOV2 = {
    "AutoConfig": "configuration_slim_dinov2.SlimDinov2Config",
    "AutoModel": "modeling_slim_dinov2.SlimDinov2Model",
    "AutoBackbone": "modeling_slim_dinov2.SlimDinov2Backbone",
    "AutoModelForImageClassification": "modeling_slim_dinov2.SlimDinov2ForImageClassification",
}


def slim_folder(
    source: str | Path,
    output: str | Path,
    width_multiplier: float,
    *,
    keep: Keep = "first",
    correction: Correction | None = None,
    images: str | Path | None = None,
    max_images: int = 256,
    modality: str | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """Read a model folder (or Hub id), slim the model and write a folder that loads in the same ways.

    Args:
        source: Folder of one of our models or of a stock ViT, ViTMAE encoder, DINOv2 or DINOv3.
        output: Folder to write; another than `source`.
        width_multiplier, keep, correction, seed: See `slim`.
        images: Folder of unlabelled images, for corrections and importance.
        max_images: How many of them at most are read, drawn at random.
        modality: Sensor of the images, for RS-vHeat.

    Returns:
        The slimmed model.

    Raises:
        ConfigurationError: If the model cannot be slimmed like this, or images are needed and not given.
    """
    register()
    source, output = str(source), Path(output)
    if output.resolve() == Path(source).resolve():
        raise ConfigurationError(f"{output} is the folder of the full model: give another one for the slimmed model.")
    model, processor = load_model(source)
    batches = None
    if images is not None:
        batches = calibration_batches(model, processor, images, max_images, modality, seed)
    small = slim(model, width_multiplier, keep=keep, correction=correction, calibration=batches, seed=seed)
    save(small, processor, output, source_name=Path(source).name)
    return small


def load_model(source: str | Path) -> tuple[PreTrainedModel, Any]:
    """The model of a folder or Hub id in the class its config names, and its image processor (or None).

    Raises:
        ConfigurationError: If neither this package nor transformers has that class.
    """
    config = AutoConfig.from_pretrained(source)
    name = (config.architectures or ["nothing"])[0]
    paths = {**AUTO_CLASSES, "slim_dinov2": SLIM_DINOV2}.get(config.model_type, {})
    path = next((path for path in paths.values() if path.split(".")[1] == name), None)
    model_class = our_class(path) if path else getattr(transformers, name, None)
    if model_class is None:
        raise ConfigurationError(f"{source} holds a {name}, which neither this package nor transformers knows.")
    try:
        processor = AutoImageProcessor.from_pretrained(source)
    except OSError:  # weights and config alone can be slimmed too
        processor = None
    return model_class.from_pretrained(source).eval(), processor


def calibration_batches(
    model: PreTrainedModel,
    processor: Any,
    images: str | Path,
    max_images: int,
    modality: str | None = None,
    seed: int = 0,
    batch_size: int = 16,
) -> ImageBatches:
    """Unlabelled images of a folder as model inputs: at most `max_images` of them, drawn at random.

    Raises:
        ConfigurationError: If there is no image processor, or the model has no such modality.
        DataError: If the folder holds no images.
    """
    from ..evaluation.features import load_extractor

    paths = [Path(images) / path for path in image_paths(Path(images))]
    chosen = random.Random(seed).sample(paths, min(max_images, len(paths)))
    return ImageBatches(load_extractor(model, processor, modality), chosen, batch_size)


def save(model: PreTrainedModel, processor: Any, output: Path, source_name: str) -> None:
    """Write a slimmed model: as a Hub folder if it is one of ours, as transformers does otherwise."""
    if model.config.model_type in AUTO_CLASSES and processor is not None:
        record = getattr(getattr(model.config, "backbone_config", None) or model.config, "slim", {})
        context = {
            "source": f"`{source_name}` slimmed to width {record['width_multiplier']:g} (arXiv 2601.22841)",
            "model_name": output.resolve().name,
        }
        export(model, processor, output, card_context=context, provenance={"slim": record})
        return
    model.save_pretrained(output)
    if processor is not None:
        processor.save_pretrained(output)
    if model.config.model_type == "slim_dinov2":
        for name in ("configuration_slim_dinov2.py", "modeling_slim_dinov2.py"):
            shutil.copyfile(MODELS_FOLDER / name, output / name)
        path = output / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": SLIM_DINOV2}, indent=2, sort_keys=True))
