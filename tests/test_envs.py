"""envs.py: episodes and splits, assets, rewards, exact repetition, workers that die, the preflight. Real simulator, no
policy."""

import itertools
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PACKS, needs_rl4vla
from mani_skill.agents.controllers import PDEEPoseController
from PIL import Image

import envs
import policies
import views
from envs import CENTER, GRID, HALF_EDGE, HELD_OUT_YAWS, RING, TRAIN_YAWS, sample_episode
from runtime import Fault
from scenes import builtin, rl4vla, task, workers
from scenes.task import TABLE_Z, render_backend, sapien
from tools import preflight

ROOT = Path(__file__).parent.parent
PACK, RL4VLA = builtin.PACK, rl4vla.PACK
BY_NAME = dict(builtin=PACK, rl4vla=RL4VLA)
CLUTTER = [f"clutter-{k}" for k in (2, 4, 6, 8)]


def episodes(split, n=300, pack="builtin"):
    return [sample_episode(i, split, BY_NAME[pack]) for i in range(n)]


def on(points, xy):
    """Is xy one of the points?"""
    return np.abs(points - np.array(xy)).max(1).min() < 1e-9


# ---------------------------------------------------------------------------------------------------- splits (no simulator)
@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("split, distractors", [("train", 1), ("bare", 0), ("busy", 4)])
def test_training_never_sees_what_is_held_out(split, distractors, pack):
    drawn = episodes(split, pack=pack)
    for e in drawn:
        assert (
            e.target < 16
            and all(i < 16 for i in e.distractors)
            and len(e.distractors) == distractors
        )
        assert len({e.target, *e.distractors}) == 1 + distractors
        assert e.table < 16 and e.light == 0 and e.camera_deg == 0
        assert (
            on(GRID, e.target_xy)
            and on(GRID, e.plate_xy)
            and np.isclose(TRAIN_YAWS, e.target_yaw).any()
        )
    assert (
        {e.target for e in drawn} == set(range(16)) == {e.table for e in drawn}
    )  # and everything else it does see
    assert len({e.target_yaw for e in drawn}) == 4


def test_every_place_is_used():
    """RL4VLA's rule in a 15 cm square leaves the target the 20 points of the rim and 6 inside; the plate all 36."""
    drawn = episodes("train", 3000)
    inside = [p for p in GRID if np.abs(p - CENTER).max() < 0.07]
    rim = len(GRID) - len(inside)
    assert (
        rim == 20
        and len({e.target_xy for e in drawn}) == 26
        and len({e.plate_xy for e in drawn}) == 36
    )
    assert sum(on(np.array([e.target_xy for e in drawn]), p) for p in inside) == 6


def test_layouts_are_rl4vlas():
    """Target, plate and distractor, as its arithmetic has them: 15 cm apart to the last bit is decided by rounding."""
    steps = np.array([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])  # its code, in its words
    grid = np.array([[x, y] for x in steps for y in steps]) * 2 - 1
    grid = grid * np.array([[0.075, 0.075]]) + np.array([[-0.16, 0.00]])
    assert np.abs(grid - GRID).max() < 1e-12
    theirs = [
        (i, j, k)
        for i, j, k in itertools.product(range(36), repeat=3)
        if np.linalg.norm(grid[j] - grid[i]) > 0.07
        and np.linalg.norm(grid[j] - grid[k]) > 0.07
        and np.linalg.norm(grid[i] - grid[k]) > 0.15
    ]
    assert len(theirs) == 2104 and len({t for t, _, _ in theirs}) == 26
    ours = envs.layouts(False, 0.07, 0.07)
    assert list(map(tuple, ours.tolist())) == theirs
    assert len(envs.layouts(True, 0.07, 0.07)) == 7324


def test_counts_and_places():
    assert len(builtin.OBJECTS) == len({name for name, _, _ in builtin.OBJECTS}) == 25
    for pack in (PACK, RL4VLA):
        assert len(pack.lights) == len(set(pack.lights)) == 21
    assert np.array_equal(task.CENTER, CENTER)  # a turned camera keeps the square in sight
    assert len(GRID) == 36 and np.allclose(np.abs(GRID - CENTER).max(0), HALF_EDGE)
    assert np.allclose(np.unique(np.diff(np.unique(GRID[:, 0].round(9)))), 0.03)
    assert len(RING) == 28 and np.allclose(np.abs(RING - CENTER).max(1), 0.105)
    yaws = [*TRAIN_YAWS, *HELD_OUT_YAWS]
    assert len(set(np.round(np.mod(yaws, np.pi), 6))) == 8  # none is another's half turn
    tables = [builtin.table_texture(i) for i in range(21)]
    far = [np.abs(tables[i].astype(int) - tables[j]).mean() for i in range(21) for j in range(i)]
    assert min(far) > 5 and np.array_equal(tables[3], builtin.table_texture(3))


