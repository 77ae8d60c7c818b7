"""The pair of views of each frame (paper section 4.3): what a policy should ignore, and what it should react to.

task-preserving  o_pre: another table, no distractors; the same robot, target and plate   -> L_inv, Eq. (2)
task-altering    o_alt: the same instant with the target elsewhere                         -> L_sen, Eq. (3)
"""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import sapien
import torch
from sapien.render import RenderBodyComponent
from transforms3d.euler import euler2quat

import envs

ALTER_SIGMA = 0.05  # metres. OPEN: the paper's translation sigma is lost in our text
ALTER_YAWS = np.deg2rad([0.0, 45.0, 90.0, 135.0])  # OPEN: likewise its rotation set


def backgrounds(vec: envs.VecEnv) -> torch.Tensor:
    """(16, H, W, 3) uint8: the training tables with every object and the robot invisible (4.3, "all objects invisible")."""
    tables = np.array_split(np.arange(16), vec.num_workers)
    parts = vec.map(render_backgrounds, *[(part.tolist(),) for part in tables])
    return torch.from_numpy(np.concatenate([part for part in parts if len(part)]))


def render_backgrounds(environments: list[envs.PutOnPlate], tables: list[int]) -> np.ndarray:
    """Runs in a worker: (len(tables), H, W, 3) uint8 snapshots under the training light and camera."""
    env = environments[0]
    if env.episode is None:
        env.reset(seed=0, options=dict(episode_ids=[0], split="train"))
    before = env.episode
    entities = [*env.links, *(actor._objs[0] for actor in env.objects), env.plate_entity]
    env.set_light(envs.LIGHTS[0])
    env.set_camera(0.0)
    pictures = []
    with hidden(entities):
        for table in tables:
            env.set_table(table)
            pictures.append(env.picture()[0].copy())
    env.set_light(envs.LIGHTS[before.light])
    env.set_camera(before.camera_deg)
    env.set_table(before.table)
    return np.array(pictures)


@contextmanager
def hidden(entities):
    """Draw without these bodies. Physics is not touched."""
    bodies = [e.find_component_by_type(RenderBodyComponent) for e in entities]
    before = [(body, body.visibility) for body in bodies if body is not None]
    for body, _ in before:
        body.visibility = 0.0
    try:
        yield
    finally:
        for body, visibility in before:
            body.visibility = visibility


@contextmanager
def drawn_at(entity, pose: sapien.Pose):
    """Draw one body at another pose, by moving its render nodes.

    Setting the body's pose and setting it back is not the same thing: it drops PhysX's cached contacts, and the run
    differs from the next step on. This way simulator state stays bit-identical (tested).
    """
    relative = entity.pose.inv() * pose
    nodes = entity.find_component_by_type(RenderBodyComponent)._internal_node.children
    before = [(node, sapien.Pose(node.position, node.rotation)) for node in nodes]
    for node, old in before:
        new = relative * old
        node.set_position(new.p)
        node.set_rotation(new.q)
    try:
        yield
    finally:
        for node, old in before:
            node.set_position(old.p)
            node.set_rotation(old.q)


def task_altering(env: envs.PutOnPlate, rng: np.random.Generator) -> np.ndarray:
    """o_alt: (H, W, 3) uint8. The target moved by N(0, ALTER_SIGMA) in x and y and turned by a yaw of ALTER_YAWS (4.3).

    A target in the gripper is drawn outside it, as the paper's construction has it.
    """
    with drawn_at(env.target_entity, altered_pose(env.target_entity.pose, rng)):
        return env.picture()[0]


def altered_pose(pose: sapien.Pose, rng: np.random.Generator) -> sapien.Pose:
    dx, dy = rng.normal(0.0, ALTER_SIGMA, 2)
    yaw = float(rng.choice(ALTER_YAWS))
    return sapien.Pose(
        pose.p + [dx, dy, 0], (sapien.Pose(q=euler2quat(0, 0, yaw)) * sapien.Pose(q=pose.q)).q
    )


def rerendered(env: envs.PutOnPlate, rng: np.random.Generator) -> np.ndarray:
    """o_pre without a composite's bites: (H, W, 3) uint8, drawn with the distractors hidden and a table of the training set."""
    with hidden(env.objects[i]._objs[0] for i in env.episode.distractors):
        env.set_table(int(rng.integers(16)))
        picture = env.picture()[0]
    env.set_table(env.episode.table)
    return picture


def other_camera(env: envs.PutOnPlate, rng: np.random.Generator) -> np.ndarray:
    """o_pre of section 5.5: (H, W, 3) uint8, the same state from another camera of the split's."""
    mount = env.camera_mount._objs[0]
    before = mount.pose  # not exactly the one it was given: PhysX normalises the quaternion
    env.set_camera(other_degrees(env.split, env.episode, rng))
    picture = env.picture()[0]
    mount.pose = before
    return picture


def other_degrees(split: envs.Split, episode: envs.Episode, rng: np.random.Generator) -> float:
    return float(
        rng.choice([degrees for degrees in split.cameras if degrees != episode.camera_deg])
    )


RENDERED = dict(
    composite=None, rerender=rerendered, camera=other_camera
)  # --pre-view -> what the environments draw for it


def task_preserving(
    rgb: torch.Tensor, mask: torch.Tensor, backgrounds: torch.Tensor, generator=None
) -> torch.Tensor:
    """o_pre for a batch: rgb (B, H, W, 3) uint8, mask (B, H, W) bool, backgrounds (K, H, W, 3) uint8 -> (B, H, W, 3) uint8.

    All on one device. Where a distractor stood in front of the target the composite has a bite taken out of it: that is
    what Eq. (5) does.
    """
    k = torch.randint(
        len(backgrounds), (len(rgb),), generator=generator
    )  # of the CPU: the same in parts of a batch
    # Eq. (5)  o_pre = M * o + (1 - M) * b,   b ~ Uniform(background snapshots)
    return torch.where(mask[..., None], rgb, backgrounds[k.to(rgb.device)])
