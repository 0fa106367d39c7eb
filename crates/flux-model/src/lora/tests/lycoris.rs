//! LoKr and LoHa: direct reconstruction, exact expansion, row slices, scales.

use lora_core::kinds::Side;
use lora_core::kinds::parts::{LORA_A, LORA_B};
use proptest::prelude::*;

use super::*;

/// `kron` by its definition, in double precision.
fn kron(a: &HostTensor, b: &HostTensor) -> HostTensor {
    let ((m, n), (p, q)) = ((a.shape[0], a.shape[1]), (b.shape[0], b.shape[1]));
    let (left, right) = (a.to_f64(), b.to_f64());
    let mut values = vec![0f32; m * n * p * q];
    for (i, j, k, l) in (0..m).flat_map(|i| {
        (0..n).flat_map(move |j| (0..p).flat_map(move |k| (0..q).map(move |l| (i, j, k, l))))
    }) {
        values[(i * p + k) * n * q + j * q + l] = (left[i * n + j] * right[k * q + l]) as f32;
    }
    tensor(m * p, n * q, &values)
}

fn times(a: &HostTensor, b: &HostTensor) -> HostTensor {
    tensor(a.shape[0], b.shape[1], &product(a, b, 1.0))
}

fn scaled(values: Vec<f32>, scale: f64) -> Vec<f32> {
    values
        .into_iter()
        .map(|x| (f64::from(x) * scale) as f32)
        .collect()
}

/// Keys of a LoKr, whose factors are full or of rank 2, and its product.
fn lokr(module: &str, [a, b, c, d]: [usize; 4], factored: [bool; 2]) -> (Builder, HostTensor) {
    let mut file = Builder::default();
    let mut factor = |name: &str, rows, columns, factored| {
        if factored {
            let (left, right) = (
                random(&format!("{name}a"), rows, 2),
                random(&format!("{name}b"), 2, columns),
            );
            file.put(&format!("{module}.{name}_a"), left.clone())
                .put(&format!("{module}.{name}_b"), right.clone());
            times(&left, &right)
        } else {
            let whole = random(name, rows, columns);
            file.put(&format!("{module}.{name}"), whole.clone());
            whole
        }
    };
    let w1 = factor("lokr_w1", a, b, factored[0]);
    let w2 = factor("lokr_w2", c, d, factored[1]);
    let whole = kron(&w1, &w2);
    (file, whole)
}

#[test]
fn lokr_scales_by_alpha_unless_both_factors_are_full() {
    for (factored, scale) in [
        ([false, true], 3.0),
        ([true, false], 3.0),
        ([true, true], 3.0),
        ([false, false], 1.0),
    ] {
        let (mut file, whole) = lokr("lycoris_proj_out", [2, 2, 2, 4], factored);
        file.scalar("lycoris_proj_out.alpha", 6.0);
        let set = file.read();
        assert_close(
            &change(&set, "proj_out"),
            &scaled(whole.to_f32(), scale),
            &format!("{factored:?}"),
        );
        assert_eq!(
            (set.report.formats["LoKr"], set.report.formats["LyCORIS"]),
            (1, 1)
        );
    }
}

#[test]
fn an_infinite_alpha_of_two_full_factors_is_ignored() {
    let (mut file, whole) = lokr("transformer.proj_out", [2, 2, 2, 4], [false, false]);
    file.put(
        "transformer.proj_out.alpha",
        HostTensor::from_f32([], &[1e10]).cast(Dtype::F16),
    );
    let set = file.read();
    assert_close(&change(&set, "proj_out"), &whole.to_f32(), "full");
    assert_eq!(set.report.warnings, Vec::<String>::new());
    file.tensors.insert(
        "transformer.proj_out.alpha".into(),
        HostTensor::from_f32([], &[1.0]),
    );
    file.header("ss_network_dim", "32");
    assert_eq!(
        file.read().report.warnings,
        [
            "`proj_out` is a LoKr of two full factors, for which alpha (1) is ignored; some trainers mean the scale 1/32"
        ]
    );
}

#[test]
fn a_peft_lokr_takes_alpha_from_its_configuration_always() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (file, whole) = lokr("base_model.model.proj_out", [2, 2, 2, 4], [false, false]);
    file.save(&folder.path().join("adapter_model.safetensors"));
    let config = r#"{"peft_type": "LOKR", "r": 4, "alpha": 6}"#;
    std::fs::write(folder.path().join("adapter_config.json"), config).expect("writable");
    let set = read(folder.path(), &shape()).expect("valid");
    assert_close(
        &change(&set, "proj_out"),
        &scaled(whole.to_f32(), 1.5),
        "PEFT",
    );
    // Formats that ignore the alpha of two full factors get the scale inside one of them.
    for format in [LoraFormat::Kohya, LoraFormat::ComfyUi] {
        assert_same(&through(&set, format, &f32_options()), &set);
    }
}

