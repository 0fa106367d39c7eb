//! Stopped and resumed runs end in the bits of the uninterrupted run.

use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use flux_lora_tests::{Workbench, checkpoints};
use lora_core::random::Stream;

/// Trains once without interruption, then resumes from the checkpoint of each step in `steps`, in a new process.
fn resumes_exactly(device: &str, steps: impl Iterator<Item = u64>) {
    let bench = Workbench::new();
    bench.train_ok("straight", device, &[]);
    let expected = bench.result("straight");
    assert_eq!(expected.metrics.lines().count(), 40);
    for step in steps {
        let run = format!("resumed-{step}");
        let checkpoint = format!("ckpt-{step:010}");
        bench.copy_run("straight", &run, |name| {
            name == "cache" || name == "metrics.jsonl" || name == checkpoint
        });
        bench.train_ok(&run, device, &["--resume"]);
        bench
            .result(&run)
            .assert_same(&expected, &format!("{device}, resumed after step {step}"));
        std::fs::remove_dir_all(bench.path(&run)).unwrap();
    }
}

#[test]
fn flex_resumes_exactly_from_every_step() {
    resumes_exactly("flex", 1..40);
}

#[cfg(feature = "ndarray")]
#[test]
fn ndarray_resumes_exactly() {
    resumes_exactly("ndarray", [1, 5, 13, 26, 39].into_iter());
}

#[cfg(feature = "wgpu")]
#[test]
fn wgpu_resumes_exactly() {
    let bench = Workbench::new();
    let args = [
        "--set",
        "train.steps=6",
        "--set",
        "lr_scheduler.warmup_steps=2",
    ];
    bench.train_ok("straight", "wgpu", &args);
    bench.copy_run("straight", "resumed", |name| {
        matches!(name, "cache" | "metrics.jsonl" | "ckpt-0000000003")
    });
    bench.train_ok("resumed", "wgpu", &[&args[..], &["--resume"]].concat());
    bench
        .result("resumed")
        .assert_same(&bench.result("straight"), "wgpu");
}

#[test]
fn sigterm_saves_and_a_second_resume_is_as_good_as_the_first() {
    let bench = Workbench::new();
    bench.train_ok("straight", "flex", &[]);
    let args = ["--set", "checkpoint.every=1000", "--resume"];
    let mut stops = 0;
    for attempt in 0..20 {
        let mut child = bench.train_in_background("stopped", "flex", &args);
        // Wait for progress beyond what is saved, so that the signal lands inside the loop.
        let saved = checkpoints(&bench.path("stopped")).len();
        let lines = || {
            std::fs::read_to_string(bench.path("stopped/metrics.jsonl"))
                .map_or(0, |text| text.lines().count())
        };
        let before = if attempt == 0 { 0 } else { lines() };
        while child.try_wait().unwrap().is_none() && lines() < before + 3 {
            sleep(Duration::from_millis(2));
        }
        let running = child.try_wait().unwrap().is_none();
        if running {
            Command::new("kill")
                .args(["-TERM", &child.id().to_string()])
                .status()
                .unwrap();
        }
        assert!(
            child.wait().unwrap().success(),
            "a stopped run exits with 0"
        );
        if bench.path("stopped/lora.safetensors").is_file() {
            break;
        }
        stops += 1;
        assert!(
            checkpoints(&bench.path("stopped")).len() >= saved.min(2),
            "a stop saves"
        );
    }
    assert!(stops >= 2, "the run was stopped {stops} times");
    let (expected, found) = (bench.result("straight"), bench.result("stopped"));
    found.assert_same(&expected, "stopped by signals");
}

#[test]
fn twenty_kills_change_nothing() {
    let bench = Workbench::new();
    bench.train_ok("straight", "flex", &[]);
    let mut random = Stream::new(2026, "kills", 0, 0);
    let mut kills = 0;
    for _ in 0..200 {
        if kills == 20 {
            break;
        }
        let mut child = bench.train_in_background(
            "killed",
            "flex",
            &[
                "--resume",
                "--set",
                "checkpoint.every=3",
                "--set",
                "checkpoint.keep=2",
            ],
        );
        sleep(Duration::from_millis(20 + random.below(900)));
        if child.try_wait().unwrap().is_none() {
            child.kill().unwrap(); // SIGKILL
            kills += 1;
        }
        child.wait().unwrap();
        if bench.path("killed/lora.safetensors").is_file() {
            // Finished before it was killed often enough: go back to the start.
            bench
                .result("killed")
                .assert_same(&bench.result("straight"), "killed");
            std::fs::remove_dir_all(bench.path("killed")).unwrap();
        }
    }
    assert_eq!(kills, 20);
    bench.train_ok(
        "killed",
        "flex",
        &[
            "--resume",
            "--set",
            "checkpoint.every=3",
            "--set",
            "checkpoint.keep=2",
        ],
    );
    bench
        .result("killed")
        .assert_same(&bench.result("straight"), "killed 20 times");
}

#[test]
fn recompute_and_plain_autodiff_train_to_the_same_bits() {
    let bench = Workbench::new();
    let args = |recompute: &'static str| {
        [
            "--set",
            "train.steps=6",
            "--set",
            "lr_scheduler.warmup_steps=2",
            "--set",
            recompute,
        ]
    };
    bench.train_ok("recomputed", "flex", &args("train.recompute=true"));
    bench.train_ok("plain", "flex", &args("train.recompute=false"));
    bench
        .result("plain")
        .assert_same(&bench.result("recomputed"), "recompute");
}

#[cfg(feature = "ndarray")]
#[test]
fn a_run_moves_between_backends_with_its_state_intact() {
    let devices: &[&str] = if cfg!(feature = "wgpu") {
        &["flex", "wgpu"]
    } else {
        &["flex"]
    };
    let bench = Workbench::new();
    bench.train_ok("straight", "ndarray", &["--set", "train.steps=12"]);
    for device in devices {
        let run = format!("moved-to-{device}");
        bench.copy_run("straight", &run, |name| {
            matches!(name, "metrics.jsonl" | "ckpt-0000000008")
        });
        let refused = bench.train(&run, device, &["--set", "train.steps=12", "--resume"]);
        let message = String::from_utf8_lossy(&refused.stderr).to_string();
        assert_eq!(refused.status.code(), Some(1));
        assert!(
            message.contains("another device (ndarray; now") && message.contains("--allow-inexact"),
            "{message}"
        );

        // No step: what is restored and saved again must be the same bytes.
        bench.train_ok(
            &run,
            device,
            &["--set", "train.steps=8", "--resume", "--allow-inexact"],
        );
        let stored =
            std::fs::read(bench.path("straight/ckpt-0000000008/lora.safetensors")).unwrap();
        assert!(
            std::fs::read(bench.path(&format!("{run}/lora.safetensors"))).unwrap() == stored,
            "{device}: restored adapter"
        );

        bench.train_ok(
            &run,
            device,
            &["--set", "train.steps=12", "--resume", "--allow-inexact"],
        );
        let losses = |run: &str| -> Vec<f64> {
            let text = std::fs::read_to_string(bench.path(run).join("metrics.jsonl")).unwrap();
            let lines = text
                .lines()
                .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
            lines.map(|line| line["loss"].as_f64().unwrap()).collect()
        };
        let (straight, moved) = (losses("straight"), losses(&run));
        assert_eq!(straight[..8], moved[..8]);
        for (a, b) in straight[8..].iter().zip(&moved[8..]) {
            assert!(((a - b) / a).abs() < 1e-4, "{device}: {a} and {b}");
        }
    }
}
