"""The warm start: labels that mean what they say, losses that train, and the cache."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import sapien
import torch
from transforms3d.euler import euler2quat

import envs
import policies
import sft
from runtime import Fault
from scenes import builtin

NAMES = builtin.PACK.names


@pytest.fixture(scope="module")
def episodes(env):
    return sft.collect([env], "train", [400_000, 400_001], 0.0, 0.0, 0) + sft.collect(
        [env], "busy", [0], 0.0, 0.0, 0
    )


@pytest.fixture(scope="module")
def frames(episodes):
    return sft.frames_of(episodes, 8)


@pytest.fixture(params=["openvla-tiny", "pi05-tiny"])
def policy(request):
    torch.manual_seed(0)
    return policies.load_policy(request.param)


def test_the_oracle_solves_and_its_frames_are_labelled(episodes):
    for e, extra in zip(episodes, (1, 1, 4)):
        steps = len(e["action"])
        assert e["rgb"].shape == (steps, 96, 96, 3) and e["object_xyz"].shape == (
            steps,
            1 + extra,
            3,
        )
        assert set(np.unique(e["classes"])) <= {0, 26, 27, *(1 + e["objects"])}
        assert (np.abs(e["action"][:, :3]) <= builtin.PACK.largest_move + 1e-6).all() and np.isin(
            e["action"][:, 6], (-1, 1)
        ).all()
    assert all(e["success"] for e in episodes[:2])
    first = episodes[0]  # at the end the target lies over the plate
    assert np.linalg.norm(first["object_xyz"][-1, 0, :2] - first["where"][-1, 0, :2]) < 0.065


def turn_to(name, target, hand):
    """grasp_turn in degrees for an object and a hand (which looks down) whose x axes point that many degrees from x."""
    looks = dict(target=(0, target), tcp=(np.pi, hand))
    poses = {
        k: sapien.Pose(q=euler2quat(tilt, 0, np.deg2rad(yaw))) for k, (tilt, yaw) in looks.items()
    }
    fake = {f"{k}_entity": SimpleNamespace(pose=pose) for k, pose in poses.items()}
    return np.rad2deg(
        builtin.grasp_turn(
            SimpleNamespace(episode=SimpleNamespace(target=NAMES.index(name)), **fake)
        )
    )


@pytest.mark.parametrize("hand", [0, 48, -130])
def test_the_hand_turns_for_a_long_target_that_lies_along_the_fingers_and_for_nothing_else(hand):
    for off in (0, 30, 60, 90, 120):
        for name in ("red cube", "purple cross", "blue can"):
            assert turn_to(name, hand + off, hand) == 0
    for off in (0, 30, -45, 50, -50, 180, 215):  # fingers that close straighten these
        assert turn_to("brown stick", hand + off, hand) == 0
    for off, turn in (
        (60, 60),
        (-60, -60),
        (89, 89),
        (91, -89),
        (240, 60),
        (-240, -60),
        (119, -61),
    ):
        assert np.isclose(turn_to("brown stick", hand + off, hand), turn, atol=1e-3)


def test_without_that_turn_the_oracle_fails(env, start, monkeypatch):
    """A bar of 9 cm that lies along the fingers, which open 8 cm."""

    def solved():
        start(env, 35, "bare")
        for _ in range(env.pack.max_episode_steps):
            env.step(env.pack.oracle(env))
        return env.success_once

    assert solved() and NAMES[env.episode.target] == "green bar"
    monkeypatch.setattr(builtin, "grasp_turn", lambda env: 0.0)
    assert not solved()


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_the_arm_is_disturbed_in_that_part_of_the_steps_and_the_label_is_not(
    env, monkeypatch, rate
):
    moves, labels, step = [], [], env.step
    monkeypatch.setattr(env, "step", lambda action: (moves.append(action), step(action))[1])
    for episode_id in (200_000, 200_001):
        (episode,) = sft.collect([env], "bare", [episode_id], 0.25, rate, 0)
        labels += [*episode["action"]][: len(moves) - len(labels)]  # a last frame may have no step
    labels = np.array(labels)
    moved = (labels != np.array(moves)).any(1).mean()
    assert moved == rate if rate in (0, 1) else 0.1 < moved < 0.6
    assert (np.abs(labels[:, :3]) <= builtin.PACK.largest_move + 1e-6).all()


def test_an_astray_demonstration_begins_where_a_policy_that_errs_has_the_hand(env):
    """Elsewhere: over the place of a distractor of `train` or on its way from there to the plate.
    What follows is the oracle's, and it succeeds."""
    ids = range(400_000, 400_006)
    straight = sft.collect([env], "bare", ids, 0.0, 0.0, 0)
    astray = sft.collect([env], "bare", ids, 0.0, 0.0, 0, astray=1.0)
    begin = [np.array([e["where"][0, 1] for e in part]) for part in (straight, astray)]
    assert np.ptp(begin[0], axis=0).max() < 0.01  # always the same
    assert (np.linalg.norm(begin[1] - begin[0], axis=1) > 0.05).sum() >= 4
    assert sum(e["success"] for e in astray) >= 5
    assert all((a["objects"] == b["objects"]).all() for a, b in zip(straight, astray, strict=True))


