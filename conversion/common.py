"""From a foreign checkpoint to one of our models: choose the weights, account for every tensor, load them strictly."""

import difflib
import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_rsheat.conversion.reader import read_checkpoint
from hf_rsheat.errors import CheckpointError, ConfigurationError, HFRSHeatError
from hf_rsheat.models.heat_encoder import resize_table

logger = logging.getLogger(__name__)

RESIZE_MODES = ("bicubic", "bilinear", "zero-pad")

_WRAPPER_ENTRIES = {"model": ("model", "state_dict"), "model_ema": ("model_ema",)}
_PREFIXES = ("module.", "encoder.", "backbone.", "model.")
_DROPPABLE = {
    r"^decode_head\.": "segmentation head of another framework",
    r"^auxiliary_head\.": "auxiliary segmentation head of another framework",
    r"^neck\.": "detection neck of another framework",
    r"^(rpn|roi)_head\.": "detection head of another framework",
}


@dataclass
class ConversionResult:
    """What became of a checkpoint.

    Attributes:
        state_dict: Our names -> tensors.
        key_map: Name in the file -> our name, for every tensor that was used.
        dropped: Name in the file -> why the tensor was left out.
        weights: The entry of the file that was read ("model", "model_ema", "state_dict" or "bare state dict").
        source_name: File name, without its folder.
        source_sha256: SHA-256 of the file.
        notes: What was assumed or initialised because the file does not tell.
    """

    state_dict: dict[str, Tensor]
    key_map: dict[str, str]
    dropped: dict[str, str]
    weights: str
    source_name: str
    source_sha256: str
    notes: list[str] = field(default_factory=list)

    def provenance(self) -> dict[str, Any]:
        """The facts without the tensors, for provenance.json."""
        return {
            "format": 1,
            "source": {"file": self.source_name, "sha256": self.source_sha256, "weights": self.weights},
            "notes": self.notes,
            "dropped": self.dropped,
            "key_map": self.key_map,
        }

    def log(self) -> None:
        """Say what was assumed and what was left out."""
        for note in self.notes:
            logger.warning("%s: %s", self.source_name, note)
        for name, reason in self.dropped.items():
            logger.info("%s: left out %s (%s).", self.source_name, name, reason)


@dataclass
class Source:
    """A checkpoint as read: the chosen tensors by their names without prefixes, and what else the file tells.

    Attributes:
        tensors: Bare upstream name -> tensor.
        names: Bare upstream name -> name in the file.
        dropped: Name in the file -> why the tensor is left out.
        settings: Values of the training configuration saved in the file (`post_norm`, `drop_path_rate`,
            `layer_scale_init_value`), as far as there is one.
        class_names: Class names saved by mmengine, if any.
        config_text: Training configuration saved by mmengine, as text.
    """

    tensors: dict[str, Tensor]
    names: dict[str, str]
    dropped: dict[str, str]
    settings: dict[str, Any]
    class_names: list[str] | None
    weights: str
    source_name: str
    source_sha256: str
    config_text: str = ""

    def result(self, notes: list[str]) -> ConversionResult:
        """An account of this file with no tensor placed yet, which adds to `notes`."""
        return ConversionResult({}, {}, self.dropped, self.weights, self.source_name, self.source_sha256, notes)


def open_checkpoint(
    path: str | Path, weights: str, droppable: Mapping[str, str] | None = None, *, keep_heads: bool = False
) -> Source:
    """Read a checkpoint, choose its weights, strip the prefixes and set aside what may be dropped.

    Args:
        path: A .pth, .pt or .safetensors file.
        weights: "model" or "model_ema".
        droppable: Patterns of bare names that may be left out -> the reason, beside the heads of other frameworks.
        keep_heads: Whether necks and heads of other frameworks are wanted and not left out.

    Raises:
        CheckpointError: The file cannot be read, has no such weights, or has been stripped for inference.
    """
    path = Path(path)
    checkpoint = read_checkpoint(path)
    entry, tensors = select_weights(checkpoint, weights)
    logger.info("%s: reading the weights under '%s' (%d tensors).", path.name, entry, len(tensors))
    source = Source({}, {}, {}, saved_settings(checkpoint), _class_names(checkpoint), entry, path.name, _sha256(path))
    source.config_text = str(_dict_in(checkpoint, "meta").get("cfg", ""))
    rules, clashes = {**({} if keep_heads else _DROPPABLE), **(droppable or {})}, []
    for name, tensor in tensors.items():
        bare = strip_prefixes(name)
        reason = next((reason for rule, reason in rules.items() if re.search(rule, bare)), None)
        if reason is not None:
            source.dropped[name] = reason
        elif bare in source.tensors:
            clashes.append(f"{source.names[bare]} and {name}")
        else:
            source.tensors[bare], source.names[bare] = tensor, name
    if clashes:
        raise CheckpointError(
            f"Several tensors of {path.name} have the same name without prefix: {'; '.join(clashes)}."
        )
    if any(name.endswith(".op.k_exp") for name in source.tensors):
        raise CheckpointError(
            f"{path.name} was saved in inference mode: its decay maps (k_exp) replace the frequency embeddings, which "
            "cannot be recovered from them. Convert the training checkpoint instead."
        )
    return source


