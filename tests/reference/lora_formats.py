"""Cases of kind `lora_format`: one small FLUX LoRA in the spelling of each producer, below tests/fixtures/parity/lora_zoo.

    python lora_formats.py [OUT_DIR]

Every file is written here from the description of its format, not by the program under test. What it must do is computed
by adding its deltas to the weights; where diffusers or PEFT can read the format, they must agree with that sum.
torch 2.11.0, diffusers 0.38.0, peft 0.19.1, transformers 4.57.6. The model is that of the case `pipeline_dev`.
"""

import copy
import json
import logging
import math
import sys
from pathlib import Path

import torch
from diffusers import FluxPipeline
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model

from common import PARITY, adapter_metadata, generator, load_file, relative, run_transformer, save_file, sig, transformer_inputs, write_case

MODEL = PARITY / "pipeline_dev" / "model"
H, MLP = 48, 192
DOUBLES, SINGLES = 2, 3

# ---- names ----------------------------------------------------------------------------------------------------------

# BFL module -> diffusers modules whose rows it stacks
FUSED = {}
for i in range(DOUBLES):
    b, d = f"double_blocks.{i}", f"transformer_blocks.{i}"
    FUSED |= {
        f"{b}.img_attn.qkv": [f"{d}.attn.to_{x}" for x in "qkv"],
        f"{b}.txt_attn.qkv": [f"{d}.attn.add_{x}_proj" for x in "qkv"],
        f"{b}.img_attn.proj": [f"{d}.attn.to_out.0"],
        f"{b}.txt_attn.proj": [f"{d}.attn.to_add_out"],
        f"{b}.img_mlp.0": [f"{d}.ff.net.0.proj"],
        f"{b}.img_mlp.2": [f"{d}.ff.net.2"],
        f"{b}.txt_mlp.0": [f"{d}.ff_context.net.0.proj"],
        f"{b}.txt_mlp.2": [f"{d}.ff_context.net.2"],
        f"{b}.img_mod.lin": [f"{d}.norm1.linear"],
        f"{b}.txt_mod.lin": [f"{d}.norm1_context.linear"],
    }
for i in range(SINGLES):
    b, d = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
    FUSED |= {
        f"{b}.linear1": [f"{d}.attn.to_{x}" for x in "qkv"] + [f"{d}.proj_mlp"],
        f"{b}.linear2": [f"{d}.proj_out"],
        f"{b}.modulation.lin": [f"{d}.norm.linear"],
    }
