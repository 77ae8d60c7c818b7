"""Policies: observation + instruction -> action chunk, with exact log-probs and KL.

    policy = load_policy("openvla-tiny")                                  # random weights, to be trained by sft.py
    policy = load_policy("openvla", "gen-robot/openvla-7b-rlvla-warmup")  # the official 7B checkpoint as it is
    python policies.py merge ADAPTER_DIR OUT_DIR                          # fold a LoRA checkpoint into its base model

OpenVLA: two ViT towers (DINOv2, SigLIP) -> projector -> Llama; an action is 7 tokens of 256 bins each. Everything that
differs between the tiny preset and the 7B model is in config.json, which is read as data.
"""

import hashlib
import json
import math
import os
import re
import shutil
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from types import SimpleNamespace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
import tyro
from huggingface_hub import constants, save_torch_state_dict, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GemmaConfig, LlamaConfig, LlamaForCausalLM, SiglipVisionConfig
from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer, GemmaRMSNorm
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer
from tyro.conf import Positional

import runtime

BACKBONES = ("openvla", "openvla-tiny", "pi0", "pi05", "pi05-tiny")
DEFAULT_CHECKPOINT = {  # "name@revision" pins it
    "openvla": "gen-robot/openvla-7b-rlvla-warmup",
    "pi0": "RLinf/RLinf-Pi0-ManiSkill-25Main-SFT",
    "pi05": "RLinf/RLinf-Pi05-ManiSkill-25Main-SFT",
}
DTYPES = {
    "auto": None,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}  # of the backbone, as load_policy takes it
PROMPT = "In: What action should the robot take to {instruction}?\nOut: "  # its last space is Llama's token 29871
LORA_TARGETS = [  # RL4VLA's list: every linear layer, and both patch embeddings
    "proj", "qkv", "fc1", "fc2", "fc3", "q", "kv", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
    "down_proj", "lm_head",
]  # fmt: skip


PolicyError = runtime.Fault


@dataclass
class PolicyArgs:
    """STUB until the branch that splits this file is merged."""

    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    unnorm_key: str | None = None
    tokenizer: str | None = None
    base: str | None = None
    lora_rank: int = 0
    lora_alpha: int | None = None
    lora_targets: tuple[str, ...] | None = None
    gradient_checkpointing: bool = False
    horizon: int | None = None
    replan: int | None = None
    denoise_steps: int | None = None
    noise_level: float | None = None
    sde_steps: Literal["one", "all"] | None = None


class Decision(NamedTuple):
    actions: (
        torch.Tensor
    )  # (B, chunk, 7) float32, env units: metres, radians, gripper -1 (close) / +1 (open)
    latent: (
        torch.Tensor
    )  # what the log-prob is taken of: action token ids (B, 7) long; or see Pi0.distribution
    logprob: (
        torch.Tensor
    )  # (B,) float32, sum over the 7 tokens, at temperature 1 whatever was sampled at
    value: torch.Tensor  # (B,) float32


class Evaluation(NamedTuple):
    dist: (
        torch.Tensor
    )  # (B, 7, 256) float32 logits, teacher-forced on the latent; or see Pi0.distribution
    logprob: torch.Tensor  # (B,) SUM over the 7 tokens: the log-prob of the joint action
    entropy: torch.Tensor  # (B,) mean over the 7 tokens, nats
    value: torch.Tensor  # (B,)


# ------------------------------------------------------------------------------------------------ configs
# Both towers' sizes are implied by their timm ids in the official config.json (image size and stats aside).
TIMM = {
    "vit_large_patch14_reg4_dinov2.lvd142m": {
        "embed_dim": 1024, "depth": 24, "num_heads": 16, "mlp_ratio": 4.0,
        "patch_size": 14, "class_token": True, "reg_tokens": 4, "layer_scale": True,
    },
    "vit_so400m_patch14_siglip_224": {
        "embed_dim": 1152, "depth": 27, "num_heads": 16, "mlp_ratio": 3.7362,
        "patch_size": 14, "class_token": False, "reg_tokens": 0, "layer_scale": False,
    },
}  # fmt: skip
MEAN = (
    0.485,
    0.456,
    0.406,
    0.5,
    0.5,
    0.5,
)  # channels 0-2 feed DINO (ImageNet statistics), 3-5 SigLIP
STD = (0.229, 0.224, 0.225, 0.5, 0.5, 0.5)

_WORDS = """7up action baguette ball banana bar bbq bear black block blue bottle bowtie bread brown can capsule carrot
champagne cross cube cup cyan cylinder disc domino dumbbell fast food glass golf green hamburger hammer house in is
ketchup kitchen l light lime mushroom navy nonstop on onion orange pepper pink pipe plant plastic plate potato puck
purple put pyramid red robot sauce should shovel snowman spoon stick striped t take teal the to toy traffic travel
watering what where yellow zuchinni"""  # the object names of both asset packs, and the words of the prompts

OPENVLA_TINY = {
    "model_type": "openvla",
    "timm_model_ids": list(TIMM),
    "image_sizes": [96, 96],
    "n_action_bins": 256,
    "pad_to_multiple_of": 64,
    "pad_token_id": 0,
    "text_config": {
        "model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0,
        "vocab_size": 448,  # 128 words (some spare) + 256 actions + 64 padding, ordered as in the 7B's 32064
        "initializer_range": 0.05,
    },
    "norm_stats": {"builtin": {"action": {  # the env's step bounds: metres, radians, gripper
        "q01": [-0.06, -0.06, -0.06, -0.8, -0.8, -0.8, -1.0], "q99": [0.06, 0.06, 0.06, 0.8, 0.8, 0.8, 1.0],
        "mask": [True, True, True, True, True, True, False],
    }}},
    # Everything below is not an official field. A patch embedding does not learn to see in minutes; a conv stem does.
    "_tiny_timm_kwargs": [
        {"embed_dim": 128, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0, "patch_size": 16, "stem": [24, 48, 96],
         "class_token": False, "reg_tokens": 0, "layer_scale": False},
        {"embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 4.0, "patch_size": 16},
    ],
    "_word_vocab": ["<pad>", "<s>", "<unk>", "<out>"] + _WORDS.split(),
    "_prompt": "{instruction} <out>",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ blocks
def run(layer, x, recompute, **kwargs):
    """layer(x); with `recompute` its activations are not kept but computed again in the backward pass."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(
            layer, x, use_reentrant=False, preserve_rng_state=False, **kwargs
        )  # nothing here is random
    return layer(x, **kwargs)


def grey_levels(images_uint8, device):
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32, 0 to 255."""
    if images_uint8.dtype != torch.uint8 or images_uint8.ndim != 4 or images_uint8.shape[-1] != 3:
        raise PolicyError(
            f"images must be uint8 of shape (B, H, W, 3), not {images_uint8.dtype} {tuple(images_uint8.shape)}."
        )
    return images_uint8.to(device).permute(0, 3, 1, 2).float()


def keep_variance(modules):
    """Weights with which a signal keeps its variance from layer to layer; zero biases. For policies that start from nothing."""
    for module in modules:
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            gain = (
                2.0 if isinstance(module, nn.Conv2d) else 1.0
            )  # the stem's ReLU halves the variance
            nn.init.normal_(module.weight, std=(gain / module.weight[0].numel()) ** 0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def grid_waves(count, dim):
    """Position embeddings (count, dim) of a square grid: 1 to 10 quarter waves from edge to middle."""
    axis = torch.linspace(-1, 1, round(count**0.5))
    angle = (
        torch.cartesian_prod(axis, axis)[:, :, None] * torch.logspace(0, 1, dim // 4) * 1.57
    )  # (n, 2, D/4)
    return torch.cat([angle.sin(), angle.cos()], -1).flatten(1) / 2


def patch_embedding(patch, width, stem):
    """(B, 3, S, S) -> (B, width, S / patch, S / patch): one convolution, or with `stem` (their output channels) several of
    stride 2, ReLUs between."""
    if not stem:
        return nn.Conv2d(3, width, patch, patch)
    assert 2 ** (len(stem) + 1) == patch, "n channels make n + 1 convs, and 2**(n+1) pixels a patch"
    convs = [
        m
        for i, o in zip([3, *stem], stem)
        for m in (nn.Conv2d(i, o, 3, 2, 1), nn.ReLU(inplace=True))
    ]
    return nn.Sequential(*convs, nn.Conv2d(stem[-1], width, 3, 2, 1))


class ViT(nn.Module):
    """(B, 3, S, S) -> patch features (B, n, D): the output of block depth-2, no final norm, as OpenVLA takes it.

    timm's parameter names, which are the checkpoint's. The last block, the final norm and SigLIP's attention pool are
    dead weights in OpenVLA and are not built. `stem` (output channels) swaps the patch embedding for strided convs.
    """

    def __init__(self, image_size, embed_dim, depth, num_heads, patch_size, class_token, reg_tokens, layer_scale,
                 mlp_ratio=4.0, stem=None):  # fmt: skip
        super().__init__()
        self.num_heads, self.num_patches = num_heads, (image_size // patch_size) ** 2
        patches = patch_embedding(patch_size, embed_dim, stem)
        convs, proj = (patches[:-1], patches[-1]) if stem else (nn.Identity(), patches)
        self.patch_embed = nn.ModuleDict({"stem": convs, "proj": proj})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, reg_tokens, embed_dim)) if reg_tokens else None
        self.pos_embed = nn.Parameter(torch.randn(1, self.num_patches, embed_dim) * 0.02)
        self.blocks = nn.ModuleList(
            Block(embed_dim, int(embed_dim * mlp_ratio), layer_scale) for _ in range(depth - 1)
        )

    def forward(self, x, recompute=False):
        x = x.contiguous(
            memory_format=torch.channels_last
        )  # it is a slice, which convolutions would copy
        x = (
            self.patch_embed["proj"](self.patch_embed["stem"](x)).flatten(2).transpose(1, 2)
        )  # (B, n, D)
        x = x + self.pos_embed  # patches only: timm has folded the cls position into cls_token
        prefix = [
            t.expand(len(x), -1, -1) for t in (self.cls_token, self.reg_token) if t is not None
        ]
        x = torch.cat([*prefix, x], 1) if prefix else x
        for block in self.blocks:
            x = run(block, x, recompute, num_heads=self.num_heads)
        return x[:, -self.num_patches :]


class Block(nn.Module):
    """Pre-norm transformer block. GELU is exact in both towers (transformers' SigLIP defaults to tanh)."""

    def __init__(self, dim, hidden, layer_scale):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})
        scale = [
            nn.ParameterDict({"scale_factor": nn.Parameter(torch.ones(dim))})
            for _ in range(2 * layer_scale)
        ]
        self.ls1, self.ls2 = scale if layer_scale else (None, None)

    def forward(self, x, num_heads):
        q, k, v = (
            self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
        )
        y = self.attn["proj"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + (y if self.ls1 is None else y * self.ls1["scale_factor"])
        y = self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))
        return x + (y if self.ls2 is None else y * self.ls2["scale_factor"])


