"""Loads a LoRA file into diffusers, strictly, and writes what diffusers computes as a parity case.

    python load_in_diffusers.py MODEL_DIR LORA_FILE OUT[.safetensors] [--seed 95]

MODEL_DIR is a pipeline folder of FLUX.1 or FLUX.2, LORA_FILE anything its load_lora_weights reads. Writes

    OUT/                 a case of kind `lora_forward`: `flux-lora parity OUT` compares our output with diffusers'
    OUT.safetensors      (only when asked for by that name) the inputs, `base` and `sample` in one file

Any warning of diffusers, PEFT or Python while the LoRA is loaded is an error, and so is a tensor of the file that is
not in the model afterwards, or one of the model that was not in the file. torch 2.11.0, diffusers 0.38.0, peft 0.19.1.
"""

import argparse
import logging
import os
import re
import shutil
import sys
import warnings
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, Flux2KleinPipeline, Flux2Pipeline
from safetensors import safe_open

from common import (
    METRIC,
    adapter_tensors,
    describe_adapter,
    diffusers,
    double,
    f32_against_f64,
    generator,
    load_file,
    relative,
    run_transformer,
    save_file,
    transformer_inputs,
    write_case,
)

# diffusers says this for every file that has nothing for the text encoder
EXPECTED = re.compile(r"No LoRA keys associated to (CLIPTextModel|NoneType) found with the prefix='text_encoder'")


