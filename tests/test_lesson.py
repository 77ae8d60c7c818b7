"""Every command of docs/lesson.md and docs/collapse.md runs, at toy budgets."""

import json
import re
import runpy
import shlex
import sys

import pytest
import torch
from test_paper import ROOT, commands

import policies

TOY = {  # more flags, the last of which count
    "ppo_pair.py": "--iterations 2 --num-envs 8 --num-steps 6 --batch-size 24 --update-epochs 1"
    " --critic-warmup 0 --eval-episodes 2",
    "evaluate.py": "--num-episodes 2 --num-envs 2",
}
LESSON = ROOT / "docs/lesson.md"
FLAT, SIMULATOR = (LESSON.read_text().split("## 6. ")[i] for i in (0, 1))


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder in which the repository's files can be named, with a start of its own for Flatland."""
    desk = tmp_path_factory.mktemp("desk")
    for name in ("tools", "docs"):
        (desk / name).symlink_to(ROOT / name)
    (desk / "warmstart").mkdir()
    (desk / "warmstart/openvla-tiny").symlink_to(ROOT / "warmstart/openvla-tiny")
    torch.manual_seed(0)
    policies.load_policy("openvla-flat").save(desk / "warmstart/openvla-flat")
    return desk


@pytest.fixture
def run(desk, monkeypatch):
    """run(command): in this process, as if typed there -> its exit code."""

    def run(command: str) -> int:
        script, *words = shlex.split(command, comments=True)[1:]
        if "--compare" not in words and "--plan" not in words:
            words += TOY.get(script, "").split()
        if script == "ppo_pair.py" and "--backbone openvla-flat" in command:
            words += ["--checkpoint", "warmstart/openvla-flat"]
        monkeypatch.chdir(desk)
        monkeypatch.setattr(sys, "argv", [str(ROOT / script), *words])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            return end.code or 0
        return 0

    return run


def of(text: str) -> list[str]:
    """The commands in a part of the lesson."""
    text = " ".join(text.replace("\\\n", " ").split())
    return [c for c in commands(LESSON) if c in text and c.startswith("python ")]


def test_the_flat_half_runs(run, desk):
    played = [command for command in of(FLAT) if "--check" not in command]
    assert sum("ppo_pair.py" in command for command in played) == 3
    for command in played:
        assert run(command) == 0, command
    for name in ("pair", "no_inv", "blind"):
        log = [json.loads(x) for x in (desk / f"runs/{name}/log.jsonl").read_text().splitlines()]
        assert all(line["inv_kl"] > 0 for line in log)
    assert (desk / "curves.png").stat().st_size > 10_000
    assert (desk / "pair.png").stat().st_size > 1_000


def test_one_kl_by_hand(desk, monkeypatch, capsys):
    monkeypatch.setattr(policies, "default_checkpoint", lambda name: desk / f"warmstart/{name}")
    (code,) = re.findall(r"```python\n(.*?)```", LESSON.read_text(), re.S)
    space = {}
    exec(code, space)
    by_hand = space["by_hand"](space["here"], space["alt"])
    assert by_hand.shape == (7,)
    torch.testing.assert_close(by_hand.mean(), space["policy"].kl(space["here"], space["alt"])[0])
    assert "Eq. (3):" in capsys.readouterr().out


def test_the_exercises_run(run):
    (exercise,) = [c for c in of(SIMULATOR) if "--augment" in c]
    assert run(exercise) == 0


@pytest.mark.slow
def test_the_simulator_half_runs(run, desk):
    played = [command for command in of(SIMULATOR) if "--augment" not in command]
    assert len(played) >= 4
    for command in played:
        assert run(command) == 0, command
    assert len(list((desk / "runs/look/videos").glob("*.mp4"))) == 4


COLLAPSE = [c for c in commands(ROOT / "docs/collapse.md") if "ppo_pair.py --backbone" in c]


@pytest.mark.parametrize("command", COLLAPSE, ids=lambda command: command.split("runs/")[-1])
def test_what_collapses_runs(run, command):
    """Whether it collapses takes longer, and a start that has something to lose."""
    assert run(command) == (2 if "not_finite" in command else 0)
