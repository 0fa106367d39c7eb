//! Loss and gradients of one micro-batch, with per-block recompute or without; the bits are the same.

use burn::module::Module;
use burn::tensor::{Tensor, TensorData};
use flux_model::flux1::transformer::{
    Conditioning, DoubleStreamBlock, FluxInput, FluxTransformer, SingleStreamBlock, join,
};
use flux_model::layers::{RotaryTable, packed};
use lora_core::training::recompute::{Chain, Constant, TensorTree};
use lora_core::{Gradients, trainable_parameters};

/// One micro-batch, off the autodiff device.
#[derive(Debug, Clone)]
pub struct MicroBatch {
    /// What the network sees.
    pub input: FluxInput,
    /// What it should say, `[batch, img_tokens, out_channels]`.
    pub target: Tensor<3>,
    /// Weight of each sample's loss.
    pub weights: Vec<f32>,
}

/// Conditioning as blocks share it: the vector gets a gradient, the rotary table does not.
type Shared = (Tensor<2>, Constant<(Tensor<2>, Tensor<2>)>);

fn conditioning(shared: &Shared) -> Conditioning {
    let (temb, Constant((cos, sin))) = shared.clone();
    Conditioning {
        temb,
        rotary: RotaryTable { cos, sin },
    }
}

/// Weighted mean squared error, and its gradients scaled by `1 / accumulation`.
///
/// `model` is on an autodiff device. With `recompute` only each block's input is kept.
pub fn loss_and_gradients(
    model: &FluxTransformer,
    batch: MicroBatch,
    accumulation: usize,
    recompute: bool,
) -> (f32, Gradients) {
    if recompute {
        by_blocks(model, batch, accumulation)
    } else {
        at_once(model, batch, accumulation)
    }
}

/// The loss alone, of a model without autodiff.
pub fn loss_of(model: &FluxTransformer, batch: MicroBatch) -> f32 {
    loss(model.forward(batch.input), batch.target, &batch.weights).into_scalar()
}

/// Mean over the batch of the weighted squared error of each sample.
fn loss(velocity: Tensor<3>, target: Tensor<3>, weights: &[f32]) -> Tensor<1> {
    let [batch, tokens, channels] = target.dims();
    let weights = Tensor::<3>::from_data(
        TensorData::new(weights.to_vec(), [batch, 1, 1]),
        &target.device(),
    );
    let squares = (velocity - packed(target)).square() * weights;
    squares.reshape([batch * tokens * channels]).mean()
}

fn at_once(model: &FluxTransformer, batch: MicroBatch, accumulation: usize) -> (f32, Gradients) {
    let input = FluxInput {
        img: batch.input.img.autodiff(),
        txt: batch.input.txt.autodiff(),
        pooled: batch.input.pooled.autodiff(),
        ..batch.input
    };
    let loss = loss(
        model.forward(input),
        batch.target.autodiff(),
        &batch.weights,
    );
    let value = loss.clone().into_scalar();
    let mut found = (loss / accumulation as f64).backward();
    let mut gradients = Gradients::default();
    gradients.take("", model, &mut found);
    (value, gradients)
}

fn by_blocks(model: &FluxTransformer, batch: MicroBatch, accumulation: usize) -> (f32, Gradients) {
    let MicroBatch {
        input,
        target,
        weights,
    } = batch;
    let txt_tokens = input.txt.dims()[1];
    let input = FluxInput {
        img: input.img.autodiff(),
        txt: input.txt.autodiff(),
        pooled: input.pooled.autodiff(),
        ..input
    };
    let rotary = model.rotary(&input);
    let stem_temb = model.condition(&input);
    let (stem_img, stem_txt) = model.embed(input.img, input.txt);

    let shared: Shared = (
        stem_temb.clone().inner(),
        Constant((rotary.cos.inner(), rotary.sin.inner())),
    );
    let (double, (img, txt)) = Chain::run(
        &model.transformer_blocks,
        (stem_img.clone().inner(), stem_txt.clone().inner()),
        shared.clone(),
        |block: &DoubleStreamBlock, (img, txt), shared: &Shared| {
            block.forward(img, txt, &conditioning(shared))
        },
    );
    let (single, hidden) = Chain::run(
        &model.single_transformer_blocks,
        join(txt, img),
        shared.clone(),
        |block: &SingleStreamBlock, hidden, shared: &Shared| {
            block.forward(hidden, &conditioning(shared))
        },
    );

    let mut gradients = Gradients::default();
    let (hidden, temb) = (hidden.leaf(), shared.0.leaf());
    let loss = loss(
        model.finish(hidden.clone(), txt_tokens, &temb),
        target.autodiff(),
        &weights,
    );
    let value = loss.clone().into_scalar();
    let mut found = (loss / accumulation as f64).backward();
    let (hidden_gradient, mut temb_gradient) = (
        hidden.take_gradient(&mut found),
        temb.take_gradient(&mut found),
    );
    gradients.take("", model, &mut found);
    drop((hidden, temb, found));

    let from_single = single.backward("single_transformer_blocks", hidden_gradient, &mut gradients);
    let tokens = from_single.input.dims()[1];
    let txt_gradient = from_single.input.clone().narrow(1, 0, txt_tokens);
    let img_gradient = from_single.input.narrow(1, txt_tokens, tokens - txt_tokens);
    let from_double = double.backward(
        "transformer_blocks",
        (img_gradient, txt_gradient),
        &mut gradients,
    );
    for (from_blocks, _) in [from_single.shared, from_double.shared]
        .into_iter()
        .flatten()
    {
        temb_gradient = temb_gradient + from_blocks;
    }

    if stem_is_trainable(model) {
        let (img_gradient, txt_gradient) = from_double.input;
        let stem = ((stem_img, stem_txt), stem_temb);
        let upstream = ((img_gradient, txt_gradient), temb_gradient).lift();
        if let Some(dot) = stem.dot(upstream) {
            gradients.take("", model, &mut dot.backward());
        }
    }
    (value, gradients)
}

/// Whether an embedding layer, before the blocks, is trained.
fn stem_is_trainable<M: Module>(model: &M) -> bool {
    trainable_parameters(model).keys().any(|path| {
        ["x_embedder.", "context_embedder.", "time_text_embed."]
            .iter()
            .any(|stem| path.starts_with(stem))
    })
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
        let found = loss(tensor.zeros_like(), tensor, &weights).into_scalar::<f32>();
        let expected = loss_of_zero(&target, &weights);
        assert!((f64::from(found) - expected).abs() < 1e-6 * expected);
    }
}
