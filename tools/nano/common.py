"""What the stages share: the work folder, random numbers that depend on (seed, stage, step) alone, checkpoints, progress.

Every draw of a training step comes from `draws(stage, step)`, so a stopped stage that goes on from its checkpoint ends
with the weights of one that was never stopped (on the same machine with the same number of threads).
"""

import argparse
import os
import random
import time
from pathlib import Path

import torch

SEED = 0
CHECKPOINT_SECONDS = 120


def arguments(doc, **options):
    """`WORK` and the stage's own options; also sets torch up."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder of drawings, checkpoints and results")
    parser.add_argument("--threads", type=int, default=2)
    for name, default in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(SEED)
    return args


def draws(stage, step):
    """The two sources of randomness of one step: choices and normals."""
    rng = random.Random(f"{SEED} {stage} {step}")
    return rng, torch.Generator().manual_seed(rng.getrandbits(60))


def half():
    """Matrix products and convolutions in bfloat16, weights and sums in float32: twice as fast where the CPU has it."""
    return torch.autocast("cpu", dtype=torch.bfloat16)


class Stage:
    """Iterates over the steps that are left, saves `parts` every two minutes and at the end, prints means of what is noted."""

    def __init__(self, work, name, steps, **parts):
        self.file, self.name, self.steps, self.parts = work / f"{name}.ckpt", name, steps, parts
        self.start, self.noted, self.began = 0, {}, time.time()
        if self.file.exists():
            saved = torch.load(self.file, weights_only=True)
            for key, part in parts.items():
                part.load_state_dict(saved[key])
            self.start = saved["step"]
            print(f"{name}: goes on at step {self.start}", flush=True)

    def __iter__(self):
        last = time.time()
        for step in range(self.start, self.steps):
            yield step
            if (step + 1) % 100 == 0:
                self.print(step + 1)
            if time.time() - last > CHECKPOINT_SECONDS or step + 1 == self.steps:
                self.save(step + 1)
                last = time.time()

    def note(self, **values):
        for key, value in values.items():
            self.noted.setdefault(key, []).append(float(value.detach() if torch.is_tensor(value) else value))

    def print(self, step):
        spent = time.time() - self.began
        left = spent / (step - self.start) * (self.steps - step)
        means = ", ".join(f"{key} {sum(v) / len(v):.4f}" for key, v in self.noted.items())
        print(f"{self.name}: step {step} of {self.steps}, {means}, {spent:.0f} s, {left:.0f} s left", flush=True)
        self.noted = {}

    def save(self, step):
        state = {key: part.state_dict() for key, part in self.parts.items()}
        torch.save({"step": step, **state}, self.file.with_suffix(".tmp"))
        os.replace(self.file.with_suffix(".tmp"), self.file)


def warm_then_fall(step, steps, warm, fall_from):
    """Factor of the learning rate: up over `warm` steps, 1, and down to 0 from the part `fall_from` of the steps on."""
    return min(1, (step + 1) / warm) * min(1, (1 - step / steps) / (1 - fall_from))
