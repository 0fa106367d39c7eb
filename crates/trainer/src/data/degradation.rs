//! What of a dataset does not reach the model as it is: said once, before a run starts.

use flux_model::family::{Family, TokenCount};

use crate::config::DatasetSection;
use crate::data::bucket::{buckets, nearest_bucket};
use crate::data::sample::Sample;
use crate::data::scan::{counted, named};

/// A picture that loses more than this share to cropping is named.
const MAX_CROPPED: f64 = 0.2;

/// Lines about pictures that lose more than a fifth of their area to cropping, and about those that are enlarged; the worst first.
pub fn cropped_and_enlarged(samples: &[Sample], config: &DatasetSection) -> Vec<String> {
    // Of several sizes, the largest asks for most.
    let all_buckets = buckets(config.largest_resolution(), config.bucket_step);
    let (mut cropped, mut enlarged) = (Vec::new(), Vec::new());
    for sample in samples {
        let (width, height) = (sample.width_px, sample.height_px);
        let bucket = nearest_bucket(&all_buckets, width, height);
        let lost = bucket.cropped(width, height);
        if lost > MAX_CROPPED {
            let text = format!("{} loses {:.0} %", sample.name, 100.0 * lost);
            cropped.push((lost, text));
        }
        let scale = bucket.enlargement(width, height);
        if scale > 1.0 {
            let text = format!("{} ({width}x{height}) {scale:.2} times", sample.name);
            enlarged.push((scale, text));
        }
    }
    let line = |what: &str, found: Vec<(f64, String)>| {
        (!found.is_empty())
            .then(|| format!("{what}: {}", worst_first(found, samples.len(), "image")))
    };
    [
        line("cropped by more than a fifth", cropped),
        line("enlarged, being smaller than what is trained at", enlarged),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Lines about captions and prompts that are longer than what the text encoders read.
///
/// # Errors
/// A tokenizer that cannot be loaded.
pub fn cut_texts<F: Family>(
    samples: &[Sample],
    prompts: &[String],
    config: &DatasetSection,
    family: &F,
) -> anyhow::Result<CutTexts> {
    let tokens = family.token_counter()?;
    let captions = samples
        .iter()
        .map(|sample| (sample.name.clone(), &sample.caption));
    let prompts = prompts.iter().enumerate();
    let prompts = prompts.map(|(index, prompt)| (format!("prompt {}", index + 1), prompt));
    let (mut cut, mut pooled, mut count) = (Vec::new(), None, 0);
    for (name, text) in captions.chain(prompts) {
        count += 1;
        let TokenCount {
            sequence,
            beyond_pooled,
        } = tokens(text)?;
        let lost = sequence.saturating_sub(config.max_sequence_length);
        if lost > 0 {
            cut.push((lost as f64, format!("{name} loses {lost} of {sequence}")));
        }
        if let Some(limit) = beyond_pooled {
            pooled = Some((limit, pooled.map_or(0, |(_, texts)| texts) + 1));
        }
    }
    let cut = (!cut.is_empty()).then(|| {
        format!(
            "cut at dataset.max_sequence_length = {} tokens: {}",
            config.max_sequence_length,
            worst_first(cut, count, "text")
        )
    });
    let pooled = pooled.map(|(limit, texts): (usize, usize)| {
        format!(
            "longer than the {limit} tokens of the pooled vector, which is of their beginning (the sequence reads on): {} of {count}",
            counted(texts, "text")
        )
    });
    Ok(CutTexts { cut, pooled })
}

/// Lines about texts that are too long; `None` if there is no such text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CutTexts {
    /// Beyond `dataset.max_sequence_length`: that part of the text has no effect.
    pub cut: Option<String>,
    /// Beyond the tokens of the pooled vector (CLIP's 77), which matters for that vector alone.
    pub pooled: Option<String>,
}

fn worst_first(mut found: Vec<(f64, String)>, of: usize, what: &str) -> String {
    found.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| a.1.cmp(&b.1)));
    let texts: Vec<String> = found.into_iter().map(|(_, text)| text).collect();
    format!("{} of {of} ({})", counted(texts.len(), what), named(&texts))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(name: &str, width_px: u32, height_px: u32) -> Sample {
        Sample {
            name: name.into(),
            image: name.into(),
            image_sha256: String::new(),
            width_px,
            height_px,
            caption: String::new(),
            folder: 0,
            references: Vec::new(),
            mask: None,
        }
    }

    #[test]
    fn the_worst_are_named_first_with_how_much_they_lose() {
        let samples = [
            sample("good.png", 1024, 1024),
            sample("panorama.png", 6144, 512),
            sample("strip.png", 8192, 512),
            sample("tiny.png", 10, 10),
            sample("exact.png", 512, 512),
            sample("small.png", 500, 500),
        ];
        let lines = cropped_and_enlarged(&samples, &DatasetSection::default());
        assert_eq!(
            lines,
            [
                "cropped by more than a fifth: 2 images of 6 (`strip.png loses 75 %`, `panorama.png loses 67 %`)",
                "enlarged, being smaller than what is trained at: 2 images of 6 (`tiny.png (10x10) 51.20 times`, `small.png (500x500) 1.02 times`)",
            ]
        );
        assert!(cropped_and_enlarged(&samples[..1], &DatasetSection::default()).is_empty());
    }
}
