//! What must hold of weights in few bits inside a model: all that holds of the dense weights they stand for.

use std::collections::BTreeMap;
use std::sync::Arc;

use burn::module::Module;
use burn::optim::AdamWConfig;
use burn::tensor::Device;

use crate::edit::delete_adapter;
use crate::files::quantised::Quantised;
use crate::frozen::{held, hold, release};
use crate::peft::{InitLoraWeights, Targets};
use crate::state::{adapter_state, count_parameters};
use crate::test_model::{Mlp, distance, input, values};
use crate::training::Gradients;
use crate::*;

const WIDTH: usize = 48;

/// The test model, its weights in few bits.
fn quantised(device: &Device) -> Mlp {
    let model = Mlp::new(WIDTH, device);
    let of = |weight: &burn::module::Param<burn::tensor::Tensor<2>>| {
        let turned = weight.val().transpose();
        (turned.dims(), values(turned.inner()))
    };
    let (up, down) = (of(&model.up.weight), of(&model.down.weight));
    let weights = BTreeMap::from([
        ("up.weight".into(), Arc::new(Quantised::nf4(up.0, &up.1))),
        (
            "down.weight".into(),
            Arc::new(Quantised::int8(down.0, &down.1)),
        ),
    ]);
    hold(model, weights).expect("they fit")
}

fn config(init_lora_weights: InitLoraWeights, use_dora: bool) -> LoraConfig {
    LoraConfig {
        r: 3,
        lora_alpha: 5.0,
        use_dora,
        target_modules: Targets::Pattern("all-linear".into()),
        init_lora_weights,
        ..LoraConfig::default()
    }
}

/// Output and gradients by path.
fn computed(model: &Mlp, fast: bool, device: &Device) -> (Vec<f32>, Vec<f32>) {
    let x = input(7, WIDTH, device).autodiff();
    let y = if fast { model.fast(x) } else { model.dense(x) };
    let mut found = y.clone().square().sum().backward();
    let mut gradients = Gradients::default();
    gradients.take("", model, &mut found);
    let all = gradients
        .iter()
        .flat_map(|(_, gradient)| values(gradient.clone()));
    (values(y.inner()), all.collect())
}

#[test]
fn adapters_of_every_start_compute_what_they_do_on_the_decoded_weights() {
    let device = Device::flex();
    for (init, use_dora) in [
        (InitLoraWeights::Random, false),
        (InitLoraWeights::Random, true),
        (InitLoraWeights::Pissa, false),
        (InitLoraWeights::Olora, false),
    ] {
        let base = quantised(&device.clone().autodiff());
        let dense = release(base.clone(), |_| true);
        assert_eq!((held(&base).len(), held(&dense).len()), (2, 0));
        let attached =
            |model| attach(model, config(init, use_dora).fresh(1).fast()).expect("valid");
        let (base, dense) = (attached(base), attached(dense));
        assert_eq!(held(&base).len(), 2);
        assert_eq!(adapter_state(&base), adapter_state(&dense), "{init:?}");
        let (count, expected) = (count_parameters(&base), count_parameters(&dense));
        assert_eq!(
            (count.total, count.trainable),
            (expected.total, expected.trainable)
        );
        for fast in [true, false] {
            let (y, gradients) = computed(&base, fast, &device);
            let (expected_y, expected) = computed(&dense, fast, &device);
            assert!(distance(&y, &expected_y) < 1e-6, "{init:?} {fast}");
            assert!(!expected.is_empty());
            assert!(distance(&gradients, &expected) < 2e-6, "{init:?} {fast}");
        }
    }
}

