"""evaluate.py: statistics against brute force, the episode loop on a toy environment, files, command line."""

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import evaluate as ev

OOD = ["texture", "lighting", "pose", "clutter-2", "clutter-4", "clutter-6", "clutter-8"]


def make_records(split, outcomes, seed=0, at_end=None):
    return [
        {
            "split": split,
            "episode_id": ev.EVAL_EPISODES_START + i,
            "seed": seed,
            "instruction": "put red cube on plate",
            "success_once": bool(outcome),
            "success_at_end": bool(outcome if at_end is None else at_end[i]),
            "steps": 20,
            "sum_reward": 1.2 * outcome,
        }
        for i, outcome in enumerate(map(int, outcomes))
    ]


# A toy world: the picture shows the episode id, the instruction names it, and success needs a noisy action above a bar.


class Toy:
    """Looks like envs.VecEnv. Episodes last 5 env steps; solved while the first action component is above 0."""

    max_episode_steps = 5
    image_size = 8

    def __init__(self, num_envs=4):
        self.num_envs, self.resets = num_envs, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def reset(self, episode_ids, split="train", rebuild=False, alter_seed=0):
        assert rebuild, "evaluation must not depend on the episodes before"
        assert len(episode_ids) == self.num_envs
        self.resets.append((list(episode_ids), split))
        self.ids, self.elapsed = torch.tensor(episode_ids), 0
        self.instructions = [f"put object {i} on plate" for i in episode_ids]
        self.once = torch.zeros(self.num_envs, dtype=torch.bool)
        self.total = torch.zeros(self.num_envs)
        return self.observe()

    def observe(self):
        rgb = (self.ids % 100).to(torch.uint8).view(-1, 1, 1, 1).repeat(1, 8, 8, 3) + self.elapsed
        return {"rgb": rgb, "state": torch.zeros(self.num_envs, 8)}

    def step(self, actions):
        assert actions.shape[::2] == (self.num_envs, 7)
        now = torch.zeros(self.num_envs, dtype=torch.bool)
        for action in actions[:, : self.max_episode_steps - self.elapsed].unbind(1):
            now = action[:, 0] > 0
            self.once |= now
            self.total += action[:, 0]
            self.elapsed += 1
        info = {
            "success": now,
            "success_once": self.once.clone(),
            "grasped": now,
            "episode_return": self.total.clone(),
        }
        return (
            self.observe(),
            self.total.clone(),
            torch.full((self.num_envs,), self.elapsed >= 5),
            info,
        )


class Decision(NamedTuple):
    actions: torch.Tensor


class Noisy:
    """Acts by the global torch generator, as a policy that samples tokens does; temperature 0 reads the id instead."""

    image_size = 8

    def __init__(self, chunk=2):
        self.chunk = chunk

    def act(self, obs, instructions, temperature=1.0):
        assert len(instructions) == len(obs["rgb"])
        shown = obs["rgb"][:, 0, 0, 0].float()  # episode id % 100 + elapsed
        actions = torch.randn(len(shown), self.chunk, 7) - 1.0
        if temperature == 0:
            actions = (shown % 2 - 0.5).view(-1, 1, 1).repeat(1, self.chunk, 7)
        return Decision(actions)


# ---- statistics


def test_wilson_known_values():
    # 8/10: worked example in many texts; 0/10 and 10/10: z^2 / (n + z^2)
    assert ev.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert ev.wilson(0, 10) == pytest.approx((0.0, 1.96**2 / (10 + 1.96**2)))
    assert ev.wilson(10, 10) == pytest.approx((10 / (10 + 1.96**2), 1.0))
    low, high = ev.wilson(64, 128)
    assert low + high == pytest.approx(1.0) and (high - low) / 2 == pytest.approx(0.085, abs=1e-3)


@pytest.mark.parametrize(("k", "n"), [(0, 7), (1, 7), (5, 16), (13, 16), (16, 16), (100, 128)])
def test_wilson_inverts_the_score_test(k, n):
    p = np.linspace(1e-6, 1 - 1e-6, 400_001)
    accepted = p[np.abs(k / n - p) <= 1.96 * np.sqrt(p * (1 - p) / n)]
    assert ev.wilson(k, n) == pytest.approx((accepted.min(), accepted.max()), abs=1e-5)


