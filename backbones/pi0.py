"""The network of pi0 and pi0.5 (openpi): SigLIP -> Gemma, and a small action expert that reads
Gemma's keys and values. policies.FlowPolicy makes actions of it.

Parameter names are openpi's, and RLinf's for the value head. So Gemma's embedding is "lm_head".
"""

import copy
import math
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GemmaConfig, SiglipVisionConfig
from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer, GemmaRMSNorm
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from backbones.files import check_types, open_tensors, save_policy
from backbones.layers import (
    STEP_BOUNDS,
    forward_layer,
    grey_levels,
    grid_waves,
    keep_variance,
    patch_embedding,
    where_heads_look,
)
from backbones.lora import add_lora
from backbones.statistics import columns
from backbones.tokenizers import (
    FLAT_VOCAB,
    WORD_PROMPT,
    WORD_VOCAB,
    PaliGemmaTokenizer,
    check_tokenizer,
)
from runtime import Fault, read_json

PI = {  # of the official models; a checkpoint's config.json may say otherwise
    "image_size": 224, "patch": 14, "vis_width": 1152, "vis_depth": 27, "vis_heads": 16,
    "vis_mlp": 4304,
    "vocab": 257152, "depth": 18, "heads": 8, "kv_heads": 1, "head_dim": 256, "rope_theta": 10000.0,
    "vlm_width": 2048, "vlm_mlp": 16384, "exp_width": 1024, "exp_mlp": 4096,
    "layer_norm_eps": 1e-6, "rms_norm_eps": 1e-6, "time_min_period": 4e-3, "time_max_period": 4.0,
    "action_dim": 32, "action_env_dim": 7, "gripper_threshold": 0.5, "discrete_state_input": False,
    "action_horizon": 8, "action_chunk": 5, "num_denoise_steps": 4, "noise_level": 0.5,
    "sde_steps": "one",
    "camera_aspect": 4 / 3,  # of the camera; the environment squashes its picture into a square
    "prompt": None, "stem": None,  # ours: another prompt format, strided convs before the patches
}  # fmt: skip
PI_KIND = {  # what pi0 and pi0.5 do not share
    "pi0": {"max_token_len": 48, "value_head_hidden": [512, 256, 128]},
    "pi05": {"max_token_len": 200, "value_head_hidden": [1024, 512, 256]},
}
# OPEN: "LoRA on all linear layers" (A.2) is RLinf's list, every linear layer of SigLIP and of
# Gemma. The projector between them has no adapter and stays as it is.
PI_LORA_TARGETS = [
    "q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "fc1", "fc2",
    "gate_proj", "up_proj", "down_proj",
]  # fmt: skip

PI05_TINY = {
    "image_size": 96, "patch": 16, "stem": [24, 48, 96],
    "vis_width": 128, "vis_depth": 2, "vis_heads": 4, "vis_mlp": 256,
    "vocab": 128, "depth": 3, "heads": 4, "kv_heads": 4, "head_dim": 32,
    "vlm_width": 128, "vlm_mlp": 256, "exp_width": 128, "exp_mlp": 256,
    "value_head_hidden": [256, 128],
    "action_dim": 7, "gripper_threshold": 0.0, "camera_aspect": 1.0,
    "prompt": WORD_PROMPT, "_word_vocab": WORD_VOCAB,
    "norm_stats": {"builtin": {"actions": STEP_BOUNDS}},
}  # fmt: skip
PI05_FLAT = PI05_TINY | {  # 32 x 32 pixels
    "image_size": 32, "patch": 8, "stem": [16, 32],
    "vis_width": 48, "vis_depth": 1, "vis_heads": 2, "vis_mlp": 96,
    "vocab": 32, "depth": 2, "heads": 2, "kv_heads": 2, "head_dim": 24,
    "vlm_width": 48, "vlm_mlp": 96, "exp_width": 48, "exp_mlp": 96,
    "value_head_hidden": [64, 64],
    "action_horizon": 1, "action_chunk": 1, "noise_level": 0.4,
    "_backbone": "pi05-flat", "_word_vocab": FLAT_VOCAB,
    "norm_stats": {"flat": {"actions": STEP_BOUNDS}},
}  # fmt: skip


