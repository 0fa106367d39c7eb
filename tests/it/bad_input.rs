//! Bad input gets one line that names the thing, the right exit code, and nothing saved is harmed.

use std::fs;
use std::process::{Command, Output};

use flux_lora_tests::{Workbench, checkpoints, copy, program, root};

const FEW: [&str; 4] = [
    "--set",
    "train.steps=4",
    "--set",
    "lr_scheduler.warmup_steps=1",
];

/// The single line of an error.
fn error(out: &Output, code: i32) -> String {
    let text = String::from_utf8_lossy(&out.stderr).to_string();
    assert_eq!(out.status.code(), Some(code), "{text}");
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| line.starts_with("error: "))
        .collect();
    assert_eq!(lines.len(), 1, "{text}");
    assert!(!text.contains("panicked"), "{text}");
    lines[0].to_string()
}

fn assert_says(message: &str, parts: &[impl AsRef<str>]) {
    for part in parts.iter().map(AsRef::as_ref) {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
}

#[test]
fn configuration_mistakes_exit_with_2_and_name_the_key() {
    let bench = Workbench::new();
    for (set, parts) in [
        (
            "optimizer.learnin_rate=1",
            &["optimizer.learnin_rate", "did you mean `learning_rate`"][..],
        ),
        ("lora.r=0", &["lora.r"]),
        ("train.batch_size=-1", &["train.batch_size"]),
        (
            "train.timestep_sampling=\"gauss\"",
            &["train.timestep_sampling", "logit_normal"],
        ),
        ("dataset.resolution=50", &["dataset.resolution"]),
    ] {
        let message = error(&bench.train("run", "flex", &["--set", set]), 2);
        assert_says(&message, parts);
    }
    let message = error(&bench.train("run", "tpu", &[]), 2);
    assert_says(&message, &["unknown device `tpu`", "flex"]);
    let message = error(&bench.train("run", "cuda", &[]), 2);
    assert_says(&message, &["--features cuda"]);
    let missing = Command::new(program())
        .args(["train", "/nowhere.toml"])
        .output()
        .unwrap();
    assert_says(&error(&missing, 2), &["/nowhere.toml"]);
}

#[test]
fn bad_data_is_named() {
    let bench = Workbench::new();
    fs::write(bench.path("data/2.png"), b"").unwrap();
    assert_says(&error(&bench.train("run", "flex", &[]), 1), &["2.png"]);
    fs::write(bench.path("data/2.png"), b"not a picture").unwrap();
    assert_says(&error(&bench.train("run", "flex", &[]), 1), &["2.png"]);
    let good = fs::read(bench.path("data/1.png")).unwrap();
    fs::write(bench.path("data/2.png"), &good[..good.len() / 2]).unwrap();
    assert_says(&error(&bench.train("run", "flex", &[]), 1), &["2.png"]);
    fs::remove_file(bench.path("data/2.png")).unwrap();
    let out = bench.train("run", "flex", &FEW); // a text without a picture may be a note, and is named
    assert!(out.status.success());
    let said = String::from_utf8_lossy(&out.stderr).to_string();
    assert_says(&said, &["no image has the name: 1 text file (`2.txt`)"]);
    fs::remove_dir_all(bench.path("run")).unwrap();
    fs::remove_file(bench.path("data/2.txt")).unwrap();
    fs::remove_file(bench.path("data/3.txt")).unwrap();
    assert_says(
        &error(&bench.train("run", "flex", &[]), 1),
        &["3.png", "caption"],
    );
    fs::remove_dir_all(bench.path("data")).unwrap();
    assert_says(&error(&bench.train("run", "flex", &[]), 1), &["data"]);
    fs::create_dir(bench.path("data")).unwrap();
    assert_says(&error(&bench.train("run", "flex", &[]), 1), &["data"]);
}

/// A copy of the tiny pipeline that may be damaged.
fn with_own_model(bench: &Workbench) -> std::path::PathBuf {
    let model = bench.path("model");
    copy(
        &root().join("tests/fixtures/parity/pipeline_dev/model"),
        &model,
        &|_| true,
    );
    model
}

#[test]
fn a_damaged_base_model_is_named() {
    let bench = Workbench::new();
    let model = with_own_model(&bench);
    let set = format!("model.path=\"{}\"", model.display());
    let weights = model.join("transformer/diffusion_pytorch_model.safetensors");
    let good = fs::read(&weights).unwrap();

    fs::write(&weights, &good[..good.len() - 10]).unwrap();
    assert_says(
        &error(&bench.train("run", "flex", &["--set", &set]), 1),
        &["diffusion_pytorch_model.safetensors"],
    );

    let mut nan = good.clone();
    let end = nan.len();
    nan[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&weights, nan).unwrap();
    assert_says(
        &error(&bench.train("run", "flex", &["--set", &set]), 1),
        &["not finite", "tensor `"],
    );

    let file = lora_core::files::safetensors::TensorFile::open(
        &model.join("vae/diffusion_pytorch_model.safetensors"),
    )
    .unwrap();
    assert!(file.info("encoder.conv_in.weight").is_some());
    fs::copy(file.path(), &weights).unwrap();
    assert_says(
        &error(&bench.train("run", "flex", &["--set", &set]), 1),
        &["transformer"],
    );

    fs::remove_file(&weights).unwrap();
    assert_says(
        &error(&bench.train("run", "flex", &["--set", &set]), 1),
        &["transformer", "weights file"],
    );
}

#[test]
fn a_target_that_matches_nothing_is_named_with_its_neighbour() {
    let bench = Workbench::new();
    let out = bench.train(
        "run",
        "flex",
        &["--set", "lora.target_modules=[\"attn.to_qq\"]"],
    );
    assert_says(&error(&out, 1), &["`attn.to_qq` matches no layer", "to_q"]);
}

#[test]
fn a_run_folder_is_never_restarted_silently() {
    let bench = Workbench::new();
    bench.train_ok("run", "flex", &FEW);
    let message = error(&bench.train("run", "flex", &FEW), 1);
    assert_says(
        &message,
        &["already holds checkpoints", "--resume", "--output"],
    );
}

#[test]
fn what_would_break_exactness_is_refused_with_the_flag_that_accepts_it() {
    let bench = Workbench::new();
    bench.train_ok("run", "flex", &FEW);
    let resume =
        |extra: &[&str]| bench.train("run", "flex", &[&FEW[..], &["--resume"], extra].concat());

    assert_says(
        &error(&resume(&["--set", "lora.r=8"]), 1),
        &["`lora.r` was 4 and is now 8"],
    );
    assert_says(
        &error(&resume(&["--set", "lora.lora_alpha=9"]), 1),
        &["`lora.lora_alpha` was 7", "9"],
    );
    let message = error(&resume(&["--set", "train.batch_size=1"]), 1);
    assert_says(
        &message,
        &["`train.batch_size` was 2 and is now 1", "--adopt-config"],
    );
    let message = error(&resume(&["--set", "train.seed=8"]), 1);
    assert_says(&message, &["`train.seed`", "--adopt-config"]);

    fs::write(bench.path("data/0.txt"), "another caption").unwrap();
    let message = error(&resume(&[]), 1);
    assert_says(&message, &["0.png", "--adopt-data"]);

    // Accepted, each is an event.
    let more = [
        "--resume",
        "--adopt-data",
        "--adopt-config",
        "--set=train.steps=6",
        "--set=lr_scheduler.warmup_steps=1",
        "--set=optimizer.learning_rate=0.001",
        "--set=checkpoint.every=2",
        "--set=train.batch_size=1",
    ];
    bench.train_ok("run", "flex", &more);
    let events = [
        "`checkpoint.every` was 1 and is now 2",
        "`optimizer.learning_rate` was 0.002 and is now 0.001",
        "`train.batch_size` was 2 and is now 1",
        "`train.steps` was 4 and is now 6",
        "data changed: changed caption of 0.png",
    ];
    let state = fs::read(bench.path("run/ckpt-0000000006/state.json")).unwrap();
    let state: serde_json::Value = serde_json::from_slice(&state).unwrap();
    let stored = state["events"].as_array().unwrap().iter();
    let stored: Vec<_> = stored
        .map(|event| (event["step"].as_u64(), event["what"].as_str().unwrap()))
        .collect();
    assert_eq!(stored, events.map(|event| (Some(4), event)));
    let inspect = Command::new(program())
        .arg("inspect")
        .arg(bench.path("run"))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&inspect.stdout);
    assert_says(&text, &["step:         6 of 6"]);
    assert_says(
        &text,
        &events.map(|event| format!("event:        after step 4: {event}")),
    );
}

