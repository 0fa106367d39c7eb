"""FLUX.2 dev: a whole tiny pipeline with Mistral as its text encoder, what it makes, and a training run with its guidance.

Kinds `pipeline` and `train`. torch 2.11.0, diffusers 0.38.0, peft 0.19.1, transformers 4.57.6, tokenizers 0.22.2. Seeds 111 to 117.
"""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Pipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedTokenizerFast,
)

from common import (
    assert_no_dead_parameter,
    assert_tolerance,
    case_folder,
    f32_against_f64,
    generator,
    randomise,
    relative,
    sig,
    write_case,
)
from reference_pictures import HEIGHT, MEAN, NOTES, STEPS, WIDTH, picture, pixels, run, training

NAME = "flux2_pipeline_dev"
# after a quarter, a half and three quarters of the layers, as 10, 20, 30 of 40
LAYERS = (1, 2, 3)
LENGTH = 112
# the first is padded, the second is cut
PROMPTS = ["a café at night[IMG], in the rain", "a very detailed photograph of the old stone bridge, " * 4]
GUIDANCE = 4.0

SPECIAL = {0: "<unk>", 1: "<s>", 2: "</s>", 3: "[INST]", 4: "[/INST]", 10: "[IMG]", 11: "<pad>"}
SPECIAL |= {12: "[IMG_BREAK]", 13: "[IMG_END]", 17: "[SYSTEM_PROMPT]", 18: "[/SYSTEM_PROMPT]"}
WORDS = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'system' %}{{- '[SYSTEM_PROMPT]' }}"
    "{%- for part in message['content'] %}{{- part['text'] }}{%- endfor %}{{- '[/SYSTEM_PROMPT]' }}"
    "{%- elif message['role'] == 'user' %}{{- '[INST]' }}"
    "{%- for part in message['content'] %}{%- if part['type'] == 'text' %}{{- part['text'] }}{%- else %}{{- '[IMG]' }}{%- endif %}{%- endfor %}"
    "{{- '[/INST]' }}{%- endif %}{%- endfor %}"
)


def processor():
    """As Mistral's: special tokens first, byte-level BPE behind, padding in front."""
    text = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    text.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    text.decoder = decoders.ByteLevel()
    special = [AddedToken(SPECIAL.get(i, f"<SPECIAL_{i}>"), special=True, normalized=False) for i in range(20)]
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text.train_from_iterator([SYSTEM_MESSAGE, *PROMPTS, "the photo of a snowy old town with boats"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=text,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL.values())) == list(SPECIAL)
    return PixtralProcessor(PixtralImageProcessor(), tokenizer, patch_size=4, chat_template=TEMPLATE)


def mistral(vocab_size):
    config = Mistral3Config(
        text_config={
            "model_type": "mistral",
            "vocab_size": vocab_size,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,  # not 24 / 4
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e9,
            "sliding_window": None,
            "max_position_embeddings": 512,
        },
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 16,
            "intermediate_size": 20,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "head_dim": 8,
            "image_size": 16,
            "patch_size": 4,
        },
        image_token_index=10,
    )
    model = randomise(Mistral3ForConditionalGeneration(config), 111, gain=1.0)
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(generator=generator(112))
    return model


def pipeline():
    tokenizer = processor()
    transformer = Flux2Transformer2DModel(
        in_channels=32,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * 24,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=True,
    )
    autoencoder = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=4,
        sample_size=64,
    )
    randomise(autoencoder, 114)
    g = generator(115)
    autoencoder.bn.running_mean.copy_(0.3 * torch.randn(32, generator=g))
    autoencoder.bn.running_var.copy_(0.5 + torch.rand(32, generator=g))
    pipe = Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=autoencoder,
        text_encoder=mistral(len(tokenizer.tokenizer)),
        tokenizer=tokenizer,
        transformer=randomise(transformer, 113),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def encode(pipe, prompts):
    return Flux2Pipeline._get_mistral_3_small_prompt_embeds(
        pipe.text_encoder, pipe.tokenizer, prompts, max_sequence_length=LENGTH, hidden_states_layers=list(LAYERS)
    )


def tokens(pipe, prompts):
    """What the text encoder is called with."""
    calls = []
    hook = pipe.text_encoder.register_forward_pre_hook(lambda _, __, kwargs: calls.append(kwargs), with_kwargs=True)
    with torch.no_grad():
        encode(pipe, prompts)
    hook.remove()
    return {k: calls[0][k] for k in ("input_ids", "attention_mask")}


