//! LoRA files of other programs, as a user meets them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use flux_lora_tests::{Workbench, checkpoints, program, root};
use lora_core::files::host::HostTensor;
use lora_core::files::safetensors::{TensorFile, serialize};

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
        // What is exported has its scale, alpha 6 over rank 4, in the factors.
        let scale = if name.contains("lora_B") { 1.5 } else { 1.0 };
        let change: f32 = before
            .iter()
            .zip(&after)
            .map(|(a, b)| (a * scale - b).abs())
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
            "--overwrite",
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

fn model() -> PathBuf {
    root().join("tests/fixtures/parity/pipeline_dev/model")
}

/// Runs the program in a folder.
fn run(dir: &Path, args: &[&str]) -> Output {
    Command::new(program())
        .args(args)
        .current_dir(dir)
        .output()
        .unwrap()
}

/// The one line of an error.
#[track_caller]
fn refused(out: &Output) -> String {
    let text = String::from_utf8_lossy(&out.stderr).to_string();
    assert!(!out.status.success(), "{text}");
    let errors: Vec<_> = text
        .lines()
        .filter(|line| line.starts_with("error: "))
        .collect();
    assert_eq!(errors.len(), 1, "{text}");
    errors[0].to_string()
}

const SAMPLE: [&str; 10] = [
    "--prompt", "a cat", "--steps", "1", "--height", "48", "--width", "64", "--out", "x.png",
];

#[test]
fn a_whole_checkpoint_is_no_lora_for_any_command() {
    let bench = Workbench::new();
    let dir = bench.dir.path();
    let model = model();
    let model_path = model.to_str().unwrap();
    for (file, what) in [
        (
            "transformer/diffusion_pytorch_model.safetensors",
            "FLUX.1 transformer",
        ),
        ("transformer", "FLUX.1 transformer"),
        ("vae/diffusion_pytorch_model.safetensors", "VAE"),
        ("text_encoder/model.safetensors", "CLIP"),
        ("text_encoder_2/model.safetensors", "T5"),
        ("", "a whole pipeline"),
    ] {
        let path = model.join(file);
        let path = path.to_str().unwrap().trim_end_matches('/');
        let mut commands = vec![
            run(dir, &["convert", path, "out.safetensors", "--to", "kohya"]),
            run(
                dir,
                &[
                    &["sample", "--model", model_path, "--lora", path][..],
                    &SAMPLE,
                ]
                .concat(),
            ),
            run(
                dir,
                &[
                    "merge", "--model", model_path, "--lora", path, "--out", "merged",
                ],
            ),
            bench.train(
                "run",
                "flex",
                &["--set", &format!("lora.init_from=\"{path}\"")],
            ),
        ];
        if !file.is_empty() {
            commands.push(run(dir, &["inspect", path]));
        }
        for out in commands {
            let error = refused(&out);
            assert!(error.contains("no LoRA") && error.contains(what), "{error}");
            assert_eq!(error.matches(path).count(), 1, "said once: {error}");
        }
        for left in ["out.safetensors", "merged", "x.png"] {
            assert!(!bench.path(left).exists(), "{left}");
        }
    }
}

#[test]
fn inspect_takes_what_convert_takes() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    for folder in ["diffusers", "one", "run"] {
        fs::create_dir(path(folder)).unwrap();
    }
    for to in [
        "diffusers/pytorch_lora_weights.safetensors",
        "one/cats.safetensors",
        "run/lora.safetensors",
    ] {
        fs::copy(diffusers_lora(), path(to)).unwrap();
    }
    let made = run(dir.path(), &["convert", "one", "peft", "--to", "peft"]);
    assert!(made.status.success(), "{made:?}");
    for input in [
        "diffusers",
        "one",
        "run",
        "peft",
        "peft/adapter_model.safetensors",
    ] {
        let out = run(dir.path(), &["inspect", input]);
        let text = String::from_utf8_lossy(&out.stdout);
        assert!(
            out.status.success() && text.contains("rank 4, alpha 6"),
            "{input}: {out:?}"
        );
        let output = format!("{}.safetensors", input.replace('/', "-"));
        let out = run(dir.path(), &["convert", input, &output, "--to", "kohya"]);
        assert!(out.status.success(), "{input}: {out:?}");
    }
}

