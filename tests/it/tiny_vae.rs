//! The tiny autoencoder in a run: for previews, and in place of the model's own.

use std::fs;

use flux_lora_tests::{CONFIG, Workbench, copy, root};

const FEW: [&str; 3] = [
    "--set=train.steps=2",
    "--set=lr_scheduler.warmup_steps=0",
    "--set=checkpoint.every=2",
];
const SAMPLE: &str = "[sample]\nprompts = [\"a photo\"]\nevery = 2\nnum_inference_steps = 2\nheight = 64\nwidth = 64\n";

#[test]
fn previews_are_decoded_by_the_autoencoder_that_is_named_for_them() {
    let bench = Workbench::new();
    bench.write_config(&format!("{CONFIG}\n{SAMPLE}"));
    let tiny = root().join("tests/fixtures/parity/tiny_vae/model");
    let named = format!("--set=sample.preview_vae={}", tiny.display());
    bench.train_ok("own", "flex", &FEW);
    bench.train_ok("tiny", "flex", &[&FEW[..], &[&named]].concat());
    bench
        .result("tiny")
        .assert_same(&bench.result("own"), "with previews by another autoencoder");
    let preview = |run: &str| {
        let path = bench.path(run).join("samples/step-0000002-0.png");
        image::open(path).unwrap().to_rgb8()
    };
    assert_eq!(preview("tiny").dimensions(), preview("own").dimensions());
    assert!(preview("tiny") != preview("own"));
    let refused = |named: &str, parts: &[&str]| {
        let out = bench.train("refused", "flex", &[&FEW[..], &[named]].concat());
        let text = String::from_utf8_lossy(&out.stderr).to_string();
        assert_eq!(out.status.code(), Some(1), "{text}");
        for part in parts {
            assert!(text.contains(part), "`{part}` is not in: {text}");
        }
        assert!(
            !bench.path("refused/cache").exists(),
            "refused before the work"
        );
    };
    let other = bench.path("other");
    copy(&tiny, &other, &|_| true);
    let config = fs::read_to_string(other.join("config.json")).unwrap();
    let config = config.replace("\"latent_channels\": 16", "\"latent_channels\": 4");
    fs::write(other.join("config.json"), config).unwrap();
    refused(
        &format!("--set=sample.preview_vae={}", other.display()),
        &["sample.preview_vae", "of 4 channels", "the model's have 16"],
    );
    refused(
        "--set=sample.preview_vae=nowhere",
        &["sample.preview_vae", "nowhere"],
    );
}

#[test]
fn a_run_encodes_with_the_tiny_autoencoder_in_place_of_the_models_own() {
    let bench = Workbench::new();
    let tiny = root().join("tests/fixtures/parity/tiny_vae/model");
    let named = format!("--set=model.vae={}", tiny.display());
    bench.train_ok("own", "flex", &FEW);
    bench.train_ok("tiny", "flex", &[&FEW[..], &[&named]].concat());
    let (own, tiny) = (bench.result("own"), bench.result("tiny"));
    assert!(own.metrics != tiny.metrics, "other latents, other losses");
}
