//! LoHa and LoKr: the dense change they describe, and the LoRA that describes the same one.
//!
//! Source: LyCORIS f49d30d6 (`loha.py`, `lokr.py`), linear layers only. Products of Kronecker products,
//! `kron(a, b) * kron(c, d) = kron(a * c, b * d)`, turn both into a low-rank form without approximation:
//!
//! | change | up | down | rank |
//! |---|---|---|---|
//! | LoHa | rows `kron(a1[i], a2[i])` | columns `kron(b1[j], b2[j])` | `r1 * r2` |
//! | LoKr, both sides factored | `kron(a1, a2)` | `kron(b1, b2)` | `r1 * r2` |
//! | LoKr, `w2` factored | `kron(w1, a2)` | `kron(I, b2)` | columns of `w1` times `r2` |
//! | LoKr, `w1` factored | `kron(a1, I)` | `kron(b1, w2)` | `r1` times rows of `w2` |
//! | LoKr, nothing factored | none that is smaller than the dense change | | |

use std::ops::Range;

use lora_core::files::host::{Dtype, HostTensor};
use lora_core::kinds::Side;

use super::error::LoraFormatError;
use super::rows::Rows;
use super::tensor::TensorRef;
use super::{Factors, ModuleUpdate};

/// `kron(w1, w2)`, of which one module may be some rows.
#[derive(Debug, Clone)]
pub struct LoKr {
    /// The outer factor.
    pub w1: Side<TensorRef>,
    /// The inner factor.
    pub w2: Side<TensorRef>,
    /// Rows of the product that belong to this module; `None` for all.
    pub rows: Option<Rows>,
}

fn select(side: &Side<TensorRef>, rows: &Rows) -> Side<TensorRef> {
    match side {
        Side::Full(tensor) => Side::Full(tensor.select(rows)),
        Side::Product(left, right) => Side::Product(left.select(rows), right.clone()),
    }
}

fn load(side: &Side<TensorRef>) -> Result<Dense, LoraFormatError> {
    match side {
        Side::Full(tensor) => Dense::load(tensor),
        Side::Product(left, right) => Ok(Dense::load(left)?.times(&Dense::load(right)?)),
    }
}

impl LoKr {
    pub(super) fn size(&self) -> (usize, usize) {
        let (out, input) = self.whole();
        let selected = self.rows.as_ref();
        (selected.map_or(out, Rows::count), input)
    }

    /// Size of the product.
    pub(super) fn whole(&self) -> (usize, usize) {
        let [[a, b], [c, d]] = [&self.w1, &self.w2].map(|side| side.size(TensorRef::axes));
        (a.saturating_mul(c), b.saturating_mul(d))
    }

    pub(super) fn tensors(&self) -> Vec<&TensorRef> {
        self.w1.iter().chain(self.w2.iter()).collect()
    }

    /// Some of the rows: of `w1`, or, if that would `cut` a row of it, of the product.
    pub(super) fn select(&self, wanted: &Rows, cut: bool) -> Self {
        let [inner, _] = self.w2.size(TensorRef::axes);
        if cut || self.rows.is_some() {
            let (out, _) = self.whole();
            let current = self.rows.clone().unwrap_or_else(|| Rows::all(out));
            let rows = current.select(wanted);
            return Self {
                rows: Some(rows).filter(|rows| *rows != Rows::all(out)),
                ..self.clone()
            };
        }
        let outer = wanted
            .ranges()
            .iter()
            .map(|rows| rows.start / inner..rows.end / inner);
        Self {
            w1: select(&self.w1, &Rows::of(outer)),
            ..self.clone()
        }
    }
}

/// The change without its scale, `[out, in]`.
pub(super) fn dense(factors: &Factors) -> Result<Vec<f32>, LoraFormatError> {
    Ok(match factors {
        Factors::LowRank { down, up } => Dense::load(up)?.times(&Dense::load(down)?).values,
        Factors::LoHa { a, b } => {
            let mut product = Dense::load(&a[0])?.times(&Dense::load(&b[0])?).values;
            let second = Dense::load(&a[1])?.times(&Dense::load(&b[1])?).values;
            product.iter_mut().zip(second).for_each(|(x, y)| *x *= y);
            product
        }
        Factors::LoKr(lokr) => {
            let product = load(&lokr.w1)?.kron(&load(&lokr.w2)?);
            match &lokr.rows {
                None => product.values,
                Some(rows) => product.rows(rows).values,
            }
        }
        Factors::Full(tensor) | Factors::Replace(tensor) => tensor.load_f32()?,
    })
}

