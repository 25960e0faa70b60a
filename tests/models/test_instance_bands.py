"""Maps in bands of rows are the maps, whatever is between."""

import pytest
import torch
from torch import nn

from hf_rsheat.models import instance_bands
from hf_rsheat.models.channels_last import respecting_hooks
from hf_rsheat.models.instance_bands import by_bands
from tests.models.test_rs4d_instances import HEADS, images, model_of


@torch.no_grad()
@pytest.mark.parametrize(("height", "values"), [(40, 7 * 3 * 12), (41, 1), (17, 10**6)])
def test_bands_with_halos_are_the_whole(height, values, monkeypatch):
    monkeypatch.setattr(instance_bands, "VALUES_IN_CACHE", values)
    x = torch.randn(2, 3, height, 12)
    calls = []
    conv, upsample = nn.Conv2d(3, 5, 3, padding=1), nn.ConvTranspose2d(3, 4, 2, stride=2)
    conv.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(by_bands(conv, x, halo=1), conv(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(by_bands(upsample, x), upsample(x), atol=1e-5, rtol=1e-5)
    assert (len(calls) > 2) == (values < 100 * height)
    calls.clear()
    with respecting_hooks(conv):
        by_bands(conv, x, halo=1)
    assert len(calls) == 1


@torch.no_grad()
@HEADS
def test_a_detector_in_bands_says_the_same(head, monkeypatch):
    model = model_of(head)
    whole = model.dense_outputs(images(100, 132))
    monkeypatch.setattr(instance_bands, "VALUES_IN_CACHE", 1)
    monkeypatch.setattr(instance_bands, "LEAST_ROWS_PER_HALO", 1)
    for name, value in model.dense_outputs(images(100, 132)).items():
        torch.testing.assert_close(value, whole[name], atol=1e-4, rtol=1e-4)
