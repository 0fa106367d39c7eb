//! LoRA files of other programs, as a user meets them.

use std::path::PathBuf;
use std::process::Command;

use flux_lora_tests::{Workbench, program, root};

/// Made by PEFT and saved by diffusers (`tests/reference/make_lora.py`): rank 4, alpha 6.
fn diffusers_lora() -> PathBuf {
    root().join("tests/fixtures/parity/lora_from_script/lora.safetensors")
}

#[test]
fn a_lora_made_by_diffusers_trains_on_here() {
    let bench = Workbench::new();
    let from = format!("lora.init_from=\"{}\"", diffusers_lora().display());
    let few = [
        "--set",
        "train.steps=4",
        "--set",
        "lr_scheduler.warmup_steps=1",
        "--set",
        &from,
    ];
    let wrong = bench.train("wrong", "flex", &few);
    let message = String::from_utf8_lossy(&wrong.stderr).to_string();
    assert_eq!(wrong.status.code(), Some(1), "{message}");
    assert!(
        message.contains("is 7 in the configuration but 6 in the stored adapter"),
        "{message}"
    );

    bench.train_ok(
        "run",
        "flex",
        &[
            &few[..],
            &[
                "--set",
                "lora.lora_alpha=6",
                "--set",
                "export.formats=[\"kohya\", \"peft\"]",
            ],
        ]
        .concat(),
    );
    assert!(bench.path("run/lora-kohya.safetensors").is_file());
    let peft = Command::new(program())
        .arg("inspect")
        .arg(bench.path("run/lora-peft"))
        .output()
        .unwrap();
    assert!(
        String::from_utf8_lossy(&peft.stdout).contains("format PEFT"),
        "{peft:?}"
    );
    let tensors = |path: PathBuf| lora_core::files::safetensors::TensorFile::open(&path).unwrap();
    let (before, after) = (
        tensors(diffusers_lora()),
        tensors(bench.path("run/lora.safetensors")),
    );
    assert_eq!(
        before.names().collect::<Vec<_>>(),
        after.names().collect::<Vec<_>>()
    );
    for name in before.names() {
        let (before, after) = (
            before.read(name).unwrap().to_f32(),
            after.read(name).unwrap().to_f32(),
        );
        let change: f32 = before
            .iter()
            .zip(&after)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        assert!(change > 0.0 && change < 0.02, "{name} changed by {change}");
    }
}

#[test]
fn every_written_format_samples_to_the_same_image() {
    let dir = tempfile::tempdir().unwrap();
    let model = root().join("tests/fixtures/parity/pipeline_dev/model");
    let run = |args: &[&str]| {
        let out = Command::new(program())
            .args(args)
            .current_dir(dir.path())
            .output()
            .unwrap();
        assert!(
            out.status.success(),
            "{args:?}: {}",
            String::from_utf8_lossy(&out.stderr)
        );
    };
    let (model, lora) = (model.to_str().unwrap(), diffusers_lora());
    run(&[
        "convert",
        lora.to_str().unwrap(),
        "x.safetensors",
        "--to",
        "all",
        "--model",
        model,
    ]);
    let mut images = Vec::new();
    for file in [
        lora.to_str().unwrap(),
        "x-diffusers.safetensors",
        "x-peft",
        "x-kohya.safetensors",
        "x-comfyui.safetensors",
    ] {
        let lora = format!("{file}=0.7");
        run(&[
            "sample",
            "--model",
            model,
            "--lora",
            &lora,
            "--prompt",
            "a cat",
            "--steps",
            "2",
            "--height",
            "48",
            "--width",
            "64",
            "--max-sequence-length",
            "16",
            "--out",
            "x.png",
        ]);
        images.push((
            file.to_string(),
            image::open(dir.path().join("x.png")).unwrap().to_rgb8(),
        ));
    }
    run(&[
        "sample",
        "--model",
        model,
        "--prompt",
        "a cat",
        "--steps",
        "2",
        "--height",
        "48",
        "--width",
        "64",
        "--max-sequence-length",
        "16",
        "--out",
        "base.png",
    ]);
    let base = image::open(dir.path().join("base.png")).unwrap().to_rgb8();
    assert_ne!(base, images[0].1, "the LoRA changes the image");
    for (file, image) in &images[1..] {
        let off = image
            .iter()
            .zip(images[0].1.iter())
            .map(|(a, b)| a.abs_diff(*b))
            .max()
            .unwrap();
        assert!(off <= 1, "{file}: {off} levels off");
    }
}

#[test]
fn a_merged_model_samples_as_the_model_with_the_lora_and_keeps_its_files() {
    let dir = tempfile::tempdir().unwrap();
    let model = root().join("tests/fixtures/parity/pipeline_dev/model");
    let run = |args: &[&str]| {
        let out = Command::new(program())
            .args(args)
            .current_dir(dir.path())
            .output()
            .unwrap();
        assert!(
            out.status.success(),
            "{args:?}: {}",
            String::from_utf8_lossy(&out.stderr)
        );
    };
    let lora = format!("{}=0.7", diffusers_lora().display());
    let model_path = model.to_str().unwrap();
    run(&[
        "merge", "--model", model_path, "--lora", &lora, "--out", "merged",
    ]);
    let settings = [
        "--prompt",
        "a cat",
        "--steps",
        "2",
        "--height",
        "48",
        "--width",
        "64",
        "--max-sequence-length",
        "16",
    ];
    run(&[
        &[
            "sample", "--model", model_path, "--lora", &lora, "--out", "lora.png",
        ][..],
        &settings,
    ]
    .concat());
    run(&[
        &["sample", "--model", "merged", "--out", "merged.png"][..],
        &settings,
    ]
    .concat());
    let image = |name: &str| image::open(dir.path().join(name)).unwrap().to_rgb8();
    let off = image("lora.png")
        .iter()
        .zip(image("merged.png").iter())
        .map(|(a, b)| a.abs_diff(*b))
        .max()
        .unwrap();
    assert!(off <= 1, "{off} levels off");
    let names = |folder: &std::path::Path| -> Vec<_> {
        let mut names: Vec<_> = folder
            .read_dir()
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        names
    };
    for component in [
        "transformer",
        "text_encoder",
        "tokenizer",
        "vae",
        "scheduler",
    ] {
        assert_eq!(
            names(&model.join(component)),
            names(&dir.path().join("merged").join(component))
        );
    }
    let vae = "vae/diffusion_pytorch_model.safetensors";
    assert!(
        std::fs::read(model.join(vae)).unwrap()
            == std::fs::read(dir.path().join("merged").join(vae)).unwrap()
    );
    let again = Command::new(program())
        .args([
            "merge", "--model", model_path, "--lora", &lora, "--out", "merged",
        ])
        .current_dir(dir.path())
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&again.stderr).contains("choose a new folder"));
}

#[test]
fn inspect_names_format_rank_and_alpha() {
    let out = Command::new(program())
        .arg("inspect")
        .arg(diffusers_lora())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(
        text.contains("format diffusers") && text.contains("rank 4, alpha 6"),
        "{text}"
    );
}
