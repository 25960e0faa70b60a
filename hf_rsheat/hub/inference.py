"""What a folder needs beside its model to answer requests: handler and requirements."""

import re
import shutil
from importlib.metadata import requires
from pathlib import Path

HANDLER_FILES = ("handler.py", "handler_images.py")
# What the code in a model's folder imports; a hosting server's image may bring older ones.
NEEDED = ("torch", "torchvision", "transformers", "safetensors", "numpy", "pillow")


def write_handler(folder: str | Path) -> list[Path]:
    """Write the files with which Inference Endpoints (and `hf-rsheat space`) serve a model folder.

    Args:
        folder: An existing model folder; files of an earlier export are overwritten.

    Returns:
        The files: `handler.py` with its `handler_images.py`, and `requirements.txt`.
    """
    folder = Path(folder)
    written = [Path(shutil.copyfile(Path(__file__).parent / name, folder / name)) for name in HANDLER_FILES]
    requirements = folder / "requirements.txt"
    requirements.write_text("\n".join(requirements_of(*NEEDED)) + "\n", encoding="utf-8")
    return [*written, requirements]


def requirements_of(*packages: str) -> list[str]:
    """This package's own requirements on some of its dependencies, e.g. `torch>=2.6`."""
    found = {_normalized(re.split(r"[^\w.-]", line, maxsplit=1)[0]): line for line in requires("hf_rsheat") or ()}
    return [found[_normalized(name)] for name in packages]


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
