"""Ranks, exact resume, and faults. The real ppo_pair.py runs on the toy of toy.py, in forks of this process."""

import contextlib
import copy
import functools
import itertools
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from toy import Toy, in_float64, play, toy_policy

import envs
import evaluate
import policies
import ppo_pair
import runtime
from backbones import files

ROOT = Path(__file__).parents[1]
FLAGS = """--backbone openvla-tiny --num-envs 6 --num-steps 4 --batch-size 12 --device-batch-size 12 --update-epochs 2 --critic-warmup 1
--eval-episodes 0 --learning-rate 2e-4 --save-every 1 --keep 2""".split()
TOYS = ["openvla-tiny", "pi05-tiny"]


@pytest.fixture(scope="module")
def start_of(tmp_path_factory):
    """start_of(backbone): a toy policy that has learnt nothing, as a checkpoint."""

    @functools.cache
    def start_of(backbone):
        torch.manual_seed(0)
        directory = tmp_path_factory.mktemp("start")
        toy_policy(backbone).save(directory)
        (directory / "args.json").write_text(json.dumps(dict(backbone=backbone, assets="builtin")))
        return directory

    return start_of


@pytest.fixture(scope="module")
def start(start_of):
    return start_of("openvla-tiny")


def fork(function, log):
    """Runs function() in a child, which costs no imports, with a process group of its own -> pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        os.setpgid(0, 0)
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.dup2(1, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        play()
        function()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def train(*command, log="/dev/null", before=lambda: None):
    """ppo_pair.py COMMAND on the toy, in a child -> pid. before: called in the child first."""

    def function():
        before()
        sys.argv = ["ppo_pair.py", *map(str, command)]
        runtime.command_line(lambda: ppo_pair.main(ppo_pair.parse()))

    return fork(function, log)


def wait(pid, seconds=120):
    """Exit code, or minus the signal."""
    deadline = time.time() + seconds
    while time.time() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError("it hangs")


def wait_for(path, pid, seconds=120):
    deadline = time.time() + seconds
    while not path.exists():
        assert time.time() < deadline and os.waitpid(pid, os.WNOHANG) == (0, 0), (
            f"{path} does not come"
        )
        time.sleep(0.01)


def state(checkpoint):
    """All that a run goes on from: weights and trainer, as one flat dict of tensors and values."""
    runtime.verify(checkpoint)
    trainer = torch.load(checkpoint / "trainer.pt", weights_only=True)
    parts = {
        name: load_file(checkpoint / f"{name}.safetensors") for name in ("model", "value_head")
    }
    flat = {}

    def walk(key, value):
        if isinstance(value, dict):
            for k, v in value.items():
                walk(f"{key}/{k}", v)
        elif isinstance(value, (list, tuple)):
            walk(key, dict(enumerate(value)))
        else:
            flat[key] = value

    walk("", dict(parts, trainer=trainer))
    return flat


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        same = (
            torch.equal(value, b[key])
            if isinstance(value, torch.Tensor)
            else value == b[key] or value != value and b[key] != b[key]
        )
        assert same, key


# ------------------------------------------------------------------------------------------------ ranks
def ranks(world, function, tmp_path, code=0):
    """function(rank) in `world` processes that form a gloo group; waits for them -> what they print."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    def child(rank):
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(world),
            LOCAL_RANK=str(rank),
            LOCAL_WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        runtime.RANK, runtime.WORLD, runtime.LOCAL_RANK, runtime.LOCAL_WORLD = (
            rank,
            world,
            rank,
            world,
        )
        function(rank)

    pids = [fork(functools.partial(child, rank), tmp_path / f"rank{rank}") for rank in range(world)]
    codes = [wait(pid) for pid in pids]
    texts = [(tmp_path / f"rank{rank}").read_text() for rank in range(world)]
    assert codes == [code] * world, "".join(texts)
    return texts


def test_ranks_start_with_the_weights_of_rank_0(tmp_path):
    def function(rank):
        runtime.join_ranks("gloo")
        p = torch.nn.Parameter(torch.full((3,), float(rank)))
        runtime.start_alike(torch.optim.SGD([p], 1.0))
        assert (p == 0).all()

    ranks(2, function, tmp_path)


