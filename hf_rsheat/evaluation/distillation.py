"""How well students imitate a teacher on images they were not trained on."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from ..errors import ConfigurationError, DataError
from ..hub.records import weights_digest
from ..models.image_processing_rs4d import RS4DImageProcessor
from ..models.modeling_rs4d_distillation import RS4DForDistillation, distillation_losses
from ..training.image_folder import decode, image_paths
from ..training.starting_point import stored_model_type
from ..training.teacher import Teacher, whole_view
from .features import default_device

_RESAMPLES = 10_000


def evaluate_distillation(
    students: Sequence[str | Path], teacher: Teacher, images: Path, reference_images: Path
) -> dict[str, Any]:
    """Mean absolute error of students' maps, beside that of the best guess that does not look at the image.

    Args:
        students: Exported folders or checkpoints of `rs4d_distill`, all for images of one size.
        teacher: What they imitate.
        images: Folder of held-out images, seen whole and clean; those that cannot be read are left out.
        reference_images: Folder whose mean map, for every position and channel, is the baseline: the training images.

    Returns:
        `images`, `baseline` (its error), and per student `name`, `weights_sha256`, `l1`, `ratio` to the baseline with
        `interval95`, and `difference`, the ratio minus that of the first student, with `difference95`. Intervals are
        percentiles of 10,000 bootstrap samples of the images, the same for all students.

    Raises:
        ConfigurationError: If a folder holds no RS4D, or students or teacher do not fit each other.
        DataError: If no image can be read.
    """
    models = [_load_student(folder, teacher) for folder in students]
    sizes = {processor.size["height"] for _, processor in models}
    if len(sizes) != 1:
        raise ConfigurationError(f"The students take images of {sorted(sizes)} px: compare students of one size.")
    size = sizes.pop()
    mean_map = _mean_map(teacher, reference_images, size)
    errors: list[list[float]] = []
    for image, target in _targets(teacher, images, size):
        maps = [_student_map(model, processor, image) for model, processor in models]
        errors.append([distillation_losses(guess, target).item() for guess in (mean_map, *maps)])
    return _summary([Path(folder) for folder in students], np.array(errors))


def _load_student(folder: str | Path, teacher: Teacher) -> tuple[RS4DForDistillation, RS4DImageProcessor]:
    if stored_model_type(folder) != "rs4d":
        raise ConfigurationError(f"'{folder}' holds no RS4D: give folders that `rs4d_distill` has written.")
    model = RS4DForDistillation.from_pretrained(folder, dtype=torch.float32)
    if (model.config.teacher_channels or model.config.hidden_size) != teacher.channels:
        raise ConfigurationError(
            f"The map of '{folder}' has {model.config.hidden_size} channels, the teacher's {teacher.channels}: the "
            "projector between them is only in the run's checkpoints, give one of these."
        )
    return model.to(default_device()).eval(), RS4DImageProcessor.from_pretrained(folder)


def _targets(teacher: Teacher, folder: Path, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Every readable image, uint8 `(3, height, width)`, and the teacher's map of it, `(1, channels, rows, columns)`."""
    prepare, found = teacher.input_for(size), False
    for path in tqdm(image_paths(folder), desc=folder.name, unit="image"):
        try:
            image = decode(folder / path, channels=3)
        except DataError:
            continue
        found = True
        yield image, teacher(prepare(whole_view(image, size))[None].to(default_device()))
    if not found:
        raise DataError(f"None of the images in '{folder}' can be read.")


def _mean_map(teacher: Teacher, folder: Path, size: int) -> torch.Tensor:
    total, count = torch.zeros((), dtype=torch.float64, device=default_device()), 0
    for _, target in _targets(teacher, folder, size):
        total, count = total + target, count + 1
    return total / count


@torch.inference_mode()
def _student_map(model: RS4DForDistillation, processor: RS4DImageProcessor, image: torch.Tensor) -> torch.Tensor:
    inputs = processor(image, input_data_format="channels_first", return_tensors="pt")
    return model(inputs.pixel_values.to(model.device)).feature_map


def _summary(folders: list[Path], errors: NDArray[np.float64]) -> dict[str, Any]:
    """Ratios of the columns of `errors` `(images, 1 + students)` to the first, over bootstrap samples of its rows."""
    draws = np.random.default_rng(0).integers(len(errors), size=(_RESAMPLES, len(errors)))
    resampled = np.stack([column[draws].mean(axis=1) for column in errors.T], axis=1)
    ratios, spread = errors[:, 1:].mean(0) / errors[:, 0].mean(), resampled[:, 1:] / resampled[:, :1]
    rows = [
        {
            "name": str(folder),
            "weights_sha256": weights_digest(folder),
            "l1": float(errors[:, 1 + index].mean()),
            "ratio": float(ratios[index]),
            "interval95": np.percentile(spread[:, index], (2.5, 97.5)).tolist(),
            "difference": float(ratios[index] - ratios[0]),
            "difference95": np.percentile(spread[:, index] - spread[:, 0], (2.5, 97.5)).tolist(),
        }
        for index, folder in enumerate(folders)
    ]
    return {"images": len(errors), "baseline": float(errors[:, 0].mean()), "students": rows}


def report(result: dict[str, Any]) -> str:
    """The result as a table."""
    lines = [
        f"{result['images']} held-out images; L1 of the teacher's mean map {result['baseline']:.4f}",
        f"{'L1':>8}{'ratio':>8}{'95 % interval':>18}{'to the first':>14}{'95 % interval':>20}  student",
    ]
    for row in result["students"]:
        low, high = row["interval95"]
        below, above = row["difference95"]
        lines.append(
            f"{row['l1']:8.4f}{row['ratio']:8.3f}{f'{low:.3f} to {high:.3f}':>18}{row['difference']:+14.3f}"
            f"{f'{below:+.3f} to {above:+.3f}':>20}  {row['name']}"
        )
    return "\n".join(lines)
