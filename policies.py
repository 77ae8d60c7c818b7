"""Policies: observation + instruction -> action chunk, with exact log-probs and KL.

    policy = load_policy("openvla-tiny")                                  # random weights, to be trained by sft.py
    policy = load_policy("openvla", "gen-robot/openvla-7b-rlvla-warmup")  # the official 7B checkpoint as it is
    python policies.py merge ADAPTER_DIR OUT_DIR                          # fold a LoRA checkpoint into its base model

OpenVLA: two ViT towers (DINOv2, SigLIP) -> projector -> Llama; an action is 7 tokens of 256 bins each. Everything that
differs between the tiny preset and the 7B model is in config.json, which is read as data.
"""

import json
import re
import shutil
import sys
from pathlib import Path
from pickle import UnpicklingError
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
import tyro
from huggingface_hub import save_torch_state_dict, snapshot_download
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM
from tyro.conf import Positional

BACKBONES = ("openvla", "openvla-tiny")
DEFAULT_CHECKPOINT = {"openvla": "gen-robot/openvla-7b-rlvla-warmup"}  # "name@revision" pins it
DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float32": torch.float32}  # of the backbone, as load_policy takes it
PROMPT = "In: What action should the robot take to {instruction}?\nOut: "  # its last space is Llama's token 29871
LORA_TARGETS = [  # RL4VLA's list: every linear layer, and both patch embeddings
    "proj", "qkv", "fc1", "fc2", "fc3", "q", "kv", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
    "down_proj", "lm_head",
]  # fmt: skip


class PolicyError(ValueError):
    """One sentence for the user: what is wrong, and what to do."""


class Decision(NamedTuple):
    actions: torch.Tensor  # (B, chunk, 7) float32, env units: metres, radians, gripper -1 (close) / +1 (open)
    latent: torch.Tensor  # (B, 7) long: action token ids, what the log-prob is taken of
    logprob: torch.Tensor  # (B,) float32, sum over the 7 tokens, at temperature 1 whatever was sampled at
    value: torch.Tensor  # (B,) float32


class Evaluation(NamedTuple):
    dist: torch.Tensor  # (B, 7, 256) float32 logits, teacher-forced on the latent
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
MEAN = (0.485, 0.456, 0.406, 0.5, 0.5, 0.5)  # channels 0-2 feed DINO (ImageNet statistics), 3-5 SigLIP
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
        return checkpoint(layer, x, use_reentrant=False, **kwargs)
    return layer(x, **kwargs)


