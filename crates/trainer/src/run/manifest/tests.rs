use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, MetadataExt};

use serde_json::json;
use tempfile::TempDir;

use super::*;
use crate::run::folder::RunDir;
use crate::run::vfs::RealFs;
use crate::run::vfs::simulate::{Dice, FailingFs, Failure};

/// The files of a small checkpoint; `version` tells histories apart.
pub(crate) fn files(step: u64, version: u32) -> Vec<(&'static str, Vec<u8>)> {
    let mut dice = Dice(step * 1000 + u64::from(version));
    let mut bytes = |length: usize| (0..length).map(|_| dice.roll() as u8).collect();
    vec![
        ("lora.safetensors", bytes(61)),
        ("optimizer.safetensors", bytes(61)),
        (
            "state.json",
            json!({"step": step, "version": version})
                .to_string()
                .into_bytes(),
        ),
    ]
}

pub(crate) fn borrowed<'a>(files: &'a [(&'static str, Vec<u8>)]) -> Vec<(&'a str, &'a [u8])> {
    files
        .iter()
        .map(|(name, bytes)| (*name, bytes.as_slice()))
        .collect()
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
    write_checkpoint(
        &quick_fs(),
        lock,
        step,
        &borrowed(&files(step, version)),
        &fields(),
    )
}

/// Which of our checkpoints this is.
pub(crate) fn identify(verified: &Verified) -> (u64, u32) {
    let state: Value = serde_json::from_slice(&verified.files["state.json"]).unwrap();
    let (step, version) = (
        state["step"].as_u64().unwrap(),
        state["version"].as_u64().unwrap() as u32,
    );
    let expected: BTreeMap<_, _> = files(step, version)
        .into_iter()
        .map(|(n, b)| (n.to_string(), b))
        .collect();
    assert_eq!(verified.files, expected);
    assert_eq!(verified.manifest.step, step);
    (step, version)
}

fn locked_run() -> (TempDir, RunLock) {
    let dir = tempfile::tempdir().unwrap();
    let lock = RunDir::open_or_create(&dir.path().join("run"))
        .unwrap()
        .lock()
        .unwrap();
    (dir, lock)
}

fn names(dir: &Path) -> Vec<String> {
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

#[test]
fn what_is_written_is_read_back() {
    let (_temp, lock) = locked_run();
    let files = files(120, 1);
    let dir = write_checkpoint(&RealFs, &lock, 120, &borrowed(&files), &fields()).unwrap();
    assert_eq!(dir, lock.run().path().join("ckpt-0000000120"));
    assert_eq!(
        names(lock.run().path()),
        ["LATEST", "ckpt-0000000120", "run.lock"]
    );
    assert_eq!(
        names(&dir),
        [
            MANIFEST,
            "lora.safetensors",
            "optimizer.safetensors",
            "state.json"
        ]
    );

    let verified = verify(&dir).unwrap();
    assert_eq!(identify(&verified), (120, 1));
    assert_eq!(verified.manifest.fingerprint, fields().fingerprint);
    assert_eq!(verified.manifest.config_digest, fields().config_digest);
    assert_eq!(lock.run().latest().unwrap(), Some(dir));
}

#[test]
fn manifest_ends_with_the_hash_of_what_is_before() {
    let manifest = Manifest::new(7, &borrowed(&files(7, 1)), &fields()).unwrap();
    let sealed = seal(&manifest);
    let body = &sealed[..sealed.len() - 83]; // the number in the module doc
    let value: Value = serde_json::from_slice(&sealed).unwrap();
    assert_eq!(value["sha256"], sha256_hex(body));
    assert_eq!(
        value.as_object().unwrap().keys().next_back().unwrap(),
        "sha256"
    );
    assert_eq!(unseal(Path::new(MANIFEST), &sealed).unwrap(), manifest);
}

#[test]
fn every_flipped_bit_is_found() {
    let (_temp, lock) = locked_run();
    let dir = write(&lock, 120, 1).unwrap();
    for name in names(&dir) {
        let path = dir.join(name);
        let good = fs::read(&path).unwrap();
        for (at, byte) in good.iter().enumerate() {
            for bit in 0..8 {
                poke(&path, at, byte ^ 1 << bit);
                let error = verify(&dir).unwrap_err().to_string();
                assert!(error.contains(path.to_str().unwrap()), "{error}");
            }
            poke(&path, at, *byte);
        }
    }
    verify(&dir).unwrap();
}

#[test]
fn every_truncation_and_every_longer_file_is_found() {
    let (_temp, lock) = locked_run();
    let dir = write(&lock, 120, 1).unwrap();
    for name in names(&dir) {
        let path = dir.join(name);
        let good = fs::read(&path).unwrap();
        for length in (0..good.len()).rev() {
            OpenOptions::new()
                .write(true)
                .open(&path)
                .unwrap()
                .set_len(length as u64)
                .unwrap();
            assert!(verify(&dir).is_err(), "{} cut to {length}", path.display());
        }
        for tail in [&b"\0"[..], b"\n", b" ", &good] {
            fs::write(&path, [&good, tail].concat()).unwrap();
            assert!(verify(&dir).is_err(), "{} with a tail", path.display());
        }
        fs::write(&path, &good).unwrap();
    }
    verify(&dir).unwrap();
}

#[test]
fn missing_extra_and_exchanged_files_are_found() {
    let (_temp, lock) = locked_run();
    let dir = write(&lock, 120, 1).unwrap();
    let aside = lock.run().path().join("aside");
    for name in names(&dir) {
        fs::rename(dir.join(&name), &aside).unwrap();
        assert!(
            matches!(verify(&dir), Err(CheckpointError::Missing { path }) if path == dir.join(&name))
        );
        fs::create_dir(dir.join(&name)).unwrap();
        assert!(matches!(
            verify(&dir),
            Err(CheckpointError::Kind {
                expected: "file",
                ..
            })
        ));
        fs::remove_dir(dir.join(&name)).unwrap();
        std::os::unix::fs::symlink(&aside, dir.join(&name)).unwrap();
        assert!(matches!(
            verify(&dir),
            Err(CheckpointError::Kind {
                expected: "file",
                ..
            })
        ));
        fs::remove_file(dir.join(&name)).unwrap();
        fs::rename(&aside, dir.join(&name)).unwrap();
    }
    let extra = dir.join("notes.txt");
    fs::write(&extra, b"").unwrap();
    assert!(matches!(verify(&dir), Err(CheckpointError::Extra { path }) if path == extra));
    fs::remove_file(&extra).unwrap();

    let (lora, optimizer) = (
        dir.join("lora.safetensors"),
        dir.join("optimizer.safetensors"),
    );
    fs::rename(&lora, &aside).unwrap();
    fs::rename(&optimizer, &lora).unwrap();
    fs::rename(&aside, &optimizer).unwrap();
    assert!(matches!(
        verify(&dir),
        Err(CheckpointError::Checksum { .. })
    ));
}

#[test]
fn files_of_another_checkpoint_are_found() {
    let (_temp, lock) = locked_run();
    let (one, two) = (write(&lock, 10, 1).unwrap(), write(&lock, 20, 1).unwrap());
    for name in names(&one) {
        let good = fs::read(two.join(&name)).unwrap();
        fs::copy(one.join(&name), two.join(&name)).unwrap();
        assert!(verify(&two).is_err(), "{name}");
        fs::write(two.join(&name), good).unwrap();
    }
    verify(&two).unwrap();
}

#[test]
fn a_renamed_checkpoint_names_its_step() {
    let (_temp, lock) = locked_run();
    let dir = write(&lock, 120, 1).unwrap();
    let renamed = dir.with_file_name("ckpt-0000000121");
    fs::rename(&dir, &renamed).unwrap();
    let error = verify(&renamed).unwrap_err().to_string();
    assert!(
        error.ends_with("ckpt-0000000121 holds step 120; rename the folder to ckpt-0000000120"),
        "{error}"
    );
    for name in [
        "ckpt-120",
        "ckpt-+000000120",
        "ckpt-00000000120",
        "copy",
        "ckpt-0000000120.bak",
    ] {
        let other = dir.with_file_name(name);
        fs::rename(&renamed, &other).unwrap();
        assert!(
            matches!(verify(&other), Err(CheckpointError::Name { .. })),
            "{name}"
        );
        fs::rename(&other, &renamed).unwrap();
    }
}

#[test]
fn large_steps_have_longer_names() {
    assert_eq!(checkpoint_name(u64::MAX), "ckpt-18446744073709551615");
    for step in [0, 9_999_999_999, 10_000_000_000, u64::MAX] {
        assert_eq!(parse_checkpoint_name(&checkpoint_name(step)), Some(step));
    }
    assert_eq!(parse_checkpoint_name("ckpt-0000000120.old-7-0"), Some(120));
    assert_eq!(parse_checkpoint_name("ckpt-0000000120.tmp-7-0"), None);
    assert_eq!(parse_checkpoint_name("ckpt-18446744073709551616"), None);
}

#[test]
fn hostile_manifests_are_errors() {
    let (_temp, lock) = locked_run();
    let dir = write(&lock, 120, 1).unwrap();
    let path = dir.join(MANIFEST);
    let good: Manifest = unseal(&path, &fs::read(&path).unwrap()).unwrap();
    let reseal = |change: &dyn Fn(&mut Manifest)| {
        let mut manifest = good.clone();
        change(&mut manifest);
        fs::write(&path, seal(&manifest)).unwrap();
        verify(&dir).unwrap_err()
    };
    assert!(matches!(
        reseal(&|m| m.format_version = 2),
        CheckpointError::Version { found: 2, .. }
    ));
    assert!(matches!(
        reseal(&|m| m.step = 121),
        CheckpointError::Step { found: 121, .. }
    ));
    assert!(matches!(
        reseal(&|m| m.files[0].name = "../LATEST".into()),
        CheckpointError::Missing { .. }
    ));
    assert!(matches!(
        reseal(&|m| m.files[0].name = "/etc/passwd".into()),
        CheckpointError::Missing { .. }
    ));
    assert!(matches!(
        reseal(&|m| m.files.push(m.files[0].clone())),
        CheckpointError::Missing { .. }
    ));
    assert!(matches!(
        reseal(&|m| m.files.clear()),
        CheckpointError::Extra { .. }
    ));
    assert!(matches!(
        reseal(&|m| m.files[0].length = u64::MAX),
        CheckpointError::Length { .. }
    ));
    let deep = format!("{}1{}", "[".repeat(500), "]".repeat(500));
    let body = format!("{{\n  \"format_version\": 1,\n  \"fingerprint\": {deep}");
    let sealed = format!("{body}{}{}{}", SEAL.0, sha256_hex(body.as_bytes()), SEAL.1);
    fs::write(&path, sealed).unwrap();
    assert!(matches!(verify(&dir), Err(CheckpointError::Json { .. })));
    fs::write(&path, vec![b' '; 2 << 20]).unwrap();
    assert!(matches!(
        verify(&dir),
        Err(CheckpointError::Malformed { .. })
    ));
    fs::write(&path, b"{}").unwrap();
    assert!(matches!(
        verify(&dir),
        Err(CheckpointError::Malformed { .. })
    ));
}

#[test]
fn the_same_content_again_keeps_the_folder() {
    let (_temp, lock) = locked_run();
    let dir = write(&lock, 120, 1).unwrap();
    let before = fs::metadata(&dir).unwrap().ino();
    fs::remove_file(lock.run().path().join("LATEST")).unwrap();
    assert_eq!(write(&lock, 120, 1).unwrap(), dir);
    assert_eq!(fs::metadata(&dir).unwrap().ino(), before);
    assert_eq!(
        names(lock.run().path()),
        ["LATEST", "ckpt-0000000120", "run.lock"]
    );
    assert_eq!(lock.run().latest().unwrap(), Some(dir));
}

#[test]
fn other_content_of_the_same_step_takes_its_place() {
    let (_temp, lock) = locked_run();
    write(&lock, 120, 1).unwrap();
    let dir = write(&lock, 120, 2).unwrap();
    assert_eq!(identify(&verify(&dir).unwrap()), (120, 2));
    fs::write(dir.join("state.json"), b"damaged").unwrap();
    write(&lock, 120, 3).unwrap();
    assert_eq!(identify(&verify(&dir).unwrap()), (120, 3));
    assert_eq!(
        names(lock.run().path()),
        ["LATEST", "ckpt-0000000120", "run.lock"]
    );
    assert_eq!(lock.run().latest().unwrap(), Some(dir));
}

#[test]
fn a_step_before_an_existing_one_is_refused() {
    let (_temp, lock) = locked_run();
    write(&lock, 120, 1).unwrap();
    let error = write(&lock, 119, 1).unwrap_err().to_string();
    assert!(
        error.contains("ckpt-0000000120 is newer than step 119"),
        "{error}"
    );
    assert_eq!(
        names(lock.run().path()),
        ["LATEST", "ckpt-0000000120", "run.lock"]
    );
}

#[test]
fn file_names_are_plain_and_unique() {
    let (_temp, lock) = locked_run();
    for name in ["", ".", "..", "a/b", "../a", "a\\b", ".hidden", MANIFEST] {
        let error = write_checkpoint(&RealFs, &lock, 1, &[(name, b"x")], &fields());
        assert!(
            matches!(error, Err(CheckpointError::FileName { .. })),
            "{name}"
        );
    }
    let twice: [(&str, &[u8]); 2] = [("a", b"x"), ("a", b"y")];
    let error = write_checkpoint(&RealFs, &lock, 1, &twice, &fields());
    assert!(matches!(error, Err(CheckpointError::FileName { .. })));
    assert_eq!(names(lock.run().path()), ["run.lock"]);
}

#[test]
fn errors_name_the_path_and_the_cause() {
    let (_temp, lock) = locked_run();
    let full = FailingFs::new(3, Failure::Errno(28), false);
    let reason = write_checkpoint(&full, &lock, 9, &borrowed(&files(9, 1)), &fields()).unwrap_err();
    let path = lock.run().path().to_path_buf();
    let line = Rejected { path, reason }.to_string();
    assert!(
        line.starts_with(&format!(
            "write {}/ckpt-0000000009.tmp-",
            lock.run().path().display()
        )),
        "{line}"
    );
    assert!(
        line.ends_with("/optimizer.safetensors: No space left on device (os error 28)"),
        "{line}"
    );
    assert_eq!(names(lock.run().path()), ["run.lock"]);
}