def check_padding(pipe, ids, embeds):
    """Real rows are those of the prompt alone; padding is one row, to which attention adds nothing."""
    count = int(ids["attention_mask"][0].sum())
    with torch.no_grad():
        alone = pipe.text_encoder(input_ids=ids["input_ids"][:1, -count:], output_hidden_states=True, use_cache=False)
        pad = pipe.text_encoder.get_input_embeddings()(torch.tensor([[11]]))
        padding = {0: pad}
        for index, layer in enumerate(pipe.text_encoder.model.language_model.layers):
            pad = pad + layer.mlp(layer.post_attention_layernorm(pad))
            padding[index + 1] = pad
    alone = torch.cat([alone.hidden_states[k] for k in LAYERS], dim=-1)
    padding = torch.cat([padding[k] for k in LAYERS], dim=-1)
    found = {
        "real_rows_against_the_prompt_alone": relative(embeds[:1, -count:], alone),
        "padding_against_mlps_alone": relative(embeds[:1, :-count], padding.expand(1, LENGTH - count, -1)),
    }
    assert max(found.values()) < 1e-5, found
    return {k: sig(v) for k, v in found.items()}


def whole():
    folder = case_folder(NAME)
    pipeline().save_pretrained(folder / "model")
    for component in ("transformer", "vae", "text_encoder"):  # the paths of this machine say nothing
        config = folder / "model" / component / "config.json"
        config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "_name_or_path"}, indent=2) + "\n")
    pipe = Flux2Pipeline.from_pretrained(folder / "model", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.text_encoder.config._attn_implementation == "sdpa"
    image = picture(116, 64, 80)
    latents = torch.randn(2, HEIGHT * WIDTH // 256, 32, generator=generator(117))
    inputs = {"latents_packed": latents, "reference_0": pixels(image)}
    ids = tokens(pipe, PROMPTS)
    real = ids["attention_mask"].sum(1).tolist()
    assert real[0] < LENGTH == real[1], real
    with torch.no_grad():
        embeds = encode(pipe, PROMPTS)
    assert not torch.allclose(embeds[0, -1], embeds[1, -1])

    def encoded(pipe):
        with torch.no_grad():
            packed, where = pipe.prepare_image_latents([inputs["reference_0"].to(pipe.vae.dtype)], 1, None, "cpu", pipe.vae.dtype)
        return {"reference_latents_packed": packed, "reference_ids": where[0].to(packed.dtype)}

    def make(pipe, latents, embeds, guidance=GUIDANCE):
        with MEAN:
            call = {"prompt_embeds": embeds, "guidance_scale": guidance, "image": image}
            return run(pipe, latents, **call) | encoded(pipe)

    expected = ids | {"prompt_embeds": embeds} | make(pipe, latents, embeds)
    other = make(pipe, latents, embeds, guidance=1.0)
    matters = {"rel_change_of_image_with_guidance_1": sig(relative(other["image"], expected["image"]))}
    matters["rel_change_of_image_with_prompts_exchanged"] = sig(
        relative(make(pipe, latents, embeds.flip(0))["image"], expected["image"])
    )
    assert min(matters.values()) > 1e-3, matters
    checks = matters | {"real_tokens": real} | check_padding(pipe, ids, embeds)

    def wide():
        pipe.transformer.double(), pipe.vae.double()
        # prompts are encoded in float32 for both: Mistral's norms ask for it
        return ids | {"prompt_embeds": embeds.double()} | make(pipe, latents.double(), embeds.double())

    tolerance = {"rel": 5e-5, **f32_against_f64(expected, wide)}
    assert_tolerance(tolerance)
    write_case(
        folder,
        "pipeline",
        "FLUX.2 dev: two prompts, one padded and one cut, and a reference picture; guidance is an input.",
        tolerance,
        inputs,
        expected,
        family="flux2",
        model={"path": "model", "class": "Flux2Pipeline"},
        call={
            "prompt": PROMPTS,
            "height": HEIGHT,
            "width": WIDTH,
            "num_inference_steps": STEPS,
            "guidance_scale": GUIDANCE,
            "max_sequence_length": LENGTH,
            "text_encoder_out_layers": list(LAYERS),
        },
        checks=checks,
        notes="Padding is in front; it sees nothing, and attention adds nothing to it (PyTorch's scaled_dot_product_attention since 2.5). " + NOTES,
    )
    assert not any("/" in str(v) for v in json.loads((folder / "model" / "model_index.json").read_text()).values() if isinstance(v, str))
    size = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())
    print(f"{size / 2**20:.2f} MiB", checks)


def trained():
    training(
        "flux2_train_dev",
        "FLUX.2 dev, 4 steps of batch 2; guidance 3.5 is an input.",
        NAME,
        ["attn.to_q", "attn.to_v", "attn.to_out.0", "attn.to_qkv_mlp_proj"],
        304,
        (32, 2, 3),
        lambda steps, g: {"guidance": torch.full((steps, 2), 3.5)},
        {"guidance 1": lambda inputs: {**inputs, "guidance": torch.ones_like(inputs["guidance"])}},
        family="flux2",
        note="guidance is told to the network, as time is.",
    )


if __name__ == "__main__":
    whole()
    trained()
