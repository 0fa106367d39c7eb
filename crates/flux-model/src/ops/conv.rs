//! Convolutions of layers that are not trained: where the autoencoders spend their time.
//!
//! An image is cut into bands of rows. A band is copied with its padding, some channels at a time, rows one behind the other;
//! then what a tap of the kernel meets is the same band from another offset on, and the convolution a product
//!
//! ```text
//! y[output][pixel] = sum over channels and taps of weight[output][channel][tap] * band[channel][pixel + offset(tap)]
//! ```
//!
//! whose right side is read where it lies. With a stride, a band has its even and its odd rows and columns apart. The columns
//! behind a row's end are computed and dropped. Every sum has one order, over channels and in them over taps: the bits depend
//! neither on bands nor on threads.
//!
//! A convolution of 3x3 taps of an image whose sides are doubled meets but 2x2 pixels of the image itself; which of them, and
//! with what sums of weights, depends on whether row and column are even.
//!
//! There is no backward pass. What is tracked, and shapes that nobody has here, go to Burn.

use burn::nn::conv::Conv2d;
use burn::tensor::Tensor;

/// What is done with the result of a convolution.
#[derive(Debug, Default)]
pub struct Then {
    /// Added to it, of its shape.
    pub plus: Option<Tensor<4>>,
    /// Whether negative numbers become zero at last.
    pub relu: bool,
}

/// The convolution of `layer`.
///
/// # Shapes
/// - `x`: `[batch, in, height, width]`; returns `[batch, out, height', width']`
pub fn conv2d(layer: &Conv2d, x: Tensor<4>) -> Tensor<4> {
    conv2d_then(layer, x, Then::default())
}

/// As [`conv2d`], and what follows.
pub fn conv2d_then(layer: &Conv2d, x: Tensor<4>, then: Then) -> Tensor<4> {
    #[cfg(feature = "flex")]
    if let Some(operation) = cpu::Conv::of(layer, &x, &then, false) {
        return operation.apply(layer, x, then.plus);
    }
    let y = layer.forward(x);
    let y = match then.plus {
        Some(plus) => plus + y,
        None => y,
    };
    match then.relu {
        true => burn::tensor::activation::relu(y),
        false => y,
    }
}

/// The convolution of `layer` after every pixel has become four of them.
///
/// # Shapes
/// - `x`: `[batch, in, height, width]`; returns `[batch, out, 2 height, 2 width]` for the usual padding
pub fn conv2d_of_doubled(layer: &Conv2d, x: Tensor<4>) -> Tensor<4> {
    #[cfg(feature = "flex")]
    if let Some(operation) = cpu::Conv::of(layer, &x, &Then::default(), true) {
        return operation.apply(layer, x, None);
    }
    layer.forward(doubled(x))
}

/// Every pixel as four of them.
pub fn doubled(x: Tensor<4>) -> Tensor<4> {
    let [batch, channels, height, width] = x.dims();
    x.reshape([batch * channels, height, 1, width, 1])
        .expand([batch * channels, height, 2, width, 2])
        .reshape([batch, channels, 2 * height, 2 * width])
}

#[cfg(feature = "flex")]
mod cpu {
    use burn::backend::flex::FlexTensor;
    use burn::nn::PaddingConfig2d;
    use burn::nn::conv::Conv2d;
    use burn::tensor::{DType, Tensor};
    use lora_core::ops::Operation;
    use lora_core::ops::kernel::{dims, owned, packed, simd, tensor, values};
    use lora_core::ops::tile::{self, Kernel, Simd};
    use rayon::prelude::*;

    use super::Then;

    /// Output channels and vectors of pixels in a tile: eight sums are as many as additions are under way at a time, and with
    /// more, LLVM keeps one in memory.
    const ROWS: usize = 4;
    const VECTORS: usize = 2;

    /// Pixels that are whole tiles for vectors of every width, to 16 lanes.
    const SPAN: usize = 16 * VECTORS;

    /// Input channels of a band that are copied at a time. With the sums and weights of a task they fit into 512 KiB of cache.
    const CHANNELS: usize = 32;

    /// Output channels of a task, times the parts of its convolution.
    const OUTPUTS: usize = 64;

