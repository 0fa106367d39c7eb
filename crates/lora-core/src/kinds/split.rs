//! Factors that start as a part of the base weight: `pissa` and `olora`.
//!
//! PEFT splits the base in place: `W` becomes `W - s B₀ A₀`, and the adapter is no update of the model it was made from
//! until it is converted. Here the base is never written to. The adapter keeps what it started from and its update is
//! `s (B A - B₀ A₀)`: the same function and the same gradients, but detaching gives `W` back bit for bit, switching off gives
//! the original model, and resuming needs neither a second decomposition nor a second base. The price is a second, frozen
//! side path of rank `r`. A strength other than 1 scales that whole update.
//!
//! What is saved is the update: a plain LoRA `[A; A₀]`, `[B, -B₀]` of rank `2r` for the original model, as PEFT's
//! `path_initial_model_for_weight_conversion` makes it. The header says where to cut it, so training goes on from it.
//!
//! Source: PEFT 0.19 `LoraLayer.{pissa,olora}_init`, `LoraModel.subtract_mutated_init`.

use std::collections::BTreeMap;

use burn::module::Module;

use crate::error::LoraError;
use crate::files::host::HostTensor;
use crate::kinds::factors::Factors;
use crate::kinds::module::ModuleAdapter;
use crate::kinds::parts::{INITIAL_A, INITIAL_B, LORA_A, LORA_B, LORA_BIAS, MAGNITUDE};
use crate::kinds::spec::AdapterSpec;
use crate::linalg::{Matrix, Svd, qr};
use crate::peft::config::{InitLoraWeights, LoraConfig};
use crate::random::{Stream, name_hash};
use crate::state::each_parameter;

/// The factors `[A, B]` that `config` splits off the weights of the layers.
///
/// # Errors
/// A base weight that is not finite.
pub(crate) fn split_off<M: Module>(
    model: &M,
    config: &LoraConfig,
    layers: &[&str],
    seed: u64,
) -> Result<BTreeMap<String, [HostTensor; 2]>, LoraError> {
    let layer = |path: &str| {
        let layer = path.strip_suffix(".weight")?;
        layers.contains(&layer).then(|| layer.to_string())
    };
    let mut split = Ok(BTreeMap::new());
    each_parameter(
        model,
        |path| layer(path).is_some(),
        |path, weight| {
            let (Ok(found), Some(layer)) = (&mut split, layer(&path)) else {
                return;
            };
            match factors(&layer, &weight, config, seed) {
                Ok(initial) => drop(found.insert(layer, initial)),
                Err(error) => split = Err(error),
            }
        },
    );
    split
}

/// The factors that are split off one weight, `[in, out]`.
fn factors(
    layer: &str,
    weight: &HostTensor,
    config: &LoraConfig,
    seed: u64,
) -> Result<[HostTensor; 2], LoraError> {
    if let Some(index) = weight.first_non_finite() {
        let key = format!("{layer}.weight");
        return Err(LoraError::NotFinite { key, index });
    }
    let method = config.init_lora_weights;
    let spec = AdapterSpec {
        dropout: 0.0,
        ..config.spec(layer)?
    };
    let rank = spec.rank;
    let (inputs, outputs) = (weight.shape[0], weight.shape[1]);
    let weight = Matrix::new(inputs, outputs, weight.to_f64()); // PEFT's is its transpose
    let (a, b) = match method {
        InitLoraWeights::PissaNiter(n) => {
            let mut stream = Stream::new(seed, "init_pissa", 0, name_hash(layer));
            roots(Svd::randomized(&weight, rank, n, &mut stream), &spec)
        }
        InitLoraWeights::Pissa => roots(Svd::complete(&weight), &spec),
        _ => {
            let (q, _) = qr(&weight.top(rank).transposed()); // R of PEFT's weight begins with qᵀ times it
            (weight.times(&q).transposed(), q)
        }
    };
    Ok([
        HostTensor::from_f32([rank, inputs], &a.to_f32()),
        HostTensor::from_f32([outputs, rank], &b.to_f32()),
    ])
}

