"""Asset pack `rl4vla`: the paper's benchmark, RL4VLA's PutOnPlateInScene25MultiCarrot-v1, from its
files, on stock mani_skill.

`Rl4vlaPack` has what a pack declares, as BuiltinPack has. Then where the files are (`python envs.py
--download` fetches them), and the scripted oracle.
"""

import json
import os
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import sapien
import trimesh
from mani_skill import ASSET_DIR
from mani_skill.agents.registration import register_agent
from mani_skill.envs.tasks.digital_twins.bridge_dataset_eval.base_env import (
    WidowX250SBridgeDatasetFlatTable,
)
from sapien.physx import PhysxRigidDynamicComponent
from transforms3d.axangles import axangle2mat, mat2axangle
from transforms3d.euler import mat2euler

from scenes.task import TABLE_Z, Light, held_out_lights


class Rl4vlaPack:
    """WidowX250S at the Bridge table, RL4VLA's 25 scanned objects, 21 photographs of tables behind.

    DEVIATION: a box carries the objects (the photograph hides it anyway), and they have angular
    damping (task.py).
    """

    robot_uid = "widowx_bridge"
    robot_look = dict(specular=0.9, roughness=0.3)
    base_pose = sapien.Pose([0.147, 0.028, 0.870], [0, 0, 0, 1])
    init_qpos = np.array(
        [-0.01840777, 0.0398835, 0.22242722, -0.00460194, 1.36524296, 0.00153398, 0.037, 0.037]
    )
    camera_eye = np.array([0.147, 0.188, 1.23])  # Bridge's camera; its horizon is level
    camera_at = camera_eye + [-0.6346126, -0.3509407, -0.6885546]
    image_size = 224
    camera_shape = (480, 640)  # Bridge's
    sim_freq = 500
    max_episode_steps = 80
    grasp_streak = 5
    largest_move, largest_turn = 0.03, 0.35  # of the oracle in one control step: metres, radians
    plate_radius, plate_height, plate_spawn_z = 0.055, 0.006, 0.92
    settles_again = True  # where something still moves after 0.3 s
    floor = None  # what is not robot, object or plate is the photograph
    table_materials = ()
    # The first of each are for training, the others are held out
    train_objects, train_tables, num_tables = 16, 16, 21
    lights = [Light(), *held_out_lights()]  # the first is for training

    @cached_property
    def folder(self) -> Path:
        return asset_folders()["carrot"]

    @cached_property
    def objects(self) -> list[tuple[str, dict]]:
        """(folder, facts) of each object."""
        return list(json.loads((self.folder / "more_carrot/model_db.json").read_text()).items())

    @cached_property
    def names(self) -> list[str]:
        return [entry["name"] for _, entry in self.objects]

    @cached_property
    def sizes(self) -> list[np.ndarray]:
        boxes = [entry["bbox"] for _, entry in self.objects]
        return [np.subtract(box["max"], box["min"]) for box in boxes]

    def fault(self) -> str:
        """What is the matter with the files; empty if nothing is."""
        faults = faulty_assets()
        if not faults:
            return ""
        path, fault = next(iter(faults.items()))
        others = f", and so are or have {len(faults) - 1} others" if len(faults) > 1 else ""
        return f"{path} {fault}{others}: `python envs.py --download` fetches them"

    def clean_up(self):
        """Nothing was written."""

    def lens(self, height: int, width: int) -> dict:
        """Bridge's 640 x 480 camera, its picture stretched to height x width."""
        bridge = np.array([623.588, 623.588, 319.501, 239.545])
        fx, fy, cx, cy = bridge * [width, height, width, height] / [640, 480, 640, 480]
        return dict(intrinsic=np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]]))

    def radius(self, i: int) -> float:
        box = self.objects[i][1]["bbox"]
        return float(np.linalg.norm(np.abs([box["min"], box["max"]]).max(0)[:2]))

    def plate_gap(self, i: int) -> float:
        """RL4VLA's rule, also for long objects: one end may lie on the rim."""
        return 0.07

    def spawn_z(self, i: int, is_target: bool) -> float:
        """RL4VLA lets objects fall."""
        return 0.95 if is_target else 1.0

    def _build(self, folder, density, builder, material):
        builder.add_multiple_convex_collisions_from_file(
            str(folder / "collision.obj"), material=material, density=density
        )
        (visual,) = folder.glob("textured.*")
        builder.add_visual_from_file(str(visual))

    def build_object(self, i, builder, material):
        key, entry = self.objects[i]
        self._build(self.folder / "more_carrot" / key, entry["density"], builder, material)

    def build_plate(self, builder, material):
        self._build(self.folder / "more_plate/001_plate_simpler", 1003, builder, material)

    def photos(self, height: int, width: int) -> np.ndarray:
        """(num_tables, height, width, 3) uint8"""
        from PIL import Image

        files = sorted((self.folder / "more_table/imgs").glob("*.png"))
        photos = [Image.open(file).convert("RGB") for file in files]
        return np.stack([photo.resize((width, height), Image.Resampling.BOX) for photo in photos])

    def oracle(self, scene) -> np.ndarray:
        return oracle(scene)


