//! What differs between two configurations, and what may.

use super::{everything, read, read_with};
use crate::config::fields::names_of;
use crate::config::{Change, SampleSection};

#[test]
fn the_order_of_patterns_is_kept_and_counts() {
    let config = |pattern| read(&format!("lora.rank_pattern = {pattern}")).expect("good");
    let (ba, ab) = (config("{ b = 1, a = 2 }"), config("{ a = 2, b = 1 }"));
    let first = ba
        .lora
        .rank_pattern
        .iter()
        .next()
        .map(|(pattern, _)| pattern);
    assert_eq!(first, Some("b"));
    assert_ne!(
        ba.digest().expect("TOML holds it"),
        ab.digest().expect("TOML holds it")
    );
    let changes = ba.diff(&ab).expect("TOML holds it");
    assert_eq!(
        (changes.len(), changes[0].old.as_str()),
        (1, "{ b = 1, a = 2 }")
    );
}

#[test]
fn equal_configurations_have_no_changes() {
    assert_eq!(everything().diff(&everything()).expect("TOML holds it"), []);
}

#[test]
fn changes_name_both_values_and_whether_they_are_allowed() {
    let old = read("[lora.rank_pattern]\nx = 4").expect("a good configuration");
    let new = read_with(
        "[sample]\nprompts = [\"a\"]\npreview_vae = \"tiny\"",
        &[
            "train.steps=2000",
            "train.batch_size=2",
            "optimizer.learning_rate=5e-5",
            "optimizer.eps=1e-6",
            "lr_scheduler.name=cosine",
            "checkpoint.every=10",
            "lora.lora_alpha=32",
        ],
    )
    .expect("a good configuration");
    let changes = old.diff(&new).expect("TOML holds it");
    let lines: Vec<String> = changes
        .iter()
        .filter(|change| !change.key.starts_with("sample."))
        .map(|change| {
            format!(
                "{} {} -> {} {}",
                change.key, change.old, change.new, change.allowed
            )
        })
        .collect();
    assert_eq!(
        lines,
        [
            "checkpoint.every 100 -> 10 true",
            "lora.lora_alpha 16.0 -> 32.0 false",
            "lora.rank_pattern { x = 4 } -> unset false",
            "lr_scheduler.name \"constant\" -> \"cosine\" true",
            "optimizer.eps 0.00000001 -> 0.000001 false",
            "optimizer.learning_rate 0.0001 -> 0.00005 true",
            "train.batch_size 1 -> 2 false",
            "train.steps 1000 -> 2000 true",
        ]
    );
    let sample: Vec<&Change> = changes
        .iter()
        .filter(|change| change.key.starts_with("sample."))
        .collect();
    assert_eq!(sample.len(), names_of::<SampleSection>().len());
    assert!(
        sample
            .iter()
            .all(|change| change.allowed && change.old == "unset")
    );
}