@needs_rl4vla
def test_rl4vla_has_25_objects_and_21_tables():
    pack = RL4VLA
    assert len(pack.names) == len(set(pack.names)) == len(pack.sizes) == 25
    assert (
        pack.names[0] == "carrot"
        and pack.names[15] == "BBQ sauce"
        and pack.names[16] == "travel cup"
    )
    photos = pack.photos(32, 32)
    assert photos.shape == (21, 32, 32, 3) and photos.dtype == np.uint8
    assert (
        min(np.abs(photos[i].astype(int) - photos[j]).mean() for i in range(21) for j in range(i))
        > 5
    )


@pytest.mark.parametrize("pack", PACKS)
def test_held_out_splits(pack):
    assert {e.table for e in episodes("texture", pack=pack)} == set(range(16, 21))
    assert {e.light for e in episodes("lighting", 600, pack)} == set(range(1, 21))
    assert {e.camera_deg for e in episodes("camera-12.5", 5, pack)} == {-12.5}
    assert {e.camera_deg for e in episodes("camera+-10:5", 100, pack)} == {-10, -5, 0, 5, 10}
    trained = episodes("camera+0-20:4", 100, pack)  # section 5.5: one side
    assert {e.camera_deg for e in trained} == set(range(0, 21, 4)) == set(trained[0].cameras)
    for e in episodes("pose", pack=pack):
        assert (
            on(RING, e.target_xy)
            and np.isclose(HELD_OUT_YAWS, e.target_yaw).any()
            and on(GRID, e.plate_xy)
        )
        assert e.table < 16 and e.light == 0


def test_one_factor_changes_at_a_time():
    """Episode i has the same target and plate in every split but `pose`: policies are compared episode by episode."""
    for i in range(100):
        train = sample_episode(i, "train", PACK)
        for split in ("bare", "texture", "lighting", *CLUTTER, "camera+20", "camera+-15:5"):
            other = sample_episode(i, split, PACK)
            for field in ("target", "target_xy", "target_yaw", "plate_xy"):
                assert getattr(train, field) == getattr(other, field), (i, split, field)
            assert (train.table == other.table) == (split != "texture")
            assert (train.light == other.light) == (split != "lighting")
            assert other.distractors == () or other.distractors[0] == train.distractors[0]
        assert sample_episode(i, "pose", PACK).target == train.target
        assert sample_episode(i, "train", PACK) == train


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("split", ["train", "pose", *CLUTTER])
def test_room_between_things(split, pack):
    for e in episodes(split, 150, pack):
        s, p = envs.parse_split(split), BY_NAME[pack]
        places = np.array([e.target_xy, e.plate_xy, *e.distractor_xy])
        radii = np.array([p.radius(e.target), p.plate_radius, *map(p.radius, e.distractors)])
        gaps = np.linalg.norm(places[:, None] - places[None], axis=-1)
        assert gaps[0, 1] > 0.07 and gaps[0, 2] > 0.15 and gaps[1, 2] > 0.07  # RL4VLA's rule
        overlap = gaps < radii[:, None] + radii[None]
        assert not np.triu(overlap, 1)[
            :, 3:
        ].any()  # whatever was placed later stands clear of everything
        assert len(e.distractors) == s.distractors == len(set(e.distractors) - {e.target})
        assert sum(i >= 16 for i in e.distractors) == (
            s.distractors // 2 if s.held_out_objects else 0
        )


@pytest.mark.parametrize("name", [
    "", "training", "clutter-3", "camera20", "camera+91", "camera+", "camera+20x", "camera+20:5", "camera+-20",
    "camera+-95:5", "camera+-10:0", "camera+-10:20", "camera+0-95:5", "camera+20-4:4", "camera+0-20:0",
    "camera+0-20", "camera-0-20:4",
])  # fmt: skip
def test_unknown_split(name):
    with pytest.raises(Fault, match="split"):
        envs.parse_split(name)


def test_wrong_arguments():
    for wrong in (dict(num_envs=0), dict(num_envs=-2), dict(num_envs=2, assets="nothing")):
        with pytest.raises(Fault, match="--num-envs|--assets"):
            envs.make_envs(**wrong)
    with pytest.raises(Fault, match="nothing"):
        envs.make_env("nothing")
    with pytest.raises(Fault, match="flat has no scene in ManiSkill"):
        envs.make_env("flat")
    with pytest.raises(Fault, match="32 x 32 pixels.* wants 96 x 96: .*-flat"):
        envs.make_envs(2, "flat", image_size=96)
    with pytest.raises(Fault, match="no camera that turns"):
        envs.make_envs(2, "flat").reset([0, 1], "camera+20")


