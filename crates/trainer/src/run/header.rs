//! What the header of a finished LoRA says about how it was made, for programs that show it (`ss_*` as sd-scripts writes
//! them, `modelspec.*` of the Stability model specification) and for whoever wants to make it again (`flux_lora.*`).
//!
//! Nothing here depends on time or place: a resumed run writes the same header. No path and no name of a person is in it.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context;
use flux_model::lora::ModelShape;
use toml::{Table, Value};

use crate::config::{RunConfig, may_change_on_resume};
use crate::run::checkpoint::State;

/// Keys of our own.
pub(crate) const VERSION: &str = "flux_lora.version";
pub(crate) const CONFIG: &str = "flux_lora.config";
pub(crate) const BASE: &str = "flux_lora.base_model_sha256";
pub(crate) const DATA: &str = "flux_lora.dataset_sha256";
pub(crate) const STEPS: &str = "flux_lora.steps";

/// The header's entries for a run that has made `steps` steps.
///
/// # Errors
/// A configuration that TOML cannot hold.
pub(crate) fn header(
    config: &RunConfig,
    state: &State,
    dataset_digest: &str,
    steps: u64,
    shape: &ModelShape,
) -> anyhow::Result<BTreeMap<String, String>> {
    let train = &config.train;
    let settings = without_paths(config)?;
    let setting = |section: &str, key: &str| {
        let value = settings.get(section).and_then(|section| section.get(key));
        match value {
            Some(Value::String(text)) => text.clone(),
            Some(value) => value.to_string(),
            None => String::new(),
        }
    };
    let side = config.dataset.largest_resolution();
    let mut entries = vec![
        (VERSION, env!("CARGO_PKG_VERSION").to_string()),
        (
            CONFIG,
            toml::to_string(&settings).context("write the settings")?,
        ),
        (BASE, state.base_model.clone()),
        (DATA, dataset_digest.to_string()),
        (STEPS, steps.to_string()),
        ("ss_steps", steps.to_string()),
        ("ss_max_train_steps", train.steps.to_string()),
        ("ss_num_train_images", state.samples.len().to_string()),
        (
            "ss_total_batch_size",
            (train.batch_size * train.gradient_accumulation_steps).to_string(),
        ),
        (
            "ss_gradient_accumulation_steps",
            train.gradient_accumulation_steps.to_string(),
        ),
        ("ss_seed", train.seed.to_string()),
        ("ss_learning_rate", setting("optimizer", "learning_rate")),
        ("ss_optimizer", setting("optimizer", "name")),
        ("ss_max_grad_norm", setting("optimizer", "max_grad_norm")),
        ("ss_lr_scheduler", setting("lr_scheduler", "name")),
        (
            "ss_lr_warmup_steps",
            setting("lr_scheduler", "warmup_steps"),
        ),
        ("ss_resolution", format!("({side}, {side})")),
        (
            "ss_caption_dropout_rate",
            setting("dataset", "caption_dropout"),
        ),
        ("ss_network_dropout", setting("lora", "lora_dropout")),
        ("ss_guidance_scale", setting("train", "guidance")),
        (
            "ss_timestep_sampling",
            setting("train", "timestep_sampling"),
        ),
        ("ss_discrete_flow_shift", setting("train", "shift")),
        ("ss_weighting_scheme", setting("train", "loss_weighting")),
        (
            "modelspec.trigger_phrase",
            setting("dataset", "trigger_word"),
        ),
        ("modelspec.sai_model_spec", "1.0.1".into()),
        ("modelspec.resolution", format!("{side}x{side}")),
    ];
    let base = shape.header().into_iter();
    entries.extend(base.map(|(key, value)| (key, value.to_string())));
    let named = entries
        .into_iter()
        .map(|(key, value)| (key.to_string(), value));
    Ok(named.filter(|(_, value)| !value.is_empty()).collect())
}

