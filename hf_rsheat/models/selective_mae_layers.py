"""Building blocks of SelectiveMAE: embeddings, pre-norm transformer layers, cross-attention decoder."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .input_channels import repeat_outputs


def sincos_table(rows: int, columns: int, dim: int) -> torch.Tensor:
    """Fixed 2-D positions of MAE, `(1, rows * columns, dim)`: sine and cosine of the column, then of the row."""
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64, device="cpu") / (dim // 4))
    row, column = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64, device="cpu"),
        torch.arange(columns, dtype=torch.float64, device="cpu"),
        indexing="ij",
    )
    angles = [axis.flatten()[:, None] * frequencies for axis in (column, row)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)[None].float()


def resize_positions(table: torch.Tensor, stored: tuple[int, int], wanted: tuple[int, int]) -> torch.Tensor:
    """Resize positions `(1, rows * columns, dim)` from one grid (rows, columns) to another.

    Bicubic, corners not aligned, no antialiasing, in at least float32.
    """
    if not _is_symbolic(*wanted) and stored == wanted:
        return table
    dtype = torch.promote_types(table.dtype, torch.float32)
    maps = table.unflatten(1, stored).permute(0, 3, 1, 2).to(dtype)
    return F.interpolate(maps, size=wanted, mode="bicubic").flatten(2).transpose(1, 2).to(table.dtype)


def _is_symbolic(*sizes: int | torch.SymInt) -> bool:
    """Whether a program for any size is being recorded: no size may then be compared with a stored one."""
    return any(isinstance(size, torch.SymInt) for size in sizes)


def pad_to_patches(pixel_values: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Zeros (the mean colour) at the right and bottom, up to whole patches: no pixel is dropped."""
    height, width = pixel_values.shape[-2:]
    if not _is_symbolic(height, width) and height % patch_size == 0 and width % patch_size == 0:
        return pixel_values
    return F.pad(pixel_values, (0, -width % patch_size, 0, -height % patch_size))


def patchify(pixel_values: torch.Tensor, patch_size: int) -> torch.Tensor:
    """`(batch, channels, height, width)` to `(batch, patches, patch_size**2 * channels)`: row, column, channel."""
    batch, channels, height, width = pixel_values.shape
    rows, columns = height // patch_size, width // patch_size
    patches = pixel_values.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch_size**2 * channels)


class SelectiveMAEEmbeddings(nn.Module):
    """Patches and their positions; class token and its (in pretraining unused) position."""

    input_layer = "projection"

    def __init__(self, config) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.stored_grid = config.grid(*config.image_size_pair)
        rows, columns = self.stored_grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.position_embeddings = nn.Parameter(torch.zeros(1, rows * columns + 1, config.hidden_size))
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, config.patch_size)

    def patches(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """Patch embeddings with positions, `(batch, rows * columns, dim)`, and the grid (rows, columns)."""
        if pixel_values.shape[1] != self.projection.in_channels:
            raise ValueError(
                f"The images have {pixel_values.shape[1]} channels, the model expects {self.projection.in_channels}: "
                "choose the bands, or load the model with `from_pretrained(..., num_channels=N)`."
            )
        maps = self.projection(pad_to_patches(pixel_values, self.patch_size).to(self.projection.weight.dtype))
        grid = (maps.shape[2], maps.shape[3])
        positions = resize_positions(self.position_embeddings[:, 1:], self.stored_grid, grid)
        return maps.flatten(2).transpose(1, 2) + positions, grid

    def class_token(self, batch: int, with_position: bool) -> torch.Tensor:
        """`(batch, 1, dim)`. In pretraining the original adds no position; when fine-tuning it does."""
        token = self.cls_token + self.position_embeddings[:, :1] if with_position else self.cls_token
        return token.expand(batch, -1, -1)


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out, with its weights `(batch, heads, queries, keys)`; inputs are `(batch, heads, n, dim)`."""
    weights = ((query * scaling) @ key.transpose(2, 3)).softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class SelectiveMAEAttention(nn.Module):
    """Multi-head attention of queries over a context, which is the queries themselves in the encoder."""

    def __init__(self, config, dim: int, context_dim: int, num_heads: int, head_dim: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.head_dim = head_dim or dim // num_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        inner_dim = num_heads * self.head_dim
        self.q_proj = nn.Linear(dim, inner_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(context_dim, inner_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(context_dim, inner_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(inner_dim, dim)

    def forward(self, hidden_states: torch.Tensor, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = (
            projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projected in (self.q_proj(hidden_states), self.k_proj(context), self.v_proj(context))
        )
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        mixed, weights = attend(self, query, key, value, None, scaling=self.scaling, dropout=0.0)
        return self.o_proj(mixed.flatten(2)), weights


class SelectiveMAEMLP(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, config, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class DropPath(nn.Module):
    """Stochastic depth per sample (arXiv 1603.09382); kept samples are divided by the keep probability."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.rate == 0.0 or not self.training:
            return hidden_states
        keep = torch.rand(hidden_states.shape[0], 1, 1, device=hidden_states.device) >= self.rate
        return hidden_states * (keep.to(hidden_states.dtype) / (1 - self.rate))


class SelectiveMAELayer(GradientCheckpointingLayer):
    """Pre-norm layer of the encoder."""

    def __init__(self, config, drop_path_rate: float) -> None:
        super().__init__()
        dim = config.hidden_size
        self.layernorm_before = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.attention = SelectiveMAEAttention(config, dim, dim, config.num_attention_heads, config.head_dim)
        self.layernorm_after = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.mlp = SelectiveMAEMLP(config, dim, config.intermediate_size)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        normed = self.layernorm_before(hidden_states)
        mixed, weights = self.attention(normed, normed)
        hidden_states = hidden_states + self.drop_path(mixed)
        return hidden_states + self.drop_path(self.mlp(self.layernorm_after(hidden_states))), weights


class SelectiveMAEEncoder(nn.Module):
    """All encoder layers, without the final norm."""

    def __init__(self, config) -> None:
        super().__init__()
        rates = torch.linspace(0, config.drop_path_rate, config.num_hidden_layers, device="cpu").tolist()
        self.layers = nn.ModuleList(SelectiveMAELayer(config, rate) for rate in rates)

    def forward(
        self, tokens: torch.Tensor, keep_all: bool = False
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], tuple[torch.Tensor | None, ...]]:
        """
        Args:
            tokens: `(batch, tokens, dim)`.
            keep_all: Also return the input, the outputs of all layers, and the attention weights of all layers.
        """
        hidden_states, attentions = [tokens], []
        for layer in self.layers:
            tokens, weights = layer(tokens)
            if keep_all:
                hidden_states.append(tokens)
                attentions.append(weights)
        return tokens, tuple(hidden_states), tuple(attentions)


