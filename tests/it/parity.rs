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

/// Runs a copy of a bundled case after a change of its `case.json`: exit code and output.
fn changed(name: &str, change: impl Fn(&mut serde_json::Value)) -> (Option<i32>, String) {
    let dir = tempfile::tempdir().unwrap();
    let case = root().join("tests/fixtures/parity").join(name);
    flux_lora_tests::copy(&case, &dir.path().join("case"), &|_| true);
    let path = dir.path().join("case/case.json");
    let mut json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    if let Some(model) = json.pointer_mut("/model/path") {
        *model = case.join(model.as_str().unwrap()).to_str().unwrap().into();
    }
    change(&mut json);
    std::fs::write(&path, json.to_string()).unwrap();
    let out = Command::new(program())
        .arg("parity")
        .arg(dir.path().join("case"))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    (out.status.code(), text)
}

#[test]
fn what_a_case_leaves_out_is_an_error_that_names_the_key() {
    for (case, table, key) in [
        ("train_plain", "/optimizer", "warmup"),
        ("train_plain", "/optimizer", "weighting_scheme"),
        ("train_plain", "", "tolerance"),
        (
            "timestep_sampling_dev",
            "/schemes/logit_normal",
            "logit_std",
        ),
        ("pipeline_dev", "/call", "guidance_scale"),
        ("scheduler_schnell", "/runs/0", "image_seq_len"),
        ("scheduler_schnell", "", "tolerance"),
    ] {
        let (code, text) = changed(case, |json| {
            let table = json.pointer_mut(table).unwrap().as_object_mut().unwrap();
            table.remove(key).unwrap();
        });
        let named = format!("FAIL case.json has no `{table}/{key}");
        assert_eq!(code, Some(1), "{case} {key}: {text}");
        assert!(text.contains(&named), "{case} {key}: {text}");
    }
}

#[test]
fn an_unknown_kind_family_or_scheme_fails() {
    for (key, value, says) in [
        ("/kind", "dreams", "unknown kind `dreams`"),
        ("/family", "flux9", "unknown family `flux9`"),
    ] {
        let (code, text) = changed("transformer_dev", |json| {
            json[&key[1..]] = value.into();
        });
        assert_eq!(code, Some(1), "{text}");
        assert!(text.contains(says), "{text}");
    }
    let (code, text) = changed("timestep_sampling_dev", |json| {
        json["schemes"]["logit_normal_2"] = serde_json::json!({});
    });
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("unknown scheme `logit_normal_2`"), "{text}");
}

#[test]
fn a_prompt_may_be_a_list() {
    let (code, text) = changed("pipeline_dev", |json| {
        let prompt = json["call"]["prompt"].clone();
        json["call"]["prompt"] = vec![prompt.clone()].into();
        json["call"]["prompt_2"] = vec![prompt].into();
    });
    assert_eq!(code, Some(0), "{text}");
    let (code, text) = changed("pipeline_dev", |json| {
        let prompt = json["call"]["prompt"].clone();
        json["call"]["prompt"] = vec![prompt; 2].into();
    });
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("not one row a prompt"), "{text}");
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
        "qwen3_text",
        "tokenizer",
        "scheduler",
        "pipeline",
        "lora_forward",
        "train",
    ] {
        assert!(kinds.contains(wanted), "{wanted}");
    }
}

#[test]
fn the_first_help_page_is_for_those_who_use_the_program() {
    let out = Command::new(program()).arg("--help").output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    let commands = text.split("Options:").next().unwrap();
    assert!(commands.contains("\n  train "), "{text}");
    for hidden in ["parity", "bench", "random-weights"] {
        assert!(!commands.contains(hidden), "{hidden}: {text}");
        let out = Command::new(program()).args([hidden, "--help"]).output();
        assert!(out.unwrap().status.success(), "{hidden}");
    }
}
