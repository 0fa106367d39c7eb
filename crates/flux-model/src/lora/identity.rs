//! What a file is that is no LoRA for FLUX, as far as its keys tell.

use super::key::flattened;

/// What a file holds in place of a LoRA, and where it belongs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// What it is; becomes part of a message.
    pub what: String,
    /// What to do with it.
    pub advice: &'static str,
}

/// The families whose LoRAs are read here.
pub(super) const FLUX1: &str = "FLUX.1";
pub(super) const FLUX2: &str = "FLUX.2";

/// Parts of keys, in flattened spelling, that only one model has; the first that fits counts.
const MODELS: &[(&str, &str)] = &[
    ("double_stream_modulation", FLUX2),
    ("single_stream_modulation", FLUX2),
    ("to_qkv_mlp_proj", FLUX2),
    ("ff_linear_in", FLUX2),
    ("ff_linear_out", FLUX2),
    ("ff_context_linear_in", FLUX2),
    ("ff_context_linear_out", FLUX2),
    ("time_guidance_embed", FLUX2),
    ("distilled_guidance_layer", "Chroma"),
    ("joint_blocks", "Stable Diffusion 3"),
    ("lora_te2_text_model", "Stable Diffusion XL"),
    ("text_encoder_2_text_model", "Stable Diffusion XL"),
    ("conditioner_embedders", "Stable Diffusion XL"),
    ("input_blocks", "Stable Diffusion XL"),
    ("output_blocks", "Stable Diffusion XL"),
    ("middle_block", "Stable Diffusion XL"),
    ("lora_prior_unet", "Stable Cascade"),
    ("down_blocks", "Stable Diffusion"),
    ("mid_block", "Stable Diffusion"),
    ("up_blocks", "Stable Diffusion"),
    ("img_mlp_net", "Qwen-Image"),
    ("txt_mlp_net", "Qwen-Image"),
    ("img_mod_1", "Qwen-Image"),
    ("txt_mod_1", "Qwen-Image"),
    ("token_refiner", "HunyuanVideo"),
    ("img_mlp_fc", "HunyuanVideo"),
    ("txt_mlp_fc", "HunyuanVideo"),
    ("img_mod_linear", "HunyuanVideo"),
    ("txt_mod_linear", "HunyuanVideo"),
    ("modulation_linear", "HunyuanVideo"),
    ("joint_transformer_blocks", "AuraFlow"),
    ("double_stream_blocks", "HiDream"),
    ("single_stream_blocks", "HiDream"),
    ("noise_refiner", "Lumina or Z-Image"),
    ("context_refiner", "Lumina or Z-Image"),
    ("attention_to_", "Lumina or Z-Image"),
    ("attention_qkv", "Lumina or Z-Image"),
    ("attn1_to_", "a video model or PixArt"),
    ("attn2_to_", "a video model or PixArt"),
    ("self_attn_q_proj", "a language model"),
    ("self_attn_k_proj", "a language model"),
    ("self_attn_v_proj", "a language model"),
    ("mlp_gate_proj", "a language model"),
    ("mlp_up_proj", "a language model"),
    ("mlp_down_proj", "a language model"),
    ("cross_attn", "Wan"),
    ("self_attn", "Wan"),
    ("vector_in", FLUX1),
    ("img_mod_lin", FLUX1),
    ("txt_mod_lin", FLUX1),
    ("proj_mlp", FLUX1),
    ("norm1_linear", FLUX1),
    ("norm1_context_linear", FLUX1),
    ("time_text_embed", FLUX1),
];

/// The model whose name this is, if it is known.
pub(super) fn model(key: &str) -> Option<&'static str> {
    let key = flattened(key);
    // Of a text encoder only what says so counts: CLIP has a `self_attn` too.
    let of_text = |part: &str| !part.contains("text_model") && key.contains("text_model");
    MODELS
        .iter()
        .find(|(part, _)| key.contains(part) && !of_text(part))
        .map(|(_, model)| *model)
}

/// Diffusion models with names like those of FLUX.1, told apart by their width.
pub(super) fn other_width(hidden: usize, has_single_blocks: bool) -> Option<&'static str> {
    match (hidden, has_single_blocks) {
        (1536 | 2432, false) => Some("Stable Diffusion 3"),
        (4096 | 6144, _) => Some(FLUX2),
        _ => None,
    }
}

const TRANSFORMER_ADVICE: &str =
    "give it as `model.transformer` in a run's configuration, or put it into the pipeline folder";
const VAE_ADVICE: &str =
    "give it as `model.vae` in a run's configuration, or put it into the pipeline folder";
const CLIP_ADVICE: &str =
    "it belongs in the folder `text_encoder` of the pipeline (`--model`, `model.path`)";
const T5_ADVICE: &str =
    "it belongs in the folder `text_encoder_2` of the pipeline (`--model`, `model.path`)";
const NO_ADVICE: &str = "give a LoRA";

