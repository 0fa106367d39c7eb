//! FLUX.2, klein and dev, is trained, resumed and sampled by the same words as FLUX.1.

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
fn klein_9b_kv_is_a_distilled_klein_and_refuses_only_what_it_reads_otherwise() {
    let bench = Workbench::new();
    let folder = bench.path("kv");
    flux_lora_tests::copy(&distilled(), &folder, &|_| true);
    let index = folder.join("model_index.json");
    let text = std::fs::read_to_string(&index).unwrap();
    let text = text.replace("Flux2KleinPipeline", "Flux2KleinKVPipeline");
    let kv = text.replace("  \"is_distilled\": true,\n", ""); // its class says so
    assert_ne!(kv, text);
    std::fs::write(&index, kv).unwrap();
    let (code, text) = run(&["inspect", folder.to_str().unwrap()]);
    assert!(code == Some(0) && text.contains("distilled"), "{text}");

    let path = format!("model.path={}", folder.display());
    let out = bench.train("run", "flex", &["--set", &path]);
    let error = String::from_utf8_lossy(&out.stderr);
    assert!(error.contains("FLUX.2-klein-base-"), "{error}");

    let out = bench.path("made.png");
    let size = ["--height", "48", "--width", "64", "--device", "flex"];
    let args = [
        &["sample", "--prompt", "snow", "--max-sequence-length", "16"][..],
        &["--model", folder.to_str().unwrap(), "--out"],
        &[out.to_str().unwrap()],
        &size,
    ]
    .concat();
    let (code, text) = run(&args);
    assert_eq!(code, Some(0), "{text}");
    let made = out.to_str().unwrap();
    let (code, text) = run(&[&args[..], &["--overwrite", "--reference", made]].concat());
    assert!(
        code == Some(1) && text.contains("FLUX.2-klein-9B reads them"),
        "{text}"
    );
}

/// A tiny dev pipeline.
fn dev() -> PathBuf {
    root().join("tests/fixtures/parity/flux2_pipeline_dev/model")
}

#[test]
fn dev_trains_resumes_exactly_and_its_lora_is_converted_merged_and_sampled() {
    let bench = Workbench::new();
    let path = format!("model.path={}", dev().display());
    let set = ["--set", &path, "--set", "train.steps=4"];
    let train = |run: &str, more: &[&str]| {
        bench.train_ok(run, "flex", &[&set[..], more].concat());
    };
    train("straight", &[]);
    let expected = bench.result("straight");
    bench.copy_run("straight", "resumed", |name| {
        name == "cache" || name == "metrics.jsonl" || name == "ckpt-0000000002"
    });
    train("resumed", &["--resume"]);
    let resumed = bench.result("resumed");
    resumed.assert_same(&expected, "dev, resumed after step 2");
    train("guided", &["--set", "train.guidance=4"]);
    assert_ne!(bench.result("guided").lora, expected.lora, "guidance");

    let lora = bench.path("straight/lora.safetensors");
    let (lora, model) = (lora.to_str().unwrap(), dev());
    let model = model.to_str().unwrap();
    let ok = |args: &[&str]| {
        let (code, text) = run(args);
        assert_eq!(code, Some(0), "{args:?}: {text}");
        text
    };
    let converted = bench.path("kohya.safetensors");
    let converted = converted.to_str().unwrap();
    let as_kohya = ["convert", lora, converted, "--to", "kohya"];
    ok(&[&as_kohya[..], &["--model", model]].concat());
    let text = ok(&["inspect", converted]);
    assert!(text.contains("flux_2_dev"), "{text}");
    let without = bench.path("without.safetensors");
    let without = without.to_str().unwrap();
    ok(&["convert", lora, without, "--to", "kohya"]);
    let text = ok(&["inspect", without]);
    assert!(!text.contains("klein") && !text.contains("Klein"), "{text}");
    let text = ok(&["inspect", model]);
    assert!(
        text.contains("Mistral, 4 layers") && text.contains("projector are not read"),
        "{text}"
    );
    let merged = bench.path("merged");
    let merged = merged.to_str().unwrap();
    ok(&["merge", "--model", model, "--lora", lora, "--out", merged]);
    let sample = |out: &str, args: &[&str]| {
        let out = bench.path(out);
        let all = [
            &[
                "sample", "--prompt", "a cat", "--steps", "2", "--device", "flex",
            ][..],
            &[
                "--height",
                "48",
                "--width",
                "64",
                "--max-sequence-length",
                "100",
            ],
            &["--out", out.to_str().unwrap()],
            args,
        ];
        ok(&all.concat());
        image::open(out).unwrap().to_rgb8()
    };
    let plain = sample("plain.png", &["--model", model]);
    let adapted = sample("adapted.png", &["--model", model, "--lora", lora]);
    assert_ne!(plain, adapted);
    let merged = sample("merged.png", &["--model", merged]);
    let far = adapted.iter().zip(merged.iter());
    assert!(far.clone().all(|(a, b)| a.abs_diff(*b) <= 1), "merged");
    let guided = sample("guided.png", &["--model", model, "--guidance", "1"]);
    assert_ne!(plain, guided);
}

#[test]
fn what_dev_lacks_is_named() {
    let bench = Workbench::new();
    let folder = bench.path("dev");
    flux_lora_tests::copy(&dev(), &folder, &|_| true);
    let refused = |word: &str| {
        let path = format!("model.path={}", folder.display());
        let out = bench.train("run", "flex", &["--set", &path]);
        let error = String::from_utf8_lossy(&out.stderr);
        assert!(!out.status.success() && error.contains(word), "{error}");
    };
    let tokenizer = folder.join("tokenizer/tokenizer.json");
    std::fs::rename(&tokenizer, folder.join("away.json")).unwrap();
    refused("tokenizer.json");
    std::fs::write(folder.join("tokenizer/tekken.json"), "{}").unwrap();
    refused("tekken.json");
    std::fs::rename(folder.join("away.json"), tokenizer).unwrap();
    // a text encoder of another width, such as another model's
    let config = folder.join("text_encoder/config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    let wider = text.replace(r#""hidden_size": 24"#, r#""hidden_size": 32"#);
    assert_ne!(text, wider);
    std::fs::write(&config, wider).unwrap();
    refused("text of width 72, the text encoder gives 96");
}
