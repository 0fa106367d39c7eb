//! The bundled base model draws what it is asked for, and the quickstart teaches it what it has not seen.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread::sleep;
use std::time::Duration;

use flux_lora::dev::quickstart::{Gallery, mean_chroma};
use flux_lora_tests::{program, root};
use image::RgbImage;

fn run(args: &[&str]) -> Output {
    let out = Command::new(program())
        .args(args)
        .current_dir(root())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{args:?}: {text}");
    out
}

fn picture(path: &Path) -> RgbImage {
    image::open(path)
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        .to_rgb8()
}

/// `flux-lora sample` on flux-nano, with `args`, to `out`.
fn sample(out: &Path, args: &[&str]) {
    let out = out.to_str().unwrap();
    let fixed = "sample --model models/flux-nano --height 96 --width 96 --max-sequence-length 16 --steps 20 --out";
    let fixed: Vec<&str> = fixed.split(' ').collect();
    run(&[&fixed[..], &[out], args].concat());
}

/// Mean colour of the first `rows` rows.
fn mean_of_top(picture: &RgbImage, rows: u32) -> [f64; 3] {
    let count = f64::from(rows * picture.width());
    let mut sum = [0.0; 3];
    for (_, y, pixel) in picture.enumerate_pixels() {
        for (sum, channel) in sum.iter_mut().zip(pixel.0) {
            *sum += if y < rows {
                f64::from(channel) / count
            } else {
                0.0
            };
        }
    }
    sum
}

#[test]
fn flux_nano_draws_what_it_is_asked_for() {
    let things = [
        "guitar",
        "red apple",
        "fox",
        "penguin",
        "hamburger",
        "castle",
        "owl",
        "butterfly",
        "tent",
        "cactus",
    ];
    let folder = tempfile::tempdir().unwrap();
    let prompts = things.map(|thing| format!("a {thing}, flat style"));
    let args: Vec<&str> = prompts.iter().flat_map(|it| ["--prompt", it]).collect();
    sample(&folder.path().join("things.png"), &args);
    let pictures: Vec<RgbImage> = (1..=things.len())
        .map(|number| picture(&folder.path().join(format!("things-{number}.png"))))
        .collect();
    let gallery = Gallery::load(&root().join("examples/nano")).unwrap();
    let shown: Vec<&str> = pictures.iter().map(|it| gallery.thing(it)).collect();
    let right = things.iter().zip(&shown).filter(|(a, b)| a == b).count();
    assert!(
        right >= things.len() - 1,
        "asked for {things:?}, shown {shown:?}"
    );
    let chroma = mean_chroma(&pictures);
    assert!((0.1..0.5).contains(&chroma), "mean chroma {chroma}");
    let whole = picture(&folder.path().join("things.png"));
    assert!(whole.width() > 10 * 96, "a column a thing");
    for (thing, picture) in things.iter().zip(&pictures) {
        let top = mean_of_top(picture, 3);
        assert!(
            top.iter().all(|it| *it > 225.0),
            "{thing} on white: {top:?}"
        );
    }

    let grounds = [
        ("blue", [0x6f, 0xb1, 0xf2]),
        ("pink", [0xf9, 0xb4, 0xc8]),
        ("green", [0xa6, 0xd9, 0x9a]),
        ("yellow", [0xfb, 0xe0, 0x8a]),
    ];
    let prompts = grounds.map(|(name, _)| format!("a penguin, 3d style, on a {name} background"));
    let args: Vec<&str> = prompts.iter().flat_map(|it| ["--prompt", it]).collect();
    sample(&folder.path().join("grounds.png"), &args);
    for (number, (name, colour)) in grounds.iter().enumerate() {
        let path = folder.path().join(format!("grounds-{}.png", number + 1));
        let top = mean_of_top(&picture(&path), 3);
        let off = top
            .iter()
            .zip(colour)
            .map(|(a, b)| (a - f64::from(*b)).abs());
        assert!(
            off.fold(0.0, f64::max) < 30.0,
            "{name}: {top:?} for {colour:?}"
        );
    }
}

/// The numbers of a line of the report, in order.
fn numbers(report: &str, line: &str) -> Vec<f64> {
    let line = report.lines().find(|it| it.starts_with(line)).unwrap();
    let words = line.split(|c: char| !(c.is_ascii_digit() || c == '.'));
    words.filter_map(|word| word.parse().ok()).collect()
}

