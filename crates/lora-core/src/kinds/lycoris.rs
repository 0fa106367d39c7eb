//! How LoHa and LoKr start: shapes and first values, as in PEFT.
//!
//! Source: PEFT 0.19 `tuners/loha/layer.py`, `tuners/lokr/layer.py` (without `use_effective_conv2d`).

use crate::files::host::HostTensor;
use crate::kinds::factors::{Factors, Side};
use crate::peft::config::{InitLoraWeights, LoraConfig, PeftType};
use crate::random::{Stream, name_hash};
use crate::site::Site;

/// Fresh factors of a LoHa or LoKr; with `init_lora_weights: false` none of them is zero.
pub(crate) fn fresh(
    site: &Site,
    rank: usize,
    config: &LoraConfig,
    seed: u64,
) -> Factors<HostTensor> {
    let layer = name_hash(&site.key);
    let zero_start = config.init_lora_weights != InitLoraWeights::Random;
    // Kaiming with a = sqrt 5, as PyTorch counts the inputs of a matrix: uniform in ±1/sqrt(columns).
    let matrix = |name: &str, [rows, columns]: [usize; 2], is_zero: bool| {
        let bound = 1.0 / (columns as f64).sqrt();
        let mut stream = Stream::new(seed, &format!("init_{name}"), 0, layer);
        let values: Vec<f32> = (0..rows * columns)
            .map(|_| match is_zero && zero_start {
                true => 0.0,
                false => ((2.0 * stream.uniform() - 1.0) * bound) as f32,
            })
            .collect();
        HostTensor::from_f32(site.file_shape(name, &[rows, columns]), &values)
    };
    let (inputs, outputs) = (site.inputs(), site.outputs());
    match config.peft_type {
        PeftType::Lora | PeftType::Loha => Factors::Loha {
            w1: [
                matrix("hada_w1_a", [outputs, rank], false),
                matrix("hada_w1_b", [rank, inputs], false),
            ],
            w2: [
                matrix("hada_w2_a", [outputs, rank], false),
                matrix("hada_w2_b", [rank, inputs], true),
            ],
        },
        PeftType::Lokr => {
            let kernel: usize = site.kernel().iter().product();
            let (b, d) = factorization(inputs / kernel, config.decompose_factor);
            let (a, c) = factorization(outputs, config.decompose_factor);
            let is_full = |longer: usize| 2 * rank >= longer;
            Factors::Lokr {
                w1: match !config.decompose_both || is_full(a.max(b)) {
                    true => Side::Full(matrix("lokr_w1", [a, b], true)),
                    false => Side::Product(
                        matrix("lokr_w1_a", [a, rank], true),
                        matrix("lokr_w1_b", [rank, b], false),
                    ),
                },
                w2: match is_full(c.max(d)) {
                    true => Side::Full(matrix("lokr_w2", [c, d * kernel], false)),
                    false => Side::Product(
                        matrix("lokr_w2_a", [c, rank], false),
                        matrix("lokr_w2_b", [rank, d * kernel], false),
                    ),
                },
            }
        }
    }
}

/// `n` as a product `(m, n / m)`: `m` is `factor` where that divides `n`, else the divisor up to `factor` (any, if -1) with
/// the smallest sum `m + n / m`. Where `factor` divides `n`, the first may be the larger, as in PEFT.
fn factorization(n: usize, factor: i64) -> (usize, usize) {
    let limit = usize::try_from(factor).ok().filter(|factor| *factor > 0);
    if let Some(factor) = limit
        && n.is_multiple_of(factor)
    {
        return (factor, n / factor);
    }
    let mut best = (1, n);
    for m in (2..=limit.unwrap_or(n)).take_while(|m| m * m <= n) {
        if n.is_multiple_of(m) {
            best = (m, n / m);
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::factorization;

    // Expected values: `factorization` of PEFT 0.19.1.
    #[test]
    fn dimensions_split_as_peft_splits_them() {
        let squares = [64, 127, 768, 3072, 9216, 12288, 21504];
        let found = squares.map(|n| factorization(n, -1));
        let expected = [
            (8, 8),
            (1, 127),
            (24, 32),
            (48, 64),
            (96, 96),
            (96, 128),
            (128, 168),
        ];
        assert_eq!(found, expected);
        let factors = [(128, 4), (12, 8), (360, 7), (3072, 100), (8, 8), (6, 20)];
        let found = factors.map(|(n, factor)| factorization(n, factor));
        assert_eq!(found, PEFT);
    }
    const PEFT: [(usize, usize); 6] = [(4, 32), (3, 4), (6, 60), (48, 64), (8, 1), (2, 3)];
}
