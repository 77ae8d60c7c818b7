"""Policies: observation + instruction -> action chunk, with log-probs and KLs.

    policy = load_policy("openvla-tiny")        # random weights, for sft.py to train
    policy = load_policy("openvla")             # the official 7B checkpoint, from the Hub
    python policies.py merge ADAPTER_DIR OUT    # folds a LoRA checkpoint into its base model

Two heads: TokenPolicy (OpenVLA: an action is 7 tokens, each one of 256 bins, or of 32 in a small
one) and FlowPolicy (pi0, pi0.5: a chunk of actions is denoised, and Flow-SDE gives it a
likelihood). The networks are in backbones/.
"""

import copy
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
import tyro
from huggingface_hub import save_torch_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn
from tyro.conf import Positional

from backbones.files import (
    WEIGHTS,
    download,
    find_model,
    load_weights,
    open_tensors,
    save_config,
    save_tokenizer,
)
from backbones.lora import load_adapter
from backbones.openvla import KVCache, OpenVLANetwork
from backbones.pi0 import Pi0Network
from backbones.statistics import columns, read_norm_stats
from backbones.tokenizers import check_tokenizer, read_tokenizer
from runtime import Fault, check_empty, check_ranges, command_line, flag_of, writing_to

DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float32": torch.float32}  # of the backbone


# ------------------------------------------------------------------------------------- the contract
class Decision(NamedTuple):
    actions: torch.Tensor  # (B, chunk, 7) float32: metres, radians, gripper -1 (close) / +1 (open)
    latent: dict[str, torch.Tensor]  # what was sampled, and `logprob` is of, batch first
    logprob: torch.Tensor  # (B,) float32 SUM over action dimensions, always at temperature 1
    value: torch.Tensor  # (B,) float32


class Evaluation(NamedTuple):
    dist: torch.Tensor  # (B, ...) float32, what `kl` compares: see each head
    logprob: torch.Tensor  # (B,) of the given latent: the log-prob of the joint action, a SUM
    entropy: torch.Tensor  # (B,) nats, a mean over action dimensions
    value: torch.Tensor  # (B,)


class Policy(Protocol):
    """A torch.nn.Module with all that ppo_pair.py, evaluate.py and sft.py use of a backbone. What
    load_policy asks of its class is in docs/fork.md, recipe 4.

    obs: rgb (B, H, W, 3) uint8 and state (B, S) float32. instructions: list of B str.
    """

    chunk: int  # env steps per decision
    horizon: int  # actions that are predicted at once, chunk or more
    image_size: int  # pixels; other sizes are resized
    resize: str | None  # how frames get there from a camera's pixels: see envs.make_envs
    dtype: torch.dtype  # of the backbone
    device: torch.device
    config: dict[str, Any]
    value_head: nn.Module
    detach_value: bool  # True: the critic reads the trunk but does not train it
    gradient_checkpointing: bool

    def act(self, obs, instructions, temperature=None) -> Decision:
        """To train: temperature None. To evaluate: a number."""

    def evaluate_actions(self, obs, instructions, latent) -> Evaluation:
        """The same observation, or another view of it, and a Decision's latent. With gradient."""

    def kl(self, p, q) -> torch.Tensor:
        """KL(p || q) (B,) of two Evaluation.dist at one latent, a MEAN over action dimensions."""

    def log_groups(self, latent) -> dict[str, torch.Tensor]:
        """Which samples' KLs to log apart: {name: (B,) bool}."""

    def save(self, directory, dtype=None):
        """Write a checkpoint that load_policy reads, its weights as dtype."""

    # for merge
    def fixed_outputs(self) -> torch.Tensor:
        """Of 8 fixed inputs: two policies that agree on them are the same."""

    # for sft.py
    def tokenize(self, instructions, prompt=None) -> tuple[torch.Tensor, torch.Tensor]:
        """-> ids, mask (B, T)."""

    def to_unit(self, actions) -> torch.Tensor:
        """(..., 7) env units -> (..., 7) float64 on the scale that the head predicts."""

    def sft_loss(self, obs, instructions, unit, prompt=None, **smoothing) -> torch.Tensor:
        """Behaviour cloning of unit (B, n, 7), n = 1 ... horizon -> scalar."""

    def look(self, rgb):
        """A pass through the modules of `vision_parts`, and no further."""

    def vision_parts(self) -> list[nn.Module]:
        """Modules that put out patch features (B, n, D); last, what the language model gets."""

    def word_embeddings(self) -> torch.Tensor:
        """(vocabulary, H)."""

    def watch_pointing(self, hook) -> list:
        """Call hook(log-probs (B, heads, m, n)) in each forward pass of sft_loss: at which of the n
        patches half of one layer's heads look from the m places where the answer is predicted (of
        tokens the first two). With several noises per observation they are B rows each. ->
        handles, to remove it."""


