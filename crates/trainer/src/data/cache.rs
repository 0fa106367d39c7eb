//! Encode once: every image and caption goes through the encoders before training, and never again.
//!
//! An entry's name is a digest of all that decides its content: the image's or caption's bytes, the settings, the encoders'
//! files, the backend. So an entry is never stale, and never paired with another sample's caption. An entry also holds a
//! digest of its own tensors: one that was damaged is encoded again.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use anyhow::{Context, bail};
use burn::tensor::{Tensor, TensorData};
use flux_model::family::{Family, TextEncoders};
use image::imageops;
use lora_core::files::host::HostTensor;
use lora_core::files::safetensors::{TensorFile, serialize};
use lora_core::files::strict_json::{parse_json, read_file};
use sha2::{Digest, Sha256};

use crate::config::DatasetSection;
use crate::data::bucket::{Bucket, buckets, nearest_bucket, resize_and_crop, to_chw_f32};
use crate::data::image::{ImageLimits, decode_image, read_image};
use crate::data::scan::Sample;
use crate::device::NamedDevice;
use crate::fingerprint::hex;
use crate::progress;

/// The encoded dataset.
#[derive(Debug)]
pub struct Cache {
    folder: PathBuf,
    /// Names of the tensors in an entry of a picture, and of a text.
    latents: &'static [&'static str],
    text: &'static [&'static str],
    samples: Vec<CachedSample>,
    /// The empty caption, for caption dropout.
    unconditional: Option<String>,
    /// Prompts of the previews, by text.
    prompts: BTreeMap<String, String>,
}

#[derive(Debug)]
struct CachedSample {
    bucket: Bucket,
    latents: String,
    flipped: Option<String>,
    text: String,
}

impl Cache {
    /// Encodes what is not in `folder` yet. The backend is part of every entry's identity, since backends differ in rounding.
    ///
    /// # Errors
    /// An image that cannot be decoded, an encoder that cannot be loaded, a full disk.
    pub fn build<F: Family>(
        folder: &Path,
        samples: &[Sample],
        config: &DatasetSection,
        prompts: &[String],
        family: &F,
        device: &NamedDevice,
    ) -> anyhow::Result<Self> {
        let (backend, device) = (device.backend(), &device.device);
        fs::create_dir_all(folder)
            .with_context(|| format!("create cache folder {}", folder.display()))?;
        remove_unfinished(folder);
        let mut digests = FileDigests::load(folder);
        let encoders = digests.of_all(&family.encoder_paths())?;
        digests.save()?;
        let limits = ImageLimits::default();
        let all_buckets = buckets(config.resolution, config.bucket_step);

        let mut cached = Vec::with_capacity(samples.len());
        let mut wanted_images = Vec::new();
        for sample in samples {
            let bytes = read_image(&sample.image, &limits)?;
            let image = decode_image(&sample.image, &bytes, &limits)?;
            let bucket = nearest_bucket(&all_buckets, image.width(), image.height());
            let key = |flip: bool| {
                let size = format!("{}x{}", bucket.width_px, bucket.height_px);
                entry_key(
                    "latents",
                    &[
                        &bytes,
                        size.as_bytes(),
                        &[u8::from(flip)],
                        encoders.as_bytes(),
                        backend.as_bytes(),
                    ],
                )
            };
            let entry = CachedSample {
                bucket,
                latents: key(false),
                flipped: config.random_flip.then(|| key(true)),
                text: text_key(
                    &sample.caption,
                    config.max_sequence_length,
                    &encoders,
                    backend,
                ),
            };
            for (key, flip) in [
                (Some(&entry.latents), false),
                (entry.flipped.as_ref(), true),
            ]
            .into_iter()
            .filter_map(|(k, f)| Some((k?, f)))
            {
                if read_entry(folder, key, F::LATENTS).is_none() {
                    wanted_images.push((key.clone(), sample, bucket, flip));
                }
            }
            cached.push(entry);
        }
        if !wanted_images.is_empty() {
            let autoencoder = family.autoencoder(device).context("load the autoencoder")?;
            let bar = progress::bar("encode images", wanted_images.len() as u64);
            for (key, sample, bucket, flip) in wanted_images {
                let image =
                    decode_image(&sample.image, &read_image(&sample.image, &limits)?, &limits)?;
                let mut image = resize_and_crop(&image, bucket);
                if flip {
                    imageops::flip_horizontal_in_place(&mut image);
                }
                let shape = [1, 3, bucket.height_px as usize, bucket.width_px as usize];
                let pixels = TensorData::new(to_chw_f32(&image), shape);
                let latents = F::encode_image(&autoencoder, Tensor::from_data(pixels, device));
                write_entry(folder, &key, F::LATENTS, latents)?;
                bar.inc(1);
            }
            bar.finish_and_clear();
        }

        let mut texts: BTreeMap<String, &str> = BTreeMap::new();
        let empty = String::new();
        let captions = samples.iter().map(|sample| &sample.caption).chain(prompts);
        for text in captions.chain((config.caption_dropout > 0.0).then_some(&empty)) {
            texts.insert(
                text_key(text, config.max_sequence_length, &encoders, backend),
                text,
            );
        }
        texts.retain(|key, _| read_entry(folder, key, F::TEXT).is_none());
        if !texts.is_empty() {
            let encoders = family
                .text_encoders(device)
                .context("load the text encoders")?;
            let bar = progress::bar("encode captions", texts.len() as u64);
            let texts: Vec<_> = texts.into_iter().collect();
            for together in texts.chunks(F::TextEncoders::AT_ONCE) {
                let prompts: Vec<&str> = together.iter().map(|(_, text)| *text).collect();
                let parts = encoders.encode(&prompts, config.max_sequence_length, device)?;
                for ((key, _), parts) in together.iter().zip(parts) {
                    write_entry(folder, key, F::TEXT, parts)?;
                    bar.inc(1);
                }
            }
            bar.finish_and_clear();
        }
        let key_of = |text: &str| text_key(text, config.max_sequence_length, &encoders, backend);
        let unconditional = (config.caption_dropout > 0.0).then(|| key_of(""));
        let prompts = prompts
            .iter()
            .map(|prompt| (prompt.clone(), key_of(prompt)))
            .collect();
        Ok(Self {
            folder: folder.into(),
            latents: F::LATENTS,
            text: F::TEXT,
            samples: cached,
            unconditional,
            prompts,
        })
    }

