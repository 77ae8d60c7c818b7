"""Intervals over runs and episodes against the truth, tables and figures from records."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from test_evaluate import make_records, write_records

import evaluate as ev
import runtime
from tools import figures, plot, tables
from tools import study as studies

ROOT = Path(__file__).parents[1]
OOD = ["texture", "lighting", "pose", "clutter-2", "clutter-4", "clutter-6", "clutter-8"]
ALL = ["train", *OOD]


def outcomes_of(**arms):
    """Arms of runs of records, aligned."""
    return ev.align(arms)


def differences(records_a, records_b, metric="success_once"):
    """{row: (rate a, rate b, Estimate of B - A, n)} of two single runs."""
    outcomes = outcomes_of(a=[records_a], b=[records_b])
    a, b = outcomes.success[metric].values()
    return {
        name: (ev.influence(a, row)[0][0], ev.influence(b, row)[0][0], ev.difference(a, b, row), sum(m.sum() for _, m in row))
        for name, row in ev.rows_of_splits(outcomes).items()
    }  # fmt: skip


def one_split(x):
    """Success (R, E) as an array (R, E, 1) and its only row."""
    return x[:, :, None].astype(float), [(1.0, np.ones((x.shape[1], 1), bool))]


# ---- one run in each arm


def test_identical_runs():
    records = make_records("train", [1, 0, 1, 1]) + make_records("texture", [0, 0, 1, 1])
    same = differences(records, records[::-1])  # the order of the lines means nothing
    assert list(same) == ["train", "texture", "OOD average", "all splits"]
    assert [n for *_, n in same.values()] == [4, 4, 4, 8]
    assert all((d.value, d.low, d.high) == (0, 0, 0) for _, _, d, _ in same.values())


def test_a_constant_shift_is_certain():
    a, b, d, _ = differences(make_records("train", [0] * 9), make_records("train", [1] * 9))[
        "train"
    ]
    assert (a, b, d.low, d.high) == (0, 1, 1, 1)


def test_bootstrap_matches_its_exact_distribution():
    """10 of 40 pairs improve, none worsens: the resampled difference is Binomial(40, 1/4) / 40."""
    a, b = [0] * 20 + [1] * 20, [1] * 10 + [0] * 10 + [1] * 20
    *_, d, _ = differences(make_records("train", a), make_records("train", b))["train"]
    assert d.value == pytest.approx(0.25)
    exact = stats.binom(40, 0.25).ppf([0.025, 0.975]) / 40
    assert (d.low, d.high) == pytest.approx(tuple(exact), abs=1 / 40 + 1e-6)  # one step


def test_pairing_matters():
    """Two runs that fail on the same hard scenes: the paired interval is far shorter than the unpaired one."""
    rng = np.random.default_rng(1)
    a = rng.random(200) < 0.5
    b = a ^ (rng.random(200) < 0.05)  # the same outcome in 95 % of the scenes
    *_, d, _ = differences(make_records("train", a), make_records("train", b))["train"]
    unpaired = 2 * 1.96 * np.sqrt(a.var() / 200 + b.var() / 200)
    paired = 2 * 1.96 * np.std(b.astype(float) - a) / np.sqrt(200)
    assert d.high - d.low == pytest.approx(paired, rel=0.15)
    assert d.high - d.low < 0.4 * unpaired
    *_, d, _ = differences(make_records("train", a), make_records("train", rng.permutation(b)))[
        "train"
    ]
    assert d.high - d.low == pytest.approx(unpaired, rel=0.15)


def test_ood_average_counts_clutter_once_and_keeps_ids_together():
    a = [r for split in OOD for r in make_records(split, [0] * 50)]
    b = [r for split in OOD for r in make_records(split, [split == "pose"] * 50)]
    average = differences(a, b)
    assert average["OOD average"][1] == pytest.approx(1 / 4)
    assert average["all splits"][1] == pytest.approx(1 / 7)
    # The same ids improve in every split: averaging seven copies must not shorten the interval.
    improved = [1] * 15 + [0] * 35
    together = differences(a, [r for split in OOD for r in make_records(split, improved)])
    wide, one = (together[name][2] for name in ("OOD average", "pose"))
    assert wide.high - wide.low == pytest.approx(one.high - one.low)


def test_splits_of_unequal_size_and_seeds():
    a = (
        make_records("train", [0] * 30)
        + make_records("pose", [0] * 30)
        + make_records("pose", [0] * 30, seed=1)
    )
    b = (
        make_records("train", [1] * 30)
        + make_records("pose", [1, 0, 0] * 10)
        + make_records("pose", [1, 1, 0] * 10, seed=1)
    )
    rows = differences(a, b)
    assert (rows["train"][3], rows["pose"][3]) == (30, 60)
    assert (rows["train"][2].low, rows["train"][2].high) == (1, 1)
    assert rows["pose"][1] == pytest.approx(0.5)
    few = make_records("train", [1] * 30) + make_records("pose", [1, 0])
    assert all((d.low, d.high) == (0, 0) for _, _, d, _ in differences(few, few).values())


def test_unmatched_episodes_are_a_fault():
    four, two = make_records("train", [1] * 4), make_records("train", [1] * 2)
    with pytest.raises(
        ev.Fault,
        match=r"^2 episodes .*a \(run 1\) and b \(run 1\).* train, episode 1000000002, seed 0",
    ):
        ev.align({"a": [four], "b": [two]})
    with pytest.raises(ev.Fault, match=r"^2 episodes .*a \(run 2\)"):
        ev.align({"a": [four, two], "b": [four]})
    with pytest.raises(ev.Fault, match="^4 episodes"):
        ev.align({"a": [two], "b": [make_records("train", [1] * 2, seed=1)]})


def test_success_at_end_is_compared_too():
    a = make_records("train", [1] * 8, at_end=[0] * 8)
    b = make_records("train", [1] * 8, at_end=[1] * 8)
    assert differences(a, b)["train"][2].value == 0
    assert differences(a, b, "success_at_end")["train"][2].value == 1


# ---- several runs in each arm: do the intervals cover the truth?


def simulated(rng, arms, runs, episodes, between, hard, own, rate=0.5):
    """Success (arms, R, E). `between`: std of a run's true rate; `hard`: of an episode's, for all
    runs alike; `own`: of an episode's for one arm."""
    p = (
        rate
        + rng.normal(0, between, (arms, runs, 1))
        + rng.normal(0, hard, (1, 1, episodes))
        + rng.normal(0, own, (arms, 1, episodes))
    )
    return (rng.random(p.shape) < p).astype(float)


