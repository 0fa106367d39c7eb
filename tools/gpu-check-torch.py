"""One training step of the model of `flux-lora bench step`, in torch and PEFT: what `gpu-check.sh` puts beside ours.

    python gpu-check-torch.py [--variant f32|f32-checkpointing|bf16|bf16-checkpointing] [--model baseline|dev] [--steps N] [--device cuda]

FLUX.1's blocks written in plain torch, random weights, a LoRA of rank 16 by PEFT on the layers that ours adapts, AdamW with
clipping. `baseline` has 3 double-stream and 6 single-stream blocks of width 768, 12 heads, 256 image and 128 text tokens; `dev`
has the dimensions of FLUX.1-dev, a picture of 512 pixels and 512 text tokens. Attention is `scaled_dot_product_attention`; f32
has TF32 off; in bf16 the adapter stays f32 under autocast. Nothing is compiled ahead.
"""

import argparse
import math
import statistics
import time

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils.checkpoint import checkpoint

CHANNELS = 64
# Width, heads, axes of positions, double- and single-stream blocks, image tokens along a side, text tokens and their width.
MODELS = {
    "baseline": (768, 12, (16, 24, 24), (3, 6), 16, 128, 1024),
    "dev": (3072, 24, (16, 56, 56), (19, 38), 32, 512, 4096),
}


def norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def rotary(ids):
    """Angles of [tokens, 3] positions, as cosines and sines of [tokens, head width]."""
    angles = [ids[:, i, None] / 10000 ** (torch.arange(0, n, 2, device=ids.device) / n) for i, n in enumerate(AXES)]
    angles = torch.cat(angles, -1).repeat_interleave(2, -1)
    return angles.cos(), angles.sin()


def rotate(x, rope):
    cos, sin = rope
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def heads(x, weight=None):
    x = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    return x if weight is None else F.rms_norm(x, x.shape[-1:], weight, eps=1e-6)


def attend(q, k, v, rope):
    x = F.scaled_dot_product_attention(rotate(q, rope), rotate(k, rope), v)
    return x.transpose(1, 2).flatten(-2)