    /// Pixels of a band, about: an eighth of the image, within these.
    const PIXELS: [usize; 2] = [128, 512];

    /// Inputs: `x`, weight, bias, what is added; what is absent is empty.
    #[derive(Debug, Clone)]
    pub struct Conv {
        stride: usize,
        /// Zeros above, left, below and right of the image.
        padding: [usize; 4],
        is_doubled: bool,
        has_bias: bool,
        has_plus: bool,
        relu: bool,
    }

    impl Conv {
        /// The operation, if the kernels take it; what they do not take is left to Burn, and to its errors.
        pub fn of(layer: &Conv2d, x: &Tensor<4>, then: &Then, is_doubled: bool) -> Option<Self> {
            let (weight, bias) = (&layer.weight, &layer.bias);
            let [outputs, inputs, height, width] = weight.dims();
            let padding = match layer.padding {
                PaddingConfig2d::Valid => [0; 4],
                PaddingConfig2d::Explicit(top, left, bottom, right) => [top, left, bottom, right],
                PaddingConfig2d::Same => return None,
            };
            let stride = layer.stride[0];
            let operation = Self {
                stride,
                padding,
                is_doubled,
                has_bias: bias.is_some(),
                has_plus: then.plus.is_some(),
                relu: then.relu,
            };
            let usual = lora_core::ops::has_kernels(x)
                && [[height, width], layer.kernel_size] == [[height; 2]; 2]
                && matches!((height, stride), (1 | 3, 1 | 2))
                && [layer.stride, layer.dilation, [layer.groups; 2]]
                    == [[stride; 2], [1; 2], [1; 2]]
                && (!is_doubled || (height, stride, padding) == (3, 1, [1; 4]));
            let [batch, channels, rows, columns] = x.dims();
            let fits = channels == inputs
                && rows + padding[0] + padding[2] >= height
                && columns + padding[1] + padding[3] >= width
                && [batch, channels, rows, columns, outputs]
                    .iter()
                    .all(|&n| n > 0);
            if !usual || !fits {
                return None;
            }
            let [rows, columns] = operation.output([rows, columns], height);
            let shape = [batch, outputs, rows, columns];
            let is_like = |plus: &Tensor<4>| plus.dims() == shape && plus.dtype() == DType::F32;
            let of_shape = then.plus.as_ref().is_none_or(is_like);
            let (weight, bias) = (weight.val(), bias.as_ref().map(|bias| bias.val()));
            let of_f32 = weight.dtype() == DType::F32
                && bias.as_ref().is_none_or(|bias| bias.dtype() == DType::F32);
            let is_tracked = x.is_tracked()
                || weight.is_tracked()
                || bias.is_some_and(|bias| bias.is_tracked())
                || then.plus.as_ref().is_some_and(|plus| plus.is_tracked());
            (of_shape && of_f32 && !is_tracked).then_some(operation)
        }

        pub fn apply(self, layer: &Conv2d, x: Tensor<4>, plus: Option<Tensor<4>>) -> Tensor<4> {
            let none = || Tensor::<1>::empty([0], &x.device()).into_dispatch();
            let bias = layer.bias.as_ref().map(|bias| bias.val().into_dispatch());
            let inputs = vec![
                layer.weight.val().into_dispatch(),
                bias.unwrap_or_else(none),
                plus.map_or_else(none, Tensor::into_dispatch),
                x.into_dispatch(),
            ];
            lora_core::ops::apply::<_, 0, 4>(self, inputs)
        }

        /// Height and width of what an image of this height and width becomes, before it is doubled.
        fn output(&self, [height, width]: [usize; 2], kernel: usize) -> [usize; 2] {
            let [top, left, bottom, right] = self.padding;
            let along = |length: usize, padding| (length + padding - kernel) / self.stride + 1;
            [along(height, top + bottom), along(width, left + right)]
        }

