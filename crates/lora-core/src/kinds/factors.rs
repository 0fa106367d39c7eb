//! What an adapter of one layer consists of, wherever that is.

use std::ops::Index;

use burn::module::{Devices, Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{DType, Device, Tensor};

use crate::files::host::HostTensor;
use crate::kinds::parts::{DIFF, Dim, Kind, LOHA, LORA_A, LORA_B, Part, SIDES, WHOLE};

/// The parts of one adapter of one layer, in the order of its kind's table.
///
/// `T` is a parameter in a model, a tensor on the host, or a reference into a file. Every part that its kind needs is
/// there, and no other: so indexing with such a part finds it.
#[derive(Debug, Clone, PartialEq)]
pub struct Factors<T> {
    kind: Kind,
    parts: Vec<(Part, T)>,
}

/// One side of a Kronecker product.
#[derive(Debug, Clone, PartialEq)]
pub enum Side<T> {
    /// The matrix itself.
    Full(T),
    /// A product of rank `r`.
    Product(T, T),
}

impl<T> Factors<T> {
    /// A low-rank product: the down projection `[r, in]` and the up projection `[out, r]`.
    pub fn lora(lora_a: T, lora_b: T) -> Self {
        Self::of(Kind::Lora, [(LORA_A, lora_a), (LORA_B, lora_b)])
    }

    /// The element-wise product of two low-rank products, each `[out, r]` and `[r, in]`.
    pub fn loha([w1_a, w1_b]: [T; 2], [w2_a, w2_b]: [T; 2]) -> Self {
        let parts = [w1_a, w1_b, w2_a, w2_b];
        Self::of(Kind::Loha, LOHA.into_iter().zip(parts))
    }

    /// The Kronecker product of the outer factor `[a, b]` and the inner one `[out / a, in / b]`.
    pub fn lokr(w1: Side<T>, w2: Side<T>) -> Self {
        let mut parts = Vec::new();
        for ([full, left, right], side) in SIDES.into_iter().zip([w1, w2]) {
            match side {
                Side::Full(part) => parts.push((full, part)),
                Side::Product(a, b) => parts.extend([(left, a), (right, b)]),
            }
        }
        Self::of(Kind::Lokr, parts)
    }

    /// The change itself, `[out, in]`.
    pub fn diff(change: T) -> Self {
        Self::of(Kind::Diff, [(DIFF, change)])
    }

    /// In place of the parameter: a value of its own.
    pub fn whole(value: T) -> Self {
        Self::of(Kind::Whole, [(WHOLE, value)])
    }

    fn of(kind: Kind, parts: impl IntoIterator<Item = (Part, T)>) -> Self {
        Self {
            kind,
            parts: parts.into_iter().collect(),
        }
    }

    /// The parts of an adapter of this kind, each of which `take` is asked for by its row in the table.
    ///
    /// # Errors
    /// The row of a part that the kind needs and `take` does not have.
    pub fn collect(kind: Kind, mut take: impl FnMut(&Part) -> Option<T>) -> Result<Self, Part> {
        let mut factors = Self::of(kind, []);
        for part in kind.parts() {
            if !factors.has_instead(part)
                && let Some(value) = take(part)
            {
                factors.parts.push((*part, value));
            }
        }
        match kind.missing(|part| factors.get(*part).is_some()) {
            None => Ok(factors),
            Some(part) => Err(part),
        }
    }

    /// With an optional part of the kind, in place of the one that was there; a part of another kind changes nothing.
    #[must_use]
    pub fn with(mut self, part: Part, value: T) -> Self {
        let table = self.kind.parts();
        let Some(place) = table.iter().position(|row| row.name == part.name) else {
            return self;
        };
        if self.has_instead(&part) {
            return self;
        }
        self.parts.retain(|(own, _)| own.name != part.name);
        let before = |(own, _): &&(Part, T)| table[..place].iter().any(|row| row.name == own.name);
        let at = self.parts.iter().filter(before).count();
        self.parts.insert(at, (table[place], value));
        self
    }

    /// Without an optional part; parts that the kind needs stay.
    #[must_use]
    pub fn without(mut self, part: Part) -> Self {
        self.parts
            .retain(|(own, _)| own.name != part.name || own.needed);
        self
    }

    fn has_instead(&self, part: &Part) -> bool {
        let mut parts = self.parts.iter();
        parts.any(|(own, _)| Some(own.name) == part.instead_of)
    }

    /// Which kind this is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// A part, if it is there.
    pub fn get(&self, part: Part) -> Option<&T> {
        let mut parts = self.parts.iter();
        parts.find_map(|(own, value)| (own.name == part.name).then_some(value))
    }

    /// Every part that is there, in the order of the table.
    pub fn iter(&self) -> impl Iterator<Item = (Part, &T)> {
        self.parts.iter().map(|(part, value)| (*part, value))
    }

    /// The same, to be changed.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (Part, &mut T)> {
        self.parts.iter_mut().map(|(part, value)| (*part, value))
    }

    /// Turns every part into something else.
    pub fn map<U>(self, mut f: impl FnMut(Part, T) -> U) -> Factors<U> {
        let parts = self.parts.into_iter();
        Factors {
            kind: self.kind,
            parts: parts.map(|(part, value)| (part, f(part, value))).collect(),
        }
    }

    /// As [`map`](Self::map), where that can fail.
    ///
    /// # Errors
    /// The first error of `f`.
    pub fn try_map<U, E>(
        self,
        mut f: impl FnMut(Part, T) -> Result<U, E>,
    ) -> Result<Factors<U>, E> {
        let parts = self.parts.into_iter();
        Ok(Factors {
            kind: self.kind,
            parts: parts
                .map(|(part, value)| Ok((part, f(part, value)?)))
                .collect::<Result<_, E>>()?,
        })
    }

    /// The same factors, borrowed.
    pub fn as_ref(&self) -> Factors<&T> {
        Factors {
            kind: self.kind,
            parts: self.iter().collect(),
        }
    }

    /// Both products of a LoHa, each with its left and right factor; `None` for another kind.
    pub fn products(&self) -> Option<[[&T; 2]; 2]> {
        let [w1_a, w1_b, w2_a, w2_b] = LOHA.map(|part| self.get(part));
        Some([[w1_a?, w1_b?], [w2_a?, w2_b?]])
    }

    /// Both sides of a LoKr; `None` for another kind.
    pub fn sides(&self) -> Option<[Side<&T>; 2]> {
        let side = |[full, left, right]: [Part; 3]| match self.get(full) {
            Some(full) => Some(Side::Full(full)),
            None => Some(Side::Product(self.get(left)?, self.get(right)?)),
        };
        let [w1, w2] = SIDES;
        Some([side(w1)?, side(w2)?])
    }

    /// The part whose rows are the rank, where one shows it: a LoKr of two full matrices has none. Where there are two, it is
    /// the first product's of a LoHa and the inner matrix's of a LoKr, as in LyCORIS.
    pub fn rank_part(&self) -> Option<&T> {
        let mut ranked = self.parts.iter().filter(|(part, _)| part.has(0, Dim::Rank));
        let (_, value) = match self.kind {
            Kind::Lokr => ranked.next_back(),
            _ => ranked.next(),
        }?;
        Some(value)
    }

    /// Outputs and inputs of the change, from rows and columns of its parts; saturating.
    pub fn size(&self, size: impl Fn(&T) -> [usize; 2]) -> [usize; 2] {
        if let Some(whole) = self.get(WHOLE) {
            return size(whole);
        }
        if let Some(sides) = self.sides() {
            let [[a, b], [c, d]] = sides.map(|side| side.size(|part| size(part)));
            return [a.saturating_mul(c), b.saturating_mul(d)];
        }
        let length = |axis: usize, dim: Dim| {
            let part = self.parts.iter().find(|(part, _)| part.has(axis, dim));
            part.map_or(0, |(_, value)| size(value)[axis])
        };
        [length(0, Dim::Out), length(1, Dim::In)]
    }
}

