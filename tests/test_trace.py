"""The loss trace: 20 optimizer steps of each tiny backbone. A change of numerics changes tests/trace.json in the same commit,
with a reason in its message:

    python tests/test_trace.py            # writes tests/trace.json anew
"""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from toy import Toy, in_float64

import policies
import ppo_pair
import runtime

FILE = Path(__file__).with_name("trace.json")
TINY = ["openvla-tiny", "pi05-tiny"]
NAMES = ("loss", "grad_norm", "inv_kl", "sen_kl")


def trace(backbone, double=True):
    """[[loss, grad norm, inv_kl, sen_kl] of each step]: random weights, the toy environment, the preset's own loss."""
    torch.manual_seed(0)
    policy = policies.load_policy(backbone)
    if double:
        policy = policy.double()
        torch.set_default_dtype(torch.float64)  # of the noise
    args = ppo_pair.preset(backbone, num_envs=4, batch_size=10**6, update_epochs=1, target_kl=0.0)
    args.num_steps = Toy.max_episode_steps
    head = list(policy.value_head.parameters())
    actor = [p for p in policy.parameters() if all(p is not q for q in head)]
    optimizer = torch.optim.AdamW([dict(params=actor, lr=1e-4), dict(params=head, lr=1e-3)])
    toy, rows = Toy(4, policy.image_size), []
    backgrounds = torch.full((1, policy.image_size, policy.image_size, 3), 90, dtype=torch.uint8)
    for step in range(20):
        runtime.seed_all(1, step)
        batch, _ = ppo_pair.rollout(
            args, policy, toy, iter(range(4 * step, 4 * step + 4)), torch.device("cpu")
        )
        stats = ppo_pair.update(args, policy, optimizer, batch, backgrounds)
        rows.append([stats[name] for name in NAMES])
    torch.set_default_dtype(torch.float32)
    return rows


@pytest.mark.parametrize("backbone", TINY)
def test_the_trace_is_reproduced(backbone, monkeypatch):
    """In float64. Kernels differ between CPUs: AVX2 instead of AVX-512 changes these numbers by up to 5e-5 in float32, by 4e-13
    in float64."""
    monkeypatch.setattr(torch.Tensor, "float", in_float64)
    torch.testing.assert_close(
        torch.tensor(trace(backbone)),
        torch.tensor(json.loads(FILE.read_text())[backbone]),
        rtol=1e-5,
        atol=1e-7,
    )


if __name__ == "__main__":
    double = not os.environ.get("FLOAT32")
    if double:
        torch.Tensor.float = in_float64
    traces = {name: trace(name, double) for name in TINY}
    Path(sys.argv[1] if len(sys.argv) > 1 else FILE).write_text(json.dumps(traces, indent=1))
