"""Every arm over many seeds, one table. An interrupted study goes on.

    python tools/study.py                                # Flatland: the default arms, 8 seeds
    python tools/study.py --backbone pi05-tiny --arms PPO PAIR --seeds 3 --jobs 2   # the simulator
    python tools/study.py --table                        # from the records alone
    python tools/study.py --backbone pi05-tiny --name pi05-tiny-camera --arms PPO PAIR \\
        --flags="--pre-view camera" --splits train camera+8 camera+16 camera+24    # section 5.5

A run is `ppo_pair.py` with the arm's flags, then `evaluate.py`. Its record is one line of
results/ASSETS/BACKBONE.jsonl: the flags, the curves, and one bit per episode and split. The table
compares every arm with PPO over the same seeds, by `evaluate.py`'s bootstrap over seeds and
episodes. BACKBONE.png has the curves, every kind of shift, distractors or cameras, lambda_inv.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import tyro

from envs import SPLITS
from evaluate import METRICS, Outcomes, difference, markdown, percent, rate, read_records
from ppo_pair import preset
from runtime import Fault, check_ranges, command_line, newest_checkpoint, read_json, write_text
from tools.figures import COLOURS, NUMBERED, band, draw, numbered_splits, panels, percent_axis, save
from tools.tables import columns_of

ARMS = {
    "PPO": "--inv-coef 0 --sen-coef 0",
    "+inv": "--sen-coef 0",
    "+sen": "--inv-coef 0",
    "PAIR": "",
    "PPO on composites": "--inv-coef 0 --sen-coef 0 --augment 0.5",  # diversity without pairs
    "PPO, 3 x as long": "--inv-coef 0 --sen-coef 0 --iterations {long}",
    "PPO, 0.3 x the rate": "--inv-coef 0 --sen-coef 0 {slow}",
    "PPO, 3 x as long, 0.3 x the rate": "--inv-coef 0 --sen-coef 0 --iterations {long} {slow}",
    "PAIR, 3 x as long, 0.3 x the rate": "--iterations {long} {slow}",
    "Eq. (3) teaches o_alt": "--sen-grad alt",
    "Eq. (3) teaches both": "--sen-grad both",
    "target: current weights": "--inv-target-rate None",
    "target: current weights, lambda_inv 0.5": "--inv-target-rate None --inv-coef 0.5",
    "target: the rollout's": "--inv-target-rate 1",
    "target: an average": "--inv-target-rate 0.1",
    "lambda_inv 1": "--inv-coef 1 --sen-coef 0",  # 0 is PPO, the preset's 4 is +inv
    "lambda_inv 2": "--inv-coef 2 --sen-coef 0",
    "lambda_inv 1000": "--inv-coef 1000 --sen-coef 0",  # 250 times +inv's: nearly without PPO
}
CURVES = ("success", "inv_kl", "sen_kl", "unrelated_kl", "entropy", "approx_kl")


@dataclass
class Args:
    backbone: str = "pi05-flat"
    """pi05-flat, openvla-flat, pi05-tiny or openvla-tiny"""
    arms: tuple[str, ...] = tuple(arm for arm, flags in ARMS.items() if "{slow}" not in flags)
    """which arms, by name (default: all but those at another rate)"""
    seeds: int = 8
    """how many are run, from 2 on: the presets were chosen on seed 1"""
    episodes: int = 256
    """per split, of each run"""
    splits: tuple[str, ...] = tuple(SPLITS)
    """as for evaluate.py"""
    jobs: int = 1
    """runs side by side, one core each"""
    flags: str = ""
    """more flags of ppo_pair.py, for all arms, before the arm's own (with --name)"""
    name: str = ""
    """name of the records (default: the backbone's)"""
    table: bool = False
    """run nothing, write the table of what is there"""


def flags_of(args: Args, arm: str) -> str:
    chosen = preset(args.backbone)
    slow = f"--learning-rate {0.3 * chosen.learning_rate:g}"
    return f"{args.flags} {ARMS[arm].format(long=3 * chosen.iterations, slow=slow)}".strip()