@register_agent()
class BridgeWidowX(WidowX250SBridgeDatasetFlatTable):
    """ManiSkill's WidowX250S with RL4VLA's controller: as builtin.LightPanda's, but deltas
    accumulate on the commanded pose."""

    uid = "widowx_bridge"
    _sensor_configs = ()

    @property
    def urdf_path(self):
        return str(asset_folders()["data"] / "robots/widowx/wx250s.urdf")

    def _after_init(self):
        self.tcp = self.robot.links_map["ee_gripper_link"]

    @property
    def _controller_configs(self):
        (config,) = super()._controller_configs.values()
        config["gripper"].mimic = {"right_finger": {"joint": "left_finger"}}
        return {"pd_ee_target_delta_pose": config}


# ------------------------------------------------------------ files
HUB_DATASET = "RLinf/maniskill_assets"  # RL4VLA's objects, plates and photographs of tables
# What the pack reads: "bytes path" in every line
FILES = Path(__file__).parent / "rl4vla_files.txt"


def asset_folders() -> dict[str, Path]:
    """{first folder in rl4vla_files.txt: the directory that holds it on this machine}, in
    $PAIR_VLA_ASSETS if set, else in the caches of the Hugging Face Hub and of ManiSkill."""
    if "PAIR_VLA_ASSETS" in os.environ:
        root = Path(os.environ["PAIR_VLA_ASSETS"])
        return dict(carrot=root / "carrot", data=root / "data")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        hub = Path(snapshot_download(HUB_DATASET, repo_type="dataset", local_files_only=True))
    except LocalEntryNotFoundError:
        hub = Path(f"the Hub's cache of {HUB_DATASET}")
    return dict(carrot=hub / "carrot", data=ASSET_DIR)


def faulty_assets() -> dict[Path, str]:
    """Files of the pack that are not here or not whole -> what is the matter with them."""
    folders, faults = asset_folders(), {}
    for line in FILES.read_text().splitlines():
        size, name = line.split(" ", 1)
        folder, name = name.split("/", 1)
        path, wanted = folders[folder] / name, int(size)
        if not path.is_file():
            faults[path] = "is missing"
            continue
        found = path.stat().st_size
        says = int.from_bytes(path.open("rb").read(12)[8:], "little")  # a .glb says how long it is
        if wanted == 0 and found != says:
            faults[path] = f"has {found} bytes: it is cut off"
        elif wanted not in (0, found):
            faults[path] = f"has {found} bytes instead of {size}"
    return faults


