"""pi0 and pi0.5: against the official code's fixtures (where they are at hand), against transformers, against itself."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

import policies
from backbones.pi0 import PI, PI05_TINY, PI_KIND, PI_LORA_TARGETS
from backbones.tokenizers import PaliGemmaTokenizer, WordTokenizer
from runtime import Fault

GOLDEN = Path(__file__).parents[2] / "shared/golden"
KINDS = ["pi0", "pi05"]
golden = pytest.mark.skipif(not (GOLDEN / "pi05_tiny_a").exists(), reason=f"{GOLDEN} is not here")
EXACT = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(scope="module", params=KINDS)
def official(request):
    """policy, inputs and outputs of openpi's and RLinf's own code."""
    directory = GOLDEN / f"{request.param}_tiny_a"
    policy = policies.load_policy(request.param, directory, dtype=torch.float32)
    return (
        policy,
        load_file(directory / "inputs.safetensors"),
        load_file(directory / "outputs.safetensors"),
    )


def prefix_of(policy, x, images="images"):
    return policy.prefix(x[images], x["image_masks"], x["tokens"], x["token_mask"])


def latent_of(chain, k):
    """What `act` stores of an official chain (B, N + 1, H, D) whose step k was stochastic."""
    return {"x": chain[:, k : k + 2], "k": torch.full((len(chain),), k)}


# ------------------------------------------------------------------------------------------------ official numbers
@golden
@torch.no_grad()
def test_golden_prefix_and_velocity(official):
    policy, x, y = official
    prefix = prefix_of(policy, x)
    assert (
        prefix.mask.shape[1] < y["prefix_pad_masks"].shape[1]
    )  # a camera and some padding were not computed
    torch.testing.assert_close(
        prefix.hidden[prefix.mask], y["prefix_hidden"][y["prefix_pad_masks"]], **EXACT
    )
    for t, v in zip(x["velocity_times"], y["velocity"]):
        torch.testing.assert_close(policy.velocity(prefix, x["state"], x["x_query"], t), v, **EXACT)
    v = policy.velocity(prefix, x["state"], x["x_query"], x["sft_time"])
    torch.testing.assert_close(v, y["velocity_per_sample_t"], **EXACT)
    longer = F.pad(x["x_query"], (0, 0, 0, 3))  # than config.json's horizon
    assert policy.velocity(prefix, x["state"], longer, x["sft_time"]).shape == longer.shape


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
    torch.testing.assert_close(
        policy.sde(prefix, x["state"], x["noise"], stochastic), chain, **EXACT
    )

    latent = latent_of(chain, k)
    dist, value = policy.distribution(prefix, x["state"], latent)
    torch.testing.assert_close(dist[:, 0, 0], y[f"sde_k{k}.mean"][:, :5, :7], **EXACT)
    torch.testing.assert_close(dist[:, 1, 0], y[f"sde_k{k}.std"][:, :5, :7], **EXACT)
    torch.testing.assert_close(
        policy.logprob(dist, latent), y[f"sde_k{k}.logprob"].sum((1, 2)), **EXACT
    )
    expected = y["values_valid_tokens"] if policy.pi05 else y[f"sde_k{k}.revalues"][:, 0]
    torch.testing.assert_close(value, expected, **EXACT)
    view, _ = policy.distribution(prefix_of(policy, x, "images_view"), x["state"], latent)
    torch.testing.assert_close(
        policy.kl(dist, view), y[f"derived.kl_k{k}"][:, :5, :7].mean((1, 2)), atol=4e-5, rtol=1e-4
    )


@golden
@torch.no_grad()
def test_golden_all_steps_stochastic(official, monkeypatch):
    policy, x, y = official
    prefix, chain, noise = prefix_of(policy, x), y["sde_all.chains"], iter(x["step_noise"])
    monkeypatch.setattr(torch, "randn_like", lambda mean: next(noise))
    torch.testing.assert_close(
        policy.sde(prefix, x["state"], x["noise"], torch.ones(3, 4).bool()), chain, **EXACT
    )
    latent = {"x": chain, "k": torch.zeros(len(chain), dtype=torch.long)}
    dist, _ = policy.distribution(prefix, x["state"], latent)
    torch.testing.assert_close(dist[:, 0], y["sde_all.means"][..., :5, :7], **EXACT)
    torch.testing.assert_close(dist[:, 1, :, 0, 0], y["sde_all.stds"], **EXACT)
    expected = y["sde_all.logprob_per_step_full"][:, 1:, :5, :7].sum(
        (1, 2, 3)
    )  # entry 0: the start, which cancels
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
            loss = policy.kl(dist, view.detach())
            torch.testing.assert_close(
                loss.mean(), y["derived.kl_loss_k1"][0], atol=4e-5, rtol=1e-4
            )
    loss.mean().backward()
    grads = {
        key.removeprefix(f"{what}.grad.").removeprefix(f"{what}_grad."): g
        for key, g in y.items()
        if "grad." in key
    }
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
    v = torch.stack(
        [policy.velocity(prefix, x["state"], x["x_query"], t) for t in x["velocity_times"]]
    )
    assert v.dtype == torch.float32 and (v - y["velocity"]).abs().mean() < 0.05


@golden
@pytest.mark.parametrize("kind", KINDS)
def test_golden_preprocessing(kind):
    """Images, states, actions and prompts, both ways, with official statistics."""
    policy = policies.load_policy(kind, GOLDEN / f"{kind}_tiny_a", dtype=torch.float32)
    prep, text = (
        load_file(GOLDEN / "pi_prep/prep.safetensors"),
        json.loads((GOLDEN / "pi_prep/prep.json").read_text()),
    )
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
    torch.testing.assert_close(
        policy.normalize("state", prep["state_raw"]), prep[f"{rule}.state"], **exact
    )
    torch.testing.assert_close(
        policy.normalize("actions", prep["actions_raw"]), prep[f"{rule}.actions"], **exact
    )
    torch.testing.assert_close(
        policy.unnormalize(prep["model_actions"]), prep[f"{rule}.unnorm_actions"], **exact
    )
    torch.testing.assert_close(
        policy.env_action(prep["model_actions"]), prep[f"{rule}.env_actions"], **exact
    )

    for row in text["prompts"]:
        official = [piece for piece, _ in row["pi0_or_stateless_pi05_encode_calls"]]
        assert policy.prompt_pieces(row["prompt"]) == official
        if policy.pi05:
            state = policy.normalize("state", prep["state_raw"])[row["state_row"], :8]
            official = [piece for piece, _ in row["pi05_discrete_state_encode_calls"]]
            assert policy.prompt_pieces(row["prompt"], state) == official


# ------------------------------------------------------------------------------------------------ against itself
def small(kind="pi05", **changes):
    """A policy of random weights, every one of which matters, 2 layers deep."""
    config = PI | PI_KIND[kind] | {"model_type": kind}
    config |= {
        "image_size": 28, "vis_width": 32, "vis_depth": 2, "vis_heads": 4, "vis_mlp": 48, "vocab": 128, "depth": 2,
        "heads": 8, "head_dim": 16, "vlm_width": 64, "vlm_mlp": 96, "exp_width": 32, "exp_mlp": 64,
        "value_head_hidden": [16, 8], "prompt": "{instruction} <out>", "_word_vocab": PI05_TINY["_word_vocab"],
    }  # fmt: skip
    stats = {"mean": [0.1] * 8, "std": [0.5] * 8, "q01": [-0.9] * 8, "q99": [1.1] * 8}
    config["norm_stats"] = {"norm_stats": {"actions": stats, "state": stats}}
    generator = torch.Generator().manual_seed(0)
    policy = policies.FlowPolicy(config | changes).eval()
    for key, p in policy.named_parameters():
        std = p[0].numel() ** -0.5 if p.ndim > 1 and "lm_head" not in key else 0.1
        p.data = torch.randn(p.shape, generator=generator) * std
    policy.use_norm_stats("norm_stats")
    policy.tokenizer = WordTokenizer(config["_word_vocab"])
    return policy


@pytest.fixture(scope="module", params=KINDS)
def policy(request):
    return small(request.param)


TASKS = ["put red cube on plate", "put toy bear on plate", "put can on plate"]


@pytest.fixture(scope="module")
def obs():
    generator = torch.Generator().manual_seed(1)
    rgb = torch.randint(256, (3, 28, 28, 3), dtype=torch.uint8, generator=generator)
    return {"rgb": rgb, "state": torch.randn(3, 8, generator=generator)}


@pytest.fixture(scope="module")
def inputs():
    """images, image_masks, tokens, token_mask with holes of every kind; state; x."""
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(3, 3, 3, 28, 28, generator=generator) * 2 - 1
    there = torch.tensor([[True, False, False], [True, False, False], [True, True, False]])
    tokens = torch.randint(4, 100, (3, 12), generator=generator)
    mask = torch.arange(12) < torch.tensor([[5], [9], [3]])
    return (
        images,
        there,
        tokens,
        mask,
        torch.randn(3, 32, generator=generator),
        torch.randn(3, 8, 32, generator=generator),
    )


def literal_attention(q, k, v, visible):
    """softmax(q k / sqrt(d)) v, one query at a time: q (n, h, d), k, v (m, d), visible (n, m) bool -> (n, h d)."""
    rows = []
    for i in range(len(q)):
        seen = visible[i].nonzero().flatten()
        weights = torch.softmax(q[i] @ k[seen].T / q.shape[-1] ** 0.5, -1)  # (h, seen)
        rows.append((weights @ v[seen]).flatten())
    return torch.stack(rows)


def literal_rotary(x, positions):
    """Each pair (i, i + d/2) of x (n, h, d) turned by position * 10000^(-2i/d)."""
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    for n, position in enumerate(positions.tolist()):
        for i in range(half):
            angle = position * 10000.0 ** (-2 * i / x.shape[-1])
            a, b = x[n, :, i], x[n, :, i + half]
            out[n, :, i] = a * math.cos(angle) - b * math.sin(angle)
            out[n, :, i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


@torch.no_grad()
def test_joint_attention_and_adarms_equal_the_literal_formulas(policy, inputs):
    """Prefix and suffix in ONE sequence of one sample, both experts side by side, every formula written out: no cache, no
    mask tricks, no transformers."""
    images, there, tokens, mask, state, x = inputs
    b, t = 2, 0.3
    prefix = policy.prefix(images, there, tokens, mask)
    expected_v = policy.velocity(prefix, state, x, t)[b]
    w = {key.removeprefix("paligemma_with_expert."): p for key, p in policy.state_dict().items()}

    def rms(h, eps=1e-6):
        return h / (h.pow(2).mean(-1, keepdim=True) + eps).sqrt()

    def norm(h, key, cond):  # -> normed, gate
        if key + ".weight" in w:
            return rms(h) * (1 + w[key + ".weight"]), 1.0
        scale, shift, gate = (w[key + ".dense.weight"] @ cond + w[key + ".dense.bias"]).split(
            h.shape[-1]
        )
        return rms(h) * (1 + scale) + shift, gate

    seen = policy.see(images[b, :2]).flatten(
        0, 1
    )  # two cameras (4 patches each); the tower has its own test
    words = w["paligemma.lm_head.weight"][tokens[b, mask[b]]] * 64**0.5
    omega = 2 * math.pi / (4e-3 * 1000 ** torch.linspace(0, 1, 16, dtype=torch.float64))
    time = torch.cat(
        [(omega * float(torch.tensor(t))).sin(), (omega * float(torch.tensor(t))).cos()]
    ).float()
    action, cond = F.linear(x[b], w["action_in_proj.weight"], w["action_in_proj.bias"]), None
    if policy.pi05:
        cond = F.silu(policy.time_mlp_out(F.silu(policy.time_mlp_in(time))))
    else:
        h = F.silu(policy.action_time_mlp_in(torch.cat([action, time.expand(8, -1)], -1)))
        action = torch.cat([policy.state_proj(state[b])[None], policy.action_time_mlp_out(h)])
    streams = {
        "paligemma.model.language_model": torch.cat([seen, words]),
        "gemma_expert.model": action,
    }
    p, s = (len(h) for h in streams.values())
    visible = torch.ones(p + s, p + s).bool()
    visible[:p, p:] = False
    if not policy.pi05:
        visible[p, p + 1 :] = False
    positions = torch.arange(p + s)
    for i in range(2):
        qkv, gates = {"q": [], "k": [], "v": []}, {}
        for name, h in streams.items():
            y, gates[name] = norm(h, f"{name}.layers.{i}.input_layernorm", cond)
            for part in "qkv":
                qkv[part].append(
                    (y @ w[f"{name}.layers.{i}.self_attn.{part}_proj.weight"].T).unflatten(
                        -1, (-1, 16)
                    )
                )
        q, k, v = (torch.cat(qkv[part]) for part in "qkv")
        out = literal_attention(
            literal_rotary(q, positions), literal_rotary(k, positions)[:, 0], v[:, 0], visible
        )
        for name, y in zip(streams, out.split([p, s])):
            layer = f"{name}.layers.{i}"
            h = streams[name] + gates[name] * (y @ w[f"{layer}.self_attn.o_proj.weight"].T)
            y, gate = norm(h, f"{layer}.post_attention_layernorm", cond)
            up = F.gelu(y @ w[f"{layer}.mlp.gate_proj.weight"].T, approximate="tanh") * (
                y @ w[f"{layer}.mlp.up_proj.weight"].T
            )
            streams[name] = h + gate * (up @ w[f"{layer}.mlp.down_proj.weight"].T)
    hidden = [norm(h, f"{name}.norm", cond)[0] for name, h in streams.items()]
    torch.testing.assert_close(prefix.hidden[b][prefix.mask[b]], hidden[0], atol=2e-5, rtol=1e-4)
    v = hidden[1][-8:] @ w["action_out_proj.weight"].T + w["action_out_proj.bias"]
    torch.testing.assert_close(v, expected_v, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_pi0_equals_transformers(inputs):
    """PI0ForConditionalGeneration with our weights: its time embedding is float32, which is all that differs."""
    from transformers import PI0Config, PI0ForConditionalGeneration

    policy, (images, there, tokens, mask, state, x) = small("pi0"), inputs
    text = {
        "model_type": "gemma",
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "image_size": 28,
        "patch_size": 14,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vision_use_head": False,
        "projection_dim": 64,
        "hidden_act": "gelu_pytorch_tanh",
    }
    vlm = {
        "model_type": "paligemma",
        "vision_config": vision,
        "projection_dim": 64,
        "image_token_id": 127,
        "text_config": text | {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 128},
    }
    dit = text | {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 128}
    native = PI0ForConditionalGeneration(
        PI0Config(vlm_config=vlm, dit_config=dit, chunk_size=8)
    ).eval()
    renames = [
        (
            "paligemma_with_expert.paligemma.model.vision_tower.vision_model.",
            "model.vlm.vision_tower.",
        ),
        ("paligemma_with_expert.paligemma.model.", "model.vlm."),
        ("paligemma_with_expert.paligemma.lm_head.", "model.vlm.language_model.embed_tokens."),
        ("paligemma_with_expert.gemma_expert.model.", "model.dit."),
        ("action_time_mlp", "embed_action_time.action_time_mlp"),
        ("action_in_proj", "embed_action_time.action_in_proj"),
        ("state_proj", "embed_action_time.state_proj"),
    ]
    state_dict = {}
    for key, p in policy.state_dict().items():
        old, new = next(((old, new) for old, new in renames if key.startswith(old)), ("", ""))
        state_dict[new + key.removeprefix(old)] = p
    missing, unexpected = native.load_state_dict(state_dict, strict=False)
    assert missing == ["model.dit.embed_tokens.weight"] and all(
        key.startswith("value_head.") for key in unexpected
    )

    there = there[
        :, :1
    ]  # where the native model has images, it wants them in front of every prompt
    ids = torch.cat([torch.full((3, 4), 127), tokens], 1)
    valid = torch.cat([torch.ones(3, 4).bool(), mask], 1)
    prefix = policy.prefix(images[:, :1], there, tokens, mask)
    for t in (1.0, 0.25, 0.01):
        output = native(
            state=state,
            noise=x,
            timestep=torch.full((3,), t),
            input_ids=ids,
            pixel_values=images[:, :1],
            pixel_attention_mask=there,
            attention_mask=valid,
        )
        torch.testing.assert_close(
            policy.velocity(prefix, state, x, t), output.logits, atol=3e-4, rtol=1e-3
        )


def test_time_embedding_is_exact():
    """Its frequencies go up to 1571: what float32 loses there would be 1e-4."""
    policy, times = small(), torch.tensor([0.001, 0.7, 0.999, 1.0])
    got = policy.time_embedding(times)
    for row, t in zip(got, times.tolist()):
        angles = [2 * math.pi * t / (4e-3 * 1000 ** (i / 15)) for i in range(16)]
        exact = [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        torch.testing.assert_close(row, torch.tensor(exact), atol=2e-7, rtol=0)


@torch.no_grad()
def test_what_is_not_there_changes_nothing(policy, inputs):
    """Neither the pixels of an absent camera nor the ids in the padding; nor whether they are passed at all."""
    images, there, tokens, mask, state, x = inputs
    v = policy.velocity(policy.prefix(images, there, tokens, mask), state, x, 0.5)
    noise = torch.where(there[..., None, None, None], images, torch.rand_like(images))
    ids = torch.where(mask, tokens, torch.randint_like(tokens, 100))
    torch.testing.assert_close(
        policy.velocity(policy.prefix(noise, there, ids, mask), state, x, 0.5), v, atol=1e-5, rtol=0
    )
    for b in range(3):  # alone, without its neighbours' padding
        prefix = policy.prefix(
            images[b : b + 1], there[b : b + 1], tokens[b : b + 1], mask[b : b + 1]
        )
        assert prefix.mask.all()  # nothing superfluous is computed
        one = policy.velocity(prefix, state[b : b + 1], x[b : b + 1], 0.5)
        torch.testing.assert_close(one[0], v[b], atol=1e-5, rtol=0)
        assert prefix.hidden.shape[1] == 4 * there[b].sum() + mask[b].sum()
        value = (
            policy.prefix_value(policy.prefix(images, there, tokens, mask)) if policy.pi05 else None
        )
        if policy.pi05:
            torch.testing.assert_close(policy.prefix_value(prefix)[0], value[b], atol=1e-5, rtol=0)


@torch.no_grad()
def test_every_input_matters(policy, inputs):
    images, there, tokens, mask, state, x = inputs
    v = policy.velocity(policy.prefix(images, there, tokens, mask), state, x, 0.5)

    def moved(images=images, tokens=tokens, state=state, x=x, t=0.5):
        return (
            (policy.velocity(policy.prefix(images, there, tokens, mask), state, x, t) - v)
            .abs()
            .amax((1, 2))
        )

    assert (moved(images=-images) > 1e-3).all() and (moved(tokens=tokens.roll(1, 1)) > 1e-3).all()
    assert (moved(x=x + 0.1) > 1e-3).all() and (moved(t=0.6) > 1e-3).all()
    assert (
        (moved(state=state + 1) > 1e-3).all()
        if not policy.pi05
        else (moved(state=state + 1) == 0).all()
    )


# ------------------------------------------------------------------------------------------------ Flow-SDE
@pytest.mark.parametrize("a, n", [(0.5, 4), (0.3, 7), (1.0, 1)])
def test_transition_is_the_published_schedule(a, n):
    """sigma_k^2 = a^2 t/(1-t) (1 - t_1 at k = 0), std = sigma sqrt(delta), and the mean by predicted noise and action."""
    policy, generator = small(noise_level=a), torch.Generator().manual_seed(0)
    x, v = torch.randn(2, n, 8, 32, generator=generator)
    t = [1 - k / n for k in range(n + 1)]
    for k in range(n):
        sigma = a * (t[k] / (1 - (t[1] if k == 0 else t[k]))) ** 0.5
        action, noise = x[k] - t[k] * v[k], x[k] + (1 - t[k]) * v[k]
        expected = action * (1 - t[k + 1]) + noise * (t[k + 1] - sigma**2 / n / (2 * t[k]))
        mean, std = policy.transition(x[k : k + 1], v[k : k + 1], k, n)
        torch.testing.assert_close(mean[0], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(std[0], torch.full_like(expected, sigma * (1 / n) ** 0.5))
    mean, std = policy.transition(x, v, torch.arange(n), n)  # a step for every sample
    torch.testing.assert_close(mean[-1:], policy.transition(x[-1:], v[-1:], n - 1, n)[0])


def test_without_noise_the_transition_is_the_ode_step():
    policy, (x, v) = small(noise_level=1e-4), torch.randn(2, 4, 8, 32)
    mean, std = policy.transition(x, v, torch.arange(4), 4)
    torch.testing.assert_close(mean, x - v / 4, atol=1e-6, rtol=0)
    assert std.max() < 2e-4


@torch.no_grad()
def test_added_drift_keeps_the_marginals():
    """For Gaussian data the velocity is known: many small SDE steps must end in the data's distribution as the ODE does."""
    policy, n, data_std = small(noise_level=0.5), 400, 0.3
    torch.manual_seed(0)
    x = torch.randn(400, 8, 32)
    for k in range(n):
        t = 1 - k / n
        v = (
            x * (t - (1 - t) * data_std**2) / (t**2 + (1 - t) ** 2 * data_std**2)
        )  # E[noise - action | x]
        mean, std = policy.transition(x, v, k, n)
        x = mean + std * torch.randn_like(x)
    assert abs(x.std().item() / data_std - 1) < 0.02 and abs(x.mean()) < 0.01


