//! The pictures beside the prompt that cases of the kinds `pipeline` and `train` may have.

use anyhow::{Context, bail};
use burn::tensor::{Device, Tensor, TensorData};
use flux_model::family::{Condition, Family};
use lora_core::files::host::HostTensor;
use lora_core::state::host_tensor;

use super::case::{Case, Tensors};

/// Of a `pipeline` case: `reference_K`, or `image` and `mask`, in pixels; one picture for all rows of the batch. Also what
/// the network gets of them, under the names of the case, and the grids of the references.
pub(super) fn of_pipeline<F: Family>(
    case: &Case,
    family: &F,
    batch: usize,
    device: &Device,
    out: &mut Tensors,
) -> anyhow::Result<(Condition, Vec<[usize; 2]>)> {
    let mut condition = Condition::default();
    if !case.has_input("reference_0") && !case.has_input("mask") {
        return Ok((condition, Vec::new()));
    }
    let autoencoder = family.autoencoder(device)?;
    let latents = |image: Tensor<4>| -> anyhow::Result<Tensor<4>> {
        let parts = F::encode_image(&autoencoder, image);
        let shape = <[usize; 4]>::try_from(parts[0].shape.clone());
        let shape = shape.ok().context("latents have not four axes")?;
        let values = family.clean_latents(&parts);
        Ok(Tensor::from_data(TensorData::new(values, shape), device))
    };
    let rows = |tokens: Tensor<3>| tokens.repeat_dim(0, batch);
    let mut tokens = Vec::new();
    for index in 0.. {
        let name = format!("reference_{index}");
        if !case.has_input(&name) {
            break;
        }
        let latents = latents(case.tensor(&name, device)?)?;
        let [_, _, height, width] = latents.dims();
        let packed = F::pack(latents);
        tokens.push(packed.clone());
        condition.references.push((rows(packed), [height, width]));
    }
    if !tokens.is_empty() {
        let tokens = host_tensor(Tensor::cat(tokens, 1));
        out.insert("reference_latents_packed".into(), tokens);
    }
    if case.has_input("mask") {
        let image: Tensor<4> = case.tensor("image", device)?;
        let mask: Tensor<4> = case.tensor("mask", device)?;
        let masked = latents(image * (-mask.clone() + 1.0))?;
        let channels = F::pack(masked.clone()).dims()[2];
        let both = F::fill_channels(masked, mask);
        let of_mask = both.dims()[2] - channels;
        let masked = both.clone().narrow(2, 0, channels);
        out.insert("masked_latents_packed".into(), host_tensor(masked));
        let mask = both.clone().narrow(2, channels, of_mask);
        out.insert("mask_packed".into(), host_tensor(mask));
        condition.channels = Some(rows(both));
    }
    let grids = condition.references.iter().map(|(_, grid)| *grid);
    let grids = grids.collect();
    Ok((condition, grids))
}

/// Names of the inputs of a `train` case that are pictures: `reference_latents_K`, or `masked_latents` and `mask`.
pub(super) fn names(case: &Case) -> Vec<String> {
    let references = (0..).map(|index| format!("reference_latents_{index}"));
    let references = references.take_while(|name| case.has_input(name));
    let masked = ["masked_latents", "mask"].map(String::from);
    let masked = masked.into_iter().filter(|name| case.has_input(name));
    references.chain(masked).collect()
}

/// Those of one micro-batch; `row` gives its part of an input.
pub(super) fn of_micro_batch<F: Family>(
    names: &[String],
    row: impl Fn(&str) -> anyhow::Result<HostTensor>,
    device: &Device,
) -> anyhow::Result<Condition> {
    let tensor = |name: &str| -> anyhow::Result<Tensor<4>> {
        let row = row(name)?;
        if row.shape.len() != 4 {
            bail!("input `{name}` is not [micro, batch, channels, height, width]");
        }
        Ok(Tensor::from_data(
            TensorData::new(row.to_f32(), row.shape),
            device,
        ))
    };
    let mut condition = Condition::default();
    for name in names.iter().filter(|name| name.starts_with("reference")) {
        let latents = tensor(name)?;
        let [_, _, height, width] = latents.dims();
        condition
            .references
            .push((F::pack(latents), [height, width]));
    }
    if names.iter().any(|name| name == "mask") {
        let channels = F::fill_channels(tensor("masked_latents")?, tensor("mask")?);
        condition.channels = Some(channels);
    }
    Ok(condition)
}
