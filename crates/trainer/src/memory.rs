//! How much memory a run will take, and how it is made to fit.
//!
//! The estimate is of what grows with the model: base weights, what the blocks keep for the backward pass, the adapter with its
//! gradients and moments. It takes a block's graph for as large as what its linear layers read and write, which is close
//! for these networks, and takes what does not grow for a fixed amount.

use std::fs;
use std::path::Path;

use anyhow::{Context, bail};
use flux_model::family::Family;
use flux_model::ops::attention_composed::scores_bytes;
use flux_model::weights::{Base, Compute, Sizes};
use lora_core::training::recompute::Recomputed;

use crate::config::{BasePlace, Recompute, RunConfig};
use crate::data::sample::Sample;
use crate::device::NamedDevice;
use crate::run::adapter::text_layers;
use crate::taken::{gib, kib_field};
use crate::workers::most_on_one;

/// Bytes that do not grow with the model: of the program, its threads, and what is free in their heaps.
const PROGRAM: u64 = 64 << 20;
/// Bytes of a number in f32.
const F32: u64 = 4;
/// What a trained parameter takes after the backward pass besides the optimizer's state: itself, its gradient, and copies while
/// they are looked at.
const COPIES: u64 = 4;

/// Where the base weights are, what is computed again, and what that takes.
#[derive(Debug, Clone, Copy)]
pub struct MemoryPlan {
    /// How base weights are held.
    pub base: Base,
    /// What is computed again in the backward pass.
    pub recomputed: Recomputed,
    /// All blocks.
    pub blocks: usize,
    /// Bytes of a step at its peak, about.
    pub estimate: u64,
    /// Bytes that there are, where that is known.
    pub limit: Option<u64>,
}

impl MemoryPlan {
    /// For people.
    pub fn describe(&self) -> String {
        let Recomputed {
            blocks: again,
            with_results,
        } = self.recomputed;
        format!(
            "about {}{}; base weights {}, {again} of {} blocks computed again{}",
            gib(self.estimate),
            self.limit
                .map_or_else(String::new, |limit| format!(" of {}", gib(limit))),
            match self.base.is_streamed {
                true => "read block by block",
                false => "in memory",
            },
            self.blocks,
            match with_results {
                0 => String::new(),
                _ if with_results == again => " from results that are kept".into(),
                _ => format!(", {with_results} of them from results that are kept"),
            }
        )
    }

    /// What is said where it does not fit.
    pub fn warning(&self) -> Option<String> {
        let limit = self.limit.filter(|limit| self.estimate > *limit)?;
        Some(format!(
            "a step takes about {}, and {} are there: a smaller `dataset.resolution` or `train.batch_size` takes less{}",
            gib(self.estimate),
            gib(limit),
            match self.base.is_streamed {
                true => "",
                false => ", and so does `memory.base = \"stream\"`",
            }
        ))
    }
}

/// What an estimate depends on besides the plan.
#[derive(Debug, Clone)]
pub struct Need {
    /// Of the network.
    pub sizes: Sizes,
    /// Tokens in a micro-batch, of text and image, of all samples.
    pub tokens: u64,
    /// Bytes of the scores that attention holds at a time where it has no kernels.
    pub scores: u64,
    /// Numbers that are trained.
    pub trained: u64,
    /// Bytes that the optimizer and an average keep of each.
    pub state_bytes: u64,
    /// Micro-batches that are computed at once on one device.
    pub at_once: u64,
    /// Whether gradients of micro-batches are added up: their sum stands beside those that are computed.
    pub accumulates: bool,
    /// Bytes of text encoders that are trained, and of what they keep for the backward pass.
    pub text: u64,
    /// Whether blocks can keep results for being computed again: where operations have kernels.
    pub keeps_results: bool,
}

