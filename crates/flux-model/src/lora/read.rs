//! A file or folder as a [`LoraSet`].
//!
//! Nothing decides on a format for the whole file: each key says its prefix, module and parameter, keys of one module are
//! put together, and modules that the network has split are split.
//!
//! That some key matched proves nothing, so a file has to prove that it is a LoRA for this network ([`Proof`]):
//! 1. It has keys of an adapter. Whole weights alone are a checkpoint, and the message says of what.
//! 2. Every module that is adapted pairs up and has the sizes of the network's module.
//! 3. No adapted module belongs to another model by its name, or to a block that the network does not have.
//! 4. Of the other adapted modules, at most one in ten is unknown: those are ignored and named.
//!
//! Modules that files are known to bring along (`EXTRAS`) count on neither side.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use lora_core::LoraConfig;
use lora_core::kinds::parts::Kind;
use lora_core::peft::{TrainBias, is_saved};

use super::compare::{same_bias, same_weight};
use super::error::{KeyProblem, LoraFormatError};
use super::group::{Group, GroupReader};
use super::identity::{FLUX1, FLUX2, model, whole};
use super::infer::{Sighting, block_index, complete, foreign, of_either, of_flux2};
use super::key::{Param, ParsedKey, flattened, parse};
use super::names::{Names, Spelling, Target};
use super::readers::{Kept, readings};
use super::shape::ModelShape;
use super::source::{Source, locate};
use super::split::split;
use super::{Bias, Component, LoraSet, ModuleUpdate, Report};

/// Reads a LoRA: a `.safetensors` file of any format, or the folder of a PEFT or diffusers adapter.
///
/// `shape` says which networks it is for; components that are `None` there are inferred from the file. Only headers and
/// alphas are read, and the tensors of modules that the file describes twice.
///
/// # Errors
/// A file that is malformed or incomplete, that is no LoRA or one for another model, that is of an algorithm that is no
/// additive change, or that contradicts itself or `shape`. Keys that adapt nothing are no error beside those that do: see
/// [`Report::ignored`].
pub fn read(path: &Path, shape: &ModelShape) -> Result<LoraSet, LoraFormatError> {
    let files = locate(path)?;
    let mut reader = Reader::default();
    for file in &files {
        reader.parse(file)?;
    }
    reader.build(path, &files, shape)
}

const EITHER: &str = "attention of double-stream blocks alone, which FLUX.1 and FLUX.2 klein 4B have in the same sizes, and no \
     header that says for which: read as one for FLUX.1 (--model says which it is)";

/// Collects keys, then builds updates from them.
#[derive(Default)]
struct Reader {
    /// Keys of each file, in order of [`Self::parse`].
    files: Vec<Vec<(String, ParsedKey)>>,
    adapters: BTreeSet<String>,
    proof: Proof,
    report: Report,
    /// A scale other than 1 is in a configuration or a header, and in no tensor.
    scale_beside: bool,
}

/// What speaks against the file being a LoRA for the network.
#[derive(Default)]
struct Proof {
    /// The family of the network.
    ours: &'static str,
    /// Adapted modules that the network does not have, by prefix and path.
    unknown: BTreeMap<(&'static str, String), Group>,
}

impl Reader {
    fn parse(&mut self, source: &Source) -> Result<(), LoraFormatError> {
        let path = source.file.path();
        let mut keys = Vec::new();
        for key in source.file.names() {
            if let Some(reason) = noise(key) {
                self.report.ignored.push((key.into(), reason.into()));
                continue;
            }
            let Some(parsed) = parse(key) else {
                let reason = "its name ends like no parameter of a LoRA";
                self.report.ignored.push((key.into(), reason.into()));
                continue;
            };
            self.adapters.extend(parsed.adapter.clone());
            keys.push((key.to_string(), parsed));
        }
        self.files.push(keys);
        if self.adapters.len() > 1 {
            return Err(LoraFormatError::AdapterNames {
                path: path.into(),
                names: std::mem::take(&mut self.adapters).into_iter().collect(),
            });
        }
        Ok(())
    }