@pytest.mark.parametrize(("backbone", "rate"), [("openvla-tiny", 1 / 2), ("pi05-tiny", 1 / 8)])
def test_what_is_demonstrated(monkeypatch, tmp_path, backbone, rate):
    """Scenes without a distractor (A.1). A policy that acts in chunks sees fewer disturbances."""
    asked = []
    monkeypatch.setattr(sft, "make_envs", lambda *_, **__: nullcontext())
    monkeypatch.setattr(sft, "collect_parallel", lambda _, *how: asked.append(how) or [])
    monkeypatch.delattr(sft, "frames_of")  # it ends there
    with pytest.raises(NameError):
        sft.main(sft.preset(backbone, out=str(tmp_path / "out")))
    with pytest.raises(NameError):
        sft.main(sft.preset(backbone, out=str(tmp_path / "out"), mixed_share=0.1))
    scenes, *demos = [(split, len(ids), how) for split, ids, *how in asked[:3]]
    assert scenes == ("busy", 1000, [0.5, 0.5, 0])
    how = [0.25, rate, 0, 0.4]
    assert demos == [("bare", 2400, how), ("bare", 64, how)]
    *same, (split, ids, *mixed) = asked[3:]
    assert same == asked[:3] and (split, len(ids), mixed) == ("train", 300, how)
    asked = asked[3:]
    ids = [set(ids) for _, ids, *_ in asked]
    assert len(set.union(*ids)) == sum(map(len, ids))  # no episode is used twice


def test_flatland_demonstrates_what_it_shows():
    """Its frames have the simulator's labels: what is where, and the oracle's action, undisturbed."""
    vec = envs.make_envs(8, "flat")
    episodes = sft.collect_flat(vec, "busy", range(10), 0.5, 0.5, 0)
    assert [e["id"] for e in episodes] == list(range(10))
    frames = sft.frames_of(episodes, 8)
    names = vec.pack.names
    assert frames["rgb"].shape == (60, 32, 32, 3) and frames["classes"].shape == (60, 16, 16)
    assert frames["object_ids"].shape == (60, 5) and (frames["object_ids"] >= 0).all()
    obs = vec.reset(range(8), "busy")
    assert vec.instructions == [
        f"put {names[i]} on plate" for i in frames["object_ids"][:48:6, 0].tolist()
    ]
    assert torch.equal(obs["rgb"], frames["rgb"][:48:6])
    assert torch.equal(vec.oracle()[:, 0], frames["action"][:48:6])
    for classes, objects, xyz, where, rgb in zip(
        *(frames[k] for k in ("classes", "object_ids", "object_xyz", "where", "rgb"))
    ):
        assert set(classes.unique().tolist()) <= {0, 26, 27, *(1 + objects).tolist()}
        for kind, (row, column, _) in zip((*objects, 25, 26), (*xyz, *where)):
            spot = (
                classes == 1 + kind
            ).nonzero().float() * 2  # half of a thing's pixels at least are where it is said to be
            assert (
                not len(spot)
                or (spot - torch.tensor([row, column])).abs().max(1).values.median() <= 3.5
            )
        assert (rgb[::2, ::2][classes == 27].int() == 20).all()  # the hand
    wins = sft.collect_flat(vec, "bare", range(64), 0.25, 0.5, 0)
    assert np.mean([e["success"] for e in wins]) > 0.95 and all(
        len(e["objects"]) == 1 for e in wins
    )
    moved = sft.collect_flat(vec, "bare", range(64), 0.0, 0.5, 0)
    assert any((a["where"] != b["where"]).any() for a, b in zip(wins, moved))


def test_chunks_are_the_actions_that_follow(episodes, frames):
    start = 0
    for e in episodes:
        n = len(e["action"])
        for t in range(n):
            expected = [e["action"][min(t + h, n - 1)] for h in range(8)]
            assert np.array_equal(frames["chunk"][start + t].numpy(), np.stack(expected))
        start += n
    assert len(frames["chunk"]) == start