@pytest.mark.parametrize("backbone", TOYS)
def test_one_process_equals_two_and_three(tmp_path, backbone):
    """Rollout and the whole of Eq. (4), 3 ranks with 5, 5 and 6 environments; noise is made to depend on the environment.

    In float64, so that nothing but the rounding of sums is left: they agree within 1e-9 (relative).
    """
    args = ppo_pair.preset(
        num_envs=16,
        num_steps=8,
        batch_size=32,
        device_batch_size=20,
        update_epochs=2,
        target_kl=0.0,
        inv_coef=0.5,
        sen_coef=0.2,
        sen_clip=0.8,
        run_dir=str(tmp_path),
    )

    def function(rank):
        if runtime.WORLD > 1:
            dist.init_process_group("gloo")
        torch.Tensor.float = in_float64
        torch.set_default_dtype(torch.float64)
        torch.manual_seed(0)
        policy = toy_policy(backbone).double()
        head = list(policy.value_head.parameters())
        actor = [p for p in policy.parameters() if all(p is not q for q in head)]
        optimizer = torch.optim.SGD([dict(params=actor), dict(params=head)], lr=1e-2)
        mine, shared, before = (
            runtime.own_slots(16),
            torch.Generator(),
            copy.deepcopy(policy.state_dict()),
        )
        steps = itertools.count()

        def act(obs, instructions, act=policy.act):
            parts, step = [], next(steps)
            for i, slot in enumerate(mine):
                torch.manual_seed(16 * step + slot)
                parts.append(
                    act({k: v[i : i + 1] for k, v in obs.items()}, instructions[i : i + 1])
                )
            return policies.join_decisions(parts)

        policy.act = act
        for iteration in range(2):
            shared.manual_seed(iteration)
            ids = (100 * iteration + 16 * i + slot for i in range(4) for slot in mine)
            batch, stats = ppo_pair.rollout(args, policy, Toy(len(mine)), ids, torch.device("cpu"))
            gray = torch.full((1, 16, 16, 3), 90, dtype=torch.uint8)
            stats |= ppo_pair.update(args, policy, optimizer, batch, gray, generator=shared)
        moved = {k: v - before[k] for k, v in policy.state_dict().items()}
        torch.save((stats, policy.state_dict(), moved), tmp_path / f"{runtime.WORLD}_{rank}.pt")

    assert wait(fork(lambda: function(0), tmp_path / "alone")) == 0, (
        tmp_path / "alone"
    ).read_text()
    for world in (2, 3):
        ranks(world, function, tmp_path)
    stats, weights, moved = torch.load(tmp_path / "1_0.pt", weights_only=True)
    for name in ("2_0", "2_1", "3_0", "3_1", "3_2"):
        other_stats, *others = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        for key in stats.keys() - {"ratio_dev"}:  # rounding alone
            assert other_stats[key] == pytest.approx(stats[key], rel=1e-9, abs=1e-12), key
        for ours, theirs in ((weights, others[0]), (moved, others[1])):
            a, b = (torch.cat([t.flatten() for t in x.values()]) for x in (ours, theirs))
            assert a.dtype == torch.float64 and (a - b).norm() / a.norm() < 1e-9, name


def test_ranks_share_an_evaluation_and_write_the_same_file(start, tmp_path):
    def function(rank):
        splits = ("train", "texture", "clutter-2")
        evaluate.main(
            evaluate.Args(
                checkpoint=str(start),
                splits=splits,
                num_episodes=11,
                num_envs=2,
                seeds=(0, 1),
                out=str(tmp_path / f"eval{runtime.WORLD}"),
                cuda=False,
            )
        )

    assert wait(fork(lambda: function(0), tmp_path / "alone")) == 0, (
        tmp_path / "alone"
    ).read_text()
    ranks(3, function, tmp_path)
    for name in ("episodes.jsonl", "table.md"):
        assert (tmp_path / "eval1" / name).read_text() == (tmp_path / "eval3" / name).read_text()
    assert len((tmp_path / "eval1/episodes.jsonl").read_text().splitlines()) == 3 * 2 * 11


