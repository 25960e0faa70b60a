"""HOG cells are the original's; the score, which is zero there, ranks structure above noise above nothing."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from hf_rsheat.models.hog_scores import hog_histograms, hog_scores


def test_cells_are_the_originals(golden):
    outputs = load_file(golden / "selective_mae/small_pretrain_outputs.safetensors")
    cells = F.normalize(hog_histograms(outputs["input"]), dim=2)
    torch.testing.assert_close(cells, outputs["hog_cells"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("patch_size", [7, 8, 12, 14, 16, 32])
def test_any_patch_size_and_grid_gives_one_score_per_patch(patch_size):
    scores = hog_scores(torch.rand(2, 3, 3 * patch_size, 5 * patch_size), patch_size)
    assert scores.shape == (2, 15)
    assert (scores > 0).all()


def test_an_edge_scores_above_noise_and_noise_above_flat():
    image = torch.zeros(1, 1, 16, 48)
    image[..., 16:32] += 0.1 * torch.rand(16, 16)
    image[..., 40:] = 1
    flat, noise, edge = hog_scores(image, 16)[0].tolist()
    assert edge > 2 * noise
    assert noise > 5 * flat
