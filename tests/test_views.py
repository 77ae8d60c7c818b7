"""views.py: Eq. (5) pixel by pixel, the mask, the backgrounds, and that an altered view does not disturb physics."""

import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import sapien
import torch
from conftest import PACKS

import envs
import views
from scenes import builtin
from scenes.task import TABLE_Z, PutOnPlate


# ---------------------------------------------------------------------------------------------------- Eq. (5)
def test_equation_5_pixel_by_pixel():
    random = torch.Generator().manual_seed(0)
    rgb = torch.randint(0, 256, (6, 9, 7, 3), dtype=torch.uint8, generator=random)
    mask = torch.rand((6, 9, 7), generator=random) < 0.5
    tables = torch.randint(0, 256, (5, 9, 7, 3), dtype=torch.uint8, generator=random)
    torch.manual_seed(1)
    got = views.composite(rgb, mask, tables)
    k = torch.randint(5, (6,), generator=torch.Generator().manual_seed(1))
    want = np.zeros((6, 9, 7, 3), np.uint8)
    for b in range(6):
        for y in range(9):
            for x in range(7):
                m = int(mask[b, y, x])
                want[b, y, x] = m * rgb[b, y, x].numpy() + (1 - m) * tables[k[b], y, x].numpy()
    assert got.dtype == torch.uint8 and np.array_equal(got.numpy(), want)
    assert len(set(k.tolist())) > 1  # one draw per frame, not one per batch


def test_every_background_is_drawn_equally_often():
    tables = torch.arange(16, dtype=torch.uint8).view(16, 1, 1, 1).expand(16, 1, 1, 3)
    n = 16000
    rgb, mask = (
        torch.full((n, 1, 1, 3), 99, dtype=torch.uint8),
        torch.zeros(n, 1, 1, dtype=torch.bool),
    )
    drawn = views.composite(rgb, mask, tables)
    counts = torch.bincount(drawn[:, 0, 0, 0].long(), minlength=16)
    assert len(counts) == 16 and (counts - 1000).abs().max() < 150  # 5 sigma


# ---------------------------------------------------------------------------------------------------- mask, backgrounds
def everything(env):
    return [*env.links, *(actor._objs[0] for actor in env.objects), env.plate_entity]


def grasp(env, start, episode_id, split="train"):
    """Brings the target into the gripper, above the table."""
    start(env, episode_id, split, rebuild=False)
    while not (env.grasped and env.target_entity.pose.p[2] > TABLE_Z + 0.04):
        env.step(env.pack.oracle(env))
        assert env.elapsed < env.pack.max_episode_steps


@pytest.mark.parametrize("split, held", [("clutter-4", False), ("train", True)])
def test_mask_is_robot_target_and_plate(env, start, split, held):
    if held:
        grasp(env, start, 7, split)  # the plate is in sight
    else:
        start(env, 4, split, rebuild=False)
    rgb, ids = env.picture()
    rgb, mask = rgb.copy(), env.foreground(ids)
    names = {e.per_scene_id: e.name for e in env.scene.sub_scenes[0].entities}
    target = env.pack.names[env.episode.target]
    kept = set()
    for i in np.unique(ids):
        wanted = "panda" in names[i] or names[i].endswith(
            ("plate", target)
        )  # a name may have a scene number in front
        assert (mask[ids == i] == wanted).all(), names[i]
        kept |= {names[i]} if wanted else set()
    assert any(name.endswith(target) for name in kept) and any(
        name.endswith("plate") for name in kept
    )
    # And without the ids: hiding these bodies changes nothing outside the mask, and nearly everything inside it.
    with env.hidden([*env.links, env.target_entity, env.plate_entity]):
        without = env.picture()[0].copy()
    assert np.array_equal(without[~mask], rgb[~mask])
    assert (without[mask] != rgb[mask]).any(-1).mean() > 0.9
    assert np.array_equal(env.picture()[0], rgb)  # all visible again


def test_backgrounds_show_nothing_but_the_table(env, start):
    """The same 16 pictures whatever stands on the table; and where a frame shows no object, they are the frame."""
    start(env, 0, "train", rebuild=False)
    first = env.empty_tables(list(range(16)))
    assert first.shape == (16, 96, 96, 3) and first.dtype == np.uint8
    far = [np.abs(first[i].astype(int) - first[j]).mean() for i in range(16) for j in range(i)]
    assert min(far) > 3
    grasp(env, start, 4)
    before = env.picture()[0].copy()
    assert np.array_equal(env.empty_tables(list(range(16))), first)
    assert np.array_equal(env.picture()[0], before)
    start(
        env, 5, "lighting", rebuild=False
    )  # a held-out light and camera must not leak into the training backgrounds
    assert np.array_equal(env.empty_tables([2, 7]), first[[2, 7]])
    start(env, 5, "camera+20", rebuild=False)
    assert np.array_equal(env.empty_tables([2, 7]), first[[2, 7]])
    for episode_id in (1, 6):
        start(env, episode_id, "clutter-8", rebuild=False)
        rgb, ids = env.picture()
        bare = ~np.isin(ids, [e.per_scene_id for e in everything(env)])
        assert 0.3 < bare.mean() < 0.95
        assert np.array_equal(rgb[bare], first[env.episode.table][bare])
    with env.hidden(everything(env)):
        assert not np.isin(env.picture()[1], [e.per_scene_id for e in everything(env)]).any()