#[test]
fn convert_overwrites_nothing_unasked_and_names_files_as_what_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::copy(diffusers_lora(), path("in.safetensors")).unwrap();
    fs::write(path("mine.safetensors"), "mine").unwrap();
    fs::create_dir(path("folder")).unwrap();
    fs::write(path("folder/notes"), "mine").unwrap();
    let before = |name: &str| fs::read(path(name)).unwrap();
    let input = before("in.safetensors");
    for (output, to, says) in [
        ("mine.safetensors", "kohya", "mine.safetensors exists"),
        ("folder", "peft", "folder exists"),
        ("folder", "kohya", "`.safetensors`"),
        (
            "in.safetensors",
            "kohya",
            "in.safetensors is what is converted",
        ),
        (
            "./folder/../in.safetensors",
            "comfyui",
            "is what is converted",
        ),
        ("out.pt", "kohya", "`.safetensors`"),
        ("out", "diffusers", "`.safetensors`"),
        ("out.safetensors", "peft", "is a folder"),
        (
            "mine.safetensors/x.safetensors",
            "kohya",
            "mine.safetensors",
        ),
    ] {
        let out = run(
            dir.path(),
            &["convert", "in.safetensors", output, "--to", to],
        );
        let error = refused(&out);
        assert!(error.contains(says), "{output}: {error}");
    }
    let own = [
        "convert",
        "in.safetensors",
        "in.safetensors",
        "--to",
        "kohya",
        "--overwrite",
    ];
    refused(&run(dir.path(), &own));
    assert_eq!(before("in.safetensors"), input);
    assert_eq!(before("mine.safetensors"), b"mine");
    assert_eq!(path("folder").read_dir().unwrap().count(), 1);

    let forced = [
        "convert",
        "in.safetensors",
        "mine.safetensors",
        "--to",
        "kohya",
        "--overwrite",
    ];
    assert!(run(dir.path(), &forced).status.success());
    assert_ne!(before("mine.safetensors"), b"mine");
    let made = [
        "convert",
        "in.safetensors",
        "new/folders/x.safetensors",
        "--to",
        "all",
    ];
    assert!(run(dir.path(), &made).status.success());
    assert_eq!(path("new/folders").read_dir().unwrap().count(), 4);
    // One of four is there: nothing is written.
    fs::remove_dir_all(path("new/folders/x-peft")).unwrap();
    refused(&run(dir.path(), &made));
    assert!(!path("new/folders/x-peft").exists());
}

#[test]
fn ignored_keys_are_counted_and_a_few_named() {
    let dir = tempfile::tempdir().unwrap();
    let lora = TensorFile::open(&diffusers_lora()).unwrap();
    let mut tensors: BTreeMap<String, HostTensor> = lora
        .names()
        .map(|name| (name.to_string(), lora.read(name).unwrap()))
        .collect();
    for i in 0..500 {
        let key = format!("bundle_emb.cat{i:03}.clip_l");
        tensors.insert(key, HostTensor::from_f32([1], &[1.0]));
    }
    let path = dir.path().join("many.safetensors");
    fs::write(&path, serialize(&tensors, lora.metadata())).unwrap();
    for args in [
        &["inspect", "many.safetensors"][..],
        &[
            "convert",
            "many.safetensors",
            "out.safetensors",
            "--to",
            "kohya",
        ],
    ] {
        let out = run(dir.path(), args);
        let text = String::from_utf8_lossy(&out.stdout);
        assert!(
            text.contains(
                "ignored 500 keys, `bundle_emb.cat000.clip_l`, `bundle_emb.cat001.clip_l`, `bundle_emb.cat002.clip_l` and 497 more: a bundled text embedding"
            ),
            "{out:?}"
        );
        assert!(!text.contains("cat003"), "{text}");
    }
}

