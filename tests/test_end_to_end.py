"""The real command lines on the real simulator, at toy budgets: results are checked, not only exit codes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_scale import assert_same, state

import envs
import policies
import ppo_pair
import runtime

ROOT = Path(__file__).parents[1]
SMALL = "--backbone openvla-tiny --num-envs 4 --num-steps 20 --batch-size 40 --update-epochs 1 --critic-warmup 0 --eval-episodes 0 --save-every 1"


def run(*command, timeout=600):
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A tiny policy that has learnt nothing, as a checkpoint."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("start")
    policies.load_policy("openvla-tiny").save(directory)
    (directory / "args.json").write_text(
        json.dumps(dict(backbone="openvla-tiny", assets="builtin"))
    )
    return directory


@pytest.fixture(scope="module")
def trained(start, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "pair"
    flags = SMALL.replace(
        "--eval-episodes 0", "--eval-episodes 2"
    )  # adapters: train, evaluate, resume
    flags += " --lora-rank 4 --lora-alpha 8 --lora-targets q_proj v_proj qkv --gradient-checkpointing True"
    done = run(
        "ppo_pair.py",
        "--checkpoint",
        str(start),
        "--run-dir",
        str(run_dir),
        "--iterations",
        "2",
        *flags.split(),
    )
    assert done.returncode == 0, done.stderr
    return run_dir, done


def test_training_moves_the_policy_logs_and_evaluates(start, trained):
    run_dir, done = trained
    config = json.loads((run_dir / "checkpoint-000002/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8) and set(config["target_modules"]) == {
        "q_proj",
        "v_proj",
        "qkv",
    }
    before, after = (
        policies.load_policy("openvla-tiny", d).state_dict()
        for d in (start, run_dir / "checkpoint-000002")
    )
    moved = [key for key, p in after.items() if ".lora_B" in key and p.abs().max() > 0]
    assert any("language_model" in key for key in moved) and any(
        "featurizer" in key for key in moved
    )
    frozen = {
        key.replace(".base_layer.", "."): p
        for key, p in after.items()
        if ".lora_" not in key and "value_head" not in key
    }
    assert all(torch.equal(p, before[key]) for key, p in frozen.items())
    health = [
        line for line in done.stderr.splitlines() + done.stdout.splitlines() if "ratio_dev" in line
    ]
    assert len(health) == 2 and all(
        word in health[0] for word in ("inv_kl", "sen_kl", "sen_clipped", "unrelated_kl")
    )
    deviation = float(health[0].split("ratio_dev ")[1].split()[0])
    assert deviation < 1e-3  # the update computes the very log-probs of the rollout
    assert list((run_dir / "tensorboard").iterdir())
    records = [
        json.loads(x)
        for x in (run_dir / "checkpoint-000002/eval/episodes.jsonl").read_text().splitlines()
    ]
    assert sorted({r["split"] for r in records}) == sorted(envs.SPLITS) and len(records) == 2 * len(
        envs.SPLITS
    )
    assert "OOD average" in done.stdout


def test_resume_goes_on_where_it_stopped(trained):
    run_dir, _ = trained
    done = run("ppo_pair.py", "--resume", str(run_dir), "--iterations", "3", timeout=600)
    assert done.returncode == 0, done.stderr
    adapters = [
        load_file(run_dir / f"checkpoint-00000{i}/adapter_model.safetensors") for i in (2, 3)
    ]
    assert adapters[0].keys() == adapters[1].keys()
    assert not any(
        torch.equal(p, adapters[1][key]) for key, p in adapters[0].items() if "lora_B" in key
    )
    state = torch.load(run_dir / "checkpoint-000003/trainer.pt", weights_only=True)
    assert state["iteration"] == 3 and len(state["success"]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["openvla-tiny", "pi05-tiny"])
def test_killed_at_random_instants_and_resumed_is_as_if_never_killed(tmp_path, backbone):
    """Bitwise, with the real physics, and each time by a Python of its own: weights, optimizer, history."""
    start = ROOT / "warmstart" / backbone
    if not start.is_dir():
        start = tmp_path / "start"
        torch.manual_seed(0)
        policies.load_policy(backbone).save(start)
    flags = [*SMALL.split(), "--backbone", backbone, "--checkpoint", str(start)]
    flags += "--iterations 7 --num-envs 2 --save-every 2".split()
    done = run("ppo_pair.py", "--run-dir", str(tmp_path / "reference"), *flags, timeout=3600)
    assert done.returncode == 0, done.stderr
    log = tmp_path / "log"
    for lines in (3, 1, 0):  # killed up to a second after so many iterations
        before = log.read_text().count("ratio_dev") if log.exists() else 0
        with open(log, "a") as file:
            command = [
                sys.executable,
                "ppo_pair.py",
                "--run-dir",
                str(tmp_path / "run"),
                "--resume",
                "auto",
                *flags,
            ]
            environment = dict(os.environ, PYTHONUNBUFFERED="1")
            process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, env=environment)
        while (
            lines and process.poll() is None and log.read_text().count("ratio_dev") < before + lines
        ):
            time.sleep(0.05)
        if lines:
            time.sleep(random.uniform(0, 1))
            process.kill()
        assert process.wait(3600) == (-signal.SIGKILL if lines else 0), log.read_text()
    assert "going on from" in log.read_text() and "Traceback" not in log.read_text()
    assert_same(*(state(tmp_path / run / "checkpoint-000007") for run in ("run", "reference")))


def test_ppo_baseline_computes_no_views(start, tmp_path):
    done = run(
        "ppo_pair.py",
        "--checkpoint",
        str(start),
        "--run-dir",
        str(tmp_path / "ppo"),
        "--iterations",
        "1",
        "--inv-coef",
        "0",
        "--sen-coef",
        "0",
        *SMALL.split(),
    )
    assert done.returncode == 0, done.stderr
    assert "inv_kl" not in done.stdout + done.stderr and "sen_kl" not in done.stdout + done.stderr
    before, after = (
        load_file(d / "model.safetensors") for d in (start, tmp_path / "ppo/checkpoint-000001")
    )
    moved = [key for key, p in after.items() if not torch.equal(p, before[key])]
    assert any("language_model" in key for key in moved) and any(
        "featurizer" in key for key in moved
    )


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ("--backbone gpt", "unknown --backbone"),
        ("--checkpoint no/such/place", "no/such/place"),
        ("--num-envs 0", "--num-envs"),
        ("--run-dir /proc/nowhere", "--run-dir"),
        ("--resume no/such/run", "--resume"),
    ],
)
def test_bad_input_gets_one_sentence(flags, sentence, capsys):
    command = [*SMALL.split(), *flags.split()] if "--num-envs" not in flags else flags.split()
    with pytest.raises(runtime.Fault, match=sentence) as error:
        ppo_pair.main(ppo_pair.parse(command))
    assert "\n" not in str(error.value)


def test_bad_input_exits_with_2_and_no_traceback():
    done = run("ppo_pair.py", "--backbone", "gpt")
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: ")
        and "Traceback" not in done.stderr
    )


def test_a_killed_worker_ends_the_run_and_the_checkpoint_still_loads(start, tmp_path):
    flags = [
        "--checkpoint",
        str(start),
        "--run-dir",
        str(tmp_path / "run"),
        "--iterations",
        "999",
        *SMALL.split(),
    ]
    process = subprocess.Popen(
        [sys.executable, "ppo_pair.py", *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.time() + 300
    while not (tmp_path / "run/checkpoint-000001").exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [int(c) for c in children if b"serve(" in Path(f"/proc/{c}/cmdline").read_bytes()]
    os.kill(workers[0], signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2 and "SIGKILL" in stderr and "Traceback" not in stderr
    newest = runtime.newest_checkpoint(tmp_path / "run")
    policies.load_policy("openvla-tiny", newest)
