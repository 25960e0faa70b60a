"""The end of a run: the Hub folder, and its way to the Hub."""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..errors import HFRSHeatError, TransferError
from ..hub import export
from ..hub.push import push
from .averaging import overlay
from .checkpoint import load_tensors
from .objectives import Objective
from .recipe import BOOKKEEPING, Recipe

logger = logging.getLogger(__name__)

_NOT_ON_THE_CARD = frozenset({*BOOKKEEPING, "manifest", "dataset"})


def publish(recipe: Recipe, objective: Objective, checkpoint: Path) -> Path:
    """Export the model of a run's last checkpoint to `output_dir/hub`, and push it if the recipe says so.

    The model is built anew from the disk: what was trained may be sharded, wrapped or compiled. With `ema_decay` it
    has the averaged weights; the checkpoint keeps both.

    Returns:
        The Hub folder.

    Raises:
        TransferError: If the push fails; the folder stays.
    """
    objective.checkpoint = checkpoint
    model: PreTrainedModel = objective.build_model()
    if recipe.ema_decay is not None:
        overlay(model, load_tensors(checkpoint))
    hub = Path(recipe.output_dir) / "hub"
    context = objective.card_context(_card_context(recipe))
    export(objective.exported(model), objective.processor, hub, card_context=context)
    logger.info("Hub folder: %s", hub)
    if recipe.hub_model_id is not None:
        _push(hub, recipe.hub_model_id)
    return hub


def _card_context(recipe: Recipe) -> dict[str, Any]:
    """What the exported card says of the training: settings that decide the result, and no paths of this machine."""
    settings = {name: value for name, value in asdict(recipe).items() if name not in _NOT_ON_THE_CARD}
    settings["model"] = recipe.model_fields
    start = "random weights" if recipe.pretrained is None else f"the weights of `{Path(recipe.pretrained).name}`"
    averaged = "" if recipe.ema_decay is None else f"; exponential moving average of the weights ({recipe.ema_decay})"
    context = {
        "recipe": settings,
        "dataset": _data_name(recipe),
        "source": f"trained with this package, starting from {start}{averaged}",
        "model_name": Path(recipe.output_dir).resolve().name,
    }
    if recipe.hub_model_id is not None:
        context |= {"repo_id": recipe.hub_model_id, "model_name": recipe.hub_model_id.split("/")[-1]}
    return context


def _data_name(recipe: Recipe) -> str:
    """The training data on the card: a data set's name, of folders the last part."""
    name = recipe.data_name
    return name if recipe.dataset and not Path(name).exists() else Path(name).resolve().name


def _push(hub: Path, repo_id: str) -> None:
    try:
        result = push(hub, repo_id)
    except (HFRSHeatError, OSError) as error:
        raise TransferError(
            f"The run is finished and its folder exported, but not pushed: {error} "
            f"Push it with `hf-rsheat push {hub} {repo_id}`."
        ) from error
    logger.info("Pushed and verified: %s@%s", result.repo_id, result.revision)