@pytest.mark.parametrize(
    ("runs", "between", "hard", "own"),
    [
        (3, 0.0, 0.3, 0.0),
        (3, 0.08, 0.3, 0.0),
        (3, 0.03, 0.2, 0.2),
        (2, 0.04, 0.3, 0.1),
        (1, 0.0, 0.3, 0.2),
    ],
)
def test_a_difference_covers_the_truth(runs, between, hard, own):
    """Both arms are equally good: in 95 % of 300 studies the interval holds zero, and is not much too long."""
    rng, covered, widths, truth = np.random.default_rng(0), 0, [], []
    for _ in range(300):
        x = simulated(rng, 2, runs, 100, between, hard, own)
        a, b = (one_split(arm)[0] for arm in x)
        d = ev.difference(a, b, one_split(x[0])[1])
        covered += d.low <= 0 <= d.high
        widths.append(d.high - d.low)
        truth.append(d.value)
    assert 0.92 <= covered / 300 <= 0.985, covered / 300
    # As long as Student's t has to be with so few runs, and not 1.35 times that.
    reach = stats.t.ppf(0.975, 2 * runs - 2) if runs > 1 else 1.96
    assert np.mean(widths) / 2 < 1.35 * reach * np.std(truth)


@pytest.mark.parametrize(("rate", "between"), [(0.5, 0.06), (0.5, 0.0), (0.04, 0.01)])
def test_a_rate_over_runs_covers_the_truth(rate, between):
    rng, covered = np.random.default_rng(0), 0
    for _ in range(300):
        x, row = one_split(
            simulated(rng, 1, 3, 100, between, 0.2 if rate == 0.5 else 0.0, 0.0, rate)[0]
        )
        r = ev.rate(x, row)
        covered += r.low <= rate <= r.high
        assert 0 <= r.low < r.high <= 1
    assert 0.92 <= covered / 300, covered / 300


def test_no_success_at_all_is_not_certain():
    x, row = one_split(np.zeros((3, 50)))
    r = ev.rate(x, row)
    assert (r.value, r.low) == (0, 0) and r.high == pytest.approx(ev.wilson(0, 150)[1])


