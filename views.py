"""The pair of views of each frame (section 4.3): what to ignore, and what to react to.

o_pre  task-preserving: another table, no distractors, the same robot, target and plate     Eq. (2)
o_alt  task-altering:   the same instant with the target elsewhere                          Eq. (3)

A composite, Eq. (5), is made of pictures that are there. ManiSkill's environments call the other
functions, to draw: (env of N scenes, N numpy generators) -> (N, H, W, 3) uint8, (H, W, 3) on the
CPU, where N is 1. Flatland draws its own (scenes/flat.py).
"""

import numpy as np
import torch

ALTER_SIGMA = 0.05  # metres. OPEN: the paper's translation sigma is lost in our text
ALTER_YAWS = np.deg2rad([0.0, 45.0, 90.0, 135.0])  # OPEN: so is its rotation set


def task_preserving(obs: dict, backgrounds: torch.Tensor | None) -> torch.Tensor:
    """o_pre (B, H, W, 3) uint8: drawn by the environments (rgb_pre), or a composite."""
    if backgrounds is None:
        return obs["rgb_pre"]
    return composite(obs["rgb"], obs["mask"], backgrounds)


def composite(rgb: torch.Tensor, mask: torch.Tensor, backgrounds: torch.Tensor) -> torch.Tensor:
    """rgb (B, H, W, 3), mask (B, H, W) bool, backgrounds (K, H, W, 3) -> (B, H, W, 3) uint8.

    All on one device. Where a distractor hides the target, the composite shows the background:
    Eq. (5) has no other pixels.
    """
    k = torch.randint(len(backgrounds), (len(rgb),))  # on the CPU: the same for any device
    # Eq. (5)  o_pre = M * o + (1 - M) * b,   b ~ Uniform(background snapshots)
    return torch.where(mask[..., None], rgb, backgrounds[k.to(rgb.device)])


def task_altering(env, rngs):
    """o_alt: the target moved by N(0, ALTER_SIGMA) in x and y and turned by one of ALTER_YAWS.

    A target in the gripper is drawn outside it: the paper's construction does so.
    """
    moves = [(*rng.normal(0.0, ALTER_SIGMA, 2), float(rng.choice(ALTER_YAWS))) for rng in rngs]
    with env.target_moved(moves):
        return env.picture()[0]


def rerendered(env, rngs):
    """o_pre, drawn again: without the distractors, on a table of the training set."""
    tables = [int(rng.integers(env.pack.train_tables)) for rng in rngs]
    with env.without_distractors(), env.on_tables(tables):
        return env.picture()[0]


def other_camera(env, rngs):
    """o_pre of section 5.5: the same state from another camera of the split's."""
    others = [[d for d in e.cameras if d != e.camera_deg] for e in env.episodes]
    degrees = [float(rng.choice(choices)) for choices, rng in zip(others, rngs)]
    with env.from_cameras(degrees):
        return env.picture()[0]


# --pre-view -> what the environments draw for it
RENDERED = dict(composite=None, rerender=rerendered, camera=other_camera)
