//! The project's commands. Depends on nothing, so that it builds in a second.

mod circles;
mod dist;

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

const USAGE: &str = "\
cargo xtask <command>

  train [CONFIG.toml] [flags of `flux-lora train`]   no configuration: the bundled quickstart, and what it has learned
  sample [flags of `flux-lora sample`]
  parity [CASE...] [flags of `flux-lora parity`]     no case: all bundled cases
  bench step|ops|lora|lora-core|quality|sample|scaling|trainer|full-size [flags of `flux-lora bench`]
  run COMMAND...                                     any other command of `flux-lora`
  test [--wgpu]                                      every test; --wgpu adds those that need a GPU or Mesa's llvmpipe
  faults [--quick] [--wgpu] [FAULT...]               kills, full disks, flipped bits ...: what survives, bit for bit
  circles                                            files of a crate that import each other, which none may
  ci                                                 what CI runs: fmt, circles, cargo deny, clippy, docs, CUDA type check, tests, quick faults
  gpu-check [--device NAME] [flags of tools/gpu-check.sh]   what a GPU does, in one table (default cuda)
  dist --cuda|--wgpu                                 the program for a GPU machine, with gpu-check and its fixtures, in target/dist
  reference                                          writes the tables of docs/configuration.md anew, from the types
  golden                                             writes tests/golden/tiny-loss.txt anew

`--device NAME` picks the backend and builds its cargo feature: flex (default), ndarray, wgpu, cuda.
";

/// What `train` trains if nothing is named.
const QUICKSTART: &str = "examples/quickstart.toml";

