//! Images with their captions beside them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::data::error::DatasetError;
use crate::data::text::read_caption;
use crate::nearest::one_line;

use super::names::{composed, key, split};

/// An image and its caption, before the image was looked at.
pub(super) struct Pair {
    pub(super) name: String,
    pub(super) image: PathBuf,
    pub(super) caption: String,
    /// As a list tells them.
    pub(super) references: Vec<PathBuf>,
}

/// One folder of a dataset, its files by kind.
pub(super) struct Folder {
    /// Its path from the root with a `/` at the end; empty for the root.
    pub(super) prefix: String,
    /// The list that tells the captions here: its own, or the next one above.
    pub(super) list: Option<List>,
    pub(super) images: Vec<String>,
    pub(super) captions: Vec<String>,
}

/// A list of captions, and the folder that it is in.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct List {
    pub(super) path: PathBuf,
    /// As [`Folder::prefix`].
    pub(super) prefix: String,
}

/// What became of the files of a folder.
#[derive(Default)]
pub(super) struct Paired {
    pub(super) pairs: Vec<Pair>,
    /// Images without caption.
    pub(super) bare: Vec<String>,
    /// Captions without image.
    pub(super) lonely: Vec<String>,
}

impl Folder {
    /// `x.png` with `x.txt`, whatever the case and the form of Unicode; where that leaves a choice, the exact name counts.
    pub(super) fn pair(
        &self,
        root: &Path,
        caption_extension: &str,
    ) -> Result<Paired, DatasetError> {
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
                        paired.pairs.push(Pair {
                            image: path.join(image),
                            caption: read_caption(&path.join(caption))?,
                            name,
                            references: Vec::new(),
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