DOUBLE = [m for m in FUSED if m.startswith("double")]  # diffusers' kohya reader has the full size of linear1 built in
BLOCKS = list(FUSED)
FUSED |= {
    "img_in": ["x_embedder"],
    "txt_in": ["context_embedder"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
    "final_layer.linear": ["proj_out"],
}
for bfl, own in ("time_in", "timestep_embedder"), ("vector_in", "text_embedder"), ("guidance_in", "guidance_embedder"):
    FUSED |= {
        f"{bfl}.in_layer": [f"time_text_embed.{own}.linear_1"],
        f"{bfl}.out_layer": [f"time_text_embed.{own}.linear_2"],
    }
SWAPPED = "final_layer.adaLN_modulation.1"  # BFL rows are (shift, scale), diffusers' (scale, shift)
CLIP = "text_model.encoder.layers.{}.self_attn.q_proj"


def flat(module):
    return module.replace(".", "_")


def swap(rows):
    first, second = rows.chunk(2)
    return torch.cat([second, first])


class Zoo:
    """The model, its weight shapes, and one file in the making."""

    def __init__(self, out):
        self.out = out
        self.pipeline = FluxPipeline.from_pretrained(str(MODEL), torch_dtype=torch.float32)
        self.weights = {k.removesuffix(".weight"): v for k, v in self.pipeline.transformer.state_dict().items()}
        self.clip = self.pipeline.text_encoder
        self.inputs = transformer_inputs(self.pipeline.transformer.config, 211, rows=3, cols=4, text_len=6)
        self.ids = torch.randint(3, 700, (2, 12), generator=generator(212))
        self.ids[:, -1] = self.clip.config.eos_token_id

    def shape(self, module):
        """[out, in] of a diffusers module, or of a BFL module that stacks some."""
        parts = [self.weights[m].shape for m in FUSED.get(module, [module])]
        return sum(s[0] for s in parts), parts[0][1]

    def factors(self, module, rank, g, gain=0.4):
        """Random A [rank, in] and B [out, rank]."""
        out, inputs = self.shape(module)
        a = torch.randn(rank, inputs, generator=g) / math.sqrt(inputs)
        return a, torch.randn(out, rank, generator=g) * gain / math.sqrt(rank)

    def split(self, deltas):
        """Deltas (or bias deltas) of BFL modules as those of diffusers modules."""
        found = {}
        for module, delta in deltas.items():
            parts = FUSED[module]
            delta = swap(delta) if module == SWAPPED else delta
            rows = delta.split([self.weights[p].shape[0] for p in parts])
            found |= dict(zip(parts, rows))
        return found

    def merged(self, deltas, biases=None, strength=1.0, replaced=None):
        """A transformer with deltas added, or with whole weights replaced."""
        model = copy.deepcopy(self.pipeline.transformer)
        state = model.state_dict()
        for module, delta in deltas.items():
            state[f"{module}.weight"] += strength * delta.float()
        for module, delta in (biases or {}).items():
            state[f"{module}.bias"] += strength * delta.float()
        for module, weight in (replaced or {}).items():
            state[f"{module}.weight"].copy_(weight)
        return model

    def clip_outputs(self, deltas, strength=1.0):
        model = copy.deepcopy(self.clip)
        state = model.state_dict()
        for module, delta in deltas.items():
            state[f"{module}.weight"] += strength * delta
        out = model(self.ids)
        return {"clip_last_hidden_state": out.last_hidden_state, "clip_pooled": out.pooler_output}

    def write(self, name, description, tensors, deltas, *, biases=None, clip=None, replaced=None, metadata=None, config=None, reader="diffusers", strengths=True):
        """Computes what the file must do, checks it with diffusers or PEFT, and writes the case."""
        folder = self.out / name
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.contiguous().clone() for k, v in tensors.items()}
        metadata = {"format": "pt", **(metadata or {})}
        inputs, file = dict(self.inputs), "lora.safetensors"
        with torch.no_grad():
            expected = {"sample": run_transformer(self.merged(deltas, biases, 1.0, replaced), self.inputs)}
            if strengths:
                expected["sample_0.6"] = run_transformer(self.merged(deltas, biases, 0.6), self.inputs)
            if clip:
                inputs["input_ids"] = self.ids
                expected |= self.clip_outputs(clip)
            base = run_transformer(self.pipeline.transformer, self.inputs)
        if config is None:
            save_file(tensors, folder / file, metadata)
        else:
            file = "adapter"
            (folder / file).mkdir(exist_ok=True)
            save_file(tensors, folder / file / "adapter_model.safetensors", metadata)
            (folder / file / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
        checks = {"rel_change_from_base": sig(relative(expected["sample"], base))}
        if reader != "none":
            error = self.check(folder / file, reader, expected)
            assert error < 5e-6, (name, error)
            checks[f"{reader}_vs_sum_rel"] = sig(error)
        write_case(
            folder,
            "lora_format",
            description,
            {"rel": 2e-5},
            inputs,
            expected,
            model={"path": "../../pipeline_dev/model", "class": "FluxPipeline"},
            lora={"file": file, "metadata": metadata},
            first_keys=sorted(tensors)[:4],
            checks=checks,
        )

    def check(self, path, reader, expected):
        """Largest difference between the sum and what the reader makes of the file."""
        if reader == "peft":
            model = PeftModel.from_pretrained(copy.deepcopy(self.pipeline.transformer), str(path)).base_model.model
            with torch.no_grad():
                return relative(run_transformer(model, self.inputs), expected["sample"])
        pipeline = FluxPipeline.from_pretrained(str(MODEL), torch_dtype=torch.float32)
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="default")
        with torch.no_grad():
            errors = [relative(run_transformer(pipeline.transformer, self.inputs), expected["sample"])]
            if "clip_pooled" in expected:
                errors.append(relative(pipeline.text_encoder(self.ids).pooler_output, expected["clip_pooled"]))
            if "sample_0.6" in expected:
                pipeline.set_adapters(["default"], [0.6])
                errors.append(relative(run_transformer(pipeline.transformer, self.inputs), expected["sample_0.6"]))
        return max(errors)


