//! What is fuzzed: one function for each kind of foreign file, run by `cargo fuzz` and, on the committed corpus, by
//! `cargo test`.
//!
//! An input goes through the function a user's file goes through. It may be refused or accepted; it may not panic, hang or
//! take memory that its size does not justify, and what is accepted must keep what acceptance promises.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use flux_lora::config::{DatasetSection, RunConfig};
use flux_lora::data::image::{ImageLimits, decode_image, inspect};
use flux_lora::data::metadata;
use flux_lora::data::scan::scan;
use flux_lora::run::checkpoint::Opened;
use flux_lora::run::folder::RunDir;
use flux_lora::run::manifest::{FORMAT_VERSION, FileEntry, MANIFEST, Manifest, Verified, verify};
use flux_lora::run::metrics::truncate_metrics;
use flux_lora::run::vfs::RealFs;
use flux_model::families;
use flux_model::family::Family;
use flux_model::flux1::Flux1;
use flux_model::lora::{LoraFormat, ModelShape, WriteOptions, read, write};
use flux_model::pipeline::PipelineFolder;
use flux_model::text::tokenizer::{ClipTokenizer, T5Tokenizer};
use flux_model::weights::Checkpoint;
use lora_core::AdapterFile;
use lora_core::files::digest::sha256_hex;
use lora_core::files::host::{Dtype, HostTensor};
use lora_core::files::safetensors::{TensorFile, TensorSet, serialize, write_streaming};

/// A function that is given a folder for its files and an input.
pub type Target = fn(&Path, &[u8]);

/// Every target, by the name of its corpus folder.
pub const TARGETS: [(&str, Target); 12] = [
    ("tensor_file", tensor_file),
    ("shard_index", shard_index),
    ("checkpoint_keys", checkpoint_keys),
    ("lora_keys", lora_keys),
    ("adapter_config", adapter_config),
    ("manifest", manifest),
    ("state", state),
    ("run_config", run_config),
    ("captions", captions),
    ("image", image),
    ("tokenizer", tokenizer),
    ("model_config", model_config),
];

/// The rest of an input after a first byte that chooses what it is.
fn choose(data: &[u8]) -> (u8, &[u8]) {
    data.split_first()
        .map_or((0, data), |(first, rest)| (*first, rest))
}

fn put(path: &Path, bytes: &[u8]) {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).expect("a writable folder");
    }
    fs::write(path, bytes).expect("a writable folder");
}

/// As [`put`], once.
fn put_once(path: &Path, bytes: &[u8]) {
    if !path.exists() {
        put(path, bytes);
    }
}

/// A safetensors file: as it is, or a header to which the length is put, so that most inputs get beyond it.
fn tensor_file(_: &Path, data: &[u8]) {
    let (kind, rest) = choose(data);
    let bytes = match kind % 4 {
        0 => rest.to_vec(),
        data_len => {
            let length = (rest.len() as u64).to_le_bytes();
            [&length, rest, &[0; 16][..4 * usize::from(data_len)]].concat()
        }
    };
    let len = bytes.len();
    let Ok(file) = TensorFile::from_bytes("x.safetensors".as_ref(), bytes) else {
        return;
    };
    let mut read = 0;
    for name in file.names() {
        let tensor = file.read(name).expect("data that was checked");
        assert_eq!(tensor.bytes.len(), tensor.numel() * tensor.dtype.size());
        read += tensor.bytes.len();
        if let Some(&rows) = tensor.shape.first() {
            let half = file
                .read_rows(name, 0..rows / 2)
                .expect("rows that are there");
            assert_eq!(half.bytes, tensor.bytes[..half.bytes.len()]);
        }
    }
    assert!(read < len, "every byte belongs to one tensor at most");
}

/// A shard index beside two shards.
fn shard_index(folder: &Path, data: &[u8]) {
    for name in ["a", "b"] {
        let tensor = HostTensor::from_f32([2], &[0.0, 1.0]);
        let tensors = BTreeMap::from([(name.to_string(), tensor)]);
        let shard = folder.join(format!("{name}.safetensors"));
        put_once(&shard, &serialize(&tensors, &BTreeMap::new()));
    }
    let index = folder.join("x.safetensors.index.json");
    put(&index, data);
    if let Ok(set) = TensorSet::open(&index) {
        for name in set.names() {
            set.read(name).expect("a tensor of a shard");
        }
        for file in set.files() {
            assert_eq!(file.path().parent(), Some(folder));
        }
    }
}

