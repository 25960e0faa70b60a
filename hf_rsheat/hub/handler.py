"""Hosted inference: images in, JSON out.

Inference Endpoints import this file from the model's folder and call `EndpointHandler`. It needs nothing but torch,
transformers, NumPy and Pillow, and so it also stands alone on a laptop. A request:

    {"inputs": image or list of images, "parameters": {...}}

An image is the base64 text of a PNG, JPEG, TIFF, WebP, BMP or GIF file (with or without `data:image/png;base64,`), the
bytes of such a file, or a PIL image. An `https://` address is fetched only where that was allowed. Parameters:

    top_k          classifiers: how many classes, default 5
    threshold      detectors: least score of an object, 0 to 1, default 0.5
    features       true: also the pooled feature vector (models without a head always give it)
    heat_maps      true: also one small grey PNG per stage, the mean absolute feature at each position
    heat_source    [row, column] as shares of the model's input, 0 to 1: heat maps of how much the features change when
                   the patch of 16 x 16 pixels there becomes brighter by one standard deviation
    reconstruction true: RS-vHeat pretraining models also give the masked inputs and what they restore
    mask_radius    0 to 1: the same with this radius, as a share of the spectrum's diagonal
    modality       sensor of the images, for models with several
    rescale_factor from stored to pixel values, for 16-bit images: 1/10000 for reflectance, 1/65535 for full range

Classifiers answer `[{"label", "score"}, ...]`, segmenters `[{"label", "score", "mask"}, ...]` as the pipelines of
transformers do; detectors add each object's "box": left, top, right and bottom in pixels. When more is asked for, an
object with that list as "predictions". All other models answer an object with "features". A list of images gives a list
of answers. Pictures are base64 PNGs; a heat map is scaled to its own maximum; of a reconstruction with other than 3
bands, the first is shown.

A refused request answers `{"error": {"status": 4xx, "message": why}}`: look for "error" first, because a hosting server
may send it with status 200.
"""

import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers.dynamic_module_utils import get_class_from_dynamic_module

try:
    from .handler_images import Limits, RequestError, read_image, to_png
except ImportError:  # a hosting server loads this file alone; the other lies beside it, but need not be on the path
    sys.path.append(str(Path(__file__).parent))
    from handler_images import Limits, RequestError, read_image, to_png  # type: ignore[no-redef]

logger = logging.getLogger(__name__)

ALLOW_URLS = "HF_RSHEAT_ALLOW_URLS"
AUTO_CLASSES = {
    "ForImageClassification": "AutoModelForImageClassification",
    "ForSemanticSegmentation": "AutoModelForSemanticSegmentation",
    "ForInstanceSegmentation": "AutoModelForInstanceSegmentation",
    "ForPreTraining": "AutoModelForPreTraining",
    "Backbone": "AutoBackbone",
    "Model": "AutoModel",
}
PATCH = 16  # side of the heated patch in pixels of the model's input
WITH_HEAD = ("ForImageClassification", "ForSemanticSegmentation", "ForInstanceSegmentation")


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _parameter(check: Callable[[Any], bool], wanted: str, default: Any = None) -> Any:
    return field(default=default, metadata={"check": check, "wanted": wanted})


@dataclass(frozen=True)
class Parameters:
    """The parameters of a request, checked; see the module."""

    top_k: int | None = _parameter(lambda value: type(value) is int and value >= 1, "a whole number of at least 1")
    threshold: float | None = _parameter(_is_share, "a number from 0 to 1")
    features: bool = _parameter(_is_flag, "true or false", False)
    heat_maps: bool = _parameter(_is_flag, "true or false", False)
    heat_source: tuple[float, float] | None = _parameter(
        lambda value: isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_share, value)),
        "[row, column], two numbers from 0 to 1",
    )
    reconstruction: bool = _parameter(_is_flag, "true or false", False)
    mask_radius: float | None = _parameter(_is_share, "a number from 0 to 1")
    modality: str | None = _parameter(lambda value: isinstance(value, str), "a sensor's name")
    rescale_factor: float | None = _parameter(
        lambda value: _is_share(value) and value > 0, "a number above 0 and at most 1"
    )

    @classmethod
    def parse(cls, values: Any) -> "Parameters":
        """Check what came with a request; null counts as not given.

        Raises:
            RequestError: unknown name or unsuitable value.
        """
        if values is None:
            return cls()
        if not isinstance(values, Mapping):
            raise RequestError(400, '"parameters" must be an object, such as {"top_k": 3}.')
        known = {parameter.name: parameter.metadata for parameter in fields(cls)}
        if unknown := [str(name)[:40] for name in values if name not in known]:
            raise RequestError(400, f"Unknown parameter {unknown[0]!r}: there are {', '.join(known)}.")
        given = {name: value for name, value in values.items() if value is not None}
        for name, value in given.items():
            if not known[name]["check"](value):
                raise RequestError(400, f"Parameter {name!r} must be {known[name]['wanted']}.")
        return cls(**given)


