"""The pick-and-place task of PAIR-VLA in ManiSkill3: "put {object} on plate", its out-of-distribution splits, N at a time.

    python envs.py --check                   # does this machine render? says what to install where it does not
    python envs.py --download                # fetches what the pack `rl4vla` (rl4vla.py) needs
    python envs.py --gallery FILE.png        # draws every split, and the pair of views (gallery.py)

An episode is a pure function of (split, episode id): `sample_episode`. It has a fixed length; success does not end it.
The simulator never renders by itself: a picture is taken where a policy looks, and a changed view is one more picture
(views.py). `make_envs` spreads N environments over worker processes, one per core, and hands out batched torch tensors.
"""

from __future__ import annotations

import os

os.environ.setdefault(
    "LP_NUM_THREADS", "0"
)  # lavapipe renders in the calling thread: one process per core, no contention

import importlib
import json
import mmap
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection, wait
from pathlib import Path

import gymnasium as gym
import numpy as np
import sapien
import torch
import tyro
from mani_skill.envs.sapien_env import BaseEnv
from mani_skill.sensors.camera import CameraConfig
from mani_skill.utils import sapien_utils
from mani_skill.utils.registration import register_env
from mani_skill.utils.structs.types import SimConfig
from sapien.physx import PhysxMaterial, PhysxRigidDynamicComponent
from sapien.render import RenderBodyComponent, RenderDirectionalLightComponent, RenderMaterial
from transforms3d.euler import euler2quat

import builtin
import rl4vla
from rl4vla import TABLE_Z
from runtime import Fault

ENV_ID = "PairVLA-PutOnPlate-v0"


# ------------------------------------------------------------ Splits and episodes (paper Appendix B, section 5.5)
@dataclass(frozen=True)
class Split:
    """One evaluation setting; every field not named is as in training (Appendix B.4)."""

    held_out_tables: bool = False
    """table textures 16-20 instead of 0-15 (B.1)"""
    held_out_lights: bool = False
    """one of the 20 light conditions never seen in training (B.2)"""
    held_out_poses: bool = False
    """target on the outer border of the enlarged square, at a yaw not seen in training (B.3)"""
    distractors: int = 1
    """how many other objects lie on the table (B.4)"""
    held_out_objects: bool = False
    """half of the distractors are objects never seen in training (B.4, "Distractor-k")"""
    cameras: tuple = (0.0,)
    """orbits of the camera about the vertical axis through the workspace, degrees: one is drawn (5.5)"""


SPLITS = {
    "train": Split(),
    "texture": Split(held_out_tables=True),
    "lighting": Split(held_out_lights=True),
    "pose": Split(held_out_poses=True),
    **{f"clutter-{k}": Split(distractors=k, held_out_objects=True) for k in (2, 4, 6, 8)},
}
SFT_SPLITS = {  # what sft.py trains on: training objects only
    "bare": Split(distractors=0),  # demonstrations: the paper's have no distractor (A.1)
    "busy": Split(distractors=4),  # scenes for pretraining
}


def parse_split(name: str) -> Split:
    """The Split called `name`: one of SPLITS, or section 5.5's, in degrees: camera+N or camera-N for one orbit of the
    camera, camera+-N:S for one drawn from -N, -N + S, ..., N in each episode. N <= 90."""
    if name in SPLITS or name in SFT_SPLITS:
        return {**SPLITS, **SFT_SPLITS}[name]
    number = r"(\d+(?:\.\d+)?)"
    match = re.fullmatch(rf"camera([+-]|\+-){number}(?::{number})?", name)
    if match is None or (match[1] == "+-") != (match[3] is not None):
        more = "camera+N, camera-N or camera+-N:STEP (degrees)"
        raise Fault(f"unknown split {name!r}: choose from {', '.join(SPLITS)}, {more}")
    if float(match[2]) > 90:
        raise Fault(f"split {name!r}: the camera can turn by at most 90 degrees")
    if match[3] is None:
        return Split(cameras=(float(match[1] + match[2]),))
    widest, step = float(match[2]), float(match[3])
    if not 0 < step <= widest:
        raise Fault(f"split {name!r}: the step must be above 0 and at most {match[2]} degrees")
    turns = int(widest / step + 1e-9)
    return Split(cameras=tuple(step * i for i in range(-turns, turns + 1)))


@dataclass(frozen=True)
class Light:
    """Ambient light, a key light and two fill lights (B.2): colours are linear RGB, directions point away from the light."""

    ambient: tuple = (0.3, 0.3, 0.3)
    key_direction: tuple = (0.0, 0.0, -1.0)
    key: tuple = (2.2, 2.2, 2.2)
    fill_directions: tuple = ((-1.0, -0.5, -1.0), (1.0, 1.0, -1.0))
    fill: tuple = (0.7, 0.7, 0.7)