def two_ranks(tmp_path, *command, code=0, before_update=lambda iteration, batch: None):
    """ppo_pair.py COMMAND on two ranks -> what they print."""

    def function(rank, original=ppo_pair.update):
        iterations = itertools.count(1)

        def update(args, policy, optimizer, batch, *rest):
            before_update(next(iterations), batch)
            return original(args, policy, optimizer, batch, *rest)

        ppo_pair.update, sys.argv = update, ["ppo_pair.py", *map(str, command)]
        runtime.command_line(lambda: ppo_pair.main(ppo_pair.parse()))

    return ranks(2, function, tmp_path, code)


def test_sigterm_to_one_of_two_ranks_saves_and_they_go_on_as_if_nothing_had_been(start, tmp_path):
    """Bitwise. Both end with 0, though only one was told. At the end both share the final table."""
    flags = "--iterations", 3, "--save-every", 9

    def terminate(iteration, batch):
        if (runtime.RANK, iteration) == (1, 2):
            os.kill(os.getpid(), signal.SIGTERM)

    said, _ = two_ranks(tmp_path, *fresh(start, tmp_path / "run"), *flags, before_update=terminate)
    assert (
        f"stopped by SIGTERM after iteration 1; go on with: python ppo_pair.py --resume {tmp_path / 'run'}"
        in said
    )
    two_ranks(tmp_path, "--resume", tmp_path / "run")
    table = "--eval-episodes", 3
    said, other = two_ranks(tmp_path, *fresh(start, tmp_path / "undisturbed"), *flags, *table)
    assert "OOD average" in said and "OOD average" not in other
    episodes = evaluate.read_records(tmp_path / "undisturbed")
    assert Counter(e["split"] for e in episodes) == dict.fromkeys(envs.SPLITS, 3)
    ours, theirs = (state(tmp_path / run / "checkpoint-000003") for run in ("run", "undisturbed"))
    for flat in (ours, theirs):  # the two runs save at different iterations
        del flat["/trainer/best/0"], flat["/trainer/best/1"]
    assert_same(ours, theirs)


def test_a_run_goes_on_with_another_number_of_ranks(start, tmp_path):
    """One, two, one. The frames that show whether the policy sees are those of the first rank."""
    run = tmp_path / "run"
    assert wait(train(*fresh(start, run), "--iterations", 2)) == 0
    two_ranks(tmp_path, "--resume", run, "--iterations", 3)
    assert wait(train("--resume", run, "--iterations", 4)) == 0
    assert runtime.newest_checkpoint(run).name == "checkpoint-000004"


def test_a_nan_on_one_of_two_ranks_stops_both_before_the_step(start, tmp_path):
    def spoil(iteration, batch):
        if (runtime.RANK, iteration) == (1, 2):
            batch["returns"][0] = float("nan")

    for said in two_ranks(
        tmp_path, *fresh(start, tmp_path / "run"), "--iterations", 3, code=2, before_update=spoil
    ):
        assert (
            "a loss, log-prob or gradient is not finite: stopped before the step" in said
            and "Traceback" not in said
        )
    assert runtime.newest_checkpoint(tmp_path / "run").name == "checkpoint-000001"
    assert {p.name for p in (tmp_path / "run").glob("nonfinite*")} == {
        "nonfinite_rank0.pt",
        "nonfinite_rank1.pt",
    }


# ------------------------------------------------------------------------------------------------ resume
def fresh(start, run):
    """Command line of a new run."""
    backbone = json.loads((start / "args.json").read_text())["backbone"]
    return "--checkpoint", start, "--run-dir", run, *FLAGS, "--backbone", backbone


@pytest.fixture(scope="module")
def whole_of(start_of, tmp_path_factory):
    """whole_of(backbone): a run of 8 iterations that nobody disturbed."""

    @functools.cache
    def whole_of(backbone):
        run = tmp_path_factory.mktemp("whole") / "run"
        assert (
            wait(train(*fresh(start_of(backbone), run), "--iterations", 8, log=run.parent / "log"))
            == 0
        )
        return run

    return whole_of


@pytest.fixture(scope="module")
def whole(whole_of):
    return whole_of("openvla-tiny")