def act_in_parts(policy: Policy, obs, instructions, size: int) -> Decision:
    """policy.act for at most `size` observations at a time: all of them may not fit into memory."""
    parts = []
    for i in range(0, len(instructions), size):
        rows = slice(i, i + size)
        parts.append(policy.act({k: v[rows] for k, v in obs.items()}, instructions[rows]))
    return join_decisions(parts)


def join_decisions(parts: list[Decision]) -> Decision:
    actions, latents, logprobs, values = zip(*parts)
    latent = {k: torch.cat([x[k] for x in latents]) for k in latents[0]}
    return Decision(torch.cat(actions), latent, torch.cat(logprobs), torch.cat(values))


class TargetPolicy:
    """The policy whose pi(.|o_pre,l) is the target of Eq. (2). rate None: the policy itself. Else a
    copy: w <- w + rate (policy's w - w) after each iteration. Frozen weights are shared."""

    def __init__(self, policy: Policy, rate: float | None):
        self.rate, self.policy, self.pairs = rate, policy, []
        if rate is not None:
            frozen = {id(p): p for p in policy.parameters() if not p.requires_grad}
            self.policy = copy.deepcopy(policy, frozen).requires_grad_(False)
            both = zip(self.policy.parameters(), policy.parameters())
            self.pairs = [(slow, p) for slow, p in both if slow is not p]

    @torch.no_grad()
    def soft_update(self):
        for slow, p in self.pairs:
            slow.lerp_(p, self.rate)

    def state(self) -> list[torch.Tensor]:
        return [slow for slow, _ in self.pairs]

    @torch.no_grad()
    def load(self, state: list[torch.Tensor]):
        for (slow, _), saved in zip(self.pairs, state, strict=True):
            slow.copy_(saved)


