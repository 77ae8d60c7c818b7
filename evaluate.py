"""Evaluate a checkpoint on the training split and the out-of-distribution (OOD) splits.

    python evaluate.py --checkpoint runs/pair                               # its newest checkpoint
    python evaluate.py --checkpoint runs/pair --splits train clutter-8 --video 4 --out runs/look
    python evaluate.py --checkpoint OWNER/NAME --backbone openvla --assets rl4vla  # from the Hub
    torchrun --nproc-per-node 8 evaluate.py --checkpoint runs/pair          # the same files, sooner
    python evaluate.py --checkpoint runs/pair --ablate black                # does it use its eyes?
    python evaluate.py --compare runs/ppo runs/pair                         # B - A, paired
    python evaluate.py --compare PPO=runs/ppo_1,runs/ppo_2 PAIR=runs/pair_1,runs/pair_2
    python evaluate.py --plan 9.1                                           # seeds and episodes
    python tools/tables.py PPO=runs/ppo_1,runs/ppo_2 PAIR=runs/pair_1,runs/pair_2  # Tables 1 and 2

Writes into `<checkpoint>/eval`, or `--out`: `episodes.jsonl` (one JSON object per episode, with the
protocol it was played under), `table.md`, and `eval_info.json` with LeRobot's keys. A second
evaluation into the same folder replaces the splits that it plays and keeps the others.

* success_once: the task was solved at some step of the episode (RLinf's metric, the headline).
  success_at_end: it is solved at the last step (RL4VLA's). Every table has both.
* An episode is a pure function of (split, episode id): two checkpoints meet the same scenes and are
  compared in pairs. The noise depends on (seed, split, batch) alone: the same checkpoint, flags and
  machine give the same file again.
* Actions are sampled at temperature 0.6, as RL4VLA and RLinf do (`--temperature 0` is argmax).
* OOD average: as Table 1, the mean over kinds of shift, where clutter is the mean over its levels.
  A camera counts as OOD from above 20 degrees on (Section 5.5).
"""

import functools
import json
import math
import re
import tempfile
import zlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import tyro
from tqdm import tqdm

import runtime
from envs import SPLITS, choose_sim, find_pack, make_envs, parse_split
from policies import PolicyArgs, load_policy
from runtime import Fault, episode_ids, read_json, write_text

METRICS = ("success_once", "success_at_end")
# What must be equal for two records to be comparable.
PROTOCOL = ("backbone", "assets", "sim", "temperature", "num_envs", "horizon", "replan",
            "denoise_steps", "steps", "dtype", "ablate")  # fmt: skip
RECORDED = (*PROTOCOL, "checkpoint")
TRAINING_CAMERAS = 20  # degrees: Section 5.5 trains on 0 to 20 and tests up to 28


@dataclass
class Args:
    checkpoint: str = ""
    """a checkpoint, a run directory (its newest whole checkpoint), or OWNER/NAME[@REVISION] on the
    Hub (required, except with --compare and --plan)"""
    backbone: str = ""
    """the policy class; needed only if the checkpoint has no args.json that names it"""
    policy: tyro.conf.OmitArgPrefixes[PolicyArgs] = field(default_factory=PolicyArgs)
    splits: tuple[str, ...] = tuple(SPLITS)
    """train and the OOD splits of Appendix B, and camera+N or camera-N (Section 5.5)"""
    num_episodes: int = 128
    """episodes per split and seed (the paper: 128 for OpenVLA; its pi0.5 numbers fit 160)"""
    seeds: tuple[int, ...] = (0,)
    """each seed evaluates its own fixed range of episodes with its own sampling noise"""
    temperature: float = 0.6
    """sampling temperature of action tokens, 0 is argmax; pi0, pi05: 0 denoises zeros, any other
    number Gaussian noise"""
    num_envs: int = 16
    """environments that run side by side (part of the sampling noise)"""
    assets: str = ""
    """asset pack (default: the one in the checkpoint's args.json)"""
    out: str = ""
    """output directory (default: <checkpoint>/eval, with --ablate black <checkpoint>/eval-black)"""
    video: int = 0
    """number of mp4s per split, of its first episodes, with the outcome in the file name"""
    ablate: Literal["none", "black", "noise", "other-frame", "other-instruction"] = "none"
    """replace an input: the picture by black, by noise or by another episode's of the same batch,
    or the instruction by another's. A policy that scores as well does not use that input"""
    sim: Literal["cpu", "cuda", "auto"] = "cpu"
    """physics, as for ppo_pair.py"""
    cuda: bool = True
    """the policy runs on the GPU where there is one"""
    compare: tuple[str, ...] | None = None
    """two or more arms, each RUN or NAME=RUN,RUN,...: how the others differ from the first"""
    plan: float | None = None
    """POINTS: prints how many seeds and episodes it takes to see a difference of that size"""


