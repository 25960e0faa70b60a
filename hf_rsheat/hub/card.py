"""Model cards: one template per family in `model_cards/`, filled from the folder itself and never by hand."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader
from jinja2.sandbox import SandboxedEnvironment
from PIL import Image
from safetensors import safe_open

from hf_rsheat import model_cards
from hf_rsheat.errors import ConfigurationError
from hf_rsheat.hub.records import PROVENANCE, weights_digest

TASKS = {
    "ForImageClassification": "image-classification",
    "ForSemanticSegmentation": "image-segmentation",
    "ForInstanceSegmentation": "image-segmentation",
}
HUB_TASKS = {"image-classification", "image-feature-extraction", "image-segmentation"}
# Licence identifiers of the Hub that our cards use; "unknown" is the Hub's own word for terms nobody stated.
HUB_LICENSES = {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-sa-4.0", "other", "unknown"}
EVALUATIONS = "evaluation"
PICTURE = "picture.png"


def write_card(folder: Path) -> None:
    """Render `README.md` from the folder: config, processor, weights, `provenance.json`, `evaluation/*.json`, picture.

    What is not recorded there is said to be unknown; nothing is guessed.

    Raises:
        ConfigurationError: If an evaluation belongs to other weights, or the metadata is not what the Hub accepts.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    processor = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    provenance = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    evaluations = _evaluations(folder)
    class_name, family = config["architectures"][0], config["model_type"]
    backbone = config.get("backbone_config", config)
    repo_id = provenance.get("repo_id") or folder.name
    name = provenance.get("model_name") or repo_id
    data = _metadata(class_name, family, provenance, processor, evaluations, name)
    validate_metadata(data.to_dict())
    text = (
        _templates()
        .get_template(f"{family}.md")
        .render(
            card_data=data.to_yaml(),
            class_name=class_name,
            auto_class=_auto_class(class_name),
            task=data.pipeline_tag,
            parameters=_count_parameters(folder),
            weights_sha256=weights_digest(folder),
            config=config,
            backbone=backbone,
            statistics=processor_statistics(processor),
            repo_id=repo_id,
            model_name=name,
            provenance=provenance,
            evaluations=evaluations,
            published=PUBLISHED.get(family, {}).get(_size(backbone)),
            picture=PICTURE if (folder / PICTURE).is_file() else None,
        )
    )
    ModelCard(re.sub(r"\n{3,}", "\n\n", text)).save(folder / "README.md")


def _templates() -> Environment:
    # Templates are ours; what goes into them (names, labels, notes of a checkpoint) is data and never rendered.
    return SandboxedEnvironment(loader=FileSystemLoader(Path(model_cards.__file__).parent))


def processor_statistics(processor: dict[str, Any]) -> dict[str, Any]:
    """Statistics per sensor as a card states them and `verify` compares them, from `preprocessor_config.json`."""
    if processor.get("modalities"):
        return {name: dict(options) for name, options in sorted(processor["modalities"].items())}
    return {"image": {name: processor[name] for name in ("image_mean", "image_std", "rescale_factor")}}


def add_evaluation(folder: Path, result_file: Path) -> None:
    """Copy a result of `hf-rsheat evaluate` into the folder; the next `write_card` shows it.

    Raises:
        ConfigurationError: If the file is no such result, or was measured on other weights.
    """
    try:
        result = json.loads(result_file.read_text(encoding="utf-8"))
        digest, name = result["model"]["weights_sha256"], f"{result['dataset']['name']}-{result['task']}.json"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"{result_file} was not written by `hf-rsheat evaluate`: {error}.") from error
    if digest != weights_digest(folder):
        raise ConfigurationError(f"{result_file} was measured on other weights than those in {folder}.")
    (folder / EVALUATIONS).mkdir(exist_ok=True)
    shutil.copyfile(result_file, folder / EVALUATIONS / "".join(c if c.isalnum() or c in "-_." else "-" for c in name))