def nested(tree):
    """Modules in dicts of dicts -> nn.ModuleDict."""
    parts = {k: nested(part) if isinstance(part, dict) else part for k, part in tree.items()}
    return nn.ModuleDict(parts)


class Recorder(dict):
    """Stands where GemmaAttention expects a cache: keeps each layer's rotated keys and values."""

    def update(self, k, v, layer_idx):
        self.setdefault(layer_idx, (k, v))  # checkpointing comes again, with a graph of its own
        return k, v


class Prefix(NamedTuple):
    """What the VLM made of an observation, once for all denoise steps."""

    hidden: torch.Tensor  # (B, P, W) after the final norm; rows of padding mean nothing
    mask: torch.Tensor  # (B, P) bool: False is padding
    kv: Recorder  # per layer: keys and values (B, kv_heads, P, head_dim)

    def take(self, inds):
        kv = Recorder({i: (k[inds], v[inds]) for i, (k, v) in self.kv.items()})
        return Prefix(self.hidden[inds], self.mask[inds], kv)

    def update(self, k, v, layer_idx):
        """As the expert's cache: its own keys behind the VLM's. Nothing is stored."""
        pairs = zip(self.kv[layer_idx], (k, v))
        return tuple(torch.cat([old.to(new.dtype), new], 2) for old, new in pairs)


class AdaRMSNorm(nn.Module):
    """RMS norm with scale, shift and gate from a condition: (B, n, D), (B, D) -> (B, n, D), gate
    (B, 1, D)."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps, self.dense = eps, nn.Linear(dim, 3 * dim)
        nn.init.zeros_(self.dense.weight)
        nn.init.zeros_(self.dense.bias)

    def forward(self, x, cond):
        scale, shift, gate = self.dense(cond)[:, None].chunk(3, -1)
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * (1 + scale) + shift, gate


class AdaDecoderLayer(GemmaDecoderLayer):
    """A layer of pi0.5's expert: Gemma's, with conditioned norms and gated residual branches."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.input_layernorm = AdaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = AdaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cond, **kwargs):
        y, gate = self.input_layernorm(x, cond)
        x = x + gate * self.self_attn(y, **kwargs)[0]
        y, gate = self.post_attention_layernorm(x, cond)
        return x + gate * self.mlp(y)


