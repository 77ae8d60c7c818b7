"""The network of pi0 and pi0.5 (openpi): SigLIP -> Gemma, and a small action expert that reads
Gemma's keys and values.

Parameter names are openpi's, with RLinf's value_head; the VLM's embedding is called lm_head, as
there. The head that makes actions of it is policies.FlowPolicy.
"""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import nn
from transformers import GemmaConfig, SiglipVisionConfig
from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer, GemmaRMSNorm
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from backbones.files import check_types, open_tensors, read_object, save_policy
from backbones.layers import (
    STEP_BOUNDS,
    forward_layer,
    grey_levels,
    grid_waves,
    keep_variance,
    patch_embedding,
)
from backbones.lora import inject_lora
from backbones.statistics import check_columns, columns
from backbones.tokenizers import FLAT_VOCAB, WORD_PROMPT, WORD_VOCAB, PaliGemmaTokenizer
from runtime import Fault

PI = {  # sizes and settings of the official models; a checkpoint's config.json may say otherwise
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
FLOW_SETTINGS = {  # flags of ppo_pair.py, and what config.json calls them
    "horizon": "action_horizon", "replan": "action_chunk", "denoise_steps": "num_denoise_steps",
    "noise_level": "noise_level", "sde_steps": "sde_steps",
}  # fmt: skip
# OPEN: "LoRA on all linear layers" (Table 3) is RLinf's list, every linear layer of SigLIP and of
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
    "image_size": 32, "patch": 8, "stem": [24, 48],
    "vis_width": 64, "vis_depth": 1, "vis_heads": 4, "vis_mlp": 128,
    "vocab": 32, "depth": 2, "head_dim": 16,
    "vlm_width": 64, "vlm_mlp": 128, "exp_width": 64, "exp_mlp": 128,
    "action_horizon": 1, "action_chunk": 1,
    "_backbone": "pi05-flat", "_word_vocab": FLAT_VOCAB,
    "norm_stats": {"flat": {"actions": STEP_BOUNDS}},
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
        kv = Recorder({i: (k[inds], v[inds]) for i, (k, v) in self.kv.items()})
        return Prefix(self.hidden[inds], self.mask[inds], kv)

    def update(self, k, v, layer_idx):
        """The expert's cache: its own keys behind the VLM's. Nothing is stored, so it serves any
        number of steps."""
        pairs = zip(self.kv[layer_idx], (k, v))
        return tuple(torch.cat([old.to(new.dtype), new], 2) for old, new in pairs)


class AdaRMSNorm(nn.Module):
    """RMS norm with scale, shift and gate from a condition: (B, n, D), (B, D) -> (B, n, D), gate
    (B, 1, D). Float32."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps, self.dense = eps, nn.Linear(dim, 3 * dim)
        nn.init.zeros_(self.dense.weight)
        nn.init.zeros_(self.dense.bias)

    def forward(self, x, cond):
        scale, shift, gate = self.dense(cond)[:, None].chunk(3, -1)
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * (1 + scale) + shift, gate


class AdaDecoderLayer(GemmaDecoderLayer):
    """A layer of pi0.5's expert: Gemma's, but its norms are conditioned and its residual branches
    gated."""

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
    VLM runs in the backbone's dtype; the expert (under 2 % of the arithmetic) and all that follows
    in float32. TF32 would round a velocity by 5e-4, and a log-prob, a sum over 35 elements divided
    by a small std, by up to 1e-2: leave it off, as torch does.
    """

    # What load_policy and merge need to know of a network
    small_configs = {"pi05-tiny": PI05_TINY, "pi05-flat": PI05_FLAT}  # start from random weights
    settings = FLOW_SETTINGS  # flags that change the config: {flag: field}
    config_needs_weights = True  # only the names of its tensors say which model a checkpoint is of
    needs_norm_stats = False  # without any, a checkpoint can be loaded, but not act
    tokenizer_class = PaliGemmaTokenizer
    lora_targets = PI_LORA_TARGETS
    saves_config = (
        True  # beside an adapter, too: horizon, replan and the rest are part of the policy
    )

    stats_file = "norm_stats"  # where the statistics in use are from
    gradient_checkpointing = False
    save = save_policy

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.name, self.commit, self.directory = config["model_type"], None, None  # its origin
        c = SimpleNamespace(**config)
        self.pi05 = c.model_type == "pi05"
        self.image_size, self.chunk, self.horizon = c.image_size, c.action_chunk, c.action_horizon
        # How openpi gets there from 640 x 480 (scenes/task.py); a small model's frames are drawn so
        self.resize = None if "_word_vocab" in config else "keep"
        self.num_steps, self.noise_level = c.num_denoise_steps, c.noise_level
        self.unnorm_key, self.centers_and_scales, self._detach_value = None, {}, False
        vision = SiglipVisionConfig(
            hidden_size=c.vis_width,
            intermediate_size=c.vis_mlp,
            num_attention_heads=c.vis_heads,
            layer_norm_eps=c.layer_norm_eps,
            attn_implementation="sdpa",
        )

        def gemma(width, mlp):
            return GemmaConfig(
                hidden_size=width,
                intermediate_size=mlp,
                num_attention_heads=c.heads,
                num_key_value_heads=c.kv_heads,
                head_dim=c.head_dim,
                rms_norm_eps=c.rms_norm_eps,
                attn_implementation="sdpa",
            )

        def decoder(layer, norm, config):
            layers = nn.ModuleList(layer(config, i) for i in range(c.depth))
            norm = norm(config.hidden_size, eps=c.rms_norm_eps)
            return nn.ModuleDict({"layers": layers, "norm": norm})

        embeddings = {
            "patch_embedding": patch_embedding(c.patch, c.vis_width, c.stem),
            "position_embedding": nn.Embedding((c.image_size // c.patch) ** 2, c.vis_width),
        }
        layers = nn.ModuleList(SiglipEncoderLayer(vision) for _ in range(c.vis_depth))
        tower = nn.ModuleDict(
            {
                "embeddings": nn.ModuleDict(embeddings),
                "encoder": nn.ModuleDict({"layers": layers}),
                "post_layernorm": nn.LayerNorm(c.vis_width, eps=c.layer_norm_eps),
            }
        )
        plain = GemmaDecoderLayer, GemmaRMSNorm
        parts = {
            "vision_tower": nn.ModuleDict({"vision_model": tower}),
            "multi_modal_projector": nn.ModuleDict({"linear": nn.Linear(c.vis_width, c.vlm_width)}),
            "language_model": decoder(*plain, gemma(c.vlm_width, c.vlm_mlp)),
        }
        words = nn.Embedding(c.vocab, c.vlm_width)
        kinds = (AdaDecoderLayer, AdaRMSNorm) if self.pi05 else plain
        expert = decoder(*kinds, gemma(c.exp_width, c.exp_mlp))
        self.paligemma_with_expert = nn.ModuleDict(
            {
                "paligemma": nn.ModuleDict({"model": nn.ModuleDict(parts), "lm_head": words}),
                "gemma_expert": nn.ModuleDict({"model": expert}),
            }
        )
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
        self.tokenizer, self.tokenizer_file, self.prompt_ids = None, None, {}
        self.lora_config = None
        self.detach_value = False

    @property
    def device(self):
        return self.action_in_proj.weight.device

    @property
    def dtype(self):
        return self.paligemma_with_expert["paligemma"]["lm_head"].weight.dtype

    @property
    def detach_value(self):
        """True: the critic reads the trunk but does not train it."""
        return self._detach_value

    @detach_value.setter
    def detach_value(self, detach):
        """The actions read only keys and values of the VLM's last layer.

        The rest of that layer learns through pi0.5's critic or not at all.
        """
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
        """Sizes and settings: the official ones, what a config.json says otherwise, then
        `settings`. pi0 or pi0.5: by tensors."""
        defaults = PI | PI_KIND["pi05"]  # of a type that pi0's have, too
        types = {key: type(value) for key, value in defaults.items() if value is not None}
        if directory is None:
            file, kind = copy.deepcopy(cls.small_configs[backbone]), "pi05"
        else:
            file = {}
            for folder in filter(None, (directory, adapter)):
                if (folder / "config.json").is_file():
                    content = read_object(folder / "config.json")
                    check_types(content, types, folder / "config.json")
                    file |= content
            keys = {cls.rename(key) for key in open_tensors(directory, "model")}
            signs = "action_time_mlp_in.weight" in keys, "time_mlp_in.weight" in keys
            kind = {(True, False): "pi0", (False, True): "pi05"}.get(signs, "neither pi0 nor pi05")
        found = file.get("_backbone", kind + "-tiny") if "_word_vocab" in file else kind
        if found != backbone:
            raise Fault(f"{directory} is a checkpoint of {found}, not of the backbone {backbone}")
        known = PI | PI_KIND[kind]
        ours = (*known, "norm_stats", "_word_vocab", "_backbone")
        config = known | {key: value for key, value in file.items() if key in ours}
        config |= {"model_type": kind}
        config |= {FLOW_SETTINGS[name]: value for name, value in settings.items()}
        replan, horizon = config["action_chunk"], config["action_horizon"]
        for wrong, sentence in (
            (not 1 <= replan <= horizon, "--replan must be 1 to --horizon"),
            (config["num_denoise_steps"] < 1, "--denoise-steps must be at least 1"),
            (not config["noise_level"] > 0, "--noise-level must be positive"),
            (config["sde_steps"] not in ("one", "all"), "--sde-steps must be one or all"),
        ):
            if wrong:
                raise Fault(sentence)
        return config

    @staticmethod
    def rename(key):
        """The name here of a checkpoint's tensor: lerobot puts "model." in front; the tied
        embedding has two names."""
        key = key.removeprefix("model.")
        return key.replace(".model.language_model.embed_tokens.", ".lm_head.")

    def is_unused(self, key):
        """Tensors that are in the files but in no computation: the expert's lm_head, and
        Flow-Noise's head."""
        return key.startswith(("paligemma_with_expert.gemma_expert.lm_head.", "noise_head."))

    def keeps_float32(self, key):
        """All but the VLM's matrices and SigLIP's norms, as openpi and RLinf have it."""
        exact = (".embeddings.", ".input_layernorm.", ".post_attention_layernorm.", "model.norm.")
        return ".paligemma." not in key or any(part in key for part in exact)

    def in_adapter(self, key):
        """What training changes where there are adapters: those, and the whole action expert."""
        return ".lora_" in key or not (".paligemma." in key or key.startswith("value_head."))

    def init_buffers(self, device):
        """Nothing: every buffer is computed where it is needed."""

    def init_from_scratch(self):
        """What pretraining has done for the official models: the image reaches the actions (see
        OpenVLA's)."""
        keep_variance(self.modules())
        for module in self.modules():
            if isinstance(module, AdaRMSNorm):  # starts as a plain norm with an open gate
                nn.init.zeros_(module.dense.weight)
                module.dense.bias.data[-module.dense.in_features :] = 1.0
        paligemma = self.paligemma_with_expert["paligemma"]
        nn.init.normal_(paligemma["lm_head"].weight, std=self.config["vlm_width"] ** -0.5)
        embeddings = paligemma["model"]["vision_tower"]["vision_model"]["embeddings"]
        position = embeddings["position_embedding"].weight
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
        """Float32 adapters on every linear layer of the VLM; they, the action expert and the value
        head train."""
        self.lora_config = lora_config or LoraConfig(
            r=rank,
            lora_alpha=alpha or rank,
            target_modules=list(targets or self.lora_targets),
            exclude_modules=r".*\bgemma_expert\..*",
            init_lora_weights="gaussian",
        )
        self.lora_config.modules_to_save = None  # PEFT would train copies of them
        inject_lora(self, self.lora_config)
        saved = [key for key in self.state_dict() if self.in_adapter(key)]
        parts = {key.removeprefix("paligemma_with_expert.").split(".")[0] for key in saved}
        self.lora_config.modules_to_save = sorted(parts - {"paligemma"})
        for key, p in self.named_parameters():
            p.requires_grad_(self.in_adapter(key) or key.startswith("value_head."))
        self.detach_value = self.detach_value  # freezes what is idle

    # -------------------------------------------------------------------- inputs
    @property
    def reads_state(self):
        """Not pi0.5, unless its prompt spells the state out: RLinf's ManiSkill checkpoints see the
        image alone."""
        return not self.pi05 or self.config["discrete_state_input"]

    def preprocess(self, images_uint8):
        """(B, H, W, 3) uint8 -> (B, 3, S, S) float32 in [-1, 1]: the aspect ratio is kept, black
        fills the rest (openpi).

        A square picture is one that was squashed: it gets the camera's aspect ratio back.
        """
        x, size = grey_levels(images_uint8, self.device), self.image_size
        height, width = x.shape[-2:]
        if height == width:
            height = width / self.config["camera_aspect"]
        scale = max(height, width) / size
        height, width = int(height / scale), int(width / scale)
        if x.shape[-2:] != (size, size) or height != width:
            x = F.interpolate(x, (height, width), mode="bilinear", antialias=True)
            top, left = (size - height) // 2, (size - width) // 2
            borders = (left, size - width - left, top, size - height - top)
            x = F.pad(x.clamp(0, 255).round(), borders)
        return x / 127.5 - 1

    def prompt_pieces(self, instruction, state=None):
        """What the tokenizer is given, piece by piece; BOS goes before the first. state (S,)
        normalised: see `tokenize`."""
        if self.config["prompt"]:
            return [self.config["prompt"].format(instruction=instruction)]
        text = instruction.strip().replace("_", " ").replace("\n", " ")
        if state is None:
            return [text, "\n"]
        edges = torch.linspace(-1, 1, 257, dtype=torch.float64)[:-1]
        bins = torch.bucketize(state.double().cpu(), edges, right=True) - 1  # 0 ... 255; -1 below
        return [f"Task: {text}, State: {' '.join(map(str, bins.tolist()))};\nAction: "]

    def tokenize(self, instructions, prompt=None, state=None):
        """List of B str -> tokens (B, L), token_mask (B, L) bool, padded on the right.

        state (B, S) normalised: pi0.5 with discrete_state_input reads it in its prompt, in 256
        bins. prompt: another format than the checkpoint's, with {instruction} in it.
        """
        if self.tokenizer is None:
            raise Fault(
                f"{self.name} has no tokenizer.json, so it cannot read instructions: put "
                "PaliGemma's there (from google/paligemma-3b-pt-224, whose licence has to be "
                "accepted first), or name it with --tokenizer FILE"
            )
        rows = []
        for i, instruction in enumerate(instructions):
            if prompt:
                pieces = [prompt.format(instruction=instruction)]
            else:
                pieces = self.prompt_pieces(instruction, None if state is None else state[i])
            key = tuple(pieces)
            if key not in self.prompt_ids:
                ids = self.tokenizer(pieces[0])
                ids += [i for piece in pieces[1:] for i in self.tokenizer(piece)[1:]]
                limit = self.config["max_token_len"]
                if len(ids) > limit:
                    raise Fault(f"the prompt {pieces} has {len(ids)} tokens, more than {limit}")
                self.prompt_ids[key] = ids
            rows.append(self.prompt_ids[key])
        length = max(map(len, rows))
        tokens = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=self.device)
        mask = [[True] * len(row) + [False] * (length - len(row)) for row in rows]
        return tokens, torch.tensor(mask)

    def use_norm_stats(self, key):
        """Choose the data set whose statistics scale states and actions: by mean and std for pi0,
        quantiles for pi0.5."""
        self.unnorm_key, self.centers_and_scales = key, {}
        names = ("q01", "q99") if self.pi05 else ("mean", "std")
        where, stats = f"{self.stats_file}, {key}", self.config["norm_stats"][key]
        for name in ("actions", "state") if self.reads_state else ("actions",):
            low, high = columns(stats, where, name, names)
            rows = list(zip(low.tolist(), high.tolist()))
            if name == "actions":
                dims = self.config["action_env_dim"]
                # beyond them openpi pads up to the model's width, always with the same numbers
                if len(rows) < dims or len(set(rows[dims:])) > 1:
                    raise Fault(
                        f"{where}: {len(rows)} dimensions of actions, not {dims}: another robot's?"
                    )
            else:  # how many there are shows when there is a state; padding is 0
                dims = max((i + 1 for i, row in enumerate(rows) if any(row)), default=0)
            low, high = low[:dims], high[:dims]
            check_columns(where, name, names, (low, high))
            spread = high - low if self.pi05 else high
            if (spread <= 0).any():
                dim, what = int((spread <= 0).nonzero()[0]), "q99 - q01" if self.pi05 else "std"
                raise Fault(
                    f"{where}: dimension {dim} of {name} has no spread ({what} is "
                    f"{spread[dim].item():g}), so it cannot be scaled; widen it there"
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
        model = self.paligemma_with_expert["paligemma"]["model"]
        tower = model["vision_tower"]["vision_model"]
        position = tower["embeddings"]["position_embedding"].weight
        x = tower["embeddings"]["patch_embedding"](images.to(position.dtype))
        x = (x.flatten(2).transpose(1, 2) + position).to(self.dtype)  # embeddings are float32
        for layer in tower["encoder"]["layers"]:
            x = forward_layer(layer, x, self.gradient_checkpointing, attention_mask=None)
        return model["multi_modal_projector"]["linear"](tower["post_layernorm"](x))

    def prefix(self, images, image_masks, tokens, token_mask):
        """What the actions are conditioned on. images (B, C, 3, S, S) in [-1, 1] of C cameras,
        image_masks (B, C) bool, tokens (B, L) ids, token_mask (B, L) bool -> Prefix of [camera 0 |
        camera 1 ... | prompt].

        Cameras that no sample has and padding beyond the longest prompt are not computed at all:
        nothing attends to them (openpi computes all three cameras and all 200 tokens, 3.3 times the
        arithmetic).
        """
        cameras, words = image_masks.any(0), token_mask.any(0)
        there, token_mask = image_masks[:, cameras], token_mask[:, words]
        return self.read(images[:, cameras], there, tokens[:, words], token_mask)

    def read(self, images, there, tokens, token_mask):
        """`prefix` of cameras and tokens that some sample has. The masks may be on the CPU."""
        paligemma = self.paligemma_with_expert["paligemma"]
        seen = self.see(images.flatten(0, 1)).unflatten(0, there.shape)  # (B, C, T, W)
        words = paligemma["lm_head"](tokens) * self.config["vlm_width"] ** 0.5
        x = torch.cat([seen.flatten(1, 2), words], 1)
        mask = torch.cat([there.repeat_interleave(seen.shape[2], 1), token_mask], 1)
        mask = mask.to(x.device)  # (B, P)
        kv = Recorder()
        inputs = {
            "attention_mask": mask[:, None, None],  # everything sees everything
            "position_embeddings": self.rotary(mask.cumsum(1) - 1, x),  # padding does not count
            "past_key_values": kv,
        }
        for layer in paligemma["model"]["language_model"]["layers"]:
            x = forward_layer(layer, x, self.gradient_checkpointing, **inputs)
        return Prefix(paligemma["model"]["language_model"]["norm"](x), mask, kv)

    def observe(self, obs, instructions, prompt=None):
        """-> Prefix, state (B, D) or None."""
        state = in_prompt = None
        if self.reads_state:
            state = self.normalize("state", obs["state"]).float().to(self.device)
        if self.config["discrete_state_input"]:
            in_prompt = state[:, : obs["state"].shape[1]]
        images = self.preprocess(obs["rgb"])[:, None]  # one camera
        there = torch.ones(len(images), 1, dtype=torch.bool)
        return self.read(images, there, *self.tokenize(instructions, prompt, in_prompt)), state

    def time_embedding(self, t):
        """(B,) -> (B, W) sines and cosines. In float64: the fastest has a frequency of 1571, and
        float32 is 3e-4 off in v."""
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
        return (h[0] if self.pi05 else h)[:, -self.horizon :]  # no gate after the last norm

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
        weight = prefix.mask[..., None].float()
        return self.value((prefix.hidden.float() * weight).sum(1) / weight.sum(1))

    # ---------------------------------------------------------- what sft.py teaches besides actions
    def look(self, rgb):
        """A pass through the modules of `vision_parts`, and no further."""
        self.see(self.preprocess(rgb))

    def vision_parts(self):
        """The modules whose outputs are the patch features (B, n, D): of the tower; as Gemma gets
        them."""
        model = self.paligemma_with_expert["paligemma"]["model"]
        tower = model["vision_tower"]["vision_model"]
        return [tower["post_layernorm"], model["multi_modal_projector"]["linear"]]

    def word_embeddings(self):
        """(vocabulary, W)."""
        return self.paligemma_with_expert["paligemma"]["lm_head"].weight