/// The finished file says its scale in its tensors; going on from it starts at the same change; a checkpoint keeps its bits.
#[test]
fn the_scale_is_in_the_tensors_of_what_a_run_writes() {
    let bench = Workbench::new();
    let short = [
        "--set",
        "train.steps=2",
        "--set",
        "lr_scheduler.warmup_steps=1",
        "--set",
        "lora.r=8",
        "--set",
        "lora.lora_alpha=2",
        "--set",
        "lora.lora_dropout=0.0",
    ];
    bench.train_ok("run", "flex", &short);
    let open = |path: PathBuf| TensorFile::open(&path).unwrap();
    let newest = checkpoints(&bench.path("run")).pop().unwrap();
    let newest = bench.path("run").join(newest);
    let (exported, kept) = (
        open(bench.path("run/lora.safetensors")),
        open(newest.join("lora.safetensors")),
    );
    for name in kept.names() {
        let scale = if name.contains("lora_B") { 0.25 } else { 1.0 };
        let trained = kept.read(name).unwrap().to_f32();
        let trained: Vec<f32> = trained.iter().map(|x| x * scale).collect();
        assert_eq!(exported.read(name).unwrap().to_f32(), trained, "{name}");
    }
    let header = &exported.metadata()["lora_adapter_metadata"];
    assert!(
        header.contains(r#""transformer.lora_alpha":8.0"#),
        "{header}"
    );

    // A learning rate of almost nothing: what is exported again is what was started from.
    let from = format!("lora.init_from=\"{}\"", exported.path().display());
    let still = ["--set", &from, "--set", "optimizer.learning_rate=1e-30"];
    bench.train_ok("again", "flex", &[&short[..], &still].concat());
    let again = open(bench.path("again/lora.safetensors"));
    for name in exported.names() {
        let (before, after) = (exported.read(name).unwrap(), again.read(name).unwrap());
        assert_eq!(before.to_f32(), after.to_f32(), "{name}");
    }
}

#[test]
fn what_init_from_has_for_the_text_encoders_is_named() {
    let bench = Workbench::new();
    let lora = TensorFile::open(&diffusers_lora()).unwrap();
    let mut tensors: BTreeMap<String, HostTensor> = lora
        .names()
        .map(|name| (name.to_string(), lora.read(name).unwrap()))
        .collect();
    let clip = TensorFile::open(&model().join("text_encoder/model.safetensors")).unwrap();
    let fc1 = "text_model.encoder.layers.0.mlp.fc1";
    let shape = &clip.info(&format!("{fc1}.weight")).unwrap().shape;
    let zeros = |shape: [usize; 2]| HostTensor::from_f32(shape, &vec![0.5; shape[0] * shape[1]]);
    tensors.insert(
        format!("lora_te1.{fc1}.lora_A.weight"),
        zeros([1, shape[1]]),
    );
    tensors.insert(
        format!("lora_te1.{fc1}.lora_B.weight"),
        zeros([shape[0], 1]),
    );
    let path = bench.path("with-clip.safetensors");
    fs::write(&path, serialize(&tensors, lora.metadata())).unwrap();
    let out = bench.train(
        "run",
        "flex",
        &[
            "--set",
            "train.steps=1",
            "--set",
            "lr_scheduler.warmup_steps=0",
            "--set",
            "lora.lora_alpha=6",
            "--set",
            &format!("lora.init_from=\"{}\"", path.display()),
        ],
    );
    let text = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{text}");
    assert!(text.contains("1 modules of `text_encoder`"), "{text}");
}

#[test]
fn merge_leaves_nothing_of_a_lora_out_and_stays_outside_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("model");
    flux_lora_tests::copy(&model(), &copy, &|_| true);
    let lora = diffusers_lora();
    let lora = lora.to_str().unwrap();
    let inside = [
        "merge",
        "--model",
        "model",
        "--lora",
        lora,
        "--out",
        "model/merged",
    ];
    let error = refused(&run(dir.path(), &inside));
    assert!(error.contains("inside the model"), "{error}");
    let made = [
        "merge",
        "--model",
        "model",
        "--lora",
        lora,
        "--out",
        "not/there/merged",
    ];
    assert!(run(dir.path(), &made).status.success());
    assert!(
        dir.path()
            .join("not/there/merged/model_index.json")
            .is_file()
    );
}

