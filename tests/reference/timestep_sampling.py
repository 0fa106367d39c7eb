"""Cases of kind `timestep_sampling`: from random draws to timesteps, sigmas and loss weights.

The steps of diffusers' train_dreambooth_lora_flux.py, whose functions are called here with the draws given.
torch 2.11.0, diffusers 0.38.0. Seeds 61 to 64.
"""

import math
from unittest import mock

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from common import case_folder, generator, write_case
from schedulers import DEV, STATIC

COUNT = 96
WEIGHTINGS = ["none", "sigma_sqrt", "cosmap"]


def given(raw):
    """torch.rand and torch.normal inside compute_density_for_timestep_sampling return what was drawn before."""
    return mock.patch.multiple(
        torch,
        rand=lambda size, **_: raw.clone(),
        normal=lambda mean, std, size, **_: mean + std * raw,
    )


def density(scheme, raw, settings):
    with given(raw):
        return compute_density_for_timestep_sampling(weighting_scheme=scheme, batch_size=len(raw), **settings)


def draw(scheme, settings, g):
    """Draws whose index does not hang on the last bit of u: float32 functions differ there between libraries."""
    fill = torch.randn if scheme == "logit_normal" else torch.rand
    raw = fill(4 * COUNT, generator=g)
    u = density(scheme, raw, settings) * 1000
    return raw[((u - u.round()).abs() > 2e-3) & (u < 1000)][:COUNT]


def exact(scheme, raw, settings):
    """u by the formula, in float64."""
    r = raw.double()
    if scheme == "logit_normal":
        return 1 / (1 + (-(settings["logit_mean"] + settings["logit_std"] * r)).exp())
    if scheme == "mode":
        return 1 - r - settings["mode_scale"] * ((math.pi * r / 2).cos() ** 2 - 1 + r)
    return r


def write(name, description, scheduler_config, schemes, seed):
    scheduler = FlowMatchEulerDiscreteScheduler(**scheduler_config)
    inputs, expected, g = {}, {}, generator(seed)
    for scheme, settings in schemes.items():
        raw = draw(scheme, settings, g)
        assert len(raw) == COUNT
        u = density(scheme, raw, settings)
        indices = (u * scheduler.config.num_train_timesteps).long()
        assert torch.equal(indices, (exact(scheme, raw, settings) * 1000).long())
        assert (u.double() - exact(scheme, raw, settings)).abs().max() < 3e-7
        timesteps = scheduler.timesteps[indices]
        # get_sigmas of the script: the position of each timestep in the table
        sigmas = scheduler.sigmas[[(scheduler.timesteps == t).nonzero().item() for t in timesteps]]
        inputs[f"{scheme}.raw"] = raw
        expected |= {f"{scheme}.u": u, f"{scheme}.indices": indices, f"{scheme}.timesteps": timesteps, f"{scheme}.sigmas": sigmas}
        for weighting in WEIGHTINGS:
            expected[f"{scheme}.weighting.{weighting}"] = compute_loss_weighting_for_sd3(weighting, sigmas=sigmas)
    folder = case_folder(name)
    scheduler.save_pretrained(folder / "scheduler")
    write_case(
        folder,
        "timestep_sampling",
        description,
        {"rel": 1e-6},
        inputs,
        expected,
        scheduler={"path": "scheduler"},
        schemes=schemes,
        weightings=WEIGHTINGS,
        notes="raw: uniform draws in [0, 1) for none and mode, standard normal draws for logit_normal. none: u = raw. "
        "logit_normal: u = sigmoid(logit_mean + logit_std * raw). mode: u = 1 - raw - mode_scale * (cos(pi raw / 2)^2 - 1 + raw). "
        "indices = trunc(u * 1000) in f32 into the training table, which descends: timesteps = train.timesteps[indices], "
        "sigmas = train.sigmas[indices], so a large u gives a small sigma. weighting.none = 1, weighting.sigma_sqrt = sigma^-2, "
        "weighting.cosmap = 2 / (pi (1 - 2 sigma + 2 sigma^2)).",
    )


if __name__ == "__main__":
    write(
        "timestep_sampling_dev",
        "FLUX.1-dev scheduler: the training table is not shifted. logit_normal with mean -0.4 and std 1.3, mode with scale 1.29.",
        DEV,
        {"none": {}, "logit_normal": {"logit_mean": -0.4, "logit_std": 1.3}, "mode": {"mode_scale": 1.29}},
        61,
    )
    write(
        "timestep_sampling_static_3",
        "Static shift 3.0: the training table is shifted. logit_normal with mean 0.8 and std 0.6, mode with scale 0.5.",
        STATIC,
        {"none": {}, "logit_normal": {"logit_mean": 0.8, "logit_std": 0.6}, "mode": {"mode_scale": 0.5}},
        63,
    )