impl Need {
    /// Bytes of a training step at its peak.
    pub fn estimate(&self, is_streamed: bool, recomputed: Recomputed) -> u64 {
        let blocks = &self.sizes.blocks;
        let tokens = self.at_once * self.tokens * F32;
        let again = recomputed.blocks.min(blocks.len());
        let resident = match is_streamed {
            true => 0,
            false => blocks.iter().map(|block| block.weights).sum(),
        };
        // What a streamed block reads, and the one that is read meanwhile.
        let streamed = |index: usize| {
            let weights = |index: usize| {
                let block = blocks.get(index);
                block.map_or(0, |block| block.weights - block.mapped)
            };
            let others = weights(index + 1).max(index.checked_sub(1).map_or(0, weights));
            match is_streamed {
                true => self.at_once * (weights(index) + others),
                false => 0,
            }
        };
        // The backward pass has gradients of what is trained in the blocks behind it.
        let trained = self.trained * F32;
        let count = blocks.len() as u64;
        let gradients =
            |index: usize| self.at_once * trained * (count - index as u64) / count.max(1);
        // A block's graph and the gradients in it, beside what is kept of those before it.
        let (mut kept, mut peak) = (0, 0);
        for (index, block) in blocks[..again].iter().enumerate() {
            kept += self.sizes.width;
            if again - index <= recomputed.with_results {
                kept += block.results;
            }
            let graph = tokens * (kept + 2 * block.activations);
            peak = peak.max(graph + streamed(index) + gradients(index));
        }
        let graphs = blocks[again..].iter().map(|block| block.activations);
        let running = 2 * graphs.clone().max().unwrap_or(0);
        let graphs = tokens * (kept + graphs.sum::<u64>() + running);
        let peak = peak.max(graphs + gradients(again));
        let sum = if self.accumulates { trained } else { 0 };
        let scores = match self.keeps_results {
            true => 0, // the kernels that keep results hold none
            false => self.at_once * self.scores,
        };
        let backward = peak + scores + sum;
        let update = trained * (COPIES - 1) + streamed(0);
        let state = self.trained * (F32 + self.state_bytes);
        let always = PROGRAM + self.sizes.rest + resident + self.text + state;
        always + backward.max(update)
    }

    /// Decides what the configuration leaves to "auto". `limit` is what there is, where that is known.
    pub(crate) fn plan(
        &self,
        config: &RunConfig,
        limit: Option<u64>,
        can_stream: bool,
    ) -> MemoryPlan {
        let memory = &config.memory;
        let blocks = self.sizes.blocks.len();
        let fits = |estimate: u64| limit.is_none_or(|limit| estimate <= limit);
        let is_streamed = match memory.base {
            BasePlace::Stream => true,
            BasePlace::Resident => false,
            BasePlace::Auto => {
                let can = can_stream
                    && matches!(memory.recompute, Recompute::Auto | Recompute::All)
                    && !config.lora.reads_base_weights();
                can && !fits(self.estimate(false, Recomputed::first(blocks)))
            }
        };
        let recomputed = match (memory.recompute, limit) {
            (Recompute::First(recomputed), _) => Recomputed::first(recomputed.min(blocks)),
            (Recompute::Auto, Some(_)) => {
                let with_results = |blocks| Recomputed {
                    blocks,
                    with_results: if self.keeps_results { blocks } else { 0 },
                };
                let least = if is_streamed { blocks } else { 0 };
                let of_all = |with_results| Recomputed {
                    blocks,
                    with_results,
                };
                let first = (least..=blocks).map(with_results);
                let rest = (0..with_results(blocks).with_results).rev().map(of_all);
                let mut ways = first.chain(rest);
                ways.find(|&recomputed| fits(self.estimate(is_streamed, recomputed)))
                    .unwrap_or(Recomputed::first(blocks))
            }
            (Recompute::Auto, None) | (Recompute::All, _) => Recomputed::first(blocks),
        };
        MemoryPlan {
            base: Base {
                dtype: config.model.base_dtype,
                is_streamed,
                compute: config.model.compute,
            },
            recomputed,
            blocks,
            estimate: self.estimate(is_streamed, recomputed),
            limit,
        }
    }
}

/// Tokens of a sample's picture and references, of the sample that has most.
pub fn picture_tokens<F: Family>(config: &RunConfig, family: &F, samples: &[Sample]) -> usize {
    let side = config.dataset.largest_resolution() as usize;
    let [_, height, width] = family.latent_shape(side, side);
    let references = samples.iter().map(|sample| sample.references.len()).max();
    (1 + references.unwrap_or(0)) * F::image_tokens([height, width])
}

/// What a run needs.
///
/// # Errors
/// Headers that cannot be read.
pub fn need<F: Family>(
    config: &RunConfig,
    family: &F,
    samples: &[Sample],
    trained: usize,
    devices: &[NamedDevice],
) -> anyhow::Result<Need> {
    let tokens = picture_tokens(config, family, samples) + config.dataset.max_sequence_length;
    let mut sizes = family.sizes(config.model.base_dtype, &devices[0].device)?;
    if !devices[0].is_cpu() {
        for block in &mut sizes.blocks {
            block.mapped = 0; // it is copied to the device
        }
    }
    let batch = config.train.batch_size;
    let scores = scores_bytes([batch, sizes.heads as usize, tokens]);
    Ok(Need {
        sizes,
        tokens: (batch * tokens) as u64,
        scores: scores as u64,
        trained: trained as u64,
        state_bytes: config.optimizer.rule.state_bytes() + u64::from(config.ema.is_some()) * F32,
        at_once: most_on_one(devices) as u64,
        accumulates: config.train.gradient_accumulation_steps > 1,
        text: text(config, family, &devices[0])?,
        keeps_results: devices[0].has_kernels() && config.model.compute == Compute::F32,
    })
}

