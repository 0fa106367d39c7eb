//! Which FLUX.2 a checkpoint holds, in which layout, and loading it.

use std::path::Path;

use burn::tensor::Device;

use crate::error::WeightsError;
use crate::flux2::autoencoder::Flux2Autoencoder;
use crate::flux2::config::{Flux2AutoencoderConfig, Flux2Config};
use crate::flux2::transformer::Flux2Transformer;
use crate::network_config::NetworkConfig;
use crate::pipeline::read_config;
use crate::weights::{BaseDtype, Checkpoint, Layout};

impl NetworkConfig for Flux2Config {
    type Network = Flux2Transformer;

    fn problem(&self) -> Option<String> {
        Self::problem(self)
    }

    fn of_tensors(
        checkpoint: &Checkpoint,
        hint: Option<&Self>,
    ) -> Result<(Layout, Self), WeightsError> {
        transformer(checkpoint, hint)
    }

    fn normalized(&self) -> Self {
        Self {
            out_channels: Some(self.out_channels()),
            mlp_ratio: ratio_of(self.mlp_hidden(), self.hidden_size()),
            ..self.clone()
        }
    }

    fn network(&self, device: &Device) -> Flux2Transformer {
        Flux2Transformer::new(self, device)
    }
}

/// The ratio that gives `width` when `hidden` times it is rounded down.
fn ratio_of(width: usize, hidden: usize) -> f64 {
    let ratio = width as f64 / hidden as f64;
    match (hidden as f64 * ratio) as usize == width {
        true => ratio,
        false => ratio.next_up(),
    }
}

/// Loads an autoencoder from a component folder or a single file in either layout.
///
/// # Errors
/// A malformed file, or a tensor that is missing, left over or of another shape.
pub fn load_autoencoder(
    path: &Path,
    config: Option<&Flux2AutoencoderConfig>,
    device: &Device,
) -> Result<Flux2Autoencoder, WeightsError> {
    let own: Option<Flux2AutoencoderConfig> = match path.is_dir() {
        true => Some(read_config(
            &path.join("config.json"),
            Flux2AutoencoderConfig::problem,
        )?),
        false => None,
    };
    let checkpoint = Checkpoint::open(path)?;
    let (layout, inferred) = autoencoder(&checkpoint, own.as_ref().or(config))?;
    checkpoint.load(
        Flux2Autoencoder::new(own.as_ref().unwrap_or(&inferred), device),
        layout,
        BaseDtype::F32,
        device,
    )
}

/// The transformer's layout, and its architecture as far as tensor shapes tell it.
///
/// Rotary axes, their base and the norms' epsilon are in no tensor: they are those of `hint`, or FLUX.2's for a head width
/// of 128.
///
/// # Errors
/// A file that holds no FLUX.2 transformer.
pub fn transformer(
    checkpoint: &Checkpoint,
    hint: Option<&Flux2Config>,
) -> Result<(Layout, Flux2Config), WeightsError> {
    let unknown = |reason: String| WeightsError::UnknownLayout {
        path: checkpoint.path().into(),
        what: "FLUX.2 transformer",
        reason,
    };
    let flux1 = [
        "vector_in.in_layer.weight",
        "time_text_embed.text_embedder.linear_1.weight",
    ];
    if flux1.iter().any(|key| checkpoint.shape(key).is_some()) {
        return Err(unknown("it is FLUX.1".into()));
    }
    let bfl = checkpoint.is_bfl();
    let dims = |bfl_key: &str, diffusers_key: &str| {
        checkpoint.matrix(bfl_key, diffusers_key).map_err(unknown)
    };
    let (hidden, in_channels) = dims("img_in.weight", "x_embedder.weight")?;
    dims(
        "double_stream_modulation_img.lin.weight",
        "double_stream_modulation_img.linear.weight",
    )?;
    let (_, joint_attention_dim) = dims("txt_in.weight", "context_embedder.weight")?;
    let (_, timestep_guidance_channels) = dims(
        "time_in.in_layer.weight",
        "time_guidance_embed.timestep_embedder.linear_1.weight",
    )?;
    let (out_channels, _) = dims("final_layer.linear.weight", "proj_out.weight")?;
    let width = checkpoint.head_width(hidden);
    let attention_head_dim = width.map_err(|problem| unknown(problem.into()))?;
    let known = match hint {
        Some(config) => config.clone(),
        None if attention_head_dim == 128 => Flux2Config::default(),
        None => {
            return Err(unknown(format!(
                "the rotary axes of a head width of {attention_head_dim} are not known"
            )));
        }
    };
    let (double, single) = if bfl {
        ("double_blocks.", "single_blocks.")
    } else {
        ("transformer_blocks.", "single_transformer_blocks.")
    };
    // The layer after an MLP's gate, of either kind of block.
    let mlp_hidden = dims(
        "double_blocks.0.img_mlp.2.weight",
        "transformer_blocks.0.ff.linear_out.weight",
    )
    .map(|(_, inner)| inner)
    .or_else(|error| {
        let (_, both) = dims(
            "single_blocks.0.linear2.weight",
            "single_transformer_blocks.0.attn.to_out.weight",
        )?;
        both.checked_sub(hidden).ok_or(error)
    })?;
    let config = Flux2Config {
        in_channels,
        out_channels: (out_channels != in_channels).then_some(out_channels),
        num_layers: checkpoint.blocks(double),
        num_single_layers: checkpoint.blocks(single),
        attention_head_dim,
        num_attention_heads: hidden / attention_head_dim,
        joint_attention_dim,
        timestep_guidance_channels,
        mlp_ratio: match known.mlp_hidden_at(hidden) == mlp_hidden {
            true => known.mlp_ratio, // as stated: a width is a rounded product
            false => ratio_of(mlp_hidden, hidden),
        },
        guidance_embeds: [
            "guidance_in.in_layer.weight",
            "time_guidance_embed.guidance_embedder.linear_1.weight",
        ]
        .iter()
        .any(|key| checkpoint.shape(key).is_some()),
        ..known
    };
    if let Some(reason) = config.problem() {
        return Err(unknown(reason));
    }
    Ok((
        if bfl {
            Layout::BflFlux2Transformer { hidden }
        } else {
            Layout::Diffusers
        },
        config,
    ))
}

