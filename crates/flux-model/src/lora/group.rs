//! The keys of one module, checked and put together to an update.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use lora_core::files::safetensors::TensorFile;
use lora_core::kinds::Side;

use super::error::{KeyProblem, LoraFormatError};
use super::key::Param;
use super::lycoris::LoKr;
use super::names::Target;
use super::peft::{Algorithm, PeftConfig};
use super::shape::ModuleShape;
use super::tensor::TensorRef;
use super::{Axis, Bias, Factors, Magnitude, ModuleUpdate};

/// The keys of one module as the file names it.
#[derive(Debug, Default)]
pub(super) struct Group {
    /// Parameter to key.
    pub params: BTreeMap<Param, String>,
}

/// A group with what is needed to understand it.
pub(super) struct GroupReader<'a> {
    pub file: &'a Arc<TensorFile>,
    pub group: &'a Group,
    pub target: &'a Target,
    pub config: Option<&'a PeftConfig>,
    /// Things to tell the user.
    pub warnings: &'a mut Vec<String>,
}

impl Group {
    /// Adds a key.
    pub(super) fn insert(
        &mut self,
        path: &Path,
        param: Param,
        key: &str,
    ) -> Result<(), LoraFormatError> {
        match self.params.insert(param, key.into()) {
            None => Ok(()),
            Some(first) => Err(LoraFormatError::key(path, key, KeyProblem::Twice { first })),
        }
    }

    /// Rows and columns of the change, where the shapes alone show them.
    pub(super) fn size(&self, file: &TensorFile) -> (Option<usize>, Option<usize>) {
        let axis = |param, axis: usize| {
            let key = self.params.get(&param)?;
            file.info(key)?.shape.get(axis).copied()
        };
        let product = |a: Option<usize>, b: Option<usize>| a?.checked_mul(b?);
        let outer =
            |i| axis(Param::LokrW1, i).or_else(|| axis([Param::LokrW1A, Param::LokrW1B][i], i));
        let inner =
            |i| axis(Param::LokrW2, i).or_else(|| axis([Param::LokrW2A, Param::LokrW2B][i], i));
        let out = axis(Param::Up, 0)
            .or_else(|| axis(Param::HadaW1A, 0))
            .or_else(|| product(outer(0), inner(0)));
        let input = axis(Param::Down, 1)
            .or_else(|| axis(Param::HadaW1B, 1))
            .or_else(|| product(outer(1), inner(1)));
        let plain = |i| axis(Param::Diff, i).or_else(|| axis(Param::Set, i));
        let bias = || axis(Param::DiffBias, 0).or_else(|| axis(Param::UpBias, 0));
        (
            out.or_else(|| plain(0)).or_else(bias),
            input.or_else(|| plain(1)),
        )
    }
}

