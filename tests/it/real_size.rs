//! Checks of a checkpoint of real size: its files are sparse, so they take no room, and whoever reads them or makes their
//! weights is seen by the bytes.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use burn::tensor::Device;
use flux_lora_tests::{CONFIG, Workbench, program, root};
use flux_model::families::{self, Visitor};
use flux_model::family::{ComponentFile, Family};
use flux_model::flux2::config::{Flux2AutoencoderConfig, Flux2Config};
use flux_model::pipeline::PipelineFolder;
use flux_model::text::decoder::DecoderConfig;
use serde_json::{Map, json};

/// The files of weights that a pipeline's configurations describe.
fn files(folder: &Path) -> Vec<ComponentFile> {
    struct Weights<'a>(&'a PipelineFolder);
    impl Visitor for Weights<'_> {
        type Output = Vec<ComponentFile>;
        fn visit<F: Family>(self) -> Self::Output {
            F::weights(self.0, &Device::flex()).unwrap()
        }
    }
    let pipeline = PipelineFolder::open(folder).unwrap();
    families::of_folder(&pipeline, Weights(&pipeline)).unwrap()
}

/// A safetensors file in bf16 with a true header and a hole for every weight; its size comes back.
fn write_sparse(path: &Path, tensors: &BTreeMap<String, Vec<usize>>) -> u64 {
    let (mut header, mut end) = (Map::new(), 0);
    for (name, shape) in tensors {
        let start = end;
        end += 2 * shape.iter().product::<usize>();
        let tensor = json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]});
        header.insert(name.clone(), tensor);
    }
    let header = serde_json::to_vec(&header).unwrap();
    let mut file = File::create(path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes())
        .unwrap();
    file.write_all(&header).unwrap();
    let size = (8 + header.len() + end) as u64;
    file.set_len(size).unwrap();
    size
}

/// The pipeline folder of a FLUX.2 klein 4B.
fn klein(folder: &Path) -> u64 {
    let template = root().join("tests/fixtures/parity/flux2_pipeline_distilled/model");
    for part in [
        "transformer",
        "text_encoder",
        "vae",
        "tokenizer",
        "scheduler",
    ] {
        fs::create_dir_all(folder.join(part)).unwrap();
        for entry in fs::read_dir(template.join(part)).unwrap() {
            let entry = entry.unwrap();
            if entry.path().extension() != Some("safetensors".as_ref()) {
                fs::copy(entry.path(), folder.join(part).join(entry.file_name())).unwrap();
            }
        }
    }
    let index = fs::read_to_string(template.join("model_index.json")).unwrap();
    let index = index.replace("\"is_distilled\": true", "\"is_distilled\": false");
    fs::write(folder.join("model_index.json"), index).unwrap();
    let configs = [
        ("transformer", json!(Flux2Config::klein_4b())),
        ("vae", json!(Flux2AutoencoderConfig::default())),
        ("text_encoder", json!(DecoderConfig::qwen3_4b())),
    ];
    for (part, config) in configs {
        fs::write(folder.join(part).join("config.json"), config.to_string()).unwrap();
    }
    let files = files(folder).into_iter();
    files
        .map(|(file, tensors)| write_sparse(&folder.join(file), &tensors))
        .sum()
}

/// A number of `/proc/PID/FILE`, while there is one.
fn number(process: u32, file: &str, key: &str) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{process}/{file}")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.split_whitespace().next()?.parse().ok()
}

#[test]
fn check_reads_headers_alone_and_makes_no_weight() {
    const MOST_READ: u64 = 64 << 20;
    const MOST_MEMORY_KB: u64 = 2 << 20;
    let bench = Workbench::new();
    let size = klein(&bench.path("klein"));
    assert!(size > 15_000_000_000, "{size} bytes are no klein 4B");
    bench.write_config(CONFIG);
    let model = format!("model.path={}", bench.path("klein").display());
    for kind in ["LORA", "LOKR"] {
        let kind = format!("lora.peft_type={kind}");
        let mut child = Command::new(program())
            .arg("check")
            .arg(bench.path("run.toml"))
            .arg("--output")
            .arg(bench.path("run"))
            .args(["--set", &model, "--set", &kind])
            .args(["--set", "lora.lora_dropout=0"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (mut read, mut memory) = (0, 0);
        while child.try_wait().unwrap().is_none() {
            read = number(child.id(), "io", "rchar:").unwrap_or(read);
            memory = number(child.id(), "status", "VmHWM:").unwrap_or(memory);
            if read > MOST_READ || memory > MOST_MEMORY_KB {
                child.kill().unwrap();
                child.wait().unwrap();
                panic!("{kind}: {read} bytes were read, {memory} kB in memory");
            }
            sleep(Duration::from_millis(5));
        }
        let out = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&out.stdout);
        assert!(out.status.success() && memory > 0, "{said}");
        assert!(said.contains("3875.5 million, frozen"), "{said}");
    }
}