@pytest.mark.parametrize(("k", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_nonsense(k, n):
    with pytest.raises(ValueError):
        ev.wilson(k, n)


def rows_of(table):
    return {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in table.splitlines()
    }


def test_table_text():
    records = make_records("train", [1] * 8 + [0] * 2, at_end=[1] * 5 + [0] * 5) + make_records(
        "texture", [0] * 10
    )
    assert ev.ood_table(records).splitlines() == [
        "| split | success_once % | success_at_end % | n |",
        "| --- | --- | --- | --- |",
        "| train | 80.0 [49.0, 94.3] | 50.0 [23.7, 76.3] | 10 |",
        "| texture | 0.0 [0.0, 27.8] | 0.0 [0.0, 27.8] | 10 |",
        "| OOD average (texture) | 0.0 [0.0, 27.8] | 0.0 [0.0, 27.8] | 10 |",
    ]


def test_table_without_ood_splits_has_no_average():
    assert "OOD" not in ev.ood_table(make_records("train", [1, 0]))


def test_ood_average_counts_clutter_once():
    rates = {
        "train": 100,
        "texture": 90,
        "lighting": 80,
        "pose": 70,
        "clutter-2": 60,
        "clutter-4": 50,
        "clutter-6": 40,
    }
    rates |= {"clutter-8": 34}
    records = [
        r
        for split, rate in rates.items()
        for r in make_records(split, [1] * rate + [0] * (100 - rate))
    ]
    rows = rows_of(ev.ood_table(records))
    average = rows["OOD average (texture, lighting, pose, clutter)"]
    assert average[0].startswith(
        "71.5 "
    )  # (90 + 80 + 70 + 46) / 4; the plain mean of the seven would be 60.6
    assert average[2] == "700"
    assert ev.ood_weights(["train", "camera+20", "camera-20", "pose"]) == {
        "camera+20": 0.25,
        "camera-20": 0.25,
        "pose": 0.5,
    }


@pytest.mark.parametrize("shared", [False, True], ids=["independent", "correlated"])
def test_ood_average_interval_covers_the_truth(shared):
    """An id has one target in all splits, so its outcomes go together; the interval must know."""
    rng, covered, widths = np.random.default_rng(0), 0, []
    for _ in range(200):
        luck = rng.random((1 if shared else len(OOD), 64))
        outcomes = np.broadcast_to(luck < 0.7, (len(OOD), 64))
        table = ev.ood_table(
            [r for split, row in zip(OOD, outcomes, strict=True) for r in make_records(split, row)]
        )
        low, high = map(float, re.search(r"OOD average .*?\[(.*?), (.*?)\]", table).groups())
        covered += low <= 70.0 <= high
        widths.append(high - low)
    assert covered >= 0.9 * 200
    assert np.mean(widths) > 20 if shared else np.mean(widths) < 13  # a single split of 64: 22


def test_bootstrap_identical_runs():
    records = make_records("train", [1, 0, 1, 1]) + make_records("texture", [0, 0, 1, 1])
    differences = ev.paired_bootstrap(
        records, records[::-1]
    )  # the order of the lines means nothing
    assert [d.name for d in differences] == ["train", "texture", "OOD average", "all splits"]
    assert [d.pairs for d in differences] == [4, 4, 4, 8]
    for d in differences:
        assert (d.rate_b - d.rate_a, d.low, d.high) == (0, 0, 0)
    assert "| train | 75.0 | 75.0 | +0.0 [+0.0, +0.0] | 4 |" in ev.compare_table(differences)


def test_bootstrap_constant_shift_is_certain():
    (d, _) = ev.paired_bootstrap(make_records("train", [0] * 9), make_records("train", [1] * 9))
    assert (d.rate_a, d.rate_b, d.low, d.high) == (0, 1, 1, 1)


def test_bootstrap_matches_its_exact_distribution():
    """10 of 40 pairs improve, none worsens: the resampled difference is Binomial(40, 1/4) / 40."""
    a, b = [0] * 20 + [1] * 20, [1] * 10 + [0] * 10 + [1] * 20
    d = ev.paired_bootstrap(make_records("train", a), make_records("train", b))[0]
    assert d.rate_b - d.rate_a == pytest.approx(0.25)
    exact = stats.binom(40, 0.25).ppf([0.025, 0.975]) / 40
    assert (d.low, d.high) == pytest.approx(
        tuple(exact), abs=1 / 40 + 1e-9
    )  # one step of the distribution


def test_pairing_matters():
    """Two runs that fail on the same hard scenes: the paired interval is far shorter than the unpaired one."""
    rng = np.random.default_rng(1)
    a = rng.random(200) < 0.5
    b = a ^ (rng.random(200) < 0.05)  # the same outcome in 95 % of the scenes
    d = ev.paired_bootstrap(make_records("train", a), make_records("train", b))[0]
    unpaired = 2 * 1.96 * np.sqrt(a.var() / 200 + b.var() / 200)
    paired = 2 * 1.96 * np.std(b.astype(float) - a) / np.sqrt(200)
    assert d.high - d.low == pytest.approx(paired, rel=0.15)
    assert d.high - d.low < 0.4 * unpaired
    shuffled = rng.permutation(b)
    d = ev.paired_bootstrap(make_records("train", a), make_records("train", shuffled))[0]
    assert d.high - d.low == pytest.approx(unpaired, rel=0.15)


def test_bootstrap_ood_average_counts_clutter_once_and_keeps_ids_together():
    a = [r for split in OOD for r in make_records(split, [0] * 50)]
    b = [r for split in OOD for r in make_records(split, [split == "pose"] * 50)]
    average = {d.name: d for d in ev.paired_bootstrap(a, b)}
    assert average["OOD average"].rate_b == pytest.approx(1 / 4)
    assert average["all splits"].rate_b == pytest.approx(1 / 7)
    # The same ids improve in every split: averaging seven copies must not shorten the interval.
    improved = [1] * 15 + [0] * 35
    together = {
        d.name: d
        for d in ev.paired_bootstrap(a, [r for split in OOD for r in make_records(split, improved)])
    }
    assert together["OOD average"].high - together["OOD average"].low == pytest.approx(
        together["pose"].high - together["pose"].low
    )


def test_bootstrap_splits_of_unequal_size_and_seeds():
    a = (
        make_records("train", [0] * 30)
        + make_records("pose", [0] * 30)
        + make_records("pose", [0] * 30, seed=1)
    )
    b = (
        make_records("train", [1] * 30)
        + make_records("pose", [1, 0, 0] * 10)
        + make_records("pose", [1, 1, 0] * 10, seed=1)
    )
    differences = {d.name: d for d in ev.paired_bootstrap(a, b)}
    assert (differences["train"].pairs, differences["pose"].pairs) == (30, 60)
    assert (differences["train"].low, differences["train"].high) == (1, 1)
    assert differences["pose"].rate_b == pytest.approx(0.5)
    few = make_records("train", [1] * 30) + make_records(
        "pose", [1, 0]
    )  # many draws hold neither of the two
    assert all((d.low, d.high) == (0, 0) for d in ev.paired_bootstrap(few, few))


def test_bootstrap_unmatched_episodes_are_a_fault():
    with pytest.raises(
        ev.Fault, match=rf"^2 episodes .* train, episode {ev.EVAL_EPISODES_START + 2}, seed 0\)"
    ):
        ev.paired_bootstrap(make_records("train", [1] * 4), make_records("train", [1] * 2))
    with pytest.raises(ev.Fault, match="^4 episodes"):
        ev.paired_bootstrap(make_records("train", [1] * 2), make_records("train", [1] * 2, seed=1))


# ---- episodes


def test_ids_are_fixed_and_apart_from_training():
    assert ev.eval_episode_ids(3) == [1_000_000_000, 1_000_000_001, 1_000_000_002]
    assert ev.eval_episode_ids(3) == ev.eval_episode_ids(128)[:3]
    of_seeds = [set(ev.eval_episode_ids(ev.EPISODES_PER_SEED, seed)) for seed in range(3)]
    assert not of_seeds[0] & of_seeds[1] and not of_seeds[1] & of_seeds[2]


def test_last_batch_is_padded_and_the_padding_dropped():
    envs, ids = Toy(num_envs=4), ev.eval_episode_ids(6)
    records = ev.evaluate(Noisy(), envs, "train", ids, temperature=0)
    assert envs.resets == [(ids[:4], "train"), ([ids[4], ids[5], ids[4], ids[5]], "train")]
    assert [r["episode_id"] for r in records] == ids
    assert [r["instruction"] for r in records] == [f"put object {i} on plate" for i in ids]
    assert len(ev.evaluate(Noisy(), Toy(4), "train", ids[:1], temperature=0)) == 1


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_record_values(chunk):
    """At temperature 0 the toy policy acts +0.5 or -0.5 by the parity of (episode id + elapsed steps)."""
    records = ev.evaluate(
        Noisy(chunk), Toy(2), "pose", ev.eval_episode_ids(2), temperature=0, seed=3
    )
    looks = range(0, 5, chunk)
    for i, record in enumerate(records):
        signs = [
            0.5 if (i + look) % 2 else -0.5 for look in looks for _ in range(min(chunk, 5 - look))
        ]
        assert record == {
            "split": "pose",
            "episode_id": 1_000_000_000 + i,
            "seed": 3,
            "instruction": f"put object {1_000_000_000 + i} on plate",
            "success_once": max(signs) > 0,
            "success_at_end": signs[-1] > 0,
            "steps": 5,
            "sum_reward": sum(signs),
        }


def test_noise_depends_on_seed_split_and_batch_alone():
    def returns(split="train", seed=0, disturb=0):
        torch.manual_seed(disturb)
        return [
            r["sum_reward"]
            for r in ev.evaluate(Noisy(), Toy(), split, ev.eval_episode_ids(8), 1.0, seed=seed)
        ]

    assert returns() == returns(disturb=7)
    assert len(set(returns())) == 8  # each episode its own noise, in the second batch too
    assert returns() != returns(split="texture") and returns() != returns(seed=1)


def test_the_seed_is_the_same_in_every_process():
    assert ev.noise_seed(0, "clutter-4", 2) == 2593548335


def test_callers_random_state_does_not_move():
    torch.manual_seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    ev.evaluate(Noisy(), Toy(), "train", ev.eval_episode_ids(8), 1.0)
    ev.paired_bootstrap(make_records("train", [1, 0]), make_records("train", [1, 1]))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_videos_carry_the_outcome_and_show_what_the_policy_saw(tmp_path):
    import imageio

    records = ev.evaluate(
        Noisy(5), Toy(2), "clutter-4", ev.eval_episode_ids(4), 0, video_dir=tmp_path, num_videos=3
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"clutter-4_100000000{i}_{'success' if records[i]['success_once'] else 'failure'}.mp4"
        for i in range(3)
    ]
    assert {r["success_once"] for r in records} == {True, False}
    frames = np.stack(imageio.mimread(tmp_path / "clutter-4_1000000001_success.mp4"))
    assert frames.shape == (2, 32, 32, 3)  # before the one chunk and after it; 8 pixels x 4
    assert np.abs(frames.mean((1, 2, 3)) - [1, 6]).max() < 4  # the toy paints id % 100 + elapsed


# ---- files and the command line


@pytest.fixture
def toy_world(tmp_path, monkeypatch):
    """A checkpoint directory, and a policy and environments that need no simulator."""
    loaded = []

    def load_policy(backbone, checkpoint, device, dtype):
        loaded.append((backbone, checkpoint))
        if backbone == "broken":
            raise PolicyError("model.safetensors is cut short: copy it again")
        return Noisy()

    class PolicyError(ValueError):
        pass

    monkeypatch.setitem(
        sys.modules,
        "policies",
        types.SimpleNamespace(
            PolicyError=PolicyError, load_policy=load_policy, DTYPES=dict(auto=None)
        ),
    )
    monkeypatch.setattr(ev, "make_envs", lambda num_envs, *_, **__: Toy(num_envs))
    (tmp_path / "args.json").write_text(json.dumps({"backbone": "toy", "assets": "builtin"}))
    return tmp_path, loaded


def test_main_writes_records_table_and_videos(toy_world, capsys):
    checkpoint, loaded = toy_world
    args = ev.Args(
        str(checkpoint), splits=("train", "pose"), num_episodes=6, num_envs=4, seeds=(0, 1), video=1
    )
    ev.main(args)
    assert loaded == [("toy", str(checkpoint))]
    records = ev.read_records(checkpoint / "eval")  # a directory
    assert records == ev.read_records(checkpoint / "eval" / "episodes.jsonl")  # or the file
    assert [(r["split"], r["seed"]) for r in records] == [
        (s, k) for s in ("train", "pose") for k in (0, 1) for _ in range(6)
    ]
    assert [r["episode_id"] for r in records[:12]] == ev.eval_episode_ids(
        6, 0
    ) + ev.eval_episode_ids(6, 1)
    expected = ev.evaluate(Noisy(), Toy(4), "pose", ev.eval_episode_ids(6, 1), 0.6, seed=1)
    assert records[18:] == expected  # the file gives back what evaluate returned
    table = (checkpoint / "eval" / "table.md").read_text()
    assert (
        table.startswith(ev.ood_table(records))
        and "temperature 0.6" in table
        and "seeds 0 1" in table
    )
    assert ev.ood_table(records) in capsys.readouterr().out
    assert sorted(p.name[:16] for p in (checkpoint / "eval/videos").iterdir()) == [
        "pose_1000000000_",
        "train_1000000000",
    ]
    first = (checkpoint / "eval/episodes.jsonl").read_bytes()
    ev.main(args)
    assert (checkpoint / "eval/episodes.jsonl").read_bytes() == first
    ev.main(ev.Args(compare=(str(checkpoint / "eval"), str(checkpoint / "eval"))))
    assert "+0.0 [+0.0, +0.0] | 24 |" in capsys.readouterr().out


def test_interrupt_keeps_the_finished_splits(toy_world, monkeypatch):
    checkpoint, _ = toy_world

    def reset(self, ids, split, rebuild):
        if split == "pose":
            raise KeyboardInterrupt
        return Toy.reset(self, ids, split, rebuild)

    envs = type("Interrupted", (Toy,), {"reset": reset})(4)
    monkeypatch.setattr(ev, "make_envs", lambda *_, **__: envs)
    with pytest.raises(ev.Fault, match="^interrupted: 4 finished episodes"):
        ev.main(ev.Args(str(checkpoint), splits=("train", "pose"), num_episodes=4))
    assert len(ev.read_records(checkpoint / "eval")) == 4


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"checkpoint": ""}, "nothing to evaluate: pass --checkpoint DIR"),
        ({"checkpoint": "/no/such/run"}, "checkpoint directory /no/such/run does not exist"),
        ({"splits": ("train", "textures")}, "unknown split 'textures'"),
        ({"splits": ()}, "--splits needs at least one"),
        ({"splits": ("pose", "pose")}, "--splits needs at least one split and none twice"),
        ({"seeds": (1, 1)}, "--seeds needs at least one seed and none twice"),
        ({"seeds": (-1,)}, "--seeds must be 0 or more"),
        ({"num_episodes": 0}, "--num-episodes must be 1 to"),
        ({"num_envs": 0}, "--num-envs must be at least 1"),
        ({"temperature": -0.5}, "--temperature must be 0"),
        ({"temperature": float("nan")}, "--temperature must be 0"),
        ({"video": -1}, "--video must be 0"),
        ({"backbone": "pi05"}, "is a checkpoint of toy, not of pi05"),
    ],
)
def test_bad_flags(toy_world, flags, sentence):
    checkpoint, loaded = toy_world
    with pytest.raises(ev.Fault, match=re.escape(sentence)):
        ev.main(ev.Args(**({"checkpoint": str(checkpoint)} | flags)))
    assert not loaded and not (checkpoint / "eval").exists()  # refused before anything was done


