"""Case `bfl_vae` of kind `single_file_vae`: an autoencoder in the original (BFL `ae.safetensors`) layout.

torch 2.11.0, diffusers 0.38.0. Seeds 31, 32. Our conversion from the diffusers layout is checked with diffusers' own
conversion in the other direction.
"""

import re

import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

from common import (
    assert_no_dead_parameter,
    assert_tolerance,
    case_folder,
    f32_against_f64,
    generator,
    randomise,
    save_file,
    write_case,
)

CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "block_out_channels": [8, 16, 16],
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "mid_block_add_attention": True,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}
LEVELS = len(CONFIG["block_out_channels"])


def original_name(name):
    """One diffusers parameter name in the original layout."""
    up = lambda m: f"decoder.up.{LEVELS - 1 - int(m[1])}."  # the decoder counts its levels from full resolution
    for pattern, to in [
        (r"^encoder\.down_blocks\.(\d+)\.", r"encoder.down.\1."),
        (r"^decoder\.up_blocks\.(\d+)\.", up),
        (r"mid_block\.resnets\.0\.", "mid.block_1."),
        (r"mid_block\.resnets\.1\.", "mid.block_2."),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_([qkv])\.", r"mid.attn_1.\1."),
        (r"mid_block\.attentions\.0\.to_out\.0\.", "mid.attn_1.proj_out."),
        (r"resnets\.(\d+)\.", r"block.\1."),
        (r"downsamplers\.0\.", "downsample."),
        (r"upsamplers\.0\.", "upsample."),
        (r"conv_shortcut", "nin_shortcut"),
        (r"conv_norm_out", "norm_out"),
    ]:
        name = re.sub(pattern, to, name)
    return name


def to_original(weights):
    out = {original_name(k): v for k, v in weights.items()}
    for k, v in out.items():
        if ".mid.attn_1." in k and v.ndim == 2:
            out[k] = v[:, :, None, None]  # the original has 1x1 convolutions there
    return {k: v.clone().contiguous() for k, v in out.items()}


def run(vae, image, latent):
    """The names of kind `vae`."""
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor
    dist = vae.encode(image).latent_dist
    return {
        "moments": dist.parameters,
        "mean": dist.mean,
        "logvar": dist.logvar,
        "std": dist.std,
        "model_input_from_mean": (dist.mean - shift) * scale,
        "decoded": vae.decode(latent).sample,
        "decoded_from_model_space": vae.decode(latent / scale + shift).sample,
        "reconstruction": vae.decode(dist.mean).sample,
    }


def build(**extra):
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * LEVELS, "up_block_types": ["UpDecoderBlock2D"] * LEVELS}
    return AutoencoderKL(**{**CONFIG, **blocks, **extra})


def main():
    vae = randomise(build(), 31, gain=1.0)
    checkpoint = to_original(vae.state_dict())
    back = convert_ldm_vae_checkpoint(dict(checkpoint), dict(vae.config))
    for key, value in vae.state_dict().items():
        assert torch.equal(back.pop(key), value), key
    assert not back, list(back)

    folder = case_folder("bfl_vae")
    save_file(checkpoint, folder / "ae-tiny.safetensors")
    g = generator(32)
    inputs = {"image": torch.rand(2, 3, 20, 28, generator=g) * 2 - 1, "latent": torch.randn(2, 16, 5, 7, generator=g)}
    assert_no_dead_parameter(vae, lambda: vae.decode(vae.encode(inputs["image"]).latent_dist.mean + vae.encode(inputs["image"]).latent_dist.std).sample)
    with torch.no_grad():
        expected = run(vae, inputs["image"], inputs["latent"])
    wide = build().eval()
    wide.load_state_dict(vae.state_dict())
    wide.double()
    report = f32_against_f64(expected, lambda: run(wide, inputs["image"].double(), inputs["latent"].double()))
    tolerance = {"rel": 5e-5, "f32_vs_f64": report["f32_vs_f64"]}
    assert_tolerance(tolerance)
    write_case(
        folder,
        "single_file_vae",
        "Original layout, 3 levels (factor 4), 2 layers per block, 4 groups, 20x28 images -> 5x7 latents, batch 2.",
        tolerance,
        inputs,
        expected,
        checkpoint={
            "file": "ae-tiny.safetensors",
            "weights_dtype": "float32",
            "keys": len(checkpoint),
            "first_keys": sorted(checkpoint)[:6],
        },
        config=CONFIG,
        vae_scale_factor=2 ** (LEVELS - 1),
        verified_by="diffusers convert_ldm_vae_checkpoint gives back the diffusers state dict bit for bit",
        notes="decoder.up.0 is the full-resolution level although it runs last; attention q, k, v, proj_out are 1x1 convolutions [c, c, 1, 1]. "
        "The number of groups cannot be read from shapes: it comes from config.",
    )


if __name__ == "__main__":
    main()
