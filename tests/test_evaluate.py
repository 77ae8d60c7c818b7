"""evaluate.py: the episode loop on a toy environment, records, files, command line, one run's table."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import evaluate as ev
import runtime

OOD = ["texture", "lighting", "pose", "clutter-2", "clutter-4", "clutter-6", "clutter-8"]


def ids(count, seed=0):
    return runtime.episode_ids("eval", seed, 0, count)


PROTOCOL = dict(backbone="toy", assets="builtin", sim="cpu", temperature=0.6, num_envs=16, horizon=1, replan=1, dtype="float32",
                denoise_steps=None, ablate="none", checkpoint="runs/a")  # fmt: skip


def make_records(split, outcomes, seed=0, at_end=None, **protocol):
    return [
        {
            "split": split,
            "episode_id": ids(len(outcomes), seed)[i],
            "seed": seed,
            "instruction": "put red cube on plate",
            "success_once": bool(outcome),
            "success_at_end": bool(outcome if at_end is None else at_end[i]),
            "steps": 20,
            "sum_reward": 1.2 * outcome,
        }
        | PROTOCOL
        | protocol
        for i, outcome in enumerate(map(int, outcomes))
    ]


def write_records(folder, records):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "episodes.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


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

    def reset(self, episode_ids, split="train", rebuild=False, view_seed=0):
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

    image_size, resize, horizon, dtype = 8, None, 1, torch.float32

    def __init__(self, chunk=2):
        self.chunk, self.config = chunk, {"num_denoise_steps": 4}

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


# ---- episodes


def test_last_batch_is_padded_and_the_padding_dropped():
    """With the first episodes again: so that no episode of a batch has only itself as another one."""
    envs, of_six = Toy(num_envs=4), list(ids(6))
    records = ev.play_episodes(Noisy(), envs, "train", of_six, temperature=0)
    assert envs.resets == [(of_six[:4], "train"), ([*of_six[4:], *of_six[:2]], "train")]
    assert [r["episode_id"] for r in records] == of_six
    assert [r["instruction"] for r in records] == [f"put object {i} on plate" for i in of_six]
    assert len(ev.play_episodes(Noisy(), Toy(4), "train", of_six[:1], temperature=0)) == 1


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_record_values(chunk):
    """At temperature 0 the toy policy acts +0.5 or -0.5 by the parity of (episode id + elapsed steps)."""
    records = ev.play_episodes(Noisy(chunk), Toy(2), "pose", ids(2), temperature=0, seed=3)
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
            r["sum_reward"] for r in ev.play_episodes(Noisy(), Toy(), split, ids(8), 1.0, seed=seed)
        ]

    assert returns() == returns(disturb=7)
    assert len(set(returns())) == 8  # each episode its own noise, in the second batch too
    assert returns() != returns(split="texture") and returns() != returns(seed=1)


def test_the_seed_is_the_same_in_every_process():
    assert ev.noise_seed(0, "clutter-4", 2) == 2593548335


def test_callers_random_state_does_not_move():
    torch.manual_seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    ev.play_episodes(Noisy(), Toy(), "train", ids(8), 1.0)
    ev.ood_table(make_records("train", [1, 0]))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_videos_carry_the_outcome_and_show_what_the_policy_saw(tmp_path):
    import imageio

    records = ev.play_episodes(
        Noisy(5), Toy(2), "clutter-4", ids(4), 0, video_dir=tmp_path, num_videos=3
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"clutter-4_100000000{i}_{'success' if records[i]['success_once'] else 'failure'}.mp4"
        for i in range(3)
    ]
    assert {r["success_once"] for r in records} == {True, False}
    frames = np.stack(imageio.mimread(tmp_path / "clutter-4_1000000001_success.mp4"))
    assert frames.shape == (2, 32, 32, 3)  # before the one chunk and after it; 8 pixels x 4
    assert np.abs(frames.mean((1, 2, 3)) - [1, 6]).max() < 4  # the toy paints id % 100 + elapsed


# ---- ablations


class Looks(Noisy):
    """Keeps what it is shown and told."""

    def __init__(self):
        super().__init__(chunk=5)
        self.seen = []

    def act(self, obs, instructions, temperature=1.0):
        self.seen.append((obs["rgb"].clone(), list(instructions)))
        return super().act(obs, instructions, temperature)


def play_ablated(ablate, count=4, num_envs=4):
    policy = Looks()
    records = ev.play_episodes(policy, Toy(num_envs), "pose", ids(count), 1.0, 0, ablate)
    return policy.seen, records


def test_ablate_replaces_one_input_and_nothing_else():
    ((rgb, said),), records = play_ablated("none")
    assert rgb[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    for ablate in ("black", "noise", "other-frame", "other-instruction"):
        ((shown, told),), of_ablated = play_ablated(ablate)
        # The same episodes with the same noise: this policy does not look, so all outcomes are the same.
        assert of_ablated == records, ablate
        assert torch.equal(shown, rgb) == (ablate == "other-instruction")
        assert (told == said) == (ablate != "other-instruction")
        if ablate == "black":
            assert shown.max() == 0
        if ablate == "noise":
            assert shown.shape == rgb.shape and shown.dtype == torch.uint8
            assert shown.min() < 20 and shown.max() > 235
            assert torch.equal(shown, play_ablated(ablate)[0][0][0])  # the same noise again
        if ablate == "other-frame":
            assert shown[:, 0, 0, 0].tolist() == [3, 0, 1, 2]
        if ablate == "other-instruction":
            assert sorted(told) == sorted(said) and all(
                a != b for a, b in zip(told, said, strict=True)
            )


def test_ablate_takes_another_episode_in_the_last_batch_too():
    for ablate, item in (("other-frame", 0), ("other-instruction", 1)):
        seen, _ = play_ablated(ablate, count=5, num_envs=4)
        plain, _ = play_ablated("none", count=5, num_envs=4)
        first, own = seen[1][item][0], plain[1][item][0]  # the one episode of the second batch
        assert not torch.equal(first, own) if item == 0 else first != own


def test_other_instruction_is_another_sentence():
    """Two episodes may have the same target."""
    said = ["a", "a", "b", "b", "a"]
    told = ev.ablated({"rgb": torch.zeros(5)}, said, "other-instruction", None)[1]
    assert told == ["b", "b", "a", "a", "b"]
    with pytest.raises(ev.Fault, match="one instruction only: use more --num-envs"):
        ev.ablated({"rgb": torch.zeros(2)}, ["a", "a"], "other-instruction", None)


def test_videos_show_the_ablated_picture(tmp_path):
    import imageio

    ev.play_episodes(
        Noisy(5), Toy(2), "pose", ids(2), 0, 0, "noise", video_dir=tmp_path, num_videos=1
    )
    (video,) = tmp_path.iterdir()
    assert np.stack(imageio.mimread(video))[0].std() > 40


# ---- files and the command line


@pytest.fixture
def toy_world(tmp_path, monkeypatch):
    """A checkpoint directory, and a policy and environments that need no simulator."""
    loaded = []

    def load_policy(backbone, checkpoint, device, **settings):
        loaded.append((backbone, checkpoint, settings))
        if backbone == "broken":
            raise ev.Fault("model.safetensors is cut short: copy it again")
        return Noisy()

    monkeypatch.setattr(ev, "load_policy", load_policy)
    monkeypatch.setattr(ev, "make_envs", lambda num_envs, *_, **__: Toy(num_envs))
    (tmp_path / "args.json").write_text(json.dumps({"backbone": "toy", "assets": "builtin"}))
    return tmp_path, loaded


def test_main_writes_records_table_and_videos(toy_world, capsys):
    checkpoint, loaded = toy_world
    args = ev.Args(
        str(checkpoint), splits=("train", "pose"), num_episodes=6, num_envs=4, seeds=(0, 1), video=1
    )
    ev.main(args)
    assert [of[:2] for of in loaded] == [("toy", str(checkpoint))]
    records = ev.read_records(checkpoint)  # a checkpoint
    assert records == ev.read_records(checkpoint / "eval")  # or a directory
    assert records == ev.read_records(checkpoint / "eval" / "episodes.jsonl")  # or the file
    assert [(r["split"], r["seed"]) for r in records] == [
        (s, k) for s in ("train", "pose") for k in (0, 1) for _ in range(6)
    ]
    assert [r["episode_id"] for r in records[:12]] == [*ids(6, 0), *ids(6, 1)]
    protocol = dict(
        backbone="toy",
        assets="builtin",
        sim="cpu",
        temperature=0.6,
        num_envs=4,
        horizon=1,
        replan=2,
        denoise_steps=4,
        steps=5,
        dtype="float32",
        ablate="none",
        checkpoint=str(checkpoint),
    )
    assert set(protocol) == {*ev.PROTOCOL, "checkpoint"}
    expected = ev.play_episodes(Noisy(), Toy(4), "pose", ids(6, 1), 0.6, seed=1)
    assert records[18:] == [record | protocol for record in expected]
    table = (checkpoint / "eval" / "table.md").read_text()
    assert table.startswith(ev.ood_table(records)) and "seeds 0 1" in table
    assert all(
        f"{name} {value}" in table for name, value in protocol.items() if name != "checkpoint"
    )
    assert ev.ood_table(records) in capsys.readouterr().out
    assert sorted(p.name[:16] for p in (checkpoint / "eval/videos").iterdir()) == [
        "pose_1000000000_",
        "train_1000000000",
    ]
    first = (checkpoint / "eval/episodes.jsonl").read_bytes()
    ev.main(args)
    assert (checkpoint / "eval/episodes.jsonl").read_bytes() == first
    ev.main(ev.Args(compare=(str(checkpoint / "eval"), str(checkpoint))))
    printed = capsys.readouterr().out
    assert printed.count("+0.0 [+0.0, +0.0] | 24 |") == 2
    assert "success_once" in printed and "success_at_end" in printed


def test_lerobot_eval_info(toy_world):
    """The keys that LeRobot's own eval_info.json has, with the numbers of episodes.jsonl."""
    checkpoint, _ = toy_world
    ev.main(
        ev.Args(str(checkpoint), splits=("train", "pose"), num_episodes=6, num_envs=4, seeds=(0, 1))
    )
    info = json.loads((checkpoint / "eval/eval_info.json").read_text())
    records = ev.read_records(checkpoint)
    assert set(info) == {"per_task", "per_group", "overall"}
    assert set(info["per_group"]) == {"train", "pose"}
    keys = {"n_episodes", "n_success", "pc_success", "pc_success_ci95", "avg_sum_reward"}
    assert set(info["overall"]) == set(info["per_group"]["pose"]) == keys
    k, n = sum(r["success_once"] for r in records), len(records)
    assert 0 < k < n == 24
    low, high = (100 * bound for bound in ev.wilson(k, n))
    assert info["overall"]["pc_success"] == pytest.approx(100 * k / n)
    assert info["overall"]["pc_success_ci95"] == pytest.approx([low, high])
    assert (info["overall"]["n_success"], info["overall"]["n_episodes"]) == (k, n)
    assert [(t["task_group"], t["task_id"]) for t in info["per_task"]] == [
        ("train", 0),
        ("train", 1),
        ("pose", 0),
        ("pose", 1),
    ]
    last = info["per_task"][-1]
    assert last["metrics"]["successes"] == [r["success_once"] for r in records[18:]]
    assert last["n_success"] == sum(last["metrics"]["successes"]) and last["n_episodes"] == 6


