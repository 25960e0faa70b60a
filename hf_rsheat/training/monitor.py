"""What a person sees of a run: progress bar, log, trackers, and the list of unusable images."""

import logging
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm

from ..errors import DataError, TrainingError
from .data import Skipped
from .journal import NOT_FINITE, Journal
from .objectives import Objective
from .recipe import Recipe
from .sharding import whole

logger = logging.getLogger(__name__)


@dataclass
class StepResult:
    """What one process knows after a step.

    Args:
        record: Entries of the log line that are equal on all processes; tensors stay on the device until written.
        sums: This process's sum of every term, `(terms,)`, on the device.
        counts: Number of addends of every term over all processes.
        images: Images of all processes.
        indices: Samples this process used.
        skipped: Images this process could not use.
        waited: Seconds spent waiting for data.
    """

    record: dict[str, Any]
    sums: torch.Tensor
    counts: list[float]
    images: int
    indices: list[int]
    skipped: list[Skipped]
    waited: float


@dataclass
class _Window:
    results: list[StepResult] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)


class Monitor:
    """Collects step results and writes them in blocks, so that an accelerator is not stopped at every step.

    Args:
        accelerator: The run's accelerator; only its main process writes.
        objective: Its terms and their weights, and its samples.
        recipe: The run's recipe.
        first_step: Steps done before this run.
    """

    def __init__(self, accelerator: Accelerator, objective: Objective, recipe: Recipe, first_step: int) -> None:
        self._accelerator = accelerator
        self._weights = objective.term_weights
        self._samples = objective.samples
        self._output_dir = output_dir = Path(recipe.output_dir)
        self._tolerated = float(recipe.max_skipped)
        self._window = _Window()
        self._journal = Journal(output_dir, first_step) if accelerator.is_main_process else None
        self._bar = tqdm(
            total=recipe.max_steps,
            initial=first_step,
            disable=not accelerator.is_main_process,
            unit="step",
            dynamic_ncols=True,
        )

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def add(self, result: StepResult) -> None:
        """Take in one step."""
        self._window.results.append(result)
        self._bar.update()

    def flush(self) -> None:
        """Write all steps taken in since the last time; called on every process.

        Raises:
            TrainingError: If a loss or a gradient is not finite. Its log line and `not_finite.json` are written first.
            DataError: If more images than the recipe tolerates cannot be used.
        """
        results, elapsed = self._window.results, time.perf_counter() - self._window.started
        self._window = _Window()
        if not results:
            return
        totals = self._accelerator.reduce(torch.stack([result.sums for result in results]), "sum").tolist()
        skipped = gather_object([image for result in results for image in result.skipped])
        pace = {
            "samples_per_second": round(sum(result.images for result in results) / elapsed, 3),
            "data_wait": round(sum(result.waited for result in results) / elapsed, 4),
        }
        records = [self._record(result, sums) | pace for result, sums in zip(results, totals, strict=True)]
        if self._journal is not None:
            self._report(self._journal, records, skipped)
        for result, record in zip(results, records, strict=True):
            if record["images"] and self._diverged(record):
                self._give_up(result, record)
        if skipped:
            self._check_skipped()

    def _check_skipped(self) -> None:
        (reasons,) = broadcast_object_list([self._journal and list(self._journal.skipped.values())])
        total = len({path for sample in self._samples for _, path in sample.files})
        if len(reasons) > self._tolerated * total:
            common = "; ".join(f"{count} x {reason}" for reason, count in Counter(reasons).most_common(5))
            raise DataError(
                f"{len(reasons)} of {total} images cannot be used, more than max_skipped: {self._tolerated:g} allows "
                f"({common}): {self._output_dir / 'skipped.jsonl'} lists them. Mend or remove them, or raise it."
            )

    def _diverged(self, record: dict[str, Any]) -> bool:
        # A loss scaler meets infinite gradients on its way to the right scale, and skips those steps.
        return record["loss"] is None or (record["grad_norm"] is None and self._accelerator.scaler is None)

    def _give_up(self, result: StepResult, record: dict[str, Any]) -> NoReturn:
        what = "loss" if record["loss"] is None else "gradient"
        files = [[path for _, path in self._samples[index].files] for index in gather_object(result.indices)]
        if self._journal is not None:
            self._journal.give_up(record, files)
        raise TrainingError(
            f"The {what} of step {record['step']} is not finite: {self._output_dir / NOT_FINITE} lists its images. The "
            "last checkpoint is intact: continue with --resume and a lower learning_rate, mixed_precision bf16 or no, "
            "or without these images; from the start, raising warmup_steps helps too."
        )

    def _record(self, result: StepResult, sums: Sequence[float]) -> dict[str, Any]:
        means = {
            term: total / count
            for term, total, count in zip(self._weights, sums, result.counts, strict=True)
            if count > 0
        }
        loss = sum(self._weights[term] * mean for term, mean in means.items()) if means else None
        line = {"step": result.record["step"], "loss": loss, **means, **result.record, "images": result.images}
        return {name: _plain(value) for name, value in line.items()}

    def _report(self, journal: Journal, records: list[dict[str, Any]], skipped: list[Skipped]) -> None:
        journal.write(records)
        for image in journal.skip(skipped):
            logger.warning("Skipped %s: %s", image.path, image.reason)
        for record in records:
            values = {name: value for name, value in record.items() if isinstance(value, int | float)}
            self._accelerator.log(values, step=record["step"])
        last = records[-1]
        shown = {"img/s": f"{last['samples_per_second']:.1f}", "wait": f"{last['data_wait']:.0%}"}
        if last["loss"] is not None:
            shown = {"loss": f"{last['loss']:.4f}", **shown}
        self._bar.set_postfix(shown)


def _plain(value: Any) -> Any:
    """A JSON value: tensors as numbers, and null for what JSON cannot hold (NaN, infinity)."""
    value = whole(value).item() if isinstance(value, torch.Tensor) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
