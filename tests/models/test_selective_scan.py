"""The selective scan is the exact recurrence, in every backend, with exact gradients and little memory."""

import logging
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from hf_rsheat.models import selective_scan as module
from hf_rsheat.models import selective_scan_chunks as chunks
from hf_rsheat.models.selective_scan import ScanBackendError, choose_implementation, selective_scan
from hf_rsheat.models.selective_scan_traced import TRACED_CHUNK, chunk_scan_graph

CASES = ["L1", "L7", "L64", "L64_nogate", "L64_noD", "L64_plain", "L257", "L257_bigdt", "L257_tinydt"]
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def recurrence(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, initial_state=None):
    """One step after the other, as the equations say."""
    delta = delta if delta_bias is None else delta + delta_bias[:, None]
    dt = F.softplus(delta) if delta_softplus else delta
    state, outputs = u.new_zeros(u.shape[0], *A.shape) if initial_state is None else initial_state, []
    for t in range(u.shape[2]):
        state = torch.exp(dt[:, :, t, None] * A) * state + (dt * u)[:, :, t, None] * B[:, None, :, t]
        outputs.append((state * C[:, None, :, t]).sum(-1))
    y = torch.stack(outputs, -1)
    y = y if D is None else y + D[:, None] * u
    return (y if z is None else y * F.silu(z)), state


