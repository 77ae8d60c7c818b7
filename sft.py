"""Warm start: what pretraining and supervised fine-tuning do for the big checkpoints, for a tiny backbone, from nothing.

    python sft.py                                       # scenes, demonstrations, two stages of training -> runs/sft
    python sft.py --clone-steps 400 --out runs/weak     # a deliberately weak start, for studying PPO

Stage 1 stands in for internet data: where is every object (segmentation of the towers' patches) and "where is X?"
(grounding, answered with the very seven numbers that actions are written in). Its labels are free in the simulator.
Stage 2 is behaviour cloning of a scripted oracle that reads privileged state and acts through the same 7-D actions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sapien
import torch
import torch.nn.functional as F
import trimesh
import tyro
from sapien.physx import PhysxRigidDynamicComponent
from torch import nn
from tqdm import tqdm
from transforms3d.axangles import axangle2mat, mat2axangle
from transforms3d.euler import mat2euler

import envs
import policies


@dataclass
class Args:
    backbone: str = "openvla-tiny"
    """a tiny backbone: the big ones come with their own warm start"""
    out: str = "runs/sft"
    """where the checkpoint goes"""
    seed: int = 0
    """seed of everything"""
    scenes: int = 1200
    """episodes with four distractors for pretraining"""
    demos: int = 3000
    """scripted episodes for behaviour cloning, half without a distractor; those that fail are left out"""
    pretrain_steps: int = 900
    """optimizer steps of segmentation and grounding"""
    clone_steps: int = 3500
    """optimizer steps of behaviour cloning (with grounding kept up)"""
    batch_size: int = 64
    """frames per optimizer step"""
    learning_rate: float = 1.4e-3
    """peak of AdamW's learning rate; linear warm-up over 100 steps, cosine to 2 %"""


STEP, TURN = 0.06, 0.8  # largest move of one control step: metres, radians
GROUND_CENTER, GROUND_SCALE = np.array([*envs.CENTER, envs.TABLE_Z + 0.1]), np.array([0.25, 0.25, 0.12])


def oracle(env: envs.PutOnPlate) -> np.ndarray:
    """One action (7,) float32 from privileged state: reach, turn, descend, close, lift, carry, lower, let go.

    Stateless: every phase is decided from what the scene looks like now, so a policy that sees one frame can copy it.
    """
    if env.pack.name == "rl4vla":
        return oracle_widowx(env)
    tcp, target, plate = env.tcp_entity.pose.p, env.target_entity.pose.p, env.plate_entity.pose.p
    half = env.target_half_z
    move, turn, gripper = np.zeros(3), 0.0, 1.0
    if env.success:  # done: let go, then rise (both at once would fling the object away)
        if not env.grasped:
            move[2] = envs.TABLE_Z + 0.15 - tcp[2]
    elif env.grasped:
        gripper = -1.0
        bottom, to_plate = target[2] - half, plate[:2] - target[:2]
        if np.linalg.norm(to_plate) > 0.03:
            move[2] = envs.TABLE_Z + 0.035 - bottom
            if bottom > envs.TABLE_Z + 0.015:
                move[:2] = to_plate
        else:
            move[:] = (*to_plate, envs.TABLE_Z + 0.010 - bottom)
    else:
        grasp_z = max(
            target[2] - 0.2 * half, envs.TABLE_Z + 0.019
        )  # lower, and the fingertips would press on the table
        hover_z = envs.TABLE_Z + 2 * half + 0.055
        offset, turn = target[:2] - tcp[:2], grasp_turn(env)
        move[:2] = offset
        if np.linalg.norm(offset) > 0.02 or turn:
            move[2] = max(hover_z - tcp[2], -0.05 if np.linalg.norm(offset) > 0.05 else -STEP)
        elif tcp[2] - grasp_z > 0.01:
            move[2] = grasp_z - tcp[2]
        else:
            move[:], turn, gripper = 0, 0, -1.0
    move[:2] *= min(1.0, STEP / max(np.linalg.norm(move[:2]), 1e-9))
    move = env.pack.base_pose.inv().to_transformation_matrix()[:3, :3] @ move  # world -> the robot's base frame
    return np.array([*np.clip(move, -STEP, STEP), 0, 0, np.clip(turn, -TURN, TURN), gripper], np.float32)