def select_weights(checkpoint: Any, weights: str) -> tuple[str, dict[str, Tensor]]:
    """The state dict inside a checkpoint: bare, or under "model", "model_ema" or "state_dict"; and which it was."""
    if weights not in _WRAPPER_ENTRIES:
        raise ConfigurationError(f"`weights` is one of {list(_WRAPPER_ENTRIES)}, got {weights!r}.")
    if not isinstance(checkpoint, dict) or not checkpoint:
        raise CheckpointError("The file holds no dictionary of tensors: pass a checkpoint saved by the original code.")
    entry = next((e for e in _WRAPPER_ENTRIES[weights] if isinstance(checkpoint.get(e), dict)), None)
    state = checkpoint if entry is None else checkpoint[entry]
    if entry is None and (weights == "model_ema" or not all(isinstance(v, Tensor) for v in state.values())):
        raise CheckpointError(
            f"The file has no weights under {' or '.join(_WRAPPER_ENTRIES[weights])}; its entries are "
            f"{sorted(map(str, checkpoint))[:8]}. Choose an existing one with `weights` (--weights model|model_ema)."
        )
    strangers = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if strangers:
        raise CheckpointError(f"These entries under '{entry}' are not tensors: {', '.join(strangers)}.")
    return entry or "bare state dict", dict(state)


def strip_prefixes(name: str) -> str:
    """Remove the prefixes of DDP, mm* frameworks and the pre-training model, however nested."""
    while name.startswith(_PREFIXES):
        name = name.split(".", 1)[1]
    return name


def saved_settings(checkpoint: Any) -> dict[str, Any]:
    """What shapes cannot tell, from a yacs config ("config") or an mmengine config text ("meta") in the file."""
    settings: dict[str, Any] = {}
    model = _dict_in(_dict_in(checkpoint, "config"), "MODEL")
    for section in model.values():
        if isinstance(section, dict) and isinstance(section.get("POST_NORM"), bool):
            settings["post_norm"] = section["POST_NORM"]
            settings["layer_scale_init_value"] = section.get("LAYER_SCALE")
    if isinstance(model.get("DROP_PATH_RATE"), int | float):
        settings["drop_path_rate"] = float(model["DROP_PATH_RATE"])
    found = set(re.findall(r"\bpost_norm\W+(True|False)\b", str(_dict_in(checkpoint, "meta").get("cfg", ""))))
    if len(found) == 1:
        settings.setdefault("post_norm", found.pop() == "True")
    return settings


def _dict_in(container: Any, name: str) -> dict[str, Any]:
    value = container.get(name) if isinstance(container, dict) else None
    return value if isinstance(value, dict) else {}


def _class_names(checkpoint: Any) -> list[str] | None:
    dataset = _dict_in(_dict_in(checkpoint, "meta"), "dataset_meta")
    names = dataset.get("classes") or dataset.get("CLASSES")
    return [str(name) for name in names] if isinstance(names, list | tuple) else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def build_config(
    config_class: type[PreTrainedConfig], inferred: dict[str, Any], overrides: Mapping[str, Any] | None
) -> PreTrainedConfig:
    """A configuration from the inferred fields, with the user's on top.

    Raises:
        ConfigurationError: An override names no field (the nearest name is given) or has a wrong value.
    """
    known = {f.name for f in fields(config_class) if not f.name.startswith("_")} | {"num_labels", "out_features"}
    for name in overrides or {}:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"its fields are {', '.join(sorted(known))}."
            raise ConfigurationError(f"{config_class.__name__} has no field '{name}': {hint}")
    try:
        return config_class(**{**inferred, **(overrides or {})})
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ConfigurationError(f"The settings do not make a {config_class.__name__}: {error}") from error


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """``["post_norm=true", "depths=[1,1,2,1]"]`` to a dict; values are JSON, anything else is text."""
    overrides = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        if not separator or not name:
            raise ConfigurationError(f"--set needs KEY=VALUE, got {pair!r}.")
        literal = {"True": "true", "False": "false", "None": "null"}.get(text, text)
        try:
            overrides[name] = json.loads(literal)
        except json.JSONDecodeError:
            overrides[name] = text
    return overrides


