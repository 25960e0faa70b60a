"""What the loader costs above the work itself, and that it keeps nothing."""

import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from hf_rsheat.models.image_processing_selective_mae import SelectiveMAEImageProcessor
from hf_rsheat.training.augmentation import Geometry
from hf_rsheat.training.data import BatchReader, load_batches
from hf_rsheat.training.image_folder import decode, scan_modalities
from hf_rsheat.training.normalization import normalize
from hf_rsheat.training.objectives import get_objective
from hf_rsheat.training.recipe import Recipe
from hf_rsheat.training.sampler import GlobalBatchSampler

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """64 images of 256 px as JPEG, with structure at all scales."""
    folder = tmp_path_factory.mktemp("photos")
    for index in range(64):
        rng = np.random.default_rng(index)
        layers = [
            np.asarray(Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).resize((256, 256)), float)
            for side in (4, 16, 64, 256)
        ]
        mixed = np.average(layers, axis=0, weights=[8, 4, 2, 1]).astype(np.uint8)
        Image.fromarray(mixed).save(folder / f"{index}.jpg", quality=90)
    return folder


def batches(folder, size, steps, batch_size):
    model = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    recipe = Recipe(objective="mae", image_folder=str(folder), output_dir="x", image_size=size, model=model)
    objective = get_objective("mae")(recipe, None)
    sampler = GlobalBatchSampler([sample.group for sample in objective.samples], batch_size, 0)
    reader = BatchReader(folder, objective.samples, objective, 0)
    return load_batches(reader, sampler.plans(0, steps, 0, 1, 1), num_workers=0, pin_memory=False)


def seconds_of_bare_loop(folder, rounds):
    """Decode, crop and normalise, with the same functions and nothing around them."""
    processor = SelectiveMAEImageProcessor(size={"height": 224, "width": 224})
    paths = [sample.files[0][1] for sample in scan_modalities(folder, ["optical"], "optical")]
    rng = np.random.default_rng(0)
    begun = time.process_time()
    for _ in range(rounds):
        for path in paths:
            view = Geometry.draw(rng, (0.2, 1.0)).apply(decode(Path(folder) / path, 3), 224)
            normalize(processor, view, "optical")
    return time.process_time() - begun


def test_the_loader_reaches_four_fifths_of_a_bare_loop(photos):
    """In processor time, and by the median of neighbours, since what else the machine does changes that time too."""
    seconds_of_bare_loop(photos, 1)
    rounds = []
    for _ in range(25):
        bare = seconds_of_bare_loop(photos, 1)
        reading = batches(photos, 224, 2, 32)
        begun = time.process_time()
        images = sum(loaded.images for loaded in reading)
        rounds.append((bare, time.process_time() - begun))
        assert images == 64
    bare, loader = np.median(rounds, axis=0)
    ratio = np.median([before / after for before, after in rounds])
    print(f"\nbare loop {64 / bare:.0f} images/s, loader {64 / loader:.0f}, of processor time: {ratio:.2f}x")
    assert ratio >= 0.8


def test_memory_stays_flat_over_20_000_samples(scenes):
    process = psutil.Process()
    seen, early = 0, 0
    for loaded in batches(scenes, 32, 10_000, 4):
        seen += loaded.images
        if not early and seen >= 1000:
            early = process.memory_info().rss
        if seen >= 20_000:
            break
    late = process.memory_info().rss
    print(f"\n{early / 1e6:.0f} MB after 1,000 samples, {late / 1e6:.0f} MB after {seen}")
    assert seen >= 20_000
    assert late <= 1.05 * early