impl<T> Side<T> {
    /// What it is stored as, from left to right.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        let (first, second) = match self {
            Self::Full(full) => (full, None),
            Self::Product(left, right) => (left, Some(right)),
        };
        std::iter::once(first).chain(second)
    }

    /// Rows and columns of the matrix, from those of what it is stored as.
    pub fn size(&self, size: impl Fn(&T) -> [usize; 2]) -> [usize; 2] {
        match self {
            Self::Full(full) => size(full),
            Self::Product(left, right) => [size(left)[0], size(right)[1]],
        }
    }
}

impl<T: Clone> Side<&T> {
    /// The same side, of copies.
    pub fn cloned(self) -> Side<T> {
        match self {
            Side::Full(full) => Side::Full(full.clone()),
            Side::Product(left, right) => Side::Product(left.clone(), right.clone()),
        }
    }
}

impl<T> Index<Part> for Factors<T> {
    type Output = T;

    /// # Panics
    /// If this kind of adapter need not have the part.
    fn index(&self, part: Part) -> &T {
        match self.get(part) {
            Some(value) => value,
            None => panic!("{:?} has no `{}`", self.kind, part.name),
        }
    }
}

impl Factors<HostTensor> {
    /// Rank, where a tensor shows it: a LoKr of two full matrices has none.
    pub fn rank(&self) -> Option<usize> {
        self.rank_part()?.shape.first().copied()
    }
}

/// The layer that an adapter is computed for.
pub(crate) struct Layer<const D: usize> {
    /// Input, `[..., in]`.
    pub(crate) x: Tensor<D>,
    /// Weight without any adapter, `[in, out]`.
    pub(crate) base: Tensor<2>,
    /// Bias, `[out]`.
    pub(crate) bias: Option<Tensor<1>>,
    /// Dropout of the input, as a factor of every element.
    pub(crate) mask: Option<Tensor<D>>,
}

