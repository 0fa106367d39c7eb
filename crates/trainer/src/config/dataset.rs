//! `[dataset]`: images and captions, and how they are brought into shape.

use std::path::{Path, PathBuf};

use lora_core::peft::OneOrMany;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::fields::is_default;
use super::rules::{
    ABOVE_0, BELOW_1, Invalid, MAX_COUNT, PROBABILITY, check_count, check_path, check_side,
    check_word,
};
use super::schemas::one_or_many;
use crate::data::image::is_image_extension;
use crate::nearest::one_line;

/// Longest text that the text encoders are run on, in tokens.
const MAX_SEQUENCE_LENGTH: usize = 512;

/// Images and captions, and how they are brought into shape.
///
/// An image is cropped to the nearest of a few aspects, resized to about `resolution * resolution` pixels, and encoded once.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DatasetSection {
    /// Folder of images with captions, searched with its subfolders. Required, unless there are `folders`.
    #[serde(skip_serializing_if = "is_default")]
    pub path: PathBuf,
    /// Several folders in place of `path`, see below. Default: none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub folders: Vec<FolderSection>,
    /// Folder of reference pictures, for models that edit (FLUX.2, FLUX.1 Kontext): under the name of their image, or
    /// several with `_1`, `_2` and so on behind it. The caption says what to do with them. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reference: Option<PathBuf>,
    /// Folder of masks under the names of their images, for FLUX.1 Fill: what is white is painted anew. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mask: Option<PathBuf>,
    /// Images to leave out, by their path in the dataset. `--skip-bad` adds those that cannot be read; the list is part of the
    /// run, and a resumed one keeps it. Default: none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub skip: Vec<String>,
    /// Side in pixels of the square whose area no training image exceeds; a multiple of 16. With a list, `[512, 768]`, every
    /// image is trained on at each. Default 512.
    #[schemars(schema_with = "one_or_many::<u32>")]
    pub resolution: OneOrMany<u32>,
    /// Sides of training images are multiples of this many pixels; itself a multiple of 16. Smaller steps crop less and make more
    /// different sizes. Default 64.
    pub bucket_step: u32,
    /// Mirror images left to right, each time with probability 1/2. Default false.
    pub random_flip: bool,
    /// Places that an image is cropped at, one of them each time: 1 is the centre, more are drawn for each image. Not with
    /// references, which are cropped at their centre. Default 1.
    #[serde(skip_serializing_if = "is_one")]
    pub random_crops: usize,
    /// A word put in front of captions that have it not (`ohwx, a cat`), and in place of every `[trigger]` in them. Default:
    /// none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trigger_word: Option<String>,
    /// Train with the tags of a caption in other orders. Default false.
    #[serde(skip_serializing_if = "is_default")]
    pub shuffle_caption: bool,
    /// Tags at the beginning of a caption that are neither moved nor dropped. Default 0.
    #[serde(skip_serializing_if = "is_default")]
    pub keep_tokens: usize,
    /// Probability in [0, 1) of leaving out a tag of a caption. Default 0.
    #[serde(skip_serializing_if = "is_default")]
    pub caption_tag_dropout_rate: f64,
    /// What stands between the tags of a caption. Default ",".
    #[serde(skip_serializing_if = "is_comma")]
    pub caption_separator: String,
    /// Texts that are made of a caption by the three keys above; each step picks one of them. Default 8.
    #[serde(skip_serializing_if = "is_eight")]
    pub caption_variants: usize,
    /// A caption beside its image is the file with the image's name and this extension, without the dot. Default "txt".
    pub caption_extension: String,
    /// Probability in [0, 1] of training on the empty caption instead of the image's own. Default 0.
    pub caption_dropout: f64,
    /// Length in tokens that captions are padded or cut to for the text encoder (T5, Qwen3, Mistral), 1 to 512. Default 512.
    pub max_sequence_length: usize,
}

impl Default for DatasetSection {
    fn default() -> Self {
        Self {
            path: PathBuf::new(),
            folders: Vec::new(),
            reference: None,
            mask: None,
            skip: Vec::new(),
            resolution: OneOrMany::One(512),
            bucket_step: 64,
            random_flip: false,
            random_crops: 1,
            trigger_word: None,
            shuffle_caption: false,
            keep_tokens: 0,
            caption_tag_dropout_rate: 0.0,
            caption_separator: ",".into(),
            caption_variants: 8,
            caption_extension: "txt".into(),
            caption_dropout: 0.0,
            max_sequence_length: 512,
        }
    }
}

impl DatasetSection {
    /// Whether a sample is trained with other texts than its caption.
    pub(crate) fn varies_captions(&self) -> bool {
        self.shuffle_caption || self.caption_tag_dropout_rate > 0.0
    }

    /// The largest resolution, which takes most memory.
    pub(crate) fn largest_resolution(&self) -> u32 {
        let resolutions = self.resolution.as_slice().iter().copied();
        resolutions.max().unwrap_or_default()
    }

    /// What the tags of a varied caption are joined by.
    pub(crate) fn joined_by(&self) -> String {
        format!("{} ", self.caption_separator.trim())
    }

    /// The folders: `path` is one that is seen once and weighs 1, with the pictures beside it.
    pub fn all_folders(&self) -> Vec<FolderSection> {
        match self.folders.is_empty() {
            true => vec![FolderSection {
                path: self.path.clone(),
                reference: self.reference.clone(),
                mask: self.mask.clone(),
                ..FolderSection::default()
            }],
            false => self.folders.clone(),
        }
    }

