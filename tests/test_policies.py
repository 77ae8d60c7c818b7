"""policies.py: against the official code's fixtures (where they are at hand), against transformers, against itself.

Fixtures: ../shared/golden (made by running the official OpenVLA code); tests that need them are skipped elsewhere.
"""

import copy
import fnmatch
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import huggingface_hub.constants as hub
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributions import Categorical, kl_divergence
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    LlamaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import policies
from backbones import files
from backbones.openvla import LORA_TARGETS, PROMPT, ViT
from backbones.tokenizers import LlamaTokenizer
from policies import TokenPolicy, load_policy
from runtime import Fault
from tools import bench_policy

GOLDEN = ROOT.parent / "shared" / "golden"
TINY_A, TINY_LORA = GOLDEN / "openvla_tiny_a", GOLDEN / "openvla_tiny_a_lora"
golden = pytest.mark.skipif(
    not TINY_A.is_dir(), reason=f"the official code's fixtures are not at {GOLDEN}"
)

SHORT, LONG = "put house on plate", "put blue stick on plate"


@pytest.fixture(scope="module")
def tiny():
    """openvla-tiny with weights large enough that every input matters."""
    torch.manual_seed(0)
    policy = load_policy("openvla-tiny")
    for p in policy.parameters():
        p.data += torch.randn_like(p) * 0.05
    return policy.requires_grad_(True)


@pytest.fixture(scope="module")
def obs():
    generator = torch.Generator().manual_seed(1)
    return {"rgb": torch.randint(256, (4, 96, 96, 3), dtype=torch.uint8, generator=generator)}


