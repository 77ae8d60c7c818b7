"""What users' files do to load_policy and merge: one sentence that names file and field, or they simply work."""
# ruff: noqa: F401, F811 (fixtures of test_pi.py)

import dataclasses
import json
import math
import shutil
import typing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_pi import directory, policy
from test_pi import official_layout as official_pi

import policies
from policies import load_policy, merge
from runtime import Fault

TASK = ["put red cube on plate"]
RGB = torch.zeros(1, 96, 96, 3, dtype=torch.uint8)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """base: openvla-tiny as saved; adapter: LoRA on it."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("saved")
    load_policy("openvla-tiny").save(root / "base")
    trained = load_policy("openvla-tiny", root / "base", lora_rank=4)
    for key, p in trained.named_parameters():
        if ".lora_B" in key:
            p.data.normal_(std=0.05)
    trained.save(root / "adapter")
    return root


@pytest.fixture
def base(saved, tmp_path):
    """A copy to change."""
    return Path(shutil.copytree(saved / "base", tmp_path / "base"))


@pytest.fixture
def adapter(saved, tmp_path):
    return Path(shutil.copytree(saved / "adapter", tmp_path / "adapter"))


def edit(file, change):
    """Replaces the file's content by change(content)."""
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def refused(sentence, *args, **options):
    """load_policy raises a Fault with `sentence` in it, in one line."""
    with pytest.raises(Fault) as error:
        load_policy(*args, **options)
    assert sentence in str(error.value) and "\n" not in str(error.value), error.value


def set_tensor(file, key, index, value):
    tensors = load_file(file)
    tensors[key] = tensors[key].clone()
    tensors[key].view(-1)[index] = value
    save_file(tensors, file, {"format": "pt"})


# ------------------------------------------------------------------------------------------------ weights
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers(base, adapter, value):
    """Before: a table of an evaluation, exit 0."""
    file, head = base / "model.safetensors", base / "value_head.safetensors"
    kept = file.read_bytes()
    set_tensor(file, "projector.fc2.weight", 77, value)
    for dtype in (torch.float32, torch.bfloat16):
        refused(
            f"{base}: the tensor projector.fc2.weight holds NaN", "openvla-tiny", base, dtype=dtype
        )
    file.write_bytes(kept)
    set_tensor(head, "head_l2.bias", 3, value)
    refused("value_head.head_l2.bias holds NaN", "openvla-tiny", base)
    key = "base_model.model.projector.fc1.lora_B.weight"
    set_tensor(adapter / "adapter_model.safetensors", key, 5, value)
    refused("projector.fc1.lora_B.default.weight holds NaN", "openvla-tiny", adapter)


def test_two_names_of_one_tensor(policy, official_pi):
    """pi0's tied embedding is lm_head or embed_tokens. Before: whichever came last, silently."""
    file, kind = official_pi / "model.safetensors", policy.config["model_type"]
    tensors = load_file(file)
    other = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
    own = "paligemma_with_expert.paligemma.lm_head.weight"
    save_file(tensors | {other: tensors[own].clone()}, file)
    load_policy(kind, official_pi)
    save_file(tensors | {other: tensors[own] + 1}, file)
    refused("are two names of one tensor, but they differ", kind, official_pi)


def test_openvla_oft_is_refused_by_name(base):
    (base / "action_head--150000_checkpoint.pt").write_bytes(b"")
    refused("is a checkpoint of OpenVLA-OFT (action_head--150000", "openvla-tiny", base)


# ------------------------------------------------------------------------------------------------ statistics
OWN = {"q01": [-1.0] * 7, "q99": [3.0] * 7, "mask": [True] * 6 + [False]}


def official_names(base, **more):
    """base with bridge_orig in config.json, as the official checkpoints; more: {file: content} beside it."""
    (base / "norm_stats.json").unlink()
    edit(
        base / "config.json",
        lambda c: c | {"norm_stats": {"bridge_orig": c["norm_stats"]["builtin"]}},
    )
    for name, content in more.items():
        (base / f"{name}.json").write_text(json.dumps(content))


