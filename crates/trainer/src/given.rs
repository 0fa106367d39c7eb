//! Pictures that `flux-lora sample` is given beside the prompt.

use std::path::Path;

use anyhow::Context;
use burn::tensor::Device;
use flux_model::family::{Condition, Family};
use image::RgbImage;

use crate::cli::{SampleArgs, UsageError};
use crate::condition::{Pictures, condition};
use crate::data::bucket::{Bucket, fit_reference, resize_and_crop};
use crate::data::cache::{Beside, encode};
use crate::data::image::{ImageLimits, load_image};

/// Side of the image that is made where no picture says its size.
const USUAL_SIDE_PX: u32 = 1024;

/// The pictures, decoded.
pub(crate) struct GivenPictures {
    /// Size of the image that is made if no other is asked for.
    pub(crate) size: Bucket,
    /// At the sizes they are encoded at.
    references: Vec<RgbImage>,
    /// The picture to paint in, and where.
    masked: Option<(RgbImage, RgbImage)>,
    /// The picture to start from.
    start: Option<RgbImage>,
}

impl GivenPictures {
    /// Reads them.
    ///
    /// # Errors
    /// One that is no picture, or a mask that has not the size of its picture.
    pub(crate) fn read<F: Family>(args: &SampleArgs, family: &F) -> anyhow::Result<Self> {
        let read = |path: &Path| load_image(path, &ImageLimits::default());
        let mut references = Vec::new();
        for path in &args.reference {
            let image = read(path)?;
            let fit = family.reference_fit(image.width(), image.height());
            references.push(fit_reference(&image, fit));
        }
        let (masked, start) = match (&args.image, &args.mask) {
            (Some(image), Some(mask)) => (Some((read(image)?, read(mask)?)), None),
            (Some(image), None) => (None, Some(read(image)?)),
            _ => (None, None),
        };
        if let Some((image, mask)) = &masked
            && image.dimensions() != mask.dimensions()
        {
            let (image, mask) = (image.dimensions(), mask.dimensions());
            return Err(UsageError(format!(
                "--mask is {}x{} pixels and --image {}x{}: make them the same",
                mask.0, mask.1, image.0, image.1
            ))
            .into());
        }
        let image = masked.as_ref().map(|(image, _)| image).or(start.as_ref());
        let size = match (image, references.first()) {
            (Some(image), _) => megapixel(image, family.pixel_step()),
            (None, Some(reference)) => Bucket {
                width_px: reference.width(),
                height_px: reference.height(),
            },
            (None, None) => Bucket {
                width_px: USUAL_SIDE_PX,
                height_px: USUAL_SIDE_PX,
            },
        };
        Ok(Self {
            size,
            references,
            masked,
            start,
        })
    }

    /// What is given, as the command line calls it.
    pub(crate) fn kinds(&self) -> Pictures {
        Pictures {
            references: (!self.references.is_empty()).then_some("reference pictures (--reference)"),
            mask: self.masked.is_some(),
            mask_name: "--image and --mask",
        }
    }

    /// The picture to start from, cropped in the middle and resized to `size`, height and width in pixels.
    pub(crate) fn start(&self, [height, width]: [usize; 2]) -> Option<RgbImage> {
        let size = Bucket {
            width_px: width as u32,
            height_px: height as u32,
        };
        (self.start.as_ref()).map(|image| resize_and_crop(image, size, None))
    }

    /// What the network reads of them, for an image of `size`, height and width in pixels.
    ///
    /// # Errors
    /// An autoencoder that cannot be loaded.
    pub(crate) fn encode<F: Family>(
        self,
        family: &F,
        [height, width]: [usize; 2],
        device: &Device,
    ) -> anyhow::Result<Condition> {
        if self.references.is_empty() && self.masked.is_none() {
            return Ok(Condition::default());
        }
        let size = Bucket {
            width_px: width as u32,
            height_px: height as u32,
        };
        let autoencoder = family.autoencoder(device).context("load the autoencoder")?;
        let encode = |image: &RgbImage, mask: Option<&RgbImage>| {
            encode::<F>(&autoencoder, image, mask, device)
        };
        let references = self.references.iter();
        let beside = Beside {
            references: references.map(|image| encode(image, None)).collect(),
            masked: self.masked.as_ref().map(|(image, mask)| {
                let [image, mask] = [image, mask].map(|it| resize_and_crop(it, size, None));
                encode(&image, Some(&mask))
            }),
        };
        condition(family, &[beside], device)
    }
}

/// The size of a picture, shrunk to a megapixel if it is larger and cut to whole tokens.
fn megapixel(image: &RgbImage, step: usize) -> Bucket {
    let (width, height) = (f64::from(image.width()), f64::from(image.height()));
    let most = f64::from(USUAL_SIDE_PX * USUAL_SIDE_PX);
    let scale = (most / (width * height)).sqrt().min(1.0);
    let step = step as u32;
    let side = |side: f64| ((side * scale) as u32 / step * step).max(step);
    Bucket {
        width_px: side(width),
        height_px: side(height),
    }
}
