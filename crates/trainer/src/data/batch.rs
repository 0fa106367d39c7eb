//! The data of a micro-batch, as a function of (config, micro step): which samples, which noise, which noise levels.
//!
//! An epoch is a keyed permutation: every bucket's samples in random order, cut into batches of one size (the last of a
//! bucket may be smaller), and the batches in random order. The position in the data is the micro step alone.

use std::collections::BTreeMap;

use anyhow::Context;
use burn::tensor::{Device, Tensor, TensorData};
use flux_model::autoencoder::AutoencoderConfig;
use flux_model::flux1::latent::{image_positions, pack, text_positions};
use flux_model::flux1::transformer::FluxInput;
use flux_model::scheduler::SchedulerConfig;
use lora_core::random::Stream;

use crate::backward::MicroBatch;
use crate::config::RunConfig;
use crate::data::cache::Cache;
use crate::loss::{draw_sigma, loss_of_zero, loss_weight};

/// The order in which samples are seen.
#[derive(Debug)]
pub struct Order {
    /// Samples of each bucket.
    buckets: Vec<Vec<usize>>,
    batch_size: usize,
    seed: u64,
}

impl Order {
    /// Groups the samples of `cache` by size.
    pub fn new(cache: &Cache, batch_size: usize, seed: u64) -> Self {
        let mut buckets: BTreeMap<_, Vec<usize>> = BTreeMap::new();
        for sample in 0..cache.len() {
            let bucket = cache.bucket(sample);
            buckets
                .entry((bucket.height_px, bucket.width_px))
                .or_default()
                .push(sample);
        }
        Self::of_buckets(buckets.into_values().collect(), batch_size, seed)
    }

    fn of_buckets(buckets: Vec<Vec<usize>>, batch_size: usize, seed: u64) -> Self {
        Self {
            buckets,
            batch_size,
            seed,
        }
    }

    /// Micro-batches that make one pass over the data.
    pub fn batches_per_epoch(&self) -> u64 {
        self.buckets
            .iter()
            .map(|samples| samples.len().div_ceil(self.batch_size) as u64)
            .sum()
    }

    /// Epoch of a micro step, from 0.
    pub fn epoch(&self, micro_step: u64) -> u64 {
        micro_step / self.batches_per_epoch()
    }

    /// The samples of micro step `micro_step`, all of one size.
    pub fn samples(&self, micro_step: u64) -> Vec<usize> {
        let per_epoch = self.batches_per_epoch();
        let (epoch, position) = (micro_step / per_epoch, micro_step % per_epoch);
        let mut batches = Vec::with_capacity(per_epoch as usize);
        for (index, samples) in self.buckets.iter().enumerate() {
            let order = Stream::new(self.seed, "sample_order", epoch, index as u64)
                .permutation(samples.len());
            let shuffled: Vec<usize> = order.into_iter().map(|i| samples[i]).collect();
            batches.extend(shuffled.chunks(self.batch_size).map(<[usize]>::to_vec));
        }
        let order = Stream::new(self.seed, "batch_order", epoch, 0).permutation(batches.len());
        std::mem::take(&mut batches[order[position as usize]])
    }
}

/// Everything about the data that micro-batches are made from.
pub struct Data<'a> {
    /// The encoded dataset.
    pub cache: &'a Cache,
    /// The order of samples.
    pub order: Order,
    /// The scheduler of the model.
    pub scheduler: SchedulerConfig,
    /// Its training noise levels.
    pub table: Vec<f32>,
    /// Shift and scale of the latents.
    pub autoencoder: AutoencoderConfig,
}

/// A micro-batch and what is said about it if it goes wrong.
pub struct Drawn {
    /// The batch.
    pub batch: MicroBatch,
    /// Its samples.
    pub samples: Vec<usize>,
    /// Their noise levels.
    pub sigmas: Vec<f32>,
    /// See [`loss_of_zero`].
    pub loss_of_zero: f64,
}

