"""Asset pack `builtin`: a Panda, 25 objects and 21 tables made of primitives and arithmetic.

`BuiltinPack` has what a pack declares: robot, camera, rates, counts, lights, how objects, plate and
tables are made, and a scripted oracle.
"""

import colorsys
import shutil
import tempfile
import xml.etree.ElementTree as ElementTree
from functools import cached_property
from pathlib import Path

import numpy as np
import sapien
import torch
from mani_skill import PACKAGE_ASSET_DIR
from mani_skill.agents.controllers import (
    PDEEPoseController,
    PDEEPoseControllerConfig,
    PDJointPosMimicControllerConfig,
)
from mani_skill.agents.registration import register_agent
from mani_skill.agents.robots.panda.panda import Panda
from mani_skill.utils.structs import Pose
from sapien.render import RenderMaterial, RenderTexture2D
from transforms3d.euler import euler2quat

from runtime import Fault
from scenes.task import TABLE_Z, Light, held_out_lights

COLORS = dict(
    red=(0.85, 0.1, 0.1), green=(0.1, 0.65, 0.15), blue=(0.12, 0.25, 0.85),
    yellow=(0.95, 0.85, 0.1), orange=(0.98, 0.5, 0.05), purple=(0.5, 0.15, 0.65),
    cyan=(0.1, 0.75, 0.8), pink=(0.98, 0.5, 0.7), brown=(0.45, 0.25, 0.1),
    white=(0.93, 0.93, 0.93), black=(0.08, 0.08, 0.08), gray=(0.5, 0.5, 0.5), lime=(0.6, 0.9, 0.2),
    navy=(0.05, 0.08, 0.35), teal=(0.0, 0.45, 0.45), tan=(0.85, 0.7, 0.5),
)  # fmt: skip
UPRIGHT = euler2quat(0, -np.pi / 2, 0)  # SAPIEN's cylinders and capsules lie along x


def _box(color, x, y, z, at=(0, 0, 0)):
    return "box", color, (x / 2, y / 2, z / 2), at, (1, 0, 0, 0), (x / 2, y / 2, z / 2)


def _ball(color, radius, at=(0, 0, 0)):
    return "sphere", color, (radius,), at, (1, 0, 0, 0), (radius, radius, radius)


def _can(color, radius, height, at=(0, 0, 0)):
    return "cylinder", color, (radius, height / 2), at, UPRIGHT, (radius, radius, height / 2)


def _rod(color, radius, length, at=(0, 0, 0)):
    return "cylinder", color, (radius, length / 2), at, (1, 0, 0, 0), (length / 2, radius, radius)


def _pill(color, radius, length, at=(0, 0, 0)):
    half = length / 2
    return "capsule", color, (radius, half), at, (1, 0, 0, 0), (half + radius, radius, radius)


