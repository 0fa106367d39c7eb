//! One adapter made of several: PEFT's `add_weighted_adapter`.
//!
//! The new adapter has scale 1 in every layer. Two things PEFT 0.19.1 gets wrong are right here: its `svd` multiplies each
//! adapter by its scale twice, and with rsLoRA sources its result is `sqrt(r)` too strong (PEFT pull request 3449).
//!
//! Source: PEFT 0.19 `LoraModel.add_weighted_adapter`.

use std::collections::{BTreeMap, BTreeSet};

use burn::module::Module;

use crate::adapters::edit;
use crate::attach::attach;
use crate::error::LoraError;
use crate::files::host::HostTensor;
use crate::kinds::factors::Factors;
use crate::kinds::module::ModuleAdapter;
use crate::kinds::parts::{Kind, LORA_A, LORA_B};
use crate::kinds::spec::AdapterSpec;
use crate::linalg::{Matrix, Svd, qr};
use crate::peft::file::AdapterFile;

/// How the factors of several adapters become those of one; `w` is an adapter's weight, `s` its scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Combination {
    /// `A = Σ ±√|w s| A`, `B = Σ √|w s| B`: equal ranks only, and with products of different adapters in the update.
    Linear,
    /// Factors side by side: exactly `Σ w s B A`, with the sum of the ranks.
    Cat,
    /// The best approximation of `Σ w s B A` with this rank; the largest rank of the adapters if `None`.
    Svd {
        /// Rank of the result, less where the update has less.
        rank: Option<usize>,
    },
}

/// Adds adapter `name`, made of `adapters` with their weights; it is neither active nor trained, the others stay as they are.
///
/// The run-time strengths of [`set_adapters`](crate::set_adapters) do not count. One adapter alone is combined linearly.
///
/// # Errors
/// A name that is not attached or is taken; what [`AdapterFile::combine`] refuses.
pub fn add_weighted_adapter<M: Module>(
    model: M,
    adapters: &[(&str, f64)],
    name: &str,
    combination: Combination,
) -> Result<M, LoraError> {
    let files = adapters
        .iter()
        .map(|(name, weight)| Ok((AdapterFile::from_model(&model, name, None)?, *weight)))
        .collect::<Result<Vec<_>, LoraError>>()?;
    let sources: Vec<(&AdapterFile, f64)> = files.iter().map(|(file, w)| (file, *w)).collect();
    let combined = AdapterFile::combine(&sources, combination)?;
    let model = attach(model, combined.stored().named(name).fast())?;
    Ok(edit(model, |_, adapters| {
        adapters.each(|mut adapter| {
            if adapter.name != name {
                return adapter;
            }
            adapter.active = false;
            adapter.set_trainable(false)
        })
    }))
}

impl AdapterFile {
    /// One adapter of several with weights, for every layer that any of them has.
    ///
    /// # Errors
    /// No adapters, a weight or factor that is not finite, anything but plain LoRAs of linear layers, a layer of unequal sizes,
    /// unequal ranks in a linear combination.
    pub fn combine(adapters: &[(&Self, f64)], combination: Combination) -> Result<Self, LoraError> {
        let fail = |text: String| Err(LoraError::Config(text));
        if adapters.is_empty() {
            return fail("there are no adapters to combine".into());
        }
        if let Some((_, weight)) = adapters.iter().find(|(_, weight)| !weight.is_finite()) {
            return fail(format!(
                "the weight of an adapter is {weight}; it must be finite"
            ));
        }
        if let Combination::Svd { rank: Some(0) } = combination {
            return fail("the rank of a combination must be at least 1".into());
        }
        for (file, _) in adapters {
            file.check_finite()?;
        }
        let adapters: Vec<(Self, f64)> = adapters
            .iter()
            .map(|(file, weight)| (file.to_plain(), *weight))
            .collect();
        let combination = match adapters.len() {
            1 => Combination::Linear,
            _ => combination,
        };
        if let Some(key) = adapters.iter().find_map(|(f, _)| f.whole().keys().next()) {
            return fail(format!(
                "`{key}` is trained in full, which cannot be combined; merge the adapters instead"
            ));
        }
        let layers: BTreeSet<&String> = adapters
            .iter()
            .flat_map(|(f, _)| f.modules().keys())
            .collect();
        let ranks = adapters.iter().flat_map(|(f, _)| f.modules().values());
        let largest = ranks.map(|module| module.spec.rank).max().unwrap_or(1);
        let mut modules = BTreeMap::new();
        for layer in layers {
            let mut parts: Vec<Part> = Vec::new();
            for (file, weight) in &adapters {
                let Some(module) = file.modules().get(layer) else {
                    continue;
                };
                let Some(part) = Part::of(module, *weight) else {
                    return fail(format!(
                        "`{layer}` is not a plain LoRA of a linear layer (LoHa, LoKr, DoRA, `lora_bias`, convolutions and embeddings cannot be combined); merge the adapters instead"
                    ));
                };
                if let Some(first) = parts.first().filter(|first| first.size() != part.size()) {
                    let ([out, inputs], [other_out, other_inputs]) = (first.size(), part.size());
                    return fail(format!(
                        "`{layer}` is a layer [{out}, {inputs}] in one adapter and [{other_out}, {other_inputs}] in another: are they for the same model?"
                    ));
                }
                parts.push(part);
            }
            let (a, b) = match combination {
                Combination::Linear => {
                    if let Some(other) = parts.iter().find(|part| part.a.rows != parts[0].a.rows) {
                        return fail(format!(
                            "`{layer}` has ranks {} and {}; a linear combination needs equal ones, `cat` and `svd` do not",
                            parts[0].a.rows, other.a.rows
                        ));
                    }
                    linear(&parts)
                }
                Combination::Cat => side_by_side(&parts),
                Combination::Svd { rank } => {
                    let (a, b) = side_by_side(&parts);
                    best(&a, &b, rank.unwrap_or(largest))
                }
            };
            let tensor = |m: &Matrix| HostTensor::from_f32([m.rows, m.cols], &m.to_f32());
            let spec = AdapterSpec {
                rank: a.rows,
                alpha: a.rows as f64,
                use_rslora: false,
                dropout: 0.0,
            };
            let factors = Factors::lora(tensor(&a), tensor(&b));
            modules.insert(layer.clone(), ModuleAdapter::new(spec, factors));
        }
        Ok(Self::new(modules))
    }
}

