//! Reading the text of a configuration: where each key was written, `--set`, errors of one line.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use toml::de::{DeTable, DeValue};
use toml::{Table, Value};

use super::error::{ConfigError, in_our_words, set_error, value_error};
use crate::nearest::{one_line, shown};

/// Where each key was written, for errors.
pub(super) struct Origins<'a> {
    file: &'a Path,
    /// Line of each section and of each `section.key` in the file.
    lines: BTreeMap<String, usize>,
    /// Each `section.key` that was given by `--set`.
    pub(super) set: BTreeSet<String>,
    /// The preset that the file lies on.
    pub(super) preset: Option<(&'a str, Table)>,
}

impl<'a> Origins<'a> {
    pub(super) fn new(text: &str, file: &'a Path) -> Self {
        let mut lines = BTreeMap::new();
        if let Ok(document) = DeTable::parse(text) {
            for (section, value) in document.get_ref() {
                lines.insert(
                    section.get_ref().to_string(),
                    line_of(text, section.span().start),
                );
                if let DeValue::Table(keys) = value.get_ref() {
                    for key in keys.keys() {
                        let name = format!("{}.{}", section.get_ref(), key.get_ref());
                        lines.insert(name, line_of(text, key.span().start));
                    }
                }
            }
        }
        Self {
            file,
            lines,
            set: BTreeSet::new(),
            preset: None,
        }
    }

    /// Where `key` (`section` or `section.key`) was written, with its preposition; the file alone for what was not.
    pub(super) fn place(&self, key: &str) -> String {
        if self.set.contains(key) {
            return " in --set".into();
        }
        match (self.lines.get(key), self.in_preset(key)) {
            (Some(line), _) => format!(" in {}:{line}", shown(self.file)),
            (None, Some(preset)) => format!(" in the preset {preset}"),
            (None, None) => format!(" in {}", shown(self.file)),
        }
    }

    fn in_preset(&self, key: &str) -> Option<&str> {
        let (name, table) = self.preset.as_ref()?;
        let (section, key) = key.split_once('.')?;
        table.get(section)?.get(key).map(|_| *name)
    }
}

/// Puts every value of `own` in place of that in `table`, key by key within sections.
pub(super) fn lay_over(table: &mut Table, own: Table) {
    for (name, value) in own {
        match (table.get_mut(&name), value) {
            (Some(Value::Table(section)), Value::Table(keys)) => section.extend(keys),
            (_, value) => {
                table.insert(name, value);
            }
        }
    }
}

pub(super) fn parse(text: &str, file: &Path) -> Result<Table, ConfigError> {
    toml::from_str(text).map_err(|error| {
        let start = error.span().map_or(0, |span| span.start.min(text.len()));
        let before = text.get(..start).unwrap_or(text);
        let column = before.rsplit('\n').next().unwrap_or("").chars().count() + 1;
        let line = text.lines().nth(line_of(text, start) - 1).unwrap_or("");
        let mut problem = one_line(error.message());
        if let Some(hint) = syntax_hint(line, text.get(start..).unwrap_or("")) {
            problem = format!("{problem}; {hint}");
        }
        ConfigError::Syntax {
            path: file.to_path_buf(),
            line: line_of(text, start),
            column,
            problem,
        }
    })
}

/// What is meant by a line that is no TOML, where it is what people often write; `rest` begins at the error.
fn syntax_hint(line: &str, rest: &str) -> Option<&'static str> {
    let word = rest.split(|c: char| !c.is_alphanumeric()).next();
    if line.contains('"') && line.contains('\\') {
        Some(
            "in double quotes a backslash starts an escape: write a Windows path in single quotes, as in 'C:\\Users\\me', or with / in place of each backslash",
        )
    } else if matches!(word, Some("True" | "False")) {
        Some("write true or false in lower case")
    } else if matches!(word, Some("None" | "null")) {
        Some("leave the key out for its default")
    } else if !line.contains('=') && line.contains(':') {
        Some("this is TOML, not YAML: write key = value")
    } else {
        None
    }
}

