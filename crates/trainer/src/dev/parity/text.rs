//! Cases of FLUX.1's text encoders and tokenizers.

use anyhow::{Context, bail};
use burn::tensor::Device;
use flux_model::pipeline::{load_clip, load_t5};
use flux_model::text::clip::ClipOutput;
use flux_model::text::tokenizer::{ClipTokenizer, T5Tokenizer};
use lora_core::files::host::HostTensor;
use lora_core::state::host_tensor;
use serde_json::Value;

use super::case::{Case, Tensors};
use super::report::Report;

/// `clip_text`.
pub(super) fn clip(case: &Case, device: &Device) -> anyhow::Result<Report> {
    let clip = load_clip(&case.path("/model/path")?, device)?;
    let output = clip.forward(&id_rows(case)?, device);
    let [last_hidden_state, pooled] = clip_tensors(output);
    let out = [("last_hidden_state", last_hidden_state), ("pooled", pooled)];
    Report::by_tensor(case, out.map(|(name, t)| (name.to_string(), t)).into())
}

/// The last hidden state and the pooled vector.
pub(super) fn clip_tensors(output: ClipOutput) -> [HostTensor; 2] {
    [
        host_tensor(output.last_hidden_state),
        host_tensor(output.pooled),
    ]
}

/// `t5_encoder`.
pub(super) fn t5(case: &Case, device: &Device) -> anyhow::Result<Report> {
    let t5 = load_t5(&case.path("/model/path")?, device)?;
    let output = host_tensor(t5.forward(&id_rows(case)?, device)?);
    Report::by_tensor(case, Tensors::from([("last_hidden_state".into(), output)]))
}

/// The rows of `input_ids`.
pub(super) fn id_rows(case: &Case) -> anyhow::Result<Vec<Vec<i64>>> {
    rows_of(case, "input_ids")
}

/// The rows of an input of integers, `[batch, tokens]`.
pub(super) fn rows_of(case: &Case, name: &str) -> anyhow::Result<Vec<Vec<i64>>> {
    let ids = case.input(name)?;
    let &[_, tokens @ 1..=usize::MAX] = ids.shape.as_slice() else {
        bail!("`{name}` is not [batch, tokens]")
    };
    Ok(ids
        .to_i64()
        .with_context(|| format!("`{name}` does not hold integers"))?
        .chunks(tokens)
        .map(<[i64]>::to_vec)
        .collect())
}

/// `tokenizer`: the ids of every prompt.
pub(super) fn tokenizers(case: &Case) -> anyhow::Result<Report> {
    let prompts = case.strings("/prompts")?;
    let mut out = Tensors::new();
    let mut put = |name: &str, rows: Vec<Vec<i64>>| {
        let shape = [rows.len(), rows.first().map_or(0, Vec::len)];
        out.insert(name.into(), HostTensor::from_i64(shape, &rows.concat()));
    };
    let clip = ClipTokenizer::load(&case.path("/tokenizers/clip")?)?;
    let length = case.usize("/clip/max_length")?;
    let ids: Vec<Vec<i64>> = prompts
        .iter()
        .map(|prompt| clip.encode(prompt, length))
        .collect::<Result<_, _>>()?;
    if case.optional("/tokenizers/clip_tokenizer_json").is_some() {
        let fast = ClipTokenizer::load(&case.path("/tokenizers/clip_tokenizer_json")?)?;
        for (prompt, ids) in prompts.iter().zip(&ids) {
            if fast.encode(prompt, length)? != *ids {
                bail!("tokenizer.json and vocab.json give different ids for `{prompt}`");
            }
        }
    }
    put("clip_ids", ids.clone());
    put("clip_ids_fast", ids);
    let t5 = T5Tokenizer::load(&case.path("/tokenizers/t5")?)?;
    for name in case.expected.names() {
        if let Some(length) = name.strip_prefix("t5_ids_") {
            let length = length
                .parse()
                .with_context(|| format!("`{name}` ends in no length"))?;
            let ids = prompts.iter().map(|prompt| t5.encode(prompt, length));
            put(name, ids.collect::<Result<_, _>>()?);
        }
    }
    let mut report = Report::by_tensor(case, out)?;
    for (name, other) in [("clip_ids", "clip_ids_fast"), ("clip_ids_fast", "clip_ids")] {
        let matches = same_as_either(case, &report, name, other)?;
        if let Some(line) = report.line(name) {
            line.error = if matches { 0.0 } else { f64::INFINITY };
        }
    }
    Ok(report)
}

/// Whether every row is that of `name`, or, where transformers' two tokenizers differ, that of `other`.
fn same_as_either(case: &Case, report: &Report, name: &str, other: &str) -> anyhow::Result<bool> {
    let differ: Vec<u64> = match case.optional("/clip_slow_and_fast_differ_on") {
        None => Vec::new(),
        Some(rows) => {
            let rows = rows.as_array().map(|rows| rows.iter().map(Value::as_u64));
            rows.and_then(|rows| rows.collect::<Option<_>>())
                .context("`/clip_slow_and_fast_differ_on` of case.json is not a list of rows")?
        }
    };
    let row = |name: &str, i: usize| -> anyhow::Result<Option<Vec<i64>>> {
        match case.expected.info(name) {
            Some(info) if i < info.shape[0] => {
                Ok(case.expected.read_rows(name, i..i + 1)?.to_i64())
            }
            _ => Ok(None),
        }
    };
    let ids = report.actual(name)?;
    for i in 0..ids.shape[0] {
        let own = ids.rows(i..i + 1).to_i64();
        let also = differ.contains(&(i as u64));
        if own != row(name, i)? && !(also && own == row(other, i)?) {
            return Ok(false);
        }
    }
    Ok(true)
}
