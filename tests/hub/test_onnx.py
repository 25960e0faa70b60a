"""`hf-rsheat export --format onnx` writes a file that computes what PyTorch computes, at other batches and sizes."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_rsheat.errors import ConfigurationError, MissingExtraError, VerificationError
from hf_rsheat.hub import onnx as hub_onnx
from hf_rsheat.hub.onnx import TOLERANCE, compare, export_onnx, write_onnx
from tests.hub.graphs import GRAPHS, lively
from tests.zoo import ZOO, main_output

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(autouse=True)
def _quiet():
    torch.manual_seed(0)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)


def test_a_heat_classifier_runs_with_any_batch_height_and_width(tmp_path):
    import onnxruntime

    model = lively("vheat-classifier")
    exported = write_onnx(model, tmp_path / "model.onnx")
    program = exported.program.module()

    def run(images):
        return [program(pixel_values=torch.from_numpy(images))["logits"].numpy()]

    for differences in (
        hub_onnx._compare(exported.model, tmp_path / "model.onnx", exported.shapes),
        compare(exported.model, run, exported.shapes, tmp_path),
    ):
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
    pools = [[m for m in each.modules() if isinstance(m, nn.AdaptiveAvgPool2d)] for each in (model, free)]
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


@pytest.mark.parametrize("name", GRAPHS)
def test_outputs_of_the_models_tell_images_apart(name):
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = main_output(ZOO[name], lively(name)(images))
    assert output.std(0).max() > 0.05 * output.abs().max()


def test_weights_in_bfloat16_are_written_in_float32_and_the_model_stays_as_it_is(tmp_path, caplog):
    import onnxruntime

    model = lively("selective-mae-classifier").to(torch.bfloat16).train()
    expected = copy.deepcopy(model).float().eval()
    assert export_onnx(model, tmp_path / "model.onnx")["logits"] < TOLERANCE
    assert "bfloat16: the graph holds them, and computes, in float32" in caplog.text
    assert model.training
    assert all(p.requires_grad and p.dtype == torch.bfloat16 for p in model.parameters())
    session, pixel_values = onnxruntime.InferenceSession(str(tmp_path / "model.onnx")), torch.randn(2, 3, 64, 64)
    (logits,) = session.run(None, {"pixel_values": pixel_values.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), expected(pixel_values).logits, atol=1e-4, rtol=1e-4)


def test_a_file_that_computes_something_else_is_refused(tmp_path):
    class Mean(nn.Module):
        def forward(self, pixel_values):
            return {"mean": pixel_values.mean((2, 3))}

    class Shifted(Mean):
        def forward(self, pixel_values):
            return {"mean": super().forward(pixel_values)["mean"] + 1e-3}

    names = {"input_names": ["pixel_values"], "output_names": ["mean"]}
    example = {"pixel_values": torch.randn(1, 3, 64, 64)}
    torch.onnx.export(Mean(), (), tmp_path / "mean.onnx", kwargs=example, **names, dynamo=True, verbose=False)
    assert hub_onnx._compare(Mean(), tmp_path / "mean.onnx", [(1, 3, 64, 64)])["mean"] < TOLERANCE
    with pytest.raises(VerificationError, match="not kept"):
        hub_onnx._compare(Shifted(), tmp_path / "mean.onnx", [(1, 3, 64, 64)])


def test_pretraining_models_detectors_and_unknown_sensors_are_refused_before_any_work(tmp_path):
    with pytest.raises(ConfigurationError, match="AutoModel"):
        export_onnx(ZOO["rs-vheat-pretraining"].model(), tmp_path / "model.onnx")
    with pytest.raises(ConfigurationError, match="backbone"):
        export_onnx(ZOO["rs4d-instances"].model(), tmp_path / "model.onnx")
    with pytest.raises(ConfigurationError, match="thermal"):
        export_onnx(ZOO["rs-vheat"].model(), tmp_path / "model.onnx", modality="thermal")
    assert not (tmp_path / "model.onnx").exists()


def test_a_refused_graph_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "new" / "model.onnx"
    exported = hub_onnx.Exported(torch.nn.Identity(), None, ())
    monkeypatch.setattr(hub_onnx, "write_onnx", lambda model, path, **_: path.write_text("graph") and exported)
    monkeypatch.setattr(hub_onnx, "_compare", lambda *_: {"logits": 0.0})
    assert export_onnx(None, path) == {"logits": 0.0}

    def refuse(*_):
        raise VerificationError("differs")

    monkeypatch.setattr(hub_onnx, "_compare", refuse)
    monkeypatch.setattr(hub_onnx, "write_onnx", lambda model, path, **_: path.write_text("wrong") and exported)
    with pytest.raises(VerificationError):
        export_onnx(None, path)
    assert path.read_text() == "graph"
    assert [each.name for each in path.parent.iterdir()] == ["model.onnx"]


def test_fused_models_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="made of"):
        export_onnx(ZOO["vheat"].model().fuse(), tmp_path / "model.onnx")


def test_quantised_weights_are_refused(tmp_path):
    class EightBit(nn.Parameter):
        """A tensor subclass, as torchao's."""

    model = ZOO["selective-mae"].model()
    linear = next(module for module in model.modules() if isinstance(module, nn.Linear))
    linear.weight = EightBit(linear.weight.detach())
    with pytest.raises(ConfigurationError, match="made of"):
        export_onnx(model, tmp_path / "model.onnx")


def test_without_the_extra_the_message_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"hf_rsheat\[onnx\]"):
        export_onnx(ZOO["vheat"].model(), tmp_path / "model.onnx")
