//! The keys of one module, checked and put together to an update.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use lora_core::LoraConfig;
use lora_core::files::safetensors::TensorFile;
use lora_core::kinds::parts::{Dim, Kind, LORA_A, WHOLE};
use lora_core::peft::PeftType;

use super::error::{KeyProblem, LoraFormatError};
use super::key::Param;
use super::names::Target;
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
    pub config: Option<&'a LoraConfig>,
    /// What the configuration calls the module.
    pub configured: &'a str,
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
        let shape = |param| Some(file.info(self.params.get(&param)?)?.shape.as_slice());
        let factors = Kind::ALL.into_iter().find_map(|kind| {
            lora_core::kinds::Factors::collect(kind, |part| shape(Param::Factor(kind, part.name)))
                .ok()
        });
        let axis = |shape: &[usize], axis: usize| shape.get(axis).copied().unwrap_or_default();
        let [out, input] = match factors {
            Some(factors) => factors.size(|shape| [0, 1].map(|i| axis(shape, i))),
            None => {
                let bias = shape(Param::DiffBias).or_else(|| shape(Param::UpBias));
                [bias.map_or(0, |bias| axis(bias, 0)), 0]
            }
        };
        let known = |size: usize| Some(size).filter(|size| *size > 0);
        (known(out), known(input))
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
            alpha,
            bias,
            magnitude,
            ..ModuleUpdate::of(factors, scale)
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
        self.expect(tensor.key(), &tensor.shape(), &[len])?;
        Ok(Some(tensor))
    }

    fn expect(
        &self,
        key: &str,
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
        Err(self.error(key, problem))
    }

    fn factors(&self) -> Result<Option<Factors>, LoraFormatError> {
        let kinds = Kind::ALL.map(|kind| self.of_kind(kind));
        let kinds = kinds.into_iter().collect::<Result<Vec<_>, _>>()?;
        let mut kinds = kinds.into_iter().flatten();
        let first = kinds.next();
        if let (Some(first), Some(second)) = (&first, kinds.next()) {
            let other = first_key(first).into();
            return Err(self.error(first_key(&second), KeyProblem::Mixed { other }));
        }
        Ok(first)
    }

    /// The factors of one kind, complete and of the sizes of the module; `None` if none of its parts is there.
    fn of_kind(&self, kind: Kind) -> Result<Option<Factors>, LoraFormatError> {
        let plain = matches!(kind, Kind::Diff | Kind::Whole);
        let mut tensors = BTreeMap::new();
        for part in kind.parts() {
            let param = Param::Factor(kind, part.name);
            let tensor = match self.target.shape {
                ModuleShape::Norm { len } if plain => self.vector(param, len)?,
                _ => self.matrix(param)?,
            };
            tensors.extend(tensor.map(|tensor| (part.name, tensor)));
        }
        let Some(first) = tensors.values().next() else {
            return Ok(None);
        };
        if let (ModuleShape::Norm { .. }, false) = (self.target.shape, plain) {
            return Err(self.not_a_vector(first));
        }
        for part in kind.parts() {
            let whole = part.instead_of.and_then(|whole| tensors.get(whole));
            if let (Some(tensor), Some(whole)) = (tensors.get(part.name), whole) {
                let other = whole.key().into();
                return Err(self.error(tensor.key(), KeyProblem::Mixed { other }));
            }
        }
        let factors = Factors::collect(kind, |part| tensors.get(part.name).cloned());
        let mut factors = factors.map_err(|missing| {
            let alike = |own: &&str| {
                let pairs = own.bytes().zip(missing.name.bytes());
                Reverse(pairs.take_while(|(a, b)| a == b).count())
            };
            // The most similar part, the first of several.
            let lone = tensors.iter().min_by_key(|(own, _)| alike(own));
            let (own, key) = lone.map_or(("", ""), |(own, tensor)| (*own, tensor.key()));
            let missing = spelled(key, own, missing.name);
            self.error(key, KeyProblem::NoPartner { missing })
        })?;
        self.check_ranks(&factors)?;
        self.fit(&mut factors)?;
        Ok(Some(factors))
    }

    /// The two factors of every product have equal inner sizes.
    fn check_ranks(&self, factors: &Factors) -> Result<(), LoraFormatError> {
        let with = |axis| {
            factors
                .iter()
                .filter(move |(part, _)| part.has(axis, Dim::Rank))
        };
        for ((_, left), (_, right)) in with(1).zip(with(0)) {
            let (rank, other_rank) = (left.size().1, right.size().0);
            if rank != other_rank {
                let other = right.key().to_string();
                let problem = KeyProblem::Rank {
                    rank,
                    other,
                    other_rank,
                };
                return Err(self.error(left.key(), problem));
            }
        }
        Ok(())
    }

    /// Checks the sizes. An `x_embedder` may have other inputs than the network: fewer are filled up, more are for the
    /// caller to see.
    fn fit(&self, factors: &mut Factors) -> Result<(), LoraFormatError> {
        let ModuleShape::Linear { out, input } = self.target.shape else {
            return Ok(()); // checked as a vector
        };
        if let Some([rows, columns]) = factors.sides().map(|_| factors.size(TensorRef::axes)) {
            return self.expect(first_key(factors), &[rows, columns], &[out, input]);
        }
        let widened = self.target.places[0].path == "x_embedder";
        for (part, tensor) in factors.iter() {
            let found = tensor.shape();
            let sizes = part.dims.iter().zip(&found).map(|(dim, found)| match dim {
                Dim::Out => out,
                Dim::In if !widened => input,
                _ => *found,
            });
            let wanted = match part == WHOLE {
                true => vec![out, input],
                false => sizes.collect(),
            };
            self.expect(tensor.key(), &found, &wanted)?;
        }
        let narrow = factors.iter_mut().filter(|(part, _)| *part == LORA_A);
        for (_, down) in narrow.filter(|(_, down)| widened && down.size().1 < input) {
            *down = down.pad_columns(input);
        }
        Ok(())
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
        if factors.kind().peft_type().is_none() {
            return Ok((None, scalar));
        }
        let rank = factors.rank_part().map(|part| part.size().0);
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
                let spec = config.spec(self.configured)?;
                match rank {
                    Some(stored) if stored != spec.rank => {
                        let configured = spec.rank;
                        let problem = KeyProblem::RankDisagrees { stored, configured };
                        return Err(self.error(first_key(factors), problem));
                    }
                    // PEFT scales a LoKr of two full factors too, but a LoRA's configuration says nothing about it.
                    None if config.peft_type == PeftType::Lora => None,
                    _ => Some((spec.alpha, spec.scale())),
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
        if factors
            .and_then(|factors| factors.kind().peft_type())
            .is_none()
        {
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

/// The key that stands for the factors in messages.
fn first_key(factors: &Factors) -> &str {
    let mut parts = factors.iter();
    parts.next().map_or("", |(_, tensor)| tensor.key())
}

/// The key of the part `missing`, spelled as that of the part `own` is.
fn spelled(key: &str, own: &str, missing: &str) -> String {
    const LORA: [(&str, &str); 2] = [("lora_down", "lora_up"), (".down.", ".up.")];
    if key.contains(own) {
        return key.replace(own, missing);
    }
    let pairs = LORA.into_iter().flat_map(|(a, b)| [(a, b), (b, a)]);
    let mut swapped = pairs.filter(|(a, _)| key.contains(a));
    swapped
        .next()
        .map_or_else(|| key.into(), |(a, b)| key.replace(a, b))
}
