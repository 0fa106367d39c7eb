//! What other programs show of a run: `metrics.csv`, and TensorBoard's event files in `tensorboard/`.
//!
//! Both are made from `metrics.jsonl` and `timings.jsonl`, which alone count: written anew when a run starts, goes on or
//! ends, appended to in between. What goes wrong here is told, and stops no run.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde_json::{Map, Value};
use tracing::warn;

use crate::config::LoggingSection;
use crate::run::folder::RunDir;
use crate::run::tfevents;
use crate::run::timings::{Timing, read_timings, unix_time};

/// What the name of our event files ends with; others' stay.
const EVENTS_SUFFIX: &str = ".flux-lora";
/// A line of the metrics log with its times: flat names and numbers, `step` first.
pub(crate) type Row = Vec<(String, f64)>;

/// The logs that a run keeps for other programs.
pub(crate) struct Logs {
    section: LoggingSection,
    metrics: PathBuf,
    timings: PathBuf,
    csv: PathBuf,
    columns: Vec<String>,
    /// Whether it holds all lines so far.
    csv_is_whole: bool,
    events: Option<File>,
    events_folder: PathBuf,
}

impl Logs {
    /// Writes what `metrics.jsonl` holds, and is ready for more.
    pub(crate) fn open(section: &LoggingSection, run: &RunDir) -> Self {
        let mut logs = Self {
            section: section.clone(),
            metrics: run.metrics_path(),
            timings: run.timings_path(),
            csv: run.csv_path(),
            columns: Vec::new(),
            csv_is_whole: false,
            events: None,
            events_folder: run.tensorboard_path(),
        };
        logs.write_all();
        logs
    }

    /// Adds a line that was just added to the metrics log.
    pub(crate) fn append(&mut self, line: &Value, timing: Option<&Timing>) {
        let row = row(line, timing);
        if self.csv_is_whole
            && let Err(error) = self.append_csv(&row)
        {
            tell("metrics.csv", &error.into());
            self.csv_is_whole = false;
        }
        let time = timing.map_or_else(unix_time, |timing| timing.time);
        if let Some(file) = &mut self.events
            && let Err(error) = write_events(file, &row, time)
        {
            tell("tensorboard", &error.into());
            self.events = None;
        }
    }

    /// Writes everything anew, at the end of a run.
    pub(crate) fn finish(&mut self) {
        self.write_all();
    }

    fn append_csv(&mut self, row: &Row) -> io::Result<()> {
        if row.iter().any(|(name, _)| !self.columns.contains(name)) {
            // The line is in the log already.
            self.columns = write_csv(&self.csv, &rows(&self.metrics, &self.timings))?;
            return Ok(());
        }
        let mut file = OpenOptions::new().append(true).open(&self.csv)?;
        write_row(&mut file, &self.columns, row)
    }

    fn write_all(&mut self) {
        let rows = rows(&self.metrics, &self.timings);
        if self.section.csv {
            match write_csv(&self.csv, &rows) {
                Ok(columns) => (self.columns, self.csv_is_whole) = (columns, true),
                Err(error) => tell("metrics.csv", &error.into()),
            }
        }
        if self.section.tensorboard {
            match new_events(&self.events_folder, &rows) {
                Ok(file) => self.events = Some(file),
                Err(error) => tell("tensorboard", &error),
            }
        }
    }
}

fn tell(what: &str, error: &anyhow::Error) {
    warn!("{what} is not complete: {error:#}; metrics.jsonl is");
}

/// The lines of a metrics log with the times of their steps, and when each was written.
pub(crate) fn rows(metrics: &Path, timings: &Path) -> Vec<(Row, f64)> {
    let timings = read_timings(timings).into_iter();
    let timings: BTreeMap<u64, Timing> = timings
        .filter(|timing| timing.seconds.is_some())
        .map(|timing| (timing.step, timing))
        .collect();
    let text = fs::read_to_string(metrics).unwrap_or_default();
    let lines = text
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok());
    let mut time = unix_time();
    let with_times = lines.map(|line: Value| {
        let step = line["step"].as_u64().unwrap_or_default();
        let timing = timings.get(&step);
        time = timing.map_or(time, |timing| timing.time);
        (row(&line, timing), time)
    });
    with_times.collect()
}

fn row(line: &Value, timing: Option<&Timing>) -> Row {
    let mut row = Row::new();
    if let Value::Object(fields) = line {
        flatten(&mut row, "", fields);
    }
    // The step's own line alone: others of the same step are not what it took.
    if let Some(timing) = timing
        && line.get("lr").is_some()
    {
        row.extend(timing.seconds.map(|value| ("seconds".into(), value)));
        row.extend(timing.memory_mb.map(|value| ("memory_mb".into(), value)));
    }
    row
}

/// Numbers with the path to them; what is no number is for people who read the log itself.
fn flatten(row: &mut Row, prefix: &str, fields: &Map<String, Value>) {
    for (name, value) in fields {
        let name = format!("{prefix}{name}");
        match value {
            Value::Object(fields) => flatten(row, &format!("{name}/"), fields),
            Value::Bool(value) => row.push((name, f64::from(u8::from(*value)))),
            Value::Array(values) => {
                let numbered = values.iter().enumerate();
                let fields = numbered.map(|(index, value)| (index.to_string(), value.clone()));
                flatten(row, &format!("{name}/"), &fields.collect());
            }
            value => row.extend(value.as_f64().map(|value| (name, value))),
        }
    }
}

