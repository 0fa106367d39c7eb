//! Dropout on the adapter's input, as a function of (seed, step, layer).
//!
//! A training step enters a [`DropoutScope`]; inside it, [`linear`](crate::linear) draws each layer's mask from the stream
//! named by the layer, so that the forward pass, its recomputation and a resumed run use the same mask. Outside a scope
//! there is no dropout.

use std::cell::RefCell;

use burn::tensor::{Tensor, TensorData};

use crate::error::LoraError;
use crate::random::Stream;

thread_local! {
    static SCOPE: RefCell<Option<Active>> = const { RefCell::new(None) };
}

struct Active {
    seed: u64,
    micro_step: u64,
    dense: Option<String>,
}

/// While it lives, adapters with dropout drop, on this thread.
#[must_use = "dropout is on only while the scope lives; end it with `finish`"]
pub struct DropoutScope(());

impl DropoutScope {
    /// Starts the scope of one forward and backward pass. `micro_step` counts micro-batches over the whole run.
    pub fn enter(seed: u64, micro_step: u64) -> Self {
        SCOPE.with(|scope| {
            *scope.borrow_mut() = Some(Active {
                seed,
                micro_step,
                dense: None,
            })
        });
        Self(())
    }

    /// Ends the scope.
    ///
    /// # Errors
    /// An adapter with dropout was computed through `Param::val()`, where dropout on the input cannot exist.
    pub fn finish(self) -> Result<(), LoraError> {
        match SCOPE
            .with(|scope| scope.borrow_mut().take())
            .and_then(|active| active.dense)
        {
            Some(adapter) => Err(LoraError::Config(format!(
                "adapter `{adapter}` has dropout, but the model computes a layer without `lora_core::linear`: set `lora_dropout` to 0"
            ))),
            None => Ok(()),
        }
    }
}

impl Drop for DropoutScope {
    fn drop(&mut self) {
        SCOPE.with(|scope| *scope.borrow_mut() = None);
    }
}

/// Zero with probability `p`, else `1 / (1 - p)`; `None` where nothing is dropped.
pub(crate) fn mask<const D: usize>(p: f64, layer: u64, x: &Tensor<D>) -> Option<Tensor<D>> {
    if p == 0.0 {
        return None;
    }
    let (seed, micro_step) = SCOPE.with(|scope| {
        scope
            .borrow()
            .as_ref()
            .map(|active| (active.seed, active.micro_step))
    })?;
    let mut stream = Stream::new(seed, "dropout", micro_step, layer);
    let shape = x.dims();
    let threshold = (p * 2f64.powi(32)) as u32;
    let kept = (1.0 / (1.0 - p)) as f32;
    let values: Vec<f32> = (0..shape.iter().product::<usize>())
        .map(|_| if stream.bits() < threshold { 0.0 } else { kept })
        .collect();
    Some(Tensor::from_data(
        TensorData::new(values, shape),
        &x.device(),
    ))
}

/// Remembers that a dense weight was built for an adapter with dropout.
pub(crate) fn note_dense_path(p: f64, adapter: &str) {
    if p > 0.0 {
        SCOPE.with(|scope| {
            if let Some(active) = scope.borrow_mut().as_mut() {
                active.dense.get_or_insert_with(|| adapter.into());
            }
        });
    }
}