fn matrix(tensor: &HostTensor) -> Matrix {
    Matrix::new(tensor.shape[0], tensor.shape[1], tensor.to_f64())
}

/// Factors of one adapter in one layer; the weight contains the scale.
struct Part {
    a: Matrix,
    b: Matrix,
    weight: f64,
}

impl Part {
    /// Of the layer, `[out, in]`.
    fn size(&self) -> [usize; 2] {
        [self.b.rows, self.a.cols]
    }

    /// `None` for anything but a plain LoRA of a linear layer.
    fn of(module: &ModuleAdapter, weight: f64) -> Option<Self> {
        let factors = &module.factors;
        let is_plain = factors.kind() == Kind::Lora
            && !module.use_dora
            && !module.embedding
            && !module.has_bias()
            && factors[LORA_A].shape.len() == 2;
        is_plain.then(|| Self {
            a: matrix(&factors[LORA_A]),
            b: matrix(&factors[LORA_B]),
            weight: weight * module.spec.scale(),
        })
    }
}

/// The sign of a weight goes to A alone.
fn linear(parts: &[Part]) -> (Matrix, Matrix) {
    let sum = |side: fn(&Part) -> &Matrix, factor: fn(f64) -> f64| {
        let mut sum: Option<Matrix> = None;
        for part in parts {
            let part = side(part).clone().scaled(factor(part.weight));
            sum = Some(match sum {
                None => part,
                Some(mut sum) => {
                    sum.data
                        .iter_mut()
                        .zip(part.data)
                        .for_each(|(s, p)| *s += p);
                    sum
                }
            });
        }
        sum.unwrap_or_else(|| Matrix::zeros(0, 0))
    };
    let a = sum(
        |part| &part.a,
        |w| w.abs().sqrt() * if w < 0.0 { -1.0 } else { 1.0 },
    );
    (a, sum(|part| &part.b, |w| w.abs().sqrt()))
}

fn side_by_side(parts: &[Part]) -> (Matrix, Matrix) {
    let (mut a, mut b) = (Vec::new(), Vec::new()); // b by columns
    for part in parts {
        a.extend(part.a.clone().scaled(part.weight).data);
        b.extend(part.b.transposed().data);
    }
    let rank = parts.iter().map(|part| part.a.rows).sum();
    let cut = |v: Vec<f64>| Matrix::new(rank, v.len() / rank, v);
    (cut(a), cut(b).transposed())
}

/// The singular value decomposition of `B A` through triangles of the size of its rank; `S` goes to B.
fn best(a: &Matrix, b: &Matrix, rank: usize) -> (Matrix, Matrix) {
    let (qa, ra) = qr(&a.transposed()); // Aᵀ = qa ra
    let (qb, rb) = qr(b);
    let svd = Svd::complete(&rb.times(&ra.transposed()));
    let rank = rank.min(svd.s.len());
    let a = svd.v.top(rank).times(&qa.transposed());
    let b = svd
        .u
        .top(rank)
        .scale_rows(&svd.s[..rank])
        .times(&qb.transposed());
    (a, b.transposed())
}
