//! Names: diffusers' module paths and those of Black Forest Labs' single files of FLUX.2.
//!
//! The single blocks' fused layers are fused in diffusers too.
//!
//! Source: diffusers 0.38 `convert_flux2_to_diffusers.py`, `single_file_utils.py`.

use crate::bfl::{self, BflModule, Names};

/// The modules of FLUX.2.
const NAMES: Names = Names {
    double: &[
        ("ff.linear_in", "img_mlp.0"),
        ("ff.linear_out", "img_mlp.2"),
        ("ff_context.linear_in", "txt_mlp.0"),
        ("ff_context.linear_out", "txt_mlp.2"),
    ],
    single: &[
        ("attn.to_qkv_mlp_proj", "linear1", None),
        ("attn.to_out", "linear2", None),
        ("attn.norm_q", "norm.query_norm", None),
        ("attn.norm_k", "norm.key_norm", None),
    ],
    outside: &[
        (
            "time_guidance_embed.timestep_embedder.linear_1",
            "time_in.in_layer",
        ),
        (
            "time_guidance_embed.timestep_embedder.linear_2",
            "time_in.out_layer",
        ),
        (
            "time_guidance_embed.guidance_embedder.linear_1",
            "guidance_in.in_layer",
        ),
        (
            "time_guidance_embed.guidance_embedder.linear_2",
            "guidance_in.out_layer",
        ),
        (
            "double_stream_modulation_img.linear",
            "double_stream_modulation_img.lin",
        ),
        (
            "double_stream_modulation_txt.linear",
            "double_stream_modulation_txt.lin",
        ),
        (
            "single_stream_modulation.linear",
            "single_stream_modulation.lin",
        ),
    ],
};

/// BFL's place of the transformer's module `path`, in a network of width `hidden`.
pub fn bfl_transformer_module(path: &str, hidden: usize) -> Option<BflModule> {
    NAMES.find(path, hidden)
}

/// BFL's name of the autoencoder's module `path`, for `levels` resolutions.
pub fn bfl_autoencoder_module(path: &str, levels: usize) -> Option<String> {
    match path {
        "quant_conv" => Some("encoder.quant_conv".into()),
        "post_quant_conv" => Some("decoder.post_quant_conv".into()),
        "bn" => Some("bn".into()),
        _ => bfl::bfl_autoencoder_module(path, levels),
    }
}