def test_a_run_says_how_it_goes_and_keeps_the_newest_and_the_best(whole):
    lines = [
        line for line in (whole.parent / "log").read_text().splitlines() if "ratio_dev" in line
    ]
    assert len(lines) == 8
    trainer = torch.load(whole / "checkpoint-000008/trainer.pt", weights_only=True)
    means = [np.mean(trainer["success"][max(0, i - 8) : i]) for i in range(1, 9)]
    best = max(range(8), key=lambda i: (means[i], i)) + 1
    assert trainer["best"] == (pytest.approx(max(means)), best)
    assert (whole / "best").resolve().name == f"checkpoint-{best:06d}"
    assert {p.name for p in whole.glob("check*")} == {
        "checkpoint-000007",
        "checkpoint-000008",
        f"checkpoint-{best:06d}",
    }
    sums = subprocess.run(
        ["sha256sum", "-c", "SHA256SUMS"],
        cwd=whole / "checkpoint-000008",
        capture_output=True,
        text=True,
    )
    assert sums.returncode == 0 and sums.stdout.count("OK") == 6


def test_the_newest_and_the_best_stay(tmp_path):
    policy, args, bests = toy_policy(), ppo_pair.preset(keep=2), (1, 2, 2, 2, 2, 6)
    lefts = [1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [5, 6]
    for iteration, best, left in zip(itertools.count(1), bests, lefts):
        runtime.save_checkpoint(tmp_path, policy, args, dict(iteration=iteration, best=(0.5, best)))
        assert [int(p.name[-6:]) for p in runtime.checkpoints(tmp_path)] == left
        assert (tmp_path / "best").resolve() == tmp_path / f"checkpoint-{best:06d}"
        assert not list(tmp_path.glob("*.partial"))


def test_two_processes_with_one_seed_are_the_same(start, whole, tmp_path):
    """Bitwise; the second one is a Python of its own, with other hashes."""
    command = [
        sys.executable,
        ROOT / "tests/toy.py",
        *fresh(start, tmp_path / "run"),
        "--iterations",
        "8",
    ]
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONHASHSEED="7")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_same(state(tmp_path / "run/checkpoint-000008"), state(whole / "checkpoint-000008"))


def killed_at(call, where):
    """For train's `before`: SIGKILL at the call'th Python call ("anywhere"), or at the call'th in the middle of writing a
    checkpoint ("write"). Calls are counted, not seconds, so it does not matter how fast the machine is. 0: never."""
    calls = itertools.count(1)

    def count(*_):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(function, *args):
        count()
        return function(*args)

    def before():
        if where == "anywhere":
            sys.setprofile(count)
        else:
            files.save_file, runtime.sync = (
                functools.partial(counted, f) for f in (files.save_file, runtime.sync)
            )

    return before


def kill_and_resume(start, run, iterations, kills, seed):
    """Killed at random calls, each time followed by --resume; returns where. Whatever is called a checkpoint is whole, at
    any time."""
    rng, killed = random.Random(seed), []
    while True:
        saved = runtime.checkpoints(run)
        for checkpoint in saved:
            runtime.verify(checkpoint)
        how = ["--resume", run] if saved else fresh(start, run)
        # about two and four iterations
        where, upto = rng.choice([("write", 24), ("anywhere", 1_000_000)])
        call = rng.randrange(1, upto) if len(killed) < kills else 0
        command, log = (*how, "--iterations", iterations), run.parent / "log"
        code = wait(train(*command, log=log, before=killed_at(call, where)))
        if code == 0:
            return killed
        assert code == -signal.SIGKILL, log.read_text()
        killed.append(where)


@pytest.mark.parametrize("backbone", TOYS)
def test_killed_at_any_instant_and_resumed_is_as_if_never_killed(
    start_of, whole_of, tmp_path, backbone
):
    """Bitwise: weights, optimizer, history. Three kills here, twenty in the slow test."""
    killed = kill_and_resume(start_of(backbone), tmp_path / "run", 8, 3, seed=2363)
    assert killed == ["write", "anywhere", "write"]  # the first before there was any checkpoint
    assert_same(
        state(tmp_path / "run/checkpoint-000008"), state(whole_of(backbone) / "checkpoint-000008")
    )


