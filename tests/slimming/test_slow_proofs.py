"""Proofs that take minutes: memory of the ridge correction, and the curves on scikit-learn's digits."""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from hf_rsheat.slimming import slim
from hf_rsheat.slimming.shells import Shells

pytestmark = pytest.mark.slow

MEMORY = """
import json, resource, sys, torch
from transformers import ViTConfig, ViTModel
from hf_rsheat.slimming import slim
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
torch.set_num_threads(1)
tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "image_size": 32}
slim(ViTModel(ViTConfig(**tiny)), 0.5, correction="ridge", calibration=[torch.randn(2, 3, 32, 32)])  # loads libraries
batches = [torch.randn(16, 3, 224, 224) for _ in range(3)]
before = peak()
config = ViTConfig(hidden_size=384, num_hidden_layers=4, num_attention_heads=6, intermediate_size=1536)
model = ViTModel(config, add_pooling_layer=False).eval()
if sys.argv[1] == "forward":
    with torch.no_grad():
        model(batches[0])
else:
    slim(model, 0.5, correction="ridge", calibration=batches)
print(json.dumps([before, peak()]))
"""


def measured(what: str) -> tuple[int, int]:
    """Peak resident memory in KiB before the model is built and at the end, in a fresh process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, what], env=environment, capture_output=True, text=True, check=True
    )
    before, after = json.loads(result.stdout)
    return before, after


def test_ridge_needs_at_most_twice_the_memory_of_a_forward_pass():
    bare, forward = measured("forward")
    bare_too, ridge = measured("ridge")
    assert ridge - bare_too <= 2 * (forward - bare)


class Digits:
    """8 x 8 digits, 1200 to learn from and 597 to test on."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
        order = torch.from_numpy(np.random.default_rng(0).permutation(len(pixels)))
        labels = torch.from_numpy(digits.target)
        self.train, self.test = order[:1200], order[1200:]
        self.pixels, self.labels = pixels, labels

    def knn(self, model) -> float:
        from sklearn.neighbors import KNeighborsClassifier

        with torch.no_grad():
            features = model.vit(self.pixels).last_hidden_state[:, 0].numpy()
        probe = KNeighborsClassifier(5, metric="cosine").fit(features[self.train], self.labels[self.train])
        return float(probe.score(features[self.test], self.labels[self.test]))

    def head(self, model) -> float:
        with torch.no_grad():
            return float((model(self.pixels[self.test]).logits.argmax(1) == self.labels[self.test]).float().mean())

    def fit(self, slimmable: bool, epochs: int = 60) -> ViTForImageClassification:
        torch.manual_seed(0)
        sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 192}
        model = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=2, num_channels=1, num_labels=10))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        shells, rng = Shells(model), np.random.default_rng(0)
        for _ in range(epochs):
            for rows in self.train[torch.randperm(1200)].split(64):
                logits = model(self.pixels[rows]).logits
                loss = F.cross_entropy(logits, self.labels[rows])
                if slimmable:
                    for width in (0.01, *rng.uniform(0.01, 1, 3)):
                        own = shells.at(float(width))(self.pixels[rows]).logits.log_softmax(-1)
                        loss = loss - 0.25 * (own * logits.detach().softmax(-1)).sum(-1).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return model.eval()


@pytest.fixture(scope="module")
def digits():
    return Digits()


@pytest.fixture(scope="module")
def plain(digits):
    torch.set_num_threads(1)
    return digits.fit(slimmable=False)


def test_k_nn_falls_with_width_and_ridge_saves_the_head(digits, plain):
    scores = [digits.knn(slim(plain, share)) for share in (0.25, 0.5, 0.75, 1.0)]
    assert scores[-1] > 0.93
    assert all(wider > narrower - 0.03 for narrower, wider in itertools.pairwise(scores))
    calibration = list(digits.pixels[digits.train[:256]].split(64))
    for share in (0.25, 0.5):
        ridge = slim(plain, share, correction="ridge", calibration=calibration)
        assert digits.head(ridge) >= digits.head(slim(plain, share)) + 0.1


def test_slimmable_training_beats_post_hoc_slimming_at_small_widths(digits, plain):
    trained = digits.fit(slimmable=True)
    assert digits.knn(trained) > digits.knn(plain) - 0.03
    for share in (0.1, 0.25):
        assert digits.knn(slim(trained, share)) > digits.knn(slim(plain, share))
    assert digits.knn(slim(trained, 0.1)) > digits.knn(slim(plain, 0.1)) + 0.2
