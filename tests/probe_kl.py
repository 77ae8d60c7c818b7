"""How far apart are a policy's actions on paired views? `python tests/probe_kl.py CHECKPOINT [CHECKPOINT ...]`

The first checkpoint plays `--episodes` episodes of `train` at temperature 1. Every checkpoint is then asked about those very
frames, actions and views, so that the rows differ by the weights alone. Mean KL in nats (over a decision's dimensions and
over frames) and its change against the first checkpoint: of the mean, in which a few frames weigh much,
and of a typical frame (the geometric mean), in %; both with 95 % intervals by a bootstrap over episodes:

held-out tables  o against Eq. (5) with the five tables that no training frame shows: what L_inv should lower
moved target     o against the target drawn elsewhere: what L_sen should keep up
unrelated        o against another episode's frame: falls too when a policy stops looking

--records FILE writes one JSON object per checkpoint and episode, with the KLs of its frames in order: what
`tools/figures.py kl` draws.
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

import envs
import policies
import views
from runtime import episode_ids, write_text

HELD_OUT_TABLES = [16, 17, 18, 19, 20]


@dataclass
class Args:
    checkpoints: Positional[tuple[str, ...]]
    """checkpoint directories; the first one plays"""
    episodes: int = 64
    """episodes of the split train"""
    backbone: str = "openvla-tiny"
    """of all checkpoints"""
    records: str = ""
    """where to write the KLs of every frame, as JSON lines"""


@torch.no_grad()
def main(args: Args):
    first = policies.load_policy(args.backbone, args.checkpoints[0])
    rounds = []  # of episodes, as many at once as one process can hold scenes: of each its (obs, instructions, rgb_pre, latent)
    ids = list(episode_ids("eval", 0, 0, args.episodes))
    torch.manual_seed(0)
    for start in range(0, args.episodes, 256):
        frames = []
        with envs.make_envs(
            len(ids[start : start + 256]), image_size=first.image_size, alter=views.task_altering
        ) as vec:
            obs, done = vec.reset(ids[start : start + 256], "train"), torch.tensor([False])
            shares = [(HELD_OUT_TABLES,)] + [([],)] * (vec.num_workers - 1)
            tables = torch.from_numpy(vec.map(views.render_backgrounds, *shares)[0])
            while not done.all():
                decision = first.act(obs, vec.instructions)
                generator = torch.Generator().manual_seed(len(frames))
                rgb_pre = views.task_preserving(obs["rgb"], obs["mask"], tables, generator)
                frames.append(
                    (
                        {k: v.clone() for k, v in obs.items()},
                        list(vec.instructions),
                        rgb_pre,
                        decision.latent,
                    )
                )
                obs, _, done, _ = vec.step(decision.actions)
        rounds.append(frames)
    print(f"{args.episodes} episodes, {args.episodes * len(rounds[0])} frames\n")
    print(
        "| checkpoint |"
        + "".join(
            f" {view} | change | typical |"
            for view in ("held-out tables", "moved target", "unrelated")
        )
    )
    print("|---" * 10 + "|")
    reference, rng = None, np.random.default_rng(0)
    resampled = rng.integers(args.episodes, size=(10_000, args.episodes))

    def interval(change):  # (N,) of episodes -> its mean, low, high
        return change.mean(), *np.quantile(change[resampled].mean(1), [0.025, 0.975])

    lines = []
    for directory in args.checkpoints:
        policy, kls = policies.load_policy(args.backbone, directory), []
        for frames in rounds:
            of_round = []
            for obs, instructions, rgb_pre, latent in frames:
                dist = policy.evaluate(obs, instructions, latent).dist
                others = [
                    {**obs, "rgb": rgb} for rgb in (rgb_pre, obs["rgb_alt"], obs["rgb"].roll(1, 0))
                ]
                of_round.append(
                    torch.stack(
                        [
                            policy.kl(dist, policy.evaluate(o, instructions, latent).dist)
                            for o in others
                        ]
                    )
                )
            kls.append(torch.stack(of_round, 1))
        kls = torch.cat(kls, 2).numpy()  # (3, T, N)
        for i, episode_id in enumerate(ids):
            names = zip(("held_out_tables", "moved_target", "unrelated"), kls[:, :, i])
            of_episode = {name: [float(f"{value:.4g}") for value in kl] for name, kl in names}
            lines.append(
                json.dumps({"checkpoint": directory, "episode_id": episode_id} | of_episode)
            )
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
    try:
        main(tyro.cli(Args))
    except (envs.Fault, policies.PolicyError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
