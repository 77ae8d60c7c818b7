"""The update: GAE and losses against official numbers and brute force, reductions, and a toy that must be learnt."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy import Toy, in_float64, toy_policy

import policies
import ppo_pair
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


@golden
def test_losses_and_gradients_equal_the_ancestors():
    ref = {
        k: v.squeeze(-1) if v.ndim == 2 and v.shape[1] == 1 else v
        for k, v in load_file(GOLDEN).items()
    }
    logprob, value = (
        ref["ppo_logprob"].clone().requires_grad_(),
        ref["ppo_value"].clone().requires_grad_(),
    )
    pg_loss, ratio = ppo_pair.ppo_loss(logprob, ref["ppo_old_logprob"], ref["ppo_advantage"], 0.2)
    v_loss = ppo_pair.value_loss(value, ref["ppo_old_value"], ref["ppo_return"], 0.2)
    (pg_loss.mean() + v_loss.mean()).backward()
    torch.testing.assert_close(pg_loss.mean(), ref["ppo_policy_loss"], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(v_loss.mean(), ref["ppo_value_loss"], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(logprob.grad, ref["grad_logprob"], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(value.grad, ref["grad_value"], atol=1e-6, rtol=1e-6)


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


def test_a_loss_that_would_broadcast_is_refused():
    """RL4VLA's policy loss is silently 7 times too large because of shapes that broadcast."""
    with pytest.raises(AssertionError):
        ppo_pair.ppo_loss(torch.zeros(4, 7), torch.zeros(4, 7), torch.zeros(4, 7), 0.2)
    with pytest.raises(AssertionError):
        ppo_pair.value_loss(torch.zeros(4), torch.zeros(4, 1), torch.zeros(4), 0.2)


# ------------------------------------------------------------------------------------------------ a toy to learn
TOYS = ["openvla-tiny", "pi05-tiny"]