@pytest.mark.parametrize("content", [None, "{}", "[1]", "{", "\xff"])
def test_args_json_that_names_no_backbone(toy_world, content):
    checkpoint, loaded = toy_world
    (checkpoint / "args.json").unlink()
    if content is not None:
        (checkpoint / "args.json").write_text(content, encoding="latin1")
    args = ev.Args(str(checkpoint), splits=("train",), num_episodes=2)
    with pytest.raises(ev.Fault, match="pass --backbone|is damaged"):
        ev.main(args)
    if content in (None, "{}"):  # not written by this repository: the flag helps
        args.backbone = "toy"
        ev.main(args)
        assert loaded == [("toy", str(checkpoint))]


def test_errors_of_the_policy_are_faults(toy_world):
    checkpoint, _ = toy_world
    (checkpoint / "args.json").write_text('{"backbone": "broken"}')
    with pytest.raises(ev.Fault, match="is cut short"):
        ev.main(ev.Args(str(checkpoint)))


def test_output_folder_that_cannot_be_written(toy_world):
    checkpoint, loaded = toy_world
    (checkpoint / "a_file").write_text("")
    with pytest.raises(ev.Fault, match="cannot write to .*a_file/eval.*: pass another --out"):
        ev.main(ev.Args(str(checkpoint), out=str(checkpoint / "a_file" / "eval")))
    assert not loaded


