"""The paper's Figures 2 to 5 from records, as PNG and PDF, and the two KLs before and after.

    python tools/figures.py iterations --out figure_2 PPO=runs/ppo_1,runs/ppo_2 PAIR=runs/pair_1
    python tools/figures.py distractors --out figure_3 PPO=... PAIR=...
    python tools/figures.py lambda --out figure_4 0=runs/ppo_1 1=runs/a 2=runs/b 4=runs/c
    python tools/figures.py camera --out figure_5 PPO=... PAIR=...
    python tools/figures.py kl --out kl PPO=probe_ppo.jsonl PAIR=probe_pair.jsonl

An arm is NAME=RUN,RUN,...; a RUN is whatever `evaluate.py --compare` takes. Bars are 95 % intervals
over runs and episodes.

iterations   success in distribution and out of it against iterations: every episodes.jsonl in the
             folder RUN whose checkpoint is called checkpoint-ITERATION. Band: from the lowest run
             to the highest
distractors  success against the number of distractors: the splits train (1) and clutter-N
lambda       success in the OOD settings against lambda_inv, which is the arm's name
camera       success against the camera's angle: the splits train (0) and camera+N
kl           densities of KL(o, held-out tables) and KL(o, moved target) over frames: the first
             checkpoint and, for each arm, the last in files of `tools/probe_kl.py --records`
"""

import itertools
import json
import re
import sys
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib

matplotlib.use("Agg")  # draws into files, on a machine without a screen too

import matplotlib.pyplot as plt
import numpy as np
import tyro
from tyro.conf import Positional

import evaluate
from evaluate import METRICS, TRAINING_CAMERAS, rate, read_arms, read_records
from runtime import Fault, command_line, writing_to
from tools.tables import COLUMNS, columns_of

# Okabe and Ito's colours: told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
# Kinds of splits with a number: what number `train` stands for, what the number is.
NUMBERED = {
    "clutter": (1, "number of distractors (1: as in training)"),
    "camera": (0, f"camera turned by (degrees; training: up to {TRAINING_CAMERAS})"),
}


@dataclass
class Args:
    figure: Positional[Literal["iterations", "distractors", "lambda", "camera", "kl"]]
    """which figure"""
    arms: Positional[tuple[str, ...]]
    """NAME=RUN,RUN,... for each arm"""
    out: str = "figure"
    """path of the files without their ending"""
    metric: Literal["success_once", "success_at_end"] = METRICS[0]
    """what success is"""
    id_split: str = "train"
    """iterations: the split in distribution"""
    ood_split: str = "clutter-4"
    """iterations: the split out of distribution (paper: 4 distractors, half of them held out)"""


def panels(count: int):
    figure, axes = plt.subplots(
        1, count, figsize=(4.2 * count, 3.2), squeeze=False, layout="constrained"
    )
    for axis in axes[0]:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def save(figure, out: str):
    """PNG and PDF. The same records give the same bytes: no date is written."""
    with writing_to(Path(out)):
        figure.savefig(f"{out}.png", dpi=150)
        figure.savefig(f"{out}.pdf", metadata={"CreationDate": None})
    plt.close(figure)
    print(f"{out}.png {out}.pdf")


def draw(axis, xs, estimates, number=0, name=None, line="-"):
    """Rates with their intervals, joined by a line."""
    middle = np.array([100 * estimate.value for estimate in estimates])
    below = middle - [100 * estimate.low for estimate in estimates]
    above = [100 * estimate.high for estimate in estimates] - middle
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    style = dict(color=colour, marker=marker, markersize=4, capsize=2, linestyle=line)
    axis.errorbar(xs, middle, [below, above], label=name, **style)


def band(axis, xs, curves, colour):
    """From the lowest of the curves (R, T) to the highest."""
    axis.fill_between(xs, curves.min(0), curves.max(0), color=colour, alpha=0.2, lw=0)


def percent_axis(axis):
    axis.set(ylabel="success (%)", ylim=(0, 100))
    axis.legend(frameon=False)


