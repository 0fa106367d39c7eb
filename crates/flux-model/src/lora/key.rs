//! Keys: a prefix that names the component, the path of a module in some spelling, and a parameter.

use std::sync::LazyLock;

use lora_core::kinds::parts::{DIFF, Kind, LORA_A, LORA_B, WHOLE};

use super::Component;

/// What the last part of a key says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Param {
    /// A part of this kind's factors, by its name.
    Factor(Kind, &'static str),
    UpBias,
    DiffBias,
    SetBias,
    Magnitude,
    Alpha,
    Scalar,
    Reshape,
    /// Not part of any update, for this reason.
    Unused(&'static str),
    /// An algorithm that is refused: its name, and why.
    Refused(&'static str, &'static str),
}

impl Param {
    pub(super) const DOWN: Self = Self::Factor(Kind::Lora, LORA_A.name);
    pub(super) const UP: Self = Self::Factor(Kind::Lora, LORA_B.name);
    pub(super) const DIFF: Self = Self::Factor(Kind::Diff, DIFF.name);
    /// A new value of the weight.
    pub(super) const SET: Self = Self::Factor(Kind::Whole, WHOLE.name);

    /// Whether a key of this parameter is part of an adapter, so that a file with one is meant to be a LoRA.
    ///
    /// A whole weight or bias is none, unless its name says that it replaces one.
    pub(super) fn adapts(self, key: &str) -> bool {
        match self {
            Self::SET => key.ends_with(".set_weight"),
            Self::SetBias | Self::Alpha | Self::Scalar | Self::Unused(_) => false,
            _ => true,
        }
    }
}

const TUCKER: Param = Param::Refused(
    "a Tucker decomposition",
    "exists for convolutions only; FLUX.1 has none",
);
const OFT: Param = Param::Refused(
    "OFT",
    "multiplies the weight instead of adding to it: merge it into the model with the tool that made it",
);
const GLORA: Param = Param::Refused(
    "GLoRA",
    "multiplies the weight as well: merge it into the model with the tool that made it",
);
const IA3: Param = Param::Refused(
    "IA3",
    "scales activations instead of adding to the weight: merge it into the model with the tool that made it",
);
const ADALORA: Param = Param::Refused(
    "AdaLoRA",
    "has singular values beside its factors: convert it to a LoRA",
);
const VERA: Param = Param::Refused(
    "VeRA",
    "shares its factors between modules: convert it to a LoRA",
);
const SPARSE: Param = Param::Unused("a sparse bias of old LyCORIS files");
const EMBEDDING: Param = Param::Unused("adapters of embeddings are not supported");

/// Every suffix of a key, those of [`SPELLED`] and PEFT's names of the parts of other kinds; the longest that fits counts.
static SUFFIXES: LazyLock<Vec<(&str, Param)>> = LazyLock::new(|| {
    let kinds = Kind::ALL.into_iter().filter(|kind| *kind != Kind::Lora);
    let parts = kinds.flat_map(|kind| {
        let parts = kind.parts().iter();
        parts.filter_map(move |part| Some((part.key?, Param::Factor(kind, part.name))))
    });
    SPELLED.iter().copied().chain(parts).collect()
});

/// What programs call the factors of a LoRA, and what is no factor.
const SPELLED: &[(&str, Param)] = &[
    (".lora_down.weight", Param::DOWN),
    (".lora_up.weight", Param::UP),
    (".lora_A.weight", Param::DOWN),
    (".lora_B.weight", Param::UP),
    (".lora_A", Param::DOWN),
    (".lora_B", Param::UP),
    (".lora.down.weight", Param::DOWN),
    (".lora.up.weight", Param::UP),
    ("_lora.down.weight", Param::DOWN),
    ("_lora.up.weight", Param::UP),
    (".lora_linear_layer.down.weight", Param::DOWN),
    (".lora_linear_layer.up.weight", Param::UP),
    (".lora_B.bias", Param::UpBias),
    (".lora_up.bias", Param::UpBias),
    (".alpha", Param::Alpha),
    (".lora_alpha", Param::Alpha),
    (".dora_scale", Param::Magnitude),
    (".lora_magnitude_vector", Param::Magnitude),
    (".lora_magnitude_vector.weight", Param::Magnitude),
    (".magnitude", Param::Magnitude),
    (".scale.diff", Param::DIFF),
    (".w_norm", Param::DIFF),
    (".diff_b", Param::DiffBias),
    (".b_norm", Param::DiffBias),
    (".set_weight", Param::SET),
    (".scale.set_weight", Param::SET),
    (".weight.set_weight", Param::SET),
    (".reshape_weight", Param::Reshape),
    (".scalar", Param::Scalar),
    (
        ".base_layer.weight",
        Param::Unused("a copy of the base weight"),
    ),
    (".base_layer.bias", Param::SetBias),
    (".bias_indices", SPARSE),
    (".bias_values", SPARSE),
    (".bias_size", SPARSE),
    (".lora_embedding_A", EMBEDDING),
    (".lora_embedding_B", EMBEDDING),
    (".lora_mid.weight", TUCKER),
    (".hada_t1", TUCKER),
    (".hada_t2", TUCKER),
    (".lokr_t1", TUCKER),
    (".lokr_t2", TUCKER),
    (".oft_blocks", OFT),
    (".oft_diag", OFT),
    (".oft_R.weight", OFT),
    (".oft_R.scaled_oft", OFT),
    (".oft_R", OFT),
    (".rescale", OFT),
    (".a1.weight", GLORA),
    (".a2.weight", GLORA),
    (".b1.weight", GLORA),
    (".b2.weight", GLORA),
    (".bm.weight", GLORA),
    (".ia3_l", IA3),
    (".on_input", IA3),
    (".lora_E", ADALORA),
    (".vera_lambda_b", VERA),
    (".vera_lambda_d", VERA),
];

/// Suffixes that fit almost any tensor, tried last.
const PLAIN: &[(&str, Param)] = &[
    (".weight", Param::SET),
    (".scale", Param::SET),
    (".bias", Param::SetBias),
];

/// What may stand in front of a dotted path.
const DOTTED: &[(&str, Option<Component>)] = &[
    ("base_model.model.", None),
    ("diffusion_model.", Some(Component::Transformer)),
    ("transformer.", Some(Component::Transformer)),
    ("unet.", Some(Component::Transformer)),
];

/// What may stand in front of a path of either spelling, with `.` or `_` behind it; the longest that fits counts.
const EITHER: &[(&str, Component)] = &[
    ("lora_unet", Component::Transformer),
    ("lora_transformer", Component::Transformer),
    ("lycoris", Component::Transformer),
    ("lora_te", Component::ClipL),
    ("lora_te1", Component::ClipL),
    ("text_encoder", Component::ClipL),
    ("text_encoders.clip_l", Component::ClipL),
    ("text_encoders.clip_l.transformer", Component::ClipL),
    ("clip_l", Component::ClipL),
    ("clip_l.transformer", Component::ClipL),
    ("lora_te2", Component::T5), // OneTrainer; FLUX.1 has no CLIP-G
    ("lora_te3", Component::T5),
    ("text_encoder_2", Component::T5),
    ("text_encoders.t5xxl", Component::T5),
    ("text_encoders.t5xxl.transformer", Component::T5),
    ("t5xxl", Component::T5),
    ("t5xxl.transformer", Component::T5),
    ("t5", Component::T5),
];

/// A key, taken apart.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ParsedKey {
    /// As in `DOTTED` and `EITHER`; empty if there is none.
    pub prefix: &'static str,
    /// `None`: whichever has the module.
    pub component: Option<Component>,
    /// Path of the module, in the file's spelling.
    pub module: String,
    pub param: Param,
    /// Name of a PEFT adapter inside the key.
    pub adapter: Option<String>,
}