    fn build(
        mut self,
        path: &Path,
        sources: &[Source],
        given: &ModelShape,
    ) -> Result<LoraSet, LoraFormatError> {
        self.require_adapter(path, sources)?;
        let shape = self.shape(path, sources, given)?;
        let flux2 = shape.flux2.is_some();
        self.proof.ours = if flux2 { FLUX2 } else { FLUX1 };
        let names = Names::new(&shape);
        let mut set = LoraSet::default();
        let mut owners = BTreeMap::new();
        for (source, keys) in sources.iter().zip(std::mem::take(&mut self.files)) {
            let modules = self.group(source, &names, keys)?;
            warn_about_source(source, &modules, &mut self.report.warnings);
            for module in modules.into_values() {
                self.add(source, module, &mut set, &mut owners)?;
            }
            set.metadata.extend(source.file.metadata().clone());
        }
        self.proof.check(path, set.len(), &shape)?;
        if set.is_empty() {
            let first = sources.iter().find_map(|source| source.file.names().next());
            return Err(LoraFormatError::NoModule {
                path: path.into(),
                key: first.unwrap_or_default().into(),
            });
        }
        set.in_channels = widened(&set, &shape);
        if let Some(width) = set.in_channels {
            self.report.warnings.push(format!(
                "the LoRA needs an `x_embedder` of {width} input channels: pad its weight with zeros (control LoRAs)"
            ));
        }
        let keys: Vec<_> = sources
            .iter()
            .flat_map(|source| source.file.names().map(str::to_string))
            .collect();
        self.report.readings = readings(Kept {
            keys: &keys,
            flux2,
            folder: sources.iter().any(|source| source.config.is_some()),
            scale_beside: self.scale_beside,
        });
        set.shape = shape;
        set.report = self.report;
        Ok(set)
    }

    /// A file without any key of an adapter is something else.
    fn require_adapter(&self, path: &Path, sources: &[Source]) -> Result<(), LoraFormatError> {
        let mut keys = self.files.iter().flatten();
        if keys.any(|(key, parsed)| parsed.param.adapts(key)) {
            return Ok(());
        }
        let names = sources.iter().flat_map(|source| source.file.names());
        let names: Vec<&str> = names.collect();
        let Some(first) = names.first() else {
            return Err(LoraFormatError::Empty { path: path.into() });
        };
        let (path, key) = (path.into(), first.to_string());
        Err(match whole(&names) {
            Some(identity) => LoraFormatError::NoLora {
                path,
                identity,
                key,
            },
            None => LoraFormatError::NoModule { path, key },
        })
    }

    /// The given shape, completed from the tensors.
    fn shape(
        &mut self,
        path: &Path,
        sources: &[Source],
        given: &ModelShape,
    ) -> Result<ModelShape, LoraFormatError> {
        let mut seen = Vec::new();
        for (source, keys) in sources.iter().zip(&self.files) {
            let mut groups: BTreeMap<&str, (&ParsedKey, Group)> = BTreeMap::new();
            for (key, parsed) in keys {
                let (_, group) = groups
                    .entry(&parsed.module)
                    .or_insert_with(|| (parsed, Group::default()));
                group.params.insert(parsed.param, key.clone());
            }
            seen.extend(
                groups
                    .into_values()
                    .map(|(parsed, group)| (parsed, group.size(&source.file))),
            );
        }
        let sightings = seen
            .into_iter()
            .map(|(key, (out, input))| Sighting { key, out, input });
        let sightings: Vec<_> = sightings.collect();
        let inferred = given.transformer.is_none() && given.flux2.is_none();
        let of_flux2 = of_flux2(&sightings);
        let other = match of_flux2 {
            Some(module) if given.transformer.is_some() => Some((module, FLUX2)),
            None if inferred => foreign(&sightings),
            _ => None,
        };
        match other {
            Some((_, FLUX2)) if inferred => return Ok(complete(given, &sightings, true)),
            Some((module, model)) => {
                let mut keys = self.files.iter().flatten();
                let key = keys.find(|(_, parsed)| parsed.module == module);
                let key = key.map_or(module, |(key, _)| key);
                return Err(other_model_error(path, key, model, FLUX1));
            }
            None => {}
        }
        let says = |family| sources.iter().any(|it| says(it.file.metadata(), family));
        let flux2 = inferred && (says("flux2") || of_flux2.is_some());
        let shape = complete(given, &sightings, flux2);
        if inferred && !flux2 && !says("flux1") && of_either(&sightings, &shape) {
            self.report.is_of_either = true;
            self.report.warnings.push(EITHER.into());
        }
        Ok(shape)
    }