    /// Number of samples.
    pub fn len(&self) -> usize {
        self.samples.len()
    }

    /// True if there is no sample.
    pub fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }

    /// Size each sample is trained at.
    pub fn bucket(&self, sample: usize) -> Bucket {
        self.samples[sample].bucket
    }

    /// What the autoencoder said about a sample, mirrored if asked for: the tensors [`Family::LATENTS`] names.
    ///
    /// # Errors
    /// An entry that has vanished or was damaged since the run started.
    pub fn latents(&self, sample: usize, flipped: bool) -> anyhow::Result<Vec<HostTensor>> {
        let entry = &self.samples[sample];
        let key = if flipped {
            entry.flipped.as_ref().unwrap_or(&entry.latents)
        } else {
            &entry.latents
        };
        self.entry(key, self.latents)
    }

    /// What the text encoders said about the caption of a sample, or about the empty one: the tensors [`Family::TEXT`]
    /// names.
    ///
    /// # Errors
    /// As [`latents`](Self::latents).
    pub fn text(&self, sample: usize, unconditional: bool) -> anyhow::Result<Vec<HostTensor>> {
        let own = &self.samples[sample].text;
        let key = if unconditional {
            self.unconditional.as_ref().unwrap_or(own)
        } else {
            own
        };
        self.entry(key, self.text)
    }

    /// A prompt that was named when the cache was built.
    ///
    /// # Errors
    /// As [`latents`](Self::latents), or another prompt.
    pub fn prompt(&self, prompt: &str) -> anyhow::Result<Vec<HostTensor>> {
        let key = self
            .prompts
            .get(prompt)
            .with_context(|| format!("prompt `{prompt}` is not in the cache"))?;
        self.entry(key, self.text)
    }

    fn entry(&self, key: &str, names: &[&str]) -> anyhow::Result<Vec<HostTensor>> {
        let path = entry_path(&self.folder, key);
        read_entry(&self.folder, key, names).with_context(|| {
            format!("cache entry {} was removed or damaged while the run was going: start it again with --resume", path.display())
        })
    }
}

fn text_key(text: &str, max_sequence_length: usize, encoders: &str, backend: &str) -> String {
    let length = max_sequence_length.to_string();
    entry_key(
        "text",
        &[
            text.as_bytes(),
            length.as_bytes(),
            encoders.as_bytes(),
            backend.as_bytes(),
        ],
    )
}

/// `<kind>-<digest of all parts>`; the lengths keep the parts apart.
fn entry_key(kind: &str, parts: &[&[u8]]) -> String {
    let mut digest = Sha256::new();
    for part in parts {
        digest.update((part.len() as u64).to_le_bytes());
        digest.update(part);
    }
    format!("{kind}-{}", &hex(&digest.finalize())[..40])
}

fn entry_path(folder: &Path, key: &str) -> PathBuf {
    folder.join(format!("{key}.safetensors"))
}

const CONTENT_DIGEST: &str = "content_sha256";

fn content_digest<'a>(tensors: impl Iterator<Item = &'a HostTensor>) -> String {
    let mut digest = Sha256::new();
    for tensor in tensors {
        digest.update(format!("{:?}", tensor.shape));
        digest.update(&tensor.bytes);
    }
    hex(&digest.finalize())
}

/// Start of the names under which files are written before they get their own.
const UNFINISHED: &str = ".unfinished-";

/// Removes what a killed process left half-written; only one process at a time writes here, by the run's lock.
fn remove_unfinished(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(UNFINISHED)
            && let Err(error) = fs::remove_file(entry.path())
        {
            tracing::warn!(%error, path = %entry.path().display(), "cannot be removed");
        }
    }
}