/// The key with its path flattened.
pub(super) fn flattened(key: &str) -> String {
    key.replace('.', "_")
}

/// Takes a key apart; `None` if it ends like no parameter.
pub(super) fn parse(key: &str) -> Option<ParsedKey> {
    let key = unwrapped(key);
    let (module, param, adapter) = parameter(&key)?;
    let (mut prefix, mut component, mut path) = ("", None, module);
    // `base_model.model.` may stand in front of another prefix.
    for _ in 0..2 {
        let Some((found, named, rest)) = prefixed(path) else {
            break;
        };
        if prefix.is_empty() {
            prefix = found;
        }
        (component, path) = (named, rest);
        if component.is_some() {
            break;
        }
    }
    Some(ParsedKey {
        prefix,
        component,
        module: rooted(component, path),
        param,
        adapter,
    })
}

/// The prefix of a path, the component it names, and what follows.
fn prefixed(path: &str) -> Option<(&'static str, Option<Component>, &str)> {
    let either = EITHER.iter().filter_map(|(prefix, component)| {
        let rest = path.strip_prefix(prefix)?.strip_prefix(['.', '_'])?;
        Some((*prefix, Some(*component), rest))
    });
    let dotted = DOTTED
        .iter()
        .filter_map(|(prefix, component)| Some((*prefix, *component, path.strip_prefix(prefix)?)));
    either.chain(dotted).max_by_key(|(prefix, ..)| prefix.len())
}

/// A text encoder's path from its root, which some programs leave out.
fn rooted(component: Option<Component>, path: &str) -> String {
    let (root, below) = match component {
        Some(Component::ClipL) => ("text_model", ["encoder", "final_layer_norm", "embeddings"]),
        Some(Component::T5) => ("encoder", ["block", "final_layer_norm", "embed_tokens"]),
        Some(Component::Transformer) | None => return path.into(),
    };
    let separator = if path.contains('.') { '.' } else { '_' };
    let is_below = |name: &&str| {
        path.strip_prefix(*name)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with(separator))
    };
    match below.iter().any(is_below) {
        true => format!("{root}{separator}{path}"),
        false => path.into(),
    }
}

