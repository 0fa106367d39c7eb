"""Cases of kind `lora_forward`: rsLoRA, two adapters, rank and alpha patterns, DoRA; with and without merging.

torch 2.11.0, diffusers 0.38.0, peft 0.19.1. Seeds 71 to 79. The models belong to the cases of transformers_forward.py.
Each adapter file is loaded the way a user loads it, with FluxPipeline.load_lora_weights.
"""

import torch
from diffusers import FluxPipeline
from peft import LoraConfig

from common import (
    PARITY,
    SCRIPT_TARGETS,
    FluxTransformer2DModel,
    assert_tolerance,
    case_folder,
    describe_adapter,
    double,
    f32_against_f64,
    generator,
    load_file,
    relative,
    run_transformer,
    save_adapter,
    transformer_inputs,
    write_case,
)


def load(model):
    return FluxTransformer2DModel.from_pretrained(PARITY / model / "model", torch_dtype=torch.float32).eval()


def make_adapter(model, path, seed, **settings):
    """A trained-looking adapter: both factors random, and a magnitude away from the row norms for DoRA."""
    transformer = load(model)
    transformer.add_adapter(LoraConfig(init_lora_weights="gaussian", **settings))
    g = generator(seed)
    with torch.no_grad():
        for name, p in sorted(transformer.named_parameters()):
            if "lora_A" in name:
                p.copy_(torch.randn(p.shape, generator=g) / p.shape[0] ** 0.5)
            elif "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=g) * 0.25)
            elif "lora_magnitude_vector" in name:
                p.mul_(1 + 0.3 * torch.randn(p.shape, generator=g))
    save_adapter(transformer, path)
    return describe_adapter(transformer.peft_config["default"], path.name)


def with_adapters(model, folder, adapters):
    """A fresh transformer with every file loaded by diffusers."""
    transformer = load(model)
    pipeline = FluxPipeline(None, None, None, None, None, None, transformer)
    for name, entry in adapters.items():
        pipeline.load_lora_weights(folder, weight_name=entry["file"], adapter_name=name)
        config = transformer.peft_config[name]
        assert (config.r, config.lora_alpha) == (entry["rank"], entry["alpha"])
        assert (config.use_rslora, config.use_dora) == (entry["use_rslora"], entry["use_dora"])
    return transformer


def run_case(model, folder, adapters, weight_sets, inputs, keys=(), dtype=torch.float32):
    """Every tensor of the case, and every linear's weight before and after merging."""
    out = {}
    transformer = load(model).to(dtype)
    out["sample_base"] = run_transformer(transformer, inputs)
    before = transformer.state_dict()

    transformer = with_adapters(model, folder, adapters).to(dtype)
    for name, weights in weight_sets.items():
        transformer.set_adapters(list(weights), list(weights.values()))
        out[name] = run_transformer(transformer, inputs)

    first = next(iter(weight_sets.values()))
    changed = []
    for name, scale in ("sample_fused", 1.0), ("sample_fused_0.6", 0.6):
        transformer = with_adapters(model, folder, adapters).to(dtype)
        transformer.set_adapters(list(first), list(first.values()))
        transformer.fuse_lora(lora_scale=scale)
        if scale == 1.0:
            fused = {k.replace(".base_layer", ""): v for k, v in transformer.state_dict().items()}
            changed = [k for k in before if not torch.equal(before[k], fused[k])]
            out |= {f"fused.{k}": fused[k].clone() for k in keys}
        transformer.unload_lora()  # only the merged weights are left
        out[name] = run_transformer(transformer, inputs)
    return out, changed


def effective_weight(base, file, key, adapter):
    """W' of one linear from the formulas alone, at weight 1."""
    tensors = load_file(file)
    module = key.removesuffix(".weight")
    a = tensors[f"transformer.{module}.lora_A.weight"].double()
    b = tensors[f"transformer.{module}.lora_B.weight"].double()
    rank = a.shape[0]
    pattern = [v for k, v in adapter["alpha_pattern"].items() if module == k.lstrip("^") or module.endswith("." + k)]
    alpha = pattern[0] if pattern else adapter["alpha"]
    scale = alpha / rank**0.5 if adapter["use_rslora"] else alpha / rank
    v = base.double() + scale * b @ a
    if adapter["use_dora"]:
        m = tensors[f"transformer.{module}.lora_magnitude_vector"].double()
        v = v * (m / v.norm(dim=1))[:, None]
    return v


def write(name, description, model, seed, adapters, weight_sets, keys, notes="", rows=3, cols=4):
    folder = case_folder(name)
    described = {}
    for i, (adapter, settings) in enumerate(adapters.items()):
        file = "lora.safetensors" if len(adapters) == 1 else f"lora_{adapter}.safetensors"
        described[adapter] = make_adapter(model, folder / file, seed + 1 + i, **settings)
    inputs = transformer_inputs(load(model).config, seed, rows, cols, text_len=5)

    with torch.no_grad():
        expected, changed = run_case(model, folder, described, weight_sets, inputs, keys)
    with torch.no_grad():  # a merged model and an unmerged one are the same function
        for tensor, weights in weight_sets.items():
            if weights == next(iter(weight_sets.values())):
                assert relative(expected["sample_fused"], expected[tensor]) < 1e-5
    if len(adapters) == 1:
        base = load(model).state_dict()
        for key in keys:
            adapter = next(iter(described.values()))
            ours = effective_weight(base[key], folder / adapter["file"], key, adapter)
            assert relative(expected[f"fused.{key}"], ours) < 1e-6, key
    assert set(keys) <= set(changed)

    run64 = lambda: run_case(model, folder, described, weight_sets, double(inputs), keys, torch.float64)[0]
    tolerance = {"rel": 1e-4, "rel_if_sinusoid_is_bit_equal": 1e-5, **f32_against_f64(expected, run64)}
    assert_tolerance(tolerance)
    write_case(
        folder,
        "lora_forward",
        description,
        tolerance,
        inputs,
        expected,
        model={"path": f"../{model}/model", "class": "FluxTransformer2DModel"},
        lora=described,
        weight_sets=weight_sets,
        checks={
            "rel_change_from_base": {k: round(relative(expected[k], expected["sample_base"]), 4) for k in weight_sets},
            "fused_tensors_changed": len(changed),
        },
        notes="sample_base: no adapter. sample_fused: fuse_lora(1.0) with the first weight set, sample_fused_0.6: fuse_lora(0.6), that is the "
        "first weight set times 0.6. fused.<key>: merged weight under its diffusers name, at fuse_lora(1.0). " + notes,
    )


