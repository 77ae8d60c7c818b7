"""Seconds and memory of one rollout step and one update of OpenVLA, beside the mere arithmetic.

    python tools/bench_policy.py               # measures: 7B on a GPU, openvla-tiny on a CPU
    python tools/bench_policy.py --derive      # no weights, no GPU: memory and time, from shapes

Measured: the median of several calls of policy.act and ppo_pair.update, after one to warm up. The
floor is the number of multiply-adds (times 2, without recomputing anything) over the device's
bfloat16 rate. Derived: act, evaluate and backward run on the meta device, where tensors have shapes
but no data; every tensor that is alive is counted, so the figures follow the code. An allocator's
waste is not in them.
"""

import statistics
import sys
import time
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import tyro
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import policies
import ppo_pair
from backbones.openvla import OPENVLA_TINY, TIMM
from evaluate import markdown

OPENVLA_7B = {  # what distinguishes the official checkpoint's config.json
    "model_type": "openvla",
    "timm_model_ids": list(TIMM),
    "image_sizes": [224, 224],
    "n_action_bins": 256,
    "pad_to_multiple_of": 64,
    "pad_token_id": 32000,
    "text_config": {"model_type": "llama", "pad_token_id": 32000, "vocab_size": 32064},
    "norm_stats": OPENVLA_TINY["norm_stats"],
}
CONFIGS = {"openvla": OPENVLA_7B, "openvla-tiny": OPENVLA_TINY}
INSTRUCTION = "put red cube on plate"
# FLOP/s, dense, from the data sheets; and what a process can have of a GPU
BF16_PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}
GPU_GIB = {"24 GB": 22.5, "48 GB": 44.5, "80 GB": 79.0, "141 GB": 139.0}
GIB = 2**30


@dataclass
class Args:
    derive: bool = False
    """derive the table for 7B instead of measuring"""
    backbone: str | None = None
    """openvla or openvla-tiny (default: openvla on a GPU, openvla-tiny on a CPU)"""
    num_envs: int | None = None
    """observations of the rollout step (default: 128 on a GPU, 16 on a CPU)"""
    batch_size: int | None = None
    """samples of the minibatch (default: 640 on a GPU, 32 on a CPU)"""
    device_batch_size: int | None = None
    """samples per forward pass (default: the backbone's)"""
    gradient_checkpointing: bool | None = None
    """recompute activations (default: as the backbone has it)"""
    lora_rank: int = 32
    """of the adapters; 0: none, all weights train"""
    repeats: int = 3
    """calls per figure"""
    cuda: bool = True
    """if toggled, on the GPU where there is one"""


# ----------------------------------------------------------------------------------- random weights
def random_policy(backbone, device, dtype, lora_rank):
    """The backbone with N(0, 0.02) weights, made where they will live; on "meta" with none."""
    with torch.device("meta"):
        policy = policies.TokenPolicy(CONFIGS[backbone])
    for key, p in policy.named_parameters():
        p.data = p.data.to(torch.float32 if policy.keeps_float32(key) else dtype)
    policy.to_empty(device=device)
    for key, p in policy.named_parameters():
        if p.ndim > 1:
            p.data.normal_(std=0.02)
        else:
            p.data.fill_(0.0 if key.endswith("bias") else 1.0)
    policy.init_buffers(device)
    policy.use_norm_stats("builtin")
    policy.tokenizer = twenty_ids
    if lora_rank:
        policy.add_lora(lora_rank)
    return policy.to(device).eval()


def twenty_ids(text):
    """As many as Llama's tokenizer makes of INSTRUCTION."""
    return [1, *range(3, 21), 5]


def random_obs(policy, count, device):
    size = (count, policy.image_size, policy.image_size)
    pictures = torch.randint(256, (2, *size, 3), dtype=torch.uint8, device=device)
    obs = dict(zip(("rgb", "rgb_alt"), pictures), mask=torch.rand(size, device=device) < 0.2)
    return obs, [INSTRUCTION] * count


# ----------------------------------------------------------------------------------------- counting
class PeakMemory(TorchDispatchMode):
    """Bytes of the tensors made inside: how many are alive, and the most that ever were."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.seen = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        old = {
            id(x.untyped_storage())
            for x in tree_leaves((args, kwargs))
            if isinstance(x, torch.Tensor)
        }
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in old and storage not in self.seen:  # not a view, not in place
                    self.seen.add(storage)
                    self.alive += storage.nbytes()
                    self.peak = max(self.peak, self.alive)
                    weakref.finalize(storage, self.free, storage.nbytes())
        return out

    def free(self, nbytes):
        self.alive -= nbytes


class Attention(torch.autograd.Function):
    """Shapes of a fused attention kernel: it keeps queries, keys, values and its output, not the
    probabilities."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


