//! What a start refuses or says before the work, and that a refused one changes nothing.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use flux_lora_tests::{Workbench, copy, program, root};

const FEW: [&str; 4] = [
    "--set",
    "train.steps=4",
    "--set",
    "lr_scheduler.warmup_steps=1",
];

fn text(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

/// The one line of an error.
fn error(out: &Output, code: i32) -> String {
    let text = text(out);
    assert_eq!(out.status.code(), Some(code), "{text}");
    let lines: Vec<&str> = text.lines().filter(|l| l.starts_with("error: ")).collect();
    assert_eq!(lines.len(), 1, "{text}");
    lines[0].to_string()
}

fn assert_says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
}

/// Every file below a folder.
fn content(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => files.extend(content(&path)),
            false => drop(files.insert(path.clone(), fs::read(&path).unwrap())),
        }
    }
    files
}

#[test]
fn a_refused_resume_changes_no_byte_of_the_run_folder() {
    let bench = Workbench::new();
    bench.train_ok("run", "flex", &FEW);
    let run = bench.path("run");
    // What a killed process leaves, and the lock of one that is no more.
    fs::write(run.join("LATEST.tmp-1-0"), "ckpt").unwrap();
    fs::write(run.join("run.lock"), "1\n").unwrap();
    let model = bench.path("model");
    let original = root().join("tests/fixtures/parity/pipeline_dev/model");
    copy(&original, &model, &|_| true);
    let weights = model.join("transformer/diffusion_pytorch_model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let end = bytes.len();
    bytes[end - 4] ^= 1;
    fs::write(&weights, bytes).unwrap();
    let model = format!("model.path={}", model.display());

    let before = content(&run);
    let refused = |args: &[&str], parts: &[&str]| {
        let out = bench.train("run", "flex", &[&FEW[..], &["--resume"], args].concat());
        assert_says(&error(&out, 1), parts);
        let after = content(&run);
        let names = |files: &BTreeMap<PathBuf, Vec<u8>>| files.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&after), names(&before), "{parts:?}");
        assert!(after == before, "{parts:?}");
    };
    refused(&["--set", "train.seed=8"], &["`train.seed`"]);
    refused(&["--set", "lora.r=8"], &["`lora.r`"]);
    refused(&["--set", &model], &["base model", "--adopt-data"]);
    refused(
        &["--set", "train.steps=3"],
        &["has done 4 steps", "asks for 3", "ask for 4 or more"],
    );
    fs::write(bench.path("data/0.txt"), "another caption").unwrap();
    refused(&[], &["0.png", "--adopt-data"]);
    // A start that is none: the folder already holds a run.
    let out = bench.train("run", "flex", &FEW);
    assert_says(&error(&out, 1), &["already holds checkpoints"]);
    assert!(content(&run) == before);
}

#[test]
fn what_is_done_and_what_is_left_is_said() {
    let bench = Workbench::new();
    let steps = |steps: &'static str| ["--set", steps, "--set", "lr_scheduler.warmup_steps=1"];
    bench.train_ok("run", "flex", &FEW);
    let again = bench.train("run", "flex", &[&FEW[..], &["--resume"]].concat());
    assert!(again.status.success());
    assert_says(
        &text(&again),
        &["all 4 steps are done", "nothing is left to do", "--steps"],
    );
    let more = bench.train(
        "run",
        "flex",
        &[&steps("train.steps=6")[..], &["--resume"]].concat(),
    );
    assert!(more.status.success());
    assert_says(&text(&more), &["the learning rate goes on at "]);

    let slow = [
        "--set",
        "train.steps=2",
        "--set",
        "lr_scheduler.warmup_steps=9",
    ];
    let slow = bench.train("slow", "flex", &slow);
    assert!(slow.status.success());
    assert_says(&text(&slow), &["warm-up", "never reaches it"]);
}

#[test]
fn no_file_of_the_users_is_overwritten() {
    let bench = Workbench::new();
    fs::create_dir(bench.path("mine")).unwrap();
    fs::write(bench.path("mine/lora.safetensors"), b"mine").unwrap();
    for output in ["mine", "data"] {
        let before = content(&bench.path(output));
        let message = error(&bench.train(output, "flex", &FEW), 1);
        assert_says(&message, &[output, "is not a run folder", "--output"]);
        assert!(content(&bench.path(output)) == before);
    }

    // A finished LoRA is replaced by a resume of its own run alone.
    bench.train_ok("run", "flex", &FEW);
    let lora = fs::read(bench.path("run/lora.safetensors")).unwrap();
    bench.copy_run("run", "kept", |name| !name.starts_with("ckpt-"));
    for args in [&FEW[..], &[&FEW[..], &["--resume"]].concat()] {
        let message = error(&bench.train("kept", "flex", args), 1);
        assert_says(&message, &["kept/lora", "checkpoints are gone"]);
    }
    assert!(fs::read(bench.path("kept/lora.safetensors")).unwrap() == lora);
}