def main():
    write(
        "lora_rslora",
        "rsLoRA: scale = alpha / sqrt(r). r 9, alpha 3; only attention; also a negative weight.",
        "transformer_schnell",
        71,
        {"default": dict(r=9, lora_alpha=3, use_rslora=True, target_modules=["to_q", "to_v", "add_k_proj", "to_add_out", "to_out.0"])},
        {"sample": {"default": 1.0}, "sample_0.6": {"default": 0.6}, "sample_-0.5": {"default": -0.5}},
        [
            "transformer_blocks.0.attn.to_out.0.weight",
            "transformer_blocks.0.attn.add_k_proj.weight",
            "single_transformer_blocks.1.attn.to_v.weight",
        ],
        "use_rslora is only in the metadata of the file.",
    )
    write(
        "lora_two_adapters",
        "Two adapters with overlapping targets, different ranks and alphas, one of them rsLoRA, at several pairs of weights.",
        "transformer_wide_one_token",
        73,
        {
            "style": dict(r=4, lora_alpha=6, target_modules=["attn.to_q", "attn.to_k", "attn.to_out.0", "ff.net.2", "proj_mlp"]),
            "person": dict(r=2, lora_alpha=1, use_rslora=True, target_modules=["attn.to_q", "attn.add_v_proj", "ff.net.0.proj", "x_embedder"]),
        },
        {
            "sample": {"style": 0.8, "person": 1.25},
            "sample_style": {"style": 1.0},
            "sample_person": {"person": 1.0},
            "sample_style_off": {"style": 0.0, "person": 0.7},
            "sample_opposed": {"person": -0.4, "style": 1.5},
        },
        [
            "transformer_blocks.0.attn.to_q.weight",
            "transformer_blocks.1.ff.net.2.weight",
            "transformer_blocks.1.attn.add_v_proj.weight",
            "x_embedder.weight",
            "single_transformer_blocks.0.proj_mlp.weight",
        ],
        "A weight set names the active adapters: one that is not named is off.",
        rows=2,
        cols=3,
    )
    write(
        "lora_patterns",
        "rank_pattern and alpha_pattern, every linear kind including modulation and the final projection; rank 3, alpha 5 where no pattern matches.",
        "transformer_sharded_bf16",
        76,
        {
            "default": dict(
                r=3,
                lora_alpha=5,
                target_modules=[*SCRIPT_TARGETS, "proj_mlp", "proj_out", "norm.linear", "norm1.linear", "norm_out.linear"],
                rank_pattern={"attn.to_q": 6, "ff.net.0.proj": 2, "^proj_out": 5},
                alpha_pattern={"attn.to_q": 2, "attn.to_v": 7.5, "^proj_out": 1},
            )
        },
        {"sample": {"default": 1.0}, "sample_0.6": {"default": 0.6}},
        [
            "transformer_blocks.0.attn.to_q.weight",
            "transformer_blocks.0.attn.to_v.weight",
            "transformer_blocks.0.ff.net.0.proj.weight",
            "single_transformer_blocks.0.attn.to_q.weight",
            "single_transformer_blocks.0.proj_out.weight",
            "proj_out.weight",
        ],
        "A pattern matches a module path that it ends, at a dot; ^ pins it to the start, so ^proj_out is the final projection and not the "
        "single blocks'. bf16 weights are widened to f32 before merging.",
        rows=2,
        cols=3,
    )
    write(
        "lora_dora",
        "DoRA: r 4, alpha 6, magnitudes away from the row norms; attention and feed-forward of both block kinds.",
        "transformer_schnell",
        78,
        {
            "default": dict(
                r=4,
                lora_alpha=6,
                use_dora=True,
                target_modules=["attn.to_q", "attn.to_v", "attn.add_k_proj", "attn.to_out.0", "ff.net.0.proj", "ff_context.net.2", "proj_mlp"],
            )
        },
        {"sample": {"default": 1.0}, "sample_0.6": {"default": 0.6}, "sample_0": {"default": 0.0}},
        [
            "transformer_blocks.0.attn.to_q.weight",
            "transformer_blocks.0.ff_context.net.2.weight",
            "single_transformer_blocks.0.proj_mlp.weight",
            "single_transformer_blocks.1.attn.to_v.weight",
        ],
        "W' = m * V / |V| by rows with V = W + weight * (alpha / r) B A; the magnitude is not scaled by the weight, so weight 0 is not the base "
        "model unless m is the row norm of W.",
    )


if __name__ == "__main__":
    main()
