"""What a run writes down: `log.jsonl` (a line per step), `skipped.jsonl` (a line per unusable image), and the step
that made it give up."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .data import Skipped

NOT_FINITE = "not_finite.json"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON-lines file; nothing where it does not exist. A last line cut off by a kill is left out."""
    records: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                records.append(json.loads(line))
    return records


def _append(path: Path, records: Iterable[dict[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
        file.flush()
        os.fsync(file.fileno())


class Journal:
    """Appends to the log files of one run folder.

    Args:
        folder: The run folder.
        step: Steps done so far; later lines of the log belong to a future that is being repeated and are dropped.

    Attributes:
        skipped: Why each image that could not be used so far could not, by path.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._log = folder / "log.jsonl"
        self._skipped = folder / "skipped.jsonl"
        kept = [record for record in read_lines(self._log) if record["step"] <= step]
        draft = folder / "log.jsonl.part"
        draft.unlink(missing_ok=True)
        _append(draft, kept)
        draft.replace(self._log)
        self.skipped = {record["path"]: record["reason"] for record in read_lines(self._skipped)}

    def write(self, records: Iterable[dict[str, Any]]) -> None:
        """Append log lines."""
        _append(self._log, records)

    def give_up(self, record: dict[str, Any], files: list[list[str]]) -> None:
        """Note the step whose loss or gradient is not finite, with the files of its samples."""
        text = json.dumps({**record, "files": files}, indent=2)
        (self._log.parent / NOT_FINITE).write_text(text, encoding="utf-8")

    def skip(self, images: Iterable[Skipped]) -> list[Skipped]:
        """List images as unusable; returns those that were not listed before."""
        new = {image.path: image for image in images if image.path not in self.skipped}
        if new:
            self.skipped |= {image.path: image.reason for image in new.values()}
            _append(self._skipped, (image._asdict() for image in new.values()))
        return list(new.values())