def held_out_lights() -> list[Light]:
    """The 20 held-out conditions: 5 key directions x (dim, bright, warm, cold). OPEN: the paper does not list its 20."""
    lights = []
    for x, y, z in ((1, 0, -0.6), (-1, 0, -0.6), (0, 1, -0.6), (0, -1, -0.6), (0.3, 0.3, -1)):
        fills = ((-y - 0.3, x - 0.3, -1), (y + 0.3, 0.3 - x, -1))
        for ambient, key, fill in (
            ((0.08, 0.08, 0.08), (1.0, 1.0, 1.0), 0.15),  # dim
            ((0.55, 0.55, 0.55), (3.6, 3.6, 3.6), 1.1),  # bright
            ((0.28, 0.22, 0.12), (3.2, 1.9, 0.8), 0.4),  # warm
            ((0.12, 0.18, 0.32), (0.9, 1.5, 3.2), 0.4),  # cold
        ):
            lights.append(
                Light(ambient, (x, y, z), key, fills, tuple(fill * c / max(key) for c in key))
            )
    return lights


LIGHTS = [Light(), *held_out_lights()]  # 0: training; 1-20: held out

CENTER, HALF_EDGE = np.array([-0.16, 0.0]), 0.075  # the training square in metres (B.3)


def _lattice(low: int, high: int) -> np.ndarray:
    """(n, 2) world xy of grid indices low..high-1 squared; indices 0..5 are the 36 training points, 3 cm apart."""
    index = np.arange(low, high)
    grid = np.stack(np.meshgrid(index, index, indexing="ij"), -1).reshape(-1, 2)
    return CENTER + HALF_EDGE * (grid / 2.5 - 1)


GRID = _lattice(0, 6)  # 36 training positions
RING = _lattice(-1, 7)[
    (np.abs(_lattice(-1, 7) - CENTER) > 0.1).any(1)
]  # 28 points on the border at 10.5 cm
WIDE, FARTHER = (
    _lattice(-4, 10),
    _lattice(-8, 10),
)  # where clutter goes when the training square is full, or all of that
TRAIN_YAWS = np.deg2rad([0.0, 45.0, 90.0, 135.0])
HELD_OUT_YAWS = -np.deg2rad([22.5, 67.5, 112.5, 157.5])


@dataclass(frozen=True)
class Episode:
    """Everything that defines one episode. Objects and tables are indices into the pack, angles radians, xy metres."""

    target: int
    target_xy: tuple
    target_yaw: float
    plate_xy: tuple
    distractors: tuple  # object indices
    distractor_xy: tuple
    distractor_yaw: tuple
    table: int
    light: int
    camera_deg: float


def sample_episode(
    episode_id: int, split: str | Split, pack: builtin.BuiltinPack | rl4vla.Rl4vlaPack
) -> Episode:
    """Episode number `episode_id` (0 <= id < 2**63) of `split`.

    Each factor has a random stream of its own, so episode i has the same target, plate, table draw and light draw in
    every split, and policies can be compared episode by episode.
    """
    s = parse_split(split) if isinstance(split, str) else split
    stream = [np.random.default_rng([episode_id, factor]) for factor in range(8)]
    target = int(stream[0].integers(16))
    train_others = stream[1].permutation([i for i in range(16) if i != target])
    held_out = stream[2].permutation(np.arange(16, 25))
    n_held_out = s.distractors // 2 if s.held_out_objects else 0
    distractors = [
        int(i) for i in (*train_others[: s.distractors - n_held_out], *held_out[:n_held_out])
    ]
    first = int(
        train_others[0]
    )  # its place is drawn even where it is left out, so that target and plate stay the same

    # RL4VLA's rule: target-plate and distractor-plate > 7 cm (or what the objects' size needs), target-distractor > 15 cm.
    def far(a, b, gap):
        return (
            np.linalg.norm(a[:, None] - b[None], axis=-1) > gap + 1e-6
        )  # 15 cm apart to the last bit is too near

    targets = RING if s.held_out_poses else GRID
    target_plate = far(targets, GRID, pack.plate_gap(target))
    distractor_plate = far(GRID, GRID, pack.plate_gap(first))
    triples = np.argwhere(
        target_plate[:, :, None] & distractor_plate.T[None] & far(targets, GRID, 0.15)[:, None, :]
    )
    t, p, d = triples[stream[3].integers(len(triples))]
    yaw = int(stream[4].integers(4))

    placed, yaws = [GRID[d]], [TRAIN_YAWS[yaw]]  # RL4VLA: the distractor shares the target's yaw
    radii = [pack.radius(target), pack.plate_radius, pack.radius(first)]
    for i in distractors[
        1:
    ]:  # first free point of the training grid, then of its border, then of a wider patch
        points = np.concatenate([stream[5].permutation(points) for points in (GRID, RING, WIDE)])
        points = np.concatenate([points, FARTHER])
        gaps = np.linalg.norm(points[:, None] - np.array([targets[t], GRID[p], *placed]), axis=-1)
        clearance = (gaps - np.array(radii) - pack.radius(i)).min(1)
        placed.append(points[np.flatnonzero(clearance > 0.005)[0]])
        radii.append(pack.radius(i))
        yaws.append(TRAIN_YAWS[stream[5].integers(4)])
    table, held_out_table = int(stream[6].integers(16)), int(stream[6].integers(16, 21))
    light = int(stream[6].integers(1, 21))
    return Episode(
        target=target,
        target_xy=tuple(targets[t]),
        target_yaw=float((HELD_OUT_YAWS if s.held_out_poses else TRAIN_YAWS)[yaw]),
        plate_xy=tuple(GRID[p]),
        distractors=tuple(distractors),
        distractor_xy=tuple(map(tuple, placed))[: s.distractors],
        distractor_yaw=tuple(float(y) for y in yaws)[: s.distractors],
        table=held_out_table if s.held_out_tables else table,
        light=light if s.held_out_lights else 0,
        camera_deg=s.cameras[stream[7].integers(len(s.cameras))],
    )


