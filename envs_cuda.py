"""The task of envs.py with N scenes in one process and PhysX on the GPU: what `--sim cuda` runs instead of worker processes.

The same episodes, rules and views; only how they are computed differs, in batches of N on the GPU. Where ManiSkill's
`physx_cuda` forbids something, this is the way around:

- what is drawn is read from `px.cuda_rigid_body_data`, which PhysX does not read back: a view is a write of poses to that
  buffer, a picture, and the old poses again (`drawn`). Nothing can be hidden, so it is drawn far below the floor.
- lights cannot change once a scene is built: a reset that needs other lights builds the scenes anew.
- the arm follows one step of Levenberg-Marquardt on the Jacobian, on a CPU Pinocchio's inverse kinematics.
- all scenes settle together, so each gets the longest time that any may need.

OPEN: this file has run on a CPU with one scene (tests/test_envs_cuda.py compares it with envs.py), not yet on a GPU.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, contextmanager

import gymnasium as gym
import numpy as np
import sapien
import torch
from mani_skill.utils.registration import register_env
from mani_skill.utils.structs import Pose
from sapien.render import RenderBodyComponent
from transforms3d.euler import euler2quat

import envs
import views

ENV_ID = "PairVLA-PutOnPlate-cuda-v0"
BELOW = torch.tensor([0, 0, -50.0, 1, 0, 0, 0])  # where nobody sees it


def raw(poses) -> torch.Tensor:
    """N sapien poses -> (N, 7) float32: xyz in metres, wxyz."""
    return torch.tensor(np.array([[*pose.p, *pose.q] for pose in poses], np.float32))


@register_env(ENV_ID, max_episode_steps=20)
class PutOnPlates(envs.PutOnPlate):
    """N scenes: `reset(options=dict(episodes=N of them, splits=N names))`, `step(actions (N, 7))`, then `picture()`."""

    @staticmethod
    def _parked(i: int) -> sapien.Pose:
        return sapien.Pose(
            [4.0 + 0.3 * (i % 5), 0.3 * (i // 5), 0.06]
        )  # out of every camera's sight

    def _load_lighting(self, options):
        self.lights_now = (
            [e.light for e in options["episodes"]] if "episodes" in options else [0] * self.num_envs
        )
        for i, light in enumerate(envs.LIGHTS[index] for index in self.lights_now):
            self.scene.sub_scenes[i].render_system.ambient_light = list(light.ambient)
            directions = (light.key_direction, *light.fill_directions)
            for direction, color in zip(
                directions, (light.key, light.fill, light.fill), strict=True
            ):
                self.scene.add_directional_light(list(direction), list(color), scene_idxs=[i])

    def _after_reconfigure(self, options):
        photos = self.pack.photos(self.image_size)
        self.photos = None if photos is None else torch.from_numpy(photos).to(self.device)
        self.links = self.agent.robot.get_links()
        self.fingers = [self.agent.finger1_link, self.agent.finger2_link]

    def _clear(self):
        """Before the scenes are built anew, and at the end: whatever holds the old ones would keep them on the GPU."""
        for name in ("objects", "plate", "table_tops", "camera_mount", "links", "fingers", "contact_query",
                     "_sensor_configs", "segmentation_id_map"):  # fmt: skip
            self.__dict__.pop(name, None)
        super()._clear()

    # ------------------------------------------------------------ episode
    def _initialize_episode(self, env_idx, options):
        assert len(env_idx) == self.num_envs, "all scenes start together"
        pack = self.pack
        if "episodes" not in options:  # ManiSkill's own reset, while it makes the environment
            options = dict(episodes=[envs.sample_episode(i, "train", pack) for i in range(self.num_envs)],
                           splits=["train"] * self.num_envs)  # fmt: skip
        self.episodes, self.splits = (
            options["episodes"],
            [envs.parse_split(name) for name in options["splits"]],
        )
        places = [[self._parked(i) for i in range(len(self.objects))] for _ in self.episodes]
        for place, e in zip(places, self.episodes):
            distractors = zip(e.distractors, e.distractor_xy, e.distractor_yaw)
            for i, xy, yaw in ((e.target, e.target_xy, e.target_yaw), *distractors):
                place[i] = sapien.Pose([*xy, pack.spawn_z(i, i == e.target)], euler2quat(0, 0, yaw))
        plates = [sapien.Pose([*e.plate_xy, pack.plate_spawn_z]) for e in self.episodes]
        for actor, poses in zip((*self.objects, self.plate), (*zip(*places), plates)):
            actor.set_pose(Pose.create(raw(poses), device=self.device))
            actor.set_linear_velocity(torch.zeros(self.num_envs, 3))
            actor.set_angular_velocity(torch.zeros(self.num_envs, 3))
        self.camera_mount.set_pose(
            Pose.create(
                raw(self.camera_pose(e.camera_deg) for e in self.episodes), device=self.device
            )
        )
        self.tables = torch.tensor([e.table for e in self.episodes], device=self.device)
        for actor, poses in self.with_tables(self.tables):
            actor.set_pose(Pose.create(poses, device=self.device))

        # Settle with the robot a metre up, as in envs.py
        self.agent.robot.set_pose(sapien.Pose(pack.base_pose.p + [0, 0, 1.0], pack.base_pose.q))
        self.agent.reset(init_qpos=pack.init_qpos)
        if self.gpu_sim_enabled:
            self.scene._gpu_apply_all()
            self.scene.px.gpu_update_articulation_kinematics()
        for _ in range(int((0.3 + pack.settles_again) * pack.sim_freq)):
            self.scene.step()
        if self.gpu_sim_enabled:
            self.scene._gpu_fetch_all()
        self.agent.robot.set_pose(pack.base_pose)
        self.agent.reset(init_qpos=pack.init_qpos)

        rotation = self.of_target(lambda actor: actor.pose.to_transformation_matrix()[:, :3, :3])
        sizes = torch.tensor(
            np.array([pack.sizes[e.target] for e in self.episodes]),
            dtype=torch.float32,
            device=self.device,
        )
        self.target_half_z = (rotation.abs()[:, 2] * sizes).sum(1) / 2
        self.contact_query = None
        self.keep = torch.zeros(
            self.num_envs, 1024, dtype=torch.bool, device=self.device
        )  # ids of M of Eq. (5)
        self.keep[:, [link._objs[0].entity.per_scene_id for link in self.links]] = True
        self.keep[:, self.plate._objs[0].per_scene_id] = True
        for n, e in enumerate(self.episodes):
            self.keep[n, self.objects[e.target]._objs[n].per_scene_id] = True

        nothing = torch.zeros(self.num_envs, device=self.device)
        self.streak, self.best_streak, self.return_so_far = (
            nothing.clone(),
            nothing.clone(),
            nothing.clone(),
        )
        self.ever_grasped, self.success_once = nothing.bool(), nothing.bool()
        self.elapsed = 0

    @property
    def instructions(self) -> list[str]:
        return [f"put {self.pack.names[e.target]} on plate" for e in self.episodes]

    def of_target(self, read) -> torch.Tensor:
        """read(actor) (N, ...) of the actor that is the target in each scene."""
        used = sorted({e.target for e in self.episodes})
        rows = torch.tensor([used.index(e.target) for e in self.episodes], device=self.device)
        return torch.stack([read(self.objects[i]) for i in used])[
            rows, torch.arange(self.num_envs, device=self.device)
        ]

    def contact_forces(self) -> torch.Tensor:
        """(N, 3, 3) newtons that the two fingers and the plate exert on the target."""
        others, px = [*self.fingers, self.plate], self.scene.px
        if not self.gpu_sim_enabled:
            target = self.objects[self.episodes[0].target]
            return torch.stack(
                [self.scene.get_pairwise_contact_forces(target, other) for other in others], 1
            )
        if (
            self.contact_query is None
        ):  # one query for all pairs of all scenes, made once an episode
            targets = [self.objects[e.target]._bodies[n] for n, e in enumerate(self.episodes)]
            pairs = [(body, other._bodies[n]) for n, body in enumerate(targets) for other in others]
            self.contact_query = px.gpu_create_contact_pair_impulse_query(pairs)
        px.gpu_query_contact_pair_impulses(self.contact_query)
        return (
            self.contact_query.cuda_impulses.torch().clone().view(self.num_envs, 3, 3) / px.timestep
        )

    def evaluate(self):
        forces = self.contact_forces()
        closing = torch.stack(
            [finger.pose.to_transformation_matrix()[:, :3, 1] for finger in self.fingers], 1
        )
        closing = closing * torch.tensor([-1.0, 1.0], device=self.device)[:, None]
        norm = forces[:, :2].norm(dim=-1)
        along = (forces[:, :2] * closing).sum(-1)
        self.grasped = ((norm >= 0.5) & (along >= np.cos(np.deg2rad(85)) * norm)).all(1)
        self.streak = (self.streak + 1) * self.grasped
        self.best_streak = torch.maximum(self.best_streak, self.streak)
        self.ever_grasped = self.ever_grasped | self.grasped
        offset = self.of_target(lambda actor: actor.pose.p) - self.plate.pose.p
        self.success = (
            (offset[:, :2].norm(dim=1) <= self.pack.plate_radius + 0.01)
            & (offset[:, 2] > 0)
            & (offset[:, 2] <= self.pack.plate_size[2] / 2 + self.target_half_z + 0.05)
            & (forces[:, 2].norm(dim=1) > 0.03)
        )
        self.success_once = self.success_once | self.success
        return dict(success=self.success)

    def reward(self) -> torch.Tensor:
        """(N,) R_t - R_{t-1}; call once per step."""
        total = 0.1 * self.ever_grasped + 0.1 * (self.best_streak >= self.pack.grasp_streak)
        total = total + 1.0 * (self.success & self.ever_grasped)
        reward, self.return_so_far = total - self.return_so_far, total
        return reward

    def state(self) -> torch.Tensor:
        """(N, 8) float32: the arm's 7 joint angles (radians) and one finger's opening (metres)."""
        return self.agent.robot.get_qpos()[:, :8].float()

    # ------------------------------------------------------------ pictures
    def picture(self, tables=None) -> tuple[torch.Tensor, torch.Tensor]:
        """What the cameras see now: rgb (N, H, W, 3) uint8 and the id of the body in each pixel (N, H, W) int16.

        tables (N,): the photographs behind, if not the episodes' own."""
        self.scene.update_render(update_sensors=True, update_human_render_cameras=False)
        camera = self.scene.sensors["camera"]
        camera.capture()
        pictures = camera.get_obs(rgb=True, segmentation=True, depth=False, position=False)
        rgb, ids = (
            pictures["rgb"].clone(),
            pictures["segmentation"][..., 0].clone(),
        )  # the buffers are those of the next one
        if self.photos is not None:
            rgb = torch.where(
                (ids == 0)[..., None], self.photos[self.tables if tables is None else tables], rgb
            )
        return rgb, ids

    def foreground(self, ids: torch.Tensor) -> torch.Tensor:
        """The mask M of Eq. (5): (N, H, W) bool."""
        return self.keep.gather(1, ids.long().flatten(1)).view(ids.shape)

    def with_tables(self, tables: torch.Tensor):
        """What `drawn` needs to show table number tables[n] in scene n."""
        shown = raw([sapien.Pose([-0.2, 0, envs.TABLE_Z - 0.0015])])
        for i, actor in enumerate(self.table_tops):
            yield actor, torch.where((tables.cpu() == i)[:, None], shown, BELOW)

    @contextmanager
    def drawn(self, moves):
        """Draw bodies elsewhere: moves are (actor or link, poses (N, 7)). Physics is not touched."""
        moves = list(moves)
        if self.gpu_sim_enabled:
            data = self.scene.px.cuda_rigid_body_data.torch()
            before = [data[body._body_data_index, :7].clone() for body, _ in moves]
            for body, poses in moves:
                data[body._body_data_index, :7] = poses.to(data)
            try:
                yield
            finally:
                for (body, _), poses in zip(moves, before):
                    data[body._body_data_index, :7] = poses
            return
        with ExitStack() as stack:
            for body, poses in moves:
                entity = getattr(body._objs[0], "entity", body._objs[0])
                pose = sapien.Pose(poses[0, :3].numpy(), poses[0, 3:].numpy())
                if entity.find_component_by_type(RenderBodyComponent) is not None:
                    stack.enter_context(views.drawn_at(entity, pose))
                elif body is self.camera_mount:
                    stack.callback(setattr, entity, "pose", entity.pose)
                    entity.pose = pose
            yield


