//! One file for each way to be wrong, and its message.

use super::*;

fn file(tensors: &[(&str, HostTensor)]) -> Builder {
    let mut file = Builder::default();
    for (key, tensor) in tensors {
        file.put(key, tensor.clone());
    }
    file
}

#[test]
fn half_of_a_pair() {
    for (key, tensor, missing) in [
        (
            "transformer.proj_out.lora_A.weight",
            random("a", 2, 8),
            "transformer.proj_out.lora_B.weight",
        ),
        (
            "lora_unet_final_layer_linear.lora_up.weight",
            random("a", 4, 2),
            "lora_unet_final_layer_linear.lora_down.weight",
        ),
        (
            "lycoris_proj_out.hada_w1_a",
            random("a", 4, 2),
            "lycoris_proj_out.hada_w1_b",
        ),
        (
            "lycoris_proj_out.lokr_w1",
            random("a", 2, 2),
            "lycoris_proj_out.lokr_w2",
        ),
        (
            "lycoris_proj_out.lokr_w2",
            random("a", 2, 4),
            "lycoris_proj_out.lokr_w1",
        ),
        (
            "lycoris_proj_out.lokr_w2_a",
            random("a", 2, 4),
            "lycoris_proj_out.lokr_w2_b",
        ),
    ] {
        assert_eq!(
            file(&[(key, tensor)]).error(),
            format!(
                "`lora.safetensors`: `{key}` has no partner `{missing}`: the file is incomplete, download it again"
            )
        );
    }
    let loha = file(&[
        ("lycoris_proj_out.hada_w1_a", random("a", 4, 2)),
        ("lycoris_proj_out.hada_w1_b", random("b", 2, 8)),
    ]);
    assert_eq!(
        loha.error(),
        "`lora.safetensors`: `lycoris_proj_out.hada_w1_a` has no partner `lycoris_proj_out.hada_w2_a`: the file is incomplete, download it again"
    );
    let dora = file(&[(
        "transformer.proj_out.lora_magnitude_vector",
        HostTensor::from_f32([4], &[1.0; 4]),
    )]);
    assert_eq!(
        dora.error(),
        "`lora.safetensors`: `transformer.proj_out.lora_magnitude_vector` has no partner `proj_out.lora_A.weight`: the file is incomplete, download it again"
    );
    let bias = file(&[(
        "transformer.proj_out.lora_B.bias",
        HostTensor::from_f32([4], &[1.0; 4]),
    )]);
    assert_eq!(
        bias.error(),
        "`lora.safetensors`: `transformer.proj_out.lora_B.bias` has no partner `transformer.proj_out.lora_B.weight`: the file is incomplete, download it again"
    );
}

#[test]
fn rank_zero() {
    let empty = file(&[
        ("transformer.proj_out.lora_A.weight", tensor(0, 8, &[])),
        ("transformer.proj_out.lora_B.weight", tensor(4, 0, &[])),
    ]);
    assert_eq!(
        empty.error(),
        "`lora.safetensors`: `transformer.proj_out.lora_A.weight` has rank 0: remove the module or train it again"
    );
}

#[test]
fn ranks_that_differ_inside_a_fused_module() {
    let mixed = file(&[
        (
            "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
            random("a", 2, 8),
        ),
        (
            "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight",
            random("b", 24, 6),
        ),
    ]);
    assert_eq!(
        mixed.error(),
        "`lora.safetensors`: `lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight` has rank 6, but `lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight` has rank 2: all of a module has one rank"
    );
}

fn with_alpha(alpha: HostTensor) -> String {
    file(&[
        ("transformer.proj_out.lora_A.weight", random("a", 2, 8)),
        ("transformer.proj_out.lora_B.weight", random("b", 4, 2)),
        ("transformer.proj_out.alpha", alpha),
    ])
    .error()
}

#[test]
fn alpha_that_is_no_number() {
    assert_eq!(
        with_alpha(HostTensor::from_f32([], &[f32::NAN])),
        "`lora.safetensors`: `transformer.proj_out.alpha` is NaN: alpha must be a finite number"
    );
    assert_eq!(
        with_alpha(HostTensor::from_f32([1], &[f32::INFINITY])),
        "`lora.safetensors`: `transformer.proj_out.alpha` is inf: alpha must be a finite number"
    );
    assert_eq!(
        with_alpha(HostTensor::from_f32([2], &[1.0, 2.0])),
        "`lora.safetensors`: `transformer.proj_out.alpha` holds 2 values: alpha is one number"
    );
}

