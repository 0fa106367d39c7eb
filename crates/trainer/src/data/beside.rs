//! Pictures that belong to samples: references, and masks that say where a sample is to be painted.
//!
//! A folder holds them under the names of the samples, whatever their extension: `cat.png` belongs to the sample `cat.jpg`, and
//! so do, where there is no `cat` of any kind, `cat_1.png`, `cat_2.png` and so on, in this order. References may be told by a
//! list instead, see [`crate::data::metadata`].

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use lora_core::files::digest::sha256_hex;

use crate::config::FolderSection;
use crate::data::error::{DatasetError, image_error};
use crate::data::image::{ImageLimits, inspect, is_image_extension, read_image};
use crate::data::sample::{Picture, Sample};
use crate::data::scan::{counted, entries, key, more, named, split};
use crate::nearest::one_line;

impl Picture {
    fn look_at(path: &Path) -> Result<Self, DatasetError> {
        let limits = ImageLimits::default();
        let bytes = read_image(path, &limits)?;
        let header = inspect(path, &bytes, &limits)?;
        Ok(Self {
            path: path.into(),
            sha256: sha256_hex(&bytes),
            width_px: header.width_px,
            height_px: header.height_px,
        })
    }
}

/// Gives every sample of a folder its references and its mask; `listed` are the references that lists tell, by sample. Returns
/// lines about pictures that belong to none.
pub(super) fn find(
    samples: &mut [Sample],
    listed: &[Vec<PathBuf>],
    folder: &FolderSection,
) -> Result<Vec<String>, DatasetError> {
    let mut warnings = Vec::new();
    let references = match &folder.reference {
        Some(references) => {
            if let Some(sample) = (0..samples.len()).find(|&sample| !listed[sample].is_empty()) {
                return Err(DatasetError::TwoReferences {
                    image: samples[sample].image.clone(),
                });
            }
            let mut there = Named::read(references)?;
            let found = samples.iter().map(|sample| there.numbered(&sample.name));
            let found: Vec<Vec<PathBuf>> = found.collect();
            warnings.extend(there.warning("reference"));
            found
        }
        None => listed.to_vec(),
    };
    let bare: Vec<usize> = (0..samples.len())
        .filter(|&sample| references[sample].is_empty())
        .collect();
    let any = folder.reference.is_some() || bare.len() < samples.len();
    if let Some(&first) = bare.first()
        && any
    {
        return Err(missing(
            samples,
            first,
            bare.len(),
            "reference",
            folder.reference.as_deref(),
        ));
    }
    for (sample, paths) in samples.iter_mut().zip(&references) {
        let looked_at = paths.iter().map(|path| Picture::look_at(path));
        sample.references = looked_at.collect::<Result<_, _>>()?;
    }

    let Some(folder) = &folder.mask else {
        return Ok(warnings);
    };
    let mut there = Named::read(folder)?;
    let masks: Vec<Option<PathBuf>> = samples
        .iter()
        .map(|sample| there.exactly(&sample.name))
        .collect();
    warnings.extend(there.warning("mask"));
    let bare = masks.iter().filter(|mask| mask.is_none()).count();
    if let Some(first) = masks.iter().position(Option::is_none) {
        return Err(missing(samples, first, bare, "mask", Some(folder)));
    }
    for (sample, path) in samples.iter_mut().zip(masks.into_iter().flatten()) {
        let mask = Picture::look_at(&path)?;
        let (size, of) = (
            (mask.width_px, mask.height_px),
            (sample.width_px, sample.height_px),
        );
        if size != of {
            let problem = format!(
                "is {}x{} pixels, and the image it is the mask of {}x{}: make them the same",
                size.0, size.1, of.0, of.1
            );
            return Err(image_error(&path, problem));
        }
        sample.mask = Some(mask);
    }
    Ok(warnings)
}

fn missing(
    samples: &[Sample],
    first: usize,
    count: usize,
    what: &'static str,
    folder: Option<&Path>,
) -> DatasetError {
    let sample = &samples[first];
    let stem = split(&sample.name).0;
    let expected = match folder {
        Some(folder) => {
            let path = folder.join(format!("{stem}.png"));
            let path = one_line(&path.to_string_lossy());
            match what {
                "reference" => format!(
                    "expected `{path}`, .jpg and so on, or several with _1, _2 ... behind the name"
                ),
                _ => format!("expected `{path}`, .jpg and so on"),
            }
        }
        None => "other images of the list have one: name it in the column `reference`".into(),
    };
    DatasetError::NoPicture {
        image: sample.image.clone(),
        what,
        expected,
        more: more(count - 1, "image"),
    }
}

/// The images of a folder and those below it, by name.
struct Named {
    /// By path from the folder without extension, as names are compared.
    images: BTreeMap<String, PathBuf>,
    taken: BTreeSet<String>,
}

