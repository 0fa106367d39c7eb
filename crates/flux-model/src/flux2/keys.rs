//! Names: diffusers' module paths and those of Black Forest Labs' single files of FLUX.2.
//!
//! As for FLUX.1, BFL's files fuse q, k and v of the double blocks, and `norm_out.linear` holds its two halves in the other
//! order. The single blocks' fused layers are fused in diffusers too.
//!
//! Source: diffusers 0.38 `convert_flux2_to_diffusers.py`, `single_file_utils.py`.

use crate::flux1::keys::{self, BflModule};

/// BFL's place of the transformer's module `path`, in a network of width `hidden`.
pub fn bfl_transformer_module(path: &str, hidden: usize) -> Option<BflModule> {
    let third = |i: usize| i * hidden..(i + 1) * hidden;
    if let Some((index, module)) = path
        .strip_prefix("transformer_blocks.")
        .and_then(|rest| rest.split_once('.'))
    {
        let block = format!("double_blocks.{index}");
        let whole = |name: &str| Some(BflModule::whole(format!("{block}.{name}")));
        let img = |i| Some(BflModule::part(format!("{block}.img_attn.qkv"), third(i)));
        let txt = |i| Some(BflModule::part(format!("{block}.txt_attn.qkv"), third(i)));
        return match module {
            "attn.to_q" => img(0),
            "attn.to_k" => img(1),
            "attn.to_v" => img(2),
            "attn.add_q_proj" => txt(0),
            "attn.add_k_proj" => txt(1),
            "attn.add_v_proj" => txt(2),
            "attn.norm_q" => whole("img_attn.norm.query_norm"),
            "attn.norm_k" => whole("img_attn.norm.key_norm"),
            "attn.norm_added_q" => whole("txt_attn.norm.query_norm"),
            "attn.norm_added_k" => whole("txt_attn.norm.key_norm"),
            "attn.to_out.0" => whole("img_attn.proj"),
            "attn.to_add_out" => whole("txt_attn.proj"),
            "ff.linear_in" => whole("img_mlp.0"),
            "ff.linear_out" => whole("img_mlp.2"),
            "ff_context.linear_in" => whole("txt_mlp.0"),
            "ff_context.linear_out" => whole("txt_mlp.2"),
            _ => None,
        };
    }
    if let Some((index, module)) = path
        .strip_prefix("single_transformer_blocks.")
        .and_then(|rest| rest.split_once('.'))
    {
        let name = match module {
            "attn.to_qkv_mlp_proj" => "linear1",
            "attn.to_out" => "linear2",
            "attn.norm_q" => "norm.query_norm",
            "attn.norm_k" => "norm.key_norm",
            _ => return None,
        };
        return Some(BflModule::whole(format!("single_blocks.{index}.{name}")));
    }
    let name = match path {
        "x_embedder" => "img_in",
        "context_embedder" => "txt_in",
        "time_guidance_embed.timestep_embedder.linear_1" => "time_in.in_layer",
        "time_guidance_embed.timestep_embedder.linear_2" => "time_in.out_layer",
        "time_guidance_embed.guidance_embedder.linear_1" => "guidance_in.in_layer",
        "time_guidance_embed.guidance_embedder.linear_2" => "guidance_in.out_layer",
        "double_stream_modulation_img.linear" => "double_stream_modulation_img.lin",
        "double_stream_modulation_txt.linear" => "double_stream_modulation_txt.lin",
        "single_stream_modulation.linear" => "single_stream_modulation.lin",
        "proj_out" => "final_layer.linear",
        "norm_out.linear" => {
            return Some(BflModule {
                swap_halves: true,
                ..BflModule::whole("final_layer.adaLN_modulation.1")
            });
        }
        _ => return None,
    };
    Some(BflModule::whole(name))
}

/// BFL's name of the autoencoder's module `path`, for `levels` resolutions.
pub fn bfl_autoencoder_module(path: &str, levels: usize) -> Option<String> {
    match path {
        "quant_conv" => Some("encoder.quant_conv".into()),
        "post_quant_conv" => Some("decoder.post_quant_conv".into()),
        "bn" => Some("bn".into()),
        _ => keys::bfl_autoencoder_module(path, levels),
    }
}