@pytest.mark.parametrize("steps", ["one", "all"])
@torch.no_grad()
def test_act_and_evaluate_agree(policy, obs, steps):
    """The log-prob is that of torch.distributions over executed steps and dimensions; evaluate repeats act's to the bit."""
    policy.config["sde_steps"] = steps
    torch.manual_seed(0)
    decision = policy.act(obs, TASKS)
    new = policy.evaluate_actions(obs, TASKS, decision.latent)
    m = 1 if steps == "one" else 4
    chain, k = decision.latent["x"], decision.latent["k"]
    assert decision.actions.shape == (3, 5, 7)
    assert chain.shape == (3, m + 1, 8, 32) and k.shape == (3,) and k.dtype == torch.long
    assert torch.equal(new.logprob, decision.logprob) and torch.equal(new.value, decision.value)

    prefix, state = policy.observe(obs, TASKS)
    expected = torch.zeros(3)
    for b in range(3):
        one = prefix.take(torch.tensor([b]))
        for i in range(m):
            x, after = chain[b : b + 1, i], chain[b : b + 1, i + 1]
            v = policy.velocity(
                one, None if state is None else state[b : b + 1], x, 1 - (k[b].item() + i) / 4
            )
            mean, std = policy.transition(x, v, k[b].item() + i, 4)
            expected[b] += torch.distributions.Normal(mean, std).log_prob(after)[0, :5, :7].sum()
    torch.testing.assert_close(decision.logprob, expected, atol=1e-3, rtol=1e-5)
    policy.config["sde_steps"] = "one"