    /// Keys by module, as the file spells it with its prefix.
    fn group<'n>(
        &mut self,
        source: &Source,
        names: &'n Names,
        keys: Vec<(String, ParsedKey)>,
    ) -> Result<BTreeMap<String, Module<'n>>, LoraFormatError> {
        let path = source.file.path();
        let mut modules: BTreeMap<String, Module<'n>> = BTreeMap::new();
        for (key, parsed) in keys {
            let target = names.resolve(&parsed);
            if target.is_none() && parsed.param.adapts(&key) && !is_extra(&parsed) {
                let ours = self.proof.ours;
                if let Some(model) = model(&key).filter(|model| *model != ours) {
                    let model = diffusion_version(source, model);
                    return Err(other_model_error(path, &key, model, ours));
                }
                let module = (parsed.prefix, parsed.module.clone());
                let group = self.proof.unknown.entry(module).or_default();
                group.params.entry(parsed.param).or_insert(key.clone());
            }
            if let Param::Refused(name, reason) = parsed.param {
                return Err(LoraFormatError::key(
                    path,
                    &key,
                    KeyProblem::Algorithm { name, reason },
                ));
            }
            let unused = match (target, parsed.param) {
                (None, _) => Some("the model has no such module"),
                (_, Param::Unused(reason)) => Some(reason),
                (Some(target), param) => {
                    unused_value(source.config(target.component), target, &key, param)
                }
            };
            match (target, unused) {
                (Some(target), None) => {
                    let name = format!("{}.{}", parsed.prefix, parsed.module);
                    let module = modules.entry(name).or_insert_with(|| Module {
                        target,
                        prefix: parsed.prefix,
                        group: Group::default(),
                    });
                    module.group.insert(path, parsed.param, &key)?;
                }
                (_, reason) => self
                    .report
                    .ignored
                    .push((key, reason.unwrap_or_default().into())),
            }
        }
        Ok(modules)
    }

    fn add(
        &mut self,
        source: &Source,
        module: Module<'_>,
        set: &mut LoraSet,
        owners: &mut BTreeMap<(Component, String), String>,
    ) -> Result<(), LoraFormatError> {
        let Module {
            target,
            prefix,
            group,
        } = module;
        let key = group.params.values().next().cloned().unwrap_or_default();
        let update = GroupReader {
            file: &source.file,
            group: &group,
            target,
            config: source.config(target.component),
            // A header is diffusers', whatever the names of the tensors.
            configured: match &source.config {
                Some(_) => &target.name,
                None => &target.places[0].path,
            },
            warnings: &mut self.report.warnings,
        }
        .read()?;
        if update.factors.is_none() && update.bias.is_none() {
            let keys = group.params.into_values();
            let reason = "it belongs to no factors";
            self.report
                .ignored
                .extend(keys.map(|key| (key, reason.to_string())));
            return Ok(());
        }
        let states_alpha = group.params.contains_key(&Param::Alpha);
        self.scale_beside |= update.factors.is_some() && update.scale != 1.0 && !states_alpha;
        for format in formats(prefix, target, &group, &update) {
            *self.report.formats.entry(format).or_default() += 1;
        }
        let mut repeated = true;
        for (place, part) in target.places.iter().zip(split(&update, &target.places)) {
            let owner = (target.component, place.path.clone());
            match set.modules_mut(target.component).get_mut(&place.path) {
                None => {
                    set.modules_mut(target.component)
                        .insert(place.path.clone(), part);
                    owners.insert(owner, key.clone());
                    repeated = false;
                }
                Some(earlier) => match merge(earlier, part)? {
                    Merged::Same => {}
                    Merged::Joined => repeated = false,
                    Merged::Conflict => {
                        return Err(LoraFormatError::Conflict {
                            path: source.file.path().into(),
                            module: place.path.clone(),
                            first: owners.remove(&owner).unwrap_or_default(),
                            second: key,
                        });
                    }
                },
            }
        }
        if repeated {
            let reason = "the file has the same change under another name";
            let keys = group.params.into_values();
            self.report
                .ignored
                .extend(keys.map(|key| (key, reason.to_string())));
        } else {
            self.report.used += group.params.len();
        }
        Ok(())
    }
}

