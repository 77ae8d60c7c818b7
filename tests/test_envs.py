"""envs.py: episodes and splits, rewards, exact repetition, workers that die, the preflight. Real simulator, no policy."""
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import envs
import sft
from envs import CENTER, GRID, HALF_EDGE, HELD_OUT_YAWS, LIGHTS, OBJECTS, RING, TRAIN_YAWS, Fault, sample_episode

ROOT = Path(__file__).parent.parent
PACK = envs.PACKS["builtin"]
CLUTTER = [f"clutter-{k}" for k in (2, 4, 6, 8)]


def episodes(split, n=300):
    return [sample_episode(i, split, PACK) for i in range(n)]


def on(points, xy):
    """Is xy one of the points?"""
    return np.abs(points - np.array(xy)).max(1).min() < 1e-9


# ---------------------------------------------------------------------------------------------------- splits (no simulator)
@pytest.mark.parametrize("split, distractors", [("train", 1), ("bare", 0), ("busy", 4)])
def test_training_never_sees_what_is_held_out(split, distractors):
    drawn = episodes(split)
    for e in drawn:
        assert e.target < 16 and all(i < 16 for i in e.distractors) and len(e.distractors) == distractors
        assert len({e.target, *e.distractors}) == 1 + distractors
        assert e.table < 16 and e.light == 0 and e.camera_deg == 0
        assert on(GRID, e.target_xy) and on(GRID, e.plate_xy) and np.isclose(TRAIN_YAWS, e.target_yaw).any()
    assert {e.target for e in drawn} == set(range(16)) == {e.table for e in drawn}  # and everything else it does see
    assert len({e.target_yaw for e in drawn}) == 4


def test_every_place_is_used():
    """RL4VLA's rule in a 15 cm square leaves the target the 20 points of the rim and 4 inside; the plate all 36."""
    drawn = episodes("train", 1500)
    inside = [p for p in GRID if np.abs(p - CENTER).max() < 0.07]
    rim = len(GRID) - len(inside)
    assert rim == 20 and len({e.target_xy for e in drawn}) == 24 and len({e.plate_xy for e in drawn}) == 36
    assert sum(on(np.array([e.target_xy for e in drawn]), p) for p in inside) == 4


def test_counts_and_places():
    assert len(OBJECTS) == len({name for name, _, _ in OBJECTS}) == 25
    assert len(LIGHTS) == len(set(LIGHTS)) == 21
    assert len(GRID) == 36 and np.allclose(np.abs(GRID - CENTER).max(0), HALF_EDGE)
    assert np.allclose(np.unique(np.diff(np.unique(GRID[:, 0].round(9)))), 0.03)
    assert len(RING) == 28 and np.allclose(np.abs(RING - CENTER).max(1), 0.105)
    yaws = [*TRAIN_YAWS, *HELD_OUT_YAWS]
    assert len(set(np.round(np.mod(yaws, np.pi), 6))) == 8  # none is another's half turn
    tables = [envs.table_texture(i) for i in range(21)]
    far = [np.abs(tables[i].astype(int) - tables[j]).mean() for i in range(21) for j in range(i)]
    assert min(far) > 5 and np.array_equal(tables[3], envs.table_texture(3))


def test_held_out_splits():
    assert {e.table for e in episodes("texture")} == set(range(16, 21))
    assert {e.light for e in episodes("lighting", 600)} == set(range(1, 21))
    assert {e.camera_deg for e in episodes("camera-12.5", 5)} == {-12.5}
    for e in episodes("pose"):
        assert on(RING, e.target_xy) and np.isclose(HELD_OUT_YAWS, e.target_yaw).any() and on(GRID, e.plate_xy)
        assert e.table < 16 and e.light == 0


