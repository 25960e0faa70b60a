"""Frozen features of any architecture that can be slimmed, and their accuracy."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ..evaluation.features import FeatureExtractor, choose_modality, default_device
from .calibration import trunk_of

# Their class token after the final norm; poolers of stock models are trained for other ends, or not at all.
_CLASS_TOKEN = ("vit", "vit_mae", "dinov2", "slim_dinov2", "dinov3_vit")


class TrunkFeatures(FeatureExtractor):
    """Features after the final norm: the class token of a ViT, the pooled vector of our models."""

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """(images, dimensions)."""
        outputs = self.model(**self.inputs(images))
        if self.model.config.model_type in _CLASS_TOKEN:
            features = outputs.last_hidden_state[:, 0]
        else:
            features = outputs.pooler_output
        return features.flatten(1).float().cpu().numpy()


def trunk_features(model: Any, processor: Any, modality: str | None = None) -> TrunkFeatures:
    """The trunk of a model, ready to compute features.

    Raises:
        ConfigurationError: If the model has no such modality.
    """
    trunk = trunk_of(model).to(default_device()).eval()
    if trunk.config.model_type == "vit_mae":
        trunk.config.mask_ratio = 0.0  # it would hide most of every image
    return TrunkFeatures(trunk, processor, choose_modality(trunk.config, modality))


@torch.inference_mode()
def latency(full: Any, small: Any, inputs: dict[str, Any], rounds: int) -> dict[str, float]:
    """Seconds per batch of two models, minima over rounds that take turns, and their ratio.

    Args:
        full, small: Models in evaluation mode.
        inputs: Arguments of their forward.
        rounds: Timed calls of each, after one that is not timed.
    """
    best = [float("inf"), float("inf")]
    for turn in range(rounds + 1):
        for index, model in enumerate((full, small)):
            _synchronize(model)
            started = time.perf_counter()
            model(**inputs)
            _synchronize(model)
            if turn:
                best[index] = min(best[index], time.perf_counter() - started)
    return {"latency_s": best[1], "full_latency_s": best[0], "relative_latency": best[1] / best[0]}


def _synchronize(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
