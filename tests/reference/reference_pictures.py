"""Cases with pictures beside the prompt: references (FLUX.2 klein, FLUX.1 Kontext), a picture and a mask (FLUX.1 Fill).

Kinds `pipeline` and `train`. torch 2.11.0, diffusers 0.38.0, peft 0.19.1. Seeds 91 to 99.
"""

import contextlib
from unittest import mock

import numpy as np
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline, FluxFillPipeline, FluxKontextPipeline, FluxTransformer2DModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

import train
from common import PARITY, assert_tolerance, case_folder, float64, generator, tiny_transformer, write_case
from common import f32_against_f64

PROMPT = "make it snow"
HEIGHT, WIDTH, STEPS = 48, 80, 2
# diffusers draws the masked picture's latents from the distribution, Black Forest Labs take its mean, and so do we
MEAN = mock.patch.object(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())


def picture(seed, height, width):
    """Smooth colours with some noise, as a PIL image."""
    g = generator(seed)
    coarse = torch.rand(1, 3, 4, 4, generator=g)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    noisy = (smooth + 0.1 * torch.randn(smooth.shape, generator=g)).clamp(0, 1)
    return Image.fromarray((255 * noisy[0]).round().byte().permute(1, 2, 0).numpy())


def pixels(image):
    """As the autoencoder reads it."""
    return torch.from_numpy(np.array(image, dtype=np.float32) / 255).permute(2, 0, 1)[None] * 2 - 1


def run(pipe, latents, **call):
    """Velocity and tokens of every step, and what came out. The network's whole output is cut as the pipeline cuts it."""
    out, forward = {}, pipe.transformer.forward

    def recorded(*args, **kwargs):
        result = forward(*args, **kwargs)
        index = sum(name.endswith("velocity") for name in out)
        out[f"step{index}.velocity"] = result[0][:, : latents.shape[1]]
        return result

    def on_step(_, index, __, tensors):
        out[f"step{index}.latents"] = tensors["latents"].clone()
        return {}

    with mock.patch.object(pipe.transformer, "forward", recorded), torch.no_grad():
        out["image"] = pipe(
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=STEPS,
            latents=unpacked(latents) if isinstance(pipe, (Flux2KleinPipeline, Flux2Pipeline)) else latents,
            output_type="pt",
            callback_on_step_end=on_step,
            **call,
        ).images
    return out


