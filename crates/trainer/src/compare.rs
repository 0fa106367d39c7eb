//! `flux-lora compare`: in what two runs differ: settings, data, surroundings, curves, result.

use std::collections::BTreeMap;
use std::fs;

use anyhow::Context;
use lora_core::files::digest::digest_file;

use crate::config::RunConfig;
use crate::data::digest::changes;
use crate::run::checkpoint::{State, read_state};
use crate::run::folder::RunDir;
use crate::run::logs::rows;

/// Differences of the data that are listed; more are counted.
const LISTED: usize = 20;
/// Weight of the past in the mean that curves are compared by.
const SMOOTHING: f64 = 0.9;

/// Differences by what they are of, each in a line.
///
/// # Errors
/// A folder without a configuration that can be read.
pub(crate) fn compare(a: &RunDir, b: &RunDir) -> anyhow::Result<Vec<(&'static str, Vec<String>)>> {
    let (config_a, config_b) = (config(a)?, config(b)?);
    let settings = config_a.diff(&config_b)?;
    let settings = settings
        .iter()
        .map(|change| format!("{}: {} | {}", change.key, change.old, change.new));
    let mut found = vec![("settings", settings.collect())];
    if let (Some(a), Some(b)) = (state(a)?, state(b)?) {
        let mut data = changes(&a.samples, &b.samples);
        if data.len() > LISTED {
            let more = data.len() - LISTED;
            data.truncate(LISTED);
            data.push(format!("and {more} more"));
        }
        if a.base_model != b.base_model {
            data.push("the base model is another".into());
        }
        found.push(("data", data));
        let differences = a.fingerprint.differences(&b.fingerprint);
        let lines = differences
            .iter()
            .map(|(name, a, b)| format!("{name}: {a} | {b}"));
        found.push(("made with", lines.collect()));
    }
    found.push(("curves", curves(a, b)));
    let (lora_a, lora_b) = (a.lora_path(), b.lora_path());
    if lora_a.is_file() && lora_b.is_file() {
        let digest = |path| digest_file(path).with_context(|| format!("read {path:?}"));
        let same = digest(&lora_a)? == digest(&lora_b)?;
        let line = (!same).then(|| "the finished LoRAs are not the same bytes".to_string());
        found.push(("result", line.into_iter().collect()));
    }
    Ok(found)
}

fn config(run: &RunDir) -> anyhow::Result<RunConfig> {
    let path = run.config_path();
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    Ok(RunConfig::from_toml(&text, &path, &[])?)
}

fn state(run: &RunDir) -> anyhow::Result<Option<State>> {
    let newest = run.checkpoints()?.into_iter().next();
    newest.map(|found| read_state(&found.dir)).transpose()
}

/// One curve of a run, by step.
fn curve(run: &RunDir, name: &str) -> BTreeMap<u64, f64> {
    let rows = rows(&run.metrics_path(), &run.timings_path());
    let value = |row: &[(String, f64)], name: &str| {
        row.iter()
            .find(|(own, _)| own == name)
            .map(|(_, value)| *value)
    };
    let points = rows
        .iter()
        .filter_map(|(row, _)| Some((value(row, "step")? as u64, value(row, name)?)));
    points.collect()
}

fn curves(a: &RunDir, b: &RunDir) -> Vec<String> {
    let mut lines = Vec::new();
    let last = |curve: &BTreeMap<u64, f64>| curve.last_key_value().map_or(0, |(step, _)| *step);
    let (loss_a, loss_b) = (curve(a, "loss"), curve(b, "loss"));
    if last(&loss_a) != last(&loss_b) {
        lines.push(format!("steps: {} | {}", last(&loss_a), last(&loss_b)));
    }
    let common = last(&loss_a).min(last(&loss_b));
    let first = loss_a
        .iter()
        .find(|(step, loss)| loss_b.get(step).is_some_and(|other| other != *loss));
    if let Some((step, _)) = first {
        lines.push(format!(
            "the losses are the same up to step {}, and differ from {step} on",
            step - 1
        ));
        let (a, b) = (smoothed(&loss_a, common), smoothed(&loss_b, common));
        lines.push(format!(
            "smoothed loss at step {common}: {a:.4} | {b:.4} ({:+.1} %)",
            100.0 * (b / a - 1.0)
        ));
    }
    let middle = |run| {
        let mut seconds: Vec<f64> = curve(run, "seconds").into_values().collect();
        seconds.sort_by(f64::total_cmp);
        seconds.get(seconds.len() / 2).copied()
    };
    let most = |run| {
        curve(run, "memory_mb")
            .into_values()
            .fold(None, |most: Option<f64>, mb| {
                Some(most.map_or(mb, |most| most.max(mb)))
            })
    };
    if let (Some(a), Some(b)) = (middle(a), middle(b)) {
        lines.push(format!("seconds a step, median: {a:.3} | {b:.3}"));
    }
    if let (Some(a), Some(b)) = (most(a), most(b)) {
        lines.push(format!("memory, most: {a:.0} MB | {b:.0} MB"));
    }
    lines
}

fn smoothed(curve: &BTreeMap<u64, f64>, until: u64) -> f64 {
    let (mut mean, mut weight) = (0.0, 0.0);
    for loss in curve.range(..=until).map(|(_, loss)| loss) {
        mean = SMOOTHING * mean + (1.0 - SMOOTHING) * loss;
        weight = SMOOTHING * weight + (1.0 - SMOOTHING);
    }
    mean / weight
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use super::*;

    #[test]
    fn settings_and_curves_that_differ_are_named_and_equal_ones_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let run = |name: &str, rank: u32, losses: &[f64]| {
            let path = folder.path().join(name);
            fs::create_dir(&path).unwrap();
            let run = RunDir::open(&path).unwrap();
            let text =
                format!("[model]\npath = \"/m\"\n[dataset]\npath = \"/d\"\n[lora]\nr = {rank}\n");
            fs::write(run.config_path(), text).unwrap();
            let lines = losses
                .iter()
                .zip(1..)
                .map(|(loss, step)| format!("{{\"step\":{step},\"loss\":{loss}}}\n"));
            fs::write(run.metrics_path(), lines.collect::<String>()).unwrap();
            run
        };
        let (a, b) = (
            run("a", 4, &[1.0, 0.5, 0.25]),
            run("b", 8, &[1.0, 0.5, 0.5, 0.5]),
        );
        let found: BTreeMap<_, _> = compare(&a, &b).unwrap().into_iter().collect();
        assert_eq!(found["settings"], ["lora.r: 4 | 8"]);
        assert_eq!(found["curves"][0], "steps: 3 | 4");
        assert_eq!(
            found["curves"][1],
            "the losses are the same up to step 2, and differ from 3 on"
        );
        assert!(
            found["curves"][2].starts_with("smoothed loss at step 3: 0.5"),
            "{:?}",
            found["curves"]
        );
        let same = compare(&a, &a).unwrap();
        assert!(same.iter().all(|(_, lines)| lines.is_empty()), "{same:?}");
    }
}
