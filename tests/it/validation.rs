//! Held-out pictures and averages of the weights: they look on, and resume with the run.

use flux_lora_tests::{CONFIG, Workbench, checkpoints, tensors};
use serde_json::Value;

const STEPS: &str = "--set=train.steps=12";

/// A workbench with a folder of held-out pictures, and `extra` at the end of its configuration.
fn bench(extra: &str) -> Workbench {
    let bench = Workbench::new();
    let held = bench.path("held");
    std::fs::create_dir(&held).unwrap();
    for i in 0..2u32 {
        let image = image::RgbImage::from_fn(80, 80, |x, y| {
            image::Rgb([(x * (i + 2)) as u8, (y * 3) as u8, (x + y) as u8])
        });
        image.save(held.join(format!("{i}.png"))).unwrap();
        std::fs::write(held.join(format!("{i}.txt")), format!("a held picture {i}")).unwrap();
    }
    bench.write_config(&format!("{CONFIG}\n{extra}"));
    bench
}

fn lines(metrics: &str) -> Vec<Value> {
    let lines = metrics.lines();
    lines
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn validation_changes_no_bits_of_the_run() {
    let bench = bench("");
    bench.train_ok("plain", "flex", &[STEPS]);
    let held = ["--set=validation.path=held", "--set=validation.every=3"];
    bench.train_ok("validated", "flex", &[&[STEPS], &held[..]].concat());
    let (plain, validated) = (bench.result("plain"), bench.result("validated"));
    assert!(plain.optimizer == validated.optimizer && plain.lora == validated.lora);
    let mut found = lines(&validated.metrics);
    let mut least = f64::INFINITY;
    for (index, line) in found.iter_mut().enumerate() {
        let validation = line.as_object_mut().unwrap().remove("validation");
        assert_eq!(validation.is_some(), (index + 1) % 3 == 0, "line {index}");
        let Some(validation) = validation else {
            continue;
        };
        let bands: Vec<f64> = serde_json::from_value(validation["bands"].clone()).unwrap();
        let loss = validation["loss"].as_f64().unwrap();
        assert_eq!(bands.len(), 4);
        assert!((bands.iter().sum::<f64>() / 4.0 - loss).abs() < 1e-12);
        assert_eq!(validation["best"], loss < least);
        least = least.min(loss);
    }
    assert_eq!(found, lines(&plain.metrics));
    assert!(!bench.path("plain/best.safetensors").exists());

    // What is measured moves with what is learned, and not with the seed of the run.
    let other = [
        STEPS,
        "--set=train.seed=8",
        held[0],
        held[1],
        "--set=optimizer.learning_rate=1e-30",
    ];
    bench.train_ok("still", "flex", &other);
    let still = lines(&bench.result("still").metrics);
    assert_eq!(
        still[2]["validation"]["loss"],
        still[11]["validation"]["loss"]
    );
    let learned = lines(&validated.metrics);
    assert_ne!(
        learned[11]["validation"]["loss"],
        still[11]["validation"]["loss"]
    );
}

#[test]
fn a_validated_run_resumes_exactly_with_its_best_and_its_early_stop() {
    // A rate at which the loss soon rises once.
    let settings = [
        "--set=validation.share=0.4",
        "--set=validation.every=1",
        "--set=validation.patience=1",
        "--set=optimizer.learning_rate=30",
        "--set=train.divergence_factor=none",
        "--set=lr_scheduler.name=constant",
        "--set=lr_scheduler.warmup_steps=0",
    ];
    let bench = bench("");
    bench.train_ok("straight", "flex", &settings);
    let expected = bench.result("straight");
    let metrics = lines(&expected.metrics);
    let best = metrics
        .iter()
        .rfind(|line| line["validation"]["best"] == true);
    let best = best.unwrap()["step"].as_u64().unwrap();
    assert_eq!(
        metrics.len() as u64,
        best + 1,
        "stopped after one that found no less"
    );
    assert!(metrics.len() < 40);
    let best_lora = std::fs::read(bench.path("straight/best.safetensors")).unwrap();
    for step in 1..metrics.len() {
        let run = format!("resumed-{step}");
        let checkpoint = format!("ckpt-{step:010}");
        bench.copy_run("straight", &run, |name| {
            ["cache", "metrics.jsonl", "best.safetensors", &checkpoint].contains(&name)
        });
        bench.train_ok(&run, "flex", &[&settings[..], &["--resume"]].concat());
        let what = format!("resumed after step {step}");
        bench.result(&run).assert_same(&expected, &what);
        let found = std::fs::read(bench.path(&run).join("best.safetensors")).unwrap();
        assert!(found == best_lora, "{what}: another best LoRA");
    }
    // A run that has stopped early stays so.
    let count = checkpoints(&bench.path("straight")).len();
    bench.train_ok("straight", "flex", &[&settings[..], &["--resume"]].concat());
    assert_eq!(checkpoints(&bench.path("straight")).len(), count);
    bench
        .result("straight")
        .assert_same(&expected, "resumed at its end");

    // Gone back on, the best is that of the steps that are left, whatever later ones have left there.
    bench.copy_run("straight", "back", |name| name != "lora.safetensors");
    let checkpoint = bench.path("back/ckpt-0000000001");
    let back = ["--resume", checkpoint.to_str().unwrap(), "--steps=1"];
    bench.train_ok("back", "flex", &[&settings[..], &back[..]].concat());
    let first = std::fs::read(bench.path("back/best.safetensors")).unwrap();
    assert_eq!(first == best_lora, best == 1);
    // What was found stays found when a run goes on without validation; a loss on other pictures is no measure of these.
    let resumed = ["--resume", checkpoint.to_str().unwrap(), "--steps=1"];
    let first = tensors(&bench.path("back/best.safetensors"));
    let without = [&resumed[..], &["--adopt-config"]].concat();
    bench.train_ok("back", "flex", &without);
    assert_eq!(tensors(&bench.path("back/best.safetensors")), first);
    let others = [&without[..], &["--set=validation.path=held"]].concat();
    bench.train_ok("back", "flex", &others);
    assert!(!bench.path("back/best.safetensors").exists());
}

#[test]
fn nonsense_is_refused() {
    let bench = bench("");
    for (set, said) in [
        (&["validation.share=0.01"][..], "holds out 0"),
        (&["validation.every=5"], "`validation.share` is required"),
        (
            &["validation.share=0.5", "validation.path=held"],
            "cannot be given with",
        ),
        (&["validation.share=1.5"], "must be above 0 and below 1"),
        (&["validation.path=nowhere"], "nowhere"),
        (&["ema.decay=1.0"], "must be above 0 and below 1"),
        (
            &["ema.decay=0.9", "optimizer.name=schedule_free_adamw"],
            "an average of its own",
        ),
    ] {
        let set: Vec<String> = set.iter().map(|set| format!("--set={set}")).collect();
        let set: Vec<&str> = set.iter().map(String::as_str).collect();
        let out = bench.train("refused", "flex", &set);
        let text = String::from_utf8_lossy(&out.stderr);
        assert!(!out.status.success(), "{set:?}");
        assert!(text.contains(said), "{set:?}: {text}");
    }
}

#[test]
fn an_average_is_resumed_exactly_and_changes_no_bits_of_the_training() {
    let bench = bench("");
    let folded = "--set=lora.lora_alpha=4"; // a scale of 1, so that nothing is folded into the finished file
    bench.train_ok("plain", "flex", &[STEPS, folded]);
    let ema = [STEPS, folded, "--set=ema.decay=0.5"];
    bench.train_ok("straight", "flex", &ema);
    let (plain, expected) = (bench.result("plain"), bench.result("straight"));
    assert!(
        plain.checkpoint_lora == expected.checkpoint_lora && plain.optimizer == expected.optimizer
    );
    let average = tensors(&bench.path("straight/ckpt-0000000012/average.safetensors"));
    assert_eq!(tensors(&bench.path("straight/lora.safetensors")), average);
    assert_ne!(tensors(&bench.path("plain/lora.safetensors")), average);
    for step in [1, 2, 7, 11] {
        let run = format!("resumed-{step}");
        let checkpoint = format!("ckpt-{step:010}");
        bench.copy_run("straight", &run, |name| {
            ["cache", "metrics.jsonl", &checkpoint].contains(&name)
        });
        bench.train_ok(&run, "flex", &[&ema[..], &["--resume"]].concat());
        bench
            .result(&run)
            .assert_same(&expected, &format!("resumed after step {step}"));
    }
    let kept = [&ema[..], &["--set=ema.export=false"]].concat();
    bench.train_ok("last", "flex", &kept);
    // The headers say which settings made them.
    let finished = |run: &str| tensors(&bench.path(run).join("lora.safetensors"));
    assert_eq!(finished("last"), finished("plain"));
}
