//! An image file to be written at the end of long work: everything that can be wrong with its place is found before.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::Context;
use image::codecs::jpeg::JpegEncoder;
use image::{ImageFormat, RgbImage};
use lora_core::files::replace::replace_file;

use crate::cli::UsageError;
use crate::run::vfs::writable;

/// Quality of a JPEG, of 100.
const JPEG_QUALITY: u8 = 95;

/// Where an image is to be written, and as what.
#[derive(Debug)]
pub(crate) struct ImagePlace {
    path: PathBuf,
    format: ImageFormat,
}

impl ImagePlace {
    /// The extension says the format. Missing folders are made, and it is tried whether a file can be.
    ///
    /// # Errors
    /// Another extension, a file that exists and is not to be replaced, a folder that cannot be made or written into.
    pub(crate) fn new(path: &Path, overwrite: bool) -> anyhow::Result<Self> {
        let usage = |problem: &str| UsageError(format!("--out {}: {problem}", path.display()));
        let extension = path.extension().unwrap_or_default().to_ascii_lowercase();
        let format = match extension.to_str() {
            Some("png") => ImageFormat::Png,
            Some("jpg" | "jpeg") => ImageFormat::Jpeg,
            Some("webp") => ImageFormat::WebP,
            _ => return Err(usage("name a .png, .jpg or .webp file").into()),
        };
        if path.is_dir() {
            return Err(usage("this is a folder: name a file in it").into());
        }
        if fs::symlink_metadata(path).is_ok() && !overwrite {
            return Err(usage("it exists: choose another name, or add --overwrite").into());
        }
        let folder = match path.parent() {
            Some(folder) if folder != Path::new("") => folder,
            _ => Path::new("."),
        };
        fs::create_dir_all(folder)
            .with_context(|| format!("make the folder of --out {}", path.display()))?;
        writable(folder)?;
        Ok(Self {
            path: path.into(),
            format,
        })
    }

    /// Writes the image, whole or not at all.
    ///
    /// # Errors
    /// A full disk.
    pub(crate) fn write(&self, image: &RgbImage) -> anyhow::Result<()> {
        let mut bytes = io::Cursor::new(Vec::new());
        match self.format {
            ImageFormat::Jpeg => {
                image.write_with_encoder(JpegEncoder::new_with_quality(&mut bytes, JPEG_QUALITY))
            }
            format => image.write_to(&mut bytes, format),
        }
        .and_then(|()| {
            Ok(replace_file(&self.path, |out| {
                out.write_all(bytes.get_ref())
            })?)
        })
        .with_context(|| format!("write {}", self.path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(path: &Path) -> String {
        let error = ImagePlace::new(path, false).expect_err("no place for an image");
        format!("{error:#}")
    }

    #[test]
    fn the_extension_is_what_is_written() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let image = RgbImage::from_fn(16, 16, |x, y| image::Rgb([x as u8, y as u8, 7]));
        for (name, format) in [
            ("a.png", ImageFormat::Png),
            ("made/for/it/a.JPG", ImageFormat::Jpeg),
            ("a.jpeg", ImageFormat::Jpeg),
            ("a.webp", ImageFormat::WebP),
        ] {
            let path = folder.path().join(name);
            let place = ImagePlace::new(&path, false).expect("a good place");
            assert!(!path.exists(), "nothing is there before the work is done");
            place.write(&image).expect("a writable folder");
            let bytes = fs::read(&path).expect("the image");
            assert_eq!(image::guess_format(&bytes).expect("an image"), format);
        }
        for name in ["a.gif", "a", "a.png.txt", ".png"] {
            let message = refused(&folder.path().join(name));
            assert!(
                message.ends_with("name a .png, .jpg or .webp file"),
                "{message}"
            );
        }
    }

    #[test]
    fn what_is_there_stays_unless_it_is_to_be_replaced() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("holiday.png");
        fs::write(&path, b"mine").expect("a writable folder");
        assert!(refused(&path).contains("it exists"));
        assert!(refused(&path.join("x.png")).contains("make the folder of --out"));
        fs::create_dir(folder.path().join("b.png")).expect("a writable folder");
        assert!(refused(&folder.path().join("b.png")).contains("this is a folder"));
        assert_eq!(fs::read(&path).expect("the file"), b"mine");
        let place = ImagePlace::new(&path, true).expect("to be replaced");
        assert_eq!(fs::read(&path).expect("the file"), b"mine");
        place
            .write(&RgbImage::new(4, 4))
            .expect("a writable folder");
        assert_ne!(fs::read(&path).expect("the file"), b"mine");
    }
}
