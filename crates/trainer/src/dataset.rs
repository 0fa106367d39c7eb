//! Images with captions, found, checked and decoded.
//!
//! A dataset is a folder in one of two forms: `x.png` beside `x.txt`, or images with a `metadata.jsonl` whose lines hold
//! `file_name` and `text` (the convention of Hugging Face's `imagefolder`). Files are foreign until checked: every image
//! has exactly one caption and every caption one image, sizes are bounded before anything is decoded, and a file cut
//! short is an error although some decoders would fill the rest with grey.
//!
//! In the first form symbolic links are followed: the folder is the user's own arrangement. A `file_name` is only text
//! from a file and may not lead out of the folder.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::path::{Component, Path, PathBuf};

use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Rgb, RgbImage};
use lora_core::strict_json::parse_json;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::config::DatasetSection;
use crate::nearest::{one_line, shown};

/// The name of the file that lists images and captions.
pub const METADATA_FILE: &str = "metadata.jsonl";

const IMAGE_EXTENSIONS: [&str; 4] = ["png", "jpg", "jpeg", "webp"];
/// Images by their name that cannot be decoded here; passing over a user's photographs in silence would be worse.
const OTHER_IMAGE_EXTENSIONS: [&str; 9] = [
    "avif", "bmp", "gif", "heic", "heif", "jxl", "tga", "tif", "tiff",
];
/// The encoders read 512 tokens at most; this is some thirty times as much text.
const MAX_CAPTION_BYTES: u64 = 64 << 10;
/// A caption, its JSON escapes, and whatever other columns there are.
const MAX_METADATA_LINE_BYTES: u64 = 1 << 20;

/// One image and the text that describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// Path of the image from the dataset folder, with `/` on every platform; unique in the dataset.
    pub name: String,
    /// Where the image is.
    pub image: PathBuf,
    /// The caption, without surrounding white space; may be empty.
    pub caption: String,
}

/// What a sample was when it was last looked at, to notice later that it changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SampleDigest {
    /// [`Sample::name`].
    pub name: String,
    /// SHA-256 of the image file, in hex.
    pub image_sha256: String,
    /// SHA-256 of the caption, in hex.
    pub caption_sha256: String,
}

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

/// Why a dataset was refused.
#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    /// There is no such folder.
    #[error("dataset folder `{}` does not exist", shown(path))]
    NoFolder {
        /// `dataset.path`.
        path: PathBuf,
    },
    /// The path leads to a file.
    #[error("dataset path `{}` is not a folder", shown(path))]
    NotAFolder {
        /// `dataset.path`.
        path: PathBuf,
    },
    /// A file or folder could not be read.
    #[error("cannot read `{}`", shown(path))]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// There is nothing to train on.
    #[error(
        "no images (png, jpg, jpeg or webp) in `{}`; subfolders are searched only with a {METADATA_FILE}",
        shown(path)
    )]
    Empty {
        /// `dataset.path`.
        path: PathBuf,
    },
    /// A file name that cannot be kept as text.
    #[error("the name of `{}` is not UTF-8", shown(path))]
    Name {
        /// The file.
        path: PathBuf,
    },
    /// An image in a format that is not read here.
    #[error(
        "image `{}` is in an unsupported format: convert it to png, jpg or webp",
        shown(path)
    )]
    UnsupportedImage {
        /// The image.
        path: PathBuf,
    },
    /// Two images that one caption file would belong to.
    #[error(
        "images `{}` and `{second}` share the caption `{caption}`: rename one",
        shown(first)
    )]
    SameStem {
        /// The first, by name.
        first: PathBuf,
        /// File name of the second.
        second: String,
        /// File name of the caption.
        caption: String,
    },
    /// An image without a caption.
    #[error(
        "image `{}` has no caption: expected `{caption}` beside it",
        shown(image)
    )]
    CaptionMissing {
        /// The image.
        image: PathBuf,
        /// File name of the caption.
        caption: String,
    },
    /// A caption without an image.
    #[error(
        "caption `{}` has no image: expected `{stem}.png`, .jpg, .jpeg or .webp beside it",
        shown(caption)
    )]
    ImageMissing {
        /// The caption.
        caption: PathBuf,
        /// Its name without the extension.
        stem: String,
    },
    /// A caption that is not text.
    #[error("caption `{}` is not UTF-8", shown(path))]
    CaptionNotUtf8 {
        /// The caption.
        path: PathBuf,
    },
    /// A caption longer than any caption is.
    #[error("caption `{}` is larger than 64 KiB", shown(path))]
    CaptionTooLarge {
        /// The caption.
        path: PathBuf,
    },
    /// A line of the list that cannot be used.
    #[error("`{}` line {line}: {problem}", shown(path))]
    Metadata {
        /// The list.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// An image that the list does not mention.
    #[error("image `{}` is not listed in {METADATA_FILE}", shown(image))]
    Unlisted {
        /// The image.
        image: PathBuf,
    },
    /// An image with a caption in both forms.
    #[error(
        "image `{}` has a caption in {METADATA_FILE} and in `{caption}`: remove one",
        shown(image)
    )]
    TwoCaptions {
        /// The image.
        image: PathBuf,
        /// File name of the other caption.
        caption: String,
    },
    /// An image that cannot be what it should be.
    #[error("image `{}` {problem}", shown(path))]
    Image {
        /// The image.
        path: PathBuf,
        /// The rest of the sentence.
        problem: String,
    },
    /// An image that its decoder refuses.
    #[error(
        "cannot decode image `{}`: {cause}; replace it or save it again",
        shown(path)
    )]
    Decode {
        /// The image.
        path: PathBuf,
        /// What the decoder says, all of it: it is no `source`, which would be said twice.
        cause: ImageError,
    },
}

