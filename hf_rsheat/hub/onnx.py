"""`hf-rsheat export --format onnx`: one file that runs in onnxruntime, with any batch, height and width."""

import copy
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from ..errors import ConfigurationError, MissingExtraError, VerificationError
from ..models.fused_heat import is_fused
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


def _pooled(x: torch.Tensor, cells: tuple[int, int]) -> torch.Tensor:
    """Adaptive average pooling, which ONNX lacks, as two products with matrices made from the size."""
    return _pooling(cells[0], x.shape[2], x) @ x @ _pooling(cells[1], x.shape[3], x).T


def _pooling(cells: int, size: int, like: torch.Tensor) -> torch.Tensor:
    """`(cells, size)`: row i averages positions floor(i size / cells) up to ceil((i + 1) size / cells)."""
    position, cell = torch.arange(size, device=like.device), torch.arange(cells, device=like.device)[:, None]
    first, behind = cell * size // cells, ((cell + 1) * size + cells - 1) // cells
    inside = (position >= first) & (position < behind)
    return inside.to(like.dtype) / (behind - first).to(like.dtype)


def _in_float32(model: PreTrainedModel) -> PreTrainedModel:
    """A copy to run and to record: on the CPU, without gradients, and in float32, which every runtime computes in."""
    if model.dtype != torch.float32:
        name = str(model.dtype).removeprefix("torch.")
        logger.warning("The weights are %s: the graph holds them, and computes, in float32.", name)
    return copy.deepcopy(model).cpu().float().requires_grad_(False).eval()


def _with_free_pools(model: PreTrainedModel) -> PreTrainedModel:
    """A model whose pools (UPerNet's) are written out; UPerNet keeps them in lists, so they stay the same modules."""
    if not any(isinstance(module, nn.AdaptiveAvgPool2d) for module in model.modules()):
        return model
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.AdaptiveAvgPool2d):
            size: Any = module.output_size
            module.forward = partial(_pooled, cells=(size, size) if isinstance(size, int) else size)  # type: ignore
    return model


@dataclass(frozen=True)
class Exported:
    """What was written, and how to check it.

    Attributes:
        model: What PyTorch computes in float32: `(batch, channels, height, width)` to a dictionary of tensors.
        program: The same as `torch.export` sees it, for any batch, height and width. RS4D's refuses numbers of patches
            that its scan pads otherwise than in the example; the ONNX graph takes all.
        shapes: Shapes of images that the file must be right for.
    """

    model: nn.Module
    program: torch.export.ExportedProgram
    shapes: tuple[tuple[int, ...], ...]


def export_onnx(
    model: PreTrainedModel, path: Path, *, image_size: int | None = None, modality: str | None = None
) -> dict[str, float]:
    """Write a model as ONNX, for any batch, height and width, and run it beside PyTorch.

    Args:
        model: Backbone, plain model, classifier or UPerNet, on any device; stays as it is. Weights in bfloat16 or
            float16 are written in float32, with a warning.
        path: File to write.
        image_size: Side in pixels of the images that it is checked with; the config's if `None`.
        modality: Sensor of the images (RS-vHeat).

    Returns:
        Per output the largest difference from PyTorch's, as a share of its largest value.

    Raises:
        ConfigurationError: A pretraining model, whose random masks have no place in a graph, a detector, or a fused
            or quantised model.
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed (extra `onnx`).
        VerificationError: The runtime's outputs are not PyTorch's.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # a file that is refused never gets the name
        draft = Path(folder) / path.name
        exported = write_onnx(model, draft, image_size=image_size, modality=modality)
        differences = _compare(exported.model, draft, exported.shapes)
        draft.replace(path)
    logger.info("Wrote %s: batch, height and width free.", path)
    return differences


def write_onnx(
    model: PreTrainedModel, path: Path, *, image_size: int | None = None, modality: str | None = None
) -> Exported:
    """[`export_onnx`] without the check."""
    _check_exportable(model)
    _require_onnx()
    options = {} if modality is None else {"modality": modality}
    config = getattr(model.config, "backbone_config", None) or model.config
    side, channels = image_size or _side(config), _channels(config, modality)
    model = _in_float32(model)
    wrapped = _Outputs(model, options).eval()
    # Unequal and odd multiples, so that no two dimensions are taken for one.
    example = {"pixel_values": torch.randn(2, channels, side, side + 32)}
    free = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    graph = _Outputs(_with_free_pools(model), options).eval()
    program = torch.export.export(graph, (), example, dynamic_shapes={"pixel_values": free})
    torch.onnx.export(
        program,
        (),
        path,
        kwargs=example,
        input_names=["pixel_values"],
        output_names=[name for name, _ in _tensors(wrapped(**example))],
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    sizes = ((1, side, side), (3, side, side), (1, side + 32, max(32, side - 19)))
    return Exported(wrapped, program, tuple((batch, channels, height, width) for batch, height, width in sizes))


def export_folder_onnx(folder: Path, path: Path, **options: Any) -> dict[str, float]:
    """[`export_onnx`] of the model in a folder, as its config names it."""
    model, _ = load_folder(folder)
    return export_onnx(model, path, **options)


def _check_exportable(model: PreTrainedModel) -> None:
    kind = type(model).__name__
    if "ForPreTraining" in kind or "ForDistillation" in kind:
        raise ConfigurationError(
            f"{kind} draws random masks: load the folder with AutoModel, or export a fine-tuned model."
        )
    if "ForInstanceSegmentation" in kind:
        raise ConfigurationError(f"{kind} returns as many objects as it finds: export its backbone (model.backbone).")
    if is_fused(model):
        raise ConfigurationError("A fused model runs here only: export the model that it was made of.")
    if any(type(parameter) is not nn.Parameter for parameter in model.parameters()):
        raise ConfigurationError(
            "Quantised weights cannot be exported: export the model that they were made of; onnxruntime and OpenVINO "
            "have tools that quantise its graph."
        )


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
    return compare(model, lambda images: session.run(None, {"pixel_values": images}), shapes, path)


def compare(
    model: nn.Module,
    run: Callable[[NDArray[np.float32]], Sequence[NDArray[np.float32]]],
    shapes: Sequence[tuple[int, ...]],
    path: Path,
) -> dict[str, float]:
    """Run another runtime beside PyTorch on random images.

    Args:
        model: Images to a dictionary of tensors.
        run: The runtime: images to the same tensors in the same order.
        shapes: Shapes of the images.
        path: The file that `run` runs.

    Returns:
        Per output the largest difference, as a share of its largest value.

    Raises:
        VerificationError: It is more than `TOLERANCE`.
    """
    generator = torch.Generator().manual_seed(0)
    worst: dict[str, float] = {}
    for shape in shapes:
        pixel_values = torch.randn(shape, generator=generator)
        with torch.no_grad():
            expected = model(pixel_values)
        for (name, one), other in zip(expected.items(), run(pixel_values.numpy()), strict=True):
            scale = max(one.abs().max().item(), torch.finfo(one.dtype).tiny)
            difference = (one - torch.from_numpy(other)).abs().max().item() / scale
            worst[name] = max(worst.get(name, 0.0), difference)
    for name, difference in worst.items():
        if not difference <= TOLERANCE:
            raise VerificationError(
                f"{path.name}: '{name}' differs from PyTorch's by {difference:.1e}; it is not kept."
            )
    return worst
