//! From command line to library: one function a command. The only file of the library that prints.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context;
use clap::CommandFactory;
use flux_model::pipeline::PipelineFolder;
use serde_json::{Value, json};
use tracing::info;

use crate::cli::{CacheArgs, Cli, Command, RunArgs, TrainArgs, UsageError};
use crate::command_to_resume::command_to_resume;
use crate::config::{ConfigError, RunConfig, reference};
use crate::convert::{convert, load_loras};
use crate::dev::{bench, parity, quickstart, random_weights};
use crate::device::{self, BACKENDS, DeviceError};
use crate::nearest::printable;
use crate::output::{Output, print, say};
use crate::run::checkpoint::is_checkpoint_folder;
use crate::run::folder::RunDir;
use crate::run::resume::{Accepted, Resume};
use crate::sample::sample;
use crate::train::{Outcome, TrainOptions};
use crate::{check, compare, export, hub, inspect, merge, report};

/// Runs one command.
///
/// # Errors
/// Whatever went wrong, as one chain to print.
pub fn run(command: Command, output: Output) -> anyhow::Result<ExitCode> {
    match command {
        Command::Train(args) => train(args, output)?,
        Command::Cache(args) => cache(args, output)?,
        Command::Sample(args) => sample(&args, output)?,
        Command::Convert(args) => convert(&args, output)?,
        Command::Merge {
            model,
            offline,
            lora,
            out,
        } => {
            let model = hub::folder_of(&model, hub::Replaced::default(), offline)?;
            let loras = load_loras(&lora, &PipelineFolder::open(&model)?)?;
            let changed = merge::merge(&model, loras, &out)?;
            let fields = [
                ("merged_model", json!(out)),
                ("tensors_changed", json!(changed)),
            ];
            output.result("merged", &fields)?;
        }
        Command::Inspect { path } => output.text("inspected", &inspect::describe(&path)?)?,
        Command::Check(args) => return check_run(&args, output),
        Command::Compare { a, b } => compare_runs(&a, &b, output)?,
        Command::Export(args) => {
            let exported = export::export(&args)?;
            let fields = [
                ("folder", json!(exported.folder)),
                ("file", json!(exported.files)),
                ("note", json!(exported.notes)),
            ];
            output.result("exported", &fields)?;
        }
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "flux-lora", &mut script);
            print(String::from_utf8_lossy(&script))?;
        }
        Command::Man { folder } => {
            std::fs::create_dir_all(&folder)
                .and_then(|()| clap_mangen::generate_to(Cli::command(), &folder))
                .with_context(|| format!("write into {}", folder.display()))?;
            output.result("man", &[("manual", json!(folder.join("flux-lora.1")))])?;
        }
        Command::Schema => say!("{:#}", reference::schema())?,
        Command::Reference { file } => {
            let named = || file.display().to_string();
            let text = std::fs::read_to_string(&file).with_context(named)?;
            let text = reference::renewed(&text).with_context(named)?;
            std::fs::write(&file, text).with_context(named)?;
            output.result("reference", &[("renewed", json!(file))])?;
        }
        Command::Report { run, out } => {
            let run = report::open_run(&run)?;
            let out = out.unwrap_or_else(|| run.path().join("report.html"));
            report::write_page(&run, &out)?;
            output.result("report", &[("report", json!(out))])?;
        }
        Command::Watch { run, port } => {
            let server = report::watch::Server::bind(RunDir::open(&run)?, port)?;
            output.result("watch", &[("watch", json!(server.address()))])?;
            server.serve();
        }
        Command::Parity(args) => return parity::run(&args),
        Command::Devices => output.text("devices", &devices())?,
        Command::Bench(command) => bench::run(&command)?,
        Command::Quickstart(args) => print(quickstart::show(&args)?)?,
        Command::RandomWeights { folder, out, seed } => {
            random_weights::fill(&folder, &out, seed)?;
            say!("pipeline with random weights: {}", out.display())?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// 2 for usage and configuration, 1 for everything else.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    let is_usage = error.chain().any(|cause| {
        cause.is::<ConfigError>() || cause.is::<DeviceError>() || cause.is::<UsageError>()
    });
    if is_usage { 2 } else { 1 }
}

fn cache(args: CacheArgs, say: Output) -> anyhow::Result<()> {
    let (config, output) = configured(&args.run)?;
    let device = args.run.device;
    let device = device.unwrap_or_else(|| device::default_name().into());
    let mut options = TrainOptions::new(output, device).resume(Resume::Newest);
    options.distilled = args.run.yes_distilled;
    options.skip_bad = args.skip_bad;
    options.offline = args.run.offline;
    let encoded = crate::train::encode(&config, &options)?;
    let fields = [
        ("cache", json!(encoded.folder)),
        ("trained_samples", json!(encoded.trained)),
        ("held_out_samples", json!(encoded.held_out)),
    ];
    say.result("cached", &fields)?;
    Ok(())
}

