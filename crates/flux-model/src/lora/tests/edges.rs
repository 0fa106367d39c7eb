//! Alpha in every form, configurations, and files that are odd but valid.

use lora_core::kinds::parts::LORA_BIAS;

use super::*;

const Q: &str = "transformer_blocks.0.attn.to_q";

/// One module with factors of rank 2.
fn one(down: &str, up: &str) -> Builder {
    let mut file = Builder::default();
    file.put(&format!("transformer.{Q}{down}"), random("a", 2, 8));
    file.put(&format!("transformer.{Q}{up}"), random("b", 8, 2));
    file
}

fn plain() -> Builder {
    one(".lora_A.weight", ".lora_B.weight")
}

#[test]
fn alpha_of_any_float_or_integer_type_and_one_element_shape() {
    let values = [
        HostTensor::from_f32([], &[6.0]),
        HostTensor::from_f32([1], &[6.0]),
        HostTensor::from_f32([1, 1], &[6.0]),
        HostTensor::from_i64([], &[6]),
        HostTensor {
            dtype: Dtype::I32,
            shape: vec![1],
            bytes: 6i32.to_le_bytes().to_vec(),
        },
        HostTensor::from_f32([], &[6.0]).cast(Dtype::F16),
        HostTensor::from_f32([], &[6.0]).cast(Dtype::Bf16),
        HostTensor::from_f32([], &[6.0]).cast(Dtype::F64),
    ];
    for value in values {
        for name in ["alpha", "lora_alpha"] {
            let mut file = plain();
            file.put(&format!("transformer.{Q}.{name}"), value.clone());
            let update = &file.read().transformer[Q];
            assert_eq!((update.scale, update.alpha), (3.0, Some(6.0)), "{value:?}");
        }
    }
}

#[test]
fn alpha_counts_for_its_own_module_only() {
    let mut file = plain();
    file.scalar(&format!("transformer.{Q}.alpha"), 1.0);
    file.put("transformer.proj_out.lora_A.weight", random("c", 4, 8));
    file.put("transformer.proj_out.lora_B.weight", random("d", 4, 4));
    let set = file.read();
    assert_eq!(set.transformer[Q].scale, 0.5);
    assert_eq!(
        (
            set.transformer["proj_out"].scale,
            set.transformer["proj_out"].alpha
        ),
        (1.0, None)
    );
}

#[test]
fn negative_alpha_is_a_slider_and_zero_alpha_a_warning() {
    let scale = |alpha| {
        let mut file = plain();
        file.scalar(&format!("transformer.{Q}.alpha"), alpha);
        let set = file.read();
        (set.transformer[Q].scale, set.report.warnings)
    };
    assert_eq!(scale(-2.0), (-1.0, vec![]));
    let warning = format!("alpha of `{Q}` is 0, so the module changes nothing");
    assert_eq!(scale(0.0), (0.0, vec![warning]));
}

#[test]
fn a_lycoris_scalar_multiplies_the_change() {
    let mut file = plain();
    file.scalar(&format!("transformer.{Q}.alpha"), 1.0).put(
        &format!("transformer.{Q}.scalar"),
        HostTensor::from_f32([], &[3.0]),
    );
    assert_eq!(file.read().transformer[Q].scale, 1.5);
}

#[test]
fn factors_of_different_dtypes_and_of_convolutions() {
    let (a, b) = (
        random("a", 2, 8).cast(Dtype::Bf16),
        random("b", 8, 2).cast(Dtype::F16),
    );
    let expected = product(&b, &a, 1.0);
    let convolution = |mut tensor: HostTensor| {
        tensor.shape.extend([1, 1]);
        tensor
    };
    let mut file = Builder::default();
    file.put(&format!("transformer.{Q}.lora_A.weight"), convolution(a));
    file.put(&format!("transformer.{Q}.lora_B.weight"), convolution(b));
    assert_close(&change(&file.read(), Q), &expected, "mixed");
}

#[test]
fn eight_bit_factors_are_read_and_written_as_bf16() {
    let mut file = Builder::default();
    let bytes = |count: usize| (0..count).map(|i| (i * 7 % 100) as u8).collect();
    let (a, b) = (
        HostTensor {
            dtype: Dtype::F8E4m3,
            shape: vec![2, 8],
            bytes: bytes(16),
        },
        HostTensor {
            dtype: Dtype::F8E5m2,
            shape: vec![8, 2],
            bytes: bytes(16),
        },
    );
    let expected = product(&b, &a, 1.0);
    file.put(&format!("transformer.{Q}.lora_A.weight"), a)
        .put(&format!("transformer.{Q}.lora_B.weight"), b);
    let set = file.read();
    assert_close(&change(&set, Q), &expected, "read");
    let back = through(&set, LoraFormat::Diffusers, &WriteOptions::default());
    assert_eq!(back.transformer[Q].tensors()[0].dtype(), Dtype::Bf16);
    assert_close(&change(&back, Q), &expected, "written");
}

