"""The recipe: one validated dataclass that says everything about a training run."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from ..errors import ConfigurationError, did_you_mean

T = TypeVar("T")

TRACKERS = ("tensorboard", "trackio", "wandb")

# Where things lie and how often something is said or kept: nothing of what is learned.
BOOKKEEPING = (
    "image_folder",
    "output_dir",
    "save_steps",
    "keep_checkpoints",
    "keep_every",
    "max_skipped",
    "num_workers",
    "logging_steps",
    "picture_steps",
    "trackers",
    "hub_model_id",
)

# Smallest allowed value per numeric field; None fields are skipped.
_AT_LEAST: dict[str, float] = {
    "seed": 0,
    "image_size": 32,
    "batch_size": 1,
    "max_steps": 1,
    "save_steps": 1,
    "keep_checkpoints": 1,
    "keep_every": 1,
    "warmup_steps": 0,
    "learning_rate": 0,
    "min_learning_rate": 0,
    "weight_decay": 0,
    "adam_epsilon": 0,
    "max_grad_norm": 0,
    "prune_ratio": 0,
    "prune_until": 0,
    "gradient_accumulation_steps": 1,
    "num_workers": 0,
    "logging_steps": 1,
    "picture_steps": 1,
}


@strict
@dataclass(kw_only=True)
class Recipe:
    """Everything a run needs to know; saved as `recipe.yaml` beside the log and in each checkpoint.

    Args:
        objective: What to learn: `rs_vheat`, `selective_mae`, `mae` or `moco` (pretraining), `rs4d_distill`
            (distillation), `classification` or `instances` (fine-tuning).
        image_folder: Folder of images, scanned recursively. Sub-folders named like a modality (`optical`, `sar`) give
            the modality; equal relative stems in two of them are a pair. For `classification` the first folder level
            gives the class.
            Tar (WebDataset) and Parquet files in it count as folders; a Parquet file has one folder per image column.
        dataset: A data set of the `datasets` library instead of `image_folder`, with the arguments of `load_dataset`:
            `{path: user/name, split: train, image_column: image, streaming: true}`; a folder of `save_to_disk` is a
            path too. `DatasetSettings` has all keys. Not for `instances` and distillation.
        manifest: CSV file with a column of paths per modality and a line per sample, instead of all images there are;
            paths are relative to `image_folder`. Not for `classification`, `instances` and distillation.
        mixture: How often an epoch holds the images of a first-level folder of `image_folder`, or of a streamed data
            set, e.g. `{flood: 3.5, city: 0.1}`; once where it says nothing. Where data sets of the Hub are streamed
            together, each counts as a folder of its name.
        output_dir: Run folder: `recipe.yaml`, `log.jsonl`, `skipped.jsonl`, `checkpoint-<step>`, and `hub` at the end.
        seed: Everything random follows from it.
        image_size: Side of the square training images in pixels.
        model: Config fields as a dict, or a folder to start from; `{"pretrained": folder, field: value}` does both.
        objective_options: Settings of the objective itself, e.g. `crop_scale`.
        modality: Modality of images whose path does not say; None means the first one of the model.
        preprocessing: Options of the image processor per modality, e.g. `{"sar": {"image_mean": [0.3], "image_std":
            [0.2], "rescale_factor": 0.0001}}`. Images of more than 8 bit need a `rescale_factor` that leads to 0-1.
        batch_size: Images (pairs count once) per optimiser step over *all* processes and accumulation steps.
        max_steps: Optimiser steps.
        save_steps: Steps between checkpoints; the last step is always saved.
        keep_checkpoints: How many of the newest checkpoints stay; None keeps all.
        keep_every: Checkpoints whose step is a multiple of this stay as well.
        warmup_steps: Steps of linear warm-up before the cosine.
        learning_rate: Peak learning rate for this batch size (nothing is scaled behind your back).
        min_learning_rate: Where the cosine ends.
        weight_decay: AdamW's; not applied to biases and other 1-D parameters.
        adam_betas: AdamW's decay rates of the two gradient moments.
        adam_epsilon: AdamW's addend to the denominator.
        max_grad_norm: Clips the gradient's L2 norm; 0 switches it off.
        prune_ratio: Share of the images with a loss below the mean that an epoch leaves out, at random, while the
            others of them count more to make up for it (InfoBatch); 0 switches it off. The first epoch is whole, since
            images are scored when they are seen; later ones are shorter. `max_steps` remain optimiser steps. The log
            holds the plain mean loss of the images seen, which pruning raises.
        prune_until: Share of `max_steps` after which nothing is left out.
        max_skipped: Share of the images that may be unusable; the run stops with a summary beyond it.
        gradient_accumulation_steps: Parts each process cuts its share of a batch into; results do not depend on it.
        num_workers: Loader processes per training process; results do not depend on it.
        mixed_precision: `no`, `bf16` or `fp16`.
        ema_decay: Decay of an exponential moving average of the weights, e.g. 0.9999; the exported folder then holds
            the average, checkpoints hold both. None for no average.
        torch_compile: Compute training steps through `torch.compile` (inductor; on a CPU it needs a C++ compiler). The
            last bits of a loss differ from a run without it; what is drawn is the same.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        logging_steps: Steps between writes of the log (which holds every step), progress bar and trackers.
        picture_steps: Steps between pictures of input, what the model saw of it, and what it made of it, in
            `pictures/`; None for no pictures.
        trackers: `tensorboard`, `trackio` and `wandb` by name; None for tensorboard where it is installed. `log.jsonl`
            is always written.
        hub_model_id: Hub repository `user/name` to push the exported folder to at the end, verified before and after.
    """

    objective: str
    image_folder: str
    output_dir: str
    dataset: dict[str, Any] = field(default_factory=dict)
    manifest: str | None = None
    mixture: dict[str, float | int] = field(default_factory=dict)
    seed: int = 0
    image_size: int = 224
    model: dict[str, Any] | str = field(default_factory=dict)
    objective_options: dict[str, Any] = field(default_factory=dict)
    modality: str | None = None
    preprocessing: dict[str, dict[str, Any]] = field(default_factory=dict)
    batch_size: int = 64
    max_steps: int = 1000
    save_steps: int = 500
    keep_checkpoints: int | None = 3
    keep_every: int | None = None
    warmup_steps: int = 0
    learning_rate: float | int = 2e-4
    min_learning_rate: float | int = 0.0
    weight_decay: float | int = 0.08
    adam_betas: tuple[float | int, float | int] = (0.9, 0.999)
    adam_epsilon: float | int = 1e-8
    max_grad_norm: float | int = 5.0
    prune_ratio: float | int = 0.0
    prune_until: float | int = 0.875
    max_skipped: float | int = 0.5
    gradient_accumulation_steps: int = 1
    num_workers: int = 2
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    ema_decay: float | None = None
    torch_compile: bool = False
    gradient_checkpointing: bool = False
    logging_steps: int = 1
    picture_steps: int | None = None
    trackers: list[str] | None = None
    hub_model_id: str | None = None

    def validate_ranges(self) -> None:
        for name, lowest in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= lowest):
                raise ValueError(f"'{name}' must be at least {lowest:g}, got {value}")

    def validate_source(self) -> None:
        if bool(self.dataset) == bool(self.image_folder):
            raise ValueError("set either 'image_folder' or 'dataset'")
        if self.dataset and self.manifest:
            raise ValueError("'manifest' names files of an 'image_folder': remove it or 'dataset'")

    def validate_schedule(self) -> None:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError("'min_learning_rate' must not exceed 'learning_rate'")
        if self.warmup_steps >= self.max_steps:
            raise ValueError(f"'warmup_steps' ({self.warmup_steps}) must be below 'max_steps' ({self.max_steps})")

    def validate_mixture(self) -> None:
        if any(not 0 <= weight < math.inf for weight in self.mixture.values()):
            raise ValueError(f"'mixture' needs weights of at least 0, got {self.mixture}")
        if self.mixture and self.prune_ratio:
            raise ValueError("'mixture' and 'prune_ratio' both decide what an epoch holds: set one of them")

    def validate_trackers(self) -> None:
        unknown = set(self.trackers or ()) - set(TRACKERS)
        if unknown:
            raise ValueError(f"'trackers' may name {', '.join(TRACKERS)}, got {', '.join(sorted(unknown))}")

    def validate_shares(self) -> None:
        if not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ValueError(f"'adam_betas' must lie in [0, 1), got {list(self.adam_betas)}")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"'ema_decay' must lie in [0, 1), got {self.ema_decay}")
        if not 0 <= self.max_skipped <= 1:
            raise ValueError(f"'max_skipped' must lie in [0, 1], got {self.max_skipped}")
        if self.prune_ratio >= 1:
            raise ValueError(f"'prune_ratio' must be below 1, got {self.prune_ratio}")
        if self.prune_until > 1:
            raise ValueError(f"'prune_until' must be at most 1, got {self.prune_until}")

    @property
    def pretrained(self) -> str | None:
        """Folder to start from, if any."""
        return self.model if isinstance(self.model, str) else self.model.get("pretrained")

    @property
    def model_fields(self) -> dict[str, Any]:
        """Config fields the user set, without the folder to start from."""
        return {} if isinstance(self.model, str) else {k: v for k, v in self.model.items() if k != "pretrained"}

    @property
    def data_name(self) -> str:
        """What to call the training data."""
        return str(self.dataset.get("path", "dataset")) if self.dataset else self.image_folder

    def to_yaml(self) -> str:
        """The recipe as YAML text; `parse_yaml` reads it back, with lists for tuples."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)

    def save(self, path: Path) -> None:
        """Write the recipe as a YAML file."""
        path.write_text(self.to_yaml(), encoding="utf-8")


