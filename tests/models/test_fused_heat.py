"""Fused heat models answer as the models they are made of, and refuse what only those can do."""

import copy

import pytest
import torch
from torch import nn

from hf_rsheat.models import fused_heat
from hf_rsheat.models.fused_heat import FusedHeatEncoder, is_fused
from hf_rsheat.models.modeling_rs_vheat import RSVHeatModel
from hf_rsheat.models.modeling_vheat import VHeatBackbone, VHeatForImageClassification, VHeatModel

SIZES = {"image_size": 64, "hidden_sizes": (16, 24), "depths": (1, 2)}


def heat_model(model_class: type = VHeatModel, **fields) -> nn.Module:
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**SIZES, **fields)).eval()
    for name, parameter in model.named_parameters():
        if any(
            part in name for part in ("frequency_embedding", "heat_capacity", "to_diffusivity", "layer_scale", "norm")
        ):
            nn.init.normal_(parameter)  # at initialisation heat hardly flows, and norms change nothing
    return model


def outputs(model: nn.Module, pixel_values: torch.Tensor) -> list[torch.Tensor]:
    return list(model(pixel_values, output_hidden_states=True).hidden_states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_class", [VHeatModel, RSVHeatModel])
@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("layer_scale", [None, 0.1])
@torch.no_grad()
def test_features_are_those_of_the_model(model_class, post_norm, layer_scale, dtype):
    model = heat_model(model_class, post_norm=post_norm, layer_scale_init_value=layer_scale).to(dtype)
    fused = model.fuse()
    assert is_fused(fused)
    assert not is_fused(model)
    tolerance = {"atol": 2e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.3, "rtol": 0.05}
    for batch, height, width in [(1, 64, 64), (3, 64, 64), (1, 24, 40), (2, 96, 33), (1, 64, 64)]:
        pixel_values = torch.randn(batch, 3, height, width).to(dtype)
        for actual, expected in zip(outputs(fused, pixel_values), outputs(model, pixel_values), strict=True):
            torch.testing.assert_close(actual, expected, **tolerance)


@torch.no_grad()
def test_bfloat16_is_as_close_to_float32_as_the_models_own():
    model, pixel_values = heat_model(VHeatForImageClassification), torch.randn(4, 3, 64, 64)
    exact = model(pixel_values).logits
    half = model.to(torch.bfloat16)
    own, fused = (m(pixel_values.bfloat16()).logits.float() - exact for m in (half, half.fuse()))
    assert fused.norm() <= 1.5 * own.norm()


@torch.no_grad()
def test_large_maps_are_worked_on_in_parts(monkeypatch):
    model, pixel_values = heat_model(RSVHeatModel), torch.randn(2, 3, 64, 64)
    expected, fused = outputs(model, pixel_values), model.fuse()
    for module in ("fused_heat", "channels_last"):
        monkeypatch.setattr(f"hf_rsheat.models.{module}.VALUES_IN_CACHE", 1000)
    monkeypatch.setattr("hf_rsheat.models.fused_heat.MAX_CACHED_VALUES", 1000)
    for actual, one in zip(outputs(fused, pixel_values), expected, strict=True):
        torch.testing.assert_close(actual, one, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_backbones_and_the_diffusivity_of_fused_models():
    model = heat_model(VHeatBackbone, out_features=["stage1", "stage2"])
    fused, pixel_values = model.fuse(), torch.randn(1, 3, 64, 64)
    for actual, expected in zip(fused(pixel_values).feature_maps, model(pixel_values).feature_maps, strict=True):
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)
    stages = (each.encoder.stages[1] for each in (fused, model))
    assert torch.equal(*(stage.diffusivity(5, 6) for stage in stages))


@torch.no_grad()
def test_the_model_it_is_made_of_stays_as_it_is():
    model = heat_model(post_norm=True, layer_scale_init_value=0.1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train().fuse()
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_copies_work():
    fused, pixel_values = heat_model().fuse(), torch.randn(1, 3, 64, 64)
    expected = fused(pixel_values).pooler_output
    copied = copy.deepcopy(fused)
    del fused
    assert torch.equal(copied(pixel_values).pooler_output, expected)


def test_it_has_no_gradients_even_where_they_are_enabled():
    assert not heat_model().fuse()(torch.randn(1, 3, 64, 64)).pooler_output.requires_grad


@torch.no_grad()
def test_autocast_changes_nothing_inside():
    fused, pixel_values = heat_model().fuse(), torch.randn(1, 3, 64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = fused(pixel_values).last_hidden_state
    torch.testing.assert_close(actual.float(), fused(pixel_values).last_hidden_state, atol=0.3, rtol=0.05)


@torch.no_grad()
def test_it_compiles():
    fused, pixel_values = heat_model().fuse(), torch.randn(1, 3, 64, 64)
    compiled = torch.compile(fused, backend="eager")
    torch.testing.assert_close(compiled(pixel_values).pooler_output, fused(pixel_values).pooler_output)
    torch._dynamo.reset()


@pytest.mark.parametrize("forbidden", ["train", "to", "half", "save", "fuse", "export"])
def test_what_only_the_model_can_do(forbidden, tmp_path):
    fused = heat_model().fuse()
    act = {
        "train": fused.train,
        "to": lambda: fused.to("meta"),
        "half": fused.half,
        "save": lambda: fused.save_pretrained(tmp_path),
        "fuse": fused.fuse,
        "export": lambda: torch.export.export(fused, (torch.randn(1, 3, 64, 64),)),
    }[forbidden]
    with pytest.raises(ValueError, match="fused"):
        act()
    assert not list(tmp_path.glob("*.safetensors"))
    assert torch.isfinite(fused(torch.randn(1, 3, 64, 64)).pooler_output).all()


def test_moving_it_nowhere_is_no_move():
    fused = heat_model().fuse()
    assert isinstance(fused.eval().to("cpu").to(torch.float32).encoder, FusedHeatEncoder)


def test_models_that_cannot_be_fused_say_what_to_do():
    with pytest.raises(ValueError, match="float64"):
        heat_model().double().fuse()
    hooked = heat_model()
    hooked.encoder.stages[0].layers[0].mlp.fc1.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="hooks"):
        hooked.fuse()
    adapted = heat_model()
    adapted.encoder.stages[0].layers[0].mlp.fc1 = nn.Sequential(nn.Linear(16, 64))
    with pytest.raises(ValueError, match="adapters"):
        adapted.fuse()


def test_operators_that_changed_their_meaning_are_not_used(monkeypatch):
    assert fused_heat._has_packed_operators.__wrapped__()
    monkeypatch.setattr(fused_heat.PackedLinear, "plus", lambda self, x, residual: self(x))
    assert not fused_heat._has_packed_operators.__wrapped__()
    monkeypatch.setattr(fused_heat, "_has_packed_operators", lambda: False)
    with pytest.raises(ValueError, match="oneDNN"):
        heat_model().fuse()