RANGES = {"at least 1": "num_episodes num_envs", "0 or more": "temperature video"}


# ----------------------------------------------------------------------------- playing episodes
def noise_seed(seed: int, split: str, batch: int) -> int:
    """crc32, because Python's hash of a str changes with every process."""
    return zlib.crc32(f"{seed}/{split}/{batch}".encode())


def ablated(obs: dict, instructions: list[str], ablate: str, noise: torch.Generator):
    """What the policy gets to see and read instead of obs and instructions."""
    rgb = obs["rgb"]
    if ablate == "black":
        rgb = torch.zeros_like(rgb)
    elif ablate == "noise":
        rgb = torch.randint(256, rgb.shape, generator=noise, dtype=torch.uint8).to(rgb.device)
    elif ablate == "other-frame":
        rgb = rgb.roll(1, 0)
    elif ablate == "other-instruction":
        n = len(instructions)
        if len(set(instructions)) == 1:
            raise Fault(f"a batch of {n} episodes has one instruction only: use more --num-envs")
        following = [[instructions[(i + k) % n] for k in range(n)] for i in range(n)]
        instructions = [next(other for other in row if other != row[0]) for row in following]
    return {**obs, "rgb": rgb}, instructions


@torch.no_grad()
def play_episodes(
    policy,
    envs,
    split,
    episode_ids,
    temperature,
    seed=0,
    ablate="none",
    video_dir=None,
    num_videos=0,
    bar=None,
):
    """Play each episode once -> one record per episode, in the order of `episode_ids`.

    bar: a tqdm that counts episodes. Of several ranks each plays its share of the batches; together
    their records are those of one. The caller's random state is the same afterwards.
    """
    records, n = [], envs.num_envs
    for batch, first in enumerate(range(0, len(episode_ids), n)):
        if batch % runtime.WORLD != runtime.RANK:
            continue
        # All environments step together: the last batch is filled up from the start of the list,
        # and the records of those episodes are dropped.
        ids = list(episode_ids[first : first + n])
        padded = [episode_ids[(first + i) % len(episode_ids)] for i in range(n)]
        num_filmed = max(0, min(len(ids), num_videos - first))
        frames = []  # (num_filmed, H, W, 3) for each instant at which the policy looked
        steps = 0  # env steps
        noise = torch.Generator().manual_seed(noise_seed(seed, split, batch))  # of --ablate noise
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(noise_seed(seed, split, batch))
            obs = envs.reset(padded, split, rebuild=True)
            instructions = list(envs.instructions)
            while steps < envs.max_episode_steps:
                seen, read = ablated(obs, instructions, ablate, noise)
                frames.append(seen["rgb"][:num_filmed].cpu().numpy().copy())
                actions = policy.act(seen, read, temperature).actions  # (N, chunk, 7)
                obs, _, done, info = envs.step(actions)
                steps = min(steps + actions.shape[1], envs.max_episode_steps)
            frames.append(obs["rgb"][:num_filmed].cpu().numpy().copy())
        assert done.all(), "every episode ends at max_episode_steps"

        for i, episode_id in enumerate(ids):
            record = {
                "split": split,
                "episode_id": int(episode_id),
                "seed": seed,
                "instruction": instructions[i],
                "success_once": bool(info["success_once"][i]),
                "success_at_end": bool(info["success"][i]),
                "steps": steps,
                "sum_reward": float(info["episode_return"][i]),  # under LeRobot's name
            }
            records.append(record)
            if i < num_filmed:
                outcome = "success" if record["success_once"] else "failure"
                file = video_dir / f"{split}_{episode_id}_{outcome}.mp4"
                with runtime.writing_to(file):
                    write_video(file, [frame[i] for frame in frames])
        if bar is not None:
            successes = sum(record["success_once"] for record in records)
            bar.set_postfix_str(f"{split}: success {successes}/{len(records)}", refresh=False)
            bar.update(len(ids))
    return records


