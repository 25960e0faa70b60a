"""A tiny classifier folder and a folder of labelled scenes, with one broken file among them."""

import pytest
import torch

from hf_rsheat import RSVHeatConfig, RSVHeatForImageClassification, RSVHeatImageProcessor
from hf_rsheat.scenes import KINDS, write_labelled_scenes


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(1000)
    config = RSVHeatConfig(
        image_size=32,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        drop_path_rate=0.0,
        layer_scale_init_value=None,
        id2label=dict(enumerate(KINDS)),
        label2id={kind: index for index, kind in enumerate(KINDS)},
    )
    RSVHeatForImageClassification(config).save_pretrained(folder)
    RSVHeatImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def labelled_folder(tmp_path_factory):
    folder = write_labelled_scenes(tmp_path_factory.mktemp("data") / "scenes", 10 * len(KINDS), 32)
    (folder / KINDS[0] / "broken.png").write_bytes(b"not an image")
    return folder
