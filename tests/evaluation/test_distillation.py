from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_rsheat import RS4DForDistillation, RS4DImageProcessor, VHeatModel
from hf_rsheat.errors import ConfigurationError
from hf_rsheat.evaluation.distillation import _summary, evaluate_distillation, report
from hf_rsheat.training.image_folder import decode, image_paths
from hf_rsheat.training.teacher import Teacher, whole_view
from tests.training.conftest import write_image
from tests.training.teachers import CHANNELS, SIZE, save_sam
from tests.zoo import rs4d_config, vheat_config


@pytest.fixture
def folders(tmp_path) -> Path:
    for index in range(8):
        write_image(
            tmp_path / ("train" if index < 4 else "held_out") / f"{index}.png", index, size=(40, 40 + 8 * index)
        )
    save_sam(tmp_path / "teacher")
    for seed in range(2):
        torch.manual_seed(seed)
        model = RS4DForDistillation(rs4d_config(hidden_size=CHANNELS))
        model.save_pretrained(tmp_path / f"student{seed}")
        RS4DImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(tmp_path / f"student{seed}")
    return tmp_path


@torch.no_grad()
def test_errors_are_those_of_the_maps(folders):
    teacher = Teacher(folders / "teacher")
    students = [folders / "student0", folders / "student1"]
    result = evaluate_distillation(students, teacher, folders / "held_out", folders / "train")
    prepare = teacher.input_for(SIZE)

    def batch(name: str) -> torch.Tensor:
        paths = image_paths(folders / name)
        return torch.stack([prepare(whole_view(decode(folders / name / path, 3), SIZE)) for path in paths])

    held_out, mean = teacher(batch("held_out")), teacher(batch("train")).mean(dim=0)
    assert result["images"] == 4
    assert result["baseline"] == pytest.approx((held_out - mean).abs().mean().item(), rel=1e-5)
    for folder, row in zip(students, result["students"], strict=True):
        maps = RS4DForDistillation.from_pretrained(folder)(batch("held_out")).feature_map
        assert row["l1"] == pytest.approx((held_out - maps).abs().mean().item(), rel=1e-5)
        assert row["ratio"] == pytest.approx(row["l1"] / result["baseline"])
        assert row["interval95"][0] < row["ratio"] < row["interval95"][1]
    assert "student1" in report(result)


def test_differences_are_paired():
    """A student that is always a little better has a narrow interval, however much the images differ."""
    hard = np.random.default_rng(0).uniform(0.5, 2.0, 50)
    rows = _summary([Path("a"), Path("b")], np.stack([hard, 0.7 * hard, 0.69 * hard], axis=1))["students"]
    assert rows[0]["difference"] == 0
    assert rows[1]["difference"] == pytest.approx(-0.01)
    assert rows[1]["difference95"] == pytest.approx([-0.01, -0.01])


def test_unreadable_images_are_left_out(folders):
    (folders / "held_out" / "broken.png").write_bytes(b"not an image")
    teacher = Teacher(folders / "teacher")
    result = evaluate_distillation([folders / "student0"], teacher, folders / "held_out", folders / "train")
    assert result["images"] == 4


def test_a_student_that_lost_its_projector_is_refused(folders):
    RS4DForDistillation(rs4d_config()).save_pretrained(folders / "narrow")
    with pytest.raises(ConfigurationError, match="checkpoints"):
        evaluate_distillation([folders / "narrow"], Teacher(folders / "teacher"), folders, folders)


def test_other_models_and_mixed_sizes_are_refused(folders):
    VHeatModel(vheat_config()).save_pretrained(folders / "vheat")
    with pytest.raises(ConfigurationError, match="no RS4D"):
        evaluate_distillation([folders / "vheat"], Teacher(folders / "teacher"), folders, folders)
    RS4DImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folders / "student1")
    with pytest.raises(ConfigurationError, match="one size"):
        evaluate_distillation(
            [folders / "student0", folders / "student1"], Teacher(folders / "teacher"), folders, folders
        )


def test_pictures_of_grey_are_read_as_rgb(folders):
    Image.new("L", (30, 30), 128).save(folders / "held_out" / "grey.png")
    result = evaluate_distillation(
        [folders / "student0"], Teacher(folders / "teacher"), folders / "held_out", folders / "train"
    )
    assert result["images"] == 5