#[test]
fn rank_above_the_width_and_zero_factors_are_legal() {
    let mut file = Builder::default();
    file.put("transformer.proj_out.lora_A.weight", random("a", 20, 8));
    file.put(
        "transformer.proj_out.lora_B.weight",
        tensor(4, 20, &[0.0; 80]),
    );
    assert_eq!(change(&file.read(), "proj_out"), [0.0; 32]);
}

#[test]
fn what_is_no_update_is_reported_with_a_reason() {
    let mut file = plain();
    let one = || HostTensor::from_f32([1], &[1.0]);
    for key in [
        "bundle_emb.cat.clip_l",
        "lora_unet_double_blocks_0_img_attn_qkv._aux.x",
        "transformer.transformer_blocks.0.attn.to_q.base_layer.weight",
        "transformer.transformer_blocks.7.attn.to_q.lora_A.weight",
        "lora_te1_text_projection.lora_down.weight",
        "optimizer_state",
        "transformer.proj_out.alpha",
        "transformer.proj_out.weight",
        "transformer.proj_out.bias",
        "transformer.context_embedder.lora_embedding_A",
        "transformer.proj_out.bias_size",
    ] {
        file.put(key, one());
    }
    let set = file.read();
    assert_eq!((set.len(), set.report.used), (1, 2));
    let reasons: BTreeMap<_, _> = set.report.ignored.into_iter().collect();
    let reason = |key: &str| reasons.get(key).map_or("none", String::as_str);
    assert_eq!(reasons.len(), 11);
    assert_eq!(reason("bundle_emb.cat.clip_l"), "a bundled text embedding");
    assert_eq!(
        reason("lora_unet_double_blocks_0_img_attn_qkv._aux.x"),
        "bookkeeping of a slider tool"
    );
    assert_eq!(
        reason("transformer.transformer_blocks.0.attn.to_q.base_layer.weight"),
        "a copy of the base weight"
    );
    assert_eq!(
        reason("transformer.transformer_blocks.7.attn.to_q.lora_A.weight"),
        "the model has no such module"
    );
    assert_eq!(
        reason("lora_te1_text_projection.lora_down.weight"),
        "the model has no such module"
    );
    assert_eq!(
        reason("optimizer_state"),
        "its name ends like no parameter of a LoRA"
    );
    assert_eq!(
        reason("transformer.proj_out.alpha"),
        "it belongs to no factors"
    );
    assert_eq!(
        reason("transformer.proj_out.weight"),
        "a whole weight, not a change of one"
    );
    let bias = "a whole bias, which the configuration does not say is trained";
    assert_eq!(reason("transformer.proj_out.bias"), bias);
    let embedding = "adapters of embeddings are not supported";
    assert_eq!(
        reason("transformer.context_embedder.lora_embedding_A"),
        embedding
    );
    assert_eq!(
        reason("transformer.proj_out.bias_size"),
        "a sparse bias of old LyCORIS files"
    );
}

#[test]
fn the_guidance_embedder_is_unknown_to_schnell() {
    let mut file = plain();
    file.put(
        "lora_unet_guidance_in_in_layer.lora_down.weight",
        random("a", 1, 256),
    );
    file.put(
        "lora_unet_guidance_in_in_layer.lora_up.weight",
        random("b", 8, 1),
    );
    let schnell = FluxConfig {
        guidance_embeds: false,
        ..flux()
    };
    let set = file
        .read_as(&ModelShape {
            transformer: Some(schnell),
            ..shape()
        })
        .expect("valid");
    assert_eq!((set.len(), set.report.ignored.len()), (1, 2));
}

