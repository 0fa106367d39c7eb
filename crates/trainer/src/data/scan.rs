//! Images with captions, found and checked.
//!
//! A dataset is a folder and all folders below it. In each, images have their captions beside them (`x.png`, `x.txt`), or a
//! list tells the captions of the images there and below: `metadata.jsonl` or `metadata.csv` (see [`crate::data::metadata`]).
//! Every image has exactly one caption; what is there and not used is said. Each image file is read once: its digest, its
//! size and whatever can be refused without decoding it come from the same bytes.
//!
//! Links are followed wherever they lead: a person or a downloader made them. A `file_name` in a list is only text from a file
//! and may not lead out of its folder. What runs have written below the folder is passed over (see `outputs`).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use lora_core::files::digest::sha256_hex;
use unicode_normalization::UnicodeNormalization;

use crate::config::DatasetSection;
use crate::data::error::{DatasetError, read_error};
use crate::data::image::{
    ImageLimits, check_image_file, inspect, is_image_extension, is_other_image_extension,
    read_image,
};
use crate::data::metadata::{Row, find_list, read_list, wrong_line};
use crate::data::outputs::{is_output, is_run};
use crate::data::text::read_caption;
use crate::nearest::{one_line, shown};
use crate::progress;

/// Extensions that captions have in the world; a folder full of them under another one than the configuration's is a mistake.
const CAPTION_EXTENSIONS: [&str; 4] = ["txt", "caption", "cap", "text"];
/// Names that systems leave behind, besides hidden ones.
const LITTER: [&str; 8] = [
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "icon\r",
    "__macosx",
    "@eadir",
    "$recycle.bin",
    "system volume information",
];
/// Captions without image that pass for notes; more of them, and more than a tenth of the images, are lost pairs.
const FEW_NOTES: usize = 3;

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
    let mut tree = Tree::new(folder, &config.caption_extension);
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
    for Pair {
        name,
        image,
        caption,
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
        });
        bar.inc(1);
    }
    bar.finish_and_clear();
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

/// `1 image`, `2 images`.
pub(super) fn counted(count: usize, what: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {what}{plural}")
}

/// The first few names, quoted, and how many more there are.
pub(super) fn named(names: &[String]) -> String {
    const FEW: usize = 4;
    let few: Vec<String> = names
        .iter()
        .take(FEW)
        .map(|name| format!("`{}`", one_line(name)))
        .collect();
    match names.len().saturating_sub(FEW) {
        0 => few.join(", "),
        more => format!("{} and {more} more", few.join(", ")),
    }
}

/// An image and its caption, before the image was looked at.
struct Pair {
    name: String,
    image: PathBuf,
    caption: String,
}

/// The files below a dataset folder.
struct Tree<'a> {
    root: &'a Path,
    caption_extension: &'a str,
    folders: Vec<Folder>,
    /// Folders that were walked, as the system calls them: links may lead to one again, or to one above.
    walked: BTreeSet<PathBuf>,
    /// Links to those.
    again: Vec<String>,
    /// Images in formats that are not read.
    other_images: Vec<String>,
    /// Files of other kinds.
    others: Vec<String>,
    warnings: Vec<String>,
}

/// One folder below it.
struct Folder {
    /// Its path from the root with a `/` at the end; empty for the root.
    prefix: String,
    /// The list that tells the captions here: its own, or the next one above.
    list: Option<List>,
    images: Vec<String>,
    captions: Vec<String>,
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct List {
    path: PathBuf,
    prefix: String,
}

impl<'a> Tree<'a> {
    fn new(root: &'a Path, caption_extension: &'a str) -> Self {
        Self {
            root,
            caption_extension,
            folders: Vec::new(),
            walked: BTreeSet::new(),
            again: Vec::new(),
            other_images: Vec::new(),
            others: Vec::new(),
            warnings: Vec::new(),
        }
    }