class KVCache:
    """Keys and values at fixed addresses: (layers, B, heads, length, head_dim). What is not yet written is masked."""

    def __init__(self, config, batch, length, like):
        shape = (
            config.num_hidden_layers,
            batch,
            config.num_key_value_heads,
            length,
            config.head_dim,
        )
        self.k, self.v, self.start = like.new_zeros(shape), like.new_zeros(shape), 0

    def update(self, k, v, layer_idx):  # called by LlamaAttention
        self.k[layer_idx, :, :, self.start : self.start + k.shape[2]] = k
        self.v[layer_idx, :, :, self.start : self.start + k.shape[2]] = v
        return self.k[layer_idx], self.v[layer_idx]


# ------------------------------------------------------------------------------------------------ saving
@contextmanager
def whole_directory(directory):
    """Yields a Path to write flat files into; at the end they appear as `directory`, whole and on disk, or not at all.

    SHA256SUMS (check it with `sha256sum -c SHA256SUMS`) is added, what `directory` held before goes.
    """
    directory = Path(directory)
    temporary, old = (
        directory.with_name(f"{directory.name}.{name}") for name in ("partial", "old.partial")
    )
    try:
        for leftover in (temporary, old):
            if leftover.exists():
                shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
        yield temporary
        names = sorted(file.name for file in temporary.iterdir())
        sums = "".join(f"{file_hash(temporary / name)}  {name}\n" for name in names)
        (temporary / "SHA256SUMS").write_text(sums)
        for path in (*(temporary / name for name in names), temporary / "SHA256SUMS", temporary):
            sync(path)
        if directory.exists():
            os.replace(directory, old)
        os.replace(temporary, directory)
        sync(directory.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = f"{error}".replace("\n", " ")
        raise PolicyError(
            f"{directory} could not be written ({reason}); nothing saved before is touched."
        ) from error


def file_hash(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path):
    """Wait until a file's or a directory's content is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verify(directory):
    """Compare every file of a directory that `whole_directory` wrote with its hash. PolicyError names the first to differ."""
    try:
        lines = (directory / "SHA256SUMS").read_text().splitlines()
        if not lines:
            raise PolicyError(f"{directory / 'SHA256SUMS'} is empty: the directory is damaged.")
        for line in lines:
            wanted, _, name = line.partition("  ")
            if file_hash(directory / name) != wanted:
                raise PolicyError(
                    f"{directory / name} is damaged: it is not the file that was saved (see SHA256SUMS there)."
                )
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"{directory} is damaged or incomplete ({error}).") from None


def save_policy(policy, directory, dtype=None):
    """Write a checkpoint that load_policy reads; dtype (say torch.float16) is that of the stored weights.

    With LoRA: a standard PEFT directory (adapter_config.json, adapter_model.safetensors); else config.json and
    model.safetensors. Both: value_head.safetensors and norm_stats.json.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    files = {"model": {}, "adapter_model": {}, "value_head": {}}
    for key, tensor in policy.state_dict().items():
        tensor = tensor.detach().to(dtype or tensor.dtype).contiguous()
        if key.startswith("value_head."):
            files["value_head"][key.removeprefix("value_head.")] = tensor
        elif policy.lora_config and policy.in_adapter(key):
            files["adapter_model"]["base_model.model." + key.replace(".default.", ".")] = tensor
        else:
            files["model"][key] = tensor
    if policy.lora_config:
        del files["model"]  # the base model stays where it is; adapter_config.json names it
        policy.lora_config.save_pretrained(str(directory))
    else:
        del files["adapter_model"]
    if policy.saves_config or not policy.lora_config:
        save_config(policy, directory)
    for name, tensors in files.items():
        save_file(tensors, directory / f"{name}.safetensors", {"format": "pt"})
    if policy.config["norm_stats"]:
        stats = {policy.unnorm_key: policy.config["norm_stats"][policy.unnorm_key]}
        (directory / "norm_stats.json").write_text(json.dumps(stats, indent=2))


def save_config(policy, directory):
    (directory / "config.json").write_text(json.dumps(policy.config, indent=2))
    if policy.tokenizer_file:
        shutil.copy(policy.tokenizer_file, directory / "tokenizer.json")


# ------------------------------------------------------------------------------------------------ LoRA
class AdapterLinear(nn.Linear):
    """Half of a LoRA adapter: float32 weights, or small updates would vanish; arithmetic in the dtype of its input.

    peft would raise the input to float32 instead and keep that for the backward pass, for each of 7 layers in a block.
    """

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


def inject_lora(policy, lora_config):
    """Float32 adapters beside the layers that lora_config targets; everything else is frozen."""
    lora_config.base_model_name_or_path, lora_config.revision = policy.name, policy.commit
    inject_adapter_in_model(lora_config, policy)
    for layer in [module for module in policy.modules() if isinstance(module, LoraLayer)]:
        for half in (layer.lora_A, layer.lora_B):  # peft has given them the backbone's dtype
            half["default"].float()
            if isinstance(half["default"], nn.Linear):  # not a patch embedding's convolution
                layer.cast_input_dtype_enabled = False
                weight = half["default"].weight
                half["default"] = AdapterLinear(*weight.shape[::-1], bias=False, device="meta")
                half["default"].weight = weight


# ------------------------------------------------------------------------------------------------ OpenVLA
class OpenVLA(nn.Module):
    """The token policy. Official key names: vision_backbone, projector, language_model; plus RL4VLA's value_head."""

    chunk = horizon = 1  # env steps per decision
    gradient_checkpointing = False
    detach_value = False  # True: the critic reads the trunk but does not train it
    saves_config = False  # with an adapter
    save = save_policy

    def __init__(self, config):
        super().__init__()
        self.config, self.name, self.commit, self.directory = (
            config,
            "openvla",
            None,
            None,
        )  # where it comes from
        text = LlamaConfig(
            **{"rms_norm_eps": 1e-6, **config["text_config"]}
        )  # 1e-6: the port's, not Meta's 1e-5
        self.image_size = config["image_sizes"][0]
        towers = [TIMM[name] for name in config["timm_model_ids"]]
        if "_tiny_timm_kwargs" in config:
            towers = [
                {**tower, **kwargs} for tower, kwargs in zip(towers, config["_tiny_timm_kwargs"])
            ]
        dino, siglip = [ViT(size, **tower) for size, tower in zip(config["image_sizes"], towers)]
        self.vision_backbone = nn.ModuleDict({"featurizer": dino, "fused_featurizer": siglip})
        fused = sum(tower["embed_dim"] for tower in towers)
        sizes = [fused, 4 * fused, text.hidden_size, text.hidden_size]
        self.projector = nn.ModuleDict(
            {f"fc{i + 1}": nn.Linear(sizes[i], sizes[i + 1]) for i in range(3)}
        )
        self.language_model = LlamaForCausalLM(text)
        self.value_head = nn.ModuleDict({
            "head_l1": nn.Linear(text.hidden_size, 512),
            "head_l2": nn.Linear(512, 128),
            "head_l3": nn.Linear(128, 1, bias=False),
        })  # fmt: skip
        # Action token ids are [action_begin, action_end), the tokenizer's last 256; a LARGER id is a SMALLER value.
        self.action_end = text.vocab_size - config["pad_to_multiple_of"]
        self.action_begin = self.action_end - config["n_action_bins"]
        self.tokenizer, self.tokenizer_file, self._prompt_ids, self.lora_config = (
            None,
            None,
            {},
            None,
        )

    def init_value_head(self):
        """N(0, 0.02), zero bias: what RL4VLA's value head effectively starts from."""
        for name, p in self.value_head.named_parameters():
            nn.init.zeros_(p) if name.endswith("bias") else nn.init.normal_(p, std=0.02)

    def init_from_scratch(self):
        """What pretraining has done for the 7B model: the image reaches Llama, and neighbouring bins are neighbours.

        torch's default init shrinks a signal from layer to layer: of the patch tokens only 1.5 % would depend on the
        image. Position embeddings start as waves over the grid; action tokens as random waves over the bin's value, so
        that a bin which no demonstration has used is not plain noise.
        """
        keep_variance([*self.vision_backbone.modules(), *self.projector.modules()])
        for tower in self.vision_backbone.values():
            tower.pos_embed.data = grid_waves(*tower.pos_embed.shape[1:])[None]
        for layer in (
            self.language_model.model.layers
        ):  # attention starts by content: a word looks at patches like it
            nn.init.normal_(layer.self_attn.q_proj.weight, std=0.07)
            layer.self_attn.k_proj.weight.data.copy_(layer.self_attn.q_proj.weight)
        x = torch.linspace(-1, 1, self.action_end - self.action_begin)[:, None]  # (256, 1)
        std = self.language_model.config.initializer_range
        for table in (
            self.language_model.model.embed_tokens.weight,
            self.language_model.lm_head.weight,
        ):
            freq, phase = torch.randn(table.shape[1]) * 3, torch.rand(table.shape[1]) * 6.2832
            table.data[self.action_begin : self.action_end] = (
                torch.cos(x * freq + phase) * std * 2**0.5
            )

    def add_lora(self, rank=32, alpha=None, targets=None, lora_config=None):
        """fp32 adapters on every linear layer; only they and the value head train. alpha None: alpha = rank."""
        self.lora_config = lora_config or LoraConfig(
            r=rank,
            lora_alpha=alpha or rank,
            target_modules=list(targets or LORA_TARGETS),
            init_lora_weights="gaussian",
        )
        inject_lora(self, self.lora_config)
        self.value_head.requires_grad_(True)

    @staticmethod
    def rename(key):
        """The name here of a checkpoint's tensor: the official one; of RLinf's value head, the same MLP, RL4VLA's."""
        return re.sub(
            r"^value_head\.mlp\.([024])\.",
            lambda found: f"value_head.head_l{int(found[1]) // 2 + 1}.",
            key,
        )

    def keeps_float32(self, key):
        return key.startswith("value_head.")

    def in_adapter(self, key):
        """What training changes where there are adapters."""
        return ".lora_" in key

    def is_dead(self, key):
        """Official tensors that OpenVLA never uses: each tower's last block and final norm, SigLIP's attention pool."""
        key = key.removeprefix("vision_backbone.")
        return any(
            key.startswith(
                (f"{name}.blocks.{len(tower.blocks)}.", f"{name}.norm.", f"{name}.attn_pool.")
            )
            for name, tower in self.vision_backbone.items()
        )

    # -------------------------------------------------------------------- inputs
    @property
    def device(self):
        return self.value_head["head_l3"].weight.device

    @property
    def dtype(self):
        return self.language_model.model.norm.weight.dtype

    def preprocess(self, images_uint8):
        """(B, H, W, 3) uint8 -> (B, 6, S, S) float32. Aspect ratio is not kept, nothing is cropped ("resize-naive")."""
        x = grey_levels(images_uint8, self.device)
        if x.shape[-2:] != (self.image_size, self.image_size):
            x = F.interpolate(x, (self.image_size, self.image_size), mode="bicubic", antialias=True)
            x = x.clamp(0, 255).round()  # back to grey levels, as the uint8 route of RLinf does
        x = (x / 255).repeat(1, 2, 1, 1)
        return x.sub_(x.new_tensor(MEAN)[:, None, None]).div_(x.new_tensor(STD)[:, None, None])

    def tokenize(self, instructions, prompt=None):
        """List of B str -> input_ids, attention_mask (B, T): padded on the left, then BOS moved to column 0.

        The 256 patches go right behind BOS, so BOS has to be at the same place in every row.
        """
        if self.tokenizer is None:
            raise PolicyError(
                f"{self.name} has no tokenizer.json, so it cannot read instructions; add that file."
            )
        prompt = prompt or self.config.get("_prompt", PROMPT)
        for key in {(prompt, text) for text in instructions} - self._prompt_ids.keys():
            self._prompt_ids[key] = self.tokenizer(prompt.format(instruction=key[1].lower()))
        rows = [self._prompt_ids[prompt, text] for text in instructions]
        length = max(map(len, rows))
        pad = self.config["pad_token_id"]
        ids = torch.tensor([row[:1] + [pad] * (length - len(row)) + row[1:] for row in rows])
        mask = torch.tensor(
            [[1] + [0] * (length - len(row)) + [1] * (len(row) - 1) for row in rows]
        )
        return ids.to(self.device), mask.to(self.device)

    # -------------------------------------------------------------------- the distribution
    def _prefix(self, pixel_values, input_ids):
        """[BOS][patches][rest of the prompt] -> embeddings (B, L, H)."""
        dino, siglip = pixel_values.to(self.dtype).split(3, dim=1)
        towers = self.vision_backbone
        dino = towers["featurizer"](dino, self.gradient_checkpointing)
        siglip = towers["fused_featurizer"](siglip, self.gradient_checkpointing)
        x = torch.cat([dino, siglip], -1)  # (B, n, Dd + Ds)
        x = self.projector["fc3"](F.gelu(self.projector["fc2"](F.gelu(self.projector["fc1"](x)))))
        text = self.language_model.model.embed_tokens(input_ids)
        return torch.cat([text[:, :1], x, text[:, 1:]], 1)

    def _layout(self, attention_mask, num_patches):
        """What each of L + 6 positions may see, (B, 1, L+6, L+6) bool, and its rotary position (pads do not count)."""
        patches, actions = attention_mask.new_ones(len(attention_mask), num_patches + 6).split(
            [num_patches, 6], 1
        )
        valid = torch.cat(
            [attention_mask[:, :1], patches, attention_mask[:, 1:], actions], 1
        )  # (B, L + 6)
        causal = torch.ones(
            valid.shape[1], valid.shape[1], dtype=torch.bool, device=valid.device
        ).tril()
        return causal & valid.bool()[:, None, None, :], valid.cumsum(1) - 1

    def _llama(self, x, mask, positions, cache=None):
        """Llama's own layers on embeddings (B, Q, H), without its mask-guessing wrapper; after the final norm."""
        llama = self.language_model.model
        rotary = llama.rotary_emb(x, positions)
        for layer in llama.layers:
            kwargs = {
                "attention_mask": mask,
                "position_embeddings": rotary,
                "past_key_values": cache,
            }
            x = run(layer, x, self.gradient_checkpointing, **kwargs)
        return llama.norm(x)

    def _logits(self, hidden):
        """(..., H) -> float32 logits (..., 256) of the action columns: the one place where the distribution is made."""
        head, columns, hidden = (
            self.language_model.lm_head,
            slice(self.action_begin, self.action_end),
            hidden.float(),
        )
        logits = F.linear(hidden, head.weight[columns].float())
        if isinstance(
            head, LoraLayer
        ):  # only the rows of B that we need; peft would compute the whole vocabulary
            a, b = (
                head.lora_A["default"].weight.float(),
                head.lora_B["default"].weight[columns].float(),
            )
            logits = logits + head.scaling["default"] * F.linear(F.linear(hidden, a), b)
        return logits

    def _value(self, hidden):
        """(B, H) at the last prompt token, before any action token -> (B,) float32."""
        x, head = hidden.float(), self.value_head
        return head["head_l3"](F.gelu(head["head_l2"](F.gelu(head["head_l1"](x))))).squeeze(-1)

    def forward(self, pixel_values, input_ids, attention_mask, action_tokens):
        """Teacher-forced logits (B, 7, 256) and value (B,): token i is predicted from the position of token i - 1."""
        x = self._prefix(pixel_values, input_ids)
        mask, positions = self._layout(attention_mask, x.shape[1] - input_ids.shape[1])
        x = torch.cat([x, self.language_model.model.embed_tokens(action_tokens[:, :6])], 1)
        hidden = self._llama(x, mask, positions)[:, -7:]
        return self._logits(hidden), self._value(
            hidden[:, 0].detach() if self.detach_value else hidden[:, 0]
        )

    def action_logits(self, pixel_values, input_ids, attention_mask, action_tokens):
        """Teacher-forced logits (B, 7, 256) float32 of the action tokens, in the order of their ids."""
        return self(pixel_values, input_ids, attention_mask, action_tokens)[0]

    def probe(self):
        """Logits of 8 fixed inputs: two policies that agree on them are the same."""
        draw = partial(torch.randint, generator=torch.Generator().manual_seed(0))
        rgb = draw(256, (8, self.image_size, self.image_size, 3), dtype=torch.uint8)
        tokens = draw(self.action_begin, self.action_end, (8, 7)).to(self.device)
        prompt = torch.tensor([[1, 3, 5]] * 8, device=self.device)  # any ids do
        return self.action_logits(self.preprocess(rgb), prompt, torch.ones_like(prompt), tokens)

    @torch.no_grad()
    def decode(self, pixel_values, input_ids, attention_mask, temperature=0.0):
        """-> tokens (B, 7), logprob (B,), value (B,). Prefill once, then one position per token; 0 is argmax."""
        x = self._prefix(pixel_values, input_ids)
        mask, positions = self._layout(attention_mask, x.shape[1] - input_ids.shape[1])
        cache = KVCache(self.language_model.config, len(x), positions.shape[1], x)
        tokens, logprob, value = [], 0.0, None
        for i in range(7):
            rows = slice(cache.start, cache.start + x.shape[1])
            hidden = self._llama(x, mask[:, :, rows], positions[:, rows], cache)[:, -1]
            cache.start = rows.stop
            value = self._value(hidden) if i == 0 else value
            logits = self._logits(hidden)  # (B, 256)
            if temperature == 0:
                index = logits.argmax(-1, keepdim=True)
            else:
                index = torch.multinomial(torch.softmax(logits / temperature, -1), 1)
            logprob = logprob + logits.log_softmax(-1).gather(-1, index).squeeze(-1)
            tokens.append(index + self.action_begin)
            x = self.language_model.model.embed_tokens(tokens[-1])  # (B, 1, H)
        return torch.cat(tokens, 1), logprob, value

    # -------------------------------------------------------------------- actions
    def use_norm_stats(self, key):
        """Choose the data set whose percentiles scale the actions."""
        self.unnorm_key, action = key, self.config["norm_stats"][key]["action"]
        self._q01, self._q99 = (
            torch.tensor(action[name], dtype=torch.float64) for name in ("q01", "q99")
        )
        self._scaled = torch.tensor(action["mask"])  # False: the gripper, which stays as decoded
        self._edges = torch.linspace(-1, 1, self.config["n_action_bins"], dtype=torch.float64)
        self._centers = (self._edges[1:] + self._edges[:-1]) / 2  # one fewer than there are tokens

    def env_action(self, tokens):
        """(B, 7) ids -> (B, 7) float64: metres and radians by the 1st/99th percentile of the data, gripper -1/+1."""
        unit = self._centers[(self.action_end - 1 - tokens.cpu()).clamp(0, len(self._centers) - 1)]
        action = torch.where(
            self._scaled, 0.5 * (unit + 1) * (self._q99 - self._q01) + self._q01, unit
        )
        is_open = (
            action[:, 6] > 0.5 * (self._q01 + self._q99)[6]
        )  # midway: the data's gripper is 0..1, or -1..1
        action[:, 6] = torch.where(is_open, 1.0, -1.0)
        return action.to(tokens.device)

    def bin_tokens(self, unit):
        """(B, 7) in [-1, 1] -> (B, 7) ids."""
        unit = unit.double().cpu().clamp(-1, 1)
        return (self.action_end - torch.bucketize(unit, self._edges, right=True)).to(self.device)

    def to_unit(self, actions):
        """(..., 7) env units -> (..., 7) float64 on the scale of the bins, [-1, 1]."""
        actions = actions.double().cpu()
        unit = 2 * (actions - self._q01) / (self._q99 - self._q01 + 1e-8) - 1
        return torch.where(self._scaled, unit, torch.where(actions > 0, self._q99, self._q01))

    def action_tokens(self, actions):
        """(B, 7) env units -> (B, 7) ids: the labels of behaviour cloning."""
        return self.bin_tokens(self.to_unit(actions))

    # -------------------------------------------------------------------- the interface of sft.py
    def vision_parts(self):
        """The modules whose outputs are the patch features (B, n, D): of each tower; last, as Llama gets them."""
        return [*self.vision_backbone.values(), self.projector["fc3"]]

    def word_embeddings(self):
        """(vocabulary, H)."""
        return self.language_model.model.embed_tokens.weight

    def sft_loss(self, obs, instructions, unit, prompt=None, sigma=2.0, jitter=4.0):
        """Behaviour cloning of unit (B, 1, 7) in [-1, 1] -> scalar: cross-entropy under a target that is smoothed over
        neighbouring bins (`sigma` bins).

        The model reads its own earlier tokens; in the data they are always the oracle's. `jitter` moves the ones it reads
        by a few bins, and one in ten anywhere, so that a sampled token later finds an embedding that has been trained.
        """
        tokens = self.bin_tokens(unit[:, 0])
        first, last = self.action_begin, self.action_end - 1
        read = (
            tokens + (torch.randn(tokens.shape, device=self.device) * jitter).round().long()
        ).clamp(first, last)
        if jitter:
            anywhere = torch.rand(tokens.shape, device=self.device) < 0.1
            read = torch.where(anywhere, torch.randint_like(tokens, first, last + 1), read)
        logits = self.action_logits(
            self.preprocess(obs["rgb"]), *self.tokenize(instructions, prompt), read
        )  # (B, 7, 256)
        distance = (tokens - first)[..., None] - torch.arange(logits.shape[-1], device=self.device)
        target = torch.softmax(-0.5 * (distance / sigma) ** 2, -1)
        return -(target * logits.log_softmax(-1)).sum(-1).mean()

    # -------------------------------------------------------------------- the interface of ppo_pair.py
    @torch.no_grad()
    def act(self, obs, instructions, temperature=1.0):
        """rgb (B, H, W, 3) uint8 and B instructions -> Decision."""
        tokens, logprob, value = self.decode(
            self.preprocess(obs["rgb"]), *self.tokenize(instructions), temperature
        )
        return Decision(self.env_action(tokens).float()[:, None], tokens, logprob, value)

    def evaluate(self, obs, instructions, latent):
        """The same observation and action tokens (B, 7) -> Evaluation, with gradient."""
        logits, value = self(self.preprocess(obs["rgb"]), *self.tokenize(instructions), latent)
        logp = logits.log_softmax(-1)  # (B, 7, 256)
        logprob = (
            logp.gather(-1, (latent - self.action_begin)[..., None]).squeeze(-1).sum(1)
        )  # (B, 7) -> (B,)
        entropy = -(logp.exp() * logp).sum(-1).mean(1)  # (B, 7) -> (B,)
        return Evaluation(logits, logprob, entropy, value)

    def kl(self, p, q):
        """KL(p || q) of two Evaluation.dist: exact over the bins, MEAN over the 7 tokens. (B, 7, 256) x2 -> (B,)."""
        p, q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1).mean(1).clamp(min=0)  # clamp: rounding may leave -1e-8

    def groups(self, latent):
        """Which samples' KLs to log apart, {name: (B,) bool}: here none."""
        return {}


