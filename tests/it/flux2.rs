//! FLUX.2 klein is trained, resumed and sampled by the same words as FLUX.1.

use std::path::{Path, PathBuf};
use std::process::Command;

use flux_lora_tests::{Workbench, program, root};

/// A tiny distilled klein pipeline.
fn distilled() -> PathBuf {
    root().join("tests/fixtures/parity/flux2_pipeline_distilled/model")
}

/// The same as one that was not distilled.
fn base(bench: &Workbench) -> PathBuf {
    let folder = bench.path("klein-base");
    if !folder.is_dir() {
        flux_lora_tests::copy(&distilled(), &folder, &|_| true);
        let index = folder.join("model_index.json");
        let text = std::fs::read_to_string(&index).unwrap();
        let text = text.replace(r#""is_distilled": true"#, r#""is_distilled": false"#);
        std::fs::write(&index, text).unwrap();
    }
    folder
}

/// Trains 12 steps of it.
fn train(bench: &Workbench, run: &str, args: &[&str]) {
    let path = format!("model.path={}", base(bench).display());
    let settings = ["--set", &path, "--set", "train.steps=12"];
    bench.train_ok(run, "flex", &[&settings, args].concat());
}

fn run(args: &[&str]) -> (Option<i32>, String) {
    let done = Command::new(program()).args(args).output().unwrap();
    let text = [done.stdout, done.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    (done.status.code(), text)
}

#[test]
fn a_distilled_klein_is_trained_on_only_where_that_is_meant() {
    let bench = Workbench::new();
    let path = format!("model.path={}", distilled().display());
    let set = ["--set", &path, "--set", "train.steps=1"];
    let out = bench.train("run", "flex", &set);
    let error = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(2), "{error}");
    assert!(error.contains("FLUX.2-klein-base-4B"), "{error}");
    assert!(!bench.path("run/cache").exists());
    bench.train_ok("run", "flex", &[&set[..], &["--yes-distilled"]].concat());
    bench.train_ok(
        "run",
        "flex",
        &[&set[..], &["--resume", "--steps", "2"]].concat(),
    );
}

#[test]
fn klein_adapts_the_layers_of_its_training_script_and_the_run_says_which() {
    let bench = Workbench::new();
    train(&bench, "run", &["--steps", "1"]);
    let bytes = std::fs::read(bench.path("run/lora.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let keys: Vec<&str> = file.names().into_iter().collect();
    // A and B of four layers of 2 double blocks and of two layers of 2 single blocks
    assert_eq!(keys.len(), 2 * (2 * 4 + 2 * 2), "{keys:?}");
    assert!(keys.iter().all(|key| !key.contains("add_")), "{keys:?}");
    let config = std::fs::read_to_string(bench.path("run/config.toml")).unwrap();
    assert!(config.contains("attn.to_qkv_mlp_proj"), "{config}");
}

#[test]
fn a_klein_folder_is_described_by_what_it_has() {
    let (code, text) = run(&["inspect", distilled().to_str().unwrap()]);
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("text_encoder: 57 tensors"), "{text}");
    assert!(
        !text.contains("text_encoder_2") && !text.contains("cannot"),
        "{text}"
    );
}

#[test]
fn klein_resumes_exactly_and_recompute_changes_no_bit() {
    let bench = Workbench::new();
    train(&bench, "straight", &[]);
    let expected = bench.result("straight");
    assert_eq!(expected.metrics.lines().count(), 12);
    for step in [1, 6, 11] {
        let run = format!("resumed-{step}");
        let checkpoint = format!("ckpt-{step:010}");
        bench.copy_run("straight", &run, |name| {
            name == "cache" || name == "metrics.jsonl" || name == checkpoint
        });
        train(&bench, &run, &["--resume"]);
        let what = format!("klein, resumed after step {step}");
        bench.result(&run).assert_same(&expected, &what);
    }
    train(&bench, "plain", &["--set", "memory.recompute=none"]);
    let plain = bench.result("plain");
    plain.assert_same(&expected, "klein, without recompute");
}

#[test]
fn klein_is_sampled_with_what_was_trained() {
    let bench = Workbench::new();
    train(&bench, "run", &["--set", "optimizer.learning_rate=0.05"]);
    let sample = |out: &str, lora: Option<&Path>| {
        let mut command = Command::new(program());
        command.args([
            "sample",
            "--prompt",
            "a photo of pattern 1",
            "--device",
            "flex",
        ]);
        command.args(["--steps", "2", "--height", "48", "--width", "64"]);
        command
            .args(["--max-sequence-length", "16", "--model"])
            .arg(distilled());
        if let Some(lora) = lora {
            command.arg("--lora").arg(lora);
        }
        let done = command.arg("--out").arg(bench.path(out)).output().unwrap();
        let error = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "{error}");
        image::open(bench.path(out)).unwrap().to_rgb8()
    };
    let plain = sample("plain.png", None);
    assert_eq!(plain.dimensions(), (64, 48));
    let adapted = sample("adapted.png", Some(&bench.path("run/lora.safetensors")));
    assert_ne!(plain, adapted);
}

#[test]
fn dev_is_refused_by_what_it_lacks() {
    let bench = Workbench::new();
    let folder = bench.path("dev");
    flux_lora_tests::copy(&distilled(), &folder, &|_| true);
    let index = folder.join("model_index.json");
    let text = std::fs::read_to_string(&index).unwrap();
    std::fs::write(&index, text.replace("Flux2KleinPipeline", "Flux2Pipeline")).unwrap();
    let path = format!("model.path={}", folder.display());
    let out = bench.train("run", "flex", &["--set", &path]);
    let error = String::from_utf8_lossy(&out.stderr);
    assert!(
        !out.status.success() && error.contains("Mistral"),
        "{error}"
    );
}