/// The keys of a module and what it is.
struct Module<'n> {
    target: &'n Target,
    prefix: &'static str,
    group: Group,
}

fn other_model_error(
    path: &Path,
    key: &str,
    model: &'static str,
    ours: &'static str,
) -> LoraFormatError {
    LoraFormatError::OtherModel {
        path: path.into(),
        key: key.into(),
        model,
        ours,
    }
}

/// Whether the header names `family`, as kohya's and other programs' do.
fn says(metadata: &BTreeMap<String, String>, family: &str) -> bool {
    let said = ["ss_base_model_version", "modelspec.architecture"];
    let said = said.iter().filter_map(|key| metadata.get(*key));
    let bare = |text: &String| text.to_lowercase().replace(['.', '-', '_', ' '], "");
    said.map(bare).any(|text| text.starts_with(family))
}

impl Proof {
    /// Rules 3 and 4 of this file, for a LoRA that changes `used` modules.
    fn check(&self, path: &Path, used: usize, shape: &ModelShape) -> Result<(), LoraFormatError> {
        let unknown = self.unknown.iter().filter_map(|((_, module), group)| {
            let half =
                group.params.contains_key(&Param::UP) != group.params.contains_key(&Param::DOWN);
            Some((module, group.params.values().next().filter(|_| !half)?))
        });
        for (module, key) in unknown.clone() {
            let beyond = |(container, _, count): &&(&str, &'static str, usize)| {
                block_index(module, container).is_some_and(|index| index >= *count)
            };
            if let Some((_, kind, count)) = containers(shape).iter().find(beyond) {
                return Err(LoraFormatError::MoreBlocks {
                    path: path.into(),
                    key: key.clone(),
                    kind,
                    count: *count,
                });
            }
        }
        let (mut keys, count) = (unknown.clone(), unknown.count());
        match keys.next() {
            Some((_, key)) if used > 0 && UNKNOWN * count > used + count => {
                Err(LoraFormatError::MostlyUnknown {
                    path: path.into(),
                    unknown: count,
                    modules: used + count,
                    key: key.clone(),
                })
            }
            _ => Ok(()),
        }
    }
}

/// One adapted module in this many may be unknown.
const UNKNOWN: usize = 10;

/// Where blocks are in paths, what they are called, and how many the networks have.
fn containers(shape: &ModelShape) -> Vec<(&'static str, &'static str, usize)> {
    let mut containers = Vec::new();
    let flux1 = shape.transformer.as_ref();
    let flux1 = flux1.map(|config| (config.num_layers, config.num_single_layers));
    let flux2 = shape.flux2.as_ref();
    let flux2 = flux2.map(|config| (config.num_layers, config.num_single_layers));
    if let Some((double, single)) = flux2.or(flux1) {
        containers.extend([
            ("double_blocks", "double", double),
            ("transformer_blocks", "double", double),
            ("single_blocks", "single", single),
            ("single_transformer_blocks", "single", single),
        ]);
    }
    if let Some(clip) = &shape.clip {
        containers.push(("text_model.encoder.layers", "CLIP", clip.num_hidden_layers));
    }
    if let Some(t5) = &shape.t5 {
        containers.push(("encoder.block", "T5", t5.num_layers));
    }
    containers
}

