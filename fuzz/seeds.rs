//! The first inputs of each corpus, made here: a sound file of each kind, from which the fuzzer goes on.

use super::targets::{MERGES, UNIGRAM, VOCAB};

/// Target and input.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let chosen = |kind: u8, text: &str| [&[kind], text.as_bytes()].concat();
    let plain = |text: &str| text.as_bytes().to_vec();
    let layer = "transformer_blocks.0.attn.to_q";
    let mut seeds = vec![
        (
            "tensor_file",
            chosen(
                1,
                r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
            ),
        ),
        (
            "tensor_file",
            chosen(
                2,
                r#"{"__metadata__":{"k":"v"},"a":{"dtype":"U8","shape":[2,2],"data_offsets":[0,4]},"b":{"dtype":"BF16","shape":[],"data_offsets":[4,6]},"c":{"dtype":"F16","shape":[1],"data_offsets":[6,8]}}"#,
            ),
        ),
        ("tensor_file", chosen(0, "\u{2}\0\0\0\0\0\0\0{}")),
        (
            "shard_index",
            plain(
                r#"{"metadata":{"total_size":16},"weight_map":{"a":"a.safetensors","b":"b.safetensors"}}"#,
            ),
        ),
        (
            "shard_index",
            plain(r#"{"weight_map":{"a":"../a.safetensors"}}"#),
        ),
        (
            "checkpoint_keys",
            plain(
                "x_embedder.weight 128x64\ncontext_embedder.weight 128x8\ntime_text_embed.text_embedder.linear_1.weight 128x8\nproj_out.weight 8x128\ntransformer_blocks.0.attn.norm_q.weight 128",
            ),
        ),
        (
            "checkpoint_keys",
            plain(
                "img_in.weight 128x64\ntxt_in.weight 128x8\nvector_in.in_layer.weight 128x8\nfinal_layer.linear.weight 8x128\nsingle_blocks.3.norm.query_norm.scale 128\nsingle_blocks.0.norm.query_norm.scale 128",
            ),
        ),
        (
            "checkpoint_keys",
            plain(
                "encoder.down.0.block.0.conv1.weight 32x32x1x1\nencoder.conv_in.weight 32x3x3x3\ndecoder.conv_out.weight 3x32x3x3\ndecoder.conv_in.weight 32x4x3x3",
            ),
        ),
        (
            "lora_keys",
            format!(
                "transformer.{layer}.lora_A.weight 2x4\ntransformer.{layer}.lora_B.weight b4x2"
            )
            .into_bytes(),
        ),
        (
            "lora_keys",
            plain(
                "@ss_network_dim 2\nlora_unet_double_blocks_0_img_attn_qkv.lora_down.weight 2x4\nlora_unet_double_blocks_0_img_attn_qkv.lora_up.weight 12x2\nlora_unet_double_blocks_0_img_attn_qkv.alpha ",
            ),
        ),
        (
            "lora_keys",
            plain(
                "lycoris_transformer_blocks_0_attn_to_q.lokr_w1 2x2\nlycoris_transformer_blocks_0_attn_to_q.lokr_w2 4x4\nlycoris_transformer_blocks_0_attn_to_q.alpha ",
            ),
        ),
        (
            "lora_keys",
            plain(
                "double_blocks.0.processor.qkv_lora1.down.weight 2x4\ndouble_blocks.0.processor.qkv_lora1.up.weight 12x2",
            ),
        ),
        (
            "adapter_config",
            chosen(
                0,
                r#"{"r": 2, "lora_alpha": 4, "rank_pattern": {"to_q": 2}, "alpha_pattern": {}, "use_rslora": true, "peft_type": "LORA"}"#,
            ),
        ),
        (
            "adapter_config",
            chosen(
                1,
                r#"{"transformer.r": 2, "transformer.lora_alpha": 4, "transformer.target_modules": ["to_q"]}"#,
            ),
        ),
        (
            "manifest",
            chosen(
                1,
                "{\n  \"format_version\": 2,\n  \"step\": 1,\n  \"files\": [\n    {\n      \"name\": \"state.json\",\n      \"length\": 2,\n      \"sha256\": \"44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a\"\n    }\n  ],\n  \"config_digest\": \"\",\n  \"dataset_digest\": \"\",\n  \"fingerprint\": null",
            ),
        ),
        (
            "manifest",
            chosen(2, &format!("ckpt-0000000001\n{}\n", "0".repeat(64))),
        ),
        (
            "manifest",
            chosen(
                3,
                "{\"step\":1,\"loss\":0.5}\n{\"step\":2}\n{\"step\":4}\n{\"st",
            ),
        ),
        (
            "state",
            plain(
                r#"{"progress":{"step":1},"epoch":0,"config":"[model]\npath = \"m\"\n[dataset]\npath = \"d\"\n","base_model":"","samples":[{"name":"a","image_sha256":"","caption_sha256":""}],"fingerprint":{"binary":"","version":"","device":"","hardware":"","cpu_features":""},"events":[{"step":1,"what":""}],"optimizer":{"ranks":{"a":2},"values":{"a.time":1}}}"#,
            ),
        ),
        (
            "run_config",
            plain(
                "[model]\npath = \"m\"\n[dataset]\npath = \"d\"\nresolution = 64\n[lora]\nr = 4\ntarget_modules = [\"to_q\"]\nrank_pattern = { to_k = 8 }\n[train]\nsteps = 10\n[sample]\nprompts = [\"a\"]\n",
            ),
        ),
        ("run_config", plain("lora.rank_pattern.to_q=8")),
        ("captions", chosen(0, "\u{feff} a cat ")),
        (
            "captions",
            chosen(
                1,
                "{\"file_name\": \"a.png\", \"text\": \"a\"}\n{\"file_name\": \"./b/c.jpg\", \"text\": \"b\", \"more\": [1]}\n",
            ),
        ),
        ("tokenizer", chosen(0, UNIGRAM)),
        (
            "tokenizer",
            chosen(
                1,
                &format!(
                    r#"{{"model": {{"type": "BPE", "vocab": {VOCAB}, "merges": [["a", "b</w>"]], "end_of_word_suffix": "</w>", "unk_token": "<|endoftext|>"}}, "normalizer": {{"type": "Lowercase"}}, "pre_tokenizer": {{"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}}}}"#
                ),
            ),
        ),
        (
            "tokenizer",
            chosen(
                2,
                "\n\u{c}\n\u{5}<pad>\u{15}\0\0\0\0\n\u{b}\n\u{4}</s>\u{15}\0\0\0\0\n\u{e}\n\u{5}<unk>\u{15}\0\0\0\0\u{18}\u{2}\n\u{b}\n\u{4}▁a\u{15}\0\0\0\0\u{12}\u{3}\u{c0}\u{2}\u{2}\u{1a}\0",
            ),
        ),
        ("tokenizer", chosen(3, VOCAB)),
        ("tokenizer", chosen(4, MERGES)),
        (
            "tokenizer",
            chosen(
                5,
                r#"{"model_max_length": 77, "added_tokens_decoder": {"5": {"content": "new", "single_word": false, "lstrip": false, "rstrip": false, "normalized": true, "special": true}}}"#,
            ),
        ),
        (
            "tokenizer",
            chosen(
                6,
                r#"{"bos_token": {"content": "<|startoftext|>"}, "eos_token": "<|endoftext|>"}"#,
            ),
        ),
        (
            "tokenizer",
            chosen(7, r#"{"extra_ids": 2, "legacy": false}"#),
        ),
        (
            "model_config",
            chosen(
                0,
                r#"{"_class_name": "FluxPipeline", "vae": ["diffusers", "AutoencoderKL"]}"#,
            ),
        ),
        (
            "model_config",
            chosen(
                1,
                r#"{"num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "axes_dims_rope": [4, 6, 6]}"#,
            ),
        ),
        (
            "model_config",
            chosen(
                2,
                r#"{"hidden_size": 32, "num_attention_heads": 4, "hidden_act": "quick_gelu"}"#,
            ),
        ),
        (
            "model_config",
            chosen(
                3,
                r#"{"feed_forward_proj": "gated-gelu", "d_model": 32, "d_kv": 8}"#,
            ),
        ),
        (
            "model_config",
            chosen(
                4,
                r#"{"block_out_channels": [32, 64], "norm_num_groups": 32, "shift_factor": null}"#,
            ),
        ),
        (
            "model_config",
            chosen(
                5,
                r#"{"shift": 3.0, "use_dynamic_shifting": true, "num_train_timesteps": 1000}"#,
            ),
        ),
    ];
    for format in [
        image::ImageFormat::Png,
        image::ImageFormat::Jpeg,
        image::ImageFormat::WebP,
    ] {
        seeds.push(("image", image(format)));
    }
    let split =
        r#"{"r": 1, "lora_alpha": 1, "init_lora_weights": "pissa", "target_modules": ["to_q"]}"#;
    seeds.push(("adapter_config", chosen(3, split)));
    for format in [image::ImageFormat::Bmp, image::ImageFormat::Tiff] {
        seeds.push(("image", image(format)));
    }
    let table = "file_name;text;more\r\na.png;\"a; b\";\r\nb\\c.jpg;b;1\r\n";
    seeds.push(("captions", chosen(2, table)));
    seeds
}

fn image(format: image::ImageFormat) -> Vec<u8> {
    let pixels = image::RgbImage::from_fn(6, 4, |x, y| image::Rgb([40 * x as u8, 60 * y as u8, 7]));
    let mut bytes = std::io::Cursor::new(Vec::new());
    pixels
        .write_to(&mut bytes, format)
        .expect("encode in memory");
    bytes.into_inner()
}