@torch.no_grad()
def test_each_sample_draws_its_own_step(obs):
    policy = small()
    torch.manual_seed(0)
    rgb, state = obs["rgb"][:1].expand(400, -1, -1, -1), obs["state"][:1].expand(400, -1)
    latent = policy.act({"rgb": rgb, "state": state}, TASKS[:1] * 400).latent
    k = latent["k"]
    assert (k.bincount(minlength=4) - 100).abs().max() < 40
    assert {name: rows.sum().item() for name, rows in policy.log_groups(latent).items()} == {
        f"k{i}": n for i, n in enumerate(k.bincount().tolist())
    }
    # the step in question was drawn, the ones before it were not: from x_1 on, a chain with k > 0 is the ODE's
    prefix, state = policy.observe({"rgb": rgb, "state": state}, TASKS[:1] * 400)
    dist, _ = policy.distribution(prefix, state, latent)
    z = ((latent["x"][:, 1, :5, :7] - dist[:, 0, 0]) / dist[:, 1, 0]).flatten()
    assert abs(z.mean()) < 0.03 and abs(z.std() - 1) < 0.03


@torch.no_grad()
def test_sde_of_no_stochastic_step_is_the_ode(policy, inputs):
    images, there, tokens, mask, state, x = inputs
    prefix = policy.prefix(images, there, tokens, mask)
    chain = policy.sde(prefix, state, x, torch.zeros(3, 4).bool())
    torch.testing.assert_close(chain[:, -1], policy.ode(prefix, state, x, 4))