/// Line of the byte at `offset`, from 1.
fn line_of(text: &str, offset: usize) -> usize {
    let before = &text.as_bytes()[..offset.min(text.len())];
    before.iter().filter(|&&byte| byte == b'\n').count() + 1
}

/// Splits `section.key=value`; the key may go deeper, with TOML's quoting.
pub(super) fn parse_override(text: &str) -> Result<(Vec<String>, Value), ConfigError> {
    let malformed = || set_error(text, "write it as section.key=value");
    let (key, value) = text.split_once('=').ok_or_else(malformed)?;
    if key.contains('\n') {
        return Err(malformed());
    }
    let mut keys = Vec::new();
    let mut table: Table = toml::from_str(&format!("{key} = 0")).map_err(|_| malformed())?;
    loop {
        let (name, value) = table.into_iter().next().ok_or_else(malformed)?;
        keys.push(name);
        match value {
            Value::Table(inner) => table = inner,
            _ => break,
        }
    }
    if keys.len() < 2 {
        return Err(malformed());
    }
    let value = value.trim();
    let meant_as_toml =
        value.starts_with(['"', '\'', '{']) || (value.starts_with('[') && value.ends_with(']'));
    let value = match value.parse::<Value>() {
        Ok(value) => value,
        Err(_) if meant_as_toml => {
            let hint = syntax_hint(value, "").unwrap_or(
                "quote each string, and the whole for the shell, as in --set 'section.key=[\"a\", \"b\"]'",
            );
            return Err(set_error(text, &format!("the value is no TOML: {hint}")));
        }
        Err(_) => Value::String(value.into()),
    };
    Ok((keys, value))
}

/// Puts `value` at the path `keys`, making tables on the way.
pub(super) fn insert(table: &mut Table, keys: &[String], value: Value) -> Result<(), String> {
    let (last, parents) = keys
        .split_last()
        .expect("an override has at least two keys");
    let mut table = table;
    for key in parents {
        let entry = table
            .entry(key.clone())
            .or_insert_with(|| Value::Table(Table::new()));
        table = entry
            .as_table_mut()
            .ok_or_else(|| format!("`{}` is not a section", one_line(key)))?;
    }
    table.insert(last.clone(), value);
    Ok(())
}

/// `train.recompute`, true or false, is what earlier versions called `memory.recompute`, "all" or "none".
pub(super) fn move_recompute(table: &mut Table) {
    let train = table.get_mut("train").and_then(Value::as_table_mut);
    let Some(Value::Boolean(all)) = train.as_ref().and_then(|train| train.get("recompute")) else {
        return;
    };
    let recompute = if *all { "all" } else { "none" };
    if let Some(train) = train {
        train.remove("recompute");
    }
    let memory = table.entry("memory").or_insert_with(|| Table::new().into());
    if let Some(memory) = memory.as_table_mut() {
        memory.entry("recompute").or_insert(recompute.into());
    }
}

/// Says in the user's words what serde found wrong.
pub(super) fn deserialize_error(error: &toml::de::Error, origins: &Origins) -> ConfigError {
    // the path of the value is only in the rendered form, behind the message
    let rendered = error.to_string();
    let path = rendered
        .strip_prefix(error.message())
        .and_then(|rest| rest.trim().strip_prefix("in `")?.strip_suffix('`'))
        .unwrap_or_default();
    let key: Vec<&str> = path.splitn(3, '.').take(2).collect();
    let problem = in_our_words(error.message());
    value_error(&one_line(path), &origins.place(&key.join(".")), problem)
}

/// `path` from `folder`, without `.` and without leading `..`.
///
/// `folder` is canonical, so that a file always gets the same absolute path, however the configuration was named.
pub(super) fn absolute(folder: &Path, path: &Path) -> PathBuf {
    if path.is_absolute() {
        return path.to_path_buf();
    }
    let mut absolute = folder.to_path_buf();
    let mut leading = true;
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir if leading => _ = absolute.pop(),
            component => {
                leading = false;
                absolute.push(component);
            }
        }
    }
    absolute
}
