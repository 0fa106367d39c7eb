"""Every form that `flux-lora convert --to all` writes, in the program that reads it: the same picture to 1e-4.

    python written_forms.py FLUX_LORA_BINARY [FLUX.1 | FLUX.2 | CLIP]

FLUX.1: makes a transformer of FLUX.1-dev's width (3072; diffusers' kohya reader has that size built in) with one double and one
single block, and a LoRA with alpha unlike its rank. diffusers loads the diffusers and kohya forms, PEFT the folder, and
each must give the output of the adapter it came from. ComfyUI is not a package: its form is compared key by key with
what its loader accepts, and its deltas with the adapter's.

FLUX.2: trains a LoRA of every linear layer on the tiny klein pipeline of the reference cases with `flux-lora train`,
which exports every form. Flux2KleinPipeline loads the diffusers, kohya and ComfyUI forms, PEFT the folder. Layers that
the table of `flux-lora` says diffusers drops or takes for something else are left out of the comparison of that form, and
are shown to be dropped: with all layers the output is another. At last our own output with the trained LoRA is compared with
diffusers', as a case of kind `lora_forward`.

CLIP: trains a LoRA of the transformer and of CLIP on the tiny FLUX.1 pipeline of the reference cases. FluxPipeline loads the run's
file, and what its `encode_prompt` gives is compared with our CLIP and T5 after `flux-lora merge` of the same file, as cases of
kind `clip_text` and `t5_encoder`. torch 2.11.0, diffusers 0.38.0, peft 0.19.1.
"""

import copy
import json
import logging
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import Flux2KleinPipeline, FluxPipeline
from peft import LoraConfig, PeftModel
from PIL import Image
from transformers import CLIPTextModel

from common import (
    PARITY,
    SCRIPT_TARGETS,
    generator,
    load_file,
    relative,
    run_transformer,
    save_adapter,
    save_file,
    tiny_transformer,
    transformer_inputs,
    write_case,
)
from load_in_diffusers import load_strictly

WIDTH, MLP, RANK, ALPHA = 3072, 12288, 4, 6
TARGETS = [*SCRIPT_TARGETS, "proj_mlp", "single_transformer_blocks.0.proj_out", "norm1.linear", "norm.linear"]
TOLERANCE = 1e-4

# What ComfyUI's loader takes below `diffusion_model.`: module, shape [out, in], and the diffusers modules it stacks
COMFYUI = {
    "double_blocks.0.img_attn.qkv": (3 * WIDTH, WIDTH, ["attn.to_q", "attn.to_k", "attn.to_v"]),
    "double_blocks.0.txt_attn.qkv": (3 * WIDTH, WIDTH, ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]),
    "double_blocks.0.img_attn.proj": (WIDTH, WIDTH, ["attn.to_out.0"]),
    "double_blocks.0.txt_attn.proj": (WIDTH, WIDTH, ["attn.to_add_out"]),
    "double_blocks.0.img_mlp.0": (MLP, WIDTH, ["ff.net.0.proj"]),
    "double_blocks.0.img_mlp.2": (WIDTH, MLP, ["ff.net.2"]),
    "double_blocks.0.txt_mlp.0": (MLP, WIDTH, ["ff_context.net.0.proj"]),
    "double_blocks.0.txt_mlp.2": (WIDTH, MLP, ["ff_context.net.2"]),
    "double_blocks.0.img_mod.lin": (6 * WIDTH, WIDTH, ["norm1.linear"]),
    "single_blocks.0.linear1": (3 * WIDTH + MLP, WIDTH, ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]),
    "single_blocks.0.linear2": (WIDTH, WIDTH + MLP, ["proj_out"]),
    "single_blocks.0.modulation.lin": (3 * WIDTH, WIDTH, ["norm.linear"]),
}


def adapted(base):
    transformer = copy.deepcopy(base)
    transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, init_lora_weights="gaussian", target_modules=TARGETS))
    g = generator(303)
    with torch.no_grad():
        for name, p in sorted(transformer.named_parameters()):
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=g) * 0.1)
    return transformer


def in_diffusers(base, file):
    transformer = copy.deepcopy(base)
    load_strictly(FluxPipeline(None, None, None, None, None, None, transformer), file)
    return transformer


