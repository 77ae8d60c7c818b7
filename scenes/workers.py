"""N scenes spread over worker processes, one process per core: what `--sim cpu` runs.

The main process samples episodes and sends actions; pictures come back through shared memory. A
worker that fails or dies ends the run with one sentence, never a hang.
"""

from __future__ import annotations

import importlib
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np
import torch

from runtime import Fault


def view_stream(episode, alter_seed: int, elapsed: int, name: str) -> np.random.Generator:
    """Random numbers of one changed view: they depend on what is shown, not on who shows it."""
    return np.random.default_rng([alter_seed, episode.id, elapsed] + [1] * (name == "rgb_pre"))


def frame_shape(pack, image_size: int | None, resize: str | None) -> tuple[int, int]:
    """Height and width of the frames: a square, unless the camera's aspect ratio is kept."""
    size = image_size or pack.image_size
    if resize == "keep" and pack.camera_shape:
        height, width = pack.camera_shape
        return size * height // width, size
    return size, size


def shared_row(shape: tuple[int, int], views) -> np.dtype:
    """What one scene shows the main process: its row of an array in shared memory."""
    picture = (*shape, 3)
    fields = [("rgb", np.uint8, picture), ("mask", np.bool_, shape), ("state", np.float32, 8)]
    fields += [(name, np.uint8, picture) for name in views]
    fields += [("reward", np.float32), ("episode_return", np.float32), ("view_seconds", np.float64)]
    fields += [(name, np.bool_) for name in ("success", "success_once", "grasped")]
    return np.dtype(fields, align=True)


def reserve(size: int):
    """An open file of `size` bytes for the frames. They are there from now on: a worker that writes
    to a page for which no room is left would be killed without a word."""
    try:
        file = tempfile.TemporaryFile()
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        lacks = f"no room for {size / 1e6:.0f} MB of frames ({error.strerror})"
        raise Fault(
            f"the temporary folder {tempfile.gettempdir()} has {lacks}: free some, set TMPDIR to"
            " another folder, or use fewer --num-envs"
        )
    return file


def name_of(function) -> tuple[str, str]:
    """A function defined at the top of a file, as (module, name): a worker finds it even in the
    running script."""
    module = function.__module__
    return Path(sys.argv[0]).stem if module == "__main__" else module, function.__qualname__


def find(name: tuple[str, str]):
    return vars(importlib.import_module(name[0]))[name[1]]


# ------------------------------------------------------------ worker
def claim_core() -> tuple[int | None, socket.socket | None]:
    """A core that no other worker on this machine has claimed, and what holds the claim while it is
    open. None where all are claimed: more workers than cores, of whatever jobs, share them as the
    system sees fit."""
    for core in sorted(os.sched_getaffinity(0)):
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            claim.bind(f"\0pair-vla core {core}")  # a name without a file, gone with its process
            return core, claim
        except OSError:  # another worker has it
            claim.close()
    return None, None


def empty_tables(scenes, tables: list[int]) -> np.ndarray:
    return scenes[0].empty_tables(tables)