def oracle_widowx(env: envs.PutOnPlate) -> np.ndarray:
    """The same phases for the pack `rl4vla`: scanned objects, a hand that must be kept upright, a gripper that opens 5 cm.

    Deltas are counted from the commanded pose, as the controller counts them.
    """
    command = env.pack.base_pose * env.agent.controller.controllers["arm"]._target_pose.sp
    tcp, target, plate = env.tcp_entity.pose, env.target_entity.pose, env.plate_entity.pose.p
    opening = float(env.agent.robot._objs[0].qpos[-1])  # metres, 0.014 closed to 0.038
    points = surface(env) @ target.to_transformation_matrix()[:3, :3].T + target.p
    bottom, top = points[:, 2].min(), points[:, 2].max()
    carried = opening < 0.033 and bottom > envs.TABLE_Z + 0.012 and np.linalg.norm(points - tcp.p, axis=1).min() < 0.02
    over_plate = np.linalg.norm(target.p[:2] - plate[:2])
    low = bottom < envs.TABLE_Z + 0.022 and over_plate < (0.03 if env.grasped else 0.05)
    placed = env.success or (low and tcp.p[2] < envs.TABLE_Z + 0.14)
    goal, turn, gripper = command.p.copy(), None, 1.0
    if placed:
        if opening > 0.035:
            goal[2] = envs.TABLE_Z + 0.15
    elif env.grasped or carried:
        gripper = -1.0
        if over_plate > (0.015 if bottom > envs.TABLE_Z + 0.05 else 0.03):
            goal[2] += envs.TABLE_Z + 0.07 - bottom
            if bottom > envs.TABLE_Z + 0.045:
                goal[:2] += plate[:2] - target.p[:2]
        else:
            goal[2] += envs.TABLE_Z + 0.014 - bottom
    else:
        grasp, yaw = grasp_widowx(env, points, bottom, top)
        turn = upright(yaw) @ command.to_transformation_matrix()[:3, :3].T
        near = np.linalg.norm(grasp - command.p)
        aligned = np.linalg.norm((grasp - command.p)[:2]) < 0.008 and rotation_vector(turn)[1] < 0.08
        if near < (0.006 if opening > 0.035 else 0.025) and opening > 0.0155:
            goal, turn, gripper = command.p, None, -1.0
        else:
            goal = grasp.copy()
            if not aligned:
                goal[2] = max(grasp[2] + 0.07, envs.TABLE_Z + 0.10)
    move = goal - command.p
    move *= min(1.0, 0.03 / max(np.linalg.norm(move), 1e-9))
    to_base = env.pack.base_pose.inv().to_transformation_matrix()[:3, :3]
    angles = np.zeros(3)
    if turn is not None:
        axis, angle = rotation_vector(turn)
        small = axangle2mat(axis, min(angle, 0.35))
        angles = mat2euler(to_base @ small @ to_base.T, "rxyz")
    return np.array([*(to_base @ move), *angles, gripper], np.float32)


def rotation_vector(rotation) -> tuple[np.ndarray, float]:
    axis, angle = mat2axangle(rotation)
    return (axis, angle) if angle >= 0 else (-axis, -angle)


def upright(yaw: float) -> np.ndarray:
    """(3, 3): the WidowX's hand looks down (its x axis) and closes along the direction `yaw` (its y axis)."""
    down, close = np.array([0, 0, -1.0]), np.array([np.cos(yaw), np.sin(yaw), 0])
    return np.stack([down, close, np.cross(down, close)], 1)


SURFACES = {}  # index in the pack rl4vla -> surface()


