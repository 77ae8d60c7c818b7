"""Flags, run directories, episode ids, logs: what must be refused or right before a long run starts."""

import contextlib
import dataclasses
import errno
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import evaluate
import policies
import ppo_pair
import runtime
import sft

ROOT = Path(__file__).parents[1]
BIG = runtime.MAX_SEED


# ------------------------------------------------------------------------------------------ flags
@pytest.mark.parametrize("backbone", ppo_pair.BACKBONES)
def test_every_flag_has_its_backbones_default(backbone):
    args = ppo_pair.parse(["--backbone", backbone])
    flags = runtime.flatten(args)
    for name, row in ppo_pair.PRESETS.items():
        assert flags[name] == row[ppo_pair.BACKBONES.index(backbone)], name
    known = {f.name for f in dataclasses.fields(ppo_pair.Args)} - {"policy"}
    assert known | {f.name for f in dataclasses.fields(args.policy)} == flags.keys()


def test_help_prints_the_column_of_table_3():
    command = [sys.executable, "ppo_pair.py", "--backbone", "pi05", "--help"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ, COLUMNS="100")
    )
    text = " ".join(done.stdout.replace("\u2502", " ").split())
    assert done.returncode == 0
    for default in ("(default: 280)", "(default: 7.91e-06)", "(default: 5120)", "(default: one)"):
        assert default in text, default
    assert "--lora-rank" in text and "--policy.lora-rank" not in text


def test_booleans_have_one_spelling_and_the_old_one_still_works():
    for words in (["--no-anneal-lr"], ["--anneal-lr", "False"], ["--anneal-lr=false"]):
        assert ppo_pair.parse(words).anneal_lr is False
    assert ppo_pair.parse(["--backbone", "openvla", "--anneal-lr", "True"]).anneal_lr is True
    assert (
        ppo_pair.parse(["--gradient-checkpointing", "True"]).policy.gradient_checkpointing is True
    )


@pytest.mark.parametrize(
    "flags", ["--detach-sen True", "--pair-fraction 0.5", "--pair_fraction=0.5"]
)
def test_a_flag_that_is_gone_says_what_replaced_it(flags):
    with pytest.raises(runtime.Fault, match="is gone: "):
        ppo_pair.parse(flags.split())


