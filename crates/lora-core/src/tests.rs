//! What must hold of adapters as a whole; details are tested in their files.

use std::collections::BTreeMap;

use burn::module::{Module, Param};
use burn::optim::AdamWConfig;
use burn::tensor::{DType, Device, Tensor};
use proptest::prelude::*;

use crate::attach::Plan;
use crate::edit::{adapter_names, delete_adapter};
use crate::peft::{InitLoraWeights, Targets};
use crate::state::{adapter_state, count_parameters, trainable_parameters};
use crate::test_model::{Mlp, distance, input, values};
use crate::training::{DropoutScope, OptimizerScalars, OptimizerState};
use crate::*;

fn config() -> LoraConfig {
    LoraConfig {
        r: 3,
        lora_alpha: 5.0,
        target_modules: Targets::Pattern("all-linear".into()),
        init_lora_weights: InitLoraWeights::Random,
        ..LoraConfig::default()
    }
}

fn attach(model: Mlp, name: &str, config: &LoraConfig, seed: u64) -> Mlp {
    crate::attach(model, config.clone().fresh(seed).named(name).fast()).expect("valid")
}

fn gradients(model: &Mlp, fast: bool, device: &Device) -> (Vec<f32>, Gradients) {
    let x = input(5, 8, device).autodiff();
    let y = if fast { model.fast(x) } else { model.dense(x) };
    let mut found = y.clone().square().sum().backward();
    let mut gradients = Gradients::default();
    gradients.take("", model, &mut found);
    (values(y.inner()), gradients)
}

#[test]
fn zero_b_leaves_the_output_unchanged_and_base_weights_are_frozen() {
    let device = Device::flex();
    let base = Mlp::new(8, &device.clone().autodiff());
    let config = LoraConfig {
        init_lora_weights: InitLoraWeights::Default,
        ..config()
    };
    let adapted = attach(base.clone(), "default", &config, 1);
    let x = input(5, 8, &device.clone().autodiff());
    assert_eq!(values(base.fast(x.clone())), values(adapted.fast(x)));
    let trainable = trainable_parameters(&adapted);
    let expected: Vec<&str> = vec![
        "down.weight.adapter.default.lora_A",
        "down.weight.adapter.default.lora_B",
        "up.weight.adapter.default.lora_A",
        "up.weight.adapter.default.lora_B",
    ];
    assert_eq!(
        trainable.keys().map(String::as_str).collect::<Vec<_>>(),
        expected
    );
    assert_eq!(trainable["up.weight.adapter.default.lora_A"], [3, 8]);
    let count = count_parameters(&adapted);
    assert_eq!(
        (count.total, count.trainable, count.adapted_layers),
        (8 * 16 * 2 + 24 + 144, 144, 2)
    );
}

#[test]
fn a_step_moves_every_factor_and_no_base_weight() {
    let device = Device::flex();
    let model = attach(
        Mlp::new(8, &device.clone().autodiff()),
        "default",
        &config(),
        1,
    );
    let before = (
        values(model.up.weight.base().inner()),
        adapter_state(&model),
    );
    let (_, gradients) = gradients(&model, true, &device);
    let mut optimizer = PathOptimizer::new(AdamWConfig::new().build());
    let mut model = model;
    optimizer
        .step(1e-2, &mut model, gradients)
        .expect("every parameter has its gradient");
    assert_eq!(values(model.up.weight.base().inner()), before.0);
    for (path, tensor) in adapter_state(&model) {
        assert_ne!(tensor, before.1[&path], "{path}");
    }
    assert_eq!(trainable_parameters(&model).len(), 4);
}

