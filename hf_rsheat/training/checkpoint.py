"""Checkpoints: folders of safetensors and JSON that are complete or absent; nothing in them can run code."""

import hashlib
import json
import logging
import os
import re
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from ..errors import CheckpointError, CheckpointWriteError
from . import zero
from .recipe import Recipe
from .sharding import placed_like, whole

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_DRAFT = ".draft-"
_TENSORS = "run_state.safetensors"


@dataclass
class TrainerState:
    """Where a run stands. Randomness needs no state: it is a function of the step.

    Args:
        step: Optimiser steps done.
        epoch: Passes over the data begun.
        data_fingerprint: Identifies the sample list, so that a changed image folder is noticed.
        scaler: Loss-scaling state of fp16 runs.
        objective: State of the objective (`Objective.state`), where it learns from earlier steps.
    """

    step: int
    epoch: int
    data_fingerprint: str
    scaler: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=dict)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoint_path(output_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return output_dir / f"checkpoint-{step}"


def save_checkpoint(
    output_dir: Path,
    state: TrainerState,
    recipe: Recipe,
    model: PreTrainedModel,
    model_state: dict[str, torch.Tensor],
    optimizer: dict[str, Any],
    processor: Any,
    tensors: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Write `checkpoint-<step>` under a draft name, flush it to the disk and rename it.

    Args:
        output_dir: The run folder.
        state: Where the run stands.
        recipe: Saved as `recipe.yaml`.
        model: The bare model; its config is saved beside the weights.
        model_state: Its weights.
        optimizer: What `gather_optimizer` returned.
        processor: Image processor.
        tensors: What else the run remembers, by dotted name; no file where there is nothing.

    Returns:
        The checkpoint folder.

    Raises:
        CheckpointWriteError: If it cannot be written. Earlier checkpoints are untouched, and the draft is removed.
    """
    final = checkpoint_path(output_dir, state.step)
    draft = output_dir / f"{_DRAFT}{final.name}"
    values = [*model_state.values(), *optimizer.values(), *(tensors or {}).values()]
    needed = sum(value.nbytes for value in values if isinstance(value, torch.Tensor))
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        # The names of the running model: transformers would save its own models under those of older versions.
        model.save_pretrained(draft, state_dict=model_state, save_original_format=False)
        processor.save_pretrained(draft)
        recipe.save(draft / "recipe.yaml")
        _save_optimizer(draft, optimizer)
        if tensors:
            _save_tensors(tensors, draft / _TENSORS)
        (draft / "trainer_state.json").write_text(json.dumps(asdict(state), indent=2), encoding="utf-8")
        _publish(draft, final)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as an error of its own
        shutil.rmtree(draft, ignore_errors=True)
        raise _write_error(final, needed, error) from error
    return final


def _publish(draft: Path, final: Path) -> None:
    """Add the manifest, flush everything to the disk, and give the folder its name."""
    files = sorted(path for path in draft.rglob("*") if path.is_file())
    sums = {path.relative_to(draft).as_posix(): _sha256(path) for path in files}
    (draft / MANIFEST).write_text(json.dumps(sums, indent=2), encoding="utf-8")
    for path in [*files, draft / MANIFEST, draft]:
        _fsync(path)
    if final.exists():  # damaged, or the one this run resumed from
        shutil.rmtree(final)
    draft.rename(final)
    _fsync(final.parent)


def _write_error(final: Path, needed: int, error: Exception) -> CheckpointWriteError:
    free = ""
    with suppress(OSError):
        free = f", and {shutil.disk_usage(final.parent).free / 1e6:.1f} MB are free there"
    older = list_checkpoints(final.parent)
    intact = f"{older[-1][1].name} is intact" if older else "There is no earlier checkpoint"
    return CheckpointWriteError(
        f"Cannot write {final}: {error}. It needs {needed / 1e6:.1f} MB ({needed} bytes) and a little{free}. "
        f"{intact}: make room or make the folder writable, then continue with --resume."
    )


def gather_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Optimiser state by `parameter name:entry`, since indices would shift when a parameter is added.

    Called on every process: where the state is sharded (FSDP2, ZeRO), each contributes its part.
    """
    if (sharded := zero.partitioned(optimizer)) is not None:
        return zero.gather(model, sharded)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{names[id(parameter)]}:{entry}": whole(value) if isinstance(value, torch.Tensor) else value
        for parameter, values in optimizer.state.items()
        for entry, value in values.items()
    }


def _save_optimizer(folder: Path, state: dict[str, Any]) -> None:
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    _save_tensors(tensors, folder / "optimizer.safetensors")
    scalars = {name: value for name, value in state.items() if name not in tensors}
    (folder / "optimizer.json").write_text(json.dumps(scalars), encoding="utf-8")


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)


