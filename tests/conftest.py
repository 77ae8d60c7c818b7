"""What the tests of the simulator share: one scene of each pack for all of them, and its whole state as one vector."""

import os
from pathlib import Path

import numpy as np
import pytest
from sapien.physx import PhysxRigidDynamicComponent

import envs
from scenes import rl4vla

SHARED = Path(__file__).parents[2] / "shared/assets"
if SHARED.is_dir():
    os.environ.setdefault("PAIR_VLA_ASSETS", str(SHARED))
needs_rl4vla = pytest.mark.skipif(
    bool(rl4vla.faulty_assets()), reason="no assets of the pack rl4vla: see envs.py --download"
)
PACKS = ["builtin", pytest.param("rl4vla", marks=needs_rl4vla)]


@pytest.fixture(scope="session")
def env():
    """One scene in this process. A test that compares bits starts it with `start(env, i)`."""
    return envs.make_env("builtin")


@pytest.fixture(scope="session")
def scene(env):
    """scene(pack): one scene of either pack, small pictures."""
    made = {"builtin": env}

    def scene(pack):
        if pack not in made:
            made[pack] = envs.make_env(pack, 96)
        return made[pack]

    return scene


@pytest.fixture(scope="session")
def start():
    def start(env, episode_id, split="train", rebuild=True):
        episodes = [env.sample(episode_id, split)]
        env.reset(seed=0, options=dict(episodes=episodes, reconfigure=rebuild))

    return start


@pytest.fixture(scope="session")
def full_state():
    """Everything the next step depends on, of every body, as float32: poses, velocities, joints, what the motors chase."""

    def full_state(env):
        robot, parts = env.agent.robot._objs[0], []
        bodies = [
            e.find_component_by_type(PhysxRigidDynamicComponent)
            for e in env.scene.sub_scenes[0].entities
        ]
        for body in [*(b for b in bodies if b is not None), *robot.links]:
            parts += [
                body.entity.pose.p,
                body.entity.pose.q,
                body.linear_velocity,
                body.angular_velocity,
            ]
        parts += [robot.qpos, robot.qvel, robot.qf]
        parts += [
            np.concatenate([joint.drive_target, joint.drive_velocity_target])
            for joint in robot.active_joints
        ]
        return np.concatenate([np.asarray(part, np.float32).ravel() for part in parts])

    return full_state
