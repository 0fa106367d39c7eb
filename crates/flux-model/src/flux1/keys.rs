//! Names: diffusers' module paths and those of Black Forest Labs' single files.
//!
//! The networks use diffusers' names. BFL's files fuse q, k, v (and the single blocks' MLP) into one layer, so a diffusers
//! module is a range of rows of a BFL module; `norm_out.linear` holds its two halves in the other order.
//!
//! Source: diffusers `convert_flux_to_diffusers.py`, checked numerically against both implementations.

use std::ops::Range;

/// A diffusers module as part of a BFL module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BflModule {
    /// BFL's module path.
    pub name: String,
    /// Rows of the fused module, for a part of one.
    pub rows: Option<Range<usize>>,
    /// The two halves of the rows are exchanged.
    pub swap_halves: bool,
}

impl BflModule {
    pub(crate) fn whole(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            rows: None,
            swap_halves: false,
        }
    }

    pub(crate) fn part(name: String, rows: Range<usize>) -> Self {
        Self {
            name,
            rows: Some(rows),
            swap_halves: false,
        }
    }
}

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
            "norm1.linear" => whole("img_mod.lin"),
            "norm1_context.linear" => whole("txt_mod.lin"),
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
            "ff.net.0.proj" => whole("img_mlp.0"),
            "ff.net.2" => whole("img_mlp.2"),
            "ff_context.net.0.proj" => whole("txt_mlp.0"),
            "ff_context.net.2" => whole("txt_mlp.2"),
            _ => None,
        };
    }
    if let Some((index, module)) = path
        .strip_prefix("single_transformer_blocks.")
        .and_then(|rest| rest.split_once('.'))
    {
        let block = format!("single_blocks.{index}");
        let whole = |name: &str| Some(BflModule::whole(format!("{block}.{name}")));
        let linear1 = |rows| Some(BflModule::part(format!("{block}.linear1"), rows));
        return match module {
            "norm.linear" => whole("modulation.lin"),
            "attn.to_q" => linear1(third(0)),
            "attn.to_k" => linear1(third(1)),
            "attn.to_v" => linear1(third(2)),
            "proj_mlp" => linear1(3 * hidden..7 * hidden),
            "proj_out" => whole("linear2"),
            "attn.norm_q" => whole("norm.query_norm"),
            "attn.norm_k" => whole("norm.key_norm"),
            _ => None,
        };
    }
    let name = match path {
        "x_embedder" => "img_in",
        "context_embedder" => "txt_in",
        "time_text_embed.timestep_embedder.linear_1" => "time_in.in_layer",
        "time_text_embed.timestep_embedder.linear_2" => "time_in.out_layer",
        "time_text_embed.guidance_embedder.linear_1" => "guidance_in.in_layer",
        "time_text_embed.guidance_embedder.linear_2" => "guidance_in.out_layer",
        "time_text_embed.text_embedder.linear_1" => "vector_in.in_layer",
        "time_text_embed.text_embedder.linear_2" => "vector_in.out_layer",
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
    let (coder, rest) = path.split_once('.')?;
    if !matches!(coder, "encoder" | "decoder") {
        return None;
    }
    let resnet = |part: &str| part.replace("conv_shortcut", "nin_shortcut");
    let parts: Vec<&str> = rest.split('.').collect();
    let renamed = match parts.as_slice() {
        ["conv_in" | "conv_out"] => rest.to_string(),
        ["conv_norm_out"] => "norm_out".into(),
        ["down_blocks", level, "resnets", j, part] => {
            format!("down.{level}.block.{j}.{}", resnet(part))
        }
        ["down_blocks", level, "downsamplers", "0", "conv"] => {
            format!("down.{level}.downsample.conv")
        }
        ["up_blocks", level, tail @ ..] => {
            let level = levels.checked_sub(level.parse::<usize>().ok()?.checked_add(1)?)?; // BFL counts from full resolution
            match tail {
                ["resnets", j, part] => format!("up.{level}.block.{j}.{}", resnet(part)),
                ["upsamplers", "0", "conv"] => format!("up.{level}.upsample.conv"),
                _ => return None,
            }
        }
        ["mid_block", "resnets", j, part] => format!(
            "mid.block_{}.{}",
            j.parse::<usize>().ok()? + 1,
            resnet(part)
        ),
        ["mid_block", "attentions", "0", tail @ ..] => match tail {
            ["group_norm"] => "mid.attn_1.norm".into(),
            ["to_q"] => "mid.attn_1.q".into(),
            ["to_k"] => "mid.attn_1.k".into(),
            ["to_v"] => "mid.attn_1.v".into(),
            ["to_out", "0"] => "mid.attn_1.proj_out".into(),
            _ => return None,
        },
        _ => return None,
    };
    Some(format!("{coder}.{renamed}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_autoencoder_level_that_is_not_there_has_no_name() {
        let name = |path, levels| bfl_autoencoder_module(path, levels);
        let path = "decoder.up_blocks.1.resnets.0.conv1";
        assert_eq!(name(path, 4).as_deref(), Some("decoder.up.2.block.0.conv1"));
        assert_eq!(name(path, 1), None);
        assert_eq!(name(path, 0), None);
        let largest = format!("decoder.up_blocks.{}.resnets.0.conv1", usize::MAX);
        assert_eq!(name(&largest, 4), None);
    }
}