def surface(env: envs.PutOnPlate) -> np.ndarray:
    """(1500, 3) metres: points on the target's collision shapes, in its own frame."""
    i = env.episode.target
    if i not in SURFACES:
        shapes = env.target_entity.find_component_by_type(PhysxRigidDynamicComponent).collision_shapes
        parts = [trimesh.Trimesh(shape.vertices * shape.scale, shape.triangles) for shape in shapes]
        SURFACES[i] = trimesh.sample.sample_surface(trimesh.util.concatenate(parts), 1500, seed=0)[0]
    return SURFACES[i]


def grasp_widowx(env, points, bottom, top) -> tuple[np.ndarray, float]:
    """Where the hand should close and along which yaw: narrow and parallel faces near the centre of mass."""
    body = env.target_entity.find_component_by_type(PhysxRigidDynamicComponent)
    middle = (env.target_entity.pose * body.cmass_local_pose).p[:2]
    # The fingertips are 1.56 cm below the hand (its middle is the ee_gripper_link), the gripper bar is 2.1 cm above it.
    z = max(min((top + bottom) / 2, top - 0.004), envs.TABLE_Z + 0.017, top - 0.019)
    slab = points[np.abs(points[:, 2] - z) < 0.0155, :2] - middle
    axis = env.tcp_entity.pose.to_transformation_matrix()[:2, 1]
    now = np.arctan2(axis[1], axis[0])
    best, found = np.inf, None
    for yaw in np.deg2rad(np.arange(0, 180, 7.5)):
        close, side = np.array([np.cos(yaw), np.sin(yaw)]), np.array([-np.sin(yaw), np.cos(yaw)])
        u, v = slab @ close, slab @ side
        turn = (yaw - now + np.pi / 2) % np.pi - np.pi / 2
        for shift in np.arange(-0.03, 0.031, 0.0075):
            left, right = (np.abs(v - shift + d) < 0.0045 for d in (0.0045, -0.0045))
            if left.sum() < 3 or right.sum() < 3:
                continue
            ends = np.array([[u[half].min(), u[half].max()] for half in (left, right)])
            low, high = ends[:, 0].min(), ends[:, 1].max()
            slope = np.abs(ends[0] - ends[1]).sum()  # of faces that are not parallel the object is squeezed out
            cost = 2.5 * slope + 2 * max(high - low - 0.02, 0) + 0.8 * np.hypot((low + high) / 2, shift) + 0.02 * abs(turn)
            cost += 10 * (high - low > 0.05) + (high - low < 0.013)  # the gripper's opening, and its gap when closed
            if cost < best:
                best, found = cost, ((low + high) / 2 * close + shift * side, now + turn)
    offset, yaw = found
    return np.array([*(middle + offset), z]), yaw


def grasp_turn(env: envs.PutOnPlate) -> float:
    """Signed angle in radians that the hand should turn about the vertical: 0 unless a long target lies along the fingers.

    Closing fingers straighten by themselves what lies askew. A hand kept square to the target at every step would be a
    label that a policy cannot read off 96 pixels: it hovers.
    """
    if envs.OBJECTS[env.episode.target][1] != "long":
        return 0.0
    error = _yaw(env.target_entity.pose) - _yaw(env.tcp_entity.pose)
    error = (error + np.pi / 2 - 1e-4) % np.pi - np.pi / 2 + 1e-4
    return error if abs(error) > 0.9 else 0.0


def _yaw(pose: sapien.Pose) -> float:
    x_axis = pose.to_transformation_matrix()[:2, 0]
    return float(np.arctan2(x_axis[1], x_axis[0]))