#[test]
fn a_lora_under_two_names_is_read_once() {
    let mut file = plain();
    // The same with its scale folded, as converters write it.
    let doubled: Vec<f32> = random("b", 8, 2).to_f32().iter().map(|x| x * 2.0).collect();
    file.put(
        "lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight",
        random("a", 2, 8),
    );
    file.put(
        "lora_transformer_transformer_blocks_0_attn_to_q.lora_up.weight",
        tensor(8, 2, &doubled),
    );
    file.scalar("lora_transformer_transformer_blocks_0_attn_to_q.alpha", 1.0);
    let set = file.read();
    assert_eq!((set.len(), set.report.used), (1, 3));
    assert!(
        set.report
            .ignored
            .iter()
            .all(|(_, reason)| reason == "the file has the same change under another name")
    );
    assert_close(
        &change(&set, Q),
        &product(&random("b", 8, 2), &random("a", 2, 8), 1.0),
        "kept",
    );
}

#[test]
fn a_bias_under_another_name_joins_the_factors() {
    let mut file = plain();
    file.put(
        "diffusion_model.double_blocks.0.img_attn.qkv.diff_b",
        HostTensor::from_f32([24], &noise("c", 24)),
    );
    let set = file.read();
    assert_eq!(
        (set.len(), set.report.used, set.report.ignored.len()),
        (3, 3, 0)
    );
    let bias = set.transformer[Q]
        .bias_values()
        .expect("readable")
        .expect("joined");
    assert_eq!(bias.to_f32(), noise("c", 24)[..8]);
}

#[test]
fn the_header_of_a_diffusers_file_says_alpha() {
    let mut file = plain();
    file.put(
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
        random("c", 4, 6),
    );
    file.put(
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_B.weight",
        random("d", 12, 4),
    );
    let fields = r#"{"transformer.r": 2, "transformer.lora_alpha": 5.0, "transformer.use_rslora": true,
        "text_encoder.r": 2, "text_encoder.lora_alpha": 2, "text_encoder.rank_pattern": {"mlp.fc1": 4}}"#;
    file.header("lora_adapter_metadata", fields);
    let set = file.read();
    assert_eq!(set.transformer[Q].scale, 5.0 / 2f64.sqrt());
    assert_eq!(set.clip["text_model.encoder.layers.0.mlp.fc1"].scale, 0.5);
}

#[test]
fn alpha_in_tensors_and_in_the_header_may_agree() {
    let mut file = plain();
    file.scalar(&format!("transformer.{Q}.alpha"), 6.0);
    file.header(
        "lora_adapter_metadata",
        r#"{"transformer.r": 2, "transformer.lora_alpha": 6}"#,
    );
    assert_eq!(file.read().transformer[Q].scale, 3.0);
}

#[test]
fn loose_metadata_is_a_warning_not_a_scale() {
    let mut file = plain();
    file.header("ss_network_alpha", "1.0")
        .header("ss_network_dim", "16");
    let set = file.read();
    assert_eq!(set.transformer[Q].scale, 1.0);
    assert_eq!(
        set.report.warnings,
        [
            "the header says alpha 1 at rank 16, but no tensor does: the scale is 1, as other programs read it"
        ]
    );
    file.scalar(&format!("transformer.{Q}.alpha"), 1.0);
    file.header("ss_network_args", r#"{"split_qkv": "True"}"#);
    assert_eq!(
        file.read().report.warnings,
        [
            "trained with kohya's split_qkv, whose files say a scale of a third (qkv) or a quarter (linear1) of the trained one; it is read as the file says"
        ]
    );
}

/// A PEFT folder with one module.
fn folder(config: &str) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().to_path_buf();
    let mut file = Builder::default();
    file.put(
        &format!("base_model.model.{Q}.lora_A.weight"),
        random("a", 2, 8),
    );
    file.put(
        &format!("base_model.model.{Q}.lora_B.weight"),
        random("b", 8, 2),
    );
    file.put(
        "base_model.model.proj_out.bias",
        HostTensor::from_f32([4], &[1.0; 4]),
    );
    file.put("base_model.model.proj_out.weight", random("w", 4, 8));
    file.save(&path.join("adapter_model.safetensors"));
    std::fs::write(path.join("adapter_config.json"), config).expect("writable");
    (folder, path)
}

