"""OpenVLA's network: two ViT towers (DINOv2, SigLIP) -> projector -> Llama, and RL4VLA's value
head. policies.TokenPolicy makes actions of it.

Parameter names are the official checkpoint's. All that differs between the small presets and the 7B
model is in config.json.
"""

import copy
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from backbones.files import check_types, save_policy
from backbones.layers import (
    STEP_BOUNDS,
    forward_layer,
    grey_levels,
    grid_waves,
    in_heads,
    keep_variance,
    patch_embedding,
    where_heads_look,
)
from backbones.lora import add_lora
from backbones.tokenizers import (
    FLAT_VOCAB,
    WORD_PROMPT,
    WORD_VOCAB,
    LlamaTokenizer,
    check_tokenizer,
)
from runtime import Fault, one_line, read_json

# Its last space is Llama's token 29871
PROMPT = "In: What action should the robot take to {instruction}?\nOut: "
LORA_TARGETS = [  # RL4VLA's list: every linear layer, and both patch embeddings
    "proj", "qkv", "fc1", "fc2", "fc3", "q", "kv", "q_proj", "k_proj", "v_proj", "o_proj",
    "gate_proj", "up_proj", "down_proj", "lm_head",
]  # fmt: skip

TIMM = {  # the towers' sizes, of which the official config.json has only the ids
    "vit_large_patch14_reg4_dinov2.lvd142m": {
        "embed_dim": 1024, "depth": 24, "num_heads": 16, "mlp_ratio": 4.0,
        "patch_size": 14, "class_token": True, "reg_tokens": 4, "layer_scale": True,
    },
    "vit_so400m_patch14_siglip_224": {
        "embed_dim": 1152, "depth": 27, "num_heads": 16, "mlp_ratio": 3.7362,
        "patch_size": 14, "class_token": False, "reg_tokens": 0, "layer_scale": False,
    },
}  # fmt: skip
CONFIG_TYPES = {  # of config.json's fields
    "text_config": dict, "image_sizes": list, "timm_model_ids": list,
    "n_action_bins": int, "pad_to_multiple_of": int,
}  # fmt: skip
MEAN = (0.485, 0.456, 0.406, 0.5, 0.5, 0.5)  # channels 0-2 feed DINO (ImageNet's), 3-5 SigLIP
STD = (0.229, 0.224, 0.225, 0.5, 0.5, 0.5)