@torch.no_grad()
def test_kl_is_a_mean_with_the_published_coefficients(inputs):
    """KL against Monte Carlo; per element c_k (v - v')^2; a mean over 5 x 7, where the log-prob is a sum over them."""
    policy, (_, _, _, _, _, x) = small(), inputs
    torch.manual_seed(0)
    v, other = torch.randn(2, 3, 8, 32)
    for k, c in enumerate((0.125, 0.2109375, 0.6328125, 1.8984375)):
        (mean, std), (mean_other, _) = (
            policy.transition(x, v, k, 4),
            policy.transition(x, other, k, 4),
        )
        p, q = (
            torch.stack([m[:, None, :5, :7], std[:, None, :5, :7]], 1) for m in (mean, mean_other)
        )
        kl = policy.kl(p, q)
        torch.testing.assert_close(
            kl, c * (v - other)[:, :5, :7].pow(2).mean((1, 2)), atol=0, rtol=1e-4
        )
        assert torch.equal(policy.kl(p, p), torch.zeros(3))
    samples = mean + std * torch.randn(5_000, *mean.shape)
    logps = [
        torch.distributions.Normal(m, std).log_prob(samples)[..., :5, :7].mean((-1, -2))
        for m in (mean, mean_other)
    ]
    torch.testing.assert_close((logps[0] - logps[1]).mean(0), kl, atol=0.02, rtol=0.04)


