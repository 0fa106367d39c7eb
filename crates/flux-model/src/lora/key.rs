//! Keys: a prefix that names the component, the path of a module in some spelling, and a parameter.

use super::Component;

/// What the last part of a key says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Param {
    Down,
    Up,
    UpBias,
    HadaW1A,
    HadaW1B,
    HadaW2A,
    HadaW2B,
    LokrW1,
    LokrW1A,
    LokrW1B,
    LokrW2,
    LokrW2A,
    LokrW2B,
    Diff,
    Set,
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

/// Every suffix of a key; the longest that fits counts.
const SUFFIXES: &[(&str, Param)] = &[
    (".lora_down.weight", Param::Down),
    (".lora_up.weight", Param::Up),
    (".lora_A.weight", Param::Down),
    (".lora_B.weight", Param::Up),
    (".lora_A", Param::Down),
    (".lora_B", Param::Up),
    (".lora.down.weight", Param::Down),
    (".lora.up.weight", Param::Up),
    ("_lora.down.weight", Param::Down),
    ("_lora.up.weight", Param::Up),
    (".lora_linear_layer.down.weight", Param::Down),
    (".lora_linear_layer.up.weight", Param::Up),
    (".lora_B.bias", Param::UpBias),
    (".lora_up.bias", Param::UpBias),
    (".alpha", Param::Alpha),
    (".lora_alpha", Param::Alpha),
    (".dora_scale", Param::Magnitude),
    (".lora_magnitude_vector", Param::Magnitude),
    (".lora_magnitude_vector.weight", Param::Magnitude),
    (".magnitude", Param::Magnitude),
    (".hada_w1_a", Param::HadaW1A),
    (".hada_w1_b", Param::HadaW1B),
    (".hada_w2_a", Param::HadaW2A),
    (".hada_w2_b", Param::HadaW2B),
    (".lokr_w1", Param::LokrW1),
    (".lokr_w1_a", Param::LokrW1A),
    (".lokr_w1_b", Param::LokrW1B),
    (".lokr_w2", Param::LokrW2),
    (".lokr_w2_a", Param::LokrW2A),
    (".lokr_w2_b", Param::LokrW2B),
    (".diff", Param::Diff),
    (".scale.diff", Param::Diff),
    (".w_norm", Param::Diff),
    (".diff_b", Param::DiffBias),
    (".b_norm", Param::DiffBias),
    (".set_weight", Param::Set),
    (".scale.set_weight", Param::Set),
    (".weight.set_weight", Param::Set),
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
    (".weight", Param::Set),
    (".scale", Param::Set),
    (".bias", Param::SetBias),
];

/// A component's name in front of a dotted path.
const DOTTED: &[(&str, Option<Component>)] = &[
    ("base_model.model.", None),
    ("diffusion_model.", Some(Component::Transformer)),
    ("transformer.", Some(Component::Transformer)),
    ("unet.", Some(Component::Transformer)),
    ("text_encoders.clip_l.transformer.", Some(Component::ClipL)),
    ("text_encoders.t5xxl.transformer.", Some(Component::T5)),
    ("text_encoder_2.", Some(Component::T5)),
    ("text_encoder.", Some(Component::ClipL)),
    ("clip_l.", Some(Component::ClipL)),
    ("t5xxl.", Some(Component::T5)),
    ("t5.", Some(Component::T5)),
];

/// A component's name in front of a flattened path.
const FLAT: &[(&str, Component)] = &[
    ("lora_unet_", Component::Transformer),
    ("lora_transformer_", Component::Transformer),
    ("lycoris_", Component::Transformer),
    ("lora_te1_", Component::ClipL),
    ("lora_te2_", Component::T5), // OneTrainer; FLUX.1 has no CLIP-G
    ("lora_te3_", Component::T5),
    ("lora_te_", Component::ClipL),
];