def largest(policy):
    return policy.env_action(torch.full((1, 7), policy.action_begin))[0, 0].item()


def test_a_fine_tunes_own_statistics_count(base, saved, adapter):
    """Before: bridge_orig of config.json was used, silently, and actions were off by 30."""
    official_names(base, dataset_statistics={"mine": {"action": OWN}})
    policy = load_policy("openvla-tiny", base)
    assert policy.unnorm_key == "mine" and largest(policy) > 2.9
    assert load_policy("openvla-tiny", base, unnorm_key="bridge_orig").unnorm_key == "bridge_orig"

    two = {"mine": {"action": OWN}, "yours": {"action": OWN}}
    (base / "dataset_statistics.json").write_text(json.dumps(two))
    sentence = "no key that is this checkpoint's own; unnorm_key is one of ['bridge_orig', 'mine', 'yours']"
    refused(sentence, "openvla-tiny", base)
    assert load_policy("openvla-tiny", base, unnorm_key="yours").unnorm_key == "yours"

    same = json.loads((base / "config.json").read_text())[
        "norm_stats"
    ]  # no fine-tune's, the official list again
    (base / "dataset_statistics.json").write_text(json.dumps(same))
    assert load_policy("openvla-tiny", base).unnorm_key == "bridge_orig"


def test_a_fine_tunes_own_statistics_count_beside_an_adapter(base, adapter):
    """Before: never read."""
    official_names(base)
    (adapter / "norm_stats.json").unlink()
    assert load_policy("openvla-tiny", adapter, base=base).unnorm_key == "bridge_orig"
    file = adapter / "dataset_statistics.json"
    file.write_text(json.dumps({"mine": {"action": OWN}}))
    policy = load_policy("openvla-tiny", adapter, base=base)
    assert policy.unnorm_key == "mine" and largest(policy) > 2.9
    file.write_text(json.dumps({"mine": {"action": OWN}, "yours": {"action": OWN}}))
    refused(
        "unnorm_key is one of ['bridge_orig', 'mine', 'yours']", "openvla-tiny", adapter, base=base
    )
    policy.save(adapter)  # ours, which holds the one in use, counts most
    assert load_policy("openvla-tiny", adapter, base=base).unnorm_key == "mine"


@pytest.mark.parametrize("content, sentence", [
    (None, "norm_stats.json holds a NoneType, not a JSON object"),
    ([], "norm_stats.json holds a list, not a JSON object"),
    ({}, "norm_stats.json is empty"),
    ({"mine": None}, "norm_stats.json, mine is no object and no 'action' with q01 and q99"),
    ({"mine": {}}, "norm_stats.json, mine has nothing and no 'action' with q01 and q99 in it"),
    ({"mine": {"action": None}}, "norm_stats.json, mine has 'action' and no 'action' with q01 and q99"),
    (OWN, "norm_stats.json, q01 is no object and no 'action'"),  # flat: no data set
    ({"action": OWN}, "norm_stats.json, action has 'q01', 'q99', 'mask' and no 'action' with q01 and q99"),
    ({"mine": {"actions": OWN}}, "norm_stats.json, mine has 'actions' and no 'action'"),  # pi0's name
    ({"mine": {"action": {"mean": [0.0] * 7, "std": [1.0] * 7}}}, "norm_stats.json, mine has no q01 and q99 of action"),
    ({"mine": {"action": OWN | {"q99": None}}}, "(q99 is missing)"),
    ({"mine": {"action": OWN | {"q99": ["1"] * 7}}}, "norm_stats.json, mine: q99 of action is no list of numbers"),
    ({"mine": {"action": OWN | {"q99": 1.0}}}, "norm_stats.json, mine: q99 of action is no list of numbers"),
    ({"mine": {"action": OWN | {"q99": [1.0] * 6}}}, "norm_stats.json, mine: q01 and q99 of action have [7, 6] dimensions"),
    ({"mine": {"action": {"q01": [0.0] * 14, "q99": [1.0] * 14}}}, "norm_stats.json, mine: 14 dimensions of action, not 7"),
    ({"mine": {"action": OWN | {"mask": [True] * 6}}}, "norm_stats.json, mine: mask of action is [True"),
    ({"mine": {"action": OWN | {"mask": "all"}}}, "norm_stats.json, mine: mask of action is 'all'"),
    ({"mine": {"action": OWN | {"q01": [math.nan] + [0.0] * 6}}}, "mine: q01 of action is nan in dimension 0"),
    ({"mine": {"action": OWN | {"q99": [0.0] * 6 + [math.inf]}}}, "mine: q99 of action is inf in dimension 6"),
])  # fmt: skip
def test_statistics_of_an_unexpected_shape(base, content, sentence):
    (base / "norm_stats.json").write_text(json.dumps(content))
    refused(sentence, "openvla-tiny", base)