# ---------------------------------------------------------------------------------------------------- assets (no simulator)
NAMES = [line.split(" ", 1)[1] for line in rl4vla.FILES.read_text().splitlines()]


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """The assets of rl4vla as links in a folder of their own -> that folder."""
    for name in NAMES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(Path(os.environ["PAIR_VLA_ASSETS"]) / name)
    monkeypatch.setenv("PAIR_VLA_ASSETS", str(tmp_path))
    return tmp_path


def spoil(path, content):
    path.unlink()
    if content is not None:
        path.write_bytes(content)


BREAD, BEAR = (
    f"carrot/more_carrot/{name}/textured.glb" for name in ("003_bread_1", "010_toy bear_1")
)
URDF = "data/robots/widowx/wx250s.urdf"


@needs_rl4vla
@pytest.mark.parametrize("name, content, words", [
    (BREAD, None, "textured.glb is missing"),
    (BREAD, b"glTF", "textured.glb has 4 bytes instead of 262832"),
    (BEAR, b"glTF\2\0\0\0\xff\0\0\0", "textured.glb has 12 bytes: it is cut off"),
    (URDF, b"", "wx250s.urdf has 0 bytes"),
])  # fmt: skip
def test_a_faulty_asset_is_named_with_what_mends_it(copied, name, content, words):
    envs.find_pack("rl4vla")
    spoil(copied / name, content)
    for call in (envs.make_env, lambda pack: envs.make_envs(2, pack), preflight.check):
        with pytest.raises(Fault, match=rf"{words}.*envs.py --download") as error:
            call("rl4vla")
        assert str(copied / name) in str(error.value)


def test_without_assets(tmp_path, monkeypatch):
    monkeypatch.delenv("PAIR_VLA_ASSETS", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(rl4vla, "ASSET_DIR", tmp_path)
    with pytest.raises(Fault, match=rf"is missing.* {len(NAMES) - 1} others.*--download"):
        envs.find_pack("rl4vla")


@needs_rl4vla
def test_download_fetches_what_is_missing_and_asks_nothing(copied, monkeypatch, capsys):
    """Against a Hub and a GitHub of this test's own: nothing is fetched in a test."""
    import huggingface_hub
    from mani_skill.utils import download_asset

    originals = {name: (copied / name).readlink() for name in NAMES}
    fetched, network = [], [True]

    def snapshot_download(repo_id, *, repo_type, allow_patterns, local_dir):
        assert (repo_id, repo_type, local_dir) == ("RLinf/maniskill_assets", "dataset", str(copied))
        assert all(name.startswith("carrot/") for name in allow_patterns)
        if not network[0]:
            raise OSError("no route to host")
        for name in allow_patterns:
            if not (
                copied / name
            ).exists():  # the Hub's client leaves alone what is there, whole or not
                fetched.append(name)
                (copied / name).symlink_to(originals[name])

    def zipped(source, non_interactive):
        assert (
            non_interactive
            and source.output_dir / source.target_path == copied / "data/robots/widowx"
        )
        fetched.append("robot")
        shutil.rmtree(source.output_dir / source.target_path)
        (source.output_dir / source.target_path).symlink_to(originals[URDF].parent)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(download_asset, "download", zipped)
    envs.main(envs.Args(download=True))
    assert fetched == [] and "complete" in capsys.readouterr().out
    spoil(copied / BREAD, b"glTF")
    spoil(copied / BEAR, None)
    network[0] = False
    with pytest.raises(Fault, match="no route to host.*start it again"):
        envs.main(envs.Args(download=True))
    network[0] = True
    envs.main(envs.Args(download=True))
    assert sorted(fetched) == [BREAD, BEAR]
    spoil(copied / URDF, b"<robot")
    envs.main(envs.Args(download=True))
    assert fetched[2:] == ["robot"] and rl4vla.faulty_assets() == {}


# ---------------------------------------------------------------------------------------------------- one scene
def rollout(env, episode_id, start, full_state, steps=8):
    """Oracle steps -> every frame, mask and state, all to the bit."""
    start(env, episode_id)
    seen = []
    for _ in range(steps):
        env.step(env.pack.oracle(env))
        rgb, ids = env.picture()
        seen += [rgb.copy(), env.foreground(ids), full_state(env)]
    return seen


def test_an_exact_episode_does_not_depend_on_history(env, start, full_state):
    first = rollout(env, 3, start, full_state)
    for other in (7, 8):  # with contacts, and other bodies in use
        start(env, other, "clutter-4", rebuild=False)
        for _ in range(12):
            env.step(env.pack.oracle(env))
    again = rollout(env, 3, start, full_state)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], rollout(env, 4, start, full_state, 1)[0])


