"""Guidance distilled into the network, as in FLUX.1-dev: one pass at guidance g draws what two passes would.

    python tools/nano/distil.py WORK    # WORK/flow -> WORK/distilled

The teacher is true classifier-free guidance of 1 + STRENGTH (g - 1), g from 1 to 5, so that FLUX's usual 3.5 is the best.
"""

import torch
from torch import nn

from common import Stage, arguments, draws, half, warm_then_fall
from draw import velocity
from flow import Networks, choose, describe, latents, noise_levels

STRENGTH = 0.6  # 3.5 is a true guidance of 2.5


def main():
    args = arguments(__doc__, steps=500, batch=16, lr=3e-4)
    z = latents(args.work)
    teacher = Networks(args.work, args.work / "flow").requires_grad_(False)
    student = Networks(args.work, args.work / "flow")
    student.encoders.requires_grad_(False)
    optimizer = torch.optim.AdamW(student.transformer.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0, fused=True)
    stage = Stage(args.work, "distil", args.steps, student=student, optimizer=optimizer)
    for step in stage:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warm_then_fall(step, args.steps, 50, 0)
        rng, g = draws("distil", step)
        chosen = choose(rng, args.batch)
        captions = [describe(key, rng) for key in chosen]
        x = torch.stack([z[key] for key in chosen])
        n = len(x)
        sigma, guidance = noise_levels(n, g), 1 + 4 * torch.rand(n, generator=g)
        x = torch.lerp(x, torch.randn(x.shape, generator=g), sigma.view(-1, 1, 1))
        with torch.no_grad(), half():
            states, pooled = teacher.encoders(captions + [""] * n)
            v = velocity(teacher.transformer, x.repeat(2, 1, 1), sigma.repeat(2), (states, pooled), guidance.repeat(2))
            w = 1 + STRENGTH * (guidance.view(-1, 1, 1) - 1)
            target = v[n:] + w * (v[:n] - v[n:])
        with half():
            v = velocity(student.transformer, x, sigma, (states[:n], pooled[:n]), guidance)
        loss = ((v - target) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        stage.note(loss=loss)
    student.save(args.work / "distilled")


if __name__ == "__main__":
    main()
