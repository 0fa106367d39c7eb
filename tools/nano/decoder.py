"""The autoencoder's decoder alone, on the latents that stay as they are; can run while `flow.py` does.

    python tools/nano/decoder.py WORK       # WORK/vae -> WORK/vae_sharp, WORK/vae_sharp.png

The latents get a little noise, as those that the transformer makes have.
"""

import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.nn.functional import interpolate

from common import Stage, arguments, draws, warm_then_fall
from drawings import DRAWN_SIDE, SIDE
from vae import SCALE, crops, rebuilding_loss, show


def main():
    args = arguments(__doc__, steps=1200, batch=4, lr=1.5e-3, noise=0.05)
    vae = AutoencoderKL.from_pretrained(args.work / "vae").to(memory_format=torch.channels_last)
    vae.encoder.requires_grad_(False)
    optimizer = torch.optim.AdamW(vae.decoder.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0, fused=True)
    stage = Stage(args.work, "decoder", args.steps, vae=vae, optimizer=optimizer)
    for step in stage:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warm_then_fall(step, args.steps, 50, 0.3)
        rng, g = draws("decoder", step)
        x = crops(args.work, rng, args.batch, SIDE)
        if step % 4 != 0:
            x = interpolate(x, size=DRAWN_SIDE, mode="bilinear", antialias=True)
        with torch.no_grad():
            z = vae.encode(x).latent_dist.mode()
        loss, l1 = rebuilding_loss(vae.decode(z + args.noise * torch.randn(z.shape, generator=g) / SCALE).sample, x, True)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.decoder.parameters(), 1.0)
        optimizer.step()
        stage.note(l1=l1)
    vae.eval().requires_grad_(False)
    vae.save_pretrained(args.work / "vae_sharp")
    show(vae, args.work, args.work / "vae_sharp.png")


if __name__ == "__main__":
    main()
