//! Converting changes nothing: fused to split and back, through every format.

use proptest::prelude::*;

use super::*;

/// A kohya file of all modules with ranks and alphas that vary.
fn kohya() -> Builder {
    let mut file = Builder::default();
    for (i, (name, input, parts)) in modules().into_iter().enumerate() {
        let module = format!("lora_unet_{}", name.replace('.', "_"));
        let (rank, out) = (1 + i % 4, parts.iter().map(|(_, height)| height).sum());
        file.put(
            &format!("{module}.lora_down.weight"),
            random(&format!("{name}a"), rank, input),
        );
        file.put(
            &format!("{module}.lora_up.weight"),
            random(&format!("{name}b"), out, rank),
        );
        file.scalar(&format!("{module}.alpha"), 0.3 + i as f32);
    }
    let clip = "lora_te1_text_model_encoder_layers_1_self_attn_q_proj";
    file.put(&format!("{clip}.lora_down.weight"), random("c", 3, 6));
    file.put(&format!("{clip}.lora_up.weight"), random("d", 6, 3))
        .scalar(&format!("{clip}.alpha"), 2.0);
    let t5 = "lora_te3_encoder_block_0_layer_1_DenseReluDense_wo";
    file.put(&format!("{t5}.lora_down.weight"), random("e", 3, 10));
    file.put(&format!("{t5}.lora_up.weight"), random("f", 6, 3))
        .scalar(&format!("{t5}.alpha"), 2.0);
    file
}

/// Tensors of a file on disk.
fn stored(path: &Path) -> BTreeMap<String, HostTensor> {
    let file = lora_core::files::safetensors::TensorFile::open(path).expect("a file");
    let names: Vec<_> = file.names().map(str::to_string).collect();
    names
        .into_iter()
        .map(|name| (name.clone(), file.read(&name).expect("a tensor")))
        .collect()
}

#[test]
fn every_format_keeps_every_change() {
    let set = kohya().read();
    for first in LoraFormat::ALL {
        let once = through(&set, first, &f32_options());
        assert_same(&once, &set);
        for second in LoraFormat::ALL {
            assert_same(&through(&once, second, &f32_options()), &set);
        }
    }
}

#[test]
fn kohya_through_the_others_and_back_is_the_same_file() {
    let source = kohya();
    let set = source.read();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("back.safetensors");
    for format in [LoraFormat::Kohya, LoraFormat::ComfyUi] {
        let once = through(&set, format, &WriteOptions::default());
        write(&once, LoraFormat::Kohya, &path, &WriteOptions::default()).expect("writable");
        assert_eq!(stored(&path), source.tensors, "{format}");
    }
    // Split files have a copy of the down projection for each part; equal copies are put together again.
    let once = through(&set, LoraFormat::Peft, &WriteOptions::default());
    write(&once, LoraFormat::Kohya, &path, &WriteOptions::default()).expect("writable");
    let back = stored(&path);
    for (key, tensor) in &source.tensors {
        if key.ends_with(".alpha") {
            assert_close(&back[key].to_f32(), &tensor.to_f32(), key); // alpha over rank times rank
        } else {
            assert_eq!(back[key], *tensor, "{key}");
        }
    }
    assert_eq!(back.len(), source.tensors.len());
}

#[test]
fn a_peft_folder_keeps_alpha_to_the_bit() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let set = kohya().read();
    let report = write(
        &set,
        LoraFormat::Peft,
        folder.path(),
        &WriteOptions::default(),
    )
    .expect("writable");
    let names: Vec<_> = report
        .files
        .iter()
        .map(|path| path.strip_prefix(folder.path()).expect("inside"))
        .collect();
    let expected = [
        "adapter_model.safetensors",
        "adapter_config.json",
        "text_encoder/adapter_model.safetensors",
        "text_encoder/adapter_config.json",
        "text_encoder_2/adapter_model.safetensors",
        "text_encoder_2/adapter_config.json",
    ];
    assert_eq!(names, expected.map(Path::new));
    let back = read(folder.path(), &shape()).expect("what was written");
    for (component, path, update) in set.iter() {
        let other = &back.modules(component)[path];
        assert_eq!(
            (update.scale, update.alpha),
            (other.scale, other.alpha),
            "{path}"
        );
    }
}

