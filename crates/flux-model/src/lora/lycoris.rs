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
use lora_core::kinds::parts::DIFF;

use super::error::LoraFormatError;
use super::rows::Rows;
use super::tensor::TensorRef;
use super::{Factors, ModuleUpdate};

/// The change without its scale, `[out, in]`; empty if only the bias changes.
pub(super) fn dense(update: &ModuleUpdate) -> Result<Vec<f32>, LoraFormatError> {
    let Some(factors) = &update.factors else {
        return Ok(Vec::new());
    };
    let product = |[a, b]: [&TensorRef; 2]| Ok(Dense::load(a)?.times(&Dense::load(b)?));
    let whole = if let Some((down, up)) = update.pair() {
        product([up, down])?
    } else if let Some([first, second]) = factors.products() {
        let mut whole = product(first)?;
        let second = product(second)?.values;
        whole
            .values
            .iter_mut()
            .zip(second)
            .for_each(|(x, y)| *x *= y);
        whole
    } else if let Some(sides) = factors.sides() {
        let [w1, w2] = sides.map(|side| match side {
            Side::Full(tensor) => Dense::load(tensor),
            Side::Product(a, b) => product([a, b]),
        });
        w1?.kron(&w2?)
    } else {
        return match factors.iter().next() {
            Some((_, change)) => change.load_f32(),
            None => Ok(Vec::new()),
        };
    };
    Ok(match &update.rows {
        None => whole.values,
        Some(rows) => whole.rows(rows).values,
    })
}

/// A factor of a Kronecker product.
#[derive(Clone)]
enum Operand {
    Tensor(TensorRef),
    Identity(usize),
}

impl Operand {
    fn size(&self) -> (usize, usize) {
        match self {
            Self::Tensor(tensor) => tensor.size(),
            Self::Identity(size) => (*size, *size),
        }
    }

    fn load(&self) -> Result<Dense, LoraFormatError> {
        match self {
            Self::Tensor(tensor) => Dense::load(tensor),
            Self::Identity(size) => Ok(Dense::identity(*size)),
        }
    }
}

/// What the up and the down projection of the table above are Kronecker products of.
fn expanded(factors: &Factors) -> Option<[[Operand; 2]; 2]> {
    let tensor = |tensor: &TensorRef| Operand::Tensor(tensor.clone());
    if let Some([[a1, b1], [a2, b2]]) = factors.products() {
        return Some([[a1, a2].map(tensor), [b1, b2].map(tensor)]);
    }
    let [(a1, b1), (a2, b2)] = match factors.sides()? {
        [Side::Full(_), Side::Full(_)] => return None,
        [Side::Full(w1), Side::Product(a2, b2)] => {
            let one = Operand::Identity(w1.size().1);
            [(tensor(w1), one), (tensor(a2), tensor(b2))]
        }
        [Side::Product(a1, b1), Side::Full(w2)] => {
            let one = Operand::Identity(w2.size().0);
            [(tensor(a1), tensor(b1)), (one, tensor(w2))]
        }
        [Side::Product(a1, b1), Side::Product(a2, b2)] => {
            [(tensor(a1), tensor(b1)), (tensor(a2), tensor(b2))]
        }
    };
    Some([[a1, a2], [b1, b2]])
}

/// The same update with low-rank factors: itself, or what the table above says if that is smaller than the dense change.
///
/// The new factors are computed whenever they are loaded.
pub(super) fn to_low_rank(update: &ModuleUpdate) -> Option<ModuleUpdate> {
    if update.pair().is_some() {
        return Some(update.clone());
    }
    let factors = update.factors.as_ref()?;
    let (out, input) = update.size()?;
    let [ups, downs] = expanded(factors)?;
    let rank: usize = ups.iter().map(|operand| operand.size().1).product();
    if rank * (out + input) >= out * input {
        return None;
    }
    let by_element = factors.products().is_some();
    let rows = update.rows.clone();
    let name = |side: &str| format!("{side} of {}", update.tensors()[0].key());
    let compute = move || {
        let (first, second) = (downs[0].load()?, downs[1].load()?);
        Ok(HostTensor::from(match by_element {
            true => first
                .transposed()
                .kron_rows(&second.transposed())
                .transposed(),
            false => first.kron(&second),
        }))
    };
    let down = TensorRef::computed(name("lora_down"), vec![rank, input], Dtype::F32, compute);
    let compute = move || {
        let (first, second) = (ups[0].load()?, ups[1].load()?);
        let whole = match by_element {
            true => first.kron_rows(&second),
            false => first.kron(&second),
        };
        Ok(HostTensor::from(match &rows {
            None => whole,
            Some(rows) => whole.rows(rows),
        }))
    };
    let up = TensorRef::computed(name("lora_up"), vec![out, rank], Dtype::F32, compute);
    Some(ModuleUpdate {
        factors: Some(Factors::lora(down, up)),
        rows: None,
        alpha: None,
        ..update.clone()
    })
}

/// The same update with the dense change as its only factor.
pub(super) fn to_full(update: &ModuleUpdate) -> Option<ModuleUpdate> {
    let factors = update.factors.as_ref()?;
    if update.replacement().is_some() {
        return None;
    }
    let (out, input) = update.size()?;
    let tensor = match factors.get(DIFF) {
        Some(tensor) => tensor.clone(),
        None => {
            let name = format!("change by {}", update.tensors()[0].key());
            let update = update.clone();
            TensorRef::computed(name, vec![out, input], Dtype::F32, move || {
                Ok(HostTensor::from_f32([out, input], &dense(&update)?))
            })
        }
    };
    Some(ModuleUpdate {
        factors: Some(Factors::diff(tensor)),
        rows: None,
        alpha: None,
        ..update.clone()
    })
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

impl From<Dense> for HostTensor {
    fn from(matrix: Dense) -> Self {
        Self::from_f32([matrix.rows, matrix.columns], &matrix.values)
    }
}

#[cfg(test)]
mod tests {
    use super::super::names::Place;
    use super::super::split::split;
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
        let lokr = ModuleUpdate::of(Some(Factors::lokr(w1, w2)), 1.0);
        assert_eq!(dense(&lokr).expect("in memory"), [3.0, 6.0, 9.0, 12.0]);
        assert!(to_low_rank(&lokr).is_none());
    }

    #[test]
    fn rows_are_cut_from_the_outer_factor_or_the_product() {
        let w1 = Side::Full(matrix(4, 1, &[1.0, 2.0, 3.0, 4.0]));
        let w2 = Side::Full(matrix(2, 1, &[1.0, 10.0]));
        let lokr = ModuleUpdate::of(Some(Factors::lokr(w1, w2)), 1.0);
        let cut = |update: &ModuleUpdate, rows: Range<usize>| {
            let place = Place {
                path: String::new(),
                rows: Rows::span(rows),
            };
            split(update, &[place]).remove(0)
        };
        let outer = cut(&lokr, 2..6);
        assert!(outer.rows.is_none());
        assert_eq!(dense(&outer).expect("in memory"), [2.0, 20.0, 3.0, 30.0]);
        let inner = cut(&cut(&lokr, 1..4), 1..3);
        assert_eq!(dense(&inner).expect("in memory"), [2.0, 20.0]);
    }
}
