"""What every long run needs and no paper describes: flags, ranks, seeds, files, guards, logs.

The method is in ppo_pair.py. Of a policy, this file knows the contract in policies.py.
"""

import dataclasses
import fcntl
import hashlib
import importlib.util
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import get_type_hints

import numpy as np
import torch
import torch.distributed as dist
import tyro
from safetensors import SafetensorError
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


# ------------------------------------------------------------------------------------------ errors
class Fault(Exception):
    """Something the user can mend. The text is one sentence: what is wrong and what to do."""


def one_line(error) -> str:
    """An error's own words, cut to what a sentence can bear."""
    return " ".join(str(error).split())[:200]


def command_line(main):
    """Run main(). A Fault is one line on stderr and exit code 2, Ctrl-C is one line and 130."""
    try:
        main()
    except Fault as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # once is enough
        print("interrupted: every checkpoint and record saved so far is whole", file=sys.stderr)
        sys.exit(130)


# ------------------------------------------------------------------------------------------ flags
def flatten(args) -> dict:
    """The fields of a dataclass, those of nested ones among them: what args.json holds."""
    flat = {}
    for name, value in vars(args).items():
        flat |= flatten(value) if dataclasses.is_dataclass(value) else {name: value}
    return flat


def unflatten(cls, values: dict):
    """The inverse of `flatten`. Fields that `values` lacks get their defaults."""
    fields, hints = {}, get_type_hints(cls)
    for name in (f.name for f in dataclasses.fields(cls)):
        if dataclasses.is_dataclass(hints[name]):
            fields[name] = unflatten(hints[name], values)
        elif name in values:
            fields[name] = tuple(values[name]) if isinstance(values[name], list) else values[name]
    return cls(**fields)


def check_ranges(args, *tables: dict[str, str]):
    """Raise a Fault for the first number outside its range. tables: {range: "flag flag ..."}."""
    values = flatten(args)
    for text, names in ((text, names) for table in tables for text, names in table.items()):
        low, *high = map(int, re.findall(r"\d+", text))
        high = high[0] if high else sys.float_info.max
        for name in names.split():
            value = values[name]
            if value is None:
                continue
            enough = value > low if text.startswith("above") else value >= low
            if not (enough and value <= high):
                raise Fault(f"{flag_of(name)} is {value}: it must be {text}")


def flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def parse(cls, preset, replaced=(), command=None, defaults=None):
    """The command line -> cls. --backbone chooses the defaults, where none are given.

    replaced: {flag that is gone: sentence}.
    """
    command, given = sys.argv[1:] if command is None else command, []
    for text in command:
        flag, *value = text.split("=", 1)
        given += [flag.replace("_", "-"), *value] if text.startswith("--") else [text]
    for before, flag in zip(["", *given], given):
        if not flag:  # or a new run would begin where a script says --resume "$RUN"
            raise Fault(f"nothing follows {before!r}: is a variable of your script empty?")
        if flag in replaced:
            raise Fault(f"{flag} is gone: {replaced[flag]}")
    named = [after for word, after in zip(given, given[1:]) if word == "--backbone"]
    defaults = defaults or preset(*named[-1:])
    switches = [flag_of(k) for k, v in flatten(defaults).items() if isinstance(v, bool)]
    words = []  # --flag True and --flag False are another spelling of --flag and --no-flag
    for word in given:
        if word.lower() in ("true", "false") and words and words[-1] in switches:
            words[-1] = words[-1] if word.lower() == "true" else f"--no-{words[-1][2:]}"
        else:
            words.append(word)
    return tyro.cli(cls, args=words, default=defaults, config=(tyro.conf.OmitArgPrefixes,))


