"""The heat operator equals the original code's, and its caches never give a stale answer."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hf_rsheat.models import heat_conduction
from hf_rsheat.models.heat_conduction import (
    HeatConduction,
    conduct_heat,
    cosine_basis,
    dct2,
    decay_map,
    idct2,
    squared_frequencies,
)

VHEAT_NAMES = {
    "dwconv": "depthwise_conv",
    "linear": "in_proj",
    "to_k.0": "to_diffusivity",
    "out_norm": "out_norm",
    "out_linear": "out_proj",
    "norm1": "correction_norm",
}


def load_operator(tensors: dict, prefix: str, dim: int, correction: bool) -> HeatConduction:
    operator = HeatConduction(dim, correction=correction).eval()
    state = {}
    for key, tensor in tensors.items():
        if key.startswith(prefix):
            name, leaf = key.removeprefix(prefix).rsplit(".", 1)
            state[f"{VHEAT_NAMES[name]}.{leaf}"] = tensor
    operator.load_state_dict(state)
    return operator


@pytest.fixture
def operator() -> HeatConduction:
    torch.manual_seed(0)
    operator = HeatConduction(6)
    nn.init.normal_(operator.to_diffusivity.weight)  # at the usual initialisation the decay is almost 1
    return operator


@pytest.fixture(scope="module")
def vheat_ops(golden):
    return load_file(golden / "vheat/heat2d_ops.safetensors")


@pytest.mark.parametrize("size", [7, 10, 14])
def test_cosine_basis_is_the_originals(vheat_ops, size):
    torch.testing.assert_close(cosine_basis(size), vheat_ops[f"dct.N{size}"], atol=2e-6, rtol=0)


def test_cosine_basis_is_orthonormal_in_double_precision():
    basis = cosine_basis(37, dtype=torch.float64)
    torch.testing.assert_close(basis @ basis.T, torch.eye(37, dtype=torch.float64), atol=1e-13, rtol=0)


def test_cosine_basis_keeps_float32_accuracy_at_large_sizes():
    exact = cosine_basis(2048, dtype=torch.float64)
    assert (cosine_basis(2048).double() - exact).abs().max() < 3e-8


@pytest.mark.parametrize(("height", "width"), [(7, 7), (14, 14), (5, 9)])
def test_decay_map_is_the_originals(vheat_ops, height, width):
    decay = decay_map(torch.ones(height, width, 1))[..., 0]
    torch.testing.assert_close(decay, vheat_ops[f"decay.{height}x{width}"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", ["7x7", "5x9"])
def test_vheat_operator_is_the_originals_step_by_step(vheat_ops, size):
    tensors = {key.removeprefix(f"op.{size}."): value for key, value in vheat_ops.items() if f".{size}." in key}
    operator = load_operator(vheat_ops, "op.weights.", 8, correction=False)
    x, table = tensors["x_nchw"], tensors["freq_embed_hwc"]
    close = {"atol": 5e-6, "rtol": 0}
    with torch.no_grad():
        torch.testing.assert_close(operator.diffusivity(table), tensors["k_hwc"], **close)
        torch.testing.assert_close(operator.decay(table, x.dtype), tensors["decay_pow_k_hwc"], **close)
        signal = tensors["linear_out_nhwc"][..., :8]
        torch.testing.assert_close(dct2(signal), tensors["dct_coef_nhwc"], **close)
        torch.testing.assert_close(conduct_heat(signal, tensors["decay_pow_k_hwc"]), tensors["idct_out_nhwc"], **close)
        torch.testing.assert_close(operator.out_norm(tensors["idct_out_nhwc"]), tensors["out_norm_nhwc"], **close)
        projected = operator.out_proj(tensors["gated_nhwc"]).permute(0, 3, 1, 2)
        torch.testing.assert_close(projected, tensors["y_nchw"], **close)
        output = operator(x.permute(0, 2, 3, 1), table)
        # The original's own rounding is 4e-6 here: in double precision only that is left.
        exact = copy.deepcopy(operator).double()(x.double().permute(0, 2, 3, 1), table.double())
    torch.testing.assert_close(exact.permute(0, 3, 1, 2), tensors["y_nchw"].double(), **close)
    torch.testing.assert_close(output, exact.float(), **close)
    torch.testing.assert_close(output.permute(0, 3, 1, 2), tensors["y_nchw"], **close)


@pytest.mark.parametrize("size", ["7x7", "6x10", "1x5"])
def test_rs_vheat_operator_is_the_originals(golden, size):
    tensors = load_file(golden / "rs_vheat/heat_op.safetensors")
    operator = load_operator(tensors, "w.", 6, correction=True)
    x, table, capacity = (tensors[f"{size}.{name}"] for name in ("x", "freq_embed", "heat_capacity"))
    with torch.no_grad():
        x = x.permute(0, 2, 3, 1)
        corrected = operator.correction_norm((x + capacity).relu()).permute(0, 3, 1, 2)
        torch.testing.assert_close(corrected, tensors[f"{size}.corrected"], atol=5e-6, rtol=0)
        torch.testing.assert_close(operator.decay(table, x.dtype), tensors[f"{size}.decay_pow_k"], atol=5e-6, rtol=0)
        output = operator(x, table, capacity).permute(0, 3, 1, 2)
    torch.testing.assert_close(output, tensors[f"{size}.out"], atol=5e-6, rtol=0)


def test_rs_vheat_cosine_and_decay_maps_are_the_originals(golden):
    tensors = load_file(golden / "rs_vheat/heat_op.safetensors")
    torch.testing.assert_close(cosine_basis(6), tensors["cos_map_6"], atol=2e-6, rtol=0)
    torch.testing.assert_close(torch.exp(-squared_frequencies(6, 10)), tensors["decay_map_6x10"], atol=1e-6, rtol=0)


def test_conduction_keeps_the_mean_and_spreads_a_point():
    x = torch.zeros(1, 8, 12, 1)
    x[0, 2, 3, 0] = 1.0
    warm = conduct_heat(x, decay_map(torch.full((8, 12, 1), 2.0)))
    torch.testing.assert_close(warm.mean(), x.mean())
    assert 0 < warm[0, 2, 3, 0] < 1
    torch.testing.assert_close(conduct_heat(x, torch.ones(8, 12, 1)), x, atol=1e-6, rtol=0)


def test_dct_and_inverse_agree_on_non_square_maps():
    x = torch.randn(2, 5, 9, 3, dtype=torch.float64)
    torch.testing.assert_close(idct2(dct2(x)), x)


def test_operator_passes_gradcheck():
    operator = HeatConduction(2).double()
    nn.init.normal_(operator.to_diffusivity.weight)
    x = torch.randn(1, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    table = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(operator, (x, table))


def evaluate(operator: HeatConduction, table: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return operator.eval().decay(table, torch.float32)


def test_cache_returns_the_same_tensor_in_eval_and_none_in_training(operator):
    table = torch.randn(4, 4, 6)
    with torch.no_grad():
        operator.eval()
        assert operator.decay(table, torch.float32) is operator.decay(table, torch.float32)
        assert operator.decay(table, torch.float32) is not operator.decay(table, torch.float64)
        operator.train()
        assert operator.decay(table, torch.float32) is not operator.decay(table, torch.float32)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("fused", [True, False])
def test_cache_notices_an_optimizer_step_without_train(operator, optimizer, fused):
    table = nn.Parameter(torch.randn(4, 4, 6))
    operator.eval()
    step = optimizer([*operator.parameters(), table], lr=0.5, fused=fused)
    before = evaluate(operator, table)
    operator(torch.randn(1, 4, 4, 6), table).square().sum().backward()
    with torch.no_grad():
        operator.decay(table, torch.float32)  # fills the cache between backward and step
        step.step()
        after = operator.decay(table, torch.float32)
        assert not torch.allclose(before, after)
        torch.testing.assert_close(after, decay_map(operator.diffusivity(table)))


def test_cache_notices_in_place_edits_loads_and_swapped_parameters(operator):
    table = torch.randn(4, 4, 6)
    operator.eval()

    def is_fresh() -> bool:
        with torch.no_grad():
            return torch.equal(operator.decay(table, torch.float32), decay_map(operator.diffusivity(table)))

    assert is_fresh()
    with torch.no_grad():
        operator.to_diffusivity.weight.mul_(2)
    assert is_fresh()
    table.add_(1)
    assert is_fresh()
    other = {name: torch.randn_like(tensor) for name, tensor in operator.state_dict().items()}
    operator.load_state_dict(other)
    assert is_fresh()
    operator.load_state_dict({name: torch.randn_like(tensor) for name, tensor in other.items()}, assign=True)
    assert is_fresh()
    operator.to_diffusivity.bias = nn.Parameter(torch.ones(6))
    assert is_fresh()


def test_edits_through_data_are_seen_after_clear_cache(operator):
    table = torch.randn(4, 4, 6)
    evaluate(operator, table)
    operator.to_diffusivity.weight.data.mul_(3)
    operator.clear_cache()
    with torch.no_grad():
        torch.testing.assert_close(operator.decay(table, torch.float32), decay_map(operator.diffusivity(table)))


def test_inference_mode_does_not_poison_training(operator):
    table = nn.Parameter(torch.randn(4, 4, 6))
    x = torch.randn(1, 4, 4, 6)
    with torch.inference_mode():
        operator.eval()(x, table)
    operator(x, table).sum().backward()
    operator.train()(x, table).sum().backward()
    assert table.grad is not None


def test_large_decay_maps_are_not_kept(operator, monkeypatch):
    monkeypatch.setattr(heat_conduction, "MAX_CACHED_VALUES", 4 * 4 * 6)
    with torch.no_grad():
        operator.eval()
        small, large = torch.randn(4, 3, 6), torch.randn(4, 4, 6)
        assert operator.decay(small, torch.float32) is operator.decay(small, torch.float32)
        assert operator.decay(large, torch.float32) is not operator.decay(large, torch.float32)


def test_caches_are_neither_copied_nor_pickled_nor_saved(operator):
    table = torch.randn(4, 4, 6)
    before = set(operator.state_dict())
    evaluate(operator, table)
    assert set(operator.state_dict()) == before
    assert copy.deepcopy(operator)._decay_cache._entry is None
    assert pickle.loads(pickle.dumps(operator))._decay_cache._entry is None


def test_decay_stays_in_float32_under_autocast(operator):
    table = torch.randn(4, 4, 6)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert operator.diffusivity(table).dtype == torch.float32


def test_gradients_reach_the_decay_of_maps_worked_on_in_rows(monkeypatch):
    torch.manual_seed(0)
    operator, signal = HeatConduction(8), torch.randn(2, 12, 10, 8)  # the signal itself needs no gradient
    table = torch.randn(12, 10, 8, requires_grad=True)
    whole = torch.autograd.grad(operator.conduct([signal], table).square().sum(), table)
    monkeypatch.setattr("hf_rsheat.models.heat_conduction.MAX_CACHED_VALUES", 16)
    monkeypatch.setattr("hf_rsheat.models.heat_conduction.VALUES_IN_CACHE", 640)
    in_rows = torch.autograd.grad(operator.conduct([signal], table).square().sum(), table)
    torch.testing.assert_close(in_rows, whole)