/// The samples of a dataset, sorted by name; the same on every platform.
///
/// Hidden files and files that are neither image nor caption are passed over.
///
/// # Errors
/// On anything that leaves an image without its one caption, a caption without its image, or a file unreadable or empty.
pub fn scan(config: &DatasetSection) -> Result<Vec<Sample>, DatasetError> {
    let folder = config.path.as_path();
    match fs::metadata(folder) {
        Ok(metadata) if metadata.is_dir() => {}
        Ok(_) => {
            return Err(DatasetError::NotAFolder {
                path: folder.into(),
            });
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(DatasetError::NoFolder {
                path: folder.into(),
            });
        }
        Err(error) => return Err(read_error(folder, error)),
    }
    let mut samples = if fs::symlink_metadata(folder.join(METADATA_FILE)).is_ok() {
        scan_listed(folder, &config.caption_extension)?
    } else {
        scan_pairs(folder, &config.caption_extension)?
    };
    if samples.is_empty() {
        return Err(DatasetError::Empty {
            path: folder.into(),
        });
    }
    samples.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    Ok(samples)
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

/// SHA-256 of some bytes, in hex.
pub fn content_digest(bytes: &[u8]) -> String {
    let mut hex = String::with_capacity(64);
    for byte in Sha256::digest(bytes) {
        for digit in [byte >> 4, byte & 15] {
            hex.push(char::from_digit(digit.into(), 16).expect("four bits are one hex digit"));
        }
    }
    hex
}

/// Digests of all samples, in their order; reads every image file once.
pub fn sample_digests(
    samples: &[Sample],
    limits: &ImageLimits,
) -> Result<Vec<SampleDigest>, DatasetError> {
    let digest = |sample: &Sample| {
        Ok(SampleDigest {
            name: sample.name.clone(),
            image_sha256: content_digest(&read_image(&sample.image, limits)?),
            caption_sha256: content_digest(sample.caption.as_bytes()),
        })
    };
    samples.iter().map(digest).collect()
}

/// One digest for the whole dataset: equal only if names, image files, captions and their order are.
pub fn dataset_digest(samples: &[SampleDigest]) -> String {
    let mut all = Vec::new();
    for sample in samples {
        // the length in front keeps one name and the next field apart
        for field in [&sample.name, &sample.image_sha256, &sample.caption_sha256] {
            all.extend((field.len() as u64).to_le_bytes());
            all.extend(field.as_bytes());
        }
    }
    content_digest(&all)
}

/// What happened to a dataset between two looks at it, a line for each change, by name; empty if nothing did.
pub fn changes(old: &[SampleDigest], new: &[SampleDigest]) -> Vec<String> {
    let by_name = |samples: &'_ [SampleDigest]| -> BTreeMap<String, SampleDigest> {
        let named = samples
            .iter()
            .map(|sample| (sample.name.clone(), sample.clone()));
        named.collect()
    };
    let (old, new) = (by_name(old), by_name(new));
    let names: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    let mut lines = Vec::new();
    for name in names {
        let shown = shown(Path::new(name));
        match (old.get(name), new.get(name)) {
            (Some(old), Some(new)) => {
                if old.image_sha256 != new.image_sha256 {
                    lines.push(format!("changed image {shown}"));
                }
                if old.caption_sha256 != new.caption_sha256 {
                    lines.push(format!("changed caption of {shown}"));
                }
            }
            (None, _) => lines.push(format!("added {shown}")),
            (_, None) => lines.push(format!("removed {shown}")),
        }
    }
    lines
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

// Folders

/// `x.png` with `x.txt`.
fn scan_pairs(folder: &Path, caption_extension: &str) -> Result<Vec<Sample>, DatasetError> {
    let mut images: BTreeMap<String, String> = BTreeMap::new();
    let mut captions = BTreeSet::new();
    for name in list(folder)? {
        let Some((stem, extension)) = name.rsplit_once('.') else {
            continue;
        };
        if is_image_extension(extension) {
            if let Some(first) = images.insert(stem.into(), name.clone()) {
                return Err(DatasetError::SameStem {
                    first: folder.join(first),
                    second: one_line(&name),
                    caption: one_line(&format!("{stem}.{caption_extension}")),
                });
            }
        } else if is_other_image(&name) {
            return Err(DatasetError::UnsupportedImage {
                path: folder.join(name),
            });
        } else if extension == caption_extension {
            captions.insert(stem.to_owned());
        }
    }

    let mut samples = Vec::new();
    for (stem, name) in images {
        let image = folder.join(&name);
        check_image_file(&image)?;
        let caption = format!("{stem}.{caption_extension}");
        if !captions.remove(&stem) {
            let caption = one_line(&caption);
            return Err(DatasetError::CaptionMissing { image, caption });
        }
        let caption = read_caption(&folder.join(caption))?;
        samples.push(Sample {
            name,
            image,
            caption,
        });
    }
    if let Some(stem) = captions.pop_first() {
        return Err(DatasetError::ImageMissing {
            caption: folder.join(format!("{stem}.{caption_extension}")),
            stem: one_line(&stem),
        });
    }
    Ok(samples)
}

/// Images listed in `metadata.jsonl`.
fn scan_listed(folder: &Path, caption_extension: &str) -> Result<Vec<Sample>, DatasetError> {
    #[derive(Deserialize)]
    struct Row {
        file_name: String,
        text: String,
    }

    let list_path = folder.join(METADATA_FILE);
    let inside = fs::canonicalize(folder).map_err(|error| read_error(folder, error))?;
    let mut file = BufReader::new(open(&list_path)?);

    let mut samples = Vec::new();
    let mut first_lines: BTreeMap<String, usize> = BTreeMap::new();
    for line in 1.. {
        let wrong = |problem: String| DatasetError::Metadata {
            path: list_path.clone(),
            line,
            problem,
        };
        let mut bytes = Vec::new();
        let read = Read::take(&mut file, MAX_METADATA_LINE_BYTES + 1).read_until(b'\n', &mut bytes);
        if read.map_err(|error| read_error(&list_path, error))? == 0 {
            break;
        }
        if bytes.len() as u64 > MAX_METADATA_LINE_BYTES {
            return Err(wrong("is larger than 1 MiB".into()));
        }
        let text = str::from_utf8(&bytes).map_err(|_| wrong("is not UTF-8".into()))?;
        let text = text.strip_prefix('\u{feff}').unwrap_or(text).trim();
        if text.is_empty() {
            continue;
        }
        if !text.starts_with('{') {
            return Err(wrong("is not a JSON object".into())); // serde would take a list as well
        }
        let row: Row = parse_json(text.as_bytes()).map_err(|error| wrong(json_problem(&error)))?;

        let quoted = one_line(&row.file_name);
        let leaves = || {
            wrong(format!(
                "file_name `{quoted}` leads out of the dataset folder"
            ))
        };
        let name = inner_path(&row.file_name).ok_or_else(leaves)?;
        if !extension_of(&name).is_some_and(is_image_extension) {
            let problem = format!("file_name `{quoted}` does not end in png, jpg, jpeg or webp");
            return Err(wrong(problem));
        }
        if let Some(first) = first_lines.insert(name.clone(), line) {
            let problem = format!("file_name `{quoted}` was already listed on line {first}");
            return Err(wrong(problem));
        }
        let image = folder.join(&name);
        match fs::canonicalize(&image) {
            Ok(real) if real.starts_with(&inside) => {}
            Ok(_) => return Err(leaves()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(wrong(format!("image `{quoted}` does not exist")));
            }
            Err(error) => return Err(read_error(&image, error)),
        }
        check_image_file(&image)?;
        if row.text.len() as u64 > MAX_CAPTION_BYTES {
            return Err(wrong("text is larger than 64 KiB".into()));
        }
        let caption = row.text.trim().to_owned();
        samples.push(Sample {
            name,
            image,
            caption,
        });
    }
    check_all_listed(folder, "", caption_extension, &first_lines)?;
    Ok(samples)
}

/// Refuses images below `folder/prefix` that are not among `listed`, and captions of the other form beside those that are.
fn check_all_listed(
    folder: &Path,
    prefix: &str,
    caption_extension: &str,
    listed: &BTreeMap<String, usize>,
) -> Result<(), DatasetError> {
    for file in list(&folder.join(prefix))? {
        let name = format!("{prefix}{file}");
        let path = folder.join(&name);
        let kind = fs::symlink_metadata(&path).map_err(|error| read_error(&path, error))?;
        if kind.is_dir() {
            check_all_listed(folder, &format!("{name}/"), caption_extension, listed)?;
        } else if is_other_image(&name) {
            return Err(DatasetError::UnsupportedImage { path });
        } else if extension_of(&name).is_some_and(is_image_extension) {
            if !listed.contains_key(&name) {
                return Err(DatasetError::Unlisted { image: path });
            }
            let caption = path.with_extension(caption_extension);
            if caption.exists() {
                let caption = caption.file_name().unwrap_or_default().to_string_lossy();
                let caption = one_line(&caption);
                return Err(DatasetError::TwoCaptions {
                    image: path,
                    caption,
                });
            }
        }
    }
    Ok(())
}

/// Names in a folder, sorted, without hidden ones.
fn list(folder: &Path) -> Result<Vec<String>, DatasetError> {
    let cannot_read = |error| read_error(folder, error);
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(cannot_read)? {
        let entry = entry.map_err(cannot_read)?;
        let Ok(name) = entry.file_name().into_string() else {
            return Err(DatasetError::Name { path: entry.path() });
        };
        if !name.starts_with('.') {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// `text` as a path that stays below its folder, with `/` between its parts; `None` if it does not.
fn inner_path(text: &str) -> Option<String> {
    let mut parts = Vec::new();
    for component in Path::new(text).components() {
        match component {
            Component::Normal(part) => parts.push(part.to_str()?),
            Component::CurDir => {}
            _ => return None,
        }
    }
    Some(parts.join("/"))
}

fn extension_of(name: &str) -> Option<&str> {
    name.rsplit_once('.').map(|(_, extension)| extension)
}

fn is_other_image(name: &str) -> bool {
    extension_of(name).is_some_and(|extension| is_one_of(&OTHER_IMAGE_EXTENSIONS, extension))
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

fn read_caption(path: &Path) -> Result<String, DatasetError> {
    let bytes = read_up_to(path, MAX_CAPTION_BYTES)?;
    let bytes = bytes.ok_or_else(|| DatasetError::CaptionTooLarge { path: path.into() })?;
    let text =
        String::from_utf8(bytes).map_err(|_| DatasetError::CaptionNotUtf8 { path: path.into() })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text); // Windows editors put it there
    Ok(text.trim().to_owned())
}

/// Opens a regular file; a pipe in a dataset would block for ever.
fn open(path: &Path) -> Result<File, DatasetError> {
    let cannot_read = |error| read_error(path, error);
    if !fs::metadata(path).map_err(cannot_read)?.is_file() {
        return Err(cannot_read(io::Error::other("it is not a file")));
    }
    File::open(path).map_err(cannot_read)
}

/// The bytes of a file, or `None` if there are more than `max`.
fn read_up_to(path: &Path, max: u64) -> Result<Option<Vec<u8>>, DatasetError> {
    let mut bytes = Vec::new();
    let read = open(path)?.take(max + 1).read_to_end(&mut bytes);
    read.map_err(|error| read_error(path, error))?;
    Ok((bytes.len() as u64 <= max).then_some(bytes))
}

/// serde_json's message without the line, which is always 1 here.
fn json_problem(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let text = text.replace("missing field", "missing key");
    one_line(&text.replace(" at line 1 column ", " at column "))
}

fn read_error(path: &Path, source: io::Error) -> DatasetError {
    DatasetError::Read {
        path: path.into(),
        source,
    }
}

fn image_error(path: &Path, problem: impl Into<String>) -> DatasetError {
    DatasetError::Image {
        path: path.into(),
        problem: problem.into(),
    }
}

// Images

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
mod tests {
    use std::error::Error;

    use image::codecs::jpeg::JpegEncoder;
    use image::{ExtendedColorType, ImageEncoder, Rgba, RgbaImage};
    use tempfile::TempDir;

    use super::*;

    fn gradient() -> RgbImage {
        RgbImage::from_fn(40, 24, |x, y| {
            Rgb([6 * x as u8, 10 * y as u8, (x * y) as u8])
        })
    }

    fn encoded(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        image
            .write_to(&mut bytes, format)
            .expect("encode in memory");
        bytes.into_inner()
    }

    fn png() -> Vec<u8> {
        encoded(&gradient().into(), ImageFormat::Png)
    }

    fn jpeg() -> Vec<u8> {
        encoded(&gradient().into(), ImageFormat::Jpeg)
    }

    fn webp() -> Vec<u8> {
        encoded(&gradient().into(), ImageFormat::WebP)
    }

    /// A dataset folder with these files.
    fn folder(files: &[(&str, &[u8])]) -> TempDir {
        let folder = tempfile::tempdir().expect("temporary folder");
        for (name, bytes) in files {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().expect("a file has a folder")).expect("make folder");
            fs::write(path, bytes).expect("write file");
        }
        folder
    }

    fn section(folder: &TempDir) -> DatasetSection {
        DatasetSection {
            path: folder.path().into(),
            ..DatasetSection::default()
        }
    }

    /// The error as the program prints it, with the folder written as DIR.
    fn line(folder: &Path, error: &DatasetError) -> String {
        let mut line = error.to_string();
        let mut source = error.source();
        while let Some(error) = source {
            line = format!("{line}: {error}");
            source = error.source();
        }
        line.replace(&folder.display().to_string(), "DIR")
    }

    #[track_caller]
    fn assert_refused(folder: &TempDir, message: &str) {
        let error = scan(&section(folder)).expect_err("the dataset is bad");
        let line = line(folder.path(), &error);
        assert_eq!(line, message);
        assert!(!line.contains('\n'));
    }

    #[track_caller]
    fn assert_not_decoded(bytes: &[u8], message: &str) {
        let error = decode_image(Path::new("DIR/x"), bytes, &ImageLimits::default())
            .expect_err("the image is bad");
        assert_eq!(line(Path::new("DIR"), &error), message);
    }

    fn names(samples: &[Sample]) -> Vec<&str> {
        samples.iter().map(|sample| sample.name.as_str()).collect()
    }

    // Folders of pairs

    #[test]
    fn pairs_are_found_sorted_by_bytes_with_trimmed_captions() {
        let folder = folder(&[
            ("b.JPG", &jpeg()),
            ("b.txt", b"  a dog\r\n"),
            ("a.png", &png()),
            ("a.txt", "\u{feff}a cat, naïve\n".as_bytes()),
            ("Z.v2.webp", &webp()),
            ("Z.v2.txt", b""),
            (".hidden.png", b""),
            ("README.md", b"where the photographs are from"),
            ("sub/c.png", b"not looked at"),
        ]);
        let samples = scan(&section(&folder)).expect("a good dataset");
        assert_eq!(names(&samples), ["Z.v2.webp", "a.png", "b.JPG"]);
        let captions: Vec<&str> = samples
            .iter()
            .map(|sample| sample.caption.as_str())
            .collect();
        assert_eq!(captions, ["", "a cat, naïve", "a dog"]);
        assert_eq!(samples[1].image, folder.path().join("a.png"));
        for sample in &samples {
            load_image(&sample.image, &ImageLimits::default()).expect("a good image");
        }
    }

    #[test]
    fn another_caption_extension() {
        let folder = folder(&[
            ("a.png", &png()),
            ("a.caption", b"a cat"),
            ("a.txt", b"notes"),
        ]);
        let section = DatasetSection {
            caption_extension: "caption".into(),
            ..section(&folder)
        };
        assert_eq!(scan(&section).expect("a good dataset")[0].caption, "a cat");
    }

    #[test]
    fn missing_folder() {
        let folder = folder(&[]);
        let mut section = section(&folder);
        section.path.push("nowhere");
        let error = scan(&section).expect_err("no folder");
        assert_eq!(
            line(folder.path(), &error),
            "dataset folder `DIR/nowhere` does not exist"
        );
    }

    #[test]
    fn a_file_instead_of_a_folder() {
        let folder = folder(&[("a.png", &png())]);
        let mut section = section(&folder);
        section.path.push("a.png");
        let error = scan(&section).expect_err("no folder");
        assert_eq!(
            line(folder.path(), &error),
            "dataset path `DIR/a.png` is not a folder"
        );
    }

    #[test]
    fn empty_folder() {
        assert_refused(
            &folder(&[("sub/a.png", &png())]),
            "no images (png, jpg, jpeg or webp) in `DIR`; subfolders are searched only with a metadata.jsonl",
        );
    }

    #[test]
    fn image_without_caption() {
        assert_refused(
            &folder(&[("a.png", &png()), ("b.png", &png()), ("b.txt", b"b")]),
            "image `DIR/a.png` has no caption: expected `a.txt` beside it",
        );
    }

    #[test]
    fn caption_without_image() {
        assert_refused(
            &folder(&[("a.png", &png()), ("a.txt", b"a"), ("b.txt", b"b")]),
            "caption `DIR/b.txt` has no image: expected `b.png`, .jpg, .jpeg or .webp beside it",
        );
    }

    #[test]
    fn two_images_for_one_caption() {
        assert_refused(
            &folder(&[("a.png", &png()), ("a.jpg", &jpeg()), ("a.txt", b"a")]),
            "images `DIR/a.jpg` and `a.png` share the caption `a.txt`: rename one",
        );
    }

    #[test]
    fn photographs_in_other_formats_are_not_passed_over() {
        assert_refused(
            &folder(&[("a.png", &png()), ("a.txt", b"a"), ("b.HEIC", b"?")]),
            "image `DIR/b.HEIC` is in an unsupported format: convert it to png, jpg or webp",
        );
    }

    #[test]
    fn zero_byte_image() {
        assert_refused(
            &folder(&[("a.png", b""), ("a.txt", b"a")]),
            "image `DIR/a.png` is empty (0 bytes)",
        );
    }

    #[test]
    fn a_folder_named_like_an_image() {
        assert_refused(
            &folder(&[("a.png/x", b""), ("a.txt", b"a")]),
            "image `DIR/a.png` is not a file",
        );
    }

    #[test]
    fn a_folder_named_like_a_caption() {
        assert_refused(
            &folder(&[("a.png", &png()), ("a.txt/x", b"")]),
            "cannot read `DIR/a.txt`: it is not a file",
        );
    }

    #[test]
    fn caption_not_utf8() {
        assert_refused(
            &folder(&[("a.png", &png()), ("a.txt", b"caf\xe9")]),
            "caption `DIR/a.txt` is not UTF-8",
        );
    }

    #[test]
    fn caption_too_large() {
        let fits = [b'x'; 64 << 10];
        let samples = scan(&section(&folder(&[("a.png", &png()), ("a.txt", &fits)])));
        assert_eq!(
            samples.expect("64 KiB are allowed")[0].caption.len(),
            64 << 10
        );
        let too_large = vec![b'x'; 10 << 20];
        assert_refused(
            &folder(&[("a.png", &png()), ("a.txt", &too_large)]),
            "caption `DIR/a.txt` is larger than 64 KiB",
        );
    }

    #[cfg(unix)]
    #[test]
    fn unreadable_image() {
        let folder = folder(&[("a.txt", b"a")]);
        std::os::unix::fs::symlink("nowhere", folder.path().join("a.png")).expect("make a link");
        assert_refused(
            &folder,
            "cannot read `DIR/a.png`: No such file or directory (os error 2)",
        );
    }

    #[cfg(unix)]
    #[test]
    fn links_are_followed_among_pairs() {
        let store = folder(&[("1", &png())]);
        let folder = folder(&[("a.txt", b"a")]);
        std::os::unix::fs::symlink(store.path().join("1"), folder.path().join("a.png"))
            .expect("make a link");
        assert_eq!(
            names(&scan(&section(&folder)).expect("a good dataset")),
            ["a.png"]
        );
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn file_name_not_utf8() {
        use std::os::unix::ffi::OsStrExt;
        let folder = folder(&[]);
        let name = std::ffi::OsStr::from_bytes(b"a\xff.png");
        fs::write(folder.path().join(name), png()).expect("write file");
        assert_refused(&folder, "the name of `DIR/a\u{fffd}.png` is not UTF-8");
    }

    #[cfg(unix)]
    #[test]
    fn a_line_break_in_a_name_stays_in_the_line() {
        assert_refused(
            &folder(&[("a\nb.png", &png())]),
            "image `DIR/a\\nb.png` has no caption: expected `a\\nb.txt` beside it",
        );
    }

    // metadata.jsonl

    #[track_caller]
    fn assert_list_refused(list: &[u8], message: &str) {
        assert_refused(
            &folder(&[("a.png", &png()), ("metadata.jsonl", list)]),
            message,
        );
    }

    const ROW: &str = r#"{"file_name": "a.png", "text": "a"}"#;

    #[test]
    fn listed_images_are_found_in_subfolders_too() {
        let list = concat!(
            r#"{"file_name": "./sub//b.png", "text": " b\u00e9 \n", "width": 40, "more": [{}]}"#,
            "\r\n\n",
            r#"{"text": "a", "file_name": "a.png"}"#
        );
        let folder = folder(&[
            ("a.png", &png()),
            ("sub/b.png", &png()),
            ("notes.txt", b"passed over"),
            ("metadata.jsonl", list.as_bytes()),
        ]);
        let samples = scan(&section(&folder)).expect("a good dataset");
        assert_eq!(names(&samples), ["a.png", "sub/b.png"]);
        assert_eq!(samples[1].caption, "bé");
        assert_eq!(samples[1].image, folder.path().join("sub/b.png"));
    }

    #[test]
    fn an_empty_list() {
        assert_refused(
            &folder(&[("metadata.jsonl", b"\n")]),
            "no images (png, jpg, jpeg or webp) in `DIR`; subfolders are searched only with a metadata.jsonl",
        );
    }

    #[test]
    fn listed_bad_json() {
        assert_list_refused(
            format!("{ROW}\n\n{{\"file_name\": }}").as_bytes(),
            "`DIR/metadata.jsonl` line 3: \"file_name\": expected value at column 15",
        );
        assert_list_refused(
            br#"["a.png", "a"]"#,
            "`DIR/metadata.jsonl` line 1: is not a JSON object",
        );
        assert_list_refused(
            br#"{"file_name": "a.png", "text": null}"#,
            "`DIR/metadata.jsonl` line 1: invalid type: null, expected a string at column 35",
        );
        assert_list_refused(
            br#"{"file_name": "a.png", "text": "a", "text": "b"}"#,
            "`DIR/metadata.jsonl` line 1: duplicate key \"text\" at column 42",
        );
    }

    #[test]
    fn listed_deep_json() {
        let deep = format!(r#"{{"x": {}1"#, "[".repeat(100_000));
        let folder = folder(&[("a.png", &png()), ("metadata.jsonl", deep.as_bytes())]);
        let error = scan(&section(&folder)).expect_err("too deep");
        assert!(line(folder.path(), &error).starts_with("`DIR/metadata.jsonl` line 1: "));
    }

    #[test]
    fn listed_missing_key() {
        assert_list_refused(
            br#"{"file_name": "a.png", "caption": "a"}"#,
            "`DIR/metadata.jsonl` line 1: missing key `text` at column 38",
        );
    }

    #[test]
    fn listed_not_utf8() {
        assert_list_refused(
            b"{\"file_name\": \"a.png\", \"text\": \"\xff\"}",
            "`DIR/metadata.jsonl` line 1: is not UTF-8",
        );
    }

    #[test]
    fn listed_too_large() {
        let row = |length| {
            format!(
                r#"{{"file_name": "a.png", "text": "{}"}}"#,
                "x".repeat(length)
            )
        };
        assert_list_refused(
            row((64 << 10) + 1).as_bytes(),
            "`DIR/metadata.jsonl` line 1: text is larger than 64 KiB",
        );
        assert_list_refused(
            row(1 << 20).as_bytes(),
            "`DIR/metadata.jsonl` line 1: is larger than 1 MiB",
        );
    }

    #[test]
    fn listed_twice() {
        assert_list_refused(
            format!("{ROW}\n{}", ROW.replace("a.png", "./a.png")).as_bytes(),
            "`DIR/metadata.jsonl` line 2: file_name `./a.png` was already listed on line 1",
        );
    }

    #[test]
    fn listed_outside_the_folder() {
        for name in ["../a.png", "/etc/a.png", "sub/../../a.png"] {
            assert_list_refused(
                ROW.replace("a.png", name).as_bytes(),
                &format!(
                    "`DIR/metadata.jsonl` line 1: file_name `{name}` leads out of the dataset folder"
                ),
            );
        }
    }

    #[cfg(unix)]
    #[test]
    fn listed_link_out_of_the_folder() {
        let store = folder(&[("1.png", &png())]);
        let folder = folder(&[("metadata.jsonl", ROW.as_bytes())]);
        std::os::unix::fs::symlink(store.path().join("1.png"), folder.path().join("a.png"))
            .expect("make a link");
        assert_refused(
            &folder,
            "`DIR/metadata.jsonl` line 1: file_name `a.png` leads out of the dataset folder",
        );
    }

    #[test]
    fn listed_but_not_there() {
        assert_list_refused(
            ROW.replace("a.png", "b.png").as_bytes(),
            "`DIR/metadata.jsonl` line 1: image `b.png` does not exist",
        );
    }

    #[test]
    fn listed_but_not_an_image() {
        assert_list_refused(
            ROW.replace("a.png", "metadata.jsonl").as_bytes(),
            "`DIR/metadata.jsonl` line 1: file_name `metadata.jsonl` does not end in png, jpg, jpeg or webp",
        );
    }

    #[test]
    fn not_listed() {
        assert_refused(
            &folder(&[
                ("a.png", &png()),
                ("sub/b.jpg", &jpeg()),
                ("metadata.jsonl", ROW.as_bytes()),
            ]),
            "image `DIR/sub/b.jpg` is not listed in metadata.jsonl",
        );
    }

    #[test]
    fn captioned_twice() {
        assert_refused(
            &folder(&[
                ("a.png", &png()),
                ("a.txt", b"a"),
                ("metadata.jsonl", ROW.as_bytes()),
            ]),
            "image `DIR/a.png` has a caption in metadata.jsonl and in `a.txt`: remove one",
        );
    }

    #[test]
    fn listed_zero_byte_image() {
        assert_refused(
            &folder(&[("a.png", b""), ("metadata.jsonl", ROW.as_bytes())]),
            "image `DIR/a.png` is empty (0 bytes)",
        );
    }

    // Images

    #[test]
    fn lossless_formats_give_the_pixels_back() {
        for bytes in [png(), webp()] {
            let image = decode_image(Path::new("x"), &bytes, &ImageLimits::default());
            assert_eq!(image.expect("a good image"), gradient());
        }
    }

    #[test]
    fn the_content_decides_the_format() {
        let folder = folder(&[("a.png", &jpeg())]);
        let image = load_image(&folder.path().join("a.png"), &ImageLimits::default());
        assert_eq!(image.expect("a JPEG after all").dimensions(), (40, 24));
    }

    #[test]
    fn not_an_image() {
        let message = "image `DIR/x` is not a PNG, JPEG or WebP file";
        assert_not_decoded(b"", message);
        assert_not_decoded(b"GIF89a\x01\x00\x01\x00\x00\x00\x00", message);
        assert_not_decoded(&[0; 4096], message);
    }

    #[test]
    fn every_truncation_is_an_error() {
        for bytes in [png(), jpeg(), webp()] {
            for length in 0..bytes.len() {
                decode_image(Path::new("x"), &bytes[..length], &ImageLimits::default())
                    .expect_err("a truncated image");
            }
        }
        assert_not_decoded(&png()[..200], "image `DIR/x` is cut short");
        assert_not_decoded(&jpeg()[..600], "image `DIR/x` is cut short");
        assert_not_decoded(&webp()[..200], "image `DIR/x` is cut short");
    }

    #[test]
    fn any_changed_byte_is_survived() {
        for bytes in [png(), jpeg(), webp()] {
            for at in 0..bytes.len() {
                for flip in [0x01, 0x80, 0xff] {
                    let mut bytes = bytes.clone();
                    bytes[at] ^= flip;
                    let _ = decode_image(Path::new("x"), &bytes, &ImageLimits::default());
                }
            }
        }
    }

    #[test]
    fn bytes_after_the_end_do_not_matter() {
        for mut bytes in [png(), jpeg(), webp()] {
            bytes.extend([0; 100]);
            decode_image(Path::new("x"), &bytes, &ImageLimits::default()).expect("a whole image");
        }
    }

    #[test]
    fn corrupt_pixels() {
        let mut bytes = png();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0xff;
        let error = decode_image(Path::new("x.png"), &bytes, &ImageLimits::default())
            .expect_err("the checksum is wrong");
        let line = line(Path::new("DIR"), &error);
        assert!(line.starts_with("cannot decode image `x.png`: "), "{line}");
    }

    /// A PNG whose header claims this size over a few bytes of data.
    fn png_bomb(width: u32, height: u32) -> Vec<u8> {
        let mut bytes = png();
        bytes[16..20].copy_from_slice(&width.to_be_bytes());
        bytes[20..24].copy_from_slice(&height.to_be_bytes());
        let checksum = crc32(&bytes[12..29]);
        bytes[29..33].copy_from_slice(&checksum.to_be_bytes());
        bytes
    }

    fn crc32(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(!0u32, |crc, &byte| {
            (0..8).fold(crc ^ u32::from(byte), |crc, _| {
                (crc >> 1) ^ (0xedb8_8320 * (crc & 1))
            })
        })
    }

    #[test]
    fn bombs_are_refused_by_their_header() {
        let start = std::time::Instant::now();
        assert_not_decoded(
            &png_bomb(60000, 60000),
            "image `DIR/x` is 60000x60000 pixels; at most 16384 a side and 100000000 in all are allowed",
        );
        assert_not_decoded(
            &png_bomb(16384, 16384),
            "image `DIR/x` is 16384x16384 pixels; at most 16384 a side and 100000000 in all are allowed",
        );
        let mut bomb = jpeg();
        let header = bomb
            .windows(2)
            .position(|pair| pair == [0xff, 0xc0])
            .expect("a frame header");
        bomb[header + 5..header + 9].fill(0xff);
        assert_not_decoded(
            &bomb,
            "image `DIR/x` is 65535x65535 pixels; at most 16384 a side and 100000000 in all are allowed",
        );
        let mut bomb = webp();
        // lossless header: 14 bits of width - 1, then 14 of height - 1
        bomb[21..25].copy_from_slice(&(0x3ffe_u32 | 0x3ffe << 14).to_le_bytes());
        assert_not_decoded(
            &bomb,
            "image `DIR/x` is 16383x16383 pixels; at most 16384 a side and 100000000 in all are allowed",
        );
        assert!(start.elapsed().as_secs() < 5);
    }

    #[test]
    fn memory_is_bounded() {
        let limits = ImageLimits {
            max_decoded_bytes: 1000,
            ..ImageLimits::default()
        };
        let error = decode_image(Path::new("x"), &webp(), &limits).expect_err("over the limit");
        let line = line(Path::new("DIR"), &error);
        assert_eq!(line, "image `x` takes more than 0 MiB to decode");
    }

    #[test]
    fn large_files_are_not_read() {
        let limits = ImageLimits {
            max_file_bytes: 1 << 20,
            ..ImageLimits::default()
        };
        let folder = folder(&[("a.png", &vec![0; (1 << 20) + 1])]);
        let error = read_image(&folder.path().join("a.png"), &limits).expect_err("too large");
        assert_eq!(
            line(folder.path(), &error),
            "image `DIR/a.png` is larger than 1 MiB"
        );
    }

    #[test]
    fn transparency_shows_white() {
        let pixels = [
            Rgba([10, 20, 30, 255]),
            Rgba([10, 20, 30, 0]),
            Rgba([0, 100, 255, 128]),
        ];
        let image = RgbaImage::from_fn(3, 1, |x, _| pixels[x as usize]);
        for format in [ImageFormat::Png, ImageFormat::WebP] {
            let bytes = encoded(&image.clone().into(), format);
            let image = decode_image(Path::new("x"), &bytes, &ImageLimits::default());
            let image = image.expect("a good image");
            assert_eq!(image.get_pixel(0, 0), &Rgb([10, 20, 30]));
            assert_eq!(image.get_pixel(1, 0), &Rgb([255, 255, 255]));
            assert_eq!(image.get_pixel(2, 0), &Rgb([127, 177, 255]));
        }
    }

    #[test]
    fn grey_and_16_bit_images_become_rgb() {
        let grey = image::GrayImage::from_pixel(2, 2, image::Luma([77]));
        let deep = image::ImageBuffer::from_pixel(2, 2, Rgba([0xffff_u16, 0, 0x8080, 0xffff]));
        for (image, expected) in [
            (DynamicImage::from(grey), Rgb([77, 77, 77])),
            (DynamicImage::from(deep), Rgb([255, 0, 128])),
        ] {
            let bytes = encoded(&image, ImageFormat::Png);
            let image = decode_image(Path::new("x"), &bytes, &ImageLimits::default());
            assert_eq!(image.expect("a good image").get_pixel(1, 1), &expected);
        }
    }

    #[test]
    fn exif_orientation_is_applied() {
        // top half black, bottom half white, to be turned clockwise: the bottom goes to the left
        let image = RgbImage::from_fn(32, 16, |_, y| Rgb([if y < 8 { 0 } else { 255 }; 3]));
        let mut exif = b"MM\0\x2a\0\0\0\x08\0\x01".to_vec(); // TIFF header, one entry
        exif.extend(b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"); // orientation = 6
        let mut bytes = Vec::new();
        let mut encoder = JpegEncoder::new_with_quality(&mut bytes, 100);
        encoder.set_exif_metadata(exif).expect("EXIF is supported");
        encoder
            .write_image(image.as_raw(), 32, 16, ExtendedColorType::Rgb8)
            .expect("encode in memory");
        let image = decode_image(Path::new("x"), &bytes, &ImageLimits::default());
        let image = image.expect("a good image");
        assert_eq!(image.dimensions(), (16, 32));
        assert!(image.get_pixel(2, 16).0[0] > 200 && image.get_pixel(13, 16).0[0] < 50);
    }

    // Digests

    #[test]
    fn content_digest_is_sha256() {
        assert_eq!(
            content_digest(b"abc"),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }

    #[test]
    fn changes_name_every_sample_that_differs() {
        let folder = folder(&[
            ("cat.png", &png()),
            ("cat.txt", b"a cat"),
            ("dog.png", &png()),
            ("dog.txt", b"a dog"),
            ("old.png", &png()),
            ("old.txt", b"old"),
        ]);
        let digests = || {
            let samples = scan(&section(&folder)).expect("a good dataset");
            sample_digests(&samples, &ImageLimits::default()).expect("readable images")
        };
        let write = |name: &str, bytes: &[u8]| {
            fs::write(folder.path().join(name), bytes).expect("write file");
        };
        let before = digests();
        assert_eq!(changes(&before, &digests()), [""; 0]);
        assert_eq!(dataset_digest(&before), dataset_digest(&digests()));
        write("dog.txt", b" a dog\n");
        assert_eq!(changes(&before, &digests()), [""; 0]);

        write("cat.png", &jpeg());
        write("dog.txt", b"two dogs");
        write("new.webp", &webp());
        write("new.txt", b"new");
        fs::remove_file(folder.path().join("old.png")).expect("remove file");
        fs::remove_file(folder.path().join("old.txt")).expect("remove file");
        let after = digests();
        assert_eq!(
            changes(&before, &after),
            [
                "changed image cat.png",
                "changed caption of dog.png",
                "added new.webp",
                "removed old.png"
            ]
        );
        assert_ne!(dataset_digest(&before), dataset_digest(&after));

        let json = serde_json::to_string(&after).expect("plain strings");
        let read: Vec<SampleDigest> = serde_json::from_str(&json).expect("what was written");
        assert_eq!(read, after);
    }

    #[test]
    fn dataset_digest_keeps_fields_apart() {
        let digest = |name: &str, image: &str| {
            dataset_digest(&[SampleDigest {
                name: name.into(),
                image_sha256: image.into(),
                caption_sha256: String::new(),
            }])
        };
        assert_ne!(digest("ab", "c"), digest("a", "bc"));
    }
}
