"""Cases of kind `optimizer`: given gradients through each library's optimizer, with options that are not its defaults.

    python optimizers.py [OUT_DIR [CASE ...]]

Expected is computed in f64 where the library can; the tolerance is 20 times what f32 differs from it, of long
cases 3 times. AdamW with moments of 8 bits is
computed by bitsandbytes' own map and quantiser in f32. torch 2.8.0, prodigyopt 1.1.2, schedulefree 1.4.1, lion-pytorch 0.2.5,
bitsandbytes 0.50.2, CPU.
"""

import json
import math
import shutil
import sys
from pathlib import Path

import torch
from bitsandbytes.functional import create_dynamic_map
from lion_pytorch import Lion
from prodigyopt import Prodigy
from safetensors.torch import save_file
from schedulefree import AdamWScheduleFree

OUT = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent / "fixtures" / "parity"
METRIC = "per tensor ||a-b||_2 / ||b||_2, b = expected"
SHAPES = {"a": (6, 20), "b": (24, 3), "k": (4, 3, 3, 3), "m": (10,)}


class AdamW8bit(torch.optim.Optimizer):
    """bitsandbytes' `_optimizer_update_8bit_blockwise_cpu` with its default, compiler-free quantiser."""

    def __init__(self, params, lr, betas, eps, weight_decay, min_8bit_size):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, min_8bit_size=min_8bit_size))
        self.maps = [create_dynamic_map(signed=True), create_dynamic_map(signed=False)]

    @staticmethod
    def quantized(values, code, block=256):
        flat, parts = values.reshape(-1), []
        bounds = (code[:-1] + code[1:]) / 2
        for part in flat.split(block):
            absmax = part.abs().max()
            scaled = torch.clamp(part * (1.0 / absmax.clamp(min=1e-38)), -1, 1)
            parts.append(code[torch.bucketize(scaled, bounds)] * absmax)
        return torch.cat(parts).reshape(values.shape)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(step=0, moments=[torch.zeros_like(p), torch.zeros_like(p)])
                state["step"] += 1
                first, second = state["moments"]
                first.mul_(beta1).add_(p.grad, alpha=1.0 - beta1)
                second.mul_(beta2).addcmul_(p.grad, p.grad, value=1.0 - beta2)
                correction1 = 1.0 - beta1 ** state["step"]
                correction2 = math.sqrt(1.0 - beta2 ** state["step"])
                denominator = (second.sqrt() / correction2).add_(group["eps"])
                p.mul_(1.0 - lr * group["weight_decay"])
                p.addcdiv_(first, denominator, value=-lr / correction1)
                if p.numel() >= group["min_8bit_size"]:
                    state["moments"] = [self.quantized(m, code) for m, code in zip(state["moments"], self.maps)]


# case -> (optimizer, name, settings as case.json has them)
CASES = {
    "adam_amsgrad": (torch.optim.Adam, "adam", dict(betas=[0.8, 0.95], eps=1e-6, weight_decay=0.02, amsgrad=True)),
    "sgd_nesterov": (torch.optim.SGD, "sgd", dict(momentum=0.9, dampening=0.0, weight_decay=0.01, nesterov=True)),
    "sgd_dampened": (torch.optim.SGD, "sgd", dict(momentum=0.8, dampening=0.3, weight_decay=0.0, nesterov=False)),
    "lion_decayed": (Lion, "lion", dict(betas=[0.95, 0.98], weight_decay=0.1)),
    "adafactor_bounds": (
        torch.optim.Adafactor,
        "adafactor",
        dict(beta2_decay=-0.6, eps=[1e-6, 1e-2], d=1.2, weight_decay=0.1),
    ),
    "prodigy_options": (
        Prodigy,
        "prodigy",
        dict(betas=[0.9, 0.99], beta3=0.98, eps=1e-8, weight_decay=0.01, decouple=True, use_bias_correction=True,
             safeguard_warmup=True, d0=1e-5, d_coef=0.5, growth_rate=1.5, slice_p=3),
    ),
    "prodigy_coupled": (
        Prodigy,
        "prodigy",
        dict(betas=[0.9, 0.999], eps=1e-8, weight_decay=0.05, decouple=False, d0=1e-6, d_coef=2.0),
    ),
    "schedule_free_options": (
        AdamWScheduleFree,
        "schedule_free_adamw",
        dict(betas=[0.95, 0.99], eps=1e-8, weight_decay=0.01, warmup_steps=5, r=1.0, weight_lr_power=1.0),
    ),
    "adamw8bit": (
        AdamW8bit,
        "adamw8bit",
        dict(betas=[0.9, 0.999], eps=1e-8, weight_decay=0.01, min_8bit_size=64),
    ),
    # Betas that f32 holds badly, and time for it to show.
    "adamw_long": (torch.optim.AdamW, "adamw", dict(betas=[0.9, 0.9999], eps=1e-6, weight_decay=0.01)),
    "adam_long": (torch.optim.Adam, "adam", dict(betas=[0.5, 0.9], eps=1e-6, weight_decay=0.02)),
    "adamw_default_long": (torch.optim.AdamW, "adamw", dict(betas=[0.9, 0.999], eps=1e-6, weight_decay=0.01)),
    "lion_long": (Lion, "lion", dict(betas=[0.9, 0.9999], weight_decay=0.1)),
}
LONG_SHAPES = {"a": (6, 4), "m": (10,)}


