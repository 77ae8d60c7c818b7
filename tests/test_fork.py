"""The recipes of docs/fork.md, applied to a copy of the repository: its own code blocks, then one iteration of training."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]


def recipes() -> list[list[tuple[str, list[str]]]]:
    """Of each recipe its blocks: file, lines with their +, - or space."""
    _, *sections = (ROOT / "docs/fork.md").read_text().split("\n## ")
    found = []
    for section in sections:
        blocks = [block.splitlines() for block in re.findall(r"```diff\n(.*?)```", section, re.S)]
        found.append([(lines[0].removeprefix("--- "), lines[1:]) for lines in blocks])
    return found


def apply(root: Path, name: str, lines: list[str]):
    """Change root/name. The lines that are there already must tell exactly one place."""
    file = root / name
    text = file.read_text().splitlines() if file.exists() else []
    old = [line[1:] for line in lines if not line.startswith("+")]
    assert old or not file.exists(), f"{name}: the block does not say where"

    def same(wanted, line):
        return line.startswith(wanted[:-3]) if wanted.endswith("...") else line == wanted

    places = [
        i for i in range(len(text) - len(old) + 1) if all(map(same, old, text[i : i + len(old)]))
    ]
    assert len(places) == 1, f"{name}: {len(places)} places look like {old}"
    there, new = iter(text[places[0] :]), []
    for line in lines:
        if line.startswith("+"):
            new.append(line[1:])
            continue
        kept = next(there)
        new += [] if line.startswith("-") else [kept]
    text[places[0] : places[0] + len(old)] = new
    file.write_text("\n".join(text) + "\n")


def test_the_recipes_are_as_short_as_they_say():
    loss, split, pack, backbone = recipes()
    assert len({name for name, _ in loss}) == 2 and len(loss) == 5
    assert [sum(line.startswith("+") for line in lines) for _, lines in split] == [1]
    for recipe, places in ((pack, 1), (backbone, 3)):
        new = [name for name, _ in recipe if not (ROOT / name).exists()]
        assert len(new) == 1 and len(recipe) == 1 + places


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    """A copy with all four."""
    root = tmp_path_factory.mktemp("fork")
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy(path, root)
    for folder in ("backbones", "scenes", "tools"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for recipe in recipes():
        for name, lines in recipe:
            apply(root, name, lines)
    return root


def test_a_forked_file_is_clean(fork):
    files = {name for recipe in recipes() for name, _ in recipe}
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *files],
            cwd=fork,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def trained(fork):
    """One iteration with the new loss and a table with the new split; one with the new backbone."""
    code = """
import policies, ppo_pair, torch
for backbone in ("openvla-flat", "gaussian-flat"):
    torch.manual_seed(0)
    policies.load_policy(backbone).save(f"{backbone}_start")
    flags = f"--backbone {backbone} --checkpoint {backbone}_start --run-dir {backbone} --iterations 1"
    flags += " --critic-warmup 0 --num-envs 8 --num-steps 6 --batch-size 24 --update-epochs 1"
    flags += " --sen-coef 0 --lit-coef 100"
    ppo_pair.main(ppo_pair.parse([*flags.split(), "--eval-episodes", "2"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=fork, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return fork, done.stdout


def has_learnt(root: Path, backbone: str) -> bool:
    start, end = (
        load_file(directory / "model.safetensors")
        for directory in (root / f"{backbone}_start", root / backbone / "checkpoint-000001")
    )
    return any(not start[key].equal(end[key]) for key in start)


def test_a_new_loss_on_a_new_view_trains(trained):
    root, _ = trained
    (line,) = (root / "openvla-flat/log.jsonl").read_text().splitlines()
    log = json.loads(line)
    assert log["lit_kl"] > 0 and log["inv_kl"] > 0 and has_learnt(root, "openvla-flat")
    args = json.loads((root / "openvla-flat/checkpoint-000001/args.json").read_text())
    terms = log["pg_loss"] + log["v_loss"] + args["inv_coef"] * log["inv_kl"]
    assert log["loss"] == pytest.approx(terms + 100 * log["lit_kl"], rel=1e-4)
    assert 100 * log["lit_kl"] > 1e-3 * abs(terms)  # it would be missed


def test_a_new_split_is_played(trained):
    root, table = trained
    assert table.count("| room |") == 2  # one table per run
    records = (root / "openvla-flat/checkpoint-000001/eval/episodes.jsonl").read_text()
    assert sum(json.loads(line)["split"] == "room" for line in records.splitlines()) == 2


def test_a_new_backbone_trains(trained):
    root, _ = trained
    assert has_learnt(root, "gaussian-flat")


@pytest.mark.slow
def test_a_new_pack_is_drawn_and_solved(fork):
    code = """
import envs
from scenes.builtin import BuiltinPack
pack = envs.find_pack("evening")
episodes = [envs.sample_episode(i, "clutter-8", pack) for i in range(200)]
assert max(e.target for e in episodes) == 11
assert {d for e in episodes for d in e.distractors if d >= 12} == set(range(12, 25))
env = envs.make_env("evening")
for i in range(4):
    env.reset(seed=0, options=dict(episodes=[env.sample(i, "train")]))
    evening = env.picture()[0].mean((0, 1))
    env.set_light(BuiltinPack.lights[0])
    day = env.picture()[0].mean((0, 1))
    for _ in range(pack.max_episode_steps):
        env.step(pack.oracle(env))
    print("solved" if env.success else "not", evening[0] / evening[2] > 1.2 * day[0] / day[2])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=fork, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("solved True") >= 3, done.stdout