class ViT(nn.Module):
    """(B, 3, S, S) -> patch features (B, n, D): the output of block depth-2, no final norm, as OpenVLA takes it.

    timm's parameter names, which are the checkpoint's. The last block, the final norm and SigLIP's attention pool are
    dead weights in OpenVLA and are not built. `stem` (output channels) swaps the patch embedding for strided convs.
    """

    def __init__(self, image_size, embed_dim, depth, num_heads, patch_size, class_token, reg_tokens, layer_scale,
                 mlp_ratio=4.0, stem=None):  # fmt: skip
        super().__init__()
        self.num_heads, self.num_patches = num_heads, (image_size // patch_size) ** 2
        if stem:
            assert 2 ** (len(stem) + 1) == patch_size, "a stem of n convs and proj have stride 2**(n+1) together"
            convs = [m for i, o in zip([3, *stem], stem) for m in (nn.Conv2d(i, o, 3, 2, 1), nn.ReLU(inplace=True))]
            patch_embed = {"stem": nn.Sequential(*convs), "proj": nn.Conv2d(stem[-1], embed_dim, 3, 2, 1)}
        else:
            patch_embed = {"stem": nn.Identity(), "proj": nn.Conv2d(3, embed_dim, patch_size, patch_size)}
        self.patch_embed = nn.ModuleDict(patch_embed)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, reg_tokens, embed_dim)) if reg_tokens else None
        self.pos_embed = nn.Parameter(torch.randn(1, self.num_patches, embed_dim) * 0.02)
        self.blocks = nn.ModuleList(Block(embed_dim, int(embed_dim * mlp_ratio), layer_scale) for _ in range(depth - 1))

    def forward(self, x, recompute=False):
        x = self.patch_embed["proj"](self.patch_embed["stem"](x)).flatten(2).transpose(1, 2)  # (B, n, D)
        x = x + self.pos_embed  # patches only: timm has folded the cls position into cls_token
        prefix = [t.expand(len(x), -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
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
        scale = [nn.ParameterDict({"scale_factor": nn.Parameter(torch.ones(dim))}) for _ in range(2 * layer_scale)]
        self.ls1, self.ls2 = scale if layer_scale else (None, None)

    def forward(self, x, num_heads):
        q, k, v = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = self.attn["proj"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + (y if self.ls1 is None else y * self.ls1["scale_factor"])
        y = self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))
        return x + (y if self.ls2 is None else y * self.ls2["scale_factor"])


class KVCache:
    """Keys and values at fixed addresses: (layers, B, heads, length, head_dim). What is not yet written is masked."""

    def __init__(self, config, batch, length, like):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, length, config.head_dim)
        self.k, self.v, self.start = like.new_zeros(shape), like.new_zeros(shape), 0

    def update(self, k, v, layer_idx):  # called by LlamaAttention
        self.k[layer_idx, :, :, self.start : self.start + k.shape[2]] = k
        self.v[layer_idx, :, :, self.start : self.start + k.shape[2]] = v
        return self.k[layer_idx], self.v[layer_idx]


