"""Case `tiny_vae` of kind `tiny_vae`: the tiny autoencoder (AutoencoderTiny, the architecture of TAEF1).

torch 2.11.0, diffusers 0.38.0. Seeds 33, 34. Latents are several times as large as the bound of the decoder's clamp.
"""

import torch
from diffusers import AutoencoderTiny

from common import (
    assert_no_dead_parameter,
    assert_tolerance,
    case_folder,
    f32_against_f64,
    generator,
    randomise,
    write_case,
)

CONFIG = {
    "latent_channels": 16,
    "encoder_block_out_channels": [8, 8, 8, 8],
    "decoder_block_out_channels": [12, 12, 12, 12],
    "num_encoder_blocks": [1, 2, 1, 1],
    "num_decoder_blocks": [2, 1, 1, 1],
    "scaling_factor": 0.75,
    "shift_factor": 0.1,
}


def run(vae, image, latent):
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor
    latents = vae.encode(image).latents
    return {
        "latents": latents,
        "model_input": (latents - shift) * scale,
        "decoded": vae.decode(latent).sample,
        "decoded_from_model_space": vae.decode(latent / scale + shift).sample,
        "reconstruction": vae.decode(latents).sample,
    }


def main():
    vae = randomise(AutoencoderTiny(**CONFIG), 33, gain=1.4)
    folder = case_folder("tiny_vae")
    vae.save_pretrained(folder / "model")
    g = generator(34)
    inputs = {"image": torch.rand(2, 3, 24, 40, generator=g) * 2 - 1, "latent": 4 * torch.randn(2, 16, 3, 5, generator=g)}
    assert_no_dead_parameter(vae, lambda: vae.decode(vae.encode(inputs["image"]).latents).sample)
    with torch.no_grad():
        expected = run(vae, inputs["image"], inputs["latent"])
    wide = AutoencoderTiny.from_pretrained(folder / "model").eval().double()
    report = f32_against_f64(expected, lambda: run(wide, inputs["image"].double(), inputs["latent"].double()))
    tolerance = {"rel": 5e-5, "f32_vs_f64": report["f32_vs_f64"]}
    assert_tolerance(tolerance)
    write_case(
        folder,
        "tiny_vae",
        "4 levels (factor 8), other widths and depths in encoder and decoder, 24x40 images -> 3x5 latents, batch 2.",
        tolerance,
        inputs,
        expected,
        model={"class": "AutoencoderTiny", "path": "model", "weights_dtype": "float32"},
        vae_scale_factor=8,
        notes="The decoder clamps latents to 3 tanh(z / 3); pictures are [0, 1] inside and [-1, 1] outside.",
    )


if __name__ == "__main__":
    main()
