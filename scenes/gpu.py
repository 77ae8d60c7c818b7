"""N scenes in one process with PhysX on the GPU: what `--sim cuda` runs.

The same episodes, rules and views as scenes/task.py, in batches of N. Where ManiSkill's
`physx_cuda` forbids something, this is the way around:

- what is drawn is read from `px.cuda_rigid_body_data`, which PhysX does not read back: a view is a
  write of poses to that buffer, a picture, and the old poses again (`drawn`). Nothing can be
  hidden, so it is drawn far below the floor.
- lights cannot change once a scene is built: a reset that needs other lights builds it again.
- the arm follows one step of Levenberg-Marquardt on the Jacobian, on a CPU Pinocchio's inverse
  kinematics.
- all scenes settle together, so each gets the longest time that any may need.

OPEN: this file has not yet run on a GPU. tests/test_gpu.py compares one scene of it on a CPU with
scenes/task.py.
"""

from contextlib import contextmanager

import numpy as np
import sapien
import torch
from mani_skill.utils.structs import Pose

from runtime import own_device
from scenes.task import TABLE_Z, PutOnPlate, moved, resized, resized_mask
from scenes.workers import VecEnv

BELOW = torch.tensor([0, 0, -50.0, 1, 0, 0, 0])  # where nobody sees it


def raw(poses) -> torch.Tensor:
    """N sapien poses -> (N, 7) float32: xyz in metres, wxyz."""
    return torch.tensor(np.array([[*pose.p, *pose.q] for pose in poses], np.float32))


