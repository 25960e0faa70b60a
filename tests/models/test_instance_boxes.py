"""Boxes: codes, anchors, who stands for what, what is drawn, and where it is cut out."""

import math

import pytest
import torch
from torchvision.ops import box_iou, roi_align

from hf_rsheat.models import instance_pooling
from hf_rsheat.models.instance_boxes import (
    BACKGROUND,
    IGNORED,
    TARGETS_AT_ONCE,
    assign,
    decode_boxes,
    encode_boxes,
    make_anchors,
    pool_boxes,
    sample,
)

STDS = (0.1, 0.1, 0.2, 0.2)


def random_boxes(number: int, seed: int, side: float = 100.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(number, 2, generator=generator) * side
    return torch.cat((corners, corners + 1 + torch.rand(number, 2, generator=generator) * side / 2), dim=1)


def test_decoding_undoes_encoding():
    boxes, targets = random_boxes(50, 1), random_boxes(50, 2)
    decoded = decode_boxes(boxes, encode_boxes(boxes, targets, STDS), STDS, (200, 200))
    torch.testing.assert_close(decoded, targets, atol=1e-3, rtol=1e-4)


def test_codes_are_those_of_faster_r_cnn():
    codes = encode_boxes(torch.tensor([[0.0, 0, 10, 20]]), torch.tensor([[5.0, 10, 25, 20]]), STDS)
    expected = [(15 - 5) / 10 / 0.1, (15 - 10) / 20 / 0.1, math.log(2) / 0.2, math.log(0.5) / 0.2]
    torch.testing.assert_close(codes, torch.tensor([expected]))


def test_wild_codes_stay_within_the_image_and_the_scale_limit():
    boxes = torch.tensor([[40.0, 40, 50, 50]] * 2)
    deltas = torch.tensor([[0.0, 0, 1e4, 1e4], [0.0, 0, -1e4, -1e4]])
    decoded = decode_boxes(boxes, deltas, (1.0,) * 4, (60, 90))
    assert decoded[0].tolist() == [0, 0, 90, 60]
    torch.testing.assert_close(decoded[1, 2:] - decoded[1, :2], torch.full((2,), 10 * 0.016))


def test_anchors_go_by_ratio_then_scale_around_the_cells_corners():
    anchors = make_anchors((2, 3), 4, (4, 8), (0.5, 1.0))
    assert anchors.shape == (2 * 3 * 4, 4)
    sides = anchors[:, 2:] - anchors[:, :2]
    root = math.sqrt(2)
    expected = [[16 * root, 16 / root], [32 * root, 32 / root], [16, 16], [32, 32]]
    torch.testing.assert_close(sides[:4], torch.tensor(expected))
    centers = (anchors[:, 2:] + anchors[:, :2]) / 2
    torch.testing.assert_close(centers[::4], torch.tensor([[0.0, 0], [4, 0], [8, 0], [0, 4], [4, 4], [8, 4]]))


def literal_assignment(boxes, targets, pos_iou, neg_iou, min_pos_iou) -> list[int]:
    """The rules of a MaxIoU assigner, written out one box and one target at a time."""
    overlaps = box_iou(targets, boxes)
    match = []
    for column in overlaps.T:
        best = int(column.argmax())
        match.append(best if column[best] >= pos_iou else BACKGROUND if column[best] < neg_iou else IGNORED)
    for index, row in enumerate(overlaps):
        if row.max() >= min_pos_iou:
            for place in (row == row.max()).nonzero()[:, 0].tolist():
                match[place] = index
    return match


@pytest.mark.parametrize("rules", [(0.7, 0.3, 0.3), (0.5, 0.5, 0.5)])
@pytest.mark.parametrize("targets", [1, 3, TARGETS_AT_ONCE, 3 * TARGETS_AT_ONCE + 1])
def test_assignment_follows_the_rules(rules, targets):
    boxes, goals = random_boxes(300, 3), random_boxes(targets, 4)
    boxes = torch.cat((boxes, goals[:1], goals[:1]))  # two boxes that share the best place
    match = assign(boxes, goals, *rules)
    assert match.tolist() == literal_assignment(boxes, goals, *rules)
    assert {BACKGROUND} < set(match.tolist())


def test_without_targets_all_is_background_and_without_boxes_nothing():
    assert assign(random_boxes(3, 0), torch.zeros(0, 4), 0.7, 0.3, 0.3).tolist() == [BACKGROUND] * 3
    assert assign(torch.zeros(0, 4), random_boxes(3, 0), 0.7, 0.3, 0.3).shape == (0,)
    assert [part.shape for part in sample(torch.zeros(0, dtype=torch.int64), 8, 0.5)] == [(0,), (0,)]


def test_sampling_caps_objects_fills_up_with_background_and_skips_the_ignored():
    match = torch.tensor([0] * 40 + [BACKGROUND] * 100 + [IGNORED] * 60)
    objects, background = sample(match, 64, 0.25, torch.Generator().manual_seed(0))
    assert (len(objects), len(background)) == (16, 48)
    assert match[objects].eq(0).all()
    assert match[background].eq(BACKGROUND).all()
    assert len(set(objects.tolist())) == 16
    few = torch.tensor([0] * 2 + [BACKGROUND] * 100)
    objects, background = sample(few, 64, 0.25)
    assert (len(objects), len(background)) == (2, 62)


def test_sampling_is_reproducible_and_draws_nothing_where_all_are_taken():
    match = torch.tensor([0] * 40 + [BACKGROUND] * 100)
    first, again, other = (sample(match, 32, 0.5, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    torch.manual_seed(7)
    sample(match, 1000, 0.5)
    value = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(value, torch.rand(1))


def test_boxes_are_cut_out_of_the_level_that_fits_their_size():
    pyramid = [torch.randn(2, 3, 64 // 2**i, 64 // 2**i) for i in range(5)]
    strides = (4, 8, 16, 32, 64)
    sides = [10, 111.9, 112, 223.9, 224, 250]
    boxes = torch.tensor([[3.0, 2.0, 3 + side, 2 + side] for side in sides])
    pooled = pool_boxes(pyramid, strides, [boxes[:4], boxes[4:]], 7)
    for i, (image, level) in enumerate([(0, 0), (0, 0), (0, 1), (0, 1), (1, 2), (1, 2)]):
        roi = torch.cat((torch.tensor([float(image)]), boxes[i]))[None]
        expected = roi_align(pyramid[level], roi, 7, 1 / strides[level], aligned=True)
        torch.testing.assert_close(pooled[i], expected[0])


@torch.no_grad()
@pytest.mark.parametrize(("size", "scale"), [(7, 0.25), (14, 1 / 32)])
@pytest.mark.parametrize("entries_at_once", [2**20, 1])
def test_boxes_of_any_shape_and_place_are_aligned_as_by_torchvision(size, scale, entries_at_once, monkeypatch):
    monkeypatch.setattr(instance_pooling, "ENTRIES_AT_ONCE", entries_at_once)
    features = torch.randn(2, 3, 10, 14, generator=torch.Generator().manual_seed(0))
    input_size = torch.tensor([14, 10]) / scale
    points = (1.4 * torch.rand(60, 2, 2, generator=torch.Generator().manual_seed(1)) - 0.2) * input_size  # some outside
    boxes = torch.cat((points.amin(dim=1), points.amax(dim=1)), dim=1)
    boxes[:3, 2:] = boxes[:3, :2]
    boxes = torch.cat((torch.arange(60)[:, None] % 2, boxes), dim=1)
    aligned = torch.zeros(60, size, size, 3)
    for some, values in instance_pooling.align_boxes(features, boxes, size, scale):
        aligned[some] = values
    expected = roi_align(features, boxes, size, scale, aligned=True)
    torch.testing.assert_close(aligned.permute(0, 3, 1, 2), expected, atol=1e-5, rtol=1e-5)


def test_pooling_keeps_gradients_and_half_precision_and_takes_no_boxes():
    pyramid = [torch.randn(1, 2, 16 // 2**i, 16 // 2**i).bfloat16().requires_grad_() for i in range(4)]
    pooled = pool_boxes(pyramid, (4, 8, 16, 32), [random_boxes(5, 1, 40)], 7)
    assert pooled.dtype == torch.bfloat16
    pooled.float().sum().backward()
    assert pyramid[0].grad.abs().sum() > 0
    assert pool_boxes(pyramid, (4, 8, 16, 32), [torch.zeros(0, 4)], 7).shape == (0, 2, 7, 7)
