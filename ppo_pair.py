"""PAIR-VLA: PPO fine-tuning of a vision-language-action model with two losses on paired views.

    python ppo_pair.py                                  # pi05-tiny on a laptop CPU
    python ppo_pair.py --inv-coef 0 --sen-coef 0        # the PPO baseline: same code, no views
    python ppo_pair.py --backbone pi05-flat             # no simulator: 32 x 32 pixels, 1 minute
    python ppo_pair.py --resume runs/NAME               # go on from its newest checkpoint
    torchrun --nproc-per-node 8 ppo_pair.py --backbone openvla

Every frame comes in three pictures, and the policy is a distribution pi(.|picture, instruction):

    o      what the camera sees
    o_pre  the same scene on another table, without distractors: pi should stay     L_inv, Eq. (2)
    o_alt  the same instant with the target elsewhere:           pi should change   L_sen, Eq. (3)

One iteration: every environment plays whole episodes (rollout), advantages by GAE (gae), then
PPO and both losses on minibatches (update). Views are made in views.py, log-probs and KLs in
policies.py. What every long run needs and no paper describes is in runtime.py.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

import evaluate
import policies
import runtime
import views
from envs import choose_sim, find_pack, make_envs, parse_split

# ------------------------------------------------------------------------------------------ presets
# Table 3 of the paper, and what it leaves open. A row per flag, a column per backbone.
# fmt: off
BACKBONES = ("openvla", "pi05", "pi0", "openvla-tiny", "pi05-tiny", "openvla-flat", "pi05-flat")
PRESETS = {
    # the paper's (Table 3). It has no pi0: that column is pi0.5's with RLinf's differences.
    "iterations":             (240,      280,      280,      12,        12,        40,     32),
    "num_envs":               (128,      320,      320,      64,        64,        256,    256),
    "num_steps":              (80,       80,       80,       80,        80,        12,     12),
    "batch_size":             (640,      5120,     5120,     128,       128,       128,    128),
    "update_epochs":          (1,        5,        4,        1,         2,         1,      1),
    "inv_coef":               (1.0,      4.0,      4.0,      4.0,       4.0,       4.0,    4.0),
    "sen_coef":               (0.2,      4.0,      4.0,      0.2,       4.0,       0.2,    4.0),
    "sen_clip":               (0.8,      0.08,     0.08,     0.8,       0.08,      0.8,    0.08),
    "horizon":                (None,     8,        8,        None,      8,         None,   1),
    "replan":                 (None,     5,        5,        None,      5,         None,   1),
    "denoise_steps":          (None,     4,        4,        None,      4,         None,   4),
    # DEVIATION: less noise in Flatland. A KL of Eq. (2) in nats is larger then (results/README.md)
    "noise_level":            (None,     0.5,      0.5,      None,      0.5,       None,   0.4),
    # lost in our text of the paper: RL4VLA's for OpenVLA, RLinf's for pi0 and pi0.5
    "learning_rate":          (1e-4,     7.91e-6,  7.91e-6,  1e-4,      1e-4,      5e-4,   2e-4),
    "value_learning_rate":    (3e-3,     1.55e-4,  1.55e-4,  2e-3,      2e-3,      1e-3,   1e-3),
    "adam_beta2":             (0.999,    0.95,     0.95,     0.999,     0.999,     0.999,  0.999),
    "max_grad_norm":          (10.0,     1.0,      1.0,      10.0,      10.0,      1.0,    1.0),
    "lora_rank":              (32,       32,       32,       0,         0,         0,      0),
    "sde_steps":              (None,     "one",    "one",    None,      "one",     None,   "one"),
    "detach_value":           (False,    False,    True,     True,      True,      True,   True),
    # ours: the tiny backbones' learning, and what fits into memory
    "assets":                 ("rl4vla", "rl4vla", "rl4vla", "builtin", "builtin", "flat", "flat"),
    "critic_warmup":          (0,        0,        0,        1,         1,         2,      2),
    "warmup_epochs":          (4,        4,        4,        8,         8,         3,      3),
    # DEVIATION: 0 takes the target of Eq. (2) from the warm start. With the current weights (None),
    # as published, both Flatland backbones learn at lambda_inv 0.5 and forget the task at 4
    # (results/README.md)
    "inv_target_rate":        (None,     None,     None,     0.0,       0.0,       0.0,    0.0),
    "anneal_lr":              (False,    False,    False,    True,      True,      True,   True),
    "device_batch_size":      (128,      160,      160,      256,       256,       256,    256),
    "gradient_checkpointing": (True,     True,     True,     False,     False,     False,  False),
}
# fmt: on


@dataclass(kw_only=True)
class Args:
    backbone: str = "pi05-tiny"
    """openvla, pi05, pi0; for a CPU openvla-tiny, pi05-tiny, openvla-flat, pi05-flat. Chooses the
    defaults below"""
    checkpoint: str | None = None
    """warm start: a directory, or OWNER/NAME[@REVISION] on the Hub; None: the backbone's own"""
    run_dir: str | None = None
    """where checkpoints and logs go; None: runs/BACKBONE_seedS_TIME"""
    resume: str | None = None
    """run directory to go on with, under its own arguments; auto: --run-dir's or the newest run,
    and a new run where there is none"""
    seed: int = 1
    """seed of everything, 0 to 2**31 - 1"""
    cuda: bool = True
    """the policy runs on the GPU where there is one"""
    track: bool = False
    """log to Weights & Biases as well (pip install wandb)"""
    save_every: int = 10
    """save a checkpoint every so many iterations, and at the end"""
    keep: int = 3
    """how many of the newest checkpoints stay on disk; the best one stays as well"""
    eval_episodes: int = 64
    """episodes per split in the table at the end; 0: no table"""
    temperature_eval: float = 0.6
    """sampling temperature of action tokens in that table, as RL4VLA and RLinf have it. pi0,
    pi05: 0 denoises zeros, any other number noise"""
    policy: policies.PolicyArgs

    # the world
    assets: str
    """builtin (nothing to download), rl4vla (the paper's), rl4vla-small (the same, drawn in fewer
    pixels: faster) or flat (no simulator)"""
    sim: Literal["cpu", "cuda", "auto"] = "cpu"
    """physics: worker processes on the CPU, or all scenes at once on the GPU"""
    pre_view: Literal["composite", "rerender", "camera"] = "composite"
    """o_pre: Eq. (5); or drawn without distractors; or from another camera (section 5.5), in which
    case each training episode has a camera of its own, too"""
    camera_range: float = 20.0
    """--pre-view camera: training cameras turn by 0 to this many degrees (section 5.5)"""
    camera_step: float = 4.0
    """--pre-view camera: in steps of this many degrees (section 5.5)"""
    augment: float = 0.0
    """share of the episodes whose frames are composites of Eq. (5): plain augmentation, a control
    for the pair losses (not in the paper)"""

    # PPO
    iterations: int
    """rollouts, each followed by an update ("RL train steps", Table 3)"""
    num_envs: int
    """parallel environments of all ranks together ("Parallel environments", Table 3)"""
    num_steps: int
    """environment steps per environment and iteration, a multiple of the episode's length
    ("Interaction steps", Table 3)"""
    batch_size: int
    """decisions per optimizer step of all ranks together ("Global batch size", Table 3)"""
    device_batch_size: int
    """decisions per forward pass. Gradients are accumulated and do not depend on it"""
    update_epochs: int
    """passes over each rollout (Table 3)"""
    learning_rate: float
    """AdamW's, of the policy"""
    value_learning_rate: float
    """AdamW's, of the value head"""
    adam_beta2: float
    """AdamW's second beta (RLinf: 0.95 for pi0 and pi0.5)"""
    anneal_lr: bool
    """both learning rates fall linearly to zero over the iterations"""
    gamma: float = 0.99
    """discount per decision (Table 3)"""
    gae_lambda: float = 0.95
    """lambda of generalized advantage estimation (Table 3)"""
    clip_coef: float = 0.2
    """eps_ppo of Eq. (1) (Table 3)"""
    value_clip: float = 0.2
    """how far a value may move from the rollout's before its loss stops falling (RL4VLA)"""
    huber_delta: float = 10.0
    """where the value loss turns from squared to linear (RL4VLA)"""
    ent_coef: float = 0.0
    """coefficient of the entropy bonus"""
    max_grad_norm: float
    """maximum norm of the gradient (RL4VLA 10, RLinf 1)"""
    target_kl: float = 0.0
    """end an iteration's update before a step whose approx KL(old || new) is above it; 0: never"""
    critic_warmup: int
    """number of first iterations in which only the value head learns"""
    warmup_epochs: int
    """passes over each rollout in those iterations"""
    detach_value: bool
    """the value loss trains the value head alone, not the backbone that it reads"""

    # the pair losses
    inv_coef: float
    """lambda_inv of Eq. (4) (Table 3)"""
    sen_coef: float
    """lambda_sen of Eq. (4) (Table 3)"""
    sen_clip: float
    """eps_sen of Eq. (3) (Table 3)"""
    sen_grad: Literal["o", "alt", "both"] = "o"
    """which side of Eq. (3) learns: o with o_alt fixed (as published), o_alt, or both"""
    inv_target_rate: float | None
    """which weights give pi(.|o_pre) in Eq. (2). None: the current ones, as published. DEVIATION: a
    number: those of a copy that moves this share of the way to the policy after each iteration (1:
    the rollout's weights, 0: the start's)"""


