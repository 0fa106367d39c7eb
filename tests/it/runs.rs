//! What is made of runs: checks before, pages, comparisons, folders to upload.

use std::fs;
use std::process::{Command, Output};

use flux_lora_tests::{CONFIG, Workbench, program, root, tensors};
use serde_json::Value;

fn flux_lora(args: &[&str]) -> Output {
    Command::new(program()).args(args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

const SAMPLE: &str = "
[sample]
prompts = [\"a </script> cat\", \"a dog\"]
every = 2
num_inference_steps = 1
height = 64
width = 64
";

fn bench() -> Workbench {
    let bench = Workbench::new();
    bench.write_config(&(CONFIG.replace("steps = 40", "steps = 6") + SAMPLE));
    bench
}

#[test]
fn output_that_nobody_reads_ends_the_program_quietly() {
    let model = root().join("tests/fixtures/parity/pipeline_dev/model");
    let inspect = ["inspect", model.to_str().unwrap()];
    for args in [&inspect[..], &["schema"], &["completions", "bash"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = Command::new(program());
        let out = command.args(args).stdout(writer).output().unwrap();
        assert_eq!(out.status.code(), Some(0), "{args:?}");
        assert_eq!(text(&out.stderr), "", "{args:?}");
    }
    if let Ok(full) = fs::File::options().write(true).open("/dev/full") {
        let mut command = Command::new(program());
        let out = command.arg("schema").stdout(full).output().unwrap();
        assert_eq!(out.status.code(), Some(1));
        let said = text(&out.stderr);
        assert!(
            said.starts_with("error: cannot write to standard output: "),
            "{said}"
        );
    }
}

#[test]
fn check_tells_what_train_would_do_and_writes_nothing() {
    let bench = bench();
    let config = bench.path("run.toml").display().to_string();
    let output = bench.path("runs/new").display().to_string();
    let check = |more: &[&str]| {
        let args = ["check", &config, "--output", &output, "--json"];
        let out = flux_lora(&[&args[..], more].concat());
        let line = text(&out.stdout)
            .lines()
            .last()
            .unwrap_or_default()
            .to_string();
        (
            out,
            serde_json::from_str::<Value>(&line).unwrap_or_default(),
        )
    };
    let (out, report) = check(&[]);
    assert!(out.status.success(), "{report}");
    assert_eq!(report["would_train"], true);
    assert_eq!(report["pictures"], "5");
    assert!(
        report["steps"]
            .as_str()
            .unwrap()
            .contains("6 of 2 x 2 pictures"),
        "{report}"
    );
    assert!(!bench.path("runs").exists(), "nothing is written");

    for name in ["memory (estimate)", "a card of 8 GB", "time (estimate)"] {
        let value = report[name]
            .as_str()
            .unwrap_or_else(|| panic!("{name}: {report}"));
        assert!(value.contains("about"), "{value}");
    }
    assert!(
        report["a card of 8 GB"]
            .as_str()
            .unwrap()
            .starts_with("fits"),
        "{report}"
    );

    for name in ["as diffusers' file", "as kohya's file", "as ComfyUI's file"] {
        let value = report[name]
            .as_str()
            .unwrap_or_else(|| panic!("{name}: {report}"));
        assert!(
            value.contains("layers; keys loaded by diffusers"),
            "{value}"
        );
        assert!(value.contains("ComfyUI"), "{value}");
    }

    // What it counts is what train counts.
    let trained = bench.train("run", "flex", &["--json"]);
    let log = text(&trained.stdout);
    let model = log
        .lines()
        .find(|line| line.contains("\"trainable\""))
        .unwrap();
    let model: Value = serde_json::from_str(model).unwrap();
    let million = model["trainable"].as_f64().unwrap() / 1e6;
    assert!(
        report["trainable"]
            .as_str()
            .unwrap()
            .starts_with(&format!("{million:.3} million")),
        "{report} {model}"
    );
    assert_eq!(
        report["layers adapted"],
        model["adapted_layers"].to_string()
    );

    // What keeps train from starting keeps check from saying that it would.
    fs::write(bench.path("data/odd.png"), "no picture").unwrap();
    for more in [vec!["--set", "lora.target_modules=[\"nothing\"]"], vec![]] {
        let (out, report) = check(&more);
        assert_eq!(out.status.code(), Some(1), "{report}");
        let problems = report["problem"].as_array().unwrap();
        assert!(
            problems
                .iter()
                .any(|problem| problem.as_str().unwrap().contains("odd")),
            "{report}"
        );
        let refused = bench.train("other", "flex", &more);
        assert_eq!(refused.status.code(), Some(1));
        let says = text(&refused.stderr);
        assert!(
            problems
                .iter()
                .any(|problem| says.contains(problem.as_str().unwrap())),
            "{says} {report}"
        );
    }
    fs::remove_file(bench.path("data/odd.png")).unwrap();
    let args = [
        "check",
        &config,
        "--output",
        &bench.path("run").display().to_string(),
    ];
    let out = flux_lora(&args);
    assert_eq!(out.status.code(), Some(1));
    assert!(
        text(&out.stdout).contains("already holds checkpoints"),
        "{}",
        text(&out.stdout)
    );
}

#[test]
fn a_run_becomes_a_page_a_comparison_and_a_folder_to_upload() {
    let bench = bench();
    bench.train_ok("run", "flex", &[]);
    let run = bench.path("run").display().to_string();

    let out = flux_lora(&["report", &run]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    let page = fs::read_to_string(bench.path("run/report.html")).unwrap();
    let data = page
        .split_once("id=\"data\">")
        .unwrap()
        .1
        .split_once("</script>")
        .unwrap()
        .0;
    let data: Value = serde_json::from_str(data).unwrap();
    assert_eq!(data["status"], "finished");
    assert_eq!(data["series"]["loss"].as_array().unwrap().len(), 6);
    let samples = data["samples"].as_array().unwrap();
    // Before the first step, and after 2, 4 and 6, of two prompts.
    assert_eq!(samples.len(), 8);
    assert_eq!(
        (samples[0]["step"].as_u64(), samples[0]["prompt"].as_str()),
        (Some(0), Some("a </script> cat"))
    );
    assert!(
        samples[0]["src"]
            .as_str()
            .unwrap()
            .starts_with("data:image/png;base64,")
    );

    assert!(
        flux_lora(&["report", &run]).status.success(),
        "a report is replaced"
    );
    let mine = bench.path("mine.html").display().to_string();
    fs::write(&mine, "mine").unwrap();
    let refused = flux_lora(&["report", &run, "--out", &mine]);
    assert_eq!(refused.status.code(), Some(2));
    assert_eq!(fs::read_to_string(&mine).unwrap(), "mine");

    bench.train_ok("other", "flex", &["--set", "train.seed=8"]);
    let other = bench.path("other").display().to_string();
    let compared = text(&flux_lora(&["compare", &run, &other]).stdout);
    for line in [
        "train.seed: 7 | 8",
        "data: the same",
        "differ from 1 on",
        "not the same bytes",
    ] {
        assert!(compared.contains(line), "{line}: {compared}");
    }

    let folder = bench.path("upload").display().to_string();
    let args = [
        "export",
        &run,
        "--out",
        &folder,
        "--name",
        "cats",
        "--trigger",
        "sks \"cat\"",
        "--to",
        "all",
    ];
    let with_base = [&args[..], &["--base", "black-forest-labs/FLUX.1-dev"]].concat();
    let out = flux_lora(&with_base);
    assert!(out.status.success(), "{}", text(&out.stderr));
    for file in [
        "cats.safetensors",
        "cats-kohya.safetensors",
        "cats-comfyui.safetensors",
        "cats-peft/adapter_config.json",
        "sample-0.png",
        "sample-1.png",
    ] {
        assert!(bench.path("upload").join(file).is_file(), "{file}");
    }
    let card = fs::read_to_string(bench.path("upload/README.md")).unwrap();
    for line in [
        "base_model: black-forest-labs/FLUX.1-dev",
        "license: other",
        "license_name: flux-1-dev-non-commercial-license",
        "instance_prompt: \"sks \\\"cat\\\"\"",
        "weight_name=\"cats.safetensors\"",
        "models/loras",
        "| steps | 6 |",
        "non-commercial use",
    ] {
        assert!(card.contains(line), "{line}: {card}");
    }
    let again = flux_lora(&with_base);
    assert_eq!(again.status.code(), Some(2));
    assert!(text(&again.stderr).contains("add --overwrite"));

    // The files say how they were made, and not where.
    for file in ["cats.safetensors", "cats-kohya.safetensors"] {
        let shown = text(
            &flux_lora(&[
                "inspect",
                &bench.path("upload").join(file).display().to_string(),
            ])
            .stdout,
        );
        for line in [
            "metadata ss_steps: 6",
            "metadata ss_seed: 7",
            "metadata flux_lora.base_model_sha256: ",
        ] {
            assert!(shown.contains(line), "{line}: {shown}");
        }
        let metadata = shown.lines().filter(|line| line.starts_with("metadata"));
        let here = bench.dir.path().display().to_string();
        assert!(
            metadata
                .into_iter()
                .all(|line| !line.contains(&here) && !line.contains("path")),
            "{shown}"
        );
    }
}

#[test]
fn the_weights_to_export_are_chosen() {
    let bench = bench();
    // A scale of 1, so that nothing is folded; one validation, so that the best is not the last.
    let settings = ["--set=lora.lora_alpha=4"];
    let more = [
        "--set=ema.decay=0.5",
        "--set=validation.share=0.4",
        "--set=validation.every=5",
    ];
    bench.train_ok("run", "flex", &[&settings[..], &more[..]].concat());
    let export = |run: &str, which: &str| {
        let (run, out) = (bench.path(run), bench.path(which));
        let (run, out) = (run.display().to_string(), out.display().to_string());
        flux_lora(&[
            "export", &run, "--which", which, "--out", &out, "--name", "it", "--json",
        ])
    };
    let read = |path: &str| tensors(&bench.path(path));
    let last = read("run/ckpt-0000000006/lora.safetensors");
    let average = read("run/ckpt-0000000006/average.safetensors");
    assert_ne!(last, average);
    let best_weights = read("run/best.safetensors");
    assert_ne!(best_weights, average);
    for (which, weights, steps, note) in [
        ("finished", &average, 6, None),
        ("average", &average, 6, None),
        (
            "last",
            &last,
            6,
            Some("made with the average of the weights, which is not what is exported"),
        ),
        ("best", &best_weights, 5, None),
    ] {
        let out = export("run", which);
        assert!(out.status.success(), "{which}: {}", text(&out.stderr));
        assert!(
            &read(&format!("{which}/it.safetensors")) == weights,
            "{which}"
        );
        let card = fs::read_to_string(bench.path(which).join("README.md")).unwrap();
        for row in [format!("| steps | {steps} |"), "| seed | 7 |".into()] {
            assert!(card.contains(&row), "{which}: {card}");
        }
        let said = text(&out.stdout);
        match note {
            Some(note) => assert!(said.contains(note), "{said}"),
            None => assert!(!said.contains("which is not what is exported"), "{said}"),
        }
        // No picture of later weights stands beside earlier ones.
        let shown = fs::read(bench.path(which).join("sample-0.png")).unwrap();
        let of = format!("run/samples/step-{:07}-0.png", steps / 2 * 2);
        assert!(shown == fs::read(bench.path(&of)).unwrap(), "{which}");
        let told = format!("the samples are those after step {}", steps / 2 * 2);
        assert_eq!(said.contains(&told), steps % 2 == 1, "{said}");
    }
    bench.train_ok("plain", "flex", &settings);
    for (which, said) in [
        ("best", "no LoRA of a best validation"),
        ("average", "keeps no average"),
    ] {
        let out = export("plain", which);
        assert_eq!(out.status.code(), Some(1));
        assert!(text(&out.stderr).contains(said), "{}", text(&out.stderr));
    }
}

#[test]
fn shells_and_manuals_know_the_commands() {
    let bash = text(&flux_lora(&["completions", "bash"]).stdout);
    assert!(bash.contains("flux-lora") && bash.contains("--allow-inexact"));
    let folder = tempfile::tempdir().unwrap();
    let out = flux_lora(&["man", &folder.path().display().to_string()]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    let page = fs::read_to_string(folder.path().join("flux-lora-train.1")).unwrap();
    assert!(page.contains("resume"), "{page}");
    let help = text(&flux_lora(&["train", "--help"]).stdout);
    assert!(help.contains("Examples:"), "{help}");
}