class Pi0Network(nn.Module):
    """pi0 and pi0.5. t = 1 is noise, t = 0 the action.

    SigLIP and Gemma read images and prompt once (`prefix`). A small expert of the same depth reads
    their keys and values and gives the velocity v(x, t) of a chunk of H actions (`velocity`). The
    VLM runs in the backbone's dtype, all that follows in float32. Leave TF32 off, as torch does: it
    would round a velocity by 5e-4, and a log-prob by up to 1e-2.
    """

    # What load_policy and merge ask of a class
    small_configs = {"pi05-tiny": PI05_TINY, "pi05-flat": PI05_FLAT}  # start from random weights
    settings = {  # flags that change the config: {flag: field}
        "horizon": "action_horizon", "replan": "action_chunk", "noise_level": "noise_level",
        "denoise_steps": "num_denoise_steps", "sde_steps": "sde_steps",
    }  # fmt: skip
    config_needs_weights = True  # only the names of its tensors say which model a checkpoint is of
    needs_norm_stats = False  # without any, a checkpoint can be loaded, but not act
    tokenizer_class = PaliGemmaTokenizer
    lora_targets, lora_excludes = PI_LORA_TARGETS, r".*\bgemma_expert\..*"
    saves_config = True  # beside an adapter, too: horizon and replan are part of the policy
    save = save_policy
    add_lora = add_lora

    name = commit = directory = None  # where it comes from
    tokenizer = tokenizer_file = lora_config = unnorm_key = None
    gradient_checkpointing = False

    def __init__(self, config):
        super().__init__()
        self.config, self.centers_and_scales = config, {}
        c = SimpleNamespace(**config)
        self.pi05 = c.model_type == "pi05"
        self.image_size, self.chunk, self.horizon = c.image_size, c.action_chunk, c.action_horizon
        # How openpi gets there from 640 x 480 (scenes/task.py); a small model's frames are drawn so
        self.resize = None if "_word_vocab" in config else "keep"
        self.num_steps, self.noise_level = c.num_denoise_steps, c.noise_level
        vision = SiglipVisionConfig(
            hidden_size=c.vis_width,
            intermediate_size=c.vis_mlp,
            num_attention_heads=c.vis_heads,
            layer_norm_eps=c.layer_norm_eps,
            attn_implementation="sdpa",
        )

        def decoder(layer, norm, width, mlp):
            gemma = GemmaConfig(
                hidden_size=width,
                intermediate_size=mlp,
                num_attention_heads=c.heads,
                num_key_value_heads=c.kv_heads,
                head_dim=c.head_dim,
                rms_norm_eps=c.rms_norm_eps,
                attn_implementation="sdpa",
            )
            layers = nn.ModuleList(layer(gemma, i) for i in range(c.depth))
            return {"layers": layers, "norm": norm(width, eps=c.rms_norm_eps)}

        plain = GemmaDecoderLayer, GemmaRMSNorm
        conditioned = (AdaDecoderLayer, AdaRMSNorm) if self.pi05 else plain
        tower = {
            "embeddings": {
                "patch_embedding": patch_embedding(c.patch, c.vis_width, c.stem),
                "position_embedding": nn.Embedding((c.image_size // c.patch) ** 2, c.vis_width),
            },
            "encoder": {
                "layers": nn.ModuleList(SiglipEncoderLayer(vision) for _ in range(c.vis_depth))
            },
            "post_layernorm": nn.LayerNorm(c.vis_width, eps=c.layer_norm_eps),
        }
        paligemma = {
            "model": {
                "vision_tower": {"vision_model": tower},
                "multi_modal_projector": {"linear": nn.Linear(c.vis_width, c.vlm_width)},
                "language_model": decoder(*plain, c.vlm_width, c.vlm_mlp),
            },
            "lm_head": nn.Embedding(c.vocab, c.vlm_width),
        }
        expert = {"model": decoder(*conditioned, c.exp_width, c.exp_mlp)}
        self.paligemma_with_expert = nested({"paligemma": paligemma, "gemma_expert": expert})
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
        self.detach_value = False

    @property
    def device(self):
        return self.action_in_proj.weight.device

    @property
    def dtype(self):
        return self.word_embeddings().dtype

    @property
    def paligemma(self):
        return self.paligemma_with_expert["paligemma"]

    @property
    def tower(self):
        return self.paligemma["model"]["vision_tower"]["vision_model"]

    @property
    def detach_value(self):
        return self._detach_value

    @detach_value.setter
    def detach_value(self, detach):
        """Freezes what is idle: the actions read only keys and values of the VLM's last layer, so
        that the rest of it learns through pi0.5's critic or not at all."""
        self._detach_value, idle = detach, detach or not self.pi05
        parts = ("self_attn.q_proj", "self_attn.o_proj", "mlp", "post_attention_layernorm")
        last = f"language_model.layers.{self.config['depth'] - 1}."
        names = (*(last + part for part in parts), "language_model.norm.")
        for key, p in self.named_parameters():
            if any(name in key for name in names):
                p.requires_grad_(not idle and (self.lora_config is None or ".lora_" in key))

    # -------------------------------------------------------------------- loading
    @classmethod
    def read_config(cls, backbone, directory, adapter, settings):
        """The official sizes and settings, what a config.json says otherwise, then `settings`.
        The tensors say whether it is pi0 or pi0.5."""
        known = PI | PI_KIND["pi05"]  # as pi0's, but for values
        types = {key: type(value) for key, value in known.items() if value is not None}
        if directory is None:
            file, kind = copy.deepcopy(cls.small_configs[backbone]), "pi05"
        else:
            file = {}
            for folder in filter(None, (directory, adapter)):
                if (folder / "config.json").is_file():
                    content = read_json(folder / "config.json")
                    check_types(content, types, folder / "config.json")
                    if "action_chunk" not in content:  # openpi's: the horizon before RL
                        content.pop("action_horizon", None)
                    file |= content
            keys = {cls.rename(key) for key in open_tensors(directory, "model")}
            signs = "action_time_mlp_in.weight" in keys, "time_mlp_in.weight" in keys
            kind = {(True, False): "pi0", (False, True): "pi05"}.get(signs, "neither pi0 nor pi05")
        found = file.get("_backbone", kind + "-tiny") if "_word_vocab" in file else kind
        if found != backbone:
            raise Fault(f"{directory} is a checkpoint of {found}, not of the backbone {backbone}")
        ours = (*known, "norm_stats", "_word_vocab", "_backbone")
        config = PI | PI_KIND[kind] | {key: file[key] for key in file if key in ours}
        config |= {cls.settings[name]: value for name, value in settings.items()}
        config["model_type"] = kind
        if config["action_chunk"] > config["action_horizon"]:
            raise Fault("--replan must be 1 to --horizon")
        if not config["noise_level"] > 0:
            raise Fault("--noise-level must be positive")
        if config["sde_steps"] not in ("one", "all"):
            raise Fault("--sde-steps must be one or all")
        return config

    @staticmethod
    def rename(key):
        """The name here of a checkpoint's tensor. lerobot puts "model." in front, and the tied
        embedding has two names."""
        key = key.removeprefix("model.")
        return key.replace(".model.language_model.embed_tokens.", ".lm_head.")

    def is_unused(self, key):
        """Tensors of no computation: the expert's lm_head, and Flow-Noise's head."""
        return key.startswith(("paligemma_with_expert.gemma_expert.lm_head.", "noise_head."))

    def keeps_float32(self, key):
        """All but the VLM's matrices and SigLIP's norms."""
        # DEVIATION: openpi and RLinf have the action expert's matrices in bfloat16, too. They give
        # likelihoods and KLs
        exact = (".embeddings.", ".input_layernorm.", ".post_attention_layernorm.", "model.norm.")
        return ".paligemma." not in key or any(part in key for part in exact)

    def in_adapter(self, key):
        """What training changes where there are adapters: those, and the whole action expert."""
        return ".lora_" in key or not (".paligemma." in key or key.startswith("value_head."))

    def init_buffers(self, device):
        """Nothing: every buffer is computed where it is needed."""

    def init_from_scratch(self):
        """What pretraining has done for the official models (see OpenVLANetwork's)."""
        keep_variance(self.modules())
        for module in self.modules():
            if isinstance(module, AdaRMSNorm):  # starts as a plain norm with an open gate
                nn.init.zeros_(module.dense.weight)
                module.dense.bias.data[-module.dense.in_features :] = 1.0
        nn.init.normal_(self.word_embeddings(), std=self.config["vlm_width"] ** -0.5)
        position = self.tower["embeddings"]["position_embedding"].weight
        position.data = grid_waves(*position.shape)
        # attention starts by content
        for layer in self.paligemma["model"]["language_model"]["layers"]:
            layer.self_attn.k_proj.weight.data.copy_(layer.self_attn.q_proj.weight)

    def init_value_head(self):
        """As RLinf: Kaiming-normal (fan out), the last layer N(0, 0.02), zero biases."""
        *hidden, last = [m for m in self.value_head["mlp"] if isinstance(m, nn.Linear)]
        for layer in hidden:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(last.weight, std=0.02)
        for layer in [*hidden, last]:
            nn.init.zeros_(layer.bias)

    # -------------------------------------------------------------------- inputs
    @property
    def reads_state(self):
        """RLinf's pi0.5 for ManiSkill sees the image alone."""
        return not self.pi05 or self.config["discrete_state_input"]

    def preprocess(self, images_uint8):
        """(B, H, W, 3) uint8 -> (B, 3, S, S) float32 in [-1, 1]: the aspect ratio is kept, black
        fills the rest (openpi). A square picture was squashed, and gets the camera's ratio back."""
        x, size = grey_levels(images_uint8, self.device), self.image_size
        height, width = x.shape[-2:]
        if height == width:
            height = width / self.config["camera_aspect"]
        scale = max(height, width) / size
        height, width = int(height / scale), int(width / scale)
        if x.shape[-2:] != (size, size) or height != width:
            x = F.interpolate(x, (height, width), mode="bilinear", antialias=True)
            top, left = (size - height) // 2, (size - width) // 2
            x = x.clamp(0, 255).round()
            x = F.pad(x, (left, size - width - left, top, size - height - top))
        return x / 127.5 - 1

    def prompt_pieces(self, instruction, state=None, prompt=None):
        """What the tokenizer is given, piece by piece. For one instruction: see `tokenize`."""
        if prompt or self.config["prompt"]:
            return [(prompt or self.config["prompt"]).format(instruction=instruction)]
        text = instruction.strip().replace("_", " ").replace("\n", " ")
        if state is None:
            return [text, "\n"]
        edges = torch.linspace(-1, 1, 257, dtype=torch.float64)[:-1]
        bins = torch.bucketize(state.double().cpu(), edges, right=True) - 1  # 0 ... 255; -1 below
        return [f"Task: {text}, State: {' '.join(map(str, bins.tolist()))};\nAction: "]

    def tokenize(self, instructions, prompt=None, state=None):
        """List of B str -> tokens (B, L), token_mask (B, L) bool on the CPU, padded on the right.

        state (B, S) normalised: pi0.5 with discrete_state_input reads it in its prompt, in 256
        bins. prompt: another format than the checkpoint's, with {instruction} in it.
        """
        check_tokenizer(self.tokenizer, self.tokenizer_class, self.name)
        rows, limit = [], self.config["max_token_len"]
        for i, instruction in enumerate(instructions):
            pieces = self.prompt_pieces(instruction, None if state is None else state[i], prompt)
            ids = self.tokenizer(pieces[0])
            ids += [i for piece in pieces[1:] for i in self.tokenizer(piece)[1:]]  # one BOS
            if len(ids) > limit:
                raise Fault(f"the prompt {pieces} has {len(ids)} tokens, more than {limit}")
            rows.append(ids)
        tokens = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        return tokens.to(self.device), torch.arange(tokens.shape[1]) < lengths[:, None]

    def use_norm_stats(self, key, file="norm_stats"):
        """Choose the data set whose statistics scale states and actions: by mean and std for pi0,
        quantiles for pi0.5."""
        self.unnorm_key, self.centers_and_scales = key, {}
        names = ("q01", "q99") if self.pi05 else ("mean", "std")
        where, stats = f"{file}, {key}", self.config["norm_stats"][key]
        for name in ("actions", "state") if self.reads_state else ("actions",):
            low, high = columns(stats, where, name, names)
            n = min(len(low), len(high))
            both = torch.stack([low[:n], high[:n]], 1)  # (n, 2)
            if name == "actions":
                dims = self.config["action_env_dim"]
                # beyond them openpi pads up to the model's width, always with the same numbers
                if len(both) < dims or (both[dims:] != both[-1]).any():
                    raise Fault(
                        f"{where}: {len(both)} dimensions of actions, not {dims}: another robot's?"
                    )
            else:  # how many there are shows when there is a state; padding is 0
                dims = max((i + 1 for i, pair in enumerate(both) if pair.any()), default=0)
            low, high = both[:dims].unbind(1)
            spread = high - low if self.pi05 else high
            for dim, x in enumerate(spread.tolist()):
                if x <= 0:
                    what = "q99 - q01" if self.pi05 else "std"
                    raise Fault(
                        f"{where}: dimension {dim} of {name} has no spread ({what} is {x:g}), so "
                        "it cannot be scaled; widen it there"
                    )
            scale = (spread + 1e-6) / 2 if self.pi05 else spread + 1e-6
            self.centers_and_scales[name] = (low + scale if self.pi05 else low, scale)

    def center_and_scale(self, name, dims):
        """Centre and scale (dims,) float64 of `name`."""
        if not self.centers_and_scales:
            raise Fault(
                f"{self.name} has no norm_stats.json, so it cannot scale actions; "
                "put its data set's there"
            )
        center, scale = self.centers_and_scales[name]
        if len(center) < dims:
            raise Fault(
                f"norm_stats.json of {self.name} knows {len(center)} dimensions of {name}, "
                f"not {dims}"
            )
        return center[:dims], scale[:dims]

    def normalize(self, name, x):
        """("state" or "actions", (..., n) in its units) -> (..., D) float64: scaled, then zeros up
        to the model's width."""
        center, scale = self.center_and_scale(name, x.shape[-1])
        x = (x.double().cpu() - center) / scale
        return F.pad(x, (0, self.config["action_dim"] - x.shape[-1]))

    def unnormalize(self, x):
        """Actions of the model (..., D) -> (..., 7) float64 in the units of the data."""
        center, scale = self.center_and_scale("actions", self.config["action_env_dim"])
        return x[..., : len(center)].double().cpu() * scale + center

    # ---------------------------------------------------------- from pixels and words to velocities
    def rotary(self, positions, like):
        """positions (B, n) -> cos, sin (B, n, head_dim) like `like`, computed in float32."""
        d = self.config["head_dim"]
        freq = self.config["rope_theta"] ** (-torch.arange(0, d, 2, device=positions.device) / d)
        angle = (positions[..., None] * freq).repeat(1, 1, 2)
        return angle.cos().to(like), angle.sin().to(like)

    def see(self, images):
        """(n, 3, S, S) in [-1, 1] -> (n, patches, W): SigLIP and the projector."""
        embeddings = self.tower["embeddings"]  # in float32
        position = embeddings["position_embedding"].weight
        x = embeddings["patch_embedding"](images.to(position.dtype))
        x = (x.flatten(2).transpose(1, 2) + position).to(self.dtype)
        for layer in self.tower["encoder"]["layers"]:
            x = forward_layer(layer, x, self.gradient_checkpointing, attention_mask=None)
        norm, projector = self.vision_parts()
        return projector(norm(x))

    def prefix(self, images, image_masks, tokens, token_mask):
        """What the actions are conditioned on. images (B, C, 3, S, S) in [-1, 1] of C cameras,
        image_masks (B, C) bool, tokens (B, L) ids, token_mask (B, L) bool -> Prefix of [camera 0 |
        camera 1 ... | prompt]. The masks may be on the CPU.

        Cameras that no sample has and padding beyond the longest prompt are not computed at all
        (openpi computes three cameras and 200 tokens, 3.3 times the arithmetic).
        """
        cameras, words = image_masks.any(0), token_mask.any(0)
        images, there = images[:, cameras], image_masks[:, cameras]
        tokens, token_mask = tokens[:, words], token_mask[:, words]
        seen = self.see(images.flatten(0, 1)).unflatten(0, there.shape)  # (B, C, T, W)
        words = self.paligemma["lm_head"](tokens) * self.config["vlm_width"] ** 0.5
        x = torch.cat([seen.flatten(1, 2), words], 1)
        mask = torch.cat([there.repeat_interleave(seen.shape[2], 1), token_mask], 1)
        mask = mask.to(x.device)  # (B, P)
        kv = Recorder()
        inputs = {
            "attention_mask": mask[:, None, None],  # everything sees everything
            "position_embeddings": self.rotary(mask.cumsum(1) - 1, x),  # padding does not count
            "past_key_values": kv,
        }
        gemma = self.paligemma["model"]["language_model"]
        for layer in gemma["layers"]:
            x = forward_layer(layer, x, self.gradient_checkpointing, **inputs)
        return Prefix(gemma["norm"](x), mask, kv)

    def observe(self, obs, instructions, prompt=None):
        """-> Prefix, state (B, D) or None."""
        state = in_prompt = None
        if self.reads_state:
            state = self.normalize("state", obs["state"]).float().to(self.device)
        if self.config["discrete_state_input"]:
            in_prompt = state[:, : obs["state"].shape[1]]
        images = self.preprocess(obs["rgb"])[:, None]  # one camera
        there = torch.ones(len(images), 1, dtype=torch.bool)
        return self.prefix(images, there, *self.tokenize(instructions, prompt, in_prompt)), state

    def time_embedding(self, t):
        """(B,) -> (B, W) sines and cosines. The fastest has a frequency of 1571: float32 would be
        3e-4 off in v."""
        low, high = self.config["time_min_period"], self.config["time_max_period"]
        count = self.config["exp_width"] // 2
        fraction = torch.linspace(0, 1, count, dtype=torch.float64, device=t.device)
        angle = 2 * math.pi * t.double()[:, None] / (low * (high / low) ** fraction)
        return torch.cat([angle.sin(), angle.cos()], 1).float()

    def expert(self, prefix, state, x, t):
        """The expert's last hidden states (B, H, W) of the H actions x (B, H, D) at time t: a
        number, or (B,)."""
        t = torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(len(x))
        time, h = self.time_embedding(t), self.action_in_proj(x)  # (B, W), (B, H, W)
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
        visible = torch.cat([visible, own.expand(len(h), -1, -1)], 2)[:, None]  # (B, 1, n, P + n)
        positions = prefix.mask.sum(1, keepdim=True) + torch.arange(len(own), device=own.device)
        inputs = {
            "attention_mask": visible,
            "position_embeddings": self.rotary(positions, h),
            "past_key_values": prefix,
        }
        expert = self.paligemma_with_expert["gemma_expert"]["model"]
        for layer in expert["layers"]:
            h = layer(h, **condition, **inputs)
        h = expert["norm"](h, *condition.values())
        return (h[0] if self.pi05 else h)[:, -x.shape[1] :]  # no gate after the last norm

    def velocity(self, prefix, state, x, t):
        """v(x, t) (B, H, D) float32. state (B, D) normalised, read by pi0 only; x (B, H, D); t a
        number or (B,)."""
        return self.action_out_proj(self.expert(prefix, state, x, t))

    def value(self, features):
        """(B, W) float32 -> (B,)."""
        features = features.detach() if self.detach_value else features
        return self.value_head["mlp"](features).squeeze(-1)

    def prefix_value(self, prefix):
        """pi0.5's critic, (B,): it reads the mean over the prefix without its padding."""
        # OPEN: the value loss also trains the VLM's adapters, as in RLinf, unless detach_value.
        # DEVIATION: RLinf's first code for pi0.5 averages padding, too; its later code does not.
        weight = prefix.mask[..., None].float()
        return self.value((prefix.hidden.float() * weight).sum(1) / weight.sum(1))

    # ---------------------------------------------------------- what sft.py teaches besides actions
    def look(self, rgb):
        self.see(self.preprocess(rgb))

    def vision_parts(self):
        projector = self.paligemma["model"]["multi_modal_projector"]["linear"]
        return [self.tower["post_layernorm"], projector]

    def word_embeddings(self):
        return self.paligemma["lm_head"].weight

    def watch_pointing(self, hook):
        def look(layer, inputs, options):
            x, _ = layer.input_layernorm(inputs[0], options["cond"])
            keys, _ = options["past_key_values"].kv[layer.self_attn.layer_idx]
            patches = self.tower["embeddings"]["position_embedding"].num_embeddings
            hook(where_heads_look(layer, x, options, keys)[..., :patches])

        layer = self.paligemma_with_expert["gemma_expert"]["model"]["layers"][1]
        return [layer.register_forward_pre_hook(look, with_kwargs=True)]
