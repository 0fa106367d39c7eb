//! Image files: what is read, how large it may be, whether it is whole, and its pixels.
//!
//! Files are foreign until checked: sizes are bounded before anything is decoded, and a file cut short is an error although
//! some decoders would fill the rest with grey. All that can be refused without the pixels is refused by [`inspect`].

use std::fs::{self, File};
use std::io::{self, Cursor};
use std::path::Path;

use image::metadata::Orientation;
use image::{
    ColorType, DynamicImage, ExtendedColorType, ImageDecoder, ImageError, ImageFormat, ImageReader,
    Rgb, RgbImage,
};

use crate::data::colour::{Colour, PngColour};
use crate::data::error::{DatasetError, image_error, read_error};
use crate::data::text::read_up_to;

/// Extensions of the formats that are read; the content decides which one a file is.
const IMAGE_EXTENSIONS: [&str; 10] = [
    "png", "jpg", "jpeg", "jpe", "jfif", "webp", "bmp", "dib", "tif", "tiff",
];
/// Images by their name that cannot be decoded here; passing over a user's photographs in silence would be worse.
const OTHER_IMAGE_EXTENSIONS: [&str; 32] = [
    "3fr", "apng", "arw", "avif", "avifs", "cr2", "cr3", "dng", "exr", "gif", "hdr", "heic",
    "heics", "heif", "hif", "ico", "j2k", "jp2", "jxl", "jxr", "nef", "orf", "pbm", "pgm", "pnm",
    "ppm", "psd", "qoi", "raf", "rw2", "svg", "tga",
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

/// What an image file says about itself before any of its pixels is decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Width in pixels, upright.
    pub width_px: u32,
    /// Height in pixels, upright.
    pub height_px: u32,
    /// There are more pictures in the file (an animation, pages), which are not read.
    pub more_pictures: bool,
    /// There is a colour profile that cannot be used; the colours are taken for sRGB.
    pub unusable_profile: bool,
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

/// Size and peculiarities of the image in these bytes; `path` is only for errors.
///
/// # Errors
/// If it is in no format that is read here, is for print or HDR, claims a size over the limits, or is cut short.
pub fn inspect(path: &Path, bytes: &[u8], limits: &ImageLimits) -> Result<Header, DatasetError> {
    Ok(open(path, bytes, limits)?.header)
}

/// Decodes the bytes of an image file: upright as its EXIF orientation says, in sRGB, transparency on white, 8 bits a
/// channel.
///
/// The content decides the format, not the name; `path` is only for errors. The first of several pictures is taken.
///
/// # Errors
/// As [`inspect`], or if the pixels are corrupt.
pub fn decode_image(
    path: &Path,
    bytes: &[u8],
    limits: &ImageLimits,
) -> Result<RgbImage, DatasetError> {
    let opened = open(path, bytes, limits)?;
    let image = DynamicImage::from_decoder(opened.decoder);
    let image = image.map_err(|error| decode_error(path, limits, error))?;
    let mut image = match &opened.colour {
        Some(colour) => colour.to_srgb(image),
        None => image,
    };
    image.apply_orientation(opened.orientation);
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

/// Whether files with this extension are images that cannot be read here.
pub(super) fn is_other_image_extension(extension: &str) -> bool {
    is_one_of(&OTHER_IMAGE_EXTENSIONS, extension)
}

fn is_one_of(extensions: &[&str], extension: &str) -> bool {
    extensions
        .iter()
        .any(|known| known.eq_ignore_ascii_case(extension))
}

/// Refuses what is not a readable file with something in it.
fn check_image_file(path: &Path) -> Result<(), DatasetError> {
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

/// A file that was checked, up to its pixels.
struct Opened<D> {
    header: Header,
    decoder: D,
    orientation: Orientation,
    /// `None` for sRGB.
    colour: Option<Colour>,
}

fn open<'a>(
    path: &Path,
    bytes: &'a [u8],
    limits: &ImageLimits,
) -> Result<Opened<impl ImageDecoder + 'a>, DatasetError> {
    let cannot_decode = |error| decode_error(path, limits, error);
    let format = image::guess_format(bytes).ok().filter(|format| {
        use ImageFormat::{Bmp, Jpeg, Png, Tiff, WebP};
        matches!(format, Png | Jpeg | WebP | Bmp | Tiff)
    });
    let Some(format) = format else {
        return Err(image_error(path, not_an_image(bytes)));
    };
    let Some(structure) = structure(format, bytes) else {
        return Err(image_error(path, "is cut short"));
    };

    let cmyk = "is in CMYK, the colours of print: convert it to RGB and save it again";
    if structure.is_cmyk {
        return Err(image_error(path, cmyk));
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
    if matches!(
        decoder.original_color_type(),
        ExtendedColorType::Cmyk8 | ExtendedColorType::Cmyk16
    ) {
        return Err(image_error(path, cmyk));
    }
    let hdr = "is an HDR picture, whose brightness has no meaning here: save it with 8 or 16 bits in sRGB";
    if matches!(decoder.color_type(), ColorType::Rgb32F | ColorType::Rgba32F) {
        return Err(image_error(path, hdr));
    }

    let profile = decoder.icc_profile().map_err(cannot_decode)?;
    let colour = Colour::of(profile.as_deref(), &structure.png_colour);
    let unusable_profile = colour.is_err();
    let colour = colour.unwrap_or_default();
    if colour.as_ref().is_some_and(Colour::is_hdr) {
        return Err(image_error(path, hdr));
    }

    let orientation = match format {
        ImageFormat::Tiff => decoder.orientation().map_err(cannot_decode)?,
        _ => {
            let exif = match structure.exif {
                Some(exif) => Some(exif.to_vec()),
                None => decoder.exif_metadata().map_err(cannot_decode)?,
            };
            exif.and_then(|exif| {
                let exif = exif.strip_prefix(b"Exif\0\0").unwrap_or(&exif); // as in a JPEG, where it does not belong
                Orientation::from_exif_chunk(exif)
            })
            .unwrap_or(Orientation::NoTransforms)
        }
    };
    let (width_px, height_px) = match orientation {
        Orientation::Rotate90
        | Orientation::Rotate270
        | Orientation::Rotate90FlipH
        | Orientation::Rotate270FlipH => (height, width),
        _ => (width, height),
    };
    let header = Header {
        width_px,
        height_px,
        more_pictures: structure.more_pictures,
        unusable_profile,
    };
    Ok(Opened {
        header,
        decoder,
        orientation,
        colour,
    })
}

fn decode_error(path: &Path, limits: &ImageLimits, error: ImageError) -> DatasetError {
    match error {
        ImageError::Limits(_) => {
            let megabytes = limits.max_decoded_bytes >> 20;
            image_error(path, format!("takes more than {megabytes} MiB to decode"))
        }
        ImageError::IoError(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            image_error(path, "is cut short")
        }
        cause => DatasetError::Decode {
            path: path.into(),
            cause,
        },
    }
}

/// Why these bytes are no image that is read here, and what they are if that is known.
fn not_an_image(bytes: &[u8]) -> String {
    let not = "is not a PNG, JPEG or WebP file, nor BMP or TIFF";
    let starts = |magic: &[u8]| bytes.starts_with(magic);
    let text = bytes.trim_ascii_start().to_ascii_lowercase();
    let brand = bytes.get(4..12).unwrap_or_default();
    let (what, mend) = if starts(b"version https://git-lfs") {
        ("a pointer of Git LFS", "fetch it with `git lfs pull`")
    } else if text.starts_with(b"<!doctype html") || text.starts_with(b"<html") {
        ("a web page", "download the picture again")
    } else {
        let name = match brand {
            b"ftypavif" | b"ftypavis" => "AVIF",
            b"ftypheic" | b"ftypheix" | b"ftyphevc" | b"ftypmif1" | b"ftypmsf1" => "HEIC",
            _ if brand.starts_with(b"ftyp") => "a film",
            _ if starts(b"GIF8") => "GIF",
            _ if starts(b"\xff\x0a") || starts(b"\0\0\0\x0cJXL ") => "JPEG XL",
            _ if starts(b"\0\0\0\x0cjP  ") || starts(b"\xff\x4f\xff\x51") => "JPEG 2000",
            _ if starts(b"8BPS") => "a Photoshop document",
            _ if starts(b"%PDF") => "PDF",
            _ if starts(b"\x76\x2f\x31\x01") => "OpenEXR",
            _ if text.starts_with(b"<svg") || text.starts_with(b"<?xml") => "SVG",
            _ => return not.into(),
        };
        (name, "convert it to png or jpg")
    };
    format!("{not}: it is {what}; {mend}")
}

/// What stands around the pixels, as far as decoders do not tell.
#[derive(Debug, Default)]
struct Structure<'a> {
    /// More than one frame or page.
    more_pictures: bool,
    /// A JPEG of four components.
    is_cmyk: bool,
    /// The EXIF data of a PNG, wherever it stands.
    exif: Option<&'a [u8]>,
    png_colour: PngColour,
}

/// Walks over the parts of the file; `None` if they do not lie within it or its end mark is missing.
///
/// Decoders do not tell: the JPEG decoder fills what is missing with grey, and no decoder looks beyond the last pixel. BMP
/// and TIFF have no end mark: there the decoder finds what is missing.
fn structure(format: ImageFormat, bytes: &[u8]) -> Option<Structure<'_>> {
    match format {
        ImageFormat::Png => png(bytes),
        ImageFormat::Jpeg => jpeg(bytes),
        ImageFormat::WebP => webp(bytes),
        ImageFormat::Tiff => Some(Structure {
            more_pictures: tiff_has_pages(bytes).unwrap_or(false),
            ..Structure::default()
        }),
        _ => Some(Structure::default()),
    }
}