def test_one_factor_changes_at_a_time():
    """Episode i has the same target and plate in every split but `pose`: policies are compared episode by episode."""
    for i in range(100):
        train = sample_episode(i, "train", PACK)
        for split in ("bare", "texture", "lighting", *CLUTTER, "camera+20"):
            other = sample_episode(i, split, PACK)
            for field in ("target", "target_xy", "target_yaw", "plate_xy"):
                assert getattr(train, field) == getattr(other, field), (i, split, field)
            assert (train.table == other.table) == (split != "texture")
            assert (train.light == other.light) == (split != "lighting")
            assert other.distractors == () or other.distractors[0] == train.distractors[0]
        assert sample_episode(i, "pose", PACK).target == train.target
        assert sample_episode(i, "train", PACK) == train


@pytest.mark.parametrize("split", ["train", "pose", *CLUTTER])
def test_room_between_things(split):
    for e in episodes(split, 150):
        s = envs.parse_split(split)
        places = np.array([e.target_xy, e.plate_xy, *e.distractor_xy])
        radii = np.array([PACK.radius(e.target), PACK.plate_radius, *map(PACK.radius, e.distractors)])
        gaps = np.linalg.norm(places[:, None] - places[None], axis=-1)
        assert gaps[0, 1] > 0.07 and gaps[0, 2] > 0.15 and gaps[1, 2] > 0.07  # RL4VLA's rule
        overlap = gaps < radii[:, None] + radii[None]
        assert not np.triu(overlap, 1)[:, 3:].any()  # whatever was placed later stands clear of everything
        assert len(e.distractors) == s.distractors == len(set(e.distractors) - {e.target})
        assert sum(i >= 16 for i in e.distractors) == (s.distractors // 2 if s.held_out_objects else 0)


@pytest.mark.parametrize("name", ["", "training", "clutter-3", "camera20", "camera+91", "camera+", "camera+20x"])
def test_unknown_split(name):
    with pytest.raises(Fault, match="split"):
        envs.parse_split(name)


def test_wrong_arguments():
    for wrong in (dict(num_envs=0), dict(num_envs=-2), dict(num_envs=2, assets="nothing")):
        with pytest.raises(Fault, match="--num-envs|--assets"):
            envs.make_envs(**wrong)
    with pytest.raises(Fault, match="nothing"):
        envs.make_env("nothing")


# ---------------------------------------------------------------------------------------------------- one scene
def rollout(env, episode_id, start, full_state, steps=8):
    """Oracle steps -> every frame, mask and state, all to the bit."""
    start(env, episode_id)
    seen = []
    for _ in range(steps):
        env.step(sft.oracle(env))
        rgb, ids = env.picture()
        seen += [rgb.copy(), env.foreground(ids), full_state(env)]
    return seen


def test_an_exact_episode_does_not_depend_on_history(env, start, full_state):
    first = rollout(env, 3, start, full_state)
    for other in (7, 8):  # with contacts, and other bodies in use
        start(env, other, "clutter-4", exact=False)
        for _ in range(12):
            env.step(sft.oracle(env))
    again = rollout(env, 3, start, full_state)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], rollout(env, 4, start, full_state, 1)[0])


def test_frame_shows_the_split(env, start):
    """Another table changes the surroundings and not the foreground, and so on."""
    looks = {}
    for split in ("train", "texture", "lighting", "camera+0", "camera+20", "camera-20", "clutter-8"):
        start(env, 1, split, exact=False)
        rgb, ids = env.picture()
        looks[split] = rgb.copy(), env.foreground(ids)
    rgb, mask = looks["train"]
    assert rgb.shape == (96, 96, 3) and rgb.dtype == np.uint8 and 0.05 < mask.mean() < 0.6

    def changed(split, where):
        return (np.abs(looks[split][0].astype(int) - rgb).max(-1) > 8)[where].mean()

    assert changed("texture", ~mask) > 0.5 and changed("texture", mask) < 0.02
    assert changed("lighting", mask) > 0.5
    assert np.array_equal(looks["camera+0"][0], rgb)
    assert 0.02 < changed("clutter-8", ~mask) < 0.5
    assert changed("camera+20", np.full_like(mask, True)) > 0.1 < changed("camera-20", np.full_like(mask, True))


