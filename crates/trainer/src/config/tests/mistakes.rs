//! Text that is no configuration, keys that do not exist, values of other types.

use std::path::{Path, PathBuf};

use super::{assert_refused, read};
use crate::config::change::MAY_CHANGE_ON_RESUME;
use crate::config::fields::names_of;
use crate::config::keys::{OTHER_NAMES, sections};
use crate::config::{CheckpointSection, RunConfig};

#[test]
fn a_required_path_is_missing() {
    let error = RunConfig::from_toml("[model]\npath = \"flux\"\n", Path::new("run.toml"), &[])
        .expect_err("no dataset");
    assert_eq!(
        error.to_string(),
        "`dataset.path` in run.toml: required, but not given"
    );
    let error = RunConfig::from_toml("", Path::new("run.toml"), &[]).expect_err("no model");
    assert_eq!(
        error.to_string(),
        "`model.path` in run.toml: required, but not given"
    );
}

#[test]
fn not_toml() {
    assert_refused(
        "[train\nsteps = 1",
        "run.toml:1:7: unclosed table, expected `]`",
    );
    assert_refused(
        "[train]\nsteps = 1\nsteps = 2",
        "run.toml:3:1: duplicate key",
    );
    assert_refused(
        "[train]\nsteps = ",
        "run.toml:2:9: string values must be quoted, expected literal string",
    );
}

#[test]
fn what_people_write_for_toml_gets_the_mend() {
    let backslash = "in double quotes a backslash starts an escape: write a Windows path in single quotes, as in 'C:\\Users\\me', or with / in place of each backslash";
    for (text, ends) in [
        ("[dataset]\npath = \"C:\\Users\\me\"", backslash),
        ("[dataset]\npath = \"D:\\my pictures\"", backslash),
        ("[dataset]\npath = \"C:\\pics\\\"\n", backslash),
        (
            "[dataset]\nrandom_flip = True",
            "write true or false in lower case",
        ),
        (
            "[optimizer]\nmax_grad_norm = None",
            "leave the key out for its default",
        ),
        (
            "[train]\nsteps: 5",
            "this is TOML, not YAML: write key = value",
        ),
    ] {
        let error = read(text).expect_err("no TOML").to_string();
        assert!(error.starts_with("run.toml:2:"), "{error}");
        assert!(error.ends_with(ends), "{error}");
    }
    // Both are paths already.
    let config = read("[lora]\ninit_from = 'C:\\Users\\me'\n").expect("single quotes");
    assert_eq!(config.lora.init_from, Some(PathBuf::from("C:\\Users\\me")));
}

#[test]
fn a_byte_order_mark_and_line_ends_of_windows_are_fine() {
    let config = read("\u{feff}[train]\r\nsteps = 7\r\n").expect("a good configuration");
    assert_eq!(config.train.steps, 7);
}

#[test]
fn a_number_in_quotes_is_told_from_a_word() {
    assert_refused(
        "[optimizer]\nlearning_rate = \"1e-4\"",
        "`optimizer.learning_rate` in run.toml:2: invalid type: string \"1e-4\", expected a number: write 1e-4 without quotes",
    );
    assert_refused(
        "[train]\nsteps = \"500\"",
        "`train.steps` in run.toml:2: invalid type: string \"500\", expected a whole number: write 500 without quotes",
    );
}

#[test]
fn deep_nesting_is_refused() {
    let text = format!("x = {}", "[".repeat(100_000));
    let error = read(&text).expect_err("too deep").to_string();
    assert!(error.starts_with("run.toml:1:"), "{error}");
}

#[test]
fn unknown_key() {
    assert_refused(
        "[optimizer]\nlearnin_rate = 1e-3",
        "unknown key `optimizer.learnin_rate` in run.toml:2: did you mean `learning_rate`?",
    );
    assert_refused(
        "[lora]\nr = 4\n\n\"a\\nb\" = 1",
        "unknown key `lora.a\\nb` in run.toml:4: did you mean `lora_alpha`?",
    );
}

#[test]
fn unknown_key_that_lives_elsewhere() {
    assert_refused(
        "[train]\nlearning_rate = 1e-3",
        "unknown key `train.learning_rate` in run.toml:2: did you mean `optimizer.learning_rate`?",
    );
    assert_refused(
        "batch_size = 1",
        "unknown key `batch_size` in run.toml:1: did you mean `train.batch_size`?",
    );
    assert_refused(
        "batchsize = 1",
        "unknown key `batchsize` in run.toml:1: did you mean `train.batch_size`?",
    );
}

#[test]
fn unknown_key_that_other_trainers_use() {
    assert_refused(
        "[lora]\nrank = 8",
        "unknown key `lora.rank` in run.toml:2: did you mean `r`?",
    );
    assert_refused(
        "[train]\nlr = 8",
        "unknown key `train.lr` in run.toml:2: did you mean `optimizer.learning_rate`?",
    );
}