/// To the IEND chunk.
fn png(bytes: &[u8]) -> Option<Structure<'_>> {
    let mut found = Structure::default();
    let mut at = 8; // signature
    loop {
        let length = u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?) as usize;
        let kind = bytes.get(at + 4..at + 8)?;
        let data = bytes.get(at + 8..(at + 8).checked_add(length)?)?;
        at = at.checked_add(12)?.checked_add(length)?; // length, kind, data, checksum
        if at > bytes.len() {
            return None;
        }
        match kind {
            b"IEND" => return Some(found),
            b"acTL" => found.more_pictures = data.get(..4) != Some(&[0, 0, 0, 1]),
            b"eXIf" => found.exif = Some(data),
            _ => found.png_colour.read(kind, data),
        }
    }
}

/// To the end-of-image marker.
fn jpeg(bytes: &[u8]) -> Option<Structure<'_>> {
    let mut found = Structure::default();
    let mut at = 2; // start of image
    loop {
        // to the next marker, over entropy-coded data with its stuffed zeros and restart markers
        at += bytes.get(at..)?.iter().position(|&byte| byte == 0xff)?;
        match *bytes.get(at + 1)? {
            0xff => at += 1,
            0x00 | 0x01 | 0xd0..=0xd8 => at += 2,
            0xd9 => return Some(found),
            marker => {
                if matches!(marker, 0xc0..=0xcf) && !matches!(marker, 0xc4 | 0xc8 | 0xcc) {
                    found.is_cmyk = *bytes.get(at + 9)? == 4; // length, precision, height, width come before
                }
                let length = u16::from_be_bytes(*bytes.get(at + 2..)?.first_chunk()?);
                at += 2 + usize::from(length);
            }
        }
    }
}