    /// Sorts the files of the folder `prefix` and all below by kind.
    fn walk(&mut self, prefix: String, list: Option<&List>) -> Result<(), DatasetError> {
        let path = match prefix.strip_suffix('/') {
            Some(inner) => self.root.join(inner),
            None => self.root.to_path_buf(),
        };
        let real = fs::canonicalize(&path).map_err(|error| read_error(&path, error))?;
        if !self.walked.insert(real) {
            self.again.push(prefix);
            return Ok(());
        }
        let own = find_list(&path)?.map(|path| List {
            path,
            prefix: prefix.clone(),
        });
        let list = own.as_ref().or(list);
        let (mut images, mut captions, mut folders) = (Vec::new(), Vec::new(), Vec::new());
        let is_run = is_run(&path);
        for name in entries(&path)? {
            let inner = path.join(&name);
            if inner.is_dir() {
                if is_output(is_run, &inner) {
                    tracing::info!("passed over what a run has written: {}", shown(&inner));
                } else {
                    folders.push(name);
                }
                continue;
            }
            let extension = split(&name).1;
            if is_image_extension(extension) {
                images.push(name);
            } else if is_other_image_extension(extension) {
                self.other_images.push(format!("{prefix}{name}"));
            } else if extension.eq_ignore_ascii_case(self.caption_extension) {
                captions.push(name);
            } else if !is_run && own.as_ref().is_none_or(|own| own.path != inner) {
                self.others.push(format!("{prefix}{name}"));
            }
        }
        self.folders.push(Folder {
            prefix: prefix.clone(),
            list: list.cloned(),
            images,
            captions,
        });
        for folder in folders {
            self.walk(format!("{prefix}{folder}/"), list)?;
        }
        Ok(())
    }

    /// Every image with its caption.
    fn pairs(&mut self) -> Result<Vec<Pair>, DatasetError> {
        if let Some(first) = self.other_images.first() {
            return Err(DatasetError::UnsupportedImage {
                path: self.root.join(first),
                more: more(self.other_images.len() - 1, "image"),
            });
        }
        let mut pairs = Vec::new();
        let (mut bare, mut lonely) = (Vec::new(), Vec::new());
        let folders = std::mem::take(&mut self.folders);
        for folder in folders.iter().filter(|folder| folder.list.is_none()) {
            let found = folder.pair(self.root, self.caption_extension)?;
            pairs.extend(found.pairs);
            bare.extend(found.bare);
            lonely.extend(found.lonely);
        }
        self.check_bare(&bare, &lonely)?;
        self.check_lonely(&lonely, pairs.len())?;

        let lists: BTreeSet<&List> = folders.iter().filter_map(|f| f.list.as_ref()).collect();
        for list in lists {
            let below: Vec<&Folder> = folders
                .iter()
                .filter(|folder| folder.list.as_ref() == Some(list))
                .collect();
            pairs.extend(self.listed(list, &below)?);
            lonely.extend(below.iter().flat_map(|folder| {
                let texts = folder.captions.iter();
                texts.map(|text| format!("{}{text}", folder.prefix))
            }));
        }
        if !lonely.is_empty() {
            self.warnings.push(format!(
                "not used, since no image has the name: {} ({})",
                counted(lonely.len(), "text file"),
                named(&lonely)
            ));
        }
        self.warn_of_repeats(&folders);
        self.warn_of_others();
        Ok(pairs)
    }

    /// Refuses images without a caption.
    fn check_bare(&self, bare: &[String], lonely: &[String]) -> Result<(), DatasetError> {
        let Some(first) = bare.first() else {
            return Ok(());
        };
        // the same name with another caption extension
        let mut elsewhere: BTreeMap<&str, usize> = BTreeMap::new();
        let stems: BTreeSet<String> = bare.iter().map(|name| key(split(name).0)).collect();
        for other in &self.others {
            let (stem, extension) = split(other);
            let is_caption = |it: &&&str| it.eq_ignore_ascii_case(extension);
            if let Some(known) = CAPTION_EXTENSIONS.iter().find(is_caption)
                && stems.contains(&key(stem))
            {
                *elsewhere.entry(known).or_default() += 1;
            }
        }
        if let Some((extension, count)) = elsewhere.into_iter().max_by_key(|it| it.1) {
            return Err(DatasetError::OtherExtension {
                image: self.root.join(first),
                configured: self.caption_extension.into(),
                count,
                extension: extension.into(),
            });
        }
        let stem = split(first).0;
        let near = |name: &&String| {
            let other = split(name).0;
            let (a, b) = (key(stem), key(other));
            b.starts_with(&a) || strsim::normalized_damerau_levenshtein(&a, &b) >= 0.8
        };
        let near = lonely.iter().find(near).map(|name| one_line(name));
        let expected = format!("{}.{}", file_name(stem), self.caption_extension);
        Err(DatasetError::CaptionMissing {
            image: self.root.join(first),
            caption: one_line(&expected),
            near: near.map_or(String::new(), |near| format!("; is it `{near}`?")),
            more: more(bare.len() - 1, "image"),
        })
    }

