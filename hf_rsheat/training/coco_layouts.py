"""Instance segmentation sets that recipes name: their classes, in the published order, and where their files lie.

The data is the user's. File names are those in which the sets circulate in COCO's format; where a copy has others, a
recipe says so (`objective_options.annotations` and the like).
"""

from typing import NamedTuple

from ..errors import ConfigurationError, did_you_mean


class Split(NamedTuple):
    """Paths below the data set's folder: the COCO file, and the folder of its images."""

    annotations: str
    images: str


class Layout(NamedTuple):
    """A data set in COCO's format.

    Args:
        classes: Names in the order of the class indices.
        train: What to learn from.
        test: What the published numbers are measured on.
    """

    classes: tuple[str, ...]
    train: Split
    test: Split


LAYOUTS = {
    "ssdd": Layout(
        ("ship",),
        Split("annotations/SSDD_instances_train.json", "imgs"),
        Split("annotations/SSDD_instances_val.json", "imgs"),
    ),
    "whu": Layout(
        ("building",),
        Split("annotations/WHU_building_train.json", "train/image"),
        Split("annotations/WHU_building_test.json", "test/image"),
    ),
    "nwpu": Layout(
        (
            *("airplane", "ship", "storage_tank", "baseball_diamond", "tennis_court", "basketball_court"),
            *("ground_track_field", "harbor", "bridge", "vehicle"),
        ),
        Split("annotations/NWPU_instances_train.json", "positive image set"),
        Split("annotations/NWPU_instances_val.json", "positive image set"),
    ),
    "generated": Layout(  # hf_rsheat.instance_scenes
        ("ship", "building"), Split("annotations/train.json", "train"), Split("annotations/test.json", "test")
    ),
}


def find_layout(name: str) -> Layout:
    """The layout that a recipe names.

    Raises:
        ConfigurationError: If there is none of this name; the message has the nearest one.
    """
    if name not in LAYOUTS:
        raise ConfigurationError(f"Unknown dataset '{name}': {did_you_mean(name, LAYOUTS)}")
    return LAYOUTS[name]
