"""Checkpoints as files: directories and Hub repositories, safetensors, statistics; reading and
saving."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from runtime import Fault, read_json


# -------------------------------------------------------------------------- directories and the Hub
def download(repo, revision, patterns):
    """Those files of a Hub repository, from the cache or the network -> their directory, named
    after the commit."""
    try:
        # without the last hint, a commit of an older cache is looked up on the network
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=patterns,
                local_files_only=constants.HF_HUB_OFFLINE,
            )
        )
    except RepositoryNotFoundError:
        reason = "the Hub has no such repository, or it is private (`hf auth login`)"
    except LocalEntryNotFoundError:
        reason = (
            "it is not in the cache, and the Hub is out of reach (no network, or HF_HUB_OFFLINE=1)"
        )
    except (
        Exception
    ) as error:  # a full disk, a wrong revision ...: the Hub's, httpx's or the system's
        reason = " ".join(str(error).split())[:200]
    raise Fault(f"{repo} is neither a directory here nor to be had from the Hub: {reason}")


def find_checkpoint(name, hub):
    """A directory, or (hub=True) OWNER/NAME[@REVISION] on the Hub -> directory, its lasting name,
    commit (None: local).

    Of a Hub repository all but a full model's weights are there afterwards, so that mistakes show
    before gigabytes.
    """
    if Path(name).is_dir():
        return Path(name), str(Path(name).resolve()), None
    repo, _, revision = str(name).partition("@")
    if not hub or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", repo):
        raise Fault(f"there is no checkpoint directory {name}")
    patterns = ["*.json", "adapter_model*", "value_head*", "training_state.pt"]
    directory = download(repo, revision or None, patterns)
    return directory, repo, directory.name


# ------------------------------------------------------------------------------------------ tensors
def open_tensors(directory, stem):
    """The tensors of STEM.safetensors, or of the shards in its index: {key: slice}. Reads headers;
    slice[:] reads data."""
    index = directory / f"{stem}.safetensors.index.json"
    names = [f"{stem}.safetensors"]
    if index.is_file():
        names = sorted(set(read_json(index)["weight_map"].values()))
    found = {}
    for name in names:
        try:
            file = safe_open(directory / name, "pt")  # checks the file's length against its header
        except (OSError, SafetensorError) as error:
            raise Fault(
                f"{directory / name} is missing, truncated or no safetensors file ({error})"
            ) from None
        found |= {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
    return found


def check_tensors(found, wanted, where):
    """Strict: shapes in the files {key: [...]} and tensors of the model {key: tensor} agree. Names
    the first offender."""
    for key in sorted(found.keys() | wanted.keys()):
        if key not in found:
            raise Fault(f"{where} lacks the tensor {key}; is it a checkpoint of another model?")
        if key not in wanted:
            raise Fault(
                f"{where} has the tensor {key}, which this model has not; is it of another model?"
            )
        if list(found[key]) != list(wanted[key].shape):
            raise Fault(
                f"{where}: {key} has the shape {list(found[key])}, not {list(wanted[key].shape)}"
            )


def load_weights(network_class, config, directory, dtype, device):
    """Check every name and shape on the meta device, then read each tensor straight to where it
    will live."""
    if directory is None:
        network = network_class(config)
        network.init_from_scratch()
        for key, p in network.named_parameters():
            p.data = p.data.to(torch.float32 if network.keeps_float32(key) else dtype)
        network.init_value_head()
        return network
    with torch.device("meta"):
        network = network_class(config)
    found = {network.rename(key): entry for key, entry in open_tensors(directory, "model").items()}
    found = {key: entry for key, entry in found.items() if not network.is_unused(key)}
    if (directory / "value_head.safetensors").is_file():
        head = open_tensors(directory, "value_head")
        found |= {f"value_head.{key}": entry for key, entry in head.items()}
    wanted = network.state_dict()
    if not any(key.startswith("value_head.") for key in found):  # as the published checkpoints
        wanted = {key: t for key, t in wanted.items() if not key.startswith("value_head.")}
        network.value_head.to_empty(device=device)
        network.init_value_head()
    check_tensors({key: entry.get_shape() for key, entry in found.items()}, wanted, directory)
    state = {}
    for key, entry in found.items():
        to = torch.float32 if network.keeps_float32(key) else dtype
        state[key] = entry[:].to(device, to, copy=True)  # no view of the file remains
    network.load_state_dict(state, strict=False, assign=True)
    network.init_buffers(device)
    return network


# --------------------------------------------------------------------------------------- statistics
def read_norm_stats(config, directory, adapter):
    """The statistics of every data set, from all files that may hold some, and the key to use by
    default."""
    stats = config.get("norm_stats", {})
    key = "bridge_orig" if "bridge_orig" in stats else None
    for folder, name in [
        (directory, "dataset_statistics"),
        (directory, "norm_stats"),
        (adapter, "norm_stats"),
    ]:
        if folder and (folder / f"{name}.json").is_file():
            more = read_json(folder / f"{name}.json")
            stats = stats | more
            if name == "norm_stats":  # ours: it holds just the one it was trained with
                key = next(iter(more))
    if directory and not stats:  # openpi's: in a folder named after the data set
        for file in sorted(directory.glob("*/**/norm_stats.json")):
            stats[str(file.parent.relative_to(directory))] = read_json(file)["norm_stats"]
    return stats, key or (next(iter(stats)) if len(stats) == 1 else None)


# ------------------------------------------------------------------------------------------ saving
def save_policy(policy, directory, dtype=None):
    """Write a checkpoint that load_policy reads; dtype (say torch.float16) is that of the stored
    weights.

    With LoRA: a standard PEFT directory (adapter_config.json, adapter_model.safetensors); else
    config.json and model.safetensors. Both: value_head.safetensors and norm_stats.json.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    files = {"model": {}, "adapter_model": {}, "value_head": {}}
    for key, tensor in policy.state_dict().items():
        tensor = tensor.detach().to(dtype or tensor.dtype).contiguous()
        if key.startswith("value_head."):
            files["value_head"][key.removeprefix("value_head.")] = tensor
        elif policy.lora_config and policy.in_adapter(key):
            files["adapter_model"]["base_model.model." + key.replace(".default.", ".")] = tensor
        else:
            files["model"][key] = tensor
    if policy.lora_config:
        del files["model"]  # the base model stays where it is; adapter_config.json names it
        policy.lora_config.save_pretrained(str(directory))
    else:
        del files["adapter_model"]
    if policy.saves_config or not policy.lora_config:
        save_config(policy, directory)
    for name, tensors in files.items():
        save_file(tensors, directory / f"{name}.safetensors", {"format": "pt"})
    if policy.config["norm_stats"]:
        stats = {policy.unnorm_key: policy.config["norm_stats"][policy.unnorm_key]}
        (directory / "norm_stats.json").write_text(json.dumps(stats, indent=2))


def save_config(policy, directory):
    (directory / "config.json").write_text(json.dumps(policy.config, indent=2))
    if policy.tokenizer_file:
        shutil.copy(policy.tokenizer_file, directory / "tokenizer.json")
