//! The modules of each network that an update can name, with their sizes.

use crate::flux1::config::FluxConfig;
use crate::flux2::config::Flux2Config;
use crate::text::clip::ClipConfig;
use crate::text::t5::T5Config;

use super::Component;

/// The networks a LoRA is for. What is `None` is inferred from the file.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ModelShape {
    /// The velocity network of FLUX.1.
    pub transformer: Option<FluxConfig>,
    /// The velocity network of FLUX.2.
    pub flux2: Option<Flux2Config>,
    /// The CLIP text encoder.
    pub clip: Option<ClipConfig>,
    /// The T5 text encoder.
    pub t5: Option<T5Config>,
}

/// Sizes of one module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModuleShape {
    /// A linear layer, weight `[out, input]`.
    Linear {
        /// Rows.
        out: usize,
        /// Columns.
        input: usize,
    },
    /// A norm with a gain of this length.
    Norm {
        /// Elements of the gain.
        len: usize,
    },
}

impl ModuleShape {
    /// Rows of the weight.
    pub fn out(self) -> usize {
        match self {
            Self::Linear { out, .. } => out,
            Self::Norm { len } => len,
        }
    }
}

impl ModelShape {
    /// Width of the velocity network, 0 if there is none.
    pub(super) fn hidden_size(&self) -> usize {
        let flux2 = self.flux2.as_ref().map(Flux2Config::hidden_size);
        let flux1 = self.transformer.as_ref().map(FluxConfig::hidden_size);
        flux2.or(flux1).unwrap_or(0)
    }

    /// What kohya's programs and the Stability model specification call the model, as entries of a header. Which FLUX.2 it is
    /// shows in its guidance, which dev alone has, or its width; without either it is FLUX.2 and no more.
    ///
    /// Source: sd-scripts 48d368fa for FLUX.1; musubi-tuner `dataset/architectures.py`, `utils/sai_model_spec.py` for FLUX.2.
    pub fn header(&self) -> [(&'static str, &'static str); 3] {
        let schnell = |config: &FluxConfig| !config.guidance_embeds;
        let (base, architecture, implementation) = match &self.flux2 {
            Some(config) => {
                let width = config.hidden_size();
                let is = |published: Flux2Config| published.hidden_size() == width;
                let (base, architecture) = if config.guidance_embeds || is(Flux2Config::dev()) {
                    ("flux_2_dev", "Flux.2-dev/lora")
                } else if is(Flux2Config::klein_9b()) {
                    ("flux_2_klein_9b", "Flux.2-klein-9b/lora")
                } else if is(Flux2Config::klein_4b()) {
                    ("flux_2_klein_4b", "Flux.2-klein-4b/lora")
                } else {
                    ("flux_2", "Flux.2/lora")
                };
                let implementation = "https://github.com/black-forest-labs/flux2";
                (base, architecture, implementation)
            }
            None => {
                let architecture = match self.transformer.as_ref().is_some_and(schnell) {
                    true => "flux-1-schnell/lora",
                    false => "flux-1-dev/lora",
                };
                let implementation = "https://github.com/black-forest-labs/flux";
                ("flux1", architecture, implementation)
            }
        };
        [
            ("ss_base_model_version", base),
            ("modelspec.architecture", architecture),
            ("modelspec.implementation", implementation),
        ]
    }

    /// Path and sizes of every module of a component that an update can name.
    pub fn modules(&self, component: Component) -> Vec<(String, ModuleShape)> {
        match component {
            Component::Transformer => match &self.flux2 {
                Some(config) => Some(flux2_modules(config)),
                None => self.transformer.as_ref().map(transformer_modules),
            },
            Component::ClipL => self.clip.as_ref().map(clip_modules),
            Component::T5 => self.t5.as_ref().map(t5_modules),
        }
        .unwrap_or_default()
    }
}

fn linear(out: usize, input: usize) -> ModuleShape {
    ModuleShape::Linear { out, input }
}

