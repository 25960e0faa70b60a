"""Checkpoints load for images with other numbers of channels, in every family."""

import pytest
import torch

from hf_rsheat import RSVHeatForPreTraining, adapt_input_channels
from tests.zoo import ZOO

ONE_INPUT = ["vheat", "rs4d", "rs4d-backbone", "rs4d-distillation", "selective-mae", "selective-mae-classifier"]


def images(channels: int) -> torch.Tensor:
    return torch.randn(2, channels, 64, 64, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def first_output(model, pixel_values: torch.Tensor) -> torch.Tensor:
    value = next(value for value in model(pixel_values).values() if value is not None)
    return value[-1] if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", ONE_INPUT)
def test_repeated_bands_give_what_the_checkpoint_gives(name, tmp_path):
    model = ZOO[name].model()
    model.save_pretrained(tmp_path)
    twice = type(model).from_pretrained(tmp_path, num_channels=6)
    expected = first_output(model, images(3))
    torch.testing.assert_close(first_output(twice, images(3).repeat(1, 2, 1, 1)), expected, atol=1e-4, rtol=1e-4)
    one = type(model).from_pretrained(tmp_path, num_channels=1)
    expected = first_output(model, images(1).expand(-1, 3, -1, -1))
    torch.testing.assert_close(first_output(one, images(1)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [*ONE_INPUT, "rs-vheat-pretraining", "selective-mae-pretraining"])
def test_an_adapted_model_saves_and_loads(name, tmp_path):
    model = ZOO[name].model()
    model.save_pretrained(tmp_path)
    adapted = type(model).from_pretrained(tmp_path, num_channels=10)
    adapted.save_pretrained(tmp_path / "adapted")
    again = type(model).from_pretrained(tmp_path / "adapted")
    found, expected = (first_output(m.eval(), images(10)) for m in (again, adapted))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["rs-vheat-pretraining", "selective-mae-pretraining"])
def test_pixels_of_repeated_bands_are_predicted_alike(name, tmp_path):
    model = ZOO[name].model()
    model.save_pretrained(tmp_path)
    twice = type(model).from_pretrained(tmp_path, num_channels=6)
    if name == "selective-mae-pretraining":  # pixels stand in the order row, column, channel
        before, after = model(images(3)).logits.unflatten(-1, (-1, 3)), twice(images(3).repeat(1, 2, 1, 1)).logits
        after = after.unflatten(-1, (-1, 6))
        torch.testing.assert_close(after, torch.cat((before, before), dim=-1), atol=1e-4, rtol=1e-4)
    else:
        before, after = model(images(3)).reconstruction, twice(images(3).repeat(1, 2, 1, 1)).reconstruction
        torch.testing.assert_close(after, before.repeat(1, 2, 1, 1), atol=1e-4, rtol=1e-4)


def test_fixed_positions_stay_fixed(tmp_path):
    model = ZOO["selective-mae-pretraining"].model()
    model.save_pretrained(tmp_path)
    adapted = type(model).from_pretrained(tmp_path, num_channels=4)
    frozen = {name for name, parameter in adapted.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def test_only_the_named_modality_changes(tmp_path):
    ZOO["rs-vheat-pretraining"].model().save_pretrained(tmp_path)
    model = RSVHeatForPreTraining.from_pretrained(tmp_path, modalities={"optical": 3, "sar": 2})
    assert {name: head.out_channels for name, head in model.decoder.heads.items()} == {"optical": 768, "sar": 512}
    model(images(2), modality="sar").loss.backward()


def test_a_model_without_our_backbone_is_refused():
    with pytest.raises(ValueError, match="none of our backbones"):
        adapt_input_channels(torch.nn.Linear(2, 2), 3)
