"""Appendix B of the paper: splits and episodes of the task "put {object} on plate", and N
environments that play them.

    python envs.py --check               # does this machine render? if not: what to install
    python envs.py --download            # fetches what the pack `rl4vla` needs
    python envs.py --gallery FILE.png    # draws every split, and the pair of views

An episode is a pure function of (split, episode id): `sample_episode`. It has a fixed length;
success does not end it. `make_envs` makes N environments of an asset pack, which hand out batched
torch tensors. How a scene is simulated and drawn is in scenes/.
"""

import importlib
import re
import sys
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import tyro

from runtime import Fault, command_line, one_line, own_cores


# ------------------------------------------------------------ Splits and episodes
@dataclass(frozen=True)
class Split:
    """One evaluation setting; every field not named is as in training (Appendix B.4)."""

    held_out_tables: bool = False
    """table textures never seen in training (B.1)"""
    held_out_lights: bool = False
    """a light condition never seen in training (B.2)"""
    held_out_poses: bool = False
    """target on the outer border of the enlarged square, at a yaw not seen in training (B.3)"""
    distractors: int = 1
    """how many other objects lie on the table (B.4)"""
    held_out_objects: bool = False
    """half of the distractors are objects never seen in training (B.4, "Distractor-k")"""
    cameras: tuple = (0.0,)
    """orbits of the camera about the vertical axis through the workspace, degrees: one is drawn
    (5.5)"""


SPLITS = {
    "train": Split(),
    "texture": Split(held_out_tables=True),
    "lighting": Split(held_out_lights=True),
    "pose": Split(held_out_poses=True),
    **{f"clutter-{k}": Split(distractors=k, held_out_objects=True) for k in (2, 4, 6, 8)},
}
SFT_SPLITS = {  # what sft.py trains on: training objects only
    "bare": Split(distractors=0),  # demonstrations: the paper's have no distractor (A.1)
    "busy": Split(distractors=4),  # scenes for pretraining
}


def parse_split(name: str) -> Split:
    """The Split called `name`: one of SPLITS, or section 5.5's, in degrees up to 90. camera+N or
    camera-N: one orbit of the camera. Drawn for each episode: camera+M-N:S from M, M + S, ... N
    (training is camera+0-20:4), and camera+-N:S from ... -S, 0, S, ... N, both sides."""
    if name in SPLITS | SFT_SPLITS:
        return (SPLITS | SFT_SPLITS)[name]
    number = r"\d+(?:\.\d+)?"
    one = re.fullmatch(rf"camera([+-]{number})", name)
    many = re.fullmatch(rf"camera\+({number})?-({number}):({number})", name)
    if not (one or many):
        more = "camera+N, camera-N, camera+M-N:STEP or camera+-N:STEP (degrees)"
        raise Fault(f"unknown split {name!r}: choose from {', '.join(SPLITS)}, {more}")
    if one:
        degrees = (float(one[1]),)
    else:
        low, high, step = float(many[1] or 0), float(many[2]), float(many[3])
        if not 0 < step <= high - low:
            most = f"{high - low:g} degrees"
            raise Fault(f"split {name!r}: the step must be above 0 and at most {most}")
        degrees = [low + step * i for i in range(int((high - low) / step + 1e-9) + 1)]
        if many[1] is None:
            degrees = [-d for d in degrees[:0:-1]] + degrees
    if max(map(abs, degrees)) > 90:
        raise Fault(f"split {name!r}: the camera can turn by at most 90 degrees")
    return Split(cameras=tuple(degrees))


CENTER, HALF_EDGE = np.array([-0.16, 0.0]), 0.075  # the training square in metres (B.3)


def lattice(low: int, high: int) -> np.ndarray:
    """(n, 2) xy in metres of the (high - low)^2 points whose indices are both in low ... high - 1.
    0 ... 5 gives the 36 training points, 3 cm apart."""
    index = np.arange(low, high)
    grid = np.stack(np.meshgrid(index, index, indexing="ij"), -1).reshape(-1, 2)
    return CENTER + HALF_EDGE * (grid / 2.5 - 1)


GRID = lattice(0, 6)  # 36 training positions
# 28 points on the border at 10.5 cm
RING = lattice(-1, 7)[(np.abs(lattice(-1, 7) - CENTER) > 0.1).any(1)]
# Where distractors go when GRID and RING are full: WIDE, then FARTHER
WIDE, FARTHER = lattice(-4, 10), lattice(-8, 10)
TRAIN_YAWS = np.deg2rad([0.0, 45.0, 90.0, 135.0])
HELD_OUT_YAWS = -np.deg2rad([22.5, 67.5, 112.5, 157.5])


@dataclass(frozen=True)
class Episode:
    """Everything that defines one episode. Objects, tables and lights are indices into the pack,
    angles radians, xy metres."""

    id: int
    target: int
    target_xy: tuple
    target_yaw: float
    plate_xy: tuple
    distractors: tuple  # object indices
    distractor_xy: tuple
    distractor_yaw: tuple
    table: int
    light: int
    camera_deg: float
    cameras: tuple  # of which camera_deg was drawn