/// The same update with low-rank factors: itself, or what the table above says if that is smaller than the dense change.
///
/// The new factors are computed whenever they are loaded.
pub(super) fn to_low_rank(update: &ModuleUpdate) -> Option<ModuleUpdate> {
    let factors = update.factors.as_ref()?;
    if let Factors::LowRank { .. } = factors {
        return Some(update.clone());
    }
    let (out, input) = update.size()?;
    let rank = expanded_rank(factors)?;
    if rank * (out + input) >= out * input {
        return None;
    }
    let name = |side: &str| format!("{side} of {}", update.tensors()[0].key());
    let (for_down, for_up) = (factors.clone(), factors.clone());
    let down = TensorRef::computed(
        name("lora_down"),
        vec![rank, input],
        Dtype::F32,
        move || expanded_down(&for_down).map(Dense::into_tensor),
    );
    let up = TensorRef::computed(name("lora_up"), vec![out, rank], Dtype::F32, move || {
        expanded_up(&for_up).map(Dense::into_tensor)
    });
    Some(ModuleUpdate {
        factors: Some(Factors::LowRank { down, up }),
        alpha: None,
        ..update.clone()
    })
}

/// The same update with the dense change as its only factor.
pub(super) fn to_full(update: &ModuleUpdate) -> Option<ModuleUpdate> {
    let factors = update.factors.clone()?;
    let (out, input) = update.size()?;
    let tensor = match factors {
        Factors::Replace(_) => return None,
        Factors::Full(tensor) => tensor,
        other => {
            let name = format!("change by {}", update.tensors()[0].key());
            TensorRef::computed(name, vec![out, input], Dtype::F32, move || {
                Ok(HostTensor::from_f32([out, input], &dense(&other)?))
            })
        }
    };
    Some(ModuleUpdate {
        factors: Some(Factors::Full(tensor)),
        alpha: None,
        ..update.clone()
    })
}

fn expanded_rank(factors: &Factors) -> Option<usize> {
    match factors {
        Factors::LowRank { down, .. } => Some(down.size().0),
        Factors::LoHa { b, .. } => Some(b[0].size().0 * b[1].size().0),
        Factors::LoKr(LoKr { w1, w2, .. }) => match (w1, w2) {
            (Side::Product(_, b1), Side::Product(_, b2)) => Some(b1.size().0 * b2.size().0),
            (Side::Full(w1), Side::Product(_, b2)) => Some(w1.size().1 * b2.size().0),
            (Side::Product(_, b1), Side::Full(w2)) => Some(b1.size().0 * w2.size().0),
            (Side::Full(_), Side::Full(_)) => None,
        },
        Factors::Full(_) | Factors::Replace(_) => None,
    }
}

fn expanded_down(factors: &Factors) -> Result<Dense, LoraFormatError> {
    match factors {
        Factors::LoHa { b, .. } => {
            let (first, second) = (
                Dense::load(&b[0])?.transposed(),
                Dense::load(&b[1])?.transposed(),
            );
            Ok(first.kron_rows(&second).transposed())
        }
        Factors::LoKr(LoKr { w1, w2, .. }) => match (w1, w2) {
            (Side::Product(_, b1), Side::Product(_, b2)) => {
                Ok(Dense::load(b1)?.kron(&Dense::load(b2)?))
            }
            (Side::Full(w1), Side::Product(_, b2)) => {
                Ok(Dense::identity(w1.size().1).kron(&Dense::load(b2)?))
            }
            (Side::Product(_, b1), w2) => Ok(Dense::load(b1)?.kron(&load(w2)?)),
            (Side::Full(_), Side::Full(_)) => load(w2),
        },
        Factors::LowRank { down: tensor, .. }
        | Factors::Full(tensor)
        | Factors::Replace(tensor) => Dense::load(tensor),
    }
}

fn expanded_up(factors: &Factors) -> Result<Dense, LoraFormatError> {
    match factors {
        Factors::LoHa { a, .. } => Ok(Dense::load(&a[0])?.kron_rows(&Dense::load(&a[1])?)),
        Factors::LoKr(LoKr { w1, w2, rows }) => {
            let product = match (w1, w2) {
                (Side::Product(a1, _), Side::Product(a2, _)) => {
                    Dense::load(a1)?.kron(&Dense::load(a2)?)
                }
                (w1, Side::Product(a2, _)) => load(w1)?.kron(&Dense::load(a2)?),
                (Side::Product(a1, _), w2) => {
                    Dense::load(a1)?.kron(&Dense::identity(w2.size(TensorRef::axes)[0]))
                }
                (w1, _) => load(w1)?,
            };
            Ok(match rows {
                None => product,
                Some(rows) => product.rows(rows),
            })
        }
        Factors::LowRank { up: tensor, .. } | Factors::Full(tensor) | Factors::Replace(tensor) => {
            Dense::load(tensor)
        }
    }
}

/// A matrix in memory, row-major.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Dense {
    pub rows: usize,
    pub columns: usize,
    pub values: Vec<f32>,
}

