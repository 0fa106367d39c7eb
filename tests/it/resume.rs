//! Stopped and resumed runs end in the bits of the uninterrupted run.

use std::collections::BTreeMap;
#[cfg(feature = "ndarray")]
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

#[cfg(feature = "ndarray")]
use flux_lora::{
    device::open,
    run::checkpoint::{Event, Opened, Snapshot, restore},
    run::manifest::verify,
    train::pipeline,
};
#[cfg(feature = "ndarray")]
use flux_lora_tests::last_checkpoint;
use flux_lora_tests::{RunResult, Workbench, checkpoints, root};
#[cfg(feature = "ndarray")]
use flux_model::{family::Family, flux1::Flux1, prompted::Prompted, weights::Base};
use lora_core::files::safetensors::TensorFile;
use lora_core::random::Stream;
#[cfg(feature = "ndarray")]
use lora_core::training::optimizers::UpdateRule;

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

/// A run with `settings`, stopped after each step in `steps`; what it ends in.
fn resumes_exactly_with(settings: &[&str], steps: &[u64]) -> RunResult {
    let bench = Workbench::new();
    bench.train_ok("straight", "flex", settings);
    let expected = bench.result("straight");
    for step in steps {
        let run = format!("resumed-{step}");
        let checkpoint = format!("ckpt-{step:010}");
        bench.copy_run("straight", &run, |name| {
            name == "cache" || name == "metrics.jsonl" || name == checkpoint
        });
        bench.train_ok(&run, "flex", &[settings, &["--resume"]].concat());
        let found = bench.result(&run);
        found.assert_same(&expected, &format!("{settings:?}, resumed after {step}"));
    }
    expected
}

#[test]
fn trained_text_encoders_resume_exactly_from_every_step() {
    let settings = [
        "--set=lora.text_encoder.r=3",
        "--set=lora.text_encoder_2.lora_alpha=2",
        "--set=optimizer.text_encoder_lr=1e-3",
        "--set=ema.decay=0.9",
        "--set=validation.share=0.2",
        "--set=validation.every=2",
        "--set=train.steps=6",
    ];
    resumes_exactly_with(&settings, &[1, 2, 3, 4, 5]);
}

#[test]
fn optimizers_with_more_than_moments_resume_exactly() {
    let constant = [
        "--set=lr_scheduler.name=constant",
        "--set=lr_scheduler.warmup_steps=0",
        "--set=train.steps=12",
    ];
    let with = |more: &[&'static str]| [&constant, more].concat();
    let prodigy = with(&[
        "--set=optimizer.name=prodigy",
        "--set=optimizer.learning_rate=1",
        "--set=optimizer.d0=1e-4",
    ]);
    let prodigy = resumes_exactly_with(&prodigy, &[1, 5, 11]);
    let found: Vec<f64> = prodigy
        .metrics
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
        .map(|line| line["d"].as_f64().unwrap())
        .collect();
    assert!(found[11] > found[0], "the step size grows: {found:?}");

    let schedule_free = with(&["--set=optimizer.name=schedule_free_adamw"]);
    resumes_exactly_with(&schedule_free, &[1, 5, 11]);
    resumes_exactly_with(
        &with(&[
            "--set=optimizer.name=adamw8bit",
            "--set=optimizer.min_8bit_size=16",
        ]),
        &[1, 7],
    );
}

#[test]
fn a_base_in_few_bits_resumes_exactly_streamed_or_not() {
    let with = |more: &[&'static str]| {
        let settings = ["--set=train.steps=12"];
        [&settings, more].concat()
    };
    let dense = resumes_exactly_with(&with(&[]), &[]);
    for dtype in ["--set=model.base_dtype=nf4", "--set=model.base_dtype=q8"] {
        let resident = resumes_exactly_with(&with(&[dtype]), &[1, 7]);
        assert_ne!(resident.metrics, dense.metrics);
        let streamed = resumes_exactly_with(&with(&[dtype, "--set=memory.base=stream"]), &[7]);
        let last = |result: &RunResult| -> f64 {
            let line = result.metrics.lines().last().unwrap();
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            line["loss"].as_f64().unwrap()
        };
        assert_eq!(last(&streamed).to_bits(), last(&resident).to_bits());
    }
}

#[test]
fn blocks_in_bf16_train_as_in_f32_and_resume_exactly() {
    let with = |more: &'static [&'static str]| [&["--set=train.steps=12"], more].concat();
    let losses = |result: &RunResult| -> Vec<f64> {
        let lines = result.metrics.lines();
        let loss = |line| serde_json::from_str::<serde_json::Value>(line).unwrap()["loss"].as_f64();
        lines.map(|line| loss(line).unwrap()).collect()
    };
    let exact = losses(&resumes_exactly_with(&with(&[]), &[]));
    let halves = with(&["--set=model.compute=bf16"]);
    let found = losses(&resumes_exactly_with(&halves, &[1, 7]));
    assert_ne!(found, exact);
    for (found, exact) in found.iter().zip(&exact) {
        assert!((found - exact).abs() < 0.01 * exact, "{found}, not {exact}");
    }
    let all = with(&["--set=model.compute=bf16", "--set=memory.recompute=all"]);
    let none = with(&["--set=model.compute=bf16", "--set=memory.recompute=none"]);
    let [all, none] = [all, none].map(|settings| resumes_exactly_with(&settings, &[]));
    assert_eq!(all.metrics, none.metrics);
}