STATS = {"action": STEP_BOUNDS | {"mask": [True] * 6 + [False]}}  # the gripper is not scaled
OPENVLA_TINY = {
    "model_type": "openvla",
    "timm_model_ids": list(TIMM),
    "image_sizes": [96, 96],
    "n_action_bins": 32,
    "pad_to_multiple_of": 32,
    "pad_token_id": 0,
    "text_config": {
        "model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0,
        "vocab_size": 192,  # 128 words (some spare) + 32 actions + 32 padding, in the 7B's order
        "initializer_range": 0.05,
    },
    "norm_stats": {"builtin": STATS},
    # No official fields. A conv stem learns to see in minutes, a patch embedding does not
    "_tiny_timm_kwargs": [
        {"embed_dim": 128, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0, "patch_size": 16,
         "stem": [24, 48, 96], "class_token": False, "reg_tokens": 0, "layer_scale": False},
        {"embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 4.0, "patch_size": 16},
    ],
    "_attention_std": 0.07,
    "_word_vocab": WORD_VOCAB,
    "_prompt": WORD_PROMPT,
    "_cloning": {  # in bins: see sft_loss. Idle dimensions stay sharp
        "sigma": [0.5] * 3 + [0.0, 0.0, 0.5, 0.0], "answer_sigma": 0.7, "jitter": 1.0,
    },
}  # fmt: skip
OPENVLA_FLAT = OPENVLA_TINY | {  # 32 x 32 pixels, 32 bins; the hand moves in two dimensions
    "image_sizes": [32, 32], "n_action_bins": 32, "pad_to_multiple_of": 32,
    "text_config": OPENVLA_TINY["text_config"] | {
        "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 96,
        "num_attention_heads": 2, "num_key_value_heads": 2,
    },
    "norm_stats": {"flat": STATS},
    "_tiny_timm_kwargs": [
        {"embed_dim": 48, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, "patch_size": 8,
         "stem": [16, 32], "class_token": False, "reg_tokens": 0, "layer_scale": False},
        {"embed_dim": 16, "depth": 1, "num_heads": 2, "mlp_ratio": 2.0, "patch_size": 8},
    ],
    "_backbone": "openvla-flat",
    "_attention_std": 0.13,
    "_word_vocab": FLAT_VOCAB,
    "_cloning": {"sigma": [0.5] * 2 + [0.0] * 5, "answer_sigma": 0.7, "jitter": 1.0},
}  # fmt: skip


class ViT(nn.Module):
    """(B, 3, S, S) -> patch features (B, n, D): the output of block depth-2, as OpenVLA takes it.

    timm's parameter names, which are the checkpoint's. The last block, the final norm and SigLIP's
    attention pool are dead weights in OpenVLA and are not built. stem: see `patch_embedding`.
    """

    def __init__(
        self,
        image_size,
        embed_dim,
        depth,
        num_heads,
        patch_size,
        class_token,
        reg_tokens,
        layer_scale,
        mlp_ratio,
        stem=None,
    ):
        super().__init__()
        self.num_heads, self.num_patches = num_heads, (image_size // patch_size) ** 2
        patches = patch_embedding(patch_size, embed_dim, stem)
        convs, proj = (patches[:-1], patches[-1]) if stem else (nn.Identity(), patches)
        self.patch_embed = nn.ModuleDict({"stem": convs, "proj": proj})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, reg_tokens, embed_dim)) if reg_tokens else None
        self.pos_embed = nn.Parameter(torch.randn(1, self.num_patches, embed_dim) * 0.02)
        hidden = int(embed_dim * mlp_ratio)
        self.blocks = nn.ModuleList(Block(embed_dim, hidden, layer_scale) for _ in range(depth - 1))

    def forward(self, x, recompute=False):
        # a slice, which convolutions would copy
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.patch_embed["proj"](self.patch_embed["stem"](x)).flatten(2).transpose(1, 2)
        x = x + self.pos_embed  # (B, n, D); timm has folded the cls position into cls_token
        extra = [
            t.expand(len(x), -1, -1) for t in (self.cls_token, self.reg_token) if t is not None
        ]
        x = torch.cat([*extra, x], 1)
        for block in self.blocks:
            x = forward_layer(block, x, recompute, num_heads=self.num_heads)
        return x[:, -self.num_patches :]


class Block(nn.Module):
    """Pre-norm transformer block. GELU is exact in both towers."""

    def __init__(self, dim, hidden, layer_scale):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})
        self.ls1 = nn.ParameterDict({"scale_factor": torch.ones(dim)}) if layer_scale else None
        self.ls2 = nn.ParameterDict({"scale_factor": torch.ones(dim)}) if layer_scale else None

    def forward(self, x, num_heads):
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = self.attn["proj"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + (y if self.ls1 is None else y * self.ls1["scale_factor"])
        y = self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))
        return x + (y if self.ls2 is None else y * self.ls2["scale_factor"])


class Earlier(NamedTuple):
    """Keys and values of earlier positions (B, heads, n, head_dim), as a cache. Stores nothing."""

    k: torch.Tensor
    v: torch.Tensor

    def update(self, k, v, layer_idx):  # called by LlamaAttention
        return torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)


class KVCache:
    """Keys and values at fixed addresses. The attention mask hides what is not yet written."""

    def __init__(self, config, batch, length, like):
        heads = config.num_key_value_heads
        shape = (config.num_hidden_layers, batch, heads, length, config.head_dim)
        self.k, self.v, self.start = like.new_zeros(shape), like.new_zeros(shape), 0

    def update(self, k, v, layer_idx):  # called by LlamaAttention
        self.k[layer_idx, :, :, self.start : self.start + k.shape[2]] = k
        self.v[layer_idx, :, :, self.start : self.start + k.shape[2]] = v
        return self.k[layer_idx], self.v[layer_idx]


def text_config(config):
    """Llama's sizes. The attention kernel that a checkpoint was trained with is no part of it."""
    own = {key: x for key, x in config["text_config"].items() if "attn" not in key}
    # 1e-6 is the official port's, not Meta's 1e-5
    return LlamaConfig(**{"rms_norm_eps": 1e-6} | own, attn_implementation="sdpa")