def play(args: Args, arm: str, seed: int) -> dict:
    """One run in processes of its own -> its record. Of a run that a guard ended (the policy went
    blind, or lost what it could) the last checkpoint counts."""
    chosen, flags = preset(args.backbone), flags_of(args, arm)
    run = ROOT / "runs/study" / (args.name or args.backbone) / f"{arm}_{seed}".replace(" ", "-")
    command = ["ppo_pair.py", "--backbone", args.backbone, "--seed", str(seed)]
    command += ["--run-dir", str(run), "--resume", "auto", "--eval-episodes", "0", "--keep", "1"]
    # A simulator is built anew after each checkpoint, which takes a minute
    command += ["--save-every", "1" if chosen.assets == "flat" else "6", *flags.split()]
    table = ["evaluate.py", "--checkpoint", str(run), "--num-episodes", str(args.episodes)]
    table += ["--num-envs", str(chosen.num_envs), "--splits", *args.splits]
    run.parent.mkdir(parents=True, exist_ok=True)
    log = Path(f"{run}.txt")

    def python(*command):
        with open(log, "a") as out:
            return subprocess.run([sys.executable, *command], cwd=ROOT, stdout=out, stderr=out)

    ended = python(*command).returncode
    if not ended or log.read_text().splitlines()[-1].startswith("error: the policy "):  # a guard's
        ended = python(*table).returncode
    if ended:
        raise Fault(f"{arm}, seed {seed} ended with {ended}: see {log}")
    return record_of(run, args.episodes, arm, seed, flags)


def record_of(run: Path, episodes: int, arm: str, seed: int, flags: str) -> dict:
    """Curves and outcomes of a finished run, packed."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    curves = {k: [round(line.get(k, 0.0), 4) for line in lines] for k in CURVES}
    seconds = sum(line["rollout_seconds"] + line["update_seconds"] for line in lines)
    bits = {}
    for record in read_records(newest_checkpoint(run)):
        for metric in METRICS:
            bits.setdefault(metric, {}).setdefault(record["split"], []).append(record[metric])
    packed = {
        m: {s: np.packbits(b).tobytes().hex() for s, b in of.items()} for m, of in bits.items()
    }
    ended = len(lines) < read_json(newest_checkpoint(run) / "args.json")["iterations"]
    about = dict(arm=arm, seed=seed, flags=flags, episodes=episodes, seconds=round(seconds))
    return about | dict(ended=ended, curves=curves, **packed)


def in_order(records: list[dict]) -> list[dict]:
    """By arm, as ARMS has them, then by seed."""
    arms = list(ARMS)
    return sorted(records, key=lambda record: (arms.index(record["arm"]), record["seed"]))


def outcomes_of(records: list[dict]) -> Outcomes:
    """The records side by side: (runs, episodes, splits) of each metric and arm."""
    splits, n = list(records[0][METRICS[0]]), records[0]["episodes"]
    success = {metric: {} for metric in METRICS}
    for record in records:
        for metric in METRICS:
            rows = [np.frombuffer(bytes.fromhex(record[metric][s]), np.uint8) for s in splits]
            bits = np.stack([np.unpackbits(row)[:n] for row in rows], 1).astype(float)  # (E, S)
            success[metric].setdefault(record["arm"], []).append(bits)
    success = {m: {arm: np.stack(x) for arm, x in of.items()} for m, of in success.items()}
    everywhere = np.ones((n, len(splits)), bool)
    return Outcomes(splits, everywhere, np.full(everywhere.shape, ""), success)


def table_of(records: list[dict]) -> str:
    """A row per arm: success in per cent on each kind of split, and what it has more than the first
    arm over the same seeds. Last: its lead out of distribution, less its lead on train."""
    outcomes, parts = outcomes_of(records), []
    seeds = {arm: [r["seed"] for r in records if r["arm"] == arm] for arm in ARMS}
    ended = Counter(record["arm"] for record in records if record["ended"])
    columns = columns_of(outcomes)
    compared = dict(columns)
    if {"train", "OOD average"} <= columns.keys():
        train = [(-weight, mask) for weight, mask in columns["train"]]
        compared["(OOD average - train)"] = columns["OOD average"] + train
    for metric in METRICS:
        success = outcomes.success[metric]
        first, a = next(iter(success.items()))
        heads = (*columns, *(f"{name} - {first}" for name in compared))
        rows = [["arm", "seeds", "ended by a guard", *heads]]
        for arm, x in success.items():
            cells = [percent(rate(x, row)) for row in columns.values()]
            same = a[np.isin(seeds[first], seeds[arm])]
            changes = [
                percent(difference(same, x, row), "+") if arm != first else ""
                for row in compared.values()
            ]
            rows.append([arm, str(len(x)), str(ended[arm] or ""), *cells, *changes])
        parts.append(f"## {metric}, per cent [95 %]\n\n{markdown(rows)}\n")
    return "\n".join(parts)


MAIN = ("PPO", "+inv", "+sen", "PAIR")  # Table 2
SWEEP = {0: "PPO", 1: "lambda_inv 1", 2: "lambda_inv 2", 4: "+inv"}  # Figure 4


def figure_of(records: list[dict], out: str):
    """Figures 2 to 5 side by side, as far as the arms and splits are there: own episodes against
    iterations (mean and range of the seeds that no guard ended), each kind of shift, the number of
    distractors or the camera's angle, lambda_inv."""
    outcomes = outcomes_of(records)
    success, columns = outcomes.success[METRICS[0]], columns_of(outcomes)
    arms = [arm for arm in MAIN if arm in success]
    of_sweep = [(x, success[arm]) for x, arm in SWEEP.items() if arm in success]
    numbered = {kind: numbered_splits(outcomes, kind) for kind in NUMBERED}
    numbered = {kind: levels for kind, levels in numbered.items() if len(levels) > 1}
    figure, axes = panels(2 + len(numbered) + (len(of_sweep) > 2))
    own, shifts, *others = axes

    def rates(arm, rows):
        return [rate(success[arm], row) for row in rows.values()]

    for i, arm in enumerate(arms):
        runs = [r["curves"]["success"] for r in records if r["arm"] == arm and not r["ended"]]
        if runs:
            curves = 100 * np.array(runs)
            iterations = range(1, curves.shape[1] + 1)
            own.plot(iterations, curves.mean(0), color=COLOURS[i], label=arm)
            band(own, iterations, curves, COLOURS[i])
        at = np.arange(len(columns)) + (i - (len(arms) - 1) / 2) * 0.2
        draw(shifts, at, rates(arm, columns), i, arm, line="none")
        for axis, levels in zip(others, numbered.values()):
            draw(axis, list(levels), rates(arm, levels), i, arm)
    for axis, kind in zip(others, numbered):
        axis.set(title=kind, xlabel=NUMBERED[kind][1])
    for axis in others[len(numbered) :]:
        estimates = [rate(x, columns["OOD average"]) for _, x in of_sweep]
        draw(axis, [x for x, _ in of_sweep], estimates, 1, "without L_sen")
        axis.set(title="OOD average", xlabel="lambda_inv")
    own.set(title="own episodes while training", xlabel="iteration")
    shifts.set(title="in distribution and out of it")
    shifts.set_xticks(range(len(columns)), [*columns], rotation=30, ha="right")
    for axis in axes:
        percent_axis(axis)
    shifts.get_legend().remove()  # that of the first panel
    save(figure, out)


