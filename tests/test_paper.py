"""README, code and paper agree: Table 3, the map of equations, the marks of decisions."""

import re
from pathlib import Path

import ppo_pair

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "results/README.md")
FILES = ["ppo_pair.py", "views.py", "policies.py", "envs.py", "evaluate.py", "sft.py"]


def test_table_3():
    openvla = ppo_pair.TABLE_3["openvla"]
    paper = dict(iterations=240, num_envs=128, num_steps=80, batch_size=640, update_epochs=1, inv_coef=1.0, sen_coef=0.2,
                 sen_clip=0.8)  # fmt: skip
    assert {name: openvla[name] for name in paper} == paper
    pi05 = ppo_pair.TABLE_3["pi05"]
    paper = dict(iterations=280, num_envs=320, num_steps=80, batch_size=5120, update_epochs=5, inv_coef=4.0, sen_coef=4.0,
                 sen_clip=0.08, horizon=8, replan=5, denoise_steps=4, noise_level=0.5)  # fmt: skip
    assert {name: pi05[name] for name in paper} == paper
    assert (
        pi05["num_envs"] * pi05["num_steps"] // pi05["replan"] == pi05["batch_size"]
    )  # one optimizer step an epoch
    defaults = ppo_pair.Args()
    assert (defaults.gamma, defaults.gae_lambda, defaults.clip_coef) == (0.99, 0.95, 0.2)


def test_every_equation_appears_once_and_the_readme_points_at_it():
    tags = {}
    for name in FILES:
        for number, line in enumerate((ROOT / name).read_text().splitlines(), start=1):
            for equation in re.findall(r"# Eq\. \((\d)\) ", line):
                assert equation not in tags, f"Eq. ({equation}) is tagged twice"
                tags[equation] = f"{name}:{number}"
    assert sorted(tags) == list("12345")
    readme = (ROOT / "README.md").read_text()
    for equation, place in tags.items():
        row = re.search(rf"^\| \({equation}\).*$", readme, re.MULTILINE)
        assert row and f"`{place}`" in row[0], f"README: Eq. ({equation}) is at {place}"


def test_files_are_plain_ascii():
    for path in (*PAGES, *ROOT.glob("*.py"), *ROOT.glob("*/*.py")):
        assert path.read_text().isascii(), path


def test_every_flag_in_the_readmes_exists():
    """As a field of some command line of ours, under that very name: --no-x is one only where tyro makes it."""
    torchrun_and_tensorboard = {
        "nproc-per-node",
        "nnodes",
        "rdzv-backend",
        "rdzv-endpoint",
        "rdzv-id",
        "logdir",
    }
    code = "\n".join(path.read_text() for path in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py")))
    fields = {name.replace("_", "-") for name in re.findall(r"^    (\w+): ", code, re.MULTILINE)}
    flags = set(
        re.findall(r"--([a-z][a-z0-9-]*[a-z0-9])", "\n".join(path.read_text() for path in PAGES))
    )
    assert flags - fields - torchrun_and_tensorboard == set()
