//! What it takes to be a LoRA for the network: whole weights, LoRAs of other models and mostly unknown files are refused.

use super::*;

/// A file with these keys, all of the same shape.
fn weights(keys: &[&str]) -> Builder {
    let mut file = Builder::default();
    for key in keys {
        file.put(key, random(key, 8, 8));
    }
    file
}

/// Factors of rank 2 for a module of these sizes, under PEFT's or kohya's names.
fn adapt(file: &mut Builder, module: &str, (out, input): (usize, usize)) {
    let [down, up] = match module.contains('.') {
        true => ["lora_A", "lora_B"],
        false => ["lora_down", "lora_up"],
    };
    file.put(&format!("{module}.{down}.weight"), random("a", 2, input));
    file.put(&format!("{module}.{up}.weight"), random("b", out, 2));
}

#[test]
fn whole_checkpoints_are_named_with_where_they_belong() {
    const TRANSFORMER: &str = "`model.transformer`";
    for (keys, what, where_) in [
        (
            &[
                "transformer_blocks.0.attn.norm_q.weight",
                "transformer_blocks.0.attn.to_q.weight",
                "single_transformer_blocks.0.proj_out.weight",
            ][..],
            "the whole weights of a FLUX.1 transformer",
            TRANSFORMER,
        ),
        (
            &[
                "double_blocks.0.img_attn.norm.key_norm.scale",
                "double_blocks.0.img_attn.qkv.weight",
            ],
            "the whole weights of a FLUX.1 transformer",
            TRANSFORMER,
        ),
        (
            &["model.diffusion_model.single_blocks.1.norm.query_norm.scale"],
            "the whole weights of a FLUX.1 transformer",
            TRANSFORMER,
        ),
        (
            &[
                "model.diffusion_model.double_blocks.0.img_attn.qkv.weight",
                "model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale",
                "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
                "text_encoders.t5xxl.transformer.shared.weight",
                "vae.decoder.up.0.block.0.conv1.weight",
            ],
            "a whole FLUX.1 checkpoint with text encoders or VAE",
            TRANSFORMER,
        ),
        (
            &[
                "single_blocks.0.linear1.weight",
                "single_blocks.0.linear1.weight.absmax",
                "single_blocks.0.linear1.weight.quant_state.bitsandbytes__nf4",
                "single_blocks.0.norm.query_norm.scale",
            ],
            "the whole weights of a FLUX.1 transformer, quantised",
            TRANSFORMER,
        ),
        (
            &[
                "transformer_blocks.0.qkv_proj.lora_down",
                "transformer_blocks.0.qkv_proj.lora_up",
                "transformer_blocks.0.qkv_proj.qweight",
                "transformer_blocks.0.qkv_proj.wscales",
                "single_transformer_blocks.0.norm_q.weight",
            ],
            "the whole weights of a FLUX.1 transformer, quantised",
            TRANSFORMER,
        ),
        (
            &["decoder.mid_block.attentions.0.to_q.weight"],
            "the whole weights of a VAE",
            "`model.vae`",
        ),
        (
            &["encoder.down.0.block.0.conv1.weight"],
            "the whole weights of a VAE",
            "`model.vae`",
        ),
        (
            &[
                "text_model.encoder.layers.0.layer_norm1.weight",
                "text_model.encoder.layers.0.self_attn.q_proj.weight",
            ],
            "the whole weights of a CLIP text encoder",
            "`text_encoder`",
        ),
        (
            &["encoder.block.0.layer.0.layer_norm.weight", "shared.weight"],
            "the whole weights of a T5 text encoder",
            "`text_encoder_2`",
        ),
        (
            &["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"],
            "the whole weights of Stable Diffusion 3",
            "give a LoRA",
        ),
        (
            &[
                "double_stream_modulation_img.lin.weight",
                "single_blocks.0.linear1.weight",
            ],
            "the whole weights of a FLUX.2 transformer",
            TRANSFORMER,
        ),
        (
            &["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"],
            "the whole weights of Stable Diffusion",
            "give a LoRA",
        ),
        (&["clip_l", "t5xxl"], "a text embedding", "give a LoRA"),
    ] {
        for given in [shape(), ModelShape::default()] {
            let error = weights(keys).read_as(&given).expect_err(what).to_string();
            assert!(
                error.contains(" is no LoRA: it holds ") && error.contains(what),
                "{error}"
            );
            assert!(error.contains(where_), "{error}");
        }
    }
}

