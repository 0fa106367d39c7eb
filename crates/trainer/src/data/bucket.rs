//! Aspect-ratio buckets: the few sizes that all training images are brought to.
//!
//! Every image of one bucket has the same latent shape, so they can share a batch. Pure integer arithmetic: which bucket
//! an image gets never depends on rounding. A bucket's area is at most `resolution * resolution`, so `resolution`
//! bounds the memory of a step.
//!
//! Images are cropped to the bucket's aspect first and resized after, not the other way round: the result is the same to
//! half a source pixel, and a 16000x1 strip never becomes a 4-million-pixel-wide intermediate.
//!
//! Source: the rule for the list of sizes is kohya-ss/sd-scripts `make_bucket_resolutions` with its range set to 4:1.

use std::fmt;

use flux_model::family::ReferenceFit;
use image::RgbImage;
use image::imageops::{self, FilterType};
use serde::{Deserialize, Serialize};

/// The widest bucket has this aspect, the tallest its inverse.
const MAX_ASPECT: u32 = 4;

/// A training size in pixels; both sides are multiples of the bucket step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bucket {
    /// Width in pixels.
    pub width_px: u32,
    /// Height in pixels.
    pub height_px: u32,
}

impl fmt::Display for Bucket {
    /// `WIDTHxHEIGHT`, as in `512x768`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.width_px, self.height_px)
    }
}

impl Bucket {
    /// How much an image of this size is enlarged to fill the bucket: above 1 it lacks the pixels, below 1 it is shrunk.
    pub fn enlargement(self, width_px: u32, height_px: u32) -> f64 {
        let across = f64::from(self.width_px) / f64::from(width_px);
        let down = f64::from(self.height_px) / f64::from(height_px);
        across.max(down)
    }

    /// The share of an image of this size that is cropped away, from 0 to 1.
    pub fn cropped(self, width_px: u32, height_px: u32) -> f64 {
        let (high, low) = self.aspect_mismatch(width_px, height_px);
        1.0 - low as f64 / high as f64
    }

    /// Above 1 by the share of the image that is cropped away, as an exact fraction `(numerator, denominator)`.
    fn aspect_mismatch(self, width_px: u32, height_px: u32) -> (u64, u64) {
        let a = u64::from(self.width_px) * u64::from(height_px);
        let b = u64::from(self.height_px) * u64::from(width_px);
        (a.max(b), a.min(b))
    }

    fn area(self) -> u64 {
        u64::from(self.width_px) * u64::from(self.height_px)
    }
}

/// All sizes with sides in multiples of `step_px`, area at most `resolution_px` squared, and aspect between 1:4 and 4:1.
///
/// For each width the tallest height that fits, and the same turned by 90 degrees; sorted, without repetition.
///
/// # Panics
/// If `step_px` is 0 or more than `resolution_px`; the configuration rules both out.
pub fn buckets(resolution_px: u32, step_px: u32) -> Vec<Bucket> {
    assert!(
        (1..=resolution_px).contains(&step_px),
        "bucket step {step_px} must be between 1 and the resolution {resolution_px}"
    );
    let (area, step) = (u64::from(resolution_px).pow(2), u64::from(step_px));
    let mut sizes = Vec::new();
    let mut long = u64::from(resolution_px) / step * step;
    loop {
        let short = (area / long / step * step).min(long);
        if short == 0 || long > u64::from(MAX_ASPECT) * short {
            break;
        }
        let [long_px, short_px] =
            [long, short].map(|side| u32::try_from(side).expect("at most 4 * resolution"));
        sizes.push(Bucket {
            width_px: long_px,
            height_px: short_px,
        });
        sizes.push(Bucket {
            width_px: short_px,
            height_px: long_px,
        });
        long += step;
    }
    sizes.sort_unstable();
    sizes.dedup();
    sizes
}

/// The bucket whose aspect is closest to the image's, so that least is cropped away; of equals, the largest.
///
/// # Panics
/// If `buckets` is empty or a side of the image is 0.
pub fn nearest_bucket(buckets: &[Bucket], width_px: u32, height_px: u32) -> Bucket {
    assert!(
        width_px > 0 && height_px > 0,
        "an image has at least one pixel"
    );
    *buckets
        .iter()
        .min_by(|x, y| {
            let (x_high, x_low) = x.aspect_mismatch(width_px, height_px);
            let (y_high, y_low) = y.aspect_mismatch(width_px, height_px);
            // x_high / x_low against y_high / y_low, without rounding
            (u128::from(x_high) * u128::from(y_low))
                .cmp(&(u128::from(y_high) * u128::from(x_low)))
                .then_with(|| y.area().cmp(&x.area()))
        })
        .expect("buckets() always gives the square one")
}