def test_runs_that_differ_widen_the_interval_and_more_runs_shorten_it():
    row = [(1.0, np.ones((100, 1), bool))]

    def arm(*rates):
        return np.array([[i < 100 * r for i in range(100)] for r in rates])[:, :, None].astype(
            float
        )

    def width(a, b):
        d = ev.difference(a, b, row)
        return d.high - d.low

    alike, apart = arm(0.5, 0.5, 0.5), arm(0.3, 0.5, 0.7)
    assert width(alike, apart) > 5 * width(alike, alike)
    assert width(apart, arm(*[0.3, 0.5, 0.7] * 3)) < width(apart, apart)
    # Two degrees of freedom of each arm: 2.78 x the standard error (the episodes add little here).
    spread = np.std([0.3, 0.5, 0.7], ddof=1) * np.sqrt(2 / 3)
    assert width(apart, apart) / 2 == pytest.approx(2.78 * spread, rel=0.05)


def test_the_plan_holds():
    """As many seeds and episodes as --plan says: the interval is clear of zero in about 80 % of studies."""
    text = ev.plan_table(10)
    rows = {
        line.split("|")[1].strip(): line.split("|")[2:-1]
        for line in text.splitlines()
        if line.startswith("|")
    }
    assert (
        "Assumes" in text and "-" in rows["2"][3]
    )  # two seeds never show it if seeds differ by 8 points
    episodes = int(rows["3"][1].split("/")[0])  # 3 seeds, 2 points between them, one split
    rng, seen = np.random.default_rng(0), 0
    for _ in range(300):
        x = np.concatenate([
            simulated(rng, 1, 3, episodes, 0.02, 0.0, 0.0, rate) for rate in (0.45, 0.55)
        ])  # fmt: skip
        a, b = (one_split(arm)[0] for arm in x)
        seen += ev.difference(a, b, one_split(x[0])[1]).low > 0
    assert 0.72 <= seen / 300 <= 0.88, seen / 300
    # The average over 4 kinds, clutter over 4 levels: sum of squared weights 3 / 16 + 4 / 256.
    one, average = map(int, rows["5"][0].split("/"))
    assert average == pytest.approx(one * (3 / 16 + 4 / 256), abs=1.5)


# ---- what counts as out of distribution


def test_cameras_count_as_ood_beyond_20_degrees_only():
    splits = [
        "train",
        "bare",
        "camera+4",
        "camera-20",
        "camera+24",
        "camera+28",
        "camera+-20:4",
        "pose",
    ]
    assert list(filter(ev.is_ood, splits)) == ["camera+24", "camera+28", "pose"]
    assert ev.ood_weights(splits) == {"camera+24": 0.25, "camera+28": 0.25, "pose": 0.5}
    records = [r for s in splits for r in make_records(s, [s == "camera+28"] * 4)]
    assert "| OOD average (camera, pose) | 25.0 [" in ev.ood_table(records)


# ---- tables


def study(
    folder,
    seeds=3,
    episodes=40,
    splits=ALL,
    backbone="openvla-tiny",
    arms=(("PPO", 0.5), ("PAIR", 0.8)),
):
    """Records of runs folder/ARM_SEED -> {arm: its runs}. Odd episodes have another target."""
    rng, paths = np.random.default_rng(0), {}
    for arm, rate in arms:
        for seed in range(seeds):
            records = []
            for split in splits:
                once = rng.random(episodes) < rate
                at_end = once & (rng.random(episodes) < 0.5)
                records += make_records(
                    split, once, at_end=at_end, backbone=backbone, checkpoint=f"{arm}_{seed}"
                )
            for record in records:
                if record["episode_id"] % 2:
                    record["instruction"] = "put blue_50% ball on plate"
            path = write_records(folder / f"{arm}_{seed}", records)
            paths.setdefault(arm, []).append(str(path))
    return paths


def arguments(paths):
    return tuple(f"{arm}={','.join(runs)}" for arm, runs in paths.items())


