"""Cases of kind `train`: the loop of diffusers' train_dreambooth_lora_flux.py on given micro-batches.

torch 2.11.0, diffusers 0.38.0, peft 0.19.1. Seeds 81 to 84.
"""

import contextlib
import itertools
import json
from unittest import mock

import diffusers
import torch
from diffusers import Flux2KleinPipeline, FluxPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3
from peft import LoraConfig, set_peft_model_state_dict

from common import (
    PARITY,
    case_folder,
    double,
    float64,
    generator,
    get_peft_model_state_dict,
    image_ids,
    load_file,
    save_adapter,
    sig,
    write_case,
)

SNAPSHOTS = (10, 20)
PREFIX = "transformer."


def path_of(model):
    """Of the transformer, from the folder of the cases; `model` may have a whole pipeline."""
    path = f"{model}/model/transformer"
    return path if (PARITY / path).is_dir() else f"{model}/model"


def class_of(model):
    return json.loads((PARITY / path_of(model) / "config.json").read_text())["_class_name"]


def load(model, lora):
    transformer = getattr(diffusers, class_of(model)).from_pretrained(PARITY / path_of(model), torch_dtype=torch.float32)
    config = LoraConfig(
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        lora_dropout=0.0,
        use_dora=lora["use_dora"],
        target_modules=lora["target_modules"],
        init_lora_weights="gaussian",
    )
    transformer.requires_grad_(False)
    transformer.add_adapter(config)
    return transformer.train()


def pack(latents):
    return FluxPipeline._pack_latents(latents, *latents.shape)


def references_of(batch):
    named = (batch.get(f"reference_latents_{k}") for k in itertools.count())
    return list(itertools.takewhile(lambda latents: latents is not None, named))