type Result<T = ()> = std::result::Result<T, String>;

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    if let Err(error) = env::set_current_dir(root()) {
        eprintln!("error: {}: {error}", root().display());
        return ExitCode::FAILURE;
    }
    let (command, rest) = match args.split_first() {
        Some((command, rest)) => (command.as_str(), rest),
        None => ("help", &[][..]),
    };
    let result = match command {
        "train" => train(rest),
        "sample" => program("sample", rest),
        "parity" => parity(rest),
        "bench" => program("bench", rest),
        "run" => match rest.split_first() {
            Some((command, rest)) => program(command, rest),
            None => Err("run: name a command of flux-lora".into()),
        },
        "test" => test(rest),
        "faults" => faults(rest),
        "circles" => circles(),
        "ci" => ci(),
        "reference" => program("reference", &["docs/configuration.md".into()]),
        "golden" => golden(),
        "dist" => dist::dist(rest),
        "gpu-check" => gpu_check(rest),
        "help" | "--help" | "-h" => {
            print!("{USAGE}");
            Ok(())
        }
        other => Err(format!("unknown command `{other}`\n\n{USAGE}")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .map(Path::to_path_buf)
        .unwrap_or_default()
}

/// What `args` give for `flag`, as `--flag VALUE` or `--flag=VALUE`.
fn value(args: &[String], flag: &str) -> Option<String> {
    args.iter().enumerate().find_map(|(i, arg)| {
        let rest = arg.strip_prefix(flag)?;
        match rest.strip_prefix('=') {
            Some(value) => Some(value.to_string()),
            None if rest.is_empty() => args.get(i + 1).cloned(),
            None => None,
        }
    })
}

/// The feature that `--device NAME[:INDEX]` needs.
fn feature(args: &[String]) -> Result<String> {
    let backend = value(args, "--device")
        .as_deref()
        .unwrap_or("flex")
        .split(':')
        .next()
        .unwrap_or_default()
        .to_string();
    match backend.as_str() {
        "flex" | "ndarray" | "wgpu" | "cuda" => Ok(backend),
        other => Err(format!(
            "unknown device `{other}`: flex, ndarray, wgpu or cuda"
        )),
    }
}

/// Builds `flux-lora` with the backend that `args` ask for, and runs one of its commands.
fn program(command: &str, args: &[String]) -> Result {
    let feature = feature(args)?;
    let mut cargo = cargo();
    cargo.args([
        "run",
        "--release",
        "--locked",
        "--package",
        "flux-lora",
        "--bin",
        "flux-lora",
    ]);
    if feature != "flex" {
        cargo.args(["--no-default-features", "--features", &feature]);
    }
    run(cargo.args(["--", command]).args(args))
}

fn train(args: &[String]) -> Result {
    let has_config = args.iter().any(|arg| arg.ends_with(".toml"));
    if has_config {
        return program("train", args);
    }
    let mut all = vec![QUICKSTART.to_string()];
    all.extend_from_slice(args);
    program("train", &all)?;
    let run = value(args, "--output").unwrap_or_else(|| "runs/quickstart".into());
    if !Path::new(&run).join("lora.safetensors").is_file() {
        return Ok(()); // stopped
    }
    let mut show = vec![run, "--gallery".into(), "examples/nano".into()];
    show.extend(value(args, "--device").map(|name| format!("--device={name}")));
    program("quickstart", &show)
}

fn parity(args: &[String]) -> Result {
    let mut all = args.to_vec();
    let has_case = args.iter().any(|arg| Path::new(arg).is_dir());
    if !has_case {
        all.extend(bundled_cases(Path::new("tests/fixtures/parity"))?);
    }
    program("parity", &all)
}

/// Every folder below `folder` that holds a case.json.
fn bundled_cases(folder: &Path) -> Result<Vec<String>> {
    let mut cases = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        if folder.join("case.json").is_file() {
            cases.push(folder.display().to_string());
        }
        let entries =
            std::fs::read_dir(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        folders.extend(
            entries
                .filter_map(|entry| entry.ok().map(|entry| entry.path()))
                .filter(|path| path.is_dir()),
        );
    }
    cases.sort();
    Ok(cases)
}

/// Every package that names backends, with these.
fn features(backends: &[&str]) -> String {
    let packages = ["flux-lora", "flux-lora-tests", "flux-lora-examples"];
    let all: Vec<String> = packages
        .iter()
        .flat_map(|package| {
            backends
                .iter()
                .map(move |backend| format!("{package}/{backend}"))
        })
        .collect();
    all.join(",")
}

fn test(args: &[String]) -> Result {
    let backends: &[&str] = match args {
        [] => &["ndarray"],
        [flag] if flag == "--wgpu" => &["ndarray", "wgpu"],
        _ => return Err("test takes only --wgpu".into()),
    };
    // One profile and one feature set for programs and tests: Burn is built once.
    let features = features(backends);
    let common = [
        "--release",
        "--workspace",
        "--locked",
        "--features",
        &features,
    ];
    step(
        "build the program",
        cargo()
            .arg("build")
            .args(["--bins", "--examples"])
            .args(common),
    )?;
    step(
        "tests",
        cargo().arg("test").args(common).arg("--no-fail-fast"),
    )?;
    // These check themselves.
    let examples = release_folder().join("examples");
    ["resume", "other_model"].into_iter().try_for_each(|name| {
        step(
            &format!("example {name}"),
            &mut Command::new(examples.join(name)),
        )
    })
}

/// Where cargo puts what it builds for release.
fn release_folder() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| PathBuf::from("target"), PathBuf::from)
        .join("release")
}

