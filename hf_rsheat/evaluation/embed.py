"""One feature vector per image of a folder, as a Parquet file."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import DataError
from ..hub.records import weights_digest
from ..training.image_folder import image_paths
from .features import iterate_features, load_extractor


def embed(
    model_dir: str | Path,
    folder: str | Path,
    output_parquet: str | Path,
    *,
    batch_size: int = 32,
    modality: str | None = None,
) -> dict[str, Any]:
    """Write the pooled features of all images below a folder, batch by batch: memory does not grow with the folder.

    Columns: `path` (relative to `folder`, with forward slashes) and `embedding` (list of float32). The file's metadata
    name the model and the SHA-256 of its weights. An existing file is replaced when the new one is complete.

    Returns:
        {"images": rows written, "dimensions": length of a vector, "unreadable": {path: reason}}.

    Raises:
        ConfigurationError: the model has no such modality.
        DataError: the folder has no readable image, or the processor refuses the images.
    """
    folder, output = Path(folder), Path(output_parquet)
    paths = image_paths(folder)
    extractor = load_extractor(str(model_dir), None, modality)
    metadata = {"model": Path(model_dir).name, "weights_sha256": weights_digest(model_dir) or ""}
    schema = pa.schema([("path", pa.string()), ("embedding", pa.list_(pa.float32()))], metadata=metadata)
    unreadable: dict[str, str] = {}
    rows = dimensions = 0
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".partial")
    try:
        with pq.ParquetWriter(partial, schema) as writer:
            for names, vectors in iterate_features(extractor, paths, folder, unreadable, batch_size):
                columns = [pa.array(names), pa.array(list(vectors), pa.list_(pa.float32()))]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))
                rows, dimensions = rows + len(names), vectors.shape[1]
        if not rows:
            raise DataError(f"None of the {len(paths)} images below {folder} can be read: check the folder.")
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
    return {"images": rows, "dimensions": dimensions, "unreadable": unreadable}