def serve(conn_fd: int, memory_fd: int):
    """A worker process: owns some of the scenes, obeys (command, argument) messages until the pipe
    closes."""
    torch.set_num_threads(1)
    conn, scenes = Connection(conn_fd), []
    try:
        setup = conn.recv()
        make = find(setup["make"])
        # The simulator, which the main process need not import
        from scenes.task import render_backend

        if render_backend() == "sapien_cpu":
            # Mesa draws in a thread of its own, which may be slow to wake on another core
            core, claim = claim_core()
            if claim:
                os.sched_setaffinity(0, {core})
        views = {name: find(view) for name, view in setup["views"].items()}
        arrays = np.frombuffer(mmap.mmap(memory_fd, 0), shared_row(setup["shape"], views))
        scenes += [make(*setup["scene"]) for _ in setup["slots"]]
        conn.send(("ok", None))

        def look(scene, slot):
            arrays["rgb"][slot], ids = scene.picture()
            arrays["mask"][slot] = scene.foreground(ids)
            arrays["state"][slot] = scene.state()
            start = time.perf_counter()
            for name, view in views.items():
                stream = view_stream(scene.episode, setup["alter_seed"], scene.elapsed, name)
                arrays[name][slot] = view(scene, [stream])
            arrays["view_seconds"][slot] += time.perf_counter() - start

        while True:
            command, argument = conn.recv()
            answer = None
            if command == "reset":
                episodes, rebuild, setup["alter_seed"] = argument
                for scene, slot, episode in zip(scenes, setup["slots"], episodes):
                    options = dict(episodes=[episode], reconfigure=rebuild)
                    scene.reset(seed=0, options=options)
                    look(scene, slot)
                answer = [instruction for scene in scenes for instruction in scene.instructions]
            elif command == "step":
                for scene, slot, chunk in zip(scenes, setup["slots"], argument):
                    reward = 0.0
                    for action in chunk:
                        scene.step(action)
                        scene.elapsed += 1
                        reward += scene.reward()
                    row = arrays[slot]
                    row["reward"], row["episode_return"] = reward, scene.return_so_far
                    row["success"], row["success_once"] = scene.success, scene.success_once
                    row["grasped"] = scene.ever_grasped
                    look(scene, slot)
            elif command == "map":
                answer = find(argument[0])(scenes, *argument[1])
            conn.send(("ok", answer))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the main process is gone or has closed us
    except Fault as error:
        conn.send(("fault", str(error)))
    except Exception:
        conn.send(("error", traceback.format_exc()))
    finally:
        for scene in scenes[:1]:
            # Here, because a busy machine's worker is killed before Python would
            scene.pack.clean_up()


