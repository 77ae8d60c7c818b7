"""The update: GAE and losses against official numbers and brute force, reductions, and a toy that must be learnt."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy import Toy, toy_policy

import policies
import ppo_pair

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
    ref = {k: v.squeeze(-1) if v.ndim == 2 and v.shape[1] == 1 else v for k, v in load_file(GOLDEN).items()}
    logprob, value = ref["ppo_logprob"].clone().requires_grad_(), ref["ppo_value"].clone().requires_grad_()
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
    rewards, values = torch.randn(9, 4, generator=generator), torch.randn(10, 4, generator=generator)
    dones = torch.rand(9, 4, generator=generator) < 0.3
    advantages, returns = ppo_pair.gae(rewards, values, dones, 0.9, 0.8)
    for n in range(4):
        for t in range(9):
            expected, discount = 0.0, 1.0
            for k in range(t, 9):
                expected += discount * (rewards[k, n] + 0.9 * values[k + 1, n] * (not dones[k, n]) - values[k, n])
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
def toy_args(**changes):
    args = ppo_pair.Args(num_envs=16, num_steps=8, batch_size=128, device_batch_size=128, update_epochs=4, target_kl=0.0,
                         inv_coef=0.0, sen_coef=0.0, sen_clip=0.8, gamma=0.5, max_grad_norm=10.0)  # fmt: skip
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


@pytest.mark.parametrize("device_batch_size", [1, 3, 8])
def test_the_gradient_does_not_depend_on_the_device_batch(device_batch_size):
    """Of the whole of Eq. (4), over several steps; against one forward pass per minibatch. Also: the ratio starts at 1."""
    args = toy_args(inv_coef=0.5, sen_coef=0.2, batch_size=24, device_batch_size=24, update_epochs=1)
    policy = toy_policy_with_seed()
    batch, start = toy_rollout(args, policy), [p.clone() for p in policy.parameters()]
    moved = []
    for size in (24, device_batch_size):
        other, args.device_batch_size = copy.deepcopy(policy), size
        torch.manual_seed(2)
        stats = ppo_pair.update(args, other, sgd(other, 1e-3), batch, gray(1))
        moved.append([p - q for p, q in zip(other.parameters(), start)])
        assert stats["ratio_dev"] < 1e-5 and stats["inv_kl"] > 0 and stats["sen_kl"] > 0
    assert distance(moved[1], moved[0]) < 1e-4  # of a difference of float32 weights; of the weights themselves 1e-8


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
    torch.testing.assert_close(parts.actions[:, 0].double(), policy.env_action(parts.latent), atol=1e-6, rtol=0)


@pytest.mark.parametrize("below", [0, 3, 9, 11, 16])
def test_samples_at_the_sensitivity_clip_cost_no_backward_pass(below, monkeypatch):
    """Gradients are those of the plain formula, and the passes that are counted are never far from the fewest possible."""
    args = toy_args(inv_coef=0.5, sen_coef=2.0, device_batch_size=16, batch_size=16, update_epochs=1)
    policy = toy_policy_with_seed()
    batch = {k: v[:16] if k != "obs" else {name: x[:16] for name, x in v.items()} for k, v in toy_rollout(args, policy).items()}
    o, o_alt = (policy.evaluate({"rgb": batch["obs"][k]}, batch["instructions"], batch["latents"]) for k in ("rgb", "rgb_alt"))
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
    assert rows == dict(forward=16 * 3 + again, backward=16 + (below if below < 0.6 * 16 else 16))  # o, o_pre, o_alt
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
    moved = {name.split(".")[0] for name, p in policy.state_dict().items() if not torch.equal(p, before[name])}
    assert moved == {"value_head"}
    ppo_pair.update(args, policy, sgd(policy, 0.1), batch)
    assert not torch.equal(policy.state_dict()["projector.fc1.weight"], before["projector.fc1.weight"])


def toy_policy_with_seed():
    torch.manual_seed(0)
    return toy_policy()


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
