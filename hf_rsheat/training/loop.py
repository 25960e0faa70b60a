"""The training loop: every objective, any number of processes, one Accelerate loop."""

import hashlib
import importlib.util
import logging
import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from transformers import PreTrainedModel

from ..errors import ConfigurationError, DataError, HFRSHeatError, TransferError
from ..hub import export
from ..hub.push import push
from .checkpoint import TrainerState, load_optimizer, load_state, prune_checkpoints, save_checkpoint
from .data import Batch, BatchReader, LoadedBatch, load_batches
from .monitor import Monitor, StepResult
from .objectives import Objective, get_objective
from .optimization import build_optimizer, learning_rate
from .randomness import derive_seed
from .recipe import Recipe
from .resume import find_checkpoint
from .sampler import GlobalBatchSampler

logger = logging.getLogger(__name__)

_NOT_ON_THE_CARD = frozenset(
    {"image_folder", "output_dir", "save_steps", "keep_checkpoints", "num_workers", "logging_steps", "hub_model_id"}
)


def train(recipe: Recipe, resume: bool | str | Path = False) -> Path:
    """Run a recipe to its end.

    Args:
        recipe: What to do.
        resume: True continues from the newest sound checkpoint of `output_dir`, a path from that checkpoint.

    Returns:
        The exported Hub folder, `output_dir/hub`.

    Raises:
        ConfigurationError: If the recipe cannot be run as it is, or `output_dir` holds another run.
        CheckpointError: If a checkpoint or the folder to start from does not fit.
        DataError: If no image can be used.
        TrainingError: If the loss is not finite.
    """
    checkpoint = find_checkpoint(recipe, resume)
    objective = get_objective(recipe.objective)(recipe, checkpoint)
    if recipe.gradient_accumulation_steps > 1 and not objective.counts_from_data:
        raise ConfigurationError(
            f"objective '{recipe.objective}' cannot accumulate gradients: set gradient_accumulation_steps to 1."
        )
    return _Run(recipe, objective, checkpoint).run()


def _build_accelerator(recipe: Recipe, objective: Objective) -> Accelerator:
    find_unused = not objective.every_parameter_every_step
    refusal = f"mixed_precision '{recipe.mixed_precision}' does not work on this machine: use bf16 or no."
    try:
        accelerator = Accelerator(
            mixed_precision=recipe.mixed_precision,
            log_with="tensorboard" if importlib.util.find_spec("tensorboard") else None,
            project_dir=recipe.output_dir,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=find_unused)],
        )
    except ValueError as error:
        raise ConfigurationError(f"{refusal} ({error})") from error
    if recipe.mixed_precision != "no" and not accelerator.native_amp:
        raise ConfigurationError(refusal)  # Accelerate would train in float32 without a word
    return accelerator


def _recompute_activations(model: PreTrainedModel) -> None:
    # transformers renamed the method on its way from 5.20, our floor, to 6.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def _card_context(recipe: Recipe) -> dict[str, Any]:
    """What the exported card says of the training: settings that decide the result, and no paths of this machine."""
    settings = {name: value for name, value in asdict(recipe).items() if name not in _NOT_ON_THE_CARD}
    settings["model"] = recipe.model_fields
    start = "random weights" if recipe.pretrained is None else f"the weights of `{Path(recipe.pretrained).name}`"
    context = {
        "recipe": settings,
        "dataset": Path(recipe.image_folder).resolve().name,
        "source": f"trained with this package, starting from {start}",
        "model_name": Path(recipe.output_dir).resolve().name,
    }
    if recipe.hub_model_id is not None:
        context |= {"repo_id": recipe.hub_model_id, "model_name": recipe.hub_model_id.split("/")[-1]}
    return context