# ----------------------------------------------------------------------------------- the token head
class TokenPolicy(OpenVLANetwork):
    """An action is 7 tokens of n_action_bins bins each; one action per decision.

    latent: tokens (B, 7) long, ids of the tokenizer. dist: (B, 7, bins) float32 logits, in the
    order of the ids.
    """

    chunk = horizon = 1

    # -------------------------------------------------------------------- the distribution
    def logits(self, hidden):
        """(..., H) -> logits (..., bins) float32. Rollout, update and both views get them here."""
        head, rows = self.language_model.lm_head, slice(self.action_begin, self.action_end)
        hidden = hidden.float()
        logits = F.linear(hidden, head.weight[rows].float())
        if isinstance(head, LoraLayer):  # peft would compute all words
            a = head.lora_A["default"].weight.float()
            b = head.lora_B["default"].weight[rows].float()
            logits = logits + head.scaling["default"] * F.linear(F.linear(hidden, a), b)
        return logits

    def forward(self, pixel_values, input_ids, attention_mask, action_tokens):
        """Teacher forcing -> logits (B, 7, bins), value (B,): token i is predicted where token
        i - 1 is."""
        mask, positions = self.attention_layout(attention_mask)
        actions = self.language_model.model.embed_tokens(action_tokens[:, :6])
        x = torch.cat([self.embed(pixel_values, input_ids), actions], 1)
        hidden = self.llama(x, mask, positions, outputs=7)
        before = hidden[:, 0].detach() if self.detach_value else hidden[:, 0]
        return self.logits(hidden), self.value(before)

    def action_logits(self, pixel_values, input_ids, attention_mask, action_tokens):
        """Teacher forcing -> logits (B, 7, bins) float32 in the order of the ids."""
        return self(pixel_values, input_ids, attention_mask, action_tokens)[0]

    def fixed_outputs(self):
        generator, size = torch.Generator().manual_seed(0), (8, self.image_size, self.image_size, 3)
        rgb = torch.randint(256, size, dtype=torch.uint8, generator=generator)
        tokens = torch.randint(self.action_begin, self.action_end, (8, 7), generator=generator)
        tokens, prompt = tokens.to(self.device), torch.tensor([[1, 3, 5]] * 8, device=self.device)
        return self.action_logits(self.preprocess(rgb), prompt, torch.ones_like(prompt), tokens)

    @torch.no_grad()
    def decode(self, pixel_values, input_ids, attention_mask, temperature=0.0):
        """-> tokens (B, 7), logprob (B,), value (B,). temperature 0 is argmax."""
        # Adapters are not merged, which would be faster: in bfloat16 the distribution would not be
        # the update's
        x = self.embed(pixel_values, input_ids)
        mask, positions = self.attention_layout(attention_mask)
        cache = KVCache(self.language_model.config, len(x), positions.shape[1], x)
        tokens, logprob, value = [], 0.0, None
        for i in range(7):
            rows = slice(cache.start, cache.start + x.shape[1])
            hidden = self.llama(x, mask[:, :, rows], positions[:, rows], 1, cache).squeeze(1)
            cache.start = rows.stop
            value = self.value(hidden) if i == 0 else value
            logits = self.logits(hidden)  # (B, bins)
            if temperature == 0:
                index = logits.argmax(-1, keepdim=True)
            else:
                index = torch.multinomial(torch.softmax(logits / temperature, -1), 1)
            logprob = logprob + logits.log_softmax(-1).gather(-1, index).squeeze(-1)
            tokens.append(index + self.action_begin)
            x = self.language_model.model.embed_tokens(tokens[-1])  # (B, 1, H)
        return torch.cat(tokens, 1), logprob, value

    # -------------------------------------------------------------------- token <-> action
    def use_norm_stats(self, key, file="norm_stats"):
        """Choose the data set whose percentiles scale the actions."""
        self.unnorm_key, stats, where = key, self.config["norm_stats"][key], f"{file}, {key}"
        self.q01, self.q99 = columns(stats, where, "action", ("q01", "q99"))
        # False: the gripper, which stays as decoded. OpenVLA's own code takes no mask for all True
        mask = stats["action"].get("mask") or [True] * 7
        lengths = [len(self.q01), len(self.q99)]
        if lengths[0] != lengths[1]:
            raise Fault(f"{where}: q01 and q99 of action have {lengths} dimensions")
        if lengths[0] != 7:
            raise Fault(f"{where}: {lengths[0]} dimensions of action, not 7: another robot's?")
        if not isinstance(mask, list) or len(mask) != 7 or set(mask) - {True, False}:
            raise Fault(f"{where}: mask of action is {mask!r}, not 7 times true or false")
        self.is_scaled = torch.tensor(mask, dtype=torch.bool)
        self.bin_edges = torch.linspace(-1, 1, self.config["n_action_bins"], dtype=torch.float64)
        self.bin_centers = (self.bin_edges[1:] + self.bin_edges[:-1]) / 2  # one fewer than tokens

    def env_action(self, tokens):
        """(B, 7) ids -> (B, 7) float64: metres, radians, gripper -1/+1."""
        bins = (self.action_end - 1 - tokens.cpu()).clamp(0, len(self.bin_centers) - 1)
        unit = self.bin_centers[bins]
        scaled = 0.5 * (unit + 1) * (self.q99 - self.q01) + self.q01
        action = torch.where(self.is_scaled, scaled, unit)
        middle = 0.5 * (self.q01 + self.q99)[6]  # the data's gripper is 0 ... 1, or -1 ... 1
        action[:, 6] = torch.where(action[:, 6] > middle, 1.0, -1.0)
        return action.to(tokens.device)

    def bin_tokens(self, unit):
        """(B, 7) in [-1, 1] -> (B, 7) ids."""
        unit = unit.double().cpu().clamp(-1, 1)
        bins = torch.bucketize(unit, self.bin_edges, right=True)
        return (self.action_end - bins).to(self.device)

    def to_unit(self, actions):
        actions = actions.double().cpu()
        unit = 2 * (actions - self.q01) / (self.q99 - self.q01 + 1e-8) - 1
        return torch.where(self.is_scaled, unit, torch.where(actions > 0, self.q99, self.q01))

    def sft_loss(self, obs, instructions, unit, prompt=None, sigma=None, jitter=None):
        """Cross-entropy of unit (B, 1, 7) -> scalar, the target smoothed over `sigma` bins, a
        number or one for each of the 7 dimensions (0: not at all).

        `jitter` moves the earlier tokens that the model reads by a few bins, and one in ten
        anywhere, since its own will not be the oracle's. Both default to the config's. The answer
        to another prompt is no action, so that its dimensions have one sigma.
        """
        own = self.config["_cloning"]
        jitter = own["jitter"] if jitter is None else jitter
        sigma = own["answer_sigma" if prompt else "sigma"] if sigma is None else sigma
        sigma = torch.as_tensor(sigma, device=self.device).clamp(min=1e-3)[..., None]
        tokens = self.bin_tokens(unit[:, 0])
        first, last = self.action_begin, self.action_end - 1
        moved = tokens + (torch.randn(tokens.shape, device=self.device) * jitter).round().long()
        read = moved.clamp(first, last)
        if jitter:
            anywhere = torch.rand(tokens.shape, device=self.device) < 0.1
            read = torch.where(anywhere, torch.randint_like(tokens, first, last + 1), read)
        prompt = self.tokenize(instructions, prompt)
        logits = self.action_logits(self.preprocess(obs["rgb"]), *prompt, read)  # (B, 7, bins)
        distance = (tokens - first)[..., None] - torch.arange(logits.shape[-1], device=self.device)
        target = torch.softmax(-0.5 * (distance / sigma) ** 2, -1)
        return -(target * logits.log_softmax(-1)).sum(-1).mean()

    # -------------------------------------------------------------------- act, evaluate, compare
    @torch.no_grad()
    def act(self, obs, instructions, temperature=None):
        temperature = 1.0 if temperature is None else temperature
        inputs = self.preprocess(obs["rgb"]), *self.tokenize(instructions)
        tokens, logprob, value = self.decode(*inputs, temperature)
        actions = self.env_action(tokens).float()[:, None]  # (B, 1, 7)
        return Decision(actions, {"tokens": tokens}, logprob, value)

    def evaluate_actions(self, obs, instructions, latent):
        tokens = latent["tokens"]
        logits, value = self(self.preprocess(obs["rgb"]), *self.tokenize(instructions), tokens)
        logp = logits.log_softmax(-1)  # (B, 7, bins)
        logprob = logp.gather(-1, (tokens - self.action_begin)[..., None]).sum((1, 2))  # (B,)
        entropy = -(logp.exp() * logp).sum(-1).mean(1)  # (B, 7) -> (B,)
        return Evaluation(logits, logprob, entropy, value)

    def kl(self, p, q):
        """(B, 7, bins) x2 -> (B,): of each token given those sampled before it, MEAN over the 7."""
        p, q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1).mean(1).clamp(min=0)  # clamp: rounding may leave -1e-8

    def log_groups(self, latent):
        return {}