class SelectiveMAEDecoderLayer(GradientCheckpointingLayer):
    """Queries look at the encoded tokens, not at each other (as in CrossMAE, arXiv 2401.14391)."""

    def __init__(self, config) -> None:
        super().__init__()
        dim = config.decoder_hidden_size
        self.layernorm_before = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.attention = SelectiveMAEAttention(config, dim, config.hidden_size, config.decoder_num_attention_heads)
        self.layernorm_after = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.mlp = SelectiveMAEMLP(config, dim, config.decoder_intermediate_size)

    def forward(self, queries: torch.Tensor, encoded: torch.Tensor) -> torch.Tensor:
        queries = queries + self.attention(self.layernorm_before(queries), encoded)[0]
        return queries + self.mlp(self.layernorm_after(queries))


class SelectiveMAEDecoder(nn.Module):
    """From encoded tokens to the pixels of the reconstructed patches."""

    def __init__(self, config) -> None:
        super().__init__()
        dim = config.decoder_hidden_size
        self.patch_size = config.patch_size
        self.stored_grid = config.grid(*config.image_size_pair)
        rows, columns = self.stored_grid
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.position_embeddings = nn.Parameter(torch.zeros(1, rows * columns, dim))
        self.layers = nn.ModuleList(SelectiveMAEDecoderLayer(config) for _ in range(config.decoder_num_hidden_layers))
        self.layernorm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.predictor = nn.Linear(dim, config.patch_size**2 * config.num_channels)

    def forward(self, encoded: torch.Tensor, ids: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """
        Args:
            encoded: The encoder's output after its final norm, class token included, `(batch, tokens, encoder dim)`.
            ids: Patches to reconstruct, `(batch, n)`.
            grid: Rows and columns of patches.

        Returns:
            `(batch, n, patch_size**2 * channels)`, pixels ordered as by [`patchify`].
        """
        positions = resize_positions(self.position_embeddings, self.stored_grid, grid)
        queries = self.mask_token + positions[0][ids]
        for layer in self.layers:
            queries = layer(queries, encoded)
        return self.predictor(self.layernorm(queries))

    def adapt_channels(self, num_channels: int, modality: str | None = None) -> None:
        """Predict another number of channels; see [`adapt_input_channels`]."""
        channels = self.predictor.out_features // self.patch_size**2
        self.predictor = repeat_outputs(self.predictor, channels, num_channels, dim=1)