/// Writes `metrics.csv`: a row a line of the metrics log, a column a name, empty where a line has no such value. The columns
/// come back.
fn write_csv(path: &Path, rows: &[(Row, f64)]) -> io::Result<Vec<String>> {
    let mut columns: Vec<String> = Vec::new();
    for (name, _) in rows.iter().flat_map(|(row, _)| row) {
        if !columns.contains(name) {
            columns.push(name.clone());
        }
    }
    let mut out = BufWriter::new(File::create(path)?);
    write_record(&mut out, columns.iter().map(String::as_str))?;
    for (row, _) in rows {
        write_row(&mut out, &columns, row)?;
    }
    out.flush()?;
    Ok(columns)
}

fn write_row(out: &mut impl Write, columns: &[String], row: &Row) -> io::Result<()> {
    let cell = |column: &String| {
        let cell = row.iter().find(|(name, _)| name == column);
        cell.map_or_else(String::new, |(_, value)| value.to_string())
    };
    let cells: Vec<String> = columns.iter().map(cell).collect();
    write_record(out, cells.iter().map(String::as_str))
}

fn write_record<'a>(out: &mut impl Write, cells: impl Iterator<Item = &'a str>) -> io::Result<()> {
    let mut record = csv::WriterBuilder::new().from_writer(Vec::new());
    record.write_record(cells).map_err(io::Error::other)?;
    out.write_all(&record.into_inner().map_err(|error| error.into_error())?)
}

/// A new event file with all rows, in place of those that were there.
fn new_events(folder: &Path, rows: &[(Row, f64)]) -> anyhow::Result<File> {
    fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    let now = unix_time();
    let name = format!(
        "events.out.tfevents.{:010}.{}{EVENTS_SUFFIX}",
        now as u64,
        std::process::id()
    );
    let path = folder.join(&name);
    for entry in fs::read_dir(folder)?.flatten() {
        if entry.file_name().to_string_lossy().ends_with(EVENTS_SUFFIX) {
            fs::remove_file(entry.path())?;
        }
    }
    let mut bytes = Vec::new();
    tfevents::begin(&mut bytes, rows.first().map_or(now, |(_, time)| *time))?;
    for (row, time) in rows {
        write_events(&mut bytes, row, *time)?;
    }
    let mut file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)
        .with_context(|| format!("create {}", path.display()))?;
    file.write_all(&bytes)
        .with_context(|| format!("write {}", path.display()))?;
    Ok(file)
}

fn write_events(out: &mut dyn Write, row: &Row, time: f64) -> io::Result<()> {
    let step = row.iter().find(|(name, _)| name == "step");
    let values: Vec<(&str, f64)> = row
        .iter()
        .filter(|(name, _)| name != "step")
        .map(|(name, value)| (name.as_str(), *value))
        .collect();
    tfevents::scalars(out, time, step.map_or(0, |(_, step)| *step as u64), &values)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn log(folder: &Path, lines: &[Value]) {
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        fs::write(folder.join("metrics.jsonl"), text).expect("writable");
    }

    fn step(step: u64, loss: f64) -> Value {
        json!({"step": step, "epoch": 0, "loss": loss, "grad_norm": 1.5, "lr": 1e-4})
    }

    fn timing(step: u64) -> Timing {
        Timing {
            step,
            time: 1e9 + step as f64,
            seconds: Some(0.5),
            waited: Some(0.0),
            memory_mb: Some(100.0),
            started_on: None,
        }
    }

    #[test]
    fn what_is_appended_is_what_is_written_anew() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let run = RunDir::open(folder.path()).expect("a folder");
        log(folder.path(), &[step(1, 0.5)]);
        let mut logs = Logs::open(&LoggingSection::default(), &run);
        let validation = json!({"step": 2, "validation": {"loss": 0.125, "bands": [0.1, 0.2]}});
        let lines = [step(1, 0.5), step(2, 0.25), validation, step(3, 0.125)];
        for count in 2..=4 {
            log(folder.path(), &lines[..count]);
            let line = &lines[count - 1];
            let timing = line
                .get("lr")
                .map(|_| timing(line["step"].as_u64().unwrap_or(0)));
            if let Some(timing) = &timing {
                let text = serde_json::to_string(timing).expect("a plain struct");
                let mut log = OpenOptions::new()
                    .create(true)
                    .append(true)
                    .open(run.timings_path())
                    .expect("writable");
                writeln!(log, "{text}").expect("writable");
            }
            logs.append(line, timing.as_ref());
        }
        let csv = || fs::read_to_string(run.csv_path()).expect("a table");
        let appended = csv();
        assert_eq!(
            appended,
            "step,epoch,loss,grad_norm,lr,seconds,memory_mb,validation/loss,validation/bands/0,validation/bands/1\n\
             1,0,0.5,1.5,0.0001,,,,,\n\
             2,0,0.25,1.5,0.0001,0.5,100,,,\n\
             2,,,,,,,0.125,0.1,0.2\n\
             3,0,0.125,1.5,0.0001,0.5,100,,,\n"
        );
        logs.finish();
        assert_eq!(csv(), appended);
        // A resume from step 2 takes the later line out of both.
        log(folder.path(), &lines[..3]);
        Logs::open(&LoggingSection::default(), &run);
        assert_eq!(csv().lines().count(), 4);
        let events = |folder: &Path| {
            let files: Vec<_> = fs::read_dir(folder.join("tensorboard"))
                .expect("a folder")
                .flatten()
                .collect();
            assert_eq!(files.len(), 1, "{files:?}");
            fs::read(files[0].path()).expect("a file")
        };
        let text = String::from_utf8_lossy(&events(folder.path())).into_owned();
        assert_eq!(text.matches("grad_norm").count(), 2);
    }

    #[test]
    fn what_is_switched_off_is_not_written() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let run = RunDir::open(folder.path()).expect("a folder");
        let off = LoggingSection {
            tensorboard: false,
            csv: false,
        };
        let mut logs = Logs::open(&off, &run);
        logs.append(&step(1, 0.5), None);
        logs.finish();
        assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 0);
    }
}