impl Named {
    fn read(folder: &Path) -> Result<Self, DatasetError> {
        if !folder.is_dir() {
            return Err(DatasetError::NoFolder {
                path: folder.into(),
            });
        }
        let mut images: BTreeMap<String, PathBuf> = BTreeMap::new();
        let mut folders = vec![String::new()];
        while let Some(prefix) = folders.pop() {
            for name in entries(&folder.join(&prefix))? {
                let inner = format!("{prefix}{name}");
                let path = folder.join(&inner);
                if path.is_dir() {
                    folders.push(format!("{inner}/"));
                    continue;
                }
                let (stem, extension) = split(&inner);
                if !is_image_extension(extension) {
                    continue;
                }
                if let Some(first) = images.insert(key(stem), path) {
                    return Err(DatasetError::TwoPictures {
                        first,
                        second: one_line(&inner),
                    });
                }
            }
        }
        Ok(Self {
            images,
            taken: BTreeSet::new(),
        })
    }

    fn take(&mut self, name: String) -> Option<PathBuf> {
        let path = self.images.get(&name).cloned()?;
        self.taken.insert(name);
        Some(path)
    }

    /// The image with the name of a sample.
    fn exactly(&mut self, sample: &str) -> Option<PathBuf> {
        self.take(key(split(sample).0))
    }

    /// That one, or those with numbers behind the name.
    fn numbered(&mut self, sample: &str) -> Vec<PathBuf> {
        if let Some(own) = self.exactly(sample) {
            return vec![own];
        }
        let stem = key(split(sample).0);
        let mut found = Vec::new();
        while let Some(next) = self.take(format!("{stem}_{}", found.len() + 1)) {
            found.push(next);
        }
        found
    }