# ------------------------------------------------------------ views.py in batches: (env, N generators) -> (N, H, W, 3) uint8
def task_altering(env: PutOnPlates, rngs) -> torch.Tensor:
    now = env.of_target(lambda actor: actor.pose.raw_pose).cpu().numpy()
    elsewhere = raw(
        views.altered_pose(sapien.Pose(pose[:3], pose[3:]), rng) for pose, rng in zip(now, rngs)
    )
    moves = []
    for i in {e.target for e in env.episodes}:
        poses = env.objects[i].pose.raw_pose.cpu()
        moves.append(
            (
                env.objects[i],
                torch.where(
                    torch.tensor([e.target == i for e in env.episodes])[:, None], elsewhere, poses
                ),
            )
        )
    with env.drawn(moves):
        return env.picture()[0]


def rerendered(env: PutOnPlates, rngs) -> torch.Tensor:
    tables = torch.tensor([int(rng.integers(16)) for rng in rngs], device=env.device)
    moves = list(env.with_tables(tables))
    for i, actor in enumerate(env.objects):
        hide = torch.tensor([i in e.distractors for e in env.episodes])[:, None]
        moves += (
            [(actor, torch.where(hide, BELOW, actor.pose.raw_pose.cpu()))] if hide.any() else []
        )
    with env.drawn(moves):
        return env.picture(tables)[0]


