"""Write a folder that loads anywhere with `trust_remote_code=True`, also where this package is not installed."""

import importlib
import json
import shutil
from pathlib import Path

from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.image_processing_utils import BaseImageProcessor

from hf_rsheat import models
from hf_rsheat.errors import ConfigurationError
from hf_rsheat.hub.card import write_card
from hf_rsheat.hub.inference import write_handler
from hf_rsheat.hub.records import MANIFEST, write_manifest, write_provenance, write_reference

# The full map: AutoModel has to work on a classifier's folder too, which save_pretrained alone would not write.
AUTO_CLASSES = {
    "vheat": {
        "AutoConfig": "configuration_vheat.VHeatConfig",
        "AutoModel": "modeling_vheat.VHeatModel",
        "AutoBackbone": "modeling_vheat.VHeatBackbone",
        "AutoModelForImageClassification": "modeling_vheat.VHeatForImageClassification",
    },
    "rs_vheat": {
        "AutoConfig": "configuration_rs_vheat.RSVHeatConfig",
        "AutoModel": "modeling_rs_vheat.RSVHeatModel",
        "AutoBackbone": "modeling_rs_vheat.RSVHeatBackbone",
        "AutoModelForImageClassification": "modeling_rs_vheat.RSVHeatForImageClassification",
        "AutoModelForPreTraining": "modeling_rs_vheat.RSVHeatForPreTraining",
    },
    "selective_mae": {
        "AutoConfig": "configuration_selective_mae.SelectiveMAEConfig",
        "AutoModel": "modeling_selective_mae.SelectiveMAEModel",
        "AutoBackbone": "modeling_selective_mae.SelectiveMAEBackbone",
        "AutoModelForImageClassification": "modeling_selective_mae.SelectiveMAEForImageClassification",
        "AutoModelForPreTraining": "modeling_selective_mae.SelectiveMAEForPreTraining",
    },
    "rs4d": {
        "AutoConfig": "configuration_rs4d.RS4DConfig",
        "AutoModel": "modeling_rs4d.RS4DModel",
        "AutoBackbone": "modeling_rs4d.RS4DBackbone",
        "AutoModelForImageClassification": "modeling_rs4d.RS4DForImageClassification",
        "AutoModelForPreTraining": "modeling_rs4d_distillation.RS4DForDistillation",
    },
    "rs4d_instances": {
        "AutoConfig": "configuration_rs4d_instances.RS4DInstanceConfig",
        "AutoModelForInstanceSegmentation": "modeling_rs4d_instances.RS4DForInstanceSegmentation",
        "AutoModelForImageSegmentation": "modeling_rs4d_instances.RS4DForInstanceSegmentation",  # pipelines ask for it
    },
    "heat_upernet": {
        "AutoConfig": "configuration_heat_upernet.HeatUperNetConfig",
        "AutoModelForSemanticSegmentation": "modeling_heat_upernet.HeatUperNetForSemanticSegmentation",
    },
}
# Both backends: transformers takes the PIL twin where torchvision is not installed.
PROCESSOR_CLASSES = {
    "VHeatImageProcessor": {
        "torchvision": "image_processing_vheat.VHeatImageProcessor",
        "pil": "image_processing_pil_vheat.VHeatImageProcessorPil",
    },
    "RSVHeatImageProcessor": {
        "torchvision": "image_processing_rs_vheat.RSVHeatImageProcessor",
        "pil": "image_processing_pil_rs_vheat.RSVHeatImageProcessorPil",
    },
    "SelectiveMAEImageProcessor": {
        "torchvision": "image_processing_selective_mae.SelectiveMAEImageProcessor",
        "pil": "image_processing_pil_selective_mae.SelectiveMAEImageProcessorPil",
    },
    "RS4DImageProcessor": {
        "torchvision": "image_processing_rs4d.RS4DImageProcessor",
        "pil": "image_processing_pil_rs4d.RS4DImageProcessorPil",
    },
}
MODELS_FOLDER = Path(models.__file__).parent


