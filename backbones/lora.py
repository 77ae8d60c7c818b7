"""LoRA adapters with float32 weights, saved and read as PEFT directories."""

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from backbones.files import check_tensors, open_tensors, read_tensor
from runtime import Fault, one_line, read_json

NOT_PLAIN = (  # fields of adapter_config.json that make more of an adapter than B A x
    "use_dora", "bias", "lora_bias", "use_qalora", "use_bdlora", "layer_replication",
    "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "arrow_config",
    "kasa_config", "velora_config", "monteclora_config",
)  # fmt: skip


class AdapterLinear(nn.Linear):
    """Half of an adapter: float32 weights, or small updates would vanish; arithmetic in its input's
    dtype, where peft would raise the input to float32 and keep that for the backward pass."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


def add_lora(network, rank=32, alpha=None, targets=None, lora_config=None):
    """Float32 adapters beside the layers that lora_config, or `targets` (None: the network's list),
    names. They train, and what the network trains beside them (`in_adapter`), and the value head.

    alpha None: alpha = rank.
    """
    network.lora_config = lora_config = lora_config or LoraConfig(
        r=rank,
        lora_alpha=alpha or rank,
        target_modules=list(targets or network.lora_targets),
        exclude_modules=network.lora_excludes,
        init_lora_weights="gaussian",
    )
    lora_config.base_model_name_or_path, lora_config.revision = network.name, network.commit
    lora_config.modules_to_save = None  # PEFT would train copies of them
    try:
        inject_adapter_in_model(lora_config, network)
    except ValueError as error:  # no layer has such a name, or one cannot have an adapter
        raise Fault(f"--lora-targets: {one_line(error)}") from None
    for layer in [module for module in network.modules() if isinstance(module, LoraLayer)]:
        for half in (layer.lora_A, layer.lora_B):  # peft has given them the backbone's dtype
            half["default"].float()
            if isinstance(half["default"], nn.Linear):  # not a patch embedding's convolution
                layer.cast_input_dtype_enabled = False
                weight = half["default"].weight
                half["default"] = AdapterLinear(*weight.shape[::-1], bias=False, device="meta")
                half["default"].weight = weight
    trained = [key for key in network.state_dict() if network.in_adapter(key)]
    whole = [key.removeprefix("paligemma_with_expert.") for key in trained if ".lora_" not in key]
    lora_config.modules_to_save = sorted({key.split(".")[0] for key in whole}) or None
    for key, p in network.named_parameters():
        p.requires_grad_(network.in_adapter(key) or key.startswith("value_head."))
    network.detach_value = network.detach_value  # freezes what is idle


def read_lora_config(file):
    """adapter_config.json as PEFT reads it. Refuses what is no plain LoRA."""
    content = read_json(file)
    for field in ("peft_type", *NOT_PLAIN):
        value = content.get(field)
        plain = value == "LORA" if field == "peft_type" else not value or value == "none"
        if not plain:
            raise Fault(f"{file}: {field} is {value!r}; only plain LoRA is read here")
    start = str(content.get("init_lora_weights")).lower()
    if start.startswith(("pissa", "olora", "loftq", "corda", "lora_ga")):
        raise Fault(
            f"{file}: init_lora_weights is {start!r}, which also changes the base model; convert "
            "the adapter to plain LoRA (PEFT: path_initial_model_for_weight_conversion)"
        )
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
    """A PEFT directory onto its base model, unmerged, and the value head from beside it. rank,
    alpha and targets: what the user asks for, which has to be the same."""
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
        # PEFT 0.11 also wrote the frozen lm_head; others adapt modules that are not used here
        if not key.endswith(".base_layer.weight") and not network.is_unused(key):
            found[key.removesuffix("weight") + "default.weight" if ".lora_" in key else key] = entry
    check_tensors({key: entry.get_shape() for key, entry in found.items()}, own, directory)
    for key, entry in found.items():
        own[key].copy_(read_tensor(entry, key, directory))
    if (file := directory / "value_head.safetensors").is_file():
        entries = open_tensors(directory, "value_head")
    elif (file := directory / "training_state.pt").is_file():  # RL4VLA's: "vh" is the value head
        try:
            entries = dict(torch.load(file, map_location="cpu", weights_only=True, mmap=True)["vh"])
        except Exception as error:  # a damaged pickle raises errors of many types
            raise Fault(f"{file} is damaged or not RL4VLA's ({error!r})") from None
    else:
        return  # the base model's value head, or a fresh one
    state = {key: read_tensor(entry, key, file) for key, entry in entries.items()}
    shapes = {key: tensor.shape for key, tensor in state.items()}
    check_tensors(shapes, network.value_head.state_dict(), file)
    network.value_head.load_state_dict(state)
