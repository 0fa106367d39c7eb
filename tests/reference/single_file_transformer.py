"""Case `fp8_transformer` of kind `single_file_transformer`: the original (BFL) layout in float8, with a prefix.

torch 2.11.0, diffusers 0.38.0. Seeds 21, 22. Our conversion from the diffusers layout is checked with diffusers' own
conversion in the other direction.
"""

import inspect

import torch
from diffusers.loaders import single_file_utils

from common import (
    FluxTransformer2DModel,
    assert_tolerance,
    case_folder,
    double,
    f32_against_f64,
    relative,
    run_transformer,
    save_file,
    tiny_transformer,
    transformer_inputs,
    write_case,
)

PREFIX = "model.diffusion_model."
CONFIG = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 28,
    "pooled_projection_dim": 12,
    "guidance_embeds": True,
    "axes_dims_rope": [4, 6, 6],
}

# (original, diffusers); several diffusers names are stacked along the rows
OUTER = [
    ("img_in", ["x_embedder"]),
    ("txt_in", ["context_embedder"]),
    ("time_in.in_layer", ["time_text_embed.timestep_embedder.linear_1"]),
    ("time_in.out_layer", ["time_text_embed.timestep_embedder.linear_2"]),
    ("vector_in.in_layer", ["time_text_embed.text_embedder.linear_1"]),
    ("vector_in.out_layer", ["time_text_embed.text_embedder.linear_2"]),
    ("guidance_in.in_layer", ["time_text_embed.guidance_embedder.linear_1"]),
    ("guidance_in.out_layer", ["time_text_embed.guidance_embedder.linear_2"]),
    ("final_layer.adaLN_modulation.1", ["norm_out.linear"]),
    ("final_layer.linear", ["proj_out"]),
]
DOUBLE = [
    ("img_mod.lin", ["norm1.linear"]),
    ("txt_mod.lin", ["norm1_context.linear"]),
    ("img_attn.qkv", ["attn.to_q", "attn.to_k", "attn.to_v"]),
    ("txt_attn.qkv", ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]),
    ("img_attn.proj", ["attn.to_out.0"]),
    ("txt_attn.proj", ["attn.to_add_out"]),
    ("img_mlp.0", ["ff.net.0.proj"]),
    ("img_mlp.2", ["ff.net.2"]),
    ("txt_mlp.0", ["ff_context.net.0.proj"]),
    ("txt_mlp.2", ["ff_context.net.2"]),
]
DOUBLE_NORMS = [
    ("img_attn.norm.query_norm", "attn.norm_q"),
    ("img_attn.norm.key_norm", "attn.norm_k"),
    ("txt_attn.norm.query_norm", "attn.norm_added_q"),
    ("txt_attn.norm.key_norm", "attn.norm_added_k"),
]
SINGLE = [
    ("modulation.lin", ["norm.linear"]),
    ("linear1", ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]),
    ("linear2", ["proj_out"]),
]
SINGLE_NORMS = [("norm.query_norm", "attn.norm_q"), ("norm.key_norm", "attn.norm_k")]


def to_original(weights, config):
    """The diffusers state dict under the names and in the row order of the original checkpoint."""
    out = {}

    def linears(names, ours="", theirs=""):
        for original, parts in names:
            for p in ("weight", "bias"):
                out[f"{ours}{original}.{p}"] = torch.cat([weights[f"{theirs}{n}.{p}"] for n in parts])

    def norms(names, ours, theirs):
        for original, name in names:
            out[f"{ours}{original}.scale"] = weights[f"{theirs}{name}.weight"]

    linears(OUTER)
    for p in ("weight", "bias"):  # diffusers: scale, shift; original: shift, scale
        scale, shift = out[f"final_layer.adaLN_modulation.1.{p}"].chunk(2)
        out[f"final_layer.adaLN_modulation.1.{p}"] = torch.cat([shift, scale])
    for i in range(config["num_layers"]):
        linears(DOUBLE, f"double_blocks.{i}.", f"transformer_blocks.{i}.")
        norms(DOUBLE_NORMS, f"double_blocks.{i}.", f"transformer_blocks.{i}.")
    for i in range(config["num_single_layers"]):
        linears(SINGLE, f"single_blocks.{i}.", f"single_transformer_blocks.{i}.")
        norms(SINGLE_NORMS, f"single_blocks.{i}.", f"single_transformer_blocks.{i}.")
    return out


def diffusers_conversion(checkpoint, config):
    """diffusers' converter, whose hard-coded width is replaced by the toy width."""
    source = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    assert source.count("inner_dim = 3072") == 1
    scope = dict(vars(single_file_utils))
    exec(source.replace("inner_dim = 3072", f"inner_dim = {width}"), scope)
    return scope["convert_flux_transformer_checkpoint_to_diffusers"](dict(checkpoint))


def main():
    model = tiny_transformer(21, **CONFIG)
    # 8-bit values, as files of this kind hold them: every tensor cast, no scales
    checkpoint = {
        PREFIX + k: v.clamp(-448, 448).to(torch.float8_e4m3fn).contiguous()
        for k, v in to_original(model.state_dict(), CONFIG).items()
    }
    folder = case_folder("fp8_transformer")
    save_file(checkpoint, folder / "flux1-tiny-fp8.safetensors")

    unrounded = {k: v.clone() for k, v in model.state_dict().items()}
    wide_file = {k: v.float() for k, v in checkpoint.items()}
    model.load_state_dict(diffusers_conversion(wide_file, CONFIG), strict=True)
    # 3 bits of mantissa: half a unit in the last place is at most 1/16 of the value
    rounding = max(relative(v, unrounded[k]) for k, v in model.state_dict().items())
    assert 0.005 < rounding < 0.06, rounding

    inputs = transformer_inputs(model.config, 22, rows=2, cols=4, text_len=5)
    with torch.no_grad():
        expected = {"sample": run_transformer(model, inputs)}
    wide = FluxTransformer2DModel(**CONFIG).eval()
    wide.load_state_dict(model.state_dict())
    wide.double()
    tolerance = {"rel": 5e-5, "rel_if_sinusoid_is_bit_equal": 5e-6}
    tolerance |= f32_against_f64(expected, lambda: {"sample": run_transformer(wide, double(inputs))})
    assert_tolerance(tolerance)
    write_case(
        folder,
        "single_file_transformer",
        "Original layout, every tensor F8_E4M3 without scales, keys with the prefix model.diffusion_model.",
        tolerance,
        inputs,
        expected,
        checkpoint={
            "file": "flux1-tiny-fp8.safetensors",
            "weights_dtype": "float8_e4m3fn",
            "keys": len(checkpoint),
            "first_keys": sorted(checkpoint)[:6],
        },
        config=CONFIG,
        checks={"largest_rel_change_of_a_tensor_by_rounding_to_fp8": round(rounding, 4)},
        verified_by="diffusers convert_flux_transformer_checkpoint_to_diffusers (inner_dim constant 3072 replaced by the toy width), strict load",
        notes="The 8-bit values are widened to f32 and everything is computed in f32. final_layer.adaLN_modulation.1 holds (shift, scale), "
        "diffusers' norm_out.linear holds (scale, shift); linear1 = q, k, v, mlp; qkv = q, k, v.",
    )


if __name__ == "__main__":
    main()