@pytest.mark.slow
@pytest.mark.parametrize("backbone", TOYS)
def test_killed_twenty_times_and_resumed_is_as_if_never_killed(start_of, tmp_path, backbone):
    reference, start = tmp_path / "reference/run", start_of(backbone)
    reference.parent.mkdir()
    assert wait(train(*fresh(start, reference), "--iterations", 150), 600) == 0
    killed = kill_and_resume(start, tmp_path / "run", 150, 20, seed=0)
    assert len(killed) == 20 and {"write", "anywhere"} == set(killed), killed
    assert_same(state(tmp_path / "run/checkpoint-000150"), state(reference / "checkpoint-000150"))


def test_resume_continues_the_schedule_and_the_curves(whole, tmp_path):
    """Also of an iteration that was logged, but not saved: its points are drawn once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    shutil.copytree(whole, run, symlinks=True)
    shutil.rmtree(run / "checkpoint-000008")
    assert wait(train("--resume", run, "--iterations", 9, log=tmp_path / "log")) == 0
    assert "going on from" in (tmp_path / "log").read_text()
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/success")] == list(range(1, 10))
    trainer = torch.load(run / "checkpoint-000009/trainer.pt", weights_only=True)
    assert trainer["iteration"] == 9 and len(trainer["success"]) == 9
    args = json.loads((run / "checkpoint-000009/args.json").read_text())
    last = [
        group["lr"] * 9 for group in trainer["optimizer"]["param_groups"]
    ]  # --anneal-lr: a ninth is left
    assert args["anneal_lr"] and last == pytest.approx(
        [args["learning_rate"], args["value_learning_rate"]]
    )


def test_resume_refuses_what_would_change_the_run(whole, monkeypatch):
    args = ppo_pair.parse(
        ["--resume", str(whole), "--iterations", "20", "--device-batch-size", "3"]
    )
    assert (args.iterations, args.device_batch_size, args.num_envs, args.seed) == (20, 3, 6, 1)
    auto = ["--sim", "auto", "--run-dir", str(whole), "--resume", "auto"]
    assert ppo_pair.parse(auto).sim == "cpu"  # the run has chosen
    for flag, value in (
        ("seed", "2"),
        ("num-envs", "8"),
        ("learning-rate", "1e-4"),
        ("inv-coef", "0"),
    ):
        with pytest.raises(runtime.Fault, match=f"--{flag} .*leave the flag out"):
            ppo_pair.parse(["--resume", str(whole), f"--{flag}", value])
    saved = json.loads((whole / "checkpoint-000008/args.json").read_text())
    monkeypatch.setattr(Path, "read_text", lambda _: json.dumps(dict(saved, seed=3)))
    monkeypatch.setattr(runtime, "verify", lambda _: None)
    with pytest.raises(
        runtime.Fault, match="--seed 1.*leave the flag out"
    ):  # the default, said aloud
        ppo_pair.parse(["--resume", str(whole), "--seed", "1"])


def test_resume_auto_takes_the_newest_whole_checkpoint_or_starts(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ppo_pair.parse(["--resume", "auto"]).resume is None
    assert ppo_pair.parse(["--resume", "auto", "--run-dir", "elsewhere"]).resume is None
    for name, age in (("old", 100), ("new", 0), ("older", 200)):
        (tmp_path / f"runs/{name}").mkdir(parents=True)
        (tmp_path / f"runs/{name}/checkpoint-000008").symlink_to(whole / "checkpoint-000008")
        if age:
            copied = tmp_path / f"runs/{name}/checkpoint-000008"
            copied.unlink()
            subprocess.run(["cp", "-r", whole / "checkpoint-000008", copied], check=True)
            os.utime(copied, (time.time() - age - 1000,) * 2)
    assert ppo_pair.parse(["--resume", "auto"]).run_dir == "runs/new"
    assert ppo_pair.parse(["--resume", "auto", "--run-dir", "runs/old"]).run_dir == "runs/old"


@pytest.mark.slow
def test_memory_is_flat(start, tmp_path):
    """Resident memory over the last 20 of 50 iterations stays within 2 %."""

    def before():
        original = runtime.health_line

        def line(iteration, *rest):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            with open(tmp_path / "memory", "a") as file:
                print(iteration, pages, file=file)
            return original(iteration, *rest)

        runtime.health_line = line

    pid = train(
        "--checkpoint",
        start,
        "--run-dir",
        tmp_path / "run",
        "--iterations",
        50,
        *FLAGS,
        before=before,
    )
    assert wait(pid, 600) == 0
    pages = [int(line.split()[1]) for line in (tmp_path / "memory").read_text().splitlines()]
    assert len(pages) == 50 and max(pages[-20:]) / min(pages[-20:]) < 1.02, pages


# ------------------------------------------------------------------------------------------------ faults
def sigterm_in(iteration):
    """For train's `before`: a SIGTERM when that iteration begins."""
    iterations = itertools.count(1)

    def before(rollout=ppo_pair.rollout):
        def rollout_after_sigterm(*args, **kwargs):
            if next(iterations) == iteration:
                os.kill(os.getpid(), signal.SIGTERM)
            return rollout(*args, **kwargs)

        ppo_pair.rollout = rollout_after_sigterm

    return before


