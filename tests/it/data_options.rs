//! Ways to see the same pictures: several folders, sizes, crops, captions in other words. Each does what it says, and resumes.

use std::fs;
use std::process::Command;

use flux_lora_tests::{RunResult, Workbench};
use serde_json::Value;

/// Five pictures, one a step.
const ONE_BY_ONE: [&str; 3] = [
    "--set=train.steps=12",
    "--set=train.batch_size=1",
    "--set=train.gradient_accumulation_steps=1",
];

fn with<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&ONE_BY_ONE[..], more].concat()
}

/// Entries in the cache of a run whose name begins so.
fn cached(bench: &Workbench, run: &str, kind: &str) -> usize {
    let entries = fs::read_dir(bench.path(run).join("cache")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with(kind)).count()
}

/// The step that begins the second epoch.
fn second_epoch(result: &RunResult) -> u64 {
    let lines = result.metrics.lines();
    let mut lines = lines.map(|line| serde_json::from_str::<Value>(line).unwrap());
    let line = lines.find(|line| line["epoch"] == 1).unwrap();
    line["step"].as_u64().unwrap()
}

/// Trains, and again from the middle.
fn trained(bench: &Workbench, run: &str, settings: &[&str]) -> RunResult {
    bench.train_ok(run, "flex", settings);
    let expected = bench.result(run);
    let again = format!("{run}-again");
    bench.copy_run(run, &again, |name| {
        ["cache", "metrics.jsonl", "ckpt-0000000005"].contains(&name)
    });
    bench.train_ok(&again, "flex", &[settings, &["--resume"]].concat());
    bench.result(&again).assert_same(&expected, run);
    expected
}

#[test]
fn every_resolution_is_trained_on() {
    let bench = Workbench::new();
    let plain = trained(&bench, "plain", &with(&["--set=dataset.random_flip=false"]));
    assert_eq!(second_epoch(&plain), 6);
    let several = [
        "--set=dataset.resolution=[64, 96]",
        "--set=dataset.random_flip=false",
    ];
    let several = trained(&bench, "several", &with(&several));
    assert_eq!(second_epoch(&several), 11);
    assert_eq!(cached(&bench, "plain", "latents"), 5);
    assert_eq!(cached(&bench, "several", "latents"), 10);
}

#[test]
fn crops_and_captions_vary_as_far_as_they_are_told_to() {
    let bench = Workbench::new();
    for i in 0..5 {
        let caption = format!("a photo, of pattern {i}, with waves, in colours");
        fs::write(bench.path(&format!("data/{i}.txt")), caption).unwrap();
    }
    let no_flip = "--set=dataset.random_flip=false";
    let plain = trained(&bench, "plain", &with(&[no_flip]));
    let crops = trained(
        &bench,
        "crops",
        &with(&[no_flip, "--set=dataset.random_crops=4"]),
    );
    assert_eq!(cached(&bench, "crops", "latents"), 20);
    assert_ne!(plain.metrics, crops.metrics);
    // Five captions and the empty one, for dropout.
    assert_eq!(cached(&bench, "plain", "text"), 6);
    let words = [
        no_flip,
        "--set=dataset.shuffle_caption=true",
        "--set=dataset.keep_tokens=1",
        "--set=dataset.caption_tag_dropout_rate=0.2",
        "--set=dataset.caption_variants=6",
    ];
    let words = trained(&bench, "words", &with(&words));
    assert!((15..=31).contains(&cached(&bench, "words", "text")));
    assert_ne!(plain.metrics, words.metrics);
    let trigger = [no_flip, "--set=dataset.trigger_word=ohwx"];
    let trigger = trained(&bench, "trigger", &with(&trigger));
    assert_eq!(cached(&bench, "trigger", "text"), 6);
    assert_ne!(plain.metrics, trigger.metrics);
}

#[test]
fn folders_have_repeats_weights_and_words_of_their_own() {
    let bench = Workbench::new();
    let second = bench.path("second");
    fs::create_dir(&second).unwrap();
    for i in [3, 4] {
        for kind in ["png", "txt"] {
            let name = format!("{i}.{kind}");
            fs::rename(bench.path("data").join(&name), second.join(&name)).unwrap();
        }
    }
    let folders = |more: &str| {
        let text = flux_lora_tests::CONFIG.replacen(
            "[dataset]",
            &format!(
                "[[dataset.folders]]\npath = \"data\"\n[[dataset.folders]]\npath = \"second\"\n{more}\n[dataset]"
            ),
            1,
        );
        // The sections of `folders` belong to `dataset`, which is written after them.
        let model = flux_lora_tests::root().join("tests/fixtures/parity/pipeline_dev/model");
        let head = format!("[model]\npath = \"{}\"\n", model.display());
        fs::write(bench.path("run.toml"), head + &text).unwrap();
    };
    folders("");
    let once = trained(&bench, "once", &ONE_BY_ONE);
    assert_eq!(second_epoch(&once), 6);
    folders("repeats = 3");
    let repeated = trained(&bench, "repeated", &ONE_BY_ONE);
    assert_eq!(second_epoch(&repeated), 3 + 2 * 3 + 1);
    folders("loss_weight = 4.0");
    let weighted = trained(&bench, "weighted", &ONE_BY_ONE);
    let losses = |run: &RunResult| -> Vec<f64> {
        let lines = run.metrics.lines();
        let lines = lines.map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines.map(|line| line["loss"].as_f64().unwrap()).collect()
    };
    let (once, weighted) = (losses(&once), losses(&weighted));
    let factor = weighted[0] / once[0];
    assert!(
        (factor - 1.0).abs() < 1e-6 || (factor - 4.0).abs() < 1e-6,
        "{factor}"
    );
    assert_ne!(once, weighted);
    folders("trigger_word = \"ohwx\"");
    trained(&bench, "triggered", &ONE_BY_ONE);

    // A sample is named with its folder.
    fs::write(second.join("3.png"), "no picture").unwrap();
    let out = bench.train("refused", "flex", &ONE_BY_ONE);
    let text = String::from_utf8_lossy(&out.stderr);
    assert!(
        !out.status.success() && text.contains("second/3.png"),
        "{text}"
    );
}