def test_statistics_without_a_mask_scale_all_dimensions(base):
    """As OpenVLA's own code takes them. The gripper is then on the data's scale before it is made -1 or +1."""
    own = {"q01": [-2.0] * 6 + [0.0], "q99": [2.0] * 6 + [1.0]}
    (base / "norm_stats.json").write_text(json.dumps({"mine": {"action": own}}))
    policy = load_policy("openvla-tiny", base)
    actions = torch.tensor([[0.5] * 6 + [1.0], [-0.5] * 6 + [-1.0]])
    back = policy.env_action(policy.bin_tokens(policy.to_unit(actions)))
    torch.testing.assert_close(back, actions.double(), atol=2 / 31, rtol=0)  # half a bin


def pi_statistics(official_pi, change):
    file = official_pi / "physical-intelligence/maniskill/norm_stats.json"
    edit(file, lambda content: change(content["norm_stats"]))


def pad(stats):
    """openpi's: with zeros up to the model's width."""
    return {name: {q: x[:7] + [0.0] * 25 for q, x in part.items()} for name, part in stats.items()}


def test_padded_statistics_load(policy, official_pi, obs7):
    """openpi's, zero-padded to 32. Before: refused for pi0, whose padded state has no spread."""
    kind = policy.config["model_type"]
    pi_statistics(official_pi, lambda stats: {"norm_stats": pad(stats)})
    loaded = load_policy(kind, official_pi)
    loaded.tokenizer = policy.tokenizer
    assert loaded.act(obs7, TASK, 0).actions.shape == (1, 5, 7)


@pytest.fixture
def obs7():
    return {"rgb": torch.zeros(1, 28, 28, 3, dtype=torch.uint8), "state": torch.zeros(1, 7)}


@pytest.mark.parametrize("change, sentence", [
    (lambda stats: None, "norm_stats.json holds a NoneType, not a JSON object"),
    (lambda stats: {}, "norm_stats.json has no norm_stats, under which openpi keeps them"),
    (lambda stats: stats, "norm_stats.json has no norm_stats, under which openpi keeps them"),
    (lambda stats: {"norm_stats": None}, "norm_stats.json, physical-intelligence/maniskill is no object"),
    (lambda stats: {"norm_stats": {"action": stats["actions"], "observation.state": stats["state"]}},  # lerobot's
     "physical-intelligence/maniskill has 'action', 'observation.state' and no 'actions' with"),
    (lambda stats: {"norm_stats": stats | {"actions": {q: [0.0, 1.0] * 7 for q in stats["actions"]}}},
     "physical-intelligence/maniskill: 14 dimensions of actions, not 7"),
    (lambda stats: {"norm_stats": stats | {"actions": {q: x[:6] for q, x in stats["actions"].items()}}},
     "physical-intelligence/maniskill: 6 dimensions of actions, not 7"),
    (lambda stats: {"norm_stats": stats | {"actions": {q: [math.nan] * 7 for q in stats["actions"]}}},
     "of actions is nan in dimension 0"),
    (lambda stats: {"norm_stats": stats | {"actions": {q: {} for q in stats["actions"]}}},
     "of actions, which it scales by ("),
])  # fmt: skip
def test_pi_statistics_of_an_unexpected_shape(policy, official_pi, change, sentence):
    pi_statistics(official_pi, change)
    refused(sentence, policy.config["model_type"], official_pi)


