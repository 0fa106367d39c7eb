//! Family and sizes of the networks as far as a file shows them, for reading a LoRA without a model.

use crate::flux1::config::FluxConfig;
use crate::flux2::config::Flux2Config;
use crate::text::clip::ClipConfig;
use crate::text::t5::T5Config;

use super::Component;
use super::identity::{FLUX2, model, other_width};
use super::key::{ParsedKey, flattened};
use super::names::Names;
use super::shape::ModelShape;

/// Sizes beyond these are no width and no block of any model.
const WIDEST: usize = 1 << 20;
const MOST_BLOCKS: usize = 1000;

/// One module of a file and the sizes its tensors show.
pub(super) struct Sighting<'a> {
    pub key: &'a ParsedKey,
    pub out: Option<usize>,
    pub input: Option<usize>,
}

/// A module that shows that the file is for FLUX.2: by its name, or by its sizes, as FLUX.2 has gated MLPs and other widths.
pub(super) fn of_flux2<'a>(seen: &[Sighting<'a>]) -> Option<&'a str> {
    let shows = |sighting: &&Sighting<'_>| {
        let module = flattened(&sighting.key.module);
        if model(&module) == Some(FLUX2) {
            return true;
        }
        let (Some(out), Some(input)) = (sighting.out, sighting.input) else {
            return false;
        };
        let in_block = |container, leaf: &str| {
            block_index(&module, container).is_some() && module.ends_with(leaf)
        };
        let times = |times: usize, width: usize| width.checked_mul(times);
        let published = [
            Flux2Config::dev(),
            Flux2Config::klein_9b(),
            Flux2Config::klein_4b(),
        ];
        let is_text = matches!(&*module, "txt_in" | "context_embedder");
        is_text
            && published
                .iter()
                .any(|config| config.joint_attention_dim == input)
            || matches!(&*module, "final_layer_linear" | "proj_out")
                && out == Flux2Config::dev().out_channels()
            || in_block("single_blocks", "_linear1") && Some(out) == times(9, input)
            || in_block("single_blocks", "_linear2") && Some(input) == times(4, out)
            || in_block("double_blocks", "_mlp_0") && Some(out) == times(6, input)
            || in_block("double_blocks", "_mlp_2") && Some(input) == times(3, out)
    };
    let found = seen.iter().find(shows)?;
    Some(&found.key.module)
}

/// A module that shows that the file is for another model with names like those of FLUX, and that model, by the width and
/// the number of blocks.
pub(super) fn foreign<'a>(seen: &[Sighting<'a>]) -> Option<(&'a str, &'static str)> {
    let inferred = complete(&ModelShape::default(), seen, false).transformer?;
    let names = Names::new(&ModelShape {
        transformer: Some(inferred.clone()),
        ..ModelShape::default()
    });
    let first = seen
        .iter()
        .find(|sighting| names.resolve(sighting.key).is_some())?;
    let (double, single) = (inferred.num_layers, inferred.num_single_layers);
    let dev = FluxConfig::dev();
    let model = other_width(inferred.hidden_size(), single > 0).or_else(|| {
        let wide = inferred.hidden_size() == dev.hidden_size();
        match (double > dev.num_layers, single > dev.num_single_layers) {
            (true, _) if wide && single == 0 => Some("Qwen-Image"),
            (true, true) if wide => Some("HunyuanVideo"),
            _ => None,
        }
    })?;
    Some((&first.key.module, model))
}

/// Whether what was seen fits FLUX.1 and FLUX.2 klein 4B alike: attention of the first double-stream blocks alone, at the width
/// that both have. Every other layer of a block has other sizes or another name, and FLUX.1 has more blocks.
pub(super) fn of_either(seen: &[Sighting<'_>], inferred: &ModelShape) -> bool {
    let klein = Flux2Config::klein_4b();
    let in_both = |sighting: &Sighting<'_>| {
        let module = flattened(&sighting.key.module);
        let block = ["double_blocks", "transformer_blocks"]
            .iter()
            .find_map(|container| block_index(&module, container));
        block.is_some_and(|block| block < klein.num_layers) && module.contains("attn_")
    };
    inferred.hidden_size() == klein.hidden_size() && seen.iter().all(in_both)
}

