//! What is trained on: an image, its caption, and pictures beside it.

use std::path::PathBuf;

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
    /// The caption, without surrounding white space and with the trigger word; may be empty.
    pub caption: String,
    /// Which of the dataset's folders it is from.
    pub folder: usize,
    /// Pictures that the caption says what to do with.
    pub references: Vec<Picture>,
    /// Where the image is to be painted: the white of this one.
    pub mask: Option<Picture>,
}

/// An image file beside a sample, looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    /// Where it is.
    pub path: PathBuf,
    /// SHA-256 of the file, in hex.
    pub sha256: String,
    /// Width in pixels, upright.
    pub width_px: u32,
    /// Height in pixels, upright.
    pub height_px: u32,
}
