"""SAM's mask decoder (arXiv 2304.02643) for many prompts on one image.

The layers are those of transformers' `SamMaskDecoder`, and so is the result. But its forward copies the image's tokens,
which outnumber a prompt's by hundreds, for every prompt, and projects each copy nine times. Here the first layer, in
which all prompts still see the same image, projects it once. Behind it the projections stand on the side of the
prompts: with scores q . (W k) = (W^T q) . k the image's tokens are multiplied by a few vectors only.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.sam.modeling_sam import SamAttention, SamMaskDecoder

from .channels_last import gelu, linear

# Cells of the image, over all prompts, that are worked on at once: one prompt at 1024 px, 15 MB. Larger pieces leave
# the caches, and the operating system hands out their memory anew each time.
CELLS_AT_ONCE = 4096
UPSCALED_AT_ONCE = 1024  # of these, 16 times as many pixels with many channels


def decode_masks(
    decoder: SamMaskDecoder, image: torch.Tensor, positions: torch.Tensor, prompts: torch.Tensor
) -> torch.Tensor:
    """One mask per prompt, as `decoder(..., multimask_output=False)` gives.

    Args:
        decoder: The layers.
        image: Embedding of one image, the dense prompt added, `(hidden, height, width)`.
        positions: Its positional encoding, of the same shape.
        prompts: `(prompts, points, hidden)`.

    Returns:
        Mask logits `(prompts, 4 * height, 4 * width)`.
    """
    height, width = image.shape[-2:]
    if len(prompts) == 0:
        return image.new_empty(0, 4 * height, 4 * width)
    tokens, places = (map_.flatten(1).T[None].contiguous() for map_ in (image, positions))
    own = torch.cat((decoder.iou_token.weight, decoder.mask_tokens.weight))
    points = torch.cat((own.expand(len(prompts), -1, -1), prompts), dim=1)
    first = decoder.transformer.layers[0]
    queries = _update_points(first, points, points, tokens, tokens + places)
    asker = first.cross_attn_image_to_token.q_proj
    asking = linear(tokens + places, asker.weight, asker.bias)
    masks = []
    at_once = max(1, CELLS_AT_ONCE // (height * width))
    for some_points, some_queries in zip(points.split(at_once), queries.split(at_once), strict=True):
        cells = _update_same_image(first, some_queries, some_points, tokens, asking)
        seen, cells = _later_layers(decoder.transformer, some_queries, some_points, cells, places)
        kernel = decoder.output_hypernetworks_mlps[0](seen[:, 1])
        bands = cells.unflatten(1, (height, width)).split(max(1, UPSCALED_AT_ONCE // (len(seen) * width)), dim=1)
        masks += [torch.cat([_upscale(decoder, band, kernel) for band in bands], dim=1)]
    return torch.cat(masks)


def _later_layers(
    transformer: nn.Module, queries: torch.Tensor, points: torch.Tensor, image: torch.Tensor, places: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries `(n, points, hidden)` and images `(n, cells, hidden)` behind the first layer to those behind all."""
    for layer in transformer.layers[1:]:
        located = image + places
        queries = _update_points(layer, queries, points, image, located)
        image = _update_image(layer, queries, points, image, located)
    attention = transformer.final_attn_token_to_image
    queries = queries + _look_at_image(attention, queries + points, image, image + places)
    return transformer.layer_norm_final_attn(queries), image


def _update_points(
    layer: nn.Module, queries: torch.Tensor, points: torch.Tensor, image: torch.Tensor, located: torch.Tensor
) -> torch.Tensor:
    """Queries `(n, points, hidden)` after they saw each other and the image `(n or 1, cells, hidden)`."""
    if layer.skip_first_layer_pe:
        queries = _self_attention(layer.self_attn, queries, queries)
    else:
        queries = queries + _self_attention(layer.self_attn, queries + points, queries)
    queries = layer.layer_norm1(queries)
    attention = layer.cross_attn_token_to_image
    look = _look_at_image if len(image) == len(queries) else _look_at_same_image
    queries = layer.layer_norm2(queries + look(attention, queries + points, image, located))
    return layer.layer_norm3(queries + layer.mlp(queries))


def _self_attention(attention: SamAttention, located: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    output, _ = attention(query=located[None], key=located[None], value=queries[None])
    return output[0]


def _heads(x: torch.Tensor, attention: SamAttention) -> torch.Tensor:
    """`(n, tokens, inner)` to `(n, heads, tokens, inner / heads)`."""
    return x.unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)


def _per_head(weight: torch.Tensor, attention: SamAttention) -> torch.Tensor:
    """A projection's weight `(inner, ...)` as `(heads, inner / heads, ...)`."""
    return weight.unflatten(0, (attention.num_attention_heads, -1))


