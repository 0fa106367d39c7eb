//! Layers to adapt by the names that people know, and by ranges of blocks.

use flux_model::family::Family;
use lora_core::peft::Targets;

/// Names for sets of layers, beside PEFT's "all-linear" and those of the family: they mean these paths.
const PRESETS: [(&str, &str); 2] = [
    ("attention", r".*\.attn\.(?:to|add)_.*"),
    // Of every block all layers, modulation included: kohya's `TARGET_REPLACE_MODULE` for FLUX.
    ("kohya-default", r"(?:single_)?transformer_blocks\..*"),
];
/// The family's own set.
const DIFFUSERS_DEFAULT: &str = "diffusers-default";

/// What `target_modules` means for this family, as paths, in the blocks that are asked for.
pub(super) fn named<F: Family>(
    targets: Option<Targets>,
    double: Option<&str>,
    single: Option<&str>,
) -> Targets {
    let of_family = || Targets::List(F::TARGETS.iter().copied().map(String::from).collect());
    let targets = match targets {
        None => of_family(),
        Some(Targets::Pattern(name)) if name == DIFFUSERS_DEFAULT => of_family(),
        Some(Targets::Pattern(name)) => {
            let preset = PRESETS.iter().find(|(preset, _)| *preset == name);
            Targets::Pattern(preset.map_or(name, |(_, paths)| String::from(*paths)))
        }
        Some(list) => list,
    };
    match (double, single) {
        (None, None) => targets,
        _ => within_blocks(targets, double, single),
    }
}

/// The layers of `targets` that are in these blocks.
fn within_blocks(targets: Targets, double: Option<&str>, single: Option<&str>) -> Targets {
    let blocks = [
        ("transformer_blocks", double),
        ("single_transformer_blocks", single),
    ];
    let blocks: Vec<String> = blocks
        .into_iter()
        .filter_map(|(container, indices)| {
            let indices = match indices.map(block_indices) {
                None | Some(Ok(Indices::All)) | Some(Err(_)) => r"\d+".into(),
                Some(Ok(Indices::These(indices))) if indices.is_empty() => return None,
                Some(Ok(Indices::These(indices))) => {
                    let indices: Vec<String> = indices.iter().map(usize::to_string).collect();
                    format!("(?:{})", indices.join("|"))
                }
            };
            Some(format!(r"{container}\.{indices}"))
        })
        .collect();
    let wanted = match targets {
        Targets::Pattern(all) if all == "all-linear" => ".*".into(),
        Targets::Pattern(pattern) => pattern,
        Targets::List(endings) => {
            let endings: Vec<String> = endings.iter().map(|e| e.replace('.', r"\.")).collect();
            format!(r"(?:.*\.)?(?:{})", endings.join("|"))
        }
    };
    Targets::Pattern(format!(r"(?=(?:{wanted})$)(?:{})\..*", blocks.join("|")))
}

/// Which blocks.
#[derive(Debug, PartialEq)]
pub(super) enum Indices {
    All,
    These(Vec<usize>),
}

/// Reads "all", "none", or numbers and ranges as in "0-3,7".
pub(super) fn block_indices(text: &str) -> Result<Indices, String> {
    let wrong = || {
        format!(
            "must be \"all\", \"none\", or numbers and ranges as in \"0-3,7\", found \"{text}\""
        )
    };
    let number = |text: &str| match text.trim().parse() {
        Ok(number @ 0..=999) => Ok(number),
        _ => Err(wrong()),
    };
    let mut indices = Vec::new();
    match text.trim() {
        "all" => return Ok(Indices::All),
        "none" => return Ok(Indices::These(indices)),
        _ => {}
    }
    for part in text.split(',') {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        let (from, to) = (number(from)?, number(to)?);
        if from > to {
            return Err(wrong());
        }
        indices.extend(from..=to);
    }
    Ok(Indices::These(indices))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use flux_model::family::Family;
    use flux_model::flux1::Flux1;
    use flux_model::pipeline::PipelineFolder;
    use lora_core::attach::targeted;

    use super::*;
    use crate::config::LoraSection;
    use crate::device;

    /// The layers of a model of 2 double and 3 single blocks that are adapted.
    fn layers(
        targets: Option<Targets>,
        double: Option<&str>,
        single: Option<&str>,
    ) -> BTreeSet<String> {
        let mut section = LoraSection {
            target_modules: targets,
            train_double_block_indices: double.map(String::from),
            train_single_block_indices: single.map(String::from),
            ..LoraSection::default()
        };
        section.name_targets::<Flux1>();
        let once = section.clone();
        section.name_targets::<Flux1>(); // what is named stays as it is
        assert_eq!(section, once);
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/parity");
        let folder = PipelineFolder::open(&fixtures.join("pipeline_dev/model")).expect("there");
        let device = device::open(device::default_name()).expect("the default device");
        let family = Flux1::open(folder).expect("a pipeline");
        let outline = family.outline(&device.device).expect("an outline");
        let layers = targeted(&outline, &section.config()).expect("layers");
        layers.into_keys().collect()
    }

    #[test]
    fn presets_mean_paths() {
        let preset = |name: &str| layers(Some(name.into()), None, None);
        assert_eq!(preset("diffusers-default"), layers(None, None, None));
        // Of 2 double blocks 8 layers, of 3 single ones 3.
        assert_eq!(preset("attention").len(), 2 * 8 + 3 * 3);
        let kohya = preset("kohya-default");
        // Of a double block also 4 of its networks and 2 of modulation; of a single one also 2 and 1.
        assert_eq!(kohya.len(), 2 * 14 + 3 * 6);
        assert!(kohya.contains("single_transformer_blocks.0.norm.linear"));
        assert!(preset("all-linear").len() > kohya.len());
        assert_eq!(preset(".*to_q").len(), 5);
    }

    #[test]
    fn blocks_narrow_what_is_adapted() {
        let named = |layers: &BTreeSet<String>| {
            let block = |layer: &String| layer.split('.').take(2).collect::<Vec<_>>().join(".");
            layers.iter().map(block).collect::<BTreeSet<_>>()
        };
        let set = |blocks: &[&str]| blocks.iter().map(|block| block.to_string()).collect();
        let some = layers(None, Some("1"), Some("none"));
        assert_eq!(named(&some), set(&["transformer_blocks.1"]));
        assert_eq!(some.len(), 12);
        let single = layers(Some("all-linear".into()), Some("none"), Some("0,2"));
        let expected = ["single_transformer_blocks.0", "single_transformer_blocks.2"];
        assert_eq!(named(&single), set(&expected));
        let attention = layers(Some("attention".into()), None, Some("1"));
        assert_eq!(attention.len(), 2 * 8 + 3);
        for wrong in ["", "1-", "3-1", "a", "0,,2"] {
            block_indices(wrong).expect_err("no indices");
        }
    }
}
