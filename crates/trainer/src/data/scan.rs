//! Images with captions, found and checked.
//!
//! A dataset is a folder and all folders below it. In each, images have their captions beside them (`x.png`, `x.txt`), or a
//! list tells the captions of the images there and below: `metadata.jsonl` or `metadata.csv` (see [`crate::data::metadata`]).
//! Every image has exactly one caption; what is there and not used is said. Each image file is read once here: its digest, its
//! size and whatever can be refused without decoding it come from the same bytes. What is not cached is read once more, to be
//! decoded ([`crate::data::cache`]).
//!
//! Links are followed wherever they lead: a person or a downloader made them. A `file_name` in a list is only text from a file
//! and may not lead out of its folder. What runs have written below the folder is passed over (see `outputs`).

mod list;
mod names;
mod pair;
mod tree;

use std::collections::BTreeSet;
use std::fs;
use std::io;

use lora_core::files::digest::sha256_hex;

use crate::config::{DatasetSection, FolderSection};
use crate::data::beside;
use crate::data::caption::with_trigger;
use crate::data::error::{DatasetError, read_error};
use crate::data::image::{ImageLimits, decode_image, inspect, read_image};
use crate::data::sample::Sample;
use crate::nearest::one_line;
use crate::progress;

use pair::Pair;
use tree::Tree;

pub(super) use names::{counted, key, more, named, split};
pub(super) use tree::entries;

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
    let folders = config.all_folders();
    let mut all = Scan::default();
    let mut unknown: BTreeSet<&String> = config.skip.iter().collect();
    for (index, folder) in folders.iter().enumerate() {
        let found = scan_folder(&folders, index, config)?;
        unknown.retain(|name| !found.skipped.contains(name));
        let own = folder.trigger_word.as_deref();
        let trigger = own.or(config.trigger_word.as_deref());
        for mut sample in found.scan.samples {
            sample.folder = index;
            sample.caption = with_trigger(&sample.caption, trigger);
            all.samples.push(sample);
        }
        all.warnings.extend(found.scan.warnings);
    }
    if let Some(name) = unknown.first() {
        let name = one_line(name);
        return Err(DatasetError::NothingToSkip { name });
    }
    Ok(all)
}

/// The images of a dataset that cannot be used, by name, and why: those that are not left out yet are decoded, each in full.
///
/// # Errors
/// As [`scan`], but for what is wrong with an image.
pub fn unreadable(config: &DatasetSection) -> Result<Vec<(String, DatasetError)>, DatasetError> {
    let folders = config.all_folders();
    let limits = ImageLimits::default();
    let mut found = Vec::new();
    for index in 0..folders.len() {
        let (pairs, _) = pairs_of(&folders, index, config)?;
        let bar = progress::bar("try images", pairs.len() as u64);
        for pair in pairs {
            let name = full_name(called(&folders, index).as_deref(), pair.name);
            let tried = || decode_image(&pair.image, &read_image(&pair.image, &limits)?, &limits);
            if !config.skip.contains(&name)
                && let Err(error) = tried()
            {
                found.push((name, error));
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
    }
    Ok(found)
}

/// What one folder of a dataset holds.
struct OfFolder {
    scan: Scan,
    /// Images that are left out.
    skipped: Vec<String>,
}

/// The name of a sample in a dataset, from that in its folder.
fn full_name(called: Option<&str>, name: String) -> String {
    match called {
        Some(called) => format!("{called}/{name}"),
        None => name,
    }
}

/// What a folder is called in front of the names of its samples, if there are several: its own name, with its place in the list
/// where another has the same.
fn called(folders: &[FolderSection], index: usize) -> Option<String> {
    let name = |folder: &FolderSection| match folder.path.file_name() {
        Some(name) => name.to_string_lossy().into_owned(),
        None => folder.path.display().to_string(),
    };
    if folders.len() < 2 {
        return None;
    }
    let own = name(&folders[index]);
    let alike = folders.iter().filter(|folder| name(folder) == own).count();
    Some(match alike {
        1 => own,
        _ => format!("{own} ({})", index + 1),
    })
}

/// The images of one of `folders` with their captions, by name, and what is said of its other files.
fn pairs_of(
    folders: &[FolderSection],
    index: usize,
    config: &DatasetSection,
) -> Result<(Vec<Pair>, Vec<String>), DatasetError> {
    let folder = folders[index].path.as_path();
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
    // The pictures beside samples are none themselves, but where their folder is named as one of samples too.
    let root = fs::canonicalize(folder).map_err(|error| read_error(folder, error))?;
    let aside = folders.iter().enumerate().flat_map(|(other, folder)| {
        let beside = [&folder.reference, &folder.mask].into_iter().flatten();
        let beside = beside.filter_map(|path| fs::canonicalize(path).ok());
        let root = &root;
        beside.filter(move |path| other == index || path != root)
    });
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

    Ok((pairs, tree.warnings))
}

fn scan_folder(
    folders: &[FolderSection],
    index: usize,
    config: &DatasetSection,
) -> Result<OfFolder, DatasetError> {
    let (folder, called) = (&folders[index], called(folders, index));
    let called = called.as_deref();
    let (pairs, mut warnings) = pairs_of(folders, index, config)?;
    let mut skipped = Vec::new();
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
        bar.inc(1);
        let full = full_name(called, name.clone());
        if config.skip.contains(&full) {
            skipped.push(full);
            continue;
        }
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
            folder: 0,
            references: Vec::new(),
            mask: None,
        });
        listed.push(references);
    }
    bar.finish_and_clear();
    warnings.extend(beside::find(&mut samples, &listed, folder)?);
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
    if !skipped.is_empty() {
        warnings.push(format!(
            "left out, as `dataset.skip` says: {} ({})",
            counted(skipped.len(), "image"),
            named(&skipped)
        ));
    }
    if samples.is_empty() {
        return Err(DatasetError::Empty {
            path: folder.path.clone(),
            instead: " that are not left out by `dataset.skip`".into(),
        });
    }
    for sample in &mut samples {
        sample.name = full_name(called, std::mem::take(&mut sample.name));
    }
    if let Some(called) = called {
        warnings = warnings
            .into_iter()
            .map(|line| format!("{called}: {line}"))
            .collect();
    }
    Ok(OfFolder {
        scan: Scan { samples, warnings },
        skipped,
    })
}

#[cfg(test)]
mod tests;
