"""Seconds and memory of one rollout step and one update of OpenVLA, beside what the arithmetic
alone would take.

    python tools/bench_policy.py                 # measures: 7B with random weights on a GPU,
    openvla-tiny on a CPU python tools/bench_policy.py --derive        # no weights, no GPU: memory
    and time of 7B by GPU size, from shapes

Measured: the median of several calls of policy.act and ppo_pair.update, after one to warm up. The
floor is the number of multiply-adds (times 2, without recomputing anything) over the device's
bfloat16 rate. Derived: act, evaluate and backward run on the meta device, where tensors have shapes
but no data; every tensor that is alive is counted, so the figures follow the code. An allocator's
waste is not in them.
"""

import copy
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
BF16_PEAK = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
}  # FLOP/s, dense, from the data sheets
GPU_GIB = {
    "24 GB": 22.5,
    "48 GB": 44.5,
    "80 GB": 79.0,
    "141 GB": 139.0,
}  # what a process can have of it
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
        policy = policies.TokenPolicy(copy.deepcopy(CONFIGS[backbone]))
    for key, p in policy.named_parameters():
        p.data = p.data.to(torch.float32 if policy.keeps_float32(key) else dtype)
    policy.to_empty(device=device)
    for key, p in policy.named_parameters():
        p.data.normal_(std=0.02) if p.ndim > 1 else p.data.fill_(
            0.0 if key.endswith("bias") else 1.0
        )
    llama = policy.language_model.model
    llama.rotary_emb = type(llama.rotary_emb)(llama.config).to(device)
    policy.use_norm_stats("builtin")
    policy.tokenizer = lambda text: [
        1,
        *range(3, 21),
        5,
    ]  # 20 ids, as Llama's tokenizer makes of INSTRUCTION
    if lora_rank:
        policy.add_lora(lora_rank)
    return policy.to(device).eval()


def random_obs(policy, count, device):
    size = (count, policy.image_size, policy.image_size)
    rgb, rgb_alt = (
        torch.randint(256, (*size, 3), dtype=torch.uint8, device=device) for _ in range(2)
    )
    return dict(rgb=rgb, rgb_alt=rgb_alt, mask=torch.rand(size, device=device) < 0.2), [
        INSTRUCTION
    ] * count


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
    """FLOPs per sample: forward, which is act's as well (as many positions, the last ones singly),
    ppo = forward and backward, pair = that twice, for o and o_alt (no sample at the clip), and a
    forward for o_pre."""
    _, evaluate = calls(policy, 1)
    with FlopCounterMode(display=False) as counter:
        new = evaluate()
        forward = counter.get_total_flops()
        (new.logprob + new.value).sum().backward()
    policy.zero_grad()
    return dict(
        forward=forward, ppo=counter.get_total_flops(), pair=2 * counter.get_total_flops() + forward
    )


def per_sample(count_1, count_2, bytes_1, bytes_2):
    """-> (fixed, per sample). Counts of samples so large that what grows with them makes the peak,
    and not the gradients."""
    each = (bytes_2 - bytes_1) / (count_2 - count_1)
    return bytes_1 - each * count_1, each


def memory_of_act(policy, counts=(32, 64)):
    """Bytes at the peak: (fixed, per sample). Weights are not in it."""
    peaks = []
    for count in counts:
        act, _ = calls(policy, count)
        with PeakMemory() as memory, fused_attention():
            act()
        peaks.append(memory.peak)
    return per_sample(*counts, *peaks)


def memory_of_update(policy, counts=(32, 64)):
    """Bytes at the peak, gradients in it: dict of (fixed, per sample), ppo and pair. The backward
    pass of pair starts with the graphs of both o and o_alt."""
    peaks = dict(ppo=[], pair=[])
    for count in counts:
        _, evaluate = calls(policy, count)
        with PeakMemory() as memory, fused_attention():
            new = evaluate()
            graph = memory.alive
            (new.logprob + new.value).sum().backward()
        policy.zero_grad()
        peaks["ppo"].append(memory.peak)
        peaks["pair"].append(memory.peak + graph)
    return {name: per_sample(*counts, *found) for name, found in peaks.items()}


