//! The keys and tensors of each format.
//!
//! | | scale | biases | DoRA | other |
//! |---|---|---|---|---|
//! | diffusers, PEFT | folded, or in the configuration | `lora_B.bias`, or whole | `lora_magnitude_vector [out]` | whole weights |
//! | kohya, ComfyUI | alpha on every module | `diff_b`, scale folded | `dora_scale [out, 1]` or `[1, in]` | LoKr, LoHa, `diff`; `set_weight` (ComfyUI) |
//! | ComfyUI for FLUX.2 | folded | as above | as above | as above |

use std::collections::BTreeSet;

use lora_core::files::host::{Dtype, HostTensor};
use lora_core::kinds::parts::{Kind, LORA_A, LORA_B};

use super::error::LoraFormatError;
use super::format::Loss;
use super::fuse::{FuseError, Piece, assemble, fuse};
use super::lycoris::{to_full, to_low_rank};
use super::names::{Names, Target};
use super::split::split;
use super::tensor::TensorRef;
use super::{Axis, Bias, Component, Factors, LoraSet, ModuleUpdate};

/// One tensor of a file to be written.
pub(super) struct Output {
    pub key: String,
    pub tensor: TensorRef,
    /// As written; the same elements as the tensor's own shape.
    pub shape: Vec<usize>,
    /// Where it does not follow the dtype of the file.
    pub dtype: Option<Dtype>,
}

impl Output {
    pub(super) fn new(key: String, tensor: TensorRef) -> Self {
        Self {
            key,
            shape: tensor.shape(),
            tensor,
            dtype: None,
        }
    }

    pub(super) fn scaled(key: String, tensor: &TensorRef, scale: f64) -> Self {
        let piece = Piece {
            row: 0,
            column: 0,
            scale,
            tensor: tensor.clone(),
        };
        Self::new(key, assemble(tensor.shape(), vec![piece]))
    }

    fn fixed(key: String, value: HostTensor) -> Self {
        Self {
            dtype: Some(value.dtype),
            ..Self::new(key.clone(), TensorRef::host(&key, value))
        }
    }
}

/// What is written of a set, and what is not.
#[derive(Default)]
pub(super) struct Emitted {
    pub outputs: Vec<Output>,
    pub losses: Vec<Loss>,
    /// What readers of the format do with some of it.
    pub notes: BTreeSet<&'static str>,
    pub modules: usize,
    /// Ranks of the network's modules where no tensor says alpha.
    pub ranks: Vec<(String, usize)>,
}

impl Emitted {
    pub(super) fn lose(&mut self, component: Component, path: &str, reason: &'static str) {
        self.losses.push(Loss {
            module: format!("{component}.{path}"),
            reason: reason.into(),
        });
    }

    /// Without an alpha, diffusers before August 2026 takes the rank of one module for that of all.
    fn describe(&mut self, style: Style, update: &ModuleUpdate, target: &Target) {
        if let (Style::Portable, Some(rank)) = (style, update.rank()) {
            let paths = target.places.iter().map(|place| place.path.clone());
            self.ranks.extend(paths.map(|path| (path, rank)));
        }
    }
}

/// Alpha that gives the update's scale: as stated if that still holds.
pub(super) fn alpha(update: &ModuleUpdate, rank: usize) -> f64 {
    let stated = update
        .alpha
        .filter(|alpha| alpha / rank as f64 == update.scale);
    stated.unwrap_or(update.scale * rank as f64)
}

/// How kohya's and ComfyUI's formats spell a module.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Style {
    Kohya,
    ComfyUi,
    /// ComfyUI's names with PEFT's parameters: diffusers takes any other file with `lora_down` for kohya's, and stops at an
    /// alpha.
    Portable,
}

impl Style {
    fn module(self, component: Component, path: &str) -> String {
        match (self, component) {
            (Self::Kohya, _) => {
                let prefix = match component {
                    Component::Transformer => "lora_unet",
                    Component::ClipL => "lora_te1",
                    Component::T5 => "lora_te3",
                };
                format!("{prefix}_{}", path.replace('.', "_"))
            }
            (_, Component::Transformer) => format!("diffusion_model.{path}"),
            (_, Component::ClipL) => format!("text_encoders.clip_l.transformer.{path}"),
            (_, Component::T5) => format!("text_encoders.t5xxl.transformer.{path}"),
        }
    }
}

