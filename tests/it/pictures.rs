//! Models that read pictures beside the prompt (FLUX.2 klein, FLUX.1 Kontext and Fill) are trained on them, resumed and sampled.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use flux_lora_tests::{Workbench, copy, program, root};

fn fixture(name: &str) -> PathBuf {
    root().join("tests/fixtures/parity").join(name)
}

/// A tiny pipeline: klein (not distilled), Kontext or Fill.
fn model(bench: &Workbench, name: &str) -> PathBuf {
    let folder = bench.path(name);
    let (from, old, new) = match name {
        "klein" => (
            "flux2_pipeline_distilled/model",
            "\"is_distilled\": true",
            "\"is_distilled\": false",
        ),
        "kontext" => ("pipeline_dev/model", "FluxPipeline", "FluxKontextPipeline"),
        "fill" => ("pipeline_dev/model", "FluxPipeline", "FluxFillPipeline"),
        _ => panic!("no model {name}"),
    };
    copy(&fixture(from), &folder, &|part| {
        name != "fill" || part != "transformer"
    });
    if name == "fill" {
        copy(
            &fixture("pipeline_fill/model"),
            &folder.join("transformer"),
            &|_| true,
        );
    }
    let index = folder.join("model_index.json");
    let text = fs::read_to_string(&index).unwrap();
    assert!(text.contains(old), "{text}");
    fs::write(&index, text.replace(old, new)).unwrap();
    folder
}

fn picture(path: &Path, width: u32, height: u32, seed: u32) {
    let wave = |x: u32, y: u32, k: u32| ((x * (k + 2) + y * (k + 5) + 31 * seed) % 256) as u8;
    image::RgbImage::from_fn(width, height, |x, y| {
        image::Rgb([wave(x, y, 1), wave(x, y, 7), wave(x, y, seed)])
    })
    .save(path)
    .unwrap();
}

/// References of the five pictures of a workbench: one of another aspect, one with two.
fn references(bench: &Workbench, folder: &str) {
    let folder = bench.path(folder);
    fs::create_dir(&folder).unwrap();
    for (i, (name, width, height)) in [
        ("0.png", 80, 80),
        ("1.png", 96, 64),
        ("2_1.png", 80, 80),
        ("2_2.png", 64, 96),
        ("3.png", 64, 100),
        ("4.png", 80, 80),
    ]
    .into_iter()
    .enumerate()
    {
        picture(&folder.join(name), width, height, i as u32);
    }
}

/// Masks of them: a white rectangle each.
fn masks(bench: &Workbench) {
    let folder = bench.path("masks");
    fs::create_dir(&folder).unwrap();
    for i in 0..5 {
        let name = format!("{i}.png");
        let (width, height) = image::image_dimensions(bench.path("data").join(&name)).unwrap();
        let white = |x: u32, y: u32| x > 10 + 5 * i && y > 20 && y < 50;
        image::GrayImage::from_fn(width, height, |x, y| {
            image::Luma([if white(x, y) { 255 } else { 0 }])
        })
        .save(folder.join(name))
        .unwrap();
    }
}

fn settings(bench: &Workbench, name: &str, key: &str, folder: &str) -> Vec<String> {
    let model = bench.path(name);
    [
        format!("model.path={}", model.display()),
        format!("dataset.{key}={folder}"),
        "train.steps=6".into(),
        "sample.prompts=[\"make it snow\"]".into(),
        "sample.every=6".into(),
        "sample.num_inference_steps=2".into(),
        "sample.height=64".into(),
        "sample.width=48".into(),
    ]
    .into_iter()
    .flat_map(|set| ["--set".into(), set])
    .collect()
}

fn trains_and_resumes(name: &str, key: &str, folder: &str) {
    let bench = Workbench::new();
    model(&bench, name);
    match key {
        "reference" => references(&bench, folder),
        _ => masks(&bench),
    }
    let settings = settings(&bench, name, key, folder);
    let train = |run: &str, more: &[&str]| {
        let args: Vec<&str> = settings
            .iter()
            .map(String::as_str)
            .chain(more.iter().copied())
            .collect();
        bench.train_ok(run, "flex", &args);
    };
    let mut check = Command::new(program());
    check
        .arg("check")
        .arg(bench.path("run.toml"))
        .args(&settings);
    check
        .args(["--device", "flex", "--output"])
        .arg(bench.path("straight"));
    let checked = check.output().unwrap();
    let text = String::from_utf8_lossy(&checked.stdout);
    assert_eq!(checked.status.code(), Some(0), "{text}");
    let counted = if key == "reference" {
        "references"
    } else {
        "masks"
    };
    assert!(text.contains(counted), "{text}");

    train("straight", &[]);
    let expected = bench.result("straight");
    assert_eq!(expected.metrics.lines().count(), 6);
    let sample = image::open(bench.path("straight/samples/step-0000006-0.png")).unwrap();
    let size = match key {
        "reference" => (48, 64),
        _ => (64, 64), // that of the first sample
    };
    assert_eq!((sample.width(), sample.height()), size, "{name}");

    bench.copy_run("straight", "resumed", |part| {
        part == "cache" || part == "metrics.jsonl" || part == "ckpt-0000000003"
    });
    train("resumed", &["--resume"]);
    bench
        .result("resumed")
        .assert_same(&expected, &format!("{name}, resumed"));
    train("plain", &["--set", "train.recompute=false"]);
    bench
        .result("plain")
        .assert_same(&expected, &format!("{name}, without recompute"));

    // what is beside a sample belongs to the data that a resume compares, and it matters to the loss
    let first = match key {
        "reference" => "0.png",
        _ => "4.png",
    };
    let path = bench.path(folder).join(first);
    let mut other = image::open(&path).unwrap().to_rgb8();
    image::imageops::invert(&mut other);
    other.save(&path).unwrap();
    bench.copy_run("straight", "changed", |part| {
        part == "metrics.jsonl" || part == "ckpt-0000000003"
    });
    let args: Vec<&str> = settings
        .iter()
        .map(String::as_str)
        .chain(["--resume"])
        .collect();
    let out = bench.train("changed", "flex", &args);
    let error = String::from_utf8_lossy(&out.stderr);
    let says = format!("changed references or mask of {first}");
    assert!(!out.status.success() && error.contains(&says), "{error}");
    train("other", &[]);
    assert_ne!(bench.result("other").metrics, expected.metrics, "{name}");
}

