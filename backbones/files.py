"""Checkpoints as files: directories and Hub repositories, JSON, safetensors; reading and saving."""

import json
import re
import shutil
from pathlib import Path

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from runtime import Fault, one_line, read_json, verify

WEIGHTS = ["model*.safetensors"]  # of a full model: what is fetched last
REST = ["*.json", "adapter_model*", "value_head*", "training_state.pt", "action_head--*"]


# -------------------------------------------------------------------------- directories and the Hub
def download(repo, revision, patterns):
    """Those files of a Hub repository, from the cache or the network -> their directory, which is
    named after the commit."""
    # without the last hint, a commit of an older cache is looked up on the network
    options = {"allow_patterns": patterns, "local_files_only": constants.HF_HUB_OFFLINE}
    try:
        return Path(snapshot_download(repo, revision=revision, **options))
    except RepositoryNotFoundError:
        reason = "the Hub has no such repository, or it is private (`hf auth login`)"
    except LocalEntryNotFoundError:
        reason = (
            "it is not in the cache, and the Hub is out of reach (no network, or HF_HUB_OFFLINE=1)"
        )
    except Exception as error:  # a full disk, a wrong revision ... of the Hub, httpx or the system
        reason = one_line(error)
    raise Fault(f"{repo} is neither a directory here nor to be had from the Hub: {reason}")


def find_checkpoint(name, hub):
    """A directory, or (hub=True) OWNER/NAME[@REVISION] on the Hub, without a full model's weights,
    so that mistakes show before gigabytes -> directory, its lasting name, commit (None: local)."""
    if Path(name).is_dir():
        return Path(name), str(Path(name).resolve()), None
    repo, _, revision = str(name).partition("@")
    if not hub or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", repo):
        raise Fault(f"there is no checkpoint directory {name}")
    directory = download(repo, revision or None, REST)
    return directory, repo, directory.name


def find_model(checkpoint, base, hub):
    """-> directory of the full model, its lasting name, its commit, directory of the adapter (None:
    no adapter). base: where an adapter's base model is, if not where it says."""
    directory, name, commit = find_checkpoint(checkpoint, hub)
    if (directory / "SHA256SUMS").is_file():
        verify(directory)
    file = directory / "adapter_config.json"
    if not file.is_file():
        if base:
            raise Fault(f"{checkpoint} is a full model and no adapter: leave out --base {base}")
        return directory, name, commit, None
    if not base:
        peft_config = read_json(file)
        base, revision = peft_config.get("base_model_name_or_path"), peft_config.get("revision")
        if not base:
            raise Fault(
                f"{file} does not name the adapter's base model: say with --base where it is"
            )
        base = f"{base}@{revision}" if revision else base
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
def check_types(values, types, file):
    """values[field] is of types[field], for every field of `values` that `types` knows."""
    for field in values.keys() & types.keys():
        value, expected = values[field], types[field]
        wanted = (int, float) if expected is float else expected
        text = json.dumps(value)[:60]
        if not isinstance(value, wanted) or (isinstance(value, bool) and expected is not bool):
            raise Fault(f"{file}: {field} is {text}, not of type {expected.__name__}")
        if expected is int and value < 1:
            raise Fault(f"{file}: {field} is {text}, not at least 1")


# ------------------------------------------------------------------------------------------ tensors
def open_tensors(directory, stem):
    """The tensors of STEM.safetensors, or of its shards (RLinf writes no index): {key: slice}.
    Reads headers; slice[:] reads data."""
    index, files = directory / f"{stem}.safetensors.index.json", [directory / f"{stem}.safetensors"]
    if index.is_file():
        try:
            shards = set(read_json(index)["weight_map"].values())
            files = [directory / name for name in sorted(shards)]
        except (KeyError, AttributeError, TypeError):
            raise Fault(
                f"{index} has no weight_map that says which file holds which tensor"
            ) from None
    elif not files[0].is_file():
        files = sorted(directory.glob(f"{stem}-*-of-*.safetensors")) or files
    found = {}
    for file in files:
        try:
            tensors = safe_open(file, "pt")  # checks the file's length against its header
        except (OSError, SafetensorError) as error:
            raise Fault(f"{file} is missing, truncated or no safetensors file ({error})") from None
        found |= {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118
    return found


def check_tensors(found, wanted, where):
    """Strict: shapes in the files {key: shape} and tensors of the model {key: tensor} agree."""
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
    """The network with the weights in `directory`, or (None) fresh ones. Every name and shape is
    checked before a tensor is read, and each goes straight to where it will live."""
    if directory is None:
        network = network_class(config)
        network.init_from_scratch()
        for key, p in network.named_parameters():
            p.data = p.data.to(torch.float32 if network.keeps_float32(key) else dtype)
        network.init_value_head()
        network.init_buffers(device)
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
    """Write a checkpoint that load_policy reads, its weights as dtype (None: as they are).

    With LoRA: a PEFT directory (adapter_config.json, adapter_model.safetensors). Without:
    config.json and model.safetensors. Both: value_head.safetensors, norm_stats.json and, where the
    policy has one, tokenizer.json.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    name, weights = "model", {}
    if policy.lora_config:
        name = "adapter_model"
        policy.lora_config.save_pretrained(str(directory))
    for key, tensor in policy.state_dict().items():
        if key.startswith("value_head."):
            continue
        if not policy.lora_config:
            weights[key] = tensor
        elif policy.in_adapter(key):  # the base model stays where it is
            weights["base_model.model." + key.replace(".default.", ".")] = tensor
    parts = {name: weights, "value_head": policy.value_head.state_dict()}
    for name, part in parts.items():
        part = {key: t.to(dtype or t.dtype).contiguous() for key, t in part.items()}
        save_file(part, directory / f"{name}.safetensors", {"format": "pt"})
    if policy.saves_config or not policy.lora_config:
        save_config(policy, directory)
    if policy.config["norm_stats"]:
        stats = {policy.unnorm_key: policy.config["norm_stats"][policy.unnorm_key]}
        (directory / "norm_stats.json").write_text(json.dumps(stats, indent=2))
    save_tokenizer(policy, directory)


def save_config(policy, directory):
    (directory / "config.json").write_text(json.dumps(policy.config, indent=2))


def save_tokenizer(policy, directory):
    if policy.tokenizer_file:
        shutil.copy(policy.tokenizer_file, directory / "tokenizer.json")
