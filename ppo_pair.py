"""PAIR-VLA: PPO fine-tuning of a vision-language-action model, plus two KL losses on a pair of views of each frame.

    python ppo_pair.py                                        # openvla-tiny on a laptop CPU, nothing to download
    python ppo_pair.py --inv-coef 0 --sen-coef 0              # the PPO baseline: same code, no views
    python ppo_pair.py --resume runs/NAME                     # go on from its newest checkpoint
    torchrun --nproc-per-node 8 ppo_pair.py --backbone openvla

o_pre  same scene, other table, no distractors: the action distribution should stay       L_inv, Eq. (2)
o_alt  same instant, target elsewhere:          the action distribution should change     L_sen, Eq. (3)

One iteration: every environment plays whole episodes (rollout), advantages by GAE, then the update with Eq. (1)-(4).
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import envs as sim
import evaluate
import policies
import runtime
import sft
import views

RANK, WORLD = (
    int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1))
)  # torchrun's
LOCAL_RANK, LOCAL_WORLD = (
    int(os.environ.get(f"LOCAL_{name}", i)) for i, name in enumerate(("RANK", "WORLD_SIZE"))
)

# What depends on the backbone: Table 3 of the paper; learning rates are RL4VLA's, for pi0.5 RLinf's (lost in our text
# of the paper). The tiny presets are ours: README, "What it shows so far".
TABLE_3 = {
    "openvla": dict(
        assets="rl4vla", iterations=240, num_envs=128, num_steps=80, batch_size=640, update_epochs=1, learning_rate=1e-4,
        value_learning_rate=3e-3, inv_coef=1.0, sen_coef=0.2, sen_clip=0.8, pair_fraction=1.0, critic_warmup=0, target_kl=0.0,
        anneal_lr=False, detach_value=False, lora_rank=32, gradient_checkpointing=True, device_batch_size=128,
        max_grad_norm=10.0, detach_sen=False,
    ),
    "openvla-tiny": dict(
        assets="builtin", iterations=16, num_envs=64, num_steps=80, batch_size=640, update_epochs=1, learning_rate=1e-4,
        value_learning_rate=2e-3, inv_coef=2.5, sen_coef=0.12, sen_clip=0.8, pair_fraction=0.5, critic_warmup=3, target_kl=0.04,
        anneal_lr=True, detach_value=True, lora_rank=0, gradient_checkpointing=False, device_batch_size=160, max_grad_norm=10.0,
        detach_sen=False,
    ),
    "pi05": dict(
        assets="rl4vla", iterations=280, num_envs=320, num_steps=80, batch_size=5120, update_epochs=5, learning_rate=7.91e-6,
        value_learning_rate=1.55e-4, inv_coef=4.0, sen_coef=4.0, sen_clip=0.08, pair_fraction=1.0, critic_warmup=0,
        target_kl=0.0, anneal_lr=False, detach_value=False, lora_rank=32, gradient_checkpointing=True, device_batch_size=160,
        max_grad_norm=1.0, horizon=8, replan=5, denoise_steps=4, noise_level=0.5, sde_steps="one", detach_sen=False,
    ),
    "pi05-tiny": dict(
        assets="builtin", iterations=20, num_envs=64, num_steps=80, batch_size=256, update_epochs=2, learning_rate=4e-5,
        value_learning_rate=2e-3, inv_coef=15.0, sen_coef=6.0, sen_clip=0.08, pair_fraction=0.5, critic_warmup=3,
        anneal_lr=True, detach_value=True, lora_rank=0, gradient_checkpointing=False, device_batch_size=256, max_grad_norm=10.0,
        horizon=8, replan=5, denoise_steps=4, noise_level=0.5, sde_steps="one", detach_sen=True, target_kl=0.04,
    ),
}  # fmt: skip
TABLE_3["pi0"] = TABLE_3["pi05"] | dict(
    update_epochs=4, detach_value=True
)  # RLinf's differences; not in the paper


@dataclass
class Args:
    backbone: str = "openvla-tiny"
    """openvla-tiny, openvla, pi05-tiny, pi05 or pi0"""
    checkpoint: str | None = None
    """warm start: a directory, or OWNER/NAME[@REVISION] on the Hub (default: the backbone's; sft.py trains a tiny one's)"""
    unnorm_key: str | None = None
    """whose action statistics to use, a key of the checkpoint's norm_stats (default: the one it was trained with)"""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """of the backbone's weights; auto: bfloat16 on a GPU, float32 on a CPU and for a tiny backbone"""
    lora_rank: int | None = None
    """rank of the LoRA adapters; 0 trains every weight ("LoRA", Table 3; 32 is both ancestors', the paper's is lost)"""
    lora_alpha: int | None = None
    """the adapters' scale is alpha / rank (default: the rank, as RLinf; RL4VLA has 16)"""
    lora_targets: tuple[str, ...] | None = None
    """names of the layers that get an adapter (default: all linear layers, the ancestors' list; of pi0 the VLM's)"""
    tokenizer: str | None = None
    """pi0, pi05: PaliGemma's tokenizer.json (default: the one in the checkpoint)"""
    horizon: int | None = None
    """pi0, pi05: actions in a chunk ("Action horizon", Table 3)"""
    replan: int | None = None
    """pi0, pi05: how many of them are executed before the next decision (Table 3)"""
    denoise_steps: int | None = None
    """pi0, pi05: N, steps from noise to action (Table 3)"""
    noise_level: float | None = None
    """pi0, pi05: a, how much noise Flow-SDE adds (Table 3)"""
    sde_steps: Literal["one", "all"] | None = None
    """pi0, pi05: which denoise steps are stochastic in a rollout, one at random in each sample or all of them"""
    gradient_checkpointing: bool | None = None
    """recompute activations in the backward pass: less memory, half as much again to compute"""
    run_dir: str | None = None
    """where checkpoints and logs go (default: runs/BACKBONE_seedS_TIME)"""
    resume: str | None = None
    """run directory to go on with, under its own arguments; auto: --run-dir, or the newest in runs/; if none, start"""
    seed: int = 1
    """seed of everything"""
    cuda: bool = True
    """if toggled, the policy runs on the GPU where there is one"""
    track: bool = False
    """if toggled, log to Weights & Biases as well (needs `pip install wandb`)"""
    save_every: int = 10
    """save a checkpoint every K iterations, and at the end"""
    keep: int = 3
    """how many of the newest checkpoints stay on disk; the best one stays besides"""
    eval_episodes: int = 64
    """episodes per split in the table printed at the end; 0 skips it"""
    temperature_eval: float = 0.6
    """sampling temperature of that evaluation, as both ancestors have it"""

    # Algorithm specific arguments. None: the backbone's value in TABLE_3
    assets: str | None = None
    """asset pack: builtin (nothing to download) or rl4vla (the paper's)"""
    sim: Literal["cpu", "cuda", "auto"] = "cpu"
    """physics: worker processes on the CPU, or all scenes at once on the GPU; auto: the latter where it can be had"""
    pre_view: Literal["composite", "rerender", "camera"] = "composite"
    """o_pre: Eq. (5); the same drawn anew without distractors; or (5.5) from another camera, and then training episodes
    too have one each"""
    camera_range: float = 15.0
    """--pre-view camera: cameras turn by at most this many degrees in training (5.5; OPEN: the number is lost in our text)"""
    camera_step: float = 5.0
    """--pre-view camera: in steps of this many degrees (5.5; OPEN: likewise)"""
    iterations: int | None = None
    """number of rollouts, each followed by an update ("RL train steps", Table 3)"""
    num_envs: int | None = None
    """parallel environments, of all ranks together ("Parallel environments", Table 3)"""
    num_steps: int | None = None
    """environment steps per environment and iteration, a multiple of the episode length ("Interaction steps", Table 3)"""
    batch_size: int | None = None
    """decisions per optimizer step, of all ranks together ("Global batch size", Table 3)"""
    device_batch_size: int | None = None
    """decisions per forward pass in rollout and update; gradients (accumulated) do not depend on it, a rollout's noise does"""
    update_epochs: int | None = None
    """passes over each rollout (Table 3)"""
    learning_rate: float | None = None
    """AdamW's, of the policy"""
    value_learning_rate: float | None = None
    """AdamW's, of the value head"""
    anneal_lr: bool | None = None
    """if toggled, both fall linearly to zero over the iterations"""
    gamma: float = 0.99
    """the discount factor per decision (Table 3)"""
    gae_lambda: float = 0.95
    """the lambda of generalized advantage estimation (Table 3)"""
    clip_coef: float = 0.2
    """eps_ppo of Eq. (1) (Table 3)"""
    value_clip: float = 0.2
    """how far a value may move from the rollout's before its loss stops falling (RL4VLA)"""
    ent_coef: float = 0.0
    """coefficient of the entropy bonus"""
    max_grad_norm: float | None = None
    """the maximum norm of the gradient (RL4VLA 10, RLinf 1)"""
    target_kl: float | None = None
    """stop an iteration's update once approx KL(old || new) is above this; 0: never"""
    critic_warmup: int | None = None
    """first iterations in which only the value head learns: a critic that starts wrong sinks a warm-started policy"""
    detach_value: bool | None = None
    """if toggled, the value loss teaches the value head alone and not the backbone it reads"""
    inv_coef: float | None = None
    """lambda_inv of Eq. (4) (Table 3)"""
    sen_coef: float | None = None
    """lambda_sen of Eq. (4) (Table 3)"""
    sen_clip: float | None = None
    """eps_sen of Eq. (3) (Table 3)"""
    detach_sen: bool | None = None
    """if toggled, Eq. (3) teaches what to do at o_alt alone, and what to do at o stays PPO's (OPEN: the paper does not say)"""
    pair_fraction: float | None = None
    """share of the decisions, drawn anew in every epoch, over which Eq. (2) and (3) are averaged (the paper: all of them)"""


