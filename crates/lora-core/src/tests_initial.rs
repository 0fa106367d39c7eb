//! Factors that start as a part of the base weight, or orthogonal, against PEFT 0.19.1. `tests/reference/peft_init_and_weights.py`
//! made the numbers; f32 on both sides, so 1e-5 of the norm is rounding and no more.

use std::collections::BTreeMap;

use burn::module::{Module, Param};
use burn::optim::AdamWConfig;
use burn::tensor::{Device, Tensor, TensorData};

use crate::attach::{NewAdapter, Plan};
use crate::combine::{Combination, add_weighted_adapter};
use crate::files::host::HostTensor;
use crate::kinds::parts::{INITIAL_A, INITIAL_B, LORA_A, LORA_B, MAGNITUDE};
use crate::kinds::{Factors, ModuleAdapter};
use crate::merge::safe_merge;
use crate::peft::{InitLoraWeights, PeftType, Targets};
use crate::state::{adapter_state, trainable_parameters};
use crate::test_model::{Mlp, distance, values};
use crate::tests_peft::{Expected, deltas};
use crate::training::DropoutScope;
use crate::*;

const SPLITS: [(&str, InitLoraWeights); 3] = [
    ("pissa", InitLoraWeights::Pissa),
    ("pissa_niter_32", InitLoraWeights::PissaNiter(32)),
    ("olora", InitLoraWeights::Olora),
];

fn split_config(init: InitLoraWeights, use_rslora: bool) -> LoraConfig {
    LoraConfig {
        r: 3,
        lora_alpha: 6.0,
        use_rslora,
        init_lora_weights: init,
        target_modules: Targets::Pattern("all-linear".into()),
        ..LoraConfig::default()
    }
}

fn split(model: Mlp, config: &LoraConfig) -> Mlp {
    Plan::new(&model, config.clone().fresh(4).fast())
        .expect("fits")
        .apply(model)
        .expect("attached")
}

#[test]
fn pissa_and_olora_split_the_weights_as_peft_does() {
    let (expected, device) = (Expected::new(), Device::flex());
    for (init, method) in SPLITS {
        for rslora in [false, true] {
            let case = format!("{init}{}", if rslora { "_rslora" } else { "" });
            let config = split_config(method, rslora);
            let base = expected.model(&device);
            let model = split(base.clone(), &config);
            let d = distance(
                &values(model.fast(expected.x(&device))),
                &values(base.fast(expected.x(&device))),
            );
            assert!(d < 1e-6, "{case}: the output moved by {d}");
            let file = AdapterFile::from_model(&model, "default", None).expect("attached");
            for (layer, module) in file.modules() {
                let scale = module.spec.scale() as f32;
                // Signs of singular vectors are free; the product and the residual are not.
                let product = |a: &HostTensor, b: &HostTensor| {
                    let matrix = |t: &HostTensor| {
                        let data = TensorData::new(t.to_f32(), t.shape.clone());
                        Tensor::<2>::from_data(data, &device)
                    };
                    matrix(b).matmul(matrix(a)) * scale
                };
                let theirs = product(
                    &expected.read(&format!("{case}.{layer}.lora_A")),
                    &expected.read(&format!("{case}.{layer}.lora_B")),
                );
                let ours = product(&module.factors[LORA_A], &module.factors[LORA_B]);
                assert!(
                    distance(&values(ours.clone()), &values(theirs)) < 1e-5,
                    "{case}"
                );
                let weight = expected.read(&format!("base.{layer}.weight"));
                let data = TensorData::new(weight.to_f32(), weight.shape.clone());
                let residual = Tensor::<2>::from_data(data, &device) - ours;
                let d = distance(
                    &values(residual),
                    &expected.read(&format!("{case}.{layer}.residual")).to_f32(),
                );
                assert!(d < 1e-5, "{case}.{layer}.residual: {d}");
                if method == InitLoraWeights::Olora {
                    let a = module.factors[LORA_A].to_f32();
                    expected.assert_near(&format!("{case}.{layer}.lora_A"), &a);
                }
            }
        }
    }
}

