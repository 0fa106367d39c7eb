//! What the samples of a dataset were when they were last looked at.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use lora_core::files::digest::sha256_hex;
use serde::{Deserialize, Serialize};

use crate::data::sample::Sample;
use crate::nearest::shown;

/// What a sample was when it was last looked at, to notice later that it changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SampleDigest {
    /// [`Sample::name`].
    pub name: String,
    /// SHA-256 of the image file, in hex.
    pub image_sha256: String,
    /// SHA-256 of the caption, in hex.
    pub caption_sha256: String,
    /// SHA-256 of its references, in hex, then of its mask.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub beside_sha256: Vec<String>,
}

/// Digests of all samples, in their order.
pub fn sample_digests(samples: &[Sample]) -> Vec<SampleDigest> {
    let digest = |sample: &Sample| SampleDigest {
        name: sample.name.clone(),
        image_sha256: sample.image_sha256.clone(),
        caption_sha256: sha256_hex(sample.caption.as_bytes()),
        beside_sha256: {
            let pictures = sample.references.iter().chain(&sample.mask);
            pictures.map(|picture| picture.sha256.clone()).collect()
        },
    };
    samples.iter().map(digest).collect()
}

/// One digest for the whole dataset: equal only if names, image files, captions, the pictures beside them and their order are.
pub fn dataset_digest(samples: &[SampleDigest]) -> String {
    let mut all = Vec::new();
    for sample in samples {
        // the length in front keeps one name and the next field apart
        let fields = [&sample.name, &sample.image_sha256, &sample.caption_sha256];
        for field in fields.into_iter().chain(&sample.beside_sha256) {
            all.extend((field.len() as u64).to_le_bytes());
            all.extend(field.as_bytes());
        }
    }
    sha256_hex(&all)
}

/// What happened to a dataset between two looks at it, a line for each change, by name; empty if nothing did.
pub fn changes(old: &[SampleDigest], new: &[SampleDigest]) -> Vec<String> {
    let by_name = |samples: &'_ [SampleDigest]| -> BTreeMap<String, SampleDigest> {
        let named = samples
            .iter()
            .map(|sample| (sample.name.clone(), sample.clone()));
        named.collect()
    };
    let (old, new) = (by_name(old), by_name(new));
    let names: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    let mut lines = Vec::new();
    for name in names {
        let shown = shown(Path::new(name));
        match (old.get(name), new.get(name)) {
            (Some(old), Some(new)) => {
                if old.image_sha256 != new.image_sha256 {
                    lines.push(format!("changed image {shown}"));
                }
                if old.caption_sha256 != new.caption_sha256 {
                    lines.push(format!("changed caption of {shown}"));
                }
                if old.beside_sha256 != new.beside_sha256 {
                    lines.push(format!("changed references or mask of {shown}"));
                }
            }
            (None, _) => lines.push(format!("added {shown}")),
            (_, None) => lines.push(format!("removed {shown}")),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::data::scan::scan;
    use crate::data::testing::{folder, jpeg, png, section, webp};

    #[test]
    fn changes_name_every_sample_that_differs() {
        let folder = folder(&[
            ("cat.png", &png()),
            ("cat.txt", b"a cat"),
            ("dog.png", &png()),
            ("dog.txt", b"a dog"),
            ("old.png", &png()),
            ("old.txt", b"old"),
        ]);
        let digests = || {
            let scan = scan(&section(&folder)).expect("a good dataset");
            sample_digests(&scan.samples)
        };
        let write = |name: &str, bytes: &[u8]| {
            fs::write(folder.path().join(name), bytes).expect("write file");
        };
        let before = digests();
        assert_eq!(changes(&before, &digests()), [""; 0]);
        assert_eq!(dataset_digest(&before), dataset_digest(&digests()));
        write("dog.txt", b" a dog\n");
        assert_eq!(changes(&before, &digests()), [""; 0]);

        write("cat.png", &jpeg());
        write("dog.txt", b"two dogs");
        write("new.webp", &webp());
        write("new.txt", b"new");
        fs::remove_file(folder.path().join("old.png")).expect("remove file");
        fs::remove_file(folder.path().join("old.txt")).expect("remove file");
        let after = digests();
        assert_eq!(
            changes(&before, &after),
            [
                "changed image cat.png",
                "changed caption of dog.png",
                "added new.webp",
                "removed old.png"
            ]
        );
        assert_ne!(dataset_digest(&before), dataset_digest(&after));

        let json = serde_json::to_string(&after).expect("plain strings");
        let read: Vec<SampleDigest> = serde_json::from_str(&json).expect("what was written");
        assert_eq!(read, after);
    }

    #[test]
    fn dataset_digest_keeps_fields_apart() {
        let digest = |name: &str, image: &str| {
            dataset_digest(&[SampleDigest {
                name: name.into(),
                image_sha256: image.into(),
                caption_sha256: String::new(),
                beside_sha256: Vec::new(),
            }])
        };
        assert_ne!(digest("ab", "c"), digest("a", "bc"));
    }
}
