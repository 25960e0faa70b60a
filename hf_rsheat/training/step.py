"""One optimiser step over all processes: the gradient of the global batch, divided by global counts."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from . import zero
from .averaging import WeightAverage
from .data import Batch, LoadedBatch
from .environment import sum_over_processes
from .monitor import StepResult
from .objectives import Objective
from .objectives.base import Terms
from .optimization import learning_rate
from .pruning import Pruning
from .randomness import derive_seed
from .recipe import Recipe
from .signals import exit_status


@dataclass(frozen=True)
class Agreement:
    """What all processes know before they compute a step.

    Args:
        counts: Addends per term; zeros where only the forward pass tells them.
        images: Images of the global batch.
        exit_status: Of a run that was told to stop, 0 otherwise.
    """

    counts: list[float]
    images: int
    exit_status: int


class Stepper:
    """Takes optimiser steps.

    Args:
        accelerator: The run's accelerator.
        model: The prepared model.
        optimizer: Its prepared optimiser.
        objective: What is learned.
        recipe: The run's recipe.
        pruning: Told every image's loss, and gives the images their weights, if any.
        average: Takes in the weights after every step, if any.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        objective: Objective,
        recipe: Recipe,
        pruning: Pruning | None,
        average: WeightAverage | None,
    ) -> None:
        self.accelerator = accelerator
        self.model = model
        self.optimizer = optimizer
        self.objective = objective
        self.recipe = recipe
        self.pruning = pruning
        self.average = average
        self.terms = objective.term_weights

    def agree(self, parts: list[LoadedBatch], stop_flags: list[float]) -> Agreement:
        """Sum the counts of a step and the `StopRequest.flags` over all processes, in one collective."""
        counts = [0.0] * len(self.terms)
        if self.objective.counts_from_data:
            local = [self.objective.counts(part.batch) for part in parts if part.images]
            counts = [float(sum(part.get(term, 0) for part in local)) for term in self.terms]
        images = float(sum(part.images for part in parts))
        *counts, images, interrupted, terminated = sum_over_processes(self.accelerator, [*counts, images, *stop_flags])
        return Agreement(counts, int(images), exit_status(interrupted, terminated))

    def take(self, step: int, parts: list[LoadedBatch], agreed: Agreement, waited: float) -> StepResult:
        """Take a zero-based step; one without images changes no weight."""
        rate = learning_rate(step, self.recipe)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        sums, counts = torch.zeros(len(self.terms), device=self.accelerator.device), agreed.counts
        norm: torch.Tensor | float = 0.0
        if agreed.images:
            # Dropout and drop path follow from the step, whatever was drawn before.
            torch.manual_seed(derive_seed("step", self.recipe.seed, step, self.accelerator.process_index))
            sums, counts = self._backward(step, parts, counts)
            self._observe(sums, counts)
            limit = float(self.recipe.max_grad_norm) or math.inf
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.average is not None:
                self.average.update(step)
        plan = parts[0].plan
        record = {
            "step": step + 1,
            "epoch": plan.epoch,
            "group": plan.group,
            "learning_rate": rate,
            "grad_norm": norm,
        }
        skipped = [image for part in parts for image in part.skipped]
        used = [index for part in parts for index in part.indices]
        return StepResult(record, sums, counts, agreed.images, used, skipped, waited)

    def _observe(self, sums: torch.Tensor, counts: list[float]) -> None:
        if self.objective.watches_terms:
            totals = sum_over_processes(self.accelerator, sums.tolist())
            means = zip(self.terms, totals, counts, strict=True)
            self.objective.observe({term: total / count for term, total, count in means if count})

    def _backward(self, step: int, parts: list[LoadedBatch], counts: list[float]) -> tuple[torch.Tensor, list[float]]:
        """Gradients of the whole global batch; returns this process's sums and the global counts per term."""
        accelerator = self.accelerator
        totals = torch.zeros(len(self.terms), device=accelerator.device)
        for part in parts:
            used = float(part.images > 0)  # a stand-in takes part without weight
            with nullcontext() if part is parts[-1] else self._accumulating():
                terms = self.objective.loss(self.model, to_device(part.batch, accelerator.device), step)
                if not self.objective.counts_from_data:
                    local = [used * terms[term][1] if term in terms else 0.0 for term in self.terms]
                    counts = sum_over_processes(accelerator, local)
                importance = self._importance(part, terms)
                loss = torch.zeros((), device=accelerator.device)
                for index, (term, weight) in enumerate(self.terms.items()):
                    if term in terms:
                        addends = terms[term][0]
                        totals[index] += used * addends.detach().sum()
                        if weight:
                            loss = loss + used * weight / max(counts[index], 1.0) * (importance * addends).sum()
                # Gradients are averaged over processes, but each has divided by the global count already.
                accelerator.backward(loss * accelerator.num_processes)
        return totals, counts

    def _accumulating(self) -> AbstractContextManager[None]:
        if zero.active(self.accelerator):
            return zero.accumulating(self.accelerator)
        return self.accelerator.no_sync(self.model)

    def _importance(self, part: LoadedBatch, terms: Terms) -> torch.Tensor | float:
        """How much each image of a part counts in the gradient; notes their losses where these prune later epochs."""
        if self.pruning is None or not part.images:
            return 1.0
        losses = torch.stack([weight * terms[term][0].detach() for term, weight in self.terms.items() if weight])
        self.pruning.record(part.indices, losses.sum(0))
        return self.pruning.weights_of(part.indices, self.accelerator.device)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }
