//! Modules by every name that a key can call them.
//!
//! Flattened paths (`.` written as `_`) cannot be taken apart by rule, because the segments contain `_` themselves; they
//! are looked up among the flattened paths of the network.

use std::collections::HashMap;

use crate::flux1::keys::bfl_transformer_module;
use crate::flux2;

use super::Component;
use super::key::ParsedKey;
use super::rows::Rows;
use super::shape::{ModelShape, ModuleShape};

/// How a module's path is spelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Spelling {
    Diffusers,
    Bfl,
    /// BFL with the part's number behind the fused module.
    Indexed,
    XLabs,
    /// A text encoder's own.
    Text,
}

/// A module that a key can name, in terms of the network's modules.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Target {
    pub component: Component,
    pub name: String,
    pub spelling: Spelling,
    pub shape: ModuleShape,
    /// The network's modules that make it up.
    pub places: Vec<Place>,
}

/// A module of the network as rows of a [`Target`].
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Place {
    pub path: String,
    pub rows: Rows,
}

/// Every name of every module of the networks.
#[derive(Debug, Default)]
pub(super) struct Names {
    targets: Vec<Target>,
    dotted: HashMap<(Component, String), usize>,
    flat: HashMap<(Component, String), usize>,
}

impl Names {
    pub(super) fn new(shape: &ModelShape) -> Self {
        let mut names = Self::default();
        let hidden = shape.hidden_size();
        for component in Component::ALL {
            for (path, module) in shape.modules(component) {
                let spelling = match component {
                    Component::Transformer => Spelling::Diffusers,
                    _ => Spelling::Text,
                };
                let rows = Rows::all(module.out());
                let place = Place {
                    path: path.clone(),
                    rows,
                };
                names.add(Target {
                    component,
                    name: path,
                    spelling,
                    shape: module,
                    places: vec![place],
                });
            }
        }
        for target in bfl_targets(shape, hidden) {
            names.add(target);
        }
        names
    }

    fn add(&mut self, target: Target) {
        let index = self.targets.len();
        let (component, name) = (target.component, target.name.clone());
        for alias in aliases(&name) {
            self.flat
                .insert((component, alias.replace('.', "_")), index);
            self.dotted.insert((component, alias), index);
        }
        self.targets.push(target);
    }

    /// The module a key names, if the networks have it.
    pub(super) fn resolve(&self, key: &ParsedKey) -> Option<&Target> {
        let components = match &key.component {
            Some(component) => std::slice::from_ref(component),
            None => &Component::ALL,
        };
        components.iter().find_map(|&component| {
            let look = |name: &str| {
                let name = (component, name.to_string());
                self.dotted.get(&name).or_else(|| self.flat.get(&name))
            };
            let bare = || key.module.replace(".processor", "");
            let shortened = || key.module.strip_suffix('_');
            let found = look(&key.module)
                .or_else(|| look(shortened()?))
                .or_else(|| look(&bare()).filter(|_| key.module.contains(".processor")));
            found.map(|&index| &self.targets[index])
        })
    }

    /// Modules in the spelling of Black Forest Labs.
    pub(super) fn bfl(&self) -> impl Iterator<Item = &Target> {
        self.targets
            .iter()
            .filter(|target| target.spelling == Spelling::Bfl)
    }
}

/// The name itself, and what the oldest diffusers files call it.
fn aliases(name: &str) -> impl Iterator<Item = String> {
    let old = name
        .strip_suffix(".to_out.0")
        .map(|head| format!("{head}.to_out"));
    std::iter::once(name.to_string()).chain(old)
}