#[test]
fn klein_is_trained_on_pairs() {
    trains_and_resumes("klein", "reference", "before");
}

#[test]
fn kontext_is_trained_on_pairs() {
    trains_and_resumes("kontext", "reference", "before");
}

#[test]
fn fill_is_trained_with_masks() {
    trains_and_resumes("fill", "mask", "masks");
}

#[test]
fn folders_have_references_of_their_own_and_held_out_pictures_too() {
    let bench = Workbench::new();
    let model = model(&bench, "klein");
    references(&bench, "before");
    for folder in ["held", "held-before", "second", "second-before"] {
        fs::create_dir(bench.path(folder)).unwrap();
    }
    for (folder, seed) in [("held", 8), ("held-before", 9)] {
        picture(&bench.path(folder).join("it.png"), 80, 80, seed);
    }
    fs::write(bench.path("held/it.txt"), "make it snow").unwrap();
    // The numbers of another kind of sample are no names of this one: an image left out of the dataset is none of `held`.
    fs::write(bench.path("data/9.png"), "no picture").unwrap();
    fs::write(bench.path("data/9.txt"), "left out").unwrap();
    let model = format!("model.path={}", model.display());
    let settings = [
        "--set",
        &model,
        "--set=train.steps=6",
        "--set=validation.path=held",
        "--set=validation.every=3",
    ];
    let held = ["--set=validation.reference=held-before"];
    let one = [
        "--set=dataset.reference=before",
        "--set=dataset.skip=['9.png']",
    ];
    bench.train_ok("single", "flex", &[&settings[..], &held, &one].concat());
    let single = bench.result("single");
    assert_eq!(single.metrics.matches("\"validation\"").count(), 2);

    // The same pictures in two folders are the same samples: not one is encoded again, and every bit is the same.
    for name in ["3", "4"] {
        for kind in ["png", "txt"] {
            let name = format!("{name}.{kind}");
            fs::rename(
                bench.path("data").join(&name),
                bench.path("second").join(&name),
            )
            .unwrap();
        }
        let name = format!("{name}.png");
        let to = bench.path("second-before").join(&name);
        fs::rename(bench.path("before").join(&name), to).unwrap();
    }
    let folders = "[[dataset.folders]]\npath = \"data\"\nreference = \"before\"\n[[dataset.folders]]\npath = \"second\"\nreference = \"second-before\"\n[dataset]\nskip = [\"data/9.png\"]\n";
    let text = flux_lora_tests::CONFIG.replacen("[dataset]\n", folders, 1);
    fs::write(bench.path("run.toml"), text).unwrap();
    let cached = || {
        let entries = fs::read_dir(bench.path("straight/cache")).unwrap();
        let entries = entries.map(|entry| entry.unwrap());
        let entries = entries.map(|entry| {
            (
                entry.file_name(),
                entry.metadata().unwrap().modified().unwrap(),
            )
        });
        let is_entry = |name: &std::ffi::OsString| {
            Path::new(name)
                .extension()
                .is_some_and(|kind| kind == "safetensors")
        };
        entries
            .filter(|(name, _)| is_entry(name))
            .collect::<std::collections::BTreeMap<_, _>>()
    };
    bench.copy_run("single", "straight", |part| part == "cache");
    let before = cached();
    assert!(before.len() > 10, "{before:?}");
    let settings = [&settings[..], &held].concat();
    bench.train_ok("straight", "flex", &settings);
    assert_eq!(cached(), before);
    let expected = bench.result("straight");
    assert_eq!(expected.metrics, single.metrics);
    assert!(expected.optimizer == single.optimizer);

    bench.copy_run("straight", "resumed", |part| {
        part == "cache" || part == "metrics.jsonl" || part == "ckpt-0000000003"
    });
    let resume = [&settings[..], &["--resume"]].concat();
    bench.train_ok("resumed", "flex", &resume);
    bench
        .result("resumed")
        .assert_same(&expected, "two folders, resumed");

    // What is wrong in one of the folders is said of it, also when the run goes on.
    picture(&bench.path("second-before/3.png"), 64, 100, 77);
    bench.copy_run("straight", "changed", |part| {
        part == "metrics.jsonl" || part == "ckpt-0000000003"
    });
    let out = bench.train("changed", "flex", &resume);
    let error = String::from_utf8_lossy(&out.stderr);
    let says = "changed references or mask of second/3.png";
    assert!(!out.status.success() && error.contains(says), "{error}");
    let out = bench.train("refused", "flex", &settings[..settings.len() - 1]);
    let error = String::from_utf8_lossy(&out.stderr);
    let says = "name their folder as `validation.reference`";
    assert!(!out.status.success() && error.contains(says), "{error}");
}