/// A file to be written in `folder` and then renamed.
fn unfinished(folder: &Path) -> std::io::Result<tempfile::NamedTempFile> {
    tempfile::Builder::new()
        .prefix(UNFINISHED)
        .tempfile_in(folder)
}

/// An entry that is there and whole.
fn read_entry(folder: &Path, key: &str, names: &[&str]) -> Option<Vec<HostTensor>> {
    let file = TensorFile::open(&entry_path(folder, key)).ok()?;
    let tensors: Vec<HostTensor> = names
        .iter()
        .map(|name| file.read(name).ok())
        .collect::<Option<_>>()?;
    let stored = file.metadata().get(CONTENT_DIGEST)?;
    (*stored == content_digest(tensors.iter())).then_some(tensors)
}

/// Written beside and renamed, so that a stopped write leaves nothing that looks like an entry.
fn write_entry(
    folder: &Path,
    key: &str,
    names: &[&str],
    tensors: Vec<HostTensor>,
) -> anyhow::Result<()> {
    for (name, tensor) in names.iter().zip(&tensors) {
        if let Some(index) = tensor.first_non_finite() {
            bail!(
                "the encoder gave a value that is not finite ({name}, element {index}) for cache entry {key}"
            );
        }
    }
    let metadata = BTreeMap::from([(CONTENT_DIGEST.to_string(), content_digest(tensors.iter()))]);
    let tensors = names
        .iter()
        .map(|name| name.to_string())
        .zip(tensors)
        .collect();
    let path = entry_path(folder, key);
    let write = || -> std::io::Result<()> {
        let mut file = unfinished(folder)?;
        file.write_all(&serialize(&tensors, &metadata))?;
        file.persist(&path)?;
        Ok(())
    };
    write().with_context(|| format!("write cache entry {}", path.display()))
}

/// Largest file of remembered digests read, in bytes: some hundred thousand of them.
const MAX_DIGESTS: u64 = 64 << 20;

/// SHA-256 of large files, remembered by path, size and time of change so that a start does not read them all again.
#[derive(Debug)]
pub struct FileDigests {
    path: PathBuf,
    known: BTreeMap<String, String>,
}

impl FileDigests {
    /// The digests remembered in `folder`; none if there are none or they cannot be read.
    pub fn load(folder: &Path) -> Self {
        let path = folder.join("digests.json");
        let known = read_file(&path, MAX_DIGESTS)
            .ok()
            .and_then(|bytes| parse_json(&bytes).ok())
            .unwrap_or_default();
        Self { path, known }
    }

    /// One digest for all files in or at `paths`: their names and contents.
    ///
    /// # Errors
    /// A path that cannot be read.
    pub fn of_all(&mut self, paths: &[PathBuf]) -> anyhow::Result<String> {
        let mut all = Sha256::new();
        for path in paths {
            let mut files = Vec::new();
            list_files(path, &mut files).with_context(|| format!("read {}", path.display()))?;
            files.sort();
            for file in files {
                let name = file
                    .file_name()
                    .map(|name| name.to_string_lossy().into_owned())
                    .unwrap_or_default();
                all.update(name.as_bytes());
                all.update(
                    self.of(&file)
                        .with_context(|| format!("read {}", file.display()))?,
                );
            }
        }
        Ok(hex(&all.finalize()))
    }

    fn of(&mut self, file: &Path) -> std::io::Result<String> {
        let metadata = fs::metadata(file)?;
        let changed = metadata
            .modified()?
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let identity = format!(
            "{} {} {}",
            fs::canonicalize(file)?.display(),
            metadata.len(),
            changed.as_nanos()
        );
        if let Some(known) = self.known.get(&identity) {
            return Ok(known.clone());
        }
        let mut digest = Sha256::new();
        let mut reader = fs::File::open(file)?;
        let mut buffer = vec![0; 1 << 20];
        loop {
            let n = reader.read(&mut buffer)?;
            if n == 0 {
                break;
            }
            digest.update(&buffer[..n]);
        }
        let digest = hex(&digest.finalize());
        self.known.insert(identity, digest.clone());
        Ok(digest)
    }

    /// Remembers the digests for the next start.
    ///
    /// # Errors
    /// A full disk.
    pub fn save(&self) -> anyhow::Result<()> {
        let folder = self.path.parent().unwrap_or(Path::new("."));
        let write = || -> std::io::Result<()> {
            let mut file = unfinished(folder)?;
            file.write_all(&serde_json::to_vec_pretty(&self.known)?)?;
            file.persist(&self.path)?;
            Ok(())
        };
        write().with_context(|| format!("write {}", self.path.display()))
    }
}

fn list_files(path: &Path, files: &mut Vec<PathBuf>) -> std::io::Result<()> {
    if path.is_dir() {
        for entry in fs::read_dir(path)? {
            list_files(&entry?.path(), files)?;
        }
    } else {
        fs::metadata(path)?;
        files.push(path.into());
    }
    Ok(())
}
