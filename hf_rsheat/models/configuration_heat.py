"""What the configurations of both heat models share."""

from transformers.backbone_utils import BackboneConfigMixin


class HeatConfigMixin(BackboneConfigMixin):
    """What both heat models derive from their fields: stage names, per-stage widths, table sizes."""

    def _derive_stages(self, kwargs: dict) -> None:
        """Check the stage fields and set the output features of the backbone."""
        num_stages = len(self.depths)
        for name in ("hidden_sizes", "depths", "inner_dims", "mlp_hidden_dims"):
            if getattr(self, name) is None:
                continue
            values = list(getattr(self, name))
            if len(values) != num_stages or any(value < 1 for value in values):
                raise ValueError(f"`{name}` needs one positive number per stage ({num_stages}), got {values}.")
            setattr(self, name, values)
        if min(self.image_size_pair) < 1:
            raise ValueError(f"`image_size` must be positive, got {self.image_size}.")
        if self.mlp_hidden_dims is None and min(self.hidden_sizes) * self.mlp_ratio < 1:
            raise ValueError(f"`mlp_ratio` must leave at least one hidden unit, got {self.mlp_ratio}.")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"`drop_path_rate` must be in [0, 1), got {self.drop_path_rate}.")
        self.stage_names = ["stem"] + [f"stage{index}" for index in range(1, num_stages + 1)]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )

    @property
    def image_size_pair(self) -> tuple[int, int]:
        """Height and width in pixels."""
        if isinstance(self.image_size, int):
            return self.image_size, self.image_size
        height, width = self.image_size
        return height, width

    def inner_dim(self, stage: int) -> int:
        """Width of the heat operator in a stage (smaller than the stage width only in slimmed models)."""
        return self.hidden_sizes[stage] if self.inner_dims is None else self.inner_dims[stage]

    def mlp_hidden_dim(self, stage: int) -> int:
        """Hidden width of the MLPs in a stage."""
        if self.mlp_hidden_dims is not None:
            return self.mlp_hidden_dims[stage]
        return int(self.hidden_sizes[stage] * self.mlp_ratio)

    def table_size(self, stage: int) -> tuple[int, int]:
        """Rows and columns of the stage's tables: image size / 4, halved per stage, rounded down (at least 1)."""
        height, width = self.image_size_pair
        return max(1, height // 4 // 2**stage), max(1, width // 4 // 2**stage)