    pub(super) fn check(&self) -> Result<(), Invalid> {
        if self.folders.is_empty() {
            check_path("dataset.path", Some(&self.path))?;
        } else if !self.path.as_os_str().is_empty() {
            let problem = "cannot be given with `dataset.path`: name that folder among them";
            return Err(("dataset.folders", problem.into()));
        }
        for folder in &self.folders {
            check_path("dataset.folders", Some(&folder.path))?;
            check_count("dataset.folders", folder.repeats, MAX_COUNT)?;
            ABOVE_0.check("dataset.folders", folder.loss_weight)?;
            check_word("dataset.folders", folder.trigger_word.as_deref())?;
            let (reference, mask) = (folder.reference.as_deref(), folder.mask.as_deref());
            check_beside(["path", "reference", "mask"], &folder.path, reference, mask)
                .map_err(|(key, problem)| ("dataset.folders", format!("`{key}` {problem}")))?;
        }
        let masks = self.folders.iter().filter(|folder| folder.mask.is_some());
        let (masks, all) = (masks.count(), self.folders.len());
        if masks > 0 && masks < all {
            let problem = format!("must have a `mask` each or none, found {masks} in {all}");
            return Err(("dataset.folders", problem));
        }
        check_word("dataset.trigger_word", self.trigger_word.as_deref())?;
        for (key, name, folder) in [
            ("dataset.reference", "reference", &self.reference),
            ("dataset.mask", "mask", &self.mask),
        ] {
            if folder.is_some() && !self.folders.is_empty() {
                let problem = format!(
                    "cannot be together with `dataset.folders`: give each of these its own `{name}`"
                );
                return Err((key, problem));
            }
        }
        let keys = ["dataset.path", "dataset.reference", "dataset.mask"];
        let (reference, mask) = (self.reference.as_deref(), self.mask.as_deref());
        check_beside(keys, &self.path, reference, mask)?;
        check_side("dataset.bucket_step", self.bucket_step)?;
        let resolutions = self.resolution.as_slice();
        if resolutions.is_empty() {
            return Err(("dataset.resolution", "must name at least one".into()));
        }
        for (index, &resolution) in resolutions.iter().enumerate() {
            check_side("dataset.resolution", resolution)?;
            if resolutions[..index].contains(&resolution) {
                let problem = format!("must name each only once, found {resolution} twice");
                return Err(("dataset.resolution", problem));
            }
            if self.bucket_step > resolution {
                let problem = format!(
                    "must be at most dataset.resolution = {resolution}, found {}",
                    self.bucket_step
                );
                return Err(("dataset.bucket_step", problem));
            }
        }
        check_count("dataset.random_crops", self.random_crops, 64)?;
        check_count("dataset.caption_variants", self.caption_variants, 1024)?;
        BELOW_1.check(
            "dataset.caption_tag_dropout_rate",
            self.caption_tag_dropout_rate,
        )?;
        if self.caption_separator.trim().is_empty() {
            let problem = "must be what stands between tags, such as \",\"";
            return Err(("dataset.caption_separator", problem.into()));
        }
        if self.keep_tokens > 0 && !self.varies_captions() {
            let problem = "has no effect without `shuffle_caption` or `caption_tag_dropout_rate`";
            return Err(("dataset.keep_tokens", problem.into()));
        }
        let extension = &self.caption_extension;
        let is_plain = extension.chars().all(|c| c.is_ascii_alphanumeric());
        if extension.is_empty() || !is_plain || is_image_extension(extension) {
            let found = one_line(extension);
            let problem = format!("must be a file extension such as \"txt\", found \"{found}\"");
            return Err(("dataset.caption_extension", problem));
        }
        PROBABILITY.check("dataset.caption_dropout", self.caption_dropout)?;
        check_count(
            "dataset.max_sequence_length",
            self.max_sequence_length,
            MAX_SEQUENCE_LENGTH,
        )
    }
}

/// Checks the folders of references and of masks for the images in `path`; the keys of the three are named in errors.
pub(super) fn check_beside(
    keys: [&'static str; 3],
    path: &Path,
    reference: Option<&Path>,
    mask: Option<&Path>,
) -> Result<(), Invalid> {
    for (key, folder) in [(keys[1], reference), (keys[2], mask)] {
        check_path(key, folder)?;
        if folder == Some(path) {
            let problem = format!(
                "is `{}`: put these pictures into a folder of their own",
                keys[0]
            );
            return Err((key, problem));
        }
    }
    if reference.is_some() && mask.is_some() {
        let problem = format!("cannot be together with `{}`: no model reads both", keys[2]);
        return Err((keys[1], problem));
    }
    Ok(())
}

/// One of several folders of images with captions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct FolderSection {
    /// The folder. Required.
    pub path: PathBuf,
    /// Times that its images are seen in an epoch, kohya's number in front of a folder's name. Default 1.
    pub repeats: usize,
    /// Factor on the loss of its images, above 0; kohya's `prior_loss_weight`. Default 1.
    pub loss_weight: f64,
    /// Folder of the reference pictures of these images, as `dataset.reference` is for one folder. A folder without is trained
    /// on without. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reference: Option<PathBuf>,
    /// Folder of the masks of these images, as `dataset.mask`; all folders have one, or none. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mask: Option<PathBuf>,
    /// In place of `dataset.trigger_word`, for this folder. Default: `dataset.trigger_word`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trigger_word: Option<String>,
}

impl Default for FolderSection {
    fn default() -> Self {
        Self {
            path: PathBuf::new(),
            repeats: 1,
            loss_weight: 1.0,
            reference: None,
            mask: None,
            trigger_word: None,
        }
    }
}

fn is_one(value: &usize) -> bool {
    *value == 1
}

fn is_eight(value: &usize) -> bool {
    *value == 8
}

fn is_comma(value: &str) -> bool {
    value == ","
}
