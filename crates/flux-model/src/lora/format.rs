//! The formats that can be written, how, and what writing one says.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use lora_core::files::host::Dtype;

use super::readers::Reading;

/// Formats that can be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoraFormat {
    /// One file with diffusers' names and a header that says alpha.
    Diffusers,
    /// A folder with `adapter_config.json`; text encoders in subfolders.
    Peft,
    /// One file with BFL's fused modules, flattened names and alpha on every module.
    Kohya,
    /// One file with BFL's fused modules and dotted names: for FLUX.1 with kohya's parameters and alpha, for FLUX.2 with
    /// PEFT's and the scale folded, which diffusers loads as well.
    ComfyUi,
}

impl LoraFormat {
    /// All formats.
    pub const ALL: [Self; 4] = [Self::Diffusers, Self::Peft, Self::Kohya, Self::ComfyUi];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Diffusers => "diffusers",
            Self::Peft => "peft",
            Self::Kohya => "kohya",
            Self::ComfyUi => "comfyui",
        }
    }

    /// The format of that name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|format| format.name() == name)
    }
}

impl fmt::Display for LoraFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How a LoRA is written.
#[derive(Debug, Clone, Copy, Default)]
pub struct WriteOptions {
    /// Element type of weights: F32, F16 or BF16; `None` keeps what each tensor has (8-bit floats become BF16).
    pub dtype: Option<Dtype>,
    /// Leave out what the format cannot hold, and report it, instead of failing.
    pub lossy: bool,
}

/// What was written and what was not.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct WriteReport {
    /// The files.
    pub files: Vec<PathBuf>,
    /// Modules, counted as the format names them.
    pub modules: usize,
    /// What the format could not hold.
    pub losses: Vec<Loss>,
    /// What programs that read the format do with it.
    pub notes: Vec<String>,
    /// What programs do with each key.
    pub readings: Vec<Reading>,
}

impl WriteReport {
    /// What the format could not hold, one line a reason: of how many modules, and the first by name.
    pub fn lost_lines(&self) -> Vec<String> {
        let mut reasons: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for loss in &self.losses {
            reasons.entry(&loss.reason).or_default().push(&loss.module);
        }
        let line = |(reason, modules): (&str, Vec<&str>)| {
            let noun = if modules.len() == 1 {
                "module"
            } else {
                "modules"
            };
            let (count, first) = (modules.len(), modules[0]);
            format!("cannot hold what is trained of {count} {noun}, first {first}: {reason}")
        };
        reasons.into_iter().map(line).collect()
    }
}

/// A module that a format cannot hold, or not with its bias.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loss {
    /// Component and module path.
    pub module: String,
    /// Why not.
    pub reason: String,
}