# ------------------------------------------------------------------------------------------------ config.json
@pytest.mark.parametrize("change, sentence", [
    (lambda c: None, "config.json holds a NoneType, not a JSON object"),
    (lambda c: [c], "config.json holds a list, not a JSON object"),
    (lambda c: c | {"text_config": None}, "config.json: text_config is null, not of type dict"),
    (lambda c: c | {"text_config": {"hidden_size": "many"}}, "config.json: text_config is not Llama's"),
    (lambda c: c | {"image_sizes": 96}, "config.json: image_sizes is 96, not of type list"),
    (lambda c: c | {"image_sizes": [96]}, "config.json: image_sizes is [96], not one number"),
    (lambda c: c | {"image_resize_strategy": "letterbox"}, "config.json: image_resize_strategy is 'letterbox'"),
    (lambda c: c | {"n_action_bins": "256"}, 'config.json: n_action_bins is "256", not of type int'),
    (lambda c: c | {"n_action_bins": True}, "config.json: n_action_bins is true, not of type int"),
    (lambda c: c | {"timm_model_ids": c["timm_model_ids"][1:], "image_sizes": [96]},  # one tower
     "config.json: timm_model_ids is ['vit_so400m_patch14_siglip_224']; OpenVLA here has the two towers"),
    (lambda c: c | {"timm_model_ids": ["vit_base", "resnet"]}, "config.json: timm_model_ids is ['vit_base', 'resnet']"),
    (lambda c: c | {"n_action_bins": 1}, "config.json: n_action_bins is 1, of a vocabulary of 192"),
    (lambda c: c | {"n_action_bins": 500}, "config.json: n_action_bins is 500, of a vocabulary of 192"),
    (lambda c: c | {"pad_to_multiple_of": -64}, "config.json: pad_to_multiple_of is -64, not at least 1"),
    (lambda c: c | {"norm_stats": [1]}, "config.json: norm_stats is a list, not an object"),
])  # fmt: skip
def test_configs_of_an_unexpected_shape(base, change, sentence):
    edit(base / "config.json", change)
    refused(sentence, "openvla-tiny", base)


def test_configs_that_mean_what_they_always_meant(base):
    """Another attention kernel, null for what is not there."""
    before = load_policy("openvla-tiny", base).fixed_outputs()

    kernel = {
        "_attn_implementation": "flash_attention_2",
        "attn_implementation": "flash_attention_2",
    }
    nothing = {"norm_stats": None, "pad_token_id": None}
    edit(base / "config.json", lambda c: c | nothing | {"text_config": c["text_config"] | kernel})
    policy = load_policy("openvla-tiny", base)
    assert torch.equal(policy.fixed_outputs(), before)
    assert policy.act(
        {"rgb": RGB.expand(2, -1, -1, -1)}, [*TASK, "put can on plate"], 0
    ).actions.shape == (2, 1, 7)


@pytest.mark.parametrize("change, sentence", [
    ({"action_horizon": "8"}, 'config.json: action_horizon is "8", not of type int'),
    ({"noise_level": None}, "config.json: noise_level is null, not of type float"),
    ({"depth": 0}, "config.json: depth is 0, not at least 1"),
    ({"value_head_hidden": 16}, "config.json: value_head_hidden is 16, not of type list"),
    ({"noise_level": math.nan}, "--noise-level must be positive"),
])  # fmt: skip
def test_pi_configs_of_an_unexpected_shape(policy, official_pi, change, sentence):
    edit(official_pi / "config.json", lambda content: content | change)
    refused(sentence, policy.config["model_type"], official_pi)


def test_the_horizon_of_openpis_own_config_is_not_that_of_rl(policy, official_pi):
    """openpi's converter writes the horizon of pretraining and no action_chunk. Ours has both."""
    file, kind = official_pi / "config.json", policy.config["model_type"]
    edit(file, lambda content: content | {"action_horizon": 10, "action_chunk": 5})
    assert load_policy(kind, official_pi).horizon == 10
    edit(file, lambda content: {k: v for k, v in content.items() if k != "action_chunk"})
    assert load_policy(kind, official_pi).horizon == 8


