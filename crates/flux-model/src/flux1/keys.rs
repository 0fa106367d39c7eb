//! Names: diffusers' module paths and those of Black Forest Labs' single files of FLUX.1.
//!
//! Source: diffusers `convert_flux_to_diffusers.py`.

use crate::bfl::Names;
pub use crate::bfl::{BflModule, bfl_autoencoder_module};

/// The modules of FLUX.1.
const NAMES: Names = Names {
    double: &[
        ("norm1.linear", "img_mod.lin"),
        ("norm1_context.linear", "txt_mod.lin"),
        ("ff.net.0.proj", "img_mlp.0"),
        ("ff.net.2", "img_mlp.2"),
        ("ff_context.net.0.proj", "txt_mlp.0"),
        ("ff_context.net.2", "txt_mlp.2"),
    ],
    single: &[
        ("norm.linear", "modulation.lin", None),
        ("attn.to_q", "linear1", Some(0..1)),
        ("attn.to_k", "linear1", Some(1..2)),
        ("attn.to_v", "linear1", Some(2..3)),
        ("proj_mlp", "linear1", Some(3..7)),
        ("proj_out", "linear2", None),
        ("attn.norm_q", "norm.query_norm", None),
        ("attn.norm_k", "norm.key_norm", None),
    ],
    outside: &[
        (
            "time_text_embed.timestep_embedder.linear_1",
            "time_in.in_layer",
        ),
        (
            "time_text_embed.timestep_embedder.linear_2",
            "time_in.out_layer",
        ),
        (
            "time_text_embed.guidance_embedder.linear_1",
            "guidance_in.in_layer",
        ),
        (
            "time_text_embed.guidance_embedder.linear_2",
            "guidance_in.out_layer",
        ),
        (
            "time_text_embed.text_embedder.linear_1",
            "vector_in.in_layer",
        ),
        (
            "time_text_embed.text_embedder.linear_2",
            "vector_in.out_layer",
        ),
    ],
};

/// BFL's place of the transformer's module `path`, in a network of width `hidden`.
pub fn bfl_transformer_module(path: &str, hidden: usize) -> Option<BflModule> {
    NAMES.find(path, hidden)
}