class OpenVLANetwork(nn.Module):
    """Official key names: vision_backbone, projector, language_model; plus RL4VLA's value_head."""

    # What load_policy and merge ask of a class
    small_configs = {"openvla-tiny": OPENVLA_TINY, "openvla-flat": OPENVLA_FLAT}  # start random
    settings = {}  # flags that change the config: {flag: field}
    config_needs_weights = False  # config.json says what a checkpoint is
    needs_norm_stats = True
    tokenizer_class = LlamaTokenizer
    lora_targets, lora_excludes = LORA_TARGETS, None
    saves_config = False  # beside an adapter
    save = save_policy
    add_lora = add_lora

    name = commit = directory = None  # where it comes from
    tokenizer = tokenizer_file = lora_config = None
    gradient_checkpointing = detach_value = False

    def __init__(self, config):
        super().__init__()
        self.config = config
        text = text_config(config)
        self.image_size = config["image_sizes"][0]
        # How RL4VLA gets there from 640 x 480 (scenes/task.py); a small model's frames are drawn so
        self.resize = None if "_word_vocab" in config else "squash"
        towers = [TIMM[name] for name in config["timm_model_ids"]]
        if "_tiny_timm_kwargs" in config:
            towers = [tower | own for tower, own in zip(towers, config["_tiny_timm_kwargs"])]
        dino, siglip = [ViT(size, **tower) for size, tower in zip(config["image_sizes"], towers)]
        self.vision_backbone = nn.ModuleDict({"featurizer": dino, "fused_featurizer": siglip})
        fused, width = sum(tower["embed_dim"] for tower in towers), text.hidden_size
        self.projector = nn.ModuleDict(
            {
                "fc1": nn.Linear(fused, 4 * fused),
                "fc2": nn.Linear(4 * fused, width),
                "fc3": nn.Linear(width, width),
            }
        )
        self.language_model = LlamaForCausalLM(text)
        self.value_head = nn.ModuleDict(
            {
                "head_l1": nn.Linear(width, 512),
                "head_l2": nn.Linear(512, 128),
                "head_l3": nn.Linear(128, 1, bias=False),
            }
        )
        # The last ids before the padding are the actions. A LARGER id is a SMALLER value.
        self.action_end = text.vocab_size - config["pad_to_multiple_of"]
        self.action_begin = self.action_end - config["n_action_bins"]

    @property
    def device(self):
        return self.value_head["head_l3"].weight.device

    @property
    def dtype(self):
        return self.language_model.model.norm.weight.dtype

    # -------------------------------------------------------------------- loading
    @classmethod
    def read_config(cls, backbone, directory, adapter, settings):
        """config.json of a checkpoint, or the small preset. Refuses another backbone's."""
        if directory is None:
            return copy.deepcopy(cls.small_configs[backbone])
        for folder in filter(None, (directory, adapter)):
            for part in folder.glob("action_head--*"):
                raise Fault(
                    f"{folder} is a checkpoint of OpenVLA-OFT ({part.name}), whose actions do not "
                    "come from tokens: use a checkpoint of OpenVLA"
                )
        file = directory / "config.json"
        config = read_json(file)
        kind = config.get("model_type", config.get("type")) or "a model that it does not name"
        if kind == "openvla" and "_word_vocab" in config:
            kind = config.get("_backbone", "openvla-tiny")
        if kind != backbone:
            raise Fault(f"{directory} is a checkpoint of {kind}, not of the backbone {backbone}")
        missing = CONFIG_TYPES.keys() - config.keys()
        if missing:
            raise Fault(f"{file} lacks {', '.join(sorted(missing))}; it is not OpenVLA's")
        check_types(config, CONFIG_TYPES, file)
        towers, sizes = config["timm_model_ids"], config["image_sizes"]
        if towers != list(TIMM):
            raise Fault(
                f"{file}: timm_model_ids is {towers}; OpenVLA here has the two towers "
                f"{' and '.join(TIMM)}"
            )
        if (strategy := config.get("image_resize_strategy", "resize-naive")) != "resize-naive":
            raise Fault(
                f"{file}: image_resize_strategy is {strategy!r}; frames are resized here as by "
                "'resize-naive' alone"
            )
        if len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
            raise Fault(f"{file}: image_sizes is {sizes}, not one number of pixels for each tower")
        try:
            text = text_config(config)
        except Exception as error:  # transformers' own checks raise errors of many types
            raise Fault(f"{file}: text_config is not Llama's ({one_line(error)})") from None
        words = text.vocab_size - config["pad_to_multiple_of"] - config["n_action_bins"]
        if words < 1 or config["n_action_bins"] < 2:
            raise Fault(
                f"{file}: n_action_bins is {config['n_action_bins']}, of a vocabulary of "
                f"{text.vocab_size}, {config['pad_to_multiple_of']} of them padding"
            )
        return config

    @staticmethod
    def rename(key):
        """The name here of a checkpoint's tensor. RLinf's value head is RL4VLA's MLP."""
        found = re.match(r"value_head\.mlp\.([024])\.", key)
        return f"value_head.head_l{int(found[1]) // 2 + 1}.{key[found.end() :]}" if found else key

    def is_unused(self, key):
        """Official tensors that OpenVLA never uses: see ViT."""
        unused = [
            f"vision_backbone.{name}.{part}"
            for name, tower in self.vision_backbone.items()
            for part in (f"blocks.{len(tower.blocks)}.", "norm.", "attn_pool.")
        ]
        return key.startswith(tuple(unused))

    def keeps_float32(self, key):
        return key.startswith("value_head.")

    def in_adapter(self, key):
        """What training changes where there are adapters, beside the value head."""
        return ".lora_" in key

    def init_buffers(self, device):
        """Llama's rotary frequencies are in no file. In bfloat16 they would be 0.35 rad off."""
        llama = self.language_model.model
        llama.rotary_emb = type(llama.rotary_emb)(llama.config).to(device)

    def init_value_head(self):
        """N(0, 0.02), zero bias: what RL4VLA's value head effectively starts from."""
        for name, p in self.value_head.named_parameters():
            nn.init.zeros_(p) if name.endswith("bias") else nn.init.normal_(p, std=0.02)

    def init_from_scratch(self):
        """What pretraining has done for the 7B model: the image reaches Llama, and neighbouring
        bins are neighbours.

        With torch's default only 1.5 % of the patch tokens' variance would come from the image.
        Action tokens start as random waves over the bin's value, so that a bin which no
        demonstration has used is not plain noise.
        """
        keep_variance([*self.vision_backbone.modules(), *self.projector.modules()])
        for tower in self.vision_backbone.values():
            tower.pos_embed.data = grid_waves(*tower.pos_embed.shape[1:])[None]
        llama = self.language_model
        for layer in llama.model.layers:  # by content: a word looks at patches like it
            nn.init.normal_(layer.self_attn.q_proj.weight, std=self.config["_attention_std"])
            layer.self_attn.k_proj.weight.data.copy_(layer.self_attn.q_proj.weight)
        bins = torch.linspace(-1, 1, self.action_end - self.action_begin)[:, None]  # (bins, 1)
        std = llama.config.initializer_range
        for table in (llama.model.embed_tokens.weight, llama.lm_head.weight):
            frequency, phase = torch.randn(table.shape[1]) * 3, torch.rand(table.shape[1]) * 6.2832
            waves = torch.cos(bins * frequency + phase) * std * 2**0.5
            table.data[self.action_begin : self.action_end] = waves

    # -------------------------------------------------------------------- inputs
    def preprocess(self, images_uint8):
        """(B, H, W, 3) uint8 -> (B, 6, S, S) float32, squashed ("resize-naive")."""
        x = grey_levels(images_uint8, self.device)
        if x.shape[-2:] != (self.image_size, self.image_size):
            x = F.interpolate(x, (self.image_size, self.image_size), mode="bicubic", antialias=True)
            x = x.clamp(0, 255).round()  # back to grey levels, as the uint8 route of RLinf does
        x = (x / 255).repeat(1, 2, 1, 1)
        return x.sub_(x.new_tensor(MEAN)[:, None, None]).div_(x.new_tensor(STD)[:, None, None])

    def tokenize(self, instructions, prompt=None):
        """List of B str -> input_ids, attention_mask (B, T): BOS, padding, words.

        The patches go right behind BOS, so that it has to be first in every row.
        """
        check_tokenizer(self.tokenizer, self.tokenizer_class, self.name)
        prompt = prompt or self.config.get("_prompt", PROMPT)
        rows = [self.tokenizer(prompt.format(instruction=text.lower())) for text in instructions]
        length, pad = max(map(len, rows)), self.config.get("pad_token_id") or 0  # nobody sees them
        ids, mask = [], []
        for bos, *words in rows:
            pads = length - 1 - len(words)
            ids.append([bos] + [pad] * pads + words)
            mask.append([1] + [0] * pads + [1] * len(words))
        return torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)

    # ------------------------------------------------------- from pixels and words to hidden states
    def embed(self, pixel_values, input_ids):
        """[BOS][patches][rest of the prompt] -> embeddings (B, L, H)."""
        pixels, towers = pixel_values.to(self.dtype), self.vision_backbone
        dino = towers["featurizer"](pixels[:, :3], self.gradient_checkpointing)
        siglip = towers["fused_featurizer"](pixels[:, 3:], self.gradient_checkpointing)
        x = torch.cat([dino, siglip], -1)  # (B, n, Dd + Ds)
        x = self.projector["fc3"](F.gelu(self.projector["fc2"](F.gelu(self.projector["fc1"](x)))))
        text = self.language_model.model.embed_tokens(input_ids)
        return torch.cat([text[:, :1], x, text[:, 1:]], 1)

    def attention_layout(self, attention_mask):
        """What each of L + 6 positions may see, (B, 1, L+6, L+6) bool, and its rotary position
        (pads do not count)."""
        num_patches = self.vision_backbone["featurizer"].num_patches
        patches, actions = (
            attention_mask.new_ones(len(attention_mask), n) for n in (num_patches, 6)
        )
        parts = [attention_mask[:, :1], patches, attention_mask[:, 1:], actions]
        valid = torch.cat(parts, 1)  # (B, L + 6)
        causal = torch.ones(valid.shape[1], valid.shape[1], dtype=torch.bool, device=valid.device)
        return causal.tril() & valid.bool()[:, None, None, :], valid.cumsum(1) - 1

    def llama(self, x, mask, positions, outputs, cache=None):
        """Llama's own layers and final norm on embeddings (B, Q, H), without its mask-guessing
        wrapper -> (B, outputs, H) of the last positions.

        Nobody reads what the last layer makes of the others. It gives their keys and values alone.
        """
        llama = self.language_model.model
        *layers, last = llama.layers
        cos, sin = llama.rotary_emb(x, positions)
        inputs = {
            "attention_mask": mask,
            "position_embeddings": (cos, sin),
            "past_key_values": cache,
        }
        for layer in layers:
            x = forward_layer(layer, x, self.gradient_checkpointing, **inputs)
        if n := x.shape[1] - outputs:
            attention, y = last.self_attn, last.input_layernorm(x[:, :n])
            k, v = in_heads(y, attention, attention.k_proj, attention.v_proj)
            k, _ = apply_rotary_pos_emb(k, k[:, :0], cos[:, :n], sin[:, :n])  # there is no query
            if cache is None:
                cache = Earlier(k, v)
            else:
                cache.update(k, v, len(layers))
                cache.start += n
            inputs = {
                "attention_mask": mask[:, :, n:],
                "position_embeddings": (cos[:, n:], sin[:, n:]),
                "past_key_values": cache,
            }
        return llama.norm(forward_layer(last, x[:, n:], self.gradient_checkpointing, **inputs))

    def value(self, hidden):
        """(B, H) at the last prompt token, before any action token -> (B,) float32."""
        x, head = hidden.float(), self.value_head
        return head["head_l3"](F.gelu(head["head_l2"](F.gelu(head["head_l1"](x))))).squeeze(-1)

    # ---------------------------------------------------------- what sft.py teaches besides actions
    def look(self, rgb):
        self.embed(self.preprocess(rgb), torch.zeros(len(rgb), 1, dtype=torch.long))

    def vision_parts(self):
        return [*self.vision_backbone.values(), self.projector["fc3"]]

    def word_embeddings(self):
        return self.language_model.model.embed_tokens.weight

    def watch_pointing(self, hook):
        def look(layer, inputs, options):
            earlier = options["past_key_values"]  # the last layer gets the last words alone
            x, keys = layer.input_layernorm(inputs[0]), earlier and earlier.k
            patches = self.vision_backbone["featurizer"].num_patches
            looks = where_heads_look(layer, x, options, keys, rows=slice(-7, -5))
            hook(looks[..., 1 : patches + 1])

        layer = self.language_model.model.layers[1]
        return [layer.register_forward_pre_hook(look, with_kwargs=True)]
