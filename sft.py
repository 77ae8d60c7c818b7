"""A warm start from nothing: what pretraining and supervised fine-tuning do for the big
checkpoints, this file does for a small backbone.

    python sft.py                             # scenes, demonstrations, training -> runs/sft
    python sft.py --backbone openvla-flat     # a token policy, in Flatland

Stage 1 stands in for internet data: where is every object (segmentation of the towers' patches) and
"where is X?" (grounding, answered with the very seven numbers that actions are written in, and
pointing, the attention that such an answer needs). Its labels are free in the simulator. Stage 2 is
behaviour cloning of a scripted oracle that reads privileged state and acts through the same 7-D
actions.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import policies
import runtime
from envs import find_pack, make_envs
from runtime import Fault, episode_ids, whole_directory

# A token of OpenVLA sees the words before it alone. So the question has to begin as the task does:
# what those words have found then serves both. In pi's prefix every patch sees every word.
ASK_AS_A_TASK = "put {instruction} on plate where <out>"
ASK = "where is the {instruction} <out>"


@dataclass
class Args:
    backbone: str = "pi05-tiny"
    """a small backbone: the big ones come with their own warm start. It chooses the defaults"""
    checkpoint: str | None = None
    """a start to go on from, for example with --pretrain-steps 0 (default: new weights)"""
    out: str = "runs/sft"
    """where the checkpoint goes"""
    assets: str = "builtin"
    """asset pack: builtin, or flat (no simulator)"""
    seed: int = 0
    """of weights, noise and order; the episodes are the same for all"""
    scenes: int = 1000
    """episodes with four distractors for pretraining"""
    demos: int = 2400
    """scripted episodes without a distractor (A.1) for behaviour cloning; those that fail are left
    out"""
    pretrain_steps: int = 900
    """optimizer steps of segmentation and grounding"""
    clone_steps: int = 3600
    """optimizer steps of behaviour cloning"""
    mixed_share: float = 0.0
    """share of the frames of behaviour cloning that have a distractor (A.1 has none)"""
    astray: float = 0.4
    """share of the demonstrations in which the hand first goes to another place, as after a mistake
    of the policy; flat: share of the moves of a demonstration that are random"""
    grounding: bool = True
    """both stages ask where things are"""
    pointing: bool = True
    """with grounding: attention learns to look at the object that was asked for"""
    question: str = ASK_AS_A_TASK
    """the words in which they ask; {instruction} is the object's name"""
    keep_seeing: bool = False
    """segmentation and alignment go on in behaviour cloning"""
    batch_size: int = 64
    """frames per optimizer step"""
    learning_rate: float = 1.4e-3
    """peak of AdamW's learning rate; in each stage linear warm-up over 100 steps, cosine to 2 %"""
    hold_rate: bool = False
    """pretraining stays at its peak rate: what comes next starts at that rate anyway"""


FLAT = dict(assets="flat", scenes=4096, demos=8192, astray=0.35, clone_steps=2000,
            keep_seeing=True, hold_rate=True)  # fmt: skip
DEFAULTS = {"openvla-tiny": dict(clone_steps=3000),
            "pi05-tiny": dict(question=ASK, pointing=False),
            "openvla-flat": FLAT | dict(pretrain_steps=2000, learning_rate=4e-3),
            "pi05-flat": FLAT | dict(pretrain_steps=800, clone_steps=1700, learning_rate=3e-3,
                                     question=ASK)}  # fmt: skip


RANGES = {
    "at least 0": "pretrain_steps",
    "at least 1": "scenes demos clone_steps",
    "at least 2": "batch_size",
    "above 0": "learning_rate",
    "0 to 1": "astray mixed_share",
    "0 to 2147483647": "seed",
}


def preset(backbone: str = "pi05-tiny", **changes) -> Args:
    """The Args of a backbone, with `changes`."""
    if backbone not in DEFAULTS:
        raise Fault(
            f"--backbone {backbone}: sft.py warm-starts {', '.join(DEFAULTS)};"
            " the big ones come with a checkpoint"
        )
    return Args(**{"backbone": backbone} | DEFAULTS[backbone] | changes)