def test_grounding_answers_are_the_places_asked_for(frames):
    torch.manual_seed(0)
    asked, answers = sft.grounding_answers(frames, builtin.PACK)
    assert answers.shape == (len(asked), 1, 7)
    center, scale = map(torch.tensor, builtin.PACK.workspace)
    for i, name in enumerate(asked.tolist()):
        ids = frames["object_ids"][i].tolist()
        xyz = frames["object_xyz"][i, ids.index(name)]
        places = torch.cat([xyz[:2], frames["where"][i, 0, :2], frames["where"][i, 1]])
        scales, centers = (torch.cat([x[:2], x[:2], x]) for x in (scale, center))
        torch.testing.assert_close(answers[i, 0] * scales + centers, places)


def test_token_loss_is_least_for_the_right_tokens(frames):
    policy = policies.load_policy("openvla-tiny")
    batch = {k: v[:4] for k, v in frames.items()}
    tokens = policy.bin_tokens(policy.to_unit(batch["action"]))

    def answer(right):  # a policy that is sure of the tokens it is given
        fake = copy.copy(policy)
        logits = torch.full((4, 7, 32), -20.0).scatter(
            -1, (right - policy.action_begin)[..., None], 20.0
        )
        fake.action_logits = lambda *_: logits
        return fake.sft_loss(
            batch,
            ["put red cube on plate"] * 4,
            fake.to_unit(batch["chunk"]),
            sigma=0.1,
            jitter=0.0,
        )

    assert answer(tokens) < 0.01
    assert answer((tokens + 2).clamp(max=policy.action_end - 1)) > 10


