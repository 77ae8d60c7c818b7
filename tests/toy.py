"""A vector environment that takes no time, and policies of two dozen thousand weights: the real ppo_pair.py in seconds.

python tests/toy.py --checkpoint START --num-envs 8 ...      # ppo_pair.py's command line on it, also under torchrun
"""

import copy
import os
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import evaluate
import policies
import ppo_pair
import runtime
from backbones.openvla import OPENVLA_TINY
from backbones.pi0 import PI, PI05_TINY, PI_KIND
from backbones.tokenizers import WordTokenizer


class Toy:
    """The right action is written in the image: move towards the bright side. Two steps per episode; the second one's
    picture is new, so credit has to go to the right step. A picture depends on episode id and step alone. Same interface
    as envs.VecEnv."""

    max_episode_steps, num_workers, view_seconds = 2, 1, 0.0

    def __init__(self, num_envs, size=16, blind=False, seconds=0.0):
        self.num_envs, self.size, self.blind, self.seconds = num_envs, size, blind, seconds
        self.instructions, self.ids = ["put red cube on plate"] * num_envs, []
        self.episode_ids, self.elapsed = range(num_envs), 0

    def look(self):
        seeds = [2 * i + self.elapsed for i in self.episode_ids]
        self.right = torch.stack(
            [torch.rand((), generator=torch.Generator().manual_seed(s)) < 0.5 for s in seeds]
        )
        half = self.size // 2
        rgb = torch.full((self.num_envs, self.size, self.size, 3), 40, dtype=torch.uint8)
        rgb[self.right, :, half:] = 220
        rgb[~self.right, :, :half] = 220
        if self.blind:
            rgb[:] = 128
        mask = torch.zeros(rgb.shape[:3], dtype=torch.bool)
        mask[:, half // 2 : -half // 2] = True  # what the task-preserving view keeps
        return dict(rgb=rgb, mask=mask, rgb_alt=rgb.flip(2), state=torch.zeros(self.num_envs, 8))

    def reset(self, episode_ids, split="train", rebuild=False, view_seed=0):
        self.episode_ids, self.elapsed, self.correct = (
            list(episode_ids),
            0,
            torch.zeros(self.num_envs),
        )
        self.ids += self.episode_ids
        return self.look()

    def step(self, actions):
        time.sleep(self.seconds)
        hit = ((actions[:, 0, 0] > 0) == self.right).float()
        self.correct += hit
        self.elapsed += 1
        success = self.correct == self.max_episode_steps
        info = dict(success=success, success_once=success, episode_return=self.correct)
        return (
            self.look(),
            hit,
            torch.full((self.num_envs,), self.elapsed == self.max_episode_steps),
            info,
        )

    def backgrounds(self):
        return (
            torch.arange(16, dtype=torch.uint8)
            .mul(10)[:, None, None, None]
            .expand(16, self.size, self.size, 3)
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def toy_policy(backbone="openvla-tiny"):
    if backbone == "openvla-tiny":
        config = copy.deepcopy(OPENVLA_TINY)
        config["image_sizes"] = [16, 16]
        config["text_config"] |= dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
        config["_tiny_timm_kwargs"][0] |= dict(
            embed_dim=32, depth=2, num_heads=2, patch_size=8, stem=[16, 16]
        )
        config["_tiny_timm_kwargs"][1] |= dict(embed_dim=16, depth=2, num_heads=2, patch_size=8)
        policy = policies.TokenPolicy(config)
    else:
        config = PI | PI_KIND["pi05"] | PI05_TINY | {"model_type": "pi05"}
        config |= dict(
            image_size=16,
            patch=8,
            stem=[16, 16],
            vis_width=32,
            vis_depth=1,
            vis_mlp=64,
            depth=1,
            head_dim=16,
            vlm_width=32,
            vlm_mlp=64,
            exp_width=32,
            exp_mlp=64,
        )
        policy = policies.FlowPolicy(config)
    policy.init_from_scratch()
    policy.init_value_head()
    policy.use_norm_stats("builtin")
    policy.tokenizer = WordTokenizer(config["_word_vocab"])
    return policy.eval()


def in_float64(x, original=torch.Tensor.float):
    """Instead of torch.Tensor.float: what is computed in float32 becomes float64. But for positions: transformers makes
    float32 angles of them. Weights (.double()) and noise (torch.set_default_dtype) are the caller's."""
    return original(x) if x.dtype == torch.int64 else x.double()


def make_envs(num_envs, assets="builtin", *, image_size=None, **others):
    return Toy(num_envs, image_size, seconds=float(os.environ.get("TOY_SECONDS", 0)))


def play():
    """ppo_pair.py and evaluate.py of this process: on the toy. Its start tells hardly any two frames apart, so the KL of
    unrelated frames is noise, and half of it gone is no sign of blindness."""
    ppo_pair.make_envs = evaluate.make_envs = make_envs
    runtime.BLIND = 0.02


if __name__ == "__main__":
    play()
    runtime.command_line(lambda: ppo_pair.main(ppo_pair.parse()))
