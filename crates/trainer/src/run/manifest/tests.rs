use std::fs::OpenOptions;

use super::*;
use crate::run::testing::{fields, files, names, new_run, poke, write};

#[test]
fn manifest_ends_with_the_hash_of_what_is_before() {
    let entries = files(7, 1).into_iter().map(|(name, bytes)| FileEntry {
        name: name.into(),
        length: bytes.len() as u64,
        sha256: sha256_hex(&bytes),
    });
    let manifest = Manifest::new(7, entries.collect(), &fields());
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
    let (_temp, lock) = new_run();
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
    let (_temp, lock) = new_run();
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
    let (_temp, lock) = new_run();
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
    let (_temp, lock) = new_run();
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
    let (_temp, lock) = new_run();
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
    let (_temp, lock) = new_run();
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
        reseal(&|m| m.format_version = 3),
        CheckpointError::Version { found: 3, .. }
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
    let body = format!("{{\n  \"format_version\": 2,\n  \"fingerprint\": {deep}");
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