def test_frame_shows_the_split(env, start):
    """Another table changes the surroundings and not the foreground, and so on."""
    looks = {}
    for split in (
        "train",
        "texture",
        "lighting",
        "camera+0",
        "camera+20",
        "camera-20",
        "clutter-8",
    ):
        start(env, 1, split, rebuild=False)
        rgb, ids = env.picture()
        looks[split] = rgb.copy(), env.foreground(ids)
    rgb, mask = looks["train"]
    assert rgb.shape == (96, 96, 3) and rgb.dtype == np.uint8 and 0.05 < mask.mean() < 0.6

    def changed(split, where):
        return (np.abs(looks[split][0].astype(int) - rgb).max(-1) > 8)[where].mean()

    assert changed("texture", ~mask) > 0.5 and changed("texture", mask) < 0.02
    assert changed("lighting", mask) > 0.25  # held-out lights are near the training light
    assert np.array_equal(looks["camera+0"][0], rgb)
    assert 0.02 < changed("clutter-8", ~mask) < 0.5
    assert (
        changed("camera+20", np.full_like(mask, True))
        > 0.1
        < changed("camera-20", np.full_like(mask, True))
    )


THUMBNAILS = Path(__file__).parent / "builtin_thumbnails.png"  # five of 8 x 8 pixels in a row


def thumbnails(env, start):
    """(8, 40, 3) float: five frames of the pack `builtin`, each pixel the mean over 12 x 12 of theirs."""
    columns = []
    for episode_id, split in (
        (1, "train"),
        (2, "lighting"),
        (3, "clutter-8"),
        (4, "texture"),
        (5, "camera+20"),
    ):
        start(env, episode_id, split, rebuild=False)
        columns.append(env.picture()[0].reshape(8, 12, 8, 12, 3).mean((1, 3)))
    return np.concatenate(columns, 1)


def test_builtin_looks_as_it_did(env, start):
    """A policy that was trained on these pictures still knows them. Four grey levels are left to other drivers.

    After a change on purpose: `Image.fromarray(np.uint8(thumbnails(env, start).round())).save(THUMBNAILS)`.
    """
    error = np.abs(thumbnails(env, start) - np.array(Image.open(THUMBNAILS)))
    assert error.max() <= 4, (
        f"{(error.max(-1) > 4).sum()} of {error[..., 0].size} places differ, by {error.max():.0f} at most"
    )


def test_the_hand_is_where_maniskill_says(env, start):
    start(env, 3)
    arm = env.agent.controller.controllers["arm"]
    for action in ([0.05, -0.03, -0.05, 0, 0, 0.5, 1], [-0.02, 0.04, 0.03, 0.1, -0.1, -0.3, -1]):
        env.step(np.float32(action))
        ours, theirs = (
            arm.ee_pose_at_base,
            PDEEPoseController.ee_pose_at_base.fget(arm),
        )  # q and -q turn alike
        torch.testing.assert_close(
            ours.to_transformation_matrix(), theirs.to_transformation_matrix(), rtol=0, atol=1e-5
        )
        target, delta = arm._target_pose, torch.tensor([action[:6]])
        ours, theirs = (
            arm.compute_target_pose(target, delta),
            PDEEPoseController.compute_target_pose(arm, target, delta),
        )
        torch.testing.assert_close(
            ours.to_transformation_matrix(), theirs.to_transformation_matrix(), rtol=0, atol=1e-6
        )


def test_camera_orbits_by_so_many_degrees(env, start):
    def azimuth(split):
        start(env, 1, split, rebuild=False)
        world_to_camera = np.vstack([env.camera.get_extrinsic_matrix()[:3], [0, 0, 0, 1]])
        camera_to_world = np.linalg.inv(world_to_camera)
        eye, ahead = camera_to_world[:3, 3], camera_to_world[:3, 2]  # OpenCV: z looks ahead
        at = eye + ahead * np.linalg.norm(np.append(CENTER, 0.945) - eye)
        return (
            np.rad2deg(np.arctan2(*(eye[:2] - CENTER)[::-1])),
            np.linalg.norm(eye[:2] - CENTER),
            eye[2],
            at,
        )

    start_angle, radius, height, _ = azimuth("train")
    for degrees in (20, -20, 45):
        angle, r, z, at = azimuth(f"camera{degrees:+d}")
        assert np.isclose((angle - start_angle + 180) % 360 - 180, degrees, atol=0.01)
        assert (
            np.isclose(r, radius)
            and np.isclose(z, height)
            and np.linalg.norm(at[:2] - CENTER) < 0.05
        )


