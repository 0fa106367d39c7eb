//! `--set`.

use std::path::Path;

use lora_core::peft::Targets;
use lora_core::training::optimizers::OptimizerConfig;

use super::{assert_set_refused, read_with};
use crate::config::RunConfig;

#[test]
fn overrides_are_toml_values_or_bare_strings() {
    let config = read_with(
        "[train]\nsteps = 5\n[optimizer]\nmax_grad_norm = 2",
        &[
            "train.steps=7",
            "optimizer.learning_rate = 1e-5",
            "optimizer.betas=[0.5, 0.6]",
            "optimizer.max_grad_norm=none",
            "dataset.path=../my cats",
            "lora.target_modules=.*to_[kq]",
            "lora.rank_pattern.\"a.b\"=3",
            "sample.prompts=['a = b']",
            "train.steps=8",
        ],
    )
    .expect("good overrides");
    assert_eq!(config.train.steps, 8);
    assert_eq!(config.optimizer.learning_rate, 1e-5);
    assert!(
        matches!(config.optimizer.rule, OptimizerConfig::Adamw(options) if options.betas == [0.5, 0.6])
    );
    assert_eq!(config.optimizer.max_grad_norm, None);
    assert_eq!(config.dataset.path, Path::new("../my cats"));
    assert_eq!(
        config.lora.target_modules,
        Some(Targets::Pattern(".*to_[kq]".into()))
    );
    assert_eq!(config.lora.rank_pattern.get("a.b"), Some(3));
    assert_eq!(config.sample.expect("a section").prompts, ["a = b"]);
}

#[test]
fn overrides_can_give_the_required_paths() {
    let set = ["model.path=m".to_owned(), "dataset.path=d".to_owned()];
    let config = RunConfig::from_toml("", Path::new("run.toml"), &set).expect("complete");
    assert_eq!(config.model.path, Path::new("m"));
}

#[test]
fn override_of_an_unknown_key() {
    assert_set_refused(
        "optimizer.learnin_rate=1",
        "unknown key `optimizer.learnin_rate` in --set: did you mean `learning_rate`?",
    );
    assert_set_refused(
        "optimiser.lr=1",
        "unknown section `optimiser` in --set: did you mean `optimizer`?",
    );
}

#[test]
fn override_with_a_bad_value() {
    assert_set_refused(
        "train.steps=many",
        "`train.steps` in --set: invalid type: string \"many\", expected a whole number",
    );
    assert_set_refused(
        "train.steps=0",
        "`train.steps` in --set: must be at least 1, found 0",
    );
    assert_set_refused(
        "train.steps=1\nsection.x=2",
        "`train.steps` in --set: invalid type: string \"1\\nsection.x=2\", expected a whole number",
    );
}

#[test]
fn malformed_override() {
    for set in [
        "steps=1",
        "train.steps",
        "=1",
        ".=1",
        "train.=1",
        "a.b\nc.d=1",
        "[train]\nsteps=1",
        "",
    ] {
        let shown = set.replace('\n', "\\n");
        assert_set_refused(
            set,
            &format!("`--set {shown}`: write it as section.key=value"),
        );
    }
    // A list whose quotes the shell has taken is no pattern.
    assert_set_refused(
        "lora.target_modules=[to_q, to_k]",
        "`--set lora.target_modules=[to_q, to_k]`: the value is no TOML: quote each string, and the whole for the shell, as in --set 'section.key=[\"a\", \"b\"]'",
    );
    let error = read_with("", &["dataset.path=\"C:\\Users\""]).expect_err("an escape");
    assert!(
        error.to_string().contains("a backslash starts an escape"),
        "{error}"
    );
    assert_set_refused(
        "model.path.x=1",
        "`--set model.path.x=1`: `path` is not a section",
    );
}
