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

import tyro
from tyro.conf import Positional

from evaluate import (
    METRICS,
    Outcomes,
    align,
    difference,
    is_ood,
    markdown,
    percent,
    rate,
    read_arms,
    read_records,
    rows_of_splits,
    shift_of,
)
from runtime import Fault, command_line, write_text

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
    rows = rows_of_splits(outcomes)
    columns = {split: rows[split] for split in outcomes.splits if not is_ood(split)}
    ood = list(filter(is_ood, outcomes.splits))
    for kind in dict.fromkeys(map(shift_of, ood)):
        levels = [split for split in ood if shift_of(split) == kind]
        columns[kind] = [(1 / len(levels), rows[split][0][1]) for split in levels]
    if ood:
        columns["OOD average"] = rows["OOD average"]
    return columns


def objects_of(outcomes: Outcomes) -> dict[str, list]:
    """The mean over all episodes with one target object, in whatever split."""
    sentences = sorted(set(outcomes.instructions[outcomes.present]))
    return {
        sentence.removeprefix("put ").removesuffix(" on plate"): [
            (1.0, outcomes.present & (outcomes.instructions == sentence))
        ]
        for sentence in sentences
    }


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


def object_table(outcomes: Outcomes, metric: str) -> list[list[str]]:
    success = outcomes.success[metric]
    (first, a), *others = success.items()
    table = [["object", *success, *(f"{name} - {first}" for name, _ in others), "n"]]
    for name, row in objects_of(outcomes).items():
        rates = [percent(rate(x, row)) for x in success.values()]
        changes = [percent(difference(a, b, row), "+") for _, b in others]
        table.append([name, *rates, *changes, str(int(row[0][1].sum()))])
    return table


def csv_text(outcomes: Outcomes, family: str) -> str:
    rows = rows_of_splits(outcomes) | columns_of(outcomes)
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
                numbers = [100 * value for e in estimates for value in (e.value, e.low, e.high)]
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
    lines = [
        rf"\begin{{tabular}}{{l{'r' * (len(table[0]) - 1)}}}",
        r"\toprule",
        header,
        r"\midrule",
    ]
    return "\n".join([*lines, *rows, r"\bottomrule", r"\end{tabular}"])


def main(args: Args):
    paths = read_arms(args.arms)
    arms = {name: [read_records(run) for run in runs] for name, runs in paths.items()}
    outcomes = align(arms)
    backbone = next(iter(arms.values()))[0][0]["backbone"]
    family = "pi" if backbone.startswith("pi") else "openvla"
    episodes = outcomes.present.sum(0)
    per_split = " or ".join(map(str, sorted({int(n) for n in episodes})))
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
        parts += [f"**{metric}, by object (all splits)**", markdown(object_table(outcomes, metric))]
    text = "\n\n".join(parts)
    out = Path(args.out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for ending, content in (
            (".md", text + "\n"),
            (".csv", csv_text(outcomes, family)),
            (".tex", "\n".join(tex) + "\n"),
        ):
            write_text(out.with_name(out.name + ending), content)
    except OSError as error:
        raise Fault(f"cannot write to {out} ({error.strerror}): pass another --out") from None
    print(text)


if __name__ == "__main__":
    command_line(lambda: main(tyro.cli(Args)))