class PutOnPlates(PutOnPlate):
    """N scenes: `reset(options=dict(episodes=N of them))`, `step(actions (N, 7))`, then
    `picture()`."""

    parking_x = 4.0  # out of every camera's sight, because nothing can be hidden

    def backends(self) -> dict:
        gpu = own_device(cuda=True)
        return dict(sim_backend=f"physx_{gpu}", render_backend=f"sapien_{gpu}")

    def _load_lighting(self, options):
        episodes = options["episodes"] if "episodes" in options else [None] * self.num_envs
        self.lights_now = [0 if e is None else e.light for e in episodes]
        for i, light in enumerate(self.pack.lights[index] for index in self.lights_now):
            self.scene.sub_scenes[i].render_system.ambient_light = list(light.ambient)
            for direction, color in light.lamps:
                self.scene.add_directional_light(list(direction), list(color), scene_idxs=[i])

    def _after_reconfigure(self, options):
        photos = self.pack.photos(*self.drawn_shape)
        self.photos = None if photos is None else torch.from_numpy(photos).to(self.device)
        self.links = self.agent.robot.get_links()
        self.fingers = [self.agent.finger1_link, self.agent.finger2_link]

    def _clear(self):
        """Before the scenes are built again, and at the end: whatever holds the old ones would keep
        them on the GPU."""
        for name in (
            "objects",
            "plate",
            "table_tops",
            "camera_mount",
            "links",
            "fingers",
            "contact_query",
            "_sensor_configs",
            "segmentation_id_map",
        ):
            self.__dict__.pop(name, None)
        super()._clear()

    # ------------------------------------------------------------------------------------ episode
    def _lay_out(self):
        def put(actor, poses):
            actor.set_pose(Pose.create(poses, device=self.device))

        episodes, pack = self.episodes, self.pack
        parked = {i: self._parked(i) for i in range(len(self.objects))}
        places = [parked | self.poses_on_table(e) for e in episodes]
        for i, actor in enumerate(self.objects):
            put(actor, raw(place[i] for place in places))
        put(self.plate, raw(sapien.Pose([*e.plate_xy, pack.plate_spawn_z]) for e in episodes))
        put(self.camera_mount, raw(self.camera_pose(e.camera_deg) for e in episodes))
        self.tables = torch.tensor([e.table for e in episodes], device=self.device)
        for actor, poses in self._table_poses(self.tables):
            put(actor, poses)
        self._settle()
        rotation = self.of_target(lambda actor: actor.pose.to_transformation_matrix()[:, :3, :3])
        sizes = torch.tensor(np.float32([pack.sizes[e.target] for e in episodes]))
        self.target_half_z = self.half_height(rotation, sizes.to(self.device))
        self.contact_query = None
        # Which ids belong to M of Eq. (5)
        self.keep = torch.zeros(self.num_envs, 1024, dtype=torch.bool, device=self.device)
        self.keep[:, [link._objs[0].entity.per_scene_id for link in self.links]] = True
        self.keep[:, self.plate._objs[0].per_scene_id] = True
        for n, e in enumerate(episodes):
            self.keep[n, self.objects[e.target]._objs[n].per_scene_id] = True

    def _run_physics(self):
        self.scene._gpu_apply_all()
        self.scene.px.gpu_update_articulation_kinematics()
        for _ in range(int((0.3 + self.pack.settles_again) * self.pack.sim_freq)):
            self.scene.step()
        self.scene._gpu_fetch_all()

    def of_target(self, read) -> torch.Tensor:
        """read(actor) (N, ...) of the actor that is the target in each scene."""
        used = sorted({e.target for e in self.episodes})
        rows = torch.tensor([used.index(e.target) for e in self.episodes], device=self.device)
        columns = torch.arange(self.num_envs, device=self.device)
        return torch.stack([read(self.objects[i]) for i in used])[rows, columns]

    # ------------------------------------------------------------------------------------ rules
    def contact_forces(self) -> torch.Tensor:
        """(N, 3, 3) newtons that the two fingers and the plate exert on the target."""
        others, px = [*self.fingers, self.plate], self.scene.px
        if self.contact_query is None:  # one for all pairs of all scenes, made once an episode
            targets = [self.objects[e.target]._bodies[n] for n, e in enumerate(self.episodes)]
            pairs = [(body, other._bodies[n]) for n, body in enumerate(targets) for other in others]
            self.contact_query = px.gpu_create_contact_pair_impulse_query(pairs)
        px.gpu_query_contact_pair_impulses(self.contact_query)
        impulses = self.contact_query.cuda_impulses.torch().clone()
        return impulses.view(self.num_envs, 3, 3) / px.timestep

    def closing_directions(self) -> torch.Tensor:
        """(N, 2, 3)"""
        matrices = (finger.pose.to_transformation_matrix() for finger in self.fingers)
        first, second = (matrix[:, :3, 1] for matrix in matrices)
        return torch.stack([-first, second], 1)

    def offset_from_plate(self) -> torch.Tensor:
        """(N, 3)"""
        return self.of_target(lambda actor: actor.pose.p) - self.plate.pose.p

    def state(self) -> torch.Tensor:
        """(N, 8) float32: the arm's 7 joint angles (radians) and one finger's opening (metres)."""
        return self.agent.robot.get_qpos()[:, :8].float()

    # ------------------------------------------------------------------------------------ pictures
    def picture(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the cameras see now: rgb (N, H, W, 3) uint8 and the id of the body in each pixel (N,
        H, W) int16."""
        self.scene.update_render(update_sensors=True, update_human_render_cameras=False)
        camera = self.scene.sensors["camera"]
        camera.capture()
        pictures = camera.get_obs(rgb=True, segmentation=True, depth=False, position=False)
        # Copies, because the buffers are those of the next picture
        rgb, ids = pictures["rgb"].clone(), pictures["segmentation"][..., 0].clone()
        if self.photos is not None:
            rgb = torch.where((ids == 0)[..., None], self.photos[self.tables], rgb)
        return resized(rgb, self.frame_shape, self.resize) if self.resize else rgb, ids

    def foreground(self, ids: torch.Tensor) -> torch.Tensor:
        """The mask M of Eq. (5): (N, H, W) bool."""
        mask = self.keep.gather(1, ids.long().flatten(1)).view(ids.shape)
        return resized_mask(mask, self.frame_shape, self.resize) if self.resize else mask

    def target_moved(self, moves):
        now = self.of_target(lambda actor: actor.pose.raw_pose).cpu().numpy()
        poses = (sapien.Pose(pose[:3], pose[3:]) for pose in now)
        elsewhere = raw(moved(pose, *move) for pose, move in zip(poses, moves))
        return self._drawn_instead(lambda e: [e.target], elsewhere)

    def without_distractors(self):
        return self._drawn_instead(lambda e: e.distractors, BELOW)

    def _drawn_instead(self, which, poses):
        """Draw the objects with the indices which(episode) of each scene at poses (N, 7) or
        (7,)."""
        bodies = []
        for i, actor in enumerate(self.objects):
            chosen = torch.tensor([i in which(e) for e in self.episodes])[:, None]
            if chosen.any():
                bodies.append((actor, torch.where(chosen, poses, actor.pose.raw_pose.cpu())))
        return self.drawn(bodies)

    @contextmanager
    def on_tables(self, tables):
        before = self.tables
        self.tables = torch.tensor([int(table) for table in tables], device=self.device)
        try:
            with self.drawn(self._table_poses(self.tables)):
                yield
        finally:
            self.tables = before

    def _table_poses(self, tables: torch.Tensor):
        """(table top, its poses (N, 7)) such that scene n shows table number tables[n]."""
        shown = raw([sapien.Pose([-0.2, 0, TABLE_Z - 0.0015])])
        for i, actor in enumerate(self.table_tops):
            yield actor, torch.where((tables.cpu() == i)[:, None], shown, BELOW)

    def from_cameras(self, degrees):
        return self.drawn([(self.camera_mount, raw(map(self.camera_pose, degrees)))])

    def empty_tables(self, tables: list[int]) -> np.ndarray:
        """(K, H, W, 3) uint8, of scene 0."""
        assert self.lights_now[0] == 0, "under the training light"
        below = BELOW.repeat(self.num_envs, 1)
        pictures = []
        with (
            self.drawn((body, below) for body in (*self.links, *self.objects, self.plate)),
            self.from_cameras([0.0] * self.num_envs),
        ):
            for table in tables:
                with self.on_tables([table] * self.num_envs):
                    pictures.append(self.picture()[0][0].cpu().numpy())
        return np.array(pictures)

    @contextmanager
    def drawn(self, bodies):
        """Draw bodies elsewhere: pairs of an actor or link and its poses (N, 7). Physics is not
        touched."""
        bodies, data = list(bodies), self.scene.px.cuda_rigid_body_data.torch()
        before = [data[body._body_data_index, :7].clone() for body, _ in bodies]
        for body, poses in bodies:
            data[body._body_data_index, :7] = poses.to(data)
        try:
            yield
        finally:
            for (body, _), poses in zip(bodies, before):
                data[body._body_data_index, :7] = poses


class CudaVecEnv(VecEnv):
    """VecEnv's interface on N scenes in this process. Tensors stay on the simulator's device."""

    elapsed = property(lambda self: self.env.elapsed)
    view_seconds = property(lambda self: self.env.view_seconds)

    def __init__(self, num_envs, pack, image_size, resize, sample, views):
        self.env = PutOnPlates(pack, sample, image_size, resize, num_envs=num_envs)
        # Keeps SAPIEN's renderer while scenes are built again: NVIDIA starts few in a process
        self.render_system = sapien.render.RenderSystem(self.env._render_device)
        self.num_envs, self.pack, self.sample, self.views = num_envs, pack, sample, views
        self.max_episode_steps = pack.max_episode_steps

    def reset(self, episode_ids, split="train", rebuild: bool = False, view_seed: int = 0) -> dict:
        """See VecEnv.reset; PhysX on a GPU does not promise the same bits twice, with `rebuild` or
        without."""
        self.view_seed, episodes = view_seed, self._sample(episode_ids, split)
        rebuild = rebuild or [e.light for e in episodes] != self.env.lights_now
        self.env.reset(seed=0, options=dict(episodes=episodes, reconfigure=rebuild))
        return self.env.look(self.views, view_seed)

    def step(self, actions: torch.Tensor):
        """See VecEnv.step."""
        actions = actions[:, : self.max_episode_steps - self.elapsed].to(self.env.device)
        info = {name: value.clone() for name, value in self.env.play(actions.unbind(1)).items()}
        obs = self.env.look(self.views, self.view_seed)
        return obs, info.pop("reward"), self._done(), info

    def backgrounds(self, tables=None) -> torch.Tensor:
        """See VecEnv.backgrounds; under the light of scene 0, which must be the training light."""
        tables = range(self.pack.train_tables) if tables is None else tables
        return torch.from_numpy(self.env.empty_tables(list(tables)))

    def close(self):
        self.env.close()