#[test]
fn a_base_weight_that_is_not_f32_is_an_error() {
    let mut model = Mlp::new(8, &Device::flex().autodiff());
    let half = model.up.weight.val().inner().cast(DType::F16);
    model.up.weight = Param::from_tensor(Tensor::from_inner(half));
    // `lora_core::linear` computes such a layer, but `Param::val()` is what other models read.
    let plan = |adapter| Plan::new(&model, adapter);
    plan(config().fresh(1).fast()).expect("a model that computes its layers so");
    let error = plan(config().fresh(1)).expect_err("f16").to_string();
    assert_eq!(
        error,
        "tensor `up.lora_A` has no place in this model: the layer's weight is F16, and adapters need F32: load the model as f32"
    );
}

#[test]
fn a_missing_or_foreign_gradient_is_an_error() {
    let device = Device::flex();
    let model = attach(
        Mlp::new(8, &device.clone().autodiff()),
        "default",
        &config(),
        1,
    );
    let mut optimizer = PathOptimizer::new(AdamWConfig::new().build());
    let error = optimizer
        .step(1e-2, &mut model.clone(), Gradients::default())
        .expect_err("no gradients")
        .to_string();
    assert!(error.contains("has no gradient"), "{error}");
    let (_, found) = gradients(&model, true, &device);
    let error = optimizer
        .step(1e-2, &mut model.no_grad(), found)
        .expect_err("nothing to train")
        .to_string();
    assert!(error.contains("has no parameter"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn fast_and_dense_path_agree(r in 1usize..9, alpha in 0.5f64..20.0, rslora: bool, dora: bool, two: bool, seed: u64) {
        let device = Device::flex();
        let config = LoraConfig { r, lora_alpha: alpha, use_rslora: rslora, use_dora: dora, ..config() };
        let mut model = attach(Mlp::new(8, &device.clone().autodiff()), "default", &config, seed);
        if two {
            let other = LoraConfig { r: 2, use_dora: false, target_modules: Targets::List(vec!["up".into()]), ..config };
            model = attach(model, "other", &other, seed ^ 1);
        }
        let (fast, fast_gradients) = gradients(&model, true, &device);
        let (dense, dense_gradients) = gradients(&model, false, &device);
        prop_assert!(distance(&fast, &dense) < 1e-5);
        let dense_gradients: BTreeMap<&str, &Tensor<1>> = dense_gradients.iter().collect();
        prop_assert_eq!(fast_gradients.iter().count(), dense_gradients.len());
        for (path, gradient) in fast_gradients.iter() {
            let d = distance(&values(gradient.clone()), &values(dense_gradients[path].clone()));
            prop_assert!(d < 1e-4, "{}: {}", path, d);
        }
    }

    #[test]
    fn merging_equals_the_side_path_and_detaching_restores_the_base(seed: u64, dora: bool) {
        let device = Device::flex();
        let base = Mlp::new(8, &device);
        let model = attach(base.clone(), "default", &LoraConfig { use_dora: dora, ..config() }, seed);
        let x = input(5, 8, &device);
        let expected = values(model.fast(x.clone()));
        let merged = merge(model.clone()).expect("no bias");
        prop_assert!(distance(&values(merged.fast(x)), &expected) < 1e-5);
        prop_assert!(adapter_names(&merged).is_empty());
        prop_assert_eq!(values(detach(model).up.weight.val()), values(base.up.weight.val()));
    }

    #[test]
    fn a_file_restores_the_same_adapter(seed: u64, dora: bool, bias: bool, rslora: bool, alpha in 0.1f64..99.0) {
        let device = Device::flex();
        let config = LoraConfig { lora_alpha: alpha, use_dora: dora, lora_bias: bias && !dora, use_rslora: rslora, ..config() };
        let base = Mlp::new(8, &device);
        let model = attach(base.clone(), "default", &config, seed);
        let file = AdapterFile::from_model(&model, "default", Some(&config)).expect("attached");
        let bytes = file.to_bytes("transformer.");
        let read = AdapterFile::from_bytes("x.safetensors".as_ref(), bytes, "transformer.").expect("valid file");
        prop_assert_eq!(&read, &file);
        let plan = Plan::new(&base, read.stored().agreeing_with(&config).fast()).expect("fits");
        let restored = plan.apply(base).expect("attached");
        prop_assert_eq!(adapter_state(&restored), adapter_state(&model));
        let x = input(5, 8, &device);
        prop_assert_eq!(values(restored.fast(x.clone())), values(model.fast(x)));
    }
}

#[test]
fn adapters_are_chosen_weighted_and_deleted_by_name() {
    let device = Device::flex();
    let base = Mlp::new(8, &device);
    let only = |name: &str, seed| attach(base.clone(), name, &config(), seed);
    let both = attach(only("a", 1), "b", &config(), 2);
    let x = || input(5, 8, &device);
    let set = |model: &Mlp, weights: &[(&str, f64)]| {
        set_adapters(model.clone(), weights).expect("attached")
    };
    assert_eq!(adapter_names(&both), ["a", "b"]);
    assert_eq!(
        values(set(&both, &[("a", 1.0)]).fast(x())),
        values(only("a", 1).fast(x()))
    );
    assert_eq!(
        values(set(&both, &[("b", 1.0)]).fast(x())),
        values(only("b", 2).fast(x()))
    );
    assert_eq!(values(set(&both, &[]).fast(x())), values(base.fast(x())));
    assert_ne!(
        values(set(&both, &[("a", 0.5)]).fast(x())),
        values(only("a", 1).fast(x()))
    );
    let error = set_adapters(both.clone(), &[("a", f64::NAN)]).expect_err("not a number");
    assert_eq!(
        error.to_string(),
        "the weight of adapter `a` is NaN; it must be finite"
    );
    let left = delete_adapter(both.clone(), "b").expect("attached");
    assert_eq!(values(left.fast(x())), values(only("a", 1).fast(x())));
    let error = delete_adapter(left, "b").expect_err("gone").to_string();
    assert_eq!(error, "no adapter named `b`; attached: a");
    let taken = Plan::new(&both, config().fresh(1).named("a").fast());
    assert_eq!(
        taken.expect_err("taken").to_string(),
        "an adapter named `a` is already attached"
    );
}

#[test]
fn a_pattern_that_matches_nothing_names_its_neighbour() {
    let base = Mlp::new(8, &Device::flex());
    let config = LoraConfig {
        target_modules: Targets::List(vec!["up".into(), "dawn".into()]),
        ..config()
    };
    let error = Plan::new(&base, config.clone().fresh(1).fast());
    assert_eq!(
        error.expect_err("no match").to_string(),
        "LoRA target `dawn` matches no layer of this model; the nearest layer is `down`"
    );
}

#[test]
fn a_file_that_disagrees_names_both_values() {
    let device = Device::flex();
    let base = Mlp::new(8, &device);
    let model = attach(base.clone(), "default", &config(), 1);
    let file = AdapterFile::from_model(&model, "default", Some(&config())).expect("attached");
    let plan = |config: &LoraConfig| {
        Plan::new(&base, file.clone().stored().agreeing_with(config).fast())
            .expect_err("disagrees")
            .to_string()
    };
    let error = plan(&LoraConfig { r: 4, ..config() });
    assert!(
        error.contains("is 4 in the configuration but 3 in the stored adapter"),
        "{error}"
    );
    let error = plan(&LoraConfig {
        lora_alpha: 6.0,
        ..config()
    });
    assert!(
        error.contains("is 6 in the configuration but 5 in the stored adapter"),
        "{error}"
    );
    let error = plan(&LoraConfig {
        target_modules: Targets::List(vec!["up".into()]),
        ..config()
    });
    assert!(error.contains("target_modules"), "{error}");
}

#[test]
fn dropout_is_a_function_of_seed_and_step_and_refused_on_the_dense_path() {
    let device = Device::flex();
    let base = Mlp::new(8, &device);
    let config = LoraConfig {
        lora_dropout: 0.5,
        ..config()
    };
    let refused = Plan::new(&base, config.clone().fresh(1));
    assert!(
        refused
            .expect_err("dense")
            .to_string()
            .contains("lora_dropout")
    );
    let model = attach(base, "default", &config, 1);
    let run = |seed, micro_step| {
        let scope = DropoutScope::enter(seed, micro_step);
        let y = values(model.fast(input(5, 8, &device)));
        scope.finish().expect("fast path");
        y
    };
    assert_eq!(run(1, 7), run(1, 7));
    assert_ne!(run(1, 7), run(1, 8));
    assert_ne!(run(1, 7), run(2, 7));
    let scope = DropoutScope::enter(1, 1);
    let _ = model.dense(input(5, 8, &device));
    assert!(
        scope
            .finish()
            .expect_err("dense path")
            .to_string()
            .contains("lora_core::linear")
    );
}

fn trained(steps: u64) -> (Mlp, PathOptimizer) {
    let device = Device::flex();
    let mut model = attach(
        Mlp::new(8, &device.clone().autodiff()),
        "default",
        &config(),
        1,
    );
    let mut optimizer = PathOptimizer::new(AdamWConfig::new().build());
    for _ in 0..steps {
        let (_, found) = gradients(&model, true, &device);
        optimizer
            .step(1e-2, &mut model, found)
            .expect("complete gradients");
    }
    (model, optimizer)
}

#[test]
fn restored_in_the_only_order_training_goes_on_in_the_same_bits() {
    let device = Device::flex();
    let (straight, straight_optimizer) = trained(9);
    let (model, optimizer) = trained(4);
    let file = AdapterFile::from_model(&model, "default", Some(&config())).expect("attached");
    let record = TrainingRecord::new(file, optimizer.state(), 4u64);
    let Training {
        mut model,
        mut optimizer,
        progress,
    } = record
        .restore_adapters(Mlp::new(8, &device.clone().autodiff()), |file| {
            file.stored().agreeing_with(&config()).fast()
        })
        .expect("fits")
        .restore_optimizer(AdamWConfig::new().build(), &device)
        .expect("complete")
        .restore_progress();
    for _ in progress..9 {
        let (_, found) = gradients(&model, true, &device);
        optimizer
            .step(1e-2, &mut model, found)
            .expect("complete gradients");
    }
    assert_eq!(adapter_state(&model), adapter_state(&straight));
    assert_eq!(
        optimizer.state().tensors,
        straight_optimizer.state().tensors
    );
}

#[test]
fn a_run_saved_in_a_folder_goes_on_in_the_same_bits() {
    let device = Device::flex();
    let autodiff = device.clone().autodiff();
    let folder = tempfile::tempdir().expect("a folder");
    let to = |mut run: Training<Mlp, u64>, until: u64| {
        while run.progress < until {
            let y = run.model.fast(input(5, 8, &device).autodiff());
            run.step(1e-2, &y.square().sum()).expect("a step");
            run.progress += 1;
        }
        run
    };
    // A part of the base weight is split off, which a PEFT folder would not keep apart.
    let config = LoraConfig {
        init_lora_weights: InitLoraWeights::Olora,
        ..config()
    };
    let rule = || AdamWConfig::new().build();
    let start = || {
        let model = attach(Mlp::new(8, &autodiff), "default", &config, 1);
        Training::new(model, rule(), 0)
    };
    let straight = to(start(), 9);
    let first = to(start(), 4);
    first
        .save(folder.path(), "default", Some(&config))
        .expect("saved");
    let resumed = TrainingRecord::<u64>::load(folder.path())
        .expect("saved")
        .restore_adapters(Mlp::new(8, &autodiff), |file| {
            file.stored().agreeing_with(&config).fast()
        })
        .expect("fits")
        .restore_optimizer(rule(), &device)
        .expect("complete")
        .restore_progress();
    assert_eq!(resumed.progress, 4);
    let resumed = to(resumed, 9);
    assert_eq!(
        adapter_state(&resumed.model),
        adapter_state(&straight.model)
    );
    let moments = |run: &Training<Mlp, u64>| run.optimizer.state().tensors;
    assert_eq!(moments(&resumed), moments(&straight));

    // Files of two saves are no run.
    let other = tempfile::tempdir().expect("a folder");
    straight
        .save(other.path(), "default", Some(&config))
        .expect("saved");
    let adapter = "adapter.safetensors";
    std::fs::copy(other.path().join(adapter), folder.path().join(adapter)).expect("copied");
    let error = TrainingRecord::<u64>::load(folder.path()).expect_err("two saves");
    assert!(
        error.to_string().contains("take both from one save"),
        "{error}"
    );
}

#[test]
fn optimizer_state_that_does_not_fit_is_refused() {
    let device = Device::flex();
    let (model, optimizer) = trained(2);
    let trainable = trainable_parameters(&model);
    let refuse = |change: &dyn Fn(&mut OptimizerState)| {
        let mut state = optimizer.state();
        change(&mut state);
        PathOptimizer::restore(AdamWConfig::new().build(), state, &trainable, &device)
            .expect_err("refused")
            .to_string()
    };
    let moment = "up.weight.adapter.default.lora_A.momentum.moment_1";
    assert!(optimizer.state().tensors.contains_key(moment));
    let error = refuse(&|s| drop(s.tensors.remove(moment)));
    assert!(error.contains("incomplete"), "{error}");
    let error = refuse(&|s| {
        drop(
            s.tensors
                .insert("other.moment_1".into(), s.tensors[moment].clone()),
        )
    });
    assert!(
        error.contains("`other.moment_1` belongs to no parameter"),
        "{error}"
    );
    let error = refuse(&|s| {
        drop(
            s.tensors
                .insert(format!("{moment}x"), s.tensors[moment].clone()),
        )
    });
    assert!(
        error.contains("is not part of this optimizer's state"),
        "{error}"
    );
    let error = refuse(&|s| s.tensors.get_mut(moment).expect("there").shape = vec![8, 3]);
    assert!(error.contains("has shape [8, 3]"), "{error}");
    let error = refuse(&|s| {
        s.tensors.get_mut(moment).expect("there").bytes[..4]
            .copy_from_slice(&f32::NAN.to_le_bytes())
    });
    assert!(error.contains("not finite"), "{error}");
    let error = refuse(&|s| s.scalars = OptimizerScalars::default());
    assert!(error.contains("has no stored state"), "{error}");
}

#[test]
fn an_unedited_burn_model_trains_through_the_dense_path() {
    use burn::nn::transformer::{TransformerEncoderConfig, TransformerEncoderInput};
    let device = Device::flex();
    let model = TransformerEncoderConfig::new(16, 32, 2, 1)
        .with_dropout(0.0)
        .init(&device.clone().autodiff());
    let config = LoraConfig {
        target_modules: Targets::List(vec!["query".into(), "value".into()]),
        ..config()
    };
    let model = Plan::new(&model, config.clone().fresh(5))
        .expect("fits")
        .apply(model)
        .expect("attached");
    let x = Tensor::<2>::reshape(input(12, 16, &device), [2, 6, 16]).autodiff();
    let loss = |model: &burn::nn::transformer::TransformerEncoder| {
        (model.forward(TransformerEncoderInput::new(x.clone())) - x.clone())
            .square()
            .mean()
    };
    let (mut model, mut optimizer) = (model, PathOptimizer::new(AdamWConfig::new().build()));
    let mut losses = Vec::new();
    for _ in 0..5 {
        let now = loss(&model);
        losses.push(now.clone().into_scalar::<f32>());
        let mut gradients = Gradients::default();
        gradients.take("", &model, &mut now.backward());
        optimizer
            .step(1e-2, &mut model, gradients)
            .expect("complete gradients");
    }
    assert!(losses[4] < losses[0], "{losses:?}");
}
