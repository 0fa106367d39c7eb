//! Every target: cargo-fuzz wants a program for each, and this is all of them.

#![no_main]

#[path = "../targets.rs"]
mod targets;

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

/// Stays behind when libFuzzer ends the process: point TMPDIR to memory, and empty it after.
static FOLDER: LazyLock<TempDir> = LazyLock::new(|| TempDir::new().expect("a temporary folder"));

static TARGET: LazyLock<targets::Target> = LazyLock::new(|| {
    let name = env!("CARGO_BIN_NAME");
    let found = targets::TARGETS.iter().find(|(target, _)| *target == name);
    found.expect("every program of the manifest is a target").1
});

fuzz_target!(|data: &[u8]| TARGET(FOLDER.path(), data));