impl Data<'_> {
    /// The micro-batch of `micro_step` on `device`, which is without autodiff.
    ///
    /// Noise and interpolation are computed on the host, so that every backend trains on the same numbers.
    ///
    /// # Errors
    /// A cache entry that has vanished.
    pub fn draw(
        &self,
        config: &RunConfig,
        micro_step: u64,
        device: &Device,
    ) -> anyhow::Result<Drawn> {
        let seed = config.train.seed;
        #[cfg(feature = "canary")]
        let (micro_step, data_step) = crate::canary::steps(micro_step);
        #[cfg(not(feature = "canary"))]
        let data_step = micro_step;
        let samples = self.order.samples(data_step);
        let stream = |name: &str, i: usize| Stream::new(seed, name, micro_step, i as u64);
        let (shift, scale) = (
            self.autoencoder.shift_factor.unwrap_or(0.0) as f32,
            self.autoencoder.scaling_factor as f32,
        );

        let (mut noisy, mut target, mut sigmas) = (Vec::new(), Vec::new(), Vec::new());
        let (mut sequence, mut pooled) = (Vec::new(), Vec::new());
        let (mut latent_shape, mut text_shape) = (Vec::new(), Vec::new());
        for (i, &sample) in samples.iter().enumerate() {
            let flipped = config.dataset.random_flip && stream("flip", i).uniform() < 0.5;
            let latents = self.cache.latents(sample, flipped)?;
            let (mean, std) = (latents.mean.to_f32(), latents.std.to_f32());
            let posterior = stream("posterior", i).normals(mean.len());
            let noise = stream("noise", i).normals(mean.len());
            let image_tokens = latents.mean.shape[2..].iter().product::<usize>() / 4;
            let sigma = draw_sigma(
                &config.train,
                &self.scheduler,
                &self.table,
                image_tokens,
                &mut stream("sigma", i),
            );
            for (((mean, std), posterior), noise) in
                mean.iter().zip(&std).zip(&posterior).zip(&noise)
            {
                let latent = (mean + std * posterior - shift) * scale;
                noisy.push((1.0 - sigma) * latent + sigma * noise);
                target.push(noise - latent);
            }
            sigmas.push(sigma);
            latent_shape = latents.mean.shape;

            let dropped = stream("caption_dropout", i).uniform() < config.dataset.caption_dropout;
            let text = self.cache.text(sample, dropped)?;
            sequence.extend(text.sequence.to_f32());
            pooled.extend(text.pooled.to_f32());
            text_shape = text.sequence.shape;
        }

        let batch = samples.len();
        let [_, channels, height, width] = <[usize; 4]>::try_from(latent_shape)
            .ok()
            .context("cached latents are not [1, channels, height, width]")?;
        let [_, tokens, _] = <[usize; 3]>::try_from(text_shape)
            .ok()
            .context("cached text is not [1, tokens, width]")?;
        let latents = |values| {
            Tensor::<4>::from_data(
                TensorData::new(values, [batch, channels, height, width]),
                device,
            )
        };
        let width_of = |values: &Vec<f32>, rows: usize| values.len() / rows;
        let (sequence_width, pooled_width) = (
            width_of(&sequence, batch * tokens),
            width_of(&pooled, batch),
        );
        let mut positions = text_positions(tokens);
        positions.extend(image_positions(height, width));
        let input = FluxInput {
            img: pack(latents(noisy)),
            txt: Tensor::from_data(
                TensorData::new(sequence, [batch, tokens, sequence_width]),
                device,
            ),
            pooled: Tensor::from_data(TensorData::new(pooled, [batch, pooled_width]), device),
            sigma: sigmas.clone(),
            guidance: vec![config.train.guidance as f32; batch],
            positions,
        };
        let weights: Vec<f32> = sigmas
            .iter()
            .map(|&sigma| loss_weight(config.train.loss_weighting, sigma))
            .collect();
        let loss_of_zero = loss_of_zero(&target, &weights);
        Ok(Drawn {
            batch: MicroBatch {
                input,
                target: pack(latents(target)),
                weights,
            },
            samples,
            sigmas,
            loss_of_zero,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_sees_every_sample_once_and_the_next_one_in_another_order() {
        let order = Order::of_buckets(vec![vec![0, 2, 4, 6, 8], vec![1, 3, 5]], 2, 7);
        assert_eq!(order.batches_per_epoch(), 5);
        let epoch = |e: u64| {
            (0..5)
                .flat_map(|i| order.samples(5 * e + i))
                .collect::<Vec<_>>()
        };
        for e in 0..3 {
            let mut seen = epoch(e);
            seen.sort_unstable();
            assert_eq!(seen, (0..9).filter(|&s| s != 7).collect::<Vec<_>>());
        }
        assert_ne!(epoch(0), epoch(1));
        for micro_step in 0..15 {
            let parity: Vec<usize> = order.samples(micro_step).iter().map(|s| s % 2).collect();
            assert!(parity.windows(2).all(|p| p[0] == p[1]), "one size a batch");
        }
    }
}
