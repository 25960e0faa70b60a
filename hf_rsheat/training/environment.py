"""What a run needs of Accelerate: precision, processes and trackers."""

import importlib.util
import logging
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import broadcast_object_list

from ..errors import ConfigurationError, HFRSHeatError, MissingExtraError
from . import zero
from .objectives import Objective
from .recipe import Recipe
from .resume import find_checkpoint

logger = logging.getLogger(__name__)


def build_accelerator(recipe: Recipe, objective: type[Objective]) -> Accelerator:
    """The accelerator of this process; the first collective of a run of several processes.

    Raises:
        ConfigurationError: If the machine cannot compute in the precision asked for, or DeepSpeed cannot be used.
        MissingExtraError: If a tracker is not installed.
    """
    refusal = f"mixed_precision '{recipe.mixed_precision}' does not work on this machine: use bf16 or no."
    find_unused = not objective.every_parameter_every_step
    sharded = zero.wanted()
    if sharded and importlib.util.find_spec("deepspeed") is None:
        raise MissingExtraError("deepspeed", "deepspeed", "An accelerate configuration with DeepSpeed")
    try:
        accelerator = Accelerator(
            mixed_precision="no" if sharded else recipe.mixed_precision,
            log_with=_trackers(recipe) or None,
            project_dir=recipe.output_dir,
            kwargs_handlers=[
                DistributedDataParallelKwargs(find_unused_parameters=find_unused),
                *(zero.process_group() if sharded else ()),
            ],
        )
    except ValueError as error:
        raise ConfigurationError(f"{refusal} ({error})") from error
    if zero.active(accelerator):
        zero.configure(accelerator, recipe, objective.every_parameter_every_step)
    elif recipe.mixed_precision != "no" and not accelerator.native_amp:
        raise ConfigurationError(refusal)  # Accelerate would train in float32 without a word
    return accelerator


def _trackers(recipe: Recipe) -> list[str]:
    if recipe.trackers is None:
        return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    for name in recipe.trackers:
        if importlib.util.find_spec(name) is None:
            raise MissingExtraError(name, "train" if name == "tensorboard" else "trackers", f"trackers: [{name}]")
    return list(recipe.trackers)


def start_trackers(accelerator: Accelerator, recipe: Recipe, first_step: int) -> None:
    """Begin to log; what a tracker holds of steps that are being repeated is dropped where it can be."""
    if accelerator.log_with:
        run = Path(recipe.output_dir).resolve().name
        named = {"name": run, "resume": "allow"}
        settings = {"tensorboard": {"purge_step": first_step + 1}, "wandb": {**named, "id": run}, "trackio": named}
        project = "tensorboard" if recipe.trackers in (None, ["tensorboard"]) else "hf_rsheat"
        accelerator.init_trackers(
            project, {name: str(value) for name, value in asdict(recipe).items()}, init_kwargs=settings
        )


def agree_on_checkpoint(recipe: Recipe, resume: bool | str | Path, is_main: bool) -> Path | None:
    """`find_checkpoint` of the first process, told to all: only that one holds the run folder's lock.

    Raises:
        ConfigurationError, CheckpointError: As `find_checkpoint`, on every process.
    """
    found: list[Path | HFRSHeatError | None] = [None]
    if is_main:
        try:
            found = [find_checkpoint(recipe, resume)]
        except HFRSHeatError as error:
            found = [error]
    (result,) = broadcast_object_list(found)
    if isinstance(result, HFRSHeatError):
        raise result
    return result


def sum_over_processes(accelerator: Accelerator, values: list[float]) -> list[float]:
    """Each value summed over all processes."""
    if accelerator.num_processes == 1:
        return values  # spares the device a synchronisation
    tensor = torch.tensor(values, dtype=torch.float32, device=accelerator.device)
    return accelerator.reduce(tensor, "sum").tolist()