def write_video(path: Path, frames: Sequence[np.ndarray]):
    """mp4 of what the policy saw: frames (H, W, 3) uint8, each pixel drawn as 4 x 4."""
    import imageio

    frames = [frame.repeat(4, axis=0).repeat(4, axis=1) for frame in frames]
    imageio.mimwrite(path, frames, fps=5, macro_block_size=2)  # 2: H.264 needs even sides


# ------------------------------------------------------------------------------------- records
KINDS = {
    "split": str,
    "episode_id": int,
    "seed": int,
    "instruction": str,
    "success_once": bool,
    "success_at_end": bool,
    "sum_reward": float,
}


def find_records(path: str | Path) -> Path:
    """The episodes.jsonl of a file, its directory, a checkpoint, or a run's newest checkpoint."""
    path = Path(path)
    if not path.is_dir():
        return path
    if runtime.checkpoints(path) and not (path / "episodes.jsonl").exists():
        path = runtime.newest_checkpoint(path)
    inside = path / "eval" / "episodes.jsonl"
    return inside if inside.exists() else path / "episodes.jsonl"


def read_records(path: str | Path) -> list[dict]:
    """The records of one run, see find_records."""
    path, records = find_records(path), {}
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Fault(f"cannot read {path} ({error}): evaluate first, or name another run") from None
    for i, line in enumerate(lines, start=1):
        again = "delete the file and evaluate again"
        try:
            record = json.loads(line)
            key = record["split"], record["episode_id"], record["seed"]
            assert all(type(record[name]) is kind for name, kind in KINDS.items())
        except (ValueError, KeyError, TypeError, AssertionError):
            raise Fault(f"{path}, line {i}, is not an episode record: {again}") from None
        first = next(iter(records.values()), record)
        for name in RECORDED:
            if name not in record:
                raise Fault(f"{path}, line {i}, is no whole record, it lacks {name}: {again}")
            if (here := record[name]) != (there := first[name]):
                raise Fault(f"{path}, line {i}: {name} is {here}, {there} in line 1: {again}")
        if key in records:
            raise Fault(f"{path}, line {i}, repeats episode {key[1]} of {key[0]}: {again}")
        records[key] = record
    if not records:
        raise Fault(f"{path} holds no episodes: evaluate again")
    return list(records.values())


def check_protocol(arms: dict[str, Sequence[Sequence[dict]]]):
    """Refuse arms of runs that were not evaluated in the same way.

    `ablate` may differ between arms where all are of the same checkpoints.
    """
    firsts = [[run[0] for run in runs] for runs in arms.values()]  # a record of each run
    checkpoints = [{record["checkpoint"] for record in of_arm} for of_arm in firsts]
    same = checkpoints.count(checkpoints[0]) == len(arms)
    for of_arm in firsts:
        expected = firsts[0][0] | ({"ablate": of_arm[0]["ablate"]} if same else {})
        for record in of_arm:
            for name in PROTOCOL:
                if record[name] != expected[name]:
                    raise Fault(
                        f"{name} is {expected[name]} for {expected['checkpoint']} and "
                        f"{record[name]} for {record['checkpoint']}: evaluate both in the same way "
                        "to compare them"
                    )


def lerobot_info(records: Sequence[dict]) -> dict:
    """The content of LeRobot's eval_info.json: a group is a split, a task of it is a seed."""

    def summary(records):
        k, n = sum(record["success_once"] for record in records), len(records)
        return {
            "n_episodes": n,
            "n_success": k,
            "pc_success": 100 * k / n,
            "pc_success_ci95": [100 * bound for bound in wilson(k, n)],
            "avg_sum_reward": sum(record["sum_reward"] for record in records) / n,
        }

    tasks, groups = {}, {}
    for record in records:
        tasks.setdefault((record["split"], record["seed"]), []).append(record)
        groups.setdefault(record["split"], []).append(record)
    per_task = []
    for (split, seed), of_task in tasks.items():
        metrics = {
            "sum_rewards": [record["sum_reward"] for record in of_task],
            "successes": [record["success_once"] for record in of_task],
        }
        about = {"task_group": split, "task_id": seed, "metrics": metrics}
        per_task.append(about | summary(of_task))
    per_group = {split: summary(group) for split, group in groups.items()}
    return {"per_task": per_task, "per_group": per_group, "overall": summary(records)}


