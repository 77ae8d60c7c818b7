"""scenes/gpu.py where no GPU is: one scene on a CPU against scenes/task.py, and N scenes of pretended bodies."""

import weakref
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import sapien
import torch
from sapien.render import RenderBodyComponent

import envs
import views
from runtime import Fault
from scenes import builtin, gpu, rl4vla, task


class OnCpu(gpu.PutOnPlates):
    """One scene, with what PhysX on the GPU does done on the CPU."""

    def backends(self):
        return dict(sim_backend="physx_cpu", render_backend=task.render_backend())

    def _run_physics(self):
        for _ in range(int((0.3 + self.pack.settles_again) * self.pack.sim_freq)):
            self.scene.step()

    def contact_forces(self):
        target, others = self.objects[self.episode.target], [*self.fingers, self.plate]
        forces = [self.scene.get_pairwise_contact_forces(target, other) for other in others]
        return torch.stack(forces, 1)

    @contextmanager
    def drawn(self, bodies):
        with ExitStack() as stack:
            for body, poses in bodies:
                entity = getattr(body._objs[0], "entity", body._objs[0])
                pose = sapien.Pose(poses[0, :3].numpy(), poses[0, 3:].numpy())
                if entity.find_component_by_type(RenderBodyComponent) is not None:
                    stack.enter_context(self.drawn_at(entity, pose))
                elif body is self.camera_mount:
                    stack.callback(setattr, entity, "pose", entity.pose)
                    entity.pose = pose
            yield


def make_one(drawn):
    sample = partial(envs.sample_episode, pack=builtin.PACK)
    return gpu.CudaVecEnv(1, builtin.PACK, None, None, sample, drawn)


def same_picture(a, b):
    """But for a hair: poses are float32 here, which moves an edge by a grey level, or a contact by 0.1 mm."""
    return (np.abs(np.asarray(a, int) - np.asarray(b, int)) > 8).mean() < 0.004


def test_one_scene_plays_as_task_py(monkeypatch):
    """The same episode, rewards, pictures, mask and views, step by step; and torch's random numbers are left alone."""
    monkeypatch.setattr(gpu, "PutOnPlates", OnCpu)
    drawn = dict(rgb_alt=views.task_altering, rgb_pre=views.rerendered)
    env = envs.make_env("builtin")
    with make_one(drawn) as vec:
        episodes = [env.sample(3, "clutter-2")]
        env.reset(seed=0, options=dict(episodes=episodes, reconfigure=True))
        random_state = torch.get_rng_state()
        obs, done, rewards = (
            vec.reset([3], "clutter-2", rebuild=True, view_seed=5),
            torch.tensor([False]),
            [],
        )
        assert vec.instructions == [f"put {env.pack.names[env.episode.target]} on plate"]
        while not done.all():
            rgb, ids = env.picture()
            want = dict(rgb=rgb.copy(), mask=255 * env.foreground(ids))
            for name, view in drawn.items():
                draw = [5, 3, env.elapsed] + [1] * (name == "rgb_pre")
                want[name] = view(env, [np.random.default_rng(draw)])
            for name, picture in want.items():
                assert same_picture(obs[name][0] * (255 if name == "mask" else 1), picture), (
                    name,
                    env.elapsed,
                )
            assert np.allclose(obs["state"][0], env.state(), atol=2e-3)
            chunk, wanted = [], 0.0
            for _ in range(5):
                chunk.append(env.pack.oracle(env))
                env.step(chunk[-1])
                wanted += env.reward()
            obs, reward, done, info = vec.step(torch.from_numpy(np.stack(chunk))[None])
            assert reward.item() == pytest.approx(wanted, abs=1e-5)
            rewards.append(wanted)
            assert (info["success"].item(), info["success_once"].item()) == (
                env.success,
                env.success_once,
            )
            assert info["grasped"].item() == env.ever_grasped
        assert (
            sum(rewards) == pytest.approx(1.2) == info["episode_return"].item()
            and vec.elapsed == 20
        )
        assert torch.equal(random_state, torch.get_rng_state())

        # Cameras and lights: those of the episode, and what the views draw from
        for split, view in (("camera+-15:5", views.other_camera), ("lighting", None)):
            env.reset(seed=0, options=dict(episodes=[env.sample(4, split)], reconfigure=True))
            vec.views = dict(rgb_pre=view) if view else {}
            obs = vec.reset([4], split)
            assert same_picture(obs["rgb"][0], env.picture()[0]), split
            if view:
                want = view(env, [np.random.default_rng([0, 4, 0, 1])])
                assert same_picture(obs["rgb_pre"][0], want)
        vec.reset([4], "camera+20")
        assert same_picture(vec.backgrounds([2, 17]), env.empty_tables([2, 17]))

        # Of old scenes nothing stays in memory
        old = weakref.ref(vec.env.scene)
        vec.reset([4], rebuild=True)
        assert old() is None
        old = weakref.ref(vec.env.scene)
    assert old() is None


