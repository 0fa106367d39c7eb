//! The sections and their keys, and what is meant by one that does not exist.

use toml::{Table, Value};

use super::checkpoint::CheckpointSection;
use super::dataset::DatasetSection;
use super::ema::EmaSection;
use super::error::{ConfigError, value_error};
use super::export::ExportSection;
use super::fields::names_of;
use super::logging::LoggingSection;
use super::lora::LoraSection;
use super::lr_scheduler::LrSchedulerSection;
use super::memory::MemorySection;
use super::model::ModelSection;
use super::optimizer::OptimizerSection;
use super::read::Origins;
use super::sample::SampleSection;
use super::train::TrainSection;
use super::validation::ValidationSection;
use crate::nearest::{nearest, one_line};

/// What diffusers' script and kohya's call some keys, where the spelling gives no hint.
pub(super) const OTHER_NAMES: [(&str, &str); 28] = [
    ("train_text_encoder", "lora.text_encoder"),
    ("train_t5xxl", "lora.text_encoder_2"),
    ("text_encoder_learning_rate", "optimizer.text_encoder_lr"),
    ("caption_dropout_rate", "dataset.caption_dropout"),
    ("clip_threshold", "optimizer.d"),
    ("decay_rate", "optimizer.beta2_decay"),
    ("ema_decay", "ema.decay"),
    ("flip_aug", "dataset.random_flip"),
    ("optimizer_type", "optimizer.name"),
    ("random_crop", "dataset.random_crops"),
    ("adapter", "lora.init_from"),
    ("checkpointing_steps", "checkpoint.every"),
    ("checkpoints_total_limit", "checkpoint.keep"),
    ("dim", "lora.r"),
    ("discrete_flow_shift", "train.shift"),
    ("gradient_checkpointing", "memory.recompute"),
    ("image_dir", "dataset.path"),
    ("instance_data_dir", "dataset.path"),
    ("lr", "optimizer.learning_rate"),
    ("mixed_precision", "model.compute"),
    ("network_alpha", "lora.lora_alpha"),
    ("network_dim", "lora.r"),
    ("pretrained_model_name_or_path", "model.path"),
    ("rank", "lora.r"),
    ("save_every_n_steps", "checkpoint.every"),
    ("train_data_dir", "dataset.path"),
    ("validation_prompt", "sample.prompts"),
    ("weighting_scheme", "train.timestep_sampling"),
];

/// The sections and their keys.
pub(super) fn sections() -> [(&'static str, Vec<&'static str>); 13] {
    [
        ("model", names_of::<ModelSection>().to_vec()),
        ("dataset", names_of::<DatasetSection>().to_vec()),
        ("lora", names_of::<LoraSection>().to_vec()),
        ("optimizer", OptimizerSection::keys()),
        ("lr_scheduler", names_of::<LrSchedulerSection>().to_vec()),
        ("train", names_of::<TrainSection>().to_vec()),
        ("memory", names_of::<MemorySection>().to_vec()),
        ("checkpoint", names_of::<CheckpointSection>().to_vec()),
        ("export", names_of::<ExportSection>().to_vec()),
        ("logging", names_of::<LoggingSection>().to_vec()),
        ("sample", names_of::<SampleSection>().to_vec()),
        ("validation", names_of::<ValidationSection>().to_vec()),
        ("ema", names_of::<EmaSection>().to_vec()),
    ]
}

/// Refuses sections and keys that do not exist, naming the nearest that does.
pub(super) fn check_keys(table: &Table, origins: &Origins) -> Result<(), ConfigError> {
    let sections = sections();
    for (name, value) in table {
        let Some((section, known)) = sections.iter().find(|(section, _)| section == name) else {
            let in_set = origins
                .set
                .iter()
                .find(|key| key.split('.').next() == Some(name));
            let place = origins.place(in_set.unwrap_or(name));
            if value.is_table() {
                let names = sections.each_ref().map(|(section, _)| *section);
                return Err(ConfigError::UnknownSection {
                    section: one_line(name),
                    place,
                    nearest: nearest(name, &names).unwrap_or_default().to_owned(),
                });
            }
            return Err(ConfigError::UnknownKey {
                key: one_line(name),
                place,
                nearest: suggest("", name),
            });
        };
        let Value::Table(keys) = value else {
            let problem = format!("is a section, to be written as [{section}]");
            return Err(value_error(section, &origins.place(section), problem));
        };
        if let Some(key) = keys.keys().find(|key| !known.contains(&key.as_str())) {
            let full = format!("{section}.{key}");
            return Err(ConfigError::UnknownKey {
                place: origins.place(&full),
                key: one_line(&full),
                nearest: suggest(section, key),
            });
        }
    }
    Ok(())
}

/// Refuses options that the optimizer has not, and values that they cannot have.
pub(super) fn check_optimizer(table: &Table, origins: &Origins) -> Result<(), ConfigError> {
    let Some(Value::Table(section)) = table.get("optimizer") else {
        return Ok(());
    };
    let read = OptimizerSection::read(section.clone());
    read.map(drop).map_err(|(key, problem)| {
        let key = format!("optimizer.{key}");
        value_error(&key, &origins.place(&key), problem)
    })
}

/// The key meant by the unknown `key` in `section`: as other trainers call it, the same in another section, or spelled
/// most like it in this one (in any, for a key outside of all sections).
fn suggest(section: &str, key: &str) -> String {
    let sections = sections();
    let full_name = |key: &str| {
        let home = sections.iter().find(|(_, keys)| keys.contains(&key));
        home.map(|(section, _)| format!("{section}.{key}"))
    };
    let spelled_alike = || match sections.iter().find(|(name, _)| *name == section) {
        Some((_, keys)) => nearest(key, keys).unwrap_or_default().to_owned(),
        None => {
            let keys: Vec<&str> = sections
                .iter()
                .flat_map(|(_, keys)| keys.to_vec())
                .collect();
            nearest(key, &keys).and_then(full_name).unwrap_or_default()
        }
    };
    let other = OTHER_NAMES.iter().find(|(other, _)| *other == key);
    let known = other
        .map(|(_, full)| (*full).to_owned())
        .or_else(|| full_name(key))
        .unwrap_or_else(spelled_alike);
    match known.split_once('.') {
        Some((home, key)) if home == section => key.to_owned(),
        _ => known,
    }
}