#[test]
fn the_quickstart_teaches_ink_and_a_kill_changes_no_bit_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let output = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let train = |name: &str, more: &[&str]| {
        let output = output(name);
        let fixed = ["train", "examples/quickstart.toml", "--output", &output];
        let shorter = [
            "--steps=300",
            "--set=checkpoint.every=40",
            "--set=sample.every=1000",
        ];
        let mut command = Command::new(program());
        command.args(fixed).args(shorter).args(more);
        command.current_dir(root());
        command
    };
    let out = train("straight", &[]).output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{said}");
    assert!(!said.contains("WARN"), "{said}");

    let report = run(&[
        "quickstart",
        &output("straight"),
        "--gallery",
        "examples/nano",
    ]);
    let report = String::from_utf8_lossy(&report.stdout).to_string();
    let [without, with] = numbers(&report, "mean chroma")[..2] else {
        panic!("{report}");
    };
    assert!(with < without / 3.0, "{report}");
    let [found, asked, found_with, ..] = numbers(&report, "recognised")[..] else {
        panic!("{report}");
    };
    assert!(
        found >= asked - 1.0 && found_with >= 0.7 * asked,
        "{report}"
    );
    assert!(picture(&folder.path().join("straight/before-after.png")).width() > 10 * 96);

    let mut child = train("killed", &[])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let steps = || {
        let log = fs::read_to_string(folder.path().join("killed/metrics.jsonl"));
        log.map_or(0, |text| text.lines().count())
    };
    while steps() < 150 {
        assert!(
            child.try_wait().unwrap().is_none(),
            "the run ended before it was killed"
        );
        sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!folder.path().join("killed/lora.safetensors").exists());
    let out = train("killed", &["--resume"]).output().unwrap();
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    for file in ["lora.safetensors", "metrics.jsonl"] {
        let read = |name: &str| fs::read(folder.path().join(name).join(file)).unwrap();
        assert!(read("killed") == read("straight"), "{file} differs");
    }
}

#[test]
fn a_start_picture_is_kept_as_far_as_its_strength_says() {
    let folder = tempfile::tempdir().unwrap();
    let draw = |name: &str, more: &[&str]| {
        let path = folder.path().join(name);
        sample(&path, &[&["--prompt", "a fox, flat style"], more].concat());
        picture(&path)
    };
    let apple = folder.path().join("apple.png");
    sample(&apple, &["--prompt", "a red apple, flat style"]);
    let distance = |picture: &RgbImage| -> f64 {
        let start = image::open(&apple).unwrap().to_rgb8();
        let pairs = start.iter().zip(picture.iter());
        pairs
            .map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs())
            .sum()
    };
    let start = apple.to_str().unwrap().to_string();
    let with =
        |strength: &'static str| ["--image", &start, "--strength", strength].map(String::from);
    let drawn = |name: &str, strength: &'static str| {
        let args = with(strength);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        draw(name, &args)
    };
    let alone = draw("alone.png", &[]);
    assert!(drawn("whole.png", "1") == alone, "nothing is left of it");
    let (near, far) = (drawn("near.png", "0.2"), drawn("far.png", "0.9"));
    assert!(distance(&near) < distance(&far) / 2.0);
    assert!(distance(&far) < distance(&alone));

    let wrong = Command::new(program())
        .args([
            "sample",
            "--model",
            "models/flux-nano",
            "--prompt",
            "a fox",
            "--out",
        ])
        .arg(folder.path().join("wrong.png"))
        .args(["--image", &start, "--strength", "1.5"])
        .current_dir(root())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&wrong.stderr);
    assert_eq!(wrong.status.code(), Some(2), "{text}");
    assert!(
        text.contains("--strength must be above 0 and at most 1"),
        "{text}"
    );
}

#[test]
fn a_grid_overwrites_none_of_its_pictures_unasked() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("grid-2.png"), "mine").unwrap();
    let out = Command::new(program())
        .args(["sample", "--model", "models/flux-nano", "--prompt", "a fox"])
        .args(["--prompt", "an owl", "--out"])
        .arg(folder.path().join("grid.png"))
        .current_dir(root())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(2), "{text}");
    assert!(text.contains("grid-2.png: it exists"), "{text}");
    assert!(!folder.path().join("grid.png").exists());
    let mine = fs::read(folder.path().join("grid-2.png")).unwrap();
    assert_eq!(mine, b"mine");
}