@needs_rl4vla
def test_rl4vla_camera_and_controller(scene, start):
    """Bridge's 640 x 480 camera squashed to a square; every action is added to the pose commanded before."""
    env = scene("rl4vla")
    start(env, 0)
    lens = env.camera.get_intrinsic_matrix()
    want = [
        [623.588 * 96 / 640, 0, 319.501 * 96 / 640],
        [0, 623.588 * 96 / 480, 239.545 * 96 / 480],
        [0, 0, 1],
    ]
    assert np.allclose(lens, want, atol=1e-3)
    eye = env.pack.base_pose * sapien.Pose(
        [0, -0.16, 0.36], [0.8992917, -0.09263245, 0.35892478, 0.23209205]
    )
    assert np.allclose(
        env.camera_mount._objs[0].pose.to_transformation_matrix(),
        eye.to_transformation_matrix(),
        atol=1e-5,
    )
    assert (
        env.pack.names[env.episode.target] == "hamburger"
        and env.sim_freq == 500
        and env.control_freq == 5
    )
    arm = env.agent.controller.controllers["arm"]
    before = arm._target_pose.sp
    for _ in range(3):  # sideways by 2 cm a step; the arm lags behind
        env.step(np.array([0, 0.02, 0, 0, 0, 0, 1], np.float32))
    assert np.allclose(arm._target_pose.sp.p, before.p + [0, 0.06, 0], atol=1e-5)
    assert (
        0.03 < np.linalg.norm((env.pack.base_pose.inv() * env.tcp_entity.pose).p - before.p) < 0.06
    )


@needs_rl4vla
def test_what_is_not_robot_object_or_plate_is_the_photograph(scene, start):
    env = scene("rl4vla")
    photos = env.pack.photos(96, 96)
    for split in ("train", "texture", "clutter-8", "lighting"):
        start(env, 3, split, rebuild=False)
        rgb, ids = env.picture()
        known = [
            e.per_scene_id
            for e in (*env.links, *(a._objs[0] for a in env.objects), env.plate_entity)
        ]
        photo = ~np.isin(ids, known)
        assert 0.6 < photo.mean() < 0.95 and np.array_equal(
            rgb[photo], photos[env.episode.table][photo]
        )
        assert (rgb[~photo] != photos[env.episode.table][~photo]).any(-1).mean() > 0.9


@needs_rl4vla
@pytest.mark.parametrize("resize, shape", [("squash", (224, 224)), ("keep", (168, 224))])
def test_rl4vla_frames_are_the_cameras_resized(start, resize, shape):
    """As the official checkpoints have seen them: 640 x 480, antialiased; and the policies leave them as they are."""
    env = envs.make_env("rl4vla", resize=resize)
    start(env, 7, rebuild=False)
    rgb, ids = env.picture()
    mask = env.foreground(ids)
    assert rgb.shape == (*shape, 3) and mask.shape == shape and ids.shape == (480, 640)
    env.resize = None  # what the camera shows
    full = env.picture()[0]
    env.resize = resize
    sampling = dict(squash=Image.Resampling.BICUBIC, keep=Image.Resampling.BILINEAR)[resize]
    theirs = np.array(Image.fromarray(full).resize(shape[::-1], sampling)).astype(int)
    assert np.abs(theirs - rgb).mean() < 0.3
    assert 0.05 < mask.mean() < 0.5
    empty, o_alt = env.empty_tables([3])[0], views.task_altering(env, [np.random.default_rng(0)])
    assert empty.shape == o_alt.shape == rgb.shape
    photo = np.array(Image.fromarray(env.photos[3]).resize(shape[::-1], sampling)).astype(int)
    assert np.abs(photo - empty).mean() < 0.3

    policy = SimpleNamespace(image_size=224, config=dict(camera_aspect=640 / 480), device="cpu")
    network = dict(squash=policies.TokenPolicy, keep=policies.FlowPolicy)[resize]
    seen = [network.preprocess(policy, torch.from_numpy(x.copy())[None]) for x in (rgb, full)]
    assert torch.equal(*seen)

    small = envs.make_env("rl4vla-small", 224, resize)
    start(small, 7, rebuild=False)
    drawn, ids = small.picture()
    assert drawn.shape == (224, 224, 3) and ids.shape == (224, 224)
    if resize == "squash":  # what drawing in fewer pixels costs
        off = np.abs(drawn.astype(int) - rgb)[mask]
        assert 2 < off.mean() < 12