/// Nothing but the keys says that it is for FLUX.2; every format is read back the same, and comes with who reads it.
#[test]
fn a_lora_for_flux_2_converts_without_a_model_and_says_who_reads_it() {
    let zoo = root().join("tests/fixtures/parity/flux2_lora_zoo");
    let folder = tempfile::tempdir().unwrap();
    let input = zoo.join("kohya/lora.safetensors").display().to_string();
    let done = run(
        folder.path(),
        &["convert", &input, "x.safetensors", "--to", "all"],
    );
    let said = String::from_utf8_lossy(&done.stdout).to_string();
    assert!(done.status.success(), "{done:?}");
    let readers = |reader: &str| {
        said.lines()
            .filter(|line| line.trim().starts_with(reader))
            .count()
    };
    // The format of that name has a line of its own.
    assert_eq!(
        (readers("diffusers"), readers("ComfyUI"), readers("PEFT")),
        (5, 4, 1),
        "{said}"
    );
    assert!(said.contains("drops 56 keys, `base_model.model."), "{said}");

    let open = |name: &str| TensorFile::open(&folder.path().join(name)).unwrap();
    let kohya = open("x-kohya.safetensors");
    // A tiny network has the width of none that is published.
    assert_eq!(kohya.metadata()["ss_base_model_version"], "flux_2");
    let portable = open("x-comfyui.safetensors");
    assert!(
        portable
            .names()
            .all(|key| key.starts_with("diffusion_model.") && key.contains(".lora_"))
    );
    let expected = open("x-diffusers.safetensors");
    for form in ["x-peft", "x-kohya.safetensors", "x-comfyui.safetensors"] {
        let out = format!("{form}-back.safetensors");
        let done = run(folder.path(), &["convert", form, &out, "--to", "diffusers"]);
        assert!(done.status.success(), "{done:?}");
        let back = open(&out);
        assert_eq!(back.names().count(), expected.names().count());
        for name in expected.names() {
            let [a, b] = [&back, &expected].map(|file| file.read(name).unwrap().to_f32());
            let far = a
                .iter()
                .zip(&b)
                .any(|(a, b)| (a - b).abs() > 1e-6 * b.abs());
            assert!(!far && a.len() == b.len(), "{form}: {name}");
        }
    }
}

#[test]
fn what_fits_flux_1_and_klein_alike_is_converted_for_the_one_that_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    let module = "diffusion_model.double_blocks.0.img_attn.qkv";
    let zeros = |shape: [usize; 2]| HostTensor::from_f32(shape, &vec![0.0; shape[0] * shape[1]]);
    let tensors = BTreeMap::from([
        (format!("{module}.lora_A.weight"), zeros([1, 3072])),
        (format!("{module}.lora_B.weight"), zeros([3 * 3072, 1])),
    ]);
    let bytes = serialize(&tensors, &BTreeMap::new());
    fs::write(file("either.safetensors"), bytes).unwrap();
    let run = |args: &[&str], last: &[&Path]| {
        let done = Command::new(program())
            .args(args)
            .args(last)
            .output()
            .unwrap();
        let text = [done.stdout, done.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        (done.status.code(), text)
    };
    let (input, output) = (file("either.safetensors"), file("kohya.safetensors"));
    let (code, text) = run(&["convert", "--to", "kohya"], &[&input, &output]);
    assert!(code == Some(1) && text.contains("--model"), "{text}");
    assert!(!output.exists());
    let (code, text) = run(&["inspect"], &[&input]);
    assert!(code == Some(0) && text.contains("klein 4B"), "{text}");
}