/// Ends of modules that LoRAs for FLUX.1 are known to have beyond those that are adapted here: the embeddings and the
/// projection of CLIP and T5, and the embedder of the guidance for models that have none.
fn is_extra(parsed: &ParsedKey) -> bool {
    const EXTRAS: [&str; 7] = [
        "text_projection",
        "position_embedding",
        "token_embedding",
        "embed_tokens",
        "relative_attention_bias",
        "guidance_embedder",
        "guidance_in",
    ];
    let flat = flattened(&parsed.module);
    flat == "shared" || EXTRAS.iter().any(|extra| flat.contains(extra))
}

/// The version of a Stable Diffusion by the width of its text encoder.
fn diffusion_version(source: &Source, model: &'static str) -> &'static str {
    if model != "Stable Diffusion" {
        return model;
    }
    let width = source.file.names().find_map(|key| {
        let parsed = parse(key).filter(|parsed| parsed.param == Param::DOWN)?;
        flattened(&parsed.module)
            .ends_with("attn2_to_k")
            .then(|| source.file.info(key)?.shape.get(1).copied())?
    });
    match width {
        Some(768) => "Stable Diffusion 1",
        Some(1024) => "Stable Diffusion 2",
        Some(2048) => "Stable Diffusion XL",
        _ => model,
    }
}

/// Why a key is no part of a LoRA, if it is none.
fn noise(key: &str) -> Option<&'static str> {
    if key.starts_with("bundle_emb.") {
        Some("a bundled text embedding")
    } else if key.starts_with("_aux.") || key.contains("._aux.") {
        Some("bookkeeping of a slider tool")
    } else {
        None
    }
}

/// Why a whole weight or bias in the file is not meant to be used, if it is not.
fn unused_value(
    config: Option<&LoraConfig>,
    target: &Target,
    key: &str,
    param: Param,
) -> Option<&'static str> {
    let saved = || {
        let saved = config.map_or(&[][..], |config| &config.modules_to_save);
        let parameter = format!("{}.weight", target.name);
        saved.iter().any(|entry| is_saved(&parameter, entry))
    };
    let linear = target.spelling == Spelling::Text
        || !matches!(target.shape, super::ModuleShape::Norm { .. });
    match param {
        Param::SET if linear && !key.ends_with("set_weight") && !saved() => {
            Some("a whole weight, not a change of one")
        }
        Param::SetBias
            if !saved() && !config.is_some_and(|config| config.bias != TrainBias::None) =>
        {
            Some("a whole bias, which the configuration does not say is trained")
        }
        _ => None,
    }
}

enum Merged {
    Same,
    Joined,
    Conflict,
}

/// Adds to an update what another key says about the same module.
fn merge(earlier: &mut ModuleUpdate, new: ModuleUpdate) -> Result<Merged, LoraFormatError> {
    let mut outcome = Merged::Same;
    if new.factors.is_some() {
        if earlier.factors.is_none() {
            let bias = earlier.bias.take();
            if new.bias.is_some() && bias.is_some() {
                return Ok(Merged::Conflict);
            }
            *earlier = ModuleUpdate {
                bias: bias.or(new.bias),
                ..new
            };
            return Ok(Merged::Joined);
        }
        if !same_weight(earlier, &new)? {
            return Ok(Merged::Conflict);
        }
    }
    if new.bias.is_some() {
        if earlier.bias.is_none() && !matches!(new.bias, Some(Bias::Scaled(_))) {
            earlier.bias = new.bias;
            outcome = Merged::Joined;
        } else if !same_bias(earlier, &new)? {
            return Ok(Merged::Conflict);
        }
    }
    Ok(outcome)
}

