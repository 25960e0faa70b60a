import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, Sam2Model, SamImageProcessor, SamModel, SamVisionModel

from hf_rsheat import RS4DImageProcessor
from hf_rsheat.errors import CheckpointError, ConfigurationError
from hf_rsheat.training.teacher import Teacher, whole_view

from .teachers import CHANNELS, SIZE, save_sam, save_sam2


def pixels(height: int = SIZE, width: int = SIZE) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def inputs(teacher: Teacher) -> torch.Tensor:
    return teacher.input_for(SIZE)(pixels())[None]


@torch.no_grad()
def test_sam_gives_its_necks_output_from_either_folder(tmp_path):
    teacher = Teacher(save_sam(tmp_path / "vision"))
    values = inputs(teacher)
    expected = SamVisionModel.from_pretrained(tmp_path / "vision")(values).last_hidden_state
    assert torch.equal(teacher(values), expected)
    whole = Teacher(save_sam(tmp_path / "whole", whole=True))
    expected = SamModel.from_pretrained(tmp_path / "whole").get_image_embeddings(values)
    assert torch.equal(whole(values), expected)
    assert expected.shape == (1, CHANNELS, 4, 4)
    assert teacher.channels == whole.channels == CHANNELS


@torch.no_grad()
def test_sam2_gives_the_coarsest_level_of_its_neck(tmp_path):
    for whole in (False, True):
        teacher = Teacher(save_sam2(tmp_path / str(whole), whole=whole))
        model = AutoModel.from_pretrained(tmp_path / str(whole))
        model = model.vision_encoder if isinstance(model, Sam2Model) else model
        values = inputs(teacher)
        assert torch.equal(teacher(values), model(values).fpn_hidden_states[-1])
        assert teacher(values).shape == (1, CHANNELS, 4, 4)
        assert teacher(teacher.input_for(96)(pixels(96, 96))[None]).shape == (1, CHANNELS, 6, 6)


@pytest.mark.parametrize("size", [(64, 64), (50, 90), (130, 70)])
def test_whole_images_are_prepared_as_by_sams_own_processor(tmp_path, size):
    prepared = Teacher(save_sam(tmp_path)).input_for(SIZE)(whole_view(pixels(*size), SIZE))
    expected = SamImageProcessor.from_pretrained(tmp_path)(pixels(*size), return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(prepared, expected, atol=1e-5, rtol=1e-5)
    ours = RS4DImageProcessor(size={"height": SIZE, "width": SIZE})(pixels(*size), return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(prepared, ours, atol=1e-5, rtol=1e-5)


def test_the_eight_views_are_the_symmetries_of_the_square():
    image = pixels()
    views = [whole_view(image, SIZE, symmetry) for symmetry in range(8)]
    assert torch.equal(views[0], image)
    assert torch.equal(views[1], torch.rot90(image, 1, (1, 2)))
    assert torch.equal(views[4], image.flip(-1))
    assert len({view.numpy().tobytes() for view in views}) == 8


def test_statistics_are_the_teachers_own(tmp_path):
    teacher = Teacher(save_sam(tmp_path, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.5, 0.5]))
    prepare = teacher.input_for(SIZE)
    expected = (pixels().float() / 255 - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / 0.5
    torch.testing.assert_close(prepare(pixels()), expected)
    assert not prepare.normalizes_like(RS4DImageProcessor())


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_teacher_in_lower_precision_gives_nearly_the_same_float32_maps(tmp_path, precision):
    save_sam(tmp_path)
    full, half = Teacher(tmp_path), Teacher(tmp_path, precision)
    maps = half(inputs(half))
    assert half._encoder.dtype == getattr(torch, precision)
    assert maps.dtype == torch.float32
    assert (maps - full(inputs(full))).abs().mean() < 0.02


def test_nothing_of_the_teacher_learns_or_drops_out(tmp_path):
    teacher = Teacher(save_sam(tmp_path))
    maps = teacher(inputs(teacher).requires_grad_())
    assert not maps.requires_grad
    assert not teacher._encoder.training
    assert not any(parameter.requires_grad for parameter in teacher._encoder.parameters())


def test_loader_processes_get_no_weights(tmp_path):
    teacher = Teacher(save_sam(tmp_path))
    teacher(inputs(teacher))
    assert pickle.loads(pickle.dumps(teacher))._encoder is None


def test_another_image_size_is_refused_with_the_right_one(tmp_path):
    with pytest.raises(ConfigurationError, match="set image_size to 64"):
        Teacher(save_sam(tmp_path / "sam")).input_for(128)
    with pytest.raises(ConfigurationError, match="multiple of 32"):
        Teacher(save_sam2(tmp_path / "sam2")).input_for(80)


def test_a_folder_that_is_no_teacher_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"preprocessor_config\.json"):
        Teacher(tmp_path / "nowhere")
    save_sam(tmp_path / "sam")
    (tmp_path / "sam" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ConfigurationError, match="must be a SAM"):
        Teacher(tmp_path / "sam")


def test_missing_weights_are_not_made_up(tmp_path):
    path = save_sam(tmp_path) / "model.safetensors"
    weights = {name: value.clone() for name, value in load_file(path).items() if "neck" not in name}
    save_file(weights, path, metadata={"format": "pt"})
    teacher = Teacher(tmp_path)
    with pytest.raises(CheckpointError, match="lacks 6 weights"):
        teacher(inputs(teacher))
