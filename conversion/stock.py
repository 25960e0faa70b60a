"""Write a folder for a model of transformers itself, which needs no code of ours."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel, ViTImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

from hf_rsheat.errors import ConfigurationError

_CARD = """---
{data}
---

# {class_name}, converted

- Source of the weights: {source}
- Loads with `transformers` alone: `{class_name}.from_pretrained(...)`.
- Licence of the weights: not stated by their authors. Ask them before redistributing this folder.
- No accuracy is stated here because none was measured on this folder.
"""


def export_stock(model: PreTrainedModel, folder: str | Path, source: str) -> Path:
    """Save a ViT or ViT-MAE of transformers with its image processor and a short card.

    Raises:
        ConfigurationError: The folder is a file, or the model does not take 3 channels (the stock processor does).
    """
    folder = Path(folder)
    if folder.is_file():
        raise ConfigurationError(f"{folder} is a file; give a folder to write.")
    if model.config.num_channels != 3:
        raise ConfigurationError(
            f"transformers' ViT image processor takes RGB, this model has {model.config.num_channels} channels: "
            "convert it to selective_mae, whose processor takes any number of bands."
        )
    size = model.config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    ViTImageProcessor(
        size={"height": height, "width": width},
        resample=PILImageResampling.BICUBIC,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    ).save_pretrained(folder)
    class_name = type(model).__name__
    data = ModelCardData(
        library_name="transformers", tags=["remote-sensing", "earth-observation", "masked-autoencoder"]
    )
    card = _CARD.format(data=data.to_yaml(), class_name=class_name, source=source)
    ModelCard(card).save(folder / "README.md")
    return folder