# ------------------------------------------------------------ main process
class VecEnv:
    """N scenes in worker processes, all at the same step of their episodes. envs.make_envs makes
    it.

    pack: the scenes' asset pack. sample: (episode id, split name) -> Episode. make: (the pack's
    name, image size, resize) -> a scene, defined at the top of a file. views: name in the
    observation -> function of views.py.
    """

    def __init__(self, num_envs, pack, image_size, resize, sample, make, views, num_workers):
        self.num_envs, self.num_workers = num_envs, num_workers
        self.pack, self.sample = pack, sample
        self.max_episode_steps = pack.max_episode_steps
        self.instructions: list[str] = []
        self.elapsed = 0
        self._pictures = ["rgb", "mask", "state", *views]
        shape = frame_shape(pack, image_size, resize)
        row = shared_row(shape, views)
        memory = reserve(num_envs * row.itemsize)
        self._arrays = np.frombuffer(mmap.mmap(memory.fileno(), 0), row)
        slots = np.array_split(np.arange(num_envs), num_workers)
        self._slots = [list(map(int, part)) for part in slots]
        self._workers = []
        code = f"import sys; sys.path[:] = {sys.path!r}; from scenes.workers import serve; serve"
        setup = dict(
            make=name_of(make),
            scene=(pack.name, image_size, resize),
            shape=shape,
            views={name: name_of(view) for name, view in views.items()},
        )
        for slots in self._slots:
            ours, theirs = socket.socketpair()
            fds = (theirs.fileno(), memory.fileno())
            # A process group of its own: Ctrl-C is the main process's to handle, from the worker's
            # first instant on
            process = subprocess.Popen(
                [sys.executable, "-c", f"{code}{fds}"],
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                process_group=0,
            )
            theirs.close()
            self._workers.append((process, Connection(ours.detach())))
            self._workers[-1][1].send(dict(setup, slots=slots))
        memory.close()
        self._gather()

    @property
    def view_seconds(self) -> float:
        """How long each worker has drawn changed views so far, on average."""
        return float(self._arrays["view_seconds"].sum()) / self.num_workers

    def _send(self, messages):
        for (process, conn), message in zip(self._workers, messages):
            try:
                conn.send(message)
            except (BrokenPipeError, ConnectionResetError):
                self._died(process)

    def _gather(self) -> list:
        """One answer from every worker, in order. A worker that failed or died ends the run with a
        Fault, never a hang."""
        answers = {}
        while len(answers) < len(self._workers):
            waiting = {
                conn: (i, process)
                for i, (process, conn) in enumerate(self._workers)
                if i not in answers
            }
            for conn in wait(list(waiting)):
                i, process = waiting[conn]
                try:
                    kind, answer = conn.recv()
                except (EOFError, ConnectionResetError):
                    self._died(process)
                if kind != "ok":
                    self.close()
                    if kind == "error":
                        print(answer, file=sys.stderr)
                        answer = f"environment worker {i} failed, its traceback is above"
                        answer += "; nothing saved so far is lost"
                    raise Fault(answer)
                answers[i] = answer
        return [answers[i] for i in range(len(self._workers))]

    def _died(self, process):
        code = process.wait()
        self.close()
        how = f"exited with code {code}"
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        hints = {
            -signal.SIGKILL: " (out of memory? use fewer --num-envs)",
            -signal.SIGBUS: f" (is the temporary folder {tempfile.gettempdir()} full?)",
        }
        hint = hints.get(code, "")
        then = "the run cannot go on, but nothing saved so far is lost"
        raise Fault(f"environment worker {process.pid} {how}{hint}; {then}")

    def _read(self, *names) -> dict:
        return {name: torch.from_numpy(self._arrays[name].copy()) for name in names}

    def reset(self, episode_ids, split="train", rebuild: bool = False, alter_seed: int = 0) -> dict:
        """Start one episode per environment.

        Args:
            episode_ids: N ints. split: one name for all, or N names.
            rebuild: make the scenes anew (0.2 s each), so that the episode does not depend on what
            was simulated before, to
                the last bit. Without it states differ by about 1e-8. Evaluation uses it, training
                does not.
            alter_seed: seeds what the rendered views draw, together with episode id and step.
        Returns: obs, a dict of torch tensors: rgb (N, H, W, 3) uint8, mask (N, H, W) bool (M of Eq.
        (5)), state (N, 8)
            float32, with `alter` rgb_alt and with `preserve` rgb_pre (N, H, W, 3) uint8.
            `self.instructions` holds N sentences.
        """
        splits = [split] * self.num_envs if isinstance(split, str) else list(split)
        assert len(episode_ids) == len(splits) == self.num_envs
        episodes = [self.sample(int(i), name) for i, name in zip(episode_ids, splits)]
        parts = [[episodes[slot] for slot in slots] for slots in self._slots]
        self._send([("reset", (part, rebuild, alter_seed)) for part in parts])
        self.instructions = sum(self._gather(), [])
        self.elapsed = 0
        return self._read(*self._pictures)

    def step(self, actions: torch.Tensor):
        """Carry out a chunk of actions (N, chunk, 7): metres and radians in the robot's base frame,
        gripper > 0 opens.

        Rewards are summed over the chunk; steps past the end of the episode are not taken; one
        picture is rendered at the end. Returns obs, reward (N,) float32, done (N,) bool, info:
        success, success_once, grasped (N,) bool, episode_return (N,) float32.
        """
        actions = actions[:, : self.max_episode_steps - self.elapsed]
        actions = actions.cpu().numpy().astype(np.float32)
        shape = actions.shape
        assert shape[0] == self.num_envs and shape[1] > 0 and shape[2] == 7, shape
        self._send([("step", actions[slots]) for slots in self._slots])
        self._gather()
        self.elapsed += actions.shape[1]
        done = torch.full((self.num_envs,), self.elapsed >= self.max_episode_steps)
        info = self._read("reward", "success", "success_once", "grasped", "episode_return")
        return self._read(*self._pictures), info.pop("reward"), done, info

    def backgrounds(self, tables=None) -> torch.Tensor:
        """(K, H, W, 3) uint8: tables (default: those of training) with every object and the robot
        invisible."""
        tables = np.arange(self.pack.train_tables) if tables is None else np.array(tables)
        parts = np.array_split(tables, self.num_workers)
        pictures = self.map(empty_tables, *[(part.tolist(),) for part in parts])
        return torch.from_numpy(np.concatenate([part for part in pictures if len(part)]))

    def map(self, function, *args) -> list:
        """function(scenes of the worker, *args[i]) in every worker i at once; returns one result
        per worker.

        `args` is one tuple of arguments per worker. `function` must be defined at the top of a
        file.
        """
        self._send([("map", (name_of(function), a)) for a in args])
        return self._gather()

    def close(self):
        for process, conn in self._workers:
            conn.close()
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._workers = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
