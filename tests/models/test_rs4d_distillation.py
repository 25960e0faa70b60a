import pytest
import torch
from transformers import AutoModelForPreTraining

from hf_rsheat import RS4DBackbone, RS4DForDistillation, RS4DModel
from tests.zoo import randomize, rs4d_config


def student(**fields) -> RS4DForDistillation:
    torch.manual_seed(0)
    model = RS4DForDistillation(rs4d_config(**fields))
    randomize(model)
    return model.eval()


def images(height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"use_cls_token": True}])
def test_the_map_is_the_backbones_last_map(fields, tmp_path):
    model = student(**fields)
    model.save_pretrained(tmp_path)
    backbone = RS4DBackbone.from_pretrained(tmp_path)
    pixel_values = images(40, 56)
    found = model(pixel_values).feature_map
    assert found.shape == (2, 16, 3, 4)
    torch.testing.assert_close(found, backbone(pixel_values).feature_maps[-1])


@torch.no_grad()
def test_the_loss_is_the_mean_absolute_difference():
    model, target = student(), torch.randn(2, 16, 4, 4)
    output = model(images(), teacher_features=target)
    expected = (output.feature_map - target).abs().mean(dim=(1, 2, 3))
    torch.testing.assert_close(output.loss_per_image, expected)
    torch.testing.assert_close(output.loss, expected.mean())
    assert model(images()).loss is None


def test_a_projector_stands_only_where_the_widths_differ():
    assert student().projector is None
    assert student(teacher_channels=16).projector is None
    assert student(teacher_channels=24)(images()).feature_map.shape == (2, 24, 4, 4)


@torch.no_grad()
def test_noise_and_masks_change_the_input_and_nothing_else():
    model, target = student(), torch.zeros(2, 16, 4, 4)
    order = torch.stack([torch.randperm(16) for _ in range(2)])
    noise = torch.randn(2, 3, 64, 64)
    clean = model(images(), target).loss
    assert model(images(), target, noise=noise, mask_order=order).loss != clean
    same = model(images(), target, noise=noise, mask_order=order, noise_ratio=0.0, mask_ratio=0.0).loss
    torch.testing.assert_close(same, clean)


def test_a_map_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="teacher_channels"):
        student()(images(), teacher_features=torch.zeros(2, 24, 4, 4))


@torch.no_grad()
def test_the_student_loads_without_its_projector(tmp_path):
    model = student(teacher_channels=24)
    model.save_pretrained(tmp_path)
    assert type(AutoModelForPreTraining.from_pretrained(tmp_path)) is RS4DForDistillation
    plain = RS4DModel.from_pretrained(tmp_path)
    torch.testing.assert_close(plain(images()).last_hidden_state, model.rs4d(images()).last_hidden_state)


def test_every_parameter_learns():
    model = student(teacher_channels=24)
    model(images(), teacher_features=torch.randn(2, 24, 4, 4)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
