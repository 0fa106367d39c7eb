//! Whether two updates of one module are the same change, for files that hold a LoRA under two names.

use super::error::LoraFormatError;
use super::lycoris::Dense;
use super::tensor::TensorRef;
use super::{Bias, Factors, ModuleUpdate};

/// Relative difference up to which two changes are one: a scale folded into half-precision factors rounds this much.
const TOLERANCE: f64 = 4e-3;

/// Whether both change the weight in the same way.
pub(super) fn same_weight(a: &ModuleUpdate, b: &ModuleUpdate) -> Result<bool, LoraFormatError> {
    let magnitudes = match (&a.magnitude, &b.magnitude) {
        (None, None) => true,
        (Some(a), Some(b)) => a.axis == b.axis && same_values(&a.values, &b.values, 1.0, 1.0)?,
        _ => false,
    };
    if !magnitudes || a.size() != b.size() || a.rows != b.rows {
        return Ok(false);
    }
    if let (Some((down_a, up_a)), Some((down_b, up_b))) = (a.pair(), b.pair()) {
        let first = [Dense::load(up_a)?, Dense::load(down_a)?];
        let second = [Dense::load(up_b)?, Dense::load(down_b)?];
        let cross = inner(&first, &second) * a.scale * b.scale;
        let norms = [
            inner(&first, &first) * a.scale.powi(2),
            inner(&second, &second) * b.scale.powi(2),
        ];
        let difference = (norms[0] + norms[1] - 2.0 * cross).max(0.0).sqrt();
        return Ok(difference <= TOLERANCE * norms[0].max(norms[1]).sqrt());
    }
    let (Some(first), Some(second)) = (&a.factors, &b.factors) else {
        return Ok(false);
    };
    let parts = |factors: &Factors| {
        factors
            .iter()
            .map(|(part, _)| part.name)
            .collect::<Vec<_>>()
    };
    if parts(first) != parts(second) || a.scale != b.scale {
        return Ok(false);
    }
    for ((_, a), (_, b)) in first.iter().zip(second.iter()) {
        if !same_values(a, b, 1.0, 1.0)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether both change the bias in the same way.
pub(super) fn same_bias(a: &ModuleUpdate, b: &ModuleUpdate) -> Result<bool, LoraFormatError> {
    let (Some(first), Some(second)) = (&a.bias, &b.bias) else {
        return Ok(false);
    };
    let factor = |bias: &Bias, update: &ModuleUpdate| match bias {
        Bias::Scaled(_) => update.scale,
        Bias::Added(_) | Bias::Replaced(_) => 1.0,
    };
    let replaced = |bias: &Bias| matches!(bias, Bias::Replaced(_));
    Ok(replaced(first) == replaced(second)
        && same_values(
            first.tensor(),
            second.tensor(),
            factor(first, a),
            factor(second, b),
        )?)
}

fn same_values(
    a: &TensorRef,
    b: &TensorRef,
    scale_a: f64,
    scale_b: f64,
) -> Result<bool, LoraFormatError> {
    if a.shape() != b.shape() {
        return Ok(false);
    }
    let (a, b) = (a.load()?.to_f64(), b.load()?.to_f64());
    let difference: f64 = a
        .iter()
        .zip(&b)
        .map(|(x, y)| (x * scale_a - y * scale_b).powi(2))
        .sum();
    let size: f64 = a.iter().map(|x| (x * scale_a).powi(2)).sum();
    Ok(difference.sqrt() <= TOLERANCE * size.sqrt())
}

/// Inner product of two changes, each `up * down`, without forming them: `sum((upᵀ up') ⊙ (down down'ᵀ))`.
fn inner([up, down]: &[Dense; 2], [other_up, other_down]: &[Dense; 2]) -> f64 {
    let (rank, other_rank) = (up.columns, other_up.columns);
    let mut ups = vec![0.0f64; rank * other_rank];
    for (row, other) in up
        .values
        .chunks_exact(rank.max(1))
        .zip(other_up.values.chunks_exact(other_rank.max(1)))
    {
        for (i, x) in row.iter().enumerate() {
            let sums = &mut ups[i * other_rank..(i + 1) * other_rank];
            sums.iter_mut()
                .zip(other)
                .for_each(|(sum, y)| *sum += f64::from(*x) * f64::from(*y));
        }
    }
    let columns = down.columns.max(1);
    let mut total = 0.0;
    for (i, row) in down.values.chunks_exact(columns).enumerate() {
        for (j, other) in other_down.values.chunks_exact(columns).enumerate() {
            let dot: f64 = row
                .iter()
                .zip(other)
                .map(|(x, y)| f64::from(*x) * f64::from(*y))
                .sum();
            total += ups[i * other_rank + j] * dot;
        }
    }
    total
}
