"""Pictures from captions, as FLUX.1-dev's pipeline makes them: Euler steps over shifted noise levels, FLUX's own position ids."""

import math

import torch

from drawings import DRAWN_SIDE
from vae import SCALE, SHIFT

GRID = DRAWN_SIDE // 16  # tokens a side
BASE_SHIFT, MAX_SHIFT = 0.5, 1.15  # of FLUX.1-dev's scheduler, at 256 and 4096 tokens


def pack(z):
    """[batch, 16, height, width] latents to [batch, tokens, 64], 2 x 2 a token."""
    b, c, h, w = z.shape
    return z.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)


def unpack(x):
    b, _, c = x.shape
    return x.reshape(b, GRID, GRID, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, GRID * 2, GRID * 2)


def image_ids():
    """FLUX's: (0, row, column) of a token, counted from 0 whatever the size of the picture."""
    ids = torch.zeros(GRID, GRID, 3)
    ids[..., 1], ids[..., 2] = torch.arange(GRID)[:, None], torch.arange(GRID)[None]
    return ids.view(-1, 3)


def velocity(transformer, x, sigma, text, guidance):
    """What the transformer predicts for noisy tokens `x` [batch, tokens, 64] at noise levels `sigma` [batch]."""
    states, pooled = text
    return transformer(
        hidden_states=x, timestep=sigma, guidance=guidance, encoder_hidden_states=states, pooled_projections=pooled,
        txt_ids=torch.zeros(states.shape[1], 3), img_ids=image_ids(), return_dict=False,
    )[0].float()  # fmt: skip


def sigmas(steps):
    """From 1 to 0, shifted as FLUX.1-dev's scheduler does for so few tokens."""
    mu = BASE_SHIFT + (MAX_SHIFT - BASE_SHIFT) / (4096 - 256) * (GRID * GRID - 256)
    t = torch.linspace(1, 1 / steps, steps)
    return torch.cat([math.exp(mu) / (math.exp(mu) + 1 / t - 1), torch.zeros(1)])


@torch.no_grad()
def draw(transformer, encoders, vae, captions, seeds, guidance=1.0, cfg=1.0, steps=20, batch=32):
    """[3, DRAWN_SIDE, DRAWN_SIDE] pictures, 0 to 1; `guidance` goes into the network, `cfg` is true classifier-free guidance."""
    out = []
    for i in range(0, len(captions), batch):
        part = captions[i : i + batch]
        n = len(part)
        x = torch.stack([torch.randn(GRID * GRID, 64, generator=torch.Generator().manual_seed(seed)) for seed in seeds[i : i + batch]])
        states, pooled = encoders(part + [""] * (n if cfg != 1 else 0))
        levels = sigmas(steps)
        for now, then in zip(levels[:-1], levels[1:]):
            many = len(pooled)
            v = velocity(transformer, x.repeat(many // n, 1, 1), now.expand(many), (states, pooled), torch.full((many,), guidance))
            if cfg != 1:
                v = v[n:] + cfg * (v[:n] - v[n:])
            x = x + (then - now) * v
        out += list((vae.decode(unpack(x) / SCALE + SHIFT).sample / 2 + 0.5).clamp(0, 1))
    return out
