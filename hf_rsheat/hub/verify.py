"""Check that an exported folder is what it says: files, tensors, code, outputs, card."""

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import ModelCard, snapshot_download
from safetensors import safe_open
from transformers import PreTrainedModel

from hf_rsheat.errors import HFRSHeatError, VerificationError
from hf_rsheat.hub.card import processor_statistics
from hf_rsheat.hub.export import AUTO_CLASSES, load_folder, model_class_of
from hf_rsheat.hub.records import (
    MANIFEST,
    PROVENANCE,
    REFERENCE,
    UNHASHED,
    read_reference,
    reference_outputs,
    sha256,
    visible_files,
)
from hf_rsheat.hub.released import known_code

logger = logging.getLogger(__name__)

Status = Literal["passed", "failed", "absent"]
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_CODE_SUFFIXES = {".py", ".pyc", ".so", ".pyd", ".pkl", ".pickle", ".pt", ".pth", ".bin"}


@dataclass(frozen=True)
class Check:
    """One line of a report: what was checked, how it ended, and the facts."""

    name: str
    status: Status
    detail: str


@dataclass(frozen=True)
class Report:
    """The checks of one folder, in order."""

    folder: Path
    checks: tuple[Check, ...]

    @property
    def failed(self) -> tuple[Check, ...]:
        """Checks that did not hold."""
        return tuple(check for check in self.checks if check.status == "failed")

    @property
    def ok(self) -> bool:
        """Whether every check was made and holds."""
        return all(check.status == "passed" for check in self.checks)

    @property
    def is_plain(self) -> bool:
        """Nothing failed, but it is a plain `save_pretrained` folder without the records of an export."""
        return not self.ok and not self.failed

    def to_json(self) -> str:
        """For machines."""
        return json.dumps({"ok": self.ok, "checks": [asdict(check) for check in self.checks]}, indent=2)

    def __str__(self) -> str:
        marks = {"passed": "ok    ", "failed": "FAILED", "absent": "absent"}
        return "\n".join(f"{marks[check.status]}  {check.name}: {check.detail}" for check in self.checks)


class _Absent(Exception):
    """A record that only exports have is not there."""


def verify(folder_or_repo: str | Path, revision: str | None = None) -> Report:
    """Check a Hub folder. Runs none of its code.

    Args:
        folder_or_repo: A local folder, or a Hub repository `user/name[@revision]`, which is downloaded.
        revision: Branch, tag or commit of a repository.

    Returns:
        A report with one entry per check: files (hashes), config, weights (names, shapes), values (finite), code (that
        of this installation or of a released version), outputs (the reference outputs are reproduced), processor (its
        statistics are those of the card).

    Raises:
        VerificationError: If there is no such folder or repository.
    """
    folder = resolve_folder(folder_or_repo, revision)
    checks: tuple[tuple[str, Callable[[Path], str]], ...] = (
        ("files", check_files),
        ("provenance", _check_provenance),
        ("config", _check_config),
        ("weights", check_weights),
        ("values", check_values),
        ("code", _check_code),
        ("outputs", _check_outputs),
        ("processor", _check_processor),
    )
    return Report(folder, tuple(_run(name, check, folder) for name, check in checks))


def resolve_folder(folder_or_repo: str | Path, revision: str | None = None) -> Path:
    """The local folder itself, or the downloaded snapshot of `user/name[@revision]`."""
    if Path(folder_or_repo).is_dir():
        return Path(folder_or_repo)
    repo, _, suffix = str(folder_or_repo).partition("@")
    if repo.count("/") != 1 or repo.startswith((".", "/")):
        raise VerificationError(f"There is no folder '{folder_or_repo}', and it is no repository name 'user/name'.")
    try:
        return Path(snapshot_download(repo, revision=revision or suffix or None))
    except (OSError, ValueError) as error:
        raise VerificationError(f"Cannot download '{folder_or_repo}': {error}") from error


def _run(name: str, check: Callable[[Path], str], folder: Path) -> Check:
    try:
        return Check(name, "passed", check(folder))
    except _Absent as absence:
        return Check(name, "absent", str(absence))
    except Exception as error:  # a damaged or hostile folder can fail in any way; the report names it
        detail = str(error) if isinstance(error, HFRSHeatError) else f"{type(error).__name__}: {error}"
        return Check(name, "failed", detail)


def _record(folder: Path, name: str) -> dict[str, Any]:
    if not (folder / name).is_file():
        raise _Absent(f"there is no {name}: a plain save_pretrained folder, written by no exporter or converter")
    record = json.loads((folder / name).read_text(encoding="utf-8"))
    if not isinstance(record, dict):
        raise VerificationError(f"{name} holds no record")
    return record


def check_files(folder: Path) -> str:
    """Every file has the hash the manifest gives, and there is no file beside them."""
    expected = _record(folder, MANIFEST).get("files", {})
    actual = visible_files(folder) - UNHASHED
    missing, unknown = sorted(set(expected) - actual), sorted(actual - set(expected))
    changed = sorted(name for name in actual & set(expected) if sha256(folder / name) != expected[name])
    problems = [
        f"{title}: {', '.join(names)}"
        for title, names in (("missing", missing), ("changed", changed), ("not in the manifest", unknown))
        if names
    ]
    if problems:
        raise VerificationError("; ".join(problems))
    return f"{len(actual)} files have the hashes of {MANIFEST}"