fn train(args: TrainArgs, say: Output) -> anyhow::Result<()> {
    let (config, mut output) = configured(&args.run)?;
    let resume = match args.resume {
        None => Resume::No,
        Some(None) => Resume::Newest,
        Some(Some(path)) => {
            if !path.is_dir() {
                return Err(UsageError(format!(
                    "--resume {}: no such run folder or checkpoint",
                    path.display()
                ))
                .into());
            }
            let path =
                std::fs::canonicalize(&path).with_context(|| format!("open {}", path.display()))?;
            if is_checkpoint_folder(&path) {
                output = path.parent().map(PathBuf::from).unwrap_or_default();
                Resume::Checkpoint(path)
            } else {
                output = path;
                Resume::Newest
            }
        }
    };
    let options = TrainOptions {
        output: output.clone(),
        device: args
            .run
            .device
            .unwrap_or_else(|| device::default_name().into()),
        resume,
        accepted: Accepted {
            inexact: args.allow_inexact,
            data: args.adopt_data,
            config: args.adopt_config,
        },
        distilled: args.run.yes_distilled,
        offline: args.run.offline,
        skip_bad: args.skip_bad,
        stop: stop_on_signals()?,
    };
    match crate::train::train(&config, &options)? {
        Outcome::Finished { lora } => {
            let mut fields = vec![("LoRA", json!(lora))];
            if config.sample.is_some() {
                fields.push(("samples", json!(output.join("samples"))));
            }
            fields.push(("metrics", json!(output.join("metrics.jsonl"))));
            say.result("finished", &fields)?;
        }
        Outcome::Stopped { step } => {
            let args = std::env::args_os().map(|arg| arg.to_string_lossy().into_owned());
            let resume = command_to_resume(args, &output);
            if say == Output::Json {
                let fields = [
                    ("step", json!(step)),
                    ("run", json!(output)),
                    ("resume", json!(resume)),
                ];
                say.result("stopped", &fields)?;
            } else {
                let run = output.display();
                say!("stopped after step {step}, saved in {run}; to go on:\n  {resume}")?;
            }
        }
    }
    Ok(())
}

fn compare_runs(a: &Path, b: &Path, output: Output) -> anyhow::Result<()> {
    let found = compare::compare(&report::open_run(a)?, &report::open_run(b)?)?;
    if output == Output::Json {
        let fields: Vec<(&str, Value)> = found
            .iter()
            .map(|(of, lines)| (*of, json!(lines)))
            .collect();
        output.result("compared", &fields)?;
        return Ok(());
    }
    for (of, lines) in found {
        if lines.is_empty() {
            say!("{of}: the same")?;
            continue;
        }
        say!("{of}:")?;
        for line in lines {
            say!("  {}", printable(&line))?;
        }
    }
    Ok(())
}

/// The configuration and the folder of a run: `--steps` is one more `--set`, a folder not given is named like the configuration.
fn configured(args: &RunArgs) -> anyhow::Result<(RunConfig, PathBuf)> {
    let steps = args.steps.map(|steps| format!("train.steps={steps}"));
    let overrides: Vec<String> = args.set.iter().cloned().chain(steps).collect();
    let config = RunConfig::load_on(args.preset.as_deref(), &args.config, &overrides)?;
    let name = args.config.file_stem().unwrap_or_default();
    let output = args.output.clone();
    Ok((
        config,
        output.unwrap_or_else(|| Path::new("runs").join(name)),
    ))
}

fn check_run(args: &RunArgs, say: Output) -> anyhow::Result<ExitCode> {
    let (config, output) = configured(args)?;
    let device = args.device.as_deref().unwrap_or(device::default_name());
    let plan = check::Planned {
        output: &output,
        device,
        distilled: args.yes_distilled,
        offline: args.offline,
    };
    let report = check::check(&config, &plan)?;
    let rows = report
        .rows
        .iter()
        .map(|(name, value)| (*name, json!(value)));
    let mut fields: Vec<(&str, Value)> = rows.collect();
    let ok = report.problems.is_empty();
    fields.push(("note", json!(report.notes)));
    fields.push(("problem", json!(report.problems)));
    fields.push(("would_train", json!(ok)));
    let said = say.result("check", &fields);
    match ok {
        true => Ok(said.map(|()| ExitCode::SUCCESS)?),
        false => Ok(ExitCode::FAILURE), // whether anybody reads why or not
    }
}

/// The first SIGINT or SIGTERM lets the step finish and saves; the second ends the program at once, which a checkpoint
/// survives as it survives any kill.
fn stop_on_signals() -> anyhow::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, stop.clone())
            .context("handle signals")?;
        signal_hook::flag::register(signal, stop.clone()).context("handle signals")?;
    }
    // A step may take minutes, and whoever pressed a key wants to know that it was heard.
    let asked = stop.clone();
    std::thread::spawn(move || {
        while !asked.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(100));
        }
        info!("stopping: this step is ended and saved; once more stops at once");
    });
    Ok(stop)
}

/// What this binary can run on, a line each.
fn devices() -> String {
    let mut lines = Vec::new();
    for backend in BACKENDS {
        if !backend.compiled {
            lines.push(format!(
                "{:<8} not in this binary ({}); build with --features {}",
                backend.name, backend.about, backend.name
            ));
            continue;
        }
        let found = device::list(backend.name);
        if found.is_empty() {
            lines.push(format!(
                "{:<8} no device found ({})",
                backend.name, backend.about
            ));
        }
        for device in found {
            let dtypes: Vec<&str> = [
                ("f32", burn::tensor::DType::F32),
                ("f16", burn::tensor::DType::F16),
                ("bf16", burn::tensor::DType::BF16),
            ]
            .into_iter()
            .filter_map(|(name, dtype)| device.device.supports_dtype(dtype).then_some(name))
            .collect();
            let fault = if device::reduction_fault(&device.device) {
                "; sums permuted rank-4 tensors to wrong numbers (avoided here)"
            } else {
                ""
            };
            lines.push(format!(
                "{:<8} {} ({}; storage types {}{fault})",
                device.name,
                device.hardware,
                backend.about,
                dtypes.join(" ")
            ));
        }
    }
    lines.join("\n") + "\n"
}
