"""The task: "put {object} on plate" in ManiSkill3. One scene on a CPU; scenes/gpu.py has N at once
on a GPU.

What is a number or a numpy array in one scene is a torch tensor with N rows there.

A scene shows what it is told: an `Episode` of envs.py. It renders only where a policy looks, and a
changed view is one more picture. Physics does not notice a view, to the last bit (tested).
"""

from __future__ import annotations

import os

# Mesa's CPU renderer draws in the calling thread: one process per core, no contention
os.environ.setdefault("LP_NUM_THREADS", "0")

import time
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import sapien
import torch
import torch.nn.functional as F
from mani_skill.envs.sapien_env import BaseEnv
from mani_skill.sensors.camera import CameraConfig
from mani_skill.utils import sapien_utils
from mani_skill.utils.structs.types import SimConfig
from sapien.physx import PhysxMaterial
from sapien.render import RenderBodyComponent, RenderDirectionalLightComponent, RenderMaterial
from transforms3d.euler import euler2quat

from runtime import LOCAL_RANK

TABLE_Z = 0.8695  # height of the table top in metres, as in RL4VLA's Bridge scene
CENTER = np.array([-0.16, 0.0])  # xy of the workspace: a turned camera orbits about it
COS_85 = np.cos(np.deg2rad(85))


@dataclass(frozen=True)
class Light:
    """Ambient light, a key light and two fill lights (B.2). Colours are linear RGB, directions
    point away from the light."""

    ambient: tuple = (0.3, 0.3, 0.3)
    key_direction: tuple = (0.0, 0.0, -1.0)
    key: tuple = (2.2, 2.2, 2.2)
    fill_directions: tuple = ((-1.0, -0.5, -1.0), (1.0, 1.0, -1.0))
    fill: tuple = (0.7, 0.7, 0.7)

    @property
    def lamps(self) -> list[tuple]:
        """(direction, colour) of the key light and the fills."""
        return [(self.key_direction, self.key), *((d, self.fill) for d in self.fill_directions)]


def held_out_lights(share: float = 1.0) -> list[Light]:
    """The 20 held-out conditions: 5 key directions x (dim, bright, warm, cold). OPEN: the paper
    does not list its 20. share: how far they are from the training light, towards the strongest."""
    conditions = (  # ambient, key, brightness of the fills
        ((0.08, 0.08, 0.08), (1.0, 1.0, 1.0), 0.15),
        ((0.55, 0.55, 0.55), (3.6, 3.6, 3.6), 1.1),
        ((0.28, 0.22, 0.12), (3.2, 1.9, 0.8), 0.4),
        ((0.12, 0.18, 0.32), (0.9, 1.5, 3.2), 0.4),
    )
    train, lights = Light(), []

    def towards(a, b):
        return tuple(map(float, (1 - share) * np.array(a) + share * np.array(b)))

    def turned(a, b):
        return towards(*(np.array(x) / np.linalg.norm(x) for x in (a, b)))

    for x, y, z in ((1, 0, -0.6), (-1, 0, -0.6), (0, 1, -0.6), (0, -1, -0.6), (0.3, 0.3, -1)):
        fills = ((-y - 0.3, x - 0.3, -1), (y + 0.3, 0.3 - x, -1))
        fills = tuple(map(turned, train.fill_directions, fills))
        for ambient, key, fill in conditions:
            light = [towards(train.ambient, ambient), turned(train.key_direction, (x, y, z))]
            color = [fill * c / max(key) for c in key]
            light += [towards(train.key, key), fills, towards(train.fill, color)]
            lights.append(Light(*light))
    return lights


def render_backend() -> str:
    """What SAPIEN draws on: this rank's NVIDIA GPU where it can, else the CPU. Physics runs on the
    CPU either way."""
    for device in (f"cuda:{LOCAL_RANK}", "cuda"):  # a launcher may show each rank one GPU only
        try:
            if sapien.Device(device).can_render():
                return f"sapien_{device}"
        except RuntimeError:  # there is no such device
            pass
    return "sapien_cpu"


def moved(pose: sapien.Pose, dx: float, dy: float, yaw: float) -> sapien.Pose:
    """A body's pose, shifted by metres and turned about the vertical by radians."""
    turn = sapien.Pose(q=euler2quat(0, 0, yaw))
    return sapien.Pose(pose.p + [dx, dy, 0], (turn * sapien.Pose(q=pose.q)).q)