#[test]
fn a_trained_split_adapter_is_saved_as_peft_converts_it() {
    let (expected, device) = (Expected::new(), Device::flex());
    for (init, method) in SPLITS {
        for rslora in [false, true] {
            let case = format!("{init}{}", if rslora { "_rslora" } else { "" });
            let config = split_config(method, rslora);
            let fresh = split(expected.model(&device), &config);
            let fresh = AdapterFile::from_model(&fresh, "default", None).expect("attached");
            let mut modules = fresh.into_modules();
            for (layer, module) in &mut modules {
                let read = |part: &str| expected.read(&format!("{case}.{layer}.{part}"));
                module.factors = Factors::lora(read("trained_A"), read("trained_B"))
                    .with(INITIAL_A, read("lora_A"))
                    .with(INITIAL_B, read("lora_B"));
            }
            let trained = AdapterFile::new(modules);
            for (layer, module) in trained.to_plain().modules() {
                let plain = |part: &str| expected.read(&format!("{case}.plain.{layer}.{part}"));
                assert_eq!(module.factors[LORA_A], plain("lora_A"));
                assert_eq!(module.factors[LORA_B], plain("lora_B"));
                assert!(
                    (module.spec.scale() - if rslora { 6.0 / 3f64.sqrt() } else { 2.0 }).abs()
                        < 1e-12
                );
            }
            // The file goes on as it was, and is a plain LoRA for everybody else: both compute what PEFT computes.
            let bytes = trained.to_bytes("transformer.");
            let read = AdapterFile::from_bytes("x".as_ref(), bytes, "transformer.").expect("valid");
            assert_eq!(read.modules(), trained.modules());
            for file in [read, trained.to_plain()] {
                let model = expected.model(&device);
                let plan = Plan::new(&model, file.stored().fast());
                let model = plan.expect("fits").apply(model).expect("attached");
                let x = || expected.x(&device);
                expected.assert_near(&format!("{case}.forward"), &values(model.fast(x())));
                expected.assert_near(&format!("{case}.forward"), &values(model.dense(x())));
                let merged = safe_merge(&model).expect("finite");
                expected.assert_near(&format!("{case}.forward"), &values(merged.fast(x())));
            }
        }
    }
}

fn train(mut model: Mlp, optimizer: &mut PathOptimizer, steps: u64) -> Mlp {
    let expected = Expected::new();
    for step in 0..steps {
        let scope = DropoutScope::enter(1, step % 3);
        let x = expected.x(&Device::flex()).autodiff();
        let mut found = model.fast(x.clone()).sub(x).square().sum().backward();
        scope.finish().expect("fast path");
        let mut gradients = Gradients::default();
        gradients.take("", &model, &mut found);
        optimizer
            .step(1e-2, &mut model, gradients)
            .expect("complete");
    }
    model
}

#[test]
fn a_split_adapter_trains_resumes_in_the_same_bits_and_leaves_the_base_alone() {
    let (expected, device) = (Expected::new(), Device::flex());
    let autodiff = device.clone().autodiff();
    let adamw = || AdamWConfig::new().build();
    for (_, method) in SPLITS {
        for use_dora in [false, true] {
            let config = LoraConfig {
                use_dora,
                lora_dropout: 0.25,
                ..split_config(method, true)
            };
            let start = split(expected.model(&autodiff), &config);
            assert_eq!(
                trainable_parameters(&start).len(),
                if use_dora { 6 } else { 4 }
            );
            let chosen = set_adapters(start.clone(), &[("default", 1.0)]).expect("attached");
            assert_eq!(trainable_parameters(&chosen), trainable_parameters(&start));
            let mut optimizer = PathOptimizer::new(adamw());
            let straight = train(start.clone(), &mut optimizer, 6);

            let mut optimizer = PathOptimizer::new(adamw());
            let half = train(start, &mut optimizer, 3);
            let file = AdapterFile::from_model(&half, "default", Some(&config));
            let bytes = file.expect("attached").to_bytes("");
            let file = AdapterFile::from_bytes("x".as_ref(), bytes, "").expect("valid");
            let resumed = TrainingRecord::new(file, optimizer.state(), ())
                .restore_adapters(expected.model(&autodiff), |file| {
                    file.stored().agreeing_with(&config).fast()
                })
                .expect("fits")
                .restore_optimizer(adamw(), &device)
                .expect("complete")
                .restore_progress();
            let mut optimizer = resumed.optimizer;
            let resumed = train(resumed.model, &mut optimizer, 3);
            assert_eq!(adapter_state(&resumed), adapter_state(&straight));
            assert_ne!(adapter_state(&half), adapter_state(&straight));
            assert_eq!(
                values(detach(straight.valid()).up.weight.val()),
                values(expected.model(&device).up.weight.val())
            );
        }
    }
}

