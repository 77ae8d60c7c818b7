"""A rehearsal on a GPU that is not there: full-size models act, evaluate and go back, in bfloat16 with LoRA and checkpointing.

The device "meta" plays the GPU: its tensors have shapes and no data. `StrictDevice` refuses what CUDA would refuse and a CPU
takes: tensors of two devices in one operation, two floating-point types in one norm, product, convolution or attention; and
what only a CPU is slow at: large tensors that are computed there.
(FakeTensorMode knows "cuda", but its backward pass wants a torch that was built with CUDA.)
"""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from backbones.layers import STEP_BOUNDS
from backbones.pi0 import PI, PI_KIND
from policies import FlowPolicy, TokenPolicy
from tools.bench_policy import OPENVLA_7B

ONE_DTYPE = ("norm", "mm", "convolution", "attention", "dot", "linear")
BETWEEN_DEVICES = ("_to_copy", "copy_", "index", "index_put_", "_index_put_impl_", "_unsafe_index")
TASKS = ["put red cube on plate", "put toy bear on plate"]


class StrictDevice(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.checked, self.copied_back = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        tensors = [x for x in tensors if x.ndim > 0]  # numbers may be anywhere, of any type
        if name not in BETWEEN_DEVICES:
            devices = {x.device.type for x in tensors}
            assert len(devices) < 2, f"{name} of tensors on {devices}"
            large = any(x.is_floating_point() and x.numel() > 10_000 for x in tensors)
            assert not large or "cpu" not in devices, f"{name} of a large tensor, on the CPU"
        if any(kernel in name for kernel in ONE_DTYPE):
            self.checked.add(name)
            # the backward pass of a norm also reads the float32 mean and rstd of its forward pass
            operands = tensors[:2] if "norm_backward" in name else tensors
            dtypes = {x.dtype for x in operands if x.is_floating_point()}
            assert len(dtypes) < 2, f"{name} of {dtypes}"
        if name == "_to_copy" and args[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            self.copied_back += 1
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return func(*args, **(kwargs or {}))


def full_size(backbone):
    """As load_policy makes it: LoRA on a backbone in bfloat16."""
    if backbone == "openvla":
        config, policy_class = copy.deepcopy(OPENVLA_7B), TokenPolicy
    else:
        config, policy_class = PI | PI_KIND[backbone] | {"model_type": backbone}, FlowPolicy
        actions = STEP_BOUNDS | {"mean": [0.0] * 7, "std": [1.0] * 7}
        state = {"mean": [0.0] * 8, "std": [1.0] * 8}
        config["norm_stats"] = {"builtin": {"actions": actions, "state": state}}
    with torch.device("meta"):
        policy = policy_class(config)
    for key, p in policy.named_parameters():
        p.data = p.data.to(torch.float32 if policy.keeps_float32(key) else torch.bfloat16)
    policy.init_buffers("meta")
    policy.use_norm_stats("builtin")
    policy.tokenizer = lambda text: [1, *range(3, 3 + len(text.split())), 5]
    policy.add_lora(32)
    policy.gradient_checkpointing = True
    return policy.to("meta").eval()


def rehearse(policy):
    """A rollout's decision, an evaluation's, and what an update does with the first -> the mode, with its counts."""
    obs = {
        "rgb": torch.zeros(2, 480, 640, 3, dtype=torch.uint8, device="meta"),
        "state": torch.zeros(2, 8, device="meta"),
    }
    with StrictDevice() as device:
        decision = policy.act(obs, TASKS, 0.6)
        assert decision.actions.shape == (2, policy.chunk, 7)
        latent = decision.latent or policy.act(obs, TASKS).latent  # an ODE's actions have none
        new = policy.evaluate_actions(obs, TASKS, latent)
        with torch.no_grad():
            pre = policy.evaluate_actions(obs, TASKS, latent)
        loss = new.logprob.exp() + new.value + new.entropy + policy.kl(new.dist, pre.dist)
        assert loss.is_meta and loss.dtype == torch.float32 and loss.shape == (2,)
        loss.sum().backward()
        for key, p in policy.named_parameters():
            assert p.requires_grad == (p.grad is not None), key
            assert p.grad is None or (p.grad.is_meta and p.grad.dtype == p.dtype == torch.float32)
        assert device.checked
    return device


@pytest.mark.parametrize("backbone", ["openvla", "pi0", "pi05"])
def test_full_size_on_a_gpu(backbone):
    device = rehearse(full_size(backbone))
    assert device.copied_back < 10  # each one waits for the GPU


def test_the_rehearsal_notices():
    """What was wrong once, and what would be next: a norm in another type than its input, a table on another device."""
    policy = full_size("pi05")
    model = policy.paligemma_with_expert["paligemma"]["model"]
    model["vision_tower"]["vision_model"]["post_layernorm"].float()
    with pytest.raises(AssertionError, match="native_layer_norm of .*float32"):
        rehearse(policy)
    norm = nn.LayerNorm(4, device="meta")
    with StrictDevice(), pytest.raises(AssertionError, match="add of tensors on"):
        norm(torch.zeros(2, 4, device="meta")) + torch.zeros(2, 4)