    /// A line about images that belong to no sample.
    fn warning(&self, what: &str) -> Option<String> {
        let unused = self
            .images
            .iter()
            .filter(|(name, _)| !self.taken.contains(*name));
        let unused: Vec<String> = unused
            .map(|(_, path)| path.to_string_lossy().into_owned())
            .collect();
        (!unused.is_empty()).then(|| {
            format!(
                "not used, since no image has the name: {} ({})",
                counted(unused.len(), what),
                named(&unused)
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::config::DatasetSection;
    use crate::data::scan::scan;
    use crate::data::testing::{folder, png, section};

    fn names(pictures: &[Picture]) -> Vec<String> {
        let name = |picture: &Picture| {
            picture
                .path
                .file_name()
                .map(|it| it.to_string_lossy().into_owned())
        };
        pictures.iter().filter_map(name).collect()
    }

    #[test]
    fn references_have_the_name_of_their_sample_or_numbers_behind_it() {
        let data = folder(&[
            ("cat.png", &png()),
            ("cat.txt", b"make it snow"),
            ("sub/dog.png", &png()),
            ("sub/dog.txt", b"make it rain"),
            ("before/CAT.png", &png()),
            ("before/sub/dog_1.png", &png()),
            ("before/sub/dog_2.png", &png()),
            ("before/sub/dog_4.png", &png()),
        ]);
        let mut config = section(&data);
        config.reference = Some(data.path().join("before"));
        let found = scan(&config).expect("a good dataset");
        assert_eq!(found.samples.len(), 2, "the references are no samples");
        assert_eq!(names(&found.samples[0].references), ["CAT.png"]);
        assert_eq!(
            names(&found.samples[1].references),
            ["dog_1.png", "dog_2.png"]
        );
        assert_eq!(found.warnings.len(), 1);
        assert!(
            found.warnings[0].contains("dog_4.png"),
            "{:?}",
            found.warnings
        );

        fs::remove_file(data.path().join("before/CAT.png")).expect("remove file");
        let error = scan(&config).expect_err("cat has none").to_string();
        assert!(
            error.contains("cat.png` has no reference: expected `"),
            "{error}"
        );
        assert!(error.contains("before/cat.png`"), "{error}");
    }

    #[test]
    fn folders_have_references_and_masks_of_their_own() {
        let data = folder(&[
            ("one/cat.png", &png()),
            ("one/cat.txt", b"make it snow"),
            ("one/before/cat.png", &png()),
            ("two/cat.png", &png()),
            ("two/cat.txt", b"make it rain"),
            ("one/of two/cat_1.png", &png()),
            ("one/of two/cat_2.png", &png()),
            ("three/cat.png", &png()),
            ("three/cat.txt", b"a cat"),
        ]);
        let of = |path: &str, reference: Option<&str>| FolderSection {
            path: data.path().join(path),
            reference: reference.map(|reference| data.path().join(reference)),
            ..FolderSection::default()
        };
        let mut config = DatasetSection {
            folders: vec![
                of("one", Some("one/before")),
                of("two", Some("one/of two")),
                of("three", None),
            ],
            ..DatasetSection::default()
        };
        let found = scan(&config).expect("a good dataset");
        assert_eq!(found.warnings, [""; 0]);
        let references: Vec<_> = found
            .samples
            .iter()
            .map(|sample| {
                let path = |picture: &Picture| {
                    picture
                        .path
                        .strip_prefix(data.path())
                        .expect("there")
                        .to_path_buf()
                };
                (
                    sample.name.as_str(),
                    sample.references.iter().map(path).collect::<Vec<_>>(),
                )
            })
            .collect();
        assert_eq!(
            references,
            [
                ("one/cat.png", vec!["one/before/cat.png".into()]),
                (
                    "two/cat.png",
                    vec!["one/of two/cat_1.png".into(), "one/of two/cat_2.png".into()]
                ),
                ("three/cat.png", vec![]),
            ]
        );
        fs::remove_file(data.path().join("one/before/cat.png")).expect("remove file");
        let error = scan(&config).expect_err("none for the first").to_string();
        assert!(
            error.contains("one/cat.png` has no reference: expected"),
            "{error}"
        );

        // Two folders that are each other's references; what is beside one is no image of the other.
        let mask = |path: &str, mask: &str| FolderSection {
            mask: Some(data.path().join(mask)),
            ..of(path, None)
        };
        let paths = |config: &DatasetSection, of: fn(&Sample) -> &Picture| {
            let found = scan(config).expect("a good dataset");
            let paths = found.samples.iter().map(|sample| of(sample).path.clone());
            paths.collect::<Vec<_>>()
        };
        config.folders = vec![of("three", Some("two")), of("two", Some("three"))];
        let found = paths(&config, |sample| &sample.references[0]);
        assert_eq!(
            found,
            ["two/cat.png", "three/cat.png"].map(|path| data.path().join(path))
        );
        fs::rename(
            data.path().join("one/of two/cat_1.png"),
            data.path().join("one/before/cat.png"),
        )
        .expect("move");
        fs::rename(
            data.path().join("one/of two/cat_2.png"),
            data.path().join("one/of two/cat.png"),
        )
        .expect("move");
        config.folders = vec![mask("one", "one/before"), mask("three", "one/of two")];
        let found = paths(&config, |sample| sample.mask.as_ref().expect("a mask"));
        assert_eq!(
            found,
            ["one/before/cat.png", "one/of two/cat.png"].map(|path| data.path().join(path))
        );
    }

    #[test]
    fn lists_may_tell_references() {
        let list = "{\"file_name\": \"a.png\", \"text\": \"x\", \"reference\": \"b.png\"}\n{\"file_name\": \"c.png\", \"text\": \"y\", \"references\": [\"b.png\", \"a.png\"]}\n";
        let data = folder(&[
            ("a.png", &png()),
            ("b.png", &png()),
            ("c.png", &png()),
            ("metadata.jsonl", list.as_bytes()),
        ]);
        let found = scan(&section(&data)).expect("a good dataset");
        assert_eq!(found.samples.len(), 2);
        assert_eq!(names(&found.samples[0].references), ["b.png"]);
        assert_eq!(names(&found.samples[1].references), ["b.png", "a.png"]);

        fs::write(
            data.path().join("metadata.jsonl"),
            list.replace("\"references\": [\"b.png\", \"a.png\"]", "\"other\": 1"),
        )
        .expect("write file");
        let error = scan(&section(&data)).expect_err("c has none").to_string();
        assert!(error.contains("c.png` has no reference"), "{error}");

        fs::remove_file(data.path().join("metadata.jsonl")).expect("remove file");
        let table = "file_name;text;references\na.png;x;\"[\"\"b.png\"\", \"\"c.png\"\"]\"\n";
        fs::write(data.path().join("metadata.csv"), table).expect("write file");
        let found = scan(&section(&data)).expect("a good dataset");
        assert_eq!(names(&found.samples[0].references), ["b.png", "c.png"]);
    }

    #[test]
    fn a_mask_has_the_size_of_its_image() {
        let data = folder(&[
            ("cat.png", &png()),
            ("cat.txt", b"a cat"),
            ("masks/cat.png", &png()),
        ]);
        let mut config = section(&data);
        config.mask = Some(data.path().join("masks"));
        let found = scan(&config).expect("a good dataset");
        assert_eq!(
            found.samples[0].mask.as_ref().map(|mask| mask.path.clone()),
            Some(data.path().join("masks/cat.png"))
        );
        image::RgbImage::new(3, 3)
            .save(data.path().join("masks/cat.png"))
            .expect("write image");
        let error = scan(&config).expect_err("of another size").to_string();
        assert!(error.contains("is 3x3 pixels"), "{error}");
        fs::remove_file(data.path().join("masks/cat.png")).expect("remove file");
        let error = scan(&config).expect_err("no mask").to_string();
        assert!(error.contains("has no mask: expected"), "{error}");
    }
}