class _RecipeLoader(yaml.SafeLoader):
    """YAML 1.2 scalars: `no` and `off` are words (`mixed_precision: no`) and `1e-4` is a number; repeats are errors."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ConfigurationError(f"The recipe sets {', '.join(repeated)} more than once: keep one line of each.")
        return super().construct_mapping(node, deep)


_RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str) -> Any:
    """YAML text as plain Python values; raises `ConfigurationError` where it cannot be read."""
    try:
        return yaml.load(text, Loader=_RecipeLoader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigurationError(f"Not valid YAML: {' '.join(str(error).split())}") from error


def build(cls: type[T], values: Mapping[str, Any], what: str) -> T:
    """A strict dataclass from a mapping.

    Lists become tuples where the field's default is one, since YAML has no tuples.

    Raises:
        ConfigurationError: For an unknown key (naming the nearest valid one), a missing key, a wrong type or range.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            raise ConfigurationError(f"Unknown {what} '{name}': {did_you_mean(str(name), fields)}")
    missing = [
        name
        for name, f in fields.items()
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigurationError(f"The {what} {', '.join(missing)} must be set.")
    typed = {
        name: tuple(value) if isinstance(fields[name].default, tuple) and isinstance(value, list) else value
        for name, value in values.items()
    }
    try:
        return cls(**typed)
    except StrictDataclassError as error:
        raise ConfigurationError(f"Invalid {what}: {error.__cause__ or error}.") from error


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`values` with `key=value` pairs applied; values are YAML, dotted keys reach into dicts (`model.depths=[1,1]`)."""
    result = dict(values)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigurationError(f"'{override}' is not an override: write key=value, e.g. batch_size=32.")
        *parents, last = key.split(".")
        target = result
        for parent in parents:
            child = target.get(parent, {})
            if isinstance(child, str) and parent == "model":
                child = {"pretrained": child}
            if not isinstance(child, dict):
                raise ConfigurationError(f"'{key}' cannot be set: '{parent}' is {child!r}, not a dictionary.")
            target[parent] = dict(child)
            target = target[parent]
        target[last] = parse_yaml(text)
    return result


def load_recipe(path: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and apply `key=value` overrides.

    Args:
        path: The YAML file; None starts from nothing but the overrides.
        overrides: `key=value` strings, values in YAML.

    Raises:
        ConfigurationError: If the file cannot be read or a key or value is not valid.
    """
    values: Any = {}
    if path is not None:
        try:
            values = parse_yaml(Path(path).read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"Cannot read the recipe {path}: {error}.") from error
    if not isinstance(values, dict):
        raise ConfigurationError(f"The recipe {path} must be a list of 'key: value' lines.")
    values = apply_overrides(values, overrides)
    if values.get("dataset"):
        values.setdefault("image_folder", "")
    return build(Recipe, values, "recipe key")
