import torch

from hf_rsheat.training.feature_colours import false_colours


def maps() -> torch.Tensor:
    return torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))


def test_equal_maps_have_equal_colours_and_others_do_not():
    reference = maps()
    shown = false_colours(reference, reference.clone(), 32)
    assert shown.shape == (2, 3, 32, 32)
    assert torch.equal(shown, false_colours(reference, reference, 32))
    assert not torch.allclose(shown, false_colours(reference, -reference, 32))


def test_red_is_what_varies_most():
    reference = 0.01 * maps()
    reference[:, 5] += torch.linspace(-1, 1, 16).reshape(4, 4)
    red = false_colours(reference, reference, 4)[0, 0].flatten()
    order = torch.corrcoef(torch.stack((red, torch.linspace(-1, 1, 16))))[0, 1].abs()
    assert order > 0.99


def test_a_constant_map_is_one_colour():
    shown = false_colours(maps(), torch.zeros(2, 8, 4, 4), 16)
    assert torch.equal(shown, shown[:1, :, :1, :1].expand_as(shown))
