"""`hf-rsheat export --format openvino`: OpenVINO's own format, for Intel processors, from our ONNX graph."""

import logging
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..errors import ConfigurationError, MissingExtraError
from .export import load_folder
from .onnx import compare, write_onnx

logger = logging.getLogger(__name__)


def export_openvino(
    model: PreTrainedModel, path: Path, *, image_size: int | None = None, modality: str | None = None
) -> dict[str, float]:
    """Write `path` (.xml) and its weights beside it (.bin), float32, and run them beside PyTorch in float32.

    OpenVINO computes in bfloat16 or float16 where the processor has it, unless it is compiled with
    `{"INFERENCE_PRECISION_HINT": "f32"}`; the check asks for float32.

    Args:
        model, image_size, modality: See [`export_onnx`].
        path: File to write; its name ends in `.xml`.

    Returns:
        Per output the largest difference from PyTorch's, as a share of its largest value.

    Raises:
        ConfigurationError: A name without `.xml`, or a model that [`export_onnx`] refuses.
        MissingExtraError: OpenVINO or what writes ONNX is not installed (extra `openvino`).
        VerificationError: OpenVINO's outputs are not PyTorch's.
    """
    if path.suffix != ".xml":
        raise ConfigurationError(f"OpenVINO's files end in .xml, got '{path}'; the weights go beside it as .bin.")
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError("openvino", "openvino", "Exporting to OpenVINO") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # a file that is refused never gets the name
        graph, draft = Path(folder) / "model.onnx", Path(folder) / path.name
        exported = write_onnx(model, graph, image_size=image_size, modality=modality)
        openvino.save_model(openvino.convert_model(graph), draft, compress_to_fp16=False)
        compiled = openvino.compile_model(draft, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        differences = compare(exported.model, lambda images: [*compiled(images).values()], exported.shapes, draft)
        for suffix in (".bin", ".xml"):
            draft.with_suffix(suffix).replace(path.with_suffix(suffix))
    logger.info("Wrote %s and %s: batch, height and width free.", path, path.with_suffix(".bin").name)
    return differences


def export_folder_openvino(folder: Path, path: Path, **options: Any) -> dict[str, float]:
    """[`export_openvino`] of the model in a folder, as its config names it."""
    model, _ = load_folder(folder)
    return export_openvino(model, path, **options)