def go_astray(env, xy, steps: int) -> None:
    """The hand goes to `xy` (metres), closes on nothing and goes on to the plate: `steps` steps.

    A policy that takes the wrong object has the hand there, and what it would do at o_pre, where
    that object is gone, is what Eq. (2) teaches. So the demonstrations have to begin there, too.
    """
    pack, plate = env.pack, env.plate_entity.pose.p[:2]
    (_, _, middle), (_, _, half) = pack.workspace
    low, high = middle - 0.65 * half, middle + 0.15 * half
    way = [(*xy, high, 1), (*xy, low, 1), (*xy, low, -1), (*xy, high, -1), (*plate, high, -1)]
    to_base = pack.base_pose.inv().to_transformation_matrix()[:3, :3]
    for _ in range(steps):
        *point, gripper = way[0]
        move = np.clip(
            to_base @ (point - env.tcp_entity.pose.p), -pack.largest_move, pack.largest_move
        )
        env.step(np.array([*move, 0, 0, 0, gripper], np.float32))
        if len(way) > 1 and np.linalg.norm(point - env.tcp_entity.pose.p) < 0.025:
            way.pop(0)


def collect(
    environments, split: str, episode_ids, noise: float, rate: float, seed: int, astray: float = 0.0
):
    """Runs in a worker: one scripted episode per id -> a list of dicts of arrays, T frames each.

    rgb (T, H, W, 3) uint8, classes (T, H/4, W/4) uint8 (what is in every fourth pixel: 0 table,
    then the pack's objects, the plate, the robot), action (T, 7) the oracle's float32, where
    (T, 2, 3) metres of plate and tcp, objects (k,) indices, object_xyz (T, k, 3) metres (target
    first), success bool.
    The arm is disturbed by `noise` (a std in units of the largest step) in a fraction `rate` of the
    steps, and the label stays the oracle's, so the data shows how to recover. A share `astray` of
    the episodes begins where `go_astray` has left the hand.
    """
    env, pack, episodes = environments[0], environments[0].pack, []
    for episode_id in episode_ids:
        rng = np.random.default_rng([seed, episode_id])
        env.reset(seed=0, options=dict(episodes=[env.sample(episode_id, split)]))
        if astray and rng.random() < astray:
            go_astray(env, env.sample(episode_id, "train").distractor_xy[0], rng.integers(1, 16))
        ids = [env.episode.target, *env.episode.distractors]
        lut = np.zeros(1024, np.uint8)
        for i, actor in enumerate(env.objects):
            lut[actor._objs[0].per_scene_id] = 1 + i
        lut[env.plate_entity.per_scene_id] = len(env.objects) + 1
        lut[[link.per_scene_id for link in env.links]] = len(env.objects) + 2
        frames, after = {k: [] for k in ("rgb", "classes", "action", "where", "object_xyz")}, 0
        for _ in range(pack.max_episode_steps):
            rgb, seg = env.picture()
            action = pack.oracle(env)
            frames["rgb"].append(rgb.copy())
            frames["classes"].append(lut[seg[2::4, 2::4]])
            frames["action"].append(action)
            frames["where"].append([env.plate_entity.pose.p, env.tcp_entity.pose.p])
            frames["object_xyz"].append([env.objects[i]._objs[0].pose.p for i in ids])
            after += env.success
            if after > 3:
                break
            disturbed = action.copy()
            if rng.random() < rate:
                disturbed[:3] += rng.normal(0, noise * pack.largest_move, 3)
                disturbed[5] += rng.normal(0, noise * pack.largest_turn)
            env.step(disturbed)
        episode = {k: np.array(v) for k, v in frames.items()}
        success = bool(env.success)
        episodes.append(dict(episode, objects=np.array(ids), id=episode_id, success=success))
    return episodes