# ---------------------------------------------------------------------------------------------------- the altered view
def set_pose_and_back(env, rngs):
    """What one must not do: the target's body is moved, drawn and put back."""
    pose = env.target_entity.pose
    env.target_entity.pose = sapien.Pose(pose.p + [*rngs[0].normal(0, 0.05, 2), 0], pose.q)
    picture = env.picture()[0].copy()
    env.target_entity.pose = pose
    return picture


@pytest.mark.parametrize("pack", PACKS)
def test_physics_does_not_notice_a_view(scene, start, full_state, pack):
    """80 steps with a grasp, to the last bit: states and frames with and without rendered views after every step."""
    env = scene(pack)

    def rollout(*looks):
        start(
            env, 0, "camera+-15:15"
        )  # with the cameras that other_camera needs, and a distractor to hide
        states, frames, held = [], [], []
        for step in range(80):
            frames.append(env.picture()[0].copy())
            for look in looks:
                look(env, [np.random.default_rng(step)])
            env.step(env.pack.oracle(env))
            states.append(full_state(env))
            held.append(env.grasped)
        return np.array(states), np.array(frames), held

    states, frames, held = rollout()
    assert sum(held) >= 3 and env.success
    seen_states, seen_frames, _ = rollout(views.task_altering, views.rerendered, views.other_camera)
    assert np.array_equal(states, seen_states) and np.array_equal(frames, seen_frames)
    naive_states, *_ = rollout(set_pose_and_back)
    assert not np.array_equal(states, naive_states)  # so the comparison above can tell


@pytest.mark.parametrize("held", [False, True])
def test_altered_view_moves_the_target_and_nothing_else(env, start, held):
    if held:
        grasp(env, start, 4)
    else:
        start(env, 4, rebuild=False)
    rgb, ids = (x.copy() for x in env.picture())
    alt = views.task_altering(env, [np.random.default_rng(10)]).copy()
    old = ids == env.target_entity.per_scene_id
    rng = np.random.default_rng(10)
    move, yaw = rng.normal(0, views.ALTER_SIGMA, 2), rng.choice(views.ALTER_YAWS)
    pose = env.target_entity.pose
    turn = sapien.Pose(q=[np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)])
    moved = sapien.Pose(pose.p + [*move, 0], (turn * sapien.Pose(q=pose.q)).q)
    with env.drawn_at(env.target_entity, moved):
        new = env.picture()[1] == env.target_entity.per_scene_id
    assert old.sum() > 20 and new.sum() > 20 and np.linalg.norm(move) > 0.05 and yaw > 1
    assert np.array_equal(alt[~(old | new)], rgb[~(old | new)])
    assert (alt[old ^ new] != rgb[old ^ new]).any(-1).mean() > 0.8
    assert np.array_equal(env.picture()[0], rgb)  # and back
    env.target_entity.pose = moved  # the same picture as when the body itself is there
    assert np.abs(env.picture()[0].astype(int) - alt).max() <= 1


def test_the_perturbation_is_as_stated():
    """N(0, 5 cm) in x and y, nothing in z, one of four yaws about the vertical: 8000 draws."""
    poses = []

    @contextmanager
    def drawn_at(entity, pose):
        poses.append(pose)
        yield

    tilted = sapien.Pose([-0.1, 0.05, 0.9], [np.cos(0.2), np.sin(0.2), 0, 0])
    fake = object.__new__(PutOnPlate)
    fake.target_entity, fake.drawn_at = SimpleNamespace(pose=tilted), drawn_at
    fake.picture = lambda: (np.zeros((2, 2, 3), np.uint8), None)
    rng = np.random.default_rng(0)
    for _ in range(8000):
        views.task_altering(fake, [rng])
    moves = np.array([pose.p for pose in poses]) - tilted.p
    assert np.allclose(moves[:, :2].std(0), 0.05, atol=0.0015) and np.allclose(
        moves[:, :2].mean(0), 0, atol=0.002
    )
    assert np.abs(np.corrcoef(moves[:, :2].T)[0, 1]) < 0.04 and np.abs(moves[:, 2]).max() < 1e-6
    turns = np.array(
        [(sapien.Pose(q=pose.q) * sapien.Pose(q=tilted.q).inv()).q for pose in poses]
    )  # w, x, y, z
    assert np.abs(turns[:, 1:3]).max() < 1e-5  # about the vertical
    values, counts = np.unique(
        np.round(np.rad2deg(2 * np.arctan2(turns[:, 3], turns[:, 0]))), return_counts=True
    )
    assert values.tolist() == [0, 45, 90, 135] and np.abs(counts - 2000).max() < 200


