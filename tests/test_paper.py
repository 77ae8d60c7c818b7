"""The paper, the code and the pages agree: Table 3, equations, commands, flags, links, plain text."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import tyro

import policies
import ppo_pair

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "results/README.md"]
GUIDES = PAGES[:-1]  # results/README.md quotes what was run, also by flags that are gone
CODE = [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]
MAP = (ROOT / "docs/paper_map.md").read_text()
names = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
guides = pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)


# ------------------------------------------------------------------------------------ the paper
TABLE_3 = {  # as the paper prints it
    "openvla": dict(iterations=240, num_envs=128, num_steps=80, batch_size=640, update_epochs=1,
                    gamma=0.99, gae_lambda=0.95, clip_coef=0.2, inv_coef=1.0, sen_coef=0.2,
                    sen_clip=0.8),
    "pi05": dict(iterations=280, num_envs=320, num_steps=80, batch_size=5120, update_epochs=5,
                 gamma=0.99, gae_lambda=0.95, clip_coef=0.2, inv_coef=4.0, sen_coef=4.0,
                 sen_clip=0.08, horizon=8, replan=5, denoise_steps=4, noise_level=0.5),
}  # fmt: skip


@pytest.mark.parametrize("backbone", TABLE_3)
def test_table_3(backbone):
    args = ppo_pair.preset(backbone)
    values = vars(args) | vars(args.policy)
    assert {name: values[name] for name in TABLE_3[backbone]} == TABLE_3[backbone]
    column = ("openvla", "pi05").index(backbone)
    for name, value in TABLE_3[backbone].items():
        flag = f"--{name.replace('_', '-')}"
        (row,) = re.findall(rf"^\| [^|]* \| `{flag}` \| ([^|]*) \| ([^|]*) \|$", MAP, re.M)
        assert float(row[column]) == value, f"docs/paper_map.md: {flag} of {backbone}"


@pytest.mark.parametrize("backbone", ["pi05-tiny", "pi05-flat"])
def test_a_small_start_is_loaded_with_the_settings_it_was_made_with(backbone):
    """sft.py takes them from the network's config, ppo_pair.py from its presets."""
    policy = policies.load_policy(backbone)
    preset = vars(ppo_pair.preset(backbone).policy)
    for flag in "horizon", "replan", "denoise_steps", "noise_level":
        assert policy.config[policy.settings[flag]] == preset[flag], flag


def test_one_optimizer_step_an_epoch_of_pi05():
    pi05 = TABLE_3["pi05"]
    assert pi05["num_envs"] * pi05["num_steps"] // pi05["replan"] == pi05["batch_size"]


def test_every_equation_is_tagged_once_and_where_the_map_says():
    tags = {}
    for path in CODE:
        if path.parent.name == "tests":
            continue
        for equation in re.findall(r"# Eq\. \((\d)\) ", path.read_text()):
            assert equation not in tags, f"Eq. ({equation}) is tagged twice"
            tags[equation] = path.relative_to(ROOT).as_posix()
    rows = re.findall(r"^\| Eq\. \((\d)\) .*?\| `([\w./]+)` \| `(\w+)` \|$", MAP, re.M)
    assert {equation: file for equation, file, _ in rows} == tags
    assert sorted(tags) == list("12345")
    for equation, file, function in rows:
        before = (ROOT / file).read_text().partition(f"# Eq. ({equation}) ")[0]
        assert re.findall(r"^def (\w+)", before, re.M)[-1] == function, f"Eq. ({equation})"


# ------------------------------------------------------------------------------------ the pages
def test_pages_and_code_are_plain_ascii():
    for path in (*PAGES, *CODE):
        assert path.read_text().isascii(), path


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@guides
def test_the_english_is_plain(page):
    text = re.sub(r"`[^`]*`", "", re.sub(r"```.*?```", "", page.read_text(), flags=re.S))
    for phrase in ("of whom", "as it is,", "likewise", "anew", " hence ", "thereof"):
        assert phrase not in text.lower(), f"{page.name}: {phrase}"
    prose = " ".join(line for line in text.splitlines() if not line.startswith("|"))
    for sentence in re.split(r"(?<=[.:?!])\s", prose):
        assert sentence.count(";") < 3, f"{page.name}: a chain of semicolons: {sentence}"


