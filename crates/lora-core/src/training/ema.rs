//! A moving average of what is trained, to be used in its place.
//!
//! Source: diffusers 0.38 `training_utils.py` (`EMAModel.get_decay`): the decay rises with the steps, so that the average forgets
//! where it began.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::tensor::Tensor;

use crate::state::with_values;
use crate::walk::walk;

/// A moving average of every trainable parameter of a model, by path.
#[derive(Debug, Clone)]
pub struct Ema {
    decay: f64,
    averages: BTreeMap<String, Tensor<1>>,
}

impl Ema {
    /// Averages that are what `model` holds: of a run that begins, or of what [`applied`](Self::applied) gave and was stored.
    pub fn new<M: Module>(model: &M, decay: f64) -> Self {
        let mut averages = BTreeMap::new();
        walk(model, |found| {
            if found.param().is_trainable() {
                averages.insert(found.path(), found.param().values().0.inner());
            }
        });
        Self { decay, averages }
    }

    /// Moves the averages towards `model`, after step `step` of it, counted from 1.
    pub fn update<M: Module>(&mut self, model: &M, step: u64) {
        let before = step.saturating_sub(1) as f64;
        let decay = match before {
            0.0 => 0.0,
            before => self.decay.min((1.0 + before) / (10.0 + before)),
        };
        walk(model, |found| {
            if let Some(average) = self.averages.get_mut(&found.path()) {
                let way = average.clone() - found.param().values().0.inner();
                *average = average.clone() - way * (1.0 - decay);
            }
        });
    }

    /// `model` with the averages in place of what is trained.
    pub fn applied<M: Module>(&self, model: &M) -> M {
        with_values(model, |path, _| self.averages.get(path).cloned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{adapter_state, trainable_parameters};
    use crate::tests_attach::{adapted, gradients};
    use crate::{PathOptimizer, training::optimizers::OptimizerConfig};

    /// diffusers' `EMAModel(decay=0.25)` by hand: decays 0, 2/11, 3/12 and, from the bound on, 0.25.
    #[test]
    fn the_average_follows_with_a_decay_that_rises() {
        let mut model = adapted();
        let mut optimizer = PathOptimizer::new(&OptimizerConfig::default());
        let path = "up.weight.adapter.default.lora_A";
        let value = |model: &_| adapter_state(model)[path].to_f64()[0];
        let mut ema = Ema::new(&model, 0.25);
        assert_eq!(value(&ema.applied(&model)), value(&model));
        let mut average = f64::NAN;
        for (step, decay) in [0.0, 2.0 / 11.0, 3.0 / 12.0, 0.25, 0.25]
            .into_iter()
            .enumerate()
        {
            let found = gradients(&model);
            optimizer.step(0.1, &mut model, found).expect("complete");
            ema.update(&model, step as u64 + 1);
            let now = value(&model);
            average = match decay {
                0.0 => now,
                decay => decay * average + (1.0 - decay) * now,
            };
            let found = value(&ema.applied(&model));
            assert!((found - average).abs() < 1e-6, "{step}: {found}, {average}");
            assert!(step == 0 || found != now);
        }
        // The model with the averages is still one to train, and averages come back from it to the bit.
        let applied = ema.applied(&model);
        assert_eq!(trainable_parameters(&applied), trainable_parameters(&model));
        let again = Ema::new(&applied, 0.25).applied(&model);
        assert_eq!(adapter_state(&again), adapter_state(&applied));
    }
}