/// Input channels of the LoRA's `x_embedder`, if they are more than the network's.
fn widened(set: &LoraSet, shape: &ModelShape) -> Option<usize> {
    let (_, input) = set.transformer.get("x_embedder")?.size()?;
    let channels = shape.transformer.as_ref()?.in_channels;
    (input > channels).then_some(input)
}

/// What to call the format and the algorithm of a module.
fn formats(prefix: &str, target: &Target, group: &Group, update: &ModuleUpdate) -> Vec<String> {
    let has = |part: &str| group.params.values().any(|key| key.contains(part));
    let format = match (prefix, target.spelling) {
        (_, Spelling::XLabs) => "XLabs",
        (_, Spelling::Indexed) => "OneTrainer OMI",
        ("lora_unet", Spelling::Bfl) => "kohya",
        ("lora_unet", _) => "kohya with diffusers names",
        ("lora_transformer", _) => "OneTrainer",
        ("lycoris", _) => "LyCORIS",
        ("diffusion_model.", Spelling::Bfl) => "ComfyUI",
        ("diffusion_model.", _) => "ComfyUI with diffusers names",
        ("base_model.model.", Spelling::Bfl) => "fal",
        ("base_model.model.", _) => "PEFT",
        ("transformer." | "unet.", Spelling::Bfl) => "diffusers prefix with BFL names",
        ("transformer." | "unet.", _) if has(".lora_down.") => "diffusers with kohya parameters",
        ("transformer." | "unet.", _) if has("lora.down.") => "diffusers, old",
        ("transformer." | "unet.", _) => "diffusers",
        ("", Spelling::Bfl) => "BFL",
        ("", Spelling::Diffusers) => "diffusers without prefix",
        (prefix, _) if prefix.starts_with("lora_te") => "kohya text encoder",
        (prefix, _) if prefix.starts_with("text_encoders") => "ComfyUI text encoder",
        _ => "diffusers text encoder",
    };
    let algorithm = update.kind().filter(|kind| *kind != Kind::Lora);
    let dora = update.magnitude.as_ref().map(|_| "DoRA");
    let algorithm = algorithm.map(|kind| kind.to_string());
    let said = [Some(format), dora].map(|said| said.map(str::to_string));
    said.into_iter().chain([algorithm]).flatten().collect()
}

/// What a header or a missing configuration lets one expect that the tensors do not say.
fn warn_about_source(
    source: &Source,
    modules: &BTreeMap<String, Module<'_>>,
    warnings: &mut Vec<String>,
) {
    let metadata = source.file.metadata();
    let states_alpha = modules
        .values()
        .any(|module| module.group.params.contains_key(&Param::Alpha));
    let configured = source.config.is_some() || !source.header.is_empty();
    if !states_alpha && !configured {
        let peft = modules.values().any(|module| {
            module.prefix == "base_model.model." && module.target.spelling != Spelling::Bfl
        });
        if peft {
            warnings.push(
                "no `adapter_config.json` beside the weights: alpha is taken to equal the rank"
                    .into(),
            );
        }
        let number = |key: &str| metadata.get(key).and_then(|text| text.parse::<f64>().ok());
        let alpha = ["ss_network_alpha", "network_alpha", "lora_alpha", "alpha"]
            .iter()
            .find_map(|key| number(key));
        let rank = ["ss_network_dim", "network_dim", "rank", "r"]
            .iter()
            .find_map(|key| number(key));
        if let (Some(alpha), Some(rank)) = (alpha, rank)
            && alpha != rank
        {
            warnings.push(format!(
                "the header says alpha {alpha} at rank {rank}, but no tensor does: the scale is 1, as other programs read it"
            ));
        }
    }
    let args = metadata
        .get("ss_network_args")
        .map(String::as_str)
        .unwrap_or_default();
    if args.replace(' ', "").contains(r#""split_qkv":"True""#) {
        warnings.push(
            "trained with kohya's split_qkv, whose files say a scale of a third (qkv) or a quarter (linear1) of the trained one; it is read as the file says"
                .into(),
        );
    }
}