def check_comfyui(file, lora):
    """Exactly the keys and shapes that ComfyUI takes, and the deltas of the diffusers file."""
    tensors = load_file(file)
    worst = 0.0
    for module, (out, inputs, parts) in COMFYUI.items():
        key = f"diffusion_model.{module}"
        down, up, alpha = (tensors.pop(key + s) for s in (".lora_down.weight", ".lora_up.weight", ".alpha"))
        assert (up.shape[0], down.shape[1]) == (out, inputs) and up.shape[1] == down.shape[0], (key, up.shape, down.shape)
        assert alpha.shape == () and alpha.is_floating_point(), (key, alpha)
        block = "transformer.single_transformer_blocks.0." if module.startswith("single") else "transformer.transformer_blocks.0."
        a, b = ([lora[f"{block}{p}.lora_{x}.weight"] for p in parts] for x in "AB")
        expected = torch.cat([ALPHA / RANK * (b @ a) for a, b in zip(a, b)])
        worst = max(worst, relative(alpha.item() / down.shape[0] * (up @ down), expected))
    assert not tensors, f"keys that ComfyUI does not know: {sorted(tensors)}"
    return worst


def flux1(program):
    base = tiny_transformer(301, num_layers=1, num_single_layers=1, guidance_embeds=True).eval()
    inputs = transformer_inputs(base.config, 302, rows=3, cols=4, text_len=6, batch=1)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        folder = Path(folder)
        transformer = adapted(base)
        save_adapter(transformer, folder / "lora.safetensors")
        expected, untouched = run_transformer(transformer, inputs), run_transformer(base, inputs)
        del transformer
        subprocess.run([program, "convert", folder / "lora.safetensors", folder / "out.safetensors", "--to", "all"], check=True)
        readers = {
            "diffusers": lambda: in_diffusers(base, folder / "out-diffusers.safetensors"),
            "kohya": lambda: in_diffusers(base, folder / "out-kohya.safetensors"),
            "peft": lambda: PeftModel.from_pretrained(copy.deepcopy(base), str(folder / "out-peft")).base_model.model,
        }
        errors = {name: relative(run_transformer(read(), inputs), expected) for name, read in readers.items()}
        errors["comfyui (deltas)"] = check_comfyui(folder / "out-comfyui.safetensors", load_file(folder / "lora.safetensors"))
    return relative(expected, untouched), errors


# ---- FLUX.2 ---------------------------------------------------------------------------------------------------------

DISTILLED = PARITY / "flux2_pipeline_distilled" / "model"
# What diffusers does not load of a form, or takes for something else; `flux-lora`'s table says the same
LOST = {
    "kohya": ("double_stream_modulation", "single_stream_modulation", "norm_out"),
    "comfyui": ("norm_out",),
}
RUN = """
[model]
path = "{model}"

[dataset]
path = "{folder}/pictures"
resolution = 64

[lora]
r = 4
lora_alpha = 6
target_modules = "all-linear"

[optimizer]
learning_rate = {rate}

[train]
steps = 4
batch_size = 1

[export]
formats = ["diffusers", "peft", "kohya", "comfyui"]
"""


def klein(folder):
    """The tiny pipeline as a base model, which is what one trains."""
    shutil.copytree(DISTILLED, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "is_distilled": False}))
    return folder


def klein_inputs(config, seed):
    g = generator(seed)
    rows, cols, text = 3, 4, 6
    img_ids = torch.tensor([[0, row, col, 0] for row in range(rows) for col in range(cols)]).float()
    txt_ids = torch.tensor([[0, 0, 0, i] for i in range(text)]).float()
    return {
        "hidden_states": torch.randn(2, rows * cols, config["in_channels"], generator=g),
        "encoder_hidden_states": torch.randn(2, text, config["joint_attention_dim"], generator=g),
        "timestep": torch.rand(2, generator=g) * 0.9 + 0.05,
        "img_ids": img_ids,
        "txt_ids": txt_ids,
    }


def train(program, model, folder, rate=0.05, more=""):
    """A LoRA of every linear layer of the tiny pipeline, in every form."""
    pictures = folder / "pictures"
    pictures.mkdir()
    g = generator(304)
    for name in "ab":
        Image.fromarray(torch.randint(0, 256, (64, 64, 3), generator=g, dtype=torch.uint8).numpy()).save(pictures / f"{name}.png")
        (pictures / f"{name}.txt").write_text(f"a picture {name}")
    (folder / "run.toml").write_text(RUN.format(folder=folder, model=model, rate=rate) + more)
    subprocess.run([program, "train", folder / "run.toml", "--output", folder / "run", "--device", "flex"], check=True)
    return folder / "run" / "lora.safetensors"


def without(lora, layers, path):
    """The LoRA without the layers whose names contain one of `layers`, in diffusers' form."""
    save_file({k: v for k, v in load_file(lora).items() if not any(layer in k for layer in layers)}, path)
    return path


def in_klein(model, file):
    pipeline = Flux2KleinPipeline.from_pretrained(model, torch_dtype=torch.float32)
    if file.is_dir():
        return PeftModel.from_pretrained(pipeline.transformer, str(file)).base_model.model.eval()
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="default")
    return pipeline.transformer.eval()


