"""Does it draw what was asked? Nearest-neighbour retrieval among all drawings, and sheets to look at.

    python tools/nano/check.py WORK --model models/flux-nano [--guidance 3.5] [--cfg 1.0]     # -> WORK/check.png, printed shares

Every thing that the transformer learnt is asked for once, in a random style on a random background. Found is what has the nearest drawing, as
16 x 16 pixels, among all 307 things in styles noto, flat and 3d on that background.
"""

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch.nn.functional import adaptive_avg_pool2d

from common import arguments, draws
from draw import draw
from drawings import BACKGROUNDS, DRAWN, DRAWN_STYLES, NAMES, STYLES, picture, plain, sheet
from text import TextEncoders


def small(pictures):
    return adaptive_avg_pool2d(torch.stack(pictures), 16).flatten(1)


def retrieval(work, pictures, wanted):
    """Shares of pictures whose nearest drawing is the (thing, style, background) wanted, and what else was found."""
    everything = [(t, s) for t in range(len(NAMES)) for s in STYLES]
    gallery = {b: small([picture(work, t, s, b) for t, s in everything]) for b in sorted({b for _, _, b in wanted})}
    found = [everything[(gallery[b] - p).norm(dim=1).argmin()] for p, (_, _, b) in zip(small(pictures), wanted)]
    thing = sum(f[0] == w[0] for f, w in zip(found, wanted)) / len(wanted)
    both = sum(f == w[:2] for f, w in zip(found, wanted)) / len(wanted)
    wrong = [f"{NAMES[w[0]]} -> {NAMES[f[0]]}" for f, w in zip(found, wanted) if f[0] != w[0]]
    return thing, both, wrong


def main():
    args = arguments(__doc__, model="models/flux-nano", vae="", guidance=3.5, cfg=1.0, steps=20, things=len(DRAWN), out="check.png")
    vae = AutoencoderKL.from_pretrained(args.vae or f"{args.model}/vae")
    transformer = FluxTransformer2DModel.from_pretrained(f"{args.model}/transformer").requires_grad_(False)
    encoders = TextEncoders(args.work, args.model).requires_grad_(False)
    rng, _ = draws("check", 0)
    wanted = [(t, rng.choice(DRAWN_STYLES), rng.choice(list(BACKGROUNDS))) for t in DRAWN]
    wanted = wanted[:: max(1, len(wanted) // args.things)]
    captions = [plain(NAMES[t], s, b) for t, s, b in wanted]
    pictures = draw(transformer, encoders, vae, captions, range(1000, 1000 + len(wanted)), args.guidance, args.cfg, args.steps)
    thing, both, wrong = retrieval(args.work, pictures, wanted)
    print(f"check: guidance {args.guidance}, cfg {args.cfg}, {len(wanted)} asked: thing found {thing:.1%}, thing and style {both:.1%}; wrong: {'; '.join(wrong)}")
    sheet(pictures, 18, args.work / args.out)


if __name__ == "__main__":
    main()
