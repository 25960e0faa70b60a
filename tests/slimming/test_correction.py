"""Corrections by least squares."""

import copy

import numpy as np
import pytest
import torch

from hf_rsheat.errors import ConfigurationError
from hf_rsheat.slimming import slim
from hf_rsheat.slimming.correction import NormalEquations

from .models import TRUNKS, build, images, outputs


def error(model, small) -> float:
    """Relative error of the features on images that were not calibrated on."""
    pixel_values = torch.randn(4, *images(model).shape[1:], generator=torch.Generator().manual_seed(9))
    wanted, found = (outputs(m, pixel_values)[0] for m in (model, small))
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", [*TRUNKS, "vheat-classifier", "rs4d-classifier"])
def test_ridge_comes_closer_to_the_full_model_on_other_images(name):
    model = build(name)
    calibration = list(images(model, 48).split(16))  # more positions than units, also on the coarsest map
    assert error(model, slim(model, 0.5, correction="ridge", calibration=calibration)) < error(model, slim(model, 0.5))


@pytest.mark.parametrize("intercept", [True, False])
def test_normal_equations_in_parts_solve_the_whole_problem(intercept):
    rng = np.random.default_rng(0)
    x, y = rng.normal(2, 1, size=(60, 5)), rng.normal(-1, 1, size=(60, 3))
    equations = NormalEquations(5, 3, intercept, torch.device("cpu"))
    for rows in (slice(0, 7), slice(7, 40), slice(40, 60)):
        equations.add(torch.from_numpy(x[rows]), torch.from_numpy(y[rows]))
    weight, bias = equations.solve(ridge=0.0)
    design = np.concatenate([x, np.ones((60, 1))], axis=1) if intercept else x
    expected = np.linalg.lstsq(design, y, rcond=None)[0]
    np.testing.assert_allclose(weight.numpy().T, expected[:5], atol=1e-4)
    assert (bias is None) is not intercept
    if bias is not None:
        np.testing.assert_allclose(bias.numpy(), expected[5], atol=1e-4)


def test_a_unit_that_is_always_zero_does_not_break_the_solution():
    equations = NormalEquations(3, 2, True, torch.device("cpu"))
    equations.add(torch.zeros(10, 3), torch.ones(10, 2))
    weight, bias = equations.solve()
    assert torch.equal(weight, torch.zeros_like(weight))
    torch.testing.assert_close(bias, torch.ones_like(bias))


@pytest.mark.parametrize("name", ["vheat", "rs-vheat"])
def test_affine_brings_the_norms_of_heat_operators_closer(name):
    model = build(name)
    calibration = [images(model, 4)]
    naive, affine = slim(model, 0.6), slim(model, 0.6, correction="affine", calibration=calibration)

    def norm_output(one):
        norm = one.encoder.stages[1].layers[0].heat.out_norm  # the first stage keeps its eight channels
        with torch.no_grad():
            seen = []
            hook = norm.register_forward_hook(lambda module, args, output: seen.append(output))
            one(calibration[0])
            hook.remove()
        return seen[0]

    kept = naive.config.inner_dims[1]
    full = norm_output(model)[..., :kept]
    assert (norm_output(affine) - full).norm() < (norm_output(naive) - full).norm()


def test_affine_is_refused_where_no_norm_depends_on_the_width():
    model = build("selective-mae")
    with pytest.raises(ConfigurationError, match="use 'ridge'"):
        slim(model, 0.5, correction="affine", calibration=[images(model)])


def test_calibration_leaves_modes_hooks_and_random_numbers_alone():
    model = build("vheat").train()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    small = slim(model, 0.5, keep="importance", correction="ridge", calibration=[images(model)])
    assert torch.equal(torch.rand(1), expected)
    assert [module.training for module in model.modules()] == modes
    assert all(module.training for module in small.modules())
    for module in (*model.modules(), *small.modules()):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    copy.deepcopy(small)


def test_calibration_reads_dictionaries_of_arguments_too():
    model = build("rs-vheat-pretraining")
    sar = torch.randn(4, 1, 64, 64, generator=torch.Generator().manual_seed(2))
    small = slim(model, 0.5, correction="ridge", calibration=[{"pixel_values": sar, "modality": "sar"}])
    assert small.config.slim["correction"] == "ridge"