def export(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    folder: str | Path,
    *,
    card_context: dict | None = None,
    provenance: dict | None = None,
    max_shard_size: str = "50GB",
) -> Path:
    """Write a Hub-ready folder.

    Args:
        model: One of this package's models.
        processor: The image processor that belongs to it.
        folder: Created if need be; files of an earlier export are overwritten.
        card_context: Facts for the card: `dataset`, `recipe` (dict), `license` of the weights, `model_name`, `repo_id`.
        provenance: Further facts for `provenance.json`, e.g. a converter's account of every tensor.
        max_shard_size: Split larger weights into several files.

    Returns:
        The folder, holding `config.json` with the full `auto_map`, `model.safetensors`, `preprocessor_config.json`,
        the Python files the model needs, `handler.py` and `requirements.txt` for Inference Endpoints, `README.md`, and
        what `hf_rsheat.hub.verify` checks: `provenance.json`, `reference.safetensors` and `manifest.json`.

    Raises:
        ConfigurationError: If the model or the processor is not one of ours, or the folder is a file.
    """
    folder = Path(folder)
    auto_map = AUTO_CLASSES.get(model.config.model_type)
    if auto_map is None:
        raise ConfigurationError(
            f"Cannot export a {model.config.model_type!r} model: the exporter knows {', '.join(AUTO_CLASSES)}. "
            "For UPerNet over a heat backbone use HeatUperNetForSemanticSegmentation."
        )
    backends = PROCESSOR_CLASSES.get(type(processor).__name__.removesuffix("Pil"))
    if backends is None:
        raise ConfigurationError(
            f"Cannot export a {type(processor).__name__}: pass one of {', '.join(PROCESSOR_CLASSES)}."
        )
    if folder.is_file():
        raise ConfigurationError(f"{folder} is a file; give a folder to export to.")
    folder.mkdir(parents=True, exist_ok=True)
    _remove_previous(folder)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    processor.save_pretrained(folder)
    _update_json(folder / "config.json", {"auto_map": auto_map})
    _update_json(folder / "preprocessor_config.json", {"auto_map": {"AutoImageProcessor": backends}})
    for source in _needed_files({*auto_map.values(), *backends.values()}):
        shutil.copyfile(source, folder / source.name)
    write_handler(folder)
    write_provenance(folder, {**(card_context or {}), **(provenance or {})})
    write_reference(model, folder)
    finish(folder)
    return folder


def finish(folder: Path) -> None:
    """Write the card and the manifest anew, after anything in an exported folder was added or changed on purpose."""
    write_card(folder)
    write_manifest(folder)


def model_class_of(folder: str | Path) -> type[PreTrainedModel]:
    """Our class that a folder's config names.

    Raises:
        ConfigurationError: If the folder holds no model of ours.
    """
    config = _read_json(Path(folder) / "config.json")
    architecture = (config.get("architectures") or [None])[0]
    paths = AUTO_CLASSES.get(config.get("model_type", ""), {}).values()
    path = next((path for path in paths if path.split(".")[1] == architecture), None)
    if path is None:
        name = architecture or config.get("model_type")
        raise ConfigurationError(f"{folder} holds a {name!r}, which is not one of this package's models.")
    return our_class(path)


def load_folder(folder: str | Path) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Load the model, in the class its config names, and the image processor of a checkpoint or Hub folder.

    Only our own classes are used, never code from the folder.

    Raises:
        ConfigurationError: If the folder holds no model or no image processor of ours.
    """
    folder = Path(folder)
    model_class = model_class_of(folder)
    processor_type = _read_json(folder / "preprocessor_config.json").get("image_processor_type", "")
    backends = PROCESSOR_CLASSES.get(processor_type.removesuffix("Pil"))
    if backends is None:
        raise ConfigurationError(f"{folder} holds a {processor_type!r}, which is not one of this package's processors.")
    return model_class.from_pretrained(folder), our_class(backends["torchvision"]).from_pretrained(folder)


def our_class(path: str):
    """The class behind `module.Class` in `hf_rsheat.models`."""
    module, name = path.split(".")
    return getattr(importlib.import_module(f"hf_rsheat.models.{module}"), name)


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise ConfigurationError(f"{path.parent} holds no {path.name}; give a folder written by training or by export.")
    return json.loads(path.read_text(encoding="utf-8"))


def export_folder(source: str | Path, folder: str | Path) -> Path:
    """Export a checkpoint folder (as training or `save_pretrained` writes it) to a Hub-ready one."""
    model, processor = load_folder(source)
    return export(model, processor, folder)


def _remove_previous(folder: Path) -> None:
    """Remove what an earlier export wrote and this one may not: other shards, other code."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return
    for name in json.loads(manifest.read_text(encoding="utf-8")).get("files", {}):
        if Path(name).name == name:
            (folder / name).unlink(missing_ok=True)
    manifest.unlink()


def _needed_files(class_paths: set[str]) -> list[Path]:
    entries = {MODELS_FOLDER / f"{path.split('.')[0]}.py" for path in class_paths}
    needed = {Path(file) for entry in entries for file in get_relative_import_files(entry)}
    return sorted(entries | needed)


def _update_json(path: Path, values: dict) -> None:
    content = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