def test_camera_orbits_by_so_many_degrees(env, start):
    def azimuth(split):
        start(env, 1, split, exact=False)
        world_to_camera = np.vstack([env.camera.get_extrinsic_matrix()[:3], [0, 0, 0, 1]])
        camera_to_world = np.linalg.inv(world_to_camera)
        eye, ahead = camera_to_world[:3, 3], camera_to_world[:3, 2]  # OpenCV: z looks ahead
        at = eye + ahead * np.linalg.norm(np.append(CENTER, 0.945) - eye)
        return np.rad2deg(np.arctan2(*(eye[:2] - CENTER)[::-1])), np.linalg.norm(eye[:2] - CENTER), eye[2], at

    start_angle, radius, height, _ = azimuth("train")
    for degrees in (20, -20, 45):
        angle, r, z, at = azimuth(f"camera{degrees:+d}")
        assert np.isclose((angle - start_angle + 180) % 360 - 180, degrees, atol=0.01)
        assert np.isclose(r, radius) and np.isclose(z, height) and np.linalg.norm(at[:2] - CENTER) < 0.05


def test_rewards_by_brute_force(env, start):
    start(env, 0)
    grasped, rewards, total, done = [], [], [], []
    for _ in range(env.pack.max_episode_steps):
        env.step(sft.oracle(env))
        rewards.append(env.reward())
        # ManiSkill's own idea of a grasp, and of what the plate carries
        held = bool(env.agent.is_grasping(env.target)[0])
        grasped.append(held)
        assert env.grasped == held
        force = np.linalg.norm(env.scene.get_pairwise_contact_forces(env.target, env.plate)[0].numpy())
        offset = env.target_entity.pose.p - env.plate_entity.pose.p
        over = np.linalg.norm(offset[:2]) <= 0.065 and 0 < offset[2] <= 0.006 + env.target_half_z + 0.05
        done.append(bool(over and force > 0.03))
        assert env.success == done[-1]
        streaks = "".join("x" if g else " " for g in grasped).split()
        long_enough = any(len(streak) >= 2 for streak in streaks)
        total.append(0.1 * any(grasped) + 0.1 * long_enough + 1.0 * (done[-1] and any(grasped)))
    assert np.allclose(rewards, np.diff([0.0, *total]), atol=1e-9)
    assert done[-1] and env.success_once and np.isclose(sum(rewards), 1.2) and np.isclose(env.return_so_far, 1.2)
    assert {round(r, 6) for r in rewards} >= {0.0, 0.1, 1.0}
    env.target_entity.pose = envs.sapien.Pose([0.2, 0.3, envs.TABLE_Z + 0.1])  # off the plate again
    env.step(np.zeros(7, np.float32))
    assert np.isclose(env.reward(), -1.0) and not env.success and env.success_once


def test_a_knocked_target_earns_nothing(env, start):
    """Success counts only for a target that has been in the gripper."""
    start(env, 0)
    env.target_entity.pose = envs.sapien.Pose(env.plate_entity.pose.p + [0, 0, 0.006 + env.target_half_z + 0.002])
    for _ in range(3):
        env.step(np.array([0, 0, 0, 0, 0, 0, 1], np.float32))
        assert env.reward() == 0.0
    assert env.success and not env.ever_grasped


def solved(env, start, ids):
    wins = 0
    for i in ids:
        start(env, i, exact=False)
        for _ in range(env.pack.max_episode_steps):
            env.step(sft.oracle(env))
        wins += env.success
    return wins


def test_oracle(env, start):
    assert solved(env, start, range(16)) >= 14


