//! Crops of the photographs in `examples/photos`, as a small vision transformer reads them.

use anyhow::{Context, Result};
use burn::tensor::{Device, Int, Tensor, TensorData};
use flux_lora_examples::root;
use image::RgbImage;
use lora_core::random::Stream;

pub const PHOTOS: [&str; 6] = ["astronaut", "camera", "cat", "coffee", "galaxies", "rocket"];
const CROP: u32 = 32; // pixels
const PATCH: u32 = 8;
pub const PATCHES: usize = (CROP / PATCH * (CROP / PATCH)) as usize;
pub const PATCH_VALUES: usize = (3 * PATCH * PATCH) as usize;

/// Patches `[batch, patches, values]` and the index of each crop's photograph `[batch]`.
pub type Batch = (Tensor<3>, Tensor<1, Int>);

#[derive(Clone, Copy)]
pub enum Split {
    Train,
    Test,
}

#[derive(Clone, Copy, PartialEq)]
pub enum Film {
    Positive,
    Negative,
}

/// The photographs, 192 x 128 pixels each.
pub struct Photographs(Vec<RgbImage>);

impl Photographs {
    pub fn load() -> Result<Self> {
        let load = |name| {
            let path = root().join(format!("examples/photos/{name}.jpg"));
            let photo = image::open(&path).with_context(|| path.display().to_string())?;
            Ok(photo
                .resize_to_fill(192, 128, image::imageops::Triangle)
                .to_rgb8())
        };
        Ok(Self(PHOTOS.into_iter().map(load).collect::<Result<_>>()?))
    }

    /// Crops that are a function of the step: a resumed run sees what the uninterrupted one would have seen.
    pub fn batch(
        &self,
        split: Split,
        film: Film,
        size: usize,
        step: u64,
        device: &Device,
    ) -> Batch {
        let (name, left, right) = match split {
            Split::Train => ("train", 0, 128),
            Split::Test => ("test", 128, 192),
        };
        let mut stream = Stream::new(7, name, step, 0);
        let (mut values, mut photos) = (Vec::new(), Vec::new());
        for _ in 0..size {
            let index = stream.below(self.0.len() as u64) as usize;
            let photo = &self.0[index];
            let x0 = left + stream.below(u64::from(right - left - CROP) + 1) as u32;
            let y0 = stream.below(u64::from(photo.height() - CROP) + 1) as u32;
            for patch in 0..PATCHES as u32 {
                let (column, row) = (patch % (CROP / PATCH), patch / (CROP / PATCH));
                for pixel in 0..PATCH * PATCH {
                    let x = x0 + column * PATCH + pixel % PATCH;
                    let y = y0 + row * PATCH + pixel / PATCH;
                    let value = |v: u8| f32::from(v) / 127.5 - 1.0;
                    let sign = if film == Film::Negative { -1.0 } else { 1.0 };
                    values.extend(photo.get_pixel(x, y).0.map(|v| sign * value(v)));
                }
            }
            photos.push(index as i64);
        }
        let patches = TensorData::new(values, [size, PATCHES, PATCH_VALUES]);
        let photos = TensorData::new(photos, [size]);
        (
            Tensor::from_data(patches, device),
            Tensor::from_data(photos, device),
        )
    }
}
