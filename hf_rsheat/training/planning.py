"""What a run would do, without doing it."""

from collections import Counter
from pathlib import Path

from ..errors import DataError
from .checkpoint import load_state
from .data import BatchReader
from .loop import check_objective
from .objectives import Objective, get_objective
from .recipe import Recipe
from .resume import find_checkpoint
from .sampler import BatchPlan, build_sampler

_PROBED = 8  # samples read to see whether the data fits the model


def dry_run(recipe: Recipe, resume: bool | str | Path = False) -> str:
    """Check recipe, data and model as a run would, and describe the run. Nothing is written and nothing computed.

    Args:
        recipe: The recipe.
        resume: As in `train`.

    Returns:
        The plan, several lines.

    Raises:
        ConfigurationError, CheckpointError, DataError: What the run would have ended with.
    """
    checkpoint = find_checkpoint(recipe, resume)
    first = 0 if checkpoint is None else load_state(checkpoint).step
    objective = get_objective(recipe.objective)(recipe, checkpoint)
    check_objective(recipe, objective)
    model = objective.build_model()
    sampler = build_sampler(recipe, objective.samples, objective.source.shards(objective.samples))
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    averages = 0 if recipe.ema_decay is None else trained
    checkpoint_bytes = 4 * (parameters + 2 * trained + averages)
    groups = Counter(sample.group for sample in objective.samples)
    lines = {
        "objective": recipe.objective,
        "images": ", ".join(f"{count} x {group}" for group, count in sorted(groups.items())),
        "read to check": _probe(recipe, objective, sampler.parts(first, 0, 1, -(-recipe.batch_size // _PROBED))[0]),
        "model": f"{type(model).__name__}, {parameters / 1e6:.2f} M parameters, {trained / 1e6:.2f} M trained",
        "start": "step 0" if checkpoint is None else f"step {first}, from {checkpoint}",
        "steps": f"to {recipe.max_steps}, {sampler.steps_per_epoch} an epoch, "
        f"{recipe.max_steps / sampler.steps_per_epoch:.1f} epochs",
        "checkpoints": f"every {recipe.save_steps} steps, about {checkpoint_bytes / 1e6:.0f} MB each",
        "run folder": recipe.output_dir,
    }
    return "\n".join(f"{name + ':':15}{value}" for name, value in lines.items())


def _probe(recipe: Recipe, objective: Objective, plan: BatchPlan) -> str:
    """Read a few samples as the first step would."""
    reader = BatchReader(objective.source, objective.samples, objective, recipe.seed)
    loaded = reader[plan]
    if plan.indices and not loaded.images:
        reasons = "; ".join(f"{image.path}: {image.reason}" for image in loaded.skipped[:3])
        raise DataError(f"None of the first {len(plan.indices)} images can be used: {reasons}")
    return f"{len(plan.indices)}, {len(loaded.skipped)} of them unusable"