def numbered_splits(outcomes, kind: str) -> dict[float, list]:
    """{number in the name of a split: its row}, in order."""
    rows, numbers = evaluate.rows_of_splits(outcomes), {}
    for split in outcomes.splits:
        match = re.fullmatch(kind + r"[-+](\d+(?:\.\d+)?)", split)
        if match or split == "train":
            number = float(match[1]) if match else NUMBERED[kind][0]
            numbers.setdefault(number, rows[split])
    return dict(sorted(numbers.items()))


# ------------------------------------------------------------------------------------ the figures
def success_by_iteration(run: str, splits: list[str], metric: str) -> tuple[dict, list]:
    """{iteration: success in each of the splits}, and the records of each evaluation."""
    by_iteration, everything = {}, []
    for file in sorted(Path(run).rglob("episodes.jsonl")):
        records = read_records(file)
        number = re.search(r"checkpoint-(\d+)/?$", records[0]["checkpoint"])
        if number is None or records[0]["ablate"] != "none":
            continue
        rates = []
        for split in splits:
            of_split = [record[metric] for record in records if record["split"] == split]
            if not of_split:
                raise Fault(f"{file} holds no episodes of {split}: evaluate that split, too")
            rates.append(100 * np.mean(of_split))
        if int(number[1]) in by_iteration:
            raise Fault(f"{run} holds two evaluations of checkpoint-{number[1]}: keep one")
        by_iteration[int(number[1])] = rates
        everything.append(records)
    if not by_iteration:
        raise Fault(f"{run} holds no episodes.jsonl of a checkpoint-ITERATION: evaluate some first")
    return by_iteration, everything


def figure_iterations(args: Args, arms: dict[str, list[str]]):
    splits = [args.id_split, args.ood_split]
    figure, axes = panels(2)
    records = {}
    for colour, (name, runs) in zip(itertools.cycle(COLOURS), arms.items()):
        of_runs, of_records = zip(*(success_by_iteration(r, splits, args.metric) for r in runs))
        records[name] = sum(of_records, [])
        iterations = sorted(set.intersection(*map(set, of_runs)))
        if not iterations:
            raise Fault(f"the runs of {name} were evaluated at no iteration that they all share")
        curves = np.array([[run[i] for i in iterations] for run in of_runs])  # (R, T, 2)
        label = f"{name} ({len(runs)} run{'s' * (len(runs) > 1)})"
        for axis, curve in zip(axes, np.moveaxis(curves, 2, 0)):
            axis.plot(iterations, curve.mean(0), "o-", color=colour, markersize=3, label=label)
            band(axis, iterations, curve, colour)
    evaluate.check_protocol(records)
    for axis, where, split in zip(axes, ("in", "out of"), splits):
        axis.set(title=f"{where} distribution ({split})", xlabel="iteration")
        percent_axis(axis)
    return figure


def figure_numbered(args: Args, arms: dict[str, list[str]], kind: str):
    """Every arm's success against the number in the name of a split."""
    outcomes = evaluate.read_aligned(arms)
    levels = numbered_splits(outcomes, kind)
    if len(levels) < 2:
        raise Fault(
            f"the records hold {', '.join(outcomes.splits)}: evaluate train and splits of "
            f"the kind {kind} too"
        )
    figure, (axis,) = panels(1)
    for number, (name, x) in enumerate(outcomes.success[args.metric].items()):
        draw(axis, list(levels), [rate(x, row) for row in levels.values()], number, name)
    axis.set(xticks=list(levels), xlabel=NUMBERED[kind][1])
    percent_axis(axis)
    return figure


def figure_distractors(args: Args, arms: dict[str, list[str]]):
    return figure_numbered(args, arms, "clutter")


def figure_camera(args: Args, arms: dict[str, list[str]]):
    figure = figure_numbered(args, arms, "camera")
    (axis,) = figure.axes
    if (last := axis.get_xticks()[-1]) > TRAINING_CAMERAS:
        axis.axvspan(TRAINING_CAMERAS + 2, last + 2, color="grey", alpha=0.15, lw=0)
        axis.text(last + 1.8, 2, "OOD", ha="right", color="dimgrey")
    return figure


def figure_lambda(args: Args, arms: dict[str, list[str]]):
    try:
        xs = [float(name) for name in arms]
    except ValueError:
        raise Fault("an arm's name is its lambda_inv here: write 0=RUN 1=RUN 2=RUN 4=RUN") from None
    outcomes = evaluate.read_aligned(arms)
    columns = {c: row for c, row in columns_of(outcomes).items() if c in COLUMNS[:-1]}
    if not columns:
        raise Fault(f"the records hold {', '.join(outcomes.splits)}: evaluate an OOD split too")
    figure, axes = panels(len(columns))
    success = dict(sorted(zip(xs, outcomes.success[args.metric].values()), key=itemgetter(0)))
    for axis, (column, row) in zip(axes, columns.items()):
        draw(axis, list(success), [rate(x, row) for x in success.values()])
        axis.set(title=column, xlabel="lambda_inv", xticks=xs, ylim=(0, 100), ylabel="success (%)")
    return figure


VIEWS = {
    "held_out_tables": "KL(o, held-out tables): to fall",
    "moved_target": "KL(o, moved target): to stay",
}


def read_kls(file: str) -> dict[str, dict[str, np.ndarray]]:
    """What `probe_kl.py --records` wrote -> {checkpoint: {view: KLs of all frames}}, in order."""
    kls = {}
    try:
        for line in Path(file).read_text().splitlines():
            record = json.loads(line)
            views = kls.setdefault(record["checkpoint"], {view: [] for view in VIEWS})
            for view in VIEWS:
                views[view] += record[view]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Fault(
            f"{file} cannot be read as KL records ({error}): write it with "
            "`tools/probe_kl.py --records`"
        ) from None
    if len(kls) < 2:
        raise Fault(f"{file} holds {len(kls)} checkpoints: probe the start and the end together")
    return {name: {view: np.array(kl) for view, kl in views.items()} for name, views in kls.items()}


def figure_kl(args: Args, arms: dict[str, list[str]]):
    files = {name: [read_kls(file) for file in runs] for name, runs in arms.items()}
    first = next(iter(files.values()))[0]
    sets = {f"before ({Path(next(iter(first))).name})": [next(iter(first.values()))]}
    sets |= {name: [list(kls.values())[-1] for kls in runs] for name, runs in files.items()}
    figure, axes = panels(2)
    colours = [COLOURS[-1], *COLOURS[:-1]]  # black: before
    for axis, (view, title) in zip(axes, VIEWS.items()):
        values = {n: np.concatenate([k[view] for k in ks]).clip(1e-6) for n, ks in sets.items()}
        ends = np.log10(np.quantile(np.concatenate(list(values.values())), [0.002, 0.998]))
        edges = np.logspace(ends[0] - 0.05, ends[1] + 0.05, 41)
        for colour, (name, kl) in zip(itertools.cycle(colours), values.items()):
            share = 100 * np.histogram(kl, edges)[0] / len(kl)
            axis.stairs(share, edges, color=colour, lw=1.5, label=name)
            axis.axvline(np.median(kl), color=colour, ls=":", lw=1)
        axis.set(title=title, xscale="log", xlabel="nats (dotted: median)", ylabel="frames (%)")
        axis.set_ylim(top=1.4 * axis.get_ylim()[1])  # room for the legend
        axis.legend(frameon=False, loc="upper left")
    return figure


DRAW = {
    "iterations": figure_iterations,
    "distractors": figure_distractors,
    "lambda": figure_lambda,
    "camera": figure_camera,
    "kl": figure_kl,
}


def main(args: Args):
    save(DRAW[args.figure](args, read_arms(args.arms)), args.out)


if __name__ == "__main__":
    command_line(lambda: main(tyro.cli(Args)))
