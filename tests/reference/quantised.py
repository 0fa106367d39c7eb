"""Weights in few bits, made by bitsandbytes itself: `crates/lora-core/tests/fixtures/quantised` and the cases
`transformer_bnb_fp4`, `transformer_bnb_int8` and `t5_bnb_nf4`.

torch 2.11.0, diffusers 0.38.0, transformers 4.57.6, bitsandbytes 0.50.2 (on the CPU). Seeds 61 to 68. Tensors are named as
`save_pretrained` names them: a 4-bit weight is bytes beside its `QuantState`, an 8-bit one has `SCB` and `weight_format`.
"""

import json
import math
from pathlib import Path

import bitsandbytes
import bitsandbytes.functional as bnb
import torch
from transformers import T5Config, T5EncoderModel

from common import (
    FluxTransformer2DModel,
    assert_tolerance,
    case_folder,
    double,
    f32_against_f64,
    generator,
    load_file,
    randomise,
    relative,
    run_transformer,
    save_file,
    tiny_transformer,
    transformer_inputs,
    write_case,
)

FIXTURES = Path(__file__).resolve().parents[2] / "crates" / "lora-core" / "tests" / "fixtures" / "quantised"


def four_bit(name, weight, quant_type, double_quant, blocksize=64, storage=torch.uint8):
    """The tensors of one weight, and what they stand for, in f32.

    A weight is decoded to the dtype it had, which is rounding twice. `dequantize_4bit` on the CPU is not asked: in 0.50.2 it is
    wrong where a row is no whole number of blocks.
    """
    codes, state = bnb.quantize_4bit(
        weight, blocksize=blocksize, compress_statistics=double_quant, quant_type=quant_type, quant_storage=storage
    )
    tensors = {name: codes}
    tensors |= {f"{name}.{k}": v.clone() for k, v in state.as_dict(packed=True).items()}
    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
    packed = codes.view(torch.uint8).flatten()
    values = state.code[torch.stack([packed >> 4, packed & 15], 1).flatten().long()][: weight.numel()]
    values = values * absmax.repeat_interleave(blocksize)[: weight.numel()]
    decoded = values.to(weight.dtype).float().reshape(weight.shape)
    if weight.shape[-1] % blocksize == 0:
        assert torch.equal(decoded, bnb.dequantize_4bit(codes, state).float())
    return tensors, decoded


def eight_bit(name, weight):
    codes, scale, _ = bnb.int8_vectorwise_quant(weight.half())
    module = name.removesuffix(".weight")
    tensors = {name: codes, f"{module}.SCB": scale, f"{module}.weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, bnb.int8_vectorwise_dequant(codes, scale)


def storages():
    """One small weight in every form."""
    g = generator(61)
    tensors = {}
    forms = {
        "nf4_double": dict(shape=(48, 80), quant_type="nf4", double_quant=True),
        "nf4_plain": dict(shape=(48, 80), quant_type="nf4", double_quant=False, blocksize=128),
        "nf4_wide": dict(shape=(130, 300), quant_type="nf4", double_quant=True),  # more than 256 blocks
        "nf4_of_bf16": dict(shape=(16, 128), quant_type="nf4", double_quant=True, dtype=torch.bfloat16),
        "nf4_odd": dict(shape=(5, 7), quant_type="nf4", double_quant=False),
        "fp4_double": dict(shape=(48, 80), quant_type="fp4", double_quant=True),
        "fp4_bf16_storage": dict(shape=(16, 32), quant_type="fp4", double_quant=False, storage=torch.bfloat16, dtype=torch.float16),
    }
    for form, settings in forms.items():
        weight = torch.randn(settings.pop("shape"), generator=g) / 8
        weight = weight.to(settings.pop("dtype", torch.float32))
        parts, decoded = four_bit(f"{form}.weight", weight, **settings)
        tensors |= parts | {f"{form}.source": weight, f"{form}.expected": decoded}
    weight = torch.randn(24, 40, generator=g) / 8
    parts, decoded = eight_bit("int8.weight", weight)
    tensors |= parts | {"int8.source": weight, "int8.expected": decoded}
    tensors["dynamic_map"] = bnb.create_dynamic_map()
    FIXTURES.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, FIXTURES / "bitsandbytes.safetensors")
    print("quantised/bitsandbytes.safetensors")


def quantise(weights, wanted, quantised):
    """The state dict of the saved model, and the one it is decoded to."""
    stored, decoded = {}, {}
    for name, weight in weights.items():
        if weight.ndim == 2 and wanted(name):
            parts, decoded[name] = quantised(name, weight)
            stored |= parts
        else:
            stored[name] = weight.bfloat16()
            decoded[name] = stored[name].float()
    assert len(stored) > len(weights)
    return {k: v.contiguous() for k, v in stored.items()}, decoded


def change_config(folder, bits, **settings):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_8bit": bits == 8,
        "load_in_4bit": bits == 4,
        "llm_int8_threshold": 6.0,
        **settings,
    }
    path.write_text(json.dumps(config, indent=1) + "\n")