@pytest.fixture(scope="module")
def tiny_dir(tiny, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    tiny.save(directory)
    return directory


@pytest.fixture
def broken_dir(tiny_dir, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(tiny_dir, tmp_path / "checkpoint"))


INSTRUCTIONS = [SHORT, LONG, "put yellow ball on plate", SHORT]


def rewrite(file, change):
    with safe_open(file, "pt") as f:
        tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
    change(tensors)
    save_file(tensors, file)


# ---------------------------------------------------------------------------------------- the official code's numbers
@pytest.fixture(scope="module")
def official():
    policy = load_policy("openvla", TINY_A, dtype=torch.float32, device="cpu")
    return (
        policy,
        load_file(TINY_A / "inputs.safetensors"),
        load_file(TINY_A / "outputs.safetensors"),
    )


def inputs_of(tensors, *more):
    return [tensors[name] for name in ("pixel_values", "input_ids", "attention_mask", *more)]


@golden
def test_golden_vision(official):
    policy, x, y = official
    pixel_values = policy.preprocess(x["images_uint8"])
    torch.testing.assert_close(pixel_values, x["pixel_values"], atol=1e-6, rtol=0)
    towers = policy.vision_backbone
    with torch.no_grad():
        dino, siglip = (
            towers["featurizer"](pixel_values[:, :3]),
            towers["fused_featurizer"](pixel_values[:, 3:]),
        )
        prefix = policy.embed(pixel_values, x["input_ids"])
    torch.testing.assert_close(dino, y["dino_patch_features"], atol=1e-4, rtol=0)
    torch.testing.assert_close(siglip, y["siglip_patch_features"], atol=1e-4, rtol=0)
    torch.testing.assert_close(prefix[:, 1:257], y["projected_patch_embeddings"], atol=1e-5, rtol=0)


@golden
def test_golden_teacher_forcing(official):
    policy, x, y = official
    tokens = x["given_action_tokens"]
    with torch.no_grad():
        logits, value = policy(*inputs_of(x, "given_action_tokens"))
        again = policy.action_logits(*inputs_of(x, "given_action_tokens"))
    assert torch.equal(logits, again)
    torch.testing.assert_close(logits, y["given_action_logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(value, y["given_value"][:, 0], atol=5e-5, rtol=0)
    logp = logits.log_softmax(-1)
    token_logp = logp.gather(-1, (tokens - policy.action_begin)[..., None])[..., 0]
    torch.testing.assert_close(token_logp, y["given_token_logprobs"], atol=5e-5, rtol=0)
    torch.testing.assert_close(token_logp.sum(1), y["given_logprob_sum"][:, 0], atol=1e-4, rtol=0)
    torch.testing.assert_close(
        -(logp.exp() * logp).sum(-1), y["given_token_entropy"], atol=5e-5, rtol=0
    )
    torch.testing.assert_close(policy.env_action(tokens), y["given_env_action"], atol=1e-12, rtol=0)


@golden
def test_golden_decode(official):
    policy, x, y = official
    tokens, logprob, value = policy.decode(*inputs_of(x), temperature=0)
    assert torch.equal(tokens, y["greedy_action_tokens"])
    torch.testing.assert_close(logprob, y["greedy_rollout_logprob_sum"][:, 0], atol=1e-4, rtol=0)
    torch.testing.assert_close(value, y["greedy_rollout_value"][:, 0], atol=5e-5, rtol=0)
    torch.testing.assert_close(
        policy.env_action(tokens), y["greedy_env_action"], atol=1e-12, rtol=0
    )


@golden
def test_golden_act_and_evaluate(official):
    """The same numbers through the interface that ppo_pair.py uses; the prompt ids stand in for a tokenizer."""
    policy, x, y = official
    ids = json.loads((GOLDEN / "openvla_prompt_ids.json").read_text())
    policy = copy.copy(policy)  # shallow: only the tokenizer differs
    policy.tokenizer = {
        PROMPT.format(instruction=text): row for text, row in ids.items()
    }.__getitem__
    tasks = json.loads((TINY_A / "prompts.json").read_text())["tasks"]
    input_ids, attention_mask = policy.tokenize([task.upper() for task in tasks])
    assert torch.equal(input_ids, x["input_ids"]) and torch.equal(
        attention_mask, x["attention_mask"]
    )
    obs = {"rgb": x["images_uint8"]}
    decision = policy.act(obs, tasks, temperature=0)
    assert torch.equal(decision.latent["tokens"], y["greedy_action_tokens"])
    torch.testing.assert_close(decision.actions, y["greedy_env_action"].float()[:, None])
    evaluation = policy.evaluate_actions(obs, tasks, {"tokens": x["given_action_tokens"]})
    torch.testing.assert_close(evaluation.logprob, y["given_logprob_sum"][:, 0], atol=1e-4, rtol=0)
    torch.testing.assert_close(evaluation.entropy, y["given_entropy_mean"][:, 0], atol=5e-5, rtol=0)
    torch.testing.assert_close(evaluation.value, y["given_value"][:, 0], atol=5e-5, rtol=0)


@golden
def test_golden_batched_equals_single(official):
    """Rows of a padded batch are what they are alone: pads count neither as keys nor as positions."""
    policy, x, y = official
    ids = torch.cat([x["input_ids"][:, :1], torch.full((2, 3), 32000), x["input_ids"][:, 1:]], 1)
    mask = torch.cat(
        [
            x["attention_mask"][:, :1],
            torch.zeros(2, 3, dtype=torch.long),
            x["attention_mask"][:, 1:],
        ],
        1,
    )
    logits = policy.action_logits(x["pixel_values"], ids, mask, x["given_action_tokens"])
    torch.testing.assert_close(logits, y["given_action_logits"], atol=1e-4, rtol=0)
    assert torch.equal(policy.decode(x["pixel_values"], ids, mask)[0], y["greedy_action_tokens"])


@golden
def test_golden_lora():
    policy = load_policy("openvla", TINY_LORA, base=TINY_A, dtype=torch.float32)
    x, y = load_file(TINY_A / "inputs.safetensors"), load_file(TINY_LORA / "outputs.safetensors")
    logits, value = policy(*inputs_of(x, "given_action_tokens"))
    torch.testing.assert_close(logits, y["given_action_logits"], atol=3e-4, rtol=0)
    torch.testing.assert_close(value, y["given_value"][:, 0], atol=5e-5, rtol=0)
    logp = logits.log_softmax(-1).gather(
        -1, (x["given_action_tokens"] - policy.action_begin)[..., None]
    )
    torch.testing.assert_close(logp.sum((1, 2)), y["given_logprob_sum"][:, 0], atol=1e-4, rtol=0)
    (logp.sum() + value.sum()).backward()
    parameters = dict(policy.named_parameters())
    gradients = {
        key.removeprefix("grad."): tensor for key, tensor in y.items() if key.startswith("grad.")
    }
    assert len(gradients) == 12
    for key, expected in gradients.items():
        grad = parameters[key.replace(".weight", ".default.weight")].grad
        torch.testing.assert_close(grad, expected, atol=2e-4 * expected.abs().max().item(), rtol=0)
    trained = {key for key, p in parameters.items() if p.requires_grad}
    assert trained == {
        key for key in parameters if ".lora_" in key or key.startswith("value_head.")
    }


@golden
def test_golden_merge(tmp_path, capsys):
    policies.merge(str(TINY_LORA), tmp_path, base=str(TINY_A), dtype="float32")
    assert "outputs differ by" in capsys.readouterr().out
    with (
        safe_open(TINY_A / "model.safetensors", "pt") as a,
        safe_open(tmp_path / "model.safetensors", "pt") as b,
    ):
        assert set(a.keys()) == set(b.keys())  # the official names, dead tensors included
    policy = load_policy("openvla", tmp_path, dtype=torch.float32)
    x, y = load_file(TINY_A / "inputs.safetensors"), load_file(TINY_LORA / "outputs.safetensors")
    logits = policy.action_logits(*inputs_of(x, "given_action_tokens"))
    torch.testing.assert_close(logits, y["given_action_logits"], atol=3e-4, rtol=0)


@golden
def test_golden_preprocessing(official):
    y = load_file(GOLDEN / "openvla_preproc" / "preproc.safetensors")
    pixel_values = official[0].preprocess(y["image_uint8"][None])
    torch.testing.assert_close(pixel_values, y["pixel_values_uint8_tensor"], atol=1e-6, rtol=0)


@golden
def test_goldenprompt_ids():
    file = os.environ.get("LLAMA_TOKENIZER")
    if not file:
        pytest.skip("LLAMA_TOKENIZER does not name Llama-2's tokenizer.json")
    tokenizer = LlamaTokenizer(file)
    for text, ids in json.loads((GOLDEN / "openvla_prompt_ids.json").read_text()).items():
        assert tokenizer(PROMPT.format(instruction=text.lower())) == ids


# ---------------------------------------------------------------------------------------- oracles that anyone has
def random_vit(**kwargs):
    torch.manual_seed(3)
    vit = ViT(**kwargs)
    for p in vit.parameters():
        p.data = torch.randn_like(p) * 0.2
    return vit


def copy_blocks(vit, native, names):
    """Our (timm's) block parameters into transformers' layers; fused qkv is cut into three equal parts."""
    for block, layer in zip(vit.blocks, native):
        theirs, done = dict(layer.named_parameters()), set()
        for key, p in block.named_parameters():
            parts = p.chunk(3) if "qkv" in key else [p]
            for part, name in zip(parts, names[key.rsplit(".", 1)[0]]):
                name = f"{name}.{key.rsplit('.', 1)[1]}" if "ls" not in key else name
                theirs[name].data.copy_(part)
                done.add(name)
        assert done == set(theirs)


def test_dino_tower_equals_transformers():
    sizes = {"embed_dim": 32, "depth": 4, "num_heads": 2, "patch_size": 14}
    vit = random_vit(
        image_size=56, class_token=True, reg_tokens=4, layer_scale=True, mlp_ratio=4.0, **sizes
    )
    config = Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=56, patch_size=14
    )
    native = Dinov2WithRegistersModel(config).eval()
    e = native.embeddings
    e.cls_token.data, e.register_tokens.data = vit.cls_token.data, vit.reg_token.data
    e.position_embeddings.data = torch.cat([torch.zeros(1, 1, 32), vit.pos_embed.data], 1)
    e.patch_embeddings.projection.load_state_dict(vit.patch_embed["proj"].state_dict())
    at = "attention.attention."
    copy_blocks(vit, native.encoder.layer, {
        "norm1": ["norm1"], "norm2": ["norm2"], "mlp.fc1": ["mlp.fc1"], "mlp.fc2": ["mlp.fc2"],
        "attn.qkv": [at + "query", at + "key", at + "value"], "attn.proj": ["attention.output.dense"],
        "ls1": ["layer_scale1.lambda1"], "ls2": ["layer_scale2.lambda1"],
    })  # fmt: skip
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        expected = native(images, output_hidden_states=True).hidden_states[-2][:, 5:]
        torch.testing.assert_close(vit(images), expected, atol=1e-4, rtol=0)


def test_siglip_tower_equals_transformers():
    sizes = {"embed_dim": 40, "depth": 4, "num_heads": 4, "patch_size": 14}
    vit = random_vit(
        image_size=56, class_token=False, reg_tokens=0, layer_scale=False, mlp_ratio=3.7362, **sizes
    )
    config = SiglipVisionConfig(
        hidden_size=40,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
        intermediate_size=149,
        hidden_act="gelu",
        vision_use_head=False,
    )
    native = SiglipVisionModel(config).eval()
    native.embeddings.position_embedding.weight.data = vit.pos_embed.data[0]
    native.embeddings.patch_embedding.load_state_dict(vit.patch_embed["proj"].state_dict())
    at = "self_attn."
    copy_blocks(vit, native.encoder.layers, {
        "norm1": ["layer_norm1"], "norm2": ["layer_norm2"], "mlp.fc1": ["mlp.fc1"], "mlp.fc2": ["mlp.fc2"],
        "attn.qkv": [at + "q_proj", at + "k_proj", at + "v_proj"], "attn.proj": [at + "out_proj"],
    })  # fmt: skip
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        expected = native(images, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(vit(images), expected, atol=1e-4, rtol=0)


def test_whole_equals_plain_composition(tiny, obs):
    """[BOS][patches][prompt][actions] through an untouched LlamaForCausalLM, one row at a time, without any padding."""
    latent = tiny.act(obs, INSTRUCTIONS).latent
    evaluation = tiny.evaluate_actions(obs, INSTRUCTIONS, latent)
    llama = LlamaForCausalLM(tiny.language_model.config).eval()
    llama.load_state_dict(tiny.language_model.state_dict())
    embed, tokens = llama.model.embed_tokens, latent["tokens"]
    for i, text in enumerate(INSTRUCTIONS):
        ids = torch.tensor([tiny.tokenizer(f"{text} <out>")])
        pixels = tiny.preprocess(obs["rgb"][i : i + 1])
        towers = [tiny.vision_backbone["featurizer"](pixels[:, :3])]
        towers += [tiny.vision_backbone["fused_featurizer"](pixels[:, 3:])]
        x = torch.cat(towers, -1)
        for name in ("fc1", "fc2"):
            x = torch.nn.functional.gelu(tiny.projector[name](x))
        x = tiny.projector["fc3"](x)
        x = torch.cat([embed(ids[:, :1]), x, embed(ids[:, 1:]), embed(tokens[i : i + 1])], 1)
        out = llama(inputs_embeds=x, output_hidden_states=True)
        logits = out.logits[0, -8:-1, tiny.action_begin : tiny.action_end]
        torch.testing.assert_close(evaluation.dist[i], logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(
            evaluation.value[i], tiny.value(out.hidden_states[-1][0, -8]), atol=1e-4, rtol=0
        )
        dist = Categorical(logits=logits)
        torch.testing.assert_close(
            evaluation.logprob[i], dist.log_prob(tokens[i] - tiny.action_begin).sum()
        )  # SUM
        torch.testing.assert_close(evaluation.entropy[i], dist.entropy().mean())


# ---------------------------------------------------------------------------------------- the interface
@pytest.mark.parametrize("temperature", [0, 0.6, 1.0])
def test_decode_equals_teacher_forcing(tiny, obs, temperature):
    decision = tiny.act(obs, INSTRUCTIONS, temperature)
    evaluation = tiny.evaluate_actions(obs, INSTRUCTIONS, decision.latent)
    torch.testing.assert_close(decision.logprob, evaluation.logprob, atol=1e-4, rtol=0)
    torch.testing.assert_close(decision.value, evaluation.value, atol=1e-5, rtol=0)
    if temperature == 0:
        assert torch.equal(
            decision.latent["tokens"], evaluation.dist.argmax(-1) + tiny.action_begin
        )
    assert decision.actions.shape == (4, tiny.chunk, 7) and decision.actions.dtype == torch.float32
    assert evaluation.dist.shape == (4, 7, 32)


def test_padding_changes_nothing(tiny, obs):
    """A row's distribution does not depend on the length of the other prompts in the batch."""
    latent = tiny.act(obs, INSTRUCTIONS).latent
    together = tiny.evaluate_actions(obs, INSTRUCTIONS, latent).dist
    for i, text in enumerate(INSTRUCTIONS):
        row = {"tokens": latent["tokens"][i : i + 1]}
        alone = tiny.evaluate_actions({"rgb": obs["rgb"][i : i + 1]}, [text], row).dist
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=0)


def test_sampling_follows_the_distribution(tiny, obs):
    torch.manual_seed(0)
    n, rgb = 400, {"rgb": obs["rgb"][:1]}
    latent = {"tokens": torch.full((1, 7), tiny.action_begin)}
    first = tiny.evaluate_actions(rgb, [SHORT], latent).dist[0, 0].detach()
    args = [
        t.expand(n, *t.shape[1:]) for t in (tiny.preprocess(rgb["rgb"]), *tiny.tokenize([SHORT]))
    ]

    def mean_logp(p):  # of a sample's first token, under temperature 1
        return (p * first.log_softmax(-1)).sum()

    for temperature in (1.0, 0.3):
        index = tiny.decode(*args, temperature=temperature)[0][:, 0] - tiny.action_begin
        p = torch.softmax(first / temperature, -1)
        noise = (p * (first.log_softmax(-1) - mean_logp(p)) ** 2).sum().sqrt() / n**0.5
        assert (first.log_softmax(-1)[index].mean() - mean_logp(p)).abs() < 4 * noise
        other = torch.softmax(first / (1.3 - temperature), -1)
        assert (mean_logp(other) - mean_logp(p)).abs() > 8 * noise, (
            "the test could not tell temperatures apart"
        )


def test_kl_is_exact_mean_over_tokens(tiny):
    torch.manual_seed(0)
    p, q = torch.randn(5, 7, 32) * 3, torch.randn(5, 7, 32) * 3
    expected = kl_divergence(Categorical(logits=p), Categorical(logits=q))  # (5, 7)
    torch.testing.assert_close(tiny.kl(p, q), expected.mean(1), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(tiny.kl(p, q), tiny.kl(q, p), rtol=1e-2)
    for scale in (1e-4, 1.0, 30.0):
        logits = (p * scale).bfloat16()
        assert (tiny.kl(logits, logits) == 0).all()
        assert (tiny.kl(p * scale, p * scale + 1e-4 * q) >= 0).all()
        assert tiny.kl(logits, logits).dtype == torch.float32


def test_image_changes_logits_through_both_towers(tiny):
    tokens = torch.full((2, 7), tiny.action_begin)
    black_white = torch.stack([torch.zeros(96, 96, 3), torch.full((96, 96, 3), 255.0)]).to(
        torch.uint8
    )
    dist = tiny.evaluate_actions({"rgb": black_white}, [SHORT] * 2, {"tokens": tokens}).dist
    assert (dist[0] - dist[1]).abs().max() > 0.1
    pixels = tiny.preprocess(black_white)
    ids, mask = tiny.tokenize([SHORT] * 2)
    for channels in (slice(0, 3), slice(3, 6)):
        changed = pixels[:1].clone()
        changed[:, channels] = pixels[1:, channels]
        logits = [
            tiny.action_logits(x, ids[:1], mask[:1], tokens[:1]) for x in (pixels[:1], changed)
        ]
        assert (logits[0] - logits[1]).abs().max() > 1e-3
    greedy = tiny.decode(pixels, ids, mask)[1]
    assert (greedy[0] - greedy[1]).abs() > 1e-4, "decode must see the image too"


def test_instruction_changes_logits(tiny, obs):
    tokens = {"tokens": torch.full((2, 7), tiny.action_begin)}
    rgb = {"rgb": obs["rgb"][:1].expand(2, -1, -1, -1)}
    dist = tiny.evaluate_actions(rgb, [SHORT, LONG], tokens).dist
    assert (dist[0] - dist[1]).abs().max() > 1e-3


def test_later_tokens_see_earlier_ones_only(tiny, obs):
    a = tiny.act(obs, INSTRUCTIONS).latent["tokens"]
    b = a.clone()
    b[:, 3] = tiny.action_begin + (b[:, 3] - tiny.action_begin + 13) % 32
    a, b = (tiny.evaluate_actions(obs, INSTRUCTIONS, {"tokens": tokens}).dist for tokens in (a, b))
    difference = (a - b).abs().amax((0, 2))  # (7,)
    assert (difference[:4] == 0).all() and (difference[4:] > 1e-4).all()


def test_gradients_reach_everything(tiny, obs):
    latent = tiny.act(obs, INSTRUCTIONS).latent
    evaluation = tiny.evaluate_actions(obs, INSTRUCTIONS, latent)
    tiny.zero_grad()
    (evaluation.logprob.sum() + evaluation.value.sum()).backward()
    assert not [
        key for key, p in tiny.named_parameters() if p.grad is None or p.grad.abs().max() == 0
    ]
    expected = {key: p.grad.clone() for key, p in tiny.named_parameters()}
    tiny.zero_grad()
    tiny.gradient_checkpointing = True
    try:
        evaluation = tiny.evaluate_actions(obs, INSTRUCTIONS, latent)
        (evaluation.logprob.sum() + evaluation.value.sum()).backward()
        decision = tiny.train().act(obs, INSTRUCTIONS, 0)  # the cache works all the same
        again = tiny.evaluate_actions(obs, INSTRUCTIONS, decision.latent).logprob
        torch.testing.assert_close(decision.logprob, again, atol=1e-4, rtol=0)
    finally:
        tiny.gradient_checkpointing = False
    for key, p in tiny.named_parameters():
        torch.testing.assert_close(p.grad, expected[key], msg=key)
    tiny.zero_grad()


def test_detached_value_trains_the_head_only(tiny, obs):
    tiny.zero_grad()
    tiny.detach_value = True
    try:
        tiny.evaluate_actions(
            obs, INSTRUCTIONS, tiny.act(obs, INSTRUCTIONS).latent
        ).value.sum().backward()
    finally:
        tiny.detach_value = False
    trained = {
        key for key, p in tiny.named_parameters() if p.grad is not None and p.grad.abs().max() > 0
    }
    assert trained and all(key.startswith("value_head.") for key in trained)
    tiny.zero_grad()


def test_half_precision_backbone_keeps_float32_where_it_matters(tiny_dir, tiny, obs):
    policy = load_policy("openvla-tiny", tiny_dir, dtype=torch.bfloat16)
    rotary = policy.language_model.model.rotary_emb.inv_freq
    assert policy.dtype == torch.bfloat16 and rotary.dtype == torch.float32
    assert torch.equal(rotary, tiny.language_model.model.rotary_emb.inv_freq)
    assert policy.value_head["head_l1"].weight.dtype == torch.float32
    decision = policy.act(obs, INSTRUCTIONS)
    evaluation = policy.evaluate_actions(obs, INSTRUCTIONS, decision.latent)
    kl = policy.kl(evaluation.dist, evaluation.dist)
    tensors = (*evaluation, decision.logprob, decision.value, decision.actions, kl)
    assert {t.dtype for t in tensors} == {torch.float32}
    assert (
        evaluation.dist - tiny.evaluate_actions(obs, INSTRUCTIONS, decision.latent).dist
    ).abs().max() < 1


# ---------------------------------------------------------------------------------------- words, pixels, bins
def test_tokenize_layout(tiny):
    ids, mask = tiny.tokenize([SHORT, LONG])
    words = [tiny.config["_word_vocab"][i] for i in ids[0]]
    assert words == ["<s>", "<pad>", "put", "house", "on", "plate", "<out>"]
    assert mask.tolist() == [[1, 0, 1, 1, 1, 1, 1], [1] * 7]
    grounding, _ = tiny.tokenize(["red cube"], prompt="In: Where is the {instruction}?\nOut: ")
    words = [tiny.config["_word_vocab"][i] for i in grounding[0]]
    assert words == ["<s>", "in", "where", "is", "the", "red", "cube", "<out>"]
    official, _ = tiny.tokenize([SHORT], prompt=PROMPT)
    assert tiny.config["_word_vocab"][official[0, -1]] == "<out>"
    assert tiny.tokenize(["put navy T on plate"])[0].shape == (1, 7)
    vocab = tiny.config["_word_vocab"]
    assert len(set(vocab)) == len(vocab) <= tiny.action_begin
    with pytest.raises(Fault, match="'zebra'"):
        tiny.tokenize(["put zebra on plate"])


def write_tokenizer(file):
    """A tokenizer.json with two words, as transformers writes Llama's."""
    vocab = {"<unk>": 0, "<s>": 1, "In:": 2, "Out:": 3}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
    special = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    template = [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    post = {
        "type": "TemplateProcessing",
        "single": template,
        "pair": template,
        "special_tokens": special,
    }
    post["pair"] = [*template, {"Sequence": {"id": "B", "type_id": 0}}]
    rest = {
        "truncation": None,
        "padding": None,
        "normalizer": None,
        "decoder": None,
        "added_tokens": [],
    }
    spec = {
        "version": "1.0",
        "model": model,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": post,
    }
    file.write_text(json.dumps(spec | rest))
    return file


def test_llama_tokenizer_must_end_the_prompt_in_its_token(tmp_path):
    tokenizer = LlamaTokenizer(write_tokenizer(tmp_path / "tokenizer.json"))
    assert tokenizer("In: Out:") == [1, 2, 3]
    with pytest.raises(Fault, match="not Llama-2's"):
        tokenizer("In: Out: ")


def test_resize_is_antialiased(tiny):
    """Every output pixel averages all the pixels under it: black and white noise, 8x too large, turns grey."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(2, (1, 768, 768, 1), generator=generator).expand(-1, -1, -1, 3) * 255
    grey = (tiny.preprocess(noise.to(torch.uint8))[:, 3:] + 1) * 127.5
    assert grey.std() < 30  # 100 without


def test_preprocess(tiny):
    torch.manual_seed(0)
    rgb = torch.randint(256, (2, 96, 96, 3), dtype=torch.uint8)
    pixels = tiny.preprocess(rgb)
    x = rgb.permute(0, 3, 1, 2) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(pixels[:, :3], (x - mean[:, None, None]) / std[:, None, None])
    torch.testing.assert_close(pixels[:, 3:], x * 2 - 1)
    wide = tiny.preprocess(torch.randint(256, (2, 120, 160, 3), dtype=torch.uint8))
    assert wide.shape == (2, 6, 96, 96)
    grey = (wide[:, 3:] + 1) * 127.5
    torch.testing.assert_close(grey, grey.round(), atol=1e-3, rtol=0)
    assert grey.min() > -0.01 and grey.max() < 255.01
    for wrong in (rgb.float(), rgb[0], rgb.permute(0, 3, 1, 2)):
        with pytest.raises(Fault, match="uint8 of shape"):
            tiny.preprocess(wrong)


def test_bins_and_actions(tiny):
    begin, end = tiny.action_begin, tiny.action_end
    edges = torch.tensor([[-1.0, 1.0, -2.0, 2.0, 0.0, -0.999, 0.999]])
    tokens = tiny.bin_tokens(edges)
    assert tokens.tolist() == [
        [end - 1, begin, end - 1, begin, end - 16, end - 1, begin + 1]
    ]  # larger is smaller
    every = torch.arange(begin, end)[:, None].expand(-1, 7)
    actions = tiny.env_action(every)
    assert actions.dtype == torch.float64 and set(actions[:, 6].tolist()) == {-1.0, 1.0}
    assert (actions[:-1, :6] >= actions[1:, :6]).all()
    assert torch.equal(actions[0], actions[1])  # 32 tokens, 31 centers: the first two share one
    bound = torch.tensor([0.06] * 3 + [0.8] * 3, dtype=torch.float64)
    torch.testing.assert_close(actions[0, :6], bound * 30 / 31)
    torch.testing.assert_close(actions[-1, :6], -bound * 30 / 31)
    torch.manual_seed(0)
    wanted = (torch.rand(500, 7, dtype=torch.float64) * 2 - 1) * torch.cat(
        [bound, bound.new_ones(1)]
    )
    got = tiny.env_action(tiny.bin_tokens(tiny.to_unit(wanted)))
    assert ((got - wanted).abs()[:, :6] <= bound / 31 + 1e-6).all()
    assert torch.equal(got[:, 6], wanted[:, 6].sign())


def test_gripper_threshold_follows_the_statistics(tiny):
    """Bridge's gripper is 0..1, so 0.5 divides open from closed; ours is -1..1, so 0 does."""
    bridge = copy.copy(tiny)
    bridge.config = copy.deepcopy(tiny.config)
    action = bridge.config["norm_stats"]["builtin"]["action"]
    action["q01"][6], action["q99"][6] = 0.0, 1.0
    bridge.use_norm_stats("builtin")
    for policy, boundary in ((tiny, 0.0), (bridge, 0.5)):
        unit = torch.zeros(2, 7)
        unit[:, 6] = torch.tensor([boundary - 0.05, boundary + 0.05])
        assert policy.env_action(policy.bin_tokens(unit))[:, 6].tolist() == [-1, 1]
    labels = bridge.bin_tokens(bridge.to_unit(torch.tensor([[0.0] * 6 + [-1], [0.0] * 6 + [1]])))[
        :, 6
    ]
    assert (bridge.action_end - labels).tolist() == [16, 32]  # of 256 bins 128 and 256


# ---------------------------------------------------------------------------------------- structure at full size
def official_tensors():
    """Names and shapes of the 7B checkpoint, written down from its architecture."""
    shapes = {}

    def linear(name, n_in, n_out, bias=True):
        shapes[name + ".weight"] = (n_out, n_in)
        if bias:
            shapes[name + ".bias"] = (n_out,)

    def norm(name, dim):
        shapes[name + ".weight"] = shapes[name + ".bias"] = (dim,)

    towers = {"featurizer": (1024, 24, 4096), "fused_featurizer": (1152, 27, 4304)}
    for tower, (dim, depth, hidden) in towers.items():
        v = f"vision_backbone.{tower}."
        shapes[v + "pos_embed"] = (1, 256, dim)
        shapes[v + "patch_embed.proj.weight"], shapes[v + "patch_embed.proj.bias"] = (
            (dim, 3, 14, 14),
            (dim,),
        )
        norm(v + "norm", dim)
        for i in range(depth):
            b = f"{v}blocks.{i}."
            norm(b + "norm1", dim)
            norm(b + "norm2", dim)
            linear(b + "attn.qkv", dim, 3 * dim)
            linear(b + "attn.proj", dim, dim)
            linear(b + "mlp.fc1", dim, hidden)
            linear(b + "mlp.fc2", hidden, dim)
            if tower == "featurizer":
                shapes[b + "ls1.scale_factor"] = shapes[b + "ls2.scale_factor"] = (dim,)
    shapes["vision_backbone.featurizer.cls_token"] = (1, 1, 1024)
    shapes["vision_backbone.featurizer.reg_token"] = (1, 4, 1024)
    pool = "vision_backbone.fused_featurizer.attn_pool."
    shapes[pool + "latent"] = (1, 1, 1152)
    norm(pool + "norm", 1152)
    sizes = {"q": (1152, 1152), "kv": (1152, 2304), "proj": (1152, 1152)}
    sizes |= {"mlp.fc1": (1152, 4304), "mlp.fc2": (4304, 1152)}
    for name, (n_in, n_out) in sizes.items():
        linear(pool + name, n_in, n_out)
    for name, (n_in, n_out) in {
        "fc1": (2176, 8704),
        "fc2": (8704, 4096),
        "fc3": (4096, 4096),
    }.items():
        linear(f"projector.{name}", n_in, n_out)
    shapes["language_model.lm_head.weight"] = shapes["language_model.model.embed_tokens.weight"] = (
        32064,
        4096,
    )
    shapes["language_model.model.norm.weight"] = (4096,)
    for i in range(32):
        b = f"language_model.model.layers.{i}."
        shapes[b + "input_layernorm.weight"] = shapes[b + "post_attention_layernorm.weight"] = (
            4096,
        )
        for name in "qkvo":
            linear(f"{b}self_attn.{name}_proj", 4096, 4096, bias=False)
        for name, (n_in, n_out) in {
            "gate": (4096, 11008),
            "up": (4096, 11008),
            "down": (11008, 4096),
        }.items():
            linear(f"{b}mlp.{name}_proj", n_in, n_out, bias=False)
    return shapes


def test_full_size_structure_and_lora_count():
    shapes = official_tensors()
    assert len(shapes) == 982
    assert sum(torch.Size(s).numel() for s in shapes.values()) == 7_541_237_184
    with torch.device("meta"):
        policy = TokenPolicy(bench_policy.OPENVLA_7B)
    dead = {key for key in shapes if policy.is_unused(key)}
    assert len(dead) == 16 + 27  # last block and norm of either tower, and the attention pool
    own = {
        key: tuple(t.shape)
        for key, t in policy.state_dict().items()
        if not key.startswith("value_head.")
    }
    assert own == {key: shape for key, shape in shapes.items() if key not in dead}
    assert sum(p.numel() for p in policy.value_head.parameters()) == 2_163_456
    assert policy.language_model.config.rms_norm_eps == 1e-6
    assert (policy.action_begin, policy.action_end) == (31744, 32000)

    policy.add_lora(rank=32)
    lora = sum(p.numel() for key, p in policy.named_parameters() if ".lora_" in key)
    weights = [key for key in dead if key.endswith(".weight") and "norm" not in key]
    on_dead_modules = sum(32 * sum(shapes[key]) for key in weights)
    assert (lora, on_dead_modules) == (109_126_400, 1_701_888)
    assert (
        lora + on_dead_modules == 110_828_288
    )  # RL4VLA's count, which adapts modules that are never used as well

    policy.tokenizer = lambda text: (
        [1] * 20
    )  # what bench_policy.py calls the floor, against sums made by hand
    work = bench_policy.flops(policy)
    # the last layer: queries, output and MLP at 7 of 282 positions
    skipped = 2 * 275 * (2 * 4096**2 + 3 * 4096 * 11008) / 1e12
    for name, tera in (
        ("forward", (4.09 - skipped) * 1.012),
        ("ppo", (4.09 + 4.19 - 2 * skipped) * 1.012),
    ):  # 1.2 %: the adapters
        assert abs(work[name] / (tera * 1e12) - 1) < 0.01


def test_peak_memory_is_what_lives_at_once():
    with bench_policy.PeakMemory() as memory:
        a = torch.zeros(1000)  # 4000 bytes
        b = a[:10] + a[10:20]  # views are not memory, 40 more bytes are
        assert (memory.alive, memory.peak) == (4040, 4040)
        a.add_(1)
        a = torch.stack([a, a])[0].clone()
        assert memory.peak == 4040 + 8000 + 4000  # old a, the stack, new a
        assert memory.alive == 4040
        del a, b
    assert memory.alive == 0


def test_bench_policy_prints_a_table(capsys):
    args = dict(num_envs=3, batch_size=4, device_batch_size=2, repeats=1, cuda=False, lora_rank=4)
    bench_policy.main(bench_policy.Args(**args))
    lines = [
        line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")
    ]
    assert [line[1].strip() for line in lines[2:]] == [
        "rollout step", "PPO minibatch", "PAIR minibatch",
    ]  # fmt: skip
    assert all(float(cell) > 0 for line in lines[2:] for cell in line[3:6])


def test_derived_memory():
    """Of shapes alone; both views are forward passes without a graph, which cost nothing at the peak."""
    policy = bench_policy.random_policy("openvla-tiny", "meta", torch.float32, 4)
    memory = bench_policy.memory_of_update(policy)
    (_, ppo), (_, each) = memory["ppo"], memory["pair"]
    assert ppo < each < 1.25 * ppo
    policy.gradient_checkpointing = True
    assert bench_policy.memory_of_update(policy)["pair"][1] < 0.7 * each
    text = policy.config["text_config"]
    length = 36 + 20 + 6  # patches, prompt, actions but the last
    cache = 2 * 4 * text["num_hidden_layers"] * text["hidden_size"] * length
    assert cache < bench_policy.memory_of_act(policy)[1] < 20 * cache


# ---------------------------------------------------------------------------------------- files
def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_save_load_roundtrip(tiny, tiny_dir, tmp_path, obs):
    policy = load_policy("openvla-tiny", tiny_dir)
    assert same_weights(policy, tiny)
    latent = tiny.act(obs, INSTRUCTIONS).latent
    a, b = (p.evaluate_actions(obs, INSTRUCTIONS, latent) for p in (tiny, policy))
    assert torch.equal(a.dist, b.dist) and torch.equal(a.value, b.value)
    policy.save(tiny_dir)  # over itself
    assert same_weights(load_policy("openvla-tiny", tiny_dir), tiny)
    loaded = load_policy("openvla-tiny", shutil.copytree(tiny_dir, tmp_path / "copy"))
    file = tmp_path / "copy" / "model.safetensors"
    with open(file, "r+b") as f:
        f.seek(200_000)
        f.write(bytes(file.stat().st_size - 200_000))
    assert same_weights(loaded, tiny)  # no weight is a view of the file
    policy.save(tmp_path, dtype=torch.float16)
    assert (tmp_path / "model.safetensors").stat().st_size + (
        tmp_path / "value_head.safetensors"
    ).stat().st_size < 4e6
    half = load_policy("openvla-tiny", tmp_path)
    assert half.dtype == torch.float32
    assert (half.evaluate_actions(obs, INSTRUCTIONS, latent).dist - a.dist).abs().max() < 0.1
    assert json.loads((tmp_path / "norm_stats.json").read_text()).keys() == {"builtin"}


@pytest.mark.parametrize("backbone", ["openvla-flat", "pi05-flat"])
def test_flatland_presets(backbone, tmp_path):
    """100 to 320 thousand parameters, statistics of their own, and a name that comes back from disk."""
    policy = load_policy(backbone)
    count = sum(p.numel() for key, p in policy.named_parameters() if "value_head" not in key)
    assert 100_000 < count < 320_000 and policy.image_size == 32 and policy.unnorm_key == "flat"
    policy.save(tmp_path)
    again, rgb = load_policy(backbone, tmp_path), torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    assert again.config == policy.config and same_weights(again, policy)
    a, b = (p.act({"rgb": rgb}, ["put red cube on plate"] * 2, 0).actions for p in (policy, again))
    assert torch.equal(a, b) and a.shape == (2, policy.chunk, 7)
    with pytest.raises(Fault, match=f"is a checkpoint of {backbone}, not of the backbone"):
        load_policy(backbone.replace("flat", "tiny"), tmp_path)
    with pytest.raises(Fault, match="-tiny, not of the backbone"):
        load_policy(backbone, ROOT / "warmstart" / backbone.replace("flat", "tiny"))


def test_32_bins():
    """Nothing takes 256 for granted: decode, log-probs, KL, entropy, actions."""
    torch.manual_seed(0)
    policy, bins = load_policy("openvla-flat"), 32
    obs = {"rgb": torch.randint(256, (3, 32, 32, 3), dtype=torch.uint8)}
    instructions = ["put red cube on plate", "put blue ball on plate", "put green l on plate"]
    decision = policy.act(obs, instructions)
    new = policy.evaluate_actions(obs, instructions, decision.latent)
    assert new.dist.shape == (3, 7, bins)
    tokens = decision.latent["tokens"]
    assert ((tokens >= policy.action_begin) & (tokens < policy.action_end)).all()
    expected = Categorical(logits=new.dist)
    index = tokens - policy.action_begin
    torch.testing.assert_close(new.logprob, expected.log_prob(index).sum(1))
    torch.testing.assert_close(decision.logprob, new.logprob, atol=1e-4, rtol=0)
    torch.testing.assert_close(new.entropy, expected.entropy().mean(1))
    assert (policy.kl(new.dist, new.dist.flip(0)) > 0).any()
    every = torch.arange(policy.action_begin, policy.action_end)[:, None].expand(-1, 7)
    assert len(policy.env_action(every)[:, 0].unique()) == bins - 1
    unit = torch.linspace(-1, 1, bins, dtype=torch.float64)[:, None].expand(-1, 7)
    assert torch.equal(policy.bin_tokens(unit), every.flip(0))


def test_cloning_is_smooth_only_where_the_config_says(monkeypatch):
    """The loss of a policy that is sure of the right bin is 0 in constant dimensions, and not in the others."""
    policy = load_policy("openvla-flat")
    obs = {"rgb": torch.zeros(2, 32, 32, 3, dtype=torch.uint8)}
    unit, instructions = torch.zeros(2, 1, 7), ["put red cube on plate"] * 2
    tokens = policy.bin_tokens(unit[:, 0]) - policy.action_begin

    def loss(wrong=(), **options):
        logits = torch.full((2, 7, 32), -50.0).scatter(-1, tokens[..., None], 0.0)
        for dim in wrong:  # sure of the neighbour
            logits[:, dim] = logits[:, dim].roll(1, -1)
        monkeypatch.setattr(policy, "action_logits", lambda *args: logits)
        return policy.sft_loss(obs, instructions, unit, **options)

    neighbour = torch.exp(torch.tensor(-0.5 / 0.5**2))  # sigma is half a bin
    share = neighbour / (1 + 2 * neighbour)
    torch.testing.assert_close(loss(), 50 * 2 * share * 2 / 7, rtol=1e-2, atol=0)
    torch.testing.assert_close(loss(wrong=[4]) - loss(), torch.tensor(50 / 7), rtol=1e-4, atol=0)
    assert loss(sigma=0.0) == 0
    assert loss(prompt="where is the {instruction}") > 5 * loss()  # an answer: every dimension


def test_fresh_weights_follow_the_seed():
    torch.manual_seed(5)
    a = load_policy("openvla-tiny")
    b = load_policy("openvla-tiny")
    torch.manual_seed(5)
    assert same_weights(a, load_policy("openvla-tiny")) and not same_weights(a, b)
    assert load_policy("openvla-tiny", dtype=torch.bfloat16).dtype == torch.bfloat16
    table = a.language_model.model.embed_tokens.weight[a.action_begin : a.action_end]
    near, far = (
        (table[1:] - table[:-1]).norm(dim=1).mean(),
        (table[16:] - table[:-16]).norm(dim=1).mean(),
    )
    assert near < 0.2 * far, "neighbouring bins start alike"
    rgb = (
        torch.randint(256, (8, 6, 6, 3), dtype=torch.uint8)
        .repeat_interleave(16, 1)
        .repeat_interleave(16, 2)
    )
    patches = a.embed(a.preprocess(rgb), torch.ones(8, 1, dtype=torch.long))[:, 1:]
    assert patches.std(0).mean() > 0.2 * patches.std(), (
        "an untrained policy's patch tokens depend on the image"
    )


def test_sharded_checkpoint(tiny, tiny_dir, broken_dir):
    tensors = load_file(broken_dir / "model.safetensors")
    (broken_dir / "model.safetensors").unlink()
    names = [f"model-{i}-of-2.safetensors" for i in (1, 2)]
    half = len(tensors) // 2
    for name, part in zip(names, (list(tensors)[:half], list(tensors)[half:])):
        save_file({key: tensors[key] for key in part}, broken_dir / name)
    assert same_weights(load_policy("openvla-tiny", broken_dir), tiny), "RLinf writes no index"
    weight_map = {key: names[i >= half] for i, key in enumerate(tensors)}
    (broken_dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert same_weights(load_policy("openvla-tiny", broken_dir), tiny)
    shard = broken_dir / names[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(Fault, match=f"{names[1]} is missing, truncated"):
        load_policy("openvla-tiny", broken_dir)
    shard.unlink()
    with pytest.raises(Fault, match=f"{names[1]} is missing"):
        load_policy("openvla-tiny", broken_dir)


def test_lora_roundtrip(tiny_dir, tmp_path, obs):
    torch.manual_seed(0)
    policy = load_policy("openvla-tiny", tiny_dir, lora_rank=4, lora_alpha=8)
    before = policy.evaluate_actions(obs, INSTRUCTIONS, policy.act(obs, INSTRUCTIONS).latent)
    base = load_policy("openvla-tiny", tiny_dir)
    latent = policy.act(obs, INSTRUCTIONS).latent
    before = policy.evaluate_actions(obs, INSTRUCTIONS, latent).dist
    torch.testing.assert_close(
        before, base.evaluate_actions(obs, INSTRUCTIONS, latent).dist
    )  # B starts at zero
    for key, p in policy.named_parameters():
        if ".lora_B" in key or key.startswith("value_head."):
            p.data += torch.randn_like(p) * 0.05
    after = policy.evaluate_actions(obs, INSTRUCTIONS, latent)
    assert (after.dist - before).abs().max() > 0.1
    full = policy.language_model.lm_head(torch.eye(128))[:, policy.action_begin : policy.action_end]
    torch.testing.assert_close(
        policy.logits(torch.eye(128)), full
    )  # our column slice of lm_head is peft's
    policy.save(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "value_head.safetensors", "norm_stats.json",
    }  # fmt: skip
    loaded = load_policy("openvla-tiny", tmp_path)
    assert same_weights(loaded, policy)
    assert torch.equal(loaded.evaluate_actions(obs, INSTRUCTIONS, latent).dist, after.dist)
    assert [p.requires_grad for p in loaded.parameters()] == [
        p.requires_grad for p in policy.parameters()
    ]
    for wrong, sentence in (
        ({"lora_rank": 8}, "LoRA rank 4, not 8; pass --lora-rank so"),
        ({"lora_rank": 4, "lora_alpha": 16}, "LoRA alpha 8, not 16"),
        ({"lora_targets": ["q_proj"]}, r"LoRA targets \[.*\], not \['q_proj'\]"),
    ):
        with pytest.raises(Fault, match=sentence):
            load_policy("openvla-tiny", tmp_path, **wrong)
    same = {"lora_rank": 4, "lora_alpha": 8, "lora_targets": LORA_TARGETS[::-1]}
    assert same_weights(load_policy("openvla-tiny", tmp_path, **same), policy)
    some = load_policy("openvla-tiny", tiny_dir, lora_rank=4, lora_targets=("q_proj", "v_proj"))
    assert sum(".lora_A" in key for key, _ in some.named_parameters()) == 2 * 3
    with pytest.raises(Fault, match="LoRA needs a checkpoint"):
        load_policy("openvla-tiny", lora_rank=4)
    half = load_policy("openvla-tiny", tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for key, p in half.named_parameters() if ".lora_" in key} == {torch.float32}
    seen = []
    adapter = half.language_model.model.layers[0].mlp.gate_proj.lora_A["default"]
    adapter.register_forward_hook(lambda module, x, y: seen.append(y.dtype))
    rounded = half.evaluate_actions(obs, INSTRUCTIONS, latent)
    assert seen == [torch.bfloat16] and 0 < (rounded.dist - after.dist).abs().max() < 1
    rounded.logprob.sum().backward()
    assert {p.grad.dtype for key, p in half.named_parameters() if ".lora_" in key} == {
        torch.float32
    }
    rewrite(tmp_path / "adapter_model.safetensors", lambda t: t.pop(next(iter(t))))
    with pytest.raises(Fault, match="lacks the tensor .*lora_"):
        load_policy("openvla-tiny", tmp_path)


def test_rl4vla_training_state(tiny_dir, tmp_path):
    """RL4VLA keeps the value head in training_state.pt beside the adapter."""
    policy = load_policy("openvla-tiny", tiny_dir, lora_rank=4)
    policy.init_value_head()
    policy.save(tmp_path)
    (tmp_path / "value_head.safetensors").unlink()
    torch.save(
        {"vh": policy.value_head.state_dict(), "vla_optimizer": {"state": {}}},
        tmp_path / "training_state.pt",
    )
    assert same_weights(load_policy("openvla-tiny", tmp_path), policy)


def test_damaged_training_state(tiny_dir, tmp_path):
    load_policy("openvla-tiny", tiny_dir, lora_rank=4).save(tmp_path)
    (tmp_path / "value_head.safetensors").unlink()
    torch.save({"optimizer": 1}, tmp_path / "training_state.pt")
    with pytest.raises(Fault, match="training_state.pt is damaged or not RL4VLA's"):
        load_policy("openvla-tiny", tmp_path)
    torch.save({"vh": {"mlp.0.weight": torch.ones(1)}}, tmp_path / "training_state.pt")
    with pytest.raises(Fault, match="lacks the tensor head_l1"):
        load_policy("openvla-tiny", tmp_path)


def test_value_head_is_optional(broken_dir):
    (broken_dir / "value_head.safetensors").unlink()
    policy = load_policy("openvla-tiny", broken_dir)
    assert 0.015 < policy.value_head["head_l1"].weight.std() < 0.025
    assert not any(p.is_meta for p in policy.parameters()) and not any(
        b.is_meta for b in policy.buffers()
    )


def test_rlinf_value_head(tiny, broken_dir):
    """RLinf keeps the same MLP inside the model's file, as value_head.mlp.0, .2 and .4."""
    tensors = load_file(broken_dir / "value_head.safetensors")
    (broken_dir / "value_head.safetensors").unlink()
    theirs = {
        key.replace(f"head_l{i + 1}", f"value_head.mlp.{2 * i}"): t
        for i in range(3)
        for key, t in tensors.items()
        if f"head_l{i + 1}" in key
    }
    assert sorted(theirs) == [
        f"value_head.mlp.{x}" for x in ("0.bias", "0.weight", "2.bias", "2.weight", "4.weight")
    ]
    rewrite(broken_dir / "model.safetensors", lambda t: t.update(theirs))
    assert same_weights(load_policy("openvla-tiny", broken_dir), tiny)
    rewrite(
        broken_dir / "model.safetensors",
        lambda t: t.update({"value_head.mlp.4.bias": torch.zeros(1)}),
    )
    with pytest.raises(
        Fault, match="has the tensor value_head.head_l3.bias, which this model has not"
    ):
        load_policy("openvla-tiny", broken_dir)


def test_statistics_come_from_every_file(broken_dir):
    stats = json.loads((broken_dir / "norm_stats.json").read_text())
    other = copy.deepcopy(stats["builtin"])
    other["action"]["q99"][0] = 0.5
    (broken_dir / "dataset_statistics.json").write_text(json.dumps({"mine": other}))
    assert load_policy("openvla-tiny", broken_dir).unnorm_key == "builtin"
    policy = load_policy("openvla-tiny", broken_dir, unnorm_key="mine")
    assert policy.env_action(torch.full((1, 7), policy.action_begin))[0, 0] > 0.4
    with pytest.raises(Fault, match=r"no key 'wrong'.*\['builtin', 'mine'\]"):
        load_policy("openvla-tiny", broken_dir, unnorm_key="wrong")


# ---------------------------------------------------------------------------------------- bad input: one sentence each
def test_unknown_backbone_and_missing_directory(tmp_path):
    with pytest.raises(Fault, match="unknown backbone 'nope'; choose one of openvla, openvla-tiny"):
        load_policy("nope")
    with pytest.raises(Fault, match="no checkpoint directory /nowhere"):
        load_policy("openvla-tiny", "/nowhere")
    with pytest.raises(Fault, match="no checkpoint directory runs/nowhere"):
        load_policy("openvla-tiny", "runs/nowhere")  # never asks the Hub
    with pytest.raises(Fault, match=r"config\.json cannot be read"):
        load_policy("openvla-tiny", tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(Fault, match=r"config\.json cannot be read"):
        load_policy("openvla-tiny", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "openvla"}))
    with pytest.raises(Fault, match="lacks image_sizes, n_action_bins"):
        load_policy("openvla", tmp_path)


class NoSuchThing(http.server.BaseHTTPRequestHandler):
    """A Hub that has nothing: /api/models/REPO/revision/REVISION is answered with the error that REPO's name asks for."""

    def do_GET(self):
        self.send_response(404)
        self.send_header(
            "X-Error-Code", "RevisionNotFound" if "/some/" in self.path else "RepoNotFound"
        )
        self.end_headers()

    def log_message(self, *args):
        pass


def test_hub_that_says_no_and_no_hub_at_all(monkeypatch, tmp_path):
    """The real client, against a server here and against a closed port."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), NoSuchThing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(hub, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    start = time.time()
    for name, sentence in (
        ("no/body", "^no/body is neither .*: the Hub has no such repository, or it is private .*$"),
        ("some/body@v9", "^some/body is neither .*: 404 .* Revision Not Found .*$"),
    ):
        with pytest.raises(Fault, match=sentence):
            load_policy("openvla", name)
    server.shutdown()
    server.server_close()
    with pytest.raises(
        Fault, match="^gen-robot/openvla-7b-rlvla-warmup is neither .* out of reach .*$"
    ):
        load_policy("openvla")
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    with pytest.raises(Fault, match="HF_HUB_OFFLINE=1"):
        load_policy("openvla", "no/body")
    assert time.time() - start < 20


@pytest.fixture
def cached(monkeypatch, tiny_dir, tmp_path):
    """some/body in the Hub's cache, with no network: the tiny weights as a checkpoint of openvla -> its snapshot."""
    commit = "0123456789abcdef" * 2 + "01234567"
    repo = tmp_path / "cache/models--some--body"
    snapshot = Path(shutil.copytree(tiny_dir, repo / "snapshots" / commit))
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(commit)
    (repo / "refs/v1").write_text(commit)
    config = json.loads((snapshot / "config.json").read_text())
    del config["_word_vocab"]  # what makes a checkpoint openvla-tiny
    (snapshot / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    return snapshot


def test_hub_cache_offline(cached, tiny, tmp_path):
    for name in ("some/body", "some/body@v1", f"some/body@{cached.name}"):
        policy = load_policy("openvla", name)
        assert same_weights(policy, tiny) and policy.dtype == torch.float32  # bfloat16 on a GPU
    with pytest.raises(Fault, match=r"some/body has no tokenizer\.json"):
        policy.tokenize([SHORT])
    with pytest.raises(Fault, match="out of reach"):
        load_policy("openvla", "some/body@v2")
    file = write_tokenizer(tmp_path / "two_words.json")
    load_policy("openvla", "some/body", tokenizer=file, lora_rank=4).save(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (
        "some/body",
        cached.name,
    )  # pinned
    (cached.parents[1] / "refs/main").write_text("moved")
    again = load_policy("openvla", tmp_path / "adapter")
    assert (again.name, again.commit) == ("some/body", cached.name)
    assert again.tokenize([SHORT])[0].shape[0] == 1  # its tokenizer came with the adapter


def test_mistakes_show_before_the_weights_are_fetched(monkeypatch, cached):
    fetched = []
    monkeypatch.setattr(
        files,
        "snapshot_download",
        lambda *a, allow_patterns, **k: fetched.append(allow_patterns) or cached,
    )
    load_policy("openvla", "some/body", dtype=torch.float32)
    small, weights = fetched
    assert weights == ["model*.safetensors"] and not any(
        fnmatch.fnmatch("model-00001-of-00003.safetensors", p) for p in small
    )
    fetched.clear()
    with pytest.raises(Fault, match="no key 'wrong'"):
        load_policy("openvla", "some/body", unnorm_key="wrong")
    (cached / "config.json").write_text(json.dumps({"type": "pi05"}))
    with pytest.raises(Fault, match="checkpoint of pi05"):
        load_policy("openvla", "some/body")
    assert fetched == [small, small]


def test_checkpoint_of_another_backbone(tiny_dir, tmp_path):
    with pytest.raises(Fault, match="is a checkpoint of openvla-tiny, not of the backbone openvla"):
        load_policy("openvla", tiny_dir)
    for config, kind in (
        ({"model_type": "pi05"}, "pi05"),
        ({"type": "pi05"}, "pi05"),
        ({}, "a model that it does not name"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(Fault, match=f"is a checkpoint of {kind}, not of the backbone openvla"):
            load_policy("openvla", tmp_path)


@pytest.mark.parametrize("name", ["model", "value_head"])
def test_truncated_file(broken_dir, name):
    file = broken_dir / f"{name}.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(Fault, match=rf"{name}\.safetensors is missing, truncated"):
        load_policy("openvla-tiny", broken_dir)


def test_tensors_must_match(broken_dir):
    file = broken_dir / "model.safetensors"
    key = "language_model.model.norm.weight"
    rewrite(file, lambda t: t.update({key: t[key][:-1].clone()}))
    with pytest.raises(Fault, match=rf"{key} has the shape \[127\], not \[128\]"):
        load_policy("openvla-tiny", broken_dir)
    rewrite(file, lambda t: t.pop(key))
    with pytest.raises(Fault, match=f"lacks the tensor {key}"):
        load_policy("openvla-tiny", broken_dir)
    rewrite(file, lambda t: t.update({key: torch.ones(128), "surplus": torch.ones(1)}))
    with pytest.raises(Fault, match="has the tensor surplus"):
        load_policy("openvla-tiny", broken_dir)
    dead = "vision_backbone.featurizer.norm.weight"
    rewrite(file, lambda t: t.update({dead: t.pop("surplus")}))
    load_policy(
        "openvla-tiny", broken_dir
    )  # on the list of tensors that the official class has and never uses


def test_merge(tiny_dir, tmp_path, obs, capsys):
    policy = load_policy("openvla-tiny", tiny_dir, lora_rank=4)
    for key, p in policy.named_parameters():
        if ".lora_B" in key:
            p.data += torch.randn_like(p) * 0.05
    policy.save(tmp_path / "adapter")
    (tiny_dir / "preprocessor_config.json").write_text("{}")
    policies.merge(
        str(tmp_path / "adapter"), tmp_path / "out", backbone="openvla-tiny", dtype="float32"
    )
    (tiny_dir / "preprocessor_config.json").unlink()
    assert "outputs differ by" in capsys.readouterr().out
    assert (tmp_path / "out/preprocessor_config.json").is_file()  # the official loader wants it
    merged = load_policy("openvla-tiny", tmp_path / "out")
    assert merged.lora_config is None
    latent = policy.act(obs, INSTRUCTIONS).latent
    expected = policy.evaluate_actions(obs, INSTRUCTIONS, latent).dist
    torch.testing.assert_close(
        merged.evaluate_actions(obs, INSTRUCTIONS, latent).dist, expected, atol=1e-3, rtol=0
    )


def test_command_line_error_is_one_sentence(tiny_dir, tmp_path):
    command = [
        sys.executable,
        str(ROOT / "policies.py"),
        "merge",
        str(tiny_dir),
        str(tmp_path / "out"),
    ]
    done = subprocess.run(
        [*command, "--backbone", "openvla-tiny"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {tiny_dir} is not an adapter")