def collect(environments, split: str, episode_ids, noise: float, seed: int):
    """Runs in a worker: one scripted episode per id -> a list of dicts of arrays, T frames each.

    rgb (T, H, W, 3) uint8, classes (T, H/4, W/4) uint8 (what is in every fourth pixel: 0 table, 1-25 object, 26 plate,
    27 robot), action (T, 7) the oracle's float32, where (T, 2, 3) metres of plate and tcp, objects (k,) indices,
    object_xyz (T, k, 3) metres (target first), success bool. With `noise` the arm is disturbed (in units of the largest
    step) and the label stays the oracle's, so the data shows how to recover.
    """
    env, episodes = environments[0], []
    for episode_id in episode_ids:
        rng = np.random.default_rng([seed, episode_id])
        env.reset(seed=0, options=dict(episode_ids=[episode_id], split=split))
        ids = [env.episode.target, *env.episode.distractors]
        lut = np.zeros(1024, np.uint8)
        for i, actor in enumerate(env.objects):
            lut[actor._objs[0].per_scene_id] = 1 + i
        lut[env.plate_entity.per_scene_id] = 26
        lut[[link.per_scene_id for link in env.links]] = 27
        frames, after = {k: [] for k in ("rgb", "classes", "action", "where", "object_xyz")}, 0
        for _ in range(env.pack.max_episode_steps):
            rgb, seg = env.picture()
            action = oracle(env)
            frames["rgb"].append(rgb.copy())
            frames["classes"].append(lut[seg[2::4, 2::4]])
            frames["action"].append(action)
            frames["where"].append([env.plate_entity.pose.p, env.tcp_entity.pose.p])
            frames["object_xyz"].append([env.objects[i]._objs[0].pose.p for i in ids])
            after += env.success
            if after > 3:
                break
            disturbed = action.copy()
            if noise and rng.random() < 0.5:
                disturbed[:3] += rng.normal(0, noise * STEP, 3)
                disturbed[5] += rng.normal(0, noise * TURN)
            env.step(disturbed)
        episode = {k: np.array(v) for k, v in frames.items()}
        episodes.append(dict(episode, objects=np.array(ids), episode_id=episode_id, success=env.success))
    return episodes


def flatten(episodes: list[dict], horizon: int) -> dict[str, torch.Tensor]:
    """Episodes of `collect` -> frames: rgb, classes, action, where as there; object_ids (N, 5) padded with -1,
    object_xyz (N, 5, 3),
    chunk (N, horizon, 7): the actions from this frame on, the episode's last one repeated."""
    frames = {
        k: torch.from_numpy(np.concatenate([e[k] for e in episodes])) for k in ("rgb", "classes", "action", "where")
    }
    lengths = [len(e["action"]) for e in episodes]
    steps = [np.minimum(np.arange(n)[:, None] + np.arange(horizon), n - 1) for n in lengths]  # (T, horizon)
    frames["chunk"] = torch.from_numpy(np.concatenate([e["action"][i] for e, i in zip(episodes, steps)]))
    frames["object_ids"] = torch.full((sum(lengths), 5), -1)
    frames["object_xyz"] = torch.zeros(sum(lengths), 5, 3)
    start = 0
    for e, n in zip(episodes, lengths):
        frames["object_ids"][start : start + n, : len(e["objects"])] = torch.from_numpy(e["objects"])
        frames["object_xyz"][start : start + n, : len(e["objects"])] = torch.from_numpy(e["object_xyz"])
        start += n
    frames["where"] = frames["where"].float()
    return frames


def segmentation_loss(features, classes, head: nn.Linear) -> torch.Tensor:
    """Cross-entropy of what lies in every fourth pixel, read linearly from the towers' patch features (B, n, D)."""
    side = int(features.shape[1] ** 0.5)
    cells = classes.shape[1] // side  # labels along one side of a patch
    logits = head(features).view(len(features), side, side, 28, cells, cells)
    logits = logits.permute(0, 3, 1, 4, 2, 5).reshape(len(features), 28, *classes.shape[1:])
    weight = torch.ones(28, device=logits.device)
    weight[0] = 0.2  # most pixels are table
    return F.cross_entropy(logits, classes.long(), weight)


def alignment_loss(policy, patches, classes, names, scale) -> torch.Tensor:
    """Is object j in patch i? A sigmoid on the cosine between the projected patch (B, n, H) and the embedding of the
    object's name, as SigLIP aligns whole images with captions. Llama can then look for a word among the patches."""
    table = policy.word_embeddings()
    words = torch.stack(
        [table[policy.tokenize([name], "{instruction}")[0][0, 1:]].mean(0) for name in names]
    )  # (25, H)
    logits = F.normalize(patches, dim=-1) @ F.normalize(words, dim=-1).T * scale[0].exp() + scale[1]  # (B, n, 25)
    side = int(patches.shape[1] ** 0.5)
    cells = classes.shape[1] // side
    tiles = classes.view(-1, side, cells, side, cells).permute(0, 1, 3, 2, 4).reshape(*patches.shape[:2], cells**2)
    present = F.one_hot(tiles.long(), 28).sum(2)[..., 1:26] >= 2
    return F.binary_cross_entropy_with_logits(logits, present.float(), reduction="none").sum(-1).mean()