# ------------------------------------------------------------------------------------------------ OpenVLA
class OpenVLA(nn.Module):
    """The token policy. Official key names: vision_backbone, projector, language_model; plus RL4VLA's value_head."""

    chunk = 1  # env steps per decision
    gradient_checkpointing = False
    detach_value = False  # True: the critic reads the trunk but does not train it

    def __init__(self, config):
        super().__init__()
        self.config, self.name, self.directory = config, "openvla", None
        text = LlamaConfig(**{"rms_norm_eps": 1e-6, **config["text_config"]})  # 1e-6: the port's, not Meta's 1e-5
        self.image_size = config["image_sizes"][0]
        towers = [TIMM[name] for name in config["timm_model_ids"]]
        if "_tiny_timm_kwargs" in config:
            towers = [{**tower, **kwargs} for tower, kwargs in zip(towers, config["_tiny_timm_kwargs"])]
        dino, siglip = [ViT(size, **tower) for size, tower in zip(config["image_sizes"], towers)]
        self.vision_backbone = nn.ModuleDict({"featurizer": dino, "fused_featurizer": siglip})
        fused = sum(tower["embed_dim"] for tower in towers)
        sizes = [fused, 4 * fused, text.hidden_size, text.hidden_size]
        self.projector = nn.ModuleDict({f"fc{i + 1}": nn.Linear(sizes[i], sizes[i + 1]) for i in range(3)})
        self.language_model = LlamaForCausalLM(text)
        self.value_head = nn.ModuleDict({
            "head_l1": nn.Linear(text.hidden_size, 512),
            "head_l2": nn.Linear(512, 128),
            "head_l3": nn.Linear(128, 1, bias=False),
        })  # fmt: skip
        # Action token ids are [action_begin, action_end), the tokenizer's last 256; a LARGER id is a SMALLER value.
        self.action_end = text.vocab_size - config["pad_to_multiple_of"]
        self.action_begin = self.action_end - config["n_action_bins"]
        self.tokenizer, self._prompt_ids, self.lora_config = None, {}, None

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
        for part in (self.vision_backbone, self.projector):
            for module in part.modules():
                if isinstance(module, (nn.Linear, nn.Conv2d)):
                    gain = 2.0 if isinstance(module, nn.Conv2d) else 1.0  # the stem's ReLU halves the variance
                    nn.init.normal_(module.weight, std=(gain / module.weight[0].numel()) ** 0.5)
                    nn.init.zeros_(module.bias)
        for tower in self.vision_backbone.values():
            count, dim = tower.pos_embed.shape[1:]
            axis = torch.linspace(-1, 1, round(count**0.5))
            angle = torch.cartesian_prod(axis, axis)[:, :, None] * torch.logspace(0, 1, dim // 4) * 1.57  # (n, 2, D/4)
            tower.pos_embed.data = torch.cat([angle.sin(), angle.cos()], -1).flatten(1)[None] / 2
        for layer in self.language_model.model.layers:  # attention starts by content: a word looks at patches like it
            nn.init.normal_(layer.self_attn.q_proj.weight, std=0.07)
            layer.self_attn.k_proj.weight.data.copy_(layer.self_attn.q_proj.weight)
        x = torch.linspace(-1, 1, self.action_end - self.action_begin)[:, None]  # (256, 1)
        std = self.language_model.config.initializer_range
        for table in (self.language_model.model.embed_tokens.weight, self.language_model.lm_head.weight):
            freq, phase = torch.randn(table.shape[1]) * 3, torch.rand(table.shape[1]) * 6.2832
            table.data[self.action_begin : self.action_end] = torch.cos(x * freq + phase) * std * 2**0.5

    def add_lora(self, rank=32, alpha=None, targets=None, lora_config=None):
        """fp32 adapters on every linear layer; only they and the value head train. alpha None: alpha = rank."""
        self.lora_config = lora_config or LoraConfig(
            r=rank, lora_alpha=alpha or rank, target_modules=list(targets or LORA_TARGETS), init_lora_weights="gaussian",
            base_model_name_or_path=self.name,
        )  # fmt: skip
        inject_adapter_in_model(self.lora_config, self)
        for key, p in self.named_parameters():
            if ".lora_" in key:
                p.data = p.data.float()  # peft follows the backbone's dtype, but small updates would vanish in bfloat16
        self.value_head.requires_grad_(True)

    def is_dead(self, key):
        """Official tensors that OpenVLA never uses: each tower's last block and final norm, SigLIP's attention pool."""
        key = key.removeprefix("vision_backbone.")
        return any(
            key.startswith((f"{name}.blocks.{len(tower.blocks)}.", f"{name}.norm.", f"{name}.attn_pool."))
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
        if images_uint8.dtype != torch.uint8 or images_uint8.ndim != 4 or images_uint8.shape[-1] != 3:
            raise PolicyError(
                f"images must be uint8 of shape (B, H, W, 3), not {images_uint8.dtype} {tuple(images_uint8.shape)}."
            )
        x = images_uint8.to(self.device).permute(0, 3, 1, 2).float()
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
            raise PolicyError(f"{self.name} has no tokenizer.json, so it cannot read instructions; add that file.")
        prompt = prompt or self.config.get("_prompt", PROMPT)
        for key in {(prompt, text) for text in instructions} - self._prompt_ids.keys():
            self._prompt_ids[key] = self.tokenizer(prompt.format(instruction=key[1].lower()))
        rows = [self._prompt_ids[prompt, text] for text in instructions]
        length = max(map(len, rows))
        pad = self.config["pad_token_id"]
        ids = torch.tensor([row[:1] + [pad] * (length - len(row)) + row[1:] for row in rows])
        mask = torch.tensor([[1] + [0] * (length - len(row)) + [1] * (len(row) - 1) for row in rows])
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
        patches, actions = attention_mask.new_ones(len(attention_mask), num_patches + 6).split([num_patches, 6], 1)
        valid = torch.cat([attention_mask[:, :1], patches, attention_mask[:, 1:], actions], 1)  # (B, L + 6)
        causal = torch.ones(valid.shape[1], valid.shape[1], dtype=torch.bool, device=valid.device).tril()
        return causal & valid.bool()[:, None, None, :], valid.cumsum(1) - 1

    def _llama(self, x, mask, positions, cache=None):
        """Llama's own layers on embeddings (B, Q, H), without its mask-guessing wrapper; after the final norm."""
        llama = self.language_model.model
        rotary = llama.rotary_emb(x, positions)
        for layer in llama.layers:
            kwargs = {"attention_mask": mask, "position_embeddings": rotary, "past_key_values": cache}
            x = run(layer, x, self.gradient_checkpointing, **kwargs)
        return llama.norm(x)

    def _logits(self, hidden):
        """(..., H) -> float32 logits (..., 256) of the action columns: the one place where the distribution is made."""
        head, columns, hidden = self.language_model.lm_head, slice(self.action_begin, self.action_end), hidden.float()
        logits = F.linear(hidden, head.weight[columns].float())
        if isinstance(head, LoraLayer):  # only the rows of B that we need; peft would compute the whole vocabulary
            a, b = head.lora_A["default"].weight.float(), head.lora_B["default"].weight[columns].float()
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
        return self._logits(hidden), self._value(hidden[:, 0].detach() if self.detach_value else hidden[:, 0])

    def action_logits(self, pixel_values, input_ids, attention_mask, action_tokens):
        """Teacher-forced logits (B, 7, 256) float32 of the action tokens, in the order of their ids."""
        return self(pixel_values, input_ids, attention_mask, action_tokens)[0]

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
        self._q01, self._q99 = (torch.tensor(action[name], dtype=torch.float64) for name in ("q01", "q99"))
        self._scaled = torch.tensor(action["mask"])  # False: the gripper, which stays as decoded
        self._edges = torch.linspace(-1, 1, self.config["n_action_bins"], dtype=torch.float64)
        self._centers = (self._edges[1:] + self._edges[:-1]) / 2  # one fewer than there are tokens

    def env_action(self, tokens):
        """(B, 7) ids -> (B, 7) float64: metres and radians by the 1st/99th percentile of the data, gripper -1/+1."""
        unit = self._centers[(self.action_end - 1 - tokens.cpu()).clamp(0, len(self._centers) - 1)]
        action = torch.where(self._scaled, 0.5 * (unit + 1) * (self._q99 - self._q01) + self._q01, unit)
        is_open = action[:, 6] > 0.5 * (self._q01 + self._q99)[6]  # midway: the data's gripper is 0..1, or -1..1
        action[:, 6] = torch.where(is_open, 1.0, -1.0)
        return action.to(tokens.device)

    def bin_tokens(self, unit):
        """(B, 7) in [-1, 1] -> (B, 7) ids."""
        unit = unit.double().cpu().clamp(-1, 1)
        return (self.action_end - torch.bucketize(unit, self._edges, right=True)).to(self.device)

    def action_tokens(self, actions):
        """(B, 7) env units -> (B, 7) ids: the labels of behaviour cloning."""
        actions = actions.double().cpu()
        unit = 2 * (actions - self._q01) / (self._q99 - self._q01 + 1e-8) - 1
        gripper = torch.where(actions > 0, self._q99, self._q01)
        return self.bin_tokens(torch.where(self._scaled, unit, gripper))

    # -------------------------------------------------------------------- the interface of ppo_pair.py
    @torch.no_grad()
    def act(self, obs, instructions, temperature=1.0):
        """rgb (B, H, W, 3) uint8 and B instructions -> Decision."""
        tokens, logprob, value = self.decode(self.preprocess(obs["rgb"]), *self.tokenize(instructions), temperature)
        return Decision(self.env_action(tokens).float()[:, None], tokens, logprob, value)

    def evaluate(self, obs, instructions, latent):
        """The same observation and action tokens (B, 7) -> Evaluation, with gradient."""
        logits, value = self(self.preprocess(obs["rgb"]), *self.tokenize(instructions), latent)
        logp = logits.log_softmax(-1)  # (B, 7, 256)
        logprob = logp.gather(-1, (latent - self.action_begin)[..., None]).squeeze(-1).sum(1)  # (B, 7) -> (B,)
        entropy = -(logp.exp() * logp).sum(-1).mean(1)  # (B, 7) -> (B,)
        return Evaluation(logits, logprob, entropy, value)

    def kl(self, p, q):
        """KL(p || q) of two Evaluation.dist: exact over the bins, MEAN over the 7 tokens. (B, 7, 256) x2 -> (B,)."""
        p, q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1).mean(1).clamp(min=0)  # clamp: rounding may leave -1e-8

    @torch.no_grad()
    def value(self, obs, instructions):
        """Value (B,) of an observation: the prefill of `decode` alone, for bootstrapping."""
        input_ids, attention_mask = self.tokenize(instructions)
        x = self._prefix(self.preprocess(obs["rgb"]), input_ids)
        mask, positions = self._layout(attention_mask, x.shape[1] - input_ids.shape[1])
        length = x.shape[1]
        return self._value(self._llama(x, mask[:, :, :length, :length], positions[:, :length])[:, -1])

    def save(self, directory, dtype=None):
        """Write a checkpoint that load_policy reads; dtype (say torch.float16) is that of the stored weights.

        With LoRA: a standard PEFT directory (adapter_config.json, adapter_model.safetensors); else config.json and
        model.safetensors. Both: value_head.safetensors and norm_stats.json.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        files = {"model": {}, "adapter_model": {}, "value_head": {}}
        for key, tensor in self.state_dict().items():
            tensor = tensor.detach().to(dtype or tensor.dtype).contiguous()
            if key.startswith("value_head."):
                files["value_head"][key.removeprefix("value_head.")] = tensor
            elif ".lora_" in key:
                files["adapter_model"]["base_model.model." + key.replace(".default.", ".")] = tensor
            else:
                files["model"][key] = tensor
        if self.lora_config:
            del files["model"]  # the base model stays where it is; adapter_config.json names it
            self.lora_config.save_pretrained(str(directory))
        else:
            del files["adapter_model"]
            self._save_config(directory)
        for name, tensors in files.items():
            save_file(tensors, directory / f"{name}.safetensors", {"format": "pt"})
        stats = {self.unnorm_key: self.config["norm_stats"][self.unnorm_key]}
        (directory / "norm_stats.json").write_text(json.dumps(stats, indent=2))

    def _save_config(self, directory):
        (directory / "config.json").write_text(json.dumps(self.config, indent=2))
        if self.directory and (self.directory / "tokenizer.json").is_file():
            shutil.copy(self.directory / "tokenizer.json", directory)


# ------------------------------------------------------------------------------------------------ loading
class WordTokenizer:
    """One id per word of the tiny vocabulary; a prompt ends in <out> as Llama's ends in token 29871."""

    def __init__(self, words):
        self.ids = {word: i for i, word in enumerate(words)}

    def __call__(self, text):
        words = re.findall(r"<out>|\w+", text.lower().replace("out:", "<out>"))
        for word in words:
            if word not in self.ids:
                raise PolicyError(f"the word {word!r} is not in this policy's vocabulary (_word_vocab in config.json).")
        return [self.ids[word] for word in ["<s>", *words]]


class LlamaTokenizer:
    """tokenizer.json, read as data."""

    def __init__(self, file):
        self.tokenizer = Tokenizer.from_file(str(file))

    def __call__(self, text):
        ids = self.tokenizer.encode(text).ids
        if ids[0] != 1 or (text.endswith("Out: ") and ids[-1] != 29871):
            raise PolicyError(f"tokenizer.json is not Llama-2's: a prompt became {ids}, not BOS 1 ... 29871.")
        return ids


def find_checkpoint(name, hub):
    """A local directory, or (hub=True) a repository "owner/name" or "owner/name@revision" -> Path."""
    if Path(name).is_dir():
        return Path(name)
    if not hub or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[\w.-]+)?", str(name)):
        raise PolicyError(f"there is no checkpoint directory {name}.")
    repo, _, revision = str(name).partition("@")
    patterns = ["*.json", "*.safetensors", "training_state.pt"]
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # every error of the Hub's client is one of these
        reason = str(error).split("\n")[0].rstrip(". ")
        hint = f"{reason}; check name and network."
        raise PolicyError(f"{name} is neither a directory here nor a Hub repository in reach: {hint}") from None