/// A safetensors file of the named tensors, one a line: `transformer_blocks.0.attn.to_q.lora_A.weight 4x8`. A line
/// `@key value` is metadata. The first letter of a shape may be a dtype: `b` for BF16, `i` for I64.
fn tensors_of_lines(data: &[u8]) -> Option<Vec<u8>> {
    let text = std::str::from_utf8(data).ok()?;
    let (mut layout, mut metadata) = (Vec::new(), BTreeMap::new());
    for line in text.lines().take(64) {
        if let Some((key, value)) = line.strip_prefix('@').and_then(|line| line.split_once(' ')) {
            metadata.insert(key.to_string(), value.to_string());
            continue;
        }
        let (name, shape) = line.rsplit_once(' ')?;
        let (dtype, shape) = match shape.split_at_checked(1) {
            Some(("b", shape)) => (Dtype::Bf16, shape),
            Some(("i", shape)) => (Dtype::I64, shape),
            _ => (Dtype::F32, shape),
        };
        let axes = shape.split('x').filter(|axis| !axis.is_empty());
        let shape: Vec<usize> = axes.map(str::parse).collect::<Result<_, _>>().ok()?;
        let elements = shape
            .iter()
            .try_fold(1usize, |n, axis| n.checked_mul(*axis));
        if elements.is_none_or(|elements| elements > 4096) {
            return None;
        }
        layout.push((name.to_string(), dtype, shape));
    }
    let mut bytes = Vec::new();
    let mut rows = layout.clone().into_iter();
    write_streaming(&mut bytes, &layout, &metadata, |_| {
        let row = rows.next().ok_or(std::io::ErrorKind::UnexpectedEof)?;
        let (_, dtype, shape) = row;
        let bytes = vec![1; shape.iter().product::<usize>() * dtype.size()];
        Ok::<_, std::io::Error>(HostTensor {
            dtype,
            shape,
            bytes,
        })
    })
    .ok()?;
    Some(bytes)
}

/// Names and shapes of a base model.
fn checkpoint_keys(folder: &Path, data: &[u8]) {
    let Some(bytes) = tensors_of_lines(data) else {
        return;
    };
    let path = folder.join("x.safetensors");
    put(&path, &bytes);
    let checkpoint = Checkpoint::open(&path).expect("a sound file");
    if let Ok((_, config)) = checkpoint.transformer(None) {
        assert_eq!(config.problem(), None);
    }
    if let Ok((_, config)) = checkpoint.autoencoder(None) {
        assert_eq!(config.problem(), None);
    }
}

/// Names and shapes of a LoRA file; what is read is written in every format and read again.
fn lora_keys(folder: &Path, data: &[u8]) {
    let Some(bytes) = tensors_of_lines(data) else {
        return;
    };
    let path = folder.join("x.safetensors");
    put(&path, &bytes);
    let _ = AdapterFile::from_bytes(&path, bytes, "transformer.");
    let Ok(set) = read(&path, &ModelShape::default()) else {
        return;
    };
    if set.validate().is_err() {
        return;
    }
    for format in LoraFormat::ALL {
        let out = folder.join(format.name());
        let options = WriteOptions::default();
        if write(&set, format, &out, &options).is_ok() {
            let again = read(&out, &ModelShape::default()).expect("what was written");
            again.validate().expect("what was written");
        }
    }
}

/// `adapter_config.json` of a PEFT folder, the same in the header of a diffusers file, or our own entry of a header, which says
/// where to cut factors that were split off the base weight.
fn adapter_config(folder: &Path, data: &[u8]) {
    let (kind, text) = choose(data);
    let module = "transformer_blocks.0.attn.to_q";
    let file = |prefix: &str, metadata: &BTreeMap<String, String>| {
        let tensor = |shape: [usize; 2]| HostTensor::from_f32(shape, &[0.5; 8]);
        let tensors = BTreeMap::from([
            (format!("{prefix}{module}.lora_A.weight"), tensor([2, 4])),
            (format!("{prefix}{module}.lora_B.weight"), tensor([4, 2])),
        ]);
        serialize(&tensors, metadata)
    };
    if kind % 2 == 0 {
        let weights = folder.join("adapter_model.safetensors");
        put_once(&weights, &file("base_model.model.", &BTreeMap::new()));
        put(&folder.join("adapter_config.json"), text);
        if let Ok(set) = read(folder, &ModelShape::default()) {
            assert_eq!(set.len(), 1);
        }
    } else if let Ok(text) = std::str::from_utf8(text) {
        let key = match kind % 4 {
            1 => lora_core::peft::METADATA_KEY,
            _ => "lora_core_split_adapter",
        };
        let metadata = BTreeMap::from([(key.to_string(), text.to_string())]);
        let bytes = file("transformer.", &metadata);
        let path = folder.join("x.safetensors");
        put(&path, &bytes);
        let _ = read(&path, &ModelShape::default());
        let _ = AdapterFile::from_bytes(&path, bytes, "transformer.");
    }
}