/// What text encoders that are trained take: their weights as they are stored, and what their layers read and write.
fn text<F: Family>(config: &RunConfig, family: &F, device: &NamedDevice) -> anyhow::Result<u64> {
    let encoders = config.lora.text_encoders();
    let mut bytes = 0;
    for (component, layers) in text_layers(family, &encoders, &device.device)? {
        let folder = family.folder().root().join(component.to_string());
        let files = fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))?;
        let weights = files.flatten().filter(|file| {
            let name = file.file_name();
            Path::new(&name).extension() == Some("safetensors".as_ref())
        });
        bytes += weights
            .filter_map(|file| Some(fs::metadata(file.path()).ok()?.len()))
            .sum::<u64>();
        let values: usize = layers
            .values()
            .map(|[inputs, outputs]| inputs + outputs)
            .sum();
        let tokens = config.train.batch_size * config.dataset.max_sequence_length;
        bytes += (values * tokens) as u64 * F32;
    }
    Ok(bytes)
}

/// Decides where the base weights are and what is computed again, on devices that are alike; `trained` numbers are trained.
///
/// # Errors
/// Headers that cannot be read; streaming on a backend that keeps no placeholder small.
pub fn plan<F: Family>(
    config: &RunConfig,
    family: &F,
    samples: &[Sample],
    trained: usize,
    devices: &[NamedDevice],
) -> anyhow::Result<MemoryPlan> {
    let device = &devices[0];
    let need = need(config, family, samples, trained, devices)?;
    let limit = config.memory.limit.map(|limit| limit.0);
    let limit = limit.or_else(|| available().filter(|_| device.is_cpu()));
    let plan = need.plan(config, limit, device.keeps_views());
    if plan.base.is_streamed && !device.keeps_views() {
        bail!(
            "`memory.base`: blocks cannot be streamed on {}, which makes a copy of every view; use \"resident\" or another device",
            device.name
        );
    }
    Ok(plan)
}

/// How to hold the base weights of a network that is only sampled from: streamed if they do not fit, unless they must be in
/// memory.
///
/// # Errors
/// Headers that cannot be read.
pub fn base_for_sampling<F: Family>(
    family: &F,
    must_be_resident: bool,
    device: &NamedDevice,
) -> anyhow::Result<Base> {
    let base = Base::default();
    let sizes = family.sizes(base.dtype, &device.device)?;
    let blocks = sizes.blocks.iter().map(|block| block.weights);
    let resident = sizes.rest + blocks.sum::<u64>();
    let limit = available().filter(|_| device.is_cpu() && device.keeps_views());
    let fits = limit.is_none_or(|limit| resident <= limit);
    Ok(Base {
        is_streamed: !fits && !must_be_resident,
        ..base
    })
}

/// Most of the memory that this machine, or the group of processes that this one is confined to, has left, in bytes; `None`
/// where the system does not tell.
fn available() -> Option<u64> {
    let number = |path: &str| -> Option<u64> {
        let text = fs::read_to_string(path).ok()?;
        text.trim().parse().ok()
    };
    let machine = fs::read_to_string("/proc/meminfo").ok()?;
    let machine = kib_field(&machine, "MemAvailable:")?;
    let group = number("/sys/fs/cgroup/memory.max");
    Some(group.map_or(machine, |group| group.min(machine)) / 10 * 9)
}

#[cfg(test)]
mod tests {
    use flux_model::weights::BlockSize;

    use super::*;

    fn need() -> Need {
        let block = BlockSize {
            weights: 1000,
            mapped: 0,
            activations: 10,
            results: 4,
        };
        Need {
            sizes: Sizes {
                blocks: vec![block; 4],
                rest: 100,
                width: 2,
                heads: 1,
            },
            tokens: 5,
            scores: 0,
            trained: 4,
            state_bytes: 8,
            at_once: 1,
            accumulates: false,
            text: 0,
            keeps_results: true,
        }
    }

    fn some(blocks: usize, with_results: usize) -> Recomputed {
        Recomputed {
            blocks,
            with_results,
        }
    }

