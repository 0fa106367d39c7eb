//! What can be written in a configuration, made from the types and their doc comments: the tables of `docs/configuration.md`, and
//! a JSON schema for editors.
//!
//! The doc comment of a key ends with its default: `Default 512.` with a value as TOML has it, `Default: none.` with words, or
//! `Required.` A test holds the values against the types' own `Default`.

use anyhow::{Context, bail};
use schemars::Schema;
use schemars::generate::SchemaSettings;
use schemars::transform::RecursiveTransform;
use serde_json::Value;

use super::run::RunConfig;

/// A line of `docs/configuration.md` that stands before a table begins so, goes on with the table's section, and ends with [`END`].
const MARK: &str = "<!-- keys: ";
const END: &str = " -->";
/// A row of a table, or what stands above them.
const ROW: char = '|';

/// The JSON schema of a configuration.
pub(crate) fn schema() -> Value {
    // TOML has no null: a default of nothing is none.
    let without_null = |schema: &mut Schema| {
        if schema.get("default").is_some_and(Value::is_null) {
            schema.remove("default");
        }
    };
    let settings = SchemaSettings::draft07()
        .with(|settings| settings.inline_subschemas = true)
        .with_transform(RecursiveTransform(without_null));
    let schema = settings
        .into_generator()
        .into_root_schema_for::<RunConfig>();
    schema.into()
}

/// The text with every table of keys as the types have it.
///
/// # Errors
/// A mark that names no section, a section without one.
pub(crate) fn renewed(text: &str) -> anyhow::Result<String> {
    let sections = sections()?;
    let mut missing: Vec<&str> = sections
        .iter()
        .map(|section| section.name.as_str())
        .collect();
    let mut out = String::new();
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        out.push_str(line);
        out.push('\n');
        let name = line
            .strip_prefix(MARK)
            .and_then(|rest| rest.strip_suffix(END));
        let Some(name) = name else { continue };
        let section = sections.iter().find(|section| section.name == name);
        out.push_str(
            &section
                .with_context(|| format!("`{line}` names no section"))?
                .table,
        );
        missing.retain(|section| *section != name);
        while lines.next_if(|line| line.starts_with(ROW)).is_some() {}
    }
    match missing.first() {
        Some(name) => bail!("there is no line `{MARK}{name}{END}`"),
        None => Ok(out),
    }
}

/// The keys of a section, as a table.
struct Section {
    name: String,
    table: String,
}

/// All of them; the tables in `dataset.folders` count as one.
fn sections() -> anyhow::Result<Vec<Section>> {
    let schema = schema();
    let mut sections = Vec::new();
    let folders = &schema["properties"]["dataset"]["properties"]["folders"]["items"];
    let folders = ("dataset.folders".to_string(), folders);
    for (name, schema) in keys(&schema)?.into_iter().chain([(&folders.0, folders.1)]) {
        let mut table = String::from("| key | meaning | default |\n|---|---|---|\n");
        for (key, schema) in keys(schema)? {
            let text = schema["description"].as_str();
            let text = text.with_context(|| format!("`{name}.{key}` has no doc comment"))?;
            let (meaning, default) = meaning_and_default(text)
                .with_context(|| format!("the doc comment of `{name}.{key}` says no default"))?;
            table.push_str(&format!("| `{key}` | {meaning} | {default} |\n"));
        }
        sections.push(Section {
            name: name.clone(),
            table,
        });
    }
    Ok(sections)
}

/// The keys of an object with their schemas; the object may be optional.
fn keys(schema: &Value) -> anyhow::Result<Vec<(&String, &Value)>> {
    let optional = || {
        schema["anyOf"]
            .as_array()?
            .iter()
            .find(|schema| schema["properties"].is_object())
    };
    let object = match schema["properties"].is_object() {
        true => Some(schema),
        false => optional(),
    };
    let keys = object.and_then(|object| object["properties"].as_object());
    Ok(keys.context("no object")?.iter().collect())
}

/// A doc comment on one line, and the default it ends with.
fn meaning_and_default(text: &str) -> Option<(String, String)> {
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let text = text.strip_suffix('.')?.replace('|', "\\|");
    for (mark, kept) in [
        (" Default: ", ""),
        (" Default ", ""),
        (" Required", "required"),
    ] {
        if let Some((meaning, default)) = text.rsplit_once(mark) {
            return Some((meaning.into(), format!("{kept}{default}")));
        }
    }
    None
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use std::path::Path;

    use super::*;

    const DOCS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/configuration.md");

    #[test]
    fn the_documentation_has_the_keys_of_the_types() {
        let text = std::fs::read_to_string(DOCS).unwrap();
        assert!(
            renewed(&text).unwrap() == text,
            "docs/configuration.md is not what the doc comments say: renew it with `cargo xtask reference`"
        );
    }

    #[test]
    fn defaults_that_are_written_down_change_nothing() {
        let text = "[model]\npath = \"m\"\n[dataset]\npath = \"d\"\n[sample]\nprompts = [\"a cat\"]\n[validation]\nshare = 0.5\n[ema]\n";
        let read = |set: &[String]| RunConfig::from_toml(text, Path::new("run.toml"), set);
        let plain = read(&[]).unwrap();
        let mut checked = 0;
        for (section, schema) in keys(&schema()).unwrap() {
            for (key, schema) in keys(schema).unwrap() {
                let text = schema["description"].as_str().unwrap();
                let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
                if let Some((_, value)) = text.rsplit_once(" Default ") {
                    let set = format!("{section}.{key}={}", value.trim_end_matches('.'));
                    assert_eq!(read(std::slice::from_ref(&set)).unwrap(), plain, "{set}");
                    checked += 1;
                }
            }
        }
        assert!(checked > 50, "{checked}");
    }

    #[test]
    fn a_table_for_each_section_is_asked_for() {
        let error = |text: &str| renewed(text).unwrap_err().to_string();
        assert!(error("<!-- keys: nothing -->\n").contains("names no section"));
        assert!(error("").contains("`<!-- keys: model -->`"));
    }
}