def test_a_second_evaluation_adds_splits_and_replaces_its_own(toy_world):
    checkpoint, _ = toy_world
    common = dict(checkpoint=str(checkpoint), num_envs=2)
    ev.main(ev.Args(**common, splits=("train", "pose"), num_episodes=4))
    before = ev.read_records(checkpoint)
    ev.main(ev.Args(**common, splits=("texture",), num_episodes=4))
    both = ev.read_records(checkpoint)
    assert both[:8] == before and [r["split"] for r in both[8:]] == ["texture"] * 4
    table, info = (
        (checkpoint / "eval" / name).read_text() for name in ("table.md", "eval_info.json")
    )
    assert all(
        f"| {split} |" in table and f'"{split}"' in info for split in ("train", "pose", "texture")
    )
    ev.main(ev.Args(**common, splits=("pose",), num_episodes=2, seeds=(3,)))
    after = ev.read_records(checkpoint)
    assert [(r["split"], r["seed"]) for r in after] == [("train", 0)] * 4 + [("texture", 0)] * 4 + [
        ("pose", 3)
    ] * 2


def test_another_protocol_is_not_mixed_into_a_folder(toy_world):
    checkpoint, _ = toy_world
    common = dict(checkpoint=str(checkpoint), num_episodes=4)
    ev.main(ev.Args(**common, splits=("train", "pose")))
    first = (checkpoint / "eval/episodes.jsonl").read_bytes()
    with pytest.raises(ev.Fault, match=r"temperature is 0.6, not 1: pass another --out"):
        ev.main(ev.Args(**common, splits=("pose",), temperature=1))
    with pytest.raises(ev.Fault, match=r"num_envs is 4, not 2"):
        ev.main(ev.Args(**common, splits=("texture",), num_envs=2))
    assert (checkpoint / "eval/episodes.jsonl").read_bytes() == first
    ev.main(ev.Args(**common, splits=("train", "pose"), temperature=1))  # replaces all there is
    assert {r["temperature"] for r in ev.read_records(checkpoint)} == {1}