def download():
    """Fetches what is missing, asks nothing, and can be interrupted and started again. Raises
    OSError."""
    from huggingface_hub import snapshot_download
    from mani_skill.utils.assets.data import DATA_SOURCES
    from mani_skill.utils.download_asset import download as download_zip

    faults = faulty_assets()
    robot = asset_folders()["data"] / "robots/widowx"
    for path in faults:  # a file that was cut off would pass for complete
        if path.is_file():
            path.resolve().unlink()
            path.unlink(missing_ok=True)  # the Hub's cache holds links
    if any(robot not in path.parents for path in faults):
        assets = os.environ.get("PAIR_VLA_ASSETS")
        local = dict(local_dir=assets) if assets else {}
        lines = FILES.read_text().splitlines()
        wanted = [line.split(" ", 1)[1] for line in lines if " carrot/" in line]
        snapshot_download(HUB_DATASET, repo_type="dataset", allow_patterns=wanted, **local)
    if any(robot in path.parents for path in faults):
        source = replace(DATA_SOURCES["widowx250s"], output_dir=robot.parent.parent)
        download_zip(source, non_interactive=True)


# ------------------------------------------------------------ scripted oracle
def oracle(env) -> np.ndarray:
    """One action (7,) float32 from privileged state; the phases of builtin's, with a hand that must
    be kept upright.

    Deltas are counted from the commanded pose, as the controller counts them.
    """
    command = env.pack.base_pose * env.agent.controller.controllers["arm"]._target_pose.sp
    tcp, target, plate = env.tcp_entity.pose, env.target_entity.pose, env.plate_entity.pose.p
    opening = float(env.agent.robot._objs[0].qpos[-1])  # metres, 0.014 closed to 0.038
    points = surface(env) @ target.to_transformation_matrix()[:3, :3].T + target.p
    bottom, top = points[:, 2].min(), points[:, 2].max()
    in_hand = np.linalg.norm(points - tcp.p, axis=1).min() < 0.02
    carried = opening < 0.033 and bottom > TABLE_Z + 0.012 and in_hand
    over_plate = np.linalg.norm(target.p[:2] - plate[:2])
    low = bottom < TABLE_Z + 0.022 and over_plate < (0.03 if env.grasped else 0.05)
    placed = env.success or (low and tcp.p[2] < TABLE_Z + 0.14)
    goal, turn, gripper = command.p.copy(), None, 1.0
    if placed:
        if opening > 0.035:
            goal[2] = TABLE_Z + 0.15
    elif env.grasped or carried:
        gripper = -1.0
        if over_plate > (0.015 if bottom > TABLE_Z + 0.05 else 0.03):
            goal[2] += TABLE_Z + 0.07 - bottom
            if bottom > TABLE_Z + 0.045:
                goal[:2] += plate[:2] - target.p[:2]
        else:
            goal[2] += TABLE_Z + 0.014 - bottom
    else:
        grasp, yaw = find_grasp(env, points, bottom, top)
        turn = upright(yaw) @ command.to_transformation_matrix()[:3, :3].T
        near = np.linalg.norm(grasp - command.p)
        aligned = np.linalg.norm((grasp - command.p)[:2]) < 0.008 and axis_angle(turn)[1] < 0.08
        if near < (0.006 if opening > 0.035 else 0.025) and opening > 0.0155:
            goal, turn, gripper = command.p, None, -1.0
        else:
            goal = grasp.copy()
            if not aligned:
                goal[2] = max(grasp[2] + 0.07, TABLE_Z + 0.10)
    move = goal - command.p
    move *= min(1.0, env.pack.largest_move / max(np.linalg.norm(move), 1e-9))
    to_base = env.pack.base_pose.inv().to_transformation_matrix()[:3, :3]
    angles = np.zeros(3)
    if turn is not None:
        axis, angle = axis_angle(turn)
        small = axangle2mat(axis, min(angle, env.pack.largest_turn))
        angles = mat2euler(to_base @ small @ to_base.T, "rxyz")
    return np.array([*(to_base @ move), *angles, gripper], np.float32)


