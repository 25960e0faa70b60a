import pytest

from hf_rsheat.errors import ConfigurationError
from hf_rsheat.train import main

from .conftest import read_log


@pytest.fixture
def recipe_file(make_recipe, tmp_path):
    make_recipe(max_steps=3).save(tmp_path / "recipe.yaml")
    return str(tmp_path / "recipe.yaml")


def test_a_recipe_runs_with_overrides_and_resumes(recipe_file, tmp_path):
    assert main(["--config", recipe_file, "batch_size=8", "model.mlp_ratio=2"]) == 0
    assert main(["--config", recipe_file, "--resume", "batch_size=8", "model.mlp_ratio=2", "max_steps=4"]) == 0
    assert [line["step"] for line in read_log(tmp_path / "run")] == [1, 2, 3, 4]
    assert "mlp_ratio: 2" in (tmp_path / "run" / "recipe.yaml").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["batchsize=3"], "did you mean 'batch_size'"),
        (["objective=rs_heat"], "did you mean 'rs_vheat'"),
        (["image_folder=nowhere"], "'nowhere' is not a folder"),
        (["model.depth=[1]"], "did you mean 'depths'"),
        (["--resume", "nowhere"], "not a complete checkpoint"),
        (["mixed_precision=fp16"], "mixed_precision"),
    ],
)
def test_bad_input_gives_one_sentence_and_status_1(recipe_file, arguments, message, capsys):
    assert main(["--config", recipe_file, *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_dry_run_prints_the_plan_and_writes_nothing(recipe_file, tmp_path, capsys):
    assert main(["--config", recipe_file, "--dry-run"]) == 0
    plan = capsys.readouterr().out
    for part in ("rs_vheat", "4 x optical+sar", "6 x optical", "to 3, 4 an epoch", "RSVHeatForPreTraining, 0.4"):
        assert part in plan
    assert not (tmp_path / "run").exists()


def test_a_dry_run_ends_like_the_run_would(recipe_file, tmp_path, capsys):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    for arguments, message in (
        (["batchsize=3"], "did you mean 'batch_size'"),
        ([f"image_folder={tmp_path / 'broken'}"], "can be used: a.png: cannot be read"),
        (["picture_steps=1", "objective=mae", "model={model_type: x}"], "remove model.model_type"),
    ):
        assert main(["--config", recipe_file, "--dry-run", *arguments]) == 1
        assert message in capsys.readouterr().err


def test_debug_shows_where_an_error_was_raised(recipe_file):
    with pytest.raises(ConfigurationError):
        main(["--config", recipe_file, "batchsize=3", "--debug"])


def test_a_recipe_is_required(capsys):
    with pytest.raises(SystemExit) as exit_:
        main([])
    assert exit_.value.code == 2
    assert "--config" in capsys.readouterr().err
