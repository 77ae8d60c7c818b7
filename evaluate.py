"""Evaluate a checkpoint on the training split and the out-of-distribution (OOD) splits of the paper's Tables 1 and 2.

    python evaluate.py --checkpoint runs/pair/final                         # all splits, 128 episodes each
    python evaluate.py --checkpoint runs/pair/final --splits train clutter-8 --num-episodes 32 --video 4
    torchrun --nproc-per-node 8 evaluate.py --checkpoint runs/pair/final    # the same files, sooner
    python evaluate.py --compare runs/ppo/final/eval runs/pair/final/eval   # paired difference, B minus A

Writes `episodes.jsonl` (one JSON object per episode) and `table.md` into `<checkpoint>/eval`, or `--out`.

* success_once: the task was solved at some step of the episode (RLinf's metric, the headline here).
  success_at_end: it is solved at the last step (RL4VLA's metric). The two can be far apart, so every table has both.
* Every rate carries its 95 % Wilson interval: 128 episodes leave +-5 to +-9 points.
* An episode is a pure function of (split, episode id): two checkpoints meet the same scenes and are compared in pairs.
* Actions are sampled at temperature 0.6, as RL4VLA and RLinf do (`--temperature 0` is argmax). The noise depends on
  (seed, split, batch) alone: the same checkpoint, flags and machine give the same file again.
* The paper's rates are multiples of 1/384 (OpenVLA: 128 episodes x 3) and 1/480 (pi0.5: 160 x 3). `--num-episodes 128
  --seeds 0 1 2` is that size. Each seed brings fresh episodes, so all of them count as independent in the interval.
"""

import json
import math
import os
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import tyro
from tqdm import tqdm

from envs import SPLITS, choose_sim, make_envs, parse_split
from runtime import Fault

EVAL_EPISODES_START = (
    1_000_000_000  # training uses the ids below, so no evaluation episode was ever trained on
)
EPISODES_PER_SEED = 1_000_000  # seed s evaluates the ids EVAL_EPISODES_START + s * EPISODES_PER_SEED + (0, 1, 2, ...)


@dataclass
class Args:
    checkpoint: str = ""
    """the checkpoint directory to evaluate (required, except with --compare)"""
    backbone: str = ""
    """the policy class; needed only if the checkpoint has no args.json that names it"""
    splits: tuple[str, ...] = tuple(SPLITS)
    """train and the OOD splits of Appendix B, and camera+N or camera-N for a turned camera (Section 5.5)"""
    num_episodes: int = 128
    """episodes per split and seed (the paper: 128 for OpenVLA; its pi0.5 numbers fit 160)"""
    seeds: tuple[int, ...] = (0,)
    """each seed evaluates its own fixed range of episodes with its own sampling noise"""
    temperature: float = 0.6
    """sampling temperature of the action tokens; 0 is argmax"""
    num_envs: int = 16
    """environments that run side by side (part of the sampling noise: keep it to get the same file again)"""
    assets: str = ""
    """asset pack (default: the one in the checkpoint's args.json, or builtin)"""
    out: str = ""
    """output directory (default: <checkpoint>/eval)"""
    video: int = 0
    """number of mp4s per split, of its first episodes, with the outcome in the file name"""
    sim: Literal["cpu", "cuda", "auto"] = "cpu"
    """physics, as for ppo_pair.py"""
    cuda: bool = True
    """if toggled, the policy runs on the GPU where there is one"""
    compare: tuple[str, str] | None = None
    """A B: two episodes.jsonl (or their directories); prints the paired difference B - A and evaluates nothing"""


def eval_episode_ids(num_episodes: int, seed: int = 0) -> list[int]:
    """The fixed evaluation episodes of one seed. The first n ids do not depend on num_episodes."""
    start = EVAL_EPISODES_START + seed * EPISODES_PER_SEED
    return list(range(start, start + num_episodes))


def noise_seed(seed: int, split: str, batch: int) -> int:
    """One torch seed per (seed, split, batch). crc32, because Python's hash of a str changes with every process."""
    return zlib.crc32(f"{seed}/{split}/{batch}".encode())


