"""`hf-rsheat bench instances`: whole detectors of instances beside each other, in time and memory.

With random weights, scores and overlaps are accidental, and with them how many boxes survive. So nothing may be left to
them: two-stage detectors keep every proposal and detection up to the published numbers (thresholds of scores at 0, of
overlaps at 1), which is as much work as a crowded image makes; detectors with queries always return all. Every
contestant has the same classes. What is measured ends with masks as the network makes them: pasting them into the
image, which all need, is left out.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import BenchmarkError, ConfigurationError, did_you_mean
from .macs import count_macs_of_pass
from .measure import conditions, in_fresh_process, load, peak_memory, summary, take_turns

CLASSES = 10  # of NWPU VHR-10
PROPOSALS, DETECTIONS = 1000, 100  # of two-stage detectors, as published


class Detector(nn.Module):
    """A detector from images to its mask tensors, one per image.

    Args:
        model: Takes what `prepare` makes of images.
        masks: From the model's output to the masks of every image, `(objects, height, width)` or more dimensions.
        objects: How many of them each image has to have.
        prepare: From images `(batch, 3, height, width)` to the model's input.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Callable[[Any], Sequence[torch.Tensor]],
        objects: int,
        prepare: Callable[[torch.Tensor], Any] = lambda images: images,
    ) -> None:
        super().__init__()
        self.model, self.masks, self.objects, self.prepare = model, masks, objects, prepare

    def forward(self, images: torch.Tensor) -> Sequence[torch.Tensor]:
        """Images to masks.

        Raises:
            BenchmarkError: An image has another number of objects than it has to have.
        """
        masks = self.masks(self.model(self.prepare(images)))
        found = [len(mask) for mask in masks]
        if found != [self.objects] * len(images):
            raise BenchmarkError(f"{self.objects} objects per image were to be found, not {found}: times mean nothing.")
        return masks


def _rs4d(head: str, image_size: int) -> Detector:
    from ..models.configuration_rs4d_instances import RS4DInstanceConfig
    from ..models.modeling_rs4d_instances import RS4DForInstanceSegmentation

    fields: dict[str, Any] = {
        "backbone_config": {"model_type": "rs4d", "image_size": image_size},
        "num_labels": CLASSES,
        "rpn_max_per_img": PROPOSALS,
        "max_per_img": DETECTIONS,
        "score_threshold": 0.0,
        "rpn_nms_threshold": 1.0,
        "nms_threshold": 1.0,
    }
    model = RS4DForInstanceSegmentation(RS4DInstanceConfig(head=head, **fields))
    return Detector(model, lambda output: output.pred_masks, DETECTIONS)


def _mask_rcnn(image_size: int) -> Detector:
    from torchvision.models.detection import maskrcnn_resnet50_fpn_v2

    model = maskrcnn_resnet50_fpn_v2(
        weights=None,
        weights_backbone=None,
        num_classes=CLASSES + 1,
        min_size=image_size,
        max_size=image_size,
        rpn_post_nms_top_n_test=PROPOSALS,
        rpn_nms_thresh=1.0,
        box_score_thresh=0.0,
        box_nms_thresh=1.0,
        box_detections_per_img=DETECTIONS,
    )
    model.transform.postprocess = lambda result, *_: result  # would paste the masks
    return Detector(model, lambda output: [found["masks"] for found in output], DETECTIONS, list)


def _mask2former(image_size: int) -> Detector:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    swin: dict[str, Any] = {"depths": [2, 2, 6, 2], "out_features": [f"stage{i}" for i in range(1, 5)]}
    fields: dict[str, Any] = {"num_labels": CLASSES}
    config = Mask2FormerConfig(backbone_config=SwinConfig(image_size=image_size, **swin), **fields)
    model = Mask2FormerForUniversalSegmentation(config)
    return Detector(model, lambda output: output.masks_queries_logits, config.num_queries)


def _rf_detr(image_size: int) -> Detector:
    try:
        from transformers import RfDetrConfig, RfDetrForInstanceSegmentation
    except ImportError as error:
        raise ConfigurationError(
            "RF-DETR's segmentation is part of transformers since 5.23: `pip install -U transformers`."
        ) from error
    # The published settings of RF-DETR-Seg Medium. Its windows need sides that are multiples of 24.
    patch_size, windows = 12, 2
    padding = -image_size % (patch_size * windows)
    backbone: dict[str, Any] = {
        "model_type": "rf_detr_dinov2",
        "image_size": image_size + padding,
        "patch_size": patch_size,
        "num_windows": windows,
        "hidden_size": 384,
        "num_attention_heads": 6,
        "out_features": ["stage3", "stage6", "stage9", "stage12"],
    }
    fields: dict[str, Any] = {"decoder_layers": 5, "decoder_n_points": 2, "num_queries": 200, "num_labels": CLASSES}
    config = RfDetrConfig(backbone_config=backbone, **fields)
    model = RfDetrForInstanceSegmentation(config)
    return Detector(
        model, lambda output: output.pred_masks, config.num_queries, lambda x: F.pad(x, (0, padding, 0, padding))
    )


