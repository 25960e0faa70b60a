"""The fast kernels compute what the plain ones compute, and write over nothing that is still needed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_rsheat.models import channels_last, heat_encoder
from hf_rsheat.models.channels_last import (
    added,
    apply_linear,
    apply_linear_halves,
    gated,
    gelu,
    linear,
    per_image_in_cache,
    strided_conv3x3,
)
from hf_rsheat.models.configuration_rs_vheat import RSVHeatConfig
from hf_rsheat.models.configuration_vheat import VHeatConfig
from hf_rsheat.models.modeling_rs_vheat import RSVHeatModel
from hf_rsheat.models.modeling_vheat import VHeatModel

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", [(5, 24), (1, 12, 12, 24), (3, 200, 24)])
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_the_plain_one_with_and_without_gradients(shape, activation, bias):
    module, x = nn.Linear(24, 40, bias=bias), torch.randn(shape)
    expected = module(x) if activation == "none" else F.gelu(module(x))
    torch.testing.assert_close(linear(x, module.weight, module.bias, activation), expected, **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(apply_linear(module, x, activation), expected, **CLOSE)


def test_gradients_through_the_convolution_are_those_of_the_linear():
    weight, x = torch.randn(40, 24, requires_grad=True), torch.randn(2, 10, 10, 24, requires_grad=True)
    actual = torch.autograd.grad(linear(x, weight).square().sum(), (x, weight))
    expected = torch.autograd.grad(F.linear(x, weight).square().sum(), (x, weight))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)


def test_without_the_compilers_operator_the_result_is_the_same(monkeypatch):
    module, x = nn.Linear(24, 40), torch.randn(300, 24)
    with torch.no_grad():
        expected = apply_linear(module, x, "gelu")
        monkeypatch.setattr(channels_last, "has_onednn_linear", lambda: False)
        torch.testing.assert_close(apply_linear(module, x, "gelu"), expected, **CLOSE)


def test_an_operator_that_changed_its_meaning_is_not_used(monkeypatch):
    monkeypatch.setattr(channels_last, "onednn_linear", lambda x, weight, bias, activation: F.linear(x, weight, bias))
    assert not channels_last.has_onednn_linear.__wrapped__()


@torch.no_grad()
def test_adapters_and_hooks_on_a_linear_are_called():
    class Adapter(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    x, adapter, hooked = torch.randn(4, 8), Adapter(8, 6), nn.Linear(8, 6)
    torch.testing.assert_close(apply_linear(adapter, x), F.linear(x, adapter.weight, adapter.bias) + 1)
    hooked.register_forward_hook(lambda module, arguments, output: output * 0)
    assert not apply_linear(hooked, x).any()
    assert not any(half.any() for half in apply_linear_halves(hooked, x))


@torch.no_grad()
def test_halves_are_the_chunks_and_contiguous():
    module, x = nn.Linear(8, 12), torch.randn(2, 3, 3, 8)
    for half, chunk in zip(apply_linear_halves(module, x), module(x).chunk(2, dim=-1), strict=True):
        assert half.is_contiguous()
        torch.testing.assert_close(half, chunk, **CLOSE)


def test_temporaries_are_written_over_only_without_gradients():
    x, gate = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    before = x.detach().clone()
    torch.testing.assert_close(gated(x, gate), x * F.silu(gate))
    torch.testing.assert_close(gelu(x), F.gelu(x))
    torch.testing.assert_close(added(x, gate), x + gate)
    assert torch.equal(x, before)
    with torch.no_grad():
        assert added(x, gate) is x


@pytest.mark.parametrize("size", [8, 9, 40])
@torch.no_grad()
def test_the_strided_convolution_is_the_convolution(size):
    conv, x = nn.Conv2d(6, 10, 3, stride=2, padding=1, bias=False), torch.randn(2, size, size + 1, 6)
    expected = conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(strided_conv3x3(conv, x), expected, **CLOSE)


@torch.no_grad()
def test_images_are_treated_a_few_at_a_time(monkeypatch):
    seen = []
    monkeypatch.setattr(channels_last, "VALUES_IN_CACHE", 40)

    def double(part):
        seen.append(len(part))
        return 2 * part

    x = torch.randn(5, 2, 2, 4)
    assert torch.equal(per_image_in_cache(double, x), 2 * x)
    assert seen == [2, 2, 1]


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("family", ["vheat", "rs_vheat"])
@torch.no_grad()
def test_tiles_of_any_size_leave_the_features_as_they_are(monkeypatch, family, post_norm):
    fields = {"image_size": 64, "hidden_sizes": (16, 24, 32, 40), "depths": (1, 2, 1, 1), "post_norm": post_norm}
    config, model_class = (VHeatConfig, VHeatModel) if family == "vheat" else (RSVHeatConfig, RSVHeatModel)
    model = model_class(config(**fields, layer_scale_init_value=0.5)).eval()
    for name, parameter in model.named_parameters():
        if "frequency_embedding" in name or "heat_capacity" in name:
            nn.init.normal_(parameter)
    pixel_values = torch.randn(3, 3, 64, 96)
    whole = model(pixel_values, output_hidden_states=True)
    monkeypatch.setattr("hf_rsheat.models.heat_conduction.MAX_CACHED_VALUES", 10)  # decay in rows as well
    for module in (channels_last, heat_encoder):
        monkeypatch.setattr(module, "VALUES_IN_CACHE", 700)
    monkeypatch.setattr("hf_rsheat.models.heat_conduction.VALUES_IN_CACHE", 700)
    for layer in model.modules():
        if hasattr(layer, "clear_cache"):
            layer.clear_cache()
    tiled = model(pixel_values, output_hidden_states=True)
    for one, other in zip(tiled.hidden_states, whole.hidden_states, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("post_norm", [False, True])
@torch.no_grad()
def test_hooks_see_whole_and_final_tensors_and_change_nothing(post_norm):
    config = VHeatConfig(image_size=64, hidden_sizes=(16, 24, 32, 40), depths=(1, 1, 1, 1), post_norm=post_norm)
    model, pixel_values = VHeatModel(config).eval(), torch.randn(2, 3, 64, 64)
    expected = model(pixel_values).pooler_output
    seen: list[tuple[str, torch.Tensor, torch.Tensor]] = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.LayerNorm, nn.Linear, nn.Conv2d, heat_encoder.HeatMLP, heat_encoder.HeatConduction)):
            module.register_forward_hook(lambda m, i, o, name=name: seen.append((name, o, o.clone())))
    torch.testing.assert_close(model(pixel_values).pooler_output, expected, atol=1e-5, rtol=1e-5)
    for name, kept, copied in seen:
        assert torch.equal(kept, copied), f"the output of {name} was written over"
    mlp = [copied for name, _, copied in seen if name.endswith("layers.0.mlp")]
    assert [tuple(output.shape) for output in mlp] == [(2, 16, 16, 16), (2, 8, 8, 24), (2, 4, 4, 32), (2, 2, 2, 40)]