class Body:
    """An actor in 3 scenes whose poses are rows of the simulator's buffer."""

    def __init__(self, number, data):
        self.name, self._body_data_index, self.data = number, torch.arange(3) * 40 + number, data
        self._bodies = [(number, scene) for scene in range(3)]

    @property
    def pose(self):
        return SimpleNamespace(raw_pose=self.data[self._body_data_index, :7])


@pytest.fixture
def three():
    """PutOnPlates on three scenes that do not exist: 25 objects are rows 0-24 of a scene's 40, tables 27-29."""
    env = object.__new__(gpu.PutOnPlates)
    data = torch.randn(120, 13, generator=torch.Generator().manual_seed(0))
    data[:, 3:7] = torch.nn.functional.normalize(data[:, 3:7], dim=1)
    px = SimpleNamespace(cuda_rigid_body_data=SimpleNamespace(torch=lambda: data), timestep=0.01)
    bodies = [Body(i, data) for i in range(30)]
    env.scene, env.num_envs, env.device, env.pack = (
        SimpleNamespace(gpu_sim_enabled=True, px=px),
        3,
        "cpu",
        builtin.PACK,
    )
    env.objects, env.plate, env.fingers, env.table_tops = (
        bodies[:25],
        bodies[25],
        [bodies[26], bodies[26]],
        bodies[27:30],
    )
    env.episodes = [envs.sample_episode(i, "clutter-2", env.pack) for i in (0, 1, 2)]
    env.picture = lambda: (data.clone(), None)
    env.tables = torch.tensor([e.table for e in env.episodes])
    env.contact_query = None
    return env, data


def test_a_view_moves_the_right_body_in_every_scene_and_puts_it_back(three):
    env, data = three
    before, targets = data.clone(), [e.target for e in env.episodes]
    assert len(set(targets)) > 1, "scenes with different targets"
    seen = views.task_altering(env, [np.random.default_rng(i) for i in range(3)])
    changed = (seen != before).any(1).nonzero().flatten().tolist()
    assert changed == [40 * n + t for n, t in enumerate(targets)]
    for n, row in enumerate(changed):
        pose = sapien.Pose(before[row, :3], before[row, 3:7])
        rng = np.random.default_rng(n)
        want = task.moved(pose, *rng.normal(0, 0.05, 2), rng.choice(views.ALTER_YAWS))
        assert np.allclose(seen[row, :7], [*want.p, *want.q], atol=1e-6)
    assert torch.equal(data, before)

    seen = views.rerendered(env, [np.random.default_rng(i) for i in range(3)])
    for n, e in enumerate(env.episodes):
        below = (seen[40 * n : 40 * n + 30, 2] == -50).nonzero().flatten().tolist()
        table = int(np.random.default_rng(n).integers(16))
        assert below == sorted([*e.distractors, *(27 + i for i in range(3) if i != table)])
    assert torch.equal(data, before)