#[test]
fn control_loras_still_replace_norms_beside_their_factors() {
    let mut file = Builder::default();
    adapt(&mut file, "double_blocks.0.img_attn.qkv", (24, 8));
    file.put(
        "double_blocks.0.img_attn.norm.query_norm.scale",
        HostTensor::from_f32([4], &[1.0; 4]),
    );
    let set = file.read();
    assert_eq!((set.len(), set.report.used), (4, 3));
}

#[test]
fn a_lora_for_more_blocks_is_for_another_model() {
    for (module, kind, count) in [
        ("transformer.transformer_blocks.2.attn.to_q", "double", 2),
        ("lora_unet_single_blocks_3_modulation_lin", "single", 3),
        ("diffusion_model.double_blocks.18.img_mlp.0", "double", 2),
        (
            "text_encoder.text_model.encoder.layers.11.mlp.fc1",
            "CLIP",
            2,
        ),
        ("lora_te3_encoder_block_23_layer_0_SelfAttention_q", "T5", 2),
    ] {
        let mut file = Builder::default();
        adapt(&mut file, "transformer.proj_out", (4, 8));
        adapt(
            &mut file,
            "transformer.transformer_blocks.0.attn.to_q",
            (8, 8),
        );
        adapt(&mut file, module, (8, 8));
        let error = file.error();
        assert!(
            error.contains(module) && error.contains(&format!("which has {count} {kind} blocks")),
            "{error}"
        );
        assert!(error.ends_with("the LoRA is for another model"), "{error}");
    }
}

#[test]
fn a_lora_for_fewer_blocks_is_not() {
    let mut file = Builder::default();
    adapt(
        &mut file,
        "transformer.transformer_blocks.0.attn.to_q",
        (8, 8),
    );
    assert_eq!(file.read().len(), 1);
}

#[test]
fn one_module_in_ten_may_be_unknown() {
    let with_unknown = |known: usize| {
        let mut file = Builder::default();
        let modules = shape().modules(Component::Transformer);
        let linear = modules.iter().filter_map(|(path, shape)| match shape {
            ModuleShape::Linear { out, input } => Some((path, (*out, *input))),
            ModuleShape::Norm { .. } => None,
        });
        for (path, size) in linear.take(known) {
            adapt(&mut file, &format!("transformer.{path}"), size);
        }
        adapt(&mut file, "transformer.transformer_blocks.0.extra", (8, 8));
        file
    };
    let set = with_unknown(9).read();
    assert_eq!((set.len(), set.report.ignored.len()), (9, 2));
    assert_eq!(
        with_unknown(8).error(),
        "`lora.safetensors`: 1 of its 9 modules are unknown to the model, such as `transformer.transformer_blocks.0.extra.lora_A.weight`: the LoRA is for another model"
    );
}

#[test]
fn names_that_only_other_models_have_count_in_every_spelling() {
    for (module, model) in [
        ("transformer.transformer_blocks.0.ff.linear_in", "FLUX.2"),
        (
            "lora_transformer_transformer_blocks_0_ff_context_linear_out",
            "FLUX.2",
        ),
        (
            "transformer.transformer_blocks.0.img_mlp.net.0.proj",
            "Qwen-Image",
        ),
        ("lora_unet_transformer_blocks_0_txt_mod_1", "Qwen-Image"),
        ("diffusion_model.blocks.0.self_attn.q", "Wan"),
        ("lora_unet_double_blocks_0_img_mlp_fc1", "HunyuanVideo"),
        (
            "diffusion_model.layers.0.attention.to_q",
            "Lumina or Z-Image",
        ),
        (
            "text_encoder_2.text_model.encoder.layers.0.mlp.fc1",
            "Stable Diffusion XL",
        ),
        (
            "lora_te2.text_model.encoder.layers.0.mlp.fc1",
            "Stable Diffusion XL",
        ),
        (
            "base_model.model.model.layers.0.self_attn.q_proj",
            "a language model",
        ),
        ("unet.up_blocks.0.attentions.0.proj_in", "Stable Diffusion"),
    ] {
        let mut file = Builder::default();
        adapt(
            &mut file,
            "transformer.transformer_blocks.0.attn.to_q",
            (8, 8),
        );
        adapt(&mut file, module, (8, 8));
        let error = file.error();
        assert!(
            error.ends_with(&format!(" is a key of a LoRA for {model}, not for FLUX.1")),
            "{module}: {error}"
        );
    }
}

#[test]
fn the_text_width_tells_the_versions_of_stable_diffusion() {
    for (width, version) in [
        (768, "Stable Diffusion 1"),
        (1024, "Stable Diffusion 2"),
        (2048, "Stable Diffusion XL"),
    ] {
        let mut file = Builder::default();
        let block = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0";
        adapt(&mut file, &format!("{block}_attn1_to_q"), (64, 64));
        adapt(&mut file, &format!("{block}_attn2_to_k"), (64, width));
        let error = file.error();
        assert!(
            error.contains(&format!("a LoRA for {version}, not")),
            "{error}"
        );
    }
}

