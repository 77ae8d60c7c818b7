"""LoRA adapters with float32 weights, saved and read as PEFT directories."""

from __future__ import annotations

from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from backbones.files import check_tensors, open_tensors
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
    inject_adapter_in_model(lora_config, network)
    for layer in [module for module in network.modules() if isinstance(module, LoraLayer)]:
        for half in (layer.lora_A, layer.lora_B):  # peft has given them the backbone's dtype
            half["default"].float()
            if isinstance(half["default"], nn.Linear):  # not a patch embedding's convolution
                layer.cast_input_dtype_enabled = False
                weight = half["default"].weight
                half["default"] = AdapterLinear(*weight.shape[::-1], bias=False, device="meta")
                half["default"].weight = weight


def load_adapter(network, directory, rank=0, alpha=None, targets=None):
    """A PEFT directory onto its base model, unmerged; the value head from beside it. Refuses what
    contradicts it."""
    lora_config = LoraConfig.from_pretrained(str(directory))
    for name, asked, own in (
        ("rank", rank, lora_config.r),
        ("alpha", alpha, lora_config.lora_alpha),
        ("targets", targets and sorted(targets), sorted(lora_config.target_modules)),
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
        own[key].copy_(entry[:])
    if (directory / "value_head.safetensors").is_file():
        file = directory / "value_head.safetensors"
        state = {key: entry[:] for key, entry in open_tensors(directory, "value_head").items()}
    elif (directory / "training_state.pt").is_file():  # RL4VLA's: "vh" is the value head
        file = directory / "training_state.pt"
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["vh"]
        except (RuntimeError, UnpicklingError, KeyError) as error:
            raise Fault(f"{file} is damaged or not RL4VLA's ({error!r})") from None
    else:
        return  # the base model's value head, or a fresh one
    shapes = {key: tensor.shape for key, tensor in state.items()}
    check_tensors(shapes, network.value_head.state_dict(), file)
    network.value_head.load_state_dict(state)
