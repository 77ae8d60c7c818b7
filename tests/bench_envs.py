"""How fast is the simulator here? `python tests/bench_envs.py` prints a markdown table; both sides of every ratio in one run.

Each figure is the median of several short windows, the two sides of a ratio taken in turn, so that a change of the
machine's pace in mid-run meets both. Needs free cores: close what else is running. About three minutes.
"""
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gymnasium as gym
import numpy as np
import torch
import tyro

import envs  # sets LP_NUM_THREADS=0, for both sides
import sft
import views


@dataclass
class Args:
    seconds: float = 3.0
    """length of one window"""
    windows: int = 5
    """windows per figure; the median counts"""
    image_size: int = 0
    """pixels of the square pictures; 0: the pack's own"""
    num_workers: int = 2
    """processes of the many-process figure"""


def window(step, seconds: float) -> float:
    """Calls step() for `seconds`; returns how many units per second it did (step returns its units)."""
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        done += step()
    return done / (time.perf_counter() - start)


def medians(args: Args, **steps) -> dict[str, float]:
    """Units per second of each step function, windows taken in turn after one warm-up call each."""
    for step in steps.values():
        step()
    rates = [{name: window(step, args.seconds) for name, step in steps.items()} for _ in range(args.windows)]
    return {name: float(np.median([rate[name] for rate in rates])) for name in steps}


def builtin(vec: envs.VecEnv):
    """One env step of all scenes, episodes starting over when they end (their resets are part of the time)."""
    episode = [0]
    rng = np.random.default_rng(0)
    scale = np.array([0.03, 0.03, 0.03, 0.1, 0.1, 0.3, 1.0])

    def step():
        if vec.elapsed in (0, vec.max_episode_steps):
            vec.reset(range(episode[0], episode[0] + vec.num_envs))
            episode[0] += vec.num_envs
        vec.step(torch.from_numpy((rng.uniform(-1, 1, (vec.num_envs, 1, 7)) * scale).astype(np.float32)))
        return vec.num_envs

    vec.elapsed = 0
    return step


def pick_cube(size: int):
    """Plain ManiSkill: PickCube with an image and its segmentation at every step, nothing changed but the image's size."""
    env = gym.make("PickCube-v1", obs_mode="rgb+segmentation", num_envs=1, sim_backend="cpu", render_backend="cpu",
                   sensor_configs=dict(width=size, height=size))  # fmt: skip
    env.reset(seed=0)
    env.action_space.seed(0)
    count = [0]

    def step():
        if count[0] % 20 == 0:
            env.reset(seed=count[0])
        count[0] += 1
        obs = env.step(env.action_space.sample())[0]
        assert obs["sensor_data"]["base_camera"]["rgb"].shape == (1, size, size, 3)
        return 1

    return step


def demonstrations(size: int):
    """Runs of sft.collect on one scene in this process, frames included; counts those that succeed."""
    env = envs.make_env("builtin", size)
    episode = [0]

    def step():
        episode[0] += 1
        return int(sft.collect([env], "train", [episode[0]], 0.25, 0)[0]["success"])

    return step


def compositing(size: int, batch: int = 64):
    rgb = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8)
    mask, tables = torch.rand(batch, size, size) < 0.3, torch.randint(0, 256, (16, size, size, 3), dtype=torch.uint8)

    def step():
        views.task_preserving(rgb, mask, tables)
        return batch

    return step


def main(args: Args):
    torch.set_num_threads(1)
    size = args.image_size or envs.PACKS["builtin"].image_size
    options = dict(image_size=size)
    with (
        envs.make_envs(1, num_workers=1, **options) as plain,
        envs.make_envs(1, num_workers=1, alter=views.task_altering, **options) as one,
        envs.make_envs(args.num_workers, num_workers=args.num_workers, alter=views.task_altering, **options) as many,
    ):
        rate = medians(args, plain=builtin(plain), one=builtin(one), many=builtin(many), pick_cube=pick_cube(size),
                       demos=demonstrations(size), compose=compositing(size))  # fmt: skip
    n = args.num_workers
    rows = [
        ("`builtin`, image + altered view, one process", f"{rate['one']:.0f} env steps/s"),
        ("`builtin`, image only, one process", f"{rate['plain']:.0f} env steps/s"),
        (f"`builtin`, image + altered view, {n} processes", f"{rate['many']:.0f} env steps/s"),
        ("plain `PickCube-v1`, rgb+segmentation, one process", f"{rate['pick_cube']:.0f} env steps/s"),
        ("`builtin` with the altered view / `PickCube-v1`", f"{rate['one'] / rate['pick_cube']:.1f} x"),
        (f"{n} processes / one", f"{rate['many'] / rate['one']:.2f} x"),
        ("an altered view costs", f"{1000 / rate['one'] - 1000 / rate['plain']:.1f} ms"),
        ("a composite (Eq. 5) costs", f"{1000 / rate['compose']:.2f} ms"),
        ("successful demonstrations, one process", f"{60 * rate['demos']:.0f} per minute"),
    ]
    print(f"\n| {size} x {size} pixels, {len(os.sched_getaffinity(0))} cores | |\n|---|---|")
    for name, value in rows:
        print(f"| {name} | {value} |")


if __name__ == "__main__":
    args = tyro.cli(Args)
    try:
        main(args)
    except envs.Fault as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
