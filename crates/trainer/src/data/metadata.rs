//! Lists of images and captions, as Hugging Face's `imagefolder` keeps them: `metadata.jsonl`, an object a line, or
//! `metadata.csv` with a line of column names. Both have `file_name`, a path from the list's folder, and `text`, and may have
//! `reference`, another such path, or `references`, a list of them (in a table, as JSON); other columns are passed over.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Component, Path, PathBuf};

use lora_core::files::strict_json::parse_json;
use serde::Deserialize;

use crate::data::error::{DatasetError, json_problem, read_error};
use crate::data::text::{MAX_CAPTION_BYTES, check_characters, decode, open, read_up_to};
use crate::nearest::one_line;

/// The list as JSON lines.
pub const METADATA_FILE: &str = "metadata.jsonl";
/// The list as a table.
pub const METADATA_CSV: &str = "metadata.csv";
/// A caption, its JSON escapes, and whatever other columns there are.
const MAX_LINE_BYTES: u64 = 1 << 20;
/// Largest table read, in bytes: some million captions.
const MAX_CSV_BYTES: u64 = 256 << 20;

/// A line of a list that was checked.
#[derive(Debug)]
pub(super) struct Row {
    /// Line in the file, from 1.
    pub(super) line: usize,
    /// Path from the list's folder, below it, with `/` between its parts.
    pub(super) name: String,
    /// The same as it is written there.
    pub(super) quoted: String,
    /// The caption, without surrounding white space.
    pub(super) caption: String,
    /// Paths of the pictures it belongs to, from the list's folder.
    pub(super) references: Vec<String>,
}

/// The list in a folder, if there is one.
pub(super) fn find_list(folder: &Path) -> Result<Option<PathBuf>, DatasetError> {
    let there = |name: &str| Some(folder.join(name)).filter(|it| fs::symlink_metadata(it).is_ok());
    match (there(METADATA_FILE), there(METADATA_CSV)) {
        (Some(_), Some(_)) => Err(DatasetError::TwoLists {
            path: folder.into(),
        }),
        (lines, table) => Ok(lines.or(table)),
    }
}

/// The rows of a list.
pub(super) fn read_list(path: &Path) -> Result<Vec<Row>, DatasetError> {
    if path.extension().is_some_and(|extension| extension == "csv") {
        read_csv(path)
    } else {
        read_jsonl(path)
    }
}

/// An error on a line.
pub(super) fn wrong_line(path: &Path, line: usize, problem: impl Into<String>) -> DatasetError {
    DatasetError::Metadata {
        path: path.into(),
        line,
        problem: problem.into(),
    }
}

fn read_jsonl(path: &Path) -> Result<Vec<Row>, DatasetError> {
    #[derive(Deserialize)]
    struct Object {
        file_name: String,
        text: String,
        reference: Option<String>,
        references: Option<Vec<String>>,
    }

    let mut file = BufReader::new(open(path)?);
    let mut rows = Vec::new();
    for line in 1.. {
        let wrong = |problem: String| wrong_line(path, line, problem);
        let mut bytes = Vec::new();
        let read = Read::take(&mut file, MAX_LINE_BYTES + 1).read_until(b'\n', &mut bytes);
        if read.map_err(|error| read_error(path, error))? == 0 {
            break;
        }
        if bytes.len() as u64 > MAX_LINE_BYTES {
            return Err(wrong("is larger than 1 MiB".into()));
        }
        let text = decode(&bytes).map_err(wrong)?.trim();
        if text.is_empty() {
            continue;
        }
        if !text.starts_with('{') {
            return Err(wrong("is not a JSON object".into())); // serde would take a list as well
        }
        let object: Object =
            parse_json(text.as_bytes()).map_err(|error| wrong(json_problem(&error)))?;
        let references = object.reference.into_iter();
        let references = references.chain(object.references.into_iter().flatten());
        let references = references.collect();
        rows.push(row(&object.file_name, &object.text, references, line).map_err(wrong)?);
    }
    Ok(rows)
}

