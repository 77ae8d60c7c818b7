"""How fast is the simulator here? `python tools/bench_envs.py` prints a markdown table; both sides
of every ratio in one run.

Each figure is the median of several short windows, the two sides of a ratio taken in turn, so that
a change of the machine's pace in mid-run meets both. Needs free cores: close what else is running.
About five minutes.

    python tools/bench_envs.py                 # against plain ManiSkill's PickCube-v1
    python tools/bench_envs.py --assets rl4vla # against RL4VLA's PutCarrotOnPlateInScene-v1
    python tools/bench_envs.py --settings      # a step with a picture, one setting as ManiSkill's
    python tools/bench_envs.py --pair          # iterations without and with pairs, both worlds
"""

import itertools
import multiprocessing
import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")
if "PAIR_VLA_ASSETS" in os.environ:  # where the env of comparison looks for its stage
    os.environ.setdefault("MS_ASSET_DIR", os.environ["PAIR_VLA_ASSETS"])

import gymnasium as gym
import numpy as np
import torch
import tyro

import envs
import policies
import ppo_pair
import sft
import views
from runtime import command_line
from scenes import builtin
from scenes.task import PutOnPlate, render_backend  # sets LP_NUM_THREADS=0, for both sides


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
    """processes of the many-process figure, eight scenes in each"""
    settings: bool = False
    """print the table of settings instead (`builtin`)"""
    pair: bool = False
    """print the table of whole iterations instead (`openvla-tiny`, `openvla-flat`)"""


def window(step, seconds: float) -> float:
    """Calls step() for `seconds`; returns how many units per second it did (step returns its
    units)."""
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        done += step()
    return done / (time.perf_counter() - start)


def medians(args: Args, **steps) -> dict[str, float]:
    """Units per second of each step function, windows taken in turn after one warm-up call each."""
    for step in steps.values():
        step()
    rates = [
        {name: window(step, args.seconds) for name, step in steps.items()}
        for _ in range(args.windows)
    ]
    return {name: float(np.median([rate[name] for rate in rates])) for name in steps}


SCALE = np.array([0.03, 0.03, 0.03, 0.1, 0.1, 0.3, 1.0])  # of random actions
PLAYING = {}  # which step function each vector environment is in the middle of an episode for


def episodes(vec, split: str = "train", chunk: int = 1):
    """One decision (`chunk` env steps) of all scenes, episodes starting over when they end (resets
    are part of the time)."""
    episode = [0]
    rng = np.random.default_rng(0)

    def step():
        if PLAYING.get(vec) is not step or vec.elapsed == vec.max_episode_steps:
            PLAYING[vec] = step
            vec.reset(range(episode[0], episode[0] + vec.num_envs), split)
            episode[0] += vec.num_envs
        actions = rng.uniform(-1, 1, (vec.num_envs, chunk, 7)) * SCALE
        vec.step(torch.from_numpy(actions.astype(np.float32)))
        return vec.num_envs

    return step


def plain_maniskill(assets: str, size: int):
    """Plain ManiSkill: an image and its segmentation at every step, as RL4VLA reads them (for its
    scene at 640 x 480)."""
    name, camera, options = {
        "builtin": (
            "PickCube-v1",
            "base_camera",
            dict(sensor_configs=dict(width=size, height=size)),
        ),
        "rl4vla": ("PutCarrotOnPlateInScene-v1", "3rd_view_camera", {}),
    }[assets]
    env = gym.make(
        name,
        obs_mode="rgb+segmentation",
        num_envs=1,
        sim_backend="cpu",
        render_backend=render_backend(),
        **options,
    )
    env.reset(seed=0)
    env.action_space.seed(0)
    length = envs.find_pack(assets).max_episode_steps
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
    """sft.collect on one scene in this process, frames included, undisturbed; counts those that
    succeed."""
    env = envs.make_env(assets, size)
    episode = [0]

    def step():
        episode[0] += 1
        return int(sft.collect([env], "train", [episode[0]], 0.0, 0.0, 0)[0]["success"])

    return step