        fn run<const T: usize>(
            &self,
            x: &FlexTensor,
            bias: &[f32],
            y: &mut [f32],
            bands: &Bands,
            parts: &[Part<T>],
        ) {
            let [_, channels, height, width] = dims(x);
            let planes = height * width;
            let outputs = parts[0].outputs;
            let double = if self.is_doubled { 2 } else { 1 };
            let [rows, columns] = [double * bands.height, double * bands.width];
            let in_task = (OUTPUTS / parts.len()).next_multiple_of(ROWS);
            let (count, blocks) = (bands.count(), outputs.div_ceil(in_task));
            let samples = values(x).len() / (channels * planes);
            let mut tasks: Vec<Vec<&mut [f32]>> = Vec::new();
            tasks.resize_with(samples * blocks * count, Vec::new);
            for (index, plane) in y.chunks_exact_mut(rows * columns).enumerate() {
                let (sample, output) = (index / outputs, index % outputs);
                let first = (sample * blocks + output / in_task) * count;
                let pieces = plane.chunks_mut(double * bands.rows * columns);
                for (task, piece) in tasks[first..].iter_mut().zip(pieces) {
                    task.push(piece);
                }
            }
            let buffers = || (vec![0f32; CHANNELS.min(channels) * bands.plane], Vec::new());
            let work = |(band, sums): &mut (Vec<f32>, Vec<f32>),
                        (index, y): (usize, Vec<&mut [f32]>)| {
                let (index, block, sample) = (
                    index % count,
                    index / count % blocks,
                    index / count / blocks,
                );
                let x = &values(x)[sample * channels * planes..][..channels * planes];
                let bias = bias.get(block * in_task..).unwrap_or(&[]);
                let tiles = block * in_task / ROWS..(block * in_task + y.len()).div_ceil(ROWS);
                let used = bands.wide * bands.rows_of(index);
                let of_part = tiles.len() * ROWS * bands.span;
                sums.clear();
                sums.resize(parts.len() * of_part, 0.0);
                for first in (0..channels).step_by(CHANNELS) {
                    let x = x.chunks_exact(planes).skip(first).take(CHANNELS);
                    let end = channels.min(first + CHANNELS);
                    for (x, plane) in x.zip(band.chunks_exact_mut(bands.plane)) {
                        bands.copy(self, x, [height, width], index, plane);
                    }
                    for (part, sums) in parts.iter().zip(sums.chunks_exact_mut(of_part)) {
                        tile::run::<_, ROWS, ROWS>(Product {
                            band,
                            plane: bands.plane,
                            part,
                            channels: first..end,
                            tiles: tiles.clone(),
                            used,
                            span: bands.span,
                            sums,
                        });
                    }
                }
                for (output, y) in y.into_iter().enumerate() {
                    let sums = |part: usize| &sums[part * of_part + output * bands.span..][..used];
                    let bias = bias.get(output).copied().unwrap_or(0.0);
                    simd(
                        #[inline(always)]
                        || match self.is_doubled {
                            true => interleave(y, std::array::from_fn(sums), bands, bias),
                            false => self.finish(y, sums(0), bands, bias),
                        },
                    );
                }
            };
            tasks
                .into_par_iter()
                .enumerate()
                .for_each_init(buffers, work);
        }

        /// Takes the rows out of the sums of an output channel.
        #[inline(always)]
        fn finish(&self, y: &mut [f32], sums: &[f32], bands: &Bands, bias: f32) {
            let rows = y.chunks_exact_mut(bands.width);
            for (y, sums) in rows.zip(sums.chunks_exact(bands.wide)) {
                match self.has_plus {
                    true => y.iter_mut().zip(sums).for_each(|(y, sum)| *y += sum + bias),
                    false => y.iter_mut().zip(sums).for_each(|(y, sum)| *y = sum + bias),
                }
                if self.relu {
                    y.iter_mut()
                        .for_each(|y| *y = if *y < 0.0 { 0.0 } else { *y });
                }
            }
        }
    }

    /// Takes the rows of an output channel from the sums for even and odd rows, and in them for even and odd columns.
    #[inline(always)]
    fn interleave(y: &mut [f32], sums: [&[f32]; 4], bands: &Bands, bias: f32) {
        for (index, y) in y.chunks_exact_mut(2 * bands.width).enumerate() {
            let row = |part: usize| &sums[part][index / 2 * bands.wide..][..bands.width];
            let (even, odd) = (row(index % 2 * 2), row(index % 2 * 2 + 1));
            for (y, (even, odd)) in y
                .as_chunks_mut::<2>()
                .0
                .iter_mut()
                .zip(even.iter().zip(odd))
            {
                *y = [even + bias, odd + bias];
            }
        }
    }

