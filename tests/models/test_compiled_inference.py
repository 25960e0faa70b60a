"""Compiled for inference on a CPU, heat models call our kernels as operators, and stay right in every way."""

import importlib
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_rsheat.models import channels_last, heat_conduction
from hf_rsheat.models.configuration_rs_vheat import RSVHeatConfig
from hf_rsheat.models.configuration_vheat import VHeatConfig
from hf_rsheat.models.modeling_rs_vheat import RSVHeatModel
from hf_rsheat.models.modeling_vheat import VHeatModel

SIZES = {"image_size": 64, "hidden_sizes": (16, 24), "depths": (1, 1)}
OPERATORS = {"linear", "linear_halves", "linear_gelu_linear", "depthwise_conv3x3", "strided_conv3x3", "conduct"}


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def heat_model(family: str = "vheat") -> nn.Module:
    config, model_class = (VHeatConfig, VHeatModel) if family == "vheat" else (RSVHeatConfig, RSVHeatModel)
    model = model_class(config(**SIZES)).eval()
    for name, parameter in model.named_parameters():
        if "frequency_embedding" in name or "heat_capacity" in name or "to_diffusivity" in name:
            nn.init.normal_(parameter)  # at initialisation heat hardly flows
    return model


class Recorder:
    """A backend of torch.compile that runs the graph as it is and remembers which of our operators it calls."""

    def __init__(self) -> None:
        self.graphs = 0
        self.operators: set[str] = set()

    def __call__(self, graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        self.graphs += 1
        targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        self.operators |= {target.split(".")[1] for target in targets if target.startswith("hf_rsheat.")}
        return graph


@pytest.mark.parametrize(("family", "size"), [("vheat", 64), ("rs_vheat", 96)])  # the tables' size, and another
@torch.no_grad()
def test_one_graph_calls_the_operators_and_gives_the_same_features(family, size):
    model, pixel_values, recorder = heat_model(family), torch.randn(2, 3, size, size), Recorder()
    compiled = torch.compile(model, fullgraph=True, backend=recorder)
    actual = compiled(pixel_values, output_hidden_states=True).hidden_states
    for one, other in zip(actual, model(pixel_values, output_hidden_states=True).hidden_states, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert recorder.graphs == 1
    assert {name.rstrip("_") for name in recorder.operators} == OPERATORS


@torch.inference_mode()
def test_one_graph_serves_all_sizes():
    model, recorder = heat_model(), Recorder()
    compiled = torch.compile(model, fullgraph=True, backend=recorder, dynamic=True)
    for shape in [(2, 3, 64, 96), (3, 3, 96, 64), (4, 3, 160, 128)]:
        pixel_values = torch.randn(shape)
        expected = model(pixel_values).pooler_output
        torch.testing.assert_close(compiled(pixel_values).pooler_output, expected, atol=1e-5, rtol=1e-4)
    assert recorder.graphs == 1


def test_training_is_compiled_without_them_and_has_the_same_gradients():
    model, pixel_values, recorder = heat_model(), torch.randn(2, 3, 64, 64), Recorder()
    parameters = [*model.parameters()]
    compiled = torch.compile(model, fullgraph=True, backend=recorder)
    actual = torch.autograd.grad(compiled(pixel_values).pooler_output.square().sum(), parameters)
    expected = torch.autograd.grad(model(pixel_values).pooler_output.square().sum(), parameters)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
    assert not recorder.operators


@torch.no_grad()
def test_compiled_inference_notices_changed_weights():
    model, pixel_values = heat_model(), torch.randn(2, 3, 96, 96)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    heat = model.encoder.stages[0].layers[0].heat

    def is_fresh() -> bool:
        return torch.allclose(compiled(pixel_values).pooler_output, model(pixel_values).pooler_output, atol=1e-5)

    before = compiled(pixel_values).pooler_output
    heat.to_diffusivity.weight.mul_(3)
    model.encoder.stages[1].frequency_embedding.add_(1)
    assert is_fresh()
    assert not torch.allclose(compiled(pixel_values).pooler_output, before, atol=1e-5)
    heat.to_diffusivity.weight.data.mul_(-1)
    model.clear_cache()
    assert is_fresh()


@torch.no_grad()
def test_hooks_and_adapters_are_compiled_in_their_place():
    model, pixel_values = heat_model(), torch.randn(2, 3, 64, 64)
    plain = model(pixel_values).pooler_output
    layer = model.encoder.stages[0].layers[0]
    for module in (layer.mlp.fc2, layer.heat.in_proj, layer.heat.depthwise_conv, layer.heat.to_diffusivity):
        module.register_forward_hook(lambda module, arguments, output: 2 * output)
    actual = torch.compile(model, fullgraph=True, backend="eager")(pixel_values).pooler_output
    torch.testing.assert_close(actual, model(pixel_values).pooler_output, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(actual, plain, atol=1e-3)


@torch.no_grad()
def test_operators_keep_the_promises_that_the_compiler_relies_on():
    random, x = torch.randn, torch.randn(2, 9, 6, 8)
    cases = {
        channels_last._opaque_linear: (x, random(12, 8), random(12), "gelu"),
        channels_last._opaque_linear_halves: (x, random(16, 8), None),
        channels_last._opaque_linear_gelu_linear: (x, random(24, 8), random(24), random(8, 24), random(8)),
        channels_last._opaque_depthwise_conv3x3: (x, random(8, 1, 3, 3), random(8)),
        channels_last._opaque_strided_conv3x3: (x, random(12, 8, 3, 3), None),
        heat_conduction._opaque_conduct: (x, random(4, 4, 8), random(8, 8), random(8), "bilinear"),
    }
    for operator, arguments in cases.items():
        torch.library.opcheck(operator, arguments)


def test_a_copy_of_the_file_registers_operators_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "copied_models").mkdir()
    shutil.copy(Path(channels_last.__file__), tmp_path / "copied_models")
    monkeypatch.syspath_prepend(tmp_path)
    copied = importlib.import_module("copied_models.channels_last")
    x, weight = torch.randn(4, 8), torch.randn(6, 8)
    with torch.no_grad():
        for module in (copied, channels_last):
            recorder = Recorder()
            actual = torch.compile(module.linear, fullgraph=True, backend=recorder)(x, weight)
            torch.testing.assert_close(actual, x @ weight.T, atol=1e-5, rtol=1e-5)
            assert recorder.operators == {"linear_" if module is copied else "linear"}
            torch._dynamo.reset()
    for name in ("copied_models", "copied_models.channels_last"):
        sys.modules.pop(name)
