//! What each program does with a key: the facts, one line each.

use super::super::readers::{Kept, readings};
use super::*;

/// The readers that pass over `key` or take it for something else, with the reason, of a file with these keys.
fn problems(key: &str, others: &[&str], flux2: bool) -> Vec<(&'static str, String)> {
    let keys: Vec<String> = [&[key][..], others]
        .concat()
        .iter()
        .map(|key| key.to_string())
        .collect();
    let kept = Kept {
        keys: &keys,
        flux2,
        ..Kept::default()
    };
    let of_key = |reading: Reading| {
        let found = reading.drops.into_iter().chain(reading.differs);
        let mut found = found.filter(|(dropped, _)| dropped == key);
        Some((reading.reader, found.next()?.1))
    };
    readings(kept).into_iter().filter_map(of_key).collect()
}

#[track_caller]
fn check(key: &str, others: &[&str], flux2: bool, expected: &[(&str, &str)]) {
    let found = problems(key, others, flux2);
    let readers: Vec<_> = found.iter().map(|(reader, _)| *reader).collect();
    assert_eq!(
        readers,
        expected
            .iter()
            .map(|(reader, _)| *reader)
            .collect::<Vec<_>>(),
        "{key}: {found:?}"
    );
    for ((_, reason), (_, part)) in found.iter().zip(expected) {
        assert!(reason.contains(part), "{key}: {reason}");
    }
}

#[test]
fn flux_1() {
    let kohya_only = ("sd-scripts", "kohya's names");
    for (key, expected) in [
        (
            "transformer.transformer_blocks.0.attn.to_q.lora_B.weight",
            &[kohya_only][..],
        ),
        ("transformer.norm_out.linear.lora_A.weight", &[kohya_only]),
        (
            "transformer.proj_out.lora_B.bias",
            &[("ComfyUI", "lora_B.bias"), kohya_only],
        ),
        (
            "transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector",
            &[("ComfyUI", "plain LoRA"), kohya_only],
        ),
        (
            "transformer.transformer_blocks.0.attn.norm_q.weight",
            &[("ComfyUI", "whole weights"), kohya_only],
        ),
        (
            "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight",
            &[("diffusers", "T5"), ("ComfyUI", "names"), kohya_only],
        ),
        (
            "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
            &[],
        ),
        (
            "lora_unet_img_in.lora_up.weight",
            &[("diffusers", "outside the blocks")],
        ),
        (
            "lora_unet_final_layer_linear.alpha",
            &[
                ("diffusers", "outside the blocks"),
                ("sd-scripts", "final layer"),
            ],
        ),
        (
            "lora_unet_single_blocks_0_linear1.dora_scale",
            &[("diffusers", "plain LoRA"), ("sd-scripts", "low-rank")],
        ),
        (
            "lora_unet_single_blocks_0_linear1.lokr_w1",
            &[("diffusers", "LoKr"), ("sd-scripts", "low-rank")],
        ),
        (
            "diffusion_model.single_blocks.0.linear1.diff_b",
            &[("diffusers", "diff_b"), kohya_only],
        ),
        (
            "diffusion_model.single_blocks.0.linear1.lora_A.weight",
            &[("diffusers", "names"), kohya_only],
        ),
        (
            "base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight",
            &[
                ("diffusers", "Black Forest Labs"),
                ("ComfyUI", "names"),
                kohya_only,
            ],
        ),
        (
            "transformer_blocks.0.attn.to_q.lora_A.weight",
            &[("diffusers", "prefix"), ("ComfyUI", "names"), kohya_only],
        ),
    ] {
        check(key, &[], false, expected);
    }
    let down = "diffusion_model.single_blocks.0.linear1.lora_down.weight";
    check(down, &[], false, &[kohya_only]);
}

