"""The pair of views of each frame (paper section 4.3): what a policy should ignore, and what it should react to.

task-preserving  o_pre: another table, no distractors; the same robot, target and plate   -> L_inv, Eq. (2)
task-altering    o_alt: the same instant with the target elsewhere                         -> L_sen, Eq. (3)

A composite (Eq. 5) is made of pictures that are there. The other views are drawn: functions (env, N generators) -> N
pictures, where env holds N scenes (one in a worker process, all of them with --sim cuda).
"""

from __future__ import annotations

import numpy as np
import torch

ALTER_SIGMA = 0.05  # metres. OPEN: the paper's translation sigma is lost in our text
ALTER_YAWS = np.deg2rad([0.0, 45.0, 90.0, 135.0])  # OPEN: likewise its rotation set


def task_preserving(obs: dict, backgrounds: torch.Tensor | None) -> torch.Tensor:
    """o_pre (B, H, W, 3) uint8: as the environments have drawn it, or a composite with backgrounds."""
    return (
        obs["rgb_pre"] if backgrounds is None else composite(obs["rgb"], obs["mask"], backgrounds)
    )


def composite(rgb: torch.Tensor, mask: torch.Tensor, backgrounds: torch.Tensor) -> torch.Tensor:
    """rgb (B, H, W, 3) uint8, mask (B, H, W) bool, backgrounds (K, H, W, 3) uint8 -> (B, H, W, 3) uint8.

    All on one device. Where a distractor stood in front of the target the composite has a bite taken
    out of it: that is what Eq. (5) does.
    """
    k = torch.randint(len(backgrounds), (len(rgb),))  # on the CPU: the same for any device
    # Eq. (5)  o_pre = M * o + (1 - M) * b,   b ~ Uniform(background snapshots)
    return torch.where(mask[..., None], rgb, backgrounds[k.to(rgb.device)])


def task_altering(env, rngs):
    """o_alt: the target moved by N(0, ALTER_SIGMA) in x and y and turned by a yaw of ALTER_YAWS (4.3).

    A target in the gripper is drawn outside it, as the paper's construction has it.
    """
    moves = [(*rng.normal(0.0, ALTER_SIGMA, 2), float(rng.choice(ALTER_YAWS))) for rng in rngs]
    with env.target_moved(moves):
        return env.picture()[0]


def rerendered(env, rngs):
    """o_pre without a composite's bites: drawn with the distractors hidden and a table of the training set."""
    tables = [int(rng.integers(env.pack.train_tables)) for rng in rngs]
    with env.without_distractors(), env.on_tables(tables):
        return env.picture()[0]


def other_camera(env, rngs):
    """o_pre of section 5.5: the same state from another camera of the split's."""
    degrees = []
    for e, rng in zip(env.episodes, rngs):
        degrees.append(float(rng.choice([d for d in e.cameras if d != e.camera_deg])))
    with env.from_cameras(degrees):
        return env.picture()[0]


# --pre-view -> what the environments draw for it
RENDERED = dict(composite=None, rerender=rerendered, camera=other_camera)
