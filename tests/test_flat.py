"""Flatland (scenes/flat.py): episodes, splits, views, the oracle, and what a step costs."""

import time

import numpy as np
import pytest
import torch

import envs
from scenes import flat

PACK = flat.PACK
NAMES = ["train", "texture", "lighting", "pose", "clutter-2", "clutter-8", "bare", "busy"]
VIEWS = ("rgb_alt", "rgb_pre")


def episodes(split, ids):
    return flat.sample_episodes(ids, envs.parse_split(split))


def make(num_envs, views=VIEWS):
    return flat.FlatEnvs(num_envs, envs.parse_split, views)


def play(vec, ids, split, steps=3, **kwargs):
    """The observation after a few of the oracle's steps."""
    obs = vec.reset(ids, split, **kwargs)
    for _ in range(steps):
        obs, *_ = vec.step(vec.oracle())
    return obs


@pytest.mark.parametrize("split", NAMES)
def test_an_episode_depends_on_its_id_alone(split):
    ids = [7, 2_000_000_017, 3, 2**62]
    together = episodes(split, ids)
    for i, episode_id in enumerate(ids):
        alone = episodes(split, [episode_id])
        for key in together:
            assert (together[key][i] == alone[key][0]).all(), key


def test_splits_differ_in_what_they_name():
    ids = range(2000)
    train = episodes("train", ids)
    assert (
        (train["objects"] < 16).all()
        and (train["table"] < 16).all()
        and (train["light"] == 0).all()
    )
    assert set(train["objects"][:, 0]) == set(range(16)) and set(train["table"]) == set(range(16))
    assert (train["objects"][:, 0] != train["objects"][:, 1]).all()
    same = dict(
        texture=("objects", "at", "light"),
        lighting=("objects", "at", "table"),
        pose=("objects", "table", "light"),
        bare=("table", "light"),
        busy=("table", "light"),
        **{f"clutter-{k}": ("table", "light") for k in (2, 4, 6, 8)},
    )
    for name, keys in same.items():
        other = episodes(name, ids)
        for key in keys:
            assert (other[key] == train[key]).all(), (name, key)
        assert (other["objects"][:, 0] == train["objects"][:, 0]).all(), name
        assert (other["at"][:, 0] == train["at"][:, 0]).all(), name
        if name != "pose":
            assert (other["at"][:, 1] == train["at"][:, 1]).all(), name
    assert set(episodes("texture", ids)["table"]) == set(range(16, 21))
    assert set(episodes("lighting", ids)["light"]) == set(range(1, 21))
    inside = ((train["at"] >= 6) & (train["at"] < 26)).all(-1)
    assert inside.all()
    pose = episodes("pose", ids)["at"]
    assert (
        not ((pose[:, 1] >= 6) & (pose[:, 1] < 26)).all(-1).any()
        and (pose[:, 1] >= 3).all()
        and (pose[:, 1] < 29).all()
    )
    for k in (2, 4, 6, 8):
        objects = episodes(f"clutter-{k}", ids)["objects"]
        assert objects.shape == (2000, 1 + k) and ((objects >= 16).sum(1) == k // 2).all()
        assert all(len(set(row)) == 1 + k for row in objects.tolist())
        assert (objects[:, 1] == train["objects"][:, 1]).all()


def test_things_lie_apart_and_placing_ends():
    for split, gap in (("train", flat.GAP), ("pose", flat.GAP), ("clutter-8", 4)):
        at = np.concatenate(
            [episodes(split, range(i, i + 1000))["at"] for i in range(0, 10_000, 1000)]
        )
        apart = abs(at[:, :, None] - at[:, None]).max(-1) + 99 * np.eye(at.shape[1], dtype=int)
        assert apart.min() >= gap, (split, apart.min())
        assert (abs(at - np.array(flat.START)).max(-1) > flat.TOUCH).all()


@pytest.mark.parametrize("split", NAMES)
def test_the_oracle_solves_every_split(split):
    vec = make(500, ())
    vec.reset(range(500), split)
    returns = torch.zeros(500)
    for step in range(PACK.max_episode_steps):
        _, reward, done, info = vec.step(vec.oracle())
        returns += reward
        assert done.all() == (step == PACK.max_episode_steps - 1)
    assert info["success"].float().mean() >= 0.95
    assert (
        torch.allclose(returns, info["episode_return"])
        and (returns[info["success"]] >= 1.1 - 1e-6).all()
    )


def test_a_chunk_is_its_steps():
    one, two = make(4), make(4)
    one.reset(range(4))
    two.reset(range(4))
    first, reward = one.oracle(), 0.0
    for action in (first, first * -0.5):
        obs, r, *_ = one.step(action)
        reward = reward + r
    chunk, total, *_ = two.step(torch.cat([first, first * -0.5], 1))
    assert all(torch.equal(obs[k], chunk[k]) for k in obs) and torch.allclose(reward, total)
    _, _, done, _ = two.step(torch.zeros(4, 9, 7))
    assert done.all() and two.elapsed == PACK.max_episode_steps


def test_nothing_but_the_target_can_be_grasped():
    vec = make(300, ())
    vec.reset(range(300), "train")
    distractor = episodes("train", range(300))["at"][:, 2]
    for _ in range(PACK.max_episode_steps):
        action = np.zeros((300, 1, 7))
        action[:, 0, :2] = np.clip((distractor - vec.hand) / flat.MOVE, -1, 1) * flat.METRES
        _, _, _, info = vec.step(torch.from_numpy(action))
    assert (abs(vec.hand - distractor).max(1) <= flat.TOUCH).all()
    assert info["grasped"].float().mean() < 0.15  # where the target lies on the way


def test_mask_and_composite():
    vec = make(200)
    obs = play(vec, range(200), "bare", 1)
    tables = vec.backgrounds()
    assert tables.shape == (16, 32, 32, 3) and tables.dtype == torch.uint8
    # Without distractors the mask is everything that differs from the table
    table = tables[torch.from_numpy(vec.table)]
    assert torch.equal((obs["rgb"] != table).any(-1), obs["mask"])
    assert 0.03 < obs["mask"].float().mean() < 0.2
    # The composite with another table is the picture drawn on it, unless a distractor covers something
    ids = range(200)
    train = play(vec, ids, "train", 1)
    pre, away = train["rgb_pre"], (train["rgb_pre"] != train["rgb"]).any(-1)
    b = torch.stack(
        [(tables == p).flatten(1).float().mean(1).argmax() for p in pre]
    )  # the table that rgb_pre is on
    composite = torch.where(train["mask"][..., None], train["rgb"], tables[b])
    same = (composite == pre).flatten(1).all(1)
    assert same.float().mean() > 0.9 and away.any()
    assert len(set(b.tolist())) == 16 and (b != torch.from_numpy(vec.table)).any()
    wrong = (composite != pre).any(-1)
    assert not (
        wrong & train["mask"]
    ).any()  # a bite is where a distractor lies, never on what is kept


def test_the_altered_view_moves_the_target_alone():
    vec = make(300)
    obs = play(vec, range(300), "train", 0, view_seed=5)
    changed = (obs["rgb_alt"] != obs["rgb"]).any(-1)
    assert changed.flatten(1).any(1).float().mean() > 0.9
    assert (changed.sum((1, 2)) <= 60).all()  # two sprites at most
    again = play(vec, range(300), "train", 0, view_seed=5)
    other = play(vec, range(300), "train", 0, view_seed=6)
    assert torch.equal(again["rgb_alt"], obs["rgb_alt"]) and not torch.equal(
        other["rgb_alt"], obs["rgb_alt"]
    )
    assert torch.equal(other["rgb"], obs["rgb"])
    u = flat.chance(5, np.arange(20_000), 0)
    assert abs(u.mean() - 0.5) < 0.01 and abs(u.std() - 12**-0.5) < 0.01


def test_views_do_not_change_the_world():
    plain, viewed = make(50, ()), make(50)
    a, b = play(plain, range(50), "clutter-4"), play(viewed, range(50), "clutter-4")
    assert set(b) - set(a) == set(VIEWS) and all(torch.equal(a[k], b[k]) for k in a)
    assert viewed.view_seconds > 0
    assert all(b[k].dtype == torch.uint8 and b[k].shape == (50, 32, 32, 3) for k in ("rgb", *VIEWS))
    assert (
        b["mask"].dtype == torch.bool
        and b["state"].shape == (50, 8)
        and b["state"].dtype == torch.float32
    )


@pytest.mark.parametrize("split", NAMES)
def test_an_environment_does_not_depend_on_the_others(split):
    vec = make(4)
    together = play(vec, range(4), split)
    for i in range(4):
        alone = play(make(1), [i], split)
        assert all(torch.equal(together[k][i], alone[k][0]) for k in together)
    targets = episodes(split, range(4))["objects"][:, 0]
    assert vec.instructions == [f"put {PACK.names[i]} on plate" for i in targets]


def test_a_step_takes_no_time():
    vec = make(256, ("rgb_alt",))
    vec.reset(range(256), "train")
    start = time.process_time()
    for i in range(5):
        vec.reset(range(256 * i, 256 * (i + 1)), "train")
        for _ in range(PACK.max_episode_steps):
            vec.step(vec.oracle())
    per_step = (time.process_time() - start) / (5 * PACK.max_episode_steps * 256)
    assert per_step < 0.3e-3  # 0.04 ms of one core