def verify(checkpoint: Path) -> None:
    """Check every file against the manifest.

    Raises:
        CheckpointError: Naming the first file that is missing or damaged.
    """
    try:
        sums = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in sums.items():
            if _sha256(checkpoint / name) != expected:
                raise CheckpointError(f"{checkpoint} is damaged: {name} does not match {MANIFEST}.")
    except (OSError, ValueError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{checkpoint} is not a complete checkpoint: {error}.") from error


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the checkpoints of a run, oldest first; sound or not."""
    found = ((_NAME.fullmatch(path.name), path) for path in output_dir.glob("checkpoint-*") if path.is_dir())
    return sorted((int(match[1]), path) for match, path in found if match)


def latest_checkpoint(output_dir: Path) -> Path | None:
    """The newest sound checkpoint; damaged ones are passed over with a warning.

    Raises:
        CheckpointError: If there are checkpoints and all are damaged.
    """
    checkpoints = list_checkpoints(output_dir)
    for _, checkpoint in reversed(checkpoints):
        try:
            verify(checkpoint)
        except CheckpointError as error:
            logger.warning("%s Trying the one before.", error)
            continue
        return checkpoint
    if checkpoints:
        raise CheckpointError(f"All checkpoints in {output_dir} are damaged: start again in another output_dir.")
    return None


def load_state(checkpoint: Path) -> TrainerState:
    """The `trainer_state.json` of a checkpoint."""
    try:
        return TrainerState(**json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"Cannot read the trainer state of {checkpoint}: {error}.") from error


def load_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """What `save_checkpoint` was given as `tensors`."""
    path = checkpoint / _TENSORS
    try:
        return load_file(path) if path.exists() else {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"Cannot read {path}: {error}.") from error


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Copy a checkpoint's weights into a model.

    Copied, not memory-mapped: mapped tensors are not aligned like allocated ones, which changes the last bit of a sum.

    Raises:
        CheckpointError: If names or shapes do not agree.
    """
    try:
        model.load_state_dict(load_file(checkpoint / "model.safetensors"))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"The weights of {checkpoint} do not fit: {error}") from error


def load_optimizer(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restore the optimiser over the parameters of `model`.

    Raises:
        CheckpointError: If it names parameters the model does not have.
    """
    try:
        values: dict[str, Any] = load_file(checkpoint / "optimizer.safetensors")
        values |= json.loads((checkpoint / "optimizer.json").read_text(encoding="utf-8"))
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise CheckpointError(f"Cannot read the optimiser state of {checkpoint}: {error}.") from error
    if (sharded := zero.partitioned(optimizer)) is not None:
        zero.restore(model, sharded, values)
        return
    named = dict(model.named_parameters())
    indices = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    state: dict[int, dict[str, Any]] = {}
    for key, value in values.items():
        name, _, entry = key.rpartition(":")
        if name not in named or id(named[name]) not in indices:
            raise CheckpointError(f"{checkpoint} holds optimiser state of '{name}', which is not being trained.")
        value = placed_like(named[name], value) if isinstance(value, torch.Tensor) else value
        state.setdefault(indices[id(named[name])], {})[entry] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def prune_checkpoints(
    output_dir: Path, keep: int | None, keep_every: int | None = None, best: int | None = None
) -> None:
    """Delete drafts left behind by a killed run, and checkpoints that are not to stay.

    Args:
        output_dir: The run folder.
        keep: How many of the newest stay; None keeps all.
        keep_every: Those whose step is a multiple of it stay too.
        best: So does the one of this step.
    """
    old = list_checkpoints(output_dir)[:-keep] if keep is not None else []
    unwanted = [path for step, path in old if step != best and (keep_every is None or step % keep_every)]
    for folder in [*output_dir.glob(f"{_DRAFT}*"), *unwanted]:
        try:
            shutil.rmtree(folder)
        except OSError as error:  # the run is worth more than the room
            logger.warning("Cannot delete %s: %s", folder, error)
