//! Image files: what is read, how large it may be, whether it is whole, and its pixels.
//!
//! Files are foreign until checked: sizes are bounded before anything is decoded, and a file cut short is an error although
//! some decoders would fill the rest with grey.

use std::fs::{self, File};
use std::io::Cursor;
use std::path::Path;

use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Rgb, RgbImage};

use crate::data::error::{DatasetError, image_error, read_error};
use crate::data::text::read_up_to;

const IMAGE_EXTENSIONS: [&str; 4] = ["png", "jpg", "jpeg", "webp"];
/// Images by their name that cannot be decoded here; passing over a user's photographs in silence would be worse.
const OTHER_IMAGE_EXTENSIONS: [&str; 9] = [
    "avif", "bmp", "gif", "heic", "heif", "jxl", "tga", "tif", "tiff",
];

/// What an image may claim before it is decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageLimits {
    /// Longest side in pixels.
    pub max_side_px: u32,
    /// Largest area in pixels.
    pub max_pixels: u64,
    /// Largest file in bytes.
    pub max_file_bytes: u64,
    /// Most memory for decoding, in bytes.
    pub max_decoded_bytes: u64,
}

impl Default for ImageLimits {
    /// 16384 pixels a side, 100 megapixels, a 256 MiB file, 1 GiB decoded.
    fn default() -> Self {
        Self {
            max_side_px: 16384,
            max_pixels: 100_000_000,
            max_file_bytes: 256 << 20,
            max_decoded_bytes: 1 << 30,
        }
    }
}

/// The bytes of an image file.
///
/// # Errors
/// If it is empty, larger than the limit or unreadable.
pub fn read_image(path: &Path, limits: &ImageLimits) -> Result<Vec<u8>, DatasetError> {
    check_image_file(path)?;
    let bytes = read_up_to(path, limits.max_file_bytes)?;
    bytes.ok_or_else(|| {
        let megabytes = limits.max_file_bytes >> 20;
        image_error(path, format!("is larger than {megabytes} MiB"))
    })
}

/// Decodes the bytes of an image file: upright as its EXIF orientation says, transparency on white, 8 bits a channel.
///
/// The content decides the format, not the name; `path` is only for errors. Colour profiles are not applied.
///
/// # Errors
/// If it is not a PNG, JPEG or WebP, claims a size over the limits (checked before decoding), is cut short or corrupt.
pub fn decode_image(
    path: &Path,
    bytes: &[u8],
    limits: &ImageLimits,
) -> Result<RgbImage, DatasetError> {
    let cannot_decode = |cause| match cause {
        ImageError::Limits(_) => {
            let megabytes = limits.max_decoded_bytes >> 20;
            image_error(path, format!("takes more than {megabytes} MiB to decode"))
        }
        cause => DatasetError::Decode {
            path: path.into(),
            cause,
        },
    };
    let format = image::guess_format(bytes).ok().filter(|format| {
        matches!(
            format,
            ImageFormat::Png | ImageFormat::Jpeg | ImageFormat::WebP
        )
    });
    let Some(format) = format else {
        return Err(image_error(path, "is not a PNG, JPEG or WebP file"));
    };
    if !is_whole(format, bytes) {
        return Err(image_error(path, "is cut short"));
    }

    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut memory = image::Limits::no_limits();
    memory.max_alloc = Some(limits.max_decoded_bytes);
    reader.limits(memory.clone());
    let mut decoder = reader.into_decoder().map_err(cannot_decode)?;

    let (width, height) = decoder.dimensions();
    let pixels = u64::from(width) * u64::from(height);
    if pixels == 0 {
        return Err(image_error(path, "has no pixels"));
    }
    if width > limits.max_side_px || height > limits.max_side_px || pixels > limits.max_pixels {
        let problem = format!(
            "is {width}x{height} pixels; at most {} a side and {} in all are allowed",
            limits.max_side_px, limits.max_pixels
        );
        return Err(image_error(path, problem));
    }
    memory
        .reserve(decoder.total_bytes())
        .map_err(cannot_decode)?;

    let orientation = decoder.orientation().map_err(cannot_decode)?;
    let mut image = DynamicImage::from_decoder(decoder).map_err(cannot_decode)?;
    image.apply_orientation(orientation);
    Ok(on_white(image))
}