def test_sigterm_saves_and_exits_0_with_the_command_to_resume(start, whole, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    flags = ["2" if FLAGS[i - 1] == "--save-every" else flag for i, flag in enumerate(FLAGS)]
    command = "--checkpoint", start, "--run-dir", run, "--iterations", 8, *flags
    assert wait(train(*command, log=log, before=sigterm_in(5))) == 0, log.read_text()
    (last,) = [line for line in log.read_text().splitlines() if "stopped by" in line]
    saved = runtime.newest_checkpoint(run)
    assert (
        f"stopped by SIGTERM after iteration {int(saved.name[-2:])}; go on with: python ppo_pair.py --resume {run}"
        in last
    )
    assert wait(train(*last.split("ppo_pair.py ")[1].split())) == 0
    ours, theirs = state(run / "checkpoint-000008"), state(whole / "checkpoint-000008")
    for flat in (ours, theirs):  # the two runs save at different iterations
        del flat["/trainer/best/0"], flat["/trainer/best/1"]
    assert_same(ours, theirs)


def test_sigterm_before_there_is_anything_to_save(start, tmp_path):
    command, log = fresh(start, tmp_path / "run"), tmp_path / "log"
    assert wait(train(*command, log=log, before=sigterm_in(1))) == 0
    assert "stopped by SIGTERM after iteration 0; nothing is there to resume yet" in log.read_text()


def test_sigterm_while_the_last_checkpoint_is_written_starts_no_table(start, tmp_path):
    def before(save=runtime.RunState.save):
        def save_and_stop(self):
            os.kill(os.getpid(), signal.SIGTERM)
            return save(self)

        runtime.RunState.save = save_and_stop

    run, log = tmp_path / "run", tmp_path / "log"
    command = *fresh(start, run), "--iterations", 1, "--eval-episodes", 2
    assert wait(train(*command, log=log, before=before)) == 0, log.read_text()
    assert "stopped by SIGTERM after iteration 1; go on with" in log.read_text()
    assert not (run / "checkpoint-000001/eval").exists()
    assert wait(train("--resume", run, log=log)) == 0 and "OOD average" in log.read_text()


@pytest.mark.parametrize("times", [1, 3])
def test_ctrl_c_is_one_sentence_and_loses_nothing(start, tmp_path, times):
    run, log = tmp_path / "run", tmp_path / "log"

    def before():
        def say(*args, **kwargs):
            print(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGINT)

        if times == 3:  # the third comes while it says that it is interrupted
            runtime.print = say

    pid = train(*fresh(start, run), "--iterations", 999, log=log, before=before)
    wait_for(run / "checkpoint-000002", pid)
    for _ in range(min(times, 2)):
        os.killpg(pid, signal.SIGINT)
        time.sleep(0.02)
    assert wait(pid, 30) == 130, log.read_text()
    assert (
        log.read_text().count("interrupted: every checkpoint and record saved so far is whole") == 1
    )
    assert "Traceback" not in log.read_text() and "Exception" not in log.read_text()
    policies.load_policy("openvla-tiny", runtime.newest_checkpoint(run))


def test_a_file_too_large_for_the_disk_ends_the_run_and_leaves_the_checkpoint_before(
    start, tmp_path
):
    """The limit on a file's size stands in for a full disk: it needs no root. test_a_full_disk is the real thing."""
    run, log = tmp_path / "run", tmp_path / "log"

    def before():
        def smaller(path, original=runtime.sync):
            if path.parent.name == "checkpoint-000003.partial" or path.name == "checkpoint-000002":
                resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
            original(path)

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        runtime.sync = smaller
        runtime.checkpoints = lambda run_dir, original=runtime.checkpoints: smaller_after(
            original(run_dir)
        )

        def smaller_after(paths):
            if paths and paths[-1].name == "checkpoint-000002":
                resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
            return paths

    assert (
        wait(
            train(
                "--checkpoint",
                start,
                "--run-dir",
                run,
                "--iterations",
                4,
                *FLAGS,
                log=log,
                before=before,
            )
        )
        == 2
    )
    assert (
        "checkpoint-000003 could not be written" in log.read_text()
        and "Traceback" not in log.read_text()
    )
    assert runtime.newest_checkpoint(run).name == "checkpoint-000002"
    assert wait(train("--resume", run, "--iterations", 3)) == 0


@pytest.mark.parametrize("by", ["checkpoints", "others"])
def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(start, tmp_path, by):
    disk, log = tmp_path / "disk", tmp_path / "log"
    disk.mkdir()

    def fill(update=ppo_pair.update):
        def fill_and_update(*args):
            if by == "others" and (disk / "run/checkpoint-000002").exists():
                with open(disk / "others", "wb", buffering=0) as file, contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(4096))
            return update(*args) | dict.fromkeys(
                map(str, range(200)), 0.0
            )  # more to log than fits into a block's rest

        ppo_pair.update = fill_and_update

    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=7m", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("mounting a tiny tmpfs needs root")
    try:
        pid = train(
            *fresh(start, disk / "run"), "--iterations", 9, "--keep", 9, log=log, before=fill
        )
        assert wait(pid) == 2, log.read_text()
        assert "could not be written" in log.read_text() and "No space left" in log.read_text()
        assert "Traceback" not in log.read_text()
        newest = runtime.newest_checkpoint(disk / "run")
        policies.load_policy("openvla-tiny", newest)
        assert int(newest.name[-2:]) >= 1 and (
            by == "checkpoints" or newest.name == "checkpoint-000002"
        )
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        assert wait(train("--resume", disk / "run", log=log)) == 2
        assert "cannot write to --run-dir" in log.read_text() and "Traceback" not in log.read_text()
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_folder_that_cannot_be_written(start, tmp_path):
    (tmp_path / "file").write_text("not a directory")
    log = tmp_path / "log"
    assert (
        wait(train("--checkpoint", start, "--run-dir", tmp_path / "file/run", *FLAGS, log=log)) == 2
    )
    assert (
        log.read_text().startswith("error: cannot write to --run-dir")
        and len(log.read_text().splitlines()) == 1
    )