class Stream(nn.Module):
    """One of the two streams of a double block."""

    def __init__(self):
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm_q, self.norm_k = (nn.Parameter(torch.ones(WIDTH // HEADS)) for _ in range(2))
        self.ff_in, self.ff_out = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def start(self, x, vec):
        self.parts = self.modulation(F.silu(vec))[:, None].chunk(6, -1)
        shift, scale = self.parts[:2]
        x = norm(x) * (1 + scale) + shift
        return heads(self.to_q(x), self.norm_q), heads(self.to_k(x), self.norm_k), heads(self.to_v(x))

    def end(self, x, attention):
        _, _, gate, shift, scale, gate_ff = self.parts
        self.parts = None
        x = x + gate * self.to_out(attention)
        y = norm(x) * (1 + scale) + shift
        return x + gate_ff * self.ff_out(F.gelu(self.ff_in(y), approximate="tanh"))


class Double(nn.Module):
    def __init__(self):
        super().__init__()
        self.img, self.txt = Stream(), Stream()

    def forward(self, img, txt, vec, rope):
        of_txt, of_img = self.txt.start(txt, vec), self.img.start(img, vec)
        joint = attend(*(torch.cat(pair, 2) for pair in zip(of_txt, of_img)), rope)
        return self.img.end(img, joint[:, TEXT:]), self.txt.end(txt, joint[:, :TEXT])


class Single(nn.Module):
    def __init__(self):
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 3 * WIDTH)
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm_q, self.norm_k = (nn.Parameter(torch.ones(WIDTH // HEADS)) for _ in range(2))
        self.proj_mlp, self.proj_out = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(5 * WIDTH, WIDTH)

    def forward(self, x, vec, rope):
        shift, scale, gate = self.modulation(F.silu(vec))[:, None].chunk(3, -1)
        y = norm(x) * (1 + scale) + shift
        joint = attend(heads(self.to_q(y), self.norm_q), heads(self.to_k(y), self.norm_k), heads(self.to_v(y)), rope)
        return x + gate * self.proj_out(torch.cat([joint, F.gelu(self.proj_mlp(y), approximate="tanh")], -1))


class Embedder(nn.Sequential):
    def __init__(self, width):
        super().__init__(nn.Linear(width, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))


def waves(t):
    angles = 1000 * t[:, None] * torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
    return torch.cat([angles.cos(), angles.sin()], -1)


class Flux(nn.Module):
    def __init__(self):
        super().__init__()
        self.x_in, self.text_in = nn.Linear(CHANNELS, WIDTH), nn.Linear(TEXT_WIDTH, WIDTH)
        self.time, self.guidance, self.pooled = Embedder(256), Embedder(256), Embedder(768)
        self.double_blocks = nn.ModuleList(Double() for _ in range(BLOCKS[0]))
        self.single_blocks = nn.ModuleList(Single() for _ in range(BLOCKS[1]))
        self.last_modulation, self.x_out = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, CHANNELS)

    def forward(self, x, text, pooled, t, guidance, rope, again):
        run = (lambda f, *args: checkpoint(f, *args, use_reentrant=False)) if again else (lambda f, *args: f(*args))
        vec = self.time(waves(t)) + self.guidance(waves(guidance)) + self.pooled(pooled)
        img, txt = self.x_in(x), self.text_in(text)
        for block in self.double_blocks:
            img, txt = run(block, img, txt, vec, rope)
        x = torch.cat([txt, img], 1)
        for block in self.single_blocks:
            x = run(block, x, vec, rope)
        scale, shift = self.last_modulation(F.silu(vec))[:, None].chunk(2, -1)
        return self.x_out(norm(x[:, TEXT:]) * (1 + scale) + shift)


TARGETS = r"double_blocks\..*\.(to_q|to_k|to_v|to_out|ff_in|ff_out)|single_blocks\..*\.(to_q|to_k|to_v|proj_mlp)"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--variant", choices=["f32", "f32-checkpointing", "bf16", "bf16-checkpointing"], default="f32")
    parser.add_argument("--model", choices=list(MODELS), default="baseline")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    global WIDTH, HEADS, AXES, BLOCKS, SIDE, TEXT, TEXT_WIDTH
    WIDTH, HEADS, AXES, BLOCKS, SIDE, TEXT, TEXT_WIDTH = MODELS[args.model]
    device, halves = torch.device(args.device), args.variant.startswith("bf16")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(1234)
    with device:
        torch.set_default_dtype(torch.bfloat16 if halves else torch.float32)  # 24 GB rather than 48 GB for dev
        model = Flux()
        torch.set_default_dtype(torch.float32)
        for p in model.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.7 / p.shape[1] ** 0.5)
        model.requires_grad_(False)
        lora = LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS, init_lora_weights="gaussian")
        model = inject_adapter_in_model(lora, model).to(device)
        trained = [p for p in model.parameters() if p.requires_grad]
        for p in trained:
            p.data = p.data.float()
        optimizer = torch.optim.AdamW(trained, lr=1e-4, eps=1e-8, weight_decay=1e-2)
        latents, noise = (torch.randn(1, SIDE * SIDE, CHANNELS) for _ in range(2))
        text, pooled = torch.randn(1, TEXT, TEXT_WIDTH), torch.randn(1, 768)
        grid = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)).float()
        ids = torch.cat([torch.zeros(TEXT, 3), torch.cat([torch.zeros(SIDE * SIDE, 1), grid], 1)])
        t, guidance = torch.tensor([0.6]), torch.tensor([3.5])
        rope = rotary(ids)
    inputs = (0.4 * latents + 0.6 * noise, text, pooled, t, guidance, rope)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=halves):
            velocity = model(*inputs, again=args.variant.endswith("checkpointing"))
        loss = (velocity.float() - (noise - latents)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    losses, times = [step()], []
    for _ in range(args.steps):
        started = time.perf_counter()
        losses.append(step())
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    memory = f"; allocated {torch.cuda.max_memory_allocated() >> 20} MiB" if device.type == "cuda" else ""
    count = sum(p.numel() for p in trained)
    base = sum(p.numel() for p in model.parameters()) - count
    print(
        f"torch {torch.__version__} {args.model}, {args.variant}: base {base / 1e6:.1f} M, LoRA {count / 1e6:.2f} M; "
        f"step {statistics.median(times):.4f} s (min {min(times):.4f}){memory}; loss {losses[1]:.4f} -> {losses[-1]:.4f}"
    )


if __name__ == "__main__":
    main()