#[test]
fn xlabs_and_control_files_convert() {
    let mut xlabs = Builder::default();
    for (name, out, input) in [
        ("qkv_lora1", 24, 8),
        ("proj_lora1", 8, 8),
        ("qkv_lora2", 24, 8),
        ("proj_lora2", 8, 8),
    ] {
        let module = format!("double_blocks.0.processor.{name}");
        xlabs.put(
            &format!("{module}.down.weight"),
            random(&format!("{name}a"), 2, input),
        );
        xlabs.put(
            &format!("{module}.up.weight"),
            random(&format!("{name}b"), out, 2),
        );
    }
    for (name, out, input) in [("qkv_lora", 24, 8), ("proj_lora", 8, 40)] {
        let module = format!("single_blocks.0.processor.{name}");
        xlabs.put(
            &format!("{module}.down.weight"),
            random(&format!("{name}a"), 2, input),
        );
        xlabs.put(
            &format!("{module}.up.weight"),
            random(&format!("{name}b"), out, 2),
        );
    }
    let set = xlabs.read();
    assert_eq!(set.len(), 3 + 1 + 3 + 1 + 3 + 1);
    for format in [LoraFormat::Diffusers, LoraFormat::Peft] {
        assert_same(&through(&set, format, &f32_options()), &set);
    }
    // Fused, the MLP rows of linear1 are there with a change of zero.
    for format in [LoraFormat::Kohya, LoraFormat::ComfyUi] {
        let back = through(&set, format, &f32_options());
        assert!(
            change(&back, "single_transformer_blocks.0.proj_mlp")
                .iter()
                .all(|x| *x == 0.0)
        );
        assert_same(&back.pruned().expect("readable"), &set);
    }

    let mut control = Builder::default();
    control
        .put("img_in.lora_A.weight", random("a", 4, 12))
        .put("img_in.lora_B.weight", random("b", 8, 4));
    control.put(
        "img_in.lora_B.bias",
        HostTensor::from_f32([8], &noise("c", 8)),
    );
    control.put(
        "double_blocks.0.img_attn.norm.query_norm.scale",
        HostTensor::from_f32([4], &noise("d", 4)),
    );
    control.put(
        "double_blocks.0.img_attn.qkv.lora_A.weight",
        random("e", 2, 8),
    );
    control.put(
        "double_blocks.0.img_attn.qkv.lora_B.weight",
        random("f", 24, 2),
    );
    control.put(
        "double_blocks.0.img_attn.qkv.lora_B.bias",
        HostTensor::from_f32([24], &noise("g", 24)),
    );
    let set = control.read();
    for format in [LoraFormat::Diffusers, LoraFormat::ComfyUi] {
        let back = through(&set, format, &f32_options());
        assert_same(&back, &set);
        assert_eq!(back.in_channels, Some(12), "{format}");
    }
}