/// To the end of the last chunk.
fn webp(bytes: &[u8]) -> Option<Structure<'_>> {
    let size_at = |at: usize| -> Option<usize> {
        let size = u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?);
        usize::try_from(size).ok()
    };
    let mut frames = 0;
    let end = size_at(4)?.checked_add(8)?; // "RIFF" and the size come before what the size counts
    let mut at = 12; // "RIFF", size, "WEBP"
    while at < end {
        let size = size_at(at + 4)?;
        frames += usize::from(bytes.get(at..at + 4) == Some(b"ANMF"));
        at = at.checked_add(8)?.checked_add(size)?;
        if at > bytes.len() {
            return None;
        }
        at += size % 2; // padding
    }
    (end <= bytes.len()).then_some(Structure {
        more_pictures: frames > 1,
        ..Structure::default()
    })
}

/// Whether another directory follows the first; `None` in a BigTIFF or where it lies outside.
fn tiff_has_pages(bytes: &[u8]) -> Option<bool> {
    let little = bytes.starts_with(b"II");
    let u32_at = |at: usize| -> Option<u32> {
        let field = *bytes.get(at..)?.first_chunk()?;
        Some(if little {
            u32::from_le_bytes(field)
        } else {
            u32::from_be_bytes(field)
        })
    };
    let u16_at = |at: usize| -> Option<u16> {
        let field = *bytes.get(at..)?.first_chunk()?;
        Some(if little {
            u16::from_le_bytes(field)
        } else {
            u16::from_be_bytes(field)
        })
    };
    if u16_at(2)? != 42 {
        return None;
    }
    let directory = usize::try_from(u32_at(4)?).ok()?;
    let entries = usize::from(u16_at(directory)?);
    let next = directory.checked_add(2)?.checked_add(12 * entries)?;
    Some(u32_at(next)? != 0)
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
