"""The best checkpoint is kept and exported, also when the run was interrupted."""

from itertools import count
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from hf_rsheat.training.averaging import WeightAverage
from hf_rsheat.training.checkpoint import prune_checkpoints
from hf_rsheat.training.journal import read_lines
from hf_rsheat.training.loop import train
from hf_rsheat.training.objectives.instances import InstanceSegmentation
from hf_rsheat.training.selection import EVALUATIONS, Selection

from .processes import Training


def selection(folder, scores, first_step=0, best_by="mask_ap"):
    values = iter(scores)
    objective = SimpleNamespace(best_by=best_by, evaluate=lambda model, share, gather: next(values))
    return Selection(objective, Accelerator(cpu=True), folder, first_step)


def test_the_earliest_of_the_best_checkpoints_that_exist_is_chosen(tmp_path):
    chosen = selection(tmp_path, [{"mask_ap": value} for value in (0.1, 0.7, 0.7, 0.9)])
    assert chosen.best is None
    for step in (1, 2, 3, 4):
        chosen.measure(nn.Linear(1, 1), step)
        if step < 4:
            (tmp_path / f"checkpoint-{step}").mkdir()
    assert chosen.best == 2
    assert [line["step"] for line in read_lines(tmp_path / EVALUATIONS)] == [1, 2, 3, 4]


def test_a_resumed_run_forgets_what_it_repeats(tmp_path):
    first = selection(tmp_path, [{"mask_ap": 0.1}, {"mask_ap": 0.9}])
    for step in (1, 2):
        first.measure(nn.Linear(1, 1), step)
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert selection(tmp_path, [], first_step=1).best == 1


def test_objectives_without_evaluation_choose_nothing(tmp_path):
    chosen = selection(tmp_path, [], best_by=None)
    chosen.measure(nn.Linear(1, 1), 1)
    assert chosen.best is None
    assert not (tmp_path / EVALUATIONS).exists()


def test_pruning_keeps_the_best(tmp_path):
    for step in range(1, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
    prune_checkpoints(tmp_path, keep=1, best=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-5"]


def test_averages_are_lent_to_the_model_and_taken_back():
    model = nn.Linear(2, 2)
    average = WeightAverage(model, 0.9)
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1)
    with average.applied():
        assert torch.equal(model.weight, before)
    assert torch.equal(model.weight, before + 1)


MEASURED = {2: 0.2, 4: 0.6, 6: 0.4}


@pytest.fixture
def start(tmp_path, make_instances, monkeypatch):
    """Train 6 steps with evaluations at 2, 4 and 6, of which the second is the best."""

    def run(name, resume=False, fail_at=None):
        step = count(2 if not resume else 4, 2)

        def evaluate(*_):
            if (now := next(step)) == fail_at:
                raise ZeroDivisionError
            return {"mask_ap": MEASURED[now]}

        monkeypatch.setattr(InstanceSegmentation, "evaluate", evaluate)
        return train(
            make_instances(output_dir=str(tmp_path / name), max_steps=6, save_steps=2, keep_checkpoints=1), resume
        )

    return run


def test_the_best_checkpoint_is_kept_and_exported(start, tmp_path):
    exported = load_file(start("run") / "model.safetensors")
    folder = tmp_path / "run"
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    best, last = (load_file(folder / f"checkpoint-{step}" / "model.safetensors") for step in (4, 6))
    assert all(torch.equal(exported[name], value) for name, value in best.items())
    assert any(not torch.equal(last[name], value) for name, value in best.items())


def test_a_run_that_died_in_an_evaluation_goes_on_as_if_it_had_not(start, tmp_path):
    whole = load_file(start("whole") / "model.safetensors")
    with pytest.raises(ZeroDivisionError):
        start("died", fail_at=4)
    resumed = load_file(start("died", resume=True) / "model.safetensors")
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    first, second = (read_lines(tmp_path / name / EVALUATIONS) for name in ("whole", "died"))
    assert first == second == [{"step": step, "mask_ap": value} for step, value in MEASURED.items()]


def _compare_processes() -> None:
    """Evaluations of the processes say what each has seen, and how far their batch norms are apart."""

    def evaluate(objective, model, share, gather):
        sums = gather([sum(float(buffer.sum()) for buffer in model.buffers())])
        return {"mask_ap": 0.0, "spread": max(sums) - min(sums), "seen": sorted(gather(list(range(7))[share]))}

    InstanceSegmentation.evaluate = evaluate


def test_two_processes_measure_the_model_that_is_saved_on_all_images(make_instances, tmp_path):
    recipe = make_instances(output_dir=str(tmp_path / "two"), max_steps=3, save_steps=3, batch_size=3)
    assert Training(recipe, processes=2, prepare=_compare_processes).finish() == [0, 0]
    (line,) = read_lines(tmp_path / "two" / EVALUATIONS)
    assert line == {"step": 3, "mask_ap": 0.0, "spread": 0.0, "seen": list(range(7))}
