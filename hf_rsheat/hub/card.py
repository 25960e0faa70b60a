"""Model cards from the templates in `model_cards/`."""

from importlib import resources
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from hf_rsheat.hub.records import processor_statistics

TASKS = {
    "ForImageClassification": "image-classification",
    "ForSemanticSegmentation": "image-segmentation",
}


def write_card(model: PreTrainedModel, processor: BaseImageProcessor, folder: Path, context: dict) -> None:
    """Render `README.md` of an exported folder.

    Args:
        context: Facts that only the caller knows: `dataset`, `recipe`, `source`, `model_name`, `repo_id`. What is not
            given is said to be unknown; nothing is guessed.
    """
    class_name = type(model).__name__
    task = next((task for suffix, task in TASKS.items() if class_name.endswith(suffix)), "image-feature-extraction")
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        preprocessing=processor_statistics(processor),
        tags=["remote-sensing", "earth-observation", "heat-conduction", model.config.model_type],
    )
    template = resources.files("hf_rsheat.model_cards") / f"{model.config.model_type}.md"
    backbone = getattr(model.config, "backbone_config", None) or model.config
    with resources.as_file(template) as path:
        card = ModelCard.from_template(
            data,
            template_path=str(path),
            class_name=class_name,
            auto_class=_auto_class(class_name),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            config=model.config,
            backbone=backbone,
            channels=getattr(backbone, "modalities", None) or {"optical": getattr(backbone, "num_channels", None)},
            processor=processor,
            repo_id=context.get("repo_id") or folder.name,
            model_name=context.get("model_name") or context.get("repo_id") or f"{class_name} ({folder.name})",
            dataset=context.get("dataset"),
            recipe=context.get("recipe"),
            source=context.get("source"),
        )
    card.save(folder / "README.md")


def _auto_class(class_name: str) -> str:
    for suffix in ("ForImageClassification", "ForSemanticSegmentation", "ForPreTraining"):
        if class_name.endswith(suffix):
            return f"AutoModel{suffix}"
    return "AutoModel"