/// The settings that decide the bits, and no path: what may change on a resume is another way to the same ones, or where
/// something is, but for the steps and the learning rate.
fn without_paths(config: &RunConfig) -> anyhow::Result<Table> {
    let mut table = Table::try_from(config).context("write the settings")?;
    for (section, keys) in &mut table {
        if let Value::Table(keys) = keys {
            keys.retain(|key, _| {
                let name = format!("{section}.{key}");
                !may_change_on_resume(&name)
                    || name == "train.steps"
                    || ["optimizer", "lr_scheduler"].contains(&section.as_str())
            });
        }
        forget_places(keys);
    }
    table.retain(|_, keys| keys.as_table().is_none_or(|keys| !keys.is_empty()));
    Ok(table)
}

/// Takes paths out, known by their key or by looking like one.
fn forget_places(value: &mut Value) {
    match value {
        Value::Table(keys) => {
            keys.retain(|key, value| {
                let is_known = matches!(key, "path" | "reference" | "mask" | "init_from" | "skip");
                !is_known && !is_place(value)
            });
            keys.iter_mut().for_each(|(_, value)| forget_places(value));
        }
        Value::Array(values) => {
            values.retain(|value| !is_place(value));
            values.iter_mut().for_each(forget_places);
        }
        _ => {}
    }
}

fn is_place(value: &Value) -> bool {
    let text = value.as_str().unwrap_or_default();
    Path::new(text).is_absolute() || text.starts_with('~')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::FolderSection;
    use crate::fingerprint::Fingerprint;
    use crate::run::checkpoint::Progress;

    #[test]
    fn a_path_is_forgotten_wherever_it_is() {
        let text = "[a]\npath = 'x'\nb = '/home/anna'\nc = ['~/anna', 'kept']\nd = [{path = 'anna', weight = 2}]\n";
        let mut value = Value::Table(toml::from_str(text).expect("TOML"));
        forget_places(&mut value);
        assert_eq!(
            value["a"].to_string(),
            "{ c = [\"kept\"], d = [{ weight = 2 }] }"
        );
    }

    #[test]
    fn the_header_says_how_it_was_made_and_not_where() {
        let mut config = RunConfig::default();
        config.model.path = "/home/anna/models/FLUX.1-dev".into();
        config.dataset.path = "/home/anna/pictures".into();
        config.lora.init_from = Some("/home/anna/first.safetensors".into());
        config.dataset.skip = vec!["anna-asleep.png".into()];
        config.dataset.folders = vec![FolderSection {
            path: "/home/anna/more".into(),
            reference: Some("/home/anna/before".into()),
            mask: Some("annas-masks".into()),
            repeats: 3,
            ..FolderSection::default()
        }];
        config.train.steps = 1000;
        let state = State {
            progress: Progress { step: 400 },
            epoch: 3,
            config: String::new(),
            base_model: "b".repeat(64),
            samples: Vec::new(),
            fingerprint: Fingerprint {
                binary: String::new(),
                version: String::new(),
                device: String::new(),
                hardware: "anna's machine".into(),
                cpu_features: String::new(),
                kernels: String::new(),
            },
            events: Vec::new(),
            optimizer: Default::default(),
            best: None,
        };
        let header =
            header(&config, &state, "d", 400, &ModelShape::default()).expect("TOML holds it");
        assert!(
            header.values().all(|value| !value.contains("anna")),
            "{header:#?}"
        );
        assert_eq!(header["ss_steps"], "400");
        assert_eq!(header["ss_learning_rate"], "0.0001");
        assert_eq!(header["ss_optimizer"], "adamw");
        assert_eq!(header[BASE], "b".repeat(64));
        assert_eq!(header[DATA], "d");
        assert!(
            header[CONFIG].contains("lora_alpha = 16.0"),
            "{}",
            header[CONFIG]
        );
        assert!(!header[CONFIG].contains("path"), "{}", header[CONFIG]);
        assert!(
            !header[CONFIG].contains("recompute"),
            "another way to the same bits"
        );
    }
}