def toy_args(**changes):
    args = ppo_pair.Args(num_envs=16, num_steps=8, batch_size=128, device_batch_size=128, update_epochs=4, target_kl=0.0,
                         inv_coef=0.0, sen_coef=0.0, sen_clip=0.8, pair_fraction=1.0,
                         gamma=0.5, max_grad_norm=10.0)  # fmt: skip
    for name, value in changes.items():
        setattr(args, name, value)
    return args


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
    Eq. (4), with the pair losses of some decisions (of 1 x 1 often none). Also: the ratio starts at 1."""
    args = toy_args(
        inv_coef=0.5,
        sen_coef=0.2,
        pair_fraction=0.6,
        batch_size=8,
        device_batch_size=32,
        update_epochs=1,
        num_steps=2,
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
    whole = ppo_pair.act(policy, obs, ["put red cube on plate"] * 8, 8)
    parts = ppo_pair.act(policy, obs, ["put red cube on plate"] * 8, 3)
    assert [x.shape for x in parts] == [x.shape for x in whole] and len(parts.value) == 8
    torch.testing.assert_close(parts.value, whole.value, atol=1e-5, rtol=0)
    with torch.no_grad():
        again = policy.evaluate(obs, ["put red cube on plate"] * 8, parts.latent)
    torch.testing.assert_close(parts.logprob, again.logprob, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        parts.actions[:, 0].double(), policy.env_action(parts.latent), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("detach_sen", [False, True])
def test_the_pair_losses_of_a_part_of_the_decisions(detach_sen, float64):
    """--pair-fraction: the mean over those drawn, in expectation that over all, and no view of another is forwarded.
    --detach-sen: no gradient of Eq. (3) at o."""
    args = toy_args(
        inv_coef=0.5,
        sen_coef=0.2,
        sen_clip=1e9,
        pair_fraction=0.25,
        batch_size=128,
        update_epochs=1,
    )
    args.detach_sen = detach_sen
    start = toy_policy_with_seed()
    ours, plain = copy.deepcopy(start), copy.deepcopy(start)
    batch, tables, rows = toy_rollout(args, start), gray(1), []
    hook = ours.language_model.model.norm.register_forward_hook(
        lambda _, __, y: rows.append(len(y))
    )
    stats = ppo_pair.update(
        args, ours, sgd(ours, 1e-3), batch, tables, generator=torch.Generator().manual_seed(5)
    )
    hook.remove()

    [(inds, paired, size)] = ppo_pair.minibatches(
        args, args.num_steps, torch.Generator().manual_seed(5)
    )
    assert 16 < paired.sum() < 48 and sum(rows) == size + 2 * paired.sum()
    obs, latent = {k: v[inds] for k, v in batch["obs"].items()}, batch["latents"][inds]

    def at(rgb):
        return plain.evaluate({"rgb": rgb}, [batch["instructions"][i] for i in inds], latent)

    o, o_pre, o_alt = (
        at(obs["rgb"]),
        at(views.task_preserving(obs["rgb"], obs["mask"], tables)),
        at(obs["rgb_alt"]),
    )
    here = o.dist.detach() if detach_sen else o.dist
    inv_kl, sen_kl = (
        plain.kl(o.dist, o_pre.dist.detach())[paired],
        plain.kl(here, o_alt.dist)[paired],
    )
    loss = ppo_pair.ppo_loss(
        o.logprob, batch["logprobs"][inds], batch["advantages"][inds], args.clip_coef
    )[0]
    loss = loss + ppo_pair.value_loss(
        o.value, batch["values"][inds], batch["returns"][inds], args.value_clip
    )
    optimizer = sgd(plain, 1e-3)
    (loss.mean() + (0.5 * inv_kl - 0.2 * sen_kl).sum() / (0.25 * size)).backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), args.max_grad_norm)
    optimizer.step()
    assert (
        abs(stats["inv_kl"] - inv_kl.mean().item()) < 1e-6
        and abs(stats["sen_kl"] - sen_kl.mean().item()) < 1e-6
    )
    ways = [
        [p - q for p, q in zip(other.parameters(), start.parameters())] for other in (ours, plain)
    ]
    assert distance(*ways) < 1e-9


@pytest.mark.parametrize("below", [0, 3, 9, 11, 16])
def test_samples_at_the_sensitivity_clip_cost_no_backward_pass(below, monkeypatch):
    """Gradients are those of the plain formula, and the passes that are counted are never far from the fewest possible."""
    args = toy_args(
        inv_coef=0.5, sen_coef=2.0, device_batch_size=16, batch_size=16, update_epochs=1
    )
    policy = toy_policy_with_seed()
    batch = {
        k: v[:16] if k != "obs" else {name: x[:16] for name, x in v.items()}
        for k, v in toy_rollout(args, policy).items()
    }
    o, o_alt = (
        policy.evaluate({"rgb": batch["obs"][k]}, batch["instructions"], batch["latents"])
        for k in ("rgb", "rgb_alt")
    )
    kl = policy.kl(o.dist, o_alt.dist).detach().sort().values
    args.sen_clip = torch.cat([kl[:1] * 0.9, (kl[1:] + kl[:-1]) / 2, kl[-1:] * 1.1])[below].item()

    def plain(policy, dist, obs, instructions, latent, clip):
        return policy.kl(dist, policy.evaluate({"rgb": obs["rgb_alt"]}, instructions, latent).dist)

    moved, rows = [], dict(forward=0, backward=0)
    for formula in (plain, ppo_pair.kl_to_altered):
        monkeypatch.setattr(ppo_pair, "kl_to_altered", formula)
        other, rows = copy.deepcopy(policy), dict(forward=0, backward=0)

        def forward(module, x, y, rows=rows):
            rows["forward"] += len(y)
            if y.requires_grad:
                y.register_hook(lambda grad: rows.update(backward=rows["backward"] + len(grad)))

        other.language_model.model.norm.register_forward_hook(forward)
        stats = ppo_pair.update(args, other, sgd(other, 1e-3), batch, gray(1))
        moved.append([p - q for p, q in zip(other.parameters(), policy.parameters())])
        assert abs(stats["sen_clipped"] - (16 - below) / 16) < 1e-6
    assert distance(moved[1], moved[0]) < 1e-4
    again = below if below < 0.6 * 16 else 0
    assert rows == dict(
        forward=16 * 3 + again, backward=16 + (below if below < 0.6 * 16 else 16)
    )  # o, o_pre, o_alt
    assert sum(rows.values()) <= 1.1 * (16 * 4 + min(2 * below, 16))


def test_log_probs_that_disagree_stop_the_run():
    """bfloat16 rounds differently in rollout and update, a mistake is larger than that."""
    args, policy = toy_args(batch_size=32, update_epochs=1), toy_policy_with_seed()
    batch = toy_rollout(args, policy)
    batch["logprobs"] += 0.05
    with pytest.raises(ppo_pair.sim.Fault, match="act and evaluate disagree"):
        ppo_pair.update(args, policy, sgd(policy, 0.0), batch)
    policy.bfloat16().value_head.float()
    batch = toy_rollout(args, policy)
    for error in (0.05, 0.15):
        batch["logprobs"] += error
        if error > 0.1:
            with pytest.raises(ppo_pair.sim.Fault, match="act and evaluate disagree"):
                ppo_pair.update(args, policy, sgd(policy, 0.0), batch)
        else:
            assert ppo_pair.update(args, policy, sgd(policy, 0.0), batch)["ratio_dev"] > 0.04


def test_the_critic_warm_up_moves_the_value_head_alone():
    args, policy = toy_args(batch_size=32), toy_policy_with_seed()
    batch, before = toy_rollout(args, policy), copy.deepcopy(policy.state_dict())
    ppo_pair.update(args, policy, sgd(policy, 0.1), batch, value_only=True)
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


def test_target_kl_ends_the_update_early():
    """With the step at which it is first seen to be too large. The first step's is 0."""
    updates = []
    for target_kl in (0.0, 1e9, 1e-6):
        args, policy = (
            toy_args(batch_size=32, update_epochs=1, target_kl=target_kl),
            toy_policy_with_seed(),
        )
        updates.append(
            ppo_pair.update(args, policy, sgd(policy, 0.01), toy_rollout(args, policy))["updates"]
        )
    assert updates == [4, 4, 2]


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
    def no_patches(self, attention_mask, num_patches):
        mask, positions = layout(self, attention_mask, num_patches)
        mask = mask.clone()
        mask[..., 1 : 1 + num_patches] = False
        mask[:, :, range(mask.shape[2]), range(mask.shape[2])] = True  # a row may not be empty
        return mask, positions

    layout = policies.OpenVLA._layout
    monkeypatch.setattr(policies.OpenVLA, "_layout", no_patches)
    assert learn_toy(25) < 0.4


