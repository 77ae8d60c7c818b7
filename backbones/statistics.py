"""Statistics of actions and states, from every file that may hold some. What is wrong with one ends
in a sentence that names file and field."""

import math

import torch

from runtime import Fault, read_json


def read_norm_stats(config, directory, adapter, wanted):
    """-> statistics {data set: ...}, the data set to use, its file. wanted: the user's choice.

    Without statistics, and without a choice, the last two are None.
    """
    config_file, stats = f"{directory}/config.json", config.get("norm_stats") or {}
    if not isinstance(stats, dict):
        raise Fault(f"{config_file}: norm_stats is a {type(stats).__name__}, not an object")
    official, sources = set(stats), dict.fromkeys(stats, config_file)
    key = "bridge_orig" if "bridge_orig" in stats else None
    # Later files count more. OpenVLA's of a fine-tune, then ours, which has only what it was
    # trained with
    for folder in filter(None, (directory, adapter)):
        for name in ("dataset_statistics", "norm_stats"):
            file = folder / f"{name}.json"
            if not file.is_file():
                continue
            more = read_json(file)
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
            name, content = str(file.parent.relative_to(directory)), read_json(file)
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
    both = " and ".join(names)
    if not isinstance(stats, dict):
        raise Fault(f"{where} is no object and no {part!r} with {both} in it")
    if not isinstance(stats.get(part), dict):
        has = ", ".join(map(repr, stats)) or "nothing"
        raise Fault(f"{where} has {has} and no {part!r} with {both} in it")
    found = []
    for name in names:
        values = stats[part].get(name)
        if not values:
            raise Fault(f"{where} has no {both} of {part}, which it scales by ({name} is missing)")
        if not isinstance(values, list) or not all(type(x) in (int, float) for x in values):
            raise Fault(f"{where}: {name} of {part} is no list of numbers")
        for i, x in enumerate(values):
            if not math.isfinite(x):
                raise Fault(f"{where}: {name} of {part} is {x} in dimension {i}; it must be finite")
        found.append(torch.tensor(values, dtype=torch.float64))
    return found