#[test]
fn models_with_the_names_of_flux_1_are_told_by_their_widths() {
    // FLUX.2: gated MLPs, so the module is as wide as no FLUX.1 one, whatever the network.
    {
        for (module, size) in [
            ("diffusion_model.single_blocks.0.linear1", (72, 8)),
            ("diffusion_model.single_blocks.0.linear2", (8, 32)),
            ("lora_unet_double_blocks_0_img_mlp_0", (48, 8)),
            ("lora_unet_double_blocks_0_txt_mlp_2", (8, 24)),
        ] {
            let mut file = Builder::default();
            adapt(
                &mut file,
                "diffusion_model.double_blocks.0.img_attn.proj",
                (8, 8),
            );
            adapt(&mut file, module, size);
            let error = file.error();
            assert!(
                error.contains("a LoRA for FLUX.2, not for FLUX.1"),
                "{error}"
            );
            let set = file.read_as(&ModelShape::default()).expect(module);
            assert!(set.shape.flux2.is_some(), "{module}");
        }
    }
    // No network given: the width and the number of blocks of a known model.
    for (modules, width, model) in [
        (
            &["transformer_blocks.23.attn.to_q"][..],
            1536,
            "Stable Diffusion 3",
        ),
        (&["transformer_blocks.59.attn.to_q"], 3072, "Qwen-Image"),
        (
            &[
                "transformer_blocks.19.attn.to_q",
                "single_transformer_blocks.39.attn.to_q",
            ],
            3072,
            "HunyuanVideo",
        ),
    ] {
        let mut file = Builder::default();
        for module in modules {
            adapt(&mut file, &format!("transformer.{module}"), (width, width));
        }
        let error = file.read_as(&ModelShape::default()).expect_err(model);
        let error = error.to_string();
        assert!(
            error.contains(&format!("a LoRA for {model}, not")),
            "{error}"
        );
    }
    let mut flux = Builder::default();
    adapt(
        &mut flux,
        "transformer.transformer_blocks.18.attn.to_q",
        (3072, 3072),
    );
    assert!(flux.read_as(&ModelShape::default()).is_ok());
}

#[test]
fn what_flux_files_bring_along_counts_on_neither_side() {
    let mut file = Builder::default();
    adapt(&mut file, "transformer.proj_out", (4, 8));
    for extra in [
        "lora_te1_text_projection",
        "lora_te1.text_model.embeddings.position_embedding",
        "text_encoder_2.shared",
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    ] {
        adapt(&mut file, extra, (8, 8));
    }
    let set = file.read();
    assert_eq!((set.len(), set.report.ignored.len()), (1, 8));
    assert_eq!(
        set.report.ignored_lines(),
        [
            "ignored 8 keys, `lora_te1.text_model.embeddings.position_embedding.lora_A.weight`, `lora_te1.text_model.embeddings.position_embedding.lora_B.weight`, `lora_te1_text_projection.lora_down.weight` and 5 more: the model has no such module"
        ]
    );
}

#[test]
fn folders_are_searched_for_the_one_file_that_is_meant() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path();
    let message = |path: &Path| {
        let error = read(path, &shape()).expect_err("no adapter").to_string();
        error.replace(&path.display().to_string(), "DIR")
    };
    let mut file = Builder::default();
    adapt(&mut file, "transformer.proj_out", (4, 8));
    file.save(&path.join("cats.safetensors"));
    assert_eq!(read(path, &shape()).expect("the only file").len(), 1);
    file.save(&path.join("dogs.safetensors"));
    assert_eq!(
        message(path),
        "`DIR` holds 2 files, such as cats.safetensors, dogs.safetensors: give one of them"
    );
    std::fs::create_dir(path.join("ckpt-0000000003")).expect("writable");
    assert!(message(path).contains("a run folder that has no finished LoRA"));
    file.save(&path.join("lora.safetensors"));
    assert_eq!(read(path, &shape()).expect("of a run").len(), 1);

    let model = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(model.path().join("model_index.json"), "{}").expect("writable");
    assert_eq!(
        message(model.path()),
        "`DIR` is a whole pipeline, no LoRA: give it as `--model`, or as `model.path` in a run's configuration"
    );
    let shards = tempfile::tempdir().expect("a temporary folder");
    let index = shards.path().join("model.safetensors.index.json");
    std::fs::write(&index, "{}").expect("writable");
    for path in [shards.path(), &index] {
        assert!(message(path).contains("a checkpoint in several files"));
    }
}