#[test]
fn training_leaves_them_in_few_bits_and_unchanged() {
    let device = Device::flex();
    let base = quantised(&device.clone().autodiff());
    let before = held(&base);
    let mut model =
        attach(base, config(InitLoraWeights::Random, false).fresh(1).fast()).expect("valid");
    let state = adapter_state(&model);
    let x = input(5, WIDTH, &device).autodiff();
    let mut found = model.fast(x).square().sum().backward();
    let mut gradients = Gradients::default();
    gradients.take("", &model, &mut found);
    PathOptimizer::new(AdamWConfig::new().build())
        .step(1e-2, &mut model, gradients)
        .expect("every parameter has its gradient");
    for (path, tensor) in adapter_state(&model) {
        assert_ne!(tensor, state[&path], "{path}");
    }
    let model = model.valid();
    assert_eq!(held(&model), before);
    assert!(values(model.up.weight.base()).iter().all(|v| v.is_nan()));
    let bytes: usize = before.values().map(|weight| weight.bytes()).sum();
    assert!(
        bytes * 2 < 4 * count_parameters(&model).total / 2,
        "{bytes}"
    );
}

#[test]
fn they_are_detached_from_but_not_merged_into() {
    let device = Device::flex();
    let base = quantised(&device.clone().autodiff());
    let x = || input(5, WIDTH, &device.clone().autodiff());
    let y = values(base.fast(x()));
    let model = attach(
        base.clone(),
        config(InitLoraWeights::Random, false).fresh(1).fast(),
    )
    .expect("valid");
    let adapted = values(model.fast(x()));
    assert_ne!(adapted, y);
    for bare in [
        detach(model.clone()),
        delete_adapter(model.clone(), "default").expect("attached"),
        merge(base).expect("nothing to merge"),
    ] {
        assert_eq!(values(bare.fast(x())), y);
        assert_eq!(held(&bare).len(), 2);
    }
    let refused = merge(model.clone()).expect_err("in few bits").to_string();
    assert!(refused.contains("is held in few bits"), "{refused}");
    let merged = merge(release(model, |_| true)).expect("dense");
    assert!(distance(&values(merged.fast(x())), &adapted) < 1e-6);
}

#[test]
fn what_does_not_fit_is_refused() {
    let model = || Mlp::new(WIDTH, &Device::flex());
    let weight = |shape: [usize; 2]| {
        let values = vec![0.5; shape[0] * shape[1]];
        Arc::new(Quantised::int8(shape, &values))
    };
    for (path, shape) in [
        ("up.weight", [WIDTH, 2 * WIDTH]),
        ("up.bias", [2 * WIDTH, 1]),
        ("left.weight", [2 * WIDTH, WIDTH]),
    ] {
        let refused = hold(model(), BTreeMap::from([(path.into(), weight(shape))]));
        let message = refused.expect_err("refused").to_string();
        assert!(
            message.contains(&format!("`{path}` cannot be held")),
            "{message}"
        );
    }
}

/// Of this process, in bytes.
#[cfg(target_os = "linux")]
fn resident_memory() -> usize {
    let pages = std::fs::read_to_string("/proc/self/statm").expect("Linux has it");
    let pages = pages.split_whitespace().nth(1).expect("the second number");
    4096 * pages.parse::<usize>().expect("a number")
}

#[cfg(target_os = "linux")]
#[test]
fn a_weight_in_few_bits_takes_no_more_memory_than_its_bits() {
    const WIDTH: usize = 4096;
    let device = Device::default();
    let layer = || burn::nn::LinearConfig::new(WIDTH, WIDTH).init(&device);
    let model: Vec<burn::nn::Linear> = (0..8).map(|_| layer()).collect();
    let weight = Arc::new(Quantised::nf4([WIDTH, WIDTH], &vec![0.0; WIDTH * WIDTH]));
    let weights = (0..8).map(|index| (format!("{index}.weight"), weight.clone()));
    let before = resident_memory();
    let model = hold(model, weights.collect()).expect("they fit");
    let model =
        attach(model, config(InitLoraWeights::default(), false).fresh(1)).expect("linear layers");
    let grown = resident_memory().saturating_sub(before);
    assert_eq!(held(&model).len(), 8);
    let dense = 8 * 4 * WIDTH * WIDTH;
    assert!(
        grown < dense / 4,
        "{grown} bytes for weights that are {dense} when dense"
    );
}