def axis_angle(rotation) -> tuple[np.ndarray, float]:
    """Axis and angle >= 0, radians, of a rotation (3, 3)."""
    axis, angle = mat2axangle(rotation)
    return (axis, angle) if angle >= 0 else (-axis, -angle)


def upright(yaw: float) -> np.ndarray:
    """(3, 3): the WidowX's hand looks down (its x axis) and closes along the direction `yaw` (its y
    axis)."""
    down, close = np.array([0, 0, -1.0]), np.array([np.cos(yaw), np.sin(yaw), 0])
    return np.stack([down, close, np.cross(down, close)], 1)


SURFACES = {}  # index of an object -> surface()


def surface(env) -> np.ndarray:
    """(1500, 3) metres: points on the target's collision shapes, in its own frame."""
    i = env.episode.target
    if i not in SURFACES:
        body = env.target_entity.find_component_by_type(PhysxRigidDynamicComponent)
        parts = [trimesh.Trimesh(x.vertices * x.scale, x.triangles) for x in body.collision_shapes]
        mesh = trimesh.util.concatenate(parts)
        SURFACES[i] = np.array(trimesh.sample.sample_surface(mesh, 1500, seed=0)[0])
    return SURFACES[i]


def find_grasp(env, points, bottom, top) -> tuple[np.ndarray, float]:
    """Where the hand should close and along which yaw: narrow and parallel faces near the centre of
    mass."""
    body = env.target_entity.find_component_by_type(PhysxRigidDynamicComponent)
    middle = (env.target_entity.pose * body.cmass_local_pose).p[:2]
    # The fingertips are 1.56 cm below the hand (its middle is the ee_gripper_link), the gripper bar
    # is 2.1 cm above it.
    z = max(min((top + bottom) / 2, top - 0.004), TABLE_Z + 0.017, top - 0.019)
    slab = points[np.abs(points[:, 2] - z) < 0.0155, :2] - middle
    axis = env.tcp_entity.pose.to_transformation_matrix()[:2, 1]
    now = np.arctan2(axis[1], axis[0])
    yaws, shifts = np.deg2rad(np.arange(0, 180, 7.5)), np.arange(-0.03, 0.031, 0.0075)
    close = np.stack([np.cos(yaws), np.sin(yaws)], 1)  # (24, 2)
    side = np.stack([-np.sin(yaws), np.cos(yaws)], 1)
    u, v = (slab @ close.T).T[:, None], (slab @ side.T).T[:, None]  # (24, 1, points)
    turn = (yaws - now + np.pi / 2) % np.pi - np.pi / 2
    # Of each half of a finger's width, metres (2, 24, 9): +-9 is nowhere
    halves = np.stack([np.abs(v - shifts[:, None] + d) < 0.0045 for d in (0.0045, -0.0045)])
    lows, highs = np.where(halves, u, 9).min(-1), np.where(halves, u, -9).max(-1)
    low, high = lows.min(0), highs.max(0)
    # Of faces that are not parallel the object is squeezed out
    slope = np.abs(lows[0] - lows[1]) + np.abs(highs[0] - highs[1])
    center, width = (low + high) / 2, high - low
    cost = 2.5 * slope + 2 * np.maximum(width - 0.02, 0)
    cost = cost + 0.8 * np.hypot(center, shifts) + 0.02 * np.abs(turn)[:, None]
    cost += 10 * (width > 0.05) + (width < 0.013)  # the gripper's opening, and its gap when closed
    cost[(halves.sum(-1) < 3).any(0)] = np.inf
    i, j = np.unravel_index(cost.argmin(), cost.shape)
    return np.array([*(middle + center[i, j] * close[i] + shifts[j] * side[i]), z]), now + turn[i]


PACK, SMALL = Rl4vlaPack(), Rl4vlaPack()
# DEVIATION: drawn square at the policy's size at once, 2 to 4 times as fast as the camera's pixels
SMALL.camera_shape = None