    #[test]
    fn as_few_blocks_are_computed_again_as_fit_and_none_is_in_memory_where_even_that_is_too_much() {
        let need = need();
        // Weights 4100, what is trained 48, and its gradients 4 a block; a graph of 200 for each block that is kept, 40 for the input of
        // each that is not, 80 for its results, twice a graph to run.
        let always = PROGRAM + 4100 + 48;
        assert_eq!(need.estimate(false, some(0, 0)), always + 800 + 400 + 16);
        assert_eq!(need.estimate(false, some(4, 0)), always + 160 + 400 + 4);
        assert_eq!(
            need.estimate(false, some(1, 0)),
            always + 40 + 600 + 400 + 12
        );
        assert_eq!(
            need.estimate(false, some(4, 3)),
            always + 160 + 240 + 400 + 4
        );
        assert_eq!(
            need.estimate(true, some(4, 0)),
            always - 2000 + 160 + 400 + 4
        );
        let accumulates = Need {
            accumulates: true,
            ..need.clone()
        };
        assert_eq!(
            accumulates.estimate(false, some(4, 0)),
            always + 160 + 400 + 4 + 16
        );
        // Two workers share the weights in memory, and nothing else.
        let two = Need {
            at_once: 2,
            ..need.clone()
        };
        let all = some(4, 0);
        assert_eq!(two.estimate(false, all), always + 2 * (160 + 400 + 4));
        let streamed = always - 4000 + 2 * (2000 + 160 + 400 + 4);
        assert_eq!(two.estimate(true, all), streamed);
        // Each holds the scores of the block it runs.
        let scores = Need {
            scores: 30,
            keeps_results: false,
            ..two.clone()
        };
        assert_eq!(
            scores.estimate(false, all),
            always + 2 * (160 + 400 + 4 + 30)
        );
        let plan = |need: &Need, limit| {
            let plan = need.plan(&RunConfig::default(), limit, true);
            (plan.base.is_streamed, plan.recomputed)
        };
        assert_eq!(plan(&need, None), (false, some(4, 0)));
        let fit = |is_streamed, recomputed| {
            let enough = need.estimate(is_streamed, recomputed);
            assert_eq!(plan(&need, Some(enough)), (is_streamed, recomputed));
            plan(&need, Some(enough - 1))
        };
        assert_eq!(fit(false, some(0, 0)), (false, some(1, 1)));
        assert_eq!(fit(false, some(1, 1)), (false, some(2, 2)));
        assert_eq!(fit(false, some(4, 4)), (false, some(4, 3)));
        assert_eq!(fit(false, some(4, 0)), (true, some(4, 4)));
        assert_eq!(fit(true, some(4, 1)), (true, some(4, 0)));
        assert_eq!(plan(&need, Some(1)), (true, some(4, 0)));
        let keeps_none = Need {
            keeps_results: false,
            ..need.clone()
        };
        let enough = need.estimate(false, some(2, 0));
        assert_eq!(plan(&keeps_none, Some(enough)), (false, some(2, 0)));
    }

    #[test]
    fn a_streamed_step_is_largest_where_its_largest_blocks_are() {
        let mut need = need();
        need.sizes.blocks[0].weights = 3000;
        need.sizes.blocks[1].weights = 3000;
        // What is trained in three of the blocks has gradients there.
        let always = PROGRAM + 100 + 48 + 12;
        // At the second block, the results of those behind are gone.
        let estimate = |with_results| need.estimate(true, some(4, with_results));
        assert_eq!(estimate(0), always + 6000 + 80 + 400);
        assert_eq!(estimate(2), always + 6000 + 80 + 400);
        assert_eq!(estimate(3), always + 6000 + 160 + 400);
        // What is mapped is in no memory of the program, unless it is there to stay: the third block is largest then, with the second
        // one read meanwhile, and there are gradients of two.
        let resident = need.estimate(false, some(4, 0));
        need.sizes.blocks[0].mapped = 2900;
        assert_eq!(
            need.estimate(true, some(4, 0)),
            always - 4 + 4000 + 120 + 400
        );
        assert_eq!(need.estimate(false, some(4, 0)), resident);
    }

    #[test]
    fn what_is_asked_for_is_done() {
        let plan = |change: fn(&mut RunConfig), limit| {
            let mut config = RunConfig::default();
            change(&mut config);
            let plan = need().plan(&config, limit, true);
            (plan.base.is_streamed, plan.recomputed)
        };
        let all = some(4, 0);
        assert_eq!(
            plan(|c| c.memory.base = BasePlace::Stream, None),
            (true, all)
        );
        assert_eq!(
            plan(|c| c.memory.base = BasePlace::Resident, Some(1)),
            (false, all)
        );
        assert_eq!(
            plan(|c| c.memory.recompute = Recompute::All, Some(1 << 30)),
            (false, all)
        );
        assert_eq!(
            plan(|c| c.memory.recompute = Recompute::First(9), None),
            (false, all)
        );
        // What is kept of a block keeps its weights, and DoRA starts from them.
        assert_eq!(
            plan(|c| c.memory.recompute = Recompute::First(1), Some(1)),
            (false, some(1, 0))
        );
        assert_eq!(plan(|c| c.lora.use_dora = true, Some(1)), (false, all));
    }
}
