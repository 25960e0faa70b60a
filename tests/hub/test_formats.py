"""Which model works in which format: `pytest -m slow -s tests/hub/test_formats.py` prints the table of docs/formats.md.

Columns: largest difference from the model itself, as a share of its largest value; for int8 the relative error of the
main output. What is not installed here says so.
"""

import logging

import pytest
import torch
from torch import nn

from hf_rsheat.hub import onnx as hub_onnx
from hf_rsheat.hub.onnx import TOLERANCE, compare, write_onnx
from tests.zoo import ZOO, main_output

INT8_TOLERANCE = 0.05  # of matrices of 8 to 32 channels, worse than any real size
PRETRAINING = [name for name in ZOO if "pretraining" in name or "distillation" in name]
GRAPHS = [name for name in ZOO if name not in PRETRAINING and "instances" not in name]


@pytest.fixture(autouse=True)
def _quiet():
    torch.manual_seed(0)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def outputs(name: str, model) -> torch.Tensor:
    """The main output, of detectors the class logits from before any selection."""
    torch.manual_seed(3)
    with torch.no_grad():
        if "instances" in name:
            return model.dense_outputs(images(2, 3, 64, 64))["class_logits"]
        return main_output(ZOO[name], model(images(2, 3, 64, 64)))


def reloaded(name: str, folder) -> str:
    model = ZOO[name].model()
    model.save_pretrained(folder)
    expected = outputs(name, model)
    difference = (outputs(name, type(model).from_pretrained(folder)) - expected).abs().max() / expected.abs().max()
    assert difference < 1e-5
    return f"{difference:.0e}"


def graphs(name: str, folder) -> list[str]:
    """`torch.export`, ONNX and OpenVINO."""
    exported = write_onnx(ZOO[name].model(), folder / "model.onnx")
    module = exported.program.module()

    def run(pixel_values):
        return [x.detach().numpy() for x in module(pixel_values=torch.from_numpy(pixel_values)).values()]

    cells = [max(hub_onnx._compare(exported.model, folder / "model.onnx", exported.shapes).values())]
    if "rs4d" not in name:  # its program refuses numbers of patches that its scan pads otherwise; the graph does not
        cells.insert(0, max(compare(exported.model, run, exported.shapes, folder).values()))
    assert max(cells) < TOLERANCE
    try:
        import openvino
    except ImportError:
        return ["one size"] * (len(cells) == 1) + [*(f"{cell:.0e}" for cell in cells), "not installed"]
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(openvino.convert_model(folder / "model.onnx"), "CPU", settings)
    cells.append(max(compare(exported.model, lambda x: [*compiled(x).values()], exported.shapes, folder).values()))
    return ["one size"] * (len(cells) == 2) + [f"{cell:.0e}" for cell in cells]


def quantised(name: str, folder) -> list[str]:
    """int8 weights, and int8 activations as well, through transformers' own way; then saved and loaded."""
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
    except ImportError:
        return ["not installed"] * 2
    from transformers import TorchAoConfig

    model = ZOO[name].model()
    model.save_pretrained(folder)
    # torchao cannot quantise a matrix of one column, which only these tiny models have; SAM's decoder cuts its weights.
    skipped = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.in_features == 1]
    skipped += ["mask_head.mask_decoder"] if "prompted" in name else []
    expected, cells = outputs(name, model), []
    for kind in (Int8WeightOnlyConfig(), Int8DynamicActivationInt8WeightConfig()):
        small = type(model).from_pretrained(
            folder, quantization_config=TorchAoConfig(kind, modules_to_not_convert=skipped or None)
        )
        actual = outputs(name, small)
        small.save_pretrained(folder / "int8")
        torch.testing.assert_close(outputs(name, type(model).from_pretrained(folder / "int8")), actual)
        error = (actual - expected).norm() / expected.norm()
        assert 0 < error < INT8_TOLERANCE
        cells.append(f"{error:.0e}")
    return cells


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_every_model_in_every_format(name, tmp_path):
    cells = [reloaded(name, tmp_path)]
    cells += graphs(name, tmp_path) if name in GRAPHS else ["-"] * 3
    cells += quantised(name, tmp_path / "model")
    kind = type(ZOO[name].model()).__name__
    print(f"\n| {name} | `{kind}` | {' | '.join(cells)} |")