class EndpointHandler:
    """Answers requests with one model; may be called from several threads.

    Args:
        path: Folder of the model, by default the one this file lies in. Its own code is run.
        model, processor: Both given, they are used instead of `path`, and nothing is loaded.
        allow_urls: Whether requests may name `https://` addresses to fetch; by default only if the environment has
            HF_RSHEAT_ALLOW_URLS=1.
        limits: What a request may cost.
    """

    def __init__(
        self,
        path: str = "",
        *,
        model: Any = None,
        processor: Any = None,
        allow_urls: bool | None = None,
        limits: Limits | None = None,
    ) -> None:
        if model is None or processor is None:
            model, processor = load(Path(path) if path else Path(__file__).parent)
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self.processor = processor
        # The part that gives features and hidden states: a head's backbone, or the model itself.
        self.trunk = getattr(model, "backbone", None) or model.base_model
        self.kind = next((kind for kind in AUTO_CLASSES if type(model).__name__.endswith(kind)), "Model")
        self.modalities = list(getattr(model.config, "modalities", None) or ())
        self.allow_urls = os.environ.get(ALLOW_URLS) == "1" if allow_urls is None else allow_urls
        self.limits = limits or Limits()
        self._lock = threading.Lock()  # one forward pass at a time: memory stays bounded

    def __call__(self, data: Any) -> Any:
        """Answer one request (see the module); errors are answers too, nothing is raised."""
        try:
            return self.answer(data)
        except RequestError as error:
            return {"error": {"status": error.status, "message": str(error)}}
        except Exception as error:
            logger.exception("A request failed.")
            message = f"The server failed on this request ({type(error).__name__}); its log says more."
            return {"error": {"status": 500, "message": message}}

    def answer(self, data: Any) -> Any:
        """As `__call__`, but raises.

        Raises:
            RequestError: The request is refused.
        """
        if not isinstance(data, Mapping) or data.get("inputs") is None:
            raise RequestError(400, 'Send an object with "inputs": an image as base64 text, or a list of them.')
        parameters = Parameters.parse(data.get("parameters"))
        self._check_fits_model(parameters)
        inputs = data["inputs"]
        if not isinstance(inputs, list | tuple):
            return self._answer_image(inputs, parameters)
        if not 1 <= len(inputs) <= self.limits.images:
            raise RequestError(
                413 if inputs else 400, f"Send 1 to {self.limits.images} images in a request, not {len(inputs)}."
            )
        answers = []
        for index, item in enumerate(inputs):
            try:
                answers.append(self._answer_image(item, parameters))
            except RequestError as error:
                raise RequestError(error.status, f"inputs[{index}]: {error}") from error
        return answers

    def _check_fits_model(self, parameters: Parameters) -> None:
        name = type(self.model).__name__
        if parameters.top_k is not None and self.kind != "ForImageClassification":
            raise RequestError(400, f"top_k is for classifiers; this model is a {name}.")
        if parameters.threshold is not None and self.kind != "ForInstanceSegmentation":
            raise RequestError(400, f"threshold is for detectors; this model is a {name}.")
        reconstructs = self.kind == "ForPreTraining" and hasattr(self.model.config, "mask_radius_range")
        if (parameters.reconstruction or parameters.mask_radius is not None) and not reconstructs:
            raise RequestError(400, f"Only RS-vHeat pretraining models reconstruct; this model is a {name}.")
        if parameters.modality is not None and parameters.modality not in self.modalities:
            known = f"has {', '.join(self.modalities)}" if self.modalities else "has no choice of sensor"
            raise RequestError(400, f"Unknown modality {parameters.modality[:40]!r}: this model {known}.")

    def preprocess(self, item: Any, parameters: Parameters) -> tuple[torch.Tensor, tuple[int, int], dict[str, Any]]:
        """Read one image of a request.

        Returns:
            `pixel_values` `(1, channels, height, width)` as the model takes them, the image's own (width, height), and
            the model's other arguments: `modality` where there is a choice, `pixel_mask` for detectors.

        Raises:
            RequestError: The image is refused.
        """
        image = read_image(item, self.limits, self.allow_urls)
        sensor: dict[str, Any] = {}
        if self.modalities:  # named in any case: processor and model must mean the same one
            sensor["modality"] = parameters.modality or self.model.config.default_modality
        options: dict[str, Any] = {"return_tensors": "pt", **sensor}
        if parameters.rescale_factor is not None:
            options["rescale_factor"] = float(parameters.rescale_factor)
        if self.kind == "ForSemanticSegmentation":
            options["do_center_crop"] = False  # the mask has to cover the whole image
        if self.kind == "ForInstanceSegmentation":
            options["return_pixel_mask"] = True  # no objects in the padding
        try:
            batch = self.processor(image, **options)
        except ValueError as error:  # the processor's ImageFormatError, whose class is in the folder's own code
            raise RequestError(422, str(error)) from error
        if "pixel_mask" in batch:
            sensor["pixel_mask"] = batch["pixel_mask"].to(self.model.device)
        return batch["pixel_values"].to(self.model.device, self.model.dtype), image.size, sensor

    def _answer_image(self, item: Any, parameters: Parameters) -> Any:
        pixel_values, size, sensor = self.preprocess(item, parameters)
        with self._lock, torch.inference_mode():
            return self._run(pixel_values, size, sensor, parameters)

    def _run(self, pixel_values: torch.Tensor, size: tuple[int, int], sensor: dict, parameters: Parameters) -> Any:
        extras: dict[str, Any] = {}
        wants_features = parameters.features or self.kind not in WITH_HEAD
        wants_maps = parameters.heat_maps or parameters.heat_source is not None
        if wants_features or wants_maps:
            outputs = self.trunk(pixel_values, output_hidden_states=wants_maps, **sensor)
            if wants_features:
                extras["features"] = _finite(pooled_features(outputs))[0].tolist()
            if wants_maps:
                extras["heat_maps"] = self._heat_maps(pixel_values, outputs, sensor, parameters.heat_source)
        if parameters.reconstruction or parameters.mask_radius is not None:
            extras |= self._reconstruction(pixel_values, sensor, parameters.mask_radius)
        if self.kind == "ForImageClassification":
            predictions = self._classes(self.model(pixel_values, **sensor).logits, parameters.top_k or 5)
        elif self.kind == "ForSemanticSegmentation":
            predictions = self._segments(self.model(pixel_values).logits, size)
        elif self.kind == "ForInstanceSegmentation":
            threshold = 0.5 if parameters.threshold is None else float(parameters.threshold)
            predictions = self._objects(self.model(pixel_values, **sensor), size, threshold)
        else:
            return extras
        return {"predictions": predictions, **extras} if extras else predictions

    def _classes(self, logits: torch.Tensor, top_k: int) -> list[dict]:
        logits, config = _finite(logits)[0], self.model.config
        independent = config.problem_type == "multi_label_classification" or len(logits) == 1
        scores = logits.sigmoid() if independent else logits.softmax(0)
        best = scores.topk(min(top_k, len(scores)))
        return [
            {"label": config.id2label[index], "score": score}
            for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]

    def _segments(self, logits: torch.Tensor, size: tuple[int, int]) -> list[dict]:
        """One mask of the image's size per class that occurs; its score is the mean probability inside the mask."""
        width, height = size
        if logits.shape[1] * width * height > self.limits.mask_values:
            pixels = self.limits.mask_values // logits.shape[1]
            raise RequestError(413, f"With {logits.shape[1]} classes an image may have at most {pixels} pixels.")
        logits = torch.nn.functional.interpolate(_finite(logits), size=(height, width), mode="bilinear")
        probability, classes = logits.softmax(1)[0].max(0)
        segments = []
        for index in classes.unique().tolist():
            mask = classes == index
            segments.append(
                {
                    "label": self.model.config.id2label[index],
                    "score": probability[mask].mean().item(),
                    "mask": to_png(mask.cpu().numpy() * np.uint8(255)),
                }
            )
        return segments

    def _objects(self, outputs: Any, size: tuple[int, int], threshold: float) -> list[dict]:
        """Every object with its box and a mask of the image's size, the best first."""
        width, height = size
        objects = int((_finite(outputs.scores) >= threshold).sum())
        if objects * width * height > self.limits.mask_values:
            raise RequestError(413, f"{objects} objects are too many for an image of this size: raise the threshold.")
        (found,) = self.processor.post_process_instance_segmentation(
            outputs, threshold=threshold, target_sizes=[(height, width)], return_binary_maps=True
        )
        return [
            {
                "label": self.model.config.id2label[info["label_id"]],
                "score": info["score"],
                "box": info["box"],
                "mask": to_png(mask.cpu().numpy() * np.uint8(255)),
            }
            for mask, info in zip(found["segmentation"], found["segments_info"], strict=True)
        ]

    def _heat_maps(self, pixel_values: torch.Tensor, outputs: Any, sensor: dict, source: Any) -> dict[str, str]:
        states = outputs.hidden_states or ()
        if not states or any(state.ndim != 4 for state in states):
            raise RequestError(400, f"A {type(self.model).__name__} has no heat maps: its features form no grid.")
        if source is not None:
            heated = pixel_values.clone()
            top, left = (min(int(s * n), n - 1) // PATCH * PATCH for s, n in zip(source, heated.shape[2:], strict=True))
            heated[..., top : top + PATCH, left : left + PATCH] += 1
            changed = self.trunk(heated, output_hidden_states=True, **sensor).hidden_states
            states = [after - before for before, after in zip(states, changed, strict=True)]
        maps = [_finite(state)[0].abs().mean(0) for state in states]
        names = getattr(self.trunk.config, "stage_names", None) or [f"state{index}" for index in range(len(maps))]
        return {
            name: to_png((heat / heat.amax().clamp_min(1e-30)).cpu().numpy())
            for name, heat in zip(names, maps, strict=True)
        }

    def _reconstruction(self, pixel_values: torch.Tensor, sensor: dict, radius: float | None) -> dict[str, Any]:
        outputs = self.model(pixel_values, mask_radius=None if radius is None else float(radius), **sensor)
        statistics = self.processor.modalities[sensor["modality"]]
        mean, std = (np.array(statistics[key], dtype=np.float32) for key in ("image_mean", "image_std"))

        def picture(values: torch.Tensor) -> str:
            pixels = _finite(values)[0].permute(1, 2, 0).cpu().numpy() * std + mean
            return to_png(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])

        pictures = {"input": pixel_values} | {key: outputs[key] for key in ("low_cut", "high_cut", "reconstruction")}
        return {key: picture(values) for key, values in pictures.items()}