def compositing(size: int, batch: int = 64):
    rgb = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8)
    mask, tables = (
        torch.rand(batch, size, size) < 0.3,
        torch.randint(0, 256, (16, size, size, 3), dtype=torch.uint8),
    )

    def step():
        views.composite(rgb, mask, tables)
        return batch

    return step


SETTINGS = dict(
    ours="as it is",
    threads="Mesa draws in as many threads as there are cores",
    cores="the process may move between cores",
    meshes="the Panda's own meshes",
    shadow="a shadow",
    observation="ManiSkill's rgb+segmentation at every step",
)


def one_setting(conn, setting: str, args: Args):
    """A process: env steps/s of one scene, a picture after each, with one setting changed. Each
    message asks for a window."""
    torch.set_num_threads(1)
    if setting not in ("threads", "cores"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if setting == "meshes":
        builtin.LightPanda.urdf_path = builtin.Panda.urdf_path
    if setting == "shadow":

        def with_shadow(env, options):
            env.scene.set_ambient_light([0.3, 0.3, 0.3])
            for i in range(3):
                env.scene.add_directional_light([0.3, 0.2, -1], [1, 1, 1], shadow=i == 0)

        PutOnPlate._load_lighting = with_shadow
    size = args.image_size or envs.find_pack("builtin").image_size
    if setting == "observation":
        PutOnPlate.SUPPORTED_OBS_MODES = ("rgb+segmentation",)  # the first is what make_env takes
    env = envs.make_env("builtin", size)
    rng, count = np.random.default_rng(0), [0]

    def step():
        if count[0] % env.pack.max_episode_steps == 0:
            env.reset(seed=0, options=dict(episodes=[env.sample(count[0], "train")]))
        count[0] += 1
        env.step((rng.uniform(-1, 1, 7) * SCALE).astype(np.float32))
        if setting != "observation":
            env.picture()
        return 1

    step()
    while conn.recv():
        conn.send(window(step, args.seconds))


def settings_table(args: Args):
    context, pipes = multiprocessing.get_context("spawn"), {}
    for setting in SETTINGS:
        pipes[setting], theirs = context.Pipe()
        os.environ["LP_NUM_THREADS"] = (
            str(len(os.sched_getaffinity(0))) if setting == "threads" else "0"
        )
        context.Process(target=one_setting, args=(theirs, setting, args), daemon=True).start()

    def ask(pipe):
        pipe.send(True)
        return pipe.recv()

    for pipe in pipes.values():
        ask(pipe)  # starts up
    rates = [{setting: ask(pipe) for setting, pipe in pipes.items()} for _ in range(args.windows)]
    print("\n| one scene, one process, a picture at every step | ms per env step |\n|---|---|")
    for setting, description in SETTINGS.items():
        print(f"| {description} | {1000 / np.median([rate[setting] for rate in rates]):.1f} |")
    for pipe in pipes.values():
        pipe.send(False)


def iteration_seconds(args: Args, backbone: str):
    """Seconds of rollout and update of PPO, then of PAIR, taken in turn: (4,) medians."""
    pair = ppo_pair.preset(backbone, target_kl=0.0)  # no update ends early
    ppo = ppo_pair.preset(backbone, target_kl=0.0, inv_coef=0.0, sen_coef=0.0)
    policy = policies.load_policy(backbone, policies.default_checkpoint(backbone))
    policy.detach_value = pair.detach_value
    head = list(policy.value_head.parameters())
    actor = [p for p in policy.parameters() if all(p is not q for q in head)]
    optimizer = torch.optim.AdamW([dict(params=actor), dict(params=head)], lr=1e-6)
    make = partial(envs.make_envs, pair.num_envs, pair.assets)
    with make() as plain, make(alter=views.task_altering) as altered:
        tables, seconds = plain.backgrounds(), []
        for i in range(args.windows):
            row, ids = [], itertools.count(10_000 * i)
            for vec, one in ((plain, ppo), (altered, pair)):
                start = time.perf_counter()
                batch, _ = ppo_pair.rollout(one, policy, vec, ids, torch.device("cpu"))
                middle = time.perf_counter()
                ppo_pair.update(one, policy, optimizer, batch, tables)
                row += [middle - start, time.perf_counter() - middle]
            seconds.append(row)
    return np.median(seconds, 0), pair.num_envs * pair.num_steps


def iteration_table(args: Args):
    """Rollout and update of two presets, PPO and PAIR, each as often as there are windows."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    print("\n| seconds per iteration | rollout | update | together | env steps/s in the rollout |")
    print("|---|---|---|---|---|")
    for backbone in ("openvla-tiny", "openvla-flat"):
        (r0, u0, r1, u1), steps = iteration_seconds(args, backbone)
        print(f"| `{backbone}`, PPO | {r0:.1f} | {u0:.1f} | {r0 + u0:.1f} | {steps / r0:.0f} |")
        ratio = (r1 + u1) / (r0 + u0)
        print(
            f"| `{backbone}`, PAIR | {r1:.1f} | {u1:.1f} | {r1 + u1:.1f}: {ratio:.2f} x"
            f" | {steps / r1:.0f} |"
        )


def main(args: Args):
    if args.pair:
        return iteration_table(args)
    if args.settings:
        return settings_table(args)
    torch.set_num_threads(1)
    size, n = args.image_size or envs.find_pack(args.assets).image_size, args.num_workers
    name, plain_step = plain_maniskill(args.assets, size)

    def make(num_workers, scenes=1, **views):
        return envs.make_envs(
            scenes * num_workers, args.assets, num_workers=num_workers, image_size=size, **views
        )

    with (
        make(1) as plain,
        make(1, alter=views.task_altering) as one,
        make(1, 8, alter=views.task_altering) as eight,
        make(n, 8, alter=views.task_altering) as many,
        make(1, preserve=views.rerendered) as drawn,
    ):
        rate = medians(
            args,
            plain=episodes(plain),
            clutter=episodes(plain, "clutter-8"),
            chunks=episodes(plain, chunk=5),
            one=episodes(one),
            eight=episodes(eight),
            many=episodes(many),
            drawn=episodes(drawn),
            maniskill=plain_step,
            demos=demonstrations(args.assets, size),
            compose=compositing(size),
        )
    pack = f"`{args.assets}`"
    rows = [
        (f"{pack}, image + altered view, one process", f"{rate['one']:.0f} env steps/s"),
        (f"{pack}, image only, one process", f"{rate['plain']:.0f} env steps/s"),
        (f"{pack}, image only, `clutter-8`, one process", f"{rate['clutter']:.0f} env steps/s"),
        (f"{pack}, an image every 5 steps, one process", f"{rate['chunks']:.0f} decisions/s"),
        (
            f"{pack}, image + altered view, 8 scenes in one process",
            f"{rate['eight']:.0f} env steps/s",
        ),
        (
            f"{pack}, image + altered view, 8 scenes in each of {n} processes",
            f"{rate['many']:.0f} env steps/s",
        ),
        (f"plain `{name}`, rgb+segmentation, one process", f"{rate['maniskill']:.0f} env steps/s"),
        (f"{pack} with the altered view / `{name}`", f"{rate['one'] / rate['maniskill']:.1f} x"),
        (f"{n} processes / one, 8 scenes in each", f"{rate['many'] / rate['eight']:.2f} x"),
        ("an altered view costs", f"{1000 / rate['one'] - 1000 / rate['plain']:.1f} ms"),
        ("a re-rendered o_pre costs", f"{1000 / rate['drawn'] - 1000 / rate['plain']:.1f} ms"),
        ("a composite (Eq. 5) costs", f"{1000 / rate['compose']:.2f} ms"),
        ("successful demonstrations, one process", f"{60 * rate['demos']:.0f} per minute"),
    ]
    print(f"\n| {size} x {size} pixels, {len(os.sched_getaffinity(0))} cores | |\n|---|---|")
    for row, value in rows:
        print(f"| {row} | {value} |")


if __name__ == "__main__":
    command_line(lambda: main(tyro.cli(Args)))