#[test]
fn a_split_adapter_of_dora_computes_what_peft_does() {
    let (expected, device) = (Expected::new(), Device::flex());
    let config = LoraConfig {
        use_dora: true,
        ..split_config(InitLoraWeights::Pissa, false)
    };
    let fresh = split(expected.model(&device), &config);
    let fresh = AdapterFile::from_model(&fresh, "default", None).expect("attached");
    let mut modules = fresh.into_modules();
    for (layer, module) in &mut modules {
        let read = |part: &str| expected.read(&format!("pissa_dora.{layer}.{part}"));
        let magnitude = module.factors[MAGNITUDE].to_f32();
        expected.assert_near(&format!("pissa_dora.{layer}.magnitude"), &magnitude);
        module.factors = Factors::lora(read("trained_A"), read("trained_B"))
            .with(MAGNITUDE, read("trained_magnitude"))
            .with(INITIAL_A, read("lora_A"))
            .with(INITIAL_B, read("lora_B"));
    }
    let trained = AdapterFile::new(modules);
    let autodiff = device.clone().autodiff();
    let attach = |file: AdapterFile, device: &Device| {
        let model = expected.model(device);
        let plan = Plan::new(&model, file.stored().fast());
        plan.expect("fits").apply(model).expect("attached")
    };
    for path in [Mlp::fast, Mlp::dense] {
        let plain = attach(trained.to_plain(), &device);
        let output = path(&plain, expected.x(&device));
        expected.assert_near("pissa_dora.forward", &values(output));
        let model = attach(trained.clone(), &autodiff);
        let output = path(&model, expected.x(&device).autodiff());
        expected.assert_near("pissa_dora.forward", &values(output.clone().inner()));
        let mut found = output.square().sum().backward();
        let mut gradients = Gradients::default();
        gradients.take("", &model, &mut found);
        assert_eq!(gradients.iter().count(), 6);
        for (path, gradient) in gradients.iter() {
            let (layer, part) = path
                .split_once(".weight.adapter.default.lora_")
                .expect("ours");
            let part = part.trim_end_matches("_vector");
            let key = format!("pissa_dora.{layer}.gradient_{part}");
            expected.assert_near(&key, &values(gradient.clone()));
        }
    }
}

/// As PEFT keeps it: the start taken off the weights, plain factors.
fn on_a_changed_base(expected: &Expected, adapter: &AdapterFile, device: &Device) -> Mlp {
    let mut model = expected.model(device);
    let mut modules = BTreeMap::new();
    for (layer, linear) in [("up", &mut model.up), ("down", &mut model.down)] {
        let module = &adapter.modules()[layer];
        let factors = &module.factors;
        let matrix = |t: &HostTensor| {
            let data = TensorData::new(t.to_f32(), t.shape.clone());
            Tensor::<2>::from_data(data, device)
        };
        let start = matrix(&factors[INITIAL_B]).matmul(matrix(&factors[INITIAL_A]));
        let weight = linear.weight.val() - start.transpose() * module.spec.scale();
        linear.weight = Param::from_tensor(weight.detach());
        let plain = factors.clone().without(INITIAL_A).without(INITIAL_B);
        modules.insert(layer.to_string(), ModuleAdapter::new(module.spec, plain));
    }
    let plan = Plan::new(&model, AdapterFile::new(modules).stored().fast());
    plan.expect("fits").apply(model).expect("attached")
}

