//! Packing: 2x2 patches of the latent become tokens, and every token has a position.
//!
//! Source: diffusers `FluxPipeline._pack_latents`, `_unpack_latents`, `_prepare_latent_image_ids`.

use burn::tensor::Tensor;

/// `[batch, channels, height, width]` to tokens `[batch, height/2 * width/2, channels * 4]`; the latent channel varies
/// slowest inside a token.
///
/// # Panics
/// If a side is odd.
pub fn pack(latents: Tensor<4>) -> Tensor<3> {
    let [batch, channels, height, width] = latents.dims();
    assert!(
        height % 2 == 0 && width % 2 == 0,
        "latent sides must be even, found {height} x {width}"
    );
    let (rows, columns) = (height / 2, width / 2);
    latents
        .reshape([batch, channels, rows, 2, columns, 2])
        .permute([0, 2, 4, 1, 3, 5]) // (b, rows, columns, c, 2, 2)
        .reshape([batch, rows * columns, channels * 4])
}

/// The inverse of [`pack`] for a latent of `height` x `width`.
pub fn unpack(tokens: Tensor<3>, height: usize, width: usize) -> Tensor<4> {
    let [batch, _, channels] = tokens.dims();
    let (rows, columns, channels) = (height / 2, width / 2, channels / 4);
    tokens
        .reshape([batch, rows, columns, channels, 2, 2])
        .permute([0, 3, 1, 4, 2, 5]) // (b, c, rows, 2, columns, 2)
        .reshape([batch, channels, height, width])
}

/// Position of a token: (image index, row, column).
pub type Position = [f32; 3];

/// Positions of the tokens of a latent of `height` x `width`, row by row.
pub fn image_positions(height: usize, width: usize) -> Vec<Position> {
    let (rows, columns) = (height / 2, width / 2);
    (0..rows)
        .flat_map(|row| (0..columns).map(move |column| [0.0, row as f32, column as f32]))
        .collect()
}

/// Positions of the tokens of reference picture `index`, counted from 0: as those of an image, with the picture's number on the
/// first axis. FLUX.1 Kontext was trained with one picture.
pub fn reference_positions(index: usize, height: usize, width: usize) -> Vec<Position> {
    let positions = image_positions(height, width).into_iter();
    positions
        .map(|[_, row, column]| [1.0 + index as f32, row, column])
        .collect()
}

/// Positions of text tokens: all zero, so text is not rotated.
pub fn text_positions(tokens: usize) -> Vec<Position> {
    vec![[0.0; 3]; tokens]
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, TensorData};

    #[test]
    fn unpack_undoes_pack_and_the_channel_is_slowest() {
        let values: Vec<f32> = (0..2 * 3 * 4 * 6).map(|v| v as f32).collect();
        let latents =
            Tensor::<4>::from_data(TensorData::new(values, [2, 3, 4, 6]), &Device::flex());
        let tokens = pack(latents.clone());
        assert_eq!(tokens.dims(), [2, 6, 12]);
        let first: Vec<f32> = tokens
            .clone()
            .slice([0..1, 0..1])
            .into_data()
            .try_into_vec()
            .expect("f32");
        assert_eq!(
            first,
            [0., 1., 6., 7., 24., 25., 30., 31., 48., 49., 54., 55.]
        );
        assert_eq!(unpack(tokens, 4, 6).into_data(), latents.into_data());
    }
}