def steps_of(case):
    return 200 if case.endswith("_long") else 30


def shown(steps):
    return (1, 2, 10, steps)

RATES = {"prodigy": 1.0, "lion": 1e-3, "schedule_free_adamw": 2.5e-3}


def run(cls, settings, rate, start, gradients, dtype, steps):
    params = {k: torch.nn.Parameter(v.to(dtype, copy=True)) for k, v in start.items()}
    optimizer = cls(list(params.values()), lr=rate, **settings)
    if hasattr(optimizer, "train"):
        optimizer.train()
    out = {}
    change = lambda: {k: (p.detach().double() - start[k].double()).float() for k, p in params.items()}  # noqa: E731
    for step in range(steps):
        for k, p in params.items():
            p.grad = gradients[k][step].to(dtype).clone()
        optimizer.step()
        if step + 1 in shown(steps):
            out |= {f"step{step + 1}.{k}": v for k, v in change().items()}
    if hasattr(optimizer, "eval"):
        optimizer.eval()
        out |= {f"eval.{k}": v for k, v in change().items()}
    return out


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def write(case, seed):
    cls, name, settings = CASES[case]
    g = torch.Generator().manual_seed(seed)
    steps = steps_of(case)
    shapes = dict(SHAPES if steps == 30 else LONG_SHAPES)
    if name == "adamw8bit":
        shapes = {"a": (30, 20), "b": (24, 3), "m": (10,)}  # two blocks and a part of one; one part; 32 bits
    start = {k: 0.3 * torch.randn(s, generator=g) for k, s in shapes.items()}
    aim = {k: torch.randn(s, generator=g) for k, s in shapes.items()}
    gradients = {k: 0.2 * aim[k] + 0.3 * torch.randn((steps, *s), generator=g) for k, s in shapes.items()}
    rate = RATES.get(name, 1e-2)
    single = run(cls, settings, rate, start, gradients, torch.float32, steps)
    if name == "adamw8bit":
        expected, difference = single, None
    else:
        expected = run(cls, settings, rate, start, gradients, torch.float64, steps)
        difference = max(relative(single[k], expected[k]) for k in expected)
    folder = OUT / f"optimizer_{case}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    inputs = {f"param.{k}": v for k, v in start.items()} | {f"grad.{k}": v for k, v in gradients.items()}
    save_file(inputs, folder / "inputs.safetensors")
    save_file({k: v.contiguous() for k, v in expected.items()}, folder / "expected.safetensors")
    tolerance = {"rel": 1e-4 if difference is None else (20 if steps == 30 else 3) * max(difference, 1e-7), "metric": METRIC}
    if difference is not None:
        tolerance["f32_vs_f64"] = difference
    case_json = {
        "kind": "optimizer",
        "name": f"optimizer_{case}",
        "description": f"{name} with options: change of the parameters since the start after steps {', '.join(map(str, shown(steps)))} of given gradients.",
        "tolerance": tolerance,
        "optimizer": {"name": name, "learning_rate": rate, **settings},
        "steps": steps,
    }
    (folder / "case.json").write_text(json.dumps(case_json, indent=1) + "\n")
    print(case, difference)


torch.set_num_threads(1)
for seed, case in enumerate(CASES):
    if case in (sys.argv[2:] or CASES):
        write(case, 900 + seed)
