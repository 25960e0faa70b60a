"""SAM's mask decoder (arXiv 2304.02643) for many prompts on one image.

The layers are those of transformers' `SamMaskDecoder`, and so is the result. But its forward copies the image's tokens,
which outnumber a prompt's by hundreds, for every prompt, and projects each copy nine times. Here the projections stand
on the side of the prompts: with scores q . (W k) = (W^T q) . k the image's tokens are multiplied by a few vectors only,
and whatever is the same for all prompts is computed once.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.sam.modeling_sam import SamAttention, SamMaskDecoder

# Cells of the image, over all prompts, that are worked on at once: two prompts at 1024 px, 30 MB. Larger pieces leave
# the caches, and the operating system hands out their memory anew each time.
CELLS_AT_ONCE = 8192


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
    tokens, places = image.flatten(1).T[None], positions.flatten(1).T[None]
    own = torch.cat((decoder.iou_token.weight, decoder.mask_tokens.weight))
    masks = [image.new_empty(0, 4 * height, 4 * width)]
    for some in prompts.split(max(1, CELLS_AT_ONCE // (height * width))):
        if len(some):
            points = torch.cat((own.expand(len(some), -1, -1), some), dim=1)
            queries, cells = _two_ways(decoder.transformer, points, tokens, places)
            kernel = decoder.output_hypernetworks_mlps[0](queries[:, 1])
            bands = cells.unflatten(1, (height, width)).split(max(1, CELLS_AT_ONCE // (len(some) * width)), dim=1)
            masks.append(torch.cat([_upscale(decoder, band, kernel) for band in bands], dim=1))
    return torch.cat(masks)


def _two_ways(
    transformer: nn.Module, points: torch.Tensor, image: torch.Tensor, places: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Points `(n, points, hidden)` and image `(1, cells, hidden)` after they attended to each other."""
    queries = points
    for layer in transformer.layers:
        if layer.skip_first_layer_pe:
            queries = _self_attention(layer.self_attn, queries, queries)
        else:
            queries = queries + _self_attention(layer.self_attn, queries + points, queries)
        queries = layer.layer_norm1(queries)
        located = image + places
        attention = layer.cross_attn_token_to_image
        queries = layer.layer_norm2(queries + _look_at_image(attention, queries + points, image, located))
        queries = layer.layer_norm3(queries + layer.mlp(queries))
        attention = layer.cross_attn_image_to_token
        image = layer.layer_norm4(_look_at_points(attention, queries + points, queries, image, located))
    attention = transformer.final_attn_token_to_image
    queries = queries + _look_at_image(attention, queries + points, image, image + places)
    return transformer.layer_norm_final_attn(queries), image


def _self_attention(attention: SamAttention, located: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    output, _ = attention(query=located[None], key=located[None], value=queries[None])
    return output[0]


def _heads(x: torch.Tensor, attention: SamAttention) -> torch.Tensor:
    """`(n, tokens, inner)` to `(n, heads, tokens, inner / heads)`."""
    return x.unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)


def _scores(vectors: torch.Tensor, projection: nn.Linear, located: torch.Tensor) -> torch.Tensor:
    """Products of vectors `(n, heads, points, size)` with projected cells (no bias): `(n, heads, points, cells)`."""
    n, heads, points, _ = vectors.shape
    folded = (vectors @ projection.weight.unflatten(0, (heads, -1))).flatten(1, 2)
    if len(located) < n:  # the same cells for all prompts: one product
        folded = folded.flatten(0, 1)[None]
    return (folded @ located.transpose(1, 2)).reshape(n, heads, points, -1)


def _look_at_image(
    attention: SamAttention, located_points: torch.Tensor, image: torch.Tensor, located: torch.Tensor
) -> torch.Tensor:
    """What points see in the image, `(n, points, hidden)`. The bias of the keys changes no softmax over cells."""
    queries = _heads(attention.q_proj(located_points), attention) * attention.scaling
    weights = _scores(queries, attention.k_proj, located).softmax(dim=-1)
    n, heads, points, cells = weights.shape
    seen = weights.reshape(len(image), -1, cells) @ image
    values = seen.reshape(n, heads, points, -1) @ attention.v_proj.weight.unflatten(0, (heads, -1)).transpose(1, 2)
    return attention.out_proj(values.transpose(1, 2).flatten(2) + attention.v_proj.bias)


def _look_at_points(
    attention: SamAttention,
    located_points: torch.Tensor,
    points: torch.Tensor,
    image: torch.Tensor,
    located: torch.Tensor,
) -> torch.Tensor:
    """The image with what its cells see in the points added, `(n, cells, hidden)`."""
    heads = attention.num_attention_heads
    keys = _heads(attention.k_proj(located_points), attention) * attention.scaling
    offsets = keys @ attention.q_proj.bias.unflatten(0, (heads, -1))[:, :, None]
    weights = (_scores(keys, attention.q_proj, located) + offsets).softmax(dim=2)
    values = _heads(attention.v_proj(points), attention)
    # The weights of every head sum to 1: each can add its share of the bias.
    mixed = values @ attention.out_proj.weight.unflatten(1, (heads, -1)).permute(1, 2, 0)
    mixed = mixed + attention.out_proj.bias / heads
    n, cells = len(weights), weights.shape[-1]
    return torch.baddbmm(image.expand(n, -1, -1), weights.reshape(n, -1, cells).transpose(1, 2), mixed.flatten(1, 2))


def _upscale(decoder: SamMaskDecoder, cells: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Image tokens `(n, height, width, hidden)` and a kernel each to mask logits `(n, 4 * height, 4 * width)`."""
    norm = decoder.upscale_layer_norm
    x = _double(decoder.upscale_conv1, cells)
    x = decoder.activation(F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps))
    x = decoder.activation(_double(decoder.upscale_conv2, x))
    masks = (x.flatten(1, -2) @ kernel[:, :, None]).reshape(x.shape[:-1])  # n, rows, columns, 2, 2, 2, 2
    return masks.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 6).flatten(1, 3)


def _double(conv: nn.ConvTranspose2d, x: torch.Tensor) -> torch.Tensor:
    """A transposed convolution of kernel and stride 2 on `(..., channels)`: `(..., 2, 2, new channels)`."""
    weight = conv.weight.permute(2, 3, 1, 0)
    return F.linear(x, weight.flatten(0, 2), conv.bias.repeat(4)).unflatten(-1, weight.shape[:3])