def cells_of(line):
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_table_1(tmp_path, capsys):
    paths = study(tmp_path)
    tables.main(tables.Args(arguments(paths), out=str(tmp_path / "out/table_1")))
    text = (tmp_path / "out/table_1.md").read_text()
    assert capsys.readouterr().out == text
    assert "openvla-tiny" in text and "Runs: PPO 3, PAIR 3" in text and "run: 40." in text
    once, at_end, by_object, _ = [
        [cells_of(line) for line in block.splitlines()]
        for block in text.split("\n\n")
        if block.startswith("|")
    ]
    assert once[0] == [
        "arm",
        "train",
        "texture",
        "lighting",
        "pose",
        "clutter",
        "OOD average",
        "OOD average - PPO",
    ]
    assert [row[0] for row in once[2:]] == ["PPO", "PPO, paper", "PAIR", "PAIR, paper"]
    assert once[3] == ["PPO, paper", "", "86.98", "72.14", "83.59", "68.88", "77.90", ""]
    assert once[5] == ["PAIR, paper", "", "94.53", "80.47", "90.63", "82.36", "87.00", "+9.10"]
    assert [row[0] for row in at_end[2:]] == ["PPO", "PAIR"]  # the paper has one metric

    # By hand: clutter is the mean of its four levels, the average that of the four kinds.
    def mean(arm, split, metric):
        of_runs = [
            [r[metric] for r in ev.read_records(run) if r["split"] == split] for run in paths[arm]
        ]
        return 100 * np.mean(of_runs)

    for block, metric in ((once, "success_once"), (at_end, "success_at_end")):
        (ppo,), (pair,) = ([row for row in block if row[0] == arm] for arm in ("PPO", "PAIR"))
        clutter = np.mean([mean("PAIR", f"clutter-{k}", metric) for k in (2, 4, 6, 8)])
        assert pair[5].startswith(f"{clutter:.1f} [")
        average = np.mean(
            [mean("PAIR", kind, metric) for kind in ("texture", "lighting", "pose")] + [clutter]
        )
        assert pair[6].startswith(f"{average:.1f} [")
        other = np.mean(
            [mean("PPO", kind, metric) for kind in ("texture", "lighting", "pose")]
            + [np.mean([mean("PPO", f"clutter-{k}", metric) for k in (2, 4, 6, 8)])]
        )
        assert pair[7].startswith(f"{average - other:+.1f} [") and ppo[7] == ""
    assert [row[0] for row in by_object[2:]] == ["blue_50% ball", "red cube"]
    assert [row[-1] for row in by_object[2:]] == ["160", "160"]


def test_the_csv_has_every_number_of_the_table(tmp_path):
    paths = study(tmp_path)
    tables.main(tables.Args(arguments(paths), out=str(tmp_path / "t")))
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    assert {row["metric"] for row in rows} == set(ev.METRICS)
    assert {row["row"] for row in rows} == {
        *ALL,
        "clutter",
        "OOD average",
        "all splits",
        "object: red cube",
        "object: blue_50% ball",
    }
    table = (tmp_path / "t.md").read_text().split("**success_at_end**")[0]
    pair = next(cells_of(line) for line in table.splitlines() if line.startswith("| PAIR |"))
    for row in rows:
        assert float(row["low"]) <= float(row["rate"]) <= float(row["high"]) and row["runs"] == "3"
        assert (row["difference"] == "") == (row["arm"] == "PPO")
        if (row["metric"], row["arm"], row["row"]) == ("success_once", "PAIR", "OOD average"):
            assert (
                f"{float(row['rate']):.1f} [" in pair[6]
                and f"{float(row['difference']):+.1f} [" in pair[7]
            )
            assert row["paper"] == "87.0" and row["n"] == "280"


def test_the_latex_table_is_whole(tmp_path):
    paths = study(tmp_path, arms=(("PPO", 0.5), ("PPO_50%", 0.5)))
    tables.main(tables.Args(arguments(paths), out=str(tmp_path / "t")))
    tex = (tmp_path / "t.tex").read_text()
    assert tex.count(r"\begin{tabular}{lrrrrrrr}") == tex.count(r"\end{tabular}") == 2
    rows = [line for line in tex.splitlines() if line.endswith(r"\\")]
    assert all(len(re.findall(r"(?<!\\)&", row)) == 7 for row in rows)
    assert r"PPO\_50\%" in tex and r"{\scriptsize [" in tex
    body = "\n".join(line for line in tex.splitlines() if not line.startswith("%"))
    assert not re.search(r"(?<!\\)[%_]", body) and body.count("{") == body.count("}")


