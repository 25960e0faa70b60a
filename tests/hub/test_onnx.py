"""`hf-rsheat export --format onnx` writes a file that computes what PyTorch computes, at other batches and sizes."""

import logging

import pytest
import torch
import torch.nn.functional as F

from hf_rsheat.errors import ConfigurationError, MissingExtraError, VerificationError
from hf_rsheat.hub import onnx as hub_onnx
from hf_rsheat.hub.onnx import TOLERANCE, export_onnx
from tests.zoo import ZOO

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

PRETRAINING = [name for name in ZOO if "pretraining" in name or "distillation" in name]
EXPORTED = [name for name in ZOO if name not in PRETRAINING and "instances" not in name]


@pytest.fixture(autouse=True)
def _quiet():
    torch.manual_seed(0)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)


def test_a_heat_classifier_runs_with_any_batch_height_and_width(tmp_path):
    import onnxruntime

    model = ZOO["vheat-classifier"].model()
    differences = export_onnx(model, tmp_path / "model.onnx")
    assert set(differences) == {"logits"}
    assert differences["logits"] < TOLERANCE
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    for shape in [(1, 3, 64, 64), (4, 3, 33, 101)]:
        pixel_values = torch.randn(shape)
        (logits,) = session.run(None, {"pixel_values": pixel_values.numpy()})
        with torch.no_grad():
            expected = model(pixel_values).logits
        torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cells", [(1, 1), (2, 3), (6, 6)])
@pytest.mark.parametrize("size", [(5, 7), (6, 12), (40, 33)])
def test_pools_written_out_are_adaptive_average_pools(size, cells):
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(hub_onnx._pooled(x, cells), F.adaptive_avg_pool2d(x, cells), atol=1e-6, rtol=1e-5)


def test_pools_are_written_out_in_a_copy_only():
    model, pixel_values = ZOO["vheat-upernet"].model(), torch.randn(1, 3, 64, 96)
    free = hub_onnx._with_free_pools(model)
    with torch.no_grad():
        torch.testing.assert_close(free(pixel_values).logits, model(pixel_values).logits, atol=1e-5, rtol=1e-4)
    pools = [[m for m in each.modules() if isinstance(m, torch.nn.AdaptiveAvgPool2d)] for each in (model, free)]
    assert [["forward" in vars(pool) for pool in each] for each in pools] == [[False] * 4, [True] * 4]


def test_a_program_of_selective_mae_is_for_any_size():
    model, dynamic = ZOO["selective-mae"].model(), torch.export.Dim.DYNAMIC
    example = {"pixel_values": torch.randn(2, 3, 64, 96)}
    program = torch.export.export(
        model, (), example, dynamic_shapes={"pixel_values": dict.fromkeys((0, 2, 3), dynamic)}
    )
    for shape in [(1, 3, 64, 64), (3, 3, 33, 101)]:
        pixel_values = torch.randn(shape)
        with torch.no_grad():
            actual, expected = (run(pixel_values=pixel_values).pooler_output for run in (program.module(), model))
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTED)
def test_every_model_runs_in_onnxruntime(name, tmp_path):
    differences = export_onnx(ZOO[name].model(), tmp_path / "model.onnx")
    assert differences
    assert max(differences.values()) < TOLERANCE


def test_a_file_that_computes_something_else_is_refused(tmp_path):
    class Mean(torch.nn.Module):
        def forward(self, pixel_values):
            return {"mean": pixel_values.mean((2, 3))}

    class Shifted(Mean):
        def forward(self, pixel_values):
            return {"mean": super().forward(pixel_values)["mean"] + 1e-3}

    names = {"input_names": ["pixel_values"], "output_names": ["mean"]}
    example = {"pixel_values": torch.randn(1, 3, 64, 64)}
    torch.onnx.export(Mean(), (), tmp_path / "mean.onnx", kwargs=example, **names, dynamo=True, verbose=False)
    assert hub_onnx._compare(Mean(), tmp_path / "mean.onnx", [(1, 3, 64, 64)])["mean"] < TOLERANCE
    with pytest.raises(VerificationError, match="do not use it"):
        hub_onnx._compare(Shifted(), tmp_path / "mean.onnx", [(1, 3, 64, 64)])


def test_pretraining_models_detectors_and_unknown_sensors_are_refused_before_any_work(tmp_path):
    with pytest.raises(ConfigurationError, match="AutoModel"):
        export_onnx(ZOO["rs-vheat-pretraining"].model(), tmp_path / "model.onnx")
    with pytest.raises(ConfigurationError, match="backbone"):
        export_onnx(ZOO["rs4d-instances"].model(), tmp_path / "model.onnx")
    with pytest.raises(ConfigurationError, match="thermal"):
        export_onnx(ZOO["rs-vheat"].model(), tmp_path / "model.onnx", modality="thermal")
    assert not (tmp_path / "model.onnx").exists()


def test_without_the_extra_the_message_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"hf_rsheat\[onnx\]"):
        export_onnx(ZOO["vheat"].model(), tmp_path / "model.onnx")
