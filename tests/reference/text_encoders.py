"""Cases of kind `clip_text` and `t5_encoder`.

torch 2.11.0, transformers 4.57.6. Seeds 41 to 45, and those plus 100 for the token ids.
"""

import math

import torch
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from common import (
    assert_no_dead_parameter,
    assert_tolerance,
    case_folder,
    f32_against_f64,
    generator,
    load_file,
    randomise,
    relative,
    save_file,
    write_case,
)


def clip_eos_2():
    """The shipped CLIP config says eos_token_id 2, which means: pool at the first largest id."""
    eos = 210
    config = CLIPTextConfig(
        vocab_size=214,
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=32,
        max_position_embeddings=77,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    model = randomise(CLIPTextModel(config), 41, gain=1.0)
    g = generator(42)
    ids = torch.full((4, 77), eos)  # padded with the end token, as the FLUX.1 tokenizer does
    for row, length in enumerate([12, 1, 76, 20]):
        ids[row, 0] = eos - 1
        ids[row, 1:length] = torch.randint(3, eos - 1, (length - 1,), generator=g)
    ids[0, 5] = 2  # the id that the config calls the end is an ordinary token
    ids[3, 7] = 212  # a token added after the end token: the rule picks it
    inputs = {"input_ids": ids}

    def run(m):
        out = m(input_ids=ids)
        return {"last_hidden_state": out.last_hidden_state, "pooled": out.pooler_output}

    assert_no_dead_parameter(model, lambda: run(model)["last_hidden_state"])
    with torch.no_grad():
        expected = run(model)
    where = ids.argmax(-1)
    assert torch.equal(expected["pooled"], expected["last_hidden_state"][torch.arange(4), where])
    assert where.tolist() == [12, 1, 76, 7]
    folder = case_folder("clip_eos_2")
    model.save_pretrained(folder / "model")
    model.double()
    tolerance = {"rel": 5e-6, "f32_vs_f64": f32_against_f64(expected, lambda: run(model))["f32_vs_f64"]}
    assert_tolerance(tolerance)
    write_case(
        folder,
        "clip_text",
        "config eos_token_id 2 as in FLUX.1: pooled at argmax(input_ids); 77 tokens; a short, an empty and a full prompt, and one with an added token above the end id.",
        tolerance,
        inputs,
        expected,
        model={"path": "model", "class": "CLIPTextModel"},
        eos_token_id=2,
        checks={"pooled_positions": where.tolist()},
        notes="causal mask; quick_gelu; last_hidden_state is after final_layer_norm; pooled = last_hidden_state at the EOS position: "
        "eos_token_id == 2 (as in FLUX.1) means argmax(input_ids), otherwise the first position equal to eos_token_id. No text_projection.",
    )


def t5(name, description, seed, tokens, embedding_key, notes="", **settings):
    config = T5Config(
        vocab_size=120,
        feed_forward_proj="gated-gelu",
        layer_norm_epsilon=1e-6,
        is_encoder_decoder=False,
        use_cache=False,
        tie_word_embeddings=False,
        **settings,
    )
    model = T5EncoderModel(config)
    randomise(model, seed, gain=1.0)
    g = generator(seed + 100)
    with torch.no_grad():
        model.shared.weight.normal_(generator=g)
        bias = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        bias.normal_(generator=g)
        for block in model.encoder.block:  # no 1/sqrt(d) in T5: keep the scores moderate
            q = block.layer[0].SelfAttention.q.weight
            q.mul_(1 / math.sqrt(config.d_kv))
    ids = torch.randint(3, 120, (2, tokens), generator=g)
    ids[1, 9], ids[1, 10:] = 1, 0  # a short prompt, padded and not masked
    ids[0, -1] = 1
    inputs = {"input_ids": ids}

    def run(m):
        return {"last_hidden_state": m(input_ids=ids).last_hidden_state}

    assert_no_dead_parameter(model, lambda: run(model)["last_hidden_state"])
    with torch.no_grad():
        expected = run(model)
        saved, sensitivity = bias.clone(), {}
        for row in (config.relative_attention_num_buckets // 2 - 1, config.relative_attention_num_buckets - 1):
            bias[row] += 1.0  # the farthest bucket of each direction
            sensitivity[str(row)] = round(relative(run(model)["last_hidden_state"], expected["last_hidden_state"]), 4)
            bias.copy_(saved)
    assert min(sensitivity.values()) > 0.01, sensitivity

    folder = case_folder(name)
    model.save_pretrained(folder / "model")
    file = folder / "model" / "model.safetensors"
    weights = load_file(file)
    weights[embedding_key] = weights.pop("shared.weight")
    save_file(weights, file, metadata={"format": "pt"})
    reloaded = T5EncoderModel.from_pretrained(folder / "model").eval()
    with torch.no_grad():
        assert relative(run(reloaded)["last_hidden_state"], expected["last_hidden_state"]) == 0

    model.double()
    tolerance = {"rel": 1e-5, "f32_vs_f64": f32_against_f64(expected, lambda: run(model))["f32_vs_f64"]}
    assert_tolerance(tolerance)
    write_case(
        folder,
        "t5_encoder",
        description,
        tolerance,
        inputs,
        expected,
        model={"path": "model", "class": "T5EncoderModel"},
        embedding_keys=[embedding_key],
        checks={"rel_change_if_a_far_bucket_is_raised_by_1": sensitivity},
        notes="no attention mask: padding tokens attend and are attended. No 1/sqrt(d) scaling. The relative position bias lives in block 0 only "
        "and is shared by all layers (bidirectional buckets). Gated GELU is tanh-approximated (gelu_new): wo(gelu(wi_0 x) * wi_1 x). "
        "RMS norms without bias (eps 1e-6), final_layer_norm after the last block. " + notes,
    )


if __name__ == "__main__":
    clip_eos_2()
    t5(
        "t5_far",
        "200 tokens, so that every relative-position bucket is used (the last begins at distance 91); inner dim (2 x 16) != d_model 24.",
        43,
        200,
        "shared.weight",
        d_model=24,
        d_kv=16,
        d_ff=40,
        num_heads=2,
        num_layers=2,
    )
    t5(
        "t5_other_buckets",
        "20 buckets, farthest distance 50, and the embedding stored only as encoder.embed_tokens.weight.",
        45,
        70,
        "encoder.embed_tokens.weight",
        "Bucket numbers follow relative_attention_num_buckets and relative_attention_max_distance of the config.",
        d_model=16,
        d_kv=6,
        d_ff=28,
        num_heads=3,
        num_layers=2,
        relative_attention_num_buckets=20,
        relative_attention_max_distance=50,
    )