#[test]
fn a_place_that_is_taken_is_refused_before_anything_is_encoded() {
    let bench = Workbench::new();
    for taken in ["cache", "samples"] {
        let run = bench.path(taken);
        fs::create_dir(&run).unwrap();
        fs::write(run.join("run.lock"), "").unwrap();
        fs::write(run.join(taken), "a file").unwrap();
        let message = error(&bench.train(taken, "flex", &FEW), 1);
        assert_says(&message, &[taken, "is not a folder"]);
        assert_eq!(content(&run).len(), 2);
    }
}

#[test]
fn what_headers_show_is_refused_before_anything_is_encoded() {
    let bench = Workbench::new();
    fs::write(bench.path("no-lora.safetensors"), b"").unwrap();
    let from = format!(
        "lora.init_from={}",
        bench.path("no-lora.safetensors").display()
    );
    let model = bench.path("model");
    let original = root().join("tests/fixtures/parity/pipeline_dev/model");
    copy(&original, &model, &|_| true);
    fs::remove_file(model.join("text_encoder_2/model.safetensors")).unwrap();
    let model = format!("model.path={}", model.display());
    for (set, parts) in [
        (
            "lora.target_modules=to_q",
            &["`to_q` matches no layer", "write a list: [\"to_q\"]"][..],
        ),
        (
            "lora.target_modules=[\"attn.to_qq\"]",
            &["`attn.to_qq`", "to_q"],
        ),
        (&from, &["no-lora.safetensors"]),
        (&model, &["text_encoder_2"]),
    ] {
        let args = [&FEW[..], &["--set", set]].concat();
        assert_says(&error(&bench.train("run", "flex", &args), 1), parts);
        assert!(!bench.path("run").exists(), "{set}");
    }
    // A folder that is there already stays empty.
    fs::create_dir(bench.path("run")).unwrap();
    let args = [&FEW[..], &["--set", &model]].concat();
    error(&bench.train("run", "flex", &args), 1);
    assert!(content(&bench.path("run")).is_empty());
}

#[test]
fn a_place_for_an_image_is_tried_before_the_work() {
    let bench = Workbench::new();
    fs::write(bench.path("mine.png"), b"mine").unwrap();
    let model = root().join("tests/fixtures/parity/pipeline_dev/model");
    let sample = |out: &str, more: &[&str]| {
        Command::new(program())
            .args(["sample", "--prompt", "a cat", "--steps", "1"])
            .args([
                "--height",
                "32",
                "--width",
                "32",
                "--max-sequence-length",
                "16",
            ])
            .arg("--model")
            .arg(&model)
            .arg("--out")
            .arg(bench.path(out))
            .args(more)
            .output()
            .unwrap()
    };
    assert_says(&error(&sample("a.gif", &[]), 2), &[".png, .jpg or .webp"]);
    assert_says(&error(&sample("mine.png", &[]), 2), &["--overwrite"]);
    assert_says(
        &error(&sample("mine.png/x.png", &[]), 1),
        &["mine.png/x.png"],
    );
    assert_eq!(fs::read(bench.path("mine.png")).unwrap(), b"mine");
    for (name, magic) in [
        ("new/a.jpg", &b"\xff\xd8\xff"[..]),
        ("mine.png", b"\x89PNG"),
    ] {
        let out = sample(name, &["--overwrite"]);
        assert!(out.status.success(), "{}", text(&out));
        assert!(fs::read(bench.path(name)).unwrap().starts_with(magic));
    }
}

/// Every preset trains a step of a tiny model of its family.
#[test]
fn every_preset_trains() {
    let bench = Workbench::new();
    let parity = root().join("tests/fixtures/parity");
    let small = [
        "dataset.resolution=64",
        "dataset.bucket_step=16",
        "dataset.max_sequence_length=16",
        "lora.r=4",
        "train.steps=1",
    ];
    let folder = root().join("presets").read_dir().unwrap();
    let mut count = 0;
    for preset in folder.map(|file| file.unwrap().path()) {
        let name = preset.file_stem().unwrap().to_str().unwrap();
        let model = match name.starts_with("klein") {
            true => "flux2_pipeline_distilled/model",
            false => "pipeline_dev/model",
        };
        let text = format!(
            "[model]\npath = \"{}\"\n[dataset]\npath = \"data\"\n",
            parity.join(model).display()
        );
        fs::write(bench.path("run.toml"), text).unwrap();
        let mut args = vec!["--preset", name, "--yes-distilled"];
        args.extend(small.iter().flat_map(|set| ["--set", set]));
        bench.train_ok(name, "flex", &args);
        let config = fs::read_to_string(bench.path(name).join("config.toml")).unwrap();
        assert!(
            config.contains("timestep_sampling = \"sigmoid\""),
            "{name}: {config}"
        );
        count += 1;
    }
    assert!(count > 0);
}