def transformer(name, description, seed, bits, quantised, **settings):
    config = dict(
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=12,
        num_attention_heads=3,
        joint_attention_dim=28,
        pooled_projection_dim=20,
        guidance_embeds=True,
        axes_dims_rope=(4, 2, 6),
    )
    model = tiny_transformer(seed, **config)
    inputs = transformer_inputs(model.config, seed + 1, rows=3, cols=3, text_len=5)
    with torch.no_grad():
        before = run_transformer(model, inputs)
    folder = case_folder(name)
    model.save_pretrained(folder / "model")
    # diffusers leaves `proj_out` as it is
    stored, decoded = quantise(model.state_dict(), lambda key: key != "proj_out.weight", quantised)
    save_file(stored, folder / "model" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    change_config(folder / "model", bits, **settings)
    model.load_state_dict(decoded)
    with torch.no_grad():
        expected = {"sample": run_transformer(model, inputs)}
    change = relative(expected["sample"], before)
    assert 0.005 < change < 0.5, change
    wide = FluxTransformer2DModel(**config).eval()
    wide.load_state_dict(decoded)
    wide.double()
    tolerance = {"rel": 5e-5, "rel_if_sinusoid_is_bit_equal": 5e-6}
    tolerance |= f32_against_f64(expected, lambda: {"sample": run_transformer(wide, double(inputs))})
    assert_tolerance(tolerance)
    write_case(
        folder,
        "transformer_forward",
        description,
        tolerance,
        inputs,
        expected,
        model={"path": "model", "class": "FluxTransformer2DModel"},
        checks={"rel_change_by_quantising": round(change, 4)},
        bitsandbytes=bitsandbytes.__version__,
    )


def t5():
    config = T5Config(
        vocab_size=120,
        d_model=40,
        d_kv=8,
        d_ff=56,
        num_layers=2,
        num_heads=3,
        feed_forward_proj="gated-gelu",
        layer_norm_epsilon=1e-6,
        is_encoder_decoder=False,
        use_cache=False,
        tie_word_embeddings=False,
    )
    model = randomise(T5EncoderModel(config), 67, gain=1.0)
    g = generator(68)
    with torch.no_grad():
        model.shared.weight.normal_(generator=g)
        for block in model.encoder.block:  # no 1/sqrt(d) in T5: keep the scores moderate
            block.layer[0].SelfAttention.q.weight.mul_(1 / math.sqrt(config.d_kv))
    ids = torch.randint(3, 120, (2, 14), generator=g)
    ids[1, 9], ids[1, 10:] = 1, 0

    def run(m):
        return {"last_hidden_state": m(input_ids=ids).last_hidden_state}

    with torch.no_grad():
        before = run(model)
    folder = case_folder("t5_bnb_nf4")
    model.save_pretrained(folder / "model")
    file = folder / "model" / "model.safetensors"
    # transformers keeps `wo` in a wide dtype; embeddings are no linear layers
    linear = ("q.weight", "k.weight", "v.weight", "o.weight", "wi_0.weight", "wi_1.weight")
    quantised = lambda name, weight: four_bit(name, weight, "nf4", True)  # noqa: E731
    wanted = lambda name: name.endswith(linear) and not name.endswith("wo.weight")  # noqa: E731
    stored, decoded = quantise(load_file(file), wanted, quantised)
    save_file(stored, file, metadata={"format": "pt"})
    change_config(folder / "model", 4, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    decoded["encoder.embed_tokens.weight"] = decoded["shared.weight"]
    model.load_state_dict(decoded)
    with torch.no_grad():
        expected = run(model)
    change = relative(expected["last_hidden_state"], before["last_hidden_state"])
    assert 0.01 < change < 0.7, change
    model.double()
    tolerance = {"rel": 1e-5, "f32_vs_f64": f32_against_f64(expected, lambda: run(model))["f32_vs_f64"]}
    assert_tolerance(tolerance)
    write_case(
        folder,
        "t5_encoder",
        "T5 quantised by bitsandbytes nf4 with double quantisation, the rest bfloat16; expected: the dequantised weights in f32.",
        tolerance,
        {"input_ids": ids},
        expected,
        model={"path": "model", "class": "T5EncoderModel"},
        checks={"rel_change_by_quantising": round(change, 4)},
        bitsandbytes=bitsandbytes.__version__,
    )


if __name__ == "__main__":
    storages()
    transformer(
        "transformer_bnb_fp4",
        "Quantised from float16 by bitsandbytes fp4 in blocks of 128 without double quantisation, stored as bfloat16, the rest bfloat16.",
        62,
        4,
        lambda name, weight: four_bit(name, weight.half(), "fp4", False, 128, torch.bfloat16),
        bnb_4bit_quant_type="fp4",
        bnb_4bit_use_double_quant=False,
        bnb_4bit_compute_dtype="bfloat16",
        bnb_4bit_quant_storage="bfloat16",
    )
    transformer(
        "transformer_bnb_int8",
        "Quantised by bitsandbytes to 8 bits (LLM.int8), the rest bfloat16; expected: the dequantised weights in f32.",
        64,
        8,
        eight_bit,
    )
    t5()