# ------------------------------------------------------------------------------------------------ pi0 and pi0.5
PI = {  # sizes and settings of the official models; a checkpoint's config.json may say otherwise
    "image_size": 224, "patch": 14, "vis_width": 1152, "vis_depth": 27, "vis_heads": 16, "vis_mlp": 4304,
    "vocab": 257152, "depth": 18, "heads": 8, "kv_heads": 1, "head_dim": 256, "rope_theta": 10000.0,
    "vlm_width": 2048, "vlm_mlp": 16384, "exp_width": 1024, "exp_mlp": 4096,
    "layer_norm_eps": 1e-6, "rms_norm_eps": 1e-6, "time_min_period": 4e-3, "time_max_period": 4.0,
    "action_dim": 32, "action_env_dim": 7, "gripper_threshold": 0.5, "discrete_state_input": False,
    "action_horizon": 8, "action_chunk": 5, "num_denoise_steps": 4, "noise_level": 0.5, "sde_steps": "one",
    "camera_aspect": 4 / 3,  # width / height of the camera whose picture the environment has squashed into a square
    "prompt": None, "stem": None,  # ours: another prompt format, and strided convs before the patch embedding
}  # fmt: skip
PI_KIND = {  # what pi0 and pi0.5 do not share
    "pi0": {"max_token_len": 48, "value_head_hidden": [512, 256, 128]},
    "pi05": {"max_token_len": 200, "value_head_hidden": [1024, 512, 256]},
}
FLOW_SETTINGS = {  # flags of ppo_pair.py, and what config.json calls them
    "horizon": "action_horizon", "replan": "action_chunk", "denoise_steps": "num_denoise_steps",
    "noise_level": "noise_level", "sde_steps": "sde_steps",
}  # fmt: skip
PI_LORA_TARGETS = [  # RLinf's: every linear layer of SigLIP and of Gemma, not the projector between them
    "q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "fc1", "fc2", "gate_proj", "up_proj", "down_proj",
]  # fmt: skip