/// All components with kohya's parameters; the transformer's modules as BFL has them.
pub(super) fn fused(
    set: &LoraSet,
    style: Style,
    emitted: &mut Emitted,
) -> Result<(), LoraFormatError> {
    let set = &without_whole(set, style != Style::Kohya, emitted);
    let names = Names::new(&set.shape);
    let mut left: BTreeSet<&String> = set.transformer.keys().collect();
    for target in names.bfl() {
        target.places.iter().for_each(|place| {
            left.remove(&place.path);
        });
        fused_target(set, target, style, emitted)?;
    }
    let ranks = set.transformer.values().filter_map(ModuleUpdate::rank);
    if style != Style::Portable && ranks.collect::<BTreeSet<_>>().len() > 1 {
        emitted.notes.insert("diffusers before August 2026 loads modules of another rank than the first at a wrong scale");
    }
    for path in left {
        emitted.lose(
            Component::Transformer,
            path,
            "the network the LoRA is said to be for has no such module",
        );
    }
    for component in [Component::ClipL, Component::T5] {
        for (path, update) in set.modules(component) {
            let module = style.module(component, path);
            emit(update, &module, style, emitted);
        }
    }
    Ok(())
}

/// The set without new values of biases, and without those of weights unless they are held.
pub(super) fn without_whole(
    set: &LoraSet,
    weights_are_held: bool,
    emitted: &mut Emitted,
) -> LoraSet {
    let mut kept = set.clone();
    for component in Component::ALL {
        kept.modules_mut(component).retain(|path, update| {
            if let Some(Bias::Replaced(_)) = update.bias {
                update.bias = None;
                emitted.lose(component, path, "it replaces the bias");
            }
            if update.replacement().is_some() && !weights_are_held {
                update.factors = None;
                emitted.lose(component, path, "it replaces the weight");
            }
            update.factors.is_some() || update.bias.is_some()
        });
    }
    kept
}

fn fused_target(
    set: &LoraSet,
    target: &Target,
    style: Style,
    emitted: &mut Emitted,
) -> Result<(), LoraFormatError> {
    let component = Component::Transformer;
    let parts: Vec<_> = target
        .places
        .iter()
        .map(|place| set.transformer.get(&place.path))
        .collect();
    let module = style.module(component, &target.name);
    if let ([_], [part]) = (target.places.as_slice(), parts.as_slice()) {
        if let Some(update) = part {
            // Exchanging halves is its own inverse.
            for update in split(update, &target.places) {
                emit(&update, &module, style, emitted);
                emitted.describe(style, &update, target);
                emit_reshape(target, &update, set, &module, style, emitted);
            }
        }
        return Ok(());
    }
    let rows: Vec<usize> = target
        .places
        .iter()
        .map(|place| place.rows.count())
        .collect();
    let paths: Vec<_> = target
        .places
        .iter()
        .map(|place| place.path.as_str())
        .collect();
    let obstacle = match fuse(&parts, &rows, &paths) {
        Ok(None) => return Ok(()),
        Ok(Some(update)) => {
            emit(&update, &module, style, emitted);
            emitted.describe(style, &update, target);
            return Ok(());
        }
        Err(FuseError::Failed(error)) => return Err(error),
        Err(FuseError::Obstacle(obstacle)) => obstacle,
    };
    for (path, update) in paths.iter().zip(&parts) {
        let Some(update) = update else { continue };
        let shared = |axis: &Axis| matches!(axis, Axis::Input { across } if across.len() > 1);
        let reason = if style == Style::Kohya {
            Some(obstacle)
        } else if update.bias.is_some() {
            Some("ComfyUI applies biases to whole modules only")
        } else if update
            .magnitude
            .as_ref()
            .is_some_and(|magnitude| shared(&magnitude.axis))
        {
            Some("its DoRA magnitude counts inputs of the fused module")
        } else {
            None
        };
        match reason {
            Some(reason) => emitted.lose(component, path, reason),
            None => {
                // ComfyUI patches the rows of the fused weight that this name stands for.
                emit(update, &format!("transformer.{path}"), style, emitted);
                emitted.notes.insert("modules that cannot be fused are named as in diffusers, which ComfyUI loads as well");
            }
        }
    }
    Ok(())
}

