"""A run's learning curves: `python tools/plot.py RUN [RUN ...]`, from the log.jsonl in each folder.

Success, both KLs, the KL between unrelated frames and the entropy against iterations, as PNG and
PDF: RUN/curves.png, or with several runs curves.png where you are, or --out.
"""

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
DASHES = ("-", "--")  # the second key of a panel is dashed


@dataclass
class Args:
    runs: Positional[tuple[str, ...]]
    """run directories"""
    out: str = ""
    """path of the files without their ending"""
    smooth: int = 8
    """success is drawn as the mean of this many iterations, as in the health line"""


def read_log(run: str) -> dict[str, tuple[list[int], list[float]]]:
    """RUN/log.jsonl -> {key: (iterations, values)}. A resumed run may log an iteration twice: the
    later line counts."""
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


def smoothed(values: list[float], width: int) -> np.ndarray:
    """The mean of the last `width` values at each point."""
    return np.array([np.mean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))])


def main(args: Args):
    if args.smooth < 1:
        raise Fault("--smooth must be at least 1")
    logs = {run: read_log(run) for run in args.runs}
    figure, axes = panels(len(PANELS))
    for axis, (title, keys) in zip(axes, PANELS.items(), strict=True):
        for number, (run, curves) in enumerate(logs.items()):
            colour = COLOURS[number % len(COLOURS)]
            for key, dash in zip(keys, DASHES, strict=False):
                if key not in curves:
                    continue
                xs, ys = curves[key]
                label = " ".join([Path(run).name] * (len(logs) > 1) + [key] * (len(keys) > 1))
                if key == "success":
                    axis.plot(xs, ys, color=colour, alpha=0.25, lw=1)
                    ys = smoothed(ys, args.smooth)
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