def resize_tables(state: dict[str, Tensor], config: Any, mode: str) -> None:
    """Resize the tables in a state dict of ours to the sizes of `config`, in place.

    Args:
        state: Our names -> tensors; names ending in `frequency_embedding` or `heat_capacity` are resized.
        config: Configuration with the new image size.
        mode: "bicubic" and "bilinear" keep the relative frequency n / N. "zero-pad" keeps the index n: frequency
            embeddings get zeros for new high frequencies (or lose the highest); heat capacities, which are indexed by
            position, are resized bilinearly then.

    Raises:
        ConfigurationError: Unknown mode.
    """
    if mode not in RESIZE_MODES:
        raise ConfigurationError(f"`resize` is one of {list(RESIZE_MODES)}, got {mode!r}.")
    for name, table in state.items():
        kind = name.rsplit(".", 1)[-1]
        if kind not in ("frequency_embedding", "heat_capacity") or table.ndim != 3:
            continue
        rows, columns = config.table_size(int(name.split("stages.")[1].split(".")[0]))
        if table.shape[:2] == (rows, columns):
            continue
        if mode == "zero-pad" and kind == "frequency_embedding":
            padding = (0, 0, 0, columns - table.shape[1], 0, rows - table.shape[0])
            state[name] = F.pad(table, padding).contiguous()
        else:
            state[name] = resize_table(table, rows, columns, "bilinear" if mode == "zero-pad" else mode)


def load_strictly(
    model: PreTrainedModel, result: ConversionResult, unmapped: list[str], upstream_names: Mapping[str, str]
) -> None:
    """Load the tensors into the model; every tensor of both sides must find its place.

    Args:
        model: A model with the converted configuration.
        result: The renamed tensors.
        unmapped: Names in the file that no rule knows.
        upstream_names: Our names -> the original's, to name missing tensors as the file would.

    Raises:
        CheckpointError: Lists all unmapped, missing and misshapen tensors.
    """
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    sources = {target: name for name, target in result.key_map.items()}
    extra = [sources.get(name, name) for name in result.state_dict if name not in expected]
    missing = [f"{upstream_names.get(name, '(new)')} -> {name}" for name in expected if name not in result.state_dict]
    wrong = [
        f"{sources.get(name, name)}: {tuple(value.shape)}, the model needs {expected[name]}"
        for name, value in result.state_dict.items()
        if name in expected and tuple(value.shape) != expected[name]
    ]
    parts = [
        f"{len(items)} {title}:\n  " + "\n  ".join(items)
        for title, items in (("unmapped", unmapped + extra), ("missing", missing), ("misshapen", wrong))
        if items
    ]
    if parts:
        raise CheckpointError(
            f"{result.source_name} does not fit {type(model).__name__}. "
            + "\n".join(parts)
            + "\nCheck that this is the "
            "right converter for the file, and that --set does not contradict it (--image-size resizes tables)."
        )
    with torch.no_grad():
        model.load_state_dict(result.state_dict, strict=True)


def run_script(convert: Callable[..., Path], resize: str) -> None:
    """Run a converter from the command line: ``CHECKPOINT OUTPUT_DIR [options]``.

    Args:
        convert: The family's `convert`.
        resize: Its default way to resize tables.
    """
    import typer  # here, so that the library does not need a command line

    default_resize = resize

    def command(
        checkpoint: Annotated[Path, typer.Argument(help="A .pth, .pt or .safetensors file; nothing in it runs.")],
        output_dir: Annotated[Path, typer.Argument(help="Folder to write.")],
        weights: Annotated[str, typer.Option(help="model or model_ema.")] = "model",
        settings: Annotated[
            list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A config field the file cannot tell.")
        ] = None,
        image_size: Annotated[int | None, typer.Option(help="Resize the tables to this input size (px).")] = None,
        resize: Annotated[str, typer.Option(help=f"{', '.join(RESIZE_MODES)}.")] = default_resize,
    ) -> None:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        try:
            overrides = parse_overrides(settings or [])
            folder = convert(
                checkpoint, output_dir, weights=weights, overrides=overrides, image_size=image_size, resize=resize
            )
        except HFRSHeatError as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(1) from error
        typer.echo(f"Wrote {folder}")

    typer.run(command)