    /// Refuses texts without an image where they are too many to be notes: their images are lost.
    fn check_lonely(&self, lonely: &[String], images: usize) -> Result<(), DatasetError> {
        match lonely.first() {
            Some(first) if lonely.len() > FEW_NOTES && 10 * lonely.len() > images => {
                Err(DatasetError::ImageMissing {
                    caption: self.root.join(first),
                    stem: one_line(file_name(split(first).0)),
                    more: more(lonely.len() - 1, "caption"),
                })
            }
            _ => Ok(()),
        }
    }

    /// The images of a list, which are all images in the folders it is for.
    fn listed(&self, list: &List, folders: &[&Folder]) -> Result<Vec<Pair>, DatasetError> {
        let mut there: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for folder in folders {
            for image in &folder.images {
                let name = format!("{}{image}", folder.prefix);
                let inner = &name[list.prefix.len()..];
                there.entry(key(inner)).or_default().push(inner.to_owned());
            }
        }
        let mut first_lines: BTreeMap<String, usize> = BTreeMap::new();
        let mut pairs = Vec::new();
        for row in read_list(&list.path)? {
            let Row { line, quoted, .. } = &row;
            let wrong = |problem: String| wrong_line(&list.path, *line, problem);
            if !is_image_extension(split(&row.name).1) {
                let problem = format!(
                    "file_name `{quoted}` does not end in png, jpg, jpeg or webp, nor bmp or tiff"
                );
                return Err(wrong(problem));
            }
            let base = self.root.join(&list.prefix);
            // written in another case or another form of Unicode than the file's name
            let name = match there.get(&key(&row.name)).map(Vec::as_slice) {
                Some([only]) if !base.join(&row.name).exists() => only.clone(),
                _ => row.name.clone(),
            };
            if let Some(first) = first_lines.insert(name.clone(), *line) {
                let problem = format!("file_name `{quoted}` was already listed on line {first}");
                return Err(wrong(problem));
            }
            let image = base.join(&name);
            match fs::metadata(&image) {
                Ok(_) => check_image_file(&image)?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    return Err(wrong(format!("image `{quoted}` does not exist")));
                }
                Err(error) => return Err(read_error(&image, error)),
            }
            pairs.push(Pair {
                name: format!("{}{name}", list.prefix),
                image,
                caption: row.caption,
            });
        }
        let list_name = file_name(list.path.to_str().unwrap_or_default());
        let all = there.values().flatten();
        let missing: Vec<&String> = all.filter(|it| !first_lines.contains_key(*it)).collect();
        if let Some(first) = missing.iter().min() {
            return Err(DatasetError::Unlisted {
                image: self.root.join(&list.prefix).join(first),
                list: list_name.into(),
                more: more(missing.len() - 1, "image"),
            });
        }
        for folder in folders {
            let stems: BTreeMap<String, &String> = folder
                .images
                .iter()
                .map(|name| (key(split(name).0), name))
                .collect();
            for caption in &folder.captions {
                if let Some(image) = stems.get(&key(split(caption).0)) {
                    return Err(DatasetError::TwoCaptions {
                        image: self.root.join(&folder.prefix).join(image),
                        list: list_name.into(),
                        caption: one_line(caption),
                    });
                }
            }
        }
        Ok(pairs)
    }

    /// kohya reads a number in front of a folder's name as repeats.
    fn warn_of_repeats(&mut self, folders: &[Folder]) {
        let is_repeats = |name: &str| {
            let digits = name.bytes().take_while(u8::is_ascii_digit).count();
            digits > 0 && name[digits..].starts_with('_')
        };
        let repeats: Vec<String> = folders
            .iter()
            .filter(|folder| !folder.images.is_empty())
            .map(|folder| folder.prefix.trim_end_matches('/').to_owned())
            .filter(|name| is_repeats(file_name(name)))
            .collect();
        if !repeats.is_empty() {
            self.warnings.push(format!(
                "the number in front of {} is not read as repeats: every image is seen once an epoch",
                named(&repeats)
            ));
        }
    }

