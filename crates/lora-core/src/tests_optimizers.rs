//! Optimizers by name: each resumes from each of its steps, and its state is checked.

use burn::tensor::Device;

use crate::files::host::{Dtype, HostTensor};
use crate::state::{adapter_state, trainable_parameters};
use crate::tests_attach::{adapted, gradients};
use crate::training::OptimizerState;
use crate::training::optimizers::{OptimizerConfig, ProdigyOptions};
use crate::*;

/// Every optimizer that has a name, with options that give it all the state it can have.
fn by_name() -> Vec<OptimizerConfig> {
    let with = |text: &str| serde_json::from_str(text).expect("an optimizer");
    vec![
        with(r#"{"name": "adamw"}"#),
        with(r#"{"name": "adamw", "amsgrad": true}"#),
        with(r#"{"name": "adamw8bit", "min_8bit_size": 0}"#),
        with(r#"{"name": "adamw8bit"}"#),
        with(r#"{"name": "adam", "weight_decay": 0.1}"#),
        with(r#"{"name": "sgd", "momentum": 0.9, "nesterov": true}"#),
        with(r#"{"name": "sgd"}"#),
        with(r#"{"name": "lion"}"#),
        with(r#"{"name": "adafactor", "eps": [null, 1e-3]}"#),
        with(r#"{"name": "prodigy", "d0": 1e-3, "slice_p": 3, "use_bias_correction": true}"#),
        with(r#"{"name": "schedule_free_adamw", "warmup_steps": 4, "r": 0.5}"#),
    ]
}

#[test]
fn every_optimizer_by_name_resumes_from_every_step() {
    for config in by_name() {
        let (mut model, mut straight) = (adapted(), PathOptimizer::new(&config));
        let mut saved = Vec::new();
        for step in 0..8 {
            saved.push((model.clone(), straight.state()));
            let found = gradients(&model);
            // The first rate of a warm-up is 0.
            let rate = f64::from(step) * 1e-2;
            straight.step(rate, &mut model, found).expect("complete");
        }
        let expected = (adapter_state(&model), straight.state());
        for (from, (mut model, state)) in saved.into_iter().enumerate().skip(1) {
            let stored = OptimizerState::from_bytes("o".as_ref(), state.to_bytes(), {
                let text = serde_json::to_string(&state.scalars).expect("JSON");
                serde_json::from_str(&text).expect("what was written")
            });
            let trainable = trainable_parameters(&model);
            let device = Device::flex();
            let stored = stored.expect("ours");
            let resumed = PathOptimizer::restore(&config, stored, &trainable, &device);
            let mut resumed = resumed.expect("complete");
            for step in from..8 {
                let found = gradients(&model);
                let rate = step as f64 * 1e-2;
                resumed.step(rate, &mut model, found).expect("complete");
            }
            let state = resumed.state();
            assert_eq!(adapter_state(&model), expected.0, "{config:?} from {from}");
            assert_eq!(state.tensors, expected.1.tensors, "{config:?} from {from}");
            assert_eq!(state.scalars, expected.1.scalars, "{config:?} from {from}");
            let average = |optimizer: &PathOptimizer| {
                let average = optimizer.averaged(&model);
                average.map(|average| adapter_state(&average))
            };
            assert_eq!(average(&resumed), average(&straight), "{config:?}");
        }
        let averages = matches!(config, OptimizerConfig::ScheduleFreeAdamw(_));
        let average = straight.averaged(&model).map(|model| adapter_state(&model));
        assert_eq!(average.is_some(), averages);
        assert_ne!(average, Some(expected.0), "an average is not the last step");
    }
}

#[test]
fn what_prodigy_shares_is_part_of_its_state() {
    let config = OptimizerConfig::Prodigy(ProdigyOptions::default());
    let (mut model, mut optimizer) = (adapted(), PathOptimizer::new(&config));
    for _ in 0..3 {
        let found = gradients(&model);
        optimizer.step(1.0, &mut model, found).expect("complete");
    }
    assert!(optimizer.found_step_size().expect("Prodigy's") > 1e-6);
    let refused = |change: &dyn Fn(&mut serde_json::Value)| {
        let state = optimizer.state();
        let mut scalars = serde_json::to_value(&state.scalars).expect("JSON");
        change(&mut scalars["values"]);
        let state = OptimizerState {
            scalars: serde_json::from_value(scalars).expect("of that form"),
            ..state
        };
        let trainable = trainable_parameters(&model);
        let restored = PathOptimizer::restore(&config, state, &trainable, &Device::flex());
        restored.expect_err("refused").to_string()
    };
    let error = refused(&|values| drop(values.as_object_mut().expect("a table").remove("d")));
    assert!(error.contains("`d` is missing"), "{error}");
    let error = refused(&|values| values["k"] = (-1).into());
    assert!(error.contains("that all parameters share"), "{error}");
}

#[test]
fn moments_of_8_bits_are_codes_of_8_bits() {
    let config = serde_json::from_str(r#"{"name": "adamw8bit", "min_8bit_size": 0}"#);
    let config: OptimizerConfig = config.expect("an optimizer");
    let (mut model, mut optimizer) = (adapted(), PathOptimizer::new(&config));
    let found = gradients(&model);
    optimizer.step(1e-2, &mut model, found).expect("complete");
    let state = optimizer.state();
    let codes = "up.weight.adapter.default.lora_A.moment_1.codes";
    assert_eq!(state.tensors[codes].dtype, Dtype::U8);
    let trainable = trainable_parameters(&model);
    let mut wrong = optimizer.state();
    let values = state.tensors[codes].to_f32();
    let values = HostTensor::from_f32(state.tensors[codes].shape.clone(), &values);
    wrong.tensors.insert(codes.into(), values);
    let restored = PathOptimizer::restore(&config, wrong, &trainable, &Device::flex());
    let error = restored.expect_err("refused").to_string();
    assert!(
        error.contains(&format!("`{codes}` is F32, not U8")),
        "{error}"
    );
}
