"""RS4D image processor on PIL, and what its torchvision twin shares: defaults, COCO targets, results of all heads."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.image_processing_base import BatchFeature
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling, SizeDict

from .coco_annotations import mask_to_run_lengths, read_annotation
from .image_checks import ImageFormatError
from .image_processing_heat import HeatImageProcessor, HeatImageProcessorKwargs, HeatPilBackend, pad_to
from .instance_results import Detections, find_mask_layout, segment_map, semantic_segments
from .instance_targets import clip_boxes, instance_label, resize_instances

Sizes = Sequence[tuple[int, int]] | torch.Tensor | None


class RS4DImageProcessorKwargs(HeatImageProcessorKwargs, total=False):
    """Options beyond those of `HeatImageProcessor`.

    Attributes:
        mask_layout: What the masks of a detector cover, `model.config.mask_layout`: "box" or "image". None: follows
            from the size of the masks.
        return_pixel_mask: Also return `pixel_mask` `(batch, height, width)`, 1 on the image and 0 on its padding, at
            which detectors cut their boxes. Other models do not take it.
    """

    mask_layout: str | None
    return_pixel_mask: bool | None


class RS4DPreprocessing(HeatImageProcessor):
    """Fit an image into `size` keeping its aspect ratio, normalise, and pad at the bottom and right with zeros.

    Zero after normalisation is the mean colour. With the defaults: 1024 x 1024, bilinear, values / 255, ImageNet mean
    and std, RGB - the preprocessing of SAM's encoder, too, from which RS4D was distilled.

    Args:
        size: What the model sees: an int or `{"height", "width"}`.
        do_pad: False leaves the images at their fitted sizes, which can then differ.
        pad_size: Pad to this instead of `size`.
        mask_layout, return_pixel_mask: See `RS4DImageProcessorKwargs`.
        do_resize, resample, do_rescale, rescale_factor, do_normalize, image_mean, image_std, do_convert_rgb,
            value_range: See `HeatImageProcessor`. Another number of bands takes `image_mean` and `image_std` of that
            length.
    """

    valid_kwargs = RS4DImageProcessorKwargs

    size = {"height": 1024, "width": 1024}  # noqa: RUF012 - transformers copies class defaults to the instance
    resample = PILImageResampling.BILINEAR
    do_center_crop = False
    do_pad = True
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    mask_layout: str | None = None
    return_pixel_mask = False

    def preprocess(
        self, images: Any, segmentation_maps: Any = None, annotations: Any = None, **kwargs: Any
    ) -> BatchFeature:
        """Turn images, and COCO annotations where there are any, into model input.

        Args:
            images: See `HeatImageProcessor`.
            segmentation_maps: See `HeatImageProcessor`.
            annotations: One dictionary `{"image_id": int, "annotations": [COCO objects]}` per image, as transformers'
                detection models take them: `category_id` is the class index, `bbox` and `segmentation` (polygons or
                run lengths) are in pixels of the image. Crowds and objects without a pixel are left out.
            kwargs: Any option of the processor, for this call only.

        Returns:
            `pixel_values`, and `pixel_mask` if wanted; with annotations also `labels`, one dictionary per image:
            `class_labels` `(objects,)` int64, `boxes` `(objects, 4)` centre x, centre y, width, height as shares of the
            padded input, `masks` `(objects, height, width)` bool, `area` `(objects,)` in pixels of the input, `iscrowd`
            `(objects,)` zeros, `image_id` `(1,)`, `orig_size` and `size` `(2,)` height and width of image and input.

        Raises:
            ImageFormatError: See `HeatImageProcessor`; or the annotations do not fit the images.
            MaskLibraryError: Annotations need the extra `eval`.
        """
        return super().preprocess(images, segmentation_maps, annotations, **kwargs)

    def _annotate(self, batch: BatchFeature, images: list[torch.Tensor], *annotations: Any, **options: Any) -> Any:
        (given,) = annotations
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        fitted = [fitted_size(*size, options["size"]) if options["do_resize"] else size for size in sizes]
        canvases = [(pixels.shape[-2], pixels.shape[-1]) for pixels in batch["pixel_values"]]
        if options["return_pixel_mask"]:
            masks = [_pixel_mask(part, canvas) for part, canvas in zip(fitted, canvases, strict=True)]
            batch.update(BatchFeature({"pixel_mask": masks}, tensor_type=options["return_tensors"]))
        if given is None:
            return batch
        given = [given] if isinstance(given, Mapping) else list(given)
        if "labels" in batch:
            raise ImageFormatError("segmentation_maps and annotations both become `labels`: pass one of them")
        if len(given) != len(images):
            raise ImageFormatError(f"{len(given)} annotations for {len(images)} images: pass one for each")
        labels = [_label(*item) for item in zip(given, sizes, fitted, canvases, strict=True)]
        batch["labels"] = [BatchFeature(label, tensor_type=options["return_tensors"]) for label in labels]
        return batch

    def _fit(self, image: torch.Tensor, **options: Any) -> torch.Tensor:
        if options["do_resize"]:
            height, width = fitted_size(image.shape[-2], image.shape[-1], options["size"])
            options["size"] = SizeDict(height=height, width=width)
        return super()._fit(image, **options)

    def _collate(self, images: list[torch.Tensor], fill: float, **options: Any) -> list[Any]:
        if options["do_pad"]:
            images = pad_to(images, options["pad_size"] or options["size"], fill)
        return super()._collate(images, fill, **{**options, "do_pad": False})

    def _geometry(self, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """(height, width) of the network input, and of the part of it that shows an image of this size."""
        box = SizeDict(**dict(self.size))
        fitted = fitted_size(*size, box) if self.do_resize else size
        if not self.do_pad:
            return fitted, fitted
        canvas = SizeDict(**dict(self.pad_size)) if self.pad_size else box
        return (int(canvas.height or 0), int(canvas.width or 0)), fitted

    def post_process_semantic_segmentation(self, outputs: Any, target_sizes: Sizes = None) -> list[torch.Tensor]:
        """Return the class index of each pixel, int64 `(height, width)`, one map per image; padding is cut off.

        Args:
            outputs: Model output with `logits` `(batch, classes, height, width)` for images padded to `size`.
            target_sizes: (height, width) of each original image; None keeps the size of the logits, padding included.

        Raises:
            ImageFormatError: Not one target size per image.
        """
        if target_sizes is None or not self.do_pad or len(target_sizes) != len(outputs.logits):
            return super().post_process_semantic_segmentation(outputs, target_sizes)
        maps = []
        for logits, (height, width) in zip(outputs.logits, target_sizes, strict=True):
            target = int(height), int(width)
            canvas, (rows, columns) = self._geometry(target)
            whole = _resized(logits[None].float(), canvas)
            maps.append(_resized(whole[..., :rows, :columns], target)[0].argmax(dim=0))
        return maps

    def post_process_object_detection(
        self, outputs: Any, threshold: float = 0.5, target_sizes: Sizes = None
    ) -> list[dict[str, torch.Tensor]]:
        """Return `scores`, `labels` and `boxes` of the detections of each image, best first, as transformers does.

        Args:
            outputs: Output of `RS4DForInstanceSegmentation`.
            threshold: Detections need at least this score.
            target_sizes: (height, width) of each original image; None keeps boxes in pixels of the network input.

        Returns:
            Per image a dictionary; `boxes` are left, top, right, bottom in pixels, cut at the image's border.

        Raises:
            ImageFormatError: Not one target size per image.
        """
        found = self._detections(outputs, threshold, target_sizes)
        return [{"scores": d.scores, "labels": d.labels, "boxes": d.boxes} for d in found]

    def post_process_instance_segmentation(
        self,
        outputs: Any,
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.0,
        target_sizes: Sizes = None,
        return_coco_annotation: bool = False,
        return_binary_maps: bool = False,
    ) -> list[dict[str, Any]]:
        """Return the objects of each image in the format of transformers' processors.

        Args:
            outputs: Output of `RS4DForInstanceSegmentation`. That of a semantic segmentation model gives one segment
                per class, fused and without a score, so that the image-segmentation pipeline serves both.
            threshold: Detections need at least this score.
            mask_threshold: Pixels of at least this probability belong to an object.
            overlap_mask_area_threshold: An object of which no more than this share is visible, under better ones, is
                left out of the map. Run lengths and binary maps may overlap and are not concerned.
            target_sizes: (height, width) of each original image; None gives masks of the network input.
            return_coco_annotation: COCO run lengths, `{"size", "counts"}`, instead of a map: one per segment.
            return_binary_maps: Bool `(segments, height, width)` instead of a map.

        Returns:
            Per image `segmentation`: an int32 map `(height, width)` of segment ids, -1 elsewhere, or see above; and
            `segments_info`: dictionaries `id`, `label_id`, `score`, `was_fused`, and `box`, left, top, right, bottom in
            pixels. The map has objects with visible pixels only, the other forms every detection.

        Raises:
            ImageFormatError: Not one target size per image, or `mask_layout` is needed.
            MaskLibraryError: COCO run lengths need the extra `eval`.
        """
        if return_coco_annotation and return_binary_maps:
            raise ImageFormatError("return_coco_annotation and return_binary_maps exclude each other")
        if "pred_boxes" not in outputs:
            maps = self.post_process_semantic_segmentation(outputs, target_sizes)
            return [semantic_segments(segmentation) for segmentation in maps]
        results = []
        for found in self._detections(outputs, threshold, target_sizes):
            masks = self._paste(found, mask_threshold)
            infos = [
                {"label_id": int(label), "score": round(float(score), 6), "was_fused": False, "box": box.tolist()}
                for label, score, box in zip(found.labels, found.scores, found.boxes, strict=True)
            ]
            if return_coco_annotation or return_binary_maps:
                encode = [mask_to_run_lengths(mask) for mask in masks] if return_coco_annotation else masks
                segments = [{"id": index, **info} for index, info in enumerate(infos)]
                results.append({"segmentation": encode, "segments_info": segments})
            else:
                results.append(segment_map(masks, infos, overlap_mask_area_threshold))
        return results

    def _detections(self, outputs: Any, threshold: float, target_sizes: Sizes) -> Iterator[Detections]:
        count = len(outputs["pred_boxes"])
        if target_sizes is not None and len(target_sizes) != count:
            raise ImageFormatError(f"{len(target_sizes)} target_sizes for {count} images: pass one for each")
        for index in range(count):
            scores, labels = outputs["scores"][index], outputs["class_labels"][index]
            keep = (labels >= 0) & (scores >= threshold)
            if target_sizes is None:
                box = SizeDict(**dict(self.pad_size or self.size))
                size = int(box.height or 0), int(box.width or 0)
                canvas = fitted = size
            else:
                size = int(target_sizes[index][0]), int(target_sizes[index][1])
                canvas, fitted = self._geometry(size)
            # Clipped before scaling: boxes may reach into the padding.
            boxes = clip_boxes(outputs["pred_boxes"][index][keep].float(), *fitted)
            scale = boxes.new_tensor([size[1] / fitted[1], size[0] / fitted[0]]).repeat(2)
            masks = outputs["pred_masks"][index][keep]
            yield Detections(scores[keep], labels[keep], boxes * scale, masks, size, fitted, canvas)

    def _paste(self, found: Detections, threshold: float) -> torch.Tensor:
        if self.mask_layout not in (None, "box", "image"):
            raise ImageFormatError(f"mask_layout={self.mask_layout!r} must be 'box', 'image' or None")
        layout = self.mask_layout or find_mask_layout(found)
        return found.paste(layout, threshold)


def _pixel_mask(fitted: tuple[int, int], canvas: tuple[int, int]) -> torch.Tensor:
    mask = torch.zeros(canvas, dtype=torch.int64)
    mask[: fitted[0], : fitted[1]] = 1
    return mask


def _label(
    annotation: Any, size: tuple[int, int], fitted: tuple[int, int], canvas: tuple[int, int]
) -> dict[str, torch.Tensor]:
    target = resize_instances(read_annotation(annotation, *size), fitted, canvas)
    return {
        **instance_label(target),
        "image_id": torch.tensor([int(annotation.get("image_id", 0))]),
        "orig_size": torch.tensor(size),
        "size": torch.tensor(canvas),
    }


def _resized(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return nn.functional.interpolate(logits, size=size, mode="bilinear")


def fitted_size(height: int, width: int, size: SizeDict) -> tuple[int, int]:
    """The largest (height, width) inside `size` with the image's aspect ratio, rounded, at least one pixel.

    Raises:
        ImageFormatError: `size` does not give both height and width.
    """
    if not size.height or not size.width:
        raise ImageFormatError(f"size={dict(size)} is not supported: pass an int or {{'height': h, 'width': w}}")
    scale = min(size.height / height, size.width / width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


class RS4DImageProcessorPil(RS4DPreprocessing, HeatPilBackend):
    """`RS4DPreprocessing` with PIL; agrees with `RS4DImageProcessor` within resampling error."""


__all__ = ["RS4DImageProcessorPil"]