def read_json(file):
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise PolicyError(f"{file} cannot be read ({error}).") from None


def open_tensors(directory, stem):
    """The tensors of STEM.safetensors, or of the shards in its index: {key: (open file, shape)}. Reads headers only."""
    index = directory / f"{stem}.safetensors.index.json"
    names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else [f"{stem}.safetensors"]
    found = {}
    for name in names:
        try:
            file = safe_open(directory / name, "pt")  # checks the file's length against its header
        except (OSError, SafetensorError) as error:
            raise PolicyError(f"{directory / name} is missing, truncated or no safetensors file ({error}).") from None
        found |= {key: (file, list(file.get_slice(key).get_shape())) for key in file.keys()}  # noqa: SIM118
    return found


def check_tensors(found, wanted, where):
    """Strict: what the files hold and what the model has must agree in name and shape. Names the first offender."""
    for key in sorted(found.keys() | wanted.keys()):
        if key not in found:
            raise PolicyError(f"{where} lacks the tensor {key}; is it a checkpoint of another model?")
        if key not in wanted:
            raise PolicyError(f"{where} has the tensor {key}, which this model has not; is it of another model?")
        if found[key][1] != list(wanted[key].shape):
            raise PolicyError(f"{where}: {key} has the shape {found[key][1]}, not {list(wanted[key].shape)}.")