def test_gradients_reach_every_weight_through_both_losses(policy, obs):
    torch.manual_seed(0)
    latent = policy.act(obs, TASKS).latent
    new, view = (
        policy.evaluate_actions(obs, TASKS, latent),
        policy.evaluate_actions({**obs, "rgb": obs["rgb"].flip(1)}, TASKS, latent),
    )
    (new.logprob.sum() + new.value.sum() + policy.kl(new.dist, view.dist).sum()).backward()
    # pi0.5's critic reads the VLM's last layer; of pi0's, the actions use only its keys and values
    last = f"language_model.layers.{policy.config['depth'] - 1}"
    idle = (
        ()
        if policy.pi05
        else (
            f"{last}.self_attn.q",
            f"{last}.self_attn.o",
            f"{last}.mlp",
            f"{last}.post",
            "language_model.norm",
        )
    )
    for key, p in policy.named_parameters():
        reached = p.grad is not None and p.grad.abs().sum() > 0
        assert reached != any(name in key for name in idle), key
    policy.zero_grad(set_to_none=True)
    policy.detach_value = True
    policy.evaluate_actions(obs, TASKS, latent).value.sum().backward()
    assert all(
        (p.grad is not None) == key.startswith("value_head.")
        for key, p in policy.named_parameters()
    )
    policy.detach_value = False
    policy.zero_grad(set_to_none=True)


def test_recomputed_activations_give_the_same_gradients(policy, obs):
    torch.manual_seed(0)
    latent, grads = policy.act(obs, TASKS).latent, []
    for policy.gradient_checkpointing in (False, True):
        policy.evaluate_actions(obs, TASKS, latent).logprob.sum().backward()
        grads.append({key: p.grad for key, p in policy.named_parameters() if p.grad is not None})
        policy.zero_grad(set_to_none=True)
    policy.gradient_checkpointing = False
    assert grads[0].keys() == grads[1].keys()
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad)


def test_recomputed_layers_leave_the_prefix_as_it_was(policy, obs):
    """A recomputed key would keep a second graph of its layer until the whole backward pass ends."""
    policy.gradient_checkpointing = True
    latent = policy.act(obs, TASKS).latent
    prefix, state = policy.observe(obs, TASKS)
    before = dict(prefix.kv)
    policy.logprob(policy.distribution(prefix, state, latent)[0], latent).sum().backward()
    policy.gradient_checkpointing = False
    policy.zero_grad(set_to_none=True)
    assert all(prefix.kv[i][0] is k and prefix.kv[i][1] is v for i, (k, v) in before.items())


@torch.no_grad()
def test_evaluation_is_the_ode(policy, obs):
    torch.manual_seed(0)
    noise = torch.randn(3, 8, 32)
    torch.manual_seed(0)
    decision = policy.act(obs, TASKS, 0.6)
    assert torch.equal(
        decision.actions, policy.env_action(policy.ode(*policy.observe(obs, TASKS), noise, 4))
    )
    assert decision.logprob is None  # a deterministic map has none
    assert torch.equal(
        policy.act(obs, TASKS, 0).actions, policy.act(obs, TASKS, 0).actions
    )  # from no noise at all


def test_units_and_gripper(policy):
    actions = torch.linspace(-0.7, 0.9, 2 * 8 * 7, dtype=torch.float64).reshape(2, 8, 7)
    x = policy.normalize("actions", actions)
    assert x.shape == (2, 8, 32) and not x[..., 7:].any()
    torch.testing.assert_close(policy.unnormalize(x), actions)
    chunk = policy.env_action(x)
    torch.testing.assert_close(chunk[..., :6], actions[:, :5, :6].float())
    assert torch.equal(chunk[..., 6], torch.where(actions[:, :5, 6] > 0.5, 1.0, -1.0))


