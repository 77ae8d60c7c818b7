"""How fast is the simulator here? Prints a markdown table, both sides of every ratio in one run.

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
from contextlib import ExitStack
from dataclasses import dataclass
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
from evaluate import markdown
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
    settings: bool = False
    """print the table of settings instead (`builtin`)"""
    pair: bool = False
    """print the table of whole iterations instead (`openvla-tiny`, Flatland)"""


def window(steps, seconds: float) -> float:
    """Units per second over `seconds`. steps: an iterator that does some and yields how many."""
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        done += next(steps)
    return done / (time.perf_counter() - start)


def medians(args: Args, **steps) -> dict[str, float]:
    """Units per second of each iterator, windows taken in turn after a warm-up."""
    for each in steps.values():
        next(each)
    rates = [
        {name: window(each, args.seconds) for name, each in steps.items()}
        for _ in range(args.windows)
    ]
    return {name: float(np.median([rate[name] for rate in rates])) for name in steps}


def random_actions(*shape: int) -> np.ndarray:
    scale = [0.03, 0.03, 0.03, 0.1, 0.1, 0.3, 1.0]
    return (np.random.uniform(-1, 1, (*shape, 7)) * scale).astype(np.float32)


def episodes(vec, split: str = "train", chunk: int = 1):
    """Env steps (decisions of `chunk` of them) of all scenes, resets among them."""
    for first in itertools.count(0, vec.num_envs):
        vec.reset(range(first, first + vec.num_envs), split)
        while vec.elapsed < vec.max_episode_steps:
            vec.step(torch.from_numpy(random_actions(vec.num_envs, chunk)))
            yield vec.num_envs


def plain_maniskill(name: str, size: int, length: int):
    """Plain ManiSkill: an image and its segmentation at every step, as RL4VLA reads them (its scene
    at 640 x 480)."""
    camera, options = "3rd_view_camera", {}
    if name == "PickCube-v1":
        camera, options = "base_camera", dict(sensor_configs=dict(width=size, height=size))
    common = dict(num_envs=1, sim_backend="cpu", render_backend=render_backend())
    env = gym.make(name, obs_mode="rgb+segmentation", **common, **options)
    env.action_space.seed(0)
    for count in itertools.count():
        if count % length == 0:
            env.reset(seed=count)
        obs = env.step(0.05 * env.action_space.sample())[0]
        assert obs["sensor_data"][camera]["rgb"].ndim == 4
        yield 1


def demonstrations(assets: str, size: int):
    """sft.collect on one scene in this process, undisturbed: demonstrations that succeed."""
    env = envs.make_env(assets, size)
    for episode_id in itertools.count(1):
        yield int(sft.collect([env], "train", [episode_id], 0.0, 0.0, 0)[0]["success"])


def compositing(size: int, batch: int = 64):
    rgb, tables = (torch.randint(256, (n, size, size, 3), dtype=torch.uint8) for n in (batch, 16))
    mask = torch.rand(batch, size, size) < 0.3
    while True:
        views.composite(rgb, mask, tables)
        yield batch


SETTINGS = dict(
    ours="as it is",
    threads="Mesa draws in as many threads as there are cores",
    cores="the process may move between cores",
    meshes="the Panda's own meshes",
    shadow="a shadow",
    observation="ManiSkill's rgb+segmentation at every step",
)


def pictured_steps(env, draw: bool):
    """Env steps of one scene, a picture after each."""
    for count in itertools.count():
        if count % env.pack.max_episode_steps == 0:
            env.reset(seed=0, options=dict(episodes=[env.sample(count, "train")]))
        env.step(random_actions())
        if draw:
            env.picture()
        yield 1


def one_setting(conn, setting: str, seconds: float):
    """A process: env steps/s with one setting changed. Each message asks for a window."""
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
    if setting == "observation":
        PutOnPlate.SUPPORTED_OBS_MODES = ("rgb+segmentation",)  # the first is what make_env takes
    steps = pictured_steps(envs.make_env("builtin"), draw=setting != "observation")
    next(steps)
    while conn.recv():
        conn.send(window(steps, seconds))


def settings_table(args: Args):
    context, pipes = multiprocessing.get_context("spawn"), {}
    for setting in SETTINGS:
        pipes[setting], theirs = context.Pipe()
        threads = len(os.sched_getaffinity(0)) if setting == "threads" else 0
        os.environ["LP_NUM_THREADS"] = str(threads)
        how = (theirs, setting, args.seconds)
        context.Process(target=one_setting, args=how, daemon=True).start()

    def ask(pipe):
        pipe.send(True)
        return pipe.recv()

    for pipe in pipes.values():
        ask(pipe)  # starts up
    rates = [[ask(pipe) for pipe in pipes.values()] for _ in range(args.windows)]
    rows = [["one scene, one process, a picture at every step", "ms per env step"]]
    for description, rate in zip(SETTINGS.values(), np.median(rates, 0)):
        rows.append([description, f"{1000 / rate:.1f}"])
    print(markdown(rows))
    for pipe in pipes.values():
        pipe.send(False)


def iteration_seconds(args: Args, backbone: str):
    """Seconds of rollout and update of PPO, then of PAIR, taken in turn: (4,) medians."""
    # No update ends early, and next to nothing is learnt
    how = dict(target_kl=0.0, learning_rate=1e-6, value_learning_rate=1e-6)
    pair = ppo_pair.preset(backbone, **how)
    ppo = ppo_pair.preset(backbone, **how, inv_coef=0.0, sen_coef=0.0)
    policy = policies.load_policy(backbone, policies.default_checkpoint(backbone))
    policy.detach_value = pair.detach_value
    optimizer = ppo_pair.make_optimizer(pair, policy)
    seconds = []
    with envs.make_envs(pair.num_envs, pair.assets, alter=views.task_altering) as vec:
        tables, altered = vec.backgrounds(), vec.views
        vec.reset(range(vec.num_envs))  # the first pictures take longer
        for i in range(args.windows):
            row, ids = [], itertools.count(10_000 * i)
            # The same scenes for both: workers of a second set would find the cores taken
            for drawn, one in (({}, ppo), (altered, pair)):
                vec.views = drawn
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
    rows = [
        ["seconds per iteration", "rollout", "update", "together", "env steps/s in the rollout"]
    ]
    for backbone in ("openvla-tiny", "openvla-flat", "pi05-flat"):
        (r0, u0, r1, u1), steps = iteration_seconds(args, backbone)
        ratio = f": {(r1 + u1) / (r0 + u0):.2f} x"
        for name, rollout, update, more in (("PPO", r0, u0, ""), ("PAIR", r1, u1, ratio)):
            seconds = [f"{rollout:.1f}", f"{update:.1f}", f"{rollout + update:.1f}{more}"]
            rows.append([f"`{backbone}`, {name}", *seconds, f"{steps / rollout:.0f}"])
    print(markdown(rows))


def main(args: Args):
    if args.pair:
        return iteration_table(args)
    if args.settings:
        return settings_table(args)
    torch.set_num_threads(1)
    pack = envs.find_pack(args.assets)
    size = pack.image_size
    plain = {"builtin": "PickCube-v1", "rl4vla": "PutCarrotOnPlateInScene-v1"}[args.assets]

    def make(num_workers=1, scenes=1, **drawn):
        vec = envs.make_envs(
            scenes * num_workers, args.assets, num_workers=num_workers, image_size=size, **drawn
        )
        return opened.enter_context(vec)

    with ExitStack() as opened:
        altered = dict(alter=views.task_altering)
        rate = medians(
            args,
            plain=episodes(make()),
            clutter=episodes(make(), "clutter-8"),
            chunks=episodes(make(), chunk=5),
            one=episodes(make(**altered)),
            eight=episodes(make(1, 8, **altered)),
            many=episodes(make(2, 8, **altered)),
            drawn=episodes(make(preserve=views.rerendered)),
            maniskill=plain_maniskill(plain, size, pack.max_episode_steps),
            demos=demonstrations(args.assets, size),
            compose=compositing(size),
        )
    ms = {name: 1000 / each for name, each in rate.items()}
    rows = [
        [f"`{args.assets}`, {size} x {size} pixels, {len(os.sched_getaffinity(0))} cores", ""],
        ["image + altered view, one process", f"{rate['one']:.0f} env steps/s"],
        ["image only", f"{rate['plain']:.0f} env steps/s"],
        ["image only, `clutter-8`", f"{rate['clutter']:.0f} env steps/s"],
        ["an image every 5 steps", f"{rate['chunks']:.0f} decisions/s"],
        ["image + altered view, 8 scenes", f"{rate['eight']:.0f} env steps/s"],
        ["the same in each of 2 processes", f"{rate['many']:.0f} env steps/s"],
        [f"plain `{plain}`, rgb+segmentation", f"{rate['maniskill']:.0f} env steps/s"],
        ["image + altered view / plain", f"{rate['one'] / rate['maniskill']:.1f} x"],
        ["2 processes / one, 8 scenes in each", f"{rate['many'] / rate['eight']:.2f} x"],
        ["an altered view costs", f"{ms['one'] - ms['plain']:.1f} ms"],
        ["a re-rendered o_pre costs", f"{ms['drawn'] - ms['plain']:.1f} ms"],
        ["a composite (Eq. 5) costs", f"{ms['compose']:.2f} ms"],
        ["successful demonstrations", f"{60 * rate['demos']:.0f} per minute"],
    ]
    print(markdown(rows))


if __name__ == "__main__":
    command_line(lambda: main(tyro.cli(Args)))