class Complaints(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        if not EXPECTED.search(record.getMessage()):
            self.messages.append(f"{record.name}: {record.getMessage()}")


def load_strictly(pipeline, lora_file):
    """Loads the file as adapter `default`; raises on any complaint."""
    complaints = Complaints()
    loggers = [logging.getLogger(n) for n in ("diffusers", "peft", "transformers", "huggingface_hub")]
    saved = [(logger, logger.handlers, logger.level) for logger in loggers]
    for logger in loggers:
        logger.handlers = [complaints]
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pipeline.load_lora_weights(str(lora_file.parent), weight_name=lora_file.name, adapter_name="default")
    except Exception as error:
        raise SystemExit(f"error: diffusers refused the file: {type(error).__name__}: {error}") from error
    finally:
        for logger, logger.handlers, level in saved:
            logger.setLevel(level)
    found = complaints.messages + [str(w.message) for w in caught]
    if found:
        raise SystemExit("error: diffusers complained about the file:\n  " + "\n  ".join(found))


def check_every_tensor(pipeline, lora_file):
    """For files in diffusers' own layout: exactly the file's tensors are in the model, unchanged."""
    file = load_file(lora_file)
    ours = {k.removeprefix("transformer."): v for k, v in file.items() if k.startswith("transformer.")}
    if not any(".lora_A." in k for k in ours):
        return "the file is in another layout: only diffusers' own checks"
    loaded = adapter_tensors(pipeline.transformer)
    ours = {k: v for k, v in ours.items() if not k.endswith(".alpha")}
    ignored = [k for k in file if not k.startswith(("transformer.", "text_encoder."))]
    missing, unexpected = sorted(loaded.keys() - ours.keys()), sorted(ours.keys() - loaded.keys()) + ignored
    if missing or unexpected:
        raise SystemExit(f"error: missing from the file: {missing}; not taken by the model: {unexpected}")
    different = [k for k in ours if not torch.equal(ours[k].to(loaded[k].dtype), loaded[k])]
    if different:
        raise SystemExit(f"error: changed while loading: {different}")
    return "every tensor of the file is in the model, unchanged, and no other"


def fused_keys(transformer):
    """One adapted weight per kind of block and first letter of its name: enough to test merging."""
    picked = {}
    for name, module in transformer.named_modules():
        if hasattr(module, "lora_A"):
            picked.setdefault((name.split(".")[0], name.split(".")[-1][:4]), f"{name}.weight")
    return list(picked.values())[:6]


def run(pipeline, inputs, dtype):
    transformer = pipeline.transformer.to(dtype).eval()
    out = {}
    transformer.disable_adapters()
    out["sample_base"] = run_transformer(transformer, inputs)
    transformer.enable_adapters()
    for name, weight in ("sample", 1.0), ("sample_0.6", 0.6):
        transformer.set_adapters(["default"], [weight])
        out[name] = run_transformer(transformer, inputs)
    return out


def fused(pipeline, inputs):
    """Merging is last: it changes the pipeline's weights."""
    transformer, keys = pipeline.transformer, fused_keys(pipeline.transformer)
    transformer.set_adapters(["default"], [1.0])
    transformer.fuse_lora(lora_scale=1.0)
    transformer.unload_lora()
    weights = transformer.state_dict()
    return {"sample_fused": run_transformer(transformer, inputs), **{f"fused.{k}": weights[k].clone() for k in keys}}


def open_pipeline(model_dir):
    return DiffusionPipeline.from_pretrained(str(model_dir), torch_dtype=torch.float32)


def flux2_inputs(config, seed, rows, cols, text_len, batch=2):
    g = generator(seed)
    tokens = torch.randn(batch, rows * cols, config.in_channels, generator=g)
    text = torch.randn(batch, text_len, config.joint_attention_dim, generator=g)
    guidance = {"guidance": 1 + 3 * torch.rand(batch, generator=g)} if config.guidance_embeds else {}
    return guidance | {
        "hidden_states": tokens,
        "encoder_hidden_states": text,
        "timestep": torch.rand(batch, generator=g) * 0.9 + 0.05,
        "img_ids": Flux2KleinPipeline._prepare_latent_ids(torch.zeros(1, 1, rows, cols))[0].float(),
        "txt_ids": Flux2KleinPipeline._prepare_text_ids(text)[0].float(),
    }


def main(model_dir, lora_file, out, seed=95):
    model_dir, lora_file, out = Path(model_dir), Path(lora_file), Path(out)
    one_file = out if out.suffix == ".safetensors" else None
    folder = out.with_suffix("") if one_file else out

    pipeline = open_pipeline(model_dir)
    transformer = pipeline.transformer.eval()
    is_flux2 = isinstance(pipeline, (Flux2KleinPipeline, Flux2Pipeline))
    inputs = (flux2_inputs if is_flux2 else transformer_inputs)(transformer.config, seed, rows=3, cols=5, text_len=6)
    with torch.no_grad():
        untouched = run_transformer(transformer, inputs)
    load_strictly(pipeline, lora_file)
    checked = check_every_tensor(pipeline, lora_file)
    config = transformer.peft_config["default"]

    with torch.no_grad():
        expected = run(pipeline, inputs, torch.float32)
        if not torch.equal(expected["sample_base"], untouched):
            raise SystemExit("error: the model without the adapter is not the model from before")
        change = relative(expected["sample"], untouched)
        if change == 0:
            raise SystemExit("error: the LoRA changes nothing")
        report = f32_against_f64(expected, lambda: run(pipeline, double(inputs), torch.float64))
        pipeline = open_pipeline(model_dir)
        pipeline.transformer.eval()
        load_strictly(pipeline, lora_file)
        expected |= fused(pipeline, inputs)

    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / "lora.safetensors"
    if not copy.exists() or not copy.samefile(lora_file):
        shutil.copyfile(lora_file, copy)
    with safe_open(copy, "pt") as f:
        metadata = f.metadata() or {}
    write_case(
        folder,
        "lora_forward",
        f"{lora_file.name} as diffusers {diffusers.__version__} loads it.",
        {"rel": 1e-4, "rel_if_sinusoid_is_bit_equal": 1e-5, **report, "metric": METRIC},
        inputs,
        expected,
        model={"path": os.path.relpath(model_dir / "transformer", folder), "class": type(transformer).__name__},
        **({"family": "flux2"} if is_flux2 else {}),
        lora={"default": describe_adapter(config, "lora.safetensors")},
        weight_sets={"sample": {"default": 1.0}, "sample_0.6": {"default": 0.6}},
        checks={"loading": checked, "rel_change_from_base": {"sample": round(change, 4)}},
        safetensors_metadata={"default": metadata},
        notes="sample_base: no adapter. sample_fused: fuse_lora(1.0) with the first weight set. fused.<key>: merged weight under its diffusers name.",
    )
    if one_file:
        save_file({**inputs, "base": expected["sample_base"], "sample": expected["sample"]}, one_file)
    print(f"{checked}; the output moves by {change:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir")
    parser.add_argument("lora_file")
    parser.add_argument("out")
    parser.add_argument("--seed", type=int, default=95)
    sys.exit(main(**vars(parser.parse_args())))
