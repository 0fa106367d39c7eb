//! Encode once: every image and caption goes through the encoders before training, and never again.
//!
//! An entry's name is a digest of all that decides its content: the image's or caption's bytes, the settings, the encoders'
//! files, the backend, `ENCODING`. So an entry is never stale, and never paired with another sample's caption. An entry also
//! holds a digest of its own tensors: one that was damaged is encoded again.
//!
//! An image is decoded only where an entry is missing, once for both its latents and the mirrored ones, and one at a time.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use burn::tensor::{Device, Tensor, TensorData};
use flux_model::family::{Family, TextEncoders};
use image::{RgbImage, imageops};
use lora_core::files::digest::{Sha256Hex, sha256_hex};
use lora_core::files::host::HostTensor;
use lora_core::files::replace::replace_file;
use lora_core::files::safetensors::{TensorFile, serialize};
use lora_core::random::Stream;

use crate::config::RunConfig;
use crate::data::bucket::{Bucket, buckets, nearest_bucket, resize_and_crop, to_chw_f32};
use crate::data::caption::variants;
use crate::data::file_digests::FileDigests;
use crate::data::image::{ImageLimits, decode_image, read_image};
use crate::data::sample::Sample;
use crate::data::samples::Samples;
use crate::device::NamedDevice;
use crate::progress;

/// Version of the code between a file and an entry: decoding, colours, cropping, resizing, tokens, encoders, what is stored.
/// Raise it with any change after which the same file gives other numbers, so that an upgrade never mixes old entries with new.
const ENCODING: &str = "3";

/// Name of the mask in the entry of a masked image.
const MASK: &str = "mask";

/// The encoded dataset.
#[derive(Debug)]
pub struct Cache {
    folder: PathBuf,
    /// Names of the tensors in an entry of a picture, and of a text; texts of which none is encoded have no entries.
    latents: &'static [&'static str],
    text: &'static [&'static str],
    entries: Vec<Entry>,
    /// How many of them are trained on; the others are held out.
    trained: usize,
    /// The empty caption, for caption dropout.
    unconditional: Option<String>,
    /// Prompts of the previews, by text.
    prompts: BTreeMap<String, String>,
}

/// A sample at one resolution.
#[derive(Debug)]
struct Entry {
    /// Its place among the samples.
    sample: usize,
    /// Each crop of its image.
    crops: Vec<CachedPicture>,
    references: Vec<CachedPicture>,
    /// Of each crop: the image with nothing where it is to be painted, and its mask.
    masked: Option<Vec<CachedPicture>>,
    /// Its caption, or each variant of it, and its entry.
    texts: Vec<(String, String)>,
    repeats: usize,
    loss_weight: f32,
}

/// A picture at the size it is encoded at, and its entries.
#[derive(Debug)]
struct CachedPicture {
    bucket: Bucket,
    latents: String,
    flipped: Option<String>,
}

/// A picture that is to be encoded: how, and as what, plain and mirrored.
struct Missing<'a> {
    source: Source<'a>,
    bucket: Bucket,
    at: Option<[f64; 2]>,
    plain: Option<String>,
    mirrored: Option<String>,
}

impl CachedPicture {
    fn entry(&self, flipped: bool) -> &str {
        match &self.flipped {
            Some(entry) if flipped => entry,
            _ => &self.latents,
        }
    }
}

/// What becomes an entry: a picture, maybe under a mask, and its digest.
#[derive(Clone, Copy)]
struct Source<'a> {
    image: (&'a Path, &'a str),
    mask: Option<(&'a Path, &'a str)>,
}

/// Pictures beside a sample as the autoencoder sees them: the tensors [`Family::LATENTS`] names.
#[derive(Debug, Clone, Default)]
pub struct Beside {
    /// The references.
    pub references: Vec<Vec<HostTensor>>,
    /// The masked image, and behind its tensors the mask in pixels, `[1, 1, height, width]`.
    pub masked: Option<Vec<HostTensor>>,
}

impl Cache {
    /// Encodes what is not in `folder` yet. The backend is part of every entry's identity, since backends differ in rounding.
    ///
    /// # Errors
    /// An image that cannot be decoded, an encoder that cannot be loaded, a full disk.
    pub(crate) fn build<'s, F: Family>(
        folder: &Path,
        samples: &'s Samples,
        config: &RunConfig,
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
        let text = match has_texts::<F>(config) {
            true => F::TEXT,
            false => &[],
        };
        let (seed, config) = (config.train.seed, &config.dataset);
        let folders = config.all_folders();
        let text_key = |text: &str| text_key(text, config.max_sequence_length, &encoders, backend);