impl GroupReader<'_> {
    /// The update of the module as the file names it.
    pub(super) fn read(&mut self) -> Result<ModuleUpdate, LoraFormatError> {
        let factors = self.factors()?;
        let (alpha, scale) = match &factors {
            Some(factors) => self.scale(factors)?,
            None => (None, 1.0),
        };
        let bias = self.bias(factors.as_ref())?;
        let magnitude = self.magnitude(factors.as_ref())?;
        Ok(ModuleUpdate {
            factors,
            scale,
            alpha,
            bias,
            magnitude,
        })
    }

    fn key(&self, param: Param) -> Option<&str> {
        self.group.params.get(&param).map(String::as_str)
    }

    fn error(&self, key: &str, problem: KeyProblem) -> LoraFormatError {
        LoraFormatError::key(self.file.path(), key, problem)
    }

    fn tensor(&self, param: Param) -> Result<Option<TensorRef>, LoraFormatError> {
        self.key(param)
            .map(|key| TensorRef::in_file(self.file, key))
            .transpose()
    }

    /// A matrix without an empty axis.
    fn matrix(&self, param: Param) -> Result<Option<TensorRef>, LoraFormatError> {
        let Some(tensor) = self.tensor(param)? else {
            return Ok(None);
        };
        let found = tensor.shape();
        match found.as_slice() {
            [_, 0] | [0, _] => Err(self.error(tensor.key(), KeyProblem::RankZero)),
            [_, _] => Ok(Some(tensor)),
            _ => Err(self.error(tensor.key(), KeyProblem::Matrix { found })),
        }
    }

    /// A vector of `len` elements.
    fn vector(&self, param: Param, len: usize) -> Result<Option<TensorRef>, LoraFormatError> {
        let Some(tensor) = self.tensor(param)? else {
            return Ok(None);
        };
        self.expect(&tensor, &tensor.shape(), &[len])?;
        Ok(Some(tensor))
    }

    fn expect(
        &self,
        tensor: &TensorRef,
        found: &[usize],
        expected: &[usize],
    ) -> Result<(), LoraFormatError> {
        if found == expected {
            return Ok(());
        }
        let problem = KeyProblem::Shape {
            module: self.target.name.clone(),
            expected: expected.to_vec(),
            found: found.to_vec(),
        };
        Err(self.error(tensor.key(), problem))
    }

    /// Both tensors of a pair, with equal inner sizes.
    fn pair(
        &self,
        left: Param,
        right: Param,
    ) -> Result<Option<(TensorRef, TensorRef)>, LoraFormatError> {
        let (first, second) = match (self.matrix(left)?, self.matrix(right)?) {
            (None, None) => return Ok(None),
            (Some(first), Some(second)) => (first, second),
            (Some(lone), None) | (None, Some(lone)) => {
                let missing = partner(lone.key());
                return Err(self.error(lone.key(), KeyProblem::NoPartner { missing }));
            }
        };
        let (rank, other_rank) = (first.size().1, second.size().0);
        if rank != other_rank {
            let other = second.key().to_string();
            let problem = KeyProblem::Rank {
                rank,
                other,
                other_rank,
            };
            return Err(self.error(first.key(), problem));
        }
        Ok(Some((first, second)))
    }

    fn factors(&self) -> Result<Option<Factors>, LoraFormatError> {
        let forms = [
            self.low_rank()?,
            self.loha()?,
            self.lokr()?,
            self.plain(Param::Diff)?.map(Factors::Full),
            self.plain(Param::Set)?.map(Factors::Replace),
        ];
        let mut forms = forms.into_iter().flatten();
        let first = forms.next();
        if let (Some(first), Some(second)) = (&first, forms.next()) {
            let (key, other) = (first_key(&second), first_key(first));
            return Err(self.error(&key, KeyProblem::Mixed { other }));
        }
        Ok(first)
    }

    fn low_rank(&self) -> Result<Option<Factors>, LoraFormatError> {
        let Some((up, down)) = self.pair(Param::Up, Param::Down)? else {
            return Ok(None);
        };
        let ModuleShape::Linear { out, input } = self.target.shape else {
            return Err(self.not_a_vector(&up));
        };
        self.expect(&up, &up.shape(), &[out, up.size().1])?;
        let (rank, found) = down.size();
        let widened = self.target.places[0].path == "x_embedder";
        if found < input && widened {
            return Ok(Some(Factors::LowRank {
                down: down.pad_columns(input),
                up,
            }));
        }
        if !(found > input && widened) {
            self.expect(&down, &down.shape(), &[rank, input])?;
        }
        Ok(Some(Factors::LowRank { down, up }))
    }

    fn loha(&self) -> Result<Option<Factors>, LoraFormatError> {
        let first = self.pair(Param::HadaW1A, Param::HadaW1B)?;
        let second = self.pair(Param::HadaW2A, Param::HadaW2B)?;
        let ((a1, b1), (a2, b2)) = match (first, second) {
            (None, None) => return Ok(None),
            (Some(first), Some(second)) => (first, second),
            (Some((lone, _)), None) | (None, Some((lone, _))) => {
                let missing = match lone.key().contains("hada_w1") {
                    true => lone.key().replace("hada_w1", "hada_w2"),
                    false => lone.key().replace("hada_w2", "hada_w1"),
                };
                return Err(self.error(lone.key(), KeyProblem::NoPartner { missing }));
            }
        };
        for (a, b) in [(&a1, &b1), (&a2, &b2)] {
            self.expect_size(a, (a.size().0, b.size().1))?;
        }
        Ok(Some(Factors::LoHa {
            a: [a1, a2],
            b: [b1, b2],
        }))
    }

    fn lokr(&self) -> Result<Option<Factors>, LoraFormatError> {
        let outer = self.kronecker_factor([Param::LokrW1, Param::LokrW1A, Param::LokrW1B])?;
        let inner = self.kronecker_factor([Param::LokrW2, Param::LokrW2A, Param::LokrW2B])?;
        let (w1, w2) = match (outer, inner) {
            (None, None) => return Ok(None),
            (Some(outer), Some(inner)) => (outer, inner),
            (Some((_, lone)), None) => {
                let missing = lone
                    .replace("lokr_w1_a", "lokr_w2")
                    .replace("lokr_w1", "lokr_w2");
                return Err(self.error(&lone, KeyProblem::NoPartner { missing }));
            }
            (None, Some((_, lone))) => {
                let missing = lone
                    .replace("lokr_w2_a", "lokr_w1")
                    .replace("lokr_w2", "lokr_w1");
                return Err(self.error(&lone, KeyProblem::NoPartner { missing }));
            }
        };
        let lokr = LoKr {
            w1: w1.0,
            w2: w2.0,
            rows: None,
        };
        let first = lokr.tensors()[0].clone();
        self.expect_size(&first, lokr.size())?;
        Ok(Some(Factors::LoKr(lokr)))
    }

    fn kronecker_factor(
        &self,
        [full, left, right]: [Param; 3],
    ) -> Result<Option<(Side<TensorRef>, String)>, LoraFormatError> {
        let (whole, product) = (self.matrix(full)?, self.pair(left, right)?);
        Ok(match (whole, product) {
            (None, None) => None,
            (Some(whole), None) => {
                let key = whole.key().to_string();
                Some((Side::Full(whole), key))
            }
            (None, Some((left, right))) => {
                let key = left.key().to_string();
                Some((Side::Product(left, right), key))
            }
            (Some(whole), Some((left, _))) => {
                let other = whole.key().to_string();
                return Err(self.error(left.key(), KeyProblem::Mixed { other }));
            }
        })
    }

    /// A change or a value of the whole parameter.
    fn plain(&self, param: Param) -> Result<Option<TensorRef>, LoraFormatError> {
        match self.target.shape {
            ModuleShape::Norm { len } => self.vector(param, len),
            ModuleShape::Linear { out, input } => {
                let Some(tensor) = self.matrix(param)? else {
                    return Ok(None);
                };
                self.expect(&tensor, &tensor.shape(), &[out, input])?;
                Ok(Some(tensor))
            }
        }
    }

    fn expect_size(
        &self,
        tensor: &TensorRef,
        (rows, columns): (usize, usize),
    ) -> Result<(), LoraFormatError> {
        match self.target.shape {
            ModuleShape::Linear { out, input } => {
                self.expect(tensor, &[rows, columns], &[out, input])
            }
            ModuleShape::Norm { .. } => Err(self.not_a_vector(tensor)),
        }
    }

    fn not_a_vector(&self, tensor: &TensorRef) -> LoraFormatError {
        let problem = KeyProblem::Shape {
            module: self.target.name.clone(),
            expected: vec![self.target.shape.out()],
            found: tensor.shape(),
        };
        self.error(tensor.key(), problem)
    }

    /// Alpha as stated, and the factor of the change.
    fn scale(&mut self, factors: &Factors) -> Result<(Option<f64>, f64), LoraFormatError> {
        let tensor = self
            .key(Param::Alpha)
            .map(|key| self.number(key))
            .transpose()?;
        let scalar = self
            .key(Param::Scalar)
            .map(|key| self.number(key))
            .transpose()?
            .unwrap_or(1.0);
        let rank = match factors {
            Factors::LowRank { down, .. } => Some(down.size().0),
            Factors::LoHa { b, .. } => Some(b[0].size().0),
            Factors::LoKr(LoKr { w1, w2, .. }) => match (w1, w2) {
                (_, Side::Product(_, b)) | (Side::Product(_, b), _) => Some(b.size().0),
                (Side::Full(_), Side::Full(_)) => None,
            },
            Factors::Full(_) | Factors::Replace(_) => return Ok((None, scalar)),
        };
        let from_tensor = match (tensor, rank) {
            (None, _) => None,
            // Two full factors: the alpha is a placeholder, often infinite in half precision.
            (Some(alpha), None) => {
                self.check_placeholder(alpha);
                Some((alpha, 1.0))
            }
            (Some(alpha), Some(rank)) => {
                self.check_alpha(alpha)?;
                Some((alpha, alpha / rank as f64))
            }
        };
        let from_config = match self.config {
            None => None,
            Some(config) => {
                let (configured, alpha, scale) = config.resolve(&self.target.name);
                match rank {
                    Some(stored) if stored != configured => {
                        let key = first_key(factors);
                        return Err(
                            self.error(&key, KeyProblem::RankDisagrees { stored, configured })
                        );
                    }
                    None if config.algorithm == Algorithm::Lora => None,
                    _ => Some((alpha, scale)),
                }
            }
        };
        let (alpha, scale) = match (from_tensor, from_config) {
            (Some((_, tensor)), Some((_, configured)))
                if (tensor - configured).abs() > 1e-6 * configured.abs() =>
            {
                let key = self.key(Param::Alpha).unwrap_or_default();
                return Err(self.error(key, KeyProblem::AlphaDisagrees { tensor, configured }));
            }
            (Some((alpha, scale)), _) | (None, Some((alpha, scale))) => (Some(alpha), scale),
            (None, None) => (None, 1.0),
        };
        Ok((alpha, scale * scalar))
    }

    /// The one value of a tensor of any shape and dtype.
    fn number(&self, key: &str) -> Result<f64, LoraFormatError> {
        let count = self
            .file
            .info(key)
            .map_or(0, |info| info.shape.iter().product());
        if count != 1 {
            return Err(self.error(key, KeyProblem::AlphaCount { count }));
        }
        Ok(self.file.read(key)?.to_f64()[0])
    }

    fn check_alpha(&mut self, alpha: f64) -> Result<(), LoraFormatError> {
        if !alpha.is_finite() {
            let key = self.key(Param::Alpha).unwrap_or_default();
            return Err(self.error(key, KeyProblem::AlphaValue { value: alpha }));
        }
        if alpha == 0.0 {
            let name = &self.target.name;
            self.warnings.push(format!(
                "alpha of `{name}` is 0, so the module changes nothing"
            ));
        }
        Ok(())
    }

    fn check_placeholder(&mut self, alpha: f64) {
        let dim = self
            .file
            .metadata()
            .get("ss_network_dim")
            .and_then(|dim| dim.parse::<f64>().ok());
        if let Some(dim) = dim.filter(|dim| alpha.is_finite() && alpha != *dim) {
            let name = &self.target.name;
            self.warnings.push(format!(
                "`{name}` is a LoKr of two full factors, for which alpha ({alpha}) is ignored; some trainers mean the scale {alpha}/{dim}"
            ));
        }
    }

    fn bias(&self, factors: Option<&Factors>) -> Result<Option<Bias>, LoraFormatError> {
        let out = match self.target.shape {
            ModuleShape::Linear { out, .. } => out,
            ModuleShape::Norm { len } => len,
        };
        let forms = [
            self.vector(Param::UpBias, out)?.map(Bias::Scaled),
            self.vector(Param::DiffBias, out)?.map(Bias::Added),
            self.vector(Param::SetBias, out)?.map(Bias::Replaced),
        ];
        let mut forms = forms.into_iter().flatten();
        let first = forms.next();
        if let (Some(first), Some(second)) = (&first, forms.next()) {
            let other = first.tensor().key().to_string();
            return Err(self.error(second.tensor().key(), KeyProblem::Mixed { other }));
        }
        if let (Some(Bias::Scaled(lone)), None) = (&first, factors) {
            let missing = lone.key().replace(".bias", ".weight");
            return Err(self.error(lone.key(), KeyProblem::NoPartner { missing }));
        }
        Ok(first)
    }

    fn magnitude(&self, factors: Option<&Factors>) -> Result<Option<Magnitude>, LoraFormatError> {
        let Some(values) = self.tensor(Param::Magnitude)? else {
            return Ok(None);
        };
        let ModuleShape::Linear { out, input } = self.target.shape else {
            return Err(self.not_a_vector(&values));
        };
        if !matches!(
            factors,
            Some(Factors::LowRank { .. } | Factors::LoHa { .. } | Factors::LoKr(_))
        ) {
            let missing = format!("{}.lora_A.weight", self.target.name);
            return Err(self.error(values.key(), KeyProblem::NoPartner { missing }));
        }
        let axis = match values.shape().as_slice() {
            [len] | [len, 1] if *len == out => Axis::Output,
            [1, len] if *len == input => Axis::Input {
                across: self
                    .target
                    .places
                    .iter()
                    .map(|place| place.path.clone())
                    .collect(),
            },
            found => {
                let problem = KeyProblem::Magnitude {
                    out,
                    input,
                    found: found.to_vec(),
                };
                return Err(self.error(values.key(), problem));
            }
        };
        Ok(Some(Magnitude {
            values: values.flat(),
            axis,
        }))
    }
}

fn first_key(factors: &Factors) -> String {
    let update = ModuleUpdate::of(factors.clone(), 1.0);
    update.tensors()[0].key().into()
}

/// The other key of a pair.
fn partner(key: &str) -> String {
    const PAIRS: [(&str, &str); 8] = [
        ("lora_down", "lora_up"),
        ("lora_A", "lora_B"),
        (".down.", ".up."),
        ("hada_w1_a", "hada_w1_b"),
        ("hada_w2_a", "hada_w2_b"),
        ("lokr_w1_a", "lokr_w1_b"),
        ("lokr_w2_a", "lokr_w2_b"),
        ("_a", "_b"),
    ];
    for (one, other) in PAIRS {
        if key.contains(one) {
            return key.replace(one, other);
        }
        if key.contains(other) {
            return key.replace(other, one);
        }
    }
    key.into()
}