def parse_run(cls, preset, may_change, replaced: dict[str, str], command=None):
    """`parse`, but with --resume the defaults are the run's own.

    Raises a Fault where a flag that is not in `may_change` contradicts the run.
    """
    args = parse(cls, preset, replaced, command)
    if args.resume == "auto":
        runs = [Path(args.run_dir)] if args.run_dir else Path("runs").glob("*")
        found = [path for run in runs for path in checkpoints(run)[-1:]]
        newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
        args.resume = newest and str(newest.parent)  # None: start
    if not args.resume:
        return args
    run_dir = Path(args.resume)
    if re.match("checkpoint-|best$", run_dir.name) and not checkpoints(run_dir):
        raise Fault(f"--resume {run_dir} is a checkpoint: name its run, --resume {run_dir.parent}")
    file = newest_checkpoint(run_dir) / "args.json"
    values, known = read_json(file), flatten(preset())
    if differs := sorted(map(flag_of, values.keys() ^ known.keys())):
        names = ", ".join(differs[:4])
        raise Fault(f"{file} is of another version of this program ({names}): start another run")
    saved = unflatten(cls, values | {"run_dir": args.resume, "resume": args.resume})
    args = parse(cls, preset, replaced, command, saved)
    args.resume = args.run_dir = saved.resume
    asked = flatten(args)
    for name, value in flatten(saved).items():
        if asked[name] == "auto":  # the run has chosen
            asked[name] = value
        if asked[name] != value and name not in may_change:
            raise Fault(
                f"{flag_of(name)} {asked[name]}: the run in {run_dir} has {value}; leave the "
                "flag out, or start another run"
            )
    return unflatten(cls, asked)


# ------------------------------------------------------------------------------------------ ranks
RANK, LOCAL_RANK = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
WORLD, LOCAL_WORLD = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))


def join_ranks(backend: str):
    """Connect the processes that torchrun started, by "nccl" or "gloo". Alone: nothing."""
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group(backend, timeout=timedelta(hours=2))


def leave_ranks():
    if dist.is_initialized():
        dist.destroy_process_group()


def collective(function, *args):
    """A torch.distributed call, where there are several ranks. If one has died, a sentence."""
    if dist.is_initialized():
        try:
            function(*args)
        except RuntimeError as error:
            ended = f"another rank ended, so rank {RANK} does too"
            raise Fault(f"{ended} ({one_line(error)})") from None