class _Run:
    """One run of a recipe in one process."""

    def __init__(self, recipe: Recipe, objective: Objective, checkpoint: Path | None) -> None:
        self.recipe = recipe
        self.objective = objective
        self.output_dir = Path(recipe.output_dir)
        self.terms = objective.term_weights
        self.sampler = GlobalBatchSampler([s.group for s in objective.samples], recipe.batch_size, recipe.seed)
        listing = repr([(sample.files, sample.label) for sample in objective.samples])
        self.fingerprint = hashlib.sha256(listing.encode()).hexdigest()
        self.accelerator = _build_accelerator(recipe, objective)
        self.empty_steps = 0
        self.first_step = 0

        torch.manual_seed(derive_seed("weights", recipe.seed))
        self.bare_model = objective.build_model()
        if recipe.gradient_checkpointing:
            _recompute_activations(self.bare_model)
        self.bare_optimizer = build_optimizer(self.bare_model, recipe, self.accelerator.device)
        self.model, self.optimizer = self.accelerator.prepare(self.bare_model, self.bare_optimizer)
        if checkpoint is not None:
            self._resume(checkpoint)

    def _resume(self, checkpoint: Path) -> None:
        state = load_state(checkpoint)
        load_optimizer(checkpoint, self.bare_model, self.bare_optimizer)
        if state.scaler and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state.scaler)
        self.first_step = state.step
        logger.info("Resuming from %s.", checkpoint)
        if state.data_fingerprint != self.fingerprint:
            logger.warning(
                "The images in %s have changed since %s: the order of the remaining steps changes with them.",
                self.recipe.image_folder,
                checkpoint.name,
            )

    def run(self) -> Path:
        """Train from the first step to the last, export, and return the Hub folder."""
        recipe, accelerator = self.recipe, self.accelerator
        if accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            recipe.save(self.output_dir / "recipe.yaml")
        if accelerator.log_with:
            accelerator.init_trackers("tensorboard", {name: str(value) for name, value in asdict(recipe).items()})
        self._describe()
        with Monitor(accelerator, self.terms, self.output_dir, self.first_step, recipe.max_steps) as monitor:
            self._train(monitor)
        hub = self.output_dir / "hub"
        if accelerator.is_main_process:
            self._export(hub)
        accelerator.wait_for_everyone()
        accelerator.end_training()
        return hub

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

    def _train(self, monitor: Monitor) -> None:
        recipe = self.recipe
        self.model.train()
        batches = self._batches()
        for step in range(self.first_step, recipe.max_steps):
            asked = time.perf_counter()
            parts = [next(batches)]
            parts += [next(batches) for _ in range(parts[0].plan.parts - 1)]
            monitor.add(self._step(step, parts, time.perf_counter() - asked))
            done = step + 1
            saves = done % recipe.save_steps == 0 or done == recipe.max_steps
            starved = self.empty_steps >= min(self.sampler.steps_per_epoch, recipe.max_steps)
            if saves or starved or done % recipe.logging_steps == 0:
                monitor.flush()
            if starved:
                raise DataError(
                    f"None of the last images of {recipe.image_folder} could be used: "
                    f"{self.output_dir / 'skipped.jsonl'} gives the reason for each."
                )
            if saves:
                self._save(done)

    def _batches(self) -> Iterator[LoadedBatch]:
        recipe, accelerator = self.recipe, self.accelerator
        reader = BatchReader(Path(recipe.image_folder), self.objective.samples, self.objective, recipe.seed)
        plans = self.sampler.plans(
            self.first_step,
            recipe.max_steps,
            accelerator.process_index,
            accelerator.num_processes,
            recipe.gradient_accumulation_steps,
        )
        return load_batches(reader, plans, recipe.num_workers, pin_memory=accelerator.device.type == "cuda")

    def _step(self, step: int, parts: list[LoadedBatch], waited: float) -> StepResult:
        rate = learning_rate(step, self.recipe)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        counts, images = self._counts(parts)
        sums = torch.zeros(len(self.terms), device=self.accelerator.device)
        norm: torch.Tensor | float = 0.0
        self.empty_steps = 0 if images else self.empty_steps + 1
        if images:
            # Dropout and drop path follow from the step, whatever was drawn before.
            torch.manual_seed(derive_seed("step", self.recipe.seed, step, self.accelerator.process_index))
            sums, counts = self._backward(step, parts, counts)
            limit = float(self.recipe.max_grad_norm) or math.inf
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
            self.optimizer.step()
            self.optimizer.zero_grad()
        plan = parts[0].plan
        record = {
            "step": step + 1,
            "epoch": plan.epoch,
            "group": plan.group,
            "learning_rate": rate,
            "grad_norm": norm,
        }
        skipped = [image for part in parts for image in part.skipped]
        return StepResult(record, sums, counts, images, skipped, waited)

    def _counts(self, parts: list[LoadedBatch]) -> tuple[list[float], int]:
        """Addends per term and images over all processes; no addends where only the forward pass tells them."""
        counts = [0.0] * len(self.terms)
        if self.objective.counts_from_data:
            local = [self.objective.counts(part.batch) for part in parts if part.images]
            counts = [float(sum(part.get(term, 0) for part in local)) for term in self.terms]
        *counts, images = self._sum_over_processes([*counts, float(sum(part.images for part in parts))])
        return counts, int(images)

    def _backward(self, step: int, parts: list[LoadedBatch], counts: list[float]) -> tuple[torch.Tensor, list[float]]:
        """Gradients of the whole global batch; returns this process's sums and the global counts per term."""
        accelerator = self.accelerator
        totals = torch.zeros(len(self.terms), device=accelerator.device)
        for part in parts:
            used = float(part.images > 0)  # a stand-in takes part without weight
            with nullcontext() if part is parts[-1] else accelerator.no_sync(self.model):
                terms = self.objective.loss(self.model, self._to_device(part.batch), step)
                if not self.objective.counts_from_data:
                    local = [used * terms[term][1] if term in terms else 0.0 for term in self.terms]
                    counts = self._sum_over_processes(local)
                loss = torch.zeros((), device=accelerator.device)
                for index, (term, weight) in enumerate(self.terms.items()):
                    if term in terms:
                        totals[index] += used * terms[term][0].detach()
                        if weight:
                            loss = loss + used * weight / max(counts[index], 1.0) * terms[term][0]
                # Gradients are averaged over processes, but each has divided by the global count already.
                accelerator.backward(loss * accelerator.num_processes)
        return totals, counts

    def _sum_over_processes(self, values: list[float]) -> list[float]:
        if self.accelerator.num_processes == 1:
            return values  # spares the device a synchronisation
        tensor = torch.tensor(values, dtype=torch.float32, device=self.accelerator.device)
        return self.accelerator.reduce(tensor, "sum").tolist()

    def _to_device(self, batch: Batch) -> Batch:
        device = self.accelerator.device
        return {
            name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }

    def _save(self, done: int) -> None:
        accelerator = self.accelerator
        weights = accelerator.get_state_dict(self.model)
        if accelerator.is_main_process:
            scaler = {} if accelerator.scaler is None else accelerator.scaler.state_dict()
            epoch = done // self.sampler.steps_per_epoch
            save_checkpoint(
                self.output_dir,
                TrainerState(done, epoch, self.fingerprint, scaler),
                self.recipe,
                self.bare_model,
                weights,
                self.bare_optimizer,
                self.objective.processor,
            )
            prune_checkpoints(self.output_dir, self.recipe.keep_checkpoints)
        accelerator.wait_for_everyone()

    def _export(self, hub: Path) -> None:
        model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        export(self.objective.exported(model), self.objective.processor, hub, card_context=_card_context(self.recipe))
        logger.info("Hub folder: %s", hub)
        if self.recipe.hub_model_id is not None:
            self._push(hub, self.recipe.hub_model_id)

    @staticmethod
    def _push(hub: Path, repo_id: str) -> None:
        try:
            result = push(hub, repo_id)
        except (HFRSHeatError, OSError) as error:
            raise TransferError(
                f"The run is finished and its folder exported, but not pushed: {error} "
                f"Push it with `hf-rsheat push {hub} {repo_id}`."
            ) from error
        logger.info("Pushed and verified: %s@%s", result.repo_id, result.revision)
