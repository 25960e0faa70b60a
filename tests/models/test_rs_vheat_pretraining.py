"""Pretraining follows the published losses; every kind of batch works."""

import pytest
import torch
from safetensors.torch import load_file

from hf_rsheat import RSVHeatForPreTraining
from hf_rsheat.models.rs_vheat_pretraining import contrastive_losses, reconstruction_losses
from tests.zoo import randomize, rs_vheat_config


@pytest.fixture
def model() -> RSVHeatForPreTraining:
    model = RSVHeatForPreTraining(rs_vheat_config())
    randomize(model)
    return model.eval()


OPTICAL = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
SAR = torch.randn(3, 1, 64, 64, generator=torch.Generator().manual_seed(1))


def test_losses_are_the_reference_reading(golden):
    """Tensors of our own reading (only the DCT in them is the authors'), made before this code was written."""
    reference = load_file(golden / "rs_vheat/loss_reference_not_upstream.safetensors")
    spatial, frequency = reconstruction_losses(reference["pred"], reference["target"])
    torch.testing.assert_close(spatial.mean(), reference["spatial_l1"], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(frequency.mean(), reference["frequency_l1"], atol=1e-6, rtol=1e-5)
    features = load_file(golden / "rs_vheat/siamese_low_high.safetensors")

    def sensor(name: str) -> torch.Tensor:
        halves = [features[f"{name}.{half}.forward_features"] for half in ("high", "low")]
        return torch.cat(halves).permute(0, 2, 3, 1)

    contrastive = contrastive_losses(sensor("opt"), sensor("sar"))
    torch.testing.assert_close(contrastive.mean(), reference["contrastive_1_minus_cos"], atol=1e-6, rtol=1e-5)
    total = spatial.mean() + frequency.mean() + contrastive.mean()
    torch.testing.assert_close(total, reference["total"], atol=1e-5, rtol=1e-5)


def test_optical_sar_and_paired_batches_work(model):
    optical = model(OPTICAL)
    sar = model(SAR, modality="sar")
    paired = model(OPTICAL, paired_pixel_values=SAR)
    assert optical.contrastive_loss is None
    assert sar.contrastive_loss is None
    assert optical.reconstruction.shape == OPTICAL.shape
    assert sar.reconstruction.shape == SAR.shape
    assert paired.paired_reconstruction.shape == SAR.shape
    assert paired.contrastive_loss.shape == (3,)
    torch.testing.assert_close(paired.spatial_loss, torch.cat((optical.spatial_loss, sar.spatial_loss)))
    torch.testing.assert_close(paired.reconstruction, optical.reconstruction)


def test_loss_is_the_weighted_sum_of_the_terms():
    config = rs_vheat_config(spatial_loss_weight=2.0, frequency_loss_weight=3.0, contrastive_loss_weight=5.0)
    outputs = RSVHeatForPreTraining(config).eval()(OPTICAL, paired_pixel_values=SAR)
    terms = outputs.spatial_loss, outputs.frequency_loss, outputs.contrastive_loss
    expected = sum(weight * term.mean() for weight, term in zip((2, 3, 5), terms, strict=True))
    torch.testing.assert_close(outputs.loss, expected)


def test_the_mask_radius_is_random_in_training_and_fixed_in_eval(model):
    assert torch.equal(model(OPTICAL).low_cut, model(OPTICAL).low_cut)
    torch.testing.assert_close(model(OPTICAL).low_cut, model(OPTICAL, mask_radius=0.25).low_cut)
    model.train()
    assert not torch.equal(model(OPTICAL).low_cut, model(OPTICAL).low_cut)
    radii = torch.tensor([0.2, 0.25, 0.3])
    assert torch.equal(model(OPTICAL, mask_radius=radii).low_cut, model(OPTICAL, mask_radius=radii).low_cut)


def test_images_do_not_influence_each_other(model):
    together, alone = model(OPTICAL), model(OPTICAL[1:2])
    torch.testing.assert_close(together.reconstruction[1:2], alone.reconstruction, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together.spatial_loss[1:2], alone.spatial_loss, atol=1e-5, rtol=1e-4)


def test_a_few_steps_lower_every_term():
    torch.manual_seed(0)
    config = rs_vheat_config(mask_radius_range=(0.25, 0.25), decoder_dim=64)
    model = RSVHeatForPreTraining(config).train()
    smooth = torch.nn.functional.interpolate(torch.randn(4, 3, 8, 8), size=(64, 64), mode="bilinear")
    pair = smooth.mean(1, keepdim=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for _ in range(80):
        outputs = model(smooth, paired_pixel_values=pair)
        optimizer.zero_grad()
        outputs.loss.backward()
        optimizer.step()
        history.append(
            [t.mean().item() for t in (outputs.spatial_loss, outputs.frequency_loss, outputs.contrastive_loss)]
        )
    assert all(last < 0.8 * first for first, last in zip(history[0], history[-1], strict=True))