def load_policy(backbone, checkpoint=None, *, base=None, dtype=None, device="cpu", unnorm_key=None, lora_rank=0,
                lora_alpha=None, lora_targets=None, gradient_checkpointing=False):  # fmt: skip
    """A policy ready to act.

    checkpoint: a directory (full model, or a PEFT adapter), or a Hub repository OWNER/NAME[@REVISION]; None is
    openvla-tiny with fresh random weights, or the default 7B checkpoint. base: where an adapter's base model is, if not
    where it says. dtype: of the backbone; None is bfloat16 on a GPU, float32 on a CPU and for the tiny one.
    lora_rank, lora_alpha (None: the rank), lora_targets (None: LORA_TARGETS): fresh adapters on a full model; an
    adapter brings its own, and a contradiction is an error.
    """
    if backbone not in BACKBONES:
        raise PolicyError(f"unknown backbone {backbone!r}; choose one of {', '.join(BACKBONES)}.")
    tiny = backbone == "openvla-tiny"
    if checkpoint is None and backbone in DEFAULT_CHECKPOINT:
        checkpoint = DEFAULT_CHECKPOINT[backbone]
    directory = None if checkpoint is None else find_checkpoint(checkpoint, hub=not tiny)
    adapter = None
    if directory and (directory / "adapter_config.json").is_file():
        adapter = directory
        base = base or read_json(adapter / "adapter_config.json")["base_model_name_or_path"]
        if not base:
            raise PolicyError(f"{adapter} is an adapter that does not name its base model; pass base=DIRECTORY.")
        directory = find_checkpoint(base, hub=not tiny)
    if directory is None and lora_rank:
        raise PolicyError("LoRA needs a checkpoint to adapt; random weights would not be saved with the adapter.")

    config = read_config(backbone, directory)
    config["norm_stats"], default_key = read_norm_stats(config, directory, adapter)
    unnorm_key = unnorm_key or default_key
    if unnorm_key not in config["norm_stats"]:
        raise PolicyError(f"norm_stats has no key {unnorm_key!r}; unnorm_key is one of {sorted(config['norm_stats'])}.")

    if dtype is None:
        dtype = torch.float32 if tiny or torch.device(device).type == "cpu" else torch.bfloat16
    policy = load_weights(config, directory, dtype, device)
    policy.name, policy.directory = str(base or checkpoint or backbone), directory
    policy.use_norm_stats(unnorm_key)
    if "_word_vocab" in config:
        policy.tokenizer = WordTokenizer(config["_word_vocab"])
    elif (directory / "tokenizer.json").is_file():
        policy.tokenizer = LlamaTokenizer(directory / "tokenizer.json")
    if adapter:
        load_adapter(policy, adapter, lora_rank, lora_alpha, lora_targets)
    elif lora_rank:
        policy.add_lora(lora_rank, lora_alpha, lora_targets)
    policy.gradient_checkpointing = gradient_checkpointing
    return policy.to(device).eval()  # there is no dropout: train() would change nothing


