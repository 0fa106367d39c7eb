//! What a caption is trained as: the trigger word in it, and its variants with tags in other orders and some left out.
//!
//! Captions are encoded once, so a sample has a fixed number of variants, drawn before the first step; a step picks one of them.
//!
//! Source of the names: kohya sd-scripts `train_util.py` (`process_caption`: `shuffle_caption`, `keep_tokens`,
//! `caption_tag_dropout_rate`, `caption_separator`); the placeholder: ai-toolkit's `[trigger]`.

use lora_core::random::Stream;

use crate::config::DatasetSection;

/// Where a caption wants the trigger word.
const PLACEHOLDER: &str = "[trigger]";

/// `caption` with the trigger word: in place of each placeholder, or else in front if it is not in it.
pub(crate) fn with_trigger(caption: &str, trigger: Option<&str>) -> String {
    let Some(trigger) = trigger else {
        return caption.into();
    };
    if caption.contains(PLACEHOLDER) {
        return caption.replace(PLACEHOLDER, trigger);
    }
    match caption {
        "" => trigger.into(),
        caption if caption.contains(trigger) => caption.into(),
        caption => format!("{trigger}, {caption}"),
    }
}

/// The texts that a sample is trained with, one of them a time; the caption alone if nothing is to vary.
///
/// `sample` is the sample's place in the dataset. Variants may be equal: a caption of one tag has one order.
pub(crate) fn variants(
    caption: &str,
    config: &DatasetSection,
    seed: u64,
    sample: usize,
) -> Vec<String> {
    if !config.varies_captions() {
        return vec![caption.into()];
    }
    let separator = config.caption_separator.trim();
    let tags: Vec<&str> = caption.split(separator).map(str::trim).collect();
    let (kept, free) = tags.split_at(config.keep_tokens.min(tags.len()));
    let variant = |variant: usize| {
        let stream = |name| Stream::new(seed, name, sample as u64, variant as u64);
        let mut free = free.to_vec();
        if config.shuffle_caption {
            let order = stream("caption_order").permutation(free.len());
            free = order.into_iter().map(|index| free[index]).collect();
        }
        if config.caption_tag_dropout_rate > 0.0 {
            let mut dropped = stream("caption_tag_dropout");
            free.retain(|_| dropped.uniform() >= config.caption_tag_dropout_rate);
        }
        [kept, &free].concat().join(&config.joined_by())
    };
    (0..config.caption_variants).map(variant).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_trigger_word_is_there_once() {
        let with = |caption| with_trigger(caption, Some("ohwx"));
        assert_eq!(with("a cat"), "ohwx, a cat");
        assert_eq!(with("a photo of ohwx"), "a photo of ohwx");
        assert_eq!(
            with("a photo of [trigger], [trigger]"),
            "a photo of ohwx, ohwx"
        );
        assert_eq!(with(""), "ohwx");
        assert_eq!(with_trigger("a [trigger]", None), "a [trigger]");
    }

    fn config() -> DatasetSection {
        DatasetSection {
            shuffle_caption: true,
            keep_tokens: 1,
            caption_variants: 50,
            ..DatasetSection::default()
        }
    }

    #[test]
    fn shuffled_captions_keep_their_first_tags_and_all_others() {
        let texts = variants("a,b , c,d", &config(), 7, 3);
        assert_eq!(texts.len(), 50);
        for text in &texts {
            let mut tags: Vec<&str> = text.split(", ").collect();
            assert_eq!(tags[0], "a", "{text}");
            tags.sort_unstable();
            assert_eq!(tags, ["a", "b", "c", "d"]);
        }
        let distinct: BTreeSet<&String> = texts.iter().collect();
        assert_eq!(distinct.len(), 6, "every order of three");
        assert_eq!(texts, variants("a,b , c,d", &config(), 7, 3));
        assert_ne!(texts, variants("a,b , c,d", &config(), 8, 3));
        assert_ne!(texts, variants("a,b , c,d", &config(), 7, 4));
    }

    #[test]
    fn tags_are_dropped_with_their_probability_and_kept_ones_never() {
        let config = DatasetSection {
            shuffle_caption: false,
            caption_tag_dropout_rate: 0.3,
            caption_variants: 2000,
            ..config()
        };
        let texts = variants("a, b, c", &config, 7, 0);
        let with = |tag: &str| texts.iter().filter(|text| text.contains(tag)).count();
        assert_eq!(with("a"), 2000);
        for tag in ["b", "c"] {
            assert!((1330..1470).contains(&with(tag)), "{tag}: {}", with(tag));
        }
        let plain = DatasetSection::default();
        assert_eq!(variants("a,b , c", &plain, 7, 0), ["a,b , c"]);
    }
}