/// The given shape, completed from what was seen, for FLUX.2 or FLUX.1.
///
/// Widths that no tensor shows keep the values of FLUX.2 klein 4B or FLUX.1-dev.
pub(super) fn complete(given: &ModelShape, seen: &[Sighting<'_>], flux2: bool) -> ModelShape {
    if given.flux2.is_some() {
        return given.clone(); // no LoRA for FLUX.2 names another network
    }
    let keys = || seen.iter().map(|sighting| sighting.key);
    let blocks = |container: &str| {
        let indices = keys().filter_map(|key| block_index(&key.module, container));
        indices.max().map_or(0, |last| last + 1)
    };
    let double = blocks("double_blocks").max(blocks("transformer_blocks"));
    let single = blocks("single_blocks").max(blocks("single_transformer_blocks"));
    if flux2 {
        let guided = |key: &ParsedKey| flattened(&key.module).contains("guidance_");
        let config = Flux2Config {
            num_layers: double,
            num_single_layers: single,
            guidance_embeds: keys().any(guided),
            ..Flux2Config::klein_4b()
        };
        let shape = |config| ModelShape {
            flux2: Some(config),
            ..ModelShape::default()
        };
        let names = Names::new(&shape(config.clone()));
        return shape(Sizes::measure(&names, seen).flux2(config));
    }
    let mut shape = given.clone();
    let flux = shape.transformer.get_or_insert_with(|| FluxConfig {
        num_layers: double,
        num_single_layers: single,
        ..FluxConfig::dev()
    });
    let infer_flux = given.transformer.is_none().then(|| flux.clone());
    let clip = shape.clip.get_or_insert_with(|| ClipConfig {
        num_hidden_layers: blocks("text_model.encoder.layers"),
        ..ClipConfig::clip_l()
    });
    let infer_clip = given.clip.is_none().then(|| clip.clone());
    let t5 = shape.t5.get_or_insert_with(|| T5Config {
        num_layers: blocks("encoder.block"),
        ..T5Config::xxl()
    });
    let infer_t5 = given.t5.is_none().then(|| t5.clone());

    // Names do not depend on widths, so they resolve before the widths are known.
    let names = Names::new(&shape);
    let sizes = Sizes::measure(&names, seen);
    if let Some(config) = infer_flux {
        shape.transformer = Some(sizes.flux(config));
    }
    if let Some(config) = infer_clip {
        shape.clip = Some(ClipConfig {
            hidden_size: sizes.clip_hidden.unwrap_or(config.hidden_size),
            intermediate_size: sizes.clip_mlp.unwrap_or(config.intermediate_size),
            ..config
        });
    }
    if let Some(config) = infer_t5 {
        shape.t5 = Some(sizes.t5(config));
    }
    shape
}

/// Index of the block in a path that starts with `container`, dotted or flattened.
pub(super) fn block_index(module: &str, container: &str) -> Option<usize> {
    let rest = module
        .strip_prefix(container)
        .or_else(|| module.strip_prefix(&container.replace('.', "_")))?;
    let rest = rest.strip_prefix(['.', '_'])?;
    let digits = rest.split(|c: char| !c.is_ascii_digit()).next()?;
    digits.parse().ok().filter(|index| *index < MOST_BLOCKS)
}

/// Widths, each from the first tensor that shows it.
#[derive(Default)]
struct Sizes {
    hidden: Option<usize>,
    head: Option<usize>,
    in_channels: Option<usize>,
    out_channels: Option<usize>,
    text: Option<usize>,
    /// Channels of the embeddings of time.
    time: Option<usize>,
    /// Width inside the MLP of FLUX.2, after its gate.
    gated: Option<usize>,
    pooled: Option<usize>,
    clip_hidden: Option<usize>,
    clip_mlp: Option<usize>,
    t5_hidden: Option<usize>,
    t5_inner: Option<usize>,
    t5_mlp: Option<usize>,
}

impl Sizes {
    fn measure(names: &Names, seen: &[Sighting<'_>]) -> Self {
        let plausible = |size: &usize| (1..=WIDEST).contains(size);
        let mut sizes = Self::default();
        for sighting in seen {
            let (out, input) = (
                sighting.out.filter(plausible),
                sighting.input.filter(plausible),
            );
            if let Some(target) = names.resolve(sighting.key) {
                let path = &target.places[0].path;
                match target.component {
                    Component::Transformer => {
                        sizes.flux_module(path, target.places.len() > 1, out, input);
                    }
                    Component::ClipL => sizes.clip_module(path, out, input),
                    Component::T5 => sizes.t5_module(path, out, input),
                }
            }
        }
        sizes
    }

    fn flux_module(&mut self, path: &str, fused: bool, out: Option<usize>, input: Option<usize>) {
        let in_block = path.contains("blocks.");
        let leaf = path.rsplit('.').next().unwrap_or(path);
        match path {
            "x_embedder" => {
                self.in_channels = self.in_channels.or(input);
                self.hidden = self.hidden.or(out);
            }
            "context_embedder" => {
                self.text = self.text.or(input);
                self.hidden = self.hidden.or(out);
            }
            "proj_out" => {
                self.out_channels = self.out_channels.or(out);
                self.hidden = self.hidden.or(input);
            }
            "time_text_embed.text_embedder.linear_1" => {
                self.pooled = self.pooled.or(input);
                self.hidden = self.hidden.or(out);
            }
            _ if leaf.starts_with("norm_") => self.head = self.head.or(out),
            _ if path.ends_with("linear_1") => {
                self.time = self.time.or(input);
                self.hidden = self.hidden.or(out);
            }
            _ if path.ends_with("net.2") || in_block && leaf == "proj_out" => {
                self.hidden = self.hidden.or(out);
            }
            _ if leaf == "linear_out" => {
                self.gated = self.gated.or(input);
                self.hidden = self.hidden.or(out);
            }
            _ if leaf == "linear_in" => {
                self.gated = self.gated.or(out.map(|out| out / 2));
                self.hidden = self.hidden.or(input);
            }
            _ if leaf == "to_qkv_mlp_proj" || leaf == "to_out" => {
                let (out, input) = (out.unwrap_or(0), input.unwrap_or(0));
                let (hidden, gated) = match leaf {
                    "to_out" => (out, input.saturating_sub(out)),
                    _ => (input, out.saturating_sub(3 * input) / 2),
                };
                let known = |size: usize| Some(size).filter(|size| *size > 0);
                self.gated = self.gated.or(known(gated));
                self.hidden = self.hidden.or(known(hidden));
            }
            _ => {
                let square = !fused && (path.contains(".attn.") || leaf == "linear_2");
                self.hidden = self.hidden.or(input).or(out.filter(|_| square));
            }
        }
    }

    fn clip_module(&mut self, path: &str, out: Option<usize>, input: Option<usize>) {
        let (hidden, mlp) = if path.ends_with("fc1") {
            (input, out)
        } else if path.ends_with("fc2") {
            (out, input)
        } else {
            (out.or(input), None)
        };
        self.clip_hidden = self.clip_hidden.or(hidden);
        self.clip_mlp = self.clip_mlp.or(mlp);
    }

    fn t5_module(&mut self, path: &str, out: Option<usize>, input: Option<usize>) {
        let attention = path.contains("SelfAttention");
        let (hidden, inner) = if path.ends_with(".o") || path.ends_with(".wo") {
            (out, input)
        } else if path.ends_with("norm") {
            (out, None)
        } else {
            (input, out)
        };
        self.t5_hidden = self.t5_hidden.or(hidden);
        if attention {
            self.t5_inner = self.t5_inner.or(inner);
        } else {
            self.t5_mlp = self.t5_mlp.or(inner);
        }
    }

    /// Width of a head, and how many there are, of a network of width `hidden`.
    fn heads(&self, hidden: usize, usual: usize) -> (usize, usize) {
        let head = self.head.unwrap_or(usual).max(1);
        match hidden.is_multiple_of(head) {
            true => (head, hidden / head),
            false => (hidden, 1),
        }
    }

    fn flux(&self, config: FluxConfig) -> FluxConfig {
        let hidden = self.hidden.unwrap_or_else(|| config.hidden_size());
        let (head, heads) = self.heads(hidden, config.attention_head_dim);
        let out_channels = self.out_channels.or(config.out_channels);
        FluxConfig {
            attention_head_dim: head,
            num_attention_heads: heads,
            in_channels: self.in_channels.unwrap_or(config.in_channels),
            out_channels: Some(out_channels.unwrap_or(config.in_channels)),
            joint_attention_dim: self.text.unwrap_or(config.joint_attention_dim),
            pooled_projection_dim: self.pooled.unwrap_or(config.pooled_projection_dim),
            ..config
        }
    }

    fn flux2(&self, config: Flux2Config) -> Flux2Config {
        let hidden = self.hidden.unwrap_or_else(|| config.hidden_size());
        let (head, heads) = self.heads(hidden, config.attention_head_dim);
        let mut known = [Flux2Config::dev(), Flux2Config::klein_9b()].into_iter();
        let known = known.find(|known| known.hidden_size() == hidden);
        let known = known.unwrap_or_else(Flux2Config::klein_4b);
        Flux2Config {
            attention_head_dim: head,
            num_attention_heads: heads,
            in_channels: self.in_channels.unwrap_or(config.in_channels),
            out_channels: Some(self.out_channels.unwrap_or(config.in_channels)),
            joint_attention_dim: self.text.unwrap_or(known.joint_attention_dim),
            timestep_guidance_channels: self.time.unwrap_or(config.timestep_guidance_channels),
            mlp_ratio: match self.gated.filter(|gated| *gated != 3 * hidden) {
                Some(gated) => (gated as f64 + 0.5) / hidden as f64, // which is rounded down
                None => config.mlp_ratio,
            },
            guidance_embeds: config.guidance_embeds || known.guidance_embeds,
            ..config
        }
    }

    fn t5(&self, config: T5Config) -> T5Config {
        let inner = self.t5_inner.unwrap_or(config.num_heads * config.d_kv);
        let heads = if inner.is_multiple_of(config.d_kv) {
            inner / config.d_kv
        } else {
            1
        };
        T5Config {
            d_model: self.t5_hidden.unwrap_or(config.d_model),
            d_ff: self.t5_mlp.unwrap_or(config.d_ff),
            d_kv: inner / heads.max(1),
            num_heads: heads,
            ..config
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::key::parse;
    use super::*;

    #[test]
    fn block_numbers_are_read_in_both_spellings() {
        assert_eq!(
            block_index("double_blocks.18.img_mlp.0", "double_blocks"),
            Some(18)
        );
        assert_eq!(
            block_index("single_blocks_7_linear1", "single_blocks"),
            Some(7)
        );
        assert_eq!(
            block_index("single_transformer_blocks.1.x", "transformer_blocks"),
            None
        );
        assert_eq!(
            block_index(
                "text_model_encoder_layers_3_mlp",
                "text_model.encoder.layers"
            ),
            Some(3)
        );
        assert_eq!(
            block_index("double_blocks.99999999.img_mlp.0", "double_blocks"),
            None
        );
    }

    #[test]
    fn widths_come_from_the_tensors() {
        let keys = [
            (
                "lora_unet_double_blocks_1_img_mlp_2.lora_down.weight",
                Some(48),
                Some(192),
            ),
            ("lora_unet_img_in.lora_down.weight", Some(48), Some(128)),
            (
                "lora_te1_text_model_encoder_layers_1_mlp_fc1.lora_down.weight",
                Some(40),
                Some(20),
            ),
        ];
        let parsed: Vec<_> = keys
            .iter()
            .map(|(key, ..)| parse(key).expect("a parameter"))
            .collect();
        let sighting = |(key, (_, out, input)): (_, &(_, _, _))| Sighting {
            key,
            out: *out,
            input: *input,
        };
        let seen: Vec<_> = parsed.iter().zip(&keys).map(sighting).collect();
        let shape = complete(&ModelShape::default(), &seen, false);
        let flux = shape.transformer.expect("inferred");
        assert_eq!((flux.num_layers, flux.num_single_layers), (2, 0));
        assert_eq!(
            (flux.hidden_size(), flux.in_channels, flux.out_channels()),
            (48, 128, 64)
        );
        let clip = shape.clip.expect("inferred");
        assert_eq!(
            (
                clip.num_hidden_layers,
                clip.hidden_size,
                clip.intermediate_size
            ),
            (2, 20, 40)
        );
    }
}