    impl Operation<0> for Conv {
        type Saved = ();

        fn forward(&self, inputs: Vec<FlexTensor>) -> (FlexTensor, ()) {
            let [weight, bias, plus, x] = <[_; 4]>::try_from(inputs).expect("four inputs");
            let [weight, bias, x] = [weight, bias, x].map(packed);
            let [samples, _, height, width] = dims(&x);
            let [outputs, _, kernel, _] = dims(&weight);
            let size = self.output([height, width], kernel);
            let double = if self.is_doubled { 2 } else { 1 };
            let shape = [samples, outputs, double * size[0], double * size[1]];
            let mut y = match self.has_plus {
                true => owned(plus),
                false => tensor(vec![0f32; shape.iter().product()], shape),
            };
            let bands = Bands::new(size, kernel, self.stride);
            let bias = if self.has_bias { values(&bias) } else { &[] };
            let to = y.storage_mut();
            match (self.is_doubled, kernel) {
                (true, _) => {
                    let parts = [[0, 0], [0, 1], [1, 0], [1, 1]].map(|odd| {
                        let [row, column] = odd;
                        let taps = [[0, 0], [0, 1], [1, 0], [1, 1]]
                            .map(|[y, x]| (row + y) * bands.wide + column + x);
                        Part::new(&weight, taps, |w: &[f32; 9]| of_doubled(w, odd))
                    });
                    self.run(&x, bias, to, &bands, &parts);
                }
                (false, 1) => {
                    let part = Part::new(&weight, [0], |w: &[f32; 1]| *w);
                    self.run(&x, bias, to, &bands, &[part]);
                }
                (false, _) => {
                    let taps = std::array::from_fn(|tap| bands.offset(tap / 3, tap % 3));
                    let part = Part::new(&weight, taps, |w: &[f32; 9]| *w);
                    self.run(&x, bias, to, &bands, &[part]);
                }
            }
            (y, ())
        }

        fn backward(&self, (): (), _: FlexTensor, _: [bool; 0]) -> [Option<FlexTensor>; 0] {
            []
        }
    }

    /// Weights of 2x2 taps for those of 3x3 that see every pixel as four: for even or odd rows and columns.
    fn of_doubled(w: &[f32; 9], [odd_row, odd_column]: [usize; 2]) -> [f32; 4] {
        // an even one sees the pixel before it once and its own twice, an odd one its own twice and the one behind once
        let pair = |[a, b, c]: [f32; 3], odd| match odd {
            0 => [a, b + c],
            _ => [a + b, c],
        };
        let row = |i: usize| pair([w[3 * i], w[3 * i + 1], w[3 * i + 2]], odd_column);
        let [a, b, c] = [row(0), row(1), row(2)];
        let [first, second] = [0, 1].map(|i| pair([a[i], b[i], c[i]], odd_row));
        [first[0], second[0], first[1], second[1]]
    }

    /// How an image is cut, and how a band of it lies in memory.
    struct Bands {
        /// Of what the image becomes.
        height: usize,
        width: usize,
        /// Rows of the result in a band.
        rows: usize,
        stride: usize,
        /// Columns of the band.
        wide: usize,
        /// Elements of all rows of the band; with a stride, of those with the same rest.
        phase: usize,
        /// Elements from one channel to the next.
        plane: usize,
        /// Sums of an output channel.
        span: usize,
    }

    impl Bands {
        fn new([height, width]: [usize; 2], kernel: usize, stride: usize) -> Self {
            let [least, most] = PIXELS;
            let pixels = (height * width / 8).clamp(least, most);
            let rows = (pixels / width).clamp(1, height);
            let reach = (kernel - 1) / stride; // rows and columns of a band beyond those of the result
            let wide = width + reach;
            let phase = (rows + reach) * wide;
            let span = (rows * wide).next_multiple_of(SPAN);
            let mut bands = Self {
                height,
                width,
                rows,
                stride,
                wide,
                phase,
                plane: 0,
                span,
            };
            let taps = (0..kernel).flat_map(|y| (0..kernel).map(move |x| (y, x)));
            let furthest = taps.map(|(y, x)| bands.offset(y, x)).max().unwrap_or(0);
            let least = (stride * stride * phase).max(furthest + span);
            bands.plane = (least.div_ceil(16) | 1) * 16; // an odd number of cache lines: channels share no set of the cache
            bands
        }

