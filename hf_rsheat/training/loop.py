"""The training loop: every objective, any number of processes, one Accelerate loop."""

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from ..errors import ConfigurationError, DataError, RunInterrupted
from . import zero
from .averaging import WeightAverage
from .checkpoint import (
    TrainerState,
    checkpoint_path,
    gather_optimizer,
    load_optimizer,
    load_state,
    load_tensors,
    prune_checkpoints,
    save_checkpoint,
)
from .compilation import check_compiler, compile_parts, compiled_steps, uncompiled
from .data import BatchReader, LoadedBatch, load_batches
from .environment import agree_on_checkpoint, build_accelerator, start_trackers
from .locking import run_lock
from .monitor import Monitor
from .objectives import Objective, get_objective
from .optimization import build_optimizer
from .pictures import write_picture
from .pruning import Pruning
from .publishing import publish
from .randomness import derive_seed
from .recipe import Recipe
from .sampler import build_sampler
from .selection import Selection
from .signals import StopRequest
from .step import Stepper, to_device

logger = logging.getLogger(__name__)


def train(recipe: Recipe, resume: bool | str | Path = False) -> Path:
    """Run a recipe to its end.

    Args:
        recipe: What to do.
        resume: True continues from the newest sound checkpoint of `output_dir`, a path from that checkpoint.

    Returns:
        The exported Hub folder, `output_dir/hub`.

    Raises:
        ConfigurationError: If the recipe cannot be run as it is, or `output_dir` holds another run, or there is no
            compiler for `torch_compile`.
        CheckpointError: If a checkpoint or the folder to start from does not fit.
        CheckpointWriteError: If a checkpoint cannot be written; the one before is intact.
        DataError: If no image can be used.
        TrainingError: If the loss is not finite, or the model cannot be compiled.
        RunInUseError: If another process is writing to `output_dir`.
        RunInterrupted: After SIGTERM or SIGINT, when a checkpoint is saved.
    """
    objective_class = get_objective(recipe.objective)
    with run_lock(Path(recipe.output_dir)):
        accelerator = build_accelerator(recipe, objective_class)
        if recipe.torch_compile:
            check_compiler(accelerator.device)
        checkpoint = agree_on_checkpoint(recipe, resume, accelerator.is_main_process)
        objective = objective_class(recipe, checkpoint)
        check_objective(recipe, objective)
        return _Run(recipe, objective, accelerator, checkpoint).run()


def check_objective(recipe: Recipe, objective: Objective) -> None:
    """Refuse settings that an objective cannot keep."""
    if recipe.gradient_accumulation_steps > 1 and not objective.counts_from_data:
        raise ConfigurationError(
            f"objective '{recipe.objective}' cannot accumulate gradients: set gradient_accumulation_steps to 1."
        )
    if recipe.prune_ratio and not objective.addends_per_image:
        raise ConfigurationError(
            f"objective '{recipe.objective}' has no loss per image to prune by: set prune_ratio to 0."
        )
    if recipe.manifest is not None and not objective.reads_manifest:
        raise ConfigurationError(f"objective '{recipe.objective}' finds its images itself: remove manifest.")
    if recipe.picture_steps and type(objective).picture is Objective.picture:
        raise ConfigurationError(f"objective '{recipe.objective}' has no picture to draw: remove picture_steps.")


def recompute_activations(model: PreTrainedModel) -> None:
    """Have a model keep only what enters its blocks, and compute the rest again in the backward pass."""
    # transformers renamed the method on its way from 5.20, our floor, to 6.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def _below(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors whose dotted name begins with a prefix, by the rest of it."""
    return {name.removeprefix(f"{prefix}."): value for name, value in tensors.items() if name.startswith(f"{prefix}.")}


