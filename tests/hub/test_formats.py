"""Which model works in which format: `pytest -m slow -s tests/hub/test_formats.py` prints the table of docs/formats.md.

Columns: largest difference from the model itself, as a share of its largest value; for int8 the relative error of the
main output. What is not installed here says so.
"""

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from hf_rsheat.errors import ConfigurationError
from hf_rsheat.hub import onnx as hub_onnx
from hf_rsheat.hub.onnx import TOLERANCE, compare, write_onnx
from tests.hub.graphs import GRAPHS, lively
from tests.zoo import ZOO, main_output

INT8_TOLERANCE = 0.05  # of matrices of 8 to 32 channels, worse than any real size
COLUMNS = ["model", "class", "safetensors", "torch.export", "ONNX", "OpenVINO", "int8 weights", "int8 dynamic"]


@pytest.fixture(autouse=True)
def _quiet():
    torch.manual_seed(0)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()


@pytest.fixture(scope="module")
def table() -> Iterator[list[list[str]]]:
    """Rows to fill, printed at the end."""
    rows = [COLUMNS, ["---"] * len(COLUMNS)]
    yield rows
    print("\n", *(f"| {' | '.join(row)} |" for row in rows), sep="\n")


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
    model = lively(name)
    model.save_pretrained(folder)
    expected = outputs(name, model)
    difference = (outputs(name, type(model).from_pretrained(folder)) - expected).abs().max() / expected.abs().max()
    assert difference < 1e-5
    return f"{difference:.0e}"


def graphs(name: str, folder) -> list[str]:
    """`torch.export`, ONNX and OpenVINO, each with three batches and sizes."""
    exported = write_onnx(lively(name), folder / "model.onnx")
    module = exported.program.module()

    def run(pixel_values):
        return [x.detach().numpy() for x in module(pixel_values=torch.from_numpy(pixel_values)).values()]

    def worst(run, shapes=exported.shapes) -> str:
        difference = max(compare(exported.model, run, shapes, folder).values())
        assert difference < TOLERANCE
        return f"{difference:.0e}"

    if "rs4d" in name:  # its program refuses numbers of patches that its scan pads otherwise; the graph does not
        cells = [f"{worst(run, [(1, 3, 64, 96), (3, 3, 64, 96)])} (one size)"]
    else:
        cells = [worst(run)]
    session = hub_onnx._compare(exported.model, folder / "model.onnx", exported.shapes)
    assert max(session.values()) < TOLERANCE
    cells.append(f"{max(session.values()):.0e}")
    try:
        import openvino
    except ImportError:
        return [*cells, "not installed"]
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(openvino.convert_model(folder / "model.onnx"), "CPU", settings)
    return [*cells, worst(lambda images: [*compiled(images).values()])]


def quantised(name: str, folder) -> list[str]:
    """int8 weights, and int8 activations as well, through transformers' own way; then saved and loaded."""
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
    except ImportError:
        return ["not installed"] * 2
    from transformers import TorchAoConfig

    model = lively(name)
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
        with pytest.raises(ConfigurationError):
            write_onnx(small, folder / "model.onnx")
        small.save_pretrained(folder / "int8")
        torch.testing.assert_close(outputs(name, type(model).from_pretrained(folder / "int8")), actual)
        error = (actual - expected).norm() / expected.norm()
        assert 0 < error < INT8_TOLERANCE
        cells.append(f"{error:.0e}")
    return cells


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_every_model_in_every_format(name, tmp_path, table):
    cells = [reloaded(name, tmp_path)]
    cells += graphs(name, tmp_path) if name in GRAPHS else ["-"] * 3
    cells += quantised(name, tmp_path / "model")
    table.append([name, f"`{type(ZOO[name].model()).__name__}`", *cells])