#[test]
fn shapes_of_another_model() {
    let wide = file(&[
        (
            "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight",
            random("a", 2, 12),
        ),
        (
            "lora_unet_double_blocks_0_img_attn_proj.lora_up.weight",
            random("b", 12, 2),
        ),
    ]);
    assert_eq!(
        wide.error(),
        "`lora.safetensors`: `lora_unet_double_blocks_0_img_attn_proj.lora_down.weight` has shape [2, 12], but `double_blocks.0.img_attn.proj` needs [2, 8]: is the LoRA for another model?"
    );
    let transposed = file(&[
        ("transformer.proj_out.lora_A.weight", random("a", 8, 2)),
        ("transformer.proj_out.lora_B.weight", random("b", 2, 4)),
    ]);
    assert_eq!(
        transposed.error(),
        "`lora.safetensors`: `transformer.proj_out.lora_B.weight` has rank 4, but `transformer.proj_out.lora_A.weight` has rank 8: all of a module has one rank"
    );
    let convolution = file(&[
        (
            "transformer.proj_out.lora_A.weight",
            HostTensor::from_f32([2, 8, 3, 3], &[0.0; 144]),
        ),
        ("transformer.proj_out.lora_B.weight", random("b", 4, 2)),
    ]);
    assert_eq!(
        convolution.error(),
        "`lora.safetensors`: `transformer.proj_out.lora_A.weight` must be a matrix, but has shape [2, 8, 3, 3]"
    );
    let lokr = file(&[
        ("lycoris_proj_out.lokr_w1", random("a", 2, 2)),
        ("lycoris_proj_out.lokr_w2", random("b", 2, 2)),
    ]);
    assert_eq!(
        lokr.error(),
        "`lora.safetensors`: `lycoris_proj_out.lokr_w1` has shape [4, 4], but `proj_out` needs [4, 8]: is the LoRA for another model?"
    );
    let magnitude = file(&[
        ("transformer.proj_out.lora_A.weight", random("a", 2, 8)),
        ("transformer.proj_out.lora_B.weight", random("b", 4, 2)),
        ("transformer.proj_out.dora_scale", random("c", 1, 4)),
    ]);
    assert_eq!(
        magnitude.error(),
        "`lora.safetensors`: `transformer.proj_out.dora_scale` has shape [1, 4]: a DoRA magnitude of this module is [4], [4, 1] or [1, 8]"
    );
}

#[test]
fn other_models_are_named() {
    for (key, model) in [
        (
            "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",
            "Stable Diffusion",
        ),
        (
            "lora_unet_input_blocks_4_1_proj_in.lora_down.weight",
            "Stable Diffusion XL",
        ),
        (
            "transformer.double_stream_modulation_img.linear.lora_A.weight",
            "FLUX.2",
        ),
        (
            "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj.lora_A.weight",
            "FLUX.2",
        ),
        (
            "diffusion_model.distilled_guidance_layer.in_proj.lora_A.weight",
            "Chroma",
        ),
        (
            "diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_A.weight",
            "Stable Diffusion 3",
        ),
        ("lora_unet_blocks_0_cross_attn_k.lora_down.weight", "Wan"),
    ] {
        assert_eq!(
            file(&[(key, random("a", 2, 8))]).error(),
            format!("`lora.safetensors`: `{key}` is a key of a LoRA for {model}, not for FLUX.1")
        );
    }
}

#[test]
fn a_file_that_names_nothing() {
    let unknown = file(&[("lora_prior_something.lora_down.weight", random("a", 2, 8))]);
    assert_eq!(
        unknown.error(),
        "`lora.safetensors`: no key names a module of FLUX.1 or FLUX.2; the first is `lora_prior_something.lora_down.weight`"
    );
    assert_eq!(
        Builder::default().error(),
        "`lora.safetensors` holds no tensors"
    );
}

#[test]
fn one_target_in_two_formats_that_differ() {
    let both = file(&[
        (
            "transformer.transformer_blocks.0.attn.to_k.lora_A.weight",
            random("a", 2, 8),
        ),
        (
            "transformer.transformer_blocks.0.attn.to_k.lora_B.weight",
            random("b", 8, 2),
        ),
        (
            "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
            random("c", 2, 8),
        ),
        (
            "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight",
            random("d", 24, 2),
        ),
    ]);
    assert_eq!(
        both.error(),
        "`lora.safetensors`: `lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight` and `transformer.transformer_blocks.0.attn.to_k.lora_A.weight` change `transformer_blocks.0.attn.to_k` in different ways: remove one of them"
    );
}

#[test]
fn one_parameter_twice() {
    let twice = file(&[
        ("transformer.proj_out.lora_A.weight", random("a", 2, 8)),
        ("transformer.proj_out.lora_B.weight", random("b", 4, 2)),
        ("transformer.proj_out.lora_down.weight", random("c", 2, 8)),
    ]);
    assert_eq!(
        twice.error(),
        "`lora.safetensors`: `transformer.proj_out.lora_down.weight` gives the same parameter as `transformer.proj_out.lora_A.weight`: remove one of them"
    );
}