def test_table_2_has_the_papers_ablation(tmp_path):
    arms = (("PPO", 0.4), ("+inv", 0.6), ("+sen", 0.5), ("PAIR", 0.7))
    paths = study(tmp_path, seeds=1, backbone="pi05-tiny", arms=arms)
    tables.main(tables.Args(arguments(paths), out=str(tmp_path / "t")))
    text = (tmp_path / "t.md").read_text()
    papers = [cells_of(line) for line in text.splitlines() if ", paper |" in line]
    assert [(row[0].split(",")[0], row[-2], row[-1]) for row in papers] == [
        ("PPO", "46.25", ""),
        ("+inv", "58.86", "+12.61"),
        ("+sen", "47.98", "+1.73"),
        ("PAIR", "62.87", "+16.62"),
    ]
    assert "over episodes alone" in text  # one run in each arm says nothing about other runs


def test_tables_refuse_what_cannot_be_compared(tmp_path):
    paths = study(tmp_path, seeds=2)
    file = Path(paths["PAIR"][1], "episodes.jsonl")
    file.write_text(file.read_text().replace('"temperature": 0.6', '"temperature": 1.0'))
    for main in (
        lambda: tables.main(tables.Args(arguments(paths), out=str(tmp_path / "t"))),
        lambda: figures.main(
            figures.Args("distractors", arguments(paths), out=str(tmp_path / "f"))
        ),
    ):
        with pytest.raises(ev.Fault, match="^temperature is 0.6 for PPO_0 and 1.0 for PAIR_1"):
            main()
    assert not [*tmp_path.glob("t.*"), *tmp_path.glob("f.*")]


# ---- figures


def drawn(path):
    """Both files are there and are pictures of some size -> their bytes."""
    png, pdf = (Path(f"{path}.{ending}").read_bytes() for ending in ("png", "pdf"))
    assert png.startswith(b"\x89PNG") and pdf.startswith(b"%PDF") and len(png) > 5000
    return png, pdf


class Kept:
    """Instead of figures.save: the figure itself, to read its curves."""

    def __call__(self, figure, out):
        self.axes = figure.axes


@pytest.fixture
def kept(monkeypatch):
    kept = Kept()
    monkeypatch.setattr(figures, "save", kept)
    monkeypatch.setattr(plot, "save", kept)
    return kept


def curves_of(axis):
    """{label: (xs, ys)} of error bars and lines."""
    found = {}
    for line, label in zip(*axis.get_legend_handles_labels(), strict=True):
        line = line[0] if isinstance(line, tuple) else line
        found[label] = (list(map(float, line.get_xdata())), list(map(float, line.get_ydata())))
    return found


def test_figure_3_is_success_against_distractors(tmp_path, kept):
    paths = study(tmp_path)
    figures.main(figures.Args("distractors", arguments(paths)))
    curves = curves_of(kept.axes[0])
    outcomes = ev.align(
        {arm: [ev.read_records(run) for run in runs] for arm, runs in paths.items()}
    )
    for arm, (xs, ys) in curves.items():
        assert xs == [1, 2, 4, 6, 8]
        x = outcomes.success["success_once"][arm]
        order = [
            outcomes.splits.index(s)
            for s in ("train", "clutter-2", "clutter-4", "clutter-6", "clutter-8")
        ]
        assert ys == pytest.approx(list(100 * x.mean((0, 1))[order]))
    figures.main(figures.Args("distractors", arguments(paths), metric="success_at_end"))
    assert curves_of(kept.axes[0])["PAIR"][1][0] < curves["PAIR"][1][0]


def test_figure_4_is_success_against_lambda(tmp_path, kept):
    paths = study(tmp_path, arms=(("4", 0.9), ("0", 0.3), ("2", 0.7), ("1", 0.5)))
    figures.main(figures.Args("lambda", arguments(paths)))
    assert [axis.get_title() for axis in kept.axes] == ["texture", "lighting", "pose", "clutter"]
    for axis in kept.axes:
        line = axis.containers[0][0]
        assert list(line.get_xdata()) == [0, 1, 2, 4]
        assert list(line.get_ydata()) == sorted(line.get_ydata())
    with pytest.raises(ev.Fault, match="an arm's name is its lambda_inv"):
        figures.main(figures.Args("lambda", arguments(study(tmp_path / "b", seeds=1))))