/// Cuts `image` to the bucket's aspect, at its centre or `at` a place, and resizes it to the bucket's size with Lanczos3.
///
/// A place is how far the cut is from left and top, each in [0, 1) of the way that there is.
///
/// Images smaller than the bucket are enlarged; [`Bucket::enlargement`] tells by how much. The same pixels give the same
/// result on one platform.
///
/// # Panics
/// If a side of the image is 0.
pub fn resize_and_crop(image: &RgbImage, bucket: Bucket, at: Option<[f64; 2]>) -> RgbImage {
    let (width, height) = image.dimensions();
    assert!(width > 0 && height > 0, "an image has at least one pixel");
    // the largest box with the bucket's aspect
    let crop_width = scaled(height, bucket.width_px, bucket.height_px).min(width);
    let crop_height = scaled(width, bucket.height_px, bucket.width_px).min(height);
    let (across, down) = (width - crop_width, height - crop_height);
    let [left, top] = match at {
        None => [across / 2, down / 2],
        Some([x, y]) => {
            let place = |way: u32, at: f64| ((f64::from(way) + 1.0) * at) as u32;
            [place(across, x).min(across), place(down, y).min(down)]
        }
    };
    let cropped = imageops::crop_imm(image, left, top, crop_width, crop_height);
    if (crop_width, crop_height) == (bucket.width_px, bucket.height_px) {
        return cropped.to_image();
    }
    imageops::resize(
        &*cropped,
        bucket.width_px,
        bucket.height_px,
        FilterType::Lanczos3,
    )
}

/// A reference picture as sampling reads it.
///
/// # Panics
/// If a side of the image is 0.
pub fn fit_reference(image: &RgbImage, fit: ReferenceFit) -> RgbImage {
    let [width, height] = fit.resized;
    let [cropped_width, cropped_height] = fit.cropped;
    let (left, top) = ((width - cropped_width) / 2, (height - cropped_height) / 2);
    let cut = |image: &RgbImage| {
        imageops::crop_imm(image, left, top, cropped_width, cropped_height).to_image()
    };
    match image.dimensions() == (width, height) {
        true => cut(image),
        false => cut(&imageops::resize(
            image,
            width,
            height,
            FilterType::Lanczos3,
        )),
    }
}

/// `side * numerator / denominator`, rounded to nearest, at least 1 and at most `u32::MAX`.
fn scaled(side: u32, numerator: u32, denominator: u32) -> u32 {
    let (product, denominator) = (
        u64::from(side) * u64::from(numerator),
        u64::from(denominator),
    );
    let rounded = (product + denominator / 2) / denominator;
    u32::try_from(rounded.max(1)).unwrap_or(u32::MAX)
}

/// The image as the VAE takes it: channel by channel, row by row, 0 to -1 and 255 to 1.
///
/// # Shapes
/// - returns `[3, height_px, width_px]`, flattened
pub fn to_chw_f32(image: &RgbImage) -> Vec<f32> {
    let pixels = image.as_raw();
    let mut values = Vec::with_capacity(pixels.len());
    for channel in 0..3 {
        values.extend(
            pixels[channel..]
                .iter()
                .step_by(3)
                .map(|&byte| f32::from(byte) / 255.0 * 2.0 - 1.0),
        );
    }
    values
}

#[cfg(test)]
mod tests {
    use image::Rgb;

    use super::*;

    fn bucket(width_px: u32, height_px: u32) -> Bucket {
        Bucket {
            width_px,
            height_px,
        }
    }

    #[test]
    fn buckets_of_512() {
        let names: Vec<String> = buckets(512, 64).iter().map(Bucket::to_string).collect();
        assert_eq!(
            names,
            [
                "256x832", "256x896", "256x960", "256x1024", "320x704", "320x768", "384x640",
                "448x576", "512x512", "576x448", "640x384", "704x320", "768x320", "832x256",
                "896x256", "960x256", "1024x256",
            ]
        );
    }

    #[test]
    fn every_bucket_keeps_step_area_and_aspect() {
        for (resolution, step) in [
            (16, 16),
            (64, 64),
            (80, 64),
            (512, 64),
            (768, 32),
            (1024, 16),
            (1040, 48),
        ] {
            let buckets = buckets(resolution, step);
            assert!(!buckets.is_empty(), "{resolution} {step}");
            for b in &buckets {
                assert!(b.width_px % step == 0 && b.height_px % step == 0);
                assert!(b.width_px > 0 && b.height_px > 0);
                assert!(b.area() <= u64::from(resolution).pow(2));
                assert!(b.width_px <= 4 * b.height_px && b.height_px <= 4 * b.width_px);
                assert!(buckets.contains(&bucket(b.height_px, b.width_px)));
            }
        }
    }

    #[test]
    #[should_panic(expected = "bucket step 64 must be between 1 and the resolution 32")]
    fn a_step_above_the_resolution_is_a_bug() {
        buckets(32, 64);
    }