#[test]
fn the_keys_of_each_format() {
    let mut file = Builder::default();
    for name in ["to_q", "to_v"] {
        let module = format!("transformer.transformer_blocks.0.attn.{name}");
        file.put(
            &format!("{module}.lora_A.weight"),
            random(name, 2, 8).cast(Dtype::Bf16),
        );
        file.put(
            &format!("{module}.lora_B.weight"),
            random(name, 8, 2).cast(Dtype::Bf16),
        );
        file.scalar(&format!("{module}.alpha"), 1.0);
    }
    file.header("ss_output_name", "cat")
        .header("ss_network_dim", "9")
        .header("sshs_model_hash", "0");
    let set = file.read();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("out");
    let keys = |format| {
        write(&set, format, &path, &WriteOptions::default()).expect("writable");
        let file = lora_core::files::safetensors::TensorFile::open(&path).expect("a file");
        let key = |(name, tensor): (String, HostTensor)| {
            format!("{name} {} {:?}", tensor.dtype, tensor.shape)
        };
        (
            stored(&path).into_iter().map(key).collect::<Vec<_>>(),
            file.metadata().clone(),
        )
    };
    let (kohya, metadata) = keys(LoraFormat::Kohya);
    assert_eq!(
        kohya,
        [
            "lora_unet_double_blocks_0_img_attn_qkv.alpha F32 []",
            "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight BF16 [4, 8]",
            "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight BF16 [24, 4]",
        ]
    );
    let entries: Vec<_> = metadata
        .iter()
        .map(|(key, value)| (key.as_str(), value.as_str()))
        .collect();
    assert_eq!(
        entries,
        [
            ("format", "pt"),
            ("modelspec.architecture", "flux-1-dev/lora"),
            (
                "modelspec.implementation",
                "https://github.com/black-forest-labs/flux"
            ),
            ("modelspec.sai_model_spec", "1.0.1"),
            ("ss_base_model_version", "flux1"),
            ("ss_network_alpha", "1.0"),
            ("ss_network_args", "{}"),
            ("ss_network_dim", "2"),
            ("ss_network_module", "networks.lora_flux"),
            ("ss_output_name", "cat"),
            ("ss_v2", "False"),
        ]
    );
    let (comfy, _) = keys(LoraFormat::ComfyUi);
    assert_eq!(
        comfy,
        [
            "diffusion_model.double_blocks.0.img_attn.qkv.alpha F32 []",
            "diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight BF16 [4, 8]",
            "diffusion_model.double_blocks.0.img_attn.qkv.lora_up.weight BF16 [24, 4]",
        ]
    );
    let (diffusers, metadata) = keys(LoraFormat::Diffusers);
    assert_eq!(
        diffusers,
        [
            "transformer.transformer_blocks.0.attn.to_q.lora_A.weight BF16 [2, 8]",
            "transformer.transformer_blocks.0.attn.to_q.lora_B.weight BF16 [8, 2]",
            "transformer.transformer_blocks.0.attn.to_v.lora_A.weight BF16 [2, 8]",
            "transformer.transformer_blocks.0.attn.to_v.lora_B.weight BF16 [8, 2]",
        ]
    );
    assert_eq!(
        metadata["lora_adapter_metadata"],
        r#"{"transformer.alpha_pattern":{},"transformer.bias":"none","transformer.init_lora_weights":true,"transformer.lora_alpha":2.0,"transformer.lora_bias":false,"transformer.lora_dropout":0.0,"transformer.peft_type":"LORA","transformer.r":2,"transformer.rank_pattern":{},"transformer.target_modules":["transformer_blocks.0.attn.to_q","transformer_blocks.0.attn.to_v"],"transformer.use_dora":false,"transformer.use_rslora":false}"#
    );
}

#[test]
fn a_list_of_targets_never_means_more_modules() {
    let set = kohya().read();
    let folder = tempfile::tempdir().expect("a temporary folder");
    write(
        &set,
        LoraFormat::Peft,
        folder.path(),
        &WriteOptions::default(),
    )
    .expect("writable");
    let text =
        std::fs::read_to_string(folder.path().join("adapter_config.json")).expect("readable");
    let config: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let targets: lora_core::peft::Targets =
        serde_json::from_value(config["target_modules"].clone()).expect("targets");
    let matcher = targets.matcher().expect("an expression");
    for (path, module) in shape().modules(Component::Transformer) {
        let linear = matches!(module, ModuleShape::Linear { .. });
        assert_eq!(
            matcher.matches(&path, linear),
            set.transformer.contains_key(&path),
            "{path}"
        );
    }
}

#[test]
fn rounding_is_noted() {
    let mut file = Builder::default();
    file.put(
        "transformer.proj_out.lora_A.weight",
        random("a", 3, 8).cast(Dtype::Bf16),
    );
    file.put(
        "transformer.proj_out.lora_B.weight",
        random("b", 4, 3).cast(Dtype::Bf16),
    );
    file.scalar("transformer.proj_out.alpha", 1.0);
    let set = file.read();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("out.safetensors");
    let notes = |format, options: &WriteOptions| {
        write(&set, format, &path, options).expect("writable").notes
    };
    let default = WriteOptions::default();
    assert_eq!(
        notes(LoraFormat::Diffusers, &default),
        ["folding the scale rounds in half precision; F32 keeps it, and so do the other formats"]
    );
    assert_eq!(
        notes(LoraFormat::Diffusers, &f32_options()),
        Vec::<String>::new()
    );
    assert_eq!(notes(LoraFormat::Kohya, &default), Vec::<String>::new());
}

