"""Write a folder for a model of transformers itself, which needs no code of ours."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, ViTImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

from hf_rsheat.errors import ConfigurationError
from hf_rsheat.hub.records import write_provenance

_CARD = """---
{data}
---

# {class_name}, converted

- Source of the weights: `{file}` (SHA-256 `{sha256}`); every tensor's way is in `provenance.json`.
- Loads with `transformers` alone: `{class_name}.from_pretrained(...)`.
- Licence of the weights: not stated by their authors. Ask them before redistributing this folder.
- No accuracy is stated here because none was measured on this folder.
"""


def export_stock(model: PreTrainedModel, folder: str | Path, provenance: dict[str, Any]) -> Path:
    """Save a ViT or ViT-MAE of transformers with its image processor, a short card and provenance.json.

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
    _mend_decoder_names(folder / "model.safetensors")
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
    card = _CARD.format(data=data.to_yaml(), class_name=class_name, **provenance["source"])
    write_provenance(folder, provenance)
    ModelCard(card).save(folder / "README.md")
    return folder


def _mend_decoder_names(weights: Path) -> None:
    """Give a saved ViT-MAE decoder the names under which all versions of transformers look for it.

    transformers 5.20 to 5.23 saves models under their older names, so that older versions can read them, but gets
    those of this decoder's layers wrong (it reads them back by the same rule).
    """
    if not weights.is_file():
        return
    state = load_file(weights)
    wrong, right = "decoder.decoder_encoder.layer.", "decoder.decoder_layers."
    if any(name.startswith(wrong) for name in state):
        save_file({name.replace(wrong, right): value for name, value in state.items()}, weights, {"format": "pt"})
