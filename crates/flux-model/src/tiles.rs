//! An image larger than memory allows, tile by tile.
//!
//! Tiles overlap by a quarter and are blended there, linearly, first with the one above and then with the one to the left: what
//! diffusers computes after `enable_tiling()`. A tile sees nothing beyond its edges and its norms are its own, so the
//! result is not that of the whole image; up to [`TILE_PX`] there is one tile, and nothing changes.
//!
//! Source: diffusers 0.38 `AutoencoderKL.tiled_decode`, `_tiled_encode`, `blend_v`, `blend_h`.

use burn::tensor::{Tensor, TensorData};

/// Side of the largest image that is not cut into tiles: what FLUX's autoencoders were trained at.
pub(crate) const TILE_PX: usize = 1024;

/// `f` of `x`, `[batch, channels, height, width]`, whose tiles of `from` elements a side become tiles of `to` elements.
pub(crate) fn by_tiles(
    x: Tensor<4>,
    from: usize,
    to: usize,
    f: impl Fn(Tensor<4>) -> Tensor<4>,
) -> Tensor<4> {
    let [_, _, height, width] = x.dims();
    if height <= from && width <= from {
        return f(x);
    }
    let (step, overlap) = (from - from / 4, to / 4);
    let starts = |length: usize| (0..length).step_by(step);
    let cut = |x: Tensor<4>, axis: usize, start: usize, len: usize| {
        let len = len.min(x.dims()[axis] - start);
        x.narrow(axis, start, len)
    };
    let mut above: Vec<Tensor<4>> = Vec::new();
    let mut rows = Vec::new();
    for top in starts(height) {
        let (mut row, mut kept) = (Vec::<Tensor<4>>::new(), Vec::new());
        for (column, left) in starts(width).enumerate() {
            let mut tile = f(cut(cut(x.clone(), 2, top, from), 3, left, from));
            if let Some(above) = above.get(column) {
                tile = blend(above.clone(), tile, 2, overlap);
            }
            if let Some(left) = row.last() {
                tile = blend(left.clone(), tile, 3, overlap);
            }
            let inner = cut(tile.clone(), 2, 0, to - overlap);
            kept.push(cut(inner, 3, 0, to - overlap));
            row.push(tile);
        }
        rows.push(Tensor::cat(kept, 3));
        above = row;
    }
    Tensor::cat(rows, 2)
}

/// `tile`, whose first `overlap` elements along `axis` come from the end of `before` and go over into its own.
fn blend(before: Tensor<4>, tile: Tensor<4>, axis: usize, overlap: usize) -> Tensor<4> {
    let (ends, length) = (before.dims()[axis], tile.dims()[axis]);
    let overlap = overlap.min(ends).min(length);
    if overlap == 0 {
        return tile;
    }
    let share: Vec<f32> = (0..overlap).map(|i| i as f32 / overlap as f32).collect();
    let mut shape = [1; 4];
    shape[axis] = overlap;
    let share = Tensor::<4>::from_data(TensorData::new(share, shape), &tile.device());
    let before = before.narrow(axis, ends - overlap, overlap);
    let own = tile.clone().narrow(axis, 0, overlap);
    let mixed = before * (1.0 - share.clone()) + own * share;
    match length - overlap {
        0 => mixed,
        rest => Tensor::cat(vec![mixed, tile.narrow(axis, overlap, rest)], axis),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use burn::tensor::Device;

    use super::*;

    fn values(x: Tensor<4>) -> Vec<f32> {
        x.into_data().try_to_vec().expect("f32")
    }

    #[test]
    fn tiles_go_over_into_one_another() {
        // Tiles begin at 0, 6 and 12, each is a number, and two elements are blended.
        let x = Tensor::<4>::zeros([1, 1, 1, 14], &Device::flex());
        let count = Cell::new(0.0);
        let tiled = by_tiles(x, 8, 8, |tile| {
            count.set(count.get() + 1.0);
            tile + 10.0 * count.get()
        });
        let expected = [
            10.0, 10.0, 10.0, 10.0, 10.0, 10.0, 10.0, 15.0, 20.0, 20.0, 20.0, 20.0, 20.0, 25.0,
        ];
        assert_eq!(values(tiled), expected);
    }

    #[test]
    fn what_does_not_look_around_is_the_same_in_tiles() {
        let shape = [1, 2, 22, 35];
        let x = (0..shape.iter().product::<usize>()).map(|i| (i as f32 * 0.3).sin());
        let data = TensorData::new(x.collect::<Vec<f32>>(), shape);
        let x = Tensor::<4>::from_data(data, &Device::flex());
        let tiled = by_tiles(x.clone(), 8, 8, |tile| tile * 2.0);
        assert_eq!(tiled.dims(), shape);
        let difference = (tiled - x * 2.0).abs().max().into_scalar::<f32>();
        assert!(difference < 1e-6, "{difference}");
    }

    #[test]
    fn what_a_tile_becomes_may_have_another_size() {
        let x = Tensor::<4>::ones([1, 1, 10, 7], &Device::flex());
        let doubled = |tile: Tensor<4>| tile.repeat(&[1, 1, 2, 2]);
        assert_eq!(by_tiles(x.clone(), 4, 8, doubled).dims(), [1, 1, 20, 14]);
        assert_eq!(by_tiles(x, 16, 32, doubled).dims(), [1, 1, 20, 14]);
    }
}
