"""A run that is killed again and again ends with the bits of one that is left alone."""

import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from hf_rsheat.training.checkpoint import latest_checkpoint
from hf_rsheat.training.journal import read_lines

from .processes import Training, assert_same_run, tiny

SAVE_STEPS = 3


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, scenes):
    """Runs that nobody kills, by number of processes."""
    folders: dict[int, Path] = {}

    def run(processes: int) -> Path:
        if processes not in folders:
            folders[processes] = tmp_path_factory.mktemp("undisturbed") / "run"
            recipe = tiny(scenes, folders[processes], save_steps=SAVE_STEPS)
            assert Training(recipe, processes=processes).finish() == [0] * processes
        return folders[processes]

    return run


def drafts(folder):
    return list(folder.glob(".draft-*"))


def kill(training, rng, ranks):
    """SIGKILL at a random moment: so many steps after the start, or a little after a save has begun.

    Returns:
        Whether it came in time, and whether it hit a save.
    """
    steps = training.steps + rng.randint(0, 2 * SAVE_STEPS)
    if rng.random() < 0.5:
        training.wait_for(lambda: drafts(training.output_dir))
    else:
        training.wait_for(lambda: training.steps >= steps)
    time.sleep(rng.uniform(0, 0.03))
    in_time = training.processes[ranks[0]].is_alive()
    for rank in ranks:
        training.processes[rank].kill()
    for process in training.processes:
        process.join(3)  # who waits for a dead peer is killed by a launcher, sooner or later
        process.kill()
    training.finish()
    return in_time, bool(drafts(training.output_dir))


def run_to_the_end_under_fire(recipe, rng, kills, processes=1):
    """Start, kill and resume one run until it ends or has been killed often enough; returns (kills, kills in saves)."""
    folder = Path(recipe.output_dir)
    done = hits = 0
    while done < kills:
        begun = latest_checkpoint(folder)
        logged = len(read_lines(folder / "log.jsonl"))
        first = int(begun.name.rpartition("-")[2]) if begun else 0
        assert logged - first <= SAVE_STEPS, "steps repeated"
        ranks = rng.choice([[rank] for rank in range(processes)] + [list(range(processes))])
        in_time, in_save = kill(Training(recipe, resume=True, processes=processes), rng, ranks)
        if not in_time:
            break
        done, hits = done + 1, hits + in_save
    assert Training(recipe, resume=True, processes=processes).finish() == [0] * processes
    return done, hits


def test_three_kills_cost_no_bit(undisturbed, scenes, tmp_path):
    recipe = tiny(scenes, tmp_path / "run", save_steps=SAVE_STEPS)
    kills, _ = run_to_the_end_under_fire(recipe, random.Random(0), 3)
    assert kills == 3
    assert_same_run(undisturbed(1), recipe.output_dir)


def _fire(undisturbed, scenes, tmp_path, kills, processes):
    total = hits = runs = 0
    while total < kills:
        recipe = tiny(scenes, tmp_path / f"run{runs}", save_steps=SAVE_STEPS)
        rng = random.Random(runs)
        done, in_saves = run_to_the_end_under_fire(recipe, rng, min(10, kills - total), processes)
        assert_same_run(undisturbed(processes), recipe.output_dir)
        total, hits, runs = total + done, hits + in_saves, runs + 1
    print(
        f"\n{total} kills of {processes} process(es) in {runs} runs, {hits} of them in a save: all resumed, equal bits"
    )
    assert hits


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_kills_cost_no_bit(undisturbed, scenes, tmp_path):
    _fire(undisturbed, scenes, tmp_path, 50, 1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills_of_one_or_both_of_two_processes_cost_no_bit(undisturbed, scenes, tmp_path):
    _fire(undisturbed, scenes, tmp_path, 20, 2)


def _torchrun(recipe_file):
    """Two processes under a real launcher, in a session of their own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "hf_rsheat.train", "--config", str(recipe_file), "--resume"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with recipe_file.with_suffix(".log").open("a") as log:
        return subprocess.Popen(command, env=environment, stderr=log, stdout=log, start_new_session=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("victim", ["launcher", "one worker", "everything"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_launcher_worker_or_group_costs_no_bit(undisturbed, scenes, tmp_path, victim, number):
    recipe = tiny(scenes, tmp_path / "run", save_steps=SAVE_STEPS)
    recipe.save(tmp_path / "recipe.yaml")
    launcher = _torchrun(tmp_path / "recipe.yaml")
    log = tmp_path / "run" / "log.jsonl"
    while len(read_lines(log)) < 4 and launcher.poll() is None:
        time.sleep(0.01)
    workers = [process for process in psutil.Process(launcher.pid).children() if "hf_rsheat.train" in process.cmdline()]
    assert len(workers) == 2
    started = psutil.Process(launcher.pid)
    for process in {"launcher": [started], "one worker": workers[:1], "everything": [started, *workers]}[victim]:
        process.send_signal(number)
    assert launcher.wait(120) != 0
    assert not psutil.wait_procs(workers, timeout=60)[1]
    last = _torchrun(tmp_path / "recipe.yaml")
    assert last.wait(240) == 0, (tmp_path / "recipe.log").read_text()[-3000:]
    assert_same_run(undisturbed(2), recipe.output_dir)


def note_samples(file):
    """Have every process write down which samples each step uses."""
    from hf_rsheat.training.step import Stepper

    take = Stepper.take

    def noted(self, step, parts, *arguments):
        used = [index for part in parts for index in part.indices]
        with open(file, "a") as notes:
            notes.write(f"{step} {parts[0].plan.epoch} {' '.join(map(str, used))}\n")
        return take(self, step, parts, *arguments)

    Stepper.take = noted


def test_the_number_of_processes_may_change_at_a_checkpoint(scenes, tmp_path):
    """1, 2 and 1 processes: the same samples in every step, each once an epoch, and the same losses to 1e-6."""
    from .conftest import TINY_MODEL

    model = {**TINY_MODEL, "drop_path_rate": 0.0}
    alone = tiny(scenes, tmp_path / "alone", model=model, max_steps=12)
    assert Training(alone, prepare=partial(note_samples, str(tmp_path / "alone.txt"))).finish() == [0]
    for processes, until in ((1, 4), (2, 8), (1, 12)):
        recipe = tiny(scenes, tmp_path / "changing", model=model, save_steps=4, max_steps=12)
        stop = partial(_stop_after, until, str(tmp_path / "changing.txt"))
        status = 0 if until == 12 else 143
        assert Training(recipe, True, processes, prepare=stop).finish() == [status] * processes
    expected, found = (_read_notes(tmp_path / f"{name}.txt") for name in ("alone", "changing"))
    assert found == expected
    first_epoch = [index for (_, epoch), indices in found.items() if epoch == 0 for index in indices]
    assert len(first_epoch) == len(set(first_epoch)) == 10  # all but the broken one
    pairs = zip(read_lines(tmp_path / "alone/log.jsonl"), read_lines(tmp_path / "changing/log.jsonl"), strict=True)
    for before, after in pairs:
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-6, abs=1e-6)


def _stop_after(step, file):
    from .test_signals import signal_self

    note_samples(file)
    signal_self(signal.SIGTERM, step - 1)


def _read_notes(file):
    """{(step, epoch): sorted samples}, from lines that several processes wrote."""
    samples: dict[tuple[int, int], list[int]] = {}
    for line in file.read_text().splitlines():
        step, epoch, *indices = map(int, line.split())
        samples.setdefault((step, epoch), []).extend(indices)
    return {key: sorted(indices) for key, indices in samples.items()}