        let masked_names = [F::LATENTS, &[MASK]].concat();
        let names = |source: Source| match source.mask {
            Some(_) => masked_names.clone(),
            None => F::LATENTS.to_vec(),
        };
        let mut entries = Vec::new();
        let (mut texts, mut missing) = (BTreeMap::new(), Vec::new());
        for (index, sample) in samples.all.iter().enumerate() {
            // What is held out is seen as it is.
            let is_trained = index < samples.trained;
            let captions = match is_trained {
                true => variants(&sample.caption, config, seed, index),
                false => vec![sample.caption.clone()],
            };
            let places: Vec<Option<[f64; 2]>> = match config.random_crops {
                crops @ 2.. if is_trained => (0..crops as u64)
                    .map(|crop| Stream::new(seed, "crop", index as u64, crop))
                    .map(|mut place| Some([place.uniform(), place.uniform()]))
                    .collect(),
                _ => vec![None],
            };
            for &resolution in config.resolution.as_slice() {
                let all_buckets = buckets(resolution, config.bucket_step);
                let mut picture = |source: Source<'s>, [width_px, height_px]: [u32; 2], at| {
                    let bucket = nearest_bucket(&all_buckets, width_px, height_px);
                    let key =
                        |mirrored| latents_key(source, bucket, at, mirrored, &encoders, backend);
                    let picture = CachedPicture {
                        bucket,
                        latents: key(false),
                        flipped: config.random_flip.then(|| key(true)),
                    };
                    let names = names(source);
                    let is_missing = |key: &&String| read_entry(folder, key, &names).is_none();
                    let plain = Some(&picture.latents).filter(is_missing).cloned();
                    let mirrored = picture.flipped.as_ref().filter(is_missing).cloned();
                    if plain.is_some() || mirrored.is_some() {
                        missing.push(Missing {
                            source,
                            bucket,
                            at,
                            plain,
                            mirrored,
                        });
                    }
                    picture
                };
                let image = (sample.image.as_path(), sample.image_sha256.as_str());
                let size = [sample.width_px, sample.height_px];
                let mut crops = |mask| {
                    let source = Source { image, mask };
                    let crops = places.iter().map(|&at| picture(source, size, at));
                    crops.collect::<Vec<_>>()
                };
                let plain = crops(None);
                let masked = sample.mask.as_ref();
                let masked =
                    masked.map(|mask| crops(Some((mask.path.as_path(), mask.sha256.as_str()))));
                entries.push(Entry {
                    sample: index,
                    crops: plain,
                    references: of_references(sample)
                        .map(|(source, size)| picture(source, size, None))
                        .collect(),
                    masked,
                    texts: (captions.iter())
                        .map(|text| (text.clone(), text_key(text)))
                        .collect(),
                    repeats: folders[sample.folder].repeats,
                    loss_weight: folders[sample.folder].loss_weight as f32,
                });
            }
            texts.extend(captions.into_iter().map(|text| (text_key(&text), text)));
        }
        if !missing.is_empty() {
            let autoencoder = family.autoencoder(device).context("load the autoencoder")?;
            let bar = progress::bar("encode images", missing.len() as u64);
            let mut decoded: Option<(&Path, RgbImage)> = None; // crops of one image follow each other
            for new in missing {
                let (path, sha256) = new.source.image;
                let original = match decoded.take() {
                    Some((of, image)) if of == path => image,
                    _ => load_unchanged(path, sha256)?,
                };
                let mut image = resize_and_crop(&original, new.bucket, new.at);
                decoded = Some((path, original));
                let mask = new.source.mask;
                let mut mask = mask
                    .map(|(path, sha256)| load_unchanged(path, sha256))
                    .transpose()?
                    .map(|mask| resize_and_crop(&mask, new.bucket, new.at));
                for (key, flip) in [(new.plain, false), (new.mirrored, true)] {
                    let Some(key) = key else { continue };
                    if flip {
                        imageops::flip_horizontal_in_place(&mut image);
                        mask.as_mut().map(imageops::flip_horizontal_in_place);
                    }
                    let parts = encode::<F>(&autoencoder, &image, mask.as_ref(), device);
                    write_entry(folder, &key, &names(new.source), parts)?;
                }
                bar.inc(1);
            }
            bar.finish_and_clear();
        }

        let unconditional = (config.caption_dropout > 0.0).then(String::new);
        for text in prompts.iter().chain(&unconditional) {
            texts.insert(text_key(text), text.clone());
        }
        texts.retain(|key, _| !text.is_empty() && read_entry(folder, key, text).is_none());
        if !texts.is_empty() {
            let encoders = family
                .text_encoders(device)
                .context("load the text encoders")?;
            let bar = progress::bar("encode captions", texts.len() as u64);
            let texts: Vec<_> = texts.into_iter().collect();
            for together in texts.chunks(F::TextEncoders::AT_ONCE) {
                let prompts: Vec<&str> = together.iter().map(|(_, text)| text.as_str()).collect();
                let parts = encoders.encode(&prompts, config.max_sequence_length, device)?;
                for ((key, _), parts) in together.iter().zip(parts) {
                    write_entry(folder, key, text, parts)?;
                    bar.inc(1);
                }
            }
            bar.finish_and_clear();
        }
        let prompts = prompts
            .iter()
            .map(|prompt| (prompt.clone(), text_key(prompt)))
            .collect();
        Ok(Self {
            folder: folder.into(),
            latents: F::LATENTS,
            text,
            entries,
            trained: samples.trained * config.resolution.as_slice().len(),
            unconditional: unconditional.map(|text| text_key(&text)),
            prompts,
        })
    }

    /// Number of entries, each a sample at one resolution: those that are trained on, then those that are held out.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// True if there is no entry.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// How many entries are trained on.
    pub fn trained(&self) -> usize {
        self.trained
    }

    /// The sample of an entry, by its place.
    pub fn sample(&self, entry: usize) -> usize {
        self.entries[entry].sample
    }

    /// Size an entry is trained at.
    pub fn bucket(&self, entry: usize) -> Bucket {
        self.entries[entry].crops[0].bucket
    }

    /// Sizes of its references.
    pub fn reference_buckets(&self, entry: usize) -> Vec<Bucket> {
        let references = self.entries[entry].references.iter();
        references.map(|reference| reference.bucket).collect()
    }

    /// Times that an entry is seen in an epoch.
    pub fn repeats(&self, entry: usize) -> usize {
        self.entries[entry].repeats
    }

    /// Factor on the loss of an entry.
    pub fn loss_weight(&self, entry: usize) -> f32 {
        self.entries[entry].loss_weight
    }

    /// How many crops of an entry there are, and how many texts.
    pub fn variants(&self, entry: usize) -> (usize, usize) {
        let entry = &self.entries[entry];
        (entry.crops.len(), entry.texts.len())
    }

    /// What the autoencoder said about the pictures beside a crop of an entry, mirrored as it is.
    ///
    /// # Errors
    /// As [`latents`](Self::latents).
    pub fn beside(&self, entry: usize, crop: usize, flipped: bool) -> anyhow::Result<Beside> {
        let entry = &self.entries[entry];
        let references = entry.references.iter();
        let masked_names = [self.latents, &[MASK]].concat();
        let masked = entry.masked.as_ref().map(|crops| &crops[crop]);
        Ok(Beside {
            references: references
                .map(|reference| self.entry(reference.entry(flipped), self.latents))
                .collect::<Result<_, _>>()?,
            masked: masked
                .map(|masked| self.entry(masked.entry(flipped), &masked_names))
                .transpose()?,
        })
    }

    /// What the autoencoder said about a crop of an entry, mirrored if asked for: the tensors [`Family::LATENTS`] names.
    ///
    /// # Errors
    /// An entry that has vanished or was damaged since the run started.
    pub fn latents(
        &self,
        entry: usize,
        crop: usize,
        flipped: bool,
    ) -> anyhow::Result<Vec<HostTensor>> {
        let key = self.entries[entry].crops[crop].entry(flipped);
        self.entry(key, self.latents)
    }

    /// A text of an entry, or the empty one for `None`.
    pub fn caption(&self, entry: usize, variant: Option<usize>) -> &str {
        variant.map_or("", |variant| &self.entries[entry].texts[variant].0)
    }

    /// What the text encoders said about a text of an entry, or about the empty one for `None`: the tensors [`Family::TEXT`]
    /// names, or nothing where every encoder is trained.
    ///
    /// # Errors
    /// As [`latents`](Self::latents), or an empty text that no caption was to be dropped for.
    pub fn text(&self, entry: usize, variant: Option<usize>) -> anyhow::Result<Vec<HostTensor>> {
        let key = match variant {
            Some(variant) => &self.entries[entry].texts[variant].1,
            None => (self.unconditional.as_ref()).context("no caption is dropped in this run")?,
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
        if names.is_empty() {
            return Ok(Vec::new());
        }
        let path = entry_path(&self.folder, key);
        read_entry(&self.folder, key, names).with_context(|| {
            format!("cache entry {} was removed or damaged while the run was going: start it again with --resume", path.display())
        })
    }
}