def other_camera(env: PutOnPlates, rngs) -> torch.Tensor:
    poses = raw(
        env.camera_pose(views.other_degrees(*three))
        for three in zip(env.splits, env.episodes, rngs)
    )
    with env.drawn([(env.camera_mount, poses)]):
        return env.picture()[0]


def render_backgrounds(env: PutOnPlates, tables: list[int]) -> np.ndarray:
    """(len(tables), H, W, 3) uint8, of scene 0, in an episode under the training light."""
    nothing = [
        (body, BELOW.repeat(env.num_envs, 1)) for body in (*env.links, *env.objects, env.plate)
    ]
    nothing.append((env.camera_mount, raw([env.camera_pose(0.0)]).repeat(env.num_envs, 1)))
    pictures = []
    for table in tables:
        indices = torch.full((env.num_envs,), table, device=env.device)
        with env.drawn([*nothing, *env.with_tables(indices)]):
            pictures.append(env.picture(indices)[0][0].cpu().numpy())
    return np.array(pictures)


BATCHED = {
    views.task_altering: task_altering,
    views.rerendered: rerendered,
    views.other_camera: other_camera,
    views.render_backgrounds: render_backgrounds,
}


class CudaVecEnv:
    """envs.VecEnv's interface on N scenes in this process. Tensors stay on the simulator's device."""

    num_workers = 1

    def __init__(
        self,
        num_envs,
        assets,
        image_size,
        views,
        sim_backend="physx_cuda",
        render_backend="sapien_cuda",
    ):
        gpu = f":{os.environ.get('LOCAL_RANK', 0)}"  # torchrun's
        sim_backend, render_backend = (
            name + gpu * ("cuda" in name) for name in (sim_backend, render_backend)
        )
        self.env = gym.make(ENV_ID, obs_mode="none", reward_mode="none", num_envs=num_envs, sim_backend=sim_backend,
                            render_backend=render_backend, pack=assets, image_size=image_size).unwrapped  # fmt: skip
        self.num_envs, self.image_size = num_envs, self.env.image_size
        self.max_episode_steps = self.env.pack.max_episode_steps
        self.views = {name: BATCHED[view] for name, view in views.items()}
        self.view_seconds = 0.0  # spent on changed views so far

    @property
    def instructions(self) -> list[str]:
        return self.env.instructions

    @property
    def elapsed(self) -> int:
        return self.env.elapsed

    def _look(self) -> dict:
        env = self.env
        rgb, ids = env.picture()
        obs = dict(rgb=rgb, mask=env.foreground(ids), state=env.state())
        start = time.perf_counter()
        for name, view in self.views.items():
            draws = [
                [self.alter_seed, i, env.elapsed] + [1] * (name == "rgb_pre")
                for i in self.episode_ids
            ]
            obs[name] = view(env, [np.random.default_rng(draw) for draw in draws])
        self.view_seconds += time.perf_counter() - start
        return obs

    def reset(self, episode_ids, split="train", exact: bool = False, alter_seed: int = 0) -> dict:
        """See VecEnv.reset; PhysX on a GPU does not promise the same bits twice, `exact` or not."""
        splits = [split] * self.num_envs if isinstance(split, str) else list(split)
        self.episode_ids, self.alter_seed = [int(i) for i in episode_ids], alter_seed
        episodes = [
            envs.sample_episode(i, name, self.env.pack)
            for i, name in zip(self.episode_ids, splits, strict=True)
        ]
        anew = exact or [e.light for e in episodes] != self.env.lights_now
        self.env.reset(seed=0, options=dict(episodes=episodes, splits=splits, reconfigure=anew))
        return self._look()

    def step(self, actions: torch.Tensor):
        """See VecEnv.step."""
        env, reward = self.env, 0
        for action in actions[:, : self.max_episode_steps - env.elapsed].to(env.device).unbind(1):
            env.step(action)
            env.elapsed += 1
            reward = reward + env.reward()
        done = torch.full((self.num_envs,), env.elapsed >= self.max_episode_steps)
        info = dict(success=env.success, success_once=env.success_once, grasped=env.ever_grasped,
                    episode_return=env.return_so_far)  # fmt: skip
        return self._look(), reward, done, {name: value.clone() for name, value in info.items()}

    def map(self, function, *args) -> list:
        """Of views.py's functions those that have a batched twin here."""
        return [BATCHED[function](self.env, *args[0])]

    def close(self):
        self.env.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