def test_figure_5_is_success_against_the_camera(tmp_path, kept):
    splits = ["train", *(f"camera+{n}" for n in (28, 4, 8, 12, 16, 20, 24))]
    figures.main(figures.Args("camera", arguments(study(tmp_path, splits=splits))))
    assert curves_of(kept.axes[0])["PAIR"][0] == [0, 4, 8, 12, 16, 20, 24, 28]
    assert [text.get_text() for text in kept.axes[0].texts] == ["OOD"]
    assert "training: up to 20" in kept.axes[0].get_xlabel()
    with pytest.raises(ev.Fault, match="evaluate train and splits of the kind camera"):
        figures.main(figures.Args("camera", arguments(study(tmp_path / "b", seeds=1))))


def test_figure_2_is_success_against_iterations(tmp_path, kept):
    """Every evaluated checkpoint of every run, and the band from the lowest to the highest run."""
    rates = {("PPO", 0): [2, 4], ("PPO", 1): [4, 6], ("PAIR", 0): [5, 8], ("PAIR", 1): [7, 10]}
    for (arm, seed), successes in rates.items():
        for iteration, k in zip((10, 20), successes, strict=True):
            name = f"checkpoint-{iteration:06d}"
            records = [
                r
                for split, k in (("train", k), ("clutter-4", k - 2))
                for r in make_records(
                    split, [1] * k + [0] * (10 - k), checkpoint=f"runs/{arm}{seed}/{name}"
                )
            ]
            write_records(tmp_path / f"{arm}{seed}" / name / "eval", records)
            black = [record | {"ablate": "black"} for record in records]
            write_records(tmp_path / f"{arm}{seed}" / name / "eval-black", black)
    paths = {arm: [str(tmp_path / f"{arm}{seed}") for seed in (0, 1)] for arm in ("PPO", "PAIR")}
    figures.main(figures.Args("iterations", arguments(paths)))
    inside, outside = kept.axes
    assert curves_of(inside) == {
        "PPO (2 runs)": ([10, 20], [30, 50]),
        "PAIR (2 runs)": ([10, 20], [60, 90]),
    }
    assert curves_of(outside)["PAIR (2 runs)"] == ([10, 20], [40, 70])
    band = inside.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (20, 60)
    with pytest.raises(ev.Fault, match="holds no episodes of pose"):
        figures.main(figures.Args("iterations", arguments(paths), ood_split="pose"))
    with pytest.raises(ev.Fault, match="holds no episodes.jsonl of a checkpoint"):
        figures.main(figures.Args("iterations", (f"A={tmp_path / 'nowhere'}",)))


