"""FLUX.1 from a picture to start from (FluxImg2ImgPipeline): which steps are made, and what noise the first one gets.

Kind `img2img`. torch 2.11.0, diffusers 0.38.0. Seeds 101 to 103.
"""

from unittest import mock

import torch
from diffusers import FluxImg2ImgPipeline
from diffusers.models.autoencoders import vae
from diffusers.pipelines.flux import pipeline_flux_img2img

from common import PARITY, assert_tolerance, case_folder, f32_against_f64, generator, write_case
from reference_pictures import HEIGHT, PROMPT, WIDTH, picture, pixels

STEPS, GUIDANCE, LENGTH = 5, 3.5, 29
STRENGTHS = (0.3, 0.6, 1.0)  # 0.3 of 5 steps is no whole number of them


def given(noise):
    """In place of `randn_tensor`: this noise, whoever asks."""
    return lambda shape, dtype=None, **_: noise.reshape(shape).to(dtype)


def run(pipe, inputs, image, strength, **prompts):
    out, forward = {}, pipe.transformer.forward

    def recorded(*args, **kwargs):
        result = forward(*args, **kwargs)
        out[f"step{sum(name.endswith('velocity') for name in out)}.velocity"] = result[0]
        return result

    def on_step(_, index, __, tensors):
        out[f"step{index}.latents"] = tensors["latents"].clone()
        return {}

    with (
        mock.patch.object(pipe.transformer, "forward", recorded),
        mock.patch.object(vae, "randn_tensor", given(inputs["image_noise"])),
        mock.patch.object(pipeline_flux_img2img, "randn_tensor", given(inputs["noise"])),
        torch.no_grad(),
    ):
        out["image"] = pipe(
            image=image,
            strength=strength,
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            output_type="pt",
            callback_on_step_end=on_step,
            **prompts,
        ).images
    return {f"{strength}.{name}": tensor for name, tensor in out.items()}


def main():
    pipe = FluxImg2ImgPipeline.from_pretrained(PARITY / "pipeline_dev" / "model", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    image = picture(101, HEIGHT, WIDTH)
    g = generator(102)
    latents = (1, 16, HEIGHT // 8, WIDTH // 8)
    inputs = {
        "image": pixels(image),
        "image_noise": torch.randn(latents, generator=g),
        "noise": torch.randn(latents, generator=g),
    }
    expected = {}
    for strength in STRENGTHS:
        expected |= run(pipe, inputs, image, strength, prompt=PROMPT, max_sequence_length=LENGTH)
    made = [sum(name.startswith(f"{strength}.") and name.endswith("velocity") for name in expected) for strength in STRENGTHS]
    assert made == [2, 3, 5], made
    with torch.no_grad():
        embeds = pipe.encode_prompt(PROMPT, None, max_sequence_length=LENGTH)[:2]

    def wide():
        pipe.transformer.double(), pipe.vae.double()
        prompts = {"prompt_embeds": embeds[0].double(), "pooled_prompt_embeds": embeds[1].double()}
        out = {}
        for strength in STRENGTHS:
            out |= run(pipe, inputs, image, strength, **prompts)
        return out

    tolerance = {"rel": 5e-5, **f32_against_f64(expected, wide)}
    assert_tolerance(tolerance)
    write_case(
        case_folder("pipeline_img2img"),
        "img2img",
        "FLUX.1 from a picture to start from, at three strengths.",
        tolerance,
        inputs,
        expected,
        call={
            "prompt": PROMPT,
            "guidance_scale": GUIDANCE,
            "max_sequence_length": LENGTH,
            "height": HEIGHT,
            "width": WIDTH,
            "num_inference_steps": STEPS,
            "strengths": list(STRENGTHS),
        },
        model={"path": "../pipeline_dev/model", "class": "FluxImg2ImgPipeline"},
        notes="image = pixels in [-1, 1]; image_noise = what its latents are drawn from the autoencoder's distribution with; noise = what it is "
        "mixed with. S.stepK: the K-th step that is made at strength S.",
    )


if __name__ == "__main__":
    main()