GOOD = json.dumps(make_records("train", [1])[0])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot read"),
        ("", "holds no episodes"),
        (GOOD + "\n{\n", "line 2, is not an episode record"),
        (GOOD + "\n\n", "line 2, is not an episode record"),
        ("[]\n", "line 1, is not an episode record"),
        ("7\n", "line 1, is not an episode record"),
        (GOOD.replace("success_once", "success"), "line 1, is not an episode record"),
        (GOOD.replace("true", "1"), "line 1, is not an episode record"),
        (GOOD.replace('"train"', "[]"), "line 1, is not an episode record"),
        (GOOD + "\n" + GOOD, "line 2, repeats"),
        ("\xff\xfe", "cannot read"),
    ],
)
def test_compare_with_a_bad_file(tmp_path, content, sentence):
    path = tmp_path / "episodes.jsonl"
    if content is not None:
        path.write_text(content, encoding="latin1")
    for given in (path, tmp_path):
        with pytest.raises(ev.Fault, match=sentence):
            ev.read_records(given)


def test_command_line(tmp_path):
    """The real command: one sentence on stderr, exit code 2, no traceback; and a comparison of two files."""
    lines = [json.dumps(r) for r in make_records("train", [1, 0, 1, 1])]
    (tmp_path / "episodes.jsonl").write_text("\n".join(lines) + "\n")
    bad = {
        "no/such/run does not exist": ["--checkpoint", "no/such/run"],
        "unknown split 'sunny'": ["--checkpoint", str(tmp_path), "--splits", "train", "sunny"],
    }
    good = ["--compare", str(tmp_path), str(tmp_path / "episodes.jsonl")]
    running = {  # all at once: each spends seconds on imports
        sentence: subprocess.Popen(
            [sys.executable, str(ROOT / "evaluate.py"), *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for sentence, flags in (bad | {"": good}).items()
    }
    for sentence, process in running.items():
        stdout, stderr = process.communicate(timeout=120)
        if sentence:
            assert process.returncode == 2, stderr
            assert stderr.splitlines()[-1].startswith("error: ") and sentence in stderr
            assert "Traceback" not in stderr and not stdout
        else:
            assert process.returncode == 0, stderr
            assert "| train | 75.0 | 75.0 | +0.0 [+0.0, +0.0] | 4 |" in stdout


class Watched:
    """A policy that keeps the robot states it was shown, to compare whole trajectories to the last bit."""

    def __init__(self, policy):
        self.policy, self.states = policy, []

    def act(self, obs, instructions, temperature):
        self.states.append(obs["state"].clone())
        return self.policy.act(obs, instructions, temperature)


def test_real_simulator_runs_the_same_episodes_twice():
    """An untrained policy in the real environments: another split in between leaves no trace."""
    from policies import load_policy

    torch.manual_seed(0)
    policy, ids = load_policy("openvla-tiny"), ev.eval_episode_ids(2)
    with ev.make_envs(2, image_size=policy.image_size) as envs:
        watched = [Watched(policy) for _ in range(3)]
        runs = [
            ev.evaluate(w, envs, s, ids, 0.6)
            for w, s in zip(watched, ("train", "pose", "train"), strict=True)
        ]
        assert (
            len(watched[0].states) * policy.chunk == envs.max_episode_steps == runs[0][0]["steps"]
        )
    states = [torch.stack(w.states) for w in watched]  # (decisions, N, 8)
    assert runs[0] == runs[2] and torch.equal(states[0], states[2])
    assert not torch.equal(states[0], states[1]) and not torch.equal(states[0][-1], states[0][0])
    assert [r["instruction"] for r in runs[0]] == [
        r["instruction"] for r in runs[1]
    ]  # one target per id in all splits