/// The fused attention module [24, 8] with rows cut at 8 and 16: through the outer factor, or through the product.
#[test]
fn fused_modules_are_cut_by_rows_and_put_together_again() {
    for dims in [[6, 2, 4, 4], [3, 2, 8, 4], [2, 2, 12, 4], [8, 2, 3, 4]] {
        for factored in [[false, true], [true, false], [true, true], [false, false]] {
            let module = "lora_unet_double_blocks_1_txt_attn_qkv";
            let (mut file, whole) = lokr(module, dims, factored);
            file.scalar(&format!("{module}.alpha"), 2.0);
            let set = file.read();
            for (i, name) in ["add_q_proj", "add_k_proj", "add_v_proj"]
                .iter()
                .enumerate()
            {
                let path = format!("transformer_blocks.1.attn.{name}");
                let expected = rows(&whole.to_f32(), 8, i * 8..(i + 1) * 8);
                assert_close(
                    &change(&set, &path),
                    &expected,
                    &format!("{dims:?} {factored:?} {path}"),
                );
            }
            for format in [LoraFormat::Kohya, LoraFormat::ComfyUi] {
                let back = through(&set, format, &WriteOptions::default());
                assert_same(&back, &set);
                assert_eq!(
                    back.report.formats["LoKr"], 1,
                    "the fused LoKr is written as it was"
                );
            }
        }
    }
}

#[test]
fn the_final_layer_s_halves_are_exchanged() {
    for dims in [[4, 2, 4, 4], [1, 2, 16, 4]] {
        let module = "diffusion_model.final_layer.adaLN_modulation.1";
        let (file, whole) = lokr(module, dims, [false, false]);
        let set = file.read();
        assert_close(
            &change(&set, "norm_out.linear"),
            &swapped(&whole.to_f32()),
            &format!("{dims:?}"),
        );
        assert_same(&through(&set, LoraFormat::ComfyUi, &f32_options()), &set);
    }
}

#[test]
fn parts_with_their_own_lokr_are_no_kohya_module() {
    let mut file = Builder::default();
    for name in ["to_q", "to_k", "to_v"] {
        let (part, _) = lokr(
            &format!("transformer.transformer_blocks.0.attn.{name}"),
            [2, 2, 4, 4],
            [false, false],
        );
        file.tensors.extend(part.tensors);
    }
    let set = file.read();
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (format, reason) in [
        (LoraFormat::Kohya, "its parts have no common low-rank form"),
        (LoraFormat::Diffusers, "its change has no low-rank form"),
    ] {
        let error = write(
            &set,
            format,
            &folder.path().join("out.safetensors"),
            &WriteOptions::default(),
        );
        assert!(
            error.expect_err("impossible").to_string().contains(reason),
            "{format}"
        );
    }
    let back = through(&set, LoraFormat::ComfyUi, &WriteOptions::default());
    assert_eq!(back.report.formats["LoKr"], 3);
    assert_same(&back, &set);
}

#[test]
fn dense_changes_are_residuals_and_low_rank_ones_adapters() {
    let dense = lokr("lycoris_proj_out", [2, 2, 2, 4], [false, false]);
    let (down, up) = (random("a", 1, 8), random("b", 1, 32));
    let mut file = dense.0.clone();
    // w1 [1, 1], w2 of rank 1: rank 1 in all.
    file.put(
        "lycoris_transformer_blocks_0_ff_net_0_proj.lokr_w1",
        tensor(1, 1, &[3.0]),
    );
    file.put(
        "lycoris_transformer_blocks_0_ff_net_0_proj.lokr_w2_a",
        up.transposed(),
    );
    file.put(
        "lycoris_transformer_blocks_0_ff_net_0_proj.lokr_w2_b",
        down.clone(),
    );
    let set = file.read();
    let (adapter, residuals) = set.to_adapter(Component::Transformer).expect("readable");
    let module = &adapter.modules()["transformer_blocks.0.ff.net.0.proj"];
    assert_eq!(module.spec.rank, 1);
    let factors = &module.factors;
    assert_close(
        &product(&factors[LORA_B], &factors[LORA_A], module.spec.scale()),
        &product(&up.transposed(), &down, 3.0),
        "expanded",
    );
    assert_eq!(residuals.len(), 1);
    assert_close(
        &residuals[0].load(&mut |_| None).expect("readable").to_f32(),
        &dense.1.to_f32(),
        "dense",
    );
}