@pytest.mark.parametrize(
    "flags",
    "--num-steps 0|--num-envs 0|--iterations 0|--batch-size 0|--learning-rate -1|--learning-rate 0|"
    "--learning-rate nan|--max-grad-norm 0|--clip-coef -1|--inv-coef -1|--sen-coef -0.1|--sen-clip -1|"
    "--eval-episodes -3|--gamma 1.1|--gae-lambda -1|--critic-warmup -1|--save-every 0|--keep 0|--seed -1|"
    "--seed 20240101123456|--target-kl -1|--augment 2|--inv-target-rate 1.5|--ent-coef -1|--inv-coef inf|"
    "--lora-rank -1|--camera-step 0|--noise-level 1e300".split("|"),
)
def test_a_number_out_of_range_is_one_sentence_before_anything_starts(flags, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(runtime.Fault, match=f"{flags.split()[0]} is .*: it must be ") as fault:
        ppo_pair.main(ppo_pair.parse([*flags.split(), "--run-dir", str(run)]))
    assert "\n" not in str(fault.value) and not run.exists()


def test_augment_needs_the_composites_that_it_shows_and_has_no_part_in_eq_3(tmp_path):
    flags = ["--augment", "0.5", "--pre-view", "rerender", "--run-dir", str(tmp_path / "run")]
    with pytest.raises(runtime.Fault, match="--pre-view rerender there are none"):
        ppo_pair.main(ppo_pair.parse(flags))
    with pytest.raises(runtime.Fault, match="Eq. .3. would reward seeing the table"):
        ppo_pair.main(ppo_pair.parse([*flags[:2], *flags[4:]]))


@pytest.mark.parametrize("script", ["train", "evaluate"])
def test_a_missing_asset_pack_is_found_before_the_policy_is_loaded(script, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load_policy", None)
    monkeypatch.setattr(policies, "load_policy", None)
    with pytest.raises(runtime.Fault, match="unknown --assets 'nothing'"):
        if script == "train":
            ppo_pair.main(
                ppo_pair.parse(["--assets", "nothing", "--run-dir", str(tmp_path / "run")])
            )
        else:
            start = str(ROOT / "warmstart/pi05-flat")
            evaluate.main(evaluate.Args(start, assets="nothing", out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("shown, number", [(8, 5), (4, 1), (1, 0)])  # by the launcher, to this rank
def test_each_rank_takes_its_own_gpu_of_those_it_is_shown(shown, number, monkeypatch):
    chosen = Mock()
    monkeypatch.setattr(runtime, "LOCAL_RANK", 5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: shown)
    monkeypatch.setattr(torch.cuda, "set_device", chosen)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert runtime.own_device(True) == torch.device("cuda", number)
    chosen.assert_called_once_with(number)
    assert runtime.own_device(False) == torch.device("cpu")


def test_every_number_has_a_range():
    numbers = {
        k
        for k, v in runtime.flatten(ppo_pair.preset("pi05", camera_step=1.0)).items()
        if isinstance(v, (int, float)) and not isinstance(v, bool)
    }
    tables = [*ppo_pair.RANGES.values(), *ppo_pair.policies.RANGES.values()]
    assert numbers <= {name for names in tables for name in names.split()}


# ------------------------------------------------------------------------------------------ episode ids
@pytest.mark.parametrize("seed", [0, 1, 7, 1000, 12345, BIG])
def test_no_seed_trains_on_an_episode_that_another_purpose_uses(seed):
    """--seed 1000 trained on the evaluation's episodes, --seed 0 on sft.py's."""
    args = types.SimpleNamespace(seed=seed, num_envs=320)
    train = [i for n in (1, 2, 100_000) for i in runtime.train_ids(args, n, 4)]
    assert len(set(train)) == 3 * 4 * 320 and max(train) < 2**63
    others = [p for p in runtime.EPISODE_RANGES if p != "train"]
    for purpose in others:
        size = runtime.EPISODE_RANGES[purpose][2]
        for other in (0, 1, 999, 1000, 4611, BIG):
            ids = runtime.episode_ids(purpose, other, 0, size)
            assert ids[-1] < min(train)
    for other in (0, 1, BIG - 1):
        if other != seed:
            ids = runtime.episode_ids("train", other, 0, 2**31)
            assert not any(i in ids for i in train)


def test_ranges_of_two_purposes_never_meet():
    blocks = sorted(
        (start, start + (BIG * per_seed) + size)
        for start, per_seed, size in runtime.EPISODE_RANGES.values()
    )
    assert all(stop <= start for (_, stop), (start, _) in zip(blocks, blocks[1:]))
    assert all(size <= (per_seed or size) for _, per_seed, size in runtime.EPISODE_RANGES.values())
    with pytest.raises(runtime.Fault, match="too many"):
        runtime.episode_ids("eval", 0, 0, 1_000_001)


# ------------------------------------------------------------------------------------------ run directories
def new_run(**changes):
    args = ppo_pair.preset(**changes)
    runtime.make_run_dir(args)
    return args


@pytest.fixture(autouse=True)
def no_lock_stays(monkeypatch):
    monkeypatch.setattr(runtime, "LOCKS", contextlib.ExitStack())


def test_runs_that_start_in_one_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runtime.time, "strftime", lambda _: "20260101-000000")
    names = [new_run().run_dir for _ in range(3)]
    assert len(set(names)) == 3 and all((Path(name) / "args.json").exists() for name in names)


def test_a_folder_with_another_runs_checkpoints_is_refused(tmp_path):
    """It deleted the new checkpoint as the oldest, and printed the table of the old run's policy."""
    (tmp_path / "run/checkpoint-000100").mkdir(parents=True)
    with pytest.raises(runtime.Fault, match="--resume .*run, or name another --run-dir"):
        new_run(run_dir=str(tmp_path / "run"))
    assert list((tmp_path / "run").iterdir()) == [tmp_path / "run/checkpoint-000100"]
    new_run(run_dir=str(tmp_path / "run"), resume=str(tmp_path / "run"))


def test_a_folder_that_a_run_is_writing_to_is_refused(tmp_path):
    new_run(run_dir=str(tmp_path / "run"))
    with pytest.raises(runtime.Fault, match="another run is writing"):
        new_run(run_dir=str(tmp_path / "run"))
    runtime.LOCKS.close()
    new_run(run_dir=str(tmp_path / "run"))


def test_two_evaluations_never_write_to_one_folder(tmp_path):
    """Each wrote back what it had read at its start, so that the other's splits were lost."""
    with runtime.locked(tmp_path, "evaluation", "--out"):
        with pytest.raises(runtime.Fault, match="another evaluation is writing"):
            with runtime.locked(tmp_path, "evaluation", "--out"):
                pass


def test_a_file_system_without_locks_stops_nothing(tmp_path, monkeypatch):
    """Lustre's answer to flock, unless it is mounted so."""
    monkeypatch.setattr(runtime.fcntl, "flock", Mock(side_effect=OSError(errno.ENOSYS, "flock")))
    with runtime.locked(tmp_path, "run", "--run-dir"):
        pass


def test_a_folder_that_is_a_checkpoint_is_no_run(tmp_path):
    """Its args.json was overwritten, and the checkpoint damaged."""
    (tmp_path / "trainer.pt").write_text("")
    with pytest.raises(runtime.Fault, match="is a checkpoint of another run"):
        new_run(run_dir=str(tmp_path))
    assert not (tmp_path / "args.json").exists()


def test_sft_replaces_nothing_but_a_warm_start(tmp_path):
    """--out runs deleted every run."""
    (tmp_path / "runs/a").mkdir(parents=True)
    with pytest.raises(runtime.Fault, match="runs is there already"):
        sft.main(sft.preset("pi05-flat", out=str(tmp_path / "runs")))
    with pytest.raises(runtime.Fault, match="--clone-steps is 0"):
        sft.main(sft.preset("pi05-flat", out=str(tmp_path / "b"), clone_steps=0))
    with runtime.whole_directory(tmp_path / "start") as start:
        (start / "config.json").write_text("{}")
        (start / "args.json").write_text("{}")
    runtime.check_empty(tmp_path / "start", former=sft.is_start)


def test_merge_overwrites_nothing(tmp_path):
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(runtime.Fault, match="is there already"):
        policies.merge("runs/a", tmp_path)


def test_a_cut_log_does_not_stop_a_resumed_run(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"iteration": 1}\n{"iteration": 2}\n{"iteration": 3, "suc')
    args = types.SimpleNamespace(run_dir=str(tmp_path), track=False, iterations=4)
    with runtime.RunLog(args, done=3):
        pass
    assert (tmp_path / "log.jsonl").read_text() == '{"iteration": 1}\n{"iteration": 2}\n'


def test_a_damaged_later_checkpoint_does_not_drop_the_one_just_saved(tmp_path):
    """And a copy of the run in which `best` is no link goes on."""
    for name in ("checkpoint-000002", "checkpoint-000004", "best"):
        (tmp_path / name).mkdir()
    policy = types.SimpleNamespace(save=lambda directory: None)
    args = types.SimpleNamespace(keep=1)
    path = runtime.save_checkpoint(tmp_path, policy, args, dict(iteration=3, best=(0.5, 3)))
    assert path.is_dir() and (tmp_path / "best").resolve() == path.resolve()
    assert [p.name for p in runtime.checkpoints(tmp_path)] == [path.name, "checkpoint-000004"]


def test_resume_of_a_checkpoint_names_its_run(tmp_path):
    with pytest.raises(runtime.Fault, match=f"--resume {tmp_path / 'run'}$"):
        ppo_pair.parse(["--resume", str(tmp_path / "run/checkpoint-000003")])


@pytest.mark.parametrize("command", [["--resume", ""], ["--resume="], ["--checkpoint", ""]])
def test_an_empty_variable_of_a_script_starts_no_other_run(command):
    with pytest.raises(runtime.Fault, match=f"nothing follows '{command[0].strip('=')}'"):
        ppo_pair.parse(command)


@pytest.mark.parametrize(
    "content", ['{"backbone": "openvla-tiny", "detach_sen": false}', "[]", "null", "{"]
)
def test_resume_of_another_versions_run_is_one_sentence(content, tmp_path):
    checkpoint = tmp_path / "run/checkpoint-000001"
    with runtime.whole_directory(checkpoint) as directory:
        (directory / "args.json").write_text(content)
    with pytest.raises(
        runtime.Fault, match="args.json (is of another version|cannot be read|holds a)"
    ):
        ppo_pair.parse(["--resume", str(tmp_path / "run")])


# ------------------------------------------------------------------------------------------ logs
STATS = dict(
    success=0.5,
    reward=1.0,
    explained_variance=0.1,
    ratio_dev=1e-6,
    clipfrac=0.1,
    approx_kl=0.01,
    entropy=1.0,
    grad_norm=2.0,
    inv_kl=0.3,
    sen_kl=0.2,
    sen_clipped=0.1,
    unrelated_kl=1.2,
    rollout_seconds=1.0,
    view_seconds=0.1,
    update_seconds=2.0,
    decisions_per_second=10.0,
)


def test_the_log_of_a_resumed_run_has_every_iteration_once(tmp_path):
    args = ppo_pair.preset(run_dir=str(tmp_path))
    with runtime.RunLog(args, 0) as log:
        for i in (1, 2, 3):
            log.write(i, STATS, [0.5] * i, warming=i == 1)
    with runtime.RunLog(args, 2) as log:
        log.write(3, STATS | dict(success=0.7), [0.5, 0.5, 0.7], warming=False)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2, 3] and [
        line["success"] for line in lines
    ] == [0.5, 0.5, 0.7]
    assert [line["warming"] for line in lines] == [True, False, False] and lines[
        0
    ].keys() >= STATS.keys()


def test_track_starts_wandb_before_the_writer_that_it_reads(tmp_path, monkeypatch):
    """The other way round, no metric is synchronised."""
    calls = []
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **options: calls.append(("wandb", options["sync_tensorboard"]))
    wandb.__spec__ = types.SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    writer = runtime.SummaryWriter
    monkeypatch.setattr(
        runtime, "SummaryWriter", lambda *a, **k: calls.append("writer") or writer(*a, **k)
    )
    with runtime.RunLog(ppo_pair.preset(run_dir=str(tmp_path), track=True), 0):
        pass
    assert calls == [("wandb", True), "writer"]


def test_track_without_wandb_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(runtime.Fault, match="pip install wandb"):
        runtime.RunLog(ppo_pair.preset(run_dir=str(tmp_path), track=True), 0)


def test_moments_are_those_of_numpy():
    x = torch.randn(7, 3)
    mean, std, n = runtime.moments(x)
    assert (mean, std, n) == (
        pytest.approx(x.double().mean().item()),
        pytest.approx(x.double().std(unbiased=False).item()),
        21,
    )


def test_an_update_that_is_cut_short_is_undone_after_the_critics_warm_up_too():
    """Before the first update of the policy its weights are still frozen by the warm-up."""
    policy = torch.nn.ModuleDict({"trunk": torch.nn.Linear(3, 3), "head": torch.nn.Linear(3, 1)})
    groups = [dict(params=list(policy[name].parameters())) for name in ("trunk", "head")]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    state = runtime.RunState(ppo_pair.preset(), policy, optimizer, None, None)

    def step():
        policy.requires_grad_(True)
        policy["head"](policy["trunk"](torch.ones(2, 3))).sum().backward()
        optimizer.step()

    step()
    policy["trunk"].requires_grad_(False)
    before, weights = state.snapshot(), [p.detach().clone() for p in policy.parameters()]
    moments = [s["exp_avg"].clone() for s in optimizer.state.values()]
    step()
    assert not any(torch.equal(p, q) for p, q in zip(policy.parameters(), weights))
    state.restore(before)
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), weights))
    assert all(torch.equal(s["exp_avg"], m) for s, m in zip(optimizer.state.values(), moments))


def test_a_group_without_samples_has_no_mean():
    means = runtime.Means()
    stats = dict(loss=torch.ones(2), ratio_dev=torch.zeros(2), inv_kl=torch.tensor([1.0, 3.0]))
    means.add(stats, dict(k0=torch.tensor([True, True]), k1=torch.tensor([False, False])))
    means.all_reduce([])
    result = means.result()
    assert result["inv_kl_k0"] == 2 and "inv_kl_k1" not in result