def predict_flux1(transformer, batch, noisy):
    """Kontext appends references to the tokens, Fill masked picture and mask to their channels; the loss is on the noisy ones."""
    size, _, height, width = noisy.shape
    tokens, ids = [pack(noisy)], [image_ids(height // 2, width // 2)]
    for index, latents in enumerate(references_of(batch)):
        of_reference = image_ids(latents.shape[2] // 2, latents.shape[3] // 2)
        of_reference[:, 0] = 1 + index
        tokens.append(pack(latents))
        ids.append(of_reference)
    if "mask" in batch:
        # FluxFillPipeline.prepare_mask_latents
        mask = batch["mask"].reshape(size, height, 8, width, 8).permute(0, 2, 4, 1, 3).reshape(size, 64, height, width)
        tokens = [torch.cat([*tokens, pack(batch["masked_latents"]), pack(mask)], dim=2)]
    prediction = transformer(
        hidden_states=torch.cat(tokens, dim=1),
        timestep=batch["timesteps"] / 1000,
        guidance=batch.get("guidance"),
        pooled_projections=batch["pooled_prompt_embeds"],
        encoder_hidden_states=batch["prompt_embeds"],
        txt_ids=torch.zeros(batch["prompt_embeds"].shape[1], 3).to(noisy),
        img_ids=torch.cat(ids).to(noisy),
        return_dict=False,
    )[0]
    prediction = prediction[:, : height * width // 4]
    return FluxPipeline._unpack_latents(prediction, height * 8, width * 8, vae_scale_factor=8)


def predict_flux2(transformer, batch, noisy):
    size, channels, height, width = noisy.shape
    references = references_of(batch)
    packed = [Flux2KleinPipeline._pack_latents(latents) for latents in (noisy, *references)]
    ids = [Flux2KleinPipeline._prepare_latent_ids(noisy)[0]]
    if references:
        ids.append(Flux2KleinPipeline._prepare_image_ids([latents[:1] for latents in references])[0])
    prediction = transformer(
        hidden_states=torch.cat(packed, dim=1),
        timestep=batch["timesteps"] / 1000,
        guidance=batch.get("guidance"),
        encoder_hidden_states=batch["prompt_embeds"],
        txt_ids=Flux2KleinPipeline._prepare_text_ids(batch["prompt_embeds"])[0],
        img_ids=torch.cat(ids),
        return_dict=False,
    )[0]
    return prediction[:, : height * width].permute(0, 2, 1).reshape(size, channels, height, width)


def loss_of(transformer, batch, weighting_scheme):
    """One micro-batch, as in the script; the latents are scaled already."""
    latents, noise = batch["model_input"], batch["noise"]
    size = len(latents)
    sigmas = batch["sigmas"].reshape(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * latents + sigmas * noise
    flux2 = type(transformer).__name__.startswith("Flux2")
    prediction = (predict_flux2 if flux2 else predict_flux1)(transformer, batch, noisy)
    weighting = compute_loss_weighting_for_sd3(weighting_scheme, sigmas=sigmas)
    squares = weighting.float() * (prediction.float() - (noise - latents).float()) ** 2
    return squares.reshape(size, -1).mean(1).mean()


def replay(model, lora, optimizer, init, inputs, dtype=torch.float32, freeze=()):
    """Every tensor of the case. `optimizer` is the case's entry of that name."""
    transformer = load(model, lora)
    set_peft_model_state_dict(transformer, {k.removeprefix(PREFIX): v for k, v in init.items()})
    transformer.to(dtype)
    if dtype is torch.float64:
        inputs = double(inputs)
    params = {n: p for n, p in transformer.named_parameters() if p.requires_grad}
    for n in list(params):
        if any(f in n for f in freeze):
            params.pop(n).requires_grad_(False)
    adam = torch.optim.AdamW(
        params.values(),
        lr=optimizer["lr"],
        betas=optimizer["betas"],
        eps=optimizer["eps"],
        weight_decay=optimizer["weight_decay"],
    )
    schedule = get_scheduler(
        optimizer["lr_scheduler"], adam, num_warmup_steps=optimizer["warmup"], num_training_steps=optimizer["steps"]
    )
    out = {"loss": [], "grad_norm": [], "lr": []}
    accumulation = optimizer["gradient_accumulation_steps"]

    def keep(prefix, of):
        """The adapter's state dict, with `of(parameter)` in place of each parameter."""
        values = {n: of(p).detach().clone() for n, p in params.items()}
        named = get_peft_model_state_dict(transformer, state_dict=values)
        out.update({f"{prefix}.{PREFIX}{k}": v.contiguous() for k, v in named.items()})

    for step in range(optimizer["steps"]):
        losses = []
        for micro in range(step * accumulation, (step + 1) * accumulation):
            loss = loss_of(transformer, {k: v[micro] for k, v in inputs.items()}, optimizer["weighting_scheme"])
            (loss / accumulation).backward()
            losses.append(loss.detach())
        if step == 0:
            keep("grad_step1", lambda p: p.grad)
        norm = torch.nn.utils.clip_grad_norm_(params.values(), optimizer["max_grad_norm"])
        out["loss"].append(torch.stack(losses))
        out["grad_norm"].append(norm.detach())
        out["lr"].append(torch.tensor(schedule.get_last_lr()[0], dtype=torch.float64))
        adam.step()
        schedule.step()
        adam.zero_grad()
        if step + 1 in SNAPSHOTS:
            keep(f"step{step + 1}", lambda p: p)
    keep("exp_avg", lambda p: adam.state[p]["exp_avg"])
    keep("exp_avg_sq", lambda p: adam.state[p]["exp_avg_sq"])
    for k in ("loss", "grad_norm", "lr"):
        out[k] = torch.stack(out[k]).to(dtype)
    return out


def group(tensors, prefix):
    picked = {k.removeprefix(prefix + "."): v.double() for k, v in tensors.items() if k.startswith(prefix + ".")}
    return torch.cat([v.flatten() for _, v in sorted(picked.items())])


def of_change(ours, reference, init, step):
    """The metric of the case: the difference over all adapter weights, against how far training moved them."""
    start = group({f"init.{k}": v for k, v in init.items()}, "init")
    a, b = group(ours, f"step{step}"), group(reference, f"step{step}")
    return ((a - b).norm() / (b - start).norm()).item()


def against(ours, reference, init):
    worst = lambda k: ((ours[k].double() - reference[k]).abs() / reference[k].abs().clamp_min(1e-300)).max().item()
    over_all = lambda p: ((group(ours, p) - group(reference, p)).norm() / group(reference, p).norm()).item()
    report = {k: sig(worst(k)) for k in ("loss", "grad_norm", "lr")}
    report |= {k: {"rel_all": sig(over_all(k))} for k in ("exp_avg", "exp_avg_sq", "grad_step1")}
    report |= {f"step{s}": {"rel_of_change_since_init": sig(of_change(ours, reference, init, s))} for s in SNAPSHOTS}
    return report


def draw_inputs(seed, config, optimizer, batch, text_len, height, width, guidance, u, channels=16):
    g = generator(seed)
    count = optimizer["steps"] * optimizer["gradient_accumulation_steps"]
    inputs = {
        "model_input": torch.randn(count, batch, channels, height, width, generator=g),
        "noise": torch.randn(count, batch, channels, height, width, generator=g),
        "prompt_embeds": torch.randn(count, batch, text_len, config["joint_attention_dim"], generator=g),
    }
    if "pooled_projection_dim" in config:
        inputs["pooled_prompt_embeds"] = torch.randn(count, batch, config["pooled_projection_dim"], generator=g)
    inputs["u"] = u(count, batch, g)
    indices = (inputs["u"] * 1000).long()
    inputs["timesteps"] = (1000 - indices).float()
    inputs["sigmas"] = inputs["timesteps"] / 1000
    if guidance is not None:
        inputs["guidance"] = torch.full((count, batch), guidance)
    return inputs


def write(name, description, model, lora, optimizer, inputs, init, mistakes, notes, **fields):
    folder = case_folder(name)
    transformer = load(model, lora)
    set_peft_model_state_dict(transformer, {k.removeprefix(PREFIX): v for k, v in init.items()})
    save_adapter(transformer, folder / "lora_init.safetensors")
    init = load_file(folder / "lora_init.safetensors")

    expected = replay(model, lora, optimizer, init, inputs)
    again = replay(model, lora, optimizer, init, inputs)
    bounds = {"rel": 5e-4, "loss_rel": 1e-5, "grad_norm_rel": 1e-4, "lr_rel": 1e-6, "grad_step1_rel": 2e-4, "moments_rel": 5e-4}
    reports = {}
    for key, sinusoid in ("f32_vs_f64", torch.float64), ("f32_vs_f64_with_f32_sinusoid", torch.float32):
        with float64(sinusoid):
            reports[key] = against(expected, replay(model, lora, optimizer, init, inputs, torch.float64), init)
        r = reports[key]
        assert r["loss"] * 2 < bounds["loss_rel"] and r["grad_norm"] * 2 < bounds["grad_norm_rel"], r
        assert r["grad_step1"]["rel_all"] * 2 < bounds["grad_step1_rel"], r
        assert max(r["exp_avg"]["rel_all"], r["exp_avg_sq"]["rel_all"]) * 2 < bounds["moments_rel"], r
        assert max(r[f"step{s}"]["rel_of_change_since_init"] for s in SNAPSHOTS) * 2 < bounds["rel"], r

    wrong = {}
    for mistake, change in mistakes.items():
        args = {"lora": lora, "optimizer": optimizer, "init": init, "inputs": inputs, **change}
        with args.pop("patch", contextlib.nullcontext()):
            out = replay(model, **args)
        out = {k: out.get(k, init.get(k.split(".", 1)[-1])) for k in expected}  # a frozen tensor stays where it was
        wrong[mistake] = sig(of_change(out, expected, init, SNAPSHOTS[-1]))
    assert min(wrong.values()) > 2 * bounds["rel"], wrong

    norms, losses = expected["grad_norm"], expected["loss"].mean(1)
    write_case(
        folder,
        "train",
        description,
        {
            **bounds,
            "metric": "||(w_ours - w_init) - (w_ref - w_init)|| / ||w_ref - w_init|| over all adapter weights of a snapshot",
            **reports,
        },
        inputs,
        expected,
        model={"path": f"../{path_of(model)}", "class": class_of(model)},
        lora={"init": "lora_init.safetensors", **lora},
        optimizer=optimizer,
        batch_size=inputs["u"].shape[1],
        latents="unpacked [micro-batch, batch, channels, h, w], in model space",
        **fields,
        summary={
            "loss_first5_mean": losses[:5].mean().item(),
            "loss_last5_mean": losses[-5:].mean().item(),
            "steps_clipped": int((norms > optimizer["max_grad_norm"]).sum()),
            "grad_norm_min": norms.min().item(),
            "grad_norm_max": norms.max().item(),
            "replay_rel_difference": of_change(again, expected, init, SNAPSHOTS[-1]),
            "rel_of_change_with_a_mistake": wrong,
        },
        notes="loss[step, micro] is the raw micro-batch loss (not divided by the accumulation count). grad_norm[step] is measured before "
        "clipping, after accumulation. lr[step] is the rate used by that step (step 0 of a warm-up has lr 0). sigma = timestep / 1000, not "
        "shifted. exp_avg / exp_avg_sq: after the last step. grad_step1.*: gradient of the first optimizer step before clipping. Clipping is "
        "torch's: g *= min(1, max_norm / (norm + 1e-6)). AdamW decays first (w *= 1 - lr wd), then "
        "w -= lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps). " + notes,
    )


def adapter_init(model, lora, seed, b_std, magnitude_std=0.0):
    """A as the script draws it (normal, std 1/r); B zero for a new adapter, random for one that is continued."""
    transformer, g = load(model, lora), generator(seed)
    init = get_peft_model_state_dict(transformer)
    for k in sorted(init):
        if "lora_A" in k:
            init[k] = torch.randn(init[k].shape, generator=g) / lora["rank"]
        elif "lora_B" in k:
            init[k] = torch.randn(init[k].shape, generator=g) * b_std
        else:
            init[k] = init[k] * (1 + magnitude_std * torch.randn(init[k].shape, generator=g))
    return {PREFIX + k: v.detach().contiguous() for k, v in init.items()}


def adamw(**changes):
    return {
        "name": "AdamW",
        "betas": [0.9, 0.999],
        "eps": 1e-08,
        "lr": 0.001,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "lr_scheduler": "constant",
        "warmup": 0,
        "steps": 20,
        "gradient_accumulation_steps": 1,
        "weighting_scheme": "none",
        **changes,
    }


def accumulate():
    model = "transformer_dev"
    lora = {
        "rank": 3,
        "alpha": 4,
        "use_dora": False,
        "dropout": 0.0,
        "target_modules": ["attn.add_q_proj", "attn.to_out.0", "attn.to_q", "attn.to_v", "ff.net.2", "ff_context.net.0.proj", "proj_mlp"],
    }
    optimizer = adamw(
        weight_decay=0.1,
        max_grad_norm=0.8,
        lr=0.002,
        lr_scheduler="linear",
        warmup=3,
        gradient_accumulation_steps=2,
        weighting_scheme="sigma_sqrt",
    )
    logit = {"logit_mean": -0.9, "logit_std": 0.6}
    u = lambda count, batch, g: torch.sigmoid(logit["logit_mean"] + logit["logit_std"] * torch.randn(count, batch, generator=g))
    config = load(model, lora).config
    inputs = draw_inputs(81, config, optimizer, 2, 5, 4, 6, 1.0, u)
    change = lambda **c: {"optimizer": {**optimizer, **c}}
    write(
        "train_accumulate",
        "20 steps of 2 micro-batches of 2, logit-normal timesteps weighted by sigma^-2, guidance 1, linear schedule with 3 warm-up steps, dropout 0.",
        model,
        lora,
        optimizer,
        inputs,
        adapter_init(model, lora, 82, 0.0),
        {
            "weight decay 0": change(weight_decay=0.0),
            "no clipping": change(max_grad_norm=1e9),
            "warm-up one step longer": change(warmup=4),
            "warm-up without decay": change(lr_scheduler="constant_with_warmup"),
            "Adam beta2 0.99": change(betas=[0.9, 0.99]),
            "loss weighting ignored": change(weighting_scheme="none"),
            # Adam does not see the scale of a gradient, so summing is a mistake only through the clipping
            "gradients summed, not averaged": change(max_grad_norm=optimizer["max_grad_norm"] / 2),
            "guidance 3.5": {"inputs": {**inputs, "guidance": inputs["guidance"] * 3.5}},
        },
        "The schedule advances once per optimizer step: lr rises linearly over the warm-up steps, then falls linearly to 0 at the step after the last.",
        timestep_sampling="logit_normal",
        timestep_sampling_parameters=logit,
    )


def dora():
    model = "transformer_schnell"
    lora = {
        "rank": 4,
        "alpha": 8,
        "use_dora": True,
        "dropout": 0.0,
        "target_modules": ["attn.add_v_proj", "attn.to_k", "attn.to_out.0", "attn.to_q", "ff.net.0.proj", "proj_mlp", "proj_out"],
    }
    optimizer = adamw(lr=0.001, weight_decay=0.05, max_grad_norm=0.85, lr_scheduler="constant_with_warmup", warmup=2)
    config = load(model, lora).config
    inputs = draw_inputs(83, config, optimizer, 2, 6, 6, 4, None, lambda count, batch, g: torch.rand(count, batch, generator=g))
    init = adapter_init(model, lora, 84, 0.05, 0.1)
    change = lambda **c: {"optimizer": {**optimizer, **c}}
    write(
        "train_dora",
        "DoRA: 20 steps, batch 2, uniform timesteps, no guidance, constant rate after 2 warm-up steps; starts from a trained adapter.",
        model,
        lora,
        optimizer,
        inputs,
        init,
        {
            "weight decay 0": change(weight_decay=0.0),
            "no clipping": change(max_grad_norm=1e9),
            "no warm-up": change(warmup=0),
            "magnitude not trained": {"freeze": ("lora_magnitude_vector",)},
            "gradient through the norm": {"patch": mock.patch.object(torch.Tensor, "detach", lambda t: t)},
        },
        "DoRA: y = W x + b + (m/n - 1) W x + (m/n) (alpha / r) B A x with n = |W + (alpha / r) B A| by rows, a constant for the gradient. The "
        "magnitude is trained, decayed and clipped like the factors. proj_out also matches the final projection.",
        timestep_sampling="none",
    )


if __name__ == "__main__":
    accumulate()
    dora()