def test_ablated_episodes_have_a_folder_and_a_comparison_of_their_own(toy_world, capsys):
    checkpoint, _ = toy_world
    common = dict(checkpoint=str(checkpoint), splits=("train",), num_episodes=4, num_envs=2)
    ev.main(ev.Args(**common))
    plain = (checkpoint / "eval/episodes.jsonl").read_bytes()
    ev.main(ev.Args(**common, ablate="black"))
    assert (checkpoint / "eval/episodes.jsonl").read_bytes() == plain
    assert {r["ablate"] for r in ev.read_records(checkpoint / "eval-black")} == {"black"}
    hint = re.search("--compare (.*) (.*)", capsys.readouterr().out)
    ev.main(ev.Args(compare=hint.groups()))
    assert "+0.0 [+0.0, +0.0] | 4 |" in capsys.readouterr().out


def test_a_run_directory_means_its_newest_whole_checkpoint(toy_world, capsys):
    run, loaded = toy_world
    for number in (1, 2, 3):
        with runtime.whole_directory(run / f"checkpoint-{number:06d}") as directory:
            (directory / "args.json").write_text('{"backbone": "toy", "assets": "builtin"}')
    (run / "checkpoint-000003/args.json").write_text("{")
    ev.main(ev.Args(str(run), splits=("train",), num_episodes=2))
    newest = run / "checkpoint-000002"
    assert loaded[0][1] == str(newest) and "is damaged" in capsys.readouterr().err
    assert {r["checkpoint"] for r in ev.read_records(newest)} == {str(newest)}
    assert ev.read_records(run) == ev.read_records(newest)  # --compare takes a run, too


