"""Every form that `flux-lora convert --to all` writes, in the program that reads it: the same picture to 1e-4.

    python written_forms.py FLUX_LORA_BINARY

Makes a transformer of FLUX.1-dev's width (3072; diffusers' kohya reader has that size built in) with one double and one
single block, and a LoRA with alpha unlike its rank. diffusers loads the diffusers and kohya forms, PEFT the folder, and
each must give the output of the adapter it came from. ComfyUI is not a package: its form is compared key by key with
what its loader accepts, and its deltas with the adapter's. torch 2.11.0, diffusers 0.38.0, peft 0.19.1.
"""

import copy
import logging
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import FluxPipeline
from peft import LoraConfig, PeftModel

from common import SCRIPT_TARGETS, generator, load_file, relative, run_transformer, save_adapter, tiny_transformer, transformer_inputs
from load_in_diffusers import load_strictly

WIDTH, MLP, RANK, ALPHA = 3072, 12288, 4, 6
TARGETS = [*SCRIPT_TARGETS, "proj_mlp", "single_transformer_blocks.0.proj_out", "norm1.linear", "norm.linear"]
TOLERANCE = 1e-4

# What ComfyUI's loader takes below `diffusion_model.`: module, shape [out, in], and the diffusers modules it stacks
COMFYUI = {
    "double_blocks.0.img_attn.qkv": (3 * WIDTH, WIDTH, ["attn.to_q", "attn.to_k", "attn.to_v"]),
    "double_blocks.0.txt_attn.qkv": (3 * WIDTH, WIDTH, ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]),
    "double_blocks.0.img_attn.proj": (WIDTH, WIDTH, ["attn.to_out.0"]),
    "double_blocks.0.txt_attn.proj": (WIDTH, WIDTH, ["attn.to_add_out"]),
    "double_blocks.0.img_mlp.0": (MLP, WIDTH, ["ff.net.0.proj"]),
    "double_blocks.0.img_mlp.2": (WIDTH, MLP, ["ff.net.2"]),
    "double_blocks.0.txt_mlp.0": (MLP, WIDTH, ["ff_context.net.0.proj"]),
    "double_blocks.0.txt_mlp.2": (WIDTH, MLP, ["ff_context.net.2"]),
    "double_blocks.0.img_mod.lin": (6 * WIDTH, WIDTH, ["norm1.linear"]),
    "single_blocks.0.linear1": (3 * WIDTH + MLP, WIDTH, ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]),
    "single_blocks.0.linear2": (WIDTH, WIDTH + MLP, ["proj_out"]),
    "single_blocks.0.modulation.lin": (3 * WIDTH, WIDTH, ["norm.linear"]),
}


def adapted(base):
    transformer = copy.deepcopy(base)
    transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, init_lora_weights="gaussian", target_modules=TARGETS))
    g = generator(303)
    with torch.no_grad():
        for name, p in sorted(transformer.named_parameters()):
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=g) * 0.1)
    return transformer


def in_diffusers(base, file):
    transformer = copy.deepcopy(base)
    load_strictly(FluxPipeline(None, None, None, None, None, None, transformer), file)
    return transformer


def check_comfyui(file, lora):
    """Exactly the keys and shapes that ComfyUI takes, and the deltas of the diffusers file."""
    tensors = load_file(file)
    worst = 0.0
    for module, (out, inputs, parts) in COMFYUI.items():
        key = f"diffusion_model.{module}"
        down, up, alpha = (tensors.pop(key + s) for s in (".lora_down.weight", ".lora_up.weight", ".alpha"))
        assert (up.shape[0], down.shape[1]) == (out, inputs) and up.shape[1] == down.shape[0], (key, up.shape, down.shape)
        assert alpha.shape == () and alpha.is_floating_point(), (key, alpha)
        block = "transformer.single_transformer_blocks.0." if module.startswith("single") else "transformer.transformer_blocks.0."
        a, b = ([lora[f"{block}{p}.lora_{x}.weight"] for p in parts] for x in "AB")
        expected = torch.cat([ALPHA / RANK * (b @ a) for a, b in zip(a, b)])
        worst = max(worst, relative(alpha.item() / down.shape[0] * (up @ down), expected))
    assert not tensors, f"keys that ComfyUI does not know: {sorted(tensors)}"
    return worst


def main(program):
    logging.disable(logging.INFO)
    torch.set_num_threads(2)
    base = tiny_transformer(301, num_layers=1, num_single_layers=1, guidance_embeds=True).eval()
    inputs = transformer_inputs(base.config, 302, rows=3, cols=4, text_len=6, batch=1)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        folder = Path(folder)
        transformer = adapted(base)
        save_adapter(transformer, folder / "lora.safetensors")
        expected, untouched = run_transformer(transformer, inputs), run_transformer(base, inputs)
        del transformer
        subprocess.run([program, "convert", folder / "lora.safetensors", folder / "out.safetensors", "--to", "all"], check=True)
        readers = {
            "diffusers": lambda: in_diffusers(base, folder / "out-diffusers.safetensors"),
            "kohya": lambda: in_diffusers(base, folder / "out-kohya.safetensors"),
            "peft": lambda: PeftModel.from_pretrained(copy.deepcopy(base), str(folder / "out-peft")).base_model.model,
        }
        errors = {name: relative(run_transformer(read(), inputs), expected) for name, read in readers.items()}
        errors["comfyui (deltas)"] = check_comfyui(folder / "out-comfyui.safetensors", load_file(folder / "lora.safetensors"))
    print(f"the LoRA moves the output by {relative(expected, untouched):.3f}")
    for name, error in errors.items():
        print(f"{name:18s} {error:.3e} {'ok' if error < TOLERANCE else 'FAIL'}")
    sys.exit(max(errors.values()) >= TOLERANCE)


if __name__ == "__main__":
    main(sys.argv[1])
