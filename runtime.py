"""What every long run needs and no paper describes: errors, ranks, seeds, whole directories, checkpoints, guards.

Nothing here knows what a policy or a simulator is. The method is in ppo_pair.py.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError


# ------------------------------------------------------------------------------------------ errors
class Fault(Exception):
    """Something the user can mend. The text is one sentence: what is wrong and what to do."""


def command_line(main):
    """Run main(). A Fault is one line on stderr and exit code 2, Ctrl-C is one line and 130."""
    try:
        main()
    except Fault as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # once is enough
        print("interrupted: every file saved so far is whole", file=sys.stderr)
        sys.exit(130)


# ------------------------------------------------------------------------------------------ ranks
def from_torchrun(name: str, alone: int) -> int:
    return int(os.environ.get(name, alone))


RANK, WORLD = from_torchrun("RANK", 0), from_torchrun("WORLD_SIZE", 1)
LOCAL_RANK, LOCAL_WORLD = from_torchrun("LOCAL_RANK", 0), from_torchrun("LOCAL_WORLD_SIZE", 1)


def join_ranks(backend: str):
    """Connect the processes that torchrun started. Alone: nothing. backend: "nccl" or "gloo"."""
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group(backend, timeout=timedelta(hours=2))


def leave_ranks():
    if dist.is_initialized():
        dist.destroy_process_group()


def collective(function, *args):
    """A torch.distributed call where there are several ranks. If one has died, the others end with a sentence."""
    if dist.is_initialized():
        try:
            function(*args)
        except RuntimeError as error:
            reason = str(error).splitlines()[0][:100]
            raise Fault(f"another rank ended, so rank {RANK} does too ({reason})") from None


def all_reduce(x: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all ranks, in place."""
    collective(dist.all_reduce, x)
    return x


def from_rank_0(value):
    """The value that rank 0 has, on every rank."""
    values = [value]
    collective(dist.broadcast_object_list, values)
    return values[0]


def own_slots(num_envs: int) -> range:
    """Which of num_envs environments are this rank's."""
    return range(num_envs * RANK // WORLD, num_envs * (RANK + 1) // WORLD)


# ------------------------------------------------------------------------------------------ seeds
MAX_SEED = 2**31 - 1


def seed_all(*key: int):
    """Every iteration starts from seeds of its own, so a resumed run needs no random state of the one before."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # CUDA's, too


# purpose: first id, ids per seed. A seed is 0 to MAX_SEED, and no two ranges meet.
EPISODE_RANGES = {
    "scenes": (0, 0, 200_000),  # sft.py uses the same episodes with every seed
    "demos": (200_000, 0, 200_000),
    "mixed demos": (400_000, 0, 200_000),
    "held-out demos": (600_000, 0, 200_000),
    "eval": (1_000_000_000, 1_000_000, 1_000_000),
    "train": (2**62, 2**31, 2**31),
}


def episode_ids(purpose: str, seed: int, first: int, count: int) -> range:
    """Ids first ... first + count - 1 of one purpose and seed. Ids of two purposes are never equal, for any seeds.

    Raises: Fault where the purpose has fewer ids.
    """
    start, per_seed, size = EPISODE_RANGES[purpose]
    if not 0 <= seed <= MAX_SEED:
        raise Fault(f"the seed {seed} is out of range: use 0 to {MAX_SEED}")
    if first + count > size:
        raise Fault(
            f"{first + count} episodes for {purpose!r} are too many: at most {size} are set apart for it"
        )
    start += seed * per_seed + first
    return range(start, start + count)


# ------------------------------------------------------------------------------------------ files
def read_json(file: Path):
    try:
        return json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise Fault(f"{file} cannot be read ({error})") from None


def write_text(path: Path, text: str):
    """Under a temporary name first, so that a reader never sees half a file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


@contextmanager
def whole_directory(directory):
    """Yields a Path to write flat files into. At the end they appear as `directory`, whole and on disk, or not at all.

    SHA256SUMS (check it with `sha256sum -c SHA256SUMS`) is added, what `directory` held before goes.
    """
    directory = Path(directory)
    temporary, old = (
        directory.with_name(f"{directory.name}.{name}") for name in ("partial", "old.partial")
    )
    try:
        for leftover in (temporary, old):
            if leftover.exists():
                shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
        yield temporary
        names = sorted(file.name for file in temporary.iterdir())
        sums = "".join(f"{file_hash(temporary / name)}  {name}\n" for name in names)
        (temporary / "SHA256SUMS").write_text(sums)
        for path in (*(temporary / name for name in names), temporary / "SHA256SUMS", temporary):
            sync(path)
        if directory.exists():
            os.replace(directory, old)
        os.replace(temporary, directory)
        sync(directory.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = f"{error}".replace("\n", " ")
        raise Fault(
            f"{directory} could not be written ({reason}); nothing saved before is touched"
        ) from error


def file_hash(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path):
    """Wait until a file's or a directory's content is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verify(directory: Path):
    """Compare every file that `whole_directory` wrote with its hash. A Fault names the first that differs."""
    try:
        lines = (directory / "SHA256SUMS").read_text().splitlines()
        if not lines:
            raise Fault(f"{directory / 'SHA256SUMS'} is empty: the directory is damaged")
        for line in lines:
            wanted, _, name = line.partition("  ")
            if file_hash(directory / name) != wanted:
                raise Fault(
                    f"{directory / name} is damaged: it is not the file that was saved (see SHA256SUMS there)"
                )
    except (OSError, UnicodeDecodeError) as error:
        raise Fault(f"{directory} is damaged or incomplete ({error})") from None


# ------------------------------------------------------------------------------------------ checkpoints
def checkpoints(run_dir: Path) -> list[Path]:
    """Oldest first."""
    return sorted(
        p for p in run_dir.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()
    )


def newest_checkpoint(run_dir: Path) -> Path:
    """The newest that is whole: every file in it has the hash it was saved with."""
    for path in reversed(checkpoints(run_dir)):
        try:
            verify(path)
            return path
        except Fault as error:
            print(f"{error}. Going back to the checkpoint before.", file=sys.stderr)
    raise Fault(
        f"{run_dir} holds no whole checkpoint-* directory: start another run, or name another --resume"
    )


def save_checkpoint(run_dir: Path, policy, args: dict, trainer: dict, keep: int) -> Path:
    """Write run_dir/checkpoint-ITERATION, whole or not at all -> its path. `best` links to the best.

    The newest `keep` and the best stay. trainer: iteration, best (its success, its iteration), optimizer, records.
    """
    path = run_dir / f"checkpoint-{trainer['iteration']:06d}"
    with whole_directory(path) as directory:
        policy.save(directory)
        (directory / "args.json").write_text(json.dumps(args, indent=2))
        buffer = io.BytesIO()  # a full disk is an OSError then
        torch.save(trainer, buffer)
        (directory / "trainer.pt").write_bytes(buffer.getbuffer())
    best = f"checkpoint-{trainer['best'][1]:06d}"
    link = run_dir / "best.partial"
    link.unlink(missing_ok=True)
    link.symlink_to(best)
    os.replace(link, run_dir / "best")
    for old in checkpoints(run_dir)[:-keep]:
        if old.name != best:
            shutil.rmtree(old.replace(old.with_name(old.name + ".partial")))
    return path