/// Parts of names that only other models have.
const OTHER_MODELS: &[(&str, &str)] = &[
    ("double_stream_modulation", "FLUX.2"),
    ("single_stream_modulation", "FLUX.2"),
    ("to_qkv_mlp_proj", "FLUX.2"),
    ("ff.linear_in", "FLUX.2"),
    ("ff_linear_in", "FLUX.2"),
    ("ff_context.linear_in", "FLUX.2"),
    ("time_guidance_embed", "FLUX.2"),
    ("distilled_guidance_layer", "Chroma"),
    ("joint_blocks", "Stable Diffusion 3"),
    ("lora_te2_text_model", "Stable Diffusion XL"),
    ("lora_unet_input_blocks", "Stable Diffusion XL"),
    ("lora_unet_output_blocks", "Stable Diffusion XL"),
    ("lora_unet_middle_block", "Stable Diffusion XL"),
    ("down_blocks", "Stable Diffusion"),
    ("mid_block", "Stable Diffusion"),
    ("up_blocks", "Stable Diffusion"),
    ("cross_attn", "Wan"),
    ("img_mlp.net", "Qwen-Image"),
    ("txt_mlp.net", "Qwen-Image"),
];

/// The model whose name this is, if it is known and another than FLUX.1.
pub(super) fn other_model(key: &str) -> Option<&'static str> {
    let found = OTHER_MODELS.iter().find(|(part, _)| key.contains(part));
    found.map(|(_, model)| *model)
}

/// A key, taken apart.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ParsedKey {
    /// As in `DOTTED` and `FLAT`; empty if there is none.
    pub prefix: &'static str,
    /// `None`: whichever has the module.
    pub component: Option<Component>,
    pub flat: bool,
    /// Path of the module, in the file's spelling.
    pub module: String,
    pub param: Param,
    /// Name of a PEFT adapter inside the key.
    pub adapter: Option<String>,
}

/// Takes a key apart; `None` if it ends like no parameter.
pub(super) fn parse(key: &str) -> Option<ParsedKey> {
    let key = unwrapped(key);
    let (module, param, adapter) = parameter(&key)?;
    let flat = FLAT.iter().find(|(prefix, _)| module.starts_with(prefix));
    if let Some((prefix, component)) = flat {
        return Some(ParsedKey {
            prefix,
            component: Some(*component),
            flat: true,
            module: module[prefix.len()..].into(),
            param,
            adapter,
        });
    }
    let dotted = |path: &str| DOTTED.iter().find(|(prefix, _)| path.starts_with(prefix));
    let (mut prefix, mut component, mut path) = ("", None, module);
    if let Some((outer, named)) = dotted(path) {
        (prefix, component, path) = (*outer, *named, &path[outer.len()..]);
        if component.is_none()
            && let Some((inner, named)) = dotted(path)
        {
            (component, path) = (*named, &path[inner.len()..]);
        }
    }
    Some(ParsedKey {
        prefix,
        component,
        flat: false,
        module: path.into(),
        param,
        adapter,
    })
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
    for (suffix, param) in [(".down.weight", Param::Down), (".up.weight", Param::Up)] {
        if let Some(module) = key.strip_suffix(suffix)
            && is_xlabs(module)
        {
            return Some((module, param, None));
        }
    }
    let longest = |table: &'static [(&str, Param)]| {
        let fits = table.iter().filter(|(suffix, _)| key.ends_with(suffix));
        fits.max_by_key(|(suffix, _)| suffix.len())
            .map(|(suffix, param)| (&key[..key.len() - suffix.len()], *param, None))
    };
    longest(SUFFIXES)
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
            (".lora_A.default.weight", Param::Down),
            (".lora_B.default.weight", Param::Up),
            (".lora_B.default.bias", Param::UpBias),
            (".lora_B.default", Param::Up),
            (".lora_magnitude_vector.default.weight", Param::Magnitude),
            (".lokr_w1.default", Param::LokrW1),
            (".hada_w2_b.default", Param::HadaW2B),
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
