"""The autoencoder: AutoencoderKL, 8 x smaller, 16 channels, about a million weights.

    python tools/nano/vae.py WORK       # -> WORK/vae, WORK/vae.png

What made so small a one sharp: two norm groups, a start that keeps the signal's size, L1 with squares, edges once colours
are right, small crops first. At the end the latents are scaled, inside the network's own weights, to what FLUX's constants
turn into mean 0 and deviation 1. From then on they stay as they are: `flow.py` learns them, `decoder.py` sharpens what
they are turned into. In float32: bfloat16 convolutions are slower backwards.
"""

import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.nn import functional as F

from common import Stage, arguments, draws, warm_then_fall
from drawings import BACKGROUNDS, INK, NAMES, SIDE, STYLES, picture, sheet

SCALE, SHIFT = 0.3611, 0.1159  # FLUX.1's `scaling_factor` and `shift_factor`


def new_vae():
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=2,
        sample_size=SIDE,
        scaling_factor=SCALE,
        shift_factor=SHIFT,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    for name, module in vae.named_modules():  # torch's own start shrinks the signal at every layer
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
            if name.endswith("conv2"):
                module.weight.data.mul_(0.1)
    nn.init.constant_(vae.encoder.conv_out.bias[16:], -7.0)  # log variance: with much noise nothing is learnt for minutes
    return vae.to(memory_format=torch.channels_last)


def crops(work, rng, count, side):
    """Drawings on any background, cropped; some recoloured, some black and white, so that other styles can be coded too. -1 to 1."""
    out = []
    for _ in range(count):
        background = rng.choice(list(BACKGROUNDS)) if rng.random() < 0.7 else f"#{rng.randrange(1 << 24):06x}"
        x = picture(work, rng.randrange(len(NAMES)), rng.choice(STYLES), background)
        top, left = (rng.randrange(0, SIDE - side + 1) for _ in range(2))
        x = x[:, top : top + side, left : left + side]
        way = rng.random()
        if way < 0.15:
            x = x[rng.sample(range(3), 3)]
        elif way < 0.2:
            x = 1 - x
        elif way < 0.3:
            x = ((x.mean(0, keepdim=True) - rng.uniform(0.3, 0.8)) * 20 + 0.5).clamp(0, 1).expand(3, -1, -1)
        out.append(x.flip(-1) if rng.random() < 0.5 else x)
    return torch.stack(out).contiguous(memory_format=torch.channels_last) * 2 - 1


def edges(x):
    kernel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]]) / 4
    return F.conv2d(x.flatten(0, 1).unsqueeze(1), torch.stack([kernel, kernel.T]).unsqueeze(1))


def rebuilding_loss(y, x, with_edges):
    """Of pictures `y` for `x`; and the mean absolute error, 0 to 1."""
    l1 = (y - x).abs().mean()
    sharp = 0.25 * (edges(y) - edges(x)).abs().mean() if with_edges else 0
    return l1 + ((y - x) ** 2).mean() + sharp, l1.detach() / 2


@torch.no_grad()
def fold(vae, work):
    """Rescales each latent channel inside the weights, so that (z - SHIFT) * SCALE has mean 0 and deviation 1."""
    rng, _ = draws("fold", 0)
    whole = [picture(work, rng.randrange(len(NAMES)), rng.choice(STYLES), rng.choice(list(BACKGROUNDS))) for _ in range(256)]
    z = torch.cat([vae.encode(torch.stack(whole[i : i + 8]) * 2 - 1).latent_dist.mode() for i in range(0, 256, 8)])
    mean, deviation = z.mean((0, 2, 3)), z.std((0, 2, 3))
    a = 1 / (deviation * SCALE)
    b = SHIFT - mean * a
    out, into = vae.encoder.conv_out, vae.decoder.conv_in
    out.weight[:16] *= a.view(-1, 1, 1, 1)
    out.bias[:16] = out.bias[:16] * a + b
    out.bias[16:] += 2 * a.log()
    into.weight /= a.view(1, -1, 1, 1)
    into.bias -= (into.weight.sum((2, 3)) * b).sum(1)
    print("vae: deviation of the channels was", [round(v, 2) for v in deviation.tolist()], flush=True)


@torch.no_grad()
def error(vae, work, style):
    """Mean absolute error, 0 to 1, on whole pictures."""
    x = torch.stack([picture(work, i, style, list(BACKGROUNDS)[i % 5]) for i in range(3, len(NAMES), 13)])
    y = vae.decode(vae.encode(x * 2 - 1).latent_dist.mode()).sample / 2 + 0.5
    return round((y.clamp(0, 1) - x).abs().mean().item(), 4)


def show(vae, work, path):
    """Prints the errors and writes pictures, each with what the autoencoder makes of it below."""
    print("vae: error on whole pictures, 0 to 1:", {style: error(vae, work, style) for style in STYLES + [INK]}, "(ink was never seen)", flush=True)
    shown = [picture(work, i, style, list(BACKGROUNDS)[i % 5]) for i in range(10, 250, 20) for style in (STYLES[i % 3], INK)]
    with torch.no_grad():
        again = [vae.decode(vae.encode(x[None] * 2 - 1).latent_dist.mode()).sample[0] / 2 + 0.5 for x in shown]
    sheet([p for i in range(0, 24, 12) for p in shown[i : i + 12] + again[i : i + 12]], 12, path)


def main():
    args = arguments(__doc__, steps=2600, batch=8, lr=2e-3)
    vae = new_vae()
    print(f"vae: {sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M weights")
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=1e-4, fused=True)
    stage = Stage(args.work, "vae", args.steps, vae=vae, optimizer=optimizer)
    for step in stage:
        part = step / args.steps
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warm_then_fall(step, args.steps, 50, 0.6)
        rng, g = draws("vae", step)
        whole = part >= 0.4 and step % 4 == 3  # the middle block attends over the picture, so it must see whole ones too
        x = crops(args.work, rng, args.batch // 4 if whole else args.batch, SIDE if whole else 32 if part < 0.4 else 64)
        mean, log_variance = vae.encoder(x).chunk(2, 1)
        log_variance = log_variance.clamp(-30, 20)
        kl = 1e-4 * (mean**2 + log_variance.exp() - 1 - log_variance).mean() / 2
        y = vae.decode(mean + (log_variance / 2).exp() * torch.randn(mean.shape, generator=g)).sample
        loss, l1 = rebuilding_loss(y, x, part > 0.3)
        optimizer.zero_grad()
        (loss + kl).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        stage.note(l1=l1)
    vae.eval().requires_grad_(False)
    fold(vae, args.work)
    vae.save_pretrained(args.work / "vae")
    show(vae, args.work, args.work / "vae.png")


if __name__ == "__main__":
    main()