class _Run:
    """One run of a recipe in one process."""

    def __init__(self, recipe: Recipe, objective: Objective, accelerator: Accelerator, checkpoint: Path | None) -> None:
        self.recipe = recipe
        self.objective = objective
        self.accelerator = accelerator
        self.output_dir = Path(recipe.output_dir)
        self.sampler = build_sampler(recipe, objective.samples, objective.source.shards(objective.samples))
        listing = repr([(sample.files, sample.label) for sample in objective.samples])
        listing += objective.data_digest + objective.source.digest
        self.fingerprint = hashlib.sha256(listing.encode()).hexdigest()
        self.pruning = Pruning(self.sampler, len(objective.samples), recipe) if recipe.prune_ratio else None
        self.first_step = 0
        self.saved = checkpoint or checkpoint_path(self.output_dir, 0)  # there is none of step 0

        torch.manual_seed(derive_seed("weights", recipe.seed))
        self.bare_model = objective.build_model()
        if recipe.gradient_checkpointing:
            recompute_activations(self.bare_model)
        if recipe.torch_compile:
            compile_parts(objective.compiled_parts(self.bare_model))
        self.bare_optimizer = build_optimizer(self.bare_model, recipe, accelerator.device)
        if zero.active(accelerator):
            zero.autocast_forward(self.bare_model, recipe, accelerator.device)
        self.model, self.optimizer = accelerator.prepare(self.bare_model, self.bare_optimizer)
        if zero.active(accelerator):
            self.bare_optimizer = self.optimizer
        self.average = None if recipe.ema_decay is None else WeightAverage(self.bare_model, float(recipe.ema_decay))
        self.stepper = Stepper(accelerator, self.model, self.optimizer, objective, recipe, self.pruning, self.average)
        if checkpoint is not None:
            self._resume(checkpoint)
        self.selection = Selection(objective, accelerator, self.output_dir, self.first_step)

    def _resume(self, checkpoint: Path) -> None:
        state, tensors = load_state(checkpoint), load_tensors(checkpoint)
        load_optimizer(checkpoint, self.bare_model, self.bare_optimizer)
        if state.scaler and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state.scaler)
        self.objective.load_state(state.objective)
        if self.average is not None:
            self.average.load_state(tensors)
        self.first_step = state.step
        logger.info("Resuming from %s.", checkpoint)
        if state.data_fingerprint != self.fingerprint:
            logger.warning(
                "The images in %s have changed since %s: the order of the remaining steps changes with them.",
                self.recipe.data_name,
                checkpoint.name,
            )
        if self.pruning is not None:
            if state.data_fingerprint == self.fingerprint:
                self.pruning.load_state(_below("pruning", tensors))
            else:  # its scores are of other images
                self.sampler.begin(state.epoch + 1, state.step, None)

    def _tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps besides model and optimiser; called on every process."""
        tensors = {} if self.average is None else self.average.state()
        if self.pruning is not None:
            self.pruning.gather(self.accelerator)
            tensors |= {f"pruning.{name}": value for name, value in self.pruning.state().items()}
        return tensors

    def run(self) -> Path:
        """Train from the first step to the last, export, and return the Hub folder."""
        recipe, accelerator = self.recipe, self.accelerator
        if accelerator.is_main_process:
            recipe.save(self.output_dir / "recipe.yaml")
        start_trackers(accelerator, recipe, self.first_step)
        self._describe()
        monitor = Monitor(accelerator, self.objective, recipe, self.first_step)
        try:
            with compiled_steps() if recipe.torch_compile else nullcontext(), monitor, StopRequest() as stop:
                self._train(monitor, stop)
            if accelerator.is_main_process:
                best = self.selection.best
                publish(recipe, self.objective, self.saved if best is None else checkpoint_path(self.output_dir, best))
            accelerator.wait_for_everyone()
        except RunInterrupted:
            accelerator.end_training()  # not after other errors: the processes may be at different places
            raise
        accelerator.end_training()
        return self.output_dir / "hub"

    def _describe(self) -> None:
        groups = Counter(sample.group for sample in self.objective.samples)
        logger.info(
            "%s: %s; %d step(s) an epoch; %.2f M parameters; %d process(es) on %s.",
            self.recipe.objective,
            ", ".join(f"{count} x {group}" for group, count in sorted(groups.items())),
            self.sampler.steps_per_epoch,
            sum(p.numel() for p in self.bare_model.parameters()) / 1e6,
            self.accelerator.num_processes,
            self.accelerator.device,
        )

    def _train(self, monitor: Monitor, stop: StopRequest) -> None:
        recipe = self.recipe
        self.model.train()
        batches = self._batches()
        empty = 0
        for step in range(self.first_step, recipe.max_steps):
            asked = time.perf_counter()
            parts = [next(batches)]
            parts += [next(batches) for _ in range(parts[0].plan.parts - 1)]
            waited = time.perf_counter() - asked
            agreed = self.stepper.agree(parts, stop.flags)
            if agreed.exit_status:
                self._stop(monitor, step, agreed.exit_status)
            monitor.add(self.stepper.take(step, parts, agreed, waited))
            done = step + 1
            empty = 0 if agreed.images else empty + 1
            saves = done % recipe.save_steps == 0 or done == recipe.max_steps
            starved = empty >= min(self.sampler.steps_per_epoch, recipe.max_steps)
            if saves or starved or done % recipe.logging_steps == 0:
                monitor.flush()
            if starved:
                raise DataError(
                    f"None of the last images of {recipe.data_name} could be used: "
                    f"{self.output_dir / 'skipped.jsonl'} gives the reason for each."
                )
            if recipe.picture_steps and done % recipe.picture_steps == 0:
                self._draw(done, parts[0])
            if saves:
                self._evaluate(done)
                self._save(done)

    def _evaluate(self, done: int) -> None:
        with nullcontext() if self.average is None else self.average.applied(), self._uncompiled():
            self.selection.measure(self.bare_model, done)

    def _uncompiled(self) -> AbstractContextManager[None]:
        return uncompiled() if self.recipe.torch_compile else nullcontext()

    def _stop(self, monitor: Monitor, done: int, status: int) -> None:
        monitor.flush()
        if done > self.first_step and self.saved != checkpoint_path(self.output_dir, done):
            self._save(done)
        kept = f"{self.saved.name} is saved" if done else "nothing is done yet"
        raise RunInterrupted(f"Stopped after step {done} of {self.recipe.max_steps}; {kept}.", status)

    def _draw(self, done: int, part: LoadedBatch) -> None:
        batch = to_device(part.batch, self.accelerator.device)
        with self._uncompiled():
            write_picture(
                self.objective, self.bare_model, batch, self.output_dir, done, self.accelerator.is_main_process
            )

    def _batches(self) -> Iterator[LoadedBatch]:
        recipe, accelerator = self.recipe, self.accelerator
        objective = self.objective
        reader = BatchReader(objective.source, objective.samples, objective, recipe.seed)
        step = self.first_step
        while step < recipe.max_steps:
            last = self._known_until(step)
            plans = self.sampler.plans(
                step,
                last,
                accelerator.process_index,
                accelerator.num_processes,
                recipe.gradient_accumulation_steps,
            )
            plans = objective.source.read_ahead(plans, objective.samples, accelerator.num_processes)
            yield from load_batches(reader, plans, recipe.num_workers, pin_memory=accelerator.device.type == "cuda")
            step = last

    def _known_until(self, step: int) -> int:
        """The step before which loaders may read ahead: pruning decides at the begin of every epoch what it holds."""
        if self.pruning is None:
            return self.recipe.max_steps
        self.pruning.gather(self.accelerator)
        return min(self.pruning.plan(step), self.recipe.max_steps)

    def _save(self, done: int) -> None:
        accelerator = self.accelerator
        weights = accelerator.get_state_dict(self.model)
        tensors = self._tensors()
        optimizer = gather_optimizer(self.bare_model, self.bare_optimizer)
        if accelerator.is_main_process:
            scaler = {} if accelerator.scaler is None else accelerator.scaler.state_dict()
            epoch, _ = self.sampler.locate(done)
            save_checkpoint(
                self.output_dir,
                TrainerState(done, epoch, self.fingerprint, scaler, self.objective.state()),
                self.recipe,
                self.bare_model,
                weights,
                optimizer,
                self.objective.processor,
                tensors,
            )
            best = self.selection.best
            prune_checkpoints(self.output_dir, self.recipe.keep_checkpoints, self.recipe.keep_every, best)
        self.saved = checkpoint_path(self.output_dir, done)
        accelerator.wait_for_everyone()