@cache
def layouts(held_out_poses: bool, target_gap: float, distractor_gap: float) -> np.ndarray:
    """(n, 3) int8: which points target, plate and distractor may have. RL4VLA's rule: target-plate
    and distractor-plate > 7 cm (or what the objects' size needs), target-distractor > 15 cm.

    As RL4VLA computes it, to the last bit: of two points that are 15 cm apart, rounding decides.
    """

    def far(a, b, gap):
        return np.linalg.norm(a[:, None] - b[None], axis=-1) > gap

    targets = RING if held_out_poses else GRID
    target_plate, target_distractor = far(targets, GRID, target_gap), far(targets, GRID, 0.15)
    plate_distractor = far(GRID, GRID, distractor_gap)
    possible = target_plate[:, :, None] & plate_distractor[None] & target_distractor[:, None]
    return np.argwhere(possible).astype(np.int8)


def sample_episode(episode_id: int, split: str | Split, pack) -> Episode:
    """Episode number `episode_id` (0 <= id < 2**63) of `split`, among the objects, tables and
    lights of `pack`.

    Each factor has a random stream of its own, so episode i has the same target object, table draw
    and light draw in every split, and the same places of target and plate in all but `pose`.
    Policies can be compared episode by episode.
    """
    s = parse_split(split) if isinstance(split, str) else split
    stream = [np.random.default_rng([episode_id, factor]) for factor in range(8)]
    target = int(stream[0].integers(pack.train_objects))
    train_others = stream[1].permutation([i for i in range(pack.train_objects) if i != target])
    held_out = stream[2].permutation(np.arange(pack.train_objects, len(pack.names)))
    n_held_out = s.distractors // 2 if s.held_out_objects else 0
    distractors = [*train_others[: s.distractors - n_held_out], *held_out[:n_held_out]]
    # Its place is drawn even where it is left out, so that target and plate stay the same
    first = int(train_others[0])

    targets = RING if s.held_out_poses else GRID
    triples = layouts(s.held_out_poses, pack.plate_gap(target), pack.plate_gap(first))
    t, p, d = triples[stream[3].integers(len(triples))]
    yaw = int(stream[4].integers(4))

    placed, yaws = [GRID[d]], [TRAIN_YAWS[yaw]]  # RL4VLA: the distractor shares the target's yaw
    radii = [pack.radius(target), pack.plate_radius, pack.radius(first)]
    for i in distractors[1:]:
        # The first free point of the training grid, then of its border, then of a wider patch
        shuffled = [stream[5].permutation(points) for points in (GRID, RING, WIDE)]
        points = np.concatenate([*shuffled, FARTHER])
        gaps = np.linalg.norm(points[:, None] - np.array([targets[t], GRID[p], *placed]), axis=-1)
        clearance = (gaps - np.array(radii) - pack.radius(i)).min(1)
        placed.append(points[np.flatnonzero(clearance > 0.005)[0]])
        radii.append(pack.radius(i))
        yaws.append(TRAIN_YAWS[stream[5].integers(4)])
    table = int(stream[6].integers(pack.train_tables))
    held_out_table = int(stream[6].integers(pack.train_tables, pack.num_tables))
    held_out_light = int(stream[6].integers(1, len(pack.lights)))
    return Episode(
        id=episode_id,
        target=target,
        target_xy=tuple(targets[t]),
        target_yaw=float((HELD_OUT_YAWS if s.held_out_poses else TRAIN_YAWS)[yaw]),
        plate_xy=tuple(GRID[p]),
        distractors=tuple(map(int, distractors)),
        distractor_xy=tuple(map(tuple, placed))[: s.distractors],
        distractor_yaw=tuple(map(float, yaws))[: s.distractors],
        table=held_out_table if s.held_out_tables else table,
        light=held_out_light if s.held_out_lights else 0,
        camera_deg=s.cameras[stream[7].integers(len(s.cameras))],
        cameras=s.cameras,
    )


# ------------------------------------------------------------ Environments
# --assets -> where the pack is, a module and the name in it
PACKS = {
    "builtin": ("scenes.builtin", "PACK"),
    "rl4vla": ("scenes.rl4vla", "PACK"),
    "rl4vla-small": ("scenes.rl4vla", "SMALL"),
    "flat": ("scenes.flat", "PACK"),
}


def find_pack(assets: str):
    """The pack called `assets`. Raises Fault where no pack has that name, or where its files are
    missing."""
    if assets not in PACKS:
        raise Fault(f"unknown --assets {assets!r}: choose from {', '.join(PACKS)}")
    module, name = PACKS[assets]
    pack = getattr(importlib.import_module(module), name)
    fault = pack.fault()
    if fault:
        raise Fault(f"assets of the pack {assets}: {fault}")
    return pack


INSTALL = (
    "install Mesa's lavapipe, version 24.3 or later: `make setup` does it on Debian and Ubuntu"
    " where it may use apt-get, elsewhere it prints the commands"
)


