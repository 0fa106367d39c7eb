//! The first values of fresh factors: `true` and `false` (Kaiming), `gaussian`, `orthogonal`, and what goes with them.
//!
//! Source: PEFT 0.19 `LoraLayer.{reset_lora_parameters,orthogonal_init}`.

use crate::error::LoraError;
use crate::files::host::HostTensor;
use crate::kinds::factors::Factors;
use crate::kinds::lycoris;
use crate::kinds::module::ModuleAdapter;
use crate::kinds::parts::{INITIAL_A, INITIAL_B, LORA_A, LORA_B, LORA_BIAS};
use crate::linalg::{Matrix, qr};
use crate::peft::config::{InitLoraWeights, LoraConfig};
use crate::peft::selection::PeftType;
use crate::random::{Stream, name_hash};
use crate::site::{Site, WeightLayout};

/// The smaller side of the largest weight that is decomposed exactly: the time grows with its cube.
const EXACT_SVD: usize = 1024;

/// Refuses a layer that cannot start as `config` says.
pub(crate) fn check(config: &LoraConfig, site: &Site) -> Result<(), LoraError> {
    let refuse = |what: String| Err(LoraError::Config(what));
    if site.layout == WeightLayout::Table {
        if config.peft_type != PeftType::Lora {
            return refuse(format!(
                "`{}` is an embedding, which `peft_type` {} does not adapt",
                site.key, config.peft_type
            ));
        }
        if config.lora_bias {
            return refuse(format!(
                "`{}` is an embedding, which `lora_bias` does not adapt",
                site.key
            ));
        }
    }
    let method = config.init_lora_weights;
    if !method.splits_base() && method != InitLoraWeights::Orthogonal {
        return Ok(());
    }
    let (rank, _) = config.resolve(&site.key)?;
    let (inputs, outputs) = (site.inputs(), site.outputs());
    let refuse = |what: String| {
        refuse(format!(
            "`init_lora_weights` {method}: `{}` {what}",
            site.key
        ))
    };
    if site.layout != WeightLayout::InOut {
        return refuse("is no linear layer; leave it out of `target_modules`".into());
    }
    if method.splits_base() && rank > inputs.min(outputs) {
        return refuse(format!(
            "has {inputs} inputs and {outputs} outputs, too few for rank {rank}; lower `r` or set `rank_pattern`"
        ));
    }
    if method == InitLoraWeights::Pissa && inputs.min(outputs) > EXACT_SVD {
        return refuse(format!(
            "is [{outputs}, {inputs}], and the exact decomposition of a weight whose smaller side is over {EXACT_SVD} takes too long; use `pissa_niter_4`, which is nearly the same"
        ));
    }
    if method == InitLoraWeights::Orthogonal && !rank.is_multiple_of(2) {
        return refuse(format!("has rank {rank}; it must be even"));
    }
    Ok(())
}

/// Fresh factors of a layer that [`check`] has passed; `split` are those that were split off its base weight.
///
/// # Errors
/// A pattern of the configuration that is not a regular expression.
pub(crate) fn fresh(
    site: &Site,
    config: &LoraConfig,
    seed: u64,
    split: Option<[HostTensor; 2]>,
) -> Result<ModuleAdapter, LoraError> {
    let spec = config.spec(&site.key)?;
    let rank = spec.rank;
    let factors = match config.peft_type {
        PeftType::Lora => lora(site, rank, config, seed, split.as_ref()),
        PeftType::Loha | PeftType::Lokr => lycoris::fresh(site, rank, config, seed),
    };
    Ok(ModuleAdapter {
        use_dora: config.use_dora && config.peft_type == PeftType::Lora,
        embedding: site.layout == WeightLayout::Table,
        split: split.map(|_| config.init_lora_weights),
        ..ModuleAdapter::new(spec, factors)
    })
}

fn lora(
    site: &Site,
    rank: usize,
    config: &LoraConfig,
    seed: u64,
    split: Option<&[HostTensor; 2]>,
) -> Factors<HostTensor> {
    use InitLoraWeights::{Gaussian, Orthogonal, Random};
    let (inputs, outputs) = (site.inputs(), site.outputs());
    let is_embedding = site.layout == WeightLayout::Table;
    let init = config.init_lora_weights;
    let stream = |name: &str| Stream::new(seed, name, 0, name_hash(&site.key));
    let uniform = |name: &str, n: usize, bound: f64| -> Vec<f32> {
        let mut stream = stream(name);
        let value = |_| ((2.0 * stream.uniform() - 1.0) * bound) as f32;
        (0..n).map(value).collect()
    };
    let normal = |name: &str, n: usize| stream(name).normals(n);
    let a = || match init {
        // PEFT starts embeddings the other way round: A zero, B standard normal.
        Random if is_embedding => normal("init_lora_a", rank * inputs),
        _ if is_embedding => vec![0.0; rank * inputs],
        Gaussian => {
            let values = normal("init_lora_a", rank * inputs);
            values.into_iter().map(|v| v / rank as f32).collect()
        }
        _ => uniform("init_lora_a", rank * inputs, 1.0 / (inputs as f64).sqrt()),
    };
    let b = || match init {
        _ if is_embedding => normal("init_lora_b", outputs * rank),
        Random => uniform("init_lora_b", outputs * rank, 1.0 / (rank as f64).sqrt()),
        _ => vec![0.0; outputs * rank],
    };
    let (a, b) = match (init, split) {
        (_, Some([a, b])) => (a.to_f32(), b.to_f32()),
        (Orthogonal, _) => orthogonal(site, rank, seed),
        _ => (a(), b()),
    };
    let mut factors = Factors::lora(
        HostTensor::from_f32(site.file_shape(LORA_A, &[rank, inputs]), &a),
        HostTensor::from_f32(site.file_shape(LORA_B, &[outputs, rank]), &b),
    );
    if config.lora_bias {
        let zeros = HostTensor::from_f32([outputs], &vec![0.0; outputs]);
        factors = factors.with(LORA_BIAS, zeros);
    }
    if let Some([a, b]) = split {
        factors = factors
            .with(INITIAL_A, a.clone())
            .with(INITIAL_B, b.clone());
    }
    factors
}

/// `orthogonal`: A `[rank, inputs]` and B `[outputs, rank]`, whose product is zero, from the even and odd rows of one
/// orthogonal matrix. The rank is even.
fn orthogonal(site: &Site, rank: usize, seed: u64) -> (Vec<f32>, Vec<f32>) {
    let mut stream = Stream::new(seed, "init_orthogonal", 0, name_hash(&site.key));
    let (q, _) = qr(&Matrix::normal(rank, rank, &mut stream));
    let every_other = |first: usize| {
        let rows = (first..rank).step_by(2).flat_map(|i| q.row(i).to_vec());
        Matrix::new(rank / 2, rank, rows.collect())
    };
    let a = Matrix::normal(site.inputs(), rank / 2, &mut stream).times(&every_other(0));
    let b = Matrix::normal(site.outputs(), rank / 2, &mut stream).times(&every_other(1));
    (a.transposed().scaled(0.1).to_f32(), b.scaled(0.1).to_f32())
}
