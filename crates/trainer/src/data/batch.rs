//! The data of a micro-batch, as a function of (config, micro step): which samples, which noise, which noise levels.
//!
//! An epoch is a keyed permutation: every bucket's samples in random order, cut into batches of one size (the last of a
//! bucket may be smaller), and the batches in random order. The position in the data is the micro step alone.

use std::collections::BTreeMap;

use anyhow::Context;
use burn::tensor::{Device, Tensor, TensorData};
use flux_model::family::Family;
use flux_model::prompted::{PromptedInput, Prompts, TokensOf};
use lora_core::files::host::HostTensor;
use lora_core::random::Stream;

use crate::backward::MicroBatch;
use crate::condition::condition;
use crate::config::{RunConfig, TrainSection};
use crate::data::bucket::Bucket;
use crate::data::cache::{Beside, Cache};
use crate::data::reader::Reader;
use crate::loss::{Penalty, draw_sigma, loss_of_zero, loss_weight};
use crate::step::Drawn;

/// The order in which samples are seen.
#[derive(Debug)]
pub struct Order {
    /// Samples of each bucket.
    buckets: Vec<Vec<usize>>,
    batch_size: usize,
    seed: u64,
}

impl Order {
    /// Groups the entries of `cache` that are trained on by their size and those of their references.
    pub fn new(cache: &Cache, batch_size: usize, seed: u64) -> Self {
        let mut buckets: BTreeMap<_, Vec<usize>> = BTreeMap::new();
        for entry in 0..cache.trained() {
            let size = |bucket: Bucket| (bucket.height_px, bucket.width_px);
            let references = cache.reference_buckets(entry).into_iter().map(size);
            let sizes = (size(cache.bucket(entry)), references.collect::<Vec<_>>());
            let alike = buckets.entry(sizes).or_default();
            alike.extend(std::iter::repeat_n(entry, cache.repeats(entry)));
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
pub struct Data<'a, F: Family> {
    /// The encoded dataset.
    pub cache: &'a Cache,
    /// What reads its captions.
    pub reader: &'a Reader<F>,
    /// The order of samples.
    pub order: Order,
    /// The pipeline that is trained.
    pub family: &'a F,
    /// Its training noise levels.
    pub table: Vec<f32>,
    /// Names of the samples.
    pub names: Vec<String>,
}

impl<F: Family> Data<'_, F> {
    /// The micro-batch of `micro_step` on `device`: `read`, then `place`.
    ///
    /// # Errors
    /// A cache entry that has vanished.
    pub fn draw(
        &self,
        config: &RunConfig,
        micro_step: u64,
        device: &Device,
    ) -> anyhow::Result<Drawn<PromptedInput<F>>> {
        self.place(config, self.read(config, micro_step)?, device)
    }

    /// The samples of `micro_step` with their noise, on the host, so that every backend trains on the same numbers.
    ///
    /// # Errors
    /// A cache entry that has vanished.
    pub(crate) fn read(&self, config: &RunConfig, micro_step: u64) -> anyhow::Result<Read<F>> {
        let seed = config.train.seed;
        #[cfg(feature = "canary")]
        let (micro_step, data_step) = crate::canary::steps(micro_step);
        #[cfg(not(feature = "canary"))]
        let data_step = micro_step;
        let entries = self.order.samples(data_step);
        let stream = |name: &str, i: usize| Stream::new(seed, name, micro_step, i as u64);
        let mut shots = Vec::with_capacity(entries.len());
        for (i, &entry) in entries.iter().enumerate() {
            let flipped = config.dataset.random_flip && stream("flip", i).uniform() < 0.5;
            let (crops, texts) = self.cache.variants(entry);
            let one_of = |name, count| match count {
                1 => 0,
                count => stream(name, i).below(count as u64) as usize,
            };
            let crop = one_of("crop_variant", crops);
            let encoded = self.cache.latents(entry, crop, flipped)?;
            let [_, _, height, width] = latent_shape(&encoded)?;
            let sigma = draw_sigma(
                &config.train,
                self.family.training_mu(F::image_tokens([height, width])),
                &self.table,
                &mut stream("sigma", i),
            );
            let dropped = stream("caption_dropout", i).uniform() < config.dataset.caption_dropout;
            let variant = (!dropped).then(|| one_of("caption_variant", texts));
            shots.push(Shot {
                weight: loss_weight(&config.train, sigma) * self.cache.loss_weight(entry),
                beside: self.cache.beside(entry, crop, flipped)?,
                ..Shot::new(
                    self.family,
                    encoded,
                    self.reader.text(self.cache, entry, variant)?,
                    sigma,
                    |n| stream("posterior", i).normals(n),
                    |n| stream("noise", i).normals(n),
                )?
            });
        }
        let drawn = entries.iter().zip(&shots);
        let about = drawn
            .map(|(&entry, shot)| {
                let name = &self.names[self.cache.sample(entry)];
                format!("{name} (sigma {})", shot.sigma)
            })
            .collect();
        Ok(Read { shots, about })
    }

    /// What was read, as a micro-batch on `device`.
    ///
    /// # Errors
    /// Samples whose pictures beside them differ in number or size.
    pub(crate) fn place(
        &self,
        config: &RunConfig,
        read: Read<F>,
        device: &Device,
    ) -> anyhow::Result<Drawn<PromptedInput<F>>> {
        Ok(Drawn {
            about: read.about,
            ..micro_batch(self.family, read.shots, &config.train, device)?
        })
    }
}

/// A micro-batch on the host, and what is said of its samples.
pub(crate) struct Read<F: Family> {
    shots: Vec<Shot<F>>,
    about: Vec<String>,
}

/// One sample of a micro-batch, on the host.
pub(crate) struct Shot<F: Family> {
    latents: Vec<f32>,
    noise: Vec<f32>,
    /// `[1, channels, height, width]` of both.
    shape: [usize; 4],
    sigma: f32,
    /// Of its loss.
    weight: f32,
    text: Prompts<TokensOf<F>>,
    /// Pictures beside it.
    pub(crate) beside: Beside,
}

impl<F: Family> Shot<F> {
    /// A sample of weight 1 and with nothing beside it, from what the encoders said of it; `posterior` and `noise` give that
    /// many normal numbers.
    ///
    /// # Errors
    /// Latents of another shape.
    pub(crate) fn new(
        family: &F,
        encoded: Vec<HostTensor>,
        text: Prompts<TokensOf<F>>,
        sigma: f32,
        posterior: impl FnOnce(usize) -> Vec<f32>,
        noise: impl FnOnce(usize) -> Vec<f32>,
    ) -> anyhow::Result<Self> {
        let shape = latent_shape(&encoded)?;
        let latents = family.latents(&encoded, posterior);
        Ok(Self {
            noise: noise(latents.len()),
            latents,
            shape,
            sigma,
            weight: 1.0,
            text,
            beside: Beside::default(),
        })
    }
}

fn latent_shape(encoded: &[HostTensor]) -> anyhow::Result<[usize; 4]> {
    <[usize; 4]>::try_from(encoded[0].shape.clone())
        .ok()
        .context("cached latents are not [1, channels, height, width]")
}

/// Samples of one size as a micro-batch on `device`.
///
/// # Errors
/// Samples whose pictures beside them differ in number or size.
pub(crate) fn micro_batch<F: Family>(
    family: &F,
    shots: Vec<Shot<F>>,
    train: &TrainSection,
    device: &Device,
) -> anyhow::Result<Drawn<PromptedInput<F>>> {
    let (mut noisy, mut target) = (Vec::new(), Vec::new());
    let (mut sigmas, mut weights) = (Vec::new(), Vec::new());
    let (mut shape, mut texts, mut beside) = ([0; 4], Vec::new(), Vec::new());
    for shot in shots {
        let sigma = shot.sigma;
        for (latent, noise) in shot.latents.iter().zip(&shot.noise) {
            noisy.push((1.0 - sigma) * latent + sigma * noise);
            target.push(noise - latent);
        }
        shape = shot.shape;
        sigmas.push(sigma);
        weights.push(shot.weight);
        texts.push(shot.text);
        beside.push(shot.beside);
    }
    let batch = sigmas.len();
    let [_, channels, height, width] = shape;
    let tokens = |values| {
        F::pack(Tensor::from_data(
            TensorData::new(values, [batch, channels, height, width]),
            device,
        ))
    };
    let (encoded, token_ids): (Vec<_>, Vec<_>) = texts
        .into_iter()
        .map(|text: Prompts<_>| (text.encoded, text.tokens))
        .unzip();
    let input = PromptedInput {
        tokens: tokens(noisy),
        grid: [height, width],
        prompts: Prompts {
            encoded: stacked(encoded),
            tokens: token_ids.concat(),
        },
        sigma: sigmas,
        guidance: vec![train.guidance as f32; batch],
        condition: condition(family, &beside, device)?,
    };
    let penalty = Penalty::of(train);
    Ok(Drawn {
        loss_of_zero: loss_of_zero(&target, &weights, penalty),
        batch: MicroBatch {
            input,
            target: tokens(target),
            weights,
            penalty,
        },
        about: Vec::new(),
    })
}

/// Encoded samples, `[1, ...]` each, as rows of one tensor for every part.
pub(crate) fn stacked(samples: Vec<Vec<HostTensor>>) -> Vec<HostTensor> {
    let parts = samples.first().map_or(0, Vec::len);
    let part = |k: usize| {
        let rows = samples.iter().map(|sample| &sample[k]);
        let values: Vec<f32> = rows.clone().flat_map(HostTensor::to_f32).collect();
        let mut shape = samples[0][k].shape.clone();
        shape[0] = rows.map(|row| row.shape[0]).sum();
        HostTensor::from_f32(shape, &values)
    };
    (0..parts).map(part).collect()
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