/// [`read_image`], then [`decode_image`].
pub fn load_image(path: &Path, limits: &ImageLimits) -> Result<RgbImage, DatasetError> {
    decode_image(path, &read_image(path, limits)?, limits)
}

/// Whether files with this extension are taken for images.
pub(crate) fn is_image_extension(extension: &str) -> bool {
    is_one_of(&IMAGE_EXTENSIONS, extension)
}

fn is_one_of(extensions: &[&str], extension: &str) -> bool {
    extensions
        .iter()
        .any(|known| known.eq_ignore_ascii_case(extension))
}

pub(super) fn extension_of(name: &str) -> Option<&str> {
    name.rsplit_once('.').map(|(_, extension)| extension)
}

pub(super) fn is_other_image(name: &str) -> bool {
    extension_of(name).is_some_and(|extension| is_one_of(&OTHER_IMAGE_EXTENSIONS, extension))
}

/// Refuses what is not a readable file with something in it.
pub(super) fn check_image_file(path: &Path) -> Result<(), DatasetError> {
    let cannot_read = |error| read_error(path, error);
    let metadata = fs::metadata(path).map_err(cannot_read)?;
    if !metadata.is_file() {
        return Err(image_error(path, "is not a file"));
    }
    if metadata.len() == 0 {
        return Err(image_error(path, "is empty (0 bytes)"));
    }
    File::open(path).map_err(cannot_read)?;
    Ok(())
}

/// Whether the parts of the file lie within it and its end mark is there.
///
/// Decoders do not tell: the JPEG decoder fills what is missing with grey, and no decoder looks beyond the last pixel.
fn is_whole(format: ImageFormat, bytes: &[u8]) -> bool {
    let whole = match format {
        ImageFormat::Png => png_end(bytes),
        ImageFormat::Jpeg => jpeg_end(bytes),
        ImageFormat::WebP => webp_end(bytes),
        _ => None,
    };
    whole.is_some()
}

/// Position after the IEND chunk.
fn png_end(bytes: &[u8]) -> Option<usize> {
    let mut at = 8; // signature
    loop {
        let length = u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?) as usize;
        let kind = bytes.get(at + 4..at + 8)?;
        at = at.checked_add(12)?.checked_add(length)?; // length, kind, data, checksum
        if at > bytes.len() {
            return None;
        }
        if kind == b"IEND" {
            return Some(at);
        }
    }
}

/// Position after the end-of-image marker.
fn jpeg_end(bytes: &[u8]) -> Option<usize> {
    let mut at = 2; // start of image
    loop {
        // to the next marker, over entropy-coded data with its stuffed zeros and restart markers
        at += bytes.get(at..)?.iter().position(|&byte| byte == 0xff)?;
        match *bytes.get(at + 1)? {
            0xff => at += 1,
            0x00 | 0x01 | 0xd0..=0xd8 => at += 2,
            0xd9 => return Some(at + 2),
            _ => {
                let length = u16::from_be_bytes(*bytes.get(at + 2..)?.first_chunk()?);
                at += 2 + usize::from(length);
            }
        }
    }
}

/// Position after the last chunk.
fn webp_end(bytes: &[u8]) -> Option<usize> {
    let size_at = |at: usize| -> Option<usize> {
        let size = u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?);
        usize::try_from(size).ok()
    };
    let end = size_at(4)?.checked_add(8)?; // "RIFF" and the size come before what the size counts
    let mut at = 12; // "RIFF", size, "WEBP"
    while at < end {
        let size = size_at(at + 4)?;
        at = at.checked_add(8)?.checked_add(size)?;
        if at > bytes.len() {
            return None;
        }
        at += size % 2; // padding
    }
    (end <= bytes.len()).then_some(end)
}

/// 8 bits a channel, with transparent parts over white.
fn on_white(image: DynamicImage) -> RgbImage {
    if !image.color().has_alpha() {
        return image.into_rgb8();
    }
    let image = image.into_rgba8();
    RgbImage::from_fn(image.width(), image.height(), |x, y| {
        let [r, g, b, alpha] = image.get_pixel(x, y).0.map(u32::from);
        Rgb([r, g, b].map(|value| {
            let mixed = (value * alpha + 255 * (255 - alpha) + 127) / 255;
            u8::try_from(mixed).expect("a mean of two bytes")
        }))
    })
}

#[cfg(test)]
mod tests;