/// Whether texts are encoded for a cache: not where every encoder is trained, and reads them otherwise in every step.
pub(crate) fn has_texts<F: Family>(config: &RunConfig) -> bool {
    let trained = config.lora.text_encoders();
    let mut encoders = F::TRAINABLE_TEXT.iter();
    F::TRAINABLE_TEXT.is_empty() || encoders.any(|encoder| !trained.contains(encoder))
}

/// The references of a sample, and their sizes.
fn of_references(sample: &Sample) -> impl Iterator<Item = (Source<'_>, [u32; 2])> {
    sample.references.iter().map(|picture| {
        let source = Source {
            image: (&picture.path, &picture.sha256),
            mask: None,
        };
        (source, [picture.width_px, picture.height_px])
    })
}

/// The pixels of an image that is still what it was when the dataset was read: its entry is named by what it was then.
///
/// That is why what is to be encoded is read and hashed a second time. The bytes of the first reading are not kept, for
/// thousands of photographs do not fit into memory, and without the second digest an image that somebody saved in between would
/// be kept under the name of another, in every run that has this cache.
fn load_unchanged(path: &Path, sha256: &str) -> anyhow::Result<RgbImage> {
    let limits = ImageLimits::default();
    let bytes = read_image(path, &limits)?;
    ensure!(
        sha256_hex(&bytes) == sha256,
        "image `{}` was changed while the run started: start it again",
        path.display()
    );
    Ok(decode_image(path, &bytes, &limits)?)
}