#[test]
fn mixed_ranks_are_noted_where_no_header_says_alpha() {
    let set = kohya().read();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let note = "diffusers before August 2026 loads modules of another rank than the first at a wrong scale";
    for (format, noted) in [
        (LoraFormat::Kohya, true),
        (LoraFormat::ComfyUi, true),
        (LoraFormat::Diffusers, false),
    ] {
        let path = folder.path().join(format.name());
        let report = write(&set, format, &path, &f32_options()).expect("writable");
        assert_eq!(
            report.notes.iter().any(|text| text == note),
            noted,
            "{format}"
        );
    }
}

#[test]
fn a_file_is_converted_in_place() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = kohya().save(&folder.path().join("lora.safetensors"));
    let set = read(&path, &shape()).expect("valid");
    write(&set, LoraFormat::Diffusers, &path, &f32_options()).expect("writable");
    assert_same(&read(&path, &shape()).expect("valid"), &kohya().read());
}

/// Parts of `single_blocks.0.linear1` as a diffusers file: rank and alpha of each part that is there.
fn parts(ranks: &[Option<(usize, f32)>; 4], seed: u64) -> Builder {
    let mut file = Builder::default();
    for (name, rank) in ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]
        .iter()
        .zip(ranks)
    {
        let Some((rank, alpha)) = rank else { continue };
        let out = if *name == "proj_mlp" { 32 } else { 8 };
        let module = format!("transformer.single_transformer_blocks.0.{name}");
        file.put(
            &format!("{module}.lora_A.weight"),
            random(&format!("{name}a{seed}"), *rank, 8),
        );
        file.put(
            &format!("{module}.lora_B.weight"),
            random(&format!("{name}b{seed}"), out, *rank),
        );
        file.scalar(&format!("{module}.alpha"), *alpha);
    }
    file
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Unequal ranks and scales, missing parts: fused and pruned again they are what they were.
    #[test]
    fn parts_fuse_and_split_again(
        ranks in prop::array::uniform4(prop::option::weighted(0.8, (1usize..5, 0.25f32..4.0))),
        same_scale in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let ranks = ranks.map(|part| part.map(|(rank, alpha)| (rank, if same_scale { rank as f32 * 1.5 } else { alpha })));
        prop_assume!(ranks.iter().any(Option::is_some));
        let set = parts(&ranks, seed).read();
        for format in [LoraFormat::Kohya, LoraFormat::ComfyUi] {
            let fused = through(&set, format, &f32_options());
            prop_assert_eq!(fused.report.used, 3, "one module");
            let pruned = fused.pruned().expect("readable");
            for (path, update) in &set.transformer {
                prop_assert_eq!(pruned.transformer[path].rank(), update.rank());
            }
            assert_same(&pruned, &set);
        }
    }

    /// A fused module's parts share the down projection, and fuse to the module at its own rank.
    #[test]
    fn a_fused_module_splits_and_fuses_again(rank in 1usize..9, alpha in 0.1f32..9.0, seed in any::<u64>()) {
        let module = "lora_unet_single_blocks_0_linear1";
        let mut file = Builder::default();
        file.put(&format!("{module}.lora_down.weight"), random(&format!("a{seed}"), rank, 8));
        file.put(&format!("{module}.lora_up.weight"), random(&format!("b{seed}"), 56, rank));
        file.scalar(&format!("{module}.alpha"), alpha);
        let set = file.read();
        let split = through(&set, LoraFormat::Diffusers, &f32_options());
        prop_assert_eq!(split.len(), 4);
        let fused = through(&split, LoraFormat::Kohya, &f32_options());
        prop_assert_eq!(fused.transformer["single_transformer_blocks.0.proj_mlp"].rank(), Some(rank));
        assert_same(&fused, &set);
    }

    /// Whatever a file holds, reading it ends in a set or an error.
    #[test]
    fn no_file_panics(
        keys in prop::collection::vec(
            (0usize..8, 0usize..6, 0usize..24, prop::collection::vec(0usize..25, 0..4)), 1..6),
    ) {
        const PREFIXES: [&str; 8] = ["", "transformer.", "lora_unet_", "diffusion_model.", "base_model.model.", "lycoris_", "lora_te1_", "module."];
        const MODULES: [&str; 6] = [
            "double_blocks.0.img_attn.qkv",
            "transformer_blocks.0.attn.to_q",
            "final_layer.adaLN_modulation.1",
            "x_embedder",
            "double_blocks.0.img_attn.norm.query_norm",
            "text_model.encoder.layers.0.mlp.fc1",
        ];
        const SUFFIXES: [&str; 24] = [
            ".lora_A.weight", ".lora_B.weight", ".lora_down.weight", ".lora_up.weight", ".alpha", ".dora_scale",
            ".lora_B.bias", ".lokr_w1", ".lokr_w2", ".lokr_w1_a", ".lokr_w1_b", ".lokr_w2_a", ".lokr_w2_b", ".hada_w1_a",
            ".hada_w1_b", ".hada_w2_a", ".hada_w2_b", ".diff", ".diff_b", ".scale", ".set_weight", ".weight", ".scalar",
            ".lora_A.x.weight",
        ];
        let mut file = Builder::default();
        for (prefix, module, suffix, shape) in keys {
            let module = MODULES[module];
            let flat = PREFIXES[prefix].ends_with('_');
            let module = if flat { module.replace('.', "_") } else { module.into() };
            let key = format!("{}{module}{}", PREFIXES[prefix], SUFFIXES[suffix]);
            let count = shape.iter().product();
            file.tensors.insert(key.clone(), HostTensor::from_f32(shape, &noise(&key, count)));
        }
        for shape in [shape(), ModelShape::default()] {
            if let Ok(set) = file.read_as(&shape) {
                for (_, _, update) in set.iter() {
                    let _ = delta(update, None);
                }
                let folder = tempfile::tempdir().expect("a temporary folder");
                for format in LoraFormat::ALL {
                    let options = WriteOptions { lossy: true, ..WriteOptions::default() };
                    let _ = write(&set, format, &folder.path().join(format.name()), &options);
                }
            }
        }
    }
}