@pytest.mark.parametrize("pack", PACKS)
def test_rewards_by_brute_force(scene, start, pack):
    env = scene(pack)
    start(env, 0)
    grasped, rewards, total, done = [], [], [], []
    for _ in range(env.pack.max_episode_steps):
        env.step(env.pack.oracle(env))
        rewards.append(env.reward())
        # ManiSkill's own idea of a grasp, and of what the plate carries
        held = bool(env.agent.is_grasping(env.target)[0])
        grasped.append(held)
        assert env.grasped == held
        force = np.linalg.norm(
            env.scene.get_pairwise_contact_forces(env.target, env.plate)[0].numpy()
        )
        offset = env.target_entity.pose.p - env.plate_entity.pose.p
        plate_half = {"builtin": 0.006, "rl4vla": 0.003}[pack]
        over = (
            np.linalg.norm(offset[:2]) <= 0.065
            and 0 < offset[2] <= plate_half + env.target_half_z + 0.05
        )
        done.append(bool(over and force > 0.03))
        assert env.success == done[-1]
        streaks = "".join("x" if g else " " for g in grasped).split()
        long_enough = any(len(streak) >= {"builtin": 2, "rl4vla": 5}[pack] for streak in streaks)
        total.append(0.1 * any(grasped) + 0.1 * long_enough + 1.0 * (done[-1] and any(grasped)))
    assert np.allclose(rewards, np.diff([0.0, *total]), atol=1e-9)
    assert (
        done[-1]
        and env.success_once
        and np.isclose(sum(rewards), 1.2)
        and np.isclose(env.return_so_far, 1.2)
    )
    assert {round(r, 6) for r in rewards} >= {0.0, 0.1, 1.0}
    env.target_entity.pose = sapien.Pose([0.2, 0.3, TABLE_Z + 0.1])  # off the plate again
    env.step(np.zeros(7, np.float32))
    assert np.isclose(env.reward(), -1.0) and not env.success and env.success_once


def test_a_knocked_target_earns_nothing(env, start):
    """Success counts only for a target that has been in the gripper."""
    start(env, 0)
    env.target_entity.pose = sapien.Pose(
        env.plate_entity.pose.p + [0, 0, 0.006 + env.target_half_z + 0.002]
    )
    for _ in range(3):
        env.step(np.array([0, 0, 0, 0, 0, 0, 1], np.float32))
        assert env.reward() == 0.0
    assert env.success and not env.ever_grasped


def solved(env, start, ids, split="train"):
    wins = 0
    for i in ids:
        start(env, i, split, rebuild=False)
        for _ in range(env.pack.max_episode_steps):
            env.step(env.pack.oracle(env))
        wins += env.success
    return wins


def test_oracle(env, start):
    assert solved(env, start, range(16)) >= 14


@needs_rl4vla
def test_oracle_of_rl4vla(scene, start):
    assert solved(scene("rl4vla"), start, range(6)) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("pack, split, n, least", [
    ("builtin", "train", 64, 0.95),
    pytest.param("rl4vla", "train", 128, 0.95, marks=needs_rl4vla),
    pytest.param("rl4vla", "clutter-8", 48, 0.85, marks=needs_rl4vla),
])  # fmt: skip
def test_oracle_on_many(scene, start, pack, split, n, least):
    assert solved(scene(pack), start, range(n), split) >= least * n


# ---------------------------------------------------------------------------------------------------- many scenes
@pytest.fixture(scope="module")
def alone():
    with envs.make_envs(3, num_workers=1) as vec:
        yield vec


@pytest.fixture(scope="module")
def shared():
    with envs.make_envs(3, num_workers=2) as vec:
        yield vec


def scripted(environments):
    """Runs in a worker: the oracle's next action in each of its scenes."""
    return [env.pack.oracle(env) for env in environments]


def count_pictures(environments):
    """Runs in a worker: from now on counts the pictures that its first scene takes."""
    env, taken = environments[0], [0]
    picture = env.picture

    def counted():
        taken[0] += 1
        return picture()

    env.picture, env.taken = counted, taken


def pictures_taken(environments):
    return environments[0].taken[0]