@pytest.mark.parametrize("backbone", ["openvla-tiny", "openvla-flat", "pi05-tiny", "pi05-flat"])
def test_pointing_is_the_attention_that_the_network_computes(frames, backbone):
    """In the middle of three layers, and in the last of two, which Llama gives the last words alone."""
    policy = policies.load_policy(backbone)
    batch, names = {k: v[:4] for k, v in frames.items()}, ["red cube", "cube", "blue bar", "plate"]
    unit, looks, weights = torch.zeros(4, 1, 7), [], []
    handles = policy.watch_pointing(looks.append)
    if backbone.startswith("pi05"):
        layer, patches = policy.paligemma_with_expert["gemma_expert"]["model"]["layers"][1], 0
        rows, which = 4 * 4, slice(None)  # of four noises each
    else:
        layer, patches = policy.language_model.model.layers[1], 1  # behind BOS
        rows, which = 4, slice(-7, -6)  # reads no action token: the jitter does not touch it
    torch.manual_seed(0)
    policy.sft_loss(batch, names, unit, "where is the {instruction} <out>")
    handles[0].remove()
    attention = layer.self_attn
    attention.config._attn_implementation = "eager"

    def additive(_, inputs, options):  # eager attention adds its mask
        visible = options["attention_mask"]
        options["attention_mask"] = torch.zeros(visible.shape).masked_fill(~visible, -1e9)
        return inputs, options

    attention.register_forward_pre_hook(additive, with_kwargs=True)
    attention.register_forward_hook(lambda _, __, out: weights.append(out[1]))
    for module in policy.modules():  # the others share that config
        if type(module) is type(attention) and module is not attention:
            module.register_forward_pre_hook(additive, with_kwargs=True)
    torch.manual_seed(0)
    policy.sft_loss(batch, names, unit, "where is the {instruction} <out>")
    (look,), heads = looks, attention.config.num_attention_heads // 2
    n = (policy.image_size // (8 if backbone.endswith("flat") else 16)) ** 2
    expected = weights[0][:, :heads, which, patches : patches + n]
    assert look.shape == (rows, heads, 2 if patches else policy.horizon, n)
    torch.testing.assert_close(look[:, :, : expected.shape[2]].exp(), expected)


@pytest.mark.parametrize("pointing", [True, False])
def test_both_stages_teach_pointing_where_it_is_asked_for(policy, frames, pointing, monkeypatch):
    taught = []
    monkeypatch.setattr(sft, "train", lambda *args: taught.append({*args[4]()}))
    backbone = "pi05-tiny" if policy.horizon > 1 else "openvla-tiny"
    trained, _ = sft.warm_up(sft.preset(backbone, pointing=pointing), frames, frames, frames)
    expected = {"pointing"} if pointing else set()
    assert [stage & {"grounding", "pointing"} for stage in taught] == [{"grounding"} | expected] * 2
    assert not any(module._forward_pre_hooks for module in trained.modules())


def test_a_start_goes_on_with_a_share_of_frames_with_a_distractor(frames, monkeypatch, tmp_path):
    torch.manual_seed(1)
    start = policies.load_policy("pi05-tiny")
    start.save(tmp_path / "start")
    alone = {k: v.clone() for k, v in frames.items()}
    alone["object_ids"][:, 1:] = -1
    seen, sft_loss = [], type(start).sft_loss

    def watch(policy, batch, names, unit, *prompt, **options):
        if not prompt:  # no question: cloning
            seen.append((batch["object_ids"][:, 1] >= 0).float().mean().item())
        return sft_loss(policy, batch, names, unit, *prompt, **options)

    monkeypatch.setattr(type(start), "sft_loss", watch)
    budget = dict(pretrain_steps=0, clone_steps=2, batch_size=8, learning_rate=1e-9)
    args = sft.preset("pi05-tiny", checkpoint=str(tmp_path / "start"), mixed_share=0.25, **budget)
    policy, _ = sft.warm_up(args, alone, alone, alone, frames)
    assert seen == [0.25, 0.25, 0]  # two steps, the held-out loss
    for before, after in zip(start.parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close(before, after, rtol=0, atol=1e-6)


def test_pointing_loss_is_least_on_the_object_that_was_asked_for(frames):
    torch.manual_seed(0)
    asked, _ = sft.grounding_answers(frames, builtin.PACK)
    patches = sft.tiles(frames["classes"], 36)
    share = torch.tensor(
        [[(patch == 1 + x).float().mean() for patch in row] for row, x in zip(patches, asked)]
    )
    right = share / share.sum(1, keepdim=True).clamp(min=1e-9)
    uniform = torch.full((len(asked), 2, 2, 36), 1 / 36).log()
    there = right.clamp(min=1e-9).log()[:, None, None].expand(-1, 2, 2, -1)
    entropy = -(right * right.clamp(min=1e-9).log()).sum(1).mean()
    torch.testing.assert_close(sft.pointing_loss(there, frames["classes"], asked), entropy)
    seen = (right.sum(1) > 0).float().mean()
    expected = seen * np.log(36)
    torch.testing.assert_close(sft.pointing_loss(uniform, frames["classes"], asked), expected)
    both = torch.cat([there, uniform])  # two noises for each frame
    torch.testing.assert_close(
        sft.pointing_loss(both, frames["classes"], asked), (entropy + expected) / 2
    )


def test_a_few_steps_learn_the_frames_by_heart(frames, policy):
    torch.manual_seed(0)
    batch = {k: v[:8] for k, v in frames.items()}
    tasks = [f"put {NAMES[i]} on plate" for i in batch["object_ids"][:, 0].tolist()]
    losses = []

    def loss():
        losses.append(
            policy.sft_loss(batch, tasks, policy.to_unit(batch["chunk"]), sigma=1.0, jitter=0.0)
        )
        return dict(cloning=losses[-1])

    sft.train(policy, 40, sft.Args(), "test", loss)
    assert losses[-1] < 0.7 * losses[0]


def test_alignment_prefers_patches_that_carry_their_name(policy, frames):
    batch = {k: v[:4] for k, v in frames.items()}
    table = policy.word_embeddings()
    words = torch.stack(
        [table[policy.tokenize([name], "{instruction}")[0][0, 1:]].mean(0) for name in NAMES]
    )
    classes = batch["classes"].view(4, 6, 4, 6, 4).permute(0, 1, 3, 2, 4).reshape(4, 36, 16).long()
    right = torch.zeros(4, 36, 128)
    for b in range(4):
        for n in range(36):
            for c in range(1, 26):
                right[b, n] += words[c - 1] * ((classes[b, n] == c).sum() >= 2)
    scale = torch.tensor([2.5, -8.0])
    good = sft.alignment_loss(policy, right, batch["classes"], NAMES, scale)
    bad = sft.alignment_loss(policy, right.roll(7, dims=1), batch["classes"], NAMES, scale)
    assert good < bad


def test_a_big_backbone_is_refused():
    with pytest.raises(Fault, match="openvla-tiny.*come with a checkpoint"):
        sft.preset("openvla")


def test_a_rate_falls_unless_it_is_held(monkeypatch):
    rates, args = [], sft.preset("openvla-flat")
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self: rates.append(self.param_groups[0]["lr"])
    )
    for hold_rate in (True, False):
        policy = torch.nn.Linear(1, 1)
        loss = lambda: dict(all=policy(torch.ones(1)).sum())  # noqa: B023, E731
        sft.train(policy, 200, args, "name", loss, hold_rate=hold_rate)
    held, falls = rates[:200], rates[200:]
    assert held[:100] == pytest.approx([args.learning_rate * (i + 1) / 100 for i in range(100)])
    assert held[100:] == pytest.approx([args.learning_rate] * 100)
    assert falls[100] == pytest.approx(0.51 * args.learning_rate)
    assert falls[199] == pytest.approx(0.02 * args.learning_rate, rel=0.01)
