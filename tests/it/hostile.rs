//! Hostile files, made here, each through the function that reads a user's, each with the one message it must get.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use flux_lora::config::{DatasetSection, RunConfig};
use flux_lora::data::image::ImageLimits;
use flux_lora::data::scan;
use flux_lora::run::checkpoint::Opened;
use flux_lora::run::folder::RunDir;
use flux_lora::run::manifest::verify;
use flux_lora::run::metrics::truncate_metrics;
use flux_lora::run::vfs::RealFs;
use flux_lora_tests::program;
use flux_model::families;
use flux_model::family::Family;
use flux_model::flux1::Flux1;
use flux_model::lora::{ModelShape, read};
use flux_model::pipeline::PipelineFolder;
use flux_model::text::tokenizer::{ClipTokenizer, T5Tokenizer};
use flux_model::weights::Checkpoint;
use lora_core::AdapterFile;
use lora_core::files::digest::sha256_hex;
use lora_core::files::host::HostTensor;
use lora_core::files::safetensors::{TensorFile, TensorSet, serialize};

/// Reads what was put into the folder.
type Reader = fn(&Path) -> anyhow::Result<()>;

/// Files in a folder, how they are read, and what is said about them.
struct Case {
    files: Vec<(&'static str, Vec<u8>)>,
    /// Beyond what plain files can do: links, pipes, sparse files.
    prepare: fn(&Path),
    read: Reader,
    /// The whole chain of messages, without the folder; `*` stands for anything.
    says: String,
}

/// The longest a reader may take in a test run on a busy machine.
const SOON: Duration = Duration::from_secs(20);

#[test]
fn every_hostile_file_gets_its_message() {
    let cases = Vec::from_iter(
        [
            tensor_files(),
            shard_indexes(),
            base_models(),
            loras(),
            checkpoints(),
            run_configs(),
            datasets(),
            images(),
            tokenizers(),
            model_configs(),
        ]
        .into_iter()
        .flatten(),
    );
    assert!(cases.len() >= 60, "{} cases", cases.len());
    let vague = cases
        .iter()
        .filter(|case| case.says.trim_matches('*').len() < 10);
    assert_eq!(vague.count(), 0, "a message that matches anything");
    let mut wrong = Vec::new();
    for Case {
        files,
        prepare,
        read,
        says,
    } in cases
    {
        let folder = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
        prepare(folder.path());
        let started = Instant::now();
        let said = match catch_unwind(AssertUnwindSafe(|| read(folder.path()))) {
            Ok(Ok(())) => "(accepted)".to_string(),
            Ok(Err(error)) => format!("{error:#}"),
            Err(_) => "(panic)".to_string(),
        };
        let said = said.replace(&format!("{}/", folder.path().display()), "");
        if !fits(&said, &says) || said.contains('\n') || started.elapsed() > SOON {
            wrong.push(format!("  {said}\n  {says}\n  {:?}\n", started.elapsed()));
        }
    }
    assert!(
        wrong.is_empty(),
        "said, expected, time:\n{}",
        wrong.join("\n")
    );
}

/// Whether `text` is `pattern`, in which each `*` stands for anything; a `*` alone would stand for acceptance too.
fn fits(text: &str, pattern: &str) -> bool {
    match pattern.split_once('*') {
        None => text == pattern,
        Some((start, rest)) => text.strip_prefix(start).is_some_and(|text| {
            (0..=text.len()).any(|at| text.is_char_boundary(at) && fits(&text[at..], rest))
        }),
    }
}

/// A case of plain files.
fn case(files: Vec<(&'static str, Vec<u8>)>, read: Reader, says: impl Into<String>) -> Case {
    Case {
        files,
        prepare: |_| {},
        read,
        says: says.into(),
    }
}

// Made files

/// A safetensors file of this header and so many bytes of data.
fn with_header(header: impl AsRef<[u8]>, data_len: usize) -> Vec<u8> {
    let header = header.as_ref();
    let length = (header.len() as u64).to_le_bytes();
    [&length, header, &vec![0; data_len]].concat()
}

/// A sound safetensors file.
fn tensors(shapes: &[(&str, &[usize])], metadata: &[(&str, &str)]) -> Vec<u8> {
    let tensor = |shape: &[usize]| {
        let values = vec![0.5; shape.iter().product()];
        HostTensor::from_f32(shape, &values)
    };
    let strings = |(key, value): &(&str, &str)| (key.to_string(), value.to_string());
    let tensors = shapes.iter();
    serialize(
        &tensors
            .map(|(name, shape)| (name.to_string(), tensor(shape)))
            .collect(),
        &metadata.iter().map(strings).collect(),
    )
}

fn nested(depth: usize) -> String {
    "[".repeat(depth)
}

fn make_pipe(path: &Path) {
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

/// A file that claims this length and takes no space.
fn make_sparse(path: &Path, len: u64) {
    File::create(path).unwrap().set_len(len).unwrap();
}

fn link(target: &str, path: PathBuf) {
    std::os::unix::fs::symlink(target, path).unwrap();
}

// Safetensors

fn open_tensors(folder: &Path) -> anyhow::Result<()> {
    let file = TensorFile::open(&folder.join("x.safetensors"))?;
    for name in file.names() {
        file.read(name)?;
    }
    Ok(())
}

fn tensor_files() -> Vec<Case> {
    let one = |entry: &str| with_header(format!(r#"{{"a":{{{entry}}}}}"#), 4);
    let named = |name: &str| {
        let entry = r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
        with_header(format!(r#"{{"{name}":{entry}}}"#), 4)
    };
    let two = |first: [u64; 2], second: [u64; 2]| {
        let entry = |[begin, end]: [u64; 2]| {
            format!(r#"{{"dtype":"U8","shape":[4],"data_offsets":[{begin},{end}]}}"#)
        };
        with_header(
            format!(r#"{{"a":{},"b":{}}}"#, entry(first), entry(second)),
            8,
        )
    };
    let length = |length: u64| [&length.to_le_bytes()[..], b"{}"].concat();
    let bad_name = "has an empty or reserved name, or one with control characters or a `..` segment: rename it";
    let malformed = ": the header is malformed: write it again";
    let mut cases: Vec<Case> = [
        (vec![], " is empty: download it again".to_string()),
        (b"{}".to_vec(), " is shorter than the 8 bytes a safetensors file starts with: download it again".into()),
        (b"\x80\x02}q\0X\x05\0\0\0hello".to_vec(), " is a Python pickle, which can run code when loaded: convert it to safetensors".into()),
        (b"PK\x03\x04\x14\0\x08\x08archive/data.pkl".to_vec(), " is a zip/PyTorch archive: convert it to safetensors".into()),
        (b"GGUF\x03\0\0\0\0\0\0\0".to_vec(), " is a GGUF file: use the safetensors checkpoint it was made from".into()),
        (b"<!DOCTYPE html><title>404</title>".to_vec(), " is a web page, not a checkpoint: download the file itself".into()),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n".to_vec(), " is a Git LFS pointer: run git lfs pull".into()),
        (length(u64::MAX), ": a header of 18446744073709551615 bytes, over the limit of 100000000: is it the right file?".into()),
        (length(100_000_001), ": a header of 100000001 bytes, over the limit of 100000000: is it the right file?".into()),
        (length(99_999_999), " is cut short: its header takes 99999999 bytes, 2 are there: download it again".into()),
        (with_header("[]", 0), " is not a safetensors file: its header does not start with `{`".into()),
        (with_header(b"{\"\xff\":1}", 0), ": the header is not UTF-8: write it again: invalid utf-8 sequence of 1 bytes from index 2".into()),
        (with_header("{}{}", 0), format!("{malformed}: trailing characters at line 1 column 3")),
        (with_header("{", 0), format!("{malformed}: EOF while parsing an object at line 1 column 1")),
        (with_header(r#"{"a":{},"a":{}}"#, 0), format!("{malformed}: \"a\": missing field `dtype` at line 1 column *")),
        (two([0, 4], [4, 8]).iter().map(|&b| if b == b'b' { b'a' } else { b }).collect(), format!("{malformed}: duplicate key \"a\" at line 1 column *")),
        (with_header(r#"{"__metadata__":{"k":"1","\u006b":"2"}}"#, 0), format!("{malformed}: \"__metadata__\": duplicate key \"k\" at line 1 column *")),
        (with_header(r#"{"__metadata__":{},"__metadata__":{}}"#, 0), format!("{malformed}: duplicate key \"__metadata__\" at line 1 column *")),
        (with_header(r#"{"__metadata__":{"step":7}}"#, 0), format!("{malformed}: \"__metadata__\": \"step\": invalid type: integer `7`, expected a string at line 1 column *")),
        (with_header(format!(r#"{{"a":{}"#, nested(1 << 20)), 0), format!("{malformed}: \"a\": invalid type: sequence, expected an object at line 1 column *")),
        (one(r#""dtype":"F32","dtype":"U8","shape":[1],"data_offsets":[0,4]"#), format!("{malformed}: \"a\": duplicate key \"dtype\" at line 1 column *")),
        (one(r#""dtype":"F32","shape":[1],"data_offsets":[0,4],"strides":[1]"#), format!("{malformed}: \"a\": \"strides\": no tensor has this field at line 1 column *")),
        (one(r#""dtype":"F32","shape":[-1],"data_offsets":[0,4]"#), format!("{malformed}: \"a\": \"shape\": invalid value: integer `-1`, expected usize at line 1 column *")),
        (one(r#""dtype":"F32","shape":[1],"data_offsets":[0,1e30]"#), format!("{malformed}: \"a\": \"data_offsets\": invalid type: floating point `1e+30`, expected u64 at line 1 column *")),
        (one(r#""dtype":"F32","shape":[1],"data_offsets":[18446744073709551612,18446744073709551616]"#), format!("{malformed}: \"a\": \"data_offsets\": invalid type: floating point `1.8446744073709552e+19`, expected u64 at line 1 column *")),
        (one(r#""dtype":"COMPLEX128","shape":[1],"data_offsets":[0,4]"#), ": tensor `a` has the unknown dtype `COMPLEX128`: convert it to BF16 or F32".into()),
        (one(r#""dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]"#), ": tensor `a` has a shape that overflows, [4294967296, 4294967296]: write the file again".into()),
        (one(r#""dtype":"F32","shape":[0,9223372036854775808,2],"data_offsets":[0,0]"#), ": tensor `a` has a shape that overflows, [0, 9223372036854775808, 2]: write the file again".into()),
        (one(r#""dtype":"F32","shape":[1],"data_offsets":[4,0]"#), ": tensor `a` has data_offsets that run backwards, [4, 0]: write the file again".into()),
        (one(r#""dtype":"F32","shape":[2],"data_offsets":[0,4]"#), ": tensor `a` takes 8 bytes as F32 [2], but data_offsets span 4: write the file again".into()),
        (one(r#""dtype":"F32","shape":[],"data_offsets":[0,8]"#), ": tensor `a` takes 4 bytes as F32 [], but data_offsets span 8: write the file again".into()),
        (one(r#""dtype":"F32","shape":[1],"data_offsets":[18446744073709551611,18446744073709551615]"#), ": tensor `a` starts at byte 18446744073709551611, but the tensor before it ends at 0, leaving a hole: write the file again".into()),
        (one(r#""dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]"#), " is cut short: its data takes 4398046511104 bytes, 4 are there: download it again".into()),
        (two([0, 4], [2, 6]), ": tensor `b` starts at byte 2, but the tensor before it ends at 4: write the file again".into()),
        (two([0, 4], [5, 9]), ": tensor `b` starts at byte 5, but the tensor before it ends at 4, leaving a hole: write the file again".into()),
        (two([0, 4], [0, 4]), ": tensor `b` starts at byte 0, but the tensor before it ends at 4: write the file again".into()),
        ([named("a"), vec![0; 3]].concat(), ": 3 bytes follow the last tensor: remove them".into()),
        (named(""), format!(": tensor `` {bad_name}")),
        (named("../../etc/passwd"), format!(": tensor `../../etc/passwd` {bad_name}")),
        (named(r"a\u001b[2J"), format!(": tensor `a\\u{{1b}}[2J` {bad_name}")),
        (named(&format!("{}/..", "n".repeat(1 << 20))), format!(": tensor `{}...` {bad_name}", "n".repeat(100))),
    ]
    .into_iter()
    .map(|(bytes, says)| {
        case(vec![("x.safetensors", bytes)], open_tensors, format!("`x.safetensors`{says}"))
    })
    .collect();
    for (prepare, says) in [
        (
            (|folder| fs::create_dir(folder.join("x.safetensors")).unwrap()) as fn(&Path),
            " is a directory: name the file inside it",
        ),
        (
            |folder| make_pipe(&folder.join("x.safetensors")),
            " is not a regular file: copy it to disk first",
        ),
        (
            |folder| link("/dev/zero", folder.join("x.safetensors")),
            " is not a regular file: copy it to disk first",
        ),
    ] {
        cases.push(Case {
            prepare,
            ..case(vec![], open_tensors, format!("`x.safetensors`{says}"))
        });
    }
    cases
}

#[test]
fn empty_tensors_and_scalars_are_no_offence() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    fs::write(
        &path,
        tensors(&[("a", &[]), ("b", &[0, 3]), ("c", &[1])], &[]),
    )
    .unwrap();
    let file = TensorFile::open(&path).unwrap();
    let shapes = ["a", "b", "c"].map(|name| file.read(name).unwrap().shape);
    assert_eq!(shapes, [vec![], vec![0, 3], vec![1]]);
}

// Shard indexes

const INDEX: &str = "x.safetensors.index.json";

fn open_index(folder: &Path) -> anyhow::Result<()> {
    TensorSet::open(&folder.join(INDEX))?;
    Ok(())
}

fn shard_indexes() -> Vec<Case> {
    let shards = || {
        vec![
            ("1.safetensors", tensors(&[("a", &[1])], &[])),
            ("2.safetensors", tensors(&[("b", &[1])], &[])),
        ]
    };
    let with = |index: String, says: &str| {
        let files = [vec![(INDEX, index.into_bytes())], shards()].concat();
        case(files, open_index, format!("`{INDEX}`{says}"))
    };
    let names = |shard: &str| format!(r#"{{"weight_map": {{"a": "{shard}"}}}}"#);
    let outside = |shown: &str| {
        format!(": shard `{shown}` is outside the folder of the index: move it there")
    };
    let malformed = ": the shard index is malformed: write it again";
    let linked = |prepare| Case {
        prepare,
        ..with(names("3.safetensors"), &outside("3.safetensors"))
    };
    vec![
        with(names("../1.safetensors"), &outside("../1.safetensors")),
        with(names("/etc/passwd"), &outside("/etc/passwd")),
        with(
            names("a/../../1.safetensors"),
            &outside("a/../../1.safetensors"),
        ),
        with(names(r"..\\1.safetensors"), &outside(r"..\\1.safetensors")),
        with(names(r"\u001b[2J"), &outside(r"\u{1b}[2J")),
        with(names(""), &outside("")),
        linked(|folder| link("/etc/passwd", folder.join("3.safetensors"))),
        linked(|folder| link("..", folder.join("3.safetensors"))),
        with(
            names("3.safetensors"),
            ": shard `3.safetensors` does not exist: download it next to the index",
        ),
        with(
            r#"{"weight_map": {"a": "1.safetensors", "b": "1.safetensors"}}"#.into(),
            ": tensor `b` is not in shard `1.safetensors`, where the index places it: download both again",
        ),
        with(
            r#"{"weight_map": {"c": "1.safetensors"}}"#.into(),
            ": tensor `a` of shard `1.safetensors` is not in the index: download both again",
        ),
        with(
            r#"{"weight_map": {}}"#.into(),
            ": `weight_map` is empty: name the shard of each tensor",
        ),
        with(
            r#"{"weight_map": {"a": "1.safetensors", "a": "2.safetensors"}}"#.into(),
            &format!("{malformed}: \"weight_map\": duplicate key \"a\" at line 1 column *"),
        ),
        with(
            r#"{"weight_map": {"a": ["1.safetensors"]}}"#.into(),
            &format!(
                "{malformed}: \"weight_map\": \"a\": invalid type: sequence, expected a string at line 1 column *"
            ),
        ),
        with(
            format!(r#"{{"metadata": {}"#, nested(1 << 20)),
            &format!("{malformed}: \"metadata\": recursion limit exceeded at line 1 column *"),
        ),
        with(
            "{}".into(),
            &format!("{malformed}: missing field `weight_map` at line 1 column 2"),
        ),
        Case {
            prepare: |folder| make_sparse(&folder.join(INDEX), 1 << 40),
            ..with(
                String::new(),
                ": a shard index of 1099511627776 bytes, over the limit of 67108864: is it the right file?",
            )
        },
    ]
}

// Base models

fn open_transformer(folder: &Path) -> anyhow::Result<()> {
    Checkpoint::open(&folder.join("x.safetensors"))?.transformer(None)?;
    Ok(())
}

fn base_models() -> Vec<Case> {
    let flux = |hidden: usize, head: usize, block: &str| {
        let norm = format!("transformer_blocks.{block}.attn.norm_q.weight");
        let first = "transformer_blocks.0.attn.norm_q.weight";
        let mut shapes: Vec<(&str, Vec<usize>)> = vec![
            ("x_embedder.weight", vec![hidden, 0]),
            ("context_embedder.weight", vec![hidden, 0]),
            (
                "time_text_embed.text_embedder.linear_1.weight",
                vec![hidden, 0],
            ),
            ("proj_out.weight", vec![0, hidden]),
            (first, vec![head]),
        ];
        if norm != first {
            shapes.push((&norm, vec![head]));
        }
        let shapes: Vec<(&str, &[usize])> = shapes
            .iter()
            .map(|(name, shape)| (*name, &shape[..]))
            .collect();
        tensors(&shapes, &[])
    };
    let with = |bytes, says: &str| {
        case(
            vec![("x.safetensors", bytes)],
            open_transformer,
            format!("`x.safetensors` is no FLUX.1 transformer: {says}"),
        )
    };
    vec![
        with(tensors(&[], &[]), "it has no matrix `x_embedder.weight`"),
        with(
            tensors(&[("x_embedder.weight", &[3, 3, 3])], &[]),
            "it has no matrix `x_embedder.weight`",
        ),
        with(
            flux(8, 0, "0"),
            "its attention heads cannot be told from its norms",
        ),
        with(
            flux(1 << 60, 4, "0"),
            "the rotary axes of a head width of 4 are not known",
        ),
        with(
            flux(1 << 60, 128, "0"),
            "`in_channels` is 0, not between 1 and 1048576",
        ),
        with(
            flux(128, 128, "18446744073709551615"),
            "`in_channels` is 0, not between 1 and 1048576",
        ),
    ]
}

// LoRA files

fn read_lora(folder: &Path) -> anyhow::Result<()> {
    read(&folder.join("x.safetensors"), &ModelShape::default())?.validate()?;
    Ok(())
}

fn read_checkpoint_lora(folder: &Path) -> anyhow::Result<()> {
    AdapterFile::load(&folder.join("x.safetensors"), "transformer.")?;
    Ok(())
}

fn read_lora_folder(folder: &Path) -> anyhow::Result<()> {
    read(folder, &ModelShape::default())?.validate()?;
    Ok(())
}

const TO_Q: &str = "transformer_blocks.0.attn.to_q";

/// The factors of one module.
fn factors(prefix: &str, a: &[usize], b: &[usize], metadata: &[(&str, &str)]) -> Vec<u8> {
    let name = |factor: &str| format!("{prefix}{TO_Q}.{factor}.weight");
    tensors(&[(&name("lora_A"), a), (&name("lora_B"), b)], metadata)
}

fn loras() -> Vec<Case> {
    let header = |json: &str| {
        let metadata = [(lora_core::peft::METADATA_KEY, json)];
        vec![(
            "x.safetensors",
            factors("transformer.", &[2, 4], &[4, 2], &metadata),
        )]
    };
    let folder = |json: Vec<u8>, says: &str| {
        let weights = factors("base_model.model.", &[2, 4], &[4, 2], &[]);
        let files = vec![
            ("adapter_model.safetensors", weights),
            ("adapter_config.json", json),
        ];
        case(files, read_lora_folder, says.to_string())
    };
    let single = |bytes, says: &str| case(vec![("x.safetensors", bytes)], read_lora, says);
    let twice = r#"{"transformer.r": 2, "transformer.r": 4}"#;
    let deep = format!(r#"{{"a": {}"#, nested(1 << 16));
    vec![
        case(
            header(twice),
            read_lora,
            "*duplicate key \"transformer.r\" at line 1 column 36",
        ),
        case(
            header(twice),
            read_checkpoint_lora,
            "`lora_adapter_metadata` of `x.safetensors` is malformed: write it again: duplicate key \"transformer.r\" at line 1 column 36",
        ),
        case(
            header(&deep),
            read_lora,
            "*recursion limit exceeded at line 1 column *",
        ),
        case(
            header(r#"{"transformer.r": 18446744073709551616}"#),
            read_lora,
            "`r` of `lora_adapter_metadata` of `x.safetensors` is 1.8446744073709552e+19: invalid type: floating point `1.8446744073709552e+19`, expected usize",
        ),
        case(
            header(r#"{"transformer.r": 2, "transformer.lora_alpha": 1e999}"#),
            read_checkpoint_lora,
            "*number out of range at line 1 column *",
        ),
        folder(
            br#"{"r": 2, "lora_alpha": 2, "lora_alpha": 4}"#.to_vec(),
            "*duplicate key \"lora_alpha\" at line 1 column 38",
        ),
        folder(
            b"{\"r\": 2, \"lora_alpha\": \"\xff\"}".to_vec(),
            "*invalid unicode code point at line 1 column *",
        ),
        folder(
            deep.clone().into_bytes(),
            "*recursion limit exceeded at line 1 column *",
        ),
        folder(
            b"[]".to_vec(),
            "`adapter_config.json` is malformed: write it again: invalid type: sequence, expected a map at line 1 column 0",
        ),
        Case {
            prepare: |folder| make_sparse(&folder.join("adapter_config.json"), 1 << 40),
            ..folder(
                vec![],
                "cannot access `adapter_config.json`: it has 1099511627776 bytes, over the limit of 16777216: is it the right file?",
            )
        },
        Case {
            files: vec![("adapter_model.bin", b"\x80\x02".to_vec())],
            ..folder(
                vec![],
                "`adapter_model.bin` is a Python pickle, which can run code when loaded: convert it to safetensors",
            )
        },
        single(
            factors("transformer.", &[0, 4], &[4, 0], &[]),
            "`x.safetensors`: `transformer.transformer_blocks.0.attn.to_q.lora_A.weight` has rank 0: remove the module or train it again",
        ),
        single(
            factors("transformer.", &[2, 4], &[4, 3], &[]),
            "`x.safetensors`: `transformer.transformer_blocks.0.attn.to_q.lora_B.weight` has rank 3, but `transformer.transformer_blocks.0.attn.to_q.lora_A.weight` has rank 2: all of a module has one rank",
        ),
        single(
            factors("transformer.", &[2], &[4, 2], &[]),
            "`x.safetensors`: `transformer.transformer_blocks.0.attn.to_q.lora_A.weight` must be a matrix, but has shape [2]",
        ),
        single(
            tensors(&[("x", &[1])], &[]),
            "`x.safetensors`: no key names a module of FLUX.1 or FLUX.2; the first is `x`",
        ),
        single(tensors(&[], &[]), "`x.safetensors` holds no tensors"),
    ]
}

// Checkpoints

const NAME: &str = "ckpt-0000000001";

fn verify_checkpoint(folder: &Path) -> anyhow::Result<()> {
    verify(&folder.join(NAME))?;
    Ok(())
}

fn parse_checkpoint(folder: &Path) -> anyhow::Result<()> {
    Opened::read(verify(&folder.join(NAME))?)?;
    Ok(())
}

/// A manifest with the hash that belongs to it, as only an attacker would make it.
fn sealed(body: &str) -> Vec<u8> {
    format!(
        "{body},\n  \"sha256\": \"{}\"\n}}\n",
        sha256_hex(body.as_bytes())
    )
    .into_bytes()
}

fn manifest(files: &[(&str, &[u8])]) -> Vec<u8> {
    let entry = |(name, bytes): &(&str, &[u8])| {
        let (length, sha256) = (bytes.len(), sha256_hex(bytes));
        format!(r#"{{"name": "{name}", "length": {length}, "sha256": "{sha256}"}}"#)
    };
    let files = files.iter().map(entry).collect::<Vec<_>>().join(", ");
    sealed(&format!(
        r#"{{"format_version": 2, "step": 1, "files": [{files}], "config_digest": "", "dataset_digest": "", "fingerprint": null"#
    ))
}

fn checkpoints() -> Vec<Case> {
    let with = |manifest: Vec<u8>, says: &str| {
        case(
            vec![("ckpt-0000000001/MANIFEST.json", manifest)],
            verify_checkpoint,
            says,
        )
    };
    let fields =
        r#""format_version": 2, "step": 1, "files": [], "config_digest": "", "dataset_digest": """#;
    let unexpected = "unexpected JSON in ckpt-0000000001/MANIFEST.json";
    let with_state = |state: String, says: &str| {
        let lora = factors("transformer.", &[2, 4], &[4, 2], &[]);
        let optimizer = tensors(&[], &[]);
        let files: [(&str, &[u8]); 3] = [
            ("lora.safetensors", &lora),
            ("optimizer.safetensors", &optimizer),
            ("state.json", state.as_bytes()),
        ];
        let manifest = manifest(&files);
        let files = vec![
            ("ckpt-0000000001/MANIFEST.json", manifest),
            ("ckpt-0000000001/lora.safetensors", lora.clone()),
            ("ckpt-0000000001/optimizer.safetensors", optimizer.clone()),
            ("ckpt-0000000001/state.json", state.into_bytes()),
        ];
        case(
            files,
            parse_checkpoint,
            format!("`ckpt-0000000001/state.json` {says}"),
        )
    };
    let latest = |text: &str, says: &str| {
        case(
            vec![("LATEST", text.as_bytes().to_vec())],
            |folder| {
                RunDir::open(folder)?.latest()?;
                Ok(())
            },
            says,
        )
    };
    let metrics = |text: String, says: &str| {
        case(
            vec![("metrics.jsonl", text.into_bytes())],
            |folder| {
                truncate_metrics(&RealFs, &folder.join("metrics.jsonl"), Some(9))?;
                Ok(())
            },
            says,
        )
    };
    let digest = "0".repeat(64);
    vec![
        with(
            b"{}".to_vec(),
            "ckpt-0000000001/MANIFEST.json is damaged: its last line is not the SHA-256 of the rest",
        ),
        with(
            vec![b' '; (1 << 20) + 1],
            "ckpt-0000000001/MANIFEST.json is damaged: it is far longer than it was written",
        ),
        with(
            manifest(&[("../../etc/passwd", b"x")]),
            "ckpt-0000000001/../../etc/passwd is missing; the checkpoint cannot be used",
        ),
        with(
            manifest(&[("/etc/passwd", b"x")]),
            "/etc/passwd is missing; the checkpoint cannot be used",
        ),
        with(
            manifest(&[("MANIFEST.json", b"x")]),
            "ckpt-0000000001/MANIFEST.json is missing; the checkpoint cannot be used",
        ),
        with(
            sealed(&format!(r#"{{{fields}, "fingerprint": null, "step": 1"#)),
            &format!("{unexpected}: duplicate key \"step\" at line 1 column *"),
        ),
        with(
            sealed(&format!(
                r#"{{{fields}, "fingerprint": {{"a": {{"b": 1, "b": 2}}}}"#
            )),
            &format!(
                "{unexpected}: \"fingerprint\": \"a\": duplicate key \"b\" at line 1 column *"
            ),
        ),
        with(
            sealed(&format!(
                r#"{{{fields}, "fingerprint": {}"#,
                nested(1 << 16)
            )),
            &format!("{unexpected}: \"fingerprint\": recursion limit exceeded at line 1 column *"),
        ),
        with(
            sealed(&format!(r#"{{{fields}, "fingerprint": null, "more": 1"#)),
            &format!("{unexpected}: unknown field `more`, expected one of *"),
        ),
        with(
            sealed(
                &fields
                    .replace("version\": 2", "version\": 3")
                    .replacen('"', "{\"", 1),
            ),
            "ckpt-0000000001/MANIFEST.json has format version 3, this program reads 2; use the version that wrote it",
        ),
        Case {
            prepare: |folder| make_pipe(&folder.join(NAME).join("state.json")),
            ..with(
                manifest(&[("state.json", b"x")]),
                "ckpt-0000000001/state.json is not a file; move it elsewhere",
            )
        },
        Case {
            prepare: |folder| link("/etc/passwd", folder.join(NAME).join("state.json")),
            ..with(
                manifest(&[("state.json", b"x")]),
                "ckpt-0000000001/state.json is not a file; move it elsewhere",
            )
        },
        with_state(
            r#"{"epoch": 0, "epoch": 1}"#.into(),
            "is not valid: duplicate key \"epoch\" at line 1 column 20",
        ),
        with_state(
            format!(r#"{{"progress": {}"#, r#"{"step":"#.repeat(1 << 16)),
            "is not valid: \"progress\": *recursion limit exceeded at line 1 column *",
        ),
        with_state(
            "{}".into(),
            "is not valid: missing field `progress` at line 1 column 2",
        ),
        with_state(
            r#"{"progress": {"step": -1}}"#.into(),
            "is not valid: invalid value: integer `-1`, expected u64 at line 1 column 24",
        ),
        latest(
            &format!("../../etc\n{digest}\n"),
            "LATEST is damaged: it is not a checkpoint name and a SHA-256, a line each",
        ),
        latest(
            &format!("ckpt-0000000001\n{digest}\n"),
            "LATEST names ckpt-0000000001, which is not there; was it removed by hand?",
        ),
        latest(
            &"ckpt".repeat(1 << 20),
            "LATEST is damaged: it is far longer than it was written",
        ),
        Case {
            files: vec![],
            prepare: |folder| make_pipe(&folder.join("LATEST")),
            ..latest("", "read LATEST: it is not a regular file")
        },
        metrics(
            "{\"step\": 1, \"step\": 99}\n{\"step\": 2}\n".into(),
            "metrics.jsonl line 1 is not a JSON object with a whole number `step`; repair or delete the line",
        ),
        metrics(
            format!("{}\n{{\"step\": 2}}\n", nested(1 << 16)),
            "metrics.jsonl line 1 is not a JSON object with a whole number `step`; repair or delete the line",
        ),
        Case {
            files: vec![],
            prepare: |folder| make_pipe(&folder.join("metrics.jsonl")),
            ..metrics(
                String::new(),
                "read metrics.jsonl: it is not a regular file",
            )
        },
    ]
}

// Run configurations

fn load_config(folder: &Path) -> anyhow::Result<()> {
    RunConfig::load(&folder.join("run.toml"), &[])?;
    Ok(())
}

fn run_configs() -> Vec<Case> {
    let with = |text: &[u8], says: &str| case(vec![("run.toml", text.to_vec())], load_config, says);
    let not = "`run.toml` is not a run configuration:";
    let dotted = format!("{}x = 1", "x.".repeat(400_000));
    let tables = format!("[{}x]", "x.".repeat(400_000));
    let inline = format!("x = {}", "{x = ".repeat(100_000));
    vec![
        with(
            b"\xff\xfe[\0m\0",
            &format!("{not} it is UTF-16 text: save it as UTF-8"),
        ),
        with(
            &vec![b'#'; 10 << 20],
            &format!("{not} it is larger than 1 MiB"),
        ),
        with(
            b"[train]\nsteps = 1\nsteps = 2",
            "run.toml:3:1: duplicate key",
        ),
        with(b"[train]\n[train]", "run.toml:2:*: duplicate key"),
        with(
            format!("x = {}", nested(500_000)).as_bytes(),
            "run.toml:1:85: cannot recurse further; max recursion depth met",
        ),
        with(dotted.as_bytes(), "run.toml:1:1: recursion limit"),
        with(tables.as_bytes(), "run.toml:1:1: recursion limit"),
        with(
            inline.as_bytes(),
            "run.toml:1:405: cannot recurse further; max recursion depth met",
        ),
        with(
            "[train]\n\u{1b}[2J = 1".as_bytes(),
            "run.toml:2:2: key with no value, expected `=`",
        ),
        with(
            b"[\"\\u001b[2J\"]",
            "unknown section `\\u{1b}[2J` in run.toml:1: did you mean `model`?",
        ),
        with(
            b"[train]\nsteps = 99999999999999999999",
            "run.toml:2:9: invalid type: integer `99999999999999999999` as i128, expected any valid TOML value",
        ),
        with(
            b"[lora]\nr = 18446744073709551615",
            "run.toml:2:5: u64 value was too large",
        ),
    ]
}

// Datasets

fn scan(folder: &Path) -> anyhow::Result<()> {
    scan::scan(&DatasetSection {
        path: folder.to_path_buf(),
        ..DatasetSection::default()
    })?;
    Ok(())
}

fn datasets() -> Vec<Case> {
    let pair = |caption: Vec<u8>, says: &str| {
        case(
            vec![("a.png", b"x".to_vec()), ("a.txt", caption)],
            scan,
            says,
        )
    };
    let listed = |list: &[u8], says: &str| {
        let files = vec![("a.png", b"x".to_vec()), ("metadata.jsonl", list.to_vec())];
        case(files, scan, format!("`metadata.jsonl` line {says}"))
    };
    let table = |table: &[u8], says: &str| {
        let files = vec![("a.png", b"x".to_vec()), ("metadata.csv", table.to_vec())];
        case(files, scan, format!("`metadata.csv` line {says}"))
    };
    vec![
        case(
            vec![],
            |folder| scan(&folder.join("a\0b")),
            "cannot read `a\\u{0}b`: file name contained an unexpected NUL byte",
        ),
        pair(b"caf\xe9".to_vec(), "caption `a.txt` is not UTF-8; it looks like Windows-1252 or Latin-1: save it as UTF-8"),
        pair(b"\xfe\xff\0a".to_vec(), "caption `a.txt` is UTF-16, not UTF-8: save it as UTF-8"),
        pair(vec![0; 1000], "caption `a.txt` is not UTF-8 text; it looks like UTF-16 without a mark: save it as UTF-8"),
        pair(b"\x1b]0;a\x07".to_vec(), "caption `a.txt` holds the control character U+001B: is it UTF-8 text? Remove it"),
        pair(vec![b'a'; 10 << 20], "caption `a.txt` is larger than 64 KiB"),
        Case {
            files: vec![("a.png", b"x".to_vec())],
            prepare: |folder| make_pipe(&folder.join("a.txt")),
            ..pair(vec![], "cannot read `a.txt`: it is not a file")
        },
        Case {
            files: vec![("a.txt", b"x".to_vec())],
            prepare: |folder| make_pipe(&folder.join("a.png")),
            ..pair(vec![], "image `a.png` is not a file")
        },
        Case {
            files: vec![("a.txt", b"x".to_vec())],
            prepare: |folder| link("a.png", folder.join("a.png")),
            ..pair(vec![], "cannot read `a.png`: Too many levels of symbolic links (os error 40)")
        },
        listed(br#"{"file_name": "a.png", "text": "a", "text": "b"}"#, "1: duplicate key \"text\" at column *"),
        listed(br#"{"file_name": "../a.png", "text": "a"}"#, "1: file_name `../a.png` leads out of the dataset folder"),
        listed(br#"{"file_name": "/etc/passwd", "text": "a"}"#, "1: file_name `/etc/passwd` leads out of the dataset folder"),
        listed(b"{\"file_name\": \"a.png\", \"text\": \"\xff\"}", "1: is not UTF-8; it looks like Windows-1252 or Latin-1: save it as UTF-8"),
        listed(b"\n[\"a.png\", \"a\"]", "2: is not a JSON object"),
        listed(format!(r#"{{"file_name": "a.png", "text": "a", "more": {}"#, nested(1 << 16)).as_bytes(), "1: \"more\": recursion limit exceeded at column *"),
        listed(format!(r#"{{"file_name": "a.png", "text": "{}"}}"#, "a".repeat(10 << 20)).as_bytes(), "1: is larger than 1 MiB"),
        listed(format!(r#"{{"file_name": "a.png", "text": "{}"}}"#, "a".repeat(100 << 10)).as_bytes(), "1: text is larger than 64 KiB"),
        listed(br#"{"file_name": "b.png", "text": "a"}"#, "1: image `b.png` does not exist"),
        listed(b"{\"file_name\": \"a.png\", \"text\": \"a\"}\n{\"file_name\": \"./a.png\", \"text\": \"b\"}", "2: file_name `./a.png` was already listed on line 1"),
        // A link may lead anywhere, but what is there must be a picture, and a circle comes to an end.
        Case {
            prepare: |folder| {
                fs::remove_file(folder.join("a.png")).unwrap();
                link("/etc/passwd", folder.join("a.png"));
            },
            ..case(
                vec![("a.png", vec![]), ("metadata.jsonl", br#"{"file_name": "a.png", "text": "a"}"#.to_vec())],
                scan,
                "image `a.png` is not a PNG, JPEG or WebP file, nor BMP or TIFF",
            )
        },
        Case {
            prepare: |folder| {
                link(".", folder.join("b"));
                link("..", folder.join("c/d"));
            },
            ..case(
                vec![("a.png", b"x".to_vec()), ("a.txt", vec![]), ("c/a.md", vec![])],
                scan,
                "image `a.png` is not a PNG, JPEG or WebP file, nor BMP or TIFF",
            )
        },
        table(b"file_name,text\n../a.png,a", "2: file_name `../a.png` leads out of the dataset folder"),
        table(b"file_name,text\n\"a.png,a", "2: has 1 columns, not 2: *"),
        table(b"", "1: has no column `file_name`, only: "),
        table(format!("file_name,text\na.png,{}", "a".repeat(10 << 20)).as_bytes(), "2: text is larger than 64 KiB"),
    ]
}

// Images

fn load_image(folder: &Path) -> anyhow::Result<()> {
    flux_lora::data::image::load_image(&folder.join("x.png"), &ImageLimits::default())?;
    Ok(())
}

fn encoded(format: image::ImageFormat) -> Vec<u8> {
    let pixels = image::RgbImage::from_fn(40, 24, |x, y| {
        image::Rgb([6 * x as u8, 10 * y as u8, (x * y) as u8])
    });
    let mut bytes = std::io::Cursor::new(Vec::new());
    pixels.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

fn png_chunk(kind: &[u8; 4], data: &[u8]) -> Vec<u8> {
    let checked = [kind, data].concat();
    let crc = !checked.iter().fold(!0u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ (0xedb8_8320 * (crc & 1))
        })
    });
    [
        &(data.len() as u32).to_be_bytes(),
        &checked[..],
        &crc.to_be_bytes(),
    ]
    .concat()
}

/// A zlib stream of `len` zeros, stored in blocks of distance-1 copies: a thousandth of what it unpacks to.
fn zlib_bomb(len: usize) -> Vec<u8> {
    // Fixed Huffman codes, least significant bit first: a literal 0, then copies of 258 bytes at distance 1.
    let (mut bytes, mut held, mut count) = (vec![0x78, 0x9c], 0u32, 0);
    let mut put = |bits: u32, length: u32, bytes: &mut Vec<u8>| {
        held |= bits << count;
        count += length;
        while count >= 8 {
            bytes.push(held as u8);
            (held, count) = (held >> 8, count - 8);
        }
    };
    put(0b011, 3, &mut bytes); // last block, fixed codes
    put(0b0000_1100, 8, &mut bytes); // literal 0 is 00110000
    for _ in 0..len / 258 {
        put(0b1010_0011, 8, &mut bytes); // length 258 is 11000101
        put(0, 5, &mut bytes); // distance 1
    }
    put(0, 7, &mut bytes); // end of block
    put(0, 7, &mut bytes); // to a whole byte
    bytes.extend([0; 4]); // no true checksum
    bytes
}

/// A PNG of this size whose pixels are zeros, with more chunks before them.
fn png(width: u32, height: u32, chunks: &[u8], pixels: &[u8]) -> Vec<u8> {
    let mut header = [width.to_be_bytes(), height.to_be_bytes()].concat();
    header.extend([8, 2, 0, 0, 0]);
    [
        b"\x89PNG\r\n\x1a\n",
        &png_chunk(b"IHDR", &header)[..],
        chunks,
        &png_chunk(b"IDAT", pixels),
        &png_chunk(b"IEND", b""),
    ]
    .concat()
}

/// A TIFF of one strip that is not there.
fn tiff(width: u32, height: u32) -> Vec<u8> {
    let entries: [(u16, u32); 9] = [
        (256, width),
        (257, height),
        (258, 8), // bits
        (259, 1), // not compressed
        (262, 1), // grey
        (273, 8), // where the strip is
        (277, 1), // channels
        (278, height),
        (279, u32::MAX), // how long it is
    ];
    let mut bytes = b"II*\0\x08\0\0\0".to_vec();
    bytes.extend((entries.len() as u16).to_le_bytes());
    for (tag, value) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(4u16.to_le_bytes()); // u32
        bytes.extend(1u32.to_le_bytes());
        bytes.extend(value.to_le_bytes());
    }
    bytes.extend([0; 4]);
    bytes
}

/// A BMP without pixels.
fn bmp(width: i32, height: i32) -> Vec<u8> {
    let mut bytes = b"BM\xff\xff\xff\xff\0\0\0\0\x36\0\0\0\x28\0\0\0".to_vec();
    bytes.extend(width.to_le_bytes());
    bytes.extend(height.to_le_bytes());
    bytes.extend([1, 0, 24, 0]); // planes, bits
    bytes.extend([0; 24]);
    bytes
}

fn images() -> Vec<Case> {
    use image::ImageFormat::{Bmp, Jpeg, Png, Tiff, WebP};
    let with = |bytes: Vec<u8>, says: &str| case(vec![("x.png", bytes)], load_image, says);
    let large = |size: &str| {
        format!(
            "image `x.png` is {size} pixels; at most 16384 a side and 100000000 in all are allowed"
        )
    };
    let half = |format| {
        let mut bytes = encoded(format);
        bytes.truncate(bytes.len() / 2);
        bytes
    };
    let mut jpeg_bomb = encoded(Jpeg);
    let frame = jpeg_bomb
        .windows(2)
        .position(|pair| pair == [0xff, 0xc0])
        .unwrap();
    jpeg_bomb[frame + 5..frame + 9].fill(0xff);
    let mut webp_bomb = encoded(WebP);
    webp_bomb[21..25].copy_from_slice(&(0x3ffe_u32 | 0x3ffe << 14).to_le_bytes());
    // An extended WebP that says 16777216 x 16777216.
    let mut extended = b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0".to_vec();
    extended.extend([0xff; 6]);
    let profile = [b"x\0\0".to_vec(), zlib_bomb(64 << 20)].concat();
    let text = [b"x\0\0".to_vec(), zlib_bomb(256 << 20)].concat();
    vec![
        with(vec![], "image `x.png` is empty (0 bytes)"),
        with(
            b"GIF89a\x01\0\x01\0\0\0\0;".to_vec(),
            "image `x.png` is not a PNG, JPEG or WebP file, nor BMP or TIFF: it is GIF; convert it to png or jpg",
        ),
        with(
            b"<svg xmlns='http://www.w3.org/2000/svg'/>".to_vec(),
            "image `x.png` is not a PNG, JPEG or WebP file, nor BMP or TIFF: it is SVG; convert it to png or jpg",
        ),
        with(half(Png), "image `x.png` is cut short"),
        with(half(Jpeg), "image `x.png` is cut short"),
        with(half(WebP), "image `x.png` is cut short"),
        with(half(Bmp), "image `x.png` is cut short"),
        with(half(Tiff), "*image `x.png`*"),
        with(tiff(60000, 60000), &large("60000x60000")),
        with(tiff(16384, 16384), &large("16384x16384")),
        with(bmp(60000, 60000), &large("60000x60000")),
        with(tiff(0, 1), "*image `x.png`*"),
        with(
            png(60000, 60000, &[], &zlib_bomb(1 << 20)),
            &large("60000x60000"),
        ),
        with(
            png(1, 100_000, &[], &zlib_bomb(1 << 20)),
            &large("1x100000"),
        ),
        with(
            png(u32::MAX, u32::MAX, &[], &zlib_bomb(1 << 20)),
            "image `x.png` takes more than 1024 MiB to decode",
        ),
        with(
            png(0, 0, &[], &zlib_bomb(1 << 10)),
            "cannot decode image `x.png`: Format error decoding Png: Invalid image dimensions; replace it or save it again",
        ),
        with(
            png(10_001, 10_000, &[], &zlib_bomb(1 << 20)),
            &large("10001x10000"),
        ),
        with(jpeg_bomb, &large("65535x65535")),
        with(webp_bomb, &large("16383x16383")),
        with(
            extended,
            "cannot decode image `x.png`: Format error decoding WebP: Image too large; replace it or save it again",
        ),
        with(
            png(4, 4, &png_chunk(b"iCCP", &profile), b"x"),
            "cannot decode image `x.png`: Format error decoding Png: Corrupt deflate stream. InsufficientInput; replace it or save it again",
        ),
        with(
            png(4, 4, &png_chunk(b"zTXt", &text), b"x"),
            "cannot decode image `x.png`: Format error decoding Png: Corrupt deflate stream. InsufficientInput; replace it or save it again",
        ),
        with(
            png(4, 4, &[], b"not zlib"),
            "cannot decode image `x.png`: Format error decoding Png: Corrupt deflate stream. BadZlibHeader; replace it or save it again",
        ),
        with(
            png(4, 4, &[], &zlib_bomb(10)),
            "cannot decode image `x.png`: Format error decoding Png: IDAT or fDAT chunk does not have enough data for image.; replace it or save it again",
        ),
        Case {
            prepare: |folder| make_sparse(&folder.join("x.png"), 1 << 40),
            ..with(vec![], "image `x.png` is larger than 256 MiB")
        },
    ]
}

// Tokenizers

fn load_t5(folder: &Path) -> anyhow::Result<()> {
    T5Tokenizer::load(folder)?.encode("a cat", 8)?;
    Ok(())
}

fn load_clip(folder: &Path) -> anyhow::Result<()> {
    ClipTokenizer::load(folder)?.encode("a cat", 8)?;
    Ok(())
}

fn tokenizers() -> Vec<Case> {
    let t5 = |json: String, says: &str| {
        case(
            vec![("tokenizer.json", json.into_bytes())],
            load_t5,
            format!("`tokenizer.json` is not a usable tokenizer file: {says}"),
        )
    };
    let spiece = |bytes: Vec<u8>, says: &str| {
        case(
            vec![("spiece.model", bytes)],
            load_t5,
            format!("`spiece.model` is not a usable tokenizer file: {says}"),
        )
    };
    let clip = |vocab: &str, merges: &str, file: &str, says: &str| {
        let files = vec![
            ("vocab.json", vocab.as_bytes().to_vec()),
            ("merges.txt", merges.as_bytes().to_vec()),
        ];
        case(
            files,
            load_clip,
            format!("`{file}` is not a usable tokenizer file: {says}"),
        )
    };
    let unigram = |vocab: &str| {
        format!(
            r#"{{"model": {{"type": "Unigram", "unk_id": 0, "vocab": {vocab}, "byte_fallback": false}}}}"#
        )
    };
    let long = "x".repeat(1 << 20);
    vec![
        t5(
            r#"{"model": {}, "model": {}}"#.into(),
            "duplicate key \"model\" at line 1 column 21",
        ),
        t5(
            format!(r#"{{"model": {}"#, nested(1 << 20)),
            "\"model\": recursion limit exceeded at line 1 column *",
        ),
        t5("{}".into(), "Model missing."),
        t5(
            "[]".into(),
            "invalid type: sequence, expected struct Tokenizer",
        ),
        t5(unigram("[]"), "Unable to load vocab EmptyVocabulary"),
        t5(
            unigram(&format!(r#"[["{long}", 0.0]]"#)),
            "a piece is longer than 512 bytes",
        ),
        t5(
            r#"{"normalizer": {"type": "Precompiled", "precompiled_charsmap": "////"}}"#.into(),
            "the precompiled charsmap points outside itself",
        ),
        spiece(
            vec![0x0a; 1 << 20],
            "a protobuf field of 10 bytes has 2 left",
        ),
        spiece(
            b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01".to_vec(),
            "a protobuf field of 18446744073709551615 bytes has 0 left",
        ),
        spiece(b"\x80".to_vec(), "a protobuf number is cut short"),
        clip(
            r#"{"a": 0, "a": 1}"#,
            "#v\n",
            "vocab.json",
            "duplicate key \"a\" at line 1 column 12",
        ),
        clip(
            r#"{"a": 4294967296}"#,
            "#v\n",
            "vocab.json",
            "invalid value: integer `4294967296`, expected u32 at line 1 column 16",
        ),
        clip(
            r#"{"a": 0}"#,
            "#v\na b c\n",
            "merges.txt",
            "Token `b c` out of vocabulary",
        ),
        clip(
            r#"{"a": 0}"#,
            "#v\nab\n",
            "merges.txt",
            "line 2 is not a pair of tokens",
        ),
        Case {
            prepare: |folder| make_pipe(&folder.join("spiece.model")),
            ..case(
                vec![],
                load_t5,
                "cannot read `spiece.model`: it is not a regular file",
            )
        },
        Case {
            prepare: |folder| make_sparse(&folder.join("tokenizer.json"), 1 << 40),
            ..case(
                vec![],
                load_t5,
                "cannot read `tokenizer.json`: it has 1099511627776 bytes, over the limit of 67108864: is it the right file?",
            )
        },
    ]
}

// Configurations of a pipeline

fn open_pipeline(folder: &Path) -> anyhow::Result<()> {
    let pipeline = PipelineFolder::open(folder)?;
    families::shape(&pipeline)?;
    Flux1::open(pipeline)?.scheduler().training_sigmas();
    Ok(())
}

fn model_configs() -> Vec<Case> {
    let with = |name: &'static str, text: &str, says: &str| {
        let mut files = BTreeMap::from([
            ("model_index.json", r#"{"_class_name": "FluxPipeline"}"#),
            ("transformer/config.json", "{}"),
            ("text_encoder/config.json", "{}"),
            (
                "text_encoder_2/config.json",
                r#"{"feed_forward_proj": "gated-gelu"}"#,
            ),
            ("vae/config.json", "{}"),
            ("scheduler/scheduler_config.json", "{}"),
        ]);
        files.insert(name, text);
        let files = files
            .into_iter()
            .map(|(name, text)| (name, text.as_bytes().to_vec()));
        case(files.collect(), open_pipeline, format!("`{name}`{says}"))
    };
    let (flux, clip, t5, vae, scheduler) = (
        "transformer/config.json",
        "text_encoder/config.json",
        "text_encoder_2/config.json",
        "vae/config.json",
        "scheduler/scheduler_config.json",
    );
    let gelu = |more: &str| format!(r#"{{"feed_forward_proj": "gated-gelu", {more}}}"#);
    vec![
        with(
            "model_index.json",
            r#"{"_class_name": "FluxPipeline", "_class_name": "X"}"#,
            " is not valid: duplicate key \"_class_name\" at line 1 column 45",
        ),
        with(
            "model_index.json",
            r#"{"_class_name": "StableDiffusionPipeline"}"#,
            ": a StableDiffusionPipeline is not a FLUX.1 or FLUX.2 pipeline",
        ),
        with(
            "model_index.json",
            &nested(1 << 16),
            " is not valid: recursion limit exceeded at line 1 column 128",
        ),
        with(
            flux,
            r#"{"num_layers": 1, "num_layers": 2}"#,
            " is not valid: duplicate key \"num_layers\" at line 1 column *",
        ),
        with(
            flux,
            r#"{"num_layers": 18446744073709551615}"#,
            ": more than 1000 blocks",
        ),
        with(
            flux,
            r#"{"num_attention_heads": 18446744073709551615}"#,
            ": `num_attention_heads` is 18446744073709551615, not between 1 and 1048576",
        ),
        with(
            flux,
            r#"{"axes_dims_rope": [18446744073709551614, 18446744073709551614, 132]}"#,
            ": `axes_dims_rope` must be three even numbers up to 1048576",
        ),
        with(
            flux,
            r#"{"patch_size": 0}"#,
            ": `patch_size` is 0; FLUX.1 has 1",
        ),
        with(
            clip,
            r#"{"hidden_size": 18446744073709551615, "num_attention_heads": 1}"#,
            ": `hidden_size` is 18446744073709551615, not between 1 and 1048576",
        ),
        with(
            t5,
            &gelu(r#""d_kv": 4294967296, "num_heads": 4294967296"#),
            ": `d_kv` is 4294967296, not between 1 and 1048576",
        ),
        with(
            t5,
            &gelu(r#""relative_attention_num_buckets": 18446744073709551612"#),
            ": `relative_attention_num_buckets` is 18446744073709551612, not between 1 and 1048576",
        ),
        with(
            vae,
            r#"{"block_out_channels": []}"#,
            ": `block_out_channels` must name one to eight levels",
        ),
        with(
            vae,
            r#"{"block_out_channels": [18446744073709551584]}"#,
            ": `block_out_channels` is 18446744073709551584, not between 1 and 1048576",
        ),
        with(
            vae,
            r#"{"scaling_factor": 0}"#,
            ": `scaling_factor` or `shift_factor` is not usable",
        ),
        with(
            scheduler,
            r#"{"num_train_timesteps": 18446744073709551615}"#,
            ": `num_train_timesteps` is 18446744073709551615, not between 1 and 1000000",
        ),
        with(
            scheduler,
            r#"{"shift": -1}"#,
            ": `shift` is -1, not above 0",
        ),
        with(
            scheduler,
            r#"{"base_image_seq_len": 4096}"#,
            ": `base_image_seq_len` is 4096, not below `max_image_seq_len`, 4096",
        ),
        Case {
            prepare: |folder| make_sparse(&folder.join("vae/config.json"), 1 << 40),
            ..case(
                with(vae, "{}", "").files,
                open_pipeline,
                "cannot read `vae/config.json`: it has 1099511627776 bytes, over the limit of 1048576: is it the right file?",
            )
        },
        Case {
            prepare: |folder| {
                let path = folder.join("vae/config.json");
                fs::remove_file(&path).unwrap();
                make_pipe(&path);
            },
            ..case(
                with(vae, "{}", "").files,
                open_pipeline,
                "cannot read `vae/config.json`: it is not a regular file",
            )
        },
    ]
}

#[test]
fn the_program_says_one_printable_line_and_exits_with_1() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    for json in [
        "{\"transformer.\u{1b}[2J\": 1, \"transformer.\u{1b}[2J\": 1}".to_string(),
        format!("{{\"{0}\": 1, \"{0}\": 1}}", "k".repeat(1 << 20)),
        format!("{{\"transformer.r\": \"{}\"}}", "\u{1b}[2J".repeat(1 << 18)),
    ] {
        let metadata = [(lora_core::peft::METADATA_KEY, &json[..])];
        fs::write(&path, factors("transformer.", &[2, 4], &[4, 2], &metadata)).unwrap();
        let out = Command::new(program())
            .arg("inspect")
            .arg(&path)
            .output()
            .unwrap();
        let text = String::from_utf8(out.stderr).unwrap();
        assert_eq!(out.status.code(), Some(1), "{text:.500}");
        assert!(
            text.starts_with("error: ") && text.ends_with('\n'),
            "{text:.500}"
        );
        assert!(text.len() < 5000, "{} bytes", text.len());
        assert!(!text.trim_end().contains(char::is_control), "{text:.500}");
    }
}