def all_reduce(x: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all ranks, in place."""
    collective(dist.all_reduce, x)
    return x


def from_rank_0(value):
    """The value that rank 0 has, on every rank."""
    values = [value]
    collective(dist.broadcast_object_list, values)
    return values[0]


def own_device(cuda: bool) -> torch.device:
    """This rank's GPU, or the CPU where there is none or `cuda` is off."""
    if not (cuda and torch.cuda.is_available()):
        if cuda and torch.version.cuda:
            print("PyTorch sees no GPU: the policy runs on the CPU", file=sys.stderr)
        return torch.device("cpu")
    number = LOCAL_RANK % torch.cuda.device_count()  # a launcher may show each rank one GPU only
    torch.cuda.set_device(number)
    torch.backends.cudnn.allow_tf32 = False  # torch has it on for convolutions, off for the rest
    return torch.device("cuda", number)


def own_cores() -> int:
    """How many cores this rank may keep busy."""
    here = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return max(1, here // LOCAL_WORLD)


def parameters_of(optimizer) -> list[torch.nn.Parameter]:
    """All that an update may change, whether or not it trains in the critic's warm-up."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def start_alike(optimizer):
    """Every rank gets rank 0's weights: random ones differ between kinds of hardware."""
    for p in parameters_of(optimizer):
        collective(dist.broadcast, p.data, 0)


def check_flags(args):
    """Flags that contradict each other, or that several ranks cannot share."""
    episode_ids("eval", 0, 0, args.eval_episodes)  # are there so many?
    if args.adam_beta2 == 1:
        raise Fault("--adam-beta2 is 1: it must be below 1")
    if args.augment and args.pre_view != "composite":
        raise Fault(
            f"--augment shows composites, and with --pre-view {args.pre_view} there are none: "
            "leave one of them out"
        )
    if args.augment and args.sen_coef:
        raise Fault(
            "--augment changes the table in o and not in o_alt, so Eq. (3) would reward seeing the "
            "table: use --sen-coef 0"
        )
    if WORLD > 1 and (args.num_envs < WORLD or args.batch_size % args.num_envs):
        raise Fault(
            f"--num-envs {args.num_envs} and --batch-size {args.batch_size} cannot be shared by "
            f"{WORLD} ranks: each needs an environment, and the batch size must be a multiple of "
            "--num-envs"
        )


def own_slots(num_envs: int) -> range:
    """Which of num_envs environments are this rank's."""
    return range(num_envs * RANK // WORLD, num_envs * (RANK + 1) // WORLD)


# ------------------------------------------------------------------------------------------ seeds
MAX_SEED = 2**31 - 1


def seed_all(*key: int):
    """An iteration starts from seeds of its own: a resumed run needs no other random state."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # CUDA's, too


# purpose: first id, ids per seed. A seed is 0 to MAX_SEED, and no two ranges meet.
EPISODE_RANGES = {
    "scenes": (0, 0, 200_000),  # sft.py uses the same episodes with every seed
    "demos": (200_000, 0, 200_000),
    "held-out demos": (600_000, 0, 200_000),
    "eval": (1_000_000_000, 1_000_000, 1_000_000),
    "train": (2**62, 2**31, 2**31),
}


def episode_ids(purpose: str, seed: int, first: int, count: int) -> range:
    """Ids of two purposes are never equal, for any seeds. A Fault where a purpose has fewer."""
    start, per_seed, size = EPISODE_RANGES[purpose]
    if not 0 <= seed <= MAX_SEED:
        raise Fault(f"the seed {seed} is out of range: use 0 to {MAX_SEED}")
    if first + count > size:
        raise Fault(
            f"{first + count} episodes for {purpose!r} are too many: at most {size} are set apart"
        )
    start += seed * per_seed + first
    return range(start, start + count)


def train_ids(args, iteration: int, rounds: int):
    """Ids of this rank's training episodes in an iteration (1, 2, ...), round by round."""
    own = own_slots(args.num_envs)
    for i in range(rounds):
        first = ((iteration - 1) * rounds + i) * args.num_envs + own.start
        yield from episode_ids("train", args.seed, first, len(own))


# ------------------------------------------------------------------------------------------ files
def read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise Fault(f"{file} cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise Fault(f"{file} holds a {type(content).__name__}, not a JSON object")
    return content


@contextmanager
def writing_to(out: Path):
    """Makes the folder of `out`. What cannot be written inside is a Fault that names `out`."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise Fault(f"cannot write to {out} ({error.strerror}): pass another --out") from None


def write_text(path: Path, text: str):
    """Under a temporary name first, so that a reader never sees half a file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


@contextmanager
def whole_directory(directory: Path):
    """A Path to write files into. They appear as `directory`, whole and on disk, or not at all.

    SHA256SUMS (for `sha256sum -c SHA256SUMS`) is added. What `directory` held before goes.
    """
    temporary = directory.with_name(directory.name + ".partial")
    old = directory.with_name(directory.name + ".old.partial")
    try:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        sums = [f"{file_hash(file)}  {file.name}\n" for file in sorted(temporary.iterdir())]
        (temporary / "SHA256SUMS").write_text("".join(sums))
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        if directory.exists():
            os.replace(directory, old)
        os.replace(temporary, directory)
        sync(directory.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise Fault(
            f"{directory} could not be written ({one_line(error)}); nothing saved before is touched"
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
    """Compare every file that `whole_directory` wrote with its hash. A Fault names the first."""
    try:
        lines = (directory / "SHA256SUMS").read_text().splitlines()
        if not lines:
            raise Fault(f"{directory / 'SHA256SUMS'} is empty: the directory is damaged")
        for line in lines:
            wanted, _, name = line.partition("  ")
            if file_hash(directory / name) != wanted:
                raise Fault(
                    f"{directory / name} is damaged: it is not the file that was saved (SHA256SUMS)"
                )
    except (OSError, UnicodeDecodeError) as error:
        raise Fault(f"{directory} is damaged or incomplete ({error})") from None


# ------------------------------------------------------------------------------------- checkpoints
def check_empty(out: Path, former=lambda out: False):
    """Refuse to write a directory over something else than a `former` one of its kind."""
    if out.exists() and not former(out) and not (out.is_dir() and not any(out.iterdir())):
        raise Fault(f"{out} is there already, and would be overwritten: name another output")


def is_checkpoint(directory: Path) -> bool:
    return (directory / "trainer.pt").exists()


@contextmanager
def locked(directory: Path, what: str, flag: str):
    """Two processes never write to one directory: the second gets a Fault. Ends with its process,
    at the latest."""
    with open(directory / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Fault(
                f"another {what} is writing to {directory}: wait for it, or name another {flag}"
            ) from None
        except OSError:
            pass  # a file system without locks, as Lustre is by default
        yield


LOCKS = ExitStack()  # of run directories: they last as long as the process


def make_run_dir(args):
    """Set args.run_dir, make it and write args.json. Refuses a folder that is another run's."""
    name = f"runs/{args.backbone}_seed{args.seed}_{time.strftime('%Y%m%d-%H%M%S')}"
    names = [args.run_dir] if args.run_dir else [name, *(f"{name}-{i}" for i in range(2, 100))]
    try:
        for name in names:
            try:
                Path(name).mkdir(parents=True, exist_ok=len(names) == 1)
                break
            except FileExistsError:  # another run began in this second
                if name == names[-1]:
                    raise
        args.run_dir, run_dir = name, Path(name)
        if is_checkpoint(run_dir):
            raise Fault(f"--run-dir {run_dir} is a checkpoint of another run: name another one")
        if checkpoints(run_dir) and not args.resume:
            raise Fault(
                f"{run_dir} holds another run's checkpoints: use --resume {run_dir}, "
                "or name another --run-dir"
            )
        LOCKS.enter_context(locked(run_dir, "run", "--run-dir"))
        write_text(run_dir / "args.json", json.dumps(flatten(args), indent=2))
    except OSError as error:
        raise Fault(f"cannot write to --run-dir {name}: {error.strerror}")


def checkpoints(run_dir: Path) -> list[Path]:
    """Oldest first."""
    return sorted(run_dir.glob("checkpoint-" + 6 * "[0-9]"))


def newest_checkpoint(run_dir: Path) -> Path:
    """The newest that is whole: every file in it has the hash it was saved with."""
    for path in reversed(checkpoints(run_dir)):
        try:
            verify(path)
            return path
        except Fault as error:
            print(f"{error}. Going back to the checkpoint before.", file=sys.stderr)
    raise Fault(f"{run_dir} holds no whole checkpoint-* directory: name another --resume")


def resumed_checkpoint(args) -> Path | None:
    """What --resume goes on from, on every rank; None for a new run."""
    resumed = args.resume and RANK == 0
    return from_rank_0(newest_checkpoint(Path(args.run_dir)) if resumed else None)


def save_checkpoint(run_dir: Path, policy, args, trainer: dict) -> Path:
    """Write run_dir/checkpoint-ITERATION, whole or not at all -> its path. `best` is a link.

    The newest args.keep and the best stay. trainer: a dict with iteration, best and what else a
    resumed run needs. Ranks other than 0 write nothing.
    """
    path = run_dir / f"checkpoint-{trainer['iteration']:06d}"
    if RANK > 0:
        return path
    with whole_directory(path) as directory:
        policy.save(directory)
        (directory / "args.json").write_text(json.dumps(flatten(args), indent=2))
        buffer = io.BytesIO()  # a full disk is an OSError then
        torch.save(trainer, buffer)
        (directory / "trainer.pt").write_bytes(buffer.getbuffer())
    best = f"checkpoint-{trainer['best'][1]:06d}"
    link = run_dir / "best.partial"
    link.unlink(missing_ok=True)
    link.symlink_to(best)
    if not (run_dir / "best").is_symlink():  # a copy of the run that has followed links
        shutil.rmtree(run_dir / "best", ignore_errors=True)
    os.replace(link, run_dir / "best")
    for old in [p for p in checkpoints(run_dir) if p <= path][: -args.keep]:  # later: damaged
        if old.name != best:
            shutil.rmtree(old.replace(old.with_name(old.name + ".partial")))
    return path


class RunState:
    """What a resumed run goes on from, beside the policy's weights.

    success and unrelated_kl: of every iteration, after the start's unrelated_kl. best: the highest
    mean of 8 successes at a checkpoint, and its iteration. sight: the latents of `Sight`.
    """

    NAMES = ("iteration", "success", "unrelated_kl", "best", "sight")

    def __init__(self, args, policy, optimizer, target, resumed: Path | None):
        self.args, self.policy, self.optimizer, self.target = args, policy, optimizer, target
        self.iteration, self.success, self.unrelated_kl = 0, [], []
        self.best, self.sight = (-1.0, 0), None
        if resumed:
            file = resumed / "trainer.pt"
            saved = torch.load(file, map_location="cpu", weights_only=True)
            for name in self.NAMES:
                setattr(self, name, saved[name])
            optimizer.load_state_dict(saved["optimizer"])
            target.load(saved["target"])
            print(f"going on from {resumed}", file=sys.stderr)

    def record(self, iteration: int, stats: dict):
        self.iteration = iteration
        self.success.append(stats["success"])
        self.unrelated_kl.append(stats["unrelated_kl"])

    def save(self) -> Path:
        """The checkpoint. It is there, for all ranks, when this returns."""
        self.best = max(tuple(self.best), (float(np.mean(self.success[-8:])), self.iteration))
        trainer = {name: getattr(self, name) for name in self.NAMES}
        trainer |= dict(optimizer=self.optimizer.state_dict(), target=self.target.state())
        path = save_checkpoint(Path(self.args.run_dir), self.policy, self.args, trainer)
        return from_rank_0(path)  # the others wait for it

    def snapshot(self):
        """What one update changes, on the CPU: an update that SIGTERM cuts short is undone."""
        if RANK > 0:  # rank 0 saves
            return None
        weights = [p.detach().to("cpu", copy=True) for p in parameters_of(self.optimizer)]
        saved = self.optimizer.state_dict()
        state = {
            i: {k: v.to("cpu", copy=True) for k, v in s.items()} for i, s in saved["state"].items()
        }
        return weights, saved | dict(state=state)

    @torch.no_grad()
    def restore(self, before):
        if before is not None:
            for p, weight in zip(parameters_of(self.optimizer), before[0]):
                p.copy_(weight)
            self.optimizer.load_state_dict(before[1])

    def say_how_to_go_on(self):
        if RANK == 0:
            then = f"go on with: python ppo_pair.py --resume {self.args.run_dir}"
            then = then if self.iteration else "nothing is there to resume yet"
            print(f"stopped by SIGTERM after iteration {self.iteration}; {then}")


def whole_episodes(num_steps: int, length: int) -> int:
    """How many episodes of `length` steps make up --num-steps."""
    if num_steps % length:
        raise Fault(f"--num-steps {num_steps} must be a multiple of the episode length, {length}")
    return num_steps // length


# ------------------------------------------------------------------------------------------ SIGTERM
terminated = []  # not empty: SIGTERM came (Slurm, spot machines)


def stop_requested() -> bool:
    """Was this rank told to stop?"""
    return bool(terminated)


def any_rank_stops(device) -> bool:
    return all_reduce(torch.tensor([float(stop_requested())], device=device)).item() > 0


@contextmanager
def sigterm_stops():
    """Inside, SIGTERM lets the current step end: rollout and update look at it."""
    before = signal.signal(signal.SIGTERM, lambda *_: terminated.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ------------------------------------------------------------------------------------------ update
def moments(x: torch.Tensor) -> tuple[float, float, int]:
    """Mean, standard deviation and number of the elements of x on all ranks, in float64."""
    x = x.double()
    sums = torch.stack([torch.ones_like(x).sum(), x.sum(), (x**2).sum()])
    n, total, squares = all_reduce(sums).tolist()
    return total / n, max(squares / n - (total / n) ** 2, 0.0) ** 0.5, int(n)


def minibatches(batch, epochs: int, args, generator):
    """Yields, per optimizer step, the indices of this rank's decisions and how many all ranks have.

    A minibatch takes as many decisions of one environment as of another (give or take one). Ranks
    have equal work, and what is in a minibatch does not depend on their number.
    """
    own = own_slots(args.num_envs)
    num_steps = len(batch["logprobs"]) // len(own)
    n, env = num_steps * args.num_envs, torch.arange(num_steps * args.num_envs) % args.num_envs
    is_own = (env >= own.start) & (env < own.stop)
    for _ in range(epochs):
        order = torch.rand(num_steps, args.num_envs, generator=generator).argsort(0).flatten()
        inds = order * len(own) + env - own.start
        for start in range(0, n, args.batch_size):
            stop = min(start + args.batch_size, n)
            yield inds[start:stop][is_own[start:stop]], stop - start


def select(batch: dict, inds: torch.Tensor) -> dict:
    """The decisions `inds` (on the CPU) of a rollout's batch, its nested dicts and lists too."""
    there = inds.to(batch["logprobs"].device)

    def picked(x):
        if isinstance(x, dict):
            return {name: picked(part) for name, part in x.items()}
        return [x[i] for i in inds.tolist()] if isinstance(x, list) else x[there]

    return picked(batch)


class Means:
    """Means of statistics over the samples of all ranks: of one step (`step`), and of an update."""

    def __init__(self):
        self.now, self.totals, self.grad_norms, self.step, self.first = 0.0, 0.0, [], {}, None

    def add(self, stats: dict, groups: dict):
        """stats: {name: (B,)}. groups: {name: (B,) bool}: whose KLs are logged apart."""
        for group, rows in groups.items():
            kls = {k: v for k, v in stats.items() if k.endswith("_kl") and k != "approx_kl"}
            stats = stats | {f"{k}_{group}": v[rows] for k, v in kls.items()}
        self.names = list(stats)
        counts = torch.tensor([float(len(v)) for v in stats.values()], device=stats["loss"].device)
        sums = torch.stack([v.detach().float().sum() for v in stats.values()])
        self.now = self.now + torch.stack([sums, counts])  # (2, K)

    def all_reduce(self, parameters) -> bool:
        """Sum statistics and gradients over the ranks -> was any of them told to stop?"""
        stop = self.now.new_tensor([float(stop_requested())])
        if WORLD > 1:
            parts = [stop, self.now, *(p.grad for p in parameters if p.grad is not None)]
            flat = all_reduce(torch.cat([part.flatten() for part in parts]))
            for part, total in zip(parts, flat.split([part.numel() for part in parts])):
                part.copy_(total.view_as(part))
        self.step = dict(zip(self.names, self.now[0] / self.now[1]))
        self.first = self.first or self.step
        self.totals, self.checksum, self.now = self.totals + self.now, self.now.sum(), 0.0
        return stop.item() > 0

    def result(self) -> dict:
        """ratio_dev is that of the first step, before which nothing was learnt."""
        sums = zip(self.names, *self.totals.tolist())
        means = {name: total / count for name, total, count in sums if count}
        norm = torch.stack(self.grad_norms).mean().item() if self.grad_norms else 0.0
        means |= dict(ratio_dev=self.first["ratio_dev"].item(), grad_norm=norm)
        return means | dict(updates=len(self.grad_norms))


# ------------------------------------------------------------------------------------------ guards
MAX_RATIO_DEV, MAX_RATIO_DEV_BF16 = 0.01, 0.15  # bfloat16 rounds to 0.07 in OpenVLA's 32 layers


def check_step(policy, parameters, means: Means, grad_norm, batch, mb_inds, run_dir):
    """Before a step: a Fault unless all is finite. Before the first: unless act and
    evaluate_actions agree, and everything that is to be trained has a gradient."""
    if not torch.isfinite(grad_norm + means.checksum):  # every rank sees it: sums of all ranks
        file = Path(run_dir) / f"nonfinite_rank{RANK}.pt"
        mb = select(batch, mb_inds)
        minibatch = {k: v.cpu() for k, v in (mb["obs"] | mb["latents"]).items()}
        torch.save(minibatch | dict(instructions=mb["instructions"]), file)
        raise Fault(
            "a loss, log-prob or gradient is not finite: stopped before the step, every "
            f"checkpoint is from before; the minibatch is in {file}"
        )
    if means.step is not means.first:
        return
    ratio_dev = means.step["ratio_dev"].item()
    bfloat16 = policy.dtype == torch.bfloat16
    if ratio_dev > (MAX_RATIO_DEV_BF16 if bfloat16 else MAX_RATIO_DEV):
        raise Fault(
            f"update and rollout compute other log-probs (ratio off by {ratio_dev:.3f} "
            "before any step): the policy's act and evaluate_actions disagree"
        )
    known = {id(p) for p in parameters}
    for name, p in policy.named_parameters():  # it would stay as it is without any error
        if p.requires_grad and (id(p) not in known or p.grad is None):
            reason = "gets no gradient" if id(p) in known else "is not on the optimizer"
            raise Fault(f"the parameter {name} is to be trained but {reason}: freeze it or use it")


def check_weights(policy):
    """Nothing that is not finite may get into a checkpoint."""
    names, sums = zip(*((name, p.sum()) for name, p in policy.named_parameters()))
    finite = torch.stack([s.float() for s in sums]).isfinite().tolist()  # one wait for the GPU
    if not all(finite):
        name = names[finite.index(False)]
        raise Fault(
            f"the weight {name} is not finite: start another run from an earlier checkpoint, and "
            "if this comes again, with a lower --learning-rate"
        )


class Sight:
    """Does the policy see? A blind one acts without any error, and has the smallest L_inv.

    Frames, instructions and latents stay the same over a run, a resumed one among them, so the
    numbers of two iterations differ by the policy alone.
    """

    @torch.no_grad()
    def __init__(self, policy, obs: dict, instructions: list[str], state: RunState, n=64):
        if state.sight is None:
            first = {k: v[:n].to(policy.device) for k, v in obs.items()}
            state.sight = policy.act(first, instructions[:n]).latent
        n = min(len(instructions), *map(len, state.sight.values()))  # another number of ranks
        self.obs = {k: v[:n].to(policy.device) for k, v in obs.items()}
        self.instructions = instructions[:n]
        self.latent = {k: v[:n].to(policy.device) for k, v in state.sight.items()}
        views = {
            "a black and a white image": [torch.full_like(self.obs["rgb"], v) for v in (0, 255)]
        }
        if "rgb_alt" in obs:
            views["images with the target here and there"] = [self.obs["rgb"], self.obs["rgb_alt"]]
        for what, pair in views.items():
            if self.kl(policy, *pair).max() < 1e-9:
                raise Fault(f"the policy does not see: {what} give the same actions")
        if not state.unrelated_kl:
            state.unrelated_kl.append(self.unrelated_kl(policy))  # of the start

    @torch.no_grad()
    def kl(self, policy, rgb, other):
        """(B,): between the distributions of two pictures under one instruction and one latent."""
        p, q = (
            policy.evaluate_actions({**self.obs, "rgb": x}, self.instructions, self.latent).dist
            for x in (rgb, other)
        )
        return policy.kl(p, q)

    def unrelated_kl(self, policy) -> float:
        """KL between unrelated frames. It falls to 0 for a policy that goes blind."""
        rgb = self.obs["rgb"]
        return from_rank_0(self.kl(policy, rgb, rgb.roll(1, 0)).mean().item())


WINDOW = 5  # iterations: a guard that looks at fewer fires on noise
BLIND = 0.5  # of the start's KL between unrelated frames
LOST, LOST_POINTS = 0.6, 0.1  # of the warm-up's success, and by how much at least


def check_collapse(state: RunState, warmup: int):
    """Stop a run that destroys its policy (not in the paper). No run of PPO, +inv, +sen or PAIR in
    results/ trips the thresholds."""
    start, *unrelated = state.unrelated_kl
    success, warmup = state.success, max(warmup, 1)
    if len(success) < warmup + WINDOW:
        return
    if np.mean(unrelated[-WINDOW:]) < BLIND * start:
        raise Fault(
            f"the policy is going blind: the KL of unrelated frames fell from {start:.3g} "
            f"to {np.mean(unrelated[-WINDOW:]):.3g} (mean of {WINDOW} iterations); lower --inv-coef"
        )
    before, now = np.mean(success[:warmup]), np.mean(success[-WINDOW:])
    if now < LOST * before and now < before - LOST_POINTS:
        raise Fault(
            f"the policy loses what it could: success fell from {before:.2f} to {now:.2f} "
            f"(mean of {WINDOW} iterations); lower --learning-rate, --inv-coef or --sen-coef"
        )


# ------------------------------------------------------------------------------------------ logs
class RunLog:
    """Rank 0's: health lines, RUN/log.jsonl, TensorBoard, and Weights & Biases if asked."""

    def __init__(self, args, done: int):
        if RANK > 0:
            return
        if args.track:  # before the writer is made, or nothing of it is synchronised
            if importlib.util.find_spec("wandb") is None:
                raise Fault("--track needs Weights & Biases: pip install wandb, or leave it out")
            import wandb

            wandb.init(
                project="pair-vla",
                name=Path(args.run_dir).name,
                config=flatten(args),
                sync_tensorboard=True,
            )
        self.file = Path(args.run_dir) / "log.jsonl"
        kept = []
        for line in self.file.read_text().splitlines() if done and self.file.exists() else []:
            with suppress(ValueError):  # a full disk has cut the last line
                kept += [f"{line}\n"] if json.loads(line)["iteration"] <= done else []
        write_text(self.file, "".join(kept))
        self.writer = SummaryWriter(Path(args.run_dir) / "tensorboard", purge_step=done + 1)
        self.bar = tqdm(desc="iterations", initial=done, total=args.iterations)

    def write(self, iteration: int, stats: dict, success: list, warming: bool):
        """stats of one iteration. success: of all iterations so far."""
        if RANK > 0:
            return
        try:
            with open(self.file, "a") as file:
                file.write(json.dumps(dict(iteration=iteration, warming=warming, **stats)) + "\n")
            for name, value in stats.items():
                self.writer.add_scalar(f"train/{name}", value, iteration)
            self.writer.flush()
        except OSError as error:
            raise Fault(
                f"the log {self.file} could not be written ({error}); no checkpoint is touched"
            )
        tqdm.write(health_line(iteration, stats, success[-8:], warming))
        self.bar.update()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if RANK == 0:
            self.bar.close()
            with suppress(OSError):  # the disk is full: `write` has said so
                self.writer.close()


HEALTH = dict(
    reward=".3f", explained_variance="+.2f", ratio_dev=".0e", clipfrac=".2f", approx_kl=".4f",
    entropy=".2f", grad_norm=".2f", inv_kl=".3f", sen_kl=".3f", sen_clipped=".2f",
    unrelated_kl=".3f", updates=".0f",
)  # fmt: skip
SHORT = dict(explained_variance="ev", approx_kl="kl", grad_norm="grad", updates="steps")


def health_line(iteration: int, stats: dict, recent: list, warming: bool) -> str:
    words = [
        f"{iteration:4d} success {stats['success']:.3f} (last {len(recent)}: {np.mean(recent):.3f})"
    ]
    words += [f"{SHORT.get(k, k)} {stats[k]:{how}}" for k, how in HEALTH.items() if k in stats]
    words.append(f"| rollout {stats['rollout_seconds']:.1f} s (views {stats['view_seconds']:.1f})")
    words.append(
        f"update {stats['update_seconds']:.1f} s {stats['decisions_per_second']:.0f} decisions/s"
    )
    return " ".join(words) + (" (critic warm-up)" if warming else "")