# ------------------------------------------------------------------------------------------------ against another PPO
def likelihood(policy, rgb, instructions, latent):
    """log-prob (B,) by torch.distributions, value (B,)."""
    if isinstance(policy, policies.OpenVLA):
        logits, value = policy(policy.preprocess(rgb), *policy.tokenize(instructions), latent)
        return torch.distributions.Categorical(logits=logits).log_prob(
            latent - policy.action_begin
        ).sum(1), value
    prefix, state = policy._observe(dict(rgb=rgb), instructions)
    dist, value = policy.distribution(prefix, state, latent)
    executed = latent[:, 1, : policy.chunk, :7]  # of x_{k+1}
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
                    samples.append(dict(rgb=rgb[n], latent=decision.latent[n], old=old[n], value=value[n], reward=reward[n],
                                        done=done))  # fmt: skip
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
        for _ in range(args.update_epochs):
            for inds, _, size in list(ppo_pair.minibatches(args, args.num_steps, None)):
                mb = [samples[i] for i in inds.tolist()]
                rgb, latent = (torch.stack([s[k] for s in mb]) for k in ("rgb", "latent"))
                new, values = likelihood(policy, rgb, toy.instructions[:1] * size, latent)
                loss = 0.0
                for s, logprob, value in zip(mb, new, values):
                    ratio, low, high = (
                        (logprob - s["old"]).exp(),
                        1 - args.clip_coef,
                        1 + args.clip_coef,
                    )
                    loss = loss - min(
                        ratio * s["advantage"], ratio.clip(low, high) * s["advantage"]
                    )
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
def test_a_policy_that_goes_blind_is_noticed():
    """All of inv_kl, sen_kl, unrelated_kl below a fifth of the first, over five iterations."""
    first, low = [1.0, 0.5, 2.0], [0.1, 0.05, 0.2]
    assert ppo_pair.going_blind([first] * 3 + [low] * 5)
    assert not ppo_pair.going_blind([first] * 3 + [low] * 3)  # not for long enough
    assert not ppo_pair.going_blind(
        [first] + [low[:2] + [2.0]] * 9
    )  # it still tells frames apart: it has learnt to ignore
    assert not ppo_pair.going_blind([first] + [[0.1, 0.5, 0.2]] * 9)
    assert not ppo_pair.going_blind([]) and not ppo_pair.going_blind([first] * 9)
    assert ppo_pair.going_blind(
        [[1.0, 2.0]] + [[0.1, 0.2]] * 5
    )  # only one of the two losses: two KLs


def test_a_parameter_that_would_not_learn_stops_the_run():
    args, policy = toy_args(batch_size=64), toy_policy_with_seed()
    batch = toy_rollout(args, policy)
    policy.unused = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ppo_pair.sim.Fault, match="unused is to be trained but gets no gradient"):
        ppo_pair.update(args, policy, sgd(policy), batch)
    optimizer = sgd(policy)
    optimizer.param_groups[0]["params"] = [
        p for p in optimizer.param_groups[0]["params"] if p is not policy.unused
    ]
    with pytest.raises(
        ppo_pair.sim.Fault, match="unused is to be trained but is not on the optimizer"
    ):
        ppo_pair.update(args, policy, optimizer, batch)


def test_a_policy_that_does_not_see_does_not_start():
    policy, obs = toy_policy_with_seed(), Toy(4).look()
    ppo_pair.check_sight(policy, obs, ["put red cube on plate"] * 4)
    with pytest.raises(ppo_pair.sim.Fault, match="the target here and there"):
        ppo_pair.check_sight(policy, dict(obs, rgb_alt=obs["rgb"]), ["put red cube on plate"] * 4)
    torch.nn.init.zeros_(policy.projector["fc3"].weight)
    with pytest.raises(ppo_pair.sim.Fault, match="black and a white image"):
        ppo_pair.check_sight(policy, obs, ["put red cube on plate"] * 4)
