//! Configurations as files.

use std::fs;
use std::path::Path;

use crate::config::RunConfig;

#[test]
fn paths_start_at_the_files_folder() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let root = fs::canonicalize(folder.path()).expect("it exists");
    fs::create_dir(root.join("runs")).expect("make folder");
    let file = root.join("runs/run.toml");
    let text = "[model]\npath = \"../models/./flux\"\nvae = \"/vae\"\n[dataset]\npath = \"cats\"\n[lora]\ninit_from = \"a/../b\"";
    fs::write(&file, text).expect("write file");
    let config = RunConfig::load(&file, &[]).expect("a good configuration");
    assert_eq!(config.model.path, root.join("models/flux"));
    assert_eq!(config.model.vae.as_deref(), Some(Path::new("/vae")));
    assert_eq!(config.dataset.path, root.join("runs/cats"));
    assert_eq!(config.lora.init_from, Some(root.join("runs/a/../b")));

    // by another name, and from the copy kept with a run
    let roundabout = root.join("runs/../runs/./run.toml");
    assert_eq!(
        RunConfig::load(&roundabout, &[]).expect("the same file"),
        config
    );
    let copy = root.join("config.toml");
    fs::write(&copy, config.to_toml().expect("TOML holds it")).expect("write file");
    assert_eq!(
        RunConfig::load(&copy, &[]).expect("a good configuration"),
        config
    );
}

#[test]
fn missing_file() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let file = folder.path().join("run.toml");
    let error = RunConfig::load(&file, &[]).expect_err("no file");
    assert_eq!(
        error.to_string(),
        format!("cannot read `{}`", file.display())
    );
    assert!(std::error::Error::source(&error).is_some());
}

#[test]
fn file_that_is_not_text() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let file = folder.path().join("run.toml");
    for (bytes, problem) in [
        (vec![0xff; 10], "it is not UTF-8 text"),
        (
            b"\xff\xfe[\0".to_vec(),
            "it is UTF-16 text: save it as UTF-8",
        ),
        (vec![b'#'; (1 << 20) + 1], "it is larger than 1 MiB"),
    ] {
        fs::write(&file, bytes).expect("write file");
        let error = RunConfig::load(&file, &[]).expect_err("not a configuration");
        let expected = format!("`{}` is not a run configuration: {problem}", file.display());
        assert_eq!(error.to_string(), expected);
    }
}

#[test]
fn a_repository_of_the_hub_stays_a_name_unless_a_folder_is_there() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("run.toml");
    let text = "[model]\npath = \"owner/flux\"\n[dataset]\npath = \"owner/cats\"\n";
    fs::write(&file, text).expect("writable");
    let load = || RunConfig::load(&file, &[]).expect("a good configuration");
    assert_eq!(load().model.path, Path::new("owner/flux"));
    assert!(load().dataset.path.is_absolute());
    fs::create_dir_all(folder.path().join("owner/flux")).expect("writable");
    assert!(load().model.path.is_absolute());
}
