"""The diffusers pipeline folder, in float16.

    python tools/nano/export.py WORK        # -> models/flux-nano
"""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline

from common import arguments
from draw import BASE_SHIFT, MAX_SHIFT
from flow import Networks


def main():
    args = arguments(__doc__, flow="distilled", vae="vae", out=Path("models/flux-nano"))
    networks = Networks(args.work, args.work / args.flow)
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, shift=3.0, base_shift=BASE_SHIFT, max_shift=MAX_SHIFT, base_image_seq_len=256, max_image_seq_len=4096
    )
    pipeline = FluxPipeline(
        scheduler=scheduler,
        vae=AutoencoderKL.from_pretrained(args.work / args.vae),
        text_encoder=networks.encoders.clip,
        tokenizer=networks.encoders.clip_tokenizer,
        text_encoder_2=networks.encoders.t5,
        tokenizer_2=networks.encoders.t5_tokenizer,
        transformer=networks.transformer,
    )
    pipeline.to(torch.float16).save_pretrained(args.out)
    for config in args.out.glob("*/config.json"):  # without the folder that the weights were read from
        kept = {key: value for key, value in json.loads(config.read_text()).items() if key != "_name_or_path"}
        config.write_text(json.dumps(kept, indent=2) + "\n")
    files = {str(f.relative_to(args.out)): f.stat().st_size for f in sorted(args.out.rglob("*")) if f.is_file()}
    for name, size in files.items():
        print(f"{size / 1e6:8.3f} MB  {name}")
    print(f"{sum(files.values()) / 1e6:8.3f} MB")


if __name__ == "__main__":
    main()