# ------------------------------------------------------------------------------------------ derived
def derive(backbone="openvla", lora_rank=32):
    """Per-sample FLOPs, and bytes: (fixed, per sample) of each call, and what lies in memory all
    the time."""
    policy = random_policy(backbone, "meta", torch.bfloat16, lora_rank)
    table = ppo_pair.TABLE_3[backbone]
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    found = dict(flops=flops(policy), act=memory_of_act(policy))
    for recompute in (True, False):
        policy.gradient_checkpointing = recompute
        found |= {(name, recompute): memory for name, memory in memory_of_update(policy).items()}
    pixels = policy.image_size**2 * 7  # rgb, rgb_alt, mask
    return found | dict(
        weights=sum(p.numel() * p.element_size() for p in policy.parameters()),
        trained=trained,
        optimizer=trained * 8,  # AdamW: two float32 numbers each
        rollout=table["num_envs"] * table["num_steps"] // policy.chunk * pixels,
    )


def derived_table(found, table):
    """Markdown: how many samples fit at once, by GPU, and how long an iteration takes at 45 % of a
    data sheet's rate."""
    resident = found["weights"] + found["optimizer"] + found["rollout"]
    samples = table["num_envs"] * table["num_steps"]

    def fit(memory, name):
        fixed, each = found[name]
        count = int((memory * GIB - resident - fixed) // each)
        return f"{count}" if count > 0 else "-"

    parts = [
        ("weights", "weights, bfloat16, with adapters"),
        ("optimizer", "AdamW"),
        ("rollout", "observations of a rollout"),
    ]
    lines = ["| in memory all the time | GiB |", "|---|---|"]
    lines += [f"| {text} | {found[name] / GIB:.1f} |" for name, text in parts]
    lines += ["", "| for each sample at once | GiB | TFLOP |", "|---|---|---|"]
    names = {
        "act": "rollout step (KV cache in it)",
        "ppo": "PPO",
        "pair": "PAIR, no sample at the clip",
    }
    for key, recompute in (
        ("act", False),
        ("ppo", True),
        ("ppo", False),
        ("pair", True),
        ("pair", False),
    ):
        each = found[key if key == "act" else (key, recompute)][1]
        work = found["flops"]["forward" if key == "act" else key]
        work += recompute * found["flops"]["forward"] * (2 if key == "pair" else 1)
        text = names[key] + (", gradient checkpointing" if recompute else "")
        lines.append(f"| {text} | {each / GIB:.2f} | {work / 1e12:.1f} |")
    columns = {"rollout": "act", "PPO": ("ppo", True), "PPO, nothing recomputed": ("ppo", False), "PAIR": ("pair", True),
               "PAIR, nothing recomputed": ("pair", False)}  # fmt: skip
    lines += ["", f"| samples that fit | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    lines += [
        f"| {gpu} | {' | '.join(fit(memory, name) for name in columns.values())} |"
        for gpu, memory in GPU_GIB.items()
    ]
    lines += ["", "| one iteration at 45 % of the rate | PPO | PAIR |", "|---|---|---|"]
    for gpu in ("A100", "H100"):
        forward, ppo, pair = (found["flops"][name] for name in ("forward", "ppo", "pair"))
        work = dict(ppo=2 * forward + ppo, pair=3 * forward + pair)  # the rollout, and recomputing
        minutes = {
            name: samples * flop / (0.45 * BF16_PEAK[gpu]) / 60 for name, flop in work.items()
        }
        lines.append(
            f"| {gpu}, gradient checkpointing | {minutes['ppo']:.0f} min | {minutes['pair']:.0f} min |"
        )
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------- measured
def peak_rate(device):
    """FLOP/s, and where the figure is from: the data sheet, else a product of two matrices."""
    if device.type == "cuda":
        for name, rate in BF16_PEAK.items():
            if name in torch.cuda.get_device_name():
                return rate, f"{name}'s data sheet, bfloat16"
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / measure(lambda: a @ b, device, 5)[
        0
    ], f"a product of {size} x {size} matrices, {str(dtype)[6:]}"


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
    table, num_envs = ppo_pair.TABLE_3[backbone], args.num_envs or (128 if gpu else 16)
    batch_size = args.batch_size or (640 if gpu else 32)
    training = ppo_pair.Args(**table)
    training.batch_size, training.num_envs, training.update_epochs, training.target_kl = (
        batch_size,
        batch_size,
        1,
        0.0,
    )
    training.device_batch_size = args.device_batch_size or min(
        table["device_batch_size"], batch_size
    )
    recompute = (
        table["gradient_checkpointing"]
        if args.gradient_checkpointing is None
        else args.gradient_checkpointing
    )

    torch.manual_seed(0)
    work = flops(random_policy(backbone, "meta", torch.bfloat16, args.lora_rank))
    policy = random_policy(
        backbone, device, torch.bfloat16 if gpu else torch.float32, args.lora_rank
    )
    policy.gradient_checkpointing = recompute
    rate, source = peak_rate(device)

    obs, instructions = random_obs(policy, num_envs, device)
    rows = [
        (
            "rollout step",
            num_envs,
            work["forward"],
            *measure(lambda: policy.act(obs, instructions), device, args.repeats),
        )
    ]

    parts, decisions = [], []
    while (
        sum(len(part["rgb"]) for part in parts) < batch_size
    ):  # so that old and new log-probs agree, as in training
        part, instructions = random_obs(policy, min(num_envs, batch_size), device)
        parts.append(part)
        decisions.append(policy.act(part, instructions))
    random = torch.randn(2, batch_size, device=device)
    tokens = torch.cat([decision.latent["tokens"] for decision in decisions])
    batch = dict(
        obs={key: torch.cat([part[key] for part in parts])[:batch_size] for key in obs},
        instructions=[INSTRUCTION] * batch_size,
        latents={"tokens": tokens[:batch_size]},
        logprobs=torch.cat([decision.logprob for decision in decisions])[:batch_size],
        values=torch.cat([decision.value for decision in decisions])[:batch_size],
        advantages=random[0],
        returns=random[1],
    )
    head = list(policy.value_head.parameters())
    actor = [p for p in policy.parameters() if p.requires_grad and all(p is not q for q in head)]
    groups = [
        dict(params=actor, lr=0.0),
        dict(params=head, lr=0.0),
    ]  # no learning: the same minibatch stays on-policy
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for name, inv, sen, clip, flop in (
        ("PPO minibatch", 0.0, 0.0, 1.0, work["ppo"]),
        ("PAIR minibatch, no sample at the clip", 1.0, 0.2, 1e9, work["pair"]),
        (
            "PAIR minibatch, all samples at the clip",
            1.0,
            0.2,
            0.0,
            work["ppo"] + 2 * work["forward"],
        ),
    ):
        training.inv_coef, training.sen_coef, training.sen_clip = inv, sen, clip

        def update():
            ppo_pair.update(training, policy, optimizer, batch, obs["rgb"][:1])

        rows.append((name, batch_size, flop, *measure(update, device, args.repeats)))
        optimizer.zero_grad(set_to_none=True)

    where = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{backbone}, random weights, LoRA rank {args.lora_rank}, device batch {training.device_batch_size}, gradient "
          f"checkpointing {'on' if recompute else 'off'}; {where}; torch {torch.__version__}\n")  # fmt: skip
    memory = "GiB, peak" if gpu else "GiB, peak, without weights"
    print(
        f"| | samples | seconds | {memory} | floor, seconds | floor / seconds |\n|---|---|---|---|---|---|"
    )
    for name, count, flop, seconds, peak in rows:
        floor = count * flop / rate
        print(
            f"| {name} | {count} | {seconds:.3g} | {peak / GIB:.3g} | {floor:.3g} | {floor / seconds:.0%} |"
        )
    each = ", ".join(f"{name} {flop:.3g}" for name, flop in work.items())
    print(
        f"\nThe floor: {each} FLOP per sample, nothing recomputed, at {rate:.3g} FLOP/s ({source})."
    )


def main(args: Args):
    if args.derive:
        print(derived_table(derive("openvla", args.lora_rank), ppo_pair.TABLE_3["openvla"]))
    else:
        bench(args)


if __name__ == "__main__":
    main(tyro.cli(Args))
