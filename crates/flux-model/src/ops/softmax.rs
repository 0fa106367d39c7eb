//! Softmax of scaled scores, and what its gradient makes of them: what `attention_composed` does between its products.
//!
//! ```text
//! p = e^(c s - log_sum)    log_sum = ln(sum of e^(c s))    ds = c p (dp - along)
//! ```
//!
//! for a row of scores `s`, with the factor `c`, where `dp` is the gradient of `p`, and `along` the sum of `p dp` of a row. Computed in
//! f32. Nothing is kept and no graph is made; on a GPU each is one kernel.
//!
//! Source: Milakov & Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135.

use burn::tensor::{DType, Tensor};

use crate::layers::packed;

/// `p` in the type of `scores`, and `log_sum`, f32, `[.., 1]`.
pub(super) fn softmax(scores: Tensor<4>, factor: f64) -> (Tensor<4>, Tensor<4>) {
    #[cfg(feature = "cube")]
    if cube::takes(&scores) {
        return cube::softmax(scores, factor);
    }
    let dtype = scores.dtype();
    let scores = scaled(scores, factor);
    let largest = scores.clone().max_dim(3);
    let sum = (scores.clone() - largest.clone()).exp().sum_dim(3);
    let log_sum = largest + sum.log();
    let p = (scores - log_sum.clone()).exp();
    (p.cast(dtype), log_sum)
}

/// `p` and `ds`, in the type of `scores`; `log_sum` and `along` are f32, `[.., 1]`.
pub(super) fn softmax_gradient(
    scores: Tensor<4>,
    log_sum: Tensor<4>,
    dp: Tensor<4>,
    along: Tensor<4>,
    factor: f64,
) -> (Tensor<4>, Tensor<4>) {
    #[cfg(feature = "cube")]
    if cube::takes(&scores) {
        return cube::softmax_gradient(scores, log_sum, dp, along, factor);
    }
    let dtype = scores.dtype();
    let scores = scaled(scores, factor);
    let p = (scores - log_sum).exp();
    let ds = (p.clone() * (dp.cast(DType::F32) - along)).mul_scalar(factor);
    (p.cast(dtype), ds.cast(dtype))
}

/// `c s`.
fn scaled(scores: Tensor<4>, factor: f64) -> Tensor<4> {
    packed(scores.cast(DType::F32)).mul_scalar(factor)
}

#[cfg(feature = "cube")]
mod cube {
    use burn::tensor::{DType, Tensor};
    use cubecl::prelude::*;
    use cubecl::std::tensor::layout::linear::{LinearView, LinearViewMut};
    use lora_core::launch_as;
    use lora_core::ops::cube::{
        CUBES, CubeTensor, UNITS, by_element, dispatch, empty_as, empty_like, has_kernels,
        largest_of_units, sum_of_units, tensor,
    };

    pub fn takes(scores: &Tensor<4>) -> bool {
        let [batch, heads, queries, _] = scores.dims();
        has_kernels(scores) && !scores.is_tracked() && (batch * heads).max(queries) <= CUBES
    }

    fn of(x: Tensor<4>) -> CubeTensor {
        tensor(x.into_dispatch())
    }

    fn back(x: CubeTensor) -> Tensor<4> {
        Tensor::from_dispatch(dispatch(x))
    }

    pub fn softmax(scores: Tensor<4>, factor: f64) -> (Tensor<4>, Tensor<4>) {
        let [batch, heads, queries, keys] = scores.dims();
        let scores = of(scores);
        let p = empty_like(&scores);
        let log_sum = empty_as(DType::F32, [batch, heads, queries, 1], &scores);
        launch_as!(
            scores.dtype,
            softmax_of_rows,
            &p.client,
            CubeCount::new_2d(queries as u32, (batch * heads) as u32),
            CubeDim::new_1d(UNITS as u32),
            scores.into_linear_view(),
            p.clone().into_linear_view(),
            log_sum.clone().into_linear_view(),
            keys,
            factor as f32,
        );
        (back(p), back(log_sum))
    }

    pub fn softmax_gradient(
        scores: Tensor<4>,
        log_sum: Tensor<4>,
        dp: Tensor<4>,
        along: Tensor<4>,
        factor: f64,
    ) -> (Tensor<4>, Tensor<4>) {
        let keys = scores.dims()[3];
        let scores = of(scores);
        let (p, ds) = (empty_like(&scores), empty_like(&scores));
        let (cubes, units) = by_element(&p);
        launch_as!(
            scores.dtype,
            gradient_of_elements,
            &p.client,
            cubes,
            units,
            scores.into_linear_view(),
            of(log_sum).into_linear_view(),
            of(dp).into_linear_view(),
            of(along).into_linear_view(),
            p.clone().into_linear_view(),
            ds.clone().into_linear_view(),
            keys,
            factor as f32,
        );
        (back(p), back(ds))
    }

    /// `c s`.
    #[cube]
    fn scaled<E: Float>(scores: LinearView<'_, E>, at: usize, factor: f32) -> f32 {
        f32::cast_from(scores.read(at)) * factor
    }

    #[cube(launch)]
    fn softmax_of_rows<E: Float>(
        scores: LinearView<'_, E>,
        mut p: LinearViewMut<'_, E>,
        mut log_sum: LinearViewMut<'_, f32>,
        keys: usize,
        factor: f32,
    ) {
        let from = CUBE_POS * keys;
        let unit = UNIT_POS as usize;
        // Some element of the row where this unit has none.
        let mut largest = scaled::<E>(scores, from, factor);
        for j in range_stepped(unit, keys, CUBE_DIM as usize) {
            largest = f32::max(largest, scaled::<E>(scores, from + j, factor));
        }
        let largest = largest_of_units(largest);
        let mut sum = 0.0f32;
        for j in range_stepped(unit, keys, CUBE_DIM as usize) {
            sum += f32::exp(scaled::<E>(scores, from + j, factor) - largest);
        }
        let total = largest + f32::ln(sum_of_units(sum));
        for j in range_stepped(unit, keys, CUBE_DIM as usize) {
            let value = f32::exp(scaled::<E>(scores, from + j, factor) - total);
            p.write(from + j, E::cast_from(value));
        }
        if unit == 0 {
            log_sum.write(CUBE_POS, total);
        }
    }

    #[cube(launch)]
    fn gradient_of_elements<E: Float>(
        scores: LinearView<'_, E>,
        log_sum: LinearView<'_, f32>,
        dp: LinearView<'_, E>,
        along: LinearView<'_, f32>,
        mut p: LinearViewMut<'_, E>,
        mut ds: LinearViewMut<'_, E>,
        keys: usize,
        factor: f32,
    ) {
        if p.is_in_bounds(ABSOLUTE_POS) {
            let row = ABSOLUTE_POS / keys;
            let score = scaled::<E>(scores, ABSOLUTE_POS, factor);
            let value = f32::exp(score - log_sum.read(row));
            let change = f32::cast_from(dp.read(ABSOLUTE_POS)) - along.read(row);
            p.write(ABSOLUTE_POS, E::cast_from(value));
            ds.write(ABSOLUTE_POS, E::cast_from(factor * value * change));
        }
    }
}