#[test]
fn a_run_that_diverges_is_stopped_and_not_saved() {
    let bench = Workbench::new();
    let explodes = [
        &FEW[..],
        &["--set", "lora.target_modules=[\"proj_out\"]"],
        &["--set", "optimizer.learning_rate=1e3"],
    ]
    .concat();
    let message = error(&bench.train("run", "flex", &explodes), 1);
    assert_says(
        &message,
        &[
            "the run has diverged",
            "`train.divergence_factor` allows 10 times the ",
            "after the update at step 2, for ",
            ".png (sigma ",
        ],
    );
    // Warm-up: the first step has learning rate 0.
    assert_eq!(checkpoints(&bench.path("run")), ["ckpt-0000000001"]);

    let collapses = ["--resume", "--set", "optimizer.learning_rate=1e4"];
    let message = error(&bench.train("other", "flex", &collapses), 1);
    assert_says(&message, &["every gradient is 0", "at step ", ".png"]);
    let off = [&collapses[..], &["--set", "train.divergence_factor=none"]].concat();
    let message = error(&bench.train("other", "flex", &off), 1);
    // Which number stops being one first is up to the kernels.
    assert_says(&message, &[" at step ", "the last checkpoint is untouched"]);
    let no_number = [
        "the loss is NaN",
        "the loss is inf",
        "a value that is not finite",
    ];
    assert!(
        no_number.iter().any(|says| message.contains(says)),
        "{message}"
    );
}