def test_forces_belong_to_the_target_of_their_scene(three):
    env, _ = three
    asked, made = [], []

    def create(pairs):
        made.append(pairs)
        value = torch.arange(len(pairs) * 3).view(-1, 3) * 0.01
        return SimpleNamespace(cuda_impulses=SimpleNamespace(torch=lambda: value))

    px = env.scene.px
    px.gpu_create_contact_pair_impulse_query, px.gpu_query_contact_pair_impulses = (
        create,
        asked.append,
    )
    for _ in range(2):
        forces = env.contact_forces()
    assert len(made) == 1 and len(asked) == 2  # one query for all, made once an episode
    assert forces.shape == (3, 3, 3)
    for n, e in enumerate(env.episodes):
        for j, other in enumerate((26, 26, 25)):
            assert made[0][3 * n + j] == ((e.target, n), (other, n))
            assert torch.allclose(
                forces[n, j], torch.arange(3.0) + 3 * (3 * n + j)
            )  # impulses / 0.01 s


def test_every_robot_gets_its_look(monkeypatch):
    looks, pack = [], rl4vla.PACK
    monkeypatch.setattr(
        task.sapien_utils,
        "set_articulation_render_material",
        lambda robot, **look: looks.append((robot, look)),
    )
    env = SimpleNamespace(agent=SimpleNamespace(robot=SimpleNamespace(_objs=[7, 8, 9])), pack=pack)
    parent = SimpleNamespace(_load_agent=lambda *_: None)
    monkeypatch.setattr(task, "super", lambda: parent, raising=False)
    task.PutOnPlate._load_agent(env, {})
    assert looks == [(robot, pack.robot_look) for robot in (7, 8, 9)] and pack.robot_look


@pytest.mark.parametrize("local_rank, gpus, found", [
    (0, ["cuda:0", "cuda:1", "cuda"], "sapien_cuda:0"),
    (1, ["cuda:0", "cuda:1", "cuda"], "sapien_cuda:1"),
    (1, ["cuda:0", "cuda"], "sapien_cuda"),  # its launcher shows each rank one GPU
    (1, [], "sapien_cpu"),
])  # fmt: skip
def test_the_workers_of_a_rank_draw_on_its_own_gpu(monkeypatch, local_rank, gpus, found):
    def device(name):
        if name not in gpus:
            raise RuntimeError(f'failed to find device "{name}"')
        return SimpleNamespace(can_render=lambda: True)

    monkeypatch.setattr(task, "LOCAL_RANK", local_rank)
    monkeypatch.setattr(sapien, "Device", device)
    assert task.render_backend() == found
    drawn = []
    monkeypatch.setattr(
        task.BaseEnv, "__init__", lambda self, **k: drawn.append(k["render_backend"])
    )
    task.PutOnPlate(builtin.PACK, None)
    assert drawn == [found]


def test_which_simulator(monkeypatch, tmp_path, capsys):
    assert envs.choose_sim("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert envs.choose_sim("auto") == "cpu"
    with pytest.raises(Fault, match="--sim cuda: there is no CUDA device here"):
        envs.choose_sim("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(envs.Path, "home", lambda: tmp_path)
    with pytest.raises(Fault, match="libPhysXGpu_64.so is missing: .*enable_gpu"):
        envs.choose_sim("cuda")
    assert capsys.readouterr().err == ""
    assert envs.choose_sim("auto") == "cpu"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("physics on the CPU, pictures on ")
    library = tmp_path / f".sapien/physx/{sapien.physx.version()}/libPhysXGpu_64.so"
    library.parent.mkdir(parents=True)
    library.touch()
    monkeypatch.setattr(task, "render_backend", lambda: "sapien_cpu")
    with pytest.raises(Fault, match="--sim cuda: SAPIEN cannot draw on this GPU"):
        envs.choose_sim("cuda")
    assert envs.choose_sim("auto") == "cpu" and "cannot draw" in capsys.readouterr().err
    monkeypatch.setattr(task, "render_backend", lambda: "sapien_cuda:0")
    assert envs.choose_sim("auto") == envs.choose_sim("cuda") == "cuda"
    assert capsys.readouterr().err == ""