def grounding_answers(batch, names):
    """Asks "where is X" of a random object in each frame -> names of X, answers (B, 1, 7): X's x, y, the plate's x, y,
    the hand's x, y, z, scaled to [-1, 1]."""
    present = (batch["object_ids"] >= 0).float()
    pick = torch.multinomial(present, 1)
    xyz = batch["object_xyz"].gather(1, pick[..., None].expand(-1, -1, 3))  # (B, 1, 3)
    places = torch.cat([xyz, batch["where"]], 1)  # (B, 3, 3): object, plate, hand
    unit = (places - torch.from_numpy(GROUND_CENTER).float()) / torch.from_numpy(GROUND_SCALE).float()
    answers = torch.cat([unit[:, 0, :2], unit[:, 1, :2], unit[:, 2]], 1)[:, None]
    return [names[i] for i in batch["object_ids"].gather(1, pick)[:, 0].tolist()], answers


QUESTION = "where is {instruction} <out>"


def train(policy, steps: int, args: Args, name: str, losses, heads=()):
    """AdamW on sum(losses().values()) for `steps` steps, with a progress bar that shows each loss (running mean)."""
    parameters = [*policy.parameters(), *heads]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / 100) * (0.02 + 0.49 * (1 + np.cos(np.pi * s / steps)))
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
            means = {k: 0.8 * means[k] + 0.2 * v.item() if means else v.item() for k, v in loss.items()}
            bar.set_postfix({k: f"{v:.3f}" for k, v in means.items()})
    policy.eval()


