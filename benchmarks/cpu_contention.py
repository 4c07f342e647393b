"""How fast a small ViT trains on CPUs alone, and beside another training of as many threads: GOMP_SPINCOUNT's effect.

python benchmarks/cpu_contention.py [--seconds 20] [--threads 2] [--others 0 1]

ViT of width 192 and 4 blocks, 224 px, batch 16, float32. Prints images/s for each number of other trainings, with
libgomp's default, with the spin count of `vit_dist.threads` and with OMP_WAIT_POLICY=PASSIVE, in turns (twice), and the
ratio to the quiet default. Needs an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from vit_dist.threads import SPINS

STEP = """
import sys, time
import torch
from transformers import ViTConfig, ViTForImageClassification
torch.manual_seed(0)
model = ViTForImageClassification(ViTConfig(
    hidden_size=192, num_hidden_layers=4, num_attention_heads=3, intermediate_size=768, num_labels=10))
optimizer = torch.optim.AdamW(model.parameters())
images, labels = torch.randn(16, 3, 224, 224), torch.randint(10, (16,))
def step():
    optimizer.zero_grad()
    model(pixel_values=images, labels=labels).loss.backward()
    optimizer.step()
for _ in range(3):
    step()
print("ready", flush=True)
sys.stdin.readline()
begun, steps = time.monotonic(), 0
while time.monotonic() - begun < float(sys.argv[1]):
    step()
    steps += 1
print(16 * steps / (time.monotonic() - begun), flush=True)
"""
SETTINGS = {
    "default": {},
    f"GOMP_SPINCOUNT={SPINS}": {"GOMP_SPINCOUNT": SPINS},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
}


def measure(settings: dict[str, str], others: int, threads: int, seconds: float) -> list[float]:
    """Images/s of each of `others` + 1 trainings that run at once."""
    environ = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environ |= {**settings, "OMP_NUM_THREADS": str(threads)}
    processes = [
        subprocess.Popen([sys.executable, "-c", STEP, str(seconds)], env=environ, text=True,
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for _ in range(others + 1)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    return [float(process.communicate()[0]) for process in processes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--others", type=int, nargs="+", default=[0, 1])
    asked = parser.parse_args()
    rates: dict[tuple[int, str], list[float]] = {}
    for _ in range(2):
        for others in asked.others:
            for name, settings in SETTINGS.items():
                rates.setdefault((others, name), []).extend(measure(settings, others, asked.threads, asked.seconds))
    quiet = statistics.mean(rates.get((0, "default"), [float("nan")]))
    sys.stdout.write(f"{'others':<8}{'setting':<24}{'images/s':>10}{'of quiet':>10}{'from - to':>18}\n")
    for (others, name), found in rates.items():
        mean = statistics.mean(found)
        span = f"{min(found):.1f} - {max(found):.1f}"
        sys.stdout.write(f"{others:<8}{name:<24}{mean:>10.1f}{mean / quiet:>10.2f}{span:>18}\n")


if __name__ == "__main__":
    main()