def unpacked(tokens):
    """Tokens of FLUX.2 as the latents that its pipeline takes."""
    return tokens.permute(0, 2, 1).reshape(len(tokens), -1, HEIGHT // 16, WIDTH // 16)


def write_pipeline(name, description, folder, pipe, inputs, encoded, guidance, length, call, rel, **fields):
    """`encoded(pipe)` gives the tensors that the network gets besides the noisy ones."""
    out = case_folder(name) if folder is None else folder
    prompts = {"prompt": PROMPT, "guidance_scale": guidance, "max_sequence_length": length}
    latents = inputs["latents_packed"]
    with MEAN:
        expected = run(pipe, latents, **prompts, **call) | encoded(pipe)
        # prompts are encoded in float32 for both: that they are is shown by other cases
        embeds = {k: v for k, v in zip(("prompt_embeds", "pooled_prompt_embeds"), embed(pipe, length))}

        def wide():
            double = {k: v.double() for k, v in embeds.items()}
            pipe.transformer.double(), pipe.vae.double()
            rest = {k: v for k, v in prompts.items() if k != "prompt"}
            return run(pipe, latents.double(), **double, **rest, **call) | encoded(pipe)

        tolerance = {"rel": rel, **f32_against_f64(expected, wide)}
    assert_tolerance(tolerance)
    write_case(out, "pipeline", description, tolerance, inputs, expected, call={**prompts, "height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS, **fields.pop("case_call", {})}, **fields)


def embed(pipe, length):
    with torch.no_grad():
        if isinstance(pipe, Flux2KleinPipeline):
            return pipe.encode_prompt(PROMPT, max_sequence_length=length, text_encoder_out_layers=LAYERS)[:1]
        return pipe.encode_prompt(PROMPT, None, max_sequence_length=length)[:2]


LAYERS = (1, 2, 4)


def klein():
    pipe = Flux2KleinPipeline.from_pretrained(PARITY / "flux2_pipeline_distilled" / "model", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    images = [picture(91, 64, 80), picture(92, 96, 64)]
    inputs = {"latents_packed": torch.randn(1, HEIGHT * WIDTH // 256, 128, generator=generator(93))}
    inputs |= {f"reference_{k}": pixels(image) for k, image in enumerate(images)}

    def encoded(pipe):
        tensors = [inputs[f"reference_{k}"].to(pipe.vae.dtype) for k in range(2)]
        with torch.no_grad():
            tokens, ids = pipe.prepare_image_latents(tensors, 1, None, "cpu", pipe.vae.dtype)
        return {"reference_latents_packed": tokens, "reference_ids": ids[0].to(tokens.dtype)}

    write_pipeline(
        "flux2_pipeline_reference",
        "klein with two reference pictures of other sizes than the image.",
        None,
        pipe,
        inputs,
        encoded,
        1.0,
        44,
        {"image": images, "text_encoder_out_layers": LAYERS},
        2e-5,
        family="flux2",
        model={"path": "../flux2_pipeline_distilled/model", "class": "Flux2KleinPipeline"},
        case_call={"text_encoder_out_layers": list(LAYERS)},
        notes=NOTES,
    )


NOTES = (
    "reference_K = pixels in [-1, 1], at the size they are encoded at. reference_latents_packed = their tokens in model space, one "
    "reference after the other, as they are appended to the noisy tokens; reference_ids = their positions. stepK.velocity: noisy tokens only."
)


def kontext():
    pipe = FluxKontextPipeline.from_pretrained(PARITY / "pipeline_dev" / "model", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    image = picture(94, 64, 48)
    inputs = {"latents_packed": torch.randn(1, HEIGHT * WIDTH // 256, 64, generator=generator(95)), "reference_0": pixels(image)}

    def encoded(pipe):
        with torch.no_grad():
            _, tokens, _, ids = pipe.prepare_latents(
                inputs["reference_0"], 1, 16, HEIGHT, WIDTH, pipe.vae.dtype, "cpu", None, inputs["latents_packed"]
            )
        return {"reference_latents_packed": tokens, "reference_ids": ids}

    write_pipeline(
        "pipeline_kontext",
        "FLUX.1 Kontext with a reference picture of another size than the image.",
        None,
        pipe,
        inputs,
        encoded,
        2.5,
        29,
        # the size is taken as it is; otherwise diffusers would resize to about a megapixel
        {"image": image, "_auto_resize": False, "max_area": HEIGHT * WIDTH},
        5e-5,
        model={"path": "../pipeline_dev/model", "class": "FluxKontextPipeline"},
        notes=NOTES,
    )


def fill():
    folder = case_folder("pipeline_fill")
    tiny_transformer(
        96,
        in_channels=384,
        out_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=40,
        pooled_projection_dim=24,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    ).save_pretrained(folder / "model")
    transformer = FluxTransformer2DModel.from_pretrained(folder / "model", torch_dtype=torch.float32)
    pipe = FluxFillPipeline.from_pretrained(PARITY / "pipeline_dev" / "model", transformer=transformer, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    image = picture(97, HEIGHT, WIDTH)
    mask = torch.zeros(HEIGHT, WIDTH)
    mask[5:37, 11:50] = 1  # not on a boundary of tokens
    mask[30:48, 60:80] = 1
    mask_image = Image.fromarray((255 * mask).byte().numpy())
    inputs = {
        "latents_packed": torch.randn(1, HEIGHT * WIDTH // 256, 64, generator=generator(98)),
        "image": pixels(image),
        "mask": mask[None, None],
    }

    def encoded(pipe):
        dtype, pixel, hole = pipe.vae.dtype, inputs["image"], inputs["mask"]
        with torch.no_grad():
            latents = pipe.prepare_mask_latents(
                hole, (pixel * (1 - hole)).to(dtype), 1, 16, 1, HEIGHT, WIDTH, dtype, "cpu", None
            )
        return {"mask_packed": latents[0], "masked_latents_packed": latents[1]}

    write_pipeline(
        "pipeline_fill",
        "FLUX.1 Fill: a picture of which two rectangles are painted anew.",
        folder,
        pipe,
        inputs,
        encoded,
        4.0,
        29,
        {"image": image, "mask_image": mask_image},
        5e-5,
        model={"path": "../pipeline_dev/model", "transformer": "model", "class": "FluxFillPipeline"},
        notes="image = pixels in [-1, 1], mask = 1 where it is painted anew. The network reads [noisy | masked_latents_packed | mask_packed] "
        "on the channel axis. masked_latents_packed is of the distribution's mean.",
    )


def training(name, description, model, targets, seed, latents, extra, mistakes, text_len=5, **fields):
    lora = {"rank": 3, "alpha": 4, "use_dora": False, "dropout": 0.0, "target_modules": targets}
    optimizer = train.adamw(steps=4, lr=0.003)
    config = train.load(model, lora).config
    guidance = 1.0 if config.guidance_embeds else None
    u = lambda count, batch, g: torch.rand(count, batch, generator=g)
    channels, height, width = latents
    inputs = train.draw_inputs(seed, config, optimizer, 2, text_len, height, width, guidance, u, channels=channels)
    g = generator(seed + 100)
    inputs |= extra(optimizer["steps"], g)
    with mock.patch.object(train, "SNAPSHOTS", (2, 4)):
        train.write(
            name,
            description,
            model,
            lora,
            optimizer,
            inputs,
            train.adapter_init(model, lora, seed + 200, 0.05),
            {what: {"inputs": change(inputs)} for what, change in mistakes.items()},
            fields.pop("note"),
            timestep_sampling="none",
            **fields,
        )


def without(name):
    return lambda inputs: {k: v for k, v in inputs.items() if k != name}


def trainings():
    normal = lambda *shape: lambda steps, g: torch.randn(steps, 2, *shape, generator=g)
    note = "reference_latents_K: clean latents in model space, appended to the noisy tokens; the loss is on the noisy ones."
    klein_targets = ["attn.to_q", "attn.to_v", "attn.to_out.0", "attn.to_qkv_mlp_proj"]
    channels = train.load("flux2_transformer_klein", {"rank": 1, "alpha": 1, "use_dora": False, "target_modules": klein_targets}).config.in_channels
    training(
        "flux2_train_reference",
        "klein, 4 steps of batch 2 with two references each.",
        "flux2_transformer_klein",
        klein_targets,
        301,
        (channels, 2, 3),
        lambda steps, g: {"reference_latents_0": normal(channels, 3, 2)(steps, g), "reference_latents_1": normal(channels, 2, 2)(steps, g)},
        {"second reference forgotten": without("reference_latents_1"), "references exchanged": exchanged},
        family="flux2",
        note=note,
    )
    targets = ["attn.to_q", "attn.to_v", "attn.to_out.0", "proj_mlp"]
    training(
        "train_kontext",
        "FLUX.1 Kontext, 4 steps of batch 2 with a reference each.",
        "transformer_dev",
        targets,
        302,
        (16, 4, 6),
        lambda steps, g: {"reference_latents_0": normal(16, 6, 4)(steps, g)},
        {"reference forgotten": without("reference_latents_0")},
        note=note,
    )
    training(
        "train_fill",
        "FLUX.1 Fill, 4 steps of batch 2 with a masked picture each.",
        "pipeline_fill",
        targets,
        303,
        (16, 4, 6),
        lambda steps, g: {
            "masked_latents": normal(16, 4, 6)(steps, g),
            "mask": (torch.rand(steps, 2, 1, 32, 48, generator=g) > 0.6).float(),
        },
        {
            "mask inverted": lambda inputs: {**inputs, "mask": 1 - inputs["mask"]},
            "masked picture forgotten": lambda inputs: {**inputs, "masked_latents": torch.zeros_like(inputs["masked_latents"])},
        },
        note="masked_latents: of the picture with 0 where mask is 1, in model space; mask: pixels. Both are further channels of the noisy tokens.",
    )


def exchanged(inputs):
    return {**inputs, "reference_latents_0": inputs["reference_latents_1"], "reference_latents_1": inputs["reference_latents_0"]}


if __name__ == "__main__":
    klein()
    kontext()
    fill()
    trainings()
