//! Factors that do not start from zero: `orthogonal`, and those split off the base weight, `pissa` and `olora`.
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
//! Source: PEFT 0.19 `LoraLayer.{pissa,olora,orthogonal}_init`, `LoraModel.subtract_mutated_init`.

use std::collections::BTreeMap;

use burn::module::Module;

use crate::adapter::AdapterSpec;
use crate::error::LoraError;
use crate::files::host::HostTensor;
use crate::kinds::factors::{Initial, LoraFactors};
use crate::linalg::{Matrix, Svd, qr};
use crate::peft::config::{InitLoraWeights, LoraConfig};
use crate::peft::file::ModuleAdapter;
use crate::random::{Stream, name_hash};
use crate::site::{Site, WeightLayout};
use crate::state::each_parameter;

/// Refuses a layer that cannot start as `config` says.
pub(crate) fn check(config: &LoraConfig, site: &Site) -> Result<(), LoraError> {
    let method = config.init_lora_weights;
    if !method.splits_base() && method != InitLoraWeights::Orthogonal {
        return Ok(());
    }
    let (rank, _) = config.resolve(&site.key)?;
    let (inputs, outputs) = (site.inputs(), site.outputs());
    let fail = |what: String| {
        Err(LoraError::Config(format!(
            "`init_lora_weights` {method}: `{}` {what}",
            site.key
        )))
    };
    if site.layout != WeightLayout::InOut {
        return fail("is no linear layer; leave it out of `target_modules`".into());
    }
    if method.splits_base() && rank > inputs.min(outputs) {
        return fail(format!(
            "has {inputs} inputs and {outputs} outputs, too few for rank {rank}; lower `r` or set `rank_pattern`"
        ));
    }
    if method == InitLoraWeights::Orthogonal && !rank.is_multiple_of(2) {
        return fail(format!("has rank {rank}; it must be even"));
    }
    Ok(())
}

/// `orthogonal`: A `[rank, inputs]` and B `[outputs, rank]`, whose product is zero, from the even and odd rows of one
/// orthogonal matrix. The rank is even.
pub(crate) fn orthogonal(site: &Site, rank: usize, seed: u64) -> (Vec<f32>, Vec<f32>) {
    let mut stream = Stream::new(seed, "init_orthogonal", 0, name_hash(&site.key));
    let (q, _) = qr(&Matrix::normal(rank, rank, &mut stream));
    let every_other = |first: usize| {
        let rows = (first..rank).step_by(2).flat_map(|i| q.row(i).to_vec());
        Matrix::new(rank / 2, rank, rows.collect())
    };
    let a = Matrix::normal(site.inputs(), rank / 2, &mut stream).times(&every_other(0));
    let b = Matrix::normal(site.outputs(), rank / 2, &mut stream).times(&every_other(1));
    (to_f32(&a.transposed().scaled(0.1)), to_f32(&b.scaled(0.1)))
}

/// The factors that `config` splits off the weights of the layers.
///
/// # Errors
/// A base weight that is not finite.
pub(crate) fn split_off<M: Module>(
    model: &M,
    config: &LoraConfig,
    layers: &[&str],
    seed: u64,
) -> Result<BTreeMap<String, Initial<HostTensor>>, LoraError> {
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
) -> Result<Initial<HostTensor>, LoraError> {
    if let Some(index) = weight.first_non_finite() {
        let key = format!("{layer}.weight");
        return Err(LoraError::NotFinite { key, index });
    }
    let method = config.init_lora_weights;
    let (rank, alpha) = config.resolve(layer)?;
    let spec = AdapterSpec {
        rank,
        alpha,
        use_rslora: config.use_rslora,
        dropout: 0.0,
    };
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
    Ok(Initial {
        method,
        lora_a: HostTensor::from_f32([rank, inputs], &to_f32(&a)),
        lora_b: HostTensor::from_f32([outputs, rank], &to_f32(&b)),
    })
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

fn to_f32(matrix: &Matrix) -> Vec<f32> {
    matrix.data.iter().map(|&v| v as f32).collect()
}

/// The same update without anything to start from: `[A; A₀]`, `[B, -B₀]`, rank and alpha such that the scale stays.
pub(crate) fn plain(module: &ModuleAdapter) -> ModuleAdapter {
    let Some((lora, initial)) = module
        .as_lora()
        .and_then(|lora| Some((lora, lora.initial.as_ref()?)))
    else {
        return module.clone();
    };
    let rank = module.spec.rank;
    let (inputs, outputs) = (lora.lora_a.shape[1], lora.lora_b.shape[0]);
    let lora_a = [lora.lora_a.to_f32(), initial.lora_a.to_f32()].concat();
    let (b, b0) = (lora.lora_b.to_f32(), initial.lora_b.to_f32());
    let rows = b.chunks(rank).zip(b0.chunks(rank));
    let lora_b: Vec<f32> = rows
        .flat_map(|(b, b0)| b.iter().copied().chain(b0.iter().map(|v| -v)))
        .collect();
    let factors = LoraFactors {
        lora_a: HostTensor::from_f32([2 * rank, inputs], &lora_a),
        lora_b: HostTensor::from_f32([outputs, 2 * rank], &lora_b),
        initial: None,
        ..lora.clone()
    };
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
        ..ModuleAdapter::lora(spec, factors)
    }
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
    let (rank, alpha) = config.resolve(layer)?;
    let method = config.init_lora_weights;
    let Some(lora) = module.as_lora().filter(|_| method.splits_base()) else {
        return Ok(None);
    };
    let (&[a, _], &[outputs, b]) = (lora.lora_a.shape.as_slice(), lora.lora_b.shape.as_slice())
    else {
        return Ok(None);
    };
    if a != b || !a.is_multiple_of(2) || a / 2 != rank {
        return Ok(None);
    }
    let b = lora.lora_b.to_f32();
    let half = |skip: usize, sign: f32| {
        let rows = b.chunks(2 * rank).flat_map(|row| &row[skip..skip + rank]);
        let values: Vec<f32> = rows.map(|v| sign * v).collect();
        HostTensor::from_f32([outputs, rank], &values)
    };
    let factors = LoraFactors {
        initial: Some(Initial {
            method,
            lora_a: lora.lora_a.rows(rank..2 * rank),
            lora_b: half(rank, -1.0),
        }),
        lora_a: lora.lora_a.rows(0..rank),
        lora_b: half(0, 1.0),
        ..lora.clone()
    };
    let spec = AdapterSpec {
        rank,
        alpha,
        use_rslora: config.use_rslora,
        dropout: config.lora_dropout,
    };
    let cut = ModuleAdapter::lora(spec, factors);
    Ok(Some(cut).filter(|cut| plain(cut).spec == module.spec))
}
