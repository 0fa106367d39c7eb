//! What the tests of this module share.

use std::fs;
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use lora_core::files::digest::sha256_hex;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::run::error::{CheckpointError, Rejected};
use crate::run::folder::{RunDir, RunLock};
use crate::run::manifest::{ManifestFields, Verified};
use crate::run::metrics::MetricsLog;
use crate::run::transaction::{Files, save, write_checkpoint};
use crate::run::vfs::simulate::{Dice, FailingFs, Failure, memory_dir};
use crate::run::vfs::{Content, Vfs, list};

/// The files of a small checkpoint; `version` tells histories apart.
pub(crate) fn files(step: u64, version: u32) -> Vec<(&'static str, Vec<u8>)> {
    let mut dice = Dice(step * 1000 + u64::from(version));
    let mut bytes = |length: usize| (0..length).map(|_| dice.roll() as u8).collect();
    vec![
        ("lora.safetensors", bytes(160)),
        ("optimizer.safetensors", bytes(160)),
        (
            "state.json",
            json!({"step": step, "version": version})
                .to_string()
                .into_bytes(),
        ),
    ]
}

/// Does something with such files as [`write_checkpoint`] takes them.
pub(crate) fn with_files<T>(files: &[(&'static str, Vec<u8>)], work: impl FnOnce(Files) -> T) -> T {
    let writers: Vec<_> = files
        .iter()
        .map(|(name, bytes)| (*name, move |out: &mut dyn Write| out.write_all(bytes)))
        .collect();
    let files: Vec<(&str, Content)> = writers
        .iter()
        .map(|(name, write)| (*name, write as Content))
        .collect();
    work(&files)
}

pub(crate) fn fields() -> ManifestFields {
    ManifestFields {
        config_digest: sha256_hex(b"config"),
        dataset_digest: sha256_hex(b"data"),
        fingerprint: json!({"backend": "flex", "cpu": ["avx2", "fma"], "scale": 0.1}),
    }
}

/// Passes everything on, but does not wait for the disk.
pub(crate) fn quick_fs() -> FailingFs {
    FailingFs::new(usize::MAX, Failure::LyingWrite, false)
}

pub(crate) fn write(lock: &RunLock, step: u64, version: u32) -> Result<PathBuf, CheckpointError> {
    with_files(&files(step, version), |files| {
        write_checkpoint(&quick_fs(), lock, step, files, &fields())
    })
}

/// Which of our checkpoints this is.
pub(crate) fn identify(verified: &Verified) -> (u64, u32) {
    let read = |name: &str| fs::read(verified.path(name).unwrap()).unwrap();
    let state: Value = serde_json::from_slice(&read("state.json")).unwrap();
    let (step, version) = (
        state["step"].as_u64().unwrap(),
        state["version"].as_u64().unwrap() as u32,
    );
    let expected = files(step, version);
    assert_eq!(verified.manifest.files.len(), expected.len());
    for (name, bytes) in expected {
        assert_eq!(read(name), bytes);
    }
    assert_eq!(verified.manifest.step, step);
    (step, version)
}

pub(crate) fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = list(dir)
        .unwrap()
        .iter()
        .map(|e| e.file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Changes one byte in place (rewriting the file would make ext4 flush it, thousands of times).
pub(crate) fn poke(path: &Path, at: usize, byte: u8) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(&[byte], at as u64).unwrap();
}

pub(crate) const KEEP_2: usize = 2;

pub(crate) fn new_run() -> (TempDir, RunLock) {
    let dir = memory_dir();
    let lock = RunDir::open_or_create(&dir.path().join("run"))
        .unwrap()
        .lock()
        .unwrap();
    (dir, lock)
}

pub(crate) fn run_with(steps: &[u64]) -> (TempDir, RunLock) {
    let (dir, lock) = new_run();
    for step in steps {
        write(&lock, *step, 1).unwrap();
    }
    (dir, lock)
}

pub(crate) fn steps(run: &RunDir) -> Vec<u64> {
    run.checkpoints()
        .unwrap()
        .iter()
        .map(|found| found.step)
        .collect()
}

pub(crate) fn damage(lock: &RunLock, step: u64) {
    let path = lock
        .run()
        .path()
        .join(format!("ckpt-{step:010}/lora.safetensors"));
    let byte = fs::read(&path).unwrap()[7];
    poke(&path, 7, byte ^ 1);
    // The system's own times move by ticks of some ms, in which a test has written and damaged a file.
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.set_modified(std::time::SystemTime::now()).unwrap();
}

pub(crate) fn newest(run: &RunDir) -> ((u64, u32), Vec<String>) {
    let (verified, rejected) = run.newest_valid().unwrap();
    (
        identify(&verified),
        rejected.iter().map(Rejected::to_string).collect(),
    )
}

pub(crate) fn line(step: u64, version: u32) -> serde_json::Value {
    json!({"step": step, "loss": 0.1 * step as f64, "version": version})
}

/// What the training loop does at a save: a line of metrics, then the checkpoint.
pub(crate) fn step_and_save(
    vfs: &dyn Vfs,
    lock: &RunLock,
    log: &mut MetricsLog,
    step: u64,
    version: u32,
) -> Result<PathBuf, CheckpointError> {
    log.append(vfs, &line(step, version))?;
    with_files(&files(step, version), |files| {
        save(vfs, lock, log, step, files, &fields(), KEEP_2)
    })
}

/// What a run does at its start: clean up, choose, go back if need be, open the log.
pub(crate) fn resume(
    vfs: &dyn Vfs,
    lock: &RunLock,
) -> Result<(Option<(u64, u32)>, MetricsLog), CheckpointError> {
    lock.begin(vfs)?;
    let resumed = match lock.run().has_checkpoints()? {
        false => None,
        true => {
            let (chosen, _) = lock.run().newest_valid()?;
            lock.rewind_to(vfs, &chosen)?;
            Some(identify(&chosen))
        }
    };
    let log = MetricsLog::open(vfs, lock, resumed.map(|(step, _)| step))?;
    Ok((resumed, log))
}