# -------------------------------------------------------------------------------- the Flow-SDE head
class FlowPolicy(Pi0Network):
    """N denoise steps turn noise (t = 1) into a chunk of actions (t = 0): Flow-SDE (pi_RL, RLinf).

    latent: x (B, m + 1, H, D), the states x_k ... x_{k+m} before, between and after m stochastic
    steps, and k (B,) long, the first step; m is 1 or all N. dist: (B, 2, m, chunk, 7) mean and std
    of each transition, on what the environment executes.
    """

    def transition(self, x, v, k, num_steps):
        """Mean and std (B, H, D) of x_{k+1} given x_k = x and the velocity v there.

        k: the denoise step, 0 ... num_steps - 1, a number or (B,). Time falls from t_0 = 1 to
        t_N = 0. The drift that is added to the ODE's balances the noise, so that the marginals stay
        (pi_RL, Flow-SDE; RLinf's schedule):
            mean = x - v/N - sigma^2/(2 t N) (x + (1 - t) v)
            std = sigma / sqrt(N),  sigma^2 = a^2 t / (1 - t)
        with 1 - t_1 for 1 - t in sigma at k = 0, where it would be infinite.
        """
        k = torch.as_tensor(k, device=x.device).expand(len(x))[:, None, None]
        t = 1 - k / num_steps
        sigma2 = self.noise_level**2 * t * num_steps / k.clamp(min=1)
        mean = x - v / num_steps - sigma2 / (2 * t * num_steps) * (x + (1 - t) * v)
        return mean, (sigma2 / num_steps).sqrt().expand_as(x)

    def ode(self, prefix, state, noise, num_steps):
        """Euler steps of the flow from noise (B, H, D) -> actions (B, H, D), normalised."""
        x, t = noise, torch.tensor(1.0)
        for _ in range(num_steps):
            x = x - self.velocity(prefix, state, x, t) / num_steps
            t = t - 1 / num_steps  # in float32, as openpi counts: the time embedding notices 1e-7
        return x

    def sde(self, prefix, state, noise, stochastic):
        """The chain x_0 ... x_N (B, N + 1, H, D). stochastic (B, N) bool: which steps are drawn and
        not the ODE's."""
        chain = [noise]
        for k in range(self.num_steps):
            v = self.velocity(prefix, state, chain[-1], 1 - k / self.num_steps)
            mean, std = self.transition(chain[-1], v, k, self.num_steps)
            drawn = mean + std * torch.randn_like(mean)
            straight = chain[-1] - v / self.num_steps
            chain.append(torch.where(stochastic[:, k, None, None], drawn, straight))
        return torch.stack(chain, 1)

    def distribution(self, prefix, state, latent):
        """-> dist, value (B,). Rollout, update and both views get them here."""
        dists, values = [], []
        for i, x in enumerate(latent["x"][:, :-1].unbind(1)):
            k = latent["k"] + i
            hidden = self.expert(prefix, state, x, 1 - k / self.num_steps)
            mean_std = self.transition(x, self.action_out_proj(hidden), k, self.num_steps)
            dists.append(torch.stack(mean_std, 1))
            # DEVIATION: pi0's V at the stochastic step, also in the rollout, where RLinf takes the
            # mean over all steps.
            values.append(None if self.pi05 else self.value(hidden.mean(1)))
        value = self.prefix_value(prefix) if self.pi05 else torch.stack(values).mean(0)
        dist = torch.stack(dists, 2)  # (B, 2, m, H, D)
        return dist[..., : self.chunk, : self.config["action_env_dim"]], value

    def fixed_outputs(self):
        generator, size = torch.Generator().manual_seed(0), self.image_size
        dims = self.config["action_dim"]
        shapes = ((1, 3, size, size), (dims,), (self.horizon, dims))
        images, state, x = (torch.randn(8, *shape, generator=generator) for shape in shapes)
        tokens = torch.tensor([[2, 3, 5]] * 8, device=self.device)  # any ids do
        there = torch.ones(8, 1, dtype=torch.bool, device=self.device)
        prefix = self.prefix(images.clamp(-1, 1).to(self.device), there, tokens, tokens > 0)
        state, x = state.to(self.device), x.to(self.device)
        return self.velocity(prefix, state, x, torch.linspace(0.1, 1, 8))

    # -------------------------------------------------------------------- denoised chunk <-> action
    def env_action(self, x):
        """Actions of the model (B, H, D) -> the chunk to execute (B, chunk, 7) float32: metres,
        radians, gripper -1/+1."""
        actions = self.unnormalize(x[:, : self.chunk])
        actions[..., 6] = torch.where(actions[..., 6] > self.config["gripper_threshold"], 1.0, -1.0)
        return actions.float().to(x.device)

    def to_unit(self, actions):
        return self.normalize("actions", actions)[..., : actions.shape[-1]]

    def flow_loss(self, prefix, state, actions, noise, t):
        """Flow matching (openpi), padded dimensions too: the squared error (B, H, D) of v(x_t, t)
        against noise - actions, at x_t = t noise + (1 - t) actions.

        actions, noise (B, H, D) normalised, t (B,).
        """
        x = t[:, None, None] * noise + (1 - t[:, None, None]) * actions
        return (self.velocity(prefix, state, x, t) - (noise - actions)) ** 2

    def sft_loss(self, obs, instructions, unit, prompt=None, draws=4, **smoothing):
        """Flow matching of unit (B, n, 7) -> scalar. A chunk shorter than H is filled up with its
        last row. smoothing: what only a token policy needs.

        t = 0.999 Beta(1.5, 1) + 0.001 (openpi). `draws` noises per observation share its prefix,
        which is nearly all of the work.
        """
        prefix, state = self.observe(obs, instructions, prompt)
        unit = torch.cat([unit, unit[:, -1:].expand(-1, self.horizon - unit.shape[1], -1)], 1)
        actions = F.pad(unit, (0, self.config["action_dim"] - unit.shape[-1]))
        actions = actions.float().to(self.device)  # (B, H, D)
        inds = torch.arange(len(actions), device=self.device).repeat(draws)
        noise = torch.randn(len(inds), *actions.shape[1:], device=self.device)
        t = 0.999 * torch.distributions.Beta(1.5, 1.0).sample((len(inds),)).to(self.device) + 0.001
        state = None if state is None else state[inds]
        return self.flow_loss(prefix.take(inds), state, actions[inds], noise, t).mean()

    # -------------------------------------------------------------------- act, evaluate, compare
    @torch.no_grad()
    def act(self, obs, instructions, temperature=None):
        """To train: one random step k of each sample is stochastic, or all of them.

        To evaluate: the ODE from Gaussian noise, from none at temperature 0; it has no log-prob.
        """
        prefix, state = self.observe(obs, instructions)
        b, n = len(prefix.mask), self.num_steps
        noise = torch.randn(b, self.horizon, self.config["action_dim"], device=self.device)
        if temperature is not None:
            x = self.ode(prefix, state, noise * (temperature > 0), n)
            return Decision(self.env_action(x), None, None, None)
        # DEVIATION: each sample draws its own step; RLinf draws one per batch, so that an update
        # sees few of them.
        m = n if self.config["sde_steps"] == "all" else 1
        k = torch.randint(n - m + 1, (b,), device=self.device)
        after = torch.arange(n, device=self.device) - k[:, None]  # (B, N) steps after k
        chain = self.sde(prefix, state, noise, (after >= 0) & (after < m))
        visited = k[:, None] + torch.arange(m + 1, device=self.device)  # (B, m + 1) of the chain
        latent = {"x": chain[torch.arange(b, device=self.device)[:, None], visited], "k": k}
        # Once more, by the update's code: the ratio is 1 before the first step
        dist, value = self.distribution(prefix, state, latent)
        return Decision(self.env_action(chain[:, -1]), latent, self.logprob(dist, latent), value)

    def logprob(self, dist, latent):
        """Of the transitions in `latent` (B,), SUMMED over them, executed steps and dimensions."""
        # DEVIATION: one ratio per chunk for pi0, too. RLinf clips 35 ratios of pi0 one by one
        # ("token_level"); for pi0.5, which is the paper's model, it has one as well.
        after = latent["x"][:, 1:, : self.chunk, : self.config["action_env_dim"]]
        mean, std = dist.unbind(1)
        logp = -0.5 * ((after - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)
        return logp.sum((1, 2, 3))  # (B, m, chunk, 7) -> (B,)

    def evaluate_actions(self, obs, instructions, latent):
        dist, value = self.distribution(*self.observe(obs, instructions), latent)
        entropy = dist[:, 1].log() + 0.5 * math.log(2 * math.pi * math.e)  # fixed by the schedule
        return Evaluation(dist, self.logprob(dist, latent), entropy.mean((1, 2, 3)), value)

    def kl(self, p, q):
        """MEAN over transitions, executed steps and dimensions -> (B,). Both have the same std, so
        that it is (mean - mean')^2 / (2 std^2) per element."""
        # OPEN: a mean, as for tokens. Summed over 35 elements it would be at the paper's clip 0.08
        # almost always.
        return (((p[:, 0] - q[:, 0]) / p[:, 1]) ** 2 / 2).mean((1, 2, 3))

    def log_groups(self, latent):
        """By denoise step: at the last of 4 a KL weighs a change of velocity 15 times more."""
        if self.config["sde_steps"] == "all":
            return {}
        return {f"k{k}": latent["k"] == k for k in range(self.num_steps)}


# ------------------------------------------------------------------------------------ the backbones
class_of = {
    "openvla": TokenPolicy,
    "openvla-tiny": TokenPolicy,
    "openvla-flat": TokenPolicy,
    "pi0": FlowPolicy,
    "pi05": FlowPolicy,
    "pi05-tiny": FlowPolicy,
    "pi05-flat": FlowPolicy,
}
DEFAULT_CHECKPOINT = {  # "name@revision" pins it
    "openvla": "gen-robot/openvla-7b-rlvla-warmup",
    "pi0": "RLinf/RLinf-Pi0-ManiSkill-25Main-SFT",
    "pi05": "RLinf/RLinf-Pi05-ManiSkill-25Main-SFT",
}


@dataclass
class PolicyArgs:
    """The policy's flags, named as load_policy's keywords: load_policy(..., **vars(args))."""

    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """of the backbone's weights; auto: bfloat16 for a big one on a GPU, else float32"""
    unnorm_key: str | None = None
    """whose action statistics to use, a key of the checkpoint's norm_stats (default: the one it was
    trained with)"""
    tokenizer: str | None = None
    """a tokenizer.json (default: the one in the checkpoint)"""
    base: str | None = None
    """where an adapter's base model is, a directory or on the Hub (default: where it says)"""
    lora_rank: int = 0
    """rank of the LoRA adapters; 0 trains every weight ("LoRA", A.2; 32 is RL4VLA's and
    RLinf's, the paper's is lost)"""
    lora_alpha: int | None = None
    """the adapters' scale is alpha / rank (default: the rank, as RLinf; RL4VLA has 16)"""
    lora_targets: tuple[str, ...] | None = None
    """names of the layers that get an adapter, several words or a comma list (default: all-linear,
    RL4VLA's and RLinf's lists; of pi0 the VLM's)"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, half as much again to compute"""
    horizon: int | None = None
    """pi0, pi05: actions in a chunk ("Action prediction horizon", Table 3)"""
    replan: int | None = None
    """pi0, pi05: how many of them are executed before the next decision (Table 3)"""
    denoise_steps: int | None = None
    """pi0, pi05: N, steps from noise to action (Table 3)"""
    noise_level: float | None = None
    """pi0, pi05: a, how much noise Flow-SDE adds (Table 3)"""
    sde_steps: Literal["one", "all"] | None = None
    """pi0, pi05: which denoise steps of a rollout are stochastic, one at random in each sample or
    all of them"""


RANGES = {  # of the numbers, where they are given
    "at least 1": "lora_alpha horizon replan denoise_steps",
    "0 or more": "lora_rank",
    "above 0, up to 1000": "noise_level",
}


def target_names(lora_targets):
    """Layers by name from several words or comma lists; None, the network's own, for all-linear."""
    words = ",".join(lora_targets or ()).replace(" ", "").split(",")
    names = [word for word in words if word]
    return None if names == ["all-linear"] else names or None


def default_checkpoint(backbone: str) -> str:
    """The warm start that this repository ships, or the official one on the Hub."""
    if backbone in DEFAULT_CHECKPOINT:
        return DEFAULT_CHECKPOINT[backbone]
    shipped = Path(__file__).parent / "warmstart" / backbone
    if not shipped.is_dir():
        raise Fault(
            f"there is no {shipped}: pass --checkpoint, or make it "
            f"(`python sft.py --backbone {backbone} --out {shipped}`)"
        )
    return str(shipped)


# ------------------------------------------------------------------------------------------ loading
def load_policy(backbone, checkpoint=None, *, device="cpu", training=False, **flags):
    """A policy ready to act. flags: fields of PolicyArgs; an adapter brings its own rank, alpha and
    targets, and a flag that says otherwise is an error.

    checkpoint: a directory (full model, or a PEFT adapter), or OWNER/NAME[@REVISION] on the Hub.
    None: random weights for a small backbone, the default checkpoint for a big one.
    training: refuse what can act but not be trained.
    """
    if backbone not in class_of:
        raise Fault(f"unknown backbone {backbone!r}; choose one of {', '.join(class_of)}")
    policy_class = class_of[backbone]
    small = backbone in policy_class.small_configs
    foreign = {name for other in class_of.values() for name in other.settings}
    foreign -= policy_class.settings.keys()
    known = vars(PolicyArgs()).keys() - foreign
    for name, value in flags.items():
        if name not in known and value is not None:
            raise Fault(f"{flag_of(name)} is no setting of the backbone {backbone}; leave it out")
    args = PolicyArgs(**flags)
    check_ranges(args, RANGES)
    targets = target_names(args.lora_targets)
    dtype = DTYPES.get(args.dtype, args.dtype)
    if dtype not in DTYPES.values():
        raise Fault(f"--dtype {dtype} is none of {', '.join(DTYPES)}")
    if dtype is None:
        exact = small or torch.device(device).type == "cpu"
        dtype = torch.float32 if exact else torch.bfloat16

    checkpoint = checkpoint or (None if small else DEFAULT_CHECKPOINT[backbone])
    directory, name, commit, adapter = None, backbone, None, None
    if checkpoint:
        directory, name, commit, adapter = find_model(checkpoint, args.base, hub=not small)
    elif args.lora_rank:
        raise Fault(
            "LoRA needs a checkpoint to adapt; random weights would not be saved with the adapter"
        )
    if targets and not (adapter or args.lora_rank):
        raise Fault("--lora-targets is of adapters, and --lora-rank 0 makes none")
    if training and dtype != torch.float32 and not (args.lora_rank or adapter):
        raise Fault(
            "--lora-rank 0 trains every weight, and in bfloat16 most steps are too small to move "
            "one: use --lora-rank 32, or --dtype float32 (twice the memory)"
        )

    if commit and policy_class.config_needs_weights:
        download(name, commit, WEIGHTS)
    settings = {key: getattr(args, key) for key in policy_class.settings}
    settings = {key: value for key, value in settings.items() if value is not None}
    config = policy_class.read_config(backbone, directory, adapter, settings)
    stats, key, file = read_norm_stats(config, directory, adapter, args.unnorm_key)
    config["norm_stats"] = stats
    if key is None and policy_class.needs_norm_stats:
        raise Fault(f"{directory} has no statistics of actions (norm_stats in config.json)")
    tokenizer, tokenizer_file = read_tokenizer(
        policy_class.tokenizer_class, args.tokenizer, config, [adapter, directory]
    )
    if training and not small:  # now, because the weights take long
        check_tokenizer(tokenizer, policy_class.tokenizer_class, name)
    if commit:
        download(name, commit, WEIGHTS)
    policy = load_weights(policy_class, config, directory, dtype, device)
    policy.name, policy.commit, policy.directory = name, commit, directory
    policy.tokenizer, policy.tokenizer_file = tokenizer, tokenizer_file
    policy.gradient_checkpointing = args.gradient_checkpointing
    if key is not None:
        policy.use_norm_stats(key, file)
    if adapter:
        load_adapter(policy, adapter, args.lora_rank, args.lora_alpha, targets)
    elif args.lora_rank:
        policy.add_lora(args.lora_rank, args.lora_alpha, targets)
    return policy.to(device).eval()  # there is no dropout: train() would change nothing


# ------------------------------------------------------------------------------------- command line
# Files that the official loaders want, and nothing here reads.
OFFICIAL_BESIDES = ("preprocessor_config.json", "tokenizer_config.json", "special_tokens_map.json",
                    "added_tokens.json", "generation_config.json")  # fmt: skip


@torch.no_grad()
def merge(
    checkpoint: Positional[str],
    out: Positional[Path],
    base: str | None = None,
    backbone: str = "openvla",
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    device: str = "cpu",
):
    """Fold a LoRA checkpoint into its base model, write it to OUT under the official names, read it
    back and compare: exactly in float32, coarsely in bfloat16, which rounds the merged weights."""
    options = {"dtype": dtype, "device": device}
    check_empty(out)
    policy = load_policy(backbone, checkpoint, base=base, **options)
    if policy.lora_config is None:
        raise Fault(
            f"{checkpoint} is not an adapter (it has no adapter_config.json): nothing to merge"
        )
    before = policy.fixed_outputs()
    for module in policy.modules():
        if isinstance(module, LoraLayer):
            module.merge()
    state = {
        key.replace(".base_layer.", "."): tensor
        for key, tensor in policy.state_dict().items()
        if ".lora_" not in key and not key.startswith("value_head.")
    }
    for key, entry in open_tensors(policy.directory, "model").items():
        if policy.is_unused(policy.rename(key)):  # the official class wants them all the same
            state[policy.rename(key)] = entry[:].to(DTYPES[dtype])
    with writing_to(out):
        out.mkdir(exist_ok=True)
    save_torch_state_dict(
        state, out, filename_pattern="model{suffix}.safetensors", max_shard_size="5GB"
    )
    save_file(policy.value_head.state_dict(), out / "value_head.safetensors", {"format": "pt"})
    save_config(policy, out)
    save_tokenizer(policy, out)
    for name in OFFICIAL_BESIDES:
        if (policy.directory / name).is_file():
            shutil.copy(policy.directory / name, out / name)
    if policy.config["norm_stats"]:
        options["unnorm_key"] = policy.unnorm_key
    del policy, state, module  # two 7B models need not fit at once
    after = load_policy(backbone, out, **options).fixed_outputs()
    error = (after - before).abs()
    print(
        f"{out}: {backbone}'s outputs differ by {error.max():.2g} at most, {error.mean():.2g} on "
        f"average; their std is {before.std():.2g}"
    )
    if error.mean() > (1e-4 if dtype == "float32" else 0.3) * before.std():
        raise Fault(f"{out} does not compute what {checkpoint} does; do not use it")


if __name__ == "__main__":
    command_line(lambda: tyro.extras.subcommand_cli_from_dict({"merge": merge}))