#[test]
fn what_is_missing_beside_a_sample_or_cannot_be_read_is_said_before_anything_is_written() {
    let bench = Workbench::new();
    for name in ["klein", "fill"] {
        model(&bench, name);
    }
    references(&bench, "before");
    masks(&bench);
    let path = |name: &str| format!("model.path={}", bench.path(name).display());
    let refused = |model: &str, sets: &[&str], says: &str| {
        let mut args = vec!["--set".to_string(), path(model)];
        for set in sets {
            args.extend(["--set".into(), (*set).into()]);
        }
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let out = bench.train("run", "flex", &args);
        let error = String::from_utf8_lossy(&out.stderr);
        assert!(
            !out.status.success() && error.contains(says),
            "{says}: {error}"
        );
        assert!(!bench.path("run/cache").exists(), "{says}");
    };
    refused(
        "klein",
        &["dataset.reference=before", "dataset.random_crops=2"],
        "would not lie on each other",
    );
    fs::remove_file(bench.path("before/3.png")).unwrap();
    let missing = format!(
        "data/3.png` has no reference: expected `{}`",
        bench.path("before/3.png").display()
    );
    refused("klein", &["dataset.reference=before"], &missing);
    refused("klein", &["dataset.mask=masks"], "reads no mask");
    refused("fill", &[], "none is given: give `dataset.mask`");
    refused(
        "klein",
        &["dataset.reference=data"],
        "put these pictures into a folder of their own",
    );
    refused(
        "klein",
        &["dataset.reference=before", "dataset.mask=masks"],
        "no model reads both",
    );
    refused(
        "klein",
        &["dataset.reference=nowhere"],
        "nowhere` does not exist",
    );
}

#[test]
fn samples_are_made_from_pictures() {
    let bench = Workbench::new();
    for name in ["klein", "fill"] {
        model(&bench, name);
    }
    references(&bench, "before");
    masks(&bench);
    let sample = |name: &str, out: &str, args: &[(&str, &str)]| {
        let mut command = Command::new(program());
        command.args([
            "sample",
            "--prompt",
            "make it snow",
            "--steps",
            "2",
            "--device",
            "flex",
            "--overwrite",
        ]);
        command
            .args(["--max-sequence-length", "16", "--model"])
            .arg(bench.path(name));
        for (flag, value) in args {
            let value = if value.contains('/') {
                bench.path(value)
            } else {
                value.into()
            };
            command.arg(flag).arg(value);
        }
        let done = command.arg("--out").arg(bench.path(out)).output().unwrap();
        let error = String::from_utf8_lossy(&done.stderr).into_owned();
        (done.status.code(), error)
    };
    let made = |name: &str, args: &[(&str, &str)]| {
        let (code, error) = sample(name, "made.png", args);
        assert_eq!(code, Some(0), "{error}");
        image::open(bench.path("made.png")).unwrap().to_rgb8()
    };
    let first = ("--reference", "before/1.png");
    let edited = made("klein", &[first]);
    assert_eq!(edited.dimensions(), (96, 64), "the size of the reference");
    let size = [("--height", "64"), ("--width", "96")];
    let plain = made("klein", &size);
    assert_ne!(plain, edited);
    let both = made("klein", &[first, ("--reference", "before/2_2.png")]);
    assert_eq!(both.dimensions(), (96, 64));
    assert_ne!(both, edited);

    let given = [("--image", "data/1.png"), ("--mask", "masks/1.png")];
    let painted = made("fill", &given);
    assert_eq!(
        painted.dimensions(),
        (64, 96),
        "the size of the image in whole tokens"
    );

    for (name, args, says) in [
        ("klein", &given[..], "reads no mask"),
        ("fill", &size[..], "give --image and --mask"),
        (
            "fill",
            &[("--image", "data/1.png"), ("--mask", "masks/0.png")][..],
            "make them the same",
        ),
        ("fill", &given[..1], "--mask"),
        ("klein", &[("--reference", "data/1.txt")][..], "1.txt"),
    ] {
        let (code, error) = sample(name, "refused.png", args);
        assert!(
            matches!(code, Some(1 | 2)) && error.contains(says),
            "{says}: {error}"
        );
        assert!(!bench.path("refused.png").exists());
    }
}
