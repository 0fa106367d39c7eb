//! The golden losses: twenty steps of the tiny run, on the CPU.
//!
//! A refactor leaves the file untouched; a change of maths rewrites it (`cargo xtask golden`) and says why in its commit.
//! Losses are compared to 1e-5, since other CPUs pick other kernels.

use flux_lora_tests::{Workbench, root};

#[test]
fn losses_are_the_golden_ones() {
    let bench = Workbench::new();
    bench.train_ok(
        "run",
        "flex",
        &["--set", "train.steps=20", "--set", "checkpoint.every=20"],
    );
    let metrics = std::fs::read_to_string(bench.path("run/metrics.jsonl")).unwrap();
    let losses: Vec<f64> = metrics
        .lines()
        .map(|line| {
            serde_json::from_str::<serde_json::Value>(line).unwrap()["loss"]
                .as_f64()
                .unwrap()
        })
        .collect();
    let path = root().join("tests/golden/tiny-loss.txt");
    if std::env::var_os("FLUX_LORA_WRITE_GOLDEN").is_some() {
        let text: String = losses.iter().map(|loss| format!("{loss:.9}\n")).collect();
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
    }
    let golden: Vec<f64> = std::fs::read_to_string(&path)
        .unwrap()
        .lines()
        .map(|line| line.parse().unwrap())
        .collect();
    assert_eq!(losses.len(), golden.len());
    for (step, (loss, golden)) in losses.iter().zip(&golden).enumerate() {
        assert!(
            ((loss - golden) / golden).abs() < 1e-5,
            "step {}: loss {loss}, golden {golden}",
            step + 1
        );
    }
}
