//! What an adapter can consist of: one table of parts for each kind, which everything that walks parts reads.

use std::fmt;

use crate::peft::selection::PeftType;

/// A kind of adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// A low-rank product, with what belongs to DoRA and `lora_bias`.
    Lora,
    /// The element-wise product of two low-rank products.
    Loha,
    /// The Kronecker product of two matrices.
    Lokr,
    /// A dense change.
    Diff,
    /// In place of the parameter: its own values.
    Whole,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 5] = [Self::Lora, Self::Loha, Self::Lokr, Self::Diff, Self::Whole];

    /// The table: every part that an adapter of this kind can have, in the order in which it is walked.
    pub fn parts(self) -> &'static [Part] {
        match self {
            Self::Lora => &LORA,
            Self::Loha => &LOHA,
            Self::Lokr => &LOKR,
            Self::Diff => &[DIFF],
            Self::Whole => &[WHOLE],
        }
    }

    /// What PEFT calls it, if PEFT has it: the kinds that have a scale.
    pub fn peft_type(self) -> Option<PeftType> {
        match self {
            Self::Lora => Some(PeftType::Lora),
            Self::Loha => Some(PeftType::Loha),
            Self::Lokr => Some(PeftType::Lokr),
            Self::Diff | Self::Whole => None,
        }
    }

    /// The first part that is needed besides those that are `there`.
    pub(crate) fn missing(self, there: impl Fn(&Part) -> bool) -> Option<Part> {
        match self {
            Self::Lokr => missing_of_lokr(there),
            _ => {
                let mut parts = self.parts().iter();
                parts.find(|part| part.needed && !there(part)).copied()
            }
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Lora => "LoRA",
            Self::Loha => "LoHa",
            Self::Lokr => "LoKr",
            Self::Diff => "full change",
            Self::Whole => "replaced weight",
        })
    }
}

/// One part of an adapter: a row in the table of its kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Its name in paths of a model (`to_q.weight.adapter.default.lora_A`) and, unless `key` says otherwise, in files.
    pub name: &'static str,
    /// What follows the layer's name in a PEFT file; `None` for what files hold in another form.
    pub key: Option<&'static str>,
    /// The same for an embedding, where that has a name of its own.
    pub embedding_key: Option<&'static str>,
    /// Its axes in a model: one for a vector, two for a matrix.
    pub dims: &'static [Dim],
    /// Its shape in a file if the layer is a convolution.
    pub convolution: Convolution,
    /// Whether it gets gradients.
    pub trained: bool,
    /// Whether every adapter of the kind has it; of a LoKr, one form of either side is.
    pub needed: bool,
    /// The part in whose place it stands: of either side of a LoKr, the matrix or its factors.
    pub instead_of: Option<&'static str>,
}

/// Length of an axis of a part, by the layer that it belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dim {
    /// Inputs; of a convolution, times the size of its kernel.
    In,
    /// Outputs.
    Out,
    /// A divisor of the outputs: a row stands for several of them.
    Outer,
    /// The rank.
    Rank,
    /// Any length: the kind checks it.
    Any,
}

/// How a file shapes a part of a convolution's adapter; in a model every part is a matrix or a vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Convolution {
    /// As in the model.
    Flat,
    /// The last axis as channels and kernel: `[r, in, kernel...]`.
    Kernel,
    /// With a kernel of ones: `[out, r, 1...]`, a vector as `[1, out, 1...]`.
    Ones,
}

impl Part {
    /// A trained part that the kind cannot do without, named in files as in paths; the others are made from it.
    const fn new(name: &'static str, key: &'static str, dims: &'static [Dim]) -> Self {
        Self {
            name,
            key: Some(key),
            embedding_key: None,
            dims,
            convolution: Convolution::Flat,
            trained: true,
            needed: true,
            instead_of: None,
        }
    }

    /// What follows the layer's name in a PEFT file.
    pub fn key(&self, embedding: bool) -> Option<&'static str> {
        self.embedding_key.filter(|_| embedding).or(self.key)
    }

    /// Whether it is one row of numbers in a model, not a matrix.
    pub fn is_vector(&self) -> bool {
        self.dims.len() == 1
    }

    /// Whether an axis of it has the length `dim`: rows are axis 0.
    pub fn has(&self, axis: usize, dim: Dim) -> bool {
        self.dims.get(axis) == Some(&dim)
    }
}