fn read_csv(path: &Path) -> Result<Vec<Row>, DatasetError> {
    let bytes = read_up_to(path, MAX_CSV_BYTES)?;
    let bytes = bytes.ok_or_else(|| wrong_line(path, 1, "is part of more than 256 MiB"))?;
    for (index, line) in bytes.split(|&byte| byte == b'\n').enumerate() {
        decode(line).map_err(|problem| wrong_line(path, index + 1, problem))?;
    }
    let text = decode(&bytes).map_err(|problem| wrong_line(path, 1, problem))?;

    // a spreadsheet separates by what its country uses
    let header = text.lines().next().unwrap_or_default();
    let separator = [b',', b';', b'\t'].into_iter().find(|&separator| {
        let names = header.split(char::from(separator));
        let mut names = names.map(|name| name.trim().trim_matches('"'));
        names.any(|name| name == "file_name")
    });
    let mut reader = csv::ReaderBuilder::new()
        .delimiter(separator.unwrap_or(b','))
        .from_reader(text.as_bytes());
    // the reader counts blank lines to the record after them
    let mut counted = (0, 1);
    let mut line_at = |position: Option<&csv::Position>| {
        let start = position.map_or(0, |it| it.byte() as usize);
        let blank = text[start..]
            .bytes()
            .take_while(|byte| b"\r\n".contains(byte));
        let start = start + blank.count();
        counted.1 += text[counted.0..start].matches('\n').count();
        counted.0 = start;
        counted.1
    };
    let columns: Vec<String> = {
        let headers = reader.headers();
        let columns = headers.map_err(|error| wrong_line(path, 1, one_line(&error.to_string())))?;
        columns.iter().map(|name| name.trim().to_owned()).collect()
    };
    let column = |wanted: &str| {
        let mut places = (0..columns.len()).filter(|&place| columns[place] == wanted);
        match (places.next(), places.next()) {
            (Some(place), None) => Ok(place),
            (Some(_), Some(_)) => Err(wrong_line(path, 1, format!("has two columns `{wanted}`"))),
            (None, _) => {
                let there = one_line(&columns.join(", "));
                let problem = format!("has no column `{wanted}`, only: {there}");
                Err(wrong_line(path, 1, problem))
            }
        }
    };
    let (file_name, caption) = (column("file_name")?, column("text")?);
    let optional = |wanted: &str| columns.iter().any(|name| name == wanted);
    let reference = optional("reference")
        .then(|| column("reference"))
        .transpose()?;
    let several = optional("references")
        .then(|| column("references"))
        .transpose()?;
    let mut rows = Vec::new();
    for record in reader.records() {
        let record = match record {
            Ok(record) => record,
            Err(error) => {
                let line = line_at(error.position());
                return Err(wrong_line(path, line, record_problem(&error)));
            }
        };
        let line = line_at(record.position());
        let wrong = |problem: String| wrong_line(path, line, problem);
        let cell = |column: Option<usize>| column.map_or("", |column| record[column].trim());
        let mut references: Vec<String> = match cell(several) {
            "" => Vec::new(),
            list => serde_json::from_str(list).map_err(|_| {
                wrong(r#"references is no JSON list, such as ["a.png", "b.png"]"#.into())
            })?,
        };
        if !cell(reference).is_empty() {
            references.insert(0, cell(reference).into());
        }
        let checked = row(&record[file_name], &record[caption], references, line);
        rows.push(checked.map_err(wrong)?);
    }
    Ok(rows)
}

fn record_problem(error: &csv::Error) -> String {
    match error.kind() {
        csv::ErrorKind::UnequalLengths {
            expected_len, len, ..
        } => format!("has {len} columns, not {expected_len}: put a text with commas in quotes"),
        _ => one_line(&error.to_string()),
    }
}

fn row(file_name: &str, text: &str, references: Vec<String>, line: usize) -> Result<Row, String> {
    let quoted = one_line(file_name);
    let Some(name) = inner_path(file_name) else {
        return Err(format!(
            "file_name `{quoted}` leads out of the dataset folder"
        ));
    };
    if text.len() as u64 > MAX_CAPTION_BYTES {
        return Err("text is larger than 64 KiB".into());
    }
    check_characters(text).map_err(|problem| format!("text {problem}"))?;
    let inner = |reference: String| {
        inner_path(&reference).ok_or_else(|| {
            let quoted = one_line(&reference);
            format!("reference `{quoted}` leads out of the dataset folder")
        })
    };
    Ok(Row {
        line,
        name,
        quoted,
        caption: text.trim().to_owned(),
        references: references
            .into_iter()
            .map(inner)
            .collect::<Result<_, _>>()?,
    })
}

/// `text` as a path that stays below its folder, with `/` between its parts; `None` if it does not.
///
/// A list from Windows has `\` there; nobody has that in a name.
fn inner_path(text: &str) -> Option<String> {
    let text = text.replace('\\', "/");
    if text.as_bytes().get(1) == Some(&b':') {
        return None; // a drive
    }
    let mut parts = Vec::new();
    for component in Path::new(&text).components() {
        match component {
            Component::Normal(part) => parts.push(part.to_str()?),
            Component::CurDir => {}
            _ => return None,
        }
    }
    (!parts.is_empty()).then(|| parts.join("/"))
}