#[test]
fn a_cache_filled_beforehand_is_what_training_uses() {
    let bench = Workbench::new();
    let out = Command::new(flux_lora_tests::program())
        .arg("cache")
        .arg(bench.path("run.toml"))
        .arg("--output")
        .arg(bench.path("filled"))
        .args(["--set", "validation.share=0.2"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    let said = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name));
        line.unwrap().rsplit(' ').next().unwrap().to_string()
    };
    assert_eq!(said("trained samples:"), "4", "{text}");
    assert_eq!(said("held out samples:"), "1", "{text}");
    let entries = |run: &str| (cached(&bench, run, "latents"), cached(&bench, run, "text"));
    assert_eq!(entries("filled"), (10, 6));
    // Nothing of it is written again.
    let filled = bench.path("filled/cache");
    let stamp = |name: &str| fs::metadata(filled.join(name)).unwrap().modified().unwrap();
    let names: Vec<String> = fs::read_dir(&filled)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".safetensors"))
        .collect();
    let before: Vec<_> = names.iter().map(|name| stamp(name)).collect();
    bench.train_ok("filled", "flex", &ONE_BY_ONE);
    bench.train_ok("straight", "flex", &ONE_BY_ONE);
    let straight = bench.result("straight");
    bench
        .result("filled")
        .assert_same(&straight, "from a cache that was there");
    assert_eq!(
        names.iter().map(|name| stamp(name)).collect::<Vec<_>>(),
        before
    );
    assert_eq!(entries("filled"), entries("straight"));
}

#[test]
fn images_that_cannot_be_read_are_left_out_when_that_is_meant() {
    let bench = Workbench::new();
    let good = fs::read(bench.path("data/0.png")).unwrap();
    fs::write(bench.path("data/1.png"), "").unwrap();
    fs::write(bench.path("data/3.png"), &good[..good.len() / 2]).unwrap();
    let refused = bench.train("run", "flex", &ONE_BY_ONE);
    let text = String::from_utf8_lossy(&refused.stderr);
    assert!(
        !refused.status.success() && text.contains("1.png"),
        "{text}"
    );

    let out = bench.train("run", "flex", &with(&["--skip-bad"]));
    let text = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{text}");
    assert!(text.contains("1.png") && text.contains("3.png"), "{text}");
    let config = fs::read_to_string(bench.path("run/config.toml")).unwrap();
    let pinned = "skip = [\n    \"1.png\",\n    \"3.png\",\n]";
    assert!(config.contains(pinned), "{config}");
    let expected = bench.result("run");
    assert_eq!(second_epoch(&expected), 4);

    // A resumed run keeps the list, also when a file on it has been mended.
    fs::write(bench.path("data/3.png"), &good).unwrap();
    bench.copy_run("run", "again", |name| {
        ["cache", "metrics.jsonl", "ckpt-0000000005"].contains(&name)
    });
    bench.train_ok("again", "flex", &with(&["--resume"]));
    bench.result("again").assert_same(&expected, "resumed");

    fs::write(bench.path("data/1.png"), &good).unwrap();
    let out = bench.train("other", "flex", &with(&["--set=dataset.skip=['no.png']"]));
    let text = String::from_utf8_lossy(&out.stderr);
    assert!(
        !out.status.success() && text.contains("no image of the dataset"),
        "{text}"
    );
}

#[test]
fn rates_of_layers_have_factors() {
    let bench = Workbench::new();
    let frozen = with(&["--set=optimizer.lr_pattern.\"single_transformer_blocks.*\"=0.0"]);
    let frozen = trained(&bench, "frozen", &frozen);
    let plain = trained(&bench, "plain", &ONE_BY_ONE);
    let faster = trained(
        &bench,
        "faster",
        &with(&["--set=optimizer.loraplus_lr_ratio=8"]),
    );
    assert!(plain.lora != faster.lora && plain.lora != frozen.lora);
    let nothing = with(&["--set=optimizer.lr_pattern.\"no_such_layer\"=0.5"]);
    let out = bench.train("refused", "flex", &nothing);
    let text = String::from_utf8_lossy(&out.stderr);
    assert!(
        !out.status.success() && text.contains("matches no layer"),
        "{text}"
    );
}
