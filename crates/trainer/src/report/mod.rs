//! `flux-lora report` and `flux-lora watch`: a run as one page.
//!
//! The page is `page.html`, which holds all of its style and script, and draws what is in a JSON object: written into it by
//! `report`, asked for again and again from `watch` (`watch`). Nothing here writes to a run folder, and a run that is under
//! way may be read.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Cursor, ErrorKind, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use image::ImageReader;
use image::codecs::jpeg::JpegEncoder;
use lora_core::files::strict_json::read_file;
use serde_json::{Value, json};

use crate::cli::UsageError;
use crate::config::RunConfig;
use crate::convert::make_parent;
use crate::run::checkpoint::{State, read_state};
use crate::run::folder::RunDir;
use crate::run::logs::rows;
use crate::run::timings::{read_timings, unix_time};

pub(crate) mod watch;

const PAGE: &str = include_str!("page.html");
/// Where the data goes.
const PLACE: &str = "{{DATA}}";
/// A picture larger than this many bytes goes into a report as JPEG.
const LARGE_PICTURE: usize = 200_000;
const JPEG_QUALITY: u8 = 88;
/// No picture of ours is larger.
const MAX_PICTURE: u64 = 1 << 28;

/// A preview of a run.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Sample {
    pub step: u64,
    pub index: usize,
    pub path: PathBuf,
}

/// The run folder at `path`.
///
/// # Errors
/// A folder that is no run's, or of one that has not come to its first step.
pub(crate) fn open_run(path: &Path) -> anyhow::Result<RunDir> {
    let run = RunDir::open(path)?;
    if !run.config_path().is_file() {
        bail!(
            "{} is not the folder of a run that has started: it has no config.toml; give the folder that `flux-lora train` wrote to",
            path.display()
        );
    }
    Ok(run)
}

/// The page of a run, which needs nothing else.
///
/// # Errors
/// A folder that is no run's, a picture that cannot be read.
fn page(run: &RunDir) -> anyhow::Result<String> {
    let mut data = data(run)?;
    let mut reduced = false;
    let pictures = samples(run)
        .into_iter()
        .zip(sample_texts(run))
        .map(|(sample, prompt)| {
            let bytes = read_file(&sample.path, MAX_PICTURE)
                .with_context(|| format!("read {}", sample.path.display()))?;
            let (kind, bytes) = match bytes.len() {
                0..=LARGE_PICTURE => ("png", bytes),
                _ => (
                    "jpeg",
                    to_jpeg(&bytes).with_context(|| format!("read {}", sample.path.display()))?,
                ),
            };
            reduced |= kind == "jpeg";
            let src = format!("data:image/{kind};base64,{}", STANDARD.encode(bytes));
            Ok(json!({"step": sample.step, "index": sample.index, "prompt": prompt, "src": src}))
        })
        .collect::<anyhow::Result<Vec<Value>>>()?;
    data["samples"] = pictures.into();
    data["reduced"] = reduced.into();
    Ok(with_data(&data))
}

/// What a page of ours has near its beginning.
const GENERATOR: &str = "<meta name=\"generator\" content=\"flux-lora report\">";

/// Writes the page of a run to `out`, in place of another page of this kind at most.
///
/// # Errors
/// See [`page`]; a file at `out` that is something else.
pub(crate) fn write_page(run: &RunDir, out: &Path) -> anyhow::Result<()> {
    if out.exists() {
        let mut beginning = Vec::new();
        let file = fs::File::open(out).with_context(|| format!("open {}", out.display()))?;
        let _ = file.take(2000).read_to_end(&mut beginning);
        if !String::from_utf8_lossy(&beginning).contains(GENERATOR) {
            bail!(UsageError(format!(
                "{} exists and is no report: choose another --out",
                out.display()
            )));
        }
    }
    let page = page(run)?;
    make_parent(out)?;
    fs::write(out, page).with_context(|| format!("write {}", out.display()))
}

/// The page with a JSON object in it, in which nothing can end the element it stands in.
pub(crate) fn with_data(data: &Value) -> String {
    PAGE.replace(PLACE, &data.to_string().replace('<', "\\u003c"))
}

fn to_jpeg(bytes: &[u8]) -> anyhow::Result<Vec<u8>> {
    let image = ImageReader::new(Cursor::new(bytes))
        .with_guessed_format()?
        .decode()?
        .into_rgb8();
    let mut out = Vec::new();
    image.write_with_encoder(JpegEncoder::new_with_quality(&mut out, JPEG_QUALITY))?;
    Ok(out)
}

/// What the page shows, without pictures.
///
/// # Errors
/// A configuration that cannot be read.
pub(crate) fn data(run: &RunDir) -> anyhow::Result<Value> {
    let path = run.config_path();
    // Written after the data is encoded.
    let text = match fs::read_to_string(&path) {
        Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
        text => text.with_context(|| format!("read {}", path.display()))?,
    };
    let config = match text.is_empty() {
        true => None,
        false => Some(RunConfig::from_toml(&text, &path, &[])?),
    };
    let total = config.as_ref().map_or(0, |config| config.train.steps);
    let state = run
        .checkpoints()?
        .iter()
        .find_map(|found| read_state(&found.dir).ok());
    let timings = read_timings(&run.timings_path());
    let series = series(run);
    let steps = series.get("step").into_iter().flatten();
    let step = steps.filter_map(Value::as_u64).max().unwrap_or(0);
    let status = match (run.lora_path().is_file(), run.is_locked()) {
        (_, true) if config.is_none() => "preparing",
        (_, true) => "running",
        (true, false) if step >= total => "finished",
        _ => "stopped",
    };
    let name = fs::canonicalize(run.path()).unwrap_or_else(|_| run.path().into());
    let base = config
        .as_ref()
        .and_then(|config| config.model.path.file_name());
    let base = base.unwrap_or_default();
    let starts = timings.iter().filter(|timing| timing.started_on.is_some());
    Ok(json!({
        "name": name.file_name().unwrap_or_default().to_string_lossy(),
        "base": base.to_string_lossy(),
        "version": env!("CARGO_PKG_VERSION"),
        "made": unix_time(),
        "live": false,
        "status": status,
        "step": step,
        "steps": total,
        "series": series,
        "starts": starts.collect::<Vec<_>>(),
        "events": state.as_ref().map_or(&[][..], |state| &state.events),
        "environment": state.as_ref().map_or(json!({}), environment),
        "config": text,
        "samples": [],
    }))
}

