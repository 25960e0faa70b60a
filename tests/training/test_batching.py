"""Samples that move into their batch: the same values as stacked, in the memory that models are fastest with."""

import numpy as np
import pytest
import torch

from hf_rsheat.models.image_processing_rs4d import RS4DImageProcessor
from hf_rsheat.models.image_processing_rs_vheat import RSVHeatImageProcessor
from hf_rsheat.models.image_processing_selective_mae import SelectiveMAEImageProcessor
from hf_rsheat.models.image_processing_vheat import VHeatImageProcessor
from hf_rsheat.training.batching import BatchRows, stack
from hf_rsheat.training.normalization import normalize

DTYPES = (torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.bool)


def values(dtype, count=3, shape=(2, 5, 7)):
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.integers(0, 2, shape)).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_stacked_without_a_copy(dtype):
    tensors = values(dtype)
    rows = BatchRows(5)  # two samples that could not be used
    samples = [rows.add({"x": tensor, "name": "a"}) for tensor in tensors]
    batch = stack([sample["x"] for sample in samples])
    assert torch.equal(batch, torch.stack(tensors))
    assert batch.dtype == dtype
    assert batch.is_contiguous()
    assert batch.data_ptr() == samples[0]["x"].data_ptr()
    # As allocated by PyTorch, and with nothing before it in its memory: so it stays aligned in another process.
    assert batch.data_ptr() % 64 == 0
    assert batch.storage_offset() == 0
    assert samples[0]["name"] == "a"


def test_memory_is_used_again_only_when_nobody_holds_it():
    def batch():
        rows = BatchRows(2)
        return stack([rows.add({"x": tensor})["x"] for tensor in values(torch.float32, 2, (999,))])

    first, second = batch(), batch()
    assert first.data_ptr() != second.data_ptr()
    place, part = first.data_ptr(), first[1, 5:]  # a view of a view keeps it, too
    del first
    third = batch()
    assert third.data_ptr() != place
    del part
    assert batch().data_ptr() == place


def test_what_are_no_rows_is_stacked_as_ever():
    whole = torch.arange(24.0).view(4, 6)
    for tensors in (
        list(whole),
        [whole[0], whole[2]],  # not one after the other
        [whole[1], whole[0]],
        [whole[:, 0], whole[:, 1]],  # not contiguous
        [whole[0], whole[0]],
        [torch.zeros(3), torch.ones(3)],
        [torch.tensor(1.0), torch.tensor(2.0)],
    ):
        assert torch.equal(stack(tensors), torch.stack(tensors))
    with pytest.raises(RuntimeError, match="equal size"):
        stack([torch.zeros(3), torch.zeros(4)])


def test_a_sample_of_another_shape_or_dtype_stays_as_it_is():
    rows = BatchRows(3)
    added = [rows.add({"x": x})["x"] for x in (torch.zeros(2), torch.ones(3), torch.ones(2, dtype=torch.int64))]
    assert [(x.shape[0], x.dtype) for x in added] == [(2, torch.float32), (3, torch.float32), (2, torch.int64)]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32])
@pytest.mark.parametrize(
    "processor_class", [VHeatImageProcessor, RSVHeatImageProcessor, SelectiveMAEImageProcessor, RS4DImageProcessor]
)
def test_views_are_normalised_as_the_processor_does(processor_class, dtype):
    """Its options are resolved once, not per image; RS4D's pads what is smaller than its size."""
    factor = {} if dtype == torch.uint8 else {"rescale_factor": 1 / 300}
    size = {"height": 24, "width": 24}
    view = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (3, 16, 20), dtype=np.uint8)).to(dtype)
    kept = view.clone()
    processor = processor_class(size=size, **factor)
    options = {"do_resize": False, "do_center_crop": False, "input_data_format": "channels_first"}
    expected = processor(view, return_tensors="pt", **options).pixel_values[0]
    for _ in range(2):
        found = normalize(processor, view, "optical")
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
    assert torch.equal(view, kept)
