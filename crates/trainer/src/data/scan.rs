//! Images with captions, found and checked.
//!
//! A dataset is a folder and all folders below it. In each, images have their captions beside them (`x.png`, `x.txt`), or a
//! list tells the captions of the images there and below: `metadata.jsonl` or `metadata.csv` (see [`crate::data::metadata`]).
//! Every image has exactly one caption; what is there and not used is said. Each image file is read once: its digest, its
//! size and whatever can be refused without decoding it come from the same bytes.
//!
//! Links are followed wherever they lead: a person or a downloader made them. A `file_name` in a list is only text from a file
//! and may not lead out of its folder. What runs have written below the folder is passed over (see `outputs`).

mod list;
mod names;
mod pair;
mod tree;

use std::fs;
use std::io;
use std::path::PathBuf;

use lora_core::files::digest::sha256_hex;

use crate::config::DatasetSection;
use crate::data::beside::{self, Picture};
use crate::data::error::{DatasetError, read_error};
use crate::data::image::{ImageLimits, inspect, read_image};
use crate::progress;

use pair::Pair;
use tree::Tree;

pub(super) use names::{counted, key, more, named, split};
pub(super) use tree::entries;

/// One image and the text that describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// Path of the image from the dataset folder, with `/` on every platform; unique in the dataset.
    pub name: String,
    /// Where the image is.
    pub image: PathBuf,
    /// SHA-256 of the image file, in hex.
    pub image_sha256: String,
    /// Width of the image in pixels, upright.
    pub width_px: u32,
    /// Height of the image in pixels, upright.
    pub height_px: u32,
    /// The caption, without surrounding white space; may be empty.
    pub caption: String,
    /// Pictures that the caption says what to do with.
    pub references: Vec<Picture>,
    /// Where the image is to be painted: the white of this one.
    pub mask: Option<Picture>,
}

/// A dataset, and what its owner should know of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scan {
    /// Sorted by name; the same on every platform.
    pub samples: Vec<Sample>,
    /// What is there and not used, or not as it is: a line for each kind, with a count and the first few names.
    pub warnings: Vec<String>,
}

/// The samples of a dataset, all that is cheap to check about them checked.
///
/// Hidden files and what systems leave in folders are passed over.
///
/// # Errors
/// On anything that leaves an image without its one caption, and on a file that is unreadable, empty or not what it should be.
pub fn scan(config: &DatasetSection) -> Result<Scan, DatasetError> {
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
    let aside = [&config.reference, &config.mask].into_iter().flatten();
    let aside = aside.filter_map(|folder| fs::canonicalize(folder).ok());
    let mut tree = Tree::new(folder, &config.caption_extension, aside.collect());
    tree.walk(String::new(), None)?;
    let mut pairs = tree.pairs()?;
    if pairs.is_empty() {
        return Err(DatasetError::Empty {
            path: folder.into(),
            instead: tree.instead(),
        });
    }
    pairs.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    let twice = |pair: &&[Pair]| pair[0].name == pair[1].name;
    if let Some(pair) = pairs.windows(2).find(twice) {
        return Err(DatasetError::ListedTwice {
            image: pair[0].image.clone(),
        });
    }

    let mut warnings = tree.warnings;
    let limits = ImageLimits::default();
    let (mut several, mut profiles) = (Vec::new(), Vec::new());
    let bar = progress::bar("read images", pairs.len() as u64);
    let mut samples = Vec::with_capacity(pairs.len());
    let mut listed = Vec::with_capacity(pairs.len());
    for Pair {
        name,
        image,
        caption,
        references,
    } in pairs
    {
        let bytes = read_image(&image, &limits)?;
        let header = inspect(&image, &bytes, &limits)?;
        if header.more_pictures {
            several.push(name.clone());
        }
        if header.unusable_profile {
            profiles.push(name.clone());
        }
        samples.push(Sample {
            name,
            image,
            image_sha256: sha256_hex(&bytes),
            width_px: header.width_px,
            height_px: header.height_px,
            caption,
            references: Vec::new(),
            mask: None,
        });
        listed.push(references);
        bar.inc(1);
    }
    bar.finish_and_clear();
    warnings.extend(beside::find(&mut samples, &listed, config)?);
    if !several.is_empty() {
        warnings.push(format!(
            "only the first picture is used of {} that hold several (an animation, or pages): {}",
            counted(several.len(), "image"),
            named(&several)
        ));
    }
    if !profiles.is_empty() {
        warnings.push(format!(
            "colours taken for sRGB, since the colour profile cannot be used: {} ({})",
            counted(profiles.len(), "image"),
            named(&profiles)
        ));
    }
    Ok(Scan { samples, warnings })
}

#[cfg(test)]
mod tests;
