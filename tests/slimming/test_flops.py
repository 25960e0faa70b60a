"""Operations: the published shares, and those that PyTorch counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig

from hf_rsheat.slimming import flops, relative_compute, slim
from hf_rsheat.slimming.flops import flop_parts

from .models import TRUNKS, build, images

# arXiv 2601.22841: channels, width, layers, heads, patch, and compute at s = 0.001, 0.01, 0.1 and 0.5.
PUBLISHED = {
    "TerraMind-L": (13, 1024, 24, 16, 16, (0.0167, 0.0226, 0.1075, 0.5054)),
    "TerraMind-B": (13, 768, 12, 12, 16, (0.0331, 0.0385, 0.1219, 0.5135)),
    "Prithvi-300": (6, 1024, 24, 16, 16, (0.0118, 0.0176, 0.1032, 0.5030)),
    "Prithvi-600": (6, 1280, 32, 16, 14, (0.0078, 0.0138, 0.1027, 0.5015)),
    "ViT-B of the paper": (10, 768, 12, 12, 16, (0.0293, 0.0350, 0.1192, 0.5118)),
}


def counted(model, pixel_values: torch.Tensor) -> int:
    """What PyTorch counts; with gradients, as it does not know the kernels that our layers use in inference."""
    with FlopCounterMode(display=False) as counter:
        model(pixel_values.requires_grad_())
    return counter.get_total_flops()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shares_of_compute_are_met(name):
    channels, width, layers, heads, patch, expected = PUBLISHED[name]
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        patch_size=patch,
        num_channels=channels,
    )
    for share, compute in zip((0.001, 0.01, 0.1, 0.5), expected, strict=True):
        assert relative_compute(config, share, 224, channels) == pytest.approx(compute, abs=0.003)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.333])
@pytest.mark.parametrize("name", TRUNKS)
def test_the_formula_equals_what_pytorch_counts_on_the_slimmed_model(name, share):
    model = build(name)
    small = slim(model, share)
    parts = flop_parts(small)
    assert sum(parts.values()) - parts.get("scan", 0) == counted(small, images(model, 1))
    assert relative_compute(model, share) == pytest.approx(flops(small) / flops(model), rel=1e-12)


@pytest.mark.parametrize("name", ["vheat", "rs-vheat", "rs4d", "selective-mae"])
def test_other_image_sizes_are_counted_as_pytorch_does(name):
    model = build(name)
    parts = flop_parts(model, (72, 100))
    assert sum(parts.values()) - parts.get("scan", 0) == counted(model, torch.randn(1, 3, 72, 100))


def test_a_head_does_not_count():
    assert flops(build("rs-vheat-upernet")) == flops(build("rs-vheat"))
