//! Tensors of full-size networks; nothing is allocated.

use std::collections::BTreeMap;

use burn::tensor::Device;

use super::*;
use crate::autoencoder::{Autoencoder, AutoencoderConfig};
use crate::flux1::config::FluxConfig;
use crate::flux1::transformer::FluxTransformer;
use crate::text::clip::{ClipConfig, ClipText};
use crate::text::t5::{T5Config, T5Encoder};

fn count(tensors: &BTreeMap<String, Vec<usize>>) -> (usize, usize) {
    (
        tensors.len(),
        tensors
            .values()
            .map(|shape| shape.iter().product::<usize>())
            .sum(),
    )
}

/// Tensors and parameters of a full-size transformer in both layouts; nothing is allocated.
fn transformer(config: &FluxConfig) -> ((usize, usize), (usize, usize)) {
    let model = FluxTransformer::new(config, &Device::flex());
    let bfl = Layout::BflTransformer {
        hidden: config.hidden_size(),
    };
    (
        count(&checkpoint_tensors(&model, Layout::Diffusers)),
        count(&checkpoint_tensors(&model, bfl)),
    )
}

#[test]
fn full_size_transformers_have_the_tensors_of_the_published_files() {
    for (name, config, parameters, tensors) in [
        (
            "dev, Krea, Kontext, Redux",
            FluxConfig::dev(),
            11_901_408_320,
            (1160, 780),
        ),
        (
            "schnell",
            FluxConfig::schnell(),
            11_891_178_560,
            (1156, 776),
        ),
        (
            "Canny, Depth",
            FluxConfig::control(),
            11_901_604_928,
            (1160, 780),
        ),
        ("Fill", FluxConfig::fill(), 11_902_391_360, (1160, 780)),
    ] {
        let found = transformer(&config);
        assert_eq!(
            found,
            ((tensors.0, parameters), (tensors.1, parameters)),
            "{name}"
        );
    }
}

#[test]
fn names_and_shapes_in_both_layouts() {
    let model = FluxTransformer::new(&FluxConfig::dev(), &Device::flex());
    let diffusers = checkpoint_tensors(&model, Layout::Diffusers);
    let bfl = checkpoint_tensors(&model, Layout::BflTransformer { hidden: 3072 });
    for (tensors, key, shape) in [
        (&diffusers, "x_embedder.weight", vec![3072, 64]),
        (&diffusers, "context_embedder.weight", vec![3072, 4096]),
        (
            &diffusers,
            "time_text_embed.guidance_embedder.linear_1.weight",
            vec![3072, 256],
        ),
        (
            &diffusers,
            "time_text_embed.text_embedder.linear_1.weight",
            vec![3072, 768],
        ),
        (
            &diffusers,
            "transformer_blocks.18.norm1_context.linear.weight",
            vec![18432, 3072],
        ),
        (
            &diffusers,
            "transformer_blocks.0.attn.to_out.0.bias",
            vec![3072],
        ),
        (
            &diffusers,
            "transformer_blocks.0.attn.norm_added_k.weight",
            vec![128],
        ),
        (
            &diffusers,
            "transformer_blocks.0.ff.net.0.proj.weight",
            vec![12288, 3072],
        ),
        (
            &diffusers,
            "transformer_blocks.0.ff_context.net.2.weight",
            vec![3072, 12288],
        ),
        (
            &diffusers,
            "single_transformer_blocks.37.proj_out.weight",
            vec![3072, 15360],
        ),
        (&diffusers, "norm_out.linear.weight", vec![6144, 3072]),
        (&diffusers, "proj_out.weight", vec![64, 3072]),
        (&bfl, "img_in.weight", vec![3072, 64]),
        (
            &bfl,
            "double_blocks.0.img_attn.qkv.weight",
            vec![9216, 3072],
        ),
        (
            &bfl,
            "double_blocks.18.txt_attn.norm.query_norm.scale",
            vec![128],
        ),
        (&bfl, "double_blocks.3.txt_mlp.2.weight", vec![3072, 12288]),
        (&bfl, "single_blocks.37.linear1.weight", vec![21504, 3072]),
        (&bfl, "single_blocks.0.linear1.bias", vec![21504]),
        (&bfl, "single_blocks.0.linear2.weight", vec![3072, 15360]),
        (
            &bfl,
            "single_blocks.5.modulation.lin.weight",
            vec![9216, 3072],
        ),
        (
            &bfl,
            "final_layer.adaLN_modulation.1.weight",
            vec![6144, 3072],
        ),
        (&bfl, "guidance_in.out_layer.bias", vec![3072]),
    ] {
        assert_eq!(tensors.get(key), Some(&shape), "{key}");
    }
}

#[test]
fn full_size_encoders_have_the_tensors_of_the_published_files() {
    let device = Device::flex();
    let clip = ClipText::new(&ClipConfig::clip_l(), &device);
    assert_eq!(
        count(&checkpoint_tensors(&clip, Layout::Clip)),
        (196, 123_060_480)
    );
    let t5 = T5Encoder::new(&T5Config::xxl(), &device);
    let tensors = checkpoint_tensors(&t5, Layout::T5);
    assert_eq!(count(&tensors), (219, 4_762_310_656));
    assert_eq!(
        tensors["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"],
        [32, 64]
    );
    assert_eq!(
        tensors["encoder.block.23.layer.1.DenseReluDense.wi_1.weight"],
        [10240, 4096]
    );

    let vae = Autoencoder::new(&AutoencoderConfig::flux(), &device);
    let diffusers = checkpoint_tensors(&vae, Layout::Diffusers);
    let bfl = checkpoint_tensors(&vae, Layout::BflAutoencoder { levels: 4 });
    assert_eq!(count(&diffusers), (244, 83_819_683));
    assert_eq!(count(&bfl), (244, 83_819_683));
    for (tensors, key, shape) in [
        (
            &diffusers,
            "encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
            vec![256, 128, 1, 1],
        ),
        (
            &diffusers,
            "decoder.up_blocks.2.resnets.0.conv1.weight",
            vec![256, 512, 3, 3],
        ),
        (
            &diffusers,
            "decoder.mid_block.attentions.0.to_out.0.weight",
            vec![512, 512],
        ),
        (
            &bfl,
            "encoder.down.1.block.0.nin_shortcut.weight",
            vec![256, 128, 1, 1],
        ),
        (
            &bfl,
            "decoder.up.1.block.0.conv1.weight",
            vec![256, 512, 3, 3],
        ),
        (
            &bfl,
            "decoder.up.3.upsample.conv.weight",
            vec![512, 512, 3, 3],
        ),
        (
            &bfl,
            "decoder.mid.attn_1.proj_out.weight",
            vec![512, 512, 1, 1],
        ),
        (&bfl, "encoder.mid.block_2.norm1.weight", vec![512]),
        (&bfl, "decoder.conv_out.weight", vec![3, 128, 3, 3]),
    ] {
        assert_eq!(tensors.get(key), Some(&shape), "{key}");
    }
}
