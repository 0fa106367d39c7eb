"""Cases of kind `transformer_forward`: variants of the transformer that FLUX.1-dev does not cover.

torch 2.11.0, diffusers 0.38.0. Seeds 11 to 16.
"""

import torch

from common import (
    FluxTransformer2DModel,
    assert_no_dead_parameter,
    assert_tolerance,
    case_folder,
    double,
    f32_against_f64,
    run_transformer,
    tiny_transformer,
    transformer_inputs,
    write_case,
)

NOTES = "timestep is in [0, 1] (t / 1000) and guidance is the raw scale; the model multiplies both by 1000. "


def write(name, description, model, inputs, notes="", dtype=torch.float32, **save):
    folder = case_folder(name)
    model.to(dtype).save_pretrained(folder / "model", **save)
    model = FluxTransformer2DModel.from_pretrained(folder / "model", torch_dtype=torch.float32).eval()
    assert_no_dead_parameter(model, lambda: run_transformer(model, inputs))
    with torch.no_grad():
        expected = {"sample": run_transformer(model, inputs)}
    wide = FluxTransformer2DModel.from_pretrained(folder / "model", torch_dtype=torch.float32).eval().double()
    tolerance = {"rel": 5e-5, "rel_if_sinusoid_is_bit_equal": 5e-6, **f32_against_f64(expected, lambda: {"sample": run_transformer(wide, double(inputs))})}
    assert_tolerance(tolerance)
    write_case(
        folder,
        "transformer_forward",
        description,
        tolerance,
        inputs,
        expected,
        model={"path": "model", "class": "FluxTransformer2DModel"},
        notes=NOTES + notes,
    )


def schnell():
    config = dict(
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=False,
        axes_dims_rope=(4, 4, 8),
    )
    model = tiny_transformer(11, **config)
    inputs = transformer_inputs(model.config, 12, rows=4, cols=3, text_len=6)
    write(
        "transformer_schnell",
        "FLUX.1-schnell like: no guidance embedding, 4x3 image tokens, 6 text tokens.",
        model,
        inputs,
        "There is no guidance input.",
    )


def wide():
    config = dict(
        in_channels=128,
        out_channels=64,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=18,
        pooled_projection_dim=10,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    model = tiny_transformer(13, **config)
    inputs = transformer_inputs(model.config, 14, rows=2, cols=5, text_len=1, batch=3)
    inputs["guidance"][2] = 12.0
    inputs["timestep"][0], inputs["timestep"][1] = 1.0, 0.001
    write(
        "transformer_wide_one_token",
        "in_channels 128 and out_channels 64, as in the Canny and Depth models; one text token, batch 3, timesteps 1 and 0.001.",
        model,
        inputs,
    )


def sharded():
    config = dict(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=12,
        num_attention_heads=3,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 2, 6),
    )
    model = tiny_transformer(15, **config)
    inputs = transformer_inputs(model.config, 16, rows=3, cols=3, text_len=5)
    # text ids are zero in FLUX, but the model takes any: positions above zero turn the text tokens as well
    inputs["txt_ids"][:, 2] = torch.arange(5)
    inputs["img_ids"][:, 0] = 1
    write(
        "transformer_sharded_bf16",
        "bf16 weights in shards with an index; text ids that are not zero; image ids with 1 on the first axis, as a Kontext reference has.",
        model,
        inputs,
        "The weights are read as bf16 and widened to f32; everything is computed in f32.",
        dtype=torch.bfloat16,
        max_shard_size="40KB",
    )


if __name__ == "__main__":
    schnell()
    wide()
    sharded()
