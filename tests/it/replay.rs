//! The corpus of the fuzzer, run as a test: what once broke a reader may not break it again.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

#[path = "../../fuzz/seeds.rs"]
mod seeds;
#[path = "../../fuzz/targets.rs"]
pub(crate) mod targets;

use flux_lora_tests::root;

fn corpus(target: &str) -> PathBuf {
    root().join("fuzz/corpus").join(target)
}

/// `FLUX_LORA_WRITE_SEEDS=1` writes them.
#[test]
fn the_seeds_are_those_that_the_code_makes() {
    for (index, (target, bytes)) in seeds::seeds().into_iter().enumerate() {
        let path = corpus(target).join(format!("seed-{index:02}"));
        if std::env::var_os("FLUX_LORA_WRITE_SEEDS").is_some() {
            fs::create_dir_all(corpus(target)).unwrap();
            fs::write(&path, &bytes).unwrap();
        }
        assert_eq!(
            fs::read(&path).unwrap_or_default(),
            bytes,
            "{}",
            path.display()
        );
    }
}

#[test]
fn the_corpus_breaks_nothing() {
    let mut inputs = 0;
    for (name, target) in targets::TARGETS {
        let folder = tempfile::tempdir().unwrap();
        let paths = fs::read_dir(corpus(name))
            .unwrap()
            .map(|entry| entry.unwrap().path());
        for path in BTreeSet::from_iter(paths) {
            eprintln!("{}", path.display()); // shown if the target panics
            target(folder.path(), &fs::read(&path).unwrap());
            inputs += 1;
        }
    }
    assert!(inputs >= seeds::seeds().len());
}