PI05_TINY = {
    "image_size": 96, "patch": 16, "stem": [24, 48, 96], "vis_width": 128, "vis_depth": 2, "vis_heads": 4, "vis_mlp": 256,
    "vocab": 128, "depth": 3, "heads": 4, "kv_heads": 4, "head_dim": 32, "vlm_width": 128, "vlm_mlp": 256, "exp_width": 128,
    "exp_mlp": 256, "action_dim": 7, "gripper_threshold": 0.0, "camera_aspect": 1.0, "value_head_hidden": [256, 128],
    "prompt": OPENVLA_TINY["_prompt"], "_word_vocab": OPENVLA_TINY["_word_vocab"],
    "norm_stats": {"builtin": {"actions": {  # the env's step bounds: metres, radians, gripper
        "q01": [-0.06, -0.06, -0.06, -0.8, -0.8, -0.8, -1.0], "q99": [0.06, 0.06, 0.06, 0.8, 0.8, 0.8, 1.0],
    }}},
}  # fmt: skip


class Recorder(dict):
    """Stands where GemmaAttention expects a cache: keeps each layer's rotated keys and values."""

    def update(self, k, v, layer_idx):
        self[layer_idx] = k, v
        return k, v


class Prefix(NamedTuple):
    """What the VLM made of an observation, once for all denoise steps."""

    hidden: torch.Tensor  # (B, P, W) after the final norm; rows of padding mean nothing
    mask: torch.Tensor  # (B, P) bool: False is padding
    kv: Recorder  # per layer: keys and values (B, kv_heads, P, head_dim)

    def take(self, inds):
        """The rows `inds` (n,) of the batch."""
        mask = self.mask[inds.to(self.mask.device)]
        return Prefix(
            self.hidden[inds],
            mask,
            Recorder({i: (k[inds], v[inds]) for i, (k, v) in self.kv.items()}),
        )

    def update(self, k, v, layer_idx):
        """The action expert's cache: its own keys behind the VLM's. Nothing is stored, so it serves any number of steps."""
        return tuple(
            torch.cat([old.to(new.dtype), new], 2) for old, new in zip(self.kv[layer_idx], (k, v))
        )


class AdaRMSNorm(nn.Module):
    """RMS norm with scale, shift and gate from a condition: (B, n, D), (B, D) -> (B, n, D), gate (B, 1, D). Float32."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps, self.dense = eps, nn.Linear(dim, 3 * dim)
        nn.init.zeros_(self.dense.weight), nn.init.zeros_(self.dense.bias)

    def forward(self, x, cond):
        scale, shift, gate = self.dense(cond)[:, None].chunk(3, -1)
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * (1 + scale) + shift, gate


class AdaDecoderLayer(GemmaDecoderLayer):
    """A layer of pi0.5's expert: Gemma's, but its norms are conditioned and its residual branches gated."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.input_layernorm = AdaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = AdaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cond, **kwargs):
        y, gate = self.input_layernorm(x, cond)
        x = x + gate * self.self_attn(y, **kwargs)[0]
        y, gate = self.post_attention_layernorm(x, cond)
        return x + gate * self.mlp(y)


