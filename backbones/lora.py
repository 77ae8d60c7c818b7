"""LoRA adapters with float32 weights, saved and read as PEFT directories."""

from __future__ import annotations

from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from backbones.files import check_tensors, open_tensors, read_object, read_tensor
from runtime import Fault


class AdapterLinear(nn.Linear):
    """Half of an adapter: float32 weights, or small updates would vanish; arithmetic in its input's
    dtype.

    peft would raise the input to float32 instead and keep that for the backward pass, for each of 7
    layers in a block.
    """

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


def inject_lora(network, lora_config):
    """Float32 adapters beside the layers that lora_config targets; everything else is frozen."""
    lora_config.base_model_name_or_path, lora_config.revision = network.name, network.commit
    try:
        inject_adapter_in_model(lora_config, network)
    except ValueError as error:  # no layer has such a name, or one cannot have an adapter
        raise Fault(f"--lora-targets: {' '.join(str(error).split())}") from None
    for layer in [module for module in network.modules() if isinstance(module, LoraLayer)]:
        for half in (layer.lora_A, layer.lora_B):  # peft has given them the backbone's dtype
            half["default"].float()
            if isinstance(half["default"], nn.Linear):  # not a patch embedding's convolution
                layer.cast_input_dtype_enabled = False
                weight = half["default"].weight
                half["default"] = AdapterLinear(*weight.shape[::-1], bias=False, device="meta")
                half["default"].weight = weight


def read_lora_config(file):
    """adapter_config.json as PEFT reads it. Refuses what is no plain LoRA."""
    content = read_object(file)
    plain = {"peft_type": "LORA", "use_dora": False, "bias": "none", "lora_bias": False}
    for field, wanted in plain.items():
        value = content.get(field)
        if value != wanted and not (value is None and field != "peft_type"):
            raise Fault(f"{file}: {field} is {value!r}; only plain LoRA is read here ({wanted!r})")
    try:
        lora_config = LoraConfig.from_pretrained(str(file.parent))
    except (TypeError, ValueError, KeyError) as error:
        raise Fault(f"{file} is none that this version of PEFT reads ({error})") from None
    rank, targets = lora_config.r, lora_config.target_modules
    if not isinstance(rank, int) or rank < 1:
        raise Fault(f"{file}: r is {rank!r}, not a rank of at least 1")
    if not isinstance(lora_config.lora_alpha, (int, float)):
        raise Fault(f"{file}: lora_alpha is {lora_config.lora_alpha!r}, not a number")
    if not targets or not all(isinstance(name, str) for name in targets):
        raise Fault(
            f"{file}: target_modules is {content.get('target_modules')!r}, no list of names"
        )
    return lora_config


def load_adapter(network, directory, rank=0, alpha=None, targets=None):
    """A PEFT directory onto its base model, unmerged; the value head from beside it. Refuses what
    contradicts it."""
    lora_config = read_lora_config(directory / "adapter_config.json")
    own_targets = lora_config.target_modules  # a list, or a regular expression
    own_targets = own_targets if isinstance(own_targets, str) else sorted(own_targets)
    for name, asked, own in (
        ("rank", rank, lora_config.r),
        ("alpha", alpha, lora_config.lora_alpha),
        ("targets", targets and sorted(targets), own_targets),
    ):
        if asked and asked != own:
            raise Fault(
                f"{directory} holds an adapter with LoRA {name} {own}, not {asked}; "
                f"pass --lora-{name} so"
            )
    lora_config.inference_mode = False
    network.add_lora(lora_config=lora_config)
    own = {key: tensor for key, tensor in network.state_dict().items() if network.in_adapter(key)}
    found = {}
    for key, entry in open_tensors(directory, "adapter_model").items():
        key = key.removeprefix("base_model.model.")
        # PEFT 0.11 also wrote the frozen lm_head itself; adapters of unused modules have nothing to
        # adapt here
        if not key.endswith(".base_layer.weight") and not network.is_unused(key):
            found[key.removesuffix("weight") + "default.weight" if ".lora_" in key else key] = entry
    check_tensors({key: entry.get_shape() for key, entry in found.items()}, own, directory)
    for key, entry in found.items():
        own[key].copy_(read_tensor(entry, key, directory))
    if (directory / "value_head.safetensors").is_file():
        file = directory / "value_head.safetensors"
        entries = open_tensors(directory, "value_head")
        state = {key: read_tensor(entry, key, file) for key, entry in entries.items()}
    elif (directory / "training_state.pt").is_file():  # RL4VLA's: "vh" is the value head
        file = directory / "training_state.pt"
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["vh"]
            state = {key: read_tensor(tensor, key, file) for key, tensor in state.items()}
        except (RuntimeError, UnpicklingError, KeyError, TypeError, AttributeError) as error:
            raise Fault(f"{file} is damaged or not RL4VLA's ({error!r})") from None
    else:
        return  # the base model's value head, or a fresh one
    shapes = {key: tensor.shape for key, tensor in state.items()}
    check_tensors(shapes, network.value_head.state_dict(), file)
    network.value_head.load_state_dict(state)
