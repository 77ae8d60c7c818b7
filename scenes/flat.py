"""Flatland: the paper's task in 32 x 32 pixels, drawn by numpy: no simulator, no GPU, no files.

A hand moves over a table, grasps the target that the instruction names when it touches it, and
carries it to the plate, which takes it. The hand grasps nothing else. Splits, the mask M, both
views and the reward are those of the simulator's worlds (Appendix B).

All environments are drawn at once. A pixel is a uint32: three bytes of colour, and a fourth that is
255 on the hand, the target and the plate. That fourth byte is M.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from runtime import Fault

SIZE, PAD = 32, 4  # pixels along a side; a margin, so that nothing leaves the picture
MOVE = 12.0  # pixels along each axis that the largest action moves the hand
METRES = 0.06  # what the simulator calls that action
TOUCH = 2.5  # pixels along each axis: nearer than this, two things touch
GAP = 7  # pixels along one axis between any two things at the start, where there is room
START = (2, 16)  # row and column of the hand

COLOURS = dict(
    red=(220, 30, 30),
    green=(30, 170, 40),
    blue=(40, 60, 230),
    yellow=(235, 220, 40),
    purple=(150, 40, 190),
)
ROW, COLUMN = np.mgrid[-3:4, -3:4]
SHAPES = dict(
    cube=(abs(ROW) <= 2) & (abs(COLUMN) <= 2),
    ball=ROW**2 + COLUMN**2 <= 7,
    cross=(abs(ROW) + abs(COLUMN) <= 3)
    & ((abs(ROW) < 1) | (abs(COLUMN) < 1) | (abs(ROW) + abs(COLUMN) < 3)),
    l=((abs(COLUMN + 1.5) < 1) | (abs(ROW - 1.5) < 1)) & (abs(ROW) <= 2) & (abs(COLUMN) <= 2),
    bar=(abs(ROW) <= 1) & (abs(COLUMN) <= 3),
)
PLATE = ROW**2 + COLUMN**2 <= 10
HAND = (ROW == -3) | (abs(COLUMN) == 3)  # from above: two fingers and the palm


def pixels(rgb, foreground) -> np.ndarray:
    """(..., 3) colours -> (...) uint32 pixels."""
    rgb = np.asarray(rgb, np.uint8)
    alpha = np.full((*rgb.shape[:-1], 1), 255 * foreground, np.uint8)
    return np.concatenate([rgb, alpha], -1).view(np.uint32)[..., 0]


def texture(i: int) -> np.ndarray:
    """Table top i, (SIZE, SIZE, 3) uint8: waves, squares, rings or patches of two colours."""
    rng = np.random.default_rng([11, i])
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE
    first = rng.integers(90, 166, 3)
    colours = np.stack([first, first + rng.uniform(-50, 50, 3).astype(int)])  # muted
    a, b = rng.uniform(1, 4, 2)
    phase = rng.uniform(0, 6)
    u, v = rng.uniform(size=2)
    if i % 4 == 0:
        weight = (np.sin(2 * np.pi * (a * x + b * y) + phase) + 1) / 2
    elif i % 4 == 1:
        weight = (np.floor(x * (a + 3)) + np.floor(y * (b + 3))) % 2
    elif i % 4 == 2:
        weight = (np.sin(2 * np.pi * (a + 1) * np.hypot(x - u, y - v)) + 1) / 2
    else:
        weight = np.kron(rng.uniform(size=(8, 8)), np.ones((SIZE // 8, SIZE // 8)))
    weight = weight[..., None]
    return (colours[0] * (1 - weight) + colours[1] * weight).astype(np.uint8)


def light_gains() -> np.ndarray:
    """(21, SIZE, SIZE, 3): what multiplies the colours. 0: training. 1-20, held out: 5 directions
    x (dim, bright, warm, cold)."""
    y, x = (np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2) / SIZE
    gains = [np.ones((SIZE, SIZE, 3))]
    for along_y, along_x in ((1, 0), (-1, 0), (0, 1), (0, -1), (0, 0)):
        slope = 1 + 0.3 * (along_y * y + along_x * x)
        for colour in ((0.8, 0.8, 0.8), (1.2, 1.2, 1.2), (1.1, 1.0, 0.85), (0.85, 1.0, 1.1)):
            gains.append(slope[..., None] * colour)
    return np.float32(gains)


class FlatPack:
    """What there is. The first train_... of each are for training, the rest is held out."""

    image_size, max_episode_steps = SIZE, 6
    kinds = np.random.default_rng(3).permutation([(c, s) for s in SHAPES for c in COLOURS])
    names = [" ".join(kind) for kind in kinds]
    train_objects, train_tables, num_tables = 16, 16, 21
    largest_move = METRES  # of the oracle in one step
    textures = np.stack([texture(i) for i in range(21)])
    lights = light_gains()

    def fault(self) -> str:
        return ""  # nothing can be missing

    def answers(self, places: torch.Tensor) -> torch.Tensor:
        """What sft.py teaches to say to "where is X": the move towards it, on the actions' scale.

        places (B, 3, 3): pixels of X, of the plate and of the hand -> (B, 7) in [-1, 1].
        """
        move = ((places[:, 0, :2] - places[:, 2, :2]) / MOVE).clamp(-1, 1)
        return torch.cat([move, torch.zeros(len(move), 4), torch.ones(len(move), 1)], 1)


PACK = FlatPack()
# (21, SIZE + 2 PAD, SIZE + 2 PAD)
TABLES = np.pad(pixels(PACK.textures, False), ((0, 0), (PAD, PAD), (PAD, PAD)))
SPRITES = np.stack([SHAPES[shape] for _, shape in PACK.kinds])  # (25, 7, 7) bool
PAINT = np.array([COLOURS[colour] for colour, _ in PACK.kinds])  # (25, 3)
WHITE, BLACK = pixels((245, 245, 245), True), pixels((20, 20, 20), True)
# Where things may lie, (676, 2), and which of that is for training; the rest is the split `pose`
WIDE = np.mgrid[3 : SIZE - 3, 3 : SIZE - 3].reshape(2, -1).T
SQUARE = ((WIDE >= 6) & (WIDE < SIZE - 6)).all(1)


def chance(*key) -> np.ndarray:
    """Uniform in [0, 1): a pure function of integers >= 0 or arrays of them (splitmix64)."""
    x = np.zeros(1, np.uint64)
    for k in key:
        x = x + np.asarray(k).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)) * 2.0**-53


def sample_episodes(episode_ids, split) -> dict[str, np.ndarray]:
    """N episodes of an envs.Split, each a pure function of its id. Each factor has random numbers
    of its own: an id has the same target, plate, table draw and light draw in every split.

    -> objects (N, 1 + K) indices, the target first; at (N, 2 + K, 2) row and column of the plate
    and the objects; table, light (N,).
    """
    ids = np.asarray(episode_ids, np.int64)[:, None]
    target = (chance(ids, 0) * PACK.train_objects).astype(int)  # (N, 1)
    known = np.arange(PACK.train_objects)
    others = (chance(ids, 1, known) + (known == target)).argsort(1)  # the target is the last
    strange = len(known) + chance(ids, 2, np.arange(len(PACK.names) - len(known))).argsort(1)
    held_out = split.distractors // 2 * split.held_out_objects
    objects = [target, others[:, : split.distractors - held_out], strange[:, :held_out]]

    # Each thing takes the point farthest from the others, up to GAP: of the square, else any
    at, nearest = [], np.minimum(abs(WIDE - START).max(1), GAP) + np.zeros((len(ids), 1))
    for thing in range(2 + split.distractors):  # plate, target, distractors
        square = ~SQUARE if thing == 1 and split.held_out_poses else SQUARE
        wanted = square * (100.0 if thing < 3 else 0.5)
        wanted = nearest + wanted + chance(ids, 3 + thing, np.arange(len(WIDE))) / 2  # (N, 676)
        point = WIDE[wanted.argmax(1)]
        at.append(point)
        nearest = np.minimum(nearest, abs(WIDE - point[:, None]).max(2))
    table = chance(ids, 21)[:, 0] * PACK.train_tables
    if split.held_out_tables:
        num_held_out = PACK.num_tables - PACK.train_tables
        table = PACK.train_tables + chance(ids, 20)[:, 0] * num_held_out
    light = split.held_out_lights * (1 + chance(ids, 22)[:, 0] * (len(PACK.lights) - 1))
    return dict(
        objects=np.concatenate(objects, 1),
        at=np.stack(at, 1),
        table=table.astype(int),
        light=light.astype(int),
    )


def stamp(canvas, where, sprites, colour):
    """Draw sprites (N, 7, 7) or (7, 7) bool around where (N, 2) in colour (N,) or () uint32."""
    n, row, column = np.nonzero(np.broadcast_to(sprites, (len(canvas), 7, 7)))
    corner = np.rint(where).astype(int) + PAD - 3
    canvas[n, corner[n, 0] + row, corner[n, 1] + column] = np.broadcast_to(colour, len(canvas))[n]


class FlatEnvs:
    """N environments, all at the same step of their episodes, with VecEnv's interface
    (scenes/workers.py).

    parse_split: name -> envs.Split. views: which of rgb_alt (the target elsewhere) and rgb_pre
    (another table of training, no distractors) are drawn as well.
    """

    pack, max_episode_steps = PACK, PACK.max_episode_steps
    alter_sigma = 6.0  # pixels: what Eq. (3) moves the target by

    def __init__(self, num_envs: int, parse_split, views=()):
        self.num_envs, self.parse_split, self.views = num_envs, parse_split, views
        self.instructions, self.view_seconds = [], 0.0

    def reset(self, episode_ids, split="train", rebuild=False, view_seed=0) -> dict:
        """See VecEnv.reset. rebuild means nothing here."""
        assert len(episode_ids) == self.num_envs
        split = self.parse_split(split)
        if split.cameras != (0.0,):
            leave = "leave --pre-view camera and its splits out"
            raise Fault(f"--assets flat has no camera that turns: {leave}")
        episode = sample_episodes(episode_ids, split)
        self.episode, self.ids = episode, np.asarray(episode_ids, np.int64)
        self.view_seed, self.elapsed = view_seed, 0
        self.target = episode["objects"][:, 0]
        self.table, self.light = episode["table"], episode["light"]
        self.instructions = [f"put {PACK.names[i]} on plate" for i in self.target]
        self.plate, self.at = episode["at"][:, 0].astype(float), episode["at"][:, 1].astype(float)
        self.hand = np.tile(np.float64(START), (self.num_envs, 1))
        self.held, self.success = np.zeros((2, self.num_envs), bool)
        self.streak, self.best_streak = np.zeros((2, self.num_envs), int)
        self.paid = np.zeros(self.num_envs)
        self.still = TABLES[self.table]  # what does not move in an episode is drawn once
        stamp(self.still, self.plate, PLATE, WHITE)
        for kind, where in zip(episode["objects"].T[1:], episode["at"].swapaxes(0, 1)[2:]):
            stamp(self.still, where, SPRITES[kind], pixels(PAINT[kind], False))
        return self.look()

    def step(self, actions: torch.Tensor):
        """See VecEnv.step. The first two numbers of an action move along rows and columns."""
        actions = actions[:, : self.max_episode_steps - self.elapsed].cpu().double().numpy()
        for action in actions.swapaxes(0, 1):
            self.hand = np.clip(self.hand + action[:, :2] * (MOVE / METRES), 0, SIZE - 1)
            self.held |= ~self.success & (abs(self.hand - self.at).max(1) <= TOUCH)
            self.at = np.where(self.held[:, None], self.hand, self.at)
            self.streak = np.where(self.held, self.streak + 1, 0)
            self.best_streak = np.maximum(self.best_streak, self.streak)
            self.success |= self.held & (abs(self.at - self.plate).max(1) <= TOUCH)
            self.held &= ~self.success
        self.elapsed += actions.shape[1]
        # Appendix B: R_t = 0.1 ever grasped + 0.1 for two steps on end + 1.0 success, paid as
        # R_t - R_{t-1}
        total = 0.1 * (self.best_streak >= 1) + 0.1 * (self.best_streak >= 2) + 1.0 * self.success
        reward, self.paid = torch.from_numpy(total - self.paid).float(), total
        info = dict(success=self.success, success_once=self.success, grasped=self.best_streak >= 1)
        info = {name: torch.from_numpy(value.copy()) for name, value in info.items()}
        info["episode_return"] = torch.from_numpy(total).float()
        done = torch.full((self.num_envs,), self.elapsed >= self.max_episode_steps)
        return self.look(), reward, done, info

    def look(self) -> dict:
        rgb, mask = self.draw(self.still.copy(), self.at)
        state = np.zeros((self.num_envs, 8), np.float32)
        state[:, :2], state[:, 2] = self.hand / SIZE, self.held
        obs, begin = dict(rgb=rgb, mask=mask, state=state), time.perf_counter()
        if "rgb_alt" in self.views:
            # Box and Muller: two normal numbers
            u, angle = chance(self.view_seed, self.ids, self.elapsed, [[0], [1]])
            direction = [np.cos(2 * np.pi * angle), np.sin(2 * np.pi * angle)]
            away = self.alter_sigma * np.sqrt(-2 * np.log1p(-u)) * direction
            obs["rgb_alt"] = self.draw(self.still.copy(), np.clip(self.at + away.T, 3, SIZE - 4))[0]
        if "rgb_pre" in self.views:
            table = chance(self.view_seed, self.ids, self.elapsed, 2) * PACK.train_tables
            bare = TABLES[table.astype(int)]
            stamp(bare, self.plate, PLATE, WHITE)
            obs["rgb_pre"] = self.draw(bare, self.at)[0]
        self.view_seconds += time.perf_counter() - begin
        return {name: torch.from_numpy(value) for name, value in obs.items()}

    def draw(self, canvas, at):
        """Target at `at` and hand on the canvas -> (N, SIZE, SIZE, 3) uint8, M (N, SIZE, SIZE)."""
        stamp(canvas, at, SPRITES[self.target], pixels(PAINT[self.target], True))
        stamp(canvas, self.hand, HAND, BLACK)
        canvas = np.ascontiguousarray(canvas[:, PAD:-PAD, PAD:-PAD])
        canvas = canvas.view(np.uint8).reshape(-1, SIZE, SIZE, 4)
        rgb, mask = np.ascontiguousarray(canvas[..., :3]), canvas[..., 3] > 0
        if self.light.any():
            rgb = (rgb * PACK.lights[self.light]).clip(0, 255).astype(np.uint8)
        return rgb, mask

    def backgrounds(self, tables=None) -> torch.Tensor:
        """(K, SIZE, SIZE, 3) uint8: tables (default: those of training) with nothing on them."""
        tables = range(PACK.train_tables) if tables is None else tables
        return torch.from_numpy(PACK.textures[list(tables)])

    def labels(self) -> dict[str, np.ndarray]:
        """What sft.py teaches to see: classes (N, SIZE / 2, SIZE / 2) uint8 of each second pixel (0
        table, 1 + index of an object, then plate, hand); where (N, 2, 3) plate and hand; objects
        (N, 1 + K) indices, the target first; object_xyz (N, 1 + K, 3)."""
        kinds, at = self.episode["objects"], self.episode["at"].astype(np.float32)[:, 1:]
        at[:, 0] = self.at
        canvas = np.zeros_like(self.still)
        stamp(canvas, self.plate, PLATE, np.uint32(len(SPRITES) + 1))
        for i in [*range(1, kinds.shape[1]), 0]:
            stamp(canvas, at[:, i], SPRITES[kinds[:, i]], (1 + kinds[:, i]).astype(np.uint32))
        stamp(canvas, self.hand, HAND, np.uint32(len(SPRITES) + 2))
        places = np.concatenate([self.plate[:, None], self.hand[:, None], at], 1)
        places = np.pad(places, ((0, 0), (0, 0), (0, 1)))  # everything lies at height 0
        classes = canvas[:, PAD:-PAD:2, PAD:-PAD:2].astype(np.uint8)
        return dict(classes=classes, where=places[:, :2], objects=kinds, object_xyz=places[:, 2:])

    def oracle(self) -> torch.Tensor:
        """Actions (N, 1, 7) from what the scene is now: to the target, and with it to the plate."""
        goal = np.where((self.held | self.success)[:, None], self.plate, self.at)
        actions = np.zeros((self.num_envs, 1, 7), np.float32)
        actions[:, 0, :2] = np.clip((goal - self.hand) / MOVE, -1, 1) * METRES
        actions[:, 0, 6] = 1.0
        return torch.from_numpy(actions)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass
