"""`hf-rsheat export --format onnx`: one file that runs in onnxruntime, with any batch and, where it can, any size."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import ConfigurationError, MissingExtraError, VerificationError
from .export import load_folder

logger = logging.getLogger(__name__)

# Ours and the runtime's outputs may differ by this share of the largest value.
TOLERANCE = 1e-4


class _Outputs(nn.Module):
    """A model whose output is a dictionary of its tensors."""

    def __init__(self, model: PreTrainedModel, options: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(_tensors(self.model(pixel_values=pixel_values, **self.options)))


def _tensors(output: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in output.items():
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, (tuple, list)):
            yield from ((f"{name}_{index}", item) for index, item in enumerate(value))


def export_onnx(
    model: PreTrainedModel, path: Path, *, image_size: int | None = None, modality: str | None = None
) -> dict[str, float]:
    """Write a model as ONNX and run it beside PyTorch.

    The batch is free; heights and widths are too for vHeat and RS-vHeat. RS4D and SelectiveMAE, whose graph depends on
    the number of tokens, and UPerNet are written for `image_size`.

    Args:
        model: Backbone, plain model or classifier; put into eval mode.
        path: File to write.
        image_size: Side of the images in pixels for which it is written; the config's if `None`.
        modality: Sensor of the images (RS-vHeat).

    Returns:
        Per output the largest difference from PyTorch's, as a share of its largest value.

    Raises:
        ConfigurationError: A pretraining model, whose random masks have no place in a graph, or a detector.
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed (extra `onnx`).
        VerificationError: The runtime's outputs are not PyTorch's.
    """
    kind = type(model).__name__
    if "ForPreTraining" in kind or "ForDistillation" in kind:
        raise ConfigurationError(
            f"{kind} draws random masks: load the folder with AutoModel, or export a fine-tuned model."
        )
    if "ForInstanceSegmentation" in kind:
        raise ConfigurationError(f"{kind} returns as many objects as it finds: export its backbone (model.backbone).")
    _require_onnx()
    options = {} if modality is None else {"modality": modality}
    wrapped = _Outputs(model.requires_grad_(False), options).eval()
    config = getattr(model.config, "backbone_config", None) or model.config
    side = image_size or _side(config)
    channels = _channels(config, modality)
    any_size = hasattr(model.config, "table_interpolation")  # not under a UPerNet: ONNX has no adaptive pooling
    # Unequal and odd multiples, so that no two dimensions are taken for one.
    example = torch.randn(2, channels, side, side + 32) if any_size else torch.randn(2, channels, side, side)
    free = {0: torch.export.Dim.DYNAMIC}
    if any_size:
        free |= {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(
        wrapped,
        (),
        path,
        kwargs={"pixel_values": example},
        dynamic_shapes={"pixel_values": free},
        input_names=["pixel_values"],
        output_names=[name for name, _ in _tensors(wrapped(example))],
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    shapes = [(1, channels, side, side), (3, channels, side, side)]
    if any_size:
        shapes.append((1, channels, side + 32, max(32, side - 19)))
    differences = _compare(wrapped, path, shapes)
    logger.info("Wrote %s: batch%s free.", path, ", height and width" if any_size else "")
    return differences


def export_folder_onnx(folder: Path, path: Path, **options: Any) -> dict[str, float]:
    """[`export_onnx`] of the model in a folder, as its config names it."""
    model, _ = load_folder(folder)
    return export_onnx(model, path, **options)


def _require_onnx() -> None:
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("onnxscript and onnxruntime", "onnx", "Exporting ONNX") from error


def _side(config: Any) -> int:
    size = config.image_size
    return size if isinstance(size, int) else max(size)


def _channels(config: Any, modality: str | None) -> int:
    modalities = getattr(config, "modalities", None)
    if modalities is None:
        return config.num_channels
    name = modality or next(iter(modalities))
    if name not in modalities:
        raise ConfigurationError(f"The model has no modality '{name}', only {', '.join(modalities)}.")
    return modalities[name]


def _compare(model: nn.Module, path: Path, shapes: Sequence[tuple[int, ...]]) -> dict[str, float]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    worst: dict[str, float] = {}
    for shape in shapes:
        pixel_values = torch.randn(shape, generator=generator)
        with torch.no_grad():
            expected = model(pixel_values)
        actual = session.run(list(expected), {"pixel_values": pixel_values.numpy()})
        for (name, one), other in zip(expected.items(), actual, strict=True):
            scale = max(1.0, one.abs().max().item())
            difference = (one - torch.from_numpy(other)).abs().max().item() / scale
            worst[name] = max(worst.get(name, 0.0), difference)
    for name, difference in worst.items():
        if not difference <= TOLERANCE:
            raise VerificationError(f"{path}: '{name}' differs from PyTorch's by {difference:.1e}: do not use it.")
    return worst
