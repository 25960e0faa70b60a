"""Rasters of any number of bands, read with rasterio (extra `geo`)."""

import importlib.util
from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from ..errors import DataError, MissingExtraError


def require_rasterio(purpose: str) -> None:
    """Raise `MissingExtraError` unless rasterio is installed."""
    if importlib.util.find_spec("rasterio") is None:
        raise MissingExtraError("rasterio", "geo", purpose)


def read_raster(source: Path | BytesIO, bands: int) -> torch.Tensor:
    """Read a raster, e.g. a GeoTIFF of Sentinel-2.

    Pixels without data (the file's nodata value or mask, NaN, infinity) get the mean of their band, which normalising
    turns into something near 0.

    Args:
        source: The file or its bytes.
        bands: Bands it must have.

    Returns:
        `(bands, height, width)`, values as stored: uint8, int32 or float32.

    Raises:
        DataError: If it cannot be read, has another number of bands, or holds no data.
        MissingExtraError: If rasterio is not installed.
    """
    require_rasterio("Reading rasters of more than 3 bands")
    import rasterio
    from rasterio.errors import RasterioError

    try:
        with rasterio.open(source) as raster:
            if raster.count != bands:
                raise DataError(f"has {raster.count} bands, the model expects {bands}")
            pixels = raster.read(masked=True)
    except (RasterioError, OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"cannot be read: {str(error).replace(str(source), 'it')}") from error
    valid = ~np.ma.getmaskarray(pixels) & np.isfinite(pixels.data)
    if not valid.any((1, 2)).all():
        raise DataError("has no content: a band has no data")
    kind = np.uint8 if pixels.dtype == np.uint8 else np.int32 if pixels.dtype.kind in "ui" else np.float32
    filled = np.empty(pixels.shape, kind)
    for band, (values, known) in enumerate(zip(pixels.data, valid, strict=True)):
        filled[band] = np.where(known, values, values[known].mean(dtype=np.float64))
    return torch.from_numpy(filled)