fn transformer_modules(config: &FluxConfig) -> Vec<(String, ModuleShape)> {
    let hidden = config.hidden_size();
    let mlp = 4 * hidden;
    let square = linear(hidden, hidden);
    let head_norm = ModuleShape::Norm {
        len: config.attention_head_dim,
    };
    let double = [
        ("norm1.linear", linear(6 * hidden, hidden)),
        ("norm1_context.linear", linear(6 * hidden, hidden)),
        ("attn.to_q", square),
        ("attn.to_k", square),
        ("attn.to_v", square),
        ("attn.add_q_proj", square),
        ("attn.add_k_proj", square),
        ("attn.add_v_proj", square),
        ("attn.to_out.0", square),
        ("attn.to_add_out", square),
        ("attn.norm_q", head_norm),
        ("attn.norm_k", head_norm),
        ("attn.norm_added_q", head_norm),
        ("attn.norm_added_k", head_norm),
        ("ff.net.0.proj", linear(mlp, hidden)),
        ("ff.net.2", linear(hidden, mlp)),
        ("ff_context.net.0.proj", linear(mlp, hidden)),
        ("ff_context.net.2", linear(hidden, mlp)),
    ];
    let single = [
        ("norm.linear", linear(3 * hidden, hidden)),
        ("attn.to_q", square),
        ("attn.to_k", square),
        ("attn.to_v", square),
        ("attn.norm_q", head_norm),
        ("attn.norm_k", head_norm),
        ("proj_mlp", linear(mlp, hidden)),
        ("proj_out", linear(hidden, hidden + mlp)),
    ];
    let root = [
        ("x_embedder", linear(hidden, config.in_channels)),
        (
            "context_embedder",
            linear(hidden, config.joint_attention_dim),
        ),
        ("norm_out.linear", linear(2 * hidden, hidden)),
        ("proj_out", linear(config.out_channels(), hidden)),
    ];
    let embedders = [
        ("timestep", 256, true),
        ("text", config.pooled_projection_dim, true),
        ("guidance", 256, config.guidance_embeds),
    ];
    let mut modules = Vec::new();
    for block in 0..config.num_layers {
        let path = |name| format!("transformer_blocks.{block}.{name}");
        modules.extend(double.map(|(name, shape)| (path(name), shape)));
    }
    for block in 0..config.num_single_layers {
        let path = |name| format!("single_transformer_blocks.{block}.{name}");
        modules.extend(single.map(|(name, shape)| (path(name), shape)));
    }
    modules.extend(root.map(|(name, shape)| (name.into(), shape)));
    for (name, input, _) in embedders.into_iter().filter(|(.., exists)| *exists) {
        let path = |layer| format!("time_text_embed.{name}_embedder.{layer}");
        modules.push((path("linear_1"), linear(hidden, input)));
        modules.push((path("linear_2"), square));
    }
    modules
}

fn flux2_modules(config: &Flux2Config) -> Vec<(String, ModuleShape)> {
    let (hidden, mlp) = (config.hidden_size(), config.mlp_hidden());
    let square = linear(hidden, hidden);
    let head_norm = ModuleShape::Norm {
        len: config.attention_head_dim,
    };
    let double = [
        ("attn.to_q", square),
        ("attn.to_k", square),
        ("attn.to_v", square),
        ("attn.add_q_proj", square),
        ("attn.add_k_proj", square),
        ("attn.add_v_proj", square),
        ("attn.to_out.0", square),
        ("attn.to_add_out", square),
        ("attn.norm_q", head_norm),
        ("attn.norm_k", head_norm),
        ("attn.norm_added_q", head_norm),
        ("attn.norm_added_k", head_norm),
        ("ff.linear_in", linear(2 * mlp, hidden)),
        ("ff.linear_out", linear(hidden, mlp)),
        ("ff_context.linear_in", linear(2 * mlp, hidden)),
        ("ff_context.linear_out", linear(hidden, mlp)),
    ];
    let single = [
        ("attn.to_qkv_mlp_proj", linear(3 * hidden + 2 * mlp, hidden)),
        ("attn.to_out", linear(hidden, hidden + mlp)),
        ("attn.norm_q", head_norm),
        ("attn.norm_k", head_norm),
    ];
    let root = [
        ("x_embedder", linear(hidden, config.in_channels)),
        (
            "context_embedder",
            linear(hidden, config.joint_attention_dim),
        ),
        (
            "double_stream_modulation_img.linear",
            linear(6 * hidden, hidden),
        ),
        (
            "double_stream_modulation_txt.linear",
            linear(6 * hidden, hidden),
        ),
        (
            "single_stream_modulation.linear",
            linear(3 * hidden, hidden),
        ),
        ("norm_out.linear", linear(2 * hidden, hidden)),
        ("proj_out", linear(config.out_channels(), hidden)),
    ];
    let mut modules = Vec::new();
    for block in 0..config.num_layers {
        let path = |name| format!("transformer_blocks.{block}.{name}");
        modules.extend(double.map(|(name, shape)| (path(name), shape)));
    }
    for block in 0..config.num_single_layers {
        let path = |name| format!("single_transformer_blocks.{block}.{name}");
        modules.extend(single.map(|(name, shape)| (path(name), shape)));
    }
    modules.extend(root.map(|(name, shape)| (name.into(), shape)));
    for (name, exists) in [("timestep", true), ("guidance", config.guidance_embeds)] {
        if exists {
            let path = |layer| format!("time_guidance_embed.{name}_embedder.{layer}");
            let channels = config.timestep_guidance_channels;
            modules.push((path("linear_1"), linear(hidden, channels)));
            modules.push((path("linear_2"), square));
        }
    }
    modules
}