def write_results(out: Path, records: Sequence[dict]) -> str:
    """episodes.jsonl, eval_info.json and table.md -> the text of table.md."""
    write_text(out / "episodes.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    write_text(out / "eval_info.json", json.dumps(lerobot_info(records), indent=2) + "\n")
    first = records[0]
    protocol = ", ".join(f"{name} {first[name]}" for name in PROTOCOL)
    seeds = " ".join(map(str, sorted({record["seed"] for record in records})))
    table = f"{ood_table(records)}\n\n{first['checkpoint']}: {protocol}, seeds {seeds}."
    write_text(out / "table.md", table + " Intervals: 95 %.\n")
    return table


# ---------------------------------------------------------------------------------- statistics
def wilson(k: float, n: int) -> tuple[float, float]:
    """Wilson's score interval of a success rate: every p with (k/n - p)^2 <= z^2 p (1 - p) / n.

    Unlike k/n +- z sqrt(...), it stays inside [0, 1] and has a length even at 0 of n and n of n.
    """
    if not 0 <= k <= n or n == 0:
        raise ValueError(f"wilson needs 0 <= k <= n and n >= 1, got k={k}, n={n}")
    z = 1.96  # 95 %
    center = (k / n + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(k / n * (1 - k / n) / n + z**2 / (4 * n**2))
    return max(0.0, center - half), min(1.0, center + half)


def shift_of(split: str) -> str:
    """clutter-4 -> clutter, camera+24 -> camera: a kind of shift counts once in the OOD average."""
    return re.split("[+-]", split)[0]


def is_ood(split: str) -> bool:
    if shift_of(split) == "camera":  # one turned camera, beyond those of training
        cameras = parse_split(split).cameras
        return len(cameras) == 1 and abs(cameras[0]) > TRAINING_CAMERAS
    return split in SPLITS and split != "train"


def ood_weights(splits: Sequence[str]) -> dict[str, float]:
    """Weight of each split in the OOD average (Table 1: clutter is averaged over its levels)."""
    ood = list(filter(is_ood, splits))
    kinds = [shift_of(split) for split in ood]
    return {split: 1 / len(set(kinds)) / kinds.count(shift_of(split)) for split in ood}


@dataclass
class Outcomes:
    """The outcomes of several arms of several runs over the same E episodes and S splits."""

    splits: list[str]
    present: np.ndarray
    """(E, S): whether the episode was played in that split"""
    instructions: np.ndarray
    """(E, S) of str"""
    success: dict[str, dict[str, np.ndarray]]
    """of each metric and arm: (R, E, S), one layer for each of its R runs"""


def align(arms: dict[str, Sequence[Sequence[dict]]]) -> Outcomes:
    """The records of each run of each arm, side by side. Refuses runs that cannot be compared."""
    check_protocol(arms)
    keyed = {
        name: [{(r["split"], r["episode_id"], r["seed"]): r for r in run} for run in runs]
        for name, runs in arms.items()
    }
    (first_arm, (first, *_)), *_ = keyed.items()
    for name, runs in keyed.items():
        for number, run in enumerate(runs, start=1):
            if unmatched := sorted(first.keys() ^ run.keys()):
                split, episode_id, seed = unmatched[0]
                raise Fault(
                    f"{len(unmatched)} episodes are in only one of {first_arm} (run 1) and {name} "
                    f"(run {number}); the first: {split}, episode {episode_id}, seed {seed}: "
                    "evaluate both with the same --splits, --num-episodes and --seeds"
                )
    splits = list(dict.fromkeys(key[0] for key in first))
    rows = {episode: i for i, episode in enumerate(sorted({key[1:] for key in first}))}
    cells = {key: (rows[key[1:]], splits.index(key[0])) for key in first}
    shape = len(rows), len(splits)
    present, instructions = np.zeros(shape, bool), np.zeros(shape, object)
    for key, cell in cells.items():
        present[cell], instructions[cell] = True, first[key]["instruction"]
    success = {metric: {} for metric in METRICS}
    for metric in METRICS:
        for name, runs in keyed.items():
            x = success[metric][name] = np.zeros((len(runs), *shape))
            for r, run in enumerate(runs):
                for key, cell in cells.items():
                    x[r][cell] = run[key][metric]
    return Outcomes(splits, present, instructions, success)


def read_aligned(arms: dict[str, list[str]]) -> Outcomes:
    """{arm: paths of its runs} -> their records, side by side."""
    return align({name: [read_records(run) for run in runs] for name, runs in arms.items()})


def rows_of_splits(outcomes: Outcomes) -> dict[str, list]:
    """Each split, the OOD average and the mean over all splits, as lists of (weight, mask (E, S)).

    A row's rate is the weighted sum of the rates over the masks.
    """
    splits = outcomes.splits
    masks = {s: outcomes.present & (np.arange(len(splits)) == i) for i, s in enumerate(splits)}
    rows = {split: [(1.0, mask)] for split, mask in masks.items()}
    if weights := ood_weights(splits):
        rows["OOD average"] = [(weight, masks[split]) for split, weight in weights.items()]
    rows["all splits"] = [(1 / len(splits), mask) for mask in masks.values()]
    return rows


def influence(x: np.ndarray, row: list) -> tuple[np.ndarray, np.ndarray]:
    """Of success x (R, E, S): each run's rate (R,), and what each episode adds to it (R, E).

    The second has mean zero. An episode id has the same target in all splits, so its outcomes go
    together: all that a statistic needs to know about that is their weighted sum.
    """
    rates, added = np.zeros(len(x)), np.zeros(x.shape[:2])
    for weight, mask in row:
        mean = x[:, mask].mean(1)  # (R,)
        rates += weight * mean
        of_episode = ((x - mean[:, None, None]) * mask).sum(2)  # (R, E, S) -> (R, E)
        added += weight * len(mask) / mask.sum() * of_episode
    return rates, added


@functools.cache
def redrawn(episodes: int) -> np.ndarray:
    """(10000, E) how often each episode was drawn, in each of 10,000 draws with replacement."""
    rng = np.random.default_rng(0)
    return rng.multinomial(episodes, np.full(episodes, 1 / episodes), 10_000).astype(np.float32)


@functools.cache
def student(degrees: int) -> np.ndarray:
    """(10000,) draws from Student's t."""
    return np.random.default_rng(1).standard_t(degrees, 10_000)


class Estimate(NamedTuple):
    """A rate or a difference as fractions, with its 95 % interval."""

    value: float
    low: float
    high: float


def bootstrap(terms: Sequence[tuple[int, np.ndarray]], row: list) -> Estimate:
    """The sum of sign * rate over arms [(sign, x (R, E, S))]: bootstrap over runs and episodes.

    Runs: their mean is drawn from Student's t with the arms' pooled spread, as if all had the same
    spread. Three runs drawn with replacement would show two thirds of it.
    Episodes: redrawn with all their splits, runs and arms at once, so what is hard for every run
    cancels in a difference. Each run's own luck with an episode is in the spread of the runs too,
    so the draws are shrunk to what the runs have in common. One run per arm: episodes alone.
    """
    parts = [(sign, *influence(x, row)) for sign, x in terms]
    value = sum(sign * rates.mean() for sign, rates, _ in parts)
    together = sum(sign * added.mean(0) for sign, _, added in parts)  # (E,)
    draws = redrawn(len(together)) @ together / len(together)
    if degrees := sum(len(rates) - 1 for _, rates, _ in parts):
        per_run = sum(1 / len(rates) for _, rates, _ in parts)
        spread = sum(((rates - rates.mean()) ** 2).sum() for _, rates, _ in parts) / degrees
        luck = sum(((a - a.mean(0)) ** 2).mean(1).sum() for _, _, a in parts) / degrees
        variance = (together**2).mean()
        common = max(0.0, 1 - luck * per_run / variance) if variance > 0 else 0.0
        draws = math.sqrt(common) * draws + math.sqrt(spread * per_run) * student(degrees)
    low, high = value + np.quantile(draws, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high))


def difference(a: np.ndarray, b: np.ndarray, row: list) -> Estimate:
    """Rate of arm b minus rate of arm a."""
    return bootstrap([(-1, a), (1, b)], row)


def rate(x: np.ndarray, row: list) -> Estimate:
    """The rate of one arm (R, E, S).

    The interval over episodes is Wilson's for one split. For several, their half-widths add in
    squares (MOVER, Zou and Donner 2008), widened by the variance that the episodes really show.
    With several runs it reaches at least as far as the bootstrap over runs and episodes.
    """
    value = below = above = independent = 0.0
    for weight, mask in row:
        k, n = x[:, mask].sum(), int(mask.sum()) * len(x)
        low, high = wilson(k, n)
        value += weight * k / n
        below += (weight * (k / n - low)) ** 2
        above += (weight * (high - k / n)) ** 2
        independent += weight**2 * k / n * (1 - k / n) / n
    added = influence(x, row)[1].mean(0)
    inflation = max(1.0, (added**2).mean() / len(added) / independent) if independent else 1.0
    low, high = value - math.sqrt(inflation * below), value + math.sqrt(inflation * above)
    if len(x) > 1:
        over_runs = bootstrap([(1, x)], row)
        low, high = min(low, over_runs.low), max(high, over_runs.high)
    return Estimate(value, max(low, 0.0), min(high, 1.0))


PLAN = """Episodes per split and seed that show a difference of {points:g} points, in one split / in
the OOD average. Columns: standard deviation of success between seeds of one arm, as endless
episodes would show it. `-`: no number of episodes makes up for so few seeds.

{table}

Assumes: a success rate near 50 %, the worst case; the 95 % interval of --compare is to be
clear of zero in 80 % of such studies; both arms have as many seeds and play the same
episodes; luck with an episode is independent between arms, seeds and splits."""


def plan_table(points: float) -> str:
    """Seeds and episodes that show a difference, by the formula that `bootstrap` comes down to."""
    spreads = (0, 2, 4, 8)
    table = [["seeds per arm", *(f"{spread} points" for spread in spreads)]]
    average = sum(weight**2 for weight in ood_weights(list(SPLITS)).values())
    for seeds in (2, 3, 4, 5, 8, 12, 16):
        draws = np.random.default_rng(0).standard_t(2 * seeds - 2, 1_000_000)
        reach = np.quantile(draws, [0.975, 0.8]).sum()
        cells = []
        for spread in spreads:
            # (points / reach)^2 = 2 / seeds * (spread^2 + luck / episodes)
            left = (points / 100 / reach) ** 2 * seeds / 2 - (spread / 100) ** 2
            luck = [0.25, average * 0.25] if left > 0 else []  # p (1 - p) at 50 %
            cells.append(" / ".join(str(math.ceil(each / left)) for each in luck) or "-")
        table.append([str(seeds), *cells])
    return PLAN.format(points=points, table=markdown(table))


# ---------------------------------------------------------------------------------------- tables
def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the header."""
    header, *rest = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([header, "| --- " * len(rows[0]) + "|", *rest])


def percent(estimate: Estimate, sign: str = "") -> str:
    """12.3 [4.5, 20.1]; with sign "+": +12.3 [-4.5, +20.1]."""
    return "{} [{}, {}]".format(*(f"{100 * number + 0.0:{sign}.1f}" for number in estimate))


def ood_table(records: Sequence[dict]) -> str:
    """One row per split, both success rates in per cent with 95 % intervals, the OOD average."""
    outcomes = align({"run": [records]})
    table = [["split", *(f"{metric} %" for metric in METRICS), "n"]]
    for name, row in rows_of_splits(outcomes).items():
        if name == "all splits":
            continue
        if name == "OOD average":
            kinds = dict.fromkeys(map(shift_of, ood_weights(outcomes.splits)))
            name = f"OOD average ({', '.join(kinds)})"
        rates = [percent(rate(outcomes.success[metric]["run"], row)) for metric in METRICS]
        table.append([name, *rates, str(sum(int(mask.sum()) for _, mask in row))])
    return markdown(table)


def compare_table(outcomes: Outcomes, metric: str, rows: dict[str, list], what="split") -> str:
    """Every arm's rate, and its paired difference to the first arm's; n: episodes per run."""
    success = outcomes.success[metric]
    (first, a), *others = success.items()
    table = [[what, *(f"{name} %" for name in success)]]
    table[0] += [*(f"{name} - {first}, points" for name, _ in others), "n"]
    for name, row in rows.items():
        rates = [f"{100 * influence(x, row)[0].mean():.1f}" for x in success.values()]
        changes = [percent(difference(a, b, row), "+") for _, b in others]
        table.append([name, *rates, *changes, str(sum(int(mask.sum()) for _, mask in row))])
    return markdown(table)


def read_arms(texts: Sequence[str]) -> dict[str, list[str]]:
    """NAME=RUN,RUN,... or RUN, which gets the name A, B, ... -> {name: its runs}."""
    if not texts:
        raise Fault("there is no arm: write NAME=RUN,RUN,... for each")
    arms = {}
    for i, text in enumerate(texts):
        name, equals, runs = text.partition("=")
        name, runs = (name, runs.split(",")) if equals else (chr(ord("A") + i), [text])
        if name in arms or not name or not all(runs) or len(set(runs)) < len(runs):
            raise Fault(f"{text!r} is no arm, or names one or a run twice: write NAME=RUN,RUN,...")
        arms[name] = runs
    return arms


# ---------------------------------------------------------------------------------- command line
def check_args(args: Args):
    """A wrong flag gets its sentence here, before anything slow starts."""
    if not args.checkpoint:
        raise Fault("there is nothing to evaluate: pass --checkpoint DIR, or --compare A B")
    for split in args.splits:
        parse_split(split)
    for name, values in (("split", args.splits), ("seed", args.seeds)):
        if not values or len(set(values)) < len(values):
            raise Fault(f"--{name}s needs at least one {name} and none twice")
    runtime.check_ranges(args, RANGES)
    if args.ablate.startswith("other-") and min(args.num_envs, args.num_episodes) < 2:
        raise Fault(f"--ablate {args.ablate} needs at least 2 --num-envs and 2 --num-episodes")
    for seed in args.seeds:
        episode_ids("eval", seed, 0, args.num_episodes)  # are there so many?


def find_checkpoint(args: Args) -> tuple[str, dict]:
    """Which checkpoint --checkpoint means, and what its args.json says."""
    directory = Path(args.checkpoint)
    saved = {"backbone": args.backbone, "assets": "", "dtype": "auto"}
    if not directory.is_dir():
        if not args.backbone:
            raise Fault(
                f"the checkpoint directory {directory} does not exist: check --checkpoint; "
                "one on the Hub needs --backbone besides"
            )
        return args.checkpoint, saved
    if runtime.checkpoints(directory):
        directory = runtime.newest_checkpoint(directory)
    if directory.is_symlink():  # RUN/best, whose records are those of the checkpoint
        directory = directory.parent / directory.readlink()
    args_json = directory / "args.json"
    if args_json.exists():
        saved |= read_json(args_json)
    if not saved["backbone"]:
        raise Fault(f"{args_json} does not name a backbone: pass --backbone")
    if args.backbone not in ("", saved["backbone"]):
        raise Fault(
            f"{directory} is a checkpoint of {saved['backbone']}, not of {args.backbone}: "
            "leave --backbone out"
        )
    return str(directory), saved


def assets_of(args, saved: dict) -> str:
    """--assets, or the pack that the checkpoint was trained in."""
    if not (assets := args.assets or saved["assets"]):
        raise Fault("the checkpoint names no asset pack: pass --assets (rl4vla for the big ones)")
    return assets


def output_directory(args: Args, checkpoint: str) -> Path:
    local = Path(checkpoint)
    if not local.is_dir():  # on the Hub
        local = Path("runs", checkpoint.replace("/", "_"))
    out = Path(args.out or local / f"eval-{args.ablate}".removesuffix("-none"))
    with runtime.writing_to(out):
        out.mkdir(exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    return out


def records_to_keep(out: Path, protocol: dict, splits: Sequence[str]) -> list[dict]:
    """What an earlier evaluation left in `out`. Refuses to mix it with another protocol's."""
    if not (out / "episodes.jsonl").exists():
        return []
    old = read_records(out / "episodes.jsonl")
    differs = [name for name, value in protocol.items() if old[0][name] != value]
    if differs and any(record["split"] not in splits for record in old):
        name = differs[0]
        raise Fault(
            f"{out} holds episodes whose {name} is {old[0][name]}, not {protocol[name]}: "
            "pass another --out"
        )
    return [] if differs else old


def main(args: Args):
    if args.plan is not None:
        if not 0 < args.plan < 100:
            raise Fault("--plan needs a difference above 0 and below 100 points")
        print(plan_table(args.plan))
        return
    if args.compare is not None:
        if len(args.compare) < 2:
            raise Fault("--compare needs at least two arms, each RUN or NAME=RUN,RUN,...")
        arms = read_arms(args.compare)
        outcomes = read_aligned(arms)
        for name, runs in arms.items():
            print(f"{name}: {', '.join(runs)}")
        several = max(map(len, arms.values())) > 1
        print(f"95 % intervals over {'runs and episodes' if several else 'episodes alone'}")
        for metric in METRICS:
            print(f"\n{metric}\n\n{compare_table(outcomes, metric, rows_of_splits(outcomes))}")
        return

    check_args(args)
    sim = choose_sim(args.sim)
    checkpoint, saved = find_checkpoint(args)
    assets = assets_of(args, saved)
    find_pack(assets)  # a Fault where its files are missing
    out = output_directory(args, checkpoint)
    runtime.join_ranks("gloo")
    rank, world = runtime.RANK, runtime.WORLD
    settings = vars(args.policy) | {"device": runtime.own_device(args.cuda)}
    if settings["dtype"] == "auto":
        settings["dtype"] = saved["dtype"]
    policy = load_policy(saved["backbone"], checkpoint, **settings)
    num_envs = min(args.num_envs, args.num_episodes)
    pictures = {"image_size": policy.image_size, "resize": policy.resize}
    total, records = len(args.splits) * len(args.seeds) * args.num_episodes, []
    with (
        make_envs(num_envs, assets, sim=sim, **pictures) as envs,
        tqdm(total=total // world, unit="episode", disable=rank > 0) as bar,
        runtime.locked(out, "evaluation", "--out") if rank == 0 else nullcontext(),
    ):
        protocol = {
            "backbone": saved["backbone"],
            "assets": assets,
            "sim": sim,
            "temperature": args.temperature,
            "num_envs": num_envs,
            "horizon": policy.horizon,
            "replan": policy.chunk,
            "denoise_steps": policy.config.get("num_denoise_steps"),
            "steps": envs.max_episode_steps,
            "dtype": str(policy.dtype).removeprefix("torch."),
            "ablate": args.ablate,
            "checkpoint": checkpoint,
        }
        old = records_to_keep(out, protocol, args.splits)
        for split in args.splits:
            for seed in args.seeds:
                ids = episode_ids("eval", seed, 0, args.num_episodes)
                videos = args.video if seed == args.seeds[0] else 0
                how = (args.temperature, seed, args.ablate, out / "videos", videos, bar)
                parts = [None] * world
                parts[rank] = play_episodes(policy, envs, split, ids, *how)
                runtime.collective(dist.all_gather_object, parts, parts[rank])
                played = sorted(sum(parts, []), key=lambda record: record["episode_id"])
                records += [record | protocol for record in played]
                played_splits = {record["split"] for record in records}
                kept = [record for record in old if record["split"] not in played_splits]
                # Written now, so that an interrupted evaluation keeps what it has.
                if rank == 0:
                    with runtime.writing_to(out):
                        table = write_results(out, kept + records)
    if rank == 0:
        print(f"{table}\nEpisodes: {out / 'episodes.jsonl'}")
        if args.ablate != "none":
            print(f"Compare with the same episodes untouched: --compare {checkpoint} {out}")


if __name__ == "__main__":
    runtime.command_line(lambda: main(tyro.cli(Args)))
