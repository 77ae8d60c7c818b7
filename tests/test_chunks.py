"""Chunks of actions through the real rollout and update: GAE per decision, and learning by Flow-SDE."""

import pytest
import torch
from toy import toy_policy

import policies
import ppo_pair

TASKS = ["put red cube on plate", "put toy bear on plate"]


class Counting:
    """As envs.VecEnv does it (tests/test_envs.py): a chunk's rewards are summed, and nothing happens past the end."""

    num_envs, max_episode_steps, view_seconds, instructions = 2, 20, 0.0, TASKS
    rewards = torch.rand(
        2, 20, 2, generator=torch.Generator().manual_seed(0)
    )  # (episode, step, environment)
    episode = -1

    def reset(self, episode_ids, split, rebuild, seed):
        self.episode, self.elapsed = self.episode + 1, 0
        return {"rgb": torch.zeros(2, 4, 4, 3, dtype=torch.uint8)}

    def step(self, actions):
        start, self.elapsed = self.elapsed, min(self.elapsed + actions.shape[1], 20)
        done = torch.full((2,), self.elapsed == 20)
        obs = {"rgb": torch.zeros(2, 4, 4, 3, dtype=torch.uint8)}
        return (
            obs,
            self.rewards[self.episode, start : self.elapsed].sum(0),
            done,
            {"success_once": done},
        )


class Scripted:
    def act(self, obs, instructions):
        return policies.Decision(
            torch.zeros(2, 6, 7), {"tokens": torch.zeros(2, 3)}, torch.zeros(2), torch.rand(2)
        )


def test_chunks_by_brute_force():
    """20 steps in decisions of 6, 6, 6 and 2: gamma and lambda per decision; the last of an episode has no successor."""
    gamma, lam = 0.9, 0.8
    args, env = (
        ppo_pair.preset(
            "pi05-tiny", num_steps=40, device_batch_size=2, gamma=gamma, gae_lambda=lam
        ),
        Counting(),
    )
    batch, stats = ppo_pair.rollout(args, Scripted(), env, iter(range(4)), torch.device("cpu"))
    values, returns = (
        batch["values"].view(2, 4, 2),
        batch["returns"].view(2, 4, 2),
    )  # (episode, decision, environment)
    for e in range(2):
        for i in range(4):
            expected, discount = values[e, i].clone(), 1.0
            for j in range(i, 4):
                after = gamma * values[e, j + 1] if j < 3 else 0.0
                expected += discount * (
                    env.rewards[e, 6 * j : 6 * j + 6].sum(0) + after - values[e, j]
                )
                discount *= gamma * lam
            torch.testing.assert_close(returns[e, i], expected)
    assert stats["reward"] == pytest.approx(env.rewards.sum().item() / 4)


class Bright:
    """The right chunk is written in the image: all its actions towards the bright side. Two decisions per episode."""

    num_envs, max_episode_steps, view_seconds, instructions = (
        64,
        10,
        0.0,
        ["put red cube on plate"] * 64,
    )

    def look(self):
        self.right = torch.rand(64) < 0.5
        rgb = torch.full((64, 16, 16, 3), 40, dtype=torch.uint8)
        rgb[self.right, :, 8:] = 220
        rgb[~self.right, :, :8] = 220
        return {"rgb": rgb}

    def reset(self, episode_ids, split, rebuild, seed):
        self.elapsed, self.correct = 0, torch.zeros(64)
        return self.look()

    def step(self, actions):
        hit = ((actions[:, :, 0] > 0) == self.right[:, None]).float().mean(1)
        self.elapsed, self.correct = self.elapsed + actions.shape[1], self.correct + hit / 2
        return (
            self.look(),
            hit,
            torch.full((64,), self.elapsed == 10),
            {"success_once": self.correct > 0.9},
        )


@pytest.mark.parametrize("sign", [1, -1])
def test_flow_sde_ppo_learns_what_is_written_in_the_image(sign):
    """The real rollout and update on a policy that knows nothing; with the advantage's sign flipped it unlearns."""
    torch.manual_seed(0)
    policy = toy_policy("pi05-tiny")
    args = ppo_pair.preset(
        "pi05-tiny",
        num_envs=64,
        num_steps=40,
        batch_size=256,
        device_batch_size=256,
        update_epochs=4,
        target_kl=0.0,
        inv_coef=0.0,
        sen_coef=0.0,
        sen_clip=0.8,
        gamma=0.5,
        max_grad_norm=10.0,
    )
    optimizer, hits = torch.optim.AdamW(policy.parameters(), lr=3e-3), []
    for _ in range(25):
        batch, stats = ppo_pair.rollout(
            args, policy, Bright(), iter(range(10**6)), torch.device("cpu")
        )
        batch["advantages"] *= sign
        means = ppo_pair.update(args, policy, optimizer, batch)
        assert means["ratio_dev"] < 1e-3
        hits.append(
            stats["reward"] / 2
        )  # of 2 decisions: the fraction of actions to the right side
        if sign * (hits[-1] - 0.5) > 0.15:
            break
    assert sign * (hits[-1] - 0.5) > 0.15, hits
