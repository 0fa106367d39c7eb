//! All folders of a dataset: their files by kind, and what becomes of each.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use crate::data::error::{DatasetError, read_error};
use crate::data::image::{is_image_extension, is_other_image_extension};
use crate::data::metadata::find_list;
use crate::data::outputs::{is_output, is_run};
use crate::nearest::{one_line, shown};

use super::list::listed;
use super::names::{counted, file_name, key, more, named, split};
use super::pair::{Folder, List, Pair};

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
/// Files that say what a folder is, where it comes from and what may be done with it; never captions.
const ABOUT: [&str; 8] = [
    "readme.md",
    "sources.md",
    "license.md",
    "licence.md",
    "notice.md",
    "license",
    "licence",
    "notice",
];
/// Captions without image that pass for notes; more of them, and more than a tenth of the images, are lost pairs.
const FEW_NOTES: usize = 3;

/// The files below a dataset folder.
pub(super) struct Tree<'a> {
    root: &'a Path,
    caption_extension: &'a str,
    /// Folders of pictures that belong to samples, as the system calls them.
    aside: Vec<PathBuf>,
    folders: Vec<Folder>,
    /// Folders that were walked, as the system calls them: links may lead to one again, or to one above.
    walked: BTreeSet<PathBuf>,
    /// Links to those.
    again: Vec<String>,
    /// Images in formats that are not read.
    other_images: Vec<String>,
    /// Files of other kinds.
    others: Vec<String>,
    pub(super) warnings: Vec<String>,
}

impl<'a> Tree<'a> {
    pub(super) fn new(root: &'a Path, caption_extension: &'a str, aside: Vec<PathBuf>) -> Self {
        Self {
            root,
            caption_extension,
            aside,
            folders: Vec::new(),
            walked: BTreeSet::new(),
            again: Vec::new(),
            other_images: Vec::new(),
            others: Vec::new(),
            warnings: Vec::new(),
        }
    }

    /// Sorts the files of the folder `prefix` and all below by kind.
    pub(super) fn walk(&mut self, prefix: String, list: Option<&List>) -> Result<(), DatasetError> {
        let path = match prefix.strip_suffix('/') {
            Some(inner) => self.root.join(inner),
            None => self.root.to_path_buf(),
        };
        let real = fs::canonicalize(&path).map_err(|error| read_error(&path, error))?;
        if self.aside.contains(&real) {
            return Ok(());
        }
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
            } else if ABOUT.contains(&name.to_lowercase().as_str()) {
                continue;
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
    pub(super) fn pairs(&mut self) -> Result<Vec<Pair>, DatasetError> {
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
            pairs.extend(listed(self.root, list, &below)?);
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
                "the number in front of {} is not read as repeats: every image is seen once an epoch; `dataset.folders` gives each folder its `repeats`",
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
    pub(super) fn instead(&self) -> String {
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

/// Names in a folder, sorted, without hidden ones and what systems leave there.
pub(in crate::data) fn entries(folder: &Path) -> Result<Vec<String>, DatasetError> {
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
