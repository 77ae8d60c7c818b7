"""Does this machine render? `python envs.py --check` runs this. Prints what is here, or what to
install."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)

import torch

from envs import INSTALL, find_pack, make_env
from runtime import Fault


def draw_two_frames(assets: str):
    """Runs in a child process, because a broken driver may take its process down: prints one line
    of JSON."""
    import sapien

    from scenes.task import render_backend

    start = time.perf_counter()
    env = make_env(assets)
    env.picture()
    first = time.perf_counter() - start
    start = time.perf_counter()
    rgb, ids = env.picture()
    frame = time.perf_counter() - start
    device = sapien.render.get_device_summary().strip()
    draws = render_backend().removeprefix("sapien_").upper()
    device += f"\nphysics on the CPU, pictures on {draws}"
    # The mask comes from the second picture that a driver must be able to draw
    found = dict(contrast=float(rgb.std()), shown=float(env.foreground(ids).mean()))
    print(json.dumps(dict(found, device=device, first=first, frame=frame)))


def check(assets: str):
    """Prints what is here. Raises Fault with what to install where no picture comes out."""
    if assets == "flat":
        return print("ok: Flatland needs no simulator and no files")
    system, processor = platform.system(), platform.machine()
    if (system, processor) != ("Linux", "x86_64"):
        raise Fault(
            f"the simulator runs on Linux with an x86-64 processor, and this is {system} on"
            f" {processor}: Flatland needs no simulator, use --backbone openvla-flat or pi05-flat"
        )
    find_pack(assets)
    names = ("torch", "mani_skill", "sapien", "transformers")
    print("python", sys.version.split()[0], *(f"| {name} {version(name)}" for name in names))
    gigabyte = 1e9
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / gigabyte
    disk = shutil.disk_usage(".").free / gigabyte
    gpu = "no CUDA device"
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0] / gigabyte
        gpu = f"{free:.1f} GB on {torch.cuda.get_device_name()}"
    cores = len(os.sched_getaffinity(0))
    print(f"{cores} cores | free: {memory:.1f} GB memory, {disk:.1f} GB disk here | {gpu}")
    code = f"import sys; sys.path.insert(0, {ROOT!r}); from tools import preflight"
    command = [sys.executable, "-c", f"{code}; preflight.draw_two_frames({assets!r})"]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        raise Fault(f"the Vulkan driver did not draw one frame in 300 s: {INSTALL}")
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        raise Fault(f"the Vulkan driver crashed ({name}) when it had to draw: {INSTALL}")
    if child.returncode > 0:
        reason = (child.stderr.strip() or "it said nothing").splitlines()[-1]
        if "no Vulkan device" in reason:  # make_env's own sentence
            raise Fault(reason.removeprefix("runtime.Fault: "))
        print(child.stderr, file=sys.stderr)
        raise Fault(f"no frame could be drawn, the traceback is above ({reason})")
    found = json.loads(child.stdout.splitlines()[-1])
    print(found["device"])
    first, frame = found["first"], 1000 * found["frame"]
    print(f"first frame after {first:.1f} s (compiles shaders), the next in {frame:.1f} ms")
    if found["contrast"] < 5 or not 0.01 < found["shown"] < 0.9:
        raise Fault(f"the Vulkan driver drew an empty picture: {INSTALL}")
    print("ok: this machine renders")