#[test]
fn a_peft_folder_has_peft_s_defaults() {
    let (_folder, path) = folder(r#"{"peft_type": "LORA", "r": 2}"#);
    for path in [path.clone(), path.join("adapter_model.safetensors")] {
        let set = read(&path, &shape()).expect("valid");
        assert_eq!(
            (set.transformer[Q].scale, set.transformer[Q].alpha),
            (4.0, Some(8.0)),
            "alpha is 8, not the rank"
        );
        assert_eq!(set.report.ignored.len(), 2);
    }
}

#[test]
fn a_peft_folder_saves_whole_modules() {
    let (_folder, path) = folder(r#"{"r": 2, "modules_to_save": ["proj_out"], "bias": "all"}"#);
    let set = read(&path, &shape()).expect("valid");
    assert_eq!(set.report.ignored, []);
    let update = &set.transformer["proj_out"];
    assert!(matches!(
        (update.kind(), &update.bias),
        (Some(Kind::Whole), Some(Bias::Replaced(_)))
    ));
    let (adapter, residuals) = set.to_adapter(Component::Transformer).expect("readable");
    assert_eq!(adapter.modules().len(), 1);
    let changes: Vec<_> = residuals
        .iter()
        .map(|residual| (residual.parameter.as_str(), residual.change))
        .collect();
    assert_eq!(
        changes,
        [
            ("proj_out.weight", Change::Replace),
            ("proj_out.bias", Change::Replace)
        ]
    );
}

#[test]
fn folders_with_text_encoders_and_of_diffusers() {
    let (_folder, path) = folder(r#"{"r": 2, "lora_alpha": 2}"#);
    let mut clip = Builder::default();
    clip.put(
        "base_model.model.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
        random("a", 2, 6),
    );
    clip.put(
        "base_model.model.text_model.encoder.layers.0.mlp.fc1.lora_B.weight",
        random("b", 12, 2),
    );
    std::fs::create_dir(path.join("text_encoder")).expect("writable");
    clip.save(&path.join("text_encoder/adapter_model.safetensors"));
    std::fs::write(
        path.join("text_encoder/adapter_config.json"),
        r#"{"r": 2, "lora_alpha": 3}"#,
    )
    .expect("writable");
    let set = read(&path, &shape()).expect("valid");
    assert_eq!(set.transformer[Q].scale, 1.0);
    assert_eq!(set.clip["text_model.encoder.layers.0.mlp.fc1"].scale, 1.5);

    let diffusers = tempfile::tempdir().expect("a temporary folder");
    plain().save(&diffusers.path().join("pytorch_lora_weights.safetensors"));
    assert_eq!(read(diffusers.path(), &shape()).expect("valid").len(), 1);
}

#[test]
fn patterns_decide_by_the_first_match() {
    let (_folder, path) = folder(
        r#"{"r": 4, "lora_alpha": 4, "rank_pattern": {"attn.to_[qk]": 2, "to_q": 3}, "alpha_pattern": {"^transformer_blocks\\.0\\.attn\\.to_q": 1}}"#,
    );
    assert_eq!(
        read(&path, &shape()).expect("valid").transformer[Q].scale,
        0.5
    );
}

#[test]
fn adapters_pass_through_lora_core() {
    let mut file = plain();
    file.scalar(&format!("transformer.{Q}.alpha"), 6.0);
    file.put(
        &format!("transformer.{Q}.lora_B.bias"),
        HostTensor::from_f32([8], &noise("c", 8)),
    );
    file.put(
        "transformer.transformer_blocks.0.attn.norm_q.weight",
        HostTensor::from_f32([4], &noise("n", 4)),
    );
    file.put("transformer.proj_out.diff", random("d", 4, 8));
    let set = file.read();
    let (adapter, residuals) = set.to_adapter(Component::Transformer).expect("readable");
    let module = &adapter.modules()[Q];
    assert_eq!(
        (module.spec.rank, module.spec.alpha, module.use_dora),
        (2, 6.0, false)
    );
    assert_eq!(module.factors[LORA_BIAS].to_f32(), noise("c", 8));
    let changes: Vec<_> = residuals
        .iter()
        .map(|residual| (residual.parameter.as_str(), residual.change))
        .collect();
    assert_eq!(
        changes,
        [
            ("proj_out.weight", Change::Add),
            ("transformer_blocks.0.attn.norm_q.weight", Change::Replace)
        ]
    );
    let dense = residuals[0].load(&mut |_| None).expect("needs no base");
    assert_eq!(
        (dense.shape.as_slice(), dense.to_f32()),
        (&[4, 8][..], random("d", 4, 8).to_f32())
    );
    let gain = residuals[1].load(&mut |_| None).expect("needs no base");
    assert_eq!(
        (gain.shape.as_slice(), gain.to_f32()),
        (&[4][..], noise("n", 4))
    );

    let back = LoraSet::from_adapter(&adapter, Component::Transformer, shape());
    assert_close(&change(&back, Q), &change(&set, Q), Q);
    assert_eq!(back.transformer[Q].alpha, Some(6.0));
}
