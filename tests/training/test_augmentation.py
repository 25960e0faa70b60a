import pytest
import torch

from hf_rsheat.training.augmentation import Geometry
from hf_rsheat.training.randomness import generator


def ramp(size: int) -> torch.Tensor:
    """An image whose pixels say where they are, the same at any resolution."""
    axis = (torch.arange(size) + 0.5) / size
    return (axis[:, None] + 0.3 * axis[None])[None]


@pytest.mark.parametrize("key", range(8))
def test_images_of_a_pair_stay_co_registered_whatever_their_sizes(key):
    geometry = Geometry.draw(generator("test", key), (0.3, 1.0))
    fine, coarse = geometry.apply(ramp(96), 32), geometry.apply(ramp(64), 32)
    assert (fine - coarse).abs().max() < 0.03


def test_all_eight_symmetries_occur_and_crops_stay_inside():
    drawn = [Geometry.draw(generator("test", key), (0.67, 1.0)) for key in range(200)]
    assert len({(g.mirrored, g.quarter_turns) for g in drawn}) == 8
    assert all(g.top >= 0 and g.top + g.height <= 1 + 1e-9 and g.left + g.width <= 1 + 1e-9 for g in drawn)
    assert min(g.height * g.width for g in drawn) > 0.6


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32])
def test_resampling_keeps_dtype_and_range(dtype):
    image = torch.tensor([0, 200], dtype=dtype).repeat_interleave(32).repeat(1, 40, 1)
    view = Geometry(0, 0, 1, 1, mirrored=False, quarter_turns=0).apply(image, 50)
    assert view.shape == (1, 50, 50)
    assert view.dtype == dtype
    assert view.min() == 0
    assert view.max() == 200


def test_extreme_shapes_work():
    assert Geometry(0.999, 0.5, 0.001, 0.5, True, 3).apply(torch.zeros(3, 1, 500), 32).shape == (3, 32, 32)