def _check_provenance(folder: Path) -> str:
    source = _record(folder, PROVENANCE).get("source")
    if isinstance(source, dict):
        return f"from {source['file']} (SHA-256 {source['sha256'][:12]}...)"
    return source or "made by this package"


def _check_config(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = model_class_of(folder).__name__
    for auto_class, target in config.get("auto_map", {}).items():
        if AUTO_CLASSES[config["model_type"]].get(auto_class) != target:
            raise VerificationError(f"auto_map names '{target}' for {auto_class}, which is not this package's class")
    return name


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise VerificationError(f"there is no {WEIGHTS}")
    shards = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    for shard in shards:
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise VerificationError(f"the index names '{shard}', which is no file of this folder")
    return [folder / shard for shard in shards]


def _tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    for path in _weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                yield name, file


def _empty_model(folder: Path) -> PreTrainedModel:
    model_class = model_class_of(folder)
    config_class = model_class.config_class
    if config_class is None:
        raise VerificationError(f"{model_class.__name__} has no config class")
    with torch.device("meta"):
        return model_class(config_class.from_pretrained(folder))


def check_weights(folder: Path) -> str:
    """The file holds exactly the tensors of the model, in their shapes."""
    expected = {name: tuple(value.shape) for name, value in _empty_model(folder).state_dict().items()}
    actual = {name: tuple(file.get_slice(name).get_shape()) for name, file in _tensors(folder)}
    wrong = [
        f"{name} {actual[name]} instead of {shape}"
        for name, shape in sorted(expected.items())
        if actual.get(name, shape) != shape
    ]
    problems = [
        f"{title}: {', '.join(names)}"
        for title, names in (
            ("missing", sorted(set(expected) - set(actual))),
            ("unexpected", sorted(set(actual) - set(expected))),
            ("misshapen", wrong),
        )
        if names
    ]
    if problems:
        raise VerificationError("; ".join(problems))
    return f"{len(actual)} tensors, none missing, unexpected or misshapen"


def check_values(folder: Path) -> str:
    """No tensor holds NaN or Inf."""
    broken = [name for name, file in _tensors(folder) if not torch.isfinite(file.get_tensor(name)).all()]
    if broken:
        raise VerificationError(f"not finite: {', '.join(broken)}")
    return "all finite"


def _check_code(folder: Path) -> str:
    known = known_code()
    files = [folder / name for name in visible_files(folder) if Path(name).suffix in _CODE_SUFFIXES]
    foreign = [
        path.relative_to(folder).as_posix()
        for path in files
        if path.parent != folder or (path.name, sha256(path)) not in known
    ]
    if foreign:
        raise VerificationError(f"not the code of any released version: {', '.join(foreign)}")
    if not files:
        raise _Absent("the folder carries no code")
    return f"{len(files)} files are this package's own"


def _check_outputs(folder: Path) -> str:
    if not (folder / REFERENCE).is_file():
        raise _Absent(f"there is no {REFERENCE}")
    inputs, expected, tolerance = read_reference(folder)
    check_weights(folder)  # loading would fill gaps with random values
    actual = reference_outputs(load_folder(folder)[0], inputs)
    if set(actual) != set(expected):
        raise VerificationError(f"other outputs: {', '.join(sorted(set(actual) ^ set(expected)))}")
    worst = 0.0
    for name, value in expected.items():
        difference = (actual[name] - value).abs().max().item() / max(value.abs().max().item(), 1e-6)
        if not difference <= tolerance:
            raise VerificationError(
                f"{name} differs by {difference:.1e} of its largest value (allowed {tolerance:.0e})"
            )
        worst = max(worst, difference)
    return f"{len(expected)} reference outputs reproduced within {worst:.1e} (allowed {tolerance:.0e})"


def _check_processor(folder: Path) -> str:
    if not (folder / "README.md").is_file():
        raise _Absent("there is no card")
    stated = ModelCard.load(folder / "README.md").data.to_dict().get("preprocessing")
    if stated is None:
        raise _Absent("the card states no preprocessing")
    actual = processor_statistics(json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8")))
    if stated != actual:
        raise VerificationError(f"the card states {stated}, the processor does {actual}")
    return "statistics are those of the card"


def from_pretrained_verified(
    folder_or_repo: str | Path,
    *,
    revision: str | None = None,
    model_class: type[PreTrainedModel] | None = None,
    require_manifest: bool = True,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load one of our models, or raise: nothing is filled in, renamed, or let through damaged.

    Args:
        folder_or_repo: A Hub folder or repository, see [`verify`].
        revision: Branch, tag or commit of a repository.
        model_class: Another class than the saved one, e.g. `VHeatBackbone` from a classifier: every tensor of the saved
            class is checked, then the trunk is loaded.
        require_manifest: Refuse folders without file hashes (plain `save_pretrained` folders).
        **kwargs: For `from_pretrained`, e.g. `dtype`.

    Raises:
        VerificationError: A tensor is missing, renamed, unexpected, misshapen or not finite, a hash differs, the config
            names foreign code, or the folder has no manifest.
    """
    folder = resolve_folder(folder_or_repo, revision)
    checks = {"files": check_files, "config": _check_config, "weights": check_weights, "values": check_values}
    for name, check in checks.items():
        result = _run(name, check, folder)
        if result.status == "failed":
            raise VerificationError(f"{folder_or_repo}: {result.detail}")
        if result.status == "absent" and require_manifest:
            raise VerificationError(f"{folder_or_repo}: {result.detail}; pass require_manifest=False to load it anyway")
    return (model_class or model_class_of(folder)).from_pretrained(folder, **kwargs)
