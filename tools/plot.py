"""A run's learning curves: `python tools/plot.py RUN [RUN ...]`, from the log.jsonl in each folder.

Success, both KLs, the KL between unrelated frames and the entropy against iterations, as PNG and
PDF: RUN/curves.png, or with several runs curves.png where you are, or --out.
"""

import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import tyro
from tyro.conf import Positional

from runtime import Fault, command_line
from tools.figures import COLOURS, panels, save

# One panel each: title, and the keys of log.jsonl. A curve that no run has logged is left out.
PANELS = {
    "success": ("success",),
    "KL to the pair": ("inv_kl", "sen_kl"),
    "KL between unrelated frames": ("unrelated_kl",),
    "entropy": ("entropy",),
}


@dataclass
class Args:
    runs: Positional[tuple[str, ...]]
    """run directories"""
    out: str = ""
    """path of the files without their ending"""
    smooth: int = 8
    """success is drawn as the mean of this many iterations, as in the health line"""


def read_log(run: str) -> dict[str, tuple[list[int], list[float]]]:
    """RUN/log.jsonl -> {key: (iterations, values)}. A later line of an iteration counts."""
    file, lines = Path(run) / "log.jsonl", {}
    try:
        for line in file.read_text().splitlines():
            record = json.loads(line)
            lines[int(record["iteration"])] = record
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Fault(
            f"{file} cannot be read as a run's log ({error}): name a run of ppo_pair.py"
        ) from None
    if not lines:
        raise Fault(f"{file} is empty: let the run finish an iteration first")
    curves = {}
    for iteration in sorted(lines):
        for key, value in lines[iteration].items():
            xs, ys = curves.setdefault(key, ([], []))
            xs.append(iteration)
            ys.append(value)
    return curves


def main(args: Args):
    if not args.runs:
        raise Fault("nothing to draw: name a run")
    if args.smooth < 1:
        raise Fault("--smooth must be at least 1")
    logs = {run: read_log(run) for run in args.runs}
    figure, axes = panels(len(PANELS))
    for axis, (title, keys) in zip(axes, PANELS.items()):
        for colour, (run, curves) in zip(itertools.cycle(COLOURS), logs.items()):
            for key, dash in zip(keys, ("-", "--")):
                if key not in curves:
                    continue
                xs, ys = curves[key]
                label = " ".join([Path(run).name] * (len(logs) > 1) + [key] * (len(keys) > 1))
                if key == "success":
                    axis.plot(xs, ys, color=colour, alpha=0.25, lw=1)
                    ends = range(1, len(ys) + 1)
                    ys = [np.mean(ys[max(0, end - args.smooth) : end]) for end in ends]
                axis.plot(xs, ys, dash, color=colour, lw=1.5, label=label or None)
        axis.set(title=title, xlabel="iteration")
        if title != "success":
            axis.set_ylabel("nats")
        if title.startswith("KL"):
            axis.set_ylim(bottom=0)  # so that a small fall looks small
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize="small")
    axes[0].set_ylim(0, 1)
    alone = str(Path(args.runs[0]) / "curves")
    save(figure, args.out or (alone if len(args.runs) == 1 else "curves"))


if __name__ == "__main__":
    command_line(lambda: main(tyro.cli(Args)))
