//! The kinds of adapter, as what they consist of and what they add to a weight.
//!
//! | kind | change of the weight `[out, in]` | source |
//! |---|---|---|
//! | LoRA | `B A`, with `A: [r, in]`, `B: [out, r]`, less the `B₀ A₀` of its start if that is a part of the weight | Hu et al. 2021, arXiv:2106.09685 |
//! | LoHa | `(w1_a w1_b) ⊙ (w2_a w2_b)`, the `a` `[out, r]`, the `b` `[r, in]` | Hyeon-Woo et al. 2021, arXiv:2108.06098 |
//! | LoKr | `kron(w1, w2)`, either side a matrix or a product of rank `r` | Yeh et al. 2023, arXiv:2309.14859 |
//! | whole | the parameter itself, trained in full (`modules_to_save`, `bias`) | |
//!
//! The same type holds them in a model (matrices are `Param<Tensor<2>>`, a convolution's kernel flattened) and on the host
//! (`HostTensor`s in the shapes that PEFT's files have). Names are PEFT's.

use burn::module::Param;
use burn::tensor::Tensor;

use crate::files::host::HostTensor;
use crate::peft::config::{InitLoraWeights, PeftType};

/// Name of the down projection, `[r, in]`.
pub(crate) const LORA_A: &str = "lora_A";
/// Name of the up projection, `[out, r]`.
pub(crate) const LORA_B: &str = "lora_B";
/// Name of the DoRA magnitude, `[out]`.
pub(crate) const MAGNITUDE: &str = "lora_magnitude_vector";
/// Name of the bias of the up projection, `[out]`.
pub(crate) const LORA_BIAS: &str = "lora_B_bias";
/// Name of the down projection that a LoRA started from, `[r, in]`.
pub(crate) const INITIAL_A: &str = "initial_A";
/// Name of the up projection that a LoRA started from, `[out, r]`.
pub(crate) const INITIAL_B: &str = "initial_B";
/// Name of a parameter that is trained in full.
pub(crate) const WHOLE: &str = "whole";

/// What an adapter of one layer consists of: matrices `M` and vectors `V`.
#[derive(Debug, Clone, PartialEq)]
pub enum Factors<M, V = M> {
    /// A low-rank product, with what belongs to DoRA and `lora_bias`.
    Lora(LoraFactors<M, V>),
    /// The element-wise product of two low-rank products.
    Loha {
        /// First product: `[out, r]` and `[r, in]`.
        w1: [M; 2],
        /// Second product, likewise.
        w2: [M; 2],
    },
    /// The Kronecker product of two matrices.
    Lokr {
        /// Outer factor, `[a, b]`.
        w1: Side<M>,
        /// Inner factor, `[out / a, in / b]`.
        w2: Side<M>,
    },
    /// In place of the parameter: its own values, trained. Flat in a model.
    Whole(V),
}

/// Factors of a LoRA.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraFactors<M, V = M> {
    /// Down projection, `[r, in]`; of a convolution `[r, in, kernel...]`, of an embedding `[r, entries]`.
    pub lora_a: M,
    /// Up projection, `[out, r]`; of a convolution `[out, r, 1...]`.
    pub lora_b: M,
    /// DoRA magnitude, `[out]`; of a convolution `[1, out, 1...]`.
    pub magnitude: Option<V>,
    /// Bias of the up projection, `[out]`.
    pub bias: Option<V>,
    /// What the factors started from, if they were split off the base weight.
    pub initial: Option<Initial<M>>,
}

/// The part of the base weight that a LoRA started as; it is not trained, and the update is the difference from it.
#[derive(Debug, Clone, PartialEq)]
pub struct Initial<M> {
    /// How it was split off.
    pub method: InitLoraWeights,
    /// Down projection, `[r, in]`.
    pub lora_a: M,
    /// Up projection, `[out, r]`.
    pub lora_b: M,
}

/// One side of a Kronecker product.
#[derive(Debug, Clone, PartialEq)]
pub enum Side<M> {
    /// The matrix itself.
    Full(M),
    /// A product of rank `r`.
    Product(M, M),
}