/// The size of an input that is wider than the network's.
fn emit_reshape(
    target: &Target,
    update: &ModuleUpdate,
    set: &LoraSet,
    module: &str,
    style: Style,
    emitted: &mut Emitted,
) {
    let channels = set
        .shape
        .transformer
        .as_ref()
        .map(|config| config.out_channels());
    if let ("img_in", Some((out, input))) = (target.name.as_str(), update.size())
        && style == Style::ComfyUi
        && Some(input) != channels
    {
        let shape = HostTensor::from_i64([2], &[out as i64, input as i64]);
        emitted
            .outputs
            .push(Output::fixed(format!("{module}.reshape_weight"), shape));
    }
}

/// One module with kohya's parameters.
fn emit(update: &ModuleUpdate, module: &str, style: Style, emitted: &mut Emitted) {
    let key = |suffix: &str| format!("{module}.{suffix}");
    emitted.modules += 1;
    let whole = match update.rows {
        Some(_) => to_low_rank(update).or_else(|| to_full(update)),
        None => None,
    };
    let update = whole.as_ref().unwrap_or(update);
    if let Some(factors) = &update.factors {
        emit_factors(factors, update, style, &key, emitted);
    }
    if let Some(bias) = &update.bias {
        let scale = if let Bias::Scaled(_) = bias {
            update.scale
        } else {
            1.0
        };
        emitted
            .outputs
            .push(Output::scaled(key("diff_b"), bias.tensor(), scale));
    }
    if let Some(magnitude) = &update.magnitude {
        let mut output = Output::new(key("dora_scale"), magnitude.values.clone());
        let len = magnitude.values.size().0;
        output.shape = match magnitude.axis {
            Axis::Output => {
                emitted.notes.insert(
                    "ComfyUI divides a DoRA of the output axis by the norm of the unchanged weight, which is not what was trained",
                );
                vec![len, 1]
            }
            Axis::Input { .. } => vec![1, len],
        };
        emitted.outputs.push(output);
    }
}

/// Factors under LyCORIS' names, and the alpha that gives their scale, unless it is folded.
fn emit_factors(
    factors: &Factors,
    update: &ModuleUpdate,
    style: Style,
    key: &dyn Fn(&str) -> String,
    emitted: &mut Emitted,
) {
    let kind = factors.kind();
    let rank = factors.rank_part().map(|part| part.size().0);
    let portable = style == Style::Portable;
    // Readers ignore alpha where there is no rank, so the scale has to be in one of the parts.
    let folded = match kind {
        Kind::Whole => None,
        Kind::Lora => portable.then_some(LORA_B),
        _ => factors
            .iter()
            .next()
            .map(|(part, _)| part)
            .filter(|_| portable || rank.is_none()),
    };
    for (part, tensor) in factors.iter() {
        let name = match part {
            LORA_A if portable => "lora_A.weight",
            LORA_B if portable => "lora_B.weight",
            LORA_A => "lora_down.weight",
            LORA_B => "lora_up.weight",
            _ if kind == Kind::Whole => "set_weight",
            _ => part.name,
        };
        let scale = if folded == Some(part) {
            update.scale
        } else {
            1.0
        };
        emitted
            .outputs
            .push(Output::scaled(key(name), tensor, scale));
    }
    if kind.peft_type().is_some() && !portable {
        let alpha = match rank {
            Some(rank) => alpha(update, rank),
            None => update
                .alpha
                .filter(|alpha| alpha.is_finite())
                .unwrap_or(1.0),
        };
        let value = HostTensor::from_f32([], &[alpha as f32]);
        emitted.outputs.push(Output::fixed(key("alpha"), value));
    }
}