fn environment(state: &State) -> Value {
    let fingerprint = &state.fingerprint;
    json!({
        "program": format!("flux-lora {}", fingerprint.version),
        "binary": format!("sha256 {}", fingerprint.binary),
        "device": fingerprint.device,
        "hardware": fingerprint.hardware,
        "CPU features": fingerprint.cpu_features,
        "kernels": fingerprint.kernels,
        "base model": format!("sha256 {}", state.base_model),
        "training pictures": state.samples.len().to_string(),
        "epoch": state.epoch.to_string(),
    })
}

/// Every number of the metrics log by name, as long as the log, with nothing where a line has none.
fn series(run: &RunDir) -> BTreeMap<String, Vec<Value>> {
    let rows = rows(&run.metrics_path(), &run.timings_path());
    let mut series: BTreeMap<String, Vec<Value>> = BTreeMap::new();
    for (index, (row, _)) in rows.iter().enumerate() {
        for (name, value) in row {
            let values = series.entry(name.clone()).or_default();
            values.resize(index, Value::Null);
            values.push(json!(value));
        }
    }
    if let Some(steps) = series.get_mut("step") {
        for step in steps {
            *step = json!(step.as_f64().unwrap_or_default() as u64);
        }
    }
    series
}

/// The previews in a run folder, by step and prompt.
pub(crate) fn samples(run: &RunDir) -> Vec<Sample> {
    let entries = fs::read_dir(run.samples_path())
        .into_iter()
        .flatten()
        .flatten();
    let mut samples: Vec<Sample> = entries
        .filter_map(|entry| {
            let name = entry.file_name();
            let (step, index) = parse_sample(name.to_str()?)?;
            let path = entry.path();
            Some(Sample { step, index, path })
        })
        .collect();
    samples.sort();
    samples
}

/// `step-0000040-1.png` is the second prompt after step 40.
fn parse_sample(name: &str) -> Option<(u64, usize)> {
    let (step, index) = name
        .strip_prefix("step-")?
        .strip_suffix(".png")?
        .split_once('-')?;
    Some((step.parse().ok()?, index.parse().ok()?))
}

/// The prompt of each of [`samples`], by the present configuration.
fn sample_texts(run: &RunDir) -> Vec<String> {
    let config = fs::read_to_string(run.config_path()).unwrap_or_default();
    let config = RunConfig::from_toml(&config, &run.config_path(), &[]).ok();
    let prompts = config
        .and_then(|config| config.sample)
        .map(|section| section.prompts);
    let prompts = prompts.unwrap_or_default();
    let text = |sample: Sample| prompts.get(sample.index).cloned().unwrap_or_default();
    samples(run).into_iter().map(text).collect()
}

/// The previews with where `watch` serves them.
pub(crate) fn served_samples(run: &RunDir) -> Vec<Value> {
    let with_source = |(sample, prompt): (Sample, String)| {
        let name = sample.path.file_name()?.to_str()?.to_string();
        Some(json!({
            "step": sample.step, "index": sample.index, "prompt": prompt, "src": format!("samples/{name}")
        }))
    };
    let samples = samples(run).into_iter().zip(sample_texts(run));
    samples.filter_map(with_source).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use super::*;

    #[test]
    fn nothing_in_the_data_ends_its_element() {
        assert!(PAGE.contains(GENERATOR));
        let page = with_data(&json!({"name": "</script><script>alert(1)</script>"}));
        assert_eq!(page.matches("alert(1)").count(), 1);
        assert!(!page.contains("<script>alert"), "{page}");
        assert!(
            !PAGE.contains("http://")
                || PAGE.matches("http://").count() == PAGE.matches("http://www.w3.org").count()
        );
        assert!(
            !PAGE.contains("https://"),
            "the page asks nobody for anything"
        );
    }

    #[test]
    fn previews_are_known_by_their_names() {
        assert_eq!(parse_sample("step-0000040-1.png"), Some((40, 1)));
        for name in [
            "step-0000040.png",
            "x-1-1.png",
            "step-a-1.png",
            "step-1-1.jpg",
        ] {
            assert_eq!(parse_sample(name), None, "{name}");
        }
    }

    #[test]
    fn a_series_has_a_place_for_every_line_of_the_log() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::open(folder.path()).unwrap();
        let log = "{\"step\":1,\"loss\":0.5,\"lr\":1}\n{\"step\":1,\"validation\":{\"loss\":0.25}}\n{\"step\":2,\"loss\":0.25,\"lr\":1}\n";
        fs::write(run.metrics_path(), log).unwrap();
        let series = series(&run);
        assert_eq!(series["step"], [json!(1), json!(1), json!(2)]);
        assert_eq!(series["loss"], [json!(0.5), Value::Null, json!(0.25)]);
        assert_eq!(series["validation/loss"], [Value::Null, json!(0.25)]);
    }
}