/// What a program makes of a file that reads its tensors and nothing else: alpha over rank where there is an alpha, else 1.
#[test]
fn the_tensors_alone_say_the_scale() {
    let mut file = Builder::default();
    for (i, (module, alpha)) in [
        ("attn.to_q", 0.5),
        ("attn.to_out.0", 3.0),
        ("ff.net.0.proj", -1.5),
    ]
    .into_iter()
    .enumerate()
    {
        let module = format!("transformer.transformer_blocks.{}.{module}", i % 2);
        let out = if i == 2 { 32 } else { 8 };
        file.put(&format!("{module}.lora_A.weight"), random(&module, 2, 8));
        file.put(&format!("{module}.lora_B.weight"), random("b", out, 2));
        file.scalar(&format!("{module}.alpha"), alpha);
    }
    let set = file.read();
    let folder = tempfile::tempdir().expect("a temporary folder");
    for format in [
        LoraFormat::Diffusers,
        LoraFormat::Kohya,
        LoraFormat::ComfyUi,
    ] {
        let path = folder.path().join("out.safetensors");
        write(&set, format, &path, &f32_options()).expect("writable");
        let bare = Builder {
            tensors: stored(&path),
            metadata: BTreeMap::new(),
        };
        // A fused module has rows for parts that nothing changes.
        assert_same(&bare.read().pruned().expect("readable"), &set);
    }
    let report = write(
        &set,
        LoraFormat::Peft,
        &folder.path().join("peft"),
        &f32_options(),
    );
    assert_eq!(
        report.expect("writable").notes,
        [
            "alpha is in `adapter_config.json`: what reads the weights without it plays them at another strength"
        ]
    );
}

#[test]
fn a_scale_that_is_a_power_of_two_is_folded_without_rounding() {
    let mut file = Builder::default();
    file.put("transformer.proj_out.lora_A.weight", random("a", 8, 8));
    file.put("transformer.proj_out.lora_B.weight", random("b", 4, 8));
    file.scalar("transformer.proj_out.alpha", 2.0);
    let once = through(
        &file.read(),
        LoraFormat::Diffusers,
        &WriteOptions::default(),
    );
    let folded = once.transformer["proj_out"].tensors()[1]
        .load_f32()
        .expect("readable");
    let back: Vec<f32> = folded.iter().map(|x| x * 4.0).collect();
    assert_eq!(back, random("b", 4, 8).to_f32());
    assert_eq!(once.transformer["proj_out"].alpha, Some(8.0));
}
