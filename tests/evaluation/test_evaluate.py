"""Evaluation: the JSON holds what a model card needs, and its numbers follow from the predictions."""

import json
import sys

import pytest

from hf_rsheat.errors import ConfigurationError, DataError, MissingExtraError
from hf_rsheat.evaluation import evaluate, report
from hf_rsheat.scenes import KINDS


def test_probe_result_names_data_model_protocol_and_paired_baselines(model_folder, labelled_folder, tmp_path):
    path = tmp_path / "result.json"
    result = evaluate(model_folder, labelled_folder, "knn", folds=5, repeats=2, output_json=path)
    assert json.loads(path.read_text()) == result
    assert result["dataset"]["name"] == "scenes"
    assert result["dataset"]["images"] == 10 * len(KINDS)
    assert result["dataset"]["classes"] == dict.fromkeys(sorted(KINDS), 10)
    assert list(result["dataset"]["unreadable"]) == [f"{KINDS[0]}/broken.png"]
    assert result["model"]["model_type"] == "rs_vheat"
    assert len(result["model"]["weights_sha256"]) == 64
    assert "Nadeau" in result["protocol"]
    assert {"torch", "transformers", "scikit-learn"} <= set(result["versions"])
    assert str(labelled_folder.parent) not in path.read_text()
    ours = result["metrics"]["accuracy"]
    for name in ("untrained network", "colour and gradient histogram"):
        theirs = result["baselines"][name]["accuracy"]
        difference = theirs["model_minus_baseline"]
        assert difference["value"] == pytest.approx(ours["value"] - theirs["value"])
        assert difference["interval95"][0] <= difference["value"] <= difference["interval95"][1]
    assert result["baselines"]["colour and gradient histogram"]["accuracy"]["value"] > 0.6
    assert "histogram" in report(result)


def test_linear_probe_without_baselines(model_folder, labelled_folder):
    result = evaluate(
        model_folder, labelled_folder, "linear", folds=2, repeats=1, baselines=False, dataset_name="Made scenes"
    )
    assert result["baselines"] == {}
    assert result["dataset"]["name"] == "Made scenes"
    assert 0 <= result["metrics"]["accuracy"]["value"] <= 1


def test_classifier_result_agrees_with_its_confusion_matrix(model_folder, labelled_folder):
    result = evaluate(model_folder, labelled_folder, "classify")
    labels, rows = result["confusion"]["labels"], result["confusion"]["rows_true_columns_predicted"]
    assert sum(map(sum, rows)) == result["dataset"]["images"]
    correct = sum(rows[i][i] for i in range(len(labels)))
    assert result["metrics"]["accuracy"]["value"] == pytest.approx(correct / result["dataset"]["images"])
    for index, label in enumerate(labels):
        recall = result["per_class"][label]["recall"]
        assert recall == pytest.approx(rows[index][index] / max(1, sum(rows[index])))
    assert KINDS[0] in report(result)


def test_class_folders_the_classifier_does_not_know_are_listed(model_folder, labelled_folder, tmp_path):
    for name in ("glacier", KINDS[0]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes((labelled_folder / KINDS[1] / "scene_00001.png").read_bytes())
    with pytest.raises(DataError, match=r"no label glacier.*harbor"):
        evaluate(model_folder, tmp_path, "classify")


def test_a_class_without_readable_images_is_named(model_folder, labelled_folder, tmp_path):
    for name in KINDS[:2]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes((labelled_folder / KINDS[1] / "scene_00001.png").read_bytes())
    (tmp_path / KINDS[1] / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=KINDS[1]):
        evaluate(model_folder, tmp_path, "knn", folds=2)


@pytest.mark.parametrize(
    ("options", "advice"),
    [({"task": "detect"}, "knn, linear, classify"), ({"folds": 1}, "at least 2"), ({"modality": "lidar"}, "optical")],
)
def test_unusable_options_are_refused_with_advice(model_folder, labelled_folder, options, advice):
    with pytest.raises(ConfigurationError, match=advice):
        evaluate(model_folder, labelled_folder, **options)


def test_missing_scikit_learn_names_the_extra(model_folder, labelled_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingExtraError, match=r"hf_rsheat\[eval\]"):
        evaluate(model_folder, labelled_folder)