def kl_file(path, end):
    lines = [
        {"checkpoint": name, "episode_id": i, "held_out_tables": [kl] * 5, "moved_target": [2 * kl] * 5, "unrelated": [1.0] * 5}
        for name, kl in (("warmstart/tiny", 0.5), ("runs/a/checkpoint-1", end))
        for i in range(8)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_kl_figure_shows_before_and_after(tmp_path, kept):
    files = [kl_file(tmp_path / name, end) for name, end in (("a", 0.1), ("b", 0.3), ("c", 0.2))]
    figures.main(figures.Args("kl", (f"PPO={files[0]},{files[1]}", f"PAIR={files[2]}")))
    tables_axis, target_axis = kept.axes
    assert [text.get_text() for text in tables_axis.get_legend().get_texts()] == [
        "before (tiny)",
        "PPO",
        "PAIR",
    ]
    medians = [line.get_xdata()[0] for line in tables_axis.lines]
    assert medians == pytest.approx([0.5, 0.2, 0.2])  # PPO: both runs' frames
    assert [line.get_xdata()[0] for line in target_axis.lines] == pytest.approx([1.0, 0.4, 0.4])
    (tmp_path / "a").write_text('{"checkpoint": "x"}\n')
    with pytest.raises(ev.Fault, match="cannot be read as KL records"):
        figures.main(figures.Args("kl", (f"PPO={files[0]}",)))


def test_the_same_records_give_the_same_bytes(tmp_path):
    paths = study(tmp_path, seeds=2)
    bytes_of = []
    for name in ("x", "y"):
        out = str(tmp_path / name / "f")
        figures.main(figures.Args("distractors", arguments(paths), out=out))
        tables.main(tables.Args(arguments(paths), out=out))
        bytes_of.append(
            [*drawn(out), *(Path(f"{out}.{end}").read_bytes() for end in ("md", "csv", "tex"))]
        )
    assert bytes_of[0] == bytes_of[1]


def test_plot_draws_what_a_run_has_logged(tmp_path, kept):
    (tmp_path / "a").mkdir()
    log = tmp_path / "a/log.jsonl"
    lines = [
        {"iteration": i, "success": i / 10, "inv_kl": 0.5 - i / 100, "entropy": 2.0}
        for i in range(1, 11)
    ]
    lines += [
        {"iteration": 10, "success": 0.0, "inv_kl": 0.1, "entropy": 1.0}
    ]  # logged again after a resume
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot.main(plot.Args((str(tmp_path / "a"),), smooth=2))
    success, kls, unrelated, entropy = kept.axes
    raw, smooth = (list(line.get_ydata()) for line in success.lines)
    assert raw == pytest.approx([i / 10 for i in range(1, 10)] + [0])
    assert smooth == pytest.approx([0.1, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.45])
    assert curves_of(kls)["inv_kl"][1][-1] == 0.1 and set(curves_of(kls)) == {
        "inv_kl"
    }  # sen_kl: left out
    assert not unrelated.lines and len(entropy.lines) == 1
    plot.main(plot.Args((str(tmp_path / "a"),) * 1 + (str(log.parent),)))
    with pytest.raises(ev.Fault, match="cannot be read as a run's log"):
        plot.main(plot.Args((str(tmp_path),)))
    log.write_text("")
    with pytest.raises(ev.Fault, match="is empty"):
        plot.main(plot.Args((str(tmp_path / "a"),)))


def test_the_commands(tmp_path):
    """The real command lines write their files where the docs say."""
    paths = study(tmp_path, seeds=1)
    (tmp_path / "log.jsonl").write_text('{"iteration": 1, "success": 0.5}\n')
    commands = {
        "tables.py": ["--out", "t", *arguments(paths)],
        "figures.py": ["distractors", "--out", "f", *arguments(paths)],
        "plot.py": [str(tmp_path)],
    }
    running = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tools" / script), *flags],
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )
        for script, flags in commands.items()
    ]
    for process in running:
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
    drawn(tmp_path / "f")
    drawn(tmp_path / "curves")
    assert all((tmp_path / f"t.{ending}").stat().st_size for ending in ("md", "csv", "tex"))


@pytest.mark.parametrize(
    ("tool", "args"),
    [
        (tables, tables.Args(("PPO=nowhere",))),
        (figures, figures.Args("kl", ("PPO=nowhere",))),
        (figures, figures.Args("camera", ("PPO=nowhere",))),
        (plot, plot.Args(("nowhere",))),
    ],
)
def test_a_bad_call_is_one_sentence_and_exit_code_2(tool, args, capsys):
    with pytest.raises(SystemExit) as stop:
        runtime.command_line(lambda: tool.main(args))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "nowhere" in line


# ---- a study


@pytest.mark.parametrize("file", sorted(ROOT.glob("results/*/*.jsonl")), ids=lambda file: file.stem)
def test_the_committed_tables_come_from_the_committed_records(file, tmp_path):
    """Text byte for byte. A figure's bytes depend on the fonts and libraries of the machine."""
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert studies.table_of(studies.in_order(records)) == file.with_suffix(".md").read_text()
    studies.figure_of(records, str(tmp_path / "figure"))
    assert (tmp_path / "figure.png").stat().st_size > 20_000


def test_the_last_column_is_the_lead_out_of_distribution_less_that_on_train():
    table = (ROOT / "results/flat/pi05-flat.md").read_text().split("\n\n")[1]
    head, _, _, *rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    names = ["OOD average - PPO", "train - PPO", "(OOD average - train) - PPO"]
    for row in rows:
        ood, train, less = (float(row[head.index(name)].split()[0]) for name in names)
        assert less == pytest.approx(ood - train, abs=0.11)


