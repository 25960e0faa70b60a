"""`hf-rsheat export --format openvino` writes what OpenVINO computes as PyTorch does, at other batches and sizes."""

import logging
import sys

import pytest
import torch

from hf_rsheat.errors import ConfigurationError, MissingExtraError
from hf_rsheat.hub.onnx import TOLERANCE
from hf_rsheat.hub.openvino import export_openvino
from tests.hub.graphs import lively
from tests.zoo import ZOO


def test_a_heat_classifier_runs_with_any_batch_height_and_width(tmp_path):
    openvino = pytest.importorskip("openvino")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    model = lively("vheat-classifier")
    differences = export_openvino(model, tmp_path / "model.xml")
    assert set(differences) == {"logits"}
    assert differences["logits"] < TOLERANCE
    assert (tmp_path / "model.bin").stat().st_size > 3 * sum(p.numel() for p in model.parameters())
    compiled = openvino.compile_model(tmp_path / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    pixel_values = torch.randn(3, 3, 40, 77, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(pixel_values).logits
    actual = torch.from_numpy(compiled(pixel_values.numpy())["logits"])
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_another_ending_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"\.xml"):
        export_openvino(ZOO["vheat"].model(), tmp_path / "model.onnx")


def test_without_the_extra_the_message_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r"hf_rsheat\[openvino\]"):
        export_openvino(ZOO["vheat"].model(), tmp_path / "model.xml")
