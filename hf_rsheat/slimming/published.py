"""Numbers of arXiv 2601.22841 for comparison: facts from the authors' project page, in share of the full model.

They were measured on other data and cannot be reproduced here; reports draw them in grey.
"""

PAPER_WIDTHS = (
    *(0.001, 0.002, 0.0025, 0.00333, 0.004, 0.005, 0.006, 0.00667, 0.0075, 0.008),
    *(0.01, 0.02, 0.025, 0.0333, 0.04, 0.05, 0.06, 0.0667, 0.075, 0.08),
    *(0.1, 0.2, 0.25, 0.333, 0.4, 0.5, 0.6, 0.667, 0.75, 0.8, 1.0),
)
"""The 31 width multipliers of the paper."""

# k-NN retention, mean of m-eurosat, m-bigearthnet, m-brick-kiln and m-so2sat: (compute, retention) at s = 0.001, 0.1.
RETENTION_BY_MODEL: dict[str, tuple[tuple[float, float], ...]] = {
    "DOFA-b": ((0.048, 0.852), (0.136, 0.899)),
    "DOFA-l": ((0.022, 0.722), (0.112, 0.778)),
    "TerraMind-b": ((0.033, 0.838), (0.122, 0.912)),
    "TerraMind-l": ((0.017, 0.810), (0.108, 0.914)),
    "Prithvi-300": ((0.012, 0.919), (0.103, 0.961)),
    "Prithvi-600": ((0.008, 0.895), (0.103, 0.952)),
    "SSL4EO-S MoCo": ((0.064, 0.847), (0.150, 0.871)),
    "SSL4EO-S DINO": ((0.064, 0.889), (0.150, 0.901)),
    "Copernicus-FM": ((0.058, 0.899), (0.146, 0.920)),
    "Panopticon": ((0.633, 0.685), (0.667, 0.745)),
}
# Mean k-NN retention in compute bins that are 10 % wide, by the lower edge of the bin.
_BINS = (0.0, 0.1, 0.2, 0.5, 0.8)
RETENTION_BY_COMPUTE = {
    "remote-sensing models": tuple(zip(_BINS, (0.859, 0.886, 0.925, 0.959, 0.991), strict=True)),
    "DINOv2 on ImageNet-10": tuple(zip(_BINS, (0.296, 0.342, 0.446, 0.595, 0.720), strict=True)),
    "MAE on ImageNet-10": tuple(zip(_BINS, (0.348, 0.391, 0.439, 0.550, 0.686), strict=True)),
}