#[test]
fn dropout_leaves_the_start_alone_as_in_peft() {
    let (expected, device) = (Expected::new(), Device::flex().autodiff());
    for use_dora in [false, true] {
        let config = LoraConfig {
            use_dora,
            lora_dropout: 0.5,
            ..split_config(InitLoraWeights::Pissa, false)
        };
        let mut optimizer = PathOptimizer::new(AdamWConfig::new().build());
        let model = train(split(expected.model(&device), &config), &mut optimizer, 3);
        let file = AdapterFile::from_model(&model, "default", Some(&config)).expect("attached");
        let peft = on_a_changed_base(&expected, &file, &device);
        let run = |model: &Mlp| {
            let scope = DropoutScope::enter(2, 0);
            let output = model.fast(expected.x(&device));
            let mut found = output.clone().square().sum().backward();
            scope.finish().expect("fast path");
            let mut gradients = Gradients::default();
            gradients.take("", model, &mut found);
            (values(output.inner()), gradients)
        };
        let ((output, gradients), (expected_output, expected_gradients)) =
            (run(&model), run(&peft));
        assert!(distance(&output, &expected_output) < 1e-5);
        let undropped = values(model.fast(expected.x(&device)).inner());
        assert!(
            distance(&undropped, &expected_output) > 1e-2,
            "nothing was dropped"
        );
        let expected_gradients: BTreeMap<_, _> = expected_gradients.iter().collect();
        assert_eq!(gradients.iter().count(), expected_gradients.len());
        for (path, gradient) in gradients.iter() {
            let expected = values(expected_gradients[path].clone());
            let d = distance(&values(gradient.clone()), &expected);
            assert!(d < 1e-5, "{path}: {d}");
        }
    }
}

#[test]
fn a_split_adapter_is_merged_combined_and_saved_as_the_update_it_is() {
    let (expected, device) = (Expected::new(), Device::flex());
    let config = split_config(InitLoraWeights::Olora, true);
    let mut optimizer = PathOptimizer::new(AdamWConfig::new().build());
    let start = split(expected.model(&device.clone().autodiff()), &config);
    let model = train(start, &mut optimizer, 3).valid();
    let output = |model: &Mlp| values(model.fast(expected.x(&device)));
    let base = output(&expected.model(&device));
    let trained = output(&model);
    assert!(distance(&trained, &base) > 1e-3);
    assert_eq!(output(&detach(model.clone())), base);
    let off = set_adapters(model.clone(), &[]).expect("attached");
    assert_eq!(output(&off), base);
    let still = set_adapters(model.clone(), &[("default", 0.0)]).expect("attached");
    assert!(distance(&output(&still), &base) < 1e-6);

    let half = add_weighted_adapter(model.clone(), &[("default", 0.5)], "half", Combination::Cat)
        .expect("linear layers");
    let (own, half) = (deltas(&half, "default"), deltas(&half, "half"));
    for (layer, own) in &own {
        let own: Vec<f32> = own.iter().map(|v| 0.5 * v).collect();
        assert!(distance(&half[layer], &own) < 1e-5, "{layer}");
    }

    let folder = tempfile::tempdir().expect("folder");
    let file = AdapterFile::from_model(&model, "default", Some(&config)).expect("attached");
    file.save_peft(folder.path()).expect("written");
    let read = AdapterFile::load_peft(folder.path()).expect("a PEFT folder");
    assert_eq!(read.modules(), file.to_plain().modules());
    let written = folder.path().join("adapter_config.json");
    let text = std::fs::read_to_string(&written).expect("text");
    let text = text.replace(
        "\"init_lora_weights\": true",
        "\"init_lora_weights\": \"olora\"",
    );
    std::fs::write(&written, text).expect("written");
    let error = AdapterFile::load_peft(folder.path()).expect_err("unconverted");
    assert!(
        error
            .to_string()
            .contains("is olora: the factors belong to a changed base"),
        "{error}"
    );
}