def evaluate(
    policy,
    envs,
    split,
    episode_ids,
    temperature,
    video_dir=None,
    num_videos=0,
    seed=0,
    bar=None,
    rank=0,
    world=1,
) -> list[dict]:
    """Run each episode once; one record per episode, in the order of `episode_ids`. `bar`: a tqdm that counts episodes.

    Of `world` ranks each plays every world-th batch; together their records are those of one.
    The caller's random state is the same afterwards: a training run with evaluations inside equals one without.
    """
    records = []
    for batch, first in enumerate(range(0, len(episode_ids), envs.num_envs)):
        if batch % world != rank:
            continue
        ids = list(episode_ids[first : first + envs.num_envs])
        # All environments step together: the last batch is filled up with repeated ids, whose records are dropped.
        padded = [ids[i % len(ids)] for i in range(envs.num_envs)]
        num_filmed = max(0, min(len(ids), num_videos - first))
        frames = []  # (num_filmed, H, W, 3) for each instant at which the policy looked
        steps = 0  # env steps
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(noise_seed(seed, split, batch))
            obs = envs.reset(padded, split, rebuild=True)
            instructions = list(envs.instructions)
            while steps < envs.max_episode_steps:
                frames.append(obs["rgb"][:num_filmed].cpu().numpy().copy())
                actions = policy.act(obs, instructions, temperature).actions  # (N, chunk, 7)
                obs, _, done, info = envs.step(actions)
                steps = min(steps + actions.shape[1], envs.max_episode_steps)
            frames.append(obs["rgb"][:num_filmed].cpu().numpy().copy())
        assert done.all(), "every episode ends at max_episode_steps"

        for i, episode_id in enumerate(ids):
            records.append(
                {
                    "split": split,
                    "episode_id": int(episode_id),
                    "seed": seed,
                    "instruction": instructions[i],
                    "success_once": bool(info["success_once"][i]),
                    "success_at_end": bool(info["success"][i]),
                    "steps": steps,
                    "sum_reward": float(
                        info["episode_return"][i]
                    ),  # the return, under LeRobot's name
                }
            )
        for i, record in enumerate(records[-len(ids) :][:num_filmed]):
            outcome = "success" if record["success_once"] else "failure"
            write_video(
                Path(video_dir) / f"{split}_{ids[i]}_{outcome}.mp4", [frame[i] for frame in frames]
            )
        if bar is not None:
            successes = sum(record["success_once"] for record in records)
            bar.set_postfix_str(f"{split}: success {successes}/{len(records)}", refresh=False)
            bar.update(len(ids))
    return records


def write_video(path: Path, frames: Sequence[np.ndarray], upscale: int = 4, fps: int = 5) -> None:
    """mp4 of what the policy saw: frames (H, W, 3) uint8, each pixel a square so that small ones can be watched."""
    import imageio

    path.parent.mkdir(parents=True, exist_ok=True)
    with imageio.get_writer(
        path, fps=fps, macro_block_size=2
    ) as video:  # 2: H.264 needs even sides, no more than that
        for frame in frames:
            video.append_data(frame.repeat(upscale, axis=0).repeat(upscale, axis=1))