# What a number may be. Checked before anything starts.
RANGES = {
    "at least 1": "iterations num_envs num_steps batch_size device_batch_size update_epochs"
    " warmup_epochs save_every keep",
    "0 or more": "critic_warmup eval_episodes temperature_eval target_kl value_clip ent_coef"
    " inv_coef sen_coef sen_clip",
    "above 0": "learning_rate value_learning_rate clip_coef max_grad_norm huber_delta camera_range"
    " camera_step",
    "0 to 1": "gamma gae_lambda adam_beta2 augment inv_target_rate",
    "0 to 2147483647": "seed",
}
# What --resume may change: nothing that is learnt from. Another device batch draws other noise, and
# with --anneal-lr another number of iterations makes the rates fall towards another end.
MAY_CHANGE = (
    "iterations resume run_dir cuda track save_every keep eval_episodes temperature_eval"
    " device_batch_size gradient_checkpointing base tokenizer"
).split()
REPLACED = {
    "--detach-sen": "--sen-grad alt (True) or --sen-grad both (False) replaced it",
    "--pair-fraction": "the pair losses are over all decisions now, leave it out",
}


def preset(backbone: str = "pi05-tiny", **changes) -> Args:
    """The Args of a backbone: its column of PRESETS, with `changes`."""
    if backbone not in BACKBONES:
        raise runtime.Fault(f"unknown --backbone {backbone!r}: choose from {', '.join(BACKBONES)}")
    values = {flag: row[BACKBONES.index(backbone)] for flag, row in PRESETS.items()} | changes
    return runtime.unflatten(Args, dict(values, backbone=backbone))