@contextmanager
def fused_attention():
    kept = torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = lambda q, k, v, *args, **kwargs: (
        Attention.apply(q, k, v)
    )
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = kept


def calls(policy, count):
    """What rollout and update consist of, on `count` samples: act, and evaluate."""
    obs, instructions = random_obs(policy, count, policy.device)
    tokens = torch.zeros(count, 7, dtype=torch.long, device=policy.device) + policy.action_begin

    def act():  # policy.act without turning tokens into actions, which needs data
        policy.decode(
            policy.preprocess(obs["rgb"]), *policy.tokenize(instructions), temperature=1.0
        )

    return act, lambda: policy.evaluate_actions(obs, instructions, {"tokens": tokens})


def flops(policy):
    """FLOPs per sample. forward: act's as well, which has as many positions, the last ones singly.
    ppo: forward and backward. pair: that, and a forward each for o_pre and o_alt."""
    _, evaluate = calls(policy, 1)
    with FlopCounterMode(display=False) as counter:
        new = evaluate()
        forward = counter.get_total_flops()
        (new.logprob + new.value).sum().backward()
    policy.zero_grad()
    ppo = counter.get_total_flops()
    return dict(forward=forward, ppo=ppo, pair=ppo + 2 * forward)


COUNTS = 32, 64  # so many that what grows with the samples makes the peak, and not the gradients


def per_sample(fewer, more):
    """Bytes for COUNTS samples -> (fixed, per sample)."""
    return 2 * fewer - more, (more - fewer) / COUNTS[0]


def memory_of_act(policy):
    """Bytes at the peak: (fixed, per sample). Weights are not in it."""
    peaks = []
    for count in COUNTS:
        act, _ = calls(policy, count)
        with PeakMemory() as memory, fused_attention():
            act()
        peaks.append(memory.peak)
    return per_sample(*peaks)


def memory_of_update(policy):
    """Bytes at the peak, gradients in it: dict of (fixed, per sample), ppo and pair."""
    peaks = dict(ppo=[], pair=[])
    for count in COUNTS:
        _, evaluate = calls(policy, count)
        for name, peak in peaks.items():
            with PeakMemory() as memory, fused_attention():
                new = evaluate()
                loss = new.logprob + new.value
                if name == "pair":
                    with torch.no_grad():
                        pre, alt = evaluate(), evaluate()
                    loss = loss + policy.kl(new.dist, pre.dist) - policy.kl(new.dist, alt.dist)
                loss.sum().backward()
            policy.zero_grad()
            peak.append(memory.peak)
    return {name: per_sample(*found) for name, found in peaks.items()}


