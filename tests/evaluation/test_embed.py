"""Embedding a folder: one row per readable image, relative paths, no half-written file."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from hf_rsheat.errors import DataError
from hf_rsheat.evaluation import embed, extract_features
from hf_rsheat.scenes import KINDS


def test_one_row_per_image_with_relative_path_and_the_extracted_features(model_folder, labelled_folder, tmp_path):
    output = tmp_path / "new" / "features.parquet"
    summary = embed(model_folder, labelled_folder, output, batch_size=7)
    table = pq.read_table(output)
    assert table.column_names == ["path", "embedding"]
    assert summary["images"] == len(table) == 10 * len(KINDS)
    assert list(summary["unreadable"]) == [f"{KINDS[0]}/broken.png"]
    paths = table["path"].to_pylist()
    assert paths == sorted(paths)
    expected = extract_features(model_folder, [labelled_folder / path for path in paths[:3]]).vectors
    np.testing.assert_allclose(np.array(table["embedding"].to_pylist()[:3]), expected, atol=1e-5)
    assert table.schema.metadata[b"model"] == b"tiny"
    assert [path.name for path in output.parent.iterdir()] == ["features.parquet"]


def test_a_failed_run_leaves_an_existing_file_alone(model_folder, tmp_path):
    output = tmp_path / "features.parquet"
    output.write_bytes(b"older")
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match="None of the 1 images"):
        embed(model_folder, images, output)
    assert output.read_bytes() == b"older"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features.parquet", "images"]
