//! What a run tells people and programs: events, tables, curves.

use std::fs;
use std::path::Path;
use std::process::Output;

use flux_lora_tests::{CONFIG, Workbench};
use serde_json::Value;

fn events(out: &Output) -> Vec<Value> {
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    let text = String::from_utf8(out.stdout.clone()).unwrap();
    let parse = |line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}"));
    text.lines().map(parse).collect()
}

fn named<'a>(events: &'a [Value], name: &str) -> Vec<&'a Value> {
    events
        .iter()
        .filter(|event| event["event"] == name)
        .collect()
}

/// The columns that a resumed run writes again in the same digits.
fn table(run: &Path) -> Vec<Vec<String>> {
    let text = fs::read_to_string(run.join("metrics.csv")).unwrap();
    let rows = text
        .lines()
        .map(|line| line.split(',').take(5).map(String::from).collect());
    rows.collect()
}

#[test]
fn a_program_reads_events_and_tables_that_a_resume_keeps_true() {
    let bench = Workbench::new();
    bench.write_config(&CONFIG.replace("steps = 40", "steps = 6"));
    let whole = events(&bench.train("whole", "flex", &["--json"]));
    let steps = named(&whole, "step");
    assert_eq!(steps.len(), 6);
    assert_eq!(steps[5]["step"], 6);
    for field in ["loss", "mean_loss", "grad_norm", "lr", "seconds", "left_s"] {
        assert!(steps[0][field].is_f64(), "{field}: {}", steps[0]);
    }
    let finished = whole.last().unwrap();
    assert_eq!(finished["event"], "finished");
    assert!(Path::new(finished["LoRA"].as_str().unwrap()).is_file());
    assert!(!named(&whole, "log").is_empty());

    let expected = table(&bench.path("whole"));
    assert_eq!(expected[0], ["step", "epoch", "loss", "grad_norm", "lr"]);
    assert_eq!(expected.len(), 7);
    let metrics = fs::read_to_string(bench.path("whole/metrics.jsonl")).unwrap();
    for (line, row) in metrics.lines().zip(&expected[1..]) {
        let line: Value = serde_json::from_str(line).unwrap();
        for (name, cell) in expected[0].iter().zip(row) {
            assert_eq!(line[name].as_f64().unwrap(), cell.parse::<f64>().unwrap());
        }
    }

    bench.copy_run("whole", "cut", |name| {
        name != "ckpt-0000000005" && name != "ckpt-0000000006"
    });
    let resumed = events(&bench.train("cut", "flex", &["--json", "--resume"]));
    assert_eq!(named(&resumed, "step").len(), 2);
    assert_eq!(table(&bench.path("cut")), expected);
    let files = fs::read_dir(bench.path("cut/tensorboard")).unwrap();
    assert_eq!(files.count(), 1);
    let timings = fs::read_to_string(bench.path("cut/timings.jsonl")).unwrap();
    assert_eq!(timings.matches("started_on").count(), 2, "{timings}");
    bench
        .result("cut")
        .assert_same(&bench.result("whole"), "resumed");
}

#[test]
fn quiet_says_the_result_alone() {
    let bench = Workbench::new();
    bench.write_config(&CONFIG.replace("steps = 40", "steps = 6"));
    bench.train_ok("first", "flex", &[]); // what is lost of the data is said of a run that begins
    let out = bench.train("first", "flex", &["--quiet", "--resume", "--steps", "7"]);
    assert!(out.status.success());
    assert_eq!(String::from_utf8_lossy(&out.stderr), "");
    let result = String::from_utf8(out.stdout).unwrap();
    assert!(result.starts_with("LoRA:"), "{result}");
}
