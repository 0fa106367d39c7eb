//! How long a step will take, from what the layers compute and how fast this device multiplies just now: a rough estimate, of
//! the linear layers and attention alone.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use burn::tensor::{DType, Device, Tensor};
use flux_model::family::{Family, Sees};
use flux_model::weights::Compute;
use lora_core::LoraConfig;
use lora_core::attach::targeted;
use lora_core::peft::Targets;
use lora_core::training::recompute::Blocks;

use crate::config::RunConfig;
use crate::data::sample::Sample;
use crate::memory::picture_tokens;
use crate::run::adapter::text_layers;

/// How long the device is measured.
const MEASURED: Duration = Duration::from_millis(300);
/// Rows and columns of what is multiplied.
const SIZE: usize = 1024;

/// Floating-point operations of a forward pass, of one picture.
struct Forward {
    linear: f64,
    attention: f64,
}

impl Forward {
    /// Those of both passes; `recomputed` is the share of the blocks that are computed again. Of linear layers forward and
    /// backward pass are of one size, for the base weights have no gradient; of attention the forward pass is two products, and
    /// the backward pass five, one of which computes the scores again.
    fn both_passes(&self, recomputed: f64) -> f64 {
        self.linear * (2.0 + recomputed) + self.attention * (3.5 + recomputed)
    }
}

/// Floating-point operations of one optimizer step; `recomputed` is the share of the blocks that are computed again.
///
/// # Errors
/// A network without linear layers.
pub(crate) fn step_operations<F: Family>(
    config: &RunConfig,
    family: &F,
    samples: &[Sample],
    outline: &F::Network,
    recomputed: f64,
    device: &Device,
) -> anyhow::Result<f64> {
    let image = picture_tokens(config, family, samples) as f64;
    let text = config.dataset.max_sequence_length as f64;
    let all = LoraConfig {
        r: 1,
        target_modules: Targets::Pattern("all-linear".into()),
        ..LoraConfig::default()
    };
    let layers = targeted(outline, &all)?;
    let mut linear = 0.0;
    for (path, [inputs, outputs]) in &layers {
        let tokens = match Sees::of(path) {
            Sees::Conditioning => 1.0,
            Sees::Text => text,
            Sees::Image => image,
            Sees::All => text + image,
        };
        linear += 2.0 * (inputs * outputs) as f64 * tokens;
    }
    let query = layers.iter().find(|(path, _)| path.ends_with("attn.to_q"));
    let width = query.map_or(0, |(_, [_, outputs])| *outputs) as f64;
    let blocks = outline.count() as f64;
    let attention = blocks * 4.0 * (text + image).powi(2) * width;
    let forward = Forward { linear, attention };
    let of_text = text_layers(family, &config.lora.text_encoders(), device)?;
    let of_text = of_text.values().flat_map(BTreeMap::values);
    let of_text: usize = of_text.map(|[inputs, outputs]| inputs * outputs).sum();
    let train = &config.train;
    let pictures = (train.batch_size * train.gradient_accumulation_steps) as f64;
    Ok((forward.both_passes(recomputed) + 4.0 * of_text as f64 * text) * pictures)
}

/// Floating-point operations a second of a matrix product on `device` in what blocks compute in, measured.
pub(crate) fn device_speed(device: &Device, compute: Compute) -> f64 {
    let a = Tensor::<2>::ones([SIZE, SIZE], device);
    let a = match compute {
        Compute::F32 => a,
        Compute::Bf16 => a.cast(DType::BF16),
    };
    let product = || {
        let product = a.clone().matmul(a.clone()).slice([0..1, 0..1]);
        product.cast(DType::F32).into_scalar::<f32>()
    };
    product(); // the first call of a device compiles, or wakes threads
    let (started, mut count) = (Instant::now(), 0);
    while started.elapsed() < MEASURED {
        product();
        count += 1;
    }
    2.0 * (SIZE as f64).powi(3) * f64::from(count) / started.elapsed().as_secs_f64()
}

/// Seconds for people.
pub(crate) fn shown(seconds: f64) -> String {
    match seconds {
        s if s < 0.1 => format!("{:.1} ms", 1000.0 * s),
        s if s < 1.0 => format!("{s:.2} s"),
        s if s < 120.0 => format!("{s:.1} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s if s < 172_800.0 => format!("{:.1} h", s / 3600.0),
        s => format!("{:.1} days", s / 86_400.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_shown_in_units_people_think_in() {
        let shown: Vec<String> = [0.0004, 0.4, 5.0, 600.0, 36_000.0, 864_000.0]
            .map(shown)
            .into();
        assert_eq!(
            shown,
            ["0.4 ms", "0.40 s", "5.0 s", "10 min", "10.0 h", "10.0 days"]
        );
    }

    #[test]
    fn what_is_computed_again_is_counted_again_and_attention_s_scores_always_are() {
        let forward = Forward {
            linear: 10.0,
            attention: 2.0,
        };
        assert_eq!(forward.both_passes(0.0), 20.0 + 2.0 + 5.0);
        assert_eq!(forward.both_passes(1.0), 30.0 + 2.0 + 2.0 + 5.0);
    }

    #[cfg(feature = "flex")]
    #[test]
    fn a_device_does_something_in_a_second() {
        let speed = device_speed(&Device::flex(), Compute::F32);
        assert!((1e8..1e16).contains(&speed), "{speed:.2e}");
    }
}