/// `MANIFEST.json`, as it is or with the hash that belongs to it; `LATEST`; the metrics log.
fn manifest(folder: &Path, data: &[u8]) {
    let (kind, rest) = choose(data);
    let run = RunDir::open(folder).expect("a folder");
    let checkpoint = folder.join("ckpt-0000000001");
    put_once(&checkpoint.join("state.json"), b"{}");
    match kind % 4 {
        0 => put(&checkpoint.join(MANIFEST), rest),
        1 => {
            let seal = format!(",\n  \"sha256\": \"{}\"\n}}\n", sha256_hex(rest));
            put(
                &checkpoint.join(MANIFEST),
                &[rest, seal.as_bytes()].concat(),
            );
        }
        2 => put(&folder.join("LATEST"), rest),
        _ => {
            let path = run.metrics_path();
            put(&path, rest);
            let before = truncate_metrics(&RealFs, &path, Some(3));
            if let Ok(before) = before {
                let after = truncate_metrics(&RealFs, &path, Some(3)).expect("what was written");
                assert_eq!((after.kept, after.dropped), (before.kept, 0));
            }
            return;
        }
    }
    if let Ok(verified) = verify(&checkpoint) {
        assert_eq!(verified.manifest.step, 1);
        let names = verified.manifest.files.iter().map(|file| &file.name);
        assert_eq!(names.collect::<Vec<_>>(), ["state.json"]);
    }
    let _ = run.latest();
    let _ = run.newest_valid();
}

/// `state.json` of a verified checkpoint.
fn state(folder: &Path, data: &[u8]) {
    let module = "transformer.transformer_blocks.0.attn.to_q";
    let tensor = |shape: [usize; 2]| HostTensor::from_f32(shape, &[0.5; 8]);
    let lora = BTreeMap::from([
        (format!("{module}.lora_A.weight"), tensor([2, 4])),
        (format!("{module}.lora_B.weight"), tensor([4, 2])),
    ]);
    let file = |tensors: &BTreeMap<String, HostTensor>| serialize(tensors, &BTreeMap::new());
    let dir = folder.join("ckpt-0000000001");
    let files = [
        ("lora.safetensors", file(&lora)),
        ("optimizer.safetensors", file(&BTreeMap::new())),
        ("state.json", data.to_vec()),
    ];
    let entries = files.map(|(name, bytes)| {
        put(&dir.join(name), &bytes);
        FileEntry {
            name: name.to_string(),
            length: bytes.len() as u64,
            sha256: sha256_hex(&bytes),
        }
    });
    let verified = Verified {
        dir,
        manifest: Manifest {
            format_version: FORMAT_VERSION,
            step: 1,
            files: entries.to_vec(),
            config_digest: String::new(),
            dataset_digest: String::new(),
            fingerprint: serde_json::Value::Null,
        },
        manifest_sha256: String::new(),
    };
    if let Ok(opened) = Opened::read(verified) {
        assert_eq!(opened.state.progress.step, 1);
        opened
            .config
            .validate()
            .expect("a configuration that was checked");
        let _ = opened.record();
    }
}

/// A run configuration; one that is accepted reads back from what it is written as.
fn run_config(_: &Path, data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let file = Path::new("run.toml");
    if let Ok(config) = RunConfig::from_toml(text, file, &[]) {
        let written = config.to_toml().expect("a configuration as TOML");
        let again = RunConfig::from_toml(&written, file, &[]).expect("what was written");
        assert_eq!(again, config);
    }
    // the same text as `--set`
    let minimal = "[model]\npath = \"m\"\n[dataset]\npath = \"d\"\n";
    let _ = RunConfig::from_toml(minimal, file, &[text.to_string()]);
}