#[test]
fn full_changes_of_weights_biases_and_norms() {
    let mut file = Builder::default();
    file.put(
        "lora_unet_final_layer_adaLN_modulation_1.diff",
        random("w", 16, 8),
    );
    file.put(
        "lora_unet_final_layer_adaLN_modulation_1.diff_b",
        HostTensor::from_f32([16], &noise("b", 16)),
    );
    file.put(
        "lora_unet_double_blocks_0_img_attn_norm_query_norm.w_norm",
        HostTensor::from_f32([4], &noise("n", 4)),
    );
    file.put(
        "lora_te1_text_model_encoder_layers_0_layer_norm1.w_norm",
        HostTensor::from_f32([6], &noise("c", 6)),
    );
    file.put(
        "lora_te1_text_model_encoder_layers_0_layer_norm1.b_norm",
        HostTensor::from_f32([6], &noise("d", 6)),
    );
    file.put(
        "diffusion_model.single_blocks.0.linear1.diff",
        random("f", 56, 8),
    );
    let set = file.read();
    assert_eq!(set.report.ignored, []);
    assert_close(
        &change(&set, "norm_out.linear"),
        &swapped(&noise("w", 128)),
        "weight",
    );
    let bias = set.transformer["norm_out.linear"]
        .bias_values()
        .expect("readable")
        .expect("changed");
    assert_eq!(bias.to_f32(), swapped(&noise("b", 16)));
    assert_eq!(
        change(&set, "transformer_blocks.0.attn.norm_q"),
        noise("n", 4)
    );
    assert_eq!(
        delta(&set.clip["text_model.encoder.layers.0.layer_norm1"], None).expect("readable"),
        noise("c", 6)
    );
    assert_eq!(
        change(&set, "single_transformer_blocks.0.proj_mlp"),
        rows(&noise("f", 56 * 8), 8, 24..56)
    );
    for format in [LoraFormat::Kohya, LoraFormat::ComfyUi] {
        assert_same(&through(&set, format, &WriteOptions::default()), &set);
    }
    let (adapter, residuals) = set.to_adapter(Component::Transformer).expect("readable");
    assert!(adapter.modules().is_empty());
    assert_eq!(residuals.len(), 7); // three attention parts and the MLP, the final layer's two, a norm
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn expansions_are_the_direct_reconstruction(
        (a, b, c, d, rank) in (1usize..4, 1usize..4, 4usize..9, 4usize..9, 1usize..3),
        factored in prop::array::uniform2(any::<bool>()),
        seed in any::<u64>(),
    ) {
        let host = |name: &str, rows, columns| TensorRef::host(name, random(&format!("{name}{seed}"), rows, columns));
        let matrix = |name: &str, rows, columns, factored: bool| match factored {
            true => Side::Product(host(&format!("{name}a"), rows, rank), host(&format!("{name}b"), rank, columns)),
            false => Side::Full(host(name, rows, columns)),
        };
        let lokr = Factors::lokr(matrix("w1", a, b, factored[0]), matrix("w2", c, d, factored[1]));
        let product = |i: usize| [host(&format!("a{i}"), a * c, rank), host(&format!("b{i}"), rank, b * d)];
        let loha = Factors::loha(product(1), product(2));
        for update in [ModuleUpdate::of(Some(lokr), 0.5), ModuleUpdate::of(Some(loha), 2.0)] {
            let direct = delta(&update, None).expect("in memory");
            if let Some(expanded) = super::super::lycoris::to_low_rank(&update) {
                prop_assert!(expanded.rank().is_some());
                assert_close(&delta(&expanded, None).expect("in memory"), &direct, "expanded");
            }
        }
    }

    #[test]
    fn loha_is_the_product_of_two_products(rank in 1usize..4, second in 1usize..4, seed in any::<u64>()) {
        let mut file = Builder::default();
        let name = |part: &str| format!("lora_unet_single_blocks_1_linear1.hada_{part}");
        let ranks = [rank, second]; // the first is the one that alpha is divided by
        let [a1, a2] = [1, 2].map(|i| random(&format!("w{i}_a{seed}"), 56, ranks[i - 1]));
        let [b1, b2] = [1, 2].map(|i| random(&format!("w{i}_b{seed}"), ranks[i - 1], 8));
        for (part, tensor) in [("w1_a", &a1), ("w1_b", &b1), ("w2_a", &a2), ("w2_b", &b2)] {
            file.put(&name(part), tensor.clone());
        }
        file.scalar("lora_unet_single_blocks_1_linear1.alpha", 3.0);
        let set = file.read();
        let (first, second) = (product(&a1, &b1, 1.0), product(&a2, &b2, 1.0));
        let scale = 3.0 / rank as f64;
        let whole: Vec<f32> = first.iter().zip(&second).map(|(x, y)| (f64::from(*x) * f64::from(*y) * scale) as f32).collect();
        let mlp = change(&set, "single_transformer_blocks.1.proj_mlp");
        assert_close(&mlp, &rows(&whole, 8, 24..56), "rows of the MLP");
        assert_same(&through(&set, LoraFormat::Kohya, &WriteOptions::default()), &set);
        assert_same(&through(&set, LoraFormat::ComfyUi, &WriteOptions::default()), &set);
    }
}
