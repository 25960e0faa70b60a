"""DeepSpeed's ZeRO, stages 1 and 2: its settings, and its optimiser state as whole tensors by parameter.

DeepSpeed's own checkpoints are pickles. Ours hold what every other run's hold, so that they can be continued with or
without it. Its partitions are read through what `deepspeed.utils` offers, and are of float32: autocast does the rest.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from accelerate.utils.operations import convert_outputs_to_fp32
from torch import nn

from ..errors import CheckpointError, ConfigurationError
from .recipe import Recipe

logger = logging.getLogger(__name__)

_INSTEAD = "use examples/accelerate/fsdp2.yaml, which also shards the weights."


def wanted() -> bool:
    """Whether the launcher was told to use DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def process_group() -> list[InitProcessGroupKwargs]:
    """What Accelerate has to be told where there are only CPUs; it would take each process for the only one."""
    alone = torch.accelerator.is_available() or int(os.environ.get("WORLD_SIZE", 1)) == 1
    return [] if alone else [InitProcessGroupKwargs(backend="gloo")]


def active(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed steps the optimiser."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def configure(accelerator: Accelerator, recipe: Recipe, every_parameter_every_step: bool) -> None:
    """Let the recipe decide what a DeepSpeed configuration would otherwise decide beside it.

    Args:
        accelerator: The run's accelerator, under DeepSpeed.
        recipe: The run's recipe.
        every_parameter_every_step: Whether each step of the objective reaches all parameters.

    Raises:
        ConfigurationError: For settings whose state we could not keep.
    """
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    zero = settings.get("zero_optimization", {})
    if zero.get("stage") not in (1, 2):
        raise ConfigurationError(f"DeepSpeed works with zero_stage 1 or 2, got {zero.get('stage')}: {_INSTEAD}")
    if any((zero.get(key) or {}).get("device", "none") != "none" for key in ("offload_optimizer", "offload_param")):
        raise ConfigurationError(f"DeepSpeed works without offloading only: set its devices to none, or {_INSTEAD}")
    if recipe.mixed_precision == "fp16":
        raise ConfigurationError("DeepSpeed works with mixed_precision bf16 or no: fp16 would scale losses on its own.")
    if not every_parameter_every_step:
        logger.warning(
            "DeepSpeed also moves weights that a step does not reach, such as the stem of a sensor that its batch "
            "lacks: with batches of several kinds the run is not the one that DDP or FSDP2 would make."
        )
    settings.update(
        train_micro_batch_size_per_gpu=1,  # asked for, but the loop feeds the engine
        gradient_accumulation_steps=1,  # the loop accumulates, see `accumulating`
        gradient_clipping=float(recipe.max_grad_norm),
        zero_allow_untested_optimizer=True,
        steps_per_print=2**31,
        bf16={"enabled": False},
        fp16={"enabled": False},
    )


def autocast_forward(model: nn.Module, recipe: Recipe, device: torch.device) -> None:
    """What Accelerate does to a model in mixed precision, but not under DeepSpeed."""
    if recipe.mixed_precision == "bf16":
        model.forward = convert_outputs_to_fp32(torch.autocast(device.type, torch.bfloat16)(model.forward))


@contextmanager
def accumulating(accelerator: Accelerator) -> Iterator[None]:
    """Backward passes inside of the `with` block add to the gradient and take no step."""
    accelerator.gradient_state._set_sync_gradients(False)
    try:
        yield
    finally:
        accelerator.gradient_state._set_sync_gradients(True)


def partitioned(optimizer: Any) -> Any:
    """The ZeRO optimiser behind an optimiser, or None."""
    inner = getattr(optimizer, "optimizer", None)
    return inner if hasattr(inner, "single_partition_of_fp32_groups") else None


def gather(model: nn.Module, zero: Any) -> dict[str, torch.Tensor]:
    """Optimiser state by `parameter name:entry`, as `gather_optimizer`. A collective."""
    from deepspeed.utils import safe_get_full_optimizer_state

    state: dict[str, torch.Tensor] = {}
    steps = [
        zero.optimizer.state[flat]["step"]
        for flat in zero.single_partition_of_fp32_groups
        if flat in zero.optimizer.state
    ]
    if not steps:
        return state  # no step is taken yet
    _link(zero)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            state[f"{name}:step"] = steps[0].clone()
            for entry in ("exp_avg", "exp_avg_sq"):
                state[f"{name}:{entry}"] = safe_get_full_optimizer_state(parameter, entry)
    return state


def _link(zero: Any) -> None:
    """Let parameters find their part of the moments: DeepSpeed does so after the first group's first step, when the
    other groups have none yet."""
    zero._hp_optimizer_states_linked = False
    zero._lazy_init_hp_params_optimizer_state()


def restore(model: nn.Module, zero: Any, values: dict[str, Any]) -> None:
    """Put back what `gather` returned; every process keeps its part.

    Raises:
        CheckpointError: If the state is not AdamW's of these parameters.
    """
    from deepspeed.utils import safe_set_full_optimizer_state

    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not values:
        return
    if unknown := {key.rpartition(":")[0] for key in values} - trained.keys():
        raise CheckpointError(f"The checkpoint holds optimiser state of '{min(unknown)}', which is not being trained.")
    # One number of steps for all, since ZeRO steps all parameters together.
    step = max(torch.as_tensor(value) for key, value in values.items() if key.endswith(":step"))
    for flat in zero.single_partition_of_fp32_groups:
        moments = {entry: torch.zeros_like(flat) for entry in ("exp_avg", "exp_avg_sq")}
        zero.optimizer.state[flat] = {"step": step.clone().float(), **moments}
    _link(zero)
    for name, parameter in trained.items():
        for entry in ("exp_avg", "exp_avg_sq"):
            if f"{name}:{entry}" in values:  # one that was never reached has none yet
                value = values[f"{name}:{entry}"].to(parameter.device)
                safe_set_full_optimizer_state(parameter, value, entry)