// diffusers: run, as `tests/reference/written_forms.py` and the reference cases of FLUX.2 do.
#[test]
fn flux_2() {
    for (key, expected) in [
        (
            "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj.lora_A.weight",
            &[][..],
        ),
        (
            "transformer.double_stream_modulation_img.linear.lora_B.weight",
            &[("ComfyUI", "only by")],
        ),
        (
            "transformer.time_guidance_embed.timestep_embedder.linear_1.lora_B.weight",
            &[("ComfyUI", "only by")],
        ),
        ("transformer.x_embedder.lora_B.weight", &[]),
        (
            "diffusion_model.double_stream_modulation_img.lin.lora_B.weight",
            &[],
        ),
        ("diffusion_model.single_blocks.0.linear1.lora_A.weight", &[]),
        (
            "diffusion_model.final_layer.adaLN_modulation.1.lora_A.weight",
            &[],
        ),
        (
            "diffusion_model.final_layer.adaLN_modulation.1.lora_B.weight",
            &[("diffusers", "halves")],
        ),
        (
            "base_model.model.single_blocks.0.linear1.lora_A.weight",
            &[("ComfyUI", "names")],
        ),
        (
            "base_model.model.x_embedder.lora_A.weight",
            &[("diffusers", "stops with an error"), ("ComfyUI", "names")],
        ),
        (
            "base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight",
            &[("ComfyUI", "names")],
        ),
        (
            "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
            &[],
        ),
        ("lora_unet_img_in.lora_down.weight", &[]),
        (
            "lora_unet_single_stream_modulation_lin.lora_down.weight",
            &[("diffusers", "outside")],
        ),
        (
            "lora_unet_final_layer_adaLN_modulation_1.alpha",
            &[("diffusers", "outside")],
        ),
        (
            "diffusion_model.single_blocks.0.linear1.lora_down.weight",
            &[("diffusers", "kohya's")],
        ),
        (
            "single_blocks.0.linear1.lora_A.weight",
            &[("diffusers", "prefix"), ("ComfyUI", "names")],
        ),
        (
            "lora_unet_single_blocks_0_linear1.hada_w1_a",
            &[("diffusers", "LoHa")],
        ),
    ] {
        check(key, &[], true, expected);
    }
    // One key that is of no factor, and it loads nothing; but of a file with `.lora_down.weight` it leaves such keys out.
    let factor = "diffusion_model.single_blocks.0.linear1.lora_A.weight";
    let own = "transformer.x_embedder.lora_A.weight";
    for (key, other, stops) in [
        (
            factor,
            "diffusion_model.single_blocks.0.linear1.alpha",
            true,
        ),
        (
            factor,
            "diffusion_model.single_blocks.0.linear1.diff_b",
            true,
        ),
        (factor, "diffusion_model.img_in.set_weight", true),
        (
            factor,
            "diffusion_model.double_blocks.0.img_attn.norm.query_norm.scale.set_weight",
            true,
        ),
        (
            factor,
            "diffusion_model.transformer_blocks.0.attn.to_q.diff_b",
            true,
        ),
        (
            factor,
            "diffusion_model.single_blocks.0.linear1.dora_scale",
            false,
        ),
        (own, "transformer.proj_out.weight", true),
        (own, "transformer.x_embedder.lora_B.bias", false),
        (
            "lora_unet_single_blocks_0_linear1.lora_down.weight",
            "lora_unet_single_blocks_0_linear1.diff_b",
            false,
        ),
    ] {
        let expected: &[_] = match stops {
            true => &[("diffusers", "stops with an error")],
            false => &[],
        };
        check(key, &[other], true, expected);
    }
}

#[test]
fn a_scale_beside_the_tensors_is_not_everybody_s() {
    let key = "base_model.model.transformer_blocks.0.attn.to_q.lora_B.weight".to_string();
    let kept = Kept {
        keys: &[key],
        flux2: true,
        folder: true,
        scale_beside: true,
    };
    let found = readings(kept);
    let counts = found
        .iter()
        .map(|r| (r.reader, r.loads, r.drops.len(), r.differs.len()));
    assert_eq!(
        counts.collect::<Vec<_>>(),
        [
            ("diffusers", 0, 0, 1),
            ("ComfyUI", 0, 1, 0),
            ("PEFT", 1, 0, 0)
        ]
    );
    let line = &found[0].lines()[0];
    assert!(
        line.starts_with("loads otherwise 1 key, `base_model"),
        "{line}"
    );
}
