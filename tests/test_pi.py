"""pi0 and pi0.5: against the official code's fixtures (where they are at hand), against transformers, against itself."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import policies

GOLDEN = Path(__file__).parents[2] / "shared/golden"
KINDS = ["pi0", "pi05"]
golden = pytest.mark.skipif(not (GOLDEN / "pi05_tiny_a").exists(), reason=f"{GOLDEN} is not here")
EXACT = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(scope="module", params=KINDS)
def official(request):
    """policy, inputs and outputs of openpi's and RLinf's own code."""
    directory = GOLDEN / f"{request.param}_tiny_a"
    policy = policies.load_policy(request.param, directory, dtype=torch.float32)
    return policy, load_file(directory / "inputs.safetensors"), load_file(directory / "outputs.safetensors")


def prefix_of(policy, x, images="images"):
    return policy.prefix(x[images], x["image_masks"], x["tokens"], x["token_mask"])


def latent_of(chain, k):
    """What `act` stores of an official chain (B, N + 1, H, D) whose step k was stochastic."""
    return torch.cat([chain[:, k : k + 2], torch.full_like(chain[:, :1], k)], 1)


# ------------------------------------------------------------------------------------------------ official numbers
@golden
@torch.no_grad()
def test_golden_prefix_and_velocity(official):
    policy, x, y = official
    prefix = prefix_of(policy, x)
    assert prefix.mask.shape[1] < y["prefix_pad_masks"].shape[1]  # a camera and some padding were not computed
    torch.testing.assert_close(prefix.hidden[prefix.mask], y["prefix_hidden"][y["prefix_pad_masks"]], **EXACT)
    for t, v in zip(x["velocity_times"], y["velocity"]):
        torch.testing.assert_close(policy.velocity(prefix, x["state"], x["x_query"], t), v, **EXACT)
    v = policy.velocity(prefix, x["state"], x["x_query"], x["sft_time"])
    torch.testing.assert_close(v, y["velocity_per_sample_t"], **EXACT)


@golden
@torch.no_grad()
def test_golden_ode(official):
    policy, x, y = official
    for n in (4, 10):
        actions = policy.ode(prefix_of(policy, x), x["state"], x["noise"], n)
        torch.testing.assert_close(actions, y[f"ode_{n}"], **EXACT)
    actions = policy.ode(prefix_of(policy, x, "images_view"), x["state"], x["noise"], 4)
    torch.testing.assert_close(actions, y["ode_4_view"], **EXACT)


@golden
@torch.no_grad()
def test_golden_schedule(official):
    policy, _, y = official
    x = torch.zeros(1, policy.horizon, 32)
    for n in (3, 4, 5, 10):
        stds = torch.stack([policy.transition(x, x, k, n)[1][0, 0, 0] for k in range(n)])
        torch.testing.assert_close(stds, y[f"schedule.N{n}.std"], **EXACT)


@golden
@pytest.mark.parametrize("k", range(4))
@torch.no_grad()
def test_golden_flow_sde(official, k, monkeypatch):
    """The official rollout whose step k is stochastic: chain, transition, log-prob; values; the KL to the other view."""
    policy, x, y = official
    prefix, chain = prefix_of(policy, x), y[f"sde_k{k}.chains"]
    monkeypatch.setattr(torch, "randn_like", lambda mean: x["step_noise"][k])
    stochastic = torch.zeros(len(chain), 4, dtype=torch.bool)
    stochastic[:, k] = True
    torch.testing.assert_close(policy.sde(prefix, x["state"], x["noise"], stochastic), chain, **EXACT)

    latent = latent_of(chain, k)
    dist, value = policy.distribution(prefix, x["state"], latent)
    torch.testing.assert_close(dist.mean[:, 0], y[f"sde_k{k}.mean"][:, :5, :7], **EXACT)
    torch.testing.assert_close(dist.std[:, 0].expand(-1, 5, 7), y[f"sde_k{k}.std"][:, :5, :7], **EXACT)
    torch.testing.assert_close(policy.logprob(dist, latent), y[f"sde_k{k}.logprob"].sum((1, 2)), **EXACT)
    expected = y["values_valid_tokens"] if policy.pi05 else y[f"sde_k{k}.revalues"][:, 0]
    torch.testing.assert_close(value, expected, **EXACT)
    view, _ = policy.distribution(prefix_of(policy, x, "images_view"), x["state"], latent)
    torch.testing.assert_close(policy.kl(dist, view), y[f"derived.kl_k{k}"][:, :5, :7].mean((1, 2)), atol=4e-5, rtol=1e-4)


@golden
@torch.no_grad()
def test_golden_all_steps_stochastic(official, monkeypatch):
    policy, x, y = official
    prefix, chain, noise = prefix_of(policy, x), y["sde_all.chains"], iter(x["step_noise"])
    monkeypatch.setattr(torch, "randn_like", lambda mean: next(noise))
    torch.testing.assert_close(policy.sde(prefix, x["state"], x["noise"], torch.ones(3, 4).bool()), chain, **EXACT)
    latent = torch.cat([chain, torch.zeros_like(chain[:, :1])], 1)
    dist, _ = policy.distribution(prefix, x["state"], latent)
    torch.testing.assert_close(dist.mean, y["sde_all.means"][..., :5, :7], **EXACT)
    torch.testing.assert_close(dist.std.flatten(1), y["sde_all.stds"], **EXACT)
    expected = y["sde_all.logprob_per_step_full"][:, 1:, :5, :7].sum((1, 2, 3))  # entry 0: the start, which cancels
    torch.testing.assert_close(policy.logprob(dist, latent), expected, atol=2e-4, rtol=1e-4)


@golden
@pytest.mark.parametrize("what", ["sft", "rl", "derived.kl"])
def test_golden_gradients(official, what):
    policy, x, y = official
    policy.zero_grad(set_to_none=True)
    prefix, latent = prefix_of(policy, x), latent_of(y["sde_k1.chains"], 1)
    if what == "sft":
        loss = policy.flow_loss(prefix, x["state"], x["actions"], x["sft_noise"], x["sft_time"])
        torch.testing.assert_close(loss, y["sft.loss"], atol=4e-5, rtol=1e-4)
    else:
        dist, _ = policy.distribution(prefix, x["state"], latent)
        loss = policy.logprob(dist, latent) / 35
        if what == "derived.kl":
            view, _ = policy.distribution(prefix_of(policy, x, "images_view"), x["state"], latent)
            loss = policy.kl(dist, policies.Gaussian(view.mean.detach(), view.std))
            torch.testing.assert_close(loss.mean(), y["derived.kl_loss_k1"][0], atol=4e-5, rtol=1e-4)
    loss.mean().backward()
    grads = {key.removeprefix(f"{what}.grad.").removeprefix(f"{what}_grad."): g for key, g in y.items() if "grad." in key}
    grads = {key: g for key, g in grads.items() if not key.startswith(("sft.", "rl.", "derived."))}
    assert len(grads) == 7
    parameters = dict(policy.named_parameters())
    for key, expected in grads.items():
        assert (parameters[key].grad - expected).norm() < 1e-3 * expected.norm(), key
    policy.zero_grad(set_to_none=True)


@golden
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_golden_half_precision(kind):
    """bfloat16 VLM: near the float32 numbers, as near as openpi's mixed precision is."""
    directory = GOLDEN / f"{kind}_tiny_a"
    policy = policies.load_policy(kind, directory, dtype=torch.bfloat16)
    assert policy.dtype == torch.bfloat16 and policy.action_in_proj.weight.dtype == torch.float32
    x, y = load_file(directory / "inputs.safetensors"), load_file(directory / "outputs.safetensors")
    prefix = prefix_of(policy, x)
    v = torch.stack([policy.velocity(prefix, x["state"], x["x_query"], t) for t in x["velocity_times"]])
    assert v.dtype == torch.float32 and (v - y["velocity"]).abs().mean() < 0.05