def flux2(program):
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        folder = Path(folder)
        model = klein(folder / "klein")
        lora = train(program, model, folder)
        forms = {form: lora.with_name(f"lora-{form}.safetensors") for form in ("kohya", "comfyui")}
        forms = {"diffusers": lora, "peft": lora.with_name("lora-peft"), **forms}
        untouched = Flux2KleinPipeline.from_pretrained(model, torch_dtype=torch.float32).transformer.eval()
        inputs = klein_inputs(untouched.config, 305)
        base, whole = run_transformer(untouched, inputs), run_transformer(in_klein(model, lora), inputs)
        errors = {}
        for form, file in forms.items():
            lost = LOST.get(form, ())
            if lost:
                kept = without(lora, lost, folder / f"{form}-kept.safetensors")
                part = folder / f"{form}-part.safetensors"
                subprocess.run([program, "convert", kept, part, "--to", form, "--model", model], check=True)
                expected = run_transformer(in_klein(model, kept), inputs)
                errors[form] = relative(run_transformer(in_klein(model, part), inputs), expected)
                difference = relative(run_transformer(in_klein(model, file), inputs), whole)
                assert difference > TOLERANCE, f"diffusers loads {lost} of the {form} form after all"
            else:
                errors[form] = relative(run_transformer(in_klein(model, file), inputs), whole)
        sets = {"sample": {"default": 1.0}}
        case = folder / "case"
        case.mkdir()
        (case / "lora.safetensors").write_bytes(lora.read_bytes())
        write_case(
            case, "lora_forward", "A LoRA trained here, in diffusers.", {"rel": TOLERANCE}, inputs, {"sample_base": base, "sample": whole},
            family="flux2", model={"path": str(model / "transformer"), "class": "Flux2Transformer2DModel"},
            lora={"default": {"file": "lora.safetensors"}}, weight_sets=sets,
        )
        subprocess.run([program, "parity", case], check=True)
    return relative(whole, base), errors


# ---- FLUX.1 with CLIP -----------------------------------------------------------------------------------------------

PROMPTS = ["a picture a", "", "a photograph of two lighthouses in the fog"]


def clip(program):
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        folder = Path(folder)
        model = PARITY / "pipeline_dev" / "model"
        lora = train(program, model, folder, 0.01, "\n[lora.text_encoder]\nlora_alpha = 3\n")
        pipeline = FluxPipeline.from_pretrained(model, torch_dtype=torch.float32)
        ids = {
            "clip": pipeline.tokenizer(PROMPTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids,
            "t5": pipeline.tokenizer_2(PROMPTS, padding="max_length", max_length=16, truncation=True, return_tensors="pt").input_ids,
        }

        def encoded():
            embeds, pooled, _ = pipeline.encode_prompt(PROMPTS, PROMPTS, max_sequence_length=16)
            return pipeline.text_encoder(ids["clip"]).last_hidden_state, pooled, embeds

        _, untouched, _ = encoded()
        load_strictly(pipeline, lora)
        last, pooled, embeds = encoded()
        merged = folder / "merged"
        subprocess.run([program, "merge", "--model", model, "--lora", lora, "--out", merged], check=True)
        cases = {
            "clip_text": ("text_encoder", "CLIPTextModel", ids["clip"], {"last_hidden_state": last, "pooled": pooled}),
            "t5_encoder": ("text_encoder_2", "T5EncoderModel", ids["t5"], {"last_hidden_state": embeds}),
        }
        for kind, (encoder, name, tokens, expected) in cases.items():
            case = folder / kind
            case.mkdir()
            write_case(
                case, kind, "A prompt as FluxPipeline encodes it with a LoRA trained here.", {"rel": TOLERANCE},
                {"input_ids": tokens}, expected, model={"path": str(merged / encoder), "class": name},
            )
            subprocess.run([program, "parity", case], check=True)
        weights = CLIPTextModel.from_pretrained(merged / "text_encoder").eval()
        errors = {"merged, in transformers": relative(weights(ids["clip"]).pooler_output, pooled)}
    return relative(pooled, untouched), errors


def main(program, *names):
    logging.disable(logging.INFO)
    torch.set_num_threads(2)
    families = {"FLUX.1": flux1, "FLUX.2": flux2, "CLIP": clip}
    worst = 0.0
    for name in names or families:
        moved, errors = families[name](program)
        print(f"{name}: the LoRA moves the output by {moved:.3f}")
        for form, error in errors.items():
            print(f"{name} {form:23s} {error:.3e} {'ok' if error < TOLERANCE else 'FAIL'}")
        worst = max(worst, *errors.values())
    sys.exit(worst >= TOLERANCE)


if __name__ == "__main__":
    main(*sys.argv[1:])
