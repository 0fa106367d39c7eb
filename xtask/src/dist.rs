//! `cargo xtask dist`: the program for a machine with a GPU, with all that `gpu-check.sh` needs there, in one archive.
//!
//! `cubecl-cuda` links LLVM even where NVRTC compiles the kernels, and the crate that brings LLVM downloads it. With the
//! feature `cuda-nvrtc` no function of LLVM is called, so that `tools/stub-llvm` stands in for it: headers, an
//! `llvm-config`, and a library in which every function ends the program with its own name.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Result, cargo, release_folder, run, step};

/// What is packed beside the program: the check and what it runs on.
const CARRIED: [&str; 7] = [
    "tools/gpu-check.sh",
    "tools/gpu-check-torch.py",
    "tests/fixtures/parity",
    "examples/ink",
    "docs/gpu.md",
    "LICENSE-APACHE",
    "LICENSE-MIT",
];

/// `dist --cuda` or `dist --wgpu`: builds, strips, packs.
pub fn dist(args: &[String]) -> Result {
    let backend = match args {
        [flag] if flag == "--cuda" => "cuda",
        [flag] if flag == "--wgpu" => "wgpu",
        _ => return Err("dist takes --cuda or --wgpu".into()),
    };
    let mut build = cargo();
    let common = ["build", "--release", "--locked", "--no-default-features"];
    build.args(common).args(["--package", "flux-lora"]);
    if backend == "cuda" {
        let data = stub_llvm()?;
        build.args(["--features", "flex,cuda-nvrtc"]);
        build.env("XDG_DATA_HOME", data);
        // Without nvcc on the PATH cudarc takes the newest toolkit that it knows.
        if std::env::var_os("CUDARC_CUDA_VERSION").is_none() {
            build.env("CUDARC_CUDA_VERSION", "13000");
        }
    } else {
        build.args(["--features", "flex,wgpu"]);
    }
    step("build the program", &mut build)?;
    pack(backend)
}

fn pack(backend: &str) -> Result {
    let name = format!("flux-lora-{backend}");
    let dist = release_folder().with_file_name("dist");
    let folder = dist.join(&name);
    if folder.exists() {
        fs::remove_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    }
    make(&folder)?;
    let program = folder.join("flux-lora");
    copy(&release_folder().join("flux-lora"), &program)?;
    run(Command::new("strip").arg(&program))?;
    for path in CARRIED {
        let to = folder.join(path);
        make(to.parent().unwrap_or(&folder))?;
        run(Command::new("cp")
            .arg("-r")
            .args([path.as_ref(), to.as_path()]))?;
    }
    let archive = dist.join(format!("{name}.tar.xz"));
    step(
        "pack",
        Command::new("tar")
            .args(["--sort=name", "--owner=0", "--group=0", "-cJf"])
            .arg(&archive)
            .arg("-C")
            .args([&dist, Path::new(&name)]),
    )?;
    println!("{}", archive.display());
    Ok(())
}

/// Lays the stub where `tracel-llvm-bundler` looks for an LLVM that it has installed; gives the data folder for
/// `XDG_DATA_HOME`.
fn stub_llvm() -> Result<PathBuf> {
    step("fetch", cargo().args(["fetch", "--locked"]))?;
    let bundler = version("tracel-llvm-bundler")?;
    let target = std::path::absolute(release_folder()).map_err(|error| error.to_string())?;
    let data = target.with_file_name("stub-llvm");
    let llvm = data.join(format!("tracel/tracel-llvm-{bundler}"));
    let installed = llvm.join(".tracel-llvm-installed");
    if installed.exists() {
        return Ok(data); // a newer one would have everything built again
    }
    make(&llvm.join("lib"))?;
    for part in ["bin", "include"] {
        let from = Path::new("tools/stub-llvm").join(part);
        run(Command::new("cp").arg("-r").arg(from).arg(&llvm))?;
    }

    let source = llvm.join("stub.c");
    write(&source, &stub_source(&bindings()?)?)?;
    let object = llvm.join("stub.o");
    run(Command::new("cc")
        .args(["-O1", "-fPIC", "-c"])
        .arg(&source)
        .arg("-o")
        .arg(&object))?;
    let library = llvm.join("lib/libllvm_stub.a");
    run(Command::new("ar").arg("crs").args([&library, &object]))?;
    write(&installed, "a stub\n")?;
    Ok(data)
}

/// C that defines every function that the bindings declare.
fn stub_source(bindings: &Path) -> Result<String> {
    let mut names = Vec::new();
    declared(bindings, &mut names)?;
    names.sort();
    names.dedup();
    if names.is_empty() {
        return Err(format!("{}: declares no function", bindings.display()));
    }
    let mut source = String::from(
        "#include <stdio.h>\n#include <stdlib.h>\n\
         __attribute__((noreturn)) static void missing(const char *name) {\n\
         \x20 fprintf(stderr, \"%s: this program was linked without LLVM\\n\", name);\n  abort();\n}\n",
    );
    for name in names {
        source +=
            &format!("__attribute__((noreturn)) void {name}(void) {{ missing(\"{name}\"); }}\n");
    }
    Ok(source)
}

/// Names of LLVM's functions in the Rust files of a folder. Those with an underscore after `LLVM` are the bundler's own.
fn declared(folder: &Path, names: &mut Vec<String>) -> Result {
    let failed = |error| format!("{}: {error}", folder.display());
    for entry in fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.is_dir() {
            declared(&path, names)?;
            continue;
        }
        let text = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        names.extend(text.split("fn ").skip(1).filter_map(|rest| {
            let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_')?;
            let name = &rest[..end];
            let is_llvm = ["LLVM", "llvm", "lto", "thinlto"]
                .iter()
                .any(|prefix| name.starts_with(prefix));
            (is_llvm && !name.starts_with("LLVM_")).then(|| name.to_string())
        }));
    }
    Ok(())
}

/// Where cargo keeps the source of `llvm-sys`.
fn bindings() -> Result<PathBuf> {
    let version = version("llvm-sys")?;
    let home = std::env::var_os("CARGO_HOME").map_or_else(
        || std::env::home_dir().unwrap_or_default().join(".cargo"),
        PathBuf::from,
    );
    let registries = home.join("registry/src");
    fs::read_dir(&registries)
        .map_err(|error| format!("{}: {error}", registries.display()))?
        .filter_map(|entry| Some(entry.ok()?.path().join(format!("llvm-sys-{version}/src"))))
        .find(|path| path.is_dir())
        .ok_or_else(|| format!("{}: no llvm-sys-{version}", registries.display()))
}

/// The version of a package that `Cargo.lock` names once.
fn version(package: &str) -> Result<String> {
    let lock = fs::read_to_string("Cargo.lock").map_err(|error| format!("Cargo.lock: {error}"))?;
    let entry = format!("name = \"{package}\"\nversion = \"");
    lock.split_once(&entry)
        .and_then(|(_, rest)| Some(rest.split_once('"')?.0.to_string()))
        .ok_or_else(|| format!("Cargo.lock: no package {package}"))
}

fn make(folder: &Path) -> Result {
    fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))
}

fn copy(from: &Path, to: &Path) -> Result {
    fs::copy(from, to)
        .map(|_| ())
        .map_err(|error| format!("{}: {error}", from.display()))
}

fn write(path: &Path, text: &str) -> Result {
    fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
}
