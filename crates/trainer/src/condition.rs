//! Encoded pictures beside samples, as the network reads them.

use anyhow::{Context, bail, ensure};
use burn::tensor::{Device, Tensor, TensorData};
use flux_model::family::{Condition, Family, ReadsReferences};
use lora_core::files::host::HostTensor;
use tracing::warn;

use crate::data::cache::Beside;

/// What the rows of a batch have beside them; all have as many references, the first ones of one size, and so on.
///
/// # Errors
/// Rows that differ in this, or tensors of another shape than an encoder gives.
pub fn condition<F: Family>(
    family: &F,
    rows: &[Beside],
    device: &Device,
) -> anyhow::Result<Condition> {
    let Some(first) = rows.first() else {
        return Ok(Condition::default());
    };
    let latents = |parts: &[&[HostTensor]]| -> anyhow::Result<Tensor<4>> {
        let values = parts.iter().map(|parts| family.clean_latents(parts));
        batch(&parts[0][0], values.collect(), device)
    };
    let mut references = Vec::new();
    for index in 0..first.references.len() {
        let parts = rows.iter().map(|row| row.references.get(index));
        let parts: Option<Vec<&[HostTensor]>> = parts.map(|it| it.map(Vec::as_slice)).collect();
        let latents = latents(&parts.context("a sample has fewer references than another")?)?;
        let [_, _, height, width] = latents.dims();
        references.push((F::pack(latents), [height, width]));
    }
    let mut masked = Vec::new();
    let mut masks = Vec::new();
    for parts in rows.iter().filter_map(|row| row.masked.as_ref()) {
        let (mask, parts) = parts.split_last().context("a masked image has no mask")?;
        masked.push(parts);
        masks.push(mask);
    }
    ensure!(
        masks.is_empty() || masks.len() == rows.len(),
        "a sample has no mask"
    );
    let channels = match masks.first() {
        None => None,
        Some(mask) => {
            let values = masks.iter().map(|mask| mask.to_f32()).collect();
            Some(F::fill_channels(
                latents(&masked)?,
                batch(mask, values, device)?,
            ))
        }
    };
    Ok(Condition {
        references,
        channels,
    })
}

/// What a user gives beside prompts, and what they call it.
#[derive(Debug, Clone, Copy)]
pub struct Pictures {
    /// The name of the references, if there are any.
    pub references: Option<&'static str>,
    /// Whether there are masks.
    pub mask: bool,
    /// Where masks are, or are to be, given.
    pub mask_name: &'static str,
}

impl Pictures {
    /// Refuses what the network cannot read, and warns of what it was not trained to read; `network` may be an outline.
    ///
    /// # Errors
    /// Masks for a network that reads none or none for one that does, references for one that reads a mask.
    pub fn check<F: Family>(self, family: &F, network: &F::Network) -> anyhow::Result<()> {
        let root = family.folder().root().display();
        match (family.reads_mask(network), self.mask) {
            (true, false) => bail!(
                "{root} paints where a mask says (FLUX.1 Fill), and none is given: give {}",
                self.mask_name
            ),
            (false, true) => bail!(
                "{root} reads no mask: leave {} out, or take FLUX.1 Fill",
                self.mask_name
            ),
            _ => {}
        }
        let Some(name) = self.references else {
            return Ok(());
        };
        if family.reads_mask(network) {
            bail!("{root} paints where a mask says, and reads no {name}");
        }
        match family.reads_references() {
            ReadsReferences::BehindNoise => {}
            ReadsReferences::NotTrained => warn!(
                "{root} is a {}, which was not trained to read {name} as they are put here, behind the noisy tokens (FLUX.2 and FLUX.1 Kontext are)",
                family.folder().class()
            ),
            ReadsReferences::OtherWay(why) => bail!("{root} {why}: leave {name} out"),
        }
        Ok(())
    }
}

/// Rows of the shape of `like`, `[1, channels, height, width]`, one behind the other.
fn batch(like: &HostTensor, rows: Vec<Vec<f32>>, device: &Device) -> anyhow::Result<Tensor<4>> {
    let shape = <[usize; 4]>::try_from(like.shape.clone());
    let [_, channels, height, width] = shape
        .ok()
        .context("an encoded picture is not [1, channels, height, width]")?;
    let shape = [rows.len(), channels, height, width];
    let values = rows.concat();
    ensure!(
        values.len() == shape.iter().product::<usize>(),
        "encoded pictures of a batch differ in size"
    );
    Ok(Tensor::from_data(TensorData::new(values, shape), device))
}