#[test]
fn two_algorithms_on_one_module() {
    let both = file(&[
        ("transformer.proj_out.lora_A.weight", random("a", 2, 8)),
        ("transformer.proj_out.lora_B.weight", random("b", 4, 2)),
        ("transformer.proj_out.diff", random("c", 4, 8)),
    ]);
    assert_eq!(
        both.error(),
        "`lora.safetensors`: `transformer.proj_out.diff` changes the module in another way than `transformer.proj_out.lora_A.weight`: keep one of them"
    );
    let lokr = file(&[
        ("lycoris_proj_out.lokr_w1", random("a", 2, 2)),
        ("lycoris_proj_out.lokr_w2", random("b", 2, 4)),
        ("lycoris_proj_out.lokr_w2_a", random("c", 2, 1)),
        ("lycoris_proj_out.lokr_w2_b", random("d", 1, 4)),
    ]);
    assert_eq!(
        lokr.error(),
        "`lora.safetensors`: `lycoris_proj_out.lokr_w2_a` changes the module in another way than `lycoris_proj_out.lokr_w2`: keep one of them"
    );
}

#[test]
fn algorithms_that_are_not_added() {
    for (suffix, message) in [
        (
            "oft_blocks",
            "belongs to OFT, which multiplies the weight instead of adding to it: merge it into the model with the tool that made it",
        ),
        (
            "a1.weight",
            "belongs to GLoRA, which multiplies the weight as well: merge it into the model with the tool that made it",
        ),
        (
            "on_input",
            "belongs to IA3, which scales activations instead of adding to the weight: merge it into the model with the tool that made it",
        ),
        (
            "lora_mid.weight",
            "belongs to a Tucker decomposition, which exists for convolutions only; FLUX.1 has none",
        ),
        (
            "hada_t1",
            "belongs to a Tucker decomposition, which exists for convolutions only; FLUX.1 has none",
        ),
        (
            "lora_E",
            "belongs to AdaLoRA, which has singular values beside its factors: convert it to a LoRA",
        ),
        (
            "vera_lambda_d",
            "belongs to VeRA, which shares its factors between modules: convert it to a LoRA",
        ),
    ] {
        let key = format!("lora_unet_double_blocks_0_img_attn_proj.{suffix}");
        let error = file(&[(&key, random("a", 2, 8))]).error();
        assert_eq!(error, format!("`lora.safetensors`: `{key}` {message}"));
    }
}

#[test]
fn several_adapters_in_one_file() {
    let both = file(&[
        (
            "transformer.proj_out.lora_A.first.weight",
            random("a", 2, 8),
        ),
        (
            "transformer.proj_out.lora_A.second.weight",
            random("b", 2, 8),
        ),
    ]);
    assert_eq!(
        both.error(),
        "`lora.safetensors` holds several adapters, first, second: save each in its own file"
    );
}

#[test]
fn integers_are_no_weights() {
    let integers = file(&[
        (
            "transformer.proj_out.lora_A.weight",
            HostTensor::from_i64([2, 8], &[1; 16]),
        ),
        ("transformer.proj_out.lora_B.weight", random("b", 4, 2)),
    ]);
    assert_eq!(
        integers.error(),
        "`lora.safetensors`: `transformer.proj_out.lora_A.weight` is I64: a weight must be floating point"
    );
}

#[test]
fn values_that_are_not_finite_are_found_on_load() {
    let mut values = noise("b", 8);
    values[5] = f32::NEG_INFINITY;
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = file(&[
        ("transformer.proj_out.lora_A.weight", random("a", 2, 8)),
        ("transformer.proj_out.lora_B.weight", tensor(4, 2, &values)),
    ])
    .save(&folder.path().join("lora.safetensors"));
    let set = read(&path, &shape()).expect("only the header is read");
    let expected = format!(
        "`{}`: `transformer.proj_out.lora_B.weight` holds a value that is not finite at element 5",
        path.display()
    );
    assert_eq!(set.validate().expect_err("infinite").to_string(), expected);
    let out = folder.path().join("out.safetensors");
    let error =
        write(&set, LoraFormat::Kohya, &out, &WriteOptions::default()).expect_err("infinite");
    assert_eq!(error.to_string(), expected);
    let files = std::fs::read_dir(folder.path()).expect("readable").count();
    assert_eq!(files, 1, "nothing half-written is left");
}