def test_workers_and_chunks_change_nothing(alone, shared):
    """One process step by step, two processes step by step, chunks of 8 that overrun the end: the same to the bit."""
    ids, split = [0, 1, 2], "clutter-2"
    obs = alone.reset(ids, split, rebuild=True)
    assert (
        obs["rgb"].shape == (3, 96, 96, 3)
        and obs["rgb"].dtype == torch.uint8
        and "rgb_alt" not in obs
    )
    assert obs["mask"].shape == (3, 96, 96) and obs["mask"].dtype == torch.bool
    assert obs["state"].shape == (3, 8) and obs["state"].dtype == torch.float32
    names = [builtin.OBJECTS[sample_episode(i, split, PACK).target][0] for i in ids]
    assert alone.instructions == [f"put {name} on plate" for name in names]
    assert len({frame.numpy().tobytes() for frame in obs["rgb"]}) == 3
    actions, single = [], []
    for step in range(20):
        actions.append(torch.from_numpy(np.array(alone.map(scripted, ())[0])))
        single.append((*alone.step(actions[-1][:, None]),))
        assert bool(single[-1][2].all()) == bool(single[-1][2].any()) == (step == 19)
    assert single[-1][3]["success"].sum() >= 2  # else the rest would compare nothing

    def same(a, b):
        return all(torch.equal(a[0][k], b[0][k]) for k in a[0]) and all(
            torch.equal(a[3][k], b[3][k]) for k in a[3]
        )

    assert all(torch.equal(shared.reset(ids, split, rebuild=True)[k], obs[k]) for k in obs)
    assert shared.instructions == alone.instructions
    for step in range(20):
        got = shared.step(actions[step][:, None])
        assert same(got, single[step]) and torch.equal(got[1], single[step][1]), step

    shared.map(count_pictures, (), ())
    shared.reset(ids, split, rebuild=True)
    for first, last in ((0, 8), (8, 16), (16, 20)):
        chunk = torch.stack(actions[first:last], 1)
        if (
            last == 20
        ):  # the episode ends inside this chunk: what is past the end is not carried out
            chunk = torch.cat([chunk, torch.ones(3, 4, 7)], 1)
        got = shared.step(chunk)
        assert same(got, single[last - 1])
        assert torch.allclose(
            got[1], sum(reward for _, reward, _, _ in single[first:last]), atol=1e-6
        )
        assert bool(got[2].all()) == (last == 20)
    assert torch.allclose(
        got[3]["episode_return"], sum(reward for _, reward, _, _ in single), atol=1e-6
    )
    assert shared.map(pictures_taken, (), ()) == [4, 4]  # one after the reset, one after each chunk


def its_cores(environments):
    return os.sched_getaffinity(0)


def test_no_two_workers_stay_on_one_core(alone, shared):
    """Where Mesa draws, in a thread of its own, a worker stays on a core. Whatever job the others belong to."""
    here = os.sched_getaffinity(0)
    cores = [*alone.map(its_cores, ()), *shared.map(its_cores, (), ())]
    pinned = [c for c in cores if len(c) == 1 < len(here)]
    assert len(set.union(set(), *pinned)) == len(pinned)
    assert all(c == here for c in cores if c not in pinned)
    if render_backend() != "sapien_cpu":
        assert not pinned


def test_a_core_is_claimed_once(monkeypatch):
    claimed = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1000, 1001})
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: claimed.extend(cores))
    first, _, third = (workers.claim_core() for _ in range(3))
    assert claimed == [1000, 1001] and third is None
    os.close(first)
    workers.claim_core()
    assert claimed == [1000, 1001, 1000]


def test_unknown_split_is_refused_before_the_workers_hear_of_it(alone):
    with pytest.raises(Fault, match="unknown split"):
        alone.reset([0, 1, 2], "nowhere")
    alone.reset([0, 1, 2])  # still alive


# ---------------------------------------------------------------------------------------------------- workers that fail
def nap(environments, seconds):
    time.sleep(seconds)


def fail(environments, kind):
    raise Fault("a sentence") if kind == "fault" else ValueError("a bug in the worker")


def test_a_killed_worker_ends_the_run(start):
    vec = envs.make_envs(2, num_workers=2)
    processes = [process for process, _ in vec._workers]
    killer = threading.Timer(1.0, processes[1].send_signal, [signal.SIGKILL])
    begin = time.monotonic()
    killer.start()
    with pytest.raises(Fault, match="killed by SIGKILL"):
        vec.map(nap, (0,), (120,))
    assert time.monotonic() - begin < 30
    assert all(process.poll() is not None for process in processes)  # nobody is left behind


def test_a_worker_killed_between_steps():
    """SIGTERM to every process of a job is the main process's to answer: it saves first."""
    vec = envs.make_envs(1, num_workers=1)
    vec._workers[0][0].terminate()
    vec.reset([0])
    vec._workers[0][0].kill()
    vec._workers[0][0].wait()
    with pytest.raises(Fault, match="killed by SIGKILL"):
        vec.reset([0])


@pytest.mark.parametrize("kind", ["bug", "fault"])
def test_a_failing_worker_tells_why(kind, capfd):
    vec = envs.make_envs(1, num_workers=1)
    with pytest.raises(Fault, match="worker 0 failed" if kind == "bug" else "^a sentence$"):
        vec.map(fail, (kind,))
    err = capfd.readouterr().err
    assert ("ValueError: a bug in the worker" in err and "Traceback" in err) == (kind == "bug")


def tell_and_nap(environments, file):
    Path(file).touch()
    time.sleep(2)


