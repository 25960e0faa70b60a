"""Feature vectors: the model's pooled features, the images they belong to, and what was left out."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from hf_rsheat.errors import ConfigurationError, DataError
from hf_rsheat.evaluation import extract_features
from hf_rsheat.evaluation.features import histograms, load_extractor, untrained_like
from hf_rsheat.hub.records import weights_digest
from hf_rsheat.scenes import KINDS, make_scene


def test_features_are_the_pooled_output_whatever_the_batch_size(model_folder, labelled_folder):
    paths = sorted(labelled_folder.glob(f"{KINDS[1]}/*.png"))[:5]
    features = extract_features(model_folder, paths, batch_size=2)
    assert features.paths == tuple(map(str, paths))
    model, processor = AutoModel.from_pretrained(model_folder), AutoImageProcessor.from_pretrained(model_folder)
    with torch.no_grad():
        expected = model(**processor([Image.open(path) for path in paths], return_tensors="pt")).pooler_output
    np.testing.assert_allclose(features.vectors, expected.numpy(), atol=1e-5)


def test_unreadable_images_are_left_out_and_listed(model_folder, labelled_folder):
    paths = sorted((labelled_folder / KINDS[0]).iterdir())
    features = extract_features(model_folder, paths, batch_size=1)
    assert list(features.unreadable) == [str(labelled_folder / KINDS[0] / "broken.png")]
    assert len(features.vectors) == len(features.paths) == len(paths) - 1


def test_nothing_readable_is_an_error(model_folder, tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match="check the folder"):
        extract_features(model_folder, [tmp_path / "a.png"])


def test_images_the_processor_refuses_are_an_error_that_names_them(model_folder, tmp_path):
    Image.fromarray(np.full((40, 40), 3000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png"):
        extract_features(model_folder, [tmp_path / "deep.png"], modality="sar")


def test_each_modality_goes_through_its_own_stem(model_folder, tmp_path):
    Image.fromarray(make_scene(32, 0, "harbor").sar).save(tmp_path / "sar.png")
    radar = extract_features(model_folder, [tmp_path / "sar.png"], modality="sar").vectors
    optical = extract_features(model_folder, [tmp_path / "sar.png"]).vectors
    assert not np.allclose(radar, optical)
    with pytest.raises(ConfigurationError, match="optical, sar"):
        extract_features(model_folder, [tmp_path / "sar.png"], modality="thermal")


def test_a_model_object_needs_its_processor(model_folder, labelled_folder):
    paths = sorted((labelled_folder / KINDS[1]).iterdir())[:2]
    model, processor = AutoModel.from_pretrained(model_folder), AutoImageProcessor.from_pretrained(model_folder)
    with pytest.raises(ConfigurationError, match="processor"):
        extract_features(model, paths)
    vectors = extract_features(model, paths, processor=processor).vectors
    np.testing.assert_allclose(vectors, extract_features(model_folder, paths).vectors, atol=1e-6)


def test_untrained_baseline_has_the_same_config_and_leaves_the_global_seed_alone(model_folder):
    extractor = load_extractor(model_folder)
    before = torch.random.get_rng_state()
    first, second, other = (untrained_like(extractor, seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    images = [Image.fromarray(make_scene(32, 0).optical)]
    assert first.model.config.hidden_sizes == extractor.model.config.hidden_sizes
    assert np.array_equal(first(images), second(images))
    assert not np.allclose(first(images), other(images))
    assert not np.allclose(first(images), extractor(images))


def test_histograms_tell_colours_and_directions_apart_for_any_image_mode():
    image = Image.fromarray(make_scene(64, 0, "farmland").optical)
    vectors = histograms([image, image.transpose(Image.Transpose.ROTATE_90), image.convert("L"), image.convert("P")])
    assert vectors.shape == (4, 69)
    np.testing.assert_allclose(vectors[0, :48], vectors[1, :48], atol=0.01)
    assert not np.allclose(vectors[0, 48:57], vectors[1, 48:57], atol=0.02)


def test_weights_digest_follows_the_weights(model_folder, tmp_path):
    digest = weights_digest(model_folder)
    assert digest is not None
    assert len(digest) == 64
    (tmp_path / "model.safetensors").write_bytes(b"1")
    single = weights_digest(tmp_path)
    (tmp_path / "model-2.safetensors").write_bytes(b"2")
    assert len({digest, single, weights_digest(tmp_path)}) == 3
    assert weights_digest("some/hub-id") is None