/// What a file is that has no key of an adapter, if that is known.
pub(super) fn whole(keys: &[&str]) -> Option<Identity> {
    let any = |fits: &dyn Fn(&str) -> bool| keys.iter().any(|key| fits(core(key)));
    let starts = |parts: &[&str]| any(&|key| parts.iter().any(|part| key.starts_with(part)));
    let contains = |parts: &[&str]| any(&|key| parts.iter().any(|part| key.contains(part)));

    let vae = any(&is_autoencoder);
    let t5 = starts(&["encoder.block.", "decoder.block.", "shared.weight"]);
    let clip = contains(&["text_model.", "transformer.resblocks."]);
    let flux = starts(&["double_blocks.", "single_blocks."])
        || contains(&["transformer_blocks."]) && !contains(&["attentions."]);
    let found = keys
        .iter()
        .filter(|key| !is_autoencoder(core(key)))
        .find_map(|key| model(key).filter(|model| *model != FLUX1))
        .map(|model| match model {
            "Stable Diffusion XL" if any(&|key| key.starts_with("transformer.text_model.")) => {
                "Stable Diffusion"
            }
            model => model,
        });

    let (what, advice) = if contains(&["exp_avg", "max_exp_avg", "optimizer_state"])
        || starts(&["optimizer.", "state."])
    {
        ("the state of an optimizer".into(), NO_ADVICE)
    } else if starts(&["controlnet_", "input_hint_block", "pos_embed_input"])
        || contains(&["controlnet_blocks"])
    {
        ("a whole ControlNet".into(), NO_ADVICE)
    } else if contains(&["ip_adapter", "image_proj", "redux_up", "redux_down"]) {
        ("an image adapter (IP-Adapter, Redux)".into(), NO_ADVICE)
    } else if found == Some(FLUX2) {
        (
            "the whole weights of a FLUX.2 transformer".into(),
            TRANSFORMER_ADVICE,
        )
    } else if let Some(model) = found {
        (format!("the whole weights of {model}"), NO_ADVICE)
    } else if flux && (vae || t5 || clip) {
        (
            "a whole FLUX.1 checkpoint with text encoders or VAE".into(),
            TRANSFORMER_ADVICE,
        )
    } else if flux {
        (
            "the whole weights of a FLUX.1 transformer".into(),
            TRANSFORMER_ADVICE,
        )
    } else if vae {
        ("the whole weights of a VAE".into(), VAE_ADVICE)
    } else if t5 {
        ("the whole weights of a T5 text encoder".into(), T5_ADVICE)
    } else if clip {
        (
            "the whole weights of a CLIP text encoder".into(),
            CLIP_ADVICE,
        )
    } else if keys
        .iter()
        .all(|key| matches!(*key, "clip_l" | "clip_g" | "t5xxl" | "emb_params"))
    {
        ("a text embedding (textual inversion)".into(), NO_ADVICE)
    } else {
        return None;
    };
    let quantised = contains(QUANTISED).then_some(", quantised");
    Some(Identity {
        what: what + quantised.unwrap_or_default(),
        advice,
    })
}

/// Parts of keys that only quantised weights have.
const QUANTISED: &[&str] = &[
    "absmax",
    "quant_map",
    "quant_state",
    ".qweight",
    ".qzeros",
    ".SCB",
    "scaled_fp8",
    "scale_weight",
    "weight_scale",
    "scale_input",
    "input_scale",
    "wscales",
    "comfy_quant",
];

/// The key inside its network, without what an all-in-one file or a wrapper puts in front.
fn core(key: &str) -> &str {
    const OUTER: [&str; 14] = [
        "module.",
        "_orig_mod.",
        "model.diffusion_model.",
        "diffusion_model.",
        "transformer.",
        "first_stage_model.",
        "vae.",
        "cond_stage_model.",
        "text_encoders.clip_l.transformer.",
        "text_encoders.t5xxl.transformer.",
        "text_encoder_2.",
        "text_encoder.",
        "clip_l.",
        "t5xxl.",
    ];
    let mut key = key;
    while let Some(inner) = OUTER.iter().find_map(|outer| {
        key.strip_prefix(outer)
            .filter(|inner| !inner.starts_with("resblocks."))
    }) {
        key = inner;
    }
    key
}

/// Diffusers' names of an autoencoder, or BFL's.
fn is_autoencoder(key: &str) -> bool {
    let inside = ["encoder.", "decoder."]
        .iter()
        .find_map(|half| key.strip_prefix(half));
    let parts = [
        "down.",
        "up.",
        "mid.",
        "down_blocks.",
        "up_blocks.",
        "mid_block.",
        "conv_in.",
        "conv_out.",
        "conv_norm_out.",
        "norm_out.",
    ];
    inside.is_some_and(|rest| parts.iter().any(|part| rest.starts_with(part)))
        || key.starts_with("quant_conv.")
        || key.starts_with("post_quant_conv.")
}
