//! Which program loads what of a LoRA file: the rules of each, key by key.
//!
//! | reader | version | how it was looked at |
//! |---|---|---|
//! | diffusers | 0.38 | FLUX.2 run, FLUX.1 read and run |
//! | ComfyUI | a125cd84 | read |
//! | PEFT | 0.19 | run, for the folder of an adapter |
//! | sd-scripts | 48d368fa | read; it knows FLUX.1 only |
//!
//! None of them says a word on the keys it passes over, or more than a line in its log.

use lora_core::kinds::parts::Kind;

use super::key::{Param, ParsedKey, flattened, parse};
use super::{Component, by_reason};

/// What one program does with the keys of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reading {
    /// The program.
    pub reader: &'static str,
    /// Keys that it loads as they are meant.
    pub loads: usize,
    /// Keys that it passes over, with the reason.
    pub drops: Vec<(String, String)>,
    /// Keys that it loads as something else, with the difference.
    pub differs: Vec<(String, String)>,
}

impl Reading {
    /// What was dropped and what is taken for something else, one line a reason.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = by_reason("drops", &self.drops);
        lines.extend(by_reason("loads otherwise", &self.differs));
        lines
    }
}

/// A file as the programs see it.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Kept<'a> {
    pub keys: &'a [String],
    /// The network is of FLUX.2.
    pub flux2: bool,
    /// The file is beside an `adapter_config.json`.
    pub folder: bool,
    /// A scale other than 1 is in that configuration, or in the header, and in no tensor.
    pub scale_beside: bool,
}

