"""N scenes spread over worker processes, one process per core: what `--sim cpu` runs.

The main process samples episodes and calls functions in the workers, on the scenes that each has. A
worker that fails or dies ends the run with one sentence, never a hang.
"""

import os
import signal
import socket
import subprocess
import sys
import traceback
from multiprocessing.connection import Connection, Pipe, wait

import numpy as np
import torch

from runtime import Fault
from scenes.task import render_backend


# ------------------------------------------------------------ worker
def claim_core() -> int | None:
    """Stay on a core that no other worker on this machine has claimed -> the file descriptor that
    holds the claim while it is open. None where all are claimed: more workers than cores, of
    whatever jobs, share them as the system sees fit."""
    if sys.platform != "linux":
        return None
    for core in sorted(os.sched_getaffinity(0)):
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            claim.bind(f"\0pair-vla core {core}")  # a name without a file, gone with its process
        except OSError:  # another worker has it
            claim.close()
            continue
        os.sched_setaffinity(0, {core})
        return claim.detach()


def build(scenes, make, count: int):
    scenes += [make() for _ in range(count)]


def start(scenes, episodes, rebuild: bool, *views) -> list[dict]:
    """-> of each scene what PutOnPlate.look shows."""
    shown = []
    for scene, episode in zip(scenes, episodes):
        scene.reset(seed=0, options=dict(episodes=[episode], reconfigure=rebuild))
        shown.append(scene.look(*views))
    return shown


def play(scenes, chunks, *views) -> list[tuple[dict, dict]]:
    """-> of each scene what PutOnPlate.play and PutOnPlate.look say."""
    return [(scene.play(chunk), scene.look(*views)) for scene, chunk in zip(scenes, chunks)]


def empty_tables(scenes, tables: list[int]) -> np.ndarray:
    return scenes[0].empty_tables(tables)


def view_seconds(scenes) -> float:
    return sum(scene.view_seconds for scene in scenes)