def test_flags_of_the_policy_reach_it(toy_world):
    """Those of ppo_pair.py. The dtype that the checkpoint was trained with is the default."""
    checkpoint, loaded = toy_world
    flags = "--unnorm-key mine --tokenizer t.json --base elsewhere --replan 3 --splits train --num-episodes 2"
    ev.main(ev.tyro.cli(ev.Args, args=["--checkpoint", str(checkpoint), *flags.split()]))
    settings = loaded[0][2]
    assert [settings[name] for name in ("unnorm_key", "tokenizer", "base", "replan")] == [
        "mine",
        "t.json",
        "elsewhere",
        3,
    ]
    assert settings["dtype"] == "auto"
    saved = {"backbone": "toy", "assets": "builtin", "dtype": "bfloat16"}
    (checkpoint / "args.json").write_text(json.dumps(saved))
    ev.main(ev.Args(str(checkpoint), splits=("train",), num_episodes=2))
    assert loaded[-1][2]["dtype"] == "bfloat16"


def test_a_checkpoint_on_the_hub(toy_world, monkeypatch):
    folder, loaded = toy_world
    monkeypatch.chdir(folder)
    with pytest.raises(ev.Fault, match="owner/name does not exist.* needs --backbone"):
        ev.main(ev.Args("owner/name", splits=("train",), num_episodes=2))
    hub = dict(checkpoint="owner/name", backbone="toy", splits=("train",), num_episodes=2)
    with pytest.raises(ev.Fault, match="names no asset pack: pass --assets"):
        ev.main(ev.Args(**hub))
    ev.main(ev.Args(**hub, assets="builtin"))
    assert loaded[0][:2] == ("toy", "owner/name")
    (record, _) = ev.read_records(folder / "runs/owner_name/eval")
    assert (record["checkpoint"], record["assets"]) == ("owner/name", "builtin")


