//! Run presets: configurations by aim and memory, complete but for paths. Each is a file of `presets/`, kept in the program.

use super::error::ConfigError;

macro_rules! presets {
    ($($name:literal),+) => {
        [$(($name, include_str!(concat!("../../../../presets/", $name, ".toml")))),+]
    };
}

/// Every preset: its name and its text.
pub(super) const PRESETS: [(&str, &str); 6] = presets![
    "klein-style-8gb",
    "klein-subject-8gb",
    "klein-style-16gb",
    "klein-edit-16gb",
    "style-12gb",
    "subject-24gb"
];

/// Names of all presets.
pub fn names() -> impl Iterator<Item = &'static str> {
    PRESETS.iter().map(|(name, _)| *name)
}

/// The text of a preset.
pub(super) fn text(name: &str) -> Result<&'static str, ConfigError> {
    let found = PRESETS.iter().find(|(known, _)| *known == name);
    found
        .map(|(_, text)| *text)
        .ok_or_else(|| ConfigError::Preset {
            name: name.into(),
            known: names().collect::<Vec<_>>().join(", "),
        })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::*;
    use crate::config::RunConfig;

    #[test]
    fn every_file_is_a_preset_that_lacks_nothing_but_paths_and_is_in_the_guide() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let folder = root.join("presets").read_dir().expect("the presets");
        let files: BTreeSet<String> = folder
            .map(|file| {
                file.expect("a file")
                    .file_name()
                    .to_string_lossy()
                    .into_owned()
            })
            .collect();
        let named: BTreeSet<String> = names().map(|name| format!("{name}.toml")).collect();
        assert_eq!(files, named);
        let guide = std::fs::read_to_string(root.join("docs/guide.md")).expect("the guide");
        for (name, text) in PRESETS {
            assert!(text.contains("\n# Estimate, not measured:"), "{name}");
            assert!(guide.contains(name), "{name}: not in the guide");
            let own = Path::new("run.toml");
            let paths = "[model]\npath = \"m\"\n[dataset]\npath = \"d\"\n";
            let config = RunConfig::from_toml_on(Some(name), paths, own, &[]);
            config.unwrap_or_else(|error| panic!("{name}: {error}"));
            let error = RunConfig::from_toml_on(Some(name), "", own, &[]).expect_err("no paths");
            assert!(
                error.to_string().contains("`model.path`"),
                "{name}: {error}"
            );
        }
    }

    #[test]
    fn the_file_counts_before_the_preset_and_set_before_both() {
        let text =
            "[model]\npath = \"m\"\n[dataset]\npath = \"d\"\n[lora]\nr = 4\n[train]\nsteps = 7\n";
        let load = |name: &str, set: &[String]| {
            RunConfig::from_toml_on(Some(name), text, Path::new("run.toml"), set)
        };
        let config = load("klein-style-8gb", &["train.steps=9".into()]).expect("complete");
        assert_eq!((config.lora.r, config.train.steps), (4, 9));
        assert_eq!(config.lora.lora_alpha, 16.0, "of the preset");
        let error = load("klein-style-9gb", &[]).expect_err("no such preset");
        assert!(error.to_string().contains("klein-style-8gb"), "{error}");
        // a mistake is looked for where it was written
        let error = load("klein-style-8gb", &["lr_scheduler.name=constant".into()]);
        let error = error.expect_err("no warm-up there").to_string();
        assert!(error.contains("in the preset klein-style-8gb"), "{error}");
    }
}