#[test]
fn a_damaged_checkpoint_is_passed_over_and_the_one_before_is_resumed() {
    let bench = Workbench::new();
    bench.train_ok("straight", "flex", &FEW);
    bench.copy_run("straight", "run", |name| name != "lora.safetensors");
    let path = bench.path("run/ckpt-0000000004/optimizer.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    fs::write(&path, bytes).unwrap();
    let out = bench.train("run", "flex", &[&FEW[..], &["--resume"]].concat());
    let text = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{text}");
    assert_says(&text, &["passed over", "optimizer.safetensors", "step=3"]);
    bench
        .result("run")
        .assert_same(&bench.result("straight"), "after a flipped bit");
}

#[test]
fn a_second_process_on_the_same_run_is_turned_away() {
    let bench = Workbench::new();
    let mut first = bench.train_in_background("run", "flex", &["--set", "train.steps=100000"]);
    while !bench.path("run/metrics.jsonl").is_file() {
        assert!(first.try_wait().unwrap().is_none());
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let message = error(&bench.train("run", "flex", &["--resume"]), 1);
    first.kill().unwrap();
    first.wait().unwrap();
    assert_says(&message, &["in use", "run"]);
}

#[test]
fn a_full_disk_stops_with_an_error_and_the_last_checkpoint_stays() {
    let bench = Workbench::new();
    bench.train_ok("run", "flex", &FEW);
    // A limit on the size of written files fails every write beyond it, as a full disk does.
    let script = format!(
        "trap '' XFSZ; ulimit -f 8; exec {} train {} --output {} --resume --set train.steps=6 --set lr_scheduler.warmup_steps=1",
        program().display(),
        bench.path("run.toml").display(),
        bench.path("run").display()
    );
    let out = Command::new("bash").args(["-c", &script]).output().unwrap();
    assert_says(&error(&out, 1), &["write", "ckpt-"]);
    bench.train_ok(
        "run",
        "flex",
        &[
            "--resume",
            "--set",
            "train.steps=6",
            "--set",
            "lr_scheduler.warmup_steps=1",
        ],
    );
}