def _look_at_same_image(
    attention: SamAttention, located_points: torch.Tensor, image: torch.Tensor, located: torch.Tensor
) -> torch.Tensor:
    """What the points of all prompts see in one image `(1, cells, hidden)`, `(n, points, hidden)`."""
    queries = _heads(attention.q_proj(located_points).flatten(0, 1)[None], attention)
    keys = _heads(linear(located, attention.k_proj.weight, attention.k_proj.bias), attention)
    values = _heads(linear(image, attention.v_proj.weight, attention.v_proj.bias), attention)
    seen = F.scaled_dot_product_attention(queries, keys, values, scale=attention.scaling)
    return attention.out_proj(seen.transpose(1, 2).flatten(2)).view(len(located_points), -1, image.shape[-1])


def _look_at_image(
    attention: SamAttention, located_points: torch.Tensor, image: torch.Tensor, located: torch.Tensor
) -> torch.Tensor:
    """What points see in images of their own, `(n, points, hidden)`."""
    queries = _heads(attention.q_proj(located_points), attention) * attention.scaling
    # The bias of the keys would move all scores of a point alike, which changes no softmax over cells.
    folded = (queries @ _per_head(attention.k_proj.weight, attention)).flatten(1, 2)
    weights = _scores(folded, located).softmax(dim=-1)
    seen = (weights @ image).view(*queries.shape[:3], -1)
    values = seen @ _per_head(attention.v_proj.weight, attention).transpose(1, 2)
    return attention.out_proj(values.transpose(1, 2).flatten(2) + attention.v_proj.bias)


def _scores(vectors: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """Products `(n, vectors, cells)` of `(n, vectors, hidden)` and `(n, cells, hidden)`."""
    if len(vectors) == 1:
        return linear(vectors[0], cells[0])[None]
    return vectors @ cells.transpose(1, 2)


def _update_same_image(
    layer: nn.Module, queries: torch.Tensor, points: torch.Tensor, image: torch.Tensor, asking: torch.Tensor
) -> torch.Tensor:
    """One image `(1, cells, hidden)`, whose queries `(1, cells, inner)` are given, as `(n, cells, hidden)`."""
    attention = layer.cross_attn_image_to_token
    keys = _heads(attention.k_proj(queries + points), attention) * attention.scaling
    scores = keys @ _heads(asking, attention).transpose(2, 3)
    return _mixed(layer, scores, queries, image.expand(len(queries), -1, -1))


def _update_image(
    layer: nn.Module, queries: torch.Tensor, points: torch.Tensor, image: torch.Tensor, located: torch.Tensor
) -> torch.Tensor:
    """Images `(n, cells, hidden)` after their cells saw the points."""
    attention = layer.cross_attn_image_to_token
    keys = _heads(attention.k_proj(queries + points), attention) * attention.scaling
    offsets = keys @ _per_head(attention.q_proj.bias, attention)[:, :, None]
    folded = (keys @ _per_head(attention.q_proj.weight, attention)).flatten(1, 2)
    scores = _scores(folded, located).unflatten(1, keys.shape[1:3]) + offsets
    return _mixed(layer, scores, queries, image)


def _mixed(layer: nn.Module, scores: torch.Tensor, queries: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Images with what their cells see, by scores `(n, heads, points, cells)`, in the queries."""
    attention = layer.cross_attn_image_to_token
    weights = scores.softmax(dim=2).flatten(1, 2)
    values = _heads(attention.v_proj(queries), attention)
    # The weights of every head sum to 1: each can add its share of the bias.
    mixed = values @ _per_head(attention.out_proj.weight.T, attention)
    mixed = mixed + attention.out_proj.bias / attention.num_attention_heads
    return layer.layer_norm4(torch.baddbmm(image, weights.transpose(1, 2), mixed.flatten(1, 2)))


def _upscale(decoder: SamMaskDecoder, cells: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Image tokens `(n, height, width, hidden)` and a kernel each to mask logits `(n, 4 * height, 4 * width)`."""
    norm = decoder.upscale_layer_norm
    x = _double(decoder.upscale_conv1, cells)
    x = gelu(F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps))
    x = _double(decoder.upscale_conv2, x, "gelu")
    masks = (x.flatten(1, -2) @ kernel[:, :, None]).reshape(x.shape[:-1])  # n, rows, columns, 2, 2, 2, 2
    return masks.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 6).flatten(1, 3)


def _double(conv: nn.ConvTranspose2d, x: torch.Tensor, activation: str = "none") -> torch.Tensor:
    """A transposed convolution of kernel and stride 2 on `(..., channels)`: `(..., 2, 2, new channels)`."""
    weight = conv.weight.permute(2, 3, 1, 0)
    return linear(x, weight.flatten(0, 2), conv.bias.repeat(4), activation).unflatten(-1, weight.shape[:3])
