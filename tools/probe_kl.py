"""How far apart are a policy's actions on paired views? `python tools/probe_kl.py CHECKPOINT ...`

The first checkpoint plays `--episodes` episodes of `train` at temperature 1. Every checkpoint is
then asked about those very frames, actions and views, so that the rows differ by the weights alone.
Mean KL in nats (over a decision's dimensions and over frames) and its change against the first
checkpoint: of the mean, in which a few frames weigh much, and of a typical frame (the geometric
mean), in %. Both with 95 % intervals by a bootstrap over episodes.

held-out tables  o against Eq. (5) with the tables that no training frame shows: L_inv lowers it
moved target     o against the target drawn elsewhere: L_sen keeps it up
unrelated        o against another episode's frame: falls too when a policy stops looking
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import tyro
from tyro.conf import Positional

import evaluate
import policies
import views
from envs import find_pack, make_envs
from runtime import Fault, command_line, episode_ids, write_text


@dataclass
class Args:
    checkpoints: Positional[tuple[str, ...]]
    """checkpoint directories; the first one plays"""
    episodes: int = 64
    """episodes of the split train"""
    backbone: str = ""
    """of all checkpoints; default: the first one's, from its args.json"""
    assets: str = ""
    """asset pack; default: the first one's"""
    records: str = ""
    """where to write the KLs of every frame, as JSON lines: what `tools/figures.py kl` draws"""


@torch.no_grad()
def main(args: Args):
    if not args.checkpoints:
        raise Fault("nothing to compare: name the start, then other checkpoints")
    named = evaluate.Args(checkpoint=args.checkpoints[0], backbone=args.backbone)
    _, saved = evaluate.find_checkpoint(named)
    backbone, assets = saved["backbone"], evaluate.assets_of(args, saved)
    first, pack = policies.load_policy(backbone, args.checkpoints[0]), find_pack(assets)
    drawn = dict(image_size=first.image_size, resize=first.resize, alter=views.task_altering)
    rounds = []  # of episodes, as many as one process can hold scenes
    ids = episode_ids("eval", 0, 0, args.episodes)
    torch.manual_seed(0)
    for start in range(0, args.episodes, 256):
        part, frames = ids[start : start + 256], []
        with make_envs(len(part), assets, **drawn) as vec:
            obs, done = vec.reset(part, "train"), torch.tensor([False])
            tables = vec.backgrounds(range(pack.train_tables, pack.num_tables))
            while not done.all():
                decision = first.act(obs, vec.instructions)
                with torch.random.fork_rng():
                    torch.manual_seed(len(frames))
                    rgb_pre = views.composite(obs["rgb"], obs["mask"], tables)
                obs = {k: v.clone() for k, v in obs.items()}
                frames.append((obs, list(vec.instructions), rgb_pre, decision.latent))
                obs, _, done, _ = vec.step(decision.actions)
        rounds.append(frames)
    print(f"{args.episodes} episodes, {args.episodes * len(rounds[0])} frames\n")
    names = ("held-out tables", "moved target", "unrelated")
    print("| checkpoint |" + "".join(f" {name} | change | typical |" for name in names))
    print("|---" * 10 + "|")
    reference, rng = None, np.random.default_rng(0)
    resampled = rng.integers(args.episodes, size=(10_000, args.episodes))

    def interval(change):  # (N,) of episodes -> its mean, low, high
        return change.mean(), *np.quantile(change[resampled].mean(1), [0.025, 0.975])

    lines = []
    for directory in args.checkpoints:
        policy, kls = policies.load_policy(backbone, directory), []
        for frames in rounds:
            of_round = []
            for obs, instructions, rgb_pre, latent in frames:
                here, kl = policy.evaluate_actions(obs, instructions, latent).dist, []
                for rgb in (rgb_pre, obs["rgb_alt"], obs["rgb"].roll(1, 0)):
                    there = policy.evaluate_actions({**obs, "rgb": rgb}, instructions, latent)
                    kl.append(policy.kl(here, there.dist))
                of_round.append(torch.stack(kl))
            kls.append(torch.stack(of_round, 1))
        kls = torch.cat(kls, 2).numpy()  # (3, T, N)
        for i, episode_id in enumerate(ids):
            record = {"checkpoint": directory, "episode_id": episode_id}
            for name, kl in zip(names, kls[:, :, i]):
                key = name.replace("-", "_").replace(" ", "_")
                record[key] = [float(f"{value:.4g}") for value in kl]
            lines.append(json.dumps(record))
        if args.records:
            write_text(Path(args.records), "\n".join(lines) + "\n")
        reference = kls if reference is None else reference
        cells = []
        for kl, was in zip(kls, reference):
            change, low, high = interval((kl - was).mean(0))
            typical = 100 * np.expm1(interval(np.log((kl + 1e-6) / (was + 1e-6)).mean(0)))
            cells += [
                f"{kl.mean():.4f}",
                f"{change:+.4f} [{low:+.4f}, {high:+.4f}]",
                "{:+.1f} [{:+.1f}, {:+.1f}] %".format(*typical),
            ]
        print(f"| {directory} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    command_line(lambda: main(tyro.cli(Args)))
