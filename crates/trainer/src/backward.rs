//! Loss and gradients of one micro-batch, with per-block recompute of some blocks, of all or of none; the bits are the same.

use burn::tensor::{Tensor, TensorData};
use flux_model::WeightsError;
use flux_model::family::Velocity;
use flux_model::layers::packed;
use lora_core::Gradients;
use lora_core::state::trainable_parameters;
use lora_core::training::recompute::{Chain, Recomputed, TensorTree};

use crate::loss::Penalty;

/// One micro-batch.
#[derive(Debug, Clone)]
pub struct MicroBatch<I> {
    /// What the network sees.
    pub input: I,
    /// What it should say, `[batch, img_tokens, out_channels]`.
    pub target: Tensor<3>,
    /// Weight of each sample's loss.
    pub weights: Vec<f32>,
    /// How an error counts in it.
    pub penalty: Penalty,
}

/// Weighted mean error, and its gradients scaled by `1 / accumulation`.
///
/// `model` and `batch` are on an autodiff device.
///
/// # Errors
/// A block that cannot be read.
pub fn loss_and_gradients<N: Velocity>(
    model: &N,
    batch: MicroBatch<N::Input>,
    accumulation: usize,
    recomputed: Recomputed,
) -> Result<(f32, Gradients), WeightsError> {
    match recomputed.blocks.min(model.count()) {
        0 => at_once(model, batch, accumulation),
        _ => by_blocks(model, batch, accumulation, recomputed),
    }
}

/// The loss alone, of a model and a batch without autodiff.
///
/// # Errors
/// A block that cannot be read.
pub fn loss_of<N: Velocity>(model: &N, batch: MicroBatch<N::Input>) -> Result<f32, WeightsError> {
    let velocity = model.forward(batch.input)?;
    Ok(loss(velocity, batch.target, &batch.weights, batch.penalty).into_scalar())
}

/// Mean over the batch of the weighted error of each sample.
fn loss(velocity: Tensor<3>, target: Tensor<3>, weights: &[f32], penalty: Penalty) -> Tensor<1> {
    let [batch, tokens, channels] = target.dims();
    let weights = Tensor::<3>::from_data(
        TensorData::new(weights.to_vec(), [batch, 1, 1]),
        &target.device(),
    );
    let errors = penalty.of_all(velocity - packed(target)) * weights;
    errors.reshape([batch * tokens * channels]).mean()
}

fn at_once<N: Velocity>(
    model: &N,
    batch: MicroBatch<N::Input>,
    accumulation: usize,
) -> Result<(f32, Gradients), WeightsError> {
    let velocity = model.forward(batch.input)?;
    let loss = loss(velocity, batch.target, &batch.weights, batch.penalty);
    let value = loss.clone().into_scalar();
    let mut found = (loss / accumulation as f64).backward();
    let mut gradients = Gradients::default();
    gradients.take("", model, &mut found);
    Ok((value, gradients))
}

fn by_blocks<N: Velocity>(
    model: &N,
    batch: MicroBatch<N::Input>,
    accumulation: usize,
    recomputed: Recomputed,
) -> Result<(f32, Gradients), WeightsError> {
    let (entered, shared) = model.enter(batch.input)?;
    let plain = shared.clone().inner();
    let (chain, last) = Chain::run(model, recomputed, entered.clone().inner(), plain.clone())?;

    let mut gradients = Gradients::default();
    let enters = trains_outside_blocks(model);
    let carry = last.leaf();
    let shared_input = if enters { plain.leaf() } else { plain.lift() };
    let mut kept = carry.clone();
    for index in recomputed.blocks..model.count() {
        kept = N::apply(&model.block(index)?, kept, &shared_input);
    }
    let velocity = model.leave(kept, &shared_input);
    let loss = loss(velocity, batch.target, &batch.weights, batch.penalty);
    let value = loss.clone().into_scalar();
    let mut found = (loss / accumulation as f64).backward();
    let carry_gradient = carry.take_gradient(&mut found);
    let shared_gradient = enters.then(|| shared_input.take_gradient(&mut found));
    gradients.take("", model, &mut found);
    drop((carry, shared_input, found));

    let upstream = chain.backward(carry_gradient, shared_gradient, &mut gradients)?;
    if let Some(upstream) = upstream
        && let Some(dot) = (entered, shared).dot(upstream.lift())
        && dot.is_tracked()
    {
        gradients.take("", model, &mut dot.backward());
    }
    Ok((value, gradients))
}

/// Whether anything is trained that is in no block: it may be used before the first one.
fn trains_outside_blocks<N: Velocity>(model: &N) -> bool {
    let blocks: Vec<String> = (0..model.count())
        .map(|i| format!("{}.", model.path(i)))
        .collect();
    let trained = trainable_parameters(model);
    let mut paths = trained.keys();
    paths.any(|path| !blocks.iter().any(|block| path.starts_with(block)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device;
    use crate::loss::loss_of_zero;

    #[test]
    fn the_loss_of_zero_is_the_loss_of_a_network_that_predicts_it() {
        let target: Vec<f32> = (0..24).map(|i| (i as f32 * 0.7).sin() * 3.0).collect();
        let weights = [0.5, 2.0];
        let device = device::open(device::default_name()).expect("the default device");
        let data = TensorData::new(target.clone(), [2, 3, 4]);
        let tensor = Tensor::from_data(data, &device.device);
        for penalty in [Penalty::Square, Penalty::Size, Penalty::Huber { c: 0.1 }] {
            let found = loss(tensor.zeros_like(), tensor.clone(), &weights, penalty);
            let found = f64::from(found.into_scalar::<f32>());
            let expected = loss_of_zero(&target, &weights, penalty);
            assert!((found - expected).abs() < 1e-6 * expected, "{penalty:?}");
        }
    }
}