def resized(pictures: torch.Tensor, shape, resize: str) -> torch.Tensor:
    """What a camera shows, (N, H, W, C) uint8, in fewer pixels, as RL4VLA and RLinf do it.

    "squash": into a square (RL4VLA, and RLinf's OpenVLA). "keep": the aspect ratio (openpi, and
    RLinf's pi0, which adds black rows).
    """
    mode = dict(squash="bicubic", keep="bilinear")[resize]
    x = F.interpolate(pictures.permute(0, 3, 1, 2).float(), shape, mode=mode, antialias=True)
    return x.clamp(0, 255).round().byte().permute(0, 2, 3, 1)


def resized_mask(masks: torch.Tensor, shape, resize: str) -> torch.Tensor:
    """(N, H, W) bool -> the pixels that are mostly foreground."""
    return resized(255 * masks[..., None].byte(), shape, resize)[..., 0] > 127


def length(vectors):
    """(..., 3) -> (...), of numpy or torch."""
    return (vectors**2).sum(-1) ** 0.5


class PutOnPlate(BaseEnv):
    """One scene: `reset(options=dict(episodes=[an Episode]))`, `step(action (7,))`, `picture()`.

    pack: the PACK of scenes/builtin.py or scenes/rl4vla.py. sample: (episode id, split name) ->
    Episode, for a reset without one. resize: None draws the frames at once; "squash" or "keep"
    draws the camera's own pixels and resizes them, where the pack has such a camera.
    """

    SUPPORTED_OBS_MODES = ["none"]
    SUPPORTED_REWARD_MODES = ["none"]
    parking_x = 2.0  # metres

    def __init__(self, pack, sample, image_size=None, resize=None, num_envs=1):
        self.pack, self.sample = pack, sample
        self.view_seconds = 0.0  # spent on changed views so far
        size = image_size or pack.image_size
        self.frame_shape = self.drawn_shape = (size, size)
        self.resize = resize if pack.camera_shape else None
        if self.resize:
            self.drawn_shape = height, width = pack.camera_shape
        if self.resize == "keep":
            self.frame_shape = (size * height // width, size)
        super().__init__(robot_uids=pack.robot_uid, num_envs=num_envs, **self.backends())

    def backends(self) -> dict:
        return dict(sim_backend="cpu", render_backend=render_backend())

    @property
    def _default_sim_config(self):
        return SimConfig(sim_freq=self.pack.sim_freq, control_freq=5, spacing=20)

    @property
    def _default_sensor_configs(self):
        """The camera sits on a body, so that turning it is setting a pose."""
        height, width = self.drawn_shape
        options = dict(near=0.01, far=10, mount=self.camera_mount, shader_pack="minimal")
        options |= self.pack.lens(height, width)
        return [CameraConfig("camera", sapien.Pose(), width, height, **options)]

    # ------------------------------------------------------------------------------------ scene
    def _load_agent(self, options):
        super()._load_agent(options, self.pack.base_pose)
        if self.pack.robot_look:
            for robot in self.agent.robot._objs:
                sapien_utils.set_articulation_render_material(robot, **self.pack.robot_look)

    def _load_scene(self, options):
        def builder_at(pose):
            builder = self.scene.create_actor_builder()
            builder.initial_pose = pose
            return builder

        # Bodies are drawn in the order in which they are made. So the nearer come first: what they
        # hide is not shaded.
        self.camera_mount = builder_at(sapien.Pose()).build_kinematic("camera_mount")
        friction = PhysxMaterial(1.0, 1.0, 0.0)
        self.objects = []
        for i, name in enumerate(self.pack.names):
            builder = builder_at(self._parked(i))
            self.pack.build_object(i, builder, friction)
            self.objects.append(builder.build(name))
            # PhysX has no rolling friction: without damping round objects roll off the table
            self.objects[-1].set_angular_damping(5.0)
        plate = builder_at(sapien.Pose([0, 0, 1.2]))
        self.pack.build_plate(plate, friction)
        self.plate = plate.build("plate")
        self.table_tops = []  # thin pictures of a table, of which one is visible
        for i, material in enumerate(self.pack.table_materials):
            top = builder_at(sapien.Pose([-0.2, 0, TABLE_Z - 0.0015]))
            top.add_box_visual(half_size=[0.55, 0.55, 0.002], material=material)
            self.table_tops.append(top.build_kinematic(f"table_top_{i}"))
        table = builder_at(sapien.Pose([-0.2, 0, TABLE_Z - 0.05]))
        table.add_box_collision(half_size=[0.55, 0.55, 0.05])
        table.build_static("table")
        floor = builder_at(sapien.Pose([0, 0, -0.05]))
        floor.add_box_collision(half_size=[6, 6, 0.05])
        if self.pack.floor:
            look = RenderMaterial(base_color=self.pack.floor)
            floor.add_box_visual(half_size=[6, 6, 0.05], material=look)
        floor.build_static("floor")

    def _parked(self, i: int) -> sapien.Pose:
        """On the floor, out of sight, asleep."""
        return sapien.Pose([self.parking_x + 0.3 * (i % 5), 0.3 * (i // 5), 0.06])

    def _load_lighting(self, options):
        for direction, color in self.pack.lights[0].lamps:
            # No shadow: it would draw everything twice
            self.scene.add_directional_light(list(direction), list(color))

    def _after_reconfigure(self, options):
        parts = [part for entity in self.scene.sub_scenes[0].entities for part in entity.components]
        self.lamps = [part for part in parts if isinstance(part, RenderDirectionalLightComponent)]
        self.camera = self.scene.sensors["camera"].camera._render_cameras[0]
        self.links = [link._objs[0].entity for link in self.agent.robot.get_links()]
        fingers = (self.agent.finger1_link, self.agent.finger2_link)
        self.fingers = [finger._objs[0].entity for finger in fingers]
        self.tcp_entity = self.agent.tcp._objs[0].entity
        self.plate_entity = self.plate._objs[0]
        self.photos = self.pack.photos(*self.drawn_shape)
        self.shown = range(len(self.objects))

    def set_light(self, light: Light):
        self.scene.sub_scenes[0].render_system.ambient_light = list(light.ambient)
        for lamp, (direction, color) in zip(self.lamps, light.lamps, strict=True):
            lamp.color = list(color)
            turn = sapien.math.shortest_rotation([1, 0, 0], list(direction))
            lamp.entity.pose = sapien.Pose([0, 0, 0], turn)

    def camera_pose(self, degrees: float) -> sapien.Pose:
        """Orbit by `degrees` about the vertical through CENTER. OPEN: the paper says "rotation"."""
        c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
        turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
        pack, center = self.pack, np.array([*CENTER, 0])
        eye, at = (center + turn @ (p - center) for p in (pack.camera_eye, pack.camera_at))
        return sapien_utils.look_at(eye, at).sp

    def set_table(self, index: int):
        for i, top in enumerate(self.table_tops):
            body = top._objs[0].find_component_by_type(RenderBodyComponent)
            body.visibility = float(i == index)
        self.table_now = index

    # ------------------------------------------------------------------------------------ episode
    @property
    def episode(self):
        return self.episodes[0]

    @property
    def elapsed(self) -> int:
        """Steps of the episode so far."""
        return int(self.elapsed_steps[0])

    def _initialize_episode(self, env_idx, options):
        if "episodes" in options:
            self.episodes = options["episodes"]
        else:  # plain gymnasium use, reset(seed=...), and ManiSkill's own first reset
            ids = self._batched_episode_rng.randint(2**31 - 1)
            self.episodes = [self.sample(int(i), "train") for i in ids]
        self._lay_out()
        zero = 0.0 * self.target_half_z
        self.streak, self.return_so_far = zero, zero
        self.grasped = self.ever_grasped = self.ever_held = zero > 0
        self.success = self.success_once = zero > 0

    def poses_on_table(self, e) -> dict[int, sapien.Pose]:
        """Where the objects of episode e begin: index of the object -> pose."""
        poses = {}
        distractors = zip(e.distractors, e.distractor_xy, e.distractor_yaw)
        for i, xy, yaw in ((e.target, e.target_xy, e.target_yaw), *distractors):
            z = self.pack.spawn_z(i, i == e.target)
            poses[i] = sapien.Pose([*xy, z], euler2quat(0, 0, yaw))
        return poses

    def _lay_out(self):
        """Light, camera, table and bodies of the episode. ManiSkill has stopped what moved."""
        e = self.episode
        self.set_light(self.pack.lights[e.light])
        self.camera_mount._objs[0].pose = self.camera_pose(e.camera_deg)
        self.set_table(e.table)
        in_use = self.poses_on_table(e)
        for i, actor in enumerate(self.objects):
            if i in in_use or i in self.shown:
                entity = actor._objs[0]
                entity.pose = in_use[i] if i in in_use else self._parked(i)
                entity.find_component_by_type(RenderBodyComponent).visibility = float(i in in_use)
        self.shown = set(in_use)
        self.plate_entity.pose = sapien.Pose([*e.plate_xy, self.pack.plate_spawn_z])
        self._settle()
        self.target = self.objects[e.target]
        self.target_entity = self.target._objs[0]
        rotation = self.target_entity.pose.to_transformation_matrix()[:3, :3]
        self.target_half_z = self.half_height(rotation, self.pack.sizes[e.target])

    @staticmethod
    def half_height(rotation, size):
        """Rotation (..., 3, 3) of a box with sides (..., 3) -> half of its height (...)."""
        return (abs(rotation[..., 2, :]) * size).sum(-1) / 2

    def _settle(self):
        """The robot waits a metre up: until its controller is reset, after this, it still chases
        its last targets."""
        pack = self.pack
        self.agent.robot.set_pose(sapien.Pose(pack.base_pose.p + [0, 0, 1.0], pack.base_pose.q))
        self.agent.reset(init_qpos=pack.init_qpos)
        self._run_physics()
        self.agent.robot.set_pose(pack.base_pose)
        self.agent.reset(init_qpos=pack.init_qpos)

    def _run_physics(self):
        def moves(i):
            return torch.linalg.norm(self.objects[i].linear_velocity) > 0.01

        for _ in range(int(0.3 * self.pack.sim_freq)):
            self.scene.step()
        if self.pack.settles_again and any(map(moves, self.shown)):
            for _ in range(self.pack.sim_freq):
                self.scene.step()

    # ------------------------------------------------------------------------------------ rules
    def evaluate(self):
        """After every step (ManiSkill calls it). A grasp is ManiSkill's: each finger presses the
        target with 0.5 N or more, within 85 degrees of the direction in which it closes. Success is
        RL4VLA's: the target touches the plate (> 0.03 N) and lies over it."""
        forces, offset = self.contact_forces(), self.offset_from_plate()
        pressure = length(forces)
        along = (forces[..., :2, :] * self.closing_directions()).sum(-1)
        pressed = (pressure[..., :2] >= 0.5) & (along >= COS_85 * pressure[..., :2])
        self.grasped = pressed.all(-1)
        self.streak = (self.streak + 1) * self.grasped
        self.ever_grasped = self.ever_grasped | self.grasped
        self.ever_held = self.ever_held | (self.streak >= self.pack.grasp_streak)
        highest = self.pack.plate_height / 2 + self.target_half_z + 0.05
        self.success = (
            (length(offset[..., :2]) <= self.pack.plate_radius + 0.01)
            & (offset[..., 2] > 0)
            & (offset[..., 2] <= highest)
            & (pressure[..., 2] > 0.03)
        )
        self.success_once = self.success_once | self.success
        return dict(success=torch.as_tensor(self.success).reshape(self.num_envs))

    def play(self, actions) -> dict:
        """Carry out actions, one after another -> summed reward, and what VecEnv.step tells."""
        reward = 0.0
        for action in actions:
            self.step(action)
            reward = reward + self.reward()
        return dict(
            reward=reward,
            success=self.success,
            success_once=self.success_once,
            grasped=self.ever_grasped,
            episode_return=self.return_so_far,
        )

    def reward(self):
        """R_t - R_{t-1}; call once per step. Appendix B, with RL4VLA's values: R_t = 0.1 ever
        grasped + 0.1 ever grasped for a few steps on end + 1.0 (success and ever grasped)."""
        total = 0.1 * self.ever_grasped + 0.1 * self.ever_held
        total = total + 1.0 * (self.success & self.ever_grasped)
        reward, self.return_so_far = total - self.return_so_far, total
        return reward

    def contact_forces(self) -> np.ndarray:
        """(3, 3) newtons that the two fingers and the plate exert on the target."""
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

    def closing_directions(self) -> np.ndarray:
        """(2, 3): where each finger moves when the gripper closes."""
        first, second = (finger.pose.to_transformation_matrix()[:3, 1] for finger in self.fingers)
        return np.stack([-first, second])

    def offset_from_plate(self) -> np.ndarray:
        """(3,) metres from the plate to the target."""
        return self.target_entity.pose.p - self.plate_entity.pose.p

    def state(self) -> np.ndarray:
        """(8,) float32: the arm's 7 joint angles (radians) and one finger's opening (metres)."""
        return self.agent.robot._objs[0].qpos[:8].astype(np.float32)

    # ------------------------------------------------------------------------------------ pictures
    def look(self, views: dict, view_seed: int) -> dict:
        """-> an observation. What a view draws depends on what is shown, not on who shows it."""
        rgb, ids = self.picture()
        obs = dict(rgb=rgb, mask=self.foreground(ids), state=self.state())
        start = time.perf_counter()
        for name, view in views.items():
            keys = [[view_seed, e.id, self.elapsed] for e in self.episodes]
            keys = [key + [1] * (name == "rgb_pre") for key in keys]  # a stream of its own
            obs[name] = view(self, list(map(np.random.default_rng, keys)))
        self.view_seconds += time.perf_counter() - start
        return obs

    def picture(self) -> tuple[np.ndarray, np.ndarray]:
        """What the camera sees now: rgb (H, W, 3) uint8, and the id (int16) of the body in each
        pixel, of rgb or of what it was resized from."""
        self.scene.update_render(update_sensors=True, update_human_render_cameras=False)
        self.camera.take_picture()
        rgb = self.camera.get_picture("Color")[..., :3].copy()
        ids = self.camera.get_picture("PositionSegmentation")[..., 3].copy()
        if self.photos is not None:
            rgb = np.where(ids[..., None] == 0, self.photos[self.table_now], rgb)
        if self.resize:
            rgb = resized(torch.from_numpy(rgb)[None], self.frame_shape, self.resize)[0].numpy()
        return rgb, ids

    def foreground(self, ids: np.ndarray) -> np.ndarray:
        """The mask M of Eq. (5), (H, W) bool: where `ids` shows robot, target or plate."""
        keep = np.zeros(1024, bool)
        keep[[link.per_scene_id for link in self.links]] = True
        keep[[self.target_entity.per_scene_id, self.plate_entity.per_scene_id]] = True
        mask = keep[ids]
        if self.resize:
            masks = torch.from_numpy(mask)[None]
            mask = resized_mask(masks, self.frame_shape, self.resize)[0].numpy()
        return mask

    # What views.py asks for. Arguments have one entry per scene, of which there is one here.
    def target_moved(self, moves):
        """Draw the target elsewhere. moves: [(dx, dy, yaw)]."""
        return self.drawn_at(self.target_entity, moved(self.target_entity.pose, *moves[0]))

    def without_distractors(self):
        return self.hidden(self.objects[i]._objs[0] for i in self.episode.distractors)

    @contextmanager
    def on_tables(self, tables):
        before = self.table_now
        self.set_table(tables[0])
        try:
            yield
        finally:
            self.set_table(before)

    @contextmanager
    def from_cameras(self, degrees):
        mount = self.camera_mount._objs[0]
        before = mount.pose  # not exactly the one it was given: PhysX normalises the quaternion
        mount.pose = self.camera_pose(degrees[0])
        try:
            yield
        finally:
            mount.pose = before

    def empty_tables(self, tables: list[int]) -> np.ndarray:
        """(K, H, W, 3) uint8: tables with nothing on them, under the training light and camera."""
        bodies = [*self.links, *(actor._objs[0] for actor in self.objects), self.plate_entity]
        self.set_light(self.pack.lights[0])
        pictures = []
        with self.hidden(bodies), self.from_cameras([0.0]):
            for table in tables:
                with self.on_tables([table]):
                    pictures.append(self.picture()[0])
        self.set_light(self.pack.lights[self.episode.light])
        return np.array(pictures)

    @staticmethod
    @contextmanager
    def hidden(entities):
        """Draw without these bodies. Physics is not touched."""
        bodies = [entity.find_component_by_type(RenderBodyComponent) for entity in entities]
        before = [(body, body.visibility) for body in bodies if body is not None]
        for body, _ in before:
            body.visibility = 0.0
        try:
            yield
        finally:
            for body, visibility in before:
                body.visibility = visibility

    @staticmethod
    @contextmanager
    def drawn_at(entity, pose: sapien.Pose):
        """Draw one body at another pose, by moving its render nodes.

        Setting the body's pose and setting it back is not the same thing: it drops PhysX's cached
        contacts, and the run differs from the next step on. This way the simulator's state stays
        bit-identical (tested).
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
