"""One training step of a LoRA in torch with PEFT: what `flux-lora bench step --torch PYTHON` times its own beside.

    python time_step.py CASE [--threads 2] [--steps 5] [--checkpoint]

CASE is a JSON object that the benchmark gives: `transformer` (the config of a FluxTransformer2DModel), `targets`, `rank`, `image_side` and
`text_tokens`. Weights and inputs are random, f32; the step is forward pass, mean squared error, backward pass, clipping, AdamW. The first step
is not counted.
"""

import argparse
import json
import os
import resource
import statistics
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig


def random_model(case):
    model = FluxTransformer2DModel(**case["transformer"])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.7 / parameter.shape[1] ** 0.5)
    model.requires_grad_(False)
    rank = case["rank"]
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=case["targets"], init_lora_weights="gaussian"))
    return model.train()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("case", type=json.loads)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--checkpoint", action="store_true", help="gradient checkpointing of every block")
    args = parser.parse_args()
    case, side = args.case, args.case["image_side"]
    torch.set_num_threads(args.threads)
    torch.manual_seed(1234)
    model = random_model(case)
    if args.checkpoint:
        model.enable_gradient_checkpointing()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=1e-2, eps=1e-8)

    config = model.config
    img_ids = torch.zeros(side, side, 3)
    img_ids[..., 1] += torch.arange(side)[:, None]
    img_ids[..., 2] += torch.arange(side)[None, :]
    latents, noise = torch.randn(2, 1, side * side, config.in_channels)
    inputs = {
        "hidden_states": 0.4 * latents + 0.6 * noise,
        "encoder_hidden_states": torch.randn(1, case["text_tokens"], config.joint_attention_dim),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim),
        "timestep": torch.full((1,), 0.6),
        "guidance": torch.full((1,), 3.5),
        "img_ids": img_ids.reshape(-1, 3),
        "txt_ids": torch.zeros(case["text_tokens"], 3),
        "return_dict": False,
    }

    def step():
        (velocity,) = model(**inputs)
        loss = ((velocity - (noise - latents)) ** 2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    losses = [step()]
    times, cpu = [], time.process_time()
    for _ in range(args.steps):
        started = time.perf_counter()
        losses.append(step())
        times.append(time.perf_counter() - started)
    cpu = (time.process_time() - cpu) / args.steps
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    base = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    print(
        f"torch {torch.__version__}, {args.threads} threads, {'checkpointing' if args.checkpoint else 'plain'}: "
        f"base {base / 1e6:.1f} M, LoRA {sum(parameter.numel() for parameter in trained) / 1e6:.2f} M; "
        f"step {statistics.median(times):.3f} s; CPU {cpu:.3f} s; peak RSS {peak} MiB; loss {losses[1]} -> {losses[-1]}"
    )


if __name__ == "__main__":
    main()