# ------------------------------------------------------------ Asset packs
PACKS = {"builtin": builtin.BuiltinPack(), "rl4vla": rl4vla.Rl4vlaPack()}


def find_pack(assets: str):
    """The pack called `assets`. Raises Fault where there is none of that name, or where files of it are missing."""
    if assets not in PACKS:
        raise Fault(f"unknown --assets {assets!r}: choose from {', '.join(PACKS)}")
    fault = PACKS[assets].fault()
    if fault:
        raise Fault(
            f"assets of the pack {assets}: {fault}: `python envs.py --download` fetches them"
        )
    return PACKS[assets]


# ------------------------------------------------------------ The task
@register_env(ENV_ID, max_episode_steps=20)
class PutOnPlate(BaseEnv):
    """One scene. `reset(options=dict(episode_ids=[i], split="train"))`, `step(action (7,))`, then `picture()` to look.

    success (RL4VLA): the target touches the plate (> 0.03 N) and lies over it. Reward (Appendix B, values of RL4VLA):
    R_t = 0.1 ever grasped + 0.1 ever grasped for a few steps on end + 1.0 (success and ever grasped), paid as R_t - R_{t-1}.
    """

    SUPPORTED_OBS_MODES = ["none"]
    SUPPORTED_REWARD_MODES = ["none"]

    def __init__(self, *args, pack: str = "builtin", image_size: int | None = None, **kwargs):
        self.pack = PACKS[pack]
        self.image_size = image_size or self.pack.image_size
        self.episode = None
        super().__init__(*args, robot_uids=self.pack.robot_uid, **kwargs)

    @property
    def _default_sim_config(self):
        return SimConfig(
            sim_freq=self.pack.sim_freq, control_freq=self.pack.control_freq, spacing=20
        )

    @property
    def _default_sensor_configs(
        self,
    ):  # the camera sits on a body, so that turning it is setting a pose
        return [
            CameraConfig("camera", sapien.Pose(), self.image_size, self.image_size, near=0.01, far=10,
                         mount=self.camera_mount, shader_pack="minimal", **self.pack.lens(self.image_size))
        ]  # fmt: skip

    # ------------------------------------------------------------ scene
    def _load_agent(self, options):
        super()._load_agent(options, self.pack.base_pose)
        if self.pack.robot_look:
            for robot in self.agent.robot._objs:
                sapien_utils.set_articulation_render_material(robot, **self.pack.robot_look)

    def _load_scene(self, options):
        def static_box(name, half_size, at, visual=None):
            builder = self.scene.create_actor_builder()
            builder.add_box_collision(half_size=half_size)
            if visual is not None:
                builder.add_box_visual(half_size=half_size, material=visual)
            builder.initial_pose = sapien.Pose(at)
            builder.build_static(name)

        # Bodies are drawn in the order they are made in, so the nearer come first: what they hide then costs no shading.
        builder = self.scene.create_actor_builder()
        builder.initial_pose = sapien.Pose()
        self.camera_mount = builder.build_kinematic("camera_mount")
        friction = PhysxMaterial(1.0, 1.0, 0.0)
        self.objects = []
        for i, name in enumerate(self.pack.names):
            builder = self.scene.create_actor_builder()
            self.pack.build_object(i, builder, friction)
            builder.initial_pose = self._parked(i)
            self.objects.append(builder.build(name))
            # PhysX has no rolling friction: without damping round objects roll off the table
            self.objects[-1].set_angular_damping(5.0)
        builder = self.scene.create_actor_builder()
        self.pack.build_plate(builder, friction)
        builder.initial_pose = sapien.Pose([0, 0, 1.2])
        self.plate = builder.build("plate")
        self.table_tops = []  # thin pictures of a table, of which one is visible
        for i, material in enumerate(self.pack.table_materials):
            builder = self.scene.create_actor_builder()
            builder.add_box_visual(half_size=[0.55, 0.55, 0.002], material=material)
            builder.initial_pose = sapien.Pose([-0.2, 0, TABLE_Z - 0.0015])
            self.table_tops.append(builder.build_kinematic(f"table_top_{i}"))
        static_box("table", [0.55, 0.55, 0.05], [-0.2, 0, TABLE_Z - 0.05])
        static_box(
            "floor",
            [6, 6, 0.05],
            [0, 0, -0.05],
            self.pack.floor and RenderMaterial(base_color=self.pack.floor),
        )

    @staticmethod
    def _parked(i: int) -> sapien.Pose:
        return sapien.Pose(
            [2.0 + 0.3 * (i % 5), 0.3 * (i // 5), 0.06]
        )  # on the floor, out of sight, asleep

    def _load_lighting(self, options):
        self.scene.set_ambient_light(list(LIGHTS[0].ambient))
        for direction in (LIGHTS[0].key_direction, *LIGHTS[0].fill_directions):
            self.scene.add_directional_light(
                list(direction), [1, 1, 1]
            )  # no shadow: it would draw everything twice

    def _after_reconfigure(self, options):
        scene = self.scene.sub_scenes[0]
        self.lights = [
            c
            for e in scene.entities
            for c in e.components
            if isinstance(c, RenderDirectionalLightComponent)
        ]
        self.camera = self.scene.sensors["camera"].camera._render_cameras[0]
        self.links = [link._objs[0].entity for link in self.agent.robot.get_links()]
        self.fingers = [
            self.agent.finger1_link._objs[0].entity,
            self.agent.finger2_link._objs[0].entity,
        ]
        self.tcp_entity = self.agent.tcp._objs[0].entity
        self.plate_entity = self.plate._objs[0]
        self.photos = self.pack.photos(self.image_size)
        self.table_now, self.shown = None, None

    def set_light(self, light: Light):
        self.scene.sub_scenes[0].render_system.ambient_light = list(light.ambient)
        directions = (light.key_direction, *light.fill_directions)
        for lamp, direction, color in zip(
            self.lights, directions, (light.key, light.fill, light.fill), strict=True
        ):
            lamp.color = list(color)
            lamp.entity.pose = sapien.Pose(
                [0, 0, 0], sapien.math.shortest_rotation([1, 0, 0], list(direction))
            )

    def camera_pose(self, degrees: float) -> sapien.Pose:
        """Orbit by `degrees` about the vertical axis through the centre of the workspace. OPEN: the paper says "rotation"."""
        c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
        turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
        center = np.array([*CENTER, 0])
        eye, at = (
            center + turn @ (p - center) for p in (self.pack.camera_eye, self.pack.camera_at)
        )
        return sapien_utils.look_at(eye, at).sp

    def set_camera(self, degrees: float):
        self.camera_mount._objs[0].pose = self.camera_pose(degrees)

    def set_table(self, index: int):
        if self.photos is None:
            for i in (
                range(len(self.table_tops)) if self.table_now is None else (self.table_now, index)
            ):
                self.table_tops[i]._objs[0].find_component_by_type(
                    RenderBodyComponent
                ).visibility = float(i == index)
        self.table_now = index

    # ------------------------------------------------------------ episode
    def _initialize_episode(self, env_idx, options):
        if self.num_envs != 1:
            raise Fault(
                "this environment simulates one scene per environment on a CPU: use make_envs for many"
            )
        if "episode_ids" in options:
            self.episode_id = int(options["episode_ids"][0])
        else:  # plain gymnasium use: reset(seed=...)
            self.episode_id = int(self._batched_episode_rng[0].randint(2**31 - 1))
        self.split = parse_split(options["split"] if "split" in options else "train")
        self.episode = sample_episode(self.episode_id, self.split, self.pack)
        e, pack = self.episode, self.pack
        self.set_light(LIGHTS[e.light])
        self.set_camera(e.camera_deg)
        self.set_table(e.table)
        in_use = {e.target: (e.target_xy, e.target_yaw)}
        in_use.update(zip(e.distractors, zip(e.distractor_xy, e.distractor_yaw)))
        for i, actor in enumerate(self.objects):
            entity = actor._objs[0]
            body = entity.find_component_by_type(PhysxRigidDynamicComponent)
            if i in in_use:
                xy, yaw = in_use[i]
                entity.pose = sapien.Pose(
                    [*xy, pack.spawn_z(i, i == e.target)], euler2quat(0, 0, yaw)
                )
            elif self.shown is None or i in self.shown:
                entity.pose = self._parked(i)
            else:
                continue
            body.linear_velocity, body.angular_velocity = np.zeros(3), np.zeros(3)
            entity.find_component_by_type(RenderBodyComponent).visibility = float(i in in_use)
        self.shown = set(in_use)
        self.plate_entity.pose = sapien.Pose([*e.plate_xy, pack.plate_spawn_z])
        plate_body = self.plate_entity.find_component_by_type(PhysxRigidDynamicComponent)
        plate_body.linear_velocity, plate_body.angular_velocity = np.zeros(3), np.zeros(3)

        # Settle with the robot a metre up: it still chases its last targets until its controller is reset, after this.
        self.agent.robot.set_pose(sapien.Pose(pack.base_pose.p + [0, 0, 1.0], pack.base_pose.q))
        self.agent.reset(init_qpos=pack.init_qpos)
        for _ in range(int(0.3 * pack.sim_freq)):
            self.scene.step()
        bodies = [
            self.objects[i]._objs[0].find_component_by_type(PhysxRigidDynamicComponent)
            for i in in_use
        ]
        if (
            pack.settles_again
            and max(np.linalg.norm(body.linear_velocity) for body in bodies) > 0.01
        ):
            for _ in range(pack.sim_freq):
                self.scene.step()
        self.agent.robot.set_pose(pack.base_pose)
        self.agent.reset(init_qpos=pack.init_qpos)

        self.target = self.objects[e.target]
        self.target_entity = self.target._objs[0]
        rotation = self.target_entity.pose.to_transformation_matrix()[:3, :3]
        self.target_half_z = float((np.abs(rotation) @ pack.sizes[e.target])[2] / 2)
        self.grasped, self.streak, self.best_streak = False, 0, 0
        self.ever_grasped, self.success, self.success_once = False, False, False
        self.return_so_far, self.elapsed = 0.0, 0

    @property
    def instruction(self) -> str:
        return f"put {self.pack.names[self.episode.target]} on plate"

    def contact_forces(self) -> np.ndarray:
        """(3, 3) newtons that the two fingers and the plate exert on the target: one pass over the contact list."""
        others = [*self.fingers, self.plate_entity]
        forces = np.zeros((3, 3))
        for contact in self.scene.px.get_contacts():
            first, second = contact.bodies[0].entity, contact.bodies[1].entity
            if self.target_entity not in (first, second):
                continue
            other, sign = (second, 1) if first == self.target_entity else (first, -1)
            for j, entity in enumerate(others):
                if other == entity:
                    forces[j] += sign * sum(point.impulse for point in contact.points)
        return forces / self.scene.px.timestep

    def evaluate(self):
        if self.episode is None:
            return {}
        forces = self.contact_forces()
        pressed = []  # ManiSkill's Panda.is_grasping: at least 0.5 N within 85 degrees of the direction the finger closes
        for force, finger, sign in zip(forces, self.fingers, (-1, 1)):
            norm = float(np.linalg.norm(force))
            closing = sign * finger.pose.to_transformation_matrix()[:3, 1]
            pressed.append(norm >= 0.5 and float(force @ closing) / norm >= np.cos(np.deg2rad(85)))
        self.grasped = all(pressed)
        self.streak = self.streak + 1 if self.grasped else 0
        self.best_streak = max(self.best_streak, self.streak)
        self.ever_grasped |= self.grasped
        offset = self.target_entity.pose.p - self.plate_entity.pose.p
        self.success = bool(
            np.linalg.norm(offset[:2]) <= self.pack.plate_radius + 0.01
            and 0 < offset[2] <= self.pack.plate_size[2] / 2 + self.target_half_z + 0.05
            and np.linalg.norm(forces[2]) > 0.03
        )
        self.success_once |= self.success
        return dict(success=torch.tensor([self.success]))

    def reward(self) -> float:
        """R_t - R_{t-1}; call once per step."""
        total = 0.1 * self.ever_grasped + 0.1 * (self.best_streak >= self.pack.grasp_streak)
        total += 1.0 * (self.success and self.ever_grasped)
        reward, self.return_so_far = total - self.return_so_far, total
        return reward

    def state(self) -> np.ndarray:
        """(8,) float32: the arm's 7 joint angles (radians) and one finger's opening (metres)."""
        return self.agent.robot._objs[0].qpos[:8].astype(np.float32)

    # ------------------------------------------------------------ pictures
    def picture(self) -> tuple[np.ndarray, np.ndarray]:
        """What the camera sees now: rgb (H, W, 3) uint8 and the id of the body in each pixel (H, W) int16."""
        self.scene.update_render(update_sensors=True, update_human_render_cameras=False)
        self.camera.take_picture()
        rgb, ids = (
            self.camera.get_picture("Color")[..., :3],
            self.camera.get_picture("PositionSegmentation")[..., 3],
        )
        if self.photos is not None:
            rgb = np.where(ids[..., None] == 0, self.photos[self.table_now], rgb)
        return rgb, ids

    def foreground(self, ids: np.ndarray) -> np.ndarray:
        """The mask M of Eq. (5): (H, W) bool, True where `ids` shows the robot, the target or the plate."""
        keep = np.zeros(1024, bool)
        keep[[link.per_scene_id for link in self.links]] = True
        keep[[self.target_entity.per_scene_id, self.plate_entity.per_scene_id]] = True
        return keep[ids]


# ------------------------------------------------------------ N environments over worker processes
def record(size: int, views) -> np.dtype:
    """What one environment shows the main process: its row of an array in shared memory."""
    picture = (size, size, 3)
    fields = [("rgb", np.uint8, picture), ("mask", np.bool_, picture[:2]), ("state", np.float32, 8)]
    fields += [(name, np.uint8, picture) for name in views]
    fields += [("reward", np.float32), ("episode_return", np.float32), ("view_seconds", np.float64)]
    return np.dtype(
        fields + [(name, np.bool_) for name in ("success", "success_once", "grasped")], align=True
    )


def render_backend() -> str:
    """ "gpu" where SAPIEN finds an NVIDIA GPU that can draw, else "cpu". Physics runs on the CPU either way."""
    try:
        return "gpu" if sapien.Device("cuda").can_render() else "cpu"
    except RuntimeError:  # failed to find device "cuda"
        return "cpu"


def make_env(assets: str, image_size: int | None = None) -> PutOnPlate:
    """One bare environment in this process."""
    find_pack(assets)
    try:
        env = gym.make(ENV_ID, obs_mode="none", reward_mode="none", num_envs=1, sim_backend="cpu",
                       render_backend=render_backend(), pack=assets, image_size=image_size)  # fmt: skip
    except RuntimeError as error:
        if not re.search("vk::|[Vv]ulkan|physical device|rendering device", str(error)):
            raise
        raise Fault(
            f"no Vulkan device to render with ({error}): run `python envs.py --check`, it says what to install"
        )
    return env.unwrapped


def run_worker(conn_fd: int, memory_fd: int):
    """A worker process: owns some of the environments, obeys (command, argument) messages until the pipe closes."""
    torch.set_num_threads(1)
    conn = Connection(conn_fd)
    try:
        setup = conn.recv()
        if (
            render_backend() == "cpu"
        ):  # Mesa draws in a thread of its own, which may be slow to wake on another core
            os.sched_setaffinity(0, {setup["core"]})
        views = {name: _resolve(reference) for name, reference in setup["views"].items()}
        arrays = np.frombuffer(mmap.mmap(memory_fd, 0), record(setup["image_size"], views))
        envs = [make_env(setup["assets"], setup["image_size"]) for _ in setup["slots"]]
        conn.send(("ok", None))

        def look(env, slot):
            arrays["rgb"][slot], ids = env.picture()
            arrays["mask"][slot] = env.foreground(ids)
            arrays["state"][slot] = env.state()
            start = time.perf_counter()
            for name, view in views.items():
                draw = [setup["alter_seed"], env.episode_id, env.elapsed] + [1] * (
                    name == "rgb_pre"
                )
                arrays[name][slot] = view(env, np.random.default_rng(draw))
            arrays["view_seconds"][slot] += time.perf_counter() - start

        while True:
            command, argument = conn.recv()
            answer = None
            if command == "reset":
                setup["alter_seed"] = argument["alter_seed"]
                for env, slot in zip(envs, setup["slots"]):
                    options = dict(
                        episode_ids=[argument["episode_ids"][slot]], split=argument["splits"][slot]
                    )
                    env.reset(seed=0, options=dict(options, reconfigure=argument["exact"]))
                    look(env, slot)
                answer = [env.instruction for env in envs]
            elif command == "step":
                for env, slot, chunk in zip(envs, setup["slots"], argument):
                    reward = 0.0
                    for action in chunk:
                        env.step(action)
                        env.elapsed += 1
                        reward += env.reward()
                    arrays["reward"][slot], arrays["episode_return"][slot] = (
                        reward,
                        env.return_so_far,
                    )
                    arrays["success"][slot], arrays["success_once"][slot] = (
                        env.success,
                        env.success_once,
                    )
                    arrays["grasped"][slot] = env.ever_grasped
                    look(env, slot)
            elif command == "map":
                answer = _resolve(argument[0])(envs, *argument[1])
            conn.send(("ok", answer))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the main process is gone or has closed us
    except Exception as error:
        conn.send(
            ("fault", str(error)) if isinstance(error, Fault) else ("error", traceback.format_exc())
        )
    finally:
        builtin.URDF_FOLDER.cleanup()  # here, because a busy machine's worker is killed before Python would


def _reference(function) -> tuple[str, str]:
    """A module-level function as (file, name): a worker can import it even when its file is the running script."""
    return os.path.abspath(function.__code__.co_filename), function.__qualname__


def _resolve(reference):
    file, name = reference
    if os.path.dirname(file) not in sys.path:
        sys.path.insert(0, os.path.dirname(file))
    return vars(importlib.import_module(Path(file).stem))[name]


class VecEnv:
    """N environments in worker processes, all at the same step of their episodes. Made by `make_envs`."""

    def __init__(self, num_envs, assets, image_size, num_workers, views):
        pack = PACKS[assets]
        self.num_envs, self.num_workers = num_envs, num_workers
        self.image_size, self.max_episode_steps = (
            image_size or pack.image_size,
            pack.max_episode_steps,
        )
        self.instructions: list[str] = []
        self.elapsed = 0
        self._pictures = ["rgb", "mask", "state", *views]
        row = record(self.image_size, views)
        shared = tempfile.TemporaryFile()
        shared.truncate(num_envs * row.itemsize)
        self._arrays = np.frombuffer(mmap.mmap(shared.fileno(), 0), row)
        self._slots = [
            list(map(int, part)) for part in np.array_split(np.arange(num_envs), num_workers)
        ]
        self._workers = []
        cores = sorted(os.sched_getaffinity(0))
        first = (
            int(os.environ.get("LOCAL_RANK", 0)) * num_workers
        )  # torchrun's other processes have workers too
        here = os.path.dirname(os.path.abspath(__file__))
        code = f"import sys; sys.path.insert(0, {here!r}); import envs; envs.run_worker(%d, %d)"
        for i, slots in enumerate(self._slots):
            ours, theirs = socket.socketpair()
            command = [sys.executable, "-c", code % (theirs.fileno(), shared.fileno())]
            # A process group of its own: Ctrl-C is the main process's to handle, from the worker's first instant on
            process = subprocess.Popen(command, pass_fds=(theirs.fileno(), shared.fileno()), stdin=subprocess.DEVNULL,
                                       process_group=0)  # fmt: skip
            theirs.close()
            self._workers.append((process, Connection(ours.detach())))
            setup = dict(assets=assets, image_size=self.image_size, slots=slots, core=cores[(first + i) % len(cores)],
                         views={name: _reference(view) for name, view in views.items()})  # fmt: skip
            self._workers[-1][1].send(setup)
        shared.close()
        self._gather()

    @property
    def view_seconds(self) -> float:
        """How long each worker has drawn changed views so far, on average."""
        return float(self._arrays["view_seconds"].sum()) / self.num_workers

    def _send(self, messages):
        for (process, conn), message in zip(self._workers, messages):
            try:
                conn.send(message)
            except (BrokenPipeError, ConnectionResetError):
                self._died(process)

    def _gather(self) -> list:
        """One answer from every worker, in order. A worker that failed or died ends the run with a Fault, never a hang."""
        answers = {}
        while len(answers) < len(self._workers):
            waiting = {
                conn: (i, process)
                for i, (process, conn) in enumerate(self._workers)
                if i not in answers
            }
            for conn in wait(list(waiting)):
                i, process = waiting[conn]
                try:
                    kind, answer = conn.recv()
                except (EOFError, ConnectionResetError):
                    self._died(process)
                if kind != "ok":
                    self.close()
                    if kind == "error":
                        print(answer, file=sys.stderr)
                        answer = f"environment worker {i} failed, its traceback is above; nothing saved so far is lost"
                    raise Fault(answer)
                answers[i] = answer
        return [answers[i] for i in range(len(self._workers))]

    def _died(self, process):
        code = process.wait()
        self.close()
        how = (
            f"was killed by {signal.Signals(-code).name}"
            if code < 0
            else f"exited with code {code}"
        )
        hint = " (out of memory? use fewer --num-envs)" if code == -signal.SIGKILL else ""
        raise Fault(
            f"environment worker {process.pid} {how}{hint}; the run cannot go on, but nothing saved so far is lost"
        )

    def _read(self, *names) -> dict:
        return {name: torch.from_numpy(self._arrays[name].copy()) for name in names}

    def reset(self, episode_ids, split="train", exact: bool = False, alter_seed: int = 0) -> dict:
        """Start one episode per environment.

        Args:
            episode_ids: N ints. split: one name for all, or N names.
            exact: rebuild the scenes (0.2 s each), so that the episode does not depend on what was simulated before, to
                the last bit. Without it states differ by about 1e-8. Evaluation uses it, training does not.
            alter_seed: seeds what the rendered views draw, together with episode id and step.
        Returns: obs, a dict of torch tensors: rgb (N, H, W, 3) uint8, mask (N, H, W) bool (M of Eq. (5)), state (N, 8)
            float32, with `alter` rgb_alt and with `preserve` rgb_pre (N, H, W, 3) uint8. `self.instructions` holds N
            sentences.
        """
        splits = [split] * self.num_envs if isinstance(split, str) else list(split)
        for name in set(splits):
            parse_split(name)
        assert len(episode_ids) == len(splits) == self.num_envs
        ids = [int(i) for i in episode_ids]
        self._send(
            [("reset", dict(episode_ids=ids, splits=splits, exact=exact, alter_seed=alter_seed))]
            * len(self._workers)
        )
        self.instructions = sum(self._gather(), [])
        self.elapsed = 0
        return self._read(*self._pictures)

    def step(self, actions: torch.Tensor):
        """Carry out a chunk of actions (N, chunk, 7): metres and radians in the robot's base frame, gripper > 0 opens.

        Rewards are summed over the chunk; steps past the end of the episode are not taken; one picture is rendered at
        the end. Returns obs, reward (N,) float32, done (N,) bool, info: success, success_once, grasped (N,) bool,
        episode_return (N,) float32.
        """
        actions = (
            actions[:, : self.max_episode_steps - self.elapsed].cpu().numpy().astype(np.float32)
        )
        assert (
            actions.shape[0] == self.num_envs and actions.shape[1] > 0 and actions.shape[2] == 7
        ), actions.shape
        self._send([("step", actions[slots]) for slots in self._slots])
        self._gather()
        self.elapsed += actions.shape[1]
        done = torch.full((self.num_envs,), self.elapsed >= self.max_episode_steps)
        info = self._read("reward", "success", "success_once", "grasped", "episode_return")
        return self._read(*self._pictures), info.pop("reward"), done, info

    def map(self, function, *args) -> list:
        """function(environments of the worker, *args[i]) in every worker i at once; returns one result per worker.

        `args` is one tuple of arguments per worker. `function` must be defined at the top of a file.
        """
        self._send([("map", (_reference(function), a)) for a in args])
        return self._gather()

    def close(self):
        for process, conn in self._workers:
            conn.close()
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._workers = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def choose_sim(sim: str) -> str:
    """--sim -> "cpu" or "cuda". Raises Fault where "cuda" is not possible; nothing is fetched."""
    if sim == "cpu":
        return "cpu"
    library = Path.home() / f".sapien/physx/{sapien.physx.version()}/libPhysXGpu_64.so"
    if not torch.cuda.is_available():
        lacks = "there is no CUDA device here"
    elif not library.is_file():
        lacks = f"{library} is missing: `python -c 'import sapien.physx; sapien.physx.enable_gpu()'` fetches it"
    elif render_backend() != "gpu":
        lacks = "SAPIEN cannot draw on this GPU: `python envs.py --check` says what it draws with"
    else:
        return "cuda"
    if sim == "cuda":
        raise Fault(f"--sim cuda: {lacks}; --sim cpu needs no GPU")
    if torch.cuda.is_available():
        print(
            f"physics on the CPU, pictures on the {render_backend().upper()}: {lacks}",
            file=sys.stderr,
        )
    return "cpu"


def make_envs(
    num_envs,
    assets="builtin",
    *,
    image_size=None,
    num_workers=None,
    alter=None,
    preserve=None,
    sim="cpu",
):
    """N environments of asset pack `assets`, spread over `num_workers` processes (default: one per core) -> VecEnv; or
    with `sim` "cuda", or "auto" where that is possible, all in this process with GPU physics (envs_cuda.py).

    Args:
        image_size: pixels of the square pictures; default: the pack's.
        alter, preserve: functions (env, numpy Generator) -> (H, W, 3) uint8 from views.py, rendered at every look: they
            add rgb_alt and rgb_pre to the observation.
    Raises: Fault on a wrong argument, or when a worker fails to start.
    """
    if num_envs < 1:
        raise Fault(f"--num-envs is {num_envs}: it must be at least 1")
    find_pack(assets)
    views = {
        name: view for name, view in (("rgb_alt", alter), ("rgb_pre", preserve)) if view is not None
    }
    if choose_sim(sim) == "cuda":
        from envs_cuda import CudaVecEnv  # which imports this file

        return CudaVecEnv(num_envs, assets, image_size, views)
    cores = len(os.sched_getaffinity(0))
    return VecEnv(num_envs, assets, image_size, min(num_envs, num_workers or cores), views)


# ------------------------------------------------------------ Command line: preflight
@dataclass
class Args:
    check: bool = False
    """does this machine render? prints versions, driver, time of one frame, free space; says what to install if not"""
    gallery: str | None = None
    """PNG file to draw a contact sheet in: every split, and the views with their mask (gallery.py)"""
    assets: str = "builtin"
    """asset pack that is drawn: builtin or rl4vla"""
    download: bool = False
    """fetch what is missing of the pack rl4vla (about 45 MB); asks nothing, can be interrupted and started again"""


INSTALL = (
    "install Mesa's lavapipe, version 24.3 or later: `make setup` does it on Debian and Ubuntu where it may use apt-get,"
    " elsewhere it prints the commands"
)


def probe(assets: str):
    """Runs in a child process, because a broken driver may take its process down: prints one line of JSON."""
    device = (
        sapien.render.get_device_summary().strip()
        + f"\nphysics on the CPU, pictures on the {render_backend().upper()}"
    )
    start = time.perf_counter()
    env = make_env(assets)
    env.reset(seed=0, options=dict(episode_ids=[0], split="train"))
    env.picture()
    first = time.perf_counter() - start
    start = time.perf_counter()
    rgb, ids = env.picture()
    frame = time.perf_counter() - start
    shown = env.foreground(
        ids
    ).mean()  # the mask comes from the second picture that a driver must be able to draw
    print(
        json.dumps(
            dict(
                device=device,
                first=first,
                frame=frame,
                contrast=float(rgb.std()),
                shown=float(shown),
            )
        )
    )


def check(assets: str):
    """Preflight: prints what is here. Raises Fault with what to install where no picture comes out."""
    find_pack(assets)
    names = ("torch", "mani_skill", "sapien", "transformers")
    print("python", sys.version.split()[0], *(f"| {name} {version(name)}" for name in names))
    gigabyte = 1e9
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / gigabyte
    disk = shutil.disk_usage(".").free / gigabyte
    print(
        f"{len(os.sched_getaffinity(0))} cores | free: {memory:.1f} GB memory, {disk:.1f} GB disk here",
        end="",
    )
    if torch.cuda.is_available():
        print(
            f", {torch.cuda.mem_get_info()[0] / gigabyte:.1f} GB on {torch.cuda.get_device_name()}"
        )
    else:
        print(" | no CUDA device")
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent.resolve())!r}); import envs; envs.probe({assets!r})"
    try:
        child = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=300
        )
    except subprocess.TimeoutExpired:
        raise Fault(f"the Vulkan driver did not draw one frame in 300 s: {INSTALL}")
    if child.returncode < 0:
        raise Fault(
            f"the Vulkan driver crashed ({signal.Signals(-child.returncode).name}) when it had to draw: {INSTALL}"
        )
    if child.returncode > 0:
        reason = (child.stderr.strip() or "it said nothing").splitlines()[-1]
        if "vk::" in reason or "device" in reason:
            raise Fault(f"no Vulkan device that can draw ({reason}): {INSTALL}")
        print(child.stderr, file=sys.stderr)
        raise Fault(f"no frame could be drawn, the traceback is above ({reason})")
    found = json.loads(child.stdout.splitlines()[-1])
    print(found["device"])
    print(
        f"first frame after {found['first']:.1f} s (compiles shaders), the next in {1000 * found['frame']:.1f} ms"
    )
    if found["contrast"] < 5 or not 0.01 < found["shown"] < 0.9:
        raise Fault(f"the Vulkan driver drew an empty picture: {INSTALL}")
    print("ok: this machine renders")


def main(args: Args):
    if not (args.check or args.download or args.gallery):
        raise Fault("nothing to do: say --check, --gallery FILE.png or --download")
    if args.download:
        try:
            rl4vla.download()
        except OSError as error:
            reason = str(error).splitlines()[0]
            raise Fault(
                f"--download: {reason}; check the network and start it again, it goes on where it was"
            )
        find_pack("rl4vla")
        print(
            "ok: the pack rl4vla is complete in",
            " and ".join(map(str, rl4vla.asset_folders().values())),
        )
    if args.check:
        check(args.assets)
    if args.gallery:
        import gallery  # which imports this file

        gallery.draw_sheet(args.gallery, args.assets)


if __name__ == "__main__":
    sys.modules["envs"] = sys.modules[
        "__main__"
    ]  # gallery.py imports this file: it must not run twice
    try:
        main(tyro.cli(Args))
    except Fault as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