def test_a_squashed_picture_is_set_right(policy):
    """The environment squashes a 4:3 camera into a square; openpi sees it 4:3 between black bars."""
    rgb = torch.full((1, 28, 28, 3), 200, dtype=torch.uint8)
    x = policy.preprocess(rgb)[0, 0]
    assert (
        x.shape == (28, 28) and (x[:3] == -1).all() and (x[-4:] == -1).all() and (x[3:-4] > 0).all()
    )
    policy.config["camera_aspect"] = 1.0
    assert (policy.preprocess(rgb) > 0).all()
    policy.config["camera_aspect"] = 4 / 3


def test_prompts_are_padded_on_the_right(policy):
    tokens, mask = policy.tokenize(["put can on plate", "put red cube on plate"])
    assert mask.tolist() == [[True] * 6 + [False], [True] * 7] and tokens[0, -1] == 0
    assert tokens[0, :6].tolist() == policy.tokenizer("put can on plate <out>")
    state = torch.zeros(2, 8)
    assert policy.config["prompt"] and torch.equal(
        policy.tokenize(TASKS[:2], state=state)[0], policy.tokenize(TASKS[:2])[0]
    )


def test_flow_matching_loss(policy, obs, monkeypatch):
    """The mean over draws, steps and dimensions of |v - (noise - action)|^2 at x_t = t noise + (1 - t) action; t near noise."""
    seen, real = [], policies.FlowPolicy.flow_loss
    monkeypatch.setattr(
        policies.FlowPolicy, "flow_loss", lambda *a: seen.append((a, real(*a))) or seen[-1][1]
    )
    unit = torch.linspace(-1, 1, 3 * 5 * 7, dtype=torch.float64).reshape(3, 5, 7)
    loss = policy.sft_loss(obs, TASKS, unit, draws=400)
    (_, prefix, state, actions, noise, t), errors = seen[0]
    assert loss == errors.mean() and errors.shape == (1200, 8, 32)
    expected = torch.cat([unit, unit[:, -1:].expand(-1, 3, -1)], 1).float()
    torch.testing.assert_close(actions[:3, :, :7], expected)
    assert not actions[..., 7:].any() and torch.equal(actions[:3], actions[-3:])
    assert (
        t.min() > 0.001
        and t.max() <= 1.0
        and abs(t.mean() - 0.6) < 0.02
        and abs((t < 0.5).float().mean() - 0.5**1.5) < 0.05
    )
    b, x = 7, t[7] * noise[7] + (1 - t[7]) * actions[7]
    v = policy.velocity(
        prefix.take(torch.tensor([b])), None if state is None else state[b : b + 1], x[None], t[b]
    )
    torch.testing.assert_close(
        errors[b], (v[0] - (noise[b] - actions[b])) ** 2, atol=1e-4, rtol=1e-4
    )


# ------------------------------------------------------------------------------------------------ full size, on paper
@pytest.mark.parametrize(
    "kind, millions, tokens, official",
    [("pi05", 3353.4, 200, 4.66e12), ("pi0", 3238.0, 48, 4.02e12)],
)
def test_full_size_and_its_cost(kind, millions, tokens, official):
    """Parameters of the official model (without the expert's unused lm_head), and FLOPs of one decision of 4 steps: of the
    layout that openpi and RLinf compute, three cameras and a padded prompt, and of what is there: one camera, 32 tokens."""
    config = PI | PI_KIND[kind] | {"model_type": kind}
    with torch.device("meta"):
        policy = policies.FlowPolicy(config)
        images, ids = torch.empty(1, 3, 3, 224, 224), torch.zeros(1, 200, dtype=torch.long)
        state, x = torch.empty(1, 32), torch.empty(1, 8, 32)
    count = sum(
        p.numel() for key, p in policy.named_parameters() if not key.startswith("value_head.")
    )
    assert abs(count / 1e6 - millions) < 0.1

    def flops(cameras, tokens):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            there, mask = torch.arange(3)[None] < cameras, torch.arange(200)[None] < tokens
            policy.ode(policy.prefix(images, there, ids, mask), state, x, 4)
        return counter.get_total_flops()

    assert abs(flops(3, tokens) / official - 1) < 0.002
    assert abs(flops(1, 32) / 1.40e12 - 1) < 0.005


def test_official_checkpoints_have_these_tensors():
    """Name by name what the sheet lists of openpi's safetensors, for both models."""
    vlm, expert = "paligemma_with_expert.paligemma.", "paligemma_with_expert.gemma_expert.model."
    tower = vlm + "model.vision_tower.vision_model."
    shapes = {
        tower + "embeddings.patch_embedding.weight": [1152, 3, 14, 14],
        tower + "embeddings.position_embedding.weight": [256, 1152],
        tower + "encoder.layers.26.mlp.fc1.weight": [4304, 1152],
        tower + "encoder.layers.0.self_attn.out_proj.bias": [1152],
        tower + "post_layernorm.weight": [1152],
        vlm + "model.multi_modal_projector.linear.weight": [2048, 1152],
        vlm + "model.language_model.layers.17.self_attn.k_proj.weight": [256, 2048],
        vlm + "model.language_model.layers.17.mlp.down_proj.weight": [2048, 16384],
        vlm + "model.language_model.norm.weight": [2048],
        vlm + "lm_head.weight": [257152, 2048],
        expert + "layers.0.self_attn.q_proj.weight": [2048, 1024],
        expert + "layers.17.mlp.gate_proj.weight": [4096, 1024],
        "action_in_proj.weight": [1024, 32],
        "action_out_proj.weight": [32, 1024],
    }
    only = {
        "pi0": {expert + "layers.0.input_layernorm.weight": [1024], expert + "norm.weight": [1024],
                "state_proj.weight": [1024, 32], "action_time_mlp_in.weight": [1024, 2048],
                "action_time_mlp_out.weight": [1024, 1024], "value_head.mlp.0.weight": [512, 1024]},
        "pi05": {expert + "layers.0.input_layernorm.dense.weight": [3072, 1024], expert + "norm.dense.bias": [3072],
                 "time_mlp_in.weight": [1024, 1024], "time_mlp_out.weight": [1024, 1024],
                 "value_head.mlp.0.weight": [1024, 2048]},
    }  # fmt: skip
    for kind in KINDS:
        with torch.device("meta"):
            own = policies.FlowPolicy(PI | PI_KIND[kind] | {"model_type": kind}).state_dict()
        for key, shape in (shapes | only[kind]).items():
            assert list(own[key].shape) == shape, key
        assert not own.keys() & only["pi0" if kind == "pi05" else "pi05"].keys() - {
            "value_head.mlp.0.weight"
        }
        adapters = [
            key
            for key in own
            if re.search(rf"[.]paligemma[.]model[.].*({'|'.join(PI_LORA_TARGETS)})[.]weight", key)
        ]
        assert sum(32 * sum(own[key].shape) for key in adapters) == pytest.approx(
            56.6e6, abs=0.05e6
        )


