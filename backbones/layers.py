"""Blocks that OpenVLA and pi0 share."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from runtime import Fault

# What a step of our environments may be: metres, radians, gripper. The small presets scale by it.
STEP_BOUNDS = {
    "q01": [-0.06, -0.06, -0.06, -0.8, -0.8, -0.8, -1.0],
    "q99": [0.06, 0.06, 0.06, 0.8, 0.8, 0.8, 1.0],
}


def forward_layer(layer, x, recompute, **kwargs):
    """layer(x). recompute: keep no activations, but compute them again in the backward pass."""
    if recompute and torch.is_grad_enabled():  # nothing here is random
        return checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False, **kwargs)
    return layer(x, **kwargs)


def grey_levels(images_uint8, device):
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32, 0 to 255."""
    shape = tuple(images_uint8.shape)
    if images_uint8.dtype != torch.uint8 or len(shape) != 4 or shape[-1] != 3:
        raise Fault(f"images must be uint8 of shape (B, H, W, 3), not {images_uint8.dtype} {shape}")
    return images_uint8.to(device).permute(0, 3, 1, 2).float()


def in_heads(x, attention, *projections):
    """(B, n, H) through each projection -> (B, heads, n, head_dim)."""
    return (p(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for p in projections)


def where_heads_look(layer, x, options, earlier=None, rows=slice(None)):
    """Log-probs (B, heads / 2, rows, keys) with which the first half of a decoder layer's heads
    look from `rows` of the positions x (B, n, H), which its first norm has left. options: what the
    layer gets besides. earlier: rotated keys (B, heads, m, head_dim) that come before those of x.
    """
    attention = layer.self_attn
    q, k = in_heads(x, attention, attention.q_proj, attention.k_proj)
    q, k = apply_rotary_pos_emb(q, k, *options["position_embeddings"])
    k = k if earlier is None else torch.cat([earlier, k], 2)
    heads = q.shape[1] // 2
    logits = q[:, :heads, rows] @ k[:, :heads].mT * attention.scaling
    unseen = ~options["attention_mask"][:, :, rows]
    return logits.masked_fill(unseen, -torch.inf).log_softmax(-1)


def keep_variance(modules):
    """Weights that keep a signal's variance from layer to layer, and zero biases."""
    for module in modules:
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            # the ReLUs of a stem halve the variance
            gain = 2.0 if isinstance(module, nn.Conv2d) else 1.0
            nn.init.normal_(module.weight, std=(gain / module.weight[0].numel()) ** 0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def grid_waves(count, dim):
    """Position embeddings (count, dim) of a square grid: 1 to 10 quarter waves to either side."""
    axis = torch.linspace(-1, 1, round(count**0.5))
    frequencies = torch.logspace(0, 1, dim // 4) * 1.57
    angle = torch.cartesian_prod(axis, axis)[:, :, None] * frequencies  # (n, 2, D/4)
    return torch.cat([angle.sin(), angle.cos()], -1).flatten(1) / 2


def patch_embedding(patch, width, stem):
    """(B, 3, S, S) -> (B, width, S / patch, S / patch): one convolution.

    With `stem` (their output channels) it is several of stride 2 with ReLUs between.
    """
    if not stem:
        return nn.Conv2d(3, width, patch, patch)
    assert 2 ** (len(stem) + 1) == patch, "n channels make n + 1 convs, and 2**(n+1) pixels a patch"
    convs = []
    for n_in, n_out in zip([3, *stem], stem):
        convs += [nn.Conv2d(n_in, n_out, 3, 2, 1), nn.ReLU(inplace=True)]
    return nn.Sequential(*convs, nn.Conv2d(stem[-1], width, 3, 2, 1))