# name, symmetry, parts. Symmetry is how the fingers may close on it: "round" from any side,
# "square" along x or y, "long" across its long side, which is the object's x axis. The first 16 are
# for training, the last 9 are held out.
OBJECTS = [
    ("red cube", "square", [_box("red", 0.04, 0.04, 0.04)]),
    ("green bar", "long", [_box("green", 0.09, 0.03, 0.03)]),
    ("blue can", "round", [_can("blue", 0.022, 0.06)]),
    ("yellow ball", "round", [_ball("yellow", 0.024)]),
    ("orange capsule", "long", [_pill("orange", 0.018, 0.06)]),
    ("purple cross", "square", [_box("purple", 0.08, 0.026, 0.03),
                                _box("purple", 0.026, 0.08, 0.03)]),
    ("dumbbell", "long", [_rod("gray", 0.01, 0.06), _ball("black", 0.02, (-0.035, 0, 0)),
                          _ball("black", 0.02, (0.035, 0, 0))]),
    ("cyan block", "long", [_box("cyan", 0.06, 0.04, 0.025)]),
    ("pink L", "long", [_box("pink", 0.08, 0.026, 0.03),
                        _box("pink", 0.026, 0.05, 0.03, (-0.027, 0.038, 0))]),
    ("brown stick", "long", [_box("brown", 0.12, 0.022, 0.022)]),
    ("mushroom", "round", [_can("white", 0.012, 0.035), _ball("red", 0.023, (0, 0, 0.027))]),
    ("house", "square", [_box("tan", 0.04, 0.04, 0.03),
                         _box("red", 0.028, 0.042, 0.028, (0, 0, 0.02))]),
    ("striped can", "round", [_can("white", 0.02, 0.02, (0, 0, -0.02)), _can("red", 0.02, 0.02),
                              _can("white", 0.02, 0.02, (0, 0, 0.02))]),
    ("domino", "long", [_box("black", 0.035, 0.035, 0.03, (-0.0175, 0, 0)),
                        _box("white", 0.035, 0.035, 0.03, (0.0175, 0, 0))]),
    ("lime disc", "round", [_can("lime", 0.032, 0.025)]),
    ("traffic light", "long", [_box("gray", 0.09, 0.028, 0.022),
                               _ball("red", 0.012, (-0.028, 0, 0.012)),
                               _ball("yellow", 0.012, (0, 0, 0.012)),
                               _ball("green", 0.012, (0.028, 0, 0.012))]),
    ("navy T", "long", [_box("navy", 0.08, 0.026, 0.03),
                        _box("navy", 0.026, 0.05, 0.03, (0, 0.038, 0))]),
    ("teal cylinder", "long", [_rod("teal", 0.018, 0.08)]),
    ("snowman", "round", [_ball("white", 0.024), _ball("white", 0.016, (0, 0, 0.034))]),
    ("orange cube", "square", [_box("orange", 0.045, 0.045, 0.035)]),
    ("blue stick", "long", [_pill("blue", 0.012, 0.11)]),
    ("pyramid", "square", [_box("yellow", 0.06, 0.06, 0.016),
                           _box("orange", 0.04, 0.04, 0.016, (0, 0, 0.016)),
                           _box("red", 0.022, 0.022, 0.016, (0, 0, 0.032))]),
    ("hammer", "long", [_rod("tan", 0.01, 0.09, (-0.02, 0, 0)),
                        _box("gray", 0.03, 0.05, 0.03, (0.035, 0, 0))]),
    ("bowtie", "long", [_box("purple", 0.03, 0.05, 0.026, (-0.028, 0, 0)),
                        _box("pink", 0.03, 0.02, 0.02),
                        _box("purple", 0.03, 0.05, 0.026, (0.028, 0, 0))]),
    ("black puck", "round", [_can("black", 0.03, 0.022)]),
]  # fmt: skip


# Where the hand grasps what it does not grasp in the middle: an L by its longer bar
GRASP_POINTS = {"pink L": [0.012, -0.025, 0]}