    #[test]
    fn nearest_bucket_follows_the_aspect() {
        let buckets = buckets(512, 64);
        assert_eq!(nearest_bucket(&buckets, 3000, 3000), bucket(512, 512));
        assert_eq!(nearest_bucket(&buckets, 5, 5), bucket(512, 512));
        assert_eq!(nearest_bucket(&buckets, 6000, 4000), bucket(640, 384));
        assert_eq!(nearest_bucket(&buckets, 4000, 6000), bucket(384, 640));
        assert_eq!(nearest_bucket(&buckets, 1600, 1200), bucket(576, 448));
        assert_eq!(nearest_bucket(&buckets, 16384, 1), bucket(1024, 256));
        assert_eq!(
            nearest_bucket(&buckets, u32::MAX, u32::MAX),
            bucket(512, 512)
        );
    }

    #[test]
    fn of_equal_aspects_the_largest_bucket_wins() {
        let both = [bucket(64, 64), bucket(128, 128)];
        assert_eq!(nearest_bucket(&both, 10, 10), bucket(128, 128));
    }

    #[test]
    fn an_image_of_the_buckets_size_is_unchanged() {
        let image = RgbImage::from_fn(64, 32, |x, y| Rgb([x as u8, y as u8, 7]));
        assert_eq!(resize_and_crop(&image, bucket(64, 32), None), image);
    }

    #[test]
    fn the_centre_is_kept() {
        // left third red, middle green, right blue: a square crop of a 3:1 image is the middle
        let image = RgbImage::from_fn(96, 32, |x, _| {
            let mut pixel = [0; 3];
            pixel[x as usize / 32] = 255;
            Rgb(pixel)
        });
        let square = resize_and_crop(&image, bucket(32, 32), None);
        assert!(square.pixels().all(|&pixel| pixel == Rgb([0, 255, 0])));
    }

    #[test]
    fn a_reference_is_resized_as_it_says_and_cut_in_the_middle() {
        let image = RgbImage::from_fn(52, 20, |x, y| Rgb([x as u8, y as u8, 7]));
        let cut = |resized, cropped| fit_reference(&image, ReferenceFit { resized, cropped });
        let middle = cut([52, 20], [48, 16]);
        assert_eq!(middle.dimensions(), (48, 16));
        assert_eq!(middle.get_pixel(0, 0), &Rgb([2, 2, 7]), "no pixel is mixed");
        let stretched = cut([32, 32], [32, 32]);
        let (first, last) = (stretched.get_pixel(0, 0), stretched.get_pixel(31, 31));
        assert!(
            first[0] < 2 && last[0] > 49 && last[1] > 18,
            "nothing is cut off"
        );
    }

    #[test]
    fn flat_colour_survives_any_scale() {
        for (width, height) in [(7, 5), (640, 480), (1, 900), (900, 1)] {
            let image = RgbImage::from_pixel(width, height, Rgb([10, 128, 250]));
            let resized = resize_and_crop(&image, bucket(64, 48), None);
            assert_eq!(resized.dimensions(), (64, 48));
            assert!(resized.pixels().all(|&pixel| pixel == Rgb([10, 128, 250])));
        }
    }

    #[test]
    fn a_one_pixel_strip_stays_cheap() {
        let strip = RgbImage::from_pixel(16384, 1, Rgb([1, 2, 3]));
        assert_eq!(
            resize_and_crop(&strip, bucket(1024, 256), None).dimensions(),
            (1024, 256)
        );
    }

    #[test]
    fn enlargement_is_the_covering_scale() {
        assert_eq!(bucket(512, 512).enlargement(256, 512), 2.0);
        assert_eq!(bucket(512, 512).enlargement(2048, 1024), 0.5);
    }

    #[test]
    fn what_is_cropped_is_what_the_aspects_differ_by() {
        assert_eq!(bucket(512, 512).cropped(300, 300), 0.0);
        assert_eq!(bucket(512, 512).cropped(600, 300), 0.5);
        assert_eq!(bucket(512, 256).cropped(256, 512), 0.75);
    }

    #[test]
    fn chw_values_are_planar_and_symmetric() {
        let image = RgbImage::from_fn(2, 1, |x, _| {
            if x == 0 {
                Rgb([0, 255, 51])
            } else {
                Rgb([255, 0, 204])
            }
        });
        let values = to_chw_f32(&image);
        assert_eq!(values[..4], [-1.0, 1.0, 1.0, -1.0]);
        assert!((values[4] + 0.6).abs() < 1e-6 && (values[5] - 0.6).abs() < 1e-6);
    }

    #[test]
    fn a_crop_is_cut_at_its_place() {
        // Columns 0 to 39 of a picture of one row of squares; the bucket is a square of 8.
        let image = RgbImage::from_fn(40, 8, |x, _| Rgb([x as u8, 0, 0]));
        let left = |at| resize_and_crop(&image, bucket(8, 8), at).get_pixel(0, 0)[0];
        assert_eq!(left(None), 16);
        assert_eq!(left(Some([0.0, 0.5])), 0);
        assert_eq!(left(Some([0.5, 0.5])), 16);
        assert_eq!(left(Some([0.9999, 0.5])), 32);
    }
}