class Pi0(nn.Module):
    """The flow policy: pi0 and pi0.5 (openpi), sampled and trained by Flow-SDE (RLinf).

    t = 1 is noise, t = 0 the action. SigLIP and Gemma read images and prompt once (`prefix`); a small expert of the same
    depth reads their keys and values and gives the velocity v(x, t) of a chunk of H actions (`velocity`).
    openpi's parameter names, with RLinf's value_head; the VLM's embedding is called lm_head, as there.
    The VLM runs in the backbone's dtype; the expert (under 2 % of the arithmetic) and all that follows in float32.
    """

    gradient_checkpointing = False
    saves_config = True  # with an adapter, too: horizon, replan and the rest are part of the policy
    save = save_policy

    def __init__(self, config):
        super().__init__()
        self.config, self.name, self.commit, self.directory = (
            config,
            config["model_type"],
            None,
            None,
        )
        c = SimpleNamespace(**config)
        self.pi05 = c.model_type == "pi05"
        self.image_size, self.chunk, self.horizon = c.image_size, c.action_chunk, c.action_horizon
        self.num_steps, self.noise_level = c.num_denoise_steps, c.noise_level
        self.unnorm_key, self._affine, self._detach_value = None, {}, False
        vision = SiglipVisionConfig(
            hidden_size=c.vis_width, intermediate_size=c.vis_mlp, num_attention_heads=c.vis_heads,
            layer_norm_eps=c.layer_norm_eps, attn_implementation="sdpa",
        )  # fmt: skip

        def gemma(width, mlp):
            return GemmaConfig(
                hidden_size=width, intermediate_size=mlp, num_attention_heads=c.heads, num_key_value_heads=c.kv_heads,
                head_dim=c.head_dim, rms_norm_eps=c.rms_norm_eps, attn_implementation="sdpa",
            )  # fmt: skip

        def decoder(layer, norm, config):
            return nn.ModuleDict({
                "layers": nn.ModuleList(layer(config, i) for i in range(c.depth)),
                "norm": norm(config.hidden_size, eps=c.rms_norm_eps),
            })  # fmt: skip

        tower = nn.ModuleDict({
            "embeddings": nn.ModuleDict({
                "patch_embedding": patch_embedding(c.patch, c.vis_width, c.stem),
                "position_embedding": nn.Embedding((c.image_size // c.patch) ** 2, c.vis_width),
            }),
            "encoder": nn.ModuleDict({"layers": nn.ModuleList(SiglipEncoderLayer(vision) for _ in range(c.vis_depth))}),
            "post_layernorm": nn.LayerNorm(c.vis_width, eps=c.layer_norm_eps),
        })  # fmt: skip
        parts = {
            "vision_tower": nn.ModuleDict({"vision_model": tower}),
            "multi_modal_projector": nn.ModuleDict({"linear": nn.Linear(c.vis_width, c.vlm_width)}),
            "language_model": decoder(
                GemmaDecoderLayer, GemmaRMSNorm, gemma(c.vlm_width, c.vlm_mlp)
            ),
        }
        kinds = (AdaDecoderLayer, AdaRMSNorm) if self.pi05 else (GemmaDecoderLayer, GemmaRMSNorm)
        self.paligemma_with_expert = nn.ModuleDict({
            "paligemma": nn.ModuleDict({"model": nn.ModuleDict(parts), "lm_head": nn.Embedding(c.vocab, c.vlm_width)}),
            "gemma_expert": nn.ModuleDict({"model": decoder(*kinds, gemma(c.exp_width, c.exp_mlp))}),
        })  # fmt: skip
        self.action_in_proj = nn.Linear(c.action_dim, c.exp_width)
        self.action_out_proj = nn.Linear(c.exp_width, c.action_dim)
        if self.pi05:
            self.time_mlp_in = nn.Linear(c.exp_width, c.exp_width)
            self.time_mlp_out = nn.Linear(c.exp_width, c.exp_width)
        else:
            self.state_proj = nn.Linear(c.action_dim, c.exp_width)
            self.action_time_mlp_in = nn.Linear(2 * c.exp_width, c.exp_width)
            self.action_time_mlp_out = nn.Linear(c.exp_width, c.exp_width)
        sizes = [c.vlm_width if self.pi05 else c.exp_width, *c.value_head_hidden, 1]
        layers = [m for i, o in zip(sizes, sizes[1:]) for m in (nn.Linear(i, o), nn.ReLU())][:-1]
        self.value_head = nn.ModuleDict({"mlp": nn.Sequential(*layers)})
        self.tokenizer, self.tokenizer_file, self._prompt_ids, self.lora_config = (
            None,
            None,
            {},
            None,
        )
        self.detach_value = False

    @property
    def detach_value(self):
        """True: the critic reads the trunk but does not train it."""
        return self._detach_value

    @detach_value.setter
    def detach_value(self, detach):
        """Of the VLM's last layer the actions read keys and values alone; the rest learns through pi0.5's critic or not."""
        self._detach_value, idle = detach, detach or not self.pi05
        last = f"language_model.layers.{self.config['depth'] - 1}."
        last = [
            last + part
            for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp", "post_attention_layernorm")
        ]
        for key, p in self.named_parameters():
            if any(part in key for part in (*last, "language_model.norm.")):
                p.requires_grad_(not idle and (self.lora_config is None or ".lora_" in key))

    @staticmethod
    def rename(key):
        """The name here of a checkpoint's tensor: lerobot puts "model." in front; the tied embedding has two names."""
        return key.removeprefix("model.").replace(
            ".model.language_model.embed_tokens.", ".lm_head."
        )

    def is_dead(self, key):
        """Tensors that are in the files but in no computation: the expert's lm_head, and Flow-Noise's head."""
        return key.startswith(("paligemma_with_expert.gemma_expert.lm_head.", "noise_head."))

    def keeps_float32(self, key):
        """All but the VLM's matrices (RLinf keeps Gemma's norms and the projections in float32, too)."""
        return ".paligemma." not in key or "layernorm" in key or "language_model.norm" in key

    def in_adapter(self, key):
        """What training changes where there are adapters: those, and the whole action expert."""
        return ".lora_" in key or not (".paligemma." in key or key.startswith("value_head."))

    def init_from_scratch(self):
        """What pretraining has done for the official models: the image reaches the actions (see OpenVLA's)."""
        keep_variance(self.modules())
        for module in self.modules():
            if isinstance(module, AdaRMSNorm):  # starts as a plain norm with an open gate
                nn.init.zeros_(module.dense.weight)
                module.dense.bias.data[-module.dense.in_features :] = 1.0
        paligemma = self.paligemma_with_expert["paligemma"]
        nn.init.normal_(paligemma["lm_head"].weight, std=self.config["vlm_width"] ** -0.5)
        position = paligemma["model"]["vision_tower"]["vision_model"]["embeddings"][
            "position_embedding"
        ].weight
        position.data = grid_waves(*position.shape)
        for layer in paligemma["model"]["language_model"]["layers"]:  # attention starts by content
            layer.self_attn.k_proj.weight.data.copy_(layer.self_attn.q_proj.weight)

    def init_value_head(self):
        """As RLinf: Kaiming-normal (fan out), the last layer N(0, 0.02), zero biases."""
        *hidden, last = [m for m in self.value_head["mlp"] if isinstance(m, nn.Linear)]
        for layer in hidden:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(last.weight, std=0.02)
        for layer in [*hidden, last]:
            nn.init.zeros_(layer.bias)

    def add_lora(self, rank=32, alpha=None, targets=None, lora_config=None):
        """fp32 adapters on every linear layer of the VLM; they, the action expert and the value head train."""
        self.lora_config = lora_config or LoraConfig(
            r=rank, lora_alpha=alpha or rank, target_modules=list(targets or PI_LORA_TARGETS),
            exclude_modules=r".*\bgemma_expert\..*", init_lora_weights="gaussian",
        )  # fmt: skip
        self.lora_config.modules_to_save = None  # PEFT would train copies of them
        inject_lora(self, self.lora_config)
        parts = {
            key.removeprefix("paligemma_with_expert.").split(".")[0]
            for key in self.state_dict()
            if self.in_adapter(key)
        }
        self.lora_config.modules_to_save = sorted(parts - {"paligemma"})
        for key, p in self.named_parameters():
            p.requires_grad_(self.in_adapter(key) or key.startswith("value_head."))
        self.detach_value = self.detach_value  # freezes what is idle

    # -------------------------------------------------------------------- the model
    @property
    def device(self):
        return self.action_in_proj.weight.device

    @property
    def dtype(self):
        return self.paligemma_with_expert["paligemma"]["lm_head"].weight.dtype

    @property
    def reads_state(self):
        """Not pi0.5, unless its prompt spells the state out: RLinf's ManiSkill checkpoints see the image alone."""
        return not self.pi05 or self.config["discrete_state_input"]

    def _rotary(self, positions, like):
        """positions (B, n) -> cos, sin (B, n, head_dim) like `like`, computed in float32."""
        d = self.config["head_dim"]
        freq = self.config["rope_theta"] ** (-torch.arange(0, d, 2, device=positions.device) / d)
        angle = (positions[..., None] * freq).repeat(1, 1, 2)
        return angle.cos().to(like), angle.sin().to(like)

    def _see(self, images):
        """(n, 3, S, S) in [-1, 1] -> (n, patches, W): SigLIP and the projector."""
        model = self.paligemma_with_expert["paligemma"]["model"]
        tower = model["vision_tower"]["vision_model"]
        position = tower["embeddings"]["position_embedding"].weight
        x = (
            tower["embeddings"]["patch_embedding"](images.to(position.dtype))
            .flatten(2)
            .transpose(1, 2)
            + position
        )
        for layer in tower["encoder"]["layers"]:
            x = run(layer, x, self.gradient_checkpointing, attention_mask=None)
        return model["multi_modal_projector"]["linear"](tower["post_layernorm"](x))

    def prefix(self, images, image_masks, tokens, token_mask):
        """What the actions are conditioned on. images (B, C, 3, S, S) in [-1, 1] of C cameras, image_masks (B, C) bool,
        tokens (B, L) ids, token_mask (B, L) bool -> Prefix of [camera 0 | camera 1 ... | prompt].

        Cameras that are not there and padding beyond the longest prompt are not computed at all: nothing attends to
        them (openpi computes all three cameras and all 200 tokens, 3.3 times the arithmetic). Masks may be on the CPU,
        where looking for holes in them does not wait for a GPU.
        """
        images, there = images[:, image_masks.any(0)], image_masks[:, image_masks.any(0)]
        tokens, token_mask = tokens[:, token_mask.any(0)], token_mask[:, token_mask.any(0)]
        paligemma = self.paligemma_with_expert["paligemma"]
        seen = self._see(images[there])  # (n, T, W)
        vision = seen.new_zeros(*there.shape, *seen.shape[1:])  # (B, C, T, W)
        vision[there] = seen
        x = torch.cat(
            [vision.flatten(1, 2), paligemma["lm_head"](tokens) * self.config["vlm_width"] ** 0.5],
            1,
        )
        mask = torch.cat([there.repeat_interleave(seen.shape[1], 1), token_mask], 1)  # (B, P)
        rotary = self._rotary(mask.cumsum(1) - 1, x)  # padding does not count
        kv, visible = Recorder(), mask[:, None, None].to(x.device)  # everything sees everything
        for layer in paligemma["model"]["language_model"]["layers"]:
            kwargs = {
                "attention_mask": visible,
                "position_embeddings": rotary,
                "past_key_values": kv,
            }
            x = run(layer, x, self.gradient_checkpointing, **kwargs)
        return Prefix(paligemma["model"]["language_model"]["norm"](x), mask, kv)

    def _time_embedding(self, t):
        """(B,) -> (B, W) sines and cosines. In float64: the fastest has a frequency of 1571, and float32 is 3e-4 off in v."""
        low, high = self.config["time_min_period"], self.config["time_max_period"]
        fraction = torch.linspace(
            0, 1, self.config["exp_width"] // 2, dtype=torch.float64, device=t.device
        )
        angle = 2 * math.pi * t.double()[:, None] / (low * (high / low) ** fraction)
        return torch.cat([angle.sin(), angle.cos()], 1).float()

    def _expert(self, prefix, state, x, t):
        """The expert's last hidden states (B, H, W) of the H actions x (B, H, D) at time t: a number, or (B,)."""
        t = torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(len(x))
        time, h = self._time_embedding(t), self.action_in_proj(x)  # (B, W), (B, H, W)
        if self.pi05:
            condition = {"cond": F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(time))))}
        else:
            h = self.action_time_mlp_in(torch.cat([h, time[:, None].expand_as(h)], -1))
            h = torch.cat([self.state_proj(state)[:, None], self.action_time_mlp_out(F.silu(h))], 1)
            condition = {}
        own = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool, device=prefix.mask.device)
        if not self.pi05:
            own[0, 1:] = False  # the state sees the prefix and itself; the actions see all
        visible = prefix.mask[:, None].expand(-1, len(own), -1)
        visible = torch.cat([visible, own.expand(len(h), -1, -1)], 2)[:, None].to(
            h.device
        )  # (B, 1, n, P + n)
        positions = prefix.mask.sum(1, keepdim=True) + torch.arange(len(own), device=own.device)
        kwargs = {
            "attention_mask": visible,
            "position_embeddings": self._rotary(positions, h),
            "past_key_values": prefix,
        }
        expert = self.paligemma_with_expert["gemma_expert"]["model"]
        for layer in expert["layers"]:
            h = layer(h, **condition, **kwargs)
        h = expert["norm"](h, *condition.values())
        return (h[0] if self.pi05 else h)[:, -self.horizon :]  # no gate after the last norm

    def velocity(self, prefix, state, x, t):
        """v(x, t) (B, H, D) float32. state (B, D) normalised, read by pi0 only; x (B, H, D); t a number or (B,)."""
        return self.action_out_proj(self._expert(prefix, state, x, t))

    def probe(self):
        """Velocities at 8 fixed inputs: two policies that agree on them are the same."""
        generator, size, (h, d) = (
            torch.Generator().manual_seed(0),
            self.image_size,
            (self.horizon, self.config["action_dim"]),
        )
        images, state, x = (
            torch.randn(8, *shape, generator=generator)
            for shape in ((1, 3, size, size), (d,), (h, d))
        )
        tokens = torch.tensor([[2, 3, 5]] * 8, device=self.device)  # any ids do
        images, state, x = (
            images.clamp(-1, 1).to(self.device),
            state.to(self.device),
            x.to(self.device),
        )
        there = torch.ones(8, 1, dtype=torch.bool, device=self.device)
        return self.velocity(
            self.prefix(images, there, tokens, tokens > 0), state, x, torch.linspace(0.1, 1, 8)
        )

    def _value(self, features):
        """(B, W) float32 -> (B,)."""
        return self.value_head["mlp"](features.detach() if self.detach_value else features).squeeze(
            -1
        )

    def prefix_value(self, prefix):
        """pi0.5's critic, (B,): it reads the mean over the prefix without its padding."""
        weight = prefix.mask[..., None].to(prefix.hidden.device, torch.float32)
        return self._value((prefix.hidden.float() * weight).sum(1) / weight.sum(1))

    def flow_loss(self, prefix, state, actions, noise, t):
        """Flow matching's squared error (B, H, D), padded dimensions included (openpi): v(x_t, t) should be noise - actions.

        actions, noise (B, H, D) normalised, t (B,): x_t = t noise + (1 - t) actions.
        """
        x = t[:, None, None] * noise + (1 - t[:, None, None]) * actions
        return (self.velocity(prefix, state, x, t) - (noise - actions)) ** 2

    # -------------------------------------------------------------------- Flow-SDE
    def transition(self, x, v, k, num_steps):
        """Mean and std, both of the shape of x (B, H, D), of x_{k+1} given x_k = x and the velocity there.

        k: the denoise step, 0 ... num_steps - 1, a number or (B,). Time falls from t_0 = 1 to t_N = 0. The drift that is
        added to the ODE's balances the noise, so that the marginals stay (pi_RL, Flow-SDE; RLinf's schedule):
            mean = x - v/N - sigma^2/(2 t N) (x + (1 - t) v),  std = sigma / sqrt(N),  sigma^2 = a^2 t / (1 - t),
        with 1 - t_1 for 1 - t in sigma at k = 0, where it would be infinite.
        """
        k = torch.as_tensor(k, device=x.device).expand(len(x))[:, None, None]
        t = 1 - k / num_steps
        sigma2 = self.noise_level**2 * t * num_steps / k.clamp(min=1)
        mean = x - v / num_steps - sigma2 / (2 * t * num_steps) * (x + (1 - t) * v)
        return mean, (sigma2 / num_steps).sqrt().expand_as(x)

    def ode(self, prefix, state, noise, num_steps):
        """x_1 = noise (B, H, D) -> actions (B, H, D), normalised: Euler steps of the flow, no noise on the way."""
        x, t = noise, torch.tensor(1.0)
        for _ in range(num_steps):
            x = x - self.velocity(prefix, state, x, t) / num_steps
            t = t - 1 / num_steps  # in float32, as openpi counts: the time embedding notices 1e-7
        return x

    def sde(self, prefix, state, noise, stochastic):
        """The chain x_0 ... x_N (B, N + 1, H, D). stochastic (B, N) bool: which steps are drawn; the others are ODE."""
        chain = [noise]
        for k in range(self.num_steps):
            v = self.velocity(prefix, state, chain[-1], 1 - k / self.num_steps)
            mean, std = self.transition(chain[-1], v, k, self.num_steps)
            drawn = mean + std * torch.randn_like(mean)
            chain.append(
                torch.where(stochastic[:, k, None, None], drawn, chain[-1] - v / self.num_steps)
            )
        return torch.stack(chain, 1)

    def distribution(self, prefix, state, latent):
        """The one place where rollout, update and both views get the distribution from -> dist, value (B,).

        latent (B, m + 2, H, D): x_k ... x_{k+m}, and a plane that holds k; m is 1, or all N denoise steps.
        dist (B, 2, m, chunk, 7): mean and std of each transition, on what the environment executes; normalised units.
        """
        k, chunk, dims = latent[:, -1, 0, 0].long(), self.chunk, self.config["action_env_dim"]
        means, stds, values = [], [], []
        for i in range(latent.shape[1] - 2):
            hidden = self._expert(prefix, state, latent[:, i], 1 - (k + i) / self.num_steps)
            mean, std = self.transition(
                latent[:, i], self.action_out_proj(hidden), k + i, self.num_steps
            )
            means.append(mean[:, :chunk, :dims])
            stds.append(std[:, :chunk, :dims])
            # DEVIATION: pi0's V at the stochastic step, also in the rollout, where RLinf takes the mean over all steps.
            values.append(None if self.pi05 else self._value(hidden.mean(1)))
        value = self.prefix_value(prefix) if self.pi05 else torch.stack(values).mean(0)
        return torch.stack([torch.stack(means, 1), torch.stack(stds, 1)], 1), value

    # -------------------------------------------------------------------- inputs and actions
    def preprocess(self, images_uint8):
        """(B, H, W, 3) uint8 -> (B, 3, S, S) float32 in [-1, 1]: the aspect ratio is kept, black fills the rest (openpi).

        A square picture is one that was squashed: it gets the camera's aspect ratio back.
        """
        x, size = grey_levels(images_uint8, self.device), self.image_size
        height, width = x.shape[-2:]
        if height == width:
            height = width / self.config["camera_aspect"]
        scale = max(height, width) / size
        height, width = int(height / scale), int(width / scale)
        if x.shape[-2:] != (size, size) or height != width:
            x = (
                F.interpolate(x, (height, width), mode="bilinear", antialias=True)
                .clamp(0, 255)
                .round()
            )
            top, left = (size - height) // 2, (size - width) // 2
            x = F.pad(x, (left, size - width - left, top, size - height - top))
        return x / 127.5 - 1

    def prompt_pieces(self, instruction, state=None):
        """What the tokenizer is given, piece by piece; BOS goes before the first. state (S,) normalised: see `tokenize`."""
        if self.config["prompt"]:
            return [self.config["prompt"].format(instruction=instruction)]
        text = instruction.strip().replace("_", " ").replace("\n", " ")
        if state is None:
            return [text, "\n"]
        edges = torch.linspace(-1, 1, 257, dtype=torch.float64)[:-1]
        bins = (
            torch.bucketize(state.double().cpu(), edges, right=True) - 1
        )  # 0 ... 255, and -1 below the range
        return [f"Task: {text}, State: {' '.join(map(str, bins.tolist()))};\nAction: "]

    def tokenize(self, instructions, prompt=None, state=None):
        """List of B str -> tokens (B, L), token_mask (B, L) bool, padded on the right.

        state (B, S) normalised: pi0.5 with discrete_state_input reads it in its prompt, in 256 bins. prompt: another
        format than the checkpoint's, with {instruction} in it.
        """
        if self.tokenizer is None:
            raise PolicyError(
                f"{self.name} has no tokenizer.json, so it cannot read instructions: put PaliGemma's there (from "
                "google/paligemma-3b-pt-224, whose licence has to be accepted first), or name it with --tokenizer FILE."
            )
        rows = []
        for i, instruction in enumerate(instructions):
            pieces = [prompt.format(instruction=instruction)] if prompt else None
            pieces = pieces or self.prompt_pieces(instruction, None if state is None else state[i])
            key = tuple(pieces)
            if key not in self._prompt_ids:
                ids = self.tokenizer(pieces[0]) + [
                    i for piece in pieces[1:] for i in self.tokenizer(piece)[1:]
                ]
                if len(ids) > self.config["max_token_len"]:
                    raise PolicyError(
                        f"the prompt {pieces} has {len(ids)} tokens, more than {self.config['max_token_len']}."
                    )
                self._prompt_ids[key] = ids
            rows.append(self._prompt_ids[key])
        length = max(map(len, rows))
        tokens = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=self.device)
        return tokens, torch.tensor(
            [[True] * len(row) + [False] * (length - len(row)) for row in rows]
        )

    def use_norm_stats(self, key):
        """Choose the data set whose statistics scale states and actions: by mean and std for pi0, quantiles for pi0.5."""
        self.unnorm_key, self._affine = key, {}
        for name in ("actions", "state") if self.reads_state else ("actions",):
            stats = self.config["norm_stats"][key][name]
            low, high = ("q01", "q99") if self.pi05 else ("mean", "std")
            if not stats.get(low) or not stats.get(high):
                raise PolicyError(
                    f"norm_stats.json of {self.name} has no {low} and {high} of {name}, which it scales by."
                )
            low, high = (torch.tensor(stats[n], dtype=torch.float64) for n in (low, high))
            if name == "actions":
                low, high = (t[: self.config["action_env_dim"]] for t in (low, high))
            spread = high - low if self.pi05 else high
            if (spread <= 0).any():
                raise PolicyError(
                    f"norm_stats.json of {self.name}: dimension {int((spread <= 0).nonzero()[0])} of {name} has no spread "
                    f"({'q99 - q01' if self.pi05 else 'std'} is 0), so it cannot be scaled; widen it there."
                )
            scale = (spread + 1e-6) / 2 if self.pi05 else spread + 1e-6
            self._affine[name] = (low + scale if self.pi05 else low, scale)

    def _stats(self, name, dims):
        """Centre and scale (dims,) float64 of `name`."""
        if not self._affine:
            raise PolicyError(
                f"{self.name} has no norm_stats.json, so it cannot scale actions; put its data set's there."
            )
        center, scale = self._affine[name]
        if len(center) < dims:
            raise PolicyError(
                f"norm_stats.json of {self.name} knows {len(center)} dimensions of {name}, not {dims}."
            )
        return center[:dims], scale[:dims]

    def normalize(self, name, x):
        """("state" or "actions", (..., n) in its units) -> (..., D) float64: scaled, then zeros up to the model's width."""
        center, scale = self._stats(name, x.shape[-1])
        return F.pad(
            (x.double().cpu() - center) / scale, (0, self.config["action_dim"] - x.shape[-1])
        )

    def unnormalize(self, x):
        """Actions of the model (..., D) -> (..., 7) float64 in the units of the data."""
        center, scale = self._stats("actions", self.config["action_env_dim"])
        return x[..., : len(center)].double().cpu() * scale + center

    def to_unit(self, actions):
        """(..., 7) env units -> (..., 7) float64 on the model's scale."""
        return self.normalize("actions", actions)[..., : actions.shape[-1]]

    def env_action(self, x):
        """Actions of the model (B, H, D) -> the chunk to execute (B, chunk, 7) float32: metres, radians, gripper -1/+1."""
        actions = self.unnormalize(x[:, : self.chunk])
        actions[..., 6] = torch.where(actions[..., 6] > self.config["gripper_threshold"], 1.0, -1.0)
        return actions.float().to(x.device)

    # -------------------------------------------------------------------- the interface of sft.py
    def vision_parts(self):
        """The modules whose outputs are the patch features (B, n, D): of the tower; as Gemma gets them."""
        model = self.paligemma_with_expert["paligemma"]["model"]
        return [
            model["vision_tower"]["vision_model"]["post_layernorm"],
            model["multi_modal_projector"]["linear"],
        ]

    def word_embeddings(self):
        """(vocabulary, W)."""
        return self.paligemma_with_expert["paligemma"]["lm_head"].weight

    def sft_loss(self, obs, instructions, unit, prompt=None, draws=4, **of_tokens):
        """Flow matching (openpi) of unit (B, H, 7) -> scalar. A chunk shorter than H is filled up with its last row.

        t = 0.999 Beta(1.5, 1) + 0.001: more often near noise. `draws` noises per observation share its prefix, which is
        nearly all of the work. of_tokens: what only a token policy needs.
        """
        prefix, state = self._observe(obs, instructions, prompt)
        unit = torch.cat([unit, unit[:, -1:].expand(-1, self.horizon - unit.shape[1], -1)], 1)
        actions = (
            F.pad(unit, (0, self.config["action_dim"] - unit.shape[-1])).float().to(self.device)
        )
        inds = torch.arange(len(actions), device=self.device).repeat(draws)
        noise = torch.randn(len(inds), *actions.shape[1:], device=self.device)
        t = 0.999 * torch.distributions.Beta(1.5, 1.0).sample((len(inds),)).to(self.device) + 0.001
        return self.flow_loss(
            prefix.take(inds), None if state is None else state[inds], actions[inds], noise, t
        ).mean()

    # -------------------------------------------------------------------- the interface of ppo_pair.py
    def _observe(self, obs, instructions, prompt=None):
        """-> Prefix, state (B, D) or None."""
        state = (
            self.normalize("state", obs["state"]).float().to(self.device)
            if self.reads_state
            else None
        )
        in_prompt = (
            state[:, : obs["state"].shape[1]] if self.config["discrete_state_input"] else None
        )
        images = self.preprocess(obs["rgb"])[:, None]  # one camera
        there = torch.ones(len(images), 1, dtype=torch.bool)
        return self.prefix(images, there, *self.tokenize(instructions, prompt, in_prompt)), state

    @torch.no_grad()
    def act(self, obs, instructions, temperature=None):
        """rgb (B, H, W, 3) uint8, state (B, S), B instructions -> Decision of a chunk of actions.

        To train (no temperature): Flow-SDE; one random step k of each sample is stochastic, or all of them. To evaluate:
        the ODE from Gaussian noise, from none at temperature 0; it has no log-prob.
        """
        prefix, state = self._observe(obs, instructions)
        b, n = len(prefix.mask), self.num_steps
        noise = torch.randn(b, self.horizon, self.config["action_dim"], device=self.device)
        if temperature is not None:
            x = self.ode(prefix, state, noise * (temperature > 0), n)
            return Decision(self.env_action(x), None, None, None)
        # DEVIATION: each sample draws its own step; RLinf draws one per batch, so that an update sees few of them.
        m = n if self.config["sde_steps"] == "all" else 1
        k = torch.randint(n - m + 1, (b, 1), device=self.device)
        visited = k + torch.arange(m + 1, device=self.device)  # (B, m + 1) places in the chain
        stochastic = torch.zeros(b, n + 1, dtype=torch.bool, device=self.device).scatter(
            1, visited[:, :-1], True
        )[:, :n]
        chain = self.sde(prefix, state, noise, stochastic)
        plane = k[..., None, None].expand_as(chain[:, :1]).float()
        latent = torch.cat([chain[torch.arange(b, device=self.device)[:, None], visited], plane], 1)
        dist, value = self.distribution(prefix, state, latent)
        return Decision(self.env_action(chain[:, -1]), latent, self.logprob(dist, latent), value)

    def logprob(self, dist, latent):
        """Log density (B,) float32 of the transitions in `latent`, SUMMED over them, executed steps and 7 dimensions."""
        after = latent[:, 1:-1, : self.chunk, : self.config["action_env_dim"]]
        mean, std = dist.unbind(1)
        return (-0.5 * ((after - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)).sum(
            (1, 2, 3)
        )

    def evaluate(self, obs, instructions, latent):
        """The same observation, or another view of it, and latent -> Evaluation, with gradient."""
        dist, value = self.distribution(*self._observe(obs, instructions), latent)
        entropy = (dist[:, 1].log() + 0.5 * math.log(2 * math.pi * math.e)).mean(
            (1, 2, 3)
        )  # fixed by the schedule
        return Evaluation(dist, self.logprob(dist, latent), entropy, value)

    def kl(self, p, q):
        """KL(p || q) of two Evaluation.dist at the same latent, MEAN over transitions, executed steps, dimensions -> (B,).

        Both have the same std, so it is (mean - mean')^2 / (2 std^2) per element.
        """  # OPEN: a mean, as for tokens; summed over 35 elements it would be at the paper's clip 0.08 almost always
        return (((p[:, 0] - q[:, 0]) / p[:, 1]) ** 2 / 2).mean((1, 2, 3))

    def groups(self, latent):
        """Which samples (B,) bool to log apart: by denoise step. A KL weighs a change of velocity 15 times more at the last."""
        if self.config["sde_steps"] == "all":
            return {}
        return {f"k{k}": latent[:, -1, 0, 0] == k for k in range(self.num_steps)}


# ------------------------------------------------------------------------------------------------ loading
class WordTokenizer:
    """One id per word of the tiny vocabulary; a prompt ends in <out> as Llama's ends in token 29871."""

    def __init__(self, words):
        self.ids = {word: i for i, word in enumerate(words)}

    def __call__(self, text):
        words = re.findall(r"<out>|\w+", text.lower().replace("out:", "<out>"))
        for word in words:
            if word not in self.ids:
                raise PolicyError(
                    f"the word {word!r} is not in this policy's vocabulary (_word_vocab in config.json)."
                )
        return [self.ids[word] for word in ["<s>", *words]]


class LlamaTokenizer:
    """tokenizer.json, read as data."""

    def __init__(self, file):
        self.tokenizer = Tokenizer.from_file(str(file))

    def __call__(self, text):
        ids = self.tokenizer.encode(text).ids
        if ids[0] != 1 or (text.endswith("Out: ") and ids[-1] != 29871):
            raise PolicyError(
                f"tokenizer.json is not Llama-2's: a prompt became {ids}, not BOS 1 ... 29871."
            )
        return ids


class PaliGemmaTokenizer:
    """tokenizer.json, read as data; BOS (2) goes before the text."""

    def __init__(self, file):
        self.tokenizer = Tokenizer.from_file(str(file))
        if self("\n") != [2, 108]:
            raise PolicyError(
                f"{file} is not PaliGemma's tokenizer: a line feed becomes {self(chr(10))}, not BOS 2 and 108."
            )

    def __call__(self, text):
        return [2, *self.tokenizer.encode(text, add_special_tokens=False).ids]


def download(repo, revision, patterns):
    """Those files of a Hub repository, from the cache or the network -> their directory, named after the commit."""
    try:
        offline = (
            constants.HF_HUB_OFFLINE
        )  # without the hint, a commit of an older cache is looked up on the network
        return Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=patterns, local_files_only=offline
            )
        )
    except RepositoryNotFoundError:
        reason = "the Hub has no such repository, or it is private (`hf auth login`)"
    except LocalEntryNotFoundError:
        reason = (
            "it is not in the cache, and the Hub is out of reach (no network, or HF_HUB_OFFLINE=1)"
        )
    except Exception as error:  # a full disk, a wrong revision, ...: of the Hub's client, httpx, or the operating system
        reason = " ".join(str(error).split())[:200]
    raise PolicyError(f"{repo} is neither a directory here nor to be had from the Hub: {reason}.")