def test_interrupt_keeps_the_finished_splits(toy_world, monkeypatch):
    checkpoint, _ = toy_world

    def reset(self, ids, split, rebuild):
        if split == "pose":
            raise KeyboardInterrupt
        return Toy.reset(self, ids, split, rebuild)

    envs = type("Interrupted", (Toy,), {"reset": reset})(4)
    monkeypatch.setattr(ev, "make_envs", lambda *_, **__: envs)
    with pytest.raises(KeyboardInterrupt):
        ev.main(ev.Args(str(checkpoint), splits=("train", "pose"), num_episodes=4))
    assert len(ev.read_records(checkpoint / "eval")) == 4


def test_an_interrupt_leaves_no_mixture_of_protocols(toy_world, monkeypatch):
    checkpoint, _ = toy_world
    common = dict(checkpoint=str(checkpoint), splits=("train", "pose"), num_episodes=4)
    ev.main(ev.Args(**common))

    def reset(self, ids, split, rebuild):
        if split == "pose":
            raise KeyboardInterrupt
        return Toy.reset(self, ids, split, rebuild)

    envs = type("Interrupted", (Toy,), {"reset": reset})(4)
    monkeypatch.setattr(ev, "make_envs", lambda *_, **__: envs)
    with pytest.raises(KeyboardInterrupt):  # the same protocol: the old episodes of pose stay
        ev.main(ev.Args(**common))
    assert [r["split"] for r in ev.read_records(checkpoint)] == ["pose"] * 4 + ["train"] * 4
    with pytest.raises(KeyboardInterrupt):
        ev.main(ev.Args(**common, temperature=1.0))
    assert [r["split"] for r in ev.read_records(checkpoint)] == ["train"] * 4


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"checkpoint": ""}, "nothing to evaluate: pass --checkpoint DIR"),
        ({"checkpoint": "/no/such/run"}, "checkpoint directory /no/such/run does not exist"),
        ({"splits": ("train", "textures")}, "unknown split 'textures'"),
        ({"splits": ()}, "--splits needs at least one"),
        ({"splits": ("pose", "pose")}, "--splits needs at least one split and none twice"),
        ({"seeds": (1, 1)}, "--seeds needs at least one seed and none twice"),
        ({"seeds": (-1,)}, "the seed -1 is out of range"),
        ({"seeds": (2**31,)}, "the seed 2147483648 is out of range"),
        ({"num_episodes": 0}, "--num-episodes is 0: it must be at least 1"),
        ({"num_episodes": 1_000_001}, "1000001 episodes for 'eval' are too many"),
        ({"num_envs": 0}, "--num-envs is 0: it must be at least 1"),
        ({"temperature": -0.5}, "--temperature is -0.5: it must be 0 or more"),
        ({"temperature": float("nan")}, "--temperature is nan: it must be 0 or more"),
        ({"video": -1}, "--video is -1: it must be 0 or more"),
        ({"backbone": "pi05"}, "is a checkpoint of toy, not of pi05"),
        (
            {"ablate": "other-frame", "num_envs": 1},
            "--ablate other-frame needs at least 2 --num-envs",
        ),
        (
            {"ablate": "other-instruction", "num_episodes": 1},
            "--ablate other-instruction needs at least 2",
        ),
        ({"compare": ("runs/a",)}, "--compare needs at least two arms"),
        ({"compare": ("A=x", "A=y")}, "'A=y' is no arm"),
        ({"compare": ("A=x,x", "B=y")}, "'A=x,x' is no arm"),
        ({"compare": ("A=", "B=y")}, "'A=' is no arm"),
        ({"plan": 0.0}, "--plan needs a difference above 0"),
        ({"plan": float("nan")}, "--plan needs a difference above 0"),
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
    with pytest.raises(ev.Fault, match="pass --backbone|not a JSON object|cannot be read"):
        ev.main(args)
    if content in (None, "{}"):  # not written by this repository: the flags help
        args.backbone = "toy"
        with pytest.raises(ev.Fault, match="names no asset pack: pass --assets"):
            ev.main(args)
        args.assets = "builtin"
        ev.main(args)
        assert loaded[0][:2] == ("toy", str(checkpoint))


