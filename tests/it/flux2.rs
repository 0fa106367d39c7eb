//! FLUX.2 klein is trained, resumed and sampled by the same words as FLUX.1.

use std::path::{Path, PathBuf};
use std::process::Command;

use flux_lora_tests::{Workbench, program, root};

/// A tiny klein pipeline.
fn model() -> PathBuf {
    root().join("tests/fixtures/parity/flux2_pipeline_distilled/model")
}

/// Trains 12 steps of it.
fn train(bench: &Workbench, run: &str, args: &[&str]) {
    let path = format!("model.path={}", model().display());
    let targets = r#"lora.target_modules=["to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj", "attn.to_out"]"#;
    let settings = ["--set", &path, "--set", "train.steps=12", "--set", targets];
    bench.train_ok(run, "flex", &[&settings, args].concat());
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
    train(&bench, "plain", &["--set", "train.recompute=false"]);
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
            .arg(model());
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
    flux_lora_tests::copy(&model(), &folder, &|_| true);
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