enum Verdict {
    Loads,
    Drops(&'static str),
    Differs(&'static str),
}

use Verdict::{Differs, Drops, Loads};

/// What each program that knows the network does with the file.
pub(super) fn readings(file: Kept<'_>) -> Vec<Reading> {
    let keys = file.keys.iter();
    let keys: Vec<_> = keys.map(|key| (key.as_str(), parse(key))).collect();
    let any_down = keys
        .iter()
        .any(|(key, _)| key.contains(".lora_down.weight"));
    let facts = Facts {
        file,
        any_down,
        stops: match file.flux2 && !any_down {
            true => stops_at(file.keys),
            false => None,
        },
        control: keys.iter().any(|(key, _)| *key == "img_in.lora_A.weight"),
        whole_xlabs: ["single_blocks.37.", "double_blocks.18."]
            .iter()
            .all(|block| {
                let mut keys = keys.iter();
                keys.any(|(key, _)| key.starts_with(block) && key.contains(".processor."))
            }),
    };
    type Rule = fn(&Facts<'_>, &str, &ParsedKey) -> Verdict;
    let mut rules: Vec<(&'static str, Rule)> = vec![("diffusers", diffusers), ("ComfyUI", comfyui)];
    if file.folder {
        rules.push(("PEFT", peft));
    }
    if !file.flux2 {
        rules.push(("sd-scripts", sd_scripts));
    }
    let reading = |(reader, rule): (&'static str, Rule)| {
        let mut reading = Reading {
            reader,
            loads: 0,
            drops: Vec::new(),
            differs: Vec::new(),
        };
        for (key, parsed) in &keys {
            let verdict = match parsed {
                Some(parsed) => rule(&facts, key, parsed),
                None => Drops("its name is that of no parameter"),
            };
            match verdict {
                Loads => reading.loads += 1,
                Drops(reason) => reading.drops.push((key.to_string(), reason.into())),
                Differs(reason) => reading.differs.push((key.to_string(), reason.into())),
            }
        }
        reading
    };
    rules.into_iter().map(reading).collect()
}

/// What counts for the whole file.
struct Facts<'a> {
    file: Kept<'a>,
    /// diffusers takes such a file for kohya's.
    any_down: bool,
    /// Why diffusers loads nothing of it, for FLUX.2.
    stops: Option<&'static str>,
    /// Black Forest Labs' control LoRAs, which are known as a whole.
    control: bool,
    /// ComfyUI knows XLabs' names by the last block of either kind.
    whole_xlabs: bool,
}

const NO_PREFIX: &str = "it does not know names without a prefix";
const NO_NAMES: &str = "it does not know these names";
const NOT_LYCORIS: &str = "it has neither LoKr, LoHa nor full changes";
const OUTSIDE: &str = "of a kohya file it ignores what is outside the blocks";
const NO_WHOLE: &str = "it loads no whole weights and biases";
const AS_PLAIN: &str = "it plays a DoRA as a plain LoRA";

/// Why diffusers refuses a file for FLUX.2 that it does not take for kohya's: a key without "lora" in it or, where it renames
/// modules, one that it does not know; `dora_scale` it takes out before.
fn stops_at(keys: &[String]) -> Option<&'static str> {
    let mut keys = keys.iter().filter(|key| !key.contains("dora_scale"));
    let prefixes = ["diffusion_model.", "base_model.model."];
    let renames = keys
        .clone()
        .any(|key| prefixes.iter().any(|prefix| key.starts_with(prefix)));
    let knows = |key: &str| {
        let inner = prefixes.iter().find_map(|prefix| key.strip_prefix(prefix));
        let name = if renames { inner.unwrap_or("") } else { key };
        let as_it_is = ["single_transformer_blocks.", "transformer_blocks."];
        if !renames || as_it_is.iter().any(|block| name.starts_with(block)) {
            return name.contains("lora");
        }
        let factors = [".lora_A.weight", ".lora_B.weight"];
        let module = factors.iter().find_map(|factor| name.strip_suffix(factor));
        module.is_some_and(|module| !is_diffusers(module))
    };
    let key = keys.find(|key| !knows(key))?;
    Some(match key.ends_with(".alpha") {
        true => "it stops with an error: `.alpha` beside `lora_A`",
        false => "it stops with an error at a key that it knows as no factor of a LoRA",
    })
}

/// Whether the path is spelled as in diffusers, dotted or flattened.
fn is_diffusers(module: &str) -> bool {
    let module = flattened(module);
    let bfl = [
        "double_blocks_",
        "single_blocks_",
        "img_in",
        "txt_in",
        "time_in_",
        "vector_in_",
        "guidance_in_",
        "final_layer_",
    ];
    let lin = module.ends_with("_modulation_img_lin")
        || module.ends_with("_modulation_txt_lin")
        || module.ends_with("stream_modulation_lin");
    !lin && !bfl.iter().any(|start| module.starts_with(start))
}

fn in_block(module: &str) -> bool {
    flattened(module).contains("_blocks_")
}

fn diffusers(facts: &Facts<'_>, key: &str, parsed: &ParsedKey) -> Verdict {
    let ParsedKey {
        prefix,
        module,
        param,
        ..
    } = parsed;
    let of_text = matches!(parsed.component, Some(Component::ClipL | Component::T5));
    if facts.file.flux2 {
        if of_text {
            return Drops("FLUX.2 has no LoRA of a text encoder");
        }
        if let Some(reason) = facts.stops {
            return Drops(reason);
        }
        if facts.any_down && *prefix != "lora_unet" {
            return Drops(
                "it takes `.lora_down.weight` for kohya's, whose names start with `lora_unet_`",
            );
        }
    }
    match (*prefix, *param) {
        (_, Param::Magnitude) if key.contains("dora_scale") => Drops(AS_PLAIN),
        (_, Param::Factor(kind, _)) if !matches!(kind, Kind::Lora | Kind::Whole) => {
            Drops(NOT_LYCORIS)
        }
        (_, Param::DiffBias) => Drops("it does not load `diff_b`"),
        ("lora_unet", Param::DOWN | Param::UP | Param::Alpha) => {
            let flat = flattened(module);
            let unknown = ["stream_modulation", "guidance_in", "adaLN"];
            match facts.file.flux2 {
                _ if is_diffusers(module) => Drops(NO_NAMES),
                true if unknown.iter().any(|part| flat.contains(part)) => Drops(OUTSIDE),
                false if !in_block(module) => Drops(OUTSIDE),
                _ => Loads,
            }
        }
        ("transformer.", Param::DOWN | Param::UP)
            if !facts.file.flux2 && key.contains(".lora_down.") =>
        {
            Differs("beside these names it does not read alpha")
        }
        (
            "transformer.",
            Param::DOWN | Param::UP | Param::UpBias | Param::Magnitude | Param::Alpha,
        ) => match is_diffusers(module) {
            true => Loads,
            false => Drops(NO_NAMES),
        },
        ("transformer.", Param::SET | Param::SetBias) if !facts.file.flux2 => {
            match is_diffusers(module) {
                true => Loads, // as the header's `modules_to_save` and `bias` say
                false => Drops(NO_NAMES),
            }
        }
        (_, Param::SET | Param::SetBias) if !facts.control => Drops(NO_WHOLE),
        ("text_encoder", _) => Loads,
        _ if parsed.component == Some(Component::T5) => Drops("it loads no LoRA of T5"),
        (prefix, Param::DOWN | Param::UP | Param::Alpha) if prefix.starts_with("lora_te") => Loads,
        ("diffusion_model.", Param::DOWN | Param::UP | Param::Alpha) if !facts.file.flux2 => {
            match facts.any_down && !is_diffusers(module) {
                true if !in_block(module) => Drops(OUTSIDE),
                true => Loads,
                false => Drops(NO_NAMES),
            }
        }
        ("base_model.model.", Param::DOWN | Param::UP) if !facts.file.flux2 => {
            match is_diffusers(module) {
                false => Loads,
                true => Drops("of these names it knows only those of Black Forest Labs' modules"),
            }
        }
        ("diffusion_model." | "base_model.model.", param @ (Param::DOWN | Param::UP)) => {
            if param == Param::UP && module.ends_with("adaLN_modulation.1") {
                return Differs("it does not exchange the halves of the final modulation");
            }
            match param == Param::UP && facts.file.folder && facts.file.scale_beside {
                true => Differs("it does not read the alpha of `adapter_config.json`"),
                false => Loads,
            }
        }
        ("", Param::DOWN | Param::UP) if !facts.file.flux2 && module.contains(".processor.") => {
            Loads
        }
        ("", _) if !facts.file.flux2 && facts.control => Loads,
        ("", _) => Drops(NO_PREFIX),
        _ => Drops(NO_NAMES),
    }
}

fn comfyui(facts: &Facts<'_>, key: &str, parsed: &ParsedKey) -> Verdict {
    let ParsedKey {
        prefix,
        module,
        param,
        ..
    } = parsed;
    if *prefix == "text_encoder_2" {
        return Drops(NO_NAMES);
    }
    let named = match *prefix {
        "base_model.model." | "unet." => false,
        "diffusion_model." | "lora_unet" => !is_diffusers(module),
        "transformer." | "lora_transformer" | "lycoris" => is_diffusers(module),
        "" => facts.control || facts.whole_xlabs,
        _ => true, // of a text encoder
    };
    if !named {
        return Drops(NO_NAMES);
    }
    if facts.file.flux2
        && is_diffusers(module)
        && ["modulation", "time_guidance_embed"]
            .iter()
            .any(|part| module.contains(part))
    {
        return Drops(
            "it knows modulations and embedders of time only by Black Forest Labs' names",
        );
    }
    match *param {
        Param::UpBias if !facts.control => Drops("it does not load `lora_B.bias`"),
        Param::Magnitude if !key.ends_with(".dora_scale") => Drops(AS_PLAIN),
        Param::SET | Param::SetBias if !key.contains(".set_weight") && !facts.control => {
            Drops(NO_WHOLE)
        }
        Param::UP if facts.file.scale_beside => Differs("it does not read the alpha of a header"),
        _ => Loads,
    }
}

fn peft(_: &Facts<'_>, key: &str, parsed: &ParsedKey) -> Verdict {
    match parsed.prefix {
        "base_model.model." if !key.ends_with(".alpha") && !key.ends_with(".dora_scale") => Loads,
        _ => Drops(NO_NAMES),
    }
}

fn sd_scripts(_: &Facts<'_>, _: &str, parsed: &ParsedKey) -> Verdict {
    let factors = matches!(parsed.param, Param::DOWN | Param::UP | Param::Alpha);
    match parsed.prefix {
        "lora_unet" | "lora_te1" | "lora_te3" if !factors => {
            Drops("it loads low-rank factors and alpha only")
        }
        "lora_unet" if is_diffusers(&parsed.module) => Drops(NO_NAMES),
        "lora_unet" if parsed.module.starts_with("final_layer") => {
            Drops("it does not adapt the final layer")
        }
        "lora_unet" | "lora_te1" | "lora_te3" => Loads,
        _ => Drops("it reads kohya's names only"),
    }
}