def read_config(backbone, directory):
    """config.json of a checkpoint, or the tiny preset. Refuses another backbone's."""
    config = read_json(directory / "config.json") if directory else json.loads(json.dumps(OPENVLA_TINY))
    kind = config.get("model_type", config.get("type"))
    kind = "openvla-tiny" if kind == "openvla" and "_word_vocab" in config else kind
    if kind != backbone:
        raise PolicyError(f"{directory} is a checkpoint of {kind}, not of the backbone {backbone}.")
    missing = {"text_config", "image_sizes", "timm_model_ids", "n_action_bins", "pad_to_multiple_of"} - config.keys()
    if missing:
        raise PolicyError(f"{directory / 'config.json'} lacks {', '.join(sorted(missing))}; it is not OpenVLA's.")
    return config


def read_norm_stats(config, directory, adapter):
    """The statistics of every data set, from all files that may hold some, and the key to use by default."""
    stats = config.get("norm_stats", {})
    key = "bridge_orig" if "bridge_orig" in stats else None
    for folder, name in [(directory, "dataset_statistics"), (directory, "norm_stats"), (adapter, "norm_stats")]:
        if folder and (folder / f"{name}.json").is_file():
            more = read_json(folder / f"{name}.json")
            stats = stats | more
            key = next(iter(more)) if name == "norm_stats" else key  # ours: it holds just the one it was trained with
    return stats, key or (next(iter(stats)) if len(stats) == 1 else None)