def serve(number: int, conn_fd: int):
    """Worker process `number`: calls (function, arguments) on its scenes until the pipe closes. An
    answer that is a Fault ends the run."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the main process ends this one, and saves first
    # ManiSkill's reset keeps the random state of every GPU, and would start CUDA in each worker
    torch.cuda.device_count = lambda: 0
    conn, scenes = Connection(conn_fd), []
    try:
        if render_backend() == "sapien_cpu":
            # Mesa draws in a thread of its own, which may be slow to wake on another core
            claim_core()
        while True:
            function, arguments = conn.recv()
            conn.send(function(scenes, *arguments))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the main process is gone or has closed us
    except Fault as error:
        conn.send(error)
    except Exception:  # whatever it is: the main process waits for an answer
        traceback.print_exc()
        failed = f"environment worker {number} failed, its traceback is above"
        conn.send(Fault(f"{failed}; nothing saved so far is lost"))
    finally:
        for scene in scenes[:1]:
            # Here, because a busy machine's worker is killed before Python would
            scene.pack.clean_up()


# ------------------------------------------------------------ main process
def stacked(rows: list[dict]) -> dict[str, torch.Tensor]:
    """One dict per scene -> its values as tensors (N, ...)."""
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}


class VecEnv:
    """N scenes in worker processes, all at the same step of their episodes.

    pack: the scenes' asset pack. sample: (episode id, split name) -> Episode. make: () -> a scene,
    in a worker. views: name in the observation -> function of views.py.
    """

    def __init__(self, num_envs, pack, sample, make, views, num_workers):
        self.num_envs, self.num_workers = num_envs, num_workers
        self.pack, self.sample = pack, sample
        self.views = views
        self.max_episode_steps = pack.max_episode_steps
        self.instructions: list[str] = []
        self.elapsed = 0
        self._slots = [part.tolist() for part in np.array_split(np.arange(num_envs), num_workers)]
        self._workers = []
        code = f"import sys; sys.path[:] = {sys.path!r}; from scenes.workers import serve; serve"
        for number in range(num_workers):
            ours, theirs = Pipe()
            # A process group of its own: Ctrl-C is the main process's to handle, from the worker's
            # first instant on
            process = subprocess.Popen(
                [sys.executable, "-c", f"{code}({number}, {theirs.fileno()})"],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                process_group=0,
            )
            theirs.close()
            self._workers.append((process, ours))
        self.map(build, *[(make, len(slots)) for slots in self._slots])

    def map(self, function, *args) -> list:
        """function(scenes of the worker, *args[i]) in every worker i at once -> one result per
        worker. `function` is at the top of a file that is not the running script: the workers
        import it. A worker that failed or died ends the run with a Fault."""
        waiting = {conn: i for i, (_, conn) in enumerate(self._workers)}
        answers = [None] * len(waiting)
        for (process, conn), arguments in zip(self._workers, args):
            try:
                conn.send((function, arguments))
            except (BrokenPipeError, ConnectionResetError):
                self._died(process)
        while waiting:
            for conn in wait(waiting):
                i = waiting.pop(conn)
                try:
                    answers[i] = conn.recv()
                except (EOFError, ConnectionResetError):
                    self._died(self._workers[i][0])
                if isinstance(answers[i], Fault):
                    self.close()
                    raise answers[i]
        return answers

    def _died(self, process):
        code = process.wait()
        self.close()
        how = f"exited with code {code}"
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            how += " (out of memory? use fewer --num-envs)"
        then = "the run cannot go on, but nothing saved so far is lost"
        raise Fault(f"environment worker {process.pid} {how}; {then}")

    @property
    def view_seconds(self) -> float:
        """How long each worker has drawn changed views so far, on average."""
        return sum(self.map(view_seconds, *[()] * self.num_workers)) / self.num_workers

    def _sample(self, episode_ids, split: str) -> list:
        assert len(episode_ids) == self.num_envs
        episodes = [self.sample(int(i), split) for i in episode_ids]
        self.instructions = [f"put {self.pack.names[e.target]} on plate" for e in episodes]
        return episodes

    def _done(self) -> torch.Tensor:
        return torch.full((self.num_envs,), self.elapsed >= self.max_episode_steps)

    def reset(self, episode_ids, split="train", rebuild: bool = False, view_seed: int = 0) -> dict:
        """Start one episode per environment.

        Args:
            episode_ids: N ints. split: its name.
            rebuild: make the scenes anew (0.2 s each), so that the episode does not depend on what
                was simulated before, to the last bit. Without it states differ by about 1e-8.
                Evaluation does so at each reset, training after each checkpoint.
            view_seed: seeds what the rendered views draw, together with episode id and step.
        Returns: obs, a dict of torch tensors: rgb (N, H, W, 3) uint8, mask (N, H, W) bool (M of Eq.
            (5)), state (N, 8) float32, with make_envs' `alter` rgb_alt, with `preserve` rgb_pre
            (N, H, W, 3) uint8. `self.instructions` holds N sentences.
        """
        episodes = self._sample(episode_ids, split)
        self.elapsed, self._look = 0, (self.views, view_seed)
        parts = [[episodes[slot] for slot in slots] for slots in self._slots]
        shown = self.map(start, *[(part, rebuild, *self._look) for part in parts])
        return stacked(sum(shown, []))

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
        rows = self.map(play, *[(actions[slots], *self._look) for slots in self._slots])
        info, obs = map(stacked, zip(*sum(rows, [])))
        self.elapsed += actions.shape[1]
        info["episode_return"] = info["episode_return"].float()
        return obs, info.pop("reward").float(), self._done(), info

    def backgrounds(self, tables=None) -> torch.Tensor:
        """(K, H, W, 3) uint8: tables (default: those of training) with every object and the robot
        invisible."""
        tables = np.arange(self.pack.train_tables) if tables is None else np.array(tables)
        parts = np.array_split(tables, self.num_workers)
        pictures = self.map(empty_tables, *[(part.tolist(),) for part in parts])
        return torch.from_numpy(np.concatenate([part for part in pictures if len(part)]))

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
