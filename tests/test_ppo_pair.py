"""The update: GAE and losses against official numbers and brute force, reductions, and a toy that must be learnt."""

import copy
import json
import re
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from toy import Toy, in_float64, toy_policy

import policies
import ppo_pair
import runtime
import views

GOLDEN = Path(__file__).parents[2] / "shared/golden/openvla_ppo_ref/ppo_ref.safetensors"
golden = pytest.mark.skipif(not GOLDEN.exists(), reason=f"{GOLDEN} is not here")


@golden
def test_gae_equals_the_ancestors():
    ref = load_file(GOLDEN)
    dones = ref["gae_dones"][1:]  # there: "ended before observation t"; ours: "ended with step t"
    advantages, returns = ppo_pair.gae(ref["gae_rewards"], ref["gae_values"], dones, 0.99, 0.95)
    torch.testing.assert_close(advantages, ref["gae_advantages_raw"], atol=1e-6, rtol=0)
    torch.testing.assert_close(returns, ref["gae_returns"], atol=1e-6, rtol=0)


class Fixed(torch.nn.Module):
    """A policy whose log-prob and value of sample i are parameters, to read gradients from."""

    dtype = torch.float32

    def __init__(self, logprob, value):
        super().__init__()
        self.logprob, self.value_head = torch.nn.Parameter(logprob), torch.nn.Parameter(value)

    def evaluate_actions(self, obs, instructions, latent):
        inds = latent["index"]
        return policies.Evaluation(
            None, self.logprob[inds], 0 * self.logprob[inds], self.value_head[inds]
        )

    def log_groups(self, latent):
        return {}


def fixed_update(logprob, value, batch):
    """One PPO update of `Fixed` by plain gradient descent with rate 1 -> gradients, statistics."""
    policy, n = Fixed(logprob.clone(), value.clone()), len(batch["logprobs"])
    args = toy_args(
        num_envs=1, batch_size=n, device_batch_size=n, update_epochs=1, max_grad_norm=1e9
    )
    optimizer = torch.optim.SGD(
        [dict(params=[policy.logprob]), dict(params=[policy.value_head])], lr=1.0
    )
    batch = batch | dict(obs={}, instructions=[""] * n, latents=dict(index=torch.arange(n)))
    stats = ppo_pair.update(args, policy, optimizer, batch)
    return logprob - policy.logprob.detach(), value - policy.value_head.detach(), stats