def arguments(batch=2, channels=3, state=2, length=7, dtype=torch.float64, requires_grad=False) -> dict:
    values = {
        "u": torch.randn(batch, channels, length, dtype=dtype),
        "delta": torch.randn(batch, channels, length, dtype=dtype),
        "A": -3 * torch.rand(channels, state, dtype=dtype),
        "B": torch.randn(batch, state, length, dtype=dtype),
        "C": torch.randn(batch, state, length, dtype=dtype),
        "D": torch.randn(channels, dtype=dtype),
        "z": torch.randn(batch, channels, length, dtype=dtype),
        "delta_bias": torch.randn(channels, dtype=dtype),
        "initial_state": torch.randn(batch, channels, state, dtype=dtype),
    }
    return {name: value.requires_grad_(requires_grad) for name, value in values.items()}


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of two or three steps, so that short sequences cross many boundaries."""
    monkeypatch.setattr(chunks, "MIN_CHUNK", 2)
    monkeypatch.setattr(chunks, "CHUNK_STATES", 36)


@pytest.fixture(scope="module")
def reference(golden):
    return load_file(golden / "rs4d/selective_scan.safetensors")


@pytest.mark.parametrize("backend", ["torch", "associative"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("case", CASES)
def test_every_golden_case_is_inside_its_tolerance(reference, case, dtype, tolerance, backend):
    inputs = {name: reference[f"{case}.{name}"].to(dtype) for name in NAMES if f"{case}.{name}" in reference}
    y, state = selective_scan(**inputs, delta_softplus=case != "L64_plain", return_last_state=True, backend=backend)
    assert y.dtype == state.dtype == dtype
    for actual, name in ((y, "y"), (state, "last_state")):
        expected = reference[f"{case}.{name}"]
        assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def test_the_traced_scan_is_exact_where_decays_underflow(reference):
    case = {name: reference[f"L257_bigdt.{name}"] for name in NAMES}
    swapped = {n: v.transpose(1, 2) if v.ndim == 3 else v for n, v in case.items()}
    y, state = chunk_scan_graph(chunks.ScanArguments(**swapped, initial_state=None, delta_softplus=True))
    expected = reference["L257_bigdt.y"]
    assert (y.transpose(1, 2) - expected).abs().max() <= 2e-6 * expected.abs().max()
    torch.testing.assert_close(state, reference["L257_bigdt.last_state"].float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tile", [2**15, 12, 4, 1])
@pytest.mark.parametrize("length", [1, 2, 7, 12])
def test_chunks_and_tiles_change_nothing(small_chunks, monkeypatch, tile, length):
    monkeypatch.setattr(chunks, "TILE_STATES", tile)
    inputs = arguments(length=length)
    y, state = selective_scan(**inputs, delta_softplus=True, return_last_state=True)
    expected_y, expected_state = recurrence(**inputs, delta_softplus=True)
    torch.testing.assert_close(y, expected_y, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(state, expected_state, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("tile", [2**15, 12, 4])
def test_gradients_are_exact(small_chunks, monkeypatch, tile):
    monkeypatch.setattr(chunks, "TILE_STATES", tile)
    inputs = arguments(requires_grad=True)
    names, values = list(inputs), tuple(inputs.values())

    def scan(*tensors):
        return selective_scan(**dict(zip(names, tensors, strict=True)), delta_softplus=True, return_last_state=True)

    assert torch.autograd.gradcheck(scan, values)


def test_gradients_are_exact_with_the_least_arguments(small_chunks):
    inputs = arguments(requires_grad=True)
    names = ("u", "delta", "A", "B", "C")
    assert torch.autograd.gradcheck(lambda *x: selective_scan(*x), tuple(inputs[name] for name in names))


def test_float32_gradients_agree_with_autograd_through_the_recurrence():
    inputs = arguments(channels=8, state=4, length=300, dtype=torch.float32, requires_grad=True)
    weights = torch.randn(2, 8, 300)
    expected = torch.autograd.grad(
        (recurrence(**inputs, delta_softplus=True)[0] * weights).sum(), list(inputs.values())
    )
    actual = torch.autograd.grad((selective_scan(**inputs, delta_softplus=True) * weights).sum(), list(inputs.values()))
    for name, a, b in zip(inputs, actual, expected, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max(), name


def test_backward_keeps_the_inputs_and_one_state_per_chunk():
    inputs = arguments(channels=64, state=16, length=512, dtype=torch.float32, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        selective_scan(**inputs, delta_softplus=True)
    states = 2 * 64 * 16
    kept = sum(saved) - sum(tensor.numel() for tensor in inputs.values())
    assert kept == states * -(-512 // chunks.chunk_length(states, 512))
    assert kept < 512 * states / 16


def test_a_sequence_can_be_cut_in_two_with_the_state_carried_over():
    inputs = arguments(length=20)
    whole, last = selective_scan(**inputs, delta_softplus=True, return_last_state=True)
    state, parts = inputs["initial_state"], []
    for part in (slice(0, 9), slice(9, 20)):
        cut = {name: value[..., part] if value.ndim == 3 else value for name, value in inputs.items()}
        cut["initial_state"] = state
        y, state = selective_scan(**cut, delta_softplus=True, return_last_state=True)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, -1), whole)
    torch.testing.assert_close(state, last)


def test_any_memory_layout_gives_the_same():
    inputs = arguments(channels=8, length=33, dtype=torch.float32)
    channels_last = {n: v.transpose(1, 2).contiguous().transpose(1, 2) if v.ndim == 3 else v for n, v in inputs.items()}
    y, expected = (selective_scan(**x, delta_softplus=True) for x in (channels_last, inputs))
    torch.testing.assert_close(y, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_are_float32_with_half_precision_inputs_and_under_autocast(dtype):
    inputs = {name: value.to(dtype) for name, value in arguments(length=64, dtype=torch.float32).items()}
    wide = {name: value.float() for name, value in inputs.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = selective_scan(**inputs, delta_softplus=True, return_last_state=True)
        exact, _ = selective_scan(**wide, delta_softplus=True, return_last_state=True)
    assert y.dtype == dtype
    assert state.dtype == torch.float32
    torch.testing.assert_close(exact, recurrence(**wide, delta_softplus=True)[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(y, exact.to(dtype))


def test_gradients_keep_the_dtypes_of_the_inputs():
    inputs = {n: v.to(torch.bfloat16).requires_grad_() for n, v in arguments(dtype=torch.float32).items()}
    selective_scan(**inputs, delta_softplus=True).float().sum().backward()
    assert {tensor.grad.dtype for tensor in inputs.values()} == {torch.bfloat16}


def test_the_traced_graph_does_not_grow_with_the_number_of_tokens():
    class Scan(torch.nn.Module):
        def forward(self, u, delta, A, B, C):
            return selective_scan(u, delta, A, B, C)

    nodes = []
    for length in (2 * TRACED_CHUNK, 40 * TRACED_CHUNK):
        inputs = arguments(length=length, dtype=torch.float32)
        program = torch.export.export(Scan(), tuple(inputs[n] for n in ("u", "delta", "A", "B", "C")))
        nodes.append(len(list(program.graph.nodes)))
    assert nodes[0] == nodes[1] < 60


@pytest.mark.parametrize(
    ("name", "shape"),
    [("delta", (2, 3, 6)), ("A", (4, 2)), ("B", (2, 3, 7)), ("D", (4,)), ("initial_state", (2, 2, 3))],
)
def test_shapes_that_do_not_fit_are_named(name, shape):
    with pytest.raises(ValueError, match=f"`{name}`|`A`|`B`|`delta`"):
        selective_scan(**{**arguments(), name: torch.zeros(shape, dtype=torch.float64)})


def test_an_absent_backend_is_an_error_and_never_replaced():
    inputs = arguments(dtype=torch.float32)
    with pytest.raises(ScanBackendError, match="CUDA tensors"):
        selective_scan(**inputs, backend="kernels")
    with pytest.raises(ScanBackendError, match="choose one of auto, torch, associative, kernels"):
        selective_scan(**inputs, backend="mamba")


@pytest.mark.parametrize(
    ("backend", "device", "traced", "exported", "has_state", "chosen"),
    [
        ("auto", "cpu", False, False, False, "chunks"),
        ("auto", "cpu", True, False, False, "scan graph"),
        ("auto", "cuda", True, False, False, "associative"),
        ("auto", "cuda", True, True, False, "scan graph"),
        ("auto", "cuda", False, False, True, "chunks"),
        ("torch", "cuda", False, False, False, "chunks"),
        ("torch", "cuda", True, False, False, "scan graph"),
        ("associative", "cpu", False, False, False, "associative"),
    ],
)
def test_backends_are_chosen_by_rule(backend, device, traced, exported, has_state, chosen):
    assert choose_implementation(backend, device, traced, exported, has_state) == chosen


@pytest.fixture
def clean_choices():
    """Nothing said or loaded before, and nothing of this test afterwards."""
    for cached in (module._say_once, module._kernel_scan):
        cached.cache_clear()
    yield
    for cached in (module._say_once, module._kernel_scan):
        cached.cache_clear()


def test_the_choice_is_said_once(clean_choices, caplog):
    caplog.set_level(logging.INFO, logger=module.__name__)
    for _ in range(3):
        selective_scan(**arguments(), backend="torch")
    assert [record.getMessage() for record in caplog.records] == [
        "Selective scan on cpu: scan_backend='torch' uses 'chunks'."
    ]


def test_cuda_without_kernels_is_warned_about_and_asking_for_them_fails(clean_choices, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "kernels", None)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert choose_implementation("auto", "cuda", False, False, False) == "chunks"
    assert "pip install kernels" in caplog.text
    with pytest.raises(ScanBackendError, match="scan_backend='torch'"):
        choose_implementation("kernels", "cuda", False, False, False)


def test_kernels_get_the_arguments_mamba_ssm_documents(clean_choices, monkeypatch):
    """A stand-in with the signature of mamba-ssm's `selective_scan_fn`; the real kernels need a GPU."""

    def selective_scan_fn(
        u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
    ):
        assert all(x.is_contiguous() for x in (u, delta, B, C, z))
        assert return_last_state
        return recurrence(u, delta, A, B, C, D, z, delta_bias, delta_softplus)

    asked = []
    hub = types.SimpleNamespace(selective_scan_fn=selective_scan_fn)
    kernels = types.SimpleNamespace(get_kernel=lambda name, **options: asked.append((name, options)) or hub)
    monkeypatch.setitem(sys.modules, "kernels", kernels)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object())
    assert choose_implementation("auto", "cuda", False, False, False) == "kernels"
    assert asked == [("kernels-community/mamba-ssm", {"version": 4})]
    monkeypatch.setattr(module, "choose_implementation", lambda *_: "kernels")
    inputs = arguments(length=9, dtype=torch.float32)
    del inputs["initial_state"]
    y, state = selective_scan(**inputs, delta_softplus=True, return_last_state=True)
    expected_y, expected_state = recurrence(**inputs, delta_softplus=True)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(state, expected_state)