@golden
@pytest.mark.parametrize("kind", KINDS)
def test_golden_preprocessing(kind):
    """Images, states, actions and prompts, both ways, with official statistics."""
    policy = policies.load_policy(kind, GOLDEN / f"{kind}_tiny_a", dtype=torch.float32)
    prep, text = load_file(GOLDEN / "pi_prep/prep.safetensors"), json.loads((GOLDEN / "pi_prep/prep.json").read_text())
    for size, image in ((28, "image_48x64"), (224, "image_480x640")):
        policy.image_size = size
        ours = ((policy.preprocess(prep[image][None]) + 1) * 127.5).permute(0, 2, 3, 1)[0]
        assert (ours - prep[f"resized_pil_{size}"].float()).abs().max() <= 1.001
        assert policy.preprocess(prep[image][None]).min() == -1  # black rows

    policy.config["norm_stats"] = json.loads((GOLDEN / "pi_prep/norm_stats.json").read_text())
    policy.config["norm_stats"] = {"norm_stats": policy.config["norm_stats"]["norm_stats"]}
    policy.config["discrete_state_input"] = True  # pi0.5 reads a state only then
    policy.use_norm_stats("norm_stats")
    rule = "quantile" if policy.pi05 else "zscore"
    exact = {"atol": 1e-6, "rtol": 1e-6}
    torch.testing.assert_close(policy.normalize("state", prep["state_raw"]), prep[f"{rule}.state"], **exact)
    torch.testing.assert_close(policy.normalize("actions", prep["actions_raw"]), prep[f"{rule}.actions"], **exact)
    torch.testing.assert_close(policy.unnormalize(prep["model_actions"]), prep[f"{rule}.unnorm_actions"], **exact)
    torch.testing.assert_close(policy.env_action(prep["model_actions"]), prep[f"{rule}.env_actions"], **exact)

    for row in text["prompts"]:
        official = [piece for piece, _ in row["pi0_or_stateless_pi05_encode_calls"]]
        assert policy.prompt_pieces(row["prompt"]) == official
        if policy.pi05:
            state = policy.normalize("state", prep["state_raw"])[row["state_row"], :8]
            official = [piece for piece, _ in row["pi05_discrete_state_encode_calls"]]
            assert policy.prompt_pieces(row["prompt"], state) == official
