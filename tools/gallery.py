"""One contact sheet: the same six episodes in every split, and the views of a frame with their
mask. Or the pair of one frame: o, M, b, o_pre, o_alt.

    python envs.py --gallery docs/gallery.png --assets builtin
    python tools/gallery.py --pair docs/pair.png
    python tools/gallery.py --pair pair.png --assets flat    # without a simulator
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw, ImageFont

import views
from envs import make_env, make_envs
from runtime import Fault, command_line


@dataclass
class Args:
    pair: str
    """PNG file to draw one pair in"""
    assets: str = "builtin"
    """asset pack that is drawn: builtin, rl4vla or flat"""


ABOUT = {
    "train": "16 tables, 16 objects,\n6 x 6 grid, 4 yaws,\none distractor",
    "texture": "5 held-out tables",
    "lighting": "20 held-out lights",
    "pose": "target on a ring outside\nthe training square,\nat held-out yaws",
    **{f"clutter-{k}": f"{k} distractors,\nhalf of them held out" for k in (2, 4, 6, 8)},
    "camera+15": "camera turned by 15 deg",
    "camera-15": "and the other way",
}

TILE = 224  # pixels of one picture


def pictures(env) -> list:
    """Rows of (title, text, six pictures, captions or None)."""
    from scenes.task import TABLE_Z

    def reset(episode_id, split):
        env.reset(seed=0, options=dict(episodes=[env.sample(episode_id, split)]))
        return env.picture()[0].copy()

    def look():
        rgb, bodies = env.picture()
        return rgb.copy(), env.foreground(bodies)

    def composite(rgb, mask, empty):
        tensors = (torch.from_numpy(x) for x in (rgb[None], mask[None], empty))
        return views.composite(*tensors)[0].numpy()

    def drawn(view, seed):
        return view(env, [np.random.default_rng(seed)]).copy()

    rows = [(name, text, [reset(i, name) for i in range(6)], None) for name, text in ABOUT.items()]
    rows[0] = (*rows[0][:3], [f"episode {i}" for i in range(6)])
    captions = [
        "o",
        "mask M: robot, target, plate",
        "b: a training table, empty",
        "o_pre = M o + (1 - M) b",
        "o_alt: target elsewhere",
        "o_alt: another draw",
    ]
    still = "task-preserving (Eq. 5)\nand task-altering view\nof a training frame"
    lifted = "the same with the target\nin the gripper: physics\ndoes not notice"
    for text, lift, episode_id, background, seeds in (
        (still, False, 2, 5, (3, 1)),
        (lifted, True, 4, 9, (3, 2)),
    ):
        reset(episode_id, "train")
        while lift and not (env.grasped and env.target_entity.pose.p[2] > TABLE_Z + 0.045):
            env.step(env.pack.oracle(env))
            assert env.elapsed < env.pack.max_episode_steps, "the oracle lifts the target"
        rgb, mask = look()
        empty = env.empty_tables([background])
        alt = [drawn(views.task_altering, seed) for seed in seeds]
        shown = np.uint8(255 * np.dstack([mask] * 3))
        row = [rgb, shown, empty[0], composite(rgb, mask, empty), *alt]
        rows.append(("the pair", text, row, captions))

    reset(16, "clutter-8")
    rgb, mask = look()
    table = int(np.random.default_rng(3).integers(env.pack.train_tables))
    pre = composite(rgb, mask, env.empty_tables([table]))
    again = drawn(views.rerendered, 3)
    difference = np.uint8(np.minimum(255, 3 * np.abs(pre.astype(int) - again)))
    turned = [reset(2, "camera+-15:15"), drawn(views.other_camera, 0)]
    text = "a composite has bites\nwhere a distractor stood\nin front; a re-render\nhas not"
    row = [rgb, pre, again, difference, *turned]
    captions = [
        "o",
        "--pre-view composite",
        "--pre-view rerender",
        "their difference x 3",
        "o",
        "--pre-view camera",
    ]
    rows.append(("o_pre, 3 ways", text, row, captions))
    return rows


def check_file(file: str):
    if not file.endswith(".png"):
        raise Fault(f"{file!r} is no name of a picture: it must end in .png")
    try:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        open(file, "ab").close()
    except OSError as error:
        raise Fault(f"cannot write {file}: {error.strerror}")


def draw_rows(file: str, rows: list, left: int):
    """Writes the PNG `file`: rows of (title, text, pictures, captions or None)."""
    gap, head = 4, 22
    width = left + len(rows[0][2]) * (TILE + gap)
    height = len(rows) * (TILE + gap) + head * sum(captions is not None for *_, captions in rows)
    sheet = Image.new("RGB", (width, gap + height), "white")
    draw, y = ImageDraw.Draw(sheet), gap
    big, small = ImageFont.load_default(26), ImageFont.load_default(15)
    for title, text, shown, captions in rows:
        xs = [left + j * (TILE + gap) for j in range(len(shown))]
        if captions is not None:
            for x, caption in zip(xs, captions):
                draw.text((x + 2, y + 2), caption, "black", small)
            y += head
        for x, picture in zip(xs, shown):
            tile = Image.fromarray(np.uint8(picture)).resize((TILE, TILE), Image.Resampling.NEAREST)
            sheet.paste(tile, (x, y))
        draw.text((10, y + 10), title, "black", big)
        draw.multiline_text((10, y + 48), text, "dimgray", small, spacing=5)
        y += TILE + gap
    palette = sheet.quantize(256)  # with dither: looks the same at half the size of the file
    sheet.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(file, optimize=True)
    print(f"{file}: {sheet.width} x {sheet.height} pixels")


def draw_pair(file: str, assets: str):
    """A frame, its mask, a background, and its two views."""
    check_file(file)
    size = None if assets == "flat" else TILE
    with make_envs(1, assets, image_size=size, num_workers=1, alter=views.task_altering) as vec:
        obs = vec.reset([1], "train", view_seed=1)  # a frame in which the pair is easy to see
        empty = vec.backgrounds([9])
    shown = {
        "o": obs["rgb"][0],
        "M": obs["mask"][0][..., None].expand(-1, -1, 3) * 255,
        "b": empty[0],
        "o_pre": views.composite(obs["rgb"], obs["mask"], empty)[0],
        "o_alt": obs["rgb_alt"][0],
    }
    draw_rows(file, [("", "", list(shown.values()), list(shown))], 0)


def draw_sheet(file: str, assets: str):
    check_file(file)
    draw_rows(file, pictures(make_env(assets, TILE)), 200)


def main(args: Args):
    draw_pair(args.pair, args.assets)


if __name__ == "__main__":
    command_line(lambda: main(tyro.cli(Args)))
