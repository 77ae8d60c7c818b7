"""Tables 1 and 2 from records, beside the paper's, as markdown, CSV and LaTeX.

    python tools/tables.py PPO=runs/ppo_1,runs/ppo_2 PAIR=runs/pair_1,runs/pair_2    # Table 1
    python tools/tables.py --out results/table_2 PPO=... +inv=... +sen=... PAIR=...  # Table 2

An arm is NAME=RUN,RUN,..., and a RUN is whatever `evaluate.py --compare` takes: a run directory, a
checkpoint, or an episodes.jsonl. The first arm is what the others are compared with. The arms named
PPO, +inv, +sen and PAIR get the paper's row beside them, of the model of the same family.

Writes OUT.md (both success metrics, and the success with each object), OUT.csv (one line for each
arm, metric and row, every single split included) and OUT.tex (needs the package booktabs).
"""

import csv
import io
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import tyro
from tyro.conf import Positional

import evaluate
from evaluate import METRICS, Outcomes, difference, markdown, percent, rate
from runtime import command_line, write_text, writing_to

# Tables 1 and 2: unseen texture, lighting, pose, clutter, and their mean.
COLUMNS = ("texture", "lighting", "pose", "clutter", "OOD average")
PAPER = {
    ("openvla", "PPO"): (86.98, 72.14, 83.59, 68.88, 77.90),
    ("openvla", "PAIR"): (94.53, 80.47, 90.63, 82.36, 87.00),
    ("pi", "PPO"): (63.54, 28.54, 56.46, 36.46, 46.25),
    ("pi", "+inv"): (72.92, 44.58, 67.92, 50.00, 58.86),
    ("pi", "+sen"): (63.96, 33.54, 53.33, 41.10, 47.98),
    ("pi", "PAIR"): (80.21, 51.67, 69.38, 50.21, 62.87),
}


@dataclass
class Args:
    arms: Positional[tuple[str, ...]]
    """NAME=RUN,RUN,... for each arm; the first is the baseline"""
    out: str = "table"
    """path of the files without their ending"""


def columns_of(outcomes: Outcomes) -> dict[str, list]:
    """Splits in distribution, kinds of shift (clutter is the mean over its levels), OOD average."""
    rows, levels = evaluate.rows_of_splits(outcomes), {}
    for split in filter(evaluate.is_ood, outcomes.splits):
        levels.setdefault(evaluate.shift_of(split), []).append(rows[split][0][1])
    columns = {split: rows[split] for split in outcomes.splits if not evaluate.is_ood(split)}
    for kind, masks in levels.items():
        columns[kind] = [(1 / len(masks), mask) for mask in masks]
    if levels:
        columns["OOD average"] = rows["OOD average"]
    return columns


def objects_of(outcomes: Outcomes) -> dict[str, list]:
    """The mean over all episodes with one target object, in whatever split."""
    rows = {}
    for sentence in sorted(set(outcomes.instructions[outcomes.present])):
        name = sentence.removeprefix("put ").removesuffix(" on plate")
        rows[name] = [(1.0, outcomes.present & (outcomes.instructions == sentence))]
    return rows


def paper_value(family: str, arm: str, column: str) -> float | None:
    values = PAPER.get((family, arm))
    return values[COLUMNS.index(column)] if values and column in COLUMNS else None


def main_table(outcomes: Outcomes, metric: str, family: str) -> list[list[str]]:
    """A row per arm, and under it the paper's, where it has one (taken to be success_once)."""
    columns, success = columns_of(outcomes), outcomes.success[metric]
    last = list(columns)[-1]
    first, a = next(iter(success.items()))
    table = [["arm", *columns, f"{last} - {first}"]]
    for arm, x in success.items():
        cells = [percent(rate(x, row)) for row in columns.values()]
        change = "" if arm == first else percent(difference(a, x, columns[last]), "+")
        table.append([arm, *cells, change])
        if metric == "success_once" and (family, arm) in PAPER:
            values = [paper_value(family, arm, column) for column in columns]
            cells = ["" if value is None else f"{value:.2f}" for value in values]
            change = ""
            if arm != first and (family, first) in PAPER and last == "OOD average":
                change = f"{values[-1] - paper_value(family, first, last):+.2f}"
            table.append([f"{arm}, paper", *cells, change])
    return table


def csv_text(outcomes: Outcomes, family: str) -> str:
    rows = evaluate.rows_of_splits(outcomes) | columns_of(outcomes)
    rows |= {f"object: {name}": row for name, row in objects_of(outcomes).items()}
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["metric", "row", "arm", "runs", "n", "rate", "low", "high", "difference",
                     "difference_low", "difference_high", "paper"])  # fmt: skip
    for metric in METRICS:
        first, a = next(iter(outcomes.success[metric].items()))
        for name, row in rows.items():
            n = sum(int(mask.sum()) for _, mask in row)
            for arm, x in outcomes.success[metric].items():
                estimates = [rate(x, row)] + ([] if arm == first else [difference(a, x, row)])
                numbers = [100 * value for e in estimates for value in e]
                cells = [f"{number + 0.0:.2f}" for number in numbers] + [""] * (6 - len(numbers))
                paper = paper_value(family, arm, name) if metric == "success_once" else None
                writer.writerow([metric, name, arm, len(x), n, *cells, paper])
    return file.getvalue()


def latex(table: list[list[str]]) -> str:
    def escaped(cell):
        for character in "%_&#":
            cell = cell.replace(character, "\\" + character)
        value, bracket, interval = cell.partition(" [")
        return f"{value} {{\\scriptsize [{interval}}}" if bracket else cell

    header, *rows = [" & ".join(map(escaped, row)) + r" \\" for row in table]
    begin = rf"\begin{{tabular}}{{l{'r' * (len(table[0]) - 1)}}}"
    lines = [begin, r"\toprule", header, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines)


def main(args: Args):
    paths = evaluate.read_arms(args.arms)
    arms = {name: [evaluate.read_records(run) for run in runs] for name, runs in paths.items()}
    outcomes = evaluate.align(arms)
    backbone = next(iter(arms.values()))[0][0]["backbone"]
    family = "pi" if backbone.startswith("pi") else "openvla"
    per_split = " or ".join(map(str, np.unique(outcomes.present.sum(0))))
    runs = ", ".join(f"{name} {len(runs)}" for name, runs in arms.items())
    over = "runs and episodes" if max(map(len, arms.values())) > 1 else "episodes alone"
    note = (
        f"{backbone}. In per cent, with 95 % intervals over {over}. Runs: {runs}. Episodes per "
        f"split and run: {per_split}."
    )
    parts, tex = [note], [f"% {note}"]
    for metric in METRICS:
        table = main_table(outcomes, metric, family)
        parts += [f"**{metric}**", markdown(table)]
        tex += [f"% {metric}", latex(table)]
    for metric in METRICS:
        table = evaluate.compare_table(outcomes, metric, objects_of(outcomes), "object")
        parts += [f"**{metric}, by object (all splits)**", table]
    text = "\n\n".join(parts)
    out = Path(args.out)
    with writing_to(out):
        write_text(out.with_name(out.name + ".md"), text + "\n")
        write_text(out.with_name(out.name + ".csv"), csv_text(outcomes, family))
        write_text(out.with_name(out.name + ".tex"), "\n".join(tex) + "\n")
    print(text)


if __name__ == "__main__":
    command_line(lambda: main(tyro.cli(Args)))