        fn count(&self) -> usize {
            self.height.div_ceil(self.rows)
        }

        /// Rows of the result in the band `index`.
        fn rows_of(&self, index: usize) -> usize {
            self.rows.min(self.height - index * self.rows)
        }

        /// Where a tap meets what the first pixel of the result is made of.
        fn offset(&self, y: usize, x: usize) -> usize {
            let stride = self.stride;
            let phase = y % stride * stride + x % stride;
            phase * self.phase + y / stride * self.wide + x / stride
        }

        /// Copies the band `index` of a channel, `[height, width]`, with zeros around it.
        fn copy(
            &self,
            conv: &Conv,
            x: &[f32],
            [height, width]: [usize; 2],
            index: usize,
            band: &mut [f32],
        ) {
            let (stride, [top, left, ..]) = (self.stride, conv.padding);
            let phases = band.chunks_exact_mut(self.phase).take(stride * stride);
            for (phase, rows) in phases.enumerate() {
                let (down, along) = (phase / stride, phase % stride);
                // the first column of the band inside of the image, and the column of the image that it is
                let before = left.saturating_sub(along).div_ceil(stride).min(self.wide);
                let first = before * stride + along - left.min(before * stride + along);
                for (i, to) in rows.chunks_exact_mut(self.wide).enumerate() {
                    let row = ((index * self.rows + i) * stride + down).checked_sub(top);
                    let Some(row) = row.filter(|&row| row < height) else {
                        to.fill(0.0);
                        continue;
                    };
                    let from = x[row * width..][..width].get(first..).unwrap_or(&[]);
                    let (zeros, to) = to.split_at_mut(before);
                    zeros.fill(0.0);
                    let inside = from.len().div_ceil(stride).min(to.len());
                    let (to, zeros) = to.split_at_mut(inside);
                    zeros.fill(0.0);
                    match stride {
                        1 => to.copy_from_slice(&from[..inside]),
                        _ => to
                            .iter_mut()
                            .zip(from.iter().step_by(stride))
                            .for_each(|(to, from)| *to = *from),
                    }
                }
            }
        }
    }

    /// What has `T` taps at every pixel of the result: the convolution, or that of a quarter of the pixels.
    struct Part<const T: usize> {
        taps: [usize; T],
        outputs: usize,
        inputs: usize,
        /// Tile by tile of [`ROWS`] output channels, in them input by input; beyond the last output zeros.
        weights: Vec<[[f32; ROWS]; T]>,
    }

    impl<const T: usize> Part<T> {
        /// `of` makes the weights of the taps from those of the layer.
        fn new<const W: usize>(
            weight: &FlexTensor,
            taps: [usize; T],
            of: impl Fn(&[f32; W]) -> [f32; T] + Sync,
        ) -> Self {
            let [outputs, inputs, ..] = dims::<4>(weight);
            let mut weights = vec![[[0f32; ROWS]; T]; outputs.div_ceil(ROWS) * inputs];
            let rows = values(weight).par_chunks(ROWS * inputs * W);
            let tiles = weights.par_chunks_mut(inputs).zip(rows);
            tiles.for_each(|(tile, rows)| {
                for (i, row) in rows.chunks_exact(inputs * W).enumerate() {
                    for (to, from) in tile.iter_mut().zip(row.as_chunks::<W>().0) {
                        for (to, from) in to.iter_mut().zip(of(from)) {
                            to[i] = from;
                        }
                    }
                }
            });
            Self {
                taps,
                outputs,
                inputs,
                weights,
            }
        }
    }