/// The autoencoder's layout, and its architecture as far as tensor shapes tell it.
///
/// The groups of its norms and the epsilon of its statistics are in no tensor: they are those of `hint`, or FLUX.2's.
///
/// # Errors
/// A file that holds no FLUX.2 autoencoder.
pub fn autoencoder(
    checkpoint: &Checkpoint,
    hint: Option<&Flux2AutoencoderConfig>,
) -> Result<(Layout, Flux2AutoencoderConfig), WeightsError> {
    let unknown = |reason: String| WeightsError::UnknownLayout {
        path: checkpoint.path().into(),
        what: "FLUX.2 autoencoder",
        reason,
    };
    if checkpoint.shape("bn.running_mean").is_none() {
        return Err(unknown("it has no `bn.running_mean`".into()));
    }
    let bfl = checkpoint
        .shape("encoder.down.0.block.0.conv1.weight")
        .is_some();
    let name = |bfl_name: String, diffusers: String| if bfl { bfl_name } else { diffusers };
    let channels = |key: String, axis: usize| match checkpoint.shape(&key) {
        Some(shape @ [_, _, _, _]) => Ok(shape[axis]),
        _ => Err(unknown(format!("it has no convolution `{key}`"))),
    };
    let levels = checkpoint.blocks(&name("encoder.down.".into(), "encoder.down_blocks.".into()));
    let per_level = |key: &dyn Fn(usize) -> String| -> Result<Vec<usize>, WeightsError> {
        (0..levels).map(|level| channels(key(level), 0)).collect()
    };
    let block_out_channels = per_level(&|level| {
        name(
            format!("encoder.down.{level}.block.0.conv1.weight"),
            format!("encoder.down_blocks.{level}.resnets.0.conv1.weight"),
        )
    })?;
    // BFL counts the decoder's levels from full resolution, diffusers from the latent.
    let decoder = per_level(&|level| {
        name(
            format!("decoder.up.{level}.block.0.conv1.weight"),
            format!(
                "decoder.up_blocks.{}.resnets.0.conv1.weight",
                levels - 1 - level
            ),
        )
    })?;
    let has = |bfl_name: &str, diffusers: &str| {
        let key = if bfl { bfl_name } else { diffusers };
        checkpoint.shape(key).is_some()
    };
    let known = hint.cloned().unwrap_or_default();
    let config = Flux2AutoencoderConfig {
        in_channels: channels("encoder.conv_in.weight".into(), 1)?,
        out_channels: channels("decoder.conv_out.weight".into(), 0)?,
        decoder_block_out_channels: (decoder != block_out_channels).then_some(decoder),
        block_out_channels,
        layers_per_block: checkpoint.blocks(&name(
            "encoder.down.0.block.".into(),
            "encoder.down_blocks.0.resnets.".into(),
        )),
        latent_channels: channels("decoder.conv_in.weight".into(), 1)?,
        use_quant_conv: has("encoder.quant_conv.weight", "quant_conv.weight"),
        use_post_quant_conv: has("decoder.post_quant_conv.weight", "post_quant_conv.weight"),
        mid_block_add_attention: has(
            "encoder.mid.attn_1.q.weight",
            "encoder.mid_block.attentions.0.to_q.weight",
        ),
        ..known
    };
    match config.problem() {
        Some(reason) => Err(unknown(reason)),
        None if bfl => Ok((Layout::BflFlux2Autoencoder { levels }, config)),
        None => Ok((Layout::Flux2Autoencoder, config)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::{Base, checkpoint_tensors};

    #[test]
    fn a_ratio_gives_its_width_back() {
        for hidden in 1..200 {
            for width in 1..400 {
                let ratio = ratio_of(width, hidden);
                assert_eq!(
                    (hidden as f64 * ratio) as usize,
                    width,
                    "{width} of {hidden}"
                );
            }
        }
    }

    /// Tensors and parameters in both layouts of a full-size network; nothing is allocated.
    fn count(model: &impl burn::module::Module, layouts: [Layout; 2]) -> [(usize, usize); 2] {
        layouts.map(|layout| {
            let tensors = checkpoint_tensors(model, layout);
            let numbers = tensors
                .values()
                .map(|shape| shape.iter().product::<usize>());
            (tensors.len(), numbers.sum())
        })
    }

    #[test]
    fn full_size_networks_have_the_tensors_of_the_published_files() {
        let device = Device::flex();
        for (config, parameters, diffusers, bfl) in [
            (Flux2Config::dev(), 32_223_281_152, 331, 299),
            (Flux2Config::klein_9b(), 9_078_581_248, 233, 201),
            (Flux2Config::klein_4b(), 3_875_544_576, 169, 149),
        ] {
            let hidden = config.hidden_size();
            let layouts = [Layout::Diffusers, Layout::BflFlux2Transformer { hidden }];
            let found = count(&Flux2Transformer::new(&config, &device), layouts);
            assert_eq!(found, [(diffusers, parameters), (bfl, parameters)]);
        }
        let levels = 4;
        for (config, parameters) in [
            (Flux2AutoencoderConfig::default(), 84_046_115),
            (Flux2AutoencoderConfig::small_decoder(), 62_373_091),
        ] {
            let layouts = [
                Layout::Flux2Autoencoder,
                Layout::BflFlux2Autoencoder { levels },
            ];
            let found = count(&Flux2Autoencoder::new(&config, &device), layouts);
            // The published count leaves out the 2 x 128 statistics, the file has one more tensor, the batches counted.
            assert_eq!(found, [(250, parameters + 256); 2]);
        }
    }

    #[test]
    fn names_and_shapes_in_both_layouts() {
        let device = Device::flex();
        let klein = Flux2Transformer::new(&Flux2Config::klein_4b(), &device);
        let dev = Flux2Transformer::new(&Flux2Config::dev(), &device);
        let vae = Flux2Autoencoder::new(&Flux2AutoencoderConfig::small_decoder(), &device);
        let bfl = |hidden| Layout::BflFlux2Transformer { hidden };
        for (tensors, key, shape) in [
            (
                checkpoint_tensors(&klein, Layout::Diffusers),
                vec![
                    "x_embedder.weight",
                    "context_embedder.weight",
                    "double_stream_modulation_txt.linear.weight",
                    "transformer_blocks.4.ff_context.linear_in.weight",
                    "transformer_blocks.0.attn.to_out.0.weight",
                    "single_transformer_blocks.19.attn.to_qkv_mlp_proj.weight",
                    "single_transformer_blocks.19.attn.to_out.weight",
                    "transformer_blocks.0.attn.norm_added_k.weight",
                ],
                vec![
                    vec![3072, 128],
                    vec![3072, 7680],
                    vec![18432, 3072],
                    vec![18432, 3072],
                    vec![3072, 3072],
                    vec![27648, 3072],
                    vec![3072, 12288],
                    vec![128],
                ],
            ),
            (
                checkpoint_tensors(&dev, bfl(6144)),
                vec![
                    "img_in.weight",
                    "txt_in.weight",
                    "guidance_in.in_layer.weight",
                    "double_stream_modulation_img.lin.weight",
                    "single_stream_modulation.lin.weight",
                    "double_blocks.7.txt_attn.qkv.weight",
                    "double_blocks.7.img_mlp.2.weight",
                    "single_blocks.47.linear1.weight",
                    "single_blocks.47.linear2.weight",
                    "single_blocks.47.norm.key_norm.scale",
                    "final_layer.adaLN_modulation.1.weight",
                    "final_layer.linear.weight",
                ],
                vec![
                    vec![6144, 128],
                    vec![6144, 15360],
                    vec![6144, 256],
                    vec![36864, 6144],
                    vec![18432, 6144],
                    vec![18432, 6144],
                    vec![6144, 18432],
                    vec![55296, 6144],
                    vec![6144, 24576],
                    vec![128],
                    vec![12288, 6144],
                    vec![128, 6144],
                ],
            ),
            (
                checkpoint_tensors(&vae, Layout::BflFlux2Autoencoder { levels: 4 }),
                vec![
                    "encoder.quant_conv.weight",
                    "decoder.post_quant_conv.weight",
                    "bn.running_var",
                    "decoder.up.0.block.0.conv1.bias",
                    "decoder.up.3.upsample.conv.weight",
                    "encoder.conv_out.weight",
                ],
                vec![
                    vec![64, 64, 1, 1],
                    vec![32, 32, 1, 1],
                    vec![128],
                    vec![96],
                    vec![384, 384, 3, 3],
                    vec![64, 512, 3, 3],
                ],
            ),
        ] {
            for (key, shape) in key.into_iter().zip(shape) {
                assert_eq!(tensors.get(key), Some(&shape), "{key}");
            }
        }
    }
    fn case(path: &str) -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../../tests/fixtures")
            .join(path)
    }

    #[test]
    fn an_autoencoder_is_told_from_its_tensors_in_both_layouts() {
        for (path, is_bfl) in [
            ("parity/flux2_bfl_autoencoder/ae.safetensors", true),
            (
                "parity/flux2_vae/model/diffusion_pytorch_model.safetensors",
                false,
            ),
        ] {
            let checkpoint = Checkpoint::open(&case(path)).expect("the fixture");
            let hint = Flux2AutoencoderConfig {
                norm_num_groups: 4,
                ..Flux2AutoencoderConfig::default()
            };
            let (layout, config) = autoencoder(&checkpoint, Some(&hint)).expect("an autoencoder");
            assert_eq!(layout == Layout::BflFlux2Autoencoder { levels: 4 }, is_bfl);
            let expected = Flux2AutoencoderConfig {
                block_out_channels: vec![8, 12, 16, 16],
                layers_per_block: 1,
                latent_channels: 8,
                ..hint
            };
            assert_eq!(config, expected);
        }
    }

    #[test]
    fn a_file_of_another_model_is_named() {
        let error = |path: &str| {
            let loaded = Flux2Config::load(&case(path), None, Base::default(), &Device::flex());
            loaded.expect_err("another model").to_string()
        };
        let flux1 = std::fs::read_dir(case("parity/bfl_transformer")).expect("the fixture");
        let flux1 = flux1
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .find(|name| name.starts_with("flux1") && name.ends_with(".safetensors"));
        let flux1 = format!("parity/bfl_transformer/{}", flux1.expect("a checkpoint"));
        assert!(error(&flux1).contains("it is FLUX.1"), "{}", error(&flux1));
        let vae = error("parity/flux2_bfl_autoencoder/ae.safetensors");
        assert!(vae.contains("no matrix `x_embedder.weight`"), "{vae}");
        let vae = case("parity/vae_small/model/diffusion_pytorch_model.safetensors");
        let error = load_autoencoder(&vae, None, &Device::flex()).expect_err("FLUX.1's");
        assert!(error.to_string().contains("bn.running_mean"), "{error}");
        // The rotary axes of the tiny network's heads are in no tensor.
        let file = "parity/flux2_bfl_transformer/flux2-tiny-klein.safetensors";
        let error = Flux2Config::load(&case(file), None, Base::default(), &Device::flex())
            .expect_err("no axes");
        assert!(error.to_string().contains("rotary axes"), "{error}");
    }
}