/// An image as the tensors [`Family::LATENTS`] names. With a mask of its size, of the image with 0 where the mask is white, and
/// the mask behind them.
pub fn encode<F: Family>(
    autoencoder: &F::Autoencoder,
    image: &RgbImage,
    mask: Option<&RgbImage>,
    device: &Device,
) -> Vec<HostTensor> {
    let (width, height) = (image.width() as usize, image.height() as usize);
    let mut values = to_chw_f32(image);
    let mask: Option<Vec<f32>> = mask.map(|mask| {
        let luma = imageops::grayscale(mask);
        luma.iter().map(|&byte| f32::from(byte >= 128)).collect()
    });
    if let Some(mask) = &mask {
        for (value, mask) in values.iter_mut().zip(mask.iter().cycle()) {
            *value *= 1.0 - mask;
        }
    }
    let image = Tensor::from_data(TensorData::new(values, [1, 3, height, width]), device);
    let mut parts = F::encode_image(autoencoder, image);
    parts.extend(mask.map(|mask| HostTensor::from_f32([1, 1, height, width], &mask)));
    parts
}

fn latents_key(
    source: Source<'_>,
    bucket: Bucket,
    at: Option<[f64; 2]>,
    mirrored: bool,
    encoders: &str,
    backend: &str,
) -> String {
    let size = bucket.to_string();
    let mirrored = if mirrored { "mirrored" } else { "" };
    let at = at.map(|at| format!("{at:?}"));
    let (_, image) = source.image;
    let (kind, mask) = match source.mask {
        None => ("latents", None),
        Some((_, mask)) => ("masked", Some(mask)),
    };
    let mut parts = vec![image];
    parts.extend(mask);
    parts.extend([size.as_str(), mirrored, encoders, backend]);
    parts.extend(at.as_deref());
    entry_key(kind, &parts)
}

fn text_key(text: &str, max_sequence_length: usize, encoders: &str, backend: &str) -> String {
    let length = max_sequence_length.to_string();
    entry_key("text", &[text, &length, encoders, backend])
}

/// `<kind>-<digest of all parts>`; the lengths keep the parts apart.
fn entry_key(kind: &str, parts: &[&str]) -> String {
    let mut digest = Sha256Hex::default();
    for part in [&[ENCODING], parts].concat() {
        digest.update((part.len() as u64).to_le_bytes());
        digest.update(part);
    }
    format!("{kind}-{}", &digest.finish()[..40])
}

fn entry_path(folder: &Path, key: &str) -> PathBuf {
    folder.join(format!("{key}.safetensors"))
}

const CONTENT_DIGEST: &str = "content_sha256";

fn content_digest<'a>(tensors: impl Iterator<Item = &'a HostTensor>) -> String {
    let mut digest = Sha256Hex::default();
    for tensor in tensors {
        digest.update(format!("{:?}", tensor.shape));
        digest.update(&tensor.bytes);
    }
    digest.finish()
}

/// Removes what a killed process left half-written; only one process at a time writes here, by the run's lock.
fn remove_unfinished(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().contains(".tmp-")
            && let Err(error) = fs::remove_file(entry.path())
        {
            tracing::warn!(%error, path = %entry.path().display(), "cannot be removed");
        }
    }
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
    replace_file(&path, |out| out.write_all(&serialize(&tensors, &metadata)))
        .with_context(|| format!("write cache entry {}", path.display()))
}