def main(args: Args):
    unknown = [arm for arm in args.arms if arm not in ARMS]
    if unknown:
        raise Fault(f"unknown arm {unknown[0]!r}: choose from {', '.join(ARMS)}")
    if args.flags and not args.name:
        raise Fault("--flags makes another study: give its records a --name")
    check_ranges(args, {"at least 1": "seeds episodes jobs"})
    file = ROOT / "results" / preset(args.backbone).assets / f"{args.name or args.backbone}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for record in [] if args.table else records:
        asked = flags_of(args, record["arm"]), set(args.splits), args.episodes
        if (record["flags"], set(record[METRICS[0]]), record["episodes"]) != asked:
            raise Fault(f"{file} is of other --flags, --splits or --episodes: pass another --name")
    done = {(record["arm"], record["seed"]) for record in records}
    wanted = [(arm, seed) for seed in range(2, args.seeds + 2) for arm in args.arms]
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    def one(key):
        record = play(args, *key)
        records.append(record)
        with open(file, "a") as lines:
            lines.write(json.dumps(record) + "\n")
        print(f"{key[0]}, seed {key[1]}: {record['seconds']} s", flush=True)

    if not args.table:
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(one, [key for key in wanted if key not in done]))
    if not records:
        raise Fault(f"{file} holds no records: run the study first, without --table")
    records = in_order(records)
    write_text(file.with_suffix(".md"), table_of(records))
    figure_of(records, str(file.with_suffix("")))
    print(table_of(records))


if __name__ == "__main__":
    command_line(lambda: main(tyro.cli(Args)))
