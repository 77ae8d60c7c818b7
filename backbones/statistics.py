"""Statistics of actions and states, from every file that may hold some. JSON is not to be trusted:
what is wrong ends in one sentence, which names file and field."""

from __future__ import annotations

import math

import torch

from backbones.files import read_object
from runtime import Fault

# folder, name: later ones count more, as to a data set that several have and as to the default
PLACES = (
    ("base", "dataset_statistics"),  # OpenVLA's of a fine-tune
    ("base", "norm_stats"),  # ours: it holds just the data set that it was trained with
    ("adapter", "dataset_statistics"),
    ("adapter", "norm_stats"),
)


def read_norm_stats(config, directory, adapter, wanted):
    """-> statistics {data set: ...}, the data set to use, its file. wanted: the user's choice.

    Without statistics, and without a choice, the last two are None.
    """
    config_file, stats = f"{directory}/config.json", config.get("norm_stats") or {}
    if not isinstance(stats, dict):
        raise Fault(f"{config_file}: norm_stats is a {type(stats).__name__}, not an object")
    official, sources = set(stats), dict.fromkeys(stats, config_file)
    key = "bridge_orig" if "bridge_orig" in stats else None
    folders = {"base": directory, "adapter": adapter}
    for place, name in PLACES:
        folder = folders[place]
        if folder is None or not (folder / f"{name}.json").is_file():
            continue
        file = folder / f"{name}.json"
        more = read_object(file)
        if not more:
            raise Fault(f"{file} is empty: it holds no data set's statistics")
        stats = stats | more
        sources |= dict.fromkeys(more, file)
        if name == "norm_stats" or len(more) == 1:
            key = next(iter(more))
        elif set(more) != official:  # several, of a fine-tune: nothing says which
            key = None
    if directory and not stats:  # openpi's: in a folder named after the data set
        for file in sorted(directory.glob("*/**/norm_stats.json")):
            name, content = str(file.parent.relative_to(directory)), read_object(file)
            if "norm_stats" not in content:
                raise Fault(f"{file} has no norm_stats, under which openpi keeps them")
            stats[name], sources[name] = content["norm_stats"], file
    key = wanted or key or (next(iter(stats)) if len(stats) == 1 else None)
    if key not in stats and (stats or wanted):
        wrong = f"no key {wanted!r}" if wanted else "no key that is this checkpoint's own"
        raise Fault(
            f"norm_stats has {wrong}; unnorm_key is one of {sorted(stats)}: name it with "
            "--unnorm-key"
        )
    return stats, key, sources.get(key)


def columns(stats, where, part, names):
    """stats[part][name] of each name -> float64 tensors. where: file and data set."""
    if not isinstance(stats, dict) or not isinstance(stats.get(part), dict):
        has = (
            "has " + (", ".join(map(repr, stats)) or "nothing")
            if isinstance(stats, dict)
            else "is no object"
        )
        raise Fault(f"{where} {has} and no {part!r} with {' and '.join(names)} in it")
    found = []
    for name in names:
        values = stats[part].get(name)
        if not values:
            both = " and ".join(names)
            raise Fault(f"{where} has no {both} of {part}, which it scales by ({name} is missing)")
        if not isinstance(values, list) or not all(is_number(x) for x in values):
            raise Fault(f"{where}: {name} of {part} is no list of numbers")
        found.append(torch.tensor(values, dtype=torch.float64))
    return found


def is_number(x):
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def check_columns(where, part, names, tensors):
    """As many dimensions in each, and finite."""
    lengths = [len(tensor) for tensor in tensors]
    if len(set(lengths)) > 1:
        raise Fault(f"{where}: {' and '.join(names)} of {part} have {lengths} dimensions")
    for name, tensor in zip(names, tensors):
        for i, x in enumerate(tensor.tolist()):
            if not math.isfinite(x):
                raise Fault(f"{where}: {name} of {part} is {x} in dimension {i}; it must be finite")