/// BFL's modules, their numbered parts, and XLabs' names for them.
fn bfl_targets(shape: &ModelShape, hidden: usize) -> Vec<Target> {
    let mut whole: Vec<Target> = Vec::new();
    let mut by_name: HashMap<String, usize> = HashMap::new();
    for (path, module) in shape.modules(Component::Transformer) {
        let bfl = match shape.flux2 {
            Some(_) => flux2::keys::bfl_transformer_module(&path, hidden),
            None => bfl_transformer_module(&path, hidden),
        };
        let Some(bfl) = bfl else {
            continue;
        };
        let rows = match bfl.rows {
            Some(rows) => Rows::span(rows),
            None if bfl.swap_halves => Rows::exchanged_halves(module.out()),
            None => Rows::all(module.out()),
        };
        let place = Place { path, rows };
        let index = *by_name.entry(bfl.name.clone()).or_insert_with(|| {
            whole.push(Target {
                component: Component::Transformer,
                name: bfl.name,
                spelling: Spelling::Bfl,
                shape: match module {
                    ModuleShape::Linear { input, .. } => ModuleShape::Linear { out: 0, input },
                    ModuleShape::Norm { .. } => module,
                },
                places: Vec::new(),
            });
            whole.len() - 1
        });
        let target = &mut whole[index];
        if let ModuleShape::Linear { out, .. } = &mut target.shape {
            *out += module.out();
        }
        target.places.push(place);
    }
    whole.iter_mut().for_each(|target| {
        target
            .places
            .sort_by_key(|place| place.rows.ranges()[0].start)
    });
    let parts = whole
        .iter()
        .flat_map(|target| numbered_parts(target, hidden));
    let xlabs = whole
        .iter()
        .filter(|_| shape.flux2.is_none())
        .flat_map(|target| xlabs_targets(target, hidden));
    let derived: Vec<_> = parts.chain(xlabs).collect();
    whole.extend(derived);
    whole
}

/// `….qkv.0`, `….linear1.3`: the parts of a fused module by number.
fn numbered_parts(target: &Target, hidden: usize) -> Vec<Target> {
    if target.places.len() < 2 {
        return Vec::new();
    }
    let part = |(i, place): (usize, &Place)| {
        let out = place.rows.count();
        Target {
            component: target.component,
            name: format!("{}.{i}", target.name),
            spelling: Spelling::Indexed,
            shape: ModuleShape::Linear { out, input: hidden },
            places: vec![Place {
                path: place.path.clone(),
                rows: Rows::all(out),
            }],
        }
    };
    target.places.iter().enumerate().map(part).collect()
}

