"""Weights that are no plain tensors (int8 of torchao and others) work in every model, through transformers' own way."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_rsheat.models.channels_last import apply_linear
from tests.zoo import ZOO, main_output


class EightBit(torch.Tensor):
    """A quantised weight as torchao's are: a tensor subclass that works in `F.linear` but not in other kernels."""

    REFUSED = ("_linear_pointwise", "conv2d", "matmul", "chunk", "__getitem__", "view")

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if any(name in str(function) for name in cls.REFUSED):
            raise NotImplementedError(f"{function} is unknown to quantised weights.")
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
        return result.as_subclass(cls) if function is torch.Tensor.to else result


def quantise(linear: nn.Linear) -> None:
    scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
    values = (linear.weight.detach() / scale).round() * scale
    del linear.weight
    linear.weight = values.as_subclass(EightBit)


@pytest.mark.parametrize("name", ["vheat-classifier", "rs-vheat", "rs4d-classifier", "selective-mae-classifier"])
@torch.no_grad()
def test_models_reach_quantised_weights_through_linear_only(name):
    model, pixel_values = ZOO[name].model(), torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = main_output(ZOO[name], model(pixel_values))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            quantise(module)
    actual = main_output(ZOO[name], model(pixel_values))
    assert 0 < (actual - expected).norm() / expected.norm() < 0.05


@torch.no_grad()
def test_activations_follow_a_quantised_linear():
    linear, x = nn.Linear(8, 6), torch.randn(3, 8)
    expected = F.gelu(linear(x))
    quantise(linear)
    torch.testing.assert_close(apply_linear(linear, x, "gelu"), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("name", ZOO)
def test_the_input_layer_that_transformers_asks_for_is_the_first_convolution(name):
    layer = ZOO[name].model().get_input_embeddings()
    assert isinstance(layer, nn.Conv2d)
    assert layer.in_channels == 3