# What --resume may change: nothing that is learnt from; the device batch only changes which noise is drawn, and with
# --anneal-lr another number of iterations makes the rates fall towards another end
MAY_CHANGE = ("iterations", "resume", "cuda", "track", "save_every", "keep", "eval_episodes", "temperature_eval",
              "device_batch_size", "gradient_checkpointing")  # fmt: skip


def train_split(args) -> str:
    return (
        f"camera+-{args.camera_range:g}:{args.camera_step:g}"
        if args.pre_view == "camera"
        else "train"
    )


def gae(rewards, values, dones, gamma, gae_lambda):
    """Advantages and returns. rewards, dones (T, N): of step t, and whether the episode ended with it; values (T + 1, N)."""
    advantages = torch.zeros_like(rewards)
    lastgaelam = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        nextnonterminal = 1.0 - dones[t].float()
        delta = rewards[t] + gamma * values[t + 1] * nextnonterminal - values[t]
        advantages[t] = lastgaelam = delta + gamma * gae_lambda * nextnonterminal * lastgaelam
    return advantages, advantages + values[:-1]


def ppo_loss(newlogprob, oldlogprob, advantages, clip_coef):
    """-> loss (B,), ratio (B,). All arguments (B,) float32; a log-prob is the sum over a decision's action dimensions."""
    assert newlogprob.shape == oldlogprob.shape == advantages.shape and newlogprob.ndim == 1
    ratio = (newlogprob - oldlogprob).exp()
    # Eq. (1)  L_PPO = -E[ min(r A, clip(r, 1 - eps_ppo, 1 + eps_ppo) A) ] + value loss,   r = pi_new / pi_old
    return -torch.min(
        ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages
    ), ratio