#[test]
fn other_names_lead_to_keys_that_exist() {
    let sections = sections();
    let exists = |full: &str| {
        let (section, key) = full.split_once('.').expect("section.key");
        sections
            .iter()
            .any(|(name, keys)| *name == section && keys.contains(&key))
    };
    for (other, full) in OTHER_NAMES {
        assert!(exists(full), "{full}");
        assert!(
            !sections.iter().any(|(_, keys)| keys.contains(&other)),
            "{other}"
        );
    }
    assert!(
        MAY_CHANGE_ON_RESUME
            .iter()
            .filter(|key| !key.ends_with('.'))
            .all(|key| exists(key))
    );
}

#[test]
fn the_list_of_sections_is_complete() {
    let names = sections().map(|(section, _)| section);
    assert_eq!(names, names_of::<RunConfig>());
    assert_eq!(names_of::<CheckpointSection>(), ["every", "keep"]);
    assert!(sections().iter().all(|(_, keys)| !keys.is_empty()));
}

#[test]
fn unknown_section() {
    assert_refused(
        "[optimiser]\nname = \"adamw\"",
        "unknown section `optimiser` in run.toml:1: did you mean `optimizer`?",
    );
}

#[test]
fn a_section_that_is_not_one() {
    assert_refused(
        "train = 5",
        "`train` in run.toml:1: is a section, to be written as [train]",
    );
    assert_refused(
        "[[train]]\nsteps = 5",
        "`train` in run.toml:1: is a section, to be written as [train]",
    );
}

#[test]
fn wrong_type() {
    assert_refused(
        "[optimizer]\nlearning_rate = \"fast\"",
        "`optimizer.learning_rate` in run.toml:2: invalid type: string \"fast\", expected a number",
    );
    assert_refused(
        "[train]\nsteps = 1.5",
        "`train.steps` in run.toml:2: invalid type: number `1.5`, expected a whole number",
    );
    assert_refused(
        "[train]\nbatch_size = -1",
        "`train.batch_size` in run.toml:2: invalid value: integer `-1`, expected a whole number",
    );
    assert_refused(
        "[train]\nseed = 9223372036854775808",
        "run.toml:2:8: u64 value was too large",
    );
    assert_refused(
        "[dataset]\nrandom_flip = 1",
        "`dataset.random_flip` in run.toml:2: invalid type: integer `1`, expected a boolean",
    );
    assert_refused(
        "[memory]\nrecompute = \"some\"",
        "`memory.recompute` in run.toml:2: invalid value: string \"some\", expected \"auto\", \"all\", \"none\" or a number of blocks",
    );
    assert_refused(
        "[memory]\nlimit = 8",
        "`memory.limit` in run.toml:2: invalid type: integer `8`, expected a number with its unit, such as \"8GiB\" or \"500 MB\"",
    );
    assert_refused(
        "[train]\nrecompute = 1",
        "unknown key `train.recompute` in run.toml:2: did you mean `memory.recompute`?",
    );
    assert_refused(
        "[model]\nvae = 1",
        "`model.vae` in run.toml:2: invalid type: integer `1`, expected a path",
    );
    assert_refused(
        "[optimizer]\nbetas = [0.9]",
        "`optimizer.betas` in run.toml:2: invalid length 1, expected an array of length 2",
    );
    assert_refused(
        "[optimizer]\nbetas = [0.9, 0.99, 0.999]",
        "`optimizer.betas` in run.toml:2: invalid length 3, expected 2 elements in sequence",
    );
    assert_refused(
        "[lora]\ntarget_modules = 5",
        "`lora.target_modules` in run.toml:2: expected a string or a list of strings",
    );
    assert_refused(
        "[lora]\nrank_pattern = { \"a.b\" = \"x\" }",
        "`lora.rank_pattern.a.b` in run.toml:2: invalid type: string \"x\", expected a whole number",
    );
    assert_refused(
        "[sample]\nprompts = \"a cat\"",
        "`sample.prompts` in run.toml:2: invalid type: string \"a cat\", expected a sequence",
    );
}

#[test]
fn wrong_choice() {
    assert_refused(
        "[optimizer]\nname = \"adamz\"",
        "`optimizer.name` in run.toml:2: unknown value `adamz`, expected one of `adamw`, `adamw8bit`, `adam`, `sgd`, `lion`, `adafactor`, `prodigy`, `schedule_free_adamw`",
    );
    assert_refused(
        "[train]\ntimestep_sampling = \"logit-normal\"",
        "`train.timestep_sampling` in run.toml:2: unknown value `logit-normal`, expected one of `none`, `logit_normal`, `mode`, `sigmoid`, `uniform`, `shift`, `flux_shift`",
    );
    assert_refused(
        "[optimizer]\nmax_grad_norm = \"off\"",
        "`optimizer.max_grad_norm` in run.toml:2: invalid value: string \"off\", expected a number or \"none\"",
    );
    assert_refused(
        "[train]\nshift = true",
        "`train.shift` in run.toml:2: invalid type: boolean `true`, expected a number or \"flux\"",
    );
    assert_refused(
        "[lora]\ninit_lora_weights = \"loftq\"",
        "`lora.init_lora_weights` in run.toml:2: invalid value: string \"loftq\", expected true, false, \"gaussian\", \"orthogonal\", \"olora\", \"pissa\" or \"pissa_niter_N\" with a number N",
    );
}