def collect_flat(
    vec, split: str, ids: range, noise: float, rate: float, seed: int, astray: float = 0.0
) -> list[dict]:
    """`collect` in Flatland, where all environments play at once. In `classes` is every second
    pixel. A share `astray` of the moves goes anywhere: a policy that errs has the hand anywhere,
    and what it would do at o_pre is what Eq. (2) teaches."""
    episodes, pack = [], vec.pack
    for start in range(0, len(ids), vec.num_envs):
        part = list(ids[start : start + vec.num_envs])
        obs = vec.reset(part + part[:1] * (vec.num_envs - len(part)), split)
        rng = np.random.default_rng([seed, part[0]])
        frames, done = [], torch.zeros(1)
        while not done.all():
            action, labels = vec.oracle(), vec.labels()
            seen = dict(rgb=obs["rgb"].numpy(), action=action[:, 0].numpy())
            frames.append(seen | labels)
            moved = rng.random((vec.num_envs, 1, 1)) < rate
            moved = moved * rng.normal(0, noise * pack.largest_move, action.shape)
            lost = rng.random((vec.num_envs, 1, 1)) < astray
            anywhere = rng.uniform(-1, 1, action.shape) * pack.largest_move
            moved = np.where(lost, anywhere, action.numpy() + moved)
            obs, _, done, _ = vec.step(torch.from_numpy(moved).float())
        for i, episode_id in enumerate(part):
            e = {name: np.stack([frame[name][i] for frame in frames]) for name in frames[0]}
            e |= dict(objects=e["objects"][0], success=True)  # the labels are right anyway
            episodes.append(dict(e, id=episode_id))
    return episodes


def frames_of(episodes: list[dict], horizon: int) -> dict[str, torch.Tensor]:
    """Episodes of `collect` -> N frames: rgb, classes, action, where as there; object_ids (N, 5)
    padded with -1, object_xyz (N, 5, 3), chunk (N, horizon, 7): the actions from this frame on, the
    episode's last one repeated."""
    parts = []
    for e in episodes:
        n, absent = len(e["action"]), 5 - len(e["objects"])
        ahead = np.minimum(np.arange(n)[:, None] + np.arange(horizon), n - 1)  # (T, horizon)
        parts.append(
            dict(
                rgb=e["rgb"],
                classes=e["classes"],
                action=e["action"],
                where=np.float32(e["where"]),
                chunk=e["action"][ahead],
                object_ids=np.tile(np.pad(e["objects"], (0, absent), constant_values=-1), (n, 1)),
                object_xyz=np.float32(np.pad(e["object_xyz"], ((0, 0), (0, absent), (0, 0)))),
            )
        )
    return {k: torch.from_numpy(np.concatenate([part[k] for part in parts])) for k in parts[0]}


def segmentation_loss(features, classes, head: nn.Linear) -> torch.Tensor:
    """Cross-entropy of the labels `classes` (B, H, W), read linearly from the towers' patches
    (B, n, D)."""
    labels = tiles(classes, features.shape[1])  # (B, n, labels of a patch)
    logits = head(features).unflatten(-1, (-1, labels.shape[2])).movedim(2, 1)  # (B, kinds, n, ...)
    weight = torch.ones(logits.shape[1], device=logits.device)
    weight[0] = 0.2  # most pixels are table
    return F.cross_entropy(logits, labels.long(), weight)


def alignment_loss(policy, patches, classes, names, scale) -> torch.Tensor:
    """Is object j in patch i? A sigmoid on the cosine between the projected patch (B, n, H) and the
    embedding of the object's name, as SigLIP aligns whole images with captions. Llama can then look
    for a word among the patches."""
    ids, mask = policy.tokenize(names, "{instruction}")
    mask = mask[:, 1:, None].to(ids.device)  # without BOS
    words = (policy.word_embeddings()[ids[:, 1:]] * mask).sum(1) / mask.sum(1)  # (names, H)
    logits = (
        F.normalize(patches, dim=-1) @ F.normalize(words, dim=-1).T * scale[0].exp() + scale[1]
    )  # (B, n, names)
    labels = tiles(classes, patches.shape[1])
    present = F.one_hot(labels.long(), len(names) + 3).sum(2)[..., 1:-2] >= 2
    return (
        F.binary_cross_entropy_with_logits(logits, present.float(), reduction="none").sum(-1).mean()
    )


def grounding_answers(batch, pack):
    """Of a random object X in each frame -> the index of X (B,), and the answers (B, 1, 7) to
    "where is X?" in [-1, 1], as the pack gives them."""
    present = (batch["object_ids"] >= 0).float()
    pick = torch.multinomial(present, 1)
    xyz = batch["object_xyz"].gather(1, pick[..., None].expand(-1, -1, 3))  # (B, 1, 3)
    places = torch.cat([xyz, batch["where"]], 1)  # (B, 3, 3): object, plate, hand
    answers = pack.answers(places)[:, None]
    return batch["object_ids"].gather(1, pick)[:, 0], answers