def test_errors_of_the_policy_are_faults(toy_world):
    checkpoint, _ = toy_world
    (checkpoint / "args.json").write_text('{"backbone": "broken", "assets": "builtin"}')
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
        (GOOD.replace("temperature", "heat"), "line 1, is no whole record, it lacks temperature: "
         "delete the file and evaluate again"),
        (GOOD + "\n" + GOOD.replace("0.6", "1.0"), "line 2: temperature is 1.0, 0.6 in line 1"),
        (GOOD + "\n" + GOOD.replace("runs/a", "runs/b"), "line 2: checkpoint is runs/b, runs/a in line 1"),
        ("\xff\xfe", "cannot read"),
    ],
)  # fmt: skip
def test_compare_with_a_bad_file(tmp_path, content, sentence):
    path = tmp_path / "episodes.jsonl"
    if content is not None:
        path.write_text(content, encoding="latin1")
    for given in (path, tmp_path):
        with pytest.raises(ev.Fault, match=sentence):
            ev.read_records(given)


CHANGED = dict(
    backbone="pi05",
    assets="rl4vla",
    sim="cuda",
    temperature=1.0,
    num_envs=8,
    horizon=8,
    replan=5,
    denoise_steps=10,
    steps=80,
    dtype="bfloat16",
    ablate="black",
)


@pytest.mark.parametrize("name", ev.PROTOCOL)
def test_compare_refuses_another_protocol_by_name(tmp_path, name):
    a = write_records(tmp_path / "a", make_records("train", [1, 0]))
    changed = {name: CHANGED[name], "checkpoint": "runs/b"}
    b = write_records(tmp_path / "b", make_records("train", [1, 1], **changed))
    sentence = (
        rf"^{name} is .* for runs/a and {CHANGED[name]} for runs/b: evaluate both in the same way"
    )
    for arms in ((a, b), (f"X={a}", f"Y={b},{a}"), (f"X={a},{b}", f"Y={a}")):
        with pytest.raises(
            ev.Fault,
            match=sentence.replace("runs/a and", "runs/. and").replace("for runs/b", "for runs/.")
            if "X" in str(arms[0])
            else sentence,
        ):
            ev.main(ev.Args(compare=tuple(map(str, arms))))


def test_an_ablation_is_compared_with_its_own_checkpoint_alone(tmp_path, capsys):
    a = write_records(tmp_path / "a", make_records("train", [1, 1]))
    black = write_records(tmp_path / "black", make_records("train", [0, 1], ablate="black"))
    ev.main(ev.Args(compare=(str(a), str(black))))
    assert "| train | 100.0 | 50.0 | -50.0 [" in capsys.readouterr().out
    other = write_records(tmp_path / "b", make_records("train", [0, 1], checkpoint="runs/b"))
    with pytest.raises(ev.Fault, match="^ablate is"):
        ev.main(ev.Args(compare=(str(other), str(black))))
    with pytest.raises(ev.Fault, match="^ablate is"):  # within an arm
        ev.main(ev.Args(compare=(f"A={a},{black}", f"B={a}")))


def test_command_line(tmp_path):
    """The real command: one sentence on stderr, exit code 2, no traceback; and a comparison of two files."""
    write_records(tmp_path, make_records("train", [1, 0, 1, 1], at_end=[1, 0, 0, 0]))
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
            assert "| train | 25.0 | 25.0 | +0.0 [+0.0, +0.0] | 4 |" in stdout


def test_no_table_for_a_policy_with_a_nan_weight(tmp_path, capsys):
    """load_policy refuses it, and the command ends with 2."""
    from policies import load_policy

    torch.manual_seed(0)
    policy = load_policy("openvla-tiny")
    with torch.no_grad():
        next(policy.language_model.parameters()).view(-1)[5] = float("nan")
    policy.save(tmp_path)
    (tmp_path / "args.json").write_text('{"backbone": "openvla-tiny", "assets": "builtin"}')
    args = ev.Args(str(tmp_path), splits=("train",), num_episodes=2)
    with pytest.raises(SystemExit) as stop:
        runtime.command_line(lambda: ev.main(args))
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1].startswith("error: ") and "NaN" in printed.err
    assert not printed.out and not (tmp_path / "eval" / "table.md").exists()


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
    policy = load_policy("openvla-tiny")
    with ev.make_envs(2, image_size=policy.image_size) as envs:
        watched = [Watched(policy) for _ in range(3)]
        runs = [
            ev.play_episodes(w, envs, s, ids(2), 0.6)
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