/// A part of an adapter in a model.
#[derive(Debug, Clone)]
pub(crate) enum Factor {
    /// A convolution's kernel is flattened into the columns.
    Matrix(Param<Tensor<2>>),
    Vector(Param<Tensor<1>>),
}

/// Runs `$body` for the parameter of whatever rank.
macro_rules! each {
    ($factor:expr, $param:ident => $body:expr) => {
        match $factor {
            Factor::Matrix($param) => $body,
            Factor::Vector($param) => $body,
        }
    };
    ($factor:expr, move $param:ident => $body:expr) => {
        match $factor {
            Factor::Matrix($param) => Factor::Matrix($body),
            Factor::Vector($param) => Factor::Vector($body),
        }
    };
}

impl Factor {
    /// The values; a vector is one row.
    pub(crate) fn matrix(&self) -> Tensor<2> {
        match self {
            Self::Matrix(part) => part.val(),
            Self::Vector(part) => part.val().unsqueeze(),
        }
    }

    /// The values, row by row.
    pub(crate) fn vector(&self) -> Tensor<1> {
        match self {
            Self::Matrix(part) => part.val().flatten(0, 1),
            Self::Vector(part) => part.val(),
        }
    }

    pub(crate) fn dtype(&self) -> DType {
        each!(self, part => part.val().dtype())
    }

    pub(crate) fn set_require_grad(self, required: bool) -> Self {
        each!(self, move part => part.set_require_grad(required))
    }
}

impl Module for Factor {
    fn collect_devices(&self, devices: Devices) -> Devices {
        each!(self, part => part.collect_devices(devices))
    }

    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        each!(self, part => part.visit(visitor));
    }

    fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
        each!(self, move part => Module::map(part, mapper)) // `Param::map` would drop what is attached
    }

    fn fork(self, device: &Device) -> Self {
        each!(self, move part => part.fork(device))
    }

    fn to_device(self, device: &Device) -> Self {
        each!(self, move part => part.to_device(device))
    }

    fn train(self) -> Self {
        each!(self, move part => part.train())
    }

    fn valid(&self) -> Self {
        each!(self, move part => part.valid())
    }

    fn materialize(self) -> Self {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds::parts::{INITIAL_A, LORA_BIAS, MAGNITUDE};

    fn collect(kind: Kind, names: &[&'static str]) -> Result<Vec<&'static str>, &'static str> {
        let found = |part: &Part| names.iter().find(|name| **name == part.name).copied();
        match Factors::collect(kind, found) {
            Ok(factors) => Ok(factors.iter().map(|(_, name)| *name).collect()),
            Err(missing) => Err(missing.name),
        }
    }

    #[test]
    fn factors_are_complete_and_in_the_order_of_the_table() {
        assert_eq!(collect(Kind::Lora, &["lora_A"]), Err("lora_B"));
        let lora = ["lora_B_bias", "lora_B", "lora_A"];
        let sorted = vec!["lora_A", "lora_B", "lora_B_bias"];
        assert_eq!(collect(Kind::Lora, &lora), Ok(sorted));
        let factors = Factors::lora(1, 2).with(LORA_BIAS, 4).with(MAGNITUDE, 3);
        let factors = factors.with(DIFF, 9).without(LORA_A).without(INITIAL_A);
        assert_eq!(factors, factors.clone().with(LORA_A, 1));
        assert_eq!(
            factors.iter().map(|(_, v)| *v).collect::<Vec<_>>(),
            [1, 2, 3, 4]
        );
    }

    #[test]
    fn a_side_of_a_lokr_is_a_matrix_or_both_of_its_factors() {
        let w1 = "lokr_w1";
        assert_eq!(collect(Kind::Lokr, &[w1]), Err("lokr_w2"));
        assert_eq!(collect(Kind::Lokr, &[w1, "lokr_w2_a"]), Err("lokr_w2_b"));
        assert_eq!(
            collect(Kind::Lokr, &[w1, "lokr_w1_a", "lokr_w2_a", "lokr_w2_b"]),
            Ok(vec![w1, "lokr_w2_a", "lokr_w2_b"])
        );
        let size = |factors: Factors<[usize; 2]>| factors.size(|size| *size);
        let right = Side::Product([3, 2], [2, 4]);
        assert_eq!(size(Factors::lokr(Side::Full([2, 5]), right)), [6, 20]);
        assert_eq!(size(Factors::lora([2, 5], [7, 2])), [7, 5]);
    }

    // LyCORIS `loha.py`, `lokr.py`, `make_module_from_state_dict`; ComfyUI divides alpha by the same.
    #[test]
    fn of_two_ranks_the_one_counts_that_lycoris_divides_alpha_by() {
        let loha = Factors::loha([[7, 2], [2, 5]], [[7, 3], [3, 5]]);
        assert_eq!(loha.rank_part(), Some(&[2, 5]));
        let [w1, w2] = [2, 3].map(|rank| Side::Product([4, rank], [rank, 5]));
        assert_eq!(Factors::lokr(w1, w2).rank_part(), Some(&[3, 5]));
    }
}
