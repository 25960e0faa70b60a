"""What stands beside exported weights so that anybody can check them: provenance, reference outputs, file hashes."""

import hashlib
import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from hf_rsheat.hub.transfer import is_url, public_url

PROVENANCE = "provenance.json"
REFERENCE = "reference.safetensors"
MANIFEST = "manifest.json"
# The card may be edited on the Hub; what it says of the processor is checked instead. Git keeps .gitattributes itself.
UNHASHED = {MANIFEST, "README.md", ".gitattributes"}

# Largest allowed difference of a reference output, relative to its largest value: rounding of other machines and
# libraries stays far below, a changed layer far above.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_digest(folder: str | Path) -> str | None:
    """SHA-256 of the weight file of a model folder (of the shards' digests where there are several); None if none."""
    digests = [sha256(file) for file in sorted(Path(folder).glob("model*.safetensors"))]
    if len(digests) < 2:
        return digests[0] if digests else None
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def visible_files(folder: Path) -> set[str]:
    """Paths below the folder, without `.cache` and the like, which are the download client's and not the model's."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)}


def write_provenance(folder: Path, facts: dict[str, Any] | None) -> None:
    """Write `provenance.json`: where the weights come from and what made this folder.

    Args:
        facts: What the caller knows, e.g. a converter's account of every tensor.
    """
    record = {
        "format": 1,
        **(facts or {}),
        "command": _command(),
        "versions": {name: _version(name) for name in ("hf_rsheat", "transformers", "torch", "safetensors")},
    }
    (folder / PROVENANCE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _command() -> str:
    """The command line without the folders of this machine, and without credentials in addresses."""
    parts = (public_url(part) if is_url(part) else part for part in sys.argv)
    return " ".join(Path(part).name if "/" in part or "\\" in part else part for part in parts)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def reference_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """One small fixed image per modality, `(1, channels, side, side)`; vHeat's only modality is "image"."""
    config = getattr(model.config, "backbone_config", None) or model.config
    size = config.image_size
    side = max(32, min(64, size if isinstance(size, int) else min(size)))
    channels = getattr(config, "modalities", None) or {"image": getattr(config, "num_channels", 3)}
    if model.config is not config:  # a head over a backbone uses the default modality only
        name = getattr(config, "default_modality", "image")
        channels = {name: channels[name]}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(1, count, side, side, generator=generator) for name, count in channels.items()}


@torch.no_grad()
def reference_outputs(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All tensors the model returns for the reference inputs, by `<modality>.<output>`, as float32 (or float64)."""
    was_training = model.training
    model.eval()
    results = {}
    for name, pixel_values in inputs.items():
        choice = {"modality": name} if hasattr(model.config, "modalities") else {}
        # Detections jump where a score crosses another: such models say what else to compare.
        run = getattr(model, "dense_outputs", model)
        outputs = run(pixel_values.to(model.device), **choice)
        for key, value in outputs.items():
            for index, tensor in enumerate(value if isinstance(value, tuple | list) else [value]):
                suffix = f".{index}" if isinstance(value, tuple | list) else ""
                dtype = torch.promote_types(tensor.dtype, torch.float32)
                # A copy: outputs may share memory (a class token is part of the hidden state), which the file may not.
                results[f"{name}.{key}{suffix}"] = tensor.to("cpu", dtype, copy=True).contiguous()
    model.train(was_training)
    return results


def write_reference(model: PreTrainedModel, folder: Path) -> None:
    """Write `reference.safetensors`: fixed inputs, the outputs they must give, and the tolerance."""
    inputs = reference_inputs(model)
    tensors = {f"{name}.pixel_values": value for name, value in inputs.items()} | reference_outputs(model, inputs)
    save_file(tensors, folder / REFERENCE, metadata={"tolerance": str(TOLERANCES[model.dtype])})


def read_reference(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], float]:
    """Inputs by modality, outputs by `<modality>.<output>`, and the relative tolerance."""
    inputs, outputs = {}, {}
    with safe_open(folder / REFERENCE, framework="pt") as file:
        tolerance = float((file.metadata() or {})["tolerance"])
        for name in file.keys():  # noqa: SIM118 - not a dict
            modality, _, output = name.partition(".")
            if output == "pixel_values":
                inputs[modality] = file.get_tensor(name)
            else:
                outputs[name] = file.get_tensor(name)
    return inputs, outputs, tolerance


def write_manifest(folder: Path) -> None:
    """Write `manifest.json`: the SHA-256 of every file but the card."""
    sums = {name: sha256(folder / name) for name in sorted(visible_files(folder) - UNHASHED)}
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "files": sums}, indent=2) + "\n", encoding="utf-8")