def wilson(k: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a success rate: every p with (k/n - p)^2 <= z^2 p (1 - p) / n.

    Unlike k/n +- z sqrt(...), it stays inside [0, 1] and has a length even at 0 of n and n of n.
    """
    if not 0 <= k <= n or n == 0:
        raise ValueError(f"wilson needs 0 <= k <= n and n >= 1, got k={k}, n={n}")
    center = (k / n + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(k / n * (1 - k / n) / n + z**2 / (4 * n**2))
    return max(0.0, center - half), min(1.0, center + half)


def split_names(records: Sequence[dict]) -> list[str]:
    """The splits in order of first appearance."""
    return list(dict.fromkeys(record["split"] for record in records))


def shift_of(split: str) -> str:
    """clutter-4 -> clutter, camera+20 -> camera: a kind of shift counts once in the OOD average."""
    return split.split("-")[0].split("+")[0]


def ood_weights(splits: Sequence[str]) -> dict[str, float]:
    """Weight of each split in the OOD average; as in Table 1, clutter is averaged over its levels first."""
    shifts = [shift_of(split) for split in splits if split != "train"]
    return {s: 1 / len(set(shifts)) / shifts.count(shift_of(s)) for s in splits if s != "train"}


def ood_table(records: Sequence[dict]) -> str:
    """Markdown: one row per split, both success rates in per cent with 95 % intervals, and the OOD average."""
    splits = split_names(records)
    weights = ood_weights(splits)
    rows = {split: [split] for split in splits}
    average = [f"OOD average ({', '.join(dict.fromkeys(map(shift_of, weights)))})"]
    for metric in ("success_once", "success_at_end"):
        rate, below, above, independent = 0.0, 0.0, 0.0, 0.0
        errors = dict.fromkeys(((record["episode_id"], record["seed"]) for record in records), 0.0)
        for split in splits:
            of_split = [record for record in records if record["split"] == split]
            k, n = sum(record[metric] for record in of_split), len(of_split)
            low, high = wilson(k, n)
            rows[split].append(f"{100 * k / n:.1f} [{100 * low:.1f}, {100 * high:.1f}]")
            if split in weights:
                rate += weights[split] * k / n
                below += (weights[split] * (k / n - low)) ** 2
                above += (weights[split] * (high - k / n)) ** 2
                independent += weights[split] ** 2 * k / n * (1 - k / n) / n
                for record in of_split:
                    errors[record["episode_id"], record["seed"]] += (
                        weights[split] * (record[metric] - k / n) / n
                    )
        # If the splits were independent, their Wilson half-widths would add in squares (MOVER, Zou and Donner 2008).
        # But an episode id has the same target in every split: widen by the variance that the ids really show.
        inflation = (
            max(1.0, sum(e**2 for e in errors.values()) / independent) if independent else 1.0
        )
        low, high = rate - math.sqrt(inflation * below), rate + math.sqrt(inflation * above)
        average.append(f"{100 * rate:.1f} [{100 * max(low, 0):.1f}, {100 * min(high, 1):.1f}]")
    for split in splits:
        rows[split].append(str(sum(record["split"] == split for record in records)))
    average.append(str(sum(record["split"] in weights for record in records)))
    header = ["split", "success_once %", "success_at_end %", "n"]
    lines = [header, ["---"] * 4, *rows.values()] + ([average] if weights else [])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@dataclass
class Difference:
    """One row of a comparison: success_once rates as fractions, and the 95 % interval of rate_b - rate_a."""

    name: str
    pairs: int
    rate_a: float
    rate_b: float
    low: float
    high: float


def paired_bootstrap(
    records_a: Sequence[dict], records_b: Sequence[dict], resamples: int = 10_000, seed: int = 0
) -> list[Difference]:
    """Difference B - A in success_once: per split, for the OOD average, and for the mean over all splits.

    Both runs met the same scenes, so the unit is the pair: scenes that are hard for both cancel in the difference, and
    the interval is narrower than two separate ones suggest. Whole episode ids are redrawn, with all their splits at
    once, because an id has the same target in every split.
    """
    a, b = (
        {
            (record["split"], record["episode_id"], record["seed"]): record["success_once"]
            for record in records
        }
        for records in (records_a, records_b)
    )
    unmatched = sorted(a.keys() ^ b.keys())
    if unmatched:
        split, episode_id, run_seed = unmatched[0]
        raise Fault(
            f"{len(unmatched)} episodes are in one file only (the first: {split}, episode {episode_id}, seed "
            f"{run_seed}): evaluate both checkpoints with the same --splits, --num-episodes and --seeds"
        )

    splits = split_names(records_a)
    episodes = sorted({key[1:] for key in a})  # (episode_id, seed)
    row = {episode: i for i, episode in enumerate(episodes)}
    present, rate_a, rate_b = np.zeros((3, len(episodes), len(splits)))
    for key in a:
        cell = row[key[1:]], splits.index(key[0])
        present[cell], rate_a[cell], rate_b[cell] = 1, a[key], b[key]

    counts = np.random.default_rng(
        seed
    ).multinomial(  # (resamples, episodes): how often each episode was drawn
        len(episodes), np.full(len(episodes), 1 / len(episodes)), size=resamples
    )
    with np.errstate(
        invalid="ignore"
    ):  # 0 / 0 = nan: a draw without any episode of the split, left out below
        resampled = (counts @ (rate_b - rate_a)) / (counts @ present)  # (resamples, splits)
    rate_a, rate_b = (
        rate_a.sum(0) / present.sum(0),
        rate_b.sum(0) / present.sum(0),
    )  # (episodes, splits) -> (splits,)

    rows = {split: {split: 1.0} for split in splits}
    if ood_weights(splits):
        rows["OOD average"] = ood_weights(splits)
    rows["all splits"] = {split: 1 / len(splits) for split in splits}
    differences = []
    for name, weights in rows.items():
        columns, w = [splits.index(split) for split in weights], np.array(list(weights.values()))
        low, high = np.nanquantile(resampled[:, columns] @ w, [0.025, 0.975])
        pairs = int(present[:, columns].sum())
        differences.append(
            Difference(name, pairs, rate_a[columns] @ w, rate_b[columns] @ w, low, high)
        )
    return differences


def compare_table(differences: Sequence[Difference]) -> str:
    lines = ["| split | A % | B % | B - A, points | pairs |", "|---|---|---|---|---|"]
    for d in differences:
        change = f"{100 * (d.rate_b - d.rate_a):+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]"
        lines.append(
            f"| {d.name} | {100 * d.rate_a:.1f} | {100 * d.rate_b:.1f} | {change} | {d.pairs} |"
        )
    return "\n".join(lines)


def write_text(path: Path, text: str) -> None:
    """Under a temporary name first, so that a reader never sees half a file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def read_records(path: str | Path) -> list[dict]:
    """The records of an episodes.jsonl, or of the directory that holds it."""
    path = Path(path) / "episodes.jsonl" if Path(path).is_dir() else Path(path)
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Fault(
            f"cannot read {path} ({error}): give an episodes.jsonl or its directory"
        ) from None
    types = {
        "split": str,
        "episode_id": int,
        "seed": int,
        "success_once": bool,
        "success_at_end": bool,
    }
    records = {}
    for i, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            key = record["split"], record["episode_id"], record["seed"]
            assert all(type(record[name]) is kind for name, kind in types.items())
        except (ValueError, KeyError, TypeError, AssertionError):
            raise Fault(
                f"{path}, line {i}, is not an episode record: write the file anew with evaluate.py"
            ) from None
        if key in records:
            raise Fault(
                f"{path}, line {i}, repeats an earlier line ({key[0]}, episode {key[1]}): delete one of them"
            )
        records[key] = record
    if not records:
        raise Fault(f"{path} holds no episodes: write the file anew with evaluate.py")
    return list(records.values())


def collective(function, *args) -> None:
    """A torch.distributed call, where there are several ranks; when one has died, the others end with a sentence."""
    if dist.is_initialized():
        try:
            function(*args)
        except RuntimeError as error:
            reason = str(error).splitlines()[0][:100]
            raise Fault(
                f"another rank ended, so rank {dist.get_rank()} does too ({reason})"
            ) from None


def check_args(args: Args) -> None:
    """A wrong flag gets its sentence here, before anything slow starts."""
    if not args.checkpoint:
        raise Fault("there is nothing to evaluate: pass --checkpoint DIR, or --compare A B")
    if not Path(args.checkpoint).is_dir():
        raise Fault(
            f"the checkpoint directory {args.checkpoint} does not exist: check --checkpoint"
        )
    for split in args.splits:
        parse_split(split)
    for wrong, sentence in (
        (
            len(set(args.splits)) < max(1, len(args.splits)),
            "--splits needs at least one split and none twice",
        ),
        (
            len(set(args.seeds)) < max(1, len(args.seeds)),
            "--seeds needs at least one seed and none twice",
        ),
        (any(seed < 0 for seed in args.seeds), "--seeds must be 0 or more"),
        (
            not 1 <= args.num_episodes <= EPISODES_PER_SEED,
            f"--num-episodes must be 1 to {EPISODES_PER_SEED}",
        ),
        (args.num_envs < 1, "--num-envs must be at least 1"),
        (
            not 0 <= args.temperature < math.inf,
            "--temperature must be 0 (argmax) or a positive number",
        ),
        (args.video < 0, "--video must be 0 or the number of videos per split"),
    ):
        if wrong:
            raise Fault(sentence)


def main(args: Args) -> None:
    if args.compare is not None:
        differences = paired_bootstrap(*map(read_records, args.compare))
        print(
            f"success_once, 95 % intervals by paired bootstrap\nA: {args.compare[0]}\nB: {args.compare[1]}\n"
        )
        print(compare_table(differences))
        return

    check_args(args)
    sim = choose_sim(args.sim)
    args_json = Path(args.checkpoint) / "args.json"
    try:
        trained = {
            "backbone": args.backbone,
            "assets": "builtin",
            "dtype": "auto",
        }  # for an adapter that was not trained here
        if args_json.exists():
            trained |= json.loads(args_json.read_text())
    except (OSError, ValueError, TypeError) as error:
        raise Fault(f"{args_json} is damaged ({error}): use another checkpoint") from None
    backbone, assets = trained["backbone"], args.assets or trained["assets"]
    if not backbone:
        raise Fault(f"{args_json} does not name a backbone: pass --backbone")
    if args.backbone not in ("", backbone):
        raise Fault(
            f"{args.checkpoint} is a checkpoint of {backbone}, not of {args.backbone}: leave --backbone out"
        )
    out = Path(args.out or Path(args.checkpoint) / "eval")
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f"probe{os.getpid()}"  # of this rank
        write_text(probe, "")
        os.remove(probe)
    except OSError as error:
        raise Fault(f"cannot write to {out} ({error.strerror}): pass another --out") from None

    from policies import (
        DTYPES,
        PolicyError,
        load_policy,
    )  # here, because it takes seconds and every typo is answered above

    device = (
        f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        if args.cuda and torch.cuda.is_available()
        else "cpu"
    )
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():  # torchrun
        dist.init_process_group("gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    workers = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    records, total = [], len(args.splits) * len(args.seeds) * args.num_episodes
    try:
        policy = load_policy(
            backbone, args.checkpoint, device=device, dtype=DTYPES[trained["dtype"]]
        )
        num_envs = min(args.num_envs, args.num_episodes)
        with (
            make_envs(
                num_envs, assets, sim=sim, image_size=policy.image_size, num_workers=workers
            ) as envs,
            tqdm(total=total // world, unit="episode", disable=rank > 0) as bar,
        ):
            for split in args.splits:
                for seed in args.seeds:
                    ids = eval_episode_ids(args.num_episodes, seed)
                    videos = args.video if seed == args.seeds[0] else 0
                    parts = [None] * world
                    parts[rank] = evaluate(
                        policy,
                        envs,
                        split,
                        ids,
                        args.temperature,
                        out / "videos",
                        videos,
                        seed,
                        bar,
                        rank,
                        world,
                    )
                    collective(dist.all_gather_object, parts, parts[rank])
                    records += sorted(sum(parts, []), key=lambda record: record["episode_id"])
                    # Written now, so that an interrupted run keeps what it has.
                    if rank == 0:
                        write_text(
                            out / "episodes.jsonl",
                            "".join(json.dumps(record) + "\n" for record in records),
                        )
    except PolicyError as error:
        raise Fault(str(error)) from None
    except KeyboardInterrupt:
        raise Fault(f"interrupted: {len(records)} finished episodes were saved in {out}") from None

    if rank > 0:
        return
    table = ood_table(records)
    protocol = (
        f"{args.checkpoint}: {backbone}, {assets}, seeds {' '.join(map(str, args.seeds))}, temperature "
        f"{args.temperature:g}, {records[0]['steps']} steps per episode, {num_envs} envs; 95 % Wilson intervals."
    )
    write_text(out / "table.md", f"{table}\n\n{protocol}\n")
    print(f"{table}\n\n{protocol}\nEpisodes: {out / 'episodes.jsonl'}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except Fault as fault:
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(2)
