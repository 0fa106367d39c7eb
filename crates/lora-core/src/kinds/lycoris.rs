//! LoHa and LoKr: the change they make, how they start.
//!
//! Source: PEFT 0.19 `tuners/loha/layer.py`, `tuners/lokr/layer.py` (without `use_effective_conv2d`).

use burn::tensor::Tensor;

use crate::files::host::HostTensor;
use crate::kinds::factors::{Factor, Factors, Side};
use crate::kinds::parts::{LOHA, Part, SIDES};
use crate::ops::matmul;
use crate::peft::config::{InitLoraWeights, LoraConfig};
use crate::peft::selection::PeftType;
use crate::random::{Stream, name_hash};
use crate::site::Site;

pub(super) fn loha_delta(factors: &Factors<Factor>) -> Option<Tensor<2>> {
    let [first, second] = factors
        .products()?
        .map(|[a, b]| matmul(a.matrix(), b.matrix()));
    Some(first * second)
}

/// `kron(w1, w2)`: element `[i * c + k, j * d + l]` is `w1[i, j] * w2[k, l]`, for `w2: [c, d]`.
pub(super) fn lokr_delta(factors: &Factors<Factor>) -> Option<Tensor<2>> {
    let [w1, w2] = factors.sides()?.map(|side| match side {
        Side::Full(part) => part.matrix(),
        Side::Product(a, b) => matmul(a.matrix(), b.matrix()),
    });
    let ([a, b], [c, d]) = (w1.dims(), w2.dims());
    // Outer product as a matmul of a column with a row: no reduction of a broadcast operand in the backward pass.
    let product = matmul(w1.reshape([a * b, 1]), w2.reshape([1, c * d]));
    let product = product.reshape([a, b, c, d]).swap_dims(1, 2);
    Some(product.reshape([a * c, b * d]))
}

/// `result + scale * x kron(w1, w2)ᵀ` without the Kronecker product: two small matmuls a row.
pub(super) fn lokr_forward<const D: usize>(
    factors: &Factors<Factor>,
    scale: f64,
    x: Tensor<D>,
    result: Tensor<D>,
) -> Tensor<D> {
    let Some([w1, w2]) = factors.sides() else {
        return result;
    };
    // `x wᵀ` for `x: [rows, columns of w]`.
    let apply = |side: &Side<&Factor>, x: Tensor<2>| match side {
        Side::Full(part) => matmul(x, part.matrix().transpose()),
        Side::Product(a, b) => {
            let inner = matmul(x, b.matrix().transpose());
            matmul(inner, a.matrix().transpose())
        }
    };
    let (Side::Full(last) | Side::Product(_, last)) = &w1;
    let (b, shape) = (last.matrix().dims()[1], result.dims());
    let x: Tensor<2> = x.clone().reshape([-1, x.dims()[D - 1] as i32]);
    let [rows, inputs] = x.dims();
    let inner = apply(&w2, x.reshape([rows * b, inputs / b])); // [rows * b, c]
    let c = inner.dims()[1];
    let inner = inner.reshape([rows, b, c]).swap_dims(1, 2);
    let outer = apply(&w1, inner.reshape([rows * c, b])); // [rows * c, a]
    let a = outer.dims()[1];
    let outer = outer.reshape([rows, c, a]).swap_dims(1, 2);
    let update = outer.reshape([rows, a * c]).mul_scalar(scale);
    result + update.reshape(shape)
}

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
    let matrix = |part: Part, [rows, columns]: [usize; 2], is_zero: bool| {
        let bound = 1.0 / (columns as f64).sqrt();
        let mut stream = Stream::new(seed, &format!("init_{}", part.name), 0, layer);
        let values: Vec<f32> = (0..rows * columns)
            .map(|_| match is_zero && zero_start {
                true => 0.0,
                false => ((2.0 * stream.uniform() - 1.0) * bound) as f32,
            })
            .collect();
        HostTensor::from_f32(site.file_shape(part, &[rows, columns]), &values)
    };
    let (inputs, outputs) = (site.inputs(), site.outputs());
    match config.peft_type {
        PeftType::Lora | PeftType::Loha => {
            let [w1_a, w1_b, w2_a, w2_b] = LOHA;
            Factors::loha(
                [
                    matrix(w1_a, [outputs, rank], false),
                    matrix(w1_b, [rank, inputs], false),
                ],
                [
                    matrix(w2_a, [outputs, rank], false),
                    matrix(w2_b, [rank, inputs], true),
                ],
            )
        }
        PeftType::Lokr => {
            let kernel: usize = site.kernel().iter().product();
            let (b, d) = factorization(inputs / kernel, config.decompose_factor);
            let (a, c) = factorization(outputs, config.decompose_factor);
            let is_full = |longer: usize| 2 * rank >= longer;
            let [[w1, w1_a, w1_b], [w2, w2_a, w2_b]] = SIDES;
            let w1 = match !config.decompose_both || is_full(a.max(b)) {
                true => Side::Full(matrix(w1, [a, b], true)),
                false => Side::Product(
                    matrix(w1_a, [a, rank], true),
                    matrix(w1_b, [rank, b], false),
                ),
            };
            let w2 = match is_full(c.max(d)) {
                true => Side::Full(matrix(w2, [c, d * kernel], false)),
                false => Side::Product(
                    matrix(w2_a, [c, rank], false),
                    matrix(w2_b, [rank, d * kernel], false),
                ),
            };
            Factors::lokr(w1, w2)
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
