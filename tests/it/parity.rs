//! Every bundled reference case, on every backend that is compiled in.

use std::path::{Path, PathBuf};
use std::process::Command;

use flux_lora_tests::{program, root};

fn cases() -> Vec<PathBuf> {
    let mut cases = Vec::new();
    let mut folders = vec![root().join("tests/fixtures/parity")];
    while let Some(folder) = folders.pop() {
        if folder.join("case.json").is_file() {
            cases.push(folder.clone());
        }
        folders.extend(
            folder
                .read_dir()
                .unwrap()
                .map(|entry| entry.unwrap().path())
                .filter(|path| path.is_dir()),
        );
    }
    cases.sort();
    cases
}

fn kind(case: &Path) -> String {
    let json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(case.join("case.json")).unwrap()).unwrap();
    json["kind"].as_str().unwrap().to_string()
}

fn run(device: &str, scale: &str, cases: &[PathBuf]) {
    assert!(!cases.is_empty());
    let out = Command::new(program())
        .args(["parity", "--device", device, "--tolerance-scale", scale])
        .args(cases)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    let bad: Vec<&str> = text
        .lines()
        .filter(|line| line.contains("FAIL") || line.contains("cannot be read"))
        .collect();
    assert!(
        out.status.success() && bad.is_empty(),
        "{}\n{}",
        bad.join("\n"),
        String::from_utf8_lossy(&out.stderr)
    );
}

#[test]
fn flex_agrees_with_diffusers() {
    run("flex", "1", &cases());
}

#[cfg(feature = "ndarray")]
#[test]
fn ndarray_agrees_with_diffusers() {
    run("ndarray", "1", &cases());
}

#[cfg(feature = "wgpu")]
#[test]
fn wgpu_agrees_with_diffusers() {
    let networks = [
        "transformer_forward",
        "lora_forward",
        "lora_format",
        "train",
    ];
    let cases: Vec<PathBuf> = cases()
        .into_iter()
        .filter(|case| networks.contains(&kind(case).as_str()))
        .collect();
    run("wgpu", "2", &cases);
}

#[test]
fn a_wrong_expectation_fails_and_exits_with_1() {
    let dir = tempfile::tempdir().unwrap();
    let case = root().join("tests/fixtures/parity/scheduler_schnell");
    flux_lora_tests::copy(&case, &dir.path().join("case"), &|_| true);
    let path = dir.path().join("case/expected.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let last = bytes.len() - 1; // the exponent of the last number
    bytes[last] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let out = Command::new(program())
        .arg("parity")
        .arg(dir.path().join("case"))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    assert_eq!(out.status.code(), Some(1), "{text}");
    assert!(
        text.contains("FAIL") && text.lines().last().unwrap().ends_with(" 1 failed"),
        "{text}"
    );
}

#[test]
fn an_unreadable_case_exits_with_2() {
    let out = Command::new(program())
        .args(["parity", "/nowhere"])
        .output()
        .unwrap();
    assert_eq!(out.status.code(), Some(2));
}

#[test]
fn the_kinds_bundled_are_all_kinds() {
    let kinds: std::collections::BTreeSet<String> = cases().iter().map(|case| kind(case)).collect();
    for wanted in [
        "transformer_forward",
        "single_file_transformer",
        "vae",
        "clip_text",
        "t5_encoder",
        "tokenizer",
        "scheduler",
        "pipeline",
        "lora_forward",
        "train",
    ] {
        assert!(kinds.contains(wanted), "{wanted}");
    }
}