def test_a_worker_whose_main_process_is_gone_ends_quietly(tmp_path):
    """Ctrl-C while it starts is the main process's to handle; that is then killed while the worker is at work."""
    errors, stderr = os.pipe()
    main = os.fork()
    if main == 0:
        try:
            os.setpgid(0, 0)
            os.dup2(stderr, 2)
            os.close(stderr)
            signal.signal(signal.SIGINT, lambda *_: None)
            envs.make_envs(1, num_workers=1).map(tell_and_nap, (str(tmp_path / "at work"),))
        finally:
            os._exit(1)
    os.close(stderr)
    children, deadline = Path(f"/proc/{main}/task/{main}/children"), time.monotonic() + 300
    while not children.read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.5)
    os.killpg(main, signal.SIGINT)
    while not (tmp_path / "at work").exists():
        assert os.waitpid(main, os.WNOHANG) == (0, 0) and time.monotonic() < deadline, os.read(
            errors, 65536
        ).decode()
        time.sleep(0.1)
    os.kill(main, signal.SIGKILL)
    os.waitpid(main, 0)
    said = b""
    while select.select([errors], [], [], 60)[0]:
        part = os.read(errors, 65536)
        said += part
        if not part:  # nobody holds the other end: no process is left
            break
    else:
        raise AssertionError("the worker is still there")
    os.close(errors)
    assert not said, said.decode()


# ---------------------------------------------------------------------------------------------------- preflight
def command_line(*flags, **environment):
    return subprocess.run(
        [sys.executable, "envs.py", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **environment},
    )


def test_check():
    run = command_line("--check")
    assert run.returncode == 0, run.stderr
    assert (
        "GPU: " in run.stdout
        and "mani_skill 3.0.1" in run.stdout
        and "first frame after" in run.stdout
    )


@pytest.mark.parametrize("here", [("Darwin", "arm64"), ("Linux", "aarch64")])
def test_check_on_a_mac_and_on_arm(monkeypatch, here):
    monkeypatch.setattr(preflight.platform, "system", lambda: here[0])
    monkeypatch.setattr(preflight.platform, "machine", lambda: here[1])
    with pytest.raises(
        Fault, match=rf"Linux with an x86-64 .* {here[0]} on {here[1]}: .*openvla-flat"
    ):
        preflight.check("builtin")
    preflight.check("flat")  # which needs none


@pytest.mark.parametrize(
    "version, passes", [("3, 10", 0), ("3, 11", 1), ("3, 12, 9", 1), ("3, 13", 0), ("3, 14", 0)]
)
def test_the_makefile_takes_the_pythons_for_which_there_are_wheels(tmp_path, version, passes):
    """mani_skill asks for mplib==0.1.1, which has none for 3.13 and later."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$2" in *version_info*) exec {sys.executable} -c '
        f'"import sys; sys.version_info = ({version}); ${{2#import sys; }}";; *) exit 9;; esac\n'
    )
    python.chmod(0o755)
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    run = subprocess.run(
        ["make", "setup", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True
    )
    refused = "Python 3.11 or 3.12 is needed" in run.stderr
    assert run.returncode != 0 and refused == (not passes), run.stderr
    assert refused == ("PYTHON=python3.12" in run.stderr)


def test_check_without_a_driver():
    run = command_line(
        "--check", VK_ICD_FILENAMES="/nonexistent.json", VK_DRIVER_FILES="/nonexistent.json"
    )
    assert run.returncode == 2 and run.stderr.startswith("error: no Vulkan device")
    assert "lavapipe" in run.stderr and "Traceback" not in run.stderr


def test_check_survives_a_driver_that_crashes(tmp_path, monkeypatch):
    crash = tmp_path / "python"
    crash.write_text("#!/bin/sh\nkill -SEGV $$\n")
    crash.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(crash))
    with pytest.raises(Fault, match="crashed .SIGSEGV.*lavapipe"):
        preflight.check("builtin")


@pytest.mark.parametrize("flags, words", [
    ((), "nothing to do"),
    (("--check", "--assets", "nothing"), "unknown --assets"),
    (("--gallery", "sheet.jpg"), "must end in .png"),
])  # fmt: skip
def test_command_line_errors(flags, words):
    run = command_line(*flags)
    assert run.returncode == 2 and words in run.stderr and run.stderr.startswith("error: ")
    assert "Traceback" not in run.stderr


def test_flatland_needs_no_simulator():
    """It runs where neither ManiSkill nor SAPIEN can be imported."""
    code = "import sys; sys.modules.update(dict.fromkeys(('mani_skill', 'sapien', 'gymnasium')))\n"
    code += "import envs, views\nassert envs.choose_sim('cpu') == 'cpu'\n"
    code += "vec = envs.make_envs(2, 'flat', alter=views.task_altering, image_size=32)\n"
    code += "assert vec.reset([0, 1], 'pose')['rgb_alt'].shape == (2, 32, 32, 3)\n"
    code += "assert vec.backgrounds().shape == (16, 32, 32, 3)\n"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
