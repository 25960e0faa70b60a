"""The example for transformers' Trainer in docs/instances.md runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch

from hf_rsheat import RS4DForInstanceSegmentation, RS4DImageProcessor

from .conftest import BACKBONE, DETECTOR

DOCS = Path(__file__).parents[2] / "docs" / "instances.md"


def test_the_trainer_example_of_the_docs_trains_and_saves(coco, tmp_path, monkeypatch):
    (example,) = (code for code in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL) if "Trainer" in code)
    assert len(example.splitlines()) <= 24
    (tmp_path / "data").symlink_to(coco)
    monkeypatch.chdir(tmp_path)
    names = {"SIZE": 64, "BACKBONE": BACKBONE, "DETECTOR": DETECTOR, "STEPS": 2}
    exec(compile(example, str(DOCS), "exec"), names)
    losses = [entry["train_loss"] for entry in names["trainer"].state.log_history if "train_loss" in entry]
    assert losses == [pytest.approx(losses[0])]
    assert torch.isfinite(torch.tensor(losses)).all()
    model = RS4DForInstanceSegmentation.from_pretrained(tmp_path / "run" / "model").eval()
    processor = RS4DImageProcessor.from_pretrained(tmp_path / "run" / "model")
    inputs = processor(names["rows"][0]["image"], return_tensors="pt")
    with torch.no_grad():
        (result,) = processor.post_process_instance_segmentation(model(**inputs), target_sizes=[(128, 128)])
    assert result["segmentation"].shape == (128, 128)
    assert model.config.id2label == {0: "ship", 1: "building"}