def tiles(classes, patches: int) -> torch.Tensor:
    """Labels (B, H, W) -> (B, patches, labels of a patch)."""
    side = int(patches**0.5)
    cells = classes.shape[1] // side
    tiles = classes.view(-1, side, cells, side, cells).permute(0, 1, 3, 2, 4)
    return tiles.reshape(-1, patches, cells**2)


def pointing_loss(looks, classes, asked) -> torch.Tensor:
    """Cross-entropy of the patches that are looked at, log-probs (k B, heads, m, n) for k noises,
    against those in which the object that was asked for lies, of B frames."""
    lies = (tiles(classes, looks.shape[-1]) == 1 + asked[:, None, None]).float().sum(-1)  # (B, n)
    lies = lies.repeat(len(looks) // len(lies), 1)
    seen = lies.sum(1, keepdim=True)  # some are out of sight
    return -(lies / seen.clamp(min=1))[:, None, None].mul(looks).sum(-1).mean()


def train(policy, steps: int, args: Args, name: str, losses, heads=(), hold_rate=False):
    """AdamW on sum(losses().values()) for `steps` steps, with a progress bar that shows each loss
    (running mean)."""
    parameters = [*policy.parameters(), *heads]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.98), fused=True)
    last = np.inf if hold_rate else steps  # where the cosine ends
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min(1.0, (s + 1) / 100) * (0.02 + 0.49 * (1 + np.cos(np.pi * s / last))),
    )
    means = {}
    policy.train()
    bar = tqdm(range(steps), desc=name)
    for step in bar:
        loss = losses()
        sum(loss.values()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 20 == 0:
            means = {
                k: 0.8 * means[k] + 0.2 * v.item() if means else v.item() for k, v in loss.items()
            }
            bar.set_postfix({k: f"{v:.3f}" for k, v in means.items()})
    policy.eval()


def warm_up(args: Args, pretraining: dict, demos: dict, held_out: dict, mixed: dict | None = None):
    """Both stages on frames of `frames_of` -> policy, report (held-out behaviour-cloning loss and
    error of its argmax). mixed: of demonstrations with a distractor, for --mixed-share."""
    torch.manual_seed(args.seed)
    policy = policies.load_policy(args.backbone, args.checkpoint)
    pack = find_pack(args.assets)
    # Of the towers and the projector in the last forward pass: read here without a second pass
    features = []
    hooks = [
        part.register_forward_hook(lambda _, __, out: features.append(out))
        for part in policy.vision_parts()
    ]
    # Of the alignment: log inverse temperature, bias
    scale = nn.Parameter(torch.tensor([1.5, -4.0]))

    def sample(frames, n):
        inds = torch.randint(len(frames["rgb"]), (n,))
        return {k: v[inds] for k, v in frames.items()}

    def either():
        return pretraining if torch.rand(()) < 0.6 else demos

    def grounding(batch):
        asked, answers = grounding_answers(batch, pack)
        names, looks = [pack.names[i] for i in asked.tolist()], []
        watching = policy.watch_pointing(looks.append) if args.pointing else []
        losses = dict(grounding=policy.sft_loss(batch, names, answers, args.question))
        for hook in watching:  # cloning has no use for it
            hook.remove()
        for look in looks:
            losses["pointing"] = 0.5 * pointing_loss(look, batch["classes"], asked)
        return losses

    def tasks(batch):
        return [f"put {pack.names[i]} on plate" for i in batch["object_ids"][:, 0].tolist()]

    def cloning(batch, **options):
        return policy.sft_loss(batch, tasks(batch), policy.to_unit(batch["chunk"]), **options)

    def seeing(batch):
        """Losses on the features of the last forward pass."""
        classes = batch["classes"]
        alignment = alignment_loss(policy, features[-1], classes, pack.names, scale)
        segmentation = segmentation_loss(torch.cat(features[:-1], -1), classes, head)
        return dict(segmentation=segmentation, alignment=2 * alignment)

    def stage_1():
        features.clear()
        batch, losses = sample(either(), args.batch_size), {}
        if args.grounding:
            losses |= grounding(batch)
        else:
            policy.look(batch["rgb"])
        return losses | seeing(batch)

    def stage_2():
        features.clear()
        others = round(args.mixed_share * args.batch_size)
        batch = sample(demos, args.batch_size - others)
        if others:
            added = sample(mixed, others)
            batch = {k: torch.cat([v, added[k]]) for k, v in batch.items()}
        losses = dict(cloning=cloning(batch))
        if args.keep_seeing:
            losses |= seeing(batch)
        if args.grounding:
            asked = grounding(sample(either(), args.batch_size // 2))
            losses |= {name: 0.7 * loss for name, loss in asked.items()}
        return losses

    batch = sample(pretraining, 1)
    policy.look(batch["rgb"])
    head = nn.Linear(
        sum(f.shape[-1] for f in features[:-1]),
        (len(pack.names) + 3) * batch["classes"][0].numel() // features[0].shape[1],
    )
    heads = [*head.parameters(), scale]
    if args.pretrain_steps:
        train(policy, args.pretrain_steps, args, "pretraining", stage_1, heads, args.hold_rate)
    train(policy, args.clone_steps, args, "behaviour cloning", stage_2, heads)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        batch = sample(held_out, 512)
        acted = policy.act(batch, tasks(batch), temperature=0).actions[:, 0]
        report = dict(
            cloning_loss=cloning(batch, jitter=0.0).item(),
            error=(acted - batch["action"]).abs().mean(0).tolist(),
            error_of_zero=batch["action"].abs().mean(0).tolist(),
        )
    return policy, report


def collect_parallel(vec, split: str, ids: range, *how) -> list[dict]:
    """`collect` spread over the workers, with a progress bar. how: its last arguments."""
    episodes, bar = [], tqdm(total=len(ids), desc=f"episodes ({split})")
    for start in range(0, len(ids), 16 * vec.num_workers):
        part = ids[start : start + 16 * vec.num_workers]
        tasks = [(split, part[i :: vec.num_workers], *how) for i in range(vec.num_workers)]
        for done in vec.map(collect, *tasks):
            episodes += done
        bar.update(len(part))
        bar.set_postfix(success=f"{np.mean([e['success'] for e in episodes]):.2f}")
    bar.close()
    return sorted(episodes, key=lambda e: e["id"])  # whatever the number of cores


def is_start(out: Path) -> bool:
    """A warm start may be made again in its folder."""
    files = ("config.json", "args.json", "SHA256SUMS")
    return all((out / file).is_file() for file in files) and not runtime.is_checkpoint(out)


def main(args: Args):
    out = Path(args.out)
    runtime.check_ranges(args, RANGES)
    runtime.check_empty(out, former=is_start)
    with runtime.writing_to(out):
        tempfile.TemporaryFile(dir=out.parent).close()
    start = policies.load_policy(args.backbone, args.checkpoint)
    flat = args.assets == "flat"
    gather = collect_flat if flat else collect_parallel
    with make_envs(256 if flat else 2, args.assets, image_size=start.image_size) as vec:
        ids = episode_ids("scenes", 0, 0, args.scenes)
        scenes = gather(vec, "busy", ids, 0.5, 0.5, args.seed)
        # A chunk's later labels answer disturbances that its frame does not show, so a policy that
        # acts in chunks gets fewer.
        how = (0.25, 1 / max(2, start.horizon), args.seed, args.astray)
        demos = [
            gather(vec, "bare", episode_ids("demos", 0, 0, args.demos), *how),
            gather(vec, "bare", episode_ids("held-out demos", 0, 0, 64), *how),
        ]
        if args.mixed_share:
            ids = episode_ids("demos", 0, args.demos, args.demos // 8 or 1)
            demos.append(gather(vec, "train", ids, *how))
    demos = ([e for e in episodes if e["success"]] for episodes in demos)
    policy, report = warm_up(
        args, *(frames_of(episodes, start.horizon) for episodes in (scenes, *demos))
    )
    print(json.dumps(report))
    with whole_directory(out) as partial:
        policy.save(partial, dtype=torch.float16)
        (partial / "args.json").write_text(json.dumps(dict(vars(args), report=report), indent=2))
    print(f"warm start saved in {out}")


if __name__ == "__main__":
    import sft  # the workers import `collect`, which they could not from __main__

    runtime.command_line(lambda: sft.main(runtime.parse(sft.Args, sft.preset)))