fn clip_modules(config: &ClipConfig) -> Vec<(String, ModuleShape)> {
    let (hidden, mlp) = (config.hidden_size, config.intermediate_size);
    let square = linear(hidden, hidden);
    let norm = ModuleShape::Norm { len: hidden };
    let layer = [
        ("self_attn.q_proj", square),
        ("self_attn.k_proj", square),
        ("self_attn.v_proj", square),
        ("self_attn.out_proj", square),
        ("mlp.fc1", linear(mlp, hidden)),
        ("mlp.fc2", linear(hidden, mlp)),
        ("layer_norm1", norm),
        ("layer_norm2", norm),
    ];
    let mut modules = Vec::new();
    for i in 0..config.num_hidden_layers {
        let path = |name| format!("text_model.encoder.layers.{i}.{name}");
        modules.extend(layer.map(|(name, shape)| (path(name), shape)));
    }
    modules.push(("text_model.final_layer_norm".into(), norm));
    modules
}

fn t5_modules(config: &T5Config) -> Vec<(String, ModuleShape)> {
    let (hidden, inner, mlp) = (config.d_model, config.num_heads * config.d_kv, config.d_ff);
    let norm = ModuleShape::Norm { len: hidden };
    let block = [
        ("0.SelfAttention.q", linear(inner, hidden)),
        ("0.SelfAttention.k", linear(inner, hidden)),
        ("0.SelfAttention.v", linear(inner, hidden)),
        ("0.SelfAttention.o", linear(hidden, inner)),
        ("0.layer_norm", norm),
        ("1.DenseReluDense.wi_0", linear(mlp, hidden)),
        ("1.DenseReluDense.wi_1", linear(mlp, hidden)),
        ("1.DenseReluDense.wo", linear(hidden, mlp)),
        ("1.layer_norm", norm),
    ];
    let mut modules = Vec::new();
    for i in 0..config.num_layers {
        let path = |name| format!("encoder.block.{i}.layer.{name}");
        modules.extend(block.map(|(name, shape)| (path(name), shape)));
    }
    modules.push(("encoder.final_layer_norm".into(), norm));
    modules
}

#[cfg(test)]
mod tests {
    use super::*;

    fn linears(config: FluxConfig) -> usize {
        let shape = ModelShape {
            transformer: Some(config),
            ..ModelShape::default()
        };
        let modules = shape.modules(Component::Transformer);
        let is_linear = |shape: &ModuleShape| matches!(shape, ModuleShape::Linear { .. });
        modules.iter().filter(|(_, shape)| is_linear(shape)).count()
    }

    #[test]
    fn dev_has_504_linear_layers_and_schnell_502() {
        assert_eq!(linears(FluxConfig::dev()), 504);
        assert_eq!(linears(FluxConfig::schnell()), 502);
    }

    #[test]
    fn a_header_names_a_flux2_by_its_guidance_or_width_alone() {
        let named = |config: Flux2Config| {
            let shape = ModelShape {
                flux2: Some(config),
                ..ModelShape::default()
            };
            let [base, architecture, _] = shape.header();
            (base.1, architecture.1)
        };
        assert_eq!(named(Flux2Config::dev()), ("flux_2_dev", "Flux.2-dev/lora"));
        let klein = ("flux_2_klein_9b", "Flux.2-klein-9b/lora");
        assert_eq!(named(Flux2Config::klein_9b()), klein);
        let klein = ("flux_2_klein_4b", "Flux.2-klein-4b/lora");
        assert_eq!(named(Flux2Config::klein_4b()), klein);
        let tiny = |guidance_embeds| Flux2Config {
            num_attention_heads: 2,
            guidance_embeds,
            ..Flux2Config::dev()
        };
        assert_eq!(named(tiny(true)), ("flux_2_dev", "Flux.2-dev/lora"));
        assert_eq!(named(tiny(false)), ("flux_2", "Flux.2/lora"));
    }

    #[test]
    fn the_modules_of_flux2_are_the_layers_and_norms_of_its_network() {
        use crate::flux2::transformer::Flux2Transformer;
        use crate::weights::{Layout, checkpoint_tensors};
        use burn::tensor::Device;

        for config in [Flux2Config::dev(), Flux2Config::klein_4b()] {
            let network = Flux2Transformer::new(&config, &Device::flex());
            let shape = ModelShape {
                flux2: Some(config),
                ..ModelShape::default()
            };
            let modules = shape.modules(Component::Transformer);
            let tensors = modules.into_iter().map(|(path, shape)| {
                let weight = match shape {
                    ModuleShape::Linear { out, input } => vec![out, input],
                    ModuleShape::Norm { len } => vec![len],
                };
                (format!("{path}.weight"), weight)
            });
            let tensors: std::collections::BTreeMap<_, _> = tensors.collect();
            assert_eq!(tensors, checkpoint_tensors(&network, Layout::Diffusers));
        }
    }

    #[test]
    fn clip_l_has_72_linear_layers_and_t5_xxl_168() {
        let shape = ModelShape {
            clip: Some(ClipConfig::clip_l()),
            t5: Some(T5Config::xxl()),
            ..ModelShape::default()
        };
        let count = |component| {
            let modules = shape.modules(component);
            let linear = |shape: &ModuleShape| matches!(shape, ModuleShape::Linear { .. });
            modules.iter().filter(|(_, shape)| linear(shape)).count()
        };
        assert_eq!(count(Component::ClipL), 72);
        assert_eq!(count(Component::T5), 168);
    }
}
