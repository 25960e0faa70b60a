"""Instance segmentation from a COCO file: RS4D's detectors (arXiv 2606.25324) over RS4D, vHeat or RS-vHeat."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedModel

from ...errors import ConfigurationError, DataError
from ...evaluation.coco_metrics import average_precision, require_coco
from ...evaluation.detect import detect
from ...models.coco_annotations import read_annotation
from ...models.configuration_rs4d_instances import RS4DInstanceConfig
from ...models.image_checks import ImageFormatError
from ...models.instance_targets import Instances, instance_label, resize_instances
from ..augmentation import ScaleJitter
from ..batching import stack
from ..coco import CocoData, read_coco, same_name
from ..coco_layouts import Split, find_layout
from ..data import Batch
from ..detector_start import build_detector, detector_config, detector_processor
from ..image_folder import DecodedSample, Sample, check_modalities
from ..normalization import mean_image, normalize
from ..recipe import Recipe
from .base import Objective, Terms

MODALITY = "optical"
TERMS = ("loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask")


@strict
@dataclass(kw_only=True)
class InstanceOptions:
    """Options of instance segmentation. Paths of data are relative to the recipe's `image_folder`.

    Args:
        dataset: A known data set (`ssdd`, `whu`, `nwpu`, `generated`): its classes and files; the options below then
            only say what is different in this copy.
        annotations: COCO file to learn from.
        images: Folder that its file names are relative to.
        eval_annotations, eval_images: The same to choose the best checkpoint by, measured whenever one is saved.
        evaluate: False measures nothing and exports the last checkpoint, as where there is nothing to evaluate on.
        eval_batch_size: Images per forward pass there.
        classes: Names in the order of the class indices; those of the COCO file, by their ids, if None.
        scale_range: Smallest and largest scale of the large-scale jitter; 1 fits the image into `image_size`.
        flip: Probability of a mirror image.
        freeze_backbone: Keep the weights of the backbone.
        sam: Folder of a SAM model of transformers whose mask decoder the "prompt" head starts from.
    """

    dataset: str | None = None
    annotations: str | None = None
    images: str | None = None
    eval_annotations: str | None = None
    eval_images: str | None = None
    evaluate: bool = True
    eval_batch_size: int = 4
    classes: tuple[str, ...] | list[str] | None = None
    scale_range: tuple[float | int, float | int] = (0.1, 2.0)
    flip: float | int = 0.5
    freeze_backbone: bool = False
    sam: str | None = None

    def validate_augmentation(self) -> None:
        if not 0 < self.scale_range[0] <= self.scale_range[1]:
            raise ValueError(f"'scale_range' must be low <= high above 0, got {list(self.scale_range)}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"'flip' must be within 0 and 1, got {self.flip}")
        if self.eval_batch_size < 1:
            raise ValueError(f"'eval_batch_size' must be at least 1, got {self.eval_batch_size}")

    def validate_data(self) -> None:
        if self.dataset is None and self.annotations is None:
            raise ValueError("name a known 'dataset' or the COCO file in 'annotations'")

    @property
    def known_classes(self) -> tuple[str, ...] | None:
        """Classes in their order, where the options say them."""
        if self.classes is not None:
            return tuple(self.classes)
        return None if self.dataset is None else find_layout(self.dataset).classes

    def train_split(self) -> Split:
        """Where the objects to learn from lie."""
        known = Split("", "") if self.dataset is None else find_layout(self.dataset).train
        return Split(self.annotations or known.annotations, known.images if self.images is None else self.images)

    def eval_split(self) -> Split | None:
        """Where the objects to evaluate on lie; None where there are none."""
        known = Split("", "") if self.dataset is None else find_layout(self.dataset).test
        annotations = self.eval_annotations or known.annotations
        if not self.evaluate or not annotations:
            return None
        return Split(annotations, known.images if self.eval_images is None else self.eval_images)


class InstanceSegmentation(Objective):
    """Boxes, classes and masks. Terms: those of the model's `loss_dict`, all with weight 1.

    The model's losses are means over the anchors and regions sampled in a batch, as published. Over several processes
    or accumulation parts they are averaged with the number of images as weights. That is not to the last digit the mean
    over all regions, as the batch norms of the neck, too, see one part at a time: the result depends on the size of the
    parts, as it does in every detector of this kind.
    """

    Options = InstanceOptions
    best_by = "mask_ap"

    def __init__(self, recipe: Recipe, checkpoint: Path | None = None) -> None:
        super().__init__(recipe, checkpoint)
        require_coco()
        self.config: RS4DInstanceConfig = detector_config(recipe, checkpoint)
        self._channels = int(getattr(self.config.backbone_config, "num_channels", 3))
        check_modalities({MODALITY: self._channels})
        self._data = self._read(self.options.train_split(), self.options.known_classes)
        self.data_digest = hashlib.sha256(repr(self._data.images).encode()).hexdigest()
        self._name_classes(list(self._data.classes))
        self.processor = detector_processor(self.config, recipe, checkpoint, MODALITY)
        below = os.path.relpath(self._data.folder, recipe.image_folder)
        # The label is the sample's index, by which `prepare` finds the objects of the image.
        self.samples = [
            Sample(((MODALITY, PurePath(below, image.path).as_posix()),), label=index)
            for index, image in enumerate(self._data.images)
        ]
        split = self.options.eval_split()
        self._evaluation = None if split is None else self._read(split, self._data.classes)
        # Made now, so that an outline that cannot be used is not found out after hours of training.
        self._truth = None if self._evaluation is None else self._evaluation.as_coco()

    def _read(self, split: Split, classes: Sequence[str] | None) -> CocoData:
        root = Path(self.recipe.image_folder)
        return read_coco(root / split.annotations, root / split.images, classes)

    def _name_classes(self, classes: list[str]) -> None:
        stored = [same_name(str(name)) for _, name in sorted(dict(self.config.id2label or {}).items())]
        if self.checkpoint is not None and stored != [same_name(name) for name in classes]:
            raise ConfigurationError(
                "The checkpoint was trained on other classes than the COCO file has: "
                "start a new run from it with model=FOLDER instead of resuming."
            )
        self.config.id2label = dict(enumerate(classes))
        self.config.label2id = {name: index for index, name in enumerate(classes)}

    def build_model(self) -> PreTrainedModel:
        model = build_detector(self.config, self.recipe, self.checkpoint, self.options.sam)
        if self.options.freeze_backbone:
            model.backbone.requires_grad_(False)
        return model

    def compiled_parts(self, model: Any) -> list[nn.Module]:
        """Backbone and neck; the heads see another number of objects in every batch, and would never stop compiling."""
        return [model.backbone, model.neck]

    def card_context(self, context: dict[str, Any]) -> dict[str, Any]:
        paths = ("annotations", "images", "eval_annotations", "eval_images", "sam")
        options = context["recipe"]["objective_options"]
        shown = {name: Path(value).name if name in paths and value else value for name, value in options.items()}
        return {**context, "recipe": {**context["recipe"], "objective_options": shown}}

    def channels(self, modality: str) -> int:
        return self._channels

    def prepare(self, sample: DecodedSample, rng: np.random.Generator) -> Batch:
        image, listed = sample.images[MODALITY], self._data.images[sample.label or 0]
        height, width = image.shape[-2:]
        if (height, width) != (listed.height, listed.width):
            raise DataError(f"is {height}x{width} pixels, the annotations are for {listed.height}x{listed.width}")
        try:
            instances = read_annotation(listed.annotation, height, width)
        except ImageFormatError as error:
            raise DataError(f"annotations: {error}") from error
        size, options = self.recipe.image_size, self.options
        jitter = ScaleJitter.draw(rng, (height, width), size, options.scale_range, float(options.flip))
        return self._item(*jitter.apply(image, instances))

    def _item(self, view: torch.Tensor, instances: Instances) -> Batch:
        shown, size = (view.shape[-2], view.shape[-1]), self.recipe.image_size
        mask = torch.zeros(size, size, dtype=torch.int64)
        mask[: shown[0], : shown[1]] = 1
        return {
            "pixel_values": normalize(self.processor, view, MODALITY),
            "pixel_mask": mask,
            "labels": instance_label(resize_instances(instances, shown, (size, size))),
        }

    def collate(self, samples: list[Batch]) -> Batch:
        return {
            "pixel_values": stack([sample["pixel_values"] for sample in samples]),
            "pixel_mask": stack([sample["pixel_mask"] for sample in samples]),
            "labels": [sample["labels"] for sample in samples],
        }

    def stand_in(self, group: str) -> Batch:
        size = self.recipe.image_size
        empty = read_annotation({"annotations": []}, size, size)
        return self.collate([self._item(mean_image(self.processor, MODALITY, size), empty)])

    @property
    def term_weights(self) -> dict[str, float]:
        return dict.fromkeys(TERMS, 1.0)

    def counts(self, batch: Batch) -> dict[str, int]:
        return dict.fromkeys(TERMS, len(batch["labels"]))

    def loss(self, model: nn.Module, batch: Batch, step: int) -> Terms:
        images = len(batch["labels"])
        losses = model(**batch).loss_dict  # the model moves the labels to its device
        return {term: (losses[term] * images, images) for term in TERMS}

    def evaluate(
        self, model: PreTrainedModel, share: slice, gather: Callable[[list[Any]], list[Any]]
    ) -> dict[str, float] | None:
        """Box and mask AP on the evaluation images; each process takes its share of them."""
        if self._evaluation is None or self._truth is None:
            return None
        results, unreadable = detect(model, self.processor, self._evaluation, self.options.eval_batch_size, share=share)
        if skipped := gather(list(unreadable)):
            raise DataError(f"{skipped[0]} of the evaluation images cannot be used: repair or remove it.")
        overall, _ = average_precision(self._truth, gather(results))
        return overall
