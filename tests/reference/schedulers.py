"""Cases of kind `scheduler`: dynamic shifting (FLUX.1-dev) and a static shift of 3.

torch 2.11.0, diffusers 0.38.0. Seeds 51, 52.
"""

import copy

import numpy
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from common import case_folder, generator, write_case

DEV = dict(
    num_train_timesteps=1000,
    shift=3.0,
    use_dynamic_shifting=True,
    base_shift=0.5,
    max_shift=1.15,
    base_image_seq_len=256,
    max_image_seq_len=4096,
)
STATIC = {**DEV, "use_dynamic_shifting": False}


def run_scheduler(scheduler, runs, seed):
    """Every run as FluxPipeline does it, and the table that training uses."""
    config, g = scheduler.config, generator(seed)
    inputs, expected, described = {}, {}, []
    for i, (height, width, steps) in enumerate(runs):
        tokens = (height // 16) * (width // 16)
        mu = calculate_shift(tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
        sample, velocity = torch.randn(2, 1, 7, 12, generator=g)
        inputs |= {f"run{i}.sample": sample, f"run{i}.model_output": velocity}
        s = copy.deepcopy(scheduler)
        s.set_timesteps(sigmas=numpy.linspace(1.0, 1 / steps, steps), mu=mu)
        expected |= {f"run{i}.timesteps": s.timesteps, f"run{i}.sigmas": s.sigmas}
        for name, t in ("step0", s.timesteps[0]), ("step_last", s.timesteps[-1]):
            s._step_index = None
            expected[f"run{i}.{name}"] = s.step(velocity, t, sample, return_dict=False)[0]
        described.append(
            {
                "height": height,
                "width": width,
                "image_seq_len": tokens,
                "num_inference_steps": steps,
                "mu": float(f"{mu:.8g}"),
                "mu_used": bool(config.use_dynamic_shifting),
            }
        )
    expected |= {"train.timesteps": scheduler.timesteps, "train.sigmas": scheduler.sigmas}
    return inputs, expected, described


def in_float64(scheduler, described):
    """The same sigmas from the formulas alone."""
    for i, run in enumerate(described):
        n, c = run["num_inference_steps"], scheduler.config
        t = torch.linspace(1, 1 / n, n, dtype=torch.float64)
        if c.use_dynamic_shifting:
            slope = (c.max_shift - c.base_shift) / (c.max_image_seq_len - c.base_image_seq_len)
            e = torch.tensor(c.base_shift + (run["image_seq_len"] - c.base_image_seq_len) * slope, dtype=torch.float64).exp()
            sigmas = e / (e + 1 / t - 1)
        else:
            sigmas = c.shift * t / (1 + (c.shift - 1) * t)
        yield f"run{i}.sigmas", torch.cat([sigmas, sigmas.new_zeros(1)])


def write(name, description, config, seed):
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    runs = [(1024, 1024, 28), (512, 768, 4), (320, 256, 7), (1536, 2048, 1), (256, 256, 3)]
    inputs, expected, described = run_scheduler(scheduler, runs, seed)
    folder = case_folder(name)
    scheduler.save_pretrained(folder / "scheduler")
    for tensor, exact in in_float64(scheduler, described):
        assert (expected[tensor].double() - exact).norm() / exact.norm() < 2e-7, tensor
    write_case(
        folder,
        "scheduler",
        description,
        {"rel": 1e-6},
        inputs,
        expected,
        scheduler={"path": "scheduler"},
        runs=described,
        notes="sigmas has num_inference_steps + 1 entries (terminal 0); timesteps = 1000 * sigmas[:-1] (not rounded). "
        "Input sigmas = linspace(1, 1/N, N) in f64, cast to f32 before the shift. step: x + (sigma_next - sigma) * v in f32; "
        "step0 and step_last both start from runI.sample. train.*: 1000 entries, descending, never dynamically shifted; only "
        "statically shifted when use_dynamic_shifting is false.",
    )


if __name__ == "__main__":
    write(
        "scheduler_dev",
        "FLUX.1-dev scheduler config: dynamic shifting from the number of image tokens, also outside 256..4096; `shift` is unused.",
        DEV,
        51,
    )
    write("scheduler_static_3", "Static shift 3.0 and no dynamic shifting: training table and inference sigmas are shifted.", STATIC, 52)
