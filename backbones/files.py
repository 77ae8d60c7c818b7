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

from runtime import Fault, read_json, verify


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
    patterns = ["*.json", "adapter_model*", "value_head*", "training_state.pt", "action_head--*"]
    directory = download(repo, revision or None, patterns)
    return directory, repo, directory.name


def find_model(checkpoint, base, hub):
    """-> directory of the full model, its lasting name, its commit, directory of the adapter (None:
    no adapter).

    base: where an adapter's base model is, if not where it says.
    """
    directory, name, commit = find_checkpoint(checkpoint, hub)
    if (directory / "SHA256SUMS").is_file():
        verify(directory)
    file = directory / "adapter_config.json"
    if not file.is_file():
        if base:
            raise Fault(f"{checkpoint} is a full model and no adapter: leave out --base {base}")
        return directory, name, commit, None
    peft_config = read_object(file)
    if not base:
        origin, revision = peft_config.get("base_model_name_or_path"), peft_config.get("revision")
        if not origin:
            raise Fault(
                f"{file} does not name the adapter's base model: say with --base where it is"
            )
        base = f"{origin}@{revision}" if revision else f"{origin}"
    try:
        base_directory, name, commit = find_checkpoint(base, hub)
    except Fault as error:
        raise Fault(
            f"{error}; it is the base model of the adapter {directory}: say with --base where it is"
        ) from None
    if (base_directory / "adapter_config.json").is_file():
        raise Fault(
            f"{base_directory} is an adapter, too: say with --base where the full model of "
            f"{directory} is"
        )
    return base_directory, name, commit, directory


# ------------------------------------------------------------------------------------------ JSON
def read_object(file):
    content = read_json(file)
    if not isinstance(content, dict):
        raise Fault(f"{file} holds a {type(content).__name__}, not a JSON object")
    return content


def check_types(values, types, file):
    """values[field] is of types[field], for every field of `values` that `types` knows."""
    for field in values.keys() & types.keys():
        value, expected = values[field], types[field]
        wanted = (int, float) if expected is float else expected
        if not isinstance(value, wanted) or (isinstance(value, bool) and expected is not bool):
            raise Fault(
                f"{file}: {field} is {json.dumps(value)[:60]}, not of type {expected.__name__}"
            )


# ------------------------------------------------------------------------------------------ tensors
def open_tensors(directory, stem):
    """The tensors of STEM.safetensors, or of the shards in its index: {key: slice}. Reads headers;
    slice[:] reads data."""
    index = directory / f"{stem}.safetensors.index.json"
    names = [f"{stem}.safetensors"]
    if index.is_file():
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(name, str) for name in weight_map.values()
        ):
            raise Fault(f"{index} has no weight_map that says which file holds which tensor")
        names = sorted(set(weight_map.values()))
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


def read_tensor(entry, key, where, device="cpu", dtype=None):
    """A tensor of an open file, with a memory of its own. Refuses NaN and infinity."""
    tensor = entry[:].to(device, dtype, copy=True)
    if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
        raise Fault(f"{where}: the tensor {key} holds NaN or infinity: use another checkpoint")
    return tensor


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
    found, old_names = {}, {}
    for key, entry in open_tensors(directory, "model").items():
        name = network.rename(key)
        if name in found and not torch.equal(found[name][:], entry[:]):
            raise Fault(
                f"{directory}: {old_names[name]} and {key} are two names of one tensor, but they "
                "differ; remove the one that was not trained"
            )
        if not network.is_unused(name):
            found[name], old_names[name] = entry, key
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
        state[key] = read_tensor(entry, key, directory, device, to)
    network.load_state_dict(state, strict=False, assign=True)
    network.init_buffers(device)
    return network


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
