"""How fast is the simulator here? `python tests/bench_envs.py` prints a markdown table; both sides of every ratio in one run.

Each figure is the median of several short windows, the two sides of a ratio taken in turn, so that a change of the
machine's pace in mid-run meets both. Needs free cores: close what else is running. About five minutes.

    python tests/bench_envs.py                   # against plain ManiSkill's PickCube-v1
    python tests/bench_envs.py --assets rl4vla   # against ManiSkill's PutCarrotOnPlateInScene-v1, read out as RL4VLA does
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")
if "PAIR_VLA_ASSETS" in os.environ:
    os.environ.setdefault("MS_ASSET_DIR", os.environ["PAIR_VLA_ASSETS"])  # where the env of comparison looks for its stage

import gymnasium as gym
import numpy as np
import torch
import tyro

import envs  # sets LP_NUM_THREADS=0, for both sides
import sft
import views


@dataclass
class Args:
    assets: str = "builtin"
    """asset pack: builtin or rl4vla"""
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


PLAYING = {}  # which step function each vector environment is in the middle of an episode for


def episodes(vec: envs.VecEnv, split: str = "train", chunk: int = 1):
    """One decision (`chunk` env steps) of all scenes, episodes starting over when they end (resets are part of the time)."""
    episode = [0]
    rng = np.random.default_rng(0)
    scale = np.array([0.03, 0.03, 0.03, 0.1, 0.1, 0.3, 1.0])

    def step():
        if PLAYING.get(vec) is not step or vec.elapsed == vec.max_episode_steps:
            PLAYING[vec] = step
            vec.reset(range(episode[0], episode[0] + vec.num_envs), split)
            episode[0] += vec.num_envs
        vec.step(torch.from_numpy((rng.uniform(-1, 1, (vec.num_envs, chunk, 7)) * scale).astype(np.float32)))
        return vec.num_envs

    return step


def plain_maniskill(assets: str, size: int):
    """Plain ManiSkill: an image and its segmentation at every step, as RL4VLA reads them (for its scene at 640 x 480)."""
    name, camera, options = {
        "builtin": ("PickCube-v1", "base_camera", dict(sensor_configs=dict(width=size, height=size))),
        "rl4vla": ("PutCarrotOnPlateInScene-v1", "3rd_view_camera", {}),
    }[assets]
    env = gym.make(name, obs_mode="rgb+segmentation", num_envs=1, sim_backend="cpu",
                   render_backend=envs.render_backend(), **options)  # fmt: skip
    env.reset(seed=0)
    env.action_space.seed(0)
    length = envs.PACKS[assets].max_episode_steps
    count = [0]

    def step():
        if count[0] % length == 0:
            env.reset(seed=count[0])
        count[0] += 1
        obs = env.step(0.05 * env.action_space.sample())[0]
        assert obs["sensor_data"][camera]["rgb"].ndim == 4
        return 1

    return name, step


def demonstrations(assets: str, size: int):
    """Runs of sft.collect on one scene in this process, frames included; counts those that succeed."""
    env = envs.make_env(assets, size)
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
    size, n = args.image_size or envs.find_pack(args.assets).image_size, args.num_workers
    name, plain_step = plain_maniskill(args.assets, size)

    def make(n, **views):
        return envs.make_envs(n, args.assets, num_workers=n, image_size=size, **views)

    with (
        make(1) as plain,
        make(1, alter=views.task_altering) as one,
        make(n, alter=views.task_altering) as many,
        make(1, preserve=views.rerendered) as drawn,
    ):
        rate = medians(
            args, plain=episodes(plain), clutter=episodes(plain, "clutter-8"), chunks=episodes(plain, chunk=5),
            one=episodes(one), many=episodes(many), drawn=episodes(drawn), maniskill=plain_step,
            demos=demonstrations(args.assets, size), compose=compositing(size),
        )  # fmt: skip
    pack = f"`{args.assets}`"
    rows = [
        (f"{pack}, image + altered view, one process", f"{rate['one']:.0f} env steps/s"),
        (f"{pack}, image only, one process", f"{rate['plain']:.0f} env steps/s"),
        (f"{pack}, image only, `clutter-8`, one process", f"{rate['clutter']:.0f} env steps/s"),
        (f"{pack}, an image every 5 steps, one process", f"{rate['chunks']:.0f} decisions/s"),
        (f"{pack}, image + altered view, {n} processes", f"{rate['many']:.0f} env steps/s"),
        (f"plain `{name}`, rgb+segmentation, one process", f"{rate['maniskill']:.0f} env steps/s"),
        (f"{pack} with the altered view / `{name}`", f"{rate['one'] / rate['maniskill']:.1f} x"),
        (f"{n} processes / one", f"{rate['many'] / rate['one']:.2f} x"),
        ("an altered view costs", f"{1000 / rate['one'] - 1000 / rate['plain']:.1f} ms"),
        ("a re-rendered o_pre costs", f"{1000 / rate['drawn'] - 1000 / rate['plain']:.1f} ms"),
        ("a composite (Eq. 5) costs", f"{1000 / rate['compose']:.2f} ms"),
        ("successful demonstrations, one process", f"{60 * rate['demos']:.0f} per minute"),
    ]
    print(f"\n| {size} x {size} pixels, {len(os.sched_getaffinity(0))} cores | |\n|---|---|")
    for row, value in rows:
        print(f"| {row} | {value} |")


if __name__ == "__main__":
    args = tyro.cli(Args)
    try:
        main(args)
    except envs.Fault as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