# ---- the files ------------------------------------------------------------------------------------------------------


def header(component, config):
    """A configuration as lora_adapter_metadata holds it."""
    return {f"{component}.{k}": v for k, v in adapter_metadata(config).items()}


def every_diffusers_linear():
    return [m for parts in FUSED.values() for m in parts]


def diffusers(zoo):
    g = generator(221)
    tensors, deltas = {}, {}
    for module in every_diffusers_linear():
        a, b = zoo.factors(module, 2, g)
        tensors |= {f"transformer.{module}.lora_A.weight": a, f"transformer.{module}.lora_B.weight": b}
        deltas[module] = b @ a
    zoo.write("diffusers_everything", "diffusers keys on every linear, embedders and norm_out included; no alpha anywhere.", tensors, deltas)

    tensors, deltas = {}, {}
    for n, module in enumerate(m for b in BLOCKS for m in FUSED[b] if "attn" in m and "double" in b):
        rank, alpha = 2 + n % 3, (3.0, 1.0, 5.0)[n % 3]
        a, b = zoo.factors(module, rank, g)
        tensors |= {
            f"transformer.{module}.lora_A.weight": a,
            f"transformer.{module}.lora_B.weight": b,
            f"transformer.{module}.alpha": torch.tensor(alpha),
        }
        deltas[module] = alpha / rank * (b @ a)
    zoo.write("diffusers_alpha", "diffusers keys with an alpha tensor and a rank of its own for every layer.", tensors, deltas)

    tensors, deltas = {}, {}
    spellings = {"to_q": "{}_lora.{}.weight", "to_k": "{}.lora.{}.weight", "to_v": "{}.lora_linear_layer.{}.weight", "to_out.0": "{}_lora.{}.weight"}
    for i in range(DOUBLES):
        for own, spelling in spellings.items():
            module = f"transformer_blocks.{i}.attn.{own}"
            a, b = zoo.factors(module, 3, g)
            written = module.removesuffix(".0") if "_lora." in spelling else module
            tensors |= {"transformer." + spelling.format(written, x): t for x, t in (("down", a), ("up", b))}
            deltas[module] = b @ a
    zoo.write("diffusers_old", "The oldest diffusers spellings: to_q_lora.down, to_k.lora.down, to_v.lora_linear_layer.down, to_out_lora.", tensors, deltas, reader="none")

    config = LoraConfig(r=4, lora_alpha=6, use_rslora=True, rank_pattern={"to_k": 2, "^proj_out": 3}, alpha_pattern={"proj_out": 5}, target_modules=["to_q", "to_k", "proj_out"])
    tensors, deltas = {}, {}
    for module in every_diffusers_linear():
        own = module.rsplit(".")[-1]
        if own not in ("to_q", "to_k", "proj_out"):
            continue
        rank = 3 if module == "proj_out" else 2 if own == "to_k" else 4
        alpha = 5 if own == "proj_out" else 6
        a, b = zoo.factors(module, rank, g, gain=0.2)
        tensors |= {f"transformer.{module}.lora_A.weight": a, f"transformer.{module}.lora_B.weight": b}
        deltas[module] = alpha / math.sqrt(rank) * (b @ a)
    fields = header("transformer", config)
    zoo.write("diffusers_patterns", "rsLoRA with rank and alpha patterns, all of it only in lora_adapter_metadata.", tensors, deltas, metadata={"lora_adapter_metadata": json.dumps(fields)})

    for name, suffix, reader in (
        ("diffusers_dora", "lora_magnitude_vector", "diffusers"),
        ("onetrainer_diffusers_dora", "lora_magnitude_vector.weight", "none"),
        ("ai_toolkit_dora", "magnitude", "none"),
    ):
        tensors, replaced = {}, {}
        for module in [f"{b}.attn.to_{x}" for b in ("transformer_blocks.1", "single_transformer_blocks.0") for x in "qkv"]:
            a, b = zoo.factors(module, 4, g)
            direction = zoo.weights[module] + b @ a
            magnitude = zoo.weights[module].norm(dim=1) * (1 + 0.3 * torch.randn(b.shape[0], generator=g))
            tensors |= {f"transformer.{module}.lora_A.weight": a, f"transformer.{module}.lora_B.weight": b, f"transformer.{module}.{suffix}": magnitude}
            replaced[module] = magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)
        zoo.write(name, f"DoRA, magnitudes as .{suffix} [out].", tensors, {}, replaced=replaced, reader=reader, strengths=False)

    tensors, deltas, clip = {}, {}, {}
    for module in [f"transformer_blocks.{i}.attn.to_q" for i in range(DOUBLES)]:
        a, b = zoo.factors(module, 3, g)
        tensors |= {f"transformer.{module}.lora_A.weight": a, f"transformer.{module}.lora_B.weight": b}
        deltas[module] = 2 * (b @ a)
    for module in (CLIP.format(0), CLIP.format(1)):
        a, b = torch.randn(2, 24, generator=g) / 5, torch.randn(24, 2, generator=g)
        tensors |= {f"text_encoder.{module}.lora_A.weight": a, f"text_encoder.{module}.lora_B.weight": b}
        clip[module] = 2.5 * (b @ a)
    fields = header("transformer", LoraConfig(r=3, lora_alpha=6, target_modules=["to_q"]))
    fields |= header("text_encoder", LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj"]))
    zoo.write("diffusers_text_encoder", "transformer and text_encoder, each with its alpha in lora_adapter_metadata.", tensors, deltas, clip=clip, metadata={"lora_adapter_metadata": json.dumps(fields)})


def kohya(zoo):
    def modules(names, g, ranks, alphas, prefix="lora_unet_", name=flat, down=".lora_down.weight", up=".lora_up.weight", dtype=torch.float32):
        tensors, deltas = {}, {}
        for n, module in enumerate(names):
            rank, alpha = ranks[n % len(ranks)], alphas[n % len(alphas)]
            a, b = (t.to(dtype) for t in zoo.factors(module, rank, g))
            key = prefix + name(module)
            tensors |= {key + down: a, key + up: b}
            if alpha is not None:
                tensors[key + ".alpha"] = torch.tensor(alpha).to(dtype)
            deltas[module] = (rank if alpha is None else alpha) / rank * (b.float() @ a.float())
        return tensors, zoo.split(deltas)

    g = generator(231)
    tensors, deltas = modules(BLOCKS, g, (4, 2, 6), (4.0, 1.0), dtype=torch.bfloat16)
    metadata = {"ss_network_module": "networks.lora_flux", "ss_network_dim": "4", "ss_network_alpha": "4.0", "ss_base_model_version": "flux1"}
    zoo.write("kohya_bf16_mixed_ranks", "kohya in bf16, every linear of all blocks, ranks 4, 2, 6, alpha 4, 1.", tensors, deltas, metadata=metadata, reader="none")

    tensors, deltas = modules(BLOCKS[:12:3], g, (3,), (None,))
    zoo.write("kohya_without_alpha", "kohya keys without any alpha: scale 1.", tensors, deltas, reader="none")

    tensors, deltas = modules([m for m in FUSED if m not in BLOCKS], g, (4,), (6.0,))
    zoo.write("kohya_outside_blocks", "kohya keys of the embedders and the final layer, whose adaLN halves are exchanged.", tensors, deltas, reader="none")

    tensors, deltas = modules(BLOCKS[:2], g, (4,), (2.0,))
    clip = {}
    # diffusers 0.38 loses the attention layers of CLIP in kohya files, without a word; it reads these
    for module in ("text_model.encoder.layers.0.mlp.fc1", "text_model.encoder.layers.1.mlp.fc2"):
        out, inputs = zoo.clip.state_dict()[f"{module}.weight"].shape
        a, b = torch.randn(2, inputs, generator=g) / 5, torch.randn(out, 2, generator=g)
        tensors |= {f"lora_te1_{flat(module)}.lora_down.weight": a, f"lora_te1_{flat(module)}.lora_up.weight": b, f"lora_te1_{flat(module)}.alpha": torch.tensor(1.0)}
        clip[module] = 0.5 * (b @ a)
    t5 = zoo.pipeline.text_encoder_2.state_dict()["encoder.block.0.layer.0.SelfAttention.q.weight"].shape
    key = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    tensors |= {key + ".lora_down.weight": torch.randn(2, t5[1], generator=g), key + ".lora_up.weight": torch.randn(t5[0], 2, generator=g), key + ".alpha": torch.tensor(2.0)}
    zoo.write("kohya_text_encoders", "kohya with CLIP (lora_te1_) and T5 (lora_te3_) keys.", tensors, deltas, clip=clip)

    tensors, deltas = {}, {}
    for module in BLOCKS:
        parts = FUSED[module]
        if len(parts) == 1:
            continue
        pieces = [zoo.factors(p, 2, g) for p in parts]
        a, b = torch.cat([a for a, _ in pieces]), torch.block_diag(*[b for _, b in pieces])
        key = "lora_unet_" + flat(module)
        tensors |= {key + ".lora_down.weight": a, key + ".lora_up.weight": b, key + ".alpha": torch.tensor(2.0)}
        deltas[module] = 2.0 / a.shape[0] * (b @ a)
    zoo.write("kohya_split_qkv", "kohya split_qkv: block-diagonal up, rank 3r and 4r with the alpha of r.", tensors, zoo.split(deltas), metadata={"ss_network_args": json.dumps({"split_qkv": "True"})}, reader="none")

    tensors, replaced = {}, {}
    for module in BLOCKS[:3] + ["single_blocks.1.linear1"]:
        a, b = zoo.factors(module, 4, g)
        base = torch.cat([zoo.weights[p] for p in FUSED[module]])
        direction = base + 0.5 * (b @ a)
        scale = base.norm(dim=1, keepdim=True) * (1 + 0.3 * torch.randn(b.shape[0], 1, generator=g))
        key = "lora_unet_" + flat(module)
        tensors |= {key + ".lora_down.weight": a, key + ".lora_up.weight": b, key + ".alpha": torch.tensor(2.0), key + ".dora_scale": scale}
        replaced |= zoo.split({module: scale * direction / direction.norm(dim=1, keepdim=True)})
    zoo.write("kohya_dora", "kohya keys with LyCORIS' output-axis dora_scale [out, 1] on fused layers.", tensors, {}, replaced=replaced, reader="none", strengths=False)

    tensors, deltas = modules(DOUBLE, g, (4,), (8.0,), prefix="diffusion_model.", name=str)
    zoo.write("comfyui_down_up", "ComfyUI keys with lora_down, lora_up and alpha.", tensors, deltas)

    tensors, deltas = modules(list(FUSED), g, (2,), (None,), prefix="diffusion_model.", name=str, down=".lora_A.weight", up=".lora_B.weight")
    biases = {}
    for module in BLOCKS[2:4]:
        biases[module] = 0.2 * torch.randn(zoo.shape(module)[0], generator=g)
        tensors[f"diffusion_model.{module}.diff_b"] = biases[module]
    key = "text_encoders.clip_l.transformer." + CLIP.format(1)
    a, b = torch.randn(2, 24, generator=g) / 5, torch.randn(24, 2, generator=g)
    tensors |= {key + ".lora_A.weight": a, key + ".lora_B.weight": b}
    zoo.write("comfyui_a_b", "ComfyUI keys with lora_A and lora_B, diff_b on some layers, and CLIP below text_encoders.clip_l.transformer.", tensors, deltas, biases=zoo.split(biases), clip={CLIP.format(1): b @ a}, reader="none")

    tensors, deltas = modules(BLOCKS, g, (4,), (None,), prefix="", name=str, down=".lora_A.weight", up=".lora_B.weight")
    zoo.write("bare_bfl", "BFL names without prefix, lora_A and lora_B, as OneTrainer's ORIGINAL form.", tensors, deltas, reader="none")

    tensors, deltas = modules([m for m in BLOCKS] + ["final_layer.linear"], g, (3,), (None,), prefix="base_model.model.", name=str, down=".lora_A.weight", up=".lora_B.weight")
    biases = {}
    for module in ("double_blocks.0.img_attn.qkv", "final_layer.linear"):
        biases[module] = 0.2 * torch.randn(zoo.shape(module)[0], generator=g)
        tensors[f"base_model.model.{module}.lora_B.bias"] = biases[module]
    zoo.write("fal_kontext", "base_model.model. before BFL names, lora_B.bias on some layers.", tensors, deltas, biases=zoo.split(biases), reader="none")


def others(zoo):
    g = generator(241)
    tensors, deltas = {}, {}
    for i in range(DOUBLES):
        for n, stream in (1, "img"), (2, "txt"):
            for own in ("qkv", "proj"):
                module = f"double_blocks.{i}.{stream}_attn.{own}"
                a, b = zoo.factors(module, 4, g)
                key = f"double_blocks.{i}.processor.{own}_lora{n}"
                tensors |= {key + ".down.weight": a, key + ".up.weight": b}
                deltas[module] = b @ a
    for i in range(SINGLES):
        a, b = torch.randn(4, H, generator=g) / math.sqrt(H), torch.randn(3 * H, 4, generator=g) / 5
        key = f"single_blocks.{i}.processor"
        tensors |= {key + ".qkv_lora.down.weight": a, key + ".qkv_lora.up.weight": b}
        deltas[f"single_blocks.{i}.linear1"] = torch.cat([b @ a, torch.zeros(MLP, H)])
        a, b = zoo.factors(f"single_blocks.{i}.linear2", 4, g)
        tensors |= {key + ".proj_lora.down.weight": a, key + ".proj_lora.up.weight": b}
        deltas[f"single_blocks.{i}.linear2"] = b @ a
    zoo.write("xlabs", "XLabs: processor.qkv_lora1 and so on; single blocks cover only the q, k, v rows of linear1.", tensors, zoo.split(deltas), reader="none")

    tensors, replaced, clip = {}, {}, {}
    for module in [m for b in BLOCKS[:8] for m in FUSED[b]]:
        a, b = zoo.factors(module, 3, g)
        direction = zoo.weights[module] + 2 / 3 * (b @ a)
        scale = zoo.weights[module].norm(dim=0, keepdim=True) * (1 + 0.3 * torch.randn(1, a.shape[1], generator=g))
        key = "lora_transformer_" + flat(module)
        tensors |= {key + ".lora_down.weight": a, key + ".lora_up.weight": b, key + ".alpha": torch.tensor(2.0), key + ".dora_scale": scale}
        replaced[module] = scale * direction / direction.norm(dim=0, keepdim=True)
    key = "lora_te1_" + flat(CLIP.format(0))
    a, b = torch.randn(2, 24, generator=g) / 5, torch.randn(24, 2, generator=g)
    tensors |= {key + ".lora_down.weight": a, key + ".lora_up.weight": b, key + ".alpha": torch.tensor(2.0)}
    zoo.write("onetrainer_legacy_dora", "OneTrainer's older form: lora_transformer_ and flat diffusers names, input-axis dora_scale [1, in], CLIP.", tensors, {}, replaced=replaced, clip={CLIP.format(0): b @ a}, reader="none", strengths=False)

    tensors, deltas = {}, {}
    for module in BLOCKS:
        parts = FUSED[module]
        for n, part in enumerate(parts):
            a, b = zoo.factors(part, 2, g)
            key = f"transformer.{module}" + (f".{n}" if len(parts) > 1 else "")
            tensors |= {key + ".lora_down.weight": a, key + ".lora_up.weight": b, key + ".alpha": torch.tensor(3.0)}
            deltas[part] = 1.5 * (b @ a)
    zoo.write("onetrainer_omi", "OneTrainer OMI: BFL names with the part of a fused layer as an index.", tensors, deltas, reader="none")

    tensors, deltas = {}, {}
    for n, module in enumerate(m for b in BLOCKS[:6] for m in FUSED[b]):
        a, b = zoo.factors(module, 2, g)
        prefix = ("", "base_model.model.", "module.", "_orig_mod.")[n % 4]
        tensors |= {f"{prefix}{module}.lora_A.default.weight": a, f"{prefix}{module}.lora_B.default.weight": b}
        deltas[module] = b @ a
    zoo.write("wrapped_names", "Bare diffusers names with an adapter infix, below module., _orig_mod. and base_model.model.", tensors, deltas, reader="none")

    tensors, deltas = {}, {}
    for module in (m for b in BLOCKS[:4] for m in FUSED[b]):
        a, b = zoo.factors(module, 2, g)
        key = f"lora_unet_{flat(module)}_"
        tensors |= {key + ".lora_down.weight": a, key + ".lora_up.weight": b, key + ".alpha": torch.tensor(1, dtype=torch.int64)}
        deltas[module] = 0.5 * (b @ a)
    zoo.write("flat_diffusers_trailing_underscore", "lora_unet_ with diffusers names and a trailing underscore; alpha is int64.", tensors, deltas, reader="none")


def lycoris(zoo):
    g = generator(251)
    normal = lambda *shape: torch.randn(*shape, generator=g)

    def sides(n):
        return max(f for f in range(1, int(math.sqrt(n)) + 1) if n % f == 0)

    tensors, deltas = {}, {}
    for n, module in enumerate(m for b in BLOCKS[:7] for m in FUSED[b]):
        out, inputs = zoo.shape(module)
        a, b = sides(out), sides(inputs)
        key = "lycoris_" + flat(module)
        w1, w2a, w2b = normal(a, b) / 3, normal(out // a, 2) / 4, normal(2, inputs // b) / 4
        if n % 2:
            w1a, w1b = normal(a, 2) / 2, normal(2, b) / 2
            w1 = w1a @ w1b
            tensors |= {key + ".lokr_w1_a": w1a, key + ".lokr_w1_b": w1b}
        else:
            tensors[key + ".lokr_w1"] = w1
        tensors |= {key + ".lokr_w2_a": w2a, key + ".lokr_w2_b": w2b, key + ".alpha": torch.tensor(3.0)}
        deltas[module] = 1.5 * torch.kron(w1, w2a @ w2b)
    zoo.write("lycoris_lokr", "LyCORIS LoKr on diffusers names, w2 factored, w1 full or factored.", tensors, deltas, reader="none")

    tensors, deltas = {}, {}
    for module in BLOCKS[:10]:
        out, inputs = zoo.shape(module)
        a, b = sides(out), sides(inputs)
        key = "lora_unet_" + flat(module)
        w1, w2a, w2b = normal(a, b) / 3, normal(out // a, 2) / 4, normal(2, inputs // b) / 4
        tensors |= {key + ".lokr_w1": w1, key + ".lokr_w2_a": w2a, key + ".lokr_w2_b": w2b, key + ".alpha": torch.tensor(1.0)}
        deltas[module] = 0.5 * torch.kron(w1, w2a @ w2b)
    zoo.write("kohya_lokr", "lycoris.kohya LoKr on fused BFL names.", tensors, zoo.split(deltas), reader="none")

    tensors, deltas = {}, {}
    for module in (m for b in BLOCKS[:7] for m in FUSED[b]):
        out, inputs = zoo.shape(module)
        w1, w2 = normal(4, 4) / 4, normal(out // 4, inputs // 4) / 12
        tensors |= {f"transformer.{module}.lokr_w1": w1, f"transformer.{module}.lokr_w2": w2, f"transformer.{module}.alpha": torch.tensor(9999999999.0)}
        deltas[module] = torch.kron(w1, w2)
    zoo.write("ai_toolkit_lokr", "ai-toolkit LoKr: both factors full, alpha 9999999999, which counts for nothing.", tensors, deltas, reader="none")

    for name, prefix, spell, names in (("lycoris_loha", "lycoris_", flat, None), ("comfyui_loha", "diffusion_model.", str, BLOCKS[:6])):
        tensors, deltas = {}, {}
        for module in names or [m for b in BLOCKS[:6] for m in FUSED[b]]:
            out, inputs = zoo.shape(module)
            w1a, w1b, w2a, w2b = normal(out, 3) / 2, normal(3, inputs) / 3, normal(out, 3) / 2, normal(3, inputs) / 3
            key = prefix + spell(module)
            tensors |= {key + ".hada_w1_a": w1a, key + ".hada_w1_b": w1b, key + ".hada_w2_a": w2a, key + ".hada_w2_b": w2b, key + ".alpha": torch.tensor(1.5)}
            deltas[module] = 0.5 * (w1a @ w1b) * (w2a @ w2b)
        zoo.write(name, f"LyCORIS LoHa below {prefix}.", tensors, zoo.split(deltas) if names else deltas, reader="none")

    tensors, deltas, biases = {}, {}, {}
    for module in BLOCKS[:4]:
        out, inputs = zoo.shape(module)
        deltas[module], biases[module] = normal(out, inputs) / 12, normal(out) / 5
        tensors |= {f"lora_unet_{flat(module)}.diff": deltas[module], f"lora_unet_{flat(module)}.diff_b": biases[module]}
    zoo.write("lycoris_full", "LyCORIS full: .diff and .diff_b.", tensors, zoo.split(deltas), biases=zoo.split(biases), reader="none")


def peft_folders(zoo):
    targets = ["to_q", "to_k", "proj_mlp", "ff.net.2"]
    configs = {
        "peft_dora": LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=targets),
        "peft_rslora_patterns": LoraConfig(r=4, lora_alpha=2, use_rslora=True, rank_pattern={"to_k": 2}, alpha_pattern={"proj_mlp": 3}, target_modules=targets),
        "peft_lora_bias": LoraConfig(r=4, lora_alpha=2, lora_bias=True, target_modules=targets),
        "peft_lokr": LoKrConfig(r=2, alpha=3, target_modules=targets, decompose_both=True),
        "peft_loha": LoHaConfig(r=2, alpha=3, target_modules=targets),
    }
    for name, config in configs.items():
        g = generator(261)
        model = get_peft_model(copy.deepcopy(zoo.pipeline.transformer), config)
        with torch.no_grad():
            for key, p in sorted(model.named_parameters()):
                if "magnitude" in key:
                    p.mul_(1 + 0.3 * torch.randn(p.shape, generator=g))
                elif any(part in key for part in ("lora_", "lokr_", "hada_")):
                    p.copy_(torch.randn(p.shape, generator=g) * (0.2 if "lo" in key else 0.5))
        before = zoo.pipeline.transformer.state_dict()
        merged = copy.deepcopy(model).merge_and_unload().state_dict()
        replaced = {k.removesuffix(".weight"): v for k, v in merged.items() if k.endswith(".weight") and not torch.equal(v, before[k])}
        biases = {k.removesuffix(".bias"): v - before[k] for k, v in merged.items() if k.endswith(".bias") and not torch.equal(v, before[k])}
        saved = zoo.out / name / "saved"
        model.save_pretrained(str(saved))
        tensors = load_file(saved / "adapter_model.safetensors")
        fields = json.loads((saved / "adapter_config.json").read_text())
        for file in saved.iterdir():
            file.unlink()
        saved.rmdir()
        if name == "peft_rslora_patterns":
            del fields["lora_dropout"]
        zoo.write(name, f"A PEFT folder, {config.peft_type.value}.", tensors, {}, replaced=replaced, biases=biases, config=fields, reader="peft", strengths=False)

    g = generator(262)
    tensors, deltas = {}, {}
    for module in [m for b in BLOCKS[:3] for m in FUSED[b]]:
        a, b = zoo.factors(module, 2, g, gain=0.2)
        tensors |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
        deltas[module] = 4 * (b @ a)
    fields = {"peft_type": "LORA", "r": 2, "target_modules": ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"]}
    fields["target_modules"] = r"transformer_blocks\.0\.attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj)"
    zoo.write("peft_default_alpha", "A PEFT folder that does not say lora_alpha: 8.", tensors, deltas, config=fields, reader="peft", strengths=False)


def main(out=None):
    logging.disable(logging.WARNING)
    zoo = Zoo(Path(out) if out else PARITY / "lora_zoo")
    for make in diffusers, kohya, others, lycoris, peft_folders:
        make(zoo)


if __name__ == "__main__":
    main(*sys.argv[1:])
