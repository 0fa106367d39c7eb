//! Small datasets for the tests of this folder.

use std::error::Error;
use std::fs;
use std::io::Cursor;
use std::path::Path;

use image::{DynamicImage, ImageFormat, Rgb, RgbImage};
use tempfile::TempDir;

use crate::config::DatasetSection;
use crate::data::error::DatasetError;

pub(super) fn gradient() -> RgbImage {
    RgbImage::from_fn(40, 24, |x, y| {
        Rgb([6 * x as u8, 10 * y as u8, (x * y) as u8])
    })
}

pub(super) fn encoded(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image
        .write_to(&mut bytes, format)
        .expect("encode in memory");
    bytes.into_inner()
}

pub(super) fn png() -> Vec<u8> {
    encoded(&gradient().into(), ImageFormat::Png)
}

pub(super) fn jpeg() -> Vec<u8> {
    encoded(&gradient().into(), ImageFormat::Jpeg)
}

pub(super) fn webp() -> Vec<u8> {
    encoded(&gradient().into(), ImageFormat::WebP)
}

/// A dataset folder with these files.
pub(super) fn folder(files: &[(&str, &[u8])]) -> TempDir {
    let folder = tempfile::tempdir().expect("temporary folder");
    for (name, bytes) in files {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().expect("a file has a folder")).expect("make folder");
        fs::write(path, bytes).expect("write file");
    }
    folder
}

pub(super) fn section(folder: &TempDir) -> DatasetSection {
    DatasetSection {
        path: folder.path().into(),
        ..DatasetSection::default()
    }
}

/// The error as the program prints it, with the folder written as DIR.
pub(super) fn line(folder: &Path, error: &DatasetError) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        line = format!("{line}: {error}");
        source = error.source();
    }
    line.replace(&folder.display().to_string(), "DIR")
}
