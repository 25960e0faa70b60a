"""Data in COCO's format: one JSON file of objects, and a folder of images."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..models.coco_annotations import box_of_mask, mask_to_run_lengths, segmentation_to_mask
from ..models.image_checks import ImageFormatError


@dataclass(frozen=True)
class CocoImage:
    """One image and its objects.

    Args:
        image_id: The file's id of the image.
        path: Path relative to the folder of images.
        height, width: Size in pixels.
        objects: COCO's dictionaries, with the class index as `category_id`.
    """

    image_id: int
    path: str
    height: int
    width: int
    objects: tuple[dict[str, Any], ...]

    @property
    def annotation(self) -> dict[str, Any]:
        """What image processors take as annotation."""
        return {"image_id": self.image_id, "annotations": list(self.objects)}


@dataclass(frozen=True)
class CocoData:
    """A COCO file, checked.

    Args:
        classes: Names in the order of the class indices.
        images: In the order of the file.
        folder: The folder of images.
    """

    classes: tuple[str, ...]
    images: tuple[CocoImage, ...]
    folder: Path

    def as_coco(self) -> dict[str, Any]:
        """The listing as COCO's evaluation takes it: category ids are class indices, ids of objects start at 1."""
        objects = [(image, thing) for image in self.images for thing in image.objects]
        return {
            "images": [
                {"id": image.image_id, "file_name": image.path, "height": image.height, "width": image.width}
                for image in self.images
            ],
            "annotations": [
                {**_complete(thing, image), "image_id": image.image_id, "id": number}
                for number, (image, thing) in enumerate(objects, 1)
            ],
            "categories": [{"id": index, "name": name} for index, name in enumerate(self.classes)],
        }


def _complete(thing: dict[str, Any], image: CocoImage) -> dict[str, Any]:
    """An object with its segmentation as run lengths; box and area are the mask's where the file has none."""
    try:
        mask = segmentation_to_mask(thing.get("segmentation"), image.height, image.width)
    except ImageFormatError as error:
        raise DataError(f"An object of {image.path} has no usable outline: {error}.") from error
    left, top, right, bottom = box_of_mask(mask)
    return {
        "category_id": thing["category_id"],
        "bbox": [float(value) for value in thing.get("bbox") or (left, top, right - left, bottom - top)],
        "area": float(thing.get("area") or mask.sum()),
        "iscrowd": int(thing.get("iscrowd") or 0),
        "segmentation": mask_to_run_lengths(mask),
    }


def same_name(name: str) -> str:
    """A class name without the differences that copies of a data set show: `Storage tank` is `storage_tank`."""
    return "_".join(name.strip().lower().replace("-", " ").replace("_", " ").split())


def read_coco(annotations: Path, images: Path, classes: Sequence[str] | None = None) -> CocoData:
    """Read and check a COCO file.

    Args:
        annotations: The JSON file.
        images: Folder that its file names are relative to.
        classes: Names in the order of the class indices; the file's own, by their ids, if None.

    Raises:
        DataError: If the file cannot be read, contradicts itself, knows other classes, or images are missing.
    """
    try:
        listing = json.loads(annotations.read_text(encoding="utf-8"))
        categories = {entry["id"]: str(entry["name"]) for entry in listing["categories"]}
        listed = {entry["id"]: entry for entry in listing["images"]}
        things = [(thing["image_id"], thing["category_id"], thing) for thing in listing["annotations"]]
        sizes = {key: (int(entry["height"]), int(entry["width"])) for key, entry in listed.items()}
        paths = {key: str(entry["file_name"]) for key, entry in listed.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{annotations} is no COCO file of instances: {type(error).__name__} {error}. It needs `images` (id, "
            "file_name, height, width), `annotations` (image_id, category_id) and `categories` (id, name)."
        ) from error
    names = tuple(classes) if classes is not None else tuple(categories[key] for key in sorted(categories))
    index = _class_indices(categories, names, {category for _, category, _ in things}, annotations)
    if len(listed) != len(listing["images"]):
        raise DataError(f"{annotations} lists an image id twice: ids must be unique.")
    objects: dict[Any, list[dict[str, Any]]] = {key: [] for key in listed}
    for image_id, category, thing in things:
        if image_id not in objects:
            raise DataError(f"{annotations} has an object of image {image_id}, which it does not list.")
        objects[image_id].append({**thing, "category_id": index[category]})
    _check_present([images / path for path in paths.values()], annotations)
    found = (CocoImage(key, paths[key], *sizes[key], tuple(objects[key])) for key in listed)
    return CocoData(names, tuple(found), images)


def _class_indices(categories: dict[Any, str], classes: Sequence[str], used: set[Any], file: Path) -> dict[Any, int]:
    """Class index of every category id in use."""
    order = {same_name(name): position for position, name in enumerate(classes)}
    if len(order) != len(classes):
        raise DataError(f"Classes {', '.join(classes)} are not all different.")
    index = {key: order[same_name(name)] for key, name in categories.items() if same_name(name) in order}
    if unknown := sorted(str(categories.get(key, key)) for key in used - index.keys()):
        raise DataError(
            f"{file} has objects of {', '.join(unknown)}, which is none of the classes {', '.join(classes)}: "
            "name its classes, or remove these objects."
        )
    return index


def _check_present(files: Sequence[Path], annotations: Path) -> None:
    missing = [file for file in files if not file.is_file()]
    if missing or not files:
        example = f", e.g. {missing[0]}" if missing else ""
        raise DataError(
            f"{len(missing)} of {len(files)} images of {annotations} are not there{example}: "
            "give the folder that its file names are relative to."
        )


def load_coco(annotations: str | Path, images: str | Path, classes: Sequence[str] | None = None) -> Any:
    """A COCO file as a `datasets.Dataset`, for the Trainer or for the Hub.

    Args:
        annotations: The JSON file.
        images: Folder that its file names are relative to.
        classes: Names in the order of the class indices; the file's own, by their ids, if None.

    Returns:
        A data set with a row per image: `image` (decoded when read), `image_id`, `height`, `width` and `annotations`, a
        list of objects with `category_id` (the class index; the feature knows the names), `bbox`, `area`, `iscrowd` and
        `segmentation` (run lengths, whatever the file had). A row is what `RS4DImageProcessor` takes as annotation.

    Raises:
        DataError: See `read_coco`.
        MaskLibraryError: Segmentations need the extra `eval`.
    """
    from datasets import ClassLabel, Dataset, Features, Image, List, Value

    data = read_coco(Path(annotations), Path(images), classes)
    item = {
        "category_id": ClassLabel(names=list(data.classes)),
        "bbox": List(Value("float64"), length=4),
        "area": Value("float64"),
        "iscrowd": Value("int8"),
        "segmentation": {"size": List(Value("int32")), "counts": Value("string")},
    }
    features = Features(
        {
            "image": Image(),
            "image_id": Value("int64"),
            "height": Value("int32"),
            "width": Value("int32"),
            "annotations": List(item),
        }
    )
    rows = [
        {
            "image": str(data.folder / image.path),
            "image_id": image.image_id,
            "height": image.height,
            "width": image.width,
            "annotations": [_complete(thing, image) for thing in image.objects],
        }
        for image in data.images
    ]
    return Dataset.from_list(rows, features=features)
