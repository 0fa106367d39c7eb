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
use lora_core::files::strict_json::parse_json;
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
mod tests;