_BUILDERS: dict[str, Callable[[int], Detector]] = {
    "rs4d-base-bbox": lambda size: _rs4d("bbox", size),
    "rs4d-base-prompt": lambda size: _rs4d("prompt", size),
    "maskrcnn-resnet50-v2": _mask_rcnn,
    "mask2former-swin-tiny": _mask2former,
    "rf-detr-seg-medium": _rf_detr,
}


def names() -> list[str]:
    """All contestants."""
    return sorted(_BUILDERS)


def build(name: str, image_size: int) -> Detector:
    """A contestant in eval mode, with random weights.

    Args:
        name: One of [`names`].
        image_size: Side of the images in pixels.

    Raises:
        ConfigurationError: There is none of this name, or it needs another version of transformers.
    """
    if name not in _BUILDERS:
        raise ConfigurationError(f"Unknown detector '{name}': {did_you_mean(name, list(_BUILDERS))}")
    torch.manual_seed(0)
    return _BUILDERS[name](image_size).eval().requires_grad_(False)  # counting asks for gradients that are not there


@dataclass(frozen=True)
class InstanceRun:
    """One contest, in float32.

    Attributes:
        image_size: Side of the images in pixels.
        batch: Images at once.
        threads: Threads of PyTorch.
        device: "cpu" or "cuda".
    """

    image_size: int
    batch: int = 1
    threads: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("image_size", "batch", "threads"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"`{name}` must be positive, got {getattr(self, name)}.")

    def images(self) -> torch.Tensor:
        """`(batch, 3, image_size, image_size)`, normal noise."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.batch, 3, self.image_size, self.image_size, generator=generator).to(self.device)

    def detector(self, name: str) -> Detector:
        """A contestant on the device."""
        return build(name, self.image_size).to(self.device)


def bench_instances(
    models: Sequence[str],
    sizes: Sequence[int],
    batches: Sequence[int] = (1,),
    *,
    repeats: int = 3,
    memory: bool = True,
    threads: int = 1,
    device: str = "cpu",
) -> dict[str, Any]:
    """Every detector at every size and batch.

    Args:
        models: Of [`names`]; ratios are to the first.
        sizes: Sides of the images in pixels.
        batches: Images at once.
        repeats: Timed rounds, after one that is not timed.
        memory: Whether to measure memory as well, one process per contestant.
        threads, device: See [`InstanceRun`].

    Returns:
        As [`backbone.bench_backbone`] does; `macs` are those of a real pass, without RoIAlign. Also `notes`.
    """
    if repeats < 1 or not models or not sizes or not batches:
        raise ConfigurationError("A benchmark needs at least one model, size, batch and round.")
    torch.set_num_threads(threads)
    kept = f"{PROPOSALS} proposals and {DETECTIONS} detections of {CLASSES} classes an image, whatever their scores"
    notes = [f"two-stage detectors keep {kept}; masks as the network makes them, not pasted into the image"]
    result: dict[str, Any] = {"conditions": conditions(), "repeats": repeats, "notes": notes, "runs": []}
    for size in sizes:
        for batch in batches:
            run = InstanceRun(size, batch, threads, device)
            rows = _contest(list(models), run, repeats)
            if memory:
                for name, row in rows.items():
                    row |= in_fresh_process("hf_rsheat.benchmarks.instances", [name, asdict(run)])
            settings = {**asdict(run), "dtype": "float32", "compiled": False, "train": False}
            result["runs"].append({**settings, "models": rows})
    result["load_after"] = load()
    return result


def _contest(models: list[str], run: InstanceRun, repeats: int) -> dict[str, dict[str, float]]:
    images = run.images()
    detectors = {name: run.detector(name) for name in models}
    counted = {
        name: {
            "parameters": sum(p.numel() for p in detector.parameters()),
            "macs": count_macs_of_pass(detector, images),
            "objects": detector.objects,
        }
        for name, detector in detectors.items()
    }
    steps = {name: _step(detector, images) for name, detector in detectors.items()}
    rows = summary(take_turns(steps, repeats, warmup=0, device=run.device))  # counting was a pass, too
    return {name: {**row, **counted[name]} for name, row in rows.items()}


def _step(detector: Detector, images: torch.Tensor) -> Callable[[], Any]:
    def infer() -> Any:
        with torch.inference_mode():
            return detector(images)

    return infer


def measure_memory(name: str, run: InstanceRun) -> dict[str, float]:
    """Peak memory of one pass; only meaningful in a fresh process."""
    torch.set_num_threads(run.threads)
    return peak_memory(_step(run.detector(name), run.images()), run.device)


if __name__ == "__main__":
    _name, _run = json.loads(sys.argv[1])
    print(json.dumps(measure_memory(_name, InstanceRun(**_run))))
