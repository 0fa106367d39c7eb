"""The transformer: FLUX.1's own, 192 wide, two double and six single blocks, trained by flow matching.

    python tools/nano/flow.py WORK      # -> WORK/flow: transformer and text encoders, averaged over the steps

The latents of all drawings are computed once. The learning rate stays up to the half of the steps and falls to 0 then, so
`--steps` may be changed until the half is reached. The guidance input gets noise here; `distil.py` gives it its meaning.
"""

import copy

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import nn

from common import Stage, arguments, draws, half, warm_then_fall
from draw import draw, pack, velocity
from drawings import BACKGROUNDS, DRAWN, DRAWN_STYLES, NAMES, caption, drawn, plain, sheet
from muon import Muon
from text import WIDTH, TextEncoders
from vae import SCALE, SHIFT

WEIGHTS = [2, 1, 1, 1, 1]  # of the backgrounds: white is what most prompts mean
OTHER_STYLES = ["ink", "sketch", "line art", "icon", "sticker", "photo"]  # words without a look of their own, so that a LoRA can give them one
SHOWN = ["guitar", "red apple", "fox", "penguin", "hamburger", "rocket", "castle", "birthday cake", "bus", "owl", "sunflower", "cat"]


def new_transformer():
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=6,
        attention_head_dim=64,
        num_attention_heads=3,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(16, 24, 24),
    )
    for name, module in transformer.named_modules():  # blocks start as the identity, the output as zero
        if isinstance(module, nn.Linear) and (name.endswith(".linear") or name == "proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return transformer


@torch.no_grad()
def latents(work):
    """[drawn thing, style, background, tokens, 64], computed once."""
    file = work / "latents.pt"
    if not file.exists():
        vae = AutoencoderKL.from_pretrained(work / "vae")
        out = []
        for thing in DRAWN:
            pictures = torch.stack([drawn(work, thing, style, background) for style in DRAWN_STYLES for background in BACKGROUNDS])
            out.append(pack((vae.encode(pictures * 2 - 1).latent_dist.mode() - SHIFT) * SCALE))
        z = torch.stack(out).view(len(DRAWN), len(DRAWN_STYLES), len(BACKGROUNDS), -1, 64)
        torch.save(z, file)
        print(f"flow: latents {tuple(z.shape)}, mean {z.mean():.3f}, deviation {z.std():.3f}", flush=True)
    return torch.load(file)


def noise_levels(count, g):
    """Logit-normal, leaning to the noisy end, where the caption decides what is drawn."""
    return torch.sigmoid(0.4 + 1.2 * torch.randn(count, generator=g))


def choose(rng, count):
    """Random (drawn thing, style, background) indices."""
    return [(rng.randrange(len(DRAWN)), rng.randrange(len(DRAWN_STYLES)), rng.choices(range(len(BACKGROUNDS)), WEIGHTS)[0]) for _ in range(count)]


def describe(key, rng):
    """A caption of the (drawn thing, style, background); one in six names a style that could be any."""
    thing, style, background = key
    style = rng.choice(OTHER_STYLES) if rng.random() < 1 / 6 else DRAWN_STYLES[style]
    return caption(NAMES[DRAWN[thing]], style, list(BACKGROUNDS)[background], rng)


class Networks(nn.Module):
    """Transformer and text encoders: a new transformer with what `text.py` left in WORK, or those of `folder`."""

    def __init__(self, work, folder=None):
        super().__init__()
        self.encoders = TextEncoders(work, folder or work)
        self.transformer = FluxTransformer2DModel.from_pretrained(folder / "transformer") if folder else new_transformer()

    def save(self, folder):
        self.encoders.save(folder)
        self.transformer.save_pretrained(folder / "transformer")


def main():
    args = arguments(__doc__, steps=5600, batch=32, lr=1e-3, muon_lr=0.015, ema=0.998, look=500)
    z = latents(args.work)
    networks = Networks(args.work)
    average = copy.deepcopy(networks).requires_grad_(False)
    print(f"flow: transformer {sum(p.numel() for p in networks.transformer.parameters()) / 1e6:.2f} M weights, encoders {sum(p.numel() for p in networks.encoders.parameters()) / 1e6:.2f} M")
    matrices = [p for name, p in networks.transformer.named_parameters() if p.ndim == 2 and "blocks." in name and ".norm" not in name]
    others = [p for p in networks.parameters() if all(p is not m for m in matrices)]
    muon = Muon(matrices, lr=args.muon_lr)
    adam = torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.98), weight_decay=0, fused=True)
    stage = Stage(args.work, "flow", args.steps, networks=networks, average=average, adam=adam, muon=muon)
    vae = AutoencoderKL.from_pretrained(args.work / "vae")
    for step in stage:
        factor = warm_then_fall(step, args.steps, 100, 0.5)
        adam.param_groups[0]["lr"], muon.param_groups[0]["lr"] = args.lr * factor, args.muon_lr * factor
        rng, g = draws("flow", step)
        chosen = choose(rng, args.batch)
        captions = ["" if rng.random() < 0.1 else describe(key, rng) for key in chosen]
        x = torch.stack([z[key] for key in chosen])
        sigma, noise, guidance = noise_levels(len(x), g), torch.randn(x.shape, generator=g), 1 + 4 * torch.rand(len(x), generator=g)
        text = networks.encoders(captions)
        with half():
            v = velocity(networks.transformer, torch.lerp(x, noise, sigma.view(-1, 1, 1)), sigma, text, guidance)
        loss = ((v - (noise - x)) ** 2).mean()
        networks.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
        adam.step()
        muon.step()
        keep = min(args.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(networks.parameters()), 1 - keep)
        stage.note(loss=loss)
        if (step + 1) % args.look == 0 or step + 1 == args.steps:
            wanted = [plain(name, style, list(BACKGROUNDS)[(i + j) % 5]) for j, style in enumerate(DRAWN_STYLES) for i, name in enumerate(SHOWN)]
            with half():
                sheet(draw(average.transformer, average.encoders, vae, wanted, range(len(wanted)), cfg=2.0), len(SHOWN), args.work / "flow.png")
    average.save(args.work / "flow")


if __name__ == "__main__":
    main()