def test_after_a_guard_the_last_checkpoint_is_evaluated(tmp_path, monkeypatch):
    """And any other end is an error, not a record."""
    calls, last = [], "error: the policy is going blind: ..."

    def run(command, stdout, **_):
        calls.append(command[1])
        stdout.write(last + "\n")
        return subprocess.CompletedProcess(command, 2 if command[1] == "ppo_pair.py" else 0)

    monkeypatch.setattr(studies, "ROOT", tmp_path)
    monkeypatch.setattr(studies.subprocess, "run", run)
    monkeypatch.setattr(studies, "record_of", lambda *about: about)
    studies.play(studies.Args(), "PAIR", 2)
    assert calls == ["ppo_pair.py", "evaluate.py"]
    for seed in (2, 3):  # the arm's name has a point
        studies.play(studies.Args(), "target: current weights, lambda_inv 0.5", seed)
    assert len(list(tmp_path.rglob("*.txt"))) == 3
    last = "error: no space left"
    with pytest.raises(runtime.Fault, match="PAIR, seed 3 ended with 2"):
        studies.play(studies.Args(), "PAIR", 3)


def test_a_long_arm_has_three_times_the_iterations_and_its_own_rate():
    chosen = studies.preset("pi05-tiny")
    arm = "PPO, 3 x as long, 0.3 x the rate"
    words = studies.flags_of(studies.Args(backbone="pi05-tiny"), arm).split()
    flags = dict(zip(words[::2], map(float, words[1::2])))
    assert flags["--iterations"] == 3 * chosen.iterations
    assert flags["--learning-rate"] == pytest.approx(0.3 * chosen.learning_rate)
    assert flags["--inv-coef"] == flags["--sen-coef"] == 0


def test_a_study_with_flags_of_its_own_has_a_name(tmp_path, monkeypatch):
    """Its records were added to the committed ones."""
    monkeypatch.setattr(studies, "ROOT", tmp_path)
    with pytest.raises(runtime.Fault, match="give its records a --name"):
        studies.main(studies.Args(flags="--gamma 0.5"))
    with pytest.raises(runtime.Fault, match="--seeds is 0"):
        studies.main(studies.Args(seeds=0))


@pytest.mark.parametrize("flags, splits, episodes", [
    ("--gamma 0.5", ("train",), 4), ("", ("train", "pose"), 4), ("", ("train",), 8),
])  # fmt: skip
def test_records_of_another_study_are_not_added_to(tmp_path, monkeypatch, flags, splits, episodes):
    monkeypatch.setattr(studies, "ROOT", tmp_path)
    monkeypatch.setattr(studies, "play", None)
    record = dict(arm="PAIR", seed=2, flags="", episodes=4, success_once={"train": "00"})
    (tmp_path / "results/flat").mkdir(parents=True)
    (tmp_path / "results/flat/mine.jsonl").write_text(json.dumps(record) + "\n")
    args = studies.Args(name="mine", flags=flags, splits=splits, episodes=episodes)
    with pytest.raises(runtime.Fault, match="mine.jsonl is of other --flags, --splits or"):
        studies.main(args)


def test_an_arm_is_compared_with_the_baseline_of_its_own_seeds():
    def record(arm, seed, bits):
        bits = dict.fromkeys(ALL, np.packbits(bits).tobytes().hex())
        about = dict(arm=arm, seed=seed, episodes=4, ended=False, curves={})
        return about | dict(success_once=bits, success_at_end=bits)

    runs = [record("PPO", 2, [1, 0, 0, 0]), record("PPO", 3, [1, 1, 1, 1])]
    runs.append(record("PAIR", 2, [1, 1, 0, 0]))
    row = next(x for x in studies.table_of(runs).splitlines() if x.startswith("| PAIR"))
    assert "+25.0" in row and "-12.5" not in row


def test_a_run_that_a_guard_ended_is_counted_and_not_left_out():
    bits = dict.fromkeys(ALL, np.packbits([1, 0, 1, 1]).tobytes().hex())
    record = dict(episodes=4, ended=False, curves={}, success_once=bits, success_at_end=bits)
    none = dict.fromkeys(ALL, "00")
    ended = record | dict(ended=True, success_once=none, success_at_end=none)
    runs = [record | dict(arm="PPO", seed=2), record | dict(arm="PAIR", seed=2)]
    runs += [record | dict(arm="PPO", seed=3), ended | dict(arm="PAIR", seed=3)]
    once = studies.table_of(studies.in_order(runs)).split("## success_at_end")[0]
    pair = next(line for line in once.splitlines() if line.startswith("| PAIR"))
    assert pair.split("|")[2:4] == [" 2 ", " 1 "] and "37.5" in pair and "-37.5" in pair