def load(folder: Path) -> tuple[Any, Any]:
    """Load the model, in the class its config names, and the image processor, with the folder's own code.

    Raises:
        ValueError: The folder holds no model this handler can serve.
    """
    config = json.loads((folder / "config.json").read_text())
    architecture = (config.get("architectures") or [""])[0]
    auto_class = next((auto for kind, auto in AUTO_CLASSES.items() if architecture.endswith(kind)), None)
    if auto_class is None:
        raise ValueError(
            f"This handler serves classifiers, segmenters, detectors, pretraining models and backbones, not a "
            f"{architecture or 'folder without architectures in its config.json'}."
        )
    if auto_class == "AutoBackbone":  # AutoBackbone.from_pretrained asks the Hub first and refuses local folders
        model_class = get_class_from_dynamic_module(config["auto_map"][auto_class], str(folder))
        model = model_class.from_pretrained(folder)
    else:
        model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True)
    return model, transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)


def pooled_features(outputs: Any) -> torch.Tensor:
    """One vector per image, `(batch, channels)`: the pooled output, or the mean over positions of the last map."""
    if getattr(outputs, "pooler_output", None) is not None:
        return outputs.pooler_output
    maps = getattr(outputs, "feature_maps", None)
    last = maps[-1] if maps else outputs.last_hidden_state
    return last.mean(dim=(2, 3) if last.ndim == 4 else 1)


def _finite(values: torch.Tensor) -> torch.Tensor:
    values = values.float()
    if not values.isfinite().all():
        raise FloatingPointError("the model gave NaN or infinite values")  # JSON has no word for them
    return values