/// The key without what `torch.compile`, DDP, FSDP and activation checkpointing put around modules.
fn unwrapped(key: &str) -> String {
    const WRAPPERS: [&str; 3] = [
        "_orig_mod",
        "_fsdp_wrapped_module",
        "_checkpoint_wrapped_module",
    ];
    let segments = key.split('.').filter(|segment| !WRAPPERS.contains(segment));
    let key = segments.collect::<Vec<_>>().join(".");
    let mut rest = key.as_str();
    loop {
        let inner = rest.strip_prefix("module.").or_else(|| {
            let inner = rest.strip_prefix("model.")?;
            inner.starts_with("diffusion_model.").then_some(inner)
        });
        match inner {
            Some(inner) => rest = inner,
            None => return rest.into(),
        }
    }
}

/// Module, parameter and adapter name.
fn parameter(key: &str) -> Option<(&str, Param, Option<String>)> {
    // XLabs first: `processor.qkv_lora.down.weight` also ends like the parameter of a module `qkv`.
    for (suffix, param) in [(".down.weight", Param::DOWN), (".up.weight", Param::UP)] {
        if let Some(module) = key.strip_suffix(suffix)
            && is_xlabs(module)
        {
            return Some((module, param, None));
        }
    }
    let longest = |table: &'static [(&'static str, Param)]| {
        let fits = table.iter().filter(|(suffix, _)| key.ends_with(suffix));
        fits.max_by_key(|(suffix, _)| suffix.len())
            .map(|(suffix, param)| (&key[..key.len() - suffix.len()], *param, None))
    };
    longest(&SUFFIXES)
        .or_else(|| named_parameter(key))
        .or_else(|| longest(PLAIN))
}

fn is_xlabs(module: &str) -> bool {
    let leaf = module.rsplit_once(".processor.").map(|(_, leaf)| leaf);
    let leaf = leaf.map(|leaf| leaf.trim_end_matches(['1', '2']));
    matches!(leaf, Some("qkv_lora" | "proj_lora"))
}

/// A parameter with the adapter's name inside, as in `lora_A.default.weight` or `lokr_w1.default`.
fn named_parameter(key: &str) -> Option<(&str, Param, Option<String>)> {
    let tail = [".weight", ".bias"]
        .into_iter()
        .find(|tail| key.ends_with(tail));
    let (head, name) = key[..key.len() - tail.map_or(0, str::len)].rsplit_once('.')?;
    let spelled = |suffix: &str| match (suffix, tail) {
        (".lora_A" | ".lora_B", Some(tail)) => format!("{suffix}{tail}"),
        (".lora_A" | ".lora_B", None) => suffix.to_string(),
        (_, Some(".bias")) => String::new(),
        _ => suffix.to_string(),
    };
    let leaf = &head[head.rfind('.')?..];
    let wanted = spelled(leaf);
    let (_, param) = SUFFIXES.iter().find(|(suffix, _)| *suffix == wanted)?;
    let named = !matches!(param, Param::Alpha | Param::Unused(_) | Param::Refused(..));
    named.then(|| (&head[..head.len() - leaf.len()], *param, Some(name.into())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_suffix_is_recognised() {
        let q = "transformer_blocks.0.attn.to_q";
        for (suffix, param) in SUFFIXES
            .iter()
            .filter(|(suffix, _)| suffix.starts_with('.'))
        {
            let parsed = parse(&format!("transformer.{q}{suffix}")).expect("a parameter");
            assert_eq!(
                (parsed.module.as_str(), parsed.param),
                (q, *param),
                "{suffix}"
            );
        }
        for (suffix, param) in [
            (".lora_A.default.weight", Param::DOWN),
            (".lora_B.default.weight", Param::UP),
            (".lora_B.default.bias", Param::UpBias),
            (".lora_B.default", Param::UP),
            (".lora_magnitude_vector.default.weight", Param::Magnitude),
            (".lokr_w1.default", Param::Factor(Kind::Lokr, "lokr_w1")),
            (".hada_w2_b.default", Param::Factor(Kind::Loha, "hada_w2_b")),
        ] {
            let parsed = parse(&format!("base_model.model.{q}{suffix}")).expect("a parameter");
            assert_eq!(
                (parsed.module.as_str(), parsed.param),
                (q, param),
                "{suffix}"
            );
            assert_eq!(parsed.adapter.as_deref(), Some("default"));
        }
    }

    #[test]
    fn a_key_that_ends_like_no_parameter_is_none() {
        assert_eq!(parse("transformer.transformer_blocks.0.attn.to_q"), None);
        assert_eq!(parse(""), None);
    }
}