/// A caption beside its image, or `metadata.jsonl` or `metadata.csv` in a folder of three.
fn captions(folder: &Path, data: &[u8]) {
    /// A PNG of one grey pixel.
    const PICTURE: &[u8] = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x01\0\0\0\x01\x08\0\0\0\0:~\x9bU\0\0\0\nIDATx\x9cch\0\0\0\x82\0\x81w\xcdr\xb6\0\0\0\0IEND\xaeB`\x82";
    let (kind, rest) = choose(data);
    let (form, list) = match kind % 3 {
        0 => ("pairs", "a.txt"),
        1 => ("lines", metadata::METADATA_FILE),
        _ => ("table", metadata::METADATA_CSV),
    };
    let folder = folder.join(form);
    put_once(&folder.join("a.png"), PICTURE);
    if form != "pairs" {
        put_once(&folder.join("b/c.jpg"), PICTURE);
    }
    put(&folder.join(list), rest);
    let section = DatasetSection {
        path: folder.clone(),
        ..DatasetSection::default()
    };
    for sample in scan(&section).unwrap_or_default().samples {
        assert!(sample.image.starts_with(&folder) && sample.image.is_file());
        assert!(sample.caption.len() <= 64 << 10);
        assert!(!sample.caption.contains('\0'));
    }
}

/// An image file. The limits are those of a small dataset, so that executions stay fast.
fn image(_: &Path, data: &[u8]) {
    let limits = ImageLimits {
        max_side_px: 128,
        max_pixels: 4096,
        max_file_bytes: 1 << 20,
        max_decoded_bytes: 1 << 20,
    };
    let header = inspect("x.png".as_ref(), data, &limits);
    if let Ok(image) = decode_image("x.png".as_ref(), data, &limits) {
        let header = header.expect("what can be decoded can be looked at");
        assert_eq!(image.dimensions(), (header.width_px, header.height_px));
        assert!(image.width() <= 128 && image.height() <= 128);
        assert!(image.width() * image.height() <= 4096);
    }
}

/// The smallest files of a CLIP and of a T5 tokenizer; one of them is replaced by an input.
pub const VOCAB: &str =
    r#"{"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2, "b</w>": 3, "ab</w>": 4}"#;
/// See [`VOCAB`].
pub const MERGES: &str = "#version: 0.2\na b</w>\n";
/// A `tokenizer.json` of a unigram model.
pub const UNIGRAM: &str = r#"{"added_tokens": [{"id": 1, "content": "</s>", "single_word": false, "lstrip": false,
"rstrip": false, "normalized": false, "special": true}], "normalizer": {"type": "Sequence", "normalizers": [
{"type": "Strip", "strip_left": false, "strip_right": true}, {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}]},
"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
"model": {"type": "Unigram", "unk_id": 2, "vocab": [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], ["▁a", -1.0], ["b", -2.0]],
"byte_fallback": false}}"#;

/// A file of a tokenizer; one that loads also encodes.
fn tokenizer(folder: &Path, data: &[u8]) {
    let (kind, rest) = choose(data);
    let names = [
        "t5/tokenizer.json",
        "clip/tokenizer.json",
        "t5/spiece.model",
        "clip/vocab.json",
        "clip/merges.txt",
        "clip/tokenizer_config.json",
        "clip/special_tokens_map.json",
        "t5/tokenizer_config.json",
    ];
    let name = names[usize::from(kind) % names.len()];
    for other in names {
        let _ = fs::remove_file(folder.join(other));
    }
    if name != "t5/spiece.model" {
        put(&folder.join("t5/tokenizer.json"), UNIGRAM.as_bytes());
    }
    put(&folder.join("clip/vocab.json"), VOCAB.as_bytes());
    put(&folder.join("clip/merges.txt"), MERGES.as_bytes());
    put(&folder.join(name), rest);
    let prompt = "a photo of ab, ＡＢ\u{301} </s><|endoftext|>\n\u{0}x";
    let encoded = if name.starts_with("t5") {
        T5Tokenizer::load(&folder.join("t5")).map(|tokenizer| tokenizer.encode(prompt, 12))
    } else {
        ClipTokenizer::load(&folder.join("clip")).map(|tokenizer| tokenizer.encode(prompt, 12))
    };
    if let Ok(Ok(ids)) = encoded {
        assert_eq!(ids.len(), 12);
    }
}

/// A configuration file of a pipeline folder.
fn model_config(folder: &Path, data: &[u8]) {
    let (kind, rest) = choose(data);
    let names = [
        "model_index.json",
        "transformer/config.json",
        "text_encoder/config.json",
        "text_encoder_2/config.json",
        "vae/config.json",
        "scheduler/scheduler_config.json",
    ];
    let name = names[usize::from(kind) % names.len()];
    for other in names {
        if other != name {
            let text = match other {
                "model_index.json" => r#"{"_class_name": "FluxPipeline"}"#,
                "text_encoder_2/config.json" => r#"{"feed_forward_proj": "gated-gelu"}"#,
                _ => "{}",
            };
            put(&folder.join(other), text.as_bytes());
        }
    }
    put(&folder.join(name), rest);
    let Ok(pipeline) = PipelineFolder::open(folder) else {
        return;
    };
    if let Ok(shape) = families::shape(&pipeline) {
        let flux = shape.transformer.expect("a transformer");
        assert_eq!(
            flux.axes_dims_rope.iter().sum::<usize>(),
            flux.attention_head_dim
        );
    }
    if let Ok(family) = Flux1::open(pipeline) {
        assert!(family.pixel_step() <= 256);
        family.sigmas(4, 16);
        family.scheduler().training_sigmas();
    }
}