def add_picture(folder: Path, image_file: Path) -> None:
    """Draw what a pretraining model does with an image into the folder; the next `write_card` shows it.

    Raises:
        ConfigurationError: If the model has no reconstruction to draw, or the image cannot be read.
    """
    from hf_rsheat.figures import pretraining_figure  # needs the extra `viz`
    from hf_rsheat.hub.export import load_folder
    from hf_rsheat.patch_figures import reconstruction_figure

    figures = {"RSVHeatForPreTraining": pretraining_figure, "SelectiveMAEForPreTraining": reconstruction_figure}
    model, processor = load_folder(folder)
    figure = figures.get(type(model).__name__)
    if figure is None:
        raise ConfigurationError(
            f"{folder} holds a {type(model).__name__}: only {' and '.join(figures)} have a picture."
        )
    try:
        with Image.open(image_file) as image:
            figure(model, processor, image, folder / PICTURE)
    except OSError as error:
        raise ConfigurationError(f"{image_file} cannot be read as an image: {error}.") from error


def validate_metadata(data: dict[str, Any]) -> None:
    """Check a card's metadata offline for what the Hub would refuse.

    Raises:
        ConfigurationError: Naming the field.
    """
    if data.get("pipeline_tag") not in HUB_TASKS:
        raise ConfigurationError(f"pipeline_tag {data.get('pipeline_tag')!r} is none of {sorted(HUB_TASKS)}.")
    if data.get("license", "unknown") not in HUB_LICENSES:
        raise ConfigurationError(f"license {data['license']!r} is none of {sorted(HUB_LICENSES)}.")
    if data.get("license") == "other" and not data.get("license_name"):
        raise ConfigurationError("license 'other' needs a license_name.")
    if not all(isinstance(tag, str) and tag for tag in data.get("tags", [])):
        raise ConfigurationError("tags must be non-empty strings.")
    for entry in data.get("model-index", []):
        for result in entry["results"]:
            for metric in result["metrics"]:
                if not isinstance(metric["value"], int | float) or not math.isfinite(metric["value"]):
                    raise ConfigurationError(f"metric {metric['type']} of the model index is not a finite number.")


# Numbers of the papers for exactly these sizes; a card shows them apart from what was measured on its weights.
PUBLISHED: dict[str, dict[tuple, str]] = {
    "vheat": {
        ((96, 192, 384, 768), (2, 2, 6, 2)): "ImageNet-1K top-1 82.2 % (authors' README, arXiv 2405.16555)",
        ((96, 192, 384, 768), (2, 2, 18, 2)): "ImageNet-1K top-1 83.6 % (authors' README, arXiv 2405.16555)",
        ((128, 256, 512, 1024), (2, 2, 18, 2)): "ImageNet-1K top-1 83.9 % (authors' README, arXiv 2405.16555)",
    },
}


def _size(config: dict[str, Any]) -> tuple:
    return tuple(config.get("hidden_sizes", ())), tuple(config.get("depths", ()))


def _metadata(
    class_name: str, family: str, provenance: dict, processor: dict, evaluations: list[dict], name: str
) -> ModelCardData:
    task = next((task for suffix, task in TASKS.items() if class_name.endswith(suffix)), "image-feature-extraction")
    results = [
        EvalResult(
            task_type="image-segmentation" if result["task"] == "instances" else "image-classification",
            task_name=f"{result['task']} ({result['protocol']})",
            dataset_name=result["dataset"]["name"],
            dataset_type=result["dataset"]["name"],
            metric_type=metric,
            metric_value=round(score["value"], 4),
        )
        for result in evaluations
        for metric, score in result["metrics"].items()
    ]
    license_ = provenance.get("license") or ("unknown" if "converter" in provenance else None)
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        license=license_,
        model_name=name if results else None,
        eval_results=results or None,
        preprocessing=processor_statistics(processor),
        tags=["remote-sensing", "earth-observation", *(["heat-conduction"] if "heat" in family else []), family],
    )


def _evaluations(folder: Path) -> list[dict[str, Any]]:
    results = []
    for path in sorted((folder / EVALUATIONS).glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["model"]["weights_sha256"] != weights_digest(folder):
            raise ConfigurationError(f"{path} was measured on other weights: delete it or evaluate again.")
        results.append(result)
    return results


def _count_parameters(folder: Path) -> int:
    total = 0
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total


def _auto_class(class_name: str) -> str:
    if class_name.endswith("Backbone"):
        return "AutoBackbone"
    if class_name.endswith("ForDistillation"):
        return "AutoModelForPreTraining"
    for suffix in (*TASKS, "ForPreTraining"):
        if class_name.endswith(suffix):
            return f"AutoModel{suffix}"
    return "AutoModel"
