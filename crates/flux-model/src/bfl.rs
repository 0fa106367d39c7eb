//! Names in Black Forest Labs' single files, in tables: a family's is in its `keys`.
//!
//! The networks use diffusers' names. BFL's files fuse q, k, v (and the MLP of FLUX.1's single blocks) into one layer, so a
//! diffusers module can be a range of rows of a BFL module; `norm_out.linear` holds its two halves in the other order.
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

/// diffusers' name, BFL's name, and the rows of a fused module in widths of the network.
type Entry = (&'static str, &'static str, Option<Range<usize>>);

/// The modules of a transformer, by diffusers' names.
pub(crate) struct Names {
    /// Below `transformer_blocks.N`, besides its attention: BFL's `double_blocks.N`.
    pub double: &'static [(&'static str, &'static str)],
    /// Below `single_transformer_blocks.N`: BFL's `single_blocks.N`.
    pub single: &'static [Entry],
    /// Outside the blocks, besides what both families have.
    pub outside: &'static [(&'static str, &'static str)],
}

/// The attention of a double-stream block, of both families.
const ATTENTION: &[Entry] = &[
    ("to_q", "img_attn.qkv", Some(0..1)),
    ("to_k", "img_attn.qkv", Some(1..2)),
    ("to_v", "img_attn.qkv", Some(2..3)),
    ("add_q_proj", "txt_attn.qkv", Some(0..1)),
    ("add_k_proj", "txt_attn.qkv", Some(1..2)),
    ("add_v_proj", "txt_attn.qkv", Some(2..3)),
    ("norm_q", "img_attn.norm.query_norm", None),
    ("norm_k", "img_attn.norm.key_norm", None),
    ("norm_added_q", "txt_attn.norm.query_norm", None),
    ("norm_added_k", "txt_attn.norm.key_norm", None),
    ("to_out.0", "img_attn.proj", None),
    ("to_add_out", "txt_attn.proj", None),
];

/// Outside the blocks, of both families.
const OUTSIDE: &[(&str, &str)] = &[
    ("x_embedder", "img_in"),
    ("context_embedder", "txt_in"),
    ("proj_out", "final_layer.linear"),
    (NORM_OUT, "final_layer.adaLN_modulation.1"),
];

/// The module whose halves are exchanged.
const NORM_OUT: &str = "norm_out.linear";

impl Names {
    /// BFL's place of the module `path`, in a network of width `hidden`.
    pub(crate) fn find(&self, path: &str, hidden: usize) -> Option<BflModule> {
        let found = |name, rows: &Option<Range<usize>>| BflModule {
            name,
            rows: (rows.as_ref()).map(|rows| rows.start * hidden..rows.end * hidden),
            swap_halves: path == NORM_OUT,
        };
        let below = |blocks: &str| path.strip_prefix(blocks)?.split_once('.');
        if let Some((index, module)) = below("transformer_blocks.") {
            let (name, rows) = match module.strip_prefix("attn.") {
                Some(module) => entry(ATTENTION, module)?,
                None => (pair(self.double, module)?, &None),
            };
            return Some(found(format!("double_blocks.{index}.{name}"), rows));
        }
        if let Some((index, module)) = below("single_transformer_blocks.") {
            let (name, rows) = entry(self.single, module)?;
            return Some(found(format!("single_blocks.{index}.{name}"), rows));
        }
        let name = pair(self.outside, path).or_else(|| pair(OUTSIDE, path))?;
        Some(found(name.into(), &None))
    }
}

fn pair(table: &[(&str, &'static str)], name: &str) -> Option<&'static str> {
    let found = table.iter().find(|(diffusers, _)| *diffusers == name);
    found.map(|(_, bfl)| *bfl)
}

fn entry<'a>(table: &'a [Entry], name: &str) -> Option<(&'a str, &'a Option<Range<usize>>)> {
    let found = table.iter().find(|(diffusers, ..)| *diffusers == name);
    found.map(|(_, bfl, rows)| (*bfl, rows))
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
