"""Run an instance segmentation model over the images of a COCO file."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from ..errors import DataError
from ..training.coco import CocoData, CocoImage


@torch.inference_mode()
def detect(
    model: Any,
    processor: Any,
    data: CocoData,
    batch_size: int = 4,
    *,
    threshold: float = 0.0,
    share: slice = slice(None),
    title: str | None = None,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Find the objects of every image.

    Args:
        model: An `RS4DForInstanceSegmentation`; left in the mode it came in.
        processor: Its image processor.
        data: The images.
        batch_size: Images per forward pass.
        threshold: Detections need at least this score (and the model's own).
        share: Which of the images, for several processes.
        title: Progress bar, if any.

    Returns:
        COCO results: `image_id`, `category_id` (class index), `score`, `bbox` (left, top, width, height in pixels) and
        `segmentation` (run lengths); and the reason for each path that could not be read.
    """
    processor = copy.copy(processor)
    processor.mask_layout = model.config.mask_layout
    was_training = model.training
    model.eval()
    results: list[dict[str, Any]] = []
    unreadable: dict[str, str] = {}
    images = data.images[share]
    starts = range(0, len(images), batch_size)
    for start in tqdm(starts, desc=title, unit="batch", disable=None if title else True):
        ready = list(_readable(data, images[start : start + batch_size], unreadable))
        if ready:
            results += _results(model, processor, ready, threshold)
    model.train(was_training)
    return results, unreadable


def _readable(
    data: CocoData, images: Sequence[CocoImage], unreadable: dict[str, str]
) -> Iterator[tuple[CocoImage, Image.Image]]:
    for image in images:
        try:
            yield image, read_image(data, image)
        except DataError as error:
            unreadable[image.path] = str(error)


def read_image(data: CocoData, image: CocoImage) -> Image.Image:
    """The pixels of an image, RGB.

    Raises:
        DataError: If it cannot be read, or has another size than the COCO file says.
    """
    try:
        with Image.open(data.folder / image.path) as opened:
            picture = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot be read: {error}") from error
    if picture.size != (image.width, image.height):
        size = f"{picture.height}x{picture.width}"
        raise DataError(f"is {size} pixels, the annotations are for {image.height}x{image.width}")
    return picture


def _results(
    model: Any, processor: Any, ready: Sequence[tuple[CocoImage, Image.Image]], threshold: float
) -> list[dict[str, Any]]:
    inputs = processor([picture for _, picture in ready], return_pixel_mask=True, return_tensors="pt").to(model.device)
    outputs = model(**inputs)
    found = processor.post_process_instance_segmentation(
        outputs,
        threshold=threshold,
        mask_threshold=model.config.mask_threshold,
        target_sizes=[(image.height, image.width) for image, _ in ready],
        return_coco_annotation=True,
    )
    return [
        {
            "image_id": image.image_id,
            "category_id": info["label_id"],
            "score": info["score"],
            "bbox": [*info["box"][:2], info["box"][2] - info["box"][0], info["box"][3] - info["box"][1]],
            "segmentation": runs,
        }
        for (image, _), result in zip(ready, found, strict=True)
        for info, runs in zip(result["segments_info"], result["segmentation"], strict=True)
    ]