# ------------------------------------------------------------------------------------------------ files
@pytest.fixture
def directory(policy, tmp_path):
    """The policy as a checkpoint of ours."""
    policy.save(tmp_path / "policy")
    return tmp_path / "policy"


def backbone_of(policy):
    """`small` has a word tokenizer, so files name it a tiny one. There is no pi0-tiny, so pi0's config goes without."""
    return "pi05-tiny" if policy.pi05 else "pi0"


def edit_json(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.fixture
def official_layout(policy, directory):
    """The same weights as openpi writes them: value head inside, a dead lm_head, norm_stats in a folder; no words."""
    state = {key: p.detach().clone() for key, p in policy.state_dict().items()}
    state["paligemma_with_expert.gemma_expert.lm_head.weight"] = torch.randn(128, 32)
    save_file(state, directory / "model.safetensors")
    (directory / "value_head.safetensors").unlink()
    edit_json(
        directory / "config.json",
        lambda c: [c.pop(key) for key in ("_word_vocab", "model_type", "norm_stats")],
    )
    assets = directory / "physical-intelligence/maniskill"
    assets.mkdir(parents=True)
    (directory / "norm_stats.json").rename(assets / "norm_stats.json")
    return directory


def test_official_and_lerobot_layouts_load(policy, official_layout, inputs):
    kind = policy.config["model_type"]
    loaded = policies.load_policy(kind, official_layout)
    for key, p in policy.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], p), key
    assert (
        loaded.unnorm_key == "physical-intelligence/maniskill"
        and loaded.centers_and_scales.keys() == policy.centers_and_scales.keys()
    )
    state = load_file(official_layout / "model.safetensors")
    state = {f"model.{key}": p for key, p in state.items() if not key.startswith("value_head.")}
    lm_head = state.pop("model.paligemma_with_expert.paligemma.lm_head.weight")
    state["model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"] = (
        lm_head
    )
    save_file(state, official_layout / "model.safetensors")
    again = policies.load_policy(kind, official_layout)  # no value head: a fresh one
    for key, p in policy.state_dict().items():
        assert (
            torch.equal(again.state_dict()[key], p) != key.startswith("value_head.mlp.0.weight")
            or "value_head" in key
        ), key


@pytest.mark.parametrize("change", ["lacks", "has", "shape"])
def test_tensors_must_match(policy, official_layout, change):
    file = official_layout / "model.safetensors"
    state = load_file(file)
    if change == "lacks":
        del state["action_out_proj.bias"]
    elif change == "has":
        state["paligemma_with_expert.gemma_expert.model.layers.2.mlp.up_proj.weight"] = torch.zeros(
            2, 2
        )
    else:
        state["action_out_proj.bias"] = torch.zeros(31)
    save_file(state, file)
    with pytest.raises(Fault, match=change):
        policies.load_policy(policy.config["model_type"], official_layout)


def test_the_wrong_backbone_is_refused(policy, official_layout):
    kind, other = ("pi05", "pi0") if policy.pi05 else ("pi0", "pi05")
    with pytest.raises(Fault, match=f"is a checkpoint of {kind}, not of the backbone {other}"):
        policies.load_policy(other, official_layout)
    with pytest.raises(Fault, match="openvla"):
        policies.load_policy("openvla", official_layout)
    state = load_file(official_layout / "model.safetensors")
    save_file(
        {key: p for key, p in state.items() if "time_mlp" not in key},
        official_layout / "model.safetensors",
    )
    with pytest.raises(Fault, match="neither pi0 nor pi05"):
        policies.load_policy(kind, official_layout)


def test_what_acting_needs_is_asked_for_in_one_sentence(policy, official_layout, obs, tmp_path):
    kind, stats = (
        policy.config["model_type"],
        official_layout / "physical-intelligence/maniskill/norm_stats.json",
    )
    loaded = policies.load_policy(kind, official_layout)
    loaded.config["prompt"] = None
    with pytest.raises(Fault, match="tokenizer.json.*google/paligemma"):
        loaded.act(obs, TASKS)
    with pytest.raises(Fault, match="no such file"):
        policies.load_policy(kind, official_layout, tokenizer=tmp_path / "nowhere.json")

    first = json.loads(stats.read_text())
    edit_json(
        stats,
        lambda c: c["norm_stats"]["actions"].update(
            std=[1, 0, 1, 1, 1, 1, 1], q99=[1, -0.9, 1, 1, 1, 1, 1]
        ),
    )
    with pytest.raises(Fault, match="dimension 1 of actions has no spread"):
        policies.load_policy(kind, official_layout)
    stats.write_text(json.dumps({"norm_stats": {"actions": {}}}))
    with pytest.raises(Fault, match="has no (q01 and q99|mean and std) of actions"):
        policies.load_policy(kind, official_layout)
    stats.unlink()
    loaded = policies.load_policy(
        kind, official_layout
    )  # can be loaded: velocities need no statistics
    loaded.tokenizer = policy.tokenizer
    with pytest.raises(Fault, match="has no norm_stats.json"):
        loaded.act(obs, TASKS)
    for name in ("a", "b"):
        (official_layout / name).mkdir()
        (official_layout / name / "norm_stats.json").write_text(json.dumps(first))
    with pytest.raises(Fault, match=r"unnorm_key is one of \['a', 'b'\]"):
        policies.load_policy(kind, official_layout)
    assert policies.load_policy(kind, official_layout, unnorm_key="b").unnorm_key == "b"


