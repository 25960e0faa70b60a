"""Hashes of the code that releases wrote into exported folders: what `verify` accepts as ours.

At a release, `make record-release` adds the current code under the package's version.
"""

import json
from pathlib import Path

from hf_rsheat import __version__, models
from hf_rsheat.hub.inference import HANDLER_FILES
from hf_rsheat.hub.records import sha256

TABLE = Path(__file__).with_name("released_code.json")


def own_code() -> dict[str, str]:
    """File name -> SHA-256 of the code that this installation exports."""
    files = [*Path(models.__file__).parent.glob("*.py"), *(TABLE.with_name(name) for name in HANDLER_FILES)]
    return {path.name: sha256(path) for path in sorted(files)}


def known_code(table: Path = TABLE) -> set[tuple[str, str]]:
    """(file name, SHA-256) of this installation's code and of every released version's."""
    releases = json.loads(table.read_text(encoding="utf-8"))
    return {item for sums in (*releases.values(), own_code()) for item in sums.items()}


def record(version: str = __version__, table: Path = TABLE) -> None:
    """Add this installation's code to the table under a version.

    Raises:
        ValueError: If that version is there with other code: releases do not change.
    """
    releases = json.loads(table.read_text(encoding="utf-8"))
    if releases.get(version, own_code()) != own_code():
        raise ValueError(f"Version {version} is recorded with other code: raise the version first.")
    releases[version] = own_code()
    table.write_text(json.dumps(releases, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    record()
