import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from hf_rsheat.errors import RunInUseError
from hf_rsheat.training import locking
from hf_rsheat.training.checkpoint import latest_checkpoint, list_checkpoints
from hf_rsheat.training.launcher import launcher_command, resume_command
from hf_rsheat.training.locking import is_running, run_lock
from hf_rsheat.training.loop import train
from hf_rsheat.training.signals import StopRequest, exit_status

from .conftest import read_log
from .processes import Training, assert_same_run, tiny

linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells of a parent's death on Linux only")


@pytest.fixture(scope="module")
def reference(tmp_path_factory, scenes):
    """A run of 24 steps that nothing disturbs."""
    recipe = tiny(scenes, tmp_path_factory.mktemp("reference") / "run")
    assert Training(recipe).finish() == [0]
    return recipe


def signal_self(number, step, rank="0"):
    """Have a process signal itself in the middle of a zero-based step."""
    from hf_rsheat.training.step import Stepper

    take = Stepper.take

    def signalled(self, at, *arguments):
        if at == step and os.environ.get("RANK", "0") == rank:
            os.kill(os.getpid(), number)
        return take(self, at, *arguments)

    Stepper.take = signalled


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_within_a_step_and_the_run_continues_to_the_same_bits(
    reference, scenes, tmp_path, number, status
):
    recipe = tiny(scenes, tmp_path / "run", num_workers=1)
    training = Training(recipe, prepare=partial(signal_self, number, 5))
    assert training.finish() == [status]
    assert latest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-6"
    assert "Stopped after step 6 of 24; checkpoint-6 is saved. Continue with:" in training.text
    assert f"-m hf_rsheat.train --config {tmp_path / 'run.yaml'} --resume" in training.text
    assert Training(recipe, resume=True).finish() == [0]
    assert_same_run(reference.output_dir, recipe.output_dir)


def test_a_signal_to_the_whole_group_lets_the_loaders_live_until_the_save_and_not_longer(scenes, tmp_path):
    recipe = tiny(scenes, tmp_path / "run", num_workers=2, max_steps=100_000)
    training = Training(recipe)
    training.wait_for(lambda: training.steps >= 2)
    pid = training.processes[0].pid
    loaders = psutil.Process(pid).children()
    os.killpg(pid, signal.SIGTERM)
    assert training.finish() == [143]
    assert list_checkpoints(tmp_path / "run")
    assert len(loaders) == 2
    assert not psutil.wait_procs(loaders, timeout=20)[1]


@linux
def test_loaders_die_with_a_killed_training(scenes, tmp_path):
    training = Training(tiny(scenes, tmp_path / "run", num_workers=2, max_steps=100_000))
    training.wait_for(lambda: training.steps >= 2)
    pid = training.processes[0].pid
    loaders = psutil.Process(pid).children()
    training.signal(signal.SIGKILL)
    assert training.finish() == [-signal.SIGKILL]
    assert not psutil.wait_procs(loaders, timeout=20)[1]


def never_save():
    from hf_rsheat.training import loop

    loop.save_checkpoint = lambda *_: time.sleep(600)


def test_a_second_signal_stops_at_once_but_an_echo_does_not(scenes, tmp_path):
    training = Training(tiny(scenes, tmp_path / "run"), prepare=never_save)
    training.wait_for(lambda: training.steps >= 1)
    training.signal(signal.SIGTERM)
    time.sleep(0.2)
    training.signal(signal.SIGTERM)  # what a launcher passes on after a cluster has signalled the whole group
    time.sleep(1.2)
    assert training.processes[0].is_alive()
    training.signal(signal.SIGTERM)
    assert training.finish(10) == [-signal.SIGTERM]
    assert not list_checkpoints(tmp_path / "run")


def test_one_process_of_two_tells_the_other(scenes, tmp_path):
    recipe = tiny(scenes, tmp_path / "run")
    training = Training(recipe, processes=2, prepare=partial(signal_self, signal.SIGTERM, 5, rank="1"))
    assert training.finish() == [143, 143]
    assert latest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-6"
    assert training.text.count("Continue with:") == 1
    assert Training(recipe, resume=True, processes=2).finish() == [0, 0]
    assert len(read_log(recipe.output_dir)) == 24


@linux
def test_a_training_whose_launcher_is_killed_saves_and_ends(scenes, tmp_path):
    recipe = tiny(scenes, tmp_path / "run", max_steps=100_000)
    recipe.save(tmp_path / "recipe.yaml")
    command = [sys.executable, "-m", "hf_rsheat.train", "--config", str(tmp_path / "recipe.yaml")]
    script = f"import subprocess; subprocess.run({command!r}, stderr=open({str(tmp_path / 'log')!r}, 'w'))"
    launcher = subprocess.Popen([sys.executable, "-c", script, "hf_rsheat.train"])
    log = tmp_path / "run" / "log.jsonl"
    end = time.monotonic() + 120
    while not (log.exists() and log.read_text()):
        assert time.monotonic() < end
        time.sleep(0.05)
    launcher.kill()
    launcher.wait()
    while is_running(tmp_path / "run"):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert latest_checkpoint(tmp_path / "run").name == f"checkpoint-{len(read_log(tmp_path / 'run'))}"
    assert "Continue with:" in (tmp_path / "log").read_text()


def test_a_second_writer_is_refused_and_a_finished_one_is_not_in_the_way(make_recipe, monkeypatch):
    monkeypatch.setattr(locking, "_PATIENCE", 0)
    recipe = make_recipe(max_steps=3)
    with run_lock(Path(recipe.output_dir)):
        assert is_running(Path(recipe.output_dir))
        with pytest.raises(RunInUseError, match="Another process is writing"):
            train(recipe)
    assert not is_running(Path(recipe.output_dir))
    train(recipe)


def test_signals_that_are_ignored_stay_ignored_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as `nohup` and shell scripts leave it
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.flags == [0, 0]
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.flags == [0, 1]
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == before
    finally:
        signal.signal(signal.SIGINT, previous)


def test_exit_status_of_several_processes():
    assert [exit_status(*flags) for flags in ((0, 0), (2, 0), (0, 1), (1, 3))] == [0, 130, 143, 143]


def test_the_resume_command_names_the_launcher_and_drops_an_old_checkpoint(monkeypatch):
    from hf_rsheat.training import launcher

    assert launcher_command() is None  # pytest is no launcher
    own = resume_command(["--config", "a b.yaml", "--resume", "old/checkpoint-3", "seed=1"], "old/checkpoint-3")
    assert own == f"{sys.executable} -m hf_rsheat.train --config 'a b.yaml' seed=1 --resume"
    words = ["/venv/bin/python", "/venv/bin/accelerate", "launch", "-m", "hf_rsheat.train", "--config", "a.yaml"]
    monkeypatch.setattr(launcher, "launcher_command", lambda: words)
    assert resume_command([]) == "accelerate launch -m hf_rsheat.train --config a.yaml --resume"