# ------------------------------------------------------------------------------------------ derived
def derived(backbone, lora_rank):
    """Markdown: what lies in memory all the time, what each sample costs, how many samples fit at
    once, by GPU, and how long an iteration takes at 45 % of a data sheet's rate."""
    policy = random_policy(backbone, "meta", torch.bfloat16, lora_rank)
    args, work = ppo_pair.preset(backbone), flops(policy)
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    samples = args.num_envs * args.num_steps
    pixels = policy.image_size**2 * 7  # rgb, rgb_alt, mask
    always = {
        "weights, bfloat16, with adapters": sum(p.nbytes for p in policy.parameters()),
        "AdamW": trained * 8,  # two float32 numbers each
        "observations of a rollout": samples // policy.chunk * pixels,
    }
    calls = {"rollout step (KV cache in it)": (memory_of_act(policy), work["forward"])}
    memories = {}
    for policy.gradient_checkpointing in (True, False):
        memories[policy.gradient_checkpointing] = memory_of_update(policy)
    for name in ("ppo", "pair"):
        for recompute, memory in memories.items():
            flop = work[name] + recompute * work["forward"]
            calls[name.upper() + recompute * ", recomputing"] = memory[name], flop
    each, fit = [["for each sample at once", "GiB", "TFLOP"]], [["samples that fit", *calls]]
    for text, ((_, nbytes), flop) in calls.items():
        each.append([text, f"{nbytes / GIB:.2f}", f"{flop / 1e12:.1f}"])
    for gpu, total in GPU_GIB.items():
        room = total * GIB - sum(always.values())
        counts = [int((room - fixed) // nbytes) for (fixed, nbytes), _ in calls.values()]
        fit.append([gpu, *(str(count) if count > 0 else "-" for count in counts)])
    iteration = [["one iteration at 45 % of the rate, recomputing", "PPO", "PAIR"]]
    for gpu in ("A100", "H100"):
        # The rollout, and recomputing
        flop = [samples * (2 * work["forward"] + work[name]) for name in ("ppo", "pair")]
        iteration.append([gpu, *(f"{x / (0.45 * BF16_PEAK[gpu]) / 60:.0f} min" for x in flop)])
    lasting = [[text, f"{nbytes / GIB:.1f}"] for text, nbytes in always.items()]
    tables = [["in memory all the time", "GiB"], *lasting], each, fit, iteration
    return "\n\n".join(map(markdown, tables))


# ----------------------------------------------------------------------------------------- measured
def peak_rate(device):
    """FLOP/s, and where the figure is from: the data sheet, else a product of two matrices."""
    if device.type == "cuda":
        for name, rate in BF16_PEAK.items():
            if name in torch.cuda.get_device_name():
                return rate, f"{name}'s data sheet, bfloat16"
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds, _ = measure(lambda: a @ b, device, 5)
    return 2 * size**3 / seconds, f"a product of {size} x {size} matrices, {str(dtype)[6:]}"


def measure(call, device, repeats):
    """-> median seconds, peak bytes: of the process on a GPU; on a CPU of the tensors made in the
    call."""

    def synchronize():
        if device.type == "cuda":
            torch.cuda.synchronize()

    memory = PeakMemory() if device.type == "cpu" else None
    with memory or nullcontext():  # also the warm-up
        call()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), memory.peak if memory else torch.cuda.max_memory_allocated()


def bench(args):
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    backbone = args.backbone or ("openvla" if gpu else "openvla-tiny")
    num_envs = args.num_envs or (128 if gpu else 16)
    batch_size = args.batch_size or (640 if gpu else 32)
    training = ppo_pair.preset(
        backbone, batch_size=batch_size, num_envs=batch_size, update_epochs=1, target_kl=0.0
    )
    training.learning_rate = training.value_learning_rate = 0.0  # so that nothing is learnt
    own = min(training.device_batch_size, batch_size)
    training.device_batch_size = args.device_batch_size or own
    recompute = args.gradient_checkpointing
    recompute = training.policy.gradient_checkpointing if recompute is None else recompute

    torch.manual_seed(0)
    work = flops(random_policy(backbone, "meta", torch.bfloat16, args.lora_rank))
    dtype = torch.bfloat16 if gpu else torch.float32
    policy = random_policy(backbone, device, dtype, args.lora_rank)
    policy.gradient_checkpointing = recompute
    rate, source = peak_rate(device)

    obs, instructions = random_obs(policy, num_envs, device)
    seconds, peak = measure(lambda: policy.act(obs, instructions), device, args.repeats)
    rows = [("rollout step", num_envs, work["forward"], seconds, peak)]

    obs, instructions = random_obs(policy, batch_size, device)
    # in such parts as update takes, so that old and new log-probs agree, as in training
    decision = policies.act_in_parts(policy, obs, instructions, training.device_batch_size)
    batch = dict(
        obs=obs,
        instructions=instructions,
        latents=decision.latent,
        logprobs=decision.logprob,
        values=decision.value,
        advantages=torch.randn(batch_size, device=device),
        returns=torch.randn(batch_size, device=device),
    )
    optimizer = ppo_pair.make_optimizer(training, policy)
    for name, coefs in (("ppo", (0.0, 0.0)), ("pair", (1.0, 0.2))):
        training.inv_coef, training.sen_coef = coefs

        def update():
            ppo_pair.update(training, policy, optimizer, batch, obs["rgb"][:1])

        figures = measure(update, device, args.repeats)
        rows.append((f"{name.upper()} minibatch", batch_size, work[name], *figures))

    where = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{backbone}, random weights, LoRA rank {args.lora_rank}, device batch "
        f"{training.device_batch_size}, gradient checkpointing {'on' if recompute else 'off'}; "
        f"{where}; torch {torch.__version__}\n"
    )
    memory = "GiB, peak" if gpu else "GiB, peak, without weights"
    table = [["", "samples", "seconds", memory, "floor, seconds", "floor / seconds"]]
    for name, count, flop, seconds, peak in rows:
        floor = count * flop / rate
        figures = [f"{figure:.3g}" for figure in (seconds, peak / GIB, floor)]
        table.append([name, str(count), *figures, f"{floor / seconds:.0%}"])
    print(markdown(table))
    each = ", ".join(f"{name} {flop:.3g}" for name, flop in work.items())
    print(
        f"\nThe floor: {each} FLOP per sample, nothing recomputed, at {rate:.3g} FLOP/s ({source})."
    )


def main(args: Args):
    if args.derive:
        print(derived("openvla", args.lora_rank))
    else:
        bench(args)


if __name__ == "__main__":
    main(tyro.cli(Args))