def load_weights(config, directory, dtype, device):
    """Check every name and shape on the meta device, then read each tensor straight to where it will live."""
    if directory is None:
        policy = OpenVLA(config)
        policy.init_from_scratch()
        for p in policy.parameters():
            p.data = p.data.to(dtype)
        policy.value_head.float()
        policy.init_value_head()
        return policy
    with torch.device("meta"):
        policy = OpenVLA(config)
    found = {key: entry for key, entry in open_tensors(directory, "model").items() if not policy.is_dead(key)}
    if (directory / "value_head.safetensors").is_file():
        found |= {f"value_head.{key}": entry for key, entry in open_tensors(directory, "value_head").items()}
    wanted = policy.state_dict()
    if not any(key.startswith("value_head.") for key in found):  # the published checkpoints have none: a fresh one
        wanted = {key: tensor for key, tensor in wanted.items() if not key.startswith("value_head.")}
        policy.value_head.to_empty(device=device)
        policy.init_value_head()
    check_tensors(found, wanted, directory)
    state = {}
    for key, (file, _) in found.items():
        is_value = key.startswith("value_head.")  # stays float32, as do the buffers: bfloat16 rotary frequencies are
        tensor = file.get_tensor(key.removeprefix("value_head.") if is_value else key)  # off by up to 0.35 rad
        state[key] = tensor.to(device, torch.float32 if is_value else dtype, copy=True)  # no view of the file remains
    policy.load_state_dict(state, strict=False, assign=True)
    llama = policy.language_model.model
    llama.rotary_emb = type(llama.rotary_emb)(llama.config).to(device)  # computed, not stored
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
            raise PolicyError(f"{directory} holds an adapter with LoRA {name} {own}, not {asked}; pass --lora-{name} so.")
    lora_config.inference_mode, lora_config.base_model_name_or_path = False, policy.name
    policy.add_lora(lora_config=lora_config)
    own = {key: tensor for key, tensor in policy.state_dict().items() if ".lora_" in key}
    found = {}
    for key, entry in open_tensors(directory, "adapter_model").items():
        key = key.removeprefix("base_model.model.")
        # PEFT 0.11 also wrote the frozen lm_head itself; adapters of dead modules have nothing to adapt here
        if not key.endswith(".base_layer.weight") and not policy.is_dead(key):
            found[key.removesuffix("weight") + "default.weight"] = entry
    check_tensors(found, own, directory)
    for key, (file, _) in found.items():
        own[key].copy_(file.get_tensor("base_model.model." + key.replace(".default.", ".")))
    if (directory / "value_head.safetensors").is_file():
        tensors = open_tensors(directory, "value_head")
        check_tensors(tensors, policy.value_head.state_dict(), directory / "value_head.safetensors")
        policy.value_head.load_state_dict({key: file.get_tensor(key) for key, (file, _) in tensors.items()})
    elif (directory / "training_state.pt").is_file():  # RL4VLA's: {"vh": the value head, and two optimizers}
        try:
            state = torch.load(directory / "training_state.pt", map_location="cpu", weights_only=True, mmap=True)["vh"]
        except (RuntimeError, UnpicklingError, KeyError) as error:
            raise PolicyError(f"{directory / 'training_state.pt'} is damaged or not RL4VLA's ({error!r}).") from None
        found = {key: (None, list(tensor.shape)) for key, tensor in state.items()}
        check_tensors(found, policy.value_head.state_dict(), directory / "training_state.pt")
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
        raise PolicyError(f"{checkpoint} is not an adapter (it has no adapter_config.json): nothing to merge.")
    rgb = torch.randint(256, (8, policy.image_size, policy.image_size, 3), dtype=torch.uint8)
    prompt = torch.tensor([[1, 3, 5]] * len(rgb), device=device)  # any ids do
    tokens = torch.randint(policy.action_begin, policy.action_end, (len(rgb), 7), device=device)
    inputs = policy.preprocess(rgb), prompt, torch.ones_like(prompt), tokens
    before = policy.action_logits(*inputs)
    for module in policy.modules():
        if isinstance(module, LoraLayer):
            module.merge()
    state = {key.replace(".base_layer.", "."): t for key, t in policy.state_dict().items() if ".lora_" not in key}
    value_head = {key.removeprefix("value_head."): state.pop(key) for key in list(state) if "value_head." in key}
    for key, (file, _) in open_tensors(policy.directory, "model").items():
        if policy.is_dead(key):  # the official class wants them, whatever they hold
            state[key] = file.get_tensor(key).to(options["dtype"])
    out.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(state, out, filename_pattern="model{suffix}.safetensors", max_shard_size="5GB")
    save_file(value_head, out / "value_head.safetensors", {"format": "pt"})
    policy._save_config(out)
    options["unnorm_key"] = policy.unnorm_key
    del policy, state, module  # two 7B models need not fit at once
    after = load_policy(backbone, out, **options).action_logits(*inputs)
    error = (after - before).abs()
    size = f"{error.max():.2g} at most, {error.mean():.2g} on average"
    print(f"{out}: logits differ by {size}; their std is {before.std():.2g}")
    if error.mean() > (1e-4 if dtype == "float32" else 0.3) * before.std():
        raise PolicyError(f"{out} does not compute what {checkpoint} does; do not use it.")


if __name__ == "__main__":
    try:
        tyro.extras.subcommand_cli_from_dict({"merge": merge})
    except PolicyError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
