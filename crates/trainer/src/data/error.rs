//! Why a dataset was refused.

use std::io;
use std::path::{Path, PathBuf};

use image::ImageError;

use crate::nearest::{one_line, shown};

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
        "no images (png, jpg, webp, bmp or tiff) in `{}` and its subfolders{instead}",
        shown(path)
    )]
    Empty {
        /// `dataset.path`.
        path: PathBuf,
        /// What is there, or nothing.
        instead: String,
    },
    /// A name of an image to leave out, of which there is none.
    #[error("`dataset.skip` names `{name}`, which is no image of the dataset: remove the name")]
    NothingToSkip {
        /// As configured.
        name: String,
    },
    /// A file name that cannot be kept as text.
    #[error("the name of `{}` is not UTF-8", shown(path))]
    Name {
        /// The file.
        path: PathBuf,
    },
    /// An image in a format that is not read here.
    #[error(
        "image `{}` is in an unsupported format{more}: convert to png, jpg or webp, or move away what is not to be trained on",
        shown(path)
    )]
    UnsupportedImage {
        /// The first such image.
        path: PathBuf,
        /// How many more there are, or nothing.
        more: String,
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
        "image `{}` has no caption: expected `{caption}` beside it{near}{more}",
        shown(image)
    )]
    CaptionMissing {
        /// The first such image.
        image: PathBuf,
        /// File name of the caption.
        caption: String,
        /// A text file with nearly that name, or nothing.
        near: String,
        /// How many more there are, or nothing.
        more: String,
    },
    /// Captions with an extension that the configuration does not name.
    #[error(
        "image `{}` has no caption with the extension `{configured}`, but {count} with `{extension}`: set `dataset.caption_extension` to \"{extension}\"",
        shown(image)
    )]
    OtherExtension {
        /// The first such image.
        image: PathBuf,
        /// `dataset.caption_extension`.
        configured: String,
        /// Captions found with the other one.
        count: usize,
        /// The other one.
        extension: String,
    },
    /// Captions without images, too many to be notes.
    #[error(
        "caption `{}` has no image: expected `{stem}.png`, .jpg, .webp, .bmp or .tiff beside it{more}",
        shown(caption)
    )]
    ImageMissing {
        /// The first such caption.
        caption: PathBuf,
        /// Its name without the extension.
        stem: String,
        /// How many more there are, or nothing.
        more: String,
    },
    /// Two captions of one image.
    #[error(
        "image `{}` has two captions, `{first}` and `{second}`: remove one",
        shown(image)
    )]
    TwoCaptionFiles {
        /// The image.
        image: PathBuf,
        /// File name of one.
        first: String,
        /// File name of the other.
        second: String,
    },
    /// A caption that is not what it should be.
    #[error("caption `{}` {problem}", shown(path))]
    Caption {
        /// The caption.
        path: PathBuf,
        /// The rest of the sentence.
        problem: String,
    },
    /// Two lists for the same images.
    #[error(
        "`{}` has both a metadata.jsonl and a metadata.csv: remove one",
        shown(path)
    )]
    TwoLists {
        /// The folder.
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
    #[error("image `{}` is not listed in {list}{more}", shown(image))]
    Unlisted {
        /// The first such image.
        image: PathBuf,
        /// File name of the list.
        list: String,
        /// How many more there are, or nothing.
        more: String,
    },
    /// An image with a caption in both forms.
    #[error(
        "image `{}` has a caption in {list} and in `{caption}`: remove one",
        shown(image)
    )]
    TwoCaptions {
        /// The image.
        image: PathBuf,
        /// File name of the list.
        list: String,
        /// File name of the other caption.
        caption: String,
    },
    /// An image in the list of its folder and in one above.
    #[error("image `{}` is in two lists: remove it from one", shown(image))]
    ListedTwice {
        /// The image.
        image: PathBuf,
    },
    /// An image without the picture that belongs to it.
    #[error("image `{}` has no {what}: {expected}{more}", shown(image))]
    NoPicture {
        /// The first such image.
        image: PathBuf,
        /// Reference or mask.
        what: &'static str,
        /// What was looked for.
        expected: String,
        /// How many more there are, or nothing.
        more: String,
    },
    /// Two pictures of one name.
    #[error(
        "`{}` and `{second}` have the same name for the image they belong to: remove one",
        shown(first)
    )]
    TwoPictures {
        /// The first.
        first: PathBuf,
        /// The second, from the folder.
        second: String,
    },
    /// References in a list and in a folder.
    #[error(
        "image `{}` has references in its list, and `dataset.reference` names a folder of them: remove one",
        shown(image)
    )]
    TwoReferences {
        /// The first such image.
        image: PathBuf,
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

/// serde_json's message without the line, which is always 1 here.
pub(super) fn json_problem(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let text = text.replace("missing field", "missing key");
    one_line(&text.replace(" at line 1 column ", " at column "))
}

pub(super) fn read_error(path: &Path, source: io::Error) -> DatasetError {
    DatasetError::Read {
        path: path.into(),
        source,
    }
}

pub(super) fn image_error(path: &Path, problem: impl Into<String>) -> DatasetError {
    DatasetError::Image {
        path: path.into(),
        problem: problem.into(),
    }
}