def find_checkpoint(name, hub):
    """A directory, or (hub=True) OWNER/NAME[@REVISION] on the Hub -> directory, its lasting name, commit (None: local).

    Of a Hub repository all but a full model's weights are there afterwards, so that mistakes show before gigabytes.
    """
    if Path(name).is_dir():
        return Path(name), str(Path(name).resolve()), None
    repo, _, revision = str(name).partition("@")
    if not hub or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", repo):
        raise PolicyError(f"there is no checkpoint directory {name}.")
    directory = download(
        repo, revision or None, ["*.json", "adapter_model*", "value_head*", "training_state.pt"]
    )
    return directory, repo, directory.name


def read_json(file):
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise PolicyError(f"{file} cannot be read ({error}).") from None


def open_tensors(directory, stem):
    """The tensors of STEM.safetensors, or of the shards in its index: {key: slice}. Reads headers; slice[:] reads data."""
    index = directory / f"{stem}.safetensors.index.json"
    names = (
        sorted(set(read_json(index)["weight_map"].values()))
        if index.is_file()
        else [f"{stem}.safetensors"]
    )
    found = {}
    for name in names:
        try:
            file = safe_open(directory / name, "pt")  # checks the file's length against its header
        except (OSError, SafetensorError) as error:
            raise PolicyError(
                f"{directory / name} is missing, truncated or no safetensors file ({error})."
            ) from None
        found |= {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
    return found


def check_tensors(found, wanted, where):
    """Strict: shapes in the files {key: [...]} and tensors of the model {key: tensor} must agree. Names the first offender."""
    for key in sorted(found.keys() | wanted.keys()):
        if key not in found:
            raise PolicyError(
                f"{where} lacks the tensor {key}; is it a checkpoint of another model?"
            )
        if key not in wanted:
            raise PolicyError(
                f"{where} has the tensor {key}, which this model has not; is it of another model?"
            )
        if list(found[key]) != list(wanted[key].shape):
            raise PolicyError(
                f"{where}: {key} has the shape {list(found[key])}, not {list(wanted[key].shape)}."
            )


def load_policy(backbone, checkpoint=None, *, base=None, dtype=None, device="cpu", unnorm_key=None, lora_rank=0,
                lora_alpha=None, lora_targets=None, gradient_checkpointing=False, tokenizer=None, **settings):  # fmt: skip
    """A policy ready to act.

    checkpoint: a directory (full model, or a PEFT adapter), or a Hub repository OWNER/NAME[@REVISION]; None is a tiny
    backbone with fresh random weights, or the big one's default checkpoint. base: where an adapter's base model is, if
    not where it says. dtype: of the backbone; None is bfloat16 on a GPU, float32 on a CPU and for a tiny one.
    lora_rank, lora_alpha (None: the rank), lora_targets (None: every linear layer): fresh adapters on a full model; an
    adapter brings its own, and a contradiction is an error. tokenizer: a tokenizer.json, if not the checkpoint's.
    settings: those of FLOW_SETTINGS; None leaves the checkpoint's.
    """
    dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype
    if backbone not in BACKBONES:
        raise PolicyError(f"unknown backbone {backbone!r}; choose one of {', '.join(BACKBONES)}.")
    tiny, model = backbone.endswith("-tiny"), OpenVLA if backbone.startswith("openvla") else Pi0
    settings = {name: value for name, value in settings.items() if value is not None}
    for name in settings:
        if name not in FLOW_SETTINGS or model is OpenVLA:
            raise PolicyError(
                f"--{name.replace('_', '-')} is no setting of the backbone {backbone}; leave it out."
            )
    if checkpoint is None and backbone in DEFAULT_CHECKPOINT:
        checkpoint = DEFAULT_CHECKPOINT[backbone]
    directory, name, commit = (
        find_checkpoint(checkpoint, hub=not tiny) if checkpoint else (None, backbone, None)
    )
    adapter = None
    if directory and (directory / "SHA256SUMS").is_file():
        verify(directory)
    if directory and (directory / "adapter_config.json").is_file():
        adapter, peft_config = directory, read_json(directory / "adapter_config.json")
        if not base and not peft_config.get("base_model_name_or_path"):
            raise PolicyError(
                f"{adapter} is an adapter that does not name its base model; pass base=DIRECTORY."
            )
        base = base or "@".join(
            filter(None, [peft_config["base_model_name_or_path"], peft_config.get("revision")])
        )
        directory, name, commit = find_checkpoint(base, hub=not tiny)
    if directory is None and lora_rank:
        raise PolicyError(
            "LoRA needs a checkpoint to adapt; random weights would not be saved with the adapter."
        )

    if commit and model is Pi0:  # only the names of its tensors say what it is
        download(name, commit, ["model*.safetensors"])
    config = (
        read_config(backbone, directory)
        if model is OpenVLA
        else read_pi_config(backbone, adapter, directory, settings)
    )
    config["norm_stats"], default_key = read_norm_stats(config, directory, adapter)
    unnorm_key = unnorm_key or default_key
    if unnorm_key not in config["norm_stats"] and (model is OpenVLA or config["norm_stats"]):
        raise PolicyError(
            f"norm_stats has no key {unnorm_key!r}; unnorm_key is one of {sorted(config['norm_stats'])}."
        )

    if dtype is None:
        dtype = torch.float32 if tiny or torch.device(device).type == "cpu" else torch.bfloat16
    if commit:
        download(name, commit, ["model*.safetensors"])
    policy = load_weights(model, config, directory, dtype, device)
    policy.name, policy.commit, policy.directory = name, commit, directory
    if unnorm_key in config["norm_stats"]:  # without any, pi0 can be loaded, but not act
        policy.use_norm_stats(unnorm_key)
    files = (
        [Path(tokenizer)]
        if tokenizer
        else [d / "tokenizer.json" for d in (adapter, directory) if d]
    )
    files = [file for file in files if file.is_file()]
    if tokenizer and not files:
        raise PolicyError(f"--tokenizer {tokenizer}: there is no such file; give a tokenizer.json.")
    if "_word_vocab" in config:
        policy.tokenizer = WordTokenizer(config["_word_vocab"])
    elif files:
        policy.tokenizer = (LlamaTokenizer if model is OpenVLA else PaliGemmaTokenizer)(files[0])
        policy.tokenizer_file = files[0]
    if adapter:
        load_adapter(policy, adapter, lora_rank, lora_alpha, lora_targets)
    elif lora_rank:
        policy.add_lora(lora_rank, lora_alpha, lora_targets)
    policy.gradient_checkpointing = gradient_checkpointing
    return policy.to(device).eval()  # there is no dropout: train() would change nothing


def read_config(backbone, directory):
    """config.json of a checkpoint, or the tiny preset. Refuses another backbone's."""
    config = (
        read_json(directory / "config.json") if directory else json.loads(json.dumps(OPENVLA_TINY))
    )
    kind = config.get("model_type", config.get("type"))
    kind = (
        "openvla-tiny"
        if kind == "openvla" and "_word_vocab" in config
        else kind or "a model that it does not name"
    )
    if kind != backbone:
        raise PolicyError(f"{directory} is a checkpoint of {kind}, not of the backbone {backbone}.")
    missing = {
        "text_config",
        "image_sizes",
        "timm_model_ids",
        "n_action_bins",
        "pad_to_multiple_of",
    } - config.keys()
    if missing:
        raise PolicyError(
            f"{directory / 'config.json'} lacks {', '.join(sorted(missing))}; it is not OpenVLA's."
        )
    return config


def read_norm_stats(config, directory, adapter):
    """The statistics of every data set, from all files that may hold some, and the key to use by default."""
    stats = config.get("norm_stats", {})
    key = "bridge_orig" if "bridge_orig" in stats else None
    for folder, name in [
        (directory, "dataset_statistics"),
        (directory, "norm_stats"),
        (adapter, "norm_stats"),
    ]:
        if folder and (folder / f"{name}.json").is_file():
            more = read_json(folder / f"{name}.json")
            stats = stats | more
            key = (
                next(iter(more)) if name == "norm_stats" else key
            )  # ours: it holds just the one it was trained with
    if directory and not stats:  # openpi's: in a folder named after the data set
        for file in sorted(directory.glob("*/**/norm_stats.json")):
            stats[str(file.parent.relative_to(directory))] = read_json(file)["norm_stats"]
    return stats, key or (next(iter(stats)) if len(stats) == 1 else None)


def read_pi_config(backbone, adapter, directory, settings):
    """Sizes and settings: the official ones, what a config.json says otherwise, then `settings`. pi0 or pi0.5: by tensors."""
    if directory is None:
        file, kind = json.loads(json.dumps(PI05_TINY)), "pi05"
    else:
        file = read_json(directory / "config.json") if (directory / "config.json").is_file() else {}
        if adapter and (adapter / "config.json").is_file():
            file |= read_json(adapter / "config.json")
        keys = {Pi0.rename(key) for key in open_tensors(directory, "model")}
        kind = {(True, False): "pi0", (False, True): "pi05"}.get(
            ("action_time_mlp_in.weight" in keys, "time_mlp_in.weight" in keys),
            "neither pi0 nor pi05",
        )
    found = kind + "-tiny" if "_word_vocab" in file else kind
    if found != backbone:
        raise PolicyError(
            f"{directory} is a checkpoint of {found}, not of the backbone {backbone}."
        )
    known = PI | PI_KIND[kind]
    config = known | {
        key: value
        for key, value in file.items()
        if key in known or key in ("norm_stats", "_word_vocab")
    }
    config |= {"model_type": kind} | {
        FLOW_SETTINGS[name]: value for name, value in settings.items()
    }
    for wrong, sentence in (
        (
            not 1 <= config["action_chunk"] <= config["action_horizon"],
            "--replan must be 1 to --horizon",
        ),
        (config["num_denoise_steps"] < 1, "--denoise-steps must be at least 1"),
        (config["noise_level"] <= 0, "--noise-level must be positive"),
        (config["sde_steps"] not in ("one", "all"), "--sde-steps must be one or all"),
    ):
        if wrong:
            raise PolicyError(f"{sentence}.")
    return config


def load_weights(model, config, directory, dtype, device):
    """Check every name and shape on the meta device, then read each tensor straight to where it will live."""
    if directory is None:
        policy = model(config)
        policy.init_from_scratch()
        for key, p in policy.named_parameters():
            p.data = p.data.to(torch.float32 if policy.keeps_float32(key) else dtype)
        policy.init_value_head()
        return policy
    with torch.device("meta"):
        policy = model(config)
    found = {policy.rename(key): entry for key, entry in open_tensors(directory, "model").items()}
    found = {key: entry for key, entry in found.items() if not policy.is_dead(key)}
    if (directory / "value_head.safetensors").is_file():
        found |= {
            f"value_head.{key}": entry
            for key, entry in open_tensors(directory, "value_head").items()
        }
    wanted = policy.state_dict()
    if not any(
        key.startswith("value_head.") for key in found
    ):  # the published checkpoints have none: a fresh one
        wanted = {
            key: tensor for key, tensor in wanted.items() if not key.startswith("value_head.")
        }
        policy.value_head.to_empty(device=device)
        policy.init_value_head()
    check_tensors({key: entry.get_shape() for key, entry in found.items()}, wanted, directory)
    state = {}
    for key, entry in found.items():
        to = torch.float32 if policy.keeps_float32(key) else dtype
        state[key] = entry[:].to(device, to, copy=True)  # no view of the file remains
    policy.load_state_dict(state, strict=False, assign=True)
    if (
        model is OpenVLA
    ):  # computed, not stored; stays float32: bfloat16 frequencies are off by up to 0.35 rad
        llama = policy.language_model.model
        llama.rotary_emb = type(llama.rotary_emb)(llama.config).to(device)
    return policy


def load_adapter(policy, directory, rank=0, alpha=None, targets=None):
    """A PEFT directory onto its base model, unmerged; the value head from beside it. Refuses what contradicts it."""
    lora_config = LoraConfig.from_pretrained(str(directory))
    for name, asked, own in (
        ("rank", rank, lora_config.r),
        ("alpha", alpha, lora_config.lora_alpha),
        ("targets", targets and sorted(targets), sorted(lora_config.target_modules)),
    ):
        if asked and asked != own:
            raise PolicyError(
                f"{directory} holds an adapter with LoRA {name} {own}, not {asked}; pass --lora-{name} so."
            )
    lora_config.inference_mode = False
    policy.add_lora(lora_config=lora_config)
    own = {key: tensor for key, tensor in policy.state_dict().items() if policy.in_adapter(key)}
    found = {}
    for key, entry in open_tensors(directory, "adapter_model").items():
        key = key.removeprefix("base_model.model.")
        # PEFT 0.11 also wrote the frozen lm_head itself; adapters of dead modules have nothing to adapt here
        if not key.endswith(".base_layer.weight") and not policy.is_dead(key):
            found[key.removesuffix("weight") + "default.weight" if ".lora_" in key else key] = entry
    check_tensors({key: entry.get_shape() for key, entry in found.items()}, own, directory)
    for key, entry in found.items():
        own[key].copy_(entry[:])
    if (directory / "value_head.safetensors").is_file():
        file = directory / "value_head.safetensors"
        state = {key: entry[:] for key, entry in open_tensors(directory, "value_head").items()}
    elif (
        directory / "training_state.pt"
    ).is_file():  # RL4VLA's: {"vh": the value head, and two optimizers}
        file = directory / "training_state.pt"
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["vh"]
        except (RuntimeError, UnpicklingError, KeyError) as error:
            raise PolicyError(f"{file} is damaged or not RL4VLA's ({error!r}).") from None
    else:
        return  # the base model's value head, or a fresh one
    check_tensors(
        {key: tensor.shape for key, tensor in state.items()}, policy.value_head.state_dict(), file
    )
    policy.value_head.load_state_dict(state)


# ------------------------------------------------------------------------------------------------ command line
@torch.no_grad()
def merge(checkpoint: Positional[str], out: Positional[Path], base: str | None = None, backbone: str = "openvla",
          dtype: Literal["bfloat16", "float32"] = "bfloat16", device: str = "cpu"):  # fmt: skip
    """Fold a LoRA checkpoint into its base model, write the official format to OUT, read it back and compare.

    In bfloat16 the merged weights are rounded, so the comparison can only be coarse; float32 makes it exact.
    """
    options = {"dtype": DTYPES[dtype], "device": device}
    policy = load_policy(backbone, checkpoint, base=base, **options)
    if policy.lora_config is None:
        raise PolicyError(
            f"{checkpoint} is not an adapter (it has no adapter_config.json): nothing to merge."
        )
    before = policy.probe()
    for module in policy.modules():
        if isinstance(module, LoraLayer):
            module.merge()
    state = {
        key.replace(".base_layer.", "."): t
        for key, t in policy.state_dict().items()
        if ".lora_" not in key
    }
    value_head = {
        key.removeprefix("value_head."): state.pop(key)
        for key in list(state)
        if "value_head." in key
    }
    for key, entry in open_tensors(policy.directory, "model").items():
        if policy.is_dead(policy.rename(key)):  # the official class wants them, whatever they hold
            state[policy.rename(key)] = entry[:].to(options["dtype"])
    out.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(
        state, out, filename_pattern="model{suffix}.safetensors", max_shard_size="5GB"
    )
    save_file(value_head, out / "value_head.safetensors", {"format": "pt"})
    save_config(policy, out)
    if policy.config["norm_stats"]:
        options["unnorm_key"] = policy.unnorm_key
    del policy, state, module  # two 7B models need not fit at once
    after = load_policy(backbone, out, **options).probe()
    error = (after - before).abs()
    size = f"{error.max():.2g} at most, {error.mean():.2g} on average"
    print(f"{out}: {backbone}'s outputs differ by {size}; their std is {before.std():.2g}")
    if error.mean() > (1e-4 if dtype == "float32" else 0.3) * before.std():
        raise PolicyError(f"{out} does not compute what {checkpoint} does; do not use it.")


if __name__ == "__main__":
    try:
        tyro.extras.subcommand_cli_from_dict({"merge": merge})
    except PolicyError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