@pytest.mark.slow
def test_oracle_on_many(env, start):
    assert solved(env, start, range(1000, 1064)) >= 0.95 * 64


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
    return [sft.oracle(env) for env in environments]


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
    ids, splits = [0, 1, 2], ["train", "clutter-2", "pose"]
    obs = alone.reset(ids, splits, exact=True)
    assert obs["rgb"].shape == (3, 96, 96, 3) and obs["rgb"].dtype == torch.uint8 and "rgb_alt" not in obs
    assert obs["mask"].shape == (3, 96, 96) and obs["mask"].dtype == torch.bool
    assert obs["state"].shape == (3, 8) and obs["state"].dtype == torch.float32
    names = [OBJECTS[sample_episode(i, s, PACK).target][0] for i, s in zip(ids, splits)]
    assert alone.instructions == [f"put {name} on plate" for name in names]
    assert len({frame.numpy().tobytes() for frame in obs["rgb"]}) == 3
    actions, single = [], []
    for step in range(20):
        actions.append(torch.from_numpy(np.array(alone.map(scripted, ())[0])))
        single.append((*alone.step(actions[-1][:, None]),))
        assert bool(single[-1][2].all()) == bool(single[-1][2].any()) == (step == 19)
    assert single[-1][3]["success"].sum() >= 2  # else the rest would compare nothing

    def same(a, b):
        return all(torch.equal(a[0][k], b[0][k]) for k in a[0]) and all(torch.equal(a[3][k], b[3][k]) for k in a[3])

    assert all(torch.equal(shared.reset(ids, splits, exact=True)[k], obs[k]) for k in obs)
    assert shared.instructions == alone.instructions
    for step in range(20):
        got = shared.step(actions[step][:, None])
        assert same(got, single[step]) and torch.equal(got[1], single[step][1]), step

    shared.map(count_pictures, (), ())
    shared.reset(ids, splits, exact=True)
    for first, last in ((0, 8), (8, 16), (16, 20)):
        chunk = torch.stack(actions[first:last], 1)
        if last == 20:  # the episode ends inside this chunk: what is past the end is not carried out
            chunk = torch.cat([chunk, torch.ones(3, 4, 7)], 1)
        got = shared.step(chunk)
        assert same(got, single[last - 1])
        assert torch.allclose(got[1], sum(reward for _, reward, _, _ in single[first:last]), atol=1e-6)
        assert bool(got[2].all()) == (last == 20)
    assert torch.allclose(got[3]["episode_return"], sum(reward for _, reward, _, _ in single), atol=1e-6)
    assert shared.map(pictures_taken, (), ()) == [4, 4]  # one after the reset, one after each chunk


def test_unknown_split_is_refused_before_the_workers_hear_of_it(alone):
    with pytest.raises(Fault, match="unknown split"):
        alone.reset([0, 1, 2], ["train", "train", "nowhere"])
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
    vec = envs.make_envs(1, num_workers=1)
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


# ---------------------------------------------------------------------------------------------------- preflight
def command_line(*flags, **environment):
    return subprocess.run([sys.executable, "envs.py", *flags], cwd=ROOT, capture_output=True, text=True, timeout=600,
                          env={**os.environ, **environment})  # fmt: skip


def test_check():
    run = command_line("--check")
    assert run.returncode == 0, run.stderr
    assert "GPU: " in run.stdout and "mani_skill 3.0.1" in run.stdout and "first frame after" in run.stdout


def test_check_without_a_driver():
    run = command_line("--check", VK_ICD_FILENAMES="/nonexistent.json", VK_DRIVER_FILES="/nonexistent.json")
    assert run.returncode == 2 and run.stderr.startswith("error: no Vulkan device")
    assert "lavapipe" in run.stderr and "Traceback" not in run.stderr


def test_check_survives_a_driver_that_crashes(tmp_path, monkeypatch):
    crash = tmp_path / "python"
    crash.write_text("#!/bin/sh\nkill -SEGV $$\n")
    crash.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(crash))
    with pytest.raises(Fault, match="crashed .SIGSEGV.*lavapipe"):
        envs.check("builtin")


def test_command_line_errors(tmp_path, capsys):
    for args, words in (
        (envs.Args(), "nothing to do"),
        (envs.Args(check=True, assets="nothing"), "unknown --assets"),
        (envs.Args(gallery=str(tmp_path / "sheet.jpg")), "must end in .png"),
        (envs.Args(gallery="/proc/none/sheet.png"), "cannot write"),
    ):
        with pytest.raises(Fault, match=words):
            envs.main(args)
