"""The cost of a decision of pi0.5: `python tools/bench_pi.py`. FLOPs at full size, counted; CPU
seconds of a quarter of it.

Two layouts of the same observation: as openpi and RLinf compute it (three cameras, two of them
black and masked, and a prompt padded to 200 tokens), and what is there (one camera, 32 tokens).
Everything masked changes no velocity (tests/test_pi.py).
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.utils.flop_counter import FlopCounterMode

import policies
from backbones.pi0 import PI, PI_KIND

FULL = PI | PI_KIND["pi05"] | {"model_type": "pi05"}
QUARTER = FULL | {  # a quarter of every width, depth and number of tokens
    "image_size": 112, "vis_width": 288, "vis_depth": 7, "vis_heads": 4, "vis_mlp": 1076, "vocab": 1000, "depth": 5,
    "heads": 2, "vlm_width": 512, "vlm_mlp": 4096, "exp_width": 256, "exp_mlp": 1024,
}  # fmt: skip
PADDED, THERE = (3, 200), (1, 32)  # cameras, tokens


@torch.no_grad()
def decide(policy, cameras, tokens, batch, device):
    """One decision: the prefix once, then four denoise steps."""
    size, there = policy.image_size, torch.ones(batch, cameras, dtype=torch.bool)
    images = torch.zeros(batch, cameras, 3, size, size, device=device)
    ids = torch.ones(batch, tokens, dtype=torch.long, device=device)
    noise = torch.zeros(batch, policy.horizon, 32, device=device)
    policy.ode(
        policy.prefix(images, there, ids, torch.ones(batch, tokens, dtype=torch.bool)),
        None,
        noise,
        4,
    )


def main():
    with torch.device("meta"):
        full = policies.FlowPolicy(FULL)
    flops = {}
    for layout in (PADDED, THERE):
        with FlopCounterMode(display=False) as counter:
            decide(full, *layout, 1, "meta")
        flops[layout] = counter.get_total_flops()
    small, seconds = policies.FlowPolicy(QUARTER), {PADDED: [], THERE: []}
    for _ in range(6):
        for (cameras, tokens), times in seconds.items():
            start = time.process_time()
            decide(small, cameras, tokens // 4, 2, "cpu")
            times.append(time.process_time() - start)
    print(f"{'layout':24} {'TFLOP, full size':>18} {'CPU s, quarter size':>22}")
    for cameras, tokens in (PADDED, THERE):
        best = min(seconds[cameras, tokens][1:])  # the first one warms up
        print(
            f"{cameras} camera(s), {tokens:3} tokens  {flops[cameras, tokens] / 1e12:18.2f} {best:22.3f}"
        )
    ratios = flops[PADDED] / flops[THERE], min(seconds[PADDED][1:]) / min(seconds[THERE][1:])
    print(f"{'ratio':24} {ratios[0]:18.2f} {ratios[1]:22.2f}")


if __name__ == "__main__":
    main()