/// Attacks the release build, and first the same with known faults; needs strace, and faketime for one row.
fn faults(args: &[String]) -> Result {
    let (wgpu, rest): (Vec<&String>, Vec<&String>) = args.iter().partition(|arg| *arg == "--wgpu");
    let backends: &[&str] = if wgpu.is_empty() {
        &["ndarray"]
    } else {
        &["ndarray", "wgpu"]
    };
    // The feature set of the tests: Burn is built once.
    let features = features(backends);
    let build = |what: &str, features: &str, targets: &[&str]| {
        let common = ["build", "--release", "--workspace", "--locked"];
        step(
            what,
            cargo()
                .args(common)
                .args(["--features", features])
                .args(targets),
        )
    };
    let target = release_folder();
    let (program, canary) = (target.join("flux-lora"), target.join("flux-lora-canary"));
    build(
        "build the program with known faults",
        &format!("{features},flux-lora/canary"),
        &["--bin", "flux-lora"],
    )?;
    std::fs::copy(&program, &canary).map_err(|error| format!("{}: {error}", canary.display()))?;
    build("build the program and its attacker", &features, &["--bins"])?;
    run(Command::new(target.join("faults"))
        .arg("--program")
        .arg(&program)
        .arg("--canary-program")
        .arg(&canary)
        .args(["--test-features", &features])
        .args(rest))
}

/// Builds the program for a GPU and has the script check it, which needs no cargo.
fn gpu_check(args: &[String]) -> Result {
    let mut args = args.to_vec();
    if value(&args, "--device").is_none() {
        args.extend(["--device", "cuda"].map(String::from));
    }
    let mut build = cargo();
    build.args(["build", "--release", "--locked", "--package", "flux-lora"]);
    build.args(["--features", &feature(&args)?]);
    step("build the program", &mut build)?;
    let program = release_folder().join("flux-lora");
    run(Command::new("tools/gpu-check.sh")
        .arg("--program")
        .arg(program)
        .args(args))
}

fn ci() -> Result {
    // Burn's CUDA crates download LLVM when they are built for real; with DOCS_RS set they are only type-checked.
    let features = features(&["ndarray", "wgpu", "cuda"]);
    let common = [
        "--release",
        "--workspace",
        "--locked",
        "--features",
        &features,
    ];
    let checked = |command: &str| {
        let mut cargo = cargo();
        cargo.env("DOCS_RS", "1").arg(command);
        cargo
    };
    step("format", cargo().args(["fmt", "--all", "--check"]))?;
    circles()?;
    // Not the advisories: their database is fetched from GitHub, which CI need not reach. By hand: `cargo deny check`.
    step(
        "licences, bans and sources of dependencies",
        cargo().args(["deny", "--locked", "check", "licenses", "bans", "sources"]),
    )?;
    step(
        "clippy and type check, CUDA included",
        checked("clippy")
            .arg("--all-targets")
            .args(common)
            .args(["--", "-D", "warnings"]),
    )?;
    step(
        "docs",
        checked("doc")
            .env("RUSTDOCFLAGS", "-D warnings")
            .arg("--no-deps")
            .args(common),
    )?;
    test(&["--wgpu".to_string()])?;
    faults(&["--quick", "--wgpu"].map(String::from))
}

fn circles() -> Result {
    let found = circles::circles(Path::new("crates"))?;
    match found.is_empty() {
        true => Ok(()),
        false => Err(format!(
            "files import each other in a circle; what both need belongs into a file of its own:\n{}",
            found.join("\n")
        )),
    }
}

fn golden() -> Result {
    let features = features(&["ndarray"]);
    let common = [
        "--release",
        "--workspace",
        "--locked",
        "--features",
        &features,
    ];
    step(
        "build the program",
        cargo().args(["build", "--bins"]).args(common),
    )?;
    let mut test = cargo();
    test.env("FLUX_LORA_WRITE_GOLDEN", "1")
        .arg("test")
        .args(common)
        .args(["--test", "it", "golden"]);
    step("golden losses", &mut test)
}

fn cargo() -> Command {
    Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

fn step(what: &str, command: &mut Command) -> Result {
    eprintln!("==> {what}");
    let started = std::time::Instant::now();
    run(command)?;
    eprintln!("==> {what}: {} s", started.elapsed().as_secs());
    Ok(())
}

fn run(command: &mut Command) -> Result {
    let status = command
        .status()
        .map_err(|error| format!("{:?}: {error}", command.get_program()))?;
    if status.success() {
        Ok(())
    } else {
        std::process::exit(status.code().unwrap_or(1))
    }
}
