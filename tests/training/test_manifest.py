import pytest

from hf_rsheat.errors import ConfigurationError, DataError
from hf_rsheat.training.image_folder import Sample
from hf_rsheat.training.loop import train
from hf_rsheat.training.manifest import read_manifest

from .conftest import read_log


def test_a_manifest_pairs_files_of_any_name(scenes, tmp_path, make_recipe):
    path = tmp_path / "pairs.csv"
    path.write_text("sar,optical\nsar/alone.png,optical/scene7.png\n,optical/scene8.png\n")
    assert read_manifest(path, ["optical", "sar"]) == [
        Sample((("optical", "optical/scene7.png"), ("sar", "sar/alone.png"))),
        Sample((("optical", "optical/scene8.png"),)),
    ]
    recipe = make_recipe(manifest=str(path), max_steps=2, save_steps=2, warmup_steps=0)
    train(recipe)
    assert {line["group"] for line in read_log(recipe.output_dir)} == {"optical+sar", "optical"}


def test_manifests_that_cannot_be_used_are_errors(tmp_path, make_recipe, classes):
    path = tmp_path / "m.csv"
    with pytest.raises(DataError, match="Cannot read the manifest"):
        read_manifest(path, ["optical"])
    path.write_text("optcal\na.png\n")
    with pytest.raises(DataError, match="unknown column 'optcal': did you mean 'optical'"):
        read_manifest(path, ["optical", "sar"])
    path.write_text("optical,sar\n,\n")
    with pytest.raises(DataError, match="names no image"):
        read_manifest(path, ["optical", "sar"])
    with pytest.raises(ConfigurationError, match="remove manifest"):
        train(make_recipe(objective="classification", image_folder=str(classes), manifest=str(path)))