@pytest.mark.parametrize("fault", ["truncated", "flipped", "missing", "unlisted"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(whole, tmp_path, capsys, fault):
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", whole, run], check=True)
    file = (
        run
        / "checkpoint-000008"
        / dict(missing="trainer.pt", unlisted="SHA256SUMS").get(fault, "model.safetensors")
    )
    content = file.read_bytes()
    if fault == "missing":
        file.unlink()
    elif fault == "flipped":
        file.write_bytes(content[:-100] + bytes([content[-100] ^ 4]) + content[-99:])
    else:
        file.write_bytes(content[: len(content) // 2] if fault == "truncated" else b"")
    assert runtime.newest_checkpoint(run).name == "checkpoint-000007"
    assert file.name in capsys.readouterr().err
    with pytest.raises(runtime.Fault, match=file.name):
        policies.load_policy("openvla-tiny", file.parent)
    subprocess.run(
        ["rm", "-r", *(p for p in run.glob("checkpoint-*") if p != file.parent)], check=True
    )
    with pytest.raises(runtime.Fault, match="no whole checkpoint"):
        runtime.newest_checkpoint(run)


@pytest.mark.parametrize(
    "where, when, sentence",
    [
        ("value_head.head_l3.weight", "before", "loss, log-prob or gradient is not finite"),
        ("projector.fc3.bias", "before", "loss, log-prob or gradient is not finite"),
        ("projector.fc3.bias", "after", "weight projector.fc3.bias is not finite"),
    ],
)
def test_a_nan_stops_the_run(start, tmp_path, where, when, sentence):
    """Written into a weight before the third update, or after it."""
    run, log = tmp_path / "run", tmp_path / "log"

    def before():
        def update(args, policy, *rest, original=ppo_pair.update):
            weight, third = (
                dict(policy.named_parameters())[where].data.view(-1),
                (run / "checkpoint-000002").exists(),
            )
            if third and when == "before":
                weight[-1] = float("nan")
            stats = original(args, policy, *rest)
            if third:
                weight[-1] = float("nan")
            return stats

        ppo_pair.update = update

    assert (
        wait(
            train(
                "--checkpoint",
                start,
                "--run-dir",
                run,
                "--iterations",
                9,
                *FLAGS,
                log=log,
                before=before,
            )
        )
        == 2
    )
    assert sentence in log.read_text() and "Traceback" not in log.read_text()
    newest = runtime.newest_checkpoint(run)
    assert newest.name == "checkpoint-000002"
    assert all(
        torch.isfinite(p).all() for p in policies.load_policy("openvla-tiny", newest).parameters()
    )
    if when == "before":
        minibatch = torch.load(run / "nonfinite_rank0.pt", weights_only=True)
        assert (
            len(minibatch["rgb"])
            == len(minibatch["tokens"])
            == len(minibatch["instructions"])
            == 12
        )
    log.unlink()
    assert wait(train("--resume", run, "--iterations", 3, log=log)) == 0, log.read_text()


@pytest.mark.parametrize(
    "value, sentence",
    [(float("inf"), "tensor projector.fc3.weight holds NaN or infinity"), (0.0, "not see")],
)
def test_a_policy_that_is_broken_or_blind_does_not_start(start, tmp_path, value, sentence):
    policy, log = policies.load_policy("openvla-tiny", start), tmp_path / "log"
    policy.projector["fc3"].weight.data[:] = value
    policy.save(tmp_path / "broken")
    assert (
        wait(train(*fresh(start, tmp_path / "run"), "--checkpoint", tmp_path / "broken", log=log))
        == 2
    )
    assert (
        sentence in log.read_text()
        and "Traceback" not in log.read_text()
        and "ratio_dev" not in log.read_text()
    )


def test_a_policy_that_goes_blind_stops_the_run(start, tmp_path):
    """The KL between fixed frames falls to a hundredth after the first iteration that is not the critic's, and stays there."""
    run, log = tmp_path / "run", tmp_path / "log"

    def before(limit=runtime.BLIND):
        def unrelated_kl(*_):
            return (
                1.0
                if not runtime.checkpoints(run)
                or runtime.checkpoints(run)[-1].name < "checkpoint-000002"
                else 0.01
            )

        runtime.Sight.unrelated_kl, runtime.BLIND = unrelated_kl, limit

    assert wait(train(*fresh(start, run), "--iterations", 9, log=log, before=before)) == 2
    assert (
        "error: the policy is going blind" in log.read_text() and "Traceback" not in log.read_text()
    )
    assert runtime.newest_checkpoint(run).name == "checkpoint-000005"


def test_torchrun_trains_and_a_killed_rank_ends_all(start, tmp_path):
    """The real launcher. One rank is killed: the other ends within a minute, with one sentence."""
    run, flags = (
        tmp_path / "run",
        ["4" if FLAGS[i - 1] == "--num-envs" else f for i, f in enumerate(FLAGS)],
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        ROOT / "tests/toy.py",
        "--checkpoint",
        start,
    ]
    environment = dict(os.environ, OMP_NUM_THREADS="1", TOY_SECONDS="0.02")
    process = subprocess.Popen(
        [*command, "--run-dir", run, "--iterations", "999", *flags],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.time() + 200
    while not (run / "checkpoint-000002").exists():
        assert process.poll() is None and time.time() < deadline, process.communicate()[0]
        time.sleep(0.1)
    children = map(
        int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    )
    killed = max(pid for pid in children if b"toy.py" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(killed, signal.SIGKILL)
    began = time.time()
    output, _ = process.communicate(timeout=90)
    assert process.returncode != 0 and time.time() - began < 60
    assert "error: another rank ended, so rank" in output and "Signal 9 (SIGKILL)" in output
    assert all(
        torch.isfinite(p).all()
        for p in load_file(runtime.newest_checkpoint(run) / "model.safetensors").values()
    )