    fn warn_of_others(&mut self) {
        if !self.again.is_empty() {
            self.warnings.push(format!(
                "not read twice, being linked to folders that were already read: {}",
                named(&self.again)
            ));
        }
        if !self.others.is_empty() {
            self.warnings.push(format!(
                "not used, being neither image nor caption: {} ({})",
                counted(self.others.len(), "file"),
                named(&self.others)
            ));
        }
    }

    /// What is there in place of images.
    fn instead(&self) -> String {
        if self.others.is_empty() {
            return String::new();
        }
        format!(
            "; there are {}: {}",
            counted(self.others.len(), "other file"),
            named(&self.others)
        )
    }
}

/// What became of the files of a folder.
#[derive(Default)]
struct Paired {
    pairs: Vec<Pair>,
    /// Images without caption.
    bare: Vec<String>,
    /// Captions without image.
    lonely: Vec<String>,
}

impl Folder {
    /// `x.png` with `x.txt`, whatever the case and the form of Unicode; where that leaves a choice, the exact name counts.
    fn pair(&self, root: &Path, caption_extension: &str) -> Result<Paired, DatasetError> {
        let by_key = |names: &[String]| {
            let mut groups: BTreeMap<String, Vec<String>> = BTreeMap::new();
            for name in names {
                groups
                    .entry(key(split(name).0))
                    .or_default()
                    .push(name.clone());
            }
            groups
        };
        let path = root.join(&self.prefix);
        let mut captions = by_key(&self.captions);
        let mut paired = Paired::default();
        for (key, images) in by_key(&self.images) {
            let mut texts = captions.remove(&key).unwrap_or_default();
            let mut stems: BTreeMap<String, &String> = BTreeMap::new();
            for image in &images {
                let stem = split(image).0;
                if let Some(first) = stems.insert(composed(stem), image) {
                    return Err(DatasetError::SameStem {
                        first: path.join(first),
                        second: one_line(image),
                        caption: one_line(&format!("{stem}.{caption_extension}")),
                    });
                }
            }
            let alone = images.len() == 1 && texts.len() == 1;
            for (stem, image) in stems {
                let is_own = |text: &String| alone || composed(split(text).0) == stem;
                let own: Vec<String> = texts.extract_if(.., |text| is_own(text)).collect();
                let name = format!("{}{image}", self.prefix);
                match own.as_slice() {
                    [] => paired.bare.push(name),
                    [caption] => {
                        check_image_file(&path.join(image))?;
                        paired.pairs.push(Pair {
                            image: path.join(image),
                            caption: read_caption(&path.join(caption))?,
                            name,
                        });
                    }
                    [first, second, ..] => {
                        return Err(DatasetError::TwoCaptionFiles {
                            image: path.join(image),
                            first: one_line(first),
                            second: one_line(second),
                        });
                    }
                }
            }
            paired
                .lonely
                .extend(texts.iter().map(|text| format!("{}{text}", self.prefix)));
        }
        let rest = captions.into_values().flatten();
        paired
            .lonely
            .extend(rest.map(|text| format!("{}{text}", self.prefix)));
        Ok(paired)
    }
}

/// Names in a folder, sorted, without hidden ones and what systems leave there.
fn entries(folder: &Path) -> Result<Vec<String>, DatasetError> {
    let cannot_read = |error| read_error(folder, error);
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(cannot_read)? {
        let entry = entry.map_err(cannot_read)?;
        let Ok(name) = entry.file_name().into_string() else {
            return Err(DatasetError::Name { path: entry.path() });
        };
        if !name.starts_with('.') && !LITTER.contains(&name.to_lowercase().as_str()) {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// A name without its extension, and the extension; no extension if there is no dot in the file name.
fn split(name: &str) -> (&str, &str) {
    match name.rsplit_once('.') {
        Some((stem, extension)) if !extension.contains('/') => (stem, extension),
        _ => (name, ""),
    }
}

fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// A name in Unicode's composed form: macOS stores accents apart from their letters.
fn composed(name: &str) -> String {
    name.nfc().collect()
}

/// What two spellings of one name have in common.
fn key(name: &str) -> String {
    composed(name).to_lowercase()
}

/// ` (and 3 more images)`, or nothing.
fn more(count: usize, what: &str) -> String {
    match count {
        0 => String::new(),
        1 => format!(" (and 1 more {what})"),
        count => format!(" (and {count} more {what}s)"),
    }
}

#[cfg(test)]
mod tests;