#[test]
fn what_cannot_be_split_is_refused() {
    let (expected, device) = (Expected::new(), Device::flex());
    let base = expected.model(&device);
    let pissa = || split_config(InitLoraWeights::Pissa, false);
    let file = || {
        let model = split(expected.model(&device), &pissa());
        AdapterFile::from_model(&model, "default", None).expect("attached")
    };
    let refused = |adapter: NewAdapter| {
        Plan::new(&base, adapter.fast())
            .expect_err("refused")
            .to_string()
    };
    for other in [InitLoraWeights::Gaussian, InitLoraWeights::Olora] {
        assert_eq!(
            refused(file().stored().agreeing_with(&split_config(other, false))),
            format!(
                "`init_lora_weights (down)` is {other} in the configuration but pissa in the stored adapter; resume with the stored value or start a new run"
            )
        );
    }
    let config = LoraConfig {
        r: 6,
        lora_alpha: 12.0,
        ..pissa()
    };
    let error = refused(file().to_plain().stored().agreeing_with(&config));
    assert!(
        error.contains("is pissa in the configuration but no part of the base weight"),
        "{error}"
    );
    let fresh = |config: LoraConfig| refused(config.fresh(1));
    assert_eq!(
        fresh(LoraConfig { r: 13, ..pissa() }),
        "`init_lora_weights` pissa: `down` has 24 inputs and 12 outputs, too few for rank 13; lower `r` or set `rank_pattern`"
    );
    for alpha in [0.0, -1.0] {
        assert_eq!(
            fresh(LoraConfig {
                lora_alpha: alpha,
                ..pissa()
            }),
            format!("`init_lora_weights` pissa needs a positive `lora_alpha`; it is {alpha}")
        );
    }
    assert_eq!(
        fresh(LoraConfig {
            lora_bias: true,
            ..pissa()
        }),
        "`lora_bias` needs `init_lora_weights` true or false; it is pissa"
    );
    assert_eq!(
        fresh(split_config(InitLoraWeights::Orthogonal, false)),
        "`init_lora_weights` orthogonal: `down` has rank 3; it must be even"
    );
    for kind in [PeftType::Loha, PeftType::Lokr] {
        assert_eq!(
            fresh(LoraConfig {
                peft_type: kind,
                ..pissa()
            }),
            format!("`init_lora_weights` must be true or false for `peft_type` {kind}")
        );
    }

    #[derive(Module, Debug)]
    struct Others {
        conv: burn::nn::conv::Conv2d,
        table: burn::nn::Embedding,
    }
    let others = Others {
        conv: burn::nn::conv::Conv2dConfig::new([4, 4], [3, 3]).init(&device),
        table: burn::nn::EmbeddingConfig::new(8, 8).init(&device),
    };
    for layer in ["conv", "table"] {
        for init in [InitLoraWeights::Olora, InitLoraWeights::Orthogonal] {
            let config = LoraConfig {
                r: 2,
                target_modules: Targets::List(vec![layer.into()]),
                ..split_config(init, false)
            };
            let error = Plan::new(&others, config.clone().fresh(1));
            assert_eq!(
                error.expect_err("refused").to_string(),
                format!(
                    "`init_lora_weights` {init}: `{layer}` is no linear layer; leave it out of `target_modules`"
                )
            );
        }
    }
}

#[test]
fn a_split_file_that_does_not_fit_its_header_is_refused() {
    let (expected, device) = (Expected::new(), Device::flex());
    let config = split_config(InitLoraWeights::PissaNiter(3), false);
    let model = split(expected.model(&device), &config);
    let file = AdapterFile::from_model(&model, "default", Some(&config)).expect("attached");
    let refused = |from: &str, to: &str| {
        let bytes = file.to_bytes("");
        let end = 8 + u64::from_le_bytes(bytes[..8].try_into().expect("8")) as usize;
        let header = std::str::from_utf8(&bytes[8..end]).expect("text");
        assert_eq!(header.matches(from).count(), 1, "{from} in {header}");
        let header = header.replacen(from, to, 1);
        let head = (header.len() as u64).to_le_bytes();
        let bytes = [&head, header.as_bytes(), &bytes[end..]].concat();
        let error = AdapterFile::from_bytes("x".as_ref(), bytes, "").expect_err("refused");
        error.to_string()
    };
    for (from, to) in [
        (r#"\"r\":3"#, r#"\"r\":2"#),
        (r#"\"lora_alpha\":6.0"#, r#"\"lora_alpha\":7.0"#),
        ("pissa_niter_3", "gaussian"),
    ] {
        assert_eq!(
            refused(from, to),
            "`lora_core_split_adapter` in the header of x does not describe the factors of `down`; without that entry the file is a plain LoRA"
        );
    }
    assert_eq!(
        refused("pissa_niter_3", "pissa_niter_x"),
        "`lora_core_split_adapter` of x is malformed: write it again"
    );
}

#[test]
fn orthogonal_factors_are_not_zero_and_cancel() {
    let (expected, device) = (Expected::new(), Device::flex());
    let config = LoraConfig {
        r: 4,
        ..split_config(InitLoraWeights::Orthogonal, false)
    };
    let model = split(expected.model(&device), &config);
    for (layer, delta) in deltas(&model, "default") {
        assert!(delta.iter().all(|v| v.abs() < 1e-7), "{layer}");
    }
    for (path, tensor) in adapter_state(&model) {
        let values = tensor.to_f32();
        let mean_square = values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32;
        assert!(
            (0.002..0.012).contains(&mean_square),
            "{path}: {mean_square}"
        ); // 1/2 of 0.1², few samples
    }
}