#[test]
fn configurations_that_contradict_the_tensors() {
    let mut file = file(&[
        ("transformer.proj_out.lora_A.weight", random("a", 2, 8)),
        ("transformer.proj_out.lora_B.weight", random("b", 4, 2)),
    ]);
    let key = "lora_adapter_metadata";
    file.header(key, r#"{"transformer.r": 4}"#);
    assert_eq!(
        file.error(),
        "`lora.safetensors`: `transformer.proj_out.lora_A.weight` has rank 2, but the configuration says 4: correct `r` or `rank_pattern`"
    );
    file.header(key, r#"{"transformer.r": 2, "transformer.lora_alpha": 2}"#);
    file.scalar("transformer.proj_out.alpha", 1.0);
    assert_eq!(
        file.error(),
        "`lora.safetensors`: `transformer.proj_out.alpha` gives the scale 0.5, but the configuration gives 1: remove one of them"
    );
    file.header(key, "{");
    assert_eq!(
        file.error(),
        "`lora_adapter_metadata` of `lora.safetensors` is malformed: write it again"
    );
    file.header(key, r#"{"transformer.rank_pattern": {"(": 1}}"#);
    let expected =
        "`lora_adapter_metadata` of `lora.safetensors`: `(` is not a valid regular expression: ";
    assert!(file.error().starts_with(expected));
}

#[test]
fn folders_and_pickles() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path();
    let message = |path: &Path| read(path, &shape()).expect_err("no adapter").to_string();
    assert_eq!(
        message(path),
        format!(
            "`{}` holds no adapter: expected `adapter_config.json` with `adapter_model.safetensors`, or one file such as `pytorch_lora_weights.safetensors`",
            path.display()
        )
    );
    let pickle = path.join("adapter_model.bin");
    std::fs::write(&pickle, [0x80, 2, 0, 0, 0, 0, 0, 0, 0]).expect("writable");
    let refused = format!(
        "`{}` is a Python pickle, which can run code when loaded: convert it to safetensors",
        pickle.display()
    );
    assert_eq!(message(path), refused);
    assert_eq!(message(&pickle), refused);
    assert_eq!(
        message(&path.join("absent.safetensors")),
        format!(
            "cannot read `{}`",
            path.join("absent.safetensors").display()
        )
    );

    std::fs::remove_file(&pickle).expect("removable");
    file(&[("base_model.model.proj_out.lora_A.weight", random("a", 2, 8))])
        .save(&path.join("adapter_model.safetensors"));
    std::fs::write(path.join("adapter_config.json"), r#"{"peft_type": "IA3"}"#).expect("writable");
    assert_eq!(
        message(path),
        format!(
            "`peft_type` of `{}` is \"IA3\": only LORA, LOKR and LOHA are supported",
            path.join("adapter_config.json").display()
        )
    );
}

#[test]
fn absurd_sizes() {
    let absurd = file(&[
        (
            "transformer.proj_out.lora_A.weight",
            HostTensor::from_f32([0, 1 << 61], &[]),
        ),
        (
            "transformer.proj_out.lora_B.weight",
            HostTensor::from_f32([1 << 61, 0], &[]),
        ),
        (
            "lora_unet_double_blocks_99999999999_img_attn_qkv.lora_up.weight",
            HostTensor::from_f32([1 << 61, 0], &[]),
        ),
    ]);
    for shape in [shape(), ModelShape::default()] {
        let error = absurd.read_as(&shape).expect_err("rank 0").to_string();
        assert!(error.ends_with(
            "`transformer.proj_out.lora_A.weight` has rank 0: remove the module or train it again"
        ));
    }
}

#[test]
fn nothing_to_write() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("out.safetensors");
    let error = write(
        &LoraSet::default(),
        LoraFormat::Kohya,
        &path,
        &WriteOptions::default(),
    )
    .expect_err("empty");
    assert_eq!(
        error.to_string(),
        format!(
            "nothing to write to `{}`: the LoRA changes no module",
            path.display()
        )
    );
}

#[test]
fn dtypes_that_cannot_be_written() {
    let set = file(&[
        (
            "transformer.proj_out.lora_A.weight",
            tensor(1, 8, &[1e30; 8]),
        ),
        ("transformer.proj_out.lora_B.weight", random("b", 4, 1)),
    ])
    .read();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("out.safetensors");
    let message = |dtype| {
        let options = WriteOptions {
            dtype: Some(dtype),
            ..WriteOptions::default()
        };
        write(&set, LoraFormat::Diffusers, &path, &options)
            .expect_err("impossible")
            .to_string()
    };
    assert!(message(Dtype::F16).ends_with(
        "`transformer.proj_out.lora_A.weight` has values beyond the range of F16: write BF16 or F32"
    ));
    assert_eq!(
        message(Dtype::I8),
        "a LoRA cannot be written as I8: choose F32, F16 or BF16"
    );
}