# ---------------------------------------------------------------------------------------------------- o_pre, rendered
@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("held", [False, True])
def test_composite_and_rerender_agree(scene, start, pack, held):
    """Inside the mask they are the same picture, but for what a distractor hid; outside, both show the empty table."""
    env = scene(pack)
    if held:
        grasp(env, start, 4)
    else:
        # A distractor stands in front of the target or the plate
        start(env, dict(builtin=16, rl4vla=11)[pack], "clutter-8", rebuild=False)
    rgb, ids = (x.copy() for x in env.picture())
    mask = env.foreground(ids)
    table = int(np.random.default_rng(3).integers(16))
    rerender = views.rerendered(env, [np.random.default_rng(3)]).copy()
    assert (
        np.array_equal(env.picture()[0], rgb) and env.table_now == env.episode.table != table
    )  # all is as before
    background = torch.from_numpy(env.empty_tables([table]))
    composite = views.composite(
        torch.from_numpy(rgb)[None], torch.from_numpy(mask)[None], background
    )[0].numpy()
    assert np.array_equal(composite[mask], rerender[mask])
    differ = (composite != rerender).any(-1)
    with env.hidden(env.objects[i]._objs[0] for i in env.episode.distractors):
        behind = (
            env.foreground(env.picture()[1]) & ~mask
        )  # foreground that a distractor stood in front of
    assert np.array_equal(differ, behind & differ) and differ.sum() <= behind.sum()
    assert held or behind.any()  # else this would have compared nothing


@pytest.mark.parametrize("pack", PACKS)
def test_other_camera_is_the_frame_of_that_camera(scene, start, pack):
    """What the view shows of episode i from N degrees is the frame of episode i in the split camera+N."""
    env = scene(pack)
    frames = {}
    for degrees in (-10, 0, 10):
        start(env, 2, f"camera{degrees:+d}")
        frames[degrees] = env.picture()[0].copy()
    start(env, 2, "camera+-10:10")
    here = int(env.episode.camera_deg)
    assert np.array_equal(env.picture()[0], frames[here])
    seen = set()
    for seed in range(12):
        view = views.other_camera(env, [np.random.default_rng(seed)]).astype(int)
        seen.add(min(frames, key=lambda degrees: np.abs(view - frames[degrees]).sum()))
        assert min(np.abs(view - frame).max() for frame in frames.values()) <= 1
    assert seen == set(frames) - {here}
    assert np.array_equal(env.picture()[0], frames[here])


def test_vectorised_views():
    """rgb_alt and rgb_pre depend on (view_seed, episode, step) alone; backgrounds come from whichever workers there are."""
    options = dict(image_size=48, alter=views.task_altering, preserve=views.rerendered)
    with envs.make_envs(2, num_workers=2, **options) as vec:
        start = time.perf_counter()
        first = vec.reset([3, 4], rebuild=True, view_seed=5)
        assert 0 < vec.view_seconds < time.perf_counter() - start
        for name in ("rgb_alt", "rgb_pre"):
            assert first[name].shape == (2, 48, 48, 3) and first[name].dtype == torch.uint8
            assert (first[name] != first["rgb"]).flatten(1).any(1).all()
        assert torch.equal(first["rgb_pre"][first["mask"]], first["rgb"][first["mask"]])
        action = torch.zeros(2, 2, 7)
        later = vec.step(action)[0]
        tables = vec.backgrounds()
        swapped = vec.reset([4, 3], rebuild=True, view_seed=5)
        assert all(torch.equal(swapped[k].flip(0), first[k]) for k in first)
        assert all(torch.equal(vec.step(action)[0][k].flip(0), later[k]) for k in ("rgb",))
        other = vec.reset([3, 4], rebuild=True, view_seed=6)
        assert torch.equal(other["rgb"], first["rgb"]) and not torch.equal(
            other["rgb_alt"], first["rgb_alt"]
        )
        assert tables.shape == (16, 48, 48, 3) and tables.dtype == torch.uint8
        e = envs.sample_episode(3, "train", builtin.PACK)
        edge = torch.zeros(48, 48, dtype=torch.bool)
        edge[-3:] = True  # the near edge of the table, where nothing stands
        agree = [
            (tables[k][edge] == first["rgb"][0][edge]).float().mean().item() for k in range(16)
        ]
        assert int(np.argmax(agree)) == e.table and max(agree) > 0.9