/// What XLabs, and ComfyUI after it, call a module or its attention rows.
fn xlabs_targets(target: &Target, hidden: usize) -> Vec<Target> {
    let Some((block, module)) = target.name.split_once(".").and_then(|(kind, rest)| {
        let (index, module) = rest.split_once('.')?;
        Some((format!("{kind}.{index}"), module))
    }) else {
        return Vec::new();
    };
    let named = |name: &str, spelling| Target {
        name: format!("{block}.{name}"),
        spelling,
        ..target.clone()
    };
    let attention = |name: &str, spelling| Target {
        shape: ModuleShape::Linear {
            out: 3 * hidden,
            input: hidden,
        },
        places: target.places[..target.places.len().min(3)].to_vec(),
        ..named(name, spelling)
    };
    match module {
        "img_attn.qkv" => vec![named("processor.qkv_lora1", Spelling::XLabs)],
        "txt_attn.qkv" => vec![named("processor.qkv_lora2", Spelling::XLabs)],
        "img_attn.proj" => vec![named("processor.proj_lora1", Spelling::XLabs)],
        "txt_attn.proj" => vec![named("processor.proj_lora2", Spelling::XLabs)],
        "linear1" => vec![
            attention("processor.qkv_lora", Spelling::XLabs),
            attention("linear1_qkv", Spelling::XLabs),
        ],
        "linear2" => vec![named("processor.proj_lora", Spelling::XLabs)],
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::key::{Param, parse};
    use super::*;
    use crate::flux1::config::FluxConfig;
    use crate::text::clip::ClipConfig;
    use crate::text::t5::T5Config;

    fn names() -> Names {
        Names::new(&ModelShape {
            transformer: Some(FluxConfig::dev()),
            clip: Some(ClipConfig::clip_l()),
            t5: Some(T5Config::xxl()),
            ..ModelShape::default()
        })
    }

    /// Places and parameter of a key.
    fn resolved(key: &str) -> (Vec<String>, Param) {
        static NAMES: std::sync::LazyLock<Names> = std::sync::LazyLock::new(names);
        let parsed = parse(key).unwrap_or_else(|| panic!("{key}: no parameter"));
        let names = &NAMES;
        let target = names
            .resolve(&parsed)
            .unwrap_or_else(|| panic!("{key}: {parsed:?}"));
        let places = target.places.iter().map(|place| place.path.clone());
        (places.collect(), parsed.param)
    }

    #[test]
    fn flattened_names_do_not_collide() {
        let names = names();
        assert_eq!(names.flat.len(), names.dotted.len());
        assert_eq!(
            names
                .bfl()
                .filter(|t| matches!(t.shape, ModuleShape::Linear { .. }))
                .count(),
            314
        );
    }

    #[test]
    fn every_prefix_goes_with_every_spelling() {
        let names = names();
        let shape = ModelShape {
            transformer: Some(FluxConfig::dev()),
            ..ModelShape::default()
        };
        for (path, _) in shape.modules(Component::Transformer) {
            let bfl = bfl_transformer_module(&path, 3072).expect("a module of FLUX.1");
            for body in [&path, &bfl.name] {
                let flat = body.replace('.', "_");
                let keys = ["lora_unet_", "lora_transformer_", "lycoris_"]
                    .map(|prefix| format!("{prefix}{flat}.lora_down.weight"))
                    .into_iter()
                    .chain(
                        [
                            "",
                            "base_model.model.",
                            "diffusion_model.",
                            "transformer.",
                            "unet.",
                            "module._orig_mod.model.diffusion_model.",
                        ]
                        .map(|prefix| format!("{prefix}{body}.lora_A.other.weight")),
                    );
                for key in keys {
                    let parsed = parse(&key).expect("a parameter");
                    assert_eq!(parsed.param, Param::DOWN, "{key}");
                    let target = names.resolve(&parsed).unwrap_or_else(|| panic!("{key}"));
                    assert!(
                        target.places.iter().any(|place| place.path == path),
                        "{key}"
                    );
                }
            }
        }
    }

    #[test]
    fn old_diffusers_names() {
        let (places, param) = resolved("transformer_blocks.3.attn.processor.to_q_lora.up.weight");
        assert_eq!(
            (places, param),
            (
                vec!["transformer_blocks.3.attn.to_q".to_string()],
                Param::UP
            )
        );
        let (places, _) = resolved("transformer.transformer_blocks.3.attn.to_out_lora.down.weight");
        assert_eq!(places, ["transformer_blocks.3.attn.to_out.0"]);
    }

    #[test]
    fn xlabs_names_are_attention_rows() {
        let (places, param) = resolved("single_blocks.7.processor.qkv_lora.down.weight");
        let block = "single_transformer_blocks.7.attn";
        assert_eq!(
            places,
            ["to_q", "to_k", "to_v"].map(|name| format!("{block}.{name}"))
        );
        assert_eq!(param, Param::DOWN);
        let (places, _) =
            resolved("diffusion_model.double_blocks.18.processor.proj_lora2.up.weight");
        assert_eq!(places, ["transformer_blocks.18.attn.to_add_out"]);
        assert_eq!(
            resolved("diffusion_model.single_blocks.7.linear1_qkv.lora_up.weight")
                .0
                .len(),
            3
        );
    }

    #[test]
    fn numbered_parts_are_the_split_modules() {
        let (places, _) = resolved("transformer.single_blocks.5.linear1.3.lora_down.weight");
        assert_eq!(places, ["single_transformer_blocks.5.proj_mlp"]);
        let (places, _) = resolved("transformer.double_blocks.5.txt_attn.qkv.2.alpha");
        assert_eq!(places, ["transformer_blocks.5.attn.add_v_proj"]);
    }

    #[test]
    fn one_trailing_underscore_is_ignored() {
        let (places, param) = resolved("lora_unet_transformer_blocks_0_attn_to_q_.alpha");
        assert_eq!(
            (places, param),
            (
                vec!["transformer_blocks.0.attn.to_q".to_string()],
                Param::Alpha
            )
        );
    }

    #[test]
    fn compile_wrappers_are_removed_anywhere() {
        let key = "module.transformer_blocks.2._checkpoint_wrapped_module.attn._orig_mod.to_q.lora_A.weight";
        assert_eq!(resolved(key).0, ["transformer_blocks.2.attn.to_q"]);
    }

    /// Every prefix, with `.` and `_`, with the path dotted and flattened, from its root and below it.
    #[test]
    fn text_encoder_names() {
        let clip = (
            [
                "lora_te",
                "lora_te1",
                "text_encoder",
                "clip_l",
                "text_encoders.clip_l",
                "text_encoders.clip_l.transformer",
            ]
            .as_slice(),
            "text_model",
            "encoder.layers.11.mlp.fc2",
        );
        let t5 = (
            [
                "lora_te2",
                "lora_te3",
                "text_encoder_2",
                "t5",
                "t5xxl",
                "text_encoders.t5xxl",
                "text_encoders.t5xxl.transformer",
            ]
            .as_slice(),
            "encoder",
            "block.23.layer.1.DenseReluDense.wi_0",
        );
        let ends = [
            ".lora_up.weight",
            ".lora_B.weight",
            ".lora_linear_layer.up.weight",
        ];
        for (prefixes, root, below) in [clip, t5] {
            let whole = format!("{root}.{below}");
            let flat = |path: &str| path.replace('.', "_");
            let paths = [whole.clone(), flat(&whole), below.into(), flat(below)];
            for (prefix, path) in prefixes
                .iter()
                .flat_map(|p| paths.iter().map(move |q| (p, q)))
            {
                for (separator, end) in ends.iter().flat_map(|end| [('.', end), ('_', end)]) {
                    let key = format!("{prefix}{separator}{path}{end}");
                    assert_eq!(resolved(&key), (vec![whole.clone()], Param::UP), "{key}");
                }
            }
            let key = format!("base_model.model.{whole}.lora_B.weight");
            assert_eq!(resolved(&key).0, [whole]);
        }
    }

    #[test]
    fn flattened_prefixes_go_with_dotted_paths_and_the_other_way() {
        let q = "transformer_blocks.0.attn.to_q";
        for key in [
            format!("lora_unet.{q}.lora_down.weight"),
            format!("lora_transformer.{q}.lora_A.weight"),
            format!("lora_unet_{q}.lora_A.weight"),
            format!("lycoris.{q}.lora_down.weight"),
            format!("transformer.{}.lora_A.weight", q.replace('.', "_")),
            format!("{}.lora_A.weight", q.replace('.', "_")),
        ] {
            assert_eq!(resolved(&key), (vec![q.to_string()], Param::DOWN), "{key}");
        }
    }

    #[test]
    fn norm_gains_have_three_spellings() {
        for key in [
            "double_blocks.0.img_attn.norm.query_norm.scale",
            "diffusion_model.double_blocks.0.img_attn.norm.query_norm.scale.set_weight",
            "diffusion_model.double_blocks.0.img_attn.norm.query_norm.set_weight",
            "transformer.transformer_blocks.0.attn.norm_q.weight",
        ] {
            let expected = vec!["transformer_blocks.0.attn.norm_q".to_string()];
            assert_eq!(resolved(key), (expected, Param::SET), "{key}");
        }
    }

    #[test]
    fn flux2_is_named_by_diffusers_and_by_bfl() {
        let names = Names::new(&ModelShape {
            flux2: Some(crate::flux2::config::Flux2Config::klein_4b()),
            ..ModelShape::default()
        });
        let places = |key: &str| {
            let parsed = parse(key).unwrap_or_else(|| panic!("{key}: no parameter"));
            let target = names.resolve(&parsed);
            let target = target.unwrap_or_else(|| panic!("{key}: no module"));
            let paths = target.places.iter().map(|place| place.path.clone());
            paths.collect::<Vec<_>>()
        };
        let fused = ["single_transformer_blocks.3.attn.to_qkv_mlp_proj"];
        for key in [
            "transformer.single_transformer_blocks.3.attn.to_qkv_mlp_proj.lora_A.weight",
            "diffusion_model.single_blocks.3.linear1.lora_A.weight",
            "base_model.model.single_blocks.3.linear1.lora_B.weight",
            "lora_unet_single_blocks_3_linear1.lora_down.weight",
        ] {
            assert_eq!(places(key), fused, "{key}");
        }
        let block = "transformer_blocks.4.attn";
        let parts = ["to_q", "to_k", "to_v"].map(|part| format!("{block}.{part}"));
        assert_eq!(
            places("diffusion_model.double_blocks.4.img_attn.qkv.lora_A.weight"),
            parts
        );
        assert_eq!(
            places("diffusion_model.double_stream_modulation_txt.lin.lora_A.weight"),
            ["double_stream_modulation_txt.linear"]
        );
        let flux1 = parse("diffusion_model.single_blocks.3.modulation.lin.lora_A.weight");
        assert_eq!(names.resolve(&flux1.expect("a parameter")), None);
    }
}
