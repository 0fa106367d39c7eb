//! What is read, and what is written reads back the same.

use std::path::Path;

use lora_core::peft::{InitLoraWeights, Targets};
use lora_core::training::optimizers::OptimizerConfig;
use toml::Table;

use super::{EVERYTHING, everything, read};
use crate::config::keys::sections;
use crate::config::{
    LossWeighting, LrSchedulerName, Recompute, RunConfig, TimestepSampling, TimestepShift,
};

#[test]
fn two_paths_are_enough() {
    let config = read("").expect("a good configuration");
    let mut expected = RunConfig::default();
    expected.model.path = "flux".into();
    expected.dataset.path = "cats".into();
    assert_eq!(config, expected);
    assert_eq!(config.sample, None);
}

#[test]
fn every_key_is_read() {
    let config = everything();
    assert_eq!(
        config.model.vae.as_deref(),
        Some(Path::new("ae.safetensors"))
    );
    assert_eq!(
        config.lora.target_modules,
        Some(Targets::Pattern("all-linear".into()))
    );
    assert_eq!(
        config.lora.exclude_modules,
        Some(Targets::List(vec!["proj_out".into()]))
    );
    assert_eq!(config.lora.rank_pattern.get("single.*"), Some(2));
    assert_eq!(
        config.lora.init_lora_weights,
        Some(InitLoraWeights::Default)
    );
    assert_eq!(config.optimizer.max_grad_norm, None);
    assert!(
        matches!(config.optimizer.rule, OptimizerConfig::Adamw(options) if options.weight_decay == 0.0)
    );
    assert_eq!(
        config.lr_scheduler.name,
        LrSchedulerName::ConstantWithWarmup
    );
    assert_eq!(config.train.seed, i64::MAX as u64);
    assert_eq!(
        config.train.timestep_sampling,
        TimestepSampling::LogitNormal
    );
    assert_eq!(config.train.shift, TimestepShift::Flux);
    assert_eq!(config.train.loss_weighting, LossWeighting::SigmaSqrt);
    assert!(!config.logging.tensorboard && !config.logging.csv);
    assert_eq!(
        config.sample.expect("a section").prompts[1],
        "two\ncats, \"ü\""
    );
}

#[test]
fn what_is_written_reads_back_the_same() {
    for config in [read("").expect("a good configuration"), everything()] {
        let text = config.to_toml().expect("TOML holds it");
        let again = RunConfig::from_toml(&text, Path::new("config.toml"), &[]);
        let again = again.expect("what was written");
        assert_eq!(again, config);
        assert_eq!(again.to_toml().expect("TOML holds it"), text);
        assert_eq!(
            again.digest().expect("TOML holds it"),
            config.digest().expect("the same")
        );
    }
    assert_ne!(
        read("").expect("good").digest().expect("TOML holds it"),
        everything().digest().expect("TOML holds it")
    );
}

#[test]
fn every_default_is_written_out() {
    let text = read("")
        .expect("a good configuration")
        .to_toml()
        .expect("TOML holds it");
    let table: Table = toml::from_str(&text).expect("what was written");
    for (section, keys) in sections() {
        if ["sample", "validation", "ema"].contains(&section) {
            continue; // absent: none
        }
        let keys = match section {
            // The options of other optimizers, and factors on the rate, are absent.
            "optimizer" => ["name", "learning_rate", "betas", "eps"]
                .into_iter()
                .chain(["weight_decay", "max_grad_norm"])
                .collect(),
            _ => keys,
        };
        for key in keys {
            let optional = [
                "transformer",
                "vae",
                "reference",
                "mask",
                "target_modules", // the family's
                "text_encoder",
                "text_encoder_2",
                "reference",
                "mask",
                "folders",
                "skip",
                "random_crops",
                "trigger_word",
                "shuffle_caption",
                "keep_tokens",
                "caption_tag_dropout_rate",
                "caption_separator",
                "caption_variants",
                "train_double_block_indices",
                "train_single_block_indices",
                "exclude_modules",
                "rank_pattern",
                "alpha_pattern",
                "init_from",
                "limit",
                // Written only where they differ: configurations of runs that began before them keep their digest.
                "peft_type",
                "layers_to_transform",
                "layers_pattern",
                "modules_to_save",
                "bias",
                "init_lora_weights",
                "decompose_both",
                "decompose_factor",
                "loss_type",
                "huber_c",
                "min_snr_gamma",
                "power",
                "lr_end",
            ];
            let written = table[section].get(key).is_some();
            assert_eq!(written, !optional.contains(&key), "{section}.{key}");
        }
    }
}

#[test]
fn floats_survive_to_the_bit() {
    let mut config = read("").expect("a good configuration");
    for rate in [1e-4, 0.1 + 0.2, 1e-300, f64::MIN_POSITIVE, 5e-324, 1e300] {
        config.optimizer.learning_rate = rate;
        let text = config.to_toml().expect("TOML holds it");
        let again = RunConfig::from_toml(&text, Path::new("config.toml"), &[]);
        let again = again.expect("what was written").optimizer.learning_rate;
        assert_eq!(again.to_bits(), rate.to_bits(), "{rate}");
    }
}

#[test]
fn what_was_called_train_recompute_is_still_read() {
    let recompute = |text: &str| read(text).expect("a good configuration").memory.recompute;
    assert_eq!(recompute("[train]\nrecompute = true"), Recompute::All);
    assert_eq!(recompute("[train]\nrecompute = false"), Recompute::First(0));
    assert_eq!(
        recompute("[memory]\nrecompute = \"none\""),
        Recompute::First(0)
    );
    assert_eq!(recompute("[memory]\nrecompute = 7"), Recompute::First(7));
    assert_eq!(recompute(""), Recompute::Auto);
}

#[test]
fn any_missing_character_is_survived_in_one_line() {
    for (at, c) in EVERYTHING.char_indices() {
        let text = format!("{}{}", &EVERYTHING[..at], &EVERYTHING[at + c.len_utf8()..]);
        match RunConfig::from_toml(&text, Path::new("run.toml"), &[]) {
            Ok(config) => {
                let text = config.to_toml().expect("TOML holds it");
                let again = RunConfig::from_toml(&text, Path::new("run.toml"), &[]);
                assert_eq!(again.expect("what was written"), config);
            }
            Err(error) => {
                let line = error.to_string();
                assert!(line.contains("run.toml") && !line.contains('\n'), "{line}");
            }
        }
    }
}