@golden
def test_losses_and_gradients_equal_the_ancestors(monkeypatch):
    monkeypatch.setattr(
        runtime, "check_step", lambda *_: None
    )  # the golden ratios do not start at 1
    ref = {
        k: v.squeeze(-1) if v.ndim == 2 and v.shape[1] == 1 else v
        for k, v in load_file(GOLDEN).items()
    }
    batch = dict(
        logprobs=ref["ppo_old_logprob"],
        values=ref["ppo_old_value"],
        advantages=ref["ppo_advantage"],
        returns=ref["ppo_return"],
    )
    grad_logprob, grad_value, stats = fixed_update(ref["ppo_logprob"], ref["ppo_value"], batch)
    for name, golden in (("pg_loss", "ppo_policy_loss"), ("v_loss", "ppo_value_loss")):
        # v_loss is 14.4, of which float32 can tell apart steps of 1e-6
        assert stats[name] == pytest.approx(ref[golden].item(), rel=1e-6, abs=1e-6)
    torch.testing.assert_close(grad_logprob, ref["grad_logprob"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(grad_value, ref["grad_value"], atol=1e-6, rtol=1e-5)


def test_gae_brute_force():
    """A_t = sum_k (gamma lambda)^k delta_{t+k} up to the end of the episode, written out."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = (
        torch.randn(9, 4, generator=generator),
        torch.randn(10, 4, generator=generator),
    )
    dones = torch.rand(9, 4, generator=generator) < 0.3
    advantages, returns = ppo_pair.gae(rewards, values, dones, 0.9, 0.8)
    for n in range(4):
        for t in range(9):
            expected, discount = 0.0, 1.0
            for k in range(t, 9):
                expected += discount * (
                    rewards[k, n] + 0.9 * values[k + 1, n] * (not dones[k, n]) - values[k, n]
                )
                discount *= 0.9 * 0.8
                if dones[k, n]:
                    break
            assert abs(advantages[t, n] - expected) < 1e-5
    torch.testing.assert_close(returns, advantages + values[:-1])


@pytest.mark.parametrize("name", ["advantages", "returns"])
def test_a_loss_that_would_broadcast_is_refused(name):
    """RL4VLA's policy loss is silently 7 times too large because of shapes that broadcast."""
    batch = {k: torch.zeros(4) for k in ("logprobs", "values", "advantages", "returns")}
    with pytest.raises(AssertionError):
        fixed_update(torch.zeros(4), torch.zeros(4), batch | {name: torch.zeros(4, 1)})


# ------------------------------------------------------------------------------------------------ a toy to learn
TOYS = ["openvla-tiny", "pi05-tiny"]


def toy_args(**changes):
    args = dict(
        num_envs=16,
        num_steps=8,
        batch_size=128,
        device_batch_size=128,
        update_epochs=4,
        warmup_epochs=4,
        target_kl=0.0,
        inv_coef=0.0,
        sen_coef=0.0,
        sen_clip=0.8,
        gamma=0.5,
        max_grad_norm=10.0,
    )
    return ppo_pair.preset("openvla-tiny", **args | changes)


def toy_rollout(args, policy, num_envs=16):
    torch.manual_seed(1)
    return ppo_pair.rollout(args, policy, Toy(num_envs), iter(range(10**6)), torch.device("cpu"))[0]


def gray(count):
    return torch.full((count, 16, 16, 3), 90, dtype=torch.uint8)


def sgd(policy, lr=1.0):
    """Parameters then differ by as much as gradients do, where Adam would blow up rounding."""
    head = list(policy.value_head.parameters())
    actor = [p for p in policy.parameters() if all(p is not q for q in head)]
    return torch.optim.SGD([dict(params=actor), dict(params=head)], lr=lr)


def distance(a, b):
    """Of two lists of tensors: |a - b| / |b|."""
    a, b = (torch.cat([x.detach().flatten() for x in part]) for part in (a, b))
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture
def float64(monkeypatch):
    """So that nothing but the order of sums is left of what two equivalent ways differ by."""
    monkeypatch.setattr(torch.Tensor, "float", in_float64)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("backbone", TOYS)
def test_the_gradient_does_not_depend_on_the_device_batch(float64, backbone):
    """1 x 8 == 2 x 4 == 3 + 3 + 2 == 8 x 1 to 1e-9 (relative) of the way that the weights went in four steps of the whole of
    Eq. (4), Also: the ratio starts at 1."""
    args = toy_args(
        inv_coef=0.5, sen_coef=0.2, batch_size=8, device_batch_size=32, update_epochs=1, num_steps=2
    )
    policy = toy_policy_with_seed(backbone)
    batch, start = toy_rollout(args, policy), [p.clone() for p in policy.parameters()]
    moved = []
    for args.device_batch_size in (8, 4, 3, 1):
        other = copy.deepcopy(policy)
        torch.manual_seed(2)
        stats = ppo_pair.update(args, other, sgd(other, 1e-3), batch, gray(1))
        moved.append([p - q for p, q in zip(other.parameters(), start)])
        assert (
            stats["ratio_dev"] < 1e-9
            and stats["inv_kl"] > 0
            and stats["sen_kl"] > 0
            and stats["updates"] == 4
        )
        assert distance(moved[-1], moved[0]) < 1e-9


def test_the_rollout_does_not_depend_on_the_device_batch():
    """Sampled tokens may (the generator is asked in another order), log-probs and values of the same tokens may not."""
    policy = toy_policy_with_seed()
    obs = Toy(8).look()
    whole = policies.act_in_parts(policy, obs, ["put red cube on plate"] * 8, 8)
    parts = policies.act_in_parts(policy, obs, ["put red cube on plate"] * 8, 3)
    for name in ("actions", "logprob", "value"):
        assert getattr(parts, name).shape == getattr(whole, name).shape and len(parts.value) == 8
    torch.testing.assert_close(parts.value, whole.value, atol=1e-5, rtol=0)
    with torch.no_grad():
        again = policy.evaluate_actions(obs, ["put red cube on plate"] * 8, parts.latent)
    torch.testing.assert_close(parts.logprob, again.logprob, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        parts.actions[:, 0].double(), policy.env_action(parts.latent["tokens"]), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("sen_grad", ["o", "alt", "both"])
@pytest.mark.parametrize("backbone", TOYS)
def test_the_pair_losses_are_the_plain_formula(sen_grad, backbone, float64):
    """Eq. (2)-(4) written out over one minibatch, with half of the samples at the clip of Eq. (3). --sen-grad: who learns.
    A view costs one forward pass, and one with a graph only where it learns."""
    args = toy_args(
        inv_coef=5.0, sen_coef=20.0, sen_grad=sen_grad, update_epochs=1, num_steps=4, batch_size=64
    )
    start = toy_policy_with_seed(backbone)
    ours, plain = copy.deepcopy(start), copy.deepcopy(start)
    batch, tables, passes = toy_rollout(args, start), gray(1), []
    obs, latent, instructions = batch["obs"], batch["latents"], batch["instructions"]

    def at(rgb):
        return plain.evaluate_actions(obs | {"rgb": rgb}, instructions, latent)

    o, o_alt = at(obs["rgb"]), at(obs["rgb_alt"])
    with torch.no_grad():
        o_pre = at(views.composite(obs["rgb"], obs["mask"], tables))
    here, there = (
        (o.dist if sen_grad != "alt" else o.dist.detach()),
        (o_alt.dist if sen_grad != "o" else o_alt.dist.detach()),
    )
    inv_kl, sen_kl = plain.kl(o.dist, o_pre.dist), plain.kl(here, there)
    args.sen_clip = sen_kl.sort().values[31:33].mean().item()

    def evaluate_actions(*inputs, original=ours.evaluate_actions):
        passes.append(torch.is_grad_enabled())
        return original(*inputs)

    ours.evaluate_actions = evaluate_actions
    stats = ppo_pair.update(args, ours, sgd(ours, 1e-3), batch, tables)
    assert passes == [True, False, sen_grad != "o"]
    del ours.evaluate_actions

    ratio, advantages = (o.logprob - batch["logprobs"]).exp(), batch["advantages"]
    loss = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
    loss = loss + ((o.value - batch["returns"]) ** 2 / 2).mean()
    loss = (
        loss
        + 5.0 * inv_kl.mean()
        - 20.0 * torch.minimum(sen_kl, torch.tensor(args.sen_clip)).mean()
    )
    optimizer = sgd(plain, 1e-3)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), args.max_grad_norm)
    optimizer.step()
    assert stats["inv_kl"] == pytest.approx(inv_kl.mean().item()) and stats[
        "sen_kl"
    ] == pytest.approx(sen_kl.mean().item())
    assert 0.4 < stats["sen_clipped"] < 0.6
    ways = [
        [p - q for p, q in zip(other.parameters(), start.parameters())] for other in (ours, plain)
    ]
    assert distance(*ways) < 1e-9


def test_the_target_of_eq_2_may_be_another_policy(float64):
    """A copy that stays where the policy was: KL 0 to it at first, and no gradient that moves the two to each other."""
    args, policy = toy_args(inv_coef=1.0, update_epochs=1), toy_policy_with_seed()
    batch, slow = toy_rollout(args, policy), policies.TargetPolicy(policy, 0.25)
    start = {k: v.clone() for k, v in policy.state_dict().items()}
    seen = []
    slow.policy.evaluate_actions = lambda *inputs, original=slow.policy.evaluate_actions: (
        seen.append(1) or original(*inputs)
    )
    ppo_pair.update(args, policy, sgd(policy, 0.1), batch, gray(1), target=slow.policy)
    assert seen and all(torch.equal(v, start[k]) for k, v in slow.policy.state_dict().items())
    slow.soft_update()
    for k, v in slow.policy.state_dict().items():
        torch.testing.assert_close(v, 0.75 * start[k] + 0.25 * policy.state_dict()[k])


def test_log_probs_that_disagree_stop_the_run():
    """bfloat16 rounds differently in rollout and update, a mistake is larger than that."""
    args, policy = toy_args(batch_size=32, update_epochs=1), toy_policy_with_seed()
    batch = toy_rollout(args, policy)
    batch["logprobs"] += 0.05
    with pytest.raises(runtime.Fault, match="act and evaluate_actions disagree"):
        ppo_pair.update(args, policy, sgd(policy, 0.0), batch)
    policy.bfloat16().value_head.float()
    batch = toy_rollout(args, policy)
    for error in (0.05, 0.15):
        batch["logprobs"] += error
        if error > 0.1:
            with pytest.raises(runtime.Fault, match="act and evaluate_actions disagree"):
                ppo_pair.update(args, policy, sgd(policy, 0.0), batch)
        else:
            assert ppo_pair.update(args, policy, sgd(policy, 0.0), batch)["ratio_dev"] > 0.04


def test_the_critic_warm_up_moves_the_value_head_alone():
    args, policy = toy_args(batch_size=32), toy_policy_with_seed()
    batch, before = toy_rollout(args, policy), copy.deepcopy(policy.state_dict())
    ppo_pair.update(args, policy, sgd(policy, 0.1), batch, warming=True)
    moved = {
        name.split(".")[0]
        for name, p in policy.state_dict().items()
        if not torch.equal(p, before[name])
    }
    assert moved == {"value_head"}
    ppo_pair.update(args, policy, sgd(policy, 0.1), batch)
    assert not torch.equal(
        policy.state_dict()["projector.fc1.weight"], before["projector.fc1.weight"]
    )


def test_sigterm_does_not_wait_for_the_rest_of_a_step(monkeypatch):
    """A step of a 7B policy takes longer than a scheduler waits."""
    args, policy = toy_args(batch_size=32, device_batch_size=8), toy_policy_with_seed()
    batch, passes = toy_rollout(args, policy), []
    monkeypatch.setattr(runtime, "terminated", [True])
    monkeypatch.setattr(
        policy,
        "evaluate_actions",
        lambda *a, f=policy.evaluate_actions: (passes.append(1), f(*a))[1],
    )
    assert ppo_pair.update(args, policy, sgd(policy, 0.1), batch) is None
    assert len(passes) == 1


def test_target_kl_ends_the_update_before_the_step_that_is_over_it():
    """The first step's KL is 0, so it is always taken."""
    moved = []
    for target_kl in (0.0, 1e9, 1e-6):
        args, policy = (
            toy_args(batch_size=32, update_epochs=1, target_kl=target_kl),
            toy_policy_with_seed(),
        )
        batch, optimizer, steps = toy_rollout(args, policy), sgd(policy, 0.01), []
        optimizer.register_step_post_hook(lambda *_, steps=steps: steps.append(1))
        assert ppo_pair.update(args, policy, optimizer, batch)["updates"] == len(steps)
        moved.append(len(steps))
    assert moved == [4, 4, 1]


def toy_policy_with_seed(backbone="openvla-tiny"):
    torch.manual_seed(0)
    policy = toy_policy(backbone)
    return policy.to(torch.get_default_dtype())


def learn_toy(iterations, blind=False, args=None, spoil=None):
    """Success of the last 5 of `iterations` rollouts, under the real rollout and update. spoil(batch) breaks something."""
    torch.manual_seed(0)
    policy, args, toy = toy_policy(), args or toy_args(num_envs=64), Toy(64, blind=blind)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    successes = []
    for _ in range(iterations):
        batch, stats = ppo_pair.rollout(args, policy, toy, iter(range(10**6)), torch.device("cpu"))
        if spoil is not None:
            spoil(batch)
        ppo_pair.update(args, policy, optimizer, batch)
        successes.append(stats["success"])
        if sum(successes[-5:]) > 4.75:
            break
    return sum(successes[-5:]) / 5


def test_it_learns_what_is_written_in_the_image():
    assert learn_toy(60) > 0.9  # both steps right; chance is 0.25


def test_it_does_not_learn_with_the_advantage_sign_flipped():
    assert learn_toy(25, spoil=lambda batch: batch["advantages"].neg_()) < 0.3


def test_it_does_not_learn_blind():
    assert learn_toy(25, blind=True) < 0.4


def test_it_does_not_learn_where_the_mask_hides_the_image(monkeypatch):
    def no_patches(self, attention_mask):
        mask, positions = layout(self, attention_mask)
        mask = mask.clone()
        mask[..., 1 : 1 + self.vision_backbone["featurizer"].num_patches] = False
        mask[:, :, range(mask.shape[2]), range(mask.shape[2])] = True  # a row may not be empty
        return mask, positions

    layout = policies.TokenPolicy.attention_layout
    monkeypatch.setattr(policies.TokenPolicy, "attention_layout", no_patches)
    assert learn_toy(25) < 0.4


# ------------------------------------------------------------------------------------------------ against another PPO
def likelihood(policy, rgb, instructions, latent):
    """log-prob (B,) by torch.distributions, value (B,)."""
    if "tokens" in latent:
        tokens = latent["tokens"]
        logits, value = policy(policy.preprocess(rgb), *policy.tokenize(instructions), tokens)
        return torch.distributions.Categorical(logits=logits).log_prob(
            tokens - policy.action_begin
        ).sum(1), value
    prefix, state = policy.observe(dict(rgb=rgb), instructions)
    dist, value = policy.distribution(prefix, state, latent)
    executed = latent["x"][:, 1, : policy.chunk, :7]  # of x_{k+1}
    return torch.distributions.Normal(dist[:, 0, 0], dist[:, 1, 0]).log_prob(executed).sum(
        (1, 2)
    ), value


def another_ppo(policy, args, iterations):
    """PPO as the papers write it, one sample at a time where that is possible -> its parameters after `iterations`."""
    toy, optimizer = Toy(args.num_envs), sgd(policy, 0.01)
    for iteration in range(iterations):
        samples = []  # dicts, of step t and environment n at t * N + n
        for _ in range(args.num_steps // toy.max_episode_steps):
            obs, done = toy.reset(range(iteration * 100, iteration * 100 + args.num_envs)), False
            while not done:
                decision = policy.act(obs, toy.instructions)
                with torch.no_grad():
                    old, value = likelihood(policy, obs["rgb"], toy.instructions, decision.latent)
                rgb, (obs, reward, dones, _) = obs["rgb"], toy.step(decision.actions)
                done = bool(dones.all())
                for n in range(args.num_envs):
                    samples.append(
                        dict(
                            rgb=rgb[n],
                            latent={k: v[n] for k, v in decision.latent.items()},
                            old=old[n],
                            value=value[n],
                            reward=reward[n],
                            done=done,
                        )
                    )
        following = {
            n: (torch.tensor(0.0), torch.tensor(0.0)) for n in range(args.num_envs)
        }  # value, advantage
        for i in reversed(range(len(samples))):
            s, (value, advantage) = samples[i], following[i % args.num_envs]
            alive = 0.0 if s["done"] else 1.0
            s["advantage"] = s["reward"] + args.gamma * alive * value - s["value"]
            s["advantage"] = s["advantage"] + args.gamma * args.gae_lambda * alive * advantage
            s["return"], following[i % args.num_envs] = (
                s["advantage"] + s["value"],
                (s["value"], s["advantage"]),
            )
        raw = torch.stack([s["advantage"] for s in samples])
        for s in samples:
            s["advantage"] = (s["advantage"] - raw.mean()) / (
                ((raw - raw.mean()) ** 2).mean().sqrt() + 1e-5
            )
        torch.manual_seed(iteration)
        for inds, size in list(
            runtime.minibatches(dict(logprobs=samples), args.update_epochs, args, None)
        ):
            mb = [samples[i] for i in inds.tolist()]
            rgb = torch.stack([s["rgb"] for s in mb])
            latent = {k: torch.stack([s["latent"][k] for s in mb]) for k in mb[0]["latent"]}
            new, values = likelihood(policy, rgb, toy.instructions[:1] * size, latent)
            loss = 0.0
            for s, logprob, value in zip(mb, new, values):
                ratio, low, high = (
                    (logprob - s["old"]).exp(),
                    1 - args.clip_coef,
                    1 + args.clip_coef,
                )
                loss = loss - min(ratio * s["advantage"], ratio.clip(low, high) * s["advantage"])
                near = s["value"] + (value - s["value"]).clip(-args.value_clip, args.value_clip)
                errors = [(v - s["return"]).abs() for v in (value, near)]
                loss = loss + max(e**2 / 2 if e < 10 else 10 * (e - 5) for e in errors)
            optimizer.zero_grad()
            (loss / size).backward()
            norm = torch.cat(
                [p.grad.flatten() for p in policy.parameters() if p.grad is not None]
            ).norm()
            for p in policy.parameters():
                if p.grad is not None and norm > args.max_grad_norm:
                    p.grad *= args.max_grad_norm / (norm + 1e-6)  # torch's own addition
            optimizer.step()
    return list(policy.parameters())


@pytest.mark.parametrize("backbone", TOYS)
def test_pair_with_zero_coefficients_is_ppo(float64, backbone):
    """1e-9 (relative) of the way that the weights went, against an implementation of its own."""
    args = toy_args(
        num_steps=4,
        batch_size=16,
        device_batch_size=5,
        update_epochs=2,
        max_grad_norm=2.0,
        gamma=0.9,
    )
    policy = toy_policy_with_seed(backbone)
    start, other = [p.clone() for p in policy.parameters()], copy.deepcopy(policy)
    torch.manual_seed(5)
    expected = another_ppo(other, args, 2)
    optimizer, toy = sgd(policy, 0.01), Toy(16)
    torch.manual_seed(5)
    for iteration in range(2):
        args.device_batch_size = 16
        ids = iter([*range(iteration * 100, iteration * 100 + 16)] * 2)
        batch, _ = ppo_pair.rollout(args, policy, toy, ids, torch.device("cpu"))
        args.device_batch_size = 5
        torch.manual_seed(iteration)
        ppo_pair.update(args, policy, optimizer, batch)
    moved = [
        [p - q for p, q in zip(parameters, start)] for parameters in (policy.parameters(), expected)
    ]
    assert distance(*moved) < 1e-9


# ------------------------------------------------------------------------------------------------ guards
RESULTS = Path(__file__).parents[1] / "results"


def recorded(file):
    """success and unrelated_kl of each iteration in a record of health lines."""
    found = re.findall(
        r"^ *\d+ success ([\d.]+).*?(?:unrelated_kl ([\d.]+).*)?$", Path(file).read_text(), re.M
    )
    return [float(success) for success, _ in found], [float(kl or 1) for _, kl in found]


def fires(success, unrelated, warmup=3):
    for i in range(1, len(success) + 1):
        state = types.SimpleNamespace(
            success=success[:i], unrelated_kl=[np.mean(unrelated[:warmup]), *unrelated[:i]]
        )
        try:
            runtime.check_collapse(state, warmup)
        except runtime.Fault as fault:
            return i, str(fault)
    return None


def test_a_collapse_is_noticed_and_a_healthy_run_is_not():
    """A recorded collapse (success 61 to 22 %) fires. Of the runs of a study those fire that a guard
    has ended, in their last iteration. These have a target that can come to meet the policy, or
    learn from a mixture of scenes."""
    iteration, sentence = fires(*recorded(Path(__file__).with_name("collapse.txt")))
    assert 10 < iteration < 24 and "success fell" in sentence
    assert not any(fires(*recorded(file)) for file in RESULTS.glob("*/*.txt"))
    arms, ended = [], []
    for file in RESULTS.glob("*/*-[ft]*.jsonl"):
        backbone = "-".join(file.stem.split("-")[:2])
        warmup = ppo_pair.preset(backbone).critic_warmup
        for run in map(json.loads, file.read_text().splitlines()):
            success, unrelated = (run["curves"][name] for name in ("success", "unrelated_kl"))
            iteration, _ = fires(success, unrelated, warmup) or (None, "")
            assert iteration == (len(success) if run["ended"] else None), (file, run["arm"])
            arms.append(run["arm"])
            ended += [run["arm"]] * run["ended"]
    assert (
        len(arms) >= 80
        and len(ended) >= 3
        and all("target: " in arm or arm == "PPO on composites" for arm in ended)
    )
    assert "going blind" in fires([0.5] * 20, [1.0] * 5 + [0.3] * 15)[1]
    assert fires([0.5] * 20, [1.0] * 5 + [0.6] * 15) is None
    assert (
        fires([0.05] * 5 + [0.0] * 9, [1.0] * 14) is None
    )  # nothing that could be told from noise


def test_a_parameter_that_would_not_learn_stops_the_run():
    args, policy = toy_args(batch_size=64), toy_policy_with_seed()
    batch = toy_rollout(args, policy)
    policy.unused = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(runtime.Fault, match="unused is to be trained but gets no gradient"):
        ppo_pair.update(args, policy, sgd(policy), batch)
    optimizer = sgd(policy)
    optimizer.param_groups[0]["params"] = [
        p for p in optimizer.param_groups[0]["params"] if p is not policy.unused
    ]
    with pytest.raises(runtime.Fault, match="unused is to be trained but is not on the optimizer"):
        ppo_pair.update(args, policy, optimizer, batch)


def test_a_policy_that_does_not_see_does_not_start():
    policy, obs, tasks = toy_policy_with_seed(), Toy(4).look(), ["put red cube on plate"] * 4

    def fresh():
        return types.SimpleNamespace(sight=None, unrelated_kl=[])

    state = fresh()
    sight = runtime.Sight(policy, obs, tasks, state)
    assert state.unrelated_kl == [sight.unrelated_kl(policy)]  # the same frames and latents
    with pytest.raises(runtime.Fault, match="the target here and there"):
        runtime.Sight(policy, dict(obs, rgb_alt=obs["rgb"]), tasks, fresh())
    torch.nn.init.zeros_(policy.projector["fc3"].weight)
    with pytest.raises(runtime.Fault, match="black and a white image"):
        runtime.Sight(policy, obs, tasks, fresh())
    assert sight.unrelated_kl(policy) < 1e-9