def warm_up(args: Args, pretraining: dict, demos: dict, held_out: dict):
    """Both stages on frames of `flatten` -> policy, report (held-out behaviour-cloning loss and error of its argmax)."""
    torch.manual_seed(args.seed)
    policy = policies.load_policy(args.backbone)
    names = [name for name, _, _ in envs.OBJECTS]
    features = []  # of the towers and the projector in the last forward pass: read here without a second pass
    hooks = [part.register_forward_hook(lambda _, __, out: features.append(out)) for part in policy.vision_parts()]
    scale = nn.Parameter(torch.tensor([1.5, -4.0]))  # of the alignment: log inverse temperature, bias

    def sample(frames, n):
        inds = torch.randint(len(frames["rgb"]), (n,))
        return {k: v[inds] for k, v in frames.items()}

    def either():
        return pretraining if torch.rand(()) < 0.6 else demos

    def grounding(batch):
        asked, answers = grounding_answers(batch, names)
        return policy.sft_loss(batch, [f"the {name}" for name in asked], answers, QUESTION, sigma=3.0)

    def cloning(batch, **options):
        tasks = [f"put {names[i]} on plate" for i in batch["object_ids"][:, 0].tolist()]
        return policy.sft_loss(batch, tasks, policy.to_unit(batch["chunk"]), **options)

    def stage_1():
        features.clear()
        batch = sample(either(), args.batch_size)
        loss = grounding(batch)
        return dict(
            grounding=loss,
            segmentation=segmentation_loss(torch.cat(features[:-1], -1), batch["classes"], head),
            alignment=2 * alignment_loss(policy, features[-1], batch["classes"], names, scale),
        )

    def stage_2():
        features.clear()
        return dict(cloning=cloning(sample(demos, args.batch_size)),
                    grounding=0.7 * grounding(sample(either(), args.batch_size // 2)))  # fmt: skip

    batch = sample(pretraining, 1)
    grounding(batch)
    head = nn.Linear(sum(f.shape[-1] for f in features[:-1]), 28 * batch["classes"][0].numel() // features[0].shape[1])
    train(policy, args.pretrain_steps, args, "pretraining", stage_1, [*head.parameters(), scale])
    train(policy, args.clone_steps, args, "behaviour cloning", stage_2)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        batch = sample(held_out, 512)
        names_asked = [f"put {names[i]} on plate" for i in batch["object_ids"][:, 0].tolist()]
        acted = policy.act(batch, names_asked, temperature=0).actions[:, 0]
        report = dict(
            cloning_loss=cloning(batch, jitter=0.0).item(),
            error=(acted - batch["action"]).abs().mean(0).tolist(),
            error_of_zero=batch["action"].abs().mean(0).tolist(),
        )
    return policy, report


def collect_parallel(vec: envs.VecEnv, split: str, ids: list[int], noise: float, seed: int) -> list[dict]:
    """`collect` spread over the workers, with a progress bar."""
    episodes, bar = [], tqdm(total=len(ids), desc=f"episodes ({split})")
    for start in range(0, len(ids), 16 * vec.num_workers):
        part = ids[start : start + 16 * vec.num_workers]
        shares = [part[i :: vec.num_workers] for i in range(vec.num_workers)]
        for done in vec.map(collect, *[(split, share, noise, seed) for share in shares]):
            episodes += done
        bar.update(len(part))
        bar.set_postfix(success=f"{np.mean([e['success'] for e in episodes]):.2f}")
    bar.close()
    return sorted(episodes, key=lambda e: e["episode_id"])  # the order must not depend on the number of cores


def cache_key(args: Args) -> str:
    """Changes with everything a warm start depends on: the flags, this file, the simulator's, the model's and its loss."""
    here = Path(__file__).parent
    parts = [json.dumps({k: v for k, v in vars(args).items() if k != "out"}, sort_keys=True)]
    parts += [(here / name).read_text() for name in ("sft.py", "envs.py", "policies.py")]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


def warm_start(backbone: str) -> Path:
    """The directory of a tiny backbone's warm start: the one in the repo, else trained now and kept in runs/."""
    shipped = Path(__file__).parent / "warmstart" / backbone
    if shipped.is_dir():
        return shipped
    args = Args(backbone=backbone)
    cached = Path(__file__).parent / "runs" / f"sft_{backbone}_{cache_key(args)}"
    if not cached.is_dir():
        print(f"no warm start for {backbone} yet: training one, which takes a while (progress bars follow)", file=sys.stderr)
        main(dataclasses.replace(args, out=str(cached)))
    return cached


def main(args: Args):
    if not args.backbone.endswith("-tiny"):
        raise envs.Fault(
            f"--backbone {args.backbone}: sft.py warm-starts tiny backbones; the big ones come with a checkpoint"
        )
    out = Path(args.out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise envs.Fault(f"cannot write to --out {out}: {error.strerror}")
    untrained = policies.load_policy(args.backbone)
    with envs.make_envs(2, image_size=untrained.image_size) as vec:
        # Episode ids: disjoint ranges, all below those of RL training (seed 1 starts at 1,000,000) and of evaluation.
        scenes = collect_parallel(vec, "busy", list(range(args.scenes)), 0.5, args.seed)
        half = args.demos // 2
        demos = collect_parallel(vec, "bare", list(range(200_000, 200_000 + half)), 0.25, args.seed)
        demos += collect_parallel(vec, "train", list(range(400_000, 400_000 + args.demos - half)), 0.25, args.seed)
        held_out = collect_parallel(vec, "train", list(range(600_000, 600_000 + 64)), 0.25, args.seed)
    demos, held_out = ([e for e in episodes if e["success"]] for episodes in (demos, held_out))
    policy, report = warm_up(args, *(flatten(episodes, untrained.horizon) for episodes in (scenes, demos, held_out)))
    print(json.dumps(report))
    with policies.whole_directory(out) as partial:
        policy.save(partial, dtype=torch.float16)
        (partial / "args.json").write_text(json.dumps(dict(vars(args), report=report), indent=2))
    print(f"warm start saved in {out}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (envs.Fault, policies.PolicyError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
