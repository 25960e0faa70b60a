import pytest
import torch

from hf_rsheat.models.input_corruption import add_noise, corrupt, hide_patches, masked_patches


def draws(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_noise_is_a_share_of_each_images_own_contrast():
    images = draws(2, 3, 64, 64) * torch.tensor([1.0, 5.0])[:, None, None, None]
    noise = torch.ones_like(images)
    added = add_noise(images, noise, 0.2) - images
    torch.testing.assert_close(added[0], torch.full_like(added[0], 0.2 * images[0].std().item()))
    torch.testing.assert_close(added[1], torch.full_like(added[1], 0.2 * images[1].std().item()))


@pytest.mark.parametrize(("ratio", "masked"), [(0.0, 0), (0.2, 3), (0.5, 8), (1.0, 16)])
def test_the_share_of_masked_patches_is_exact_in_every_image(ratio, masked):
    order = torch.stack([torch.randperm(16) for _ in range(4)])
    assert masked_patches(order, ratio).sum(dim=1).tolist() == [masked] * 4


def test_a_higher_ratio_masks_the_same_patches_and_more():
    order = torch.randperm(16)[None]
    few, many = masked_patches(order, 0.2), masked_patches(order, 0.6)
    assert bool((many | ~few).all())


def test_hidden_patches_are_zero_and_the_others_untouched_also_at_cut_off_edges():
    images = draws(1, 3, 24, 40)  # 2 x 3 patches of 16 px, the last ones cut off
    mask = torch.tensor([[False, True, False, False, False, True]])
    hidden = hide_patches(images, mask, 16)
    assert bool((hidden[..., :16, 16:32] == 0).all())
    assert bool((hidden[..., 16:, 32:] == 0).all())
    kept = torch.ones(24, 40, dtype=torch.bool)
    kept[:16, 16:32] = kept[16:, 32:] = False
    assert torch.equal(hidden[..., kept], images[..., kept])


def test_without_draws_the_image_stays_as_it_is():
    images = draws(2, 3, 32, 32)
    assert corrupt(images, None, None, 0.2, 0.2, 16) is images


def test_the_same_draws_give_the_same_image():
    images, noise, order = draws(2, 3, 32, 32), draws(2, 3, 32, 32), torch.stack([torch.randperm(4) for _ in range(2)])
    first, second = (corrupt(images, noise, order, 0.3, 0.5, 16) for _ in range(2))
    assert torch.equal(first, second)
    alone = corrupt(images[1:], noise[1:], order[1:], 0.3, 0.5, 16)
    torch.testing.assert_close(first[1:], alone)  # the other images of a batch play no part
