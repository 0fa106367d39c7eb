"""Gradients of LoRA factors in CLIP, T5 and the transformer together, through the tiny FLUX.1 pipeline of the reference cases.

    python text_encoder_training.py

Writes ../fixtures/text_encoder_training/{init,expected}.safetensors: an adapter of all three networks as diffusers packs it, and
inputs, loss and the gradient of every factor in float64. torch 2.8.0, diffusers 0.38.0, peft 0.19.1, transformers 4.57.6.
"""

import json

import torch
from diffusers import FluxPipeline
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast

from common import PARITY, float64, generator, image_ids, save_file

OUT = PARITY.parent / "text_encoder_training"
PROMPTS, TOKENS, GRID = ["a photo of pattern 0", ""], 16, (8, 6)
ADAPTERS = {
    "transformer": (2, 2, ["attn.to_q", "ff.net.2", "proj_mlp"]),
    "text_encoder": (3, 5, ["q_proj", "k_proj", "v_proj", "out_proj"]),
    "text_encoder_2": (2, 4, ["q", "k", "v", "o", "wi_0"]),
}


def key(component, name):
    return f"{component}.{name.replace('.default', '').removeprefix('base_model.model.')}"


MODEL = PARITY / "pipeline_dev" / "model"
fast = PreTrainedTokenizerFast(tokenizer_file=str(MODEL / "tokenizer_2" / "tokenizer.json"), pad_token="<pad>", eos_token="</s>")
pipe = FluxPipeline.from_pretrained(MODEL, tokenizer_2=fast, torch_dtype=torch.float32)
g, init, fields = generator(401), {}, {}
for component, (rank, alpha, targets) in ADAPTERS.items():
    network = getattr(pipe, component).eval().requires_grad_(False)
    network.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))
    fields |= {f"{component}.r": rank, f"{component}.lora_alpha": alpha, f"{component}.target_modules": targets}
    with torch.no_grad():
        for name, p in sorted(network.named_parameters()):
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=g) * 0.2)
                init[key(component, name)] = p.clone()
height, width = GRID
draw = lambda: FluxPipeline._pack_latents(torch.randn(2, 16, *GRID, generator=g), 2, 16, *GRID)  # noqa: E731
inputs = {"tokens": draw(), "target": draw(), "sigma": torch.tensor([0.3, 0.8]), "guidance": torch.tensor([3.5, 1.0])}

with float64():
    for component in ADAPTERS:
        getattr(pipe, component).double()
    sequence = pipe._get_t5_prompt_embeds(PROMPTS, max_sequence_length=TOKENS)
    pooled = pipe._get_clip_prompt_embeds(PROMPTS)
    prediction = pipe.transformer(
        hidden_states=inputs["tokens"].double(),
        timestep=inputs["sigma"].double(),
        guidance=inputs["guidance"].double(),
        pooled_projections=pooled,
        encoder_hidden_states=sequence,
        txt_ids=torch.zeros(TOKENS, 3).double(),
        img_ids=image_ids(height // 2, width // 2).double(),
        return_dict=False,
    )[0]
    loss = (prediction - inputs["target"].double()).pow(2).mean()
    loss.backward()

expected = {"loss": loss.detach().reshape(1), "sequence": sequence.detach(), "pooled": pooled.detach()}
for component in ADAPTERS:
    for name, p in getattr(pipe, component).named_parameters():
        if p.requires_grad:
            assert p.grad.abs().max() > 0, name
            expected[f"grad.{key(component, name)}"] = p.grad
OUT.mkdir(exist_ok=True)
save_file(init, OUT / "init.safetensors", {"format": "pt", "lora_adapter_metadata": json.dumps(fields)})
save_file({n: t.float().contiguous() for n, t in (inputs | expected).items()}, OUT / "expected.safetensors")
print({n: list(t.shape) for n, t in expected.items() if not n.startswith("grad")}, loss.item(), len(init), "factors")