@pytest.mark.parametrize(
    "content", [None, {}, {"metadata": {}}, {"weight_map": None}, {"weight_map": {"a": 1}}]
)
def test_an_index_without_a_weight_map(base, content):
    (base / "model.safetensors.index.json").write_text(json.dumps(content))
    sentence = "has no weight_map" if content is not None else "holds a NoneType"
    refused(f"model.safetensors.index.json {sentence}", "openvla-tiny", base)


# ------------------------------------------------------------------------------------------------ adapters
@pytest.mark.parametrize("change, sentence", [
    ({"peft_type": "IA3"}, "adapter_config.json: peft_type is 'IA3'; only plain LoRA is read here"),
    ({"peft_type": None}, "adapter_config.json: peft_type is None; only plain LoRA"),
    ({"use_dora": True}, "adapter_config.json: use_dora is True; only plain LoRA"),
    ({"bias": "all"}, "adapter_config.json: bias is 'all'; only plain LoRA"),
    ({"lora_bias": True}, "adapter_config.json: lora_bias is True; only plain LoRA"),
    ({"layer_replication": [[0, 2]]}, "adapter_config.json: layer_replication is [[0, 2]]; only plain LoRA"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which also changes the base model"),
    ({"r": 0}, "adapter_config.json: r is 0, not a rank"),
    ({"r": "4"}, "adapter_config.json: r is '4', not a rank"),
    ({"lora_alpha": None}, "adapter_config.json: lora_alpha is None, not a number"),
    ({"target_modules": None}, "adapter_config.json: target_modules is None, no list of names"),
    ({"target_modules": [1]}, "adapter_config.json: target_modules is [1], no list of names"),
    ({"target_modules": ["nose"]}, "--lora-targets: "),
    ({"base_model_name_or_path": None}, "adapter_config.json does not name the adapter's base model: say with --base"),
    ({"base_model_name_or_path": "/moved/away"}, "there is no checkpoint directory /moved/away; it is the base model of"),
])  # fmt: skip
def test_adapters_of_another_kind(adapter, change, sentence):
    edit(adapter / "adapter_config.json", lambda content: content | change)
    refused(sentence, "openvla-tiny", adapter)


def test_a_base_that_has_moved(saved, base, adapter):
    expected = load_policy("openvla-tiny", adapter).fixed_outputs()
    moved = {"base_model_name_or_path": "/moved/away"}
    edit(adapter / "adapter_config.json", lambda content: content | moved)
    assert torch.equal(load_policy("openvla-tiny", adapter, base=base).fixed_outputs(), expected)
    refused("is an adapter, too: say with --base", "openvla-tiny", adapter, base=saved / "adapter")
    refused(
        f"is a full model and no adapter: leave out --base {base}", "openvla-tiny", base, base=base
    )


def test_lora_targets_by_words_commas_or_all_linear(saved):
    def adapted(targets):
        policy = load_policy("openvla-tiny", saved / "base", lora_rank=4, lora_targets=targets)
        return {key for key, _ in policy.named_parameters() if ".lora_A" in key}

    assert (
        adapted(["q_proj,v_proj"]) == adapted(("q_proj", "v_proj")) == adapted(["q_proj, v_proj"])
    )
    assert adapted(["all-linear"]) == adapted(None) > adapted(["q_proj"])
    with pytest.raises(Fault, match="--lora-targets: .*nose"):
        adapted(["nose"])
    load_policy("openvla-tiny", saved / "adapter", lora_targets=["all-linear"])  # what it has


def test_merge_overwrites_neither_base_nor_adapter(saved, base, adapter):
    """Before: the base was overwritten; or the adapter was compared with itself."""
    for out in (base, adapter, base / ".." / base.name):
        before = {file: file.read_bytes() for file in out.iterdir()}
        with pytest.raises(Fault, match="is there already, and would be overwritten"):
            merge(str(adapter), out, base=str(base), backbone="openvla-tiny", dtype="float32")
        assert {file: file.read_bytes() for file in out.iterdir()} == before


# ------------------------------------------------------------------------------------------------ tokenizers
def test_tokenizer_files_of_another_kind(policy, official_pi, tmp_path):
    kind = policy.config["model_type"]
    (tmp_path / "tokenizer.model").write_bytes(
        b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02"
    )  # SentencePiece's
    later = {"version": "1.0", "model": {"type": "SomethingNew", "vocab": {}}, "added_tokens": []}
    (tmp_path / "later.json").write_text(json.dumps(later))
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "list.json").write_text("[]")
    for name in ("tokenizer.model", "later.json", "empty.json", "list.json"):
        file = tmp_path / name
        refused(
            f"{file} is no tokenizer.json that the installed", kind, official_pi, tokenizer=file
        )


