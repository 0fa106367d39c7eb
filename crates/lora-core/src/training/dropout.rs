//! Dropout on the adapter's input, as a function of (seed, step, layer).
//!
//! A training step enters a [`DropoutScope`]; inside it, [`linear`](crate::linear) draws each layer's mask from the stream
//! named by the layer, so that the forward pass, its recomputation and a resumed run use the same mask. Outside a scope
//! there is no dropout.

use std::cell::RefCell;

use burn::tensor::{Tensor, TensorData};
#[cfg(feature = "flex")]
use rayon::prelude::*;

use crate::error::LoraError;
use crate::random::Stream;

/// Elements of a mask that are drawn at a time.
const PART: usize = 1 << 16;

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
    let shape = x.dims();
    let count = shape.iter().product();
    let values = values(p, count, || Stream::new(seed, "dropout", micro_step, layer));
    Some(Tensor::from_data(
        TensorData::new(values, shape),
        &x.device(),
    ))
}

/// `count` elements of a mask, of the bits of `stream` one after the other; threads share them in parts.
fn values(p: f64, count: usize, stream: impl Fn() -> Stream + Sync) -> Vec<f32> {
    let threshold = (p * 2f64.powi(32)) as u32;
    let kept = (1.0 / (1.0 - p)) as f32;
    let mut values = vec![0f32; count];
    let fill = |(index, part): (usize, &mut [f32])| {
        let mut stream = stream().from_bits((index * PART) as u64);
        for value in part {
            *value = if stream.bits() < threshold { 0.0 } else { kept };
        }
    };
    #[cfg(feature = "flex")]
    values.par_chunks_mut(PART).enumerate().for_each(fill);
    #[cfg(not(feature = "flex"))]
    values.chunks_mut(PART).enumerate().for_each(fill);
    values
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_is_the_bits_of_its_stream_in_order() {
        let stream = || Stream::new(7, "dropout", 3, 11);
        for count in [0, 1, PART - 1, PART, 2 * PART + 5] {
            let mut all = stream();
            let expected: Vec<f32> = (0..count)
                .map(|_| match f64::from(all.bits()) < 0.25 * 2f64.powi(32) {
                    true => 0.0,
                    false => 4.0 / 3.0,
                })
                .collect();
            assert!(values(0.25, count, stream) == expected, "{count}");
        }
    }

    /// `cargo test --release -p lora-core --features flex -- --ignored --nocapture how_long`
    #[test]
    #[ignore = "a measurement"]
    fn how_long_a_mask_takes() {
        let count = 4608 * 3072;
        let begin = std::time::Instant::now();
        let values = values(0.1, count, || Stream::new(7, "dropout", 3, 11));
        let seconds = begin.elapsed().as_secs_f64();
        assert_eq!(values.len(), count);
        println!(
            "{count} elements in {seconds:.3} s: {:.0} million a second",
            count as f64 / seconds / 1e6
        );
    }
}
