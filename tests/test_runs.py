import json

import pytest
import yaml
from typer.testing import CliRunner

from hf_rsheat.errors import DataError
from hf_rsheat.runs import find_runs, plot_runs, runs_table
from hf_rsheat.training.locking import run_lock


def write_run(folder, losses, *, max_steps=4, images=2, steps_per_epoch=2, hub=False):
    folder.mkdir(parents=True)
    recipe = {"objective": "mae", "image_folder": "x", "output_dir": "y", "max_steps": max_steps}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    lines = [
        {"step": step + 1, "epoch": step // steps_per_epoch, "loss": loss, "images": images, "grad_norm": 1.0}
        for step, loss in enumerate(losses)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if hub:
        (folder / "hub").mkdir()
        (folder / "hub" / "config.json").write_text("{}")
    return folder


def test_states_and_best_losses(tmp_path):
    write_run(tmp_path / "done", [4.0, 2.0, 1.0, 1.0], hub=True)
    write_run(tmp_path / "deep" / "halfway", [4.0, 2.0, 0.1])
    write_run(tmp_path / "new", [])
    broken = write_run(tmp_path / "broken", [4.0, None])
    (broken / "not_finite.json").write_text(json.dumps({"step": 2}))
    running = write_run(tmp_path / "running", [4.0])
    with run_lock(running):
        runs = {run.folder.name: run for run in find_runs(tmp_path)}
    assert {name: run.state for name, run in runs.items()} == {
        "done": "finished",
        "halfway": "stopped",
        "new": "stopped",
        "broken": "not finite",
        "running": "running",
    }
    assert (runs["done"].best_loss, runs["done"].best_epoch) == (1.0, 1)
    assert (runs["halfway"].best_loss, runs["halfway"].best_epoch) == (
        3.0,
        0,
    )  # the epoch that is not over does not count
    assert runs["running"].best_loss == 4.0
    assert runs["new"].best_loss is None
    table = runs_table(find_runs(tmp_path), tmp_path)
    assert "deep/halfway" in table
    assert "3/4" in table


def test_a_folder_without_runs_and_unreadable_runs_are_named(tmp_path, caplog):
    with pytest.raises(DataError, match="No runs in"):
        find_runs(tmp_path)
    write_run(tmp_path / "good", [1.0])
    write_run(tmp_path / "odd", [1.0])
    (tmp_path / "odd" / "recipe.yaml").write_text("objective: [")
    assert [run.folder.name for run in find_runs(tmp_path)] == ["good"]
    assert "odd" in caplog.text


def test_curves_of_several_runs_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    folders = [write_run(tmp_path / name, [3.0, None, 2.0] * 300) for name in ("a", "b")]
    path = plot_runs(folders, tmp_path / "curves.png", ["loss", "grad_norm"])
    assert path.stat().st_size > 10_000
    with pytest.raises(DataError, match=r"No run has 'lose'.*loss"):
        plot_runs(folders, tmp_path / "x.png", ["lose"])
    with pytest.raises(DataError, match=r"no log\.jsonl"):
        plot_runs([tmp_path], tmp_path / "x.png")


def test_the_verbs_print_a_table_and_write_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    import typer

    from hf_rsheat.cli.runs import plot, runs

    app = typer.Typer()
    app.command()(runs)
    app.command()(plot)
    run = write_run(tmp_path / "a", [3.0, 2.0])
    result = CliRunner().invoke(app, ["runs", str(tmp_path)])
    assert result.exit_code == 0
    assert "stopped" in result.output
    result = CliRunner().invoke(app, ["plot", str(run), "--output", str(tmp_path / "p.svg")])
    assert result.exit_code == 0
    assert (tmp_path / "p.svg").exists()