/// The largest triplets of a weight `[in, out]`, each of the two sides with the root of `S / scale`.
fn roots(svd: Svd, spec: &AdapterSpec) -> (Matrix, Matrix) {
    let largest = svd.s[..spec.rank].iter();
    let roots: Vec<f64> = largest.map(|s| (s / spec.scale()).sqrt()).collect();
    (
        svd.u.top(spec.rank).scale_rows(&roots),
        svd.v.top(spec.rank).scale_rows(&roots).transposed(),
    )
}

/// The same update without anything to start from: `[A; A₀]`, `[B, -B₀]`, rank and alpha such that the scale stays.
pub(crate) fn plain(module: &ModuleAdapter) -> ModuleAdapter {
    let factors = &module.factors;
    let (Some(a0), Some(b0)) = (factors.get(INITIAL_A), factors.get(INITIAL_B)) else {
        return module.clone();
    };
    let (a, b) = (&factors[LORA_A], &factors[LORA_B]);
    let rank = module.spec.rank;
    let (inputs, outputs) = (a.shape[1], b.shape[0]);
    let lora_a = [a.to_f32(), a0.to_f32()].concat();
    let (b, b0) = (b.to_f32(), b0.to_f32());
    let rows = b.chunks(rank).zip(b0.chunks(rank));
    let lora_b: Vec<f32> = rows
        .flat_map(|(b, b0)| b.iter().copied().chain(b0.iter().map(|v| -v)))
        .collect();
    let plain = beside(
        factors,
        HostTensor::from_f32([2 * rank, inputs], &lora_a),
        HostTensor::from_f32([outputs, 2 * rank], &lora_b),
    );
    let growth = if module.spec.use_rslora {
        2f64.sqrt()
    } else {
        2.0
    };
    let spec = AdapterSpec {
        rank: 2 * rank,
        alpha: module.spec.alpha * growth,
        ..module.spec
    };
    ModuleAdapter {
        use_dora: module.use_dora,
        ..ModuleAdapter::new(spec, plain)
    }
}

/// Other projections with the magnitude and the bias of `factors`.
fn beside(factors: &Factors<HostTensor>, a: HostTensor, b: HostTensor) -> Factors<HostTensor> {
    let kept = [MAGNITUDE, LORA_BIAS].into_iter();
    let kept = kept.filter_map(|part| Some((part, factors.get(part)?.clone())));
    kept.fold(Factors::lora(a, b), |factors, (part, value)| {
        factors.with(part, value)
    })
}

/// Undoes [`plain`], exactly; `config` is that of the training. `None` if the module is not what `config` describes.
///
/// # Errors
/// A pattern of the configuration that is not a regular expression.
pub(crate) fn cut(
    layer: &str,
    module: &ModuleAdapter,
    config: &LoraConfig,
) -> Result<Option<ModuleAdapter>, LoraError> {
    let spec = config.spec(layer)?;
    let rank = spec.rank;
    let method = config.init_lora_weights;
    let factors = &module.factors;
    let (true, Some(a), Some(b)) = (
        method.splits_base(),
        factors.get(LORA_A),
        factors.get(LORA_B),
    ) else {
        return Ok(None);
    };
    let (&[columns, _], &[outputs, rows]) = (a.shape.as_slice(), b.shape.as_slice()) else {
        return Ok(None);
    };
    if columns != rows || columns % 2 != 0 || columns / 2 != rank {
        return Ok(None);
    }
    let b = b.to_f32();
    let half = |skip: usize, sign: f32| {
        let rows = b.chunks(2 * rank).flat_map(|row| &row[skip..skip + rank]);
        let values: Vec<f32> = rows.map(|v| sign * v).collect();
        HostTensor::from_f32([outputs, rank], &values)
    };
    let cut = beside(factors, a.rows(0..rank), half(0, 1.0))
        .with(INITIAL_A, a.rows(rank..2 * rank))
        .with(INITIAL_B, half(rank, -1.0));
    let cut = ModuleAdapter {
        split: Some(method),
        ..ModuleAdapter::new(spec, cut)
    };
    Ok(Some(cut).filter(|cut| plain(cut).spec == module.spec))
}