# ------------------------------------------------------------------------------------------------ numbers
def test_bfloat16_weights_are_not_trained(saved):
    """At pi0.5's rate a step changed 15 % of them at all."""
    for dtype in (torch.bfloat16, "bfloat16"):
        with pytest.raises(Fault, match="--lora-rank 0 trains every weight.*--dtype float32"):
            load_policy("openvla-tiny", saved / "base", dtype=dtype, training=True)
        for options in ({"lora_rank": 4, "training": True}, {}):
            load_policy("openvla-tiny", saved / "base", dtype=dtype, **options)
    load_policy("openvla-tiny", saved / "adapter", dtype="bfloat16", training=True)
    load_policy("openvla-tiny", saved / "base", dtype="float32", training=True)
    load_policy("openvla-tiny", saved / "base", dtype="auto", training=True)


@pytest.mark.parametrize(
    "options", [{"lora_rank": -1}, {"lora_rank": 4, "lora_alpha": 0}, {"lora_alpha": -2}]
)
def test_ranks_out_of_range(saved, options):
    flag = "--lora-alpha" if "lora_alpha" in options else "--lora-rank"
    sentence = f"{flag} is {list(options.values())[-1]}: it must be"
    refused(sentence, "openvla-tiny", saved / "base", **options)


def test_flags_that_would_do_nothing(saved, policy, official_pi):
    refused(
        "--lora-targets is of adapters, and --lora-rank 0",
        "openvla-tiny",
        saved / "base",
        lora_targets=["q_proj"],
    )
    refused("--dtype float16 is none of auto, bfloat16, float32", "openvla-tiny", dtype="float16")
    shutil.rmtree(official_pi / "physical-intelligence")
    refused(
        "norm_stats has no key 'mine'", policy.config["model_type"], official_pi, unnorm_key="mine"
    )


def test_every_numeric_flag_has_a_range():
    hints = typing.get_type_hints(policies.PolicyArgs).items()
    numbers = {name for name, hint in hints if {int, float} & {hint, *typing.get_args(hint)}}
    ranges = " ".join(policies.RANGES.values()).split()
    assert set(ranges) == numbers and len(ranges) == len(numbers)


def test_flags_are_load_policys_keywords(saved):
    """What ppo_pair.py and evaluate.py pass on: every flag at its default."""
    args = policies.PolicyArgs(lora_rank=4, lora_targets=("q_proj,k_proj",))
    policy = load_policy("openvla-tiny", saved / "base", **vars(args))
    assert sum(".lora_A" in key for key, _ in policy.named_parameters()) == 2 * 3
    flow = load_policy("pi05-tiny", **vars(policies.PolicyArgs(replan=3, noise_level=0.25)))
    assert (flow.chunk, flow.noise_level) == (3, 0.25)


def test_training_without_a_tokenizer_ends_before_the_weights(policy, official_pi, monkeypatch):
    monkeypatch.setattr(policies, "load_weights", None)
    kind = policy.config["model_type"]
    with pytest.raises(Fault, match="no tokenizer.json.*PaliGemma's.*--tokenizer FILE"):
        policies.load_policy(kind, official_pi, training=True, lora_rank=2)