/// Down projection, `[r, in]`; of a convolution `[r, in, kernel...]`, of an embedding `[r, entries]`.
pub const LORA_A: Part = Part {
    embedding_key: Some(".lora_embedding_A"),
    convolution: Convolution::Kernel,
    ..Part::new("lora_A", ".lora_A.weight", &[Dim::Rank, Dim::In])
};
/// Up projection, `[out, r]`; of a convolution `[out, r, 1...]`.
pub const LORA_B: Part = Part {
    embedding_key: Some(".lora_embedding_B"),
    convolution: Convolution::Ones,
    ..Part::new("lora_B", ".lora_B.weight", &[Dim::Out, Dim::Rank])
};
/// DoRA magnitude, `[out]`; of a convolution `[1, out, 1...]`.
pub const MAGNITUDE: Part = Part {
    convolution: Convolution::Ones,
    needed: false,
    ..Part::new(
        "lora_magnitude_vector",
        ".lora_magnitude_vector",
        &[Dim::Out],
    )
};
/// Bias of the up projection, `[out]`.
pub const LORA_BIAS: Part = Part {
    needed: false,
    ..Part::new("lora_B_bias", ".lora_B.bias", &[Dim::Out])
};
/// Down projection that a LoRA started from, `[r, in]`, if its factors were split off the base weight: it is not trained,
/// and the update is the difference from it.
pub const INITIAL_A: Part = start("initial_A", &[Dim::Rank, Dim::In]);
/// Up projection that a LoRA started from, `[out, r]`.
pub const INITIAL_B: Part = start("initial_B", &[Dim::Out, Dim::Rank]);

const LORA: [Part; 6] = [LORA_A, LORA_B, MAGNITUDE, LORA_BIAS, INITIAL_A, INITIAL_B];

/// A file holds the start as a part of the factors.
const fn start(name: &'static str, dims: &'static [Dim]) -> Part {
    Part {
        key: None,
        trained: false,
        needed: false,
        ..Part::new(name, "", dims)
    }
}

/// The parts of a LoHa: `[out, r]` and `[r, in]`, twice.
pub(crate) const LOHA: [Part; 4] = [
    Part::new("hada_w1_a", ".hada_w1_a", &[Dim::Out, Dim::Rank]),
    Part::new("hada_w1_b", ".hada_w1_b", &[Dim::Rank, Dim::In]),
    Part::new("hada_w2_a", ".hada_w2_a", &[Dim::Out, Dim::Rank]),
    Part::new("hada_w2_b", ".hada_w2_b", &[Dim::Rank, Dim::In]),
];

/// The two sides of a LoKr, each as a matrix or as the factors of one.
pub(crate) const SIDES: [[Part; 3]; 2] = [
    [
        either(None, "lokr_w1", ".lokr_w1", &[Dim::Outer, Dim::Any]),
        either(
            Some("lokr_w1"),
            "lokr_w1_a",
            ".lokr_w1_a",
            &[Dim::Outer, Dim::Rank],
        ),
        either(
            Some("lokr_w1"),
            "lokr_w1_b",
            ".lokr_w1_b",
            &[Dim::Rank, Dim::Any],
        ),
    ],
    [
        Part {
            convolution: Convolution::Kernel,
            ..either(None, "lokr_w2", ".lokr_w2", &[Dim::Any, Dim::Any])
        },
        either(
            Some("lokr_w2"),
            "lokr_w2_a",
            ".lokr_w2_a",
            &[Dim::Any, Dim::Rank],
        ),
        either(
            Some("lokr_w2"),
            "lokr_w2_b",
            ".lokr_w2_b",
            &[Dim::Rank, Dim::Any],
        ),
    ],
];

/// The parts of a LoKr.
const LOKR: [Part; 6] = {
    let [[w1, w1_a, w1_b], [w2, w2_a, w2_b]] = SIDES;
    [w1, w1_a, w1_b, w2, w2_a, w2_b]
};

/// A part of a LoKr's side: the matrix, or a factor of it.
const fn either(
    instead_of: Option<&'static str>,
    name: &'static str,
    key: &'static str,
    dims: &'static [Dim],
) -> Part {
    Part {
        needed: false,
        instead_of,
        ..Part::new(name, key, dims)
    }
}

/// A dense change, `[out, in]`; LyCORIS calls it `diff`.
pub const DIFF: Part = Part::new("diff", ".diff", &[Dim::Out, Dim::In]);
/// The parameter itself, flat in a model.
pub const WHOLE: Part = Part {
    key: None, // under the name that it has in PyTorch
    ..Part::new("whole", "", &[Dim::Any])
};

/// The first part that a LoKr lacks: the other half of a product, else a whole side.
fn missing_of_lokr(there: impl Fn(&Part) -> bool) -> Option<Part> {
    let half = SIDES.into_iter().find_map(|[full, left, right]| {
        match (there(&full), there(&left), there(&right)) {
            (false, true, false) => Some(right),
            (false, false, true) => Some(left),
            _ => None,
        }
    });
    let absent = |[full, left, _]: [Part; 3]| (!there(&full) && !there(&left)).then_some(full);
    half.or_else(|| SIDES.into_iter().find_map(absent))
}