    /// Adds some channels of a band to sums.
    struct Product<'a, const T: usize> {
        band: &'a [f32],
        plane: usize,
        part: &'a Part<T>,
        /// Input channels of the band.
        channels: std::ops::Range<usize>,
        /// Output channels, by [`ROWS`].
        tiles: std::ops::Range<usize>,
        /// Pixels that are wanted.
        used: usize,
        /// Sums from one output channel to the next.
        span: usize,
        sums: &'a mut [f32],
    }

    impl<const T: usize> Kernel for Product<'_, T> {
        type Output = ();

        #[inline(always)]
        fn tiles<S: Simd, const R: usize>(self, simd: S) {
            for first in (0..self.used).step_by(VECTORS * S::F32_LANES) {
                let sums = self.sums.chunks_exact_mut(ROWS * self.span);
                for (sums, tile) in sums.zip(self.tiles.clone()) {
                    let weights = &self.part.weights[tile * self.part.inputs..];
                    let weights = &weights[self.channels.clone()];
                    let planes = self.band.chunks_exact(self.plane);
                    add(simd, sums, planes, first, &self.part.taps, weights);
                }
            }
        }
    }

    /// Adds to the sums of [`ROWS`] output channels, of some pixels from `first` on.
    #[inline(always)]
    fn add<'a, S: Simd, const T: usize>(
        simd: S,
        sums: &mut [f32],
        planes: impl Iterator<Item = &'a [f32]>,
        first: usize,
        taps: &[usize; T],
        weights: &[[[f32; ROWS]; T]],
    ) {
        let width = VECTORS * S::F32_LANES;
        let mut tile = [[simd.splat_f32s(0.0); VECTORS]; ROWS];
        let span = sums.len() / ROWS;
        for i in 0..ROWS {
            let (from, _) = S::as_simd_f32s(&sums[i * span + first..][..width]);
            tile[i].copy_from_slice(&from[..VECTORS]);
        }
        for (plane, weights) in planes.zip(weights) {
            for t in 0..T {
                let (x, _) = S::as_simd_f32s(&plane[first + taps[t]..][..width]);
                let x = &x[..VECTORS];
                for i in 0..ROWS {
                    let weight = simd.splat_f32s(weights[t][i]);
                    for v in 0..VECTORS {
                        tile[i][v] = simd.mul_add_f32s(weight, x[v], tile[i][v]);
                    }
                }
            }
        }
        for i in 0..ROWS {
            let (to, _) = S::as_mut_simd_f32s(&mut sums[i * span + first..][..width]);
            to[..VECTORS].copy_from_slice(&tile[i]);
        }
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::nn::PaddingConfig2d;
    use burn::nn::conv::{Conv2d, Conv2dConfig};
    use burn::tensor::{Device, Tensor};
    use lora_core::ops::check::{random, same_bits_with_any_threads_and_vectors};
    use lora_core::ops::composed;

    use super::*;

    fn normal<const D: usize>(shape: [usize; D]) -> Tensor<D> {
        random(shape).inner()
    }

    fn values(x: Tensor<4>) -> Vec<f32> {
        x.into_data().try_into_vec().expect("f32")
    }

    /// Kernel, stride, zeros above, left, below and right.
    const KINDS: [(usize, usize, [usize; 4]); 6] = [
        (1, 1, [0; 4]),
        (1, 2, [0; 4]),
        (3, 1, [1; 4]),
        (3, 1, [0, 2, 3, 1]),
        (3, 2, [1; 4]),
        (3, 2, [0, 0, 1, 1]),
    ];

    fn layer(
        channels: [usize; 2],
        (kernel, stride, [top, left, bottom, right]): (usize, usize, [usize; 4]),
        bias: bool,
    ) -> Conv2d {
        let mut layer = Conv2dConfig::new(channels, [kernel; 2])
            .with_stride([stride; 2])
            .with_padding(PaddingConfig2d::Explicit(top, left, bottom, right))
            .with_bias(bias)
            .init(&Device::flex());
        let [inputs, outputs] = channels;
        let weight = normal([outputs, inputs, kernel, kernel]);
        layer.weight = layer.weight.map(|_| weight);
        layer.bias = layer.bias.map(|bias| bias.map(|_| normal([outputs])));
        layer
    }

    /// Asserts that the kernels give what Burn gives, within 5e-6 of the largest element.
    fn agree(f: impl Fn() -> Tensor<4>) {
        let (found, expected) = (f(), composed(&f));
        assert_eq!(found.dims(), expected.dims());
        let (found, expected) = (values(found), values(expected));
        let largest = expected.iter().fold(0.02f32, |top, x| top.max(x.abs()));
        for (a, b) in found.iter().zip(&expected) {
            assert!((a - b).abs() <= 5e-6 * largest, "{a}, not {b}");
        }
    }

    /// Batches, channels and sides: of one pixel, of more bands than one, of more channels than are copied at a time.
    const SIZES: [[usize; 5]; 6] = [
        [1, 1, 1, 3, 3],
        [2, 3, 5, 4, 7],
        [1, 16, 3, 33, 130],
        [1, 33, 130, 9, 11],
        [2, 70, 9, 41, 23],
        [1, 2, 6, 5, 1100],
    ];

    #[test]
    fn a_convolution_agrees_with_burns() {
        for [batch, inputs, outputs, height, width] in SIZES {
            for kind in KINDS {
                for bias in [true, false] {
                    let layer = layer([inputs, outputs], kind, bias);
                    let x = normal([batch, inputs, height, width]);
                    assert!(cpu::Conv::of(&layer, &x, &Then::default(), false).is_some());
                    agree(|| conv2d(&layer, x.clone()));
                }
            }
        }
    }

    #[test]
    fn what_follows_a_convolution_agrees_with_burns() {
        for [batch, inputs, outputs, height, width] in SIZES {
            let layer = layer([inputs, outputs], (3, 1, [1; 4]), true);
            let x = normal([batch, inputs, height, width]);
            let plus = normal([batch, outputs, height, width]);
            for relu in [true, false] {
                for plus in [Some(plus.clone()), None] {
                    let then = || Then {
                        plus: plus.clone(),
                        relu,
                    };
                    agree(|| conv2d_then(&layer, x.clone(), then()));
                }
            }
        }
    }

    #[test]
    fn a_convolution_of_a_doubled_image_agrees_with_burns() {
        for [batch, inputs, outputs, height, width] in SIZES {
            for bias in [true, false] {
                let layer = layer([inputs, outputs], (3, 1, [1; 4]), bias);
                let x = normal([batch, inputs, height, width]);
                assert!(cpu::Conv::of(&layer, &x, &Then::default(), true).is_some());
                agree(|| conv2d_of_doubled(&layer, x.clone()));
            }
        }
    }

    #[test]
    fn a_view_is_read_as_what_it_shows() {
        let layer = layer([3, 5], (3, 1, [1; 4]), true);
        let x = normal([2, 9, 14, 3]).swap_dims(1, 3).narrow(2, 1, 11);
        let plus = normal([9, 2, 5, 14]).swap_dims(0, 1).swap_dims(1, 3);
        let then = || Then {
            plus: Some(plus.clone().narrow(2, 0, 5).narrow(1, 2, 5)),
            relu: false,
        };
        agree(|| conv2d_then(&layer, x.clone().narrow(2, 3, 5), then()));
    }

    #[test]
    fn a_convolution_has_the_same_bits_with_any_threads_and_vectors() {
        let of_doubled = layer([33, 40], (3, 1, [1; 4]), true);
        let layers = KINDS.map(|kind| layer([33, 40], kind, true));
        let x = normal([2, 33, 37, 50]);
        same_bits_with_any_threads_and_vectors(|| {
            let plain = layers.iter();
            let plain = plain.flat_map(|layer| values(conv2d(layer, x.clone())));
            let doubled = values(conv2d_of_doubled(&of_doubled, x.clone()));
            plain.chain(doubled).collect()
        });
    }

    #[test]
    fn what_is_tracked_gets_its_gradient() {
        let layer = layer([3, 5], (3, 1, [1; 4]), true);
        let x = random([1, 3, 6, 7]).require_grad();
        let y = conv2d(&layer, x.clone());
        assert!(y.is_tracked());
        let gradient = x.grad(&y.sum().backward()).expect("a gradient");
        assert!(gradient.abs().max().into_scalar::<f32>() > 0.0);
    }
}
