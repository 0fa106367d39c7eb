//! Images with captions, found and checked.
//!
//! A dataset is a folder in one of two forms: `x.png` beside `x.txt`, or images with a `metadata.jsonl` whose lines hold
//! `file_name` and `text` (the convention of Hugging Face's `imagefolder`). Files are foreign until checked: every image
//! has exactly one caption and every caption one image, sizes are bounded before anything is decoded, and a file cut
//! short is an error although some decoders would fill the rest with grey.
//!
//! In the first form symbolic links are followed: the folder is the user's own arrangement. A `file_name` is only text
//! from a file and may not lead out of the folder.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Component, Path, PathBuf};

use lora_core::files::strict_json::parse_json;
use serde::Deserialize;

use crate::config::DatasetSection;
use crate::data::error::{DatasetError, json_problem, read_error};
use crate::data::image::{check_image_file, extension_of, is_image_extension, is_other_image};
use crate::data::text::{MAX_CAPTION_BYTES, open, read_caption};
use crate::nearest::one_line;

/// The name of the file that lists images and captions.
pub const METADATA_FILE: &str = "metadata.jsonl";
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

#[cfg(test)]
mod tests;