def make_env(assets: str, image_size: int | None = None, resize: str | None = None):
    """One bare scene in this process -> scenes.task.PutOnPlate."""
    if assets == "flat":
        raise Fault("--assets flat has no scene in ManiSkill: make_envs makes its environments")
    pack = find_pack(assets)
    from scenes.task import PutOnPlate  # here, because Flatland needs no simulator

    try:
        return PutOnPlate(pack, partial(sample_episode, pack=pack), image_size, resize)
    except RuntimeError as error:
        if not re.search("vk::|[Vv]ulkan|physical device|rendering device", str(error)):
            raise
        raise Fault(f"no Vulkan device to render with ({error}): {INSTALL}")


def choose_sim(sim: str) -> str:
    """--sim -> "cpu" or "cuda". Raises Fault where "cuda" is not possible; nothing is fetched."""
    if sim == "cpu":
        return "cpu"
    from sapien import physx

    from scenes.task import render_backend

    library = Path.home() / f".sapien/physx/{physx.version()}/libPhysXGpu_64.so"
    draws = render_backend().removeprefix("sapien_").upper()
    if not torch.cuda.is_available():
        lacks = "there is no CUDA device here"
    elif not library.is_file():
        fetch = "python -c 'import sapien.physx; sapien.physx.enable_gpu()'"
        lacks = f"{library} is missing: `{fetch}` fetches it"
    elif draws == "CPU":
        lacks = "SAPIEN cannot draw on this GPU: `python envs.py --check` says what it draws with"
    else:
        return "cuda"
    if sim == "cuda":
        raise Fault(f"--sim cuda: {lacks}; --sim cpu needs no GPU")
    if torch.cuda.is_available():
        print(f"physics on the CPU, pictures on {draws}: {lacks}", file=sys.stderr)
    return "cpu"


def make_envs(
    num_envs,
    assets="builtin",
    *,
    image_size=None,
    resize=None,
    num_workers=None,
    alter=None,
    preserve=None,
    sim="cpu",
):
    """N environments of asset pack `assets`, spread over `num_workers` processes (default: one per
    core of this rank) -> VecEnv; or with `sim` "cuda", or "auto" where that is possible, all in
    this process with GPU physics -> CudaVecEnv.

    Args:
        image_size: pixels of the square pictures; default: the pack's.
        resize: how to get there from the 640 x 480 of the pack rl4vla: "squash" into a square, or
            "keep" the aspect ratio (the height is then smaller). None: drawn square at once.
        alter, preserve: functions of views.py, rendered at every look: they add rgb_alt and rgb_pre
            to the observation.
    Raises: Fault on a wrong argument, or when a worker fails to start.
    """
    if num_envs < 1:
        raise Fault(f"--num-envs is {num_envs}: it must be at least 1")
    pack = find_pack(assets)
    views = {name: view for name, view in (("rgb_alt", alter), ("rgb_pre", preserve)) if view}
    if assets == "flat":  # no simulator, all in this process
        from scenes.flat import FlatEnvs

        if image_size not in (None, pack.image_size):
            raise Fault(
                f"--assets flat is drawn in 32 x 32 pixels, and this backbone wants {image_size} x"
                f" {image_size}: use another, as pi05-flat"
            )
        return FlatEnvs(num_envs, parse_split, views)
    sample = partial(sample_episode, pack=pack)
    if choose_sim(sim) == "cuda":
        from scenes.gpu import CudaVecEnv

        return CudaVecEnv(num_envs, pack, image_size, resize, sample, views)
    from scenes.workers import VecEnv

    make = partial(make_env, assets, image_size, resize)
    return VecEnv(num_envs, pack, sample, make, views, min(num_envs, num_workers or own_cores()))


# ------------------------------------------------------------ Command line
@dataclass
class Args:
    check: bool = False
    """does this machine render? prints versions, driver, time of one frame, free space; says what
    to install if not"""
    gallery: str | None = None
    """PNG file to draw a contact sheet in: every split, and the views with their mask"""
    assets: str = "builtin"
    """asset pack that is drawn: builtin, rl4vla or rl4vla-small, with --check also flat"""
    download: bool = False
    """fetch what is missing of the pack rl4vla (about 45 MB); asks nothing, can be interrupted and
    started again"""


def main(args: Args):
    from tools import gallery, preflight  # here, because they import this file

    if not (args.check or args.download or args.gallery):
        raise Fault("nothing to do: say --check, --gallery FILE.png or --download")
    if args.download:
        from scenes import rl4vla

        try:
            rl4vla.download()
        except OSError as error:
            hint = "check the network and start it again, it goes on where it was"
            raise Fault(f"--download: {one_line(error)}; {hint}")
        find_pack("rl4vla")
        folders = " and ".join(map(str, rl4vla.asset_folders().values()))
        print(f"ok: the pack rl4vla is complete in {folders}")
    if args.check:
        preflight.check(args.assets)
    if args.gallery:
        gallery.draw_sheet(args.gallery, args.assets)


if __name__ == "__main__":
    command_line(lambda: main(tyro.cli(Args)))