/// Turns every part of some factors into something else.
pub(crate) trait MapParts<M, V> {
    type Matrix;
    type Vector;
    fn matrix(&mut self, name: &'static str, part: M) -> Self::Matrix;
    fn vector(&mut self, name: &'static str, part: V) -> Self::Vector;
}

impl<M, V> Factors<M, V> {
    /// The kind, if it changes a weight.
    pub fn peft_type(&self) -> Option<PeftType> {
        match self {
            Self::Lora(_) => Some(PeftType::Lora),
            Self::Loha { .. } => Some(PeftType::Loha),
            Self::Lokr { .. } => Some(PeftType::Lokr),
            Self::Whole(_) => None,
        }
    }

    /// The factors, if this is a LoRA.
    pub fn as_lora(&self) -> Option<&LoraFactors<M, V>> {
        match self {
            Self::Lora(lora) => Some(lora),
            _ => None,
        }
    }

    pub(crate) fn map<F: MapParts<M, V>>(self, f: &mut F) -> Factors<F::Matrix, F::Vector> {
        match self {
            Self::Lora(lora) => Factors::Lora(LoraFactors {
                lora_a: f.matrix(LORA_A, lora.lora_a),
                lora_b: f.matrix(LORA_B, lora.lora_b),
                magnitude: lora.magnitude.map(|part| f.vector(MAGNITUDE, part)),
                bias: lora.bias.map(|part| f.vector(LORA_BIAS, part)),
                initial: lora.initial.map(|initial| Initial {
                    method: initial.method,
                    lora_a: f.matrix(INITIAL_A, initial.lora_a),
                    lora_b: f.matrix(INITIAL_B, initial.lora_b),
                }),
            }),
            Self::Loha {
                w1: [w1_a, w1_b],
                w2: [w2_a, w2_b],
            } => Factors::Loha {
                w1: [f.matrix("hada_w1_a", w1_a), f.matrix("hada_w1_b", w1_b)],
                w2: [f.matrix("hada_w2_a", w2_a), f.matrix("hada_w2_b", w2_b)],
            },
            Self::Lokr { w1, w2 } => Factors::Lokr {
                w1: w1.map(["lokr_w1", "lokr_w1_a", "lokr_w1_b"], f),
                w2: w2.map(["lokr_w2", "lokr_w2_a", "lokr_w2_b"], f),
            },
            Self::Whole(part) => Factors::Whole(f.vector(WHOLE, part)),
        }
    }

    /// The same factors, borrowed.
    pub(crate) fn as_ref(&self) -> Factors<&M, &V> {
        match self {
            Self::Lora(lora) => Factors::Lora(LoraFactors {
                lora_a: &lora.lora_a,
                lora_b: &lora.lora_b,
                magnitude: lora.magnitude.as_ref(),
                bias: lora.bias.as_ref(),
                initial: lora.initial.as_ref().map(|initial| Initial {
                    method: initial.method,
                    lora_a: &initial.lora_a,
                    lora_b: &initial.lora_b,
                }),
            }),
            Self::Loha {
                w1: [w1_a, w1_b],
                w2: [w2_a, w2_b],
            } => Factors::Loha {
                w1: [w1_a, w1_b],
                w2: [w2_a, w2_b],
            },
            Self::Lokr { w1, w2 } => Factors::Lokr {
                w1: w1.as_ref(),
                w2: w2.as_ref(),
            },
            Self::Whole(part) => Factors::Whole(part),
        }
    }
}

impl<M> Side<M> {
    fn map<V, F: MapParts<M, V>>(self, names: [&'static str; 3], f: &mut F) -> Side<F::Matrix> {
        let [full, left, right] = names;
        match self {
            Self::Full(part) => Side::Full(f.matrix(full, part)),
            Self::Product(a, b) => Side::Product(f.matrix(left, a), f.matrix(right, b)),
        }
    }

    fn as_ref(&self) -> Side<&M> {
        match self {
            Self::Full(part) => Side::Full(part),
            Self::Product(a, b) => Side::Product(a, b),
        }
    }
}

impl<T> Factors<T> {
    /// Name and value of every part, where matrices and vectors are of one type.
    pub fn parts(&self) -> Vec<(&'static str, &T)> {
        struct Collect<'a, T>(Vec<(&'static str, &'a T)>);
        impl<'a, T> MapParts<&'a T, &'a T> for Collect<'a, T> {
            type Matrix = ();
            type Vector = ();
            fn matrix(&mut self, name: &'static str, part: &'a T) {
                self.0.push((name, part));
            }
            fn vector(&mut self, name: &'static str, part: &'a T) {
                self.0.push((name, part));
            }
        }
        let mut collect = Collect(Vec::new());
        let _ = self.as_ref().map(&mut collect);
        collect.0
    }
}

impl Factors<HostTensor> {
    /// Rank, where a tensor shows it: a LoKr of two full matrices has none.
    pub fn rank(&self) -> Option<usize> {
        let rows = |tensor: &HostTensor| tensor.shape.first().copied();
        match self {
            Self::Lora(lora) => rows(&lora.lora_a),
            Self::Loha { w1: [_, b], .. }
            | Self::Lokr {
                w2: Side::Product(_, b),
                ..
            }
            | Self::Lokr {
                w1: Side::Product(_, b),
                ..
            } => rows(b),
            Self::Lokr { .. } | Self::Whole(_) => None,
        }
    }
}

/// Factors in a model.
pub(crate) type ParamFactors = Factors<Param<Tensor<2>>, Param<Tensor<1>>>;

impl ParamFactors {
    /// The change of the weight before the scale, `[out, in]`; `None` for a whole parameter.
    pub(crate) fn delta(&self) -> Option<Tensor<2>> {
        let product = |a: &Param<Tensor<2>>, b: &Param<Tensor<2>>| a.val().matmul(b.val());
        match self {
            Self::Lora(lora) => {
                let now = product(&lora.lora_b, &lora.lora_a);
                Some(match &lora.initial {
                    None => now,
                    Some(initial) => now - product(&initial.lora_b, &initial.lora_a),
                })
            }
            Self::Loha {
                w1: [w1_a, w1_b],
                w2: [w2_a, w2_b],
            } => Some(product(w1_a, w1_b) * product(w2_a, w2_b)),
            Self::Lokr { w1, w2 } => Some(kron(w1.val(), w2.val())),
            Self::Whole(_) => None,
        }
    }
}

impl Side<Param<Tensor<2>>> {
    fn val(&self) -> Tensor<2> {
        match self {
            Self::Full(part) => part.val(),
            Self::Product(a, b) => a.val().matmul(b.val()),
        }
    }

    /// `x wᵀ` for `x: [rows, columns of w]`.
    fn apply(&self, x: Tensor<2>) -> Tensor<2> {
        match self {
            Self::Full(part) => x.matmul(part.val().transpose()),
            Self::Product(a, b) => x.matmul(b.val().transpose()).matmul(a.val().transpose()),
        }
    }
}

/// `kron(w1, w2)`: element `[i * c + k, j * d + l]` is `w1[i, j] * w2[k, l]`, for `w2: [c, d]`.
fn kron(w1: Tensor<2>, w2: Tensor<2>) -> Tensor<2> {
    let ([a, b], [c, d]) = (w1.dims(), w2.dims());
    // Outer product as a matmul of a column with a row: no reduction of a broadcast operand in the backward pass.
    w1.reshape([a * b, 1])
        .matmul(w2.reshape([1, c * d]))
        .reshape([a, b, c, d])
        .swap_dims(1, 2)
        .reshape([a * c, b * d])
}

/// `x kron(w1, w2)ᵀ` without the Kronecker product: two small matmuls a row.
///
/// # Shapes
/// - `x`: `[rows, b * d]`; returns `[rows, a * c]`
pub(crate) fn kron_apply(
    x: Tensor<2>,
    w1: &Side<Param<Tensor<2>>>,
    w2: &Side<Param<Tensor<2>>>,
) -> Tensor<2> {
    let [rows, inputs] = x.dims();
    let b = match w1 {
        Side::Full(part) => part.lazy_shape()[1],
        Side::Product(_, right) => right.lazy_shape()[1],
    };
    let inner = w2.apply(x.reshape([rows * b, inputs / b])); // [rows * b, c]
    let c = inner.dims()[1];
    let inner = inner.reshape([rows, b, c]).swap_dims(1, 2);
    let outer = w1.apply(inner.reshape([rows * c, b])); // [rows * c, a]
    let a = outer.dims()[1];
    outer
        .reshape([rows, c, a])
        .swap_dims(1, 2)
        .reshape([rows, a * c])
}