def table_texture(index: int) -> np.ndarray:
    """Table top number `index`, (256, 256, 3) uint8: 7 patterns, each in 3 pairs of colours."""
    rng, size = np.random.default_rng(1000 + index), 256
    y, x = np.mgrid[0:size, 0:size] / size
    hue, freq = (index * 0.381966) % 1.0, rng.integers(10, 20)
    first = np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0.25, 0.75), rng.uniform(0.45, 0.9)))
    hue = (hue + rng.uniform(0.08, 0.38)) % 1
    second = np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0.2, 0.7), rng.uniform(0.35, 0.85)))
    pattern = index % 7
    if pattern == 0:  # wood grain
        t = 0.5 + 0.5 * np.sin(2 * np.pi * freq * (x + 0.03 * np.sin(6 * np.pi * y)))
    elif pattern == 1:  # checks
        t = (np.floor(x * freq) + np.floor(y * freq)) % 2
    elif pattern == 2:  # stripes
        t = np.sin(2 * np.pi * freq * (x + y)) > 0
    elif pattern == 3:  # mosaic
        t = np.kron(rng.random((64, 64)), np.ones((size // 64, size // 64)))
    elif pattern == 4:  # marble
        waves = []
        for o in range(4):
            phase = 2**o * np.pi * (x * rng.uniform(4, 12) + y * rng.uniform(4, 12))
            waves.append(np.abs(np.sin(phase + rng.uniform(0, 6))) / 2**o)
        t = sum(waves) / np.max(sum(waves))
    elif pattern == 5:  # dots
        t = ((x * freq) % 1 - 0.5) ** 2 + ((y * freq) % 1 - 0.5) ** 2 < 0.08
    else:  # speckle
        t = np.clip(0.5 + 0.25 * rng.standard_normal((size, size)), 0, 1)
    t = np.asarray(t, float)[..., None]
    noise = 0.02 * rng.standard_normal((size, size, 1))
    return np.uint8(255 * np.clip(first * (1 - t) + second * t + noise, 0, 1))


# One folder per process: a worker must not read half a file
URDF_FOLDER = tempfile.TemporaryDirectory(prefix="pair_vla_")


def light_panda_urdf() -> str:
    """Path of a Panda whose visual meshes are its 2 k-triangle collision meshes.

    The original ones have 136 k, about 40 ms a frame on a CPU renderer. The srdf must lie beside
    the urdf: without it adjacent links collide with each other.
    """
    source = Path(PACKAGE_ASSET_DIR) / "robots/panda/panda_v2.urdf"
    tree = ElementTree.parse(source)
    for link in tree.getroot().findall("link"):
        dark = link.get("name").endswith(("link7", "hand", "leftfinger", "rightfinger"))
        for shape in (*link.findall("visual"), *link.findall("collision")):
            mesh = shape.find("geometry/mesh")
            if mesh is None:
                continue
            name = mesh.get("filename")
            if shape.tag == "visual":
                name = name.replace("/visual/", "/collision/").replace(".glb", ".stl")
                for old in shape.findall("material"):
                    shape.remove(old)
                look, rgba = ("dark", ".25 .25 .27 1") if dark else ("light", ".9 .9 .88 1")
                material = ElementTree.SubElement(shape, "material", name=look)
                ElementTree.SubElement(material, "color", rgba=rgba)
            mesh.set("filename", str(source.parent / name))
    try:
        tree.write(f"{URDF_FOLDER.name}/panda_light.urdf")
        shutil.copy(source.with_suffix(".srdf"), f"{URDF_FOLDER.name}/panda_light.srdf")
    except OSError as error:
        folder = tempfile.gettempdir()
        hint = "free some space there, or set TMPDIR to another folder"
        raise Fault(f"cannot write to the temporary folder {folder} ({error.strerror}): {hint}")
    return f"{URDF_FOLDER.name}/panda_light.urdf"


class BuiltinPack:
    """Panda, 25 procedural objects, 21 procedural tables. DEVIATION: made for two CPU cores, so a
    camera in front of the robot, steps of up to 6 cm and episodes of 20 steps instead of the
    paper's 3 cm and 80."""

    robot_uid = "panda_light"
    robot_look = {}  # of its render materials
    base_pose = sapien.Pose([0.30, 0.028, 0.870], [0, 0, 0, 1])
    init_qpos = np.array([0.0408, -0.2736, 0.0411, -2.8293, 0.0237, 2.523, 0.8458, 0.04, 0.04])
    camera_eye, camera_at = np.array([-0.62, 0.0, 1.36]), np.array([-0.15, 0.0, 0.945])
    image_size = 96
    camera_shape = None  # no pixels of its own: drawn square, at any size
    sim_freq = 100
    max_episode_steps = 20
    # Steps of unbroken grasp that earn the consecutive-grasp reward (RL4VLA: 5 of its shorter ones)
    grasp_streak = 2
    largest_move, largest_turn = 0.06, 0.8  # of the oracle in one control step: metres, radians
    # The box in which the hand works, centre and half size: sft.py writes places as -1 to 1 in it
    workspace = (-0.16, 0.0, TABLE_Z + 0.1), (0.25, 0.25, 0.12)
    names = [name for name, _, _ in OBJECTS]
    # The first of each are for training, the others are held out
    train_objects, train_tables, num_tables = 16, 16, 21
    # The first is for training. DEVIATION: the others are nearer to it than rl4vla's. A policy that
    # has seen one light in a few thousand episodes sees nothing under the strongest ones.
    lights = [Light(), *held_out_lights(0.3)]
    plate_radius, plate_height, plate_spawn_z = 0.055, 0.012, TABLE_Z + 0.008
    settles_again = False
    floor = [0.35, 0.36, 0.38, 1]

    def __init__(self):
        # Metres. The offset puts the middle of the bounding box at the object's origin
        self.sizes, self.offsets = [], []
        for _, _, parts in OBJECTS:
            low = np.min([np.subtract(at, half) for _, _, _, at, _, half in parts], 0)
            high = np.max([np.add(at, half) for _, _, _, at, _, half in parts], 0)
            self.sizes.append(high - low)
            self.offsets.append(-(low + high) / 2)

    def answers(self, places: torch.Tensor) -> torch.Tensor:
        """What sft.py teaches to say to "where is X".

        places (B, 3, 3): metres of X, of the plate and of the hand -> (B, 7) in [-1, 1]: X's x and
        y, the plate's x and y, the hand's x, y and z.
        """
        center, scale = (torch.tensor(x, dtype=torch.float32) for x in self.workspace)
        unit = (places - center) / scale
        return torch.cat([unit[:, 0, :2], unit[:, 1, :2], unit[:, 2]], 1)

    def fault(self) -> str:
        """What is the matter with the pack's files: nothing, they are in mani_skill's wheel."""
        return ""

    def clean_up(self):
        URDF_FOLDER.cleanup()

    def lens(self, height: int, width: int) -> dict:
        return dict(fov=np.deg2rad(38))

    def radius(self, i: int) -> float:
        """Radius in metres of the circle around object i seen from above."""
        return float(np.linalg.norm(self.sizes[i][:2])) / 2

    def plate_gap(self, i: int) -> float:
        """Least distance in metres between the centres of object i and the plate: RL4VLA's 7 cm,
        more for long objects."""
        return max(0.07, self.plate_radius + max(self.sizes[i][:2]) / 2 + 0.005)

    def spawn_z(self, i: int, is_target: bool) -> float:
        """Height of object i's centre at reset: 2 mm above the table, so that nothing bounces or
        rolls away."""
        return TABLE_Z + self.sizes[i][2] / 2 + 0.002

    def build_object(self, i, builder, material):
        for kind, color, dims, at, rotation, _ in OBJECTS[i][2]:
            pose = sapien.Pose(np.array(at) + self.offsets[i], rotation)
            rgba = [*(c**2.2 for c in COLORS[color]), 1]
            look = RenderMaterial(base_color=rgba, roughness=0.6, specular=0.3)
            args = (dims,) if kind == "box" else dims  # a box takes its half sizes as one argument
            getattr(builder, f"add_{kind}_collision")(pose, *args, material=material, density=600)
            getattr(builder, f"add_{kind}_visual")(pose, *args, material=look)

    def build_plate(self, builder, material):
        for radius, z, shade in (
            (0.042, -0.003, (0.85, 0.85, 0.88)),
            (0.055, 0.003, (0.95, 0.95, 0.98)),
        ):
            pose = sapien.Pose([0, 0, z], UPRIGHT)
            builder.add_cylinder_collision(pose, radius, 0.003, material=material, density=1000)
            look = RenderMaterial(base_color=[*shade, 1], roughness=0.5)
            builder.add_cylinder_visual(pose, radius, 0.003, material=look)
        look = RenderMaterial(base_color=[0.55, 0.62, 0.75, 1], roughness=0.5)
        pose = sapien.Pose([0, 0, 0.0055], UPRIGHT)
        builder.add_cylinder_visual(pose, 0.038, 0.001, material=look)

    @cached_property
    def table_materials(self) -> list[RenderMaterial]:
        """One per table, made once per process and shared by all its scenes."""
        materials = [RenderMaterial(roughness=0.9, specular=0.05) for _ in range(self.num_tables)]
        for i, material in enumerate(materials):
            rgba = np.dstack([table_texture(i), np.full((256, 256), 255, np.uint8)])
            texture = RenderTexture2D(rgba, "R8G8B8A8Unorm", mipmap_levels=4, srgb=True)
            material.base_color_texture = texture
        return materials

    def photos(self, height: int, width: int):
        """Of tables, behind the scene: none, because the tables here are surfaces."""

    def oracle(self, scene) -> np.ndarray:
        """One action (7,) float32 from privileged state: reach, turn, descend, close, lift, carry,
        lower, let go.

        Every phase is decided from what the scene looks like now, so that a policy that sees one
        frame can copy it.
        """
        tcp, plate = scene.tcp_entity.pose.p, scene.plate_entity.pose.p
        target, half = scene.target_entity.pose.p, scene.target_half_z
        move, turn, gripper = np.zeros(3), 0.0, 1.0
        if scene.success:  # done: let go, then rise (both at once would fling the object away)
            if not scene.grasped:
                move[2] = TABLE_Z + 0.15 - tcp[2]
        elif scene.grasped:
            gripper = -1.0
            bottom, to_plate = target[2] - half, plate[:2] - target[:2]
            if np.linalg.norm(to_plate) > 0.03:
                move[2] = TABLE_Z + 0.035 - bottom
                if bottom > TABLE_Z + 0.015:
                    move[:2] = to_plate
            else:
                move[:] = (*to_plate, TABLE_Z + 0.010 - bottom)
        else:
            # Lower, and the fingertips would press on the table
            grasp_z = max(target[2] - 0.2 * half, TABLE_Z + 0.019)
            hover_z = TABLE_Z + 2 * half + 0.055
            name = self.names[scene.episode.target]
            grasp = (scene.target_entity.pose * sapien.Pose(GRASP_POINTS.get(name, [0, 0, 0]))).p
            offset, turn = grasp[:2] - tcp[:2], grasp_turn(scene)
            move[:2] = offset
            far = np.linalg.norm(offset)
            if far > 0.02 or turn:
                move[2] = max(hover_z - tcp[2], -0.05 if far > 0.05 else -self.largest_move)
            elif tcp[2] - grasp_z > 0.01:
                move[2] = grasp_z - tcp[2]
            else:
                move[:], turn, gripper = 0, 0, -1.0
        move[:2] *= min(1.0, self.largest_move / max(np.linalg.norm(move[:2]), 1e-9))
        to_base = self.base_pose.inv().to_transformation_matrix()[:3, :3]
        move = np.clip(to_base @ move, -self.largest_move, self.largest_move)
        turn = np.clip(turn, -self.largest_turn, self.largest_turn)
        return np.array([*move, 0, 0, turn, gripper], np.float32)


def grasp_turn(scene) -> float:
    """Signed angle in radians that the hand should turn about the vertical: 0 unless a long target
    lies along the fingers.

    Closing fingers straighten by themselves what lies askew. A hand kept square to the target at
    every step would be a label that a policy cannot read off 96 pixels: it hovers.
    """
    name, symmetry, _ = OBJECTS[scene.episode.target]
    if symmetry != "long":
        return 0.0
    error = yaw_of(scene.target_entity.pose) - yaw_of(scene.tcp_entity.pose)
    error = (error + np.pi / 2 - 1e-4) % np.pi - np.pi / 2 + 1e-4
    askew = 0.6 if name in GRASP_POINTS else 0.9
    return error if abs(error) > askew else 0.0


def yaw_of(pose: sapien.Pose) -> float:
    x_axis = pose.to_transformation_matrix()[:2, 0]
    return float(np.arctan2(x_axis[1], x_axis[0]))


class EEPoseController(PDEEPoseController):
    """ManiSkill's, with poses composed by SAPIEN: torch needs many small operations for one."""

    @property
    def ee_pose_at_base(self) -> Pose:
        root, hand = self.root_link._objs[0], self.ee_link._objs[0]
        return Pose.create(root.entity_pose.inv() * hand.entity_pose)

    def compute_target_pose(self, prev_ee_pose_at_base, action):
        before, (x, y, z, *angles) = prev_ee_pose_at_base.sp, action[0].tolist()
        turn = sapien.Pose(q=euler2quat(*angles, "rxyz"))
        return Pose.create(sapien.Pose(before.p + [x, y, z], (turn * before).q))

    def set_drive_targets(self, targets):
        for joint, target in zip(self.joints, targets[0].tolist()):
            joint._objs[0].set_drive_target(target)


@register_agent()
class LightPanda(Panda):
    """Panda under RL4VLA's control: delta pose of the hand in the base frame (metres, XYZ euler
    radians), but counted from where the hand is; gripper > 0 opens."""

    uid = "panda_light"
    urdf_path = light_panda_urdf()

    @property
    def _controller_configs(self):
        arm = PDEEPoseControllerConfig(
            self.arm_joint_names,
            pos_lower=-1.0,
            pos_upper=1.0,
            rot_lower=-np.pi / 2,
            rot_upper=np.pi / 2,
            stiffness=1e3,
            damping=1e2,
            force_limit=100,
            ee_link=self.ee_link_name,
            urdf_path=self.urdf_path,
            normalize_action=False,
            # DEVIATION: RL4VLA accumulates targets; here the camera sees all there is to know
            use_target=False,
        )
        if not self.scene.gpu_sim_enabled:
            arm.controller_cls = EEPoseController
        gripper = PDJointPosMimicControllerConfig(
            self.gripper_joint_names,
            lower=-0.01,
            upper=0.04,
            stiffness=1e3,
            damping=1e2,
            force_limit=100,
            normalize_action=True,
            drive_mode="force",
            mimic={"panda_finger_joint2": {"joint": "panda_finger_joint1"}},
        )
        return {"pd_ee_target_delta_pose": dict(arm=arm, gripper=gripper)}


PACK = BuiltinPack()
