"""What an image costs in diffusers: the parts that `flux-lora bench sample` times, of the same pipeline folder.

    python time_sampling.py MODEL_DIR [--size 256] [--tokens 128] [--steps 4] [--rounds 3]

Loading is not counted, and each part runs once before it is timed; seconds are medians, f32, OMP_NUM_THREADS says how many threads.
"""

import argparse
import os
import resource
import statistics
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from diffusers import FluxPipeline

CAPTION = "a photograph of a red fox in deep snow, soft light"


def timed(rounds, run):
    run()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    pipe = FluxPipeline.from_pretrained(args.model, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        prompt = lambda: pipe.encode_prompt(CAPTION, CAPTION, max_sequence_length=args.tokens)
        caption = timed(args.rounds, prompt)
        embeds, pooled, _ = prompt()
        denoise = lambda steps: pipe(
            prompt_embeds=embeds, pooled_prompt_embeds=pooled, height=args.size, width=args.size, num_inference_steps=steps, output_type="latent"
        ).images
        step = timed(args.rounds, lambda: denoise(args.steps)) / args.steps
        latents = pipe._unpack_latents(denoise(1), args.size, args.size, pipe.vae_scale_factor)
        decoding = timed(args.rounds, lambda: pipe.vae.decode(latents))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    image = caption + args.steps * step + decoding
    print(
        f"diffusers, {args.size} px, {args.tokens} tokens: caption {caption:.3f} s, step {step:.3f} s, decoding {decoding:.3f} s; "
        f"an image of {args.steps} steps {image:.3f} s; peak RSS {peak} MiB"
    )


if __name__ == "__main__":
    main()