impl Dense {
    pub(super) fn load(tensor: &TensorRef) -> Result<Self, LoraFormatError> {
        let (rows, columns) = tensor.size();
        let values = tensor.load_f32()?;
        Ok(Self {
            rows,
            columns,
            values,
        })
    }

    fn identity(size: usize) -> Self {
        let mut values = vec![0.0; size * size];
        (0..size).for_each(|i| values[i * size + i] = 1.0);
        Self {
            rows: size,
            columns: size,
            values,
        }
    }

    fn into_tensor(self) -> HostTensor {
        HostTensor::from_f32([self.rows, self.columns], &self.values)
    }

    /// Matrix product.
    pub(super) fn times(&self, right: &Self) -> Self {
        let columns = right.columns;
        let mut values = vec![0.0; self.rows * columns];
        let rows = self.values.chunks_exact(self.columns.max(1));
        for (left, out) in rows.zip(values.chunks_exact_mut(columns.max(1))) {
            for (x, row) in left.iter().zip(right.values.chunks_exact(columns.max(1))) {
                out.iter_mut().zip(row).for_each(|(out, y)| *out += x * y);
            }
        }
        Self {
            rows: self.rows,
            columns,
            values,
        }
    }

    /// Kronecker product: `[i * c + k, j * d + l] = self[i, j] * right[k, l]`.
    pub(super) fn kron(&self, right: &Self) -> Self {
        let mut values = Vec::with_capacity(self.values.len() * right.values.len());
        for left in self.values.chunks_exact(self.columns.max(1)) {
            for right in right.values.chunks_exact(right.columns.max(1)) {
                for x in left {
                    values.extend(right.iter().map(|y| x * y));
                }
            }
        }
        Self {
            rows: self.rows * right.rows,
            columns: self.columns * right.columns,
            values,
        }
    }

    /// Kronecker product of each row with the same row of `right`.
    fn kron_rows(&self, right: &Self) -> Self {
        let mut values = Vec::with_capacity(self.values.len() * right.columns);
        let rows = self.values.chunks_exact(self.columns.max(1));
        for (left, right) in rows.zip(right.values.chunks_exact(right.columns.max(1))) {
            for x in left {
                values.extend(right.iter().map(|y| x * y));
            }
        }
        Self {
            rows: self.rows,
            columns: self.columns * right.columns,
            values,
        }
    }

    fn transposed(&self) -> Self {
        let column = |j| (0..self.rows).map(move |i| self.values[i * self.columns + j]);
        Self {
            rows: self.columns,
            columns: self.rows,
            values: (0..self.columns).flat_map(column).collect(),
        }
    }

    fn rows(&self, wanted: &Rows) -> Self {
        let columns = self.columns;
        let span = |rows: &Range<usize>| &self.values[rows.start * columns..rows.end * columns];
        Self {
            rows: wanted.count(),
            columns,
            values: wanted.ranges().iter().flat_map(span).copied().collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(rows: usize, columns: usize, values: &[f32]) -> TensorRef {
        TensorRef::host("w", HostTensor::from_f32([rows, columns], values))
    }

    #[test]
    fn the_kronecker_product_is_numpy_s() {
        let left = Dense {
            rows: 1,
            columns: 2,
            values: vec![1.0, 2.0],
        };
        let right = Dense {
            rows: 2,
            columns: 2,
            values: vec![1.0, 10.0, 100.0, 1000.0],
        };
        assert_eq!(
            left.kron(&right).values,
            [1.0, 10.0, 2.0, 20.0, 100.0, 1000.0, 200.0, 2000.0]
        );
    }

    #[test]
    fn two_full_factors_have_no_low_rank_form() {
        let w1 = Side::Full(matrix(2, 2, &[1.0, 2.0, 3.0, 4.0]));
        let w2 = Side::Full(matrix(1, 1, &[3.0]));
        let lokr = Factors::LoKr(LoKr { w1, w2, rows: None });
        assert_eq!(dense(&lokr).expect("in memory"), [3.0, 6.0, 9.0, 12.0]);
        assert!(to_low_rank(&ModuleUpdate::of(lokr, 1.0)).is_none());
    }

    #[test]
    fn rows_are_cut_from_the_outer_factor_or_the_product() {
        let w1 = Side::Full(matrix(4, 1, &[1.0, 2.0, 3.0, 4.0]));
        let w2 = Side::Full(matrix(2, 1, &[1.0, 10.0]));
        let lokr = LoKr { w1, w2, rows: None };
        let outer = lokr.select(&Rows::span(2..6), false);
        assert!(outer.rows.is_none());
        assert_eq!(
            dense(&Factors::LoKr(outer)).expect("in memory"),
            [2.0, 20.0, 3.0, 30.0]
        );
        let cut = lokr
            .select(&Rows::span(1..4), true)
            .select(&Rows::span(1..3), true);
        assert_eq!(dense(&Factors::LoKr(cut)).expect("in memory"), [2.0, 20.0]);
    }
}