def value_loss(newvalue, oldvalue, returns, value_clip):
    """(B,) Huber loss (delta 10) of the value, or of the value kept near the rollout's, whichever is worse (RL4VLA)."""
    assert newvalue.shape == oldvalue.shape == returns.shape and newvalue.ndim == 1
    clipped = oldvalue + (newvalue - oldvalue).clamp(-value_clip, value_clip)
    return torch.max(F.huber_loss(newvalue, returns, reduction="none", delta=10.0),
                     F.huber_loss(clipped, returns, reduction="none", delta=10.0))  # fmt: skip


def all_reduce(x):
    """The sum of a tensor over all ranks; alone, the tensor."""
    runtime.collective(dist.all_reduce, x)
    return x


def share(n):
    """This rank's part of n environments, as a range."""
    return range(n * RANK // WORLD, n * (RANK + 1) // WORLD)


def seed_all(*key):
    """Every iteration starts from seeds of its own, so a resumed run needs no random state from the one before."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # CUDA's, too


terminated = []  # not empty: SIGTERM came (Slurm, spot machines); rollout() looks at it


def rollout(args, policy, envs, episode_ids, device, exact=False):
    """Whole episodes in every environment -> batch, stats; or None, None where a rank is to stop.

    batch: obs (dict of (B, ...)), instructions (B str), latents, logprobs, values, advantages, returns (B,), B = T * N
    decisions, N environments of this rank. Advantages are normalised over those of all ranks, stats are theirs as well.
    episode_ids: an iterator over fresh ids. exact: see VecEnv.reset.
    """
    split, view_seconds = train_split(args), envs.view_seconds
    obs, instructions, latents, logprobs, values, rewards, dones, successes = (
        [],
        [],
        [],
        [],
        [],
        [],
        [],
        [],
    )
    for _ in range(args.num_steps // envs.max_episode_steps):
        next_obs = envs.reset(
            [next(episode_ids) for _ in range(envs.num_envs)], split, exact, args.seed
        )
        done = torch.tensor([False])
        while not done.all() and not terminated:
            next_obs = {k: v.to(device) for k, v in next_obs.items()}
            decision = act(policy, next_obs, envs.instructions, args.device_batch_size)
            obs.append(next_obs)
            instructions += envs.instructions
            latents.append(decision.latent)
            logprobs.append(decision.logprob)
            values.append(decision.value)
            next_obs, reward, done, info = envs.step(decision.actions)
            rewards.append(reward.to(device))
            dones.append(done.to(device))
            successes.append(info["success_once"])
    if all_reduce(torch.tensor([float(len(terminated))], device=device)) > 0:
        return None, None
    # OPEN: nothing follows the last step (RL4VLA). Adding the critic's guess of what would have come (RLinf) pays for
    # states from which success is merely possible.
    rewards, dones, values = torch.stack(rewards), torch.stack(dones), torch.stack(values)  # (T, N)
    advantages, returns = gae(
        rewards, torch.cat([values, values[:1]]), dones, args.gamma, args.gae_lambda
    )
    success = torch.stack(successes).to(device)[dones].double()
    a, y = (
        advantages.double(),
        returns.double(),
    )  # returns - values = advantages: the critic's errors
    sums = [torch.ones_like(a).sum(), a.sum(), (a**2).sum(), y.sum(), (y**2).sum(), success.sum(), rewards.double().sum(),
            torch.ones_like(success).sum()]  # fmt: skip
    n, a, aa, y, yy, success, reward, episodes = all_reduce(torch.stack(sums)).tolist()
    a_var, y_var = aa / n - (a / n) ** 2, yy / n - (y / n) ** 2
    batch = dict(
        obs={k: torch.cat([o[k] for o in obs]) for k in obs[0]},
        instructions=instructions,
        latents=torch.cat(latents),
        logprobs=torch.cat(logprobs),
        values=values.flatten(),
        advantages=((advantages - a / n) / (max(a_var, 0.0) ** 0.5 + 1e-5)).flatten(),
        returns=returns.flatten(),
    )
    stats = dict(success=success / episodes, reward=reward / episodes,
                 explained_variance=1 - a_var / y_var if y_var > 1e-12 else float("nan"),
                 view_seconds=envs.view_seconds - view_seconds)  # fmt: skip
    return batch, stats


def act(policy, obs, instructions, size):
    """policy.act for at most `size` observations at a time: the keys and values of all may not fit into memory."""
    parts = [
        policy.act({k: v[i : i + size] for k, v in obs.items()}, instructions[i : i + size])
        for i in range(0, len(instructions), size)
    ]
    return policies.Decision(*(torch.cat(part) for part in zip(*parts)))


def kl_to_altered(policy, dist, obs, instructions, latent, clip):
    """KL (B,) of `dist`, the distribution at o, from that at o_alt; those at the clip may lack a gradient, Eq. (3) has none.

    Many samples soon are at the clip, and a backward pass costs as much for a gradient of zero. So if fewer than 60 % are
    below it, the graph is dropped and those alone are run again. In forward passes per sample, with the fraction u below:
    1 + 2u instead of 2; with gradient checkpointing 1 + 3u instead of 3. At 60 % neither choice is far from the better.
    """
    obs = {**obs, "rgb": obs["rgb_alt"]}
    kl = policy.kl(dist, policy.evaluate(obs, instructions, latent).dist)
    below = (kl < clip).nonzero().squeeze(1)
    if len(below) >= 0.6 * len(kl):
        return kl
    kl = kl.detach()
    if len(below) == 0:
        return kl
    again = policy.evaluate(
        {k: v[below] for k, v in obs.items()},
        [instructions[i] for i in below.tolist()],
        latent[below],
    )
    return kl.index_put((below,), policy.kl(dist[below], again.dist))


def pair_kls(args, policy, dist, obs, instructions, latent, backgrounds):
    """KLs (B,) of `dist`, the distribution at o, from those at o_pre and o_alt -> dict: inv_kl, sen_kl (B,), if asked for."""
    if (
        len(instructions) == 0
    ):  # none was drawn here; every rank has the same statistics all the same
        return {
            name: dist.new_zeros(0)
            for name, coef in (("inv_kl", args.inv_coef), ("sen_kl", args.sen_coef))
            if coef
        }
    kls = {}
    if args.inv_coef:
        composite = args.pre_view == "composite"
        rgb_pre = (
            views.task_preserving(obs["rgb"], obs["mask"], backgrounds)
            if composite
            else obs["rgb_pre"]
        )
        with torch.no_grad():
            pre = policy.evaluate({**obs, "rgb": rgb_pre}, instructions, latent)
        # Eq. (2)  L_inv = E[ KL( pi(.|o,l) || sg pi(.|o_pre,l) ) ]
        kls["inv_kl"] = policy.kl(dist, pre.dist)
    if args.sen_coef:
        # Eq. (3)  L_sen = -E[ min( KL( pi(.|o,l) || pi(.|o_alt,l) ), eps_sen ) ]   OPEN: gradient on both sides?
        here = dist.detach() if args.detach_sen else dist
        kls["sen_kl"] = kl_to_altered(policy, here, obs, instructions, latent, args.sen_clip)
    return kls


def minibatches(args, num_steps, generator):
    """One epoch: yields this rank's decisions in a minibatch, which of them get the pair losses, and how many all ranks have.

    A minibatch takes as many decisions of one environment as of another (give or take one). So ranks have equal work, and
    what is in a minibatch does not depend on how many ranks there are.
    """
    mine, n = share(args.num_envs), num_steps * args.num_envs
    order = (
        torch.rand(num_steps, args.num_envs, generator=generator).argsort(0).flatten()
    )  # of each environment's steps
    paired = torch.rand(n, generator=generator) < args.pair_fraction
    env = torch.arange(n) % args.num_envs
    inds, ours = order * len(mine) + env - mine.start, (env >= mine.start) & (env < mine.stop)
    for start in range(0, n, args.batch_size):
        end = min(start + args.batch_size, n)
        yield inds[start:end][ours[start:end]], paired[start:end][ours[start:end]], end - start


def update(args, policy, optimizer, batch, backgrounds=None, value_only=False, generator=None):
    """PPO and the pair losses on one rollout, Eq. (1)-(4) -> dict of means over all samples it saw, on all ranks.

    generator: of the order of the samples, the same on all ranks.
    """
    device = batch["logprobs"].device
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p in optimizer.param_groups[0][
        "params"
    ]:  # the policy's; the other group is the value head's
        p.requires_grad_(not value_only)
    totals, ratio_dev, grad_norms, stop = 0.0, None, [], False
    for _ in range(
        args.update_epochs * (4 if value_only else 1)
    ):  # a critic alone can be fitted without fear
        for mb_inds, mb_paired, mb_size in minibatches(
            args, len(batch["logprobs"]) // len(share(args.num_envs)), generator
        ):
            sums = 0.0  # over this minibatch, of each statistic and of the samples it is of
            for inds, paired in zip(
                mb_inds.split(args.device_batch_size), mb_paired.split(args.device_batch_size)
            ):
                instructions = [batch["instructions"][i] for i in inds.tolist()]
                inds = inds.to(device)
                obs = {k: v[inds] for k, v in batch["obs"].items()}
                latent, oldlogprob = batch["latents"][inds], batch["logprobs"][inds]
                new = policy.evaluate(obs, instructions, latent)
                pg_loss, ratio = ppo_loss(
                    new.logprob, oldlogprob, batch["advantages"][inds], args.clip_coef
                )
                v_loss = value_loss(
                    new.value, batch["values"][inds], batch["returns"][inds], args.value_clip
                )
                if ratio_dev is None:
                    ratio_dev = (ratio - 1).abs().mean().item()
                    if ratio_dev > (
                        0.01 if policy.dtype == torch.float32 else 0.1
                    ):  # bfloat16: 0.03 in 32 layers
                        raise sim.Fault(f"update and rollout compute different log-probs (ratio off by {ratio_dev:.3f} "
                                        "before any step): the policy's act and evaluate disagree")  # fmt: skip
                loss = v_loss if value_only else pg_loss - args.ent_coef * new.entropy + v_loss
                stats = dict(pg_loss=pg_loss, v_loss=v_loss, entropy=new.entropy, clipfrac=(ratio - 1).abs() > args.clip_coef,
                             approx_kl=ratio - 1 - (new.logprob - oldlogprob))  # fmt: skip
                if (args.inv_coef or args.sen_coef) and not value_only:
                    pair = paired.nonzero().squeeze(1)
                    pair_instructions, pair = (
                        [instructions[i] for i in pair.tolist()],
                        pair.to(device),
                    )
                    kls = pair_kls(args, policy, new.dist[pair], {k: v[pair] for k, v in obs.items()}, pair_instructions,
                                   latent[pair], backgrounds)  # fmt: skip
                    # Eq. (4)  L = L_PPO + lambda_inv L_inv + lambda_sen L_sen
                    if args.inv_coef:
                        loss = loss.index_add(
                            0, pair, kls["inv_kl"], alpha=args.inv_coef / args.pair_fraction
                        )
                    if args.sen_coef:
                        sen = kls["sen_kl"].clamp(max=args.sen_clip)
                        loss = loss.index_add(
                            0, pair, sen, alpha=-args.sen_coef / args.pair_fraction
                        )
                        kls["sen_clipped"] = kls["sen_kl"] >= args.sen_clip
                    stats |= kls
                    for group, rows in policy.groups(latent[pair]).items():
                        stats |= {
                            f"{name}_{group}": kls[name][rows]
                            for name in ("inv_kl", "sen_kl")
                            if name in kls
                        }
                (loss.sum() / mb_size).backward()
                stats["loss"] = loss
                counts = torch.tensor([float(len(v)) for v in stats.values()], device=device)
                sums = sums + torch.stack(
                    [torch.stack([v.detach().float().sum() for v in stats.values()]), counts]
                )  # (2, K)
            if not grad_norms:
                check_gradients(policy, parameters)
            if WORLD > 1:  # one message per step: all statistics and all gradients
                parts = [sums, *(p.grad for p in parameters if p.grad is not None)]
                flat = all_reduce(torch.cat([part.flatten() for part in parts]))
                for part, total in zip(parts, flat.split([part.numel() for part in parts])):
                    part.copy_(total.view_as(part))
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            if not torch.isfinite(
                grad_norm + sums.sum()
            ):  # every rank sees it: a sum with nan or inf in it is one
                file = Path(args.run_dir) / f"nonfinite_rank{RANK}.pt"
                inds = mb_inds.to(device)
                torch.save(dict({k: v[inds].cpu() for k, v in batch["obs"].items()}, latents=batch["latents"][inds].cpu(),
                                instructions=[batch["instructions"][i] for i in mb_inds.tolist()]), file)  # fmt: skip
                raise sim.Fault("a loss, log-prob or gradient is not finite: stopped before the step, every checkpoint is from "
                                f"before; the minibatch is in {file}")  # fmt: skip
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            totals = totals + sums
            grad_norms.append(grad_norm)
            if args.target_kl:
                stop = sums[0, list(stats).index("approx_kl")] / mb_size > args.target_kl
            if stop:
                break
        if stop:
            break
    means = dict(zip(stats, (totals[0] / totals[1]).tolist()))
    return dict(
        means,
        ratio_dev=ratio_dev,
        grad_norm=torch.stack(grad_norms).mean().item(),
        updates=len(grad_norms),
    )


def check_gradients(policy, parameters):
    """A parameter that the optimizer lacks, or that the loss does not reach, would stay as it is without any error."""
    known = {id(p) for p in parameters}
    for name, p in policy.named_parameters():
        if p.requires_grad and (id(p) not in known or p.grad is None):
            reason = "gets no gradient" if id(p) in known else "is not on the optimizer"
            raise sim.Fault(
                f"the parameter {name} is to be trained but {reason}: freeze it, or use it in the loss"
            )


@torch.no_grad()
def unrelated_kl(policy, batch, n=64):
    """KL between the distributions of unrelated frames under one instruction and one set of tokens: falls to 0 for a
    policy that goes blind, which L_inv alone would reward."""
    inds = torch.linspace(0, len(batch["logprobs"]) - 1, 2 * n).long()
    instructions = [batch["instructions"][i] for i in inds[:n].tolist()] * 2
    inds = inds.to(batch["logprobs"].device)
    latent = torch.cat([batch["latents"][inds[:n]]] * 2)
    dist = policy.evaluate({k: v[inds] for k, v in batch["obs"].items()}, instructions, latent).dist
    return (all_reduce(policy.kl(dist[:n], dist[n:]).mean()) / WORLD).item()


def going_blind(kls, window=5):
    """kls: (inv_kl, sen_kl, unrelated_kl) of each iteration. True where the last `window` lie below a fifth of the first:
    L_inv's trivial minimum, in which all pictures look alike."""
    return len(kls) >= window and bool((np.mean(kls[-window:], 0) < 0.2 * np.array(kls[0])).all())


def check_weights(policy):
    """Nothing that is not finite may get into a checkpoint."""
    names, sums = zip(*((name, p.sum()) for name, p in policy.named_parameters()))
    finite = (
        torch.stack([s.float() for s in sums]).isfinite().tolist()
    )  # one wait for the GPU, not one per weight
    if not all(finite):
        name = names[finite.index(False)]
        raise sim.Fault(
            f"the weight {name} is not finite: resume from the last checkpoint, or start from another one"
        )


@torch.no_grad()
def check_sight(policy, obs, instructions):
    """A policy that does not see acts without any error (OpenVLA on newer transformers did): stop before it trains."""
    obs, instructions = {k: v[:4] for k, v in obs.items()}, instructions[:4]  # a few will do
    latent = policy.act(obs, instructions).latent
    black, white = (torch.full_like(obs["rgb"], v) for v in (0, 255))
    pairs = {"a black and a white image": (black, white)}
    if "rgb_alt" in obs:
        pairs["images with the target here and there"] = (obs["rgb"], obs["rgb_alt"])
    for what, pair in pairs.items():
        p, q = (policy.evaluate({**obs, "rgb": rgb}, instructions, latent).dist for rgb in pair)
        if policy.kl(p, q).max() < 1e-9:
            raise sim.Fault(f"the policy does not see: {what} give the same actions")


def save_checkpoint(run_dir, policy, args, trainer):
    """runs/NAME/checkpoint-ITERATION, which appears whole or not at all; `best` links to the best. -> its path"""
    path = run_dir / f"checkpoint-{trainer['iteration']:06d}"
    with policies.whole_directory(path) as directory:
        policy.save(directory)
        (directory / "args.json").write_text(json.dumps(vars(args), indent=2))
        buffer = io.BytesIO()  # a full disk is an OSError then
        torch.save(trainer, buffer)
        (directory / "trainer.pt").write_bytes(buffer.getbuffer())
    best = f"checkpoint-{trainer['best'][1]:06d}"
    link = run_dir / "best.partial"
    link.unlink(missing_ok=True)
    link.symlink_to(best)
    os.replace(link, run_dir / "best")
    for old in checkpoints(run_dir)[: -args.keep]:
        if old.name != best:
            shutil.rmtree(old.replace(old.with_name(old.name + ".partial")))
    return path


def checkpoints(run_dir: Path) -> list[Path]:
    return sorted(
        p for p in run_dir.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()
    )


def newest_checkpoint(run_dir: Path) -> Path:
    """The newest that is whole: every file in it has the hash it was saved with."""
    for path in reversed(checkpoints(run_dir)):
        try:
            policies.verify(path)
            return path
        except policies.PolicyError as error:
            print(f"{error} Going back to the checkpoint before.", file=sys.stderr)
    raise sim.Fault(f"--resume {run_dir}: there is no whole checkpoint-* directory in it")


def parse(command=None) -> Args:
    """The command line. --resume brings the run's own arguments, and whoever contradicts them is told so."""
    args = tyro.cli(Args, args=command)
    if args.resume == "auto":
        runs = [args.run_dir] if args.run_dir else [str(path) for path in Path("runs").glob("*")]
        runs = [run for run in runs if checkpoints(Path(run))]
        args.resume = (
            max(runs, key=lambda run: checkpoints(Path(run))[-1].stat().st_mtime) if runs else None
        )
    if args.resume:
        file = newest_checkpoint(Path(args.resume)) / "args.json"
        try:
            saved = {
                k: tuple(v) if isinstance(v, list) else v
                for k, v in json.loads(file.read_text()).items()
            }
            saved = Args(**{**saved, "run_dir": args.resume, "resume": args.resume})
        except TypeError as error:
            raise sim.Fault(f"{file} is of another version of this program ({error})")
        args = dataclasses.replace(tyro.cli(Args, args=command, default=saved), resume=args.resume)
        for name, value in vars(saved).items():
            if getattr(args, name) != value and name not in MAY_CHANGE:
                raise sim.Fault(f"--{name.replace('_', '-')} {getattr(args, name)}: the run in {args.resume} has {value}; "
                                "leave the flag out, or start another run")  # fmt: skip
    return args


def main(args: Args):
    if args.backbone not in TABLE_3:
        raise sim.Fault(f"unknown --backbone {args.backbone!r}: choose from {', '.join(TABLE_3)}")
    args = dataclasses.replace(
        args, **{k: v for k, v in TABLE_3[args.backbone].items() if getattr(args, k) is None}
    )
    for name in (
        "num_envs",
        "iterations",
        "batch_size",
        "device_batch_size",
        "update_epochs",
        "save_every",
        "keep",
    ):
        if getattr(args, name) < 1:
            raise sim.Fault(
                f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least 1"
            )
    if not 0 < args.pair_fraction <= 1:
        raise sim.Fault(
            f"--pair-fraction is {args.pair_fraction}: it must be above 0 and at most 1"
        )
    if WORLD > 1 and (args.num_envs < WORLD or args.batch_size % args.num_envs):
        raise sim.Fault(f"--num-envs {args.num_envs} and --batch-size {args.batch_size} cannot be shared by {WORLD} ranks: "
                        "each needs an environment, and the batch size must be a multiple of --num-envs")  # fmt: skip
    sim.parse_split(train_split(args))  # is --camera-range possible?
    args.sim = sim.choose_sim(args.sim)
    device = torch.device(
        f"cuda:{LOCAL_RANK}" if args.cuda and torch.cuda.is_available() else "cpu"
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if RANK == 0:  # the others wait for what it prepares
        name = f"{args.backbone}_seed{args.seed}_{time.strftime('%Y%m%d-%H%M%S')}"
        args.run_dir = args.run_dir or f"runs/{name}"
        try:
            Path(args.run_dir).mkdir(parents=True, exist_ok=True)
            (Path(args.run_dir) / "args.json").write_text(json.dumps(vars(args), indent=2))
        except OSError as error:
            raise sim.Fault(f"cannot write to --run-dir {args.run_dir}: {error.strerror}")
        if args.checkpoint is None and args.backbone.endswith("-tiny"):
            args.checkpoint = str(sft.warm_start(args.backbone))
    if WORLD > 1:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2)
        )
    box = [args]
    runtime.collective(dist.broadcast_object_list, box)
    args, run_dir = box[0], Path(box[0].run_dir)

    resumed = newest_checkpoint(run_dir) if args.resume else None
    seed_all(args.seed)
    policy = policies.load_policy(
        args.backbone, resumed or args.checkpoint, device=device, dtype=policies.DTYPES[args.dtype],
        unnorm_key=args.unnorm_key, lora_rank=args.lora_rank, lora_alpha=args.lora_alpha, lora_targets=args.lora_targets,
        gradient_checkpointing=args.gradient_checkpointing, tokenizer=args.tokenizer, horizon=args.horizon,
        replan=args.replan, denoise_steps=args.denoise_steps, noise_level=args.noise_level, sde_steps=args.sde_steps,
    )  # fmt: skip
    policy.detach_value = args.detach_value
    value_head = list(policy.value_head.parameters())
    actor = [
        p for p in policy.parameters() if p.requires_grad and all(p is not q for q in value_head)
    ]
    optimizer = torch.optim.AdamW(
        [
            dict(params=actor, lr=args.learning_rate),
            dict(params=value_head, lr=args.value_learning_rate),
        ]
    )
    # successes, kls: of every iteration; best: the highest mean of the last 8 successes at a checkpoint, and its iteration
    start, successes, kls, best = 0, [], [], (-1.0, 0)
    if resumed:
        trainer = torch.load(resumed / "trainer.pt", map_location=device, weights_only=True)
        optimizer.load_state_dict(trainer["optimizer"])
        print(f"going on from {resumed}", file=sys.stderr)
        start, successes, kls, best = (
            trainer[name] for name in ("iteration", "successes", "kls", "best")
        )
    writer = SummaryWriter(run_dir / "tensorboard", purge_step=start + 1) if RANK == 0 else None
    if args.track and RANK == 0:
        import wandb

        wandb.init(project="pair-vla", name=run_dir.name, config=vars(args), sync_tensorboard=True)
    shared = (
        torch.Generator()
    )  # of the order of the samples: the same on all ranks, where the others' numbers differ
    mine, complete = share(args.num_envs), start  # iterations

    def save():
        nonlocal best
        best = max(best, (float(np.mean(successes[-8:])), complete))
        trainer = dict(
            optimizer=optimizer.state_dict(),
            iteration=complete,
            successes=successes,
            kls=kls,
            best=best,
        )
        if RANK == 0:
            save_checkpoint(run_dir, policy, args, trainer)

    with sim.make_envs(len(mine), args.assets, sim=args.sim, image_size=policy.image_size,
                       num_workers=max(1, len(os.sched_getaffinity(0)) // LOCAL_WORLD),
                       alter=views.task_altering if args.sen_coef else None,
                       preserve=views.RENDERED[args.pre_view] if args.inv_coef else None) as envs:  # fmt: skip
        if args.num_steps % envs.max_episode_steps:
            raise sim.Fault(
                f"--num-steps {args.num_steps} must be a multiple of the episode length, {envs.max_episode_steps}"
            )
        backgrounds = (
            views.backgrounds(envs).to(device)
            if args.inv_coef and args.pre_view == "composite"
            else None
        )
        obs = {k: v.to(device) for k, v in envs.reset(mine).items()}
        check_weights(policy)
        check_sight(policy, obs, envs.instructions)
        rounds = args.num_steps // envs.max_episode_steps  # episodes per environment and iteration
        signal.signal(signal.SIGTERM, lambda *_: terminated.append(True))
        progress = tqdm(desc="iterations", initial=start, total=args.iterations, disable=RANK > 0)
        for iteration in range(start + 1, args.iterations + 1):
            t0 = time.time()
            seed_all(args.seed, iteration, RANK)
            shared.manual_seed(args.seed * 1_000_000 + iteration)
            first = args.seed * 1_000_000 + (iteration - 1) * rounds * args.num_envs
            ids = (first + i * args.num_envs + slot for i in range(rounds) for slot in mine)
            # Contacts that the simulator remembers would make a resumed run differ, by 1e-8 at first
            batch, stats = rollout(
                args, policy, envs, ids, device, exact=(iteration - 1) % args.save_every == 0
            )
            if batch is None:
                break
            t1 = time.time()
            warming = iteration <= args.critic_warmup
            fraction = 1 - (iteration - 1) / args.iterations if args.anneal_lr else 1.0
            for group, learning_rate in zip(
                optimizer.param_groups, (args.learning_rate, args.value_learning_rate)
            ):
                group["lr"] = fraction * learning_rate
            stats |= update(args, policy, optimizer, batch, backgrounds, warming, shared)
            check_weights(policy)
            if args.inv_coef or args.sen_coef:
                stats["unrelated_kl"] = unrelated_kl(policy, batch)
                if not warming:
                    kls.append(
                        [
                            stats[name]
                            for name in ("inv_kl", "sen_kl", "unrelated_kl")
                            if name in stats
                        ]
                    )
            t2 = time.time()
            decisions = len(batch["logprobs"]) * args.num_envs / len(mine)
            stats |= dict(
                rollout_seconds=t1 - t0,
                update_seconds=t2 - t1,
                decisions_per_second=decisions / (t2 - t0),
            )
            successes.append(stats["success"])
            complete = iteration
            if RANK == 0:
                try:
                    for name, value in stats.items():
                        writer.add_scalar(f"train/{name}", value, iteration)
                    writer.flush()
                except OSError as error:
                    raise sim.Fault(
                        f"the log in {run_dir} could not be written ({error}); no checkpoint is touched"
                    )
                tqdm.write(health_line(iteration, stats, successes[-8:], warming))
                progress.update()
            if going_blind(kls):
                raise sim.Fault("the policy is going blind: all KLs are below a fifth of their first values, also that between "
                                "unrelated frames: L_inv's trivial minimum. Lower --inv-coef")  # fmt: skip
            if iteration % args.save_every == 0 or iteration == args.iterations:
                save()
        if start < complete < args.iterations and complete % args.save_every:
            save()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    progress.close()
    if complete < args.iterations:
        if RANK == 0:
            then = (
                f"go on with: python ppo_pair.py --resume {run_dir}"
                if complete
                else "nothing is there to resume yet"
            )
            print(f"stopped by SIGTERM after iteration {complete}; {then}")
    elif args.eval_episodes:
        evaluate.main(evaluate.Args(checkpoint=str(checkpoints(run_dir)[-1]), num_episodes=args.eval_episodes,
                                    temperature=args.temperature_eval, sim=args.sim,
                                    num_envs=min(16, args.eval_episodes), cuda=args.cuda))  # fmt: skip
    if WORLD > 1:
        dist.destroy_process_group()


def health_line(iteration, stats, recent, warming) -> str:
    line = (
        f"{iteration:4d} success {stats['success']:.3f} (last {len(recent)}: {np.mean(recent):.3f}) "
        f"reward {stats['reward']:.3f} "
        f"ev {stats['explained_variance']:+.2f} ratio_dev {stats['ratio_dev']:.0e} clipfrac {stats['clipfrac']:.2f} "
        f"kl {stats['approx_kl']:.4f} entropy {stats['entropy']:.2f} grad {stats['grad_norm']:.2f} "
    )
    for name in ("inv_kl", "sen_kl", "sen_clipped", "unrelated_kl"):
        line += f"{name} {stats[name]:.3f} " if name in stats else ""
    line += f"| rollout {stats['rollout_seconds']:.1f} s (views {stats['view_seconds']:.1f}) "
    line += f"update {stats['update_seconds']:.1f} s "
    line += f"{stats['decisions_per_second']:.0f} decisions/s"
    return line + (" (critic warm-up)" if warming else "")


def command_line():
    try:
        main(parse())
    except (sim.Fault, policies.PolicyError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # once is enough
        print(
            "interrupted: every checkpoint saved so far is whole; go on with --resume RUN_DIR",
            file=sys.stderr,
        )
        sys.exit(130)


if __name__ == "__main__":
    command_line()
