"""Which checkpoint a run starts from, and whether it may."""

import logging
from pathlib import Path

from ..errors import ConfigurationError
from .checkpoint import latest_checkpoint, list_checkpoints, load_state, verify
from .recipe import BOOKKEEPING, Recipe, load_recipe, parse_yaml

logger = logging.getLogger(__name__)

# What a checkpoint itself carries (model and processor), or what its tensors or its place in the epoch depend on.
_FIXED = ("objective", "model", "preprocessing", "image_size", "prune_ratio")
# Changing these changes neither the data a step sees nor the update it makes.
_HARMLESS = (*BOOKKEEPING, "gradient_accumulation_steps", "gradient_checkpointing")


def find_checkpoint(recipe: Recipe, resume: bool | str | Path) -> Path | None:
    """The checkpoint to continue from; None starts at step 0.

    Args:
        recipe: The run's recipe.
        resume: False starts anew, True takes the newest sound checkpoint of `output_dir`, a path takes that one.

    Raises:
        ConfigurationError: If starting would overwrite a run, or the recipe contradicts the checkpoint.
        CheckpointError: If the checkpoint is damaged.
    """
    output_dir = Path(recipe.output_dir)
    present = list_checkpoints(output_dir)
    if resume is False:
        if present:
            raise ConfigurationError(
                f"{output_dir} holds {present[-1][1].name} of an earlier run: pass --resume to continue it, "
                "or set another output_dir."
            )
        return None
    if resume is True:
        checkpoint = latest_checkpoint(output_dir)
        if checkpoint is None:
            logger.info("No checkpoint in %s yet: starting at step 0.", output_dir)
            return None
    else:
        checkpoint = Path(resume)
        verify(checkpoint)
        newer = [path.name for step, path in present if step > load_state(checkpoint).step]
        if newer:
            raise ConfigurationError(
                f"{output_dir} holds checkpoints newer than {checkpoint} ({', '.join(newer)}): "
                "delete them, or set another output_dir."
            )
    _check_recipe(recipe, checkpoint)
    return checkpoint


def _check_recipe(recipe: Recipe, checkpoint: Path) -> None:
    saved = parse_yaml(load_recipe(checkpoint / "recipe.yaml").to_yaml())
    current = parse_yaml(recipe.to_yaml())  # tuples have become lists in both
    changed = {name: (saved[name], value) for name, value in current.items() if value != saved[name]}
    for name, (before, now) in changed.items():
        if name in _FIXED:
            raise ConfigurationError(
                f"'{name}' was {before!r} in {checkpoint} and is {now!r} now: restore it, or start a new run "
                "with model=FOLDER."
            )
        if name not in _HARMLESS:
            logger.warning(
                "'%s' was %r and is %r now: the run continues, but not as it would have without the change.",
                name,
                before,
                now,
            )