def slug(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@names
def test_links_and_pictures_are_there(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            assert anchor in map(slug, headings), f"{page.name}: {target}"


@guides
def test_files_in_backticks_are_there(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    forked = set(re.findall(r"^--- (.*)$", page.read_text(), re.M))  # made by a recipe
    for name in re.findall(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|md|json|png))`", text):
        places = (ROOT / name, page.parent / name, ROOT / "tests" / name)
        made_by_a_run = (
            "config.json",
            "norm_stats.json",
            "adapter_config.json",
            "tokenizer.json",
            "args.json",
            "eval_info.json",
            "table.md",
            "curves.png",
        )
        there = any(place.exists() for place in places)
        assert there or name in made_by_a_run or name in forked, f"{page.name}: {name}"


# ------------------------------------------------------------------------------------ the commands
STARTS = ("python ", "torchrun ", "make ", "tensorboard ", "grep ", "pip ", "git ")


def commands(page: Path) -> list[str]:
    """Those of the code blocks without a language, or in the shell's, and those in backticks."""
    text, found = page.read_text(), []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M):
        if language in ("", "sh", "bash"):
            lines = block.replace("\\\n", " ").splitlines()
            lines = [" ".join(line.split()) for line in lines]
            found += [line for line in lines if line.startswith(STARTS)]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    found += [" ".join(x.split()) for x in re.findall(r"`([^`]+)`", prose) if x.startswith(STARTS)]
    return found


class Parsed(BaseException):
    """The command line was understood."""


def understand(words: list[str], monkeypatch):
    """Run a script of ours up to the point where its command line has been parsed."""
    script, *arguments = words
    assert (ROOT / script).is_file(), f"there is no {script}"
    if not re.search("tyro|runtime.parse", (ROOT / script).read_text()):
        assert not arguments, f"{script} takes no arguments"
        return
    real = tyro.cli

    def cli(what, **options):
        if not isinstance(what, type):  # a function: its arguments are what counts
            raise Parsed(tyro.extras.get_parser(what).parse_args(options["args"]))
        raise Parsed(real(what, **options))

    def subcommand(functions, **options):
        name, *rest = sys.argv[1:]
        return cli(functions[name], args=rest)

    monkeypatch.setattr(tyro, "cli", cli)
    monkeypatch.setattr(tyro.extras, "subcommand_cli_from_dict", subcommand)
    monkeypatch.setattr(sys, "argv", [str(ROOT / script), *arguments])
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / script), run_name="__main__")


MAKEFILE = (ROOT / "Makefile").read_text()
FORKED = ("--lit-coef", "evening", "gaussian-flat", "train room")  # tests/test_fork.py runs these


@guides
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_command_is_understood(page, monkeypatch, capsys):
    for command in commands(page):
        words = shlex.split(command, comments=True)
        if page.name == "fork.md" and any(name in command for name in FORKED):
            continue
        if words[0] == "make":
            targets = [word for word in words[1:] if "=" not in word]
            assert all(re.search(rf"^{target}:", MAKEFILE, re.M) for target in targets), command
            settings = dict(word.split("=", 1) for word in words[1:] if "=" in word)
            assert all(re.search(rf"^{name} \?=", MAKEFILE, re.M) for name in settings), command
            words = ["python", "ppo_pair.py", *shlex.split(settings.get("ARGS", ""))]
            if "BACKBONE" in settings:
                words += ["--backbone", settings["BACKBONE"]]
        if words[0] == "torchrun":
            script = next(i for i, word in enumerate(words) if word.endswith(".py"))
            flags = {word for word in words[:script] if word.startswith("--")}
            assert flags <= {
                "--nproc-per-node",
                "--nnodes",
                "--rdzv-backend",
                "--rdzv-id",
                "--rdzv-endpoint",
            }, command
            words = ["python", *words[script:]]
        if words[0] != "python" or "..." in words:
            continue
        if words[1] == "-c":
            compile(words[2], command, "exec")
        elif words[1:3] == ["-m", "pytest"]:
            for file in (word for word in words[3:] if word.endswith(".py")):
                assert (ROOT / file).is_file(), command
        elif "--help" not in words:
            with monkeypatch.context() as patch:
                try:
                    understand(words[1:], patch)
                except SystemExit:
                    pytest.fail(f"{page.name}: {command}\n{capsys.readouterr().err}")


@guides
def test_every_flag_exists(page):
    """Also where no command is given: as a field of some command line, under that very name."""
    theirs = {"nproc-per-node", "nnodes", "rdzv-backend", "rdzv-endpoint", "rdzv-id", "logdir",
              "shutdown-timeout"}  # fmt: skip
    fields = re.compile(r"^\+?    (\w+): ", re.M)
    text = page.read_text()
    known = {name for path in CODE for name in fields.findall(path.read_text())}
    known |= set(fields.findall(text)) | {"help"}  # a recipe brings flags of its own
    known = {name.replace("_", "-") for name in known} | theirs
    used = set(re.findall(r"(?<![\w-])--([a-z][a-z0-9-]*[a-z0-9])", text))
    assert used <= known, used - known