def train_split(args) -> str:
    if args.pre_view == "camera":
        return f"camera+0-{args.camera_range:g}:{args.camera_step:g}"
    return "train"


# ------------------------------------------------------------------------------------------ rollout
def rollout(args, policy, envs, episode_ids, device, rebuild=False, backgrounds=None):
    """Whole episodes in every environment of this rank -> batch, stats; or None, None where a
    rank was told to stop.

    batch, of B = T * N decisions in N environments: obs (dict of (B, ...)), instructions (B str),
    latents (dict of (B, ...)), logprobs, values, advantages, returns (B,). Advantages are
    normalised over all ranks, and stats are theirs, too. episode_ids: an iterator over fresh ids.
    rebuild: make the scenes anew. backgrounds (K, H, W, 3) uint8: of --augment.
    """
    obs, instructions, decisions, rewards, dones, successes = [], [], [], [], [], []
    view_seconds = envs.view_seconds
    for _ in range(args.num_steps // envs.max_episode_steps):
        ids = [next(episode_ids) for _ in range(envs.num_envs)]
        next_obs = envs.reset(ids, train_split(args), rebuild, args.seed)
        done = torch.zeros(1)
        augmented = torch.rand(envs.num_envs) < args.augment if args.augment else None
        while not done.all() and not runtime.stop_requested():
            next_obs = {k: v.to(device) for k, v in next_obs.items()}
            if augmented is not None:
                rgb, mask = next_obs["rgb"][augmented], next_obs["mask"][augmented]
                next_obs["rgb"][augmented] = views.composite(rgb, mask, backgrounds)
            decision = policies.act_in_parts(
                policy, next_obs, envs.instructions, args.device_batch_size
            )
            obs.append(next_obs)
            instructions += envs.instructions
            decisions.append(decision)
            next_obs, reward, done, info = envs.step(decision.actions)
            rewards.append(reward.to(device))
            dones.append(done.to(device))
            successes.append(info["success_once"].to(device))
    if runtime.any_rank_stops(device):
        return None, None
    # OPEN: nothing follows the last step (RL4VLA). RLinf adds the critic's guess of what would have
    # come, which pays for states from which success is merely possible.
    rewards, dones = torch.stack(rewards), torch.stack(dones)  # (T, N)
    decision = policies.join_decisions(decisions)
    values = decision.value.view_as(rewards)
    padded = F.pad(values, (0, 0, 0, 1))  # (T + 1, N): episodes end, nothing follows the last step
    advantages, returns = gae(rewards, padded, dones, args.gamma, args.gae_lambda)
    mean, std, count = runtime.moments(advantages)
    _, returns_std, _ = runtime.moments(returns)
    mean_reward, _, _ = runtime.moments(rewards)
    success, _, episodes = runtime.moments(torch.stack(successes)[dones])
    batch = dict(
        obs={k: torch.cat([o.pop(k) for o in obs]) for k in list(obs[0])},  # frees the parts
        instructions=instructions,
        latents=decision.latent,
        logprobs=decision.logprob,
        values=decision.value,
        advantages=((advantages - mean) / (std + 1e-5)).flatten(),  # CleanRL: in each minibatch
        returns=returns.flatten(),
    )
    stats = dict(
        success=success,
        reward=mean_reward * count / episodes,  # per episode
        # advantages are returns - values: their variance is what the critic leaves unexplained
        explained_variance=1 - (std / returns_std) ** 2 if returns_std > 1e-6 else float("nan"),
        view_seconds=envs.view_seconds - view_seconds,
    )
    return batch, stats


def gae(rewards, values, dones, gamma, gae_lambda):
    """Advantages and returns (T, N) by generalized advantage estimation (Schulman et al. 2016).

    rewards, dones (T, N): of step t, and whether the episode ended with it. values (T + 1, N).
    """
    advantages = torch.zeros_like(rewards)
    lastgaelam = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        nextnonterminal = 1.0 - dones[t].float()
        delta = rewards[t] + gamma * values[t + 1] * nextnonterminal - values[t]
        advantages[t] = lastgaelam = delta + gamma * gae_lambda * nextnonterminal * lastgaelam
    return advantages, advantages + values[:-1]


# ------------------------------------------------------------------------------------------ update
def update(
    args, policy, optimizer, batch, backgrounds=None, target=None, warming=False, generator=None
):
    """PPO and the two pair losses on one rollout -> means of statistics. None: a rank must stop.

    backgrounds (K, H, W, 3) uint8 of Eq. (5); None where the environments have drawn rgb_pre.
    target: the policy that gives pi(.|o_pre,l) in Eq. (2); None: `policy`. warming: only the value
    head learns. generator: of the order of the samples, the same on all ranks.
    """
    target, means = target or policy, runtime.Means()
    parameters = runtime.parameters_of(optimizer)
    for p in optimizer.param_groups[0]["params"]:  # the policy's; the other group is the value head
        p.requires_grad_(not warming)
    inv_coef, sen_coef = (0.0, 0.0) if warming else (args.inv_coef, args.sen_coef)
    epochs = args.warmup_epochs if warming else args.update_epochs
    for mb_inds, mb_size in runtime.minibatches(batch, epochs, args, generator):
        for inds in mb_inds.split(args.device_batch_size):
            mb = runtime.select(batch, inds)
            obs, instructions, latent = mb["obs"], mb["instructions"], mb["latents"]
            oldlogprob, oldvalue = mb["logprobs"], mb["values"]
            advantages, returns = mb["advantages"], mb["returns"]
            new = policy.evaluate_actions(obs, instructions, latent)
            inv_kl = sen_kl = torch.zeros_like(new.logprob)

            # Eq. (1)  L_PPO = -E[ min(r A, clip(r, 1 - eps_ppo, 1 + eps_ppo) A) ] + value loss
            logratio = new.logprob - oldlogprob  # (B,): log-probs are sums over action dimensions
            ratio = logratio.exp()
            assert ratio.shape == advantages.shape == new.value.shape == returns.shape
            clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
            pg_loss = -torch.min(ratio * advantages, clipped * advantages)
            v_clipped = oldvalue + (new.value - oldvalue).clamp(-args.value_clip, args.value_clip)
            v_loss = torch.max(
                F.huber_loss(new.value, returns, reduction="none", delta=args.huber_delta),
                F.huber_loss(v_clipped, returns, reduction="none", delta=args.huber_delta),
            )
            ppo_loss = pg_loss - args.ent_coef * new.entropy + v_loss

            # Both KLs are at the rollout's latent: of each token given the sampled ones before it,
            # or of x_{k+1} given the sampled x_k

            # Eq. (2)  L_inv = E[ KL( pi(.|o,l) || sg pi(.|o_pre,l) ) ]
            if inv_coef:
                o_pre = obs | {"rgb": views.task_preserving(obs, backgrounds)}
                with torch.no_grad():
                    pre = target.evaluate_actions(o_pre, instructions, latent)
                inv_kl = policy.kl(new.dist, pre.dist)  # (B,): a mean over action dimensions

            # Eq. (3)  L_sen = -E[ min( KL( pi(.|o,l) || sg pi(.|o_alt,l) ), eps_sen ) ]
            if sen_coef:
                o_alt = obs | {"rgb": obs["rgb_alt"]}
                with torch.set_grad_enabled(args.sen_grad != "o"):
                    alt = policy.evaluate_actions(o_alt, instructions, latent)
                here = new.dist.detach() if args.sen_grad == "alt" else new.dist
                sen_kl = policy.kl(here, alt.dist)  # (B,)
            sen_loss = -sen_kl.clamp(max=args.sen_clip)

            # Eq. (4)  L = L_PPO + lambda_inv L_inv + lambda_sen L_sen
            loss = ppo_loss + inv_coef * inv_kl + sen_coef * sen_loss
            (loss.sum() / mb_size).backward()  # E: the mean over the minibatch of all ranks

            stats = dict(loss=loss, pg_loss=pg_loss, v_loss=v_loss, entropy=new.entropy)
            stats |= dict(approx_kl=ratio - 1 - logratio, ratio_dev=(ratio - 1).abs())
            stats |= dict(clipfrac=(ratio - 1).abs() > args.clip_coef)
            stats |= dict(inv_kl=inv_kl) if inv_coef else {}
            stats |= dict(sen_kl=sen_kl, sen_clipped=sen_kl >= args.sen_clip) if sen_coef else {}
            means.add(stats, policy.log_groups(latent))
            if runtime.stop_requested():
                break
        if means.all_reduce(parameters):  # sums gradients over the ranks; one of them must stop
            return None
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        runtime.check_step(policy, parameters, means, grad_norm, batch, mb_inds, args.run_dir)
        if args.target_kl and means.step["approx_kl"] > args.target_kl:
            break
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        means.grad_norms.append(grad_norm)
    optimizer.zero_grad(set_to_none=True)
    return means.result()


# ------------------------------------------------------------------------------------------ main
def make_optimizer(args, policy):
    """AdamW of two groups, as `update` wants them: the policy's parameters, the value head's."""
    head = list(policy.value_head.parameters())
    actor = [p for p in policy.parameters() if p.requires_grad and all(p is not q for q in head)]
    groups = [dict(params=actor, lr=args.learning_rate)]
    groups += [dict(params=head, lr=args.value_learning_rate)]
    return torch.optim.AdamW(groups, betas=(0.9, args.adam_beta2), fused=True)


def train(args: Args) -> tuple[Args, Path | None]:
    """A whole run -> its arguments, and its last checkpoint, None where SIGTERM came before."""
    # ---------------------------------------------------------------- set up
    runtime.check_ranges(args, RANGES, policies.RANGES)
    runtime.check_flags(args)
    parse_split(train_split(args))  # a Fault where --camera-range or --camera-step is wrong
    find_pack(args.assets)  # or where its files are missing
    args.sim = choose_sim(args.sim)
    device = runtime.own_device(args.cuda)
    if runtime.RANK == 0:  # the others wait for what it prepares
        args.checkpoint = args.checkpoint or policies.default_checkpoint(args.backbone)
        runtime.make_run_dir(args)
    runtime.join_ranks("nccl" if device.type == "cuda" else "gloo")
    args = runtime.from_rank_0(args)
    own = runtime.own_slots(args.num_envs)  # of the environments

    # ---------------------------------------------------------------- policy and optimizer
    runtime.seed_all(args.seed)
    resumed = runtime.resumed_checkpoint(args)
    saved = resumed or args.checkpoint
    options = vars(args.policy) | dict(device=device, training=True)
    policy = policies.load_policy(args.backbone, saved, **options)
    policy.detach_value = args.detach_value
    optimizer = make_optimizer(args, policy)
    runtime.start_alike(optimizer)
    target = policies.TargetPolicy(policy, args.inv_target_rate)
    order = torch.Generator()  # of the samples in an update: the same on all ranks
    state = runtime.RunState(args, policy, optimizer, target, resumed)

    # ---------------------------------------------------------------- environments
    envs = make_envs(
        len(own),
        args.assets,
        sim=args.sim,
        image_size=policy.image_size,
        resize=policy.resize,
        alter=views.task_altering if args.sen_coef else None,
        preserve=views.RENDERED[args.pre_view] if args.inv_coef else None,
    )
    with envs, runtime.RunLog(args, state.iteration) as log, runtime.sigterm_stops():
        rounds = runtime.whole_episodes(args.num_steps, envs.max_episode_steps)
        composite = args.pre_view == "composite" and (args.inv_coef or args.augment)
        backgrounds = envs.backgrounds().to(device) if composite else None
        ids = list(runtime.train_ids(args, 1, 1))
        frames = envs.reset(ids, train_split(args), view_seed=args.seed)
        runtime.check_weights(policy)
        sight = runtime.Sight(policy, frames, envs.instructions, state)

        # ------------------------------------------------------------ loop
        for iteration in range(state.iteration + 1, args.iterations + 1):
            t0 = time.time()
            runtime.seed_all(args.seed, iteration, runtime.RANK)
            order.manual_seed(args.seed * 1_000_000 + iteration)
            warming = iteration <= args.critic_warmup
            frac = 1 - (iteration - 1) / args.iterations if args.anneal_lr else 1.0
            optimizer.param_groups[0]["lr"] = frac * args.learning_rate
            optimizer.param_groups[1]["lr"] = frac * args.value_learning_rate

            ids = runtime.train_ids(args, iteration, rounds)
            # After each checkpoint, or a resumed run would differ: the simulator remembers contacts
            rebuild = (iteration - 1) % args.save_every == 0
            batch, stats = rollout(args, policy, envs, ids, device, rebuild, backgrounds)
            if batch is None:
                break
            t1, before = time.time(), state.snapshot()
            losses = update(
                args, policy, optimizer, batch, backgrounds, target.policy, warming, order
            )
            if losses is None:  # cut short: as if it had not begun
                state.restore(before)
                break
            target.soft_update()
            runtime.check_weights(policy)

            t2, decisions = time.time(), len(batch["logprobs"]) * args.num_envs / len(own)
            stats |= losses | dict(unrelated_kl=sight.unrelated_kl(policy), rollout_seconds=t1 - t0)
            stats |= dict(update_seconds=t2 - t1, decisions_per_second=decisions / (t2 - t0))
            state.record(iteration, stats)
            log.write(iteration, stats, state.success, warming)
            runtime.check_collapse(state, args.critic_warmup)
            if iteration % args.save_every == 0 or iteration == args.iterations:
                saved = state.save()
            batch = None  # or two rollouts would need their memory at once
        if state.iteration == args.iterations and not runtime.any_rank_stops(device):
            return args, saved
        if state.iteration % args.save_every:
            state.save()
    state.say_how_to_go_on()
    return args, None


def main(args: Args):
    args, checkpoint = train(args)  # policy and optimizer are gone: the table loads its own
    if checkpoint and args.eval_episodes:
        table = evaluate.Args(checkpoint=str(checkpoint), policy=args.policy, sim=args.sim)
        table.num_episodes, table.cuda = args.eval_episodes, args.cuda
        table.temperature = args.temperature_eval
        evaluate.main(table)
    runtime.leave_ranks()


def parse(command=None) -> Args:
    return runtime.parse_run(Args, preset, MAY_CHANGE, REPLACED, command)


if __name__ == "__main__":
    runtime.command_line(lambda: main(parse()))
