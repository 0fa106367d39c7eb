"""Makes the LoRA that diffusers' train_dreambooth_lora_flux.py would save for a model, so that another trainer can continue it.

    python make_lora.py MODEL_DIR OUT_DIR [--rank 4] [--alpha 6] [--seed 91] [--new]

MODEL_DIR is a pipeline folder. OUT_DIR/pytorch_lora_weights.safetensors has the script's targets, keys and metadata.
A is drawn as the script draws it (normal, std 1/rank); B is random instead of zero, as after some training, unless
--new is given. torch 2.11.0, diffusers 0.38.0, peft 0.19.1.
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig

from common import SCRIPT_TARGETS, FluxTransformer2DModel, generator, save_adapter


def make(model_dir, out_dir, rank=4, alpha=6, seed=91, new=False):
    transformer = FluxTransformer2DModel.from_pretrained(model_dir, subfolder="transformer", torch_dtype=torch.float32)
    transformer.requires_grad_(False)
    transformer.add_adapter(
        LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, init_lora_weights="gaussian", target_modules=SCRIPT_TARGETS)
    )
    g = generator(seed)
    with torch.no_grad():
        for name, p in sorted(transformer.named_parameters()):
            if "lora_A" in name:
                p.copy_(torch.randn(p.shape, generator=g) / rank)
            elif "lora_B" in name and not new:
                p.copy_(torch.randn(p.shape, generator=g) * 0.1)
    path = Path(out_dir) / "pytorch_lora_weights.safetensors"
    save_adapter(transformer, path)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir")
    parser.add_argument("out_dir")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--alpha", type=float, default=6)
    parser.add_argument("--seed", type=int, default=91)
    parser.add_argument("--new", action="store_true", help="leave B at zero, as at the start of training")
    print(make(**vars(parser.parse_args())))