def test_paligemma_tokenizer(tmp_path, policy):
    """BOS and the line feed where openpi has them; another tokenizer.json is refused."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "put", "can", "on", "plate"]
    vocab = (
        {word: i for i, word in enumerate(words)}
        | {f"w{i}": i for i in range(len(words), 108)}
        | {"\n": 108}
    )
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}
    content = {
        "version": "1.0",
        "model": model,
        "pre_tokenizer": split,
        "added_tokens": [],
        "normalizer": None,
        "post_processor": None,
        "decoder": None,
        "truncation": None,
        "padding": None,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    plain = small(policy.config["model_type"], prompt=None)
    plain.tokenizer = PaliGemmaTokenizer(tmp_path / "tokenizer.json")
    tokens, mask = plain.tokenize([" put_can\non plate "])
    assert tokens.tolist() == [[2, 4, 5, 6, 7, 108]] and mask.all()
    with pytest.raises(Fault, match="more than"):
        plain.tokenize(["put can " * 150])
    vocab["\n"], vocab["w107"] = 107, 108
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(Fault, match="not PaliGemma's tokenizer"):
        PaliGemmaTokenizer(tmp_path / "tokenizer.json")


def test_save_load_roundtrip(directory, obs):
    if json.loads((directory / "config.json").read_text())["model_type"] == "pi0":
        return  # no tiny preset: see test_official_and_lerobot_layouts_load
    first = policies.load_policy(
        "pi05-tiny", directory, replan=3, noise_level=0.25, sde_steps="all"
    )
    assert (first.chunk, first.noise_level, first.config["sde_steps"]) == (3, 0.25, "all")
    first.save(directory.with_name("again"))
    second = policies.load_policy("pi05-tiny", directory.with_name("again"))
    assert second.config == first.config  # the settings come back
    assert torch.equal(first.act(obs, TASKS, 0).actions, second.act(obs, TASKS, 0).actions)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"replan": 9}, "--replan"),
        ({"horizon": 3}, "--replan"),
        ({"denoise_steps": 0}, "--denoise-steps"),
        ({"noise_level": 0.0}, "--noise-level"),
        ({"sde_steps": "some"}, "--sde-steps"),
        ({"nose": 1}, "--nose"),
    ],
)
def test_wrong_settings(settings, sentence):
    with pytest.raises(Fault, match=sentence):
        policies.load_policy("pi05-tiny", **settings)
    with pytest.raises(Fault, match="no setting of the backbone openvla-tiny"):
        policies.load_policy("openvla-tiny", horizon=8)


def test_adapters_and_the_whole_expert_train_are_saved_and_merge(
    policy, official_layout, inputs, tmp_path, capsys
):
    """Table 3: LoRA on the VLM and the full action expert. The checkpoint is a PEFT directory with modules_to_save."""
    kind, (images, there, tokens, mask, state, x) = policy.config["model_type"], inputs
    trained = policies.load_policy(kind, official_layout, lora_rank=4)
    learns = {key for key, p in trained.named_parameters() if p.requires_grad}
    expected = {key for key in policy.state_dict() if ".paligemma." not in key}
    assert {key for key in learns if ".lora_" not in key} == expected
    assert all(".paligemma.model." in key for key in learns - expected)
    generator = torch.Generator().manual_seed(3)
    for p in trained.parameters():
        if p.requires_grad:
            p.data += 0.02 * torch.randn(p.shape, generator=generator)
    trained.save(tmp_path / "adapter")
    assert not (tmp_path / "adapter/model.safetensors").exists()
    modules = json.loads((tmp_path / "adapter/adapter_config.json").read_text())["modules_to_save"]
    assert {"gemma_expert", "action_in_proj", "action_out_proj"} < set(
        modules
    ) and "value_head" not in modules

    loaded = policies.load_policy(kind, tmp_path / "adapter")
    for (key, p), q in zip(trained.named_parameters(), loaded.parameters()):
        assert torch.equal(p, q), key
    policies.merge(str(tmp_path / "adapter"), tmp_path / "merged", backbone=kind, dtype="float32")
    assert "outputs differ by" in capsys.readouterr().out
    merged = policies.load_policy(kind, tmp_path / "merged")
    v = [
        p.velocity(p.prefix(images, there, tokens, mask), state, x, 0.4)
        for p in (policy, trained, merged)
    ]
    torch.testing.assert_close(v[1], v[2], atol=1e-4, rtol=1e-4)
    assert (v[0] - v[1]).abs().max() > 1e-3
    names = set(load_file(tmp_path / "merged/model.safetensors"))
    dead = "paligemma_with_expert.gemma_expert.lm_head.weight"  # openpi's class wants it
    assert names == {key for key in policy.state_dict() if not key.startswith("value_head.")} | {
        dead
    }


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("detach", [False, True])
def test_whatever_is_to_be_trained_gets_a_gradient(policy, official_layout, obs, detach, lora_rank):
    """Nothing idles along in the optimizer, where ppo_pair.py refuses it: not the VLM's last layer behind a detached critic."""
    loaded = policies.load_policy(policy.config["model_type"], official_layout, lora_rank=lora_rank)
    loaded.tokenizer, loaded.detach_value = policy.tokenizer, detach
    new = loaded.evaluate_actions(obs, TASKS, loaded.act(obs, TASKS).latent)
    (new.logprob.sum() + new.value.sum()).backward()
    assert all(p.requires_grad == (p.grad is not None) for p in loaded.parameters())
    last = [
        p.requires_grad
        for key, p in loaded.named_parameters()
        if "language_model.layers.1.mlp" in key
    ]
    assert any(last) == (policy.pi05 and not detach)
