//! Datasets as people have them: what is not used is said, and what a run writes is never trained on.

use std::fs;
use std::process::Output;

use flux_lora_tests::{CONFIG, Workbench};

const ONE_STEP: [&str; 4] = [
    "--set",
    "train.steps=1",
    "--set",
    "lr_scheduler.warmup_steps=0",
];

/// What a run that must succeed says.
fn said(out: &Output) -> String {
    let text = String::from_utf8_lossy(&out.stderr).to_string();
    assert!(out.status.success(), "{text}");
    text
}

/// Lines that begin as a warning does.
fn warnings(text: &str) -> Vec<&str> {
    text.lines().filter(|line| line.contains("WARN")).collect()
}

#[test]
fn a_run_may_lie_inside_its_dataset_and_be_resumed() {
    let bench = Workbench::new();
    let sample = "[sample]\nprompts = [\"a photo\"]\nevery = 1\nnum_inference_steps = 1\nheight = 32\nwidth = 32\n";
    bench.write_config(&format!("{CONFIG}\n{sample}"));
    said(&bench.train("data/photos", "flex", &ONE_STEP));
    let preview = bench.path("data/photos/samples/step-0000001-0.png");
    assert!(preview.is_file());
    let two = [
        "--resume",
        "--set",
        "train.steps=2",
        "--set",
        "lr_scheduler.warmup_steps=0",
    ];
    let text = said(&bench.train(
        "data/photos",
        "flex",
        &[&two[..], &["--adopt-config"]].concat(),
    ));
    assert!(text.contains("samples=5"), "{text}");
    // nor are they images of another run
    let text = said(&bench.train("data/deep/down", "flex", &ONE_STEP));
    assert!(text.contains("samples=5"), "{text}");
}

#[test]
fn what_does_not_reach_the_model_is_said_once() {
    let bench = Workbench::new();
    let long = "a photograph of a lamp beside a window ".repeat(40);
    fs::write(bench.path("data/0.txt"), long).unwrap();
    let panorama = image::RgbImage::from_pixel(960, 40, image::Rgb([9, 9, 9]));
    panorama.save(bench.path("data/panorama.bmp")).unwrap();
    fs::write(bench.path("data/panorama.txt"), "wide").unwrap();
    let tiny = image::RgbImage::from_pixel(10, 10, image::Rgb([9, 9, 9]));
    tiny.save(bench.path("data/tiny.tiff")).unwrap();
    fs::write(bench.path("data/tiny.txt"), "tiny").unwrap();
    fs::write(bench.path("data/notes.txt"), "from my telephone").unwrap();
    fs::write(bench.path("data/film.mp4"), "").unwrap();

    let text = said(&bench.train("run", "flex", &ONE_STEP));
    for part in [
        "(`film.mp4`)",
        "(`notes.txt`)",
        "cropped by more than a fifth: 1 image of 7 (`panorama.bmp loses 83 %`)",
        "enlarged, being smaller than what is trained at: 1 image of 7 (`tiny.tiff (10x10) 6.40 times`)",
        "cut at dataset.max_sequence_length = 16 tokens: ",
        "0.png loses ",
        "longer than the 77 tokens of the pooled vector, which is of their beginning (the sequence reads on): 1 text of 7",
    ] {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
    assert_eq!(warnings(&text).len(), 5, "{text}");
    // the encoded dataset is there already: still said to whoever starts the run anew
    fs::remove_dir_all(bench.path("run/ckpt-0000000001")).unwrap();
    fs::remove_file(bench.path("run/LATEST")).unwrap();
    fs::remove_file(bench.path("run/lora.safetensors")).unwrap();
    let text = said(&bench.train("run", "flex", &ONE_STEP));
    assert_eq!(warnings(&text).len(), 5, "{text}");
}

#[test]
fn a_bad_image_is_refused_before_an_encoder_is_loaded() {
    let bench = Workbench::new();
    let bytes = fs::read(bench.path("data/4.png")).unwrap();
    fs::write(bench.path("data/4.png"), &bytes[..bytes.len() - 1]).unwrap();
    let out = bench.train("run", "flex", &ONE_STEP);
    let text = String::from_utf8_lossy(&out.stderr).to_string();
    assert!(text.contains("4.png` is cut short"), "{text}");
    assert!(!bench.path("run/cache").exists(), "nothing was encoded");
}