#[cfg(feature = "ndarray")]
#[test]
fn blocks_in_bf16_are_refused_where_the_device_has_none() {
    let bench = Workbench::new();
    let out = bench.train("run", "ndarray", &["--set=model.compute=bf16"]);
    let said = String::from_utf8_lossy(&out.stderr);
    let expected = "`model.compute`: this device has no bf16: use \"f32\"";
    assert!(!out.status.success() && said.contains(expected), "{said}");
}

#[test]
fn a_base_in_few_bits_is_made_once_for_all_runs() {
    let bench = Workbench::new();
    let train = |run: &str, more: &[&str]| {
        let settings = ["--set=train.steps=4", "--set=model.base_dtype=nf4"];
        let out = bench.train(run, "flex", &[&settings, more].concat());
        let said = String::from_utf8_lossy(&out.stderr).to_string();
        assert!(out.status.success(), "{said}");
        said
    };
    let files = || -> Vec<_> {
        let entries = std::fs::read_dir(bench.path("user-cache/flux-lora")).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    };
    let (once, before) = ("once for all runs", "made before");
    let said = train("first", &[]);
    assert!(said.contains(once) && !said.contains(before), "{said}");
    let expected = bench.result("first");
    let [file] = &files()[..] else {
        panic!("{:?}", files())
    };
    for (run, more) in [
        ("second", &[][..]),
        ("streamed", &["--set=memory.base=stream"]),
    ] {
        let said = train(run, more);
        assert!(said.contains(before) && !said.contains(once), "{said}");
        bench.result(run).assert_same(&expected, run);
    }

    // A file that is damaged, and what a killed process left, are replaced.
    let mut bytes = std::fs::read(file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(file, &bytes).unwrap();
    std::fs::write(format!("{}.tmp-4194305", file.display()), "half").unwrap();
    let said = train("damaged", &[]);
    assert!(said.contains("SHA-256 differs") && said.contains("it is made again"));
    assert!(said.contains(once), "{said}");
    bench.result("damaged").assert_same(&expected, "damaged");
    assert_eq!(&files()[..], std::slice::from_ref(file));
    assert!(train("after", &[]).contains(before));

    // Where no file can be, the run makes the same weights in memory.
    std::fs::remove_dir_all(bench.path("user-cache")).unwrap();
    std::fs::write(bench.path("user-cache"), "no folder").unwrap();
    let said = train("without", &[]);
    assert!(said.contains("in memory, at every start"), "{said}");
    bench.result("without").assert_same(&expected, "without");
}

#[test]
fn the_finished_lora_of_a_schedule_free_optimizer_is_the_average() {
    let bench = Workbench::new();
    let settings = [
        "--set=lr_scheduler.name=constant",
        "--set=lr_scheduler.warmup_steps=0",
        "--set=train.steps=6",
        "--set=optimizer.name=schedule_free_adamw",
        "--set=lora.lora_alpha=4", // a scale of 1, so that nothing is folded into the file for other programs
    ];
    bench.train_ok("run", "flex", &settings);
    let tensors = |path: &str| {
        let file = TensorFile::open(&bench.path("run").join(path)).unwrap();
        let names = file
            .names()
            .map(|name| (name.to_string(), file.read(name).unwrap().to_f32()));
        names.collect::<BTreeMap<_, _>>()
    };
    let average = tensors("ckpt-0000000006/average.safetensors");
    assert_eq!(tensors("lora.safetensors"), average);
    assert_ne!(tensors("ckpt-0000000006/lora.safetensors"), average);
}

#[cfg(feature = "ndarray")]
#[test]
fn ndarray_resumes_exactly() {
    resumes_exactly("ndarray", [1, 5, 13, 26, 39].into_iter());
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

/// Kills a run `kills` times, while it starts or some steps after, resumes it each time, and lets it finish. It has the settings
/// `own` besides those of the run that it is compared with, and is resumed on one of `devices` after the other; the run that it is
/// compared with is on the first.
fn kills_change_nothing(devices: &[&str], kills: usize, settings: &[&str], own: &[&str]) {
    let bench = Workbench::new();
    let started = Instant::now();
    let device = devices[0];
    bench.train_ok("straight", device, settings);
    let whole_run = started.elapsed().as_millis() as u64;
    let expected = bench.result("straight");
    let steps = expected.metrics.lines().count() as u64;
    let args = [
        settings,
        own,
        &["--resume", "--set=checkpoint.every=2"],
        &["--set=checkpoint.keep=2"],
    ]
    .concat();
    let lines = || {
        let log = std::fs::read_to_string(bench.path("killed/metrics.jsonl"));
        log.map_or(0, |text| text.lines().count() as u64)
    };
    let mut random = Stream::new(2026, "kills", 0, 0);
    let (mut killed, mut resumed) = (0, 0);
    for attempt in 0..10 * kills {
        if killed == kills {
            break;
        }
        resumed += usize::from(!checkpoints(&bench.path("killed")).is_empty());
        let on = devices[(attempt + 1) % devices.len()];
        let mut child = bench.train_in_background("killed", on, &args);
        // First right after a save, so that what follows is resumed; then anywhere, and never so late that the run ends before.
        let (ahead, pause_ms) = match resumed {
            0 => (3, 0),
            _ => (random.below(3), random.below(1 + whole_run / 4)),
        };
        let wanted = (lines() + ahead).min(steps - 2);
        while lines() < wanted && child.try_wait().unwrap().is_none() {
            sleep(Duration::from_millis(2));
        }
        sleep(Duration::from_millis(pause_ms));
        let _ = child.kill(); // SIGKILL, unless it has ended
        child.wait().unwrap();
        if !bench.path("killed/lora.safetensors").is_file() {
            killed += 1;
        } else {
            // Finished before it was killed often enough: go back to the start.
            let what = format!("{device}, killed");
            bench.result("killed").assert_same(&expected, &what);
            std::fs::remove_dir_all(bench.path("killed")).unwrap();
        }
    }
    assert_eq!(killed, kills);
    assert!(
        resumed > 0,
        "{device}: every kill came before the first save"
    );
    bench.train_ok("killed", device, &args);
    let what = format!("{device}, killed {kills} times");
    bench.result("killed").assert_same(&expected, &what);
}

#[test]
fn twenty_kills_change_nothing_on_flex() {
    kills_change_nothing(&["flex"], 20, &[], &[]);
}

#[test]
fn five_kills_change_nothing_on_klein() {
    let model = root().join("tests/fixtures/parity/flux2_pipeline_distilled/model");
    let model = format!("--set=model.path={}", model.display());
    kills_change_nothing(&["flex"], 5, &[&model, "--yes-distilled"], &[]);
}

#[test]
fn a_run_whose_blocks_are_on_disk_is_killed_and_ends_in_the_bits_of_one_in_memory() {
    let in_memory = ["--set=memory.base=resident", "--set=memory.recompute=none"];
    kills_change_nothing(
        &["flex"],
        5,
        &in_memory,
        &["--set=memory.base=stream", "--set=memory.recompute=all"],
    );
}

#[test]
fn a_base_in_few_bits_is_killed_streamed_and_ends_in_the_bits_of_one_in_memory() {
    let klein = root().join("tests/fixtures/parity/flux2_pipeline_distilled/model");
    let klein = format!("--set=model.path={}", klein.display());
    let stream = ["--set=memory.base=stream"];
    kills_change_nothing(&["flex"], 3, &["--set=model.base_dtype=nf4"], &stream);
    kills_change_nothing(&["flex"], 3, &["--set=model.base_dtype=q8"], &stream);
    let klein = [&*klein, "--yes-distilled", "--set=model.base_dtype=nf4"];
    kills_change_nothing(&["flex"], 3, &klein, &stream);
}

/// Four passes a step: what 1, 2 and 4 workers share.
const FOUR_PASSES: [&str; 2] = [
    "--set=train.gradient_accumulation_steps=4",
    "--set=train.steps=16",
];

/// What 1, 2 and 4 workers on one device end in, with the settings `more` where there are several.
fn workers_end_in_the_same_bits(device: &str, more: &[&str]) {
    let bench = Workbench::new();
    bench.train_ok("straight", device, &FOUR_PASSES);
    let expected = bench.result("straight");
    for workers in [2, 4] {
        let devices = vec![device; workers].join(",");
        bench.train_ok(&devices, &devices, &[&FOUR_PASSES, more].concat());
        bench.result(&devices).assert_same(&expected, &devices);
    }
}

#[test]
fn one_worker_two_and_four_end_in_the_same_bits() {
    workers_end_in_the_same_bits("flex", &[]);
    workers_end_in_the_same_bits("flex", &["--set=memory.base=stream"]);
}

#[cfg(feature = "ndarray")]
#[test]
fn one_worker_two_and_four_end_in_the_same_bits_on_ndarray() {
    workers_end_in_the_same_bits("ndarray", &[]);
}

#[test]
fn a_run_is_killed_and_resumed_by_another_number_of_workers() {
    let devices = ["flex", "flex,flex", "flex,flex,flex,flex"];
    kills_change_nothing(&devices, 9, &FOUR_PASSES, &[]);
}

#[test]
fn devices_that_cannot_share_a_step_are_refused() {
    let bench = Workbench::new();
    let said = |devices: &str| {
        let out = bench.train("refused", devices, &FOUR_PASSES);
        assert_eq!(out.status.code(), Some(2), "{devices}");
        assert!(!bench.path("refused").exists(), "{devices}");
        String::from_utf8_lossy(&out.stderr).to_string()
    };
    let uneven = said("flex,flex,flex");
    let named = "`train.gradient_accumulation_steps` is 4; make it 6";
    assert!(uneven.contains(named), "{uneven}");
    assert!(said("flex,flex:1").contains("no flex device found on this machine: index 1"));
}

#[cfg(feature = "ndarray")]
#[test]
fn five_kills_change_nothing_on_ndarray() {
    kills_change_nothing(&["ndarray"], 5, &[], &[]);
}

#[cfg(feature = "wgpu")]
#[test]
fn three_kills_change_nothing_on_wgpu() {
    let few = [
        "--set=train.steps=6",
        "--set=lr_scheduler.warmup_steps=2",
        "--set=train.gradient_accumulation_steps=1",
    ];
    kills_change_nothing(&["wgpu"], 3, &few, &[]);
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
    bench.train_ok("recomputed", "flex", &args("memory.recompute=all"));
    let expected = bench.result("recomputed");
    for recompute in [
        "memory.recompute=none",
        "memory.recompute=1",
        "memory.recompute=3",
    ] {
        bench.train_ok(recompute, "flex", &args(recompute));
        bench.result(recompute).assert_same(&expected, recompute);
    }
}

/// Restores a checkpoint on a device and takes it again: every file must have the bytes it had.
#[cfg(feature = "ndarray")]
fn assert_restored_to_the_byte(checkpoint: &Path, device: &str) {
    let verified = verify(checkpoint).unwrap();
    let opened = Opened::read(verified).unwrap();
    let (state, config) = (opened.state.clone(), opened.config.clone());
    let loras = config.lora.configs();
    let device = open(device).unwrap();
    let network = Flux1::open(pipeline(&config, true).unwrap())
        .unwrap()
        .network(Base::default(), &device.device.clone().autodiff())
        .unwrap();
    let text = None;
    let model = Prompted::<Flux1> { network, text };
    let record = opened.record().unwrap();
    let optimizer = UpdateRule::from(&config.optimizer.rule);
    let training = restore(record, model, &loras, optimizer, &device.device).unwrap();
    let snapshot = Snapshot::take(&training, None, None, state, &loras).unwrap();
    snapshot.with_files(|files| {
        assert_eq!(opened.verified.manifest.files.len(), files.len());
        for (name, content) in files {
            let mut bytes = Vec::new();
            content(&mut bytes).unwrap();
            let stored = std::fs::read(opened.verified.path(name).unwrap()).unwrap();
            assert!(stored == bytes, "{}: {name}", device.name);
        }
    });
}

#[cfg(feature = "ndarray")]
#[test]
fn a_run_moves_from_backend_to_backend_with_its_state_intact() {
    let devices: &[&str] = if cfg!(feature = "wgpu") {
        &["flex", "ndarray", "wgpu", "flex"]
    } else {
        &["flex", "ndarray", "flex"]
    };
    // The steps of the run grow with each move, so the learning rate may not depend on them.
    let args = |steps: usize| {
        let steps = format!("--set=train.steps={steps}");
        let rest = [
            "--set=lr_scheduler.name=\"constant\"",
            "--set=lr_scheduler.warmup_steps=0",
            "--set=train.gradient_accumulation_steps=1",
            "--set=checkpoint.every=100",
            "--resume",
        ];
        [&[steps][..], &rest.map(String::from)].concat()
    };
    let bench = Workbench::new();
    let train = |run: &str, device: &str, args: &[String]| {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        bench.train(run, device, &args)
    };
    let run = bench.path("moved");
    for (moves, device) in devices.iter().enumerate() {
        let mut args = args(2 * (moves + 1));
        if moves > 0 {
            let (last, before) = (run.join(last_checkpoint(&run)), devices[moves - 1]);
            let refused = train("moved", device, &args);
            let message = String::from_utf8_lossy(&refused.stderr);
            assert_eq!(refused.status.code(), Some(1), "{message}");
            let named = format!("another device ({before}; now {device})");
            assert!(
                message.contains(&named) && message.contains("--allow-inexact"),
                "{message}"
            );
            assert_restored_to_the_byte(&last, device);
            args.push("--allow-inexact".into());
        }
        let out = train("moved", device, &args);
        let message = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "{device}: {message}");
    }
    let opened = Opened::read(verify(&run.join(last_checkpoint(&run))).unwrap()).unwrap();
    for (moves, pair) in devices.windows(2).enumerate() {
        let (step, what) = (
            2 * (moves as u64 + 1),
            format!("device changed from {} to {}", pair[0], pair[1]),
        );
        assert!(opened.state.events.contains(&Event { step, what }));
    }

    let out = train("straight", "flex", &args(2 * devices.len()));
    assert!(out.status.success());
    let losses = |run: &str| -> Vec<f64> {
        let text = std::fs::read_to_string(bench.path(run).join("metrics.jsonl")).unwrap();
        let lines = text
            .lines()
            .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        lines.map(|line| line["loss"].as_f64().unwrap()).collect()
    };
    let (straight, moved) = (losses("straight"), losses("moved"));
    assert_eq!(straight.len(), moved.len());
    for (a, b) in straight.iter().zip(&moved) {
        assert!(((a - b) / a).abs() < 1e-4, "{straight:?} and {moved:?}");
    }
}
