//! Patches and positions: 2x2 patches of the autoencoder's latent become channels, and every element of what results is a
//! token with a position of four coordinates.
//!
//! Source: diffusers `Flux2Pipeline._patchify_latents`, `_pack_latents`, `_prepare_latent_ids`, `_prepare_text_ids`.

use burn::tensor::Tensor;

/// `[batch, channels, 2 rows, 2 columns]` to `[batch, 4 channels, rows, columns]`; the latent channel varies slowest, then
/// the row inside the patch.
///
/// # Panics
/// If a side is odd.
pub fn patchify(latents: Tensor<4>) -> Tensor<4> {
    let [batch, channels, height, width] = latents.dims();
    assert!(
        height % 2 == 0 && width % 2 == 0,
        "latent sides must be even, found {height} x {width}"
    );
    let (rows, columns) = (height / 2, width / 2);
    latents
        .reshape([batch, channels, rows, 2, columns, 2])
        .permute([0, 1, 3, 5, 2, 4]) // (b, c, 2, 2, rows, columns)
        .reshape([batch, 4 * channels, rows, columns])
}

/// The inverse of [`patchify`].
pub fn unpatchify(latents: Tensor<4>) -> Tensor<4> {
    let [batch, channels, rows, columns] = latents.dims();
    let channels = channels / 4;
    latents
        .reshape([batch, channels, 2, 2, rows, columns])
        .permute([0, 1, 4, 2, 5, 3]) // (b, c, rows, 2, columns, 2)
        .reshape([batch, channels, 2 * rows, 2 * columns])
}

/// `[batch, channels, rows, columns]` to tokens `[batch, rows * columns, channels]`, row by row.
pub fn pack(latents: Tensor<4>) -> Tensor<3> {
    let [batch, channels, rows, columns] = latents.dims();
    latents
        .reshape([batch, channels, rows * columns])
        .swap_dims(1, 2)
}

/// The inverse of [`pack`] for a latent of `rows` x `columns` tokens.
pub fn unpack(tokens: Tensor<3>, rows: usize, columns: usize) -> Tensor<4> {
    let [batch, _, channels] = tokens.dims();
    tokens
        .swap_dims(1, 2)
        .reshape([batch, channels, rows, columns])
}

/// Position of a token: (image, row, column, index in the text).
pub type Position = [f32; 4];

/// Positions of the tokens of a latent of `rows` x `columns` tokens, row by row.
pub fn image_positions(rows: usize, columns: usize) -> Vec<Position> {
    (0..rows)
        .flat_map(|row| (0..columns).map(move |column| [0.0, row as f32, column as f32, 0.0]))
        .collect()
}

/// Positions of the tokens of reference picture `index`, counted from 0: as those of an image, 10 apart on the first axis.
pub fn reference_positions(index: usize, rows: usize, columns: usize) -> Vec<Position> {
    let positions = image_positions(rows, columns).into_iter();
    positions
        .map(|[_, row, column, _]| [10.0 + 10.0 * index as f32, row, column, 0.0])
        .collect()
}

/// Positions of text tokens: one after the other on the fourth axis.
pub fn text_positions(tokens: usize) -> Vec<Position> {
    (0..tokens).map(|i| [0.0, 0.0, 0.0, i as f32]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, TensorData};

    #[test]
    fn unpatchify_undoes_patchify_and_the_channel_is_slowest() {
        let values: Vec<f32> = (0..2 * 3 * 4 * 6).map(|v| v as f32).collect();
        let latents =
            Tensor::<4>::from_data(TensorData::new(values, [2, 3, 4, 6]), &Device::flex());
        let patches = patchify(latents.clone());
        assert_eq!(patches.dims(), [2, 12, 2, 3]);
        let first: Vec<f32> = pack(patches.clone())
            .slice([0..1, 0..1])
            .into_data()
            .try_into_vec()
            .expect("f32");
        assert_eq!(
            first,
            [0., 1., 6., 7., 24., 25., 30., 31., 48., 49., 54., 55.]
        );
        assert_eq!(
            unpatchify(unpack(pack(patches), 2, 3)).into_data(),
            latents.into_data()
        );
    }

    #[test]
    fn text_is_counted_on_the_fourth_axis() {
        assert_eq!(text_positions(2), [[0.0; 4], [0.0, 0.0, 0.0, 1.0]]);
        assert_eq!(image_positions(1, 2), [[0.0; 4], [0.0, 0.0, 1.0, 0.0]]);
    }
}
